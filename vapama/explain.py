"""Walks as a person reads them: each level, index, entry and its bits, where and why it stopped."""

import contextlib
from collections.abc import Iterator, Sequence

from vapama.spec import ept, modes, nested, npt, paging, second_stage
from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import LAM_SUP, LAM_U48, LAM_U57, Cpu, reserved_in_pdptes
from vapama.spec.memory import Memory
from vapama.spec.modes import Mode
from vapama.spec.outcomes import (
    PK,
    RSVD,
    SS,
    EptMisconfiguration,
    EptViolation,
    I,
    NestedPageFault,
    NonCanonical,
    Outcome,
    OutsideMemory,
    P,
    PageFault,
    Translated,
    U,
    Update,
    W,
)
from vapama.spec.stage import Ept, Npt, Stage
from vapama.spec.words import is_canonical

STRUCTURES = {5: "PML5E", 4: "PML4E", 3: "PDPTE", 2: "PDE", 1: "PTE"}
SIZES = {1: "4 KBytes", 2: "2 MBytes", 3: "1 GByte"}
Names = Sequence[tuple[int, str]]
ERROR_BITS: Names = ((P, "P"), (W, "W"), (U, "U"), (RSVD, "RSVD"), (I, "I"), (PK, "PK"), (SS, "SS"))
EXITINFO1_BITS: Names = (
    *ERROR_BITS[:5],
    (npt.SS, "SS"),
    (npt.FINAL, "final"),
    (npt.TABLE, "table"),
)
QUALIFICATION_BITS: Names = (
    (ept.DATA_READ, "read"),
    (ept.DATA_WRITE, "write"),
    (ept.FETCH, "fetch"),
    (ept.READABLE, "readable"),
    (ept.WRITABLE, "writable"),
    (ept.EXECUTABLE, "executable"),
    (ept.USER_EXECUTABLE, "user-executable"),
    (ept.LINEAR_VALID, "linear"),
    (ept.TRANSLATION, "translation"),
    (ept.USER_LINEAR, "user-page"),
    (ept.WRITABLE_PAGE, "writable-page"),
    (ept.NO_EXECUTE_PAGE, "no-execute-page"),
    (ept.SHADOW_STACK_ACCESS, "shadow-stack"),
)
EPT_BITS: Names = (
    (ept.READ, "R"),
    (ept.WRITE, "W"),
    (ept.EXECUTE, "X"),
    (ept.USER_EXECUTE, "XU"),
    (ept.IGNORE_PAT, "IPAT"),
    (ept.PAGE_SIZE, "PS"),
    (ept.ACCESSED, "A"),
    (ept.DIRTY, "D"),
)
FLAG_BITS: Names = (
    (paging.ACCESSED | paging.ACCESSED << 32 | ept.ACCESSED, "A"),
    (paging.DIRTY | paging.DIRTY << 32 | ept.DIRTY, "D"),
)
"""Of an 8-byte entry, of the upper of two 4-byte ones (the lower is as the first), of EPT."""
ENTRY_BITS: Names = (
    (paging.PRESENT, "P"),
    (paging.WRITABLE, "W"),
    (paging.USER, "U"),
    (paging.WRITE_THROUGH, "PWT"),
    (paging.CACHE_DISABLE, "PCD"),
    (paging.ACCESSED, "A"),
    (paging.DIRTY, "D"),
    (paging.PAGE_SIZE, "PS"),
    (paging.GLOBAL, "G"),
    (paging.EXECUTE_DISABLE, "XD"),
)


def explain_access(cpu: Cpu, memory: Memory, access: Access) -> Iterator[str]:
    """The walk of one access, line by line, from its control state to its outcome."""
    yield f"access   {describe_access(access)}"
    yield f"control  {describe_cpu(cpu)}"
    mode = cpu.mode
    address = paging.linear_address(cpu, mode, access)
    if address != access.address:
        yield f"         its address is taken for {address:#x}"
    if mode.width > 32 and not is_canonical(address, mode.width):
        yield f"         not canonical with {mode.width}-bit addresses"
    elif mode is modes.PAE:
        yield f"PDPTE    {_describe_pdpte(cpu, memory, address)}"
    elif mode is not modes.OFF:
        yield f"CR3      {cpu.cr3:#x}: the root table is at {cpu.cr3 & mode.root:#x}"
    if mode.width == 32 or is_canonical(address, mode.width):
        for step in paging.path(cpu, memory, address):
            yield describe_step(cpu, address, step)
    yield f"outcome  {describe_outcome(paging.translate(cpu, memory, access), mode)}"


def _describe_pdpte(cpu: Cpu, memory: Memory, address: int) -> str:
    """The PDPTE for an address: which it is, where it stands, and where it leads."""
    pdpte = paging.pdpte_for(cpu, memory, address)
    number = address >> 30
    if isinstance(pdpte, OutsideMemory):
        return f"{number} at {pdpte.address:#x}: outside memory"
    where = f"{number}, a register," if cpu.pdptes is not None else f"{number} in memory"
    text = f"{where} = {pdpte:#018x}"
    if not pdpte & paging.PRESENT:
        return text + "  <- not present: stops here"
    if reserved := pdpte & reserved_in_pdptes(cpu.maxphyaddr):
        return text + f"  <- reserved bits {reserved:#x} are set: stops here"
    return text + f"  -> table at {pdpte & paging.FRAME:#x}"


def describe_access(access: Access) -> str:
    """An access in words."""
    what = "write" if access.write else "fetch" if access.fetch else "read"
    who = "user" if access.user else "implicit supervisor" if access.implicit else "supervisor"
    where = " of a shadow stack" if access.shadow_stack else ""
    return f"{who} {what}{where} at {access.address:#018x}"


def describe_cpu(cpu: Cpu) -> str:
    """The control state that matters to a walk, in words."""
    on = [
        name
        for name, value in (
            ("CR0.WP", cpu.wp),
            ("CR4.SMEP", cpu.smep),
            ("CR4.SMAP", cpu.smap),
            ("RFLAGS.AC", cpu.ac),
            ("EFER.NXE", cpu.nxe),
            (f"CR4.PKE (PKRU {cpu.pkru:#x})", cpu.pke),
            (f"CR4.PKS (IA32_PKRS {cpu.pkrs:#x})", cpu.pks),
            ("CR4.CET", cpu.cet),
            ("CR4.LAM_SUP", cpu.long_mode and cpu.cr4 & LAM_SUP),
            ("CR3.LAM_U57", cpu.long_mode and cpu.cr3 & LAM_U57),
            ("CR3.LAM_U48", cpu.long_mode and cpu.cr3 & LAM_U48),
            ("PSE-36", cpu.pse36 and cpu.mode is modes.TWO_LEVEL_PSE),
            ("1-GByte pages", cpu.page1gb and cpu.long_mode),
        )
        if value
    ]
    return f"{cpu.mode.name}, MAXPHYADDR {cpu.maxphyaddr}, {', '.join(on) or 'no more'}"


def explain_guest_physical(
    stage: Stage, memory: Memory, access: GuestPhysicalAccess
) -> Iterator[str]:
    """A second stage's walk of one access, line by line, from its control state to its outcome."""
    yield f"access   {describe_guest_physical(access)}"
    yield f"control  {describe_stage(stage)}"
    if isinstance(stage, Ept):
        yield f"EPTP     {stage.eptp:#x}: the root table is at {stage.eptp & paging.FRAME:#x}"
        width, steps = paging.address_width(stage.levels), ept.path(stage, memory, access.address)
    else:
        yield f"nCR3     {stage.ncr3:#x}: the root table is at {npt.root(stage):#x}"
        width, steps = npt.address_width(stage), npt.path(stage, memory, access.address)
    if access.address >> width:
        yield f"         more than the {width} bits that these tables translate"
    else:
        for step in steps:
            yield describe_step(stage, access.address, step)
    narrow = isinstance(stage, Npt) and stage.levels == 2
    mode = modes.TWO_LEVEL_PSE if narrow else modes.FIVE_LEVEL
    yield f"outcome  {describe_outcome(second_stage.translate(stage, memory, access), mode)}"


def explain_nested(cpu: Cpu, stage: Stage, memory: Memory, access: Access) -> Iterator[str]:
    """A two-dimensional walk: the guest's, where each of its entries lies in the host, and the
    outcome of both stages.
    """
    guest = nested.GuestMemory(stage, memory)
    yield f"stage    {describe_stage(stage)}"
    with contextlib.suppress(nested.Stopped):
        for line in explain_access(cpu, guest, access):
            yield line.replace("outcome ", "guest   ", 1)
    for gpa, host, entry in dict.fromkeys(guest.loads):
        yield f"         guest-physical {gpa:#x} is at {host:#x} = {entry:#018x}"
    yield f"outcome  {describe_outcome(nested.translate(cpu, stage, memory, access), cpu.mode)}"


def describe_guest_physical(access: GuestPhysicalAccess) -> str:
    """An access to a guest-physical address in words."""
    what = "write" if access.write else "fetch" if access.fetch else "read"
    if access.table:
        of = "a guest's table" if access.linear else "a guest's PDPTEs, loaded by MOV to CR"
        return f"{what} of {of} at {access.address:#x}"
    page = [
        "user" if access.user else "supervisor",
        "writable" if access.writable else "read-only",
        *(["no-execute"] if access.no_execute else []),
        *(["shadow-stack access"] if access.shadow_stack else []),
    ]
    return f"{what} at {access.address:#x}; to the guest's paging {', '.join(page)}"


def describe_stage(stage: Stage) -> str:
    """The control state that matters to a second stage's walk, in words."""
    if isinstance(stage, Ept):
        features: Names = (
            (stage.ad, "accessed and dirty flags"),
            (stage.mbec, "mode-based execute control"),
            (stage.execute_only, "execute-only entries"),
            (stage.page2mb, "2-MByte pages"),
            (stage.page1gb, "1-GByte pages"),
            (stage.advanced, "advanced information"),
        )
        kind = f"{stage.levels}-level EPT"
    else:
        features = (
            (stage.nxe, "EFER.NXE"),
            (stage.pse & (stage.levels == 2), "CR4.PSE"),
            (stage.page1gb & (stage.levels >= 4), "1-GByte pages"),
        )
        modes_of_hosts = {2: "32-bit", 3: "PAE", 4: "4-level", 5: "5-level"}
        kind = f"nested tables of a host in {modes_of_hosts[stage.levels]} paging"
    on = ", ".join(name for has, name in features if has)
    return f"{kind}, MAXPHYADDR {stage.maxphyaddr}, {on or 'no more'}"


def describe_step(state: Cpu | Stage, address: int, step: paging.Step) -> str:
    """An entry on the way of a walk: where it stands, its bits, and where it leads or why not."""
    if isinstance(state, Ept):
        return _describe_ept_step(state, address, step)
    if isinstance(state, Npt):
        return _describe_nested_step(state, address, step)
    return _describe_step(state, address, step)


def _describe_ept_step(stage: Ept, gpa: int, step: paging.Step) -> str:
    level, address, entry = step
    index = gpa >> 12 + 9 * (level - 1) & 0x1FF
    bits = " ".join(name for bit, name in EPT_BITS if entry & bit) or "-"
    text = f"{STRUCTURES[level]:<5}[{index:>3}] at {address:#x} = {entry:#018x}  {bits}"
    if not entry & ept.present_bits(stage):
        return text + "  <- not present: stops here"
    if not entry & ept.READ and entry & ept.needs_read(stage):
        return text + "  <- rights that no entry may have: stops here"
    if reserved := entry & ept.reserved_at(stage, entry, level):
        return text + f"  <- reserved bits {reserved:#x} are set: stops here"
    if not ept.maps_a_page(entry, level):
        return text + f"  -> table at {entry & paging.FRAME:#x}"
    if ept.is_reserved_type(entry >> 3 & 7):
        return text + f"  <- memory type {entry >> 3 & 7} does not exist: stops here"
    page = entry & paging.FRAME & ~paging.page_offset(level)
    return text + f"  -> page of {SIZES[level]} at {page:#x}, memory type {entry >> 3 & 7}"


def _describe_nested_step(stage: Npt, gpa: int, step: paging.Step) -> str:
    level, address, entry = step
    narrow = stage.levels == 2
    index = (gpa >> 12 + (10 if narrow else 9) * (level - 1)) & (0x3FF if narrow else 0x1FF)
    digits = 10 if narrow else 18
    where = f"{STRUCTURES[level]:<5}[{index:>3}] at {address:#x}"
    text = f"{where} = {entry:#0{digits}x}  {entry_bits(entry)}"
    if not entry & paging.PRESENT:
        return text + "  <- not present: stops here"
    if reserved := entry & npt.reserved(stage, entry, level):
        return text + f"  <- reserved bits {reserved:#x} are set: stops here"
    if npt.maps_a_page(stage, entry, level):
        size = "4 MBytes" if narrow and level == 2 else SIZES[level]
        return text + f"  -> page of {size} at {npt.frame(stage, entry, level):#x}"
    return text + f"  -> table at {entry & paging.FRAME:#x}"


def describe_outcome(outcome: Outcome, mode: Mode = modes.FIVE_LEVEL) -> str:
    """An outcome in words, in a paging mode of which the size of a page depends."""
    match outcome:
        case Translated(pa, level, updates):
            size = f", a page of {_size(mode, level)}" if level in SIZES else ""
            return f"translated to {pa:#x}{size}" + _marked("; sets", updates)
        case PageFault(code, updates, open_bits):
            text = f"#PF, error code {_named(code, ERROR_BITS)}{_undecided(open_bits)}"
            return text + _marked("; may have set", updates)
        case OutsideMemory(address):
            return f"the walk needs the entry at {address:#x}, outside memory"
        case NonCanonical():
            return "#GP(0): the address is not canonical"
        case EptViolation(qualification, gpa, updates, open_bits):
            bits = _named(qualification, QUALIFICATION_BITS)
            text = f"EPT violation at {gpa:#x}, exit qualification {bits}{_undecided(open_bits)}"
            return text + _marked("; may have set", updates)
        case EptMisconfiguration(gpa, updates):
            return f"EPT misconfiguration at {gpa:#x}" + _marked("; may have set", updates)
        case NestedPageFault(exitinfo1, gpa, updates, open_bits):
            bits = _named(exitinfo1, EXITINFO1_BITS)
            text = f"nested page fault at {gpa:#x}, EXITINFO1 {bits}{_undecided(open_bits)}"
            return text + _marked("; may have set", updates)


def _named(word: int, names: Names) -> str:
    return f"{word:#x} ({' '.join(name for bit, name in names if word & bit) or 'no bits'})"


def _undecided(open_bits: int) -> str:
    return f", of which {open_bits:#x} is undecided by the manuals" if open_bits else ""


def _marked(verb: str, updates: Sequence[Update]) -> str:
    """Accessed and dirty flags set, of entries of any format: by which bits they are."""
    flags = ", ".join(
        " ".join(name for bits, name in FLAG_BITS if update.bits & bits)
        + f" at {update.address:#x}"
        for update in updates
    )
    return f"{verb} {flags}" if flags else ""


def _describe_step(cpu: Cpu, linear: int, step: paging.Step) -> str:
    (level, address, entry), mode = step, cpu.mode
    this = mode.level(level)
    index = linear >> this.shift & this.mask
    digits = 2 + 2 * mode.entry_bytes
    where = f"{STRUCTURES[level]:<5}[{index:>3}] at {address:#x}"
    text = f"{where} = {entry:#0{digits}x}  {entry_bits(entry)}"
    if not entry & paging.PRESENT:
        return text + "  <- not present: stops here"
    reserved = entry & (paging.reserved_anywhere(cpu) | paging.reserved_at(cpu, entry, level))
    if reserved:
        return text + f"  <- reserved bits {reserved:#x} are set: stops here"
    if paging.maps_a_page(entry, level, mode):
        page = paging.frame(mode, entry, this)
        key = f", key {entry >> 59 & 0xF}" if cpu.long_mode & (cpu.pke | cpu.pks) else ""
        return text + f"  -> page of {_size(mode, level)} at {page:#x}{key}"
    return text + f"  -> table at {entry & paging.FRAME:#x}"


def _size(mode: Mode, level: int) -> str:
    return "4 MBytes" if mode.entry_bytes == 4 and level == 2 else SIZES[level]


def entry_bits(entry: int, of_ept: bool = False) -> str:
    """The bits of an entry that have names, in the format of EPT or of ordinary paging."""
    names = EPT_BITS if of_ept else ENTRY_BITS
    return " ".join(name for bit, name in names if entry & bit) or "-"
