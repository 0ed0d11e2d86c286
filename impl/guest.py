"""A guest as its hypervisor keeps it: memory slots, dirty logs, processors, and what they must do.

In the manner of Linux KVM (virt/kvm/kvm_main.c): a guest frame is found in a memory slot, the slot
leads to a page of the guest's backing, and that is in a frame of machine memory or brought into
one. What maps guest frames for a real core to walk is the guest's MMU: see `vapama.impl.shadow` and
`vapama.impl.tdp`.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from vapama.impl.hardware import Frames, Ram, shallow
from vapama.impl.host import Backing, Pool
from vapama.impl.kernels import large_pages
from vapama.spec.cpu import Cpu
from vapama.spec.outcomes import NonCanonical, OutsideMemory
from vapama.spec.steps import Faulted, GuestPlan, Plan, Seen, Slot
from vapama.spec.words import Flag, flag

FLUSH, SYNC, RELOAD = 1, 2, 4
"""What a virtual processor must do before it enters the guest again: drop all that its core has
cached, synchronize its shadow tables, find a new root."""
EMULATE = "emulate"
WORD = (1 << 64) - 1


class NotRam(Exception):
    """A guest frame that is in no memory slot was needed, for the entry at this address."""

    def __init__(self, address: int) -> None:
        super().__init__(f"no memory slot holds {address:#x}")
        self.address = address


class SlotState:
    """A memory slot in use, with its dirty log."""

    def __init__(self, number: int, slot: Slot) -> None:
        self.number, self.readonly = number, slot.readonly
        self.gfn, self.end = slot.gfn, slot.gfn + slot.pages
        self.page = slot.page
        self.log = False
        self.dirty: set[int] = set()

    def clone(self) -> "SlotState":
        """Another like it."""
        twin = shallow(self)
        twin.dirty = self.dirty.copy()
        return twin


class SlotsByFrame(dict[int, SlotState | None]):
    """The slot of each guest frame that was asked for; those of others are looked for in `slots`.

    A slot may have more frames than are ever asked for.
    """

    __slots__ = ("slots",)

    def __init__(self, slots: Mapping[int, SlotState]) -> None:
        super().__init__()
        self.slots = slots

    def __missing__(self, gfn: int) -> SlotState | None:
        """Look for the slot, and keep what was found until the slots change."""
        for slot in self.slots.values():
            if slot.gfn <= gfn < slot.end:
                self[gfn] = slot
                return slot
        self[gfn] = None
        return None


class Vcpu:
    """A virtual processor: the guest's control state, the core it runs on, what it must yet do."""

    def __init__(self, number: int, cpu: Cpu, core: Any) -> None:
        self.number, self.cpu, self.core = number, cpu, core
        self.requests = RELOAD | FLUSH
        self.exits = 0
        self.context: Any = None
        """What the guest's MMU keeps for this processor."""
        self.device_page: tuple[int, int, int, int] | None = None
        """The page last found to be a device's: linear page, gfn, rights, generation of slots."""

    def clone(self, ram: Ram) -> "Vcpu":
        """The same on another memory; its context is still that of the first one's MMU."""
        twin = shallow(self)
        twin.core = self.core.clone(ram)
        return twin


class Guest:
    """A guest: its memory slots and their backing, its processors, its MMU."""

    def __init__(
        self,
        number: int,
        plan: Plan,
        own: GuestPlan,
        ram: Ram,
        frames: Frames,
        pool: Pool,
        mmu: Callable[["Guest"], Any],
    ) -> None:
        self.number, self.ram, self.plan = number, ram, plan
        self.frames = frames
        giants = pool.backing(own.giants) if own.giants else None
        self.backing = Backing(frames, own.mergeable, giants)
        self.backing.notify.append(self.revoked)
        self.slots: dict[int, SlotState] = {}
        self.slot_by_gfn = SlotsByFrame(self.slots)
        self.generation = 0
        self.known: dict[int, int] = {}
        """Frames by gfn, as they were found last, to read; dropped when they are revoked."""
        self.flushes = 0
        self.synced: Callable[[int], None] | None = None
        """Told the frame of each root below which all was synchronized."""
        for slot_number, slot in own.slots.items():
            self.slots[slot_number] = SlotState(slot_number, slot)
        self.vcpus: list[Vcpu] = []
        self.mmu = mmu(self)
        for i, cpu in enumerate(own.vcpus):
            self.vcpus.append(Vcpu(i, cpu, self.mmu.new_core()))
        for vcpu in self.vcpus:
            self.mmu.power_on(vcpu)
        self._begin_with(own.image)

    def clone(self, ram: Ram, frames: Frames) -> "Guest":
        """The same in another memory; nobody is told of what is synchronized."""
        twin = shallow(self)
        twin.ram, twin.frames, twin.synced = ram, frames, None
        twin.backing = self.backing.clone(frames)
        twin.backing.notify.append(twin.revoked)
        twin.slots = {number: slot.clone() for number, slot in self.slots.items()}
        twin.slot_by_gfn = SlotsByFrame(twin.slots)
        twin.known = self.known.copy()
        twin.vcpus = [vcpu.clone(ram) for vcpu in self.vcpus]
        twin.mmu = self.mmu.clone(twin)
        return twin

    def remembered(self) -> object:
        """All that later steps depend on and that an audit does not look at."""
        asked = [(vcpu.requests, vcpu.device_page) for vcpu in self.vcpus]
        return sorted(self.known.items()), asked, self.mmu.remembered()

    def _begin_with(self, image: Mapping[int, int]) -> None:
        """Put words into memory by address, before anything is mapped or logged."""
        pages: dict[int, dict[int, int]] = {}
        for address, word in image.items():
            pages.setdefault(address >> 12, {})[address >> 3 & 511] = word
        for gfn, words in pages.items():
            slot = self.slot_of(gfn)
            if slot is None:
                raise NotRam(gfn << 12)
            page = slot.page + gfn - slot.gfn
            if self.plan.swapped and self.backing.is_small(page):
                self.backing.copies[page] = words
            else:
                base = self.backing.fault(page, True)[0] << 9
                for place, word in words.items():
                    self.ram[base | place] = word

    # From guest frames to frames of machine memory.

    def names_of(self, gfn: int) -> list[int]:
        """Every guest frame that is the same page of the backing: slots may overlap there."""
        slot = self.slot_of(gfn)
        if slot is None:
            return [gfn]
        page = slot.page + gfn - slot.gfn
        return [
            s.gfn + page - s.page
            for s in self.slots.values()
            if s.page <= page < s.page + s.end - s.gfn
        ]

    def slot_of(self, gfn: int) -> SlotState | None:
        """The slot that holds a guest frame."""
        return self.slot_by_gfn[gfn]

    def frame_of(self, slot: SlotState, gfn: int, write: bool) -> tuple[int, bool]:
        """The frame of a slot's guest frame, made present, and whether it may be written."""
        frame, writable = self.backing.fault(slot.page + gfn - slot.gfn, write)
        return frame, writable and not slot.readonly

    def level_of(
        self, slot: SlotState, gfn: int, most: int, fetch: Flag, tables: Collection[int] = ()
    ) -> int:
        """Up to which level, `most` at most, one entry may map a guest frame and those around it.

        It may be 2 or 3 if they are in one huge page that the slot maps whole and aligned, no guest
        frame of `tables`, which must not be written, is among them, and writes are not logged.
        """
        host = self.backing.level_of(slot.page + gfn - slot.gfn)
        if host == 1 or slot.log:
            return 1
        if not self.plan.gbyte_pages:
            host = 2
        start, size = slot.gfn << 12, slot.end - slot.gfn << 12
        level = large_pages.largest_level(start, size, slot.page << 12, gfn << 12, host, most)
        untracked = min((large_pages.untracked_level(gfn, table) for table in tables), default=3)
        return int(large_pages.restricted(level, untracked, 1, fetch, flag(self.plan.multihit)))

    def __getitem__(self, index: int) -> int:
        """The guest's word with this index, as a walk of its tables reads it. Raises `NotRam`."""
        gfn = index >> 9
        frame = self.known.get(gfn)
        if frame is None:
            slot = self.slot_of(gfn)
            if slot is None:
                raise NotRam(index << 3)
            frame = self.known[gfn] = self.frame_of(slot, gfn, write=False)[0]
        return self.ram[frame << 9 | index & 511]

    def put(self, address: int, word: int) -> None:
        """Write an aligned word of the guest's memory, which is then dirty. Raises `NotRam`."""
        gfn = address >> 12
        slot = self.slot_of(gfn)
        if slot is None:
            raise NotRam(address)
        page = slot.page + gfn - slot.gfn
        frame, _ = self.backing.fault(page, True)
        self.backing.written(page)
        self.ram[frame << 9 | address >> 3 & 511] = word
        self.mark_dirty(slot, gfn)

    def peek(self, ram: Ram, address: int) -> int:
        """The word at an aligned address in a slot, wherever it is; nothing changes by it."""
        slot = self.slot_of(address >> 12)
        assert slot is not None
        page, place = slot.page + (address >> 12) - slot.gfn, address >> 3 & 511
        frame = self.backing.frame_of(page)
        if frame is None:
            return self.backing.copies.get(page, {}).get(place, 0)
        return ram[frame << 9 | place]

    def mark_dirty(self, slot: SlotState, gfn: int) -> None:
        """Note a write in the slot's dirty log, if it has one."""
        if slot.log:
            slot.dirty.add(gfn)

    def revoked(self, pages: range) -> None:
        """The host is about to change what pages of the backing are mapped to."""
        for slot in self.slots.values():
            shift = slot.gfn - slot.page
            gfns = range(max(slot.gfn, pages.start + shift), min(slot.end, pages.stop + shift))
            for gfn in self._in_use(gfns):
                self.known.pop(gfn, None)
                self.mmu.revoke(gfn)

    def _in_use(self, gfns: range) -> Collection[int]:
        """Those of these guest frames that are known or mapped, or all, if that is quicker."""
        if len(gfns) <= 1:
            return gfns
        return {*(gfn for gfn in self.known if gfn in gfns), *self.mmu.mapped_in(gfns)}

    # Flushes.

    def flush(self) -> None:
        """Have every processor drop what its core has cached, before it enters the guest."""
        self.flushes += 1
        for vcpu in self.vcpus:
            vcpu.requests |= FLUSH

    # Memory slots and dirty logs.

    def set_slot(self, number: int, slot: Slot | None) -> None:
        """Create, move, change or delete a slot: nothing that was known of its frames remains."""
        old = self.slots.get(number)
        self.known.clear()
        if old is not None:
            self.mmu.slot_gone(old)
            del self.slots[number]
        if slot is not None:
            self.slots[number] = SlotState(number, slot)
        self.slot_by_gfn.clear()
        self.generation = (self.generation + 1) % self.plan.generations
        self.mmu.slots_changed(wrapped=self.generation == 0)

    def log(self, number: int, on: bool) -> None:
        """Start or stop a slot's dirty log."""
        slot = self.slots.get(number)
        if slot is None or slot.readonly or slot.log == on:
            return
        slot.log = on
        slot.dirty.clear()
        if on:
            self.mmu.protect_slot(slot)

    def harvest(self, number: int) -> frozenset[int]:
        """The guest frames written since the last harvest; from now on they are watched again."""
        slot = self.slots.get(number)
        if slot is None or not slot.log:
            return frozenset()
        self.mmu.collect(slot)
        dirty = frozenset(slot.dirty)
        slot.dirty.clear()
        self.mmu.watch_again(slot, dirty)
        return dirty


def reflected(status: int, value: int, address: int) -> Seen:
    """A guest's own fault for an address, as its walk's kernel tells it."""
    if status == 8:
        return Faulted(value, address)
    if status == 9:
        return NonCanonical()
    return OutsideMemory(value)
