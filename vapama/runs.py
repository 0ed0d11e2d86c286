"""Concrete runs of an invariant: draws of ints, guarded subjects, replay and shrinking of Cases.

Shared by all engines: those that search by concrete runs, and the symbolic one, which replays
its models here before it reports them.
"""

import linecache
import re
import signal
import time
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeVar, get_args

from vapama.case import Case, make_case
from vapama.spec import coherence, domains, nested, second_stage
from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import Cpu
from vapama.spec.domains import Domain, narrowed
from vapama.spec.memory import Memory, Sparse, Watched
from vapama.spec.nondet import Invariant, Nondet, Reject
from vapama.spec.outcomes import Outcome
from vapama.spec.paging import translate
from vapama.spec.stage import Stage
from vapama.spec.subject import TRANSLATE, Capabilities, NotCovered, agree

T = TypeVar("T")
DrawName = str | tuple[str, int]


class OutsideRead(AssertionError):
    """A walk read an address that memory does not hold, or an unaligned one."""


NOT_NARROWED: Mapping[str, Domain] = {}


class LazyMemory(dict[int, int]):
    """A memory whose entries, by address, are drawn when a walk first reads them."""

    __slots__ = ("domain", "entry", "limit", "name")

    def __init__(self, nondet: "Concrete", name: str, limit: int, domain: Domain) -> None:
        self.entry, self.name, self.limit, self.domain = nondet.entry, name, limit, domain

    load = dict.__getitem__

    def __missing__(self, address: int) -> int:
        """The entry at `address`, from now on. Raises `OutsideRead`."""
        if address & 7 or not 0 <= address < self.limit:
            raise OutsideRead(f"a load at {address:#x}, outside the {self.limit:#x} bytes")
        value = self[address] = self.entry(self.name, address, self.domain)
        return value


class Concrete(Nondet):
    """Draws of ints, recorded in order in `trail`."""

    def __init__(self, narrow: Mapping[str, Domain] | None = None) -> None:
        self.narrow = narrow or NOT_NARROWED
        self.trail: list[tuple[Any, Any]] = []
        """Names and values as they were drawn; of several at once a tuple of each."""
        self.reached: set[str] = set()

    def draw(self, name: DrawName, domain: Domain) -> int:
        """A value of the domain: what makes one engine differ from another."""
        raise NotImplementedError(f"{type(self).__name__} must say how it draws")

    def choose(self, name: str, count: int) -> int:
        """An index below `count`."""
        return self.draw(name, Domain(among=tuple(range(count))))

    def word(self, name: str, domain: Domain = domains.ANY) -> int:
        """A drawn word."""
        value = self.draw(name, narrowed(domain, self.narrow.get(name)))
        self.trail.append((name, value))
        return value

    def entry(self, memory: str, address: int, domain: Domain) -> int:
        """A drawn entry of a memory."""
        name = (memory, address)
        value = self.draw(name, domain)
        self.trail.append((name, value))
        return value

    def one_of(self, name: str, options: Sequence[T]) -> T:
        """A drawn option."""
        index = self.choose(name, len(options))
        self.trail.append((name, index))
        return options[index]

    def memory(
        self,
        name: str,
        given: Sequence[tuple[int, int]] = (),
        entries: Domain = domains.ENTRY,
    ) -> Memory:
        """A memory drawn entry by entry."""
        (limit,) = self.words(_limit_draw(name))
        memory = LazyMemory(self, name, limit, entries)
        for address, value in given:
            self.assume(address < memory.limit)
            memory[address] = value
        return memory

    def assume(self, condition: bool) -> None:
        """Reject the run if the condition does not hold."""
        if not condition:
            raise Reject

    def reach(self, label: str) -> None:
        """Remember the label."""
        self.reached.add(label)

    def seen(self, state: Hashable, left: int = 0) -> bool:
        """Goes on, whatever the state."""
        return True

    def draws(self) -> list[tuple[str, int]]:
        """The trail with its names spelled out, as a Case holds it."""
        spelled_out: list[tuple[str, int]] = []
        for name, value in self.trail:
            if isinstance(value, tuple):
                spelled_out += zip(name, value, strict=True)
            else:
                spelled_out.append((spelled(name), value))
        return spelled_out


@cache
def _limit_draw(memory: str) -> tuple[tuple[str, Domain]]:
    """The draw of a memory's size, as an object that is always the same."""
    return ((f"{memory}.limit", domains.LIMIT),)


class Replay(Concrete):
    """The draws of a Case. What it does not name is the simplest value of its domain."""

    def __init__(
        self, values: Mapping[str, int], narrow: Mapping[str, Domain] | None = None
    ) -> None:
        super().__init__(narrow)
        self.values = values

    def draw(self, name: DrawName, domain: Domain) -> int:
        """The recorded value. Raises `Reject` if it is not one that this draw can have."""
        return recorded(self.values, name, domain)


def spelled(name: DrawName) -> str:
    """A draw's name as Cases spell it: an entry of a memory is `memory[address]`."""
    return name if isinstance(name, str) else f"{name[0]}[{name[1]:#x}]"


def recorded(values: Mapping[str, int], name: DrawName, domain: Domain) -> int:
    """The value of a draw in a Case; the simplest of its domain (0 for an entry) if it has none.

    Raises `Reject` if the value is not in the domain.
    """
    fallback = 0 if isinstance(name, tuple) else domain.representatives()[0]
    value = values.get(spelled(name), fallback)
    if not domain.holds(value):
        raise Reject
    return value


OUTCOMES = frozenset(get_args(Outcome))
Reference = Callable[..., Outcome]


class SubjectRaised(BaseException):
    """The subject itself raised: a failure of the subject, whatever the invariant claims."""


class SubjectHung(BaseException):
    """The subject did not come back in time."""


class Guarded:
    """A subject as the engines hold it.

    Whatever is called on it is guarded (see `GuardedCall`): its own exceptions are told from the
    invariant's. It gives memory beforehand to a subject that needs it so, and keeps the calls of
    the run for the classification of known departures.
    """

    def __init__(self, name: str, subject: Any) -> None:
        self.name, self.subject = name, subject
        self.capabilities: Capabilities = subject.capabilities
        self._translate: Any = getattr(subject, "translate", None)
        self._preload = self.capabilities.preload
        self._keep = hasattr(subject, "departure")
        self.calls: list[tuple[Reference, tuple[Any, Any, Any], Outcome]] = []
        """The reference of each call, what was asked, and the subject's outcome."""

    def lacks(self, invariant: Invariant) -> frozenset[str]:
        """What the invariant needs and the subject does not observe."""
        own = {TRANSLATE} if self._translate is not None else set()
        return invariant.needs - self.capabilities.observes - own

    def reachable(self, invariant: Invariant) -> tuple[str, ...]:
        """What runs of the invariant have to reach on this subject."""
        unseen = self.capabilities.unseen
        return tuple(label for label in invariant.reaches if label not in unseen)

    def __getattr__(self, name: str) -> Any:
        """A faculty of the subject, guarded: what `needs` of an invariant asks for."""
        if name.startswith("_"):
            raise AttributeError(name)
        faculty = getattr(self.subject, name)
        if callable(faculty):
            faculty = self.__dict__[name] = GuardedCall(faculty)
        return faculty

    def coherence(self) -> types.ModuleType:
        """The model of shadow pages and flushes that a hypervisor follows: the specification's, or
        for a seeded mistake in it, the copy that has the mistake.
        """
        model: types.ModuleType = getattr(self.subject, "model", coherence)
        return model

    def translate(self, cpu: Cpu, memory: Memory, access: Access) -> Outcome:
        """The subject's outcome. Raises `Reject` for a case that it does not cover."""
        if self._preload:
            memory = preloaded(cpu, memory, access)
        try:
            outcome: Outcome = self._translate(cpu, memory, access)
        except (AssertionError, MemoryError):
            raise
        except NotCovered:
            raise Reject from None
        except (Exception, SystemExit) as error:
            raise SubjectRaised(_in_one_line(error)) from error
        if type(outcome) not in OUTCOMES:
            raise SubjectRaised(f"nothing, but returned {outcome!r}, which is not an outcome"[:200])
        if self._keep:
            self.calls.append((translate, (cpu, memory, access), outcome))
        return outcome

    def translate_many(
        self, cpu: Cpu, memory: Memory, addresses: Sequence[int], access: Access
    ) -> list[Outcome]:
        """The subject's outcomes for several addresses."""
        if self.capabilities.preload:
            touched = [preloaded(cpu, memory, access._replace(address=a)) for a in addresses]
            entries = {a: v for one in touched for a, v in one.touched.items()}
            memory = Sparse(entries, memory.limit)
        many = GuardedCall(self.subject.translate_many)
        outcomes: list[Outcome] = many(cpu, memory, addresses, access)
        return outcomes

    def second_stage(self, stage: Stage, memory: Memory, access: GuestPhysicalAccess) -> Outcome:
        """The subject's outcome for a guest-physical address."""
        if self._preload:
            memory = second_stage_preloaded(stage, memory, [access])
        outcome: Outcome = GuardedCall(self.subject.second_stage)(stage, memory, access)
        if type(outcome) not in OUTCOMES:
            raise SubjectRaised(f"nothing, but returned {outcome!r}, which is not an outcome"[:200])
        if self._keep:
            self.calls.append((second_stage.translate, (stage, memory, access), outcome))
        return outcome

    def second_stage_many(
        self, stage: Stage, memory: Memory, gpas: Sequence[int], access: GuestPhysicalAccess
    ) -> list[Outcome]:
        """The subject's outcomes for several guest-physical addresses."""
        if self._preload:
            accesses = [access._replace(address=gpa) for gpa in gpas]
            memory = second_stage_preloaded(stage, memory, accesses)
        many = GuardedCall(self.subject.second_stage_many)
        outcomes: list[Outcome] = many(stage, memory, gpas, access)
        return outcomes

    def translate_nested(self, cpu: Cpu, stage: Stage, memory: Memory, access: Access) -> Outcome:
        """The subject's outcome for a guest's access through both stages."""
        if self._preload:
            memory = nested_preloaded(cpu, stage, memory, [access])
        both = GuardedCall(self.subject.translate_nested)
        outcome: Outcome = both(cpu, stage, memory, access)
        if type(outcome) not in OUTCOMES:
            raise SubjectRaised(f"nothing, but returned {outcome!r}, which is not an outcome"[:200])
        return outcome

    def translate_nested_many(
        self, cpu: Cpu, stage: Stage, memory: Memory, addresses: Sequence[int], access: Access
    ) -> list[Outcome]:
        """The subject's outcomes for several accesses through both stages."""
        if self._preload:
            accesses = [access._replace(address=address) for address in addresses]
            memory = nested_preloaded(cpu, stage, memory, accesses)
        many = GuardedCall(self.subject.translate_nested_many)
        outcomes: list[Outcome] = many(cpu, stage, memory, addresses, access)
        return outcomes

    def departure(self) -> str | None:
        """The known departure, by name, that a call of this run shows; None if there is none."""
        for reference, asked, observed in self.calls:
            expected = reference(*asked)
            if not agree(expected, observed, asked[1], self.capabilities):
                name: str | None = self.subject.departure(*asked, expected, observed)
                if name is not None:
                    return name
        return None

    def departure_of_program(self) -> str | None:
        """The known departure that the last program shows, of a subject that can tell."""
        shown = getattr(self.subject, "departure_of_program", None)
        name: str | None = shown() if shown is not None else None
        return name


class GuardedCall:
    """A function of a subject's behind a guard.

    What it raises becomes `SubjectRaised`, `NotCovered` becomes `Reject`; an assertion is taken for
    the invariant's, as memory may raise one (see `OutsideRead`). A stateful part of the subject
    that it returns is guarded too (see `GuardedPart`); words, outcomes and the like are not.
    """

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Its result, guarded if it is a part with state of its own."""
        try:
            result = self.function(*args, **kwargs)
        except (AssertionError, MemoryError):
            raise
        except NotCovered:
            raise Reject from None
        except (Exception, SystemExit) as error:
            raise SubjectRaised(_in_one_line(error)) from error
        return GuardedPart(result) if getattr(result, "stateful", False) is True else result


class GuardedPart:
    """A part of a subject that has state of its own (a TLB, a VMM), with guarded methods.

    A subject's class says so by a class attribute ``stateful = True``. Attributes that are no
    methods are read as they are.
    """

    def __init__(self, part: Any) -> None:
        self.part = part

    def __getattr__(self, name: str) -> Any:
        """An attribute of the part; a method is guarded, and kept for the next call."""
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self.part, name)
        if callable(value):
            value = self.__dict__[name] = GuardedCall(value)
        return value


def preloaded(cpu: Cpu, memory: Memory, access: Access) -> Sparse:
    """The entries of `memory` that a walk reads, read (and so drawn) by the reference."""
    watched = Watched(memory)
    translate(cpu, watched, access)
    return Sparse({a: memory.load(a) for a in watched.loads}, memory.limit)


def second_stage_preloaded(
    stage: Stage, memory: Memory, accesses: Sequence[GuestPhysicalAccess]
) -> Sparse:
    """The entries that a second stage reads for these accesses, read (and so drawn) by it."""
    watched = Watched(memory)
    for access in accesses:
        second_stage.translate(stage, watched, access)
    return Sparse({a: memory.load(a) for a in watched.loads}, memory.limit)


def nested_preloaded(cpu: Cpu, stage: Stage, memory: Memory, accesses: Sequence[Access]) -> Sparse:
    """The entries that both stages read for a guest's accesses, read (and so drawn) by them."""
    watched = Watched(memory)
    for access in accesses:
        nested.translate(cpu, stage, watched, access)
    return Sparse({a: memory.load(a) for a in watched.loads}, memory.limit)


def _in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class Failure(NamedTuple):
    """Why a run failed, in a line; `hung` if it was the subject that did not come back."""

    message: str
    hung: bool = False


def attempt(invariant: Invariant, nondet: Concrete, subject: Guarded) -> Failure | None:
    """Run the invariant once. Raises `Reject`, `KnownDeparture`."""
    if subject._keep:
        subject.calls.clear()
    try:
        invariant.claim(nondet, subject)
    except AssertionError as error:
        name = subject.departure() if subject._keep else None
        if name is None:
            name = subject.departure_of_program()
        if name is not None:
            raise KnownDeparture(name) from None
        return Failure(_assertion(error))
    except SubjectRaised as error:
        name = subject.departure_of_program()
        if name is not None:
            raise KnownDeparture(name) from None
        return Failure(f"the subject raised {error}")
    except SubjectHung as error:
        return Failure(str(error), hung=True)
    return None


class KnownDeparture(BaseException):
    """The run shows a departure of the subject that is known by name."""


def _assertion(error: AssertionError) -> str:
    """What an assertion said: its message, or its source line."""
    if str(error):
        return f"{type(error).__name__}: {error}".splitlines()[0]
    trace: types.TracebackType | None = error.__traceback__
    line = ""
    while trace is not None:
        line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).strip()
        trace = trace.tb_next
    return line or "the claim does not hold"


@contextmanager
def hang_guard(seconds: float) -> Iterator[Callable[..., None]]:
    """Raise `SubjectHung` in this thread when `seconds` pass between calls of what it yields, or
    nearly so many: setting the clock costs more than most of what is called meanwhile.

    A call with `paused` true stops the clock until the next call.
    """
    last = 0.0

    def alarm(signum: int, frame: object) -> None:
        raise SubjectHung(f"the subject hung: no result within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, alarm)

    def restart(paused: bool = False) -> None:
        nonlocal last
        now = time.monotonic()
        if paused or now - last > seconds / 20:
            signal.setitimer(signal.ITIMER_REAL, 0 if paused else seconds)
            last = 0.0 if paused else now

    restart()
    try:
        yield restart
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def replay(invariant: Invariant, case: Case, subject: Guarded) -> tuple[Failure | None, Replay]:
    """Run a Case. Raises `Reject` if it breaks an assumption, `KnownDeparture`."""
    nondet = Replay(case.values(), subject.capabilities.narrow)
    return attempt(invariant, nondet, subject), nondet


SHRINKS_ON_A_MACHINE = 400
"""How many runs shrinking may take on a subject whose failures are confirmed: each is slow."""


def shrink(
    invariant: Invariant,
    subject: Guarded,
    draws: list[tuple[str, int]],
    engine: str,
    most_runs: int = 20_000,
    hang_seconds: float = 10.0,
) -> Case | None:
    """The simplest failing Case that can be reached from `draws`: steps of a program are left out
    (see `_shorter`), then draws and their bits are.

    None if the draws do not fail when replayed.
    """
    runs = 0
    confirmations = subject.capabilities.confirmations
    if confirmations:
        most_runs = min(most_runs, SHRINKS_ON_A_MACHINE)

    def fails(values: dict[str, int]) -> tuple[Failure, Replay] | None:
        nonlocal runs
        runs += 1
        alive()
        nondet = Replay(values, subject.capabilities.narrow)
        try:
            failure = attempt(invariant, nondet, subject)
        except (Reject, KnownDeparture):
            return None
        return None if failure is None or failure.hung else (failure, nondet)

    def draws_now() -> list[tuple[str, int]]:
        return best[1].draws() if best is not None else []

    with hang_guard(hang_seconds) as alive:
        best = fails(dict(draws))
        improved = best is not None
        while best is not None and improved and runs < most_runs:
            improved = False
            for fewer in _shorter(draws_now):
                found = fails(fewer)
                if found is not None and _size(found[1]) < _size(best[1]):
                    best, improved = found, True
            for name, value in best[1].draws():
                for simpler in _simpler(value):
                    found = fails({**dict(best[1].draws()), name: simpler})
                    if found is not None and _size(found[1]) < _size(best[1]):
                        best, improved = found, True
                        break
        if best is not None:
            again = [fails(dict(best[1].draws())) for _ in range(confirmations)]
            best = None if None in again else best
    if best is None:
        return None
    failure, nondet = best
    return make_case(invariant.name, subject.name, engine, failure.message, nondet.draws())


STEP = re.compile(r"step \d+")
"""What the steps of a program are drawn as: `step 0`, `step 1`..."""
COUNTS = ("steps", "length")
"""What their number is drawn as."""


def _shorter(draws: Callable[[], list[tuple[str, int]]]) -> Iterator[dict[str, int]]:
    """Shorter programs to try: `draws`, which are those of the best so far, without some steps in a
    row, half of them at first and one in the end; the steps after them move up.
    """
    chunk = len(_steps(draws()))
    while chunk:
        start = 0
        while start < len(_steps(draws())):
            before = draws()
            steps = _steps(before)
            kept = [value for name, value in steps[:start] + steps[start + chunk :]]
            fewer = {name: value for name, value in before if (name, value) not in steps}
            fewer |= {name: value for (name, _), value in zip(steps, kept, strict=False)}
            yield fewer | {name: len(kept) for name in COUNTS if name in fewer}
            if draws() == before:
                start += chunk
        chunk >>= 1


def _steps(draws: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """The draws that are steps of a program, in order."""
    return [(name, value) for name, value in draws if STEP.fullmatch(name)]


def _simpler(value: int) -> Iterator[int]:
    """Smaller values to try: 0, then without each of its bits, from the highest."""
    if value:
        yield 0
    for position in reversed(range(value.bit_length())):
        if value >> position & 1 and value != 1 << position:
            yield value & ~(1 << position)


def _size(run: Replay) -> tuple[int, int, int]:
    """How complex a run is: number of draws, bits set in them, sum of the values."""
    values = [value for _, value in run.draws()]
    return len(values), sum(value.bit_count() for value in values), sum(values)
