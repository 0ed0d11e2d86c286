"""The software TLB, as it is written and in machine code, step for step alike."""

from random import Random
from typing import Any

import pytest

from vapama.fuzz.decoded import RandomDraws
from vapama.impl.optimized import Compiled, Optimized
from vapama.spec.access import Access
from vapama.spec.cpu import LMA, LME, NXE, PAE, PCIDE, PE, PG, WP, Cpu
from vapama.spec.invariants import tlb_nested
from vapama.spec.invariants.tlb import ARENA, LIMIT, WIDE, World
from vapama.spec.memory import Sparse
from vapama.spec.outcomes import PageFault, Translated
from vapama.spec.stage import Stage

CPU = Cpu(PG | PE | WP, 0x1000, PAE | PCIDE, LME | LMA | NXE)


class Both:
    """A subject whose TLB is the one as it is written and the compiled one, which must agree."""

    stateful = True

    def __init__(self) -> None:
        self.cached_alike = 0

    def tlb(self, cpu: Cpu, memory: Any, sets: int) -> "Both":
        self.written = Optimized().tlb(cpu, memory, sets=sets)
        self.compiled = Compiled().tlb(cpu, memory, sets=sets)
        return self

    def guest_tlb(self, cpu: Cpu, stage: Stage, memory: Any, sets: int) -> "Both":
        self.written = Optimized().guest_tlb(cpu, stage, memory, sets=sets)
        self.compiled = Compiled().guest_tlb(cpu, stage, memory, sets=sets)
        return self

    def translate(self, access: Access) -> Any:
        one, other = self.written.translate(access), self.compiled.translate(access)
        assert type(one) is type(other)
        if isinstance(one, Translated) and isinstance(other, Translated):
            assert (one.pa, one.level) == (other.pa, other.level)
        if isinstance(one, PageFault) and isinstance(other, PageFault):
            assert one.error_code == other.error_code
        assert self.written.cached() == self.compiled.cached()
        self.cached_alike += len(self.written.cached())
        return one

    def __getattr__(self, name: str) -> Any:
        def both(*arguments: Any) -> None:
            getattr(self.written, name)(*arguments)
            getattr(self.compiled, name)(*arguments)
            assert self.written.cached() == self.compiled.cached()

        return both


def test_machine_code_does_for_a_guest_what_the_source_does() -> None:
    both, random = Both(), Random(0)
    for setup in tlb_nested.SETUPS * 4:
        world = tlb_nested.GuestWorld(RandomDraws(random), both, setup)
        for _ in range(40):
            operation = random.choice(tlb_nested.WIDE[setup.kind])
            getattr(world, operation.method)(*operation.arguments)
    assert both.cached_alike > 200


def test_machine_code_does_what_the_source_does() -> None:
    both, random = Both(), Random(0)
    for _ in range(40):
        world = World(RandomDraws(random), both)
        for _ in range(40):
            operation = random.choice(WIDE)
            getattr(world, operation.method)(*operation.arguments)
    assert both.cached_alike > 1000


@pytest.mark.parametrize("subject", [Optimized(), Compiled()])
def test_a_second_access_needs_no_memory(subject: Any) -> None:
    tlb = subject.tlb(CPU, Sparse(ARENA, LIMIT))
    first = tlb.translate(Access(0x123, user=1))
    for where in ARENA:
        tlb.write(where, 0)
    second = tlb.translate(Access(0x456, user=1))
    assert (first.pa ^ second.pa, first.level) == (0x123 ^ 0x456, second.level)
    tlb.invlpg(0x0)
    assert isinstance(tlb.translate(Access(0x456, user=1)), PageFault)


@pytest.mark.parametrize("subject", [Optimized(), Compiled()])
def test_a_cached_table_shortens_a_walk(subject: Any) -> None:
    """Only the last entry is still there when the second page is asked for."""
    tlb = subject.tlb(CPU, Sparse(ARENA, LIMIT), sets=64, ways=4)
    tlb.translate(Access(0x123, user=1))
    for where in ARENA:
        if where & ~0xFFF != 0x5000:
            tlb.write(where, 0)
    assert tlb.translate(Access(0x1123, user=1)).pa == 0x9123
