"""Invariants of what is cached while a guest runs on a second stage."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from vapama.spec.access import Access
from vapama.spec.cpu import LMA, LME, NXE, PAE, PCIDE, PE, PG, WP, Cpu
from vapama.spec.domains import Domain
from vapama.spec.invariants.tlb import (
    ACCESSES,
    ALL,
    ARENA,
    DIRECTORY,
    NOTHING,
    OTHER_TABLE,
    PAGES,
    ROOTS,
    TABLE,
    WRITES,
    A,
    B,
    Operation,
    World,
    invalidations,
    registers,
)
from vapama.spec.memory import Sparse
from vapama.spec.nondet import Nondet, invariant
from vapama.spec.outcomes import EptViolation, Outcome, Translated
from vapama.spec.paging import EXECUTE_DISABLE, GLOBAL, PAGE_SIZE, WRITABLE
from vapama.spec.stage import Ept, Npt, Stage
from vapama.spec.subject import GUEST_TLB, GuestTlb
from vapama.spec.tlb import PGE, History, within
from vapama.spec.tlb_nested import GuestProcessor
from vapama.spec.words import Word

# PROGRAMS
#
# The guest's tables are those of `tlb`'s programs, at guest-physical addresses which the second
# stage maps one to one. It has two roots, as if there were two guests that share their tables: each
# has the page at 9000H elsewhere, and the second one that at 8000H too. The guest may not write
# what is at 9000H and A000H, and with mode-based execute control may fetch from A000H only as
# supervisor.

STAGE_ROOTS = (0x2_0000, 0x2_4000)
STAGE_TABLE = 0x2_3000
"""The lowest table of the first root; the directory is a page below, the PDPT two."""
STAGE_DIRECTORY, STAGE_PDPT = STAGE_TABLE - 0x1000, STAGE_TABLE - 0x2000
ELSEWHERE = 0x1_0000
"""What is added to a guest-physical address for a second place that a page may be moved to."""
LIMIT = 0x3_0000
WRITE_BACK, USER_EXECUTE = 6 << 3, 1 << 10
EPT_ALL, NPT_ALL = 0x707, ALL
Kind: TypeAlias = type[Ept] | type[Npt]


def _stage_arena(root: int, moved: Sequence[int], everything: Word, page: Word) -> dict[int, Word]:
    pdpt, directory, table = root + 0x1000, root + 0x2000, root + 0x3000
    leaf = everything | page
    pages = {n: n << 12 | leaf for n in range(1, 16)}
    pages[9] = pages[9] & ~WRITABLE
    pages[10] = pages[10] & ~(WRITABLE | (USER_EXECUTE if page else 0))
    return {
        root: pdpt | everything,
        pdpt: directory | everything,
        pdpt + 8: 1 << 30 | leaf | PAGE_SIZE,
        directory: table | everything,
        directory + 8: 1 << 21 | leaf | PAGE_SIZE,
        **{table + 8 * n: page ^ (n in moved) * ELSEWHERE for n, page in pages.items()},
    }


def _arena(everything: Word, page: Word) -> dict[int, Word]:
    first = _stage_arena(STAGE_ROOTS[0], (9,), everything, page)
    other_tables = {TABLE | ELSEWHERE: PAGES[2] | ALL, TABLE + 8 | ELSEWHERE: PAGES[0] | ALL}
    return ARENA | other_tables | first | _stage_arena(STAGE_ROOTS[1], (8, 9), everything, page)


ARENAS: dict[Kind, dict[int, Word]] = {
    Ept: _arena(EPT_ALL, WRITE_BACK),
    Npt: _arena(NPT_ALL, 0),
}


class Setup(NamedTuple):
    """What a program begins with: two second stages, and an entry of them that may be different."""

    stages: tuple[Stage, Stage]
    different: Mapping[int, Word] = {}

    @property
    def kind(self) -> Kind:
        """Which second stages they are."""
        return type(self.stages[0])


def _read_only(page: int) -> dict[int, Word]:
    where = STAGE_TABLE + 8 * page
    return {where: ARENAS[Ept][where] & ~WRITABLE}


SETUPS = (
    Setup((Ept(STAGE_ROOTS[0] | 0x5E), Ept(STAGE_ROOTS[1] | 0x5E)), _read_only(7)),
    Setup((Ept(STAGE_ROOTS[0] | 0x1E), Ept(STAGE_ROOTS[1] | 0x1E)), _read_only(5)),
    Setup((Ept(STAGE_ROOTS[0] | 0x1E, mbec=1), Ept(STAGE_ROOTS[1] | 0x1E, mbec=1))),
    Setup((Npt(STAGE_ROOTS[0]), Npt(STAGE_ROOTS[1]))),
)
"""EPT with accessed and dirty flags, without, with mode-based execute control; nested paging. The
guest has a page that with such flags can be no table, or without them one whose flags are set."""


class GuestWorld(World):
    """A subject's processor and the specification's, which run a guest on a second stage."""

    processor: GuestProcessor
    subject: GuestTlb

    def __init__(self, nondet: Nondet, subject: Any, setup: Setup) -> None:
        cr4 = PAE | PCIDE | nondet.flag("globals") * PGE
        cpu = Cpu(PG | PE | WP, ROOTS[0], cr4, LME | LMA | NXE, maxphyaddr=50)
        arena, stages = {**ARENAS[setup.kind], **setup.different}, setup.stages
        self.nondet, self.stages = nondet, stages
        self.processor = GuestProcessor(History(Sparse(arena, LIMIT)), cpu, stages[0])
        self.subject = subject.guest_tlb(cpu, stages[0], Sparse(arena, LIMIT), sets=2)

    def follow(self, access: Access, observed: Outcome) -> None:
        """What the outcome of an access drops."""
        super().follow(access, observed)
        if isinstance(observed, EptViolation):
            self.nondet.reach("an EPT violation")
            self.processor.ept_violation(observed.gpa, access.address)

    def enter(self, root: int, vpid: Word, tlb_control: int = 0) -> None:
        """A VM exit and a VM entry, or #VMEXIT and VMRUN, to one of the second stages."""
        cpu = self.processor.cpu
        self.processor.enter(cpu, self.stages[root], vpid, tlb_control)
        self.subject.enter(cpu, self.stages[root], vpid, tlb_control)

    def invept(self, kind: int, root: int) -> None:
        """INVEPT."""
        self.processor.invept(kind, STAGE_ROOTS[root])
        self.subject.invept(kind, STAGE_ROOTS[root])


def _stage_writes(stage: Kind) -> list[Operation]:
    """Each entry gets less, something else, and what it had."""
    arena = ARENAS[stage]
    # Rights and flags: of nested paging presence, R/W, U/S.
    some = (1, 2, 4, 0x400, 0x200, 0x300) if stage is Ept else (1, 2, 4, 1 << 6, 1 << 5)
    found = []
    for n in (TABLE >> 12, 3, 7, 8, 9, 10):
        where = STAGE_TABLE + 8 * n
        usual = arena[where]
        values = [usual, usual, usual ^ ELSEWHERE, 0, usual & ~3, *(usual & ~b for b in some)]
        found += [Operation(f"[{where:#x}] := {v:#x}", "write", (where, v)) for v in values]
    for where in (STAGE_DIRECTORY, STAGE_DIRECTORY + 8, STAGE_PDPT + 8, *STAGE_ROOTS):
        usual = arena[where]
        values = [usual, usual, 0, *(usual & ~b for b in some)]
        found += [Operation(f"[{where:#x}] := {v:#x}", "write", (where, v)) for v in values]
    return found


def _ept_operations() -> list[Operation]:
    by_vpid = [
        Operation(f"INVVPID {kind} {vpid}", "invvpid", (kind, vpid, A))
        for kind in range(4)
        for vpid in (1, 2)
    ]
    by_root = [
        Operation(f"INVEPT {kind} root {root}", "invept", (kind, root))
        for kind in (1, 2)
        for root in (0, 1)
    ]
    return by_vpid + by_root


def _entries(controls: tuple[int, ...]) -> list[Operation]:
    return [
        Operation(f"VM entry to root {root}, ID {vpid}, TLB_CONTROL {control}", "enter", operands)
        for root in (0, 1)
        for vpid in (1, 2)
        for control in controls
        for operands in ((root, vpid, control),)
    ]


STAGE_WRITES: dict[Kind, list[Operation]] = {Ept: _stage_writes(Ept), Npt: _stage_writes(Npt)}
GUEST_WRITES = [
    *WRITES,
    Operation(f"[{TABLE:#x}] := {OTHER_TABLE:#x}", "write", (TABLE, OTHER_TABLE | ALL)),
]
"""One of its own tables is mapped as a page."""
_READ, _FETCH, _SUPERVISOR_FETCH = Access(A, user=1), Access(A, 0, 1, 1), Access(A, 0, 1)
_INVLPG = Operation(f"INVLPG {A:#x}", "invlpg", (A,))
FOCUSES: tuple[list[Operation], ...] = (
    [],
    [],
    [
        NOTHING,
        _INVLPG,
        Operation(f"read {A:#x}", "access", (_READ,)),
        GUEST_WRITES[-1],
        Operation(f"[{DIRECTORY:#x}] := other", "write", (DIRECTORY, OTHER_TABLE | ALL)),
    ],
    [
        NOTHING,
        _INVLPG,
        Operation(f"fetch {A:#x}", "access", (_FETCH,)),
        Operation(f"supervisor fetch {A:#x}", "access", (_SUPERVISOR_FETCH,)),
        Operation(f"[{TABLE:#x}] := A000", "write", (TABLE, PAGES[2] | ALL)),
        Operation(f"[{TABLE:#x}] := A000, the supervisor's", "write", (TABLE, PAGES[2] | 0x63)),
    ],
    [
        NOTHING,
        _INVLPG,
        Operation(f"read {A:#x}", "access", (_READ,)),
        Operation(f"write {A:#x}", "access", (Access(A, 1, user=1),)),
        Operation(f"[{TABLE:#x}] := 8000", "write", (TABLE, PAGES[0] | ALL)),
        Operation(f"[{TABLE:#x}] := A000", "write", (TABLE, PAGES[2] | ALL)),
        Operation(f"[{TABLE:#x}] := 8000, not accessed", "write", (TABLE, PAGES[0] | 0x47)),
        Operation(f"[{TABLE:#x}] := 8000, not dirty", "write", (TABLE, PAGES[0] | 0x27)),
        Operation(f"[{TABLE:#x}] := 8000, XD", "write", (TABLE, PAGES[0] | ALL | EXECUTE_DISABLE)),
        Operation("EFER.NXE toggled", "toggle", ("efer", NXE)),
    ],
    [
        NOTHING,
        Operation(f"read {B:#x}", "access", (Access(B, user=1),)),
        Operation(f"[{TABLE + 8:#x}] := A000", "write", (TABLE + 8, PAGES[2] | ALL | GLOBAL)),
        Operation(f"[{TABLE + 8:#x}] := 8000", "write", (TABLE + 8, PAGES[0] | ALL | GLOBAL)),
        *(Operation(f"entry, TLB_CONTROL {n}", "enter", (0, 1, n)) for n in (3, 7)),
    ],
)
"""Few steps that belong together, and are rarely all drawn: a table that was a page, a page that is
the user's or not, a table's entry with less, a global page. None for those of `WIDE`."""
_SAME = [NOTHING, *ACCESSES * 10, *GUEST_WRITES, *invalidations(), *registers() * 2]
WIDE: dict[Kind, list[Operation]] = {
    Ept: [*_SAME, *STAGE_WRITES[Ept] * 3, *_ept_operations() * 2, *_entries((0,)) * 2],
    Npt: [*_SAME, *STAGE_WRITES[Npt] * 3, *_entries((0, 0, 1, 3, 7)) * 2],
}
"""Steps of programs at random, as often as they are to come."""
_MOVED = STAGE_TABLE + 8 * 8
NARROW: dict[Kind, list[Operation]] = {
    stage: [
        NOTHING,
        Operation(f"read {A:#x}", "access", (Access(A, user=1),)),
        Operation(f"write {A:#x}", "access", (Access(A, 1, user=1),)),
        Operation(f"read {B:#x}", "access", (Access(B, user=1),)),
        Operation(f"[{TABLE:#x}] := 9000", "write", (TABLE, PAGES[1] | ALL)),
        Operation(f"[{_MOVED:#x}] moved", "write", (_MOVED, ARENAS[stage][_MOVED] ^ ELSEWHERE)),
        Operation(f"[{_MOVED:#x}] read-only", "write", (_MOVED, ARENAS[stage][_MOVED] & ~2)),
        Operation(f"[{_MOVED:#x}] usual", "write", (_MOVED, ARENAS[stage][_MOVED])),
        Operation(f"[{DIRECTORY:#x}] := 2M", "write", (DIRECTORY, 1 << 21 | ALL | PAGE_SIZE)),
        Operation(f"INVLPG {A:#x}", "invlpg", (A,)),
        Operation("VM entry to root 1", "enter", (1, 1)),
        Operation("VM entry to root 0, ID 2", "enter", (0, 2)),
        *(
            [Operation("INVEPT 1 root 0", "invept", (1, 0))]
            if stage is Ept
            else [Operation("VM entry to root 0, TLB_CONTROL 3", "enter", (0, 1, 3))]
        ),
    ]
    for stage in (Ept, Npt)
}
"""Steps of which a small scope runs every program."""
NARROW_STEPS = Domain(among=(0, 0, 0, 3), scope=(3,))
"""How many steps a narrow program has; 0 for a wide one, of `WIDE_STEPS`."""
WIDE_STEPS = 16
DIFFERENT = 8
"""A wide program is made of so many different operations, so that they meet each other."""


@invariant(
    source="Intel SDM Vol. 3C, 28.3; AMD APM Vol. 2, 15.16",
    reaches=("a page that memory does not name any more", "an EPT violation"),
    needs=(GUEST_TLB,),
    twin="a-combined-page-serves-every-second-stage",
    searched="a program of many steps on memory of both stages",
)
def what_is_cached_of_two_stages_is_allowed(nondet: Nondet, subject: Any) -> None:
    """Whatever guest and hypervisor did before, a guest's access has an outcome that the
    architecture allows.
    """
    setup = nondet.one_of("setup", SETUPS)
    world, told = GuestWorld(nondet, subject, setup), list[str]()
    narrow = nondet.word("steps", NARROW_STEPS)
    operations, steps = NARROW[setup.kind], narrow
    if not narrow:
        operations, steps = nondet.one_of("focus", FOCUSES), WIDE_STEPS
    if not operations:
        wide = WIDE[setup.kind]
        some = [nondet.one_of(f"operation {n}", wide) for n in range(DIFFERENT)]
        operations = [NOTHING, *some]
    try:
        for step in range(steps):
            operation = nondet.one_of(f"step {step}", operations)
            told += [operation.told] if operation.told else []
            getattr(world, operation.method)(*operation.arguments)
    except AssertionError as error:
        raise AssertionError(f"after {'; '.join(told)}: {error}") from None


GUEST_RIGHT: dict[str, Callable[[GuestWorld, Access], None]] = {
    "INVLPG": lambda world, access: world.invlpg(access.address),
    "CR4.PGE toggled": lambda world, access: world.toggle("cr4", PGE),
}
STAGE_RIGHT: dict[Kind, dict[str, Callable[[GuestWorld, Access], None]]] = {
    Ept: {
        "INVEPT 1": lambda world, access: world.invept(1, 0),
        "INVEPT 2": lambda world, access: world.invept(2, 1),
    },
    Npt: {
        "TLB_CONTROL 1": lambda world, access: world.enter(0, 1, 1),
        "TLB_CONTROL 3": lambda world, access: world.enter(0, 1, 3),
    },
}
"""After which nothing is left that either stage may be used for: of the guest's changes alone, or
of anybody's."""


@invariant(
    source="Intel SDM Vol. 3C, 28.3.3.1 and 28.3.3.4; AMD APM Vol. 2, 15.16.1",
    reaches=(
        "memory said something else before",
        "the guest changed its tables",
        "the hypervisor changed the second stage",
        *GUEST_RIGHT,
        *STAGE_RIGHT[Ept],
        *STAGE_RIGHT[Npt],
    ),
    needs=(GUEST_TLB,),
    twin="invept-leaves-guest-physical-pages",
    searched="the rest of memory is fixed",
)
def after_the_right_invalidation_both_stages_are_fresh(nondet: Nondet, subject: Any) -> None:
    """An access, a change of either stage's tables, an invalidation that covers it: the next access
    has the outcome of a walk that finds nothing cached, and no other is allowed.
    """
    # CACHE, CHANGE, INVALIDATE
    setup = nondet.one_of("setup", SETUPS)
    kind, world = setup.kind, GuestWorld(nondet, subject, setup)
    access: Access = nondet.one_of("access", ACCESSES).arguments[0]
    before = world.processor.fresh(access)
    world.access(access)
    if nondet.flag("guest"):
        nondet.reach("the guest changed its tables")
        write, right = nondet.one_of("write", WRITES), GUEST_RIGHT | STAGE_RIGHT[kind]
    else:
        nondet.reach("the hypervisor changed the second stage")
        write, right = nondet.one_of("write", STAGE_WRITES[kind]), STAGE_RIGHT[kind]
    world.write(*write.arguments)
    name = nondet.one_of("invalidation", list(right))
    right[name](world, access)
    nondet.reach(name)

    # ACCESS AGAIN
    fresh = world.processor.fresh(access)
    if told(fresh) != told(before):
        nondet.reach("memory said something else before")
    apart = {told(outcome) for outcome in world.processor.without_cache(access)}
    assert {told(outcome) for outcome in world.processor.outcomes(access)} == apart
    observed = world.subject.translate(access)
    assert told(observed) in apart
    if isinstance(fresh, Translated) and isinstance(observed, Translated):
        assert within(fresh.updates, observed.updates, world.processor.history)


def told(outcome: Outcome) -> tuple[Any, ...]:
    """The kind of an outcome, and where it leads or what it reports."""
    names = ("pa", "error_code", "address", "gpa", "qualification", "exitinfo1")
    return (type(outcome), *(getattr(outcome, name, None) for name in names))
