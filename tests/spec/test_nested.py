"""The two-dimensional walk, by example: cost, order of faults, flags."""

from dataclasses import replace

from vapama.spec import paging
from vapama.spec.access import Access
from vapama.spec.cpu import LMA, LME, PAE, PE, PG, Cpu
from vapama.spec.ept import DATA_READ, DATA_WRITE, LINEAR_VALID, TRANSLATION
from vapama.spec.memory import Sparse, Watched
from vapama.spec.nested import allowed, load_pdptes, most_loads, translate
from vapama.spec.outcomes import EptViolation, Outcome, PageFault, Translated, Update
from vapama.spec.stage import Ept
from vapama.spec.subject import EFFECTS, Capabilities, agree

VA, PAGE = 0x1000, 0x7000
CPU = Cpu(cr0=PG | PE, cr3=0x1000, cr4=PAE, efer=LME | LMA)
PLAIN, WITH_FLAGS = Ept(0x101E), Ept(0x105E)
HOST = 0x100000
"""Where the second stage puts guest-physical 0: its own tables are below, at 0x1000 to 0x4000."""


def machine(rights: int = 7, guest: int = 0x67, **changed: int) -> Sparse:
    """Guest tables at guest-physical 0x1000 to 0x4000, identity but for HOST; 4-KByte pages."""
    ept = {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007}
    for page in range(16):
        ept[0x4000 + page * 8] = (
            HOST + page * 0x1000 | 0x30 | (rights if page in range(1, 5) else 7)
        )
    tables = {0x1000: 0x2000, 0x2000: 0x3000, 0x3000: 0x4000, 0x4008: PAGE}
    entries = {HOST + gpa: frame | guest for gpa, frame in tables.items()}
    extra = {int(address, 16): value for address, value in changed.items()}
    return Sparse({**ept, **entries, **extra}, 0x200000)


def walk(stage: Ept, memory: Sparse, write: int = 0) -> Outcome:
    return translate(CPU, stage, memory, Access(VA | 0x123, write=write))


def test_four_levels_over_four_cost_24_loads() -> None:
    watched = Watched(machine())
    outcome = translate(CPU, PLAIN, watched, Access(VA))
    assert isinstance(outcome, Translated)
    assert len(set(watched.loads)) <= 24
    # Flags that are set already are looked at, and not written: no memory is read for that but
    # what the read has read.
    walked = watched.loads[:20] + watched.loads[-4:]
    assert len(walked) == 24 == most_loads(4, 4)
    assert most_loads(5, 5) == 35


def test_an_access_goes_where_both_stages_lead() -> None:
    outcome = walk(PLAIN, machine())
    assert isinstance(outcome, Translated)
    assert (outcome.pa, outcome.level) == (HOST + PAGE + 0x123, 1)


def test_a_table_out_of_reach_comes_before_what_its_entry_says() -> None:
    outcome = walk(PLAIN, machine(rights=0, guest=0))
    assert isinstance(outcome, EptViolation)
    assert outcome.gpa == 0x1000
    assert outcome.qualification == DATA_READ | LINEAR_VALID


def test_the_guests_fault_comes_before_the_page() -> None:
    outcome = walk(PLAIN, machine(guest=0x65, **{hex(0x4000 + 7 * 8): 0}), write=1)
    assert isinstance(outcome, EptViolation)  # CR0.WP is 0: the supervisor may write
    assert outcome.gpa == PAGE | 0x123
    assert outcome.qualification & 0x1FF == DATA_WRITE | LINEAR_VALID | TRANSLATION
    user = translate(
        CPU, PLAIN, machine(guest=0x65, **{hex(0x4000 + 7 * 8): 0}), Access(VA, write=1, user=1)
    )
    assert isinstance(user, PageFault)


def test_with_flags_of_epts_own_a_read_only_table_is_a_violation() -> None:
    outcome = walk(WITH_FLAGS, machine(rights=5))
    assert isinstance(outcome, EptViolation)
    assert outcome.qualification & 7 == DATA_READ | DATA_WRITE


def test_without_them_a_read_only_table_is_one_if_a_flag_is_to_be_set() -> None:
    assert isinstance(walk(PLAIN, machine(rights=5)), Translated)
    outcome = walk(PLAIN, machine(rights=5, guest=0x07))
    assert isinstance(outcome, EptViolation)
    assert outcome.gpa == 0x1000
    assert outcome.qualification & (DATA_WRITE | TRANSLATION) == DATA_WRITE
    every = allowed(CPU, PLAIN, machine(rights=5, guest=0x07), Access(VA))
    assert {o.gpa for o in every if isinstance(o, EptViolation)} == {
        0x1000,
        0x2000,
        0x3000,
        0x4008,
    }


def test_the_guests_flags_are_set_in_the_hosts_memory() -> None:
    outcome = walk(PLAIN, machine(guest=0x07), write=1)
    assert isinstance(outcome, Translated)
    set_there = {update.address: update.bits for update in outcome.updates}
    assert set_there[HOST + 0x1000] == paging.ACCESSED
    assert set_there[HOST + 0x4008] == paging.ACCESSED | paging.DIRTY


def test_before_an_exit_the_flags_of_entries_that_led_to_it_may_be_set() -> None:
    # Of the guest's tables at 0x1000 to 0x4000 the last is out of reach.
    memory = machine(guest=0x07, **{hex(0x4000 + 4 * 8): 0})
    outcome = walk(PLAIN, memory)
    assert isinstance(outcome, EptViolation)
    assert outcome.gpa == 0x4008
    tables = [HOST + gpa for gpa in (0x1000, 0x2000, 0x3000)]
    assert outcome.may_update == tuple(Update(table, paging.ACCESSED) for table in tables)

    def is_right(*updates: Update) -> bool:
        observed = replace(outcome, may_update=updates)
        return bool(agree(outcome, observed, memory, Capabilities(frozenset({EFFECTS}))))

    assert is_right()
    assert is_right(Update(tables[1], paging.ACCESSED))
    assert not is_right(Update(tables[1], paging.ACCESSED | paging.DIRTY))
    assert not is_right(Update(HOST + 0x4008, paging.ACCESSED))


def test_of_4_byte_entries_the_flag_is_in_their_half() -> None:
    # The PDE at 0x1004 leads to a table at 0x9000, behind which there is nothing.
    memory = machine(**{hex(HOST + 0x1000): 0x9007 << 32, hex(0x4000 + 9 * 8): 0})
    legacy = Cpu(cr0=PG | PE, cr3=0x1000, cr4=0, efer=0)
    outcome = translate(legacy, PLAIN, memory, Access(1 << 22))
    assert isinstance(outcome, EptViolation)
    assert outcome.may_update == (Update(HOST + 0x1000, paging.ACCESSED << 32),)


def test_pdptes_are_loaded_through_the_second_stage_without_a_linear_address() -> None:
    legacy = Cpu(cr0=PG | PE, cr3=0x1000, cr4=PAE, efer=0)
    outcome = load_pdptes(legacy, PLAIN, machine(rights=0))
    assert isinstance(outcome, EptViolation)
    assert outcome.qualification & LINEAR_VALID == 0
    # As reads, which flags of EPT's own do not make writes.
    assert load_pdptes(legacy, WITH_FLAGS, machine(rights=5, guest=1)) == (0x2001, 0, 0, 0)
