"""Memory slots: which guest-physical memory a guest was given, and what of the host backs it.

A file of slots is a JSON list of objects, each a range of guest-physical addresses (`gpa`, `bytes`)
with what is known of it. See docs/reference/cli.md, `vapama snapshot audit`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np

from vapama.case import BadInput
from vapama.impl.listing import Words
from vapama.snapshot.tables import Mask, Numbers

PAGE = 4096
LARGEST = 1 << 52
UNKNOWN = (1 << 64) - 1
Number: TypeAlias = int | str


class GivenSlot(msgspec.Struct, forbid_unknown_fields=True):
    """A slot as a file has it. Numbers may be strings, so that they can be hexadecimal."""

    gpa: Number
    bytes: Number
    hpa: Number | None = None
    hva: Number | None = None
    readonly: bool = False
    log: bool = False
    dirty: list[Number] = []


@dataclass
class Slots:
    """Slots by column, in the order of guest-physical addresses; `hpas` and `hvas` are UNKNOWN
    where nothing was said. `dirty` are the pages of all logs, in order.
    """

    gpas: Words
    ends: Words
    hpas: Words
    hvas: Words
    readonly: Mask
    log: Mask
    dirty: Words

    def of(self, gpas: Words) -> tuple[Mask, Numbers]:
        """For each guest-physical address whether it is in a slot, and that slot's number."""
        k = np.searchsorted(self.gpas, gpas, "right").astype(np.int64) - 1
        number = np.maximum(k, 0)
        return (k >= 0) & (gpas < self.ends[number]), number


def read_slots(path: Path) -> Slots:
    """The slots in a file. Raises `BadInput`."""
    try:
        given = msgspec.json.decode(path.read_bytes(), type=list[GivenSlot])
    except OSError as error:
        raise BadInput(f"{path}: cannot read the slots: {error.strerror or error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not a list of memory slots: {error}") from None
    if not given:
        raise BadInput(f"{path}: no memory slots: then everything would be mapped unjustly")
    rows, dirty, before = [], [], 0
    for k, slot in enumerate(given):
        gpa, size = _number(path, k, "gpa", slot.gpa), _number(path, k, "bytes", slot.bytes)
        hpa, hva = (
            UNKNOWN if value is None else _number(path, k, name, value)
            for name, value in (("hpa", slot.hpa), ("hva", slot.hva))
        )
        if not size:
            raise BadInput(f"{path}: slot {k}: `bytes` is 0")
        rows.append((gpa, gpa + size, hpa, hva, slot.readonly, slot.log))
        for page in slot.dirty:
            address = _number(path, k, "dirty", page)
            if not gpa <= address < gpa + size:
                raise BadInput(f"{path}: slot {k}: `dirty` has {address:#x}, which is not in it")
            dirty.append(address)
    rows.sort()
    for gpa, end, *_ in rows:
        if gpa < before or end > LARGEST:
            raise BadInput(
                f"{path}: the slot at {gpa:#x} overlaps another, or ends above {LARGEST:#x}"
            )
        before = end
    columns = [np.array(column, dtype=np.uint64) for column in zip(*rows, strict=True)]
    gpas, ends, hpas, hvas, readonly, log = columns
    return Slots(
        *(gpas, ends, hpas, hvas, readonly != 0, log != 0),
        np.array(sorted(dirty), dtype=np.uint64),
    )


def _number(path: Path, k: int, name: str, value: Number) -> int:
    """A number of a slot, in whole pages. Raises `BadInput`."""
    try:
        number = int(value, 0) if isinstance(value, str) else value
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 63 or number % PAGE:
        raise BadInput(f"{path}: slot {k}: `{name}` is {value}, which is no multiple of 4096")
    return number
