"""Large pages: numbers that a reader can check by hand."""

import pytest

from vapama.spec.hugepages import (
    SIZE_1G,
    SIZE_2M,
    SIZE_4K,
    SMALL_PAGES,
    Block,
    Pool,
    Refused,
    Slot,
    congruent,
    faulted,
    frames_of_4m,
    huge_pages_for,
    nested_walk_references,
    reserved_for,
    resized,
    slot_may_map,
    table_pages,
    walk_references,
)


def test_2048_pages_of_2m_are_4g() -> None:
    assert huge_pages_for(4 << 30, SIZE_2M) == 2048
    assert resized(Pool(), 2048) == Pool(2048, 2048)


def test_a_walk_of_4k_pages_under_4k_pages_takes_24_references() -> None:
    assert [walk_references(level) for level in (1, 2, 3)] == [4, 3, 2]
    assert nested_walk_references(4, 4) == 24
    assert nested_walk_references(5, 5) == 35
    assert nested_walk_references(3, 3) == 15


def test_tables_for_4g() -> None:
    assert table_pages(4 << 30, 1) == 2048 + 4 + 1 + 1
    assert table_pages(4 << 30, 2) == 4 + 1 + 1
    assert table_pages(4 << 30, 3) == 1 + 1


def test_a_slot_maps_large_just_inside_and_congruent() -> None:
    slot = Slot(gpa=SIZE_2M - SIZE_4K, size=2 * SIZE_2M, hva=5 * SIZE_1G + SIZE_2M - SIZE_4K)
    assert not slot_may_map(slot, SIZE_2M - SIZE_4K, 2)
    assert slot_may_map(slot, SIZE_2M, 2)
    assert not slot_may_map(slot, 2 * SIZE_2M, 2)
    assert not slot_may_map(slot._replace(hva=slot.hva + SIZE_4K), SIZE_2M, 2)
    assert congruent(SIZE_2M, 0x40123, 0x240123, 0xA40123)


def test_a_4m_page_is_two_frames() -> None:
    assert frames_of_4m(0x00C00087) == (0xC00000, 0xE00000)
    assert frames_of_4m(0x00C00087 | 1 << 13) == (0x1_00C0_0000, 0x1_00E0_0000)


def test_what_a_pool_cannot_promise_it_refuses() -> None:
    pool = reserved_for(Pool(2, 2), 2)
    assert pool == Pool(2, 2, 2)
    with pytest.raises(Refused):
        reserved_for(pool, 1)
    with pytest.raises(Refused):
        faulted(pool, 0)
    assert resized(pool, 0) == Pool(2, 2, 2, 2), "promised pages stay, as surplus"


def test_a_block_is_split_by_a_part_and_collapsed_again() -> None:
    block = Block()
    assert not block.collapse()
    block.write(3, 9)
    assert block.huge
    assert len(block.contents) == SMALL_PAGES
    block.discard(5, 1)
    assert (block.huge, 5 in block.contents, block.contents[3]) == (False, False, 9)
    assert block.frames[3] == 3
    assert block.collapse()
    assert (block.huge, block.contents[5], block.contents[3]) == (True, 0, 9)
    assert block.frames[3] != 3
