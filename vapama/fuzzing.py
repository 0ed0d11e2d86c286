"""What `vapama fuzz` runs: one engine for a time, its corpus, and the coverage of the sources."""

import json
import subprocess
import sys
from pathlib import Path

from platformdirs import user_cache_path

from vapama.case import BadInput
from vapama.jobs import Job
from vapama.spec.nondet import Invariant
from vapama.subjects import load_subject
from vapama.verdict import Budget, Verdict

ENGINES = ("atheris", "random", "hypothesis")
COVERAGE_SECONDS = 60
EXAMPLES_A_SECOND = 1_500
"""What Hypothesis manages at the least, to turn seconds into examples."""


def plan(
    invariants: list[Invariant],
    subject: str,
    engine: str,
    seconds: float,
    seed: int | None,
    corpus: Path | None,
) -> tuple[list[Job], Path]:
    """The job, and the folder of its corpus."""
    load_subject(subject)
    slug = "".join(c if c.isalnum() else "-" for c in subject)
    folder = corpus or user_cache_path("vapama") / "corpus" / slug
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--corpus {folder}: not a folder")
    budget = Budget(
        name=f"{seconds:g} s",
        hypothesis_examples=max(10, int(seconds * EXAMPLES_A_SECOND / len(invariants))),
        random_seconds=seconds / len(invariants),
        atheris_seconds=seconds,
        exhaustive_width=0,
        seed=seed,
    )
    job = Job(
        engine=engine,
        subject=subject,
        invariants=tuple(i.name for i in invariants),
        budget=budget,
        corpus=str(folder),
    )
    return [job], folder


def hunt(invariant: Invariant, subject: str, engine: str, seconds: float) -> Verdict:
    """One invariant of one subject by one engine, with a fixed seed, in this process."""
    guarded = load_subject(subject)
    if engine == "atheris":
        from vapama.fuzz import atheris_engine

        return atheris_engine.run([invariant], guarded, seconds)[0][0]
    if engine == "random":
        from vapama.fuzz import random_engine

        return random_engine.run(invariant, guarded, seconds)
    from vapama.fuzz import hypothesis_engine

    return hypothesis_engine.run(invariant, guarded, int(seconds * EXAMPLES_A_SECOND))


def source_coverage(corpus: Path, invariants: list[Invariant], subject: str) -> list[str]:
    """How much of the walk's sources the inputs of a corpus run through, a line for each file."""
    if not corpus.is_dir() or not any(corpus.iterdir()):
        return []
    job = {"corpus": str(corpus), "invariants": [i.name for i in invariants], "subject": subject}
    try:
        found = subprocess.run(
            [sys.executable, "-m", "vapama.corpus_coverage", json.dumps(job)],
            capture_output=True,
            text=True,
            check=False,
            timeout=COVERAGE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return [f"not measured: the corpus took more than {COVERAGE_SECONDS} s to run"]
    if found.returncode != 0:
        last = found.stderr.strip().splitlines()[-1:] or [f"status {found.returncode}"]
        return [f"not measured: {last[0]}"]
    return [f"{name}: {text}" for name, text in json.loads(found.stdout).items()]
