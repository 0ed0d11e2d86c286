"""The registry of invariants."""

from vapama.spec.nondet import load_invariants


def test_the_order_of_invariants_is_that_of_their_modules_whichever_was_imported_first() -> None:
    modules = [invariant.claim.__module__ for invariant in load_invariants().values()]
    assert modules == sorted(modules)
