"""Programs decoded from words: a step for each 64-bit word, any word, 0 for none.

Every guest begins with the same small world: tables that map most of its memory several times
over, its tables included, so that it can edit them; an alias of some of its pages, pages that it
can only read, and a device. `decode` is biased to what matters there: most of a program's steps
are about a few pages and about the entries that map them.
"""

from functools import cache

from vapama.spec.access import Access
from vapama.spec.cpu import AC, LMA, LME, NXE, PAE, PCIDE, PE, PG, RFLAGS_ONE, SMAP, SMEP, WP, Cpu
from vapama.spec.machine import Machine
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
from vapama.spec.words import Word

# The guest frames of the tables that a guest begins with.
ROOT, POINTERS, DIRECTORY, LOW, HIGH, OTHER_ROOT, SPARE = 1, 2, 3, 4, 5, 6, 7
PAGES = 16
"""Pages 0 to 15 of the backing are the memory slot 0, at guest frame 0."""
MAIN = Slot(0, PAGES, 0)
ALIAS = Slot(24, 4, 8)
"""The guest frames at which pages 8 to 11 are a second time."""
ROM = Slot(32, 2, PAGES, readonly=True)
ELSEWHERE = Slot(28, 4, 8)
ROM_TABLE = 33
"""A guest frame of the read-only slot that holds a table."""
DEVICE = 40
"""A guest frame in no memory slot."""
FRAMES = (*range(PAGES), *range(24, 32), 32, 33, DEVICE, 41, 24, 25, DEVICE, 41)
"""The guest frames that entries name."""
PGE = 1 << 7
OPEN = PRESENT | WRITABLE | USER
USED = OPEN | ACCESSED | DIRTY


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
    for i, gfn in enumerate(FRAMES):
        put(LOW, i, gfn << 12 | OPEN)
        rights = (OPEN, PRESENT | USER, PRESENT | WRITABLE, USED | GLOBAL, PRESENT)[i % 5]
        put(HIGH, i, gfn << 12 | rights | (EXECUTE_DISABLE if i % 7 == 3 else 0))
    for i in (8, 9, 10, 11, 24, 26, 32):
        put(ROM_TABLE, i % 32, FRAMES[i % 32] << 12 | OPEN | (ACCESSED if i & 1 else 0))
    for i in range(8):
        words[8 + i << 12] = 0x1111 * (i + 1)
    return words


SMALL = (
    Load(0, 0, Access(0x8000, user=1)),
    Store(0, 0, Access(LOW << 12 | 8 << 3, 1), 9 << 12 | USED),
    Store(0, 1, Access(0x8010, 1, user=1), 0x5555),
    Migrate(0, 8),
    Invlpg(0, 0, 0x8000),
    Store(1, 0, Access(0x8010, 1, user=1), 0x7777),
    Move(0, 1, "cr3", ROOT << 12),
    Unmap(1, 8),
)
"""The steps of a scope so small that all programs of a few of them can be run: an entry is changed
while two processors use it, and the host moves the pages of two guests about."""


@cache
def small_plan(design: str) -> Plan:
    """A machine of two guests with four tables and three pages mapped."""
    kept = {ROOT << 12, POINTERS << 12, DIRECTORY << 12, 8 << 12, 9 << 12}
    kept |= {LOW << 12 | gfn << 3 for gfn in (LOW, 8, 9)}
    words = {address: word for address, word in image().items() if address in kept}
    guest = GuestPlan((cpu(),) * 2, {0: MAIN}, words)
    return Plan((guest,) * 2, design, frames=64)


def cpu(style: Word = 0) -> Cpu:
    """The control state that processors begin with."""
    return Cpu(
        cr0=PG | PE | (style >> 20 & 1 ^ 1) * WP,
        cr3=ROOT << 12,
        cr4=PAE
        | (style >> 21 & 1) * SMEP
        | (style >> 22 & style >> 23 & 1) * SMAP
        | (style >> 24 & 1) * PGE
        | (style >> 25 & style >> 26 & 1) * PCIDE,
        efer=LME | LMA | (style >> 27 & 1 ^ 1) * NXE,
        rflags=RFLAGS_ONE | (style >> 28 & 1) * AC,
        maxphyaddr=40,
    )


def plan(style: Word = 0, design: str = SHADOW, guests: int = 2, vcpus: int = 2) -> Plan:
    """A machine of several guests, all with the same small world.

    `style` is what a program has in mind: bits 19:0 its four pages, 28:20 control bits at first.
    """
    guest = GuestPlan((cpu(style),) * vcpus, {0: MAIN, 1: ALIAS, 2: ROM}, image())
    return Plan((guest,) * guests, design, generations=4)


def decode(raw: Word, machine: Machine, style: Word = 0) -> Step:
    """The step that a word stands for. What it says may depend on the machine's state.

    Bits 7:0 what kind, 9:8 the guest (mostly 0), 11:10 the processor; the rest depends on the kind.
    """
    how, guest, vcpu = raw & 0xFF, raw >> 9 & raw >> 8 & 1, raw >> 10 & raw >> 11 & 1
    guest %= len(machine.guests)
    vcpu %= len(machine.guests[guest].processors)
    rest = _focused(raw >> 12, style)
    if how == 0:
        return Rest()
    if how < 0x48:
        return Load(guest, vcpu, Access(_address(rest), user=rest >> 40 & 1, fetch=how & 7 == 1))
    if how < 0x70:
        return Store(guest, vcpu, Access(_address(rest), 1, user=rest >> 40 & 1), rest >> 22)
    if how < 0xA8:
        return _edit(guest, vcpu, rest)
    if how < 0xBC:
        return Invlpg(guest, vcpu, _address(rest) & ~0xFFF)
    if how < 0xC0:
        return Invpcid(guest, vcpu, rest & 3, rest >> 2 & 3, _address(rest >> 4))
    if how < 0xD8:
        return _move(guest, vcpu, rest, machine.guests[guest].processors[vcpu].cpu)
    return _host(guest, vcpu, how, rest)


def _focused(rest: int, style: Word) -> int:
    """The word with the page that its bits 6:2 name replaced by one of the style's, mostly."""
    page = rest >> 2 & 0x1F
    if page >= 24:
        return rest
    return rest & ~0x7C | (style >> 5 * (page & 3) & 0x1F) << 2


def _address(rest: int) -> Word:
    """A linear address: bits 1:0 the page directory's entry, 6:2 the page, 13:7 where in it."""
    offset = (rest >> 7 & 7) << 3
    how = rest >> 10 & 0x1F
    if how == 0:
        offset = 0xFF8 + (rest >> 7 & 7)
    elif how == 1:
        offset |= rest >> 15 & 7
    address = (rest & 3) << 21 | (rest >> 2 & 0x1F) << 12 | offset
    if how == 2:  # through the root's entry for itself
        address = 1 << 39 | (rest >> 15 & 1) << 30 | address & 0x601FFF
    if how == 3 and rest >> 15 & 3 == 0:
        address |= 1 << 47
    return address


def _edit(guest: int, vcpu: int, rest: int) -> Step:
    """A store to a table: of an entry, to a place that matters, through one of its mappings."""
    table = (
        (LOW, HIGH)[rest & 1]
        if rest & 2
        else (LOW, HIGH, DIRECTORY, DIRECTORY, POINTERS, ROOT, OTHER_ROOT, SPARE)[rest >> 7 & 7]
    )
    index = rest >> 2 & (0x1F if table in (LOW, HIGH, SPARE) else 3)
    through = (0, 0, 1, 2)[rest >> 44 & 3] << 21
    frame = FRAMES[rest >> 10 & 0x1F]
    if table not in (LOW, HIGH):
        frame = (LOW, HIGH, LOW, HIGH, SPARE, DIRECTORY, ROM_TABLE, frame)[rest >> 15 & 7]
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
    if rest >> 26 & 7 == 0:
        entry |= EXECUTE_DISABLE
    if rest >> 29 & 7 == 0:
        entry |= GLOBAL
    if rest >> 32 & 15 == 0 and table == DIRECTORY:
        entry = entry & ~(frame << 12) | PAGE_SIZE
    if rest >> 36 & 63 == 0:
        entry |= 1 << (45 if rest >> 42 & 1 else 7)
    address = through | table << 12 | index << 3
    return Store(guest, vcpu, Access(address, 1, user=rest >> 43 & 1), entry)


def _move(guest: int, vcpu: int, rest: int, now: Cpu) -> Step:
    """A change of control state that a processor can make."""
    how = rest & 7
    if how < 3:
        cr3 = (ROOT, OTHER_ROOT, ROOT, OTHER_ROOT, POINTERS, DEVICE, ROOT, ROOT)[
            rest >> 3 & 7
        ] << 12
        if now.cr4 & PCIDE:
            cr3 |= rest >> 6 & 3 | (rest >> 8 & 1) << 63
        return Move(guest, vcpu, "cr3", cr3)
    if how == 3:
        return Move(guest, vcpu, "cr0", now.cr0 ^ WP)
    if how == 4:
        return Move(guest, vcpu, "efer", now.efer ^ NXE)
    if how == 5:
        return Move(guest, vcpu, "rflags", now.rflags ^ AC)
    bit = (SMEP, SMAP, PGE, PCIDE)[rest >> 3 & 3]
    if bit == PCIDE and not now.cr4 & PCIDE and now.cr3 & 0xFFF:
        return Rest()
    return Move(guest, vcpu, "cr4", now.cr4 ^ bit)


def _host(guest: int, vcpu: int, how: int, rest: int) -> Step:
    page = FRAMES[rest >> 2 & 0x1F] & 0xF if rest & 2 else (LOW, HIGH, DIRECTORY, 8)[rest >> 8 & 3]
    if how < 0xE2:
        return Unmap(guest, page)
    if how < 0xE8:
        return Migrate(guest, page)
    if how < 0xEB:
        return Log(guest, rest & 1, rest & 6 != 0)
    if how < 0xF0:
        return Harvest(guest, rest & 1)
    if how < 0xF3:
        return Evict(guest, vcpu)
    if how < 0xF6:
        return Reclaim(guest, 1 + (rest & 3))
    slots = (None, ALIAS, ELSEWHERE, ALIAS)
    if rest >> 9 & 3 == 0:
        return SetSlot(guest, 2, (None, ROM, ROM._replace(readonly=False), ROM)[rest >> 7 & 3])
    return SetSlot(guest, 1, slots[rest >> 7 & 3])
