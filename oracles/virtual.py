"""A machine's second stage: guest-physical addresses translated by EPT (VMX) or NPT (SVM).

The guest of a virtual machine makes the access, in 4-level paging, through a page of its own that
leads to the guest-physical address in question. The guest's tables and code must stay reachable
while tables of the second stage that can hold anything are in force: a root entry that the walk
under test does not read leads there. See `Nested` in machine.py.
"""

import struct
from typing import NamedTuple

from vapama.oracles import machine as m
from vapama.oracles import native
from vapama.oracles.machine import Machine, Nested
from vapama.oracles.native import RECORD_BYTES, Result, changes, entries_after, is_free
from vapama.spec import domains
from vapama.spec.access import GuestPhysicalAccess
from vapama.spec.cpu import LA57, LMA, LME, NXE, PAE, PE, PG, RFLAGS_ONE, WP
from vapama.spec.domains import Domain
from vapama.spec.memory import Sparse
from vapama.spec.outcomes import (
    EptMisconfiguration,
    EptViolation,
    NestedPageFault,
    Outcome,
    Translated,
)
from vapama.spec.stage import Ept, Npt, Stage
from vapama.spec.subject import NotCovered
from vapama.spec.words import Word

NE, VMXE, SVME = 1 << 5, 1 << 13, 1 << 12
NX = 1 << 63
HOST_CR0, HOST_CR4, HOST_EFER = m.CR0_OWN, m.CR4_OWN | PAE, LME | LMA

# Exit codes and reasons.
VMEXIT_BP, VMEXIT_GP, VMEXIT_NPF = 0x43, 0x4D, 0x400
NOT_ZERO = 1 << 3
"""A bit of nCR3 that tells the guest of a second stage at address 0 (it is PWT, and no matter)."""
DELIVERING_INT3 = (0x8000_0403, 0x8000_0603)
"""EXITINTINFO when the delivery of an INT3 itself was intercepted: it met the empty IDT."""
EXCEPTION, EPT_VIOLATION, EPT_MISCONFIGURATION = 0, 48, 49


def narrow(machine: Machine) -> dict[str, Domain]:
    """The draws of a second stage that this machine can take only some values of."""
    width = Domain(among=(machine.features.maxphyaddr,))
    caps = machine.ept_capabilities & domains.EPT_CAPABILITY.free | domains.EPT_CAPABILITY.fixed
    flags = (0, 0x40) if machine.ept_capabilities >> 21 & 1 else (0,)
    return {
        "ept.maxphyaddr": width,
        "ept.mbec": Domain(among=(0,)),
        "ept.capabilities": Domain(among=(caps,)),
        "ept.low": Domain(among=tuple(0x1E | flag for flag in flags)),
        "npt.maxphyaddr": width,
        "npt.page1gb": Domain(among=(int(machine.features.page1gb),)),
        "npt.mode": Domain(among=(2, 3) if has_five_levels(machine) else (2,)),
        "gpa": Domain(free=(1 << machine.features.maxphyaddr) - 1, bias=_gpa),
        "gpa.access": Domain(
            among=tuple(kind for kind in domains.GUEST_PHYSICAL_ACCESSES if is_plain(kind))
        ),
        "host.limit": Domain(among=(m.SERVER,)),
    }


def _gpa(raw: int) -> Word:
    """A guest-physical address below 512 GBytes, or of 48 or 52 bits; some with equal indices."""
    if raw & 3 == 1:
        return (raw >> 20 & 0x1FF) * 0x4020_1000 & (1 << 39) - 1 | raw >> 52
    bits = 39 if raw & 0x1C else 52 if raw & 0x20 else 48
    return raw >> 8 & (1 << bits) - 1


def has_five_levels(machine: Machine) -> bool:
    """Whether nested page tables of 5 levels can be asked about: the guest's own tables must be
    able to name addresses that another entry of the root serves.
    """
    return bool(machine.cr4 & LA57) and machine.features.maxphyaddr > 48


def is_plain(kind: int) -> bool:
    """Whether a kind of access is one that an instruction of the guest makes to its page.

    Not one to a table, without a linear address, to a shadow stack; nor a fetch from a page that
    the guest's own paging forbids to fetch from.
    """
    return not kind & (1 | 8 | 128) and not (kind & 16 and kind & 64)


class Ask(NamedTuple):
    """A case as the guest takes it."""

    flavor: int
    record: bytes
    address: Word
    """The word of the guest-physical address."""
    stub: int


def ask(stage: Stage, memory: Sparse, access: GuestPhysicalAccess, machine: Machine) -> Ask:
    """The record of a case. Raises `NotCovered`."""
    require_askable(stage, memory, access, machine)
    is_ept = isinstance(stage, Ept)
    root = root_of(stage)
    nested = free_way_in(root, memory, machine, stage.levels)
    address, stub = access.address & ~7, m.FETCH if access.fetch else m.READ
    if access.write:
        stub = m.WRITE
    user = bool(access.user and not (access.write and not access.writable))
    page = address & m.FRAME | m.PRESENT | m.ACCESSED | m.DIRTY
    page |= access.writable << 1 | access.user << 2 | access.no_execute * NX
    own = {**way_in(stage, nested), nested.guest | m.TARGET >> 12 << 3: page}
    pokes = {**memory.touched, **own}
    if len(pokes) > native.MOST_POKES:
        raise NotCovered(f"a walk that reads {len(memory.touched)} entries")
    avoided = pokes if access.fetch else own if access.write else {}
    if any(word in avoided for word in pages(memory, address)):
        raise NotCovered("a fetch from a word that holds an entry, or a write to one of ours")
    start = (m.USER_CODE if user else m.SUPERVISOR_CODE) + stub
    head = m.HEAD.pack(
        m.BLOCK_OF[True, user],
        m.TARGET | address & 0xFF8,
        stub,
        user,
        native.MARKER,
        len(pokes),
        PG | PE | NE | (WP if access.writable or not access.write else 0),
        nested.base + m.TARGET,
        PAE | (VMXE if is_ept else 0),
        LME | LMA | NXE,
        RFLAGS_ONE,
        0,
        0,
        stage.eptp if isinstance(stage, Ept) else root | NOT_ZERO,
        start,
        host_efer(stage),
        *(0,) * 6,
    )
    pairs = b"".join(struct.pack("<QQ", *pair) for pair in pokes.items())
    record = (head + pairs).ljust(RECORD_BYTES, b"\0")
    return Ask(flavor(stage), record, address, stub)


def flavor(stage: Stage) -> int:
    """How a record of this second stage is run."""
    if isinstance(stage, Ept):
        return m.VMX
    return {3: m.SVM_PAE, 5: m.SVM_5}.get(stage.levels, m.SVM)


def root_of(stage: Stage) -> Word:
    """Where the root table is."""
    if isinstance(stage, Ept):
        return stage.eptp & m.FRAME
    return stage.ncr3 & (0xFFFF_FFE0 if stage.levels == 3 else m.FRAME)


def way_in(stage: Stage, nested: Nested) -> dict[Word, Word]:
    """The entry of the root that leads to the guest's own pages, with its address."""
    root = root_of(stage)
    if isinstance(stage, Ept):
        return {root | nested.entry << 3: nested.ept | m.EPT_ALL | m.EPT_MARKED}
    # PDPTEs of PAE paging have no rights and flags.
    flags = m.PRESENT if stage.levels == 3 else m.MARKED
    return {root + (nested.entry << 3): nested.npt | flags}


def host_efer(stage: Stage) -> Word:
    """The EFER that the host has meanwhile."""
    long_mode = LME if stage.levels > 3 else 0
    return long_mode | SVME | (stage.efer & NXE if isinstance(stage, Npt) else 0)


def require_askable(
    stage: Stage, memory: Sparse, access: GuestPhysicalAccess, machine: Machine
) -> None:
    """Raise `NotCovered` for a case that this machine cannot be asked, or not by our guest."""
    features = machine.features
    if isinstance(stage, Ept):
        counts = domains.EPT_CAPABILITY.free
        if not features.vmx or (stage.capabilities ^ machine.ept_capabilities) & counts:
            raise NotCovered("EPT with these capabilities is not here")
        if stage.mbec or stage.levels != 4 or stage.eptp & 7 != 6:
            raise NotCovered("only 4-level EPT in write-back memory, without MBEC, is asked about")
    elif not features.svm or stage.page1gb != features.page1gb:
        raise NotCovered("nested page tables of such a host are not here")
    elif stage.levels == 5 and not has_five_levels(machine):
        raise NotCovered("nested page tables of a host with so many levels are not here")
    elif stage.levels == 2:
        raise NotCovered("a host in 32-bit paging is not here")
    elif stage.levels == 3 and access.address >> 32:
        raise NotCovered("a host in PAE paging translates 32 bits")
    if stage.maxphyaddr != features.maxphyaddr:
        raise NotCovered(f"MAXPHYADDR here is {features.maxphyaddr}")
    if access.address >> features.maxphyaddr:
        raise NotCovered("the guest's own entry cannot hold this address")
    plain = not access.table and access.linear and not access.shadow_stack
    if not plain or (access.fetch and access.no_execute):
        raise NotCovered("an access that the guest's instructions do not make to its page")
    if memory.limit != m.SERVER:
        raise NotCovered(f"memory here is the first {m.SERVER:#x} bytes")
    for address in (root_of(stage), *memory.touched):
        if not is_free(address):
            raise NotCovered(f"a table at {address:#x}, where there is no RAM that is free")
    words = pages(memory, access.address & ~7)
    if any(m.SERVER <= page < m.RAM_BYTES for page in words):
        raise NotCovered("the page holds the guest itself")


def pages(memory: Sparse, address: Word) -> list[Word]:
    """Every word that the access may go to, whatever the entries mean: a bold guess."""
    offsets = [(1 << bits) - 1 for bits in (12, 21, 30)]
    return [
        entry & m.FRAME & ~offset | address & offset
        for entry in memory.touched.values()
        for offset in offsets
    ]


def free_way_in(root: Word, memory: Sparse, machine: Machine, levels: int) -> Nested:
    """A root entry that the walk under test does not read, of those that an address can select."""
    most = 1 << machine.features.maxphyaddr
    for nested in m.NESTED[levels]:
        if nested.base < most and root + (nested.entry << 3) not in memory.touched:
            return nested
    raise NotCovered("the walk reads each entry of the root that leads to the guest's code")


def observed(asked: Ask, result: bytes, access: GuestPhysicalAccess, memory: Sparse) -> Outcome:
    """The outcome that a record came back with.

    Raises `NotCovered` if it cannot be told, and `RuntimeError` if the guest did something other
    than the access.
    """
    found = Result._make(m.RESULT.unpack_from(result, m.RESULT_AT))
    after = entries_after(result)
    accessed = asked.address | 7 if asked.stub == m.WRITE else asked.address
    if is_done(asked.flavor, found):
        pa = native.where_it_went(found, asked.stub, asked.address, after)
        native.unmark(asked.stub, pa, after, memory.touched)
        return Translated(pa | access.address & 7, 0, changes(memory.touched, after))
    updates, gpa = changes(memory.touched, after), access.address
    if found.fault == accessed:
        if asked.flavor != m.VMX and found.vector == VMEXIT_NPF:
            return NestedPageFault(found.code, gpa, updates)
        if asked.flavor == m.VMX and found.vector == EPT_VIOLATION:
            if found.linear != m.TARGET | accessed & 0xFFF:
                raise RuntimeError(f"another guest-linear address: {found}")
            return EptViolation(found.code, gpa, updates)
        if asked.flavor == m.VMX and found.vector == EPT_MISCONFIGURATION:
            return EptMisconfiguration(gpa, updates)
    if asked.stub == m.FETCH and not is_exit_of_the_second_stage(asked.flavor, found):
        raise NotCovered("a fetch from where there is no RAM")
    raise RuntimeError(f"the guest did something other than the access: {found}")


def is_exit_of_the_second_stage(flavor: int, found: Result) -> bool:
    """Whether the second stage stopped the guest."""
    if flavor != m.VMX:
        return found.vector == VMEXIT_NPF
    return found.vector in (EPT_VIOLATION, EPT_MISCONFIGURATION)


def is_done(flavor: int, found: Result) -> bool:
    """Whether the guest ended with the INT3 that comes after the access."""
    if flavor != m.VMX:
        delivering = found.vector == VMEXIT_GP and found.event in DELIVERING_INT3
        return found.vector == VMEXIT_BP or delivering
    return found.vector == EXCEPTION and found.event & 0xFF == m.DONE
