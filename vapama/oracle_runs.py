"""Cases in batches on a machine: made, run and judged, with nothing lost when the machine dies.

While the machine runs one batch, the last is judged and the next is made. Every case is judged by
the reference. A case that does not agree is a known departure by name, or a difference.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import NamedTuple

import msgspec

from vapama.fuzz.decoded import RandomDraws
from vapama.oracles import bare_metal
from vapama.oracles.bare_metal import RECORD_BYTES, Ask, BareMetal
from vapama.oracles.machine import (
    LEGACY,
    LEGACY_PAE,
    LONG_4,
    LONG_5,
    RECORDS,
    MachineDied,
)
from vapama.spec import domains
from vapama.spec.access import Access
from vapama.spec.cpu import VM, Cpu
from vapama.spec.domains import Domain
from vapama.spec.memory import Sparse, Watched
from vapama.spec.nondet import (
    LONG_MODE,
    NO_PAGING,
    PAE_PAGING,
    PAGING_32,
    ControlStates,
)
from vapama.spec.outcomes import Outcome, Translated, kind
from vapama.spec.paging import translate
from vapama.spec.subject import NotCovered, agree

STATES = (LONG_MODE, PAGING_32, PAE_PAGING, NO_PAGING)
WEIGHTS = (5, 3, 3, 1)
BATCH = 1000
FLAVORS = {LEGACY: "32-bit", LEGACY_PAE: "PAE", LONG_4: "4-level", LONG_5: "5-level"}


class Drawn(NamedTuple):
    """A case, what the reference says of it, and how the machine is asked."""

    cpu: Cpu
    memory: Sparse
    access: Access
    expected: Outcome
    ask: Ask


@dataclass
class Difference:
    """A case in which the machine did something else, and nobody knows why."""

    cpu: Cpu
    memory: Sparse
    access: Access
    expected: Outcome | str
    observed: Outcome | str


@dataclass
class Tally:
    """What came of a run."""

    agreed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Cases that agreed, by mode and kind of outcome."""
    known: Counter[str] = field(default_factory=Counter)
    """Cases that show a departure known by name."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Cases that could not be asked, or not be told, by why."""
    differences: list[Difference] = field(default_factory=list)
    seconds: float = 0.0
    deaths: int = 0

    @property
    def judged(self) -> int:
        """How many cases have a verdict."""
        return self.agreed.total() + self.known.total() + len(self.differences)


def narrowed(states: ControlStates, subject: BareMetal) -> dict[str, Domain]:
    """The draws of these states that the subject can take only some values of."""
    draws, narrow = dict(states.draws), dict(subject.capabilities.narrow)
    cr4 = draws["cr4"]
    free = cr4.free & (subject.machine.cr4 | ~bare_metal.CR4_THAT_COUNTS)
    narrow["cr4"] = replace(cr4, free=free)
    narrow["rflags"] = replace(draws["rflags"], free=draws["rflags"].free & ~VM)
    narrow["cr3"] = replace(domains.CR3, free=(1 << 25) - 1)
    return narrow


def draw(random: Random, subject: BareMetal, tally: Tally) -> Iterator[Drawn]:
    """Cases that the subject can be asked, of every mode, without end."""
    chosen = [(states, narrowed(states, subject)) for states in STATES]
    while True:
        states, narrow = random.choices(chosen, WEIGHTS)[0]
        nondet = RandomDraws(random, narrow)
        cpu, lazy, access = nondet.walk(states)
        watched = Watched(lazy)
        expected = translate(cpu, watched, access)
        memory = Sparse({a: lazy.load(a) for a in watched.loads}, lazy.limit)
        try:
            ask = bare_metal.ask(cpu, memory, access, subject.machine)
        except NotCovered as why:
            tally.left_out[str(why)] += 1
            continue
        yield Drawn(cpu, memory, access, expected, ask)


def run(
    subject: BareMetal,
    cases: int,
    seed: int,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Run cases until so many are judged."""
    tally, start = Tally(), time.monotonic()
    source = draw(Random(seed), subject, tally)
    waiting: dict[int, list[Drawn]] = {}
    running: list[Drawn] = []
    while running or tally.judged < cases:
        wanted = cases - tally.judged - len(running)
        batch = _next_batch(source, waiting, wanted) if wanted > 0 else []
        # The machine works on one batch while the other is made or judged.
        done = _finish(subject, running, tally) if running else []
        if batch:
            _give(subject, batch)
        for case, result in done:
            _judge(subject, case, result, tally)
        tally.seconds = time.monotonic() - start
        if done:
            progress(tally)
        running = batch
    return tally


def _next_batch(
    source: Iterator[Drawn], waiting: dict[int, list[Drawn]], wanted: int
) -> list[Drawn]:
    """Cases of one flavor: as soon as there are enough of one."""
    while True:
        case = next(source)
        group = waiting.setdefault(case.ask.flavor, [])
        group.append(case)
        if len(group) >= min(BATCH, max(1, wanted)):
            del waiting[case.ask.flavor]
            return group


def _give(subject: BareMetal, batch: Sequence[Drawn]) -> None:
    """Let the machine start on a batch. If it is dead, that shows when the batch is finished."""
    records = b"".join(case.ask.record for case in batch)
    with contextlib.suppress(OSError):
        subject.machine.give(batch[0].ask.flavor, records, RECORD_BYTES)


def _finish(
    subject: BareMetal, batch: Sequence[Drawn], tally: Tally
) -> list[tuple[Drawn, bytes | str]]:
    """Each case of the batch under way with its record as it came back, or why the machine died.

    When it dies, the batch is run again in halves on a new one: a case that kills it is found, and
    the others are not lost.
    """
    machine = subject.machine
    size = RECORD_BYTES
    try:
        machine.await_finish()
        results = machine.read(RECORDS, len(batch) * size)
        if machine.read(0, bare_metal.POOL_BYTES) == bare_metal.STAMPS:
            return [(case, results[i * size : (i + 1) * size]) for i, case in enumerate(batch)]
        why = "memory changed that is neither an entry of the walk nor its page"
    except (MachineDied, OSError) as death:
        why = str(death)
        tally.deaths += 1
    machine.start()
    if len(batch) == 1:
        return [(batch[0], why)]
    middle, done = len(batch) // 2, []
    for half in (batch[:middle], batch[middle:]):
        _give(subject, half)
        done += _finish(subject, half, tally)
    return done


def _judge(subject: BareMetal, case: Drawn, result: bytes | str, tally: Tally) -> None:
    if isinstance(result, str):
        tally.differences.append(Difference(*case[:4], observed=result))
        return
    try:
        outcome = bare_metal.observed(case.ask, result, case.memory.touched)
    except NotCovered as why:
        tally.left_out[str(why)] += 1
        return
    except RuntimeError as why:
        tally.differences.append(Difference(*case[:4], observed=str(why)))
        return
    if isinstance(outcome, Translated):
        outcome.pa |= case.access.address & 7
    if agree(case.expected, outcome, case.memory, subject.capabilities):
        tally.agreed[FLAVORS[case.ask.flavor], kind(case.expected)] += 1
        return
    name = subject.departure(case.cpu, case.memory, case.access, case.expected, outcome)
    if name is None:
        tally.differences.append(Difference(*case[:4], observed=outcome))
    else:
        tally.known[name] += 1


def as_json(tally: Tally) -> bytes:
    """The tally as JSON."""
    return msgspec.json.encode(
        {
            "judged": tally.judged,
            "seconds": round(tally.seconds, 3),
            "deaths": tally.deaths,
            "agreed": {", ".join(key): count for key, count in sorted(tally.agreed.items())},
            "known": dict(sorted(tally.known.items())),
            "left_out": dict(sorted(tally.left_out.items())),
            "differences": [
                {
                    "cpu": found.cpu._asdict(),
                    "access": found.access._asdict(),
                    "memory": {hex(a): hex(v) for a, v in found.memory.touched.items()},
                    "expected": str(found.expected),
                    "observed": str(found.observed),
                }
                for found in tally.differences
            ],
        }
    )
