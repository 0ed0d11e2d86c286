"""The pytest plugin: an invariant an item, for the implementations asked for."""

import subprocess
import sys
from pathlib import Path

from vapama.case import load_case
from vapama.spec.nondet import load_invariants
from vapama.spec.subject import ERROR_CODE, LEVEL, PA, TRANSLATE

PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-ra")


def run(*options: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python, *PYTEST, *options], capture_output=True, text=True, check=False
    )


OBSERVED = [
    invariant
    for invariant in load_invariants().values()
    if invariant.needs <= {TRANSLATE, PA, LEVEL, ERROR_CODE}
]


def test_a_right_subject_passes_what_it_observes_and_skips_the_rest(folder: Path) -> None:
    result = run("--vapama-subject", "mmus:Right", "--vapama-examples", "400")
    assert result.returncode == 0, result.stdout
    passed, skipped = len(OBSERVED), len(load_invariants()) - len(OBSERVED)
    assert passed > 15
    assert skipped > 3
    assert f"{passed} passed, {skipped} skipped" in result.stdout
    assert "mmus:Right does not observe updates" in result.stdout


def test_a_wrong_subject_fails_with_the_case(folder: Path) -> None:
    result = run(
        "--vapama-subject", "mmus:Wrong", "-k", "the_walk_equals", "--vapama-examples", "2000"
    )
    assert result.returncode == 1
    assert "1 failed" in result.stdout
    assert "counterexample: assert agree(expected, observed" in result.stdout
    start = result.stdout.index('{\n "format"')
    case = folder / "case.json"
    case.write_text(result.stdout[start : result.stdout.index("\n}", start) + 2])
    assert load_case(case).subject == "mmus:Wrong"
    assert "Traceback" not in result.stdout


def test_an_invariant_is_an_item_for_each_subject_besides_the_projects_own_tests(
    folder: Path,
) -> None:
    (folder / "test_own.py").write_text("def test_mine(): pass\n")
    subjects = ("--vapama-subject", "mmus:Right", "--vapama-subject", "reference")
    result = run(*subjects, "--collect-only", "-q")
    assert "test_own.py::test_mine" in result.stdout
    assert result.stdout.count("::") >= 2 * len(load_invariants()) + 1
    for name in load_invariants():
        assert f"mmus:Right::{name}" in result.stdout
        assert f"reference::{name}" in result.stdout
    plain = run("--collect-only", "-q")
    assert plain.stdout.splitlines()[0] == "test_own.py::test_mine"
    assert plain.stdout.count("::") == 1


def test_a_subject_that_cannot_be_had_is_a_usage_error_in_one_line(folder: Path) -> None:
    result = run("--vapama-subject", "mmus:missing")
    assert result.returncode == 4
    assert result.stderr.strip() == (
        "ERROR: --subject mmus:missing: AttributeError: module 'mmus' has no attribute 'missing'"
    )


def test_without_the_option_nothing_of_the_package_is_imported(folder: Path) -> None:
    (folder / "test_own.py").write_text(
        "import sys\n"
        "def test_mine():\n"
        "    assert 'vapama_pytest' in sys.modules\n"
        "    assert 'vapama' not in sys.modules\n"
    )
    result = run()
    assert result.returncode == 0, result.stdout


def test_python_without_asserts_is_refused(folder: Path) -> None:
    result = run("--vapama-subject", "mmus:Wrong", "-k", "the_walk_equals", python=("-O",))
    assert result.returncode == 4
    assert "without -O" in result.stderr
