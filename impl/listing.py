"""Lists of all that paging structures map, out of the pieces of physical memory that a file holds.

The kernel `vapama.impl.kernels.mappings` does the work, compiled, a batch at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from mmap import mmap
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from vapama.impl.kernels import mappings as kernel
from vapama.spec.cpu import Cpu
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


def four_or_five_levels(cpu: Cpu) -> Form:
    """The form of a guest's 4-level or 5-level tables. Source: SDM Vol. 3A, 4.5."""
    top = 5 if cpu.cr4 >> 12 & 1 else 4
    nxe = cpu.efer >> 11 & 1
    zero = (1 << ADDRESS_BITS) - (1 << cpu.maxphyaddr) | (0 if nxe else XD)
    words = np.zeros(kernel.FORM_WORDS, dtype=np.uint64)
    for level in range(1, top + 1):
        shift = 12 + 9 * (level - 1)
        words[kernel.SHIFT + level] = shift
        words[kernel.COUNT + level] = 512
        words[kernel.PAGE + level] = {1: 1, 2: PS, 3: PS}.get(level, 0)
        words[kernel.TABLE_ZERO + level] = zero | (PS if level > 3 else 0)
        words[kernel.PAGE_ZERO + level] = zero | (1 << shift) - (1 << 13 if level > 1 else 1 << 12)
        words[kernel.KEEPS + level] = WORD & ~(WRITE | USER | XD)
    if not cpu.page1gb:
        words[kernel.PAGE_ZERO + 3] |= np.uint64(PS)
    words[kernel.TOP], words[kernel.PRESENT], words[kernel.FORBIDS] = top, 1, XD
    width = 12 + 9 * top
    words[kernel.SIGN], words[kernel.UPPER] = width - 1, WORD & ~((1 << width) - 1)
    return Form(cpu.cr3 & kernel.FRAME, WRITE | USER | XD, words)


class Runs(NamedTuple):
    """Runs of pages, by column: linear address, physical address, level, number of pages, rights
    (bits as in an entry; bit 63 allows execution), and the entry that maps the first page.
    """

    addresses: Words
    pas: Words
    levels: Words
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
    """Every page mapped from CR3 down in an image without gaps: addresses, levels and entries.

    At most `room` of them, in the order of addresses.
    """
    listing = Listing(whole(image), four_or_five_levels(cpu), most_runs=room)
    found = [(b.addresses, b.levels, b.entries) for b in listing.batches()]
    addresses, levels, entries = (np.concatenate(column) for column in zip(*found, strict=True))
    return addresses, levels, entries
