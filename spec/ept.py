"""The second stage, Intel's: extended page tables (EPT) with 4 and 5 levels.

Read beside the Intel SDM Vol. 3C, "VMX Support for Address Translation": 31.3.2 (the walk), 31.3.3
(misconfigurations, violations, and which of them wins), 31.3.5 (accessed and dirty flags), 31.3.7
(memory types); and table 30-7 (the exit qualification). These are the numbers of the editions of
2025; in those of 2022 to 2024 the chapter is 29 and the table 28-7.
"""

from collections.abc import Iterator
from typing import NamedTuple

from vapama.spec.access import GuestPhysicalAccess
from vapama.spec.memory import PAGE_BYTES, Memory
from vapama.spec.outcomes import (
    EptMisconfiguration,
    EptViolation,
    Outcome,
    OutsideMemory,
    Translated,
    Update,
)
from vapama.spec.paging import FRAME, Mapping, Step, address_width, entry_address
from vapama.spec.stage import Ept
from vapama.spec.words import Condition, Flag, Word, bit, low_bits

# Bits of an EPT paging-structure entry (SDM Vol. 3C, tables 31-1 to 31-7).
READ, WRITE, EXECUTE = 1 << 0, 1 << 1, 1 << 2
MEMORY_TYPE, IGNORE_PAT, PAGE_SIZE = 7 << 3, 1 << 6, 1 << 7
ACCESSED, DIRTY, USER_EXECUTE = 1 << 8, 1 << 9, 1 << 10
RIGHTS = READ | WRITE | EXECUTE | USER_EXECUTE

# Bits of the exit qualification (SDM Vol. 3C, table 30-7).
DATA_READ, DATA_WRITE, FETCH = 1 << 0, 1 << 1, 1 << 2
READABLE, WRITABLE, EXECUTABLE, USER_EXECUTABLE = 1 << 3, 1 << 4, 1 << 5, 1 << 6
LINEAR_VALID, TRANSLATION = 1 << 7, 1 << 8
USER_LINEAR, WRITABLE_PAGE, NO_EXECUTE_PAGE = 1 << 9, 1 << 10, 1 << 11
NMI_UNBLOCKING, SHADOW_STACK_ACCESS, SHADOW_STACK_PAGE = 1 << 12, 1 << 13, 1 << 14


class Level(NamedTuple):
    """A level of EPT paging structures: EPT PTEs are at 1, EPT PDEs at 2, and so on up.

    A page mapped here leaves the low `shift` bits of an address alone; the 9 from there up select
    the entry. An entry maps a page if the bit `large` is 1 in it, and at level 1 always. The bits
    `in_table` must be 0 in an entry that references a table, `in_page` in one that maps a page.
    """

    number: int
    shift: int
    large: Word = 0
    in_table: Word = 0
    in_page: Word = 0


TYPE = MEMORY_TYPE | IGNORE_PAT
LEVELS = (
    Level(5, 48, in_table=PAGE_SIZE | TYPE),
    Level(4, 39, in_table=PAGE_SIZE | TYPE),
    Level(3, 30, PAGE_SIZE, in_table=TYPE, in_page=low_bits(30) & FRAME),
    Level(2, 21, PAGE_SIZE, in_table=TYPE, in_page=low_bits(21) & FRAME),
    Level(1, 12),
)
"""Source: SDM Vol. 3C, tables 31-1 to 31-7."""


def translate(ept: Ept, memory: Memory, access: GuestPhysicalAccess) -> Outcome:
    """The outcome of `access` by a fresh walk of the EPT structures. Source: 31.3.2, 31.3.3.3."""
    # WIDTH
    gpa, levels = access.address, ept.levels
    if gpa >> address_width(levels) != 0:
        return violation(ept, access)

    # WALK
    table, rights = ept.eptp & FRAME, RIGHTS
    present, reserved, unreadable = present_bits(ept), reserved_anywhere(ept), needs_read(ept)
    used: tuple[Word, ...] = ()
    for level in LEVELS[-levels:]:
        number, shift, large, in_table, _ = level
        address = table | (gpa >> shift & 0x1FF) << 3
        if address >= memory.limit:
            return OutsideMemory(address, flags(ept, used))
        entry = memory.load(address)
        if entry & present == 0:
            return violation(ept, access, used)
        page = number == 1 or entry & large != 0
        must_be_zero = reserved | (reserved_in_page(ept, level) if page else in_table)
        if is_unsupported(entry, page, must_be_zero, unreadable):
            return EptMisconfiguration(gpa, flags(ept, used))
        rights = rights & entry
        used = (*used, address)
        if page:
            break
        table = entry & FRAME

    # RIGHTS
    if is_denied(ept, access, rights):
        return violation(ept, access, used, rights)

    # TRANSLATION
    offset = low_bits(shift)
    frame = entry & FRAME & ~offset
    return Translated(frame | gpa & offset, number, flags(ept, used, writes(ept, access)))


def violation(
    ept: Ept, access: GuestPhysicalAccess, used: tuple[Word, ...] = (), rights: Word = 0
) -> EptViolation:
    """The violation of an access that used the entries at these addresses; `rights` are the AND of
    them, 0 if one was not present.
    """
    qualification = description(ept, access) | described_rights(ept, rights)
    undefined = undefined_bits(ept, access)
    return EptViolation(qualification, access.address, flags(ept, used), undefined)


def flags(ept: Ept, used: tuple[Word, ...], write: Flag = 0) -> tuple[Update, ...]:
    """The flags set in the entries at these addresses, for a write in the last the dirty flag too;
    none unless EPTP bit 6 enables them. Source: 31.3.5.
    """
    if ept.ad == 0 or not used:
        return ()
    *above, last = used
    leaf = Update(last, ACCESSED | write * DIRTY)
    return (*[Update(address, ACCESSED) for address in above], leaf)


def present_bits(ept: Ept) -> Word:
    """The bits of which one must be 1 in a present entry. Source: 31.3.2.

    Bits 2:0, and with mode-based execute control bit 10.
    """
    return READ | WRITE | EXECUTE | ept.mbec * USER_EXECUTE


def needs_read(ept: Ept) -> Word:
    """The rights that no entry gives without that to read. Source: 31.3.3.1.

    W; and where execute-only entries do not exist X, and with mode-based execute control bit 10.
    """
    return WRITE | (ept.execute_only ^ 1) * (EXECUTE | ept.mbec * USER_EXECUTE)


def maps_a_page(entry: Word, level: int) -> Condition:
    """Whether a present entry maps a page rather than referencing another structure.

    A PTE always does, a PDE and a PDPTE if bit 7 is 1; a PML4E and a PML5E never do.
    """
    return level == 1 or entry & LEVELS[-level].large != 0


def is_misconfigured(ept: Ept, entry: Word, level: int) -> Condition:
    """Whether a present entry has an unsupported value. Source: 31.3.3.1."""
    page = maps_a_page(entry, level)
    return is_unsupported(entry, page, reserved_at(ept, entry, level), needs_read(ept))


def is_unsupported(entry: Word, page: Condition, must_be_zero: Word, unreadable: Word) -> Condition:
    """The same by the bits that must be 0 in it, and those that must be if it forbids reads; what
    maps a page needs a memory type that there is.
    """
    wrong = entry & must_be_zero != 0
    wrong = wrong | (entry & READ == 0) & (entry & unreadable != 0)
    return wrong | is_reserved_type(entry >> 3 & 7) if page else wrong


def reserved_at(ept: Ept, entry: Word, level: int) -> Word:
    """The bits that must be 0 in a present entry of this level. Source: tables 31-1 to 31-7."""
    this = LEVELS[-level]
    if maps_a_page(entry, level):
        return reserved_anywhere(ept) | reserved_in_page(ept, this)
    return reserved_anywhere(ept) | this.in_table


def reserved_anywhere(ept: Ept) -> Word:
    """The bits that must be 0 in a present entry of any level: 51:MAXPHYADDR."""
    return (1 << 52) - (1 << ept.maxphyaddr)


def reserved_in_page(ept: Ept, level: Level) -> Word:
    """The further bits that must be 0 in an entry of this level if it maps a page: those below the
    frame of a large page, and bit 7 where there is no page of this size.
    """
    if level.number == 3:
        return level.in_page | (ept.page1gb ^ 1) * PAGE_SIZE
    if level.number == 2:
        return level.in_page | (ept.page2mb ^ 1) * PAGE_SIZE
    return level.in_page


def is_reserved_type(memory_type: Word) -> Condition:
    """Whether bits 5:3 of an entry that maps a page name no memory type. Source: 31.3.3.1."""
    return (memory_type == 2) | (memory_type == 3) | (memory_type == 7)


def is_table_write(ept: Ept, access: GuestPhysicalAccess) -> Flag:
    """1 for an access to a guest's paging-structure entry that is treated as a write because EPT
    has accessed and dirty flags. Loads of PDPTEs by MOV to CR are not. Source: 31.3.3.2, 31.3.5.
    """
    return ept.ad & access.table & access.linear


def writes(ept: Ept, access: GuestPhysicalAccess) -> Flag:
    """1 for an access that EPT takes for a data write."""
    return access.write | is_table_write(ept, access)


def is_denied(ept: Ept, access: GuestPhysicalAccess, rights: Word) -> Condition:
    """Whether the rights forbid the access. Source: 31.3.3.2.

    `rights` are the AND of all entries used. A read needs R, a write W; a fetch needs X, but with
    mode-based execute control bit 10 if its linear address is a user-mode one.
    """
    write = writes(ept, access)
    read = (write | access.fetch) ^ 1
    user_fetch = access.fetch & ept.mbec & access.user
    fetch = access.fetch ^ user_fetch
    needed = read * READ | write * WRITE | fetch * EXECUTE | user_fetch * USER_EXECUTE
    return needed & ~rights != 0


def description(ept: Ept, access: GuestPhysicalAccess) -> Word:
    """What the exit qualification of an EPT violation says of the access. Source: table 30-7.

    Bits 2:0: read, write, fetch (both read and write for a table access that is treated as a
    write). Bit 7: there is a linear address; bit 8: the access is to its translation, not to a
    table. Bits 11:9, with advanced information: what the guest's paging says. Bit 13: shadow stack.
    """
    as_write = is_table_write(ept, access)
    final = access.linear & (access.table ^ 1)
    read = (access.write | access.fetch) ^ 1
    told = final & ept.advanced
    return (
        (read | as_write) * DATA_READ
        | (access.write | as_write) * DATA_WRITE
        | access.fetch * FETCH
        | access.linear * LINEAR_VALID
        | final * TRANSLATION
        | told * (access.user * USER_LINEAR)
        | told * (access.writable * WRITABLE_PAGE)
        | told * (access.no_execute * NO_EXECUTE_PAGE)
        | access.shadow_stack * SHADOW_STACK_ACCESS
    )


def described_rights(ept: Ept, rights: Word) -> Word:
    """Bits 6:3 of the exit qualification: the AND of R, W, X (and bit 10 with mode-based execute
    control) over the entries used; 0 if one was not present. Source: table 30-7.
    """
    return (
        bit(rights, 0) * READABLE
        | bit(rights, 1) * WRITABLE
        | bit(rights, 2) * EXECUTABLE
        | (bit(rights, 10) & ept.mbec) * USER_EXECUTABLE
    )


def undefined_bits(ept: Ept, access: GuestPhysicalAccess) -> Word:
    """The bits of the exit qualification that are not decided by what is modelled here.

    Bit 0 of the update of a guest's accessed and dirty flags, a read-modify-write (30.2.1), unless
    accesses to tables count as writes and report both. Bit 6 without mode-based execute control,
    bits 11:9 without advanced information, bit 14 without supervisor shadow-stack control (table
    30-7). Bit 12, of an NMI that IRET would unblock.
    """
    told = ept.advanced & access.linear & (access.table ^ 1)
    return (
        (access.table & access.write & (is_table_write(ept, access) ^ 1)) * DATA_READ
        | (ept.mbec ^ 1) * USER_EXECUTABLE
        | (told ^ 1) * (USER_LINEAR | WRITABLE_PAGE | NO_EXECUTE_PAGE)
        | NMI_UNBLOCKING
        | SHADOW_STACK_PAGE
    )


# Memory types (SDM Vol. 3A, 13.11.2.1 and 13.12.2; UC- exists in the PAT alone).
UC, WC, WT, WP, WB, UC_MINUS = 0, 1, 4, 5, 6, 7
COMBINED = {
    UC: {UC: UC, UC_MINUS: UC, WC: WC, WT: UC, WB: UC, WP: UC},
    WC: {UC: UC, UC_MINUS: WC, WC: WC, WT: UC, WB: WC, WP: UC},
    WT: {UC: UC, UC_MINUS: UC, WC: WC, WT: WT, WB: WT, WP: WP},
    WB: {UC: UC, UC_MINUS: UC, WC: WC, WT: WT, WB: WB, WP: WP},
    WP: {UC: UC, UC_MINUS: WC, WC: WC, WT: WT, WB: WP, WP: WP},
}
"""The effective memory type by MTRR type (under EPT: the entry's own) and PAT type. Source: SDM
Vol. 3A, table 13-7, "Effective Page-Level Memory Types"."""


def memory_type(entry: Word, pat: Word, cache_disable: Flag) -> Word:
    """The memory type of an access through a page that `entry` maps. Source: 31.3.7.2.

    UC if the guest's CR0.CD is 1; else bits 5:3 of the entry alone if its bit 6 (ignore PAT) is 1;
    else those in the place of the MTRRs' type, combined with the PAT's (`pat`, WB without paging).
    The MTRRs have no part in it.
    """
    if cache_disable:
        return UC
    ept_type = entry >> 3 & 7
    return ept_type if entry & IGNORE_PAT else COMBINED[ept_type][pat]


def path(ept: Ept, memory: Memory, gpa: Word) -> Iterator[Step]:
    """The entries for a guest-physical address from EPTP down, as far as they are present, within
    memory and name a next structure. It checks no rights and no values: `translate` does.
    """
    table = ept.eptp & FRAME
    for level in range(ept.levels, 0, -1):
        where = entry_address(table, gpa, level)
        if where >= memory.limit:
            return
        entry = memory.load(where)
        yield Step(level, where, entry)
        if entry & present_bits(ept) == 0 or maps_a_page(entry, level):
            return
        table = entry & FRAME


def mappings(ept: Ept, memory: Memory) -> Iterator[Mapping]:
    """Every page mapped by present entries from EPTP down, in the order of guest-physical
    addresses. Like `path` it checks neither rights nor values; tables outside memory map nothing.
    """
    return _mappings(ept, memory, ept.eptp & FRAME, ept.levels, 0)


def _mappings(ept: Ept, memory: Memory, table: Word, level: int, base: Word) -> Iterator[Mapping]:
    if table + PAGE_BYTES > memory.limit:
        return
    for index in range(512):
        entry = memory.load(table | index << 3)
        if entry & present_bits(ept) == 0:
            continue
        gpa = base | index << (12 + 9 * (level - 1))
        if maps_a_page(entry, level):
            yield Mapping(gpa, level, entry)
        else:
            yield from _mappings(ept, memory, entry & FRAME, level - 1, gpa)
