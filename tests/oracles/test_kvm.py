"""KVM_TRANSLATE on this host's /dev/kvm: cases by hand, and a bounded random run."""

import os
from collections import Counter
from collections.abc import Iterator
from random import Random

import pytest

from vapama.fuzz.decoded import RandomDraws
from vapama.oracles.kvm import DEVICE, RAM_BYTES, Kvm
from vapama.runs import preloaded
from vapama.spec.access import Access
from vapama.spec.cpu import LMA, LME, NXE, PAE, PE, PG, SMAP, Cpu
from vapama.spec.memory import Sparse
from vapama.spec.outcomes import OutsideMemory, PageFault, Translated
from vapama.spec.paging import translate
from vapama.spec.subject import NotCovered, agree

ADDRESS = 0x1234_5678_9ABC
TABLES = {0x1000 | 0x24 << 3: 0x2003, 0x2000 | 0xD1 << 3: 0x3003, 0x3000 | 0xB3 << 3: 0x4003}
PTE = 0x4000 | 0x189 << 3


@pytest.fixture(scope="module")
def kvm() -> Iterator[Kvm]:
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        pytest.skip(f"{DEVICE} is not here, or not to be opened")
    try:
        made = Kvm()
    except OSError as error:
        pytest.skip(f"{DEVICE}: {error.strerror}")
    yield made
    made.close()


def state(kvm: Kvm, cr4: int = PAE, efer: int = NXE) -> Cpu:
    return Cpu(
        cr0=PG | PE,
        cr3=0x1000,
        cr4=cr4,
        efer=LME | LMA | efer,
        maxphyaddr=kvm.maxphyaddr,
        page1gb=kvm.page1gb,
        pse36=kvm.pse36,
    )


def test_a_page_is_found(kvm: Kvm) -> None:
    memory = Sparse({**TABLES, PTE: 0x8003}, RAM_BYTES)
    outcome = kvm.translate(state(kvm), memory, Access(ADDRESS))
    assert outcome == Translated(0x8ABC, 0, ())


@pytest.mark.parametrize("leaf", [0, 0x8003 | 1 << 51], ids=["not present", "reserved bit"])
def test_a_fault_is_told(kvm: Kvm, leaf: int) -> None:
    memory = Sparse({**TABLES, PTE: leaf}, RAM_BYTES)
    assert isinstance(kvm.translate(state(kvm), memory, Access(ADDRESS)), PageFault)


def test_what_cannot_be_asked_is_not_covered(kvm: Kvm) -> None:
    memory = Sparse({**TABLES, PTE: 0x8003}, RAM_BYTES)
    for odd in (Access(ADDRESS, write=1), Access(ADDRESS, user=1), Access(1 << 47)):
        with pytest.raises(NotCovered):
            kvm.translate(state(kvm), memory, odd)
    with pytest.raises(NotCovered, match="lacks bits of CR4"):
        kvm.translate(state(kvm, PAE | 1 << 22), memory, Access(ADDRESS))


def test_random_cases_agree_or_are_known(kvm: Kvm) -> None:
    random, seen = Random(1), Counter[str]()
    for _ in range(3_000):
        nondet = RandomDraws(random, kvm.capabilities.narrow)
        cpu, lazy, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
        memory = preloaded(cpu, lazy, access)
        expected = translate(cpu, memory, access)
        try:
            outcome = kvm.translate(cpu, memory, access)
        except NotCovered:
            continue
        if agree(expected, outcome, memory, kvm.capabilities):
            seen[type(expected).__name__] += 1
        else:
            name = kvm.departure(cpu, memory, access, expected, outcome)
            assert name is not None, (cpu, memory.touched, access, expected, outcome)
            seen[name] += 1
    assert seen["Translated"]
    assert seen["PageFault"]
    assert seen["table-outside-memory-is-not-present"]
    assert not kvm.is_amd or seen["amd-reserves-bit-8-of-upper-entries"]


def test_a_departure_excuses_no_translation(kvm: Kvm) -> None:
    memory = Sparse({**TABLES, PTE: 0x8003}, RAM_BYTES)
    access, right = Access(ADDRESS), Translated(0x8ABC, 1, ())
    assert kvm.departure(state(kvm), memory, access, right, PageFault(0)) is None
    assert kvm.departure(state(kvm), memory, access, right, Translated(0x9ABC, 0, ())) is None
    outside = OutsideMemory(RAM_BYTES)
    assert kvm.departure(state(kvm), memory, access, outside, right) is None


def test_smap_is_set_if_the_processor_has_it(kvm: Kvm) -> None:
    if not kvm.cr4 & SMAP:
        pytest.skip("no SMAP in this KVM")
    tables = {where: entry | 4 for where, entry in TABLES.items()}
    memory = Sparse({**tables, PTE: 0x8007}, RAM_BYTES)
    outcome = kvm.translate(state(kvm, PAE | SMAP), memory, Access(ADDRESS))
    assert isinstance(outcome, PageFault)
