"""The documentation, run as it is written.

Each page has a directory of its own, in which its blocks are taken in order; docs/README.md tells
readers what a block's info string (the words behind the three backticks) asks for.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer

from vapama.bugs.mistakes import MISTAKES
from vapama.cli import app
from vapama.hunting import read_record
from vapama.impl.optimized import Compiled, Optimized
from vapama.oracles import bare_metal, kvm, linux, nested_kvm
from vapama.oracles.departures import BOCHS, QEMU
from vapama.oracles.linux_mm.hugetlb import LinuxHugetlb
from vapama.oracles.linux_mm.ksm import LinuxKsm
from vapama.oracles.linux_mm.thp import LinuxThp
from vapama.oracles.registry import ORACLES, missing
from vapama.oracles.unicorn import DEPARTURES, Unicorn
from vapama.spec import subject as subjects
from vapama.spec.nondet import ACCESS_DRAWS, CPU_DRAWS
from vapama.spec.subject import Capabilities
from vapama.subjects import HYPERVISORS, MACHINES, SHORT_NAMES, Reference
from vapama.verdict import BUDGETS

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
PROSE = [*PAGES, REPOSITORY / "CHANGELOG.md", REPOSITORY / "CONTRIBUTING.md"]
ADDING = DOCS / "adding-an-invariant.md"
IN_A_CHECKOUT = (ADDING, DOCS / "how-to" / "add-a-seeded-mistake.md")
"""Pages that tell the reader to edit the checkout: they get a copy of it."""
COPIED = ("spec", "impl", "proofs", "fuzz", "oracles", "bugs", "vapama", "docs")
SECONDS = 120


# PAGES AND BLOCKS


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, the other words of its info string, its lines."""

    line: int
    language: str
    words: tuple[str, ...]
    lines: tuple[str, ...]

    @property
    def options(self) -> dict[str, str]:
        return dict(word.split("=", 1) for word in self.words if "=" in word)

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, those within lists too."""
    opened: tuple[int, str, list[str], list[str]] | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.fullmatch(r"( *)```(.*)", line)
        if opened is None and fence is not None:
            language, *words = fence[2].split() or [""]
            opened = number, language, words, []
            indent = len(fence[1])
        elif opened is not None and fence is not None:
            yield Block(opened[0], opened[1], tuple(opened[2]), tuple(opened[3]))
            opened = None
        elif opened is not None:
            opened[3].append(line[indent:])
    assert opened is None, f"{page.name}: the block of line {opened and opened[0]} never ends"


@dataclass(frozen=True)
class Command:
    """A command of a console block, and the lines that the page shows of its output."""

    text: str
    shown: tuple[str, ...]


def commands(block: Block) -> list[Command]:
    """The commands of a console block; a line that ends in a backslash goes on in the next."""
    found: list[tuple[str, list[str]]] = []
    goes_on = False
    for line in block.lines:
        if goes_on:
            found[-1] = found[-1][0] + "\n" + line, []
        elif line.startswith("$ "):
            found.append((line[2:], []))
        else:
            assert found, f"line {block.line}: a console block begins with a command"
            found[-1][1].append(line)
        goes_on = line.endswith("\\")
    return [Command(text, tuple(shown)) for text, shown in found]


# WHAT WAS PRINTED


def masked(line: str) -> str:
    """A line without what differs from run to run: numbers, names of Cases, spacing."""
    line = re.sub(r"-[0-9a-f]{8}\.json", "-#.json", line)
    line = re.sub(r"\b0x[0-9a-f]+\b|\b\d[\d,.]*[kMs]?\b", "#", line)
    return " ".join(line.split())


def kinds(lines: tuple[str, ...] | list[str]) -> set[str]:
    """The first words of lines: what is compared of a mere sample of output."""
    return {masked(line).split()[0].split("[")[0] for line in lines if line.strip()} - {"..."}


@dataclass
class Reader:
    """Somebody who follows a page: where they are, and the Cases that they were told of."""

    where: Path
    environment: dict[str, str]
    cases: dict[str, str] = field(default_factory=dict)
    """Names of Cases as the page has them, and as they were printed here."""

    def run(self, script: str) -> list[tuple[str, int]]:
        """The output and the status of each command, one shell for all of them."""
        for name, here in self.cases.items():
            script = script.replace(name, here)
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.where,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        parts = re.split(r"@@@ (\d+)\n", done.stdout)
        return list(zip(parts[::2], map(int, parts[1::2]), strict=False))

    def follow(self, block: Block) -> None:
        """Do what a block says. Raises `AssertionError` if it comes out otherwise."""
        if "title" in block.options:
            self.write(block, self.where / block.options["title"])
        elif block.language == "console" and "not-run" not in block.words:
            self.type_in(block)

    def write(self, block: Block, path: Path) -> None:
        """Write the file that a block holds, or edit it by a diff."""
        if block.language == "diff":
            text = path.read_text(encoding="utf-8")
            before = "".join(f"{line[1:]}\n" for line in block.lines if line[:1] in "- ")
            after = "".join(f"{line[1:]}\n" for line in block.lines if line[:1] in "+ ")
            assert text.count(before) == 1, f"line {block.line}: the diff does not fit {path.name}"
            path.write_text(text.replace(before, after), encoding="utf-8")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")

    def type_in(self, block: Block) -> None:
        """Run the commands of a console block, and compare what they print."""
        typed = commands(block)
        script = "".join(f"{c.text}\ns=$?; echo; echo @@@ $s; (exit $s)\n" for c in typed)
        results = self.run(script)
        assert len(results) == len(typed), f"line {block.line}: {results}"
        for i, (command, (printed, status)) in enumerate(zip(typed, results, strict=True)):
            where = f"line {block.line}: $ {command.text}\n{printed}"
            asked = i + 1 < len(typed) and typed[i + 1].text == "echo $?"
            assert status == 0 or asked, f"exit status {status} at {where}"
            if command.text == "echo $?":
                assert printed.split() == list(command.shown), f"another exit status at {where}"
            elif "sample" in block.words:
                assert kinds(command.shown) <= kinds(printed.splitlines()), where
            else:
                self.compare(command.shown, printed.splitlines(), where)

    def compare(self, shown: tuple[str, ...], printed: list[str], where: str) -> None:
        """Check that the lines shown were printed in this order; `...` stands for any lines."""
        at, printed = 0, [line for line in printed if line.strip()]
        for chunk in "\n".join(shown).split("\n..."):
            lines = [line for line in chunk.splitlines() if line.strip() and line != "..."]
            wanted, there = list(map(masked, lines)), list(map(masked, printed))
            places = range(at, len(there) - len(wanted) + 1)
            found = [p for p in places if there[p : p + len(wanted)] == wanted]
            assert found, f"not printed:\n{chr(10).join(lines)}\nby {where}"
            for theirs, ours in zip(lines, printed[found[0] :], strict=False):
                names = [re.findall(r"[\w/]+-[0-9a-f]{8}\.json", line) for line in (theirs, ours)]
                self.cases.update(zip(*names, strict=True))
            at = found[0] + len(wanted)


# RUNNING THEM


def environment(cache: Path, **more: str) -> dict[str, str]:
    """A shell's environment in which `vapama` and `pytest` are those of this Python."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if linux.CACHE.is_dir():
        kept["VAPAMA_LINUX"] = str(linux.CACHE)
    return {**kept, "PATH": path, "COLUMNS": "80", "XDG_CACHE_HOME": str(cache), **more}


def checkout(folder: Path) -> None:
    """A copy of the checkout's code, symbolic links kept."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        shutil.copytree(REPOSITORY / name, folder / name, symlinks=True, ignore=ignored)


def reader_of(page: Path, tmp_path: Path) -> Reader:
    """A reader who begins a page where it says to begin."""
    where, cache, bin_ = tmp_path / "here", tmp_path / "cache", tmp_path / "bin"
    where.mkdir()
    if page not in IN_A_CHECKOUT:
        return Reader(where, environment(cache))
    checkout(where)
    bin_.mkdir()
    vapama = bin_ / "vapama"
    vapama.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m vapama.cli "$@"\n')
    vapama.chmod(0o755)
    env = environment(cache, PYTHONPATH=str(where))
    return Reader(where, {**env, "PATH": f"{bin_}{os.pathsep}{env['PATH']}"})


def lacking(block: Block) -> list[str]:
    """What a block needs that is not installed here."""
    oracles = {oracle.name: oracle for oracle in ORACLES}
    return [
        name
        for name in filter(None, block.options.get("needs", "").split(","))
        if (missing(oracles[name]) if name in oracles else importlib.util.find_spec(name) is None)
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


RUNNABLE = [page for page in PAGES if any(b.language == "console" for b in blocks(page))]


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_a_page_does_what_it_says(page: Path, tmp_path: Path) -> None:
    reader = reader_of(page, tmp_path)
    left_out = []
    for block in blocks(page):
        if lacking(block):
            left_out.append(f"line {block.line} needs {', '.join(lacking(block))}")
        else:
            reader.follow(block)
    if left_out:
        pytest.skip("; ".join(left_out))


def test_a_new_invariant_is_run_by_all_four_engines(tmp_path: Path) -> None:
    reader = reader_of(ADDING, tmp_path)
    for block in blocks(ADDING):
        if "title" in block.options:
            reader.follow(block)
    ((printed, status),) = reader.run(
        "vapama check a_page_moves_as_a_whole --subject optimized --budget quick --json; "
        "s=$?; echo @@@ $s"
    )
    report: dict[str, Any] = msgspec.json.decode(printed)
    assert status == report["exit_status"] == 0
    by_engine = {v["engine"]: (v["invariant"], v["status"]) for v in report["verdicts"]}
    name = "a_page_moves_as_a_whole"
    assert by_engine["z3"] == (name, "proved")
    assert by_engine["exhaustive"] == (name, "held")
    assert by_engine["hypothesis"] == (name, "held")
    if importlib.util.find_spec("atheris") is None:
        assert "not installed" in report["skipped"]["atheris"]
        pytest.skip("atheris is not installed: its verdict was not seen")
    assert by_engine["atheris"] == (name, "held")


# WHAT IS NOT RUN MUST EXIST


def every_command() -> list[Any]:
    return [
        pytest.param(command.text, id=f"{name_of(page)}:{block.line} {command.text.split()[0]}")
        for page in PROSE
        for block in blocks(page)
        if block.language == "console" and "not-run" in block.words
        for command in commands(block)
    ]


CLI: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = {
    **{name: c for name, c in CLI.commands.items() if not hasattr(c, "commands")},
    **{
        f"{group} {name}": command
        for group, commands in CLI.commands.items()
        for name, command in getattr(commands, "commands", {}).items()
    },
}
"""Commands by name, those of a group by the group's name and their own."""
TARGETS = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
OTHERS = {".", "cd", "git", "pip", "pytest", "bash", "gcc"}


@pytest.mark.parametrize("command", every_command())
def test_a_command_that_is_not_run_exists(command: str) -> None:
    program, *arguments = [word for word in shlex.split(command) if word != "\\\n"]
    if program == "make":
        assert set(re.findall(r"^\w+$", "\n".join(arguments), re.MULTILINE)) <= TARGETS
    elif program == "vapama":
        name = max((n for n in COMMANDS if arguments[: len(n.split())] == n.split()), key=len)
        COMMANDS[name].make_context(name, arguments[len(name.split()) :])
    elif program == "python":
        assert (REPOSITORY / arguments[0]).is_file()
    else:
        assert program in OTHERS


def test_each_option_that_the_pages_name_exists() -> None:
    known = {opt for c in COMMANDS.values() for p in c.params for opt in p.opts}
    known |= {"--help", "--json", "--vapama-subject", "--vapama-examples"}
    known |= {"--junitxml", "--export"}  # pytest's
    for page in PROSE:
        text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for span in re.findall(r"`([^`]+)`", text):
            for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", span):
                assert option in known, f"{name_of(page)}: `{span}`"


# THE REFERENCE IS COMPLETE


def section(page: Path, heading: str) -> str:
    """The text under a heading, as far as the next of the same level."""
    level = heading.split(maxsplit=1)[0]
    text = page.read_text(encoding="utf-8")
    assert f"\n{heading}\n" in text, f"{name_of(page)} has no section {heading}"
    return re.split(rf"\n#{{1,{len(level)}}} ", text.split(f"\n{heading}\n")[1])[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_documented(name: str) -> None:
    text = section(DOCS / "reference" / "cli.md", f"## vapama {name}")
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            assert f"`{parameter.opts[0]}" in text, f"{name} {parameter.opts[0]}"
        else:
            assert parameter.param_type_name == "option" or parameter.name.upper() in text


OBSERVATIONS = {name: value for name, value in vars(subjects).items() if name.isupper()}


def test_every_observation_and_known_departure_is_documented() -> None:
    text = (DOCS / "reference" / "subjects.md").read_text()
    values = [f'"{value}"' for value in OBSERVATIONS.values()]
    for name in (
        *OBSERVATIONS,
        *values,
        *DEPARTURES,
        *(d.name for d in QEMU + BOCHS),
        *kvm.DEPARTURES,
        *nested_kvm.DEPARTURES,
        *nested_kvm.DEPARTURES_OF_TDP,
    ):
        assert f"`{name}`" in text, name


CAPABILITIES = {
    "optimized": Optimized.capabilities,
    "compiled": Compiled.capabilities,
    "reference": Reference.capabilities,
    "unicorn": Unicorn.capabilities,
    "linux-ksm": LinuxKsm.capabilities,
    "linux-hugetlb": LinuxHugetlb.capabilities,
    "linux-thp": LinuxThp.capabilities,
    **{name: Capabilities(observes=bare_metal.OBSERVES) for name in MACHINES},
    "kvm": Capabilities(observes=frozenset({subjects.PA})),
    **{name: Capabilities(observes=frozenset({subjects.VMM})) for name in HYPERVISORS},
}


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_what_a_subject_observes_is_documented(name: str) -> None:
    text = section(DOCS / "reference" / "subjects.md", "## Names")
    (row,) = (line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
    observed = {OBSERVATIONS[n] for n in re.findall(r"`(\w+)`", row) if n in OBSERVATIONS}
    assert observed == CAPABILITIES[name].observes
    assert ("Runs on symbols" in row) == CAPABILITIES[name].symbolic


@pytest.mark.parametrize("name", BUDGETS)
def test_what_a_budget_allows_is_documented(name: str) -> None:
    text = section(DOCS / "reference" / "cli.md", "### Budgets")
    (row,) = (line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
    budget = BUDGETS[name]
    amounts = [
        f"{budget.hypothesis_examples:,}",
        f"{budget.random_seconds:g}",
        f"{budget.atheris_seconds:,g}",
        str(budget.exhaustive_width),
        f"{budget.rlimit:,}" if budget.rlimit else "no limit",
        "fresh" if budget.seed is None else "fixed",
    ]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == amounts


def test_every_draw_is_documented() -> None:
    text = (DOCS / "reference" / "cases.md").read_text()
    for name, _ in (*CPU_DRAWS, *ACCESS_DRAWS):
        assert f"`{name}`" in text, name


def test_the_generated_pages_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    written = (DOCS / "reference" / "invariants.md").read_text(encoding="utf-8")
    assert written == generate.invariants_page(), "run: python docs/generate.py"
    written = (DOCS / "reference" / "vector-coverage.md").read_text(encoding="utf-8")
    assert written == generate.vectors_page(), "run: python docs/generate.py"
    written = (DOCS / "reference" / "audit-rules.md").read_text(encoding="utf-8")
    assert written == generate.audit_page(), "run: python docs/generate.py"
    record = read_record(DOCS / "reference" / "hunts.json")
    written = (DOCS / "reference" / "hunts.md").read_text(encoding="utf-8")
    assert written == generate.hunts_page(record), "run: python docs/generate.py"


def test_every_rule_of_tables_and_every_historical_bug_has_an_engine_that_finds_it() -> None:
    record = read_record(DOCS / "reference" / "hunts.json")
    found = {hunt.mistake for hunt in record.hunts if hunt.found}
    hunted = {hunt.mistake for hunt in record.hunts if hunt.mistake in MISTAKES}
    assert {name for name in hunted if MISTAKES[name].story} <= found
    assert len(found) > 0.9 * len(hunted)
    page = (DOCS / "reference" / "hunts.md").read_text(encoding="utf-8")
    assert "none yet" not in page


def excerpts() -> list[Any]:
    return [
        pytest.param(block, id=f"{name_of(page)}:{block.line}")
        for page in PAGES
        for block in blocks(page)
        if "from" in block.options
    ]


@pytest.mark.parametrize("block", excerpts())
def test_an_excerpt_stands_in_its_file(block: Block) -> None:
    assert block.text in (REPOSITORY / block.options["from"]).read_text(encoding="utf-8")


# LINKS


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings can be linked by, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, fragment = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target}: no such file"
        assert there.is_relative_to(REPOSITORY), f"{target}: outside the repository"
        assert not fragment or fragment in anchors(there), f"{target}: no such heading"


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_a_page_names_no_path_of_one_machine(page: Path) -> None:
    assert not re.findall(r"(?<![\w.~])/(?:home|root|tmp|usr|work|var)/\S*", page.read_text())


def test_every_page_is_in_the_index() -> None:
    index = DOCS / "README.md"
    linked = {
        (DOCS / target).resolve()
        for target in re.findall(r"\]\(([^)#\s]+)\)", index.read_text(encoding="utf-8"))
    }
    assert set(DOCS.rglob("*.md")) - {index} <= linked
