"""Invariants of a hypervisor's memory subsystem: transparency, isolation, and what carries them.

Each runs a program of guest and host steps, a word a step (`spec.programs`), on the subject and on
the machine that a guest believes in. The rules of the tables are those of `spec.shadow`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from vapama.spec import programs, shadow
from vapama.spec.domains import Domain
from vapama.spec.machine import Machine
from vapama.spec.nondet import Nondet, invariant
from vapama.spec.outcomes import NonCanonical, OutsideMemory
from vapama.spec.steps import (
    EPT,
    NPT,
    SHADOW,
    Faulted,
    Harvest,
    Harvested,
    Loaded,
    Log,
    Plan,
    Seen,
    Step,
    Store,
    Stored,
)
from vapama.spec.subject import VIEW, VMM
from vapama.spec.words import Word

DESIGNS = (SHADOW, EPT, NPT)
STYLE = Domain(free=(1 << 41) - 1 | 1 << 47, scope=(0x8864,))
"""What a program has in mind; see `programs.plan`."""
LENGTH = Domain(free=63, scope=(2,))
"""How many steps a program has."""
STEP = Domain(
    scope=(0x0000_0000_0000_0001, 0x70, 0x48, 0xA8, 0xC0, 0xD8, 0xE0, 0xF6),
)
"""A step; see `programs.decode`. In the scope: a load, an edit of a table, a store, INVLPG, MOV to
CR3, a page swapped out, a page migrated, tables reclaimed."""
NAMES = tuple(f"step {number}" for number in range(64))
SOURCE = "Linux, Documentation/virt/kvm/x86/mmu.rst; Intel SDM Vol. 3A, chapter 4"
SEARCHED = "a program over objects, which no proof follows"


Run = tuple[Machine, Step, Seen]


def drawn_plan(nondet: Nondet) -> tuple[Word, Plan]:
    """A machine of any design, and the style of the program to be run on it."""
    style = nondet.word("style", STYLE)
    return style, programs.plan(style, nondet.one_of("design", DESIGNS))


def machine_of(plan: Plan, hypervisor: Any) -> Machine:
    """The machine that the guests of a hypervisor believe in."""
    return Machine(getattr(hypervisor, "plan", plan))


def program(
    nondet: Nondet, style: Word, plan: Plan, hypervisor: Any, *prelude: Step
) -> Iterator[Run]:
    """Draw a program and run it, each step judged by the machine that the guests believe in."""
    machine = machine_of(plan, hypervisor)
    look, fit = hypervisor.word, getattr(hypervisor, "fit", None)
    for step in prelude:
        seen = hypervisor.do(step)
        machine.check(step, seen, look)
        yield machine, step, seen
    for number in range(nondet.word("steps", LENGTH)):
        step = programs.decode(nondet.word(NAMES[number], STEP), machine, style)
        step = fit(step) if fit is not None else step
        seen = hypervisor.do(step)
        machine.check(step, seen, look)
        yield machine, step, seen


def compare_memory(nondet: Nondet, machine: Machine, hypervisor: Any) -> None:
    """Every word of every guest is what the guest's own machine has, at each of its addresses: each
    that the machine has written, and each that the hypervisor says it holds.
    """
    held = getattr(hypervisor, "held", None)
    for number, guest in enumerate(machine.guests):
        backing = guest.map.backing
        for word in backing if held is None else backing.keys() | held(number):
            value = backing.get(word, 0)
            for address in guest.map.addresses(word):
                nondet.reach("compared")
                there = hypervisor.word(number, address)
                assert there == value, f"guest {number} has {there:#x} at {address:#x}"


def watch_frees_and_syncs(hypervisor: Any) -> None:
    """See to it that frames are freed when no core can use them, and that a sync leaves nothing
    unsync: each as it happens, in the middle of a step.
    """

    def when_synced(number: int, root: int) -> None:
        shadow.synced(hypervisor.view(), number, root)

    hypervisor.watch(lambda frame: shadow.freed(hypervisor.view(), frame), when_synced)


def harvest_logs(
    nondet: Nondet, machine: Machine, hypervisor: Any, guest: int, slots: Sequence[int]
) -> None:
    """Harvest the dirty logs of these slots: each names what was written since the last time."""
    for slot in slots:
        harvest = Harvest(guest, slot)
        gathered = hypervisor.do(harvest)
        if isinstance(gathered, Harvested) and gathered.gfns:
            nondet.reach("a frame was written")
        machine.check(harvest, gathered, hypervisor.word)


@invariant(
    source=SOURCE,
    reaches=(
        "value loaded",
        "stored",
        "stored to a device",
        "page fault",
        "non-canonical address",
        "table outside memory",
    ),
    needs=(VMM,),
    twin="the-dirty-flag-of-a-page-is-not-waited-for",
    searched=SEARCHED,
    unsuited=("exhaustive",),
)
def each_guest_sees_what_its_own_machine_allows(nondet: Nondet, subject: Any) -> None:
    """Transparency: whatever guests and host do, each load, store and fault of a guest is one that
    a machine of its own could show, which knows nothing of a hypervisor or of other guests.
    """
    style, plan = drawn_plan(nondet)
    for _, _, seen in program(nondet, style, plan, subject.vmm(plan)):
        match seen:
            case Loaded():
                nondet.reach("value loaded")
            case Stored(devices):
                nondet.reach("stored to a device" if devices else "stored")
            case Faulted():
                nondet.reach("page fault")
            case NonCanonical():
                nondet.reach("non-canonical address")
            case OutsideMemory():
                nondet.reach("table outside memory")


@invariant(
    source=SOURCE,
    reaches=("compared",),
    needs=(VMM,),
    twin="a-swapped-page-keeps-its-old-copy",
    searched=SEARCHED,
    unsuited=("exhaustive",),
)
def no_guest_reaches_what_is_not_its_own(nondet: Nondet, subject: Any) -> None:
    """Isolation: after any program every word of every guest is what that guest's own steps made
    of it, wherever the host has put it.
    """
    style, plan = drawn_plan(nondet)
    hypervisor = subject.vmm(plan)
    machine = machine_of(plan, hypervisor)
    for ran, _, _ in program(nondet, style, plan, hypervisor):
        machine = ran
    compare_memory(nondet, machine, hypervisor)


@invariant(
    source=SOURCE,
    reaches=("audited",),
    needs=(VMM, VIEW),
    twin="a-new-shadow-page-leaves-its-table-writable",
    searched=SEARCHED,
    unsuited=("exhaustive",),
)
def the_tables_satisfy_every_rule_after_every_step(nondet: Nondet, subject: Any) -> None:
    """Structure: an audit of the real tables, from scratch, finds every rule of `spec.shadow` met
    after every step; frames are freed when no core can use them; a sync leaves nothing unsync.
    """
    style, plan = drawn_plan(nondet)
    hypervisor = subject.vmm(plan)
    watch_frees_and_syncs(hypervisor)
    for _ in program(nondet, style, plan, hypervisor):
        nondet.reach("audited")
        for violation in shadow.audit(hypervisor.view()):
            raise violation


@invariant(
    source="Linux, Documentation/virt/kvm/api.rst, 4.8 (KVM_GET_DIRTY_LOG)",
    reaches=("a frame was written",),
    needs=(VMM,),
    twin="a-harvested-page-is-not-watched-again",
    searched=SEARCHED,
    unsuited=("exhaustive",),
)
def a_dirty_log_names_every_page_written(nondet: Nondet, subject: Any) -> None:
    """A harvest names at least the guest frames of its slot that were written since the last one,
    by stores and by the accessed and dirty flags of the guest's own tables.
    """
    style, plan = drawn_plan(nondet)
    hypervisor = subject.vmm(plan)
    logs = [Log(guest, slot, True) for guest in (0, 1) for slot in (0, 1)]
    for machine, step, seen in program(nondet, style, plan, hypervisor, *logs):
        if isinstance(step, Store) and isinstance(seen, Stored):
            harvest_logs(nondet, machine, hypervisor, step.guest, (0, 1))


SHORT = Domain(among=(4, 6), scope=(4,) * 5 + (6,) * 2)
"""How long programs of these steps are: a quick budget, of width 5, has the short ones alone."""


class Course:
    """A hypervisor and the machine that its guests believe in, so many steps before the end."""

    def __init__(self, hypervisor: Any, machine: Machine, left: int) -> None:
        self.hypervisor, self.machine = hypervisor, machine
        self.made, self.left = 0, left
        self.digests: tuple[bytes, bytes] | None = None
        hypervisor.watch(lambda frame: shadow.freed(hypervisor.view(), frame), lambda *_: None)

    def clone(self) -> "Course":
        """The same, which goes on by itself."""
        twin = Course(self.hypervisor.clone(), self.machine.clone(), self.left)
        twin.made = self.made
        return twin

    def make(self, step: Step) -> None:
        """Make a step, judged by the machine."""
        self.machine.check(step, self.hypervisor.do(step), self.hypervisor.word)
        self.made, self.left, self.digests = self.made + 1, self.left - 1, None

    def state(self) -> tuple[bytes, bytes]:
        """All that the steps that are left depend on: of the hypervisor, and of the guests."""
        if self.digests is None:
            self.digests = shadow.state(self.hypervisor.view()), self.machine.state()
        return self.digests


@invariant(
    source=SOURCE,
    reaches=("audited",),
    needs=(VMM, VIEW),
    twin="a-notifier-does-not-flush",
    searched=SEARCHED,
    scoped=True,
)
def every_program_of_a_small_scope_is_transparent_and_sound(nondet: Nondet, subject: Any) -> None:
    """Any four or six steps of two guests, with two processors each, and their host: what is seen
    is allowed, and every rule of the tables is met. The exhaustive engine runs every program.
    """

    def begin() -> Course:
        length = nondet.word("length", SHORT)
        plan = programs.small_plan(nondet.one_of("design", DESIGNS))
        return Course(subject.vmm(plan), Machine(plan), length)

    course = nondet.begun(begin)
    while course.left:
        course.make(nondet.one_of(NAMES[course.made], programs.SMALL))
        if nondet.seen(course.state, course.left) and nondet.first(lambda: course.state()[0]):
            nondet.reach("audited")
            for violation in shadow.audit(course.hypervisor.view()):
                raise violation
        if course.left and hasattr(course.hypervisor, "clone"):
            nondet.kept(course)
