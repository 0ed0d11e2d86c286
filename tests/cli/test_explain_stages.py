"""Walks of second stages as `vapama explain` shows them."""

from pathlib import Path

import pytest

from vapama.case import make_case
from vapama.explain import explain_guest_physical
from vapama.replaying import explain_case
from vapama.spec.access import GuestPhysicalAccess
from vapama.spec.cpu import PAE, PSE
from vapama.spec.memory import Sparse
from vapama.spec.stage import EPT_CAPABILITIES, Ept, Npt, Stage

ENTRIES = {0x1000: 0x2407, 0x2000: 0x3007, 0x3000: 0x4007, 0x4008: 0x5333}


def told(stage: Stage, entries: dict[int, int], access: GuestPhysicalAccess) -> str:
    return "\n".join(explain_guest_physical(stage, Sparse(entries, 0x8000), access))


def test_an_ept_walk_is_told_level_by_level() -> None:
    assert told(Ept(0x105E, 40), ENTRIES, GuestPhysicalAccess(0x1234, write=1)).splitlines() == [
        "access   write at 0x1234; to the guest's paging supervisor, writable",
        "control  4-level EPT, MAXPHYADDR 40, accessed and dirty flags, execute-only entries, "
        "2-MByte pages, 1-GByte pages, advanced information",
        "EPTP     0x105e: the root table is at 0x1000",
        "PML4E[  0] at 0x1000 = 0x0000000000002407  R W X XU  -> table at 0x2000",
        "PDPTE[  0] at 0x2000 = 0x0000000000003007  R W X  -> table at 0x3000",
        "PDE  [  0] at 0x3000 = 0x0000000000004007  R W X  -> table at 0x4000",
        "PTE  [  1] at 0x4008 = 0x0000000000005333  R W A D"
        "  -> page of 4 KBytes at 0x5000, memory type 6",
        "outcome  translated to 0x5234, a page of 4 KBytes; sets A at 0x1000, A at 0x2000, "
        "A at 0x3000, A D at 0x4008",
    ]


@pytest.mark.parametrize(
    ("stage", "changed", "access", "shown"),
    [
        (Ept(0x101E, 40), {0x4008: 0}, GuestPhysicalAccess(0x1234),
         ["<- not present: stops here", "EPT violation at 0x1234, exit qualification 0x581"]),
        (Ept(0x101E, 40), {0x3000: 0x4002}, GuestPhysicalAccess(0x1234),
         ["rights that no entry may have", "EPT misconfiguration at 0x1234"]),
        (Ept(0x101E, 40), {0x3000: 0x400F}, GuestPhysicalAccess(0x1234), ["reserved bits 0x8 are"]),
        (Ept(0x101E, 40), {0x4008: 0x501F}, GuestPhysicalAccess(0x1234),
         ["memory type 3 does not exist"]),
        (Ept(0x101E, 40), {}, GuestPhysicalAccess(1 << 48), ["more than the 48 bits"]),
        (Ept(0x101E, 40), {}, GuestPhysicalAccess(0x1234, table=1), ["read of a guest's table"]),
        (Npt(0x1000, maxphyaddr=40), {0x1000: 0x2107}, GuestPhysicalAccess(0x1234),
         ["nested tables of a host in 4-level paging", "reserved bits 0x100 are",
          "EXITINFO1 0x10000000d (P U RSVD final)"]),
        (Npt(0x1000, cr4=PSE, efer=0, maxphyaddr=40), {0x1000: 0xC000E7 | 0x2000},
         GuestPhysicalAccess(0x1234, write=1),
         ["PDE  [  0] at 0x1000 = 0x00c020e7  P W U A D PS  -> page of 4 MBytes at 0x100c00000",
          "translated to 0x100c01234, a page of 4 MBytes; sets A D at 0x1000"]),
        (Npt(0x1000, cr4=PAE, efer=0, maxphyaddr=40), {0x1000: 0x2001},
         GuestPhysicalAccess(0x1234, table=1, linear=0),
         ["a guest's PDPTEs, loaded by MOV to CR", "host in PAE paging, MAXPHYADDR 40, no more"]),
    ],
)  # fmt: skip
def test_a_second_stage_s_walk_says_where_and_why_it_stops(
    stage: Stage, changed: dict[int, int], access: GuestPhysicalAccess, shown: list[str]
) -> None:
    text = told(stage, ENTRIES | changed, access)
    for part in shown:
        assert part in text


def test_a_case_of_a_second_stage_is_explained(tmp_path: Path) -> None:
    draws = [("ept.low", 0x1E), ("ept.root", 0x1000), ("ept.maxphyaddr", 40), ("gpa", 0x1834)]
    draws += [("host.limit", 0x8000), *((f"host[{a:#x}]", v) for a, v in ENTRIES.items())]
    draws += [("ept.capabilities", EPT_CAPABILITIES), ("gpa.access", 0x22)]
    case = make_case("the_ept_walk_equals_the_reference", "optimized", "random", "", draws)
    name = "mistake:ept-loses-a-bit-of-the-offset"
    lines = list(explain_case(case.save(tmp_path), name))
    assert "access   write at 0x1834; to the guest's paging supervisor, writable" in lines
    assert lines[-3] == (
        "subject  translated to 0x5034, a page of 4 KBytes   <- not what the reference allows"
    )
    assert lines[-1].startswith("the claim fails")
    assert "         optimized agrees" in list(explain_case(case.save(tmp_path), "optimized"))
