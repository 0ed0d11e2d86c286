"""The other modes told by example: tables drawn by hand, and what the manual says of them."""

import pytest

from vapama.explain import explain_access
from vapama.spec.access import Access
from vapama.spec.cpu import (
    CET,
    LA57,
    LAM_SUP,
    LAM_U48,
    LAM_U57,
    LMA,
    LME,
    NXE,
    PAE,
    PE,
    PG,
    PSE,
    RFLAGS_ONE,
    SMAP,
    VM,
    WP,
    Cpu,
)
from vapama.spec.memory import Sparse, Watched
from vapama.spec.outcomes import (
    RSVD,
    SS,
    GeneralProtection,
    NonCanonical,
    Outcome,
    OutsideMemory,
    P,
    PageFault,
    Translated,
    U,
    Update,
    W,
)
from vapama.spec.paging import load_pdptes, mappings, path, translate

LIMIT = 16 << 12
A, D, PS, USER = 0x20, 0x40, 0x80, 0x7
"""Flags of an entry; USER are P, W and U."""


def cpu_32(cr4: int = 0, cr3: int = 0x1000, **others: int) -> Cpu:
    return Cpu(PG | PE, cr3, cr4, 0, maxphyaddr=40, **others)  # type: ignore[arg-type]


def pairs(entries: dict[int, int]) -> Sparse:
    """Memory of these 4-byte entries, by address."""
    words: dict[int, int] = {}
    for address, entry in entries.items():
        word = address & ~7
        words[word] = words.get(word, 0) | entry << 8 * (address & 4)
    return Sparse(words, LIMIT)


# 32-BIT PAGING. The address 0x0040_5678: PDE 1, PTE 5, offset 0x678.

VA = 0x0040_5678
PDE_AT, PTE_AT = 0x1004, 0x2014
TABLES = pairs({PDE_AT: 0x2000 | USER, PTE_AT: 0x3000 | USER})


def test_two_levels_of_4_byte_entries_are_walked() -> None:
    expected = Translated(0x3678, 1, (Update(0x1000, A << 32), Update(0x2010, A << 32)))
    assert translate(cpu_32(), TABLES, Access(VA)) == expected
    write = translate(cpu_32(), TABLES, Access(VA, write=1))
    assert isinstance(write, Translated)
    assert write.updates[1] == Update(0x2010, (A | D) << 32)


def test_an_entry_of_the_lower_half_is_marked_there() -> None:
    memory = pairs({0x1000: 0x2000 | USER, 0x2000: 0x3000 | USER})
    outcome = translate(cpu_32(), memory, Access(0x678, write=1))
    assert outcome == Translated(0x3678, 1, (Update(0x1000, A), Update(0x2000, A | D)))


def test_linear_addresses_wrap_at_32_bits() -> None:
    assert translate(cpu_32(), TABLES, Access(VA | 0xABCD << 32)) == translate(
        cpu_32(), TABLES, Access(VA)
    )


def test_the_path_gives_4_byte_entries() -> None:
    steps = list(path(cpu_32(), TABLES, VA))
    assert steps == [(2, PDE_AT, 0x2000 | USER), (1, PTE_AT, 0x3000 | USER)]


@pytest.mark.parametrize(
    ("pde", "cr4", "pse36", "maxphyaddr", "expected"),
    [
        (0x0040_0000 | PS | USER, PSE, 1, 40, 0x0040_5678),
        (0x0040_2000 | PS | USER, PSE, 1, 40, 0x1_0040_5678),
        (0x0050_0000 | PS | USER, PSE, 1, 40, 0x80_0040_5678),
        (0x0050_0000 | PS | USER, PSE, 1, 52, 0x80_0040_5678),
        (0x0050_0000 | PS | USER, PSE, 1, 39, None),
        (0x0060_0000 | PS | USER, PSE, 1, 40, None),
        (0x0060_0000 | PS | USER, PSE, 1, 52, None),
        (0x0040_2000 | PS | USER, PSE, 0, 40, None),
        (0x0040_2000 | PS | USER, PSE, 1, 32, None),
        (0x0040_2000 | PS | USER, PSE, 1, 33, 0x1_0040_5678),
        (0x0040_1000 | PS | USER, PSE, 0, 32, 0x0040_5678),  # PAT
    ],
)
def test_a_4_mbyte_page_has_the_physical_bits_that_pse_36_gives_it(
    pde: int, cr4: int, pse36: int, maxphyaddr: int, expected: int | None
) -> None:
    cpu = Cpu(PG | PE, 0x1000, cr4, 0, maxphyaddr=maxphyaddr, pse36=pse36)
    outcome = translate(cpu, pairs({PDE_AT: pde}), Access(VA))
    if expected is None:
        assert outcome == PageFault(P | RSVD)
    else:
        assert isinstance(outcome, Translated)
        assert (outcome.pa, outcome.level) == (expected & ~0x3F_FFFF | VA & 0x3F_FFFF, 2)


def test_without_pse_bit_7_of_a_pde_is_ignored() -> None:
    memory = pairs({PDE_AT: 0x2000 | PS | USER, PTE_AT: 0x3000 | USER})
    outcome = translate(cpu_32(), memory, Access(VA))
    assert isinstance(outcome, Translated)
    assert (outcome.pa, outcome.level) == (0x3678, 1)


def test_32_bit_paging_has_no_keys_and_reports_no_fetch_for_nxe() -> None:
    cpu = Cpu(PG | PE, 0x1000, 1 << 22, NXE, pkru=0xFFFF_FFFF)
    assert isinstance(translate(cpu, TABLES, Access(VA)), Translated)
    assert translate(cpu, pairs({}), Access(VA, fetch=1)) == PageFault(0)
    smep = Cpu(PG | PE, 0x1000, 1 << 20, 0)
    assert translate(smep, pairs({}), Access(VA, fetch=1)) == PageFault(0x10)


def test_a_virtual_8086_state_pages_like_any() -> None:
    cpu = Cpu(PG | PE, 0x1000, 0, 0, RFLAGS_ONE | VM)
    assert translate(cpu, TABLES, Access(VA, user=1)) == translate(
        cpu_32(), TABLES, Access(VA, user=1)
    )


def test_mappings_of_32_bit_paging_are_in_order_with_their_addresses() -> None:
    memory = pairs({PDE_AT: 0x2000 | USER, PTE_AT: 0x3000 | USER, 0x1FFC: 0x0040_2000 | PS | USER})
    found = list(mappings(cpu_32(PSE), memory))
    assert [(m.address, m.level, m.pa) for m in found] == [
        (0x0040_5000, 1, 0x3000),
        (0xFFC0_0000, 2, 0x1_0040_0000),
    ]


# PAE PAGING. The address 0x4040_5678: PDPTE 1, PDE 2, PTE 5.

PAE_VA = 0x4040_5678
PDPT = 0x1020


def cpu_pae(pdptes: tuple[int, ...] | None = None, efer: int = 0, cr4: int = 0) -> Cpu:
    return Cpu(PG | PE, PDPT | 0x1F, PAE | cr4, efer, maxphyaddr=40, pdptes=pdptes)


PAE_TABLES = Sparse(
    {PDPT + 8: 0x2000 | 1, 0x2010: 0x3000 | USER, 0x3028: 0x4000 | USER, 0x2018: 0x60_0087}, LIMIT
)


def test_pae_paging_reads_its_pdptes_from_memory_or_registers() -> None:
    expected = Translated(0x4678, 1, (Update(0x2010, A), Update(0x3028, A)))
    assert translate(cpu_pae(), PAE_TABLES, Access(PAE_VA)) == expected
    assert translate(cpu_pae((0, 0x2001, 0, 0)), PAE_TABLES, Access(PAE_VA)) == expected
    assert translate(cpu_pae((0x2001, 0, 0, 0)), PAE_TABLES, Access(PAE_VA)) == PageFault(0)


def test_only_the_walk_from_memory_loads_a_pdpte() -> None:
    watched = Watched(PAE_TABLES)
    translate(cpu_pae((0, 0x2001, 0, 0)), watched, Access(PAE_VA))
    assert watched.loads == [0x2010, 0x3028]
    watched = Watched(PAE_TABLES)
    translate(cpu_pae(), watched, Access(PAE_VA))
    assert watched.loads == [PDPT + 8, 0x2010, 0x3028]


@pytest.mark.parametrize("bit", [1, 2, 5, 6, 7, 8, 40, 51, 52, 62, 63])
def test_a_reserved_bit_of_a_pdpte_refuses_the_load_and_faults_in_memory(bit: int) -> None:
    memory = Sparse({PDPT: 0x2001 | 1 << bit}, LIMIT)
    assert load_pdptes(cpu_pae(), memory) == GeneralProtection()
    assert translate(cpu_pae(), memory, Access(0)) == PageFault(P | RSVD)


@pytest.mark.parametrize("bit", [3, 4, 9, 10, 11, 12, 39])
def test_other_bits_of_a_pdpte_are_loaded(bit: int) -> None:
    pdpte = 0x2001 | 1 << bit
    absent = 0xFFFF_FFFF_FFFF_FFFE
    memory = Sparse({PDPT: pdpte, PDPT + 24: absent}, LIMIT)
    assert load_pdptes(cpu_pae(), memory) == (pdpte, 0, 0, absent)


def test_pdptes_outside_memory_are_not_loaded() -> None:
    cpu = Cpu(PG | PE, LIMIT, PAE, 0)
    assert load_pdptes(cpu, Sparse({}, LIMIT)) == OutsideMemory(LIMIT)
    assert translate(cpu, Sparse({}, LIMIT), Access(PAE_VA)) == OutsideMemory(LIMIT + 8)


@pytest.mark.parametrize("bit", [40, 51, 52, 58, 59, 62])
def test_pae_paging_reserves_all_bits_from_maxphyaddr_to_62(bit: int) -> None:
    memory = Sparse({0x2010: 0x3000 | USER | 1 << bit}, LIMIT)
    outcome = translate(cpu_pae((0, 0x2001, 0, 0)), memory, Access(PAE_VA))
    assert outcome == PageFault(P | RSVD)


def test_bit_63_is_xd_with_nxe_and_reserved_without() -> None:
    memory = Sparse({0x2010: 0x3000 | USER | 1 << 63, 0x3028: 0x4000 | USER}, LIMIT)
    registers = (0, 0x2001, 0, 0)
    assert translate(cpu_pae(registers), memory, Access(PAE_VA)) == PageFault(P | RSVD)
    assert isinstance(translate(cpu_pae(registers, NXE), memory, Access(PAE_VA)), Translated)
    fetch = translate(cpu_pae(registers, NXE), memory, Access(PAE_VA, fetch=1))
    assert isinstance(fetch, PageFault)
    assert fetch.error_code == P | 0x10


def test_mappings_of_pae_paging_go_through_the_four_pdptes() -> None:
    for cpu in (cpu_pae(), cpu_pae((0, 0x2001, 0, 0))):
        found = [(m.address, m.level, m.pa) for m in mappings(cpu, PAE_TABLES)]
        assert found == [(0x4040_5000, 1, 0x4000), (0x4060_0000, 2, 0x60_0000)]


# NO PAGING


def test_without_paging_an_address_is_physical() -> None:
    cpu = Cpu(0, 0x1000, 0, 0)
    assert translate(cpu, TABLES, Access(0xFFFF_FFFF_1234_5678, write=1, user=1)) == Translated(
        0x1234_5678, 0, ()
    )
    assert list(mappings(cpu, TABLES)) == []
    assert list(path(cpu, TABLES, VA)) == []


# LINEAR-ADDRESS MASKING


def outcome_at(address: int, cr3: int = 0, cr4: int = 0, fetch: int = 0) -> Outcome:
    """Of an access whose table is outside memory: its index shows in the address that is wanted."""
    cpu = Cpu(PG | PE, 0x1000 | cr3, PAE | cr4, LME | LMA)
    return translate(cpu, Sparse({}, 0), Access(address, fetch=fetch))


@pytest.mark.parametrize(
    ("address", "cr3", "cr4", "canonical"),
    [
        (0x7FFF_7FFF_FFFF_F000, LAM_U48, 0, True),
        (0x7FFF_8000_0000_0000, LAM_U48, 0, False),
        (0x7E00_7FFF_FFFF_F000, LAM_U57, 0, True),
        (0x7E01_7FFF_FFFF_F000, LAM_U57, 0, False),
        (0x7FFF_7FFF_FFFF_F000, LAM_U57 | LAM_U48, 0, False),  # LAM57 goes first
        (0x7FFF_7FFF_FFFF_F000, LAM_U48, LA57, True),
        (0x0000_8000_0000_0000, LAM_U48, LA57, False),  # bits 47 and 63 have to be equal
        (0x7EFF_FFFF_FFFF_F000, LAM_U57, LA57, True),
        (0x7FFF_FFFF_FFFF_F000, LAM_U57, LA57, False),
        (0x8000_8000_0000_0000, 0, LAM_SUP, True),
        (0x8000_0000_0000_0000, 0, LAM_SUP, False),
        (0x8100_0000_0000_0000, 0, LAM_SUP | LA57, True),
        (0x8000_0000_0000_0000, 0, LAM_SUP | LA57, False),
        (0x8000_8000_0000_0000, LAM_U48 | LAM_U57, 0, False),
        (0x7FFF_7FFF_FFFF_F000, 0, LAM_SUP, False),
    ],
)
def test_masked_bits_are_free_and_the_others_are_canonical(
    address: int, cr3: int, cr4: int, canonical: bool
) -> None:
    outcome = outcome_at(address, cr3, cr4)
    assert isinstance(outcome, OutsideMemory if canonical else NonCanonical)


def test_a_fetch_is_not_masked() -> None:
    assert outcome_at(0x7FFF_0000_0000_0000, LAM_U48, fetch=1) == NonCanonical()
    assert isinstance(outcome_at(0x7FFF_0000_0000_0000, LAM_U48), OutsideMemory)


def test_lam48_takes_its_bits_from_the_top_index_of_five_levels_too() -> None:
    assert outcome_at(0x00FF_0000_0000_0000, LAM_U48, LA57) == OutsideMemory(0x1000)
    assert outcome_at(0x00FF_0000_0000_0000, 0, LA57) == OutsideMemory(0x17F8)


# SHADOW STACKS


def shadow(leaf: int, above: int = USER, cet: int = CET, user: int = 1, write: int = 1) -> Outcome:
    """A shadow-stack access by way of a PD and a PT, in PAE paging with SMAP."""
    memory = Sparse({0x2010: 0x3000 | above, 0x3028: 0x4000 | leaf}, LIMIT)
    cpu = Cpu(PG | PE | WP, 0, PAE | SMAP | cet, 0, pdptes=(0, 0x2001, 0, 0))
    return translate(cpu, memory, Access(PAE_VA, write=write, user=user, shadow_stack=1))


def test_a_shadow_stack_page_is_read_only_dirty_and_below_writable_entries() -> None:
    assert isinstance(shadow(5 | D), Translated)
    for outcome in (shadow(5), shadow(7 | D), shadow(7), shadow(5 | D, above=5)):
        assert isinstance(outcome, PageFault)
        assert outcome.error_code == P | W | U | SS


def test_a_shadow_stack_belongs_to_the_user_or_to_the_supervisor() -> None:
    assert isinstance(shadow(1 | D, user=0), Translated)
    assert isinstance(shadow(1 | D), PageFault)
    assert isinstance(shadow(5 | D, user=0), PageFault)


def test_without_cet_the_mark_does_not_count() -> None:
    assert isinstance(shadow(7, cet=0), Translated)
    fault = shadow(5 | D, cet=0)
    assert isinstance(fault, PageFault)
    assert fault.error_code == P | W | U


def test_a_fault_on_a_missing_page_says_shadow_stack() -> None:
    assert shadow(0, write=0) == PageFault(U | SS, (Update(0x2010, A),))


# EXPLANATIONS


@pytest.mark.parametrize(
    ("cpu", "memory", "access", "lines"),
    [
        (
            cpu_32(PSE),
            pairs({PDE_AT: 0x0040_2000 | PS | USER}),
            Access(VA),
            (
                "control  32-bit paging with 4-MByte pages, MAXPHYADDR 40, PSE-36",
                "CR3      0x1000: the root table is at 0x1000",
                "PDE  [  1] at 0x1004 = 0x00402087  P W U PS  -> page of 4 MBytes at 0x100400000",
                "outcome  translated to 0x100405678, a page of 4 MBytes; sets A at 0x1000",
            ),
        ),
        (
            cpu_pae((0, 0x2001, 0, 0)),
            PAE_TABLES,
            Access(PAE_VA),
            (
                "control  PAE paging, MAXPHYADDR 40, no more",
                "PDPTE    1, a register, = 0x0000000000002001  -> table at 0x2000",
                "PDE  [  2] at 0x2010 = 0x0000000000003007  P W U  -> table at 0x3000",
            ),
        ),
        (
            cpu_pae(),
            Sparse({PDPT: 0x2003}, LIMIT),
            Access(0),
            (
                "PDPTE    0 in memory = 0x0000000000002003"
                "  <- reserved bits 0x2 are set: stops here",
                "outcome  #PF, error code 0x9 (P RSVD)",
            ),
        ),
        (
            Cpu(PE, 0, 0, 0),
            TABLES,
            Access(VA),
            ("control  no paging, MAXPHYADDR 52, no more", "outcome  translated to 0x405678"),
        ),
        (
            Cpu(PG | PE, LAM_U48, PAE, LME | LMA, page1gb=0),
            Sparse({}, LIMIT),
            Access(0x7ABC_0000_0000_1234),
            (
                "control  4-level paging, MAXPHYADDR 52, CR3.LAM_U48",
                "         its address is taken for 0x1234",
            ),
        ),
    ],
)
def test_a_walk_of_any_mode_is_explained(
    cpu: Cpu, memory: Sparse, access: Access, lines: tuple[str, ...]
) -> None:
    told = list(explain_access(cpu, memory, access))
    for line in lines:
        assert line in told
