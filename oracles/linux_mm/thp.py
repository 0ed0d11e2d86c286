"""Linux' transparent huge pages as a subject: a block of 2 MBytes of a process under test.

Huge pages are for whoever asks (`madvise`), of 2 MBytes alone, and khugepaged sleeps, so that a
block becomes huge when it is first touched or collapsed, and not by itself. A program may wake
khugepaged for one scan of all: it does so when its `scan_sleep_millisecs` is written.
"""

import errno
import os
import re
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from vapama.oracles.linux_mm.child import PAGE
from vapama.oracles.linux_mm.knobs import Unavailable, read
from vapama.oracles.linux_mm.processes import (
    COLLAPSE,
    DONTNEED,
    HUGEPAGE,
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    NOHUGEPAGE,
    Child,
    Kernel,
    content_of,
)
from vapama.spec.subject import THP, Capabilities

FOLDER = "/sys/kernel/mm/transparent_hugepage/"
SIZE, PAGES = 2 << 20, 512
PARKED = (0xFFFF_FFFF, 0xFFFF_FFFE)
PATIENCE_SECONDS = 5.0
MAX_PTES_NONE, MAX_PTES_SHARED = 511, 256
"""How many pages may be missing, and shared, for khugepaged to collapse a block: its defaults."""
READ, READ_AND_WRITE = 1, 3
SCANS = FOLDER + "khugepaged/full_scans"
HUGE = re.compile(rb"AnonHugePages: +([0-9]+) kB")


class LinuxThp(Kernel):
    """The running kernel. Raises `Unavailable` where it cannot be driven."""

    capabilities = Capabilities(observes=frozenset({THP}), confirmations=3)
    forked = False
    """Whether the program that runs has forked."""

    def __init__(self) -> None:
        if not os.path.isdir(FOLDER):
            raise Unavailable("this kernel has no transparent huge pages")
        if not os.access(FOLDER + "enabled", os.W_OK):
            raise Unavailable("the knobs of transparent huge pages cannot be written here")
        super().__init__()

    def set_up(self) -> None:
        """Huge pages for whoever asks, and khugepaged asleep."""
        self.salt = secrets.randbits(63) | 1
        for name, value in (
            ("enabled", "madvise"),
            ("defrag", "madvise"),
            ("use_zero_page", 1),
            ("shrink_underused", 0),
            ("khugepaged/scan_sleep_millisecs", PARKED[0]),
            ("khugepaged/pages_to_scan", 0xFFFF_FFFF),
            ("khugepaged/max_ptes_none", MAX_PTES_NONE),
            ("khugepaged/max_ptes_shared", MAX_PTES_SHARED),
            ("khugepaged/max_ptes_swap", 0),
            ("khugepaged/defrag", 1),
        ):
            if os.path.exists(FOLDER + name):
                self.knobs.set(FOLDER + name, value)
        for size in Path(FOLDER).glob("hugepages-*kB/enabled"):
            value = "inherit" if size.parent.name == "hugepages-2048kB" else "never"
            self.knobs.set(str(size), value)

        self.helper = self.parent.fork()
        start = self.helper.ask(b"m", 2 * SIZE, MAP_PRIVATE | MAP_ANONYMOUS)
        self.huge_at = -(-start // SIZE) * SIZE
        self.helper.ask(b"a", self.huge_at, SIZE, HUGEPAGE)
        self.helper.ask(b"w", self.huge_at, 1, self.salt)

    def close(self) -> None:
        """End all processes and restore the knobs."""
        if self.started:
            self.helper.end()
        super().close()

    def settle(self) -> None:
        """Have no processor hold pages that it has yet to put on a list: whether a page is written
        in place depends on its count of uses. A collapse, here of what is huge, sees to that.
        """
        self.helper.ask(b"a", self.huge_at, SIZE, COLLAPSE)

    def scan(self) -> None:
        """Have khugepaged scan all memory once. Raises `Unavailable` if it does not."""
        knob = FOLDER + "khugepaged/scan_sleep_millisecs"
        done, until = int(read(SCANS)), time.monotonic() + PATIENCE_SECONDS
        self.knobs.set(knob, PARKED[int(read(knob)) == PARKED[0]])
        while int(read(SCANS)) == done:
            if time.monotonic() > until:
                raise Unavailable("khugepaged does not scan when it is asked to")
            time.sleep(0.0002)

    def thp(self) -> "LinuxBlock":
        """A block in which nothing is mapped; whatever ran before is ended."""
        self.begin()
        self.forked = False
        self.running = running = LinuxBlock(self)
        return running


class LinuxBlock:
    """An aligned block of a process under test, private and anonymous, under MADV_HUGEPAGE."""

    stateful = True
    ended = False

    def __init__(self, kernel: LinuxThp, parent: "LinuxBlock | None" = None) -> None:
        self.kernel, self.salt = kernel, kernel.salt
        self.child: Child = (kernel.parent if parent is None else parent.child).fork()
        self.children: list[LinuxBlock] = []
        self.smaps = os.open(f"/proc/{self.child.pid}/smaps", os.O_RDONLY)
        self.base: int
        self.zeros: set[int | None]
        """The zero pages, which count as no frames of the block's own."""
        if parent is not None:
            self.base, self.zeros = parent.base, parent.zeros
            return
        start = self.child.ask(b"m", 4 * SIZE, MAP_PRIVATE | MAP_ANONYMOUS)
        self.base = (start // SIZE + 1) * SIZE
        self.zeros = self._zero_frames()
        # A fork copies the tables of areas that were written to alone.
        self.child.ask(b"w", self.base, 1, self.salt)
        self.child.ask(b"a", self.base, SIZE, DONTNEED)
        self.advise(1)

    def fork(self) -> "LinuxBlock":
        """The same block in a child of the process."""
        self.kernel.forked = True
        child = LinuxBlock(self.kernel, self)
        self.children.append(child)
        return child

    def exit(self) -> None:
        """End the process alone."""
        os.close(self.smaps)
        self.child.end()
        self.ended = True

    def daemon(self) -> None:
        """Wake khugepaged for one scan."""
        self.kernel.scan()

    def _zero_frames(self) -> set[int | None]:
        """The frames of the small zero page, and of the huge one."""
        beyond = self.base + SIZE
        self.child.ask(b"a", self.base, SIZE, NOHUGEPAGE)
        self.child.ask(b"r", self.base)
        small = self.child.frames(self.base, 1)
        self.child.ask(b"a", self.base, SIZE, DONTNEED)
        self.child.ask(b"a", beyond, SIZE, HUGEPAGE)
        self.child.ask(b"r", beyond)
        found = {*small, *self.child.frames(beyond, PAGES)}
        self.child.ask(b"a", beyond, SIZE, NOHUGEPAGE)
        return found - {None}

    def end(self) -> None:
        """End the process, and its children."""
        for process in (*self.children, self):
            if not process.ended:
                process.exit()

    def _at(self, page: int) -> int:
        return self.base + page * PAGE

    # What the process does

    def write(self, page: int, content: int) -> None:
        """Store a content to a page."""
        if self.kernel.forked:
            self.kernel.settle()
        self.child.ask(b"w", self._at(page), content, self.salt)

    def read(self, page: int) -> int:
        """Load from a page; its content."""
        self.child.ask(b"r", self._at(page))
        return content_of(self.child.page(self._at(page)), self.salt)

    def discard(self, first: int, count: int) -> None:
        """MADV_DONTNEED."""
        self.child.ask(b"a", self._at(first), count * PAGE, DONTNEED)

    def split(self, page: int) -> None:
        """Take write access to a page away, and give it back."""
        for rights in (READ, READ_AND_WRITE):
            self.child.ask(b"p", self._at(page), PAGE, rights)

    def advise(self, huge: int) -> None:
        """MADV_HUGEPAGE or MADV_NOHUGEPAGE."""
        self.child.ask(b"a", self.base, SIZE, HUGEPAGE if huge else NOHUGEPAGE)

    def collapse(self) -> bool:
        """MADV_COLLAPSE; False for EINVAL."""
        try:
            self.child.ask(b"a", self.base, SIZE, COLLAPSE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    # What can be observed

    def huge(self) -> bool:
        """Whether one entry of the page directory maps the block, and not the huge zero page."""
        kilobytes = 0
        text = b""
        while part := os.pread(self.smaps, 1 << 16, len(text)):
            text += part
        for area in re.split(rb"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text):
            if area:
                start, stop = (int(part, 16) for part in area.split(maxsplit=1)[0].split(b"-"))
                if start < self.base + SIZE and stop > self.base:
                    found = HUGE.search(area)
                    kilobytes += int(found[1]) if found else 0
        return kilobytes == SIZE >> 10

    def frames(self, pages: Sequence[int]) -> list[int | None]:
        """The frames of these pages; None where there is none, or the zero page."""
        found = self.child.frames(self.base, PAGES)
        return [None if found[page] in self.zeros else found[page] for page in pages]

    def present(self) -> int:
        """How many pages have a frame of their own."""
        return PAGES - self.frames(range(PAGES)).count(None)

    def contents(self, pages: Sequence[int]) -> list[int]:
        """What pages hold; -1 for what nobody wrote."""
        frames = self.frames(pages)
        return [
            0 if frame is None else content_of(self.child.page(self._at(page)), self.salt)
            for page, frame in zip(pages, frames, strict=True)
        ]
