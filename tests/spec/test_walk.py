"""Walks written by hand from the manual (SDM Vol. 3A, 4.5 to 4.8), and their outcomes.

The table at level n is the frame n000, so the PML4 is at 0x4000. By default every entry above the
one that a walk ends with is a table that the user may read, write and execute through.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from vapama.impl.optimized import Compiled, Optimized
from vapama.spec.access import Access
from vapama.spec.cpu import (
    AC,
    LA57,
    LMA,
    LME,
    NXE,
    PAE,
    PE,
    PG,
    PKE,
    PKS,
    RFLAGS_ONE,
    SMAP,
    SMEP,
    WP,
    Cpu,
)
from vapama.spec.memory import Sparse
from vapama.spec.outcomes import (
    PK,
    RSVD,
    I,
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
from vapama.spec.paging import translate
from vapama.spec.subject import agree

PRESENT, WRITABLE, USER, ACCESSED, DIRTY, PS, GLOBAL = 1, 2, 4, 0x20, 0x40, 0x80, 0x100
RW, URO, URW = PRESENT | WRITABLE, PRESENT | USER, PRESENT | USER | WRITABLE
XD = 1 << 63
LIMIT = 0x6000
ADDRESS = 3 << 39 | 7 << 30 | 11 << 21 | 13 << 12 | 0xABC
"""Entry 3 of the PML4, 7 of the PDPT, 11 of the page directory, 13 of the page table."""
WHERE = {5: 0x5000, 4: 0x4018, 3: 0x3038, 2: 0x2058, 1: 0x1068}
"""The entry that a walk for it uses at each level."""
PAGE, PAGE_2M, PAGE_1G = 0x9000, 0x12_3460_0000 | PS, 0x12_C000_0000 | PS

USER_READ, USER_WRITE, USER_FETCH = Access(0, user=1), Access(0, 1, user=1), Access(0, 0, 1, 1)
READ, WRITE, FETCH, IMPLICIT = Access(0), Access(0, 1), Access(0, 0, 1), Access(0, implicit=1)


def key(number: int) -> int:
    return number << 59


def disabled(number: int) -> int:
    return 1 << 2 * number


def write_disabled(number: int) -> int:
    return 2 << 2 * number


def cpu(
    cr4: int = 0,
    *,
    wp: int = 1,
    nxe: int = 1,
    ac: int = 0,
    cr3: int | None = None,
    pkru: int = 0,
    pkrs: int = 0,
    page1gb: int = 1,
    maxphyaddr: int = 40,
) -> Cpu:
    return Cpu(
        cr0=PG | PE | WP * wp,
        cr3=(0x5000 if cr4 & LA57 else 0x4000) if cr3 is None else cr3,
        cr4=PAE | cr4,
        efer=LME | LMA | NXE * nxe,
        rflags=RFLAGS_ONE | AC * ac,
        pkru=pkru,
        pkrs=pkrs,
        page1gb=page1gb,
        maxphyaddr=maxphyaddr,
    )


PLAIN = cpu()


def tables(entries: dict[int, int], limit: int = LIMIT) -> Sparse:
    """Memory with these entries on the walk for ADDRESS, by level; tables stand above them."""
    content = {WHERE[level]: (level - 1) << 12 | URW for level in range(5, min(entries), -1)}
    return Sparse(content | {WHERE[level]: entry for level, entry in entries.items()}, limit)


def used(levels: int, last: int) -> tuple[Update, ...]:
    """Accessed flags from the root down to the level `last`."""
    return tuple(Update(WHERE[level], ACCESSED) for level in range(levels, last - 1, -1))


def to(pa: int, level: int = 1, *, dirty: bool = False, levels: int = 4) -> Translated:
    leaf = Update(WHERE[level], ACCESSED | DIRTY * dirty)
    return Translated(pa, level, (*used(levels, level + 1), leaf))


def fault(code: int, last: int = 1, *, levels: int = 4, open_bits: int = 0) -> PageFault:
    """A fault of a walk that got through the entries down to the level `last`."""
    return PageFault(code, used(levels, last), open_bits)


class Walk(NamedTuple):
    claim: str
    expected: Outcome
    entries: dict[int, int]
    access: Access
    cpu: Cpu = PLAIN
    address: int = ADDRESS
    limit: int = LIMIT


PTE = {1: PAGE | URW}
TRANSLATIONS = [
    Walk("a 4-KByte page", to(0x9ABC), PTE, USER_READ),
    Walk("PAT of a PTE is bit 7", to(0x9ABC), {1: PAGE | PS | URW}, USER_READ),
    Walk("a 2-MByte page", to(0x12_3460_DABC, 2), {2: PAGE_2M | URW}, USER_READ),
    Walk("PAT of a PDE is bit 12", to(0x12_3460_DABC, 2), {2: PAGE_2M | 0x1000 | URW}, USER_READ),
    Walk("a 1-GByte page", to(0x12_C160_DABC, 3), {3: PAGE_1G | URW}, USER_READ),
    Walk("PAT of a PDPTE is bit 12", to(0x12_C160_DABC, 3), {3: PAGE_1G | 0x1000 | URW}, USER_READ),
    Walk("5 levels", to(0x9ABC, levels=5), PTE, USER_READ, cpu(LA57)),
    Walk("5 levels, a large page", to(0x12_3460_DABC, 2, levels=5), {2: PAGE_2M | URW}, READ,
         cpu(LA57)),
    Walk("the highest frame", to((1 << 40) - 0x1000 | 0xABC), {1: (1 << 40) - 0x1000 | URW}, READ),
    Walk("the highest frame there can be", to((1 << 52) - 0x1000 | 0xABC),
         {1: (1 << 52) - 0x1000 | URW}, READ, cpu(maxphyaddr=52)),
    Walk("CR3 holds a PCID", to(0x9ABC), PTE, USER_READ, cpu(cr3=0x4FFF)),
    Walk("PWT, PCD, G and the bits for software mean nothing", to(0x9ABC),
         {level: frame | 0x07F0_0000_0000_0F18 | URW
          for level, frame in ((4, 0x3000), (3, 0x2000), (2, 0x1000), (1, PAGE))}, USER_READ),
    Walk("keys are off", to(0x9ABC), {1: PAGE | key(15) | URW}, USER_READ,
         cpu(pkru=0xFFFF_FFFF, pkrs=0xFFFF_FFFF)),
]  # fmt: skip

FLAGS = [
    Walk("a read sets A", to(0x9ABC), PTE, USER_READ),
    Walk("a fetch sets A", to(0x9ABC), PTE, USER_FETCH),
    Walk("a write sets D in the PTE", to(0x9ABC, dirty=True), PTE, USER_WRITE),
    Walk("a write sets D in a PDE", to(0x12_3460_DABC, 2, dirty=True), {2: PAGE_2M | URW}, WRITE),
    Walk("a write sets D in a PDPTE", to(0x12_C160_DABC, 3, dirty=True), {3: PAGE_1G | URW}, WRITE),
    Walk("flags already set stay in the list", to(0x9ABC, dirty=True),
         {1: PAGE | ACCESSED | DIRTY | URW}, USER_WRITE),
    Walk("a denied write may set A and never D", fault(P | W | U), {1: PAGE | URO}, USER_WRITE),
    Walk("a fault at the PDPTE may set A in the PML4E alone", fault(U, 4), {3: 0}, USER_READ),
    Walk("a fault at the root sets nothing", fault(U, 5), {4: 0}, USER_READ),
]  # fmt: skip

CODES = [
    Walk("P=0 at the PML5E", fault(U, 6, levels=5), {5: 0}, USER_READ, cpu(LA57)),
    Walk("P=0 at the PML4E", fault(U, 5), {4: 0}, USER_READ),
    Walk("P=0 at the PDPTE", fault(U, 4), {3: 0}, USER_READ),
    Walk("P=0 at the PDE", fault(U, 3), {2: 0}, USER_READ),
    Walk("P=0 at the PTE", fault(U, 2), {1: 0}, USER_READ),
    Walk("a supervisor read", fault(0, 2), {1: 0}, READ),
    Walk("an implicit read", fault(0, 2), {1: 0}, IMPLICIT),
    Walk("a supervisor write", fault(W, 2), {1: 0}, WRITE),
    Walk("a user write", fault(U | W, 2), {1: 0}, USER_WRITE),
    Walk("a fetch with NXE", fault(I, 2), {1: 0}, FETCH),
    Walk("a fetch with SMEP alone", fault(I, 2), {1: 0}, FETCH, cpu(SMEP, nxe=0)),
    Walk("a fetch with neither", fault(U, 2), {1: 0}, USER_FETCH, cpu(nxe=0)),
    Walk("a fetch denied by the U/S of the page", fault(P | U | I), {1: PAGE | RW}, USER_FETCH),
    Walk("a fetch that meets a reserved bit", fault(P | RSVD | U | I, 2), {1: XD >> 12 | URW},
         USER_FETCH),
]  # fmt: skip


def reserved(
    claim: str, level: int, entry: int, control: Cpu = PLAIN, access: Access = USER_READ
) -> Walk:
    levels = control.levels
    code = P | RSVD | access.user * U | access.fetch * I
    return Walk(claim, fault(code, level + 1, levels=levels), {level: entry}, access, control)


RESERVED = [
    reserved("PS of a PML5E", 5, 0x1000 | PS | URW, cpu(LA57)),
    reserved("PS of a PML4E", 4, 0x1000 | PS | URW),
    reserved("PS of a PDPTE without 1-GByte pages", 3, PAGE_1G | URW, cpu(page1gb=0)),
    *(reserved(f"bit {n} of a PDE that maps a page", 2, PAGE_2M | URW | 1 << n)
      for n in range(13, 21)),
    *(reserved(f"bit {n} of a PDPTE that maps a page", 3, PAGE_1G | URW | 1 << n)
      for n in range(13, 30)),
    *(reserved(f"bit {n} of a PTE, MAXPHYADDR 40", 1, PAGE | URW | 1 << n) for n in (40, 51)),
    *(reserved(f"bit 46 at level {level}, MAXPHYADDR 46", level, page | URW | 1 << 46,
               cpu(LA57, maxphyaddr=46))
      for level, page in ((5, 0x4000), (4, 0x3000), (3, 0x2000), (2, 0x1000), (1, PAGE))),
    reserved("bit 32 of a large page, MAXPHYADDR 32", 2, PS | URW | 1 << 32, cpu(maxphyaddr=32)),
    *(reserved(f"XD without NXE at level {level}", level, page | URW | XD,
               cpu(LA57, nxe=0), access=READ)
      for level, page in ((5, 0x4000), (4, 0x3000), (3, 0x2000), (2, 0x1000), (1, PAGE))),
    reserved("XD of a large page without NXE", 2, PAGE_2M | URW | XD, cpu(nxe=0)),
    Walk("bit 51 with MAXPHYADDR 52 is of the frame", to(1 << 51 | 0x9ABC),
         {1: PAGE | URW | 1 << 51}, READ, cpu(maxphyaddr=52)),
    Walk("bits 20:13 of a PDE that references a table", to(0x9ABC),
         {2: 0x1000 | URW, 1: PAGE | URW}, READ),
    Walk("PS of a PDPTE with 1-GByte pages", to(0x12_C160_DABC, 3), {3: PAGE_1G | URW}, READ),
]  # fmt: skip


def with_flags(level: int, leave_out: int = 0, add: int = 0) -> dict[int, int]:
    """Five levels of full rights but for one entry."""
    frames = {5: 0x4000, 4: 0x3000, 3: 0x2000, 2: 0x1000, 1: PAGE}
    return {
        at: frame | (URW & ~leave_out | add if at == level else URW) for at, frame in frames.items()
    }


RIGHTS = [
    *(Walk(f"a user read needs U/S at level {n}", fault(P | U, levels=5), with_flags(n, USER),
           USER_READ, cpu(LA57)) for n in range(1, 6)),
    *(Walk(f"a user write needs R/W at level {n}", fault(P | U | W, levels=5),
           with_flags(n, WRITABLE), USER_WRITE, cpu(LA57)) for n in range(1, 6)),
    *(Walk(f"a user fetch needs XD=0 at level {n}", fault(P | U | I, levels=5),
           with_flags(n, add=XD), USER_FETCH, cpu(LA57)) for n in range(1, 6)),
    *(Walk(f"a supervisor fetch needs XD=0 at level {n}", fault(P | I, levels=5),
           with_flags(n, add=XD), FETCH, cpu(LA57)) for n in range(1, 6)),
    Walk("two XD deny as one does", fault(P | U | I), {2: 0x1000 | URW | XD, 1: PAGE | URW | XD},
         USER_FETCH),
    Walk("a read needs no R/W", to(0x9ABC), {1: PAGE | URO}, USER_READ),
    Walk("a read is not stopped by XD", to(0x9ABC), {1: PAGE | URW | XD}, USER_READ),
    Walk("a write is not stopped by XD", to(0x9ABC, dirty=True), {1: PAGE | URW | XD}, USER_WRITE),
    Walk("WP=1: a supervisor write needs R/W", fault(P | W), {1: PAGE | PRESENT}, WRITE),
    Walk("WP=1: a supervisor write needs R/W in the PML4E", fault(P | W),
         {4: 0x3000 | PRESENT, 1: PAGE | URW}, WRITE),
    Walk("WP=0: a supervisor write does not", to(0x9ABC, dirty=True), {1: PAGE | PRESENT}, WRITE,
         cpu(wp=0)),
    Walk("WP=0: a user write does", fault(P | W | U), {1: PAGE | URO}, USER_WRITE, cpu(wp=0)),
    Walk("SMEP off: the supervisor executes user pages", to(0x9ABC), PTE, FETCH),
    Walk("SMEP: the supervisor does not execute user pages", fault(P | I), PTE, FETCH, cpu(SMEP)),
    Walk("SMEP: it executes supervisor pages", to(0x9ABC), {1: PAGE | RW}, FETCH, cpu(SMEP)),
    Walk("SMEP: one supervisor entry makes a supervisor page", to(0x9ABC),
         {3: 0x2000 | RW, 1: PAGE | URW}, FETCH, cpu(SMEP)),
    Walk("SMEP: reads user pages", to(0x9ABC), PTE, READ, cpu(SMEP)),
    Walk("SMEP: the user executes user pages", to(0x9ABC), PTE, USER_FETCH, cpu(SMEP)),
    Walk("SMAP off: the supervisor reads user pages", to(0x9ABC), PTE, READ),
    Walk("SMAP off: so do implicit accesses", to(0x9ABC), PTE, IMPLICIT),
    Walk("SMAP: the supervisor does not read user pages", fault(P), PTE, READ, cpu(SMAP)),
    Walk("SMAP: nor write them", fault(P | W), PTE, WRITE, cpu(SMAP)),
    Walk("SMAP and AC: it reads them", to(0x9ABC), PTE, READ, cpu(SMAP, ac=1)),
    Walk("SMAP and AC: it writes them", to(0x9ABC, dirty=True), PTE, WRITE, cpu(SMAP, ac=1)),
    Walk("SMAP and AC: AC does not exempt implicit accesses", fault(P), PTE, IMPLICIT,
         cpu(SMAP, ac=1)),
    Walk("SMAP: it reads supervisor pages", to(0x9ABC), {1: PAGE | RW}, READ, cpu(SMAP)),
    Walk("SMAP: one supervisor entry makes a supervisor page", to(0x9ABC),
         {4: 0x3000 | RW, 1: PAGE | URW}, IMPLICIT, cpu(SMAP)),
    Walk("SMAP: it executes user pages", to(0x9ABC), PTE, FETCH, cpu(SMAP)),
    Walk("SMAP: the user reads user pages", to(0x9ABC), PTE, USER_READ, cpu(SMAP)),
]  # fmt: skip

KEYED, KEYED_SUPERVISOR = {1: PAGE | URW | key(5)}, {1: PAGE | RW | key(5)}
AD, WD = disabled(5), write_disabled(5)
KEYS = [
    Walk("AD denies a user read", fault(P | U | PK), KEYED, USER_READ, cpu(PKE, pkru=AD)),
    Walk("AD denies a supervisor read", fault(P | PK), KEYED, READ, cpu(PKE, pkru=AD)),
    Walk("AD denies it without WP too", fault(P | PK), KEYED, READ, cpu(PKE, pkru=AD, wp=0)),
    Walk("AD does not concern a fetch", to(0x9ABC), KEYED, USER_FETCH, cpu(PKE, pkru=AD | WD)),
    Walk("AD of another key", to(0x9ABC), KEYED, USER_READ, cpu(PKE, pkru=~AD & 0xFFFF_FFFF)),
    Walk("key 15 is at bits 31:30", fault(P | U | PK), {1: PAGE | URW | key(15)}, USER_READ,
         cpu(PKE, pkru=1 << 30)),
    Walk("key 0 is a key", fault(P | U | PK), PTE, USER_READ, cpu(PKE, pkru=1)),
    Walk("WD denies a user write", fault(P | W | U | PK), KEYED, USER_WRITE, cpu(PKE, pkru=WD)),
    Walk("WD denies it without WP too", fault(P | W | U | PK), KEYED, USER_WRITE,
         cpu(PKE, pkru=WD, wp=0)),
    Walk("WD denies a supervisor write with WP", fault(P | W | PK), KEYED, WRITE,
         cpu(PKE, pkru=WD)),
    Walk("WD does not deny it without WP", to(0x9ABC, dirty=True), KEYED, WRITE,
         cpu(PKE, pkru=WD, wp=0)),
    Walk("WD does not concern a read", to(0x9ABC), KEYED, USER_READ, cpu(PKE, pkru=WD)),
    Walk("PKRU does not govern supervisor pages", to(0x9ABC), KEYED_SUPERVISOR, READ,
         cpu(PKE | PKS, pkru=AD)),
    Walk("PKE=0: PKRU does not count", to(0x9ABC), KEYED, USER_READ, cpu(PKS, pkru=AD)),
    Walk("the key of a large page is its PDE's", fault(P | U | PK, 2),
         {2: PAGE_2M | URW | key(5)}, USER_READ, cpu(PKE, pkru=AD)),
    Walk("the key of a table does not count", to(0x9ABC),
         {2: 0x1000 | URW | key(5), 1: PAGE | URW}, USER_READ, cpu(PKE, pkru=AD)),
    Walk("PKRS: AD denies a supervisor read", fault(P | PK), KEYED_SUPERVISOR, READ,
         cpu(PKS, pkrs=AD)),
    Walk("PKRS: AD denies an implicit read", fault(P | PK), KEYED_SUPERVISOR, IMPLICIT,
         cpu(PKS, pkrs=AD)),
    Walk("PKRS: AD does not concern a fetch", to(0x9ABC), KEYED_SUPERVISOR, FETCH,
         cpu(PKS, pkrs=AD)),
    Walk("PKRS: WD denies a write with WP", fault(P | W | PK), KEYED_SUPERVISOR, WRITE,
         cpu(PKS, pkrs=WD)),
    Walk("PKRS: WD does not deny it without WP", to(0x9ABC, dirty=True), KEYED_SUPERVISOR, WRITE,
         cpu(PKS, pkrs=WD, wp=0)),
    Walk("PKRS does not govern user pages", to(0x9ABC), KEYED, READ, cpu(PKE | PKS, pkrs=AD | WD)),
    Walk("PKS=0: PKRS does not count", to(0x9ABC), KEYED_SUPERVISOR, READ, cpu(PKE, pkrs=AD)),
    Walk("a key and a right: PK is set besides", fault(P | W | U | PK),
         {1: PAGE | URO | key(5)}, USER_WRITE, cpu(PKE, pkru=WD)),
    Walk("a right that a key has nothing to do with", fault(P | W | U),
         {1: PAGE | URO | key(5)}, USER_WRITE, cpu(PKE, pkru=disabled(6))),
    Walk("a user at a supervisor page with a key: PK is left open", fault(P | U | PK, open_bits=PK),
         KEYED_SUPERVISOR, USER_READ, cpu(PKS, pkrs=AD)),
    Walk("a user at a supervisor page: PK is open only if the key denies", fault(P | U),
         KEYED_SUPERVISOR, USER_READ, cpu(PKS, pkrs=WD)),
]  # fmt: skip

ORDER = [
    Walk("not present below a denied right: P=0", fault(W | U, 2), {4: 0x3000 | PRESENT, 1: 0},
         USER_WRITE),
    Walk("not present below XD: P=0", fault(U | I, 3), {3: 0x2000 | URW | XD, 2: 0}, USER_FETCH),
    Walk("a reserved bit above beats not present below", fault(P | RSVD | U, 4),
         {3: 0x2000 | URW | 1 << 51, 1: 0}, USER_READ),
    Walk("not present above beats a reserved bit below", fault(U, 4),
         {3: 0x2000 | USER | WRITABLE, 1: PAGE | URW | 1 << 51}, USER_READ),
    Walk("an entry that is not present has no reserved bits", fault(U, 2), {1: ~1 & (1 << 64) - 1},
         USER_READ),
    Walk("a reserved bit below a denied right", fault(P | RSVD | U, 2),
         {4: 0x3000 | RW, 1: PAGE | URW | 1 << 51}, USER_READ),
    Walk("a reserved bit beats a denied right of the same entry", fault(P | RSVD | W | U, 2),
         {1: PAGE | PRESENT | 1 << 51}, USER_WRITE),
    Walk("a reserved bit beats a key", fault(P | RSVD | U, 2), {1: PAGE | URW | key(5) | 1 << 51},
         USER_READ, cpu(PKE, pkru=AD)),
    Walk("an address that is not canonical beats missing memory", NonCanonical(), PTE, READ,
         address=1 << 47, limit=0),
    Walk("memory that ends above beats not present below", OutsideMemory(0x7038, used(4, 4)),
         {4: 0x7000 | URW, 1: 0}, READ),
]  # fmt: skip

OUTSIDE = [
    Walk("no memory at all", OutsideMemory(0x4018), PTE, READ, limit=0),
    Walk("a root outside", OutsideMemory((1 << 40) - 0x1000 + 0x18), PTE, READ,
         cpu(cr3=(1 << 40) - 0x1000)),
    Walk("the root's last entry within", to(0x9ABC), PTE, READ, limit=0x4020),
    Walk("the root's first entry beyond", OutsideMemory(0x4018), PTE, READ, limit=0x4018),
    Walk("a page table outside", OutsideMemory(0x6068, used(4, 2)), {2: 0x6000 | URW}, READ),
    Walk("a page outside is no matter of the walk's", to(0xF_F000_0ABC), {1: 0xF_F000_0000 | URW},
         READ),
]  # fmt: skip

WALKS = [*TRANSLATIONS, *FLAGS, *CODES, *RESERVED, *RIGHTS, *KEYS, *ORDER, *OUTSIDE]


@pytest.fixture(scope="module")
def kernels() -> Sequence[Any]:
    return Optimized(), Compiled()


@pytest.mark.parametrize("walk", WALKS, ids=[walk.claim for walk in WALKS])
def test_the_walk_ends_as_the_manual_says(walk: Walk, kernels: Sequence[Any]) -> None:
    memory, access = tables(walk.entries, walk.limit), walk.access._replace(address=walk.address)
    assert translate(walk.cpu, memory, access) == walk.expected
    for subject in kernels:
        observed = subject.translate(walk.cpu, memory, access)
        assert agree(walk.expected, observed, memory, subject.capabilities), subject


@pytest.mark.parametrize(
    ("la57", "address", "canonical"),
    [
        (0, 0x0000_7FFF_FFFF_FFFF, True),
        (0, 0x0000_8000_0000_0000, False),
        (0, 0xFFFF_7FFF_FFFF_FFFF, False),
        (0, 0xFFFF_8000_0000_0000, True),
        (0, 0x8000_0000_0000_0000, False),
        (0, 0x0001_0000_0000_0000, False),
        (0, 0xFFFF_FFFF_FFFF_FFFF, True),
        (LA57, 0x0000_8000_0000_0000, True),
        (LA57, 0x00FF_FFFF_FFFF_FFFF, True),
        (LA57, 0x0100_0000_0000_0000, False),
        (LA57, 0xFEFF_FFFF_FFFF_FFFF, False),
        (LA57, 0xFF00_0000_0000_0000, True),
        (LA57, 0x7FFF_FFFF_FFFF_FFFF, False),
        (LA57, 0xFFFF_FFFF_FFFF_FFFF, True),
    ],
)  # fmt: skip
def test_canonical_addresses_end_at_bit_47_or_bit_56(
    la57: int, address: int, canonical: bool, kernels: Sequence[Any]
) -> None:
    memory, access = Sparse({}, LIMIT), Access(address)
    expected = PageFault(0) if canonical else NonCanonical()
    assert translate(cpu(la57), memory, access) == expected
    for subject in kernels:
        observed = subject.translate(cpu(la57), memory, access)
        assert agree(expected, observed, memory, subject.capabilities), subject


def test_every_index_of_an_address_has_its_own_nine_bits() -> None:
    address = 0xFFD4_B321_8765_4FFF
    indices = {5: 0x1D4, 4: 0x166, 3: 0x086, 2: 0x03B, 1: 0x054}
    entries = {
        level << 12 | index << 3: (level - 1) << 12 | URW for level, index in indices.items()
    }
    outcome = translate(cpu(LA57), Sparse(entries, LIMIT), Access(address))
    assert isinstance(outcome, Translated)
    assert [update.address for update in outcome.updates] == list(entries)
    assert outcome.pa == 0xFFF
