"""Two dimensions: VA -> PA -> MA, the guest's paging over a second stage.

Read beside the Intel SDM Vol. 3C, 31.3.1 and 31.3.3.3 (which guest-physical addresses a linear
address needs, and which exit or fault comes first), 31.3.5 (guest tables with accessed and dirty
flags for EPT), and table 30-7; and the AMD APM Vol. 2, 15.25.5 and 15.25.6. The guest walks as
`spec.paging` says, in any mode of its own, but its paging structures lie in guest-physical memory:
CR3, each entry, and at last the page itself are guest-physical addresses, which `spec.ept` or
`spec.npt` translates.
"""

from typing import NamedTuple

from vapama.spec import modes, paging, second_stage
from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import Cpu
from vapama.spec.memory import Memory
from vapama.spec.outcomes import (
    EptMisconfiguration,
    EptViolation,
    GeneralProtection,
    NestedPageFault,
    Outcome,
    OutsideMemory,
    PageFault,
    Translated,
    Update,
)
from vapama.spec.stage import Ept, Stage
from vapama.spec.words import Condition, Flag, Word, bit, flag, ite

GUEST_LIMIT = 1 << 52
"""Guest-physical addresses end here. A guest's memory ends where its second stage has no page."""


def translate(cpu: Cpu, stage: Stage, memory: Memory, access: Access) -> Outcome:
    """The outcome of a guest's `access` by fresh walks of both stages; `memory` is the host's.

    Of several reasons to stop the first counts: an exit for a guest's table comes before what its
    entry says, the guest's page fault before anything about the page, an exit for an update of the
    guest's flags before one for the page. (The place of these updates is a choice: see `allowed`.)
    """
    # GUEST'S WALK
    guest = GuestMemory(stage, memory)
    try:
        outcome = paging.translate(cpu, guest, access)
    except Stopped as stopped:
        return stopped_by(stopped.outcome, guest.flags + passed(cpu, guest, access))
    entries = entries_with_flags(cpu, guest)
    if isinstance(outcome, PageFault):
        may_update = guest.flags + in_host(entries, outcome.may_update)
        return PageFault(outcome.error_code, may_update, outcome.open_bits)
    if not isinstance(outcome, Translated):
        return outcome

    # GUEST'S FLAGS
    flags = guest.flags + in_host(entries, outcome.updates)
    if flags_are_written_apart(stage):
        for load, update in zip(entries, outcome.updates, strict=True):
            written = write_back(stage, memory, load, update)
            if not isinstance(written, Translated):
                return stopped_by(written, flags)

    # PAGE
    final = second_stage.translate(stage, memory, access_to_page(cpu, guest, access, outcome.pa))
    if not isinstance(final, Translated):
        return stopped_by(final, flags)
    return Translated(final.pa, page_level(outcome.level, final.level), flags + final.updates)


class Stopped(Exception):
    """The guest's walk ends because a table of its own cannot be accessed, with the outcome of the
    second stage's walk for it.
    """

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome


class Load(NamedTuple):
    """An entry that a guest's walk read: its guest-physical and its physical address, its value."""

    gpa: Word
    pa: Word
    entry: Word


class GuestMemory:
    """A guest's physical memory as its own walk sees it: each load goes through the second stage.

    `loads` are those made so far, `flags` what they set in the tables of the second stage. `linear`
    is 0 if no linear address is behind them.
    """

    limit: Word = GUEST_LIMIT

    def __init__(self, stage: Stage, memory: Memory, linear: Flag = 1) -> None:
        self.stage, self.memory, self.linear = stage, memory, linear
        self.loads: list[Load] = []
        self.flags: tuple[Update, ...] = ()

    def load(self, address: Word) -> Word:
        """The entry at a guest-physical address. Raises `Stopped`."""
        access = access_to_table(address, linear=self.linear)
        outcome = second_stage.translate(self.stage, self.memory, access)
        if not isinstance(outcome, Translated):
            raise Stopped(outcome)
        self.flags = self.flags + outcome.updates
        if outcome.pa >= self.memory.limit:
            raise Stopped(OutsideMemory(outcome.pa))
        entry = self.memory.load(outcome.pa)
        self.loads.append(Load(address, outcome.pa, entry))
        return entry


def access_to_table(gpa: Word, write: Flag = 0, linear: Flag = 1) -> GuestPhysicalAccess:
    """The access to an entry of the guest's tables: a read, or the update of its flags."""
    return GuestPhysicalAccess(gpa, write, table=1, linear=linear, writable=0)


def entries_with_flags(cpu: Cpu, guest: GuestMemory) -> list[Load]:
    """The entries read that have accessed flags: all but a PDPTE of PAE paging, read first if it
    is read from memory.
    """
    from_memory = cpu.mode is modes.PAE and cpu.pdptes is None
    return guest.loads[1:] if from_memory else guest.loads


def passed(cpu: Cpu, guest: GuestMemory, access: Access) -> tuple[Update, ...]:
    """The accessed flags of the guest's entries that a walk has read, as updates of the host's
    memory. If the walk is stopped after them, they may be set.

    A processor marks an entry that it uses in translation. Whether one that translates addresses
    until an exit has used what led it there is as open as with a page fault. Source: SDM Vol. 3A,
    4.8 (when flags are set), and 4.10.2.3 (accessed flags of walks that come to no access).
    """
    mode, address = cpu.mode, paging.linear_address(cpu, cpu.mode, access)
    return tuple(
        Update(load.pa, paging.accessed_flag(mode, level, address))
        for load, level in zip(entries_with_flags(cpu, guest), mode.levels, strict=False)
    )


def in_host(entries: list[Load], updates: tuple[Update, ...]) -> tuple[Update, ...]:
    """Updates of the first of a guest's entries, as updates of the host's memory."""
    return tuple(Update(at.pa, bits) for at, (_, bits) in zip(entries, updates, strict=False))


def flags_are_written_apart(stage: Stage) -> Condition:
    """Whether an update of a guest's flags can fail where reading the entry did not.

    With EPT's own accessed and dirty flags, and with nested paging, reading an entry for a walk
    counts as a write already. Source: SDM Vol. 3C, 31.3.3.2; APM Vol. 2, 15.25.5.
    """
    return isinstance(stage, Ept) and stage.ad == 0


def write_back(stage: Stage, memory: Memory, load: Load, update: Update) -> Outcome:
    """The outcome of the update of a guest's entry. Where its flags are set already nothing is
    written: then it is the read once more, which did not fail.
    """
    missing = flag(update.bits & ~load.entry != 0)
    return second_stage.translate(stage, memory, access_to_table(load.gpa, write=missing))


def access_to_page(cpu: Cpu, guest: GuestMemory, access: Access, gpa: Word) -> GuestPhysicalAccess:
    """The access to the page, with what the guest's own entries say of it."""
    address = paging.linear_address(cpu, cpu.mode, access)
    allowed, forbidden = paging.USER | paging.WRITABLE, 0
    for step in paging.path(cpu, Again(guest.loads), address):
        allowed, forbidden = allowed & step.entry, forbidden | step.entry
    return GuestPhysicalAccess(
        gpa,
        write=access.write,
        fetch=access.fetch,
        user=bit(allowed, 2),
        writable=bit(allowed, 1),
        no_execute=bit(forbidden, 63),
        shadow_stack=access.shadow_stack & cpu.cet,
    )


class Again:
    """The loads of a walk for the same walk once more: in order, and without a second stage."""

    limit: Word = GUEST_LIMIT

    def __init__(self, loads: list[Load]) -> None:
        self.entries = iter([load.entry for load in loads])

    def load(self, address: Word) -> Word:
        """The next entry."""
        return next(self.entries)


def page_level(guest: int, host: int) -> int:
    """The level of what both stages map as a whole: the smaller page. Without paging there are no
    pages of the guest's (level 0).
    """
    if guest == 0:
        return host
    return ite(guest < host, guest, host)


def stopped_by(outcome: Outcome, flags: tuple[Update, ...]) -> Outcome:
    """The outcome of an access to a guest-physical address as that of the guest's: the flags set
    before, by it or on the way to it, may be set.
    """
    assert isinstance(outcome, EptViolation | EptMisconfiguration | NestedPageFault | OutsideMemory)
    outcome.may_update = flags + outcome.may_update
    return outcome


def allowed(cpu: Cpu, stage: Stage, memory: Memory, access: Access) -> tuple[Outcome, ...]:
    """Every outcome that a processor may have: that of `translate`, and where that is another, an
    exit for an update of the guest's flags that comes earlier or later.

    The manuals do not say when flags are set: as the walk goes, or at its end; before the page is
    accessed, or together with that. (Of Intel's processors it is known that they set them after a
    walk that succeeded, as KVM does.) With no update written apart there is one outcome.
    """
    outcomes = [translate(cpu, stage, memory, access)]
    if not flags_are_written_apart(stage):
        return tuple(outcomes)
    guest = GuestMemory(stage, memory)
    final: Outcome | None = None
    updates: tuple[Update, ...] | None = None
    try:
        first = paging.translate(cpu, guest, access)
        if isinstance(first, PageFault):
            updates = first.may_update
        elif isinstance(first, Translated):
            updates = first.updates
            page = access_to_page(cpu, guest, access, first.pa)
            final = second_stage.translate(stage, memory, page)
    except Stopped:
        pass
    marked = passed(cpu, guest, access)
    flags = guest.flags + marked
    if final is not None and not isinstance(final, Translated):
        outcomes.append(stopped_by(final, flags))
    entries = entries_with_flags(cpu, guest)
    for load, update in zip(entries, marked if updates is None else updates, strict=False):
        written = write_back(stage, memory, load, update)
        if not isinstance(written, Translated):
            outcomes.append(stopped_by(written, flags))
    return tuple(outcomes)


def load_pdptes(
    cpu: Cpu, stage: Stage, memory: Memory
) -> tuple[Word, Word, Word, Word] | GeneralProtection | Outcome:
    """What a guest's MOV to CR3 puts into its PDPTE registers, see `paging.load_pdptes`.

    CR3 is guest-physical. The loads are reads, also with accessed and dirty flags for EPT, and an
    exit says that no linear address is behind them. Source: SDM Vol. 3C, 31.3.3.2 and table 30-7.
    (With nested paging a processor loads no PDPTEs, each walk does: APM Vol. 2, 15.25.10.)
    """
    guest = GuestMemory(stage, memory, linear=0)
    try:
        return paging.load_pdptes(cpu, guest)
    except Stopped as stopped:
        return stopped_by(stopped.outcome, guest.flags)


def most_loads(guest_levels: int, host_levels: int) -> int:
    """How many entries a walk of both stages reads at most: (n + 1)(m + 1) - 1.

    Each of the n entries of the guest is itself read after m of the second stage, and m more lead
    to the page: n(m + 1) + m. 24 with 4 and 4 levels, 35 with 5 and 5. What huge pages buy: a large
    page of the guest is one n less, one of the host an m less for each access that meets it.
    """
    return (guest_levels + 1) * (host_levels + 1) - 1
