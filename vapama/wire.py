"""Control states, accesses and outcomes as JSON, by which other programs are spoken to.

All numbers are hexadecimal strings, because many readers of JSON round those beyond 2**53. An
outcome is named by its kind (`vapama.spec.outcomes.kind`), and updates are pairs of an entry's
address and bits.
"""

import dataclasses
import functools
import operator
import typing
from typing import Annotated, Any

import msgspec

from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import Cpu
from vapama.spec.outcomes import Outcome, Update, kind
from vapama.spec.stage import Ept, Npt

Hex = Annotated[str, msgspec.Meta(pattern="^0x[0-9a-f]{1,16}$", description="A word.")]
Updates = tuple[tuple[Hex, Hex], ...]


def _state(type_: Any) -> Any:
    """The JSON of a named tuple of words, all of whose rows are PDPTE registers."""
    fields: list[Any] = []
    for name in type_._fields:
        form: Any = tuple[Hex, Hex, Hex, Hex] | None if name == "pdptes" else Hex
        if name not in type_._field_defaults:
            fields.append((name, form))
        else:
            default = type_._field_defaults[name]
            fields.append((name, form, default if default is None else hex(default)))
    return msgspec.defstruct(
        f"{type_.__name__}State", fields, kw_only=True, forbid_unknown_fields=True, frozen=True
    )


def _outcome(type_: Any) -> Any:
    """The JSON of an outcome; a field that is left out is 0, or no updates."""
    fields: list[Any] = [
        (field.name, Updates, ()) if "Update" in str(field.type) else (field.name, Hex, "0x0")
        for field in dataclasses.fields(type_)
    ]
    return msgspec.defstruct(
        f"{type_.__name__}Outcome",
        fields,
        kw_only=True,
        forbid_unknown_fields=True,
        frozen=True,
        tag_field="outcome",
        tag=_kind_of(type_),
    )


def _kind_of(type_: Any) -> str:
    empty = object.__new__(type_)
    return kind(empty)


STATES = {type_: _state(type_) for type_ in (Cpu, Ept, Npt, Access, GuestPhysicalAccess)}
OUTCOMES = {type_: _outcome(type_) for type_ in typing.get_args(Outcome)}
OutcomeJson: Any = functools.reduce(operator.or_, OUTCOMES.values())
"""Any outcome, as `msgspec` reads it."""
_TYPES: dict[Any, Any] = {form: type_ for type_, form in OUTCOMES.items()}


def state_to_json(state: Any) -> dict[str, Any]:
    """A control state or an access (a named tuple of words, or rows of them), by field."""
    return {
        name: hex(value) if isinstance(value, int) else list(map(hex, value))
        for name, value in zip(state._fields, state, strict=True)
        if value is not None
    }


def state_of(type_: Any, read: Any) -> Any:
    """The control state or access of what `STATES[type_]` read. Raises what its type raises."""
    values = ((name, getattr(read, name)) for name in type_._fields)
    return type_(**{name: _words(value) for name, value in values})


def _words(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_words, value))
    return None if value is None else int(value, 16)


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome: `outcome` is its kind, the rest its fields; updates are pairs of hex strings."""
    content: dict[str, Any] = {"outcome": kind(outcome)}
    for field in dataclasses.fields(outcome):
        value = getattr(outcome, field.name)
        if isinstance(value, tuple):
            content[field.name] = [[hex(address), hex(bits)] for address, bits in value]
        else:
            content[field.name] = hex(value)
    return content


def outcome_of(read: Any) -> Outcome:
    """The outcome that was read as `OutcomeJson`."""
    type_ = _TYPES[type(read)]
    values = {}
    for field in dataclasses.fields(type_):
        value = getattr(read, field.name)
        values[field.name] = (
            tuple(Update(*_words(pair)) for pair in value)
            if isinstance(value, tuple)
            else int(value, 16)
        )
    outcome: Outcome = type_(**values)
    return outcome
