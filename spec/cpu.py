"""The control state that address translation depends on, and which states can exist.

A `Cpu` holds the registers as the processor does. Constructing one that no processor can be in
raises `ImpossibleState`; one with a feature that this specification does not cover raises
`UnsupportedMode`. Source: Intel SDM Vol. 3A, 2.2.1 (EFER), 2.5 (control registers), 4.1 (paging
modes and control bits), 4.3 to 4.5 (CR3), 4.4.1 (PDPTE registers).
"""

from collections.abc import Sequence
from typing import NamedTuple

from vapama.spec import modes
from vapama.spec.modes import Mode
from vapama.spec.words import Condition, Flag, Word, bit, flag, low_bits

# CR0 (SDM Vol. 3A, 2.5)
PE, WP, NW, CD, PG = 1 << 0, 1 << 16, 1 << 29, 1 << 30, 1 << 31
CR0_DEFINED = 0xE005_003F
# CR3 (SDM Vol. 3A, tables 4-3, 4-7 and 4-12)
LAM_U57, LAM_U48 = 1 << 61, 1 << 62
# CR4 (SDM Vol. 3A, 2.5)
PSE, PAE, LA57, PCIDE = 1 << 4, 1 << 5, 1 << 12, 1 << 17
SMEP, SMAP, PKE, CET, PKS = 1 << 20, 1 << 21, 1 << 22, 1 << 23, 1 << 24
LAM_SUP = 1 << 28
CR4_DEFINED = 0x1_1BFF_7FFF
CR4_UNSPECIFIED = 1 << 27
"""LASS: it changes what an access may do, and is not specified here."""
# EFER (SDM Vol. 3A, 2.2.1; AMD APM Vol. 2, 3.1.7)
LME, LMA, NXE = 1 << 8, 1 << 10, 1 << 11
EFER_DEFINED = 0x36_FD01
EFER_UNSPECIFIED = 1 << 20
"""UAIE (AMD's upper address ignore): it changes which addresses are canonical."""
# RFLAGS (SDM Vol. 1, 3.4.3)
VM, AC = 1 << 17, 1 << 18
RFLAGS_DEFINED = 0x003F_7FD7
RFLAGS_ONE = 1 << 1


class ImpossibleState(ValueError):
    """A control state that no processor can be in."""


class UnsupportedMode(ValueError):
    """A control state that exists, with a feature that this specification does not cover."""


class Registers(NamedTuple):
    """The registers of `Cpu`, not checked."""

    cr0: Word
    cr3: Word
    cr4: Word
    efer: Word
    rflags: Word = RFLAGS_ONE
    pkru: Word = 0
    pkrs: Word = 0
    page1gb: Flag = 1
    maxphyaddr: Word = 52
    pse36: Flag = 1
    pdptes: Sequence[Word] | None = None


class Cpu(Registers):
    """A processor's control state, in any paging mode.

    `pkru` and `pkrs` are 32-bit: the PKRU register and the IA32_PKRS MSR. `maxphyaddr` is the
    physical-address width that CPUID reports, 32 to 52; `page1gb` is 1 if 1-GByte pages exist,
    `pse36` if 4-MByte pages can lie above 4 GBytes. `pdptes` are the four PDPTE registers of PAE
    paging (`paging.load_pdptes` loads them); None if each walk reads the PDPTEs from memory
    instead, as under AMD's nested paging. Other modes do not use them.

    Raises `ImpossibleState` or `UnsupportedMode`.
    """

    __slots__ = ()

    def __new__(
        cls,
        cr0: Word,
        cr3: Word,
        cr4: Word,
        efer: Word,
        rflags: Word = RFLAGS_ONE,
        pkru: Word = 0,
        pkrs: Word = 0,
        page1gb: Flag = 1,
        maxphyaddr: Word = 52,
        pse36: Flag = 1,
        pdptes: Sequence[Word] | None = None,
    ) -> "Cpu":
        """The state with these registers, checked."""
        registers = (cr0, cr3, cr4, efer, rflags, pkru, pkrs, page1gb, maxphyaddr, pse36, pdptes)
        cpu = cls._make(registers)
        require_possible(cpu)
        return cpu

    @property
    def mode(self) -> Mode:
        """The paging mode. Source: SDM Vol. 3A, 4.1.1."""
        if self.cr0 & PG == 0:
            return modes.OFF
        if self.efer & LME != 0:
            return modes.FIVE_LEVEL if self.cr4 & LA57 else modes.FOUR_LEVEL
        if self.cr4 & PAE:
            return modes.PAE
        return modes.TWO_LEVEL_PSE if self.cr4 & PSE else modes.TWO_LEVEL

    @property
    def long_mode(self) -> Flag:
        """EFER.LMA: 4-level or 5-level paging."""
        return self.efer >> 10 & 1

    @property
    def levels(self) -> int:
        """How many levels of paging structures a walk visits, PDPTEs of PAE paging not counted."""
        return len(self.mode.levels)

    @property
    def wp(self) -> Flag:
        """CR0.WP: supervisor writes respect read-only pages."""
        return self.cr0 >> 16 & 1

    @property
    def smep(self) -> Flag:
        """CR4.SMEP: the supervisor does not execute user pages."""
        return self.cr4 >> 20 & 1

    @property
    def smap(self) -> Flag:
        """CR4.SMAP: the supervisor does not touch user pages, unless RFLAGS.AC allows it."""
        return self.cr4 >> 21 & 1

    @property
    def pke(self) -> Flag:
        """CR4.PKE: PKRU governs data accesses to user pages."""
        return self.cr4 >> 22 & 1

    @property
    def pks(self) -> Flag:
        """CR4.PKS: IA32_PKRS governs data accesses to supervisor pages."""
        return self.cr4 >> 24 & 1

    @property
    def cet(self) -> Flag:
        """CR4.CET: there are shadow-stack pages, and accesses to shadow stacks."""
        return self.cr4 >> 23 & 1

    @property
    def masks(self) -> Word:
        """Not 0 if linear addresses may be masked: CR4.LAM_SUP, CR3.LAM_U57 and CR3.LAM_U48."""
        return self.cr4 & LAM_SUP | self.cr3 & (LAM_U57 | LAM_U48)

    @property
    def nxe(self) -> Flag:
        """EFER.NXE: bit 63 of an entry forbids execution; without it the bit is reserved."""
        return self.efer >> 11 & 1

    @property
    def ac(self) -> Flag:
        """RFLAGS.AC: lifts SMAP for explicit supervisor accesses."""
        return self.rflags >> 18 & 1


def require_possible(cpu: Registers) -> None:
    """Check that a processor can be in this state, and that all of it is specified here.

    Raises `ImpossibleState` or `UnsupportedMode`.
    """
    _require((cpu.maxphyaddr >= 32) & (cpu.maxphyaddr <= 52), "MAXPHYADDR is 32 to 52")
    _only_defined("CR0", cpu.cr0, CR0_DEFINED)
    _only_defined("CR4", cpu.cr4, CR4_DEFINED)
    _only_defined("EFER", cpu.efer, EFER_DEFINED)
    _only_defined("RFLAGS", cpu.rflags, RFLAGS_DEFINED)
    _only_defined("PKRU", cpu.pkru, low_bits(32))
    _only_defined("IA32_PKRS", cpu.pkrs, low_bits(32))
    _only_defined("CR3", cpu.cr3, low_bits(cpu.maxphyaddr) | LAM_U57 | LAM_U48)
    _only_defined("page1gb", cpu.page1gb, 1)
    _only_defined("pse36", cpu.pse36, 1)
    _require(cpu.rflags & RFLAGS_ONE != 0, "RFLAGS bit 1 is always 1")
    _require((cpu.cr0 & NW == 0) | (cpu.cr0 & CD != 0), "CR0.NW needs CR0.CD")
    _require((cpu.cr0 & PG == 0) | (cpu.cr0 & PE != 0), "CR0.PG needs CR0.PE")
    active = flag(cpu.efer & LME != 0) & flag(cpu.cr0 & PG != 0)
    _require(bit(cpu.efer, 10) == active, "EFER.LMA is EFER.LME and CR0.PG")
    _require((cpu.cr4 & PAE != 0) | (active == 0), "long mode needs CR4.PAE")
    _require((cpu.cr4 & PCIDE == 0) | (active == 1), "CR4.PCIDE needs long mode")
    _require((cpu.cr4 & CET == 0) | (cpu.cr0 & WP != 0), "CR4.CET needs CR0.WP")
    legacy = (cpu.cr0 & PE != 0) & (active == 0)
    _require((cpu.rflags & VM == 0) | legacy, "RFLAGS.VM needs legacy protected mode")
    if cpu.pdptes is not None and active == 0:
        _require_pdptes(cpu.pdptes, cpu.maxphyaddr)
    _require_specified(cpu.cr4 & CR4_UNSPECIFIED == 0, "CR4.LASS")
    _require_specified(cpu.efer & EFER_UNSPECIFIED == 0, "EFER.UAIE")


def reserved_in_pdptes(maxphyaddr: Word) -> Word:
    """The bits that must be 0 in a present PDPTE of PAE paging. Source: SDM Vol. 3A, table 4-8."""
    return modes.PDPTE_RESERVED | low_bits(52) & ~low_bits(maxphyaddr)


def _require_pdptes(pdptes: Sequence[Word], maxphyaddr: Word) -> None:
    """Loading PDPTEs that are not so causes #GP: no register holds one. SDM Vol. 3A, 4.4.1."""
    _require(len(pdptes) == 4, "PAE paging has four PDPTE registers")
    for number, pdpte in enumerate(pdptes):
        _only_defined(f"PDPTE{number}", pdpte, low_bits(64))
        if pdpte & modes.PRESENT != 0:
            _only_defined(f"PDPTE{number}", pdpte, ~reserved_in_pdptes(maxphyaddr))


def _only_defined(register: str, value: Word, defined: Word) -> None:
    reserved = value & ~defined
    if reserved != 0:
        raise ImpossibleState(f"{register} {value:#x}: its bits {reserved:#x} are reserved")


def _require(condition: Condition, rule: str) -> None:
    if not condition:
        raise ImpossibleState(f"{rule} (Intel SDM Vol. 3A, 2.5 and 4.1)")


def _require_specified(condition: Condition, what: str) -> None:
    if not condition:
        raise UnsupportedMode(f"{what} is not specified here: clear it, if that is what was meant")
