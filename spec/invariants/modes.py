"""Invariants of the other modes: 32-bit paging, PAE paging, no paging; masks and shadow stacks.

Each draws any control state of the modes that it names, any memory and any access, to a shadow
stack too. What `walk`, `rights` and `flags` claim of 64-bit paging is claimed here of the others.
"""

from typing import Any

from vapama.spec import modes
from vapama.spec.access import Access
from vapama.spec.cpu import LA57, LAM_SUP, PKE, PKS, Cpu, reserved_in_pdptes
from vapama.spec.domains import ADDRESS, PAE_ENTRY, Domain
from vapama.spec.memory import Memory, Watched
from vapama.spec.nondet import (
    EVERY_MODE,
    LEGACY_PAGING,
    NO_PAGING,
    PAE_IN_MEMORY,
    PAE_PAGING,
    PAGING_32,
    ControlStates,
    Nondet,
    invariant,
)
from vapama.spec.outcomes import (
    PK,
    RSVD,
    GeneralProtection,
    I,
    OutsideMemory,
    P,
    PageFault,
    Translated,
    U,
    W,
    kind,
)
from vapama.spec.paging import (
    ACCESSED,
    DIRTY,
    EXECUTE_DISABLE,
    PRESENT,
    USER,
    WRITABLE,
    load_pdptes,
    page_offset,
    path,
    reserved_anywhere,
    reserved_at,
    translate,
    update_half,
)
from vapama.spec.subject import (
    ERROR_CODE,
    LEVEL,
    LOADS,
    MANY,
    OTHER_MODES,
    PA,
    PDPTES,
    UPDATES,
    agree,
    alike,
)
from vapama.spec.words import low_bits

LEGACY_KINDS = ("translated", "page fault", "entry outside memory")
DIFFERENCE = Domain(free=low_bits(23), scope=(0x1000, 0x1))
UPPER_HALF = Domain(free=low_bits(32) << 32)


# EQUALITY WITH THE REFERENCE


def _equals_the_reference(nondet: Nondet, subject: Any, states: ControlStates) -> None:
    cpu, memory, access = nondet.walk(states)
    expected = translate(cpu, memory, access)
    nondet.reach(kind(expected))
    observed = subject.translate(cpu, memory, access)
    assert agree(expected, observed, memory, subject.capabilities)


@invariant(
    source="Intel SDM Vol. 3A, 4.3 and 4.6 to 4.8",
    reaches=LEGACY_KINDS,
    needs=(OTHER_MODES,),
    twin="the-upper-half-of-a-pair-is-never-read",
)
def the_32_bit_walk_equals_the_reference(nondet: Nondet, subject: Any) -> None:
    """In 32-bit paging, with CR4.PSE and PSE-36 or without."""
    _equals_the_reference(nondet, subject, PAGING_32)


@invariant(
    source="Intel SDM Vol. 3A, 4.4 and 4.6 to 4.8",
    reaches=LEGACY_KINDS,
    needs=(OTHER_MODES,),
    twin="pae-ignores-upper-bits",
)
def the_pae_walk_equals_the_reference(nondet: Nondet, subject: Any) -> None:
    """In PAE paging, from any PDPTE registers that can be."""
    _equals_the_reference(nondet, subject, PAE_PAGING)


@invariant(
    source="AMD APM Vol. 2, 5.2.3 and 15.25.10",
    reaches=LEGACY_KINDS,
    needs=(OTHER_MODES,),
    twin="pdptes-in-memory-have-no-reserved-bits",
)
def the_pae_walk_from_memory_equals_the_reference(nondet: Nondet, subject: Any) -> None:
    """In PAE paging whose PDPTEs each walk reads from memory."""
    _equals_the_reference(nondet, subject, PAE_IN_MEMORY)


@invariant(
    source="Intel SDM Vol. 3A, 4.1.1 (CR0.PG=0) and 3.3",
    reaches=("translated",),
    needs=(OTHER_MODES, PA),
    twin="without-paging-an-address-has-64-bits",
)
def without_paging_an_address_is_its_low_32_bits(nondet: Nondet, subject: Any) -> None:
    """With CR0.PG=0 every access goes to its linear address, and no memory is read for it."""
    cpu, memory, access = nondet.walk(NO_PAGING)
    watched = Watched(memory)
    outcome = subject.translate(cpu, watched, access)
    nondet.reach(kind(outcome))
    assert isinstance(outcome, Translated)
    assert outcome.pa == access.address & low_bits(32)
    assert not watched.loads
    assert not outcome.updates


@invariant(
    source="the batch kernel is the scalar walk, address by address",
    reaches=("translated", "page fault"),
    needs=(OTHER_MODES, MANY, PA, ERROR_CODE),
    twin="the-legacy-batch-shares-its-first-result",
    bound="batches of 2 addresses that differ in bits 22:0; PAE paging, no paging",
)
def translate_many_equals_the_walk_in_the_other_modes(nondet: Nondet, subject: Any) -> None:
    """Each outcome of a batch is that of the same address alone, outside long mode too."""
    cpu, memory, access = nondet.walk(PAE_PAGING, NO_PAGING)
    addresses = [access.address, access.address ^ nondet.word("difference", DIFFERENCE)]
    batch = subject.translate_many(cpu, memory, addresses, access)
    assert len(batch) == len(addresses)
    for address, many in zip(addresses, batch, strict=True):
        one = subject.translate(cpu, memory, access._replace(address=address))
        nondet.reach(kind(one))
        assert alike(one, many)


# ADDRESSES


@invariant(
    source="Intel SDM Vol. 3A, 3.3 and 4.1.1 (32-bit linear addresses)",
    reaches=("translated", "page fault"),
    needs=(OTHER_MODES, PA, ERROR_CODE),
    twin="the-directory-index-has-more-bits",
)
def outside_long_mode_addresses_wrap_at_32_bits(nondet: Nondet, subject: Any) -> None:
    """Outside long mode bits 63:32 of a linear address change nothing."""
    cpu, memory, access = nondet.walk(*LEGACY_PAGING)
    other = access.address ^ nondet.word("upper half", UPPER_HALF)
    first = subject.translate(cpu, memory, access)
    second = subject.translate(cpu, memory, access._replace(address=other))
    nondet.reach(kind(first))
    assert alike(first, second)


@invariant(
    source="Intel SDM Vol. 3A, figures 4-2 to 4-6",
    reaches=("4-KByte page", "2-MByte page", "4-MByte page"),
    needs=(OTHER_MODES, PA, LEVEL),
    twin="a-4-mbyte-page-has-21-bits-of-offset",
)
def a_translation_keeps_the_page_offset_in_the_other_modes(nondet: Nondet, subject: Any) -> None:
    """The offset within the page is the same in the linear and in the physical address; a page has
    4 KBytes, or 2 MBytes in PAE paging and 4 MBytes in 32-bit paging.
    """
    cpu, memory, access = nondet.walk(*LEGACY_PAGING)
    outcome = subject.translate(cpu, memory, access)
    if isinstance(outcome, Translated):
        sizes = ("2-MByte page", "4-MByte page")
        large = sizes[cpu.mode is not modes.PAE]
        nondet.reach("4-KByte page" if outcome.level == 1 else large)
        assert (outcome.pa ^ access.address) & page_offset(outcome.level, cpu.mode) == 0


@invariant(
    source="Intel SDM Vol. 3A, 4.3 (PSE-36) and table 4-1",
    reaches=("below 4 GBytes", "above 4 GBytes"),
    needs=(OTHER_MODES, PA, LEVEL),
    twin="pse-36-ignores-maxphyaddr",
)
def a_32_bit_translation_is_within_pse_36(nondet: Nondet, subject: Any) -> None:
    """A physical address above 4 GBytes comes from a 4-MByte page and with PSE-36 alone, and is
    within MAXPHYADDR and 40 bits.
    """
    cpu, memory, access = nondet.walk(PAGING_32)
    outcome = subject.translate(cpu, memory, access)
    if isinstance(outcome, Translated):
        nondet.reach("below 4 GBytes" if outcome.pa >> 32 == 0 else "above 4 GBytes")
        if outcome.pa >> 32 != 0:
            assert outcome.level == 2
            assert cpu.pse36 == 1
            assert outcome.pa & ~(low_bits(cpu.maxphyaddr) & low_bits(40)) == 0


@invariant(
    source="Intel SDM Vol. 3A, 4.1.4 and 4.4",
    reaches=("translated",),
    needs=(OTHER_MODES, PA),
    twin="pae-maxphyaddr-is-one-more",
)
def a_pae_translation_is_within_maxphyaddr(nondet: Nondet, subject: Any) -> None:
    """No translation of PAE paging leads beyond MAXPHYADDR."""
    cpu, memory, access = nondet.walk(PAE_PAGING, PAE_IN_MEMORY)
    outcome = subject.translate(cpu, memory, access)
    if isinstance(outcome, Translated):
        nondet.reach("translated")
        assert outcome.pa & ~low_bits(cpu.maxphyaddr) == 0


# THE WALK


@invariant(
    source="Intel SDM Vol. 3A, 4.3 and 4.4.2",
    reaches=("three loads", "entry outside memory"),
    needs=(OTHER_MODES, LOADS),
    twin="a-legacy-walk-reads-a-table-outside",
)
def a_walk_of_the_other_modes_stays_within_memory(nondet: Nondet, subject: Any) -> None:
    """At most an entry at each level is read, and a PDPTE where they are in memory: none of them
    outside memory.
    """
    cpu, memory, access = nondet.walk(*EVERY_MODE[1:])
    watched = Watched(memory)
    outcome = subject.translate(cpu, watched, access)
    nondet.reach("three loads" if len(watched.loads) == 3 else kind(outcome))
    pdpte = cpu.mode is modes.PAE and cpu.pdptes is None
    assert len(watched.loads) <= cpu.levels + pdpte
    for address in watched.loads:
        assert address < memory.limit
    if isinstance(outcome, OutsideMemory):
        assert outcome.address >= memory.limit


@invariant(
    source="Intel SDM Vol. 3A, 4.7 (RSVD flag)",
    reaches=("reserved bit",),
    needs=(OTHER_MODES, ERROR_CODE),
    twin="a-reserved-bit-of-a-4-mbyte-page-is-missed",
)
def a_reserved_bit_faults_in_the_other_modes(nondet: Nondet, subject: Any) -> None:
    """A reserved bit set in a present PDE or PTE on the path faults with RSVD."""
    cpu, memory, access = nondet.walk(PAGING_32, PAE_PAGING)
    outcome = subject.translate(cpu, memory, access)
    for level, _, entry in path(cpu, memory, access.address):
        reserved = reserved_anywhere(cpu) | reserved_at(cpu, entry, level)
        if (entry & PRESENT != 0) & (entry & reserved != 0):
            nondet.reach("reserved bit")
            assert isinstance(outcome, PageFault)
            assert outcome.error_code & RSVD != 0
            return


@invariant(
    source="Intel SDM Vol. 3A, 4.7",
    reaches=("not present", "page fault"),
    needs=(OTHER_MODES, ERROR_CODE),
    twin="32-bit-paging-reports-fetches-with-nxe",
)
def a_page_fault_of_the_other_modes_describes_its_access(nondet: Nondet, subject: Any) -> None:
    """W and U of the error code are the access's; I says fetch, if SMEP is on or, in PAE paging,
    NXE; PK is never set. P is 0 if and only if an entry on the path, or a PDPTE, is not present.
    """
    cpu, memory, access = nondet.walk(PAGING_32, PAE_PAGING)
    outcome = subject.translate(cpu, memory, access)
    if isinstance(outcome, PageFault):
        xd = cpu.nxe if cpu.mode is modes.PAE else 0
        described = access.write * W | access.user * U | access.fetch * (xd | cpu.smep) * I
        assert outcome.error_code & (W | U | I | PK) == described
        steps = list(path(cpu, memory, access.address))
        missing = not steps or steps[-1].entry & PRESENT == 0
        nondet.reach("not present" if missing else "page fault")
        if missing:
            assert (outcome.error_code & P == 0) | (outcome.error_code & RSVD != 0)
        else:
            assert outcome.error_code & P != 0


# RIGHTS AND FLAGS


@invariant(
    source="Intel SDM Vol. 3A, 4.6.1",
    reaches=("user", "write", "fetch", "supervisor write with WP=0 to a read-only page"),
    needs=(OTHER_MODES,),
    twin="a-user-page-of-two-levels-needs-only-its-leaf",
)
def rights_hold_in_the_other_modes(nondet: Nondet, subject: Any) -> None:
    """Of what translates: a user's access has U/S in both entries; a write R/W in both, unless it
    is the supervisor's with CR0.WP=0; a fetch XD in none; and with SMEP and SMAP the supervisor
    keeps off user pages, unless RFLAGS.AC lets an explicit data access through.
    """
    cpu, memory, access = nondet.walk(*LEGACY_PAGING)
    nondet.assume(access.shadow_stack == 0)
    if not isinstance(subject.translate(cpu, memory, access), Translated):
        return
    every, some = _over_the_path(cpu, memory, access)
    if access.user == 1:
        nondet.reach("user")
        assert every & USER != 0
    elif every & USER != 0:
        exempt = cpu.ac & (access.implicit ^ 1)
        assert access.fetch * cpu.smep | (access.fetch ^ 1) * cpu.smap & (exempt ^ 1) == 0
    if access.write == 1:
        if every & WRITABLE != 0:
            nondet.reach("write")
        else:
            nondet.reach("supervisor write with WP=0 to a read-only page")
            assert (access.user == 0) & (cpu.wp == 0)
    if access.fetch == 1:
        nondet.reach("fetch")
        assert some & EXECUTE_DISABLE == 0


def _over_the_path(cpu: Cpu, memory: Memory, access: Access) -> tuple[int, int]:
    """The AND and the OR of the entries on the path."""
    every, some = low_bits(63) | EXECUTE_DISABLE, 0
    for step in path(cpu, memory, access.address):
        every, some = every & step.entry, some | step.entry
    return every, some


@invariant(
    source="Intel SDM Vol. 3A, 4.8; a PDPTE has no flags (table 4-8)",
    reaches=("two entries", "large page"),
    needs=(OTHER_MODES, UPDATES),
    twin="flags-of-odd-entries-go-to-even-ones",
)
def a_translation_of_the_other_modes_marks_each_entry_it_used(nondet: Nondet, subject: Any) -> None:
    """A translated access sets A in the PDE and the PTE on its path, in order, and D in the last of
    them if it is a write: no other bit, no other entry.
    """
    cpu, memory, access = nondet.walk(*LEGACY_PAGING)
    outcome = subject.translate(cpu, memory, access)
    if isinstance(outcome, Translated):
        steps = list(path(cpu, memory, access.address))
        nondet.reach("two entries" if len(steps) == 2 else "large page")
        assert len(outcome.updates) == len(steps)
        for step, found in zip(steps, outcome.updates, strict=True):
            bits = ACCESSED | access.write * DIRTY if step.level == outcome.level else ACCESSED
            wanted = (step.address, bits)
            if cpu.mode is not modes.PAE:
                wanted = update_half(step.address, bits)
            assert found.address == wanted[0]
            assert found.bits == wanted[1]


@invariant(
    source="Intel SDM Vol. 3A, 4.6.2 (keys are of 4-level and 5-level paging) and 4.1.3",
    reaches=("translated", "page fault"),
    needs=(OTHER_MODES, PA, ERROR_CODE),
    twin="pke-is-taken-for-smep",
)
def outside_long_mode_keys_and_masks_change_nothing(nondet: Nondet, subject: Any) -> None:
    """Outside long mode PKRU, IA32_PKRS and CR4's PKE, PKS, LA57 and LAM_SUP do not count."""
    cpu, memory, access = nondet.walk(*LEGACY_PAGING)
    plain = cpu._replace(pkru=0, pkrs=0, cr4=cpu.cr4 & ~(PKE | PKS | LA57 | LAM_SUP))
    first = subject.translate(cpu, memory, access)
    second = subject.translate(plain, memory, access)
    nondet.reach(kind(first))
    assert alike(first, second)


# PDPTES


@invariant(
    source="Intel SDM Vol. 3A, 4.4.1 and table 4-8",
    reaches=("loaded", "refused"),
    needs=(OTHER_MODES, PDPTES),
    twin="a-pdpte-may-be-writable",
)
def loading_pdptes_equals_the_reference(nondet: Nondet, subject: Any) -> None:
    """MOV to CR3 loads the four PDPTEs, or is refused with #GP(0) for a reserved bit in a present
    one, and then loads none.
    """
    cpu, memory = nondet.cpu(PAE_IN_MEMORY), nondet.memory("guest", entries=PAE_ENTRY)
    expected, observed = load_pdptes(cpu, memory), subject.load_pdptes(cpu, memory)
    if isinstance(expected, GeneralProtection):
        nondet.reach("refused")
        assert isinstance(observed, GeneralProtection)
    elif isinstance(expected, OutsideMemory):
        assert isinstance(observed, OutsideMemory)
        assert observed.address == expected.address
    else:
        nondet.reach("loaded")
        assert not isinstance(observed, GeneralProtection | OutsideMemory)
        assert len(observed) == 4
        for ours, theirs in zip(expected, observed, strict=True):
            assert ours == theirs


@invariant(
    source="Intel SDM Vol. 3A, 4.4.1",
    reaches=("loaded", "present"),
    needs=(OTHER_MODES, PDPTES),
    twin="only-the-first-pdpte-is-checked",
)
def a_loaded_pdpte_has_no_reserved_bit(nondet: Nondet, subject: Any) -> None:
    """What is loaded is what memory holds, and nothing present in it has a reserved bit set."""
    cpu, memory = nondet.cpu(PAE_IN_MEMORY), nondet.memory("guest", entries=PAE_ENTRY)
    loaded = subject.load_pdptes(cpu, memory)
    if isinstance(loaded, GeneralProtection | OutsideMemory):
        return
    nondet.reach("loaded")
    for index, pdpte in enumerate(loaded):
        assert pdpte == memory.load(cpu.cr3 & modes.PDPT | index << 3)
        if pdpte & PRESENT != 0:
            nondet.reach("present")
            assert pdpte & reserved_in_pdptes(cpu.maxphyaddr) == 0


@invariant(
    source="Intel SDM Vol. 3A, 4.4.1; AMD APM Vol. 2, 15.25.10",
    reaches=("translated", "page fault"),
    needs=(OTHER_MODES, PDPTES, PA, ERROR_CODE),
    twin="the-pdpte-registers-are-taken-in-reverse",
    bound="reads by the supervisor",
)
def loaded_pdptes_translate_as_those_in_memory(nondet: Nondet, subject: Any) -> None:
    """A walk from the registers just loaded has the outcome of one that reads the PDPTEs itself."""
    cpu, memory = nondet.cpu(PAE_IN_MEMORY), nondet.memory("guest", entries=PAE_ENTRY)
    quarter, offset = nondet.one_of("quarter", range(4)), nondet.word("address", ADDRESS)
    access = Access(quarter << 30 | offset & low_bits(30))
    loaded = subject.load_pdptes(cpu, memory)
    if isinstance(loaded, GeneralProtection | OutsideMemory):
        return
    first = subject.translate(cpu, memory, access)
    second = subject.translate(cpu._replace(pdptes=tuple(loaded)), memory, access)
    nondet.reach(kind(first))
    assert alike(first, second)
