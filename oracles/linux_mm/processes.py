"""Processes under test, from the outside: requests to them, and what /proc tells of their pages."""

import contextlib
import errno
import os
import select
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Protocol

from vapama.oracles.linux_mm.child import ANSWER, PAGE, REQUEST, page_of
from vapama.oracles.linux_mm.knobs import Knobs, Unavailable

MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS = 1, 2, 0x20
MAP_NORESERVE, MAP_HUGETLB = 0x4000, 0x40000
DONTNEED, MERGEABLE, UNMERGEABLE, HUGEPAGE, NOHUGEPAGE = 4, 12, 13, 14, 15
POPULATE_WRITE, COLLAPSE = 23, 25
PRESENT, PFN = 1 << 63, (1 << 55) - 1


class Child:
    """A process that does what it is told. Raises `OSError` for what the kernel refuses."""

    def __init__(self, ours: socket.socket, pid: int) -> None:
        self.ours, self.pid = ours, pid
        self.files = {
            name: os.open(f"/proc/{pid}/{name}", os.O_RDONLY)
            for name in ("pagemap", "mem", "ksm_stat")
        }
        self.alive = os.pidfd_open(pid)

    def ask(self, letter: bytes, a: int = 0, b: int = 0, c: int = 0) -> int:
        """Send a request; the value of its answer."""
        self.ours.sendall(REQUEST.pack(letter, a, b, c))
        return self._answer()

    def _answer(self) -> int:
        answer = self.ours.recv(ANSWER.size)
        if len(answer) < ANSWER.size:
            raise ChildProcessError("a process under test ended")
        number, value = ANSWER.unpack(answer)
        if number:
            raise OSError(number, os.strerror(number))
        return int(value)

    def fork(self) -> "Child":
        """A child of the process."""
        ours, theirs = socket.socketpair()
        socket.send_fds(self.ours, [REQUEST.pack(b"f", 0, 0, 0)], [theirs.fileno()])
        theirs.close()
        return Child(ours, self._answer())

    def frames(self, address: int, pages: int) -> list[int | None]:
        """The page frame number of each page; None where there is none."""
        raw = os.pread(self.files["pagemap"], 8 * pages, address // PAGE * 8)
        return [e & PFN if e & PRESENT else None for e in struct.unpack(f"<{pages}Q", raw)]

    def page(self, address: int) -> bytes:
        """The bytes of a page."""
        return os.pread(self.files["mem"], PAGE, address)

    def merging(self) -> tuple[int, int, int]:
        """Items, merged pages and zero pages, of ksm_stat."""
        text = os.pread(self.files["ksm_stat"], 4096, 0).decode().replace(":", "")
        told = dict(line.split()[:2] for line in text.splitlines())
        names = ("ksm_rmap_items", "ksm_merging_pages", "ksm_zero_pages")
        items, merging, zero = (int(told[name]) for name in names)
        return items, merging, zero

    def end(self) -> None:
        """Let the process exit, and wait until it is gone."""
        with contextlib.suppress(OSError):
            self.ours.sendall(REQUEST.pack(b"x", 0, 0, 0))
        poll = select.poll()
        poll.register(self.alive, select.POLLIN)
        poll.poll(5000)
        for file in (*self.files.values(), self.alive):
            os.close(file)
        self.ours.close()


def template() -> tuple[subprocess.Popen[bytes], Child]:
    """A small process to fork those under test from. Raises `Unavailable`."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-I", str(Path(__file__).with_name("child.py"))]
    process = subprocess.Popen(
        [*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
    )
    theirs.close()
    child = Child(ours, process.pid)
    address = child.ask(b"m", PAGE, MAP_PRIVATE | MAP_ANONYMOUS)
    child.ask(b"r", address)
    if not child.frames(address, 1)[0]:
        raise Unavailable("the kernel hides page frame numbers (CAP_SYS_ADMIN is needed)")
    return process, child


def content_of(page: bytes, salt: int) -> int:
    """The content that a page was written with; -1 if it is none that was written."""
    content = struct.unpack("<QQ", page[:16])[1] if any(page[:16]) else 0
    return content if page == page_of(content, salt) else -1


REFUSALS = (errno.ENOMEM, errno.EFAULT)


class Program(Protocol):
    """What runs on the kernel."""

    def end(self) -> None:
        """End its processes."""


class Kernel:
    """The running kernel, which runs one program at a time in processes under test.

    Nothing of it is touched before the first program: who only asks what the subject can do leaves
    the kernel alone.
    """

    first: tuple[tuple[str, str], ...] = ()
    """What is written before any knob is restored."""
    knobs: Knobs
    process: "subprocess.Popen[bytes]"
    parent: Child

    def __init__(self) -> None:
        if os.geteuid() != 0:
            raise Unavailable("it takes root: page frame numbers and the knobs are root's")
        self.running: Program | None = None
        self.started = False

    def begin(self) -> None:
        """Take the knobs, the first time; end what ran before. Raises `Unavailable`."""
        if not self.started:
            self.knobs = Knobs(first=self.first)
            self.process, self.parent = template()
            self.started = True
            self.set_up()
        if self.running is not None:
            self.running.end()

    def set_up(self) -> None:
        """What the subject needs before its first program."""

    def close(self) -> None:
        """End all processes and restore the knobs."""
        if not self.started:
            return
        self.started = False
        if self.running is not None:
            self.running.end()
        self.parent.end()
        self.process.wait()
        self.knobs.close()
