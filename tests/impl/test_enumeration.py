"""`list_pages` finds what the reference does, in order and in bounded time, and merges rightly."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vapama.bugs.mistakes import Mistake, parse
from vapama.impl import listing as listings
from vapama.impl.kernels import mappings as kernel
from vapama.impl.listing import (
    Listing,
    Pieces,
    at_each_position,
    composed,
    form_of,
    mappings_array,
    whole,
)
from vapama.spec import ept, npt, second_stage
from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import LA57, LMA, LME, NXE, PAE, PE, PG, PSE, Cpu
from vapama.spec.memory import Image
from vapama.spec.outcomes import RSVD, EptMisconfiguration, NestedPageFault, PageFault
from vapama.spec.paging import FRAME, Mapping, mappings, path, translate
from vapama.spec.stage import EPT_CAPABILITIES, EXECUTE_ONLY, PAGE_1GB, Ept, Npt

Words = numpy.typing.NDArray[np.uint64]
PAGES, UNTOUCHED, WORD = 4, 0xDEAD, (1 << 64) - 1
XD = 1 << 63


def cpu(cr3: int = 0, la57: int = 0, page1gb: int = 1) -> Cpu:
    efer = LME | LMA | NXE
    return Cpu(PG | PE, cr3, PAE | la57, efer, page1gb=page1gb, maxphyaddr=40)


def sparse_tables(seed: int, entries: int) -> Words:
    """A few present entries a table, which alias, reference themselves, lead outside or map."""
    rng = np.random.default_rng(seed)
    image = np.zeros(PAGES * 512, dtype=np.uint64)
    for page in range(PAGES):
        indices = rng.choice([0, 1, 255, 256, 510, 511, *range(512)], rng.integers(0, 4))
        noise = rng.integers(0, 1 << 64, len(indices), dtype=np.uint64)
        flags = noise & np.uint64(0xFFF0_0000_0000_0F7E)
        frame = rng.integers(0, PAGES + 1, len(indices), dtype=np.uint64) << np.uint64(12)
        large = np.where(rng.random(len(indices)) < 0.2, np.uint64(0x81), np.uint64(0x01))
        odd = np.where(rng.random(len(indices)) < 0.1, np.uint64(1 << 45), np.uint64(0))
        image[page * 512 + indices] = flags | frame | large | odd
    return image[:entries]


def expected(state: Cpu, image: Words, most: int) -> list[tuple[int, int, int]]:
    """What the reference maps, less what has a reserved bit set on its way."""
    memory = Image(image.tolist())

    def faults(mapping: Mapping) -> bool:
        outcome = translate(state, memory, Access(mapping.address))
        return isinstance(outcome, PageFault) and outcome.error_code & RSVD != 0

    return list(islice((m for m in mappings(state, memory) if not faults(m)), most))


def listed(state: Cpu, image: Words, room: int) -> list[tuple[int, int, int]]:
    found = mappings_array(state, image, room)
    return list(zip(*(array.tolist() for array in found), strict=True))


def runs_of(listing: Listing, **options: int) -> list[tuple[int, ...]]:
    return [
        row
        for batch in listing.batches(**options)
        for row in zip(*(column.tolist() for column in batch), strict=True)
    ]


images = st.builds(
    sparse_tables, st.integers(0, 1 << 32), st.integers(0, PAGES * 512) | st.just(PAGES * 512)
)
states = st.builds(
    cpu,
    st.integers(0, PAGES).map(lambda page: page << 12 | 0x18),
    st.sampled_from([0, LA57]),
    st.sampled_from([0, 1]),
)


@given(state=states, image=images)
@example(state=cpu(), image=sparse_tables(0, PAGES * 512))
def test_the_kernel_finds_the_mappings_of_the_reference(state: Cpu, image: Words) -> None:
    assert listed(state, image, 1 << 12) == expected(state, image, 1 << 12)


def test_random_tables_map_pages_of_every_size_in_both_halves() -> None:
    found = [m for seed in range(60) for m in listed(cpu(), sparse_tables(seed, 2048), 1 << 12)]
    assert {level for _, level, _ in found} == {1, 2, 3}
    assert {address >> 63 for address, _, _ in found} == {0, 1}


def rights(state: Cpu, image: Words, address: int) -> int:
    """W, U and not XD over the whole path, as the kernel tells rights."""
    every, none = 6, 0
    for step in path(state, Image(image.tolist()), address):
        every, none = every & step.entry, none | step.entry
    return every & 6 | ~none & XD


@given(state=states, image=images)
def test_a_page_has_its_address_and_the_rights_that_the_walk_leaves(
    state: Cpu, image: Words
) -> None:
    listing = Listing(whole(image), form_of(state), most_runs=50)
    for address, pa, shift, pages, allowed, entry in runs_of(listing):
        assert pages == 1
        assert pa == entry & FRAME & ~((1 << shift) - 1)
        assert allowed == rights(state, image, address)


# BATCHES


@given(state=states, image=images, room=st.integers(2, 5), reads=st.integers(512, 4096))
def test_batches_of_any_size_make_the_same_list(
    state: Cpu, image: Words, room: int, reads: int
) -> None:
    for same in (0, FRAME ^ WORD):
        one = runs_of(Listing(whole(image), form_of(state), same))
        other = Listing(whole(image), form_of(state), same)
        assert runs_of(other, room=room, reads=reads) == one
        assert other.stopped == ""


@given(state=states, image=images, most=st.integers(0, 5))
def test_the_list_ends_at_its_limit_and_says_so(state: Cpu, image: Words, most: int) -> None:
    every = expected(state, image, most + 1)
    listing = Listing(whole(image), form_of(state), most_runs=most)
    assert [(a, (shift - 12) // 9 + 1, e) for a, _, shift, _, _, e in runs_of(listing)] == every[
        :most
    ]
    assert listing.stopped == ("runs" if len(every) > most else "")


def test_the_kernel_writes_no_further_than_its_room() -> None:
    image = np.full(512, 1, dtype=np.uint64)
    listing = Listing(whole(image), form_of(cpu()))
    found = [np.full(4, UNTOUCHED, dtype=np.uint64) for _ in range(6)]
    assert listing._go_on(listings.Runs(*found), 3, 1 << 20) == kernel.FULL
    assert [column[3] for column in found] == [UNTOUCHED] * 6


# RUNS


def ends(runs: list[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    for address, pa, shift, pages, _, _ in runs:
        yield address + (pages << shift), pa + (pages << shift)


@given(state=states, image=images)
def test_merged_runs_are_the_same_pages_and_cannot_be_merged_further(
    state: Cpu, image: Words
) -> None:
    same = WORD ^ FRAME
    single = runs_of(Listing(whole(image), form_of(state), 0))
    merged = runs_of(Listing(whole(image), form_of(state), same))
    again = [
        (a + (k << shift), pa + (k << shift), shift, 1, r)
        for a, pa, shift, pages, r, _ in merged
        for k in range(pages)
    ]
    assert again == [run[:5] for run in single]
    for (end, pa_end), before, after in zip(ends(merged), merged, merged[1:], strict=False):
        joins = (end, pa_end, before[2], before[4]) == (after[0], after[1], after[2], after[4])
        assert not (joins and (before[5] ^ after[5]) & same == 0)


def one_table(entries: dict[int, int]) -> Words:
    """PML4E 0, PDPTE 0 and PDE 0 lead to a page table with these entries."""
    image = np.zeros(4 * 512, dtype=np.uint64)
    image[[0, 512, 1024]] = 0x1007, 0x2007, 0x3007
    for index, entry in entries.items():
        image[3 * 512 + index] = entry
    return image


@pytest.mark.parametrize(
    ("entries", "lengths"),
    [
        ({0: 0x8007, 1: 0x9007, 2: 0xA007}, [3]),
        ({0: 0x8007, 2: 0x9007}, [1, 1]),
        ({0: 0x8007, 1: 0xA007}, [1, 1]),
        ({0: 0x8007, 1: 0x7007}, [1, 1]),
        ({0: 0x8007, 1: 0x9005}, [1, 1]),
        ({0: 0x8007, 1: 0x9003}, [1, 1]),
        ({0: 0x8007, 1: 0x9007 | XD}, [1, 1]),
        ({0: 0x8067, 1: 0x9007, 2: 0xA227}, [3]),
        ({0: 0x8007, 1: 0x9017}, [1, 1]),
    ],
    ids=[
        *("neighbours", "a gap of addresses", "a gap of frames", "frames go down"),
        *("no write", "no user", "no execute", "what does not count", "cache disabled"),
    ],
)
def test_neighbours_that_lead_to_neighbours_alike_are_one_run(
    entries: dict[int, int], lengths: list[int]
) -> None:
    from vapama.snapshot.answers import DISTINGUISHED

    form = form_of(cpu())
    runs = runs_of(Listing(whole(one_table(entries)), form, DISTINGUISHED))
    assert [run[3] for run in runs] == lengths


# MEMORY IN PIECES


@given(state=states, image=images, shift=st.integers(0, 7), gap=st.integers(0, PAGES - 1))
def test_pieces_anywhere_in_a_file_are_as_one_image_with_a_gap(
    state: Cpu, image: Words, shift: int, gap: int
) -> None:
    """Each page stands in the file by itself, unaligned and in reverse; one is missing."""
    image = np.concatenate([image, np.zeros(PAGES * 512 - len(image), dtype=np.uint64)])
    data, rows = bytearray(shift), []
    for page in reversed(range(PAGES)):
        if page != gap:
            rows.append((page << 12, (page + 1) << 12, len(data)))
            data += image[page * 512 : page * 512 + 512].tobytes() + b"\xff" * 3
    columns = (np.array(column, dtype=np.uint64) for column in zip(*sorted(rows), strict=True))
    pieces = Pieces(at_each_position(memoryview(data), len(data)), *columns)
    # In one image, the missing page is as if it were beyond the end.
    moved = image.copy()
    frames = moved >> np.uint64(12) & np.uint64(0xFF_FFFF_FFFF)
    leaves = (frames == gap) & (moved & np.uint64(0x80) == 0)
    outside = (moved & ~np.uint64(FRAME)) | np.uint64(1 << 39)
    found = runs_of(Listing(pieces, form_of(state), most_runs=100))
    table_absent = np.where(leaves, outside, moved)
    one = runs_of(Listing(whole(table_absent), form_of(state), most_runs=100))
    if state.cr3 >> 12 == gap:
        assert found == []
        return
    strip = [(a, level, e & ~FRAME) for a, _, level, _, _, e in found]
    assert strip == [(a, level, e & ~FRAME) for a, _, level, _, _, e in one]


# OTHER MODES, AND SECOND STAGES


def other_states() -> list[Any]:
    """A control state of each kind that is not in `states`, and how to translate and list by it."""
    guests = [
        Cpu(PG | PE, 0x1000, 0, NXE, maxphyaddr=36),
        Cpu(PG | PE, 0x1000, PSE, NXE, maxphyaddr=36),
        Cpu(PG | PE, 0x1000, PSE, NXE, pse36=0, maxphyaddr=36),
        Cpu(PG | PE, 0x1020, PAE, NXE, maxphyaddr=36),
        Cpu(PG | PE, 0x1000, PAE, 0, maxphyaddr=36),
    ]
    stages = [
        Ept(0x1000 | 0x1E, 40),
        Ept(0x1000 | 0x66, 40, mbec=1),
        Ept(0x1000 | 0x1E, 40, capabilities=EPT_CAPABILITIES & ~(EXECUTE_ONLY | PAGE_1GB)),
        Npt(0x1000, maxphyaddr=40),
        Npt(0x1000, PAE | LA57, page1gb=0),
        Npt(0x1000, PAE, NXE, maxphyaddr=36),
        Npt(0x1000, PSE, 0, maxphyaddr=36),
    ]
    return [*guests, *stages]


def mapped(state: Any, image: Words) -> list[tuple[int, int]]:
    """What the reference maps, as addresses and where they lead, less what is malformed."""
    memory = Image(image.tolist())
    found = []
    if isinstance(state, Cpu):
        for m in mappings(state, memory):
            outcome: Any = translate(state, memory, Access(m.address))
            if not (isinstance(outcome, PageFault) and outcome.error_code & RSVD):
                found.append((m.address, m.pa))
        return found
    module: Any = ept if isinstance(state, Ept) else npt
    for mapping in module.mappings(state, memory):
        address = mapping.gpa if isinstance(state, Npt) else mapping.address
        outcome = second_stage.translate(state, memory, GuestPhysicalAccess(address))
        bad = isinstance(outcome, NestedPageFault) and outcome.exitinfo1 & RSVD
        if not bad and not isinstance(outcome, EptMisconfiguration):
            found.append((address, mapping.pa))
    return found


@pytest.mark.parametrize("state", other_states(), ids=str)
def test_other_tables_are_listed_as_the_reference_does(state: Any) -> None:
    seen, malformed = 0, 0
    for seed in range(120):
        image = sparse_tables(seed, PAGES * 512)
        rng = np.random.default_rng(seed)
        # Rights and types of EPT; the upper halves of 32-bit paging; large pages that are aligned.
        entries = np.flatnonzero(image)
        kinds = rng.integers(0, 8, len(entries))
        image[entries] |= np.where(kinds & 1, np.uint64(0x7), np.uint64(0))
        image[entries] &= ~np.where(kinds & 2, np.uint64(0x7F0 << 52 | 1 << 63), np.uint64(0))
        image[entries] |= np.where(kinds == 4, image[entries] << np.uint64(32), np.uint64(0))
        image[entries] &= np.where(kinds >= 5, ~np.uint64(0x78), ~np.uint64(0))
        if form_of(state).words[kernel.COUNT + 3] == 4:
            # PDPTEs of PAE: two registers' worth of them, one reserved bit among them.
            image[512:520] = [0x2001, 0x3001, 0, 0x2007 if seed % 8 == 0 else 0x2001] * 2
        listing = Listing(whole(image), form_of(state))
        found = [(address, pa) for address, pa, *_ in runs_of(listing)]
        assert found == mapped(state, image)
        seen, malformed = seen + len(found), malformed + listing.malformed
    assert seen > 5
    nothing_is_reserved = state == other_states()[0]
    assert malformed > 5 or nothing_is_reserved


# TWO STAGES


@given(
    guest=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9), st.sampled_from([0, 2]))),
    stage=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.sampled_from([0, 1]))),
    room=st.integers(1, 4),
)
def test_two_stages_put_together_are_one_after_the_other(
    guest: list[tuple[int, int, int]], stage: list[tuple[int, int, int]], room: int
) -> None:
    """By tiny pages: a page of size 0 is a byte, one of size 2 is four."""
    runs = [(k << 8, gpa << shift, shift, pages) for k, (gpa, pages, shift) in enumerate(guest)]
    second, at = [], 0
    for k, (gap, pages, shift) in enumerate(stage):
        at = -(-(at + gap) >> shift) << shift
        second.append((at, (k + 1) << 12, shift, pages))
        at += pages << shift
    leads = {a + i: pa + i for a, pa, shift, pages in second for i in range(pages << shift)}
    expected_bytes = {
        a + i: leads[gpa + i]
        for a, gpa, shift, pages in runs
        for i in range(pages << shift)
        if gpa + i in leads
    }
    columns = [np.array([r[c] for r in runs], dtype=np.uint64) for c in range(4)]
    others = [np.array([r[c] for r in second], dtype=np.uint64) for c in range(4)]
    found: dict[int, int] = {}
    unmapped = 0
    for parts in composed(columns, others, room):
        unmapped = parts.unmapped
        rows = zip(*(column.tolist() for column in parts[1:]), strict=True)
        for address, pa, shift, pages, run, of in rows:
            assert shift == min(runs[run][2], second[of][2])
            found |= {address + i: pa + i for i in range(pages << shift)}
    assert found == expected_bytes
    assert unmapped == sum(pages << shift for *_, shift, pages in runs) - len(found)


# HOSTILE TABLES


@pytest.mark.parametrize("la57", [0, LA57])
def test_a_table_full_of_itself_is_listed_as_far_as_there_is_room(la57: int) -> None:
    image = np.full(512, 1, dtype=np.uint64)
    assert listed(cpu(0, la57), image, 10_000) == [(n << 12, 1, 1) for n in range(10_000)]


@pytest.mark.parametrize(("la57", "levels"), [(0, 4), (LA57, 5)])
def test_the_pages_of_a_table_full_of_itself_are_counted_at_once(la57: int, levels: int) -> None:
    image = np.full(512, 1, dtype=np.uint64)
    listing = Listing(whole(image), form_of(cpu(0, la57)))
    assert list(listing.counted()) == [512**levels]
    assert listing.reads <= 512 * levels


def test_tables_that_fan_out_to_nothing_take_no_time() -> None:
    """512**3 ways lead to one empty page table: each table is read once."""
    image = np.zeros(4 * 512, dtype=np.uint64)
    for page in range(3):
        image[page * 512 : page * 512 + 512] = (page + 1) << 12 | 7
    listing = Listing(whole(image), form_of(cpu()))
    assert runs_of(listing) == []
    assert listing.reads == 4 * 512


def test_reading_ends_at_its_limit() -> None:
    image = np.full(512, 1, dtype=np.uint64)
    listing = Listing(whole(image), form_of(cpu()), most_reads=5 * 512)
    assert len(runs_of(listing)) == 2 * 512
    assert listing.stopped == "reads"
    assert listing.reads == 5 * 512
    counting = Listing(whole(image), form_of(cpu()), most_reads=3 * 512)
    assert list(counting.counted()) == [None]


@given(state=states, image=images)
def test_the_count_is_that_of_the_list(state: Cpu, image: Words) -> None:
    form = form_of(state)
    assert [*Listing(whole(image), form).counted()] == [len(runs_of(Listing(whole(image), form)))]


def test_a_memory_of_tables_that_is_full_costs_time_and_no_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listings, "SLOTS", 2)
    for seed in range(20):
        image = sparse_tables(seed, PAGES * 512)
        assert listed(cpu(), image, 1 << 12) == expected(cpu(), image, 1 << 12)


# MISTAKES

SEEDED = """
@ a-table-ends-early
-        while i < last:
+        while i + 1 < last:

@ reserved-bits-of-pages-are-those-of-tables
-            bad = entry & page_zero if page else entry & table_zero
+            bad = entry & table_zero

@ reserved-bits-of-tables-are-those-of-pages
-            bad = entry & page_zero if page else entry & table_zero
+            bad = entry & page_zero

@ rights-are-those-of-the-leaf
-            allowed = left & (entry ^ forbids | keeps)
+            allowed = entry ^ forbids | keeps

@ xd-is-a-right
-            allowed = left & (entry ^ forbids | keeps)
+            allowed = left & (entry | keeps)

@ no-sign
-                    if address >> form[SIGN]:
+                    if not form[TOP]:

@ pat-is-part-of-the-frame
-                    pa = entry & FRAME & ~((1 << shift) - 1)
+                    pa = entry & FRAME

@ pages-of-two-sizes-are-a-run
-                        and found_shift[n - 1] == shift

@ pages-of-other-rights-are-a-run
-                        and found_rights[n - 1] == allowed

@ pages-of-other-bits-are-a-run
-                        and (found_entry[n - 1] ^ entry) & same == 0

@ a-gap-is-part-of-a-run
-                        and found_address[n - 1] + (found_pages[n - 1] << shift) == address

@ frames-apart-are-a-run
-                        and pa - found_pa[n - 1] == found_pages[n - 1] << shift

@ a-page-is-lost-between-batches
-                        state[LEVEL], state[NEXT + level] = level, i - 1
-                        return FULL
+                        state[LEVEL], state[NEXT + level] = level, i
+                        return FULL

@ a-table-is-lost-between-batches
-                state[LEVEL], state[NEXT + level] = level, i - 1
-                return TIRED
+                state[LEVEL], state[NEXT + level] = level, i
+                return TIRED

@ pages-below-are-forgotten
-            state[BELOW + level] = state[BELOW + level] + state[BELOW + level - 1]
+            state[BELOW + level] = state[BELOW + level]

@ a-table-half-there-is-read
-    if low == 0 or address + size > ends[low - 1]:
+    if low == 0 or address >= ends[low - 1]:

@ the-piece-before
-        if firsts[middle] <= address:
+        if firsts[middle] < address:

@ a-table-is-remembered-at-any-level
-    key = place << 3 | level
+    key = place << 3 | 1
"""
MISTAKES = list(parse(f"file: impl/kernels/mappings.py\n{SEEDED}").values())


def telling() -> Words:
    """Tables in which what is easily overlooked comes up."""
    image = np.zeros(8 * 512, dtype=np.uint64)
    entries = {
        (0, 0): 0x1007, (0, 511): 0x1007, (1, 0): 0x2007, (1, 2): 0x6007, (1, 3): 0x7007,
        (2, 0): 0x3007, (3, 0): 0x40_0007,
        # A large page where one more like that of PTE 0 would be; one with PAT; a reserved bit.
        (2, 1): 0x60_0087, (2, 2): 0x80_1087, (2, 3): 0xA0_2087, (2, 511): 0x4007,
        # Neighbours of other rights, of other bits, at other addresses, of other frames.
        (4, 0): 0x8003, (4, 1): 0x9003, (4, 2): 0xA001, (4, 3): 0xB011, (4, 5): 0xC011,
        (4, 6): 0xE011, (4, 511): 0xF001 | XD,
        # The table at 0x5000 maps nothing as a page directory, and a page as a page table.
        (6, 0): 0x5007, (5, 0): 0x0, (5, 1): 0x1000_0000_0001, (7, 0): 0x3007 | 1 << 45,
    }  # fmt: skip
    for (page, index), entry in entries.items():
        image[page * 512 + index] = entry
    return image


def levels_apart() -> Words:
    """The table at 0x3000 maps nothing as a page directory, and a page as a page table."""
    image = np.zeros(6 * 512, dtype=np.uint64)
    for page, index, entry in (
        (0, 0, 0x1007), (1, 0, 0x3007), (1, 1, 0x2007), (2, 0, 0x3007), (3, 5, 0x4007),
    ):  # fmt: skip
        image[page * 512 + index] = entry
    return image


def outcome_of_all() -> list[Any]:
    """Lists, merged and not, in batches, and counts, of tables of every kind."""
    seen: list[Any] = []
    some = [sparse_tables(seed, PAGES * 512 - seed % 2) for seed in range(30)]
    for seed, image in enumerate([telling(), levels_apart(), *some]):
        for la57 in (0, LA57) if seed > 1 else (0,):
            form = form_of(cpu((seed & 3) << 12 if seed > 1 else 0, la57))
            for same in (0, 1 << 4, WORD ^ FRAME):
                listing = Listing(whole(image), form, same, most_runs=400)
                seen.append((runs_of(listing, room=7, reads=1024), listing.malformed))
            seen += list(Listing(whole(image), form).counted())
    return seen


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_of_the_kernel_shows(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    # As they are written: to compile each mistake would take longer than to run it.
    monkeypatch.setattr("vapama.impl.kernels.compiled.compiled", plain)
    right = outcome_of_all()
    monkeypatch.setattr(listings, "kernel", mistake.module())
    try:
        seen = outcome_of_all()
    except IndexError:
        return  # it read beyond the image
    assert seen != right


def plain(function: Any) -> Any:
    """In place of compiling a kernel: the kernel on Python's ints."""

    def run(*arguments: Any) -> Any:
        return function(*(Ints(a) if isinstance(a, np.ndarray) else int(a) for a in arguments))

    return run


class Ints:
    """An array whose elements are ints."""

    def __init__(self, array: Words) -> None:
        self.array = array

    def __getitem__(self, index: int) -> int:
        return int(self.array[index])

    def __setitem__(self, index: int, value: int) -> None:
        self.array[index] = value


def test_the_kernel_as_it_is_written_and_compiled_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = outcome_of_all()
    monkeypatch.setattr("vapama.impl.kernels.compiled.compiled", plain)
    assert outcome_of_all() == compiled
