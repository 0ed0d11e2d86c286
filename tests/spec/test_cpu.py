"""Control states: what can exist is accepted, what cannot is refused by name."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapama.fuzz.decoded import ByteDraws, RandomDraws
from vapama.fuzz.exhaustive import Enumeration
from vapama.spec.cpu import (
    AC,
    CD,
    CR0_DEFINED,
    LA57,
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
    RFLAGS_ONE,
    SMAP,
    SMEP,
    WP,
    Cpu,
    ImpossibleState,
    UnsupportedMode,
    require_possible,
)
from vapama.spec.nondet import CPU_DRAWS
from vapama.spec.words import low_bits

PLAIN = {"cr0": PG | PE, "cr3": 0x1000, "cr4": PAE, "efer": LME | LMA}


def state(**registers: int) -> Cpu:
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
        {"cr4": PAE | 1 << 32},
    ],
    ids=str,
)
def test_a_possible_state_is_accepted(registers: dict[str, int]) -> None:
    for name, value in registers.items():
        assert getattr(state(**registers), name) == value


@pytest.mark.parametrize(
    ("registers", "rule"),
    [
        ({"cr0": PE, "cr4": PAE | LA57, "efer": LME}, "LA57.* needs long mode"),
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
        ({"rflags": RFLAGS_ONE | 1 << 17}, "RFLAGS .* 0x20000 are reserved"),
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
def test_a_state_that_cannot_exist_is_refused(registers: dict[str, int], rule: str) -> None:
    with pytest.raises(ImpossibleState, match=rule):
        state(**registers)


@pytest.mark.parametrize(
    ("registers", "what"),
    [
        ({"cr0": 0, "cr4": 0, "efer": 0}, "outside long mode"),
        ({"cr0": PG | PE, "cr4": 0, "efer": 0}, "outside long mode"),
        ({"cr0": PG | PE, "cr4": PAE, "efer": 0}, "outside long mode"),
        ({"cr4": PAE | 1 << 23}, "CR4.CET"),
        ({"cr4": PAE | 1 << 27}, "CR4.LASS"),
        ({"cr4": PAE | 1 << 28}, "CR4.LAM_SUP"),
        ({"efer": LME | LMA | 1 << 20}, "EFER.UAIE"),
    ],
    ids=["no paging", "32-bit paging", "PAE paging", "CET", "LASS", "LAM_SUP", "UAIE"],
)
def test_a_mode_that_is_not_specified_is_refused_as_such(
    registers: dict[str, int], what: str
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
        ("efer", NXE, "nxe"),
        ("rflags", AC, "ac"),
    ],
)
def test_a_control_bit_is_read_where_it_stands(register: str, bits: int, name: str) -> None:
    everything = {"cr0": CR0_DEFINED, "cr4": 0x1_037F_7FFF, "efer": 0x26_FD01, "rflags": 0x3D_7FD7}
    plain = PLAIN | {"rflags": RFLAGS_ONE}
    assert getattr(state(**{register: plain[register] | bits}), name) == 1
    assert getattr(state(**{register: everything[register] & ~bits}), name) == 0


def test_la57_decides_the_number_of_levels() -> None:
    assert state().levels == 4
    assert state(cr4=PAE | LA57).levels == 5


# WHAT THE ENGINES DRAW


def test_every_state_drawn_at_random_is_possible() -> None:
    nondet = RandomDraws(Random(1))
    states = [nondet.cpu() for _ in range(20_000)]
    for cpu in states:
        require_possible(cpu)
    assert {cpu.levels for cpu in states} == {4, 5}
    assert {cpu.maxphyaddr for cpu in states} == set(range(32, 53))


@given(st.binary(min_size=128, max_size=256))
def test_every_state_that_hypothesis_draws_is_possible(example: bytes) -> None:
    require_possible(ByteDraws(example).cpu())


def test_every_state_of_the_exhaustive_scope_is_possible() -> None:
    nondet, count = Enumeration(), 0
    while not count or nondet.advance():
        nondet.restart()
        require_possible(nondet.cpu())
        count += 1
    assert count == 12


@given(st.data())
def test_every_combination_of_corners_of_the_domains_is_possible(data: st.DataObject) -> None:
    maxphyaddr, cr0, cr3, *others = (
        data.draw(st.sampled_from(domain.among or (domain.fixed, domain.fixed | domain.free)))
        for _, domain in CPU_DRAWS
    )
    require_possible(Cpu._make((cr0, cr3 & low_bits(maxphyaddr), *others, maxphyaddr)))
