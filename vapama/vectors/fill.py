"""Test vectors made from the specification.

Z3 gives a witness for every path of every walk: the symbolic engine runs the specification itself
and for each of its paths, and each way to exercise it, values are asked for that take it. Random
draws add what a path does not tell apart, and seeded mistakes what tells them from what is right.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Any

import z3

from vapama.bugs.mistakes import MISTAKES
from vapama.fuzz.decoded import RandomDraws
from vapama.proofs.symbolic import CHOICE, Explorer, Path, word
from vapama.runs import Guarded, Replay, SubjectHung, SubjectRaised, attempt, shrink
from vapama.spec.cpu import LMA, LME, NXE, PAE, PE, PG, WP, Cpu
from vapama.spec.nondet import Nondet, Reject
from vapama.spec.outcomes import RSVD, EptViolation, NestedPageFault, P, PageFault, Translated
from vapama.spec.paging import EXECUTE_DISABLE, USER, WRITABLE
from vapama.spec.stage import EPT_CAPABILITIES, Ept, Npt
from vapama.vectors.form import Vector
from vapama.vectors.questions import KINDS, Kind, Question, draws_of, mode_name, path_of
from vapama.vectors.two_stages import lifted

RLIMIT = 20_000_000
Progress = Callable[[str], None]
Draws = dict[str, int]


def quiet(what: str) -> None:
    """Progress that nobody sees."""


# WITNESSES

ACCESSES = {
    "read": 0,
    "write": 2,
    "user read": 4,
    "user write": 6,
    "fetch": 16,
    "user fetch": 20,
    "implicit read": 1,
    "implicit write": 3,
    "shadow-stack read": 64,
    "shadow-stack write": 66,
    "user shadow-stack read": 68,
    "user shadow-stack write": 70,
}
GUEST_PHYSICAL_ACCESSES = {
    "read": 0,
    "write": 2,
    "fetch": 16,
    "user read": 4,
    "user fetch": 20,
    "table read": 8,
    "table write": 10,
    "table read for no linear address": 9,
}


def witnesses(kind_: Kind, progress: Progress = quiet) -> Iterator[tuple[str, Draws]]:
    """For every path of this kind's walk and every way to exercise it, that way's name and draws
    that take both.
    """
    explorer = Explorer(RLIMIT)
    found: list[tuple[str, Draws]] = []

    def walk() -> None:
        question = kind_.draw(explorer)
        outcome = question.answer()
        ways = _exercises(kind_, outcome, len(explorer.memories[0].loads))
        name = explorer.one_of("exercise", list(ways))
        for condition in ways[name](question):
            explorer.assume(condition)
        found.append((name, preferred(explorer)))

    explorer.on_path = lambda paths: progress(f"{kind_.name}: {paths:,} paths")
    explorer.explore(walk)
    yield from found


Exercise = Callable[[Question], list[Any]]


def _exercises(kind_: Kind, outcome: Any, loads: int) -> dict[str, Exercise]:
    """Ways to exercise a path, by name: conditions on its question.

    What is translated or denied is so for several kinds of access, on each path for others.
    """
    ways: dict[str, Exercise] = {"any access": lambda question: []}
    if isinstance(outcome, Translated) or _is_denied(outcome):
        kinds = ACCESSES if kind_.memory == "guest" else GUEST_PHYSICAL_ACCESSES
        names = list(kinds)[loads % SHARES :: SHARES]
        ways |= {name: _of_access(kind_, kinds[name]) for name in names}
    return ways


SHARES = 3


def _is_denied(outcome: Any) -> bool:
    """Whether a fault is one for lack of rights, on all inputs of its path."""
    if isinstance(outcome, EptViolation):
        return word(outcome.qualification).may >> 3 & 0xF != 0
    if isinstance(outcome, PageFault | NestedPageFault):
        code = outcome.error_code if isinstance(outcome, PageFault) else outcome.exitinfo1
        return word(code).must & P != 0 and word(code).may & RSVD == 0
    return False


def _of_access(kind_: Kind, code: int) -> Exercise:
    def conditions(question: Question) -> list[Any]:
        access = question.access
        wanted = [
            access.write == (code >> 1 & 1),
            access.user == (code >> 2 & 1),
            access.fetch == (code >> 4 & 1),
        ]
        if kind_.memory == "guest":
            wanted += [access.implicit == (code & 1), access.shadow_stack == (code >> 6 & 1)]
        else:
            wanted += [access.table == (code >> 3 & 1), access.linear == (code & 1 ^ 1)]
            wanted += [access.shadow_stack == 0]
        return wanted

    return conditions


# VALUES THAT A PERSON WOULD TAKE

ADDRESSES = (0x0000_00C0_A060_7ABC, 0xFFFF_FEC0_A060_7ABC, 0x0002_00C0_A060_7ABC, 0x80A0_7ABC)
"""Linear addresses with another index at each level."""
PREFERRED: dict[str, Sequence[int]] = {
    "maxphyaddr": (40, 36, 52),
    "cr0": (PG | PE | WP, PG | PE, PE, 0),
    "cr3": (0x1000, 0x1020),
    "cr4": (PAE, PAE | 1 << 12, 0, 1 << 4),
    "efer": (LME | LMA | NXE, LME | LMA, NXE, 0),
    "rflags": (2,),
    "pkru": (0,),
    "pkrs": (0,),
    "page1gb": (1,),
    "pse36": (1,),
    **{f"pdpte{k}": (k + 2 << 12 | 1,) for k in range(4)},
    "address": ADDRESSES,
    "gpa": (*ADDRESSES[:1], *ADDRESSES[2:]),
    "ept.maxphyaddr": (40,),
    "ept.low": (0x5E, 0x1E, 0x66),
    "ept.root": (0x1000,),
    "ept.mbec": (0,),
    "ept.capabilities": (EPT_CAPABILITIES,),
    "npt.maxphyaddr": (40, 36),
    "npt.mode": (2, 3, 1, 0),
    "npt.cr0": (PG | PE | WP,),
    "npt.ncr3": (0x1000,),
    "npt.cr4": (0, 1 << 4),
    "npt.efer": (NXE, 0),
    "npt.page1gb": (1,),
    "guest.limit": (0x10000,),
    "host.limit": (0x10000,),
}


def preferred(explorer: Explorer) -> Draws:
    """Draws that take the current path, as near to what a person would take as it allows."""
    solver, draws = explorer.solver, explorer.draws
    solver.push()
    try:
        for name, term in draws.items():
            _settle(solver, term, PREFERRED.get(name, ()))
        for memory in explorer.memories:
            for number, (_, entry) in enumerate(memory.loads):
                _settle(solver, entry, _entries(number))
        return dict(explorer.model())
    finally:
        solver.pop()


def _entries(number: int) -> Sequence[int]:
    """What the entry that is read `number` places after the first would be: a table in the next
    frame, or a page.
    """
    table = number + 2 << 12
    flags = (0x7, 0x67, 0x27, 0x37, 0x3, 0x5, 0x1)
    large = [(0x20_0000 << 9 * k | bits) for bits in (0x87, 0xB7, 0x83) for k in (0, 1)]
    return (*(table | bits for bits in flags), *large, 0)


def _settle(solver: Any, term: Any, values: Sequence[int]) -> None:
    """Fix a term at the first of these values that it can have, else at few and low bits."""
    for value in values:
        if solver.check(term == value) == z3.sat:
            solver.add(term == value)
            return
    if solver.check() != z3.sat:
        return
    value = solver.model().eval(term, model_completion=True).as_long()
    for bit in reversed(range(64)):
        if value >> bit & 1:
            clear = z3.Extract(bit, bit, term) == 0
            if solver.check(clear) == z3.sat:
                value = solver.model().eval(term, model_completion=True).as_long()
                solver.add(clear)
    solver.add(term == value)


def composed(kind_: Kind, alone: Sequence[Question]) -> Iterator[tuple[str, Draws]]:
    """Of a kind with two stages, whose paths are too many to enumerate: the paths of each stage put
    together, as `vapama.vectors.two_stages` does it, one question for each way of the whole.
    """
    seen: set[str] = set()
    for name, question in lifted(alone, Ept if "EPT" in kind_.name else Npt):
        path = path_of(question, question.answer())
        if path not in seen:
            seen.add(path)
            yield name, draws_of(kind_, question, dict(question.loads()))


GUESTS = KINDS["4-level and 5-level paging"]


@lru_cache(maxsize=1)
def guests(progress: Progress = quiet) -> tuple[Question, ...]:
    """Guests of one stage: a witness for each way in which their walks go and end, and for the
    pages of 4 KBytes for each kind of access.
    """
    return distinct(GUESTS.draw(Replay(draws)) for _, draws in witnesses(GUESTS, progress))


def distinct(questions: Iterable[Question]) -> tuple[Question, ...]:
    """The first of the questions that go and end alike, for the same kind of access."""
    found: dict[tuple[Any, ...], Question] = {}
    for question in questions:
        outcome = question.answer()
        access = question.access
        small = isinstance(outcome, Translated) and outcome.level == 1
        kind_of_access = (access.write, access.fetch, access.shadow_stack) if small else ()
        found.setdefault((path_of(question, outcome), kind_of_access), question)
    return tuple(found.values())


# VECTORS


def vector_of(kind_: Kind, draws: Draws, name: str, flags: Sequence[str]) -> Vector:
    """The vector of these draws. Raises `Reject` if they are not ones that the kind can have."""
    question = kind_.draw(Replay(draws))
    outcome = question.answer()
    entries = dict(question.loads())
    return Vector(
        id=name,
        kind=kind_.name,
        path=path_of(question, outcome),
        flags=(*flags, *_flags(question)),
        question=question,
        entries=entries,
        acceptable=question.acceptable(),
    )


def _flags(question: Question) -> tuple[str, ...]:
    """What a question exercises besides its path."""
    state = question.state
    said = [mode_name(state), *([] if question.stage is None else [mode_name(question.stage)])]
    if isinstance(state, Cpu):
        named = (
            ("WP", state.wp),
            ("SMEP", state.smep),
            ("SMAP", state.smap),
            ("AC", state.ac),
            ("PKE", state.pke),
            ("PKS", state.pks),
            ("CET", state.cet),
            ("NXE", state.nxe),
            ("LAM", state.masks),
        )
        said += [name for name, on in named if on]
    entries = [entry for _, entry in question.loads()]
    if entries and isinstance(state, Cpu) and question.stage is None:
        every = WRITABLE | USER
        none = 0
        for entry in entries:
            every, none = every & entry, none | entry
        said += [
            name
            for name, missing in (
                ("read-only", not every & WRITABLE),
                ("supervisor page", not every & USER),
                ("no-execute", none & EXECUTE_DISABLE),
            )
            if missing
        ]
    return tuple(said)


@dataclass
class Filled:
    """Vectors in the making, none twice."""

    vectors: list[Vector] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)

    def add(self, kind_: Kind, draws: Draws, origin: str, flags: Sequence[str]) -> Vector | None:
        """The vector of these draws, unless there is one like it."""
        number = sum(v.kind == kind_.name for v in self.vectors) + 1
        name = f"{kind_.name.replace(',', '').replace(' ', '-')}-{number:04}"
        vector = vector_of(kind_, draws, name, (origin, *flags))
        question = vector.question
        key = str((*question._replace(memory=question.memory.limit), vector.entries))
        if key in self.seen:
            return None
        self.seen[key] = len(self.vectors)
        self.vectors.append(vector)
        return vector


def fill(
    kinds: Sequence[Kind],
    random: int = 0,
    seed: int = 0,
    mistakes: bool = False,
    progress: Progress = quiet,
) -> tuple[list[Vector], dict[str, str]]:
    """Vectors of these kinds: the witnesses, as many `random` ones of each kind, and for each
    seeded mistake one that tells it from what is right; and for mistakes without one, why.
    """
    filled = Filled()
    without: dict[str, str] = {}
    for kind_ in kinds:
        found = witnesses(kind_, progress) if kind_.symbolic else composed(kind_, guests(progress))
        for exercise, draws in found:
            filled.add(kind_, draws, "witness", (exercise,))
        source = RandomDraws(Random(seed))
        for number in range(random):
            progress(f"{kind_.name}: {number:,} random")
            source.trail.clear()
            _draw_and_answer(kind_, source)
            filled.add(kind_, dict(source.draws()), "random", ())
    if mistakes:
        for name, mistake in MISTAKES.items():
            files = {f"impl/kernels/{kind_.kernel}.py": kind_ for kind_ in reversed(kinds)}
            if mistake.file in files:
                progress(f"mistake {name}")
                own = [kind_ for kind_ in kinds if kind_.kernel == files[mistake.file].kernel]
                without |= _tell_apart(filled, own, name, seed)
    order = {kind_.name: place for place, kind_ in enumerate(kinds)}
    filled.vectors.sort(key=lambda vector: order[vector.kind])
    return filled.vectors, without


def _draw_and_answer(kind_: Kind, source: Nondet) -> None:
    question = kind_.draw(source)
    question.answer()


TRIES = 100_000
"""Random questions tried for each kind."""


def _tell_apart(filled: Filled, kinds: Sequence[Kind], name: str, seed: int) -> dict[str, str]:
    """Add a vector that a subject with this mistake answers wrongly; or say that none was found."""
    subject = Guarded(f"mistake:{name}", MISTAKES[name].subject())
    for kind_ in kinds:
        invariant = kind_.invariant
        if subject.lacks(invariant):
            continue
        nondet = RandomDraws(Random(seed), subject.capabilities.narrow)
        for _ in range(TRIES):
            nondet.trail.clear()
            try:
                failure = attempt(invariant, nondet, subject)
            except (Reject, SubjectRaised, SubjectHung):
                continue
            if failure is not None:
                case = shrink(invariant, subject, nondet.draws(), "vectors", 3_000)
                draws = case.values() if case is not None else dict(nondet.draws())
                filled.add(kind_, draws, "tells a mistake", (name,))
                return {}
    return {name: "no question of one access shows it"}


# COVERAGE


def paths_of(kind_: Kind) -> list[Path]:
    """Every path of this kind's walk, as the symbolic engine enumerates them."""
    explorer = Explorer(RLIMIT)
    return explorer.explore(lambda: _draw_and_answer(kind_, explorer))


def missed(kind_: Kind, paths: list[Path], vectors: Sequence[Vector]) -> list[Path]:
    """Those of the paths that no vector takes, by the conditions on the path itself."""
    left = {id(path): path for path in paths}
    for vector in vectors:
        if not left:
            break
        taken = _taken(kind_, list(left.values()), vector)
        if taken is not None:
            del left[id(taken)]
    return list(left.values())


def _taken(kind_: Kind, paths: list[Path], vector: Vector) -> Path | None:
    """The path, of these, that a vector takes; None if it takes another."""
    draws = draws_of(kind_, vector.question, vector.entries)
    pairs: list[Any] = [
        (z3.BitVec(name, 64), z3.BitVecVal(value, 64))
        for name, value in draws.items()
        if "[" not in name
    ]
    array = z3.K(z3.BitVecSort(64), z3.BitVecVal(0, 64))
    for address, entry in vector.entries.items():
        array = z3.Store(array, address, entry)
    memory = z3.Array(f"{kind_.memory}[]", z3.BitVecSort(64), z3.BitVecSort(64))
    pairs.append((memory, array))
    depth = 0
    while paths:
        ended = [path for path in paths if len(path.decisions) == depth]
        if ended:
            return ended[0]
        kind_of, options, _ = paths[0].decisions[depth]
        assert kind_of != CHOICE
        holds = [z3.is_true(z3.simplify(z3.substitute(option, *pairs))) for option in options]
        paths = [path for path in paths if holds[path.decisions[depth][2]]]
        depth += 1
    return None


def kinds_named(names: Sequence[str]) -> list[Kind]:
    """Kinds by name, all of them by default. Raises `LookupError`."""
    for name in names:
        if name not in KINDS:
            raise LookupError(name)
    return [KINDS[name] for name in names] if names else list(KINDS.values())
