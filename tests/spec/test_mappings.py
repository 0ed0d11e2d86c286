"""`mappings` and `path`: what the paging structures map, on small tables."""

from itertools import islice

import pytest

from vapama.spec.cpu import LA57, LMA, LME, PAE, PE, PG, Cpu
from vapama.spec.memory import Image, Sparse
from vapama.spec.paging import Mapping, Step, mappings, path

P, PS, XD = 1, 0x80, 1 << 63
PAGES = 4096
LAST = 511 << 3


def cpu(cr3: int = 0, la57: int = 0) -> Cpu:
    return Cpu(cr0=PG | PE, cr3=cr3, cr4=PAE | la57, efer=LME | LMA)


def found(entries: dict[int, int], pages: int = 16, cr3: int = 0, la57: int = 0) -> list[Mapping]:
    return list(mappings(cpu(cr3, la57), Sparse(entries, pages * PAGES)))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, []),
        ({0: 0x1000 | P}, []),
        (
            {0: 0x1000 | P, 0x1000: 0x2000 | P, 0x2000: 0x3000 | P, 0x3008: 0xA_B000 | P},
            [Mapping(0x1000, 1, 0xA_B000 | P)],
        ),
        (
            {LAST: 0x1000 | P, 0x1000 | LAST: 0x2000 | P, 0x2000 | LAST: 0x20_0000 | PS | P},
            [Mapping(0xFFFF_FFFF_FFE0_0000, 2, 0x20_0000 | PS | P)],
        ),
        (
            {256 << 3: 0x1000 | P, 0x1000: 0x4000_0000 | PS | P},
            [Mapping(0xFFFF_8000_0000_0000, 3, 0x4000_0000 | PS | P)],
        ),
        (
            {255 << 3: 0x1000 | P, 0x1000 | LAST: 0x4000_0000 | PS | P},
            [Mapping(0x7FFF_C000_0000, 3, 0x4000_0000 | PS | P)],
        ),
        # PS maps no page in a PML4E, and is not looked at in a PTE.
        ({0: 0x1000 | PS | P, 0x1000: PS | P}, [Mapping(0, 3, PS | P)]),
        (
            {0: 0x1000 | P, 0x1000: 0x2000 | P, 0x2000: 0x3000 | P, 0x3000: PS | P},
            [Mapping(0, 1, PS | P)],
        ),
        # Neither rights nor reserved bits are checked; entries that are not present map nothing.
        ({0: 0x1000 | P, 0x1000: 1 << 51 | XD | PS | P}, [Mapping(0, 3, 1 << 51 | XD | PS | P)]),
        ({0: 0x1000 | P, 0x1000: PS}, []),
        # In the order of linear addresses, whatever the order of the tables.
        (
            {0: 0x2000 | P, 8: 0x1000 | P, 0x2000: 0x100 | PS | P, 0x1000: 0x200 | PS | P},
            [Mapping(0, 3, 0x100 | PS | P), Mapping(1 << 39, 3, 0x200 | PS | P)],
        ),
        # Two entries for one table map its pages twice.
        (
            {0: 0x1000 | P, 8: 0x1000 | P, 0x1000: PS | P},
            [Mapping(0, 3, PS | P), Mapping(1 << 39, 3, PS | P)],
        ),
        # Tables that memory does not hold whole map nothing.
        ({0: 0x10000 | P, 8: 0xF000 | P, 0xF000: PS | P}, [Mapping(1 << 39, 3, PS | P)]),
        ({0: (1 << 52) - 0x1000 | P}, []),
    ],
)
def test_mappings_are_the_pages_of_all_present_entries(
    entries: dict[int, int], expected: list[Mapping]
) -> None:
    assert found(entries) == expected


def test_a_root_outside_memory_maps_nothing() -> None:
    assert found({}, pages=1, cr3=0x1000) == []
    assert list(mappings(cpu(), Image([P | PS] * 511))) == []


def test_five_levels_sign_extend_from_bit_56() -> None:
    entries = {LAST: 0x1000 | P, 0x1000: 0x2000 | P, 0x2000: PS | P}
    assert found(entries, la57=LA57) == [Mapping(0xFFFF_0000_0000_0000, 3, PS | P)]


def test_the_frame_of_a_large_page_leaves_out_its_attributes() -> None:
    mapping = Mapping(0, 2, 0x12_3460_0000 | XD | 0x1000 | PS | P)
    assert mapping.pa == 0x12_3460_0000


def test_a_table_that_references_itself_maps_itself_at_every_level() -> None:
    # The classic: entry 511 of the PML4 names the PML4, and so maps all tables as pages.
    entries = {0: 0x1000 | P, 0x1000: 0x2000 | P, 0x2000: 0x3000 | P, 0x3000: 0x9000 | P, LAST: P}
    maps = {m.address: m.pa for m in found(entries)}
    recursive = 0xFFFF_FF80_0000_0000
    assert maps == {
        0: 0x9000,
        recursive: 0x3000,
        recursive | 0x7F_C000_0000: 0x2000,
        recursive | 0x7F_FFE0_0000: 0x1000,
        0xFFFF_FFFF_FFFF_F000: 0,
    }


def test_a_table_full_of_itself_maps_pages_without_end_and_can_be_cut_short() -> None:
    memory = Image([P] * 512)
    first = list(islice(mappings(cpu(), memory), 1000))
    assert first == [Mapping(number << 12, 1, P) for number in range(1000)]


def test_a_path_is_the_entries_from_the_root_down() -> None:
    entries = {0: 0x1000 | P, 0x1008: 0x2000 | P, 0x2010: 0x3000 | P, 0x3018: 0x9000 | P}
    memory, address = Sparse(entries, 16 * PAGES), 1 << 30 | 2 << 21 | 3 << 12
    assert list(path(cpu(), memory, address)) == [
        Step(level, *item) for level, item in zip((4, 3, 2, 1), entries.items(), strict=True)
    ]


@pytest.mark.parametrize(
    ("entries", "limit", "levels"),
    [
        ({0: 0}, 0x1000, [4]),
        ({0: 0x1000 | P, 0x1000: PS | P}, 0x2000, [4, 3]),
        ({0: 0x1000 | PS | P, 0x1000: 0}, 0x2000, [4, 3]),
        ({0: 0x1000 | P}, 0x1000, [4]),
        ({0: 0x1000 | P, 0x1000: 0x800 | P}, 0x1008, [4, 3, 2, 1]),
        ({}, 0, []),
        ({0: P}, 8, [4, 3, 2, 1]),
    ],
    ids=["not present", "page", "PS of a PML4E", "outside", "the last entry", "none", "itself"],
)
def test_a_path_ends_at_a_page_a_missing_entry_or_the_end_of_memory(
    entries: dict[int, int], limit: int, levels: list[int]
) -> None:
    assert [step.level for step in path(cpu(), Sparse(entries, limit), 0)] == levels
