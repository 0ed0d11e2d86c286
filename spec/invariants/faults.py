"""Invariants of a hypervisor's fault path: of the shipped code, run on an entry that is a symbol.

One guest with four tables, and a page fault on the first access. One entry on the way is any at
all, but for the frame it names and, above the last level, its rights, which are chosen: these
decide which tables are found, so that they are keys and no symbols.
"""

from collections.abc import Callable
from typing import Any

from vapama.spec import nested, programs, shadow
from vapama.spec.access import Access
from vapama.spec.anatomy import MachineView
from vapama.spec.cpu import SMAP, SMEP, WP, Cpu
from vapama.spec.domains import Domain
from vapama.spec.memory import Memory, Sparse
from vapama.spec.nondet import Nondet, invariant
from vapama.spec.outcomes import Outcome, PageFault, Translated, kind
from vapama.spec.paging import (
    ACCESSED,
    DIRTY,
    EXECUTE_DISABLE,
    FRAME,
    PAGE_SIZE,
    PRESENT,
    USER,
    WRITABLE,
    translate,
)
from vapama.spec.programs import DIRECTORY, LOW, POINTERS, ROOT
from vapama.spec.stage import Ept, Npt, Stage
from vapama.spec.steps import (
    EPT,
    NPT,
    SHADOW,
    Faulted,
    GuestPlan,
    Load,
    Loaded,
    Plan,
    Step,
    Store,
    Stored,
)
from vapama.spec.subject import VIEW, VMM
from vapama.spec.words import WORD, Condition, Word

AT = 0x8000
"""The linear address that is accessed: its entry is the ninth of the table LOW."""
USED = PRESENT | WRITABLE | USER | ACCESSED | DIRTY
TABLES = {4: (ROOT, POINTERS), 3: (POINTERS, DIRECTORY), 2: (DIRECTORY, LOW), 1: (LOW, 8)}
"""By level, the table and what its entry on the way names."""
RIGHTS = WRITABLE | USER | EXECUTE_DISABLE
LEAVES = (8, LOW, programs.ROM.gfn)
"""What a leaf names: a page, a table that is then shadowed, a page that is only read."""


def _mostly(raw: int) -> Word:
    """Rights and flags, most of them set."""
    return (raw >> 8 | raw >> 18 | raw >> 28) & USED


LEAF = Domain(
    free=WORD & ~FRAME,
    bias=lambda raw: _mostly(raw) | (raw >> 40 & raw >> 41 & 1) * EXECUTE_DISABLE,
    scope=(USED, 0, USED & ~DIRTY, USED & ~WRITABLE),
)
TABLE = Domain(
    free=WORD & ~(FRAME | RIGHTS | PAGE_SIZE), bias=lambda raw: _mostly(raw) & ~RIGHTS, scope=(1, 0)
)
ABOVE = Domain(free=WORD & ~(FRAME | PAGE_SIZE), bias=_mostly, scope=(USED, 0))
LARGE = 0
"""In place of a level: an entry of level 2 that maps a page of 2 MBytes."""
ACCESSES = (
    *(Access(AT, write, user=user) for write in (0, 1) for user in (0, 1)),
    *(Access(AT, fetch=1, user=user) for user in (0, 1)),
)
CONTROLS = ("CR0.WP = 1", "CR0.WP = 0", "CR0.WP = 0, SMEP and SMAP")


def _cpu(controls: str) -> Cpu:
    cpu = programs.cpu()
    if "WP = 0" in controls:
        cpu = cpu._replace(cr0=cpu.cr0 & ~WP)
    return cpu._replace(cr4=cpu.cr4 | SMEP | SMAP) if "SMEP" in controls else cpu


def _plan(cpu: Cpu, level: int, entry: Word, leaf: int, design: str = SHADOW) -> Plan:
    """A guest whose entry of a level, on the way to the address, is this one."""
    words = {
        table << 12 | (8 << 3 if at == 1 else 0): named << 12 | USED
        for at, (table, named) in TABLES.items()
    }
    words[LOW << 12 | 8 << 3] = leaf << 12 | USED
    words[TABLES[level][0] << 12 | (8 << 3 if level == 1 else 0)] = entry
    words |= {8 << 12: 0x8888, programs.ROM.gfn << 12: 0x3333}
    slots = {0: programs.MAIN, 2: programs.ROM}
    return Plan((GuestPlan((cpu,), slots, words),), design, frames=64)


@invariant(
    source="Linux, virt/kvm/x86/mmu.rst; Intel SDM Vol. 3A, 4.6 to 4.8",
    reaches=("translated", "page fault", "emulated", *CONTROLS),
    needs=(VMM, VIEW),
    twin="the-dirty-flag-of-a-page-is-not-waited-for",
    bound="one access of a guest of four tables, one entry of which is any, at any level",
)
def a_fault_fills_just_what_the_guest_gives(nondet: Nondet, subject: Any) -> None:
    """After a first access every rule of the tables is met; a core that walks the shadow tables may
    do nothing that the guest's own tables do not allow at once, and comes to the same frame.
    """
    # ONE ENTRY
    level = nondet.one_of("level", (*TABLES, LARGE))
    controls = nondet.one_of("controls", CONTROLS)
    cpu = _cpu(controls)
    leaf = LEAVES[0]
    if level == 1:
        leaf = nondet.one_of("leaf", LEAVES)
        entry = leaf << 12 | nondet.word("entry", LEAF)
    else:
        rights = nondet.one_of("rights", (RIGHTS & ~EXECUTE_DISABLE, USER, WRITABLE))
        named = PAGE_SIZE if level == LARGE else TABLES[level][1] << 12
        entry = named | rights | nondet.word("entry", TABLE)
    plan = _plan(cpu, level or 2, entry, leaf)

    # ONE ACCESS
    hypervisor, memory, expected = _access(nondet, subject, plan)
    nondet.reach(controls)

    # WHAT IT LEFT
    view = hypervisor.view()
    root = view.guests[0].processors[0].roots[0][0]
    real = cpu._replace(cr0=cpu.cr0 | WP, cr3=root << 12)
    found = _allowed_walks(view, cpu, memory, lambda ram, access: translate(real, ram, access))
    if isinstance(expected, Translated) and not found:
        nondet.reach("emulated")


@invariant(
    source="Linux, virt/kvm/x86/mmu.rst; Intel SDM Vol. 3C, 31.3; AMD APM Vol. 2, 15.25",
    reaches=("translated", "page fault", "emulated", EPT, NPT),
    needs=(VMM, VIEW),
    twin="a-second-stage-lets-read-only-memory-be-written",
    bound="one access of a guest of four tables, one entry of which is any, at any level",
)
def a_second_stage_fault_maps_just_what_the_host_has(nondet: Nondet, subject: Any) -> None:
    """The same of EPT and NPT: a core that walks both stages after a first access is let through
    by them where the guest's own tables let it, to the frame that the host has there.
    """
    design = nondet.one_of("design", (EPT, NPT))
    level = nondet.one_of("level", (*TABLES, LARGE))
    leaf = nondet.one_of("leaf", LEAVES) if level == 1 else LEAVES[0]
    named = PAGE_SIZE if level == LARGE else leaf << 12 if level == 1 else TABLES[level][1] << 12
    entry = named | nondet.word("entry", LEAF if level == 1 else ABOVE)
    cpu = _cpu(CONTROLS[0])
    hypervisor, memory, expected = _access(
        nondet, subject, _plan(cpu, level or 2, entry, leaf, design)
    )
    nondet.reach(design)
    view = hypervisor.view()
    root = view.guests[0].processors[0].roots[0][0] << 12
    stage: Stage = Ept(root | 6 | 3 << 3 | 1 << 6) if design == EPT else Npt(root)
    found = _allowed_walks(
        view, cpu, memory, lambda ram, access: nested.translate(cpu, stage, ram, access)
    )
    if isinstance(expected, Translated) and not found:
        nondet.reach("emulated")


def _access(nondet: Nondet, subject: Any, plan: Plan) -> tuple[Any, Sparse, Outcome]:
    """Any access at power-on: the hypervisor, the guest's memory, and the outcome, afterwards."""
    access = nondet.one_of("access", ACCESSES)
    guest, hypervisor = plan.guests[0], subject.vmm(plan)
    expected = translate(guest.vcpus[0], Sparse(guest.image, 1 << 40), access)
    step: Step = Store(0, 0, access, 0x7777) if access.write else Load(0, 0, access)
    seen = hypervisor.do(step)
    nondet.reach(kind(expected))
    assert _same(expected, seen), "the guest sees what its tables do not say"
    memory = Sparse({at: hypervisor.word(0, at) for at in guest.image}, 1 << 40)
    return hypervisor, memory, expected


def _same(expected: Outcome, seen: Any) -> Condition:
    """Whether a guest was shown the outcome that its tables have."""
    if isinstance(expected, Translated):
        return isinstance(seen, Loaded | Stored)
    if isinstance(expected, PageFault) and isinstance(seen, Faulted):
        return (seen.error_code == expected.error_code) & (seen.cr2 == AT)
    return False


def _allowed_walks(
    view: MachineView, cpu: Cpu, memory: Memory, walk: Callable[[Memory, Access], Outcome]
) -> bool:
    """Check every rule of the tables, and that a core's walk passes only where the guest's does,
    with its flags set, and to the same frame. Whether any walk passes.
    """
    for violation in shadow.audit(view):
        raise violation
    ram = Sparse({index << 3: word for index, word in view.memory.items()}, 1 << 40)
    found = False
    for access in ACCESSES:
        by_core = walk(ram, access)
        if isinstance(by_core, Translated):
            found = True
            by_guest = translate(cpu, memory, access)
            assert isinstance(by_guest, Translated), "a core may do what the guest's tables forbid"
            if view.guests[0].design == SHADOW:
                for at, bits in by_guest.updates:
                    assert memory.load(at) & bits == bits, "a flag of the guest's is not set"
            frame = view.guests[0].backed[_page(by_guest.pa >> 12)]
            assert by_core.pa >> 12 == frame, "a core comes to another frame"
    return found


def _page(gfn: int) -> int:
    """The page of the backing that a guest frame is."""
    rom = programs.ROM
    return gfn - rom.gfn + rom.page if gfn >= rom.gfn else gfn
