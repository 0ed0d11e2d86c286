"""The page tables of a real guest, with the ground truth of the machine that ran it.

A snapshot is a .npz file: page-table pages by frame, control registers, and every mapping that
QEMU's `info tlb` listed, with its flags. See data/README.md for the one that ships.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vapama.case import BadInput
from vapama.snapshot import answers
from vapama.snapshot.images import open_image, read_arrays
from vapama.spec import nested, paging
from vapama.spec.access import Access
from vapama.spec.cpu import Cpu, ImpossibleState, UnsupportedMode
from vapama.spec.memory import Image
from vapama.spec.outcomes import Outcome, Translated
from vapama.spec.paging import translate
from vapama.spec.stage import Npt

SHIPPED = Path(__file__).parents[1] / "data" / "linux-6.1-guest-4level.npz"
NEEDED = ("frames", "tables", "cr0", "cr3", "cr4", "efer", "truth_va", "truth_pa", "truth_flags")
LARGEST = 1 << 40
Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Snapshot:
    """A guest at one moment: control state, memory (tables only, 0 elsewhere), and the truth."""

    name: str
    cpu: Cpu
    image: Words
    truth_va: Words
    truth_pa: Words
    truth_flags: list[str]
    stage: Npt | None = None
    """The second stage, if there is one: then `image` is the host's, and flags are not known."""
    path: Path = SHIPPED


def load_snapshot(path: Path, maxphyaddr: int = 40) -> Snapshot:
    """Read a .npz snapshot. Raises `BadInput`."""
    return _snapshot(path, read_arrays(path, NEEDED, ("ncr3",)), maxphyaddr)


def _snapshot(path: Path, found: dict[str, Any], maxphyaddr: int) -> Snapshot:
    frames, tables = found["frames"], found["tables"]
    if len({len(found[n]) for n in ("truth_va", "truth_pa", "truth_flags")}) != 1:
        raise BadInput(f"{path}: the arrays of the truth differ in length")
    if (frames & np.uint64(0xFFF)).any() or int(frames.max()) >= LARGEST:
        raise BadInput(f"{path}: `frames` must be page-aligned and below {LARGEST:#x}")
    try:
        image = np.zeros((int(frames.max()) // 4096 + 1, 512), dtype=np.uint64)
    except MemoryError:
        raise BadInput(f"{path}: `frames` lie too far apart: no image of them fits here") from None
    image[(frames >> np.uint64(12)).astype(np.int64)] = tables
    cr0, cr3, cr4, efer = (int(found[name]) for name in ("cr0", "cr3", "cr4", "efer"))
    try:
        cpu = Cpu(cr0, cr3, cr4, efer, maxphyaddr=maxphyaddr)
        stage = Npt(int(found["ncr3"]), maxphyaddr=maxphyaddr) if "ncr3" in found else None
    except (ImpossibleState, UnsupportedMode) as error:
        raise BadInput(f"{path}: {error}") from None
    return Snapshot(
        path.name,
        cpu,
        image.reshape(-1),
        found["truth_va"],
        found["truth_pa"],
        found["truth_flags"].tolist(),
        stage,
        path,
    )


FLAG_BITS = (
    ("X", paging.EXECUTE_DISABLE),
    ("G", paging.GLOBAL),
    ("P", paging.PAGE_SIZE),
    ("D", paging.DIRTY),
    ("A", paging.ACCESSED),
    ("C", paging.CACHE_DISABLE),
    ("T", paging.WRITE_THROUGH),
    ("U", paging.USER),
    ("W", paging.WRITABLE),
)
"""QEMU's letters for the bits of the entry that maps a page, in its order."""


def flags(entry: int, level: int) -> str:
    """An entry's bits as QEMU prints them; bit 7 of a PTE is PAT and not shown."""
    shown = entry if level > 1 else entry & ~paging.PAGE_SIZE
    return "".join(letter if shown & bit else "-" for letter, bit in FLAG_BITS)


@dataclass(frozen=True)
class Agreement:
    """How many mappings of a snapshot a check confirmed, of how many, and the first difference."""

    what: str
    right: int
    total: int
    first_difference: str = ""

    @property
    def good(self) -> bool:
        """Whether every mapping was confirmed, and there were some."""
        return self.right == self.total > 0


def check_snapshot(
    snapshot: Snapshot, progress: Callable[[str], None] = lambda what: None
) -> list[Agreement]:
    """Every mapping of the snapshot, by the reference and by the compiled kernels, walked one by
    one and found from CR3, against the truth.
    """
    checks: tuple[tuple[str, Callable[[str, Snapshot], Agreement]], ...] = (
        ("reference: translated", _reference_walks),
        ("compiled: translated", _compiled_walks),
        ("reference: found from CR3, with flags", _reference_mappings),
        ("compiled: found from CR3, with flags", _compiled_mappings),
    )
    if snapshot.stage is not None:
        checks = (
            ("reference: translated by both stages", _reference_walks),
            ("compiled: found from CR3 through both stages", _compiled_through_both),
        )
    results = []
    for what, check in checks:
        progress(what)
        results.append(check(what, snapshot))
    return results


def _who(flags_: str) -> int:
    """1 for a page that the truth calls a user's."""
    return int("U" in flags_)


def _reference_walks(what: str, snapshot: Snapshot) -> Agreement:
    memory = Image(snapshot.image)
    truth = zip(
        snapshot.truth_va.tolist(), snapshot.truth_pa.tolist(), snapshot.truth_flags, strict=True
    )
    right, difference = 0, ""
    for va, pa, letters in truth:
        access = Access(va, user=_who(letters))
        outcome: Outcome
        if snapshot.stage is None:
            outcome = translate(snapshot.cpu, memory, access)
        else:
            outcome = nested.translate(snapshot.cpu, snapshot.stage, memory, access)
        if isinstance(outcome, Translated) and outcome.pa == pa:
            right += 1
        elif not difference:
            difference = f"VA {va:#x}: {outcome}, the truth is PA {pa:#x}"
    return Agreement(what, right, len(snapshot.truth_va), difference)


def _compiled_walks(what: str, snapshot: Snapshot) -> Agreement:
    from vapama.impl.optimized import translate_array

    users = np.array([_who(letters) for letters in snapshot.truth_flags], dtype=bool)
    right, difference = 0, ""
    for user in (False, True):
        addresses = snapshot.truth_va[users == user]
        pas = snapshot.truth_pa[users == user]
        statuses, values = translate_array(
            snapshot.cpu, snapshot.image, addresses, Access(0, user=int(user))
        )
        same = (statuses <= 3) & (values == pas)
        right += int(same.sum())
        if not same.all() and not difference:
            at = int(np.argmin(same))
            difference = (
                f"VA {int(addresses[at]):#x}: status {int(statuses[at])}, {int(values[at]):#x}; "
                f"the truth is PA {int(pas[at]):#x}"
            )
    return Agreement(what, right, len(users), difference)


def _compiled_through_both(what: str, snapshot: Snapshot) -> Agreement:
    """Each mapping of the truth is in the list of all, which may well have others: what the guest
    did not use is not in the truth.
    """
    assert snapshot.stage is not None
    image, room = open_image(snapshot.path, "npz"), 1 << 20
    guest = answers.guest_memory(snapshot.stage, image, room, room)
    listing = answers.listing_of(snapshot.cpu, guest.pieces, image.name, False, room, room)
    found: dict[int, int] = {}
    for batch in listing.batches():
        for rows in guest.through(snapshot.cpu, batch, False):
            found.update(zip(rows.addresses.tolist(), rows.pas.tolist(), strict=True))
    wrong = [
        (va, pa)
        for va, pa in zip(snapshot.truth_va.tolist(), snapshot.truth_pa.tolist(), strict=True)
        if found.get(va) != pa
    ]
    difference = f"VA {wrong[0][0]:#x}: not to {wrong[0][1]:#x}" if wrong else ""
    total = len(snapshot.truth_va)
    return Agreement(what, total - len(wrong), total, difference)


def _reference_mappings(what: str, snapshot: Snapshot) -> Agreement:
    memory = Image(snapshot.image)
    found = (
        (m.address, m.pa, flags(m.entry, m.level)) for m in paging.mappings(snapshot.cpu, memory)
    )
    return _compare_sets(what, set(found), snapshot)


def _compiled_mappings(what: str, snapshot: Snapshot) -> Agreement:
    from vapama.impl.listing import mappings_array

    addresses, levels, entries = mappings_array(
        snapshot.cpu, snapshot.image, room=2 * len(snapshot.truth_va) + 1
    )
    listed = zip(addresses.tolist(), levels.tolist(), entries.tolist(), strict=True)
    found = {
        (a, paging.Mapping(a, level, entry).pa, flags(entry, level)) for a, level, entry in listed
    }
    return _compare_sets(what, found, snapshot)


def _compare_sets(what: str, found: set[tuple[int, int, str]], snapshot: Snapshot) -> Agreement:
    truth = set(
        zip(
            snapshot.truth_va.tolist(),
            snapshot.truth_pa.tolist(),
            snapshot.truth_flags,
            strict=True,
        )
    )
    extra, missing = found - truth, truth - found
    difference = ""
    for kind, differing in (("not in the truth", extra), ("not found", missing)):
        if differing:
            va, pa, letters = min(differing)
            difference = difference or f"VA {va:#x} to PA {pa:#x} {letters}: {kind}"
    # A mapping too many counts as one that is wrong.
    return Agreement(what, len(truth) - len(missing) - len(extra), len(truth), difference)
