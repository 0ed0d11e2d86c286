"""Nested page tables by example, in each paging mode of a host."""

from itertools import product

import pytest

from vapama.spec.access import GuestPhysicalAccess
from vapama.spec.cpu import (
    LA57,
    LMA,
    LME,
    NXE,
    PAE,
    PE,
    PG,
    PSE,
    WP,
    ImpossibleState,
    UnsupportedMode,
)
from vapama.spec.memory import Sparse
from vapama.spec.npt import mappings, translate
from vapama.spec.outcomes import NestedPageFault, Outcome, OutsideMemory, Translated, Update
from vapama.spec.stage import Npt

P, W, U, PS, NX, A, D = 1, 2, 4, 0x80, 1 << 63, 0x20, 0x40
ALL = P | W | U
FINAL, TABLE = 1 << 32, 1 << 33
GPA = 0x1234
LONG = {"cr4": PAE, "efer": LMA | LME | NXE}
HOSTS = {
    2: Npt(0x1000, cr4=PSE, efer=0, maxphyaddr=40),
    3: Npt(0x1020, cr4=PAE, efer=NXE, maxphyaddr=40),
    4: Npt(0x1000, **LONG, maxphyaddr=40),
    5: Npt(0x1000, cr4=PAE | LA57, efer=LMA | LME | NXE, maxphyaddr=40),
}


def tables(levels: int, bits: int = ALL, leaf: int = ALL, gpa: int = GPA) -> Sparse:
    """Tables of a host that map the page of `gpa` to 0x7000; `bits` of the entries above."""
    if levels == 2:
        pde, pte = 0x1000 | gpa >> 22 << 2, 0x2000 | (gpa >> 12 & 0x3FF) << 2
        entries = {pde: 0x2000 | bits, pte: 0x7000 | leaf}
        pairs: dict[int, int] = {}
        for address, entry in entries.items():
            pairs[address & ~7] = pairs.get(address & ~7, 0) | entry << (address & 4) * 8
        return Sparse(pairs, 0x8000)
    table, memory = 0x1020 if levels == 3 else 0x1000, {}
    for level in range(levels, 0, -1):
        entry = 0x1000 * (levels - level + 2) | bits
        if levels == 3 and level == 3:
            entry = entry & ~0x8000_0000_0000_0006
        memory[table | (gpa >> 12 + 9 * (level - 1) & 0x1FF) << 3] = (
            entry if level > 1 else 0x7000 | leaf
        )
        table = entry & 0xFF000
    return Sparse(memory, 0x8000)


def read(**more: int) -> GuestPhysicalAccess:
    return GuestPhysicalAccess(GPA, **more)


def exitinfo1(outcome: Outcome) -> int:
    assert isinstance(outcome, NestedPageFault)
    assert outcome.gpa == GPA
    return outcome.exitinfo1 & ~outcome.open_bits


@pytest.mark.parametrize("levels", HOSTS)
def test_a_host_of_every_paging_mode_translates(levels: int) -> None:
    outcome = translate(HOSTS[levels], tables(levels), read())
    assert isinstance(outcome, Translated)
    assert (outcome.pa, outcome.level) == (0x7234, 1)
    assert len(outcome.updates) == (2 if levels == 3 else levels)


@pytest.mark.parametrize(("levels", "rights"), [*product(HOSTS, (0, W, U, W | U))])
def test_every_access_is_a_user_s_and_an_access_to_a_table_a_write(
    levels: int, rights: int
) -> None:
    for leaf in (True, False):
        memory = tables(levels, *((ALL, P | rights) if leaf else (P | rights, ALL)))
        for access, needs, code in (
            (read(), U, U | FINAL),
            (read(write=1), U | W, U | W | FINAL),
            (read(fetch=1), U, U | 0x10 | FINAL),
            (read(table=1), U | W, U | W | TABLE),
            (read(table=1, write=1), U | W, U | W | TABLE),
            (read(table=1, linear=0), U | W, U | W | TABLE),
        ):
            outcome = translate(HOSTS[levels], memory, access)
            if rights & needs == needs:
                assert isinstance(outcome, Translated)
            else:
                assert exitinfo1(outcome) | 0x10 == P | code | 0x10


@pytest.mark.parametrize("levels", HOSTS)
def test_an_absent_entry_lacks_p(levels: int) -> None:
    for memory in (tables(levels, leaf=0), tables(levels, bits=W | U)):
        assert exitinfo1(translate(HOSTS[levels], memory, read(write=1))) == W | U | FINAL


def test_a_table_access_dirties_its_nested_page() -> None:
    for access, bits in ((read(), A), (read(table=1), A | D), (read(write=1), A | D)):
        outcome = translate(HOSTS[4], tables(4), access)
        assert isinstance(outcome, Translated)
        assert outcome.updates[-1] == Update(0x4008, bits)
        assert outcome.updates[0] == Update(0x1000, A)


def test_flags_of_the_upper_of_two_4_byte_entries_are_32_bits_up() -> None:
    outcome = translate(HOSTS[2], tables(2), read(write=1))
    assert outcome == Translated(0x7234, 1, (Update(0x1000, A), Update(0x2000, (A | D) << 32)))


def test_nx_follows_the_host_s_nxe() -> None:
    memory = tables(4, leaf=ALL | NX)
    assert exitinfo1(translate(HOSTS[4], memory, read(fetch=1))) == P | U | 0x10 | FINAL
    assert isinstance(translate(HOSTS[4], memory, read()), Translated)
    without = Npt(0x1000, cr4=PAE, efer=LMA | LME, maxphyaddr=40)
    outcome = translate(without, memory, read(fetch=1))
    assert exitinfo1(outcome) == P | U | 8 | FINAL
    assert isinstance(outcome, NestedPageFault)
    assert outcome.open_bits == 0x10


@pytest.mark.parametrize(
    ("levels", "address", "bit"),
    [
        (4, 0x1000, 7),
        (4, 0x1000, 8),
        (5, 0x1000, 8),
        (5, 0x2000, 8),
        (4, 0x1000, 40),
        (4, 0x4008, 51),
        (3, 0x1020, 1),
        (3, 0x1020, 2),
        (3, 0x1020, 5),
        (3, 0x1020, 8),
        (3, 0x1020, 63),
        (3, 0x1020, 52),
        (3, 0x2000, 62),
        (3, 0x3008, 40),
    ],
)
def test_reserved_bits_fault(levels: int, address: int, bit: int) -> None:
    memory = tables(levels)
    entries = memory.touched | {address: memory.touched[address] | 1 << bit}
    outcome = translate(HOSTS[levels], Sparse(entries, 0x8000), read())
    assert exitinfo1(outcome) == P | U | 8 | FINAL


@pytest.mark.parametrize(("address", "bit"), [(0x2000, 8), (0x1000, 52), (0x1000, 6), (0x4008, 59)])
def test_what_the_apm_ignores_does_not(address: int, bit: int) -> None:
    memory = tables(4)
    entries = memory.touched | {address: memory.touched[address] | 1 << bit}
    assert isinstance(translate(HOSTS[4], Sparse(entries, 0x8000), read()), Translated)


def large(level: int, entry: int) -> Sparse:
    """The entry, in the place of the PDPTE or PDE of `tables(4)`."""
    return Sparse(tables(4).touched | {{3: 0x2000, 2: 0x3000}[level]: entry}, 0x8000)


def test_large_pages_of_long_mode() -> None:
    wide = GuestPhysicalAccess(0x12345678 & 0x1FFFFF)
    for level, entry, pa in ((2, 0x600000, 0x600000), (3, 0x80000000, 0x80000000)):
        outcome = translate(HOSTS[4], large(level, entry | ALL | PS | 1 << 12), wide)
        assert isinstance(outcome, Translated)
        assert (outcome.pa, outcome.level) == (pa | wide.address, level)
        bad = translate(HOSTS[4], large(level, entry | ALL | PS | 1 << 13), read())
        assert exitinfo1(bad) == P | U | 8 | FINAL
    no_1gb = HOSTS[4]._replace(page1gb=0)
    outcome = translate(Npt(*no_1gb), large(3, 0x80000000 | ALL | PS), read())
    assert exitinfo1(outcome) == P | U | 8 | FINAL


@pytest.mark.parametrize(
    ("maxphyaddr", "bits", "pa"),
    [
        (40, 0xFF << 13, 0xFF_0040_1234),
        (40, 1 << 21, None),
        (52, 1 << 21, None),
        (36, 0xF << 13, 0xF_0040_1234),
        (36, 1 << 17, None),
        (32, 1 << 13, None),
    ],
)
def test_4_mbyte_pages_have_as_many_bits_as_pse36_gives(
    maxphyaddr: int, bits: int, pa: int | None
) -> None:
    host = Npt(0x1000, cr4=PSE, efer=0, maxphyaddr=maxphyaddr)
    memory = Sparse({0x1000: 0x400000 | ALL | PS | bits}, 0x8000)
    outcome = translate(host, memory, read())
    if pa is None:
        assert exitinfo1(outcome) == P | U | 8 | FINAL
    else:
        assert outcome == Translated(pa, 2, (Update(0x1000, A),))
    without = Npt(0x1000, cr4=0, efer=0, maxphyaddr=maxphyaddr)
    assert isinstance(translate(without, memory, read()), OutsideMemory)


@pytest.mark.parametrize(("levels", "width"), [(2, 32), (3, 32), (4, 48)])
def test_an_address_wider_than_the_host_s_paging_faults(levels: int, width: int) -> None:
    wide = GuestPhysicalAccess(GPA | 1 << width)
    outcome = translate(HOSTS[levels], tables(levels), wide)
    assert isinstance(outcome, NestedPageFault)
    assert outcome.open_bits == P


@pytest.mark.parametrize("levels", HOSTS)
def test_tables_outside_memory_end_the_walk(levels: int) -> None:
    small = Sparse(tables(levels).touched, 0x2000)
    first = 0x2004 if levels == 2 else 0x2000
    outcome = translate(HOSTS[levels], small, read())
    assert isinstance(outcome, OutsideMemory)
    assert outcome.address == first


@pytest.mark.parametrize("levels", HOSTS)
def test_mappings_are_what_the_walk_finds(levels: int) -> None:
    for gpa in (GPA, 0x7FC0_3000):
        ours = [(m.gpa, m.pa, m.level) for m in mappings(HOSTS[levels], tables(levels, gpa=gpa))]
        assert ours == [(gpa & ~0xFFF, 0x7000, 1)]


@pytest.mark.parametrize(
    ("registers", "error", "said"),
    [
        ({"ncr3": 1 << 45, "maxphyaddr": 40}, ImpossibleState, "MAXPHYADDR"),
        ({"ncr3": 1 << 32, "efer": 0}, ImpossibleState, "above 31"),
        ({"ncr3": 0, "cr0": PE | WP}, ImpossibleState, "CR0.PG"),
        ({"ncr3": 0, "efer": LMA}, ImpossibleState, "EFER.LMA"),
        ({"ncr3": 0, "cr4": 0}, ImpossibleState, "CR4.PAE"),
        ({"ncr3": 0, "cr4": PAE | LA57, "efer": 0}, ImpossibleState, "LA57"),
        ({"ncr3": 0, "maxphyaddr": 31}, ImpossibleState, "32 to 52"),
        ({"ncr3": 0, "cr4": PAE | 1 << 63}, ImpossibleState, "CR4"),
        ({"ncr3": 0, "gmet": 1}, UnsupportedMode, "GMET"),
    ],
)
def test_a_host_that_vmrun_refuses_is_refused_by_name(
    registers: dict[str, int], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        Npt(**registers)


def test_the_host_s_other_control_bits_do_not_count() -> None:
    bare = Npt(0x1000, cr0=PG | PE, **LONG, maxphyaddr=40)
    smep_smap_keys = Npt(0x1000, cr4=PAE | 0x17 << 20, efer=LMA | LME | NXE, maxphyaddr=40)
    for leaf, access in product((ALL, P | U, P | W), (read(), read(write=1), read(fetch=1))):
        memory = tables(4, leaf=leaf | 15 << 59)
        outcomes = [translate(host, memory, access) for host in (HOSTS[4], bare, smep_smap_keys)]
        assert outcomes[0] == outcomes[1] == outcomes[2]
