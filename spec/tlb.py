"""Which translations a processor may use: those that its caches may still hold.

TLBs and paging-structure caches are not modelled: a processor may have any of them, hold on to what
they hold for as long as it likes, and fill them by speculation at any time. Memory keeps its
history instead, and each processor what it invalidated when. A *stale walk* is the walk of
`spec.paging`, in which a first part of the entries has the values of an earlier time, and the rest
the values of now. It is allowed if nothing since that time had to drop what was cached of it.

Read beside the Intel SDM Vol. 3A, 4.10 (caching translation information), and Vol. 3C, 28.3
(28.4 and 29.4 in later editions; caching with VMX). AMD's APM Vol. 2, 5.5 and 15.16, says the same
unless noted.

In short, for those who build on this:

    history = History(memory)                   # memory as it is at the start
    processor = Processor(history, cpu)         # several share one history
    history.write(address, entry)               # by whomever, accessed and dirty flags too
    processor.invlpg(address)                   # and so on, one method an operation
    for allowed in processor.allowed(access):   # or, of what was observed:
        ...
    assert processor.allows(access, outcome)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeAlias

from vapama.spec.access import Access
from vapama.spec.cpu import PAE, PCIDE, PG, SMEP, Cpu, ImpossibleState
from vapama.spec.memory import Memory
from vapama.spec.outcomes import (
    RSVD,
    NonCanonical,
    Outcome,
    OutsideMemory,
    P,
    PageFault,
    Translated,
    Update,
)
from vapama.spec.paging import (
    ACCESSED,
    DIRTY,
    GLOBAL,
    PRESENT,
    address_width,
    translate,
)
from vapama.spec.words import Condition, Word, is_canonical, ite, low_bits

PGE = 1 << 7
"""CR4.PGE: entries with G=1 map global pages."""
KEEP = 1 << 63
"""Bit 63 of the operand of MOV to CR3, with CR4.PCIDE: nothing need be invalidated."""

Times: TypeAlias = int
"""A set of times: bit t is 1 if time t is in it. Time passes by one at each write and operation."""


class History:
    """A memory, and all the values that its entries have had."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.limit: Word = memory.limit
        self.time = 0
        self.written: dict[Word, list[tuple[int, Word]]] = {}
        """What was written to an address, and when."""

    def write(self, address: Word, value: Word) -> None:
        """Put `value` into the entry at `address`."""
        self.time += 1
        self.written.setdefault(address, []).append((self.time, value))

    def writes(self, address: Word) -> Sequence[tuple[int, Word]]:
        """The times and values of all writes to an address."""
        return self.written.get(address, ())

    def load(self, address: Word) -> Word:
        """The entry at `address` as it is now."""
        writes = self.writes(address)
        return writes[-1][1] if writes else self.memory.load(address)

    def values(self, address: Word) -> Iterator[tuple[Word, Times]]:
        """The values that the entry at `address` has had, and when, the value of now first."""
        until = self.time + 1
        for time, value in reversed(self.writes(address)):
            yield value, (1 << until) - (1 << time)
            until = time
        yield self.memory.load(address), (1 << until) - 1


class Listed(History):
    """A history whose addresses may be symbols: it compares them, and looks none up."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self.list: list[tuple[int, Word, Word]] = []

    def write(self, address: Word, value: Word) -> None:
        """Put `value` into the entry at `address`."""
        self.time += 1
        self.list.append((self.time, address, value))

    def writes(self, address: Word) -> Sequence[tuple[int, Word]]:
        """The times and values of all writes to an address."""
        return [(time, value) for time, where, value in self.list if where == address]


class Tag(NamedTuple):
    """What cached mappings are associated with. Source: SDM Vol. 3C, 28.3.1 and 28.3.2.

    `vpid` is the VPID, on AMD's processors the ASID. `ep4ta` is bits 51:12 of the EPTP under which
    a combined mapping was made, None for a linear mapping.
    """

    vpid: Word
    pcid: Word
    ep4ta: Word | None = None


ALL, PATH, NONE = "all", "path", "none"
"""Of the paging-structure caches, an invalidation of one address drops the entries for all
addresses, those that would be used for the address, or none."""


class Invalidation(NamedTuple):
    """What an operation must drop: what is associated with all that it names (None: with any).

    `global_too` is whether it drops global translations, which it then does for every PCID.
    Source: SDM Vol. 3A, 4.10.4.1; Vol. 3C, 28.3.3.1.
    """

    vpid: Word | None = None
    pcid: Word | None = None
    address: Word | None = None
    global_too: bool = False
    structures: str = ALL

    def drops_translation(
        self, tag: Tag, address: Word, shift: Word, is_global: Condition
    ) -> Condition:
        """Whether it drops the translation of a page of 2**shift bytes that `address` is in."""
        if not self._concerns(tag.vpid, self.vpid):
            return False
        if not self._serves(address, shift):
            return False
        if is_global:
            return self.global_too
        return self._concerns(tag.pcid, self.pcid)

    def drops_structures(self, tag: Tag, address: Word, shift: Word) -> Condition:
        """Whether it drops a paging-structure-cache entry that serves the 2**shift bytes around
        `address`.
        """
        if self.structures == NONE or not self._concerns(tag.vpid, self.vpid):
            return False
        if self.structures == PATH and not self._serves(address, shift):
            return False
        return self._concerns(tag.pcid, self.pcid)

    def _serves(self, address: Word, shift: Word) -> Condition:
        return True if self.address is None else self.address >> shift == address >> shift

    @staticmethod
    def _concerns(associated: Word, named: Word | None) -> Condition:
        return True if named is None else associated == named


class Context(NamedTuple):
    """What a processor runs with, from time `start` on."""

    start: int
    cpu: Cpu
    vpid: Word = 0

    @property
    def tag(self) -> Tag:
        """What mappings are associated with that are made here. PCID is 0 without CR4.PCIDE."""
        return Tag(self.vpid, ite(self.cpu.cr4 & PCIDE != 0, self.cpu.cr3 & 0xFFF, 0))


class Allowed(NamedTuple):
    """An outcome that a processor may have.

    `must` are the flags that it then has to set: those of the entries that it cannot have cached.
    The flags of `outcome` that are not among them it may set.
    """

    outcome: Outcome
    must: tuple[Update, ...]


class Processor:
    """A logical processor: what it runs with, and has run with; what it invalidated, and when.

    Its methods are the operations that change either. They act on its current VPID and PCID.
    """

    def __init__(self, history: History, cpu: Cpu, vpid: Word = 0) -> None:
        self.history = history
        self.contexts = [Context(history.time, cpu, vpid)]
        self.invalidations: list[tuple[int, Invalidation]] = []

    @property
    def context(self) -> Context:
        """What it runs with now."""
        return self.contexts[-1]

    @property
    def cpu(self) -> Cpu:
        """Its control state now."""
        return self.context.cpu

    # INVALIDATIONS (SDM Vol. 3A, 4.10.4.1)

    def invlpg(self, address: Word) -> None:
        """INVLPG: the translations of one page, for the current PCID or global; all of the current
        PCID's paging-structure caches.
        """
        vpid, pcid, _ = self.context.tag
        self.drop(Invalidation(vpid, pcid, address, global_too=True))

    def invpcid(self, kind: int, pcid: Word = 0, address: Word = 0) -> None:
        """INVPCID: type 0, one address of a PCID; 1, a PCID; 2, all; 3, all that is not global."""
        vpid = self.context.vpid
        if kind == 0:
            self.drop(Invalidation(vpid, pcid, address, structures=PATH))
        elif kind == 1:
            self.drop(Invalidation(vpid, pcid))
        elif kind == 2:
            self.drop(Invalidation(vpid, global_too=True))
        elif kind == 3:
            self.drop(Invalidation(vpid))
        else:
            raise ImpossibleState(f"INVPCID type {kind}: there are 0 to 3 (#GP)")

    def mov_cr3(self, operand: Word) -> None:
        """MOV to CR3: all that is not global of the PCID that becomes the current one, unless bit
        63 of the operand is 1.
        """
        cpu = self.cpu
        keep = (operand & KEEP != 0) & (cpu.cr4 & PCIDE != 0)
        self._run_with(cpu._replace(cr3=operand & ~KEEP))
        if not keep:
            vpid, pcid, _ = self.context.tag
            self._now_drops(Invalidation(vpid, pcid))

    def task_switch(self, cr3: Word) -> None:
        """A task switch: if it changes CR3, all of PCID 000H that is not global."""
        if cr3 != self.cpu.cr3:
            self._run_with(self.cpu._replace(cr3=cr3))
            self._now_drops(Invalidation(self.context.vpid, 0))

    def change(self, cpu: Cpu) -> None:
        """MOV to CR0 or CR4, WRMSR to IA32_EFER or IA32_PKRS, WRPKRU, POPF: the control state
        becomes `cpu`, CR3 stays. What is invalidated depends on the bits that change.
        """
        before, vpid = self.cpu, self.context.vpid
        changed = before.cr4 ^ cpu.cr4
        self._run_with(cpu)
        if before.cr0 & ~cpu.cr0 & PG != 0:
            self._now_drops(Invalidation(vpid, global_too=True))
        if (changed & PGE != 0) | (before.cr4 & ~cpu.cr4 & PCIDE != 0):
            self._now_drops(Invalidation(vpid, global_too=True))
        if (changed & PAE != 0) | (cpu.cr4 & ~before.cr4 & SMEP != 0):
            self._now_drops(Invalidation(*self.context.tag[:2]))

    def page_fault(self, address: Word) -> None:
        """A page fault on `address`: what the current PCID has cached for it. So a fault that the
        structures in memory would not cause does not recur.
        """
        vpid, pcid, _ = self.context.tag
        self.drop(Invalidation(vpid, pcid, address, global_too=True, structures=PATH))

    def drop(self, invalidation: Invalidation) -> None:
        """An operation that invalidates just this."""
        self.history.time += 1
        self._now_drops(invalidation)

    def _run_with(self, cpu: Cpu, vpid: Word | None = None) -> None:
        self.history.time += 1
        vpid = self.context.vpid if vpid is None else vpid
        self.contexts.append(Context(self.history.time, cpu, vpid))

    def _now_drops(self, invalidation: Invalidation) -> None:
        self.invalidations.append((self.history.time, invalidation))

    # TRANSLATION

    def fresh(self, access: Access) -> Outcome:
        """The outcome of `access` with nothing cached."""
        return translate(self.cpu, self.history, access)

    def allowed(self, access: Access) -> Iterator[Allowed]:
        """Every outcome that `access` may have; the same one may come more than once."""
        # CANONICAL
        if not is_canonical(access.address, address_width(self.cpu.levels)):
            yield Allowed(NonCanonical(), ())
            return

        # STALE WALKS, from each root that CR3 held with a tag whose mappings may be used now
        current = self.context.tag
        for root, tag, times in self._roots():
            ours = tag.pcid == current.pcid
            for outcome, reading in _each_walk(self, access, root, tag, times, ours):
                cached = _most_cached(outcome, reading, access)
                if cached is not None:
                    yield Allowed(outcome, _updates(outcome)[cached:])

    def allows(self, access: Access, observed: Outcome) -> Condition:
        """Whether `access` may have the `observed` outcome, with the flags that it says it set."""
        found: Condition = False
        for allowed in self.allowed(access):
            found = found | _matches(allowed, observed, self.history)
            if found:
                return True
        return found

    def _roots(self) -> Iterator[tuple[Word, Tag, Times]]:
        """The values of CR3 with which mappings were made that may be used now, by tag, and when:
        that of now first.
        """
        until, vpid = self.history.time + 1, self.context.vpid
        found: list[tuple[Word, Tag, Times]] = []
        for context in reversed(self.contexts):
            times = (1 << until) - (1 << context.start)
            until = context.start
            if context.vpid != vpid:
                continue
            root, tag = context.cpu.cr3, context.tag
            for i, (its_root, its_tag, its_times) in enumerate(found):
                if (its_root == root) & (its_tag.pcid == tag.pcid):
                    found[i] = root, tag, its_times | times
                    break
            else:
                found.append((root, tag, times))
        return iter(found)

    def _running(self, tag: Tag) -> Times:
        """When it ran with this tag, and so could make mappings of it."""
        times, until = 0, self.history.time + 1
        for context in reversed(self.contexts):
            if (context.vpid == tag.vpid) & (context.tag.pcid == tag.pcid):
                times |= (1 << until) - (1 << context.start)
            until = context.start
        return times

    def _kept(self, cached: Times, drops: Callable[[Invalidation], Condition]) -> Times:
        """When something may still be cached that was cached at any of these times: until the next
        invalidation that drops it.
        """
        kept, until = 0, 1 << self.history.time + 1
        for time, invalidation in reversed(self.invalidations):
            if cached >> time << time == cached:
                # It came before all of these times, as did those that are left.
                break
            if drops(invalidation):
                kept |= _from_the_first(cached >> time << time, until)
                cached &= low_bits(time)
                until = 1 << time
        return kept | _from_the_first(cached, until)


def _from_the_first(times: Times, until: Times) -> Times:
    """All times from the first of these to the one before `until`, which is a set of one."""
    return until - (times & -times) if times else 0


class _NoSuchWalk(Exception):
    """Nothing that this walk needs next can be had."""


class _Reading:
    """Memory as a stale walk reads it, and what may be cached of the walk so far.

    `before` is when the walk so far may have been made, `now` left out. `cached` is how many of
    its reads may be from a paging-structure cache, if all others are of the present; None if it
    has others.
    """

    def __init__(
        self,
        processor: Processor,
        address: Word,
        tag: Tag,
        root: Times,
        ours: Condition,
        choices: Sequence[int],
    ) -> None:
        self.processor, self.address, self.tag, self.ours = processor, address, tag, ours
        self.limit: Word = processor.history.limit
        self.now: Times = 1 << processor.history.time
        self.before: Times = root & ~self.now
        self.cached: int | None = 0 if root & self.now and ours else None
        self.reads: list[Word] = []
        self.choices, self.taken = choices, list[tuple[int, int]]()

    def load(self, address: Word) -> Word:
        """One of the values that the entry at `address` may be taken to have."""
        # WHAT THE WALK SO FAR MAY BE CONTINUED FROM
        self.pass_on()
        earlier = self.before
        if self.reads:
            earlier &= self.processor._running(self.tag)

        # THE VALUES THAT IT MAY READ NEXT
        options: list[tuple[Word, Times, int | None]] = []
        for value, times in self.processor.history.values(address):
            cached = self.cached if times & self.now else None
            before = times & earlier & ~self.now
            if before and value & (PRESENT | ACCESSED) != PRESENT | ACCESSED:
                before = 0
            if before or cached is not None:
                options.append((value, before, cached))
        if not options:
            raise _NoSuchWalk

        # ONE OF THEM
        number = len(self.taken)
        choice = self.choices[number] if number < len(self.choices) else 0
        self.taken.append((choice, len(options)))
        value, self.before, self.cached = options[choice]
        self.reads.append(value)
        return value

    def pass_on(self) -> None:
        """Take the walk so far as cached by a paging-structure cache, from `before` on."""
        if self.reads and self.before:
            shift = self._shift(len(self.reads))
            self.before = self.processor._kept(
                self.before, lambda i: i.drops_structures(self.tag, self.address, shift)
            )
            if self.before & self.now and self.ours:
                self.cached = len(self.reads)

    def translated(self, dirty: bool) -> int | None:
        """`cached`, once the walk has come to a page: all of it may be cached by a TLB then, but
        not, for a write, without its dirty flag.
        """
        leaf, shift = self.reads[-1], self._shift(len(self.reads))
        is_global = (leaf & GLOBAL != 0) & (self.processor.cpu.cr4 & PGE != 0)
        if self.before and (self.ours | is_global) and not (dirty and leaf & DIRTY == 0):
            kept = self.processor._kept(
                self.before,
                lambda i: i.drops_translation(self.tag, self.address, shift, is_global),
            )
            if kept & self.now:
                return len(self.reads)
        return self.cached

    def _shift(self, reads: int) -> Word:
        """log2 of the bytes that the entry read last serves."""
        return 12 + 9 * (self.processor.cpu.levels - reads)


def _each_walk(
    processor: Processor,
    access: Access,
    root: Word,
    tag: Tag,
    times: Times,
    ours: Condition,
) -> Iterator[tuple[Outcome, _Reading]]:
    """Every walk from a root: as often as there are choices of what to read."""
    cpu, choices = processor.cpu._replace(cr3=root), list[int]()
    while True:
        reading = _Reading(processor, access.address, tag, times, ours, choices)
        with suppress(_NoSuchWalk):
            yield translate(cpu, reading, access), reading
        while reading.taken and reading.taken[-1][0] + 1 == reading.taken[-1][1]:
            reading.taken.pop()
        if not reading.taken:
            return
        choices = [choice for choice, _ in reading.taken]
        choices[-1] += 1


def _most_cached(outcome: Outcome, reading: _Reading, access: Access) -> int | None:
    """How many of the entries on a stale walk may be cached at most; None if it cannot be made.

    What is not present or has a reserved bit set is never cached: SDM Vol. 3A, 4.10.2.3, 4.10.3.1.
    """
    match outcome:
        case Translated():
            return reading.translated(dirty=access.write == 1)
        case PageFault() if (outcome.error_code & P != 0) & (outcome.error_code & RSVD == 0):
            return reading.translated(dirty=False)
        case OutsideMemory():
            reading.pass_on()
    return reading.cached


def _updates(outcome: Outcome) -> tuple[Update, ...]:
    return outcome.updates if isinstance(outcome, Translated) else ()


def _matches(allowed: Allowed, observed: Outcome, memory: Memory) -> Condition:
    """Whether the outcome observed is the allowed one, flags included. Page sizes do not show."""
    match allowed.outcome, observed:
        case Translated() as ours, Translated():
            same: Condition = ours.pa == observed.pa
            may, did = ours.updates, observed.updates
        case PageFault() as ours, PageFault():
            same = (ours.error_code ^ observed.error_code) & ~ours.open_bits == 0
            may, did = ours.may_update, observed.may_update
        case OutsideMemory() as ours, OutsideMemory():
            same = ours.address == observed.address
            may, did = ours.may_update, observed.may_update
        case NonCanonical(), NonCanonical():
            return True
        case _:
            return False
    return same & _within(allowed.must, did, memory) & _within(did, may, memory)


def _within(some: Sequence[Update], others: Sequence[Update], memory: Memory) -> Condition:
    """Whether all flags of `some` that memory has not set yet are among those of `others`."""
    within: Condition = True
    for address, bits in some:
        missing = bits & ~memory.load(address)
        for where, more in others:
            missing = missing & ~ite(where == address, more, 0)
        within = within & (missing == 0)
    return within
