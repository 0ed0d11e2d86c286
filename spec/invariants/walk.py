"""Invariants of the 64-bit walk: what a translation is.

Each draws any control state, any memory and any access, and asks the subject.
"""

from typing import Any

from vapama.spec.cpu import LA57, Cpu
from vapama.spec.domains import ENTRY, Domain
from vapama.spec.memory import Watched
from vapama.spec.nondet import Nondet, invariant
from vapama.spec.outcomes import (
    RSVD,
    I,
    NonCanonical,
    OutsideMemory,
    P,
    PageFault,
    Translated,
    U,
    W,
    kind,
)
from vapama.spec.paging import (
    FRAME,
    PRESENT,
    USER,
    WRITABLE,
    address_width,
    page_offset,
    path,
    reserved_anywhere,
    reserved_at,
    translate,
)
from vapama.spec.subject import ERROR_CODE, LEVEL, LOADS, MANY, PA, agree
from vapama.spec.words import is_canonical, low_bits

ALL_KINDS = ("translated", "page fault", "non-canonical address", "entry outside memory")
DIFFERENCE = Domain(free=low_bits(21), scope=(0x1000, 0x1))


@invariant(
    source="Intel SDM Vol. 3A, 4.5 to 4.8",
    reaches=ALL_KINDS,
    equates=(translate, "translate"),
    twin="a-user-page-needs-only-its-leaf",
)
def the_walk_equals_the_reference(nondet: Nondet, subject: Any) -> None:
    """The subject has the reference's outcome, address, error code and flags set, always."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    expected = translate(cpu, memory, access)
    nondet.reach(kind(expected))
    observed = subject.translate(cpu, memory, access)
    assert agree(expected, observed, memory, subject.capabilities)


@invariant(
    source="Intel SDM Vol. 3A, 4.5.4 (figures 4-8 to 4-10)",
    reaches=("4-KByte page", "2-MByte page", "1-GByte page"),
    needs=(PA, LEVEL),
    twin="the-offset-loses-its-top-bit",
)
def a_translation_keeps_the_page_offset(nondet: Nondet, subject: Any) -> None:
    """The offset within the page is the same in the linear and in the physical address."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    outcome = subject.translate(cpu, memory, access)
    if isinstance(outcome, Translated):
        nondet.reach(("4-KByte page", "2-MByte page", "1-GByte page")[outcome.level - 1])
        assert (outcome.pa ^ access.address) & page_offset(outcome.level) == 0


@invariant(
    source="Intel SDM Vol. 3A, 4.1.4 and 4.5.4",
    reaches=("translated",),
    needs=(PA,),
    twin="maxphyaddr-is-one-more",
)
def a_physical_address_is_within_maxphyaddr(nondet: Nondet, subject: Any) -> None:
    """No translation leads to an address that the processor cannot put on its bus."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    outcome = subject.translate(cpu, memory, access)
    if isinstance(outcome, Translated):
        nondet.reach("translated")
        assert outcome.pa & ~low_bits(cpu.maxphyaddr) == 0


@invariant(
    source="Intel SDM Vol. 3A, 4.5.4",
    reaches=("five loads", "translated", "page fault"),
    needs=(LOADS,),
    twin="the-walk-reads-an-entry-twice",
)
def a_walk_ends_after_at_most_one_load_a_level(nondet: Nondet, subject: Any) -> None:
    """The walk is total: it ends in a known outcome and reads at most one entry at each level."""
    cpu, memory, access = nondet.cpu(), Watched(nondet.memory("guest")), nondet.access()
    outcome = subject.translate(cpu, memory, access)
    nondet.reach(kind(outcome))
    if len(memory.loads) == 5:
        nondet.reach("five loads")
    assert len(memory.loads) <= cpu.levels


@invariant(
    source="Intel SDM Vol. 1, 3.3.7.1; Vol. 3A, 4.5.3",
    reaches=("canonical", "not canonical"),
    twin="canonical-is-one-bit-short",
)
def just_the_canonical_addresses_are_walked(nondet: Nondet, subject: Any) -> None:
    """An address that is not canonical is refused before paging, and no other is."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    outcome = subject.translate(cpu, memory, access)
    if is_canonical(access.address, address_width(cpu.levels)):
        nondet.reach("canonical")
        assert not isinstance(outcome, NonCanonical)
    else:
        nondet.reach("not canonical")
        assert isinstance(outcome, NonCanonical)


@invariant(
    source="Intel SDM Vol. 3A, 4.7 (P flag)",
    reaches=("not present",),
    twin="a-missing-page-reports-present",
)
def an_entry_that_is_not_present_stops_the_walk(nondet: Nondet, subject: Any) -> None:
    """If the path ends in an entry with P=0 the access faults; the code lacks P unless a reserved
    bit was met before.
    """
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    nondet.assume(is_canonical(access.address, address_width(cpu.levels)))
    outcome = subject.translate(cpu, memory, access)
    steps = list(path(cpu, memory, access.address))
    if steps and steps[-1].entry & PRESENT == 0:
        nondet.reach("not present")
        assert isinstance(outcome, PageFault)
        if ERROR_CODE in subject.capabilities.observes:
            assert (outcome.error_code & P == 0) | (outcome.error_code & RSVD != 0)


@invariant(
    source="Intel SDM Vol. 3A, 4.7 (RSVD flag)",
    reaches=("reserved bit",),
    needs=(ERROR_CODE,),
    twin="a-reserved-bit-of-a-large-page-is-missed",
)
def a_reserved_bit_always_faults(nondet: Nondet, subject: Any) -> None:
    """A reserved bit set in a present entry on the path faults with RSVD, whatever comes after."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    nondet.assume(is_canonical(access.address, address_width(cpu.levels)))
    outcome = subject.translate(cpu, memory, access)
    for level, _, entry in path(cpu, memory, access.address):
        reserved = reserved_anywhere(cpu) | reserved_at(cpu, entry, level)
        if (entry & PRESENT != 0) & (entry & reserved != 0):
            nondet.reach("reserved bit")
            assert isinstance(outcome, PageFault)
            assert outcome.error_code & RSVD != 0
            return


@invariant(
    source="Intel SDM Vol. 3A, 4.7 (W/R, U/S and I/D flags)",
    reaches=("page fault",),
    needs=(ERROR_CODE,),
    twin="smep-alone-reports-no-fetch",
)
def a_page_fault_describes_its_access(nondet: Nondet, subject: Any) -> None:
    """W and U of the error code are the access's; I says fetch, if NXE or SMEP is on."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    outcome = subject.translate(cpu, memory, access)
    if isinstance(outcome, PageFault):
        nondet.reach("page fault")
        fetch = access.fetch & (cpu.nxe | cpu.smep)
        described = access.write * W | access.user * U | fetch * I
        assert outcome.error_code & (W | U | I) == described


@invariant(
    source="how a walk treats memory that is not there is the machine's; see spec/memory.py",
    reaches=("entry outside memory",),
    needs=(LOADS,),
    twin="the-limit-is-off-by-one",
)
def a_walk_never_reads_outside_memory(nondet: Nondet, subject: Any) -> None:
    """A table that memory does not hold ends the walk, and the entry that was wanted is named."""
    cpu, memory, access = nondet.cpu(), Watched(nondet.memory("guest")), nondet.access()
    outcome = subject.translate(cpu, memory, access)
    for address in memory.loads:
        assert address < memory.limit
    if isinstance(outcome, OutsideMemory):
        nondet.reach("entry outside memory")
        assert outcome.address >= memory.limit


@invariant(
    source="Intel SDM Vol. 3A, 4.5.2 and 4.5.3",
    reaches=("translated", "page fault"),
    twin="five-levels-start-at-four",
)
def five_levels_with_top_index_zero_equal_four(nondet: Nondet, subject: Any) -> None:
    """An address with bits 63:47 zero translates alike with 4 levels, and with 5 whose first PML5E
    names the same PML4 and removes no rights.
    """
    four, access = nondet.cpu(), nondet.access()
    nondet.assume((four.cr4 & LA57 == 0) & (access.address >> 47 == 0))
    pml5 = nondet.word("pml5", ENTRY) & FRAME & low_bits(four.maxphyaddr)
    five = Cpu._make(four._replace(cr3=pml5, cr4=four.cr4 | LA57))
    pml5e = four.cr3 & FRAME | USER | WRITABLE | PRESENT
    memory = nondet.memory("guest", given=[(pml5, pml5e)])
    ours, theirs = subject.translate(four, memory, access), subject.translate(five, memory, access)
    nondet.reach(kind(ours))
    assert type(ours) is type(theirs)
    if isinstance(ours, Translated) and isinstance(theirs, Translated):
        assert (ours.pa == theirs.pa) & (ours.level == theirs.level)
    if isinstance(ours, PageFault) and isinstance(theirs, PageFault):
        assert ours.error_code == theirs.error_code


@invariant(
    source="the batch kernel is the scalar walk, address by address",
    reaches=("translated", "page fault"),
    needs=(MANY, PA, ERROR_CODE),
    twin="the-batch-shares-its-first-result",
    bound="batches of 2 addresses that differ in bits 20:0, one of them twice, in groups of 2",
    in_parts=True,
)
def translate_many_equals_the_walk_elementwise(nondet: Nondet, subject: Any) -> None:
    """Each outcome of a batch is that of the same address alone."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    other = access.address ^ nondet.word("difference", DIFFERENCE)
    addresses = [access.address, other, other]
    alone = [subject.translate(cpu, memory, access._replace(address=a)) for a in addresses]
    batch = subject.translate_many(cpu, memory, addresses, access)
    assert len(batch) == len(addresses)
    for one, many in zip(alone, batch, strict=True):
        nondet.reach(kind(one))
        assert type(one) is type(many)
        if isinstance(one, Translated):
            assert (one.pa == many.pa) & (one.level == many.level)
        elif isinstance(one, PageFault):
            assert one.error_code == many.error_code
        elif isinstance(one, OutsideMemory):
            assert one.address == many.address
