"""What the commands do, say and exit with, when their input is good."""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vapama.bugs.mistakes import MISTAKES
from vapama.case import load_case
from vapama.fuzz import atheris_engine
from vapama.spec.nondet import load_invariants
from vapama.subjects import SHORT_NAMES

Vapama = Callable[..., Any]
CLAIM = "who_may_write_may_read"
WALK = "the_walk_equals_the_reference"
QUICK = ("--engines", "exhaustive", "--budget", "quick")
WRONG = "mistake:ac-exempts-implicit-accesses"


# CHECK


def test_check_says_that_all_held_and_exits_with_0(vapama: Vapama, folder: Path) -> None:
    engines = ("--engines", "random,exhaustive", "--budget", "quick")
    result = vapama("check", CLAIM, "without_keys_no_fault_blames_one", *engines)
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[-1].startswith("ALL HELD 2 invariants at budget quick: ")
    assert lines[-1].endswith(" held")
    assert {"exhaustive", "random", "compiled"} <= set(lines[0].split())
    assert {"who may write may read", "without keys no fault blames one"} <= set(lines)
    assert not (folder / "vapama-cases").exists()


def test_check_says_where_a_counterexample_is_and_exits_with_1(
    vapama: Vapama, folder: Path
) -> None:
    result = vapama("check", CLAIM, WALK, *QUICK, "--subject", WRONG)
    assert result.status == 1
    (told,) = [line for line in result.out.splitlines() if line.startswith("counterexample")]
    assert told == f"counterexample {WALK} (exhaustive): {AGREE}"
    (path,) = (folder / "vapama-cases").iterdir()
    assert f"  replay it: vapama explain vapama-cases/{path.name}\n" in result.out
    assert result.out.splitlines()[-1] == (
        "COUNTEREXAMPLE 2 invariants at budget quick: 1 held, 1 counterexample"
    )
    case = load_case(path)
    assert (case.invariant, case.subject, case.engine) == (WALK, WRONG, "exhaustive")


AGREE = "assert agree(expected, observed, memory, subject.capabilities)"


def test_check_of_nothing_is_undecided_and_exits_with_3(vapama: Vapama) -> None:
    result = vapama("check", CLAIM, "--engines", "z3", "--subject", "compiled")
    assert result.status == 3
    assert "skipped z3: compiled runs on plain ints only" in result.out
    assert result.out.splitlines()[-1].startswith("UNDECIDED 0 invariants")


def test_check_reports_to_machines_as_to_people(vapama: Vapama, folder: Path) -> None:
    files = ("--json", "--junit", "junit.xml", "--report", "report.html")
    skipped = "a_translation_marks_each_entry_it_used"
    result = vapama("check", CLAIM, WALK, skipped, *QUICK, "--subject", "mmus:Wrong", *files)
    assert result.status == 1

    told = json.loads(result.out)
    assert (told["format"], told["version"], told["budget"]) == ("vapama-report", 1, "quick")
    assert told["exit_status"] == 1
    verdicts = {verdict["invariant"]: verdict for verdict in told["verdicts"]}
    assert {name: verdict["status"] for name, verdict in verdicts.items()} == {
        CLAIM: "counterexample",
        WALK: "counterexample",
        skipped: "not applicable",
    }
    assert verdicts[skipped]["why"] == "mmus:Wrong does not observe updates"
    assert verdicts[WALK]["case"]["draws"]

    suite = ET.parse(folder / "junit.xml").getroot()
    assert (suite.tag, suite.get("tests")) == ("testsuite", "3")
    cases = {case.get("name"): case for case in suite}
    assert {name: [child.tag for child in case] for name, case in cases.items()} == {
        CLAIM: ["failure"],
        WALK: ["failure"],
        skipped: ["skipped"],
    }
    assert cases[WALK].get("classname") == "mmus:Wrong.exhaustive"
    assert cases[WALK][0].get("message") == AGREE

    page = (folder / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "the walk equals the reference" in page
    assert "3 invariants at budget quick: 2 counterexample" in page


@pytest.mark.parametrize(("right", "status"), [(True, 0), (False, 1)])
def test_check_compares_a_guest_with_its_truth(
    vapama: Vapama, folder: Path, right: bool, status: int
) -> None:
    tables = np.zeros((4, 512), dtype=np.uint64)
    tables[0, 0], tables[1, 0], tables[2, 0], tables[3, 5] = 0x1003, 0x2003, 0x3003, 0x9003
    one = {"truth_va": 0x5000, "truth_pa": 0x9000 if right else 0x8000}
    registers = {"cr0": 1 << 31 | 1, "cr3": 0, "cr4": 1 << 5, "efer": 0x500}
    arrays: dict[str, Any] = {name: np.uint64(value) for name, value in registers.items()}
    arrays |= {name: np.array([value], dtype=np.uint64) for name, value in one.items()}
    arrays |= {"frames": np.arange(4, dtype=np.uint64) << np.uint64(12), "tables": tables}
    np.savez(folder / "guest.npz", truth_flags=np.array(["--------W"]), **arrays)
    options = ("--subject", "optimized", "--guest", "guest.npz", "--junit", "junit.xml")
    result = vapama("check", CLAIM, *QUICK, *options)
    assert result.status == status
    lines = [line for line in result.out.splitlines() if line.startswith("real guest")]
    assert len(lines) == 4
    for line in lines:
        assert line.endswith(": 1 of 1 agree") == right
    assert ("first difference: VA 0x5000" in result.out) != right
    assert ("real guest agrees" in result.out.splitlines()[-1]) == right
    failures = ET.parse(folder / "junit.xml").getroot().iter("failure")
    assert len(list(failures)) == (0 if right else 4)


def test_check_begins_with_the_cases_of_the_project_at_hand(vapama: Vapama, folder: Path) -> None:
    refuted = vapama("check", WALK, *QUICK, "--subject", WRONG)
    assert refuted.status == 1
    (case,) = (folder / "vapama-cases").iterdir()
    (folder / "tests").mkdir()
    case.parent.rename(folder / "tests" / "regressions")
    engine = ("--engines", "hypothesis", "--budget", "0.01", "--json")
    result = vapama("check", WALK, *engine, "--subject", WRONG)
    (verdict,) = json.loads(result.out)["verdicts"]
    assert (verdict["status"], verdict["executions"]) == ("counterexample", 1)


# LIST


def test_list_shows_every_invariant_with_its_claim_and_source(vapama: Vapama) -> None:
    result = vapama("list")
    assert result.status == 0
    text = " ".join(result.out.split())
    for invariant in load_invariants().values():
        assert invariant.name in result.out
        assert " ".join((invariant.claim.__doc__ or "").split()) in text
        assert " ".join(invariant.source.split()) in text
    names = ", ".join(SHORT_NAMES)
    assert f"subjects: {names}, mistake:NAME, module:factory" in text


def test_list_as_json_has_all_that_there_is(vapama: Vapama) -> None:
    told = json.loads(vapama("list", "--json").out)
    assert [invariant["name"] for invariant in told["invariants"]] == list(load_invariants())
    assert told["mistakes"] == list(MISTAKES)
    assert vapama("list", "--mistakes").out.count("(breaks ") == len(MISTAKES)


# PROVE AND FUZZ


def test_prove_proves_and_exports_what_a_second_solver_checked(
    vapama: Vapama, folder: Path
) -> None:
    result = vapama("prove", CLAIM, "--export", "smt", "--json")
    (verdict,) = json.loads(result.out)
    assert (result.status, verdict["status"], verdict["engine"]) == (0, "proved", "z3")
    assert (folder / "smt" / f"{CLAIM}.smt2").read_text().rstrip().endswith("(check-sat)")


def test_prove_refutes_a_mistake_and_exits_with_1(vapama: Vapama) -> None:
    result = vapama("prove", WALK, "--subject", WRONG)
    assert result.status == 1
    assert result.out.startswith("counterexample ")
    assert "replay it: vapama explain vapama-cases/" in result.out


def test_fuzz_reports_runs_a_second(vapama: Vapama) -> None:
    result = vapama("fuzz", CLAIM, "--engine", "random", "--seconds", "1", "--seed", "1")
    assert result.status == 0
    assert re.match(r"random: [\d,]+ runs in [\d.]+ s, [\d,]+ a second on a core\n", result.out)
    assert re.search(rf"^held .*{CLAIM}", result.out, re.MULTILINE)


@pytest.mark.skipif(
    bool(atheris_engine.unavailable()), reason=atheris_engine.unavailable() or "it is there"
)
def test_fuzz_by_atheris_keeps_a_corpus_and_reports_its_coverage(
    vapama: Vapama, folder: Path
) -> None:
    result = vapama("fuzz", "--seconds", "3", "--corpus", "corpus")
    assert result.status == 0, result
    assert re.search(
        r"^coverage: \d+ edges, \d+ features, corpus of \d+$", result.out, re.MULTILINE
    )
    for source in ("long_mode.py", "paging.py"):
        line = rf"^coverage: {source}: \d+ of \d+ lines in the \d+ functions entered$"
        assert re.search(line, result.out, re.MULTILINE), result.out
    assert len(list((folder / "corpus").iterdir())) >= atheris_engine.RANDOM_SEEDS


def test_fuzz_finds_what_is_wrong_and_exits_with_1(vapama: Vapama, folder: Path) -> None:
    claims = CLAIM, "a_translation_keeps_the_page_offset"
    engine = ("--engine", "hypothesis", "--seconds", "2", "--seed", "1")
    result = vapama("fuzz", *claims, *engine, "--subject", "mistake:the-offset-loses-its-top-bit")
    assert result.status == 1
    assert re.search(rf"^counterexample .*{claims[1]}", result.out, re.MULTILINE)
    assert not re.search(rf"^counterexample .*{claims[0]}", result.out, re.MULTILINE)
    assert any((folder / "vapama-cases").iterdir())


def test_hunting_a_claims_mistakes_at_random_refutes_them_all(vapama: Vapama) -> None:
    own = [mistake for mistake in MISTAKES.values() if mistake.breaks == WALK]
    result = vapama("fuzz", WALK, "--mistakes", "--engine", "random", "--seconds", "30")
    assert result.status == 0, result.out
    everything = f"{len(own)} of {len(own)} seeded mistakes refuted, the slowest in "
    assert result.out.splitlines()[-1].startswith(everything)


def test_a_claim_that_no_run_is_about_has_no_mistakes_to_hunt(vapama: Vapama) -> None:
    claim = "every_step_keeps_shadow_pages_coherent"
    result = vapama("fuzz", claim, "--mistakes", "--engine", "random", "--seconds", "1")
    assert result.status == 2
    assert f"none breaks {claim} that random runs" in result.err


# REPLAY AND EXPLAIN


@pytest.fixture
def case(vapama: Vapama, folder: Path) -> Path:
    """A Case of a mistake."""
    assert vapama("check", WALK, *QUICK, "--subject", WRONG).status == 1
    (path,) = (folder / "vapama-cases").iterdir()
    return path


def test_replay_tells_what_every_engine_says(vapama: Vapama, case: Path) -> None:
    result = vapama("replay", case)
    assert result.status == 1
    assert [line.split()[:2] for line in result.out.splitlines()] == [
        [engine, "fails:"] for engine in ("hypothesis", "atheris", "exhaustive", "z3")
    ]
    right = vapama("replay", case, "--subject", "optimized")
    assert right.status == 0
    assert [line.split()[1:] for line in right.out.splitlines()] == [["holds"]] * 4


def test_explain_shows_the_walk_of_a_case_and_both_outcomes(vapama: Vapama, case: Path) -> None:
    result = vapama("explain", case)
    assert result.status == 0
    table = "= 0x0000000000001005  P U  -> table at 0x1000"
    assert [line.rstrip() for line in result.out.splitlines()] == [
        "the walk equals the reference (Intel SDM Vol. 3A, 4.5 to 4.8)",
        f"subject {WRONG}; found by exhaustive",
        "",
        "access   implicit supervisor read at 0x0000000000000000",
        "control  4-level paging, MAXPHYADDR 32, CR4.SMAP, RFLAGS.AC",
        "CR3      0x1000: the root table is at 0x1000",
        f"PML4E[  0] at 0x1000 {table}",
        f"PDPTE[  0] at 0x1000 {table}",
        f"PDE  [  0] at 0x1000 {table}",
        "PTE  [  0] at 0x1000 = 0x0000000000001005  P U  -> page of 4 KBytes at 0x1000",
        "outcome  #PF, error code 0x1 (P); may have set " + ", ".join(["A at 0x1000"] * 4),
        "subject  translated to 0x1000, a page of 4 KBytes; sets "
        + ", ".join(["A at 0x1000"] * 4)
        + "   <- not what the reference allows",
        "",
        f"the claim fails: {AGREE}",
    ]


def test_explain_says_that_a_right_subject_agrees(vapama: Vapama, case: Path) -> None:
    result = vapama("explain", case, "--subject", "optimized")
    assert "         optimized agrees\n" in result.out
    assert result.out.endswith("the claim holds\n")


@pytest.mark.parametrize(
    ("address", "options", "shown"),
    [
        ("0x0000800000000000", (), ["not canonical with 48-bit", "#GP(0)"]),
        ("0x1234", ("--fetch",), ["PML4E[  0]", "PDPTE[  0]", "not present: stops here",
                                  "#PF, error code 0x10 (I)"]),
        ("0x1234", ("--user", "--write"), ["user write at", "#PF, error code 0x6 (W U)"]),
        ("4660", (), ["read at 0x0000000000001234"]),
    ],
)  # fmt: skip
def test_explain_shows_the_walk_of_an_address_in_the_guest(
    vapama: Vapama, address: str, options: tuple[str, ...], shown: list[str]
) -> None:
    result = vapama("explain", "guest", address, *options)
    assert result.status == 0
    for text in shown:
        assert text in result.out


def test_explain_shows_a_mapped_page_of_the_guest(vapama: Vapama) -> None:
    from vapama.snapshot.truth import SHIPPED, load_snapshot

    guest = load_snapshot(SHIPPED)
    large = guest.truth_flags.index("XGPDA---W")
    va, pa = int(guest.truth_va[large]), int(guest.truth_pa[large])
    result = vapama("explain", "guest", hex(va))
    assert f"-> page of 2 MBytes at {pa:#x}" in result.out
    assert " PS" in result.out
    assert " XD" in result.out
    assert f"outcome  translated to {pa:#x}, a page of 2 MBytes; sets A at" in result.out
