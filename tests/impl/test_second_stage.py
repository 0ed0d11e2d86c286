"""The compiled kernels of second stages, on images that no proof has seen."""

from collections.abc import Callable, Sequence
from itertools import product
from random import Random

import numpy as np
import numpy.typing as npt
import pytest

from vapama.fuzz.decoded import RandomDraws
from vapama.impl.optimized import Compiled, Optimized
from vapama.runs import second_stage_preloaded
from vapama.spec import second_stage
from vapama.spec.access import GuestPhysicalAccess
from vapama.spec.cpu import LA57, LMA, LME, NXE, PAE, PSE
from vapama.spec.memory import Image, Sparse
from vapama.spec.outcomes import (
    EptMisconfiguration,
    EptViolation,
    NestedPageFault,
    OutsideMemory,
    Translated,
)
from vapama.spec.stage import Ept, Npt, Stage, require_possible_ept, require_possible_npt
from vapama.spec.subject import agree

Words = npt.NDArray[np.uint64]
EPTS = (Ept(0x105E, 40), Ept(0x1066, 40, mbec=1), Ept(0x101E, 40))
HOSTS = (
    Npt(0x1000, maxphyaddr=40),
    Npt(0x1000, cr4=PAE | LA57, efer=LMA | LME | NXE, maxphyaddr=40),
    Npt(0x1020, cr4=PAE, efer=NXE, maxphyaddr=40),
    Npt(0x1000, cr4=PSE, efer=0, maxphyaddr=40),
)
ACCESSES = (
    GuestPhysicalAccess(0),
    GuestPhysicalAccess(0, write=1),
    GuestPhysicalAccess(0, fetch=1, user=1),
    GuestPhysicalAccess(0, table=1),
)


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return Compiled()


def preloaded(stage: Stage, image: Words, accesses: Sequence[GuestPhysicalAccess]) -> Sparse:
    return second_stage_preloaded(stage, Image(image), accesses)


def some_gpas(stage: Stage, count: int, seed: int) -> list[int]:
    """Guest-physical addresses: in the lowest pages of tables, of 32 bits, of 48 and of 52."""
    random = Random(seed)
    widths = (16, 24, 32, 32) if isinstance(stage, Npt) and stage.levels < 4 else (24, 32, 48, 52)
    return [random.getrandbits(random.choice(widths)) for _ in range(count)]


@pytest.mark.parametrize(
    ("stage", "kinds"),
    [
        *((stage, {EptViolation, EptMisconfiguration}) for stage in EPTS),
        *((stage, {NestedPageFault}) for stage in HOSTS),
    ],
)
def test_machine_code_walks_hostile_images_as_the_reference_does(
    compiled: Compiled, hostile: Callable[[int, int], Words], stage: Stage, kinds: set[type]
) -> None:
    met = set()
    # Bits that EPT reserves in a table are what other formats are full of.
    keep = np.uint64(0xFFFFFFFFFFFFFF87 if isinstance(stage, Ept) else 0xFFFFFFFFFFFFFE7F)
    for seed, access in product(range(2), ACCESSES):
        image = hostile(seed, 8)
        if isinstance(stage, Npt) and stage.levels == 3:
            image[0x1020 >> 3 : 0x1040 >> 3] = [0x2001, 0x9001, 0x1001, 0x4001]
        elif not isinstance(stage, Npt) or stage.levels >= 4:
            image = image & keep
        for gpa in some_gpas(stage, 250, seed):
            made = access._replace(address=gpa)
            memory = preloaded(stage, image, [made])
            expected = second_stage.translate(stage, memory, made)
            observed = compiled.second_stage(stage, memory, made)
            assert agree(expected, observed, memory, Compiled.capabilities)
            met.add(type(expected))
    assert met >= kinds | {Translated, OutsideMemory}


@pytest.mark.parametrize("stage", [*EPTS, *HOSTS])
def test_a_batch_is_the_walk_address_by_address(
    compiled: Compiled, hostile: Callable[[int, int], Words], stage: Stage
) -> None:
    image, gpas = hostile(3, 8), some_gpas(stage, 300, 3)
    for access in ACCESSES:
        memory = preloaded(stage, image, [access._replace(address=gpa) for gpa in gpas])
        batch = compiled.second_stage_many(stage, memory, gpas, access)
        plain = Optimized().second_stage_many(stage, memory, gpas, access)
        assert batch == plain
        for gpa, many in zip(gpas, batch, strict=True):
            one = compiled.second_stage(stage, memory, access._replace(address=gpa))
            assert agree(one, many, memory, BLIND_TO_FLAGS)


BLIND_TO_FLAGS = Optimized.capabilities.__class__(Optimized.capabilities.observes - {"updates"})


@pytest.mark.parametrize("stage", [EPTS[0], HOSTS[3]])
def test_nothing_is_left_behind_for_the_next_walk(compiled: Compiled, stage: Stage) -> None:
    memory = Sparse({0x1000: 0x1007}, 0x2000)
    access = GuestPhysicalAccess(0, write=1)
    first = compiled.second_stage(stage, memory, access)
    assert isinstance(first, Translated)
    assert any(update.bits for update in first.updates)
    absent = compiled.second_stage(stage, Sparse({}, 0x2000), access)
    assert isinstance(absent, EptViolation | NestedPageFault)
    assert compiled.second_stage(stage, memory, access) == first


def test_stages_that_are_drawn_exist() -> None:
    levels = set()
    for seed in range(500):
        draws = RandomDraws(Random(seed))
        ept, host = draws.ept(), draws.npt()
        require_possible_ept(ept)
        require_possible_npt(host)
        levels |= {("EPT", ept.levels), ("NPT", host.levels)}
    assert levels == {("EPT", 4), ("EPT", 5), *(("NPT", n) for n in (2, 3, 4, 5))}
