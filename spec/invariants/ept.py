"""Invariants of extended page tables: the walk, its rights, and what its exits say."""

from typing import Any

from vapama.spec.domains import ANY, EPT_ENTRY, EPTP_ROOT, Domain
from vapama.spec.ept import (
    ACCESSED,
    DATA_READ,
    DATA_WRITE,
    DIRTY,
    EXECUTE,
    FETCH,
    LINEAR_VALID,
    MEMORY_TYPE,
    READ,
    RIGHTS,
    SHADOW_STACK_ACCESS,
    TRANSLATION,
    USER_EXECUTE,
    WRITE,
    is_misconfigured,
    maps_a_page,
    path,
    present_bits,
    reserved_at,
    translate,
)
from vapama.spec.memory import Altered, Marked, Watched
from vapama.spec.nondet import Nondet, invariant
from vapama.spec.outcomes import (
    EptMisconfiguration,
    EptViolation,
    OutsideMemory,
    Translated,
    kind,
)
from vapama.spec.paging import FRAME, Step, page_offset
from vapama.spec.stage import Ept
from vapama.spec.subject import (
    ERROR_CODE,
    LEVEL,
    LOADS,
    PA,
    SECOND_STAGE,
    SECOND_STAGE_MANY,
    UPDATES,
    agree,
)
from vapama.spec.words import Condition, Word, low_bits

DIFFERENCE = Domain(free=(1 << 21) - 1, scope=(0, 0x1000))
IGNORED = ACCESSED | DIRTY | 1 << 11 | 0xFFF << 52
"""Bits of any EPT entry that decide nothing here: A, D, bit 11 and bits 63:52."""


def _over_the_path(steps: list[Step]) -> Word:
    """The AND of the entries on a path."""
    every = RIGHTS
    for step in steps:
        every = every & step.entry
    return every


@invariant(
    source="Intel SDM Vol. 3C, 31.3.2, 31.3.3, 31.3.5 and table 30-7",
    reaches=("translated", "EPT violation", "EPT misconfiguration", "entry outside memory"),
    needs=(SECOND_STAGE,),
    equates=(translate, SECOND_STAGE),
    twin="ept-rights-come-from-the-leaf",
)
def the_ept_walk_equals_the_reference(nondet: Nondet, subject: Any) -> None:
    """The subject's outcome of an EPT walk is one that the reference allows."""
    ept, memory = nondet.ept(), nondet.memory("host", entries=EPT_ENTRY)
    access = nondet.guest_physical_access()
    expected = translate(ept, memory, access)
    observed = subject.second_stage(ept, memory, access)
    nondet.reach(kind(expected))
    assert agree(expected, observed, memory, subject.capabilities)


@invariant(
    source="Intel SDM Vol. 3C, 31.3.3.2",
    reaches=("read", "write", "fetch", "user fetch with mode-based execute control"),
    needs=(SECOND_STAGE,),
    twin="ept-fetches-follow-bit-2-alone",
)
def every_ept_entry_must_allow_the_access(nondet: Nondet, subject: Any) -> None:
    """A read translates only if R is 1 in every entry on the path, a write if W is, a fetch if X
    is; with mode-based execute control, a fetch from a user-mode address if bit 10 is.
    """
    ept, memory = nondet.ept(), nondet.memory("host", entries=EPT_ENTRY)
    access = nondet.guest_physical_access()
    if isinstance(subject.second_stage(ept, memory, access), Translated):
        every = _over_the_path(list(path(ept, memory, access.address)))
        if access.write == 1:
            nondet.reach("write")
            assert every & WRITE != 0
        elif access.fetch == 0:
            nondet.reach("read")
            assert every & READ != 0
        elif ept.mbec & access.user == 1:
            nondet.reach("user fetch with mode-based execute control")
            assert every & USER_EXECUTE != 0
        else:
            nondet.reach("fetch")
            assert every & EXECUTE != 0


@invariant(
    source="Intel SDM Vol. 3C, 31.3.3.2 and 31.3.5 (EPTP bit 6)",
    reaches=("written", "read"),
    needs=(SECOND_STAGE,),
    twin="ept-tables-are-only-read",
)
def with_ept_flags_a_guest_table_needs_a_writable_page(nondet: Nondet, subject: Any) -> None:
    """With accessed and dirty flags for EPT, an access to a guest's table for the walk of a linear
    address translates only if W is 1 in every entry; a load of PDPTEs needs no W.
    """
    ept, memory = nondet.ept(), nondet.memory("host", entries=EPT_ENTRY)
    access = nondet.guest_physical_access()
    nondet.assume((access.table == 1) & (access.write == 0) & (ept.ad == 1))
    if isinstance(subject.second_stage(ept, memory, access), Translated):
        every = _over_the_path(list(path(ept, memory, access.address)))
        if every & WRITE != 0:
            nondet.reach("written")
        else:
            nondet.reach("read")
            assert access.linear == 0


def _misconfigures(nondet: Nondet, subject: Any, wrong: Any, label: str = "misconfigured") -> None:
    """A present entry on the path that is `wrong` ends the walk in a misconfiguration."""
    ept, memory = nondet.ept(), nondet.memory("host", entries=EPT_ENTRY)
    access = nondet.guest_physical_access()
    nondet.assume(access.address >> 48 == 0)
    outcome = subject.second_stage(ept, memory, access)
    for step in path(ept, memory, access.address):
        if (step.entry & present_bits(ept) != 0) & wrong(ept, step):
            nondet.reach(label)
            assert isinstance(outcome, EptMisconfiguration)
            assert outcome.gpa == access.address
            return


@invariant(
    source="Intel SDM Vol. 3C, 31.3.3.1",
    reaches=("misconfigured",),
    needs=(SECOND_STAGE,),
    twin="ept-takes-write-only-entries",
)
def an_ept_entry_never_allows_writes_without_reads(nondet: Nondet, subject: Any) -> None:
    """W=1 with R=0, in any entry on the path, is a misconfiguration."""
    _misconfigures(nondet, subject, lambda ept, step: step.entry & (READ | WRITE) == WRITE)


@invariant(
    source="Intel SDM Vol. 3C, 31.3.3.1",
    reaches=("misconfigured",),
    needs=(SECOND_STAGE,),
    twin="ept-execute-only-needs-no-capability",
)
def an_execute_only_ept_entry_needs_the_capability(nondet: Nondet, subject: Any) -> None:
    """X=1 (or, with mode-based execute control, bit 10) with R=0 is a misconfiguration where
    execute-only translations are not supported.
    """

    def wrong(ept: Ept, step: Step) -> Any:
        fetchable = EXECUTE | ept.mbec * USER_EXECUTE
        unreadable = (step.entry & READ == 0) & (step.entry & fetchable != 0)
        return unreadable & (ept.execute_only == 0)

    _misconfigures(nondet, subject, wrong)


@invariant(
    source="Intel SDM Vol. 3C, 31.3.3.1 and tables 31-1 to 31-7",
    reaches=("misconfigured",),
    needs=(SECOND_STAGE,),
    twin="ept-large-pages-ignore-bit-12",
)
def a_reserved_bit_of_an_ept_entry_is_a_misconfiguration(nondet: Nondet, subject: Any) -> None:
    """A reserved bit set in a present entry on the path is a misconfiguration, whatever comes
    after, and whatever the access.
    """
    _misconfigures(
        nondet,
        subject,
        lambda ept, step: step.entry & reserved_at(ept, step.entry, step.level) != 0,
    )


@invariant(
    source="Intel SDM Vol. 3C, 31.3.3.1 and 31.3.7.2",
    reaches=("misconfigured",),
    needs=(SECOND_STAGE,),
    twin="ept-memory-type-7-exists",
)
def an_ept_page_has_a_memory_type(nondet: Nondet, subject: Any) -> None:
    """Types 2, 3 and 7 in bits 5:3 of an entry that maps a page are a misconfiguration."""

    def wrong(ept: Ept, step: Step) -> Any:
        memory_type = (step.entry & MEMORY_TYPE) >> 3
        return (memory_type == 2) | (memory_type == 3) | (memory_type == 7)

    _misconfigures(
        nondet,
        subject,
        lambda ept, step: wrong(ept, step) if maps_a_page(step.entry, step.level) else False,
    )


@invariant(
    source="Intel SDM Vol. 3C, 31.3.3.3",
    reaches=("violation",),
    needs=(SECOND_STAGE,),
    twin="ept-absent-entries-are-checked",
)
def an_absent_ept_entry_is_a_violation_whatever_else_it_holds(nondet: Nondet, subject: Any) -> None:
    """If all entries on the path are well-formed up to one that is not present, the walk ends in a
    violation there, which reports no rights, though its other bits be such as no entry may have.
    """
    ept, memory = nondet.ept(), nondet.memory("host", entries=EPT_ENTRY)
    access = nondet.guest_physical_access()
    nondet.assume(access.address >> 48 == 0)
    nondet.assume(ept.eptp & FRAME < memory.limit)
    outcome = subject.second_stage(ept, memory, access)
    *before, last = path(ept, memory, access.address)
    if last.entry & present_bits(ept) == 0:
        wrong: Condition = False
        for step in before:
            wrong = wrong | is_misconfigured(ept, step.entry, step.level)
        nondet.assume(not wrong)
        nondet.reach("violation")
        assert isinstance(outcome, EptViolation)
        assert outcome.gpa == access.address
        assert outcome.qualification >> 3 & 7 == 0


@invariant(
    source="Intel SDM Vol. 3C, 31.3.2",
    reaches=("violation",),
    needs=(SECOND_STAGE, ERROR_CODE),
    twin="ept-ignores-the-top-of-an-address",
)
def four_ept_levels_translate_48_bits(nondet: Nondet, subject: Any) -> None:
    """With 4 levels, an address with a bit from 48 up set is a violation without rights."""
    ept, memory = nondet.ept(), nondet.memory("host", entries=EPT_ENTRY)
    access = nondet.guest_physical_access()
    nondet.assume((access.address >> 48 != 0) & (ept.eptp >> 3 & 7 == 3))
    nondet.reach("violation")
    outcome = subject.second_stage(ept, memory, access)
    assert isinstance(outcome, EptViolation)
    assert outcome.qualification >> 3 & 7 == 0


@invariant(
    source="Intel SDM Vol. 3C, table 30-7 (bits 2:0, 7, 8 and 13) and its note 1",
    reaches=("final", "table", "table as a write"),
    needs=(SECOND_STAGE, ERROR_CODE),
    twin="ept-table-writes-report-no-read",
)
def an_ept_violation_describes_its_access(nondet: Nondet, subject: Any) -> None:
    """The qualification says read, write or fetch, linear and final or table, as the access was;
    an access to a table that counts as a write says read and write.
    """
    ept, memory = nondet.ept(), nondet.memory("host", entries=EPT_ENTRY)
    access = nondet.guest_physical_access()
    nondet.assume((access.table == 0) | (access.write == 0))
    outcome = subject.second_stage(ept, memory, access)
    if isinstance(outcome, EptViolation):
        linear = access.linear * LINEAR_VALID
        if (access.table == 1) & (access.linear == 1) & (ept.ad == 1):
            nondet.reach("table as a write")
            described = DATA_READ | DATA_WRITE | linear
        elif access.table == 1:
            nondet.reach("table")
            described = DATA_READ | linear
        else:
            nondet.reach("final")
            read = (access.write | access.fetch) ^ 1
            described = read * DATA_READ | access.write * DATA_WRITE | access.fetch * FETCH
            described = described | linear | access.linear * TRANSLATION
        described = described | access.shadow_stack * SHADOW_STACK_ACCESS
        about = DATA_READ | DATA_WRITE | FETCH | LINEAR_VALID | TRANSLATION | SHADOW_STACK_ACCESS
        assert outcome.qualification & about == described


@invariant(
    source="Intel SDM Vol. 3C, table 30-7 (bits 6:3) and its note 2",
    reaches=("denied by rights",),
    needs=(SECOND_STAGE, ERROR_CODE),
    twin="ept-reports-the-leaf-s-rights",
)
def an_ept_violation_reports_the_rights_of_its_path(nondet: Nondet, subject: Any) -> None:
    """Bits 5:3 are the AND of R, W and X over the path that reached a page, and with mode-based
    execute control bit 6 that of bit 10.
    """
    ept, memory = nondet.ept(), nondet.memory("host", entries=EPT_ENTRY)
    access = nondet.guest_physical_access()
    outcome = subject.second_stage(ept, memory, access)
    if isinstance(outcome, EptViolation):
        steps = list(path(ept, memory, access.address))
        nondet.assume(len(steps) > 0 and access.address >> 48 == 0)
        last = steps[-1]
        if maps_a_page(last.entry, last.level) and last.entry & present_bits(ept) != 0:
            nondet.reach("denied by rights")
            every = _over_the_path(steps)
            assert outcome.qualification >> 3 & 7 == every & 7
            assert outcome.qualification >> 6 & ept.mbec == every >> 10 & ept.mbec


@invariant(
    source="Intel SDM Vol. 3C, tables 31-1 to 31-7 (Ignored)",
    reaches=("translated", "EPT violation", "EPT misconfiguration"),
    needs=(SECOND_STAGE, PA, ERROR_CODE, LEVEL),
    twin="ept-suppress-ve-is-reserved",
)
def bits_that_ept_ignores_change_nothing(nondet: Nondet, subject: Any) -> None:
    """Toggling bits 8, 9, 11 and 63:52, and without mode-based execute control bit 10, in every
    entry leaves the outcome as it is.
    """
    ept, memory = nondet.ept(), nondet.memory("host", entries=EPT_ENTRY)
    access = nondet.guest_physical_access()
    ignored = IGNORED | (ept.mbec ^ 1) << 10
    other = Altered(memory, nondet.word("toggled", ANY) & ignored)
    first = subject.second_stage(ept, memory, access)
    second = subject.second_stage(ept, other, access)
    nondet.reach(kind(first))
    assert type(first) is type(second)
    if isinstance(first, Translated):
        assert (first.pa == second.pa) & (first.level == second.level)
    if isinstance(first, EptViolation):
        assert first.qualification == second.qualification


@invariant(
    source="Intel SDM Vol. 3C, 31.3.5",
    reaches=("write", "table", "no write", "without flags"),
    needs=(SECOND_STAGE, UPDATES),
    twin="ept-reads-set-dirty",
)
def an_ept_translation_marks_each_entry_it_used(nondet: Nondet, subject: Any) -> None:
    """With EPTP bit 6 a translated access sets A in each entry on its path, in order, and D in the
    last of them if it is a write, or of a guest's table; without, no bit of any entry.
    """
    ept, memory = nondet.ept(), nondet.memory("host", entries=EPT_ENTRY)
    access = nondet.guest_physical_access()
    outcome = subject.second_stage(ept, memory, access)
    if not isinstance(outcome, Translated):
        return
    if ept.ad == 0:
        nondet.reach("without flags")
        assert outcome.updates == ()
        return
    dirty = access.write | access.table & access.linear
    if access.table & access.linear == 1:
        nondet.reach("table")
    else:
        nondet.reach("write" if access.write == 1 else "no write")
    steps = list(path(ept, memory, access.address))
    assert len(outcome.updates) == len(steps)
    for step, (address, bits) in zip(steps, outcome.updates, strict=True):
        assert address == step.address
        assert bits == (ACCESSED | dirty * DIRTY if step.level == outcome.level else ACCESSED)


@invariant(
    source="Intel SDM Vol. 3C, 31.3.5; which accessed flags a faulting walk sets is left open",
    reaches=("EPT violation", "EPT misconfiguration"),
    needs=(SECOND_STAGE, UPDATES),
    twin="ept-marks-a-denied-page-dirty",
)
def an_ept_exit_sets_at_most_accessed_flags_on_its_path(nondet: Nondet, subject: Any) -> None:
    """A walk that ends in an exit sets no D, and A at most in well-formed entries that it used,
    and only with EPTP bit 6.
    """
    ept, memory = nondet.ept(), nondet.memory("host", entries=EPT_ENTRY)
    access = nondet.guest_physical_access()
    outcome = subject.second_stage(ept, memory, access)
    if isinstance(outcome, EptViolation | EptMisconfiguration):
        nondet.reach(kind(outcome))
        allowed = translate(ept, memory, access)
        assert isinstance(allowed, EptViolation | EptMisconfiguration)
        assert len(outcome.may_update) <= len(allowed.may_update)
        for update, may in zip(outcome.may_update, allowed.may_update, strict=False):
            assert (update.address == may.address) & (update.bits & ~may.bits == 0)


@invariant(
    source="Intel SDM Vol. 3C, 31.3.5 (the flags are sticky, and no walk consults them)",
    reaches=("translated",),
    needs=(SECOND_STAGE, UPDATES, PA),
    twin="ept-denies-dirty-pages",
)
def marking_changes_no_later_ept_walk(nondet: Nondet, subject: Any) -> None:
    """The same access again, after the flags were set in memory, has the same outcome."""
    ept, memory = nondet.ept(), nondet.memory("host", entries=EPT_ENTRY)
    access = nondet.guest_physical_access()
    first = subject.second_stage(ept, memory, access)
    if isinstance(first, Translated):
        nondet.reach("translated")
        again = subject.second_stage(ept, Marked(memory, first.updates), access)
        assert isinstance(again, Translated)
        assert again.pa == first.pa


@invariant(
    source="Intel SDM Vol. 3C, tables 31-3, 31-5 and 31-7",
    reaches=("4-KByte page", "2-MByte page", "1-GByte page"),
    needs=(SECOND_STAGE, PA, LEVEL),
    twin="ept-loses-a-bit-of-the-offset",
)
def an_ept_page_keeps_the_offset_and_the_bus(nondet: Nondet, subject: Any) -> None:
    """The offset within the page is the guest-physical address's, and no translation leads to an
    address of more than MAXPHYADDR bits.
    """
    ept, memory = nondet.ept(), nondet.memory("host", entries=EPT_ENTRY)
    access = nondet.guest_physical_access()
    outcome = subject.second_stage(ept, memory, access)
    if isinstance(outcome, Translated):
        nondet.reach(("4-KByte page", "2-MByte page", "1-GByte page")[outcome.level - 1])
        assert (outcome.pa ^ access.address) & page_offset(outcome.level) == 0
        assert outcome.pa & ~low_bits(ept.maxphyaddr) == 0


@invariant(
    source="Intel SDM Vol. 3C, 31.3.2; what a walk reads where there is no memory is the machine's",
    reaches=("five loads", "entry outside memory"),
    needs=(SECOND_STAGE, LOADS),
    twin="ept-reads-an-entry-twice",
)
def an_ept_walk_reads_one_entry_a_level_and_none_outside_memory(
    nondet: Nondet, subject: Any
) -> None:
    """The walk is total: at most one load a level, none at or beyond the limit, and a table that
    memory does not hold ends it with the entry that was wanted.
    """
    ept, memory = nondet.ept(), Watched(nondet.memory("host", entries=EPT_ENTRY))
    access = nondet.guest_physical_access()
    outcome = subject.second_stage(ept, memory, access)
    if len(memory.loads) == 5:
        nondet.reach("five loads")
    assert len(memory.loads) <= ept.levels
    for address in memory.loads:
        assert address < memory.limit
    if isinstance(outcome, OutsideMemory):
        nondet.reach("entry outside memory")
        assert outcome.address >= memory.limit


@invariant(
    source="Intel SDM Vol. 3C, 31.3.2",
    reaches=("translated", "EPT violation", "EPT misconfiguration"),
    needs=(SECOND_STAGE,),
    twin="five-ept-levels-start-at-four",
)
def five_ept_levels_with_top_index_zero_equal_four(nondet: Nondet, subject: Any) -> None:
    """An address below 2**48 translates alike with 4 levels, and with 5 whose first PML5E names the
    same PML4 and removes no rights.
    """
    four, access = nondet.ept(), nondet.guest_physical_access()
    nondet.assume((four.eptp >> 3 & 7 == 3) & (access.address >> 48 == 0))
    pml5 = nondet.word("pml5", EPTP_ROOT) & low_bits(four.maxphyaddr)
    five = Ept._make(four._replace(eptp=pml5 | four.eptp & 0xFFF ^ 0x38))
    pml5e = four.eptp & FRAME | RIGHTS
    memory = nondet.memory("host", given=[(pml5, pml5e)], entries=EPT_ENTRY)
    ours = subject.second_stage(four, memory, access)
    theirs = subject.second_stage(five, memory, access)
    nondet.reach(kind(ours))
    assert type(ours) is type(theirs)
    if isinstance(ours, Translated):
        assert (ours.pa == theirs.pa) & (ours.level == theirs.level)
    if isinstance(ours, EptViolation):
        assert ours.qualification == theirs.qualification


@invariant(
    source="the batch kernel is the scalar walk, address by address",
    reaches=("translated", "EPT violation", "EPT misconfiguration"),
    needs=(SECOND_STAGE_MANY, PA, ERROR_CODE),
    twin="the-ept-batch-shares-its-first-result",
    bound="batches of 2 addresses that differ in bits 20:0, one of them twice, in groups of 2",
    in_parts=True,
)
def an_ept_batch_equals_the_walk_elementwise(nondet: Nondet, subject: Any) -> None:
    """Each outcome of a batch is that of the same guest-physical address alone."""
    ept, memory = nondet.ept(), nondet.memory("host", entries=EPT_ENTRY)
    access = nondet.guest_physical_access()
    other = access.address ^ nondet.word("difference", DIFFERENCE)
    gpas = [access.address, other, other]
    alone = [subject.second_stage(ept, memory, access._replace(address=gpa)) for gpa in gpas]
    batch = subject.second_stage_many(ept, memory, gpas, access)
    assert len(batch) == len(gpas)
    for one, many in zip(alone, batch, strict=True):
        nondet.reach(kind(one))
        assert type(one) is type(many)
        if isinstance(one, Translated):
            assert (one.pa == many.pa) & (one.level == many.level)
        elif isinstance(one, EptViolation):
            assert (one.qualification == many.qualification) & (one.gpa == many.gpa)
