"""Invariants of cached translations: what is used of them, and what is left after an operation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from vapama.spec.access import Access
from vapama.spec.cpu import (
    LA57,
    LMA,
    LME,
    NXE,
    PAE,
    PCIDE,
    PE,
    PG,
    PKE,
    SMAP,
    SMEP,
    WP,
    Cpu,
)
from vapama.spec.domains import CR4, ENTRY, FLAG, Domain
from vapama.spec.memory import Memory, Sparse, Watched
from vapama.spec.nondet import ACCESS_DRAWS, CPU_DRAWS, Nondet, invariant
from vapama.spec.outcomes import Outcome, P, PageFault, Translated, kind
from vapama.spec.paging import (
    ACCESSED,
    DIRTY,
    EXECUTE_DISABLE,
    FRAME,
    GLOBAL,
    PAGE_SIZE,
    PRESENT,
    USER,
    WRITABLE,
    address_width,
    denied_by_key,
    denied_by_rights,
    reserved_anywhere,
    translate,
)
from vapama.spec.subject import CACHED, LOADS, TLB, UPDATES, Cached, Tlb, agree
from vapama.spec.tlb import KEEP, PGE, History, Processor, Tag
from vapama.spec.words import Condition, Word, bit, is_canonical, ite, low_bits

KEY = 0xF << 59

# PROGRAMS
#
# They run on a small arena: two roots that share all tables below, a second table at each of the
# lower levels, and a few pages. Only the first two entries of a table are used.

ROOTS = (0x1000, 0x2000)
PDPT, DIRECTORY, TABLE, OTHER_DIRECTORY, OTHER_TABLE = 0x3000, 0x4000, 0x5000, 0x6000, 0x7000
PAGES = (0x8000, 0x9000, 0xA000)
LIMIT = 0x10000
ALL = PRESENT | WRITABLE | USER | ACCESSED | DIRTY
ARENA = {
    ROOTS[0]: PDPT | ALL,
    ROOTS[0] + 8: PDPT | ALL,
    ROOTS[1]: PDPT | ALL,
    PDPT: DIRECTORY | ALL,
    PDPT + 8: 1 << 30 | ALL | PAGE_SIZE,
    DIRECTORY: TABLE | ALL,
    DIRECTORY + 8: 1 << 21 | ALL | PAGE_SIZE,
    TABLE: PAGES[0] | ALL,
    TABLE + 8: PAGES[1] | ALL | GLOBAL,
    OTHER_DIRECTORY: OTHER_TABLE | ALL & ~WRITABLE,
    OTHER_TABLE: PAGES[2] | ALL,
}
A, B = 0x0123, 0x1123
ADDRESSES = (A, B, 0x20_0123, 0x20_1123, 0x4000_0123, 1 << 39 | A)
TABLES = (TABLE, TABLE + 8, DIRECTORY, DIRECTORY + 8, PDPT, PDPT + 8, ROOTS[0], OTHER_TABLE)
PCIDS = (0, 1, 2)


class World:
    """A subject's processor and the specification's, on memories that hold the same."""

    def __init__(self, nondet: Nondet, subject: Any) -> None:
        cpu = Cpu(PG | PE | WP, ROOTS[0], PAE | PGE | PCIDE, LME | LMA | NXE)
        self.nondet = nondet
        self.processor = Processor(History(Sparse(ARENA, LIMIT)), cpu)
        self.subject: Tlb = subject.tlb(cpu, Sparse(ARENA, LIMIT), sets=2)

    def access(self, access: Access) -> None:
        """The subject makes an access, and has an outcome that the specification allows."""
        # OBSERVE
        processor, history = self.processor, self.processor.history
        observed = self.subject.translate(access)
        assert processor.allows(access, observed), f"{observed} is not allowed"

        # FOLLOW
        self.follow(access, observed)
        if isinstance(observed, Translated):
            for address, bits in observed.updates:
                entry = history.load(address)
                if entry | bits != entry:
                    history.write(address, entry | bits)

    def follow(self, access: Access, observed: Outcome) -> None:
        """What the outcome of an access drops."""
        fresh = self.processor.fresh(access)
        if isinstance(observed, PageFault):
            if isinstance(fresh, Translated):
                self.nondet.reach("a fault that memory does not call for")
            self.processor.page_fault(access.address)
        elif isinstance(observed, Translated) and getattr(fresh, "pa", None) != observed.pa:
            self.nondet.reach("a page that memory does not name any more")

    def nothing(self) -> None:
        """Nothing happens."""

    def write(self, address: Word, value: Word) -> None:
        """Software writes an entry."""
        self.processor.history.write(address, value)
        self.subject.write(address, value)

    def toggle(self, register: str, bits: Word) -> None:
        """Bits of a register change. CR4.PCIDE is set only while the PCID is 0."""
        cpu = self.processor.cpu
        if bits == PCIDE and cpu.cr3 & 0xFFF:
            return
        cpu = cpu._replace(**{register: getattr(cpu, register) ^ bits})
        self.processor.change(cpu)
        self.subject.change(cpu)

    def mov_cr3(self, operand: Word) -> None:
        """MOV to CR3, whose low bits are no PCID, and bit 63 reserved, without CR4.PCIDE."""
        if self.processor.cpu.cr4 & PCIDE == 0:
            operand = operand & ~KEEP & ~0xFFF
        self.processor.mov_cr3(operand)
        self.subject.mov_cr3(operand)

    def invlpg(self, address: Word) -> None:
        """INVLPG."""
        self.processor.invlpg(address)
        self.subject.invlpg(address)

    def invpcid(self, kind: int, pcid: Word, address: Word) -> None:
        """INVPCID, which without CR4.PCIDE is for PCID 0 alone."""
        pcid = pcid if self.processor.cpu.cr4 & PCIDE else 0
        self.processor.invpcid(kind, pcid, address)
        self.subject.invpcid(kind, pcid, address)

    def vm_transition(self, vpid: Word) -> None:
        """A VM entry or exit that changes nothing else."""
        cpu = self.processor.cpu
        self.processor.vm_transition(cpu, vpid)
        self.subject.vm_transition(cpu, vpid)

    def invvpid(self, kind: int, vpid: Word, address: Word) -> None:
        """INVVPID."""
        self.processor.invvpid(kind, vpid, address)
        self.subject.invvpid(kind, vpid, address)

    def state(self) -> tuple[Any, ...]:
        """All that what follows depends on."""
        processor, history = self.processor, self.processor.history
        memory = tuple(history.load(where) for where in ARENA)
        return (
            memory,
            processor.context[1:],
            processor.cached(ADDRESSES[:2]),
            tuple(self.subject.cached()),
        )


class Operation(NamedTuple):
    """A step of a program: how a report tells it, a method of `World`, and its arguments."""

    told: str
    method: str
    arguments: tuple[Any, ...]


def _accesses() -> list[Operation]:
    kinds = {"read": (0, 0, 1), "write": (1, 0, 1), "supervisor write": (1,), "fetch": (0, 1, 1)}
    return [
        Operation(f"{told} {address:#x}", "access", (Access(address, *kind),))
        for told, kind in kinds.items()
        for address in ADDRESSES
    ]


def _writes() -> list[Operation]:
    """Each entry gets less, something else, and what it had."""
    found = []
    for where in TABLES:
        usual = ARENA[where]
        removed = (WRITABLE, USER, DIRTY, ACCESSED | DIRTY, usual)
        values = [usual, *(usual & ~bits for bits in removed)]
        values += [usual ^ bits for bits in (EXECUTE_DISABLE, GLOBAL, 1 << 51, 1 << 59)]
        values += [usual ^ DIRECTORY ^ OTHER_DIRECTORY, usual ^ PAGE_SIZE]
        found += [Operation(f"[{where:#x}] := {v:#x}", "write", (where, v)) for v in values]
    return found


def invalidations() -> list[Operation]:
    """What drops mappings by linear address, of one PCID or of any."""
    return [
        *(Operation(f"INVLPG {a:#x}", "invlpg", (a,)) for a in ADDRESSES),
        *(
            Operation(f"INVPCID 0 {pcid}, {a:#x}", "invpcid", (0, pcid, a))
            for pcid in PCIDS
            for a in ADDRESSES
        ),
        *(Operation(f"INVPCID 1 {pcid}", "invpcid", (1, pcid, 0)) for pcid in PCIDS),
        Operation("INVPCID 2", "invpcid", (2, 0, 0)),
        Operation("INVPCID 3", "invpcid", (3, 0, 0)),
    ]


def registers() -> list[Operation]:
    """New values for the registers that translation depends on."""
    operands = [root | pcid | keep for root in ROOTS for pcid in PCIDS for keep in (0, KEEP)]
    toggled = (
        *(("cr4", bit) for bit in (PGE, PCIDE, SMEP, SMAP, PKE)),
        ("cr0", WP),
        ("efer", NXE),
        ("pkru", 0b01_00),
        ("pkru", 0b10_00),
    )
    return [
        *(Operation(f"CR3 := {operand:#x}", "mov_cr3", (operand,)) for operand in operands),
        *(Operation(f"{name} ^= {bits:#x}", "toggle", (name, bits)) for name, bits in toggled),
    ]


def _vmx() -> list[Operation]:
    return [
        *(Operation(f"VPID := {vpid}", "vm_transition", (vpid,)) for vpid in (0, 1)),
        *(Operation(f"INVVPID {kind} 1", "invvpid", (kind, 1, 0)) for kind in (1, 2, 3)),
        *(Operation(f"INVVPID 0 1, {a:#x}", "invvpid", (0, 1, a)) for a in ADDRESSES),
    ]


NOTHING = Operation("", "nothing", ())
"""The first choice, which a program is shrunk to."""
ACCESSES, WRITES = _accesses(), _writes()
WIDE = [NOTHING, *ACCESSES * 8, *WRITES * 2, *invalidations(), *registers() * 2, *_vmx()]
"""Steps of programs at random, as often as they are to come."""
NARROW = [
    NOTHING,
    Operation(f"read {A:#x}", "access", (Access(A, user=1),)),
    Operation(f"write {A:#x}", "access", (Access(A, 1, user=1),)),
    Operation(f"read {B:#x}", "access", (Access(B, user=1),)),
    Operation(f"[{TABLE:#x}] := 0", "write", (TABLE, 0)),
    Operation(f"[{TABLE:#x}] := global", "write", (TABLE, PAGES[1] | ALL | GLOBAL)),
    Operation(f"[{TABLE:#x}] := read-only", "write", (TABLE, PAGES[0] | ALL & ~WRITABLE)),
    Operation(f"[{DIRECTORY:#x}] := other", "write", (DIRECTORY, OTHER_TABLE | ALL)),
    Operation(f"[{DIRECTORY:#x}] := 2M", "write", (DIRECTORY, 1 << 21 | ALL | PAGE_SIZE)),
    Operation(f"INVLPG {A:#x}", "invlpg", (A,)),
    Operation(f"INVLPG {B:#x}", "invlpg", (B,)),
    Operation(f"INVPCID 0 0, {A:#x}", "invpcid", (0, 0, A)),
    Operation("CR3 := PCID 0", "mov_cr3", (ROOTS[0],)),
    Operation("CR3 := PCID 0, keep", "mov_cr3", (ROOTS[0] | KEEP,)),
    Operation("CR3 := PCID 1, keep", "mov_cr3", (ROOTS[0] | 1 | KEEP,)),
    Operation("CR4.PGE toggled", "toggle", ("cr4", PGE)),
]
"""Steps of which a small scope runs every program."""
NARROW_STEPS = Domain(among=(0, 0, 0, 4), scope=(4,))
"""How many steps a narrow program has; 0 for a wide one, of `WIDE_STEPS`."""
WIDE_STEPS = 24


@invariant(
    source="Intel SDM Vol. 3A, 4.10; Vol. 3C, 28.3",
    reaches=(
        "a page that memory does not name any more",
        "a fault that memory does not call for",
    ),
    needs=(TLB,),
    twin="invlpg-misses-large-pages",
    searched="a program of many steps; the claims about one step are proved for any state",
)
def a_cached_outcome_is_an_allowed_one(nondet: Nondet, subject: Any) -> None:
    """Whatever a program did before, an access has an outcome that the architecture allows."""
    world, told = World(nondet, subject), list[str]()
    narrow = nondet.word("steps", NARROW_STEPS)
    operations, steps = (NARROW, narrow) if narrow else (WIDE, WIDE_STEPS)
    try:
        for step in range(steps):
            if narrow:
                nondet.seen((steps - step, world.state()))
            operation = nondet.one_of(f"step {step}", operations)
            told += [operation.told] if operation.told else []
            getattr(world, operation.method)(*operation.arguments)
    except AssertionError as error:
        raise AssertionError(f"after {'; '.join(told)}: {error}") from None


RIGHT = {
    "INVLPG": lambda world, access: world.invlpg(access.address),
    "INVPCID 2": lambda world, access: world.invpcid(2, 0, 0),
    "CR4.PGE toggled": lambda world, access: world.toggle("cr4", PGE),
    "CR4.PCIDE toggled": lambda world, access: world.toggle("cr4", PCIDE),
    "INVVPID 1": lambda world, access: world.invvpid(1, 0, 0),
}
"""Operations after which nothing is left that may be used for an address."""


@invariant(
    source="Intel SDM Vol. 3A, 4.10.4.2",
    reaches=("memory said something else before", *RIGHT),
    needs=(TLB,),
    twin="a-pge-toggle-keeps-global-pages",
    searched="the claims about one step are proved for any state",
)
def after_the_right_invalidation_only_memory_counts(nondet: Nondet, subject: Any) -> None:
    """An access, a change of any table, an invalidation that covers the address: the next access
    has the outcome of a walk that finds nothing cached, and no other is allowed.
    """
    # CACHE, CHANGE, INVALIDATE
    world = World(nondet, subject)
    access: Access = nondet.one_of("access", ACCESSES).arguments[0]
    before = world.processor.fresh(access)
    world.access(access)
    world.write(*nondet.one_of("write", WRITES).arguments)
    name = nondet.one_of("invalidation", list(RIGHT))
    RIGHT[name](world, access)
    nondet.reach(name)

    # ACCESS AGAIN
    fresh = world.processor.fresh(access)
    if _told(fresh) != _told(before):
        nondet.reach("memory said something else before")
    assert all(
        _told(allowed.outcome) == _told(fresh) for allowed in world.processor.allowed(access)
    )
    observed = world.subject.translate(access)
    assert _told(observed) == _told(fresh)


def _told(outcome: Any) -> tuple[Any, ...]:
    """The kind of an outcome, and where it leads or what it reports."""
    seen = (getattr(outcome, name, None) for name in ("pa", "error_code", "address"))
    return (type(outcome), *seen)


# STEP BY STEP
#
# Each of these claims begins with anything cached that can be, and makes one step. Together they
# carry over to any number of steps: what is cached was met by a walk, and nothing since had to drop
# it. A walk that caches keeps that so (`what_a_walk_caches_is_what_it_met`, and
# `a_cached_table_stands_for_the_walk_to_it`), and so does an operation that invalidates
# (`an_operation_leaves_nothing_that_it_must_drop`); a write to memory touches nothing that is
# cached. And what is cached so may be used (`a_cached_page_is_used_as_it_was_met`).


def _near(free: Word) -> Domain:
    """Any of these bits, mostly none or one: how what is cached differs from what is asked for."""

    def bias(raw: int) -> Word:
        return (
            0
            if raw & 1
            else raw >> 8 & raw >> 24 & free
            if raw & 2
            else 1 << (raw >> 8 & 63) & free
        )

    return Domain(free=free, bias=bias, scope=tuple(sorted({0, 1 << 12 & free or 1})))


PCID, VPID = low_bits(12), low_bits(16)
PAGE, TABLE_AT = 0, 1
KINDS = [(PAGE, level) for level in (1, 2, 3)] + [(TABLE_AT, level) for level in (2, 3, 4, 5)]
"""What can be cached: pages and tables, by the level of the entry that leads to them."""
ENTRY_KEPT = FRAME | WRITABLE | USER | EXECUTE_DISABLE
"""What is cached of the entries that lead to a table; of a page also D, its key, and `ABOVE`."""
ABOVE = 1 << 3
"""R/W of all entries above that of a cached page (see `Cached`)."""


class Start(NamedTuple):
    """A processor that has one thing cached, an access, and the same for the specification."""

    cpu: Cpu
    vpid: Word
    access: Access
    cached: Cached

    @property
    def pcid(self) -> Word:
        """The current PCID."""
        return ite(self.cpu.cr4 & PCIDE != 0, self.cpu.cr3 & PCID, 0)

    @property
    def is_usable(self) -> Condition:
        """Whether what is cached is for the address accessed, and for the current VPID and PCID."""
        cached = self.cached
        shift = _shift(cached.level)
        same_region = cached.address >> shift == self.access.address >> shift
        same_pcid = (cached.pcid == self.pcid) | (cached.is_global == 1)
        return same_region & same_pcid & (cached.vpid == self.vpid)


def _shift(level: int) -> Word:
    return 3 + 9 * level


def _few(draws: Sequence[tuple[str, Domain]], *many: str) -> tuple[tuple[str, Domain], ...]:
    """Draws of which a small scope takes one value each, but for those named."""
    return tuple(
        (name, domain if name in many else replace(domain, scope=domain.representatives(1)[:1]))
        for name, domain in draws
    )


SOME_CR4 = replace(CR4, scope=(PAE | PGE | PCIDE, PAE))
CPU_FEW = tuple((name, SOME_CR4 if name == "cr4" else of) for name, of in _few(CPU_DRAWS, "cr4"))
EVERY_KIND, ONE_KIND = _few(ACCESS_DRAWS, "access"), _few(ACCESS_DRAWS)


def _start(
    nondet: Nondet,
    kinds: Sequence[tuple[int, int]] = KINDS,
    accesses: Sequence[tuple[str, Domain]] = EVERY_KIND,
) -> Start:
    """Any control state, any access, and anything cached that can be."""
    # PROCESSOR AND ACCESS
    maxphyaddr, cr0, cr3, *others = nondet.words(CPU_FEW)
    cpu = Cpu._make((cr0, cr3 & low_bits(maxphyaddr), *others, maxphyaddr, 1, None))
    how, accessed = nondet.words(accesses)
    access = Access(accessed, bit(how, 1), bit(how, 4), bit(how, 2), bit(how, 0))

    # WHAT IS CACHED: of an address that is translated, without reserved bits
    is_table, level = nondet.one_of("cached", kinds)
    nondet.assume(level <= 3 or cpu.levels >= level)
    vpid, region, pcid, other_vpid, is_global, entry = nondet.words(CACHED_DRAWS)
    offset = low_bits(_shift(level))
    address = (accessed ^ region) & ~offset
    nondet.assume(is_canonical(address, address_width(cpu.levels)))
    is_global = 0 if is_table else is_global
    pcid = ite(is_global == 1, 0, (cpu.cr3 & PCID ^ pcid) * bit(cpu.cr4, 17))
    kept = ENTRY_KEPT if is_table else ENTRY_KEPT & ~(offset & FRAME) | ABOVE | DIRTY | KEY
    entry = entry & kept
    nondet.assume(entry & reserved_anywhere(cpu) == 0)
    cached = Cached(is_table, level, address, entry, vpid ^ other_vpid, pcid, is_global)
    return Start(cpu, vpid, access, cached)


CACHED_DRAWS = (
    ("vpid", Domain(free=VPID, scope=(1,))),
    ("cached region", _near(low_bits(64))),
    ("cached pcid", _near(PCID)),
    ("cached vpid", _near(VPID)),
    ("cached global", FLAG),
    ("cached entry", ENTRY),
)


class Nothing:
    """A memory in which no entry is present, so that a page can only come from what is cached."""

    limit: Word = 1 << 52

    def load(self, address: Word) -> Word:
        """0."""
        return 0


def _tlb(subject: Any, start: Start, memory: Memory) -> Tlb:
    """The subject's processor, which has just the one thing cached."""
    tlb: Tlb = subject.tlb(start.cpu, memory, start.vpid)
    tlb.put(start.cached)
    return tlb


@invariant(
    source="Intel SDM Vol. 3A, 4.10.2.2, 4.10.2.4 and 4.6; Vol. 3C, 28.3.2",
    reaches=("used", "used globally", "used, and denied", "not used"),
    needs=(TLB, CACHED),
    twin="the-pcid-is-not-compared",
    bound="with no entry present in memory",
)
def a_cached_page_is_used_as_it_was_met(nondet: Nondet, subject: Any) -> None:
    """A cached page is used for its addresses alone, by its VPID and PCID or globally; and whether
    it may be is judged by the rights and key that were cached and the control state of now. A write
    does not use one that is not dirty.
    """
    start = _start(nondet, KINDS[:3])
    cpu, _, access, cached = start
    outcome = _tlb(subject, start, Nothing()).translate(access)
    user, writable = bit(cached.entry, 2), bit(cached.entry, 1)
    denied = denied_by_rights(cpu, access, user, writable, bit(cached.entry, 63))
    by_key = denied_by_key(cpu, access, user, cached.entry)
    if isinstance(outcome, Translated):
        nondet.reach("used globally" if cached.is_global == 1 else "used")
        assert start.is_usable
        assert denied | by_key == 0
        assert (access.write == 0) | (cached.entry & DIRTY != 0)
        offset = low_bits(_shift(cached.level))
        assert outcome.pa == cached.entry & FRAME | access.address & offset
    elif isinstance(outcome, PageFault) and outcome.error_code & P != 0:
        nondet.reach("used, and denied")
        assert start.is_usable
        assert denied | by_key == 1
    else:
        nondet.reach("not used")
        assert outcome.updates == () if isinstance(outcome, Translated) else True


@invariant(
    source="Intel SDM Vol. 3A, 4.10.2.2, 4.10.2.3 and 4.10.3",
    reaches=("page cached", "table cached", "nothing cached"),
    needs=(TLB, CACHED, UPDATES, LOADS),
    twin="rights-are-cached-from-the-leaf",
    bound="4-level paging, nothing cached before",
)
def what_a_walk_caches_is_what_it_met(nondet: Nondet, subject: Any) -> None:
    """After a walk there is cached what its entries say: frame, dirty flag and key of the last, the
    AND and OR of their rights; only with their accessed flags set, and nothing if it faulted.
    """
    # WALK
    cpu, memory, access = nondet.cpu(), Watched(nondet.memory("guest")), nondet.access()
    nondet.assume(cpu.cr4 & LA57 == 0)
    tlb: Tlb = subject.tlb(cpu, memory)
    outcome = tlb.translate(access)
    if not isinstance(outcome, Translated):
        nondet.reach("nothing cached")
        assert tlb.cached() == []
        return

    # COMPARE with the entries that the walk read, from level 4 down
    loads = memory.loads[: 5 - outcome.level]
    entries = [memory.load(where) for where in loads]
    pcid = ite(cpu.cr4 & PCIDE != 0, cpu.cr3 & PCID, 0)
    for cached in tlb.cached():
        nondet.reach("table cached" if cached.is_table else "page cached")
        depth = 4 - cached.level
        entry, every, some = entries[depth], entries[0], entries[0]
        for other in entries[1 : depth + 1]:
            every, some = every & other, some | other
        shift = _shift(cached.level)
        kept = entry & FRAME | every & (WRITABLE | USER) | some & EXECUTE_DISABLE
        is_global = 0
        if not cached.is_table:
            assert cached.level == outcome.level
            kept = kept & ~(low_bits(shift) & FRAME) | entry & (DIRTY | KEY) | access.write * DIRTY
            above = WRITABLE
            for other in entries[:depth]:
                above = above & other
            kept = kept | above << 2
            is_global = bit(entry, 8) & bit(cpu.cr4, 7)
        assert cached.entry == kept
        assert cached.address >> shift == access.address >> shift
        assert cached.is_global == is_global
        assert (cached.vpid == 0) & (cached.pcid == ite(is_global == 1, 0, pcid))
        assert outcome.updates[depth].address == loads[depth]
        assert outcome.updates[depth].bits & ACCESSED != 0


class Scripted:
    """Memory in which a walk meets a cached table first: entries that lead to it with the rights
    that were cached, and from there on what memory holds.
    """

    def __init__(self, memory: Memory, cached: Cached, levels: int) -> None:
        self.memory = memory
        self.limit: Word = memory.limit
        usual = PRESENT | ACCESSED | WRITABLE | USER
        self.entries = [usual] * (levels - cached.level) + [cached.entry | PRESENT | ACCESSED]

    def load(self, address: Word) -> Word:
        """The next of the entries that lead to the table, then those of memory."""
        return self.entries.pop(0) if self.entries else self.memory.load(address)


@invariant(
    source="Intel SDM Vol. 3A, 4.10.3",
    reaches=("translated from the table", "page fault from the table", "from the root"),
    needs=(TLB, CACHED, UPDATES, LOADS),
    twin="rights-of-a-cached-table-are-forgotten",
    bound="tables of levels 2 and 3, 4-level paging",
)
def a_cached_table_stands_for_the_walk_to_it(nondet: Nondet, subject: Any) -> None:
    """With a table cached for its address, VPID and PCID, an access has the outcome of the walk
    from there on, with the rights that were cached; any other walk begins at the root.
    """
    start = _start(nondet, KINDS[3:5])
    cpu, _, access, cached = start
    memory = Watched(nondet.memory("guest"))
    nondet.assume((cpu.cr4 & LA57 == 0) & (memory.limit != 0))
    if start.is_usable:
        rooted = type(cpu)._make(cpu._replace(cr3=cpu.cr3 & PCID))
        expected = translate(rooted, Scripted(memory.memory, cached, cpu.levels), access)
        nondet.reach(f"{kind(expected)} from the table")
        if isinstance(expected, Translated):
            expected.updates = expected.updates[cpu.levels - cached.level + 1 :]
        observed = _tlb(subject, start, memory).translate(access)
        assert agree(expected, observed, memory.memory, subject.capabilities)
    else:
        nondet.reach("from the root")
        _tlb(subject, start, memory).translate(access)
        assert not memory.loads or memory.loads[0] & FRAME == cpu.cr3 & FRAME


OPERATIONS = (
    "INVLPG",
    *(f"INVPCID {kind}" for kind in range(4)),
    *(f"INVVPID {kind}" for kind in range(4)),
    "MOV CR3",
    "MOV CR4",
    "VM transition",
)
ADDRESS = ("operand", replace(_near(low_bits(64)), scope=(0, 1 << 12, 1 << 21)))
OTHER_PCID, OTHER_VPID = ("pcid", _near(PCID)), ("other vpid", _near(VPID))
ONE_OF_PCID, ONE_OF_VPID = (ADDRESS, OTHER_PCID), (ADDRESS, OTHER_VPID)
NEW_CR3 = ("new cr3", replace(_near(low_bits(52) | KEEP), scope=(0, 1, KEEP)))
TOGGLED = replace(_near(PGE | PCIDE | SMEP | SMAP | PKE), scope=(0, PGE, PCIDE, SMEP))


def _operate(nondet: Nondet, start: Start, both: Sequence[Any]) -> None:
    """Any operation that may invalidate something, on the specification's processor and the
    subject's.
    """
    cpu, cached = start.cpu, start.cached
    pcids = bit(cpu.cr4, 17)
    operation = nondet.one_of("operation", OPERATIONS)
    nondet.reach(operation)
    match operation.split():
        case ["INVLPG"]:
            address = cached.address ^ nondet.word(*ADDRESS)
            for it in both:
                it.invlpg(address)
        case ["INVPCID", kind]:
            address, pcid = nondet.words(ONE_OF_PCID)
            for it in both:
                it.invpcid(int(kind), (cached.pcid ^ pcid) * pcids, cached.address ^ address)
        case ["INVVPID", kind]:
            address, vpid = nondet.words(ONE_OF_VPID)
            for it in both:
                it.invvpid(int(kind), cached.vpid ^ vpid, cached.address ^ address)
        case ["MOV", "CR3"]:
            usable = low_bits(cpu.maxphyaddr) | KEEP * pcids
            operand = (cpu.cr3 ^ nondet.word(*NEW_CR3)) & usable
            for it in both:
                it.mov_cr3(operand)
        case ["MOV", "CR4"]:
            cr4 = cpu.cr4 ^ nondet.word("toggled", TOGGLED)
            nondet.assume((cr4 & ~cpu.cr4 & PCIDE == 0) | (cpu.cr3 & PCID == 0))
            for it in both:
                it.change(cpu._replace(cr4=cr4))
        case ["VM", "transition"]:
            vpid = cached.vpid ^ nondet.word(*OTHER_VPID)
            for it in both:
                it.vm_transition(cpu, vpid)


@invariant(
    source="Intel SDM Vol. 3A, 4.10.4.1; Vol. 3C, 28.3.3.1",
    reaches=("kept", "dropped", *OPERATIONS),
    needs=(TLB, CACHED),
    twin="invlpg-misses-large-pages",
)
def an_operation_leaves_nothing_that_it_must_drop(nondet: Nondet, subject: Any) -> None:
    """Whatever is cached and whatever the operation, what it must invalidate is gone afterwards."""
    start = _start(nondet, accesses=ONE_KIND)
    tlb = _tlb(subject, start, Nothing())
    processor = Processor(History(Nothing()), start.cpu, start.vpid)
    _operate(nondet, start, (processor, tlb))
    left = tlb.cached()
    nondet.reach("kept" if left else "dropped")
    for is_table, level, address, _, vpid, pcid, is_global in left:
        tag, shift = Tag(vpid, pcid), _shift(level)
        for _, invalidation in processor.invalidations:
            if is_table:
                assert not invalidation.drops_structures(tag, address, shift)
            else:
                assert not invalidation.drops_translation(tag, address, shift, is_global == 1)
