"""A guest's memory as the host has it: the pages of a backing, and the frames they are in.

The backing is the private memory of the process that hosts a guest. A page is in a frame, swapped
out, or was never touched; it may be mapped read-only, because the frame is shared with others (as
same-page merging does). Whoever maps frames elsewhere (a hypervisor's tables) is told, by its
notifier, before a page's frame changes or its right to be written goes: it must have dropped every
mapping when the notifier returns. Source: Linux, Documentation/mm/mmu_notifier.rst.

512 pages in as many frames in a row, aligned, may be one huge page, which others then may map by
one large entry. It is split before anything is done to a page of it. `Merger` lets pages of equal
words, of one guest or several, share a frame.

A part of a backing may be of hugetlbfs, in pages of 1 GByte out of a pool. Such a page is in frames
from when it is first touched; it may be moved to another of the pool, and nothing else is done to
it: it is not swapped, merged or split. Source: Linux, admin-guide/mm/hugetlbpage.rst.
"""

from collections.abc import Callable, Sequence
from mmap import mmap

import numpy as np
import numpy.typing as npt

from vapama.impl import hugepages
from vapama.impl.hardware import Frames, shallow
from vapama.impl.ksm import Frames as Contents
from vapama.impl.ksm import Ksm, Numbers
from vapama.spec.words import Flag

BLOCK_SHIFT = 9
BLOCK = 1 << BLOCK_SHIFT
"""The pages of a huge page: it takes 2 MBytes."""
GBYTE_SHIFT = 18
GBYTE = 1 << GBYTE_SHIFT
"""The pages of a huge page of 1 GByte."""


class Pool:
    """The machine's huge pages of 1 GByte: hugetlb's books, and the first frames of those free."""

    def __init__(self, count: int) -> None:
        self.books = hugepages.Hugetlb()
        self.books.resize(count)
        self.free = [GBYTE * (1 + number) for number in range(count)]

    def backing(self, gbytes: int) -> hugepages.Backing:
        """So many GBytes of hugetlbfs. Raises `MemoryError` if the pool is too small."""
        return hugepages.Backing(self.books, self.free, gbytes << 30, 3)


class Backing:
    """The pages of one guest's backing."""

    def __init__(
        self,
        frames: Frames,
        mergeable: Sequence[int] = (),
        giants: hugepages.Backing | None = None,
    ) -> None:
        self.frames = frames
        self.giants = giants
        """What backs the GBytes from the second on, if they are of hugetlbfs."""
        self.mergeable = mergeable
        """The pages that same-page merging may look at."""
        self.merger: Merger | None = None
        self.huge: set[int] = set()
        """Which blocks of pages are one huge page: the number of the first, by `BLOCK`."""
        self.frame: dict[int, int] = {}
        """The frame that a page is in."""
        self.readonly: set[int] = set()
        """Pages that must not be written in their frame: it is shared."""
        self.copies: dict[int, dict[int, int]] = {}
        """Words of pages as they were swapped out; true still while the page was not written."""
        self.notify: list[Callable[[range], None]] = []
        """Told the pages, before what they are mapped to is revoked."""

    def clone(self, frames: Frames) -> "Backing":
        """The same in other frames; nobody is told, and nothing of it is merged."""
        twin = shallow(self)
        twin.frames, twin.notify, twin.merger = frames, [], None
        twin.huge, twin.frame = self.huge.copy(), self.frame.copy()
        twin.readonly, twin.copies = self.readonly.copy(), self.copies.copy()
        return twin

    def fault(self, page: int, write: bool) -> tuple[int, bool]:
        """The frame of a page, which is made present, and whether it may be written."""
        frame = self.frame.get(page)
        if frame is None:
            if not self.is_small(page):
                return self._giant_frame(page), True
            frame = self.frames.take()
            self.frame[page] = frame
            ram, base = self.frames.ram, frame << 9
            for index, word in self.copies.get(page, {}).items():
                ram[base | index] = word
        elif write and page in self.readonly:
            self.unshare(page)
            frame = self.frame[page]
        return frame, page not in self.readonly

    def _giant_frame(self, page: int) -> int:
        """The frame of a page of hugetlbfs, which was reserved when it was mapped."""
        assert self.giants is not None
        frame = self.giants.frame_of(page - GBYTE << 12)
        assert frame is not None, "the pool did not keep its promise"
        return frame

    def frame_of(self, page: int) -> int | None:
        """The frame that a page is in; None if it is in none."""
        frame = self.frame.get(page)
        if frame is None and self.level_of(page) == 3:
            return self._giant_frame(page)
        return frame

    def is_small(self, page: int) -> bool:
        """Whether a page is none of hugetlbfs, so that it may be swapped out, merged and so on."""
        return self.giants is None or page - GBYTE not in self.giants.pages

    def level_of(self, page: int) -> int:
        """The level of the page of the host's that a page is in: 3 for one of 1 GByte."""
        if page >> BLOCK_SHIFT in self.huge:
            return 2
        giants = self.giants
        return 3 if giants and (page >> GBYTE_SHIFT) - 1 in giants.mapped else 1

    def giant_frames(self) -> dict[int, int]:
        """The first frame of each page of 1 GByte, by its GByte of the backing."""
        mapped = {} if self.giants is None else self.giants.mapped
        return {1 + number: first for number, first in mapped.items()}

    def unshare(self, page: int) -> None:
        """Give a shared page a frame of its own, with the same words (copy on write).

        It is a new one, even if nobody else uses the shared one any more.
        """
        target = self.frames.take()
        self.revoke(page)
        assert self.merger is not None
        self.merger.copy(self.frame[page], target)
        self.leave(page)
        self.frame[page] = target

    def leave(self, page: int) -> None:
        """Let a page that nothing maps use its frame no longer."""
        frame = self.frame.pop(page)
        if page in self.readonly:
            self.readonly.discard(page)
            assert self.merger is not None
            self.merger.left(frame, self, page)
        else:
            self.frames.give(frame)

    def written(self, page: int) -> None:
        """The page was written: the copy of it, if there is one, is out of date."""
        self.copies.pop(page, None)

    def revoke(self, page: int, count: int = 1) -> None:
        """Have every mapping of the page, or of so many from it on, dropped."""
        for told in self.notify:
            told(range(page, page + count))

    def swap_out(self, page: int) -> bool:
        """Free the page's frame and keep its words aside; False if it has no frame of its own.

        A page that was not written since it was swapped in needs no new copy.
        """
        frame = self.frame.get(page)
        if frame is None or page in self.readonly:
            return False
        self.split(page)
        self.revoke(page)
        if page not in self.copies:
            self.copies[page] = self.frames.ram.page(frame)
        del self.frame[page]
        self.frames.give(frame)
        return True

    def move(self, page: int) -> bool:
        """Put the page, and all that share its frame, into another; False if it has no frame."""
        frame = self.frame.get(page)
        if frame is None:
            return not self.is_small(page) and self._move_giant(page)
        self.split(page)
        target = self.frames.take()
        users = [(self, page)]
        if page in self.readonly:
            assert self.merger is not None
            users = self.merger.moves(frame, target)
        for backing, at in users:
            backing.revoke(at)
            backing.frame[at] = target
        self.frames.ram.copy_page(frame, target)
        self.frames.give(frame)
        return True

    def _move_giant(self, page: int) -> bool:
        """Put a page of 1 GByte into another of the pool, with all that maps it dropped."""
        assert self.giants is not None
        number = (page >> GBYTE_SHIFT) - 1
        if number not in self.giants.mapped:
            return False
        self.revoke(1 + number << GBYTE_SHIFT, GBYTE)
        moved = self.giants.move(number)
        if moved is None:
            return False
        self.frames.move(*moved, GBYTE)
        return True

    def collapse(self, page: int) -> bool:
        """Put the pages of a block into one run of frames, as a huge page; False if it can't be.

        Pages never touched become zeros, shared pages get their words back, and no copies remain.
        A block in which no page has a frame stays as it is. Source: Linux, mm/khugepaged.c.
        """
        block = page // BLOCK
        pages = range(block * BLOCK, block * BLOCK + BLOCK)
        if block in self.huge or not any(each in self.frame for each in pages):
            return block in self.huge
        run = self.frames.take_run(BLOCK)
        if run is None:
            return False
        ram = self.frames.ram
        filled = {index >> 9 for index in ram}
        self.revoke(pages.start, BLOCK)
        targets = range(run, run + BLOCK)
        blank = []
        for each, target in zip(pages, targets, strict=True):
            frame = self.frame.get(each)
            if frame is not None and (frame in filled or each in self.readonly):
                ram.copy_page(frame, target)
                self.leave(each)
            elif frame is not None:
                blank.append(frame)
            if each in self.copies:
                for index, word in self.copies.pop(each).items():
                    ram[target << 9 | index] = word
        self.frames.give_blank(blank)
        self.frame.update(zip(pages, targets, strict=True))
        self.huge.add(block)
        return True

    def split(self, page: int) -> None:
        """Make the huge page around a page 512 pages again, in the same frames."""
        block = page // BLOCK
        if block in self.huge:
            self.revoke(block * BLOCK)  # a large entry maps them all, small ones stay right
            self.huge.discard(block)


class Merger:
    """Same-page merging over the backings of all guests: a `vapama.impl.ksm.Host`.

    A scan is told the words of memory as they are when it begins: guests do not run meanwhile. Page
    numbers of KSM's count an area's mergeable pages.
    """

    def __init__(self, backings: Sequence[Backing], frames: Frames, zero_pages: bool) -> None:
        self.backings, self.frames = backings, frames
        self.zero: int | None = None
        """The frame of zeros that pages share with `zero_pages`, as long as there are any."""
        # Memory that comes page by page: numpy asks for huge pages, and few frames are looked at.
        room = mmap(-1, frames.total * BLOCK * 8)
        self.contents: Contents = np.frombuffer(room, dtype=np.uint64).reshape(-1, BLOCK)
        self.mapped: npt.NDArray[np.int32] = np.ones(frames.total, dtype=np.int32)
        """No frame is mapped more than once but those that KSM shares."""
        self.users: dict[int, set[tuple[Backing, int]]] = {}
        """The pages that use a frame read-only."""
        for backing in backings:
            backing.merger = self
        self.places: dict[int, list[int]] = {}
        """Where in memory the words of a shared frame are, which stay what they are; and those of
        the frames that the last scan looked at, as they were.
        """
        self.ksm = Ksm(self, use_zero_pages=int(zero_pages))

    def scan(self) -> None:
        """Scan everything once. The words of a frame that is shared stay what they are."""
        ram, wanted = self.frames.ram, np.zeros(self.frames.total, dtype=np.bool_)
        for backing in self.backings:
            frames = self.frames_of(backing)
            wanted[frames[frames >= 0]] = True
        wanted[self.ksm.node_at >= 0] = False
        self.contents[wanted] = 0
        places = np.fromiter(ram, dtype=np.int64, count=len(ram))
        places = places[places >> 9 < self.frames.total]
        places = places[wanted[places >> 9]]
        words = map(ram.__getitem__, places.tolist())
        self.contents.reshape(-1)[places] = np.fromiter(words, np.uint64, len(places))
        for frame in np.flatnonzero(wanted).tolist():
            self.places[frame] = []
        for place in places.tolist():
            self.places[place >> 9].append(place)
        self.ksm.scan()

    def copy(self, frame: int, target: int) -> None:
        """Copy the words of a shared frame to one that has none."""
        ram, shift = self.frames.ram, target - frame << 9
        for place in self.places[frame]:
            ram[place + shift] = ram[place]

    def left(self, frame: int, backing: Backing, page: int) -> None:
        """A page uses a shared frame no longer: with the last the frame is free."""
        users = self.users[frame]
        users.discard((backing, page))
        if not users:
            del self.users[frame]
            if frame == self.zero:
                self.zero = None
            self.ksm.freed(frame)
            self.frames.give(frame, self.places.pop(frame))

    def moves(self, frame: int, target: int) -> list[tuple[Backing, int]]:
        """A shared frame is moved to another: who uses it."""
        users = self.users[target] = self.users.pop(frame)
        self.places[target] = [place + (target - frame << 9) for place in self.places.pop(frame)]
        if frame == self.zero:
            self.zero = target
        self.ksm.moved(frame, target)
        self.contents[target] = self.contents[frame]
        return list(users)

    # What KSM asks for: `vapama.impl.ksm.Host`

    def areas(self) -> Sequence[Backing]:
        """The guests' backings."""
        return self.backings

    def frames_of(self, area: Backing) -> Numbers:
        """The frame of each mergeable page; -1 for one that has none."""
        frames = np.array([area.frame.get(page, -1) for page in area.mergeable], dtype=np.int64)
        if self.zero is not None:
            frames[frames == self.zero] = -1
        return frames

    def frame_at(self, area: Backing, page: int) -> int:
        """The same of one."""
        frame = area.frame.get(area.mergeable[page], -1)
        return -1 if frame == self.zero else frame

    def is_pinned(self, area: Backing, page: int) -> Flag:
        """No device holds a guest's page."""
        return 0

    def protect(self, area: Backing, page: int) -> None:
        """Let nobody write to the page's frame: a huge page is split, every mapping dropped."""
        page = area.mergeable[page]
        area.split(page)
        area.revoke(page)
        area.readonly.add(page)
        self.users.setdefault(area.frame[page], set()).add((area, page))

    def share(self, area: Backing, page: int, frame: int) -> None:
        """Let the page, which was protected, use this frame in place of its own."""
        page = area.mergeable[page]
        area.leave(page)
        area.frame[page] = frame
        area.readonly.add(page)
        self.users[frame].add((area, page))

    def map_zero(self, area: Backing, page: int) -> None:
        """Let the page, which was protected and is all zeros, use the zero frame: it is the first
        such page's.
        """
        if self.zero is None:
            self.zero = area.frame[area.mergeable[page]]
        else:
            self.share(area, page, self.zero)

    def unmerge(self, area: Backing) -> None:
        """Give every mergeable page that is shared a frame of its own."""
        for page in area.mergeable:
            if page in area.readonly:
                area.unshare(page)
