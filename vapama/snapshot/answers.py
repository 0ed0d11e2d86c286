"""What an image's page tables say: where addresses lead, and all that is mapped."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vapama.case import BadInput
from vapama.impl.kernels import mappings as kernel
from vapama.impl.listing import Listing, Pieces, Runs, Words, composed, form_of
from vapama.snapshot.images import Absent, Image, Piece
from vapama.spec import ept, modes, nested, paging, second_stage
from vapama.spec.access import Access, GuestPhysicalAccess
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
from vapama.spec.stage import Ept, Npt, Stage
from vapama.spec.words import WORD

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


def second_stage_state(
    given: Mapping[str, int], maxphyaddr: int | None, mbec: bool
) -> Stage | None:
    """The second stage that is `given` by EPTP, or by nCR3 and the host's CR4 and EFER, if one is.

    Raises `BadInput`.
    """
    if "eptp" in given and "ncr3" in given:
        raise BadInput("give --eptp or --ncr3, not both")
    width = maxphyaddr or MAXPHYADDR
    try:
        if "eptp" in given:
            return Ept(given["eptp"], width, int(mbec))
        if "ncr3" in given:
            host = {
                name: given[f"host_{name}"] for name in ("cr4", "efer") if f"host_{name}" in given
            }
            return Npt(given["ncr3"], maxphyaddr=width, **host)
    except (ImpossibleState, UnsupportedMode) as error:
        raise BadInput(f"the second stage: {error}") from None
    return None


def translate(cpu: Cpu, image: Image, access: Access, stage: Stage | None = None) -> Outcome:
    """The outcome of an access, through a second stage if there is one; an entry in a gap between
    pieces of memory is outside of it.
    """
    try:
        if stage is not None:
            return nested.translate(cpu, stage, image, access)
        return paging.translate(cpu, image, access)
    except Absent as absent:
        return OutsideMemory(absent.address)


def second_stage_translate(stage: Stage, image: Image, access: GuestPhysicalAccess) -> Outcome:
    """The same of a guest-physical address."""
    try:
        return second_stage.translate(stage, image, access)
    except Absent as absent:
        return OutsideMemory(absent.address)


# LISTS

DISTINGUISHED = WORD & ~(kernel.FRAME | paging.ACCESSED | paging.DIRTY | 0xE00 | 0x07F0 << 48)
"""What neighbours must have equal to be one run: neither accessed and dirty flags, nor what the
architecture ignores."""
EPT_DISTINGUISHED = ept.RIGHTS | ept.MEMORY_TYPE | ept.IGNORE_PAT


def distinguished(state: Cpu | Stage) -> int:
    """The bits of entries that neighbours must have equal to be one run."""
    if isinstance(state, Ept):
        return EPT_DISTINGUISHED
    keys = isinstance(state, Cpu) and state.pke | state.pks
    return DISTINGUISHED | (0xF << 59 if keys else 0)


def listing_of(
    state: Cpu | Stage,
    pieces: Pieces,
    name: str,
    merge: bool,
    most_runs: int = WORD,
    most_reads: int = WORD,
) -> Listing:
    """A list in the making of all that is mapped. Raises `BadInput` if its root is not there."""
    if isinstance(state, Cpu) and state.mode is modes.OFF:
        raise BadInput(f"{name}: paging is off (CR0.PG is 0): no tables map anything")
    form = form_of(state)
    same = distinguished(state) if merge else 0
    listing = Listing(pieces, form, same, most_runs, most_reads)
    if listing.absent:
        root = "--cr3" if isinstance(state, Cpu) else "--eptp or --ncr3"
        raise BadInput(f"{name} does not hold the root table at {form.root:#x}: check {root}")
    return listing


# Rights as rows of a list have them.
READ, WRITE, EXECUTE, USER = 1, 2, 4, 8


class Rows(NamedTuple):
    """Mapped ranges, by column. `rights` are READ, WRITE, EXECUTE, and USER: a user's page, or one
    that EPT lets a user execute.
    """

    addresses: Words
    pas: Words
    shifts: Words
    pages: Words
    rights: Words
    entries: Words


def as_rows(state: Cpu | Stage, runs: Runs) -> Rows:
    """The runs of one stage."""
    return Rows(*runs[:4], rights_of(state, runs.rights), runs.entries)


def rights_of(state: Cpu | Stage, bits: Words) -> Words:
    """The rights that a list has, READ to USER, for those that the kernel has."""
    u64 = np.uint64
    user, execute = bits << u64(1) & u64(USER), bits >> u64(61) & u64(EXECUTE)
    rights: Words = u64(READ) | bits & u64(WRITE) | execute
    if isinstance(state, Ept):
        rights = bits & u64(READ | WRITE | EXECUTE) | bits >> u64(7) & u64(USER)
    elif isinstance(state, Npt):
        # Every access of a guest is a user's here.
        rights = rights * (user >> u64(3))
    else:
        rights = rights | user
    return rights


@dataclass
class Guest:
    """The memory of a guest, as a second stage gives it: runs of guest-physical addresses."""

    stage: Stage
    runs: Rows
    pieces: Pieces
    unmapped: int = 0
    """How many bytes that the guest's tables map the second stage does not."""

    def through(self, cpu: Cpu, batch: Runs, merge: bool) -> Iterator[Rows]:
        """The runs of the guest's own tables, led on through the second stage."""
        for parts in composed(batch, self.runs):
            run, stage = parts.run.astype(np.int64), parts.stage.astype(np.int64)
            rights = self._both(rights_of(cpu, batch.rights)[run], self.runs.rights[stage])
            self.unmapped = parts.unmapped
            rows = Rows(*parts[1:5], rights, batch.entries[run])
            if merge:
                yield rows
            else:
                yield from _one_by_one(rows)

    def _both(self, first: Words, second: Words) -> Words:
        """What both stages allow. With mode-based execution EPT tells users from supervisors."""
        user = first & np.uint64(USER)
        by_user = (second & np.uint64(USER)) >> np.uint64(1)
        if isinstance(self.stage, Ept) and self.stage.mbec:
            second = np.where(user, second & np.uint64(READ | WRITE) | by_user, second)
        return first & second & np.uint64(READ | WRITE | EXECUTE) | user


def guest_memory(stage: Stage, image: Image, most_runs: int, most_reads: int) -> Guest:
    """The memory that a second stage gives a guest. Raises `BadInput` if it is too much to list."""
    listing = listing_of(stage, image.pieces, image.name, True, most_runs, most_reads)
    batches = list(listing.batches())
    if listing.stopped:
        raise BadInput(
            f"{image.name}: the second stage maps more than --most-{listing.stopped} allows: "
            f"{listing.listed:,} runs were found among {listing.reads:,} entries"
        )
    columns = (np.concatenate(column) for column in zip(*batches, strict=True))
    runs = as_rows(stage, Runs(*columns))
    # Tables are read, and written with EPT's accessed flags or by AMD's rule; what allows less than
    # that holds none.
    needed = READ if isinstance(stage, Ept) and not stage.ad else READ | WRITE
    pieces: list[Piece] = []
    for gpa, pa, shift, pages, rights, _ in zip(*(c.tolist() for c in runs), strict=True):
        if rights & needed == needed:
            pieces += image.positions(gpa, pa, pages << shift)
    columns = (
        (np.array(c, dtype=np.uint64) for c in zip(*pieces, strict=True))
        if pieces
        else (np.zeros(0, dtype=np.uint64) for _ in range(3))
    )
    return Guest(stage, runs, Pieces(image.pieces.memory, *columns))


MOST_AT_ONCE = 1 << 16


def _one_by_one(rows: Rows) -> Iterator[Rows]:
    """Each page as a row of its own; of rows with many pages, few rows at a time."""
    ends = np.cumsum(rows.pages) // np.uint64(MOST_AT_ONCE)
    for batch in np.split(np.arange(len(ends)), np.flatnonzero(np.diff(ends)) + 1):
        pages = rows.pages[batch].astype(np.int64)
        addresses, pas, shifts, _, rights, entries = (np.repeat(c[batch], pages) for c in rows)
        number = np.arange(int(pages.sum()), dtype=np.uint64)
        first = np.repeat(np.cumsum(pages) - pages, pages).astype(np.uint64)
        offset = (number - first) << shifts
        ones = np.ones_like(number)
        yield Rows(addresses + offset, pas + offset, shifts, ones, rights, entries)


SIZES = {12: "4 KBytes", 21: "2 MBytes", 22: "4 MBytes", 30: "1 GByte"}
EPT_TYPES = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB"}


def as_objects(rows: Rows) -> Iterator[dict[str, Any]]:
    """Rows as JSON has them."""
    for address, pa, shift, pages, rights, entry in zip(*(c.tolist() for c in rows), strict=True):
        yield {
            "address": hex(address),
            "physical": hex(pa),
            "page_bytes": 1 << shift,
            "pages": pages,
            "read": bool(rights & READ),
            "write": bool(rights & WRITE),
            "execute": bool(rights & EXECUTE),
            "user": bool(rights & USER),
            "entry": hex(entry),
        }


def as_lines(state: Cpu | Stage, rows: Rows, merged: bool) -> Iterator[str]:
    """Rows for people to read, a line each; `state` says what their entries are."""
    for address, pa, shift, pages, rights, entry in zip(*(c.tolist() for c in rows), strict=True):
        last = address + (pages << shift) - 1
        allowed = "".join(
            letter if rights & bit else "-"
            for letter, bit in (("r", READ), ("w", WRITE), ("x", EXECUTE))
        )
        size = f"{pages:,} x {SIZES[shift]}"
        said = _said_of(state, rights, entry, merged)
        yield f"{address:#018x}-{last:#018x}  {size:<14} {pa:#015x}  {allowed} {said}".rstrip()


def _said_of(state: Cpu | Stage, rights: int, entry: int, merged: bool) -> str:
    if isinstance(state, Ept):
        by_user = "user-x " if state.mbec and rights & USER else ""
        pat = "" if entry & ept.IGNORE_PAT else " PAT"
        return by_user + EPT_TYPES[entry >> 3 & 7] + pat + _flags(entry, merged, EPT_FLAGS)
    bits = "".join(f" {name}" for bit, name in BITS if entry & bit)
    if isinstance(state, Npt):
        return bits.strip() + _flags(entry, merged, FLAGS)
    who = "user      " if rights & USER else "supervisor"
    key = f" key {entry >> 59 & 0xF}" if state.pke | state.pks else ""
    return who + bits + _flags(entry, merged, FLAGS) + key


def _flags(entry: int, merged: bool, flags: tuple[tuple[int, str], ...]) -> str:
    return "" if merged else "".join(f" {name}" for bit, name in flags if entry & bit)


BITS = (
    (paging.GLOBAL, "G"),
    (paging.WRITE_THROUGH, "PWT"),
    (paging.CACHE_DISABLE, "PCD"),
)
FLAGS = ((paging.ACCESSED, "A"), (paging.DIRTY, "D"))
EPT_FLAGS = ((ept.ACCESSED, "A"), (ept.DIRTY, "D"))
