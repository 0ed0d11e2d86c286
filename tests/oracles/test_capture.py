"""Captured page tables: those that come with vapama, and those that are captured here and now."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vapama import capture
from vapama.oracles.capture import frames_of_tables, registers_of, save, truth_of
from vapama.oracles.emulator import CannotStart
from vapama.snapshot.truth import SHIPPED, Snapshot, check_snapshot, load_snapshot

DATA = SHIPPED.parent
LEVELS_5, NESTED = DATA / "linux-6.1-guest-5level.npz", DATA / "kvm-6.1-guest-nested.npz"


LEGACY = [DATA / f"linux-6.1-guest-{kind}.npz" for kind in ("pae", "32bit")]


@pytest.mark.parametrize("path", [LEVELS_5, NESTED, *LEGACY], ids=lambda path: path.stem)
def test_a_captured_guest_agrees_with_its_truth(path: Path) -> None:
    agreements = check_snapshot(load_snapshot(path))
    assert [a.first_difference for a in agreements] == [""] * len(agreements)
    assert all(a.good for a in agreements)


def test_the_5_level_guest_needs_5_levels() -> None:
    guest = load_snapshot(LEVELS_5)
    assert guest.cpu.levels == 5
    user = guest.truth_va[guest.truth_va < 1 << 56]
    assert (user >= 1 << 48).sum() > 10


@pytest.mark.parametrize("path", [LEVELS_5, NESTED, *LEGACY], ids=lambda path: path.stem)
@pytest.mark.parametrize("at", [0, -1])
def test_a_wrong_mapping_is_told(path: Path, at: int) -> None:
    guest = load_snapshot(path)
    wrong = guest.truth_pa.copy()
    wrong[at] ^= 0x1000
    for agreement in check_snapshot(replace(guest, truth_pa=wrong)):
        assert not agreement.good
        assert f"{int(guest.truth_va[at]):#x}" in agreement.first_difference


def test_a_second_stage_that_leads_elsewhere_is_told(tmp_path: Path) -> None:
    with np.load(NESTED) as arrays:
        kept = dict(arrays)
    # Two leaves of the second stage are exchanged: what a hypervisor must never do.
    root = load_snapshot(NESTED).stage
    assert root is not None
    tables, frames = kept["tables"], kept["frames"].tolist()
    page = frames.index(root.ncr3)
    for _ in range(3):
        first = next(int(e) for e in tables[page] if e & np.uint64(1))
        page = frames.index(first & 0xF_FFFF_FFFF_F000)
    leaves = [i for i, e in enumerate(tables[page].tolist()) if e & 1 and 5 < i < 16]
    a, b = leaves[:2]
    tables[page][[a, b]] = tables[page][[b, a]]
    save(tmp_path / "wrong.npz", kept)
    assert not any(a.good for a in check_snapshot(load_snapshot(tmp_path / "wrong.npz")))


@pytest.mark.parametrize("kind", ["5-level", "nested", "pae"])
def test_what_is_captured_here_agrees_with_its_truth(kind: str, tmp_path: Path) -> None:
    try:
        found = capture.captured(kind, tmp_path)
    except CannotStart as why:
        pytest.skip(str(why))
    save(tmp_path / "captured.npz", found)
    guest: Snapshot = load_snapshot(tmp_path / "captured.npz")
    assert len(guest.truth_va) > (50 if kind == "nested" else 4000)
    for agreement in check_snapshot(guest):
        assert agreement.good, agreement


def test_what_the_monitor_says_is_read() -> None:
    said = "EFER=0000000000000d01\nCR0=80050033 CR2=00007f00 CR3=0000000002a1e000 CR4=00751eb0\n"
    assert registers_of(said) == {
        "cr0": 0x80050033, "cr3": 0x2A1E000, "cr4": 0x751EB0, "efer": 0xD01,
    }  # fmt: skip
    line = "ffff888000000000: 0000000000001000 XG-DA---W\r\n"
    truth = truth_of(line + "a line that is none\n")
    assert truth["truth_va"].tolist() == [0xFFFF_8880_0000_0000]
    assert truth["truth_pa"].tolist() == [0x1000]
    assert truth["truth_flags"].tolist() == ["XG-DA---W"]
    with pytest.raises(CannotStart):
        truth_of("nothing")


LONG = {"cr3": 0x1000, "cr4": 0x20, "efer": 0xD00}


def test_all_tables_below_the_root_are_found_and_no_others() -> None:
    words = np.zeros((8, 512), dtype=np.uint64)
    words[1, 3], words[2, 4], words[3, 5] = 0x2007, 0x3007, 0x4007
    words[3, 6], words[3, 7] = 0x5087, 0x6006  # a large page, and a table that is not present
    words[4, 0] = 0x7007  # a page
    assert frames_of_tables(words, LONG).tolist() == [0x1000, 0x2000, 0x3000, 0x4000]


def test_all_tables_of_32_bit_and_pae_paging_are_found() -> None:
    words = np.zeros((8, 512), dtype=np.uint64)
    halves = words.view(np.uint32)
    halves[1, 3], halves[1, 1023], halves[1, 4] = 0x2007, 0x3007, 0x40_0087
    legacy = {"cr3": 0x1000, "cr4": 0x10, "efer": 0}
    assert frames_of_tables(words, legacy).tolist() == [0x1000, 0x2000, 0x3000]
    words[:] = 0
    words[1, 4], words[1, 7], words[1, 0] = 0x2001, 0x3001, 0x7001  # 4 to 7 are the PDPTEs
    words[2, 9], words[3, 1] = 0x4007, 0x20_0087
    pae = {"cr3": 0x1020, "cr4": 0x20, "efer": 0x800}
    assert frames_of_tables(words, pae).tolist() == [0x1000, 0x2000, 0x3000, 0x4000]
