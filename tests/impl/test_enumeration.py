"""`enumerate_mappings` finds what the reference does, in order, and stops when its room is full."""

from itertools import islice

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vapama.impl.kernels import long_mode
from vapama.impl.kernels.compiled import compiled
from vapama.impl.optimized import controls, mappings_array
from vapama.spec.cpu import LA57, LMA, LME, PAE, PE, PG, Cpu
from vapama.spec.memory import Image
from vapama.spec.paging import mappings

Words = npt.NDArray[np.uint64]
PAGES, UNTOUCHED = 4, 0xDEAD


def cpu(cr3: int = 0, la57: int = 0) -> Cpu:
    return Cpu(cr0=PG | PE, cr3=cr3, cr4=PAE | la57, efer=LME | LMA)


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
        image[page * 512 + indices] = flags | frame | large
    return image[:entries]


def expected(state: Cpu, image: Words, most: int) -> list[tuple[int, int, int]]:
    return list(islice(mappings(state, Image(image.tolist())), most))


def listed(state: Cpu, image: Words, room: int) -> list[tuple[int, int, int]]:
    found = mappings_array(state, image, room)
    return list(zip(*(array.tolist() for array in found), strict=True))


images = st.builds(
    sparse_tables, st.integers(0, 1 << 32), st.integers(0, PAGES * 512) | st.just(PAGES * 512)
)
states = st.builds(
    cpu, st.integers(0, PAGES).map(lambda page: page << 12 | 0x18), st.sampled_from([0, LA57])
)


@given(state=states, image=images)
@example(state=cpu(), image=sparse_tables(0, PAGES * 512))
def test_the_kernel_finds_the_mappings_of_the_reference(state: Cpu, image: Words) -> None:
    assert listed(state, image, 1 << 12) == expected(state, image, 1 << 12)


def test_random_tables_map_pages_of_every_size_in_both_halves() -> None:
    found = [m for seed in range(60) for m in listed(cpu(), sparse_tables(seed, 2048), 1 << 12)]
    assert {level for _, level, _ in found} == {1, 2, 3}
    assert {address >> 63 for address, _, _ in found} == {0, 1}


@given(state=states, image=images, room=st.integers(0, 5))
def test_the_kernel_stops_when_its_room_is_full(state: Cpu, image: Words, room: int) -> None:
    whole = expected(state, image, room + 1)
    # One more word than the kernel is told of, to see that it writes no further.
    found = [np.full(room + 1, UNTOUCHED, dtype=np.uint64) for _ in range(3)]
    scratch = [np.zeros(6, dtype=np.uint64) for _ in range(2)]
    mode, _, cr3, _, _ = controls(state)
    words = map(np.uint64, (len(image), mode, cr3))
    count = compiled(long_mode.enumerate_mappings)(
        image, *words, *scratch, np.uint64(room), *(array[:room] for array in found)
    )
    assert count == len(whole)
    assert list(zip(*(a.tolist() for a in found), strict=True))[: min(room, count)] == whole[:room]
    assert [array[room] for array in found] == [UNTOUCHED] * 3
    assert listed(state, image, room) == whole[:room]


@pytest.mark.parametrize("la57", [0, LA57])
def test_a_table_full_of_itself_is_enumerated_as_far_as_there_is_room(la57: int) -> None:
    image = np.full(512, 1, dtype=np.uint64)
    assert listed(cpu(0, la57), image, 10_000) == [(n << 12, 1, 1) for n in range(10_000)]
