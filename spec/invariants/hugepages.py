"""Invariants of large pages: alignment, pools of huge pages, split and collapse.

What concerns words is proved for any number of pages; programs on a pool go to the optimized books
and to the running kernel alike.
"""

from collections.abc import Callable, Hashable, Iterator
from enum import IntEnum
from typing import Any, NamedTuple

from vapama.spec.domains import Domain
from vapama.spec.hugepages import (
    NORESERVE,
    PRESENT,
    PRIVATE,
    SHARED,
    SMALL_PAGES,
    Block,
    Hugetlb,
    Pool,
    Refused,
    Slot,
    congruent,
    faulted,
    frames_of_4m,
    freed,
    mapping_level,
    page_bytes,
    pool_holds,
    reserved_for,
    resized,
    unreserved,
    untracked_level,
)
from vapama.spec.nondet import Nondet, invariant
from vapama.spec.paging import ACCESSED, DIRTY, FRAME, PAGE_SIZE
from vapama.spec.subject import HUGETLB, HUGETLB_BOOKS, LARGE_PAGES, POOL, THP
from vapama.spec.words import Condition, Word, bit, ite, low_bits

# Alignment

PAGES_40 = Domain(
    free=low_bits(51) & ~0xFFF,
    bias=lambda raw: (
        (raw >> 8 & 0x3F) << (27 if raw & 0x10 else 18)
        | (raw >> 16 & 3) << 12 & (0xF000 if raw & 3 == 0 else 0)
    ),
    scope=(0x200000, 0, 0x201000, 0x40000000),
)
"""An address in pages of 4 KBytes, mostly near large boundaries."""
INSIDE = Domain(
    free=low_bits(51),
    bias=lambda raw: raw >> 8 & low_bits(32 if raw & 0x10 else 25),
    scope=(0x200123, 0, 0x3FF000, 1 << 30),
)
LEVEL = Domain(among=(1, 2, 3))
SLOT = (("gpa", PAGES_40), ("size", PAGES_40), ("hva", PAGES_40))


@invariant(
    source="Linux, virt/kvm/x86/mmu.rst, Large pages; SDM Vol. 3A, 4.5.4",
    reaches=("4 KBytes", "2 MBytes", "1 GByte", "cut by an edge", "not congruent", "tracked"),
    needs=(LARGE_PAGES,),
    twin="a-ragged-edge-is-mapped-large",
)
def a_slot_is_mapped_as_large_as_everybody_allows(nondet: Nondet, subject: Any) -> None:
    """The level chosen for an address is the largest at which the whole page lies in the slot,
    guest-physical and host-virtual offsets agree, and host, guest, tracking and mitigation allow.
    """
    k = subject.large_pages()
    slot = Slot(*nondet.words(SLOT))
    gpa = slot.gpa + nondet.word("offset", INSIDE)
    nondet.assume(gpa < slot.gpa + slot.size)
    host, guest = nondet.word("host", LEVEL), nondet.word("guest", LEVEL)
    untracked = nondet.word("untracked", LEVEL)
    write, execute, multihit = (nondet.flag(name) for name in ("write", "execute", "multihit"))
    level = k.largest_level(slot.gpa, slot.size, slot.hva, gpa, host, guest)
    level = k.restricted(level, untracked, write, execute, multihit)
    expected = mapping_level(
        slot,
        gpa,
        host=host,
        guest=guest,
        untracked=untracked,
        write=write,
        execute=execute,
        multihit=multihit,
    )
    nondet.reach(("4 KBytes", "2 MBytes", "1 GByte")[expected - 1])
    if expected == 1 and host > 1 and guest > 1:
        if write and untracked == 1:
            nondet.reach("tracked")
        elif congruent(page_bytes(2), slot.gpa, slot.hva):
            nondet.reach("cut by an edge")
        else:
            nondet.reach("not congruent")
    assert level == expected


@invariant(
    source="Linux, virt/kvm/x86/mmu.rst, Large pages",
    reaches=("4 KBytes", "2 MBytes", "1 GByte"),
    needs=(LARGE_PAGES,),
    twin="a-table-in-a-gbyte-is-looked-for-in-its-first-2m",
)
def a_tracked_page_is_in_all_large_pages_around_it(nondet: Nondet, subject: Any) -> None:
    """A page that must not be written unseen is in just those large pages that have its address:
    beside one in the same GByte, 2 MBytes may be mapped; beside one in the same 2 MBytes, none.
    """
    gpa = nondet.word("gpa", PAGES_40)
    tracked = gpa ^ nondet.word("apart", INSIDE)
    expected = untracked_level(gpa, tracked)
    nondet.reach(("4 KBytes", "2 MBytes", "1 GByte")[expected - 1])
    assert subject.large_pages().untracked_level(gpa >> 12, tracked >> 12) == expected


@invariant(
    source="Intel SDM Vol. 3A, 4.3, table 4-4",
    reaches=("lower half", "upper half", "above 4 GBytes"),
    needs=(LARGE_PAGES,),
    twin="both-halves-of-4m-are-the-first",
)
def a_4m_page_is_two_of_2m(nondet: Nondet, subject: Any) -> None:
    """A guest's 4-MByte page maps as two of 2 MBytes that follow each other, PSE-36 included."""
    k = subject.large_pages()
    pde, address = nondet.words(SPLIT)
    halves = frames_of_4m(pde)
    upper = bit(address, 21)
    nondet.reach("upper half" if upper == 1 else "lower half")
    frame = k.half_of_4m(pde, address)
    if frame >> 32 != 0:
        nondet.reach("above 4 GBytes")
    assert frame == ite(upper == 1, halves[1], halves[0])
    assert frame & (page_bytes(2) - 1) == 0


PDE = Domain(free=low_bits(32), scope=(0x400087, 0x12E87))
ADDRESS_32 = Domain(free=low_bits(32), scope=(0x123456, 0x3FF123))
SPLIT = (("pde", PDE), ("address", ADDRESS_32))


# Split and collapse

LARGE_ENTRY = Domain(
    free=low_bits(64) & ~(1 << 12),
    bias=lambda raw: raw >> 3 & ~(1 << 12) & low_bits(64),
    scope=(0x40000087, 0x8000000040001087 & ~(1 << 12), 0xE7),
)
INDEX = Domain(free=511, scope=(0, 1, 511))
SIZE = Domain(among=(2, 3))


@invariant(
    source="Intel SDM Vol. 3A, 4.5.4 (tables 4-15 to 4-20) and 4.9.2 (PAT)",
    reaches=("from 2 MBytes", "from 1 GByte", "PAT"),
    needs=(LARGE_PAGES,),
    twin="pat-stays-behind-in-a-split",
)
def a_split_keeps_every_translation(nondet: Nondet, subject: Any) -> None:
    """The small entries map each address where the large one did, with the same rights, key, flags
    and memory type, and no reserved bit is set in them.
    """
    k = subject.large_pages()
    entry, level = nondet.word("entry", LARGE_ENTRY), nondet.word("level", SIZE)
    address, pat = nondet.word("address", INSIDE), nondet.flag("pat")
    large = entry & ~(page_bytes(3) - 1 & FRAME) | PAGE_SIZE | pat << 12
    if level == 2:
        large = entry & ~(page_bytes(2) - 1 & FRAME) | PAGE_SIZE | pat << 12
        nondet.reach("from 2 MBytes")
    else:
        nondet.reach("from 1 GByte")
    size, below = (page_bytes(2), page_bytes(1)) if level == 2 else (page_bytes(3), page_bytes(2))
    index = (address & (size - 1)) >> ite(level == 2, 12, 21)
    child = k.split_child(large, level, index)

    # ADDRESS
    small_frame = child & FRAME & ~(below - 1)
    large_frame = large & FRAME & ~(size - 1)
    physical = small_frame | address & (below - 1)
    assert physical == large_frame | address & (size - 1), "another address"

    # RIGHTS, KEY AND FLAGS
    others = ~(FRAME | PAGE_SIZE)
    assert child & others == large & others, "other rights"

    # MEMORY TYPE AND SHAPE
    if pat:
        nondet.reach("PAT")
    if level == 2:
        assert bit(child, 7) == pat, "another memory type"
    else:
        assert (bit(child, 7) == 1) & (bit(child, 12) == pat), "another memory type"
        assert child & FRAME & (below - 1) & ~(1 << 12) == 0, "a reserved bit"


@invariant(
    source="Intel SDM Vol. 3A, 4.5.4; Linux, admin-guide/mm/transhuge.rst",
    reaches=("joins", "does not join"),
    needs=(LARGE_PAGES,),
    twin="a-collapse-takes-what-does-not-follow",
)
def just_what_continues_a_large_page_joins_it(nondet: Nondet, subject: Any) -> None:
    """What a split made joins again into the entry it came from; an entry with another frame, or
    other rights, does not.
    """
    k = subject.large_pages()
    entry, level = nondet.word("entry", LARGE_ENTRY), nondet.word("level", SIZE)
    index, change = nondet.word("index", INDEX), nondet.word("change", CHANGE)
    large = entry & ~(page_bytes(3) - 1 & FRAME) | PAGE_SIZE | 1 | nondet.flag("pat") << 12
    first = k.split_child(large, level, 0)
    other = k.split_child(large, level, index)
    if change & ~(ACCESSED | DIRTY) == 0:
        nondet.reach("joins")
        assert k.joins(other ^ change, first, index, level) == 1
        assert k.joined(first, level) == large
    else:
        nondet.reach("does not join")
        assert k.joins(other ^ change, first, index, level) == 0


CHANGE = Domain(
    bias=lambda raw: raw >> 8 & (ACCESSED | DIRTY) | ite(raw & 1 == 1, 1 << (raw >> 20 & 63), 0),
    scope=(0, ACCESSED, 2, 1 << 12, 1 << 63),
)

# Pools

COUNT = Domain(free=low_bits(20), bias=lambda raw: raw >> 8 & 7, scope=(0, 1, 2))


def any_pool(nondet: Nondet) -> Pool:
    """Any pool that holds."""
    persistent, surplus, free, reserved, overcommit = nondet.words(POOL_DRAWS)
    pool = Pool(persistent + surplus, free, reserved, surplus, overcommit)
    nondet.assume((reserved <= free) & (free <= pool.total))
    return pool


OF_A_POOL = ("persistent", "surplus", "free", "reserved", "overcommit")
POOL_DRAWS = tuple((name, COUNT) for name in OF_A_POOL)
OPERATIONS = ("resize", "reserve", "unreserve", "take", "give")


@invariant(
    source="Linux, mm/hugetlbfs_reserv.rst; mm/hugetlb.c",
    reaches=(*OPERATIONS, "refused", "surplus"),
    needs=(POOL,),
    twin="a-fault-takes-a-promised-page",
    counts=True,
)
def a_pool_keeps_its_promises(nondet: Nondet, subject: Any) -> None:
    """0 <= reserved <= free <= total and 0 <= surplus <= total after any operation that began so,
    the pool is the reference's, and what is refused changes nothing. It is so of an empty pool.
    """
    k = subject.pool()
    what = nondet.one_of("operation", OPERATIONS)
    nondet.reach(what)
    pool = any_pool(nondet)
    count, promised = nondet.word("count", COUNT), nondet.flag("promised")
    before = (*pool, 0)
    reference: Callable[[], Pool]
    if what == "resize":
        after, reference = k.resize(before, count), lambda: resized(pool, count)
    elif what == "reserve":
        after, reference = k.reserve(before, count), lambda: reserved_for(pool, count)
    elif what == "unreserve":
        nondet.assume(count <= pool.reserved)
        after, reference = k.unreserve(before, count), lambda: unreserved(pool, count)
    elif what == "take":
        nondet.assume((promised == 0) | (pool.reserved != 0))
        after, reference = k.take(before, promised), lambda: faulted(pool, promised)
    else:
        nondet.assume(pool.free < pool.total)
        after, reference = k.give(before, promised), lambda: freed(pool, promised)
    try:
        expected, refused = reference(), 0
    except Refused:
        nondet.reach("refused")
        expected, refused = pool, 1
    new = Pool(*after[:5])
    assert new.reserved <= new.free, "more is promised than is free"
    assert new.free <= new.total, "more is free than there is"
    assert new.surplus <= new.total, "more is surplus than there is"
    assert after[5] == refused, "refused, or not"
    for found, right in zip(after[:5], expected, strict=True):
        assert found == right, "another pool"
    if expected.surplus > pool.surplus:
        nondet.reach("surplus")


MOUNT_DRAWS = tuple((f"mount.{name}", COUNT) for name in ("most", "used", "least", "spare"))


class Mount(NamedTuple):
    """A hugetlbfs mount with sizes of its own: see `vapama.impl.kernels.pool`."""

    most: Word
    used: Word
    least: Word
    spare: Word


def any_mount(nondet: Nondet) -> Mount:
    """Any mount that holds: it uses no more than it may; and as long as it uses less than its least
    size, the rest of that is spare.
    """
    most, used, least, spare = nondet.words(MOUNT_DRAWS)
    nondet.assume(used <= most)
    if spare == 0:
        nondet.assume(least <= used)
        return Mount(most, used, least, spare)
    return Mount(most, used, used + spare, spare)


def mount_holds(mount: Mount) -> Condition:
    """The same, of a mount."""
    rest = (mount.spare == 0) & (mount.least <= mount.used)
    return (mount.used <= mount.most) & (rest | (mount.used + mount.spare == mount.least))


@invariant(
    source="Linux, mm/hugetlb.c, hugepage_subpool_get_pages and hugetlb_reserve_pages",
    reaches=("refused by the mount", "refused by the pool", "promised"),
    needs=(POOL,),
    twin="a-refused-reservation-stays-in-the-mount",
    counts=True,
)
def a_mount_and_its_pool_promise_all_or_nothing(nondet: Nondet, subject: Any) -> None:
    """A reservation in a mount with sizes of its own is made by the mount and by the pool, or
    leaves both as they were; giving it back leads to where it began.
    """
    k = subject.pool()
    pool = any_pool(nondet)
    mount = any_mount(nondet)
    count = nondet.word("count", COUNT)
    nondet.assume(mount.spare <= pool.reserved)
    after, then = k.reserve_in((*pool, 0), (*mount, 0), count)
    lacking = short = 0
    if mount.spare < count:
        lacking = count - mount.spare
    if pool.reserved + lacking > pool.free:
        short = pool.reserved + lacking - pool.free
    by_mount = mount.used + count > mount.most
    by_pool = short != 0 and pool.surplus + short > pool.overcommit
    if by_mount:
        nondet.reach("refused by the mount")
    if by_pool:
        nondet.reach("refused by the pool")
    if by_mount or by_pool:
        assert (after[5] == 1) & (then[4] == 1)
        for found, right in zip((*after[:5], *then[:4]), (*pool, *mount), strict=True):
            assert found == right, "what was refused changed the books"
        return
    nondet.reach("promised")
    assert (after[5] == 0) & (then[1] == mount.used + count)
    assert after[2] == pool.reserved + lacking, "promised otherwise"
    assert mount_holds(Mount(*then[:4])), "the mount does not hold"
    back = k.put(then, count)
    for found, right in zip(back[:4], mount, strict=True):
        assert found == right, "a reservation that was given back is still there"


# Programs on a pool


class Do(IntEnum):
    """What a step does; those from FAILS on are for books that can be looked into."""

    RESIZE = 0
    OVERCOMMIT = 1
    MAP = 2
    TOUCH = 3
    DISCARD = 4
    UNMAP = 5
    CHILD = 6
    OWNER = 7
    FAILS = 8


OFTEN = (
    *(Do.TOUCH,) * 11,
    *(Do.MAP,) * 7,
    *(Do.RESIZE,) * 4,
    *(Do.UNMAP,) * 3,
    *(Do.OVERCOMMIT, Do.DISCARD, Do.CHILD) * 2,
    Do.OWNER,
)
MOST_PAGES = 12


def step_word(what: int, number: int = 0, page: int = 0, count: int = 0) -> int:
    """The word that a step is decoded from; `what` is an index into the table of steps."""
    return what | number << 5 | page << 9 | count << 11


STEP = Domain(
    free=low_bits(18),
    scope=(
        step_word(0),
        step_word(OFTEN.index(Do.RESIZE), count=2),
        step_word(OFTEN.index(Do.MAP)),
        step_word(OFTEN.index(Do.UNMAP)),
        step_word(OFTEN.index(Do.OVERCOMMIT), count=1),
        step_word(OFTEN.index(Do.OWNER)),
        step_word(OFTEN.index(Do.MAP), page=2),
        step_word(OFTEN.index(Do.RESIZE), count=0),
    ),
)
LENGTH = Domain(among=tuple(range(1, 41)), scope=(6,))
SEARCHED = "a program over objects; each operation is proved: see a pool keeps its promises"


@invariant(
    source="Linux, mm/hugetlbfs_reserv.rst; admin-guide/mm/hugetlbpage.rst",
    reaches=("touched", "refused", "surplus"),
    needs=(HUGETLB,),
    twin="surplus-pages-are-kept",
    searched=SEARCHED,
)
def a_pool_is_kept_as_the_model_says(nondet: Nondet, subject: Any) -> None:
    """After every step the pool, and what is refused, are the model's, and the pool holds."""
    model, books = Hugetlb(), subject.hugetlb()
    for number in range(nondet.word("length", LENGTH)):
        raw = nondet.word(f"step {number}", STEP)
        results = _do(raw, model, books)
        assert results[0] == results[1], "what is refused"
        pool = Pool(*books.pool)
        assert pool == model.pool, "the pool"
        assert pool_holds(pool)
        if pool.surplus:
            nondet.reach("surplus")
        if results[0] is False:
            nondet.reach("refused")
        if any(PRESENT in area.pages for area in model.areas.values()):
            nondet.reach("touched")
        areas = tuple((n, a.kind, tuple(a.pages)) for n, a in model.areas.items())
        nondet.seen((number, model.pool, areas))


def _do(raw: int, model: Hugetlb, books: Any, more: bool = False) -> tuple[Any, Any]:
    """Do a step to both; what each says of it."""
    what = OFTEN[(raw & 0x1F) % len(OFTEN)]
    numbers = list(model.areas)
    count = raw >> 11 & 0xF
    match what:
        case Do.RESIZE:
            model.resize(count % (MOST_PAGES + 1))
            books.resize(count % (MOST_PAGES + 1))
        case Do.OVERCOMMIT:
            model.overcommit(count % 5)
            books.overcommit(count % 5)
        case Do.MAP:
            kind, pages = (PRIVATE, SHARED, NORESERVE)[(raw >> 9 & 3) % 3], 1 + count % 4
            return model.map(kind, pages), books.map(kind, pages)
        case _ if not numbers:
            pass
        case Do.UNMAP:
            number = numbers[(raw >> 5 & 0xF) % len(numbers)]
            model.unmap(number)
            books.unmap(number)
        case _:
            number = numbers[(raw >> 5 & 0xF) % len(numbers)]
            page = (raw >> 9 & 3) % len(model.areas[number].pages)
            method = ("touch", "discard", "child_writes", "owner_writes")[
                (Do.TOUCH, Do.DISCARD, Do.CHILD, Do.OWNER).index(what)
            ]
            return getattr(model, method)(number, page), getattr(books, method)(number, page)
    return None, None


GROUPS = 2
MOST_OF_A_MOUNT = Domain(among=(6, 3, 1 << 39), scope=(3,))


@invariant(
    source="Linux, mm/hugetlb.c, restore_reserve_on_error; admin-guide/cgroup-v2.rst, HugeTLB",
    reaches=("copy failed", "mapped", "unmapped"),
    needs=(HUGETLB, HUGETLB_BOOKS),
    twin="a-failed-copy-loses-its-promise",
    searched=SEARCHED,
)
def what_fails_leaves_the_books_as_they_were(nondet: Nondet, subject: Any) -> None:
    """A copy that fails, or a mapping that is refused, leaves pool, mount and promises unchanged;
    what each group was charged is what its mappings were promised; all unmapped, all is free.
    """
    books = subject.hugetlb(groups=GROUPS, most=nondet.word("most", MOST_OF_A_MOUNT))
    books.resize(4)
    held: dict[int, tuple[int, int]] = {}
    for step in range(nondet.word("length", BOOKS_LENGTH)):
        raw = nondet.word(f"step {step}", BOOKS_STEP)
        what, kind, count, group = raw & 3, (raw >> 2 & 3) % 3, 1 + (raw >> 4 & 3), raw >> 6 & 1
        numbers = list(held)
        before = tuple(books.pool), tuple(books.mount), list(books.charged)
        if what == 0 or not numbers:
            if books.map(kind, count, group):
                held[books.made - 1] = (group, 0 if kind == NORESERVE else count)
                nondet.reach("mapped")
            else:
                assert (tuple(books.pool), tuple(books.mount), list(books.charged)) == before
        else:
            number = numbers[(raw >> 7 & 3) % len(numbers)]
            pages = books.areas[number].count
            page = (raw >> 9 & 3) % pages
            if what == 1:
                books.touch(number, page)
            elif what == 2:
                promised = set(books.areas[number].promised)
                there = page in books.areas[number].present
                if books.copy_fails(number, page) and not there:
                    nondet.reach("copy failed")
                after = tuple(books.pool), tuple(books.mount), list(books.charged)
                assert after == before, "a failed copy changed the books"
                assert books.areas[number].promised == promised, "a promise was lost"
            else:
                books.unmap(number)
                del held[number]
                nondet.reach("unmapped")
        for each in range(GROUPS):
            charged = sum(pages for of, pages in held.values() if of == each)
            assert books.charged[each] == charged, "a group pays for another"
        assert pool_holds(Pool(*books.pool))
        assert 0 <= books.mount[1] <= books.mount[0], "a mount uses more than it may"
    for number in list(held):
        books.unmap(number)
    total, free, reserved, surplus, _ = books.pool
    assert (free, reserved, surplus) == (total, 0, 0), "pages are lost"
    assert (books.mount[1], books.charged) == (0, [0] * GROUPS), "something is still charged"


BOOKS_LENGTH = Domain(among=tuple(range(1, 41)), scope=(5,))
BOOKS_STEP = Domain(free=low_bits(11), scope=(0, 2, 1, 3, 0x20, 0x72))


# Programs on a block that may be huge

SEEN_PAGES = (0, 1, 2, 254, 255, 256, 510, 511)
"""The pages that programs touch, and that are looked at."""
COUNTS = (1, 2, 256, 512)


class Touch(IntEnum):
    """What a step does to a block."""

    WRITE = 0
    READ = 1
    DISCARD = 2
    SPLIT = 3
    COLLAPSE = 4
    ADVISE = 5
    FORK = 6
    EXIT = 7
    DAEMON = 8


TOUCHES = (
    *(Touch.WRITE,) * 5,
    *(Touch.DISCARD,) * 4,
    *(Touch.COLLAPSE,) * 3,
    *(Touch.READ, Touch.ADVISE) * 1,
    *(Touch.SPLIT,) * 2,
)


BESIDES = (*(Touch.FORK,) * 3, Touch.EXIT, *(Touch.DAEMON,) * 2)
"""What bits 17:14 of a step stand for, from 10 on: what concerns processes."""


def touch_word(what: Touch, page: int = 0, count: int = 0, content: int = 0, child: int = 0) -> int:
    """The word that a step is decoded from."""
    if what in BESIDES:
        return 10 + BESIDES.index(what) << 14
    return TOUCHES.index(what) | page << 4 | count << 7 | content << 9 | child << 13


TOUCH = Domain(
    free=low_bits(18),
    scope=(
        touch_word(Touch.WRITE, 3, 0, 5),
        touch_word(Touch.DISCARD, 3),
        touch_word(Touch.COLLAPSE),
        touch_word(Touch.FORK),
        touch_word(Touch.DAEMON),
        touch_word(Touch.SPLIT),
        touch_word(Touch.DISCARD, 0, 3),
        touch_word(Touch.READ),
        touch_word(Touch.ADVISE),
        touch_word(Touch.WRITE, 0, 0, 7),
        touch_word(Touch.WRITE, 3, 0, 6, 1),
    ),
)


@invariant(
    source="Linux, admin-guide/mm/transhuge.rst; mm/khugepaged.c; mm/huge_memory.c",
    reaches=("huge", "split", "collapsed", "refused", "copied", "collapsed by khugepaged"),
    needs=(THP,),
    twin="a-collapse-wants-every-page",
    searched="a program over objects",
)
def a_block_is_huge_or_small_as_the_model_says(nondet: Nondet, subject: Any) -> None:
    """After every step what the blocks of a process and its child hold, whether each is one huge
    page, how many pages have frames, which of them are shared, and what is refused are the model's;
    a page keeps its frame as long as it does in the model, and no longer, and the frames of a huge
    page follow each other from an aligned one.
    """
    pairs = [(Block(), subject.thp())]
    before: dict[tuple[int, int], tuple[int, int]] = {}
    for number in range(nondet.word("length", LENGTH)):
        raw = nondet.word(f"step {number}", TOUCH)
        was_huge = [model.huge for model, _ in pairs]
        results = _touch(nondet, raw, pairs)
        assert results[0] == results[1], "what is refused"
        now: dict[tuple[int, int], tuple[int, int]] = {}
        for process, (model, block) in enumerate(pairs):
            _compare(nondet, model, block, process, now)
            if not model.huge and model.frames and any(was_huge[process : process + 1]):
                nondet.reach("split")
        for place in now.keys() & before.keys():
            (modelled, frame), (modelled_before, frame_before) = now[place], before[place]
            kept = modelled == modelled_before
            assert kept == (frame == frame_before), "a page has another frame, or should"
        shared = len(set(now.values()))
        assert shared == len({modelled for modelled, _ in now.values()}), "which frames are shared"
        assert shared == len({frame for _, frame in now.values()}), "which frames are shared"
        before = now
        nondet.seen((number, tuple(_state(pairs))))


def _compare(
    nondet: Nondet,
    model: Block,
    block: Any,
    process: int,
    now: dict[tuple[int, int], tuple[int, int]],
) -> None:
    """Compare a block with the model, and note the frames of both."""
    assert block.huge() == model.huge, "whether it is huge"
    assert block.present() == len(model.frames), "how many pages have frames"
    seen = block.frames(SEEN_PAGES)
    there = {page: frame for page, frame in zip(SEEN_PAGES, seen, strict=True) if frame}
    assert there.keys() == model.frames.keys() & set(SEEN_PAGES), "which pages have frames"
    now |= {(process, page): (model.frames[page], frame) for page, frame in there.items()}
    expected = [model.contents.get(page, 0) for page in SEEN_PAGES]
    assert block.contents(SEEN_PAGES) == expected, "contents"
    if model.huge:
        nondet.reach("huge")
        first = seen[0]
        assert first % SMALL_PAGES == 0, "a huge page is not aligned"
        assert seen == [first + page for page in SEEN_PAGES], "a huge page is in pieces"


def _state(pairs: list[tuple[Block, Any]]) -> Iterator[Hashable]:
    """All that the rest of a program depends on: frames by the order in which they are met."""
    labels: dict[int, int] = {}
    for model, _ in pairs:
        yield model.mapped, model.advised, tuple(sorted(model.contents.items()))
        for page, frame in sorted(model.frames.items()):
            folio = model.family.folios[frame]
            label = labels.setdefault(folio.start, len(labels))
            yield page, label, frame - folio.start, len(folio)


def _touch(nondet: Nondet, raw: int, pairs: list[tuple[Block, Any]]) -> tuple[Any, Any]:
    """Do a step to both; what each says of it."""
    what, page = TOUCHES[(raw & 0xF) % len(TOUCHES)], SEEN_PAGES[raw >> 4 & 7]
    count, content = COUNTS[raw >> 7 & 3], raw >> 9 & 0xF
    if raw >> 14 >= 10:
        what = BESIDES[(raw >> 14) - 10]
    model, block = pairs[(raw >> 13 & 1) % len(pairs)]
    match what:
        case Touch.WRITE:
            if page in model.frames and model.is_shared(page):
                nondet.reach("copied")
            model.write(page, content)
            block.write(page, content)
        case Touch.READ:
            return model.read(page), block.read(page)
        case Touch.DISCARD:
            first = page // count * count if count > 2 else min(page, SMALL_PAGES - count)
            model.discard(first, count)
            block.discard(first, count)
        case Touch.SPLIT:
            model.split()
            block.split(page)
        case Touch.COLLAPSE:
            before = model.huge
            done = model.collapse()
            nondet.reach("refused" if not done else "huge" if before else "collapsed")
            return done, block.collapse()
        case Touch.ADVISE:
            model.advised = not model.advised
            block.advise(int(model.advised))
        case _:
            _processes(nondet, what, pairs)
    return None, None


def _processes(nondet: Nondet, what: Touch, pairs: list[tuple[Block, Any]]) -> None:
    """Fork a child, if there is none, or end it; or let khugepaged come by."""
    model, block = pairs[0]
    match what:
        case Touch.FORK if len(pairs) == 1:
            pairs.append((model.fork(), block.fork()))
        case Touch.EXIT if len(pairs) == 2:
            child, its_block = pairs.pop()
            child.exit()
            its_block.exit()
        case Touch.DAEMON:
            for each, _ in pairs:
                before = each.huge
                each.daemon_comes()
                if each.huge and not before:
                    nondet.reach("collapsed by khugepaged")
            block.daemon()
