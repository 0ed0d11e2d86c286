"""Native cases in every paging mode: as records for our guest, and what they come back with.

What can be asked is what the machine's processor has, with tables in its RAM. The physical address
of an access is known by the stamps that it finds there: see guest/guest.asm. The flags set are read
from the entries that the walk reads; that nothing else in the pool of frames changed is checked.
"""

import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vapama.oracles import machine as m
from vapama.oracles.machine import Machine, World
from vapama.spec import domains
from vapama.spec.access import Access
from vapama.spec.cpu import (
    CET,
    CR4_UNSPECIFIED,
    LA57,
    LAM_SUP,
    LMA,
    LME,
    NXE,
    PAE,
    PE,
    PG,
    PKE,
    PKS,
    PSE,
    RFLAGS_ONE,
    SMAP,
    SMEP,
    VM,
    Cpu,
)
from vapama.spec.domains import FRAMES, Domain
from vapama.spec.memory import PAGE_BYTES, Sparse
from vapama.spec.outcomes import (
    NonCanonical,
    Outcome,
    PageFault,
    Translated,
    Update,
)
from vapama.spec.subject import NotCovered
from vapama.spec.words import Word

RECORD_BYTES = 256
MOST_POKES = (RECORD_BYTES - m.HEAD_BYTES) // 16
POOL_BYTES = FRAMES * PAGE_BYTES
STAMPS = struct.pack(f"<{POOL_BYTES // 8}Q", *map(m.stamp, range(POOL_BYTES // 8)))
MARKER = 0xA5
"""What a write writes, into the last byte of a word: no flag of any entry is there."""

GENERAL_PROTECTION, STACK_FAULT, PAGE_FAULT = 13, 12, 14
CR4_THAT_COUNTS = PSE | PAE | LA57 | SMEP | SMAP | PKE | PKS | CR4_UNSPECIFIED | CET | LAM_SUP
"""The bits of CR4 that a walk depends on. Of the others, those that the machine has are set."""
CR0_LEFT_OUT = 1 << 18
"""AM: an alignment check would come before the access, or in the guest's own code."""
RFLAGS_SET = 0x24_0CD5 | 3 << 12
"""Of RFLAGS is set what cannot stop the guest's own code: not TF, NT, RF, IF and those of virtual
interrupts; AC is the one that counts."""
STUB_BYTES = 9, 10
"""Where the INT3 of the stubs that read and write ends."""
LOW_32 = (1 << 32) - 1
PDPT = 0xFFFF_FFE0
"""The bits of CR3 that the four PDPTEs of PAE paging are at."""


def narrow(machine: Machine) -> dict[str, Domain]:
    """The draws that this machine can take only some values of."""
    features = machine.features
    return {
        "maxphyaddr": Domain(among=(features.maxphyaddr,)),
        "page1gb": Domain(among=(int(features.page1gb),)),
        "pse36": Domain(among=(int(features.pse36),)),
        "guest.limit": Domain(among=(m.SERVER,)),
        "access": Domain(among=tuple(kind for kind in domains.ACCESSES if kind & 1 == 0)),
    }


class Ask(NamedTuple):
    """A case as the guest takes it: how to run it, and what will tell that it was run."""

    flavor: int
    record: bytes
    world: World


def ask(cpu: Cpu, memory: Sparse, access: Access, machine: Machine) -> Ask:
    """The record of a case. Raises `NotCovered`."""
    require_askable(cpu, memory, access, machine)
    flavor = flavor_of(cpu)
    world, own = way_in(flavor, cpu, memory, access)
    pokes = {**memory.touched, **own}
    if len(pokes) > MOST_POKES:
        raise NotCovered(f"a walk that reads {len(memory.touched)} entries")
    avoided = pokes if access.fetch else own if access.write else {}
    if any(page in avoided for page in pages(cpu, memory, access)):
        raise NotCovered("a fetch from a word that holds an entry, or a write to one of ours")
    address = access.address & ~7
    head = m.HEAD.pack(
        world.base,
        address if flavor in LONG else address & LOW_32,
        m.FETCH if access.fetch else m.WRITE if access.write else m.READ,
        access.user,
        MARKER,
        len(pokes),
        cpu.cr0 & ~CR0_LEFT_OUT | PE,
        cpu.cr3,
        settable_cr4(cpu, machine),
        cpu.efer & (LME | LMA | NXE if cpu.efer & LMA else NXE),
        cpu.rflags & RFLAGS_SET | RFLAGS_ONE,
        cpu.pkru,
        cpu.pkrs,
        *(0,) * 9,
    )
    pairs = b"".join(struct.pack("<QQ", *pair) for pair in pokes.items())
    return Ask(flavor, (head + pairs).ljust(RECORD_BYTES, b"\0"), world)


LONG = (m.LONG_4, m.LONG_5)


def flavor_of(cpu: Cpu) -> int:
    """How the guest runs a case natively."""
    if cpu.efer & LMA:
        return m.LONG_5 if cpu.cr4 & LA57 else m.LONG_4
    return m.LEGACY_PAE if cpu.cr4 & PAE and cpu.cr0 & PG else m.LEGACY


def settable_cr4(cpu: Cpu, machine: Machine) -> Word:
    """CR4 of a record: as the case has it, but for bits that have no effect in its mode and some in
    that of the guest's own tables, from which it is set.
    """
    cr4 = cpu.cr4 & machine.cr4
    if not cpu.cr0 & PG:
        return cr4 & ~(LA57 | PAE) | PSE
    return cr4 if cpu.efer & LMA else cr4 & ~LA57


def require_askable(cpu: Cpu, memory: Sparse, access: Access, machine: Machine) -> None:
    """Raise `NotCovered` for a case that this machine cannot be asked, or not by our guest."""
    features = machine.features
    has = features.maxphyaddr, features.page1gb, features.pse36
    if (cpu.maxphyaddr, cpu.page1gb, cpu.pse36) != has:
        raise NotCovered(f"MAXPHYADDR, 1-GByte pages and PSE-36 are {has} here")
    missing = cpu.cr4 & CR4_THAT_COUNTS & ~machine.cr4
    if missing and cpu.cr0 & PG:
        raise NotCovered(f"this processor has no CR4 bits {missing:#x}")
    if cpu.rflags & VM:
        raise NotCovered("virtual-8086 mode runs no code of the guest's")
    if access.implicit or access.shadow_stack:
        raise NotCovered("no plain instruction makes implicit or shadow-stack accesses")
    if memory.limit != m.SERVER:
        raise NotCovered(f"memory here is the first {m.SERVER:#x} bytes")
    if cpu.efer & LMA and cpu.cr3 >> 52:
        raise NotCovered("this processor masks no linear addresses")
    if cpu.cr0 & PG and not is_free(cpu.cr3 & m.FRAME):
        raise NotCovered("the root table is not in free RAM")
    for address in memory.touched:
        if not is_free(address):
            raise NotCovered(f"a table at {address:#x}, where there is no RAM that is free")
    if access.fetch and not cpu.cr0 & PG and not is_free(access.address & LOW_32):
        raise NotCovered("without paging, nothing would end a run of code where there is no RAM")
    for page in pages(cpu, memory, access):
        if m.SERVER <= page < m.RAM_BYTES:
            raise NotCovered("the page holds the guest itself")


def pages(cpu: Cpu, memory: Sparse, access: Access) -> Iterator[Word]:
    """Every word that the access may go to, whatever the entries mean: a bold guess."""
    address = access.address & ~7
    if not cpu.cr0 & PG:
        yield address & LOW_32
    halves = (0, 32) if not cpu.efer & LMA and not cpu.cr4 & PAE else (0,)
    for pair in memory.touched.values():
        for half in halves:
            entry = pair >> half & LOW_32 if len(halves) > 1 else pair
            for bits in (12, 21, 22, 30):
                offset = (1 << bits) - 1
                yield entry & m.FRAME & ~offset | address & offset


def is_free(address: Word) -> bool:
    """Whether a case may use the word of RAM there."""
    return address < m.SERVER and address not in m.HOLE


def way_in(flavor: int, cpu: Cpu, memory: Sparse, access: Access) -> tuple[World, dict[Word, Word]]:
    """A world that the case leaves room for, and the entries that lead there, by address."""
    if not cpu.cr0 & PG:
        return m.OFF_WORLD, {}
    if flavor == m.LEGACY_PAE:
        return pae_way_in(cpu, memory, access)
    root, size, key = cpu.cr3 & m.FRAME, 4, 0
    if flavor in LONG:
        size, key = 8, free_key(cpu)
    for world in m.WORLDS_OF[flavor]:
        where = root | world.entry * size
        if where & ~7 not in memory.touched:
            entry = world.stub(key) | m.MARKED
            return world, {where & ~7: entry << 8 * (where & 7)}
    raise NotCovered("the walk reads each entry of the root table that leads to the guest's code")


def pae_way_in(cpu: Cpu, memory: Sparse, access: Access) -> tuple[World, dict[Word, Word]]:
    """The same in PAE paging: all PDPTEs lie at CR3, from where they are loaded."""
    if cpu.pdptes is None:
        raise NotCovered("PDPTEs are in registers here")
    table = cpu.cr3 & PDPT
    if any(address & ~0x1F == table for address in memory.touched):
        raise NotCovered("the walk reads the words that the PDPTEs are loaded from")
    world = next(w for w in m.WORLDS_OF[m.LEGACY_PAE] if w.entry != access.address >> 30 & 3)
    loaded = {table | i << 3: int(pdpte) for i, pdpte in enumerate(cpu.pdptes)}
    return world, {**loaded, table | world.entry << 3: world.stub(0) | m.PRESENT}


def free_key(cpu: Cpu) -> int:
    """A protection key that PKRS gives all rights to: for the pages of the world."""
    if not cpu.cr4 & PKS:
        return 0
    for key in range(m.KEYS):
        if cpu.pkrs >> 2 * key & 3 == 0:
            return key
    raise NotCovered("PKRS leaves no protection key with all rights")


# RESULTS


class Result(NamedTuple):
    """What the guest left in a record."""

    vector: int
    code: Word
    fault: Word
    word: int
    neighbor: int
    where: Word
    linear: Word
    event: Word


def observed(asked: Ask, result: bytes, touched: Mapping[int, int]) -> Outcome:
    """The outcome that a record came back with; its physical address is that of the word.

    Raises `NotCovered` if it cannot be told, and `RuntimeError` if the guest did something other
    than the access.
    """
    record, world = asked.record, asked.world
    found = Result._make(m.RESULT.unpack_from(result, m.RESULT_AT))
    address, stub, user = struct.unpack_from("<QBB", record, 8)
    accessed = address | 7 if stub == m.WRITE else address
    if world.base + m.GDT <= LOW_32:
        found = found._replace(where=found.where & LOW_32)
    after = entries_after(result)
    start = world.base + (m.USER_CODE if user else m.SUPERVISOR_CODE) + stub
    if found.vector == m.DONE:
        return _translated(found, stub, address, start, touched, after)
    marked = any(after[a] >> 56 == MARKER != touched[a] >> 56 for a in touched)
    if stub == m.WRITE and found.where != start and marked:
        raise NotCovered("the write changed an entry of its own walk, and another walk met it")
    updates = changes(touched, after)
    where = {start, accessed} if stub == m.FETCH else {start}
    if found.vector == PAGE_FAULT and found.fault == accessed and found.where in where:
        return PageFault(found.code, updates)
    if found.vector in (GENERAL_PROTECTION, STACK_FAULT) and found.where in where and not updates:
        return NonCanonical()
    if stub == m.FETCH:
        raise NotCovered("a fetch from where there is no RAM")
    raise RuntimeError(f"the guest did something other than the access: {found}")


def _translated(
    found: Result,
    stub: int,
    address: Word,
    start: Word,
    touched: Mapping[int, int],
    after: dict[int, int],
) -> Translated:
    end = address + 6 if stub == m.FETCH else start + STUB_BYTES[stub == m.WRITE]
    if found.where != end:
        raise RuntimeError(f"the guest ended elsewhere than after the access: {found}")
    pa = where_it_went(found, stub, address, after)
    unmark(stub, pa, after, touched)
    return Translated(pa, 0, changes(touched, after))


def unmark(stub: int, pa: Word, after: dict[int, int], touched: Mapping[int, int]) -> None:
    """Undo in `after` what a write wrote into an entry. Raises `RuntimeError` if it did not."""
    if stub == m.WRITE and pa in after:
        if after[pa] >> 56 != MARKER:
            raise RuntimeError(f"the write is not found at {pa:#x}")
        after[pa] = after[pa] & ~(0xFF << 56) | touched.get(pa, 0) & 0xFF << 56


def where_it_went(found: Result, stub: int, address: Word, after: Mapping[int, int]) -> Word:
    """The word of RAM whose content, and its neighbor's, the access found. Raises `NotCovered`."""

    def holds(pa: int) -> int:
        return after[pa] >> 8 & 0xFFFF_FFFF if pa in after else pa >> 3

    candidates = {found.word << 3, (found.neighbor ^ 1) << 3, *after}
    right = [
        pa
        for pa in candidates
        if is_free(pa)
        and (pa ^ address) & 0xFF8 == 0
        and holds(pa) == found.word
        and (stub == m.FETCH or holds(pa ^ 8) == found.neighbor)
    ]
    if len(right) != 1:
        raise NotCovered("the access went where there is no RAM, or to one of two equal words")
    return right[0]


def entries_after(result: bytes) -> dict[int, int]:
    """What the entries of a record are after it, by address."""
    (count,) = struct.unpack_from("<I", result, 0x14)
    pairs = struct.unpack_from(f"<{2 * count}Q", result, m.HEAD_BYTES)
    return dict(zip(pairs[::2], pairs[1::2], strict=True))


def changes(touched: Mapping[int, int], after: Mapping[int, int]) -> tuple[Update, ...]:
    """The bits newly set in the entries of a case. Raises `RuntimeError` if one was cleared."""
    updates = []
    for address, before in touched.items():
        changed = before ^ after[address]
        if changed & before:
            raise RuntimeError(f"bits {changed & before:#x} of the entry at {address:#x} cleared")
        if changed:
            updates.append(Update(address, changed))
    return tuple(updates)
