"""What an audit finds: the rules, findings, and a report of them.

The numbers of rules are those of docs/explanation/hypervisor.md, where there is one.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from vapama.verdict import EXIT_COUNTEREXAMPLE, EXIT_HELD, EXIT_UNDECIDED

VIOLATION, NOTE, UNKNOWN_BELOW = "violation", "note", "not held"
"""What a finding is: a rule that does not hold; something that is allowed and seldom meant; a part
of the tables that the image does not hold, so that nobody can say."""


class Rule(NamedTuple):
    """What a rule says, its number, and what a finding of it is."""

    says: str
    number: str = ""
    status: str = VIOLATION


RULES = {
    # The form of any tables.
    "reserved-bits": Rule("an entry that is present has no reserved bit set"),
    "unaligned-large-page": Rule("a large page begins at a multiple of its size", "21"),
    "misconfigured-entry": Rule("an EPT entry has rights and a memory type that entries may have"),
    "absent-table": Rule("the image holds every table", status=UNKNOWN_BELOW),
    "cycle": Rule("no table leads back to itself", "13"),
    "two-levels": Rule("a table is used at one level", "13"),
    "shared-table": Rule("one entry leads to a table of a second stage", "8, 13"),
    "dirty-and-not-accessed": Rule("a page that is dirty was accessed", status=NOTE),
    # What is mapped.
    "table-reachable": Rule("the guest cannot reach the tables that map its memory", "6"),
    "no-slot": Rule("what is mapped is in a memory slot", "3"),
    "crosses-a-slot": Rule("a large page is wholly inside one memory slot", "21"),
    "misplaced-large-page": Rule(
        "a large page is where host pages of its size begin: gpa = hva modulo its size", "21"
    ),
    "wrong-frame": Rule("a guest page is mapped to where the host has it", "2, 19"),
    "two-frames": Rule("a guest page is in one place", "2, 19"),
    "writable-alias": Rule("no two guest pages are in one place that can be written", "7"),
    "alias": Rule("two guest pages are in one place", "7", NOTE),
    "writable-read-only-slot": Rule("what is read-only cannot be written", "7"),
    "unlogged-write": Rule("a page that can be written is in its slot's dirty log", "22"),
    "device-in-a-slot": Rule(
        "an entry marked as a device's, of this generation of the slots, is for no memory", "23"
    ),
    "executable-large-page": Rule("no large page is executable, if so asked", "21"),
    # Shadow tables against the guest's own.
    "not-mapped-by-guest": Rule("the guest's tables map what is mapped", "8"),
    "absent-guest-table": Rule("the image holds the guest's tables", status=UNKNOWN_BELOW),
    "excess-rights": Rule("no more is allowed than the guest's tables allow", "10, 20"),
    "not-dirty": Rule("a page that can be written is dirty in the guest's tables", "20"),
    "not-accessed": Rule("the guest's entries on the way are marked accessed", "8"),
    "larger-than-guest": Rule("a page is no larger than the guest's", "21"),
    "writable-table": Rule("a guest's table that is shadowed cannot be written", "5"),
    "may-be-stale": Rule(
        "what maps by a table that was named as unsync may be stale", "15", status=NOTE
    ),
}


class Finding(msgspec.Struct, kw_only=True):
    """A rule that does not hold, and where: the addresses, the offending entry and the way to it.

    `path` are the entries on the way in the tables that are judged, `guest_path` those of the
    guest's own tables for the same address.
    """

    rule: str
    status: str
    tables: str
    what: str
    address: str
    bytes: int
    entry_at: str = ""
    entry: str = ""
    path: list[str] = []
    guest_path: list[str] = []


class Counted(NamedTuple):
    """How often a rule does not hold: in which tables, and what that is. Of mappings each page
    counts.
    """

    tables: str
    rule: str
    status: str


@dataclass
class Report:
    """What an audit found: findings (of each rule so many), how often each rule does not hold, and
    how much was looked at. `stopped` names the limit that was met, if one was.
    """

    findings: list[Finding] = field(default_factory=list)
    counts: Counter[Counted] = field(default_factory=Counter)
    pages: int = 0
    tables: int = 0
    entries: int = 0
    stopped: str = ""

    def number_of(self, status: str) -> int:
        """How often rules do not hold with this status, told or not."""
        return sum(number for counted, number in self.counts.items() if counted.status == status)


def exit_status(report: Report) -> int:
    """1 if there is a violation; else 3 if not everything could be looked at; else 0."""
    if report.number_of(VIOLATION):
        return EXIT_COUNTEREXAMPLE
    if report.stopped or report.number_of(UNKNOWN_BELOW):
        return EXIT_UNDECIDED
    return EXIT_HELD


def summary(report: Report) -> dict[str, Any]:
    """The end of the JSON."""
    return {
        "rules": [
            {**counted._asdict(), "says": RULES[counted.rule].says, "number": number}
            for counted, number in sorted(report.counts.items())
        ],
        "violations": report.number_of(VIOLATION),
        "notes": report.number_of(NOTE),
        "not_held": report.number_of(UNKNOWN_BELOW),
        "complete": not report.stopped,
        "stopped": f"most-{report.stopped}" if report.stopped else "",
        "tables": report.tables,
        "entries_read": report.entries,
        "pages": report.pages,
    }


def as_lines(report: Report) -> Iterator[str]:
    """A report for people to read: each finding, then a table of the rules."""
    for finding in report.findings:
        yield ""
        last = int(finding.address, 16) + finding.bytes - 1
        yield f"{finding.status}: {finding.rule} ({finding.tables})"
        yield f"  {int(finding.address, 16):#018x}-{last:#018x}  {finding.what}"
        yield from (f"    {step}" for step in finding.path)
        if finding.guest_path:
            yield "  the guest's own tables:"
            yield from (f"    {step}" for step in finding.guest_path)
    yield ""
    for counted, number in sorted(report.counts.items()):
        yield (
            f"{counted.status:<10} {number:>9,}  {counted.rule:<24} {counted.tables}; the rule: "
            f"{RULES[counted.rule].says}"
        )
    yield (
        f"{report.number_of(VIOLATION):,} violations, {report.number_of(NOTE):,} notes; "
        f"{report.tables:,} tables, {report.entries:,} entries read, {report.pages:,} pages"
    )
