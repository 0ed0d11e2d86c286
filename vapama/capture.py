"""Both stages of a guest of KVM's, captured with the truth about where its pages are.

KVM runs our guest under nested paging in the Linux that QEMU emulates (`oracles/nested_kvm.py`).
The guest stores a word of its own to each page that it can reach, and reads it by every mapping; in
the emulated machine's RAM the word is then looked for. So what is known of a mapping rests neither
on tables nor on the software that made them.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from vapama.oracle_programs import ready
from vapama.oracles import capture, nested_kvm
from vapama.oracles.emulator import CannotStart
from vapama.oracles.nested_kvm import NestedKvm, Result, power_on
from vapama.spec import programs
from vapama.spec.access import Access
from vapama.spec.steps import Load, Step, Store
from vapama.spec.words import Word

NESTED = "nested"
KINDS = (*capture.KINDS, NESTED)
PAGE = 4096
MARK_AT = 0x900
"""Where in each page the guest stores a word of its own."""
DONE = 3
SVME = 1 << 12
# A VMCB, in words: nested paging enabled, nCR3, EFER, CR4, CR3, CR0 (APM Vol. 2, appendix B).
NP_ENABLE, NCR3, VMCB_EFER, VMCB_CR4, VMCB_CR3, VMCB_CR0 = (
    at >> 3 for at in (0x90, 0xB0, 0x4D0, 0x548, 0x550, 0x558)
)
FRAME, PRESENT, PAGE_SIZE = capture.FRAME, capture.PRESENT, capture.PAGE_SIZE


def captured(kind: str, folder: Path) -> dict[str, Any]:
    """A snapshot of one of `KINDS`, as arrays by name. Raises `CannotStart`."""
    return nested(folder) if kind == NESTED else capture.captured(kind)


def nested(folder: Path) -> dict[str, Any]:
    """Both stages of a guest of KVM's, whose machine has its RAM in the folder."""
    ram = folder / "ram"
    hypervisor = NestedKvm(npt=True, ram=ram)
    try:
        plan = ready(programs.plan(guests=1, vcpus=1))
        hypervisor.set_image(nested_kvm.image(plan.guests[0]))
        setting_up = power_on(plan)
        cpu = plan.guests[0].vcpus[0]
        marks = _marks()
        steps = [*_stores(marks), *_loads()]
        commands = [nested_kvm.command(step, cpu) for step in steps]
        results = hypervisor.run([*setting_up, *(c for c in commands if c is not None)])
        words = np.memmap(ram, dtype=np.uint64, mode="r").reshape(-1, PAGE // 8)
        found = _read(words, marks, list(zip(steps, results[len(setting_up) :], strict=True)))
    finally:
        hypervisor.end()
    return found


def _marks() -> list[Word]:
    """A word for each page, which nothing else holds."""
    random = Random(0x7661_7061_6D61)
    return [random.getrandbits(64) for _ in range(programs.PAGES)]


def _stores(marks: list[Word]) -> Iterator[Step]:
    for gfn, mark in enumerate(marks):
        address = 2 << 21 | gfn << 12 | MARK_AT  # through the large page, which maps all memory
        yield Store(0, 0, Access(address, 1), mark)
    yield Store(0, 0, Access(2 << 21 | MARK_AT + 8, 1), 0)  # no copy of a word in the mailbox


def _loads() -> Iterator[Step]:
    for region in range(4):
        for page in range(32):
            yield Load(0, 0, Access(region << 21 | page << 12 | MARK_AT))


def _read(words: Any, marks: list[Word], ran: list[tuple[Step, Result]]) -> dict[str, Any]:
    """The snapshot, out of the machine's RAM."""
    # THE TRUTH: which mark was read where, and at what machine address it is
    at = {int(words[page, MARK_AT >> 3]): page * PAGE for page in _pages_with(words, marks)}
    truth = {
        step.access.address & ~0xFFF: at[result.data]
        for step, result in ran
        if isinstance(step, Load) and result.vector == DONE and result.data in at
    }

    # THE STATE OF BOTH STAGES
    vmcb = _vmcb(words)
    ncr3 = int(vmcb[NCR3]) & FRAME
    own = capture.frames_of_tables(words, {"cr3": ncr3, "cr4": 0, "efer": 0, "ncr3": ncr3})
    frames = np.union1d(own, np.array(_mapped(words, ncr3), dtype=np.int64))
    registers = {
        "cr0": int(vmcb[VMCB_CR0]),
        "cr3": int(vmcb[VMCB_CR3]),
        "cr4": int(vmcb[VMCB_CR4]),
        "efer": int(vmcb[VMCB_EFER]) & ~SVME,
        "ncr3": ncr3,
        "maxphyaddr": capture.MAXPHYADDR,
    }
    return {
        "frames": frames.astype(np.uint64),
        "tables": words[frames >> 12].copy(),
        **{name: np.uint64(value) for name, value in registers.items()},
        "truth_va": np.array(list(truth), dtype=np.uint64),
        "truth_pa": np.array(list(truth.values()), dtype=np.uint64),
        "truth_flags": np.array([""] * len(truth)),
    }


def _pages_with(words: Any, marks: list[Word]) -> list[int]:
    """The pages that hold a mark in its place; each must be in one alone."""
    column = words[:, MARK_AT >> 3]
    pages = np.flatnonzero(np.isin(column, np.array(marks, dtype=np.uint64))).tolist()
    if len(pages) != len(marks):
        raise CannotStart(f"{len(marks)} pages of the guest were looked for, {len(pages)} found")
    return [int(page) for page in pages]


def _vmcb(words: Any) -> Any:
    """The control block of the virtual processor that ran."""
    control, root = words[:, NP_ENABLE], words[:, VMCB_CR3]
    is_ours = (control & np.uint64(1) != 0) & (root == np.uint64(programs.ROOT << 12))
    found = words[is_ours & (words[:, NCR3] != 0)]
    roots = np.unique(found[:, NCR3])
    if len(roots) != 1:
        raise CannotStart(f"{len(roots)} nested page tables were found, not one")
    return found[0].copy()


def _mapped(words: Any, ncr3: int) -> list[int]:
    """The frames of 4 KBytes that nested page tables map."""
    tables = [ncr3]
    for _ in range(3):
        tables = [e & FRAME for t in tables for e in words[t >> 12].tolist() if e & PRESENT]
    frames = {e & FRAME for t in tables for e in words[t >> 12].tolist() if e & PRESENT}
    # KVM marks where there is no memory by entries that are present and malformed.
    return [frame for frame in frames if frame >> 12 < len(words)]
