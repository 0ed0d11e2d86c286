"""hugetlb pools and the mappings that use them; what backs a guest's slots; split and collapse.

`Hugetlb` keeps the books as Linux does: a map of promises for each mapping, a hugetlbfs mount with
a size of its own, and groups that promises are charged to. `Backing` gives a slot the frames of a
pool. `split` and `collapse` rewrite tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vapama.impl.kernels import large_pages, pool
from vapama.impl.kernels.pool import Pool, Subpool

PRIVATE, SHARED, NORESERVE = 0, 1, 2
EMPTY: Pool = (0, 0, 0, 0, 0, 0)


@dataclass
class Area:
    """A mapping: pages promised to it, pages it has, and the group that its promises are charged
    to.
    """

    kind: int
    count: int
    group: int
    promised: set[int] = field(default_factory=set)
    present: set[int] = field(default_factory=set)


class Hugetlb:
    """A pool, mappings numbered in the order of their making, and groups by number."""

    stateful = True

    def __init__(self, groups: int = 1, most: int = pool.NO_LIMIT) -> None:
        """`most` is the size of the mount that mappings go to, in pages."""
        self.words: Pool = EMPTY
        self.mount: Subpool = (most, 0, 0, 0, 0)
        self.areas: dict[int, Area] = {}
        self.made = 0
        self.charged = [0] * groups

    @property
    def pool(self) -> tuple[int, ...]:
        """Total, free, reserved, surplus, overcommit."""
        return self.words[:5]

    def resize(self, count: int) -> None:
        """Write `count` to nr_hugepages."""
        self.words = pool.resize(self.words, count)

    def overcommit(self, count: int) -> None:
        """Write `count` to nr_overcommit_hugepages."""
        self.words = (*self.words[:4], count, 0)

    def map(self, kind: int, count: int, group: int = 0) -> bool:
        """Map `count` pages; False for ENOMEM, with nothing changed."""
        area = Area(kind, count, group)
        if kind != NORESERVE:
            words, mount = pool.reserve_in(self.words, self.mount, count)
            if words[5]:
                return False
            self.words, self.mount = words, mount
            self.charged[group] += count
            area.promised = set(range(count))
        self.areas[self.made] = area
        self.made += 1
        return True

    def touch(self, number: int, page: int) -> bool:
        """Fault a page in; False for SIGBUS."""
        area = self.areas[number]
        if page in area.present:
            return True
        if not self._take(page in area.promised):
            return False
        area.promised.discard(page)
        area.present.add(page)
        return True

    def copy_fails(self, number: int, page: int) -> bool:
        """Fault a page in for a copy from elsewhere (UFFDIO_COPY) that then fails.

        The page goes back and, if it was promised, so does the promise.
        """
        area = self.areas[number]
        if page in area.present:
            return True
        promised = page in area.promised
        if not self._take(promised):
            return False
        self.words = pool.give(self.words, int(promised))
        return True

    def discard(self, number: int, page: int) -> None:
        """MADV_DONTNEED: a shared mapping's page stays in its file."""
        area = self.areas[number]
        if area.kind != SHARED and page in area.present:
            area.present.remove(page)
            if self._give_back(area):
                area.promised.add(page)

    def unmap(self, number: int) -> None:
        """Unmap a mapping: its pages are freed, its promises taken back."""
        area = self.areas.pop(number)
        promises = len(area.promised)
        for _ in area.present:
            promises += self._give_back(area)
        self.words = pool.unreserve(self.words, promises)
        if area.kind != NORESERVE:
            self.mount = pool.put(self.mount, area.count)
            self.charged[area.group] -= area.count

    def child_writes(self, number: int, page: int) -> tuple[bool, tuple[int, ...]]:
        """A forked child writes to a page and exits: whether it could, and the pool meanwhile."""
        if self.areas[number].kind == SHARED:
            return self.touch(number, page), self.pool
        if not self._take(False):
            return False, self.pool
        meanwhile = self.pool
        self.words = pool.give(self.words, 0)
        return True, meanwhile

    def owner_writes(self, number: int, page: int) -> tuple[bool, tuple[int, ...], bool]:
        """With a forked child, the owner writes to a page and then the child does: whether the
        owner could, the pool then, and whether the child could.
        """
        area = self.areas[number]
        if area.kind == SHARED or page not in area.present:
            could = self.touch(number, page)
            meanwhile = self.pool
            return could, meanwhile, could and self.child_writes(number, page)[0]
        if not self._take(False):
            # The owner of promises takes the page that the child shares; others are refused.
            return area.kind == PRIVATE, self.pool, False
        meanwhile = self.pool
        self.words = pool.give(self.words, 0)
        return True, meanwhile, True

    def _take(self, promised: bool) -> bool:
        words = pool.take(self.words, int(promised))
        if words[5]:
            return False
        self.words = words
        return True

    def _give_back(self, area: Area) -> int:
        """Free a page of an area; 1 if it is promised to it again."""
        again = int(area.kind == PRIVATE and self.words[3] == 0)
        self.words = pool.give(self.words, again)
        return again


# What backs a guest's memory


class Backing:
    """Frames of huge pages for a slot: handed out as they are faulted in, each aligned to its size.

    `frames` are the free frames' first 4-KByte frame numbers. `level` is that of the huge pages.
    """

    def __init__(self, books: Hugetlb, frames: list[int], size: int, level: int) -> None:
        self.books, self.frames, self.level = books, frames, level
        self.page_bytes = 1 << 9 * level + 3
        if size % self.page_bytes:
            raise ValueError(f"a slot of {size:#x} bytes is no multiple of its huge pages")
        if any(frame << 12 & self.page_bytes - 1 for frame in frames):
            raise ValueError("a huge page's frames must be aligned to its size")
        if not books.map(SHARED, size // self.page_bytes):
            raise MemoryError("the pool has too few huge pages for the slot: raise nr_hugepages")
        self.number = books.made - 1
        self.pages = range(size >> 12)
        """Its pages of 4 KBytes."""
        self.mapped: dict[int, int] = {}

    def frame_of(self, offset: int) -> int | None:
        """The 4-KByte frame behind a byte of the slot, faulted in; None if there is none left."""
        page = offset // self.page_bytes
        if page not in self.mapped:
            if not self.books.touch(self.number, page):
                return None
            self.mapped[page] = self.frames.pop(0)
        return self.mapped[page] + (offset % self.page_bytes >> 12)

    def move(self, page: int) -> tuple[int, int] | None:
        """Put a huge page elsewhere: the first frames of before and of now. None if it has no
        frames, or if there is no free page that nobody was promised.
        """
        _, free, reserved, _, _ = self.books.pool
        if page not in self.mapped or free <= reserved:
            return None
        old, new = self.mapped[page], self.frames.pop(0)
        self.mapped[page] = new
        self.frames.append(old)
        return old, new

    def release(self) -> None:
        """Give all frames back."""
        self.books.unmap(self.number)
        self.frames += self.mapped.values()
        self.mapped.clear()


# Transparent huge pages


class Kin:
    """A process and those forked from it, and what frames they were given."""

    def __init__(self) -> None:
        self.alive: list[Transparent] = []
        """Their blocks, the oldest process first."""
        self.next = Transparent.PAGES
        self.runs: set[int] = set()
        """The first frames of runs of 512."""


class Transparent:
    """A block of 512 pages of a process, private and anonymous: its entry in the page directory,
    and its table, as arrays of frames (-1: none, 0: the zero page) and of contents.

    Frames are given out in runs from an ever higher one, so that no number comes again. A process
    that was forked shares frames until it is written to; a run is a folio, and shared if any of it
    is mapped elsewhere.
    """

    stateful = True
    PAGES = 512
    MOST_SHARED = 256
    """How many pages of a block may be shared if khugepaged is to collapse it."""

    def __init__(self, kin: "Kin | None" = None) -> None:
        self.kin = Kin() if kin is None else kin
        self.kin.alive.append(self)
        self.table: npt.NDArray[np.int64] | None = None
        """The frames of small pages; None where the directory's entry leads to no table."""
        self.run = -1
        """The first frame of the huge page that the directory's entry maps; -1 if it maps none."""
        self.words: npt.NDArray[np.int64] = np.zeros(self.PAGES, dtype=np.int64)
        self.advised = True

    # What the process does

    def write(self, page: int, content: int) -> None:
        """Store to a page."""
        if self.table is None and self.run <= 0:
            if self.advised or self.run == 0:
                self.run = self._take(self.PAGES)
            else:
                self.table = np.full(self.PAGES, -1, dtype=np.int64)
        elif self.run > 0 and self._is_shared(np.array([self.run])):
            self.split(page)
        table = self.table
        if table is not None and (table[page] <= 0 or self._is_shared(table[page : page + 1])):
            table[page] = self._take(1)
        self.words[page] = content

    def read(self, page: int) -> int:
        """Load from a page."""
        if self.table is None and self.run < 0:
            if self.advised:
                self.run = 0
            else:
                self.table = np.full(self.PAGES, -1, dtype=np.int64)
        if self.table is not None and self.table[page] < 0:
            self.table[page] = 0
        return int(self.words[page])

    def discard(self, first: int, count: int) -> None:
        """MADV_DONTNEED."""
        self.words[first : first + count] = 0
        if count == self.PAGES:
            self.table, self.run = None, -1
            return
        self.split(first)
        if self.table is not None:
            self.table[first : first + count] = -1

    def split(self, page: int) -> None:
        """Take write access to a page away and give it back: a huge mapping becomes a table."""
        if self.run > 0:
            self.table = np.arange(self.run, self.run + self.PAGES)
        elif self.run == 0:
            self.table = np.zeros(self.PAGES, dtype=np.int64)
        self.run = -1

    def advise(self, huge: int) -> None:
        """MADV_HUGEPAGE or MADV_NOHUGEPAGE."""
        self.advised = bool(huge)

    def collapse(self) -> bool:
        """MADV_COLLAPSE; False for EINVAL."""
        if not self.advised or (self.run < 0 and self.table is None):
            return False
        if self.table is not None:
            self.table, self.run = None, self._take(self.PAGES)
        return True

    def fork(self) -> "Transparent":
        """A child's block, which maps what this one does."""
        child = Transparent(self.kin)
        child.table = None if self.table is None else self.table.copy()
        child.run, child.words, child.advised = self.run, self.words.copy(), self.advised
        return child

    def exit(self) -> None:
        """The process ends."""
        self.kin.alive.remove(self)

    def daemon(self) -> None:
        """Let khugepaged scan the blocks of all these processes, the oldest first."""
        for block in self.kin.alive:
            if block.table is not None and block.advised:
                own = block.table[block.table > 0]
                shared = block._is_shared(own)
                if len(own) and np.count_nonzero(shared) <= self.MOST_SHARED:
                    block.collapse()

    # What can be observed

    def huge(self) -> bool:
        """Whether it is one huge page, and not that of zeros."""
        return self.run > 0

    def present(self) -> int:
        """How many pages have a frame of their own."""
        if self.table is not None:
            return int(np.count_nonzero(self.table > 0))
        return self.PAGES * (self.run > 0)

    def frames(self, pages: Sequence[int]) -> list[int | None]:
        """The frames of these pages; None where there is none, or the zero page."""
        if self.table is not None:
            return [int(self.table[page]) if self.table[page] > 0 else None for page in pages]
        return [self.run + page if self.run > 0 else None for page in pages]

    def contents(self, pages: Sequence[int]) -> list[int]:
        """What loads would give."""
        return [int(self.words[page]) for page in pages]

    def _folios(self, frames: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The first frame of what each of these was given out with."""
        firsts = frames // self.PAGES * self.PAGES
        return np.where(np.isin(firsts, list(self.kin.runs)), firsts, frames)

    def _is_shared(self, frames: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these frames are in a folio that another process maps, all of it or a part."""
        folios = self._folios(frames)
        shared = np.zeros(len(frames), dtype=np.bool_)
        for other in self.kin.alive:
            if other is not self:
                theirs = np.array([other.run]) if other.table is None else other.table
                shared |= np.isin(folios, self._folios(theirs[theirs > 0]))
        return shared

    def _take(self, count: int) -> int:
        first = -(-self.kin.next // count) * count
        self.kin.next = first + count
        if count == self.PAGES:
            self.kin.runs.add(first)
        return first


# Large leaves in tables


def split(
    image: Any,
    index: int,
    level: int,
    table_frame: int,
    pointer: int,
    flush: Callable[[], None],
) -> None:
    """Replace the large leaf at `index` (of 8-byte entries) by a table of 512 smaller ones.

    `image` is memory as words by index.

    The table is written in `table_frame` before it is linked, by an entry with the bits of
    `pointer`; the large translation is flushed before anybody may change the small ones.
    """
    entry = int(image[index])
    start = table_frame << 9
    for child in range(512):
        image[start + child] = large_pages.split_child(entry, level, child)
    image[index] = table_frame << 12 | pointer
    flush()


def collapse(image: Any, index: int, level: int, flush: Callable[[], None]) -> bool:
    """Replace the table that the entry at `index` links by one leaf of `level`, if it can be.

    Small translations are flushed before the table's frame may be used otherwise.
    """
    start = (int(image[index]) & large_pages.FRAME) >> 3
    first = int(image[start])
    for child in range(512):
        if not large_pages.joins(int(image[start + child]), first, child, level):
            return False
    image[index] = large_pages.joined(first, level)
    flush()
    return True


def pieces_of_4m(entry: int) -> tuple[int, int]:
    """The frames of the two 2-MByte pages that map a guest's 4-MByte page."""
    return large_pages.half_of_4m(entry, 0), large_pages.half_of_4m(entry, 1 << 21)
