"""The machine that a guest believes in: its memory is its own, and nobody is below.

A `Machine` is a checker. It is told each step of a program and what was seen of it, says whether
the architecture allows that, and follows what was seen where it leaves a choice (a translation that
may still be cached, accessed flags set early), so that later steps are judged from what really
happened. What the host does is no step of this machine: it changes nothing, but for the memory
slots, which are the guest's memory map.

Guests share nothing here: that each sees what its own machine allows is isolation, as it is
transparency. Source: Intel SDM Vol. 3A, chapter 4; `spec.tlb` for what may be cached.
"""

import marshal
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from hashlib import blake2b
from itertools import product
from typing import Any, NamedTuple, TypeAlias

from vapama.spec import modes
from vapama.spec.access import Access
from vapama.spec.cpu import CD, NW, PAE, PG, PSE, SMEP, Cpu
from vapama.spec.outcomes import (
    GeneralProtection,
    NonCanonical,
    Outcome,
    OutsideMemory,
    PageFault,
    Translated,
    Update,
    kind,
)
from vapama.spec.paging import load_pdptes
from vapama.spec.steps import (
    DeviceWrite,
    Done,
    Faulted,
    GuestPlan,
    Harvest,
    Harvested,
    Invlpg,
    Invpcid,
    Load,
    Loaded,
    Log,
    Move,
    Plan,
    Seen,
    SetSlot,
    Slot,
    Step,
    Store,
    Stored,
    device_word,
)
from vapama.spec.tlb import KEEP, PGE, History, Processor, shallow
from vapama.spec.words import WORD, Word, low_bits

Look: TypeAlias = Callable[[int, Word], Word]
"""The word that the subject has for a guest at a guest-physical address, after the step."""

FLAGGED = modes.ACCESSED | modes.DIRTY
EITHER_FLAGGED = FLAGGED | FLAGGED << 32
"""The flags of an entry; of either, where a word holds two of 32-bit paging."""


class Departure(AssertionError):
    """What was seen is not what the architecture allows."""


class Piece(NamedTuple):
    """The part of an access that lies in one page: its address, its bytes, where they belong."""

    address: Word
    size: int
    shift: int


class Way(NamedTuple):
    """One way that an access may go: the outcome of each piece, the flags it has to set, and those
    that it may set, with these among them.
    """

    outcomes: tuple[Outcome, ...]
    must: tuple[Update, ...]
    may: tuple[Update, ...]


class Edge:
    """The limit of a memory with holes: every address that is in no slot lies at it or beyond."""

    def __init__(self, of: "Map") -> None:
        self.map = of

    def __le__(self, address: Word) -> bool:
        return self.map.found[address >> 12] is None

    def __gt__(self, address: Word) -> bool:
        return self.map.found[address >> 12] is not None


class Found(dict[int, Slot | None]):
    """The slot that a guest frame is in, or None, of each that was asked for: others are looked for
    in `slots`.
    """

    def __init__(self, slots: Mapping[int, Slot]) -> None:
        super().__init__()
        self.slots = slots

    def __missing__(self, gfn: int) -> Slot | None:
        for slot in self.slots.values():
            if slot.gfn <= gfn < slot.gfn + slot.pages:
                break
        else:
            slot = None
        self[gfn] = slot
        return slot


class Map:
    """A guest's memory map, as the memory of its walks: words of the backing by address."""

    def __init__(self, slots: dict[int, Slot], backing: dict[int, Word]) -> None:
        self.slots, self.backing = dict(slots), backing
        self.found = Found(self.slots)
        self.named: dict[int, int] = {}
        """The names of guest frames that were asked for before; see `name`."""
        self.limit: Any = Edge(self)

    def clone(self) -> "Map":
        """The same map, of words that change apart from now on."""
        twin = shallow(self)
        twin.slots, twin.named = self.slots.copy(), self.named.copy()
        twin.found = Found(twin.slots)
        twin.backing, twin.limit = self.backing.copy(), Edge(twin)
        return twin

    def slot_of(self, gfn: int) -> Slot | None:
        """The memory slot that a guest frame is in."""
        return self.found[gfn]

    def set_slot(self, number: int, slot: Slot | None) -> Slot | None:
        """Put a slot in the place of another, which is returned."""
        old = self.slots.pop(number, None)
        if slot is not None:
            self.slots[number] = slot
        self.found.clear()
        self.named.clear()
        return old

    def is_writable(self, gfn: int) -> bool:
        """Whether a guest frame is in a memory slot that can be written to."""
        slot = self.found[gfn]
        return slot is not None and not slot.readonly

    def name(self, address: Word) -> Word:
        """The first of the addresses at which a word can be written; elsewhere the address."""
        gfn = address >> 12
        if gfn not in self.named:
            names = self.addresses(self.word_of(address)) if self.is_writable(gfn) else ()
            self.named[gfn] = next((a >> 12 for a in names if self.is_writable(a >> 12)), gfn)
        return self.named[gfn] << 12 | address & 0xFFF

    def word_of(self, address: Word) -> int:
        """Which word of the backing is at an address, which is in a slot."""
        slot = self.found[address >> 12]
        assert slot is not None
        return (slot.page - slot.gfn << 9) + (address >> 3)

    def load(self, address: Word) -> Word:
        """The word at an aligned address; 0 where there is no slot."""
        slot = self.found[address >> 12]
        if slot is None:
            return 0
        return self.backing.get((slot.page - slot.gfn << 9) + (address >> 3), 0)

    def addresses(self, word: int) -> Iterator[Word]:
        """Every address at which a word of the backing is."""
        for slot in self.slots.values():
            if slot.page <= word >> 9 < slot.page + slot.pages:
                yield (slot.gfn - slot.page << 12) + (word << 3)


class GuestMachine:
    """One guest: its memory, with all that it held, and its processors."""

    def __init__(self, plan: GuestPlan, has_pdpte_registers: bool) -> None:
        self.map = Map(plan.slots, {})
        for address, word in plan.image.items():
            self.map.backing[self.map.word_of(address)] = word
        self.dirty: dict[int, set[int]] = {}
        """Guest frames written since the last harvest, by memory slot whose log is on."""
        self.history = History(Map(plan.slots, dict(self.map.backing)))
        self.history.limit = self.map.limit
        self.processors = [Processor(self.history, cpu) for cpu in plan.vcpus]
        self.has_pdpte_registers = has_pdpte_registers

        self.entries: set[int] = set()
        """Words of the backing that were used as table entries, until one was stored to."""
        self.edited = False
        """Whether one was, so that there may be more than one way to go."""

    def clone(self) -> "GuestMachine":
        """The same guest, which goes on by itself."""
        twin = shallow(self)
        twin.map, twin.entries = self.map.clone(), self.entries.copy()
        twin.dirty = {number: gfns.copy() for number, gfns in self.dirty.items()}
        twin.history = self.history.clone(twin.map.limit)
        twin.processors = [processor.clone(twin.history) for processor in self.processors]
        return twin

    def state(self) -> bytes:
        """A digest of all that later steps are judged by: equal for equal states."""
        parts = (
            sorted(self.map.backing.items()),
            sorted([(number, *slot) for number, slot in self.map.slots.items()]),
            sorted([(a, list(held.items())) for a, held in self.history.held.items()]),
            [p.state() for p in self.processors],
            sorted([(number, sorted(gfns)) for number, gfns in self.dirty.items()]),
            sorted(self.entries),
            self.edited,
        )
        return blake2b(marshal.dumps(parts, 2), digest_size=16).digest()

    def set_slot(self, number: int, slot: Slot | None) -> None:
        """The memory map changes: what a slot gives and takes is written at its addresses."""
        old = self.map.set_slot(number, slot)
        self.dirty.pop(number, None)
        for changed, there in ((old, False), (slot, True)):
            if changed is not None:
                shift = changed.gfn - changed.page << 12
                for index, word in self.map.backing.items():
                    if changed.page <= index >> 9 < changed.page + changed.pages:
                        self.history.write((index << 3) + shift, word if there else 0)

    def load(self, address: Word) -> Word:
        """The word at an aligned guest-physical address: a device's, if no memory is there."""
        if self.map.found[address >> 12] is None:
            return device_word(address)
        return self.map.load(address)

    def write(self, address: Word, word: Word) -> None:
        """Put a word into memory, at every address that it has."""
        index = self.map.word_of(address)
        if self.map.backing.get(index, 0) == word:
            return
        self.map.backing[index] = word
        for alias in self.map.addresses(index):
            self.history.write(alias, word)

    def used(self, entries: set[int], stored: set[int]) -> None:
        """Note that an access used these words of the backing as entries, and stored to those."""
        self.entries |= entries
        if not self.entries.isdisjoint(stored):
            self.entries, self.edited = set(), True

    def wrote(self, address: Word) -> None:
        """Note that the guest frame at an address was written.

        Which of its names a page was written by does not show, once tables that were used have been
        edited: a stale translation may lead to another one, and its log.
        """
        if not self.dirty:
            return
        if self.edited and len(list(self.map.addresses(self.map.word_of(address)))) > 1:
            return
        for number, slot in self.map.slots.items():
            if slot.gfn <= address >> 12 < slot.gfn + slot.pages:
                self.dirty.get(number, set()).add(address >> 12)

    def move(self, vcpu: int, step: Move, seen: Seen) -> None:
        """A write to a control register, which loads PDPTEs or is refused for what they are.

        Raises `Departure`, and `cpu.ImpossibleState` for a state that no processor can be in.
        """
        processor = self.processors[vcpu]
        before = processor.cpu
        keep = step.value & KEEP if step.register == "cr3" else 0
        after = step._replace(value=step.value & ~keep).on(before)._replace(pdptes=None)
        if after.mode is modes.PAE and self.has_pdpte_registers:
            loaded: Any = before.pdptes
            if before.pdptes is None or reloads_pdptes(before, after, step.register):
                loaded = load_pdptes(after, self.map)
            if not isinstance(loaded, tuple):
                _require(seen == loaded, step, seen)
                return
            after = after._replace(pdptes=loaded)
        _require(isinstance(seen, Done), step, seen)
        if step.register == "cr3":
            processor.mov_cr3(step.value, after.pdptes)
        else:
            processor.change(possible(after))

    def log(self, number: int, on: bool) -> None:
        """The dirty log of a memory slot is started or stopped."""
        if not on:
            self.dirty.pop(number, None)
        elif number in self.map.slots:
            self.dirty.setdefault(number, set())

    def harvest(self, number: int, seen: Seen) -> None:
        """A log names at least every guest frame written since the last. Raises `Departure`."""
        written = self.dirty.get(number, set())
        missing = written - seen.gfns if isinstance(seen, Harvested) else written
        if missing or not isinstance(seen, Harvested):
            raise Departure(f"the dirty log of slot {number} lacks frames {sorted(missing)}")
        written.clear()


class Machine:
    """The guests of a plan, each as it believes to be."""

    def __init__(self, plan: Plan) -> None:
        self.guests = [GuestMachine(guest, plan.has_pdpte_registers) for guest in plan.guests]
        self.lent: set[int] = set()
        """The guests that a clone has too, until one of them makes a step."""
        self.digests: dict[int, bytes] = {}
        """The states of guests that have made no step since."""

    def clone(self) -> "Machine":
        """The same machine, which goes on by itself."""
        self.lent = set(range(len(self.guests)))
        twin = shallow(self)
        twin.guests, twin.lent, twin.digests = [*self.guests], {*self.lent}, {**self.digests}
        return twin

    def state(self) -> bytes:
        """A digest of all that later steps are judged by: equal for equal states."""
        for number, guest in enumerate(self.guests):
            if number not in self.digests:
                self.digests[number] = guest.state()
        return b"".join(self.digests[number] for number in range(len(self.guests)))

    def _stepping(self, number: int) -> GuestMachine:
        """A guest that is about to make a step."""
        self.digests.pop(number, None)
        if number in self.lent:
            self.lent.discard(number)
            self.guests[number] = self.guests[number].clone()
        return self.guests[number]

    def check(self, step: Step, seen: Seen, look: Look) -> None:
        """Judge what was seen of a step, and follow it. Raises `Departure`."""
        match step:
            case Load(guest, vcpu, access):
                its = self._stepping(guest)
                _Judged(its, vcpu, access, None, seen, guest, look).follow()
            case Store(guest, vcpu, access, value):
                its = self._stepping(guest)
                _Judged(its, vcpu, access, value, seen, guest, look).follow()
            case Move(guest, vcpu):
                self._stepping(guest).move(vcpu, step, seen)
            case Invlpg(guest, vcpu, address):
                _require(isinstance(seen, Done), step, seen)
                self._stepping(guest).processors[vcpu].invlpg(address)
            case Invpcid(guest, vcpu, how, pcid, address):
                _require(isinstance(seen, Done), step, seen)
                self._stepping(guest).processors[vcpu].invpcid(how, pcid, address)
            case SetSlot(guest, number, slot):
                self._stepping(guest).set_slot(number, slot)
            case Log(guest, number, on):
                self._stepping(guest).log(number, on)
            case Harvest(guest, number):
                self._stepping(guest).harvest(number, seen)
            case _:
                _require(isinstance(seen, Done), step, seen)


def reloads_pdptes(before: Cpu, after: Cpu, register: str) -> bool:
    """Whether a write to a control register after which PAE paging is in use loads the PDPTEs.

    Source: SDM Vol. 3A, 4.4.1.
    """
    in_cr0, in_cr4 = before.cr0 ^ after.cr0, before.cr4 ^ after.cr4
    return register == "cr3" or bool(in_cr0 & (CD | NW | PG) or in_cr4 & (PAE | PGE | PSE | SMEP))


@lru_cache(maxsize=1 << 12)
def possible(cpu: Cpu) -> Cpu:
    """This control state. Raises `cpu.ImpossibleState` if no processor can be in it."""
    return Cpu(*cpu)


class _Judged:
    """A load, fetch or store, and what was seen of it."""

    def __init__(
        self,
        machine: GuestMachine,
        vcpu: int,
        access: Access,
        value: Word | None,
        seen: Seen,
        guest: int,
        look: Look,
    ) -> None:
        self.machine, self.processor = machine, machine.processors[vcpu]
        self.access, self.value, self.seen = access, value, seen
        self.guest, self.look = guest, look
        self.pieces = pieces(access.address, self.processor.cpu.mode.width)
        self.stored: dict[Word, tuple[Word, Word]] = {}
        """The words that the store leaves, by address, and which of their bits it wrote."""
        self.flagged: dict[Word, Word] = {}
        """Entries that the store overwrote, all or a part, with the flags that were set in them
        before: as such they may be cached."""

    def follow(self) -> None:
        """Find a way that the access may go and that explains what was seen, and go it."""
        machine = self.machine
        ways = list(self._ways()) if machine.edited else self._ways()
        elsewhere = self._flagged_elsewhere(ways) if isinstance(ways, list) else {}
        flagged = self._names(elsewhere)
        for given_up in ({}, self._given_up(elsewhere, ways)) if elsewhere else ({},):
            for way in ways:
                entries = self._explains(way)
                if entries is not None and (
                    not flagged or flagged <= self._names(given_up | entries)
                ):
                    if not machine.edited:
                        machine.used(
                            self._words(address for address, _ in way.may),
                            self._words(self.stored),
                        )
                    self._go(given_up | entries)
                    if isinstance(self.seen, Faulted):
                        # A page fault drops what is cached of its address.
                        self.processor.page_fault(self.seen.cr2)
                    return
        raise Departure(self._told())

    def _given_up(self, elsewhere: dict[Word, Word], ways: Iterable[Way]) -> dict[Word, Word]:
        """Of entries that flags were set in, those whose flags one of the ways may set: they may be
        of a try of the access that left the guest before it was made, as one that was begun by what
        is cached, and once more by memory after a VM exit that the guest knows nothing of. Source:
        SDM Vol. 3A, 4.8 and 4.10.2.3.

        Such a try read the entry as memory has it. That is certain of one that its way cannot have
        cached, and of one that never had another value, but for its flags; of no other it is
        allowed.
        """
        may = self._gathered(update for way in ways for update in way.may)
        must = self._gathered(update for way in ways for update in way.must)

        def flags(address: Word, word: Word) -> Word:
            of_ways = may if self._was_never_another(address, word) else must
            return of_ways.get(self._name(address), (address, 0))[1]

        return {
            address: word
            for address, word in elsewhere.items()
            if (word ^ self.machine.load(address)) & ~flags(address, word) == 0
        }

    def _was_never_another(self, address: Word, word: Word) -> bool:
        """Whether the word there never was another, but for flags."""
        values = self.processor.history.values(address)
        return all((word ^ value) & ~EITHER_FLAGGED == 0 for value, _ in values)

    def _go(self, entries: dict[Word, Word]) -> None:
        """Set the flags that were set on the way, and then make the store."""
        for address, word in self.flagged.items():
            self.machine.write(address, word)
        for address in sorted(entries, key=self.stored.__contains__):
            if address in self.stored or self.machine.load(address) != entries[address]:
                self.machine.write(address, entries[address])
                self.machine.wrote(address)

    def _flagged_elsewhere(self, ways: Iterable[Way]) -> dict[Word, Word]:
        """Entries on any of the ways that the subject has set flags in, with these: they tell which
        way it went.
        """
        addresses = {address for way in ways for address, _ in way.may}
        return {
            address: word
            for address in filter(self._is_writable, addresses)
            if (word := self.look(self.guest, address)) != self.machine.map.load(address)
        }

    def _ways(self) -> Iterator[Way]:
        """Every way that the access may go, that with nothing cached first.

        That is among those that a cache allows; while there is no other it is found sooner alone.
        """
        if not self.machine.edited:
            fresh = tuple(self._fresh(piece) for piece in self.pieces)
            flags = tuple(update for outcome in fresh for update in _sets(outcome))
            yield Way(fresh, flags, flags)
        first, *others = [list(self._allowed(piece)) for piece in self.pieces]
        if not others:
            yield from first
            return
        for one, other in product(first, *others):
            yield Way(one.outcomes + other.outcomes, one.must + other.must, one.may + other.may)

    def _access(self, piece: Piece) -> Access:
        access = self.access
        same = piece.address == access.address
        return access if same else access._replace(address=piece.address)

    def _fresh(self, piece: Piece) -> Outcome:
        return self.processor.fresh(self._access(piece))

    def _allowed(self, piece: Piece) -> Iterator[Way]:
        access = self._access(piece)
        for outcome, must in self.processor.allowed(access):
            yield Way((outcome,), must, _sets(outcome))

    def _explains(self, way: Way) -> dict[Word, Word] | None:
        """The entries that flags were set in, if what was seen goes with this way; else None."""
        outcomes = zip(way.outcomes, self.pieces, strict=True)
        bad = [(o, piece) for o, piece in outcomes if not isinstance(o, Translated)]
        if bad:
            if not any(_same(outcome, piece.address, self.seen) for outcome, piece in bad):
                return None
            return self._changes(way, ())
        if self.value is None:
            changes = self._changes(way, way.must)
            if changes is None or self.seen != Loaded(self._loaded(way, changes)):
                return None
            return changes
        if self.seen != Stored(tuple(self._to_devices(way))):
            return None
        self._store(way)
        return self._changes(way, way.must)

    def _changes(self, way: Way, must: Iterable[Update]) -> dict[Word, Word] | None:
        """The words that memory then has: what was stored, and the entries with all flags set that
        must be, and none but those that may be; None if the subject's are not so.

        What the store itself overwrote shows no flags, which `flagged` then holds. Flags in
        read-only memory stay as they are. A word is one, whatever the addresses that it was
        reached by.
        """
        may = self._gathered(self._unset(way.may))
        needed = self._gathered(self._unset(must)) if may else {}
        stored = {self._name(address): address for address in self.stored}
        changes: dict[Word, Word] = {}
        self.flagged.clear()
        for name in may.keys() | stored.keys():
            before = self.machine.load(name)
            used, bits = may.get(name, (name, 0))
            address = stored.get(name, used)
            word, overwritten = self.stored.get(address, (before, 0))
            flags = bits & ~overwritten & ~word
            if not flags and not overwritten:
                continue
            if not self._is_writable(name):
                if self._is_memory(name) and self.look(self.guest, name) != before:
                    return None
                continue
            after = self.look(self.guest, name)
            if after & ~flags != word or needed.get(name, (name, 0))[1] & flags & ~after:
                return None
            changes[address] = after
            if overwritten and bits & ~before:
                self.flagged[address] = before | bits & (overwritten | after)
        return changes

    def _loaded(self, way: Way, changes: dict[Word, Word]) -> Word:
        """What the load gives: flags that its own walk set included."""
        changed = {self._name(address): word for address, word in changes.items()}

        def after(address: Word) -> Word:
            name = self._name(address)
            return changed[name] if name in changed else self.machine.load(address)

        load = after if changed else self.machine.load
        value = 0
        for piece, outcome in zip(self.pieces, way.outcomes, strict=True):
            assert isinstance(outcome, Translated)
            value |= load_bytes(load, outcome.pa, piece.size) << piece.shift
        return value

    def _to_devices(self, way: Way) -> Iterator[DeviceWrite]:
        """The parts of a store that go to where there is no memory to write."""
        assert self.value is not None
        for piece, outcome in zip(self.pieces, way.outcomes, strict=True):
            assert isinstance(outcome, Translated)
            if not self._is_writable(outcome.pa):
                part = self.value >> piece.shift & low_bits(8 * piece.size + 1) >> 1
                yield DeviceWrite(outcome.pa, piece.size, part)

    def _is_memory(self, address: Word) -> bool:
        return self.machine.map.slot_of(address >> 12) is not None

    def _is_writable(self, address: Word) -> bool:
        return self.machine.map.is_writable(address >> 12)

    def _name(self, address: Word) -> Word:
        return self.machine.map.name(address)

    def _names(self, addresses: Iterable[Word]) -> set[Word]:
        return {self._name(address) for address in addresses}

    def _words(self, addresses: Iterable[Word]) -> set[int]:
        """Which words of the backing are at these addresses, as far as memory is there."""
        found, word_of = self.machine.map.found, self.machine.map.word_of
        return {word_of(address) for address in addresses if found[address >> 12] is not None}

    def _unset(self, updates: Iterable[Update]) -> list[Update]:
        """Those of the updates whose flags are not all set already."""
        load = self.machine.map.load
        return [update for update in updates if update.bits & ~load(update.address)]

    def _gathered(self, updates: Iterable[Update]) -> dict[Word, tuple[Word, Word]]:
        """The flags of all updates, by the names of their entries, each with an address of it."""
        flags: dict[Word, tuple[Word, Word]] = {}
        for address, bits in updates:
            name = self._name(address)
            used, others = flags.get(name, (address, 0))
            flags[name] = used, others | bits
        return flags

    def _store(self, way: Way) -> None:
        """What the store leaves in memory: the words, and which of their bits it wrote."""
        assert self.value is not None
        self.stored.clear()
        for piece, outcome in zip(self.pieces, way.outcomes, strict=True):
            assert isinstance(outcome, Translated)
            if not self._is_writable(outcome.pa):
                continue
            first, shift = outcome.pa & ~7, (outcome.pa & 7) * 8
            mask = (1 << 8 * piece.size) - 1 << shift
            value = self.value >> piece.shift << shift & mask
            for address, its in ((first, mask & WORD), (first + 8, mask >> 64)):
                if its:
                    word, written = self.stored.get(address) or (self.machine.load(address), 0)
                    part = value & WORD if address == first else value >> 64
                    self.stored[address] = word & ~its | part, written | its

    def _told(self) -> str:
        what = "store" if self.access.write else "fetch" if self.access.fetch else "load"
        ways = {", ".join(map(_tell, way.outcomes)) for way in self._ways()}
        return (
            f"a {what} at {self.access.address:#x} was seen to be {_tell(self.seen)}; "
            f"allowed: {'; '.join(sorted(ways))}"
        )


def _tell(seen: Seen | Outcome) -> str:
    match seen:
        case Translated(pa):
            return f"an access to {pa:#x}"
        case PageFault(code):
            return f"#PF {code:#x}"
        case Faulted(code, cr2):
            return f"#PF {code:#x} for {cr2:#x}"
        case Loaded(value):
            return f"the value {value:#x}"
        case Stored(devices):
            return "a store" + "".join(f" to the device at {d.address:#x}" for d in devices)
        case OutsideMemory(address):
            return f"a walk to {address:#x}, where no memory is"
        case NonCanonical():
            return kind(seen)
        case GeneralProtection():
            return "#GP"
    return str(seen)


def _sets(outcome: Outcome) -> tuple[Update, ...]:
    """The flags that an outcome sets or may set."""
    match outcome:
        case Translated():
            return outcome.updates
        case PageFault() | OutsideMemory():
            return outcome.may_update
    return ()


def _same(outcome: Outcome, address: Word, seen: Seen) -> bool:
    """Whether an outcome at an address, which is no translation, is what was seen."""
    match outcome, seen:
        case PageFault(), Faulted():
            difference = (outcome.error_code ^ seen.error_code) & ~outcome.open_bits & WORD
            return difference == 0 and address == seen.cr2
        case OutsideMemory(), OutsideMemory():
            # Memory is read in words: of which half the entry is does not show.
            return (outcome.address ^ seen.address) >> 3 == 0
        case NonCanonical(), NonCanonical():
            return True
    return False


def _require(condition: bool, step: Step, seen: Seen) -> None:
    if not condition:
        raise Departure(f"{type(step).__name__} was seen to be {_tell(seen)}")


def pieces(address: Word, width: int = 64) -> tuple[Piece, ...]:
    """The 8 bytes at an address, page by page. Addresses have 32 bits outside long mode."""
    every = low_bits(32) if width == 32 else WORD
    address &= every
    first = 0x1000 - (address & 0xFFF)
    if first >= 8:
        return (Piece(address, 8, 0),)
    return Piece(address, first, 0), Piece(address + first & every, 8 - first, 8 * first)


def load_bytes(load: Callable[[Word], Word], address: Word, size: int) -> Word:
    """So many bytes of memory, all in one page, little-endian."""
    first, shift = address & ~7, (address & 7) * 8
    value = load(first) >> shift
    if shift + 8 * size > 64:
        value |= load(first + 8) << 64 - shift
    return value & (1 << 8 * size) - 1
