"""Programs of guest and host steps on a real hypervisor: drawn, run in batches, and judged.

The programs are those of `vapama.spec.programs`, on the plan that `ready` makes of theirs. Each
step is judged by the machine that a guest believes in (`vapama.spec.machine`), with all the
staleness that the architecture allows; at the end all memory is compared. While the hypervisor runs
one batch, the last is judged and the next is made.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import msgspec

from vapama.case import Case, make_case
from vapama.oracles import nested_kvm as k
from vapama.oracles.emulator import MachineDied
from vapama.oracles.nested_kvm import Command, NestedKvm, Result, Told
from vapama.spec import programs
from vapama.spec.access import Access
from vapama.spec.cpu import AC, NXE, PCIDE, SMAP, SMEP, Cpu
from vapama.spec.invariants.vmm import (
    DESIGNS,
    NAMES,
    each_guest_sees_what_its_own_machine_allows,
    no_guest_reaches_what_is_not_its_own,
)
from vapama.spec.machine import (
    Departure,
    GuestMachine,
    Look,
    Machine,
    Piece,
    load_bytes,
    pieces,
)
from vapama.spec.outcomes import (
    RSVD,
    NonCanonical,
    Outcome,
    OutsideMemory,
    P,
    Translated,
)
from vapama.spec.paging import ACCESSED, DIRTY, PAGE_SIZE, PRESENT
from vapama.spec.steps import (
    NPT,
    SHADOW,
    DeviceWrite,
    Done,
    Faulted,
    Load,
    Loaded,
    Move,
    Plan,
    Rest,
    Seen,
    SetSlot,
    Step,
    Store,
    Stored,
    device_word,
)
from vapama.spec.tlb import PATH, Processor
from vapama.spec.words import Word

BATCH = 100
LONGEST = 32
"""Steps of a program."""
FRAME = 0x000F_FFFF_FFFF_F000


# PROGRAMS


def ready(plan: Plan) -> Plan:
    """The plan with what our agent needs in the guests' memory: its entry in each table that is
    used as a root, and in each page the code that a fetch meets.
    """
    (first, *_) = plan.guests
    words = dict(first.image)
    for frame in (programs.ROOT, programs.OTHER_ROOT, programs.POINTERS):
        words[frame << 12 | k.ENTRANCE << 3] = k.AGENT_FRAME << 12 | k.OPEN
    for slot in (programs.MAIN, programs.ROM):
        for n in range(slot.pages):
            words[slot.gfn + n << 12 | k.STAMP_AT] = k.stamp(slot.page + n)
    return plan._replace(guests=tuple(g._replace(image=words) for g in plan.guests))


@dataclass(frozen=True)
class Program:
    """A program: the words that it was decoded from, and what they come to here."""

    style: Word
    words: tuple[Word, ...]
    plan: Plan
    steps: tuple[Step, ...]
    commands: tuple[Command | None, ...]
    """The command of each step; None if there is nothing to do."""

    @property
    def given(self) -> list[Command]:
        """All commands: setting up, the steps, the comparison of all memory."""
        steps = [command for command in self.commands if command is not None]
        return [*k.power_on(self.plan), *steps, Command(k.END)]


def program(style: Word, words: Sequence[Word], cr4: Word) -> Program:
    """The program that these words stand for, without what cannot be done here."""
    style = style_of(style, cr4)

    def decoded(machine: Machine) -> Iterator[Step]:
        for word in words:
            step = fitted(programs.decode(word, machine, style), cr4)
            if not isinstance(step, Rest):
                yield step

    return of_steps(style, words, decoded)


def of_steps(
    style: Word, words: Sequence[Word], steps: Callable[[Machine], Iterator[Step]]
) -> Program:
    """The program of these steps, each of which may depend on the control state before it."""
    plan = ready(programs.plan(style))
    machine = Machine(plan)
    made, commands = [], []
    for step in steps(machine):
        made.append(step)
        commands.append(k.command(step, _cpu(machine, step)))
        if isinstance(step, Move):
            machine.guests[step.guest].move(step.vcpu, step, Done())
    return Program(style, tuple(words), plan, tuple(made), tuple(commands))


def style_of(bits: Word, cr4: Word) -> Word:
    """A style without what needs bits that these processors' CR4 lacks: see `programs.plan`."""
    for number, needed in ((21, SMEP), (22, SMAP), (25, PCIDE)):
        if not cr4 & needed:
            bits &= ~(1 << number)
    return bits


def fitted(step: Step, cr4: Word) -> Step:
    """A step as it can be made here, `Rest` if it cannot: fetches go to where there is code, and no
    root is without the entry that leads to our agent.
    """
    match step:
        case Load(_, _, access) if access.fetch:
            address = access.address & ~0xFFF | k.STAMP_AT
            return step._replace(access=access._replace(address=address))
        case Move(_, _, "cr3", value) if value >> 12 == programs.DEVICE:
            return Rest()
    return step if k.can(step, cr4) else Rest()


def _cpu(machine: Machine, step: Step) -> Cpu:
    guest, vcpu = getattr(step, "guest", 0), getattr(step, "vcpu", 0)
    return machine.guests[guest].processors[vcpu].cpu


def draw(random: Random, cr4: Word) -> Iterator[Program]:
    """Programs without end."""
    while True:
        words = [random.getrandbits(64) for _ in range(random.randint(4, LONGEST))]
        yield program(random.getrandbits(29), words, cr4)


# JUDGING


@dataclass
class Difference:
    """A program in which the hypervisor did what no machine may do, at a step of it."""

    program: Program
    at: int
    what: str
    again: bool = False
    """Whether it was seen again when the program was run alone, and shrunk."""
    of_memory: bool = False
    """Whether it is a word of memory that is not what the steps made of it."""

    def case(self, hypervisor: str, npt: bool) -> Case:
        """The program as a Case of the claim that it breaks on this hypervisor."""
        claim = no_guest_reaches_what_is_not_its_own
        if not self.of_memory:
            claim = each_guest_sees_what_its_own_machine_allows
        words = [word for word in self.program.words if word]
        design = DESIGNS.index(NPT if npt else SHADOW)
        draws = [("style", self.program.style), ("design", design), ("steps", len(words))]
        draws += zip(NAMES, words, strict=False)
        return make_case(claim.__name__, hypervisor, "oracles", self.what, draws)


@dataclass
class Tally:
    """What came of a run."""

    judged: int = 0
    """Programs."""
    steps: int = 0
    agreed: Counter[str] = field(default_factory=Counter)
    """Steps that agreed, by what was seen of them."""
    known: Counter[str] = field(default_factory=Counter)
    """Steps that show a departure known by name."""
    differences: list[Difference] = field(default_factory=list)
    seconds: float = 0.0
    deaths: int = 0


def judge(done: Program, results: Sequence[Result], tally: Tally, npt: bool) -> None:
    """Judge a program by what came of its commands."""
    tally.judged += 1
    machine = Machine(done.plan)
    held = [dict(guest.map.backing) for guest in machine.guests]
    left = iter(results[len(k.power_on(done.plan)) :])
    put: dict[int, set[int]] = {number: set() for number in range(len(machine.guests))}

    def look(guest: int, address: Word) -> Word:
        return held[guest].get(machine.guests[guest].map.word_of(address), 0)

    for number, (step, command) in enumerate(zip(done.steps, done.commands, strict=True)):
        result = k.NOTHING if command is None else next(left)
        for guest, word, value in result.changes:
            held[guest][word] = value
        try:
            ended = not _follow(machine, step, result, look, tally, npt, put)
        except (Departure, Told) as why:
            of_memory = isinstance(why, Unfollowed)
            tally.differences.append(Difference(done, number, str(why), of_memory=of_memory))
            return
        tally.steps += 1
        if isinstance(step, SetSlot) and step.slot is not None:
            put[step.guest].update(range(step.slot.gfn, step.slot.gfn + step.slot.pages))
        if ended:
            return
    for guest, word, value in next(left).changes:
        held[guest][word] = value
    for number, guest_ in enumerate(machine.guests):
        for word in held[number].keys() | guest_.map.backing.keys():
            is_, was = held[number].get(word, 0), guest_.map.backing.get(word, 0)
            if is_ != was:
                what = f"guest {number} holds {is_:#x} in word {word:#x} and not {was:#x}"
                end = len(done.steps)
                tally.differences.append(Difference(done, end, what, of_memory=True))
                return


def _follow(
    machine: Machine,
    step: Step,
    result: Result,
    look: Look,
    tally: Tally,
    npt: bool,
    put: dict[int, set[int]],
) -> bool:
    """Judge a step and follow it; whether the program went on. `put` are the frames of each guest
    that got memory since power-on. Raises `Departure`, `Told`.
    """
    try:
        seen = k.seen(step, result)
        machine.check(step, seen, look)
        _require_followed(machine, result)
    except (Departure, Told) as why:
        if not isinstance(step, Load | Store):
            raise
        for name, shows in DEPARTURES[npt].items():
            shown = _Shown(machine, step, result, look, frozenset(put[step.guest]))
            if shows(shown) and _is_followed(machine, result):
                tally.known[name] += 1
                return result.ended == k.DONE
        raise why
    tally.agreed[_kind(step, seen)] += 1
    return True


class Unfollowed(Departure):
    """A word of memory is not what the steps made of it."""


def _is_followed(machine: Machine, result: Result) -> bool:
    try:
        _require_followed(machine, result)
    except Unfollowed:
        return False
    return True


def _require_followed(machine: Machine, result: Result) -> None:
    """Each word that changed is as the machine has it. Raises `Unfollowed`."""
    for guest, word, value in result.changes:
        before = machine.guests[guest].map.backing.get(word, 0)
        if before != value:
            raise Unfollowed(f"guest {guest}: word {word:#x} became {value:#x}, from {before:#x}")


@dataclass
class _Shown:
    """An access that was not seen to go as the machine allows."""

    machine: Machine
    step: Load | Store
    result: Result
    look: Look
    put: frozenset[int]
    """Guest frames that got memory since power-on."""

    @property
    def guest(self) -> GuestMachine:
        return self.machine.guests[self.step.guest]

    def seen(self) -> Seen | None:
        """What was seen, if it is anything."""
        try:
            return k.seen(self.step, self.result)
        except Told:
            return None

    def allows(self, seen: Seen, look: Look | None = None) -> bool:
        """Whether the machine allows this instead; if so it is followed."""
        try:
            self.machine.check(self.step, seen, look or self.look)
        except Departure:
            return False
        return True

    @property
    def processor(self) -> Processor:
        return self.guest.processors[self.step.vcpu]

    def outcomes(self) -> Iterator[Outcome]:
        """All outcomes of the access that are allowed, page by page."""
        for piece in pieces(self.step.access.address):
            yield from self.outcomes_of(self.step.access._replace(address=piece.address))

    def outcomes_of(self, access: Access) -> Iterator[Outcome]:
        """All outcomes of an access in one page that are allowed."""
        for allowed in self.processor.allowed(access):
            yield allowed.outcome

    def entries(self) -> set[Word]:
        """Where there may be an entry of a walk for the access, stale ones included."""
        guest = self.guest
        found: set[Word] = set()
        for piece in pieces(self.step.access.address):
            tables = {c.cpu.cr3 & FRAME for c in self.processor.contexts}
            for shift in (39, 30, 21, 12):
                entries = {table | (piece.address >> shift & 0x1FF) << 3 for table in tables}
                found |= entries
                tables = {
                    value & FRAME
                    for entry in entries
                    if guest.map.slot_of(entry >> 12) is not None
                    for value, _ in guest.history.values(entry)
                    if value & PRESENT
                }
        return found

    def is_writable(self, address: Word) -> bool:
        slot = self.guest.map.slot_of(address >> 12)
        return slot is not None and not slot.readonly

    def holding(self, part: Piece, value: Word, pas: Iterable[Word]) -> tuple[Word, Word] | None:
        """The word, of those at these addresses, that was made to hold this part of a store."""
        low = part.address & 7
        bits = (1 << 8 * part.size) - 1 << 8 * low
        for pa in pas:
            address = pa & ~7
            if self.is_writable(address):
                word = self.guest.load(address) & ~bits | value << 8 * low
                if self.look(self.step.guest, address) == word:
                    return address, word
        return None

    def adopt(self, flags: Word = ACCESSED) -> None:
        """Take over the flags of these that were found to be set on the way."""
        for address in self.entries():
            if self.is_writable(address):
                before, now = self.guest.load(address), self.look(self.step.guest, address)
                if before ^ now and now & ~flags == before & ~flags and now & before == before:
                    self.guest.write(address, now)


def _not_present_outside(shown: _Shown) -> bool:
    seen = shown.seen()
    return isinstance(seen, Faulted) and any(
        isinstance(outcome, OutsideMemory) and shown.allows(outcome)
        for outcome in shown.outcomes()
        if seen.error_code & (P | RSVD) == 0
    )


def _lacks_p(shown: _Shown) -> bool:
    seen = shown.seen()
    if not isinstance(seen, Faulted) or seen.error_code & (P | RSVD) != RSVD:
        return False
    return shown.allows(seen._replace(error_code=seen.error_code | P))


def _marks_reserved(shown: _Shown) -> bool:
    """The same, and the large page that has the reserved bit is marked accessed."""
    seen, number = shown.seen(), shown.step.guest
    if not isinstance(seen, Faulted) or seen.error_code & (P | RSVD) != RSVD:
        return False
    entries = filter(shown.is_writable, shown.entries())
    large = {entry for entry in entries if shown.look(number, entry) & PAGE_SIZE}

    def unmarked(guest: int, address: Word) -> Word:
        now = shown.look(guest, address)
        if guest != number or address not in large:
            return now
        return now & ~ACCESSED | shown.guest.load(address) & ACCESSED

    if not shown.allows(seen._replace(error_code=seen.error_code | P), unmarked):
        return False
    shown.adopt()
    return True


def _remembers_device(shown: _Shown) -> bool:
    """A supervisor's store, with CR0.WP=0, went to the device where a load may go; it did not walk
    for it, and set no dirty flag. If it lies across two pages, the other part may be in memory.
    """
    step, cpu = shown.step, shown.processor.cpu
    if not isinstance(step, Store) or cpu.wp or step.access.user:
        return False

    def beyond(access: Access) -> Iterator[Word]:
        for outcome in shown.outcomes_of(access._replace(write=0)):
            if isinstance(outcome, Translated) and not shown.is_writable(outcome.pa):
                yield outcome.pa

    return _stored_beyond(shown, step, beyond)


def _misses_memory(shown: _Shown) -> bool:
    """It went to the device that was there before memory was put into a slot."""
    step, seen = shown.step, shown.seen()

    def beyond(access: Access) -> Iterator[Word]:
        for outcome in shown.outcomes_of(access):
            if isinstance(outcome, Translated) and outcome.pa >> 12 in shown.put:
                yield outcome.pa

    if isinstance(step, Store):
        return _stored_beyond(shown, step, beyond)
    values = {0: False}
    """What the parts may have given, and whether one of them was the device's."""
    for part in pieces(step.access.address):
        access = step.access._replace(address=part.address)
        given = [(load_bytes(device_word, pa, part.size), True) for pa in beyond(access)]
        walked = (o.pa for o in shown.outcomes_of(access) if isinstance(o, Translated))
        given += [(load_bytes(shown.guest.load, pa, part.size), False) for pa in walked]
        values = {
            whole | value << part.shift: by_device or by_devices
            for whole, by_devices in values.items()
            for value, by_device in reversed(given)
        }
    if not isinstance(seen, Loaded) or not values.get(seen.value, False):
        return False
    shown.adopt()
    return True


def _stored_beyond(shown: _Shown, step: Store, beyond: Callable[[Access], Iterable[Word]]) -> bool:
    """Whether a store was made, with a part of it to a device at an address that is `beyond` what a
    machine may use for an access to the part; then it is followed, with the flags that were set.
    """
    seen = shown.seen()
    if not isinstance(seen, Stored) or not seen.devices:
        return False
    devices, stored = list(seen.devices), dict[Word, Word]()
    for part in pieces(step.access.address):
        value = step.value >> part.shift & (1 << 8 * part.size) - 1
        access = step.access._replace(address=part.address)
        walked = [o.pa for o in shown.outcomes_of(access) if isinstance(o, Translated)]
        places = {*beyond(access), *(pa for pa in walked if not shown.is_writable(pa))}
        if devices and devices[0] in {DeviceWrite(pa, part.size, value) for pa in places}:
            devices.pop(0)
        elif found := shown.holding(part, value, walked):
            stored.update([found])
        else:
            return False
    if devices:
        return False
    shown.adopt(ACCESSED | DIRTY)
    for address, word in stored.items():
        shown.guest.write(address, word)
        shown.guest.wrote(address)
    return True


def _marks_page_0_dirty(shown: _Shown) -> bool:
    """A load from a device in the first page of linear addresses set the entry's dirty flag; or a
    fetch, which besides was not emulated.
    """
    seen, number, step = shown.seen(), shown.step.guest, shown.step
    if not isinstance(step, Load) or step.access.address >> 12:
        return False
    pages = [outcome for outcome in shown.outcomes() if isinstance(outcome, Translated)]
    beyond = [page for page in pages if not shown.is_writable(page.pa)]
    leaves = {page.updates[-1].address for page in beyond}
    leaves = {leaf for leaf in leaves if shown.is_writable(leaf)}
    could_be: list[Seen] = [seen] if isinstance(seen, Loaded) else []
    if k.was_emulated(step, shown.result, 0):
        could_be += [Loaded(load_bytes(shown.guest.load, page.pa, 8)) for page in beyond]

    def clean(guest: int, address: Word) -> Word:
        return shown.look(guest, address) & ~((guest == number and address in leaves) * DIRTY)

    if not any(shown.allows(instead, clean) for instead in could_be):
        return False
    for leaf in leaves:
        shown.guest.write(leaf, shown.look(number, leaf))
    return True


def _keeps_past_fault(shown: _Shown) -> bool:
    """It is right for a processor whose page faults drop nothing of what is cached."""
    seen, processor = shown.seen(), shown.processor
    invalidations = processor.invalidations
    processor.invalidations = [
        (time, i)
        for time, i in invalidations
        if not (i.structures == PATH and i.address is not None and i.global_too)
    ]
    allowed = seen is not None and shown.allows(seen)
    processor.invalidations = invalidations
    return allowed


def _shares_execute_disable(shown: _Shown) -> bool:
    """It is right for EFER.NXE=1, with which another processor of the guest has run."""
    seen, guest = shown.seen(), shown.guest
    with_nxe = any(c.cpu.efer & NXE for p in guest.processors for c in p.contexts)
    contexts = shown.processor.contexts
    now = contexts[-1]
    if seen is None or now.cpu.efer & NXE or not with_nxe:
        return False
    contexts[-1] = now._replace(cpu=now.cpu._replace(efer=now.cpu.efer | NXE))
    allowed = shown.allows(seen)
    contexts[-1] = now
    return allowed


def _stores_half(shown: _Shown) -> bool:
    """A store across two pages was made in the first, though the second faulted as is allowed."""
    step, seen, guest = shown.step, shown.seen(), shown.guest
    if not isinstance(step, Store) or not isinstance(seen, Faulted):
        return False
    first, *others = pieces(step.access.address)
    walked = [o.pa for o in shown.outcomes_of(step.access) if isinstance(o, Translated)]
    found = shown.holding(first, step.value & (1 << 8 * first.size) - 1, walked)
    if not others or found is None:
        return False
    address, word = found
    before = guest.load(address)
    guest.write(address, word)
    if not shown.allows(seen):
        guest.write(address, before)
        return False
    guest.wrote(address)
    return True


def _loses_smap(shown: _Shown) -> bool:
    """It is right for RFLAGS.AC=1, with which the supervisor has run, CR0.WP being 0."""
    seen, guest, contexts = shown.seen(), shown.guest, shown.processor.contexts
    with_ac = any(c.cpu.ac & c.cpu.smap & ~c.cpu.wp for p in guest.processors for c in p.contexts)
    now = contexts[-1]
    cpu, access = now.cpu, shown.step.access
    if seen is None or not with_ac or access.user or cpu.wp or cpu.ac or not cpu.smap:
        return False
    contexts[-1] = now._replace(cpu=cpu._replace(rflags=cpu.rflags | AC))
    allowed = shown.allows(seen)
    contexts[-1] = now
    return allowed


def _takes_table_for_page(shown: _Shown) -> bool:
    """The access went to an entry of its own walk that cannot be written, the place in the page
    being the same.
    """
    seen, address = shown.seen(), shown.step.access.address
    for entry in shown.entries():
        if shown.is_writable(entry) or (entry ^ address) & 0xFFF:
            continue
        there: Seen = Loaded(shown.guest.load(entry))
        if isinstance(shown.step, Store):
            there = Stored((DeviceWrite(entry, 8, shown.step.value),))
        if seen == there:
            shown.adopt()
            return True
    return False


def _hangs(shown: _Shown) -> bool:
    """The guest came no further, and may have used tables in read-only memory."""
    if shown.result.ended != k.HUNG:
        return False
    slots = [shown.guest.map.slot_of(entry >> 12) for entry in shown.entries()]
    shown.adopt()
    return any(slot is not None and slot.readonly for slot in slots)


def _fetches_from_device(shown: _Shown) -> bool:
    """Code was run where no memory is, as is allowed."""
    if not isinstance(shown.step, Load) or not k.was_emulated(shown.step, shown.result, 0):
        return False
    for outcome in list(shown.outcomes()):
        is_device = isinstance(outcome, Translated) and not shown.guest.map.slot_of(
            outcome.pa >> 12
        )
        if isinstance(outcome, Translated) and is_device:
            word = load_bytes(shown.guest.load, outcome.pa, 8)
            if shown.allows(Loaded(word)):
                return True
    return False


def _emulates_code(shown: _Shown) -> bool:
    """The code of a page was run by KVM's emulator, which did not know its last instruction: the
    walk was through an entry that cannot be written, or a load from there may go to a device.
    """
    step, result = shown.step, shown.result
    if not isinstance(step, Load) or not k.was_emulated(step, result, k.STAMP_LENGTH):
        return False
    # Where the device is was remembered from any access, of whatever rights.
    to_device = any(
        isinstance(outcome, Translated)
        and (shown.guest.map.slot_of(outcome.pa >> 12) is None or outcome.pa >> 12 in shown.put)
        for user in (0, 1)
        for outcome in shown.outcomes_of(step.access._replace(fetch=0, user=user))
    )
    if not to_device and all(shown.is_writable(entry) for entry in shown.entries()):
        return False
    if result.ended == k.STUCK:
        shown.adopt()
        return True
    return shown.allows(Loaded(k.stamped(result.data)))


BOTH: dict[str, Callable[[_Shown], bool]] = {
    "table-outside-memory-is-not-present": _not_present_outside,
    "code-in-a-device-is-not-emulated": _fetches_from_device,
    "store-across-pages-is-half-made": _stores_half,
    "emulated-code-lacks-int3": _emulates_code,
}
DEPARTURES: dict[bool, dict[str, Callable[[_Shown], bool]]] = {
    False: {
        **BOTH,
        "page-fault-leaves-what-is-stale": _keeps_past_fault,
        "store-to-a-device-is-not-walked-for": _remembers_device,
        "load-from-a-device-in-page-0-sets-dirty": _marks_page_0_dirty,
        "execute-disable-is-not-reserved-once-shared": _shares_execute_disable,
        "memory-put-over-a-device-is-missed": _misses_memory,
        "smap-is-lost-where-wp-is-0": _loses_smap,
    },
    True: {
        **BOTH,
        "reserved-bit-fault-lacks-p": _lacks_p,
        "reserved-large-page-is-marked-accessed": _marks_reserved,
        "nested-fault-of-a-table-is-taken-for-the-access": _takes_table_for_page,
        "tables-in-read-only-memory-hang-the-guest": _hangs,
    },
}
"""The known departures, by whether nested paging is used; nested_kvm.py gives their sources."""


def _kind(step: Step, seen: Seen) -> str:
    match seen:
        case Loaded():
            return "fetched" if isinstance(step, Load) and step.access.fetch else "loaded"
        case Stored(devices):
            return "stored to a device" if devices else "stored"
        case Faulted(code):
            return "page fault with RSVD" if code & RSVD else "page fault"
        case NonCanonical():
            return "non-canonical address"
    return {"Move": "MOV to a register", "Invlpg": "INVLPG"}.get(
        type(step).__name__, f"host: {type(step).__name__}"
    )


# RUNS


def run(
    hypervisor: NestedKvm,
    count: int,
    seed: int,
    seconds: float | None = None,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Run programs until so many are judged, or for so long."""
    tally, start = Tally(), time.monotonic()
    source = draw(Random(seed), hypervisor.cr4)
    running: list[Program] = []
    asked = 0
    hypervisor.set_image(k.image(ready(programs.plan()).guests[0]))
    while running or asked < count:
        late = seconds is not None and time.monotonic() - start > seconds
        wanted = 0 if late else min(BATCH, count - asked)
        if late:
            count = asked
        batch = [next(source) for _ in range(wanted)]
        asked += wanted
        done = finish(hypervisor, running, tally) if running else []
        if batch:
            give(hypervisor, batch)
        for program_, results in done:
            judge(program_, results, tally, hypervisor.npt)
        tally.seconds = time.monotonic() - start
        if done:
            progress(tally)
        running = batch
    shrunk_ = [shrunk(hypervisor, found) for found in tally.differences[:MOST_SHRUNK]]
    tally.differences[:MOST_SHRUNK] = shrunk_
    return tally


MOST_SHRUNK = 5
"""Differences of a run that are shrunk."""


def shrunk(hypervisor: NestedKvm, found: Difference) -> Difference:
    """The difference with as few steps as are needed to see a difference there again."""

    def differs(words: list[Word]) -> Difference | None:
        tally = Tally()
        tried = program(found.program.style, words, hypervisor.cr4)
        give(hypervisor, [tried])
        for program_, results in finish(hypervisor, [tried], tally):
            judge(program_, results, tally, hypervisor.npt)
        return replace(tally.differences[0], again=True) if tally.differences else None

    words = list(found.program.words)
    best = differs(words)
    if best is None:
        return found
    for number in range(len(words)):
        fewer = [0 if n == number else word for n, word in enumerate(words)]
        smaller = differs(fewer)
        if smaller is not None:
            words, best = fewer, smaller
    return best


def give(hypervisor: NestedKvm, batch: Sequence[Program]) -> None:
    """Let the hypervisor start on a batch."""
    hypervisor.give([command for program_ in batch for command in program_.given])


def finish(
    hypervisor: NestedKvm, batch: Sequence[Program], tally: Tally
) -> list[tuple[Program, list[Result]]]:
    """Each program of the batch under way, with what came of its commands.

    If the hypervisor dies or hangs it is started again, and the programs are run one by one: one
    that it dies of is a difference.
    """
    try:
        results = iter(hypervisor.await_finish())
        return [(p, [next(results) for _ in p.given]) for p in batch]
    except MachineDied as death:
        tally.deaths += 1
        hypervisor.start()
        if len(batch) == 1:
            tally.judged += 1
            tally.differences.append(Difference(batch[0], 0, str(death)))
            return []
    done = []
    for program_ in batch:
        give(hypervisor, [program_])
        done += finish(hypervisor, [program_], tally)
    return done


def as_json(tally: Tally) -> bytes:
    """The tally as JSON."""
    return msgspec.json.encode(
        {
            "judged": tally.judged,
            "steps": tally.steps,
            "seconds": round(tally.seconds, 3),
            "deaths": tally.deaths,
            "agreed": dict(sorted(tally.agreed.items())),
            "known": dict(sorted(tally.known.items())),
            "differences": [
                {
                    "style": found.program.style,
                    "words": [hex(word) for word in found.program.words],
                    "steps": [str(step) for step in found.program.steps[: found.at + 1]],
                    "what": found.what,
                    "again": found.again,
                }
                for found in tally.differences
            ],
        }
    )
