"""A worker: reads `Job`s from standard input, tells `Event`s on standard output."""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from vapama.case import BadInput, load_case
from vapama.jobs import SNAPSHOT, Agreed, Event, Job
from vapama.runs import Guarded
from vapama.spec.nondet import Invariant, load_invariants
from vapama.subjects import load_subject
from vapama.verdict import NOT_APPLICABLE, UNDECIDED, Verdict

Tell = Callable[[Event], None]


def main() -> None:
    """Do the jobs given, a line each."""
    out = os.fdopen(os.dup(1), "wb")
    # What a subject prints, from Python or below it, must not be taken for events.
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def tell(event: Event) -> None:
        out.write(msgspec.json.encode(event) + b"\n")
        out.flush()

    try:
        for line in sys.stdin.buffer:
            _do(msgspec.json.decode(line, type=Job), tell)
            tell(Event(finished=True))
    except KeyboardInterrupt:
        sys.exit(130)


def _do(job: Job, tell: Tell) -> None:
    try:
        if job.engine == SNAPSHOT:
            _check_snapshot(job, tell)
        else:
            _check_invariants(job, tell)
    except BadInput as error:
        tell(Event(bad_input=str(error)))


def _check_snapshot(job: Job, tell: Tell) -> None:
    from vapama.snapshot.truth import check_snapshot, load_snapshot

    snapshot = load_snapshot(Path(job.snapshot))
    for result in check_snapshot(snapshot, lambda what: tell(Event(at=what))):
        tell(
            Event(
                agreed=Agreed(
                    what=result.what,
                    right=result.right,
                    total=result.total,
                    first_difference=result.first_difference,
                )
            )
        )


def _check_invariants(job: Job, tell: Tell) -> None:
    registry = load_invariants()
    subject = load_subject(job.subject)
    applicable = []
    for name in job.invariants:
        invariant = registry[name]
        lacking = subject.lacks(invariant)
        if lacking:
            why = f"{job.subject} does not observe {', '.join(sorted(lacking))}"
            tell(Event(verdict=_not_applicable(job, invariant, why)))
        elif job.engine in invariant.unsuited:
            why = "this engine's scope holds too little of it"
            tell(Event(verdict=_not_applicable(job, invariant, why)))
        else:
            applicable.append(invariant)
    if job.engine == "atheris":
        if applicable:
            _fuzz(job, applicable, subject, tell)
        return
    for invariant in applicable:
        tell(Event(at=invariant.name))
        try:
            verdict = _run(job, invariant, subject, _progress(invariant.name, tell))
        except BadInput:
            raise
        except Exception as error:  # an invariant of the user's may raise anything
            why = f"the invariant raised {type(error).__name__}: {error}".splitlines()[0]
            verdict = Verdict(
                invariant=invariant.name,
                engine=job.engine,
                subject=job.subject,
                status=UNDECIDED,
                why=why,
            )
        tell(Event(verdict=verdict))


def _not_applicable(job: Job, invariant: Invariant, why: str) -> Verdict:
    return Verdict(
        invariant=invariant.name,
        engine=job.engine,
        subject=job.subject,
        status=NOT_APPLICABLE,
        why=why,
    )


def _run(
    job: Job, invariant: Invariant, subject: Guarded, progress: Callable[[int], None]
) -> Verdict:
    """One invariant by one engine. Engines are imported as needed: each costs time to load."""
    budget = job.budget
    match job.engine:
        case "z3":
            from vapama.proofs import prover
            from vapama.proofs.apart import apart

            options = prover.Options(
                rlimit=budget.rlimit,
                hang_seconds=budget.hang_seconds,
                export=Path(job.export) if job.export else None,
            )
            return apart(partial(prover.prove, invariant, subject, options, progress))
        case "random":
            from vapama.fuzz import random_engine

            return random_engine.run(
                invariant,
                subject,
                budget.random_seconds,
                budget.seed,
                budget.hang_seconds,
                progress,
                budget.patience,
            )
        case "hypothesis":
            from vapama.fuzz import hypothesis_engine

            return hypothesis_engine.run(
                invariant,
                subject,
                budget.hypothesis_examples,
                budget.seed,
                budget.hang_seconds,
                explicit=[c for c in map(load_case, _paths(job)) if c.invariant == invariant.name],
                database=_database(),
                progress=progress,
                patience=budget.patience,
            )
        case "exhaustive":
            from vapama.fuzz import exhaustive

            return exhaustive.run(
                invariant,
                subject,
                budget.exhaustive_width,
                hang_seconds=budget.hang_seconds,
                progress=progress,
            )
    raise BadInput(f"no engine is named {job.engine}")


def _fuzz(job: Job, invariants: list[Invariant], subject: Guarded, tell: Tell) -> None:
    from vapama.fuzz import atheris_engine

    verdicts, coverage = atheris_engine.run(
        invariants,
        subject,
        job.budget.atheris_seconds,
        job.budget.seed,
        job.budget.hang_seconds,
        seeds=map(load_case, _paths(job)),
        corpus=Path(job.corpus) if job.corpus else None,
        progress=_progress("all invariants", tell),
        patience=job.budget.patience,
    )
    tell(Event(coverage=coverage))
    for verdict in verdicts:
        tell(Event(verdict=verdict))


def _paths(job: Job) -> list[Path]:
    return [Path(case) for case in job.cases]


def _database() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("vapama") / "hypothesis"


def _progress(what: str, tell: Tell) -> Callable[[int], None]:
    """Tells executions, a few times a second at most."""
    last = 0.0

    def progress(executions: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 0.25:
            last = now
            tell(Event(at=what, executions=executions))

    return progress


if __name__ == "__main__":
    main()
