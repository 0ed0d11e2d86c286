"""The guest's own paging, in every mode, as the manual tells it.

Read beside the Intel SDM Vol. 3A: 4.3 (32-bit paging), 4.4 (PAE paging), 4.5 (4-level and 5-level
paging), 4.6 (access rights), 4.7 (page-fault error codes), 4.8 (accessed and dirty flags). AMD's
APM Vol. 2, 5.2 to 5.6, says the same unless noted. What differs from mode to mode is in the tables
of `spec.modes`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vapama.spec import modes
from vapama.spec.access import Access
from vapama.spec.cpu import LA57, LAM_SUP, LAM_U48, LAM_U57, Cpu, reserved_in_pdptes
from vapama.spec.memory import PAGE_BYTES, Memory
from vapama.spec.modes import (
    ACCESSED,
    CACHE_DISABLE,
    DIRTY,
    EXECUTE_DISABLE,
    FIVE_LEVEL,
    FRAME,
    FRAME_32,
    GLOBAL,
    PAGE_SIZE,
    PRESENT,
    USER,
    WRITABLE,
    WRITE_THROUGH,
    Level,
    Mode,
)
from vapama.spec.outcomes import (
    PK,
    RSVD,
    SS,
    GeneralProtection,
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
from vapama.spec.words import Condition, Flag, Word, bit, flag, is_canonical, ite, low_bits

# The bits of an entry are found here too.
__all__ = [
    "ACCESSED",
    "CACHE_DISABLE",
    "DIRTY",
    "EXECUTE_DISABLE",
    "FRAME",
    "GLOBAL",
    "PAGE_SIZE",
    "PRESENT",
    "USER",
    "WRITABLE",
    "WRITE_THROUGH",
]

METADATA_57, METADATA_48 = low_bits(63) & ~low_bits(57), low_bits(63) & ~low_bits(48)
"""The bits of a linear address that are masked by LAM57, and by LAM48."""


def translate(cpu: Cpu, memory: Memory, access: Access) -> Outcome:
    """The outcome of `access` by a fresh walk of the paging structures, no cached translations."""
    # LINEAR ADDRESS
    mode = cpu.mode
    address = linear_address(cpu, mode, access)
    if mode.width > 32 and not is_canonical(address, mode.width):
        return NonCanonical()
    if mode is modes.OFF:
        return Translated(address, 0, ())

    # ROOT
    code, reserved = access_code(cpu, access), reserved_anywhere(cpu)
    table = cpu.cr3 & mode.root
    if mode is modes.PAE:
        pdpte = pdpte_for(cpu, memory, address)
        if isinstance(pdpte, OutsideMemory):
            return pdpte
        if pdpte & PRESENT == 0:
            return PageFault(code)
        if pdpte & reserved_in_pdptes(cpu.maxphyaddr) != 0:
            return PageFault(code | P | RSVD)
        table = pdpte & FRAME

    # WALK
    load, scale = by_entries(mode, memory).load, mode.scale
    update = update_half if scale == 2 else Update
    allowed, forbidden = WRITABLE | USER, 0
    used: tuple[Update, ...] = ()
    for level in mode.levels:
        number, shift, mask, large, must_be_zero, _ = level
        where = table | (address >> shift & mask) << scale
        if where >= memory.limit:
            return OutsideMemory(where, used)
        entry = load(where)
        if entry & PRESENT == 0:
            return PageFault(code, used)
        must_be_zero = must_be_zero | reserved
        if entry & large != 0:
            must_be_zero = must_be_zero | reserved_in_large_page(cpu, level)
        if entry & must_be_zero != 0:
            return PageFault(code | P | RSVD, used)
        forbidden = forbidden | entry
        if number == 1 or entry & large != 0:
            break
        allowed = allowed & entry
        used = (*used, update(where, ACCESSED))
        table = entry & FRAME

    # RIGHTS
    user_page, writable = bit(allowed & entry, 2), bit(allowed & entry, 1)
    if code & SS:
        by_rights = denied_to_shadow_stack(access, user_page, allowed, entry)
    else:
        by_rights = denied_by_rights(cpu, access, user_page, writable, bit(forbidden, 63))
    by_key = denied_by_key(cpu, access, user_page, entry)
    if by_rights | by_key:
        undecided = PK * (by_key & access.user & (user_page ^ 1))
        used = (*used, update(where, ACCESSED))
        return PageFault(code | P | by_key * PK, used, open_bits=undecided)

    # TRANSLATION
    page, offset = frame(mode, entry, level), address & low_bits(level.shift)
    leaf = update(where, ACCESSED | access.write * DIRTY)
    return Translated(page | offset, level.number, (*used, leaf))


def linear_address(cpu: Cpu, mode: Mode, access: Access) -> Word:
    """The address that paging translates: 32 bits of it outside long mode, masked if it is to be.

    Source: SDM Vol. 3A, 3.3 and 4.1.1; Vol. 1, 3.3.7.1 (linear-address masking).
    """
    if mode.width == 32:
        return access.address & low_bits(32)
    return without_metadata(cpu, access)


def without_metadata(cpu: Cpu, access: Access) -> Word:
    """The address without metadata: with LAM57 bits 62:57 are as bit 56 is, with LAM48 bits 62:48
    as bit 47 is. Bit 63 stays, and the result has to be canonical still.

    Bit 63 tells a user's address (0), for which CR3 says which it is, if any, from a supervisor's
    (1), where CR4.LAM_SUP does so and it is LAM57 with 5-level paging. Fetches are never masked.
    Source: SDM Vol. 1, 3.3.7.1; Vol. 3A, 4.1.4 and 4.5 (CR3).
    """
    address = access.address
    if cpu.cr4 & LAM_SUP | cpu.cr3 & (LAM_U57 | LAM_U48) == 0:
        return address
    supervisor = bit(address, 63)
    la57, sup = flag(cpu.cr4 & LA57 != 0), flag(cpu.cr4 & LAM_SUP != 0)
    u57, u48 = flag(cpu.cr3 & LAM_U57 != 0), flag(cpu.cr3 & LAM_U48 != 0)
    data = access.fetch ^ 1
    by_57 = address & ~METADATA_57 | bit(address, 56) * METADATA_57
    by_48 = address & ~METADATA_48 | bit(address, 47) * METADATA_48
    lam57 = data & ite(supervisor == 1, sup & la57, u57)
    lam48 = data & ite(supervisor == 1, sup & (la57 ^ 1), u48)
    return ite(lam57 == 1, by_57, ite(lam48 == 1, by_48, address))


def pdpte_for(cpu: Cpu, memory: Memory, address: Word) -> Word | OutsideMemory:
    """The PDPTE of PAE paging for a 32-bit linear address: bits 31:30 select one of the registers,
    or of those in memory if there are no registers. Source: SDM Vol. 3A, 4.4.1 and 4.4.2.
    """
    index = address >> 30 & 0b11
    if cpu.pdptes is not None:
        a, b, c, d = cpu.pdptes
        return ite(index < 2, ite(index == 0, a, b), ite(index == 2, c, d))
    where = cpu.cr3 & modes.PDPT | index << 3
    return memory.load(where) if where < memory.limit else OutsideMemory(where)


def load_pdptes(
    cpu: Cpu, memory: Memory
) -> tuple[Word, Word, Word, Word] | GeneralProtection | OutsideMemory:
    """What MOV to CR3 puts into the four PDPTE registers in PAE paging; `cpu` has CR3 already.

    A present PDPTE with a reserved bit set makes it #GP(0), and loads none of the four. MOV to CR0
    and CR4 load them too, when they turn PAE paging on or change how it works. Source: SDM Vol. 3A,
    4.4.1.
    """
    # LOAD
    table = cpu.cr3 & modes.PDPT
    if table | 3 << 3 >= memory.limit:
        return OutsideMemory(table)
    pdptes = tuple(memory.load(table | index << 3) for index in range(4))

    # CHECK
    refused = 0
    for pdpte in pdptes:
        refused = refused | pdpte * bit(pdpte, 0) & reserved_in_pdptes(cpu.maxphyaddr)
    if refused != 0:
        return GeneralProtection()
    a, b, c, d = pdptes
    return a, b, c, d


class Halves:
    """Memory as 4-byte entries: each is half of the 8 bytes that memory loads."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.limit = memory.limit

    def load(self, where: Word) -> Word:
        """The 4 bytes at `where`, which is 4-byte aligned."""
        both = self.memory.load(where & ~low_bits(3))
        return ite(bit(where, 2) == 1, both >> 32, both & low_bits(32))


def update_half(where: Word, bits: Word) -> Update:
    """The update that sets bits of the 4-byte entry at `where`: of the 8 bytes that hold it."""
    return Update(where & ~low_bits(3), bits << 32 * bit(where, 2))


def accessed_flag(mode: Mode, level: Level, address: Word) -> Word:
    """The accessed flag of the entry for an address, as a bit of the 8 bytes that hold it."""
    if mode.scale == 2:
        return ACCESSED << 32 * bit(address, level.shift)
    return ACCESSED


def by_entries(mode: Mode, memory: Memory) -> Memory:
    """Memory that loads the entries of a mode."""
    return Halves(memory) if mode.scale == 2 else memory


def frame(mode: Mode, entry: Word, level: Level) -> Word:
    """The physical address of the page that `entry` maps at this level.

    A 4-MByte page has bits 39:32 of its address in bits 20:13 (SDM Vol. 3A, table 4-4).
    """
    if mode.scale == 2 and level.number == 2:
        return entry & FRAME_32 & ~low_bits(22) | (entry >> 13 & low_bits(8)) << 32
    return entry & FRAME & ~low_bits(level.shift)


def reserved_in_large_page(cpu: Cpu, level: Level) -> Word:
    """The bits that must be 0 in a present entry of this level if it maps a page by PS.

    Below the frame all bits down to 13 (bit 12 is PAT), but for those of a 4-MByte page that PSE-36
    has in use: it can address min(40, MAXPHYADDR) bits. PS itself in a PDPTE where there are no
    1-GByte pages. Source: SDM Vol. 3A, 4.3, 4.4.2 and 4.5.4.
    """
    if level is modes.PDE_32:
        width = ite(cpu.maxphyaddr < 40, cpu.maxphyaddr, 40)
        return low_bits(22) & ~low_bits(ite(cpu.pse36 == 1, width - 19, 13))
    if level.number == 3:
        return level.reserved_large | ite(cpu.page1gb == 1, 0, PAGE_SIZE)
    return level.reserved_large


def reserved_anywhere(cpu: Cpu) -> Word:
    """The bits that must be 0 in a present entry of any level. Source: SDM Vol. 3A, 4.5 and 4.7.

    Bits 51:MAXPHYADDR always, and bit 63 (XD) without EFER.NXE. Entries of 4 bytes have neither.
    """
    return (1 << 52) - (1 << cpu.maxphyaddr) | (cpu.nxe ^ 1) << 63


def denied_by_rights(
    cpu: Cpu, access: Access, user_page: Flag, writable: Flag, no_execute: Flag
) -> Flag:
    """1 if the access rights forbid the access, none to a shadow stack. Source: SDM Vol. 3A, 4.6.1.

    `user_page` and `writable` are the AND of U/S and R/W over the walk, `no_execute` the OR of XD.
    """
    _, write, fetch, user, implicit, _ = access
    supervisor, data = user ^ 1, fetch ^ 1
    exempt = cpu.ac & (implicit ^ 1)
    denied = user & (user_page ^ 1)
    denied = denied | write & (writable ^ 1) & (user | cpu.wp)
    denied = denied | fetch & no_execute
    denied = denied | supervisor & user_page & fetch & cpu.smep
    return denied | supervisor & user_page & data & cpu.smap & (exempt ^ 1)


def denied_to_shadow_stack(access: Access, user_page: Flag, above: Word, leaf: Word) -> Flag:
    """1 if the access rights forbid an access to a shadow stack. Source: SDM Vol. 3A, 4.6.1.

    It goes to a shadow-stack page alone, a user's to a user page and a supervisor's to a supervisor
    page: R/W is 0 and D is 1 in the entry that maps it, `leaf`, and R/W is 1 in `above`, the AND of
    the others. SMAP and RFLAGS.AC have no part in it.
    """
    shadow_stack_page = bit(above, 1) & (bit(leaf, 1) ^ 1) & bit(leaf, 6)
    return (access.user ^ user_page) | (shadow_stack_page ^ 1)


def denied_by_key(cpu: Cpu, access: Access, user_page: Flag, entry: Word) -> Flag:
    """1 if the page's protection key forbids the access. Source: SDM Vol. 3A, 4.6.2.

    The key is bits 62:59 of the entry that maps the page. Bit 2*key of the register is AD (no data
    access), bit 2*key+1 is WD (no data write by a user, nor by the supervisor if CR0.WP is 1). Keys
    are there in 4-level and 5-level paging alone.
    """
    register = ite(
        user_page == 1,
        ite(cpu.pke == 1, cpu.pkru, 0),
        ite(cpu.pks == 1, cpu.pkrs, 0),
    )
    key = (entry >> 59) & 0xF
    access_disable = bit(register, 2 * key)
    write_disable = bit(register, 2 * key + 1)
    data = cpu.long_mode & (access.fetch ^ 1)
    return data & (access_disable | write_disable & access.write & (access.user | cpu.wp))


def access_code(cpu: Cpu, access: Access) -> Word:
    """The error-code bits that describe the access: W, U, I and SS. Source: SDM Vol. 3A, 4.7.

    I is reported only with CR4.SMEP, or with EFER.NXE where entries have an XD bit.
    """
    _, write, fetch, user, _, shadow_stack = access
    fetch = fetch & (cpu.nxe & cpu.cr4 >> 5 | cpu.smep)
    return write * W | user * U | fetch * I | (shadow_stack & cpu.cet) * SS


def address_width(levels: int) -> int:
    """How many bits of a linear address are translated: 48 with 4 levels, 57 with 5."""
    return 12 + 9 * levels


def page_offset(level: int, mode: Mode = FIVE_LEVEL) -> Word:
    """The mask of the page offset at a level: 4 KBytes at 1, 2 MBytes (32-bit paging: 4) at 2,
    1 GByte at 3. With paging off, where the level is 0, all 32 bits are offset.
    """
    return low_bits(mode.level(level).shift if level else 32)


def entry_address(table: Word, address: Word, level: int, mode: Mode = FIVE_LEVEL) -> Word:
    """Where `table` holds the entry that a walk for linear `address` uses at `level`."""
    this = mode.level(level)
    return table | (address >> this.shift & this.mask) << mode.scale


def maps_a_page(entry: Word, level: int, mode: Mode = FIVE_LEVEL) -> Condition:
    """Whether a present, valid entry maps a page rather than referencing another structure.

    A PTE always does, a PDE and a PDPTE if PS is 1; a PML4E and a PML5E never do, nor does a PDE of
    32-bit paging without CR4.PSE.
    """
    return level == 1 or entry & mode.level(level).large != 0


def reserved_at(cpu: Cpu, entry: Word, level: int) -> Word:
    """The further bits that must be 0 in a present entry of this level. Source: as above, and 4.7.

    PS in a PML4E and a PML5E; in PAE paging bits 62:52; those of large pages.
    """
    this = cpu.mode.level(level)
    if entry & this.large == 0:
        return this.reserved
    return this.reserved | reserved_in_large_page(cpu, this)


class Step(NamedTuple):
    """An entry on the path of a walk: its level, physical address and value."""

    level: int
    address: Word
    entry: Word


def path(cpu: Cpu, memory: Memory, address: Word) -> Iterator[Step]:
    """The entries for a linear address from CR3 down, as far as they are present, within memory
    and name a next structure. It checks no rights and no reserved bits: `translate` does.

    The address is one that comes out of `linear_address`. A PDPTE of PAE paging is not among them.
    """
    mode = cpu.mode
    table, entries = cpu.cr3 & mode.root, by_entries(mode, memory)
    if mode is modes.PAE:
        pdpte = pdpte_for(cpu, memory, address)
        if isinstance(pdpte, OutsideMemory) or pdpte & PRESENT == 0:
            return
        table = pdpte & FRAME
    for level in mode.levels:
        where = entry_address(table, address, level.number, mode)
        if where >= memory.limit:
            return
        entry = entries.load(where)
        yield Step(level.number, where, entry)
        if entry & PRESENT == 0 or maps_a_page(entry, level.number, mode):
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
        return frame(FIVE_LEVEL, self.entry, FIVE_LEVEL.level(self.level))


class Mapping32(Mapping):
    """A page that 32-bit paging maps, whose address an entry may hold in another way."""

    __slots__ = ()

    @property
    def pa(self) -> Word:
        """The physical address of the page's first byte."""
        return frame(modes.TWO_LEVEL, self.entry, modes.TWO_LEVEL.level(self.level))


def mappings(cpu: Cpu, memory: Memory) -> Iterator[Mapping]:
    """Every page mapped by present entries from CR3 down, in the order of linear addresses.

    Like `path` it checks neither rights nor reserved bits; tables outside memory map nothing.
    Tables that reference themselves make this long: up to 512**levels pages. With paging off there
    are no pages, and none are mapped.
    """
    mode = cpu.mode
    entries = by_entries(mode, memory)
    if mode is modes.PAE:
        for quarter in range(4):
            pdpte = pdpte_for(cpu, memory, quarter << 30)
            if not isinstance(pdpte, OutsideMemory) and pdpte & PRESENT:
                yield from _mappings(mode, entries, mode.levels, pdpte & FRAME, quarter << 30)
    elif mode is not modes.OFF:
        yield from _mappings(mode, entries, mode.levels, cpu.cr3 & mode.root, 0)


def _mappings(
    mode: Mode, entries: Memory, levels: Sequence[Level], table: Word, base: Word
) -> Iterator[Mapping]:
    level, *below = levels
    if table + PAGE_BYTES > entries.limit:
        return
    for index in range(level.mask + 1):
        entry = entries.load(table | index << mode.scale)
        if entry & PRESENT == 0:
            continue
        address = base | index << level.shift
        if mode.width > 32:
            address = sign_extended(address, mode.width)
        if maps_a_page(entry, level.number, mode):
            page = Mapping32 if mode.scale == 2 else Mapping
            yield page(address, level.number, entry)
        else:
            yield from _mappings(mode, entries, below, entry & FRAME, address)


def sign_extended(address: Word, width: int) -> Word:
    """The canonical linear address with these low `width` bits."""
    upper = low_bits(64) & ~low_bits(width)
    return address | ite(bit(address, width - 1) == 1, upper, 0)
