"""Reports: one table and one line of verdict for people, JSON and JUnit for machines."""

import io
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vapama.check import Report
from vapama.verdict import (
    CONDITIONAL,
    COUNTEREXAMPLE,
    HELD,
    NOT_APPLICABLE,
    PROVED,
    UNDECIDED,
    Verdict,
)

STYLES = {
    PROVED: "bold green",
    HELD: "green",
    COUNTEREXAMPLE: "bold red",
    UNDECIDED: "yellow",
    NOT_APPLICABLE: "dim",
    CONDITIONAL: "yellow",
}


def column(verdict: Verdict) -> str:
    """The column of a verdict: its engine, or the subject where that is the point."""
    other = verdict.subject in ("compiled", "unicorn") and verdict.engine == "random"
    return verdict.subject if other else verdict.engine


def cell(verdict: Verdict) -> str:
    """A verdict in a few characters: proved, how many runs held, or what is wrong."""
    text = {
        PROVED: "proved",
        HELD: _short(verdict.executions),
        COUNTEREXAMPLE: "FAILS",
        UNDECIDED: "?",
        CONDITIONAL: "?",
        NOT_APPLICABLE: "-",
    }[verdict.status]
    return f"[{STYLES[verdict.status]}]{text}[/]"


def _short(number: int) -> str:
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


COLUMNS = ("z3", "exhaustive", "random", "hypothesis", "atheris", "compiled", "unicorn")
WIDE = 130
"""Columns of a terminal from which on an invariant and its verdicts fit on one line."""


def table(report: Report, width: int) -> Table:
    """Invariants by engines: proved, or in how many runs the claim held."""
    found = {(v.invariant, column(v)): v for v in report.verdicts}
    names = [c for c in COLUMNS if any(c == seen for _, seen in found)]
    shown = Table(box=None, pad_edge=False, header_style="bold")
    wide = width >= WIDE
    shown.add_column("invariant" if wide else "", no_wrap=True)
    for name in names:
        shown.add_column(name, no_wrap=True, justify="right")
    for invariant in dict.fromkeys(v.invariant for v in report.verdicts):
        cells = [cell(found[invariant, c]) if (invariant, c) in found else "" for c in names]
        shown.add_row(invariant.replace("_", " ") if wide else " ", *cells)
    return shown


def print_verdicts(report: Report, console: Console) -> None:
    """The table; on a narrow terminal each invariant's name stands above its verdicts."""
    if console.width >= WIDE:
        console.print(table(report, console.width))
        return
    lines = _rendered(table(report, 0), console)
    console.print(lines[0], markup=True)
    for invariant, line in zip(
        dict.fromkeys(v.invariant for v in report.verdicts), lines[1:], strict=True
    ):
        console.print(invariant.replace("_", " "))
        console.print(line)


def _rendered(shown: Table, console: Console) -> list[Text]:
    """The lines of a table, one for each row."""
    return [
        Text.assemble(*((segment.text, segment.style or "") for segment in line))
        for line in console.render_lines(shown, pad=False)
    ]


def print_ledger(verdicts: list[Verdict], seconds: float, console: Console) -> None:
    """The ledger of proofs as a table: what each took, what bitwuzla says, and what it rests on."""
    proofs = sorted((v for v in verdicts if v.status != NOT_APPLICABLE), key=lambda v: v.invariant)
    numbers = {v.invariant: number for number, v in enumerate(proofs, 1)}
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("", justify="right")
    shown.add_column("proof", overflow="fold")
    for name in ("verdict", "paths", "queries", "seconds", "bitwuzla", "rests on"):
        left = name in ("verdict", "rests on")
        shown.add_column(name, no_wrap=True, justify="left" if left else "right")
    for v in proofs:
        shown.add_row(
            str(numbers[v.invariant]),
            v.invariant.replace("_", " "),
            f"[{STYLES[v.status]}]{v.status}[/]",
            f"{v.executions:,}",
            f"{v.queries:,}",
            f"{v.seconds:.1f}",
            v.second_solver,
            ", ".join(str(numbers.get(name, name)) for name in v.rests_on),
        )
    console.print(shown)
    paths, queries = sum(v.executions for v in proofs), sum(v.queries for v in proofs)
    console.print(
        f"{sum(v.status == PROVED for v in proofs)} of {len(proofs)} proved: {paths:,} paths, "
        f"{queries:,} queries, {sum(v.seconds for v in proofs):.0f} s of work in {seconds:.0f} s"
    )


def print_report(report: Report, console: Console, saved: dict[int, Path]) -> None:
    """The table, what is behind its cells where it matters, and the verdict."""
    if report.verdicts:
        print_verdicts(report, console)
    for agreed in report.agreements:
        style = "green" if agreed.good else "bold red"
        console.print(
            f"real guest, {agreed.what}: [{style}]{agreed.right:,} of {agreed.total:,}[/] agree"
        )
        if agreed.first_difference:
            console.print(f"  first difference: {agreed.first_difference}")
    for verdict in report.verdicts:
        if verdict.states and verdict.good:
            title = verdict.invariant.replace("_", " ")
            console.print(f"distinct states: {verdict.states:,}, {title}", soft_wrap=True)
    if report.coverage:
        console.print(f"atheris coverage: {report.coverage}")
    for name, count in known_departures(report).items():
        console.print(f"known departure, {name}: {count:,} cases")
    for name, why in report.skipped.items():
        console.print(f"[yellow]skipped[/] {name}: {why}")
    for verdict in report.verdicts:
        if verdict.status == UNDECIDED:
            console.print(
                f"[yellow]undecided[/] {verdict.invariant} ({column(verdict)}): {verdict.why}",
                soft_wrap=True,
            )
    for verdict in report.counterexamples:
        console.print(
            f"[bold red]counterexample[/] {verdict.invariant} ({column(verdict)}): {verdict.why}",
            soft_wrap=True,
        )
        if id(verdict) in saved:
            console.print(f"  replay it: vapama explain {saved[id(verdict)]}", soft_wrap=True)
    console.print(verdict_line(report), soft_wrap=True)


def known_departures(report: Report) -> dict[str, int]:
    """How often each known departure of a subject was seen."""
    counts: dict[str, int] = {}
    for verdict in report.verdicts:
        for name, count in verdict.known.items():
            key = f"{verdict.subject} {name}"
            counts[key] = counts.get(key, 0) + count
    return counts


def verdict_line(report: Report) -> str:
    """One line that says it all."""
    by_status: dict[str, int] = {}
    for v in report.verdicts:
        by_status[v.status] = by_status.get(v.status, 0) + 1
    invariants = len({v.invariant for v in report.verdicts})
    counted = ", ".join(
        f"{by_status[s]} {s}" for s in (PROVED, HELD, UNDECIDED, COUNTEREXAMPLE) if s in by_status
    )
    wrong = sum(agreed.total - agreed.right for agreed in report.agreements)
    what = f"{invariants} invariants at budget {report.budget.name}: {counted or 'nothing run'}"
    if report.agreements:
        what += f"; real guest: {wrong} differences" if wrong else "; real guest agrees"
    return {
        0: f"[bold green]ALL HELD[/] {what}",
        1: f"[bold red]COUNTEREXAMPLE[/] {what}",
    }.get(report.status, f"[bold yellow]UNDECIDED[/] {what}")


def as_json(report: Report) -> bytes:
    """The report as JSON."""
    content: dict[str, Any] = {
        "format": "vapama-report",
        "version": 1,
        "budget": report.budget.name,
        "exit_status": report.status,
        "verdicts": report.verdicts,
        "real_guest": report.agreements,
        "skipped": report.skipped,
        "coverage": report.coverage,
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"


def write_junit(report: Report, path: Path) -> None:
    """The report as JUnit XML: a test case for each invariant and engine."""
    suite = ET.Element("testsuite", name="vapama", tests=str(len(report.verdicts)))
    for v in report.verdicts:
        case = ET.SubElement(
            suite,
            "testcase",
            classname=f"{v.subject}.{v.engine}",
            name=v.invariant,
            time=f"{v.seconds:.3f}",
        )
        if v.status == COUNTEREXAMPLE:
            ET.SubElement(case, "failure", message=v.why)
        elif v.status == UNDECIDED:
            ET.SubElement(case, "error", message=v.why)
        elif v.status == NOT_APPLICABLE:
            ET.SubElement(case, "skipped", message=v.why)
    for agreed in report.agreements:
        case = ET.SubElement(suite, "testcase", classname="real guest", name=agreed.what)
        if not agreed.good:
            ET.SubElement(case, "failure", message=agreed.first_difference or "nothing compared")
    ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def write_html(report: Report, path: Path) -> None:
    """The report as one HTML page: what the terminal shows."""
    page = Console(record=True, width=160, file=io.StringIO(), highlight=False)
    print_report(report, page, {})
    path.write_text(page.export_html(inline_styles=True), encoding="utf-8")
