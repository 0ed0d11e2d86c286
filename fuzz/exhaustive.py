"""The exhaustive engine: every case of a small scope, depth first.

Each draw takes every representative of its domain (`Domain.scope`), each choice every option, so
that "held" means that all of them were run. A scope too large for the budget is undecided, never
passed over. `Nondet.seen` lets an invariant over machine states cut what was explored before, and
`Nondet.kept` lets a run go on from where an earlier one was, without the steps that led there.
"""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

from vapama.fuzz.random_engine import Failed as FailedRun
from vapama.fuzz.random_engine import conclude
from vapama.runs import (
    Concrete,
    DrawName,
    Guarded,
    KnownDeparture,
    attempt,
    hang_guard,
    recorded,
)
from vapama.spec.domains import Domain
from vapama.spec.nondet import Cloned, Going, Invariant, Reject
from vapama.verdict import HELD, UNDECIDED, Verdict

ENGINE = "exhaustive"
Progress = Callable[[int], None]


class Kept(NamedTuple):
    """Where a run was after so many choices, and what it had drawn."""

    choices: int
    trail: list[tuple[Any, Any]]
    going: Any


class Enumeration(Concrete):
    """Draws that follow a prefix of choices and then always take the first; see `advance`."""

    def __init__(
        self, narrow: Mapping[str, Domain] | None = None, width: int | None = None
    ) -> None:
        super().__init__(narrow)
        self.width = width
        self.choices: list[tuple[int, int]] = []
        """Index taken and number of options, for each choice of the current run."""
        self.at = 0
        self.states: dict[Hashable, int] = {}
        """The states met so far, each with the most steps that were left there."""
        self.checked: set[Hashable] = set()
        """What `first` was asked of."""
        self.stack: list[Kept] = []
        """Where the current run was, and runs that begin with the same choices go on from."""

    def draw(self, name: DrawName, domain: Domain) -> int:
        """One of the domain's representatives."""
        options = domain.representatives(self.width)
        return options[self._next(len(options))]

    def choose(self, name: str, count: int) -> int:
        """One of the options."""
        return self._next(count)

    def _next(self, count: int) -> int:
        if self.at == len(self.choices):
            self.choices.append((0, count))
        taken, options = self.choices[self.at]
        if options != count:
            raise AssertionError(
                "the invariant draws otherwise on a re-run: it has state of its own"
            )
        self.at += 1
        return taken

    def seen(self, state: Hashable, left: int = 0) -> bool:
        """End the run if the state was met before, past the choices that led there first, with as
        many steps left.
        """
        if self.at < len(self.choices):
            return False
        state = state() if callable(state) else state
        before = self.states.get(state)
        if before is not None and left <= before:
            raise Reject
        self.states[state] = left
        return before is None

    def first(self, state: Hashable) -> bool:
        """Whether the state was not met before."""
        known = len(self.checked)
        self.checked.add(state() if callable(state) else state)
        return len(self.checked) > known

    def begun(self, begin: Callable[[], Going]) -> Going:
        """A clone of what was kept last, with the choices that led there; what is kept goes with
        the last of the options there.
        """
        if not self.stack:
            return begin()
        choices, trail, going = self.stack[-1]
        self.at, self.trail = choices, trail.copy()
        taken, count = self.choices[choices]
        if choices == len(self.choices) - 1 and taken == count - 1:
            self.stack.pop()
            return going  # type: ignore[no-any-return]
        return going.clone()  # type: ignore[no-any-return]

    def kept(self, going: Cloned) -> bool:
        """Keep a clone, past the choices that led here first."""
        if self.at < len(self.choices):
            return False
        self.stack.append(Kept(self.at, self.trail.copy(), going.clone()))
        return True

    def advance(self) -> bool:
        """Go to the next run: the last choice with an option left takes it. False after the end."""
        while self.choices:
            taken, count = self.choices.pop()
            if self.stack and self.stack[-1].choices > len(self.choices):
                self.stack.pop()
            if taken + 1 < count:
                self.choices.append((taken + 1, count))
                return True
        return False

    def restart(self) -> None:
        """Begin a run anew on the current choices."""
        self.at = 0
        self.trail.clear()


class Scripted(Enumeration):
    """An enumeration that follows a Case: each domain's only representative is the Case's value."""

    def __init__(
        self, values: Mapping[str, int], narrow: Mapping[str, Domain] | None = None
    ) -> None:
        super().__init__(narrow)
        self.values = values

    def draw(self, name: DrawName, domain: Domain) -> int:
        """The Case's value, as the only choice."""
        value = recorded(self.values, name, domain)
        return (value,)[self._next(1)]

    def choose(self, name: str, count: int) -> int:
        """The Case's index."""
        index = self.values.get(name, 0)
        if index >= count:
            raise Reject
        return index


def run(
    invariant: Invariant,
    subject: Guarded,
    width: int | None = None,
    most_runs: int = 10_000_000,
    hang_seconds: float = 10.0,
    progress: Progress = lambda executions: None,
) -> Verdict:
    """Run every case of the scope; undecided if there are more than `most_runs`.

    The scope takes the first `width` representatives of each domain, all of them for None.
    """
    start = time.monotonic()
    nondet = Enumeration(subject.capabilities.narrow, width)
    runs, rejected, complete = 0, 0, False
    known: Counter[str] = Counter()
    failed: FailedRun | None = None
    with hang_guard(hang_seconds) as alive:
        while runs < most_runs and failed is None and not complete:
            alive()
            nondet.restart()
            runs += 1
            try:
                failure = attempt(invariant, nondet, subject)
                if failure is not None:
                    failed = failure, nondet.draws()
            except Reject:
                rejected += 1
            except KnownDeparture as departure:
                known[str(departure)] += 1
            complete = not nondet.advance()
            if runs & 255 == 0:
                progress(runs)
    verdict = Verdict(
        invariant=invariant.name,
        engine=ENGINE,
        subject=subject.name,
        status=HELD,
        seconds=time.monotonic() - start,
        executions=runs,
        known=dict(known),
        states=len(nondet.states),
        detail=f"all {runs:,} cases of width {width}"
        + (f", {len(nondet.states):,} states" if nondet.states else ""),
    )
    conclude(verdict, invariant, subject, nondet.reached, runs - rejected, failed, hang_seconds)
    if failed is None and not complete:
        verdict.status = UNDECIDED
        verdict.why = f"more than {most_runs:,} cases: give a larger --budget"
    return verdict
