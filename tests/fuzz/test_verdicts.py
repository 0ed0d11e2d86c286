"""What engines conclude: vacuity, known departures, exceptions, hangs, memory of failures."""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vapama.bugs.mistakes import MISTAKES
from vapama.fuzz import atheris_engine, exhaustive, hypothesis_engine, random_engine
from vapama.proofs import prover
from vapama.runs import Guarded, Replay, attempt
from vapama.spec.access import Access
from vapama.spec.domains import FLAG, Domain
from vapama.spec.nondet import Invariant, Nondet, Reject, load_invariants
from vapama.spec.outcomes import Translated
from vapama.spec.subject import Capabilities, NotCovered
from vapama.subjects import Reference, load_subject
from vapama.verdict import COUNTEREXAMPLE, HELD, NOT_APPLICABLE, UNDECIDED, Verdict

Toy = Callable[..., Invariant]
Engine = Callable[..., Verdict]

IN_PROCESS: dict[str, Engine] = {
    "random": lambda invariant, subject, hang=60.0: random_engine.run(
        invariant, subject, 0.05, hang_seconds=hang
    ),
    "hypothesis": lambda invariant, subject, hang=60.0: hypothesis_engine.run(
        invariant, subject, 200, hang_seconds=hang
    ),
    "exhaustive": lambda invariant, subject, hang=60.0: exhaustive.run(
        invariant, subject, 3, hang_seconds=hang
    ),
}
ENGINES: dict[str, Engine] = IN_PROCESS | {
    "z3": lambda invariant, subject: prover.prove(invariant, subject, prover.Options(twin=False))
}
every_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
every_concrete_engine = pytest.mark.parametrize("engine", IN_PROCESS.values(), ids=IN_PROCESS)
needs_atheris = pytest.mark.skipif(
    bool(atheris_engine.unavailable()), reason=atheris_engine.unavailable() or "it is there"
)
WALK = "the_walk_equals_the_reference"

# VACUITY


@every_engine
def test_a_label_never_reached_makes_a_claim_undecided(
    engine: Engine, toy: Toy, reference: Guarded
) -> None:
    def claim(nondet: Nondet, subject: Any) -> None:
        nondet.reach("one" if nondet.flag("f") == 1 else "zero")
        nondet.assume(nondet.flag("g") == 0)

    assert engine(toy(claim, ["one", "zero"]), reference).good
    verdict = engine(toy(claim, ["one", "two", "zero", "three"]), reference)
    assert verdict.status == UNDECIDED
    assert "two, three" in verdict.why
    assert "reache" in verdict.why


@every_engine
def test_assumptions_that_cannot_be_met_make_a_claim_undecided(
    engine: Engine, toy: Toy, reference: Guarded
) -> None:
    def claim(nondet: Nondet, subject: Any) -> None:
        nondet.assume((nondet.flag("f") == 1) & (nondet.flag("g") == 2))
        nondet.reach("here")

    verdict = engine(toy(claim, ["here"]), reference)
    assert verdict.status == UNDECIDED, verdict


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(
            engine,
            id=name,
        )
        for name, engine in ENGINES.items()
    ],
)
def test_a_claim_that_no_run_met_without_labels_is_undecided_too(
    engine: Engine, toy: Toy, reference: Guarded
) -> None:
    verdict = engine(toy(lambda nondet, subject: nondet.assume(False)), reference)
    assert verdict.status == UNDECIDED, verdict


SUBJECTS = """
from vapama.spec.outcomes import PageFault
from vapama.spec.subject import PA, Capabilities


class Refusing:
    capabilities = Capabilities(observes=frozenset({PA}))

    def translate(self, cpu, memory, access):
        return PageFault(0)


class Hanging(Refusing):
    def translate(self, cpu, memory, access):
        while access.user:
            pass
        return PageFault(0)
"""


@pytest.fixture
def in_a_folder_with_subjects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_subjects.py").write_text(SUBJECTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@needs_atheris
@pytest.mark.usefixtures("in_a_folder_with_subjects")
def test_a_label_never_reached_makes_a_claim_undecided_for_atheris() -> None:
    subject = load_subject("some_subjects:Refusing")
    invariant = load_invariants()["a_physical_address_is_within_maxphyaddr"]
    (verdict,), _ = atheris_engine.run([invariant], subject, seconds=2)
    assert (verdict.status, verdict.why) == (UNDECIDED, "never reached: translated")


# HANGS AND EXCEPTIONS


class Bad(Reference):
    """Does something bad to every user access."""

    capabilities = Capabilities(observes=Reference.capabilities.observes)

    def __init__(self, bad: Callable[[], object]) -> None:
        self.bad = bad

    def translate(self, cpu: Any, memory: Any, access: Access) -> Any:
        return self.bad() if access.user else Reference.translate(cpu, memory, access)


def raises() -> None:
    raise ZeroDivisionError("no such thing\nas this")


def spins() -> None:
    while True:
        pass


def swallows() -> None:
    try:
        time.sleep(100)
    except Exception:
        time.sleep(100)


@every_concrete_engine
def test_a_subject_that_raises_is_told_with_its_exception(engine: Engine) -> None:
    verdict = engine(load_invariants()[WALK], Guarded("raises", Bad(raises)))
    assert verdict.status == COUNTEREXAMPLE
    assert verdict.why == "the subject raised ZeroDivisionError: no such thing"
    assert verdict.case is not None
    assert verdict.case.failure == verdict.why


@every_concrete_engine
@pytest.mark.parametrize("bad", [spins, swallows])
def test_a_subject_that_hangs_is_told_with_the_case_it_hung_on(
    engine: Engine, bad: Callable[[], object]
) -> None:
    verdict = engine(load_invariants()[WALK], Guarded("hangs", Bad(bad)), hang=1.0)
    assert verdict.status == COUNTEREXAMPLE
    assert verdict.why == "the subject hung: no result within 1 s"
    assert verdict.case is not None
    assert verdict.case.values()["access"] & 4


@needs_atheris
@pytest.mark.usefixtures("in_a_folder_with_subjects")
def test_a_subject_that_hangs_under_atheris_is_told_with_the_case_it_hung_on() -> None:
    subject = load_subject("some_subjects:Hanging")
    invariant = load_invariants()["a_physical_address_is_within_maxphyaddr"]
    (verdict,), _ = atheris_engine.run([invariant], subject, seconds=60, hang_seconds=1)
    assert verdict.status == COUNTEREXAMPLE
    assert verdict.why == "the subject hung: no result within 1 s"
    assert verdict.case is not None
    assert verdict.case.values()["access"] & 4


class Slow(Reference):
    """Takes its time, over so many accesses in all."""

    def __init__(self) -> None:
        self.left = 60

    def translate(self, cpu: Any, memory: Any, access: Access) -> Any:
        self.left -= 1
        time.sleep(0.02 if self.left > 0 else 0)
        return Reference.translate(cpu, memory, access)


@pytest.mark.parametrize("engine", [IN_PROCESS["random"], IN_PROCESS["exhaustive"]])
def test_a_subject_that_is_slow_is_not_taken_to_hang(engine: Engine) -> None:
    verdict = engine(load_invariants()[WALK], Guarded("slow", Slow()), hang=1.0)
    assert verdict.good, verdict.why


@every_concrete_engine
@pytest.mark.parametrize("garbage", [None, "0x1000", (0x1000, 1, ()), Translated])
def test_a_subject_that_returns_no_outcome_does_not_agree(engine: Engine, garbage: Any) -> None:
    verdict = engine(load_invariants()[WALK], Guarded("garbage", Bad(lambda: garbage)))
    assert verdict.status == COUNTEREXAMPLE, verdict


@pytest.mark.parametrize(
    "name", ["who_may_write_may_read", "a_walk_ends_after_at_most_one_load_a_level"]
)
def test_a_subject_that_returns_no_outcome_fails_whatever_the_claim(name: str) -> None:
    subject = Guarded("garbage", Bad(lambda: None))
    verdict = random_engine.run(load_invariants()[name], subject, 0.05)
    assert verdict.status == COUNTEREXAMPLE, verdict


# KNOWN DEPARTURES


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(
            engine,
            id=name,
        )
        for name, engine in IN_PROCESS.items()
    ],
)
def test_known_departures_are_counted_and_do_not_fail(engine: Engine, departing: type[Any]) -> None:
    verdict = engine(load_invariants()[WALK], Guarded("departing", departing()))
    assert verdict.status == HELD, verdict.why
    assert set(verdict.known) == {"users-are-refused"}
    assert 0 < verdict.known["users-are-refused"] < verdict.executions


@every_concrete_engine
def test_other_differences_of_a_subject_with_known_departures_fail(
    engine: Engine, departing: type[Any]
) -> None:
    subject = Guarded("departing", departing(lambda access: access.write == 1))
    verdict = engine(load_invariants()[WALK], subject)
    assert verdict.status == COUNTEREXAMPLE
    assert verdict.case is not None
    assert verdict.case.values()["access"] == 2


# HYPOTHESIS REMEMBERS


def test_hypothesis_without_a_seed_remembers_a_failure_and_tries_it_first(
    toy: Toy, reference: Guarded, tmp_path: Path
) -> None:
    def claim(nondet: Nondet, subject: Any) -> None:
        assert nondet.word("a") >> 60 != 9

    def search(examples: int, seed: int | None = None) -> Verdict:
        return hypothesis_engine.run(toy(claim), reference, examples, seed, database=tmp_path)

    assert search(1).status == HELD
    assert search(2_000).status == COUNTEREXAMPLE
    assert search(1).status == COUNTEREXAMPLE
    assert search(1, seed=0).status == HELD
    assert any(tmp_path.iterdir())


def test_hypothesis_begins_with_the_cases_given() -> None:
    mistake = MISTAKES["two-no-executes-cancel"]
    invariant, subject = load_invariants()[mistake.breaks], Guarded("wrong", mistake.subject())
    found = random_engine.run(invariant, subject, 60)
    assert found.case is not None
    verdict = hypothesis_engine.run(invariant, subject, 1, explicit=[found.case])
    assert (verdict.status, verdict.executions) == (COUNTEREXAMPLE, 1)
    assert hypothesis_engine.run(invariant, subject, 1).status != COUNTEREXAMPLE


def test_drawing_from_a_new_list_every_time_costs_no_memory(toy: Toy, reference: Guarded) -> None:
    invariant = toy(lambda nondet, subject: nondet.words([("a", FLAG), ("b", FLAG)]))
    search = random_engine.Search(invariant, reference, 0)
    groups = search.nondet.groups
    before = len(groups)
    search.batch(2000)
    assert len(groups) < before + 100


def test_an_engine_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    invariants = list(load_invariants().values())[:2]
    verdicts, _ = atheris_engine.run(invariants, load_subject("reference"), seconds=60)
    assert [verdict.status for verdict in verdicts] == [NOT_APPLICABLE] * 2
    assert "pip install" in verdicts[0].why


class Counter:
    """A part of a subject with a state of its own."""

    stateful = True

    def __init__(self) -> None:
        self.count = 0

    def add(self, number: int) -> int:
        if number == 3:
            raise ZeroDivisionError("three")
        if number == 5:
            raise NotCovered("five")
        self.count += number
        return self.count


class Counting(Reference):
    def counter(self) -> Counter:
        return Counter()


def _what_counts_grows(nondet: Nondet, subject: Any) -> None:
    number = nondet.word("number", Domain(among=tuple(range(8))))
    counter = subject.counter()
    assert counter.add(number) == counter.count == number
    nondet.reach(f"{number}")


def test_what_a_stateful_part_of_a_subject_raises_is_the_subjects(toy: Toy) -> None:
    verdict = random_engine.run(toy(_what_counts_grows), Guarded("counting", Counting()), 0.05)
    assert verdict.status == COUNTEREXAMPLE
    assert verdict.why == "the subject raised ZeroDivisionError: three"


def test_what_a_stateful_part_of_a_subject_does_not_cover_is_rejected(toy: Toy) -> None:
    invariant, subject = toy(_what_counts_grows), Guarded("counting", Counting())
    with pytest.raises(Reject):
        attempt(invariant, Replay({"number": 5}), subject)
    assert attempt(invariant, Replay({"number": 4}), subject) is None
