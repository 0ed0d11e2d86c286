"""Verdicts and budgets: what an engine may spend, and what it has to say."""

import msgspec

from vapama.case import BadInput, Case

PROVED, HELD, COUNTEREXAMPLE = "proved", "held", "counterexample"
UNDECIDED, NOT_APPLICABLE = "undecided", "not applicable"
CONDITIONAL = "conditional"
"""Proved if the lemmas that it rests on are, which `vapama.proofs.ledger` decides."""


class Verdict(msgspec.Struct, kw_only=True):
    """What one engine found about one invariant of one subject.

    `detail` is the evidence in a few words (examples, executions, paths); `why` says what is wrong
    for any other status than proved or held. `known` counts the disagreements that are departures
    of the subject known by name. A proof also has: `rests_on`, the lemmas that it uses; `queries`,
    how often the solver was asked; `second_solver`, what bitwuzla says and how long it took. An
    exhaustive run over states has `states`, how many of them are distinct.
    """

    invariant: str
    engine: str
    subject: str
    status: str
    detail: str = ""
    why: str = ""
    seconds: float = 0.0
    executions: int = 0
    known: dict[str, int] = {}
    case: Case | None = None
    rests_on: tuple[str, ...] = ()
    queries: int = 0
    second_solver: str = ""
    states: int = 0

    @property
    def good(self) -> bool:
        """Whether the invariant was proved, or held in all that was tried."""
        return self.status in (PROVED, HELD)


EXIT_HELD, EXIT_COUNTEREXAMPLE, EXIT_BAD_INPUT, EXIT_UNDECIDED = 0, 1, 2, 3


def exit_status(verdicts: list[Verdict]) -> int:
    """0 if all held, 1 if there is a counterexample, else 3 if something is undecided or nothing
    was checked at all.
    """
    statuses = {v.status for v in verdicts}
    if COUNTEREXAMPLE in statuses:
        return EXIT_COUNTEREXAMPLE
    if statuses & {UNDECIDED, CONDITIONAL} or not statuses & {PROVED, HELD}:
        return EXIT_UNDECIDED
    return EXIT_HELD


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """What the engines may spend on each invariant; `atheris` is for all invariants together.

    `enough_for` is the number of invariants that can have that much: more of them share it. With
    `thrifty` such many are not all given to the engines that take long: only the lemmas are proved,
    and claims about what is made of several walks or steps are not run exhaustively. `patience` is
    how many times as much an engine may spend until it was where an invariant is to be.
    """

    name: str
    hypothesis_examples: int
    random_seconds: float
    atheris_seconds: float
    exhaustive_width: int
    enough_for: int = 1_000
    thrifty: bool = False
    patience: int = 20
    rlimit: int = 20_000_000
    hang_seconds: float = 10.0
    seed: int | None = 0
    """The seed of all random choices; None draws a fresh one."""


BUDGETS = {
    "quick": Budget(
        name="quick",
        hypothesis_examples=600,
        random_seconds=0.25,
        atheris_seconds=6,
        exhaustive_width=5,
        enough_for=10,
        thrifty=True,
    ),
    "standard": Budget(
        name="standard",
        hypothesis_examples=2_000,
        random_seconds=2,
        atheris_seconds=60,
        exhaustive_width=7,
        enough_for=30,
    ),
    "nightly": Budget(
        name="nightly",
        hypothesis_examples=50_000,
        random_seconds=120,
        atheris_seconds=3600,
        exhaustive_width=8,
        rlimit=0,
        seed=None,
    ),
}


def shared(budget: Budget, invariants: int) -> Budget:
    """The budget as so many invariants share it."""
    share = min(1.0, budget.enough_for / max(invariants, 1))
    return msgspec.structs.replace(
        budget,
        hypothesis_examples=max(1, int(budget.hypothesis_examples * share)),
        random_seconds=budget.random_seconds * share,
        patience=round(budget.patience / share),
    )


def budget_named(text: str, hang_seconds: float = 10.0) -> Budget:
    """A budget by name, or so many SECONDS for each engine over all invariants of the walk.

    A subject that gives no result for `hang_seconds` counts as hung.

    Raises `BadInput`.
    """
    if text in BUDGETS:
        return msgspec.structs.replace(BUDGETS[text], hang_seconds=hang_seconds)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        names = ", ".join(BUDGETS)
        raise BadInput(f"--budget {text}: give one of {names}, or a number of seconds")
    return Budget(
        name=f"{seconds:g} s",
        hypothesis_examples=max(10, int(seconds * 30)),
        random_seconds=seconds / 25,
        atheris_seconds=seconds,
        exhaustive_width=5 if seconds < 60 else 7,
        hang_seconds=hang_seconds,
        seed=None,
    )
