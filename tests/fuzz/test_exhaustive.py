"""The exhaustive engine runs every case of its scope, once, and says so if it does not."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from vapama.fuzz import exhaustive
from vapama.runs import Guarded
from vapama.spec.domains import ENTRY, MAXPHYADDR, Domain
from vapama.spec.nondet import Invariant, Nondet
from vapama.verdict import COUNTEREXAMPLE, HELD, UNDECIDED

Toy = Callable[..., Invariant]


def test_every_combination_of_choices_is_run_once(toy: Toy, reference: Guarded) -> None:
    seen: Counter[tuple[object, ...]] = Counter()

    def claim(nondet: Nondet, subject: Any) -> None:
        a = nondet.one_of("a", "xyz")
        width = nondet.word("width", Domain(among=MAXPHYADDR.among))
        more = nondet.flag("more")
        seen[a, width, more, nondet.one_of("b", (1, 2)) if more else 0] += 1

    verdict = exhaustive.run(toy(claim), reference)
    assert verdict.status == HELD
    assert verdict.executions == 3 * 21 * (1 + 2)
    assert set(seen) == {
        (a, width, *rest)
        for a in "xyz"
        for width in range(32, 53)
        for rest in ((0, 0), (1, 1), (1, 2))
    }
    assert set(seen.values()) == {1}


@pytest.mark.parametrize(
    ("domain", "width", "values"),
    [
        (ENTRY, 3, ENTRY.scope[:3]),
        (ENTRY, None, ENTRY.scope),
        (Domain(free=0xF0, fixed=1), None, (0x01, 0xF1)),
        (Domain(among=(5, 3, 4)), 2, (5, 3, 4)),
        (Domain(free=0, fixed=7), 5, (7,)),
    ],
)
def test_a_draw_takes_the_first_representatives_of_its_domain(
    toy: Toy, reference: Guarded, domain: Domain, width: int | None, values: tuple[int, ...]
) -> None:
    seen = []
    verdict = exhaustive.run(
        toy(lambda nondet, subject: seen.append(nondet.word("word", domain))), reference, width
    )
    assert tuple(seen) == values
    assert verdict.executions == len(values)


def test_the_one_failing_case_is_found(toy: Toy, reference: Guarded) -> None:
    def claim(nondet: Nondet, subject: Any) -> None:
        a, b = nondet.one_of("a", range(4)), nondet.word("b", Domain(among=(10, 11, 12)))
        assert (a, b) != (2, 11), "two and eleven"

    verdict = exhaustive.run(toy(claim), reference)
    assert verdict.status == COUNTEREXAMPLE
    assert verdict.why == "AssertionError: two and eleven"
    assert verdict.case is not None
    assert verdict.case.values() == {"a": 2, "b": 11}
    assert verdict.executions == 2 * 3 + 2


def test_assumptions_cut_cases_and_not_their_neighbours(toy: Toy, reference: Guarded) -> None:
    seen = []

    def claim(nondet: Nondet, subject: Any) -> None:
        a, b = nondet.one_of("a", range(3)), nondet.one_of("b", range(3))
        nondet.assume(a != b)
        seen.append((a, b, nondet.flag("c")))

    exhaustive.run(toy(claim), reference)
    assert seen == [(a, b, c) for a in range(3) for b in range(3) if a != b for c in (0, 1)]


def test_states_met_before_are_explored_once(toy: Toy, reference: Guarded) -> None:
    steps, visits = 8, Counter[int]()

    def machine(nondet: Nondet, subject: Any, prune: bool) -> None:
        state = 0
        for step in range(steps):
            state = (
                state * nondet.one_of(f"times {step}", (1, 2)) + nondet.flag(f"add {step}")
            ) % 7
            visits[state] += 1
            if prune:
                nondet.seen((step, state))

    pruned = exhaustive.run(toy(lambda n, s: machine(n, s, prune=True)), reference)
    reached, visits = set(visits), Counter()
    full = exhaustive.run(toy(lambda n, s: machine(n, s, prune=False)), reference)
    assert full.executions == 4**steps
    assert pruned.executions < 4 * 7 * steps
    assert reached == set(visits) == set(range(7))
    # One step leads to 0 and 1, two to 0..3, and so on: 2 + 4 + 7 * 6.
    assert pruned.detail == f"all {pruned.executions} cases of width None, 48 states"
    assert pruned.states == 48


class Walker:
    """A position on a circle; a careless one shares it with its clones."""

    def __init__(self, place: list[int], careless: bool) -> None:
        self.place, self.careless, self.steps = place, careless, 0

    def clone(self) -> "Walker":
        twin = Walker(self.place if self.careless else self.place.copy(), self.careless)
        twin.steps = self.steps
        return twin


def walked(toy: Toy, reference: Guarded, keeps: bool, careless: bool) -> tuple[Any, int]:
    """Where all runs of a walker end, with their draws, and how many steps that takes."""
    ends: list[Any] = []
    steps = 0

    def claim(nondet: Any, subject: Any) -> None:
        nonlocal steps
        walker = nondet.begun(lambda: Walker([nondet.one_of("start", (0, 5))], careless))
        while walker.steps < 4:
            steps += 1
            walker.place[0] = (walker.place[0] + nondet.one_of(f"{walker.steps}", (1, 3, 7))) % 40
            walker.steps += 1
            nondet.seen((walker.place[0], walker.steps))
            if keeps:
                nondet.kept(walker)
        ends.append((walker.place[0], nondet.draws()))

    exhaustive.run(toy(claim), reference)
    return ends, steps


def test_runs_go_on_from_what_was_kept_as_if_made_anew(toy: Toy, reference: Guarded) -> None:
    anew, many = walked(toy, reference, keeps=False, careless=False)
    onward, few = walked(toy, reference, keeps=True, careless=False)
    assert onward == anew
    assert few < many / 2
    careless, _ = walked(toy, reference, keeps=True, careless=True)
    assert careless != anew


def test_states_are_explored_again_only_with_more_steps_left(toy: Toy, reference: Guarded) -> None:
    runs: list[str] = []

    def claim(nondet: Nondet, subject: Any) -> None:
        left = nondet.one_of("length", (2, 1, 3))
        new = nondet.seen("same", left)
        runs.append(f"{left} {new}")
        assert nondet.first("same") == (len(runs) == 1)

    exhaustive.run(toy(claim), reference)
    assert runs == ["2 True", "3 False"]


def test_a_mistake_that_only_a_long_run_shows_is_found_among_pruned_states(
    toy: Toy, reference: Guarded
) -> None:
    def claim(nondet: Nondet, subject: Any) -> None:
        position = 0
        for step in range(12):
            position += nondet.one_of(f"step {step}", (0, 1, -1))
            assert position < 9
            nondet.seen((step, position))

    verdict = exhaustive.run(toy(claim), reference)
    assert verdict.status == COUNTEREXAMPLE
    assert verdict.executions < 3 * 12 * 25


def test_a_scope_too_large_is_undecided(toy: Toy, reference: Guarded) -> None:
    invariant = toy(lambda nondet, subject: nondet.one_of("a", range(101)))
    verdict = exhaustive.run(invariant, reference, most_runs=100)
    assert (verdict.status, verdict.executions) == (UNDECIDED, 100)
    assert verdict.why == "more than 100 cases: give a larger --budget"
    assert exhaustive.run(invariant, reference, most_runs=101).status == HELD


def test_an_invariant_with_a_state_of_its_own_is_undecided(toy: Toy, reference: Guarded) -> None:
    options = iter(range(2, 100))

    def claim(nondet: Nondet, subject: Any) -> None:
        nondet.one_of("a", range(next(options)))
        nondet.one_of("b", range(2))

    verdict = exhaustive.run(toy(claim), reference)
    assert verdict.status == UNDECIDED
    assert "it has state of its own" in verdict.why
