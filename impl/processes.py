"""Anonymous memory of processes in page-table words: a host on which KSM and huge pages run alone.

One machine memory of frames; each process has a table of words (present, writable, huge, frame) and
a TLB of the words it used. Frames are shared by fork, by KSM and by files, and copied on write.
Whoever changes a word flushes it from the TLBs before the frame may be used otherwise. The VMM is
another such host: what KSM asks of one is `vapama.impl.ksm.Host`.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vapama.impl.kernels.sharing import (
    FRAME_SHIFT,
    HUGE,
    MIGRATING,
    PRESENT,
    WRITABLE,
    after_write_fault,
    forked_child,
    forked_parent,
    frame_of,
    maps,
    may_write,
    merged,
    protected,
    unshared,
)
from vapama.spec.words import Flag, flag

WORDS_A_FRAME = 512
ZERO = 0
"""The frame of zeros that pages never written share."""
Mapping = tuple["Process", int]


class Full(Exception):
    """There is no free frame left, or no free aligned block of frames."""


class Process:
    """An address space: its table and TLB, what it advised, and which pages a device pinned.

    `backing` are the frames of files that are mapped privately, by page.
    """

    __slots__ = ("backing", "mergeable", "number", "pins", "readonly", "table", "tlb", "zeroed")

    def __init__(self, number: int, pages: int) -> None:
        self.number = number
        self.table: npt.NDArray[np.uint64] = np.zeros(pages, dtype=np.uint64)
        self.mergeable = np.zeros(pages, dtype=np.bool_)
        self.readonly = np.zeros(pages, dtype=np.bool_)
        self.tlb: dict[int, int] = {}
        self.backing: dict[int, int] = {}
        self.pins: dict[int, int] = {}
        self.zeroed: set[int] = set()


class Watcher(Protocol):
    """Who wants to know what becomes of frames: KSM, which keeps them in its trees."""

    def shares(self, frame: int) -> bool:
        """Whether the frame is one that must never be written."""

    def freed(self, frame: int) -> None:
        """The frame is mapped nowhere any more."""

    def moved(self, frame: int, to: int) -> None:
        """The frame's content and mappings are now those of another frame."""


class Nobody:
    """There is no KSM."""

    def shares(self, frame: int) -> bool:
        """Every frame may be written."""
        return False

    def freed(self, frame: int) -> None:
        """Goes on."""

    def moved(self, frame: int, to: int) -> None:
        """Goes on."""


class Processes:
    """Processes over `frames` frames; `block` pages make a huge page (512 on a real machine)."""

    def __init__(self, pages: int, frames: int = 0, block: int = WORDS_A_FRAME) -> None:
        count = frames or 16 * pages + 1
        self.pages, self.block = pages, block
        self.contents: npt.NDArray[np.uint64] = np.zeros((count, WORDS_A_FRAME), dtype=np.uint64)
        self.mapped = np.zeros(count, dtype=np.int32)
        self.pinned = np.zeros(count, dtype=np.int32)
        self.users: dict[int, set[Mapping]] = {}
        """The rmap: which pages use a frame that more than KSM's zero page is made of."""
        self.free = list(range(count - 1, ZERO, -1))
        self.files: set[int] = set()
        self.watcher: Watcher = Nobody()
        self.migrations: dict[int, list[tuple[Process, int, int]]] = {}
        self.numbered = [Process(0, pages)]
        self.alive = [self.numbered[0]]

    # What a process does

    def store(self, process: Process, page: int, content: npt.NDArray[np.uint64]) -> None:
        """Write a page's content: through the TLB, or after the faults that it takes."""
        while True:
            word = process.tlb.get(page, 0)
            if not word & WRITABLE:
                word = int(process.table[page])
                if word & PRESENT and word & WRITABLE:
                    process.tlb[page] = word
            if word & WRITABLE:
                self.contents[frame_of(word)] = content
                return
            if process.readonly[page]:
                raise PermissionError(f"page {page} is read-only")
            self.fault(process, page, write=True)

    def load(self, process: Process, page: int) -> npt.NDArray[np.uint64]:
        """A page's content. A page that was never touched maps the zero page from then on."""
        word = process.tlb.get(page, 0)
        while not word & PRESENT:
            word = int(process.table[page])
            if word & PRESENT:
                process.tlb[page] = word
            else:
                self.fault(process, page, write=False)
        content: npt.NDArray[np.uint64] = self.contents[frame_of(word)]
        return content

    def fault(self, process: Process, page: int, write: bool) -> None:
        """Resolve a page fault: wait for a migration, map the zero page, or copy on write."""
        word = int(process.table[page])
        frame = frame_of(word)
        if word & MIGRATING:
            self.end_migration(frame)
            return
        if not word & PRESENT:
            frame = process.backing.get(page, ZERO)
            if not write:
                self.set_page(process, page, maps(frame, 0))
                return
        if not write or may_write(word):
            return
        if word & HUGE:
            self.split(process, page)
            word = int(process.table[page])
        if word & PRESENT and self.is_exclusive(frame):
            self.set_word(process, page, after_write_fault(word, 1, 0))
        else:
            self.set_page(process, page, after_write_fault(word, 0, self.copy_of(frame)))

    def is_exclusive(self, frame: int) -> bool:
        """Whether the one page that maps the frame may write to it: nobody else can see it."""
        if frame == ZERO or frame in self.files or self.watcher.shares(frame):
            return False
        return bool(self.mapped[frame] == 1)

    def discard(self, process: Process, page: int) -> None:
        """MADV_DONTNEED of one page: a huge page is split, the frame is let go."""
        self.settle(process, page)
        if int(process.table[page]) & HUGE:
            self.split(process, page)
        self.clear_page(process, page)

    def move(self, process: Process, page: int, to: int) -> None:
        """Mremap of one page onto another, whose own content is dropped."""
        self.settle(process, page)
        self.discard(process, to)
        word = int(process.table[page])
        if word & HUGE:
            self.split(process, page)
            word = int(process.table[page])
        if not word & PRESENT:
            return
        frame = frame_of(word)
        self.users[frame].discard((process, page))
        process.table[page] = 0
        process.tlb.pop(page, None)
        process.zeroed.discard(page)
        process.table[to] = word
        self.users[frame].add((process, to))
        if page in process.pins:
            process.pins[to] = process.pins.pop(page)

    def fork(self, process: Process) -> Process:
        """A child that shares every frame, read-only in both; but pinned frames are copied to it.

        A device writes to a pinned frame, so it must stay the parent's, and writable there.
        """
        for page in range(self.pages):
            self.settle(process, page)
        child = Process(len(self.numbered), self.pages)
        child.mergeable[:], child.readonly[:] = process.mergeable, process.readonly
        child.backing = dict(process.backing)
        self.numbered.append(child)
        self.alive.append(child)
        for page in range(self.pages):
            word = int(process.table[page])
            if word & PRESENT:
                frame = frame_of(word)
                pinned = flag(bool(self.pinned[frame]))
                fresh = self.copy_of(frame) if pinned else 0
                if word & HUGE and pinned:
                    self.split(process, page)
                    word = int(process.table[page])
                self.set_word(process, page, forked_parent(word, pinned))
                self.set_page(child, page, forked_child(word, pinned, fresh))
        child.zeroed = set(process.zeroed)
        return child

    def exit(self, process: Process) -> None:
        """The process ends and lets go of every frame."""
        for page in list(process.pins):
            self.unpin(process, page)
        for page in range(self.pages):
            self.settle(process, page)
            self.clear_page(process, page)
        self.alive.remove(process)

    def force_write(
        self, process: Process, page: int, content: npt.NDArray[np.uint64], race: bool
    ) -> None:
        """A debugger's write, which read-only protection does not stop: to a private copy only.

        With `race` the process discards the page between the fault and the write, and reads it.
        """
        while True:
            word = int(process.table[page])
            frame = frame_of(word)
            if word & PRESENT and self.is_exclusive(frame):
                break
            self.fault(process, page, write=True)
            if race:
                self.discard(process, page)
                self.load(process, page)
                race = False
        self.contents[frame] = content

    # What a device does

    def pin(self, process: Process, page: int) -> None:
        """Pin the page for a device: from now on it keeps its frame, which is the page's alone."""
        self.settle(process, page)
        while True:
            word = int(process.table[page])
            if word & PRESENT and self.is_exclusive(frame_of(word)):
                break
            self.fault(process, page, write=True)
        if page not in process.pins:
            process.pins[page] = frame_of(word)
            self.pinned[frame_of(word)] += 1

    def unpin(self, process: Process, page: int) -> None:
        """The device is done with the page."""
        frame = process.pins.pop(page)
        self.pinned[frame] -= 1
        self.release(frame)

    def device_store(self, process: Process, page: int, content: npt.NDArray[np.uint64]) -> None:
        """The device writes to the frame that it was given, whatever the page maps by now."""
        self.contents[process.pins[page]] = content

    # What the host does

    def begin_migration(self, frame: int) -> None:
        """Replace every mapping of a frame by a migration entry. Pinned frames do not move."""
        if frame == ZERO or frame in self.files or self.pinned[frame] or frame in self.migrations:
            return
        entries = [(process, page) for process, page in self.users.get(frame, ())]
        if not entries or any(int(p.table[page]) & HUGE for p, page in entries):
            return
        kept = []
        for process, page in sorted(entries, key=lambda entry: (entry[0].number, entry[1])):
            word = int(process.table[page])
            kept.append((process, page, word))
            process.table[page] = word & ~PRESENT | MIGRATING
            process.tlb.pop(page, None)
        self.migrations[frame] = kept

    def end_migration(self, frame: int) -> None:
        """Copy the frame to a new one and map that in its place.

        Unless KSM let a page join the frame meanwhile: then it stays where it is, as its count of
        users tells (Linux: mm/migrate.c, folio_migrate_mapping).
        """
        entries = self.migrations.pop(frame)
        if self.mapped[frame] != len(entries):
            for process, page, word in entries:
                process.table[page] = word
            return
        copy = self.copy_of(frame)
        for process, page, word in entries:
            self.users[frame].discard((process, page))
            process.table[page] = maps(copy, word & (WRITABLE | HUGE))
            self.users.setdefault(copy, set()).add((process, page))
        self.mapped[copy] = len(entries)
        self.watcher.moved(frame, copy)
        self.mapped[frame] = 0
        self.release(frame)

    def settle(self, process: Process, page: int) -> None:
        """Wait for the migration of a page, if there is one."""
        word = int(process.table[page])
        if word & MIGRATING:
            self.end_migration(frame_of(word))

    def collapse(self, process: Process, page: int) -> bool:
        """Copy the aligned block around a page into one huge page; False if that cannot be.

        Holes become zeros. A block in which a frame is pinned or a page read-only stays as it is,
        and one in which nothing is present too.
        """
        first = page - page % self.block
        pages = range(first, first + self.block)
        if pages.stop > self.pages:
            return False
        for each in pages:
            self.settle(process, each)
        words = [int(process.table[each]) for each in pages]
        if all(w & HUGE for w in words):
            return True
        if not any(w & PRESENT and frame_of(w) != ZERO for w in words):
            return False
        if any(self.pinned[frame_of(w)] for w in words if w & PRESENT):
            return False
        if any(process.readonly[each] for each in pages):
            return False
        frame = self.new_block()
        for i, word in enumerate(words):
            source = frame_of(word) if word & PRESENT else ZERO
            self.contents[frame + i] = self.contents[source]
        for i, each in enumerate(pages):
            self.set_page(process, each, maps(frame + i, HUGE | WRITABLE))
        return True

    def split(self, process: Process, page: int) -> None:
        """Map the frames of a huge page one by one. Frames, contents and rights stay."""
        first = page - page % self.block
        for each in range(first, first + self.block):
            self.set_word(process, each, int(process.table[each]) & ~HUGE)

    # What KSM asks for: `vapama.impl.ksm.Host`

    def areas(self) -> Sequence[Process]:
        """The processes, in the order in which they are scanned."""
        return self.alive

    def frames_of(self, area: Process) -> npt.NDArray[np.int64]:
        """The frame of each page that KSM may look at; -1 for the others."""
        table = area.table
        frames = (table >> np.uint64(FRAME_SHIFT)).astype(np.int64)
        there = (table & np.uint64(PRESENT) != 0) & area.mergeable & (frames != ZERO)
        if self.files:
            there &= ~np.isin(frames, list(self.files))
        return np.where(there, frames, -1)

    def frame_at(self, area: Process, page: int) -> int:
        """The same of one page."""
        word = int(area.table[page])
        frame = frame_of(word)
        if not word & PRESENT or not area.mergeable[page] or frame == ZERO or frame in self.files:
            return -1
        return frame

    def is_pinned(self, area: Process, page: int) -> Flag:
        """1 if a device holds the page's frame."""
        return flag(bool(self.pinned[frame_of(int(area.table[page]))]))

    def protect(self, area: Process, page: int) -> None:
        """Take write access to the page's frame from every table and TLB.

        A huge page is split first: what is done to one of its pages concerns just that one.
        """
        word = int(area.table[page])
        if word & HUGE:
            self.split(area, page)
        for process, at in self.users[frame_of(word)]:
            if int(process.table[at]) & HUGE:
                self.split(process, at)
            self.set_word(process, at, protected(int(process.table[at])))

    def share(self, area: Process, page: int, frame: int) -> None:
        """Let the page use this frame, read-only."""
        self.set_page(area, page, merged(maps(frame, 0)))

    def map_zero(self, area: Process, page: int) -> None:
        """Let the page, which is all zeros, use the zero page."""
        self.share(area, page, ZERO)
        area.zeroed.add(page)

    def unmerge(self, area: Process) -> None:
        """Give every MERGEABLE page that KSM shares a frame of its own."""
        for page in np.flatnonzero(area.mergeable).tolist():
            self.unshare(area, page)

    def unshare(self, area: Process, page: int) -> None:
        """Give the page a frame of its own with the same content, if it is one that KSM shares."""
        while True:
            word = int(area.table[page])
            frame = frame_of(word)
            if word & MIGRATING:
                self.end_migration(frame)
                continue
            if not word & PRESENT:
                return
            if not self.watcher.shares(frame) and page not in area.zeroed:
                return
            self.set_page(area, page, unshared(self.copy_of(frame)))

    # Words and frames

    def set_word(self, process: Process, page: int, word: int) -> None:
        """Change a table's word, and forget it in the TLB."""
        process.table[page] = word
        process.tlb.pop(page, None)

    def set_page(self, process: Process, page: int, word: int) -> None:
        """Map what the word says at a page, in place of what was mapped there."""
        frame = frame_of(word)
        self.mapped[frame] += 1
        self.clear_page(process, page)
        self.users.setdefault(frame, set()).add((process, page))
        self.set_word(process, page, word)

    def clear_page(self, process: Process, page: int) -> None:
        """Map nothing at a page. The frame is free for others after the flush."""
        word = int(process.table[page])
        process.zeroed.discard(page)
        if not word & PRESENT:
            return
        frame = frame_of(word)
        self.set_word(process, page, 0)
        self.users[frame].discard((process, page))
        self.mapped[frame] -= 1
        self.release(frame)

    def release(self, frame: int) -> None:
        """Free a frame that nothing uses."""
        if frame == ZERO or frame in self.files or self.mapped[frame] or self.pinned[frame]:
            return
        self.users.pop(frame, None)
        self.watcher.freed(frame)
        self.contents[frame] = 0
        self.free.append(frame)

    def new_frame(self) -> int:
        """A frame of zeros that nobody uses. Raises `Full`."""
        if not self.free:
            raise Full("no free frame")
        return self.free.pop()

    def copy_of(self, frame: int) -> int:
        """A new frame with the content of this one. Raises `Full`."""
        copy = self.new_frame()
        self.contents[copy] = self.contents[frame]
        return copy

    def new_block(self) -> int:
        """The first of `block` free frames, aligned to their number. Raises `Full`."""
        free = set(self.free)
        for first in range(self.block, len(self.mapped) - self.block + 1, self.block):
            frames = range(first, first + self.block)
            if free.issuperset(frames):
                self.free = [frame for frame in self.free if frame not in frames]
                return first
        raise Full("no free block")

    def map_file(self, process: Process, page: int, content: npt.NDArray[np.uint64]) -> int:
        """Map a page of a file, privately and read-only; its frame."""
        frame = self.new_frame()
        self.contents[frame] = content
        self.files.add(frame)
        process.backing[page] = frame
        self.set_page(process, page, maps(frame, 0))
        process.readonly[page] = True
        return frame
