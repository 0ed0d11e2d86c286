"""Unicorn as a subject: cases written by hand, its known departures, and a bounded random run."""

import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from random import Random

import pytest

from vapama.fuzz.decoded import RandomDraws
from vapama.oracles import unicorn as oracle
from vapama.oracles.unicorn import DEPARTURES, NARROW, RAM_BYTES, Unicorn
from vapama.runs import preloaded
from vapama.spec import domains, nondet
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
    PSE,
    RFLAGS_ONE,
    SMAP,
    SMEP,
    WP,
    Cpu,
)
from vapama.spec.memory import Memory, Sparse
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
    kind,
)
from vapama.spec.paging import translate
from vapama.spec.subject import NotCovered, agree

pytest.importorskip("unicorn", reason="unicorn is not installed: pip install 'vapama[unicorn]'")

ADDRESS = 0x1234_5678_9ABC
ACCESSED, DIRTY = 0x20, 0x40
RO, RW, USER_RO, USER_RW, LARGE = 0x1, 0x3, 0x5, 0x7, 0x80
XD = 1 << 63
KEY_1 = 1 << 59
READ, WRITE, FETCH = (0, 0), (1, 0), (0, 1)
SUPERVISOR, USER = 0, 1


@pytest.fixture(scope="module")
def unicorn() -> Unicorn:
    return Unicorn()


def cpu(
    cr4: int = 0, cr0: int = WP, efer: int = NXE, rflags: int = 0, pkru: int = 0, cr3: int = 0x1000
) -> Cpu:
    """A control state in long mode with these bits set besides those that it needs."""
    return Cpu(
        cr0=cr0 | PG | PE,
        cr3=cr3,
        cr4=cr4 | PAE,
        efer=efer | LME | LMA,
        rflags=rflags | RFLAGS_ONE,
        pkru=pkru,
        maxphyaddr=40,
    )


def tables(
    leaf: int, level: int = 1, address: int = ADDRESS, levels: int = 4, upper: int = USER_RW
) -> Sparse:
    """Tables in the frames from 0x1000 up in which `leaf` is the entry for `address` at `level`."""
    entries = {}
    for step, at in enumerate(range(levels, level - 1, -1)):
        table = 0x1000 * (step + 1)
        index = address >> (12 + 9 * (at - 1)) & 0x1FF
        entries[table | index << 3] = leaf if at == level else table + 0x1000 | upper
    return Sparse(entries, RAM_BYTES)


def access(what: tuple[int, int], user: int = USER, address: int = ADDRESS) -> Access:
    return Access(address, *what, user)


# TRANSLATED


@pytest.mark.parametrize("user", [SUPERVISOR, USER])
@pytest.mark.parametrize("what", [READ, WRITE, FETCH])
@pytest.mark.parametrize(
    ("leaf", "level", "pa"),
    [
        (0x8000, 1, 0x8ABC),
        (0xFF_FFFF_F000, 1, 0xFF_FFFF_FABC),
        (0xAB_CDE0_0000 | LARGE, 2, 0xAB_CDF8_9ABC),
        (0xAB_CDE0_1000 | LARGE, 2, 0xAB_CDF8_9ABC),
        (0x00_0000_0000 | LARGE, 3, 0x1678_9ABC),
        (0xC0_0000_1000 | LARGE, 3, 0xC0_1678_9ABC),
    ],
    ids=["4K", "4K beyond RAM", "2M", "2M with PAT", "1G", "1G with PAT"],
)
def test_a_page_translates_to_its_physical_address(
    unicorn: Unicorn, leaf: int, level: int, pa: int, what: tuple[int, int], user: int
) -> None:
    memory = tables(leaf | USER_RW, level)
    outcome = unicorn.translate(cpu(), memory, access(what, user))
    assert isinstance(outcome, Translated)
    assert hex(outcome.pa) == hex(pa)
    dirty = DIRTY * what[0]
    *upper, last = memory.touched
    assert outcome.updates == (
        *(Update(a, ACCESSED) for a in upper),
        Update(last, ACCESSED | dirty),
    )


@pytest.mark.parametrize("user", [SUPERVISOR, USER])
@pytest.mark.parametrize("what", [READ, WRITE, FETCH])
@pytest.mark.parametrize("address", [0x00AB_1234_5678_9ABC, 0xFF00_0000_0000_0ABC])
def test_five_levels_translate_57_bits(
    unicorn: Unicorn, address: int, what: tuple[int, int], user: int
) -> None:
    memory = tables(0x8000 | USER_RW, address=address, levels=5)
    outcome = unicorn.translate(cpu(LA57), memory, access(what, user, address))
    assert isinstance(outcome, Translated)
    assert hex(outcome.pa) == hex(0x8ABC)
    assert len(outcome.updates) == 5


def test_the_load_reads_the_byte_at_the_reported_address(unicorn: Unicorn) -> None:
    memory = tables(0x8000 | USER_RW)
    memory.touched[0x8AB8] = 0x8877_6655_4433_2211
    outcome = unicorn.translate(cpu(), memory, access(READ))
    assert isinstance(outcome, Translated)
    assert outcome.pa == 0x8ABC
    assert unicorn._uc.reg_read(unicorn._x86.UC_X86_REG_AL) == 0x55


def test_the_store_writes_the_byte_at_the_reported_address(
    unicorn: Unicorn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unicorn, "_undo_store", lambda access: None)
    # wrpkru leaves in AL what the store then writes.
    outcome = unicorn.translate(cpu(PKE, pkru=0x54), tables(0x8000 | USER_RW), access(WRITE))
    assert isinstance(outcome, Translated)
    assert outcome.pa == 0x8ABC
    assert outcome.updates[-1] == Update(0x8AB8, 0x54 << 32)


def test_a_store_to_an_entry_of_its_own_walk_shows_only_the_flags(unicorn: Unicorn) -> None:
    memory = tables(0x4000 | USER_RW)
    pte = list(memory.touched)[-1]
    there = ADDRESS & ~0xFFF | pte & 0xFFF
    outcome = unicorn.translate(cpu(PKE, pkru=0x54), memory, access(WRITE, USER, there))
    assert isinstance(outcome, Translated)
    assert outcome.pa == pte
    assert outcome.updates[-1] == Update(pte, ACCESSED | DIRTY)


@pytest.mark.parametrize("cr4", [0, LA57], ids=["4 levels", "5 levels"])
def test_a_table_that_is_its_own_at_every_level_is_marked_once(unicorn: Unicorn, cr4: int) -> None:
    # The entry is where the stub would otherwise be entered.
    memory = Sparse({0x1FF8: 0x1000 | USER_RW}, RAM_BYTES)
    outcome = unicorn.translate(cpu(cr4), memory, access(WRITE, USER, 0xFFFF_FFFF_FFFF_FABC))
    assert outcome == Translated(0x1ABC, 0, (Update(0x1FF8, ACCESSED | DIRTY),))


def test_flags_that_are_set_already_are_no_effect(unicorn: Unicorn) -> None:
    memory = tables(0x8000 | USER_RW | ACCESSED | DIRTY, upper=USER_RW | ACCESSED)
    assert unicorn.translate(cpu(), memory, access(WRITE)) == Translated(0x8ABC, 0, ())


# FAULTS


@pytest.mark.parametrize(
    ("state", "leaf", "what", "user", "code"),
    [
        pytest.param(cpu(), 0, READ, SUPERVISOR, 0, id="not present, supervisor read"),
        pytest.param(cpu(), 0, WRITE, USER, U | W, id="not present, user write"),
        pytest.param(cpu(), 0, FETCH, USER, U | I, id="not present, fetch with NXE"),
        pytest.param(cpu(efer=0), 0, FETCH, USER, U, id="not present, fetch without NXE"),
        pytest.param(cpu(SMEP, efer=0), 0, FETCH, USER, U | I, id="not present, fetch with SMEP"),
        pytest.param(cpu(), USER_RO, WRITE, USER, P | U | W, id="write to read-only, user"),
        pytest.param(cpu(), USER_RO, WRITE, SUPERVISOR, P | W, id="write to read-only, WP=1"),
        pytest.param(cpu(cr0=0), USER_RO, WRITE, SUPERVISOR, None, id="write to read-only, WP=0"),
        pytest.param(cpu(), RW, READ, USER, P | U, id="user to supervisor page"),
        pytest.param(cpu(), RW, READ, SUPERVISOR, None, id="supervisor to supervisor page"),
        pytest.param(cpu(), USER_RW | XD, FETCH, USER, P | U | I, id="XD, fetch"),
        pytest.param(cpu(), USER_RW | XD, READ, USER, None, id="XD, read"),
        pytest.param(cpu(efer=0), USER_RW | XD, READ, USER, P | U | RSVD, id="XD without NXE"),
        pytest.param(cpu(SMEP), USER_RW, FETCH, SUPERVISOR, P | I, id="SMEP"),
        pytest.param(cpu(SMEP), RW, FETCH, SUPERVISOR, None, id="SMEP, supervisor page"),
        pytest.param(cpu(SMAP), USER_RW, READ, SUPERVISOR, P, id="SMAP, AC=0"),
        pytest.param(cpu(SMAP), USER_RW, WRITE, SUPERVISOR, P | W, id="SMAP, AC=0, write"),
        pytest.param(cpu(SMAP, rflags=AC), USER_RW, READ, SUPERVISOR, None, id="SMAP, AC=1"),
        pytest.param(cpu(SMAP), USER_RW, FETCH, SUPERVISOR, None, id="SMAP, fetch"),
        pytest.param(
            cpu(PKE, pkru=0b0100), USER_RW | KEY_1, READ, USER, P | U | PK, id="PKU AD, read"
        ),
        pytest.param(cpu(PKE, pkru=0b0100), USER_RW | KEY_1, FETCH, USER, None, id="PKU AD, fetch"),
        pytest.param(
            cpu(PKE, pkru=0b0100), RW | KEY_1, READ, SUPERVISOR, None, id="PKU AD, S page"
        ),
        pytest.param(cpu(PKE, pkru=0b1000), USER_RW | KEY_1, READ, USER, None, id="PKU WD, read"),
        pytest.param(
            cpu(PKE, pkru=0b1000), USER_RW | KEY_1, WRITE, USER, P | U | W | PK, id="PKU WD, write"
        ),
        pytest.param(
            cpu(PKE, pkru=0b1000), USER_RW | KEY_1, WRITE, SUPERVISOR, P | W | PK, id="PKU WD, WP=1"
        ),
        pytest.param(
            cpu(PKE, cr0=0, pkru=0b1000),
            USER_RW | KEY_1,
            WRITE,
            SUPERVISOR,
            None,
            id="PKU WD, WP=0",
        ),
        pytest.param(cpu(pkru=0b0100), USER_RW | KEY_1, READ, USER, None, id="PKU AD, PKE=0"),
        pytest.param(
            cpu(), USER_RW | 1 << 40, READ, USER, P | U | RSVD, id="reserved bit, user read"
        ),
        pytest.param(
            cpu(), USER_RW | 1 << 51, WRITE, SUPERVISOR, P | W | RSVD, id="reserved bit, write"
        ),
    ],
)
def test_a_page_is_reached_or_faults_with_its_code(
    unicorn: Unicorn, state: Cpu, leaf: int, what: tuple[int, int], user: int, code: int | None
) -> None:
    outcome = unicorn.translate(state, tables(leaf | 0x8000), access(what, user))
    if code is None:
        assert isinstance(outcome, Translated)
        assert outcome.pa == 0x8ABC
    else:
        assert isinstance(outcome, PageFault)
        assert bin(outcome.error_code) == bin(code)


@pytest.mark.parametrize(
    ("entry", "level"),
    [(USER_RW | LARGE | 0x2000, 2), (USER_RW | LARGE | 0x2000, 3), (USER_RW | LARGE, 4)],
)
def test_reserved_bits_of_upper_entries_fault(unicorn: Unicorn, entry: int, level: int) -> None:
    outcome = unicorn.translate(cpu(), tables(entry, level), access(READ))
    assert isinstance(outcome, PageFault)
    assert outcome.error_code == P | U | RSVD


def test_ps_in_a_pml5e_is_reserved(unicorn: Unicorn) -> None:
    memory = tables(USER_RW | LARGE, level=5, levels=5)
    outcome = unicorn.translate(cpu(LA57), memory, access(READ))
    assert isinstance(outcome, PageFault)
    assert outcome.error_code == P | U | RSVD


def test_a_fault_sets_no_dirty_flag_and_is_not_kept(unicorn: Unicorn) -> None:
    denied, allowed = tables(0x8000 | USER_RO), tables(0x8000 | USER_RW)
    for _ in range(3):
        fault = unicorn.translate(cpu(), denied, access(WRITE))
        assert isinstance(fault, PageFault)
        assert fault.error_code == P | U | W
        assert not any(bits & DIRTY for _, bits in fault.may_update)
        assert isinstance(unicorn.translate(cpu(), allowed, access(WRITE)), Translated)
        assert unicorn._memory[:] == bytes(RAM_BYTES)


@pytest.mark.parametrize("user", [SUPERVISOR, USER])
@pytest.mark.parametrize("what", [READ, WRITE, FETCH])
@pytest.mark.parametrize(
    ("address", "cr4"),
    [(1 << 47, 0), (0xFFFF_7FFF_FFFF_FFFF, 0), (1 << 56, LA57), (0xFEFF_FFFF_FFFF_FFFF, LA57)],
)
def test_an_address_that_is_not_canonical_is_refused(
    unicorn: Unicorn, address: int, cr4: int, what: tuple[int, int], user: int
) -> None:
    outcome = unicorn.translate(cpu(cr4), Sparse({}, RAM_BYTES), access(what, user, address))
    assert outcome == NonCanonical()


# DEPARTURES

RESERVED_1G = cpu(), tables(USER_RW | LARGE | 0x2000, level=3), access(READ)
OUTSIDE = cpu(), tables(USER_RW | RAM_BYTES, level=2), access(FETCH)
LOW_PDPTE = Cpu(PG | PE, 0x1020, PAE, 0, maxphyaddr=40), Sparse({0x1020: 0x2003}, RAM_BYTES)
KNOWN = {
    "low-reserved-bits-of-a-pdpte-are-ignored": (*LOW_PDPTE, Access(0x1234)),
    "reserved-1-gbyte-page-is-marked-accessed": RESERVED_1G,
    "table-outside-memory-reads-0": OUTSIDE,
}


def classified(
    unicorn: Unicorn, case: tuple[Cpu, Memory, Access], observed: Outcome | None = None
) -> str | None:
    """What is said of a disagreement; "agrees" if there is none."""
    state, memory, what = case
    expected = translate(*case)
    if observed is None:
        observed = unicorn.translate(state, preloaded(*case), what)
    if agree(expected, observed, memory, unicorn.capabilities):
        return "agrees"
    return unicorn.departure(state, memory, what, expected, observed)


@pytest.mark.parametrize("name", DEPARTURES)
def test_a_known_departure_is_still_there(unicorn: Unicorn, name: str) -> None:
    assert classified(unicorn, KNOWN[name]) == name


@pytest.mark.parametrize("name", DEPARTURES)
def test_a_known_departure_excuses_nothing_else(unicorn: Unicorn, name: str) -> None:
    state, memory, what = case = KNOWN[name]
    observed = unicorn.translate(state, preloaded(*case), what)
    assert isinstance(observed, PageFault)
    for bit in range(6):
        wrong = replace(observed, error_code=observed.error_code ^ 1 << bit)
        assert classified(unicorn, case, wrong) is None
    for bits in (DIRTY, ACCESSED | DIRTY, 1 << 9):
        for address in (*memory.touched, 0x7FF8):
            more = replace(observed, may_update=(*observed.may_update, Update(address, bits)))
            assert classified(unicorn, case, more) is None
    for other in (Translated(0x8ABC, 1, ()), NonCanonical()):
        assert classified(unicorn, case, other) is None


def test_no_mistake_in_other_cases_is_excused(unicorn: Unicorn) -> None:
    case = cpu(), tables(0x8000 | USER_RO), access(WRITE)
    good = unicorn.translate(*case)
    assert isinstance(good, PageFault)
    assert classified(unicorn, case, good) == "agrees"
    assert classified(unicorn, case, replace(good, error_code=W)) is None
    assert classified(unicorn, case, Translated(0x8ABC, 1, ())) is None
    translated = cpu(), tables(0x8000 | USER_RW), access(WRITE)
    assert classified(unicorn, translated, PageFault(0)) is None
    assert classified(unicorn, translated, OutsideMemory(RAM_BYTES)) is None


# WHAT CAN BE ASKED


@pytest.mark.parametrize(
    ("state", "memory", "what"),
    [
        (cpu()._replace(maxphyaddr=39), tables(0), access(READ)),
        (cpu()._replace(page1gb=0), tables(0), access(READ)),
        (cpu(PKS), tables(0), access(READ)),
        (cpu(rflags=oracle.TF), tables(0), access(READ)),
        (cpu(cr3=RAM_BYTES), Sparse({}, 2 * RAM_BYTES), access(READ)),
        (cpu(), tables(0), Access(ADDRESS, implicit=1)),
        (cpu(), Sparse({}, RAM_BYTES // 2), access(READ)),
        (cpu(), Sparse({RAM_BYTES: 0}, 2 * RAM_BYTES), access(READ)),
        (cpu(), tables(oracle.STUB | USER_RW), access(READ)),
        (cpu(), tables(oracle.STUB & ~0x3FFF_FFFF | LARGE | USER_RW, 3), access(READ)),
        (cpu(), Sparse(dict.fromkeys(range(0x1000, 0x2000, 8), 0), RAM_BYTES), access(READ)),
    ],
    ids=[
        "MAXPHYADDR 39",
        "no 1-GByte pages",
        "PKS",
        "TF",
        "root outside RAM",
        "implicit access",
        "less memory than RAM",
        "table outside RAM",
        "page of the stub",
        "page around the stub",
        "no root entry left",
    ],
)
def test_what_cannot_be_asked_is_not_covered(
    unicorn: Unicorn, state: Cpu, memory: Sparse, what: Access
) -> None:
    with pytest.raises(NotCovered):
        unicorn.translate(state, memory, what)
    assert unicorn._memory[:] == bytes(RAM_BYTES)


@pytest.mark.parametrize("name", NARROW)
def test_narrowed_draws_stay_within_the_original_domain(name: str) -> None:
    original = {
        "maxphyaddr": domains.MAXPHYADDR,
        "page1gb": domains.FLAG,
        "pse36": domains.PSE36,
        "guest.limit": domains.LIMIT,
        "cr3": domains.CR3,
        "cr4": domains.CR4,
        "rflags": domains.RFLAGS,
        "access": domains.ACCESS,
    }[name]
    narrow, bits = NARROW[name], Random(1).getrandbits
    values = {narrow.decode(partial(bits, 64)) for _ in range(5000)}
    assert all(narrow.holds(value) and original.holds(value) for value in values)
    assert all(narrow.holds(value) for value in narrow.representatives())
    assert narrow.bias in (original.bias, None)


def test_the_cpu_takes_the_bits_that_matter(unicorn: Unicorn) -> None:
    state = cpu(LA57 | SMEP | SMAP | PKE, cr0=WP, efer=NXE, rflags=AC)
    unicorn.translate(state, Sparse({}, RAM_BYTES), access(READ))
    read, x86 = unicorn._uc.reg_read, unicorn._x86
    assert read(x86.UC_X86_REG_CR4) & state.cr4 == state.cr4
    assert read(x86.UC_X86_REG_CR0) & state.cr0 == state.cr0
    assert read(x86.UC_X86_REG_MSR, oracle.IA32_EFER) & state.efer == state.efer


def test_a_missing_library_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unicorn", None)
    with pytest.raises(ImportError):
        Unicorn()


# RANDOM CASES


KINDS = {"translated", "page fault", "table-outside-memory-reads-0"}
SEEN = {
    nondet.LONG_MODE: {
        *KINDS,
        "non-canonical address",
        "reserved-1-gbyte-page-is-marked-accessed",
    },
    nondet.PAGING_32: KINDS,
    nondet.PAE_PAGING: KINDS,
    nondet.PAE_IN_MEMORY: {*KINDS, "low-reserved-bits-of-a-pdpte-are-ignored"},
}


@pytest.mark.parametrize("states", SEEN, ids=str)
def test_random_cases_agree_or_depart_as_known(
    unicorn: Unicorn, states: nondet.ControlStates
) -> None:
    draws, seen = RandomDraws(Random(2024), NARROW), Counter[str]()
    for _ in range(3000):
        draws.trail.clear()
        case = draws.walk(states)
        expected = translate(*case)
        try:
            observed = unicorn.translate(case[0], preloaded(*case), case[2])
        except NotCovered:
            seen["not covered"] += 1
            continue
        name = classified(unicorn, case, observed)
        assert name is not None, (draws.draws(), expected, observed)
        seen.update((name, kind(expected)))
    assert set(seen) >= SEEN[states]
    assert seen["not covered"] < 30


# 32-BIT AND PAE PAGING

TWO_LEVELS = Sparse({0x1000: (0x2000 | USER_RW) << 32, 0x2010: (0x8000 | USER_RW) << 32}, RAM_BYTES)
"""The PDE 1 and the PTE 5 of 32-bit paging, each the second of its pair."""
VA_32 = 0x0040_5ABC


def legacy(cr4: int = 0, pdptes: tuple[int, ...] | None = None, efer: int = 0) -> Cpu:
    return Cpu(PG | PE | WP, 0x1000, cr4, efer, maxphyaddr=40, pdptes=pdptes)


@pytest.mark.parametrize("user", [SUPERVISOR, USER])
def test_flags_of_the_second_of_a_pair_are_found_in_its_upper_half(
    unicorn: Unicorn, user: int
) -> None:
    outcome = unicorn.translate(legacy(), TWO_LEVELS, access(WRITE, user, VA_32))
    flags = Update(0x1000, ACCESSED << 32), Update(0x2010, (ACCESSED | DIRTY) << 32)
    assert outcome == Translated(0x8ABC, 0, flags)


@pytest.mark.parametrize(
    ("pde", "pa"),
    [
        (0x0040_0000, 0x0040_5ABC),
        (0x00C0_2000, 0x1_00C0_5ABC),
        (0x0011_E000, 0x8F_0000_5ABC),
    ],
)
def test_a_4_mbyte_page_lies_where_pse_36_says(unicorn: Unicorn, pde: int, pa: int) -> None:
    memory = Sparse({0x1000: (pde | LARGE | USER_RW) << 32}, RAM_BYTES)
    outcome = unicorn.translate(legacy(PSE), memory, access(READ, USER, VA_32))
    assert outcome == Translated(pa, 0, (Update(0x1000, ACCESSED << 32),))


def test_pdptes_come_from_the_registers(unicorn: Unicorn) -> None:
    memory = Sparse({0x3000: 0x4000 | USER_RW, 0x4008: 0x8000 | USER_RW}, RAM_BYTES)
    state = legacy(PAE, (0, 0, 0x3001, 0))
    there, missing = access(READ, USER, 0x8000_1ABC), access(READ, USER, 0x4000_1ABC)
    flags = Update(0x3000, ACCESSED), Update(0x4008, ACCESSED)
    assert unicorn.translate(state, memory, there) == Translated(0x8ABC, 0, flags)
    assert unicorn.translate(state, Sparse({}, RAM_BYTES), missing) == PageFault(U)
    # And the other mode again, from the same object.
    again = unicorn.translate(legacy(), TWO_LEVELS, access(READ, USER, VA_32))
    assert isinstance(again, Translated)
    assert isinstance(unicorn.translate(cpu(), tables(0x8000 | USER_RW), access(READ)), Translated)
