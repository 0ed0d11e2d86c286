"""Mistakes in the prover's own code: the tests must be able to fail."""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from vapama.proofs import completeness, lemmas, prover, symbolic


@pytest.fixture
def seed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Seeds a mistake in the symbolic executor: other texts for texts that stand in it once.

    Returns the mistaken module, which the prover then uses too.
    """

    def seed(*changes: tuple[str, str]) -> Any:
        source = inspect.getsource(symbolic)
        for before, after in changes:
            assert source.count(before) == 1, f"the mistake no longer fits: {before!r}"
            source = source.replace(before, after)
        mistaken = ModuleType(symbolic.__name__)
        exec(compile(source, "<mistaken>", "exec"), mistaken.__dict__)
        for module in (prover, completeness, lemmas):
            for name, value in vars(symbolic).items():
                if name in vars(module) and vars(module)[name] is value:
                    monkeypatch.setattr(module, name, getattr(mistaken, name))
        return mistaken

    return seed
