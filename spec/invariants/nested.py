"""Invariants of the two-dimensional walk, VA -> PA -> MA, under EPT and under nested paging."""

from typing import Any

from vapama.spec import paging
from vapama.spec.access import Access
from vapama.spec.cpu import CET, LA57, PAE, Cpu
from vapama.spec.domains import (
    ACCESS,
    ENTRY,
    EPT_ENTRY,
    MASKED_CR3,
    MASKING_CR4,
    SHADOW_ENTRY,
    SHADOW_STACK_ACCESSES,
    Domain,
)
from vapama.spec.memory import Counted, Memory
from vapama.spec.nested import (
    GuestMemory,
    Stopped,
    access_to_page,
    flags_are_written_apart,
    most_loads,
    translate,
)
from vapama.spec.nondet import ControlStates, Nondet, invariant
from vapama.spec.outcomes import (
    EptMisconfiguration,
    EptViolation,
    NestedPageFault,
    NonCanonical,
    Outcome,
    PageFault,
    Translated,
    kind,
)
from vapama.spec.stage import Ept, Npt, Stage
from vapama.spec.subject import (
    ERROR_CODE,
    LOADS,
    MASKING,
    NESTED,
    NESTED_MANY,
    PA,
    SECOND_STAGE,
    SHADOW_STACKS,
    agree,
)
from vapama.spec.words import low_bits

EPT_WALK = ("the_ept_walk_equals_the_reference", "a_page_of_ept_keeps_the_low_bits")
NPT_WALK = ("the_npt_walk_equals_the_reference", "a_nested_page_keeps_the_low_bits")
MASKED = ("the_address_without_metadata_equals_the_reference",)
ORDINARY = "guests in 4-level and 5-level paging, no accesses to shadow stacks"
FOUR_BY_FOUR = "4 levels in both stages"
LONG = "guests in 4-level and 5-level paging, no masked addresses, no shadow stacks"
GUEST_KINDS = ("translated", "page fault", "non-canonical address", "entry outside memory")
_MASKING = {"cr3": MASKED_CR3, "cr4": MASKING_CR4}
MASKING_GUESTS = ControlStates("any masking, ordinary accesses", _MASKING, accesses=ACCESS)
SHADOW_STACK_GUESTS = ControlStates(
    "any masking, shadow stacks, 4-level paging",
    {**_MASKING, "cr4": Domain(free=MASKING_CR4.free & ~(LA57 | CET), fixed=PAE | CET)},
    SHADOW_ENTRY,
    accesses=Domain(among=SHADOW_STACK_ACCESSES),
)
DIFFERENCE = Domain(free=low_bits(21), scope=(0x1000, 0x1))


def _under_ept(nondet: Nondet) -> tuple[Cpu, Ept, Memory, Access]:
    """Any guest in long mode under EPT, any memory of the host's, any access of the guest's."""
    cpu, stage = nondet.cpu(), nondet.ept()
    return cpu, stage, nondet.memory("host", entries=EPT_ENTRY), nondet.access()


def _under_npt(nondet: Nondet) -> tuple[Cpu, Npt, Memory, Access]:
    """The same under nested paging, of a host in any mode."""
    cpu, stage = nondet.cpu(), nondet.npt()
    return cpu, stage, nondet.memory("host", entries=ENTRY), nondet.access()


# Lemmas about one stage.


@invariant(
    source="Intel SDM Vol. 3C, 31.3.2",
    reaches=("translated",),
    needs=(SECOND_STAGE, PA),
    twin="ept-loses-a-bit-of-the-offset",
)
def a_page_of_ept_keeps_the_low_bits(nondet: Nondet, subject: Any) -> None:
    """Bits 11:0 of a guest-physical address are those of its translation: entries stay aligned."""
    stage, memory = nondet.ept(), nondet.memory("host", entries=EPT_ENTRY)
    access = nondet.guest_physical_access()
    outcome = subject.second_stage(stage, memory, access)
    if isinstance(outcome, Translated):
        nondet.reach("translated")
        assert (outcome.pa ^ access.address) & low_bits(12) == 0


@invariant(
    source="AMD APM Vol. 2, 15.25.5",
    reaches=("translated",),
    needs=(SECOND_STAGE, PA),
    twin="npt-loses-a-bit-of-the-offset",
)
def a_nested_page_keeps_the_low_bits(nondet: Nondet, subject: Any) -> None:
    """The same under nested paging."""
    stage, memory = nondet.npt(), nondet.memory("host", entries=ENTRY)
    access = nondet.guest_physical_access()
    outcome = subject.second_stage(stage, memory, access)
    if isinstance(outcome, Translated):
        nondet.reach("translated")
        assert (outcome.pa ^ access.address) & low_bits(12) == 0


# The two-dimensional walk.


def _equals_the_reference(
    nondet: Nondet, subject: Any, guests: ControlStates, stage: Stage, entries: Domain
) -> None:
    """Any access of such guests under this stage, to any memory of the host's with such entries."""
    cpu, access = nondet.cpu(guests), nondet.access(guests)
    memory = nondet.memory("host", entries=entries)
    expected = translate(cpu, stage, memory, access)
    nondet.reach(kind(expected))
    observed = subject.translate_nested(cpu, stage, memory, access)
    assert agree(expected, observed, memory, subject.capabilities)


@invariant(
    source="Intel SDM Vol. 1, 3.3.7.1; Vol. 3C, 31.3.1, 31.3.3.3, 31.3.5 and table 30-7",
    reaches=(*GUEST_KINDS, "EPT violation", "EPT misconfiguration"),
    needs=(NESTED, MASKING),
    twin="nested-skips-the-guests-flags",
    bound=ORDINARY,
    uses=(*EPT_WALK, *MASKED),
    in_parts=True,
)
def the_walk_under_ept_equals_the_reference(nondet: Nondet, subject: Any) -> None:
    """A guest's access under EPT has the reference's outcome, exit and flags in both dimensions."""
    _equals_the_reference(nondet, subject, MASKING_GUESTS, nondet.ept(), EPT_ENTRY)


@invariant(
    source="Intel SDM Vol. 1, 3.3.7.1; AMD APM Vol. 2, 15.25.5 and 15.25.6",
    reaches=(*GUEST_KINDS, "nested page fault"),
    needs=(NESTED, MASKING),
    twin="nested-tables-are-accessed-as-pages",
    bound=ORDINARY,
    uses=(*NPT_WALK, *MASKED),
    in_parts=True,
)
def the_walk_under_npt_equals_the_reference(nondet: Nondet, subject: Any) -> None:
    """A guest's access under nested paging has the reference's outcome, exit and flags."""
    _equals_the_reference(nondet, subject, MASKING_GUESTS, nondet.npt(), ENTRY)


@invariant(
    source="Intel SDM Vol. 3A, 4.6.1; Vol. 3C, 31.3.1 and 31.3.3.2",
    reaches=("page fault", "EPT violation"),
    needs=(NESTED, SHADOW_STACKS),
    twin="nested-shadow-stacks-hang-below-any-entry",
    bound=FOUR_BY_FOUR,
    uses=(*EPT_WALK, *MASKED),
    unsuited=("exhaustive",),
)
def the_walk_to_a_shadow_stack_under_ept_equals_the_reference(nondet: Nondet, subject: Any) -> None:
    """The same of an access to a shadow stack."""
    stage = nondet.ept()
    nondet.assume(stage.levels == 4)
    _equals_the_reference(nondet, subject, SHADOW_STACK_GUESTS, stage, EPT_ENTRY)


@invariant(
    source="Intel SDM Vol. 3A, 4.6.1; AMD APM Vol. 2, 15.25.5 and 15.25.6",
    reaches=("page fault", "nested page fault"),
    needs=(NESTED, SHADOW_STACKS),
    twin="nested-shadow-stacks-hang-below-any-entry",
    bound=FOUR_BY_FOUR,
    uses=(*NPT_WALK, *MASKED),
    unsuited=("exhaustive",),
)
def the_walk_to_a_shadow_stack_under_npt_equals_the_reference(nondet: Nondet, subject: Any) -> None:
    """The same under nested paging."""
    stage = nondet.npt()
    nondet.assume(stage.levels == 4)
    _equals_the_reference(nondet, subject, SHADOW_STACK_GUESTS, stage, SHADOW_ENTRY)


@invariant(
    source="the batch kernel is the scalar walk, address by address",
    reaches=("translated", "page fault"),
    needs=(NESTED_MANY, NESTED, PA, ERROR_CODE),
    twin="nested-batch-shares-its-first-result",
    searched="the walk is proved, and one stage's batches: of both stages there are too many paths",
    unsuited=("exhaustive",),
)
def translate_nested_many_equals_the_walk_elementwise(nondet: Nondet, subject: Any) -> None:
    """Each outcome of a batch is that of the same address alone."""
    cpu, stage, memory, access = _under_ept(nondet)
    other = access.address ^ nondet.word("difference", DIFFERENCE)
    addresses = [access.address, other, other]
    alone = [
        subject.translate_nested(cpu, stage, memory, access._replace(address=address))
        for address in addresses
    ]
    batch = subject.translate_nested_many(cpu, stage, memory, addresses, access)
    assert len(batch) == len(addresses)
    for one, many in zip(alone, batch, strict=True):
        nondet.reach(kind(one))
        assert type(one) is type(many)
        if isinstance(one, Translated):
            assert (one.pa == many.pa) & (one.level == many.level)
        elif isinstance(one, PageFault):
            assert one.error_code == many.error_code
        elif isinstance(one, EptViolation):
            assert (one.qualification == many.qualification) & (one.gpa == many.gpa)


@invariant(
    source="Intel SDM Vol. 3C, 31.3.2",
    reaches=("five loads",),
    needs=(SECOND_STAGE, LOADS),
    twin="ept-reads-an-entry-twice",
)
def a_walk_of_ept_costs_at_most_a_load_a_level(nondet: Nondet, subject: Any) -> None:
    """The second stage's walk reads at most as many entries as it has levels."""
    stage, memory = nondet.ept(), Counted(nondet.memory("host", entries=EPT_ENTRY))
    subject.second_stage(stage, memory, nondet.guest_physical_access())
    assert memory.count <= stage.levels
    if memory.count == 5:
        nondet.reach("five loads")


@invariant(
    source="AMD APM Vol. 2, 15.25.5",
    reaches=("five loads",),
    needs=(SECOND_STAGE, LOADS),
    twin="npt-reads-an-entry-twice",
)
def a_nested_walk_costs_at_most_a_load_a_level(nondet: Nondet, subject: Any) -> None:
    """The same under nested paging, of a host in any mode."""
    stage, memory = nondet.npt(), Counted(nondet.memory("host", entries=ENTRY))
    subject.second_stage(stage, memory, nondet.guest_physical_access())
    assert memory.count <= stage.levels
    if memory.count == 5:
        nondet.reach("five loads")


def _costs(
    nondet: Nondet, subject: Any, cpu: Cpu, stage: Stage, memory: Memory, access: Access
) -> None:
    most = most_loads(cpu.levels, stage.levels)
    if flags_are_written_apart(stage):
        # Updating a guest's entry walks the second stage for it once more, and reads it again.
        most = most + cpu.levels * (stage.levels + 1)
    # What the lemmas say of the second stage, they say of each of its walks that the reference has.
    nondet.reach(kind(translate(cpu, stage, memory, access)))
    counted = Counted(memory)
    subject.translate_nested(cpu, stage, counted, access)
    assert counted.count <= most
    if counted.count > 18:
        nondet.reach("more than 18 loads")


@invariant(
    source="Intel SDM Vol. 3C, 31.3.1; (n + 1)(m + 1) - 1 loads for n and m levels",
    reaches=("translated", "more than 18 loads", "entry outside memory"),
    needs=(NESTED, LOADS),
    twin="nested-walks-for-each-table-twice",
    searched="a proof takes minutes: it is made of four levels in both stages, and under npt",
)
def a_walk_under_ept_costs_at_most_what_its_levels_say(nondet: Nondet, subject: Any) -> None:
    """A guest's access reads at most (n + 1)(m + 1) - 1 entries; without flags of EPT's own,
    n(m + 1) more where the guest's flags have to be set.
    """
    _costs(nondet, subject, *_under_ept(nondet))


@invariant(
    source="Intel SDM Vol. 3C, 31.3.1 and 31.3.3.2",
    reaches=("translated", "more than 18 loads", "entry outside memory"),
    needs=(NESTED, LOADS),
    twin="nested-walks-for-each-table-twice",
    bound=FOUR_BY_FOUR + ", no masked addresses, no shadow stacks",
    uses=(*EPT_WALK, "a_walk_of_ept_costs_at_most_a_load_a_level"),
)
def four_levels_under_four_of_ept_cost_at_most_24_loads(nondet: Nondet, subject: Any) -> None:
    """Where both stages have four levels, and EPT has accessed and dirty flags of its own, an
    access of the guest reads at most 24 entries: flags are set with no further walk.
    """
    cpu, stage, memory, access = _under_ept(nondet)
    nondet.assume(cpu.levels == 4 and stage.levels == 4 and stage.ad == 1)
    assert most_loads(cpu.levels, stage.levels) == 24
    _costs(nondet, subject, cpu, stage, memory, access)


@invariant(
    source="AMD APM Vol. 2, 15.25.5; (n + 1)(m + 1) - 1 loads for n and m levels",
    reaches=("translated", "more than 18 loads", "entry outside memory"),
    needs=(NESTED, LOADS),
    twin="nested-walks-for-each-table-twice",
    bound=LONG,
    uses=(*NPT_WALK, "a_nested_walk_costs_at_most_a_load_a_level"),
    in_parts=True,
)
def a_walk_under_npt_costs_at_most_what_its_levels_say(nondet: Nondet, subject: Any) -> None:
    """The same under nested paging."""
    _costs(nondet, subject, *_under_npt(nondet))


def _is_as_on_a_bare_machine(
    nondet: Nondet, subject: Any, cpu: Cpu, stage: Stage, memory: Memory, access: Access
) -> None:
    """The guest-visible outcome is that of a machine whose memory is what the stage maps."""
    guest = GuestMemory(stage, memory)
    needed: list[Outcome] = []
    try:
        bare = paging.translate(cpu, guest, access)
    except Stopped as stopped:
        needed.append(stopped.outcome)
    outcome = subject.translate_nested(cpu, stage, memory, access)
    if needed:
        assert type(outcome) is type(needed[0])
        nondet.reach("a table is out of reach")
        return
    if isinstance(outcome, PageFault | NonCanonical):
        nondet.reach("page fault")
        assert type(bare) is type(outcome)
        if isinstance(bare, PageFault) and isinstance(outcome, PageFault):
            assert (bare.error_code ^ outcome.error_code) & ~bare.open_bits == 0
        return
    # What the second stage adds can only take rights away.
    assert isinstance(bare, Translated)
    if isinstance(outcome, Translated):
        nondet.reach("translated")
        page = access_to_page(cpu, guest, access, bare.pa)
        host = subject.second_stage(stage, memory, page)
        assert isinstance(host, Translated)
        assert host.pa == outcome.pa
    elif isinstance(outcome, EptViolation | NestedPageFault | EptMisconfiguration):
        nondet.reach("exit")
        # It names an address that the access needs: of an entry, or of the page.
        asked = [load.gpa for load in guest.loads]
        assert outcome.gpa in (*asked, bare.pa)


@invariant(
    source="Intel SDM Vol. 3C, 31.3.1 and 31.3.3.3",
    reaches=("translated", "page fault", "exit", "a table is out of reach"),
    needs=(NESTED, SECOND_STAGE, PA, ERROR_CODE),
    twin="nested-rights-come-from-the-leaf",
    bound=LONG,
    uses=EPT_WALK,
)
def under_ept_a_guest_sees_a_bare_machine(nondet: Nondet, subject: Any) -> None:
    """What a guest sees is what it would see on a bare machine that holds the composed mapping: its
    faults are the same, its pages go where both stages lead, and EPT takes rights but gives none.
    """
    _is_as_on_a_bare_machine(nondet, subject, *_under_ept(nondet))


@invariant(
    source="AMD APM Vol. 2, 15.25.5 and 15.25.6",
    reaches=("translated", "page fault", "exit", "a table is out of reach"),
    needs=(NESTED, SECOND_STAGE, PA, ERROR_CODE),
    twin="nested-page-fault-comes-after-the-page",
    bound=LONG,
    uses=NPT_WALK,
    unsuited=("exhaustive",),
)
def under_npt_a_guest_sees_a_bare_machine(nondet: Nondet, subject: Any) -> None:
    """The same under nested paging: so a guest cannot tell one from the other."""
    _is_as_on_a_bare_machine(nondet, subject, *_under_npt(nondet))


@invariant(
    source="Intel SDM Vol. 3C, 31.3.1 (a second stage that maps each address to itself)",
    reaches=("translated", "page fault"),
    needs=(NESTED, PA, ERROR_CODE),
    twin="nested-rights-come-from-the-leaf",
    bound=LONG,
    uses=EPT_WALK,
)
def an_identity_second_stage_changes_nothing(nondet: Nondet, subject: Any) -> None:
    """If what a guest's walk needs is mapped to itself, the outcome is that without a stage."""
    cpu, stage, memory, access = _under_ept(nondet)
    guest, reached = GuestMemory(stage, memory), True
    try:
        bare = paging.translate(cpu, guest, access)
    except Stopped:
        reached = False
    nondet.assume(reached)
    for load in guest.loads:
        nondet.assume(load.pa == load.gpa)
    outcome = subject.translate_nested(cpu, stage, memory, access)
    nondet.assume(isinstance(outcome, Translated | PageFault))
    plain = subject.translate(cpu, memory, access)
    if isinstance(outcome, Translated) and isinstance(bare, Translated):
        nondet.assume(outcome.pa == bare.pa)
        nondet.reach("translated")
        assert isinstance(plain, Translated)
        assert plain.pa == outcome.pa
    else:
        nondet.reach("page fault")
        assert isinstance(outcome, PageFault)
        assert isinstance(plain, PageFault)
        assert (plain.error_code ^ outcome.error_code) & ~plain.open_bits == 0
