"""Which translations may be used in a guest under EPT: combined and guest-physical mappings.

Read beside the Intel SDM Vol. 3C, 28.3 (28.4 and 29.4 in later editions). What the caches may hold
is told as in `spec.tlb`, by memory's history, but more coarsely: of each entry that a walk of
either stage reads, *any* value may be used that it has had since the last invalidation that covers
it, not just values that one walk could have met in turn. So nothing is refused that a processor may
do, and a little is allowed that none can do. Memory is the host's.
"""

from collections.abc import Iterator, Sequence

from vapama.spec import nested, second_stage
from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import Cpu, ImpossibleState
from vapama.spec.ept import RIGHTS
from vapama.spec.modes import ACCESSED, DIRTY, GLOBAL, PRESENT
from vapama.spec.outcomes import (
    RSVD,
    EptViolation,
    Outcome,
    OutsideMemory,
    P,
    PageFault,
    Translated,
)
from vapama.spec.paging import FRAME, translate
from vapama.spec.stage import Ept
from vapama.spec.tlb import PGE, History, Processor, Tag
from vapama.spec.words import Condition, Word


class GuestProcessor(Processor):
    """A logical processor that runs a guest under EPT; see `Processor` for its other operations."""

    def __init__(self, history: History, cpu: Cpu, ept: Ept, vpid: Word = 1) -> None:
        super().__init__(history, cpu, vpid)
        self.ept = ept
        self.invepts: list[tuple[int, Word | None]] = []
        """When INVEPT was executed, and for which EP4TA (None: for all)."""
        self.violations: list[tuple[int, Word, Word]] = []
        """When EPT violations came, with their EP4TA and guest-physical address."""

    @property
    def ep4ta(self) -> Word:
        """Bits 51:12 of the EPTP: what combined and guest-physical mappings are associated with."""
        return self.ept.eptp & FRAME

    def enter(self, cpu: Cpu, ept: Ept, vpid: Word = 1) -> None:
        """A VM entry (after a VM exit) to a guest with this control state, EPTP and VPID."""
        self.vm_transition(cpu, vpid)
        self.ept = ept

    def invept(self, kind: int, eptp: Word = 0) -> None:
        """INVEPT: guest-physical and combined mappings, type 1 of an EP4TA, type 2 of all."""
        if kind not in (1, 2):
            raise ImpossibleState(f"INVEPT type {kind}: there are 1 and 2 (VMfail)")
        self.history.time += 1
        self.invepts.append((self.history.time, eptp & FRAME if kind == 1 else None))

    def ept_violation(self, gpa: Word, address: Word) -> None:
        """An EPT violation: what would be used for the guest-physical address, and what is combined
        for the linear one. So one that the tables do not call for does not recur.
        """
        self.page_fault(address)
        self.violations.append((self.history.time, self.ep4ta, gpa))

    def outcomes(self, access: Access) -> Iterator[Outcome]:
        """Every outcome that `access` may have; the same one may come more than once."""
        # WITH NOTHING CACHED
        yield from nested.allowed(self.cpu, self.ept, self.history, access)

        # WITH ANYTHING CACHED: of what is associated with this PCID, or globally with any
        current = self.context.tag
        for rooted, tag, _ in self._roots():
            for is_global in (False, True):
                if tag.pcid == current.pcid or is_global:
                    yield from self._stale(rooted, tag, access, is_global)

    def _stale(self, cpu: Cpu, tag: Tag, access: Access, is_global: bool) -> Iterator[Outcome]:
        choices: list[int] = []
        while True:
            guest = _StaleGuest(self, tag, access.address, is_global, choices)
            outcome = guest.translate(cpu, access)
            if outcome is not None:
                yield outcome
            while guest.taken and guest.taken[-1][0] + 1 == guest.taken[-1][1]:
                guest.taken.pop()
            if not guest.taken:
                return
            choices = [choice for choice, _ in guest.taken]
            choices[-1] += 1

    def since_invept(self) -> int:
        """When all mappings with this EP4TA were last dropped."""
        times = [time for time, ep4ta in self.invepts if ep4ta is None or ep4ta == self.ep4ta]
        return times[-1] if times else 0

    def since_violation(self, gpa: Word) -> int:
        """When those for a guest-physical address were last dropped."""
        last = self.since_invept()
        for time, ep4ta, where in self.violations:
            if ep4ta == self.ep4ta and where >> 12 == gpa >> 12:
                last = max(last, time)
        return last

    def since(self, tag: Tag, address: Word, is_global: bool) -> int:
        """When combined mappings for a linear address were last dropped."""
        last = 0
        for time, invalidation in self.invalidations:
            if invalidation.drops_translation(tag, address, 12, is_global):
                last = time
        return last


class _StaleGuest(nested.GuestMemory):
    """A guest's memory as a stale walk of both stages reads it."""

    def __init__(
        self,
        processor: GuestProcessor,
        tag: Tag,
        address: Word,
        is_global: bool,
        choices: Sequence[int],
    ) -> None:
        super().__init__(processor.ept, _Either(processor.history, self))
        self.processor, self.is_global, self.choices = processor, is_global, choices
        self.since_combined = processor.since(tag, address, is_global)
        self.since_gpa = 0
        self.stage_walks = True
        self.fresh = self.was_present = True
        """Whether what was read last is what memory holds now, and whether it is present."""
        self.taken: list[tuple[int, int]] = []

    def translate(self, cpu: Cpu, access: Access) -> Outcome | None:
        """The outcome of a stale walk with these choices; None if there is none."""
        # GUEST'S WALK
        try:
            outcome = translate(cpu, self, access)
        except nested.Stopped as stopped:
            return stopped.outcome if self._may_stop(stopped.outcome) else None
        if isinstance(outcome, PageFault):
            by_rights = (outcome.error_code & P != 0) & (outcome.error_code & RSVD == 0)
            return (
                PageFault(outcome.error_code, (), outcome.open_bits)
                if (by_rights or self.fresh)
                else None
            )
        if not isinstance(outcome, Translated):
            return outcome if self.fresh else None

        # DIRTY AND GLOBAL
        leaf = self.loads[-1].entry
        if access.write == 1 and leaf & DIRTY == 0 and not self.fresh:
            return None
        if self.is_global and (leaf & GLOBAL == 0 or cpu.cr4 & PGE == 0):
            return None

        # PAGE
        final = self._second_stage(nested.access_to_page(cpu, self, access, outcome.pa))
        if isinstance(final, Translated):
            return Translated(final.pa, outcome.level, ())
        return final if self._may_stop(final) else None

    def load(self, address: Word) -> Word:
        """One of the values that the entry at a guest-physical address may be taken to have."""
        outcome = self._second_stage(nested.access_to_table(address))
        if not isinstance(outcome, Translated):
            raise nested.Stopped(outcome)
        if outcome.pa >= self.memory.limit:
            raise nested.Stopped(OutsideMemory(outcome.pa))
        self.stage_walks = False
        entry = self.memory.load(outcome.pa)
        self.loads.append(nested.Load(address, outcome.pa, entry))
        return entry

    def _second_stage(self, access: GuestPhysicalAccess) -> Outcome:
        self.stage_walks = True
        self.since_gpa = self.processor.since_violation(access.address)
        return second_stage.translate(self.stage, self.memory, access)

    def _may_stop(self, outcome: Outcome) -> Condition:
        """A violation by missing rights may come of what is cached, anything else may not."""
        return self.fresh or (isinstance(outcome, EptViolation) and self.was_present)

    def choose(self, history: History, address: Word) -> Word:
        """A value that the entry at a physical address may be taken to have."""
        # SINCE WHEN
        since = self.since_gpa
        if not self.stage_walks:
            since = max(self.since_combined, self.processor.since_invept())
        now, window = 1 << history.time, (1 << history.time + 1) - (1 << since)

        # WHAT
        needed = RIGHTS if self.stage_walks else PRESENT | ACCESSED
        options: list[tuple[Word, bool]] = []
        for value, times in history.values(address):
            kept = value & needed != 0 if self.stage_walks else value & needed == needed
            if times & now or (times & window and kept):
                options.append((value, bool(times & now)))
        number = len(self.taken)
        choice = self.choices[number] if number < len(self.choices) else 0
        self.taken.append((choice, len(options)))
        value, self.fresh = options[choice]
        self.was_present = value & RIGHTS != 0
        return value


class _Either:
    """The host's memory for a `_StaleGuest`, which chooses what is read."""

    def __init__(self, history: History, guest: _StaleGuest) -> None:
        self.history, self.guest = history, guest
        self.limit: Word = history.limit

    def load(self, address: Word) -> Word:
        """One of the values that the entry may be taken to have."""
        return self.guest.choose(self.history, address)
