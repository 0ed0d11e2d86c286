"""Programs under a host that saves memory: it merges equal pages, and makes small pages huge.

Guests are those of `spec.programs`, all with the same words in memory, and each has 2 MBytes more,
or a GByte of hugetlbfs. The guest maps these several times over: by large pages and by small ones,
at guest-physical addresses that go with those of the backing (`Layout.big`) and at such that do
not. What the host does to any page may come between any two steps of the guests.
"""

from functools import cache
from typing import NamedTuple

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

BLOCK, GBYTE = 512, 1 << 18


class Layout(NamedTuple):
    """The memory that may be huge, and where a guest has it.

    `big` has guest frames that differ from its pages of the backing by a multiple of the huge
    page's size. `shifted` has the same pages at guest frames that do not go with them, `ragged` at
    such that do, but cut at its edges; `elsewhere` is where `big` may move to. `near` are the
    pages, counted from its first, that programs are about.
    """

    big: Slot
    shifted: Slot
    ragged: Slot
    elsewhere: Slot
    near: tuple[int, ...]


LARGE = Layout(
    Slot(2 * BLOCK, BLOCK, BLOCK),
    Slot(4 * BLOCK, 2 * BLOCK, BLOCK + 4),
    Slot(4 * BLOCK + 4, BLOCK, BLOCK + 4),
    Slot(7 * BLOCK, BLOCK, BLOCK),
    (0, 1, 2, 3, 4, 5, 255, 511),
)
"""One page of 2 MBytes."""
GIANT = Layout(
    Slot(GBYTE, GBYTE, GBYTE),
    Slot(2 * GBYTE, GBYTE, GBYTE + BLOCK),
    Slot(2 * GBYTE + 4, GBYTE - 4, GBYTE + 4),
    Slot(3 * GBYTE, GBYTE, GBYTE),
    (0, 1, 2, BLOCK, BLOCK + 1, 5, 2 * BLOCK - 1, GBYTE - 1),
)
"""One of 1 GByte. What is shifted goes with its pages by 2 MBytes, and ends in small pages."""
BIG = LARGE.big
WINDOWS = (5, 6, 7, 8)
"""Entries of the page directory that map the big slot to do all, the other slot, the big one to
read, and for the supervisor, without code: 2 MBytes of each, or 4 in 32-bit paging."""
GBYTE_WINDOWS = (1, 2, 3)
"""Entries of the PDPT that map a GByte of the first three of these."""
TABLES = (1, 3)
"""Entries of the page directory that may come to lead to a table in one of those pages."""
NAMED = 10
"""One that leads to such a table by another of its names: that in the slot besides the big one."""
SMALL = 40
"""From this entry on, the guest's lowest table maps some of those pages one by one."""
FRAMES = 6 * BLOCK
WORDS = (8 << 12 | USED, 0x2222, 8 << 12 | USED, 0)
"""What is stored and what is there at first: pages become equal often, and are tables too."""
MERGEABLE = (*range(PAGES), PAGES, PAGES + 1, *(BLOCK + page for page in LARGE.near))


@cache
def image(layout: Layout, other: Slot) -> dict[int, Word]:
    """The memory that a guest begins with, by guest-physical address. `other` is the slot besides
    the big one.
    """
    big, near = layout.big, layout.near
    words = dict(programs.image())

    def put(table: int, index: int, entry: Word) -> None:
        words[table << 12 | index << 3] = entry

    def put_half(table: int, index: int, entry: Word) -> None:
        where, shift = table << 12 | index >> 1 << 3, (index & 1) * 32
        words[where] = words.get(where, 0) & ~(0xFFFF_FFFF << shift) | entry << shift

    entries = (
        big.gfn << 12 | OPEN,
        layout.shifted.gfn << 12 | OPEN,
        big.gfn << 12 | PRESENT | USER,
        big.gfn << 12 | (OPEN & ~USER),
    )
    for window, entry in zip(WINDOWS, entries, strict=True):
        no_code = EXECUTE_DISABLE * (window == WINDOWS[-1])
        put(DIRECTORY, window, entry | PAGE_SIZE | no_code)
        put_half(DIRECTORY_32, window, entry | PAGE_SIZE)
    if layout is GIANT:
        for window, entry in zip(GBYTE_WINDOWS, entries, strict=False):
            put(programs.POINTERS, window, entry | PAGE_SIZE)
    named = other.gfn - other.page + big.page + near[4] << 12 | OPEN
    put(DIRECTORY, NAMED, named)
    put_half(DIRECTORY_32, NAMED, named)
    for i in range(8):
        put(LOW, SMALL + i, big.gfn + near[i] << 12 | OPEN)
        put_half(TABLE_32, SMALL + i, big.gfn + near[i] << 12 | OPEN)
    for i in range(5):
        put(big.gfn + near[i], 0, WORDS[i & 3])
    return words


def layout_of(style: Word) -> Layout:
    """What a program with this style is about: once in four times a page of 1 GByte."""
    return GIANT if style >> 41 & 3 == 3 else LARGE


def plan(style: Word, design: str = SHADOW) -> Plan:
    """A machine of two guests with equal words. Of `style`, bit 37 is the slot besides the big one,
    bit 38 whether code may come from large pages, bit 39 whether there is a frame of zeros, bits
    42:41 how large pages are; with a page of 1 GByte, bits 44:43 whether the processor has such,
    bit 45 whether the pool has none to spare. The others are for `programs.plan`.
    """
    machine, layout = programs.plan(style, design), layout_of(style)
    other = layout.ragged if style >> 37 & 1 else layout.shifted
    slots = {**machine.guests[0].slots, 3: layout.big, 4: other}
    giants = int(layout is GIANT)
    guest = machine.guests[0]._replace(
        slots=slots, image=image(layout, other), mergeable=MERGEABLE, giants=giants
    )
    return machine._replace(
        guests=(guest,) * 2,
        frames=FRAMES,
        multihit=bool(style >> 38 & 1),
        zero_pages=bool(style >> 39 & 1),
        pool=giants * (3 - (style >> 45 & 1)),
        gbyte_pages=not giants or style >> 43 & 3 != 3,
    )


def decode(raw: Word, machine: Machine, style: Word = 0) -> Step:
    """The step that a word stands for: with bit 63 one of those here, else one of `programs`.

    Bits 3:0 what kind, 4 the guest, 5 the processor; the rest depends on the kind.
    """
    if not raw >> 63:
        return programs.decode(raw, machine, style)
    how, guest, vcpu, rest = raw & 0xF, raw >> 4 & 1, raw >> 5 & 1, raw >> 6
    layout = layout_of(style)
    if how < 3:
        return Scan()
    if how < 5:
        return Collapse(guest, _page(rest, layout))
    if how == 5:
        page = _page(rest, layout)
        return (Split(guest, page), Unmerge(), Log(guest, 3, True), Log(guest, 3, False))[
            rest >> 12 & 3
        ]
    if how == 6:
        page = _page(rest, layout)
        return (Migrate(guest, page), Unmap(guest, page))[rest >> 12 & 1]
    if how == 7:
        slots = (None, layout.big, layout.elsewhere, layout.big)
        return SetSlot(guest, 3, slots[rest >> 3 & 3])
    mode = programs.paging(machine.guests[guest].processors[vcpu].cpu)
    address, user = _address(rest, mode, layout), rest >> 12 & 1
    if how == 8:  # a page of the huge one becomes a table
        entry = layout.big.gfn + layout.near[rest >> 3 & 3] << 12 | USED
        return Store(guest, vcpu, Access(DIRECTORY << 12 | TABLES[rest & 1] << 3, 1), entry)
    if how < 12:
        return Load(guest, vcpu, Access(address, user=user, fetch=flag_of(rest)))
    return Store(guest, vcpu, Access(address, 1, user=user), WORDS[rest >> 13 & 3])


def flag_of(rest: int) -> int:
    """One access of four is a fetch."""
    return int(rest >> 14 & 3 == 0)


def _page(rest: int, layout: Layout) -> int:
    """A page of the backing: mostly of those that may be huge."""
    if rest & 7:
        return layout.big.page + layout.near[rest >> 3 & 7]
    return (LOW, HIGH, DIRECTORY, ROOT, 8, 9, 10, 11)[rest >> 3 & 7]


def _address(rest: int, mode: int, layout: Layout) -> Word:
    """A linear address of one of those pages, in one of the windows or by a small page."""
    near, word = rest >> 3 & 7, (rest >> 6 & 1) << 3
    page = layout.near[near]
    shift = 22 if mode == programs.LEGACY else 21
    if mode == programs.OFF:
        return (layout.big, layout.shifted)[rest & 1].gfn + page << 12 | word
    if rest & 7 < 4:
        if layout is GIANT and mode in (programs.FOUR, programs.FIVE) and rest >> 7 & 3:
            return GBYTE_WINDOWS[rest % 3] << 30 | page << 12 | word
        return WINDOWS[rest & 3] << shift | (page & BLOCK - 1) << 12 | word
    if rest & 7 < 6:
        return SMALL + near << 12 | word
    if rest & 7 < 7:
        return (1 if mode == programs.LEGACY else 2) << shift | 8 + near << 12 | word
    if near & 2:
        return NAMED << shift | word
    return TABLES[near & 1] << shift | near >> 2 << 12 | word


WINDOW, GBYTE_WINDOW = WINDOWS[0] << 21, GBYTE_WINDOWS[0] << 30


class Scope(NamedTuple):
    """What is done first; eight steps, to make programs of a few of; what is large."""

    before: tuple[Step, ...]
    steps: tuple[Step, ...]
    layout: Layout = LARGE


SCOPES: tuple[Scope, ...] = (
    Scope(
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
    Scope(
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
    Scope(
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
    Scope(
        (
            Store(0, 0, Access(GBYTE_WINDOW | BLOCK << 12, 1), 0x7777),
            Load(0, 1, Access(GBYTE_WINDOW, user=1)),
        ),
        (
            Log(0, 3, True),
            Log(0, 3, False),
            Harvest(0, 3),
            Store(0, 0, Access(GBYTE_WINDOW | BLOCK << 12, 1), 0x2222),
            Store(0, 1, Access(GBYTE_WINDOW, 1, user=1), 9 << 12 | USED),
            Store(0, 0, Access(DIRECTORY << 12 | 1 << 3, 1), GIANT.big.gfn << 12 | USED),
            Load(0, 0, Access(1 << 21)),
            Migrate(0, GBYTE),
        ),
        GIANT,
    ),
)
"""Scopes so small that all programs of a few of their steps can be run, each with the steps before
them. In one, two guests with equal pages write and read them while the host merges, collapses,
splits and migrates. In another a huge page is written and used as a table. In the third writes to
it are logged, or are not any more. In the last a page of 1 GByte is all this, and is migrated.
"""


@cache
def small_plan(design: str, layout: Layout = LARGE) -> Plan:
    """A machine of two guests with three tables and a large page of three equal pages' words."""
    big, giants = layout.big, int(layout is GIANT)
    kept = {ROOT << 12, programs.POINTERS << 12, DIRECTORY << 12, DIRECTORY << 12 | WINDOWS[0] << 3}
    kept |= {LOW << 12 | gfn << 3 for gfn in (DIRECTORY, 8, 9)}
    kept.add(programs.POINTERS << 12 | GBYTE_WINDOWS[0] << 3)
    every = image(layout, layout.shifted)
    words = {address: word for address, word in every.items() if address in kept}
    words |= dict.fromkeys((big.gfn << 12, big.gfn + 2 << 12), 0x1111)
    mergeable = () if giants else (BLOCK, BLOCK + 1, BLOCK + 2)
    slots = {0: MAIN, 3: big}
    guest = GuestPlan((programs.cpu(),) * 2, slots, words, mergeable, giants)
    return Plan((guest,) * 2, design, frames=4 * BLOCK, pool=3 * giants)
