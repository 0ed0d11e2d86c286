"""`translate_array`: many addresses at once, from arrays of every sort."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from vapama.impl.optimized import Compiled, Optimized, outcome, translate_array
from vapama.snapshot.truth import SHIPPED, load_snapshot
from vapama.spec.access import Access
from vapama.spec.cpu import LA57, LMA, LME, NXE, PAE, PE, PG, Cpu
from vapama.spec.memory import Image, Sparse
from vapama.spec.outcomes import NonCanonical, OutsideMemory, PageFault, Translated
from vapama.spec.paging import translate
from vapama.spec.subject import Capabilities, agree

Words = npt.NDArray[np.uint64]
Images = Callable[[int, int], Words]
BLIND_TO_FLAGS = Capabilities(Optimized.capabilities.observes - {"updates"})


USER_READ = Access(0, user=1)
CPU = Cpu(cr0=PG | PE, cr3=0x1000, cr4=PAE | LA57, efer=LME | LMA | NXE, maxphyaddr=40)


def some_addresses(count: int) -> Words:
    """Addresses of both halves and beyond, most of them with equal indices in small tables."""
    rng = np.random.default_rng(count)
    raw = rng.integers(0, 1 << 64, count, dtype=np.uint64)
    high = raw | np.uint64(0xFF80_0000_0000_0000)
    kind = raw % np.uint64(3)
    return np.select([kind == 0, kind == 1], [raw, high], raw >> np.uint64(8))


def require_elementwise(
    cpu: Cpu, image: Words, addresses: Words, access: Access = USER_READ
) -> set[type]:
    """Check a batch against the reference, address by address; the kinds of outcome met."""
    statuses, values = translate_array(cpu, image, addresses, access)
    assert statuses.dtype == values.dtype == np.uint64
    assert statuses.shape == values.shape == addresses.shape
    memory, kinds = Image(image), set()
    for address, status, value in zip(addresses, statuses, values, strict=True):
        expected = translate(cpu, memory, access._replace(address=int(address)))
        observed = outcome(int(status), int(value))
        assert agree(expected, observed, memory, BLIND_TO_FLAGS)
        kinds.add(type(expected))
    return kinds


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_a_batch_equals_the_walk_elementwise(hostile: Images, count: int) -> None:
    kinds = require_elementwise(CPU, hostile(1, 8), some_addresses(count))
    if count == 1000:
        assert kinds == {Translated, PageFault, NonCanonical, OutsideMemory}


@pytest.mark.parametrize(
    "access",
    [Access(0), Access(0, 1), Access(0, 0, 1), Access(0, implicit=1), Access(0, 1, user=1)],
)
def test_a_batch_takes_every_kind_of_access(hostile: Images, access: Access) -> None:
    require_elementwise(CPU, hostile(2, 8), some_addresses(300), access)


def test_a_batch_on_the_real_guest_equals_the_walk_elementwise() -> None:
    guest = load_snapshot(SHIPPED)
    rng = np.random.default_rng(3)
    moved = np.array([0, 0xFFF, 1 << 40, 1 << 47], dtype=np.uint64)
    addresses = rng.choice(guest.truth_va, 500) ^ rng.choice(moved, 500)
    kinds = require_elementwise(guest.cpu, guest.image, addresses)
    assert kinds == {Translated, PageFault, NonCanonical}


@pytest.mark.parametrize("form", ["read-only", "memory map", "every other", "reversed"])
def test_arrays_of_every_sort_serve(hostile: Images, form: str, tmp_path: Path) -> None:
    image, addresses = hostile(4, 8), some_addresses(300)
    match form:
        case "read-only":
            image.flags.writeable = addresses.flags.writeable = False
        case "memory map":
            image.tofile(tmp_path / "image")
            addresses.tofile(tmp_path / "addresses")
            image = np.memmap(tmp_path / "image", dtype=np.uint64, mode="r")
            addresses = np.memmap(tmp_path / "addresses", dtype=np.uint64, mode="r")
        case "every other":
            image, addresses = np.repeat(image, 2)[::2], np.repeat(addresses, 2)[::2]
        case "reversed":
            addresses = addresses[::-1]
    require_elementwise(CPU, image, addresses)


def test_a_batch_leaves_the_image_as_it_is(hostile: Images) -> None:
    image = hostile(5, 8)
    before = image.copy()
    statuses, _ = translate_array(CPU, image, some_addresses(1000), Access(0, write=1))
    assert (statuses <= 3).any()
    assert np.array_equal(image, before)


def test_the_compiled_subject_leaves_nothing_behind_for_the_next_case() -> None:
    subject, cpu = Compiled(), Cpu._make(CPU._replace(cr3=0))
    itself = Sparse({0: 7}, 0x1000)
    first = subject.translate(cpu, itself, Access(0, write=1))
    assert isinstance(first, Translated)
    assert subject.translate(cpu, Sparse({}, 0x1000), Access(0)) == PageFault(0)
    assert subject.translate(cpu, itself, Access(0, write=1)) == first
