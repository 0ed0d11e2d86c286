"""The pytest plugin: ``pytest --vapama-subject mymmu:Mine`` adds a test for each invariant.

Thin on purpose: pytest loads it in every session, and only the option loads the package.
"""

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("vapama", "address translation")
    group.addoption(
        "--vapama-subject",
        action="append",
        default=[],
        metavar="SUBJECT",
        help="check this implementation: a short name or module:factory (may be repeated)",
    )
    group.addoption(
        "--vapama-examples",
        type=int,
        default=500,
        metavar="N",
        help="Hypothesis examples for each invariant (500)",
    )


def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add a test for each invariant and subject asked for."""
    names = config.getoption("--vapama-subject")
    if names and not __debug__:
        raise pytest.UsageError("run Python without -O: the invariants are asserts")
    for name in names:
        from vapama.case import BadInput
        from vapama.spec.nondet import load_invariants
        from vapama.subjects import load_subject

        try:
            load_subject(name)
        except BadInput as error:
            raise pytest.UsageError(str(error)) from None
        parent: Any = session
        for invariant in load_invariants():
            items.append(
                InvariantItem.from_parent(
                    parent, name=f"{name}::{invariant}", claim=(name, invariant)
                )
            )


class InvariantItem(pytest.Item):
    """One invariant of one subject, checked by Hypothesis."""

    def __init__(self, *, claim: tuple[str, str], **rest: Any) -> None:
        super().__init__(**rest)
        self.subject_name, self.invariant_name = claim

    def runtest(self) -> None:
        """Run the examples; fail with the shrunk Case, skip what the subject does not observe."""
        from vapama.fuzz import hypothesis_engine
        from vapama.spec.nondet import load_invariants
        from vapama.subjects import load_subject

        subject = load_subject(self.subject_name)
        invariant = load_invariants()[self.invariant_name]
        lacking = subject.lacks(invariant)
        if lacking:
            pytest.skip(f"{self.subject_name} does not observe {', '.join(sorted(lacking))}")
        examples = self.config.getoption("--vapama-examples")
        verdict = hypothesis_engine.run(invariant, subject, examples)
        if not verdict.good:
            case = verdict.case.to_json().decode() if verdict.case else ""
            pytest.fail(f"{verdict.status}: {verdict.why}\n{case}", pytrace=False)

    def reportinfo(self) -> tuple[str, int, str]:
        """Where it stands in reports."""
        return "vapama", 0, self.name
