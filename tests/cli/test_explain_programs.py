"""Programs as `vapama explain` shows them: steps, what was seen, what changed, what was wrong."""

from functools import cache
from pathlib import Path

import pytest

from vapama.bugs.mistakes import MISTAKES
from vapama.case import Case, make_case
from vapama.explain_programs import changes, describe_seen, describe_step, state_of
from vapama.fuzz.random_engine import Search
from vapama.impl.vmm import Vmm
from vapama.replaying import explain_case
from vapama.runs import Guarded
from vapama.spec import programs, steps
from vapama.spec.access import Access
from vapama.spec.nondet import load_invariants
from vapama.spec.outcomes import NonCanonical, OutsideMemory

STRUCTURE = "the_tables_satisfy_every_rule_after_every_step"


@cache
def found(mistake: str) -> Case:
    """A program, shrunk, that the random engine finds the mistake by."""
    invariant = load_invariants()[MISTAKES[mistake].breaks]
    search = Search(invariant, Guarded(f"mistake:{mistake}", MISTAKES[mistake].subject()), seed=0)
    while search.failed is None and search.executions < 4000:
        search.batch(16)
    verdict = search.verdict("random", 1.0)
    assert verdict.case is not None
    return verdict.case


def explained(folder: Path, case: Case, subject: str | None = None) -> list[str]:
    return list(explain_case(case.save(folder), subject))


def in_order(lines: list[str], *parts: str) -> bool:
    """Whether there are lines that begin with these parts, in this order."""
    left = iter(lines)
    return all(any(line.startswith(part) for line in left) for part in parts)


def test_a_program_is_told_step_by_step_to_where_it_leaves_what_is_allowed(tmp_path: Path) -> None:
    """A store through an entry whose dirty flag it has to set, and does not."""
    case = found("the-dirty-flag-of-a-page-is-not-waited-for")
    lines = explained(tmp_path, case)
    assert in_order(
        lines, "machine  shadow", "step 1   guest", "  fresh  outcome", "  seen   ", "  now    ",
        "  now    + table in frame", "  now    entry", "step 2   guest", "  fresh  P",
        "  seen   stored", "the claim fails: Departure: a store",
    )  # fmt: skip
    assert "; allowed: " in lines[-1]
    assert not any("(sets D)" in line for line in lines)


def test_without_the_mistake_the_same_program_holds(tmp_path: Path) -> None:
    case = found("the-dirty-flag-of-a-page-is-not-waited-for")
    lines = explained(tmp_path, case, "optimized")
    assert lines[-1] == "the claim holds"
    assert any("(sets D)" in line for line in lines)


def test_a_rule_that_is_broken_is_told_after_the_step_that_broke_it(tmp_path: Path) -> None:
    lines = explained(tmp_path, found("a-dropped-entry-stays-in-the-reverse-map"))
    steps_ = sum(line.startswith("step ") for line in lines)
    assert in_order(lines, "step 1   ", f"step {steps_}   ", "the claim fails: Violation: rule 3")
    assert steps_ <= 3


@pytest.mark.parametrize("design", [0, 1, 2])
def test_programs_of_every_design_are_told(tmp_path: Path, design: int) -> None:
    """Every kind of step that a word can stand for."""
    words = [(k << 12 | k * 37) << 8 | k * 8 for k in range(32)]
    draws = [("style", 0x8864), ("design", design), ("steps", len(words))]
    draws += [(f"step {k}", word) for k, word in enumerate(words)]
    case = make_case(STRUCTURE, "optimized", "random", "", draws)
    text = "\n".join(explain_case(case.save(tmp_path)))
    assert f"step {len(words)}   " in text
    assert text.endswith("the claim holds")


def test_calls_of_other_parts_are_told_one_by_one(tmp_path: Path) -> None:
    lines = explained(tmp_path, found("an-item-keeps-its-node"))
    assert in_order(lines, "ksm  ", "   1  advise(0, 0, ")
    assert any("scan() -> " in line for line in lines)
    assert lines[-1].startswith("the claim fails: ")


STEPS = [
    (steps.Load(0, 1, Access(0x8000, user=1)), "guest 0, vcpu 1: user read at"),
    (steps.Store(1, 0, Access(0x8000, 1), 9), "guest 1, vcpu 0: supervisor write at"),
    (steps.Move(0, 0, "cr3", 0x1000), "guest 0, vcpu 0: CR3 becomes 0x1000"),
    (steps.Invlpg(0, 0, 0x8000), "guest 0, vcpu 0: INVLPG 0x8000"),
    (steps.Invpcid(0, 0, 1, 2, 0), "guest 0, vcpu 0: INVPCID type 1, PCID 2, 0x0"),
    (steps.Unmap(0, 8), "host: swaps out page 8 of guest 0"),
    (steps.Migrate(0, 8), "host: migrates page 8 of guest 0"),
    (steps.SetSlot(0, 1, None), "host: memory slot 1 of guest 0 becomes none"),
    (steps.SetSlot(0, 1, programs.ROM), "becomes guest frames 0x20 to 0x21, from page 16, read"),
    (steps.Log(0, 1, True), "host: starts the dirty log of slot 1, guest 0"),
    (steps.Harvest(0, 1), "host: harvests the dirty log of slot 1, guest 0"),
    (steps.Reclaim(0, 3), "host: reclaims 3 of the tables of guest 0"),
    (steps.Evict(0, 1), "guest 0, vcpu 1: the core drops all that it has cached"),
    (steps.Scan(), "host: merges equal pages"),
    (steps.Unmerge(), "host: gives every merged page a frame of its own"),
    (steps.Collapse(1, 9), "host: makes the pages around page 9 of guest 1 one huge page"),
    (steps.Split(1, 9), "host: splits the huge page around page 9 of guest 1"),
    (steps.Rest(), "nothing"),
    ("something new", "'something new'"),
]  # fmt: skip


@pytest.mark.parametrize(("step", "text"), STEPS)
def test_a_step_is_told_in_words(step: object, text: str) -> None:
    assert text in describe_step(step)


@pytest.mark.parametrize(
    ("seen", "text"),
    [
        (steps.Loaded(5), "the value 0x5"),
        (steps.Stored(), "stored"),
        (steps.Stored((steps.DeviceWrite(0x28000, 8, 7),)), "to a device 8 bytes, 0x7, at 0x28000"),
        (steps.Faulted(4, 0x8000), "#PF, error code 0x4, CR2 0x8000"),
        (NonCanonical(), "#GP(0)"),
        (OutsideMemory(0x28000), "0x28000, where no memory is"),
        (steps.Harvested(frozenset({8, 9})), "guest frames 0x8, 0x9"),
        (steps.Done(), "done"),
        ("something new", "'something new'"),
    ],
)
def test_what_was_seen_is_told_in_words(seen: object, text: str) -> None:
    assert text in describe_seen(seen)


def test_what_the_host_moves_about_is_told() -> None:
    hypervisor = Vmm(programs.plan())
    for step, text in (
        (steps.Load(0, 0, Access(0)), "page 0 of guest 0: untouched -> in frame"),
        (steps.Migrate(0, 8), "page 8 of guest 0: in frame"),
        (steps.Unmap(0, 8), "page 8 of guest 0: in frame"),
        (steps.Log(0, 0, True), "slot 0 of guest 0: guest frames 0x0 to 0xf"),
        (steps.SetSlot(0, 1, None), "slot 1 of guest 0: guest frames 0x18 to 0x1b, from page 8 ->"),
    ):
        before = state_of(hypervisor.view())
        hypervisor.do(step)
        assert any(line.startswith(text) for line in changes(before, state_of(hypervisor.view())))
