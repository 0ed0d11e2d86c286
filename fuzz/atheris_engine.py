"""The atheris engine: libFuzzer, guided by the branches of the walk, on invariants.

libFuzzer owns the process it runs in (`vapama.atheris_target`), so this side starts it, reads what
it tells, and starts it again without an invariant that failed, until the time is up.
"""

import contextlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

from vapama.case import Case
from vapama.fuzz.decoded import ByteDraws, Encoder, addressed, picked
from vapama.fuzz.random_engine import PATIENCE, conclude
from vapama.fuzz.random_engine import Failed as FailedRun
from vapama.runs import Failure, Guarded, KnownDeparture, SubjectHung, attempt, hang_guard
from vapama.spec.nondet import Invariant, Reject
from vapama.verdict import HELD, NOT_APPLICABLE, UNDECIDED, Verdict

ENGINE = "atheris"
LONGEST, LONGEST_COMPOSED = 300, 1200
"""Bytes of an input; a run decodes at most about so many, one about several walks more."""
RANDOM_SEEDS = 100
TURN, LONGEST_WAIT = 2.0, 60.0
"""Seconds after which those that have been everywhere stand back for the rest, and how
long that goes on at most."""
ENDED_BY_TIME, FAILED, HUNG = 0, 77, 70
Progress = Callable[[int], None]
Counts = tuple[dict[str, int], dict[str, int]]
"""Runs, and runs that met the assumptions, by invariant."""


def unavailable() -> str:
    """Why this engine cannot run here; empty if it can."""
    found = importlib.util.find_spec("atheris") is not None
    return "" if found else "atheris is not installed: pip install 'vapama[atheris]'"


class Campaign:
    """A run of libFuzzer over several invariants, restarted as they fail."""

    def __init__(
        self,
        invariants: list[Invariant],
        subject: Guarded,
        seconds: float,
        seed: int | None = 0,
        hang_seconds: float = 10.0,
        corpus: Path = Path("corpus"),
        patience: int = PATIENCE,
    ) -> None:
        self.invariants, self.subject = invariants, subject
        self.seconds, self.seed, self.hang_seconds = seconds, seed, hang_seconds
        self.corpus, self.patience = corpus, patience
        self.runs = {i.name: 0 for i in invariants}
        self.met = {i.name: 0 for i in invariants}
        self.reached: dict[str, set[str]] = {i.name: set() for i in invariants}
        self.failed: dict[str, FailedRun] = {}
        self.broken: dict[str, str] = {}
        self.known: dict[str, int] = {}
        self.coverage = ""
        self.spent = self.fuzzed = self.told_seconds = 0.0
        self.trouble = ""

    def run(self, progress: Progress = lambda executions: None) -> list[Verdict]:
        """Fuzz for the time given; a verdict for each invariant."""
        left = list(self.invariants)
        with tempfile.TemporaryDirectory() as scratch:
            self.scratch = Path(scratch)
            while left and self.spent < self.seconds and not self.trouble:
                self._once(left, self.seconds - self.spent, progress)
                left = [i for i in left if i.name not in {*self.failed, *self.broken}]
            coverage = self.coverage
            # Shared among many, the time is short for each: some are not yet where they are to be.
            most = self.seconds + min(LONGEST_WAIT, self.patience * self.seconds)
            while self._lacking() and self.spent < most:
                self._once(self._lacking(), min(self.seconds, TURN), progress)
            self.coverage = coverage
        return [self._verdict(i) for i in self.invariants]

    def _lacking(self) -> list[Invariant]:
        """The invariants that no run has shown all of, if the search can go on."""
        ended = {*self.failed, *self.broken}
        return [
            i
            for i in self.invariants
            if not self.trouble
            and i.name not in ended
            and not self.reached[i.name].issuperset(self.subject.reachable(i))
        ]

    @property
    def executions(self) -> int:
        """Runs of all invariants so far."""
        return sum(self.runs.values())

    def _once(self, invariants: list[Invariant], seconds: float, progress: Progress) -> None:
        """One process of libFuzzer, until it ends by itself."""
        out, log = self.scratch / "events", self.scratch / "log"
        out.write_text("")
        job = {
            "subject": self.subject.name,
            "invariants": [i.name for i in invariants],
            "out": str(out),
        }
        flags = [
            f"-max_total_time={max(1, round(seconds))}",
            f"-max_len={longest(invariants)}",
            f"-timeout={max(1, round(self.hang_seconds))}",
            f"-artifact_prefix={self.scratch}/",
            "-print_final_stats=1",
            *([f"-seed={self.seed + 1}"] if self.seed is not None else []),
        ]
        start, told = time.monotonic(), 0
        before = dict(self.runs), dict(self.met)
        command = [sys.executable, "-m", "vapama.atheris_target", json.dumps(job)]
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [*command, *flags, str(self.corpus)], stdout=stderr, stderr=stderr
            )
            try:
                while process.poll() is None:
                    time.sleep(0.1)
                    told = self._listen(out, told, before)
                    progress(self.executions)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        self._listen(out, told, before)
        self.spent += time.monotonic() - start
        self.fuzzed += self.told_seconds
        text = log.read_text(errors="replace")
        covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", text)
        if covered:
            self.coverage = "{} edges, {} features, corpus of {}".format(*covered[-1])
        if process.returncode == HUNG:
            self._hung(invariants)
        elif process.returncode not in (ENDED_BY_TIME, FAILED):
            lines = [line for line in text.splitlines() if line.strip()] or ["it said nothing"]
            errors = [line for line in lines if "Error" in line] or lines
            self.trouble = f"libFuzzer ended with status {process.returncode}: {errors[-1].strip()}"

    def _listen(self, out: Path, told: int, before: Counts) -> int:
        """Take in the events from byte `told` on; returns how far it read."""
        with out.open() as events:
            events.seek(told)
            for line in events:
                if not line.endswith("\n"):
                    break
                told += len(line.encode())
                self._hear(json.loads(line), before)
        return told

    def _hear(self, event: dict[str, Any], before: Counts) -> None:
        if "broken" in event:
            self.broken[event["broken"]] = event["why"]
            return
        if "failed" in event:
            draws = [(name, value) for name, value in event["draws"]]
            self.failed[event["failed"]] = Failure(event["why"]), draws
            return
        runs, met = before
        for name in event["runs"]:
            self.runs[name] = runs[name] + event["runs"][name]
            self.met[name] = met[name] + event["met"][name]
        for name, labels in event["reached"].items():
            self.reached[name] |= set(labels)
        self.known, self.told_seconds = event["known"], event["seconds"]

    def _hung(self, invariants: list[Invariant]) -> None:
        """The input that hung, run again under an alarm to learn its draws."""
        for artifact in self.scratch.glob("timeout-*"):
            data = artifact.read_bytes()
            invariant = invariants[picked(data, len(invariants))]
            nondet = ByteDraws(data, self.subject.capabilities.narrow)
            with (
                contextlib.suppress(Reject, KnownDeparture, SubjectHung),
                hang_guard(self.hang_seconds),
            ):
                attempt(invariant, nondet, self.subject)
            why = f"the subject hung: no result within {self.hang_seconds:g} s"
            self.failed[invariant.name] = Failure(why, hung=True), nondet.draws()
            artifact.unlink()

    def _verdict(self, invariant: Invariant) -> Verdict:
        runs = self.runs[invariant.name]
        verdict = Verdict(
            invariant=invariant.name,
            engine=ENGINE,
            subject=self.subject.name,
            status=HELD,
            seconds=self.fuzzed / len(self.invariants),
            executions=runs,
            detail=f"{runs:,} runs",
            known=self.known,
        )
        failed = self.failed.get(invariant.name)
        trouble = self.broken.get(invariant.name) or self.trouble
        if failed is None and trouble:
            verdict.status, verdict.why = UNDECIDED, trouble
            return verdict
        reached = self.reached[invariant.name]
        met = self.met[invariant.name]
        return conclude(verdict, invariant, self.subject, reached, met, failed, self.hang_seconds)


def run(
    invariants: list[Invariant],
    subject: Guarded,
    seconds: float,
    seed: int | None = 0,
    hang_seconds: float = 10.0,
    seeds: Iterable[Case] = (),
    corpus: Path | None = None,
    progress: Progress = lambda executions: None,
    patience: int = PATIENCE,
) -> tuple[list[Verdict], str]:
    """Fuzz all the invariants together for `seconds`: their verdicts, and the coverage reached.

    `seeds` are Cases to start from; `corpus` is a folder to start from and add to, else a new one.
    """
    reason = unavailable()
    if reason:
        return [_not_run(invariant, subject, reason) for invariant in invariants], ""
    with tempfile.TemporaryDirectory() as scratch:
        corpus = corpus or Path(scratch)
        corpus.mkdir(parents=True, exist_ok=True)
        plant(corpus, invariants, subject, seeds)
        campaign = Campaign(invariants, subject, seconds, seed, hang_seconds, corpus, patience)
        return campaign.run(progress), campaign.coverage


def _not_run(invariant: Invariant, subject: Guarded, reason: str) -> Verdict:
    return Verdict(
        invariant=invariant.name,
        engine=ENGINE,
        subject=subject.name,
        status=NOT_APPLICABLE,
        why=reason,
    )


def longest(invariants: Iterable[Invariant]) -> int:
    """How many bytes an input for these may have."""
    return LONGEST_COMPOSED if any(i.is_composed for i in invariants) else LONGEST


def plant(
    corpus: Path, invariants: list[Invariant], subject: Guarded, seeds: Iterable[Case]
) -> None:
    """Begin a corpus: random inputs, if it is empty, and Cases as the bytes that decode to them.

    From an empty input libFuzzer takes long to find its way through five levels.
    """
    if not any(corpus.iterdir()):
        random = Random(0)
        for number in range(RANDOM_SEEDS):
            (corpus / f"random-{number}").write_bytes(random.randbytes(longest(invariants)))
    names = [invariant.name for invariant in invariants]
    for number, case in enumerate(seeds):
        if case.invariant in names:
            which = names.index(case.invariant)
            with contextlib.suppress(Reject):
                data = encoded(invariants[which], case, subject)
                (corpus / f"case-{number}").write_bytes(addressed(data, which, len(names)))


def encoded(invariant: Invariant, case: Case, subject: Guarded) -> bytes:
    """The bytes from which `ByteDraws` decodes the Case's draws.

    Raises `Reject` if the Case breaks an assumption, or has a value that no draw can have.
    """
    encoder = Encoder(case.values(), subject.capabilities.narrow)
    with contextlib.suppress(KnownDeparture):
        attempt(invariant, encoder, subject)
    return bytes(encoder.encoded)
