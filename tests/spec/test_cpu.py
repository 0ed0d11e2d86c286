"""Control states: what can exist is accepted, what cannot is refused by name."""

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapama.fuzz.decoded import ByteDraws, RandomDraws
from vapama.fuzz.exhaustive import Enumeration
from vapama.spec import modes, nondet
from vapama.spec.cpu import (
    AC,
    CD,
    CET,
    CR0_DEFINED,
    LA57,
    LAM_SUP,
    LAM_U48,
    LAM_U57,
    LMA,
    LME,
    NW,
    NXE,
    PAE,
    PCIDE,
    PE,
    PG,
    PKE,
    PKS,
    PSE,
    RFLAGS_ONE,
    SMAP,
    SMEP,
    VM,
    WP,
    Cpu,
    ImpossibleState,
    UnsupportedMode,
    require_possible,
)
from vapama.spec.nondet import CPU_DRAWS
from vapama.spec.words import low_bits

PLAIN: dict[str, Any] = {"cr0": PG | PE, "cr3": 0x1000, "cr4": PAE, "efer": LME | LMA}


def state(**registers: Any) -> Cpu:
    return Cpu(**PLAIN | registers)


@pytest.mark.parametrize(
    "registers",
    [
        {},
        {"cr0": PG | PE | WP, "efer": LME | LMA | NXE, "rflags": RFLAGS_ONE | AC},
        {"cr4": PAE | LA57 | PCIDE | SMEP | SMAP | PKE | PKS},
        {"cr0": CR0_DEFINED},
        {"cr0": PG | PE | CD},
        {"maxphyaddr": 32, "cr3": 0xFFFF_FFFF},
        {"maxphyaddr": 52, "cr3": (1 << 52) - 1},
        {"pkru": 0xFFFF_FFFF, "pkrs": 0xFFFF_FFFF},
        {"page1gb": 0},
        {"pse36": 0},
        {"cr4": PAE | 1 << 32},
        {"cr0": 0, "cr4": 0, "efer": 0},
        {"cr0": PE, "cr4": PAE | LA57, "efer": LME},
        {"cr0": PG | PE, "cr4": PSE, "efer": 0},
        {"cr0": PG | PE, "cr4": 0, "efer": 0, "rflags": RFLAGS_ONE | VM},
        {"cr0": PG | PE, "cr4": PAE, "efer": NXE},
        {
            "cr0": PG | PE,
            "cr4": PAE | LA57 | LAM_SUP,
            "efer": 0,
            "pdptes": (0x1001, 0, 0xFFFF_FFFF_FFFF_FFFE, 1),
        },
        {"cr0": PG | PE | WP, "cr4": PAE | CET},
        {"cr3": LAM_U57 | LAM_U48 | 0x1000, "cr4": PAE | LAM_SUP},
    ],
    ids=str,
)
def test_a_possible_state_is_accepted(registers: dict[str, Any]) -> None:
    for name, value in registers.items():
        assert getattr(state(**registers), name) == value


@pytest.mark.parametrize(
    ("registers", "rule"),
    [
        ({"cr0": PE, "cr4": PAE | PCIDE, "efer": 0}, "PCIDE needs long mode"),
        ({"efer": LMA}, "LMA is EFER.LME and CR0.PG"),
        ({"efer": LME}, "LMA is EFER.LME and CR0.PG"),
        ({"cr0": PE}, "LMA is EFER.LME and CR0.PG"),
        ({"cr4": 0}, "long mode needs CR4.PAE"),
        ({"cr0": PG}, "CR0.PG needs CR0.PE"),
        ({"cr0": PG | PE | NW}, "CR0.NW needs CR0.CD"),
        ({"cr0": PG | PE | 1 << 6}, "CR0 .* 0x40 are reserved"),
        ({"cr0": PG | PE | 1 << 32}, "CR0 .* 0x100000000 are reserved"),
        ({"cr4": PAE | 1 << 15}, "CR4 .* 0x8000 are reserved"),
        ({"cr4": PAE | 1 << 26}, "CR4 .* 0x4000000 are reserved"),
        ({"cr4": PAE | 1 << 63}, "CR4 .* are reserved"),
        ({"efer": LME | LMA | 1 << 9}, "EFER .* 0x200 are reserved"),
        ({"rflags": RFLAGS_ONE | VM}, "RFLAGS.VM needs legacy protected mode"),
        (
            {"cr0": 0, "cr4": 0, "efer": 0, "rflags": RFLAGS_ONE | VM},
            "RFLAGS.VM needs legacy protected mode",
        ),
        ({"cr4": PAE | CET}, "CR4.CET needs CR0.WP"),
        ({"cr0": PG | PE, "efer": 0, "pdptes": (1, 1, 1)}, "four PDPTE registers"),
        ({"cr0": PG | PE, "efer": 0, "pdptes": (3, 0, 0, 0)}, "PDPTE0 .* 0x2 are reserved"),
        ({"cr0": PG | PE, "efer": 0, "pdptes": (0, 0x21, 0, 0)}, "PDPTE1 .* 0x20 are reserved"),
        (
            {"cr0": PG | PE, "efer": 0, "pdptes": (0, 0, 0, 1 << 40 | 1), "maxphyaddr": 40},
            "PDPTE3 .* 0x10000000000 are reserved",
        ),
        ({"cr3": 1 << 63}, "CR3 .* are reserved"),
        ({"pse36": 2}, "pse36 .* reserved"),
        ({"rflags": RFLAGS_ONE | 1 << 3}, "RFLAGS .* 0x8 are reserved"),
        ({"rflags": 0}, "RFLAGS bit 1 is always 1"),
        ({"pkru": 1 << 32}, "PKRU .* 0x100000000 are reserved"),
        ({"pkrs": 1 << 32}, "IA32_PKRS .* 0x100000000 are reserved"),
        ({"cr3": 1 << 40, "maxphyaddr": 40}, "CR3 .* 0x10000000000 are reserved"),
        ({"maxphyaddr": 60}, "MAXPHYADDR is 32 to 52"),
        ({"maxphyaddr": 53}, "MAXPHYADDR is 32 to 52"),
        ({"maxphyaddr": 31}, "MAXPHYADDR is 32 to 52"),
        ({"page1gb": 2}, "page1gb .* reserved"),
        ({"cr0": -1}, "CR0 .* reserved"),
    ],
)
def test_a_state_that_cannot_exist_is_refused(registers: dict[str, Any], rule: str) -> None:
    with pytest.raises(ImpossibleState, match=rule):
        state(**registers)


@pytest.mark.parametrize(
    ("registers", "what"),
    [
        ({"cr4": PAE | 1 << 27}, "CR4.LASS"),
        ({"cr0": PG | PE, "cr4": 1 << 27, "efer": 0}, "CR4.LASS"),
        ({"efer": LME | LMA | 1 << 20}, "EFER.UAIE"),
    ],
    ids=["LASS", "LASS in 32-bit paging", "UAIE"],
)
def test_a_feature_that_is_not_specified_is_refused_as_such(
    registers: dict[str, Any], what: str
) -> None:
    with pytest.raises(UnsupportedMode, match=f"{what}.* is not specified here"):
        state(**registers)


@pytest.mark.parametrize(
    ("register", "bits", "name"),
    [
        ("cr0", WP, "wp"),
        ("cr4", SMEP, "smep"),
        ("cr4", SMAP, "smap"),
        ("cr4", PKE, "pke"),
        ("cr4", PKS, "pks"),
        ("cr4", CET, "cet"),
        ("efer", NXE, "nxe"),
        ("rflags", AC, "ac"),
    ],
)
def test_a_control_bit_is_read_where_it_stands(register: str, bits: int, name: str) -> None:
    everything = {"cr0": CR0_DEFINED, "cr4": 0x1_037F_7FFF, "efer": 0x26_FD01, "rflags": 0x3D_7FD7}
    plain = PLAIN | {"cr0": PG | PE | WP, "rflags": RFLAGS_ONE}
    assert getattr(Cpu(**plain | {register: plain[register] | bits}), name) == 1
    assert getattr(state(**{register: everything[register] & ~bits}), name) == 0


def test_la57_decides_the_number_of_levels() -> None:
    assert state().levels == 4
    assert state(cr4=PAE | LA57).levels == 5


@pytest.mark.parametrize(
    ("cr0", "cr4", "efer", "mode"),
    [
        (PE, PAE | LA57, LME, modes.OFF),
        (0, 0, 0, modes.OFF),
        (PG | PE, 0, 0, modes.TWO_LEVEL),
        (PG | PE, LA57, NXE, modes.TWO_LEVEL),
        (PG | PE, PSE, 0, modes.TWO_LEVEL_PSE),
        (PG | PE, PAE, 0, modes.PAE),
        (PG | PE, PAE | PSE | LA57, NXE, modes.PAE),
        (PG | PE, PAE | PSE, LME | LMA, modes.FOUR_LEVEL),
        (PG | PE, PAE | LA57, LME | LMA, modes.FIVE_LEVEL),
    ],
)
def test_cr0_cr4_and_efer_decide_the_paging_mode(
    cr0: int, cr4: int, efer: int, mode: modes.Mode
) -> None:
    cpu = Cpu(cr0, 0x1000, cr4, efer)
    assert cpu.mode is mode
    assert cpu.levels == len(mode.levels)


# WHAT THE ENGINES DRAW

MODES_OF = {
    "4-level and 5-level paging": {"4-level paging", "5-level paging"},
    "PAE paging": {"PAE paging"},
    "PAE paging, PDPTEs in memory": {"PAE paging"},
    "32-bit paging": {"32-bit paging", "32-bit paging with 4-MByte pages"},
    "no paging": {"no paging"},
}


def test_every_state_drawn_at_random_is_possible() -> None:
    draws = RandomDraws(Random(1))
    states = [draws.cpu() for _ in range(20_000)]
    for cpu in states:
        require_possible(cpu)
    assert {cpu.levels for cpu in states} == {4, 5}
    assert {cpu.maxphyaddr for cpu in states} == set(range(32, 53))


@pytest.mark.parametrize("states", nondet.EVERY_MODE, ids=str)
def test_every_state_of_a_kind_drawn_at_random_is_possible(states: nondet.ControlStates) -> None:
    draws, seen = RandomDraws(Random(2)), set[str]()
    for _ in range(3_000):
        cpu = draws.cpu(states)
        require_possible(cpu)
        seen.add(cpu.mode.name)
    assert seen == MODES_OF[states.name]


@pytest.mark.parametrize("states", nondet.EVERY_MODE, ids=str)
def test_every_state_of_a_kind_in_the_exhaustive_scope_is_possible(
    states: nondet.ControlStates,
) -> None:
    draws, seen = Enumeration(), set[str]()
    while not seen or draws.advance():
        draws.restart()
        cpu = draws.cpu(states)
        require_possible(cpu)
        seen.add(cpu.mode.name)
    assert seen == MODES_OF[states.name]


@given(st.binary(min_size=128, max_size=256))
def test_every_state_that_hypothesis_draws_is_possible(example: bytes) -> None:
    require_possible(ByteDraws(example).cpu())


def test_every_state_of_the_exhaustive_scope_is_possible() -> None:
    draws, count = Enumeration(), 0
    while not count or draws.advance():
        draws.restart()
        require_possible(draws.cpu())
        count += 1
    assert count == 12


@given(st.data())
def test_every_combination_of_corners_of_the_domains_is_possible(data: st.DataObject) -> None:
    maxphyaddr, cr0, cr3, *others = (
        data.draw(st.sampled_from(domain.among or (domain.fixed, domain.fixed | domain.free)))
        for _, domain in CPU_DRAWS
    )
    require_possible(Cpu._make((cr0, cr3 & low_bits(maxphyaddr), *others, maxphyaddr, 1, None)))
