"""The oracles: what each is, what it needs of this host, and how it departs from the manual."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vapama.oracles import departures, kvm, linux, nested_kvm, unicorn
from vapama.oracles.bochs import BIOS
from vapama.oracles.departures import Departure
from vapama.oracles.qemu import EMULATOR


@dataclass(frozen=True)
class Oracle:
    """A real system to judge by. `lacks` says what of it this host lacks, in words."""

    name: str
    what: str
    lacks: Callable[[], str]
    departures: tuple[Departure, ...] = ()


def missing(oracle: Oracle) -> str:
    """Why this host does not have it; empty if it has."""
    return oracle.lacks()


def _program(*names: str) -> str:
    lacking = [name for name in names if shutil.which(name) is None]
    return f"{', '.join(lacking)} not installed" if lacking else ""


def _bochs() -> str:
    why = _program("nasm", "bochs")
    if not why and not (BIOS / "BIOS-bochs-latest").exists():
        why = "bochsbios not installed"
    if not why and not (BIOS / "VGABIOS-lgpl-latest").exists():
        why = "vgabios not installed"
    return why


def _unicorn() -> str:
    found = importlib.util.find_spec("unicorn")
    return "" if found else "not installed: pip install 'vapama[unicorn]'"


def _named(sources: Mapping[str, str]) -> tuple[Departure, ...]:
    """Departures that are told from others elsewhere, by name and source."""
    return tuple(Departure(n, source, source, lambda found: False) for n, source in sources.items())


def _nested_kvm() -> str:
    why = _program("nasm", "gcc", EMULATOR)
    if not why and linux.find() is None:
        why = "no kernel of Debian's: `vapama oracles linux` downloads one"
    return why


def _kvm() -> str:
    device = Path(kvm.DEVICE)
    if not device.exists():
        return f"there is no {device}"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"{device} may not be opened by this user"
    return ""


ORACLES = (
    Oracle(
        "unicorn",
        "Unicorn: QEMU 5's page walker in this process",
        _unicorn,
        _named(unicorn.DEPARTURES),
    ),
    Oracle(
        "qemu",
        "QEMU's TCG with our bare-metal guest: every paging mode, rings 0 and 3",
        lambda: _program("nasm", EMULATOR),
        departures.QEMU,
    ),
    Oracle(
        "bochs",
        "Bochs with the same guest: every paging mode but 5-level, rings 0 and 3",
        _bochs,
        departures.BOCHS,
    ),
    Oracle(
        "kvm",
        "KVM's own walk on this host (KVM_TRANSLATE), no guest code run; only when it is named",
        _kvm,
        _named(kvm.DEPARTURES),
    ),
    Oracle(
        "kvm-shadow",
        "Linux' KVM with its shadow MMU (npt=0) in QEMU's TCG: programs of guest and host steps",
        _nested_kvm,
        _named(nested_kvm.DEPARTURES),
    ),
    Oracle(
        "kvm-tdp",
        "the same with nested page tables (npt=1), KVM's TDP MMU",
        _nested_kvm,
        _named(nested_kvm.DEPARTURES_OF_TDP),
    ),
)
