"""Which translations may be used in a guest on a second stage: combined, guest-physical mappings.

Read beside the Intel SDM Vol. 3C, 28.3 (30.4 and 31.4 in later editions), and the AMD APM Vol. 2,
15.16. What the caches may hold is told as in `spec.tlb`, by memory's history, but more coarsely: of
each entry that a walk of either stage reads, *any* value may be used that it has had since the last
invalidation that covers it, not just values that one walk could have met in turn. So nothing is
refused that a processor may do, and a little is allowed that none can do. Memory is the host's.

What Intel's processors cache of the second stage is associated with the EP4TA, and INVEPT drops it.
AMD's associate all with the ASID, whatever nCR3 is, and TLB_CONTROL alone drops what the second
stage said; an EPT violation drops what caused it, of nested page faults the APM promises no such
thing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

from vapama.spec import nested, second_stage
from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import Cpu, ImpossibleState
from vapama.spec.ept import RIGHTS
from vapama.spec.memory import Memory
from vapama.spec.modes import ACCESSED, DIRTY, GLOBAL, PRESENT
from vapama.spec.outcomes import (
    RSVD,
    EptMisconfiguration,
    EptViolation,
    NestedPageFault,
    NonCanonical,
    Outcome,
    OutsideMemory,
    P,
    PageFault,
    Translated,
)
from vapama.spec.paging import FRAME, translate
from vapama.spec.stage import Ept, Stage
from vapama.spec.tlb import PGE, History, Processor, Tag, within
from vapama.spec.words import Condition, Word

T = TypeVar("T")


class GuestProcessor(Processor):
    """A logical processor that runs a guest on a second stage; see `Processor` for the operations
    that do not concern it. With nested paging the VPID is the ASID.
    """

    def __init__(self, history: History, cpu: Cpu, stage: Stage, vpid: Word = 1) -> None:
        super().__init__(history, cpu, vpid)
        self.stages = [(history.time, stage, vpid)]
        """The second stages, since when it has run with each, and with which VPID or ASID."""
        self.flushes: list[tuple[int, Word | None]] = []
        """When what a second stage said was dropped, and of which EP4TA or ASID (None: of all)."""
        self.violations: list[tuple[int, Word, Word]] = []
        """When EPT violations came, with their EP4TA and guest-physical address."""

    @property
    def stage(self) -> Stage:
        """The second stage of now."""
        return self.stages[-1][1]

    @property
    def associated(self) -> Word:
        """What the second stage's mappings are associated with: the EP4TA (bits 51:12 of the
        EPTP), or the ASID.
        """
        return self.stage.eptp & FRAME if isinstance(self.stage, Ept) else self.context.tag.vpid

    # OPERATIONS

    def enter(self, cpu: Cpu, stage: Stage, vpid: Word = 1, tlb_control: int = 0) -> None:
        """A VM entry (after a VM exit) or VMRUN to a guest with this control state, second stage
        and VPID or ASID.
        """
        if isinstance(stage, Ept):
            self.vm_transition(cpu, vpid)
        else:
            self.vmrun(cpu, vpid, tlb_control)
            if tlb_control in (1, 3):
                self.flushes.append((self.history.time, vpid if tlb_control == 3 else None))
        self.stages.append((self.history.time, stage, vpid))

    def invept(self, kind: int, eptp: Word = 0) -> None:
        """INVEPT: guest-physical and combined mappings, type 1 of an EP4TA, type 2 of all."""
        if kind not in (1, 2):
            raise ImpossibleState(f"INVEPT type {kind}: there are 1 and 2 (VMfail)")
        self.history.time += 1
        self.flushes.append((self.history.time, eptp & FRAME if kind == 1 else None))

    def ept_violation(self, gpa: Word, address: Word) -> None:
        """An EPT violation: what would be used for the guest-physical address, and what is combined
        for the linear one. So one that the tables do not call for does not recur.
        """
        self.page_fault(address)
        self.violations.append((self.history.time, self.associated, gpa))

    # TRANSLATION

    def allows(self, access: Access, observed: Outcome) -> Condition:
        """Whether `access` may have the `observed` outcome, with the flags that it says it set."""
        return any(_matches(outcome, observed, self.history) for outcome in self.outcomes(access))

    def fresh(self, access: Access) -> Outcome:
        """The outcome of `access` with nothing cached."""
        return nested.translate(self.cpu, self.stage, self.history, access)

    def without_cache(self, access: Access) -> tuple[Outcome, ...]:
        """Every outcome that it may have then."""
        return nested.allowed(self.cpu, self.stage, self.history, access)

    def outcomes(self, access: Access) -> Iterator[Outcome]:
        """Every outcome that `access` may have, with the flags that it may set on the way; the same
        one may come more than once.
        """
        # WITH NOTHING CACHED: the most frequent outcome first, for speed
        yield self.fresh(access)
        yield from self.without_cache(access)

        # WITH ANYTHING CACHED: of what is associated with this PCID, or globally with any
        current = self.context.tag
        for stage in self._stages():
            for rooted, tag, _ in self._roots():
                for is_global in (False, True):
                    if tag.pcid == current.pcid or is_global:
                        yield from self._stale(stage, rooted, tag, access, is_global)

    def _stages(self) -> list[Stage]:
        """The second stages of which something may be used, that of now first: it alone under EPT,
        whose mappings are associated with it.
        """
        if isinstance(self.stage, Ept):
            return [self.stage]
        found: list[Stage] = []
        until, since = self.history.time + 1, self.since_flush()
        for start, stage, asid in reversed(self.stages):
            if until > since and asid == self.associated and stage not in found:
                found.append(stage)
            until = start
        return found

    def _stale(
        self, stage: Stage, cpu: Cpu, tag: Tag, access: Access, is_global: bool
    ) -> Iterator[Outcome]:
        known: dict[GuestPhysicalAccess, list[Outcome]] = {}
        for choices in _every_choice():
            guest = _StaleGuest(self, stage, tag, access.address, is_global, choices, known)
            outcome = guest.translate(cpu, access)
            if outcome is not None:
                yield outcome

    # SINCE WHEN

    def since_flush(self) -> int:
        """When all that the second stage said was last dropped."""
        times = [time for time, what in self.flushes if what is None or what == self.associated]
        return times[-1] if times else 0

    def since_violation(self, gpa: Word, until: int) -> int:
        """When what it said of a guest-physical address was last dropped before a combined mapping
        could be made of it, that is now still used: after `until`.
        """
        last = self.since_flush()
        for time, associated, where in self.violations:
            if associated == self.associated and where >> 12 == gpa >> 12 and time <= until:
                last = max(last, time)
        return last

    def since(self, tag: Tag, address: Word, is_global: bool) -> int:
        """When combined mappings for a linear address were last dropped."""
        last = 0
        for time, invalidation in self.invalidations:
            if invalidation.drops_translation(tag, address, 12, is_global):
                last = time
        return last


class _Choices:
    """Choices of a stale walk: those given, and then the first of whatever there is."""

    def __init__(self, given: Sequence[int]) -> None:
        self.given = given
        self.taken: list[tuple[int, int]] = []

    def of(self, options: Sequence[T]) -> T:
        """One of these."""
        number = len(self.taken)
        choice = self.given[number] if number < len(self.given) else 0
        self.taken.append((choice, len(options)))
        return options[choice]


def _every_choice() -> Iterator[_Choices]:
    """All that a walk can make, one after the other as it is run with each."""
    choices = _Choices(())
    while True:
        yield choices
        while choices.taken and choices.taken[-1][0] + 1 == choices.taken[-1][1]:
            choices.taken.pop()
        if not choices.taken:
            return
        given = [choice for choice, _ in choices.taken]
        given[-1] += 1
        choices = _Choices(given)


class _Read(NamedTuple):
    """A value that an entry may be taken to have, and whether memory holds it now."""

    value: Word
    fresh: bool


class _StaleStage:
    """The host's memory as a stale walk of the second stage reads it, since some time."""

    def __init__(self, history: History, stage: Stage, since: int, choices: _Choices) -> None:
        self.history, self.since, self.choices = history, since, choices
        self.present = RIGHTS if isinstance(stage, Ept) else PRESENT
        self.limit: Word = history.limit
        self.last = _Read(0, True)

    def load(self, address: Word) -> Word:
        """One of the values that the entry may be taken to have."""
        options = _values(self.history, address, self.since, lambda v: v & self.present != 0)
        self.last = self.choices.of(options)
        return self.last.value


def _values(
    history: History, address: Word, since: int, cached: Callable[[Word], Condition]
) -> list[_Read]:
    """The value that an entry has now, and those that it had since then and that can be cached."""
    now, window = 1 << history.time, (1 << history.time + 1) - (1 << since)
    return [
        _Read(value, bool(times & now))
        for value, times in history.values(address)
        if times & now or (times & window and cached(value))
    ]


class _StaleGuest(nested.GuestMemory):
    """A guest's memory as a stale walk of both stages reads it. What is `known` of the second stage
    is what it may be taken to say, by access.
    """

    def __init__(
        self,
        processor: GuestProcessor,
        stage: Stage,
        tag: Tag,
        address: Word,
        is_global: bool,
        choices: _Choices,
        known: dict[GuestPhysicalAccess, list[Outcome]],
    ) -> None:
        super().__init__(stage, processor.history)
        self.processor, self.is_global = processor, is_global
        self.history, self.choices, self.known = processor.history, choices, known
        self.since_combined = processor.since(tag, address, is_global)
        self.fresh = True
        """Whether the guest's entry that was read last is what memory holds now."""

    def translate(self, cpu: Cpu, access: Access) -> Outcome | None:
        """The outcome of a stale walk with these choices; None if there is none."""
        try:
            return self._translate(cpu, access)
        except nested.Stopped as stopped:
            flags = self.flags + nested.passed(cpu, self, access)
            return nested.stopped_by(replace(stopped.outcome), flags)
        except _NoSuchWalk:
            return None

    def _translate(self, cpu: Cpu, access: Access) -> Outcome | None:
        # GUEST'S WALK
        outcome = translate(cpu, self, access)
        if isinstance(outcome, PageFault):
            by_rights = (outcome.error_code & P != 0) & (outcome.error_code & RSVD == 0)
            may = self.flags + nested.in_host(self.loads, outcome.may_update)
            return replace(outcome, may_update=may) if by_rights or self.fresh else None
        if not isinstance(outcome, Translated):
            return outcome if self.fresh else None

        # DIRTY AND GLOBAL
        leaf = self.loads[-1].entry
        if access.write == 1 and leaf & DIRTY == 0 and not self.fresh:
            return None
        if self.is_global and (leaf & GLOBAL == 0 or cpu.cr4 & PGE == 0):
            return None

        # FLAGS
        flags = self.flags + nested.in_host(self.loads, outcome.updates)
        if nested.flags_are_written_apart(self.stage):
            for load, update in zip(self.loads, outcome.updates, strict=True):
                if update.bits & ~load.entry != 0:
                    written = self._second_stage(nested.access_to_table(load.gpa, write=1))
                    if not isinstance(written, Translated):
                        return nested.stopped_by(replace(written), flags)
                    if written.pa != load.pa:
                        return None

        # PAGE
        final = self._second_stage(nested.access_to_page(cpu, self, access, outcome.pa))
        if isinstance(final, Translated):
            return Translated(final.pa, outcome.level, flags + final.updates)
        return nested.stopped_by(replace(final), flags)

    def load(self, address: Word) -> Word:
        """One of the values that the entry at a guest-physical address may be taken to have."""
        outcome = self._second_stage(nested.access_to_table(address))
        if not isinstance(outcome, Translated):
            raise nested.Stopped(outcome)
        self.flags = self.flags + outcome.updates
        if outcome.pa >= self.memory.limit:
            raise nested.Stopped(OutsideMemory(outcome.pa))
        since, needed = max(self.since_combined, self.processor.since_flush()), PRESENT | ACCESSED
        options = _values(self.history, outcome.pa, since, lambda v: v & needed == needed)
        entry, self.fresh = self.choices.of(options)
        self.loads.append(nested.Load(address, outcome.pa, entry))
        return entry

    def _second_stage(self, access: GuestPhysicalAccess) -> Outcome:
        """One of the outcomes that it may be taken to have. An exit by missing rights may come of
        what is cached, anything else that is no translation may not.
        """
        said = self.known.get(access)
        if said is None:
            said = self.known[access] = self._all_said(access)
        if not said:
            raise _NoSuchWalk
        return self.choices.of(said)

    def _all_said(self, access: GuestPhysicalAccess) -> list[Outcome]:
        since = self.processor.since_violation(access.address, self.since_combined)
        found: list[Outcome] = []
        for choices in _every_choice():
            memory = _StaleStage(self.history, self.stage, since, choices)
            outcome = second_stage.translate(self.stage, memory, access)
            by_rights = isinstance(outcome, EptViolation | NestedPageFault)
            by_rights = by_rights and memory.last.value & memory.present != 0
            possible = memory.last.fresh or by_rights or isinstance(outcome, Translated)
            if possible and outcome not in found:
                found.append(outcome)
        return found


class _NoSuchWalk(Exception):
    """The second stage cannot be taken to say anything of an access."""


def _matches(allowed: Outcome, observed: Outcome, memory: Memory) -> Condition:
    """Whether the outcome observed is the allowed one. Flags may have been set before, when what is
    used was cached, so some may be missing; page sizes do not show.
    """
    match allowed, observed:
        case Translated() as ours, Translated():
            return ours.pa == observed.pa and within(observed.updates, ours.updates, memory)
        case PageFault() as ours, PageFault():
            same: Condition = (ours.error_code ^ observed.error_code) & ~ours.open_bits == 0
        case EptViolation() as ours, EptViolation():
            difference = (ours.qualification ^ observed.qualification) & ~ours.open_bits
            same = (difference == 0) & (ours.gpa == observed.gpa)
        case NestedPageFault() as ours, NestedPageFault():
            difference = (ours.exitinfo1 ^ observed.exitinfo1) & ~ours.open_bits
            same = (difference == 0) & (ours.gpa == observed.gpa)
        case EptMisconfiguration() as ours, EptMisconfiguration():
            same = ours.gpa == observed.gpa
        case OutsideMemory() as ours, OutsideMemory():
            same = ours.address == observed.address
        case NonCanonical(), NonCanonical():
            return True
        case _:
            return False
    return same and within(observed.may_update, ours.may_update, memory)
