"""Debian's Linux to boot in an emulator: where its kernel is, and an initramfs of our own making.

The kernel is that of a package `linux-image-*-amd64`: installed on this host, or downloaded by
`download` and unpacked into the user's cache, with nothing installed.
"""

import contextlib
import lzma
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_cache_path

from vapama.oracles.emulator import CannotStart

CACHE = user_cache_path("vapama") / "linux"
CLOUD, PAE, LEGACY = "cloud-amd64", "686-pae", "686"
"""The flavors: x86-64, and 32-bit x86 with PAE paging and without."""
MODULES = ("virt/lib/irqbypass", "arch/x86/kvm/kvm", "arch/x86/kvm/kvm-amd")
"""What KVM consists of, in the order of loading."""


class Linux(NamedTuple):
    """A kernel, and the folder of its modules."""

    kernel: Path
    modules: Path

    def module(self, name: str) -> bytes:
        """A module by its path below `kernel/`; empty if it is built in."""
        path = self.modules / "kernel" / f"{name}.ko"
        if path.exists():
            return path.read_bytes()
        packed = path.with_suffix(".ko.xz")
        return lzma.decompress(packed.read_bytes()) if packed.exists() else b""


def find(flavor: str = CLOUD) -> Linux | None:
    """A kernel of Debian's that is here: of the folder that VAPAMA_LINUX names, else that
    downloaded, else, for x86-64, one that is installed.
    """
    cache = Path(os.environ.get("VAPAMA_LINUX", CACHE))
    ending = flavor.removeprefix("cloud-")
    roots = [cache / flavor, *([Path("/")] if flavor == CLOUD else [])]
    for root in roots:
        for kernel in sorted(root.glob(f"boot/vmlinuz-*-{ending}"), reverse=True):
            modules = root / "lib/modules" / kernel.name.removeprefix("vmlinuz-")
            if modules.is_dir():
                return Linux(kernel, modules)
    return None


def required(flavor: str = CLOUD) -> Linux:
    """The same. Raises `CannotStart` if there is none."""
    found = find(flavor)
    if found is None:
        option = "" if flavor == CLOUD else f" --flavor {flavor}"
        raise CannotStart(
            f"no kernel {flavor} of Debian's is here: vapama oracles linux{option} downloads one"
        )
    return found


def download(flavor: str = CLOUD) -> Linux:
    """Have apt download the kernel's package, and unpack it. Raises `CannotStart`."""
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise CannotStart(f"{tool} is not here: the kernel is Debian's")
    with tempfile.TemporaryDirectory() as folder:
        options = [] if flavor == CLOUD else _lists_of_i386(Path(folder))
        told = _run("apt-cache", *options, "depends", "--important", f"linux-image-{flavor}")
        names = [line.split()[1] for line in told.splitlines() if "Depends: linux-image" in line]
        if not names:
            raise CannotStart(f"apt knows no linux-image-{flavor}: run apt-get update")
        _run("apt-get", *options, "download", "-qq", names[0], where=folder)
        (package,) = Path(folder).glob("*.deb")
        unpacked = Path(folder) / "unpacked"
        _run("dpkg-deb", "-x", str(package), str(unpacked))
        shutil.rmtree(CACHE / flavor, ignore_errors=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        shutil.move(unpacked, CACHE / flavor)
    return required(flavor)


def _lists_of_i386(folder: Path) -> list[str]:
    """Options by which apt knows the packages of 32-bit x86, in a folder of its own."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    options = [
        *("-o", f"Dir::State={folder}/state", "-o", f"Dir::Cache={folder}/cache"),
        *("-o", "Dir::State::status=/dev/null"),
        *("-o", "APT::Architecture=i386", "-o", "APT::Architectures=i386"),
    ]
    with contextlib.suppress(CannotStart):  # some list or other may be missing
        _run("apt-get", *options, "update", "-qq")
    return options


def _run(*command: str, where: str = ".") -> str:
    done = subprocess.run(
        command, cwd=where, capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        last = (done.stderr.strip() or "it failed").splitlines()[-1]
        raise CannotStart(f"{' '.join(command[:2])}: {last}")
    return done.stdout


def initramfs(files: Mapping[str, bytes]) -> bytes:
    """An initramfs of executable files at its root, in cpio's format.

    Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    archive = b""
    for number, (name, data) in enumerate([*files.items(), ("TRAILER!!!", b"")]):
        mode = 0o100755 if number < len(files) else 0
        fields = (number + 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields)
        archive = _padded(archive + name.encode() + b"\0")
        archive = _padded(archive + data)
    return archive


def _padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 4) * 4, b"\0")
