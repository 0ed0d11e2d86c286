"""Histories written by hand from the manual (SDM Vol. 3A, 4.10), and what a processor may do.

The table at level n is the frame n000, so the PML4 is at 0x4000, and page 0 is mapped by the first
entry of each. Frames from 0x9000 on are pages.
"""

from collections.abc import Callable

import pytest

from vapama.spec.access import Access
from vapama.spec.cpu import (
    LMA,
    LME,
    NXE,
    PAE,
    PCIDE,
    PE,
    PG,
    SMEP,
    WP,
    Cpu,
    ImpossibleState,
)
from vapama.spec.memory import Sparse
from vapama.spec.outcomes import NonCanonical, OutsideMemory, PageFault, Translated, Update
from vapama.spec.tlb import KEEP, PGE, History, Processor

PRESENT, WRITABLE, USER, ACCESSED, DIRTY, PS, GLOBAL = 1, 2, 4, 0x20, 0x40, 0x80, 0x100
READ_ONLY = PRESENT | USER | ACCESSED
URW = READ_ONLY | WRITABLE
PML4E, PDPTE, PDE, PTE = 0x4000, 0x3000, 0x2000, 0x1000
OLD, NEW = 0x9000, 0xA000
READ, WRITE = Access(0, user=1), Access(0, 1, user=1)
TABLES = {PML4E: 0x3000 | URW, PDPTE: 0x2000 | URW, PDE: 0x1000 | URW, PTE: OLD | URW}

Operation = Callable[[Processor], None]


def processor(*, tables: dict[int, int] | None = None, cr4: int = PAE | PGE | PCIDE) -> Processor:
    entries = TABLES if tables is None else tables
    cpu = Cpu(PG | PE | WP, 0x4001, cr4, LME | LMA | NXE)
    return Processor(History(Sparse(entries, 0x10000)), cpu)


def pages(one: Processor, access: Access = READ) -> set[int | str]:
    """The pages that the access may go to, and "fault" if it may fault."""
    found: set[int | str] = set()
    for outcome, _ in one.allowed(access):
        assert isinstance(outcome, Translated | PageFault)
        found.add(outcome.pa & ~0xFFF if isinstance(outcome, Translated) else "fault")
    return found


def changed(one: Processor, value: int = NEW | URW, where: int = PTE) -> Processor:
    one.history.write(where, value)
    return one


def test_without_an_invalidation_an_old_translation_may_be_used() -> None:
    assert pages(changed(processor())) == {OLD, NEW}


def test_a_page_that_is_unmapped_may_still_be_used() -> None:
    assert pages(changed(processor(), 0)) == {OLD, "fault"}


@pytest.mark.parametrize(
    "operation",
    [
        lambda p: p.invlpg(0),
        lambda p: p.invlpg(0xFFF),
        lambda p: p.invpcid(0, 1, 0),
        lambda p: p.invpcid(1, 1),
        lambda p: p.invpcid(2),
        lambda p: p.invpcid(3),
        lambda p: p.mov_cr3(p.cpu.cr3),
        lambda p: p.change(p.cpu._replace(cr4=p.cpu.cr4 ^ PGE)),
        lambda p: p.change(p.cpu._replace(cr4=p.cpu.cr4 | SMEP)),
        lambda p: p.page_fault(0),
    ],
)
def test_after_an_invalidation_only_memory_counts(operation: Operation) -> None:
    one = changed(processor())
    operation(one)
    assert pages(one) == {NEW}


@pytest.mark.parametrize(
    "operation",
    [
        lambda p: None,
        lambda p: p.invlpg(0x1000),
        lambda p: p.invpcid(0, 1, 0x1000),
        lambda p: p.invpcid(0, 2, 0),
        lambda p: p.invpcid(1, 2),
        lambda p: p.mov_cr3(p.cpu.cr3 | KEEP),
        lambda p: p.change(p.cpu._replace(cr0=p.cpu.cr0 & ~WP)),
        lambda p: p.change(p.cpu._replace(pkru=3)),
        lambda p: p.page_fault(0x1000),
    ],
)
def test_what_an_operation_need_not_drop_may_be_used(operation: Operation) -> None:
    one = changed(processor())
    operation(one)
    assert pages(one) == {OLD, NEW}


@pytest.mark.parametrize(
    ("operation", "kept"),
    [
        (lambda p: p.invlpg(0), False),
        (lambda p: p.invpcid(0, 1, 0), True),
        (lambda p: p.invpcid(1, 1), True),
        (lambda p: p.invpcid(2), False),
        (lambda p: p.invpcid(3), True),
        (lambda p: p.mov_cr3(p.cpu.cr3), True),
        (lambda p: p.change(p.cpu._replace(cr4=p.cpu.cr4 ^ PGE)), False),
    ],
)
def test_a_global_translation_outlives_some(operation: Operation, kept: bool) -> None:
    one = changed(processor(tables={**TABLES, PTE: OLD | URW | GLOBAL}))
    operation(one)
    assert pages(one) == ({OLD, NEW} if kept else {NEW})


def test_without_pge_no_translation_is_global() -> None:
    one = changed(processor(tables={**TABLES, PTE: OLD | URW | GLOBAL}, cr4=PAE | PCIDE))
    one.mov_cr3(one.cpu.cr3)
    assert pages(one) == {NEW}


def test_another_pcid_uses_global_translations_alone() -> None:
    for flag, expected in ((0, {"fault"}), (GLOBAL, {OLD, "fault"})):
        one = processor(tables={**TABLES, PTE: OLD | URW | flag, 0x5000: 0})
        one.mov_cr3(0x5002 | KEEP)
        assert pages(one) == expected


def test_a_pcid_finds_its_translations_when_it_comes_back() -> None:
    one = changed(processor())
    one.mov_cr3(0x4002 | KEEP)
    assert pages(one) == {NEW}
    one.mov_cr3(0x4001 | KEEP)
    assert pages(one) == {OLD, NEW}
    one.mov_cr3(0x4002)
    one.mov_cr3(0x4001 | KEEP)
    assert pages(one) == {OLD, NEW}
    one.mov_cr3(0x4001)
    assert pages(one) == {NEW}


def test_what_memory_held_while_another_pcid_ran_is_not_cached() -> None:
    one = processor()
    one.mov_cr3(0x5002 | KEEP)
    changed(changed(one, 0xB000 | URW))
    one.mov_cr3(0x4001 | KEEP)
    assert pages(one) == {OLD, NEW}


def test_an_old_root_may_be_used_by_its_pcid() -> None:
    one = processor(tables={**TABLES, 0x5000: 0x6000 | URW, 0x6000: 1 << 30 | URW | PS})
    one.mov_cr3(0x5001 | KEEP)
    assert pages(one) == {OLD, 1 << 30}
    one.invlpg(0)
    assert pages(one) == {1 << 30}


def test_not_present_to_present_needs_no_invalidation() -> None:
    for where, value in TABLES.items():
        one = processor(tables={**TABLES, where: value & ~PRESENT})
        assert pages(changed(one, value, where)) == {OLD}


def test_a_value_with_a_reserved_bit_was_never_cached() -> None:
    one = processor(tables={**TABLES, PTE: OLD | URW | 1 << 51})
    one.change(one.cpu._replace(maxphyaddr=40))
    assert pages(changed(one)) == {NEW}


def test_a_value_with_a_0_was_never_cached() -> None:
    one = processor(tables={**TABLES, PTE: (OLD | URW) & ~ACCESSED})
    assert pages(changed(one)) == {NEW}


def test_raised_rights_may_fault_once_more() -> None:
    one = changed(processor(tables={**TABLES, PTE: OLD | READ_ONLY}), OLD | URW)
    assert pages(one, WRITE) == {OLD, "fault"}
    one.page_fault(0)
    assert pages(one, WRITE) == {OLD}


def test_a_write_needs_a_cached_dirty_flag_or_a_walk() -> None:
    assert pages(changed(processor()), WRITE) == {NEW}
    one = changed(processor(tables={**TABLES, PTE: OLD | URW | DIRTY}))
    assert pages(one, WRITE) == {OLD, NEW}


def test_rights_are_judged_by_the_control_state_of_now() -> None:
    one = processor(tables={**TABLES, PTE: OLD | READ_ONLY | DIRTY})
    supervisor = Access(0, 1)
    assert pages(one, supervisor) == {"fault"}
    one.change(one.cpu._replace(cr0=one.cpu.cr0 & ~WP))
    assert pages(one, supervisor) == {OLD}


def test_another_address_drops_the_structures_but_not_the_translation() -> None:
    one = changed(processor(), 0x5000 | URW, PDE)
    changed(one, NEW | URW, 0x5000)
    assert pages(one) == {OLD, NEW}
    changed(one, 0xB000 | URW)
    assert pages(one) == {OLD, NEW, 0xB000}
    one.invlpg(0x1000)
    assert pages(one) == {OLD, NEW, 0xB000}
    changed(one, 0xC000 | URW)
    assert pages(one) == {OLD, NEW, 0xB000}


@pytest.mark.parametrize(("address", "kept"), [(0x1000, False), (1 << 21, True), (1 << 39, True)])
def test_invpcid_drops_the_structures_that_serve_its_address(address: int, kept: bool) -> None:
    one = changed(processor(), 0x5000 | URW, PDE)
    one.invpcid(0, 1, address)
    changed(one, 0xB000 | URW)
    assert (0xB000 in pages(one)) is kept


def test_one_invlpg_drops_a_whole_large_page() -> None:
    large = {**TABLES, PDE: 0x20_0000 | URW | PS}
    one = changed(processor(tables=large), TABLES[PDE], PDE)
    one.invlpg(0x40_0000)
    assert pages(one) == {0x20_0000, OLD}
    one.invlpg(0x1F_F000)
    assert pages(one) == {OLD}


def test_parts_of_two_walks_do_not_mix_backwards() -> None:
    """An upper entry read late does not lead to a lower one read early."""
    one = processor(tables={**TABLES, PDE: 0x1000 | READ_ONLY, PTE: OLD | URW | DIRTY})
    changed(one)
    changed(one, TABLES[PDE], PDE)
    assert pages(one, WRITE) == {NEW, "fault"}


def test_flags_must_be_set_in_what_cannot_be_cached() -> None:
    one = processor(tables={**TABLES, PTE: (OLD | URW) & ~ACCESSED})
    marked = (Update(PTE, ACCESSED),)
    assert one.allows(READ, Translated(OLD, 1, marked))
    assert not one.allows(READ, Translated(OLD, 1, ()))
    assert not one.allows(READ, Translated(OLD, 1, (Update(PTE, ACCESSED | DIRTY),)))
    assert not one.allows(READ, Translated(OLD, 1, (*marked, Update(0x2008, ACCESSED))))


def test_flags_cleared_without_an_invalidation_may_stay_clear() -> None:
    one = processor(tables={**TABLES, PTE: OLD | URW | DIRTY})
    changed(one, (OLD | URW) & ~ACCESSED)
    assert one.allows(WRITE, Translated(OLD, 1, ()))
    assert one.allows(WRITE, Translated(OLD, 1, (Update(PTE, ACCESSED | DIRTY),)))
    one.invlpg(0)
    assert not one.allows(WRITE, Translated(OLD, 1, ()))
    assert one.allows(WRITE, Translated(OLD, 1, (Update(PTE, ACCESSED | DIRTY),)))


def test_a_vpid_has_translations_of_its_own() -> None:
    history = History(Sparse(TABLES, 0x10000))
    cpu = Cpu(PG | PE | WP, 0x4000, PAE, LME | LMA)
    host, guest = Processor(history, cpu, vpid=0), Processor(history, cpu, vpid=1)
    changed(host)
    guest.invpcid(2)
    assert pages(host) == {OLD, NEW}
    assert pages(guest) == {NEW}


def test_a_stale_structure_may_lead_outside_memory() -> None:
    one = changed(processor(tables={**TABLES, PDE: 0x10000 | URW}), TABLES[PDE], PDE)
    outcomes = [outcome for outcome, _ in one.allowed(READ)]
    assert OutsideMemory in map(type, outcomes)
    one.invlpg(0)
    assert [type(outcome) for outcome, _ in one.allowed(READ)] == [Translated]


def test_an_address_that_is_not_canonical_has_one_outcome() -> None:
    assert [o for o, _ in processor().allowed(Access(1 << 47))] == [NonCanonical()]


def test_there_are_four_types_of_invpcid() -> None:
    with pytest.raises(ImpossibleState, match="INVPCID type 4"):
        processor().invpcid(4)
