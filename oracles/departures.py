"""Known departures of emulators from the manual: each named, sourced, and told from anything else.

A disagreement is classified, never ignored. One that is not here fails; a departure that has gone
fails a test (tests/oracles), so that the list stays true.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from vapama.spec.access import Access
from vapama.spec.cpu import Cpu
from vapama.spec.memory import Memory
from vapama.spec.outcomes import RSVD, I, Outcome, OutsideMemory, P, PageFault, Translated, U, W
from vapama.spec.subject import Capabilities, agree

ACCESSED, PAGE_SIZE = 1 << 5, 1 << 7


@dataclass(frozen=True)
class Disagreement:
    """A case in which a subject did not do what the reference says."""

    cpu: Cpu
    memory: Memory
    access: Access
    expected: Outcome
    observed: Outcome
    capabilities: Capabilities

    def is_just(self, instead: Outcome) -> bool:
        """Whether the reference would agree with this outcome in place of the observed one."""
        return bool(agree(self.expected, instead, self.memory, self.capabilities))

    @property
    def describing(self) -> int:
        """The error-code bits that describe the access: SDM Vol. 3A, 4.7."""
        fetch = self.access.fetch & (self.cpu.nxe & self.cpu.cr4 >> 5 | self.cpu.smep)
        return self.access.write * W | self.access.user * U | fetch * I


@dataclass(frozen=True)
class Departure:
    """A departure by name: what it is, what decides (or that nothing does), and who shows it."""

    name: str
    what: str
    source: str
    shows: Callable[[Disagreement], bool]


def _lacks_p(found: Disagreement) -> bool:
    """A reserved-bit fault without P."""
    observed = found.observed
    if not isinstance(observed, PageFault) or observed.error_code & (P | RSVD) != RSVD:
        return False
    return found.is_just(replace(observed, error_code=observed.error_code | P))


def _marks_reserved(found: Disagreement) -> bool:
    """The same, and the large page that has the reserved bit is marked accessed."""
    observed = found.observed
    if not isinstance(observed, PageFault) or observed.error_code & (P | RSVD) != RSVD:
        return False
    whole = replace(observed, error_code=observed.error_code | P)
    for update in observed.may_update:
        entry = found.memory.load(update.address)
        others = tuple(u for u in observed.may_update if u != update)
        marked = entry & PAGE_SIZE and update.bits == ACCESSED
        if marked and found.is_just(replace(whole, may_update=others)):
            return True
    return False


def _reads(found: Disagreement, code: int) -> bool:
    """A page fault with this error code where the walk leaves memory."""
    observed, expected = found.observed, found.expected
    if not isinstance(expected, OutsideMemory) or not isinstance(observed, PageFault):
        return False
    beyond = OutsideMemory(expected.address, observed.may_update)
    return observed.error_code == found.describing | code and found.is_just(beyond)


def _reads_ones(found: Disagreement) -> bool:
    """As if ones were read where the walk leaves memory: as an entry of 8 bytes they have reserved
    bits set, as one of 4 bytes they may map a page, or what is left of one whose rights are above.
    """
    if _reads(found, P | RSVD):
        return True
    if found.cpu.mode.entry_bytes != 4:
        return False
    if isinstance(found.observed, Translated) and isinstance(found.expected, OutsideMemory):
        return found.is_just(OutsideMemory(found.expected.address, found.observed.updates))
    return _reads(found, P)


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

QEMU = (RESERVED_LACKS_P, RESERVED_IS_MARKED, OUTSIDE_READS_0)
BOCHS = (OUTSIDE_READS_ONES,)


def named(known: tuple[Departure, ...], found: Disagreement) -> str | None:
    """The name of the departure that this disagreement is; None if it is not a known one."""
    for departure in known:
        if departure.shows(found):
            return departure.name
    return None
