"""The page tables of a real guest: every mapping agrees with the truth, and a wrong one is told."""

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vapama.bugs.mistakes import MISTAKES, Mistake
from vapama.case import BadInput
from vapama.impl import listing, optimized
from vapama.snapshot import truth as guests
from vapama.snapshot.truth import SHIPPED, Snapshot, check_snapshot, load_snapshot
from vapama.spec import paging
from vapama.spec.cpu import LMA, LME, NXE, PAE, PE, PG, Cpu
from vapama.spec.memory import Image

MAPPINGS = 38_697
LISTER = "impl/kernels/mappings.py"


@pytest.fixture(scope="module")
def guest() -> Snapshot:
    return load_snapshot(SHIPPED)


def results(snapshot: Snapshot) -> dict[str, tuple[int, str]]:
    """How many mappings each check found wrong, and the first difference."""
    return {a.what: (a.total - a.right, a.first_difference) for a in check_snapshot(snapshot)}


WALKED = ("reference: translated", "compiled: translated")
FOUND = ("reference: found from CR3, with flags", "compiled: found from CR3, with flags")


def test_every_mapping_of_the_real_guest_agrees_with_the_truth(guest: Snapshot) -> None:
    agreements = check_snapshot(guest)
    assert [a.what for a in agreements] == [WALKED[0], WALKED[1], FOUND[0], FOUND[1]]
    for agreement in agreements:
        assert (agreement.right, agreement.total) == (MAPPINGS, MAPPINGS), agreement
        assert agreement.good


# A small guest, to be broken in every way: a writable 4-KByte page, one read-only and global, a
# large one of the supervisor's, each in both halves of linear addresses.
ENTRIES = {
    0x000: 0x1027,
    0x800: 0x1027,
    0x1000: 0x2027,
    0x2000: 0x3027,
    0x2008: 0xE3 | 1 << 63,
    0x3000: 0x9067,
    0x3008: 0xA125,
}
TRUTH = [
    (half | address, pa, flags)
    for half in (0, 0xFFFF_8000_0000_0000)
    for address, pa, flags in (
        (0x0, 0x9000, "---DA--UW"),
        (0x1000, 0xA000, "-G--A--U-"),
        (0x20_0000, 0, "X-PDA---W"),
    )
]


def small() -> Snapshot:
    image = np.zeros(4 * 512, dtype=np.uint64)
    for address, entry in ENTRIES.items():
        image[address >> 3] = entry
    va, pa = (np.array(column, dtype=np.uint64) for column in list(zip(*TRUTH, strict=True))[:2])
    cpu = Cpu(cr0=PG | PE, cr3=0, cr4=PAE, efer=LME | LMA | NXE, maxphyaddr=40)
    return Snapshot("small", cpu, image, va, pa, [flags for _, _, flags in TRUTH])


def test_a_small_guest_agrees() -> None:
    assert set(results(small()).values()) == {(0, "")}


def with_entry(address: int, entry: int) -> Snapshot:
    changed = small()
    changed.image[address >> 3] = entry
    return changed


def changed_truth(va: int = 0, pa: int = 0, flags: str = TRUTH[0][2]) -> Snapshot:
    """The small guest with bits of its first mapping toggled in the truth, or other flags."""
    changed = small()
    changed.truth_va[0] ^= np.uint64(va)
    changed.truth_pa[0] ^= np.uint64(pa)
    changed.truth_flags[0] = flags
    return changed


@pytest.mark.parametrize(
    ("broken", "told_by", "difference"),
    [
        (changed_truth(pa=1 << 12), WALKED + FOUND, "0x8000"),
        (changed_truth(va=1 << 45), WALKED + FOUND, ""),
        (changed_truth(flags="--------W"), FOUND, "not in the truth"),
        (changed_truth(flags="---DA--U-"), FOUND, "---DA--UW: not in"),
        (with_entry(0x3000, 0x9066), WALKED + FOUND, ""),
        (with_entry(0x3000, 0x1_0000_9067), WALKED + FOUND, "0x100009000"),
        (with_entry(0x3000, 0x9063), (*WALKED, *FOUND), ""),
        (with_entry(0x3010, 0xB067), FOUND, "not in the truth"),
        (with_entry(0x2008, ENTRIES[0x2008] ^ 0x80), WALKED + FOUND, ""),
        (with_entry(0x2000, 0x3026), WALKED + FOUND, "not found"),
        (with_entry(0x1000, 1 << 40 | 0x2027), WALKED + FOUND, ""),
    ],
    ids=[
        *("a bit of a PA", "a bit of a VA", "flags of the truth", "one flag of the truth"),
        *("a PTE not present", "a bit of a frame", "U/S of a PTE", "an entry too many"),
        *("PS of a PDE", "a PDE not present", "a reserved bit"),
    ],
)  # fmt: skip
def test_a_difference_from_the_truth_is_told(
    broken: Snapshot, told_by: tuple[str, ...], difference: str
) -> None:
    found = results(broken)
    assert {what for what, (wrong, _) in found.items() if wrong} == set(told_by)
    for what, (wrong, text) in found.items():
        assert bool(wrong) == bool(text), what
    assert any(difference in text for _, text in found.values())


def test_one_flipped_bit_of_the_real_guest_is_told(guest: Snapshot) -> None:
    va = int(guest.truth_va[-1])
    *_, leaf = paging.path(guest.cpu, Image(guest.image), va)
    # In place, for a copy of the image would be gigabytes of zeros.
    guest.image[leaf.address >> 3] ^= np.uint64(1 << 30)
    try:
        agreements = check_snapshot(guest)[1::2]
    finally:
        guest.image[leaf.address >> 3] ^= np.uint64(1 << 30)
    for agreement in agreements:
        assert not agreement.good
        assert agreement.right == agreement.total - (2 if "found" in agreement.what else 1)
        assert f"{va:#x}" in agreement.first_difference


@pytest.mark.parametrize(
    ("mistake", "told_by"),
    [
        (MISTAKES["reads-need-a-writable-page"], WALKED[1]),
        (MISTAKES["the-batch-shares-its-first-result"], WALKED[1]),
        (Mistake("no-sign", LISTER, "if address >> form[SIGN]:", "if form[SIGN] == 0:"), FOUND[1]),
        (Mistake("no-1", LISTER, "while i < last:", "while i < 1:"), FOUND[1]),
        (
            Mistake(
                "no-large",
                LISTER,
                "if page:\n                if",
                "if level < 2:\n                if",
            ),
            FOUND[1],
        ),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_mistake_of_the_kernels_shows_on_a_guest(
    mistake: Mistake, told_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mistake.file == LISTER:
        monkeypatch.setattr(listing, "kernel", mistake.module())
    else:
        batches = mistake.module("vapama.impl.kernels.batches")
        monkeypatch.setattr(optimized, "batches", batches)
    assert [what for what, (wrong, _) in results(small()).items() if wrong] == [told_by]


def test_an_empty_truth_is_not_good() -> None:
    nothing = np.zeros(0, dtype=np.uint64)
    empty = replace(small(), truth_va=nothing, truth_pa=nothing, truth_flags=[])
    assert not any(agreement.good for agreement in check_snapshot(empty))


# FILES


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickled_array_is_refused_and_never_run(tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "exploded")
    with np.load(SHIPPED) as arrays:
        content = {name: arrays[name] for name in guests.NEEDED}
    content["truth_flags"] = np.array([bomb], dtype=object)
    np.savez(tmp_path / "bomb.npz", **content)
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(bomb))
    for name in ("bomb", "bare"):
        with pytest.raises(BadInput, match="not a whole"):
            load_snapshot(tmp_path / f"{name}.npz")
    assert not bomb.path.exists()


def test_the_shipped_guest_is_as_its_description_says(guest: Snapshot) -> None:
    with np.load(SHIPPED) as arrays:
        assert arrays["frames"].shape == (6140,)
        assert arrays["tables"].shape == (6140, 512)
    assert guest.cpu.levels == 4
    assert guest.cpu.maxphyaddr == 40
    assert len(guest.truth_flags) == MAPPINGS
