"""`vapama snapshot audit`: sound tables have no findings, and every seeded fault is found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vapama.snapshot.findings import RULES

Vapama = Callable[..., Any]
XD, PS, RWX, WB = 1 << 63, 1 << 7, 7, 6 << 3
LEAF = RWX | WB
Entries = dict[int, int]


def write(path: Path, entries: Entries, count: int = 64) -> None:
    """An image of so many pages with these entries, by physical address."""
    image = np.zeros(count * 512, dtype="<u8")
    for address, entry in entries.items():
        image[address >> 3] = entry
    path.write_bytes(image.tobytes())


def audited(vapama: Vapama, *options: object) -> tuple[int, dict[str, Any]]:
    result = vapama("snapshot", "audit", *options, "--json")
    assert result.status in (0, 1, 3), result.err
    return result.status, json.loads(result.out)


# SECOND STAGES: guest-physical 0 to 0x7fff at 0x10000, and 2 MBytes at 0x200000.

EPT = {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007, 0x3008: 0x40_0000 | PS | LEAF}
EPT |= {0x4000 + 8 * i: 0x10000 + 0x1000 * i | LEAF for i in range(8)}
SLOTS: list[dict[str, Any]] = [
    {"gpa": 0, "bytes": "0x8000", "hpa": "0x10000"},
    {"gpa": "0x200000", "bytes": 0x200000, "hpa": 0x400000, "hva": "0x7f0000000000"},
]
EPTP = ("--eptp", "0x101e")


def slots_with(number: int, **changes: Any) -> list[dict[str, Any]]:
    return [slot | changes if k == number else slot for k, slot in enumerate(SLOTS)]


def without_hpa(**changes: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in slot.items() if k != "hpa"} | changes for slot in SLOTS]


GENERATION = ("--device", "0x6/0x7", "--generation", "0/0xfff0000000000000")
SECOND_STAGE: list[tuple[str, Entries, list[dict[str, Any]], tuple[str, ...], int]] = [
    # rule, entries, slots, options, the offending entry
    ("reserved-bits", {0x4008: 1 << 51 | LEAF}, SLOTS, ("--host-maxphyaddr", "46"), 0x4008),
    ("reserved-bits", {0x3000: 0x4007 | 1 << 3}, SLOTS, (), 0x3000),
    ("unaligned-large-page", {0x3008: 0x40_1000 | PS | LEAF}, SLOTS, (), 0x3008),
    ("misconfigured-entry", {0x4008: 0x11000 | 2 | WB}, SLOTS, (), 0x4008),
    ("misconfigured-entry", {0x4008: 0x11000 | 7 | 3 << 3}, SLOTS, (), 0x4008),
    ("misconfigured-entry", {0x3000: 0x4006}, SLOTS, (), 0x3000),
    ("absent-table", {0x3010: 0x800_0007}, SLOTS, (), 0x3010),
    ("cycle", {0x2008: 0x1007}, SLOTS, (), 0x2008),
    ("cycle", {0x3FF8: 0x3007}, SLOTS, (), 0x3FF8),
    ("two-levels", {0x1008: 0x4007}, SLOTS, (), 0x3000),
    ("shared-table", {0x3010: 0x4007}, SLOTS, (), 0x3000),
    ("dirty-and-not-accessed", {0x4008: 0x11000 | LEAF | 0x200}, SLOTS, ("ad",), 0x4008),
    ("table-reachable", {0x4008: 0x4000 | LEAF}, without_hpa(), (), 0x4008),
    ("no-slot", {0x4040: 0x18000 | LEAF}, SLOTS, (), 0x4040),
    ("no-slot", {0x3018: 0x80_0000 | PS | LEAF}, SLOTS, (), 0x3018),
    ("crosses-a-slot", {}, slots_with(1, bytes=0x1FF000), (), 0x3008),
    ("misplaced-large-page", {}, slots_with(1, hva="0x7f0000001000"), (), 0x3008),
    ("wrong-frame", {0x4008: 0x12000 | LEAF}, SLOTS, (), 0x4008),
    ("wrong-frame", {0x3008: 0x60_0000 | PS | LEAF}, SLOTS, (), 0x3008),
    ("writable-alias", {0x4008: 0x12000 | LEAF}, without_hpa(), (), 0x4010),
    ("alias", {0x4008: 0x12005 | WB, 0x4010: 0x12005 | WB}, without_hpa(), (), 0x4010),
    ("writable-read-only-slot", {}, slots_with(0, readonly=True), (), 0x4000),
    ("unlogged-write", {}, slots_with(0, log=True), (), 0x4000),
    ("unlogged-write", {}, slots_with(1, log=True, dirty=["0x200000"]), (), 0x3008),
    ("device-in-a-slot", {0x4008: 0x6}, SLOTS, GENERATION, 0x4008),
    ("executable-large-page", {}, SLOTS, ("--no-executable-large",), 0x3008),
]  # fmt: skip


def run(
    vapama: Vapama, folder: Path, entries: Entries, slots: list[dict[str, Any]], *options: str
) -> tuple[int, dict[str, Any]]:
    """The second stage with these entries instead, audited."""
    write(folder / "host.raw", EPT | entries)
    (folder / "slots.json").write_text(json.dumps(slots))
    eptp = ("--eptp", "0x105e") if "ad" in options else EPTP
    others = [option for option in options if option != "ad"]
    return audited(vapama, "host.raw", *eptp, "--slots", "slots.json", *others)


def test_a_sound_second_stage_has_no_findings(vapama: Vapama, folder: Path) -> None:
    status, report = run(vapama, folder, {}, SLOTS)
    assert (status, report["findings"], report["rules"]) == (0, [], [])
    assert (report["pages"], report["tables"], report["complete"]) == (9, 4, True)


@pytest.mark.parametrize(("rule", "entries", "slots", "options", "where"), SECOND_STAGE)
def test_a_fault_in_a_second_stage_is_found_at_its_entry(
    vapama: Vapama, folder: Path, rule: str, entries: Entries, slots: Any, options: Any, where: int
) -> None:
    status, report = run(vapama, folder, entries, slots, *options)
    assert rule in {counted["rule"] for counted in report["rules"]}
    (first, *_) = [finding for finding in report["findings"] if finding["rule"] == rule]
    assert int(first["entry_at"], 16) == where
    assert int(first["entry"], 16) == (EPT | entries)[where]
    assert first["path"][0].startswith("PML4E")
    assert f"at {where:#x}" in first["path"][-1]
    statuses = {counted["status"] for counted in report["rules"]}
    assert status == (1 if "violation" in statuses else 3 if "not held" in statuses else 0)
    assert first["status"] == RULES[rule].status


@pytest.mark.parametrize(
    ("entries", "slots", "options"),
    [
        ({0x4040: 0x6}, SLOTS, GENERATION),
        ({0x4008: 1 << 52 | 0x6}, SLOTS, GENERATION),
        ({0x4008: 0x12005 | WB, 0x4010: 0x12005 | WB},
         [{"gpa": 0, "bytes": "0x2000", "hva": "0x1000"},
          {"gpa": "0x2000", "bytes": "0x6000", "hva": "0x2000"}, SLOTS[1]], ()),
        ({}, slots_with(0, log=True, dirty=[i << 12 for i in range(8)]), ()),
        ({}, slots_with(0, log=True), ("ad",)),
        ({0x4010: 0x12000 | 5 | WB}, slots_with(0, readonly=False), ()),
    ],
    ids=["a device outside memory", "an outdated device", "aliases meant by the slots",
         "a log that names the pages", "a log by dirty flags", "a page that cannot be written"],
)  # fmt: skip
def test_what_is_allowed_is_not_found(
    vapama: Vapama, folder: Path, entries: Entries, slots: Any, options: Any
) -> None:
    status, report = run(vapama, folder, entries, slots, *options)
    assert (status, report["rules"]) == (0, [])


def test_nested_page_tables_are_audited_alike(vapama: Vapama, folder: Path) -> None:
    sound = {0x1000: 0x2027, 0x2000: 0x3027, 0x3000: 0x4027, 0x4000: 0x10067}
    (folder / "slots.json").write_text(json.dumps(SLOTS))
    for entries, rules in (
        ({}, []),
        ({0x1000: 0x2127}, ["reserved-bits"]),
        ({0x4000: 0x12067}, ["wrong-frame"]),
        ({0x4040: 0x18067}, ["no-slot"]),
        ({0x4000: 0x10047}, ["dirty-and-not-accessed"]),
        ({0x4000: 1 << 51 | 1}, ["device-in-a-slot"]),
    ):
        write(folder / "host.raw", sound | entries)
        _, report = audited(
            vapama, "host.raw", "--ncr3", "0x1000", "--host-maxphyaddr", "46",
            "--device", "0x8000000000001/0x8000000000001", "--slots", "slots.json",
        )  # fmt: skip
        assert [counted["rule"] for counted in report["rules"]] == rules


# SHADOW TABLES of a guest at 0x10000, whose own tables are its pages 1 to 4.

GUEST = {0x1000: 0x2027, 0x2000: 0x3027, 0x3000: 0x4027, 0x3008: 0x20_00E7}
GUEST |= {0x4000: 0x5067, 0x4008: 0x6025, 0x4010: 0x7027, 0x4018: 0x8067 | XD}
SHADOW = {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007, 0x3008: 0x9007}
SHADOW |= {0x4000: 0x15007, 0x4008: 0x16005, 0x4010: 0x17005, 0x4018: 0x18007 | XD}
SHADOW |= {0x9000 + 8 * i: 0x40_0007 + (i << 12) for i in range(4)}
SHADOW_SLOTS = [
    {"gpa": 0, "bytes": "0x10000", "hpa": "0x10000"},
    {"gpa": "0x200000", "bytes": "0x200000", "hpa": "0x400000"},
]
GUEST_AT = 0x10000
WP0 = ("--cr0", "0x80000001")
SHADOWS: list[tuple[str, Entries, Entries, tuple[str, ...], int]] = [
    # rule, shadow entries, guest's entries, options, the offending entry
    ("not-mapped-by-guest", {0x4020: 0x15005}, {}, (), 0x4020),
    ("not-mapped-by-guest", {}, {0x4000: 0x5066}, (), 0x4000),
    ("not-mapped-by-guest", {}, {0x3000: 0x4026}, (), 0x4000),
    ("excess-rights", {0x4008: 0x16007}, {}, (), 0x4008),
    ("excess-rights", {}, {0x2000: 0x3025}, (), 0x4000),
    ("excess-rights", {}, {0x4000: 0x5063}, (), 0x4000),
    ("excess-rights", {0x4018: 0x18007}, {}, (), 0x4018),
    ("excess-rights", {0x4008: 0x16007}, {}, WP0, 0x4008),
    ("excess-rights", {0x4008: 0x16003}, {}, (*WP0, "--cr4", "0x200020"), 0x4008),
    ("not-dirty", {0x4010: 0x17007}, {}, (), 0x4010),
    ("not-accessed", {}, {0x4008: 0x6005}, (), 0x4008),
    ("not-accessed", {}, {0x3000: 0x4007}, (), 0x4000),
    ("larger-than-guest", {0x3000: 0x40_0087}, {}, (), 0x3000),
    ("writable-table", {0x4000: 0x14007}, {0x4000: 0x4067}, (), 0x4000),
    ("writable-table", {0x4000: 0x11007}, {0x4000: 0x1067}, (), 0x4000),
    ("wrong-frame", {0x4008: 0x17005}, {}, (), 0x4008),
    ("no-slot", {0x4008: 0x50005}, {0x4008: 0x40025}, (), 0x4008),
    ("table-reachable", {0x4008: 0x3005}, {}, (), 0x4008),
    ("cycle", {0x1FF8: 0x1007}, {}, (), 0x1FF8),
    ("reserved-bits", {0x1000: 0x2087}, {}, (), 0x1000),
    ("absent-guest-table", {}, {0x3000: 0x80_0027}, (), 0x4000),
    ("may-be-stale", {}, {0x4000: 0x5066}, ("--unsync", "0x4000"), 0x4000),
]  # fmt: skip


def shadowed(
    vapama: Vapama, folder: Path, shadow: Entries, guest: Entries, *options: str
) -> tuple[int, dict[str, Any]]:
    """Shadow tables and a guest in one image, with these entries instead, audited."""
    behind = {GUEST_AT + address: entry for address, entry in (GUEST | guest).items()}
    write(folder / "host.raw", SHADOW | shadow | behind)
    (folder / "slots.json").write_text(json.dumps(SHADOW_SLOTS))
    return audited(
        vapama, "host.raw", "--shadow", "0x1000", "--cr3", "0x1000", "--slots", "slots.json",
        *options,
    )  # fmt: skip


def test_sound_shadow_tables_have_no_findings(vapama: Vapama, folder: Path) -> None:
    status, report = shadowed(vapama, folder, {}, {})
    assert (status, report["findings"], report["rules"]) == (0, [], [])
    assert report["pages"] == 8


@pytest.mark.parametrize(("rule", "shadow", "guest", "options", "where"), SHADOWS)
def test_a_fault_in_shadow_tables_is_found_at_its_entry(
    vapama: Vapama,
    folder: Path,
    rule: str,
    shadow: Entries,
    guest: Entries,
    options: Any,
    where: int,
) -> None:
    status, report = shadowed(vapama, folder, shadow, guest, *options)
    (first, *_) = [finding for finding in report["findings"] if finding["rule"] == rule]
    assert int(first["entry_at"], 16) == where
    assert first["guest_path"][0].startswith("PML4E")
    assert status == {"note": 0, "violation": 1, "not held": 3}[first["status"]]
    assert first["status"] == RULES[rule].status


def test_what_cr0_wp_0_needs_is_allowed(vapama: Vapama, folder: Path) -> None:
    """A user's read-only page that the supervisor writes is the supervisor's then."""
    status, report = shadowed(vapama, folder, {0x4008: 0x16003 | XD}, {}, *WP0)
    assert (status, report["rules"]) == (0, [])


def test_without_slots_places_are_compared_with_each_other(vapama: Vapama, folder: Path) -> None:
    write(folder / "guest.raw", GUEST | {0x4008: 0x5025})
    write(folder / "host.raw", SHADOW)
    _, report = audited(
        vapama, "guest.raw", "--host", "host.raw", "--shadow", "0x1000", "--cr3", "0x1000"
    )
    assert [counted["rule"] for counted in report["rules"]] == ["two-frames"]
    write(folder / "guest.raw", GUEST)
    write(folder / "host.raw", SHADOW | {0x4008: 0x15005})
    _, report = audited(
        vapama, "guest.raw", "--host", "host.raw", "--shadow", "0x1000", "--cr3", "0x1000"
    )
    assert [counted["rule"] for counted in report["rules"]] == ["writable-alias"]


def test_every_rule_has_a_fault_here() -> None:
    seeded = {row[0] for row in (*SECOND_STAGE, *SHADOWS)} | {"two-frames"}
    assert seeded == set(RULES)


# GUESTS ALONE, AND WHAT IS HOSTILE


def test_a_guest_s_own_tables_are_audited_alone(vapama: Vapama, folder: Path) -> None:
    status, report = audited(vapama, "guest")
    assert (status, report["rules"], report["tables"]) == (0, [], 6140)
    write(folder / "guest.raw", GUEST | {0x1FF8: 0x1027, 0x4008: 1 << 51 | 0x6025})
    _, report = audited(vapama, "guest.raw", "--cr3", "0x1000", "--maxphyaddr", "40")
    assert {(counted["rule"], counted["status"]) for counted in report["rules"]} == {
        ("cycle", "note"), ("two-levels", "note"), ("reserved-bits", "violation"),
    }  # fmt: skip


def test_a_guest_may_do_to_its_own_tables_what_it_likes(vapama: Vapama, folder: Path) -> None:
    behind = {0x10000 + address: entry for address, entry in GUEST.items()}
    behind |= {0x11FF8: 0x1027, 0x14028: 1 << 51 | 0x6025}
    status, report = run(vapama, folder, behind, SLOTS, "--cr3", "0x1000", "--maxphyaddr", "40")
    assert status == 0
    assert {(c["tables"], c["rule"], c["status"]) for c in report["rules"]} == {
        ("guest's tables", rule, "note") for rule in ("cycle", "two-levels", "reserved-bits")
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["shadow", "eptp"])
def test_tables_full_of_themselves_end_soon(vapama: Vapama, folder: Path, kind: str) -> None:
    """A root whose every entry is itself maps 512^4 pages; a guest's may do so too."""
    write(folder / "host.raw", {8 * i: RWX for i in range(512)}, 4)
    write(folder / "guest.raw", {8 * i: 0x27 for i in range(512)}, 4)
    root = "0x1e" if kind == "eptp" else "0"
    status, report = audited(
        vapama, "guest.raw", "--host", "host.raw", f"--{kind}", root, "--cr3", "0",
        "--most-pages", "100000",
    )  # fmt: skip
    assert (status, report["stopped"]) == (1, "most-runs")
    assert "cycle" in {counted["rule"] for counted in report["rules"]}


def test_limits_leave_it_undecided(vapama: Vapama, folder: Path) -> None:
    status, report = run(vapama, folder, {}, SLOTS, "--most-pages", "3")
    assert (status, report["rules"], report["complete"]) == (3, [], False)


def test_a_report_for_people_names_the_entry_and_the_way(vapama: Vapama, folder: Path) -> None:
    write(folder / "host.raw", EPT | {0x4008: 0x12000 | LEAF, 0x4010: 0x13000 | LEAF})
    (folder / "slots.json").write_text(json.dumps(SLOTS))
    result = vapama("snapshot", "audit", "host.raw", *EPTP, "--slots", "slots.json")
    assert result.status == 1
    lines = result.out.splitlines()
    assert lines[2:9] == [
        "violation: wrong-frame (second stage)",
        "  0x0000000000001000-0x0000000000002fff  guest-physical 0x1000 is mapped to 0x12000, and "
        "the host has it at 0x11000",
        "    PML4E[  0] at 0x1000 = 0x0000000000002007  R W X  -> table at 0x2000",
        "    PDPTE[  0] at 0x2000 = 0x0000000000003007  R W X  -> table at 0x3000",
        "    PDE  [  0] at 0x3000 = 0x0000000000004007  R W X  -> table at 0x4000",
        "    PTE  [  1] at 0x4008 = 0x0000000000012037  R W X  -> page of 4 KBytes at 0x12000, "
        "memory type 6",
        "",
    ]
    assert lines[-1].startswith("3 violations, 0 notes; 4 tables, 4,096 entries")


BAD_SLOTS = [
    ("{}", "not a list of memory slots"),
    ("[]", "no memory slots"),
    ('[{"gpa": 1, "bytes": 4096}]', "no multiple of 4096"),
    ('[{"gpa": 0, "bytes": 0}]', "`bytes` is 0"),
    ('[{"gpa": 0, "bytes": 8192}, {"gpa": 4096, "bytes": 4096}]', "overlaps"),
    ('[{"gpa": 0, "bytes": 4096, "dirty": [4096]}]', "not in it"),
    ('[{"gpa": "zero", "bytes": 4096}]', "`gpa` is zero"),
    ('[{"gpa": 0, "bytes": 4096, "pages": 1}]', "unknown field"),
]


@pytest.mark.parametrize(("text", "said"), BAD_SLOTS)
def test_slots_that_cannot_be_get_one_line(
    vapama: Vapama, folder: Path, text: str, said: str
) -> None:
    write(folder / "host.raw", EPT)
    (folder / "slots.json").write_text(text)
    result = vapama("snapshot", "audit", "host.raw", *EPTP, "--slots", "slots.json")
    assert (result.status, result.out) == (2, "")
    assert said in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--eptp", "0x101e", "--shadow", "0x1000"), "give one of"),
        (("--slots", "slots.json"), "say what maps the guest's memory"),
        (("--shadow", "0x1000", "--cr3", "0x1000"), "where is the guest's memory"),
        (("--eptp", "0x90000101e"), "does not hold the root"),
        ((*EPTP, "--device", "6"), "--device 6: give VALUE/MASK"),
        ((*EPTP, "--generation", "6"), "--generation 6: give VALUE/MASK"),
        ((*EPTP, "--slots", "missing.json"), "cannot read the slots"),
        ((), "give --cr3"),
        ((*EPTP, "--host", "missing.raw"), "cannot read the image"),
    ],
)
def test_options_that_cannot_be_get_one_line(
    vapama: Vapama, folder: Path, options: tuple[str, ...], said: str
) -> None:
    write(folder / "host.raw", EPT)
    (folder / "slots.json").write_text(json.dumps(SLOTS))
    result = vapama("snapshot", "audit", "host.raw", *options)
    assert (result.status, result.out) == (2, "")
    assert said in result.err
    assert result.err.count("\n") == 1
