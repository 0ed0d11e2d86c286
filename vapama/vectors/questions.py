"""What a vector asks, the kinds of questions there are, and who answers them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from vapama.runs import Guarded
from vapama.spec import domains, modes, nested, nondet, paging, second_stage
from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import LA57, LMA, PAE, Cpu
from vapama.spec.memory import Memory, Sparse, Watched
from vapama.spec.nondet import LONG_MODE, ControlStates, Invariant, Nondet
from vapama.spec.outcomes import Outcome, OutsideMemory, Translated, kind
from vapama.spec.stage import Ept, Npt, Stage
from vapama.spec.subject import SECOND_STAGE, TRANSLATE, agree
from vapama.spec.words import Word


class Question(NamedTuple):
    """One access, to be translated by the tables in `memory`: a linear address by a guest's own
    paging (`state` is its control state), or by that and a second `stage`; or a guest-physical one
    by a second stage, which is the `state` then.
    """

    state: Cpu | Stage
    memory: Memory
    access: Any
    stage: Stage | None = None

    def ask(self, subject: Any) -> Outcome:
        """The outcome that a subject, guarded or not, gives."""
        outcome: Outcome
        if self.stage is not None:
            outcome = subject.translate_nested(self.state, self.stage, self.memory, self.access)
        elif isinstance(self.state, Cpu):
            outcome = subject.translate(self.state, self.memory, self.access)
        else:
            outcome = subject.second_stage(self.state, self.memory, self.access)
        return outcome

    def answer(self) -> Outcome:
        """The outcome that the specification gives."""
        if isinstance(self.state, Cpu):
            if self.stage is not None:
                return nested.translate(self.state, self.stage, self.memory, self.access)
            return paging.translate(self.state, self.memory, self.access)
        return second_stage.translate(self.state, self.memory, self.access)

    def acceptable(self) -> tuple[Outcome, ...]:
        """Every outcome that is right, none twice."""
        outcomes = [self.answer()]
        if self.stage is not None and isinstance(self.state, Cpu):
            outcomes += nested.allowed(self.state, self.stage, self.memory, self.access)
        return tuple(o for k, o in enumerate(outcomes) if o not in outcomes[:k])

    def loads(self) -> list[tuple[int, int]]:
        """Addresses and values of what the specification's walk reads, in order."""
        watched = Watched(self.memory)
        self._replace(memory=watched).acceptable()
        return [(address, self.memory.load(address)) for address in watched.loads]


@dataclass(frozen=True)
class Kind:
    """A kind of questions: how one is drawn, what a subject needs to answer it, what the memory is
    drawn as, the kernel of ours that answers it, and whether the symbolic engine enumerates the
    paths of its walk.
    """

    name: str
    draw: Callable[[Nondet], Question]
    needs: str
    memory: str
    kernel: str
    symbolic: bool = True

    def claim(self, nondet: Nondet, subject: Guarded) -> None:
        """Any question of this kind is answered rightly."""
        question = self.draw(nondet)
        observed = question.ask(subject)
        assert any(
            agree(expected, observed, question.memory, subject.capabilities)
            for expected in question.acceptable()
        )

    @property
    def invariant(self) -> Invariant:
        """The claim as one that the engines search."""
        return Invariant(self.name, self.claim, "", (), frozenset({self.needs}), "", "")


def _guest(states: ControlStates) -> Callable[[Nondet], Question]:
    return lambda nondet: Question(*nondet.walk(states))


def _ept(nondet: Nondet) -> Question:
    stage = nondet.ept()
    memory = nondet.memory("host", entries=domains.EPT_ENTRY)
    return Question(stage, memory, nondet.guest_physical_access())


def _npt(nondet: Nondet) -> Question:
    stage = nondet.npt()
    return Question(stage, nondet.memory("host"), nondet.guest_physical_access())


def _over_ept(nondet: Nondet) -> Question:
    cpu, stage = nondet.cpu(LONG_MODE), nondet.ept()
    memory = nondet.memory("host", entries=domains.EPT_ENTRY)
    return Question(cpu, memory, nondet.access(LONG_MODE), stage)


def _over_npt(nondet: Nondet) -> Question:
    cpu, stage = nondet.cpu(LONG_MODE), nondet.npt()
    return Question(cpu, nondet.memory("host"), nondet.access(LONG_MODE), stage)


TRANSLATE_NESTED = "translate_nested"
KINDS = {
    kind_.name: kind_
    for kind_ in (
        Kind("4-level and 5-level paging", _guest(LONG_MODE), TRANSLATE, "guest", "long_mode"),
        Kind("32-bit paging", _guest(nondet.PAGING_32), TRANSLATE, "guest", "legacy"),
        Kind("PAE paging", _guest(nondet.PAE_PAGING), TRANSLATE, "guest", "legacy"),
        Kind(
            "PAE paging, PDPTEs in memory",
            _guest(nondet.PAE_IN_MEMORY),
            TRANSLATE,
            "guest",
            "legacy",
        ),
        Kind("no paging", _guest(nondet.NO_PAGING), TRANSLATE, "guest", "legacy"),
        Kind("EPT", _ept, SECOND_STAGE, "host", "ept"),
        Kind("nested paging", _npt, SECOND_STAGE, "host", "npt"),
        Kind("two stages with EPT", _over_ept, TRANSLATE_NESTED, "host", "nested", symbolic=False),
        Kind(
            "two stages with nested paging",
            _over_npt,
            TRANSLATE_NESTED,
            "host",
            "nested",
            symbolic=False,
        ),
    )
}
"""By name."""


def draws_of(kind_: Kind, question: Question, entries: dict[int, int]) -> dict[str, int]:
    """The draws by which a question of this kind is drawn again."""
    access = question.access
    draws = {f"{kind_.memory}.limit": question.memory.limit}
    draws |= {f"{kind_.memory}[{address:#x}]": entry for address, entry in entries.items()}
    for state in (question.state, question.stage):
        draws |= {} if state is None else _state_draws(state)
    if isinstance(access, Access):
        return draws | {"address": access.address, "access": _access_draw(access)}
    return draws | {"gpa": access.address, "gpa.access": _gpa_access_draw(access)}


def _state_draws(state: Cpu | Stage) -> dict[str, int]:
    if isinstance(state, Cpu):
        registers = {name: v for name, v in state._asdict().items() if isinstance(v, int)}
        return registers | {f"pdpte{k}": value for k, value in enumerate(state.pdptes or ())}
    if isinstance(state, Ept):
        return {
            "ept.maxphyaddr": state.maxphyaddr,
            "ept.low": state.eptp & 0xFFF,
            "ept.root": state.eptp & ~0xFFF,
            "ept.mbec": state.mbec,
            "ept.capabilities": state.capabilities,
        }
    long_mode = int(state.efer & LMA != 0)
    mode = 2 + int(state.cr4 & LA57 != 0) if long_mode else int(state.cr4 & PAE != 0)
    return {
        "npt.maxphyaddr": state.maxphyaddr,
        "npt.mode": mode,
        "npt.cr0": state.cr0,
        "npt.ncr3": state.ncr3,
        "npt.cr4": state.cr4 & ~(PAE | LA57),
        "npt.efer": state.efer & domains.HOST_EFER.free,
        "npt.page1gb": state.page1gb,
    }


def _access_draw(access: Access) -> int:
    return (
        access.implicit
        | access.write << 1
        | access.user << 2
        | access.fetch << 4
        | access.shadow_stack << 6
    )


def _gpa_access_draw(access: GuestPhysicalAccess) -> int:
    return (
        (access.linear ^ 1)
        | access.write << 1
        | access.user << 2
        | access.table << 3
        | access.fetch << 4
        | access.writable << 5
        | access.no_execute << 6
        | access.shadow_stack << 7
    )


# HOW A WALK WENT, IN WORDS

STRUCTURES = {5: "PML5E", 4: "PML4E", 3: "PDPTE", 2: "PDE", 1: "PTE"}


def path_of(question: Question, outcome: Outcome) -> str:
    """The walk in a line: what each entry was, and how it ended."""
    if question.stage is not None:
        modes_ = f"{mode_name(question.state)} over {mode_name(question.stage)}"
        return ", ".join((modes_, *_steps_of_both(question, question.stage)))
    steps = list(_steps(question, outcome))
    return ", ".join((mode_name(question.state), *steps, _ending(question, outcome)))


class Asking(nested.GuestMemory):
    """A guest's memory that keeps what is asked of it."""

    def load(self, address: Word) -> Word:
        """The entry at a guest-physical address. Raises `Stopped`."""
        self.asked = address
        return super().load(address)


def _steps_of_both(question: Question, stage: Stage) -> Iterator[str]:
    """The guest's steps, and of the second stage's walks the last: that which ended it."""
    cpu, memory, access = question.state, question.memory, question.access
    assert isinstance(cpu, Cpu)
    guest = Asking(stage, memory)
    try:
        outcome = paging.translate(cpu, guest, access)
    except nested.Stopped:
        names = [STRUCTURES[level] for level in range(_top(cpu), 0, -1)]
        yield from (f"{name} table" for name in names[: len(guest.loads)])
        yield f"{names[len(guest.loads)]} behind"
        yield from _of_stage(stage, memory, nested.access_to_table(guest.asked), "beyond memory")
        return
    entries = {load.gpa: load.entry for load in guest.loads}
    own = Question(cpu, Sparse(entries, nested.GUEST_LIMIT), access)
    yield from _steps(own, outcome)
    if not isinstance(outcome, Translated):
        yield _ending(own, outcome)
        return
    flags = zip(nested.entries_with_flags(cpu, guest), outcome.updates, strict=True)
    for number, (load, update) in enumerate(flags):
        written = nested.write_back(stage, memory, load, update)
        if nested.flags_are_written_apart(stage) and not isinstance(written, Translated):
            yield f"flags of {STRUCTURES[_top(cpu) - number]}"
            yield _ending(question, written)
            return
    yield "page behind"
    page = nested.access_to_page(cpu, guest, access, outcome.pa)
    yield from _of_stage(stage, memory, page, "translated")


def _of_stage(stage: Stage, memory: Memory, access: Any, translated: str) -> Iterator[str]:
    """How a walk of the second stage goes and ends; `translated` is what comes of it if it does."""
    question = Question(stage, memory, access)
    outcome = question.answer()
    yield from _steps(question, outcome)
    yield translated if isinstance(outcome, Translated) else _ending(question, outcome)


def mode_name(state: Cpu | Stage) -> str:
    """The paging mode of a state."""
    if isinstance(state, Cpu):
        return state.mode.name
    if isinstance(state, Ept):
        return f"{state.levels}-level EPT"
    return {2: "32-bit", 3: "PAE", 4: "4-level", 5: "5-level"}[state.levels] + " nested paging"


def _steps(question: Question, outcome: Outcome) -> Iterator[str]:
    state, loads = question.state, question.loads()
    at, ended = _top(state), isinstance(outcome, OutsideMemory)
    for k, (_, word) in enumerate(loads):
        entry = word
        if _entry_bytes(state) == 4:
            entry = word >> (32 if _upper_half(question, at) else 0) & 0xFFFFFFFF
        name = STRUCTURES[at]
        if k < len(loads) - 1 or ended:
            yield f"{name} table"
        elif not entry & _present(state):
            yield f"{name} not present"
        else:
            yield f"{name} large" if at in (2, 3) and entry & 0x80 else name
        at -= 1
    if ended:
        yield f"{STRUCTURES[at]} outside memory"


def _upper_half(question: Question, level: int) -> bool:
    shift = 12 if level == 1 else 22
    return bool(question.access.address >> shift & 1)


def _top(state: Cpu | Stage) -> int:
    if not isinstance(state, Cpu):
        return state.levels
    in_memory = state.mode is modes.PAE and state.pdptes is None
    return state.levels + in_memory


def _entry_bytes(state: Cpu | Stage) -> int:
    if isinstance(state, Cpu):
        return state.mode.entry_bytes
    return 4 if isinstance(state, Npt) and state.levels == 2 else 8


def _present(state: Cpu | Stage) -> int:
    if isinstance(state, Ept):
        return 0x407 if state.mbec else 7
    return 1


def _ending(question: Question, outcome: Outcome) -> str:
    name = kind(outcome)
    code = getattr(outcome, "error_code", getattr(outcome, "exitinfo1", None))
    if code is not None:
        why = "reserved bit" if code & 8 else "denied" if code & 1 else "not present"
        return f"{name} ({why})"
    if name == "EPT violation":
        rights = outcome.qualification >> 3 & 0xF  # type: ignore[union-attr]
        return f"{name} ({'denied' if rights else 'not present or no rights'})"
    return name
