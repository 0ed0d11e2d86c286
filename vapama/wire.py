"""Control states, accesses, memories and outcomes as JSON, by which other programs are spoken to.

All numbers are hexadecimal strings, because many readers of JSON round those beyond 2**53; flags
are strings too, "0x0" and "0x1". An outcome is named by its kind (`vapama.spec.outcomes.kind`).
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from vapama.spec import outcomes
from vapama.spec.outcomes import Outcome, Update
from vapama.spec.words import WORD


class Malformed(ValueError):
    """JSON that is not what it should be; says what, and where in it."""


def to_number(value: object, where: str) -> int:
    """A word, from a hexadecimal string. Raises `Malformed`."""
    number = -1
    if isinstance(value, str) and value.startswith("0x"):
        try:
            number = int(value[2:], 16)
        except ValueError:
            number = -1
    if not 0 <= number <= WORD:
        raise Malformed(f"{where} is {value!r:.40}, and not a hexadecimal string such as '0x1000'")
    return number


def state_to_json(state: Any) -> dict[str, Any]:
    """A control state or an access (a named tuple of words, or rows of them), by field."""
    return {
        name: hex(value) if isinstance(value, int) else list(map(hex, value))
        for name, value in zip(state._fields, state, strict=True)
        if value is not None
    }


def state_from_json(kind: Any, content: object, where: str) -> Any:
    """A named tuple of words of class `kind`; what is left out has its default.

    Raises `Malformed`, or what the class itself raises.
    """
    if not isinstance(content, Mapping):
        raise Malformed(f"{where} is no object")
    fields: tuple[str, ...] = kind._fields
    for name in content:
        if name not in fields:
            raise Malformed(f"{where} has a field {name!r:.40}; there are {', '.join(fields)}")
    for name in fields:
        if name not in content and name not in kind._field_defaults:
            raise Malformed(f"{where} lacks the field {name}")
    return kind(**{name: _value(value, f"{where}.{name}") for name, value in content.items()})


def _value(content: object, where: str) -> int | tuple[int, ...] | None:
    if content is None:
        return None
    if isinstance(content, list):
        return tuple(to_number(value, f"{where}[{k}]") for k, value in enumerate(content))
    return to_number(content, where)


KINDS: dict[str, Any] = {
    outcomes._KINDS[kind]: kind for kind in typing.get_args(Outcome) if kind in outcomes._KINDS
}


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome: `outcome` is its kind, the rest its fields; updates are pairs of hex strings."""
    content: dict[str, Any] = {"outcome": outcomes.kind(outcome)}
    for field in dataclasses.fields(outcome):
        value = getattr(outcome, field.name)
        if isinstance(value, tuple):
            content[field.name] = [[hex(address), hex(bits)] for address, bits in value]
        else:
            content[field.name] = hex(value)
    return content


def outcome_from_json(content: object, where: str) -> Outcome:
    """The outcome of this JSON; a field left out is 0, or no updates. Raises `Malformed`."""
    if not isinstance(content, Mapping):
        raise Malformed(f"{where} is no object")
    kind = KINDS.get(str(content.get("outcome")))
    if kind is None:
        raise Malformed(
            f"{where}.outcome is {content.get('outcome')!r:.40}; there are {', '.join(KINDS)}"
        )
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    for name in content:
        if name not in fields and name != "outcome":
            raise Malformed(f"{where} has a field {name!r:.40}, which no {content['outcome']} has")
    values: dict[str, Any] = {}
    for name, type_ in fields.items():
        if "Update" in str(type_):
            values[name] = _updates(content.get(name, []), f"{where}.{name}")
        else:
            values[name] = to_number(content.get(name, "0x0"), f"{where}.{name}")
    outcome: Outcome = kind(**values)
    return outcome


def _updates(content: object, where: str) -> tuple[Update, ...]:
    if not isinstance(content, list):
        raise Malformed(f"{where} is no list of pairs of an entry's address and bits")
    found = []
    for k, pair in enumerate(content):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Malformed(f"{where}[{k}] is no pair of an entry's address and bits")
        found.append(Update(*(to_number(value, f"{where}[{k}]") for value in pair)))
    return tuple(found)
