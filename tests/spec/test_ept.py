"""Extended page tables by example: what the manual's sentences come to, worked out by hand."""

from itertools import product

import pytest

from vapama.spec.access import GuestPhysicalAccess
from vapama.spec.cpu import ImpossibleState, UnsupportedMode
from vapama.spec.ept import UC, UC_MINUS, WB, WC, WP, WT, mappings, memory_type, path, translate
from vapama.spec.memory import Sparse
from vapama.spec.outcomes import (
    EptMisconfiguration,
    EptViolation,
    Outcome,
    OutsideMemory,
    Translated,
    Update,
)
from vapama.spec.stage import EPT_CAPABILITIES, Ept

R, W, X, XU, PS, A, D = 1, 2, 4, 1 << 10, 1 << 7, 1 << 8, 1 << 9
ALL = R | W | X | XU
GPA = 0x1234
NO_EXECUTE_ONLY = EPT_CAPABILITIES & ~1
NO_1GB, NO_2MB, NO_ADVANCED = (EPT_CAPABILITIES & ~(1 << bit) for bit in (17, 16, 22))
NMI_AND_SSS = 1 << 12 | 1 << 14
"""Bits of the exit qualification that are always open."""


def ept(ad: int = 0, mbec: int = 0, capabilities: int = EPT_CAPABILITIES) -> Ept:
    return Ept(0x101E | ad << 6, maxphyaddr=40, mbec=mbec, capabilities=capabilities)


def tables(
    pml4e: int = 0x2000 | ALL,
    pdpte: int = 0x3000 | ALL,
    pde: int = 0x4000 | ALL,
    pte: int = 0x5030 | ALL,
) -> Sparse:
    entries = {0x1000: pml4e, 0x2000: pdpte, 0x3000: pde, 0x4008: pte}
    return Sparse(entries, 0x8000)


def read(**more: int) -> GuestPhysicalAccess:
    return GuestPhysicalAccess(GPA, **more)


def qualification(outcome: Outcome) -> int:
    """The exit qualification without its open bits."""
    assert isinstance(outcome, EptViolation)
    assert outcome.gpa == GPA
    assert outcome.open_bits & NMI_AND_SSS == NMI_AND_SSS
    return outcome.qualification & ~outcome.open_bits


def test_a_walk_translates_and_marks_nothing_without_flags() -> None:
    assert translate(ept(), tables(), read()) == Translated(0x5234, 1, ())


def test_flags_are_bits_8_and_9_and_dirty_is_the_leaf_s() -> None:
    upper = tuple(Update(address, A) for address in (0x1000, 0x2000, 0x3000))
    for access, bits in ((read(), A), (read(write=1), A | D), (read(fetch=1), A)):
        expected = Translated(0x5234, 1, (*upper, Update(0x4008, bits)))
        assert translate(ept(ad=1), tables(), access) == expected


def test_with_flags_an_access_to_a_guest_table_is_a_write_that_reads() -> None:
    outcome = translate(ept(ad=1), tables(), read(table=1))
    assert isinstance(outcome, Translated)
    assert outcome.updates[-1] == Update(0x4008, A | D)
    denied = translate(ept(ad=1), tables(pte=0x5030 | R | X), read(table=1))
    # 0x8b and the rights R and X: read, write, linear address valid, and not its translation.
    assert qualification(denied) == 0x83 | (R | X) << 3
    assert isinstance(translate(ept(), tables(pte=0x5030 | R | X), read(table=1)), Translated)


def test_a_load_of_pdptes_only_reads_and_has_no_linear_address() -> None:
    pdptes = read(table=1, linear=0)
    outcome = translate(ept(ad=1), tables(pte=0x5030 | R), pdptes)
    assert isinstance(outcome, Translated)
    assert outcome.updates[-1] == Update(0x4008, A)
    assert qualification(translate(ept(ad=1), tables(pte=0), pdptes)) == 1


@pytest.mark.parametrize(("level", "rights"), [*product(range(4), range(8))])
def test_every_right_at_every_level(level: int, rights: int) -> None:
    name, frame = (("pml4e", 0x2000), ("pdpte", 0x3000), ("pde", 0x4000), ("pte", 0x5030))[level]
    memory = tables(**{name: frame | rights})
    for access, needs in ((read(), R), (read(write=1), W), (read(fetch=1), X)):
        outcome = translate(ept(), memory, access)
        if rights == 0:
            assert qualification(outcome) & 0x3F == needs
        elif rights & (R | W) == W:
            assert outcome == EptMisconfiguration(GPA)
        elif rights & needs:
            assert outcome == Translated(0x5234, 1, ())
        else:
            assert qualification(outcome) & 0x3F == needs | rights << 3


@pytest.mark.parametrize(
    ("rights", "mbec", "execute_only", "bad"),
    [
        (X, 0, 1, False),
        (X, 0, 0, True),
        (XU, 1, 1, False),
        (XU, 1, 0, True),
        (XU | W, 1, 1, True),
        (XU | X, 1, 0, True),
        (XU | X | R, 1, 0, False),
        (XU | R, 0, 0, False),
    ],
)
def test_execution_without_reads_needs_the_capability(
    rights: int, mbec: int, execute_only: int, bad: bool
) -> None:
    state = ept(mbec=mbec, capabilities=EPT_CAPABILITIES if execute_only else NO_EXECUTE_ONLY)
    outcome = translate(state, tables(pte=0x5030 | rights), read(fetch=1, user=1))
    assert isinstance(outcome, EptMisconfiguration) is bad


def test_bit_10_alone_is_present_only_with_mode_based_execute_control() -> None:
    memory = tables(pde=0x4000 | XU)
    assert qualification(translate(ept(), memory, read())) & 0x38 == 0
    assert qualification(translate(ept(mbec=1), memory, read(fetch=1))) & 0x7F == X | 1 << 6
    assert isinstance(translate(ept(mbec=1), memory, read(fetch=1, user=1)), Translated)


@pytest.mark.parametrize(("user", "rights"), [*product((0, 1), (X, XU, X | XU))])
def test_mode_based_execute_control_asks_the_address_s_mode(user: int, rights: int) -> None:
    outcome = translate(ept(mbec=1), tables(pte=0x5030 | R | rights), read(fetch=1, user=user))
    if rights & (XU if user else X):
        assert isinstance(outcome, Translated)
    else:
        told = 1 << 6 if rights == XU else X << 3
        assert qualification(outcome) & 0x7F == X | R << 3 | told


@pytest.mark.parametrize(
    ("entries", "capabilities", "bad"),
    [
        ({"pml4e": 0x2000 | ALL | 1 << 3}, EPT_CAPABILITIES, True),
        ({"pml4e": 0x2000 | ALL | PS}, EPT_CAPABILITIES, True),
        ({"pdpte": 0x3000 | ALL | 1 << 6}, EPT_CAPABILITIES, True),
        ({"pde": 0x4000 | ALL | 1 << 5}, EPT_CAPABILITIES, True),
        ({"pde": 0x4000 | ALL | 1 << 40}, EPT_CAPABILITIES, True),
        ({"pde": 0x4000 | ALL | 1 << 52 | 1 << 63 | 1 << 11}, EPT_CAPABILITIES, False),
        ({"pte": 0x5000 | ALL | 1 << 7 | 1 << 6}, EPT_CAPABILITIES, False),
        ({"pte": 0x5000 | ALL | 1 << 51}, EPT_CAPABILITIES, True),
        ({"pde": 0x200000 | ALL | PS | 0x30}, EPT_CAPABILITIES, False),
        ({"pde": 0x200000 | ALL | PS | 0x30}, NO_2MB, True),
        ({"pde": 0x201000 | ALL | PS}, EPT_CAPABILITIES, True),
        ({"pde": 0x300000 | ALL | PS}, EPT_CAPABILITIES, True),
        ({"pdpte": 0x40000000 | ALL | PS}, EPT_CAPABILITIES, False),
        ({"pdpte": 0x40000000 | ALL | PS}, NO_1GB, True),
        ({"pdpte": 0x40200000 | ALL | PS}, EPT_CAPABILITIES, True),
        ({"pdpte": 0x60000000 | ALL | PS}, EPT_CAPABILITIES, True),
    ],
)
def test_reserved_bits_by_level(entries: dict[str, int], capabilities: int, bad: bool) -> None:
    outcome = translate(ept(capabilities=capabilities), tables(**entries), read())
    assert isinstance(outcome, EptMisconfiguration) is bad
    assert isinstance(outcome, Translated) is not bad


@pytest.mark.parametrize("number", range(8))
def test_memory_types_2_3_and_7_do_not_exist(number: int) -> None:
    outcome = translate(ept(), tables(pte=0x5000 | ALL | number << 3), read())
    assert isinstance(outcome, EptMisconfiguration) is (number in (2, 3, 7))


def test_an_absent_entry_comes_before_what_lies_below_and_after_what_lies_above() -> None:
    bad = 0x2000 | ALL | PS
    absent = tables(pml4e=0x2000 | 1 << 51 | 0xF8, pdpte=bad)
    assert isinstance(translate(ept(), absent, read()), EptViolation)
    assert isinstance(translate(ept(), tables(pml4e=bad, pdpte=0), read()), EptMisconfiguration)
    # Rights are looked at last: a misconfiguration below a page that denies the access wins.
    denying = tables(pml4e=0x2000 | R, pte=0x5000 | W)
    assert isinstance(translate(ept(), denying, read(write=1)), EptMisconfiguration)


def test_a_walk_that_ends_early_may_have_marked_what_it_used() -> None:
    used = (Update(0x1000, A), Update(0x2000, A))
    for entry, kind in ((0, EptViolation), (0x4000 | W, EptMisconfiguration)):
        outcome = translate(ept(ad=1), tables(pde=entry), read())
        assert isinstance(outcome, kind)
        assert isinstance(outcome, EptViolation | EptMisconfiguration)
        assert outcome.may_update == used
    denied = translate(ept(ad=1), tables(pde=0x4000 | R), read(write=1))
    assert isinstance(denied, EptViolation)
    assert denied.may_update == (*used, Update(0x3000, A), Update(0x4008, A))
    unmarked = translate(ept(), tables(pde=0), read())
    assert isinstance(unmarked, EptViolation)
    assert unmarked.may_update == ()


def test_the_qualification_tells_what_the_guest_s_paging_says() -> None:
    absent = tables(pte=0)
    for user, writable, no_execute in product((0, 1), repeat=3):
        access = read(user=user, writable=writable, no_execute=no_execute)
        told = user << 9 | writable << 10 | no_execute << 11
        assert qualification(translate(ept(), absent, access)) == 0x181 | told
        assert qualification(translate(ept(capabilities=NO_ADVANCED), absent, access)) == 0x181
    shadow = read(shadow_stack=1, writable=0)
    assert qualification(translate(ept(), absent, shadow)) == 0x181 | 1 << 13


def test_updating_a_guest_s_flags_writes_and_may_read() -> None:
    outcome = translate(ept(), tables(pte=0x5030 | R), read(table=1, write=1))
    assert qualification(outcome) & 0x1FF == 0x82 | R << 3
    assert isinstance(outcome, EptViolation)
    assert outcome.open_bits & 1


def test_four_levels_translate_48_bits_and_five_all() -> None:
    high = GuestPhysicalAccess(GPA | 1 << 48)
    outcome = translate(ept(), tables(), high)
    assert isinstance(outcome, EptViolation)
    assert outcome.qualification & 0x38 == 0
    memory = Sparse({0x0: 0x1000 | ALL, 0x8: 0x1000 | ALL} | tables().touched, 0x8000)
    five = Ept(0x26, maxphyaddr=40)
    assert translate(five, memory, read()) == Translated(0x5234, 1, ())
    assert translate(five, memory, high) == Translated(0x5234, 1, ())


def test_tables_outside_memory_end_the_walk() -> None:
    outcome = translate(ept(), tables(pdpte=0x9000 | ALL), read())
    assert outcome == OutsideMemory(0x9000)


@pytest.mark.parametrize(
    ("registers", "error", "said"),
    [
        ({"eptp": 0x101F}, ImpossibleState, "bits 2:0"),
        ({"eptp": 0x1016}, ImpossibleState, "bits 5:3"),
        ({"eptp": 0x101E | 1 << 8}, ImpossibleState, "11:8"),
        ({"eptp": 0x101E | 1 << 45, "maxphyaddr": 40}, ImpossibleState, "MAXPHYADDR up"),
        ({"eptp": 0x105E, "capabilities": EPT_CAPABILITIES & ~(1 << 21)}, ImpossibleState, "bit 6"),
        ({"eptp": 0x1026, "capabilities": EPT_CAPABILITIES & ~(1 << 7)}, ImpossibleState, "5:3"),
        ({"eptp": 0x1018, "capabilities": EPT_CAPABILITIES & ~(1 << 8)}, ImpossibleState, "2:0"),
        ({"eptp": 0x109E}, ImpossibleState, "bit 7"),
        (
            {"eptp": 0x109E, "capabilities": EPT_CAPABILITIES | 1 << 23},
            UnsupportedMode,
            "shadow-stack",
        ),
        ({"eptp": 0x101E, "maxphyaddr": 53}, ImpossibleState, "32 to 52"),
        ({"eptp": 0x101E, "mbec": 2}, ImpossibleState, "mode-based"),
    ],
)
def test_an_eptp_that_vm_entry_refuses_is_refused_by_name(
    registers: dict[str, int], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        Ept(**registers)


def test_states_that_vm_entry_takes_are_taken() -> None:
    assert (Ept(0x1E).levels, Ept(0x26).levels) == (4, 5)
    assert (Ept(0x18).ad, Ept(0x5E).ad) == (0, 1)


MEMORY_TYPES = (UC, WC, WT, WP, WB)


def test_ignore_pat_takes_the_entry_s_type_alone() -> None:
    for ours, pat in product(MEMORY_TYPES, (*MEMORY_TYPES, UC_MINUS)):
        assert memory_type(ours << 3 | 1 << 6, pat, 0) == ours
        assert memory_type(ours << 3 | 1 << 6, pat, 1) == UC


def test_without_it_the_types_combine_as_with_an_mtrr() -> None:
    for ours, pat in product(MEMORY_TYPES, (*MEMORY_TYPES, UC_MINUS)):
        combined = memory_type(ours << 3, pat, 0)
        if pat == UC:
            assert combined == UC
        elif pat == WC:
            assert combined == WC
        elif pat == WB:
            assert combined == ours
        elif pat == UC_MINUS:
            assert combined == (WC if ours in (WC, WP) else UC)
        elif pat == WP and ours in (WT, WB, WP):
            assert combined == WP
        elif pat == WT and ours in (WT, WB, WP):
            assert combined == WT
        else:
            assert combined == UC
        assert memory_type(ours << 3, pat, 1) == UC


def test_path_and_mappings_follow_the_entries() -> None:
    memory = tables(pde=0x200000 | ALL | PS)
    assert [(s.level, s.address) for s in path(ept(), memory, GPA)] == [
        (4, 0x1000),
        (3, 0x2000),
        (2, 0x3000),
    ]
    assert [(m.address, m.pa, m.level) for m in mappings(ept(), memory)] == [(0, 0x200000, 2)]
    assert [(m.address, m.pa, m.level) for m in mappings(ept(), tables())] == [(0x1000, 0x5000, 1)]
