"""``python -m vapama.corpus_coverage JOB``: the lines that a corpus reaches.

A process of its own, so that the sources are measured from their import on.
"""

import ast
import contextlib
import json
import sys
from pathlib import Path

import coverage


def main() -> None:
    """Run every input of the corpus and print the coverage of each source as JSON."""
    job = json.loads(sys.argv[1])
    sources = ("*/spec/paging.py", "*/impl/kernels/long_mode.py")
    measured = coverage.Coverage(include=list(sources), data_file=None)
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
    """For each source, the lines run of those functions that were entered at all."""
    return {
        Path(name).name: _lines_run(measured, name)
        for name in sorted(measured.get_data().measured_files())
    }


def _lines_run(measured: coverage.Coverage, name: str) -> str:
    _, executable, _, missing, _ = measured.analysis2(name)
    run, total, functions = 0, 0, 0
    for node in ast.walk(ast.parse(Path(name).read_text())):
        if isinstance(node, ast.FunctionDef):
            first, last = node.body[0].lineno, node.end_lineno or 0
            lines = {line for line in executable if first <= line <= last}
            if lines - set(missing):
                functions += 1
                total += len(lines)
                run += len(lines - set(missing))
    return f"{run} of {total} lines in the {functions} functions entered"


if __name__ == "__main__":
    main()
