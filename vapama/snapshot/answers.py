"""What an image's page tables say: where addresses lead, and all that is mapped."""

from collections.abc import Iterator, Mapping
from typing import Any

from vapama.case import BadInput
from vapama.explain import SIZES
from vapama.impl.listing import Listing, Runs, four_or_five_levels
from vapama.snapshot.images import Absent, Image
from vapama.spec import modes, paging
from vapama.spec.access import Access
from vapama.spec.cpu import (
    LMA,
    LME,
    NXE,
    PAE,
    PE,
    PG,
    RFLAGS_ONE,
    WP,
    Cpu,
    ImpossibleState,
    UnsupportedMode,
)
from vapama.spec.outcomes import Outcome, OutsideMemory

MAXPHYADDR = 52
"""The width of physical addresses where nothing says what it is: then no bit of a frame is
reserved."""


def control_state(image: Image, given: Mapping[str, int], processor: int = 0) -> Cpu:
    """The control state to walk in: what is `given`, by name of register, else what the image has
    of that processor, else that of a 64-bit system. Raises `BadInput`.
    """
    there = image.registers
    if processor and processor >= len(there):
        raise BadInput(f"--processor {processor}: {image.name} has registers of {len(there)}")
    known = {**(there[processor] if there else {}), **given}
    if "cr3" not in known:
        raise BadInput(f"{image.name} does not say where the tables are: give --cr3")
    known.setdefault("cr0", PG | PE | WP)
    known.setdefault("cr4", 0 if image.machine == 32 else PAE)
    known.setdefault("efer", _efer(image, known))
    known.setdefault("maxphyaddr", MAXPHYADDR)
    try:
        return Cpu(
            known["cr0"],
            known["cr3"],
            known["cr4"],
            known["efer"],
            known.get("rflags", RFLAGS_ONE),
            known.get("pkru", 0),
            known.get("pkrs", 0),
            maxphyaddr=known["maxphyaddr"],
        )
    except (ImpossibleState, UnsupportedMode) as error:
        raise BadInput(f"{image.name}: {error}") from None


def _efer(image: Image, known: Mapping[str, int]) -> int:
    """EFER where nothing says what it is: an ELF core's notes do not."""
    if not known["cr4"] & PAE:
        return 0
    if image.machine == 32 or not known["cr0"] & PG:
        return NXE
    return LME | LMA | NXE


def translate(cpu: Cpu, image: Image, access: Access) -> Outcome:
    """The outcome of an access; an entry in a gap between pieces of memory is outside of it."""
    try:
        return paging.translate(cpu, image, access)
    except Absent as absent:
        return OutsideMemory(absent.address)


ADDRESSED = 0x000F_FFFF_FFFF_F000
DISTINGUISHED = 0xFFFF_FFFF_FFFF_FFFF & ~(
    ADDRESSED | paging.ACCESSED | paging.DIRTY | 0xE00 | 0x07F0 << 48
)
"""What neighbours must have equal to be one run: neither accessed and dirty flags, nor what the
architecture ignores."""


def mappings(cpu: Cpu, image: Image, merge: bool, most_runs: int, most_reads: int) -> Listing:
    """A list in the making of all that is mapped. Raises `BadInput` if its root is not there."""
    if cpu.mode not in (modes.FOUR_LEVEL, modes.FIVE_LEVEL):
        raise BadInput(f"{image.name}: {cpu.mode.name} is not listed yet: 4-level and 5-level are")
    form = four_or_five_levels(cpu)
    same = DISTINGUISHED if merge else 0
    if merge and cpu.pke | cpu.pks:
        same |= 0xF << 59
    listing = Listing(image.pieces, form, same, most_runs, most_reads)
    if listing.absent:
        raise BadInput(f"{image.name} does not hold the root table at {form.root:#x}: check --cr3")
    return listing


def as_rows(runs: Runs) -> Iterator[dict[str, Any]]:
    """Runs as JSON has them."""
    for address, pa, level, pages, rights, entry in zip(*map(_plain, runs), strict=True):
        yield {
            "address": hex(address),
            "physical": hex(pa),
            "page_bytes": paging.page_offset(level) + 1,
            "pages": pages,
            "write": bool(rights & paging.WRITABLE),
            "user": bool(rights & paging.USER),
            "execute": bool(rights & paging.EXECUTE_DISABLE),
            "entry": hex(entry),
        }


def as_lines(cpu: Cpu, runs: Runs, merged: bool) -> Iterator[str]:
    """Runs for people to read, a line each."""
    for address, pa, level, pages, rights, entry in zip(*map(_plain, runs), strict=True):
        last = address + pages * (paging.page_offset(level) + 1) - 1
        letters = ("r", "w" if rights & paging.WRITABLE else "-")
        text = "".join(letters) + ("x" if rights & paging.EXECUTE_DISABLE else "-")
        who = "user" if rights & paging.USER else "supervisor"
        size = f"{pages:,} x {SIZES[level]}"
        bits = [name for bit, name in BITS if entry & bit and not (merged and bit & FLAGS)]
        if cpu.pke | cpu.pks:
            bits.append(f"key {entry >> 59 & 0xF}")
        line = f"{address:#018x}-{last:#018x}  {size:<14} {pa:#015x}  {text} {who:<10} "
        yield (line + " ".join(bits)).rstrip()


def _plain(column: Any) -> list[int]:
    values: list[int] = column.tolist()
    return values


FLAGS = paging.ACCESSED | paging.DIRTY
BITS = (
    (paging.GLOBAL, "G"),
    (paging.WRITE_THROUGH, "PWT"),
    (paging.CACHE_DISABLE, "PCD"),
    (paging.ACCESSED, "A"),
    (paging.DIRTY, "D"),
)
