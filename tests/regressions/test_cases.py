"""Each Case in this folder is a test: its claim holds of the kernels.

If the subject that it was found on is a seeded mistake, the Case must still fail on that.
"""

from pathlib import Path

import pytest

from vapama.case import load_case
from vapama.replaying import FAILS, HOLDS, SAYS_NOTHING, replay_everywhere
from vapama.spec.nondet import load_invariants
from vapama.subjects import load_subject

CASES = sorted(Path(__file__).parent.glob("*.json"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@pytest.mark.parametrize("subject", ["optimized", "compiled", "reference"])
def test_a_case_holds_on(subject: str, path: Path) -> None:
    invariant = load_invariants()[load_case(path).invariant]
    if lacking := load_subject(subject).lacks(invariant):
        pytest.skip(f"{subject} does not observe {', '.join(sorted(lacking))}")
    answers = replay_everywhere(path, subject)
    what = {answer.what for answer in answers.values()}
    if subject == "compiled" and what == {SAYS_NOTHING}:
        pytest.skip("compiled makes no image of a memory as large as the Case's")
    assert what == {HOLDS}, answers


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_case_keeps_its_teeth(path: Path) -> None:
    case = load_case(path)
    if not case.subject.startswith("mistake:"):
        pytest.skip(f"it was found on {case.subject}, which is mended")
    answers = replay_everywhere(path)
    assert {answer.what for answer in answers.values()} == {FAILS}, answers


def test_there_are_cases() -> None:
    assert CASES
