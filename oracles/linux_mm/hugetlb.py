"""Linux' hugetlb pool of 2-MByte pages as a subject, over processes under test."""

import errno
import os
from pathlib import Path

from vapama.oracles.linux_mm.knobs import Unavailable
from vapama.oracles.linux_mm.processes import (
    DONTNEED,
    MAP_ANONYMOUS,
    MAP_HUGETLB,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    POPULATE_WRITE,
    REFUSALS,
    Child,
    Kernel,
)
from vapama.spec.subject import HUGETLB, Capabilities

FOLDER = "/sys/kernel/mm/hugepages/hugepages-2048kB/"
SIZE = 2 << 20
FLAGS = (MAP_PRIVATE, MAP_SHARED, MAP_PRIVATE | MAP_NORESERVE)
"""By kind: private, shared, private without reservation."""
FRAMES_A_PAGE = 512


def read(name: str) -> int:
    """A count of the pool."""
    return int(Path(FOLDER + name + "_hugepages").read_text())


class LinuxHugetlb(Kernel):
    """The running kernel. Raises `Unavailable` where it cannot be driven."""

    capabilities = Capabilities(observes=frozenset({HUGETLB}), confirmations=3)

    def __init__(self) -> None:
        if not os.access(FOLDER + "nr_hugepages", os.W_OK):
            raise Unavailable("the pool of 2-MByte pages cannot be written here")
        if read("nr") != read("free"):
            raise Unavailable("2-MByte pages of this host are in use")
        super().__init__()

    def hugetlb(self) -> "LinuxPool":
        """An empty pool; whatever ran before is ended."""
        self.begin()
        self.knobs.set(FOLDER + "nr_hugepages", 0)
        self.knobs.set(FOLDER + "nr_overcommit_hugepages", 0)
        self.running = running = LinuxPool(self)
        return running


class LinuxPool:
    """The pool, and the mappings of a process under test, numbered in the order of their making."""

    stateful = True

    def __init__(self, kernel: LinuxHugetlb) -> None:
        self.kernel = kernel
        self.owner: Child = kernel.parent.fork()
        self.areas: dict[int, tuple[int, int]] = {}
        self.made = 0

    def end(self) -> None:
        """End the process."""
        self.owner.end()

    @property
    def pool(self) -> tuple[int, ...]:
        """Total, free, reserved, surplus, overcommit."""
        return tuple(map(read, ("nr", "free", "resv", "surplus", "nr_overcommit")))

    def resize(self, count: int) -> None:
        """Write `count` to nr_hugepages."""
        self.kernel.knobs.set(FOLDER + "nr_hugepages", count)

    def overcommit(self, count: int) -> None:
        """Write `count` to nr_overcommit_hugepages."""
        self.kernel.knobs.set(FOLDER + "nr_overcommit_hugepages", count)

    def map(self, kind: int, count: int) -> bool:
        """Map `count` pages; False for ENOMEM."""
        flags = FLAGS[kind] | MAP_ANONYMOUS | MAP_HUGETLB
        try:
            address = self.owner.ask(b"m", count * SIZE, flags)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            return False
        self.areas[self.made] = address, count
        self.made += 1
        return True

    def _touch(self, child: Child, number: int, page: int) -> bool:
        address = self.areas[number][0] + page * SIZE
        try:
            child.ask(b"a", address, SIZE, POPULATE_WRITE)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            return False
        frame = child.frames(address, 1)[0]
        if frame is None or frame % FRAMES_A_PAGE:
            raise ValueError(f"a huge page at frame {frame}")
        return True

    def touch(self, number: int, page: int) -> bool:
        """Fault a page in; False where a store would get SIGBUS."""
        return self._touch(self.owner, number, page)

    def discard(self, number: int, page: int) -> None:
        """MADV_DONTNEED."""
        self.owner.ask(b"a", self.areas[number][0] + page * SIZE, SIZE, DONTNEED)

    def unmap(self, number: int) -> None:
        """Unmap a mapping."""
        address, count = self.areas.pop(number)
        self.owner.ask(b"u", address, count * SIZE)

    def child_writes(self, number: int, page: int) -> tuple[bool, tuple[int, ...]]:
        """A forked child writes to a page and exits: whether it could, and the pool meanwhile."""
        child = self.owner.fork()
        try:
            return self._touch(child, number, page), self.pool
        finally:
            child.end()

    def owner_writes(self, number: int, page: int) -> tuple[bool, tuple[int, ...], bool]:
        """With a forked child, the owner writes to a page, then the child does, then it exits."""
        child = self.owner.fork()
        try:
            could, meanwhile = self._touch(self.owner, number, page), self.pool
            return could, meanwhile, could and self._touch(child, number, page)
        finally:
            child.end()
