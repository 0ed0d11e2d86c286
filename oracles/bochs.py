"""Bochs as a machine for our guest: headless, its RAM reached through /proc/PID/mem.

Bochs keeps RAM in blocks, in the order in which they were first touched. The guest leaves a mark in
every block, by which they are found in the memory of the process, which is our own child.
"""

import os
import shutil
import time
from pathlib import Path

import numpy as np

from vapama.oracles.bare_metal import BareMetal
from vapama.oracles.departures import BOCHS, BOCHS_OF_AMD
from vapama.oracles.emulator import CannotStart
from vapama.oracles.machine import HOLE, RAM_BYTES, SERVER, STAMP_TAIL, Machine
from vapama.spec.cpu import PKE

BLOCK = 128 << 10
BLOCKS = frozenset(range(RAM_BYTES // BLOCK)) - {address // BLOCK for address in HOLE[::BLOCK]}
MARK, MARK_AT = 0x5AFE_5AFE, 0x1FFF0
BIOS = Path("/usr/share/bochs")
CONFIGURATION = """\
config_interface: textconfig
display_library: rfb, options="timeout=0"
plugin_ctrl: unmapped=1, biosdev=1, speaker=0, e1000=0, parallel=0, serial=0
romimage: file={bios}/BIOS-bochs-latest
vgaromimage: file={bios}/VGABIOS-lgpl-latest
cpu: model={model}, count=1, ips=200000000, reset_on_triple_fault=0
memory: guest={megabytes}, host={megabytes}
floppya: 1_44=guest.img, status=inserted
boot: floppy
log: bochs.log
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
clock: sync=none
"""


class BochsMachine(Machine):
    """Bochs with a CPU model of its own (`bochs --help cpu` lists them)."""

    name = "bochs"
    avoid = PKE
    """Bochs 2.7 takes PKRU for supervisor pages too, those of our guest's own code among them."""

    def __init__(self, model: str = "tigerlake") -> None:
        self.model = model
        self._memory = -1
        self._blocks: dict[int, int] = {}
        super().__init__()

    def command(self) -> list[str]:
        """Bochs' command line."""
        if shutil.which("bochs") is None:
            raise CannotStart("bochs is not installed (apt install bochs)")
        text = CONFIGURATION.format(bios=BIOS, model=self.model, megabytes=RAM_BYTES >> 20)
        (self.folder / "bochsrc").write_text(text)
        (self.folder / "commands").write_text("c\n")
        return ["bochs", "-q", "-f", "bochsrc", "-rc", "commands"]

    def find_memory(self) -> None:
        """Look for the guest's marks in the memory of the process, until all are there."""
        deadline = time.monotonic() + 60
        found: dict[int, int] = {}
        while not found.keys() >= BLOCKS:
            self.require_starting(deadline)
            time.sleep(0.5)
            found = self._find_blocks()
        self._memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR)
        self._blocks = found
        self.wait_until_ready()

    def end(self) -> None:
        """Stop it for certain."""
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1
        super().end()

    def _find_blocks(self) -> dict[int, int]:
        """Where each block is in the process, by its number."""
        found: dict[int, int] = {}
        try:
            memory = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY)
        except OSError:
            return found
        try:
            for start, size in self._large_mappings():
                found |= _marked_blocks(os.pread(memory, size, start), start)
        except OSError:
            pass
        finally:
            os.close(memory)
        return found

    def _large_mappings(self) -> list[tuple[int, int]]:
        mappings = []
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            span, rights, *_ = line.split()
            start, end = (int(part, 16) for part in span.split("-"))
            if rights.startswith("rw") and RAM_BYTES <= end - start < 4 * RAM_BYTES:
                mappings.append((start, end - start))
        return mappings

    def read(self, address: int, count: int) -> bytes:
        """Bytes of RAM."""
        parts = []
        while count:
            size = min(count, BLOCK - address % BLOCK)
            at = self._blocks[address // BLOCK] + address % BLOCK
            part = os.pread(self._memory, size, at)
            if not part:
                raise OSError("the process has no memory any more")
            parts.append(part)
            address, count = address + size, count - size
        return b"".join(parts)

    def write(self, address: int, data: bytes) -> None:
        """Put bytes into RAM."""
        view = memoryview(data)
        while view:
            size = min(len(view), BLOCK - address % BLOCK)
            at = self._blocks[address // BLOCK] + address % BLOCK
            if os.pwrite(self._memory, view[:size], at) != size:
                raise OSError("the process has no memory any more")
            address, view = address + size, view[size:]


def _marked_blocks(data: bytes, start: int) -> dict[int, int]:
    """Blocks by the marks in a piece of memory that begins at `start`."""
    words = np.frombuffer(data, dtype=np.uint64, count=len(data) // 8)
    tail = np.uint64(0xFFFF_FF00_0000_00FF)
    number = words >> np.uint64(8)
    first = (words & tail == np.uint64(STAMP_TAIL)) & (number & np.uint64(BLOCK // 8 - 1) == 0)
    # One stamp alone may be a constant in the guest's own code.
    first[:-1] &= words[1:] == words[:-1] + np.uint64(1 << 8)
    first[-1:] = False
    found = {}
    for place in np.flatnonzero(first).tolist():
        block = (int(words[place]) >> 8 & 0xFFFF_FFFF) * 8 // BLOCK
        found[block] = start + place * 8
    low = words & np.uint64(0xFFFF_FFFF) == np.uint64(MARK)
    for place in np.flatnonzero(low[:-1]).tolist():
        word = int(words[place])
        if int(words[place + 1]) == word ^ (1 << 64) - 1 and (word >> 32) % BLOCK == MARK_AT:
            address = (word >> 32) - MARK_AT
            if SERVER <= address < RAM_BYTES:
                found[address // BLOCK] = start + place * 8 - MARK_AT
    return found


def bochs(model: str = "tigerlake") -> BareMetal:
    """Bochs as a subject. Raises `CannotStart`."""
    machine = BochsMachine(model)
    return BareMetal(machine, BOCHS_OF_AMD if machine.features.svm else BOCHS)
