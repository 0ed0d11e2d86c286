"""The control state of a second stage: what the walk of a guest-physical address depends on.

`Ept` is Intel's, `Npt` AMD's. Constructing a state that no processor runs a guest in raises
`ImpossibleState`; one with a feature that this specification does not cover, `UnsupportedMode`.
Sources: Intel SDM Vol. 3C, 27.6.11 (EPTP), 29.2.1.1 (checks on it) and A.10 (capabilities); AMD APM
Vol. 2, 15.25.2 to 15.25.4. The SDM's chapters are numbered as in its editions of 2025; those of
2022 to 2024 have 25, 27, 28 and 29 for 27, 29, 30 and 31.
"""

from typing import NamedTuple, TypeAlias

from vapama.spec.cpu import (
    CD,
    CR0_DEFINED,
    LA57,
    LMA,
    LME,
    NW,
    NXE,
    PAE,
    PE,
    PG,
    WP,
    ImpossibleState,
    UnsupportedMode,
)
from vapama.spec.words import Condition, Flag, Word, ite, low_bits

# IA32_VMX_EPT_VPID_CAP (SDM Vol. 3D, A.10), as far as a walk depends on it.
EXECUTE_ONLY, WALK_4, WALK_5 = 1 << 0, 1 << 6, 1 << 7
UNCACHEABLE, WRITE_BACK = 1 << 8, 1 << 14
PAGE_2MB, PAGE_1GB = 1 << 16, 1 << 17
ACCESSED_DIRTY, ADVANCED, SHADOW_STACK = 1 << 21, 1 << 22, 1 << 23
EPT_CAPABILITIES = (
    EXECUTE_ONLY | WALK_4 | WALK_5 | UNCACHEABLE | WRITE_BACK | PAGE_2MB | PAGE_1GB
) | (ACCESSED_DIRTY | ADVANCED)
"""All that this specification covers."""

# EPTP (SDM Vol. 3C, 27.6.11).
EPTP_AD, EPTP_SHADOW_STACK = 1 << 6, 1 << 7
EPTP_RESERVED = 0xF00

# CR4 and EFER of a host: what a processor with nested paging defines.
HOST_CR4_DEFINED = 0x1_1BFF_7FFF
HOST_EFER_DEFINED = 0x36_FD01


class EptRegisters(NamedTuple):
    """The registers of `Ept`, not checked."""

    eptp: Word
    maxphyaddr: Word = 52
    mbec: Flag = 0
    capabilities: Word = EPT_CAPABILITIES


class Ept(EptRegisters):
    """Extended page tables: EPTP, controls and capabilities of a guest on Intel's VMX.

    `mbec` is the "mode-based execute control for EPT" VM-execution control; `capabilities` the MSR
    IA32_VMX_EPT_VPID_CAP; `maxphyaddr` the physical-address width, 32 to 52.

    The other controls that change EPT are 0: EPT paging-write control, guest-paging verification
    and sub-page write permissions (so that bits 58, 57 and 61 of an entry are ignored), and
    EPT-violation #VE (so that bit 63 is). Supervisor shadow-stack control (EPTP bit 7, for bit 60)
    is `UnsupportedMode`.

    Raises `ImpossibleState` or `UnsupportedMode`.
    """

    __slots__ = ()

    def __new__(
        cls,
        eptp: Word,
        maxphyaddr: Word = 52,
        mbec: Flag = 0,
        capabilities: Word = EPT_CAPABILITIES,
    ) -> "Ept":
        """The state with these registers, checked."""
        ept = cls._make((eptp, maxphyaddr, mbec, capabilities))
        require_possible_ept(ept)
        return ept

    @property
    def levels(self) -> int:
        """The EPT page-walk length: bits 5:3 of EPTP are one less."""
        return 5 if self.eptp >> 5 & 1 else 4

    @property
    def ad(self) -> Flag:
        """EPTP bit 6: accessed and dirty flags for EPT."""
        return self.eptp >> 6 & 1

    @property
    def execute_only(self) -> Flag:
        """Entries that allow fetches and no reads exist."""
        return self.capabilities & 1

    @property
    def page2mb(self) -> Flag:
        """2-MByte pages exist."""
        return self.capabilities >> 16 & 1

    @property
    def page1gb(self) -> Flag:
        """1-GByte pages exist."""
        return self.capabilities >> 17 & 1

    @property
    def advanced(self) -> Flag:
        """EPT violations come with advanced VM-exit information."""
        return self.capabilities >> 22 & 1


class NptRegisters(NamedTuple):
    """The registers of `Npt`, not checked."""

    ncr3: Word
    cr4: Word = PAE
    efer: Word = LMA | LME | NXE
    cr0: Word = PG | PE | WP
    page1gb: Flag = 1
    maxphyaddr: Word = 52
    gmet: Flag = 0


class Npt(NptRegisters):
    """Nested page tables: nCR3, and the host's control state as VMRUN found it, on AMD's SVM.

    The tables have the format of the host's own paging mode (`cr4`, `efer`): 4-level, 5-level, PAE
    or 32-bit; the guest's mode is another matter. `page1gb` and `maxphyaddr` are as in `Cpu`.
    `gmet` is guest mode execute trap, and `UnsupportedMode` if 1.

    Raises `ImpossibleState` or `UnsupportedMode`.
    """

    __slots__ = ()

    def __new__(
        cls,
        ncr3: Word,
        cr4: Word = PAE,
        efer: Word = LMA | LME | NXE,
        cr0: Word = PG | PE | WP,
        page1gb: Flag = 1,
        maxphyaddr: Word = 52,
        gmet: Flag = 0,
    ) -> "Npt":
        """The state with these registers, checked."""
        npt = cls._make((ncr3, cr4, efer, cr0, page1gb, maxphyaddr, gmet))
        require_possible_npt(npt)
        return npt

    @property
    def levels(self) -> int:
        """How many levels a walk visits: 4 or 5 in long mode, 3 with PAE, else 2."""
        if self.efer & LMA:
            return 5 if self.cr4 & LA57 else 4
        return 3 if self.cr4 & PAE else 2

    @property
    def nxe(self) -> Flag:
        """The host's EFER.NXE: bit 63 of an 8-byte entry forbids execution, else it is reserved."""
        return self.efer >> 11 & 1

    @property
    def pse(self) -> Flag:
        """The host's CR4.PSE: 4-MByte pages exist in 32-bit paging."""
        return self.cr4 >> 4 & 1


Stage: TypeAlias = Ept | Npt


def require_possible_ept(ept: EptRegisters) -> None:
    """Check that VM entry takes this EPTP. Raises `ImpossibleState` or `UnsupportedMode`."""
    eptp, has, length = ept.eptp, ept.capabilities, ept.eptp >> 3 & 7
    _require(
        "SDM Vol. 3C, 29.2.1.1",
        (
            ((ept.maxphyaddr >= 32) & (ept.maxphyaddr <= 52), "MAXPHYADDR is 32 to 52"),
            (ept.mbec <= 1, "mode-based execute control is 0 or 1"),
            (eptp & ~low_bits(ept.maxphyaddr) == 0, "EPTP has no bits from MAXPHYADDR up"),
            (eptp & EPTP_RESERVED == 0, "EPTP bits 11:8 are reserved"),
            (
                (eptp & 7 == 0) & (has & UNCACHEABLE != 0)
                | (eptp & 7 == 6) & (has & WRITE_BACK != 0),
                "EPTP bits 2:0 are UC (0) or WB (6), as the capabilities allow",
            ),
            (
                (length == 3) & (has & WALK_4 != 0) | (length == 4) & (has & WALK_5 != 0),
                "EPTP bits 5:3 are 3 (4 levels) or 4 (5 levels), as the capabilities allow",
            ),
            (
                (eptp & EPTP_AD == 0) | (has & ACCESSED_DIRTY != 0),
                "EPTP bit 6 needs the capability of accessed and dirty flags",
            ),
            (
                (eptp & EPTP_SHADOW_STACK == 0) | (has & SHADOW_STACK != 0),
                "EPTP bit 7 needs the capability of supervisor shadow-stack control",
            ),
        ),
    )
    if eptp & EPTP_SHADOW_STACK:
        raise UnsupportedMode("EPTP bit 7 (supervisor shadow-stack control) is not specified here")


def require_possible_npt(npt: NptRegisters) -> None:
    """Check that VMRUN takes this state. Raises `ImpossibleState` or `UnsupportedMode`."""
    long_mode, lme = npt.efer & LMA != 0, npt.efer & LME != 0
    _require(
        "AMD APM Vol. 2, 15.25.3",
        (
            ((npt.maxphyaddr >= 32) & (npt.maxphyaddr <= 52), "MAXPHYADDR is 32 to 52"),
            (npt.ncr3 & ~ncr3_bits(npt) == 0, "nCR3 has no bits from MAXPHYADDR up, or above 31"),
            (npt.cr0 & PG != 0, "nested paging needs a host with CR0.PG"),
            (npt.cr0 & PE != 0, "CR0.PG needs CR0.PE"),
            (npt.cr0 & ~CR0_DEFINED == 0, "CR0 has no reserved bit set"),
            ((npt.cr0 & NW == 0) | (npt.cr0 & CD != 0), "CR0.NW needs CR0.CD"),
            (npt.cr4 & ~HOST_CR4_DEFINED == 0, "CR4 has no reserved bit set"),
            (npt.efer & ~HOST_EFER_DEFINED == 0, "EFER has no reserved bit set"),
            (long_mode == lme, "EFER.LMA is EFER.LME and CR0.PG"),
            ((npt.cr4 & PAE != 0) | (npt.efer & LMA == 0), "long mode needs CR4.PAE"),
            ((npt.cr4 & LA57 == 0) | (npt.efer & LMA != 0), "CR4.LA57 needs long mode"),
            ((npt.page1gb <= 1) & (npt.gmet <= 1), "page1gb and gmet are 0 or 1"),
        ),
    )
    if npt.gmet:
        raise UnsupportedMode("GMET (guest mode execute trap) is not specified here")


def ncr3_bits(npt: NptRegisters) -> Word:
    """The bits that nCR3 can have: below MAXPHYADDR, and in legacy modes below 32."""
    return low_bits(ite(npt.efer & LMA != 0, npt.maxphyaddr, 32))


def _require(source: str, rules: tuple[tuple[Condition, str], ...]) -> None:
    for holds, rule in rules:
        if not holds:
            raise ImpossibleState(f"{rule} ({source})")
