"""Lemmas: how a proof may rest on others, which are proved for themselves.

A proof of something large, such as the two-dimensional walk, need not look into a part of it, such
as the second stage, that was proved already. While it is explored, for the part

- each kernel is an uninterpreted function of all that it is given, words and memory: any function
  at all, so that whatever is proved holds of the real one among others;
- the reference returns any outcome.

Of both nothing is known but what the lemmas say. They are instantiated at each call of the
reference: each lemma's claim is run once more, its draws being the arguments of that call. What it
assumes is then to be shown, and what it asserts is assumed. So what a proof takes from a lemma is
what was proved, for there is no other text of it; and what is replaced is what the lemma compares,
for it is named by the lemma (`Invariant.equates`) and by the subject (`opaque`).

Memory is among the arguments, as an SMT array: after a flag was set in it, it is another.
"""

import dataclasses
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from types import ModuleType
from typing import Any

import z3

from vapama.proofs import completeness
from vapama.proofs.symbolic import (
    MUST,
    Explorer,
    Path,
    SymBool,
    SymMemory,
    SymWord,
    Unfaithful,
    made,
    once,
    refusal,
    running,
    word,
)
from vapama.spec import domains
from vapama.spec.domains import Domain
from vapama.spec.memory import Counted, Marked
from vapama.spec.nondet import ControlStates, Invariant, Nondet, Reject, draws_of
from vapama.spec.outcomes import Outcome
from vapama.spec.words import WORD

KINDS = typing.get_args(Outcome)
WORDS = z3.BitVecSort(64)
MEMORY = z3.ArraySort(WORDS, WORDS)
WRITTEN = z3.DeclareSort("written")
"""What a kernel writes into a store: the contents of a path, or a list of flags set. Of these it is
only known whether two are the same.
"""


C = typing.TypeVar("C", bound=type)


def refusing(why: str, names: str) -> Callable[[C], C]:
    """A class whose instances refuse these operations."""

    def add(to: C) -> C:
        for name in names.split():
            setattr(to, f"__{name}__", refusal(why))
        return to

    return add


@refusing(
    "what a kernel wrote is looked at, and a lemma stands in its place",
    "add radd sub rsub mul rmul and rand or ror xor rxor lshift rlshift rshift rrshift invert "
    "lt le gt ge eq ne bool index int hash len iter getitem format str repr",
)
class Written:
    """What an uninterpreted kernel wrote into a store. It can be handed on to other kernels."""

    __slots__ = ("term",)

    def __init__(self, term: z3.ExprRef) -> None:
        self.term = term


@refusing(
    "which flags are set is looked at one by one, and a lemma stands in their place",
    "len bool iter getitem contains reversed lt le gt ge",
)
class Segments:
    """A tuple of updates of which some parts are those that an uninterpreted kernel makes.

    Only that two are the same can be told: part by part, each known or the same unknown.
    """

    __slots__ = ("parts",)
    __hash__ = refusal("which flags are set is a key, which must be one value")

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __add__(self, other: Any) -> "Segments":
        return Segments(*self.parts, *_parts(other))

    def __radd__(self, other: Any) -> "Segments":
        return Segments(*_parts(other), *self.parts)

    def __eq__(self, other: object) -> Any:
        ours, theirs = self.parts, _parts(other)
        if len(ours) != len(theirs):
            raise Unfaithful("flags set in two ways are compared, and cannot be told apart")
        conditions = [_same_part(a, b) for a, b in zip(ours, theirs, strict=True)]
        if len(conditions) == 1:
            return conditions[0]
        # Two lists can be the same though their parts differ: so only a yes can be relied on.
        for condition in conditions:
            running().require(condition.term, "it cannot be told whether the same flags are set")
        return True

    def __ne__(self, other: object) -> Any:
        return not self == other


def _parts(updates: Any) -> tuple[Any, ...]:
    return updates.parts if type(updates) is Segments else tuple(updates)


def _same_part(a: Any, b: Any) -> SymBool:
    if type(a) is not type(b):
        raise Unfaithful("flags set in two ways are compared, and cannot be told apart")
    if isinstance(a, z3.ExprRef):
        return _same_term(a, b)
    return SymBool(z3.And(*(word(x).term == word(y).term for x, y in zip(a, b, strict=True))))


@once
def _same_term(a: z3.ExprRef, b: z3.ExprRef) -> SymBool:
    return SymBool(a == b)


def contents(memory: Any) -> z3.ArrayRef:
    """All that a memory holds, as an array. Raises `Unfaithful` for a memory it does not know."""
    if isinstance(memory, SymMemory):
        return memory.array
    if isinstance(memory, Marked):
        array = contents(memory.memory)
        for address, bits in memory.updates:
            array = _with_bits(array, word(address), word(bits))
        return array
    if isinstance(memory, Counted):
        return contents(memory.memory)
    raise Unfaithful(f"a lemma is used on a {type(memory).__name__}, whose contents are not known")


@once
def _with_bits(array: z3.ArrayRef, address: SymWord, bits: SymWord) -> z3.ArrayRef:
    at = address.term
    return z3.Store(array, at, z3.Select(array, at) | bits.term)


_simplified: dict[int, tuple[z3.ExprRef, z3.ExprRef]] = {}


def simplified(term: z3.ExprRef) -> z3.ExprRef:
    """The term simplified, once: both are kept, so that ids are not used again."""
    found = _simplified.get(term.get_id())
    if found is None:
        found = _simplified[term.get_id()] = term, z3.simplify(term)
    return found[1]


class Kernel:
    """An uninterpreted kernel: its results, and what it writes, are functions of what it is given.

    That is so of a kernel because it has nothing else to go by: it reads no path before it wrote
    it (in proofs of lemmas, reading one fails), and no state of its own.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        returns = typing.get_type_hints(function)["return"]
        self.results = len(typing.get_args(returns))
        self.is_word = returns is int

    def __call__(self, *arguments: Any) -> Any:
        """The kernel's results, or its result if it is one word, or None if it only sets flags."""
        terms: list[z3.ExprRef] = []
        paths: list[list[Any]] = []
        marks: list[Any] = []
        memories: list[Any] = []
        for argument in arguments:
            if isinstance(argument, list):
                paths.append(argument)
            elif hasattr(argument, "updates"):
                marks.append(argument)
            elif hasattr(argument, "memory"):
                memories.append(argument.memory)
                terms.append(contents(argument.memory))
            else:
                # Simplified, that what is the same may look the same, and need no solver.
                terms.append(simplified(word(argument).term))
        if self.is_word and not (paths or marks or memories):
            return made(self._apply("word", WORDS, terms))
        if not self.results:
            return self._procedure(terms, paths, marks)
        if marks or len(memories) != 1:
            raise Unfaithful(f"{self.name} is not a kernel that a lemma can stand for")
        for i, path in enumerate(paths):
            path[:] = [Written(self._apply(f"path{i}", WRITTEN, terms))] * len(path)
        if isinstance(memories[0], Counted):
            loads = made(self._apply("loads", WORDS, terms))
            memories[0].count = memories[0].count + _narrowed(loads)
        return tuple(made(self._apply(str(i), WORDS, terms)) for i in range(self.results))

    def _procedure(self, terms: list[z3.ExprRef], paths: list[list[Any]], marks: list[Any]) -> None:
        """A kernel without results: it only sets flags."""
        if self.is_word or len(marks) != 1:
            raise Unfaithful(f"{self.name} is not a kernel that a lemma can stand for")
        for path in paths:
            if type(path[0]) is not Written or any(part is not path[0] for part in path):
                raise Unfaithful(f"{self.name} is given a path that is not one kernel's")
            terms.append(path[0].term)
        marks[0].updates = marks[0].updates + Segments(self._apply("flags", WRITTEN, terms))

    def _apply(self, what: str, sort: z3.SortRef, terms: list[z3.ExprRef]) -> Any:
        # `once` tells operands apart by identity.
        return _application(sys.intern(f"{self.name}.{what}"), sort, *terms)


def _narrowed(count: SymWord) -> SymWord:
    """A count that this path is known to have below 8, by a lemma, as one of three bits: sums of
    such are far easier to decide.
    """
    explorer = running()
    few = any(explorer.known_truth((count <= most).term) for most in range(1, 8))
    return made(count.term & 7, 7) if few or explorer.always((count <= 7).term) else count


@once
def _application(name: str, sort: z3.SortRef, *terms: z3.ExprRef) -> z3.ExprRef:
    return z3.Function(name, *(term.sort() for term in terms), sort)(*terms)


@once
def _is_within(value: SymWord, domain: Domain) -> z3.BoolRef:
    if domain.among:
        return z3.Or(*(value.term == v for v in domain.among))
    others = value & (WORD ^ (domain.free | domain.fixed))
    return z3.And(word(others == 0).term == 1, (value & domain.fixed).term == domain.fixed)


class Instance(Nondet):
    """A `Nondet` for a lemma's claim that is run at a call: its draws are the call's arguments.

    That they are in the domains of the draws, and what the claim assumes, is to be shown.
    """

    def __init__(self, explorer: Explorer, lemma: str, arguments: tuple[Any, ...]) -> None:
        self.explorer, self.lemma, self.arguments = explorer, lemma, arguments
        self.shown: dict[str, Any] = {}
        """Arguments by the draws that were shown to give them."""
        self.values: dict[str, Any] = {}
        for argument in arguments:
            if not hasattr(argument, "load"):
                self.values |= draws_of(argument)

    def word(self, name: str, domain: Domain = domains.ANY) -> Any:
        """The argument's word. Raises `Unfaithful` if it may lie outside of the domain."""
        if name not in self.values:
            raise Unfaithful(f"the lemma {self.lemma} draws {name}, which a call does not have")
        value = self.values[name]
        self._in_domain(name, word(value), domain)
        return value

    def _in_domain(self, name: str, value: SymWord, domain: Domain) -> None:
        inside = _is_within(value, self.explorer.narrow.get(name, domain))
        self._show(inside, f"its {name} may be outside of the lemma's domain")

    def _show(self, condition: z3.BoolRef, otherwise: str) -> None:
        why = f"the lemma {self.lemma} is used where it says nothing: {otherwise}"
        self.explorer.require(condition, why)

    def one_of(self, name: str, options: Sequence[Any]) -> Any:
        """Refused: a call has no options."""
        raise Unfaithful(f"the lemma {self.lemma} draws {name}, which a call does not have")

    def memory(
        self,
        name: str,
        given: Sequence[tuple[Any, Any]] = (),
        entries: Domain = domains.ENTRY,
    ) -> Any:
        """The memory of the call."""
        if given:
            raise Unfaithful(f"the lemma {self.lemma} is about a memory with given entries")
        memory = next(a for a in self.arguments if hasattr(a, "load"))
        if "memory" not in self.shown:
            self._in_domain(f"{name}.limit", word(memory.limit), domains.LIMIT)
            self.shown["memory"] = memory
        return memory

    def assume(self, condition: Any) -> None:
        """To be shown."""
        truth = condition.term if type(condition) is SymBool else word(condition).term != 0
        self._show(truth, "its assumption may not hold")

    def reach(self, label: str) -> None:
        """Says nothing here."""

    def seen(self, state: Any, left: int = 0) -> bool:
        """Says nothing here."""
        return True

    def access(self, *states: ControlStates) -> Any:
        """The access of the call."""
        return self._drawn(Nondet.access, *states)

    def cpu(self, *states: ControlStates) -> Any:
        """The control state of the call."""
        return self._drawn(Nondet.cpu, *states)

    def walk(self, *states: ControlStates) -> Any:
        """The control state, the memory and the access of the call."""
        return self.cpu(*states), self.memory("guest"), self.access(*states)

    def guest_physical_access(self) -> Any:
        """The access of the call."""
        return self._drawn(Nondet.guest_physical_access)

    def ept(self) -> Any:
        """The second stage of the call."""
        return self._drawn(Nondet.ept)

    def npt(self) -> Any:
        """The second stage of the call."""
        return self._drawn(Nondet.npt)

    def _drawn(self, draw: Callable[..., Any], *states: ControlStates) -> Any:
        """The argument that the lemma draws so. It has to be one that can be drawn."""
        if len(states) > 1:
            raise Unfaithful(f"the lemma {self.lemma} draws of several kinds, which a call has not")
        name = draw.__name__
        if name in self.shown:
            return self.shown[name]
        drawn = draw(self, *states)
        given = next(a for a in self.arguments if type(a) is type(drawn))
        for ours, theirs in zip(drawn, given, strict=True):
            if ours is not theirs:
                self._show(
                    (word(ours) == word(theirs)).term, f"no draw gives this {type(drawn).__name__}"
                )
        self.shown[name] = given
        return given


class Call(typing.NamedTuple):
    """A call of the reference: with what, and the outcome that it was given."""

    arguments: tuple[Any, ...]
    outcome: Any


class Running:
    """A lemma's claim that is run on a call, of which the outcome is one of several."""

    def __init__(self, arguments: tuple[Any, ...], outcomes: list[Any], aside: Explorer) -> None:
        self.arguments, self.outcomes, self.aside = arguments, outcomes, aside
        self.outcome: Any = None

    def chosen(self) -> Any:
        """The outcome, in this run of the claim. Asked for late: what was shown before it is the
        same for all of them.
        """
        if self.outcome is None:
            several = len(self.outcomes) > 1
            self.outcome = self.outcomes[self.aside.choose(len(self.outcomes)) if several else 0]
        return self.outcome


class Met(typing.NamedTuple):
    """What came of a call of the reference: the outcome that it was given, what was decided for it,
    and what is known since.
    """

    outcome: Any
    decisions: list[tuple[str, list[z3.BoolRef], int]]
    learned: list[tuple[int, bool]]


class Lemmas:
    """The lemmas that one exploration rests on, at work."""

    def __init__(self, explorer: Explorer, subject: Any, lemmas: Sequence[Invariant]) -> None:
        self.explorer, self.subject, self.lemmas = explorer, subject, lemmas
        self.calls: list[Call] = []
        self.running: Running | None = None
        self.met: dict[tuple[int, int], Met] = {}
        """What came of calls of the reference, by the way that a run had taken when it came to one,
        and how many it had met: all that it did until then depends on the way alone.
        """

    def begin(self) -> None:
        """A run of the exploration begins."""
        self.calls, self.running = [], None

    def reference(self, equality: Invariant, *arguments: Any) -> Any:
        """In place of the reference: an outcome of which the lemmas say what it can be."""
        if self.running is not None:
            # A lemma's claim asks for it, which may know its own draws alone.
            if all(a is b for a, b in zip(arguments, self.running.arguments, strict=True)):
                return self.running.chosen()
            raise Unfaithful(f"{equality.name} asks for the reference at others than its draws")
        for call in self.calls:
            if all(_identical(a, b) for a, b in zip(arguments, call.arguments, strict=True)):
                return _again(call.outcome)
        assert equality.equates is not None
        ours = getattr(self.subject, equality.equates[1])(*arguments)
        explorer = self.explorer
        way = explorer.edge, len(self.calls)
        met = self.met.get(way)
        if met is None:
            before, known = len(explorer.asked), len(explorer.known)
            outcome = self._outcome(equality, arguments, ours)
            learned = list(explorer.known.items())[known:]
            met = self.met[way] = Met(outcome, explorer.asked[before:], learned)
        else:
            for decision in met.decisions:
                explorer.settled(*decision)
            explorer.known.update(met.learned)
        self.calls.append(Call(arguments, met.outcome))
        return _again(met.outcome)

    def _outcome(self, equality: Invariant, arguments: tuple[Any, ...], ours: Any) -> Any:
        """Any outcome that the lemmas allow for a call with these arguments, where the subject's is
        of this kind.
        """
        if type(ours) is SymWord:
            outcome: Any = made(z3.BitVec(f"word#{len(self.calls)}", 64))
        else:
            others = [self._arbitrary(kind) for kind in KINDS if kind is not type(ours)]
            # Outcomes of another kind than the subject's must be refuted by the lemma outright.
            if any(path.failure is None for path in self._paths(equality, arguments, others)):
                raise Unfaithful(f"{equality.name} does not settle the kind of an outcome")
            outcome = self._arbitrary(type(ours))
        for lemma in self._about(equality):
            self._instantiate(lemma, arguments, outcome)
        return self._simplified(outcome, ours)

    def _about(self, equality: Invariant) -> list[Invariant]:
        """The lemmas about what this one equates: those that do so too, and those that need it."""
        assert equality.equates is not None
        _, faculty = equality.equates
        return [
            lemma
            for lemma in self.lemmas
            if (lemma.equates == equality.equates if lemma.equates else faculty in lemma.needs)
        ]

    def _arbitrary(self, kind: type) -> Any:
        """An outcome of this kind of which nothing else is known."""
        number = len(self.calls)
        values: dict[str, Any] = {}
        for part in dataclasses.fields(kind):
            name = f"{kind.__name__}.{part.name}#{number}"
            if part.name in ("updates", "may_update"):
                values[part.name] = Segments(z3.Const(name, WRITTEN))
            else:
                values[part.name] = made(z3.BitVec(name, 64))
        return kind(**values)

    def _instantiate(self, lemma: Invariant, arguments: tuple[Any, ...], outcome: Any) -> None:
        """Run a lemma's claim on a call: the rest of the path is where its assertions hold."""
        paths = self._paths(lemma, arguments, [outcome])
        holding = [path for path in paths if path.failure is None]
        if not holding:
            raise Reject
        ways = [path.conditions() for path in holding]
        if all(ways):
            self.explorer.suppose(ways)

    def _paths(
        self, lemma: Invariant, arguments: tuple[Any, ...], outcomes: list[Any]
    ) -> list[Path]:
        """The paths of a lemma's claim on a call that has one of these outcomes. What is shown on
        them is shown from here on.
        """
        paths = self.explorer.aside(
            lambda aside: self._run(lemma, Running(arguments, outcomes, aside))
        )
        if any(path.decisions for path in paths):
            shown = completeness.explored(paths)
            self.explorer.settled(MUST, [shown, z3.Not(shown)], 0)
            # What is shown before anything is asked holds on all of these paths.
            first = takewhile(lambda decision: decision[0] == MUST, paths[0].decisions)
            for _, options, _ in first:
                self.explorer.learn(options[0])
        return paths

    def _run(self, lemma: Invariant, running: "Running") -> None:
        self.running = running
        try:
            lemma.claim(Instance(running.aside, lemma.name, running.arguments), self.subject)
        except Reject:
            raise Unfaithful(f"the lemma {lemma.name} is used where it says nothing") from None
        finally:
            self.running = None

    def _simplified(self, outcome: Any, ours: Any) -> Any:
        """The outcome with the subject's words where this path is known to make them equal."""
        if type(outcome) is SymWord:
            equal = outcome.term == ours.term, ours.term == outcome.term
            return ours if any(map(self.explorer.known_truth, equal)) else outcome
        for part in dataclasses.fields(outcome):
            arbitrary, value = getattr(outcome, part.name), getattr(ours, part.name)
            if type(arbitrary) is SymWord:
                if self.explorer.known_truth(arbitrary.term == word(value).term):
                    setattr(outcome, part.name, value)
            elif type(value) is Segments and self.explorer.known_truth(
                z3.And(*(a == b for a, b in zip(arbitrary.parts, value.parts, strict=True)))
            ):
                setattr(outcome, part.name, value)
        return outcome


def _again(outcome: Any) -> Any:
    """An outcome that nobody else has."""
    return outcome if type(outcome) is SymWord else dataclasses.replace(outcome)


def _identical(a: Any, b: Any) -> bool:
    """Whether two arguments are the same, seen without asking the solver."""
    if a is b:
        return True
    if type(a) is type(b) is SymWord:
        return bool(a.term.eq(b.term))
    if type(a) is not type(b) or not isinstance(a, tuple) or len(a) != len(b):
        return False
    return all(map(_identical, a, b))


@contextmanager
def resting_on(
    explorer: Explorer, subject: Any, lemmas: Sequence[Invariant]
) -> Iterator[Callable[[Callable[[], None]], Callable[[], None]]]:
    """While inside, what the lemmas are about is uninterpreted. Gives what makes a function that
    is to be explored begin each of its runs with no call made yet.

    Raises `Unfaithful` if the lemmas name nothing to be replaced.
    """
    runtime = Lemmas(explorer, subject, lemmas)
    places: list[tuple[ModuleType, str, Any]] = []
    for lemma in lemmas:
        if lemma.equates is None:
            continue
        reference, faculty = lemma.equates

        def instead(*arguments: Any, _lemma: Invariant = lemma) -> Any:
            return runtime.reference(_lemma, *arguments)

        places += [(*place, instead) for place in _places(reference)]
        kernels: dict[Any, Kernel] = {}
        for module, name in subject.subject.opaque(faculty):
            function = getattr(module, name)
            kernel = kernels.setdefault(function, Kernel(function))
            places.append((module, name, kernel))
    if lemmas and not places:
        raise Unfaithful("the lemmas that it rests on do not say what they are about")
    before = [(module, name, getattr(module, name)) for module, name, _ in places]

    def begun(function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            runtime.begin()
            function()

        return run

    try:
        for module, name, replacement in places:
            setattr(module, name, replacement)
        yield begun
    finally:
        for module, name, original in before:
            setattr(module, name, original)


def _places(reference: Callable[..., Any]) -> list[tuple[ModuleType, str]]:
    """Where the specification knows the function, and by what name."""
    return [
        (module, name)
        for title, module in list(sys.modules.items())
        if title.startswith("vapama.spec.")
        for name, value in list(vars(module).items())
        if value is reference
    ]
