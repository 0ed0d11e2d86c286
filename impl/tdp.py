"""Two-dimensional paging: second-stage tables (EPT, NPT) that real processors walk by themselves.

In the manner of Linux KVM's TDP MMU (arch/x86/kvm/mmu/tdp_mmu.c). A guest's processors share one
root. Its tables are linear in the guest's memory; an entry is made when an access to its guest
frame first leaves the guest. The guest's own tables, CR3 and INVLPG concern the hypervisor only
when it has to emulate.

Writes are logged by write protection with NPT, and with EPT by the dirty flags of its entries. All
is zapped lazily: processors go to a new root as they next enter the guest, and when the last has
left the old tables they are freed. A slot that goes is zapped eagerly, entry by entry.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Self

from vapama.impl.guest import EMULATE, FLUSH, RELOAD, Guest, NotRam, SlotState, Vcpu, reflected
from vapama.impl.hardware import TABLE, TwoStageCore, shallow
from vapama.impl.hugepages import split
from vapama.impl.kernels import ept, npt
from vapama.impl.mmu import (
    ACCESSED,
    ALL,
    DIRTY,
    FRAME,
    LARGE,
    NX,
    PRESENT,
    USER,
    WRITABLE,
    Context,
    Mmu,
    pcid,
)
from vapama.impl.shadow import DIRECT, Page, role_view
from vapama.spec.anatomy import Anatomy, ProcessorView
from vapama.spec.cpu import Cpu
from vapama.spec.steps import EPT, Seen

LINEAR = ALL << 4 | DIRECT
EPT_READ, EPT_WRITE, EPT_EXECUTE, WRITE_BACK = 1, 2, 4, 6 << 3
EPT_ACCESSED, EPT_DIRTY = 1 << 8, 1 << 9
CAPABILITIES = 1 << 6 | 1 << 7 | 1 << 14 | 1 << 16 | 1 << 17 | 1 << 21
DEVICE_GFN, DEVICE_GENERATION = (1 << 39) - 1, (1 << 11) - 1


class Format:
    """The bits of a design's entries: `table` for one that leads to a table, `leaf` for one that
    maps a page to read and execute, `device` for one that always faults.
    """

    __slots__ = (
        "code",
        "device",
        "device_mask",
        "dirty",
        "kernels",
        "leaf",
        "present",
        "table",
        "write",
    )

    def __init__(self, design: str) -> None:
        if design == EPT:
            self.kernels: Any = ept
            self.present, self.write, self.dirty = 7, EPT_WRITE, EPT_DIRTY
            self.code = EPT_EXECUTE
            self.table = EPT_READ | EPT_WRITE | EPT_EXECUTE | EPT_ACCESSED
            self.leaf = EPT_READ | EPT_EXECUTE | WRITE_BACK | EPT_ACCESSED
            # Not to be read and yet to be written is a misconfiguration.
            self.device, self.device_mask = EPT_WRITE | EPT_EXECUTE, 7
        else:
            self.kernels = npt
            self.present, self.write, self.dirty = PRESENT, WRITABLE, DIRTY
            self.code = NX
            self.table = PRESENT | WRITABLE | USER | ACCESSED
            self.leaf = PRESENT | USER | ACCESSED
            self.device = self.device_mask = PRESENT | 1 << 51

    def no_code(self, entry: int) -> int:
        """A leaf from which no code is fetched."""
        return entry ^ self.code


class TwoDimensional(Mmu):
    """The second-stage tables of one guest."""

    def __init__(self, guest: Guest) -> None:
        super().__init__(guest)
        self.format = Format(guest.plan.design)
        self.levels = guest.plan.stage_levels
        self.eptp = 6 | (self.levels - 1) << 3 | 1 << 6
        """Of EPTP besides the root: write-back, the number of levels, accessed and dirty flags."""
        self.logs_by_flags = guest.plan.design == EPT
        self.pages: dict[int, Page] = {}
        self.dying: dict[int, Page] = {}
        """Tables of roots that were zapped, until no processor can be on them."""
        self.root = self._new_table(0, self.levels)

    def clone(self, guest: Guest) -> Self:
        """The same for a guest that is a clone too, with contexts for its processors."""
        twin = super().clone(guest)
        twins = Page.clones(self.pages.values(), self.dying.values())
        twin.pages = {frame: twins[frame] for frame in self.pages}
        twin.dying = {frame: twins[frame] for frame in self.dying}
        twin.root = twins[self.root.frame]
        for vcpu in guest.vcpus:
            vcpu.context = shallow(vcpu.context)
        return twin

    # Processors.

    def new_core(self) -> TwoStageCore:
        """A core for a virtual processor."""
        width = self.guest.plan.host_maxphyaddr
        if self.guest.plan.design == EPT:
            mode, reserved = ept.mode_word(self.eptp, 0, CAPABILITIES), ept.reserved_word(width)
        else:
            mode = npt.mode_word(1 << 5 | (self.levels - 4) << 12, 1 << 8 | 1 << 10 | 1 << 11, 1)
            reserved = npt.reserved_word(mode, width)
        return TwoStageCore(self.ram, self.format.kernels, mode, reserved, self.levels)

    def power_on(self, vcpu: Vcpu) -> None:
        """Prepare a processor's context."""
        vcpu.context = Context()
        self._controls(vcpu)

    def _controls(self, vcpu: Vcpu) -> None:
        cpu, core = vcpu.cpu, vcpu.core
        vcpu.context.controls(cpu)
        core.control(cpu, cpu.cr3, pcid(cpu))
        core.pkru, core.pkrs = cpu.pkru, cpu.pkrs

    def enter(self, vcpu: Vcpu) -> None:
        """Do what was asked of a processor before it runs the guest on."""
        if vcpu.requests & RELOAD:
            vcpu.core.stage_root = self.root.frame << 12 | (self.eptp if self.logs_by_flags else 0)
            vcpu.device_page = None
        if vcpu.requests & (RELOAD | FLUSH):
            vcpu.core.forget_all()
        vcpu.requests = 0
        if self.dying and not any(other.requests & RELOAD for other in self.guest.vcpus):
            for frame in self.dying:
                self.frames.give(frame)
            self.dying.clear()

    def moved(self, vcpu: Vcpu, register: str, old: Cpu, new: Cpu, keep: bool) -> None:
        """A control register was written: the processor itself drops what it must (SDM Vol. 3A,
        4.10.4.1); the hypervisor learns of it.
        """
        self._controls(vcpu)
        core, changed = vcpu.core, old.cr4 ^ new.cr4
        if register != "rflags":
            vcpu.device_page = None
        if register == "cr3" and not keep:
            core.forget_pcid(pcid(new))
        if register == "efer" or changed & 1 << 4:
            # No manual says so of EFER.NXE and CR4.PSE. What may be cached is specified as the
            # control registers of now have it, so this core relies on no more.
            core.forget_all()
        # What is cached with paging off is of the second stage alone, and no use with paging on.
        if changed & 1 << 7 or old.cr4 & ~new.cr4 & 1 << 17 or (old.cr0 ^ new.cr0) & 1 << 31:
            core.forget_all()
        if changed & 1 << 5 or new.cr4 & ~old.cr4 & 1 << 20:
            core.forget_pcid(pcid(new))

    def invlpg(self, vcpu: Vcpu, address: int) -> None:
        """INVLPG, which does not leave the guest."""
        vcpu.core.forget(address)

    def invpcid(self, vcpu: Vcpu, kind: int, of: int, address: int) -> None:
        """INVPCID, which does not leave the guest either; see `steps.Invpcid`."""
        if kind >= 2:
            vcpu.core.forget_all()
        elif kind == 1:
            vcpu.core.forget_pcid(of)
        else:
            vcpu.core.forget_of(of, address)

    # The fault path.

    def fault(
        self, vcpu: Vcpu, address: int, word: int, status: int, value: int
    ) -> Seen | str | None:
        """An access that the core could not translate: what the guest sees of it, `EMULATE`, or
        None for one to be made again. Raises `NotRam`.
        """
        core = vcpu.core
        if status != TwoStageCore.LEAVES:
            return reflected(status, value, address)
        gpa, access, guest = core.gpa, core.stage_access, self.guest
        gfn, of_table = gpa >> 12, access & TABLE
        slot = guest.slot_of(gfn)
        if slot is None:
            if of_table:
                raise NotRam(gpa & ~7)
            self._set_device(gfn)
            return EMULATE
        # With accessed and dirty flags, and with NPT always, a walk writes to the guest's tables.
        write = access & (2 | TABLE) != 0
        if slot.readonly and write:
            return EMULATE
        frame, writable = guest.frame_of(slot, gfn, write)
        level = guest.level_of(slot, gfn, 3, access >> 4 & 1)
        writable = writable and (write or self.logs_by_flags or not slot.log)
        self._map(gfn, level, frame, writable)
        if write and not self.logs_by_flags:
            guest.mark_dirty(slot, gfn)
        return None

    def _map(self, gfn: int, level: int, frame: int, writable: bool) -> None:
        """Make the leaf of a guest frame, or with level 2 or 3 of the 2 MBytes or the GByte around
        it.
        """
        index = self._entry(gfn, level)
        entry = self.format.leaf | frame << 12
        if level > 1:
            if self.ram[index] and not self.ram[index] & LARGE:
                if self.guest.plan.multihit:
                    self._map(gfn, level - 1, frame, writable)  # code was fetched from here
                    return
                self._drop_table(index)
            first = frame & -(1 << 9 * (level - 1))
            entry = self.format.leaf | LARGE | first << 12
            if self.guest.plan.multihit:
                entry = self.format.no_code(entry)
        old = self.ram[index]
        if writable:
            entry |= self.format.write
        same = old & FRAME == entry & FRAME and not self._is_device(old)
        if old and same:
            entry |= old & self.format.dirty
        elif old:
            self._drop(index, gfn)
        self.ram[index] = entry
        if old and old & ~entry & (self.format.write | self.format.present):
            self.guest.flush()

    def _is_device(self, entry: int) -> bool:
        return entry & self.format.device_mask == self.format.device

    def _set_device(self, gfn: int) -> None:
        """Have accesses to a device's page fault at once, as long as this is the generation."""
        index = self._entry(gfn)
        if self.ram[index] and not self._is_device(self.ram[index]):
            self._drop(index, gfn)
            self.guest.flush()
        self.ram[index] = self.format.device | gfn << 12 | self.guest.generation << 52

    def _leaf(self, gfn: int) -> int | None:
        """The index of the entry that maps a guest frame, a large one or not, or would; None if
        there is no table for it.
        """
        page = self.root
        while True:
            index = page.base | gfn >> 9 * (page.level - 1) & 511
            entry = self.ram[index]
            if page.level == 1 or entry & LARGE:
                return index
            if not entry:
                return None
            page = self.pages[entry >> 12 & FRAME >> 12]

    def _entry(self, gfn: int, level: int = 1) -> int:
        """The index of a guest frame's entry at a level, with the tables that lead to it: they are
        made, and large pages above it split.
        """
        page = self.root
        while True:
            span = 9 * (page.level - 1)
            index = page.base | gfn >> span & 511
            if page.level == level:
                return index
            entry = self.ram[index]
            if not entry or entry & LARGE:
                child = self._new_table(gfn >> span << span, page.level - 1)
                child.parents[index] = page
                if entry:
                    frame, bits = child.frame, self.format.table
                    split(self.ram, index, page.level, frame, bits, self.guest.flush)
                else:
                    self.ram[index] = child.frame << 12 | self.format.table
            page = self.pages[self.ram[index] >> 12 & FRAME >> 12]

    def _drop_table(self, index: int) -> None:
        """Free the table of smaller pages that an entry leads to, in whose place a large one goes,
        and those below it.
        """
        page = self.pages.pop(self.ram.pop(index) >> 12 & FRAME >> 12)
        for at in list(self._used(page)):
            if page.level > 1 and not self.ram[at] & LARGE:
                self._drop_table(at)
            elif page.level == 1:
                self._account(page.gfn + (at & 511), self.ram[at])
        self.guest.flush()
        self.frames.give(page.frame)

    def _new_table(self, gfn: int, level: int) -> Page:
        page = Page(self.frames.take(), gfn, level | LINEAR)
        self.pages[page.frame] = page
        return page

    def _drop(self, index: int, gfn: int) -> None:
        """Clear a leaf, and account for what was written through it.

        For a large one there is nothing to do: no page of it has a copy aside or is logged.
        """
        entry = self.ram.pop(index, 0)
        if not self._is_device(entry) and not entry & LARGE:
            self._account(gfn, entry)

    def _account(self, gfn: int, entry: int) -> None:
        slot = self.guest.slot_of(gfn)
        if entry & self.format.dirty and slot is not None:
            self.guest.backing.written(slot.page + gfn - slot.gfn)
            if self.logs_by_flags:
                self.guest.mark_dirty(slot, gfn)

    # What the VMM asks for.

    def written(self, gpa: int, size: int) -> None:
        """The hypervisor stored to the guest's memory for it: tables there are the hardware's."""

    def mapped_in(self, gfns: range) -> set[int]:
        """Guest frames, of these, whose entries together map all of these that are mapped."""
        return {max(gfn, gfns.start) for _, gfn, _ in self._leaves(gfns)}

    def _leaves(self, gfns: range) -> list[tuple[int, int, int]]:
        """The entries that map any of these guest frames: index, first guest frame, level."""
        found = []
        for page in self.pages.values():
            shift = 9 * (page.level - 1)
            first = max(gfns.start - page.gfn >> shift, 0)
            last = min(gfns.stop - 1 - page.gfn >> shift, 511)
            for place in range(first, last + 1):
                entry = self.ram.get(page.base | place, 0)
                if entry and (page.level == 1 or entry & LARGE):
                    found.append((page.base | place, page.gfn + (place << shift), page.level))
        return found

    def revoke(self, gfn: int) -> None:
        """The host takes a guest frame's page away: no entry may map it any more."""
        index = self._leaf(gfn)
        if index is not None and self.ram[index]:
            self._drop(index, gfn)
            self.guest.flush()

    def protect_slot(self, slot: SlotState) -> None:
        """Start to watch a slot for writes. A large leaf takes none from now on: the first write to
        a page of it splits it.
        """
        self._watch((index, gfn) for index, gfn, _ in self._leaves(range(slot.gfn, slot.end)))

    def watch_again(self, slot: SlotState, gfns: frozenset[int]) -> None:
        """Watch guest frames for writes that were found written."""
        self._watch((index, gfn) for gfn in gfns if (index := self._leaf(gfn)) is not None)

    def _watch(self, leaves: Iterable[tuple[int, int]]) -> None:
        """Have writes through these entries, for these guest frames, show."""
        flush = False
        for index, gfn in leaves:
            entry = self.ram[index]
            by_flag = self.logs_by_flags and not entry & LARGE
            bit = self.format.dirty if by_flag else self.format.write
            if self._is_device(entry) or not entry & bit:
                continue
            slot = self.guest.slot_of(gfn)
            if entry & self.format.dirty and slot is not None:
                self.guest.backing.written(slot.page + gfn - slot.gfn)
            self.ram[index] = entry & ~(bit | self.format.dirty)
            flush = True
        if flush:
            self.guest.flush()

    def collect(self, slot: SlotState) -> None:
        """Put into a slot's log what dirty flags say of it."""
        if not self.logs_by_flags:
            return
        for index, gfn, level in self._leaves(range(slot.gfn, slot.end)):
            entry = self.ram[index]
            if level == 1 and entry & self.format.dirty and not self._is_device(entry):
                slot.dirty.add(gfn)

    def slot_gone(self, slot: SlotState) -> None:
        """A slot is going: no entry may map its frames."""
        for _, gfn, _ in self._leaves(range(slot.gfn, slot.end)):
            self.revoke(gfn)

    def slots_changed(self, wrapped: bool) -> None:
        """The memory slots have a new generation, the first again if it `wrapped`."""
        if wrapped:
            self.zap_all()

    def reclaim(self, count: int) -> None:
        """Memory pressure: begin with empty tables."""
        self.zap_all()

    def zap_all(self) -> None:
        """Leave all tables to die, and begin with an empty root."""
        for page in self.pages.values():
            if page.level == 1:
                for index in list(self._used(page)):
                    self._account(page.gfn + (index & 511), self.ram[index])
        self.dying.update(self.pages)
        self.pages = {}
        self.root = self._new_table(0, self.levels)
        for vcpu in self.guest.vcpus:
            vcpu.requests |= RELOAD | FLUSH

    def _used(self, page: Page) -> Iterator[int]:
        for index in range(page.base, page.base + 512):
            if index in self.ram and not self._is_device(self.ram[index]):
                yield index

    def remembered(self) -> object:
        """All that later steps depend on and that an audit does not look at."""
        return None

    def anatomy(self) -> Anatomy:
        """What an audit looks at."""
        guest = self.guest
        return Anatomy(
            guest.plan.design,
            guest.slots,
            guest.backing.frame,
            guest.backing.copies,
            guest.backing.readonly,
            self.pages,
            self.dying,
            None,
            guest.generation,
            [
                ProcessorView(
                    vcpu.cpu,
                    [[vcpu.core.stage_root >> 12 & FRAME >> 12]],
                    bool(vcpu.requests & (FLUSH | RELOAD)),
                    False,
                    vcpu.core.cached,
                    vcpu.core.upper_entries,
                )
                for vcpu in guest.vcpus
            ],
            (),
            role_view,
            guest.backing.huge,
            guest.plan.multihit,
            guest.backing.giant_frames(),
            guest.plan.gbyte_pages,
        )
