"""Cases run again by every engine, and explained."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vapama.case import BadInput, Case, load_case
from vapama.check import chosen_invariants
from vapama.explain import (
    describe_outcome,
    explain_access,
    explain_guest_physical,
    explain_nested,
)
from vapama.explain_programs import RecordedPart
from vapama.fuzz import atheris_engine
from vapama.fuzz.decoded import ByteDraws
from vapama.fuzz.exhaustive import Scripted
from vapama.proofs.prover import replay_pinned
from vapama.proofs.symbolic import Unfaithful
from vapama.runs import (
    Concrete,
    Guarded,
    GuardedCall,
    GuardedPart,
    KnownDeparture,
    Replay,
    SubjectHung,
    SubjectRaised,
    attempt,
    hang_guard,
)
from vapama.snapshot.truth import load_snapshot
from vapama.spec import nested, second_stage
from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import Cpu
from vapama.spec.maps import Drawn
from vapama.spec.memory import Image, Memory
from vapama.spec.nondet import Invariant, Reject
from vapama.spec.outcomes import Outcome
from vapama.spec.paging import translate
from vapama.spec.stage import Ept, Npt, Stage
from vapama.spec.subject import agree
from vapama.subjects import load_subject
from vapama.verdict import EXIT_COUNTEREXAMPLE, EXIT_HELD, EXIT_UNDECIDED

FAILS, HOLDS, SAYS_NOTHING = "fails", "holds", "says nothing"
HANG_SECONDS = 10.0
Walk = tuple[Cpu | Stage | tuple[Cpu, Stage], Memory, Access | GuestPhysicalAccess]
"""What a walk was asked: of linear addresses by control state, or by that and a second stage; of
guest-physical ones by stage.
"""


@dataclass(frozen=True)
class Answer:
    """What an engine's replay of a Case came to."""

    what: str
    text: str


BREAKS = Answer(SAYS_NOTHING, "says nothing: the Case breaks an assumption")


def replay_everywhere(path: Path, subject_name: str | None = None) -> dict[str, Answer]:
    """A Case replayed by each engine: from its values, from the bytes that the fuzzers decode,
    along the exhaustive engine's choices, and on the symbolic engine with its draws pinned.
    """
    case, invariant, subject = _load(path, subject_name)
    narrow = subject.capabilities.narrow
    answers = {
        "hypothesis": _concrete(invariant, Replay(case.values(), narrow), subject),
        "atheris": _from_bytes(invariant, case, subject),
        "exhaustive": _concrete(invariant, Scripted(case.values(), narrow), subject),
    }
    if subject.capabilities.symbolic and not invariant.searched:
        answers["z3"] = _symbolic(invariant, subject, case)
    return answers


def status(answers: dict[str, Answer]) -> int:
    """1 if the Case fails on any engine, 0 if it holds on all, else 3."""
    what = {answer.what for answer in answers.values()}
    if FAILS in what:
        return EXIT_COUNTEREXAMPLE
    return EXIT_HELD if what == {HOLDS} else EXIT_UNDECIDED


def _load(path: Path, subject_name: str | None) -> tuple[Case, Invariant, Guarded]:
    case = load_case(path)
    (invariant,) = chosen_invariants([case.invariant])
    subject = load_subject(subject_name or case.subject)
    if lacking := subject.lacks(invariant):
        raise BadInput(
            f"{path}: {invariant.name} needs {', '.join(sorted(lacking))}, which "
            f"{subject.name} does not observe: give another --subject"
        )
    return case, invariant, subject


def _concrete(invariant: Invariant, run: Concrete, subject: Guarded) -> Answer:
    try:
        with hang_guard(HANG_SECONDS):
            failure = attempt(invariant, run, subject)
    except Reject:
        return BREAKS
    except KnownDeparture as departure:
        return Answer(HOLDS, f"holds but for a known departure: {departure}")
    if failure is None:
        return Answer(HOLDS, "holds")
    return Answer(FAILS, f"fails: {failure.message}")


def _from_bytes(invariant: Invariant, case: Case, subject: Guarded) -> Answer:
    try:
        with hang_guard(HANG_SECONDS):
            data = atheris_engine.encoded(invariant, case, subject)
    except Reject:
        return BREAKS
    return _concrete(invariant, ByteDraws(data, subject.capabilities.narrow), subject)


def _symbolic(invariant: Invariant, subject: Guarded, case: Case) -> Answer:
    try:
        failure = replay_pinned(invariant, subject, case)
    except Reject:
        return BREAKS
    except Unfaithful as error:
        return Answer(FAILS, f"fails: {error}")
    except (SubjectRaised, SubjectHung) as error:
        return Answer(FAILS, f"fails: the subject raised {error}")
    return Answer(HOLDS, "holds") if failure is None else Answer(FAILS, f"fails: {failure}")


class Recorded(Guarded):
    """A subject that keeps each walk asked of it and its outcome, None if there was none."""

    def __init__(self, guarded: Guarded) -> None:
        super().__init__(guarded.name, guarded.subject)
        self.recorded: list[tuple[Walk, Outcome | None]] = []
        self.parts: list[RecordedPart] = []
        """Parts with a state of their own (see `GuardedPart`), as programs run on them."""
        self.maps: list[Drawn] = []
        """What states of a model are made of."""

    def coherence(self) -> Any:
        """The model, of which each state is kept."""
        model = super().coherence()

        def state(new: Callable[[str], Drawn], *args: Any, **named: Any) -> Any:
            def kept(name: str) -> Drawn:
                self.maps.append(new(name))
                return self.maps[-1]

            return model.Model(kept, *args, **named)

        return SimpleNamespace(Model=state)

    def __getattr__(self, name: str) -> Any:
        """A faculty; a part with a state of its own that it gives is recorded."""
        faculty = super().__getattr__(name)
        if not isinstance(faculty, GuardedCall):
            return faculty

        def recorded(*args: Any, **named: Any) -> Any:
            part = faculty(*args, **named)
            if isinstance(part, GuardedPart):
                part = RecordedPart(name, part, args)
                self.parts.append(part)
            return part

        return recorded

    def translate(self, cpu: Cpu, memory: Memory, access: Access) -> Outcome:
        """The subject's outcome, kept."""
        outcome: Outcome | None = None
        try:
            outcome = super().translate(cpu, memory, access)
        finally:
            self.recorded.append(((cpu, memory, access), outcome))
        return outcome

    def second_stage(self, stage: Stage, memory: Memory, access: GuestPhysicalAccess) -> Outcome:
        """The subject's outcome, kept."""
        outcome: Outcome | None = None
        try:
            outcome = super().second_stage(stage, memory, access)
        finally:
            self.recorded.append(((stage, memory, access), outcome))
        return outcome

    def translate_nested(self, cpu: Cpu, stage: Stage, memory: Memory, access: Access) -> Outcome:
        """The subject's outcome, kept."""
        outcome: Outcome | None = None
        try:
            outcome = super().translate_nested(cpu, stage, memory, access)
        finally:
            self.recorded.append((((cpu, stage), memory, access), outcome))
        return outcome


def _explained(walk: Walk) -> tuple[Iterator[str], Outcome]:
    """A walk line by line, and the reference's outcome."""
    state, memory, access = walk
    if isinstance(state, Cpu):
        assert isinstance(access, Access)
        return explain_access(state, memory, access), translate(state, memory, access)
    if isinstance(access, Access):
        assert not isinstance(state, Ept | Npt)
        cpu, stage = state
        lines = explain_nested(cpu, stage, memory, access)
        return lines, nested.translate(cpu, stage, memory, access)
    assert isinstance(state, Ept | Npt)
    expected = second_stage.translate(state, memory, access)
    return explain_guest_physical(state, memory, access), expected


def explain_case(path: Path, subject_name: str | None = None) -> Iterator[str]:
    """What a Case does: each access of the subject as a walk, and what the invariant says."""
    case, invariant, guarded = _load(path, subject_name)
    subject = Recorded(guarded)
    yield f"{invariant.title} ({invariant.source})"
    yield f"subject {subject.name}; found by {case.engine}"
    answer = _concrete(invariant, Replay(case.values(), subject.capabilities.narrow), subject)
    for number, (walk, observed) in enumerate(subject.recorded, 1):
        yield ""
        if len(subject.recorded) > 1:
            yield f"access {number} of {len(subject.recorded)}"
        lines, expected = _explained(walk)
        yield from lines
        if observed is None:
            yield f"subject  {subject.name} gives no outcome"
        elif agree(expected, observed, walk[1], subject.capabilities):
            yield f"         {subject.name} agrees"
        else:
            yield f"subject  {describe_outcome(observed)}   <- not what the reference allows"
    for part in subject.parts:
        yield ""
        yield from part.told
    for drawn in subject.maps:
        yield from drawn.told()
    yield ""
    yield f"the claim {answer.text}"


def explain_addresses(
    path: Path, addresses: list[str], *, write: bool, fetch: bool, user: bool
) -> Iterator[str]:
    """The walks of linear addresses in a snapshot. Raises `BadInput`."""
    numbers = []
    for text in addresses:
        try:
            number = int(text, 0)
        except ValueError:
            number = -1
        if not 0 <= number < 1 << 64:
            raise BadInput(f"{text}: not a linear address: give a number such as 0x7fff12345000")
        numbers.append(number)
    guest = load_snapshot(path)
    memory = Image(guest.image)
    for number in numbers:
        access = Access(number, write=int(write), fetch=int(fetch), user=int(user))
        yield from explain_access(guest.cpu, memory, access)
