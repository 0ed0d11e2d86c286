"""Programs under a host that saves memory: it merges equal pages, and makes small pages huge.

Guests are those of `spec.programs`, all with the same words in memory, and each has 2 MBytes more.
The guest maps these several times over: by large pages and by small ones, at guest-physical
addresses that go with those of the backing (`BIG`) and at such that do not. What the host does to
any page may come between any two steps of the guests.
"""

from functools import cache

from vapama.spec import programs
from vapama.spec.access import Access
from vapama.spec.machine import Machine
from vapama.spec.paging import EXECUTE_DISABLE, PAGE_SIZE, PRESENT, USER
from vapama.spec.programs import (
    DIRECTORY,
    DIRECTORY_32,
    HIGH,
    LOW,
    MAIN,
    OPEN,
    PAGES,
    ROOT,
    TABLE_32,
    USED,
)
from vapama.spec.steps import (
    SHADOW,
    Collapse,
    GuestPlan,
    Harvest,
    Invlpg,
    Load,
    Log,
    Migrate,
    Plan,
    Scan,
    SetSlot,
    Slot,
    Split,
    Step,
    Store,
    Unmap,
    Unmerge,
)
from vapama.spec.words import Word

BLOCK = 512
BIG = Slot(2 * BLOCK, BLOCK, BLOCK)
"""Guest frames and pages of the backing that differ by a multiple of 2 MBytes."""
SHIFTED = Slot(4 * BLOCK, 2 * BLOCK, BLOCK + 4)
RAGGED = Slot(4 * BLOCK + 4, BLOCK, BLOCK + 4)
"""The same pages at guest frames that do not go with them; and that do, but cut at its edges."""
ELSEWHERE = Slot(7 * BLOCK, BLOCK, BLOCK)
WINDOWS = (5, 6, 7, 8)
"""Entries of the page directory that map `BIG` to do all, the other slot, `BIG` to read, and for
the supervisor, without code."""
TABLES = (1, 3)
"""Entries of the page directory that may come to lead to a table in one of those pages."""
SMALL = 40
"""From this entry on, the guest's lowest table maps some of those pages one by one."""
NEAR = (0, 1, 2, 3, 4, 5, 255, 511)
"""The pages, counted in a window, that programs are about."""
FRAMES = 6 * BLOCK
WORDS = (8 << 12 | USED, 0x2222, 8 << 12 | USED, 0)
"""What is stored and what is there at first: pages become equal often, and are tables too."""
MERGEABLE = (*range(PAGES), PAGES, PAGES + 1, *(BLOCK + page for page in NEAR))


@cache
def image() -> dict[int, Word]:
    """The memory that a guest begins with, by guest-physical address."""
    words = dict(programs.image())

    def put(table: int, index: int, entry: Word) -> None:
        words[table << 12 | index << 3] = entry

    def put_half(table: int, index: int, entry: Word) -> None:
        where, shift = table << 12 | index >> 1 << 3, (index & 1) * 32
        words[where] = words.get(where, 0) & ~(0xFFFF_FFFF << shift) | entry << shift

    for window, entry in zip(
        WINDOWS,
        (
            BIG.gfn << 12 | OPEN,
            SHIFTED.gfn << 12 | OPEN,
            BIG.gfn << 12 | PRESENT | USER,
            BIG.gfn << 12 | (OPEN & ~USER),
        ),
        strict=True,
    ):
        no_code = EXECUTE_DISABLE * (window == WINDOWS[-1])
        put(DIRECTORY, window, entry | PAGE_SIZE | no_code)
        put_half(DIRECTORY_32, window, entry | PAGE_SIZE)
    for i in range(8):
        put(LOW, SMALL + i, BIG.gfn + NEAR[i] << 12 | OPEN)
        put_half(TABLE_32, SMALL + i, BIG.gfn + NEAR[i] << 12 | OPEN)
    for i in range(4):
        put(BIG.gfn + i, 0, WORDS[i])
    return words


def plan(style: Word, design: str = SHADOW) -> Plan:
    """A machine of two guests with equal words. Of `style`, bit 37 is the slot besides `BIG`, bit
    38 whether code may come from large pages, bit 39 whether there is a frame of zeros; the others
    are for `programs.plan`.
    """
    machine = programs.plan(style, design)
    slots = {**machine.guests[0].slots, 3: BIG, 4: RAGGED if style >> 37 & 1 else SHIFTED}
    guest = machine.guests[0]._replace(slots=slots, image=image(), mergeable=MERGEABLE)
    return machine._replace(
        guests=(guest,) * 2,
        frames=FRAMES,
        multihit=bool(style >> 38 & 1),
        zero_pages=bool(style >> 39 & 1),
    )


def decode(raw: Word, machine: Machine, style: Word = 0) -> Step:
    """The step that a word stands for: with bit 63 one of those here, else one of `programs`.

    Bits 3:0 what kind, 4 the guest, 5 the processor; the rest depends on the kind.
    """
    if not raw >> 63:
        return programs.decode(raw, machine, style)
    how, guest, vcpu, rest = raw & 0xF, raw >> 4 & 1, raw >> 5 & 1, raw >> 6
    if how < 3:
        return Scan()
    if how < 5:
        return Collapse(guest, _page(rest))
    if how == 5:
        page = _page(rest)
        return (Split(guest, page), Unmerge(), Log(guest, 3, True), Log(guest, 3, False))[
            rest >> 12 & 3
        ]
    if how == 6:
        return (Migrate(guest, _page(rest)), Unmap(guest, _page(rest)))[rest >> 12 & 1]
    if how == 7:
        slots = (None, BIG, ELSEWHERE, BIG)
        return SetSlot(guest, 3, slots[rest >> 3 & 3])
    mode = programs.paging(machine.guests[guest].processors[vcpu].cpu)
    address, user = _address(rest, mode), rest >> 12 & 1
    if how == 8:  # a page of the huge one becomes a table
        entry = BIG.gfn + NEAR[rest >> 3 & 3] << 12 | USED
        return Store(guest, vcpu, Access(DIRECTORY << 12 | TABLES[rest & 1] << 3, 1), entry)
    if how < 12:
        return Load(guest, vcpu, Access(address, user=user, fetch=flag_of(rest)))
    return Store(guest, vcpu, Access(address, 1, user=user), WORDS[rest >> 13 & 3])


def flag_of(rest: int) -> int:
    """One access of four is a fetch."""
    return int(rest >> 14 & 3 == 0)


def _page(rest: int) -> int:
    """A page of the backing: mostly of the block that may be huge."""
    if rest & 7:
        return BLOCK + NEAR[rest >> 3 & 7]
    return (LOW, HIGH, DIRECTORY, ROOT, 8, 9, 10, 11)[rest >> 3 & 7]


def _address(rest: int, mode: int) -> Word:
    """A linear address of one of those pages, in one of the windows or by a small page."""
    near, word = rest >> 3 & 7, (rest >> 6 & 1) << 3
    shift = 22 if mode == programs.LEGACY else 21
    if mode == programs.OFF:
        return (BIG, SHIFTED)[rest & 1].gfn + NEAR[near] << 12 | word
    if rest & 7 < 4:
        return WINDOWS[rest & 3] << shift | NEAR[near] << 12 | word
    if rest & 7 < 6:
        return SMALL + near << 12 | word
    if rest & 7 < 7:
        return (1 if mode == programs.LEGACY else 2) << shift | 8 + near << 12 | word
    return TABLES[near & 1] << shift | near >> 2 << 12 | word


WINDOW = WINDOWS[0] << 21
SCOPES: tuple[tuple[tuple[Step, ...], tuple[Step, ...]], ...] = (
    (
        (Scan(), Scan()),
        (
            Scan(),
            Store(0, 0, Access(WINDOW, 1, user=1), 0x7777),
            Store(1, 1, Access(WINDOW | 2 << 12, 1, user=1), 0x7777),
            Load(0, 1, Access(WINDOW, user=1)),
            Load(1, 0, Access(WINDOW | 2 << 12, user=1)),
            Collapse(0, BLOCK),
            Split(0, BLOCK),
            Migrate(1, BLOCK),
        ),
    ),
    (
        (Collapse(0, BLOCK), Store(0, 0, Access(WINDOW, 1, user=1), WORDS[0])),
        (
            Store(0, 0, Access(DIRECTORY << 12 | 1 << 3, 1), BIG.gfn << 12 | USED),
            Load(0, 0, Access(1 << 21)),
            Store(0, 1, Access(WINDOW, 1, user=1), 9 << 12 | USED),
            Collapse(0, BLOCK),
            Invlpg(0, 0, 1 << 21),
            Unmap(0, BLOCK),
            Scan(),
            Split(0, BLOCK),
        ),
    ),
    (
        (
            Collapse(0, BLOCK),
            Log(0, 3, True),
            Store(0, 1, Access(WINDOW, 1, user=1), 0x7777),
        ),
        (
            Log(0, 3, False),
            Log(0, 3, True),
            Harvest(0, 3),
            Store(0, 0, Access(WINDOW | 1 << 12, 1), 0x2222),
            Store(0, 1, Access(WINDOW, 1, user=1), 0x7777),
            Load(0, 1, Access(WINDOW | 1 << 12, fetch=1)),
            Collapse(0, BLOCK),
            Split(0, BLOCK),
        ),
    ),
)
"""Scopes so small that all programs of a few of their steps can be run, each with the steps before
them. In one, two guests with equal pages write and read them while the host merges, collapses,
splits and migrates. In another a huge page is written and used as a table. In the last writes to
it are logged, or are not any more.
"""


@cache
def small_plan(design: str) -> Plan:
    """A machine of two guests with three tables and a large page of three equal pages' words."""
    kept = {ROOT << 12, programs.POINTERS << 12, DIRECTORY << 12, DIRECTORY << 12 | WINDOWS[0] << 3}
    kept |= {LOW << 12 | gfn << 3 for gfn in (DIRECTORY, 8, 9)}
    words = {address: word for address, word in image().items() if address in kept}
    words |= dict.fromkeys((BIG.gfn << 12, BIG.gfn + 2 << 12), 0x1111)
    guest = GuestPlan(
        (programs.cpu(),) * 2, {0: MAIN, 3: BIG}, words, (BLOCK, BLOCK + 1, BLOCK + 2)
    )
    return Plan((guest,) * 2, design, frames=4 * BLOCK)
