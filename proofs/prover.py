"""The z3 engine: proves an invariant of a subject for all inputs, or gives a counterexample.

A proof counts only if all of this holds; anything else is "undecided", with the reason:

- every path was explored within the resource limit, and no operation on one could differ between
  Python, z3 and the compiled kernels;
- non-vacuity: every label that the invariant claims to reach was reached by a path with a model;
- path completeness: the explored paths are all there are, by a formula built from the paths alone,
  which a fresh z3 (on request) and bitwuzla (always) find valid;
- the twin: the same claim about the kernels with a seeded mistake is refuted.

A counterexample counts only if its model, replayed on plain ints, fails too; it is then shrunk.

A proof that uses lemmas (`vapama.proofs.lemmas`) is conditional until `vapama.proofs.ledger` has
seen that they were proved. Its models are those of uninterpreted functions, which need not exist.
So what it reaches, and where it fails, must be found again by runs on plain ints, drawn at random.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from vapama.bugs.mistakes import MISTAKES
from vapama.case import Case, make_case
from vapama.fuzz.random_engine import Search
from vapama.proofs import completeness
from vapama.proofs.ledger import Circular, settle, with_lemmas
from vapama.proofs.lemmas import resting_on
from vapama.proofs.naturals import Naturals
from vapama.proofs.symbolic import Explorer, NotDeterministic, Path, Undecided, Unfaithful
from vapama.runs import (
    Guarded,
    KnownDeparture,
    Replay,
    SubjectHung,
    SubjectRaised,
    attempt,
    hang_guard,
    shrink,
)
from vapama.spec.nondet import REGISTRY, Invariant, Reject
from vapama.verdict import (
    CONDITIONAL,
    COUNTEREXAMPLE,
    NOT_APPLICABLE,
    PROVED,
    UNDECIDED,
    Verdict,
)

ENGINE = "z3"
RLIMIT = 20_000_000
SECOND_SOLVER_SECONDS = 120.0
SECOND_SOLVERS = {
    False: ("QF_AUFBV", "bitwuzla", "valid_by_bitwuzla"),
    True: ("QF_LIA", "cvc5", "valid_by_cvc5"),
}
"""By whether a claim only counts: the logic, and who decides it a second time."""
WITNESS_RUNS = 100_000
"""Runs on plain ints, at most, to witness what a proof under lemmas reaches or where it fails."""
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Options:
    """How to prove.

    `rlimit` bounds each query in z3's steps (0: none); `hang_seconds` bounds what the subject does
    between two queries. `twin` is whether to require the seeded
    mistake to be refuted, `witnesses` whether to replay a model of every path, `z3_again` whether
    a fresh z3 checks path completeness besides bitwuzla. `export` is where to write the SMT-LIB.
    `lemmas` are the invariants by name that a proof may rest on.
    """

    rlimit: int = RLIMIT
    hang_seconds: float = 10.0
    twin: bool = True
    witnesses: bool = False
    z3_again: bool = False
    export: FilePath | None = None
    lemmas: Mapping[str, Invariant] = field(default_factory=lambda: REGISTRY)


def prove(
    invariant: Invariant,
    subject: Guarded,
    options: Options | None = None,
    progress: Progress = lambda paths: None,
) -> Verdict:
    """The z3 engine's verdict on one invariant of one subject."""
    options = options or Options()
    start = time.monotonic()
    verdict = Verdict(
        invariant=invariant.name, engine=ENGINE, subject=subject.name, status=UNDECIDED
    )
    if invariant.searched:
        verdict.status, verdict.why = NOT_APPLICABLE, f"searched, not proved: {invariant.searched}"
        return verdict
    if not subject.capabilities.symbolic:
        verdict.status, verdict.why = NOT_APPLICABLE, f"{subject.name} runs on plain ints only"
        return verdict
    try:
        _prove(invariant, subject, options, progress, verdict)
    except Unfaithful as error:
        verdict.why = f"the proof would not carry over: {error}"
    except Undecided as error:
        verdict.why = f"the solver gave up: {error} (limit: {options.rlimit} steps a query)"
    except NotDeterministic as error:
        verdict.why = f"not the same on every run: {error}"
    except Circular as error:
        verdict.why = str(error)
    except TypeError as error:
        verdict.why = f"cannot be run on symbols: {error}"
    except SubjectRaised as error:
        verdict.why = f"the subject raised {error} on symbols, and does not on ints"
    except SubjectHung as error:
        verdict.why = f"{error} (on symbols)"
    verdict.seconds = time.monotonic() - start
    return verdict


def _explorer(invariant: Invariant) -> type[Explorer]:
    """What explores it: symbols that stand for words, or for any natural numbers."""
    return Naturals if invariant.counts else Explorer


def _prove(
    invariant: Invariant, subject: Guarded, options: Options, progress: Progress, verdict: Verdict
) -> None:
    with_lemmas([invariant], options.lemmas)
    lemmas = [options.lemmas[name] for name in invariant.uses]
    explorer = _explorer(invariant)(options.rlimit, subject.capabilities.narrow)
    explorer.on_path = progress
    try:
        with (
            resting_on(explorer, subject, lemmas) as begun,
            hang_guard(options.hang_seconds) as explorer.on_check,
        ):
            paths = explorer.explore(begun(lambda: invariant.claim(explorer, subject)))
    except (Unfaithful, SubjectRaised):
        # On ints the same inputs may well fail: then it is a counterexample like any other.
        verdict.case = concrete_case(invariant, subject, explorer.model())
        if verdict.case is None:
            raise
        verdict.status, verdict.why = COUNTEREXAMPLE, verdict.case.failure
        return
    finally:
        verdict.queries, verdict.rests_on = explorer.checks, invariant.uses
    verdict.executions = len(paths)
    if paths[-1].failure is not None:
        _counterexample(invariant, subject, explorer, verdict)
        return
    why = (
        _vacuous(invariant, paths)
        or (_unwitnessed(invariant, subject, verdict) if lemmas else "")
        or _incomplete(invariant, paths, options, verdict)
        or (
            _untrue_witness(invariant, subject, options) if options.witnesses and not lemmas else ""
        )
    )
    if why:
        verdict.why = why
        return
    verdict.detail = f"{len(paths)} paths"
    if invariant.bound:
        verdict.detail += f", {invariant.bound}"
    if options.twin:
        verdict.why = _twin(invariant, options, verdict)
    if not verdict.why:
        verdict.status = CONDITIONAL if lemmas else PROVED


def _counterexample(
    invariant: Invariant, subject: Guarded, explorer: Explorer, verdict: Verdict
) -> None:
    draws = explorer.model()
    verdict.case = concrete_case(invariant, subject, draws)
    if verdict.case is None and invariant.uses:
        search = _search(invariant, subject)
        if search.failed is None:
            verdict.why = (
                f"it fails under its lemmas, which may say too little: no counterexample in "
                f"{search.executions:,} runs"
            )
            return
        verdict.case = concrete_case(invariant, subject, search.failed[1])
    if verdict.case is None:
        verdict.why = "a symbolic counterexample does not fail on ints: a defect of this engine"
        verdict.case = make_case(invariant.name, subject.name, ENGINE, "does not replay", draws)
    else:
        verdict.status, verdict.why = COUNTEREXAMPLE, verdict.case.failure


def _search(invariant: Invariant, subject: Guarded, reaches: tuple[str, ...] = ("",)) -> Search:
    """Runs on plain ints until one fails, or until all these labels were reached."""
    search = Search(invariant, subject, seed=0)
    while search.failed is None and search.executions < WITNESS_RUNS:
        search.batch(1_000)
        if search.nondet.reached.issuperset(reaches):
            break
    return search


def _unwitnessed(invariant: Invariant, subject: Guarded, verdict: Verdict) -> str:
    """What is wrong with the runs on plain ints that are to reach the labels; empty if nothing."""
    search = _search(invariant, subject, invariant.reaches)
    if search.failed is not None:
        # So a lemma is false: the verdict on it says so as well.
        verdict.case = concrete_case(invariant, subject, search.failed[1])
        verdict.status = COUNTEREXAMPLE if verdict.case is not None else UNDECIDED
        return search.failed[0].message
    missing = [label for label in invariant.reaches if label not in search.nondet.reached]
    return f"no run on plain ints reaches {', '.join(missing)}" if missing else ""


def concrete_case(
    invariant: Invariant, subject: Guarded, draws: list[tuple[str, int]]
) -> Case | None:
    """The model's draws replayed on ints and shrunk; None if they do not fail there."""
    return shrink(invariant, subject, draws, ENGINE, most_runs=2_000)


def _vacuous(invariant: Invariant, paths: list[Path]) -> str:
    reached: set[str] = set()
    for path in paths:
        if not path.pruned:
            reached |= path.reached
    if all(path.pruned for path in paths):
        return "vacuous: its assumptions cannot be met"
    missing = [label for label in invariant.reaches if label not in reached]
    return f"vacuous: no input reaches {', '.join(missing)}" if missing else ""


def _incomplete(invariant: Invariant, paths: list[Path], options: Options, verdict: Verdict) -> str:
    formula = completeness.completeness(paths)
    logic, solver, valid = SECOND_SOLVERS[invariant.counts]
    if options.export is not None:
        options.export.mkdir(parents=True, exist_ok=True)
        text = completeness.smtlib(formula, logic)
        (options.export / f"{invariant.name}.smt2").write_text(text)
    start = time.monotonic()
    answers = {solver: "valid"}
    for part in completeness.parts(formula) if invariant.in_parts else [formula]:
        text = completeness.smtlib(part, logic)
        answers[solver] = getattr(completeness, valid)(text, SECOND_SOLVER_SECONDS)
        if answers[solver] != "valid":
            break
    verdict.second_solver = f"{answers[solver]}, {time.monotonic() - start:.1f} s"
    if options.z3_again:
        answers["z3"] = completeness.valid_by_z3(formula, 50 * options.rlimit)
    for solver, answer in answers.items():
        if answer != "valid":
            return f"path completeness: {solver} says {answer}"
    return ""


def _untrue_witness(invariant: Invariant, subject: Guarded, options: Options) -> str:
    """Explore again, and run the concrete model of each path: it must reach the same labels."""
    explorer = _explorer(invariant)(options.rlimit, subject.capabilities.narrow)
    wrong: list[str] = []

    def claim() -> None:
        pruned = True
        try:
            invariant.claim(explorer, subject)
            pruned = False
        finally:
            if not pruned:
                problem = _replay_path(invariant, subject, explorer)
                if problem:
                    wrong.append(problem)

    explorer.explore(claim)
    return wrong[0] if wrong else ""


def _replay_path(invariant: Invariant, subject: Guarded, explorer: Explorer) -> str:
    run = Replay(dict(explorer.model()), subject.capabilities.narrow)
    try:
        failure = attempt(invariant, run, subject)
    except (Reject, KnownDeparture):
        return "the model of a path breaks an assumption on ints"
    if failure is not None:
        return f"the model of a proved path fails on ints: {failure.message}"
    if run.reached != explorer.reached:
        return f"on ints a path reaches {run.reached}, symbolically {explorer.reached}"
    return ""


def _twin(invariant: Invariant, options: Options, verdict: Verdict) -> str:
    if not invariant.twin:
        return "no twin: name a seeded mistake (bugs/*.mistakes) that this claim must refute"
    if invariant.twin not in MISTAKES:
        return f"its twin {invariant.twin} is not a mistake of bugs/*.mistakes"
    refuted = refute(invariant, invariant.twin, options.rlimit, options.lemmas)
    if refuted.status != COUNTEREXAMPLE:
        return f"its twin, {invariant.twin}, is not refuted: {refuted.why or refuted.status}"
    verdict.detail += f"; twin refuted in {refuted.seconds:.1f} s"
    return ""


def refute(
    invariant: Invariant,
    mistake: str,
    rlimit: int = RLIMIT,
    lemmas: Mapping[str, Invariant] = REGISTRY,
) -> Verdict:
    """The verdict on the kernels with a seeded mistake: to be a counterexample."""
    subject = Guarded(f"mistake:{mistake}", MISTAKES[mistake].subject())
    return prove(invariant, subject, Options(rlimit=rlimit, twin=False, lemmas=lemmas))


def prove_ledger(
    invariants: Sequence[Invariant], subject: Guarded, options: Options | None = None
) -> list[Verdict]:
    """The verdicts on invariants and on all that they rest on, settled; lemmas come first.

    Raises `Circular`.
    """
    options = options or Options()
    ordered = with_lemmas(invariants, options.lemmas)
    verdicts = [prove(invariant, subject, options) for invariant in ordered]
    settle(verdicts)
    return verdicts


def replay_pinned(invariant: Invariant, subject: Guarded, case: Case) -> str | None:
    """Run a Case on the symbolic engine, every draw pinned to its value.

    Returns what failed, or None. Raises `Reject` if the Case breaks an assumption.
    """
    explorer = _explorer(invariant)(RLIMIT, subject.capabilities.narrow, pins=case.values())
    paths = explorer.explore(lambda: _claim(invariant, explorer, subject))
    if all(path.pruned for path in paths):
        raise Reject
    return paths[-1].failure


def _claim(invariant: Invariant, explorer: Any, subject: Guarded) -> None:
    invariant.claim(explorer, subject)
