"""A software TLB for a guest on a second stage, in three arrays of words.

`translations` and `structures` are as in `tlb`, with the `space` that tells which second stage the
mappings are combined with. A combined page's frame is the host's, and bits 11:9 of its word tell of
which accesses the second stage was seen to let it pass (READS, WRITES, FETCHES); a table's frame is
guest-physical. `physical` caches what the second stage alone said: guest-physical pages, their tag
without VPID and PCID, and bits 5:0 of the word tell for which kinds of access (`kind_of`).

What is cached serves translations alone. For all else (a fault, an exit, a flag that is to be set
in the guest's tables) both stages are walked anew in memory, so a fault is never a stale one.

Other words are as in `nested`. Source: Intel SDM Vol. 3C, 28.3; AMD APM Vol. 2, 15.16 and 15.25.
"""

from collections.abc import Sequence

from vapama.impl.kernels.long_mode import (
    FAULT,
    FRAME,
    MODE_LA57,
    MODE_PAGE1GB,
    NONCANONICAL,
    Store,
    Words,
    access_code,
    finish,
    without_metadata,
)
from vapama.impl.kernels.nested import (
    ENTRY,
    EXIT,
    GPA,
    STATUS,
    TABLE,
    mark_stage,
    walk,
    walk_stage,
)
from vapama.impl.kernels.tlb import (
    ABOVE,
    ANY_PCID,
    DIRTY,
    GLOBAL,
    KEY,
    LEVEL,
    LEVELS,
    USER,
    VALID,
    WRITABLE,
    Cache,
    drop,
    drop_address,
    drop_path,
    drop_region,
    find,
    put,
)
from vapama.spec.words import Word

READS = 9
"""Where the bits of a combined page begin: reads, writes, fetches."""
ANY_KIND = 7 << READS


def space_of(root: Word) -> Word:
    """The space of what is combined with, or said by, the second stage with this root: EP4TA."""
    return root & FRAME | 1


# TRANSLATING


def translate(
    translations: Cache,
    structures: Cache,
    physical: Cache,
    memory: Words,
    marks: Store,
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
    address_space: Word,
    globals_on: Word,
    address: Word,
    access: Word,
    paths: Sequence[Store],
    trace: Store,
) -> tuple[Word, Word, Word]:
    """Translate one linear address of a guest by what is cached, or else by a walk of both stages
    whose flags are set in `marks` and which is cached then.

    Returns (status, value, gpa) as `nested.walk` does.
    """
    space = space_of(root)
    untagged = without_metadata(mode, cr3, address, access)

    # A PAGE IS CACHED
    write = access >> 1 & 1
    kind = READS + (write | access >> 3 & 2)
    level = 1
    while level <= 3:
        if translations[LEVELS] >> level & 1:
            shift = 3 + 9 * level
            at = find(translations, address_space | level << LEVEL, untagged >> shift, space)
            # One for writes has the dirty flag.
            if at != 0 and translations[at + 2] >> kind & 1:
                entry = translations[at + 2]
                status, value = finish(
                    mode, pkru, pkrs, untagged, access_code(mode, access), access,
                    entry, entry & (WRITABLE | USER | ABOVE), entry >> 63, level, shift,
                )  # fmt: skip
                if status < FAULT:
                    return status, value, 0
        level = level + 1

    # TABLES AND GUEST-PHYSICAL PAGES ARE CACHED
    start, status, value = walk_cached(
        structures, physical, memory, entries, mode, reserved, cr3, pkru, pkrs,
        stage, stage_mode, stage_reserved, root, address_space, untagged, access, paths, trace,
    )  # fmt: skip

    # NOTHING IS OF USE
    if status >= FAULT:
        start = 4 + (mode >> MODE_LA57 & 1)
        status, value, gpa = walk(
            memory, entries, mode, reserved, cr3, pkru, pkrs,
            stage, stage_mode, stage_reserved, root, address, access, paths, trace,
        )  # fmt: skip
        if status >= FAULT or gpa != 0:
            drop_address(translations, address_space, untagged)
            drop_path(structures, address_space, untagged)
            forget(physical, gpa)
            return status, value, gpa

    # FLAGS
    commit(
        translations, structures, physical, memory, marks, stage, stage_mode, address_space,
        globals_on, untagged, access, start, status, value, space, paths, trace,
    )  # fmt: skip
    return status, value, 0


def walk_cached(
    structures: Cache,
    physical: Cache,
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
    address_space: Word,
    address: Word,
    access: Word,
    paths: Sequence[Store],
    trace: Store,
) -> tuple[Word, Word, Word]:
    """Walk from the lowest table that is cached, each guest-physical address by what is cached.

    Returns (start, status, value): the level it began at; FAULT for all that is no translation, or
    would set a flag of the guest's. Sets no flags and caches nothing; `trace` is as after `walk`,
    from `start` down, but a STATUS is 0 where the second stage was not walked.
    """
    # WHERE TO BEGIN
    space = space_of(root)
    start = 4 + (mode >> MODE_LA57 & 1)
    upper = address >> (9 * start + 11)
    table = cr3 & FRAME
    rights = WRITABLE | USER
    no_execute = 0
    if upper != 0 and upper != (1 << (53 - 9 * start)) - 1:
        return start, NONCANONICAL, 0
    level = 2
    while level <= start:
        if structures[LEVELS] >> level & 1:
            tag = address_space | level << LEVEL
            at = find(structures, tag, address >> (3 + 9 * level), space)
            if at != 0:
                start = level - 1
                table = structures[at + 2] & FRAME
                rights = structures[at + 2] & (WRITABLE | USER)
                no_execute = structures[at + 2] >> 63
        level = level + 1

    # THE GUEST'S TABLES
    level = start
    no_large = 0x30 | (mode >> MODE_PAGE1GB & 1 ^ 1) << 3
    while True:
        shift = 3 + 9 * level
        gpa = table | (address >> shift & 0x1FF) << 3
        found, value, missed = second(
            physical, memory, entries, stage, stage_mode, stage_reserved, root, gpa, TABLE,
            paths[level],
        )  # fmt: skip
        if found >= FAULT or value >= entries << 3:
            return start, FAULT, 0
        entry = memory[value >> 3]
        trace[ENTRY + level] = value >> 3
        trace[STATUS + level] = found * missed
        trace[GPA + level] = gpa
        large = entry >> 7 & 1
        below_frame = large * ((1 << shift) - 1 & 0x7FFFFFFFE000)
        wrong = entry & (reserved | (no_large >> level & 1) << 7 | below_frame)
        if wrong | entry & 0x21 ^ 0x21:
            return start, FAULT, 0
        above = rights
        rights = rights & entry
        no_execute = no_execute | entry >> 63
        if large or level == 1:
            break
        table = entry & FRAME
        level = level - 1
    if access >> 1 & (entry >> 6 ^ 1) & 1:
        return start, FAULT, 0

    # THE PAGE
    code = access_code(mode, access)
    told = rights & (WRITABLE | USER) | (above & WRITABLE) << 2
    status, gpa = finish(
        mode, pkru, pkrs, address, code, access, entry, told, no_execute, level, shift
    )
    if status >= FAULT:
        return start, FAULT, 0
    page = access & 0x12 | rights & 4 | (rights & 2) << 4 | no_execute << 6 | code >> 6 << 7
    found, value, missed = second(
        physical, memory, entries, stage, stage_mode, stage_reserved, root, gpa, page, paths[0]
    )
    if found >= FAULT:
        return start, FAULT, 0
    trace[ENTRY] = level
    trace[STATUS] = found * missed
    trace[GPA] = page
    if level < found:
        return start, level, value
    return start, found, value


def kind_of(access: Word) -> Word:
    """The kind of an access to a guest-physical address, as far as it decides whether it may be:
    read 0, write 1, fetch of a supervisor page 2 and of a user page 3, read of a table 4.
    """
    write = access >> 1 & 1
    fetch = access >> 4 & 1
    table = access >> 3 & 1
    return write | fetch << 1 | (fetch & access >> 2) | table << 2


def second(
    physical: Cache,
    memory: Words,
    entries: Word,
    stage: Word,
    mode: Word,
    reserved: Word,
    root: Word,
    gpa: Word,
    access: Word,
    path: Store,
) -> tuple[Word, Word, Word]:
    """The second stage's (status, value), and whether it was walked: 0 if that was cached."""
    kind = kind_of(access)
    space = space_of(root)
    level = 1
    while level <= 3:
        if physical[LEVELS] >> level & 1:
            shift = 3 + 9 * level
            at = find(physical, VALID | level << LEVEL, gpa >> shift, space)
            if at != 0 and physical[at + 2] >> kind & 1:
                offset = (1 << shift) - 1
                return level, physical[at + 2] & FRAME | gpa & offset, 0
        level = level + 1
    status, value = walk_stage(memory, entries, stage, mode, reserved, root, gpa, access, path)
    return status, value, 1


# WHAT A TRANSLATION SETS AND CACHES


def commit(
    translations: Cache,
    structures: Cache,
    physical: Cache,
    memory: Words,
    marks: Store,
    stage: Word,
    stage_mode: Word,
    address_space: Word,
    globals_on: Word,
    address: Word,
    access: Word,
    start: Word,
    status: Word,
    value: Word,
    space: Word,
    paths: Sequence[Store],
    trace: Words,
) -> None:
    """Set the flags of a walk that translated, from `start` down, and cache what it met."""
    # FROM WHAT TABLE IT BEGAN
    rights = WRITABLE | USER
    no_execute = 0
    at = find(structures, address_space | start + 1 << LEVEL, address >> (12 + 9 * start), space)
    if at != 0:
        rights = structures[at + 2] & (WRITABLE | USER)
        no_execute = structures[at + 2] >> 63

    # THE GUEST'S TABLES, and what the second stage said of them
    leaf = trace[ENTRY]
    write = access >> 1 & 1
    level = start
    while level >= leaf:
        index = trace[ENTRY + level]
        entry = memory[index]
        above = rights & WRITABLE
        rights = rights & entry
        no_execute = no_execute | entry >> 63
        tag = address_space | level << LEVEL
        found = trace[STATUS + level]
        if found != 0:
            mark_stage(marks, stage, stage_mode, found, TABLE, paths[level])
            remember(physical, found, trace[GPA + level], index << 3, TABLE, space)
        if level > leaf:
            marks[index] = marks[index] | 0x20
            cached = entry & FRAME | rights & (WRITABLE | USER) | no_execute << 63
            put(structures, tag, address >> (3 + 9 * level), cached, space)
        else:
            marks[index] = marks[index] | 0x20 | write << 6
        level = level - 1

    # THE PAGE
    page = trace[GPA]
    found = trace[STATUS]
    shift = 3 + 9 * leaf
    gpa = entry & FRAME & ~((1 << shift) - 1) | address & (1 << shift) - 1
    if found != 0:
        mark_stage(marks, stage, stage_mode, found, page, paths[0])
        remember(physical, found, gpa, value, page, space)
    tag = address_space | status << LEVEL
    if entry >> 8 & globals_on & 1:
        tag = tag & ~ANY_PCID | GLOBAL
    shift = 3 + 9 * status
    cached = value & FRAME & ~((1 << shift) - 1) | rights & (WRITABLE | USER) | no_execute << 63
    cached = cached | entry & (DIRTY | KEY) | write << 6 | above << 2
    merge(translations, tag, address >> shift, cached, READS + (write | access >> 3 & 2), space)


def merge(cache: Cache, tag: Word, region: Word, cached: Word, kind: Word, space: Word) -> None:
    """Cache a region, for this kind of access, and for those it is cached for already if nothing
    else has changed.
    """
    at = find(cache, tag, region, space)
    kinds = ANY_KIND if kind >= READS else 0x1F
    before = 0
    if at != 0 and (cache[at + 2] ^ cached) & ~kinds == 0:
        before = cache[at + 2] & kinds
    put(cache, tag, region, cached | before | 1 << kind, space)


def remember(
    physical: Cache, level: Word, gpa: Word, value: Word, access: Word, space: Word
) -> None:
    """Cache what the second stage said of a guest-physical address."""
    shift = 3 + 9 * level
    frame = value & FRAME & ~((1 << shift) - 1)
    merge(physical, VALID | level << LEVEL, gpa >> shift, frame, kind_of(access), space)


def forget(physical: Cache, gpa: Word) -> None:
    """Drop what the second stage said of a guest-physical address."""
    level = 1
    while level <= 3:
        drop_region(physical, level, VALID, VALID, gpa & EXIT - 1)
        level = level + 1


# INVALIDATING


def drop_space(cache: Cache, kind: Word, root: Word) -> None:
    """INVEPT, in one of the caches: combined and guest-physical mappings, type 1 of an EP4TA, type
    2 of all.
    """
    if kind == 1:
        drop(cache, VALID, VALID, FRAME | 1, space_of(root))
    else:
        drop(cache, VALID, VALID, 1, 1)
