"""KVM as a subject: its own walk of a guest's tables, asked by the ioctl KVM_TRANSLATE.

No guest code runs: memory and control state are set through the API, and KVM says where a
supervisor's read of a linear address would go, or that it would not. That is all that it tells.
Source: Linux, Documentation/virt/kvm/api.rst, 4.23; arch/x86/kvm/x86.c,
kvm_arch_vcpu_ioctl_translate.
"""

import ctypes
import fcntl
import mmap
import os
import struct
from dataclasses import replace

from vapama.spec import domains
from vapama.spec.access import Access
from vapama.spec.cpu import (
    AC,
    CET,
    CR4_UNSPECIFIED,
    LA57,
    LAM_SUP,
    LMA,
    LME,
    NXE,
    PAE,
    PE,
    PG,
    PKE,
    PKS,
    PSE,
    RFLAGS_ONE,
    SMAP,
    SMEP,
    VM,
    WP,
    Cpu,
)
from vapama.spec.domains import FRAMES, Domain
from vapama.spec.memory import PAGE_BYTES, Memory, Sparse
from vapama.spec.outcomes import Outcome, OutsideMemory, PageFault, Translated
from vapama.spec.subject import PA, Capabilities, NotCovered
from vapama.spec.words import Word, is_canonical

DEVICE = "/dev/kvm"
RAM_BYTES = FRAMES * PAGE_BYTES
EMPTY = bytes(RAM_BYTES)


def _ioctl(number: int, size: int = 0, read: bool = False, write: bool = False) -> int:
    """The number of an ioctl of KVM; `read` and `write` as the caller sees it."""
    return (2 * read + write) << 30 | size << 16 | 0xAE << 8 | number


SREGS_BYTES, REGS_BYTES = 312, 144
MOST_CPUID_ENTRIES, CPUID_ENTRY = 256, struct.Struct("<10I")
CREATE_VM, CREATE_VCPU = _ioctl(0x01), _ioctl(0x41)
SET_MEMORY = _ioctl(0x46, 32, write=True)
GET_SREGS, SET_SREGS = _ioctl(0x83, SREGS_BYTES, read=True), _ioctl(0x84, SREGS_BYTES, write=True)
SET_REGS = _ioctl(0x82, REGS_BYTES, write=True)
TRANSLATE = _ioctl(0x85, 24, read=True, write=True)
GET_SUPPORTED_CPUID = _ioctl(0x05, 8, read=True, write=True)
SET_CPUID = _ioctl(0x90, 8, write=True)

CODE_FLAGS_AT, CONTROLS_AT, EFER_AT = 14, 224, 264
"""Offsets in struct kvm_sregs: what follows CS's limit and selector, CR0 to CR8, EFER."""
COUNTS = PSE | PAE | LA57 | SMEP | SMAP | PKE | PKS | CET | LAM_SUP | CR4_UNSPECIFIED

DEPARTURES = {
    "table-outside-memory-is-not-present": (
        "where there is no memory a table has no entries; what a machine reads there is its own, "
        "see spec/memory.py (Linux, arch/x86/kvm/mmu/paging_tmpl.h: walk_addr_generic)"
    ),
    "amd-reserves-bit-8-of-upper-entries": (
        "with CPUID of AMD's, bit 8 of an entry from the PDPTE up that references a table must be "
        "0, APM Vol. 2, 5.3.3; the specification follows Intel here, where it is ignored, SDM "
        "Vol. 3A, 4.5 (Linux, arch/x86/kvm/mmu/mmu.c: nonleaf_bit8_rsvd)"
    ),
}
BIT_8 = 1 << 8
AMD = 0x6874_7541
"""The first letters of AMD's vendor string, as CPUID.0 EBX has them."""


class Kvm:
    """KVM of this host behind the subject protocol. Raises `OSError` if it cannot be used."""

    def __init__(self) -> None:
        self._device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        self._vm = fcntl.ioctl(self._device, CREATE_VM, 0)
        self._memory = mmap.mmap(-1, RAM_BYTES)
        where = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        slot = struct.pack("<IIQQQ", 0, 0, 0, RAM_BYTES, where)
        fcntl.ioctl(self._vm, SET_MEMORY, slot)
        self._vcpu = fcntl.ioctl(self._vm, CREATE_VCPU, 0)
        cpuid = self._supported_cpuid()
        fcntl.ioctl(self._vcpu, SET_CPUID, bytearray(cpuid), True)
        leaves = {
            (leaf, index): registers
            for leaf, index, _, *registers in CPUID_ENTRY.iter_unpack(cpuid[8:])
        }
        none = [0, 0, 0, 0]
        self.maxphyaddr = leaves.get((0x8000_0008, 0), none)[0] & 0xFF or 36
        self.page1gb = leaves.get((0x8000_0001, 0), none)[3] >> 26 & 1
        self.pse36 = leaves.get((1, 0), none)[3] >> 17 & 1
        seven = leaves.get((7, 0), none)
        self.is_amd = leaves.get((0, 0), none)[1] == AMD
        self.cr4 = PSE | PAE | (seven[1] >> 7 & 1) * SMEP | (seven[1] >> 20 & 1) * SMAP
        self.cr4 |= (seven[2] >> 16 & 1) * LA57
        self._sregs = bytearray(SREGS_BYTES)
        fcntl.ioctl(self._vcpu, GET_SREGS, self._sregs, True)
        self.capabilities = Capabilities(
            observes=frozenset({PA}), preload=True, narrow=self._narrow()
        )

    def close(self) -> None:
        """Give back what the kernel holds for it."""
        for descriptor in (self._vcpu, self._vm, self._device):
            os.close(descriptor)

    def _supported_cpuid(self) -> bytes:
        """All that KVM can offer: a count, and an entry for each leaf."""
        room = bytearray(8 + CPUID_ENTRY.size * MOST_CPUID_ENTRIES)
        struct.pack_into("<I", room, 0, MOST_CPUID_ENTRIES)
        fcntl.ioctl(self._device, GET_SUPPORTED_CPUID, room, True)
        (count,) = struct.unpack_from("<I", room)
        return bytes(room[: 8 + CPUID_ENTRY.size * count])

    def _narrow(self) -> dict[str, Domain]:
        return {
            "maxphyaddr": Domain(among=(self.maxphyaddr,)),
            "page1gb": Domain(among=(self.page1gb,)),
            "pse36": Domain(among=(self.pse36,)),
            "guest.limit": Domain(among=(RAM_BYTES,)),
            "access": Domain(among=(0,)),
            "cr3": replace(domains.CR3, free=RAM_BYTES - 1),
            "cr4": replace(domains.CR4, free=domains.CR4.free & (self.cr4 | ~COUNTS), scope=()),
        }

    def translate(self, cpu: Cpu, memory: Sparse, access: Access) -> Outcome:
        """Where KVM says that the read goes; a page fault of no code if it says nowhere.

        Raises `NotCovered`.
        """
        self._require_askable(cpu, memory, access)
        given = {**memory.touched, **loaded_pdptes(cpu, memory)}
        try:
            for address, entry in given.items():
                self._memory[address : address + 8] = entry.to_bytes(8, "little")
            self._set_controls(cpu)
            asked = bytearray(24)
            struct.pack_into("<Q", asked, 0, access.address)
            fcntl.ioctl(self._vcpu, TRANSLATE, asked, True)
        finally:
            self._memory[:] = EMPTY
        physical, valid = struct.unpack_from("<QB", asked, 8)
        return Translated(physical, 0, ()) if valid else PageFault(0)

    def departure(
        self, cpu: Cpu, memory: Memory, access: Access, expected: Outcome, observed: Outcome
    ) -> str | None:
        """The name in `DEPARTURES` of this disagreement, None if it is not one of them."""
        if not isinstance(observed, PageFault):
            return None
        if isinstance(expected, OutsideMemory):
            return "table-outside-memory-is-not-present"
        if isinstance(memory, Sparse) and self.is_amd and cpu.efer & LMA:
            upper = list(memory.touched.values())[: cpu.levels - 2]
            if any(entry & BIT_8 for entry in upper):
                return "amd-reserves-bit-8-of-upper-entries"
        return None

    def _require_askable(self, cpu: Cpu, memory: Sparse, access: Access) -> None:
        has = self.maxphyaddr, self.page1gb, self.pse36
        if (cpu.maxphyaddr, cpu.page1gb, cpu.pse36) != has:
            raise NotCovered(f"MAXPHYADDR, 1-GByte pages and PSE-36 are {has} here")
        if cpu.cr4 & COUNTS & ~self.cr4 or cpu.cr3 >> 52:
            raise NotCovered("this processor lacks bits of CR4, or keys cannot be set by this API")
        if access.write | access.fetch | access.user | access.implicit | access.shadow_stack:
            raise NotCovered("KVM_TRANSLATE asks about a supervisor's read alone")
        if cpu.rflags & VM or not cpu.cr0 & PG:
            raise NotCovered("only paging in protected mode is asked about")
        if memory.limit != RAM_BYTES or any(a >= RAM_BYTES for a in memory.touched):
            raise NotCovered(f"memory here is {RAM_BYTES:#x} bytes")
        width = cpu.mode.width
        if width > 32 and not is_canonical(access.address, width):
            raise NotCovered("the walk itself does not ask whether an address is canonical")

    def _set_controls(self, cpu: Cpu) -> None:
        """Set the registers that a walk depends on. Raises `NotCovered` if KVM refuses them."""
        sregs, long = self._sregs, int(cpu.efer & LMA != 0)
        cr0 = cpu.cr0 & (PG | PE | WP) | 1 << 4
        cr4 = cpu.cr4 & self.cr4 & (COUNTS if long else COUNTS & ~LA57)
        efer = cpu.efer & (LME | LMA | NXE if long else NXE)
        # CS: type, present, DPL, D/B, S, L, G
        struct.pack_into("<8B", sregs, CODE_FLAGS_AT, 11, 1, 0, 1 - long, 1, long, 1, 0)
        cr3 = cpu.cr3 & ~0xFFF if cpu.efer & LMA else cpu.cr3
        struct.pack_into("<4Q", sregs, CONTROLS_AT, cr0, 0, cr3, cr4)
        struct.pack_into("<Q", sregs, EFER_AT, efer)
        try:
            fcntl.ioctl(self._vcpu, SET_SREGS, bytes(sregs))
        except OSError as refused:
            raise NotCovered(f"KVM refuses this control state: {refused.strerror}") from None
        found = bytearray(SREGS_BYTES)
        fcntl.ioctl(self._vcpu, GET_SREGS, found, True)
        if struct.unpack_from("<4Q", found, CONTROLS_AT) != (cr0, 0, cr3, cr4):
            raise NotCovered("KVM does not keep this control state")
        registers = struct.pack("<18Q", *(0,) * 17, cpu.rflags & AC | RFLAGS_ONE)
        fcntl.ioctl(self._vcpu, SET_REGS, registers)


def loaded_pdptes(cpu: Cpu, memory: Sparse) -> dict[Word, Word]:
    """The PDPTEs of PAE paging, in memory where KVM loads them from. Raises `NotCovered`."""
    if cpu.efer & LMA or not cpu.cr4 & PAE:
        return {}
    if cpu.pdptes is None:
        raise NotCovered("PDPTEs are in registers here")
    table = cpu.cr3 & 0xFFFF_FFE0
    if table >= RAM_BYTES or any(address & ~0x1F == table for address in memory.touched):
        raise NotCovered("there is no room for the PDPTEs where they are loaded from")
    return {table | i << 3: int(pdpte) for i, pdpte in enumerate(cpu.pdptes)}
