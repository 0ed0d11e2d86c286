"""What makes a verdict of the prover worth trusting, each part of it seen to say no."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path as FilePath
from random import Random
from typing import Any

import pytest
import z3

from vapama.bugs.mistakes import MISTAKES
from vapama.case import Case, make_case
from vapama.fuzz.decoded import RandomDraws
from vapama.fuzz.random_engine import Search
from vapama.impl.optimized import Optimized
from vapama.proofs import completeness as of_paths
from vapama.proofs.apart import apart
from vapama.proofs.completeness import (
    completeness,
    parts,
    smtlib,
    valid_by_bitwuzla,
    valid_by_z3,
)
from vapama.proofs.prover import Options, prove, refute, replay_pinned
from vapama.proofs.symbolic import (
    ASK,
    ASSUME,
    BRANCH,
    CHOICE,
    MUST,
    Explorer,
    NotDeterministic,
    Path,
    Unfaithful,
)
from vapama.runs import Guarded, attempt, replay
from vapama.spec.domains import MAXPHYADDR
from vapama.spec.nondet import Claim, Invariant, Nondet, Reject, load_invariants
from vapama.spec.words import low_bits
from vapama.verdict import COUNTEREXAMPLE, NOT_APPLICABLE, PROVED, UNDECIDED

INVARIANTS = load_invariants()
THEOREM = INVARIANTS["the_walk_equals_the_reference"]
FIVE_LEVELS = INVARIANTS["five_levels_with_top_index_zero_equal_four"]
PLAIN = Options(twin=False)


def optimized() -> Guarded:
    return Guarded("optimized", Optimized())


def claimed(claim: Claim, reaches: tuple[str, ...] = (), twin: str = "") -> Invariant:
    return Invariant(claim.__name__, claim, "a test", reaches, frozenset(), twin, "")


def _bits_from_maxphyaddr_up_are_reserved(nondet: Nondet, subject: Any) -> None:
    maxphyaddr, nxe = nondet.word("maxphyaddr", MAXPHYADDR), nondet.flag("nxe")
    reserved = subject.subject.kernels[0].reserved_word(nxe << 11, maxphyaddr)
    if reserved & low_bits(63) != low_bits(52) & ~low_bits(maxphyaddr):
        raise AssertionError  # for pytest has `assert` make texts of words, which is seen
    if reserved >> 63 == 1:
        nondet.reach("no NXE")


SMALL = claimed(_bits_from_maxphyaddr_up_are_reserved, ("no NXE",), "maxphyaddr-is-one-more")


# Path completeness.


@pytest.fixture(scope="module")
def paths() -> list[Path]:
    explorer = Explorer()
    return explorer.explore(lambda: FIVE_LEVELS.claim(explorer, optimized()))


def says(formula: z3.BoolRef) -> str:
    """What both solvers say about the formula: they have to agree."""
    answers = {valid_by_z3(formula), valid_by_bitwuzla(smtlib(formula))}
    assert len(answers) == 1
    return answers.pop()


def test_all_paths_of_a_proof_are_complete(paths: list[Path]) -> None:
    assert len(paths) > 20
    assert any(path.pruned for path in paths)
    assert {kind for path in paths for kind, _, _ in path.decisions} == {
        BRANCH,
        ASSUME,
        MUST,
        ASK,
    }
    assert says(completeness(paths)) == "valid"


def test_a_query_that_comes_to_its_limit_is_asked_afresh(paths: list[Path]) -> None:
    explorer = Explorer()
    check = explorer.solver.check
    given_up: list[z3.BoolRef] = []

    def gives_up(*terms: z3.BoolRef) -> z3.CheckSatResult:
        given_up.extend(terms)
        return z3.unknown if terms else check()

    explorer.solver.check = gives_up
    again = explorer.explore(lambda: FIVE_LEVELS.claim(explorer, optimized()))
    assert len(given_up) > 20
    assert says(completeness(again)) == "valid"
    assert len(again) == len(paths)
    assert {label for path in again for label in path.reached} == {
        label for path in paths for label in path.reached
    }
    mistaken = Guarded("smep-is-ignored", MISTAKES["smep-is-ignored"].subject())
    *_, last = explorer.explore(lambda: THEOREM.claim(explorer, mistaken))
    assert last.failure is not None
    assert replay(THEOREM, make_case("", "", "", "", explorer.model()), mistaken)[0] is not None


def test_paths_are_not_complete_without_any_one_of_them(paths: list[Path]) -> None:
    for i in range(len(paths)):
        assert says(completeness(paths[:i] + paths[i + 1 :])) == "not valid"


def test_a_failed_path_is_not_complete(paths: list[Path]) -> None:
    failed = replace(paths[-1], failure="a failure")
    assert says(completeness([*paths[:-1], failed])) == "not valid"


def test_paths_that_form_no_tree_are_not_of_one_function(paths: list[Path]) -> None:
    first, second, *_ = paths
    shorter = replace(first, decisions=first.decisions[:-1])
    kind, options, taken = first.decisions[0]
    other_kind = replace(first, decisions=[(CHOICE, options, taken), *first.decisions[1:]])
    swapped = replace(first, decisions=[(kind, options[::-1], taken), *first.decisions[1:]])
    for other in (first, shorter, other_kind, swapped):
        with pytest.raises(NotDeterministic):
            completeness([first, second, other])


X = z3.BitVec("x", 64)
SOME, NEVER = z3.ULT(X, 5), z3.ULT(X, 0)
ALWAYS = z3.Not(NEVER)
YES = z3.BoolVal(True)


def path(*decisions: tuple[str, list[z3.BoolRef], int], failure: str | None = None) -> Path:
    return Path(list(decisions), pruned=False, reached=set(), failure=failure)


TREES: dict[str, tuple[str, list[Path]]] = {
    "a path with no decision": ("valid", [path()]),
    "a failed one": ("not valid", [path(failure="it fails")]),
    "both sides": (
        "valid",
        [path((BRANCH, [SOME, z3.Not(SOME)], 0)), path((BRANCH, [SOME, z3.Not(SOME)], 1))],
    ),
    "one side": ("not valid", [path((BRANCH, [SOME, z3.Not(SOME)], 0))]),
    "the other side": ("not valid", [path((BRANCH, [SOME, z3.Not(SOME)], 1))]),
    "the only side": ("valid", [path((BRANCH, [ALWAYS, NEVER], 0))]),
    "the impossible side": ("not valid", [path((BRANCH, [ALWAYS, NEVER], 1))]),
    "a side that fails": (
        "not valid",
        [
            path((BRANCH, [SOME, z3.Not(SOME)], 0)),
            path((BRANCH, [SOME, z3.Not(SOME)], 1), failure="it fails"),
        ],
    ),
    "an impossible side that fails": (
        "valid",
        [
            path((BRANCH, [ALWAYS, NEVER], 0)),
            path((BRANCH, [ALWAYS, NEVER], 1), failure="it fails"),
        ],
    ),
    "an assumption": ("valid", [path((ASSUME, [SOME], 0))]),
    "an assumption that cannot be met": ("valid", [path((ASSUME, [NEVER], -1))]),
    "an assumption that can": ("not valid", [path((ASSUME, [SOME], -1))]),
    "every option": ("valid", [path((CHOICE, [YES] * 3, i)) for i in range(3)]),
    "two options of three": ("not valid", [path((CHOICE, [YES] * 3, i)) for i in (0, 2)]),
    "an obligation that is met": ("valid", [path((MUST, [ALWAYS, NEVER], 0))]),
    "an obligation that may not be met": ("not valid", [path((MUST, [SOME, z3.Not(SOME)], 0))]),
    "an obligation that is never met": ("not valid", [path((MUST, [NEVER, ALWAYS], 1))]),
    "a yes to what always holds": ("valid", [path((ASK, [ALWAYS, YES], 0))]),
    "a yes to what may not hold": ("not valid", [path((ASK, [SOME, YES], 0))]),
    "a no": ("valid", [path((ASK, [SOME, YES], 1))]),
}


@pytest.mark.parametrize("name", TREES)
def test_just_the_complete_trees_are_valid(name: str) -> None:
    answer, tree = TREES[name]
    assert says(completeness(tree)) == answer


@pytest.mark.parametrize("name", TREES)
def test_the_parts_of_a_tree_are_valid_just_if_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_paths, "SMALL_PART", 0)
    monkeypatch.setattr(of_paths, "PARTS", 1_000)
    answer, tree = TREES[name]
    answers = {says(part) for part in parts(completeness(tree))}
    assert answers <= {"valid", answer}
    assert answer in answers or answer == "valid"


def test_the_parts_of_a_proof_are_together_what_they_are_parts_of(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_paths, "SMALL_PART", 4)
    whole = completeness(paths)
    split = parts(whole)
    assert len(split) > 5
    assert {says(part) for part in split} == {"valid"}
    # A path that is left out is missed by some part, whichever it is.
    for left_out in (0, len(paths) // 2, -1):
        missed = parts(completeness([path for path in paths if path is not paths[left_out]]))
        assert "not valid" in {says(part) for part in missed}


def test_a_second_solver_that_does_not_agree_leaves_a_proof_undecided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert prove(SMALL, optimized(), replace(PLAIN, z3_again=True)).status == PROVED
    for solver in ("bitwuzla", "z3"):
        with monkeypatch.context() as patched:
            patched.setattr(
                f"vapama.proofs.completeness.valid_by_{solver}", lambda formula, limit: "unknown"
            )
            verdict = prove(SMALL, optimized(), replace(PLAIN, z3_again=True))
            assert verdict.status == UNDECIDED
            assert verdict.why == f"path completeness: {solver} says unknown"


@pytest.mark.parametrize("doubted", ["first", "second", "last"])
def test_a_part_that_a_second_solver_does_not_find_valid_leaves_a_proof_undecided(
    doubted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_paths, "SMALL_PART", 4)
    in_parts = replace(FIVE_LEVELS, in_parts=True)
    answers = iter(["valid"] * 1_000)
    monkeypatch.setattr(of_paths, "valid_by_bitwuzla", lambda text, _: next(answers))
    assert prove(in_parts, optimized(), PLAIN).status == PROVED
    count = 1_000 - len(list(answers))
    assert count > 5
    at = {"first": 0, "second": 1, "last": count - 1}[doubted]
    answers = iter(["valid"] * at + ["unknown"] + ["valid"] * (count - at - 1))
    verdict = prove(in_parts, optimized(), PLAIN)
    assert verdict.why == "path completeness: bitwuzla says unknown"
    assert verdict.status == UNDECIDED


def test_the_exported_text_is_unsatisfiable_to_both_solvers(tmp_path: FilePath) -> None:
    assert prove(SMALL, optimized(), replace(PLAIN, export=tmp_path)).status == PROVED
    text = (tmp_path / f"{SMALL.name}.smt2").read_text()
    assert "maxphyaddr" in text
    solver = z3.Solver()
    solver.from_string(text)
    assert len(solver.assertions()) == 1
    assert solver.check() == z3.unsat
    assert valid_by_bitwuzla(text) == "valid"


# Twins, limits, vacuity, applicability.


@pytest.mark.parametrize(
    ("twin", "why"),
    [
        ("", "no twin: name a seeded mistake"),
        ("no-such-mistake", "its twin no-such-mistake is not a mistake of bugs/*.mistakes"),
        ("reads-set-dirty", "its twin, reads-set-dirty, is not refuted: proved"),
    ],
)
def test_a_proof_without_a_twin_that_is_refuted_is_undecided(twin: str, why: str) -> None:
    assert prove(SMALL, optimized()).status == PROVED
    verdict = prove(replace(SMALL, twin=twin), optimized())
    assert verdict.status == UNDECIDED
    assert why in verdict.why


def test_without_twins_an_executor_that_overlooks_failures_would_prove_all(
    seed: Callable[..., Any],
) -> None:
    seed(('failure=str(error) or "the claim does not hold"', "failure=None"))
    assert prove(SMALL, optimized(), replace(PLAIN, witnesses=True)).status == PROVED
    verdict = prove(SMALL, optimized())
    assert verdict.status == UNDECIDED
    assert "is not refuted" in verdict.why


def test_a_resource_limit_that_is_reached_leaves_a_proof_undecided() -> None:
    verdict = prove(SMALL, optimized(), replace(PLAIN, rlimit=10))
    assert verdict.status == UNDECIDED
    assert verdict.why.endswith("(limit: 10 steps a query)")


def test_a_label_that_is_not_reached_leaves_a_proof_undecided() -> None:
    verdict = prove(replace(SMALL, reaches=("no NXE", "nowhere")), optimized(), PLAIN)
    assert verdict.status == UNDECIDED
    assert verdict.why == "vacuous: no input reaches nowhere"


def test_a_subject_of_plain_ints_is_not_proved() -> None:
    subject = optimized()
    subject.capabilities = replace(subject.capabilities, symbolic=False)
    assert prove(SMALL, subject, PLAIN).status == NOT_APPLICABLE


# What no symbol can hide from Python, the models of the paths show.


def _asks_for_the_type(nondet: Nondet, _: Any) -> None:
    if type(nondet.word("x")) is int:
        raise AssertionError


def _asks_for_identity(nondet: Nondet, _: Any) -> None:
    holds = nondet.word("x") < 5
    nondet.reach("true" if holds is True else "false" if holds is False else "neither")


@pytest.mark.parametrize("claim", [_asks_for_the_type, _asks_for_identity])
def test_a_path_that_ints_do_not_take_is_no_proof(claim: Claim) -> None:
    verdict = prove(claimed(claim), optimized(), replace(PLAIN, witnesses=True))
    assert verdict.status == UNDECIDED
    assert "on ints" in verdict.why


def fails_when_pinned(invariant: Invariant, subject: Guarded, case: Case) -> bool:
    """Whether a Case fails on the symbolic engine: there a load outside memory is unfaithful."""
    try:
        return replay_pinned(invariant, subject, case) is not None
    except Unfaithful:
        return True


# The theorem, and the mistakes that it and its companions refute.


def test_the_walk_equals_the_reference() -> None:
    verdict = prove(THEOREM, optimized(), Options(witnesses=True, z3_again=True))
    assert (verdict.status, verdict.why) == (PROVED, "")
    assert verdict.executions > 40
    assert "twin refuted" in verdict.detail


@pytest.mark.parametrize("name", INVARIANTS)
def test_an_invariant_names_its_source_its_twin_and_its_claim(name: str) -> None:
    invariant = INVARIANTS[name]
    assert invariant.source
    assert invariant.twin in MISTAKES
    assert invariant.claim.__doc__


GIVEN_UP = (
    "a-batch-has-large-frames-anywhere",
    "a-batch-takes-ept-tables-for-the-guests",
    "a-batch-takes-npt-tables-for-the-guests",
    "a-batch-takes-wide-guest-physical-addresses",
)
"""Mistakes in groups of walks for which Z3 comes to its step limit before it has a model."""


@pytest.mark.parametrize("name", GIVEN_UP)
def test_a_mistake_that_z3_gives_up_on_is_found_by_runs(name: str) -> None:
    subject = Guarded(name, MISTAKES[name].subject())
    search = Search(INVARIANTS[MISTAKES[name].breaks], subject, seed=0)
    while search.failed is None and search.executions < 50_000:
        search.batch(64)
    assert search.failed is not None


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in MISTAKES
        if name not in GIVEN_UP
        # Proofs under lemmas have their counterexamples found by runs: see tests/fuzz.
        and not INVARIANTS[MISTAKES[name].breaks].searched
        and not INVARIANTS[MISTAKES[name].breaks].uses
    ],
)
def test_a_seeded_mistake_is_refuted_by_a_case_that_fails_on_ints(name: str) -> None:
    invariant = INVARIANTS[MISTAKES[name].breaks]
    verdict = apart(partial(refute, invariant, name))
    assert verdict.status == COUNTEREXAMPLE
    assert verdict.case is not None
    mistaken = Guarded(name, MISTAKES[name].subject())
    failure, _ = replay(invariant, verdict.case, mistaken)
    assert failure is not None
    assert fails_when_pinned(invariant, mistaken, verdict.case)
    # The case shows the mistake and nothing else. A model's rule, if there, may forbid its step.
    forbidden = suppress(Reject) if MISTAKES[name].file.startswith("spec/") else nullcontext()
    with forbidden:
        assert replay(invariant, verdict.case, optimized())[0] is None
    with forbidden:
        assert not fails_when_pinned(invariant, optimized(), verdict.case)


# Cases on the symbolic engine.


@pytest.mark.parametrize("name", ["", "smep-is-ignored", "the-frame-loses-its-top-bit"])
def test_a_pinned_replay_agrees_with_ints_on_random_runs(name: str) -> None:
    subject = Guarded(name, MISTAKES[name].subject()) if name else optimized()
    outcomes = []
    for invariant in (THEOREM, FIVE_LEVELS):
        for number in range(2000):
            if number >= 20 and (not name or True in outcomes):
                break
            run = RandomDraws(Random(number))
            try:
                failed = attempt(invariant, run, subject) is not None
            except Reject:
                continue
            case = make_case(invariant.name, subject.name, "test", "", run.draws())
            assert fails_when_pinned(invariant, subject, case) == failed
            outcomes.append(failed)
    assert False in outcomes
    assert not name or True in outcomes


def test_a_pinned_replay_fills_in_what_a_case_lacks_as_ints_do() -> None:
    def claim(nondet: Nondet, _: Any) -> None:
        memory = nondet.memory("m", given=[(8, 5)])
        assert memory.load(0) == nondet.word("x")
        assert memory.load(8) == 5

    invariant = claimed(claim)
    for draws, fails in (
        ({}, False),
        ({"x": 1}, True),
        ({"m[0x0]": 1}, True),
        ({"x": 1, "m[0x0]": 1}, False),
    ):
        case = make_case("claim", "test", "test", "", [("m.limit", 0x1000), *draws.items()])
        assert (replay(invariant, case, optimized())[0] is not None) == fails
        assert fails_when_pinned(invariant, optimized(), case) == fails


def test_a_pinned_replay_of_a_case_that_breaks_an_assumption_says_nothing() -> None:
    def claim(nondet: Nondet, _: Any) -> None:
        nondet.assume(nondet.flag("f") == 1)
        assert nondet.one_of("which", (1, 2)) == 1

    invariant = claimed(claim)
    for draws in ({"f": 0}, {"f": 2}, {"f": 1, "which": 2}):
        case = make_case("claim", "test", "test", "", list(draws.items()))
        for run in (replay, lambda i, c, s: replay_pinned(i, s, c)):
            with pytest.raises(Reject):
                run(invariant, case, optimized())
