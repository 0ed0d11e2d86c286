"""Programs of guest and host steps: what the engines find of the hypervisor's seeded mistakes."""

from random import Random

import pytest

from vapama.bugs.mistakes import MISTAKES
from vapama.fuzz.random_engine import Search
from vapama.impl.vmm import Vmm
from vapama.runs import Guarded
from vapama.spec import programs, shadow
from vapama.spec.access import Access
from vapama.spec.machine import Departure, Machine
from vapama.spec.nondet import load_invariants
from vapama.spec.outcomes import OutsideMemory
from vapama.spec.steps import (
    EPT,
    NPT,
    SHADOW,
    Done,
    Faulted,
    Harvest,
    Harvested,
    Invlpg,
    Load,
    Loaded,
    Log,
    Move,
    Plan,
    Rest,
    Seen,
    SetSlot,
    Step,
    Store,
    Stored,
)
from vapama.subjects import load_subject

DESIGNS = (SHADOW, EPT, NPT)
CLAIMS = [name for name, invariant in load_invariants().items() if "vmm" in invariant.needs]
FEW = [
    "a-dropped-entry-stays-in-the-reverse-map",
    "rights-inherited-are-those-of-the-leaf",
    "a-freed-table-is-flushed-later",
    "the-dirty-flag-of-a-page-is-not-waited-for",
    "a-second-stage-entry-goes-without-a-flush",
    "dirty-flags-are-not-collected",
    "the-hosts-right-to-write-is-not-asked",
    "a-split-leaves-the-large-entry",
    "a-table-is-freed-before-the-large-page-is-flushed",
]


@pytest.mark.parametrize("name", CLAIMS)
def test_what_is_claimed_of_the_hypervisor_holds_in_random_programs(name: str) -> None:
    search = Search(load_invariants()[name], load_subject("optimized"), seed=1)
    search.batch(60)
    assert search.failed is None, search.failed


@pytest.mark.parametrize("name", FEW)
def test_random_programs_find_mistakes(name: str) -> None:
    mistake = MISTAKES[name]
    subject = Guarded(name, mistake.subject())
    search = Search(load_invariants()[mistake.breaks], subject, seed=0)
    while search.failed is None and search.executions < 4000:
        search.batch(16)
    assert search.failed is not None


def test_a_word_of_zeros_is_a_step_in_which_nothing_happens() -> None:
    assert programs.decode(0, Machine(programs.plan())) == Rest()


def test_every_word_is_a_step_that_the_hypervisor_can_make() -> None:
    random, plan = Random(5), programs.plan()
    machine, hypervisor = Machine(plan), Vmm(plan)
    for _ in range(300):
        step = programs.decode(random.getrandbits(64), machine, 0x8864)
        machine.check(step, hypervisor.do(step), hypervisor.word)


# THE CHECKER

READ = Load(0, 0, Access(0x8000, user=1))
WRITE = Store(0, 0, Access(0x8000, write=1, user=1), 7)


def marked(_: int, address: int) -> int:
    """A subject's memory in which a read of 0x8000 has set the accessed flags on its way."""
    return programs.image().get(address, 0) | 0x20


@pytest.mark.parametrize(
    "seen",
    [Loaded(0x1112), Faulted(4, 0x8000), Done(), Stored()],
    ids=lambda seen: type(seen).__name__,
)
def test_the_machine_refuses_what_a_load_cannot_show(seen: object) -> None:
    machine = Machine(programs.plan())
    with pytest.raises(Departure):
        machine.check(READ, seen, marked)  # type: ignore[arg-type]


def test_the_machine_wants_accessed_flags_and_no_others() -> None:
    machine = Machine(programs.plan())
    machine.check(READ, Loaded(0x1111), marked)
    for wrong in (0, 0x60):
        machine = Machine(programs.plan())

        def look(_: int, address: int, wrong: int = wrong) -> int:
            return programs.image()[address] | wrong

        with pytest.raises(Departure):
            machine.check(READ, Loaded(0x1111), look)


def test_the_machine_follows_a_stale_translation_until_the_guest_invalidates_it() -> None:
    plan = programs.plan(guests=1)
    machine, hypervisor = Machine(plan), Vmm(plan)

    def do(step: object) -> object:
        seen = hypervisor.do(step)  # type: ignore[arg-type]
        machine.check(step, seen, hypervisor.word)  # type: ignore[arg-type]
        return seen

    assert do(READ) == Loaded(0x1111)
    entry = programs.LOW << 12 | 8 << 3
    do(Store(0, 0, Access(entry, write=1), 9 << 12 | programs.USED))
    # Either page may be read now, and no other value.
    for value, right in ((0x1111, True), (0x2222, True), (0x3333, False)):
        if right:
            machine.check(READ, Loaded(value), hypervisor.word)
        else:
            with pytest.raises(Departure):
                machine.check(READ, Loaded(value), hypervisor.word)


def run(plan: Plan, *steps: Step) -> list[Seen]:
    """A program, judged and audited after every step."""
    machine, hypervisor = Machine(plan), Vmm(plan)
    seen = []
    for step in steps:
        seen.append(hypervisor.do(step))
        machine.check(step, seen[-1], hypervisor.word)
        assert not list(shadow.audit(hypervisor.view()))
    return seen


def store(address: int, value: int) -> Store:
    return Store(0, 0, Access(address, write=1), value)


ENTRY = programs.DIRECTORY << 12 | 1 << 3
"""The page directory's entry for 0x200000 and on."""


@pytest.mark.parametrize("design", DESIGNS)
def test_a_fault_in_the_second_page_leaves_what_is_cached_for_the_first(design: str) -> None:
    seen = run(
        programs.plan(design=design),
        store(0x205000, 1),
        store(ENTRY, 1 << 45 | programs.HIGH << 12 | programs.USED),
        Invlpg(0, 0, 0x8000),
        store(0x205FFC, 2),
        store(0x205000, 3),
    )
    if design != SHADOW:  # whose directory is shadowed: it has no stale entries
        assert seen[-2:] == [Faulted(0xB, 0x206000), Stored()]


def test_the_machine_wants_the_address_of_a_fault() -> None:
    absent = Load(0, 0, Access(0xE00000))
    for cr2, right in ((0xE00000, True), (0xE01000, False)):
        machine = Machine(programs.plan())
        if right:
            machine.check(absent, Faulted(0, cr2), marked)
        else:
            with pytest.raises(Departure):
                machine.check(absent, Faulted(0, cr2), marked)


@pytest.mark.parametrize("design", DESIGNS)
def test_an_entry_is_cached_as_it_was_before_the_store_that_it_leads_to_itself(design: str) -> None:
    """A store to the upper half of the entry that maps the very page: the flags were set before."""
    address = 0x200000 | programs.HIGH << 12 | programs.HIGH << 3
    seen = run(programs.plan(design=design), store(address | 4, 2), store(address, 0))
    assert seen == [Stored(), Stored()]


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("mode", ["4 levels", "5 levels"])
def test_all_flags_of_a_walk_are_set_before_its_store(design: str, mode: str) -> None:
    """A store overwrites the entry of the page that it is made through."""
    style = 3 << 29 if mode == "5 levels" else 0
    itself = store(2 << 21 | programs.DIRECTORY << 12 | 2 << 3, 0)
    seen = run(programs.plan(style, design), itself, itself)
    if design != SHADOW:
        assert seen == [Stored(), Stored()]


def test_a_fault_drops_what_was_remembered_of_a_device() -> None:
    at, entry = 0x18000, programs.LOW << 12 | 0x18 << 3
    fault, read = Load(0, 0, Access(at, user=1)), Load(0, 0, Access(at))
    supervisors = programs.USED & ~4
    seen = run(
        programs.plan(),
        store(entry, programs.DEVICE << 12 | supervisors),
        read,
        store(entry, 9 << 12 | supervisors),
        fault,
        read,
    )
    assert seen[-2:] == [Faulted(5, at), Loaded(0x2222)]


@pytest.mark.parametrize("design", DESIGNS)
def test_a_root_without_memory_is_used_once_there_is_some(design: str) -> None:
    read = Load(0, 0, Access(0x8000))
    seen = run(
        programs.plan(design=design),
        SetSlot(0, 1, None),
        Move(0, 0, "cr3", 24 << 12),
        read,
        SetSlot(0, 1, programs.ALIAS),
        store(0x8000, 1),
    )
    assert seen[2] == OutsideMemory(24 << 12)
    assert isinstance(seen[-1], Faulted)


def test_a_table_in_read_only_memory_needs_no_dirty_flags() -> None:
    """Its entry for 0x200000 names frame 0, and can never be marked dirty."""
    table = store(ENTRY, programs.ROM_TABLE << 12 | programs.USED)
    assert run(programs.plan(), table, store(0x200FF8, 5)) == [Stored(), Stored()]


def test_a_dirty_log_that_lacks_a_page_is_refused() -> None:
    plan = programs.plan(guests=1)
    machine, hypervisor = Machine(plan), Vmm(plan)
    for step in (Log(0, 0, True), WRITE):
        machine.check(step, hypervisor.do(step), hypervisor.word)
    with pytest.raises(Departure, match="lacks"):
        machine.check(Harvest(0, 0), Harvested(frozenset()), hypervisor.word)


# THE AUDIT


def worked() -> Vmm:
    """A hypervisor after a program in which its tables were filled."""
    random, plan = Random(3), programs.plan()
    machine, hypervisor = Machine(plan), Vmm(plan)
    for _ in range(40):
        hypervisor.do(programs.decode(random.getrandbits(64), machine, 0x8864))
    assert not list(shadow.audit(hypervisor.view()))
    return hypervisor


@pytest.mark.parametrize("bit", [0, 1, 12])
def test_an_entry_that_is_altered_behind_the_books_is_found(bit: int) -> None:
    for index in list(worked().guests[0].mmu.mapped):
        hypervisor = worked()
        if bit == 1 and hypervisor.ram[index] & 2:
            continue  # to take a right away breaks no rule
        hypervisor.ram[index] ^= 1 << bit
        if list(shadow.audit(hypervisor.view())):
            return
    raise AssertionError("no altered entry was found")


def test_a_frame_that_is_lost_is_found() -> None:
    hypervisor = worked()
    hypervisor.frames.take()
    assert [violation.rule for violation in shadow.audit(hypervisor.view())] == [6]
