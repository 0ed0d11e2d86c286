"""Walks of many addresses at once, in one and in two stages: a group of them, level by level.

A walk alone waits at each level for the entry of the level above. Here a group of walks reads its
entries of one level, one after the other, and the processor has them all under way; what is then
done with them has no branches, and is done to several walks by one instruction.

That is so for walks as nearly all are: no entry on the way is missing or malformed. One that is
found not to be so, or is not known to be, is *odd*, and done once more by the walk of its own
module. So a group need not tell why a walk ends, and may call odd what is merely rare.

Other words that the kernels take and give are those of `long_mode` and `nested`, and

- `lanes`: what is kept of each walk of a group, by the row, in words; `width` is how many walks a
  row has room for.
"""

from collections.abc import Sequence

from vapama.impl.kernels.ept import MODE_AD, MODE_FIVE, MODE_PAGE2MB
from vapama.impl.kernels.ept import MODE_PAGE1GB as EPT_PAGE1GB
from vapama.impl.kernels.ept import needed as needed_under_ept
from vapama.impl.kernels.legacy import walk as walk_legacy
from vapama.impl.kernels.long_mode import (
    FAULT,
    FRAME,
    MODE_LA57,
    MODE_PAGE1GB,
    Store,
    Words,
    access_code,
    finish,
)
from vapama.impl.kernels.long_mode import walk as walk_guest
from vapama.impl.kernels.nested import EPT, TABLE, walk_stage
from vapama.impl.kernels.nested import walk as walk_nested
from vapama.impl.kernels.npt import FIVE, FOUR
from vapama.impl.kernels.npt import MODE_PAGE1GB as NPT_PAGE1GB
from vapama.spec.words import WORD, Flag, Word, flag, ite

# Rows: the address; the place and the value of the entry that was read last; the AND of all entries
# (of their bit 63 the OR, complemented); the bits of an address below those of the page, 0 until it
# is found; and not 0 if the walk is odd.
ADDRESS, INDEX, ENTRY, LEFT, OFFSET, ODD = 0, 1, 2, 3, 4, 5
HOST = 6
"""Where the same rows of the second stage begin."""
HELD = 12
"""The row with the AND of what the second stage allows with the guest's tables."""
PATH = 13
"""The row that single walks leave their path in."""
ROWS = 14


def descend(
    memory: Words,
    entries: Word,
    root: Word,
    levels: Word,
    reserved: Word,
    table_zero: Word,
    no_large: Word,
    typed: Flag,
    lanes: Sequence[Store],
    base: Word,
    count: Word,
) -> None:
    """Lead a group of `count` walks, whose rows begin at `base`, from the table at `root` to pages.

    An entry is odd if bit 0 is 0, or one of the bits `reserved`; of a table, one of `table_zero`;
    of a page larger than 4 KBytes, one of its frame's lower bits; at a level of `no_large`, bit 7;
    and of a page that is `typed`, if bits 5:3 are a memory type that there is not.
    """
    address, index, entry = lanes[base + ADDRESS], lanes[base + INDEX], lanes[base + ENTRY]
    left, offset, odd = lanes[base + LEFT], lanes[base + OFFSET], lanes[base + ODD]
    shift = 12 + 9 * levels
    for j in range(count):
        first = (root & FRAME) >> 3 | address[j] >> (shift - 9) & 0x1FF
        odd[j] = odd[j] | flag(first >= entries)
        index[j] = ite(first < entries, first, 0)
        left[j], offset[j] = WORD, 0
    level = levels
    while level > 0:
        shift = shift - 9
        for j in range(count):
            entry[j] = memory[index[j]]
        for j in range(count):
            offset[j], odd[j] = judged(
                entry[j], offset[j], odd[j], level, reserved, table_zero, no_large, typed
            )
            left[j] = left[j] & (entry[j] ^ 1 << 63)
            # Of a walk that is at its page, this reads its last entry again.
            below = (entry[j] & FRAME) >> 3 | address[j] >> (shift - 9) & 0x1FF
            on = offset[j] == 0
            odd[j] = odd[j] | flag(on & (below >= entries))
            index[j] = ite(on & (below < entries), below, index[j])
        level = level - 1


def judged(
    entry: Word,
    offset: Word,
    odd: Word,
    level: Word,
    reserved: Word,
    table_zero: Word,
    no_large: Word,
    typed: Flag,
) -> tuple[Word, Word]:
    """The offsets of the page, if it is found by now, and whether the walk is odd, by one entry; as
    they were if the page was found above. See `descend`.
    """
    below = (1 << (3 + 9 * level)) - 1
    may_map, maps = 0x80, 0
    if level == 1:
        maps = 0x80
    elif level > 3:
        may_map = 0
    on = offset == 0
    page = (entry & may_map | maps) != 0
    zero = reserved | (no_large >> level & 1) << 7 | ite(page, below & FRAME, table_zero)
    bad = entry & zero | (entry & 1 ^ 1)
    # Of the types, 2 and 3 have bit 4 of the entry without bit 5, and 7 has all three.
    bad = bad | flag(page) & typed & entry >> 4 & (entry >> 5 ^ 1 | entry >> 3)
    return ite(on & page, below, offset), odd | ite(on, bad, 0)


def in_page(entry: Word, offset: Word, address: Word) -> Word:
    """Where an address leads by the entry that maps its page."""
    return entry & FRAME & ~offset | address & offset


def level_of(offset: Word) -> Word:
    """The level of the entries that map pages with such offsets."""
    return 1 + flag(offset > 0xFFF) + flag(offset > 0x1FFFFF)


# ONE STAGE


def translate_many(
    memory: Words,
    entries: Word,
    mode: Word,
    reserved: Word,
    cr3: Word,
    pkru: Word,
    pkrs: Word,
    addresses: Words,
    number: Word,
    access: Word,
    lanes: Sequence[Store],
    width: Word,
    statuses: Store,
    values: Store,
) -> None:
    """`long_mode.walk` for each of `number` addresses, into `statuses` and `values`; sets no flags.

    Accesses to shadow stacks are odd: they depend on what the entries above the last one say.
    """
    address, entry, left = lanes[ADDRESS], lanes[ENTRY], lanes[LEFT]
    offset, odd = lanes[OFFSET], lanes[ODD]
    levels = 4
    if mode >> MODE_LA57 & 1:
        levels = 5
    code = access_code(mode, access)
    special = flag(entries == 0) | code >> 6
    no_large = 0x30 | (mode >> MODE_PAGE1GB & 1 ^ 1) << 3
    first = 0
    while first < number:
        count = ite(number - first < width, number - first, width)
        begin(addresses, first, levels, special, lanes, count)
        if not special:
            descend(memory, entries, cr3, levels, reserved, 0, no_large, 0, lanes, 0, count)
        for j in range(count):
            if odd[j] == 0:
                status, value = finish(
                    mode, pkru, pkrs, address[j], code, access,
                    entry[j], left[j] & 6, left[j] >> 63 ^ 1, 1, 12,
                )  # fmt: skip
                # It was asked about rights alone: the page may be larger.
                if status != FAULT:
                    status, value = level_of(offset[j]), in_page(entry[j], offset[j], address[j])
                statuses[first + j], values[first + j] = status, value
        for j in range(count):
            if odd[j] != 0:
                statuses[first + j], values[first + j] = walk_guest(
                    memory, entries, mode, reserved, cr3, pkru, pkrs,
                    addresses[first + j], access, lanes[PATH],
                )  # fmt: skip
        first = first + width


def translate_many_singly(
    memory: Words,
    entries: Word,
    mode: Word,
    reserved: Word,
    cr3: Word,
    pdptes: Words,
    addresses: Words,
    number: Word,
    access: Word,
    lanes: Sequence[Store],
    width: Word,
    statuses: Store,
    values: Store,
) -> None:
    """The same for the other paging modes, whose walks are short: by `legacy.walk`, one by one."""
    for i in range(number):
        statuses[i], values[i] = walk_legacy(
            memory, entries, mode, reserved, cr3, pdptes, addresses[i], access, lanes[PATH]
        )


def begin(
    addresses: Words,
    first: Word,
    levels: Word,
    special: Word,
    lanes: Sequence[Store],
    count: Word,
) -> None:
    """The linear addresses from `first` on, as a group: odd are those that are not canonical, as
    are those that hold metadata; and all if `special` is not 0.
    """
    address, odd = lanes[ADDRESS], lanes[ODD]
    width = 12 + 9 * levels
    ones = (1 << (65 - width)) - 1
    for j in range(count):
        address[j] = addresses[first + j]
        upper = address[j] >> (width - 1)
        odd[j] = special | flag((upper != 0) & (upper != ones))


# THE SECOND STAGE


def tables_of(stage: Word, mode: Word) -> tuple[Word, Word, Word]:
    """How `descend` takes tables of a second stage: levels, `table_zero` and `no_large`.

    0 levels if it does not: those of hosts in PAE and 32-bit paging.
    """
    levels = 4
    if stage == EPT:
        if mode >> MODE_FIVE & 1:
            levels = 5
        two, one = mode >> MODE_PAGE2MB & 1, mode >> EPT_PAGE1GB & 1
        return levels, 0x78, 0x30 | (two ^ 1) << 2 | (one ^ 1) << 3
    if mode & 3 == FIVE:
        levels = 5
    elif mode & 3 != FOUR:
        levels = 0
    # Bit 8 is reserved in the entries of the highest levels alone: here it is odd at all of them.
    return levels, 0x100, 0x30 | (mode >> NPT_PAGE1GB & 1 ^ 1) << 3


def needed(stage: Word, mode: Word, access: Word) -> Word:
    """The bits that an access needs in what is `LEFT` by a second stage."""
    if stage == EPT:
        return needed_under_ept(mode, access)
    write = (access >> 1 | access >> 3) & 1
    return 4 | write << 1 | (access >> 4 & 1) << 63


def second_stage_many(
    memory: Words,
    entries: Word,
    stage: Word,
    mode: Word,
    reserved: Word,
    root: Word,
    gpas: Words,
    number: Word,
    access: Word,
    lanes: Sequence[Store],
    width: Word,
    statuses: Store,
    values: Store,
) -> None:
    """The second stage's walk for each of `number` guest-physical addresses, into `statuses` and
    `values`; sets no flags.
    """
    address, entry, left = lanes[ADDRESS], lanes[ENTRY], lanes[LEFT]
    offset, odd = lanes[OFFSET], lanes[ODD]
    levels, table_zero, no_large = tables_of(stage, mode)
    special = flag((entries == 0) | (levels == 0))
    typed = flag(stage == EPT)
    must = needed(stage, mode, access)
    first = 0
    while first < number:
        count = ite(number - first < width, number - first, width)
        for j in range(count):
            address[j] = gpas[first + j]
            odd[j] = special | gpas[first + j] >> (12 + 9 * levels)
        if not special:
            descend(
                memory, entries, root, levels, reserved, table_zero, no_large, typed,
                lanes, 0, count,
            )  # fmt: skip
        for j in range(count):
            odd[j] = odd[j] | must & ~left[j]
            if odd[j] == 0:
                statuses[first + j] = level_of(offset[j])
                values[first + j] = in_page(entry[j], offset[j], address[j])
        for j in range(count):
            if odd[j] != 0:
                statuses[first + j], values[first + j] = walk_stage(
                    memory, entries, stage, mode, reserved, root, gpas[first + j], access,
                    lanes[PATH],
                )  # fmt: skip
        first = first + width


# TWO STAGES


def translate_nested_many(
    memory: Words,
    entries: Word,
    mode: Word,
    reserved: Word,
    cr3: Word,
    pkru: Word,
    pkrs: Word,
    stage: Word,
    stage_mode: Word,
    stage_reserved: Word,
    root: Word,
    addresses: Words,
    number: Word,
    access: Word,
    paths: Sequence[Store],
    trace: Store,
    lanes: Sequence[Store],
    width: Word,
    statuses: Store,
    values: Store,
    gpas: Store,
) -> None:
    """`nested.walk` for each of `number` addresses, into `statuses`, `values` and `gpas`; sets no
    flags. What is odd in one of the stages is odd.
    """
    address, entry, left = lanes[ADDRESS], lanes[ENTRY], lanes[LEFT]
    offset, odd, held = lanes[OFFSET], lanes[ODD], lanes[HELD]
    gpa, stage_entry, stage_left = lanes[HOST + ADDRESS], lanes[HOST + ENTRY], lanes[HOST + LEFT]
    stage_offset, stage_odd = lanes[HOST + OFFSET], lanes[HOST + ODD]
    levels = 4
    if mode >> MODE_LA57 & 1:
        levels = 5
    code = access_code(mode, access)
    stage_levels, table_zero, no_large = tables_of(stage, stage_mode)
    typed = flag(stage == EPT)
    special = flag((entries == 0) | (stage_levels == 0)) | code >> 6
    # Whether flags that the guest lacks are to be written back through the second stage.
    writes_back = typed & (stage_mode >> MODE_AD & 1 ^ 1)
    first = 0
    while first < number:
        count = ite(number - first < width, number - first, width)
        begin(addresses, first, levels, special, lanes, count)
        if not special:
            begin_tables(cr3, levels, lanes, count)
            level = levels
            while True:
                for j in range(count):
                    stage_odd[j] = stage_odd[j] | gpa[j] >> (12 + 9 * stage_levels)
                descend(
                    memory, entries, root, stage_levels, stage_reserved, table_zero, no_large,
                    typed, lanes, HOST, count,
                )  # fmt: skip
                if level == 0:
                    break
                read_tables(
                    memory, entries, mode, reserved, needed(stage, stage_mode, TABLE), level,
                    lanes, count,
                )  # fmt: skip
                level = level - 1
        for j in range(count):
            odd[j] = odd[j] | stage_odd[j]
            if odd[j] == 0:
                status, _ = finish(
                    mode, pkru, pkrs, address[j], code, access,
                    entry[j], left[j] & 6, left[j] >> 63 ^ 1, 1, 12,
                )  # fmt: skip
                missing = left[j] >> 5 & 1 ^ 1 | access >> 1 & (entry[j] >> 6 & 1 ^ 1)
                page = needed(stage, stage_mode, access & 0x12 | left[j] & 4)
                odd[j] = page & ~stage_left[j] | missing & writes_back & (held[j] >> 1 ^ 1)
                odd[j] = odd[j] | flag(status == FAULT)
                smaller = ite(offset[j] < stage_offset[j], offset[j], stage_offset[j])
                statuses[first + j] = level_of(smaller)
                values[first + j] = in_page(stage_entry[j], stage_offset[j], gpa[j])
                gpas[first + j] = 0
        for j in range(count):
            if odd[j] != 0:
                statuses[first + j], values[first + j], gpas[first + j] = walk_nested(
                    memory, entries, mode, reserved, cr3, pkru, pkrs,
                    stage, stage_mode, stage_reserved, root,
                    addresses[first + j], access, paths, trace,
                )  # fmt: skip
        first = first + width


def begin_tables(cr3: Word, levels: Word, lanes: Sequence[Store], count: Word) -> None:
    """The guest's walks at its highest table: where the entries are to be read."""
    for j in range(count):
        lanes[HOST + ADDRESS][j] = guest_place(cr3, lanes[ADDRESS][j], 3 + 9 * levels)
        lanes[HOST + ODD][j] = 0
        lanes[INDEX][j], lanes[LEFT][j], lanes[OFFSET][j], lanes[HELD][j] = 0, WORD, 0, WORD


def guest_place(table: Word, address: Word, shift: Word) -> Word:
    """The guest-physical address of the entry for an address in a table."""
    return table & FRAME | (address >> shift & 0x1FF) << 3


def read_tables(
    memory: Words,
    entries: Word,
    mode: Word,
    reserved: Word,
    must: Word,
    level: Word,
    lanes: Sequence[Store],
    count: Word,
) -> None:
    """Read the guest's entries of a level, at the places that the second stage has led to, which
    must have left the bits `must`: then the second stage is to be asked for the next level's, or
    for the page.
    """
    address, index, entry = lanes[ADDRESS], lanes[INDEX], lanes[ENTRY]
    left, offset, odd, held = lanes[LEFT], lanes[OFFSET], lanes[ODD], lanes[HELD]
    gpa, stage_entry = lanes[HOST + ADDRESS], lanes[HOST + ENTRY]
    stage_left, stage_offset = lanes[HOST + LEFT], lanes[HOST + OFFSET]
    no_large = 0x30 | (mode >> MODE_PAGE1GB & 1 ^ 1) << 3
    for j in range(count):
        place = in_page(stage_entry[j], stage_offset[j], gpa[j]) >> 3
        on = offset[j] == 0
        held[j] = held[j] & ite(on, stage_left[j], WORD)
        odd[j] = odd[j] | ite(on, must & ~stage_left[j] | flag(place >= entries), 0)
        index[j] = ite(on & (place < entries), place, index[j])
    for j in range(count):
        entry[j] = memory[index[j]]
    for j in range(count):
        offset[j], odd[j] = judged(entry[j], offset[j], odd[j], level, reserved, 0, no_large, 0)
        left[j] = left[j] & (entry[j] ^ 1 << 63)
        below = guest_place(entry[j], address[j], 9 * level - 6)
        gpa[j] = ite(offset[j] == 0, below, in_page(entry[j], offset[j], address[j]))
