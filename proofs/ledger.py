"""The ledger: which proof rests on which, and which of them count.

A proof that uses lemmas is conditional when the prover returns it. It counts once each lemma was
proved, of the same subject, in the same ledger; and none counts that rests on itself.
"""

from collections.abc import Iterable, Mapping, Sequence

from vapama.spec.nondet import Invariant
from vapama.verdict import CONDITIONAL, PROVED, UNDECIDED, Verdict


class Circular(ValueError):
    """Proofs that rest on each other, or on one that does not exist."""


def with_lemmas(invariants: Iterable[Invariant], known: Mapping[str, Invariant]) -> list[Invariant]:
    """The invariants and all that their proofs rest on, each lemma before what rests on it.

    Raises `Circular`.
    """
    ordered: dict[str, Invariant] = {}

    def add(invariant: Invariant, above: tuple[str, ...]) -> None:
        if invariant.name in above:
            circle = " on ".join([*above[above.index(invariant.name) :], invariant.name])
            raise Circular(f"a proof rests on itself: {circle}")
        if invariant.name in ordered:
            return
        for name in invariant.uses:
            if name not in known:
                raise Circular(f"the proof of {invariant.name} rests on {name}, which is unknown")
            add(known[name], (*above, invariant.name))
        ordered[invariant.name] = invariant

    for invariant in invariants:
        add(invariant, ())
    return list(ordered.values())


def settle(verdicts: Sequence[Verdict]) -> None:
    """Decide the conditional verdicts: proved if all they rest on is, else undecided, and why."""
    by_name = {(v.invariant, v.subject, v.engine): v for v in verdicts}

    def settled(verdict: Verdict, above: tuple[str, ...]) -> None:
        if verdict.status != CONDITIONAL:
            return
        failing = []
        for name in verdict.rests_on:
            lemma = by_name.get((name, verdict.subject, verdict.engine))
            if lemma is None:
                failing.append(f"{name}, which was not proved here")
            elif name in above:
                failing.append(f"{name}, which rests on it")
            else:
                settled(lemma, (*above, verdict.invariant))
                if lemma.status != PROVED:
                    failing.append(f"{name}: {lemma.status}")
        verdict.status = UNDECIDED if failing else PROVED
        if failing:
            verdict.why = f"it rests on {'; '.join(failing)}"

    for verdict in verdicts:
        settled(verdict, (verdict.invariant,))
