"""Toy invariants, and subjects behind their guard."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from vapama.runs import Guarded
from vapama.spec.nondet import Claim, Invariant
from vapama.spec.outcomes import PageFault
from vapama.subjects import Reference, load_subject


@pytest.fixture(scope="session")
def toy() -> Callable[..., Invariant]:
    """Makes an invariant of a claim, which is not registered."""

    def make(claim: Claim, reaches: Sequence[str] = ()) -> Invariant:
        return Invariant(claim.__name__, claim, "nowhere", tuple(reaches), frozenset(), "", "")

    return make


@pytest.fixture(scope="session")
def reference() -> Guarded:
    return load_subject("reference")


class Departing(Reference):
    """Refuses every user access, which is known of it, and what else its `also` says."""

    def __init__(self, also: Callable[[Any], bool] = lambda access: False) -> None:
        self.also = also

    def translate(self, cpu: Any, memory: Any, access: Any) -> Any:
        if access.user or self.also(access):
            return PageFault(0x3F)
        return Reference.translate(cpu, memory, access)

    def departure(self, cpu: Any, memory: Any, access: Any, *outcomes: Any) -> str | None:
        return "users-are-refused" if access.user else None


@pytest.fixture(scope="session")
def departing() -> type[Departing]:
    return Departing
