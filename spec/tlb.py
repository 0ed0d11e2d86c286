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

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeAlias, TypeVar

from vapama.spec import modes
from vapama.spec.access import Access
from vapama.spec.cpu import LAM_U48, LAM_U57, PAE, PCIDE, PG, SMEP, Cpu, ImpossibleState
from vapama.spec.memory import Memory
from vapama.spec.modes import ACCESSED, DIRTY, GLOBAL, PRESENT
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
from vapama.spec.paging import linear_address, translate
from vapama.spec.words import Condition, Word, bit, is_canonical, ite, low_bits

PGE = 1 << 7
"""CR4.PGE: entries with G=1 map global pages."""
KEEP = 1 << 63
"""Bit 63 of the operand of MOV to CR3, with CR4.PCIDE: nothing need be invalidated."""

Times: TypeAlias = int
"""A set of times: bit t is 1 if time t is in it (a negative one has all from some time on). Time
passes by one at each write and operation.
"""


Thing = TypeVar("Thing")


def shallow(thing: Thing) -> Thing:
    """Another with the same attributes. Who calls it gives it its own of those that change."""
    twin = object.__new__(type(thing))
    twin.__dict__.update(thing.__dict__)
    return twin


class History:
    """A memory, and all the values that its entries have had."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.limit: Word = memory.limit
        self.time = 0
        self.held: dict[Word, dict[Word, Times]] = {}
        """The values that an address has had which was written to, and when: the value of now is
        the last, and has all times from then on.
        """

    def clone(self, limit: Word) -> "History":
        """The same history, which goes on by itself, with another limit."""
        twin = shallow(self)
        twin.held = {address: held.copy() for address, held in self.held.items()}
        twin.limit = limit
        return twin

    def write(self, address: Word, value: Word) -> None:
        """Put `value` into the entry at `address`."""
        self.time += 1
        held = self.held.setdefault(address, {})
        if held:
            held[next(reversed(held))] &= (1 << self.time) - 1
        else:
            held[self.memory.load(address)] = (1 << self.time) - 1
        held[value] = held.pop(value, 0) | -(1 << self.time)

    def load(self, address: Word) -> Word:
        """The entry at `address` as it is now."""
        held = self.held.get(address)
        return self.memory.load(address) if held is None else next(reversed(held))

    def values(self, address: Word) -> Iterable[tuple[Word, Times]]:
        """The values that the entry at `address` has had, and when, the value of now first."""
        held = self.held.get(address)
        return ((self.memory.load(address), -1),) if held is None else reversed(held.items())


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
    but_vpid_0: bool = False

    def drops_translation(
        self, tag: Tag, address: Word, shift: Word, is_global: Condition
    ) -> Condition:
        """Whether it drops the translation of a page of 2**shift bytes that `address` is in."""
        if not self._concerns_vpid(tag.vpid):
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
        if self.structures == NONE or not self._concerns_vpid(tag.vpid):
            return False
        if self.structures == PATH and not self._serves(address, shift):
            return False
        return self._concerns(tag.pcid, self.pcid)

    def drops_all(self, tag: Tag, address: Word, global_pages: Condition) -> Condition:
        """Whether it drops whatever is cached of the page of 4 KBytes that `address` is in, and on
        the way there; translations that are not global are among it then.
        """
        translations = self.drops_translation(tag, address, 12, global_pages)
        return translations and self.drops_structures(tag, address, 12)

    def _concerns_vpid(self, vpid: Word) -> Condition:
        return vpid != 0 if self.but_vpid_0 else self._concerns(vpid, self.vpid)

    def _serves(self, address: Word, shift: Word) -> Condition:
        return True if self.address is None else self.address >> shift == address >> shift

    @staticmethod
    def _concerns(associated: Word, named: Word | None) -> Condition:
        return True if named is None else associated == named


class Context(NamedTuple):
    """What a processor runs with from time `start` on, and the tag of mappings made meanwhile."""

    start: int
    cpu: Cpu
    tag: Tag


def context(start: int, cpu: Cpu, vpid: Word) -> Context:
    """The context that begins with this control state. PCIDs are 0 without CR4.PCIDE."""
    return Context(start, cpu, Tag(vpid, ite(cpu.cr4 & PCIDE != 0, cpu.cr3 & 0xFFF, 0)))


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
        self.contexts = [context(history.time, cpu, vpid)]
        self.invalidations: list[tuple[int, Invalidation]] = []

    def clone(self, history: History) -> "Processor":
        """The same processor, which goes on by itself, on a clone of its history."""
        twin = shallow(self)
        twin.history = history
        twin.contexts, twin.invalidations = self.contexts.copy(), self.invalidations.copy()
        return twin

    def state(self) -> object:
        """All that its accesses depend on besides memory and its history."""
        contexts = [(start, tuple(cpu), tuple(tag)) for start, cpu, tag in self.contexts]
        return contexts, [(time, tuple(dropped)) for time, dropped in self.invalidations]

    @property
    def context(self) -> Context:
        """What it runs with now."""
        return self.contexts[-1]

    @property
    def cpu(self) -> Cpu:
        """Its control state now."""
        return self.contexts[-1].cpu

    # INVALIDATIONS (SDM Vol. 3A, 4.10.4.1)

    def invlpg(self, address: Word) -> None:
        """INVLPG: the translations of one page, for the current PCID or global; all of the current
        PCID's paging-structure caches.
        """
        vpid, pcid, _ = self.context.tag
        self.drop(Invalidation(vpid, pcid, address, global_too=True))

    def invpcid(self, kind: int, pcid: Word = 0, address: Word = 0) -> None:
        """INVPCID: type 0, one address of a PCID; 1, a PCID; 2, all; 3, all that is not global."""
        vpid = self.context.tag.vpid
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

    def mov_cr3(self, operand: Word, pdptes: Sequence[Word] | None = None) -> None:
        """MOV to CR3: all that is not global of the PCID that becomes the current one, unless bit
        63 of the operand is 1. `pdptes` are what it loads in PAE paging (`paging.load_pdptes`).
        """
        cpu = self.cpu
        keep = (operand & KEEP != 0) & (cpu.cr4 & PCIDE != 0)
        self._run_with(cpu._replace(cr3=operand & ~KEEP, pdptes=pdptes))
        if not keep:
            vpid, pcid, _ = self.context.tag
            self._now_drops(Invalidation(vpid, pcid))

    def task_switch(self, cr3: Word, pdptes: Sequence[Word] | None = None) -> None:
        """A task switch: if it changes CR3, all of PCID 000H that is not global."""
        if cr3 != self.cpu.cr3:
            self._run_with(self.cpu._replace(cr3=cr3, pdptes=pdptes))
            self._now_drops(Invalidation(self.context.tag.vpid, 0))

    def change(self, cpu: Cpu) -> None:
        """MOV to CR0 or CR4, WRMSR to IA32_EFER or IA32_PKRS, WRPKRU, POPF: the control state
        becomes `cpu`, CR3 stays. What is invalidated depends on the bits that change.
        """
        before, vpid = self.cpu, self.context.tag.vpid
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

    # VMX (SDM Vol. 3C, 28.3.3.1) AND SVM (APM Vol. 2, 15.16)

    def vm_transition(self, cpu: Cpu, vpid: Word = 0) -> None:
        """A VM entry or VM exit: from now on the processor runs with `cpu` and `vpid`.

        VPID 0000H is the host's, and a guest's without VPIDs: what is associated with it is
        invalidated by entries to such a guest and exits from it.
        """
        without_vpids = (vpid == 0) & (self.context.tag.vpid == 0)
        self._run_with(cpu, vpid)
        if without_vpids:
            self._now_drops(Invalidation(0, global_too=True))

    def invvpid(self, kind: int, vpid: Word = 0, address: Word = 0) -> None:
        """INVVPID: type 0, one address of a VPID; 1, a VPID; 2, all but VPID 0000H; 3, a VPID but
        for what is global. Whatever the PCID.
        """
        if kind == 0:
            self.drop(Invalidation(vpid, None, address, global_too=True, structures=PATH))
        elif kind == 1:
            self.drop(Invalidation(vpid, global_too=True))
        elif kind == 2:
            self.drop(Invalidation(global_too=True, but_vpid_0=True))
        elif kind == 3:
            self.drop(Invalidation(vpid))
        else:
            raise ImpossibleState(f"INVVPID type {kind}: there are 0 to 3 (VMfail)")

    def vmrun(self, cpu: Cpu, asid: Word, tlb_control: int = 0) -> None:
        """VMRUN or #VMEXIT: the processor runs with `cpu` and this ASID, the host's being 0.

        TLB_CONTROL 1 invalidates everything, 3 the ASID, 7 the ASID but for what is global.
        """
        self._run_with(cpu, asid)
        if tlb_control == 1:
            self._now_drops(Invalidation(global_too=True))
        elif tlb_control == 3:
            self._now_drops(Invalidation(asid, global_too=True))
        elif tlb_control == 7:
            self._now_drops(Invalidation(asid))
        elif tlb_control != 0:
            raise ImpossibleState(f"TLB_CONTROL {tlb_control}: there are 0, 1, 3 and 7")

    def invlpga(self, address: Word, asid: Word) -> None:
        """INVLPGA: one address of an ASID."""
        self.invvpid(0, asid, address)

    def drop(self, invalidation: Invalidation) -> None:
        """An operation that invalidates just this. INVLPGB is one for each processor, by the time
        of the TLBSYNC that follows it (APM Vol. 3).
        """
        self.history.time += 1
        self._now_drops(invalidation)

    def _run_with(self, cpu: Cpu, vpid: Word | None = None) -> None:
        self.history.time += 1
        vpid = self.context.tag.vpid if vpid is None else vpid
        self.contexts.append(context(self.history.time, cpu, vpid))

    def _now_drops(self, invalidation: Invalidation) -> None:
        self.invalidations.append((self.history.time, invalidation))

    # TRANSLATION

    def fresh(self, access: Access) -> Outcome:
        """The outcome of `access` with nothing cached."""
        return translate(self.cpu, self.history, access)

    def allowed(self, access: Access) -> Iterator[Allowed]:
        """Every outcome that `access` may have; the same one may come more than once."""
        # LINEAR ADDRESS
        cpu = self.cpu
        mode = cpu.mode
        address = linear_address(cpu, mode, access)
        if mode is modes.OFF or (mode.width > 32 and not is_canonical(address, mode.width)):
            yield Allowed(self.fresh(access), ())
            return

        # STALE WALKS, from each root that was used with a tag whose mappings may be used now
        pcid, global_pages = self.context.tag.pcid, cpu.cr4 & PGE != 0
        for rooted, tag, times in self._roots():
            ours = tag.pcid == pcid
            since = self._since_all_went(tag, address, global_pages)
            left = times >> since << since
            if not left or not ours | global_pages:
                continue
            for outcome, reading in _each_walk(self, rooted, access, address, tag, left, ours):
                cached = _most_cached(outcome, reading, access)
                if cached is not None:
                    yield Allowed(outcome, _updates(outcome)[cached:])

    def cached(self, addresses: Sequence[Word]) -> frozenset[object]:
        """All that may be cached for these addresses. Together with memory and the registers it
        decides what may happen from now on.
        """
        found: set[object] = set()
        for address in addresses:
            access = Access(address)
            for rooted, tag, times in self._roots():
                for _, reading in _each_walk(self, rooted, access, address, tag, times, True):
                    found |= reading.cacheable()
        return frozenset(found)

    def allows(self, access: Access, observed: Outcome) -> Condition:
        """Whether `access` may have the `observed` outcome, with the flags that it says it set."""
        fresh = self.fresh(access)
        # The most frequent one first, for speed: `allowed` has it too.
        found = _matches(Allowed(fresh, _updates(fresh)), observed, self.history)
        if found:
            return True
        for allowed in self.allowed(access):
            found = found | _matches(allowed, observed, self.history)
            if found:
                return True
        return found

    def _roots(self) -> list[tuple[Cpu, Tag, Times]]:
        """The roots with which mappings were made that may be used now, as the control state of now
        with that root; the tags of the mappings, and when it was. The root of now comes first.
        With paging off no mappings are made.
        """
        current, until = self.context, self.history.time + 1
        now, vpid = current.cpu, current.tag.vpid
        masks = now.cr3 & (LAM_U57 | LAM_U48)
        found: list[tuple[Cpu, Tag, Times]] = []
        for context in reversed(self.contexts):
            times = (1 << until) - (1 << context.start)
            until = context.start
            if context.tag.vpid != vpid or context.cpu.cr0 & PG == 0:
                continue
            cr3, pdptes = context.cpu.cr3 & ~(LAM_U57 | LAM_U48) | masks, context.cpu.pdptes
            tag = context.tag
            for i, (rooted, its_tag, its_times) in enumerate(found):
                same = (rooted.cr3 == cr3) & (its_tag.pcid == tag.pcid)
                if same and rooted.pdptes == pdptes:
                    found[i] = rooted, tag, its_times | times
                    break
            else:
                rooted = now if context is current else now._replace(cr3=cr3, pdptes=pdptes)
                found.append((rooted, tag, times))
        return found

    def _since_all_went(self, tag: Tag, address: Word, global_pages: Condition) -> int:
        """The time of the last invalidation that left nothing cached that an access to the address
        could use: from before it there is nothing.
        """
        for time, invalidation in reversed(self.invalidations):
            if invalidation.drops_all(tag, address, global_pages):
                return time
        return 0

    def _running(self, tag: Tag) -> Times:
        """When it ran with this tag and paging on, and so could make mappings of it."""
        times, until = 0, self.history.time + 1
        for context in reversed(self.contexts):
            on = context.cpu.cr0 & PG != 0
            if on & (context.tag.vpid == tag.vpid) & (context.tag.pcid == tag.pcid):
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

    `before` is when the walk so far may have been made, `now` left out; `running` when the
    processor ran with the tag, and so could go on with it. `cached` is how many of
    its reads may be from a paging-structure cache, if all others are of the present; None if it
    has others.
    """

    def __init__(
        self,
        processor: Processor,
        cpu: Cpu,
        address: Word,
        tag: Tag,
        root: Times,
        running: Times,
        ours: Condition,
        choices: Sequence[int],
    ) -> None:
        self.processor, self.address, self.tag, self.ours = processor, address, tag, ours
        self.running = running
        self.limit: Word = processor.history.limit
        self.mode = cpu.mode
        self.levels = self.mode.levels
        if self.mode is modes.PAE and cpu.pdptes is None:
            # The PDPTEs are read from memory too, and have no accessed flags.
            self.levels = (modes.PDPTE, *self.levels)
        self.now: Times = 1 << processor.history.time
        self.before: Times = root & ~self.now
        self.cached: int | None = 0 if root & self.now and ours else None
        self.reads: list[Word] = []
        self.kept: list[tuple[Word, ...]] = []
        self.choices, self.taken = choices, list[tuple[int, int]]()

    def load(self, address: Word) -> Word:
        """One of the values that the entry at `address` may be taken to have."""
        # WHAT THE WALK SO FAR MAY BE CONTINUED FROM
        self.pass_on()
        earlier = self.before & ~self.now
        if self.reads:
            earlier &= self.running

        # THE VALUES THAT IT MAY READ NEXT
        options: list[tuple[Word, Word, Times, int | None]] = []
        for value, times in self.processor.history.values(address):
            entry = self._entry(value)
            cached = self.cached if times & self.now else None
            before = times & earlier
            if before and not self._can_be_cached(entry):
                before = 0
            if before or cached is not None:
                options.append((value, entry, before, cached))
        if not options:
            raise _NoSuchWalk

        # ONE OF THEM
        number = len(self.taken)
        choice = self.choices[number] if number < len(self.choices) else 0
        self.taken.append((choice, len(options)))
        value, entry, self.before, self.cached = options[choice]
        self.reads.append(entry)
        return value

    def _entry(self, value: Word) -> Word:
        """The entry in the 8 bytes that the walk reads next."""
        if self.mode.scale == 3:
            return value
        half = bit(self.address, self.levels[len(self.reads)].shift)
        return value >> 32 * half & low_bits(32)

    def _can_be_cached(self, entry: Word) -> Condition:
        """Only what is present, and only once its accessed flag is set. SDM Vol. 3A, 4.10.2.3."""
        needed = PRESENT if len(self.levels) == 3 and not self.reads else PRESENT | ACCESSED
        return entry & needed == needed

    def pass_on(self) -> None:
        """Take the walk so far as cached by a paging-structure cache, from `before` on."""
        if self.reads and self.before:
            shift = self._shift(len(self.reads))
            self.before = self.processor._kept(
                self.before, lambda i: i.drops_structures(self.tag, self.address, shift)
            )
            if self.before & self.now and self.ours:
                self.cached = len(self.reads)
                self.kept.append(tuple(self.reads))

    def cacheable(self) -> set[object]:
        """What may be cached now of this walk, tables and pages apart."""
        found: set[object] = {(self.address, self.tag, *table) for table in self.kept}
        for is_global in (False, True):
            if self.before and self.in_tlb(is_global):
                found.add((self.address, self.tag, is_global, tuple(self.reads)))
        return found

    def translated(self, dirty: bool) -> int | None:
        """`cached`, once the walk has come to a page: all of it may be cached by a TLB then, but
        not, for a write, without its dirty flag.
        """
        leaf = self.reads[-1]
        if self.before and not (dirty and leaf & DIRTY == 0):
            is_global = (leaf & GLOBAL != 0) & (self.processor.cpu.cr4 & PGE != 0)
            if self.ours | is_global and self.in_tlb(is_global):
                return len(self.reads)
        return self.cached

    def in_tlb(self, is_global: Condition) -> bool:
        """Whether a TLB may hold the translation that the walk has come to."""
        shift = self._shift(len(self.reads))
        kept = self.processor._kept(
            self.before, lambda i: i.drops_translation(self.tag, self.address, shift, is_global)
        )
        return kept & self.now != 0

    def _shift(self, reads: int) -> Word:
        """log2 of the bytes that the entry read last serves."""
        return self.levels[reads - 1].shift


def _each_walk(
    processor: Processor,
    cpu: Cpu,
    access: Access,
    address: Word,
    tag: Tag,
    times: Times,
    ours: Condition,
) -> Iterator[tuple[Outcome, _Reading]]:
    """Every walk from the root of `cpu`: as often as there are choices of what to read."""
    choices: list[int] = []
    running = processor._running(tag)
    while True:
        reading = _Reading(processor, cpu, address, tag, times, running, ours, choices)
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
    return same & within(allowed.must, did, memory) & within(did, may, memory)


def within(some: Sequence[Update], others: Sequence[Update], memory: Memory) -> Condition:
    """Whether all flags of `some` that memory has not set yet are among those of `others`."""
    within: Condition = True
    for address, bits in some:
        missing = bits & ~memory.load(address)
        for where, more in others:
            missing = missing & ~ite(where == address, more, 0)
        within = within & (missing == 0)
    return within
