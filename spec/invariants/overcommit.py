"""Invariants of a hypervisor whose host merges equal pages of guests, and makes small pages huge.

The claims of `spec.invariants.vmm` again, under the programs of `spec.overcommit`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from vapama.spec import overcommit, shadow
from vapama.spec.anatomy import MachineView
from vapama.spec.domains import Domain
from vapama.spec.invariants.vmm import (
    DESIGNS,
    LENGTH,
    NAMES,
    SEARCHED,
    SOURCE,
    compare_memory,
    harvest_logs,
    watch_frees_and_syncs,
)
from vapama.spec.machine import Machine
from vapama.spec.nondet import Nondet, invariant
from vapama.spec.steps import Log, Plan, Scan, Seen, Step, Store, Stored
from vapama.spec.subject import OVERCOMMIT, VIEW, VMM
from vapama.spec.words import Word

STYLE = Domain(free=(1 << 46) - 1, scope=(0x8864,))
"""What a program has in mind, and the host; see `overcommit.plan`."""
STEP = Domain(scope=(0x8000_0000_0000_0000, 0x8000_0000_0000_0003, 0x8000_0000_0000_000C))
"""A step; see `overcommit.decode`. In the scope: a scan, a huge page, a store."""
KSM_SOURCE = "Linux, admin-guide/mm/ksm.rst; " + SOURCE
LARGE_SOURCE = (
    "Linux, Documentation/virt/kvm/x86/mmu.rst, Large pages; admin-guide/mm/transhuge.rst"
)


def drawn_plan(nondet: Nondet) -> tuple[Word, Plan]:
    """A machine of any design, and the style of the program to be run on it."""
    style = nondet.word("style", STYLE)
    return style, overcommit.plan(style, nondet.one_of("design", DESIGNS))


def program(
    nondet: Nondet, style: Word, plan: Plan, hypervisor: Any, *prelude: Step
) -> Iterator[tuple[Machine, Step, Seen]]:
    """Draw a program and run it, each step judged by the machine that the guests believe in.

    Mostly all that is equal is merged when it begins.
    """
    machine = Machine(plan)
    merged = (Scan(), Scan()) if nondet.word("merged", MERGED) else ()
    for step in (*prelude, *merged):
        seen = hypervisor.do(step)
        machine.check(step, seen, hypervisor.word)
    for number in range(nondet.word("steps", LENGTH)):
        step = overcommit.decode(nondet.word(NAMES[number], STEP), machine, style)
        seen = hypervisor.do(step)
        machine.check(step, seen, hypervisor.word)
        yield machine, step, seen


MERGED = Domain(among=(1, 1, 0), scope=(1,))


def note(nondet: Nondet, view: MachineView) -> None:
    """Say what of a host that saves memory can be seen in a machine."""
    shared: list[int] = []
    for guest in view.guests:
        shared += {guest.backed[page] for page in guest.shared}
        if guest.huge:
            nondet.reach("a huge page")
        for page in guest.tables.values():
            if page.level in (2, 3) and _is_large(view, guest.design, page):
                nondet.reach("mapped large" if page.level == 2 else "a GByte mapped")
    if len(set(shared)) < len(shared):
        nondet.reach("shared by two guests")


def _is_large(view: MachineView, design: str, page: Any) -> bool:
    """Whether a table of an upper level has a large leaf."""
    for index in view.memory.keys() & range(page.frame << 9, page.frame + 1 << 9):
        said = shadow.read_entry(design, page.level, view.memory[index])
        if said is not None and said.leaf:
            return True
    return False


@invariant(
    source=KSM_SOURCE,
    reaches=("shared by two guests", "a huge page", "compared"),
    needs=(VMM, OVERCOMMIT, VIEW),
    twin="a-merged-page-is-written-in-place",
    searched=SEARCHED,
    unsuited=("exhaustive",),
)
def guests_whose_memory_is_shared_do_not_notice(nondet: Nondet, subject: Any) -> None:
    """Transparency and isolation, whatever is merged, collapsed and split meanwhile: what a guest
    sees is what a machine of its own could show, and no write of one is ever in another's memory.
    """
    style, plan = drawn_plan(nondet)
    hypervisor = subject.vmm(plan)
    machine = Machine(plan)
    for ran, step, _ in program(nondet, style, plan, hypervisor):
        machine = ran
        if isinstance(step, Scan):
            note(nondet, hypervisor.view())
    compare_memory(nondet, machine, hypervisor)


@invariant(
    source=LARGE_SOURCE,
    reaches=("shared by two guests", "a huge page", "mapped large", "a GByte mapped"),
    needs=(VMM, OVERCOMMIT, VIEW),
    twin="a-slot-is-mapped-large-across-its-edges",
    searched=SEARCHED,
    unsuited=("exhaustive",),
)
def a_shared_frame_is_writable_nowhere_and_a_large_leaf_fits(nondet: Nondet, subject: Any) -> None:
    """After every step no table, of first or second stage, and no core that will not flush lets a
    frame be written that several pages use; what is mapped large is one huge page of the host's,
    wholly in its slot, aligned, with no shadowed table in it; every other rule of tables holds too.
    """
    style, plan = drawn_plan(nondet)
    hypervisor = subject.vmm(plan)
    watch_frees_and_syncs(hypervisor)
    for _ in program(nondet, style, plan, hypervisor):
        view = hypervisor.view()
        note(nondet, view)
        for violation in shadow.audit(view):
            raise violation


@invariant(
    source="Linux, Documentation/virt/kvm/api.rst, 4.8 (KVM_GET_DIRTY_LOG); " + LARGE_SOURCE,
    reaches=("a frame was written",),
    needs=(VMM, OVERCOMMIT),
    twin="a-log-begins-with-large-pages",
    searched=SEARCHED,
    unsuited=("exhaustive",),
)
def a_dirty_log_names_the_pages_of_a_huge_one(nondet: Nondet, subject: Any) -> None:
    """A log that is started while pages are huge, or are merged, names every frame written since:
    large pages are mapped small as long as writes to them are logged.
    """
    style, plan = drawn_plan(nondet)
    hypervisor = subject.vmm(plan)
    logged = 0
    for machine, step, seen in program(nondet, style, plan, hypervisor):
        if isinstance(step, Scan):
            logged ^= 1
            for guest, slot in ((0, 3), (0, 4), (1, 3), (1, 4)):
                log = Log(guest, slot, bool(logged))
                machine.check(log, hypervisor.do(log), hypervisor.word)
        if isinstance(step, Store) and isinstance(seen, Stored):
            harvest_logs(nondet, machine, hypervisor, step.guest, (3, 4))


CHOICE = Domain(among=tuple(range(8)))
"""A step of one of `overcommit.SCOPES`."""
SHORT = Domain(among=(3, 4), scope=(3,) * 5 + (4,) * 2)
"""How long programs of these steps are: a quick budget, of width 5, has the short ones alone."""


def _state(
    scope: object, left: int, hypervisor: Any, machine: Machine
) -> tuple[object, int, bytes, bytes]:
    """All that the rest of a program depends on, with so many steps left."""
    return scope, left, shadow.state(hypervisor.view()), machine.state()


@invariant(
    source=LARGE_SOURCE,
    reaches=("shared by two guests", "a huge page", "mapped large", "a GByte mapped"),
    needs=(VMM, OVERCOMMIT, VIEW),
    twin="a-collapse-leaves-what-maps-the-old-frames",
    searched=SEARCHED,
)
def every_small_program_of_sharing_guests_is_transparent_and_sound(
    nondet: Nondet, subject: Any
) -> None:
    """Any three or four steps of two guests with equal pages, and of their host: what is seen is
    allowed, and every rule of the tables is met. The exhaustive engine runs every program.
    """
    length = nondet.word("length", SHORT)
    before, steps, layout = nondet.one_of("scope", overcommit.SCOPES)
    plan = overcommit.small_plan(nondet.one_of("design", DESIGNS), layout)
    hypervisor, machine = subject.vmm(plan), Machine(plan)
    hypervisor.watch(lambda frame: shadow.freed(hypervisor.view(), frame), lambda *_: None)
    for step in before:
        machine.check(step, hypervisor.do(step), hypervisor.word)
    for number in range(length):
        step = steps[nondet.word(NAMES[number], CHOICE)]
        machine.check(step, hypervisor.do(step), hypervisor.word)
        if nondet.seen(partial(_state, steps, length - number, hypervisor, machine)):
            view = hypervisor.view()
            note(nondet, view)
            for violation in shadow.audit(view):
                raise violation
