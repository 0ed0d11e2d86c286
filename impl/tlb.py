"""A processor with the software TLB: its control state, and the operations on what is cached."""

from collections.abc import Callable
from typing import Any

from vapama.impl.kernels import tlb, tlb_nested
from vapama.spec.cpu import NXE, PAE, PCIDE, PG, SMEP, Cpu
from vapama.spec.memory import Memory
from vapama.spec.stage import Ept, Stage
from vapama.spec.subject import Cached
from vapama.spec.words import Word, ite

PGE = 1 << 7
KEEP = 1 << 63


class Overlay:
    """A memory that is written to, as kernels index it; what was not written is another's."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.limit: Word = memory.limit
        self.written: dict[int, Word] = {}
        self.elsewhere: list[tuple[Word, Word]] = []
        """What was written to addresses that are symbols, which a dict cannot look up."""

    def __getitem__(self, index: int) -> Word:
        """The entry with this index."""
        return self.load(index << 3)

    def load(self, address: Word) -> Word:
        """The entry at `address`."""
        if type(address) is int:
            return self.written[address] if address in self.written else self.memory.load(address)
        value = self.memory.load(address)
        for where, written in self.elsewhere:
            value = ite(address == where, written, value)
        return value

    def write(self, address: Word, value: Word) -> None:
        """Put `value` into the entry at `address`."""
        if type(address) is int:
            self.written[address] = value
        else:
            self.elsewhere.append((address, value))


class Operations:
    """The operations of a processor with a TLB, all but translating.

    The TLB has `sets` sets of `ways` entries, powers of two; its paging-structure caches have a
    quarter of the sets.
    """

    stateful = True

    def __init__(self, cpu: Cpu, vpid: Word, sets: int, ways: int) -> None:
        self.cpu, self.vpid = cpu, vpid
        self.translations = self._cache(sets, ways)
        self.structures = self._cache(max(1, sets >> 2), ways)
        self.path = self._array(6)

    def _cache(self, sets: int, ways: int) -> Any:
        cache = self._array(tlb.HEADER + sets * ways * tlb.WORDS)
        cache[tlb.SETS], cache[tlb.WAYS] = sets - 1, ways
        return cache

    # How kernels are run, and on what

    def _array(self, count: int) -> Any:
        return [0] * count

    def _run(self, kernel: Callable[..., Any], cache: Any, *words: Word) -> Any:
        return kernel(cache, *words)

    def _call(self, kernel: Callable[..., Any], *words: Word) -> Any:
        return kernel(self.translations, self.structures, *words)

    # Operations

    def change(self, cpu: Cpu) -> None:
        """MOV to CR0 or CR4, or a write to another register that translation depends on.

        A change of EFER.NXE drops everything: XD in what is cached would then mean something else.
        """
        before, self.cpu = self.cpu, cpu
        everything = before.cr0 & ~cpu.cr0 & PG | (before.efer ^ cpu.efer) & NXE
        everything = everything | (before.cr4 ^ cpu.cr4) & PGE | before.cr4 & ~cpu.cr4 & PCIDE
        if everything != 0:
            self._call(tlb.drop_vpid, tlb.space_tag(self.vpid, 0), 1)
        elif (before.cr4 ^ cpu.cr4) & PAE | cpu.cr4 & ~before.cr4 & SMEP != 0:
            self._call(tlb.drop_space, self.address_space())

    def mov_cr3(self, operand: Word) -> None:
        """MOV to CR3."""
        self.cpu = self.cpu._replace(cr3=operand & ~KEEP)
        if (operand & KEEP == 0) | (self.cpu.cr4 & PCIDE == 0):
            self._call(tlb.drop_space, self.address_space())

    def invlpg(self, address: Word) -> None:
        """INVLPG."""
        self._call(tlb.invlpg, self.address_space(), address)

    def invpcid(self, kind: int, pcid: Word = 0, address: Word = 0) -> None:
        """INVPCID of a type."""
        self._call(tlb.invpcid, kind, tlb.space_tag(self.vpid, pcid), address)

    def vm_transition(self, cpu: Cpu, vpid: Word = 0) -> None:
        """A VM entry or VM exit."""
        if (vpid == 0) & (self.vpid == 0):
            self._call(tlb.drop_vpid, tlb.space_tag(0, 0), 1)
        self.cpu, self.vpid = cpu, vpid

    def invvpid(self, kind: int, vpid: Word = 0, address: Word = 0) -> None:
        """INVVPID of a type."""
        self._call(tlb.invvpid, kind, vpid, address)

    def address_space(self) -> Word:
        """The tag of what it makes and uses now."""
        pcid = self.cpu.cr3 & 0xFFF & (self.cpu.cr4 >> 17 & 1) * 0xFFF
        return tlb.space_tag(self.vpid, pcid)

    # What is cached

    def put(self, cached: Cached) -> None:
        """Cache this."""
        is_table, level, address, entry, vpid, pcid, is_global = cached
        cache = self.structures if is_table else self.translations
        tag = tlb.space_tag(vpid, pcid) | level << tlb.LEVEL | is_global * tlb.GLOBAL
        self._run(tlb.put, cache, tag, address >> (3 + 9 * level), entry, 0)

    def cached(self) -> list[Cached]:
        """All that is cached."""
        found = []
        for is_table, cache in ((0, self.translations), (1, self.structures)):
            for at in range(tlb.HEADER, len(cache), tlb.WORDS):
                tag, region, entry = cache[at], cache[at + 1], cache[at + 2]
                if tag != 0:
                    level, pcid = tag >> tlb.LEVEL & 7, tag >> tlb.PCID & 0xFFF
                    vpid, is_global = tag >> tlb.VPID & 0xFFFF, tag >> 1 & 1
                    address = region << (3 + 9 * level)
                    found.append(Cached(is_table, level, address, entry, vpid, pcid, is_global))
        return found


class GuestOperations(Operations):
    """Those of a processor that runs a guest on a second stage; its VPID may be an ASID."""

    def __init__(self, cpu: Cpu, stage: Stage, vpid: Word, sets: int, ways: int) -> None:
        super().__init__(cpu, vpid, sets, ways)
        self.stage = stage
        self.physical = self._cache(sets, ways)
        self.paths = self._table(6, 6)
        self.trace = self._array(18)

    def _table(self, rows: int, columns: int) -> Any:
        return [self._array(columns) for _ in range(rows)]

    def enter(self, cpu: Cpu, stage: Stage, vpid: Word = 1, tlb_control: int = 0) -> None:
        """A VM entry (after a VM exit) or VMRUN to a guest with this control state, second stage
        and VPID or ASID.
        """
        if isinstance(stage, Ept):
            self.vm_transition(cpu, vpid)
        self.cpu, self.stage, self.vpid = cpu, stage, vpid
        if tlb_control == 1:
            self._call(tlb.invvpid, 2, 0, 0)
        elif tlb_control:
            self._call(tlb.drop_vpid, tlb.space_tag(vpid, 0), 1 if tlb_control == 3 else 0)
        if tlb_control in (1, 3):
            # What nested page tables say is cached for whatever ASID, so all of it goes.
            self._run(tlb.drop, self.physical, 0, 0, 0, 0)

    def invept(self, kind: int, eptp: Word = 0) -> None:
        """INVEPT of a type."""
        for cache in (self.translations, self.structures, self.physical):
            self._run(tlb_nested.drop_space, cache, kind, eptp)
