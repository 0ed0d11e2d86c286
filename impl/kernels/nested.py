"""Two-dimensional walks, VA -> PA -> MA, as straight-line kernels, in the manner of `long_mode`.

A guest in 4-level or 5-level paging over `ept` or `npt`: every entry of the guest is read through
the second stage. Nothing here is shared with `vapama.spec.nested`, against which it is proved.
Words that the kernels take and give, besides those of `long_mode`, `ept` and `npt`:

- `stage`: EPT or NPT, whose words are `stage_mode`, `stage_reserved` and `root`.
- `paths[level]`: the path of the second stage's walk for the guest's entry of that level, as its
  kernel fills it; `paths[0]` that for the page.
- `trace`: 18 words about the guest's entries, by their level: from ENTRY on the index in the host's
  memory, from STATUS on the level that mapped its table there, from GPA on its guest-physical
  address. For the page: `trace[ENTRY]` is its level in the guest, `trace[STATUS]` that in the host,
  `trace[GPA]` the access to it.
- a result is a triple (status, value, gpa): status 1, 2 or 3, translated, and no stage maps less
  than a page of that level as a whole, value is the machine address; FAULT and NONCANONICAL, the
  guest's own; OUTSIDE, value is the machine address of the entry that memory does not hold. With
  EXIT in gpa, status and value are the second stage's, for the guest-physical address in the rest.
"""

from collections.abc import Sequence

from vapama.impl.kernels.ept import MODE_AD
from vapama.impl.kernels.ept import mark_walk as mark_ept
from vapama.impl.kernels.ept import walk as walk_ept
from vapama.impl.kernels.long_mode import (
    FAULT,
    FRAME,
    MODE_CET,
    MODE_LA57,
    MODE_NXE,
    MODE_PAGE1GB,
    MODE_SMEP,
    NONCANONICAL,
    OUTSIDE,
    Store,
    Words,
    finish,
    without_metadata,
)
from vapama.impl.kernels.long_mode import mark as mark_guest
from vapama.impl.kernels.npt import mark_walk as mark_npt
from vapama.impl.kernels.npt import walk as walk_npt
from vapama.spec.words import Word

EPT, NPT = 0, 1
EXIT = 1 << 63
ENTRY, STATUS, GPA = 0, 6, 12
TABLE = 8
"""An access to a guest's table, as the second stage takes it."""


def walk(
    memory: Words,
    entries: Word,
    mode: Word,
    reserved: Word,
    cr3: Word,
    pkru: Word,
    pkrs: Word,
    stage: Word,
    stage_mode: Word,
    stage_reserved: Word,
    root: Word,
    address: Word,
    access: Word,
    paths: Sequence[Store],
    trace: Store,
) -> tuple[Word, Word, Word]:
    """Translate one linear address of a guest. Returns (status, value, gpa), see the module."""
    level = 4
    shift = 48
    if mode >> MODE_LA57 & 1:
        level = 5
        shift = 57
    address = without_metadata(mode, cr3, address, access)
    upper = address >> (shift - 1)
    if (upper != 0) & (upper != (1 << (65 - shift)) - 1):
        return NONCANONICAL, 0, 0
    top = level
    fetch = access >> 4 & (mode >> MODE_NXE | mode >> MODE_SMEP) & 1
    code = access & 6 | fetch << 4 | access & 0x40 & mode >> MODE_CET << 6
    # By level, where bit 7 (PS) must be 0.
    no_large = 0x30 | (mode >> MODE_PAGE1GB & 1 ^ 1) << 3
    table = cr3 & FRAME
    rights = 6
    no_execute = 0
    missing = 0
    while True:
        shift = shift - 9
        gpa = table | (address >> shift & 0x1FF) << 3
        status, value = walk_stage(
            memory, entries, stage, stage_mode, stage_reserved, root, gpa, TABLE, paths[level]
        )
        if status >= FAULT:
            return stopped(status, value, gpa)
        index = value >> 3
        if value >= entries << 3:
            return OUTSIDE, value, 0
        entry = memory[index]
        trace[ENTRY + level] = index
        trace[STATUS + level] = status
        trace[GPA + level] = gpa
        if not entry & 1:
            return FAULT, code, 0
        large = entry >> 7 & 1
        offset = (1 << shift) - 1
        must_be_zero = reserved | (no_large >> level & 1) << 7 | large * (offset & 0x7FFFFFFFE000)
        if entry & must_be_zero:
            return FAULT, code | 9, 0
        above = rights
        rights = rights & entry
        no_execute = no_execute | entry >> 63
        missing = missing | (entry >> 5 & 1 ^ 1)
        # In a PTE bit 7 is PAT; in a PML4E and a PML5E it was found to be 0.
        if large or level == 1:
            break
        table = entry & FRAME
        level = level - 1
    told = rights | (above & 2) << 2
    status, value = finish(
        mode, pkru, pkrs, address, code, access, entry, told, no_execute, level, shift
    )
    if status == FAULT:
        return FAULT, value, 0
    trace[ENTRY] = level
    gpa = value
    missing = missing | access >> 1 & (entry >> 6 & 1 ^ 1)
    if stage == EPT and missing and not stage_mode >> MODE_AD & 1:
        # Setting the guest's flags is a write of its own, which reading the entries was not.
        status, value, where = write_back(
            memory, entries, stage_mode, stage_reserved, root, top, access, paths, trace
        )
        if status >= FAULT:
            return stopped(status, value, where)
    page = access & 0x12 | rights & 4 | (rights & 2) << 4 | no_execute << 6 | code >> 6 << 7
    status, value = walk_stage(
        memory, entries, stage, stage_mode, stage_reserved, root, gpa, page, paths[0]
    )
    if status >= FAULT:
        return stopped(status, value, gpa)
    trace[STATUS] = status
    trace[GPA] = page
    if level < status:
        return level, value, 0
    return status, value, 0


def walk_stage(
    memory: Words,
    entries: Word,
    stage: Word,
    mode: Word,
    reserved: Word,
    root: Word,
    gpa: Word,
    access: Word,
    path: Store,
) -> tuple[Word, Word]:
    """The second stage's walk."""
    if stage == EPT:
        return walk_ept(memory, entries, mode, reserved, root, gpa, access, path)
    return walk_npt(memory, entries, mode, reserved, root, gpa, access, path)


def stopped(status: Word, value: Word, gpa: Word) -> tuple[Word, Word, Word]:
    """The result of a guest's walk that the second stage stops at this address."""
    if status == OUTSIDE:
        return OUTSIDE, value, 0
    return status, value, gpa | EXIT


def write_back(
    memory: Words,
    entries: Word,
    mode: Word,
    reserved: Word,
    root: Word,
    top: Word,
    access: Word,
    paths: Sequence[Store],
    trace: Words,
) -> tuple[Word, Word, Word]:
    """Whether EPT lets the guest's flags be set, from its highest level down: the second stage's
    (status, value, gpa) of the first write that fails, or of the last.
    """
    at = top
    while True:
        entry = memory[trace[ENTRY + at]]
        write = entry >> 5 & 1 ^ 1
        if at == trace[ENTRY]:
            write = write | access >> 1 & (entry >> 6 & 1 ^ 1)
        gpa = trace[GPA + at]
        # An entry whose flags are set is not written: this is its read again.
        status, value = walk_stage(
            memory, entries, EPT, mode, reserved, root, gpa, TABLE | write << 1, paths[0]
        )
        if status >= FAULT or at == trace[ENTRY]:
            return status, value, gpa
        at = at - 1


def mark(
    memory: Store,
    mode: Word,
    stage: Word,
    stage_mode: Word,
    access: Word,
    paths: Sequence[Words],
    trace: Words,
) -> None:
    """Set the accessed and dirty flags of a walk that translated: those of the second stage for the
    guest's entries, the guest's own, and those of the second stage for the page.
    """
    top = 4
    if mode >> MODE_LA57 & 1:
        top = 5
    last = trace[ENTRY]
    at = top
    while at >= last:
        mark_stage(memory, stage, stage_mode, trace[STATUS + at], TABLE, paths[at])
        at = at - 1
    mark_guest(memory, top, last, access >> 1 & 1, trace)
    mark_stage(memory, stage, stage_mode, trace[STATUS], trace[GPA], paths[0])


def mark_stage(
    memory: Store, stage: Word, mode: Word, status: Word, access: Word, path: Words
) -> None:
    """Set the second stage's flags of one of its walks."""
    if stage == EPT:
        mark_ept(memory, mode, status, access, path)
    else:
        mark_npt(memory, mode, status, access, path)


def walk_and_mark(
    memory: Words,
    marks: Store,
    entries: Word,
    mode: Word,
    reserved: Word,
    cr3: Word,
    pkru: Word,
    pkrs: Word,
    stage: Word,
    stage_mode: Word,
    stage_reserved: Word,
    root: Word,
    address: Word,
    access: Word,
    paths: Sequence[Store],
    trace: Store,
) -> tuple[Word, Word, Word]:
    """`walk`, and if it translates set the flags of both stages in `marks`: the memory."""
    status, value, gpa = walk(
        memory,
        entries,
        mode,
        reserved,
        cr3,
        pkru,
        pkrs,
        stage,
        stage_mode,
        stage_reserved,
        root,
        address,
        access,
        paths,
        trace,
    )
    if status < FAULT:
        mark(marks, mode, stage, stage_mode, access, paths, trace)
    return status, value, gpa
