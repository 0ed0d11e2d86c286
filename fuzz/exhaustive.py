"""The exhaustive engine: every case of a small scope, depth first.

Each draw takes every representative of its domain (`Domain.scope`), each choice every option, so
that "held" means that all of them were run. A scope too large for the budget is undecided, never
passed over. `Nondet.seen` lets an invariant over machine states cut what was explored before.
"""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping

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
from vapama.spec.nondet import Invariant, Reject
from vapama.verdict import HELD, UNDECIDED, Verdict

ENGINE = "exhaustive"
Progress = Callable[[int], None]


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
        self.states: set[Hashable] = set()

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

    def seen(self, state: Hashable) -> bool:
        """End the run if the state was met before, past the choices that led there first."""
        if self.at < len(self.choices):
            return False
        state = state() if callable(state) else state
        if state in self.states:
            raise Reject
        self.states.add(state)
        return True

    def advance(self) -> bool:
        """Go to the next run: the last choice with an option left takes it. False after the end."""
        while self.choices:
            taken, count = self.choices.pop()
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
        detail=f"all {runs:,} cases of width {width}"
        + (f", {len(nondet.states)} states" if nondet.states else ""),
    )
    conclude(verdict, invariant, subject, nondet.reached, runs - rejected, failed, hang_seconds)
    if failed is None and not complete:
        verdict.status = UNDECIDED
        verdict.why = f"more than {most_runs:,} cases: give a larger --budget"
    return verdict
