"""Paging structures as a whole: every table that a root leads to, and where many addresses lead.

Each table is looked at once for each level that it is used at, however many ways lead to it, so
that tables which contain themselves or fan out end in time that their number bounds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from vapama.impl.kernels import mappings as kernel
from vapama.impl.listing import Form, Pieces, Words

Mask: TypeAlias = npt.NDArray[np.bool_]
Numbers: TypeAlias = npt.NDArray[np.intp]
"""Numbers of rows."""
NOWHERE = np.uint64(kernel.NOWHERE)
FRAME = np.uint64(kernel.FRAME)
PAGE_OF = np.uint64(12)

ABSENT, PAGE, TABLE, RESERVED, UNALIGNED, MISCONFIGURED = range(6)
"""What an entry is: absent, mapping a page, naming a table, or one of three ways malformed."""
ODD = (RESERVED, UNALIGNED, MISCONFIGURED)

AT_ONCE = 2048
"""Tables whose entries are in memory at once."""
MOST_KEPT = 1 << 14
"""Odd entries of a kind and level that are kept; all are counted."""


def positions(pieces: Pieces, addresses: Words, size: int) -> Words:
    """Where `size` bytes at physical addresses stand; NOWHERE if no piece holds them all."""
    if not len(pieces.firsts):
        return np.full_like(addresses, NOWHERE)
    k = np.searchsorted(pieces.firsts, addresses, "right").astype(np.int64) - 1
    held = np.maximum(k, 0)
    inside = (k >= 0) & (addresses + np.uint64(size) <= pieces.ends[held])
    return np.where(inside, pieces.places[held] + addresses - pieces.firsts[held], NOWHERE)


def entries_at(form: Form, pieces: Pieces, places: Words, index: Words) -> Words:
    """The entries with these indices in tables at these positions."""
    if form.words[kernel.NARROW]:
        pairs = pieces.memory[(places + (index >> np.uint64(1) << np.uint64(3))).astype(np.int64)]
        half = (index & np.uint64(1)) << np.uint64(5)
        return pairs >> half & np.uint64(0xFFFF_FFFF)
    return pieces.memory[(places + (index << np.uint64(3))).astype(np.int64)]


class Rules:
    """What the entries of a form's tables are, level by level."""

    def __init__(self, form: Form) -> None:
        self.words = form.words.tolist()
        self.ept = self.words[kernel.EPT]
        self.broken = [
            np.array(
                [kernel.misconfigured(low, page, self.ept) for low in range(1 << 11)], dtype=bool
            )
            for page in ((0, 1) if self.ept else ())
        ]
        """Whether an EPT entry is misconfigured, which depends on bits 10:0 and on what it is."""

    def kinds(self, level: int, entries: Words) -> npt.NDArray[np.uint8]:
        """What the entries of tables of a level are."""
        words, u64 = self.words, np.uint64
        shift = words[kernel.SHIFT + level]
        page = entries & u64(words[kernel.PAGE + level]) != 0
        zero = np.where(
            page, u64(words[kernel.PAGE_ZERO + level]), u64(words[kernel.TABLE_ZERO + level])
        )
        bad = entries & zero
        kinds = np.where(page, np.uint8(PAGE), np.uint8(TABLE))
        offset = u64((1 << shift) - 1)
        kinds[bad != 0] = RESERVED
        kinds[page & (bad != 0) & (bad & ~offset == 0)] = UNALIGNED
        if self.ept:
            low = (entries & u64(0x7FF)).astype(np.int64)
            kinds[np.where(page, self.broken[1][low], self.broken[0][low])] = MISCONFIGURED
        kinds[entries & u64(words[kernel.PRESENT]) == 0] = ABSENT
        return kinds

    def canonical(self, addresses: Words) -> Words:
        """Addresses with the bits above the uppermost that is translated as they must be."""
        sign, upper = (np.uint64(self.words[k]) for k in (kernel.SIGN, kernel.UPPER))
        return np.where(addresses >> sign != 0, addresses | upper, addresses)


class Entries(NamedTuple):
    """Entries by column: where they stand, what they are, the first address that they are for."""

    level: int
    where: Words
    entries: Words
    addresses: Words

    def part(self, chosen: Mask) -> "Entries":
        """Those of a mask or with these numbers."""
        return Entries(self.level, *(column[chosen] for column in self[1:]))


class Level(NamedTuple):
    """The tables of a level by column: physical address, position, the first linear address that
    they are for, the entry that first led there and which table of the level above it is in, and
    how many entries lead there.
    """

    level: int
    frames: Words
    places: Words
    bases: Words
    where: Words
    entries: Words
    parents: Words
    leads: Words


@dataclass
class Survey:
    """All tables, the uppermost first; the entries that are malformed, by kind, those whose table
    the image does not hold, and leaves that are dirty and not accessed. `stopped` if not all were
    read.
    """

    levels: list[Level] = field(default_factory=list)
    odd: dict[int, list[Entries]] = field(default_factory=dict)
    missing: list[Entries] = field(default_factory=list)
    unaccessed: list[Entries] = field(default_factory=list)
    reads: int = 0
    stopped: bool = False

    @property
    def tables(self) -> int:
        """How many tables there are, counted at each level."""
        return sum(len(level.frames) for level in self.levels)

    def frames(self) -> Words:
        """The pages that hold tables, in order."""
        return np.unique(np.concatenate([level.frames for level in self.levels]) & FRAME)


def survey(form: Form, pieces: Pieces, flags: int, most_reads: int) -> Survey:
    """Look at every table once a level. `flags` are the bits for accessed (lower) and dirty (next)
    of leaves, 0 if there are none.
    """
    found, rules = Survey(), Rules(form)
    top = rules.words[kernel.TOP]
    root = np.array([form.root], dtype=np.uint64)
    size = rules.words[kernel.COUNT + top] << 3 - rules.words[kernel.NARROW]
    zero = np.zeros(1, dtype=np.uint64)
    level = Level(top, root, positions(pieces, root, size), zero, zero, zero, zero, zero + 1)
    for number in range(top, 0, -1):
        found.levels.append(level)
        below = list(_entries_below(form, rules, pieces, level, flags, most_reads, found))
        if number == 1 or not below:
            break
        frames, *others = (np.concatenate(column) for column in zip(*below, strict=True))
        frames, first, leads = np.unique(frames, return_index=True, return_counts=True)
        others = [frames, *(column[first] for column in others), leads.astype(np.uint64)]
        level = Level(number - 1, *others)
    return found


def _entries_below(
    form: Form,
    rules: Rules,
    pieces: Pieces,
    level: Level,
    flags: int,
    most_reads: int,
    found: Survey,
) -> Iterator[tuple[Words, ...]]:
    """What the tables of a level name, in parts, as the columns of the `Level` below but for the
    last. What is odd goes to `found`.
    """
    u64, number = np.uint64, level.level
    count, shift = rules.words[kernel.COUNT + number], rules.words[kernel.SHIFT + number]
    bytes_each = 4 if rules.words[kernel.NARROW] else 8
    index = np.arange(count, dtype=np.uint64)
    for start in range(0, len(level.frames), AT_ONCE):
        if found.reads + AT_ONCE * count > most_reads:
            found.stopped = True
            return
        part = slice(start, start + AT_ONCE)
        all_of = entries_at(form, pieces, level.places[part][:, None], index[None, :])
        found.reads += all_of.size

        # WHAT IS PRESENT
        table, i = np.nonzero(all_of & u64(rules.words[kernel.PRESENT]))
        entries, table = all_of[table, i], table + start
        kinds = rules.kinds(number, entries)
        said = Entries(
            number,
            level.frames[table] + u64(bytes_each) * i.astype(np.uint64),
            entries,
            rules.canonical(level.bases[table] + (i.astype(np.uint64) << u64(shift))),
        )

        # WHAT IS ODD
        for kind in ODD:
            _keep(found.odd.setdefault(kind, []), said, kinds == kind)
        if flags:
            marked = entries & u64(3 * flags)
            _keep(found.unaccessed, said, (kinds == PAGE) & (marked == u64(2 * flags)))

        # TABLES BELOW
        named = kinds == TABLE
        if number == 1 or not named.any():
            continue
        below, parents = said.part(named), table[named].astype(np.uint64)
        frames = below.entries & FRAME
        size = rules.words[kernel.COUNT + number - 1] * bytes_each
        places = positions(pieces, frames, size)
        held = places != NOWHERE
        _keep(found.missing, below, ~held)
        below = below.part(held)
        yield (
            *(frames[held], places[held], below.addresses, below.where, below.entries),
            parents[held],
        )


def _keep(kept: list[Entries], entries: Entries, chosen: Mask) -> None:
    if chosen.any():
        kept.append(entries.part(chosen))


class Walked(NamedTuple):
    """Where addresses lead, by column: the size of the page as a power of two (0 where nothing is
    mapped), the physical address, the rights that the walk leaves, the entry that maps, and the
    table that the walk ended in; and whether that is one which the image does not hold.
    """

    shifts: Words
    pas: Words
    rights: Words
    entries: Words
    tables: Words
    lost: Mask


def walked(
    form: Form, pieces: Pieces, addresses: Words, accessed: int, exempt: Callable[[Words], Mask]
) -> Walked:
    """Where linear addresses lead. `accessed` is one more right, which a table that is `exempt`
    does not take away.
    """
    u64, words = np.uint64, form.words
    lost = np.zeros(len(addresses), dtype=bool)
    shifts, pas, left, leaves, last = (np.zeros_like(addresses) for _ in range(5))
    result = Walked(shifts, pas, left, leaves, last, lost)
    rights = np.full_like(addresses, form.rights | accessed)
    for level, at, frames, entries, kinds in descent(form, pieces, addresses, lost):
        result.tables[at] = frames
        keeps = words[kernel.KEEPS + level] & ~u64(accessed)
        # PDPTEs of PAE paging have no rights, and no such flag.
        keeps = keeps if level < words[kernel.TOP] or words[kernel.COUNT + level] > 4 else ~u64(0)
        keeps = np.where(exempt(frames), keeps | u64(accessed), keeps)
        rights[at] &= entries ^ words[kernel.FORBIDS] | keeps
        leaf = kinds == PAGE
        here, entry = at[leaf], entries[leaf]
        shift = words[kernel.SHIFT + level]
        offset = (u64(1) << shift) - u64(1)
        pas = entry & FRAME & ~offset | addresses[here] & offset
        if words[kernel.NARROW] and level == 2:
            pas |= (entry >> u64(13) & words[kernel.HIGH]) << u64(32)
        result.shifts[here], result.pas[here], result.entries[here] = shift, pas, entry
    result.rights[:] = rights
    return result


def tables_for(form: Form, pieces: Pieces, addresses: Words, level: int) -> Words:
    """The tables of a level that walks for these addresses come to; without those that don't."""
    lost = np.zeros(len(addresses), dtype=bool)
    for number, _, frames, _, _ in descent(form, pieces, addresses, lost):
        if number == level:
            return np.unique(frames)
    return np.zeros(0, dtype=np.uint64)


def descent(
    form: Form, pieces: Pieces, addresses: Words, lost: Mask
) -> Iterator[tuple[int, Numbers, Words, Words, npt.NDArray[np.uint8]]]:
    """The walks for many addresses, level by level: for those that come so far, their numbers, the
    tables, the entries and what these are. Those that come to a table which is not held are `lost`.
    """
    u64, rules = np.uint64, Rules(form)
    top = rules.words[kernel.TOP]
    width = rules.words[kernel.SHIFT + top] + rules.words[kernel.COUNT + top].bit_length() - 1
    at = np.flatnonzero(rules.canonical(addresses & u64((1 << width) - 1)) == addresses)
    frames = np.full(len(at), form.root, dtype=np.uint64)
    for level in range(top, 0, -1):
        count, shift = rules.words[kernel.COUNT + level], rules.words[kernel.SHIFT + level]
        places = positions(pieces, frames, count << 3 - rules.words[kernel.NARROW])
        held = places != NOWHERE
        lost[at[~held]] = True
        at, frames, places = at[held], frames[held], places[held]
        index = addresses[at] >> u64(shift) & u64(count - 1)
        entries = entries_at(form, pieces, places, index)
        kinds = rules.kinds(level, entries)
        yield level, at, frames, entries, kinds
        below = kinds == TABLE
        at, frames = at[below], entries[below] & FRAME
