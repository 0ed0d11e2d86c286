"""Known departures of emulators from the manual: each named, sourced, and told from anything else.

A disagreement is classified, never ignored. One that is not here fails; a departure that has gone
fails a test (tests/oracles), so that the list stays true.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from vapama.spec.access import Access
from vapama.spec.cpu import Cpu
from vapama.spec.memory import Memory, Sparse
from vapama.spec.outcomes import (
    RSVD,
    EptMisconfiguration,
    EptViolation,
    GeneralProtection,
    I,
    NestedPageFault,
    NonCanonical,
    Outcome,
    OutsideMemory,
    P,
    PageFault,
    Translated,
    U,
    Update,
    W,
)
from vapama.spec.subject import Capabilities, agree

ACCESSED, PAGE_SIZE, BIT_8, BIT_12 = 1 << 5, 1 << 7, 1 << 8, 1 << 12
LOW_32 = (1 << 32) - 1


@dataclass(frozen=True)
class Disagreement:
    """A case in which a subject did not do what the reference says.

    `entry_bytes` is the size of the entries, `describing` what an error code says of the access
    (SDM Vol. 3A, 4.7) but for its `open_bits`, `reference` what the reference says of another
    memory.
    """

    memory: Memory
    expected: Outcome
    observed: Outcome
    capabilities: Capabilities
    entry_bytes: int
    describing: int
    reference: Callable[[Memory], Outcome] | None = None
    open_bits: int = 0

    def is_just(self, instead: Outcome) -> bool:
        """Whether the reference would agree with this outcome in place of the observed one."""
        return bool(agree(self.expected, instead, self.memory, self.capabilities))

    @property
    def code(self) -> int:
        """The error code observed, of a page fault or a nested one; else 0."""
        match self.observed:
            case PageFault():
                return self.observed.error_code
            case NestedPageFault():
                return self.observed.exitinfo1
        return 0

    def with_code(self, code: int) -> "Disagreement":
        """The same with another error code observed."""
        match self.observed:
            case PageFault():
                return replace(self, observed=replace(self.observed, error_code=code))
            case NestedPageFault():
                return replace(self, observed=replace(self.observed, exitinfo1=code))
        return self

    @property
    def updates(self) -> tuple[Update, ...]:
        """The flags observed to be set."""
        match self.observed:
            case Translated():
                return self.observed.updates
            case NonCanonical() | GeneralProtection():
                return ()
        return self.observed.may_update


def described(cpu: Cpu, access: Access) -> int:
    """The error-code bits that describe an access to a linear address: SDM Vol. 3A, 4.7."""
    fetch = access.fetch & (cpu.nxe & cpu.cr4 >> 5 | cpu.smep)
    return access.write * W | access.user * U | fetch * I


@dataclass(frozen=True)
class Departure:
    """A departure by name: what it is, what decides (or that nothing does), and who shows it."""

    name: str
    what: str
    source: str
    shows: Callable[[Disagreement], bool]


def _lacks_p(found: Disagreement) -> bool:
    """A reserved-bit fault without P."""
    if found.code & (P | RSVD) != RSVD:
        return False
    whole = found.with_code(found.code | P)
    return whole.is_just(whole.observed)


def _marks_reserved(found: Disagreement) -> bool:
    """The same, and the large page that has the reserved bit is marked accessed."""
    observed = found.with_code(found.code | P).observed
    if found.code & (P | RSVD) != RSVD or not isinstance(observed, PageFault | NestedPageFault):
        return False
    for update in observed.may_update:
        entry = found.memory.load(update.address)
        others = tuple(u for u in observed.may_update if u != update)
        marked = entry & PAGE_SIZE and update.bits == ACCESSED
        if marked and found.is_just(replace(observed, may_update=others)):
            return True
    return False


def _ignores_bit_8(found: Disagreement) -> bool:
    """Bit 8 of a nested PML4E (or PML5E) is not checked: all is as if it were 0, or departs
    otherwise.
    """
    if found.reference is None or not isinstance(found.expected, NestedPageFault):
        return False
    memory = found.memory
    if not isinstance(memory, Sparse) or not found.expected.exitinfo1 & RSVD:
        return False
    # The walk's second entry is a PDPTE if there are 4 levels: of that the bit is ignored anyhow.
    upper = {at: entry & ~BIT_8 for at, entry in list(memory.touched.items())[:2]}
    if all(memory.touched[at] == entry for at, entry in upper.items()):
        return False
    without = Sparse(memory.touched | upper, memory.limit)
    instead = replace(found, memory=without, expected=found.reference(without), reference=None)
    return instead.is_just(found.observed) or named(QEMU, instead) is not None


def _ignores_bit_12(found: Disagreement) -> bool:
    """Bit 12 of an EPT entry that maps a large page is not checked: all is as if it were 0."""
    if found.reference is None or not isinstance(found.expected, EptMisconfiguration):
        return False
    if not isinstance(found.memory, Sparse) or not found.memory.touched:
        return False
    where, entry = list(found.memory.touched.items())[-1]
    if entry & (PAGE_SIZE | BIT_12) != PAGE_SIZE | BIT_12:
        return False
    without = Sparse({**found.memory.touched, where: entry & ~BIT_12}, found.memory.limit)
    instead = replace(found, memory=without, expected=found.reference(without), reference=None)
    return instead.is_just(found.observed)


def _reads(found: Disagreement, code: int) -> bool:
    """A fault with this code where the walk leaves memory."""
    if not isinstance(found.expected, OutsideMemory):
        return False
    if not isinstance(found.observed, PageFault | NestedPageFault):
        return False
    wrong = (found.code & LOW_32 ^ (found.describing | code)) & ~found.open_bits
    return not wrong and found.is_just(OutsideMemory(found.expected.address, found.updates))


def _reads_ones(found: Disagreement) -> bool:
    """As if ones were read where the walk leaves memory: as an entry of 8 bytes they have reserved
    bits set, as one of 4 bytes they may map a page, or what is left of one whose rights are above.
    """
    if not isinstance(found.expected, OutsideMemory):
        return False
    beyond = OutsideMemory(found.expected.address, found.updates)
    if isinstance(found.observed, EptMisconfiguration):
        return found.is_just(beyond)
    if _reads(found, P | RSVD):
        return True
    if found.entry_bytes != 4:
        return False
    return _reads(found, P) or (isinstance(found.observed, Translated) and found.is_just(beyond))


RESERVED_LACKS_P = Departure(
    "reserved-bit-fault-lacks-p",
    "a page fault for a reserved bit has P=0 in its error code, though every entry was present",
    "SDM Vol. 3A, 4.7: P is 0 only if a P flag was 0. "
    "QEMU 7.2, target/i386/tcg/sysemu/excp_helper.c, mmu_translate, do_fault_rsvd",
    _lacks_p,
)
RESERVED_IS_MARKED = Departure(
    "reserved-large-page-is-marked-accessed",
    "besides, the accessed flag of an entry that maps a large page and has a reserved bit set is "
    "found set; an entry that faults so translates nothing",
    "SDM Vol. 3A, 4.8. QEMU 7.2, target/i386/tcg/sysemu/excp_helper.c, mmu_translate",
    _marks_reserved,
)
BIT_8_IS_IGNORED = Departure(
    "nested-pml4e-bit-8-is-not-reserved",
    "bit 8 of a PML4E or PML5E is not checked; in nested page tables, which have AMD's format, it "
    "must be 0",
    "APM Vol. 2, 5.3.3, figures of the PML4E and PML5E (MBZ); KVM, arch/x86/kvm/mmu/mmu.c, "
    "nonleaf_bit8_rsvd. QEMU 7.2, target/i386/tcg/sysemu/excp_helper.c, mmu_translate; Bochs 2.7, "
    "cpu/paging.cc",
    _ignores_bit_8,
)
BIT_12_IS_IGNORED = Departure(
    "ept-large-page-bit-12-is-not-reserved",
    "bit 12 of an EPT entry that maps a 2-MByte or 1-GByte page is not checked; it must be 0",
    "SDM Vol. 3C, tables 31-3 and 31-5: bits 20:12 and 29:12 are reserved. "
    "Bochs 2.7, cpu/paging.cc, translate_guest_physical: the mask of the legacy tables, where the "
    "bit is PAT",
    _ignores_bit_12,
)
OUTSIDE_READS_0 = Departure(
    "table-outside-memory-reads-0",
    "where there is no memory a table reads as entries that are not present",
    "what a machine reads there is its own, see spec/memory.py",
    lambda found: _reads(found, 0),
)
OUTSIDE_READS_ONES = Departure(
    "table-outside-memory-reads-ones",
    "where there is no memory a table reads as ones",
    "what a machine reads there is its own, see spec/memory.py",
    _reads_ones,
)


def _reads_tables_by_writing(found: Disagreement) -> bool:
    """An EPT violation of an access to a guest's table, with EPT's accessed and dirty flags, is
    said to be a write alone.
    """
    expected, observed = found.expected, found.observed
    if not isinstance(expected, EptViolation) or not isinstance(observed, EptViolation):
        return False
    # A table, not the page: bit 8 is 0 with bit 7.
    is_table = expected.qualification & (3 | LINEAR | PAGE) == 3 | LINEAR
    return is_table and found.is_just(replace(observed, qualification=observed.qualification | 1))


LINEAR, PAGE = 1 << 7, 1 << 8
TABLE_IS_NO_READ = Departure(
    "ept-violation-of-a-table-is-no-read",
    "with accessed and dirty flags for EPT, the qualification of a violation by an access to a "
    "guest's table lacks bit 0 (read); bits 0 and 1 must both be set",
    "SDM Vol. 3C, table 30-7, note on bits 0 and 1. Bochs 2.7, cpu/paging.cc",
    _reads_tables_by_writing,
)

FLAGS_IN_READ_ONLY = Departure(
    "guest-flags-are-set-in-read-only-ept-pages",
    "without accessed and dirty flags for EPT, an accessed or dirty flag of the guest is set in a "
    "page that EPT does not let it write; that is an EPT violation",
    "SDM Vol. 3C, 31.3.3.2. Bochs 2.7, cpu/paging.cc, update_access_dirty",
    lambda found: False,  # told by the reference without these writes, in a case of both stages
)

PDPTE_RESERVED = 0x1E6
"""Bits 8:5, 2:1."""
PDPTE_IS_CARELESS = Departure(
    "nested-pdpte-of-a-pae-host-is-marked-accessed",
    "in nested page tables of a host in PAE paging, bits 8:5 and 2:1 of a PDPTE are not checked, "
    "though they must be 0, and bit 5 is set as if it were an accessed flag",
    "APM Vol. 2, 5.2.3, figure of the PDPE (MBZ). QEMU 7.2, target/i386/tcg/sysemu/excp_helper.c, "
    "mmu_translate",
    lambda found: False,  # told by the reference of a PDPTE without them
)

QEMU = (
    RESERVED_LACKS_P,
    RESERVED_IS_MARKED,
    OUTSIDE_READS_0,
    BIT_8_IS_IGNORED,
    PDPTE_IS_CARELESS,
)
BOCHS = (OUTSIDE_READS_ONES, BIT_12_IS_IGNORED, TABLE_IS_NO_READ, FLAGS_IN_READ_ONLY)
BOCHS_OF_AMD = (OUTSIDE_READS_ONES, BIT_8_IS_IGNORED)
"""Those of the models with SVM."""


def named(known: tuple[Departure, ...], found: Disagreement) -> str | None:
    """The name of the departure that this disagreement is; None if it is not a known one."""
    for departure in known:
        if departure.shows(found):
            return departure.name
    return None
