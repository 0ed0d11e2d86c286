"""32-bit paging, PAE paging and no paging as straight-line kernels, in the manner of `long_mode`.

A walk of two levels, of entries of 4 bytes or of 8. Words that these kernels take and give, besides
those of `long_mode`:

- `mode`: what `mode_word` packs: the MODE_ bits of `long_mode` (those of protection keys and masked
  addresses are 0), and the ones below.
- `reserved`: what `reserved_word` gives, the bits reserved in every present PDE and PTE of PAE
  paging, in 32-bit paging in every PDE of a 4-MByte page.
- `pdptes[i]`: the i-th PDPTE register. Without MODE_PDPTES it is not looked at: the PDPTEs are in
  memory.
- `path[level]`: in 32-bit paging, counted in entries of 4 bytes.
- a status of 0: translated with paging off; GENERAL_PROTECTION: the PDPTEs are refused.
"""

from vapama.impl.kernels.long_mode import (
    FAULT,
    FRAME,
    MODE_AC,
    MODE_CET,
    MODE_NXE,
    MODE_SMAP,
    MODE_SMEP,
    MODE_WP,
    OUTSIDE,
    Store,
    Words,
    finish,
)
from vapama.spec.words import Word

LOADED = 0
GENERAL_PROTECTION = 11

FRAME_32 = 0xFFFFF000
PDPT = 0xFFFFFFE0
# Bit positions in a mode word.
MODE_PG, MODE_PAE, MODE_PSE, MODE_PDPTES = 16, 17, 18, 19


def mode_word(cr0: Word, cr4: Word, efer: Word, rflags: Word, pdptes: Word) -> Word:
    """The control bits that a walk needs, packed into one word; `pdptes` is 1 if they are in
    registers.
    """
    return (
        (cr0 >> 16 & 1) << MODE_WP
        | (efer >> 11 & cr4 >> 5 & 1) << MODE_NXE
        | (cr4 >> 20 & 1) << MODE_SMEP
        | (cr4 >> 21 & 1) << MODE_SMAP
        | (rflags >> 18 & 1) << MODE_AC
        | (cr4 >> 23 & 1) << MODE_CET
        | (cr0 >> 31 & 1) << MODE_PG
        | (cr4 >> 5 & 1) << MODE_PAE
        | (cr4 >> 4 & 1) << MODE_PSE
        | pdptes << MODE_PDPTES
    )


def reserved_word(cr4: Word, efer: Word, maxphyaddr: Word, pse36: Word) -> Word:
    """The reserved bits, see the module."""
    if cr4 >> 5 & 1:
        return 0x8000000000000000 - (1 << maxphyaddr) | (efer >> 11 & 1 ^ 1) << 63
    lowest = 13
    if pse36:
        lowest = 21
        if maxphyaddr < 40:
            lowest = maxphyaddr - 19
    return 0x400000 - (1 << lowest)


def walk(
    memory: Words,
    entries: Word,
    mode: Word,
    reserved: Word,
    cr3: Word,
    pdptes: Words,
    address: Word,
    access: Word,
    path: Store,
) -> tuple[Word, Word]:
    """Translate one linear address. Returns (status, value), see the module."""
    address = address & 0xFFFFFFFF
    if not mode >> MODE_PG & 1:
        return 0, address
    fetch = access >> 4 & (mode >> MODE_NXE | mode >> MODE_SMEP) & 1
    code = access & 6 | fetch << 4 | access & 0x40 & mode >> MODE_CET << 6
    if mode >> MODE_PAE & 1:
        return walk_pae(memory, entries, mode, reserved, cr3, pdptes, address, access, code, path)
    return walk_32(memory, entries, mode, reserved, cr3, address, access, code, path)


def walk_32(
    memory: Words,
    entries: Word,
    mode: Word,
    reserved: Word,
    cr3: Word,
    address: Word,
    access: Word,
    code: Word,
    path: Store,
) -> tuple[Word, Word]:
    """`walk` in 32-bit paging."""
    index = (cr3 & FRAME_32) >> 2 | address >> 22
    if index >> 1 >= entries:
        return OUTSIDE, index << 2
    path[2] = index
    pde = half(memory, index)
    if not pde & 1:
        return FAULT, code
    if pde >> 7 & mode >> MODE_PSE & 1:
        if pde & reserved:
            return FAULT, code | 9
        # The entry as one of 8 bytes would be, for the same end as theirs.
        wide = pde & 0xFFC00FFF | (pde >> 13 & 0xFF) << 32
        return finish(mode, 0, 0, address, code, access, wide, pde & 6 | 8, 0, 2, 22)
    index = (pde & FRAME_32) >> 2 | address >> 12 & 0x3FF
    if index >> 1 >= entries:
        return OUTSIDE, index << 2
    path[1] = index
    pte = half(memory, index)
    if not pte & 1:
        return FAULT, code
    rights = pde & pte & 6 | (pde & 2) << 2
    return finish(mode, 0, 0, address, code, access, pte, rights, 0, 1, 12)


def half(memory: Words, index: Word) -> Word:
    """The 4-byte entry with this index."""
    return memory[index >> 1] >> ((index & 1) << 5) & 0xFFFFFFFF


def walk_pae(
    memory: Words,
    entries: Word,
    mode: Word,
    reserved: Word,
    cr3: Word,
    pdptes: Words,
    address: Word,
    access: Word,
    code: Word,
    path: Store,
) -> tuple[Word, Word]:
    """`walk` in PAE paging."""
    if mode >> MODE_PDPTES & 1:
        pdpte = pdptes[address >> 30]
    else:
        index = (cr3 & PDPT) >> 3 | address >> 30
        if index >= entries:
            return OUTSIDE, index << 3
        pdpte = memory[index]
    if not pdpte & 1:
        return FAULT, code
    if pdpte & (reserved | 0x80000000000001E6):
        return FAULT, code | 9
    index = (pdpte & FRAME) >> 3 | address >> 21 & 0x1FF
    if index >= entries:
        return OUTSIDE, index << 3
    path[2] = index
    pde = memory[index]
    if not pde & 1:
        return FAULT, code
    if pde & 0x80:
        if pde & (reserved | 0x1FE000):
            return FAULT, code | 9
        rights = pde & 6 | 8
        return finish(mode, 0, 0, address, code, access, pde, rights, pde >> 63, 2, 21)
    if pde & reserved:
        return FAULT, code | 9
    index = (pde & FRAME) >> 3 | address >> 12 & 0x1FF
    if index >= entries:
        return OUTSIDE, index << 3
    path[1] = index
    pte = memory[index]
    if not pte & 1:
        return FAULT, code
    if pte & reserved:
        return FAULT, code | 9
    rights = pde & pte & 6 | (pde & 2) << 2
    no_execute = (pde | pte) >> 63
    return finish(mode, 0, 0, address, code, access, pte, rights, no_execute, 1, 12)


def mark(memory: Store, mode: Word, level: Word, write: Word, path: Words) -> None:
    """Set the accessed flags, and for a write the dirty flag, of a walk that ended at `level`."""
    at = 2
    while at >= level:
        bits = 0x20
        if at == level:
            bits = 0x20 | write << 6
        index = path[at]
        if not mode >> MODE_PAE & 1:
            bits = bits << ((index & 1) << 5)
            index = index >> 1
        memory[index] = memory[index] | bits
        at = at - 1


def walk_and_mark(
    memory: Words,
    marks: Store,
    entries: Word,
    mode: Word,
    reserved: Word,
    cr3: Word,
    pdptes: Words,
    address: Word,
    access: Word,
    path: Store,
) -> tuple[Word, Word]:
    """`walk`, and if it translates by a page set the accessed and dirty flags in `marks`: the
    memory.
    """
    status, value = walk(memory, entries, mode, reserved, cr3, pdptes, address, access, path)
    if 1 <= status < FAULT:
        mark(marks, mode, status, access >> 1 & 1, path)
    return status, value


def load_pdptes(memory: Words, entries: Word, reserved: Word, cr3: Word, pdptes: Store) -> Word:
    """Load the four PDPTE registers from where CR3 says: LOADED, or GENERAL_PROTECTION or OUTSIDE
    and no register is changed.
    """
    first = (cr3 & PDPT) >> 3
    if first | 3 >= entries:
        return OUTSIDE
    wrong = 0
    for i in range(4):
        pdpte = memory[first | i]
        wrong = wrong | (pdpte & 1) * pdpte & (reserved | 0x80000000000001E6)
    if wrong:
        return GENERAL_PROTECTION
    for i in range(4):
        pdptes[i] = memory[first | i]
    return LOADED
