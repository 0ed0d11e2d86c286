"""Cases in batches on a machine: made, run and judged, with nothing lost when the machine dies.

While the machine runs one batch, the last is judged and the next is made. Every case is judged by
the reference. A case that does not agree is a known departure by name, or a difference.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random

import msgspec

from vapama.fuzz.decoded import RandomDraws
from vapama.oracles import native, two_stages, virtual
from vapama.oracles.bare_metal import BareMetal
from vapama.oracles.departures import (
    BIT_8,
    BIT_8_IS_IGNORED,
    BIT_12,
    BIT_12_IS_IGNORED,
    FLAGS_IN_READ_ONLY,
    PDPTE_IS_CARELESS,
    PDPTE_RESERVED,
    Disagreement,
    described,
    named,
)
from vapama.oracles.emulator import MachineDied
from vapama.oracles.machine import EPT_ALL, EPT_WRITE_BACK, FRAME, MARKED, RECORDS
from vapama.spec import domains, nested, second_stage
from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import LA57, PKE, PKS, VM, Cpu
from vapama.spec.domains import Domain
from vapama.spec.invariants.npt import host_memory
from vapama.spec.memory import Memory, Sparse, Watched
from vapama.spec.nondet import LONG_MODE, NO_PAGING, PAE_PAGING, PAGING_32, ControlStates
from vapama.spec.outcomes import (
    RSVD,
    I,
    NestedPageFault,
    NonCanonical,
    Outcome,
    OutsideMemory,
    Translated,
    U,
    Update,
    W,
    kind,
)
from vapama.spec.paging import ACCESSED, PAGE_SIZE, translate
from vapama.spec.stage import Ept, Stage
from vapama.spec.subject import SECOND_STAGE, NotCovered, agree
from vapama.spec.words import Word, low_bits

WEIGHTS = {LONG_MODE: 5, PAGING_32: 3, PAE_PAGING: 3, NO_PAGING: 1}
"""How often cases of each kind of control state are drawn; `STAGE` is that of a second stage."""
STAGE = 5
NPT_OF = {3: "NPT, PAE host", 4: "NPT", 5: "NPT of 5 levels"}
"""What cases of nested paging are called, by the host's levels."""
TABLE = 1 << 33
"""Bit of EXITINFO1: it was the guest's tables that were walked for. APM Vol. 2, 15.25.6."""
BATCH = 2000


@dataclass
class Drawn:
    """A case, what the reference says of it, and how the machine is asked."""

    mode: str
    state: Cpu | Stage
    memory: Sparse
    access: Access | GuestPhysicalAccess
    expected: Outcome
    flavor: int
    record: bytes
    observed: Callable[[bytes], Outcome]
    """The outcome that the record came back with. Raises `NotCovered`, `RuntimeError`."""
    entry_bytes: int
    describing: int
    reference: Callable[[Memory], Outcome]
    open_bits: int = 0
    others: tuple[Outcome, ...] = ()
    """Other outcomes that are allowed."""
    stage: Stage | None = None
    """The second stage of a case of both stages."""
    departing: dict[str, Outcome] = field(default_factory=dict)
    """What departures that are known by name would make of it."""


@dataclass
class Difference:
    """A case in which the machine did something else, and nobody knows why."""

    case: Drawn
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
    sampled: int = 0
    """Cases that compiled kernels found to agree and the reference judged again."""
    seconds: float = 0.0
    deaths: int = 0

    @property
    def judged(self) -> int:
        """How many cases have a verdict."""
        return self.agreed.total() + self.known.total() + len(self.differences)


# CASES


def narrowed(states: ControlStates, subject: BareMetal) -> dict[str, Domain]:
    """The draws of these states that the subject can take only some values of."""
    draws, narrow = dict(states.draws), dict(subject.capabilities.narrow)
    cr4 = draws["cr4"]
    free = cr4.free & (subject.machine.cr4 | ~native.CR4_THAT_COUNTS)
    narrow["cr4"] = replace(cr4, free=free)
    narrow["rflags"] = replace(draws["rflags"], free=draws["rflags"].free & ~VM)
    narrow["cr3"] = replace(domains.CR3, free=(1 << 25) - 1)
    return narrow


def draw(random: Random, subject: BareMetal, tally: Tally) -> Iterator[Drawn]:
    """Cases that the subject can be asked, of every mode and its second stage, without end."""
    makers = [partial(_walk, states, narrowed(states, subject)) for states in WEIGHTS]
    weights = list(WEIGHTS.values())
    if SECOND_STAGE in subject.capabilities.observes:
        wider = dict(subject.capabilities.narrow)
        if subject.machine.features.svm:
            wider["npt.mode"] = Domain(among=(*wider["npt.mode"].among, 1))
        makers.append(partial(_second_stage_walk, wider))
        narrow = narrowed(LONG_MODE, subject)
        free = narrow["cr4"].free & ~(LA57 | PKE | PKS)
        narrow["cr4"] = replace(narrow["cr4"], free=free)
        makers.append(partial(_nested_walk, narrow))
        weights += [STAGE, STAGE]
    while True:
        try:
            case = random.choices(makers, weights)[0](random, subject)
        except NotCovered as why:
            tally.left_out[_kind_of_reason(why)] += 1
            continue
        yield case


def _kind_of_reason(why: NotCovered) -> str:
    """A reason without its numbers, to count alike ones together."""
    return " ".join(word for word in str(why).split() if not word.startswith("0x"))


def _walk(
    states: ControlStates, narrow: dict[str, Domain], random: Random, subject: BareMetal
) -> Drawn:
    """A case of the guest's own paging."""
    cpu, lazy, access = RandomDraws(random, narrow).walk(states)
    return linear_case(cpu, lazy, access, subject)


def linear_case(cpu: Cpu, lazy: Memory, access: Access, subject: BareMetal) -> Drawn:
    """A case of an access to a linear address. Raises `NotCovered`."""
    watched = Watched(lazy)
    expected = translate(cpu, watched, access)
    memory = Sparse({a: lazy.load(a) for a in watched.loads}, lazy.limit)
    _require_an_end(expected, access.fetch, cpu.mode.entry_bytes)
    asked = native.ask(cpu, memory, access, subject.machine)

    def observed(result: bytes) -> Outcome:
        outcome = native.observed(asked, result, memory.touched)
        if isinstance(outcome, Translated):
            outcome.pa |= access.address & 7
        return outcome

    return Drawn(
        cpu.mode.name,
        cpu,
        memory,
        access,
        expected,
        asked.flavor,
        asked.record,
        observed,
        cpu.mode.entry_bytes,
        described(cpu, access),
        lambda other: translate(cpu, other, access),
    )


def _second_stage_walk(narrow: dict[str, Domain], random: Random, subject: BareMetal) -> Drawn:
    """A case of EPT or NPT, whichever the machine has."""
    nondet, by_ept = RandomDraws(random, narrow), subject.machine.features.vmx
    if by_ept:
        stage: Stage = nondet.ept()
        lazy = nondet.memory("host", entries=domains.EPT_ENTRY)
    else:
        stage = nondet.npt()
        lazy = host_memory(nondet, stage)
    access = nondet.guest_physical_access()
    if stage.levels == 3:
        access = access._replace(address=access.address & low_bits(32))
    return second_stage_case(stage, lazy, access, subject)


def second_stage_case(
    stage: Stage, lazy: Memory, access: GuestPhysicalAccess, subject: BareMetal
) -> Drawn:
    """A case of an access to a guest-physical address. Raises `NotCovered`."""
    watched = Watched(lazy)
    expected = second_stage.translate(stage, watched, access)
    memory = Sparse({a: lazy.load(a) for a in watched.loads}, lazy.limit)
    _require_an_end(expected, access.fetch)
    _require_in_reach(stage, expected)
    departing = _with_a_careless_pdpte(stage, memory, access)
    for outcome in (*departing.values(), _without_reserved_bits(stage, memory, access, subject)):
        _require_an_end(outcome, access.fetch)
    asked = virtual.ask(stage, memory, access, subject.machine)
    return Drawn(
        "EPT" if isinstance(stage, Ept) else NPT_OF[stage.levels],
        stage,
        memory,
        access,
        expected,
        asked.flavor,
        asked.record,
        lambda result: virtual.observed(asked, result, access, memory),
        8,
        access.write * W | U | access.fetch * I,
        lambda other: second_stage.translate(stage, other, access),
        open_bits=I,
        departing=departing,
    )


def _nested_walk(narrow: dict[str, Domain], random: Random, subject: BareMetal) -> Drawn:
    """A case of both stages, whichever second one the machine has."""
    nondet, by_ept = RandomDraws(random, narrow), subject.machine.features.vmx
    cpu = nondet.cpu(LONG_MODE)
    stage: Stage = nondet.ept() if by_ept else nondet.npt()
    lazy = nondet.memory("host", entries=domains.EPT_ENTRY if by_ept else domains.ENTRY)
    access = nondet.access()
    access = access._replace(address=access.address & ~7 | 7 * access.write)
    return nested_case(cpu, stage, _with_a_root(cpu, stage, lazy), access, subject)


def nested_case(cpu: Cpu, stage: Stage, lazy: Memory, access: Access, subject: BareMetal) -> Drawn:
    """A case of an access of a guest's, through both stages. Raises `NotCovered`."""
    by_ept = isinstance(stage, Ept)
    watched = Watched(lazy)
    expected = nested.allowed(cpu, stage, watched, access)
    memory = Sparse({a: watched.memory.load(a) for a in watched.loads}, lazy.limit)
    for outcome in expected:
        _require_an_end(outcome, access.fetch)
        _require_in_reach(stage, outcome)
    if isinstance(expected[0], NonCanonical):
        raise NotCovered("a non-canonical address, for which nothing is walked")
    guest = nested.GuestMemory(stage, memory)
    try:
        guest.load(cpu.cr3 & FRAME)
    except nested.Stopped:
        raise NotCovered("a guest whose root table is not there") from None
    root = guest.loads[0].pa
    if by_ept:
        _require_apart(cpu, stage, memory, access, subject)
    departing = {
        **_without_write_back(cpu, stage, memory, access),
        **_without_bit_8(cpu, stage, memory, access, expected[0]),
    }
    for outcome in departing.values():
        _require_an_end(outcome, access.fetch)
    asked = two_stages.ask(cpu, stage, memory, access, root, subject.machine)
    return Drawn(
        "4-level paging under " + ("EPT" if by_ept else "NPT"),
        cpu,
        memory,
        access,
        expected[0],
        asked.flavor,
        asked.record,
        lambda result: two_stages.observed(asked, result, access, memory),
        8,
        described(cpu, access),
        lambda other: nested.translate(cpu, stage, other, access),
        others=expected[1:],
        stage=stage,
        departing=departing,
    )


class _Mended:
    """A memory in which some entries are others."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.limit = memory, memory.limit
        self.entries: dict[Word, Word] = {}

    def load(self, address: Word) -> Word:
        """The entry at an address."""
        return self.entries[address] if address in self.entries else self.memory.load(address)


class _FirstMended:
    """A memory that is loaded from once as another entry: a table may be met again further down,
    where the same word means something else.
    """

    def __init__(self, memory: Memory, first: Word) -> None:
        self.memory, self.limit = memory, memory.limit
        self.first: Word | None = first

    def load(self, address: Word) -> Word:
        """The entry at an address."""
        first, self.first = self.first, None
        return self.memory.load(address) if first is None else first


def _with_a_root(cpu: Cpu, stage: Stage, memory: Memory) -> Memory:
    """The memory, with entries of the second stage such that the guest's root table is there: they
    reference what was drawn, with all rights.
    """
    mended = _Mended(memory)
    for _ in range(4):
        watched = Watched(mended)
        access = nested.access_to_table(cpu.cr3 & FRAME)
        outcome = second_stage.translate(stage, watched, access)
        if isinstance(outcome, Translated) or not watched.loads:
            break
        *above, last = watched.loads
        rights = EPT_ALL if isinstance(stage, Ept) else MARKED
        for address in above:
            mended.entries[address] = mended.load(address) | rights
        if isinstance(stage, Ept) and len(above) == 3:
            rights |= EPT_WRITE_BACK
        mended.entries[last] = mended.load(last) & 0xF000 | rights
    return mended


def _require_apart(
    cpu: Cpu, stage: Stage, memory: Sparse, access: Access, subject: BareMetal
) -> None:
    """Raise `NotCovered` where an entry is one of both stages, so that the walk itself changes what
    it goes by; or where the machine is known to go on, with entries that the case does not have.
    """
    watched = Watched(memory)
    guest = nested.GuestMemory(stage, watched)
    with contextlib.suppress(nested.Stopped):
        outcome = translate(cpu, guest, access)
        if isinstance(outcome, Translated):
            page = nested.access_to_page(cpu, guest, access, outcome.pa)
            second_stage.translate(stage, watched, page)
    of_guest = Counter(load.pa for load in guest.loads)
    if (Counter(watched.loads) - of_guest).keys() & of_guest.keys():
        raise NotCovered("an entry of both stages, whose flags mean something else in the other")
    large = PAGE_SIZE | BIT_12
    goes_on = BIT_12_IS_IGNORED in subject.departures
    if goes_on and any(entry & large == large for entry in memory.touched.values()):
        raise NotCovered("perhaps a large page of EPT with bit 12, where this machine goes on")


def _without_write_back(
    cpu: Cpu, stage: Stage, memory: Memory, access: Access
) -> dict[str, Outcome]:
    """The outcome of a machine that sets the guest's flags whatever EPT says of their page."""
    guest = nested.GuestMemory(stage, memory)
    try:
        outcome = translate(cpu, guest, access)
    except nested.Stopped:
        return {}
    if not isinstance(outcome, Translated) or not nested.flags_are_written_apart(stage):
        return {}
    entries = nested.entries_with_flags(cpu, guest)
    flags = guest.flags + nested.in_host(entries, outcome.updates)
    page = nested.access_to_page(cpu, guest, access, outcome.pa)
    final = second_stage.translate(stage, memory, page)
    if isinstance(final, Translated):
        final = replace(final, updates=flags + final.updates)
    else:
        final = nested.stopped_by(final, flags)
    return {FLAGS_IN_READ_ONLY.name: final}


def _without_reserved_bits(
    stage: Stage, memory: Sparse, access: GuestPhysicalAccess, subject: BareMetal
) -> Outcome:
    """Where this machine goes on to, if it is known not to check some reserved bit."""
    always = BIT_8 * (BIT_8_IS_IGNORED in subject.departures)
    of_large = BIT_12 * (BIT_12_IS_IGNORED in subject.departures)
    entries = {
        at: entry & ~(always | of_large * (entry & PAGE_SIZE != 0))
        for at, entry in memory.touched.items()
    }
    return second_stage.translate(stage, Sparse(entries, memory.limit), access)


def _require_in_reach(stage: Stage, expected: Outcome) -> None:
    """Raise `NotCovered` for a guest-physical address wider than the stage's walk translates: by
    the reference that is not present, and QEMU leaves out the upper bits.
    """
    if isinstance(expected, NestedPageFault) and stage.levels == 4 and expected.gpa >> 48:
        raise NotCovered("a guest-physical address of more than 48 bits under 4 levels")


def _with_a_careless_pdpte(
    stage: Stage, memory: Sparse, access: GuestPhysicalAccess
) -> dict[str, Outcome]:
    """The outcome if a nested PDPTE of PAE paging is not checked for reserved bits, and has an
    accessed flag.
    """
    if stage.levels != 3 or not memory.touched:
        return {}
    at, entry = next(iter(memory.touched.items()))
    outcome = second_stage.translate(stage, _FirstMended(memory, entry & ~PDPTE_RESERVED), access)
    flag = (Update(at, ACCESSED),)
    if isinstance(outcome, Translated):
        return {PDPTE_IS_CARELESS.name: replace(outcome, updates=flag + outcome.updates)}
    assert isinstance(outcome, NestedPageFault | OutsideMemory)
    return {PDPTE_IS_CARELESS.name: replace(outcome, may_update=flag + outcome.may_update)}


def _without_bit_8(
    cpu: Cpu, stage: Stage, memory: Sparse, access: Access, expected: Outcome
) -> dict[str, Outcome]:
    """The outcome if bit 8 of the second stage's upper entries is not checked: it is 0 in each
    entry that a walk of that stage stops at for it.
    """
    mended = _Mended(memory)
    while isinstance(expected, NestedPageFault) and expected.exitinfo1 & RSVD:
        watched = Watched(mended)
        nested.translate(cpu, stage, watched, access)
        last = watched.loads[-1]
        entry = mended.load(last)
        if not entry & BIT_8:
            break
        mended.entries[last] = entry & ~BIT_8
        expected = nested.translate(cpu, stage, mended, access)
    if not mended.entries:
        return {}
    return {BIT_8_IS_IGNORED.name: expected}


def _require_an_end(expected: Outcome, fetch: int, entry_bytes: int = 8) -> None:
    """Raise `NotCovered` for a fetch that would run on where there is no RAM.

    A 4-byte entry where there is none may read as one that maps a page there.
    """
    beyond = isinstance(expected, Translated) and not native.is_free(expected.pa)
    if fetch and (beyond or (entry_bytes == 4 and isinstance(expected, OutsideMemory))):
        raise NotCovered("a fetch from where there is no RAM")


# RUNS


def run(
    subject: BareMetal,
    cases: int,
    seed: int,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Run cases until so many are judged."""
    tally, start = Tally(), time.monotonic()
    source = draw(Random(seed), subject, tally)
    waiting: dict[tuple[int, int], list[Drawn]] = {}
    running: list[Drawn] = []
    size = min(BATCH, cases // 20 + 1)  # so that a short run comes to every flavor
    while running or tally.judged < cases:
        wanted = min(size, cases - tally.judged - len(running))
        batch = _next_batch(source, waiting, wanted) if wanted > 0 else []
        # The machine works on one batch while the other is made or judged.
        done = finish(subject, running, tally) if running else []
        if batch:
            give(subject, batch)
        for case, result in done:
            judge(subject, case, result, tally)
        tally.seconds = time.monotonic() - start
        if done:
            progress(tally)
        running = batch
    return tally


def _next_batch(
    source: Iterator[Drawn], waiting: dict[tuple[int, int], list[Drawn]], wanted: int
) -> list[Drawn]:
    """Cases of one flavor: as soon as there are enough of one."""
    while True:
        case = next(source)
        group = waiting.setdefault((case.flavor, len(case.record)), [])
        group.append(case)
        if len(group) >= wanted:
            return waiting.pop((case.flavor, len(case.record)))


def give(subject: BareMetal, batch: Sequence[Drawn]) -> None:
    """Let the machine start on a batch. If it is dead, that shows when the batch is finished."""
    records = b"".join(case.record for case in batch)
    with contextlib.suppress(OSError):
        subject.machine.give(batch[0].flavor, records, len(batch[0].record))


def finish(
    subject: BareMetal, batch: Sequence[Drawn], tally: Tally
) -> list[tuple[Drawn, bytes | str]]:
    """Each case of the batch under way with its record as it came back, or why the machine died.

    When it dies or hangs it is started again. The case that it was at is run alone then, to see if
    it is to blame; those before it are run again with those behind, so that none is lost.
    """
    machine, size = subject.machine, len(batch[0].record)
    at = len(batch) // 2
    try:
        machine.await_finish()
        results = machine.read(RECORDS, len(batch) * size)
        if machine.read(0, native.POOL_BYTES) == native.STAMPS:
            return [(case, results[i * size : (i + 1) * size]) for i, case in enumerate(batch)]
        why = "memory changed that is neither an entry of the walk nor its page"
    except (MachineDied, OSError) as death:
        why = str(death)
        tally.deaths += 1
        with contextlib.suppress(OSError):
            at = len(batch) - machine.left()
    machine.start()
    if len(batch) == 1:
        return [(batch[0], why)]
    at = min(max(at, 0), len(batch) - 1)
    done: list[tuple[Drawn, bytes | str]] = []
    for part in (batch[:at], batch[at : at + 1], batch[at + 1 :]):
        if part:
            give(subject, part)
            done += finish(subject, part, tally)
    return done


def judge(subject: BareMetal, case: Drawn, result: bytes | str, tally: Tally) -> None:
    """Count what came of a case, by the reference."""
    if isinstance(result, str):
        tally.differences.append(Difference(case, result))
        return
    try:
        outcome = case.observed(result)
    except NotCovered as why:
        tally.left_out[_kind_of_reason(why)] += 1
        return
    except RuntimeError as why:
        tally.differences.append(Difference(case, str(why)))
        return
    allowed = (case.expected, *case.others)
    if any(agree(each, outcome, case.memory, subject.capabilities) for each in allowed):
        tally.agreed[case.mode, kind(case.expected)] += 1
        return
    for departure in subject.departures:
        instead = case.departing.get(departure.name)
        if instead is not None and (
            agree(instead, outcome, case.memory, subject.capabilities)
            or _named(subject, replace(case, expected=instead), outcome)
        ):
            tally.known[departure.name] += 1
            return
    name = _named(subject, case, outcome)
    if name is None:
        tally.differences.append(Difference(case, outcome))
    else:
        tally.known[name] += 1


def _named(subject: BareMetal, case: Drawn, outcome: Outcome) -> str | None:
    """The name of a disagreement among the known departures, None if it is not one."""
    return named(
        subject.departures,
        Disagreement(
            case.memory,
            case.expected,
            outcome,
            subject.capabilities,
            case.entry_bytes,
            _describing(case, outcome),
            case.reference,
            case.open_bits | (I if isinstance(outcome, NestedPageFault) else 0),
        ),
    )


def _describing(case: Drawn, outcome: Outcome) -> int:
    """What an error code says of the access: that of a nested fault of the guest's, another."""
    if case.stage is None or not isinstance(outcome, NestedPageFault):
        return case.describing
    if outcome.exitinfo1 & TABLE:
        return W | U
    return case.access.write * W | U | case.access.fetch * I


def as_json(tally: Tally) -> bytes:
    """The tally as JSON."""
    return msgspec.json.encode(
        {
            "judged": tally.judged,
            "seconds": round(tally.seconds, 3),
            "deaths": tally.deaths,
            "sampled": tally.sampled,
            "agreed": {", ".join(key): count for key, count in sorted(tally.agreed.items())},
            "known": dict(sorted(tally.known.items())),
            "left_out": dict(sorted(tally.left_out.items())),
            "differences": [
                {
                    "mode": found.case.mode,
                    "state": {name: str(v) for name, v in found.case.state._asdict().items()},
                    "access": found.case.access._asdict(),
                    "memory": {hex(a): hex(v) for a, v in found.case.memory.touched.items()},
                    "expected": str(found.case.expected),
                    "observed": str(found.observed),
                }
                for found in tally.differences
            ],
        }
    )
