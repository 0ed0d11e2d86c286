"""The random engine: as many runs as the time allows, drawn by a pseudo-random generator.

The fastest smoke test there is, and the yardstick for the fuzzer, whose decoder it shares.
"""

import time
from collections import Counter
from collections.abc import Callable
from random import Random

from vapama.fuzz.decoded import RandomDraws
from vapama.runs import Guarded, KnownDeparture, attempt, hang_guard, shrink
from vapama.spec.nondet import Invariant, Reject
from vapama.verdict import COUNTEREXAMPLE, HELD, UNDECIDED, Verdict

ENGINE = "random"
BATCH = 256
PATIENCE = 20
Progress = Callable[[int], None]


def run(
    invariant: Invariant,
    subject: Guarded,
    seconds: float,
    seed: int | None = 0,
    hang_seconds: float = 10.0,
    progress: Progress = lambda executions: None,
) -> Verdict:
    """Run the invariant for about `seconds`; the same seed draws the same runs.

    While the runs have not reached all that the invariant is to reach it goes on, up to
    `PATIENCE` times as long: on a slow machine few runs fit into a short time.
    """
    search = Search(invariant, subject, seed)
    start = time.monotonic()
    with hang_guard(hang_seconds) as alive:
        while search.failed is None and search.wants_more(time.monotonic() - start, seconds):
            search.batch(BATCH)
            alive()
            progress(search.executions)
    spent = time.monotonic() - start
    with hang_guard(60 * hang_seconds):
        return search.verdict(ENGINE, spent)


class Search:
    """Random runs of one invariant, in batches, until one fails."""

    def __init__(self, invariant: Invariant, subject: Guarded, seed: int | None) -> None:
        self.invariant, self.subject = invariant, subject
        self.nondet = RandomDraws(Random(seed), subject.capabilities.narrow)
        self.executions = 0
        self.rejected = 0
        self.known: Counter[str] = Counter()
        self.failed: tuple[str, list[tuple[str, int]]] | None = None

    def wants_more(self, spent: float, seconds: float) -> bool:
        """Whether to go on after `spent` of `seconds`."""
        if spent < seconds:
            return True
        complete = self.nondet.reached.issuperset(self.invariant.reaches)
        return not complete and spent < PATIENCE * seconds

    def batch(self, count: int) -> None:
        """So many runs, or fewer if one fails."""
        nondet, trail = self.nondet, self.nondet.trail
        for _ in range(count):
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
                    self.failed = failure.message, nondet.draws()
                    return

    def verdict(self, engine: str, seconds: float) -> Verdict:
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
        return conclude(verdict, self.invariant, self.subject, self.nondet.reached, self.failed)


def conclude(
    verdict: Verdict,
    invariant: Invariant,
    subject: Guarded,
    reached: set[str],
    failed: tuple[str, list[tuple[str, int]]] | None,
) -> Verdict:
    """A verdict completed by what happened: the failure (message and draws), shrunk, if there was
    one; undecided if the runs did not reach all that the invariant is to reach.
    """
    if failed is not None:
        verdict.status, (verdict.why, draws) = COUNTEREXAMPLE, failed
        verdict.case = shrink(invariant, subject, draws, verdict.engine)
        if verdict.case is None:
            verdict.status = UNDECIDED
            verdict.why = f"failed once and not when replayed: {verdict.why}"
        return verdict
    missing = [label for label in invariant.reaches if label not in reached]
    if missing:
        verdict.status, verdict.why = UNDECIDED, f"never reached: {', '.join(missing)}"
    return verdict
