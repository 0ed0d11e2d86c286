"""Hypothesis state machines of a hypervisor: programs of readable steps, for `pytest` to run.

    from vapama.state_machines import machine_of

    TestMine = machine_of("mymmu:Mine").TestCase

The steps are those of `vapama.spec.programs`, a rule for each kind. After each step the machine
that the guests believe in judges what was seen, and the audit looks at every table; in the end each
guest's memory is compared. Hypothesis shrinks a program that fails and prints its steps; what it
notes besides is a Case, for `vapama explain` and for `tests/regressions/`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from random import Random
from typing import Any, NamedTuple

import msgspec
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from vapama.case import BadInput, make_case
from vapama.explain_programs import describe_step
from vapama.fuzz.decoded import Decoded
from vapama.runs import Guarded, SubjectRaised
from vapama.spec import overcommit, programs, shadow
from vapama.spec.domains import Take
from vapama.spec.invariants import overcommit as claims_of_sharing
from vapama.spec.invariants import vmm
from vapama.spec.machine import Machine
from vapama.spec.steps import Plan, Rest, Step
from vapama.spec.subject import VMM
from vapama.subjects import load_subject

WORDS = st.integers(0, (1 << 64) - 1)
ENGINE = "hypothesis"


class Drawn(Decoded):
    """Draws of Hypothesis' own."""

    def __init__(self, take: Take) -> None:
        super().__init__()
        self.take = take


class Power(NamedTuple):
    """A machine at power-on, the style of the program on it, and the draws that gave them."""

    style: int
    plan: Plan
    draws: tuple[tuple[str, int], ...]

    def __repr__(self) -> str:
        """As a falsifying program shows it."""
        guests = len(self.plan.guests)
        return f"{self.plan.design}, {guests} guests, style {self.style:#x}"


class Told(NamedTuple):
    """A step, and the word that it stands for."""

    step: Step
    word: int

    def __repr__(self) -> str:
        """As a falsifying program shows it."""
        return describe_step(self.step)


@st.composite
def powers(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Power:
    """Any machine that programs run on."""
    nondet = Drawn(lambda: int(draw(WORDS)))
    style, plan = draw(st.runner()).world.draw(nondet)
    return Power(style, plan, tuple(nondet.draws()))


class World(NamedTuple):
    """What programs are about: the module that decodes their steps, and that with their claims of
    tables and of memory.
    """

    programs: Any
    draw: Callable[[Any], tuple[int, Plan]]
    tables: Callable[..., None]
    memory: Callable[..., None]
    before: tuple[tuple[str, int], ...] = ()
    """What a Case says besides, between the machine and the steps."""


PLAIN = World(
    programs,
    vmm.drawn_plan,
    vmm.the_tables_satisfy_every_rule_after_every_step,
    vmm.no_guest_reaches_what_is_not_its_own,
)
SHARING = World(
    overcommit,
    claims_of_sharing.drawn_plan,
    claims_of_sharing.a_shared_frame_is_writable_nowhere_and_a_large_leaf_fits,
    claims_of_sharing.guests_whose_memory_is_shared_do_not_notice,
    before=(("merged", 0),),
)
"""Guests whose equal pages are merged, on a host that makes small pages huge."""


@cache
def kinds(world: World = PLAIN) -> dict[str, tuple[int, ...]]:
    """The kinds of steps that programs have, and what bits 63 and 7:0 of words may stand for them,
    the others being 0.
    """
    random, found = Random(0), dict[str, set[int]]()
    machine = Machine(world.programs.plan(0))
    for fixed in (top << 63 | low for top in (0, 1) for low in range(256)):
        for _ in range(24):
            step = world.programs.decode(random.getrandbits(55) << 8 | fixed, machine)
            if not isinstance(step, Rest):
                found.setdefault(type(step).__name__.lower(), set()).add(fixed)
    return {kind: tuple(sorted(fixed)) for kind, fixed in found.items()}


@st.composite
def steps_of(draw: Callable[[st.SearchStrategy[Any]], Any], kind: str, world: World) -> Told:
    """A step of a kind; what a word stands for may depend on where the program is."""
    program: Program = draw(st.runner())
    word = draw(st.integers(0, (1 << 55) - 1)) << 8 | draw(st.sampled_from(kinds(world)[kind]))
    return Told(world.programs.decode(word, program.machine, program.power.style), word)


class Program(RuleBasedStateMachine):
    """A program on a hypervisor, and what is claimed of it; `machine_of` adds the steps."""

    subject: Guarded
    world: World

    power: Power
    machine: Machine
    hypervisor: Any
    done: list[int]
    failed = False

    @initialize(power=powers())
    def power_on(self, power: Power) -> None:
        """Begin a program."""
        self.power, self.done = power, []
        self.machine, self.hypervisor = Machine(power.plan), self.subject.vmm(power.plan)
        view = self.hypervisor.view
        self.hypervisor.watch(
            lambda frame: shadow.freed(view(), frame),
            lambda guest, root: shadow.synced(view(), guest, root),
        )

    def make(self, told: Told) -> None:
        """Make a step, and judge it."""
        self.done.append(told.word)
        with self._judged(self.world.tables):
            seen = self.hypervisor.do(told.step)
            self.machine.check(told.step, seen, self.hypervisor.word)
            for violation in shadow.audit(self.hypervisor.view()):
                raise violation

    def teardown(self) -> None:
        """In the end each guest's memory is what its own steps made of it."""
        if self.failed or not hasattr(self, "done"):
            return
        with self._judged(self.world.memory):
            for number, guest in enumerate(self.machine.guests):
                for word, value in guest.map.backing.items():
                    for address in guest.map.addresses(word):
                        there = self.hypervisor.word(number, address)
                        assert there == value, f"guest {number} has {there:#x} at {address:#x}"

    @contextmanager
    def _judged(self, claim: Callable[..., None]) -> Iterator[None]:
        """If what is done here fails, note the program so far as a Case of a claim."""
        try:
            yield
        except (AssertionError, SubjectRaised) as error:
            self.failed = True
            why = str(error).splitlines()[0]
            draws = [*self.power.draws, *self.world.before, ("steps", len(self.done))]
            draws += [(f"step {number}", word) for number, word in enumerate(self.done)]
            case = make_case(claim.__name__, self.subject.name, ENGINE, why, draws)
            note(f"{why}\nas a Case: {msgspec.json.encode(case).decode()}")
            if isinstance(error, SubjectRaised):
                raise AssertionError(f"the subject raised {error}") from error
            raise


def machine_of(subject: str | Guarded, world: World = PLAIN) -> type[Program]:
    """The state machine of a subject (its name, as on the command line) that has a hypervisor.

    `world` is what programs are about: `SHARING` also merges pages and makes them huge.

    Raises `BadInput`.
    """
    guarded = load_subject(subject) if isinstance(subject, str) else subject
    if VMM not in guarded.capabilities.observes:
        raise BadInput(f"{guarded.name} has no hypervisor: it does not observe `{VMM}`")
    rules = {kind: rule(step=steps_of(kind, world))(_step(kind)) for kind in kinds(world)}
    own = {"subject": guarded, "world": world}
    made: type[Program] = type("Program", (Program,), {**own, **rules})
    return made


def _step(kind: str) -> Callable[[Program, Told], None]:
    """The function of a rule: Hypothesis tells rules apart by it, and prints its name."""

    def make(self: Program, step: Told) -> None:
        self.make(step)

    make.__name__ = kind
    return make
