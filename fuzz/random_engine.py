"""The random engine: as many runs as the time allows, drawn by a pseudo-random generator.

The fastest smoke test there is, and the yardstick for the fuzzer, whose decoder it shares.
"""

import time
from collections import Counter
from collections.abc import Callable
from random import Random

from vapama.case import make_case
from vapama.fuzz.decoded import RandomDraws
from vapama.runs import Failure, Guarded, KnownDeparture, attempt, hang_guard, shrink
from vapama.spec.nondet import Invariant, Reject
from vapama.verdict import COUNTEREXAMPLE, HELD, UNDECIDED, Verdict

ENGINE = "random"
BATCH = 32
"""Runs between two looks at the clock: of the slowest programs these take a second."""
PATIENCE = 20
Progress = Callable[[int], None]
Failed = tuple[Failure, list[tuple[str, int]]]
"""A failure, and the draws of its run."""


def run(
    invariant: Invariant,
    subject: Guarded,
    seconds: float,
    seed: int | None = 0,
    hang_seconds: float = 10.0,
    progress: Progress = lambda executions: None,
    patience: int = PATIENCE,
) -> Verdict:
    """Run the invariant for about `seconds`; the same seed draws the same runs.

    While the runs have not reached all that the invariant is to reach it goes on, up to
    `patience` times as long: on a slow machine few runs fit into a short time.
    """
    search = Search(invariant, subject, seed)
    start = time.monotonic()
    with hang_guard(hang_seconds) as alive:
        while search.failed is None and search.wants_more(
            time.monotonic() - start, seconds, patience
        ):
            search.batch(BATCH, alive)
            progress(search.executions)
    spent = time.monotonic() - start
    return search.verdict(ENGINE, spent, hang_seconds)


class Search:
    """Random runs of one invariant, in batches, until one fails."""

    def __init__(self, invariant: Invariant, subject: Guarded, seed: int | None) -> None:
        self.invariant, self.subject = invariant, subject
        self.nondet = RandomDraws(Random(seed), subject.capabilities.narrow)
        self.executions = 0
        self.rejected = 0
        self.known: Counter[str] = Counter()
        self.failed: Failed | None = None

    def wants_more(self, spent: float, seconds: float, patience: int = PATIENCE) -> bool:
        """Whether to go on after `spent` of `seconds`."""
        if spent < seconds:
            return True
        complete = self.nondet.reached.issuperset(self.subject.reachable(self.invariant))
        return not complete and spent < patience * seconds

    def batch(self, count: int, alive: Callable[[], None] = lambda: None) -> None:
        """So many runs, or fewer if one fails. `alive` is called before each."""
        nondet, trail = self.nondet, self.nondet.trail
        for _ in range(count):
            alive()
            trail.clear()
            self.executions += 1
            try:
                failure = attempt(self.invariant, nondet, self.subject)
            except Reject:
                self.rejected += 1
            except KnownDeparture as departure:
                self.known[str(departure)] += 1
            else:
                if failure is not None:
                    self.failed = failure, nondet.draws()
                    return

    def verdict(self, engine: str, seconds: float, hang_seconds: float = 10.0) -> Verdict:
        """What the runs so far say; a failure is shrunk first."""
        verdict = Verdict(
            invariant=self.invariant.name,
            engine=engine,
            subject=self.subject.name,
            status=HELD,
            seconds=seconds,
            executions=self.executions,
            known=dict(self.known),
            detail=f"{self.executions:,} runs, {self.executions / max(seconds, 1e-9):,.0f}/s",
        )
        return conclude(
            verdict,
            self.invariant,
            self.subject,
            self.nondet.reached,
            self.executions - self.rejected,
            self.failed,
            hang_seconds,
        )


def conclude(
    verdict: Verdict,
    invariant: Invariant,
    subject: Guarded,
    reached: set[str],
    met: int,
    failed: Failed | None,
    hang_seconds: float = 10.0,
) -> Verdict:
    """A verdict completed by what happened: the failure (and its draws), shrunk, if there was
    one; undecided if the runs did not reach all that the invariant is to reach, or none of them met
    its assumptions (`met` is how many did).
    """
    if failed is not None:
        failure, draws = failed
        verdict.status, verdict.why = COUNTEREXAMPLE, failure.message
        if failure.hung:
            # Each try to shrink would hang as long again.
            verdict.case = make_case(
                invariant.name, subject.name, verdict.engine, failure.message, draws
            )
            return verdict
        verdict.case = shrink(invariant, subject, draws, verdict.engine, hang_seconds=hang_seconds)
        if verdict.case is not None:
            verdict.why = verdict.case.failure  # the shrunk run may say it otherwise
        else:
            verdict.status = UNDECIDED
            verdict.why = f"failed once and not when replayed: {verdict.why}"
        return verdict
    if not met:
        verdict.status, verdict.why = UNDECIDED, "no run met its assumptions"
    missing = [label for label in subject.reachable(invariant) if label not in reached]
    if missing:
        verdict.status, verdict.why = UNDECIDED, f"never reached: {', '.join(missing)}"
    return verdict
