"""The real machine below a hypervisor: memory, frames, and cores that translate and cache.

A core walks the tables that it is given by the kernels, and keeps what it may: translations, and
entries of the upper levels, until it is told to drop them. It evicts nothing by itself, so what it
would be wrong to rely on stays visible for as long as the architecture lets it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from vapama.impl.kernels import ept, legacy, long_mode, npt
from vapama.spec.anatomy import Cached
from vapama.spec.cpu import Cpu

Thing = TypeVar("Thing")
PAGE_WORDS = 512
ACCESSED, DIRTY = 1 << 5, 1 << 6
FRAME = 0x000F_FFFF_FFFF_F000
# How a processor reads its tables: by the rules of 4-level and 5-level paging, of PAE paging, of
# 32-bit paging without and with 4-MByte pages, or not at all, with paging off.
LONG_MODE, PAE_PAGING, PAGING_32, PAGING_32_PSE, OFF = range(5)
SHORT_ENTRIES = (PAGING_32, PAGING_32_PSE)
"""Where entries have 4 bytes."""
LIMIT_WORDS = 1 << 49
"""Machine memory ends, for a walk, where MAXPHYADDR does: tables are checked to lie in frames."""


def shallow(thing: Thing) -> Thing:
    """Another with the same attributes. Who calls it gives it its own of those that change."""
    twin = object.__new__(type(thing))
    twin.__dict__.update(thing.__dict__)
    return twin


class Ram(dict[int, int]):
    """Machine memory: 8-byte words by index, 0 where nothing was written."""

    __slots__ = ()

    def __missing__(self, index: int) -> int:
        """The word of fresh memory."""
        return 0

    def within(self, frame: int) -> set[int]:
        """The indices of a frame's words that are not 0, and of some that are."""
        return self.keys() & range(frame << 9, frame + 1 << 9)

    def page(self, frame: int) -> dict[int, int]:
        """The words of a frame that are not 0, by their index in it."""
        return {i & PAGE_WORDS - 1: self[i] for i in self.within(frame) if self[i]}

    def clear(self, frame: int = 0) -> None:
        """Make every word of a frame 0."""
        for i in self.within(frame):
            del self[i]

    def copy_page(self, source: int, target: int) -> None:
        """Copy a frame's words to a cleared frame."""
        for i, word in self.page(source).items():
            self[target << 9 | i] = word


def paging_of(cpu: Cpu) -> int:
    """How a processor with these control registers reads its tables."""
    if not cpu.cr0 >> 31 & 1:
        return OFF
    if cpu.efer >> 8 & 1:
        return LONG_MODE
    if cpu.cr4 >> 5 & 1:
        return PAE_PAGING
    return PAGING_32 + (cpu.cr4 >> 4 & 1)


@lru_cache(maxsize=1 << 12)
def controls(cpu: Cpu) -> tuple[int, int, int, int]:
    """How a processor reads its tables, the mode word and the reserved bits that the kernels of
    that take, and how many levels the tables have, PDPTEs of PAE paging not counted.
    """
    paging = paging_of(cpu)
    if paging == LONG_MODE:
        mode = long_mode.mode_word(cpu.cr0, cpu.cr4, cpu.efer, cpu.rflags, cpu.page1gb)
        reserved = long_mode.reserved_word(cpu.efer, cpu.maxphyaddr)
        return paging, mode, reserved, 4 + (cpu.cr4 >> 12 & 1)
    registers = 0 if cpu.pdptes is None else 1
    mode = legacy.mode_word(cpu.cr0, cpu.cr4, cpu.efer, cpu.rflags, registers)
    reserved = legacy.reserved_word(cpu.cr4, cpu.efer, cpu.maxphyaddr, cpu.pse36)
    return paging, mode, reserved, 0 if paging == OFF else 2


class NoFrames(Exception):
    """Machine memory is used up: the plan asks for more than its `frames`."""


class Frames:
    """The frames of machine memory: which are free. The one freed last is given first."""

    def __init__(self, ram: Ram, count: int) -> None:
        self.ram, self.total = ram, count
        self.free_list = list(range(count - 1, 0, -1))
        self.on_free: Callable[[int], None] | None = None
        """Told of each frame before it is freed."""

    def clone(self, ram: Ram) -> "Frames":
        """The same of another memory; nobody is told."""
        twin = shallow(self)
        twin.ram, twin.free_list, twin.on_free = ram, self.free_list.copy(), None
        return twin

    def take(self) -> int:
        """A frame, whose words are 0. Raises `NoFrames`."""
        if not self.free_list:
            raise NoFrames(f"all {self.total} frames of machine memory are taken")
        return self.free_list.pop()

    def take_run(self, count: int) -> int | None:
        """The first of `count` frames in a row, aligned to their number; None if there are none."""
        free = set(self.free_list)
        for first in range((self.total - count) // count * count, 0, -count):
            run = range(first, first + count)
            if free.issuperset(run):
                taken = set(run)
                self.free_list = [frame for frame in self.free_list if frame not in taken]
                return first
        return None

    def give(self, frame: int, places: Collection[int] | None = None) -> None:
        """Free a frame, and clear it: its words are at `places`, if it is known where."""
        if self.on_free is not None:
            self.on_free(frame)
        if places is None:
            self.ram.clear(frame)
        else:
            for place in places:
                self.ram.pop(place, None)
        self.free_list.append(frame)

    def give_blank(self, frames: Sequence[int]) -> None:
        """Free frames in which nothing was ever written."""
        if self.on_free is not None:
            for frame in frames:
                self.on_free(frame)
        self.free_list += frames

    def move(self, first: int, to: int, count: int) -> None:
        """Move the words of a run of frames, beside those that are taken and given one by one."""
        if self.on_free is not None:
            self.on_free(first)
        ram, run = self.ram, range(first << 9, first + count << 9)
        shift = to - first << 9
        for index in [index for index in ram if index in run]:
            ram[index + shift] = ram.pop(index)


Upper = dict[tuple[int, int], tuple[int, int]]
"""Cached entries that lead to tables: by PCID and level together and the address's bits above, the
index and the entry."""


class Caching:
    """Memory as a walk reads it that uses cached entries of upper levels where there are any.

    A walk reads one entry a level, from the top.
    """

    def __init__(self, memory: Any, upper: Upper) -> None:
        self.memory, self.upper = memory, upper
        self.read = [0] * 6
        """The entries of the last walk, by level."""
        self.address = self.level = self.tag = 0

    def clone(self, memory: Any, upper: Upper) -> "Caching":
        """The same of another memory, with a cache of its own."""
        twin = shallow(self)
        twin.memory, twin.upper, twin.read = memory, upper, self.read.copy()
        return twin

    def start(self, tag: int, address: int, levels: int) -> None:
        """A walk for an address begins."""
        self.tag, self.address, self.level = tag, address, levels

    def __getitem__(self, index: int) -> int:
        """The cached entry, or that in memory."""
        level = self.level
        self.level = level - 1
        hit = None
        if level > 1:
            hit = self.upper.get((self.tag | level, self.address >> 3 + 9 * level))
        entry: int = self.memory[index] if hit is None else hit[1]
        self.read[level] = entry
        return entry

    def keep(self, level: int, index: int) -> int:
        """Cache the entry of the last walk at a level, if it is not cached; returns it."""
        key = self.tag | level, self.address >> 3 + 9 * level
        return self.upper.setdefault(key, (index, self.read[level]))[1]


class SecondStageUpper(dict[int, int]):
    """Cached entries of a second stage that lead to tables, by index: an entry has one place in
    machine memory. What is not cached a walk reads there.
    """

    __slots__ = ("ram",)

    def __init__(self, ram: Ram, cached: Mapping[int, int]) -> None:
        super().__init__(cached)
        self.ram = ram

    def __missing__(self, index: int) -> int:
        """The entry in memory."""
        return self.ram[index]


class Core:
    """A processor core that runs a virtual processor on one stage of tables.

    `tlb` holds translations by ``pcid << 54 | page number << 2 | level``, each as what the kernel
    `finish` needs of it; `upper` the entries of upper levels on the way.
    """

    def __init__(self, ram: Ram) -> None:
        self.ram = ram
        self.tlb: dict[int, tuple[int, int, int, int, int]] = {}
        self.upper: Upper = {}
        self.view = Caching(ram, self.upper)
        self.path = [0] * 6
        self.mode = self.reserved = self.root = self.pcid = self.pkru = self.pkrs = 0
        self.levels, self.paging = 4, LONG_MODE
        self.pdptes: Sequence[int] | None = None
        self.code_mask = 0
        self.walks = 0

    def clone(self, ram: Ram) -> "Core":
        """The same on another memory."""
        twin = shallow(self)
        twin.ram, twin.tlb, twin.upper = ram, self.tlb.copy(), self.upper.copy()
        twin.view, twin.path = self.view.clone(ram, twin.upper), self.path.copy()
        return twin

    def control(self, cpu: Cpu, root: int, pcid: int) -> None:
        """Run under these control registers (CR3's PCID aside), on the tables at `root`."""
        self.paging, self.mode, self.reserved, self.levels = controls(cpu)
        self.pdptes = cpu.pdptes
        self.root, self.pcid = root, pcid << 54
        self.code_mask = (cpu.nxe & cpu.cr4 >> 5 & 1 | cpu.smep) << 4

    def _tables(self, address: int, access: int, path: list[int]) -> tuple[int, int]:
        """The walk of its tables, through what is cached of their upper levels."""
        view, levels = self.view, self.levels
        if self.paging == LONG_MODE:
            view.start(self.pcid, address, levels)
            return long_mode.walk(
                view,
                LIMIT_WORDS,
                self.mode,
                self.reserved,
                self.root,
                self.pkru,
                self.pkrs,
                address,
                access,
                path,
            )
        pdptes = self.pdptes
        if self.paging == PAE_PAGING and pdptes is None:
            levels += 1  # the PDPTE is read from memory
        view.start(self.pcid, address, levels)
        return legacy.walk(
            view,
            LIMIT_WORDS,
            self.mode,
            self.reserved,
            self.root,
            pdptes or (),
            address,
            access,
            path,
        )

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
        result: tuple[int, int] = long_mode.finish(
            self.mode, 0, 0, address, code, access, entry, rights, nx, level, shift
        )
        return result

    def _walk(self, address: int, access: int) -> tuple[int, int]:
        self.walks += 1
        path, view, ram = self.path, self.view, self.ram
        status, value = self._tables(address, access, path)
        if status >= long_mode.FAULT:
            if status == long_mode.FAULT:
                self.forget(address)
            return status, value
        rights, no_execute = 6, 0
        for level in range(self.levels, status, -1):
            entry = view.keep(level, path[level])
            rights &= entry
            no_execute |= entry >> 63
        long_mode.mark(ram, self.levels, status, access >> 1 & 1, path)
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

    def upper_entries(self) -> Iterable[tuple[int, int]]:
        """The entries of upper levels that it has cached, by index."""
        return self.upper.values()

    def cached(self) -> Iterable[Cached]:
        """The translations that it has cached."""
        for key, (entry, rights, no_execute, level, shift) in self.tlb.items():
            address = (key >> 2 & (1 << 52) - 1) << shift & (1 << 64) - 1
            frame = (entry >> 12 & FRAME >> 12) & ~((1 << shift - 12) - 1)
            yield Cached(key >> 54, address, level, frame, rights & 6 | no_execute & 1 ^ 1)


class LeftGuest(Exception):
    """The second stage did not let a guest-physical access pass."""


class TwoStageCore(Core):
    """A core that runs a virtual processor on two stages: the guest's own tables, and those of the
    hypervisor (`stage`, the kernels of EPT or NPT) for every guest-physical address on the way.

    A cached translation is of a linear address to a machine page of 4 KBytes, with what the guest's
    entry says and which rights the second stage gives.
    """

    LEAVES = 16
    """The status of an access that the second stage did not let pass: `gpa` and `stage_access` tell
    which it was, `stage_value` what the stage's kernel said."""

    def __init__(self, ram: Ram, stage: Any, mode: int, reserved: int, levels: int) -> None:
        super().__init__(ram)
        self.stage_levels = levels
        self.stage, self.stage_mode, self.stage_reserved = stage, mode, reserved
        self.stage_root = self.gpa = self.stage_access = self.stage_value = 0
        self.stage_level = 1
        """The level of the second stage's leaf that was used last."""
        self.guest_path = [0] * 6
        self.view = Caching(self, self.upper)
        self.stage_upper = SecondStageUpper(ram, {})
        self.places: dict[int, int] = {}
        """Where in machine memory the guest's entries are, by index, on the last walk."""
        self.combined: dict[int, tuple[int, int]] = {}
        """Machine frame and second-stage entry of each translation in `tlb`."""

    def clone(self, ram: Ram) -> "TwoStageCore":
        """The same on another memory."""
        twin = super().clone(ram)
        assert isinstance(twin, TwoStageCore)
        twin.view.memory = twin
        twin.guest_path = self.guest_path.copy()
        twin.stage_upper = SecondStageUpper(ram, self.stage_upper)
        twin.places, twin.combined = self.places.copy(), self.combined.copy()
        return twin

    def __getitem__(self, index: int) -> int:
        """The guest's word with this index, as a walk of its tables reads it."""
        place = self.places[index] = self._second(index << 3, TABLE) >> 3
        return self.ram[place]

    def _second(self, gpa: int, access: int) -> int:
        """The machine address of a guest-physical one. Raises `LeftGuest`."""
        stage, path, upper = self.stage, self.path, self.stage_upper
        status, value = stage.walk_and_mark(
            upper,
            self.ram,
            LIMIT_WORDS,
            self.stage_mode,
            self.stage_reserved,
            self.stage_root,
            gpa,
            access,
            path,
        )
        if status > 3:
            self.gpa, self.stage_access, self.stage_value = gpa, access, value
            raise LeftGuest
        for level in range(self.stage_levels, status, -1):
            index = path[level]
            if index not in upper:
                upper[index] = self.ram[index]
        self.stage_level = status
        return int(value)

    def translate(self, address: int, access: int) -> tuple[int, int]:
        """What becomes of an access: (status, value) as `Core` has it, or `LEAVES`."""
        key = self.pcid | (address >> 12) << 2 | 1
        hit = self.tlb.get(key)
        if hit is not None:
            frame, last = self.combined[key]
            status, value = 1, 0
            if self.paging != OFF:
                status, value = self._finish(address, access, *hit)
            if status == long_mode.FAULT:
                self.forget(address)
                return status, value
            if status > 3 or self._serves(access, hit[0], last):
                return status, frame << 12 | address & 0xFFF
        try:
            return self._walk(address, access)
        except LeftGuest:
            return self.LEAVES, self.gpa

    def _serves(self, access: int, entry: int, last: int) -> bool:
        """Whether a cached translation has what the access needs, dirty flags included."""
        nested = self.stage is npt
        if access & 2:
            dirty = DIRTY if nested else 1 << 9 if self.stage_mode >> ept.MODE_AD & 1 else 0
            return bool(entry & DIRTY and last & 2) and last & dirty == dirty
        if access & 16:
            return not last >> 63 if nested else bool(last & 4)
        return True

    def _finish(
        self, address: int, access: int, entry: int, rights: int, nx: int, level: int, shift: int
    ) -> tuple[int, int]:
        code = access & 6 | (access & self.code_mask)
        return long_mode.finish(
            self.mode,
            self.pkru,
            self.pkrs,
            address,
            code,
            access,
            entry,
            rights,
            nx,
            level,
            shift,
        )

    def _walk(self, address: int, access: int) -> tuple[int, int]:
        self.walks += 1
        # THE GUEST'S TABLES
        guest_path, view = self.guest_path, self.view
        status, gpa = self._tables(address, access, guest_path)
        if status > 3:
            if status == long_mode.FAULT:
                self.forget(address)
            return status, gpa

        # THE PAGE
        value = self._second(gpa, access & 0x12)
        last = self.ram[self.path[self.stage_level]]

        # THE GUEST'S FLAGS
        rights, no_execute, entry = 6, 0, ACCESSED | DIRTY
        short = self.paging in SHORT_ENTRIES
        for level in range(self.levels, max(status, 1) - 1, -1):
            index, half = guest_path[level], 0
            if short:
                index, half = index >> 1, (index & 1) << 5
            entry = view.read[level]
            need = (ACCESSED | (DIRTY if level == status and access & 2 else 0)) << half
            if entry & need != need:
                place = self._second(index << 3, TABLE | 2) >> 3
                self.ram[place] |= need
                entry |= need
                view.read[level] = entry
            if level > status:
                view.keep(level, self.places.get(index, 0))
            if short:
                entry = entry >> half & 0xFFFF_FFFF
            rights &= entry
            no_execute |= entry >> 63
        key = self.pcid | (address >> 12) << 2 | 1
        shift = 3 + 9 * status + (1 if short and status == 2 else 0)
        self.tlb[key] = entry, rights, no_execute, status, max(shift, 12)
        self.combined[key] = value >> 12, last
        return status, value

    def forget_of(self, pcid: int, address: int) -> None:
        """Drop an address's translations under a PCID, and all entries of upper levels: of a large
        page of the guest's all parts (SDM Vol. 3A, 4.10.4.1).
        """
        self.tlb = {
            key: hit
            for key, hit in self.tlb.items()
            if key >> 54 != pcid or (((key >> 2 << 12) ^ address) & (1 << 64) - 1) >> hit[4]
        }
        self.upper.clear()
        self.stage_upper.clear()

    def forget_all(self) -> None:
        """Drop all that is cached."""
        super().forget_all()
        self.stage_upper.clear()

    def upper_entries(self) -> Iterable[tuple[int, int]]:
        """The entries of upper levels that it has cached, by index; of both stages."""
        yield from self.upper.values()
        yield from self.stage_upper.items()

    def cached(self) -> Iterable[Cached]:
        """The second stage's part of the translations cached: by the guest frame's place."""
        for key, (frame, last) in self.combined.items():
            if key in self.tlb:
                nested = self.stage is npt
                execute = last >> 63 ^ 1 if nested else last >> 2 & 1
                address = (key >> 2 & (1 << 52) - 1) << 12
                yield Cached(key >> 54, address, 1, frame, last & 2 | 4 | execute)


TABLE = 8
"""A second stage's access to a guest's table, as its kernels take it."""
