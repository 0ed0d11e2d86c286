"""A shared library as a subject: ``python -m vapama.cabi LIBRARY`` is a process that answers for it
(see `vapama.process`). Its interface is data/vapama.h.
"""

import ctypes
import json
import sys
from typing import Any, ClassVar

from vapama.spec.access import Access
from vapama.spec.cpu import Cpu

REGISTERS = tuple(name for name in Cpu._fields if name != "pdptes")
KINDS = {
    1: ("translated", "pa"),
    2: ("page fault", "error_code"),
    3: ("non-canonical address", ""),
    4: ("entry outside memory", "address"),
}
MOST_UPDATES = 8
Word = ctypes.c_uint64


class CpuC(ctypes.Structure):
    """``struct vapama_cpu``."""

    _fields_: ClassVar[Any] = [
        *((name, Word) for name in REGISTERS),
        ("pdptes", ctypes.POINTER(Word)),
    ]


class AccessC(ctypes.Structure):
    """``struct vapama_access``."""

    _fields_: ClassVar[Any] = [(name, Word) for name in Access._fields]


Load = ctypes.CFUNCTYPE(Word, Word)


class MemoryC(ctypes.Structure):
    """``struct vapama_memory``."""

    _fields_: ClassVar[Any] = [("limit", Word), ("load", Load)]


class UpdateC(ctypes.Structure):
    """An element of ``update``."""

    _fields_: ClassVar[Any] = [("address", Word), ("bits", Word)]


class OutcomeC(ctypes.Structure):
    """``struct vapama_outcome``."""

    _fields_: ClassVar[Any] = [
        *((name, Word) for name in ("kind", "value", "level", "updates")),
        ("update", UpdateC * MOST_UPDATES),
    ]


def main() -> None:
    """Load the library, and answer questions until there are no more."""
    try:
        library = ctypes.CDLL(sys.argv[1])
        observes, translate = library.vapama_observes, library.vapama_translate
    except (OSError, AttributeError) as error:
        sys.exit(str(error))
    observes.restype = ctypes.c_char_p
    said = observes().decode(errors="replace")
    sys.stdin.readline()
    answer({"observes": [what.strip() for what in said.split(",") if what.strip()]})
    for line in sys.stdin:
        answer(asked(translate, json.loads(line)))


def answer(content: dict[str, Any]) -> None:
    """Write a line."""
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def asked(translate: Any, question: dict[str, Any]) -> dict[str, Any]:
    """The library's answer to a question."""
    if "access" not in question or "ept" in question or "npt" in question:
        return {"not_covered": "the C interface is about one stage of linear addresses"}
    cpu = CpuC(*(int(question["cpu"][name], 16) for name in REGISTERS))
    pdptes = question["cpu"].get("pdptes")
    if pdptes is not None:
        cpu.pdptes = (Word * 4)(*(int(pdpte, 16) for pdpte in pdptes))
    access = AccessC(*(int(question["access"][name], 16) for name in Access._fields))
    limit = int(question["memory"]["limit"], 16)
    entries = {int(a, 16): int(e, 16) for a, e in question["memory"]["entries"].items()}
    outside: list[int] = []

    def load(address: int) -> int:
        if address % 8 or address >= limit:
            outside.append(address)
        return entries.get(address, 0)

    memory, outcome = MemoryC(limit, Load(load)), OutcomeC()
    status = translate(*map(ctypes.byref, (cpu, memory, access, outcome)))
    if outside:
        sys.exit(f"a load at {outside[0]:#x}, unaligned or outside the {limit:#x} bytes of memory")
    if status:
        return {"not_covered": "the library says so"}
    return outcome_of(outcome)


def outcome_of(outcome: OutcomeC) -> dict[str, Any]:
    """An outcome as JSON; one of no known kind as it is, which is then told as no outcome."""
    kind, value = KINDS.get(outcome.kind, (f"of kind {outcome.kind}", ""))
    content: dict[str, Any] = {"outcome": kind}
    if value:
        content[value] = hex(outcome.value)
    updates = [
        [hex(u.address), hex(u.bits)] for u in outcome.update[: min(outcome.updates, MOST_UPDATES)]
    ]
    if kind == "translated":
        content |= {"level": hex(outcome.level), "updates": updates}
    elif value:
        content["may_update"] = updates
    return content


if __name__ == "__main__":
    main()
