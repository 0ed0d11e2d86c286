"""The merger on large areas, and what of it no program of the invariants shows."""

import numpy as np
import pytest

from vapama.impl.hugepages import Backing, Hugetlb, collapse, pieces_of_4m, split
from vapama.impl.ksm import Items, Ksm, hashed
from vapama.impl.merging import Merging, row_of
from vapama.impl.processes import Full, Processes

PAGES = 4096


def test_equal_pages_of_a_large_area_merge_and_others_do_not() -> None:
    host = Processes(PAGES, frames=PAGES + 16)
    merger = Ksm(host)
    host.watcher = merger
    process = host.alive[0]
    process.mergeable[:] = True
    for page in range(PAGES):
        host.store(process, page, row_of(1 + page // 2 if page < PAGES // 4 else 10_000 + page))
    for _ in range(3):
        assert merger.scan() == PAGES
    assert merger.counters()[:4] == (PAGES // 8, PAGES // 8, 3 * PAGES // 4, 0)
    assert len(set(host.frames_of(process).tolist())) == PAGES - PAGES // 8


def test_a_page_costs_what_is_said() -> None:
    assert Items(1000).size == 1000 * Items.BYTES_A_PAGE
    assert Items.BYTES_A_PAGE == 11
    assert Ksm(Processes(10, frames=100)).node_at.nbytes == 4 * 100


def test_every_word_of_a_page_counts_in_its_hash() -> None:
    rows = np.zeros((513, 512), dtype=np.uint64)
    rows[np.arange(512), np.arange(512)] = 1
    assert len(set(hashed(rows, np.arange(513)).tolist())) == 513


def test_a_pinned_page_is_never_merged() -> None:
    merging = Merging(2)
    merging.advise(0, 0, 2, 1)
    merging.pin(0, 0)
    for page in range(2):
        merging.write(0, page, 5)
    for _ in range(3):
        merging.scan()
    assert merging.partition() == [0, 1]
    merging.unpin(0, 0)
    merging.scan()
    assert merging.partition() == [0, 0]


def test_memory_that_runs_out_is_said() -> None:
    merging = Merging(4, frames=3)
    merging.write(0, 0, 1)
    merging.write(0, 1, 1)
    with pytest.raises(Full):
        merging.write(0, 2, 1)


def test_a_slot_is_backed_by_aligned_frames_of_the_pool() -> None:
    books = Hugetlb()
    books.resize(4)
    frames = [512 * n for n in range(2, 6)]
    backing = Backing(books, frames, 3 << 21, 2)
    assert books.pool == (4, 4, 3, 0, 0)
    assert backing.frame_of((1 << 21) + 0x3000) == 1024 + 3
    assert books.pool == (4, 3, 2, 0, 0)
    backing.release()
    assert books.pool == (4, 4, 0, 0, 0)
    with pytest.raises(MemoryError):
        Backing(books, frames, 5 << 21, 2)


def test_a_leaf_is_split_and_collapsed_in_a_table() -> None:
    image = np.zeros(1024, dtype=np.uint64)
    flushes: list[int] = []
    leaf = 0x8000000000A000E7
    image[3] = leaf
    split(image, 3, 2, 1, 0x67, lambda: flushes.append(int(image[3])))
    assert int(image[3]) == 0x1067
    assert int(image[512 + 5]) == 0x8000000000A05067
    assert flushes == [0x1067], "the flush comes when the table is linked"
    assert collapse(image, 3, 2, lambda: flushes.append(0))
    assert int(image[3]) == leaf
    image[3] = 0x1067
    image[512 + 9] = int(image[512 + 9]) ^ 2
    assert not collapse(image, 3, 2, lambda: None)


def test_a_4m_page_is_in_two_pieces() -> None:
    assert pieces_of_4m(0x00C00087) == (0xC00000, 0xE00000)
