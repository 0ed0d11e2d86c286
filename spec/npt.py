"""The second stage, AMD's: nested page tables in every paging mode of the host.

Read beside the AMD APM Vol. 2: 15.25.4 and 15.25.5 (the nested walk and its rights), 15.25.6
(nested page faults), and 5.2 and 5.3 (the tables, which have the format of the host's own).
"""

from collections.abc import Iterator
from typing import NamedTuple

from vapama.spec.access import GuestPhysicalAccess
from vapama.spec.memory import Memory
from vapama.spec.outcomes import (
    RSVD,
    I,
    NestedPageFault,
    Outcome,
    OutsideMemory,
    P,
    Translated,
    U,
    Update,
    W,
)
from vapama.spec.paging import (
    ACCESSED,
    DIRTY,
    EXECUTE_DISABLE,
    FRAME,
    PAGE_SIZE,
    PRESENT,
    USER,
    WRITABLE,
    Step,
)
from vapama.spec.stage import Npt
from vapama.spec.words import Condition, Word, bit, ite, low_bits

# EXITINFO1 of a nested page fault, besides the bits of a page-fault error code (APM 15.25.6).
SS = 1 << 6
"""A shadow-stack access."""
FINAL, TABLE = 1 << 32, 1 << 33
"""The fault is of the guest's final physical address; of its page tables."""

GLOBAL = 1 << 8


def translate(npt: Npt, memory: Memory, access: GuestPhysicalAccess) -> Outcome:
    """The outcome of `access` by a fresh walk of the nested tables. Source: APM Vol. 2, 15.25.5.

    A guest-physical address is to these tables what a linear address is to the host's own, and
    every access a user's: so CR0.WP, SMEP, SMAP and protection keys do not come into it.
    """
    # WIDTH
    gpa, code = access.address, description(access)
    undecided = undecided_bits(npt, access)
    if gpa >> address_width(npt) != 0:
        return NestedPageFault(code, gpa, open_bits=undecided | P)

    # WALK
    table = root(npt)
    allowed, forbidden = WRITABLE | USER, 0
    used: tuple[Update, ...] = ()
    for level in range(npt.levels, 0, -1):
        address = entry_address(npt, table, gpa, level)
        if address >= memory.limit:
            return OutsideMemory(address, used)
        entry = load(npt, memory, address)
        if entry & PRESENT == 0:
            return NestedPageFault(code, gpa, used, undecided)
        if entry & reserved(npt, entry, level) != 0:
            return NestedPageFault(code | P | RSVD, gpa, used, undecided)
        if has_rights(npt, level):
            allowed, forbidden = allowed & entry, forbidden | entry
        if maps_a_page(npt, entry, level):
            break
        if has_rights(npt, level):
            used = (*used, update(npt, address, ACCESSED))
        table = entry & FRAME

    # RIGHTS
    if is_denied(access, allowed, forbidden):
        used = (*used, update(npt, address, ACCESSED))
        return NestedPageFault(code | P, gpa, used, undecided)

    # TRANSLATION
    offset = page_offset(npt, level)
    leaf = update(npt, address, ACCESSED | (access.write | access.table) * DIRTY)
    return Translated(frame(npt, entry, level) | gpa & offset, level, (*used, leaf))


def address_width(npt: Npt) -> int:
    """How many bits of a guest-physical address the host's mode translates: 32, 48 or 57.

    The APM does not say how a wider address fails. It is a nested page fault here, with P open.
    """
    return {2: 32, 3: 32, 4: 48, 5: 57}[npt.levels]


def root(npt: Npt) -> Word:
    """The physical address of the uppermost table: of 32 bits in legacy modes, where that of PAE is
    32-byte aligned, all others 4-KByte.
    """
    if npt.levels == 3:
        return npt.ncr3 & 0xFFFF_FFE0
    return npt.ncr3 & (0xFFFF_F000 if npt.levels == 2 else FRAME)


def page_offset(npt: Npt, level: int) -> Word:
    """The mask of what an entry of this level leaves of an address: 4 KBytes at 1; 2 MBytes at 2,
    4 MBytes in 32-bit paging; 1 GByte at 3.
    """
    return low_bits(12 + (10 if npt.levels == 2 else 9) * (level - 1))


def entry_address(npt: Npt, table: Word, gpa: Word, level: int) -> Word:
    """Where `table` holds the entry for `gpa`: 512 entries of 8 bytes (4 in a PDPT of PAE), or
    1024 of 4 bytes in 32-bit paging.
    """
    if npt.levels == 2:
        return table | (gpa >> (12 + 10 * (level - 1)) & 0x3FF) << 2
    last_index = 0x1FF if has_rights(npt, level) else 3
    return table | (gpa >> (12 + 9 * (level - 1)) & last_index) << 3


def load(npt: Npt, memory: Memory, address: Word) -> Word:
    """The entry at `address`: 8 bytes, in 32-bit paging 4."""
    if npt.levels == 2:
        return memory.load(address & ~7) >> (address & 4) * 8 & 0xFFFF_FFFF
    return memory.load(address)


def update(npt: Npt, address: Word, bits: Word) -> Update:
    """Flags set in the entry at `address`, as bits of the 8 bytes that hold it."""
    if npt.levels == 2:
        return Update(address & ~7, bits << (address & 4) * 8)
    return Update(address, bits)


def has_rights(npt: Npt, level: int) -> bool:
    """Whether entries of this level have R/W, U/S and an accessed flag: not the PDPTEs of PAE."""
    return not (npt.levels == 3 and level == 3)


def maps_a_page(npt: Npt, entry: Word, level: int) -> Condition:
    """Whether a present, valid entry maps a page rather than referencing another table."""
    if level == 1:
        return True
    if level == 2:
        large = entry & PAGE_SIZE != 0
        return large & (npt.pse == 1) if npt.levels == 2 else large
    if level == 3 and npt.levels > 3:
        return entry & PAGE_SIZE != 0
    return False


def frame(npt: Npt, entry: Word, level: int) -> Word:
    """The physical address of the page that an entry maps.

    A 4-MByte page has bits 39:32 of its address in bits 20:13 of the entry (PSE-36).
    """
    page = entry & FRAME & ~page_offset(npt, level)
    if npt.levels == 2 and level == 2:
        return page | (entry >> 13 & 0xFF) << 32
    return page


def reserved(npt: Npt, entry: Word, level: int) -> Word:
    """The bits that must be 0 in a present entry of this level. Source: APM Vol. 2, 5.2 and 5.3.

    Of 8 bytes: bits 51:MAXPHYADDR and, without NXE, bit 63; bits 8:7 of a PML5E and a PML4E; with
    PAE bits 62:52, and of a PDPTE also 63, 8:5 and 2:1; below the frame of a large page all bits
    down to 13, and PS in a PDPTE where there are no 1-GByte pages. Of 4 bytes see `reserved_pse36`.
    """
    if npt.levels == 2:
        return reserved_pse36(npt) if level == 2 and maps_a_page(npt, entry, level) else 0
    always = (1 << 52) - (1 << npt.maxphyaddr) | (npt.nxe ^ 1) * EXECUTE_DISABLE
    if npt.levels == 3:
        always = always | 0x7FF << 52
        if level == 3:
            return always | EXECUTE_DISABLE | 0x1E6
    if level >= 4:
        return always | PAGE_SIZE | GLOBAL
    if level == 1 or entry & PAGE_SIZE == 0:
        return always
    below_frame = page_offset(npt, level) & ~low_bits(13)
    if level == 2:
        return always | below_frame
    return always | below_frame | (npt.page1gb ^ 1) * PAGE_SIZE


def reserved_pse36(npt: Npt) -> Word:
    """The reserved bits of an entry that maps a 4-MByte page: those from 13 up to 21 that hold no
    bit of a physical address, which has at most 40 bits there.
    """
    width = ite(npt.maxphyaddr > 40, 40, npt.maxphyaddr)
    return (1 << 22) - (1 << (width - 19))


def is_denied(access: GuestPhysicalAccess, allowed: Word, forbidden: Word) -> Condition:
    """Whether the rights forbid the access. Source: APM Vol. 2, 15.25.5 and 15.25.6.

    `allowed` is the AND, `forbidden` the OR of the entries used. Every access is a user's and needs
    U/S; a write, and any access to a guest's table, needs R/W; a fetch must not meet NX.
    """
    write = access.write | access.table
    denied = bit(allowed, 2) ^ 1 | write & (bit(allowed, 1) ^ 1)
    return (denied | access.fetch & bit(forbidden, 63)) != 0


def description(access: GuestPhysicalAccess) -> Word:
    """What EXITINFO1 says of the access. Source: APM Vol. 2, 15.25.6.

    An error code as of a page fault, of a user's access; an access to a guest's table is a write.
    """
    return (
        (access.write | access.table) * W
        | U
        | access.fetch * I
        | access.shadow_stack * SS
        | ite(access.table == 1, TABLE, FINAL)
    )


def undecided_bits(npt: Npt, access: GuestPhysicalAccess) -> Word:
    """The bits of EXITINFO1 that the APM does not decide: bit 4 of a fetch while the host has no
    NXE. A page fault's code would lack it then (8.4.2); 15.25.6 names no condition.
    """
    return (access.fetch & (npt.nxe ^ 1)) * I


def path(npt: Npt, memory: Memory, gpa: Word) -> Iterator[Step]:
    """The entries for a guest-physical address from nCR3 down, as far as they are present, within
    memory and name a next table. It checks no rights and no reserved bits: `translate` does.
    """
    table = root(npt)
    for level in range(npt.levels, 0, -1):
        where = entry_address(npt, table, gpa, level)
        if where >= memory.limit:
            return
        entry = load(npt, memory, where)
        yield Step(level, where, entry)
        if entry & PRESENT == 0 or maps_a_page(npt, entry, level):
            return
        table = entry & FRAME


class Mapping(NamedTuple):
    """A page that nested tables map: guest-physical and physical address, level, and the entry."""

    gpa: Word
    pa: Word
    level: int
    entry: Word


def mappings(npt: Npt, memory: Memory) -> Iterator[Mapping]:
    """Every page mapped by present entries from nCR3 down, in the order of guest-physical
    addresses. Like `path` it checks neither rights nor reserved bits; tables outside memory map
    nothing.
    """
    return _mappings(npt, memory, root(npt), npt.levels, 0)


def _mappings(npt: Npt, memory: Memory, table: Word, level: int, base: Word) -> Iterator[Mapping]:
    step = page_offset(npt, level) + 1
    entries = entries_of(npt, level)
    if table + entries * (4 if npt.levels == 2 else 8) > memory.limit:
        return
    for index in range(entries):
        gpa = base + index * step
        entry = load(npt, memory, entry_address(npt, table, gpa, level))
        if entry & PRESENT == 0:
            continue
        if maps_a_page(npt, entry, level):
            yield Mapping(gpa, frame(npt, entry, level), level, entry)
        else:
            yield from _mappings(npt, memory, entry & FRAME, level - 1, gpa)


def entries_of(npt: Npt, level: int) -> int:
    """How many entries a table of this level has: 4 in a PDPT of PAE, 1024 in 32-bit paging."""
    if npt.levels == 2:
        return 1024
    return 512 if has_rights(npt, level) else 4
