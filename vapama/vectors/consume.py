"""Test vectors put to a subject."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vapama.runs import Guarded, SubjectHung, SubjectRaised, hang_guard
from vapama.spec.cpu import Cpu
from vapama.spec.nondet import Reject
from vapama.spec.outcomes import Outcome
from vapama.spec.subject import agree
from vapama.vectors.form import Vector
from vapama.vectors.questions import KINDS, draws_of
from vapama.verdict import EXIT_COUNTEREXAMPLE, EXIT_HELD, EXIT_UNDECIDED


@dataclass
class Result:
    """What came of vectors: how many passed, which failed and how, and why others were skipped.

    `known` counts departures of the subject known by name.
    """

    passed: int = 0
    failed: list[tuple[Vector, str]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """How many vectors there were."""
        return self.passed + len(self.failed) + self.skipped.total() + self.known.total()

    @property
    def status(self) -> int:
        """1 if a vector failed, 0 if none did and some passed, else 3."""
        if self.failed:
            return EXIT_COUNTEREXAMPLE
        return EXIT_HELD if self.passed else EXIT_UNDECIDED


def consume(
    vectors: Iterable[Vector],
    subject: Guarded,
    hang_seconds: float,
    describe: Callable[[Outcome], str],
    progress: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Put each vector to the subject. Outcomes are told by `describe`."""
    result = Result()
    with hang_guard(hang_seconds) as alive:
        for vector in vectors:
            alive()
            _put(vector, subject, describe, result)
            progress(result)
    return result


def _put(
    vector: Vector, subject: Guarded, describe: Callable[[Outcome], str], result: Result
) -> None:
    why = _not_for(vector, subject)
    if why:
        result.skipped[why] += 1
        return
    question = vector.question
    try:
        observed = question.ask(subject)
    except Reject:
        result.skipped["it does not cover the case"] += 1
    except SubjectRaised as error:
        result.failed.append((vector, f"the subject raised {error}"))
    except SubjectHung as error:
        result.failed.append((vector, str(error)))
    else:
        right = (
            agree(expected, observed, question.memory, subject.capabilities)
            for expected in vector.acceptable
        )
        if any(right):
            result.passed += 1
            return
        departure = _departure(vector, subject, observed)
        if departure:
            result.known[departure] += 1
        else:
            result.failed.append((vector, describe(observed)))


def _not_for(vector: Vector, subject: Guarded) -> str:
    """Why a vector is not for this subject, if it is not."""
    kind = KINDS[vector.kind]
    if subject.lacks(kind.invariant):
        return f"it does not observe {kind.needs}"
    narrow = subject.capabilities.narrow
    if narrow:
        for name, value in draws_of(kind, vector.question, vector.entries).items():
            if name in narrow and not narrow[name].holds(value):
                return f"it cannot take this {name}"
    return ""


def _departure(vector: Vector, subject: Guarded, observed: Outcome) -> str | None:
    """The departure, known by name, that a wrong outcome is."""
    state, memory, access, stage = vector.question
    one_stage = isinstance(state, Cpu) and stage is None
    if not one_stage or not hasattr(subject.subject, "departure"):
        return None
    expected = vector.acceptable[0]
    name: str | None = subject.subject.departure(state, memory, access, expected, observed)
    return name
