"""Lists of all that paging structures map, out of the pieces of physical memory that a file holds.

The kernel `vapama.impl.kernels.mappings` does the work, compiled, a batch at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from mmap import mmap
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from vapama.impl.kernels import mappings as kernel
from vapama.spec.cpu import LA57, LMA, NXE, PAE, Cpu
from vapama.spec.stage import Ept, Npt, Stage
from vapama.spec.words import WORD

Words: TypeAlias = npt.NDArray[np.uint64]

ROOM = 1 << 14
"""Runs that a batch has room for."""
READS = 1 << 26
"""Entries read before a batch ends anyway, so that a caller is never kept waiting long."""
SLOTS = 1 << 17
"""Words of each of the two rows that remember tables: all that a listing takes of memory."""

LARGEST_TABLE = 1024
"""Entries of a table of 32-bit paging."""

PS, XD = 1 << 7, 1 << 63
WRITE, USER = 1 << 1, 1 << 2
ADDRESS_BITS = 52


class Pieces(NamedTuple):
    """Physical memory as a file holds it: see `vapama.impl.kernels.mappings`."""

    memory: Words
    firsts: Words
    ends: Words
    places: Words


def at_each_position(data: mmap | memoryview, size: int) -> Words:
    """The 8 bytes at each position of a buffer of `size` bytes, as words that overlap."""
    return np.ndarray((max(size - 7, 0),), dtype="<u8", buffer=data, strides=(1,))


def whole(image: Words) -> Pieces:
    """The pieces of an image that begins at physical address 0 and has no gaps."""
    size = 8 * len(image)
    row = [np.array([value], dtype=np.uint64) for value in (0, size, 0)]
    return Pieces(at_each_position(image.data, size), *row)


class Form(NamedTuple):
    """How tables are read: the root, the rights to begin with, and the kernel's `form`."""

    root: int
    rights: int
    words: Words


def form_of(state: Cpu | Stage) -> Form:
    """The form of a guest's tables, in any paging mode (but for PDPTE registers: they are read from
    memory), or of a second stage's. Without paging there are no tables, and no form.
    """
    if isinstance(state, Ept):
        return _ept(state)
    if isinstance(state, Npt):
        return _nested(state)
    return _guest(state)


class Tables(NamedTuple):
    """The tables of a level: what `form` has of them."""

    shift: int
    entries: int
    page: int
    table_zero: int
    page_zero: int
    keeps: int


def _form(root: int, rows: list[Tables], present: int, rights: int, **others: int) -> Form:
    """A form from its levels, the lowest first, and from what else differs from 0."""
    words = np.zeros(kernel.FORM_WORDS, dtype=np.uint64)
    fields = (
        *(kernel.SHIFT, kernel.COUNT, kernel.PAGE),
        *(kernel.TABLE_ZERO, kernel.PAGE_ZERO, kernel.KEEPS),
    )
    for level, row in enumerate(rows, 1):
        for field_, value in zip(fields, row, strict=True):
            words[field_ + level] = value
    words[kernel.TOP], words[kernel.PRESENT] = len(rows), present
    words[kernel.SIGN] = 63
    for name, value in others.items():
        words[getattr(kernel, name.upper())] = value
    return Form(root, rights, words)


TAKEN = WRITE | USER | XD
"""The rights that an entry of ordinary paging takes away."""


def _guest(cpu: Cpu) -> Form:
    """Source: SDM Vol. 3A, 4.3 to 4.5."""
    zero = (1 << ADDRESS_BITS) - (1 << cpu.maxphyaddr) | (0 if cpu.efer & NXE else XD)
    if not cpu.cr4 & PAE:
        return _two_levels(cpu.cr3, cpu.cr4 >> 4 & 1, cpu.pse36, cpu.maxphyaddr)
    if not cpu.efer & LMA:
        zero |= PAE_ZERO
        pdpte = zero | XD | 0x1E6
        return _three_levels(cpu.cr3 & 0xFFFF_FFE0, zero, pdpte)
    top = 5 if cpu.cr4 & LA57 else 4
    width = 12 + 9 * top
    sign = {"sign": width - 1, "upper": WORD & ~((1 << width) - 1)}
    return _long(cpu.cr3 & kernel.FRAME, top, zero, cpu.page1gb, PS, sign)


def _nested(npt: Npt) -> Form:
    """Source: APM Vol. 2, 5.2, 5.3 and 15.25.5."""
    zero = (1 << ADDRESS_BITS) - (1 << npt.maxphyaddr) | (0 if npt.efer & NXE else XD)
    if npt.efer & LMA:
        top = 5 if npt.cr4 & LA57 else 4
        return _long(npt.ncr3 & kernel.FRAME, top, zero, npt.page1gb, PS | 1 << 8, {})
    if npt.cr4 & PAE:
        zero |= PAE_ZERO
        return _three_levels(npt.ncr3 & (kernel.FRAME | 0xFE0), zero, zero | XD | 0x1E6)
    return _two_levels(npt.ncr3, npt.cr4 >> 4 & 1, 1, npt.maxphyaddr)


PAE_ZERO = 0x7FF << 52


def _long(
    root: int, top: int, zero: int, page1gb: int, top_zero: int, sign: dict[str, int]
) -> Form:
    """4 or 5 levels of 512 entries of 8 bytes."""
    keeps = WORD & ~TAKEN
    rows = [Tables(12, 512, 1, zero, zero, keeps)]
    for shift in (21, 30):
        exists = shift == 21 or page1gb
        page_zero = zero | (1 << shift) - (1 << 13) | (0 if exists else PS)
        rows.append(Tables(shift, 512, PS, zero, page_zero, keeps))
    rows += [Tables(12 + 9 * level, 512, 0, zero | top_zero, 0, keeps) for level in range(3, top)]
    return _form(root, rows, 1, TAKEN, forbids=XD, **sign)


def _three_levels(root: int, zero: int, pdpte_zero: int) -> Form:
    """PAE: two levels of 512 entries of 8 bytes below 4 PDPTEs, which take no rights away."""
    keeps = WORD & ~TAKEN
    rows = [
        Tables(12, 512, 1, zero, zero, keeps),
        Tables(21, 512, PS, zero, zero | (1 << 21) - (1 << 13), keeps),
        Tables(30, 4, 0, pdpte_zero, 0, WORD),
    ]
    return _form(root, rows, 1, TAKEN, forbids=XD)


def _two_levels(root: int, pse: int, pse36: int, maxphyaddr: int) -> Form:
    """32-bit: two levels of 1024 entries of 4 bytes. Bit 63, which they lack, allows execution."""
    keeps = WORD & ~TAKEN
    high = min(maxphyaddr, 40) - 32 if pse36 else 0
    rows = [
        Tables(12, 1024, 1, 0, 0, keeps),
        Tables(22, 1024, PS * pse, 0, (1 << 22) - (1 << 13 + high), keeps),
    ]
    return _form(root & 0xFFFF_F000, rows, 1, TAKEN, forbids=XD, narrow=1, high=0xFF)


def _ept(ept: Ept) -> Form:
    """Source: SDM Vol. 3C, tables 31-1 to 31-7."""
    taken = 0x407 if ept.mbec else 7
    zero, keeps = (1 << ADDRESS_BITS) - (1 << ept.maxphyaddr), WORD & ~taken
    rows = [Tables(12, 512, taken, zero, zero, keeps)]
    for shift, exists in ((21, ept.page2mb), (30, ept.page1gb)):
        page_zero = zero | (1 << shift) - (1 << 12) | (0 if exists else PS)
        rows.append(Tables(shift, 512, PS, zero | 0x78, page_zero, keeps))
    rows += [Tables(12 + 9 * k, 512, 0, zero | 0xF8, 0, keeps) for k in range(3, ept.levels)]
    rules = 3 if ept.execute_only else 1
    return _form(ept.eptp & kernel.FRAME, rows, taken, taken, ept=rules)


class Runs(NamedTuple):
    """Runs of pages, by column: linear address, physical address, size of a page (as a power of
    two), number of pages, rights (bits as in an entry, but bit 63 of ordinary paging allows
    execution), and the entry that maps the first page.
    """

    addresses: Words
    pas: Words
    shifts: Words
    pages: Words
    rights: Words
    entries: Words

    def part(self, start: int, end: int) -> "Runs":
        """A copy of the runs from `start` up to `end`."""
        return Runs(*(column[start:end].copy() for column in self))


@dataclass
class Listing:
    """A list of pages in the making; `batches` makes it.

    `same` are the bits of entries that neighbours must have equal to be one run, 0 for a run a
    page. `most_runs` and `most_reads` are limits; `stopped` names the one that was met, if any.
    `listed` and `pages` are how many runs and pages were listed so far.
    """

    pieces: Pieces
    form: Form
    same: int = 0
    most_runs: int = WORD
    most_reads: int = WORD
    stopped: str = ""
    listed: int = 0
    pages: int = 0
    state: Words = field(init=False)
    keys: Words = field(init=False)
    counts: Words = field(init=False)

    def __post_init__(self) -> None:
        self.state = np.zeros(kernel.STATE_WORDS, dtype=np.uint64)
        self.keys = np.zeros(SLOTS, dtype=np.uint64)
        self.counts = np.zeros(SLOTS, dtype=np.uint64)
        top = int(self.form.words[kernel.TOP])
        size = int(self.form.words[kernel.COUNT + top]) << (3 - int(self.form.words[kernel.NARROW]))
        firsts, ends, places = (row.tolist() for row in self.pieces[1:])
        place = kernel.find(firsts, ends, places, len(firsts), self.form.root, size)
        self.absent = place == kernel.NOWHERE
        """Whether the root table is not there: then there is nothing to list."""
        self.top = top
        self.state[kernel.LEVEL] = top + 1 if self.absent else top
        self.state[kernel.PLACE + top] = 0 if self.absent else place
        self.state[kernel.RIGHTS + top] = self.form.rights
        self.state[kernel.READS] = 0 if self.absent else self.form.words[kernel.COUNT + top]

    @property
    def reads(self) -> int:
        """How many entries were read so far."""
        return int(self.state[kernel.READS])

    @property
    def malformed(self) -> int:
        """How many entries were met that are malformed: reserved bits set, or misconfigured."""
        return int(self.state[kernel.MALFORMED])

    @property
    def missing(self) -> int:
        """How many entries were met whose table memory does not hold."""
        return int(self.state[kernel.ABSENT])

    def batches(self, room: int = ROOM, reads: int = READS) -> Iterator[Runs]:
        """The runs, a batch at a time, as far as the limits go. A batch may be empty."""
        found = Runs(*(np.zeros(room, dtype=np.uint64) for _ in Runs._fields))
        ended = kernel.FULL
        while ended != kernel.DONE and not self.stopped:
            ended = self._go_on(found, room, min(self.reads + reads, self.most_reads))
            count = int(self.state[kernel.FOUND])
            left = self.most_runs - self.listed
            if count > left:
                self.stopped = "runs"
            elif ended == kernel.TIRED and self.reads + LARGEST_TABLE > self.most_reads:
                self.stopped = "reads"
            # The last run may go on in the next batch.
            goes_on = self.same != 0 and ended != kernel.DONE and not self.stopped and count > 0
            batch = found.part(0, min(count - goes_on, left))
            self.listed += len(batch.pages)
            self.pages += int(batch.pages.sum())
            yield batch
            for column in found:
                column[0] = column[count - 1] if goes_on else 0
            self.state[kernel.FOUND] = int(goes_on)

    def counted(self, reads: int = READS) -> Iterator[int | None]:
        """How many pages there are in all, at the end; None as often as it is not known yet, and
        last of all if `most_reads` does not suffice.
        """
        found = Runs(*(np.zeros(1, dtype=np.uint64) for _ in Runs._fields))
        while self._go_on(found, 1, min(self.reads + reads, self.most_reads), 1) != kernel.DONE:
            yield None
            if self.reads + LARGEST_TABLE > self.most_reads:
                return
        yield int(self.state[kernel.BELOW + self.top])

    def _go_on(self, found: Runs, room: int, reads: int, counting: int = 0) -> int:
        from vapama.impl.kernels.compiled import compiled

        def words(*values: int) -> tuple[np.uint64, ...]:
            return tuple(map(np.uint64, values))

        status: int = compiled(kernel.list_pages)(
            *self.pieces,
            *words(len(self.pieces.firsts)),
            self.form.words,
            self.state,
            self.keys,
            self.counts,
            *words(SLOTS - 1, counting, self.same, room, reads),
            *found,
        )
        return int(status)


def mappings_array(cpu: Cpu, image: Words, room: int) -> tuple[Words, Words, Words]:
    """Every page that 4 or 5 levels of tables map in an image without gaps: addresses, levels and
    entries.

    At most `room` of them, in the order of addresses.
    """
    listing = Listing(whole(image), form_of(cpu), most_runs=room)
    found = [(b.addresses, b.shifts, b.entries) for b in listing.batches()]
    addresses, shifts, entries = (np.concatenate(column) for column in zip(*found, strict=True))
    return addresses, (shifts - np.uint64(12)) // np.uint64(9) + np.uint64(1), entries


class Parts(NamedTuple):
    """Runs led on through a second stage: how many bytes it did not map so far; and by column
    linear and physical address, size of a page, number of pages, the numbers of the run and of the
    second stage's run.
    """

    unmapped: int
    addresses: Words
    pas: Words
    shifts: Words
    pages: Words
    run: Words
    stage: Words


def composed(runs: Sequence[Words], stage: Sequence[Words], room: int = ROOM) -> Iterator[Parts]:
    """Runs of linear addresses led on through runs of guest-physical ones, a batch at a time.

    Of both the first four columns count: addresses, where they lead, page sizes, pages.
    """
    from vapama.impl.kernels.compiled import compiled

    state = np.zeros(4, dtype=np.uint64)
    found = [np.zeros(room, dtype=np.uint64) for _ in Parts._fields[1:]]
    counts = [np.uint64(len(rows[0])) for rows in (runs, stage)]
    ended = kernel.FULL
    while ended != kernel.DONE:
        state[2] = 0
        ended = int(
            compiled(kernel.compose)(
                *runs[:4], counts[0], *stage[:4], counts[1], state, np.uint64(room), *found
            )
        )
        count = int(state[2])
        yield Parts(int(state[3]), *(column[:count].copy() for column in found))
