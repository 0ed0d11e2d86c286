"""What every MMU of a hypervisor does: walk a guest's own tables, with the guest's rights."""

from collections.abc import Sequence
from typing import Self

from vapama.impl.guest import Guest, Vcpu
from vapama.impl.hardware import (
    LIMIT_WORDS,
    LONG_MODE,
    OFF,
    SHORT_ENTRIES,
    controls,
    shallow,
)
from vapama.impl.kernels import legacy, long_mode
from vapama.spec.cpu import Cpu

# Bits of an entry of ordinary paging.
PRESENT, WRITABLE, USER, ACCESSED, DIRTY, LARGE = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7
NX = 1 << 63
FRAME = 0x000F_FFFF_FFFF_F000
# Rights, as words.
X, W, U = 1, 2, 4
ALL = X | W | U


class Context:
    """What an MMU keeps for a virtual processor: its control registers as the kernels take them.

    `paging` is how its tables are read, `levels` how many levels they have (PDPTEs of PAE paging
    not counted). `reserved` are bits reserved in its entries (in 32-bit paging in those of 4-MByte
    pages alone), `reserved_small` those in entries of the last level.
    """

    def __init__(self) -> None:
        self.cr3 = self.mode = self.paging = self.levels = 0
        self.reserved = self.reserved_small = 0
        self.pdptes: Sequence[int] = ()

    def controls(self, cpu: Cpu) -> None:
        """Take in the guest's control registers."""
        self.cr3 = cpu.cr3
        self.paging, self.mode, self.reserved, self.levels = controls(cpu)
        self.reserved_small = 0 if self.paging in SHORT_ENTRIES else self.reserved
        self.pdptes = cpu.pdptes or ()


class Mmu:
    """The part of a guest's MMU that knows the guest's own tables."""

    def __init__(self, guest: Guest) -> None:
        self.guest, self.ram, self.frames = guest, guest.ram, guest.frames
        self.path = [0] * 6
        self.gptes = [0] * 6
        """The guest's entries that the last walk used, by level."""

    def clone(self, guest: Guest) -> Self:
        """The same for a guest that is a clone too."""
        twin = shallow(self)
        twin.guest, twin.ram, twin.frames = guest, guest.ram, guest.frames
        twin.path, twin.gptes = self.path.copy(), self.gptes.copy()
        return twin

    def walk(self, vcpu: Vcpu, address: int, word: int) -> tuple[int, int]:
        """The guest's translation of an access: (status, value) as the kernel has it.

        Sets the guest's accessed and dirty flags; a table in read-only memory keeps what it has.
        The entries are left in `gptes`, by level. Raises `NotRam`.
        """
        guest, context, cpu, path = self.guest, vcpu.context, vcpu.cpu, self.path
        if context.paging == LONG_MODE:
            status, value = long_mode.walk(
                guest,
                LIMIT_WORDS,
                context.mode,
                context.reserved,
                context.cr3,
                cpu.pkru,
                cpu.pkrs,
                address,
                word,
                path,
            )
        else:
            status, value = legacy.walk(
                guest,
                LIMIT_WORDS,
                context.mode,
                context.reserved,
                context.cr3,
                context.pdptes,
                address,
                word,
                path,
            )
        if status > 3:
            return status, value
        need = ACCESSED
        short = context.paging in SHORT_ENTRIES
        for level in range(context.levels, max(status, 1) - 1, -1):
            index, shift = path[level], 0
            if short:
                index, shift = index >> 1, (index & 1) << 5
            entry = guest[index]
            if level == status and word & 2:
                need |= DIRTY
            if entry & need << shift != need << shift:
                slot = guest.slot_of(index >> 9)
                if slot is not None and not slot.readonly:
                    entry |= need << shift
                    guest.put(index << 3, entry)
            self.gptes[level] = entry >> shift & 0xFFFF_FFFF if short else entry
        return status, value

    def permits(self, vcpu: Vcpu, rights: int, word: int) -> bool:
        """Whether the guest's control state lets an access have a page with these rights."""
        cpu = vcpu.cpu
        if vcpu.context.paging == OFF:
            return True
        write, user, fetch = word >> 1 & 1, word >> 2 & 1, word >> 4 & 1
        if user and not rights & U:
            return False
        if write and not rights & W:
            # Where CR0.WP lets it pass all the same, the walk has a dirty flag to set.
            return False
        if fetch and not rights & X:
            return False
        if not user and rights & U:
            if fetch:
                return not cpu.smep
            return not cpu.smap or (cpu.ac == 1 and not word & 1)
        return True


def linear(cpu: Cpu, address: int) -> int:
    """The address that a processor uses: it has 32 bits outside long mode."""
    return address if cpu.efer >> 10 & 1 else address & 0xFFFF_FFFF


def rights_of(entry: int) -> int:
    """The rights of an entry of ordinary paging."""
    return entry & (W | U) | (entry >> 63 ^ 1)


def pcid(cpu: Cpu) -> int:
    """The current PCID: 0 without CR4.PCIDE."""
    return cpu.cr3 & 0xFFF if cpu.cr4 >> 17 & 1 else 0
