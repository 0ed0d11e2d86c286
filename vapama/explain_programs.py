"""Programs as a person reads them: each step, what was seen of it, and what it changed.

Of a hypervisor's memory subsystem that is its tables, entry by entry, what its cores have cached,
where pages are and what guests have in them. Of other parts with a state of their own (a TLB, KSM,
hugetlb's books) it is the calls that were made and what they returned.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from vapama.explain import describe_access, entry_bits, explain_access
from vapama.runs import GuardedPart, SubjectRaised
from vapama.spec.access import Access
from vapama.spec.anatomy import GBYTE_SHIFT, Cached, MachineView
from vapama.spec.machine import Map
from vapama.spec.outcomes import NonCanonical, OutsideMemory
from vapama.spec.paging import ACCESSED, DIRTY, FRAME
from vapama.spec.steps import (
    EPT,
    Collapse,
    Evict,
    Faulted,
    Harvest,
    Harvested,
    Invlpg,
    Invpcid,
    Load,
    Loaded,
    Log,
    Migrate,
    Move,
    Plan,
    Reclaim,
    Rest,
    Scan,
    SetSlot,
    Slot,
    Split,
    Store,
    Stored,
    Unmap,
    Unmerge,
)

LONGEST = 160
"""Characters of a call or a result that are told."""


# STEPS


def describe_step(step: Any) -> str:
    """A step of a program in words."""
    match step:
        case Load(guest, vcpu, access):
            return f"{_who(guest, vcpu)}: {describe_access(access)}"
        case Store(guest, vcpu, access, value):
            return f"{_who(guest, vcpu)}: {describe_access(access)}, of {value:#x}"
        case Move(guest, vcpu, register, value):
            return f"{_who(guest, vcpu)}: {register.upper()} becomes {value:#x}"
        case Invlpg(guest, vcpu, address):
            return f"{_who(guest, vcpu)}: INVLPG {address:#x}"
        case Invpcid(guest, vcpu, kind, pcid, address):
            return f"{_who(guest, vcpu)}: INVPCID type {kind}, PCID {pcid}, {address:#x}"
        case Unmap(guest, page):
            return f"host: swaps out page {page} of guest {guest}"
        case Migrate(guest, page):
            return f"host: migrates page {page} of guest {guest}"
        case SetSlot(guest, number, slot):
            return f"host: memory slot {number} of guest {guest} becomes {_slot(slot)}"
        case Log(guest, number, on):
            return (
                f"host: {'starts' if on else 'stops'} the dirty log of slot {number}, {_of(guest)}"
            )
        case Harvest(guest, number):
            return f"host: harvests the dirty log of slot {number}, {_of(guest)}"
        case Reclaim(guest, tables):
            return f"host: reclaims {tables} of the tables of guest {guest}"
        case Evict(guest, vcpu):
            return f"{_who(guest, vcpu)}: the core drops all that it has cached"
        case Scan():
            return "host: merges equal pages"
        case Unmerge():
            return "host: gives every merged page a frame of its own"
        case Collapse(guest, page):
            return f"host: makes the pages around page {page} of guest {guest} one huge page"
        case Split(guest, page):
            return f"host: splits the huge page around page {page} of guest {guest}"
        case Rest():
            return "nothing"
    return _short(repr(step))


def describe_seen(seen: Any) -> str:
    """What was seen of a step, in words."""
    match seen:
        case Loaded(value):
            return f"the value {value:#x}"
        case Stored(devices):
            to = ", ".join(f"{d.size} bytes, {d.value:#x}, at {d.address:#x}" for d in devices)
            return f"stored, to a device {to}" if devices else "stored"
        case Faulted(code, cr2):
            return f"#PF, error code {code:#x}, CR2 {cr2:#x}"
        case NonCanonical():
            return "#GP(0): the address is not canonical"
        case OutsideMemory(address):
            return f"the walk needs the entry at {address:#x}, where no memory is"
        case Harvested(gfns):
            return f"guest frames {', '.join(map(hex, sorted(gfns))) or '(none)'}"
    return "done" if type(seen).__name__ == "Done" else _short(repr(seen))


def _who(guest: int, vcpu: int) -> str:
    return f"guest {guest}, vcpu {vcpu}"


def _of(guest: int) -> str:
    return f"guest {guest}"


def _slot(slot: Slot | None) -> str:
    if slot is None:
        return "none"
    kind = ", read-only" if slot.readonly else ""
    return (
        f"guest frames {slot.gfn:#x} to {slot.gfn + slot.pages - 1:#x}, from page {slot.page}{kind}"
    )


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


# STATES


class State(NamedTuple):
    """What a machine's view showed at a moment: things by what names them, each as it is told."""

    places: dict[tuple[int, int], str]
    slots: dict[tuple[int, int], str]
    words: dict[tuple[int, int, int], int]
    """A guest's words, by guest, page of its backing and place in it."""
    tables: dict[int, str]
    entries: dict[int, tuple[int, str]]
    """Entries of tables by index: the word and what it says."""
    processors: dict[tuple[int, int], dict[str, str]]
    """By guest and processor: what it has cached and what it will do, each by a name."""


def state_of(view: MachineView) -> State:
    """What a machine's view shows now."""
    state = State({}, {}, {}, {}, {}, {})
    owners: dict[int, tuple[int, int]] = {}
    giants: dict[int, tuple[int, int]] = {}
    formats: dict[int, bool] = {}
    for number, guest in enumerate(view.guests):
        for page, frame in guest.backed.items():
            state.places[number, page] = f"in frame {frame:#x}"
            owners[frame] = number, page
        for gbyte, first in guest.giants.items():
            page = gbyte << GBYTE_SHIFT
            state.places[number, page] = f"1 GByte from frame {first:#x} on"
            giants[first >> GBYTE_SHIFT] = number, page
        for page, words in guest.swapped.items():
            state.places.setdefault((number, page), "swapped out")
            if page not in guest.backed:
                for place, word in words.items():
                    state.words[number, page, place] = word
        for slot, its in guest.slots.items():
            text = _slot(Slot(its.gfn, its.end - its.gfn, its.page, its.readonly))
            dirty = f", dirty {sorted(map(hex, its.dirty))}" if its.log else ""
            state.slots[number, slot] = text + dirty
        for frame, table in (*guest.tables.items(), *guest.dying.items()):
            kind = "direct, from" if table.direct else "of"
            state.tables[frame] = (
                f"level {table.level}, {kind} guest frame {table.gfn:#x}, guest {number}"
                f"{', unsync' if table.unsync else ''}{', a root' if table.roots else ''}"
            )
            formats[frame] = guest.design == EPT
        for vcpu, processor in enumerate(guest.processors):
            its_own = state.processors[number, vcpu] = {}
            for cached in processor.cached():
                its_own[f"TLB, {_cached(cached)}"] = ""
            for index, word in processor.upper():
                its_own[f"cached entry at {index << 3:#x} = {word:#x}"] = ""
            its_own["root"] = ", ".join(f"{frame:#x}" for frame in processor.roots[0]) or "none"
            its_own["will flush"] = str(processor.flush)
            its_own["will synchronize"] = str(processor.sync)
    for index, word in view.memory.items():
        frame = index >> 9
        if frame in state.tables and word:
            state.entries[index] = word, f"{entry_bits(word, formats[frame])}, {_leads(word)}"
        elif frame in owners and word:
            state.words[(*owners[frame], index & 511)] = word
        elif frame >> GBYTE_SHIFT in giants and word:
            number, page = giants[frame >> GBYTE_SHIFT]
            within = frame & (1 << GBYTE_SHIFT) - 1
            state.words[number, page + within, index & 511] = word
    return state


def _leads(word: int) -> str:
    return f"frame {word >> 12 & FRAME >> 12:#x}"


def _cached(cached: Cached) -> str:
    rights = "".join(
        letter if cached.rights & bit else "-" for bit, letter in ((4, "u"), (2, "w"), (1, "x"))
    )
    return (
        f"PCID {cached.pcid}: {cached.address:#x} -> frame {cached.frame:#x}, level "
        f"{cached.level}, {rights}"
    )


def changes(before: State, after: State) -> Iterator[str]:
    """What is different, a line each."""
    for (guest, page), old, new in _differing(before.places, after.places):
        yield f"page {page} of guest {guest}: {old or 'untouched'} -> {new or 'gone'}"
    for (guest, slot), old, new in _differing(before.slots, after.slots):
        yield f"slot {slot} of guest {guest}: {old or 'none'} -> {new or 'none'}"
    for (guest, page, place), old, new in _differing(before.words, after.words):
        flags = ((old or 0) ^ (new or 0)) & (ACCESSED | DIRTY)
        only = flags and (old or 0) | flags == new
        told = f" (sets {entry_bits(flags, False)})" if only else ""
        where = f"byte {place << 3:#x} of page {page} of guest {guest}"
        yield f"{where}: {old or 0:#x} -> {new or 0:#x}{told}"
    for frame, was, now in _differing(before.tables, after.tables):
        if was is None:
            yield f"+ table in frame {frame:#x}: {now}"
        elif now is None:
            yield f"- table in frame {frame:#x}: {was}"
        else:
            yield f"table in frame {frame:#x}: {was} -> {now}"
    for index, entry, later in _differing(before.entries, after.entries):
        if index >> 9 in after.tables:
            told = f"{later[0]:#x}: {later[1]}" if later else "0"
            where = f"entry {index & 511} of the table in frame {index >> 9:#x}"
            yield f"{where}, at {index << 3:#x}: {entry[0] if entry else 0:#x} -> {told}"
    for (guest, vcpu), one, other in _differing(before.processors, after.processors):
        for name, had, has in _differing(one or {}, other or {}):
            who = _who(guest, vcpu)
            if had and has:
                yield f"{who}: {name}: {had} -> {has}"
            else:
                yield f"{who}: {'-' if has is None else '+'} {name}"


def _differing(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> Iterator[tuple[Any, ...]]:
    """What is in two mappings not equal, in order: the key and both values, None for none."""
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old != new:
            yield key, old, new


# WHAT A SUBJECT DID


class RecordedPart(GuardedPart):
    """A part of a subject with state of its own, which tells what is done with it, line by line, in
    `told`. `steps` is how many steps or calls there were.
    """

    def __init__(self, name: str, part: GuardedPart, arguments: tuple[Any, ...]) -> None:
        super().__init__(part.part)
        self.told: list[str] = []
        self.steps = 0
        if arguments and isinstance(arguments[0], Plan):
            plan = arguments[0]
            self.told += _machine(plan)
            self._outside = None if hasattr(part.part, "view") else Outside(part.part, plan)
            self._make: Callable[[Any], Any] = super().__getattr__("do")
            self.do = self._do
        else:
            self.told.append(f"{name}  {', '.join(map(_argument, arguments))}".rstrip())

    def __getattr__(self, name: str) -> Any:
        """An attribute; a call of a method is told, but for what a hypervisor is only asked."""
        value = super().__getattr__(name)
        if not callable(value) or "do" in self.__dict__:
            return value
        return self._recorded(name, value)

    def _recorded(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self.steps += 1
            shown = [*map(_argument, args), *(f"{k}={_argument(v)}" for k, v in named.items())]
            line = f"{self.steps:>4}  {name}({', '.join(shown)})"
            self.told.append(_short(line))
            result = method(*args, **named)
            if result is not None:
                self.told[-1] = _short(f"{line} -> {_argument(result)}")
            return result

        return call

    def _do(self, step: Any) -> Any:
        """A step of a hypervisor, told with what it changed."""
        self.steps += 1
        self.told += ["", f"step {self.steps}   {describe_step(step)}"]
        before = self._state()
        if isinstance(step, Load | Store):
            self.told += [f"  fresh  {line}" for line in self._walk(step)]
        try:
            seen = self._make(step)
            self.told.append(f"  seen   {describe_seen(seen)}")
        except SubjectRaised as error:
            self.told.append(f"  seen   {error}")
            raise
        if self._outside is not None:
            self._outside.follow(step)
        self.told += [f"  now    {line}" for line in changes(before, self._state())]
        return seen

    def _state(self) -> State:
        return state_of(self.view()) if self._outside is None else self._outside.state()

    def _walk(self, step: Load | Store) -> Iterator[str]:
        """A walk of the guest's own tables for the access as it is now, with nothing cached."""
        if self._outside is None:
            guest = self.view().guests[step.guest]
            slots = {
                n: Slot(s.gfn, s.end - s.gfn, s.page, s.readonly) for n, s in guest.slots.items()
            }
            cpu = guest.processors[step.vcpu].cpu
        else:
            slots = self._outside.maps[step.guest].slots
            cpu = self._outside.cpus[step.guest][step.vcpu]
        access = Access(*step.access)
        yield from list(explain_access(cpu, _Words(self, step.guest, slots), access))[1:]


class Outside:
    """What can be told of a hypervisor that shows no tables: its guests' memory and processors."""

    def __init__(self, part: Any, plan: Plan) -> None:
        self.part = part
        self.words: dict[tuple[int, int, int], int] = {}
        self.maps = [Map(guest.slots, {}) for guest in plan.guests]
        self.cpus = [list(guest.vcpus) for guest in plan.guests]

    def follow(self, step: Any) -> None:
        """A step was made."""
        if isinstance(step, Move):
            cpus = self.cpus[step.guest]
            cpus[step.vcpu] = step.on(cpus[step.vcpu])
        elif isinstance(step, SetSlot):
            self.maps[step.guest].set_slot(step.number, step.slot)

    def state(self) -> State:
        """Every word of the guests' memory; of pages in no slot, as they were last seen."""
        for number, its in enumerate(self.maps):
            for slot in its.slots.values():
                for page in range(slot.pages):
                    for place in range(512):
                        word = self.part.word(number, slot.gfn + page << 12 | place << 3)
                        self.words[number, slot.page + page, place] = word
        words = {where: word for where, word in self.words.items() if word}
        return State({}, {}, words, {}, {}, {})


class _Words(Map):
    """A guest's memory as its hypervisor has it, for a walk to read."""

    def __init__(self, part: Any, guest: int, slots: dict[int, Slot]) -> None:
        super().__init__(slots, {})
        self.part, self.guest = part, guest

    def load(self, address: int) -> int:
        """The word at an aligned address."""
        return int(self.part.word(self.guest, address))


def _machine(plan: Plan) -> Iterator[str]:
    """A machine at power-on."""
    yield f"machine  {plan.design}, {plan.frames} frames"
    for number, guest in enumerate(plan.guests):
        slots = "; ".join(f"slot {n}: {_slot(slot)}" for n, slot in guest.slots.items())
        yield f"guest {number}  {len(guest.vcpus)} processors; {slots}"


def _argument(value: Any) -> str:
    if type(value) is int and value > 9:
        return hex(value)
    text = repr(value)
    return type(value).__name__ if text.startswith("<") else text
