"""`vapama vectors`: every path of every walk has one, mistakes are caught, files are checked."""

import json
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vapama.bugs.mistakes import MISTAKES
from vapama.explain import describe_outcome
from vapama.runs import Guarded, Replay
from vapama.subjects import load_subject
from vapama.vectors import fill
from vapama.vectors.consume import Result, consume
from vapama.vectors.form import SHIPPED, Vector, read_vectors, schema
from vapama.vectors.questions import KINDS, draws_of

Vapama = Callable[..., Any]
ENUMERATED = [kind for kind in KINDS.values() if kind.symbolic]


@pytest.fixture(scope="module")
def shipped() -> list[Vector]:
    return list(read_vectors(SHIPPED))


# THE VECTORS THAT SHIP


def test_each_vector_has_the_answers_of_the_specification(shipped: list[Vector]) -> None:
    for vector in shipped:
        assert vector.question.acceptable() == vector.acceptable, vector.id
        assert dict(vector.question.loads()) == vector.entries, vector.id
    assert len({vector.id for vector in shipped}) == len(shipped)
    assert {vector.kind for vector in shipped} == set(KINDS)


def test_each_vector_is_drawn_again_by_its_draws(shipped: list[Vector]) -> None:
    for vector in shipped:
        kind = KINDS[vector.kind]
        if not kind.symbolic:
            continue
        draws = draws_of(kind, vector.question, vector.entries)
        again = kind.draw(Replay(draws))
        assert (again.state, again.access) == (vector.question.state, vector.question.access)
        assert again.answer() == vector.acceptable[0]


@pytest.mark.parametrize("kind", ENUMERATED, ids=lambda kind: kind.name)
def test_the_vectors_take_every_path_that_the_symbolic_engine_enumerates(
    shipped: list[Vector], kind: Any
) -> None:
    own = [vector for vector in shipped if vector.kind == kind.name]
    paths = fill.paths_of(kind)
    assert fill.missed(kind, paths, own) == []
    # Without the vectors of one way to end, its paths are missed.
    ways = Counter(vector.path for vector in own)
    least = min(ways, key=lambda way: ways[way])
    others = [vector for vector in own if vector.path != least]
    assert fill.missed(kind, paths, others) != []


def test_two_stages_go_and_end_in_each_way_that_one_of_them_does(shipped: list[Vector]) -> None:
    alone: dict[str, set[str]] = defaultdict(set)
    behind: dict[tuple[str, str], set[str]] = defaultdict(set)
    ends: dict[str, set[str]] = defaultdict(set)
    for vector in shipped:
        mode, _, way = vector.path.partition(", ")
        if "two stages" not in vector.kind:
            alone[mode].add(way)
        elif "witness" in vector.flags:
            before, stops, after = way.partition(" behind, ")
            before, _, place = before.rpartition(", ")
            if stops:
                behind[mode, place].add(after.replace("beyond memory", "translated"))
            if not stops or (place == "page" and after.endswith("translated")):
                ends[mode].add(f"{before}, translated" if stops else way)
    assert len(behind) == 2 * (5 + 6) + 2 * 5
    for (mode, place), ways in behind.items():
        guest, _, stage = mode.partition(" over ")
        missing = alone[stage] - ways
        if place != {"4-level paging": "PML4E", "5-level paging": "PML5E"}[guest]:
            # Where a table was read the second stage's root is in memory.
            (root,) = missing
            assert re.fullmatch("[A-Z0-9]+ outside memory, entry outside memory", root)
        else:
            assert missing == set()
        if guest.split("-")[0] == stage.split("-")[0]:
            # An entry outside memory is here one behind the second stage.
            lacking = {way for way in alone[guest] - ends[mode] if "outside memory" not in way}
            assert lacking == set()
    written = {vector.path.rpartition("flags of ")[2] for vector in shipped}
    tables = ("PML4E", "PDPTE", "PDE", "PTE")
    assert written >= {f"{table}, EPT violation (denied)" for table in tables}


def test_the_schema_is_up_to_date() -> None:
    written = SHIPPED.with_name("vectors.schema.json").read_bytes()
    assert written == schema(), "run: vapama vectors fill --schema"


# SUBJECTS


def put(vectors: list[Vector], subject: Guarded) -> Result:
    return consume(vectors, subject, 10, describe_outcome)


@pytest.mark.parametrize("name", ["reference", "optimized", "compiled"])
def test_ours_are_right(shipped: list[Vector], name: str) -> None:
    subject = load_subject(name)
    result = put(shipped, subject)
    assert result.failed == []
    able = [v for v in shipped if not subject.lacks(KINDS[v.kind].invariant)]
    assert result.passed + result.skipped["it does not cover the case"] == len(able)
    assert result.passed > 900


def test_unicorn_is_asked_what_it_can_be(shipped: list[Vector]) -> None:
    pytest.importorskip("unicorn")
    result = put(shipped, load_subject("unicorn"))
    assert result.failed == []
    assert result.passed > 10
    assert result.skipped.total() > 500


WALKED = tuple(f"impl/kernels/{name}.py" for name in ("long_mode", "legacy", "ept", "npt"))
"""What the vectors are about that the optimized subject can be asked."""


def kernel_mistakes() -> list[str]:
    return [name for name, m in MISTAKES.items() if m.file in WALKED]


def test_seeded_mistakes_are_caught(shipped: list[Vector]) -> None:
    """All but those of batches, and of reads that change no outcome."""
    survived = []
    for name in kernel_mistakes():
        subject = Guarded(f"mistake:{name}", MISTAKES[name].subject())
        telling = [vector for vector in shipped if name in vector.flags]
        if not (put(telling, subject).failed or put(shipped, subject).failed):
            survived.append(name)
    told = {name for name in kernel_mistakes() if name not in survived}
    assert len(told) >= 0.85 * len(kernel_mistakes()), survived


# COMMANDS


def test_a_mistake_is_told_with_what_would_be_right(vapama: Vapama) -> None:
    result = vapama("vectors", "consume", "--subject", "mistake:smep-is-ignored")
    assert result.status == 1
    assert "acceptable  #PF, error code" in result.out
    assert "observed    translated to" in result.out
    assert " FAILED, " in result.out.splitlines()[-1]


def test_what_a_subject_lacks_is_skipped_with_the_reason(vapama: Vapama) -> None:
    result = vapama("vectors", "consume", "--subject", "mmus:Right", "--json")
    report = json.loads(result.out)
    assert (result.status, report["failed"]) == (0, [])
    assert report["skipped"]["it does not observe second_stage"] > 100
    assert report["passed"] > 100


def test_where_nothing_passes_nothing_is_decided(vapama: Vapama, folder: Path) -> None:
    lines = [line for line in SHIPPED.read_bytes().splitlines(True) if b'"kind":"EPT"' in line]
    (folder / "ept.jsonl").write_bytes(b"".join(lines[:3]))
    result = vapama("vectors", "consume", "ept.jsonl", "--subject", "mmus:Right")
    assert result.status == 3
    assert result.out == "skipped 3: it does not observe second_stage\n3 vectors: 0 passed\n"


@pytest.mark.parametrize("subject", ["mmus:Raises", "mmus:ReturnsNone"])
def test_a_subject_that_gives_no_outcome_fails(vapama: Vapama, subject: str) -> None:
    result = vapama("vectors", "consume", "--subject", subject)
    assert result.status == 1
    assert "observed    the subject raised" in result.out


def test_fill_gives_the_same_every_time(vapama: Vapama, folder: Path) -> None:
    for name in ("one", "two"):
        options = ("--kind", "no paging", "--random", "5", "--schema", f"{name}.json")
        result = vapama("vectors", "fill", name, *options)
        assert (result.status, result.err) == (0, "")
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes() != b""
    assert (folder / "one.json").read_bytes() == schema()
    assert vapama("vectors", "consume", "one").status == 0


# BAD INPUT


def require_one_line(result: Any, says: str) -> None:
    assert "Traceback" not in result.err
    assert result.err.startswith("vapama: "), result
    assert result.err.count("\n") == 1, result
    assert says in result.err
    assert (result.status, result.out) == (2, "")


def changed(**changes: Any) -> bytes:
    """The first vector that ships, with changes; None takes a field away."""
    vector = json.loads(SHIPPED.read_bytes().splitlines()[0]) | changes
    return json.dumps({name: v for name, v in vector.items() if v is not None}).encode()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "v:2: not a vector: Input data was truncated"),
        (b"[]", "v:2: not a vector: Expected `object`, got `array`"),
        (b"\xff", "v:2: not a vector"),
        (changed(version=2), "v:2: a vector of version 2; this vapama reads version 1"),
        (changed(version=None), "v:2: a vector of version None"),
        (changed(kind="sideways"), "v:2: no kind is named 'sideways'; there are 4-level"),
        (changed(colour="blue"), "v:2: not a vector: Object contains unknown field `colour`"),
        (changed(acceptable=[]), "v:2: no outcome is acceptable"),
        (changed(acceptable=[{"outcome": "luck"}]), "v:2: not a vector: Invalid value 'luck'"),
        (changed(cpu=None), "v:2: give `cpu` and `access`"),
        (changed(access=None), "v:2: give `cpu` and `access`"),
        (changed(ept={"eptp": "0x101e"}), "v:2: that is no question of 4-level"),
        (changed(ept={"eptp": "0x1000"}), "v:2: EPTP bits 5:3 are 3"),
        (changed(access={"address": "4096"}), "v:2: not a vector: Expected `str` matching regex"),
        (changed(access={"address": 4096}), "v:2: not a vector: Expected `str`, got `int`"),
        (changed(access={"address": "0x0", "write": "0x2"}), "v:2: all of an access but"),
        (changed(memory={"limit": "0x0", "entries": {"0x0": "0x0"}}), "v:2: an entry at 0x0"),
        (changed(memory={"limit": "0x8", "entries": {"0x1": "0x0"}}), "v:2: an entry at 0x1"),
        (changed(memory={"limit": "0x9", "entries": {}}), "v:2: memory of 0x9 bytes"),
    ],
)  # fmt: skip
def test_a_malformed_vector_is_told_with_its_place(
    vapama: Vapama, folder: Path, line: bytes, says: str
) -> None:
    (folder / "v").write_bytes(changed() + b"\n" + line + b"\n")
    require_one_line(vapama("vectors", "consume", "v"), says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("consume", "none"), "none: cannot read the vectors: No such file"),
        (("consume", "empty"), "empty: there are no vectors in it"),
        (("consume", "--subject", "nobody"), "--subject nobody: give one of"),
        (("fill", "v", "--kind", "paging"), "--kind paging: give one of '4-level"),
        (("fill", "none/v", "--kind", "no paging"), "none/v: cannot write it"),
    ],
)
def test_what_cannot_be_done_is_told(
    vapama: Vapama, folder: Path, arguments: tuple[str, ...], says: str
) -> None:
    (folder / "empty").write_bytes(b"")
    require_one_line(vapama("vectors", *arguments), says)


# PROCESSES

ANSWER = """
import json, os, sys, time
sys.stdin.readline()
print(json.dumps({"observes": ["pa"]}), flush=True)
for number, line in enumerate(sys.stdin):
    %s
"""
RIGHT = 'print(json.dumps({"not_covered": "anything"}), flush=True)'


def process(folder: Path, body: str) -> str:
    (folder / "mmu.py").write_text(ANSWER % body)
    return "process:python3 mmu.py"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "sys.exit('no more')",
            "the subject raised ProcessFailed: the process ended with status 1",
        ),
        ("os.kill(os.getpid(), 9)", "the process ended by SIGKILL"),
        ("print('yes', flush=True)", "ProcessFailed: it answered yes: JSON is malformed"),
        ('print(\'{"outcome": "luck"}\', flush=True)', "ProcessFailed: it answered"),
        ("time.sleep(100)", "the subject hung: no result within 1 s"),
    ],
    ids=["ends", "dies", "no JSON", "no outcome", "hangs"],
)
def test_a_process_that_gives_no_answer_fails(
    vapama: Vapama, folder: Path, body: str, says: str
) -> None:
    lines = SHIPPED.read_bytes().splitlines(True)[:2]
    (folder / "v").write_bytes(b"".join(lines))
    subject = process(folder, body)
    patience = "1" if "sleep" in body else "30"
    result = vapama("vectors", "consume", "v", "--subject", subject, "--hang", patience)
    assert result.status == 1
    assert result.out.count(says) == 2, result


def test_a_process_is_started_again_for_the_next_case(vapama: Vapama, folder: Path) -> None:
    lines = SHIPPED.read_bytes().splitlines(True)[:3]
    (folder / "v").write_bytes(b"".join(lines))
    subject = process(folder, f"{RIGHT} if number == 0 else sys.exit(3)")
    report = json.loads(vapama("vectors", "consume", "v", "--subject", subject, "--json").out)
    assert report["skipped"] == {"it does not cover the case": 2}
    assert [f["observed"] for f in report["failed"]] == [
        "the subject raised ProcessFailed: the process ended with status 3"
    ]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("", "give a command"),
        ("./none-such", "cannot start it: No such file or directory"),
        ("false", "the process ended with status 1"),
        ("echo hello", "it greets otherwise than by a line such as"),
        ('echo \'{"observes":["luck"]}\'', "it observes 'luck', and can only observe"),
    ],
)
def test_a_process_that_cannot_be_had_is_refused(vapama: Vapama, command: str, says: str) -> None:
    require_one_line(vapama("vectors", "consume", "--subject", f"process:{command}"), says)


# LIBRARIES

HEADER = SHIPPED.parent
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "check-another-language.md"


def compiled(folder: Path, source: str) -> str:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is not installed")
    (folder / "mmu.c").write_text(source)
    command = [gcc, "-shared", "-fPIC", "-Wall", "-Werror", "-I", str(HEADER), "-o", "mmu.so"]
    subprocess.run([*command, "mmu.c"], cwd=folder, check=True)
    return "cabi:./mmu.so"


def example() -> str:
    found = re.search(r"```c title=mmu.c\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_library_of_the_documentation_is_right(vapama: Vapama, folder: Path) -> None:
    subject = compiled(folder, example())
    report = json.loads(vapama("vectors", "consume", "--subject", subject, "--json").out)
    assert report["failed"] == []
    assert report["passed"] > 5


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("entry & 0xfffff000;", "entry & 0xffffd000;", "translated to"),
        ("(address & 0xfff)", "(address & 0xff)", "translated to"),
        (">> (where & 4) * 8", "", ""),
        ("where & ~7ull", "where", "ProcessFailed: the process ended with status 1: a load at"),
        ("outcome->level = 1;", "*(volatile int *)8 = 0;", "the process ended by SIGSEGV"),
        ("VAPAMA_TRANSLATED;", "9;", "Invalid value 'of kind 9'"),
    ],
    ids=["frame", "offset", "half", "unaligned", "crash", "kind"],
)
def test_a_mistake_of_a_library_is_told(
    vapama: Vapama, folder: Path, right: str, wrong: str, says: str
) -> None:
    assert example().count(right) == 1
    subject = compiled(folder, example().replace(right, wrong))
    result = vapama("vectors", "consume", "--subject", subject)
    assert result.status == 1, result
    assert says in result.out


def test_a_library_that_cannot_be_loaded_is_refused(vapama: Vapama, folder: Path) -> None:
    result = vapama("vectors", "consume", "--subject", "cabi:./none.so")
    require_one_line(result, "the process ended with status 1: ./none.so: cannot open")
    if shutil.which("gcc"):
        subject = compiled(folder, "int nothing;")
        result = vapama("vectors", "consume", "--subject", subject)
        require_one_line(result, "undefined symbol: vapama_observes")
