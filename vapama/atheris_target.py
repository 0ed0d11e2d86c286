"""The process that libFuzzer runs in: ``python -m vapama.atheris_target JOB [FLAGS]``.

It instruments the subject's kernels and runs invariants on draws decoded straight from libFuzzer's
bytes; a checksum of the bytes picks the invariant. It tells its parent what happens as JSON lines
in the file that the job names. libFuzzer never returns: this process ends by its time limit, or at
the first failure with status 77.
"""

import json
import os
import sys
import time
from collections import Counter
from typing import Any

import atheris

from vapama.fuzz import branches
from vapama.fuzz.decoded import ByteDraws, picked
from vapama.runs import KnownDeparture, attempt
from vapama.spec import paging
from vapama.spec.nondet import Reject, load_invariants
from vapama.subjects import load_subject

FAILED = 77
REPORT_EVERY, REPORT_SECONDS = 8, 0.5
"""After so many runs it is looked whether a report is due: programs are slow, walks are not."""


class Target:
    """What libFuzzer calls: one run of one invariant for each input."""

    def __init__(self, job: dict[str, Any]) -> None:
        registry = load_invariants()
        self.subject = load_subject(job["subject"])
        # libFuzzer looks for new branches of what is under test: the subject's own kernels where
        # they are Python, else the reference, which branches on the same things.
        kernels = getattr(self.subject.subject, "kernels", ())
        for module in kernels if self.subject.capabilities.symbolic and kernels else (paging,):
            branches.instrument(module)
        self.invariants = [registry[name] for name in job["invariants"]]
        self.nondet = ByteDraws(narrow=self.subject.capabilities.narrow)
        self.out = open(job["out"], "a", buffering=1)  # noqa: SIM115  (until the process ends)
        self.reached: dict[str, set[str]] = {i.name: set() for i in self.invariants}
        self.targets = [(i, self.reached[i.name]) for i in self.invariants]
        self.count = len(self.targets)
        self.known: Counter[str] = Counter()
        self.runs = [0] * len(self.invariants)
        self.rejected = [0] * len(self.invariants)
        self.total = 0
        self.start = self.due = time.monotonic()

    def __call__(self, data: bytes) -> None:
        """Run the invariant that the input picks on what it decodes to."""
        which = picked(data, self.count)
        invariant, reached = self.targets[which]
        nondet = self.nondet
        nondet.begin(data)
        nondet.reached = reached
        self.runs[which] += 1
        self.total += 1
        try:
            failure = attempt(invariant, nondet, self.subject)
        except Reject:
            self.rejected[which] += 1
            failure = None
        except KnownDeparture as departure:
            self.known[str(departure)] += 1
            failure = None
        except Exception as error:
            # The invariant's own: no failure of the subject, and nothing to go on with.
            why = f"the invariant raised {type(error).__name__}: {error}".splitlines()[0]
            self.report()
            self.tell({"broken": invariant.name, "why": why})
            os._exit(FAILED)
        if failure is not None:
            self.report()
            self.tell({"failed": invariant.name, "why": failure.message, "draws": nondet.draws()})
            os._exit(FAILED)
        if self.total % REPORT_EVERY == 0 and time.monotonic() >= self.due:
            self.report()

    def report(self) -> None:
        """Tell the parent how far this is."""
        self.due = time.monotonic() + REPORT_SECONDS
        names = [i.name for i in self.invariants]
        met = [runs - rejected for runs, rejected in zip(self.runs, self.rejected, strict=True)]
        self.tell(
            {
                "runs": dict(zip(names, self.runs, strict=True)),
                "met": dict(zip(names, met, strict=True)),
                "reached": {name: sorted(labels) for name, labels in self.reached.items()},
                "known": self.known,
                "seconds": time.monotonic() - self.start,
            }
        )

    def tell(self, event: dict[str, Any]) -> None:
        """One line to the parent."""
        self.out.write(json.dumps(event) + "\n")


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    target = Target(json.loads(sys.argv[1]))
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
    branches.register()
    atheris.Fuzz()


if __name__ == "__main__":
    main()
