"""Invariants of nested page tables: the walk in every paging mode of a host, and its faults."""

from typing import Any

from vapama.spec.domains import ANY, ENTRY, PAE_ENTRY, PAIR, Domain
from vapama.spec.ept import EXECUTE, READ
from vapama.spec.ept import WRITE as EPT_WRITE
from vapama.spec.memory import Altered, Marked, Memory, Watched
from vapama.spec.nondet import Nondet, invariant
from vapama.spec.npt import (
    FINAL,
    GLOBAL,
    SS,
    TABLE,
    frame,
    has_rights,
    maps_a_page,
    page_offset,
    path,
    reserved,
    translate,
    update,
)
from vapama.spec.outcomes import (
    RSVD,
    I,
    NestedPageFault,
    OutsideMemory,
    P,
    Translated,
    U,
    W,
    kind,
)
from vapama.spec.paging import (
    ACCESSED,
    CACHE_DISABLE,
    DIRTY,
    FRAME,
    PAGE_SIZE,
    PRESENT,
    USER,
    WRITABLE,
    WRITE_THROUGH,
    Step,
)
from vapama.spec.stage import Ept, Npt
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
from vapama.spec.words import Word, bit, low_bits

DIFFERENCE = Domain(free=(1 << 21) - 1, scope=(0, 0x1000))


def host_memory(nondet: Nondet, npt: Npt) -> Memory:
    """Any memory of a host, whose entries are preferably of the format of its tables."""
    return nondet.memory("host", entries={2: PAIR, 3: PAE_ENTRY}.get(npt.levels, ENTRY))


def _over_the_path(npt: Npt, steps: list[Step]) -> tuple[Word, Word]:
    """The AND and the OR of the entries on a path that have rights."""
    every, some = WRITABLE | USER, 0
    for step in steps:
        if has_rights(npt, step.level):
            every, some = every & step.entry, some | step.entry
    return every, some


@invariant(
    source="AMD APM Vol. 2, 15.25.4 to 15.25.6",
    reaches=("translated", "nested page fault", "entry outside memory"),
    needs=(SECOND_STAGE,),
    equates=(translate, SECOND_STAGE),
    twin="npt-rights-come-from-the-leaf",
)
def the_npt_walk_equals_the_reference(nondet: Nondet, subject: Any) -> None:
    """The subject's outcome of a nested walk is one that the reference allows, whatever the paging
    mode of the host.
    """
    npt, access = nondet.npt(), nondet.guest_physical_access()
    memory = host_memory(nondet, npt)
    expected = translate(npt, memory, access)
    observed = subject.second_stage(npt, memory, access)
    nondet.reach(kind(expected))
    assert agree(expected, observed, memory, subject.capabilities)


@invariant(
    source="AMD APM Vol. 2, 15.25.5 and 15.25.6",
    reaches=("final", "table"),
    needs=(SECOND_STAGE,),
    twin="npt-reads-guest-tables",
)
def an_access_to_a_guest_table_needs_a_writable_nested_page(nondet: Nondet, subject: Any) -> None:
    """An access to a guest's page tables, even a read, and any write, translate only if R/W is 1 in
    every entry on the path; any access at all, only if U/S is.
    """
    npt, access = nondet.npt(), nondet.guest_physical_access()
    memory = host_memory(nondet, npt)
    if isinstance(subject.second_stage(npt, memory, access), Translated):
        every, _ = _over_the_path(npt, list(path(npt, memory, access.address)))
        nondet.reach("table" if access.table == 1 else "final")
        assert every & USER != 0
        assert (every & WRITABLE != 0) | (access.table | access.write == 0)


@invariant(
    source="AMD APM Vol. 2, 15.25.5 (the host's EFER.NXE; the guest's does not count)",
    reaches=("fetch",),
    needs=(SECOND_STAGE,),
    twin="npt-no-execute-counts-only-at-the-leaf",
)
def a_fetch_never_comes_from_a_nested_no_execute_page(nondet: Nondet, subject: Any) -> None:
    """A fetch translates only if NX is 0 in every entry on the path."""
    npt, access = nondet.npt(), nondet.guest_physical_access()
    memory = host_memory(nondet, npt)
    nondet.assume(access.fetch == 1)
    if isinstance(subject.second_stage(npt, memory, access), Translated):
        nondet.reach("fetch")
        _, some = _over_the_path(npt, list(path(npt, memory, access.address)))
        assert bit(some, 63) == 0


@invariant(
    source="AMD APM Vol. 2, 15.25.5 (nested accesses are a user's)",
    reaches=("translated", "nested page fault"),
    needs=(SECOND_STAGE, PA, ERROR_CODE),
    twin="npt-pse-is-pge",
)
def a_host_s_wp_smep_smap_and_keys_change_no_nested_walk(nondet: Nondet, subject: Any) -> None:
    """Of the host's CR0, CR4 and EFER only PAE, PSE, LA57, LMA and NXE count."""
    npt, access = nondet.npt(), nondet.guest_physical_access()
    memory = host_memory(nondet, npt)
    others = nondet.word("others", ANY)
    ignored = Npt._make(
        npt._replace(
            cr0=npt.cr0 ^ others & 0x1_0000,
            cr4=npt.cr4 ^ others & 0x170_0080,
            efer=npt.efer ^ others >> 32 & 0x1,
        )
    )
    first = subject.second_stage(npt, memory, access)
    second = subject.second_stage(ignored, memory, access)
    nondet.reach(kind(first))
    assert type(first) is type(second)
    if isinstance(first, Translated):
        assert first.pa == second.pa
    if isinstance(first, NestedPageFault):
        assert first.exitinfo1 == second.exitinfo1


@invariant(
    source="AMD APM Vol. 2, 15.25.6 (RSV) and 5.2, 5.3",
    reaches=("2 levels", "3 levels", "4 levels", "5 levels"),
    needs=(SECOND_STAGE, ERROR_CODE),
    twin="npt-a-pml4e-may-be-global",
)
def a_reserved_bit_of_a_nested_entry_faults(nondet: Nondet, subject: Any) -> None:
    """A reserved bit set in a present entry on the path faults with RSV, whatever comes after."""
    npt, access = nondet.npt(), nondet.guest_physical_access()
    memory = host_memory(nondet, npt)
    nondet.assume(access.address >> 32 == 0)
    outcome = subject.second_stage(npt, memory, access)
    for step in path(npt, memory, access.address):
        wrong = step.entry & reserved(npt, step.entry, step.level) != 0
        if (step.entry & PRESENT != 0) & wrong:
            nondet.reach(f"{npt.levels} levels")
            assert isinstance(outcome, NestedPageFault)
            assert outcome.exitinfo1 & (P | RSVD) == P | RSVD
            return


@invariant(
    source="AMD APM Vol. 2, 15.25.6",
    reaches=("final", "table"),
    needs=(SECOND_STAGE, ERROR_CODE),
    twin="npt-tables-count-as-final",
)
def a_nested_page_fault_describes_its_access(nondet: Nondet, subject: Any) -> None:
    """EXITINFO1 says a user's access; a write also of a guest's table; a fetch, if the host has
    NXE; a shadow-stack access; and just one of "final address" (bit 32) and "table" (bit 33).
    EXITINFO2 is the guest-physical address.
    """
    npt, access = nondet.npt(), nondet.guest_physical_access()
    memory = host_memory(nondet, npt)
    outcome = subject.second_stage(npt, memory, access)
    if isinstance(outcome, NestedPageFault):
        nondet.reach("table" if access.table == 1 else "final")
        code = outcome.exitinfo1
        assert outcome.gpa == access.address
        assert code & (FINAL | TABLE) == (access.table * TABLE | (access.table ^ 1) * FINAL)
        assert code & (W | U) == (access.write | access.table) * W | U
        assert code & SS == access.shadow_stack * SS
        assert (code & I == access.fetch * I) | (npt.nxe == 0)
        assert code & ~(P | W | U | RSVD | I | SS | FINAL | TABLE) == 0


@invariant(
    source="AMD APM Vol. 2, 5.4.1 and 5.5 (A and D), 15.25.5",
    reaches=("write", "table", "read"),
    needs=(SECOND_STAGE, UPDATES),
    twin="npt-tables-set-no-dirty",
)
def a_nested_translation_marks_each_entry_it_used(nondet: Nondet, subject: Any) -> None:
    """A translated access sets A in each entry on its path but the PDPTE of PAE, in order, and D in
    the last of them if it is a write, or of a guest's table.
    """
    npt, access = nondet.npt(), nondet.guest_physical_access()
    memory = host_memory(nondet, npt)
    outcome = subject.second_stage(npt, memory, access)
    if isinstance(outcome, Translated):
        what = "write" if access.write == 1 else "read"
        nondet.reach("table" if access.table == 1 else what)
        steps = [s for s in path(npt, memory, access.address) if has_rights(npt, s.level)]
        assert len(outcome.updates) == len(steps)
        dirty = (access.write | access.table) * DIRTY
        for step, (address, bits) in zip(steps, outcome.updates, strict=True):
            flags = ACCESSED | dirty if step.level == outcome.level else ACCESSED
            expected = update(npt, step.address, flags)
            assert (address == expected.address) & (bits == expected.bits)


@invariant(
    source="AMD APM Vol. 2, 5.4.1; which accessed flags a faulting walk sets is left open",
    reaches=("nested page fault",),
    needs=(SECOND_STAGE, UPDATES),
    twin="npt-marks-a-denied-page-dirty",
)
def a_nested_page_fault_sets_at_most_accessed_flags(nondet: Nondet, subject: Any) -> None:
    """A faulting walk sets no D, and A at most in present entries that it used."""
    npt, access = nondet.npt(), nondet.guest_physical_access()
    memory = host_memory(nondet, npt)
    outcome = subject.second_stage(npt, memory, access)
    if isinstance(outcome, NestedPageFault):
        nondet.reach("nested page fault")
        allowed = translate(npt, memory, access)
        assert isinstance(allowed, NestedPageFault)
        assert len(outcome.may_update) <= len(allowed.may_update)
        for found, may in zip(outcome.may_update, allowed.may_update, strict=False):
            assert (found.address == may.address) & (found.bits & ~may.bits == 0)


@invariant(
    source="AMD APM Vol. 2, 5.4.1 (the flags are sticky, and no walk consults them)",
    reaches=("translated",),
    needs=(SECOND_STAGE, UPDATES, PA),
    twin="npt-denies-dirty-pages",
)
def marking_changes_no_later_nested_walk(nondet: Nondet, subject: Any) -> None:
    """The same access again, after the flags were set in memory, has the same outcome."""
    npt, access = nondet.npt(), nondet.guest_physical_access()
    memory = host_memory(nondet, npt)
    first = subject.second_stage(npt, memory, access)
    if isinstance(first, Translated):
        nondet.reach("translated")
        again = subject.second_stage(npt, Marked(memory, first.updates), access)
        assert isinstance(again, Translated)
        assert again.pa == first.pa


@invariant(
    source="AMD APM Vol. 2, 5.3 (PWT, PCD, A, D, Available; keys are not a nested page's)",
    reaches=("translated", "nested page fault"),
    needs=(SECOND_STAGE, PA, ERROR_CODE, LEVEL),
    twin="npt-keys-are-reserved",
)
def bits_that_a_nested_walk_ignores_change_nothing(nondet: Nondet, subject: Any) -> None:
    """In long mode, toggling bits 62:52, 11:9 and 6:3 in every entry leaves the outcome as it
    is.
    """
    npt, access = nondet.npt(), nondet.guest_physical_access()
    nondet.assume(npt.levels >= 4)
    memory = host_memory(nondet, npt)
    ignored = WRITE_THROUGH | CACHE_DISABLE | ACCESSED | DIRTY | 7 << 9 | 0x7FF << 52
    other = Altered(memory, nondet.word("toggled", ANY) & ignored)
    first = subject.second_stage(npt, memory, access)
    second = subject.second_stage(npt, other, access)
    nondet.reach(kind(first))
    assert type(first) is type(second)
    if isinstance(first, Translated):
        assert (first.pa == second.pa) & (first.level == second.level)
    if isinstance(first, NestedPageFault):
        assert first.exitinfo1 == second.exitinfo1


@invariant(
    source="AMD APM Vol. 2, 5.2 and 5.3",
    reaches=("4-KByte page", "2-MByte page", "4-MByte page", "1-GByte page"),
    needs=(SECOND_STAGE, PA, LEVEL),
    twin="npt-pse36-loses-its-top-bit",
)
def a_nested_page_is_where_its_entry_says(nondet: Nondet, subject: Any) -> None:
    """The physical address is the frame of the last entry on the path and the offset of the
    guest-physical address; it has no more than MAXPHYADDR bits.
    """
    npt, access = nondet.npt(), nondet.guest_physical_access()
    memory = host_memory(nondet, npt)
    outcome = subject.second_stage(npt, memory, access)
    if isinstance(outcome, Translated):
        sizes = ("4-KByte page", "4-MByte page" if npt.levels == 2 else "2-MByte page")
        nondet.reach((*sizes, "1-GByte page")[outcome.level - 1])
        last = list(path(npt, memory, access.address))[-1]
        assert last.level == outcome.level
        assert maps_a_page(npt, last.entry, last.level)
        offset = page_offset(npt, last.level)
        assert outcome.pa == frame(npt, last.entry, last.level) | access.address & offset
        assert outcome.pa & ~low_bits(npt.maxphyaddr) == 0


@invariant(
    source="AMD APM Vol. 2, 15.25.4; what a walk reads where there is no memory is the machine's",
    reaches=("five loads", "entry outside memory"),
    needs=(SECOND_STAGE, LOADS),
    twin="npt-reads-an-entry-twice",
)
def a_nested_walk_reads_one_entry_a_level_and_none_outside_memory(
    nondet: Nondet, subject: Any
) -> None:
    """The walk is total: at most one load a level, none at or beyond the limit, and a table that
    memory does not hold ends it with the entry that was wanted.
    """
    npt, access = nondet.npt(), nondet.guest_physical_access()
    memory = Watched(host_memory(nondet, npt))
    outcome = subject.second_stage(npt, memory, access)
    if len(memory.loads) == 5:
        nondet.reach("five loads")
    assert len(memory.loads) <= npt.levels
    for address in memory.loads:
        assert address < memory.limit
    if isinstance(outcome, OutsideMemory):
        nondet.reach("entry outside memory")
        assert outcome.address >= memory.limit


@invariant(
    source="the batch kernel is the scalar walk, address by address",
    reaches=("translated", "nested page fault"),
    needs=(SECOND_STAGE_MANY, PA, ERROR_CODE),
    twin="the-npt-batch-shares-its-first-result",
    bound="batches of 2 addresses that differ in bits 20:0, one of them twice, in groups of 2",
    in_parts=True,
)
def an_npt_batch_equals_the_walk_elementwise(nondet: Nondet, subject: Any) -> None:
    """Each outcome of a batch is that of the same guest-physical address alone."""
    npt, access = nondet.npt(), nondet.guest_physical_access()
    memory = host_memory(nondet, npt)
    other = access.address ^ nondet.word("difference", DIFFERENCE)
    gpas = [access.address, other, other]
    alone = [subject.second_stage(npt, memory, access._replace(address=gpa)) for gpa in gpas]
    batch = subject.second_stage_many(npt, memory, gpas, access)
    assert len(batch) == len(gpas)
    for one, many in zip(alone, batch, strict=True):
        nondet.reach(kind(one))
        assert type(one) is type(many)
        if isinstance(one, Translated):
            assert (one.pa == many.pa) & (one.level == many.level)
        elif isinstance(one, NestedPageFault):
            assert (one.exitinfo1 == many.exitinfo1) & (one.gpa == many.gpa)


class AsEpt:
    """The memory of nested tables, read as EPT entries of the same mapping: R for a present user's
    entry, W for R/W as well, X unless NX; uncacheable pages.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.limit: Word = memory.limit

    def load(self, address: Word) -> Word:
        """The EPT entry that says what the nested entry at `address` does."""
        entry = self.memory.load(address)
        there = bit(entry, 0) & bit(entry, 2)
        rights = READ | bit(entry, 1) * EPT_WRITE | (bit(entry, 63) ^ 1) * EXECUTE
        return entry & (FRAME | PAGE_SIZE) | there * rights


@invariant(
    source="Intel SDM Vol. 3C, 31.3.3.2 and 31.3.5; AMD APM Vol. 2, 15.25.5",
    reaches=("translated", "no translation"),
    needs=(SECOND_STAGE, PA, LEVEL),
    twin="npt-reads-guest-tables",
    bound="hosts in 4-level paging with NXE; pages whose PAT bit is 0, PML4Es whose bit 8 is; EPT"
    " with accessed and dirty flags and without mode-based execute control",
)
def ept_and_npt_of_the_same_mapping_agree(nondet: Nondet, subject: Any) -> None:
    """Nested tables, and EPT whose entries say the same, let the same accesses through, and to the
    same address: both make a write of every access to a guest's table.
    """
    npt, access = nondet.npt(), nondet.guest_physical_access()
    nondet.assume((npt.nxe == 1) & (access.linear == 1))
    nondet.assume(npt.levels == 4)
    memory = nondet.memory("host", entries=ENTRY)
    for step in path(npt, memory, access.address):
        if step.level == 4:
            nondet.assume(step.entry & GLOBAL == 0)
        elif maps_a_page(npt, step.entry, step.level):
            pat = PAGE_SIZE if step.level == 1 else 1 << 12
            nondet.assume(step.entry & pat == 0)
    capabilities = Ept(0x1E).capabilities & ~((npt.page1gb ^ 1) << 17)
    eptp = npt.ncr3 & FRAME | 0x5E
    ept = Ept._make((eptp, npt.maxphyaddr, 0, capabilities))
    ours = subject.second_stage(npt, memory, access)
    theirs = subject.second_stage(ept, AsEpt(memory), access)
    assert isinstance(ours, Translated) == isinstance(theirs, Translated)
    if isinstance(ours, Translated):
        nondet.reach("translated")
        assert (ours.pa == theirs.pa) & (ours.level == theirs.level)
    elif not isinstance(ours, OutsideMemory):
        nondet.reach("no translation")
