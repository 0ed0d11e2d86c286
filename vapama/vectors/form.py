"""The form of test vectors: one JSON object a line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from vapama.case import BadInput
from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import Cpu, ImpossibleState, UnsupportedMode
from vapama.spec.memory import ENTRY_BYTES, Sparse
from vapama.spec.stage import Ept, Npt
from vapama.spec.subject import SECOND_STAGE, TRANSLATE
from vapama.vectors.questions import KINDS, TRANSLATE_NESTED, Question
from vapama.wire import (
    STATES,
    Hex,
    OutcomeJson,
    outcome_of,
    outcome_to_json,
    state_of,
    state_to_json,
)

VERSION = 1
SHIPPED = Path(__file__).parents[1] / "data" / "vectors.jsonl"


class MemoryJson(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Physical memory: its size in bytes, and the entries that the walk may read; others are 0."""

    limit: Hex
    entries: dict[Hex, Hex]


_CPU: Any = STATES[Cpu] | None
_EPT: Any = STATES[Ept] | None
_NPT: Any = STATES[Npt] | None
_ACCESS: Any = STATES[Access] | None
_GUEST_PHYSICAL_ACCESS: Any = STATES[GuestPhysicalAccess] | None

VectorJson: Any = msgspec.defstruct(
    "Vector",
    [
        ("version", int),
        ("id", str),
        ("kind", str),
        ("path", str),
        ("flags", tuple[str, ...]),
        ("memory", MemoryJson),
        ("acceptable", tuple[OutcomeJson, ...]),
        ("cpu", _CPU, None),
        ("ept", _EPT, None),
        ("npt", _NPT, None),
        ("access", _ACCESS, None),
        ("guest_physical_access", _GUEST_PHYSICAL_ACCESS, None),
    ],
    kw_only=True,
    forbid_unknown_fields=True,
    frozen=True,
)


class Vector(msgspec.Struct, frozen=True, kw_only=True):
    """A question, and the outcomes that are right. `path` and `flags` say what it exercises."""

    id: str
    kind: str
    path: str
    flags: tuple[str, ...]
    question: Any
    entries: dict[int, int]
    acceptable: tuple[Any, ...]

    def to_json(self) -> bytes:
        """The vector as one line."""
        content = {
            "version": VERSION,
            "id": self.id,
            "kind": self.kind,
            "path": self.path,
            "flags": self.flags,
            **question_to_json(self.question, self.entries),
            "acceptable": [outcome_to_json(outcome) for outcome in self.acceptable],
        }
        return msgspec.json.encode(content) + b"\n"


def question_to_json(question: Question, entries: dict[int, int]) -> dict[str, Any]:
    """A question: its state and access under the names of what they are, and memory."""
    states = (question.state, question.stage)
    access_name = "access" if isinstance(question.access, Access) else "guest_physical_access"
    return {
        **{type(s).__name__.lower(): state_to_json(s) for s in states if s is not None},
        access_name: state_to_json(question.access),
        "memory": {
            "limit": hex(question.memory.limit),
            "entries": {hex(address): hex(entry) for address, entry in entries.items()},
        },
    }


def read_vectors(path: Path) -> Iterator[Vector]:
    """The vectors of a file. Raises `BadInput`, which names the line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _vector(f"{path}:{number}", line)
    except OSError as error:
        raise BadInput(f"{path}: cannot read the vectors: {error.strerror or error}") from None


def _vector(where: str, line: bytes) -> Vector:
    try:
        head = msgspec.json.decode(line, type=dict[str, Any])
        version = head.get("version")
        if version != VERSION:
            raise BadInput(
                f"{where}: a vector of version {version}; this vapama reads version {VERSION}"
            )
        read = msgspec.json.decode(line, type=VectorJson)
        return _checked(where, read)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{where}: not a vector: {error}") from None
    except (ImpossibleState, UnsupportedMode) as error:
        raise BadInput(f"{where}: {error}") from None


def _checked(where: str, read: Any) -> Vector:
    if read.kind not in KINDS:
        raise BadInput(f"{where}: no kind is named {read.kind!r}; there are {', '.join(KINDS)}")
    read_states = {type_: getattr(read, type_.__name__.lower()) for type_ in (Cpu, Ept, Npt)}
    given = [type_ for type_, state in read_states.items() if state is not None]
    physical = read.guest_physical_access is not None
    if (
        (read.access is not None) is physical
        or (Cpu in given) is physical
        or (not given or (Ept in given and Npt in given))
    ):
        raise BadInput(
            f"{where}: give `cpu` and `access` (and `ept` or `npt`, for two stages), or else "
            "`ept` or `npt` and `guest_physical_access`"
        )
    if not read.acceptable:
        raise BadInput(f"{where}: no outcome is acceptable")
    state, stage = (*(state_of(type_, read_states[type_]) for type_ in given), None)[:2]
    kind = GuestPhysicalAccess if physical else Access
    access = state_of(kind, read.guest_physical_access if physical else read.access)
    if any(value > 1 for value in access[1:]):
        raise BadInput(f"{where}: all of an access but its address is 0x0 or 0x1")
    needed = KINDS[read.kind].needs
    asked = TRANSLATE_NESTED if stage is not None else SECOND_STAGE if physical else TRANSLATE
    if needed != asked:
        raise BadInput(f"{where}: that is no question of {read.kind}")
    limit = int(read.memory.limit, 16)
    entries = {int(a, 16): int(entry, 16) for a, entry in read.memory.entries.items()}
    for address in entries:
        if address % ENTRY_BYTES or address >= limit:
            raise BadInput(f"{where}: an entry at {address:#x}, unaligned or outside memory")
    if limit % ENTRY_BYTES:
        raise BadInput(f"{where}: memory of {limit:#x} bytes, which are not whole entries")
    return Vector(
        id=read.id,
        kind=read.kind,
        path=read.path,
        flags=read.flags,
        question=Question(state, Sparse(entries, limit), access, stage),
        entries=entries,
        acceptable=tuple(outcome_of(outcome) for outcome in read.acceptable),
    )


def schema() -> bytes:
    """The JSON schema of a vector."""
    content = msgspec.json.schema(VectorJson)
    content["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    content["title"] = "A test vector of vapama: one line of a file"
    return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"
