"""Test vectors of two stages: where the second stage stops a guest's walk, and how.

The guests are witnesses of one stage: Z3 gave one for each path of a guest's own walk. Here their
tables are put into a host's memory, behind tables of a second stage. Of these nothing is broken, so
that each guest's walk ends as it does alone; or one entry is: for each of the guest's tables, for
each update of its flags and for the page, at each level, in each way that an entry can be wrong.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vapama.spec import ept, nested, npt, paging
from vapama.spec.access import Access
from vapama.spec.cpu import LA57, LMA, LME, NXE, PAE, PSE, Cpu
from vapama.spec.memory import Sparse
from vapama.spec.outcomes import Translated
from vapama.spec.stage import Ept, Npt, Stage
from vapama.vectors.questions import Question

LIMIT = 1 << 24
"""The host's memory ends here."""
ROOT, FIRST = 1 << 12, 2 << 12
LARGE = 1 << 30
"""Where large pages of the second stage lie: a page need not be in memory."""
LONG = LMA | LME | NXE
STAGES: dict[int, tuple[Stage, ...]] = {
    4: (Ept(ROOT | 0x1E, 40), Npt(ROOT, PAE, LONG, maxphyaddr=40)),
    5: (Ept(ROOT | 0x66, 40), Npt(ROOT, PAE | LA57, LONG, maxphyaddr=40)),
}
"""Second stages of as many levels as the guest has: EPT with flags of its own and without."""
LEGACY: tuple[Stage, ...] = (
    Npt(ROOT, PAE, NXE, maxphyaddr=40),
    Npt(ROOT, PSE, NXE, maxphyaddr=40),
)
"""Nested paging of hosts in PAE and 32-bit paging, under guests of 4 levels."""

NOT_PRESENT, MALFORMED, OUTSIDE = "not present", "malformed", "table outside memory"
DENIED, NO_RIGHTS, BEYOND = "denied", "no rights in common", "beyond memory"
LARGE_PAGE, LARGE_MALFORMED, LARGE_DENIED = "large", "large and malformed", "large and denied"


class Fault(NamedTuple):
    """What is wrong with the entry of a level."""

    level: int
    what: str


class Host:
    """A host's memory with the tables of a second stage, and a guest's frames behind them."""

    def __init__(self, stage: Stage, fetch: int = 0) -> None:
        self.stage, self.fetch = stage, fetch
        self.entries: dict[int, int] = {}
        self.frames: dict[int, int] = {}
        self.free = FIRST

    def frame(self) -> int:
        """A frame that nothing else is in."""
        self.free += 1 << 12
        return self.free - (1 << 12)

    def put(self, gpa: int, entry: int) -> None:
        """An entry of the guest's tables."""
        self.map(gpa)
        self.entries[self.frames[gpa >> 12] | gpa & 0xFFF] = entry

    def map(self, gpa: int, fault: Fault | None = None, rights: int = 7) -> None:
        """Map the page of a guest-physical address, with this fault on the way."""
        if gpa >> 12 not in self.frames:
            self.frames[gpa >> 12] = self.frame()
        page = self.frames[gpa >> 12]
        stage, table = self.stage, ROOT
        for level in range(stage.levels, 0, -1):
            at = entry_address(stage, table, gpa, level)
            what = fault.what if fault is not None and fault.level == level else ""
            if what in (NOT_PRESENT, MALFORMED, OUTSIDE):
                return self._write(at, self._broken(level, what))
            large = what in (LARGE_PAGE, LARGE_MALFORMED, LARGE_DENIED)
            if level == 1 or large:
                page = LARGE if large else LIMIT if what == BEYOND else page
                page |= large << 7 | (what == LARGE_MALFORMED) << self._low_bit_of_frame()
                rights = self._too_few(rights) if what in (DENIED, LARGE_DENIED) else rights
                rights = ept.READ if what == NO_RIGHTS else rights
                return self._write(at, page | self._leaf(rights))
            if self._read(at) == 0:
                only = ept.EXECUTE if fault == (1, NO_RIGHTS) and level == 2 else 7
                self._write(at, self.frame() | self._table(level) & only)
            table = self._read(at) & paging.FRAME
        return None

    def _low_bit_of_frame(self) -> int:
        """A bit of a large page's entry that must be 0."""
        return 21 if _in_pairs(self.stage) else 13

    def _table(self, level: int) -> int:
        """The bits of an entry that references a table."""
        pdpte = isinstance(self.stage, Npt) and self.stage.levels == 3 and level == 3
        return 1 if pdpte else 7

    def _leaf(self, rights: int) -> int:
        return rights | 6 << 3 if isinstance(self.stage, Ept) else rights

    def _too_few(self, rights: int) -> int:
        """Well-formed rights that are not enough: none of a user's, or of EPT's just others."""
        if isinstance(self.stage, Ept) and not self.fetch:
            return rights & ept.EXECUTE
        return rights & 3

    def _broken(self, level: int, what: str) -> int:
        if what == NOT_PRESENT:
            return 0
        if what == OUTSIDE:
            return LIMIT | self._table(level)
        if isinstance(self.stage, Ept):
            return 0b010
        return 1 << 21 | 0x87 if self.stage.levels == 2 else 1 << 51 | self._table(level)

    def _read(self, at: int) -> int:
        pair = self.entries.get(at & ~7, 0)
        return pair >> 32 * (at >> 2 & 1) & 0xFFFF_FFFF if _in_pairs(self.stage) else pair

    def _write(self, at: int, entry: int) -> None:
        if _in_pairs(self.stage):
            half = 32 * (at >> 2 & 1)
            entry = self.entries.get(at & ~7, 0) & 0xFFFF_FFFF << 32 - half | entry << half
        self.entries[at & ~7] = entry


def _in_pairs(stage: Stage) -> bool:
    return isinstance(stage, Npt) and stage.levels == 2


def entry_address(stage: Stage, table: int, gpa: int, level: int) -> int:
    """Where the entry for a guest-physical address is."""
    if isinstance(stage, Ept):
        return paging.entry_address(table, gpa, level)
    return npt.entry_address(stage, table, gpa, level)


def faults(stage: Stage) -> Iterator[Fault]:
    """All faults on the way to a page, and large pages."""
    for level in range(stage.levels, 0, -1):
        yield Fault(level, NOT_PRESENT)
        if not _in_pairs(stage):
            yield Fault(level, MALFORMED)
        if level > 1:
            yield Fault(level, OUTSIDE)
        if level == 2 or (level == 3 and stage.levels > 3):
            yield Fault(level, LARGE_PAGE)
            yield Fault(level, LARGE_MALFORMED)
            yield Fault(level, LARGE_DENIED)
    yield Fault(1, DENIED)
    if isinstance(stage, Ept):
        yield Fault(1, NO_RIGHTS)


Made = tuple[str, Question]


def lifted(guests: Iterable[Question], stage_type: type) -> Iterator[Made]:
    """Questions of two stages, each with a name for what is wrong: `guests` are of one stage."""
    seen: set[tuple[object, ...]] = set()
    for guest in guests:
        cpu = guest.state
        assert isinstance(cpu, Cpu)
        outcome, levels = guest.answer(), cpu.levels
        stages = [s for s in STAGES[levels] if isinstance(s, stage_type)]
        for stage in stages:
            yield "any access", _behind(guest, stage)
        if not isinstance(outcome, Translated) or outcome.level != 1:
            continue
        # One guest of each number of levels and kind of access is stopped wherever it can be.
        access = guest.access
        key = levels, access.write, access.fetch
        if key in seen or access.shadow_stack:
            continue
        seen.add(key)
        if levels == 4:
            legacy = [s for s in LEGACY if isinstance(s, stage_type)]
            yield from (("any access", _behind(_spread(guest, s, 4), s)) for s in legacy)
            stages += legacy
        for stage in stages:
            if not access.write | access.fetch:
                yield from _stopped_at_tables(guest, stage)
                yield from _stopped_at_flags(guest, stage)
                yield from _too_wide(guest, stage)
            yield from _stopped_at_the_page(guest, stage)


def _spread(guest: Question, stage: Stage, own: int, wide: bool = False) -> Question:
    """The guest with its tables, and after them its page, moved so far apart that the one with the
    number `own` has an entry of its own at every level of the second stage. If it is to be `wide`,
    it is where the second stage does not reach.
    """
    assert isinstance(guest.state, Cpu)
    loads = guest.loads()
    frames = []
    for number in range(len(loads) + 1):
        if stage.levels < 4:
            frames.append((number == own) << 30 | number << 22 | number << 12)
        else:
            frames.append(sum((number + 1) << 12 + 9 * level for level in range(stage.levels)))
    if wide:
        frames[own] |= 1 << (48 if stage.levels == 4 else 32)
    cpu = guest.state._replace(cr3=guest.state.cr3 & ~paging.FRAME | frames[0], maxphyaddr=52)
    entries = {
        frames[number] | gpa & 0xFFF: entry & ~paging.FRAME | frames[number + 1]
        for number, (gpa, entry) in enumerate(loads)
    }
    return Question(Cpu._make(cpu), Sparse(entries, nested.GUEST_LIMIT), guest.access)


def _behind(guest: Question, stage: Stage) -> Question:
    """A guest whose tables and page are all mapped."""
    host, outcome = Host(stage), guest.answer()
    for gpa, entry in guest.loads():
        host.put(gpa, entry)
    if isinstance(outcome, Translated):
        host.map(outcome.pa)
    return _question(guest, host)


def _stopped_at_tables(guest: Question, stage: Stage) -> Iterator[Made]:
    nothing = Sparse({}, ROOT)
    yield "table 1: root outside memory", Question(guest.state, nothing, guest.access, stage)
    for number in range(len(guest.loads())):
        apart = _spread(guest, stage, number)
        loads = apart.loads()
        gpa, _ = loads[number]
        for fault in (*faults(stage), Fault(1, BEYOND)):
            host = Host(stage)
            for above, entry in loads[:number]:
                host.put(above, entry)
            host.map(gpa, fault)
            yield f"table {number + 1}: level {fault.level} {fault.what}", _question(apart, host)


def _stopped_at_flags(guest: Question, stage: Stage) -> Iterator[Made]:
    """The guest's flags are set but for one accessed flag, in a page that cannot be written."""
    if not nested.flags_are_written_apart(stage):
        return
    apart = _spread(guest, stage, 0)
    loads, outcome = apart.loads(), apart.answer()
    assert isinstance(outcome, Translated)
    for number, (gpa, _) in enumerate(loads):
        host = Host(stage)
        for other, (at, entry) in enumerate(loads):
            host.put(at, entry & ~0x60 | (0x60 if other != number else 0))
        host.map(gpa, rights=ept.READ)
        host.map(outcome.pa)
        yield f"flags of table {number + 1}: denied", _question(apart, host)


def _stopped_at_the_page(guest: Question, stage: Stage) -> Iterator[Made]:
    apart = _spread(guest, stage, len(guest.loads()))
    outcome = apart.answer()
    assert isinstance(outcome, Translated)
    for fault in faults(stage):
        host = Host(stage, guest.access.fetch)
        for gpa, entry in apart.loads():
            host.put(gpa, entry)
        host.map(outcome.pa, fault)
        yield f"page: level {fault.level} {fault.what}", _question(apart, host)


def _too_wide(guest: Question, stage: Stage) -> Iterator[Made]:
    """One table, or the page, has an address that the second stage's levels do not translate."""
    if stage.levels == 5:
        return
    count = len(guest.loads())
    for wide in range(count + 1):
        apart = _spread(guest, stage, wide, wide=True)
        host = Host(stage)
        for gpa, entry in apart.loads()[:wide]:
            host.put(gpa, entry)
        yield (
            f"{'page' if wide == count else f'table {wide + 1}'}: too wide",
            _question(apart, host),
        )


def _question(guest: Question, host: Host) -> Question:
    access: Access = guest.access
    return Question(guest.state, Sparse(host.entries, LIMIT), access, host.stage)
