"""The shipped hypervisor does what the model of shadow pages and flushes allows, event by event.

So what is proved of the model (`spec/invariants/coherence.py`) is about the code that ships.
Whatever the hypervisor does to its shadow pages, its books, the host's frames, dirty logs and
cores, is a transition of `spec.coherence.Model` for a guest. Each must be one that the rules allow
in the state that the model is in; and after every step the model's state must be the real one.

Left out: slots that come and go, aliases of guest frames, and CR0.WP = 0.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import Any

import pytest

from vapama.bugs.mistakes import MISTAKES, Mistake
from vapama.spec import programs
from vapama.spec.coherence import (
    DIRECT,
    DUE,
    INHERITED,
    ROM,
    UNSYNC,
    WRITTEN,
    Model,
    named,
    naming,
)
from vapama.spec.machine import Machine
from vapama.spec.maps import Map, Table
from vapama.spec.paging import EXECUTE_DISABLE, FRAME, PRESENT, USER, WRITABLE
from vapama.spec.shadow import RESERVED
from vapama.spec.steps import SHADOW, GuestPlan, Move, Plan, SetSlot, Step

PLAIN = Mistake("none", "impl/vmm.py", "class Vmm:\n", "class Vmm:\n")
"""No mistake."""
STEPS = (
    *("set_spte", "request_flush", "shadow", "unshadow", "unsync", "synced", "store_for_guest"),
    *("set_flags", "remap", "log_written", "begin_log", "protected", "end_log"),
    *("enter", "fill", "store", "invalidate"),
)
"""All steps of the model but power-on."""
SPTE = FRAME | PRESENT | WRITABLE | USER | EXECUTE_DISABLE
Reader = int


class NotAllowed(AssertionError):
    """The hypervisor did what the model's rules forbid, or is where the model is not."""


def plan(style: int) -> Plan:
    """A machine of two guests whose frames have one name each."""
    guest = GuestPlan(
        (programs.cpu(style & ~(1 << 20)),) * 2,
        {0: programs.MAIN, 2: programs.ROM},
        programs.image(),
    )
    return Plan((guest,) * 2, SHADOW, generations=4)


def covers(step: Step) -> bool:
    """Whether the model covers a step."""
    return not isinstance(step, SetSlot) and not (isinstance(step, Move) and step.register == "cr0")


class Told(dict[Any, Any]):
    """A dict that tells of each change, once it is made: key, value before and after (or None)."""

    tell: Callable[[Any, Any, Any], None]

    def __setitem__(self, key: Any, value: Any) -> None:
        before = self.get(key)
        super().__setitem__(key, value)
        self.tell(key, before, value)

    def __delitem__(self, key: Any) -> None:
        before = self[key]
        super().__delitem__(key)
        self.tell(key, before, None)

    def pop(self, key: Any, *default: Any) -> Any:
        """As a dict's."""
        before = self.get(key)
        value = super().pop(key, *default)
        self.tell(key, before, None)
        return value


class Logged(set[int]):
    """A dirty log that tells what comes in and what goes out."""

    tell: Callable[[str, int], None]

    def add(self, gfn: int) -> None:
        """As a set's."""
        super().add(gfn)
        self.tell("log_written", gfn)

    def clear(self) -> None:
        """As a set's."""
        for gfn in self:
            self.tell("begin_log", gfn)
        super().clear()


class Followed:
    """A guest, and the model of it."""

    def __init__(self, guest: Any, everybody: "Follower") -> None:
        self.guest, self.mmu, self.everybody = guest, guest.mmu, everybody
        self.model = Model(lambda name: Table(), 0, (), (), ())
        self.readers: dict[tuple[int, int, int], Reader] = {}
        """By processor, PCID and page of the linear address; -1 for those not met yet."""
        for vcpu in guest.vcpus:
            self.reader(vcpu.number, -1, -1)
        self.why = ""
        """What makes the guest's memory change just now."""
        self._tell_of_dicts()

    def _tell_of_dicts(self) -> None:
        """Have the host's frames, the tables in use and the logs told of, from now on."""
        model, guest = self.model, self.guest
        frames = Told(guest.backing.frame)
        frames.tell = lambda page, before, after: self.do("remap", *self.hosted(page, after))
        for page, frame in frames.items():
            self.do("remap", *self.hosted(page, frame))
            for place, word in guest.ram.page(frame).items():
                model.content.put(self.gfn_of(page), place, word)
        guest.backing.frame = frames
        pages = Told(self.mmu.pages)
        pages.tell = self._told_of_table
        self.mmu.pages = pages
        for slot in guest.slots.values():
            slot.dirty = Logged(slot.dirty)
            slot.dirty.tell = self.do

    def do(self, step: str, *operands: int) -> None:
        """Make a step of the model's, which must be allowed."""
        model = self.model
        model.entries = [(page, place) for page, place in live(model.spte)]
        model.pages = [page for (page,) in live(model.table)]
        model.readers = tuple(self.readers.values())
        if not getattr(model, step)(*operands):
            raise NotAllowed(f"guest {self.guest.number}: {step}{tuple(map(hex, operands))}")
        self.everybody.steps[step] += 1

    # NAMES

    def gfn_of(self, page: int) -> int:
        """The one guest frame that a page of the backing is."""
        (found,) = (
            slot.gfn + page - slot.page
            for slot in self.guest.slots.values()
            if slot.gfn <= slot.gfn + page - slot.page < slot.end
        )
        return int(found)

    def hosted(self, page: int, frame: int | None) -> tuple[int, int]:
        """A guest frame, and the model's word for the frame it is in."""
        gfn = self.gfn_of(page)
        readonly = self.guest.slot_of(gfn).readonly
        return gfn, 0 if frame is None else naming(frame) | (0 if readonly else WRITABLE)

    def reader(self, vcpu: int, pcid: int, page: int) -> Reader:
        """The number of a reader. A new one is served as one that was not met yet."""
        found = self.readers.get((vcpu, pcid, page))
        if found is None:
            found = self.readers[vcpu, pcid, page] = len(self.readers)
            if pcid >= 0:
                like, model = self.reader(vcpu, -1 if page < 0 else pcid, -1), self.model
                model.ready.put(found, model.ready(like))
                for (table, place, reader, value), had in list(live(model.past).items()):
                    if reader == like:
                        model.past.put(table, place, found, value, had)
        return found

    def readers_of(self, vcpu: int, pcid: int | None = None) -> list[Reader]:
        """All readers of a processor, or of one of its PCIDs."""
        return [
            number
            for (of, its_pcid, _), number in self.readers.items()
            if of == vcpu and pcid in (None, its_pcid)
        ]

    # WHAT IS TOLD

    def _told_of_table(self, frame: int, before: Any, after: Any) -> None:
        page = after or before
        if page.level != 1:
            return
        if after is not None:
            slot = self.guest.slot_of(page.gfn)
            kind = DIRECT if page.direct else UNSYNC | (slot.readonly and ROM)
            self.do("shadow", frame, naming(page.gfn) | kind | page.access << INHERITED)
        elif not page.direct:
            self.do("unsync", frame)

    def told_of_spte(self, index: int, spte: int) -> None:
        """An entry of one of its tables of the last level was set."""
        page, place, spte = index >> 9, index & 511, real(spte)
        if spte == self.model.spte(page, place):
            return
        gfn = 0
        if spte:
            owner = self.model.owner(named(spte))
            if not owner:
                raise NotAllowed(f"an SPTE maps frame {named(spte):#x}, which is nobody's")
            gfn = named(owner)
        self.do("set_spte", page, place, spte, gfn)

    def told_of_word(self, gfn: int, place: int, value: int) -> None:
        """A word of the guest's memory was set."""
        before = self.model.content(gfn, place)
        if value == before or not self.why:
            return
        if self.why == "flags":
            self.do("set_flags", gfn, place, value & ~before)
        elif self.why == "emulated":
            self.do("store_for_guest", gfn, place, value)
        else:
            raise NotAllowed(f"guest frame {gfn:#x} changes by nobody's store")

    def synced(self, root: int) -> None:
        """A processor's tables were synchronized, for CR3 or for all addresses."""
        vcpu = self.everybody.entering
        tables = set(self._below(root))
        places = {at[:2] for at in (*live(self.model.spte), *live(self.model.past))}
        for reader in self.readers_of(vcpu.number, vcpu.core.pcid >> 54):
            for page, place in sorted(places):
                if page in tables:
                    self.do("invalidate", reader, page, place)

    def _below(self, root: int) -> Iterator[int]:
        """The tables of the last level below a root."""
        page = self.mmu.pages.get(root)
        if page is None:
            return
        if page.level == 1:
            yield root
            return
        for index in page.used:
            if not self.guest.ram[index] & RESERVED:
                yield from self._below(named(self.guest.ram[index]))

    def invalidated(self, vcpu: Any, address: int) -> None:
        """INVLPG was made, or a page fault reflected."""
        reader = self.reader(vcpu.number, vcpu.core.pcid >> 54, address >> 12)
        context = vcpu.context
        for root in (context.root, *(root for _, _, root in context.cached)):
            if root is not None and not root.invalid:
                page = root.page(address)
                while page is not None and page.level > 1:
                    word = self.guest.ram[page.base | address >> 3 + 9 * page.level & 511]
                    page = self.mmu.pages.get(named(word)) if word & PRESENT else None
                if page is not None:
                    self.do("invalidate", reader, page.frame, address >> 12 & 511)

    # WHERE IT MUST BE

    def agree(self) -> None:
        """The model's state is the real one."""
        model, mmu, guest = self.model, self.mmu, self.guest
        sptes = {
            (index >> 9, index & 511): real(guest.ram[index])
            for page in mmu.pages.values()
            if page.level == 1
            for index in page.used
            if real(guest.ram[index])
        }
        same("SPTEs", sptes, live(model.spte))
        mapped = {(i >> 9, i & 511): naming(gfn) for i, gfn in mmu.mapped.items()}
        same("the reverse map", mapped, live(model.maps))
        unsync = {(p.frame,) for p in mmu.pages.values() if p.unsync}
        ours = {(p.frame,) for p in mmu.pages.values() if model.table(p.frame) & UNSYNC}
        same("unsync pages", unsync, ours)
        for (gfn, place), word in live(model.content).items():
            same(f"guest frame {gfn:#x}", guest.peek(guest.ram, gfn << 12 | place << 3), word)
        for slot in guest.slots.values():
            if slot.log:
                noted = {g for g in range(slot.gfn, slot.end) if model.log(g) & WRITTEN}
                same("the log", set(slot.dirty), noted)


class Follower:
    """A hypervisor whose guests are followed."""

    def __init__(self, module: Any, plan: Plan) -> None:
        self.steps: Counter[str] = Counter()
        """How often each step of the model was made."""
        self.guests: list[Followed] = []
        self.entering: Any = None
        self.storing = False
        self.used: list[tuple[Followed, Reader, int, int]] = []
        """By which SPTEs the access of now was translated."""
        self.fills: dict[tuple[int, Reader], tuple[int, int]] = {}
        """The SPTE that a guest's reader has cached."""
        module.Vmm.follower = self
        self.vmm = module.Vmm(plan)
        self.vmm.watch(self._freed, lambda number, root: self.guests[number].synced(root))
        for guest in self.vmm.guests:
            self.guests.append(Followed(guest, self))

    def step(self, step: Step) -> Any:
        """Make a step, and be where the model is."""
        seen = self.vmm.do(step)
        for guest in self.guests:
            guest.agree()
        return seen

    def of(self, part: Any) -> Followed | None:
        """The followed guest of a guest, an MMU or a core; None while it is made."""
        for followed in self.guests:
            guest = followed.guest
            if part is guest or part is guest.mmu or any(part is v.core for v in guest.vcpus):
                return followed
        return None

    def told_of_ram(self, index: int, value: int) -> None:
        """A word of machine memory was set."""
        frame, place = index >> 9, index & 511
        for guest in self.guests:
            page = guest.mmu.pages.get(frame)
            if page is not None and page.level == 1:
                guest.told_of_spte(index, value)
            owner = guest.model.owner(frame)
            if owner and self.storing:
                self._stored(frame, place, value)
            elif owner:
                guest.told_of_word(named(owner), place, value)

    def _stored(self, frame: int, place: int, value: int) -> None:
        """A core stored to memory, by a translation of now."""
        for guest, reader, page, at in self.used:
            if named(guest.model.cached(reader, page, at)) == frame:
                guest.do("store", reader, page, at, place, value)
                return
        raise NotAllowed(f"a core stores to frame {frame:#x}, and was not led there")

    def told_of_translation(self, core: Any, address: int, walked: bool) -> None:
        """A core translated an address: it walked, or used what it had cached."""
        guest = self.of(core)
        assert guest is not None
        (vcpu,) = (vcpu for vcpu in guest.guest.vcpus if vcpu.core is core)
        reader = guest.reader(vcpu.number, core.pcid >> 54, address >> 12)
        key = guest.guest.number, reader
        if walked:
            self.fills[key] = core.path[1] >> 9, core.path[1] & 511
            guest.do("fill", reader, *self.fills[key])
        page, place = self.fills[key]
        if not guest.model.usable(reader, page, place):
            raise NotAllowed(f"a core uses for {address:#x} what it was told to drop")
        self.used.append((guest, reader, page, place))

    def _freed(self, frame: int) -> None:
        for guest in self.guests:
            if guest.model.table(frame):
                guest.do("unshadow", frame)


def real(spte: int) -> int:
    """An SPTE as the model has it: without a device's, and without flags."""
    return spte & SPTE if spte & PRESENT and not spte & RESERVED else 0


def live(table: Map) -> dict[tuple[int, ...], int]:
    """What is not 0 in a map."""
    assert isinstance(table, Table)
    return {place: word for place, word in table.items() if word}


def same(what: str, found: object, ours: object) -> None:
    """Raise `NotAllowed` if the hypervisor and the model do not have the same."""
    if found != ours:
        raise NotAllowed(f"{what}: the hypervisor has {found}, and the model {ours}")


def followed(mistake: Mistake = PLAIN) -> Any:
    """A copy of the hypervisor's module, with a mistake or none, that a `Follower` can follow."""
    module: Any = mistake.module("vapama.impl.vmm")
    names = module.ShadowMmu.fault.__globals__

    def follower() -> Any:
        return module.Vmm.follower

    _follow_memory(module, names, follower)

    def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
        method = getattr(owner, name)
        setattr(owner, name, lambda part, *args: around(partial(method, part), part, *args))

    def after_flush(method: Callable[[], None], guest: Any) -> None:
        method()
        if of := follower().of(guest):
            of.do("request_flush")

    def entering(method: Callable[[Any], None], mmu: Any, vcpu: Any) -> None:
        follower().entering = vcpu
        method(vcpu)

    def forgotten(method: Callable[[], None], core: Any) -> None:
        method()
        if of := follower().of(core):
            (vcpu,) = (vcpu for vcpu in of.guest.vcpus if vcpu.core is core)
            for reader in of.readers_of(vcpu.number):
                of.do("enter", reader)

    def translated(method: Callable[..., Any], core: Any, address: int, access: int) -> Any:
        walks = core.walks
        status, place = method(address, access)
        if status <= 3:
            follower().told_of_translation(core, address, core.walks != walks)
        return status, place

    def stored(method: Callable[..., Any], vmm: Any, *args: Any) -> Any:
        with during(follower(), "storing", True):
            seen = method(*args)
        follower().used.clear()
        return seen

    def faulted(method: Callable[..., Any], mmu: Any, *args: Any) -> Any:
        follower().used.clear()
        return method(*args)

    def walked(method: Callable[..., Any], mmu: Any, *args: Any) -> Any:
        with during(follower().of(mmu), "why", "flags"):
            return method(*args)

    def emulated(method: Callable[..., Any], vmm: Any, guest: Any, *args: Any) -> Any:
        with during(follower().of(guest), "why", "emulated"):
            return method(guest, *args)

    def invalidated(method: Callable[..., Any], mmu: Any, vcpu: Any, address: int) -> None:
        method(vcpu, address)
        follower().of(mmu).invalidated(vcpu, address)

    def got(method: Callable[..., Any], mmu: Any, *args: Any) -> Any:
        page, of = method(*args), follower().of(mmu)
        if of.model.table(page.frame) & UNSYNC and not page.unsync:
            of.do("synced", page.frame)  # it is new, and its table protected
        return page

    def logging(method: Callable[..., Any], guest: Any, number: int, on: bool) -> None:
        of, slot = follower().of(guest), guest.slots.get(number)
        changes = slot is not None and not slot.readonly and slot.log != on
        gfns = range(slot.gfn, slot.end) if changes else ()
        for gfn in gfns:
            of.do("begin_log" if on else "end_log", gfn)
        method(number, on)
        for gfn in gfns if on else ():
            of.do("protected", gfn)

    def harvested(method: Callable[..., Any], guest: Any, number: int) -> Any:
        found = method(number)
        of = follower().of(guest)
        for (gfn,), log in list(live(of.model.log).items()):
            if log & DUE:
                of.do("protected", gfn)
        return found

    guest_type = module.Guest
    wrap(guest_type, "flush", after_flush)
    wrap(guest_type, "log", logging)
    wrap(guest_type, "harvest", harvested)
    wrap(names["Core"], "forget_all", forgotten)
    wrap(names["Core"], "translate", translated)
    wrap(module.Vmm, "_on_ram", stored)
    wrap(module.Vmm, "_emulate", emulated)
    for name, around in (
        ("enter", entering),
        ("fault", faulted),
        ("walk", walked),
        ("invlpg", invalidated),
        ("_get_page", got),
    ):
        wrap(module.ShadowMmu, name, around)
    return module


def _follow_memory(module: Any, names: dict[str, Any], follower: Callable[[], Any]) -> None:
    """Have machine memory and shadow pages tell what becomes of them."""

    ram: Any = module.Ram
    page: Any = names["Page"]

    class Ram(ram):  # type: ignore[misc]  # of a copy, which no type checker knows
        def __setitem__(self, index: int, value: int) -> None:
            super().__setitem__(index, value)
            follower().told_of_ram(index, value)

        def __delitem__(self, index: int) -> None:
            super().__delitem__(index)
            follower().told_of_ram(index, 0)

        def pop(self, index: int, *default: Any) -> Any:
            value = super().pop(index, *default)
            follower().told_of_ram(index, 0)
            return value

    class Page(page):  # type: ignore[misc]  # likewise
        @property
        def unsync(self) -> bool:
            return bool(self.__dict__["unsync"])

        @unsync.setter
        def unsync(self, value: bool) -> None:
            self.__dict__["unsync"] = value
            for guest in follower().guests:
                if guest.mmu.pages.get(self.frame) is self:
                    guest.do("unsync" if value else "synced", self.frame)

    module.Ram, names["Page"] = Ram, Page


@contextmanager
def during(of: Any, name: str, value: Any) -> Iterator[None]:
    """Let an attribute have a value, if there is what has it."""
    before = getattr(of, name, None)
    if of is not None:
        setattr(of, name, value)
    try:
        yield
    finally:
        if of is not None:
            setattr(of, name, before)


def run(module: Any, seed: int, steps: int = 40) -> Follower:
    """A random program, followed."""
    random = Random(seed)
    style = random.getrandbits(29)
    chosen = plan(style)
    machine, follower = Machine(chosen), Follower(module, chosen)
    for _ in range(steps):
        step = programs.decode(random.getrandbits(64), machine, style)
        if covers(step):
            machine.check(step, follower.step(step), follower.vmm.word)
    return follower


CAUGHT = (
    "a-notifier-drops-no-entries",
    "a-notifier-does-not-flush",
    "a-new-shadow-page-leaves-its-table-writable",
    "a-sync-skips-a-page",
    "a-flush-is-asked-for-and-not-made",
    "a-harvest-does-not-flush",
    "a-freed-table-is-flushed-later",
    "a-flush-is-for-one-processor",
)


def runs(module: Any, programs: int) -> Counter[str]:
    """How often each step of the model was made in so many programs."""
    return sum((run(module, seed).steps for seed in range(programs)), Counter[str]())


def test_every_event_of_random_programs_is_one_that_the_model_allows() -> None:
    steps = runs(followed(), 90)
    assert not [name for name in STEPS if not steps[name]]


@pytest.mark.parametrize("name", CAUGHT)
def test_a_mistake_is_no_step_of_the_model(name: str) -> None:
    module = followed(MISTAKES[name])
    with pytest.raises(NotAllowed):
        runs(module, 400)
