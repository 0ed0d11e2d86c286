"""A clone of a hypervisor, and of the machine beside it, shares nothing that a step changes."""

from collections.abc import Iterator
from random import Random
from types import FunctionType, MethodType, ModuleType
from typing import Any

import pytest

from vapama.impl.guest import SlotState, Vcpu
from vapama.impl.hardware import Core, Frames
from vapama.impl.host import Backing
from vapama.impl.mmu import Mmu
from vapama.impl.shadow import ShadowMmu
from vapama.impl.tdp import Format, TwoDimensional
from vapama.impl.vmm import Vmm
from vapama.spec import overcommit, programs, shadow
from vapama.spec.machine import GuestMachine, Machine
from vapama.spec.steps import EPT, NPT, SHADOW, GuestPlan, Step
from vapama.spec.tlb import History, Processor

DESIGNS = (SHADOW, EPT, NPT)
WORLDS = pytest.mark.parametrize("world", [programs, overcommit], ids=["plain", "sharing"])
CONSTANT = (
    *(int, str, bytes, frozenset, type, type(None)),
    *(FunctionType, ModuleType, GuestPlan, Format),
)
"""What no step changes, nor anything in it."""


class Run:
    """A program on a hypervisor and on the machine that its guests believe in."""

    def __init__(self, world: Any, style: int, design: str) -> None:
        self.world, self.style = world, style
        plan = world.plan(style, design)
        self.hypervisor, self.machine = Vmm(plan), Machine(plan)

    def clone(self) -> "Run":
        """Another that goes on by itself."""
        twin = object.__new__(Run)
        twin.world, twin.style = self.world, self.style
        twin.hypervisor, twin.machine = self.hypervisor.clone(), self.machine.clone()
        return twin

    def make(self, words: list[int]) -> None:
        """Make the steps of some words, each judged."""
        for word in words:
            step: Step = self.world.decode(word, self.machine, self.style)
            self.machine.check(step, self.hypervisor.do(step), self.hypervisor.word)

    def state(self) -> tuple[bytes, bytes]:
        """All that later steps depend on."""
        return shadow.state(self.hypervisor.view()), self.machine.state()


def parts(thing: Any, found: dict[int, Any]) -> dict[int, Any]:
    """All that is changed in place and can be reached from here, by identity."""
    if isinstance(thing, CONSTANT) or id(thing) in found:
        return found
    if not isinstance(thing, (tuple, range, MethodType)):
        found[id(thing)] = thing
    for inner in _inner(thing):
        parts(inner, found)
    return found


def _inner(thing: Any) -> Iterator[Any]:
    if isinstance(thing, dict):
        yield from thing.keys()
        yield from thing.values()
    elif isinstance(thing, (list, tuple, set)):
        yield from thing
    elif isinstance(thing, MethodType):
        yield thing.__self__
    else:
        yield from getattr(thing, "__dict__", {}).values()
        for base in type(thing).__mro__:
            for name in getattr(base, "__slots__", ()):
                if hasattr(thing, name):
                    yield getattr(thing, name)


def shared(run: Run, twin: Run) -> list[str]:
    """The kinds of what two runs have in common after each guest of both was about to step."""
    for each in (run, twin):
        for number in range(len(each.machine.guests)):
            each.hypervisor._guest(number)
            each.machine._stepping(number)
    mine = parts(run.hypervisor, {}) | parts(run.machine, {})
    its = parts(twin.hypervisor, {}) | parts(twin.machine, {})
    # Memory before the first write, the map that it is read by, the words of a page as it was
    # swapped out, and an empty pool of huge pages stay as they are.
    stays: dict[int, Any] = {}
    if not run.hypervisor.plan.pool:
        parts(run.hypervisor.pool, stays)
    for number, guest in enumerate(run.machine.guests):
        parts(guest.history.memory, stays)
        for copy in run.hypervisor.guests[number].backing.copies.values():
            parts(copy, stays)
    return sorted(type(mine[i]).__name__ for i in mine.keys() & its.keys() - stays.keys())


def words(random: Random, count: int) -> list[int]:
    return [random.getrandbits(64) for _ in range(count)]


@WORLDS
@pytest.mark.parametrize("design", DESIGNS)
def test_a_clone_and_its_original_go_on_as_if_they_had_run_alone(world: Any, design: str) -> None:
    for seed in range(12):
        random = Random(seed)
        style = random.getrandbits(41)
        before, mine, its = (words(random, 16) for _ in range(3))
        run = Run(world, style, design)
        run.make(before)
        twin, third = run.clone(), run.clone()
        start = run.state()
        run.make(mine)
        assert twin.state() == third.state() == start
        twin.make(its)
        assert third.state() == start
        third.make(mine)
        alone = [Run(world, style, design) for _ in range(2)]
        alone[0].make(before + mine)
        alone[1].make(before + its)
        assert run.state() == third.state() == alone[0].state()
        assert twin.state() == alone[1].state()


@WORLDS
@pytest.mark.parametrize("design", DESIGNS)
def test_nothing_that_a_step_changes_is_shared(world: Any, design: str) -> None:
    for seed in range(6):
        random = Random(seed)
        run = Run(world, random.getrandbits(41), design)
        run.make(words(random, 40))
        assert shared(run, run.clone()) == []


FORGOTTEN = [
    *((Vmm, name) for name in ("ram", "frames")),
    *((Frames, name) for name in ("ram", "free_list")),
    *((Backing, name) for name in ("frame", "copies", "readonly", "huge", "frames")),
    *((SlotState, name) for name in ("dirty",)),
    *((Vcpu, name) for name in ("core",)),
    *((Core, name) for name in ("tlb", "upper", "view", "path", "ram")),
    *((Mmu, name) for name in ("guest", "gptes", "path")),
    *((ShadowMmu, name) for name in ("pages", "by_role", "shadowing", "rmap", "mapped")),
    *((TwoDimensional, name) for name in ("pages", "root", "dying")),
    *((GuestMachine, name) for name in ("map", "entries", "history", "processors")),
    *((History, name) for name in ("held",)),
    *((Processor, name) for name in ("contexts", "invalidations", "history")),
]


@pytest.mark.parametrize(("kind", "name"), FORGOTTEN, ids=lambda it: getattr(it, "__name__", it))
def test_a_part_that_a_clone_forgets_to_copy_is_seen(
    kind: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = kind.clone

    def forgetful(self: Any, *args: Any) -> Any:
        twin = clone(self, *args)
        setattr(twin, name, getattr(self, name))
        return twin

    monkeypatch.setattr(kind, "clone", forgetful)
    run = Run(programs, 0x8864, EPT if kind is TwoDimensional else SHADOW)
    run.make(words(Random(1), 24))
    assert shared(run, run.clone())
