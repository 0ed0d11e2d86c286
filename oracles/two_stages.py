"""Both stages of a machine: a guest's own tables, walked through EPT or nested page tables.

The guest of a virtual machine makes the access with tables that can hold anything in both stages.
An entry of its root table, which the walk under test does not read, leads to our code, by
guest-physical addresses that a root entry of the second stage serves: see `Nested` in machine.py.
So the guest's root table must be reachable; that the case does as far as its first entry goes.
"""

import struct
from typing import NamedTuple

from vapama.oracles import machine as m
from vapama.oracles import native, virtual
from vapama.oracles.machine import Machine, Nested
from vapama.oracles.native import Result, changes, entries_after
from vapama.oracles.virtual import NE, NOT_ZERO, VMXE
from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import AC, LMA, LME, NXE, PAE, PE, PG, RFLAGS_ONE, SMAP, SMEP, WP, Cpu
from vapama.spec.memory import Sparse
from vapama.spec.outcomes import (
    EptMisconfiguration,
    EptViolation,
    NestedPageFault,
    NonCanonical,
    Outcome,
    PageFault,
    Translated,
)
from vapama.spec.stage import Ept, Stage
from vapama.spec.subject import NotCovered
from vapama.spec.words import Word

RECORD_BYTES = 640
MOST_POKES = (RECORD_BYTES - m.HEAD_BYTES) // 16
ENTRANCES = (0x1F7, 0x1A5, 0x133)
"""Entries of the guest's root table by which its code can be reached."""
EXCEPTION_EXITS = 0x40
PAGE_FAULT, GENERAL_PROTECTION, STACK_FAULT = 14, 13, 12


class Ask(NamedTuple):
    """A case as the guest takes it."""

    flavor: int
    record: bytes
    start: Word
    accessed: Word
    """The linear address that a fault tells."""


def ask(
    cpu: Cpu, stage: Stage, memory: Sparse, access: Access, root: Word, machine: Machine
) -> Ask:
    """The record of a case; `root` is where the guest's root table is in the machine's memory.

    Raises `NotCovered`.
    """
    plain = GuestPhysicalAccess(0, writable=1)
    virtual.require_askable(stage, Sparse({}, memory.limit), plain, machine)
    if cpu.levels != 4 or cpu.masks or cpu.pke or cpu.pks or cpu.cet:
        raise NotCovered("a guest in another paging mode, or with keys or shadow stacks")
    if cpu.maxphyaddr != machine.features.maxphyaddr:
        raise NotCovered("the guest's physical addresses are as wide as the machine's")
    if access.implicit or access.shadow_stack:
        raise NotCovered("no plain instruction makes implicit or shadow-stack accesses")
    for address in (root, *memory.touched):
        if not native.is_free(address):
            raise NotCovered("a table where there is no RAM that is free")
    is_ept = isinstance(stage, Ept)
    if stage.levels < 4:
        raise NotCovered("both stages with a host that is not in long mode")
    second_root = virtual.root_of(stage)
    nested = virtual.free_way_in(second_root, memory, machine, stage.levels)
    base, own = _way_in(nested, virtual.way_in(stage, nested), root, memory)
    pokes = {**memory.touched, **own}
    if len(pokes) > MOST_POKES:
        raise NotCovered("a walk that reads so many entries")
    address = access.address & ~7
    avoided = pokes if access.fetch else own
    words = virtual.pages(memory, address)
    if any(word in avoided for word in words) and (access.fetch or access.write):
        raise NotCovered("a fetch from a word that holds an entry, or a write to one of ours")
    if any(m.SERVER <= word < m.RAM_BYTES for word in words):
        raise NotCovered("the page holds the guest itself")
    stub = m.FETCH if access.fetch else m.WRITE if access.write else m.READ
    start = base + (m.USER_CODE if access.user else m.SUPERVISOR_CODE) + stub
    head = m.HEAD.pack(
        m.BLOCK_OF[True, bool(access.user)],
        address,
        stub,
        access.user,
        native.MARKER,
        len(pokes),
        PG | PE | NE | cpu.cr0 & WP,
        cpu.cr3,
        PAE | cpu.cr4 & (SMEP | SMAP) | (VMXE if is_ept else 0),
        LME | LMA | cpu.efer & NXE,
        cpu.rflags & AC | RFLAGS_ONE,
        0,
        0,
        stage.eptp if isinstance(stage, Ept) else second_root | NOT_ZERO,
        start,
        virtual.host_efer(stage),
        *(0,) * 6,
    )
    pairs = b"".join(struct.pack("<QQ", *pair) for pair in pokes.items())
    record = (head + pairs).ljust(RECORD_BYTES, b"\0")
    accessed = address | 7 if access.write else address
    return Ask(virtual.flavor(stage), record, start, accessed)


def _way_in(
    nested: Nested, way_in: dict[Word, Word], root: Word, memory: Sparse
) -> tuple[Word, dict[Word, Word]]:
    """The linear address of our pages, and the entries that lead there."""
    for entry in ENTRANCES:
        where = root | entry << 3
        if where not in memory.touched and where not in way_in:
            base = entry << 39
            if base >> 47:
                base |= 0xFFFF << 48
            to_guest = nested.base + m.TARGET | m.MARKED
            return base, {**way_in, where: to_guest}
    raise NotCovered("the walk reads each entry of the guest's root that leads to its code")


def observed(asked: Ask, result: bytes, access: Access, memory: Sparse) -> Outcome:
    """The outcome that a record came back with.

    Raises `NotCovered` if it cannot be told, and `RuntimeError` if the guest did something other
    than the access.
    """
    found = Result._make(m.RESULT.unpack_from(result, m.RESULT_AT))
    after = entries_after(result)
    stub = m.FETCH if access.fetch else m.WRITE if access.write else m.READ
    address = access.address & ~7
    if virtual.is_done(asked.flavor, found):
        pa = native.where_it_went(found, stub, address, after)
        native.unmark(stub, pa, after, memory.touched)
        return Translated(pa | access.address & 7, 0, changes(memory.touched, after))
    updates = changes(memory.touched, after)
    if found.where not in {asked.start, address if access.fetch else asked.start}:
        raise NotCovered("the guest came to its code no more, or ran on")
    if asked.flavor != m.VMX:
        if found.vector == virtual.VMEXIT_NPF:
            return NestedPageFault(found.code, found.fault, updates)
        vector, code, linear = found.vector - EXCEPTION_EXITS, found.code, found.fault
    else:
        vector, code, linear = found.event & 0xFF, found.event >> 32, found.code
        if found.vector in (virtual.EPT_VIOLATION, virtual.EPT_MISCONFIGURATION):
            if found.vector == virtual.EPT_MISCONFIGURATION:
                return EptMisconfiguration(found.fault, updates)
            if found.linear != asked.accessed:
                raise RuntimeError(f"another guest-linear address: {found}")
            return EptViolation(found.code, found.fault, updates)
        if found.vector != virtual.EXCEPTION:
            raise RuntimeError(f"the guest did something other than the access: {found}")
    if vector == PAGE_FAULT and linear == asked.accessed:
        return PageFault(code, updates)
    if vector in (GENERAL_PROTECTION, STACK_FAULT) and code == 0:
        return NonCanonical()
    if stub == m.FETCH:
        raise NotCovered("a fetch from where there is no RAM")
    raise RuntimeError(f"the guest did something other than the access: {found}")
