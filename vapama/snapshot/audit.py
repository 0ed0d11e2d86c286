"""An audit of a hypervisor's tables: what nothing justifies, and what no tables may look like.

Judged are the second-stage or shadow tables in an image, against the memory slots and the guest's
own tables; or, without them, the guest's own. The tables are read by the compiled kernels and by
numpy; the path to an offending entry is walked anew by the specification.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from vapama.case import BadInput
from vapama.explain import describe_step
from vapama.impl.kernels import mappings as kernel
from vapama.impl.listing import Words
from vapama.snapshot import answers, tables
from vapama.snapshot.answers import EXECUTE, READ, SIZES, USER, WRITE, Rows
from vapama.snapshot.findings import NOTE, RULES, Counted, Finding, Report
from vapama.snapshot.sides import Side
from vapama.snapshot.slots import UNKNOWN, Slots
from vapama.snapshot.tables import (
    FRAME,
    MISCONFIGURED,
    NOWHERE,
    RESERVED,
    UNALIGNED,
    Entries,
    Mask,
    Numbers,
    Survey,
    Walked,
)
from vapama.spec import paging
from vapama.spec.cpu import Cpu
from vapama.spec.stage import Ept
from vapama.spec.words import WORD


@dataclass(frozen=True)
class Options:
    """How to audit: how many findings of a rule to tell, and the limits; entries that are marks for
    devices, as value and mask, and of which generation they have to be; guest tables that may be
    out of sync.
    """

    most_told: int = 10
    most_runs: int = 1 << 26
    most_reads: int = 1 << 32
    device: tuple[int, int] | None = None
    generation: tuple[int, int] | None = None
    unsync: tuple[int, ...] = ()
    executable_large: bool = True


def audit(
    hypervisor: Side | None, guest: Side | None, slots: Slots | None, options: Options
) -> Report:
    """Audit the hypervisor's tables, or the guest's own if there are none. Raises `BadInput`."""
    return _Audit(hypervisor, guest, slots, options).run()


class _Audit:
    """An audit in the making."""

    def __init__(
        self, hypervisor: Side | None, guest: Side | None, slots: Slots | None, options: Options
    ) -> None:
        self.hypervisor, self.guest, self.slots, self.options = hypervisor, guest, slots, options
        self.shadow = hypervisor is not None and isinstance(hypervisor.state, Cpu)
        self.report = Report()
        self.told: Counter[tuple[str, str]] = Counter()
        self.own: Words = np.zeros(0, dtype=np.uint64)
        """The pages of the tables that are judged."""
        self.shadowed: Words = self.own
        """The guest's tables that have a shadow."""
        self.placed: list[tuple[Words, ...]] = []
        """Runs of guest-physical addresses: gpa, place, bytes, whether to write, address."""

    def run(self) -> Report:
        """The audit's report."""
        judged = self.hypervisor or self.guest
        assert judged is not None
        for side in (self.hypervisor, self.guest):
            if side is not None and not side.unpaged:
                if not self._has_root(side):
                    if side is judged:
                        raise BadInput(
                            f"{side.image.name} does not hold the root of the {side.name} at "
                            f"{side.form.root:#x}"
                        )
                    continue
                found = self._survey(side)
                if side is judged:
                    self.own = found.frames()
                    guest = self.guest
                    if self.shadow and guest is not None and not guest.unpaged:
                        self.shadowed = self._shadowed(found, guest)
                self._structure(side, found, judged is side)
        if self.hypervisor is not None:
            self._mappings(self.hypervisor)
            self._places(self.hypervisor)
        return self.report

    # FINDINGS

    def _find(
        self, rule: str, side: Side, what: str, address: int, size: int, level: int = 0
    ) -> None:
        """Tell of a finding, unless enough of its rule were told. The entry is that of `level`, or
        the one that maps the address.
        """
        status = self._status(rule, side)
        if self._enough(rule, side):
            return
        self.told[side.name, rule] += 1
        finding = Finding(
            rule=rule,
            status=status,
            tables=side.name,
            what=what,
            address=hex(address),
            bytes=size,
        )
        for step in side.path(address):
            finding.path.append(describe_step(side.state, address, step))
            finding.entry_at, finding.entry = hex(step.address), hex(step.entry)
            if step.level == level:
                break
        if self.shadow and side is self.hypervisor and self.guest is not None:
            assert isinstance(self.guest.state, Cpu)
            for step in self.guest.path(address):
                finding.guest_path.append(describe_step(self.guest.state, address, step))
        self.report.findings.append(finding)

    def _status(self, rule: str, side: Side) -> str:
        """A guest may do to its own tables what it likes: of them there are notes, if they are not
        what is judged; and a table that leads to itself is a way to reach one's tables.
        """
        if side is self.guest and (self.hypervisor is not None or rule in MAY_BE_MEANT):
            return NOTE
        if rule == "device-in-a-slot" and self.options.generation is None:
            return NOTE  # it may be of an earlier one, and no longer count
        return RULES[rule].status

    def _count(self, rule: str, side: Side, number: int) -> None:
        self.report.counts[Counted(side.name, rule, self._status(rule, side))] += number

    def _enough(self, rule: str, side: Side) -> bool:
        return self.told[side.name, rule] >= self.options.most_told

    def _rows(
        self, rule: str, side: Side, chosen: Mask, rows: Rows, told: Callable[[int], str]
    ) -> None:
        """Findings about the pages chosen, neighbours together; `told` says what of the first."""
        at = np.flatnonzero(chosen)
        if not len(at):
            return
        self._count(rule, side, len(at))
        sizes = np.uint64(1) << rows.shifts[at]
        first = _starts(rows.addresses[at], rows.pas[at], sizes, rows.rights[at])
        for start, end in zip(first.tolist(), [*first[1:].tolist(), len(at)], strict=True):
            if self._enough(rule, side):
                return
            k = int(at[start])
            size = int(sizes[start]) * (end - start)
            self._find(rule, side, told(k), int(rows.addresses[k]), size)

    # STRUCTURE

    def _has_root(self, side: Side) -> bool:
        root = np.array([side.form.root], dtype=np.uint64)
        return bool(tables.positions(side.image.pieces, root, 32)[0] != NOWHERE)

    def _survey(self, side: Side) -> Survey:
        form = side.form
        found = tables.survey(form, side.image.pieces, side.flags, self.options.most_reads)
        self.report.tables += found.tables
        self.report.entries += found.reads
        if found.stopped:
            self.report.stopped = "reads"
        return found

    def _structure(self, side: Side, found: Survey, judged: bool) -> None:
        """What no tables may look like, whatever they map."""
        for kind, rule in KINDS.items():
            for entries in found.odd.get(kind, ()):
                entries_ = self._devices(side, entries) if judged else entries
                self._entries(rule, side, entries_, TELL[rule])
        for entries in found.missing:
            self._entries("absent-table", side, entries, TELL["absent-table"])
        for entries in found.unaccessed:
            self._entries("dirty-and-not-accessed", side, entries, TELL["dirty-and-not-accessed"])
        self._tables(side, found)

    def _entries(self, rule: str, side: Side, entries: Entries, told: Callable[[int], str]) -> None:
        if not len(entries.where):
            return
        self._count(rule, side, len(entries.where))
        shift = int(side.form.words[kernel.SHIFT + entries.level])
        for k in range(min(len(entries.where), self.options.most_told)):
            what = told(int(entries.entries[k]))
            self._find(rule, side, what, int(entries.addresses[k]), 1 << shift, entries.level)

    def _devices(self, side: Side, entries: Entries) -> Entries:
        """Rule 23, of the entries that are marks for devices; returns the others."""
        if self.options.device is None or side is not self.hypervisor:
            return entries
        value, mask = (np.uint64(word) for word in self.options.device)
        marks = entries.entries & mask == value
        if self.slots is not None and marks.any():
            devices = entries.part(marks)
            gpas, known = self._gpas(devices.addresses)
            inside = known & self.slots.of(gpas)[0]
            if self.options.generation is not None:
                value, mask = (np.uint64(word) for word in self.options.generation)
                inside &= devices.entries & mask == value
            self._entries(
                "device-in-a-slot",
                side,
                devices.part(inside),
                lambda entry: f"{entry:#x} is a device's mark, and a memory slot has memory there",
            )
        return entries.part(~marks)

    def _tables(self, side: Side, found: Survey) -> None:
        """Tables that are used more than once."""
        frames = np.concatenate([level.frames for level in found.levels]) & FRAME
        unique, times = np.unique(frames, return_counts=True)
        again = unique[times > 1]
        for depth, level in enumerate(found.levels):
            above = _ancestors(found, depth)
            own = level.frames & FRAME
            cyclic = (above == own[:, None]).any(axis=1)
            earlier = [upper.frames & FRAME for upper in found.levels[:depth]]
            two = np.isin(own, again) & ~cyclic
            two &= np.isin(own, np.concatenate(earlier)) if earlier else False
            shared = (level.leads > 1) & (not isinstance(side.state, Cpu))
            for rule, chosen, told in (
                ("cycle", cyclic, "the table at {:#x} leads to itself"),
                ("two-levels", two, "the table at {:#x} is also used at a level above"),
                ("shared-table", shared, "{1} entries lead to the table at {0:#x}"),
            ):
                at = np.flatnonzero(chosen)
                if len(at):
                    self._count(rule, side, len(at))
                shift = int(side.form.words[kernel.SHIFT + level.level])
                count = int(side.form.words[kernel.COUNT + level.level])
                for k in at[: self.options.most_told].tolist():
                    what = told.format(int(own[k]), int(level.leads[k]))
                    size = count << shift
                    self._find(rule, side, what, int(level.bases[k]), size, level.level + 1)

    # MAPPINGS

    def _mappings(self, side: Side) -> None:
        """What the hypervisor's tables map, a batch of pages at a time."""
        options = self.options
        listing = answers.listing_of(
            side.state, side.image.pieces, side.image.name, False, options.most_runs,
            options.most_reads,
        )  # fmt: skip
        for batch in listing.batches(room=1 << 17):
            rows = answers.as_rows(side.state, batch)
            self._own_tables(side, rows)
            if not options.executable_large:
                self._rows(
                    "executable-large-page",
                    side,
                    (rows.rights & np.uint64(EXECUTE) != 0) & (rows.shifts > np.uint64(12)),
                    rows,
                    partial(_told_executable, rows),
                )
            gpas, judged = rows.addresses, np.ones(len(rows.addresses), dtype=bool)
            if self.shadow and self.guest is not None:
                gpas, judged = self._by_guest(side, rows)
            if self.slots is not None:
                self._by_slots(side, rows, gpas, judged, self.slots)
            self._place(rows, gpas, judged)
        self.report.pages += listing.pages
        self.report.entries += listing.reads
        self.report.stopped = self.report.stopped or listing.stopped

    def _own_tables(self, side: Side, rows: Rows) -> None:
        low = np.searchsorted(self.own, rows.pas)
        high = np.searchsorted(self.own, rows.pas + (np.uint64(1) << rows.shifts))

        def told(k: int) -> str:
            return f"the page at {int(rows.pas[k]):#x} holds the table {int(self.own[low[k]]):#x}"

        self._rows("table-reachable", side, high > low, rows, told)

    # Against the slots.

    def _by_slots(self, side: Side, rows: Rows, gpas: Words, judged: Mask, slots: Slots) -> None:
        """Rules 2, 3, 7, 21 and 22."""
        u64 = np.uint64
        inside, slot = slots.of(gpas)
        ends = gpas + (u64(1) << rows.shifts)
        write = (rows.rights & u64(WRITE) != 0) & judged & inside
        ahead = gpas - slots.gpas[slot]

        def gpa(k: int) -> str:
            return f"guest-physical {int(gpas[k]):#x}"

        self._rows(
            "no-slot", side, judged & ~inside, rows,
            lambda k: f"{gpa(k)} is mapped to {int(rows.pas[k]):#x}, and is in no slot",
        )  # fmt: skip
        crosses = judged & inside & (ends > slots.ends[slot])
        self._rows(
            "crosses-a-slot", side, crosses, rows,
            lambda k: f"a page of {_size(rows, k)} at {gpa(k)}, whose slot ends at "
            f"{int(slots.ends[slot[k]]):#x}",
        )  # fmt: skip
        expected = slots.hpas[slot] + ahead
        wrong = judged & inside & (slots.hpas[slot] != u64(UNKNOWN)) & (rows.pas != expected)
        self._rows(
            "wrong-frame", side, wrong, rows,
            lambda k: f"{gpa(k)} is mapped to {int(rows.pas[k]):#x}, and the host has it at "
            f"{int(expected[k]):#x}",
        )  # fmt: skip
        at = slots.hvas[slot] + ahead
        offset = (u64(1) << rows.shifts) - u64(1)
        misplaced = (
            judged & inside & (slots.hvas[slot] != u64(UNKNOWN)) & ((gpas ^ at) & offset != 0)
        )
        self._rows(
            "misplaced-large-page", side, misplaced, rows,
            lambda k: f"a page of {_size(rows, k)} at {gpa(k)}, which is at host-virtual "
            f"{int(at[k]):#x}",
        )  # fmt: skip
        self._rows(
            "writable-read-only-slot", side, write & slots.readonly[slot], rows,
            lambda k: f"{gpa(k)} is in a read-only slot, and can be written",
        )  # fmt: skip
        by_flags = isinstance(side.state, Ept) and side.state.ad
        unlogged = write & slots.log[slot] & (not by_flags)
        unlogged &= (rows.shifts > u64(12)) | ~np.isin(gpas, slots.dirty)
        self._rows(
            "unlogged-write", side, unlogged, rows,
            lambda k: f"a write to {gpa(k)} would not be logged",
        )  # fmt: skip

    # Against the guest's own tables.

    def _walked(self, addresses: Words) -> Walked:
        """Where the guest's own tables lead; without paging addresses are guest-physical."""
        assert self.guest is not None
        if self.guest.unpaged:
            every = np.full_like(addresses, WORD)
            shifts = np.where(addresses >> np.uint64(32) == 0, np.uint64(30), np.uint64(0))
            zero = np.zeros_like(addresses)
            return Walked(shifts, addresses, every, every, zero, zero != 0)

        def exempt(frames: Words) -> Mask:
            if self.slots is None:
                return np.zeros(len(frames), dtype=bool)
            inside, slot = self.slots.of(frames)
            return inside & self.slots.readonly[slot]

        guest = self.guest
        return tables.walked(guest.form, guest.image.pieces, addresses, paging.ACCESSED, exempt)

    def _gpas(self, addresses: Words) -> tuple[Words, Mask]:
        """The guest-physical addresses of those that the tables are for, and which have one."""
        if not self.shadow:
            return addresses, np.ones(len(addresses), dtype=bool)
        if self.guest is None:
            return addresses, np.zeros(len(addresses), dtype=bool)
        there = self._walked(addresses)
        return there.pas, (there.shifts != 0) & ~self._stale(there)

    def _stale(self, there: Walked) -> Mask:
        """Which walks end in a table that may be out of sync."""
        return np.isin(there.tables, np.array(self.options.unsync, dtype=np.uint64))

    def _by_guest(self, side: Side, rows: Rows) -> tuple[Words, Mask]:
        """Rules 5, 8, 10, 20 and 21; returns guest-physical addresses, and which are judged."""
        assert self.guest is not None
        assert isinstance(self.guest.state, Cpu)
        u64, cpu = np.uint64, self.guest.state
        there = self._walked(rows.addresses)
        mapped = there.shifts != 0
        self._rows(
            "absent-guest-table", side, there.lost, rows,
            lambda k: "the image does not hold a guest's table for it",
        )  # fmt: skip
        stale = self._stale(there)
        given = answers.rights_of(cpu, there.rights)
        clean = there.entries & u64(paging.DIRTY) == 0
        accessed = there.rights & u64(paging.ACCESSED) != 0
        beyond = _beyond(cpu, rows.rights, np.where(clean, given & ~u64(WRITE), given))
        only_dirty = beyond & ~_beyond(cpu, rows.rights, given)
        wrong = {
            "not-mapped-by-guest": ~mapped & ~there.lost,
            "excess-rights": mapped & beyond & ~only_dirty,
            "not-dirty": mapped & only_dirty,
            "not-accessed": mapped & ~accessed,
            "larger-than-guest": mapped & (rows.shifts > there.shifts),
        }

        def told(rule: str, k: int) -> str:
            return {
                "not-mapped-by-guest": "the guest's tables map nothing there",
                "excess-rights": f"{_rights(rows.rights[k])} is allowed, and by the guest's tables "
                f"{_rights(given[k])}",
                "not-dirty": "it can be written, and the guest's entry is not marked dirty",
                "not-accessed": "an entry of the guest's on the way is not marked accessed",
                "larger-than-guest": f"a page of {_size(rows, k)}, and the guest's has "
                f"{SIZES.get(int(there.shifts[k]), '')}",
            }[rule]

        for rule, chosen in wrong.items():
            self._rows(rule, side, chosen & ~stale, rows, lambda k, rule=rule: told(rule, k))  # type: ignore[misc]
        maybe = np.logical_or.reduce(list(wrong.values())) & stale
        self._rows(
            "may-be-stale", side, maybe, rows,
            lambda k: f"the guest's table at {int(there.tables[k]):#x} is named as unsync",
        )  # fmt: skip
        self._writable_tables(side, rows, there.pas, mapped)
        return there.pas, mapped & ~stale

    def _shadowed(self, found: Survey, guest: Side) -> Words:
        """The guest's tables, by guest-physical address, for which there are shadow tables."""
        each = [
            tables.tables_for(guest.form, guest.image.pieces, level.bases, level.level)
            for level in found.levels
        ]
        unsync = np.array(self.options.unsync, dtype=np.uint64)
        return np.setdiff1d(np.concatenate(each) & FRAME, unsync)

    def _writable_tables(self, side: Side, rows: Rows, gpas: Words, mapped: Mask) -> None:
        write = mapped & (rows.rights & np.uint64(WRITE) != 0)
        low = np.searchsorted(self.shadowed, gpas)
        high = np.searchsorted(self.shadowed, gpas + (np.uint64(1) << rows.shifts))
        self._rows(
            "writable-table", side, write & (high > low), rows,
            lambda k: f"the guest's table at {int(self.shadowed[low[k]]):#x} is shadowed, and can "
            "be written",
        )  # fmt: skip

    # PLACES

    def _place(self, rows: Rows, gpas: Words, judged: Mask) -> None:
        """Note where guest pages are, neighbours together."""
        at = np.flatnonzero(judged)
        if not len(at):
            return
        sizes = np.uint64(1) << rows.shifts[at]
        write = rows.rights[at] & np.uint64(WRITE)
        first = _starts(gpas[at], rows.pas[at], sizes, write)
        bytes_ = np.add.reduceat(sizes, first)
        at = at[first]
        self.placed.append((gpas[at], rows.pas[at], bytes_, write[first], rows.addresses[at]))

    def _places(self, side: Side) -> None:
        """Rules 2 and 7: where a guest page is in two places, or two are in one."""
        if not self.placed:
            return
        gpas, pas, sizes, write, addresses = (
            np.concatenate(column) for column in zip(*self.placed, strict=True)
        )

        def find(rule: str, chosen: Mask, at: Numbers, told: Callable[[int], str]) -> None:
            number = np.flatnonzero(chosen)
            if len(number):
                self._count(rule, side, len(number))
            for n in number[: self.options.most_told].tolist():
                self._find(rule, side, told(n), int(addresses[at[n]]), int(sizes[at[n]]))

        if self.shadow:
            at, other = _overlaps(gpas, pas, sizes)
            elsewhere = pas[other] + (gpas[at] - gpas[other])
            find(
                "two-frames", np.ones(len(at), dtype=bool), at,
                lambda n: f"guest-physical {int(gpas[at[n]]):#x} is at {int(pas[at[n]]):#x} and "
                f"at {int(elsewhere[n]):#x}",
            )  # fmt: skip
        one, two = _overlaps(pas, gpas, sizes)
        others = gpas[two] + (pas[one] - pas[two])
        meant = self._meant(gpas[one], others)
        writable = write[one] | write[two] != 0
        for rule, chosen in (
            ("writable-alias", ~meant & writable),
            ("alias", ~meant & ~writable),
        ):
            find(
                rule, chosen, one,
                lambda n: f"guest-physical {int(gpas[one[n]]):#x} and {int(others[n]):#x} are "
                f"both at {int(pas[one[n]]):#x}",
            )  # fmt: skip

    def _meant(self, gpas: Words, others: Words) -> Mask:
        """Which pairs of guest pages are one by the slots: at one host-virtual address, or at the
        place that the slots of both name.
        """
        if self.slots is None:
            return np.zeros(len(gpas), dtype=bool)
        (inside, slot), (inside_too, other) = self.slots.of(gpas), self.slots.of(others)
        meant = np.zeros(len(gpas), dtype=bool)
        for places in (self.slots.hpas, self.slots.hvas):
            known = (places[slot] != np.uint64(UNKNOWN)) & (places[other] != np.uint64(UNKNOWN))
            here = places[slot] + (gpas - self.slots.gpas[slot])
            there = places[other] + (others - self.slots.gpas[other])
            meant |= known & (here == there)
        return meant & inside & inside_too


MAY_BE_MEANT = ("cycle", "two-levels")
KINDS = {
    RESERVED: "reserved-bits",
    UNALIGNED: "unaligned-large-page",
    MISCONFIGURED: "misconfigured-entry",
}
TELL: dict[str, Callable[[int], str]] = {
    "reserved-bits": lambda entry: f"{entry:#x} has reserved bits set",
    "unaligned-large-page": lambda entry: f"{entry:#x} maps a large page that is not aligned",
    "misconfigured-entry": lambda entry: f"{entry:#x} is misconfigured",
    "absent-table": lambda entry: f"the image does not hold the table that {entry:#x} names",
    "dirty-and-not-accessed": lambda entry: f"{entry:#x} is dirty and not accessed",
}


def _starts(addresses: Words, pas: Words, sizes: Words, key: Words) -> Numbers:
    """Where runs of neighbours begin: pages that follow each other, in one size, alike in `key`."""
    joined = (
        (addresses[:-1] + sizes[:-1] == addresses[1:])
        & (pas[:-1] + sizes[:-1] == pas[1:])
        & (sizes[:-1] == sizes[1:])
        & (key[:-1] == key[1:])
    )
    return np.flatnonzero(np.concatenate(([True], ~joined)))


def _overlaps(firsts: Words, others: Words, sizes: Words) -> tuple[Numbers, Numbers]:
    """The numbers of ranges that overlap one before them which leads elsewhere, and of those."""
    order = np.lexsort((others, firsts))
    firsts, others, sizes = firsts[order], others[order], sizes[order]
    ends = firsts + sizes
    furthest = np.maximum.accumulate(ends)
    holder = np.maximum.accumulate(np.where(ends == furthest, np.arange(len(ends)), 0))
    overlap = firsts[1:] < furthest[:-1]
    differ = firsts[1:] - others[1:] != (firsts - others)[holder[:-1]]
    at = np.flatnonzero(overlap & differ) + 1
    return order[at], order[holder[at - 1]]


def _ancestors(found: Survey, depth: int) -> Words:
    """For each table of a level, the tables on the way to it, a row each."""
    rows = np.arange(len(found.levels[depth].frames))
    columns = []
    for level in range(depth, 0, -1):
        rows = found.levels[level].parents[rows].astype(np.int64)
        columns.append(found.levels[level - 1].frames[rows] & FRAME)
    if not columns:
        return np.zeros((len(rows), 0), dtype=np.uint64)
    return np.stack(columns, axis=1)


def _beyond(cpu: Cpu, rights: Words, given: Words) -> Mask:
    """Rule 20: which have rights beyond those given, but for the emulation of CR0.WP=0.

    A user's read-only page that the supervisor writes may be writable and the supervisor's alone;
    not if it can be executed with SMEP, or with SMAP, which would no longer stop the supervisor.
    """
    u64 = np.uint64
    more = rights & ~given & u64(READ | WRITE | EXECUTE | USER)
    of_user = given & u64(USER) != 0
    refused = of_user & ((cpu.smap == 1) | ((cpu.smep == 1) & (rights & u64(EXECUTE) != 0)))
    emulated = (more == u64(WRITE)) & (rights & u64(USER) == 0) & ~refused & (cpu.wp == 0)
    beyond: Mask = (more != 0) & ~emulated
    return beyond


def _told_executable(rows: Rows, k: int) -> str:
    return f"a page of {_size(rows, k)} is executable"


def _rights(word: Words) -> str:
    rights = int(word)
    letters = ((READ, "r"), (WRITE, "w"), (EXECUTE, "x"), (USER, "u"))
    return "".join(letter if rights & bit else "-" for bit, letter in letters)


def _size(rows: Rows, k: int) -> str:
    return SIZES[int(rows.shifts[k])]
