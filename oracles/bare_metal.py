"""A machine behind the subject protocol: cases as records for our guest, results as outcomes.

What can be asked is what the machine's processor has, with tables in its RAM. The physical address
of an access is known by the stamps that it finds there: see guest/guest.asm. The flags set are read
from the entries that the walk reads; that nothing else in the pool of frames changed is checked.
"""

import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from vapama.oracles import machine as m
from vapama.oracles.departures import Departure, Disagreement, named
from vapama.oracles.machine import Machine, MachineDied, World
from vapama.spec import domains
from vapama.spec.access import Access
from vapama.spec.cpu import LA57, LME, NXE, PAE, PG, PKS, RFLAGS_ONE, Cpu
from vapama.spec.domains import FRAMES, Domain
from vapama.spec.memory import PAGE_BYTES, Memory, Sparse
from vapama.spec.outcomes import (
    NonCanonical,
    Outcome,
    PageFault,
    Translated,
    Update,
)
from vapama.spec.subject import EFFECTS, ERROR_CODE, PA, Capabilities, NotCovered
from vapama.spec.words import Word

RECORD_BYTES = 256
MOST_POKES = (RECORD_BYTES - m.HEAD_BYTES) // 16
POOL_BYTES = FRAMES * PAGE_BYTES
STAMPS = struct.pack(f"<{POOL_BYTES // 8}Q", *map(m.stamp, range(POOL_BYTES // 8)))
MARKER = 0xA5
"""What a write writes, into the last byte of a word: no flag of any entry is there."""

GENERAL_PROTECTION, STACK_FAULT, PAGE_FAULT = 13, 12, 14
SCE, AM = 1 << 0, 1 << 18
RFLAGS_FREE = 0x24_0CD5 | 3 << 12
"""The flags that change nothing else here: not TF, NT, RF, IF and those of virtual interrupts."""
STUB_BYTES = 9, 10
"""Where the INT3 of the stubs that read and write ends."""


def narrow(machine: Machine) -> dict[str, Domain]:
    """The draws that this machine can take only some values of."""
    features = machine.features
    return {
        "maxphyaddr": Domain(among=(features.maxphyaddr,)),
        "page1gb": Domain(among=(int(features.page1gb),)),
        "guest.limit": Domain(among=(m.SERVER,)),
        "cr0": replace(domains.CR0, free=domains.CR0.free & ~AM),
        "cr3": replace(domains.CR3, free=(1 << 25) - 1),
        "cr4": _restricted(domains.CR4, machine.cr4),
        "efer": replace(domains.EFER, free=domains.EFER.free & (SCE | NXE)),
        "rflags": replace(domains.RFLAGS, free=domains.RFLAGS.free & RFLAGS_FREE),
        "access": Domain(among=tuple(kind for kind in domains.ACCESSES if kind & 1 == 0)),
    }


def _restricted(domain: Domain, bits: Word) -> Domain:
    """A domain without some of its free bits."""
    scope = tuple(dict.fromkeys(value & bits for value in domain.scope))
    return replace(domain, free=domain.free & bits, scope=scope)


class Ask(NamedTuple):
    """A case as the guest takes it: how to run it, and what will tell that it was run."""

    flavor: int
    record: bytes
    world: World


def ask(cpu: Cpu, memory: Sparse, access: Access, machine: Machine) -> Ask:
    """The record of a case. Raises `NotCovered`."""
    require_askable(cpu, memory, access, machine)
    flavor = flavor_of(cpu)
    world = free_world(flavor, cpu, memory)
    key = free_key(cpu)
    entrance = cpu.cr3 & m.FRAME | world.index << 3
    pokes = {**memory.touched, entrance: world.stub(key) | m.MARKED}
    if len(pokes) > MOST_POKES:
        raise NotCovered(f"a walk that reads {len(memory.touched)} entries")
    head = m.HEAD.pack(
        world.base,
        access.address & ~7,
        m.FETCH if access.fetch else m.WRITE if access.write else m.READ,
        access.user,
        MARKER,
        len(pokes),
        cpu.cr0,
        cpu.cr3,
        cpu.cr4,
        cpu.efer,
        cpu.rflags,
        cpu.pkru,
        cpu.pkrs,
        *(0,) * 9,
    )
    pairs = b"".join(struct.pack("<QQ", *pair) for pair in pokes.items())
    return Ask(flavor, (head + pairs).ljust(RECORD_BYTES, b"\0"), world)


def flavor_of(cpu: Cpu) -> int:
    """How the guest runs a case natively."""
    if cpu.cr0 & PG == 0:
        raise NotCovered("paging is off: there is nothing for a walk to do")
    if cpu.efer & LME:
        return m.LONG_5 if cpu.cr4 & LA57 else m.LONG_4
    return m.LEGACY_PAE if cpu.cr4 & PAE else m.LEGACY


def require_askable(cpu: Cpu, memory: Sparse, access: Access, machine: Machine) -> None:
    """Raise `NotCovered` for a case that this machine cannot be asked, or not by our guest."""
    features = machine.features
    if cpu.maxphyaddr != features.maxphyaddr or cpu.page1gb != features.page1gb:
        raise NotCovered(f"MAXPHYADDR here is {features.maxphyaddr}")
    missing = cpu.cr4 & ~machine.cr4
    if missing:
        raise NotCovered(f"this processor has no CR4 bits {missing:#x}")
    if cpu.cr0 & AM or cpu.rflags & ~(RFLAGS_FREE | RFLAGS_ONE):
        raise NotCovered("CR0.AM, or a flag that stops the guest's own code")
    if access.implicit:
        raise NotCovered("no instruction makes an implicit access at an address of one's choice")
    if memory.limit != m.SERVER:
        raise NotCovered(f"memory here is the first {m.SERVER:#x} bytes")
    if not is_free(cpu.cr3 & m.FRAME):
        raise NotCovered("the root table is not in free RAM")
    for address in memory.touched:
        if not is_free(address):
            raise NotCovered(f"a table at {address:#x}, where there is no RAM that is free")
    word = access.address & ~7
    for entry in memory.touched.values():
        for offset in (0xFFF, (1 << 21) - 1, (1 << 22) - 1, (1 << 30) - 1):
            page = entry & m.FRAME & ~offset | word & offset
            if m.SERVER <= page < m.RAM_BYTES:
                raise NotCovered("the page holds the guest itself")
            if access.fetch and page in memory.touched:
                raise NotCovered("a fetch from a word that an entry of the case is in")


def is_free(address: Word) -> bool:
    """Whether a case may use the word of RAM there."""
    return address < m.SERVER and address not in m.HOLE


def free_world(flavor: int, cpu: Cpu, memory: Sparse) -> World:
    """A world whose root entry the walk under test does not read."""
    root = cpu.cr3 & m.FRAME
    for world in m.WORLDS_OF[flavor]:
        if root | world.index << 3 not in memory.touched:
            return world
    raise NotCovered("the walk reads each entry of the root table that leads to the guest's code")


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


def observed(record: bytes, result: bytes, world: World, touched: Mapping[int, int]) -> Outcome:
    """The outcome that a record came back with.

    Raises `NotCovered` if it cannot be told, and `RuntimeError` if the guest did something other
    than the access.
    """
    found = Result._make(m.RESULT.unpack_from(result, m.RESULT_AT))
    address, stub, user = struct.unpack_from("<QBB", record, 8)
    accessed = address | 7 if stub == m.WRITE else address
    after = entries_after(result, touched)
    start = world.base + (m.USER_CODE if user else m.SUPERVISOR_CODE) + stub
    if found.vector == m.DONE:
        return _translated(found, stub, address, start, touched, after)
    updates = changes(touched, after)
    where = {start, accessed} if stub == m.FETCH else {start}
    if found.vector == PAGE_FAULT and found.fault == accessed and found.where in where:
        return PageFault(found.code, updates)
    if found.vector in (GENERAL_PROTECTION, STACK_FAULT) and found.where in where and not updates:
        return NonCanonical()
    if stub == m.FETCH and found.where == address:
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
    if stub == m.WRITE and pa in after:
        if after[pa] >> 56 != MARKER:
            raise RuntimeError(f"the write is not found at {pa:#x}")
        after[pa] = after[pa] & ~(0xFF << 56) | touched[pa] & 0xFF << 56
    return Translated(pa, 0, changes(touched, after))


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


def entries_after(result: bytes, touched: Mapping[int, int]) -> dict[int, int]:
    """What the entries of a case are after it, by address."""
    (count,) = struct.unpack_from("<I", result, 0x14)
    pairs = struct.unpack_from(f"<{2 * count}Q", result, m.HEAD_BYTES)
    return {a: v for a, v in zip(pairs[::2], pairs[1::2], strict=True) if a in touched}


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


# THE SUBJECT


class BareMetal:
    """A machine with our guest in it, behind the subject protocol.

    `departures` are the disagreements of this machine with the manual that are known by name.
    """

    def __init__(self, machine: Machine, departures: tuple[Departure, ...]) -> None:
        self.machine, self.departures = machine, departures
        self.capabilities = Capabilities(
            observes=frozenset({PA, ERROR_CODE, EFFECTS}),
            preload=True,
            narrow=narrow(machine),
        )

    def translate(self, cpu: Cpu, memory: Sparse, access: Access) -> Outcome:
        """The outcome of the access made by the guest. Raises `NotCovered`."""
        asked = ask(cpu, memory, access, self.machine)
        try:
            result = self.machine.run(asked.flavor, asked.record, RECORD_BYTES)
        except MachineDied as death:
            self.machine.start()
            raise RuntimeError(f"{death}; started again") from None
        outcome = observed(asked.record, result, asked.world, memory.touched)
        if isinstance(outcome, Translated):
            outcome.pa |= access.address & 7
        if self.machine.read(0, POOL_BYTES) != STAMPS:
            self.machine.start()
            raise RuntimeError("memory changed that is neither an entry of the walk nor its page")
        return outcome

    def departure(
        self, cpu: Cpu, memory: Memory, access: Access, expected: Outcome, outcome: Outcome
    ) -> str | None:
        """The name of this disagreement among the known departures, None if it is not one."""
        found = Disagreement(cpu, memory, access, expected, outcome, self.capabilities)
        return named(self.departures, found)
