"""The real machine below a hypervisor: memory, frames, and cores that translate and cache.

A core walks the tables that it is given by the kernels, and keeps what it may: translations, and
entries of the upper levels, until it is told to drop them. It evicts nothing by itself, so what it
would be wrong to rely on stays visible for as long as the architecture lets it.
"""

from collections.abc import Callable, Iterable
from typing import Any

from vapama.impl.kernels import long_mode
from vapama.spec.anatomy import Cached
from vapama.spec.cpu import Cpu

PAGE_WORDS = 512
ACCESSED, DIRTY = 1 << 5, 1 << 6
FRAME = 0x000F_FFFF_FFFF_F000
LIMIT_WORDS = 1 << 49
"""Machine memory ends, for a walk, where MAXPHYADDR does: tables are checked to lie in frames."""


class Ram(dict[int, int]):
    """Machine memory: 8-byte words by index, 0 where nothing was written."""

    __slots__ = ()

    def __missing__(self, index: int) -> int:
        """The word of fresh memory."""
        return 0

    def page(self, frame: int) -> dict[int, int]:
        """The words of a frame that are not 0, by their index in it."""
        base = frame << 9
        return {i: self[base | i] for i in range(PAGE_WORDS) if self.get(base | i)}

    def clear(self, frame: int = 0) -> None:
        """Make every word of a frame 0."""
        base = frame << 9
        for i in range(base, base + PAGE_WORDS):
            if i in self:
                del self[i]

    def copy_page(self, source: int, target: int) -> None:
        """Copy a frame's words to a cleared frame."""
        for i, word in self.page(source).items():
            self[target << 9 | i] = word


class NoFrames(Exception):
    """Machine memory is used up: the plan asks for more than its `frames`."""


class Frames:
    """The frames of machine memory: which are free. The one freed last is given first."""

    __slots__ = ("free_list", "on_free", "ram", "total")

    def __init__(self, ram: Ram, count: int) -> None:
        self.ram, self.total = ram, count
        self.free_list = list(range(count - 1, 0, -1))
        self.on_free: Callable[[int], None] | None = None
        """Told of each frame before it is freed."""

    def take(self) -> int:
        """A frame, whose words are 0. Raises `NoFrames`."""
        if not self.free_list:
            raise NoFrames(f"all {self.total} frames of machine memory are taken")
        return self.free_list.pop()

    def give(self, frame: int) -> None:
        """Free a frame, and clear it."""
        if self.on_free is not None:
            self.on_free(frame)
        self.ram.clear(frame)
        self.free_list.append(frame)


class WithUpper:
    """Memory as a walk sees it that uses cached entries of upper levels where there are any."""

    __slots__ = ("ram", "upper")

    def __init__(self, ram: Ram, upper: dict[int, int]) -> None:
        self.ram, self.upper = ram, upper

    def __getitem__(self, index: int) -> int:
        """The cached entry, or that in memory."""
        entry = self.upper.get(index)
        return self.ram[index] if entry is None else entry


class Core:
    """A processor core that runs a virtual processor on one stage of tables.

    `tlb` holds translations by ``pcid << 54 | page number << 2 | level``, each as what the kernel
    `finish` needs of it; `upper` entries that reference tables, by their index in memory.
    """

    __slots__ = (
        "code_mask",
        "kernels",
        "levels",
        "mode",
        "path",
        "pcid",
        "ram",
        "reserved",
        "root",
        "tlb",
        "upper",
        "view",
        "walks",
    )

    def __init__(self, ram: Ram, kernels: Any = long_mode) -> None:
        self.ram, self.kernels = ram, kernels
        self.tlb: dict[int, tuple[int, int, int, int, int]] = {}
        self.upper: dict[int, int] = {}
        self.view = WithUpper(ram, self.upper)
        self.path = [0] * 6
        self.mode = self.reserved = self.root = self.pcid = 0
        self.levels = 4
        self.code_mask = 0
        self.walks = 0

    def control(self, cpu: Cpu, root: int, pcid: int) -> None:
        """Run under these control registers (CR3's PCID aside), on the tables at `root`."""
        k = self.kernels
        self.mode = k.mode_word(cpu.cr0, cpu.cr4, cpu.efer, cpu.rflags, cpu.page1gb)
        self.reserved = k.reserved_word(cpu.efer, cpu.maxphyaddr)
        self.levels = cpu.levels
        self.root, self.pcid = root, pcid << 54
        self.code_mask = (cpu.nxe | cpu.smep) << 4

    def translate(self, address: int, access: int) -> tuple[int, int]:
        """What becomes of an access: (status, value) as the kernel `walk` has it.

        A translation sets accessed and dirty flags. A fault drops what was cached on its way (SDM
        Vol. 3A, 4.10.4.1), so that the same access made again sees memory as it is.
        """
        tlb, tag = self.tlb, self.pcid
        for level, shift in ((1, 12), (2, 21), (3, 30)):
            key = tag | (address >> shift) << 2 | level
            hit = tlb.get(key)
            if hit is not None:
                if access & 2 and not hit[0] & DIRTY:
                    break  # a write through an entry that is not dirty: the walk sets the flag
                status, value = self._finish(address, access, *hit)
                if status == long_mode.FAULT:
                    self.forget(address)
                return status, value
        return self._walk(address, access)

    def _finish(
        self, address: int, access: int, entry: int, rights: int, nx: int, level: int, shift: int
    ) -> tuple[int, int]:
        code = access & 6 | (access & self.code_mask)
        result: tuple[int, int] = self.kernels.finish(
            self.mode, 0, 0, address, code, access, entry, rights, nx, level, shift
        )
        return result

    def _walk(self, address: int, access: int) -> tuple[int, int]:
        self.walks += 1
        k, path, upper, ram = self.kernels, self.path, self.upper, self.ram
        status, value = k.walk(
            self.view, LIMIT_WORDS, self.mode, self.reserved, self.root, 0, 0, address, access, path
        )
        if status >= long_mode.FAULT:
            if status == long_mode.FAULT:
                self.forget(address)
            return status, value
        rights, no_execute = 6, 0
        for level in range(self.levels, status, -1):
            index = path[level]
            entry = upper.get(index)
            if entry is None:
                entry = upper[index] = ram[index]
            rights &= entry
            no_execute |= entry >> 63
        k.mark(ram, self.levels, status, access >> 1 & 1, path)
        leaf = ram[path[status]]
        shift = 3 + 9 * status
        key = self.pcid | (address >> shift) << 2 | status
        self.tlb[key] = leaf, rights & leaf, no_execute | leaf >> 63, status, shift
        return status, value

    def forget(self, address: int) -> None:
        """INVLPG: drop this address's translations and all entries of upper levels."""
        self.forget_of(self.pcid >> 54, address)

    def forget_of(self, pcid: int, address: int) -> None:
        """Drop an address's translations under a PCID, and all entries of upper levels."""
        for level, shift in ((1, 12), (2, 21), (3, 30)):
            self.tlb.pop(pcid << 54 | (address >> shift) << 2 | level, None)
        self.upper.clear()

    def forget_pcid(self, pcid: int) -> None:
        """Drop all that is cached for a PCID."""
        tag = pcid << 54
        gone = [key for key in self.tlb if key & 0xFFF << 54 == tag]
        for key in gone:
            del self.tlb[key]
        self.upper.clear()

    def forget_all(self) -> None:
        """Drop all that is cached."""
        self.tlb.clear()
        self.upper.clear()

    def cached(self) -> Iterable[Cached]:
        """The translations that it has cached."""
        for key, (entry, rights, no_execute, level, shift) in self.tlb.items():
            address = (key >> 2 & (1 << 52) - 1) << shift & (1 << 64) - 1
            frame = (entry >> 12 & FRAME >> 12) & ~((1 << shift - 12) - 1)
            yield Cached(key >> 54, address, level, frame, rights & 6 | no_execute & 1 ^ 1)
