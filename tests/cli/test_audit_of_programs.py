"""The audit of dumps, on the tables of a hypervisor at work: it finds nothing in those that are
right, and what mistakes leave in them.
"""

from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import pytest

from vapama.bugs.mistakes import MISTAKES
from vapama.impl.listing import whole
from vapama.impl.vmm import Vmm
from vapama.snapshot.audit import Options, audit
from vapama.snapshot.findings import VIOLATION
from vapama.snapshot.images import Image
from vapama.snapshot.sides import Given, sides_of
from vapama.snapshot.slots import UNKNOWN, Slots
from vapama.spec import programs
from vapama.spec.anatomy import Anatomy, MachineView
from vapama.spec.cpu import LA57, PAE
from vapama.spec.machine import Machine
from vapama.spec.steps import EPT, NPT, SHADOW

HOST_WIDTH = 46
MARKS = {EPT: (0x6, 0x7), NPT: (1 << 51 | 1,) * 2, SHADOW: (1 << 51 | 1,) * 2}


def dumped(view: MachineView) -> Image:
    """All of machine memory."""
    words = np.zeros(view.frames * 512, dtype=np.uint64)
    for index, word in view.memory.items():
        words[index] = word
    return Image("dump", "raw", words, whole(words))


def slots_of(guest: Anatomy) -> Slots:
    """A guest's slots, page by page: where the host has each, if it has it."""
    rows, dirty = [], []
    for slot in guest.slots.values():
        for gfn in range(slot.gfn, slot.end):
            page = slot.page + gfn - slot.gfn
            frame = guest.backed.get(page)
            hpa = UNKNOWN if frame is None else frame << 12
            rows.append((gfn << 12, gfn + 1 << 12, hpa, page << 12, slot.readonly, slot.log))
        dirty += [gfn << 12 for gfn in slot.dirty]
    rows.sort()
    columns = [np.array(column, dtype=np.uint64) for column in zip(*rows, strict=True)]
    gpas, ends, hpas, hvas, readonly, log = columns
    dirty_ = np.array(sorted(dirty), dtype=np.uint64)
    return Slots(gpas, ends, hpas, hvas, readonly != 0, log != 0, dirty_)


def audits(view: MachineView) -> Iterator[Counter[Any]]:
    """What is found in the tables of each processor of each guest that has a root."""
    image = dumped(view)
    for guest in view.guests:
        slots = slots_of(guest)
        for processor in guest.processors:
            root, cpu = next(iter(processor.roots[0]), 0), processor.cpu
            if root not in guest.tables or guest.tables[root].level < 4:
                continue  # PDPTEs of PAE paging are in registers, which are in no dump
            five = guest.tables[root].level == 5
            registers = {"cr3": cpu.cr3, "cr0": cpu.cr0, "cr4": cpu.cr4, "efer": cpu.efer}
            registers["maxphyaddr"] = cpu.maxphyaddr
            stage = {
                EPT: {"eptp": root << 12 | (0x66 if five else 0x5E)},
                NPT: {"ncr3": root << 12, "host_cr4": PAE | LA57 * five},
                SHADOW: {},
            }[guest.design]  # fmt: skip
            shadow = root << 12 if guest.design == SHADOW else None
            given = Given(image, None, registers, stage, shadow, HOST_WIDTH, False, 0, slots)
            unsync = tuple(page.gfn << 12 for page in guest.tables.values() if page.unsync)
            generation = guest.generation << 52, 0x7FF << 52
            options = Options(device=MARKS[guest.design], generation=generation, unsync=unsync)
            yield audit(*sides_of(given), slots, options).counts


def violations(vmm: Any, design: str, seed: int, steps: int, every: int) -> Counter[str]:
    """The violations found in a program, looked for now and then, by rule."""
    random, style = Random(seed), Random(seed).getrandbits(29)
    plan = programs.plan(style, design)
    machine, hypervisor = Machine(plan), vmm(plan)
    found: Counter[str] = Counter()
    for number in range(steps):
        step = programs.decode(random.getrandbits(64), machine, style)
        try:
            machine.check(step, hypervisor.do(step), hypervisor.word)
        except (AssertionError, LookupError):
            return found  # what a mistake leads to
        if number % every == 0:
            for counts in audits(hypervisor.view()):
                found.update(c.rule for c in counts.elements() if c.status == VIOLATION)
    return found


@pytest.mark.parametrize("design", [SHADOW, EPT, NPT])
def test_nothing_is_found_in_the_tables_of_a_hypervisor_at_work(design: str) -> None:
    for seed in range(6):
        assert violations(Vmm, design, seed, steps=120, every=10) == Counter()


@pytest.mark.parametrize(
    ("name", "design", "rules"),
    [
        ("a-notifier-leaves-the-second-stage-alone", EPT, {"wrong-frame", "no-slot"}),
        ("a-notifier-leaves-the-second-stage-alone", NPT, {"wrong-frame", "no-slot"}),
        ("a-notifier-drops-no-entries", SHADOW, {"wrong-frame", "no-slot"}),
        ("a-new-shadow-page-leaves-its-table-writable", SHADOW, {"writable-table"}),
        ("a-read-only-slot-can-be-written", SHADOW, {"writable-read-only-slot"}),
        ("a-page-that-is-made-writable-is-not-logged", SHADOW, {"unlogged-write"}),
    ],
)
def test_what_mistakes_leave_in_tables_is_found(name: str, design: str, rules: set[str]) -> None:
    vmm = MISTAKES[name].module("vapama.impl.vmm").Vmm
    for seed in range(40):
        if rules & violations(vmm, design, seed, steps=60, every=4).keys():
            return
    raise AssertionError(f"{name} was not found")
