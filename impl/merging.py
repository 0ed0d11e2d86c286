"""Processes with KSM at work on their pages, driven step by step: what `Optimized.ksm` gives.

A page's content is told as one word; in its frame, that word stands at a place that depends on it,
so that contents differ early or late in a page.
"""

from typing import NamedTuple

import numpy as np

from vapama.impl.kernels.sharing import MIGRATING, PRESENT, WRITABLE, frame_of
from vapama.impl.ksm import Frames, Ksm
from vapama.impl.processes import WORDS_A_FRAME, ZERO, Process, Processes


class Use(NamedTuple):
    """A page's use of a frame by its process' table, or by its TLB (`cached`)."""

    process: int
    page: int
    frame: int
    writable: bool
    cached: bool


def row_of(content: int) -> Frames:
    """A page of this content."""
    row = np.zeros(WORDS_A_FRAME, dtype=np.uint64)
    row[511 - content % 7 * 73] = content
    return row


class Merging:
    """Processes numbered from 0 in the order of their making, and the merger over them."""

    stateful = True

    def __init__(
        self,
        pages: int,
        *,
        max_page_sharing: int = 256,
        use_zero_pages: int = 0,
        smart_scan: int = 0,
        checksum_bits: int = 64,
        block: int = WORDS_A_FRAME,
        frames: int = 0,
    ) -> None:
        self.host = Processes(pages, frames, block)
        self.merger = Ksm(
            self.host,
            max_page_sharing=max_page_sharing,
            use_zero_pages=use_zero_pages,
            smart_scan=smart_scan,
            checksum_bits=checksum_bits,
        )
        self.host.watcher = self.merger

    # What processes do

    def write(self, process: int, page: int, content: int) -> None:
        """Store a content to a page."""
        self.host.store(self._process(process), page, row_of(content))

    def read(self, process: int, page: int) -> int:
        """Load a page's content."""
        return int(self.host.load(self._process(process), page).max())

    def discard(self, process: int, page: int) -> None:
        """MADV_DONTNEED."""
        self.host.discard(self._process(process), page)

    def move(self, process: int, page: int, to: int) -> None:
        """Move a page onto another of the process, by mremap."""
        self.host.move(self._process(process), page, to)

    def fork(self, process: int) -> int:
        """A child; its number."""
        return self.host.fork(self._process(process)).number

    def exit(self, process: int) -> None:
        """The process ends."""
        ended = self._process(process)
        self.host.exit(ended)
        self.merger.leave(ended)

    def force_write(self, process: int, page: int, content: int, race: int) -> None:
        """A debugger's write; with `race`, the process discards the page in the midst of it."""
        self.host.force_write(self._process(process), page, row_of(content), bool(race))

    def map_file(self, process: int, page: int, content: int) -> None:
        """Map a file's page of this content privately, read-only."""
        owner = self._process(process)
        self.host.discard(owner, page)
        self.host.map_file(owner, page, row_of(content))

    # What devices do

    def pin(self, process: int, page: int) -> None:
        """Pin the page for a device."""
        self.host.pin(self._process(process), page)

    def unpin(self, process: int, page: int) -> None:
        """The device lets the page go."""
        self.host.unpin(self._process(process), page)

    def device_write(self, process: int, page: int, content: int) -> None:
        """The device stores to the page that it holds."""
        self.host.device_store(self._process(process), page, row_of(content))

    # What the host does

    def advise(self, process: int, first: int, count: int, mergeable: int) -> None:
        """MADV_MERGEABLE or MADV_UNMERGEABLE."""
        owner = self._process(process)
        for page in range(first, first + count):
            if owner.mergeable[page] and not mergeable:
                self.host.unshare(owner, page)
            owner.mergeable[page] = bool(mergeable)

    def unmerge(self) -> None:
        """run=2."""
        self.merger.unmerge()

    def scan(self, most: int | None = None) -> int:
        """One full scan, or the next `most` pages of one."""
        return self.merger.scan(most)

    def begin_migration(self, process: int, page: int) -> None:
        """Begin to move the page's frame elsewhere."""
        word = int(self._process(process).table[page])
        if word & PRESENT:
            self.host.begin_migration(frame_of(word))

    def end_migration(self) -> None:
        """Finish all moves that were begun."""
        for frame in list(self.host.migrations):
            self.host.end_migration(frame)

    def collapse(self, process: int, page: int) -> bool:
        """Make the block around the page one huge page, if that can be."""
        return self.host.collapse(self._process(process), page)

    # What can be observed

    def contents(self, process: int) -> list[int]:
        """What a load of each page would give, with nothing changed by looking."""
        owner = self._process(process)
        found = []
        for page in range(self.host.pages):
            word = owner.tlb.get(page) or int(owner.table[page])
            backing = owner.backing.get(page, ZERO)
            # A page under migration is where it was until the move is finished.
            frame = frame_of(word) if word & (PRESENT | MIGRATING) else backing
            found.append(int(self.host.contents[frame].max()))
        return found

    def present(self, process: int) -> list[bool]:
        """Which pages have a frame other than the zero page."""
        return [
            bool(word & PRESENT) and frame_of(word) != ZERO
            for word in self._process(process).table.tolist()
        ]

    def partition(self) -> list[int | None]:
        """A label for the frame of each page of each living process, by first occurrence."""
        labels: dict[int, int] = {}
        words = [word for process in self.host.alive for word in process.table.tolist()]
        return [
            labels.setdefault(frame_of(word), len(labels))
            if word & PRESENT and frame_of(word) != ZERO
            else None
            for word in words
        ]

    def uses(self) -> list[Use]:
        """Every use of a frame by a table or a TLB."""
        return [
            Use(process.number, page, frame_of(word), bool(word & WRITABLE), cached)
            for process in self.host.alive
            for cached, words in (
                (False, enumerate(process.table.tolist())),
                (True, iter(process.tlb.items())),
            )
            for page, word in words
            if word & PRESENT
        ]

    def merged_frames(self) -> set[int]:
        """The frames that KSM owns, the zero page among them."""
        return {ZERO, *np.flatnonzero(self.merger.node_at >= 0).tolist()}

    def counters(self) -> tuple[int, int, int, int, int, int]:
        """Shared, sharing, unshared, volatile, zero and skipped."""
        *trees, skipped = self.merger.counters()
        shared, sharing, unshared, volatile = trees
        zero = sum(len(process.zeroed) for process in self.host.alive)
        return shared, sharing, unshared, volatile, zero, skipped

    def process_counters(self, process: int) -> tuple[int, int, int]:
        """Items, merged pages and zero pages of a process."""
        owner = self._process(process)
        return (*self.merger.area_counters(owner), len(owner.zeroed))

    def _process(self, number: int) -> Process:
        return self.host.numbered[number]
