"""What `vapama check` checks: which engines on which subjects, as jobs, and what came of it."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from vapama.case import BadInput
from vapama.jobs import SNAPSHOT, Agreed, Event, Job, run_jobs
from vapama.proofs.ledger import Circular, settle, with_lemmas
from vapama.snapshot import truth
from vapama.spec.nondet import Invariant, load_invariants
from vapama.subjects import load_subject
from vapama.verdict import (
    COUNTEREXAMPLE,
    EXIT_COUNTEREXAMPLE,
    EXIT_UNDECIDED,
    Budget,
    Verdict,
    exit_status,
    shared,
)

ENGINES = ("z3", "exhaustive", "random", "hypothesis", "atheris")
WALK = "the_walk_equals_the_reference"
NARROWER = 2
"""How much narrower the exhaustive scope of a composed claim is than that of others."""
THRIFT = "proves the lemmas alone, and runs no program, batch or walk of two stages exhaustively"
UNICORN_SHARE = 20
"""How many times an invariant's random time the second opinion gets for its one invariant."""


@dataclass
class Report:
    """All that a check found, as it comes in."""

    budget: Budget
    verdicts: list[Verdict] = field(default_factory=list)
    agreements: list[Agreed] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    coverage: str = ""
    wants_snapshot: bool = False

    @property
    def status(self) -> int:
        """The exit status: see `vapama.verdict`."""
        status = exit_status(self.verdicts)
        if any(not agreed.good for agreed in self.agreements):
            return EXIT_COUNTEREXAMPLE
        if self.wants_snapshot and not self.agreements:
            return status or EXIT_UNDECIDED
        return status

    @property
    def counterexamples(self) -> list[Verdict]:
        """The verdicts that are counterexamples."""
        return [v for v in self.verdicts if v.status == COUNTEREXAMPLE]


def chosen_invariants(names: Sequence[str]) -> list[Invariant]:
    """The invariants of these names, or all. Raises `BadInput`."""
    registry = load_invariants()
    for name in names:
        if name not in registry:
            close = _closest(name, registry)
            raise BadInput(f"no invariant is named {name}{close}; see `vapama list`")
    return [registry[name] for name in names] if names else list(registry.values())


def _closest(name: str, known: dict[str, Invariant]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def chosen_engines(text: str) -> tuple[str, ...]:
    """The engines named in a comma-separated list. Raises `BadInput`."""
    engines = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [e for e in engines if e not in ENGINES]
    if unknown or not engines:
        raise BadInput(f"--engines {text}: give some of {', '.join(ENGINES)}")
    return engines


def plan(
    invariants: list[Invariant],
    engines: Sequence[str],
    budget: Budget,
    subject: str | None = None,
    guest: Path | None = None,
    cases: Sequence[Path] = (),
) -> tuple[list[Job], dict[str, str]]:
    """The jobs of a check, and what is skipped and why.

    With a subject, every engine that can runs on it. Without, the optimized kernels are checked by
    every engine, their compiled form and the second opinions at random, and the guest's tables.
    With proofs come the lemmas that they rest on. Raises `BadInput`.
    """
    names = tuple(i.name for i in invariants)
    whole, budget = budget, shared(budget, len(names))
    jobs: list[Job] = []
    proofs: list[str] = []
    scopes: list[Invariant] = []
    skipped: dict[str, str] = {}

    def job(engine: str, of: str, names: Sequence[str], budget: Budget = budget) -> None:
        files = tuple(map(str, cases))
        jobs.append(
            Job(engine=engine, subject=of, invariants=tuple(names), budget=budget, cases=files)
        )

    main = subject or "optimized"
    symbolic = load_subject(main).capabilities.symbolic
    thrifty = budget.thrifty and len(names) > budget.enough_for
    if thrifty:
        skipped["what takes long"] = f"budget {budget.name} {THRIFT}"
    for engine in engines:
        if engine == "z3" and not symbolic:
            skipped["z3"] = f"{main} runs on plain ints only"
        elif engine == "atheris" and importlib.util.find_spec("atheris") is None:
            skipped["atheris"] = "not installed: pip install 'vapama[atheris]'"
        elif engine == "z3":
            proofs = _proofs([i for i in invariants if i.equates or not thrifty])
        elif engine == "exhaustive":
            scopes = [i for i in invariants if not (thrifty and i.is_composed)]
        else:
            job(engine, main, names)
    if subject is None and "random" in engines:
        job("random", "compiled", names)
        if WALK not in names:
            pass
        elif importlib.util.find_spec("unicorn") is None:
            skipped["unicorn"] = "not installed: pip install 'vapama[unicorn]'"
        else:
            job("random", "unicorn", (WALK,), _scaled(budget if thrifty else whole, UNICORN_SHARE))
        if WALK in names and budget.name == "nightly":
            why = kvm_is_missing()
            if why:
                skipped["kvm"] = why
            else:
                job("random", "kvm", (WALK,), _scaled(budget if thrifty else whole, UNICORN_SHARE))
    if guest is not None:
        jobs.append(
            Job(engine=SNAPSHOT, subject="", invariants=(), budget=budget, snapshot=str(guest))
        )
    # What takes long comes last, each a job of its own, to fill the processors evenly.
    for name in proofs:
        job("z3", main, (name,))
    width = budget.exhaustive_width - NARROWER * (len(names) > budget.enough_for)
    narrow = replace(budget, exhaustive_width=width)
    for invariant in sorted(scopes, key=lambda i: not i.scoped):  # what takes longest first
        narrowed = invariant.is_composed and not invariant.scoped
        job("exhaustive", main, (invariant.name,), narrow if narrowed else budget)
    return jobs, skipped


def kvm_is_missing() -> str:
    """Why KVM_TRANSLATE cannot be asked on this host; empty if it can."""
    from vapama.oracles.registry import ORACLES, missing

    (kvm,) = (oracle for oracle in ORACLES if oracle.name == "kvm")
    return missing(kvm)


def _proofs(invariants: list[Invariant]) -> list[str]:
    """The invariants and their lemmas, by name; those first that are likely to take longest."""
    try:
        needed = with_lemmas(invariants, load_invariants())
    except Circular as error:
        raise BadInput(str(error)) from None
    needed.sort(key=lambda i: (not i.uses, i.equates is None, not i.bound))
    return [i.name for i in needed]


def _scaled(budget: Budget, factor: float) -> Budget:
    return replace(budget, random_seconds=budget.random_seconds * factor)


def check(
    jobs: list[Job],
    budget: Budget,
    skipped: dict[str, str],
    listener: Callable[[Job, Event], None] = lambda job, event: None,
) -> Report:
    """Run the jobs. Raises `BadInput`."""
    report = Report(
        budget=budget,
        skipped=skipped,
        wants_snapshot=any(job.engine == SNAPSHOT for job in jobs),
    )

    def hear(job: Job, event: Event) -> None:
        if event.verdict is not None:
            report.verdicts.append(event.verdict)
        if event.agreed is not None:
            report.agreements.append(event.agreed)
        report.coverage = event.coverage or report.coverage
        listener(job, event)

    run_jobs(jobs, hear)
    settle(report.verdicts)
    order = {name: place for place, name in enumerate(load_invariants())}
    report.verdicts.sort(key=lambda verdict: order[verdict.invariant])
    return report


DEFAULT_GUEST = truth.SHIPPED
