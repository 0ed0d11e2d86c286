"""Seeded mistakes hunted by every engine that searches, and a record of who found what how soon.

The record is a JSON file that hunts add to; docs/generate.py makes a page of the one that comes
with the documentation.
"""

import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from vapama.bugs.mistakes import MISTAKES, Mistake
from vapama.case import BadInput, Case
from vapama.fuzz import atheris_engine, exhaustive, hypothesis_engine, random_engine
from vapama.runs import Guarded, GuardedCall, Replay, attempt
from vapama.spec import shadow
from vapama.spec.nondet import Invariant, load_invariants
from vapama.spec.steps import Plan
from vapama.spec.subject import VMM
from vapama.verdict import BUDGETS, COUNTEREXAMPLE, Verdict

FORMAT, VERSION = "vapama-hunts", 1
ENGINES = ("random", "hypothesis", "exhaustive", "atheris")
WIDTH = 5
"""The width of exhaustive scopes."""


class Hunt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an engine found of a mistake: whether and what, after how many seconds and runs.

    `seconds` are those until it was found (Hypothesis' own shrinking included), or of the whole
    search; `steps` those of the shrunk program, and `rules` the rules of the tables that it breaks.
    """

    mistake: str
    invariant: str
    engine: str
    found: bool
    seconds: float
    runs: int = 0
    failure: str = ""
    steps: int = 0
    rules: tuple[int, ...] = ()


class Record(msgspec.Struct, kw_only=True):
    """Hunts, and the processor and Python that they ran on."""

    format: str = FORMAT
    version: int = VERSION
    machine: str = ""
    hunts: list[Hunt] = []

    def add(self, hunt: Hunt) -> None:
        """Put a hunt in, in place of an earlier one."""
        key = hunt.mistake, hunt.engine
        self.hunts = [h for h in self.hunts if (h.mistake, h.engine) != key]
        self.hunts.append(hunt)
        order = {name: k for k, name in enumerate(MISTAKES)}
        self.hunts.sort(key=lambda h: (order.get(h.mistake, -1), ENGINES.index(h.engine)))

    def to_json(self) -> bytes:
        """The record as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"


def read_record(path: Path) -> Record:
    """The record in a file, a new one if there is none. Raises `BadInput`."""
    if not path.exists():
        return Record(machine=f"{os.cpu_count()} processors, Python {platform.python_version()}")
    try:
        record = msgspec.json.decode(path.read_bytes(), type=Record)
    except OSError as error:
        raise BadInput(f"{path}: cannot read the record: {error.strerror or error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not a record of hunts: {error}") from None
    if (record.format, record.version) != (FORMAT, VERSION):
        raise BadInput(f"{path}: not a record of hunts of version {VERSION}")
    if any(hunt.engine not in ENGINES for hunt in record.hunts):
        raise BadInput(f"{path}: a hunt by an engine other than {', '.join(ENGINES)}")
    return record


def chosen_mistakes(names: Sequence[str]) -> list[Mistake]:
    """Mistakes by name; without names those of the hypervisor, in the order of the gallery.

    Raises `BadInput`.
    """
    unknown = [name for name in names if name not in MISTAKES]
    if unknown:
        raise BadInput(f"no mistake is named {unknown[0]}: see `vapama list --mistakes`")
    if names:
        return [MISTAKES[name] for name in names]
    registry = load_invariants()

    def is_searched(mistake: Mistake) -> bool:
        invariant = registry[mistake.breaks]
        return VMM in invariant.needs and "random" not in invariant.unsuited

    return list(filter(is_searched, MISTAKES.values()))


def hunts(
    mistakes: Sequence[Mistake], engines: Sequence[str], seconds: float
) -> Iterator[tuple[Hunt, Verdict]]:
    """Hunt each mistake by each engine, with fixed seeds, each for so many seconds at most.

    Hypothesis has the examples of the standard budget. An engine that an invariant is not for does
    not hunt its mistakes, but that the exhaustive one runs the small scope of programs for them.
    """
    registry = load_invariants()
    for mistake in mistakes:
        for engine in engines:
            invariant = registry[mistake.breaks]
            if engine in invariant.unsuited:
                if engine != "exhaustive" or VMM not in invariant.needs:
                    continue
                invariant = registry["every_program_of_a_small_scope_is_transparent_and_sound"]
            subject = Guarded(f"mistake:{mistake.name}", mistake.subject())
            start = time.monotonic()
            verdict = _hunt(invariant, subject, engine, seconds)
            found = verdict.status == COUNTEREXAMPLE
            case = verdict.case
            hunt = Hunt(
                mistake=mistake.name,
                invariant=invariant.name,
                engine=engine,
                found=found,
                seconds=round(verdict.seconds or time.monotonic() - start, 3),
                runs=verdict.executions,
                failure=verdict.why if found else "",
                steps=sum(name.startswith("step ") for name, _ in case.draws) if case else 0,
                rules=rules_broken(invariant, case, subject) if case else (),
            )
            yield hunt, verdict


def rules_broken(invariant: Invariant, case: Case, subject: Guarded) -> tuple[int, ...]:
    """The rules of `spec.shadow` that do not hold where a program fails: not only the first."""
    if VMM not in invariant.needs:
        return ()
    made: list[Any] = []

    class Kept(Guarded):
        def vmm(self, plan: Plan) -> Any:
            made.append(GuardedCall(self.subject.vmm)(plan))
            return made[-1]

    attempt(invariant, Replay(case.values()), Kept(subject.name, subject.subject))
    rules = {int(rule) for rule in re.findall(r"rule (\d+):", case.failure)}
    with suppress(Exception):  # of tables that are broken the audit need not come to an end
        rules |= {violation.rule for violation in shadow.audit(made[-1].view())}
    return tuple(sorted(rules))


def _hunt(invariant: Invariant, subject: Guarded, engine: str, seconds: float) -> Verdict:
    if engine == "random":
        return random_engine.run(invariant, subject, seconds, patience=1)
    if engine == "exhaustive":
        return exhaustive.run(invariant, subject, WIDTH)
    if engine == "atheris":
        return atheris_engine.run([invariant], subject, seconds)[0][0]
    examples = BUDGETS["standard"].hypothesis_examples
    return hypothesis_engine.run(invariant, subject, examples, patience=1)
