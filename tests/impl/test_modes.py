"""The kernels of the other modes: machine code beside the reference, batches, PDPTE registers."""

from random import Random

import numpy as np
import pytest

from vapama.fuzz.decoded import RandomDraws
from vapama.impl.kernels.long_mode import FAULT, OUTSIDE
from vapama.impl.optimized import Compiled, Optimized, translate_array
from vapama.runs import Guarded
from vapama.spec import nondet
from vapama.spec.access import Access
from vapama.spec.cpu import PAE, PE, PG, PSE, Cpu
from vapama.spec.memory import Image, Sparse
from vapama.spec.nondet import Reject
from vapama.spec.outcomes import GeneralProtection, OutsideMemory, PageFault, Translated
from vapama.spec.paging import load_pdptes, translate
from vapama.spec.subject import agree


@pytest.fixture(scope="module")
def compiled() -> Guarded:
    return Guarded("compiled", Compiled())


@pytest.mark.parametrize("states", nondet.EVERY_MODE, ids=str)
def test_machine_code_agrees_with_the_reference(
    compiled: Guarded, states: nondet.ControlStates
) -> None:
    draws, met = RandomDraws(Random(5)), 0
    for _ in range(1500):
        draws.trail.clear()
        cpu, memory, access = draws.walk(states)
        expected = translate(cpu, memory, access)
        try:
            observed = compiled.translate(cpu, memory, access)
        except Reject:
            continue  # of a memory too large to make an image of
        met += 1
        assert agree(expected, observed, memory, compiled.capabilities), draws.draws()
    assert met > 1400


@pytest.mark.parametrize(
    ("cr4", "pdptes"), [(0, None), (PSE, None), (PAE, None), (PAE, (0x1001, 0x2001, 0, 0x3001))]
)
def test_a_batch_over_an_array_is_the_walk_of_each(
    cr4: int, pdptes: tuple[int, ...] | None
) -> None:
    rng = np.random.default_rng(cr4)
    frames = rng.integers(0, 9, 8 * 512, dtype=np.uint64) << np.uint64(12)
    image = frames | rng.integers(0, 0x1000, 8 * 512, dtype=np.uint64) | np.uint64(6)
    image |= (frames | np.uint64(0x25)) << np.uint64(32) if not cr4 & PAE else np.uint64(0)
    if cr4 & PAE:
        image[0x200:0x204] = (0x1001, 0x2001, 0, 0x3001)
    addresses = rng.integers(0, 1 << 32, 500, dtype=np.uint64)
    cpu = Cpu(PG | PE, 0x1000, cr4, 0, maxphyaddr=40, pdptes=pdptes)
    statuses, values = translate_array(cpu, image, addresses, Access(0, user=1))
    memory, kinds = Image(image), set()
    for address, status, value in zip(
        addresses.tolist(), statuses.tolist(), values.tolist(), strict=True
    ):
        outcome = translate(cpu, memory, Access(address, user=1))
        kinds.add(type(outcome))
        match outcome:
            case Translated():
                assert (status, value) == (outcome.level, outcome.pa)
            case PageFault():
                assert (status, value) == (FAULT, outcome.error_code)
            case OutsideMemory():
                assert (status, value) == (OUTSIDE, outcome.address)
    assert Translated in kinds
    assert PageFault in kinds


@pytest.mark.parametrize("make", [Optimized, Compiled])
def test_pdptes_are_loaded_or_refused_as_the_reference_does(
    make: type[Optimized] | type[Compiled],
) -> None:
    subject, draws, seen = make(), RandomDraws(Random(9)), set()
    for _ in range(300):
        draws.trail.clear()
        cpu, memory, _ = draws.walk(nondet.PAE_IN_MEMORY)
        if memory.limit > Compiled.LARGEST:
            continue
        expected, observed = load_pdptes(cpu, memory), subject.load_pdptes(cpu, memory)
        seen.add(type(expected))
        if isinstance(expected, tuple):
            assert tuple(observed) == expected  # type: ignore[arg-type]
        else:
            assert observed == expected
    assert seen == {tuple, GeneralProtection, OutsideMemory}


def test_a_refused_load_changes_no_register() -> None:
    cpu = Cpu(PG | PE, 0x20, PAE, 0)
    for subject in (Optimized(), Compiled()):
        refused = subject.load_pdptes(cpu, Sparse({0x20: 0x1001, 0x38: 0x2003}, 4096))
        assert refused == GeneralProtection()
