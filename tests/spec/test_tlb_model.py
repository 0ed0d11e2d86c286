"""The histories of spec/tlb.py against the largest TLB there can be, told as the manual tells it.

Here the caches are modelled: after each step everything that could be cached is cached, and each
operation drops what it must. That is too slow and too large for use, but it is another way to say
the same, so both must allow the same outcomes after any program.
"""

from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

from vapama.fuzz.decoded import RandomDraws
from vapama.spec import modes
from vapama.spec.access import Access
from vapama.spec.cpu import PCIDE, PG, SMEP, Cpu
from vapama.spec.invariants.tlb import ADDRESSES, LIMIT, WIDE, World
from vapama.spec.memory import Sparse
from vapama.spec.modes import ACCESSED, DIRTY, FRAME, GLOBAL, PRESENT
from vapama.spec.outcomes import RSVD, Outcome, OutsideMemory, P, PageFault, Translated
from vapama.spec.paging import reserved_anywhere, reserved_in_large_page, translate
from vapama.spec.tlb import KEEP, PGE

LEVELS = modes.FOUR_LEVEL.levels
ROOT = ()


class Item(NamedTuple):
    """What is cached: the entries met on the way to a page or a table, for an address."""

    vpid: int
    pcid: int
    address: int
    entries: tuple[int, ...]
    is_page: bool
    is_global: bool

    @property
    def shift(self) -> int:
        return LEVELS[len(self.entries) - 1].shift

    def serves(self, address: int) -> bool:
        return self.address >> self.shift == address >> self.shift


class Scripted:
    """Memory in which a walk meets these entries first."""

    def __init__(self, entries: tuple[int, ...], memory: "LargestTlb") -> None:
        self.entries, self.memory, self.limit = list(entries), memory, LIMIT

    def load(self, address: int) -> int:
        return self.entries.pop(0) if self.entries else self.memory.load(address)


class LargestTlb:
    """A processor that caches all that it can, and forgets only what it must."""

    stateful = True

    def __init__(self, cpu: Cpu, memory: Sparse) -> None:
        self.cpu, self.vpid, self.memory = cpu, 0, dict(memory.touched)
        self.items: set[Item] = set()
        self.fill()

    def load(self, address: int) -> int:
        return self.memory.get(address, 0)

    @property
    def pcid(self) -> int:
        return self.cpu.cr3 & 0xFFF if self.cpu.cr4 & PCIDE else 0

    def fill(self) -> None:
        """Cache all that is met from the root, and from what is cached."""
        for address in ADDRESSES:
            self._extend(ROOT, self.cpu.cr3 & FRAME, address)
            for item in list(self._tables(address)):
                self._extend(item.entries, item.entries[-1] & FRAME, address)

    def _tables(self, address: int) -> Iterator[Item]:
        for item in self.items:
            mine = (item.vpid, item.pcid) == (self.vpid, self.pcid) and not item.is_page
            if mine and item.address == address:
                yield item

    def _extend(self, met: tuple[int, ...], table: int, address: int) -> None:
        level = LEVELS[len(met)]
        where = table | (address >> level.shift & 0x1FF) << 3
        entry = self.load(where) if where < LIMIT else 0
        large = entry & level.large != 0
        reserved = reserved_anywhere(self.cpu) | level.reserved
        reserved |= reserved_in_large_page(self.cpu, level) if large else 0
        if entry & (PRESENT | ACCESSED) != PRESENT | ACCESSED or entry & reserved:
            return
        is_page = large or level.number == 1
        is_global = bool(is_page and entry & GLOBAL and self.cpu.cr4 & PGE)
        item = Item(self.vpid, self.pcid, address, (*met, entry), is_page, is_global)
        self.items.add(item)
        if not is_page:
            self._extend(item.entries, entry & FRAME, address)

    def outcomes(self, access: Access) -> set[tuple[Any, ...]]:
        """All that the access may come to."""
        cpu = self.cpu._replace(cr3=self.cpu.cr3 & ~0xFFF)
        found = {told(translate(cpu, Scripted(ROOT, self), access))}
        for item in self.items:
            if item.address != access.address or item.vpid != self.vpid:
                continue
            if item.pcid != self.pcid and not item.is_global:
                continue
            outcome = translate(cpu, Scripted(item.entries, self), access)
            translated = isinstance(outcome, Translated)
            if item.is_page and translated and access.write and not item.entries[-1] & DIRTY:
                continue
            if item.is_page and isinstance(outcome, PageFault):
                by_rights = outcome.error_code & P and not outcome.error_code & RSVD
                if not by_rights:
                    continue
            if self._is_usable(item):
                found.add(told(outcome))
        return found

    def _is_usable(self, item: Item) -> bool:
        """Nothing with a bit that is reserved by now."""
        return not any(entry & reserved_anywhere(self.cpu) for entry in item.entries)

    # WHAT MUST BE DROPPED

    def keep(self, condition: Any) -> None:
        self.items = {item for item in self.items if condition(item)}
        self.fill()

    def write(self, address: int, value: int) -> None:
        self.memory[address] = value
        self.fill()

    def invlpg(self, address: int) -> None:
        self.keep(
            lambda i: (
                i.vpid != self.vpid
                or (not (i.serves(address) and (i.is_global or i.pcid == self.pcid)))
                if i.is_page
                else (i.vpid, i.pcid) != (self.vpid, self.pcid)
            )
        )

    def page_fault(self, address: int) -> None:
        self.keep(
            lambda i: (
                i.vpid != self.vpid
                or not i.serves(address)
                or not (i.is_global or i.pcid == self.pcid)
            )
        )

    def invpcid(self, kind: int, pcid: int, address: int) -> None:
        def kept(i: Item) -> bool:
            if i.vpid != self.vpid:
                return True
            if kind == 2:
                return False
            if i.is_global:
                return True
            return kind != 3 and (i.pcid != pcid or (kind == 0 and not i.serves(address)))

        self.keep(kept)

    def mov_cr3(self, operand: int) -> None:
        self.cpu = self.cpu._replace(cr3=operand & ~KEEP)
        if operand & KEEP and self.cpu.cr4 & PCIDE:
            self.fill()
        else:
            self.invpcid(1, self.pcid, 0)

    def change(self, cpu: Cpu) -> None:
        before, self.cpu = self.cpu, cpu
        if (before.cr4 ^ cpu.cr4) & PGE or before.cr4 & ~cpu.cr4 & PCIDE or not cpu.cr0 & PG:
            self.invpcid(2, 0, 0)
        elif cpu.cr4 & ~before.cr4 & SMEP:
            self.invpcid(1, self.pcid, 0)
        else:
            self.fill()

    def vm_transition(self, cpu: Cpu, vpid: int) -> None:
        without = self.vpid == vpid == 0
        self.cpu, self.vpid = cpu, vpid
        self.keep(lambda i: not (without and i.vpid == 0))

    def invvpid(self, kind: int, vpid: int, address: int) -> None:
        def kept(i: Item) -> bool:
            if kind == 2:
                return i.vpid == 0
            if i.vpid != vpid:
                return True
            return not i.serves(address) if kind == 0 else kind == 3 and i.is_global

        self.keep(kept)


def told(outcome: Outcome) -> tuple[Any, ...]:
    match outcome:
        case Translated():
            return "page", outcome.pa
        case PageFault():
            return "fault", outcome.error_code
        case OutsideMemory():
            return "outside", outcome.address
    return (type(outcome).__name__,)


class Largest:
    """A subject whose accesses are none: only what is allowed is compared."""

    def tlb(self, cpu: Cpu, memory: Sparse, sets: int) -> LargestTlb:
        return LargestTlb(cpu, memory)


def test_histories_allow_what_the_largest_tlb_allows() -> None:
    random, stale = Random(1), 0
    steps = [step for step in WIDE if step.method not in ("access", "nothing")]
    for _ in range(60):
        world: Any = World(RandomDraws(random), Largest())
        for _ in range(12):
            step = random.choice(steps)
            getattr(world, step.method)(*step.arguments)
            if random.random() < 0.2:
                address = random.choice(ADDRESSES)
                world.processor.page_fault(address)
                world.subject.page_fault(address)
            for address in ADDRESSES:
                access = Access(address, *random.choice([(0, 0, 1), (1, 0, 1), (1,), (0, 1, 1)]))
                ours = {told(outcome) for outcome, _ in world.processor.allowed(access)}
                theirs = world.subject.outcomes(access)
                assert ours == theirs, step.told
                stale += len(ours) > 1
    assert stale > 500
