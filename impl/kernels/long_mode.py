"""4-level and 5-level walks as straight-line kernels: one source, run three ways.

The functions here use nothing but words, indexing and loops. As they stand they run on ints (and
symbolic words); `vapama.impl.kernels.compiled` turns them into machine code in which every integer
is a uint64. `memory[i]` is the i-th 8-byte entry of physical memory and `entries` their number: no
index of `entries` or more is ever used, whatever the tables hold. Nothing here is shared with
`vapama.spec.paging`, against which it is proved.

Words that the kernels take and give:

- `access`: the bits of the page-fault error code that describe it, W (1), U (2), I (4, a fetch) and
  SS (6, to a shadow stack); and bit 0 for an implicit supervisor access.
- `mode`: what `mode_word` packs out of the control registers, by the MODE_ constants below.
- `reserved`: what `reserved_word` gives, the bits reserved in every present entry.
- `path[level]`: filled with the index of the entry that the walk read at that level.
- a result is a pair (status, value): status 1, 2 or 3, translated by a page of that level, value is
  the physical address; FAULT, value is the error code; NONCANONICAL; OUTSIDE, value is the physical
  address of the entry that memory does not hold.

The annotations are for the reader: numba derives types of its own from the arguments it is given.
"""

from typing import Protocol

from vapama.spec.words import Word

FAULT = 8
NONCANONICAL = 9
OUTSIDE = 10

FRAME = 0x000FFFFFFFFFF000
# Bit positions in a mode word.
MODE_WP, MODE_NXE = 0, 1
MODE_SMEP, MODE_SMAP, MODE_PKE, MODE_CET, MODE_PKS = 2, 3, 4, 5, 6  # in the order of CR4's bits
MODE_LA57, MODE_PAGE1GB, MODE_AC, MODE_LAM_SUP = 7, 8, 9, 10


class Words(Protocol):
    """Words by index, to read: an array or a list in memory, or what stands for one in a proof."""

    def __getitem__(self, index: int, /) -> Word:
        """The word at `index`."""


class Store(Words, Protocol):
    """Words to read and write."""

    def __setitem__(self, index: int, word: Word, /) -> None:
        """Put `word` at `index`."""


def mode_word(cr0: Word, cr4: Word, efer: Word, rflags: Word, page1gb: Word) -> Word:
    """The control bits that a walk needs, packed into one word."""
    return (
        (cr0 >> 16 & 1) << MODE_WP
        | (efer >> 11 & 1) << MODE_NXE
        | (cr4 >> 20 & 0x1F) << MODE_SMEP
        | (cr4 >> 12 & 1) << MODE_LA57
        | (page1gb & 1) << MODE_PAGE1GB
        | (rflags >> 18 & 1) << MODE_AC
        | (cr4 >> 28 & 1) << MODE_LAM_SUP
    )


def reserved_word(efer: Word, maxphyaddr: Word) -> Word:
    """The bits that are reserved in a present entry of any level."""
    return 0x0010000000000000 - (1 << maxphyaddr) | (efer >> 11 & 1 ^ 1) << 63


def without_metadata(mode: Word, cr3: Word, address: Word, access: Word) -> Word:
    """The address with its masked bits, if there are any, made copies of the highest bit left."""
    if not (cr3 >> 61 | mode >> MODE_LAM_SUP & 1):
        return address
    lam57 = cr3 >> 61 & 1
    lam48 = cr3 >> 62 & 1
    if address >> 63:
        lam48 = mode >> MODE_LAM_SUP & 1
        lam57 = lam48 & mode >> MODE_LA57
    if access >> 4 & 1:
        return address
    # Branches, not a choice of masks: with each a proof knows which bits are which.
    if lam57:
        return address & ~0x7E00000000000000 | (address >> 56 & 1) * 0x7E00000000000000
    if lam48:
        return address & ~0x7FFF000000000000 | (address >> 47 & 1) * 0x7FFF000000000000
    return address


def access_code(mode: Word, access: Word) -> Word:
    """The bits of the error code that describe an access: I with NXE or SMEP alone, SS with CET."""
    write = access >> 1 & 1
    user = access >> 2 & 1
    fetch = access >> 4 & 1
    code = (write << 1) | (user << 2) | ((fetch & (mode >> MODE_NXE | mode >> MODE_SMEP)) << 4)
    code = code | access & 0x40 & mode >> MODE_CET << 6
    return code


def walk(
    memory: Words,
    entries: Word,
    mode: Word,
    reserved: Word,
    cr3: Word,
    pkru: Word,
    pkrs: Word,
    address: Word,
    access: Word,
    path: Store,
) -> tuple[Word, Word]:
    """Translate one linear address. Returns (status, value), see the module."""
    level = 4
    shift = 48
    if mode >> MODE_LA57 & 1:
        level = 5
        shift = 57
    address = without_metadata(mode, cr3, address, access)
    upper = address >> (shift - 1)
    if (upper != 0) & (upper != (1 << (65 - shift)) - 1):
        return NONCANONICAL, 0
    code = access_code(mode, access)
    # By level, where bit 7 (PS) must be 0.
    no_large = 0x30 | (mode >> MODE_PAGE1GB & 1 ^ 1) << 3
    table = cr3 & FRAME
    rights = 6
    no_execute = 0
    while True:
        shift = shift - 9
        index = (table >> 3) | (address >> shift & 0x1FF)
        if index >= entries:
            return OUTSIDE, index << 3
        entry = memory[index]
        path[level] = index
        if not entry & 1:
            return FAULT, code
        large = entry >> 7 & 1
        offset = (1 << shift) - 1
        must_be_zero = reserved | (no_large >> level & 1) << 7 | large * (offset & 0x7FFFFFFFE000)
        if entry & must_be_zero:
            return FAULT, code | 9
        above = rights
        rights = rights & entry
        no_execute = no_execute | entry >> 63
        # In a PTE bit 7 is PAT; in a PML4E and a PML5E it was found to be 0.
        if large or level == 1:
            break
        table = entry & FRAME
        level = level - 1
    rights = rights | (above & 2) << 2
    return finish(mode, pkru, pkrs, address, code, access, entry, rights, no_execute, level, shift)


def finish(
    mode: Word,
    pkru: Word,
    pkrs: Word,
    address: Word,
    code: Word,
    access: Word,
    entry: Word,
    rights: Word,
    no_execute: Word,
    level: Word,
    shift: Word,
) -> tuple[Word, Word]:
    """The end of a walk that found a page: check rights and keys, compose the address.

    `rights` are bits 2:1 of the AND of all entries, and in bit 3 that of R/W above the last one.
    """
    write = access >> 1 & 1
    user = access >> 2 & 1
    fetch = access >> 4 & 1
    supervisor = user ^ 1
    user_page = rights >> 2 & 1
    # Whether a missing right or a key stops a write: always the user's, the supervisor's with WP.
    strict = write & (user | mode >> MODE_WP)
    user_keys = pkru * (user_page & mode >> MODE_PKE)
    supervisor_keys = pkrs * ((user_page ^ 1) & mode >> MODE_PKS)
    keys = (user_keys | supervisor_keys) >> (entry >> 59 & 15) * 2
    key_denies = (fetch ^ 1) & (keys | keys >> 1 & strict)
    smep = fetch & mode >> MODE_SMEP
    smap = (fetch ^ 1) & mode >> MODE_SMAP & (mode >> MODE_AC & (access & 1 ^ 1) ^ 1)
    denied = (
        user & (user_page ^ 1)
        | strict & (rights >> 1 & 1 ^ 1)
        | fetch & no_execute
        | supervisor & user_page & (smep | smap)
        | key_denies
    )
    if code >> 6:
        shadow_stack = rights >> 3 & (entry >> 1 ^ 1) & entry >> 6 & 1
        denied = (user ^ user_page) | (shadow_stack ^ 1) | key_denies
    if denied:
        return FAULT, code | 1 | key_denies << 5
    offset = (1 << shift) - 1
    return level, (entry & FRAME & ~offset) | (address & offset)


def mark(memory: Store, levels: Word, level: Word, write: Word, path: Words) -> None:
    """Set the accessed flags, and for a write the dirty flag, of a walk that ended at `level`."""
    at = levels
    while at > level:
        memory[path[at]] = memory[path[at]] | 0x20
        at = at - 1
    memory[path[level]] = memory[path[level]] | 0x20 | write << 6


def walk_and_mark(
    memory: Words,
    marks: Store,
    entries: Word,
    mode: Word,
    reserved: Word,
    cr3: Word,
    pkru: Word,
    pkrs: Word,
    address: Word,
    access: Word,
    path: Store,
) -> tuple[Word, Word]:
    """`walk`, and if it translates set the accessed and dirty flags in `marks`: the memory."""
    status, value = walk(memory, entries, mode, reserved, cr3, pkru, pkrs, address, access, path)
    if status < FAULT:
        levels = 4
        if mode >> MODE_LA57 & 1:
            levels = 5
        mark(marks, levels, status, access >> 1 & 1, path)
    return status, value
