"""Subjects that misbehave end in a clear line, a Case, and the documented status."""

import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vapama.case import load_case
from vapama.fuzz import atheris_engine
from vapama.jobs import Event, Job, run_jobs
from vapama.verdict import BUDGETS

Vapama = Callable[..., Any]
CLAIM = "who_may_write_may_read"
WALK = "the_walk_equals_the_reference"
CONCRETE = "exhaustive,random,hypothesis"


def check(vapama: Vapama, subject: str, *options: str, name: str = WALK) -> Any:
    engines = ("--engines", CONCRETE) if "--engines" not in options else ()
    result = vapama("check", name, "--budget", "quick", "--subject", subject, *engines, *options)
    assert "Traceback" not in result.out + result.err
    return result


def told(out: str, what: str) -> set[str]:
    """The reasons given for verdicts of a kind, one line each."""
    lines = [line for line in out.splitlines() if line.startswith(f"{what} ")]
    return {line.split(": ", 1)[1] for line in lines}


def test_a_right_subject_of_somebody_elses_holds(vapama: Vapama) -> None:
    result = check(vapama, "mmus:Right", name=CLAIM)
    assert (result.status, result.err) == (0, "")
    assert result.out.splitlines()[-1] == "ALL HELD 1 invariants at budget quick: 3 held"


def test_a_subject_that_raises_is_a_counterexample(vapama: Vapama, folder: Path) -> None:
    result = check(vapama, "mmus:Raises")
    assert result.status == 1
    why = "the subject raised ZeroDivisionError: the walk divides by nothing"
    assert told(result.out, "counterexample") == {why}
    for path in (folder / "vapama-cases").iterdir():
        assert load_case(path).failure == why
        assert f"the claim fails: {why}" in vapama("explain", path).out
        assert vapama("replay", path).status == 1


def test_explain_shows_the_walk_that_a_subject_raised_on(vapama: Vapama, folder: Path) -> None:
    check(vapama, "mmus:Raises", "--engines", "exhaustive")
    (path,) = (folder / "vapama-cases").iterdir()
    assert "access   supervisor read at" in vapama("explain", path).out


@pytest.mark.parametrize(
    ("subject", "shown"), [("ReturnsNone", "None"), ("ReturnsText", "'0x1000'")]
)
def test_a_subject_that_returns_no_outcome_is_a_counterexample(
    vapama: Vapama, folder: Path, subject: str, shown: str
) -> None:
    result = check(vapama, f"mmus:{subject}", name="a_walk_ends_after_at_most_one_load_a_level")
    assert result.status == 3
    result = check(vapama, f"mmus:{subject}")
    assert result.status == 1
    why = f"the subject raised nothing, but returned {shown}, which is not an outcome"
    assert told(result.out, "counterexample") == {why}
    for path in (folder / "vapama-cases").iterdir():
        assert vapama("explain", path).status == 0


@pytest.mark.parametrize("subject", ["mmus:Sleeps", "mmus:Spins"])
def test_a_subject_that_hangs_is_a_counterexample(
    vapama: Vapama, folder: Path, subject: str
) -> None:
    result = check(vapama, subject, "--hang", "0.5")
    assert result.status == 1
    assert told(result.out, "counterexample") == {"the subject hung: no result within 0.5 s"}
    assert any((folder / "vapama-cases").iterdir())


def test_a_subject_that_exits_is_a_counterexample(vapama: Vapama) -> None:
    result = check(vapama, "mmus:Exits")
    assert result.status == 1
    assert told(result.out, "counterexample") == {"the subject raised SystemExit: 0"}


@pytest.mark.parametrize("engine", ["random", "atheris"])
def test_a_subject_that_takes_its_process_down_is_undecided(vapama: Vapama, engine: str) -> None:
    if engine == "atheris" and atheris_engine.unavailable():
        pytest.skip(atheris_engine.unavailable())
    result = check(vapama, "mmus:Dies", "--engines", engine)
    assert result.status == 3
    (why,) = told(result.out, "undecided")
    assert "ended with status -9" in why


@pytest.mark.parametrize(
    "subject",
    [
        "mmus:Greets",
        pytest.param(
            "mmus:Chatters",
        ),
    ],
)
def test_a_worker_says_nothing_but_events(folder: Path, subject: str) -> None:
    job = Job(engine="random", subject=subject, invariants=(CLAIM,), budget=BUDGETS["quick"])
    worker = subprocess.run(
        [sys.executable, "-m", "vapama.worker"],
        input=msgspec.json.encode(job),
        capture_output=True,
        check=True,
    )
    events = [msgspec.json.decode(line, type=Event) for line in worker.stdout.splitlines()]
    verdicts = [event.verdict for event in events if event.verdict is not None]
    assert [verdict.good for verdict in verdicts] == [True]
    assert events[-1].finished


def test_json_is_all_that_is_printed_if_it_is_asked_for(vapama: Vapama) -> None:
    assert json.loads(check(vapama, "mmus:Greets", "--json", name=CLAIM).out)["exit_status"] == 0


def test_workers_leave_no_pipe_open(folder: Path) -> None:
    job = Job(engine="random", subject="reference", invariants=(CLAIM,), budget=BUDGETS["quick"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        run_jobs([job], lambda job, event: None)
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


# INVARIANTS OF ONE'S OWN

RAISING = '''
from vapama.spec.nondet import invariant


@invariant(source="nowhere")
def a_claim_with_a_mistake_of_its_own(nondet, subject):
    """It looks up what is not there."""
    nondet.flag("f")
    {}["nothing"]
'''
ADDED = """
import vapama.spec.invariants

vapama.spec.invariants.__path__.append({!r})
"""


@pytest.mark.parametrize(
    "engine",
    [
        *("random", "hypothesis", "exhaustive", "z3"),
        pytest.param(
            "atheris",
        ),
    ],
)
def test_an_invariant_that_raises_is_undecided_in_one_line(folder: Path, engine: str) -> None:
    if engine == "atheris" and atheris_engine.unavailable():
        pytest.skip(atheris_engine.unavailable())
    (folder / "more").mkdir()
    (folder / "more" / "own.py").write_text(RAISING)
    (folder / "sitecustomize.py").write_text(ADDED.format(str(folder / "more")))
    result = subprocess.run(
        [
            *(sys.executable, "-m", "vapama.cli", "check", "a_claim_with_a_mistake_of_its_own"),
            *("--engines", engine, "--budget", "quick", "--subject", "optimized"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(folder), "HOME": str(folder)},
    )
    assert "Traceback" not in result.stdout + result.stderr
    assert result.returncode == 3, result
    (why,) = told(result.stdout, "undecided")
    assert "KeyError: 'nothing'" in why


REMEMBERING = '''
from vapama.spec.nondet import invariant

RUN = []


@invariant(source="nowhere")
def a_claim_that_remembers(nondet, subject):
    """It raises if another ran before it in its process."""
    if "another" in RUN:
        raise RuntimeError("not the first")
    RUN.append("this")
    nondet.flag("f")


@invariant(source="nowhere")
def another_claim_that_remembers(nondet, subject):
    """The same, the other way round."""
    if "this" in RUN:
        raise RuntimeError("not the first")
    RUN.append("another")
    nondet.flag("f")
'''


@pytest.mark.parametrize(("engine", "apart"), [("z3", True), ("exhaustive", False)])
def test_each_proof_finds_its_process_as_if_it_were_the_first(
    folder: Path, engine: str, apart: bool
) -> None:
    (folder / "more").mkdir()
    (folder / "more" / "own.py").write_text(REMEMBERING)
    (folder / "sitecustomize.py").write_text(ADDED.format(str(folder / "more")))
    claims = ("a_claim_that_remembers", "another_claim_that_remembers")
    job = Job(engine=engine, subject="optimized", invariants=claims, budget=BUDGETS["quick"])
    worker = subprocess.run(
        [sys.executable, "-m", "vapama.worker"],
        input=msgspec.json.encode(job),
        capture_output=True,
        check=True,
        env={"PYTHONPATH": str(folder), "HOME": str(folder)},
    )
    events = [msgspec.json.decode(line, type=Event) for line in worker.stdout.splitlines()]
    why = [event.verdict.why for event in events if event.verdict is not None]
    assert len(why) == 2
    assert ("not the first" not in why[1]) == apart
