"""A hypervisor's memory subsystem: guests, memory slots, dirty logs, and the fault path.

In the manner of Linux KVM (Documentation/virt/kvm/x86/mmu.rst; arch/x86/kvm/mmu/ and
virt/kvm/kvm_main.c): a guest frame is found in a memory slot, the slot leads to a page of the
guest's backing, and that is in a frame of machine memory or brought into one. What maps guest
addresses to frames, so that a real core can walk it, is a guest's MMU: shadow tables in software
(`vapama.impl.shadow`) or second-stage tables for the hardware (`vapama.impl.tdp`).

A guest's access runs on its core. If the core cannot translate it, the access leaves the guest, the
MMU mends its tables, and the access is made again, until it is translated, is the guest's own
fault, or has to be emulated: a store to a table that is shadowed, or an access to a device.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

from vapama.impl.guest import EMULATE, WORD, Guest, NotRam, Vcpu, reflected
from vapama.impl.hardware import LIMIT_WORDS, PAE_PAGING, Frames, Ram, paging_of, shallow
from vapama.impl.host import Merger, Pool
from vapama.impl.kernels import legacy
from vapama.impl.mmu import linear
from vapama.impl.shadow import ShadowMmu
from vapama.impl.tdp import TwoDimensional
from vapama.spec.access import Access
from vapama.spec.anatomy import MachineView
from vapama.spec.cpu import Cpu
from vapama.spec.outcomes import GeneralProtection, OutsideMemory
from vapama.spec.steps import (
    EPT,
    NPT,
    SHADOW,
    Collapse,
    DeviceWrite,
    Done,
    Evict,
    Harvest,
    Harvested,
    Invlpg,
    Invpcid,
    Load,
    Loaded,
    Log,
    Migrate,
    Move,
    Plan,
    Reclaim,
    Rest,
    Scan,
    Seen,
    SetSlot,
    Split,
    Step,
    Store,
    Stored,
    Unmap,
    Unmerge,
    device_word,
)

PATIENCE = 24
"""How often an access may leave the guest and be made again: each time something must have been
mended, and there are not that many things."""
MMUS: dict[str, Callable[[Guest], Any]] = {
    SHADOW: ShadowMmu,
    EPT: TwoDimensional,
    NPT: TwoDimensional,
}
"""The MMUs of the designs."""


class NoProgress(AssertionError):
    """An access left the guest again and again, and nothing came of it."""


class Vmm:
    """The hypervisor, and the machine it runs on."""

    stateful = True

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ram = Ram()
        self.frames = Frames(self.ram, plan.frames)
        self.pool = Pool(plan.pool)
        self.guests = [
            Guest(i, plan, own, self.ram, self.frames, self.pool, MMUS[plan.design])
            for i, own in enumerate(plan.guests)
        ]
        self.lent: set[int] = set()
        """The guests that a clone has too, until one of them changes: their memory may be of an
        other machine meanwhile."""
        self.synced: Callable[[int, int], None] | None = None
        """Told of guest and root whenever all below a root was synchronized."""
        self.merger: Merger | None = None
        """Same-page merging, from its first scan on."""

    def clone(self) -> "Vmm":
        """Another that goes on from the same state, on a machine of its own; nobody watches it."""
        self.lent = set(range(len(self.guests)))
        twin = shallow(self)
        twin.lent, twin.guests, twin.ram = self.lent.copy(), self.guests.copy(), Ram(self.ram)
        twin.frames, twin.synced = self.frames.clone(twin.ram), None
        if self.merger is not None or self.plan.pool:
            self._clone_what_is_shared(twin)
        return twin

    def _clone_what_is_shared(self, twin: "Vmm") -> None:
        """Give a clone its own of what leads from guest to guest: so all guests are apart now."""
        known: dict[int, Any] = {id(self.frames): twin.frames}
        twin.pool = deepcopy(self.pool, known)
        for guest in self.guests:
            backing = known[id(guest.backing)] = twin._guest(guest.number).backing
            backing.giants = deepcopy(guest.backing.giants, known)
        twin.merger = deepcopy(self.merger, known)
        for guest in twin.guests:
            guest.backing.merger = twin.merger
        self.lent.clear()

    def _guest(self, number: int) -> Guest:
        """A guest that is about to change: no clone's any more, and told of who watches."""
        if number in self.lent:
            self.lent.discard(number)
            guest = self.guests[number] = self.guests[number].clone(self.ram, self.frames)
            guest.synced = None if self.synced is None else partial(self.synced, number)
        return self.guests[number]

    def view(self) -> MachineView:
        """All that an audit looks at."""
        return MachineView(
            self.ram,
            self.frames.free_list,
            self.frames.total,
            [guest.mmu.anatomy() for guest in self.guests],
            self._remembered,
            self.pool.free,
            self.plan.pool,
        )

    def _remembered(self) -> object:
        merger = None if self.merger is None else self.merger.ksm.remembered()
        return merger, [guest.remembered() for guest in self.guests]

    def watch(self, freed: Callable[[int], None], synced: Callable[[int, int], None]) -> None:
        """Have `freed` told of each frame to be freed, `synced` of each root synchronized."""
        self.frames.on_free, self.synced = freed, synced
        for guest in self.guests:
            if guest.number not in self.lent:
                guest.synced = partial(synced, guest.number)

    def word(self, guest: int, address: int) -> int:
        """A guest's word at an aligned address, as the host has it; it brings no page in."""
        return self.guests[guest].peek(self.ram, address)

    def do(self, step: Step) -> Seen:
        """Make a step, and say what was seen of it."""
        match step:
            case Rest():
                return Done()
            case Scan():
                if self.merger is None:
                    backings = [self._guest(guest.number).backing for guest in self.guests]
                    self.merger = Merger(backings, self.frames, self.plan.zero_pages)
                self.merger.scan()
                return Done()
            case Unmerge():
                if self.merger is not None:
                    self.merger.ksm.unmerge()
                return Done()
        guest = self._guest(step.guest)
        match step:
            case Load(_, vcpu, access):
                return self._access(guest, guest.vcpus[vcpu], access, None)
            case Store(_, vcpu, access, value):
                return self._access(guest, guest.vcpus[vcpu], access, value)
            case Move(_, vcpu):
                return self._move(guest, guest.vcpus[vcpu], step)
            case Invlpg(_, vcpu, address):
                guest.mmu.invlpg(guest.vcpus[vcpu], linear(guest.vcpus[vcpu].cpu, address))
            case Invpcid(_, vcpu, kind, pcid, address):
                guest.vcpus[vcpu].device_page = None
                guest.mmu.invpcid(guest.vcpus[vcpu], kind, pcid, address)
            case Unmap(_, page):
                guest.backing.swap_out(page)
            case Migrate(_, page):
                guest.backing.move(page)
            case Collapse(_, page):
                guest.backing.collapse(page)
            case Split(_, page):
                guest.backing.split(page)
            case SetSlot(_, number, slot):
                guest.set_slot(number, slot)
            case Log(_, number, on):
                guest.log(number, on)
            case Harvest(_, number):
                return Harvested(guest.harvest(number))
            case Reclaim(_, tables):
                guest.mmu.reclaim(tables)
            case Evict(_, number):
                guest.vcpus[number].core.forget_all()
        return Done()

    # What a guest does.

    def _move(self, guest: Guest, vcpu: Vcpu, step: Move) -> Seen:
        """A control register is written; bit 63 of a value for CR3 says what is kept."""
        old, keep = vcpu.cpu, False
        if step.register == "cr3":
            keep = bool(step.value >> 63 & old.cr4 >> 17 & 1)
            step = step._replace(value=step.value & WORD >> 1)
        new = step.on(old)._replace(pdptes=None)
        if self.plan.has_pdpte_registers and paging_of(new) == PAE_PAGING:
            registers: list[int] | None = list(old.pdptes or ())
            if old.pdptes is None or loads_pdptes(step.register, old, new):
                try:
                    registers = load_pdptes(guest, new)
                except NotRam as hole:
                    return OutsideMemory(hole.address)
            if registers is None:
                return GeneralProtection()
            new = new._replace(pdptes=tuple(registers))
        vcpu.cpu = Cpu._make(new)
        guest.mmu.moved(vcpu, step.register, old, vcpu.cpu, keep)
        return Done()

    def _access(self, guest: Guest, vcpu: Vcpu, access: Access, value: int | None) -> Seen:
        """A load, fetch or store, made until something comes of it."""
        word = access.implicit | access.write << 1 | access.user << 2 | access.fetch << 4
        mmu, core = guest.mmu, vcpu.core
        pieces = split(linear(vcpu.cpu, access.address), linear(vcpu.cpu, WORD))
        for _ in range(PATIENCE):
            if vcpu.requests:
                mmu.enter(vcpu)
            places = []
            for at, _size in pieces:
                status, place = core.translate(at, word)
                if status > 3:
                    vcpu.exits += 1
                    try:
                        seen = mmu.fault(vcpu, at, word, status, place)
                        if seen is EMULATE:
                            seen = self._emulate(guest, vcpu, pieces, word, value)
                    except NotRam as hole:
                        return OutsideMemory(hole.address)
                    if seen is not None:
                        return seen  # type: ignore[no-any-return]
                    break
                places.append(place)
            else:
                return self._on_ram(places, pieces, value)
        raise NoProgress(f"{access} left the guest {PATIENCE} times, and nothing came of it")

    def _on_ram(
        self, places: list[int], pieces: Sequence[tuple[int, int]], value: int | None
    ) -> Seen:
        """The access on machine memory, which its core translated."""
        ram = self.ram
        if len(places) == 1 and places[0] & 7 == 0:
            if value is None:
                return Loaded(ram[places[0] >> 3])
            ram[places[0] >> 3] = value
            return Stored()
        if value is None:
            parts = [
                (read_bytes(ram, place, size), size)
                for place, (_, size) in zip(places, pieces, strict=True)
            ]
            return Loaded(joined(parts))
        for place, (_, size) in zip(places, pieces, strict=True):
            write_bytes(ram, place, size, value)
            value >>= size << 3
        return Stored()

    def _emulate(
        self,
        guest: Guest,
        vcpu: Vcpu,
        pieces: Sequence[tuple[int, int]],
        word: int,
        value: int | None,
    ) -> Seen:
        """The access made by the hypervisor: by a walk of the guest's tables, with its rights."""
        places = []
        for at, size in pieces:
            gpa = self._device_page(guest, vcpu, at, word)
            slot = None
            if gpa is None:
                status, gpa = guest.mmu.walk(vcpu, at, word)
                if status > 3:
                    guest.mmu.invlpg(vcpu, at)
                    return reflected(status, gpa, at)
                slot = guest.slot_of(gpa >> 12)
            places.append((gpa, size, slot))
        if value is None:
            return Loaded(
                joined(
                    [
                        (read_bytes(_Device() if slot is None else guest, gpa, size), size)
                        for gpa, size, slot in places
                    ]
                )
            )
        devices = []
        for gpa, size, slot in places:
            part = value & (1 << (size << 3)) - 1
            value >>= size << 3
            if slot is None or slot.readonly:
                devices.append(DeviceWrite(gpa, size, part))
            else:
                write_bytes(_Writable(guest), gpa, size, part)
                guest.mmu.written(gpa, size)
        return Stored(tuple(devices))

    def _device_page(self, guest: Guest, vcpu: Vcpu, address: int, word: int) -> int | None:
        """The guest-physical address, if this page was found to be a device's just before."""
        known = vcpu.device_page
        if known is None or known[0] != address >> 12 or known[3] != guest.generation:
            return None
        if not guest.mmu.permits(vcpu, known[2], word):
            return None
        return known[1] << 12 | address & 0xFFF


def loads_pdptes(register: str, old: Cpu, new: Cpu) -> bool:
    """Whether a write to a control register, with PAE paging, loads the PDPTEs: to CR3, or one that
    changes CR0's CD, NW or PG, or CR4's PSE, PAE, PGE or SMEP.
    """
    if register == "cr3":
        return True
    return bool((old.cr0 ^ new.cr0) >> 29 or (old.cr4 ^ new.cr4) & 0x1000B0)


def load_pdptes(guest: Guest, cpu: Cpu) -> list[int] | None:
    """The PDPTEs that CR3 leads to; None if one is refused. Raises `NotRam`."""
    registers = [0] * 4
    reserved = legacy.reserved_word(cpu.cr4, cpu.efer, cpu.maxphyaddr, cpu.pse36)
    status = legacy.load_pdptes(guest, LIMIT_WORDS, reserved, cpu.cr3, registers)
    return None if status == legacy.GENERAL_PROTECTION else registers


def split(address: int, every: int = WORD) -> tuple[tuple[int, int], ...]:
    """The 8 bytes at an address, page by page: address and number of bytes. `every` has the bits
    that an address may have.
    """
    offset = address & 0xFFF
    if offset <= 0xFF8:
        return ((address, 8),)
    first = 0x1000 - offset
    return (address, first), (address + first & every, 8 - first)


def joined(parts: Sequence[tuple[int, int]]) -> int:
    """Bytes put together, little-endian: each part a value and how many bytes it has."""
    value = shift = 0
    for part, size in parts:
        value |= part << shift
        shift += size << 3
    return value


def read_bytes(words: Any, address: int, size: int) -> int:
    """So many bytes at an address, all in one page, out of words by index."""
    shift = (address & 7) << 3
    value = words[address >> 3] >> shift
    if (address & 7) + size > 8:
        value |= words[(address >> 3) + 1] << (64 - shift)
    return int(value) & (1 << (size << 3)) - 1


def write_bytes(words: Any, address: int, size: int, value: int) -> None:
    """Write so many bytes at an address, all in one page, into words by index."""
    shift, mask = (address & 7) << 3, (1 << (size << 3)) - 1
    both = (value & mask) << shift
    changed = mask << shift
    index = address >> 3
    words[index] = words[index] & ~changed & WORD | both & WORD
    if both >> 64 or changed >> 64:
        words[index + 1] = words[index + 1] & ~(changed >> 64) & WORD | both >> 64


class _Device:
    """A device's words by index."""

    def __getitem__(self, index: int) -> int:
        return device_word(index << 3)


class _Writable:
    """A guest's words by index, to write."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def __getitem__(self, index: int) -> int:
        return self.guest[index]

    def __setitem__(self, index: int, word: int) -> None:
        self.guest.put(index << 3, word)
