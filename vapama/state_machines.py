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
from vapama.spec import programs, shadow
from vapama.spec.domains import Take
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
def powers(draw: Callable[[st.SearchStrategy[int]], int]) -> Power:
    """Any machine that programs run on."""
    nondet = Drawn(lambda: draw(WORDS))
    style, plan = vmm.drawn_plan(nondet)
    return Power(style, plan, tuple(nondet.draws()))


@cache
def kinds() -> dict[str, tuple[int, ...]]:
    """The kinds of steps that programs have, and the low bytes of words that may stand for them."""
    random, found = Random(0), dict[str, set[int]]()
    machine = Machine(programs.plan())
    for low in range(256):
        for _ in range(24):
            step = programs.decode(random.getrandbits(56) << 8 | low, machine)
            if not isinstance(step, Rest):
                found.setdefault(type(step).__name__.lower(), set()).add(low)
    return {kind: tuple(sorted(lows)) for kind, lows in found.items()}


@st.composite
def steps_of(draw: Callable[[st.SearchStrategy[Any]], Any], kind: str) -> Told:
    """A step of a kind; what a word stands for may depend on where the program is."""
    program: Program = draw(st.runner())
    word = draw(st.integers(0, (1 << 56) - 1)) << 8 | draw(st.sampled_from(kinds()[kind]))
    return Told(programs.decode(word, program.machine, program.power.style), word)


class Program(RuleBasedStateMachine):
    """A program on a hypervisor, and what is claimed of it; `machine_of` adds the steps."""

    subject: Guarded

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
        with self._judged(vmm.the_tables_satisfy_every_rule_after_every_step):
            seen = self.hypervisor.do(told.step)
            self.machine.check(told.step, seen, self.hypervisor.word)
            for violation in shadow.audit(self.hypervisor.view()):
                raise violation

    def teardown(self) -> None:
        """In the end each guest's memory is what its own steps made of it."""
        if self.failed or not hasattr(self, "done"):
            return
        with self._judged(vmm.no_guest_reaches_what_is_not_its_own):
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
            draws = [*self.power.draws, ("steps", len(self.done))]
            draws += [(f"step {number}", word) for number, word in enumerate(self.done)]
            case = make_case(claim.__name__, self.subject.name, ENGINE, why, draws)
            note(f"{why}\nas a Case: {msgspec.json.encode(case).decode()}")
            if isinstance(error, SubjectRaised):
                raise AssertionError(f"the subject raised {error}") from error
            raise


def machine_of(subject: str | Guarded) -> type[Program]:
    """The state machine of a subject (its name, as on the command line) that has a hypervisor.

    Raises `BadInput`.
    """
    guarded = load_subject(subject) if isinstance(subject, str) else subject
    if VMM not in guarded.capabilities.observes:
        raise BadInput(f"{guarded.name} has no hypervisor: it does not observe `{VMM}`")
    rules = {kind: rule(step=steps_of(kind))(_step(kind)) for kind in kinds()}
    made: type[Program] = type("Program", (Program,), {"subject": guarded, **rules})
    return made


def _step(kind: str) -> Callable[[Program, Told], None]:
    """The function of a rule: Hypothesis tells rules apart by it, and prints its name."""

    def make(self: Program, step: Told) -> None:
        self.make(step)

    make.__name__ = kind
    return make
