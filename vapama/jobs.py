"""Jobs: engines at work in processes of their own, watched by this one.

Each job is one engine on some invariants of one subject (or the check of a snapshot), run by
``python -m vapama.worker``, which tells its progress and verdicts as JSON lines. A worker that is
done with a job is given the next one like it, so that small jobs cost no start and spread evenly. A
worker that says
nothing for too long is ended: a subject may hang where no Python alarm reaches it.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO

import msgspec

from vapama.case import BadInput
from vapama.verdict import UNDECIDED, Budget, Verdict

SNAPSHOT = "snapshot"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is to do. `cases` are files of Cases to begin with."""

    engine: str
    subject: str
    invariants: tuple[str, ...]
    budget: Budget
    snapshot: str = ""
    cases: tuple[str, ...] = ()
    corpus: str = ""
    export: str = ""


class Agreed(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot job found: see `vapama.snapshot.Agreement`."""

    what: str
    right: int
    total: int
    first_difference: str = ""

    @property
    def good(self) -> bool:
        """Whether every mapping was confirmed, and there were some."""
        return self.right == self.total > 0


class Event(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line from a worker: progress on something, or a verdict, or bad input."""

    at: str = ""
    executions: int = 0
    verdict: Verdict | None = None
    agreed: Agreed | None = None
    coverage: str = ""
    bad_input: str = ""
    finished: bool = False
    """The job is done: another can be given."""


Listener = Callable[[Job, Event], None]


def run_jobs(jobs: list[Job], listener: Listener, workers: int | None = None) -> None:
    """Run jobs, as many at a time as there are processors, and pass on their events.

    Ends every worker before it returns, also on an interrupt. Raises `BadInput` if a worker met
    some.
    """
    events: queue.Queue[tuple[_Worker, Event | None]] = queue.Queue()
    waiting = list(jobs)
    running: list[_Worker] = []
    try:
        while waiting or running:
            while waiting and len(running) < (workers or os.cpu_count() or 1):
                running.append(_Worker(waiting.pop(0), events))
            for worker, event in _next_events(events):
                if event is None or event.finished:
                    for verdict in worker.unfinished():
                        listener(worker.job, Event(verdict=verdict))
                    if event is None:
                        running.remove(worker)
                    else:
                        worker.next_of(waiting)
                    continue
                if event.bad_input:
                    raise BadInput(event.bad_input)
                worker.heard(event)
                listener(worker.job, event)
            for worker in running:
                worker.watch()
    finally:
        for worker in running:
            worker.end()


def _next_events(
    events: "queue.Queue[tuple[_Worker, Event | None]]",
) -> Iterator[tuple["_Worker", Event | None]]:
    try:
        yield events.get(timeout=0.2)
        while True:
            yield events.get_nowait()
    except queue.Empty:
        return


class _Worker:
    """A worker process, the thread that listens to it, and what is known of it."""

    def __init__(self, job: Job, events: "queue.Queue[tuple[_Worker, Event | None]]") -> None:
        self.events = events
        self.why = ""
        self.dismissed = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vapama.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.stderr: list[bytes] = []
        self._give(job)
        threading.Thread(target=self._listen, daemon=True).start()

    def _give(self, job: Job) -> None:
        self.job = job
        self.done: set[str] = set()
        self.last = time.monotonic()
        self.at = ""
        assert self.process.stdin is not None
        # A worker that ended does not read: then its end says so.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(msgspec.json.encode(job) + b"\n")
            self.process.stdin.flush()

    def next_of(self, waiting: list[Job]) -> None:
        """Begin the next of the waiting jobs that is like the last one, or end if none is."""
        for place, job in enumerate(waiting):
            if (job.engine, job.subject) == (self.job.engine, self.job.subject):
                self._give(waiting.pop(place))
                return
        self.dismissed = True
        assert self.process.stdin is not None
        self.process.stdin.close()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        reader = threading.Thread(target=self._keep, args=(self.process.stderr,), daemon=True)
        reader.start()
        for line in self.process.stdout:
            self.events.put((self, msgspec.json.decode(line, type=Event)))
        self.process.wait()
        reader.join()
        self.process.stdout.close()
        self.process.stderr.close()
        self.events.put((self, None))

    def _keep(self, stream: IO[bytes]) -> None:
        for line in stream:
            self.stderr = [*self.stderr[-20:], line]

    def heard(self, event: Event) -> None:
        """Note a sign of life."""
        self.last = time.monotonic()
        self.at = event.at or self.at
        if event.verdict is not None:
            self.done.add(event.verdict.invariant)

    def watch(self) -> None:
        """End the worker if it has said nothing for too long."""
        patience = 3 * self.job.budget.hang_seconds + 60
        if time.monotonic() - self.last > patience and not self.why and not self.dismissed:
            self.why = f"the subject hung in code that cannot be interrupted ({patience:g} s)"
            self.end()

    def end(self) -> None:
        """Kill the worker and its own children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def unfinished(self) -> list[Verdict]:
        """A verdict for each invariant that the worker ended without one for: undecided."""
        if self.dismissed:
            return []
        why = self.why
        if not why and not self.process.returncode:
            why = "the worker ended without a verdict"
        last = (
            self.stderr[-1].decode(errors="replace").strip() if self.stderr else "it said nothing"
        )
        why = why or f"the worker ended with status {self.process.returncode}: {last}"
        return [
            Verdict(
                invariant=name,
                engine=self.job.engine,
                subject=self.job.subject,
                status=UNDECIDED,
                why=why if name == self.at or not self.at else f"not run: {why}",
            )
            for name in self.job.invariants
            if name not in self.done
        ]
