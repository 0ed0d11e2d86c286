"""Falsehoods attempted through lemmas: each must be refused or refuted, for the reason given.

The lemma is that the one-stage walk equals its reference; what rests on it are claims about two
walks. The true siblings show that lemmas prove something.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from vapama.bugs.mistakes import MISTAKES
from vapama.impl.kernels import long_mode
from vapama.impl.optimized import Entries, Marks, Optimized, access_word, controls
from vapama.proofs.ledger import Circular, settle, with_lemmas
from vapama.proofs.prover import Options, prove, prove_ledger
from vapama.runs import Guarded
from vapama.spec import paging
from vapama.spec.access import Access
from vapama.spec.cpu import Cpu
from vapama.spec.memory import Altered, Counted, Marked, Memory
from vapama.spec.nondet import (
    LONG_MODE,
    PAE_PAGING,
    Claim,
    Invariant,
    Nondet,
    Reject,
    load_invariants,
)
from vapama.spec.outcomes import Outcome, PageFault, Translated
from vapama.spec.subject import TRANSLATE, agree
from vapama.spec.words import low_bits
from vapama.verdict import (
    CONDITIONAL,
    COUNTEREXAMPLE,
    EXIT_UNDECIDED,
    PROVED,
    UNDECIDED,
    Verdict,
    exit_status,
)

KNOWN = load_invariants()
WALK = KNOWN["the_walk_equals_the_reference"]
EQUATES = (paging.translate, "translate")


@pytest.fixture(autouse=True)
def _few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vapama.proofs.prover.WITNESS_RUNS", 20_000)


def lemma(claim: Claim) -> Invariant:
    return replace(resting(claim), equates=EQUATES)


def resting(
    claim: Claim, *uses: Invariant, reaches: tuple[str, ...] = (), needs: tuple[str, ...] = ()
) -> Invariant:
    names = tuple(i.name for i in uses)
    return Invariant(
        claim.__name__, claim, "a test", reaches, frozenset(needs), twin="", bound="", uses=names
    )


def verdict_on(claim: Claim, *uses: Invariant, subject: Any = None, **more: Any) -> Verdict:
    known = {**KNOWN, **{i.name: i for i in uses}}
    guarded = Guarded("test", subject or Optimized())
    return prove(resting(claim, *uses, **more), guarded, Options(twin=False, lemmas=known))


def walks(nondet: Nondet, subject: Any) -> tuple[Cpu, Memory, Access, Outcome, Outcome]:
    """A walk's inputs, the reference's outcome and the subject's."""
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    expected = paging.translate(cpu, memory, access)
    return cpu, memory, access, expected, subject.translate(cpu, memory, access)


def two_walks_are_as_the_reference_has_them(nondet: Nondet, subject: Any) -> None:
    cpu, memory, access, expected, ours = walks(nondet, subject)
    if not isinstance(expected, Translated) or not isinstance(ours, Translated):
        assert agree(expected, ours, memory, subject.capabilities)
        return
    nondet.reach("first")
    theirs = paging.translate(cpu, memory, access._replace(address=expected.pa))
    again = subject.translate(cpu, memory, access._replace(address=ours.pa))
    assert agree(theirs, again, memory, subject.capabilities)
    if isinstance(theirs, Translated) and isinstance(again, Translated):
        nondet.reach("second")
        assert expected.updates + theirs.updates == ours.updates + again.updates


def test_two_walks_are_proved_without_looking_into_either() -> None:
    verdict = verdict_on(two_walks_are_as_the_reference_has_them, WALK, reaches=("first", "second"))
    assert (verdict.status, verdict.why) == (CONDITIONAL, "")
    assert verdict.executions < 40
    assert verdict.rests_on == (WALK.name,)
    assert verdict.second_solver.startswith("valid")


def test_nothing_stays_replaced_after_a_proof() -> None:
    before = paging.translate, long_mode.walk
    verdict_on(two_walks_are_as_the_reference_has_them, WALK)
    assert (paging.translate, long_mode.walk) == before


# False claims on true lemmas: by claim, the status and what is said about it.

FALSE: dict[str, tuple[Claim, str, str]] = {}


def false(status: str, why: str) -> Callable[[Claim], Claim]:
    def add(claim: Claim) -> Claim:
        FALSE[claim.__name__] = claim, status, why
        return claim

    return add


@false(COUNTEREXAMPLE, "")
def a_walk_leads_to_its_own_address(nondet: Nondet, subject: Any) -> None:
    _, _, access, expected, *_ = walks(nondet, subject)
    if isinstance(expected, Translated):
        assert expected.pa == access.address


@false(COUNTEREXAMPLE, "")
def the_second_walk_faults_as_the_first_would(nondet: Nondet, subject: Any) -> None:
    cpu, memory, access, expected, *_ = walks(nondet, subject)
    if isinstance(expected, Translated):
        other = access._replace(address=expected.pa)
        again = subject.translate(cpu, memory, other)
        assert not isinstance(again, PageFault)


@false(COUNTEREXAMPLE, "")
def a_walk_through_other_memory_is_the_same(nondet: Nondet, subject: Any) -> None:
    cpu, memory, access, expected, *_ = walks(nondet, subject)
    marked = Marked(memory, [(cpu.cr3 & 0xFF000, 0x1000)])
    assert agree(expected, subject.translate(cpu, marked, access), memory, subject.capabilities)


@false(COUNTEREXAMPLE, "")
def a_walk_for_another_access_is_the_same(nondet: Nondet, subject: Any) -> None:
    cpu, memory, access, expected, *_ = walks(nondet, subject)
    nondet.assume(access.fetch == 0)
    ours = subject.translate(cpu, memory, access._replace(write=1, implicit=0))
    assert type(expected) is type(ours)


@false(UNDECIDED, "whose contents are not known")
def a_walk_through_memory_of_another_kind_is_the_same(nondet: Nondet, subject: Any) -> None:
    cpu, memory, access, expected, *_ = walks(nondet, subject)
    other = subject.translate(cpu, Altered(memory, 0x200), access)
    assert type(expected) is type(other)


@false(UNDECIDED, "is used where it says nothing: its access may be outside of the lemma's domain")
def a_write_that_is_a_fetch_too_is_an_access(nondet: Nondet, subject: Any) -> None:
    cpu, memory = nondet.cpu(), nondet.memory("guest")
    access = Access(nondet.word("address"), write=1, fetch=1)
    expected = paging.translate(cpu, memory, access)
    assert agree(expected, subject.translate(cpu, memory, access), memory, subject.capabilities)


@false(UNDECIDED, "is used where it says nothing: no draw gives this Cpu")
def a_root_beyond_maxphyaddr_is_a_root(nondet: Nondet, subject: Any) -> None:
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    cpu = type(cpu)._make(cpu._replace(cr3=nondet.word("root") & low_bits(52)))
    expected = paging.translate(cpu, memory, access)
    assert agree(expected, subject.translate(cpu, memory, access), memory, subject.capabilities)


@false(UNDECIDED, "which flags are set is looked at one by one")
def at_most_three_flags_are_set(nondet: Nondet, subject: Any) -> None:
    *_, expected, _ = walks(nondet, subject)
    if isinstance(expected, Translated):
        assert len(expected.updates) <= 3


@false(UNDECIDED, "cannot be told")
def the_flags_of_two_walks_are_those_of_one(nondet: Nondet, subject: Any) -> None:
    *_, expected, ours = walks(nondet, subject)
    if isinstance(expected, Translated) and isinstance(ours, Translated):
        assert expected.updates == ours.updates + ours.updates


@false(UNDECIDED, "cannot be told")
def flags_are_never_set_in_another_order(nondet: Nondet, subject: Any) -> None:
    cpu, memory, access, expected, *_ = walks(nondet, subject)
    other = paging.translate(cpu, memory, access._replace(address=access.address ^ 8))
    if isinstance(expected, Translated) and isinstance(other, Translated):
        try:
            same = expected.updates + other.updates == other.updates + expected.updates
        except Exception:
            return
        assert not same


@false(UNDECIDED, "it fails under its lemmas, which may say too little")
def what_no_lemma_says_is_not_known(nondet: Nondet, subject: Any) -> None:
    _, _, access, expected, *_ = walks(nondet, subject)
    if isinstance(expected, Translated):
        assert (expected.pa ^ access.address) & 0xFFF == 0


@false(UNDECIDED, "it fails under its lemmas, which may say too little")
def a_walk_loads_few_entries_though_no_lemma_says_so(nondet: Nondet, subject: Any) -> None:
    cpu, memory, access, *_ = walks(nondet, subject)
    counted = Counted(memory)
    subject.translate(cpu, counted, access)
    assert counted.count <= 7


@pytest.mark.parametrize("name", FALSE)
def test_a_falsehood_does_not_pass(name: str) -> None:
    claim, status, why = FALSE[name]
    verdict = verdict_on(claim, WALK)
    assert verdict.status == status
    assert why in verdict.why
    if status == COUNTEREXAMPLE:
        assert verdict.case is not None


def the_low_bits_stay(nondet: Nondet, subject: Any) -> None:
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    ours = subject.translate(cpu, memory, access)
    if isinstance(ours, Translated) and (ours.pa ^ access.address) & 0xFFF != 0:
        raise AssertionError  # for pytest has `assert` make texts of words, which is seen


def test_what_a_lemma_says_is_known() -> None:
    lemmas = WALK, resting(the_low_bits_stay, needs=(TRANSLATE,))
    assert verdict_on(what_no_lemma_says_is_not_known, *lemmas).status == CONDITIONAL
    # But only at the calls of the reference: a claim on the subject alone makes none.
    assert verdict_on(the_low_bits_stay, WALK).status == UNDECIDED


# A lemma about a step of a walk, which is a word.

ADDRESS = KNOWN["the_address_without_metadata_equals_the_reference"]


def masked_walks(nondet: Nondet, subject: Any) -> tuple[Cpu, Access, Any, Any]:
    """A masked access, the reference's address of it and the subject's."""
    cpu, _, access = nondet.walk(LONG_MODE)
    nondet.assume(cpu.masks != 0)
    expected = paging.without_metadata(cpu, access)
    return cpu, access, expected, subject.without_metadata(cpu, access)


def a_step_is_as_the_reference_has_it(nondet: Nondet, subject: Any) -> None:
    _, _, expected, ours = masked_walks(nondet, subject)
    if expected >> 3 != ours >> 3:
        raise AssertionError


def a_step_changes_nothing(nondet: Nondet, subject: Any) -> None:
    _, access, expected, _ = masked_walks(nondet, subject)
    if expected != access.address:
        raise AssertionError


def a_step_is_the_same_for_reads(nondet: Nondet, subject: Any) -> None:
    cpu, access, expected, _ = masked_walks(nondet, subject)
    if subject.without_metadata(cpu, access._replace(fetch=0, write=0, implicit=0)) != expected:
        raise AssertionError


def test_a_lemma_may_be_about_a_word() -> None:
    proved = verdict_on(a_step_is_as_the_reference_has_it, ADDRESS)
    assert (proved.status, proved.executions) == (CONDITIONAL, 2)  # one of them without masks
    for claim in a_step_changes_nothing, a_step_is_the_same_for_reads:
        assert verdict_on(claim, ADDRESS).status == COUNTEREXAMPLE


def test_a_lemma_says_nothing_of_what_it_is_not_about() -> None:
    verdict = verdict_on(what_no_lemma_says_is_not_known, WALK, resting(the_low_bits_stay))
    assert verdict.status == UNDECIDED


def test_a_lemma_about_another_kind_of_state_says_nothing() -> None:
    def anywhere(nondet: Nondet, subject: Any) -> None:
        cpu, access = nondet.cpu(PAE_PAGING), nondet.access(PAE_PAGING)
        if paging.without_metadata(cpu, access) > low_bits(64):
            raise AssertionError

    assert verdict_on(anywhere, ADDRESS).status != CONDITIONAL


RARE = 0x1234_5678_9ABC
"""An address that no run on plain ints happens to draw."""


def the_low_bits_stay_but_at_one_address(nondet: Nondet, subject: Any) -> None:
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    if access.address != RARE:
        ours = subject.translate(cpu, memory, access)
        if isinstance(ours, Translated) and (ours.pa ^ access.address) & 0xFFF != 0:
            raise AssertionError


def at_one_address_nothing_is_said_of_low_bits(nondet: Nondet, subject: Any) -> None:
    if nondet.access().address == RARE:
        nondet.cpu(), nondet.memory("guest")
        return
    the_low_bits_stay_but_at_one_address(nondet, subject)


def it_is_not_that_address(nondet: Nondet, subject: Any) -> None:
    _, _, access, *_ = walks(nondet, subject)
    if access.address == RARE:
        raise AssertionError


SUPPOSING = {
    "the first of a lemma's ways alone is supposed": (
        the_low_bits_stay_but_at_one_address,
        "_any_of([_all_of(way) for way in ways])",
        "_all_of(ways[0])",
    ),
    "the last of a lemma's ways alone is supposed": (
        at_one_address_nothing_is_said_of_low_bits,
        "_any_of([_all_of(way) for way in ways])",
        "_all_of(ways[-1])",
    ),
    "what one way of a lemma says is known": (
        the_low_bits_stay_but_at_one_address,
        "if all(any((f.number, f.negated) == same for f in others) for others in facts[1:]):",
        "if True:",
    ),
}


@pytest.mark.parametrize("name", SUPPOSING)
def test_all_ways_of_a_lemma_are_supposed(name: str, seed: Callable[..., Any]) -> None:
    lemma, before, after = SUPPOSING[name]
    lemmas = WALK, resting(lemma, needs=(TRANSLATE,))
    assert verdict_on(it_is_not_that_address, *lemmas).status == COUNTEREXAMPLE
    seed((before, after))
    assert verdict_on(it_is_not_that_address, *lemmas).status == CONDITIONAL


# Lemmas that are not what they should be.


def says_nothing(nondet: Nondet, subject: Any) -> None:
    nondet.cpu(), nondet.memory("guest"), nondet.access()


def says_only_the_kind(nondet: Nondet, subject: Any) -> None:
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    expected = paging.translate(cpu, memory, access)
    if type(expected) is not type(subject.translate(cpu, memory, access)):
        raise AssertionError  # for pytest has `assert` make texts of words, which is seen


def is_about_users_alone(nondet: Nondet, subject: Any) -> None:
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    nondet.assume(access.user == 1)
    expected = paging.translate(cpu, memory, access)
    assert agree(expected, subject.translate(cpu, memory, access), memory, subject.capabilities)


def is_about_a_memory_that_holds_something(nondet: Nondet, subject: Any) -> None:
    cpu, memory, access = nondet.cpu(), nondet.memory("guest", [(0, 1)]), nondet.access()
    expected = paging.translate(cpu, memory, access)
    assert agree(expected, subject.translate(cpu, memory, access), memory, subject.capabilities)


def draws_more_than_a_call_has(nondet: Nondet, subject: Any) -> None:
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    memory = Marked(memory, [(nondet.word("at"), 0x20)])
    expected = paging.translate(cpu, memory, access)
    assert agree(expected, subject.translate(cpu, memory, access), memory, subject.capabilities)


def compares_something_else(nondet: Nondet, subject: Any) -> None:
    cpu, memory, access = nondet.cpu(), nondet.memory("guest"), nondet.access()
    access = access._replace(address=0)
    expected = paging.translate(cpu, memory, access)
    assert agree(expected, subject.translate(cpu, memory, access), memory, subject.capabilities)


def says_nothing_of_some_calls(nondet: Nondet, subject: Any) -> None:
    _, memory, access, expected, ours = walks(nondet, subject)
    if access.user == 1:
        raise Reject
    assert agree(expected, ours, memory, subject.capabilities)


UNFIT: dict[Claim, str] = {
    says_nothing: "does not settle the kind of an outcome",
    says_only_the_kind: "it cannot be told whether the same flags are set",
    says_nothing_of_some_calls: "is used where it says nothing",
    is_about_users_alone: "is used where it says nothing: its assumption may not hold",
    is_about_a_memory_that_holds_something: "is about a memory with given entries",
    draws_more_than_a_call_has: "draws at, which a call does not have",
    compares_something_else: "asks for the reference at others than its draws",
}


@pytest.mark.parametrize("claim", UNFIT)
def test_a_lemma_that_does_not_fit_proves_nothing(claim: Claim) -> None:
    verdict = verdict_on(two_walks_are_as_the_reference_has_them, lemma(claim))
    assert verdict.status == UNDECIDED
    assert UNFIT[claim] in verdict.why


def test_a_lemma_about_nothing_replaces_nothing() -> None:
    verdict = verdict_on(two_walks_are_as_the_reference_has_them, resting(the_low_bits_stay))
    assert verdict.status == UNDECIDED
    assert "do not say what they are about" in verdict.why


# Subjects that see through what stands in the place of their kernels.


class Peeks(Optimized):
    """Looks at what the walk wrote into its path."""

    def translate(self, cpu: Any, memory: Memory, access: Access) -> Outcome:
        outcome = super().translate(cpu, memory, access)
        path: list[Any] = [0] * 6
        walk_into(path, cpu, memory, access)
        if isinstance(outcome, Translated) and path[1] == 5:
            outcome.pa = 0
        return outcome


class MarksAnothersPath(Optimized):
    """Sets the flags of two paths mixed."""

    def translate(self, cpu: Any, memory: Memory, access: Access) -> Outcome:
        first: list[Any] = [0] * 6
        second: list[Any] = [0] * 6
        walk_into(first, cpu, memory, access)
        walk_into(second, cpu, memory, access._replace(address=0))
        long_mode.mark(Marks(), 4, 1, 0, [*first[:3], *second[3:]])
        return super().translate(cpu, memory, access)


def walk_into(path: list[Any], cpu: Cpu, memory: Memory, access: Access) -> None:
    words = (*controls(cpu), access.address, access_word(access))
    long_mode.walk(Entries(memory), memory.limit >> 3, *words, path)


@pytest.mark.parametrize(
    ("subject", "why"),
    [
        (Peeks(), "what a kernel wrote is looked at"),
        (MarksAnothersPath(), "is given a path that is not one kernel's"),
    ],
)
def test_a_subject_cannot_look_behind_a_lemma(subject: Any, why: str) -> None:
    verdict = verdict_on(two_walks_are_as_the_reference_has_them, WALK, subject=subject)
    assert verdict.status == UNDECIDED
    assert why in verdict.why


# The ledger.


def test_no_proof_counts_that_rests_on_one_which_failed() -> None:
    twice = resting(two_walks_are_as_the_reference_has_them, WALK)
    known = {**KNOWN, twice.name: twice}
    for mistake in ("smep-is-ignored", "reads-set-dirty"):
        subject = Guarded(mistake, MISTAKES[mistake].subject())
        lemma, verdict = prove_ledger([twice], subject, Options(twin=False, lemmas=known))
        assert (lemma.invariant, lemma.status) == (WALK.name, COUNTEREXAMPLE)
        assert verdict.status != PROVED


def test_a_proof_counts_if_its_lemmas_are_proved() -> None:
    twice = resting(two_walks_are_as_the_reference_has_them, WALK)
    subject = Guarded("optimized", Optimized())
    options = Options(twin=False, lemmas={**KNOWN, twice.name: twice})
    assert [v.status for v in prove_ledger([twice], subject, options)] == [PROVED, PROVED]


def conditional(name: str, *rests_on: str, subject: str = "optimized") -> Verdict:
    return Verdict(
        invariant=name, engine="z3", subject=subject, status=CONDITIONAL, rests_on=rests_on
    )


def proved(name: str, subject: str = "optimized", engine: str = "z3") -> Verdict:
    return Verdict(invariant=name, engine=engine, subject=subject, status=PROVED)


def test_conditional_proofs_that_are_not_settled_count_for_nothing() -> None:
    assert not conditional("a", "b").good
    assert exit_status([proved("b"), conditional("a", "b")]) == EXIT_UNDECIDED


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [
        ([conditional("a", "b"), proved("b")], PROVED),
        ([conditional("a", "b"), conditional("b", "c"), proved("c")], PROVED),
        ([conditional("a", "b")], UNDECIDED),
        ([conditional("a", "b"), proved("b", "another subject")], UNDECIDED),
        ([conditional("a", "b", "c"), proved("b")], UNDECIDED),
        ([conditional("a", "b"), conditional("b", "c")], UNDECIDED),
        ([conditional("a", "a")], UNDECIDED),
        ([conditional("a", "b"), conditional("b", "a")], UNDECIDED),
        ([conditional("a", "b"), conditional("b", "c"), conditional("c", "b")], UNDECIDED),
        ([conditional("a", "b"), proved("b", engine="random")], UNDECIDED),
    ],
)
def test_a_conditional_proof_is_settled_by_what_it_rests_on(
    verdicts: list[Verdict], status: str
) -> None:
    settle(verdicts)
    assert verdicts[0].status == status
    assert all(v.status in (PROVED, UNDECIDED) for v in verdicts)


def test_circles_and_unknown_lemmas_are_refused() -> None:
    a = replace(WALK, name="a", uses=("b",))
    b = replace(WALK, name="b", uses=("a",))
    alone = replace(WALK, name="alone", uses=("alone",))
    lost = replace(WALK, name="lost", uses=("nowhere",))
    known = {i.name: i for i in (a, b, alone, lost)}
    for invariant, why in (
        (a, "rests on itself: a on b on a"),
        (alone, "rests on itself: alone on alone"),
        (lost, "rests on nowhere, which is unknown"),
    ):
        with pytest.raises(Circular, match=why):
            with_lemmas([invariant], known)
        verdict = prove(invariant, Guarded("test", Optimized()), Options(lemmas=known))
        assert verdict.status == UNDECIDED
        assert why in verdict.why


def test_lemmas_come_before_what_rests_on_them() -> None:
    top = replace(WALK, name="top", uses=("left", "right"))
    left = replace(WALK, name="left", uses=("base",))
    right = replace(WALK, name="right", uses=("base",))
    base = replace(WALK, name="base")
    known = {i.name: i for i in (top, left, right, base)}
    names = [i.name for i in with_lemmas([top], known)]
    assert names == ["base", "left", "right", "top"]
