"""Combined and guest-physical mappings (SDM Vol. 3C, 28.3): what a guest under EPT may still use.

The guest's tables are as in test_tlb.py, at guest-physical addresses that EPT maps one to one but
for page 9000, which it maps to 0x19000. EPT's tables are at 0x20000 and up.
"""

from collections.abc import Callable

import pytest

from vapama.spec.access import Access
from vapama.spec.cpu import LMA, LME, PAE, PCIDE, PE, PG, WP, Cpu, ImpossibleState
from vapama.spec.memory import Sparse
from vapama.spec.outcomes import EptViolation, NestedPageFault, PageFault, Translated
from vapama.spec.stage import Ept, Npt
from vapama.spec.tlb import KEEP, PGE, History
from vapama.spec.tlb_nested import GuestProcessor

URW, GLOBAL = 0x67, 0x100
PTE = 0x1000
TABLES = {0x4000: 0x3000 | URW, 0x3000: 0x2000 | URW, 0x2000: 0x1000 | URW, PTE: 0x9000 | URW}
RWX, WRITE_BACK = 7, 6 << 3
EPT_ROOT, EPT_TABLE = 0x20000, 0x23000
EPT_TABLES = {
    EPT_ROOT: 0x21000 | RWX,
    0x21000: 0x22000 | RWX,
    0x22000: EPT_TABLE | RWX,
    **{EPT_TABLE + 8 * n: n << 12 | RWX | WRITE_BACK for n in range(1, 16)},
    EPT_TABLE + 8 * 9: 0x19000 | RWX | WRITE_BACK,
}
READ = Access(0, user=1)
EPTP = EPT_ROOT | 3 << 3 | 6


def guest(pte: int = TABLES[PTE]) -> GuestProcessor:
    cpu = Cpu(PG | PE | WP, 0x4001, PAE | PGE | PCIDE, LME | LMA)
    memory = Sparse({**TABLES, **EPT_TABLES, PTE: pte}, 0x40000)
    return GuestProcessor(History(memory), cpu, Ept(EPTP))


def pages(one: GuestProcessor) -> set[int | str]:
    """The host's pages that a read may go to, and how else it may end."""
    names = {PageFault: "fault", EptViolation: "violation", NestedPageFault: "violation"}
    return {
        outcome.pa & ~0xFFF if isinstance(outcome, Translated) else names[type(outcome)]
        for outcome in one.outcomes(READ)
    }


Operation = Callable[[GuestProcessor], None]
LINEAR: list[Operation] = [
    lambda p: p.invlpg(0),
    lambda p: p.invpcid(2),
    lambda p: p.mov_cr3(p.cpu.cr3),
    lambda p: p.invvpid(0, 1, 0),
    lambda p: p.invvpid(1, 1),
    lambda p: p.invvpid(2),
    lambda p: p.invvpid(3, 1),
]
EPT: list[Operation] = [lambda p: p.invept(1, EPTP), lambda p: p.invept(2)]
NEITHER: list[Operation] = [
    lambda p: p.invept(1, 0x30000),
    lambda p: p.invvpid(1, 2),
    lambda p: p.invlpg(0x1000),
    lambda p: p.mov_cr3(p.cpu.cr3 | KEEP),
    lambda p: p.enter(p.cpu, p.stage),
]


@pytest.mark.parametrize("operation", [*LINEAR, *EPT, *NEITHER])
def test_what_the_guest_changed_is_dropped_by_either_kind(operation: Operation) -> None:
    one = guest()
    one.history.write(PTE, 0xA000 | URW)
    assert pages(one) == {0x19000, 0xA000}
    operation(one)
    assert pages(one) == ({0x19000, 0xA000} if operation in NEITHER else {0xA000})


@pytest.mark.parametrize("operation", [*LINEAR, *EPT, *NEITHER])
def test_what_the_host_changed_is_dropped_by_invept_alone(operation: Operation) -> None:
    one = guest()
    one.history.write(EPT_TABLE + 8 * 9, 0x1A000 | RWX | WRITE_BACK)
    operation(one)
    assert pages(one) == ({0x1A000} if operation in EPT else {0x19000, 0x1A000})


def test_a_page_that_the_host_takes_away_may_be_used_until_invept() -> None:
    one = guest()
    one.history.write(EPT_TABLE + 8 * 9, 0)
    assert pages(one) == {0x19000, "violation"}
    one.invept(1, EPTP)
    assert pages(one) == {"violation"}


def test_a_page_that_the_host_gives_needs_no_invept() -> None:
    one = guest()
    one.history.write(EPT_TABLE + 8 * 9, 0)
    one.invept(1, EPTP)
    one.history.write(EPT_TABLE + 8 * 9, 0x1A000 | RWX | WRITE_BACK)
    assert pages(one) == {0x1A000}


def test_rights_that_the_host_gives_may_cause_one_violation_more() -> None:
    one = guest()
    one.history.write(EPT_TABLE + 8 * 9, 0x19000 | 4 | WRITE_BACK)
    one.invept(2)
    one.history.write(EPT_TABLE + 8 * 9, 0x19000 | RWX | WRITE_BACK)
    assert pages(one) == {0x19000, "violation"}
    one.ept_violation(0x9000, 0)
    assert pages(one) == {0x19000}


def test_a_global_page_of_the_guest_outlives_mov_cr3() -> None:
    one = guest(TABLES[PTE] | GLOBAL)
    one.history.write(PTE, 0xA000 | URW)
    one.mov_cr3(one.cpu.cr3)
    assert pages(one) == {0x19000, 0xA000}
    one.invvpid(3, 1)
    assert pages(one) == {0x19000, 0xA000}
    one.invvpid(1, 1)
    assert pages(one) == {0xA000}


def test_there_are_two_types_of_invept() -> None:
    with pytest.raises(ImpossibleState, match="INVEPT type 0"):
        guest().invept(0)


NPT_TABLES = {at: entry & ~0xFFF | URW for at, entry in EPT_TABLES.items()}


def amd_guest() -> GuestProcessor:
    cpu = Cpu(PG | PE | WP, 0x4001, PAE | PGE | PCIDE, LME | LMA)
    other = {0x25000: 0x21000 | URW}
    return GuestProcessor(
        History(Sparse({**TABLES, **NPT_TABLES, **other}, 0x40000)), cpu, Npt(EPT_ROOT)
    )


@pytest.mark.parametrize(("control", "pages_left"), [(0, 2), (1, 1), (3, 1), (7, 2)])
def test_with_nested_paging_tlb_control_drops_what_the_host_changed(
    control: int, pages_left: int
) -> None:
    # 7 leaves what is global, and with it what the second stage said of it.
    one = amd_guest()
    one.history.write(PTE, TABLES[PTE] | GLOBAL)
    one.history.time += 1
    one.history.write(EPT_TABLE + 8 * 9, 0x1A000 | URW)
    one.invpcid(2)
    one.invlpga(0, 1)
    assert pages(one) == {0x19000, 0x1A000}
    one.enter(one.cpu, one.stage, 1, control)
    assert len(pages(one)) == pages_left


def test_with_nested_paging_another_root_drops_nothing_of_its_asid() -> None:
    one = amd_guest()
    one.enter(one.cpu, Npt(0x26000), 1)
    assert 0x19000 in pages(one)
    one.enter(one.cpu, Npt(0x26000), 2)
    assert 0x19000 not in pages(one)
    one.enter(one.cpu, Npt(0x26000), 1, 3)
    assert 0x19000 not in pages(one)
