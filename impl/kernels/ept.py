"""Walks of extended page tables (EPT) as straight-line kernels, in the manner of `long_mode`.

Nothing here is shared with `vapama.spec.ept`, against which it is proved. Words that the kernels
take and give, besides those of `long_mode`:

- `access`: bit 0 if no linear address is behind it, W (2), user-mode linear address (4), to a guest
  table (8), fetch (16); of the page: writable (32), no-execute (64); shadow stack (128).
- `mode`: what `mode_word` packs, by the MODE_ constants below.
- `reserved`: what `reserved_word` gives, the bits reserved in every present entry.
- a result is a pair (status, value): status 1, 2 or 3, translated by a page of that level, value is
  the physical address; VIOLATION, value is the exit qualification, without the bits that the manual
  leaves undefined; MISCONFIGURED; OUTSIDE, value is the physical address of the missing entry.
"""

from vapama.impl.kernels.long_mode import FRAME, OUTSIDE, Store, Words
from vapama.spec.words import Word

VIOLATION = 8
MISCONFIGURED = 9

# Bit positions in a mode word.
MODE_FIVE, MODE_AD, MODE_MBEC, MODE_EXECUTE_ONLY = 0, 1, 2, 3
MODE_PAGE2MB, MODE_PAGE1GB, MODE_ADVANCED = 4, 5, 6


def mode_word(eptp: Word, mbec: Word, capabilities: Word) -> Word:
    """The control bits that a walk needs, packed into one word."""
    return (
        (eptp >> 5 & 1) << MODE_FIVE
        | (eptp >> 6 & 1) << MODE_AD
        | mbec << MODE_MBEC
        | (capabilities & 1) << MODE_EXECUTE_ONLY
        | (capabilities >> 16 & 1) << MODE_PAGE2MB
        | (capabilities >> 17 & 1) << MODE_PAGE1GB
        | (capabilities >> 22 & 1) << MODE_ADVANCED
    )


def reserved_word(maxphyaddr: Word) -> Word:
    """The bits that are reserved in a present entry of any level."""
    return 0x0010000000000000 - (1 << maxphyaddr)


def walk(
    memory: Words,
    entries: Word,
    mode: Word,
    reserved: Word,
    eptp: Word,
    gpa: Word,
    access: Word,
    path: Store,
) -> tuple[Word, Word]:
    """Translate one guest-physical address. Returns (status, value), see the module."""
    level = 4
    shift = 48
    if mode >> MODE_FIVE & 1:
        level = 5
        shift = 57
    if gpa >> shift:
        return VIOLATION, qualification(mode, access, 0)
    mbec = mode >> MODE_MBEC & 1
    no_execute_only = mode >> MODE_EXECUTE_ONLY & 1 ^ 1
    present = 7 | mbec << 10
    table = eptp & FRAME
    rights = 0x407
    while True:
        shift = shift - 9
        index = (table >> 3) | (gpa >> shift & 0x1FF)
        if index >= entries:
            return OUTSIDE, index << 3
        entry = memory[index]
        path[level] = index
        if not entry & present:
            return VIOLATION, qualification(mode, access, 0)
        must_be_zero = reserved
        leaf = 0
        if level == 1:
            leaf = 1
        elif level > 3:
            must_be_zero = reserved | 0xF8
        elif entry & 0x80:
            leaf = 1
            if level == 2:
                must_be_zero = reserved | 0x1FF000 | (mode >> MODE_PAGE2MB & 1 ^ 1) << 7
            else:
                must_be_zero = reserved | 0x3FFFF000 | (mode >> MODE_PAGE1GB & 1 ^ 1) << 7
        else:
            must_be_zero = reserved | 0x78
        fetchable = (entry >> 2 | mbec & entry >> 10) & no_execute_only
        conflict = (entry & 1 ^ 1) & (entry >> 1 | fetchable)
        # Of the types, 2 and 3 have bit 4 of the entry without bit 5, and 7 has all three.
        no_type = leaf & entry >> 4 & (entry >> 5 ^ 1 | entry >> 3)
        if entry & must_be_zero | conflict | no_type:
            return MISCONFIGURED, 0
        rights = rights & entry
        if leaf:
            break
        table = entry & FRAME
        level = level - 1
    if needed(mode, access) & ~rights:
        return VIOLATION, qualification(mode, access, rights)
    offset = (1 << shift) - 1
    return level, (entry & FRAME & ~offset) | (gpa & offset)


def table_write(mode: Word, access: Word) -> Word:
    """1 for an access to a guest's table that accessed and dirty flags make a write.

    Not if no linear address is behind it: then PDPTEs are loaded.
    """
    return mode >> MODE_AD & access >> 3 & (access & 1 ^ 1)


def needed(mode: Word, access: Word) -> Word:
    """The rights that an access needs, as bits of an entry."""
    write = access >> 1 & 1 | table_write(mode, access)
    fetch = access >> 4 & 1
    user_fetch = fetch & mode >> MODE_MBEC & access >> 2
    read = (write | fetch) ^ 1
    return read | write << 1 | (fetch ^ user_fetch) << 2 | user_fetch << 10


def qualification(mode: Word, access: Word, rights: Word) -> Word:
    """The exit qualification of a violation; `rights` are the AND of the entries, 0 if one was
    not present.
    """
    write = access >> 1 & 1
    fetch = access >> 4 & 1
    linear = access & 1 ^ 1
    final = linear & (access >> 3 & 1 ^ 1)
    as_write = table_write(mode, access)
    user_executable = rights >> 10 & mode >> MODE_MBEC & 1
    told = (access >> 2 & 1 | access >> 4 & 6) * (final & mode >> MODE_ADVANCED)
    return (
        (write | fetch) ^ 1
        | as_write
        | (write | as_write) << 1
        | fetch << 2
        | (rights & 7) << 3
        | user_executable << 6
        | linear << 7
        | final << 8
        | told << 9
        | (access >> 7 & 1) << 13
    )


def mark(memory: Store, levels: Word, level: Word, write: Word, path: Words) -> None:
    """Set the accessed flags, and for a write the dirty flag, of a walk that ended at `level`."""
    at = levels
    while at > level:
        memory[path[at]] = memory[path[at]] | 0x100
        at = at - 1
    memory[path[level]] = memory[path[level]] | 0x100 | write << 9


def mark_walk(memory: Store, mode: Word, status: Word, access: Word, path: Words) -> None:
    """Set the flags, where EPT has them, of a walk that translated with this status."""
    if mode >> MODE_AD & 1:
        levels = 4
        if mode >> MODE_FIVE & 1:
            levels = 5
        mark(memory, levels, status, access >> 1 & 1 | table_write(mode, access), path)


def walk_and_mark(
    memory: Words,
    marks: Store,
    entries: Word,
    mode: Word,
    reserved: Word,
    eptp: Word,
    gpa: Word,
    access: Word,
    path: Store,
) -> tuple[Word, Word]:
    """`walk`, and if it translates set the accessed and dirty flags, where EPT has them, in
    `marks`: the memory.
    """
    status, value = walk(memory, entries, mode, reserved, eptp, gpa, access, path)
    if status < VIOLATION:
        mark_walk(marks, mode, status, access, path)
    return status, value
