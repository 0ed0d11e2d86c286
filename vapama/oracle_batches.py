"""Whole batches of 4- and 5-level cases, made and judged by compiled kernels.

A batch shares one memory of random entries, of which the pool of frames is drawn anew for each. The
kernels walk each case by the optimized walk, write its record, and judge what came back. What they
do not find to agree, and a sample of the rest, the reference judges: see `vapama.oracle_runs`.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from vapama import batch_kernels as k
from vapama.impl.kernels.compiled import compiled
from vapama.impl.kernels.long_mode import FAULT, NONCANONICAL
from vapama.oracle_runs import Drawn, Tally, finish, give, judge, linear_case
from vapama.oracles import machine as m
from vapama.oracles import native
from vapama.oracles.bare_metal import BareMetal
from vapama.oracles.departures import RESERVED_LACKS_P
from vapama.oracles.emulator import MachineDied
from vapama.spec import domains
from vapama.spec.access import Access
from vapama.spec.cpu import (
    AC,
    LMA,
    LME,
    NXE,
    PAE,
    PE,
    PG,
    PKE,
    PKS,
    RFLAGS_ONE,
    SMAP,
    SMEP,
    WP,
    Cpu,
)
from vapama.spec.memory import Sparse
from vapama.spec.words import WORD

BATCH = 10_000
SAMPLE = 200
"""Of so many cases that the kernels find to agree, the reference judges one again."""
WORDS = native.RECORD_BYTES // 8
Batch = dict[str, Any]


def run(
    subject: BareMetal,
    cases: int,
    seed: int,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Run cases of 4- and 5-level paging until so many are judged."""
    batches = Batches(subject, seed)
    tally, start = Tally(), time.monotonic()
    running: Batch | None = None
    while running is not None or tally.judged < cases:
        under_way = len(running["records"]) if running is not None else 0
        batch = batches.make(tally) if tally.judged + under_way < cases else None
        results = batches.finish(running) if running is not None else None
        if batch is not None:
            batches.give(batch)
        if running is not None:
            batches.judge(running, results, tally)
            tally.seconds = time.monotonic() - start
            progress(tally)
            if results is None and batch is not None:
                batches.give(batch)  # the machine was started anew
        running = batch
    return tally


class Batches:
    """Batches for one machine: its processor's features, its memory, and the kernels."""

    def __init__(self, subject: BareMetal, seed: int) -> None:
        self.subject, self.machine = subject, subject.machine
        self.random = np.random.default_rng(seed)
        self.lacks_p = int(RESERVED_LACKS_P in subject.departures)
        self.image = np.zeros(m.SERVER // 8, dtype=np.uint64)
        self.path = np.zeros(8, dtype=np.uint64)
        five = m.WORLDS_OF[m.LONG_5]
        self.worlds = np.array([*m.WORLDS_OF[m.LONG_4], *five], dtype=np.uint64)
        self.kernels = {
            kernel.__name__: compiled(kernel)
            for kernel in (k.draw_entries, k.draw_words, k.make, k.judge)
        }
        self._draw_entries(len(self.image))
        self.turn = 0

    def _raw(self, *shape: int) -> Any:
        return self.random.integers(0, 1 << 64, size=shape, dtype=np.uint64)

    def _draw_entries(self, count: int) -> None:
        self.kernels["draw_entries"](self._raw(count), self.image[:count])

    def _drawn(self) -> Any:
        """Control states and accesses: every bit that the processor has is free."""
        cases = np.zeros((BATCH, 9), dtype=np.uint64)
        cr4 = domains.CR4.free & self.machine.cr4
        five = m.LONG_5 if self.turn & 1 and self.machine.cr4 >> 12 & 1 else m.LONG_4
        la57 = 1 << 12
        columns = (
            (0, domains.CR0.free & ~native.CR0_LEFT_OUT, PG | PE, WP),
            (2, cr4 & ~la57, PAE | la57 * (five == m.LONG_5), SMEP | SMAP | PKE | PKS),
            (3, NXE, LME | LMA, NXE),
            (4, domains.RFLAGS.free & native.RFLAGS_SET, RFLAGS_ONE, AC),
        )
        for column, free, fixed, counts in columns:
            # Bits that change nothing are drawn once a batch: an emulator translates code anew for
            # each combination of many of them.
            raw = self._raw(BATCH) & np.uint64(counts) | self._raw(1) & np.uint64(WORD ^ counts)
            cases[:, column] = raw & np.uint64(free) | np.uint64(fixed)
        self.kernels["draw_words"](self._raw(BATCH, 4), cases)
        kinds = np.array([kind for kind in domains.ACCESSES if kind & 1 == 0], dtype=np.uint64)
        cases[:, 8] = kinds[self.random.integers(0, len(kinds), size=BATCH)]
        # What an emulator does most slowly it is spared where it can be: code that changes under it
        # (fetches apart from the rest), and control bits that flush its TLB (alike ones together).
        fetch = cases[:, 8] >> np.uint64(4)
        flushing = cases[:, 2] & np.uint64(0x310090)
        order = np.lexsort((cases[:, 0] & np.uint64(1 << 16), flushing, fetch))
        return five, cases[order]

    def make(self, tally: Tally) -> Batch:
        """A batch: its cases, what is expected of them, and their records."""
        self.turn += 1
        self._draw_entries(native.POOL_BYTES // 8)
        flavor, cases = self._drawn()
        records = np.zeros((BATCH + 1, WORDS), dtype=np.uint64)
        expected = np.zeros((BATCH, 5), dtype=np.uint64)
        features = self.machine.features
        made = int(
            self.kernels["make"](
                self.image,
                *(np.uint64(n) for n in (len(self.image), features.maxphyaddr, features.page1gb)),
                cases,
                self.worlds,
                self.path,
                records,
                expected,
            )
        )
        tally.left_out["the guest cannot be asked (see `native.require_askable`)"] += BATCH - made
        records = records[:made]
        return {"flavor": flavor, "cases": cases, "records": records, "expected": expected[:made]}

    def give(self, batch: Batch) -> None:
        """Let the machine start on a batch."""
        self.machine.give(batch["flavor"], batch["records"].tobytes(), native.RECORD_BYTES)

    def finish(self, batch: Batch) -> Any:
        """The records as they came back; None if the machine died of something."""
        size = batch["records"].nbytes
        try:
            self.machine.await_finish()
            data = self.machine.read(m.RECORDS, size)
            if self.machine.read(0, native.POOL_BYTES) != native.STAMPS:
                return None
        except (MachineDied, OSError):
            return None
        return np.frombuffer(data, dtype=np.uint64).reshape(-1, WORDS)

    def judge(self, batch: Batch, results: Any, tally: Tally) -> None:
        """Count what came of a batch. One that the machine died of is run again, case by case."""
        made = len(batch["records"])
        if results is None:
            tally.deaths += 1
            self.machine.start()
            drawn = [self.case(batch, i) for i in range(made)]
            give(self.subject, drawn)
            for case, result in finish(self.subject, drawn, tally):
                judge(self.subject, case, result, tally)
            return
        verdicts = np.zeros(made, dtype=np.uint64)
        self.kernels["judge"](
            np.uint64(made),
            batch["records"],
            results,
            batch["expected"],
            np.uint64(self.lacks_p),
            verdicts,
        )
        self._count(batch, verdicts, tally)
        again = np.flatnonzero(verdicts == k.LOOK).tolist()
        sample = np.flatnonzero(verdicts == k.AGREES)[::SAMPLE].tolist()
        for i in again:
            judge(self.subject, self.case(batch, i), results[i].tobytes(), tally)
        for i in sample:
            found = Tally()
            judge(self.subject, self.case(batch, i), results[i].tobytes(), found)
            tally.differences += found.differences
            tally.sampled += 1

    def _count(self, batch: Batch, verdicts: Any, tally: Tally) -> None:
        mode = "5-level paging" if batch["flavor"] == m.LONG_5 else "4-level paging"
        statuses = batch["expected"][verdicts == k.AGREES, 1]
        for what, count in (
            ("translated", int((statuses < FAULT).sum())),
            ("page fault", int((statuses == FAULT).sum())),
            ("non-canonical address", int((statuses == NONCANONICAL).sum())),
        ):
            if count:
                tally.agreed[mode, what] += count
        known = int((verdicts == k.KNOWN).sum())
        if known:
            tally.known[RESERVED_LACKS_P.name] += known
        beyond = int((verdicts == k.UNKNOWN_PLACE).sum())
        tally.left_out["the access went where there is no RAM"] += beyond

    def case(self, batch: Batch, i: int) -> Drawn:
        """A case of a batch as the reference takes it."""
        row = batch["cases"][int(batch["expected"][i, 0])].tolist()
        cr0, cr3, cr4, efer, rflags, pkru, pkrs, address, access = row
        features = self.machine.features
        registers = (cr0, cr3, cr4, efer, rflags, pkru, pkrs, int(features.page1gb))
        cpu = Cpu(*registers, features.maxphyaddr, int(features.pse36))
        record = batch["records"][i].tolist()
        count = int(batch["expected"][i, 3])
        pokes = record[k.FIRST_POKE : k.FIRST_POKE + 2 * count]
        memory = Sparse(dict(zip(pokes[::2], pokes[1::2], strict=True)), m.SERVER)
        access_ = Access(address, access >> 1 & 1, access >> 4 & 1, access >> 2 & 1)
        return linear_case(cpu, memory, access_, self.subject)
