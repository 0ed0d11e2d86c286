"""The engines find seeded mistakes of the kernels, within so many runs."""

import re
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import Phase

from vapama.bugs.mistakes import MISTAKES
from vapama.case import Case
from vapama.fuzz import atheris_engine, exhaustive, hypothesis_engine
from vapama.fuzz.decoded import RandomDraws
from vapama.fuzz.random_engine import Search
from vapama.runs import Guarded, replay
from vapama.spec.nondet import Invariant, load_invariants
from vapama.verdict import BUDGETS, COUNTEREXAMPLE, HELD, Verdict

MOST_RANDOM_RUNS = 2_000_000
MOST_FOR_HYPOTHESIS = 50
"""Mistakes, evenly spread over all, that Hypothesis is tried on: it is the slowest to search."""
OF_WALKS = [
    name
    for name, mistake in MISTAKES.items()
    if not load_invariants()[mistake.breaks].searched
    and "random" not in load_invariants()[mistake.breaks].unsuited
]
"""The others are of programs of many steps, which take milliseconds each: they have their own; or
of models that are proved alone."""
FEW = (
    "user-writes-ignore-read-only-without-wp",
    "a-user-page-needs-only-its-leaf",
    "smep-is-ignored",
    "ac-exempts-implicit-accesses",
    "keys-stop-fetches",
    "write-disable-ignores-wp",
    "the-key-bit-is-misplaced",
    "a-missing-page-reports-present",
    "ps-in-a-pml4e-is-taken",
    "the-top-of-memory-is-not-canonical",
    "the-offset-loses-its-top-bit",
    "dirty-is-forgotten",
    "the-batch-shares-its-first-result",
)


def with_mistake(name: str) -> tuple[Invariant, Guarded]:
    """An invariant that the mistake breaks, and the kernels with the mistake."""
    mistake = MISTAKES[name]
    return load_invariants()[mistake.breaks], Guarded(f"mistake:{name}", mistake.subject())


def require_counterexample(verdict: Verdict, invariant: Invariant, subject: Guarded) -> Case:
    """Check that the verdict has a Case that fails on the mistake and holds without it."""
    assert verdict.status == COUNTEREXAMPLE, verdict.why
    assert verdict.why
    assert verdict.case is not None
    assert (verdict.case.invariant, verdict.case.subject) == (invariant.name, subject.name)
    failure, _ = replay(invariant, verdict.case, subject)
    assert failure is not None
    right, _ = replay(invariant, verdict.case, Guarded("optimized", right_kernels()))
    assert right is None
    return verdict.case


def right_kernels() -> object:
    from vapama.impl.optimized import Optimized

    return Optimized()


@pytest.mark.parametrize("name", OF_WALKS)
def test_random_runs_find_every_mistake(name: str) -> None:
    invariant, subject = with_mistake(name)
    search = Search(invariant, subject, seed=0)
    while search.failed is None and search.executions < MOST_RANDOM_RUNS:
        search.batch(1024)
    require_counterexample(search.verdict("random", 1.0), invariant, subject)


def test_hypothesis_finds_four_mistakes_of_five_at_the_standard_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What is found is then shrunk by ourselves; shrinking by Hypothesis takes most of its time.
    phases = {phase.name: phase for phase in Phase} | {"shrink": Phase.generate}
    monkeypatch.setattr(hypothesis_engine, "Phase", SimpleNamespace(**phases))
    missed = []
    sample = OF_WALKS[:: len(OF_WALKS) // MOST_FOR_HYPOTHESIS + 1]
    for name in sample:
        invariant, subject = with_mistake(name)
        examples = BUDGETS["standard"].hypothesis_examples
        verdict = hypothesis_engine.run(invariant, subject, examples, seed=0)
        if verdict.status == COUNTEREXAMPLE:
            require_counterexample(verdict, invariant, subject)
        else:
            missed.append(name)
    assert len(missed) <= len(sample) / 5, missed


@pytest.mark.parametrize("name", FEW)
def test_the_exhaustive_scope_of_the_quick_budget_holds_a_case_of_most_mistakes(name: str) -> None:
    invariant, subject = with_mistake(name)
    verdict = exhaustive.run(invariant, subject, BUDGETS["quick"].exhaustive_width)
    require_counterexample(verdict, invariant, subject)


@pytest.mark.skipif(
    bool(atheris_engine.unavailable()), reason=atheris_engine.unavailable() or "it is there"
)
@pytest.mark.parametrize(
    "name", ["two-no-executes-cancel", "1g-pages-always-exist", "the-walk-reads-an-entry-twice"]
)
def test_atheris_finds_mistakes_by_itself(name: str) -> None:
    invariant, subject = with_mistake(name)
    (verdict,), _ = atheris_engine.run([invariant], subject, seconds=60)
    case = require_counterexample(verdict, invariant, subject)
    assert case.engine == "atheris"
    assert verdict.executions > 0


@pytest.mark.skipif(
    bool(atheris_engine.unavailable()), reason=atheris_engine.unavailable() or "it is there"
)
def test_atheris_reports_runs_and_coverage_of_what_holds() -> None:
    invariants = [
        load_invariants()[name] for name in ("who_may_write_may_read", MISTAKES[FEW[0]].breaks)
    ]
    verdicts, coverage = atheris_engine.run(
        invariants, Guarded("optimized", right_kernels()), seconds=3
    )
    assert [verdict.invariant for verdict in verdicts] == [i.name for i in invariants]
    for verdict in verdicts:
        assert verdict.status == HELD, verdict.why
        assert verdict.executions >= 2048
        assert verdict.seconds > 0
    edges = re.fullmatch(r"(\d+) edges, (\d+) features, corpus of \d+", coverage)
    assert edges is not None, coverage
    assert int(edges[1]) >= 12


@pytest.mark.parametrize("seed", [0, 7])
def test_the_same_seed_draws_the_same_runs(seed: int) -> None:
    invariant, subject = with_mistake("two-no-executes-cancel")

    def runs(number: int) -> list[list[tuple[str, int]]]:
        nondet, found = RandomDraws(Random(number)), []
        for _ in range(300):
            nondet.trail.clear()
            invariant.claim(nondet, Guarded("optimized", right_kernels()))
            found.append(nondet.draws())
        return found

    assert runs(seed) == runs(seed)
    assert runs(seed) != runs(seed + 1)
    searches = [Search(invariant, subject, number) for number in (seed, seed, seed + 1)]
    for search in searches:
        while search.failed is None and search.executions < MOST_RANDOM_RUNS:
            search.batch(1000)
    first, second, other = ((search.executions, search.failed) for search in searches)
    assert first == second != other


def test_hypothesis_with_a_seed_runs_the_same_examples_every_time() -> None:
    invariant, subject = with_mistake("a-missing-page-reports-present")
    first, second = (hypothesis_engine.run(invariant, subject, 500, seed=3) for _ in range(2))
    assert first.status == COUNTEREXAMPLE
    assert (first.executions, first.case) == (second.executions, second.case)
