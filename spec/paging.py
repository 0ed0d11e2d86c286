"""The guest's own paging: 4-level and 5-level, as the manual tells it.

Read beside the Intel SDM Vol. 3A: 4.5 (the walk), 4.6 (access rights), 4.7 (page-fault error
codes), 4.8 (accessed and dirty flags). AMD's APM Vol. 2, 5.3 to 5.6, says the same unless noted.
"""

from collections.abc import Iterator
from typing import NamedTuple

from vapama.spec.access import Access
from vapama.spec.cpu import Cpu
from vapama.spec.memory import PAGE_BYTES, Memory
from vapama.spec.outcomes import (
    PK,
    RSVD,
    I,
    NonCanonical,
    Outcome,
    OutsideMemory,
    P,
    PageFault,
    Translated,
    U,
    Update,
    W,
)
from vapama.spec.words import Condition, Flag, Word, bit, is_canonical, ite, low_bits

# Bits of a paging-structure entry (SDM Vol. 3A, tables 4-14 to 4-20).
PRESENT, WRITABLE, USER = 1 << 0, 1 << 1, 1 << 2
WRITE_THROUGH, CACHE_DISABLE = 1 << 3, 1 << 4
ACCESSED, DIRTY, PAGE_SIZE, GLOBAL = 1 << 5, 1 << 6, 1 << 7, 1 << 8
EXECUTE_DISABLE = 1 << 63
FRAME = 0x000F_FFFF_FFFF_F000
"""Bits 51:12, the physical address of a page or of the next paging structure."""


def translate(cpu: Cpu, memory: Memory, access: Access) -> Outcome:
    """The outcome of `access` by a fresh walk of the paging structures, no cached translations."""
    # CANONICAL
    levels = cpu.levels
    if not is_canonical(access.address, address_width(levels)):
        return NonCanonical()

    # WALK
    code, reserved = access_code(cpu, access), reserved_anywhere(cpu)
    table = cpu.cr3 & FRAME
    allowed, forbidden = WRITABLE | USER, 0
    used: tuple[Update, ...] = ()
    for level in range(levels, 0, -1):
        address = entry_address(table, access.address, level)
        if address >= memory.limit:
            return OutsideMemory(address, used)
        entry = memory.load(address)
        if entry & PRESENT == 0:
            return PageFault(code, used)
        if entry & (reserved | reserved_at(cpu, entry, level)) != 0:
            return PageFault(code | P | RSVD, used)
        allowed, forbidden = allowed & entry, forbidden | entry
        if maps_a_page(entry, level):
            break
        used = (*used, Update(address, ACCESSED))
        table = entry & FRAME

    # RIGHTS
    by_rights = denied_by_rights(cpu, access, bit(allowed, 2), bit(allowed, 1), bit(forbidden, 63))
    by_key = denied_by_key(cpu, access, bit(allowed, 2), entry)
    if by_rights | by_key:
        undecided = PK * (by_key & access.user & (bit(allowed, 2) ^ 1))
        used = (*used, Update(address, ACCESSED))
        return PageFault(code | P | by_key * PK, used, open_bits=undecided)

    # TRANSLATION
    offset = page_offset(level)
    page = entry & FRAME & ~offset
    leaf = Update(address, ACCESSED | access.write * DIRTY)
    return Translated(page | access.address & offset, level, (*used, leaf))


def address_width(levels: int) -> int:
    """How many bits of a linear address are translated: 48 with 4 levels, 57 with 5."""
    return 12 + 9 * levels


def page_offset(level: int) -> Word:
    """The mask of the page offset at a level: 4 KBytes at 1, 2 MBytes at 2, 1 GByte at 3."""
    return low_bits(12 + 9 * (level - 1))


def entry_address(table: Word, address: Word, level: int) -> Word:
    """Where `table` holds the entry that a walk for linear `address` uses at `level`."""
    index = (address >> (12 + 9 * (level - 1))) & 0x1FF
    return table | index << 3


def maps_a_page(entry: Word, level: int) -> Condition:
    """Whether a present, valid entry maps a page rather than referencing another structure.

    A PTE always does, a PDE and a PDPTE if PS is 1; a PML4E and a PML5E never do.
    """
    if level == 1:
        return True
    if level <= 3:
        return entry & PAGE_SIZE != 0
    return False


def reserved_anywhere(cpu: Cpu) -> Word:
    """The bits that must be 0 in a present entry of any level. Source: SDM Vol. 3A, 4.5 and 4.7.

    Bits 51:MAXPHYADDR always, and bit 63 (XD) without EFER.NXE.
    """
    return (1 << 52) - (1 << cpu.maxphyaddr) | (cpu.nxe ^ 1) << 63


def reserved_at(cpu: Cpu, entry: Word, level: int) -> Word:
    """The further bits that must be 0 in a present entry of this level. Source: as above.

    PS in a PML4E and a PML5E, and in a PDPTE where there are no 1-GByte pages; below the frame of a
    large page all bits down to 13 (bit 12 is PAT).
    """
    if level >= 4:
        return PAGE_SIZE
    if level == 1 or entry & PAGE_SIZE == 0:
        return 0
    below_frame = page_offset(level) & ~low_bits(13)
    return below_frame if level == 2 else below_frame | ite(cpu.page1gb == 1, 0, PAGE_SIZE)


def denied_by_rights(
    cpu: Cpu, access: Access, user_page: Flag, writable: Flag, no_execute: Flag
) -> Flag:
    """1 if the access rights forbid the access. Source: SDM Vol. 3A, 4.6.1.

    `user_page` and `writable` are the AND of U/S and R/W over the walk, `no_execute` the OR of XD.
    """
    user, supervisor = access.user, access.user ^ 1
    data = access.fetch ^ 1
    exempt = cpu.ac & (access.implicit ^ 1)
    denied = user & (user_page ^ 1)
    denied = denied | access.write & (writable ^ 1) & (user | cpu.wp)
    denied = denied | access.fetch & no_execute
    denied = denied | supervisor & user_page & access.fetch & cpu.smep
    return denied | supervisor & user_page & data & cpu.smap & (exempt ^ 1)


def denied_by_key(cpu: Cpu, access: Access, user_page: Flag, entry: Word) -> Flag:
    """1 if the page's protection key forbids the access. Source: SDM Vol. 3A, 4.6.2.

    The key is bits 62:59 of the entry that maps the page. Bit 2*key of the register is AD (no data
    access), bit 2*key+1 is WD (no data write by a user, nor by the supervisor if CR0.WP is 1).
    """
    register = ite(
        user_page == 1,
        ite(cpu.pke == 1, cpu.pkru, 0),
        ite(cpu.pks == 1, cpu.pkrs, 0),
    )
    key = (entry >> 59) & 0xF
    access_disable = bit(register, 2 * key)
    write_disable = bit(register, 2 * key + 1)
    data = access.fetch ^ 1
    return data & (access_disable | write_disable & access.write & (access.user | cpu.wp))


def access_code(cpu: Cpu, access: Access) -> Word:
    """The error-code bits that describe the access: W, U and I. Source: SDM Vol. 3A, 4.7.

    I is reported only with EFER.NXE or CR4.SMEP.
    """
    fetch = access.fetch & (cpu.nxe | cpu.smep)
    return access.write * W | access.user * U | fetch * I


class Step(NamedTuple):
    """An entry on the path of a walk: its level, physical address and value."""

    level: int
    address: Word
    entry: Word


def path(cpu: Cpu, memory: Memory, address: Word) -> Iterator[Step]:
    """The entries for a linear address from CR3 down, as far as they are present, within memory
    and name a next structure. It checks no rights and no reserved bits: `translate` does.
    """
    table = cpu.cr3 & FRAME
    for level in range(cpu.levels, 0, -1):
        where = entry_address(table, address, level)
        if where >= memory.limit:
            return
        entry = memory.load(where)
        yield Step(level, where, entry)
        if entry & PRESENT == 0 or maps_a_page(entry, level):
            return
        table = entry & FRAME


class Mapping(NamedTuple):
    """A page that the paging structures map: linear address, level, and the mapping entry."""

    address: Word
    level: int
    entry: Word

    @property
    def pa(self) -> Word:
        """The physical address of the page's first byte."""
        return self.entry & FRAME & ~page_offset(self.level)


def mappings(cpu: Cpu, memory: Memory) -> Iterator[Mapping]:
    """Every page mapped by present entries from CR3 down, in the order of linear addresses.

    Like `path` it checks neither rights nor reserved bits; tables outside memory map nothing.
    Tables that reference themselves make this long: up to 512**levels pages.
    """
    return _mappings(cpu, memory, cpu.cr3 & FRAME, cpu.levels, 0)


def _mappings(cpu: Cpu, memory: Memory, table: Word, level: int, base: Word) -> Iterator[Mapping]:
    if table + PAGE_BYTES > memory.limit:
        return
    for index in range(512):
        entry = memory.load(table | index << 3)
        if entry & PRESENT == 0:
            continue
        address = sign_extended(base | index << (12 + 9 * (level - 1)), address_width(cpu.levels))
        if maps_a_page(entry, level):
            yield Mapping(address, level, entry)
        else:
            yield from _mappings(cpu, memory, entry & FRAME, level - 1, address)


def sign_extended(address: Word, width: int) -> Word:
    """The canonical linear address with these low `width` bits."""
    upper = low_bits(64) & ~low_bits(width)
    return address | ite(bit(address, width - 1) == 1, upper, 0)
