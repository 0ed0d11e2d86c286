"""``python -m vapama.corpus_coverage JOB``: line and branch coverage that a corpus reaches.

A process of its own, so that the sources are measured from their import on.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import coverage


def main() -> None:
    """Run every input of the corpus and print the coverage of each source as JSON."""
    job = json.loads(sys.argv[1])
    sources = ("*/spec/paging.py", "*/impl/kernels/long_mode.py")
    measured = coverage.Coverage(branch=True, include=list(sources), data_file=None)
    measured.start()
    # Imported while measuring: definitions are lines too.
    from vapama.fuzz.decoded import ByteDraws, picked
    from vapama.runs import KnownDeparture, attempt
    from vapama.spec.nondet import Reject, load_invariants
    from vapama.subjects import load_subject

    registry = load_invariants()
    invariants = [registry[name] for name in job["invariants"]]
    subject = load_subject(job["subject"])
    for path in sorted(Path(job["corpus"]).iterdir()):
        data = path.read_bytes()
        nondet = ByteDraws(data, subject.capabilities.narrow)
        with contextlib.suppress(Reject, KnownDeparture):
            attempt(invariants[picked(data, len(invariants))], nondet, subject)
    measured.stop()
    print(json.dumps(_summary(measured)))


def _summary(measured: coverage.Coverage) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in measured.get_data().measured_files():
        percent = measured.report(morfs=[name], file=io.StringIO())
        found[Path(name).name] = f"{percent:.0f} % of lines and branches"
    return found


if __name__ == "__main__":
    main()
