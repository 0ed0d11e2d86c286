"""Cases: shrunk, written as JSON, read back, and replayed by every engine."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapama.bugs.mistakes import MISTAKES
from vapama.case import Case, load_case, make_case
from vapama.fuzz import atheris_engine, exhaustive, hypothesis_engine, random_engine
from vapama.fuzz.atheris_engine import encoded, plant
from vapama.fuzz.decoded import ByteDraws, RandomDraws, addressed, picked
from vapama.fuzz.exhaustive import Scripted
from vapama.proofs import prover
from vapama.replaying import FAILS, HOLDS, SAYS_NOTHING, replay_everywhere, status
from vapama.runs import Guarded, KnownDeparture, Replay, attempt, replay, shrink
from vapama.spec.domains import Domain
from vapama.spec.nondet import Invariant, Nondet, Reject, load_invariants
from vapama.spec.outcomes import NonCanonical, Outcome
from vapama.spec.subject import Capabilities
from vapama.subjects import SHORT_NAMES, load_subject
from vapama.verdict import COUNTEREXAMPLE, Verdict

Toy = Callable[..., Invariant]
Engine = Callable[[Invariant, Guarded], Verdict]
ENGINES: dict[str, Engine] = {
    "random": lambda invariant, subject: random_engine.run(invariant, subject, 60),
    "hypothesis": lambda invariant, subject: hypothesis_engine.run(invariant, subject, 5_000),
    "exhaustive": lambda invariant, subject: exhaustive.run(invariant, subject, 5),
    "atheris": lambda invariant, subject: atheris_engine.run([invariant], subject, 60)[0][0],
    "z3": lambda invariant, subject: prover.refute(invariant, subject.name.split(":")[1]),
}
WRONG = "mistake:write-disable-ignores-wp"
WALK = "the_walk_equals_the_reference"


def found(engine: str, mistake: str = WRONG) -> Case:
    """A Case found by an engine."""
    if engine == "atheris" and atheris_engine.unavailable():
        pytest.skip(atheris_engine.unavailable())
    verdict = ENGINES[engine](load_invariants()[WALK], load_subject(mistake))
    assert verdict.status == COUNTEREXAMPLE, verdict.why
    assert verdict.case is not None
    return verdict.case


# REPLAY


@pytest.mark.parametrize("engine", ENGINES)
def test_a_case_of_any_engine_fails_on_every_engine_and_holds_without_the_mistake(
    engine: str, tmp_path: Path
) -> None:
    case = found(engine)
    assert case.engine == engine
    path = case.save(tmp_path)
    answers = replay_everywhere(path)
    assert {name: answer.what for name, answer in answers.items()} == dict.fromkeys(
        ("hypothesis", "atheris", "exhaustive", "z3"), FAILS
    )
    for name in ("hypothesis", "atheris", "exhaustive"):
        assert answers[name].text == f"fails: {case.failure}"
    assert status(answers) == 1
    right = replay_everywhere(path, "optimized")
    assert {answer.what for answer in right.values()} == {HOLDS}
    assert status(right) == 0


def test_a_case_that_breaks_an_assumption_says_nothing_on_any_engine(tmp_path: Path) -> None:
    case = make_case("a_user_access_never_reaches_a_supervisor_page", WRONG, "hand", "", [])
    answers = replay_everywhere(case.save(tmp_path))
    assert {name: answer.what for name, answer in answers.items()} == dict.fromkeys(
        ("hypothesis", "atheris", "exhaustive", "z3"), SAYS_NOTHING
    )
    assert status(answers) == 3


@pytest.mark.parametrize(
    ("name", "value"), [("maxphyaddr", 60), ("cr0", 0), ("access", 7), ("guest.limit", 8)]
)
def test_a_case_with_a_value_that_no_draw_has_says_nothing(
    name: str, value: int, tmp_path: Path
) -> None:
    answers = replay_everywhere(make_case(WALK, WRONG, "hand", "", [(name, value)]).save(tmp_path))
    assert {answer.what for answer in answers.values()} == {SAYS_NOTHING}
    assert status(answers) == 3


def test_a_plain_subject_is_replayed_by_all_but_the_symbolic_engine(tmp_path: Path) -> None:
    answers = replay_everywhere(found("random").save(tmp_path), "compiled")
    assert list(answers) == ["hypothesis", "atheris", "exhaustive"]
    assert status(answers) == 0


class Sleepy:
    """Takes a second for an access, if it is let."""

    capabilities = Capabilities(observes=frozenset())

    def __init__(self) -> None:
        self.ended = 0

    def translate(self, cpu: Any, memory: Any, access: Any) -> Outcome:
        time.sleep(1)
        self.ended += 1
        return NonCanonical()


def test_a_subject_that_hangs_on_a_replay_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Sleepy()
    monkeypatch.setattr("vapama.replaying.HANG_SECONDS", 0.1)
    monkeypatch.setitem(SHORT_NAMES, "sleepy", lambda: subject)
    answers = replay_everywhere(make_case(WALK, "sleepy", "hand", "", []).save(tmp_path))
    assert {answer.what for answer in answers.values()} == {FAILS}
    assert all("hung" in answer.text for answer in answers.values())
    assert subject.ended == 0


# SHRINKING


@pytest.mark.parametrize(
    "mistake",
    [
        "mistake:a-user-page-needs-only-its-leaf",
        "mistake:a-key-has-three-bits",
        "mistake:the-frame-loses-its-top-bit",
        "mistake:dirty-is-forgotten",
        "mistake:canonical-is-one-bit-short",
    ],
)
def test_a_shrunk_case_fails_and_no_bit_of_it_can_be_dropped(mistake: str) -> None:
    invariant, subject = load_invariants()[WALK], load_subject(mistake)
    case = found("random", mistake)
    failure, run = replay(invariant, case, subject)
    assert failure is not None
    assert failure.message == case.failure
    # What it names is what a run draws, in that order.
    assert run.draws() == list(case.values().items())
    for name, value in case.values().items():
        for position in range(value.bit_length()):
            if value >> position & 1:
                fewer = case.values() | {name: value & ~(1 << position)}
                assert not fails_as_simply(invariant, fewer, subject, len(fewer)), (name, position)


def fails_as_simply(
    invariant: Invariant, values: dict[str, int], subject: Guarded, most_draws: int
) -> bool:
    run = Replay(values)
    try:
        failure = attempt(invariant, run, subject)
    except (Reject, KnownDeparture):
        return False
    return failure is not None and len(run.draws()) <= most_draws


def test_shrinking_keeps_to_what_makes_a_claim_fail(toy: Toy, reference: Guarded) -> None:
    def claim(nondet: Nondet, subject: Any) -> None:
        a, b, c = nondet.word("a"), nondet.word("b"), nondet.one_of("c", range(9))
        if nondet.flag("more"):
            nondet.word("d")
        assert not (a & 0x0F00 and b >= 1 << 40 and c in (5, 7)), "as it must"

    draws = [("a", 0xFFFF), ("b", (1 << 60) - 1), ("c", 7), ("more", 1), ("d", 9)]
    case = shrink(toy(claim), reference, draws, "hand")
    assert case is not None
    assert case.values() == {"a": 0x100, "b": 1 << 40, "c": 5, "more": 0}
    assert case.failure == "AssertionError: as it must"


def test_a_program_is_shrunk_to_the_steps_that_it_takes(toy: Toy, reference: Guarded) -> None:
    """Steps are left out and those after them move up, with whatever the others draw."""

    def claim(nondet: Nondet, subject: Any) -> None:
        level = 0
        for number in range(nondet.word("steps", Domain(free=63))):
            step = nondet.word(f"step {number}")
            level += step & 0xFF == 7 + level
        assert level < 3, "three in a row"

    steps = [5, 7, 0, 1 << 40 | 8, 1, 2, 3, 4, 9 | 1 << 60, 6, 6]
    draws = [("steps", 40), *((f"step {k}", value) for k, value in enumerate(steps))]
    case = shrink(toy(claim), reference, draws, "hand")
    assert case is not None
    assert case.values() == {"steps": 3, "step 0": 7, "step 1": 8, "step 2": 9}


def test_what_does_not_fail_is_not_shrunk_to_a_case(toy: Toy, reference: Guarded) -> None:
    def claim(nondet: Nondet, subject: Any) -> None:
        assert nondet.word("a") != 3

    assert shrink(toy(claim), reference, [("a", 4)], "hand") is None
    assert shrink(toy(claim), reference, [("a", 3)], "hand") is not None


# BYTES


@pytest.mark.parametrize(
    "name", [WALK, "rights_never_grow_down_the_walk", "five_levels_with_top_index_zero_equal_four"]
)
def test_the_bytes_of_a_case_decode_to_its_draws(name: str) -> None:
    invariant, subject = load_invariants()[name], load_subject("optimized")
    random, complete = RandomDraws(Random(5)), 0
    while complete < 200:
        random.trail.clear()
        try:
            attempt(invariant, random, subject)
        except Reject:
            continue
        complete += 1
        case = make_case(name, "optimized", "random", "", random.draws())
        for draws in (
            ByteDraws(encoded(invariant, case, subject)),
            Scripted(case.values()),
            Replay(case.values()),
        ):
            attempt(invariant, draws, subject)
            assert draws.draws() == random.draws()


def test_a_case_with_an_index_that_there_is_not_is_not_encoded(
    toy: Toy, reference: Guarded
) -> None:
    invariant = toy(lambda nondet, subject: nondet.one_of("option", "abc"))
    with pytest.raises(Reject):
        encoded(invariant, make_case("claim", "", "hand", "", [("option", 1 << 16)]), reference)


@given(st.binary(max_size=400), st.integers(1, 40), st.data())
def test_an_input_can_be_addressed_to_any_invariant(
    raw: bytes, count: int, data: st.DataObject
) -> None:
    which = data.draw(st.integers(0, count - 1))
    with_address = addressed(raw, which, count)
    assert picked(with_address, count) == which
    assert with_address[: len(raw)] == raw
    assert len(with_address) == len(raw) + 2


def test_inputs_are_spread_evenly_over_invariants() -> None:
    random, count = Random(0), 27
    hits = [0] * count
    for _ in range(count * 400):
        hits[picked(random.randbytes(300), count)] += 1
    assert min(hits) > 300
    assert max(hits) < 500


def test_a_corpus_begins_with_the_cases_given_and_random_inputs(tmp_path: Path) -> None:
    invariants, subject = list(load_invariants().values()), load_subject(WRONG)
    case = found("random")
    other = make_case("an_invariant_of_another_project", WRONG, "random", "", [])
    plant(tmp_path, invariants, subject, [other, case])
    planted = (tmp_path / "case-1").read_bytes()
    assert not (tmp_path / "case-0").exists()
    assert invariants[picked(planted, len(invariants))].name == WALK
    run = ByteDraws(planted)
    assert attempt(load_invariants()[WALK], run, subject) is not None
    assert run.draws() == list(case.values().items())
    assert sum(path.name.startswith("random") for path in tmp_path.iterdir()) == 100
    before = sorted(tmp_path.iterdir())
    plant(tmp_path, invariants, subject, [])
    assert sorted(tmp_path.iterdir()) == before


def test_atheris_runs_the_cases_it_is_given_first() -> None:
    if atheris_engine.unavailable():
        pytest.skip(atheris_engine.unavailable())
    mistake = "mistake:a-reserved-bit-of-a-large-page-is-missed"
    invariant, subject = load_invariants()[WALK], load_subject(mistake)
    refuted = prover.refute(invariant, mistake.removeprefix("mistake:"))
    assert refuted.case is not None
    (verdict,), _ = atheris_engine.run([invariant], subject, 60, seeds=[refuted.case])
    assert verdict.status == COUNTEREXAMPLE
    assert verdict.executions <= 200
    assert verdict.case is not None
    assert verdict.case.values() == refuted.case.values()


# JSON

cases = st.builds(
    make_case,
    invariant=st.text(min_size=1),
    subject=st.text(),
    engine=st.sampled_from([*ENGINES, "hand"]),
    failure=st.text(),
    draws=st.lists(
        st.tuples(st.text(), st.integers(0, (1 << 64) - 1)), unique_by=lambda draw: draw[0]
    ),
)


@given(case=cases)
def test_a_case_is_read_back_as_it_was_written(
    case: Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "case.json"
    path.write_bytes(case.to_json())
    assert load_case(path) == case
    assert (
        make_case(
            case.invariant,
            case.subject,
            case.engine,
            case.failure,
            list(load_case(path).values().items()),
        )
        == case
    )


def test_a_case_is_saved_under_the_name_of_its_invariant_and_content(tmp_path: Path) -> None:
    case = make_case(WALK, WRONG, "hand", "", [("access", 4)])
    other = make_case(WALK, WRONG, "hand", "", [("access", 2)])
    path = case.save(tmp_path)
    assert path.parent == tmp_path
    assert path.name.startswith(f"{WALK}-")
    assert path.suffix == ".json"
    assert load_case(path) == case
    assert case.save(tmp_path) == path
    assert other.save(tmp_path) != path


def test_a_case_has_the_same_name_in_every_process(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from vapama.case import make_case;"
        f"print(make_case({WALK!r}, '', '', '', [('access', 4)]).save(Path({str(tmp_path)!r})))"
    )
    names = {
        subprocess.check_output(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, text=True
        )
        for seed in ("1", "2")
    }
    assert len(names) == 1


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_names_an_invariant_and_fits_the_kernels(name: str) -> None:
    mistake = MISTAKES[name]
    assert mistake.breaks in load_invariants()
    assert mistake.source() != mistake.source().replace(mistake.after, mistake.before)
