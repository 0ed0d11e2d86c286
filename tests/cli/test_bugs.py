"""`vapama bugs`: seeded mistakes hunted by each engine, and the record of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vapama.bugs.mistakes import MISTAKES, parse
from vapama.hunting import chosen_mistakes, hunts, read_record

Vapama = Callable[..., Any]
EASY = "write-disable-ignores-wp"


def test_a_hunt_says_who_found_it_and_is_recorded(vapama: Vapama, folder: Path) -> None:
    result = vapama("bugs", EASY, "--record", "hunts.json", "--engines", "random")
    assert result.status == 0
    assert "found in " in result.out
    assert "1 of 1 seeded mistakes found" in result.out
    (hunt,) = read_record(folder / "hunts.json").hunts
    assert (hunt.mistake, hunt.engine, hunt.found) == (EASY, "random", True)
    assert hunt.failure
    assert hunt.seconds > 0

    # What the record has is not hunted again; another engine adds to it.
    result = vapama("bugs", EASY, "--record", "hunts.json", "--engines", "random", "--new")
    assert "0 of 0" in result.out
    vapama("bugs", EASY, "--record", "hunts.json", "--engines", "exhaustive")
    assert [h.engine for h in read_record(folder / "hunts.json").hunts] == ["random", "exhaustive"]


def test_what_is_not_found_is_undecided(vapama: Vapama, folder: Path) -> None:
    """Too little time for a mistake that takes some."""
    name = "a-swapped-page-keeps-its-old-copy"
    result = vapama("bugs", name, "--engines", "random", "--seconds", "0.1", "--json")
    (hunt,) = json.loads(result.out)["hunts"]
    assert result.status == (0 if hunt["found"] else 3)


def test_programs_are_told_by_their_steps() -> None:
    mistake = MISTAKES["a-dropped-entry-stays-in-the-reverse-map"]
    ((hunt, verdict),) = hunts([mistake], ["random"], 20)
    assert hunt.found
    assert 0 < hunt.steps <= 4
    assert "rule 3:" in hunt.failure
    assert verdict.case is not None
    assert verdict.case.failure == hunt.failure


def test_without_names_it_is_about_the_hypervisor() -> None:
    names = {mistake.name for mistake in chosen_mistakes([])}
    assert {"a-freed-table-is-flushed-later", "dirty-flags-are-not-collected"} <= names
    assert EASY not in names


@pytest.mark.parametrize(
    ("arguments", "content", "said"),
    [
        (("no-such-mistake",), None, "no mistake is named no-such-mistake"),
        ((EASY, "--engines", "z3"), None, "--engines z3"),
        ((EASY, "--new"), None, "--record"),
        ((EASY, "--record", "hunts.json"), "[]", "not a record"),
        ((EASY, "--record", "hunts.json"), '{"version": 2}', "version 1"),
        ((EASY, "--record", "hunts.json"), "\x00", "not a record"),
        (
            (EASY, "--record", "hunts.json"),
            '{"hunts": [{"mistake": "a", "invariant": "b", "engine": "c", "found": true, '
            '"seconds": 1}]}',
            "a hunt by an engine other than",
        ),
    ],
)
def test_bad_input_gets_one_line(
    vapama: Vapama, folder: Path, arguments: tuple[str, ...], content: str | None, said: str
) -> None:
    if content is not None:
        (folder / "hunts.json").write_text(content)
    result = vapama("bugs", *arguments)
    assert (result.status, result.out) == (2, "")
    assert said in result.err
    assert result.err.count("\n") == 1


def test_the_comment_just_above_a_mistake_is_its_story() -> None:
    text = (
        "file: impl/mmu.py\n\n# of all\n\n# CVE-1: a thing\n# happened\n@ a breaks b\n-x\n+y\n\n"
        "# CVE-2: not just above\n\n@ c\n-x\n+y\n"
    )
    found = parse(text)
    assert (found["a"].story, found["c"].story) == ("CVE-1: a thing happened", "")
    assert MISTAKES["a-role-has-no-nx"].story.startswith("KVM, 9645bb56b31a: ")
