"""Linux' KSM as a subject: ksmd stepped one full scan at a time, over processes under test.

ksmd parks after a scan for as long as `sleep_millisecs` says, and a different value there wakes it
once. The counters of the system count only if no other process has mergeable memory.
"""

import os
import secrets
import time
from pathlib import Path

from vapama.oracles.linux_mm.child import PAGE
from vapama.oracles.linux_mm.knobs import Unavailable, written
from vapama.oracles.linux_mm.processes import (
    DONTNEED,
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    MERGEABLE,
    NOHUGEPAGE,
    UNMERGEABLE,
    Child,
    Kernel,
    content_of,
)
from vapama.spec.subject import KSM, Capabilities

FOLDER = "/sys/kernel/mm/ksm/"
PARKED = 1_000_000_000
LONGEST_STEP = 10.0
MOST_PAGES = 16
COUNTERS = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "ksm_zero_pages",
    "pages_skipped",
)


def read(name: str) -> int:
    """A counter or knob of KSM."""
    return int(Path(FOLDER + name).read_text())


class LinuxKsm(Kernel):
    """The running kernel. Raises `Unavailable` where it cannot be driven."""

    capabilities = Capabilities(observes=frozenset({KSM}), confirmations=3)
    first = ((FOLDER + "run", "2"),)

    def __init__(self) -> None:
        if not os.path.isdir(FOLDER):
            raise Unavailable("this kernel has no KSM (CONFIG_KSM)")
        if not os.access(FOLDER + "run", os.W_OK):
            raise Unavailable("KSM's knobs cannot be written here")
        super().__init__()

    def set_up(self) -> None:
        """Make ksmd park."""
        self.base = self.parent.ask(b"m", (MOST_PAGES + 2) * PAGE, MAP_PRIVATE | MAP_ANONYMOUS)
        self.base += PAGE
        self.parent.ask(b"a", self.base, MOST_PAGES * PAGE, NOHUGEPAGE)
        # Never touched, it keeps ksmd's list from being empty; without it no scan would count.
        anchor = self.parent.ask(b"m", 3 * PAGE, MAP_PRIVATE | MAP_ANONYMOUS)
        self.parent.ask(b"a", anchor + PAGE, PAGE, MERGEABLE)
        zero = self.parent.ask(b"m", PAGE, MAP_PRIVATE | MAP_ANONYMOUS)
        self.parent.ask(b"r", zero)
        self.zero = self.parent.frames(zero, 1)[0]
        self.salt = secrets.randbits(63) | 1
        self.tick = 0
        for name, value in (
            ("run", 2),
            ("advisor_mode", "none"),
            ("pages_to_scan", 4_000_000_000),
            ("sleep_millisecs", PARKED),
            ("stable_node_chains_prune_millisecs", 0),
            ("smart_scan", 0),
            ("use_zero_pages", 0),
            ("max_page_sharing", 256),
            ("run", 1),
        ):
            if os.path.exists(FOLDER + name):
                self.knobs.set(FOLDER + name, value)
        self.settle()

    def settle(self) -> None:
        """Wait until ksmd has parked."""
        before = -1
        while before != (before := read("full_scans")):
            time.sleep(0.02)

    def step(self) -> None:
        """Let ksmd do one full scan."""
        before = read("full_scans")
        self.tick ^= 1
        written(FOLDER + "sleep_millisecs", str(PARKED + self.tick))
        start = time.monotonic()
        while read("full_scans") == before:
            if time.monotonic() - start > LONGEST_STEP:
                raise TimeoutError("ksmd does not scan")
            time.sleep(0.00005)

    def unmerge(self) -> None:
        """Write run=2, then run=1: ksmd stays parked, for that does not wake it."""
        written(FOLDER + "run", "2")
        written(FOLDER + "run", "1")

    def ksm(
        self, pages: int, max_page_sharing: int, use_zero_pages: int, smart_scan: int
    ) -> "LinuxMerging":
        """A process of so many pages; whatever ran before is ended."""
        self.begin()
        self.unmerge()
        for name, value in (
            ("max_page_sharing", max_page_sharing),
            ("use_zero_pages", use_zero_pages),
            ("smart_scan", smart_scan),
        ):
            self.knobs.set(FOLDER + name, value)
        self.running = running = LinuxMerging(self, pages)
        return running


def others(ours: set[int]) -> list[int]:
    """The processes, ours apart, whose memory KSM looks at."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in ours:
            try:
                text = Path(f"/proc/{name}/ksm_stat").read_text()
            except OSError:
                continue
            if "ksm_mergeable: yes" in text or (text and "ksm_rmap_items 0\n" not in text):
                found.append(int(name))
    return found


class LinuxMerging:
    """Processes under test, numbered from 0 in the order of their making."""

    stateful = True

    def __init__(self, kernel: LinuxKsm, pages: int) -> None:
        self.kernel, self.pages = kernel, pages
        self.children: dict[int, Child] = {0: kernel.parent.fork()}
        self.made = 1
        self.alone = not others({kernel.process.pid, self.children[0].pid})
        self.skipped = read("pages_skipped")

    def end(self) -> None:
        """End the processes that are left."""
        for child in reversed(self.children.values()):
            child.end()
        self.children.clear()

    def _at(self, page: int) -> int:
        return self.kernel.base + page * PAGE

    def write(self, process: int, page: int, content: int) -> None:
        """Store a content to a page."""
        self.children[process].ask(b"w", self._at(page), content, self.kernel.salt)

    def read(self, process: int, page: int) -> None:
        """Load from a page."""
        self.children[process].ask(b"r", self._at(page))

    def discard(self, process: int, page: int) -> None:
        """MADV_DONTNEED."""
        self.children[process].ask(b"a", self._at(page), PAGE, DONTNEED)

    def advise(self, process: int, first: int, count: int, mergeable: int) -> None:
        """MADV_MERGEABLE or MADV_UNMERGEABLE."""
        advice = MERGEABLE if mergeable else UNMERGEABLE
        self.children[process].ask(b"a", self._at(first), count * PAGE, advice)

    def fork(self, process: int) -> int:
        """A child; its number."""
        self.children[self.made] = self.children[process].fork()
        self.made += 1
        return self.made - 1

    def exit(self, process: int) -> None:
        """The process ends."""
        self.children.pop(process).end()

    def unmerge(self) -> None:
        """run=2."""
        self.kernel.unmerge()

    def scan(self) -> None:
        """One full scan."""
        self.kernel.step()

    def frames(self, process: int) -> list[int | None]:
        """The frame of each page; None for the zero page too."""
        found = self.children[process].frames(self.kernel.base, self.pages)
        return [None if frame == self.kernel.zero else frame for frame in found]

    def contents(self, process: int) -> list[int]:
        """What each page holds; -1 for what nobody wrote."""
        child, salt = self.children[process], self.kernel.salt
        return [
            0 if frame is None else content_of(child.page(self._at(page)), salt)
            for page, frame in enumerate(self.frames(process))
        ]

    def present(self, process: int) -> list[bool]:
        """Which pages have a frame other than the zero page."""
        return [frame is not None for frame in self.frames(process)]

    def partition(self) -> list[int | None]:
        """A label for the frame of each page of each living process, by first occurrence."""
        labels: dict[int, int] = {}
        frames = [frame for process in self.children for frame in self.frames(process)]
        return [None if f is None else labels.setdefault(f, len(labels)) for f in frames]

    def counters(self) -> tuple[int, ...] | None:
        """Those of the system; None if there is other mergeable memory."""
        if not self.alone:
            return None
        *counted, skipped = (read(name) for name in COUNTERS)
        return (*counted, skipped - self.skipped)

    def process_counters(self, process: int) -> tuple[int, int, int]:
        """Items, merged pages and zero pages of a process."""
        return self.children[process].merging()
