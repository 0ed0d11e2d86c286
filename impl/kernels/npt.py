"""Walks of nested page tables (NPT) as straight-line kernels, in the manner of `long_mode`.

Nothing here is shared with `vapama.spec.npt`, against which it is proved. Words that the kernels
take and give, besides those of `long_mode`:

- `access`: as `ept` takes it; user, writable and no-execute page do not count.
- `mode`: what `mode_word` packs, by the MODE_ constants below: two bits for the host's paging,
  LEGACY (2 levels of 4-byte entries), PAE, FOUR or FIVE levels.
- `reserved`: what `reserved_word` gives: in 32-bit paging the reserved bits of an entry for a
  4-MByte page, else those of every present entry.
- `path[level]`: the index of the entry read at that level; of a 4-byte entry in 32-bit paging.
- a result is a pair (status, value): status 1, 2 or 3, translated by a page of that level, value is
  the physical address; FAULT, value is EXITINFO1; OUTSIDE, value is the physical address of the
  entry that memory does not hold.
"""

from vapama.impl.kernels.long_mode import FAULT, FRAME, OUTSIDE, Store, Words
from vapama.spec.words import Word

LEGACY, PAE, FOUR, FIVE = 0, 1, 2, 3
# Bit positions in a mode word; the host's paging is in bits 1:0.
MODE_NXE, MODE_PSE, MODE_PAGE1GB = 2, 3, 4


def mode_word(cr4: Word, efer: Word, page1gb: Word) -> Word:
    """The control bits that a walk needs, packed into one word."""
    long_mode = efer >> 10 & 1
    return (
        long_mode << 1
        | (cr4 >> 5 & (long_mode ^ 1) | cr4 >> 12 & long_mode)
        | (efer >> 11 & 1) << MODE_NXE
        | (cr4 >> 4 & 1) << MODE_PSE
        | (page1gb & 1) << MODE_PAGE1GB
    )


def reserved_word(mode: Word, maxphyaddr: Word) -> Word:
    """The bits that are reserved in a present entry of any level, or of a 4-MByte page."""
    if mode & 3 == LEGACY:
        # Bits 20:13 hold bits 39:32 of the address, as far as there are such.
        width = maxphyaddr
        if maxphyaddr > 40:
            width = 40
        return 0x400000 - (1 << (width - 19))
    reserved = 0x0010000000000000 - (1 << maxphyaddr) | (mode >> MODE_NXE & 1 ^ 1) << 63
    if mode & 3 == PAE:
        reserved = reserved | 0x7FF0000000000000
    return reserved


def walk(
    memory: Words,
    entries: Word,
    mode: Word,
    reserved: Word,
    ncr3: Word,
    gpa: Word,
    access: Word,
    path: Store,
) -> tuple[Word, Word]:
    """Translate one guest-physical address. Returns (status, value), see the module."""
    table_access = access >> 3 & 1
    write = access >> 1 & 1 | table_access
    fetch = access >> 4 & 1
    code = write << 1 | 4 | fetch << 4 | (access >> 7 & 1) << 6 | 0x100000000 << table_access
    paging = mode & 3
    if paging == LEGACY:
        return walk_legacy(memory, entries, mode, reserved, ncr3, gpa, code, path)
    level = 4
    shift = 48
    table = ncr3 & FRAME
    if paging == FIVE:
        level = 5
        shift = 57
    elif paging == PAE:
        level = 3
        shift = 32
        table = ncr3 & 0xFFFFFFE0
    if gpa >> shift:
        return FAULT, code
    # With PAE the uppermost index has two bits.
    low = gpa & ((1 << shift) - 1)
    shift = 12 + 9 * level
    rights = 6
    no_execute = 0
    while True:
        shift = shift - 9
        index = (table >> 3) | (low >> shift & 0x1FF)
        if index >= entries:
            return OUTSIDE, index << 3
        entry = memory[index]
        path[level] = index
        if not entry & 1:
            return FAULT, code
        must_be_zero = reserved
        leaf = 0
        if level == 1:
            leaf = 1
        elif level > 3:
            must_be_zero = reserved | 0x180
        elif level == 3 and paging == PAE:
            must_be_zero = reserved | 0x80000000000001E6
        elif entry & 0x80:
            leaf = 1
            if level == 2:
                must_be_zero = reserved | 0x1FE000
            else:
                must_be_zero = reserved | 0x3FFFE000 | (mode >> MODE_PAGE1GB & 1 ^ 1) << 7
        if entry & must_be_zero:
            return FAULT, code | 9
        if level != 3 or paging != PAE:
            rights = rights & entry
            no_execute = no_execute | entry >> 63
        if leaf:
            break
        table = entry & FRAME
        level = level - 1
    if denied(code, rights, no_execute):
        return FAULT, code | 1
    offset = (1 << shift) - 1
    return level, (entry & FRAME & ~offset) | (gpa & offset)


def walk_legacy(
    memory: Words,
    entries: Word,
    mode: Word,
    reserved: Word,
    ncr3: Word,
    gpa: Word,
    code: Word,
    path: Store,
) -> tuple[Word, Word]:
    """`walk` of a host in 32-bit paging; `code` is EXITINFO1 so far."""
    if gpa >> 32:
        return FAULT, code
    index = (ncr3 & 0xFFFFF000) >> 2 | (gpa >> 22 & 0x3FF)
    if index >> 1 >= entries:
        return OUTSIDE, index << 2
    path[2] = index
    entry = half(memory[index >> 1], index)
    if not entry & 1:
        return FAULT, code
    if entry >> 7 & mode >> MODE_PSE & 1:
        if entry & reserved:
            return FAULT, code | 9
        if denied(code, entry, 0):
            return FAULT, code | 1
        return 2, (entry & 0xFFC00000) | (entry >> 13 & 0xFF) << 32 | (gpa & 0x3FFFFF)
    rights = entry
    index = (entry & 0xFFFFF000) >> 2 | (gpa >> 12 & 0x3FF)
    if index >> 1 >= entries:
        return OUTSIDE, index << 2
    path[1] = index
    entry = half(memory[index >> 1], index)
    if not entry & 1:
        return FAULT, code
    if denied(code, rights & entry, 0):
        return FAULT, code | 1
    return 1, (entry & 0xFFFFF000) | (gpa & 0xFFF)


def half(pair: Word, index: Word) -> Word:
    """The 4-byte entry with this index, out of the 8 bytes that hold it."""
    return pair >> (index & 1) * 32 & 0xFFFFFFFF


def denied(code: Word, rights: Word, no_execute: Word) -> Word:
    """1 if the rights (AND of the entries, OR of NX) forbid the access: a user's, which `code`
    describes.
    """
    no_write = code >> 1 & (rights >> 1 & 1 ^ 1)
    return (rights >> 2 & 1 ^ 1) | (no_write & 1) | (code >> 4 & no_execute & 1)


def mark(memory: Store, paging: Word, level: Word, write: Word, path: Words) -> None:
    """Set the accessed flags, and for a write the dirty flag, of a walk that ended at `level`."""
    last = 0x20 | write << 6
    if paging == LEGACY:
        if level == 1:
            memory[path[2] >> 1] = memory[path[2] >> 1] | 0x20 << (path[2] & 1) * 32
        index = path[level]
        memory[index >> 1] = memory[index >> 1] | last << (index & 1) * 32
    else:
        at = 4
        if paging == FIVE:
            at = 5
        elif paging == PAE:
            at = 2
        while at > level:
            memory[path[at]] = memory[path[at]] | 0x20
            at = at - 1
        memory[path[level]] = memory[path[level]] | last


def mark_walk(memory: Store, mode: Word, status: Word, access: Word, path: Words) -> None:
    """Set the flags of a walk that translated with this status."""
    mark(memory, mode & 3, status, (access >> 1 | access >> 3) & 1, path)


def walk_and_mark(
    memory: Words,
    marks: Store,
    entries: Word,
    mode: Word,
    reserved: Word,
    ncr3: Word,
    gpa: Word,
    access: Word,
    path: Store,
) -> tuple[Word, Word]:
    """`walk`, and if it translates set the accessed and dirty flags in `marks`: the memory."""
    status, value = walk(memory, entries, mode, reserved, ncr3, gpa, access, path)
    if status < FAULT:
        mark_walk(marks, mode, status, access, path)
    return status, value
