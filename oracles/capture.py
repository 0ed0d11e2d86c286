"""Page tables of a real Linux, captured with what the emulator that ran it says that they map.

QEMU boots Debian's kernel with our init (guest/capture.c) and is stopped in ring 3. Its RAM is a
file that we map; its monitor lists every mapping (`info tlb`), which is the truth that walks of the
tables are held against.
"""

import json
import mmap
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vapama.oracles import linux
from vapama.oracles.emulator import CannotStart, Emulator, built
from vapama.oracles.qemu import EMULATOR
from vapama.spec.cpu import LA57, LMA, PAE

SOURCES = Path(__file__).parent / "guest"


class Kind(NamedTuple):
    """A kind of paging: QEMU's CPU model for it, the kernel, our init, and the compiler's options
    for that.
    """

    model: str
    flavor: str = linux.CLOUD
    source: str = "capture.c"
    options: tuple[str, ...] = ()


FREESTANDING = ("-m32", "-ffreestanding", "-fno-stack-protector", "-fno-pie", "-nostdlib")
KINDS = {
    "4-level": Kind("max,la57=off"),
    "5-level": Kind("max,la57=on"),
    "pae": Kind("max", linux.PAE, "capture32.c", FREESTANDING),
    "32-bit": Kind("max", linux.LEGACY, "capture32.c", FREESTANDING),
}
MAXPHYADDR = 40
RAM_BYTES = 256 << 20
PDPT = 0xFFFF_FFE0
PAGE, FRAME, PRESENT, PAGE_SIZE = 4096, 0x000F_FFFF_FFFF_F000, 1, 1 << 7
Words = npt.NDArray[np.uint64]


class Guest(Emulator):
    """A Linux that has booted, stopped in ring 3."""

    name = "qemu"

    def __init__(self, kind: str) -> None:
        """Boot it, and stop it. Raises `CannotStart`."""
        super().__init__()
        self.monitor: Monitor | None = None
        model, flavor, source, options = KINDS[kind]
        found = linux.required(flavor)
        init = self.folder / "init"
        compiler = ["gcc", "-std=gnu11", "-O2", "-Wall", "-static", *options]
        built([*compiler, "-o", str(init), str(SOURCES / source)])
        (self.folder / "initramfs").write_bytes(linux.initramfs({"init": init.read_bytes()}))
        ram = self.folder / "ram"
        with ram.open("wb") as file:
            file.truncate(RAM_BYTES)
        with ram.open("r+b") as file:
            self.ram = mmap.mmap(file.fileno(), RAM_BYTES, access=mmap.ACCESS_READ)
        backend = f"memory-backend-file,id=ram,size={RAM_BYTES},mem-path=ram,share=on"
        self.launch(
            [
                EMULATOR,
                *("-machine", "pc,accel=tcg,memory-backend=ram,mem-merge=off", "-object", backend),
                *("-m", f"{RAM_BYTES >> 20}M", "-cpu", f"{model},phys-bits={MAXPHYADDR}"),
                *("-display", "none", "-nodefaults", "-no-user-config", "-no-reboot"),
                *("-serial", "stdio", "-qmp", "unix:qmp,server=on,wait=off"),
                *("-kernel", str(found.kernel), "-initrd", "initramfs"),
                *("-append", "console=ttyS0 quiet panic=-1"),
            ]
        )
        deadline = time.monotonic() + 180
        while "capture: ready" not in (self.folder / "log").read_text(errors="replace"):
            self.require_starting(deadline)
            time.sleep(0.1)
        self.monitor = monitor = Monitor(self.folder / "qmp")
        for _ in range(1000):
            monitor.ask("stop")
            if "CPL=3" in monitor.say("info registers"):
                return
            monitor.ask("cont")
            time.sleep(0.01)
        self.end()
        raise CannotStart("the guest was never found in ring 3")

    def end(self) -> None:
        """Stop it for certain."""
        if self.monitor is not None:
            self.monitor.file.close()
            self.monitor = None
        super().end()


class Monitor:
    """QEMU's monitor, over a socket (QMP)."""

    def __init__(self, path: Path) -> None:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(path))
        self.file = connection.makefile("rw")
        connection.close()  # the file is what is left of it
        self.file.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: str) -> Any:
        """What a command returns. Raises `CannotStart` for an error."""
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while line := self.file.readline():
            answer = json.loads(line)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise CannotStart(f"qemu: {command}: {answer['error']['desc']}")
        raise CannotStart(f"qemu ended at {command}")

    def say(self, line: str) -> str:
        """What the human monitor says to a line."""
        return str(self.ask("human-monitor-command", **{"command-line": line}))


def captured(kind: str) -> dict[str, Any]:
    """A snapshot, as arrays by name: see data/README.md. Raises `CannotStart`."""
    guest = Guest(kind)
    try:
        assert guest.monitor is not None
        registers = registers_of(guest.monitor.say("info registers"))
        truth = truth_of(guest.monitor.say("info tlb"))
        words = np.frombuffer(guest.ram, dtype=np.uint64).reshape(-1, PAGE // 8)
        frames = frames_of_tables(words, registers)
        tables = words[frames >> 12].copy()
        if registers["cr4"] & PAE and not registers["efer"] & LMA:
            _clear_marks(tables, frames, registers["cr3"])
    finally:
        guest.end()
    numbers = {name: np.uint64(value) for name, value in registers.items()}
    return {"frames": frames.astype(np.uint64), "tables": tables, **numbers, **truth}


def save(path: Path, arrays: dict[str, Any]) -> None:
    """Write a snapshot. Raises `OSError`."""
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def registers_of(text: str) -> dict[str, int]:
    """The control registers that the monitor lists."""
    found = {name.lower(): int(value, 16) for name, value in REGISTER.findall(text)}
    return {name: found[name] for name in ("cr0", "cr3", "cr4", "efer")}


REGISTER = re.compile(r"\b(CR[034]|EFER)\s*=\s*([0-9a-f]+)")
MAPPING = re.compile(r"^([0-9a-f]{16}): ([0-9a-f]{16}) ([-XGPDACTUW]{9})\s*$", re.MULTILINE)


def truth_of(text: str) -> dict[str, Any]:
    """The mappings that `info tlb` lists, a page each."""
    rows = MAPPING.findall(text)
    if not rows:
        raise CannotStart("qemu lists no mappings")
    return {
        "truth_va": np.array([int(va, 16) for va, _, _ in rows], dtype=np.uint64),
        # In PAE paging QEMU 7.2 leaves the entry's upper bits in.
        "truth_pa": np.array([int(pa, 16) & FRAME for _, pa, _ in rows], dtype=np.uint64),
        "truth_flags": np.array([flags for _, _, flags in rows]),
    }


def frames_of_tables(words: Words, registers: Mapping[str, int]) -> npt.NDArray[np.int64]:
    """The frames of all paging structures below CR3, in RAM that begins at address 0."""
    cr3, cr4 = registers["cr3"], registers["cr4"]
    if registers["efer"] & LMA or "ncr3" in registers:
        return _below(words, cr3 & FRAME, 5 if cr4 & LA57 else 4)
    if cr4 & PAE:
        pdptes = words.reshape(-1)[(cr3 & PDPT) >> 3 :][:4]
        roots = [int(e) & FRAME for e in pdptes if int(e) & PRESENT]
        return np.unique([cr3 & FRAME, *np.concatenate([_below(words, r, 2) for r in roots])])
    return _below(words.view(np.uint32), cr3 & FRAME, 2)


ACCESSED = 1 << 5


def _clear_marks(tables: Words, frames: npt.NDArray[np.int64], cr3: int) -> None:
    """Clear what QEMU sets in the PDPTEs of PAE paging as it walks: in memory they have no accessed
    flag, and the bit is reserved (SDM Vol. 3A, table 4-8). A processor has them in registers.
    """
    page = int(np.flatnonzero(frames == cr3 & FRAME)[0])
    first = (cr3 & PDPT & 0xFFF) >> 3
    tables[page, first : first + 4] &= np.uint64(~ACCESSED & (1 << 64) - 1)


def _below(words: Any, root: int, levels: int) -> npt.NDArray[np.int64]:
    """The frames of the tables from a root on, with entries as large as the words."""
    found = tables = np.array([root], dtype=np.int64)
    for level in range(levels, 1, -1):
        entries = words[tables >> 12].reshape(-1).astype(np.uint64)
        wanted = entries & np.uint64(PRESENT) != 0
        if level in (2, 3):
            wanted &= entries & np.uint64(PAGE_SIZE) == 0
        below = (entries[wanted] & np.uint64(FRAME)).astype(np.int64)
        tables = np.unique(below[below >> 12 < len(words)])
        found = np.union1d(found, tables)
    return found
