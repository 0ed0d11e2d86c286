"""Programs decoded from words: a step for each 64-bit word, any word, 0 for none.

Every guest begins with the same small world: tables that map most of its memory several times
over, its tables included, so that it can edit them; an alias of some of its pages, pages that it
can only read, and a device. `decode` is biased to what matters there: most of a program's steps
are about a few pages and about the entries that map them.
"""

from functools import cache

from vapama.spec.access import Access
from vapama.spec.cpu import (
    AC,
    LA57,
    LMA,
    LME,
    NXE,
    PAE,
    PCIDE,
    PE,
    PG,
    PSE,
    RFLAGS_ONE,
    SMAP,
    SMEP,
    WP,
    Cpu,
)
from vapama.spec.machine import GuestMachine, Machine
from vapama.spec.paging import (
    ACCESSED,
    DIRTY,
    EXECUTE_DISABLE,
    GLOBAL,
    PAGE_SIZE,
    PRESENT,
    USER,
    WRITABLE,
)
from vapama.spec.steps import (
    NPT,
    SHADOW,
    Evict,
    GuestPlan,
    Harvest,
    Invlpg,
    Invpcid,
    Load,
    Log,
    Migrate,
    Move,
    Plan,
    Reclaim,
    Rest,
    SetSlot,
    Slot,
    Step,
    Store,
    Unmap,
)
from vapama.spec.tlb import PGE
from vapama.spec.words import Word

# The guest frames of the tables that a guest begins with.
ROOT, POINTERS, DIRECTORY, LOW, HIGH, OTHER_ROOT, SPARE = 1, 2, 3, 4, 5, 6, 7
DIRECTORY_32, TABLE_32 = 12, 13
PAGES = 16
"""Pages 0 to 15 of the backing are the memory slot 0, at guest frame 0."""
MAIN = Slot(0, PAGES, 0)
ALIAS = Slot(24, 4, 8)
"""The guest frames at which pages 8 to 11 are a second time."""
TABLES = Slot(24, 4, POINTERS)
"""The same guest frames as other names of tables instead."""
ROM = Slot(32, 2, PAGES, readonly=True)
ELSEWHERE = Slot(520, 4, 8)
"""Those guest frames moved, out of the first 2 MBytes."""
ROM_TABLE = 33
"""A guest frame of the read-only slot that holds a table."""
DEVICE = 40
"""A guest frame in no memory slot."""
FRAMES: tuple[int, ...] = (
    *range(PAGES),
    *range(24, 28),
    *range(520, 524),
    32,
    33,
    DEVICE,
    41,
    24,
    25,
    DEVICE,
    41,
)
"""The guest frames that entries name."""
FOUR, FIVE, PAE_PAGING, LEGACY, OFF = range(5)
"""The paging modes: with 4 and 5 levels, PAE and 32-bit paging, none."""
HOMES = (FOUR, FOUR, FOUR, FIVE, PAE_PAGING, PAE_PAGING, LEGACY, LEGACY)
"""The paging mode that a program begins in, and the one that it goes to from there."""
AWAY = (OFF, FOUR, FIVE, PAE_PAGING, LEGACY, PAE_PAGING, LEGACY, FOUR)
PDPT = SPARE << 12 | 0xFE0
"""Where the four PDPTEs of PAE paging are, in the last words of a page."""
ROOTS: dict[int, tuple[int, ...]] = {
    FOUR: (ROOT << 12, OTHER_ROOT << 12, ROOT << 12, OTHER_ROOT << 12, POINTERS << 12, 40 << 12),
    FIVE: (SPARE << 12, SPARE << 12, ROOT << 12, SPARE << 12, OTHER_ROOT << 12, 24 << 12),
    PAE_PAGING: (PDPT, PDPT, PDPT, POINTERS << 12, PDPT, 40 << 12),
    LEGACY: (DIRECTORY_32 << 12, DIRECTORY_32 << 12, LOW << 12, TABLE_32 << 12) * 2,
    OFF: (PDPT, DIRECTORY_32 << 12, ROOT << 12, SPARE << 12),
}
"""What programs load into CR3."""
CR4 = {FOUR: PAE, FIVE: PAE | LA57, PAE_PAGING: PAE, LEGACY: PSE, OFF: 0}
"""What the modes need of CR4."""
OPEN = PRESENT | WRITABLE | USER
USED = OPEN | ACCESSED | DIRTY


@cache
def image() -> dict[int, Word]:
    """The tables that a guest begins with, by guest-physical address."""
    words: dict[int, Word] = {}

    def put(table: int, index: int, entry: Word) -> None:
        words[table << 12 | index << 3] = entry

    put(ROOT, 0, POINTERS << 12 | OPEN)
    put(ROOT, 1, ROOT << 12 | OPEN)  # the root again: tables are seen as pages through it
    put(OTHER_ROOT, 0, POINTERS << 12 | PRESENT | WRITABLE | USER)
    put(POINTERS, 0, DIRECTORY << 12 | OPEN)
    put(DIRECTORY, 0, LOW << 12 | OPEN)
    put(DIRECTORY, 1, HIGH << 12 | OPEN)
    put(DIRECTORY, 2, PAGE_SIZE | OPEN)  # all of memory as one 2-MByte page
    put(DIRECTORY, 3, LOW << 12 | PRESENT | USER)  # the first, to read
    put(DIRECTORY, 4, LOW << 12 | OPEN)
    for i, gfn in enumerate(FRAMES):
        put(LOW, i, gfn << 12 | OPEN)
        rights = (OPEN, PRESENT | USER, PRESENT | WRITABLE, USED | GLOBAL, PRESENT)[i % 5]
        put(HIGH, i, gfn << 12 | rights | (EXECUTE_DISABLE if i % 7 == 3 else 0))
    for i in (8, 9, 10, 11, 24, 26, 32):
        put(ROM_TABLE, i % 32, FRAMES[i % 32] << 12 | OPEN | (ACCESSED if i & 1 else 0))
    for i in (0, 1, 2, 3, 6, 7):
        words[8 + i << 12] = 0x1111 * (i + 1)

    # 5-LEVEL AND PAE PAGING, which share the tables below
    put(SPARE, 0, ROOT << 12 | OPEN)
    put(SPARE, 1, OTHER_ROOT << 12 | OPEN)
    for i, gfn in ((0, DIRECTORY), (1, DIRECTORY), (3, LOW)):
        put(SPARE, 508 + i, gfn << 12 | PRESENT)

    # 32-BIT PAGING
    def put_half(table: int, index: int, entry: Word) -> None:
        where = table << 12 | index >> 1 << 3
        words[where] = words.get(where, 0) | entry << (index & 1) * 32

    put_half(DIRECTORY_32, 0, TABLE_32 << 12 | OPEN)
    put_half(DIRECTORY_32, 1, PAGE_SIZE | OPEN)  # all of memory as one 4-MByte page
    put_half(DIRECTORY_32, 2, TABLE_32 << 12 | PRESENT | USER)
    put_half(DIRECTORY_32, 3, LOW << 12 | OPEN)
    put_half(DIRECTORY_32, 4, TABLE_32 << 12 | OPEN)
    put_half(DIRECTORY_32, 1 << 8, TABLE_32 << 12 | OPEN)
    put_half(DIRECTORY_32, 3 << 8, DIRECTORY_32 << 12 | OPEN)  # tables are seen through it
    for i, gfn in enumerate(FRAMES):
        put_half(TABLE_32, i, gfn << 12 | OPEN)
        rights = (OPEN, PRESENT | USER, PRESENT | WRITABLE, USED | GLOBAL, PRESENT)[i % 5]
        put_half(TABLE_32, 512 + i, gfn << 12 | rights)
    return words


SMALL: tuple[Step, ...] = (
    Load(0, 0, Access(0x8000, user=1)),
    Store(0, 0, Access(LOW << 12 | 8 << 3, 1), 9 << 12 | USED),
    Store(0, 1, Access(0x8010, 1, user=1), 0x5555),
    Migrate(0, 8),
    Invlpg(0, 0, 0x8000),
    Store(1, 0, Access(0x8010, 1, user=1), 0x7777),
    Move(0, 1, "cr3", ROOT << 12),
    Unmap(1, 8),
    Reclaim(0, 2),
    Evict(0, 1),
)
"""The steps of a scope so small that all programs of a few of them can be run: an entry is changed
while two processors use it, and the host moves the pages and the tables of two guests about."""


@cache
def small_plan(design: str) -> Plan:
    """A machine of two guests with four tables and three pages mapped."""
    kept = {ROOT << 12, POINTERS << 12, DIRECTORY << 12, 8 << 12, 9 << 12}
    kept |= {LOW << 12 | gfn << 3 for gfn in (LOW, 8, 9)}
    words = {address: word for address, word in image().items() if address in kept}
    guest = GuestPlan((cpu(),) * 2, {0: MAIN}, words)
    return Plan((guest,) * 2, design, frames=64)


def cpu(style: Word = 0, design: str = SHADOW) -> Cpu:
    """The control state that processors begin with: bits 31:20 of the style say which."""
    return _cpu(style & 0xFFF << 20, design)


@cache
def _cpu(style: Word, design: str) -> Cpu:
    home = HOMES[style >> 29 & 7]
    long = home in (FOUR, FIVE)
    pdptes = tuple(image().get(PDPT | i << 3, 0) for i in range(4))
    in_registers = home == PAE_PAGING and design != NPT
    return Cpu(
        cr0=PG | PE | (style >> 20 & 1 ^ 1) * WP,
        cr3=ROOTS[home][0],
        cr4=CR4[home]
        | (style >> 21 & 1) * SMEP
        | (style >> 22 & style >> 23 & 1) * SMAP
        | (style >> 24 & 1) * PGE
        | (style >> 25 & style >> 26 & long) * PCIDE,
        efer=long * (LME | LMA) | (style >> 27 & 1 ^ 1) * NXE,
        rflags=RFLAGS_ONE | (style >> 28 & 1) * AC,
        maxphyaddr=40,
        pdptes=pdptes if in_registers else None,
    )


def plan(style: Word = 0, design: str = SHADOW, guests: int = 2, vcpus: int = 2) -> Plan:
    """A machine of several guests, all with the same small world.

    `style` is what a program has in mind: bits 19:0 its four pages, 28:20 control bits at first,
    31:29 and 34:32 its paging modes, 35 whether a second stage has five levels, 36 that it has all
    four pages in mind and not the first alone, 37 that it is narrow: most of it is about one page,
    below the directory's entry of bits 39:38, and about the entry that maps it; 40 that the memory
    is swapped out at first; 47 that tables have two names.
    """
    processors = (cpu(style, design),) * vcpus
    again = TABLES if style >> 47 & 1 else ALIAS
    guest = GuestPlan(processors, {0: MAIN, 1: again, 2: ROM}, image())
    levels = 4 + (style >> 35 & 1)
    return Plan(
        (guest,) * guests,
        design,
        generations=3,
        stage_levels=levels,
        swapped=bool(style >> 40 & 1),
    )


def paging(now: Cpu) -> int:
    """The paging mode, one of `HOMES`."""
    if not now.cr0 & PG:
        return OFF
    if now.efer & LME:
        return FIVE if now.cr4 & LA57 else FOUR
    return PAE_PAGING if now.cr4 & PAE else LEGACY


def decode(raw: Word, machine: Machine, style: Word = 0) -> Step:
    """The step that a word stands for. What it says may depend on the machine's state.

    Bits 7:0 what kind, 9:8 the guest (mostly 0), 11:10 the processor (mostly 0, unless the style is
    narrow); the rest depends on the kind.
    """
    aims = style >> 37 & 1 and raw >> 58 & 3
    how, guest, vcpu = raw & 0xFF, raw >> 9 & raw >> 8 & 1, raw >> 10 & 1
    if not aims:
        vcpu &= raw >> 11
    guest %= len(machine.guests)
    its = machine.guests[guest]
    vcpu %= len(its.processors)
    rest = _focused(raw >> 12, style & ~(1 << 36) if aims else style)
    if aims:
        rest = rest & ~3 | style >> 38 & 3
    now = its.processors[vcpu].cpu
    mode = paging(now)
    if how == 0:
        return Rest()
    if how < 0x48:
        if mode == OFF and raw >> 60 & 1:
            return _elsewhere(guest, vcpu, raw >> 12, now, style)
        # What SMEP is to stop without CR0.WP comes up only where many loads are fetches.
        often = 1 if now.smep and not now.wp else 7
        access = Access(_address(rest, mode), user=rest >> 40 & 1, fetch=how & often == 1)
        return Load(guest, vcpu, access)
    if how < 0x70:
        access = Access(_address(rest, mode), 1, user=rest >> 40 & 1)
        return Store(guest, vcpu, access, rest >> 22)
    if how < 0xA8:
        if mode == LEGACY or (mode == OFF and raw >> 60 & 1):
            return _edit_32(guest, vcpu, _aimed(rest, 1) if aims else rest, mode, its)
        return _edit(guest, vcpu, _aimed(rest, 0) if aims else rest, mode)
    if how < 0xBC:
        return Invlpg(guest, vcpu, _address(rest, mode) & ~0xFFF)
    if how < 0xC0:
        return Invpcid(guest, vcpu, rest >> 14 & 3, rest >> 16 & 3, _address(rest, mode))
    if how < 0xD8:
        return _move(guest, vcpu, raw >> 12, now, style)
    return _host(guest, vcpu, how, rest)


def _focused(rest: int, style: Word) -> int:
    """The word with the page that its bits 6:2 name replaced by one of the style's, mostly."""
    page = rest >> 2 & 0x1F
    if page >= 24:
        return rest
    which = page & 3 if style >> 36 & 1 else 0
    return rest & ~0x7C | (style >> 5 * which & 0x1F) << 2


def _aimed(rest: int, is_32: int) -> int:
    """The word for an edit of the entry that maps the address that a narrow style has in mind: of
    the directory's that leads to it sometimes, and where that maps a large page.
    """
    directory = rest & 3
    if directory == 2 or rest >> 46 & 3 == 0:
        # Entries of 32-bit paging map 4 MBytes: the first two of 2 MBytes are in one of them.
        which = (0, 0, 1, 2)[directory] << 2 | 1 << 7 if is_32 else directory << 2 | 2 << 7
        return rest & ~0x3FF | which
    if is_32:
        return rest & ~0x3FF | rest & 0x7C | 1 | (directory == 1) << 7
    return rest & ~3 | (3 if directory == 1 else 2)


def _address(rest: int, mode: int) -> Word:
    """A linear address: bits 1:0 the page directory's entry, 6:2 the page, 14:7 where in it."""
    offset = (rest >> 7 & 7) << 3
    how, page = rest >> 10 & 0x1F, rest >> 2 & 0x1F
    if how == 0:
        offset = 0xFF8 + (rest >> 7 & 7)
    elif how == 1:
        offset |= rest >> 15 & 7
    if mode == OFF:
        return FRAMES[page] << 12 | offset
    directory = rest & 3
    if (directory == 3 and rest >> 15 & 1) or (directory == 0 and rest >> 15 & 7 == 0):
        directory = 8 if mode == LEGACY else 4  # the first table again
    elif directory == 3 and mode == LEGACY:
        directory = 4
    address = directory << 21 | page << 12 | offset
    if mode in (PAE_PAGING, LEGACY):
        if how in (2, 3):
            address |= (1 | rest >> 14 & 2) << 30
        return address
    if how == 2:  # through the root's entry for itself
        address = 1 << 39 | (rest >> 15 & 1) << 30 | address & 0x601FFF
    if how == 3 and rest >> 15 & 3 == 0:
        address |= 1 << 47
    return address


def _edit(guest: int, vcpu: int, rest: int, mode: int) -> Step:
    """A store to a table: of an entry, to a place that matters, through one of its mappings."""
    table = (
        (LOW, HIGH)[rest & 1]
        if rest & 2
        else (LOW, HIGH, DIRECTORY, DIRECTORY, POINTERS, ROOT, OTHER_ROOT, SPARE)[rest >> 7 & 7]
    )
    index = rest >> 2 & (0x1F if table in (LOW, HIGH, SPARE) else 3)
    through = 0 if mode == OFF else (0, 0, 1, 2)[rest >> 44 & 3] << 21
    frame = FRAMES[rest >> 10 & 0x1F]
    if table not in (LOW, HIGH):
        frame = (LOW, HIGH, LOW, HIGH, SPARE, DIRECTORY, ROM_TABLE, frame)[rest >> 15 & 7]
    entry = _flags(rest, frame)
    if rest >> 26 & 7 == 0:
        entry |= EXECUTE_DISABLE
    if rest >> 32 & 15 == 0 and table == DIRECTORY:
        entry = entry & ~(frame << 12) | PAGE_SIZE
    if rest >> 36 & 63 == 0:
        entry |= 1 << (45, 7, 55, 7)[rest >> 42 & 3]
    if mode == PAE_PAGING and table in (POINTERS, ROOT, OTHER_ROOT):
        table, index = SPARE, 508 | index
        entry = (DIRECTORY, LOW, DIRECTORY, DIRECTORY)[rest >> 15 & 3] << 12 | entry & PRESENT
        if rest >> 36 & 15 == 0:
            entry |= WRITABLE
    address = through | table << 12 | index << 3
    return Store(guest, vcpu, Access(address, 1, user=rest >> 43 & 1), entry)


def _edit_32(guest: int, vcpu: int, rest: int, mode: int, its: GuestMachine) -> Step:
    """A store to a table of 32-bit paging, of one entry or of two."""
    table = (DIRECTORY_32, TABLE_32, TABLE_32, TABLE_32)[rest & 3]
    if table == TABLE_32:
        index, frame = (rest >> 7 & 1) << 9 | rest >> 2 & 0x1F, FRAMES[rest >> 10 & 0x1F]
    else:
        index = (rest >> 2 & 3) << (8 if rest >> 7 & 7 == 0 else 0)
        frame = (TABLE_32, LOW, TABLE_32, DIRECTORY_32)[rest >> 15 & 3]
    entry = _flags(rest, frame)
    if rest >> 32 & 7 == 0 and table == DIRECTORY_32:
        entry = entry & ~(frame << 12) | PAGE_SIZE | (rest >> 36 & 3) << 20
    through = 0 if mode == OFF else (0, 0, 1, 2)[rest >> 44 & 3] << 21
    where = table << 12 | index << 2
    access = Access(through | where, 1, user=rest >> 43 & 1)
    if rest >> 40 & 7 == 0:
        return Store(guest, vcpu, access, entry << 32 | _flags(rest >> 3, frame))
    # The other half of an aligned word stays as it is.
    old, shift = its.map.load(where & ~7), (index & 1) * 32
    word = old & ~(0xFFFF_FFFF << shift) | entry << shift
    return Store(guest, vcpu, access._replace(address=access.address & ~7), word)


def _flags(rest: int, frame: int) -> Word:
    """An entry for a frame, mostly one that can be used for all."""
    entry = frame << 12 | USED
    how = rest >> 18 & 0xFF
    if how < 0x20:
        entry &= ~PRESENT
    if how & 0x30 == 0x10:
        entry &= ~WRITABLE
    if how & 0x0C == 0x04:
        entry &= ~USER
    if how & 3 == 1:
        entry &= ~DIRTY
    if how & 3 == 2:
        entry &= ~(ACCESSED | DIRTY)
    if rest >> 29 & 7 == 0:
        entry |= GLOBAL
    return entry


def _move(guest: int, vcpu: int, rest: int, now: Cpu, style: Word) -> Step:
    """A change of control state that a processor can make."""
    how = rest & 15
    if how < 5:
        roots = ROOTS[paging(now)]
        cr3 = roots[(rest >> 4 & 7) % len(roots)]
        if now.cr4 & PCIDE:
            cr3 |= rest >> 7 & 3 | (rest >> 9 & 1) << 63
        return Move(guest, vcpu, "cr3", cr3)
    if how == 5:
        return Move(guest, vcpu, "cr0", now.cr0 ^ WP)
    if how == 6:
        return Move(guest, vcpu, "efer", now.efer ^ NXE)
    if how == 7:
        return Move(guest, vcpu, "rflags", now.rflags ^ AC)
    if how >= 12:
        return _elsewhere(guest, vcpu, rest, now, style)
    bits = (SMEP, SMAP, PGE, PCIDE, PSE, SMAP, PGE, PCIDE)
    if paging(now) == LEGACY:
        bits = (SMEP, SMAP, PGE, PSE, PSE, PSE, PSE, PSE)
    bit: Word = bits[rest >> 4 & 7]
    if bit == PCIDE and not now.cr4 & PCIDE and (now.cr3 & 0xFFF or not now.efer & LMA):
        return Rest()
    return Move(guest, vcpu, "cr4", now.cr4 ^ bit)


def _elsewhere(guest: int, vcpu: int, rest: int, now: Cpu, style: Word) -> Step:
    """A step on the way between the paging modes of a style: all ways lead through paging off.

    Source: SDM Vol. 3A, 4.1.2 and 10.8.5.
    """
    home, goal = HOMES[style >> 29 & 7], AWAY[style >> 32 & 7]
    if goal == OFF or rest >> 4 & 3 == 0:
        goal = home
    if now.cr4 & PCIDE:
        return Move(guest, vcpu, "cr4", now.cr4 ^ PCIDE)
    if now.cr0 & PG:
        return Move(guest, vcpu, "cr0", now.cr0 ^ PG)
    cr4 = now.cr4 & ~(PAE | LA57) | CR4[goal]
    if now.cr4 != cr4:
        return Move(guest, vcpu, "cr4", cr4)
    if (now.efer & LME != 0) != (goal in (FOUR, FIVE)):
        return Move(guest, vcpu, "efer", now.efer ^ LME)
    if now.cr3 not in ROOTS[goal][:3]:
        return Move(guest, vcpu, "cr3", ROOTS[goal][rest >> 6 & 1])
    return Move(guest, vcpu, "cr0", now.cr0 ^ PG)


def _host(guest: int, vcpu: int, how: int, rest: int) -> Step:
    page = (LOW, HIGH, DIRECTORY, DIRECTORY_32)[rest >> 8 & 3]
    if rest >> 12 & 3:
        gfn = FRAMES[rest >> 2 & 0x1F]
        page = gfn if gfn < PAGES else 8 + (gfn & 3)
    if how < 0xE2:
        return Unmap(guest, page)
    if how < 0xE8:
        return Migrate(guest, page)
    if how < 0xEC:
        return Log(guest, int(rest >> 12 & 3 == 0), rest >> 8 & 1 == 0)
    if how < 0xF0:
        return Harvest(guest, int(rest >> 12 & 3 == 0))
    if how < 0xF3:
        return Evict(guest, vcpu)
    if how < 0xF6:
        return Reclaim(guest, 1 + (rest & 3))
    slots = (None, ALIAS, ELSEWHERE, ALIAS)
    if rest >> 9 & 3 == 0:
        return SetSlot(guest, 2, (None, ROM, ROM._replace(readonly=False), ROM)[rest >> 7 & 3])
    return SetSlot(guest, 1, slots[rest >> 7 & 3])
