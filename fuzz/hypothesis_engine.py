"""The hypothesis engine: Hypothesis searches, shrinks, and remembers failures in its database."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

from vapama.case import Case
from vapama.fuzz.decoded import ByteDraws
from vapama.fuzz.random_engine import PATIENCE, conclude
from vapama.fuzz.random_engine import Failed as FailedRun
from vapama.runs import Concrete, Guarded, KnownDeparture, Replay, attempt, hang_guard
from vapama.spec.nondet import Invariant, Reject
from vapama.verdict import HELD, Verdict

ENGINE = "hypothesis"
EXAMPLE, LONG_EXAMPLE = (st.binary(min_size=size, max_size=size) for size in (256, 1024))
"""One draw for a whole run, decoded like a fuzzer's input: Hypothesis' cost is per draw, and bytes
found more of the seeded mistakes in fewer examples than a draw for each value did. Claims about
several walks draw more."""
Progress = Callable[[int], None]


class Failed(Exception):
    """The invariant failed on an example."""


class Hung(BaseException):
    """The subject hung: end the search, for Hypothesis would shrink by hanging again and again."""


def run(
    invariant: Invariant,
    subject: Guarded,
    examples: int,
    seed: int | None = 0,
    hang_seconds: float = 10.0,
    database: Path | None = None,
    explicit: Iterable[Case] = (),
    progress: Progress = lambda executions: None,
    patience: int = PATIENCE,
) -> Verdict:
    """Run so many examples, after the `explicit` Cases.

    While they have not reached all that the invariant is to reach it goes on, with so many more, up
    to `patience` times. With a seed the examples are the same every time, and nothing is
    remembered; with None they are random, and failures are kept in `database` and tried first the
    next time.
    """
    start = time.monotonic()
    known: Counter[str] = Counter()
    reached: set[str] = set()
    count = met = 0
    last: FailedRun | None = None

    def one(nondet: Concrete) -> None:
        nonlocal count, met, last
        count += 1
        try:
            failure = attempt(invariant, nondet, subject)
        except Reject:
            return
        except KnownDeparture as departure:
            known[str(departure)] += 1
            met += 1
            return
        finally:
            alive()
        met += 1
        reached.update(nondet.reached)
        if failure is not None:
            last = failure, nondet.draws()
            raise Hung if failure.hung else Failed(failure.message)

    @settings(
        max_examples=examples,
        database=DirectoryBasedExampleDatabase(database) if seed is None and database else None,
        derandomize=False,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.reuse, Phase.generate, Phase.target, Phase.shrink),
    )
    @given(LONG_EXAMPLE if invariant.is_composed else EXAMPLE)
    def search(example: bytes) -> None:
        one(ByteDraws(example, subject.capabilities.narrow))
        if count & 63 == 0:
            progress(count)

    with hang_guard(hang_seconds) as alive:
        try:
            for case in explicit:
                one(Replay(case.values(), subject.capabilities.narrow))
            for turn in range(patience):
                (search if seed is None else hypothesis.seed(seed + turn)(search))()
                if reached.issuperset(subject.reachable(invariant)):
                    break
        except (Failed, Hung):
            pass
    verdict = Verdict(
        invariant=invariant.name,
        engine=ENGINE,
        subject=subject.name,
        status=HELD,
        seconds=time.monotonic() - start,
        executions=count,
        known=dict(known),
        detail=f"{count:,} examples",
    )
    return conclude(verdict, invariant, subject, reached, met, last, hang_seconds)
