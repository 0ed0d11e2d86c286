"""When what a subject observed counts as what the reference allows."""

import pytest

from vapama.spec.memory import Sparse
from vapama.spec.outcomes import (
    PK,
    RSVD,
    EptMisconfiguration,
    EptViolation,
    NestedPageFault,
    NonCanonical,
    Outcome,
    OutsideMemory,
    P,
    PageFault,
    Translated,
    U,
    Update,
    W,
)
from vapama.spec.subject import (
    EFFECTS,
    ERROR_CODE,
    LEVEL,
    LOADS,
    PA,
    UPDATES,
    Capabilities,
    agree,
    effects,
)

ACCESSED, DIRTY = 0x20, 0x40
# The entry at 0x8 is marked accessed already; the others are not.
MEMORY = Sparse({0x8: 1 | ACCESSED, 0x10: 1, 0x18: 1}, 0x1000)
A8, A10, A18 = (Update(address, ACCESSED) for address in (0x8, 0x10, 0x18))
D18 = Update(0x18, ACCESSED | DIRTY)
PAGE = Translated(0x9ABC, 1, (A8, A10, D18))
FAULT = PageFault(P | U, (A8, A10))
OUTSIDE = OutsideMemory(0x4000, (A8, A10))
VIOLATION = EptViolation(0x181, 0x1234, (A8,), 1 << 12)
NPF = NestedPageFault(1 << 32 | P | U, 0x1234, (A10,), 0x10)


def seen(*what: str) -> Capabilities:
    return Capabilities(observes=frozenset(what))


@pytest.mark.parametrize(
    ("expected", "observed", "observes", "same"),
    [
        # Kinds
        (PAGE, PAGE, (PA, LEVEL, UPDATES), True),
        (PAGE, FAULT, (), False),
        (FAULT, PAGE, (), False),
        (FAULT, NonCanonical(), (), False),
        (NonCanonical(), NonCanonical(), (), True),
        (NonCanonical(), PageFault(0), (), False),
        (OUTSIDE, PageFault(0), (), False),
        (OUTSIDE, OutsideMemory(0x4000), (), True),
        (OUTSIDE, OutsideMemory(0x4008), (), False),
        # Only what is observed counts
        (PAGE, Translated(0x9ABD, 1, PAGE.updates), (PA,), False),
        (PAGE, Translated(0x9ABD, 1, PAGE.updates), (LEVEL, UPDATES, EFFECTS), True),
        (PAGE, Translated(0x9ABC, 2, PAGE.updates), (LEVEL,), False),
        (PAGE, Translated(0x9ABC, 2, PAGE.updates), (PA, UPDATES, EFFECTS), True),
        (PAGE, Translated(0x9ABC, 1, ()), (PA, LEVEL, ERROR_CODE, LOADS), True),
        (FAULT, PageFault(P), (ERROR_CODE,), False),
        (FAULT, PageFault(P), (PA, LEVEL, UPDATES), True),
        # Open bits of an error code
        (PageFault(P | U | PK, (), PK), PageFault(P | U), (ERROR_CODE,), True),
        (PageFault(P | U, (), PK), PageFault(P | U | PK), (ERROR_CODE,), True),
        (PageFault(P | U, (), PK), PageFault(P | U | PK | W), (ERROR_CODE,), False),
        (PageFault(P | U), PageFault(P | U | PK), (ERROR_CODE,), False),
        (PageFault(P | U | RSVD, (), PK), PageFault(P | U), (ERROR_CODE,), False),
        # Flags of a translation, as updates: the same, in the same order
        (PAGE, Translated(0x9ABC, 1, (A10, A8, D18)), (UPDATES,), False),
        (PAGE, Translated(0x9ABC, 1, (A8, A10, A18)), (UPDATES,), False),
        (PAGE, Translated(0x9ABC, 1, (A10, D18)), (UPDATES,), False),
        (PAGE, Translated(0x9ABC, 1, (A8, A10, D18, D18)), (UPDATES,), False),
        (PAGE, Translated(0x9ABC, 1, (Update(0x20, ACCESSED), A10, D18)), (UPDATES,), False),
        # Flags of a translation, as effects: the bits newly set, in any order
        (PAGE, Translated(0x9ABC, 1, (D18, A10)), (EFFECTS,), True),
        (PAGE, Translated(0x9ABC, 1, (A10, A18, Update(0x18, DIRTY))), (EFFECTS,), True),
        (PAGE, Translated(0x9ABC, 1, (A10, A18)), (EFFECTS,), False),
        (PAGE, Translated(0x9ABC, 1, (D18,)), (EFFECTS,), False),
        (PAGE, Translated(0x9ABC, 1, (*PAGE.updates, Update(0x20, ACCESSED))), (EFFECTS,), False),
        # Flags of a faulting walk: any of those that it may set
        (FAULT, PageFault(P | U, ()), (UPDATES,), True),
        (FAULT, PageFault(P | U, (A8,)), (UPDATES,), True),
        (FAULT, PageFault(P | U, (A10,)), (UPDATES,), True),
        (FAULT, PageFault(P | U, (A10,)), (EFFECTS,), True),
        (FAULT, PageFault(P | U, (A8, A10)), (UPDATES,), True),
        (FAULT, PageFault(P | U, (A18,)), (UPDATES,), False),
        (FAULT, PageFault(P | U, (A18,)), (EFFECTS,), False),
        (FAULT, PageFault(P | U, (A18,)), (ERROR_CODE,), True),
        (FAULT, PageFault(P | U, (Update(0x10, ACCESSED | DIRTY),)), (UPDATES,), False),
        (OUTSIDE, OutsideMemory(0x4000, (A10,)), (UPDATES,), True),
        (OUTSIDE, OutsideMemory(0x4000, (A18,)), (EFFECTS,), False),
        # Second stages: kinds, addresses, codes but for their open bits, flags
        (VIOLATION, EptViolation(0x181, 0x1234), (ERROR_CODE, UPDATES), True),
        (VIOLATION, EptViolation(0x181 | 1 << 12, 0x1234), (ERROR_CODE,), True),
        (VIOLATION, EptViolation(0x182, 0x1234), (ERROR_CODE,), False),
        (VIOLATION, EptViolation(0x182, 0x1234), (UPDATES,), True),
        (VIOLATION, EptViolation(0x181, 0x1235), (), False),
        (VIOLATION, EptViolation(0x181, 0x1234, (A8,)), (UPDATES,), True),
        (VIOLATION, EptViolation(0x181, 0x1234, (A10,)), (UPDATES,), False),
        (VIOLATION, EptMisconfiguration(0x1234), (), False),
        (VIOLATION, NestedPageFault(0x181, 0x1234), (), False),
        (EptMisconfiguration(0x1234), EptMisconfiguration(0x1234), (), True),
        (EptMisconfiguration(0x1234), EptMisconfiguration(0x1000), (), False),
        (EptMisconfiguration(0x1234), EptMisconfiguration(0x1234, (A10,)), (EFFECTS,), False),
        (NPF, NestedPageFault(1 << 32 | P | U | 0x10, 0x1234), (ERROR_CODE,), True),
        (NPF, NestedPageFault(1 << 33 | P | U, 0x1234), (ERROR_CODE,), False),
        (NPF, NestedPageFault(1 << 32 | P | U, 0x1238), (ERROR_CODE,), False),
        (NPF, NestedPageFault(1 << 32 | P | U, 0x1234, (A18,)), (UPDATES,), False),
    ],
)
def test_a_subject_agrees_if_all_that_it_observes_is_allowed(
    expected: Outcome, observed: Outcome, observes: tuple[str, ...], same: bool
) -> None:
    assert agree(expected, observed, MEMORY, seen(*observes)) is same


@pytest.mark.parametrize("garbage", [None, "0x9abc", 0x9ABC, (0x9ABC, 1, ()), Translated])
def test_what_is_no_outcome_never_agrees(garbage: Outcome) -> None:
    for expected in (PAGE, FAULT, OUTSIDE, NonCanonical()):
        assert agree(expected, garbage, MEMORY, seen()) is False


def test_effects_are_the_bits_newly_set_by_address() -> None:
    assert effects((A8, A10, A18, Update(0x18, DIRTY)), MEMORY) == {
        0x10: ACCESSED,
        0x18: ACCESSED | DIRTY,
    }
