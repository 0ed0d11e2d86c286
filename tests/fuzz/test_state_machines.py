"""Hypothesis state machines of the hypervisor: they hold, find mistakes, and tell them by steps."""

import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from vapama.bugs.mistakes import MISTAKES
from vapama.case import BadInput
from vapama.replaying import explain_case
from vapama.runs import Guarded
from vapama.spec import steps
from vapama.state_machines import PLAIN, SHARING, kinds, machine_of
from vapama.subjects import load_subject

SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    stateful_step_count=20,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)

TestHypervisor = machine_of("optimized").TestCase
TestHypervisor.settings = settings(SETTINGS, max_examples=20)


TestSharing = machine_of("optimized", SHARING).TestCase
TestSharing.settings = settings(SETTINGS, max_examples=10)


def failure(name: str, most: int, *, shrunk: bool) -> tuple[Exception, str]:
    """What a state machine says of a subject with a mistake: what failed, and its program."""
    machine = machine_of(Guarded(f"mistake:{name}", MISTAKES[name].subject()))
    phases = (Phase.generate, Phase.shrink) if shrunk else (Phase.generate,)
    chosen = settings(SETTINGS, max_examples=most, phases=phases, report_multiple_bugs=False)
    with pytest.raises(AssertionError) as raised:
        run_state_machine_as_test(machine, settings=chosen)
    return raised.value, "\n".join(raised.value.__notes__)


def test_a_program_that_fails_is_shrunk_and_told_in_steps(tmp_path: Path) -> None:
    error, told = failure("flags-are-set-in-the-wrong-word", 400, shrunk=True)
    program = [line for line in told.splitlines() if line.startswith("state.")]
    assert program[0].startswith("state.power_on(power=")
    assert program[-1] == "state.teardown()"
    made = program[1:-1]
    assert 1 <= len(made) <= 4
    assert all(re.fullmatch(r"state\.\w+\(step=(guest|host).*\)", line) for line in made), made

    # The Case that is noted is of this program.
    (case,) = re.findall("^as a Case: (.*)$", told, re.MULTILINE)
    (tmp_path / "case.json").write_text(case)
    lines = list(explain_case(tmp_path / "case.json"))
    assert [line.split("   ", 1)[1] for line in lines if line.startswith("step ")] == [
        line.split("step=", 1)[1][:-1] for line in made
    ]
    assert lines[-1] == f"the claim fails: {type(error).__name__}: {error}"
    assert list(explain_case(tmp_path / "case.json", "optimized"))[-1] == "the claim holds"


def test_state_machines_find_mistakes_of_a_second_stage() -> None:
    failure("a-notifier-leaves-the-second-stage-alone", 400, shrunk=False)


def test_every_kind_of_step_has_a_rule() -> None:
    every = {kind.__name__.lower() for kind in get_args(steps.Step)} - {"rest"}
    assert kinds(PLAIN).keys() | kinds(SHARING).keys() == every
    assert "scan" in kinds(SHARING)


def test_a_subject_without_a_hypervisor_has_no_state_machine() -> None:
    with pytest.raises(BadInput, match="has no hypervisor"):
        machine_of(load_subject("reference"))
