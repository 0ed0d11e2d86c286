"""A software TLB with paging-structure caches, in two arrays of words.

`translations` caches pages, `structures` caches tables: what a walk has met when it comes to the
table of some level. Both are arrays of this form, which `make` lays out: a header of HEADER words,
then sets of ways of WORDS words each:

- word 0, the tag: VALID, GLOBAL, the level at LEVEL (of the page, or of the entry that references
  the table), the PCID at PCID (0 if GLOBAL), the VPID at VPID; 0 as a whole if the way is free.
- word 1, the region: the linear address without the bits that the level translates by offset.
- word 2, what is cached, in the form of an entry: frame, dirty flag and key of the entry itself,
  R/W and U/S if all entries down to it have them, XD if one has it; of a page also ABOVE, the R/W
  of all entries above it (a page that lacks just its own may be of a shadow stack).
- word 3, the space: for a combined mapping the EP4TA with bit 0 set, 0 for a linear mapping.

`address_space` is the tag of the current VPID and PCID, as `space_tag` makes it. Other words are as
in `vapama.impl.kernels.long_mode`.
"""

from typing import Protocol

from vapama.impl.kernels.long_mode import (
    FAULT,
    FRAME,
    MODE_LA57,
    MODE_PAGE1GB,
    NONCANONICAL,
    OUTSIDE,
    Store,
    Words,
    access_code,
    finish,
    without_metadata,
)
from vapama.spec.words import Word

# The header: sets less one, ways, and a bit for each level of which something may be cached.
SETS, WAYS, LEVELS = 0, 1, 2
HEADER, WORDS = 4, 4

# A tag: flags, and the lowest bits of fields.
VALID, GLOBAL = 1 << 0, 1 << 1
LEVEL, PCID, VPID = 4, 8, 32
ANY_LEVEL, ANY_PCID, ANY_VPID = 7 << LEVEL, 0xFFF << PCID, 0xFFFF << VPID

WRITABLE, USER, ABOVE, DIRTY, PAGE_GLOBAL, NO_EXECUTE = (
    1 << 1,
    1 << 2,
    1 << 3,
    1 << 6,
    1 << 8,
    1 << 63,
)
KEY = 0xF << 59


class Cache(Words, Protocol):
    """One of the two arrays."""

    def __setitem__(self, index: int, word: Word, /) -> None:
        """Put `word` at `index`."""


def space_tag(vpid: Word, pcid: Word) -> Word:
    """The tag, but for the level, of what is not global in an address space."""
    return VALID | pcid << PCID | vpid << VPID


# LOOKING UP AND PUTTING IN


def set_of(cache: Words, tag: Word, region: Word) -> Word:
    """Where the set begins that a region of the tag's level belongs to."""
    return HEADER + ((region ^ (tag & ANY_LEVEL) >> LEVEL) & cache[SETS]) * cache[WAYS] * WORDS


def find(cache: Words, tag: Word, region: Word, space: Word) -> Word:
    """Where a region is cached for an address space or globally; 0 if it is not."""
    shared = tag & ~ANY_PCID | GLOBAL
    at = set_of(cache, tag, region)
    end = at + cache[WAYS] * WORDS
    while at < end:
        if cache[at + 1] == region:
            tagged = (cache[at] == tag) | (cache[at] == shared)
            if tagged & (cache[at + 3] == space):
                return at
        at = at + WORDS
    return 0


def put(cache: Cache, tag: Word, region: Word, entry: Word, space: Word) -> None:
    """Cache a region: in place of what was cached of it, else in a free way, else in another's."""
    at = set_of(cache, tag, region)
    end = at + cache[WAYS] * WORDS
    place = at + (region >> 7 & (cache[WAYS] - 1)) * WORDS
    while at < end:
        if (cache[at] == tag) & (cache[at + 1] == region) & (cache[at + 3] == space):
            place = at
            break
        if cache[at] == 0:
            place = at
        at = at + WORDS
    cache[place] = tag
    cache[place + 1] = region
    cache[place + 2] = entry
    cache[place + 3] = space
    cache[LEVELS] = cache[LEVELS] | 1 << ((tag & ANY_LEVEL) >> LEVEL)


# TRANSLATING


def translate(
    translations: Cache,
    structures: Cache,
    memory: Words,
    marks: Store,
    entries: Word,
    mode: Word,
    reserved: Word,
    cr3: Word,
    pkru: Word,
    pkrs: Word,
    address_space: Word,
    globals_on: Word,
    address: Word,
    access: Word,
    path: Store,
) -> tuple[Word, Word]:
    """Translate one linear address by what is cached, or else by a walk whose flags are set in
    `marks` and which is cached then. A fault drops what is cached for the address.

    `globals_on` is CR4.PGE. Returns (status, value) as the walk does.
    """
    write = access >> 1 & 1
    address = without_metadata(mode, cr3, address, access)

    # A PAGE IS CACHED: of what is not dirty yet, a write walks again to set the flag in memory
    level = 1
    while level <= 3:
        if translations[LEVELS] >> level & 1:
            shift = 3 + 9 * level
            at = find(translations, address_space | level << LEVEL, address >> shift, 0)
            if at != 0 and (write & (translations[at + 2] >> 6 ^ 1)) == 0:
                return judge(
                    translations, structures, mode, pkru, pkrs, address_space, address, access, at
                )
        level = level + 1

    # A TABLE IS CACHED, the lowest first, or the walk begins at the root
    start = 4
    upper = address >> 47
    all_ones = 0x1FFFF
    if mode >> MODE_LA57 & 1:
        start = 5
        upper = address >> 56
        all_ones = 0xFF
    table = cr3 & FRAME
    rights = WRITABLE | USER
    no_execute = 0
    level = 2
    at = 0
    while at == 0 and level <= 5:
        if structures[LEVELS] >> level & 1:
            at = find(structures, address_space | level << LEVEL, address >> (3 + 9 * level), 0)
        level = level + 1
    if at != 0:
        start = ((structures[at] & ANY_LEVEL) >> LEVEL) - 1
        table = structures[at + 2] & FRAME
        rights = structures[at + 2] & (WRITABLE | USER)
        no_execute = structures[at + 2] >> 63
    elif (upper != 0) & (upper != all_ones):
        return NONCANONICAL, 0

    # WALK ON
    status, value = walk_on(
        memory, entries, mode, reserved, pkru, pkrs, address, access, path,
        start, table, rights, no_execute,
    )  # fmt: skip

    # CACHE WHAT IT MET
    if status < FAULT:
        fill(
            translations, structures, memory, marks, address_space, globals_on, address, write,
            path, start, status, rights, no_execute,
        )  # fmt: skip
    if status == FAULT:
        drop_address(translations, address_space, address)
        drop_path(structures, address_space, address)
    return status, value


def walk_on(
    memory: Words,
    entries: Word,
    mode: Word,
    reserved: Word,
    pkru: Word,
    pkrs: Word,
    address: Word,
    access: Word,
    path: Store,
    level: Word,
    table: Word,
    rights: Word,
    no_execute: Word,
) -> tuple[Word, Word]:
    """`long_mode.walk` from `level` on, at physical address `table`, with the rights met above it.

    A loop of its own: as one function for both, the walk without a TLB took a third longer.
    """
    code = access_code(mode, access)
    no_large = 0x30 | (mode >> MODE_PAGE1GB & 1 ^ 1) << 3
    while True:
        shift = 3 + 9 * level
        index = (table >> 3) | (address >> shift & 0x1FF)
        if index >= entries:
            return OUTSIDE, index << 3
        entry = memory[index]
        path[level] = index
        if not entry & 1:
            return FAULT, code
        large = entry >> 7 & 1
        below_frame = large * ((1 << shift) - 1 & 0x7FFFFFFFE000)
        if entry & (reserved | (no_large >> level & 1) << 7 | below_frame):
            return FAULT, code | 9
        above = rights
        rights = rights & entry
        no_execute = no_execute | entry >> 63
        if large or level == 1:
            break
        table = entry & FRAME
        level = level - 1
    rights = rights | (above & WRITABLE) << 2
    return finish(mode, pkru, pkrs, address, code, access, entry, rights, no_execute, level, shift)


def judge(
    translations: Cache,
    structures: Cache,
    mode: Word,
    pkru: Word,
    pkrs: Word,
    address_space: Word,
    address: Word,
    access: Word,
    at: Word,
) -> tuple[Word, Word]:
    """What an access through the cached page `at` comes to, by the control state of now."""
    level = (translations[at] & ANY_LEVEL) >> LEVEL
    entry = translations[at + 2]
    status, value = finish(
        mode, pkru, pkrs, address, access_code(mode, access), access,
        entry, entry & (WRITABLE | USER | ABOVE), entry >> 63, level, 3 + 9 * level,
    )  # fmt: skip
    if status == FAULT:
        drop_address(translations, address_space, address)
        drop_path(structures, address_space, address)
    return status, value


def fill(
    translations: Cache,
    structures: Cache,
    memory: Words,
    marks: Store,
    address_space: Word,
    globals_on: Word,
    address: Word,
    write: Word,
    path: Words,
    level: Word,
    leaf: Word,
    rights: Word,
    no_execute: Word,
) -> None:
    """Set the flags of the entries that a walk read from `level` down to `leaf`, and cache them."""
    while level >= leaf:
        entry = memory[path[level]]
        above = rights & WRITABLE
        rights = rights & entry
        no_execute = no_execute | entry >> 63
        region = address >> (3 + 9 * level)
        cached = entry & FRAME | rights & (WRITABLE | USER) | no_execute << 63
        tag = address_space | level << LEVEL
        if level > leaf:
            marks[path[level]] = marks[path[level]] | 0x20
            put(structures, tag, region, cached, 0)
        else:
            marks[path[level]] = marks[path[level]] | 0x20 | write << 6
            offset = (1 << (3 + 9 * level)) - 1
            cached = cached & ~(offset & FRAME) | entry & (DIRTY | KEY) | write << 6 | above << 2
            if entry >> 8 & globals_on & 1:
                tag = tag & ~ANY_PCID | GLOBAL
            put(translations, tag, region, cached, 0)
        level = level - 1


# INVALIDATING


def drop(cache: Cache, mask: Word, value: Word, space_mask: Word, space: Word) -> None:
    """Drop all whose tag and space have these values under these masks."""
    at = HEADER
    end = HEADER + (cache[SETS] + 1) * cache[WAYS] * WORDS
    while at < end:
        if (cache[at] & mask == value) & (cache[at + 3] & space_mask == space):
            cache[at] = 0
        at = at + WORDS


def drop_region(cache: Cache, level: Word, mask: Word, value: Word, address: Word) -> None:
    """Drop what is cached, at a level, of the region around an address, if its tag has this value
    under this mask.
    """
    region = address >> (3 + 9 * level)
    at = set_of(cache, level << LEVEL, region)
    end = at + cache[WAYS] * WORDS
    mask = mask | ANY_LEVEL
    value = value | level << LEVEL
    while at < end:
        if (cache[at] & mask == value) & (cache[at + 1] == region):
            cache[at] = 0
        at = at + WORDS


def drop_address(translations: Cache, address_space: Word, address: Word) -> None:
    """Drop the pages around an address, of every size: those of the address space, and global ones
    of its VPID.
    """
    level = 1
    while level <= 3:
        if translations[LEVELS] >> level & 1:
            own, shared = VALID | GLOBAL | ANY_PCID | ANY_VPID, VALID | GLOBAL | ANY_VPID
            drop_region(translations, level, own, address_space, address)
            global_tag = address_space & ~ANY_PCID | GLOBAL
            drop_region(translations, level, shared, global_tag, address)
        level = level + 1


def drop_path(structures: Cache, address_space: Word, address: Word) -> None:
    """Drop the tables that would be used for an address in the address space."""
    level = 2
    while level <= 5:
        drop_region(structures, level, VALID | ANY_PCID | ANY_VPID, address_space, address)
        level = level + 1


def drop_space(translations: Cache, structures: Cache, address_space: Word) -> None:
    """Drop all of an address space that is not global."""
    drop(translations, VALID | GLOBAL | ANY_PCID | ANY_VPID, address_space, 0, 0)
    drop(structures, VALID | ANY_PCID | ANY_VPID, address_space, 0, 0)


def invlpg(translations: Cache, structures: Cache, address_space: Word, address: Word) -> None:
    """INVLPG: pages around an address, global ones too, and all tables of the address space."""
    drop_address(translations, address_space, address)
    drop(structures, VALID | ANY_PCID | ANY_VPID, address_space, 0, 0)


def invpcid(
    translations: Cache,
    structures: Cache,
    kind: Word,
    address_space: Word,
    address: Word,
) -> None:
    """INVPCID, `address_space` being of the current VPID and of the descriptor's PCID."""
    if kind == 0:
        level = 1
        while level <= 3:
            mask = VALID | GLOBAL | ANY_PCID | ANY_VPID
            drop_region(translations, level, mask, address_space, address)
            level = level + 1
        drop_path(structures, address_space, address)
    elif kind == 1:
        drop_space(translations, structures, address_space)
    elif kind == 2:
        drop_vpid(translations, structures, address_space, 1)
    else:
        drop_vpid(translations, structures, address_space, 0)


def drop_vpid(
    translations: Cache, structures: Cache, address_space: Word, global_too: Word
) -> None:
    """Drop all of a VPID, for every PCID."""
    value = address_space & (VALID | ANY_VPID)
    if global_too:
        drop(translations, VALID | ANY_VPID, value, 0, 0)
    else:
        drop(translations, VALID | GLOBAL | ANY_VPID, value, 0, 0)
    drop(structures, VALID | ANY_VPID, value, 0, 0)


def invvpid(
    translations: Cache,
    structures: Cache,
    kind: Word,
    vpid: Word,
    address: Word,
) -> None:
    """INVVPID: type 0, an address of a VPID, for every PCID; 1, a VPID; 2, every VPID; 3, a VPID
    but for what is global.
    """
    if kind == 0:
        mask, value = VALID | ANY_VPID, VALID | vpid << VPID
        level = 1
        while level <= 5:
            drop_region(translations, level, mask, value, address)
            drop_region(structures, level, mask, value, address)
            level = level + 1
    elif kind == 1:
        drop_vpid(translations, structures, space_tag(vpid, 0), 1)
    elif kind == 2:
        drop(translations, VALID, VALID, 0, 0)
        drop(structures, VALID, VALID, 0, 0)
    else:
        drop_vpid(translations, structures, space_tag(vpid, 0), 0)
