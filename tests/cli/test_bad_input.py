"""Bad input ends in one line that says what is wrong, with status 2, and never in a traceback."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vapama.case import make_case
from vapama.snapshot.truth import NEEDED, SHIPPED
from vapama.subjects import SHORT_NAMES

Vapama = Callable[..., Any]
QUICK = ("check", "who_may_write_may_read", "--engines", "exhaustive", "--budget", "quick")


def require_one_line(result: Any, says: str) -> None:
    """Check that a command refused its input, saying so in one line."""
    assert "Traceback" not in result.err
    assert result.err.startswith("vapama: "), result
    assert result.err.count("\n") == 1, result
    assert says in result.err
    assert result.status == 2
    assert result.out == ""


def unflawed(_: str, *arguments: object, **options: Any) -> Any:
    return pytest.param(*arguments)


# NAMES


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("check", "nothing_at_all"), "no invariant is named nothing_at_all; see `vapama list`"),
        (("check", "who_may_write_may_raed"), "(did you mean who_may_write_may_read?)"),
        (("prove", "no_such_claim"), "no invariant is named no_such_claim"),
        (("fuzz", "no_such_claim"), "no invariant is named no_such_claim"),
        (("check", "--engines", "quantum"), "--engines quantum: give some of z3, exhaustive"),
        (("check", "--engines", ","), "--engines ,: give some of"),
        (("fuzz", "--engine", "z3"), "--engine z3: give one of atheris, random, hypothesis"),
        (("check", "--budget", "lavish"), "--budget lavish: give one of quick, standard, nightly"),
        (("check", "--budget", "0"), "--budget 0: give one of"),
        (("check", "--budget", "-1"), "--budget -1: give one of"),
        (("check", "--budget", "nan"), "--budget nan: give one of"),
        (("check", "--budget", "inf"), "--budget inf: give one of"),
        (("prove", "--subject", "compiled"), "--subject compiled: compiled runs on plain ints"),
        (("oracles", "run", "nobody"), "oracles run nobody: give one of qemu, bochs, kvm-shadow"),
        (("oracles", "run", "kvm-tdp", "--compiled"), "--compiled are about machines"),
        (("oracles", "run", "qemu", "--seconds", "5"), "--seconds is about kvm-shadow"),
        (("snapshot", "capture", "x.npz", "--kind", "6"), "--kind 6: give one of 4-level"),
        (("explain", "guest"), "give linear addresses to explain"),
        (("explain", "guest", "everywhere"), "everywhere: not a linear address"),
        (("explain", "guest", "0x1", "-5"), "-5: not a linear address"),
        (("explain", "guest", "0x10000000000000000"), "0x10000000000000000: not a linear address"),
        (("explain", "guest", "0x1", "--write", "--fetch"), "--write or --fetch, not both"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_name_or_value_that_is_not_known_is_refused(
    vapama: Vapama, arguments: tuple[str, ...], says: str
) -> None:
    if "-5" in arguments:
        arguments = (*arguments[:-1], "--", arguments[-1])
    require_one_line(vapama(*arguments), says)


@pytest.mark.parametrize(
    "arguments", [("check", "--nonsense"), ("fuzz", "--seconds", "soon"), ("conjure",)]
)
def test_usage_that_is_wrong_has_status_2_too(vapama: Vapama, arguments: tuple[str, ...]) -> None:
    result = vapama(*arguments)
    assert result.status == 2
    assert "Usage" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    "seconds", ["nan", "0", unflawed("typer's `min=1` lets it pass", "inf", raises=OverflowError)]
)
def test_seconds_that_are_no_number_are_refused(vapama: Vapama, seconds: str) -> None:
    assert vapama("fuzz", "--engine", "random", "--seconds", seconds).status == 2


# SUBJECTS


@pytest.mark.parametrize(
    ("subject", "says"),
    [
        ("foo", f"give one of {', '.join(SHORT_NAMES)}, or module:factory"),
        ("a:", "give one of"),
        (":", "give one of"),
        unflawed("rich reads `:b` as an emoji", ":b", "--subject :b: give one of"),
        unflawed("rich reads `:X:` as an emoji", "nomodule:X", "nomodule:X: ModuleNotFoundError"),
        ("nomodule:Mine", "ModuleNotFoundError: No module named 'nomodule'"),
        ("mmus.deeper:Mine", "ModuleNotFoundError: No module named 'mmus.deeper'"),
        ("mmus:missing", "AttributeError: module 'mmus' has no attribute 'missing'"),
        ("mmus:number", "TypeError: 'int' object is not callable"),
        ("mmus:NoCapabilities", "it needs `capabilities`"),
        ("mmus:NoTranslate", "it needs `capabilities`"),
        unflawed("a message of several lines", "mmus:Unbuildable", "OSError: no such"),
        unflawed("a message of several lines", "raising:Mine", "RuntimeError: not today"),
        ("unreadable:Mine", "SyntaxError: "),
        unflawed("SystemExit passes", "exiting:Mine", "SystemExit"),
        ("mistake:none_such", "no such mistake; `vapama list --mistakes`"),
        ("mistake:", "no such mistake"),
    ],
)  # fmt: skip
def test_a_subject_that_cannot_be_had_is_refused(
    vapama: Vapama, folder: Path, subject: str, says: str
) -> None:
    (folder / "raising.py").write_text('raise RuntimeError("not today\\nnor tomorrow")')
    (folder / "unreadable.py").write_text("def f(:")
    (folder / "exiting.py").write_text("import sys; sys.exit(0)")
    require_one_line(vapama(*QUICK, "--subject", subject), says)


# IMAGES


def snapshot(**changes: Any) -> dict[str, Any]:
    """The arrays of a small whole snapshot, with changes."""
    registers = {"cr0": 1 << 31 | 1, "cr3": 0, "cr4": 1 << 5, "efer": 0x500}
    words = {name: np.uint64(value) for name, value in registers.items()}
    truth = np.zeros(1, dtype=np.uint64)
    tables = np.zeros((1, 512), dtype=np.uint64)
    tables[0, 0] = 0x1
    arrays = {"frames": truth, "tables": tables, "truth_va": truth, "truth_pa": truth}
    return words | arrays | {"truth_flags": np.array(["---------"])} | changes


def test_a_small_snapshot_is_taken(vapama: Vapama, folder: Path) -> None:
    np.savez(folder / "ok.npz", **snapshot())
    result = vapama("explain", "ok.npz", "0x123")
    assert (result.status, result.err) == (0, "")
    assert "translated to 0x123" in result.out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cr0": np.uint64(1)}, "EFER.LMA is EFER.LME and CR0.PG"),
        ({"cr4": np.uint64(1 << 5 | 1 << 27)}, "not specified here"),
        ({"cr3": np.uint64(1 << 40)}, "CR3"),
        ({"tables": np.zeros((1, 511), np.uint64)}, "`tables` must be 512 uint64 entries"),
        ({"tables": np.zeros((2, 512), np.uint64)}, "`tables` must be"),
        ({"tables": np.zeros((1, 512))}, "`tables` must hold unsigned integers"),
        ({"frames": np.zeros(0, np.uint64), "tables": np.zeros((0, 512), np.uint64)}, "`tables`"),
        ({"frames": np.array([8], np.uint64)}, "`frames` must be page-aligned"),
        ({"frames": np.array([1 << 40], np.uint64)}, "`frames` must be page-aligned and below"),
        ({"truth_va": np.zeros(2, np.uint64)}, "the arrays of the truth differ in length"),
        ({"truth_flags": np.array([None])}, "not a whole .npz image: Object arrays cannot"),
        unflawed("the arrays' types are not checked", {"frames": np.zeros(1)}, "frames",
               raises=TypeError),
        unflawed("the arrays' types are not checked", {"frames": np.uint64(0)}, "frames",
               raises=TypeError),
        unflawed("the arrays' types are not checked", {"cr3": np.zeros(2, np.uint64)}, "cr3",
               raises=TypeError),
        unflawed("the arrays' types are not checked", {"truth_flags": np.zeros(1, np.uint64)},
               "truth_flags"),
        unflawed("a frame far away takes all memory",
               {"frames": np.array([0xFF_FFFF_F000], np.uint64)}, "frames", raises=MemoryError),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_snapshot_that_is_not_whole_is_refused(
    vapama: Vapama, folder: Path, changes: dict[str, Any], says: str
) -> None:
    np.savez(folder / "bad.npz", **snapshot(**changes))
    result = vapama("explain", "bad.npz", "0x1000")
    require_one_line(result, says)
    assert "bad.npz" in result.err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nope.npz", "nope.npz: cannot read the image: No such file or directory"),
        (".", "cannot read the image"),
        ("truncated.npz", "truncated.npz: not a whole .npz image"),
        ("empty.npz", "empty.npz: not a whole .npz image"),
        ("text.npz", "text.npz: not a whole .npz image"),
        ("flipped.npz", "flipped.npz: not a whole .npz image"),
        ("lacking.npz", "lacking.npz: not a snapshot: it lacks tables, cr0, cr3"),
        unflawed("an array alone has no context manager", "array.npz", "array.npz: not",
               raises=TypeError),
        unflawed("zlib's error is not met", "garbled.npz", "garbled.npz: not a whole .npz image",
               raises=Exception),
    ],
)  # fmt: skip
def test_an_image_that_cannot_be_read_is_refused(
    vapama: Vapama, folder: Path, name: str, says: str
) -> None:
    whole = SHIPPED.read_bytes()
    (folder / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.npz").write_bytes(b"")
    (folder / "text.npz").write_text("not a snapshot")
    middle = len(whole) // 2
    (folder / "flipped.npz").write_bytes(whole[:middle] + b"\x55" * 64 + whole[middle + 64 :])
    np.savez(folder / "lacking.npz", frames=np.zeros(1))
    np.save(folder / "array", np.zeros(1))
    (folder / "array.npy").rename(folder / "array.npz")
    np.savez_compressed(
        folder / "packed.npz", **snapshot(tables=np.arange(512, dtype=np.uint64).reshape(1, 512))
    )
    packed = bytearray((folder / "packed.npz").read_bytes())
    start = packed.index(b"tables.npy") + 60
    packed[start : start + 100] = b"\xff" * 100
    (folder / "garbled.npz").write_bytes(packed)
    require_one_line(vapama("check", "--guest", name), says)


def test_the_array_lists_of_this_test_and_of_snapshots_agree() -> None:
    assert set(snapshot()) == set(NEEDED)


# CASES

WHOLE = json.loads(
    make_case("who_may_write_may_read", "optimized", "hand", "", [("access", 2)]).to_json()
)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "case.json: cannot read the Case: No such file or directory"),
        ("", "case.json: not a Case: Input data was truncated"),
        ("{", "case.json: not a Case: Input data was truncated"),
        ("[]", "case.json: not a Case: Expected `object`, got `array`"),
        ("\udcff", "case.json: not a Case"),
        ({}, 'case.json: not a Case: it needs "format": "vapama-case"'),
        (WHOLE | {"format": "other"}, 'it needs "format": "vapama-case"'),
        (WHOLE | {"version": 99}, "a Case of version 99; this vapama reads version 1: replay it"),
        (WHOLE | {"version": None}, "a Case of version None"),
        (WHOLE | {"colour": "blue"}, "unknown field `colour`"),
        (WHOLE | {"invariant": 5}, "Expected `str`, got `int` - at `$.invariant`"),
        ({k: v for k, v in WHOLE.items() if k != "draws"}, "missing required field `draws`"),
        (WHOLE | {"draws": [["access", "two"]]}, "not a Case: invalid literal for int()"),
        (WHOLE | {"draws": [["access", 2]]}, "Expected `str`, got `int`"),
        (WHOLE | {"draws": [["access"]]}, "not a Case: Expected `array` of length 2"),
        (WHOLE | {"invariant": "none_such"}, "no invariant is named none_such"),
        (WHOLE | {"subject": "nomodule:Mine"}, "No module named 'nomodule'"),
        (WHOLE | {"subject": "mistake:none"}, "no such mistake"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["replay", "explain"])
def test_a_case_that_cannot_be_read_is_refused(
    vapama: Vapama, folder: Path, command: str, content: object, says: str
) -> None:
    if isinstance(content, str):
        (folder / "case.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    elif content is not None:
        (folder / "case.json").write_text(json.dumps(content))
    require_one_line(vapama(command, "case.json"), says)


def test_a_bad_case_among_the_regressions_is_refused(vapama: Vapama, folder: Path) -> None:
    regressions = folder / "tests" / "regressions"
    regressions.mkdir(parents=True)
    (regressions / "bad.json").write_text("{}")
    result = vapama("check", "who_may_write_may_read", "--engines", "hypothesis", "--budget", "1")
    require_one_line(result, "tests/regressions/bad.json: not a Case")


# OUTPUT


@pytest.mark.parametrize("option", ["--junit", "--report"])
def test_a_report_that_cannot_be_written_is_refused(
    vapama: Vapama, folder: Path, option: str
) -> None:
    require_one_line(vapama(*QUICK, option, folder / "none" / "report"), "cannot write")


def test_a_corpus_that_is_no_folder_is_refused(vapama: Vapama, folder: Path) -> None:
    pytest.importorskip("atheris")
    (folder / "corpus").write_text("")
    require_one_line(vapama("fuzz", "--seconds", "1", "--corpus", "corpus"), "corpus")
