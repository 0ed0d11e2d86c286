"""The Cases of docs/explanation/findings: each holds of the specification and of the kernels, and
the system in whose folder it is departs from it by the name of the file.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest

from vapama import oracle_runs
from vapama.case import BadInput, load_case
from vapama.oracles.bare_metal import BareMetal
from vapama.oracles.machine import RAM_BYTES
from vapama.oracles.registry import ORACLES, missing
from vapama.replaying import HOLDS, replay_everywhere
from vapama.runs import Guarded, KnownDeparture, Replay, attempt
from vapama.spec import nested
from vapama.spec.domains import EPT_ENTRY
from vapama.spec.memory import Sparse
from vapama.spec.nondet import load_invariants
from vapama.spec.outcomes import EptViolation
from vapama.spec.subject import NotCovered
from vapama.subjects import load_subject

FOLDER = Path(__file__).parents[2] / "docs" / "explanation" / "findings"
CASES = sorted(FOLDER.glob("*/*.json"))
BOTH_STAGES = "the_walk_under_ept_equals_the_reference"
BY_NAME = {oracle.name: oracle for oracle in ORACLES}
WITHOUT_A_CASE = {
    "qemu/nested-pdpte-of-a-pae-host-is-marked-accessed": "as a subject it has hosts in long mode",
    "unicorn/low-reserved-bits-of-a-pdpte-are-ignored": "a claim about PAE paging alone",
    "kvm/table-outside-memory-is-not-present": "a Case would be of one host's MAXPHYADDR",
    "kvm/amd-reserves-bit-8-of-upper-entries": "a Case would be of one host's MAXPHYADDR",
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


class Started:
    """The subject that was asked last: one at a time runs, for their memory."""

    def __init__(self) -> None:
        self.now: Guarded | None = None

    def __getitem__(self, name: str) -> Guarded:
        if self.now is None or self.now.name != name:
            self.end()
            self.now = load_subject(name)
        return self.now

    def end(self) -> None:
        subject = self.now.subject if self.now is not None else None
        machine = getattr(subject, "machine", None) or getattr(subject, "hypervisor", None)
        if machine is not None:
            machine.end()


@pytest.fixture(scope="module")
def started() -> Iterator[Started]:
    made = Started()
    yield made
    made.end()


@cache
def why_not(name: str) -> str:
    return missing(BY_NAME[name])


@pytest.mark.parametrize("path", CASES, ids=name_of)
def test_the_claim_of_a_finding_holds(path: Path) -> None:
    answers = replay_everywhere(path, "optimized")
    assert {answer.what for answer in answers.values()} == {HOLDS}, answers


@pytest.mark.parametrize("path", CASES, ids=name_of)
def test_a_finding_is_still_there(path: Path, started: Started) -> None:
    case = load_case(path)
    assert case.subject == path.parent.name
    if why := why_not(case.subject):
        pytest.skip(why)
    subject = started[case.subject]
    if case.invariant == BOTH_STAGES:
        assert of_both_stages(path, subject.subject) == {path.stem}
        return
    invariant = load_invariants()[case.invariant]
    with pytest.raises(KnownDeparture) as shown:
        attempt(invariant, Replay(case.values(), subject.capabilities.narrow), subject)
    assert str(shown.value) == path.stem


def of_both_stages(path: Path, subject: BareMetal) -> set[str]:
    """The known departures that a Case of both stages shows."""
    nondet = Replay(load_case(path).values(), subject.capabilities.narrow)
    cpu, stage = nondet.cpu(), nondet.ept()
    memory, access = nondet.memory("host", entries=EPT_ENTRY), nondet.access()
    drawn = oracle_runs.nested_case(cpu, stage, memory, access, subject)
    tally = oracle_runs.Tally()
    oracle_runs.give(subject, [drawn])
    for done, result in oracle_runs.finish(subject, [drawn], tally):
        oracle_runs.judge(subject, done, result, tally)
    assert not tally.differences
    return set(tally.known)


def test_a_fetch_that_would_run_on_by_a_departure_under_ept_is_not_asked(started: Started) -> None:
    if why := why_not("bochs"):
        pytest.skip(why)
    subject = started["bochs"]
    path = FOLDER / "bochs" / "guest-flags-are-set-in-read-only-ept-pages.json"
    nondet = Replay(load_case(path).values(), subject.capabilities.narrow)
    cpu, stage = nondet.cpu(), nondet.ept()
    memory, access = nondet.memory("host", entries=EPT_ENTRY), nondet.access()
    entries = oracle_runs.nested_case(cpu, stage, memory, access, subject.subject).memory.touched
    guest_pte, ept_pte, writable = 0xD080, 0xE030, 6 << 3 | 7
    assert entries[guest_pte] == 0x7025, "it maps the page that EPT has read-only"
    entries |= {guest_pte: 0x6025, 0x6 << 12: 0}
    fetch = access._replace(fetch=1)
    for frame, is_asked in ((0x8000, True), (RAM_BYTES, False)):
        changed = Sparse({**entries, ept_pte: frame | writable}, memory.limit)
        assert isinstance(nested.translate(cpu, stage, changed, fetch), EptViolation)
        with nullcontext() if is_asked else pytest.raises(NotCovered, match="no RAM"):
            oracle_runs.nested_case(cpu, stage, changed, fetch, subject.subject)


def test_every_known_departure_has_a_case_or_the_reason_why_not() -> None:
    known = {f"{o.name}/{departure.name}" for o in ORACLES for departure in o.departures}
    assert known == {name_of(path) for path in CASES} | WITHOUT_A_CASE.keys()


def test_a_case_for_a_subject_that_does_not_observe_it_is_bad_input() -> None:
    path = next(path for path in CASES if path.parent.name == "kvm-shadow")
    with pytest.raises(BadInput, match="needs vmm, which reference does not observe"):
        replay_everywhere(path, "reference")
