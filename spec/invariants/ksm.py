"""Invariants of same-page merging: what processes see, who may write where, and what a scan counts.

Programs are decoded from one word a step; the same programs go to the optimized merger and to the
running kernel. What no program shows for all sizes is proved step by step.
"""

from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple

from vapama.spec.domains import Domain
from vapama.spec.ksm import Ksm, Options
from vapama.spec.maps import Drawn
from vapama.spec.nondet import Nondet, invariant
from vapama.spec.subject import KSM, KSM_HOST, SHARING
from vapama.spec.words import Condition, Word, flag, ite, low_bits

# Programs

CONTENTS = (1, 2, 1, 2, 1, 0, 3, 4)
"""What is written, by the bits drawn: a few contents, which meet often."""


class Do(IntEnum):
    """What a step does; those from PIN on to a host that can be looked into."""

    WRITE = 0
    SCAN = 1
    FORK = 2
    EXIT = 3
    DISCARD = 4
    READ = 5
    ADVISE = 6
    REFUSE = 7
    UNMERGE = 8
    PIN = 9
    UNPIN = 10
    DEVICE = 11
    MOVE = 12
    MIGRATE = 13
    SETTLE = 14
    COLLAPSE = 15
    FORCE = 16
    SCAN_PART = 17


OFTEN = (
    *(Do.WRITE,) * 13,
    *(Do.SCAN,) * 9,
    *(Do.FORK, Do.DISCARD, Do.REFUSE) * 2,
    *(Do.ADVISE, Do.READ, Do.EXIT, Do.UNMERGE),
)
"""Steps that the running kernel can be driven through as well, as often as they are to come."""
OFTEN_BY_A_HOST = (
    *(Do.WRITE,) * 7,
    *(Do.SCAN,) * 5,
    *(Do.SCAN_PART, Do.FORK, Do.COLLAPSE, Do.DEVICE, Do.FORCE, Do.MIGRATE) * 2,
    *(Do.PIN, Do.UNPIN, Do.MOVE, Do.SETTLE, Do.DISCARD, Do.REFUSE, Do.REFUSE, Do.EXIT),
)


class Step(NamedTuple):
    """One step of a program: what, by which of the living processes, where, with what."""

    what: Do
    process: int
    page: int
    content: int
    times: int


def step_word(what: int, process: int = 0, page: int = 0, content: int = 0, count: int = 0) -> int:
    """The word that a step is decoded from; `what` is an index into the table of steps."""
    return what | process << 5 | page << 7 | content << 11 | count << 14


STEP = Domain(
    free=low_bits(18),
    scope=(
        step_word(OFTEN.index(Do.SCAN)),
        step_word(0),
        step_word(0, 0, 1),
        step_word(0, 0, 2),
        step_word(OFTEN.index(Do.FORK)),
        step_word(0, 1, 0, 1),
        step_word(OFTEN.index(Do.REFUSE)),
        step_word(OFTEN.index(Do.EXIT), 1),
    ),
)
HOST_STEP = Domain(
    free=low_bits(18),
    scope=(
        step_word(OFTEN_BY_A_HOST.index(Do.SCAN)),
        step_word(0),
        step_word(0, 0, 1),
        step_word(OFTEN_BY_A_HOST.index(Do.COLLAPSE)),
        step_word(OFTEN_BY_A_HOST.index(Do.DEVICE), 0, 0, 6),
        step_word(OFTEN_BY_A_HOST.index(Do.FORK)),
        step_word(OFTEN_BY_A_HOST.index(Do.MIGRATE)),
        step_word(OFTEN_BY_A_HOST.index(Do.EXIT), 1),
    ),
)
LENGTH = Domain(among=tuple(range(1, 41)), scope=(6,))
HOST_LENGTH = Domain(among=tuple(range(1, 41)), scope=(5,))
PAGES = Domain(among=(10, 6, 3, 2), scope=(3,))
LIMIT = Domain(among=(256, 2, 3, 4), scope=(256,))
OFF_OR_ON = Domain(free=1, scope=(0,))
CHECKSUM_BITS = Domain(among=(64, 1, 0), scope=(64,))
BLOCK = 4
FILE_CONTENT = 9
SEARCHED = "a program over objects; each of its steps is proved: see sharing keeps pages apart"


def steps(
    nondet: Nondet, length: int, domain: Domain, table: tuple[Do, ...], pages: int
) -> Iterator[Step]:
    """The steps of a program, decoded as they are asked for."""
    for number in range(length):
        raw = nondet.word(f"step {number}", domain)
        yield Step(
            table[(raw & 0x1F) % len(table)],
            raw >> 5 & 3,
            (raw >> 7 & 0xF) % pages,
            CONTENTS[raw >> 11 & 7],
            raw >> 14 & 0xF,
        )


@invariant(
    source="Linux, admin-guide/mm/ksm.rst and mm/ksm.rst; mm/ksm.c",
    reaches=("merged", "joined", "copied", "fork shared", "unshared"),
    needs=(KSM,),
    twin="an-item-keeps-its-node",
    searched=SEARCHED,
)
def a_scan_merges_and_counts_as_the_model_says(nondet: Nondet, subject: Any) -> None:
    """After every step contents, the frames shared and all counters are those of the model.

    A program ends where the model leaves a choice open.
    """
    pages = nondet.word("pages", PAGES)
    options = Options(
        nondet.word("max_page_sharing", LIMIT),
        nondet.word("use_zero_pages", OFF_OR_ON),
        nondet.word("smart_scan", OFF_OR_ON),
    )
    model = Ksm(pages, options)
    merger = subject.ksm(pages, **options._asdict())
    alive = [0]
    for both in (model, merger):
        both.advise(0, 0, pages, 1)
    length = nondet.word("length", LENGTH)
    for number, step in enumerate(steps(nondet, length, STEP, OFTEN, pages)):
        before = model.shared + model.sharing
        process = alive[step.process % len(alive)]
        _apply(step, pages, process, alive, model, merger)
        _note(nondet, step, model, before)
        if model.tied:
            return
        for each in alive:
            assert merger.contents(each) == model.contents(each), "contents"
            assert merger.present(each) == model.present(each), "which pages have a frame"
        assert merger.partition() == model.partition(), "which pages share a frame"
        if step.what == Do.SCAN:
            observed, expected = merger.counters(), model.counters()
            assert observed is None or tuple(observed) == expected, "counters"
            for each in alive:
                counted = tuple(merger.process_counters(each))
                assert counted == model.process_counters(each), "counters of a process"
        nondet.seen((number, _state(model)))


def _apply(step: Step, pages: int, process: int, alive: list[int], *mergers: Any) -> None:
    """Do a step to all of these; `alive` follows what became of processes."""
    what, _, page, content, times = step
    if what == Do.FORK:
        if len(alive) < 3:
            children = [merger.fork(process) for merger in mergers]
            assert len(set(children)) == 1, "the number of a child"
            alive.append(children[0])
        return
    if what == Do.EXIT:
        if process == 0:
            return
        alive.remove(process)
    for merger in mergers:
        match what:
            case Do.WRITE:
                for each in range(page, min(page + 1 + times % 4, pages)):
                    merger.write(process, each, content)
            case Do.SCAN:
                merger.scan()
            case Do.EXIT:
                merger.exit(process)
            case Do.DISCARD:
                merger.discard(process, page)
            case Do.READ:
                merger.read(process, page)
            case Do.ADVISE | Do.REFUSE:
                merger.advise(process, page, 1 + times % (pages - page), int(what == Do.ADVISE))
            case Do.UNMERGE:
                merger.unmerge()


def _note(nondet: Nondet, step: Step, model: Ksm, before: int) -> None:
    """Say what of the model's behaviour this step showed."""
    merging = model.shared + model.sharing
    if step.what == Do.SCAN and merging > before:
        nondet.reach("merged" if merging >= before + 2 else "joined")
    if model.unshared:
        nondet.reach("unshared")
    shared = [frame for each in model.alive for frame in each.frames if frame and frame.node]
    if step.what == Do.WRITE and before and len(shared) < before:
        nondet.reach("copied")
    if step.what == Do.FORK and shared:
        nondet.reach("fork shared")


def _state(model: Ksm) -> tuple[Any, ...]:
    """All that the rest of a program depends on."""
    labels: dict[int, int] = {}

    def label(thing: object) -> int:
        return labels.setdefault(id(thing), len(labels))

    def item_state(item: Any) -> tuple[Any, ...]:
        node = None if item.node is None else label(item.node)
        return item.page, item.checksum, node, item.unstable, item.key, item.age, item.skips

    processes = tuple(
        (
            tuple(f and (label(f), f.content, f.node and label(f.node)) for f in each.frames),
            tuple(each.mergeable),
            tuple(item_state(item) for item in each.items.values()),
            tuple(sorted(each.zeroed)),
        )
        for each in (*model.alive, *model.exited)
    )
    stable = tuple(
        (content, tuple((label(n), len(n.items), n.chained) for n in nodes))
        for content, nodes in sorted(model.stable.items())
    )
    return len(model.alive), processes, stable, model.options


class Private:
    """What processes must see, whatever the host does: memory of their own."""

    def __init__(self, pages: int) -> None:
        self.contents = {0: [0] * pages}
        self.contents[0][-1] = FILE_CONTENT
        self.advised = {0}
        self.pinned: set[tuple[int, int]] = set()


@invariant(
    source="Linux, mm/ksm.rst; admin-guide/mm/transhuge.rst; core-api/pin_user_pages.rst",
    reaches=("merged", "collapsed", "device wrote"),
    needs=(KSM, KSM_HOST),
    twin="write-protection-forgets-the-tlb",
    searched=SEARCHED,
)
def no_process_sees_what_is_not_its_own(nondet: Nondet, subject: Any) -> None:
    """Merged, forked, migrated, collapsed, pinned: each process reads what it or its device wrote
    last, a frame used twice is writable nowhere, and no TLB holds what a table does not say.
    """
    pages = 2 * BLOCK
    merger = subject.ksm(
        pages,
        block=BLOCK,
        frames=20 * pages,
        max_page_sharing=nondet.word("max_page_sharing", LIMIT),
        use_zero_pages=nondet.word("use_zero_pages", OFF_OR_ON),
        checksum_bits=nondet.word("checksum_bits", CHECKSUM_BITS),
    )
    private = Private(pages)
    merger.map_file(0, pages - 1, FILE_CONTENT)
    merger.advise(0, 0, pages - 1, 1)
    length = nondet.word("length", HOST_LENGTH)
    for step in steps(nondet, length, HOST_STEP, OFTEN_BY_A_HOST, pages):
        alive = list(private.contents)
        process = alive[step.process % len(alive)]
        _by_a_host(nondet, step, process, private, merger)
        for each, expected in private.contents.items():
            assert merger.contents(each) == expected, "a process sees another's bytes"
        _apart(merger)
        if len(merger.merged_frames()) > 1:
            nondet.reach("merged")


def _by_a_host(nondet: Nondet, step: Step, process: int, private: Private, merger: Any) -> None:
    """Do a step, and to the private memory what it means for processes."""
    what, _, page, content, times = step
    mine, last = private.contents[process], len(private.contents[process]) - 1
    of_a_file, pinned = page == last, (process, page) in private.pinned
    match what:
        case Do.WRITE:
            if not of_a_file:
                merger.write(process, page, content)
                mine[page] = content
        case Do.SCAN:
            merger.scan()
        case Do.FORK:
            if len(private.contents) < 3:
                child = merger.fork(process)
                private.contents[child] = list(mine)
                if process in private.advised:
                    private.advised.add(child)
        case Do.EXIT:
            if process != 0:
                merger.exit(process)
                del private.contents[process]
                private.pinned = {pin for pin in private.pinned if pin[0] != process}
        case Do.DISCARD:
            if not pinned:
                merger.discard(process, page)
                mine[page] = FILE_CONTENT if of_a_file else 0
        case Do.REFUSE:
            merger.advise(process, 0, last, times & 1)
            if times & 1:
                private.advised.add(process)
            elif process in private.advised:
                private.advised.discard(process)
                merger.end_migration()
                shared = merger.merged_frames() - {0}
                used = {u.frame for u in merger.uses() if u.process == process and u.page < last}
                assert not used & shared, "an UNMERGEABLE page is still merged"
        case Do.PIN:
            if not of_a_file:
                merger.pin(process, page)
                private.pinned.add((process, page))
        case Do.UNPIN:
            if pinned:
                merger.unpin(process, page)
                private.pinned.discard((process, page))
        case Do.DEVICE:
            if not private.pinned and not of_a_file:
                merger.pin(process, page)
                private.pinned.add((process, page))
            if private.pinned:
                process, page = sorted(private.pinned)[times % len(private.pinned)]
                merger.device_write(process, page, content)
                private.contents[process][page] = content
                nondet.reach("device wrote")
        case Do.MOVE:
            to = times % last
            moves = page != to and not of_a_file and not pinned
            if moves and (process, to) not in private.pinned:
                merger.move(process, page, to)
                mine[to], mine[page] = mine[page], 0
        case Do.MIGRATE:
            merger.begin_migration(process, page)
        case Do.SETTLE:
            merger.end_migration()
        case Do.COLLAPSE:
            if merger.collapse(process, page):
                nondet.reach("collapsed")
                _aligned(merger, process, page)
        case Do.FORCE:
            merger.force_write(process, last, content, times & 1)
            mine[last] = content
        case Do.SCAN_PART:
            merger.scan(1 + times % 5)


def _apart(merger: Any) -> None:
    """A frame that is used twice, or that KSM owns, is writable nowhere; TLBs are current."""
    uses = merger.uses()
    users: dict[int, set[tuple[int, int]]] = {}
    table = {}
    for use in uses:
        users.setdefault(use.frame, set()).add((use.process, use.page))
        if not use.cached:
            table[use.process, use.page] = use
    owned = merger.merged_frames()
    for use in uses:
        if use.writable:
            assert len(users[use.frame]) == 1, "a frame of two pages is writable"
            assert use.frame not in owned, "a merged frame is writable"
        if use.cached:
            current = table.get((use.process, use.page))
            assert current is not None, "a TLB holds a page that is not mapped"
            assert current.frame == use.frame, "a TLB holds another frame"
            assert current.writable or not use.writable, "a TLB holds rights that were taken"


def _aligned(merger: Any, process: int, page: int) -> None:
    """The frames of a huge page follow each other from an aligned one."""
    first = page - page % BLOCK
    frames = [
        use.frame
        for use in sorted(merger.uses(), key=lambda use: use.page)
        if use.process == process and not use.cached and first <= use.page < first + BLOCK
    ]
    assert frames[0] % BLOCK == 0, "a huge page is not aligned"
    assert frames == list(range(frames[0], frames[0] + BLOCK)), "a huge page is in pieces"


# The same, proved for any number of pages

INDEX = Domain(bias=lambda raw: raw >> 8 & 3, scope=(0, 1, 2))
OTHER = Domain(bias=lambda raw: 4 + (raw >> 8 & 3), scope=(1, 0))
ANY_PAGE = Domain(bias=lambda raw: raw >> 8 & 7, scope=(0, 1, 2))
FRESH = Domain(free=low_bits(40), bias=lambda raw: 16 + (raw >> 8 & 3), scope=(3, 1))
"""A frame that is free: mostly beyond those that biased entries name."""
PAGE_WORD = Domain(
    free=low_bits(52),
    bias=lambda raw: raw >> 8 & 3 | (raw >> 10 & 7) << 12,
    scope=(0x1003, 0, 0x2001),
)
CONTENT = Domain(bias=lambda raw: raw >> 8 & 1, scope=(0, 1))
DRAWN_PAGES = (("page", INDEX), ("other", OTHER), ("seen", ANY_PAGE), ("witness", ANY_PAGE))
KINDS = ("store", "fork", "merge", "unmerge", "discard", "device stores")


@invariant(
    source="Linux, mm/ksm.rst; core-api/pin_user_pages.rst",
    reaches=KINDS,
    needs=(SHARING,),
    twin="a-merged-page-stays-writable",
)
def sharing_keeps_pages_apart(nondet: Nondet, subject: Any) -> None:
    """Whatever one step does to a page, any other page reads what it did before, and no two pages
    have a frame that one of them may write to, or a device.

    `page` and `other` are those of the step, `seen` and `witness` any two pages there are. That
    pages are apart is assumed of these four only, and then shown of `seen` and `witness`. They are
    at first, when none is present; so they are after any number of steps.
    """
    k = subject.sharing()
    page, other, seen, witness = nondet.words(DRAWN_PAGES)
    nondet.assume(page != other)
    table = Drawn(nondet, "table", PAGE_WORD)
    contents = Drawn(nondet, "contents", CONTENT)
    fresh = nondet.word("fresh", FRESH)
    word, its = table(page), table(other)
    old, new = contents(k.frame_of(word)), contents(k.frame_of(its))
    owned, pinned = nondet.flag("owned"), nondet.flag("pinned")
    frame = k.frame_of(word)

    def apart(a: Word, b: Word, device: Word) -> Condition:
        """Two pages of one frame: neither may be written, and no device writes to it."""
        both = table(a) & table(b) & k.PRESENT
        theirs = k.frame_of(table(a))
        differ = (a == b) | (both == 0) | (theirs != k.frame_of(table(b)))
        read_only = (table(a) | table(b)) & k.WRITABLE == 0
        no_device = (device == 0) | (theirs != frame)
        kept: Condition = differ | read_only & no_device
        return kept

    def merged(a: Word) -> Condition:
        """A page that has the frame of the step, while KSM owns it: it may not be written."""
        here = (table(a) & k.PRESENT != 0) & (k.frame_of(table(a)) == frame)
        kept: Condition = (owned & flag(here) == 0) | (table(a) & k.WRITABLE == 0)
        return kept

    state: Condition = (pinned == 0) | (owned == 0)
    state = state & ((owned | pinned == 0) | (fresh != frame))
    everybody = (page, other, seen, witness)
    for i, a in enumerate(everybody):
        state = state & merged(a)
        state = state & ((table(a) & k.PRESENT == 0) | (k.frame_of(table(a)) != fresh))
        for b in everybody[i + 1 :]:
            state = state & apart(a, b, pinned)
    nondet.assume(state)
    before = contents(k.frame_of(table(seen)))

    # THE STEP
    value = nondet.word("value", CONTENT)
    what = nondet.one_of("step", KINDS)
    nondet.reach(what)
    expected = before
    if what == "store":
        # A page that is alone with its frame, as the host's counts say, need not copy it.
        alone = nondet.flag("alone")
        for a in (other, seen, witness):
            elsewhere = (table(a) & k.PRESENT == 0) | (k.frame_of(table(a)) != frame) | (a == page)
            nondet.assume((alone == 0) | elsewhere)
        nondet.assume((alone == 0) | (owned == 0))
        if k.may_write(word) == 0:
            table.put(page, k.after_write_fault(word, alone, fresh))
            nondet.reach("copied")
        contents.put(k.frame_of(table(page)), value)
        expected = ite(seen == page, value, before)
    elif what == "fork":
        nondet.assume(its & k.PRESENT == 0)
        nondet.assume(word & k.PRESENT != 0)
        table.put(page, k.forked_parent(word, pinned))
        table.put(other, k.forked_child(word, pinned, fresh))
        if pinned:
            contents.put(fresh, old)
            nondet.reach("pinned fork")
        expected = ite(seen == other, old, before)
    elif what == "merge":
        nondet.assume(word & its & k.PRESENT != 0)
        if k.may_merge(ite(old == new, 1, 0), pinned):
            table.put(page, k.protected(word))
            table.put(other, k.merged(table(page)))
            owned = owned | 1
            nondet.reach("merged")
    elif what == "unmerge":
        nondet.assume(word & k.PRESENT != 0)
        nondet.assume(pinned == 0)
        table.put(page, k.unshared(fresh))
        contents.put(fresh, old)
        owned = owned & 0
    elif what == "discard":
        nondet.assume(pinned == 0)
        table.put(page, table(page) & 0)
        expected = ite(seen == page, 0, before)
    else:
        nondet.assume((pinned != 0) & (word & k.PRESENT != 0))
        contents.put(frame, value)
        expected = ite(seen == page, value, before)

    # WHAT ANYBODY SEES
    absent = table(seen) & k.PRESENT == 0
    reads = contents(k.frame_of(table(seen)))
    assert absent | (reads == expected), "a page reads what is not its own"
    assert apart(seen, witness, pinned), "a frame of two pages is writable"
    assert merged(seen), "a merged frame is writable"
