"""Proofs over natural numbers: what they prove, and what they refuse."""

from functools import partial
from typing import Any

import pytest
import z3

from vapama.bugs.mistakes import MISTAKES
from vapama.impl.optimized import Optimized
from vapama.proofs.apart import apart
from vapama.proofs.completeness import completeness, smtlib, valid_by_cvc5
from vapama.proofs.naturals import Naturals
from vapama.proofs.prover import Options, prove, refute, replay_pinned
from vapama.runs import Guarded
from vapama.spec.domains import Domain
from vapama.spec.nondet import Claim, Invariant, Nondet, load_invariants
from vapama.spec.words import flag, ite, low_bits
from vapama.verdict import COUNTEREXAMPLE, PROVED, UNDECIDED, Verdict

SMALL = Domain(free=low_bits(4))


def verdict_on(claim: Claim) -> Verdict:
    invariant = Invariant(claim.__name__, claim, "a test", (), frozenset(), "", "", counts=True)
    return prove(invariant, Guarded("optimized", Optimized()), Options(twin=False))


def two(nondet: Nondet) -> tuple[int, int]:
    return nondet.word("a", SMALL), nondet.word("b", SMALL)


def _adds(nondet: Nondet, _: Any) -> None:
    a, b = two(nondet)
    if not (a + b >= a and a + b - b == a and max(a, b) <= a + b):
        raise AssertionError


def _chooses(nondet: Nondet, _: Any) -> None:
    a, b = two(nondet)
    less = flag(a < b)
    if not (ite(a < b, b, a) == max(a, b) and less ^ 1 == flag(b <= a)):
        raise AssertionError


@pytest.mark.parametrize("claim", [_adds, _chooses])
def test_what_is_true_of_all_numbers_is_proved(claim: Claim) -> None:
    verdict = verdict_on(claim)
    assert (verdict.status, verdict.why) == (PROVED, "")
    assert verdict.second_solver.startswith("valid")


def _grows(nondet: Nondet, _: Any) -> None:
    a, b = two(nondet)
    if not a + b > a:
        raise AssertionError


def test_what_is_false_of_some_is_refuted_on_ints() -> None:
    verdict = verdict_on(_grows)
    assert verdict.status == COUNTEREXAMPLE
    assert verdict.case is not None
    assert verdict.case.values()["b"] == 0


def _goes_below_zero(nondet: Nondet, _: Any) -> None:
    a, b = two(nondet)
    if a - b + b != a:
        raise AssertionError


def _looks_at_bits(nondet: Nondet, _: Any) -> None:
    a, b = two(nondet)
    if a & b > a:
        raise AssertionError


def _draws_more_than_numbers(nondet: Nondet, _: Any) -> None:
    nondet.word("aligned", Domain(free=0xFF0))


@pytest.mark.parametrize(
    ("claim", "why"),
    [
        (_goes_below_zero, "a difference may be negative"),
        (_looks_at_bits, "bits are asked for"),
        (_draws_more_than_numbers, "is not one of numbers up to some number"),
    ],
)
def test_what_words_and_numbers_do_not_share_is_undecided(claim: Claim, why: str) -> None:
    verdict = verdict_on(claim)
    assert verdict.status == UNDECIDED
    assert why in verdict.why


def test_paths_are_not_complete_to_cvc5_without_any_one_of_them() -> None:
    explorer = Naturals()
    paths = explorer.explore(lambda: _adds(explorer, None))
    assert valid_by_cvc5(smtlib(completeness(paths), "QF_LIA")) == "valid"
    for i in range(len(paths)):
        left = paths[:i] + paths[i + 1 :]
        assert valid_by_cvc5(smtlib(completeness(left), "QF_LIA")) == "not valid"


def test_cvc5_that_takes_too_long_does_not_know() -> None:
    x, y, z = z3.Ints("x y z")
    cubes = z3.Not(x * x * x + y * y * y + z * z * z == 114)
    assert valid_by_cvc5(smtlib(cubes, "QF_NIA"), 0.1) == "unknown"


COUNTING = [name for name, m in MISTAKES.items() if load_invariants()[m.breaks].counts]


@pytest.mark.parametrize("name", COUNTING)
def test_a_mistake_in_accounting_is_refuted_for_numbers_that_fail_when_pinned(name: str) -> None:
    invariant = load_invariants()[MISTAKES[name].breaks]
    verdict = apart(partial(refute, invariant, name))
    assert verdict.status == COUNTEREXAMPLE
    assert verdict.case is not None
    mistaken = Guarded(name, MISTAKES[name].subject())
    assert replay_pinned(invariant, mistaken, verdict.case) is not None
