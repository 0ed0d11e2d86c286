"""What a hypervisor's tables must satisfy at any time, and an audit that looks from scratch.

The audit reads the real tables, entry by entry out of machine memory, and holds the hypervisor's
books (reverse maps, parents, unsync marks, roots) and the guest's own tables against them. It
believes none of the three. The numbers of the rules are those of the list in
docs/explanation/hypervisor.md. Source: Linux, Documentation/virt/kvm/x86/mmu.rst ("Shadow pages",
"Synchronized and unsynchronized pages", "Reaction to events", "Emulating cr0.wp"), and KVM's former
audit code (arch/x86/kvm/mmu_audit.c).
"""

import marshal
from collections.abc import Collection, Iterator, Mapping
from hashlib import blake2b
from typing import NamedTuple

from vapama.spec import modes
from vapama.spec.anatomy import (
    GBYTE_SHIFT,
    Anatomy,
    MachineView,
    ProcessorView,
    Role,
    SlotView,
    TablePage,
)
from vapama.spec.modes import ACCESSED, DIRTY, FRAME, FRAME_32, PAGE_SIZE, PRESENT
from vapama.spec.steps import EPT, SHADOW
from vapama.spec.words import Word, low_bits

X, W, U = 1, 2, 4
RESERVED = 1 << 51
"""A bit that is reserved in the tables of a real processor with less than 52 address bits: with it,
an entry is a device's."""
DEVICE_GFN = (1 << 39) - 1
GENERATION = (1 << 11) - 1
EPT_DIRTY = 1 << 9
"""The dirty flag of an entry of extended page tables."""


class Violation(AssertionError):
    """A rule that does not hold, by number, and where: the entry at an index of machine memory."""

    def __init__(self, rule: int, what: str, index: int | None = None) -> None:
        at = "" if index is None else f" (the entry at {index << 3:#x})"
        super().__init__(f"rule {rule}: {what}{at}")
        self.rule, self.index = rule, index


class Entry(NamedTuple):
    """What an entry of the hypervisor's tables says: a leaf's frame and rights, or a table; whether
    its dirty flag is set.
    """

    leaf: bool
    frame: int
    rights: int
    dirty: bool


def audit(machine: MachineView) -> Iterator[Violation]:
    """Every rule that does not hold in a machine."""
    # THE ENTRIES, out of memory
    wanted: dict[int, dict[int, Word]] = {}
    found: list[dict[int, Word]] = [{} for _ in machine.guests]
    copied: dict[int, dict[int, Word]] = {}
    for guest, entries in zip(machine.guests, found, strict=True):
        wanted.update(dict.fromkeys((*guest.tables, *guest.dying), entries))
        for page in guest.swapped:
            if page in guest.backed:
                frame = guest.backed[page]
                wanted[frame] = copied[frame] = {}
    for index, word in machine.memory.items():
        if word and index >> 9 in wanted:
            wanted[index >> 9][index] = word

    # THE RULES
    yield from frames_are_used_once(machine)
    for guest, entries in zip(machine.guests, found, strict=True):
        yield from _Audit(machine.memory, guest, entries, copied).run()


def frames_are_used_once(machine: MachineView) -> Iterator[Violation]:
    """Rule 6: every frame of machine memory has one use, but for shared pages; none is lost."""
    users: dict[int, str] = dict.fromkeys(machine.free, "free")
    if len(users) != len(machine.free):
        yield Violation(6, "a frame is free twice")
    for number, guest in enumerate(machine.guests):
        for use, frames in (
            ("a table", guest.tables),
            ("an old root", guest.dying),
            ("another use", guest.extra),
        ):
            for frame in frames:
                if frame in users:
                    yield Violation(
                        6, f"frame {frame:#x}, {use} of guest {number}, is also {users[frame]}"
                    )
                users[frame] = use
        for page, frame in guest.backed.items():
            if frame in users and not (page in guest.shared and users[frame] == "shared"):
                yield Violation(
                    6, f"frame {frame:#x}, page {page} of guest {number}, is also {users[frame]}"
                )
            users[frame] = "shared" if page in guest.shared else f"page {page} of guest {number}"
    if len(users) != machine.frames - 1:
        yield Violation(6, f"{machine.frames - 1 - len(users)} frames are lost")
    giants = [*machine.free_giants]
    for guest in machine.guests:
        giants += guest.giants.values()
    expected = [number << GBYTE_SHIFT for number in range(1, machine.giants + 1)]
    if sorted(giants) != expected:
        yield Violation(6, "a page of 1 GByte has two uses, or none")


def freed(machine: MachineView, frame: int) -> None:
    """A frame is about to be freed: no core may still use it, unless it flushes before it runs.

    Rule 19, of tables and pages alike. Beyond the small frames it is the first of a page of 1
    GByte. Raises `Violation`.
    """
    end = frame + (1 if frame < machine.frames else 1 << GBYTE_SHIFT)
    for guest in machine.guests:
        for processor in guest.processors:
            if processor.flush:
                continue
            for cached in processor.cached():
                if cached.frame < end and frame < cached.frame + (1 << 9 * (cached.level - 1)):
                    raise Violation(
                        19, f"frame {frame:#x} is freed, and a core has it for {cached.address:#x}"
                    )
            for index, word in processor.upper():
                leads = word >> 12 & FRAME >> 12 if index >> 9 in guest.tables else index >> 9
                if frame <= index >> 9 < end or frame <= leads < end:
                    raise Violation(19, f"table {frame:#x} is freed, and a core has it", index)


def synced(machine: MachineView, number: int, root: int) -> None:
    """A guest's processor was just synchronized: nothing below its root is unsync.

    Rule 4, looked for by the real entries. Raises `Violation`.
    """
    guest = machine.guests[number]
    below = [root]
    while below:
        page = guest.tables.get(below.pop())
        if page is None:
            continue
        if page.unsync:
            raise Violation(4, f"after a sync table {page.gfn:#x} is unsync", page.frame << 9)
        if page.level > 1:
            for index in range(page.frame << 9, page.frame + 1 << 9):
                word = machine.memory.get(index)
                said = read_entry(guest.design, page.level, word) if word else None
                if said is not None and not said.leaf:
                    below.append(said.frame)


def state(machine: MachineView) -> bytes:
    """A digest of all that a machine's view shows: equal for equal states."""
    words = sorted([item for item in machine.memory.items() if item[1]])
    parts: list[object] = [words, list(machine.free), machine.remembered()]
    parts.append(list(machine.free_giants))
    for guest in machine.guests:
        pages = [
            (
                *(p.frame, p.gfn, p.level, p.role, p.unsync, p.invalid, p.roots),
                sorted(p.unsync_children),
                sorted(p.parents),
            )
            for p in (*guest.tables.values(), *guest.dying.values())
        ]
        slots = [
            (s.gfn, s.end, s.page, s.readonly, s.log, sorted(s.dirty)) for s in guest.slots.values()
        ]
        parts += [
            pages,
            slots,
            sorted(guest.backed.items()),
            sorted(guest.shared),
            sorted(guest.huge),
            sorted(guest.giants.items()),
            sorted([(page, sorted(words.items())) for page, words in guest.swapped.items()]),
            sorted([(key, sorted(indices)) for key, indices in (guest.rmap or {}).items()]),
            guest.generation,
        ]
        for processor in guest.processors:
            parts += [
                tuple(processor.cpu),
                [list(root) for root in processor.roots],
                processor.flush,
                processor.sync,
                sorted([tuple(cached) for cached in processor.cached()]),
                sorted(processor.upper()),
            ]
    return blake2b(marshal.dumps(parts, 2), digest_size=16).digest()


class _Audit:
    """The audit of one guest's tables. `entries` are the words of its tables that are not 0, and
    `copied` those of frames with pages that were swapped out before.
    """

    def __init__(
        self,
        memory: Mapping[int, Word],
        guest: Anatomy,
        entries: dict[int, Word],
        copied: dict[int, dict[int, Word]],
    ) -> None:
        self.copied = copied
        self.memory, self.guest, self.entries = memory, guest, entries
        self.slots = list(guest.slots.values())
        self.leaves: dict[int, int] = {}
        """Rights that leaves give, by ``frame << 9 | place in its table << 2 | level``."""
        self.mapped_by: dict[int, int] = {}
        """The guest frame of each entry that the reverse map names."""
        self.dirty: list[tuple[int, int]] = []
        """Frames that leaves with a dirty flag map, from the first to before the second."""
        self.roots = [frame for p in guest.processors for root in p.roots for frame in root]
        """The frames of all roots of processors."""
        self.links: dict[int, int] = {}
        """The table that an entry leads to, by index."""
        self.shadowed = {
            self.page_of(page.gfn)
            for page in guest.tables.values()
            if not page.direct and not page.unsync
        }
        """Pages of the backing that hold a table which is kept true, whatever they are called."""

    def run(self) -> Iterator[Violation]:
        """Every rule that does not hold."""
        yield from self._reverse_map()
        for index, word in self.entries.items():
            page = self.guest.tables.get(index >> 9)
            if page is None:
                if self.guest.design == SHADOW:
                    yield Violation(12, "a root that was zapped has an entry", index)
                continue
            yield from self._entry(page, index, word)
        for index in self.mapped_by:
            if index not in self.entries:
                yield Violation(3, "the reverse map names an entry that maps nothing", index)
        for page in self.guest.tables.values():
            yield from self._page(page)
        yield from self._copies()
        for processor in self.guest.processors:
            yield from self._processor(processor)

    def slot_of(self, gfn: int) -> SlotView | None:
        """The memory slot that a guest frame is in."""
        for slot in self.slots:
            if slot.gfn <= gfn < slot.end:
                return slot
        return None

    def page_of(self, gfn: int) -> int | None:
        """The page of the backing that a guest frame is; None if it is in no slot."""
        slot = self.slot_of(gfn)
        return None if slot is None else slot.page + gfn - slot.gfn

    def guest_word(self, gfn: int, place: int) -> Word | None:
        """A word of the guest's memory; None if there is none."""
        page = self.page_of(gfn)
        if page is None:
            return None
        frame = self.guest.frame_of(page)
        if frame is None:
            return self.guest.swapped.get(page, {}).get(place, 0)
        return self.memory[frame << 9 | place]

    def guest_entry(self, page: TablePage, index: int, role: Role) -> Word | None:
        """The guest's entry that an entry stands for; None if there is no memory."""
        place = index & 511
        if role.entry_bytes == 8:
            return self.guest_word(page.gfn, place)
        place |= role.quadrant << 9
        if page.level == 2:
            place >>= 1
        word = self.guest_word(page.gfn, place >> 1)
        return None if word is None else word >> 32 * (place & 1) & 0xFFFF_FFFF

    def _reverse_map(self) -> Iterator[Violation]:
        """Rule 3: what the reverse map names; that it is an entry, `_leaf` and `run` see to."""
        for key, indices in (self.guest.rmap or {}).items():
            for index in indices:
                if index in self.mapped_by:
                    yield Violation(3, "the reverse map names an entry twice", index)
                self.mapped_by[index] = key >> 2
                page = self.guest.tables.get(index >> 9)
                if page is None or page.level != key & 3:
                    yield Violation(3, "the reverse map names what is no entry of its level", index)

    def _entry(self, page: TablePage, index: int, word: Word) -> Iterator[Violation]:
        said = read_entry(self.guest.design, page.level, word)
        if not word & (7 if self.guest.design == EPT else PRESENT):
            yield Violation(3, "an entry that is not present has bits left", index)
        elif said is None:
            yield from self._device(page, index, word)
        elif said.leaf:
            yield from self._leaf(page, index, said)
        else:
            yield from self._link(page, index, said.frame)

    # LEAVES

    def _leaf(self, page: TablePage, index: int, said: Entry) -> Iterator[Violation]:
        """Rules 2, 3, 5, 7, 8, 19 and 22: what a leaf maps is what the host has there."""
        guest, size = self.guest, 1 << 9 * (page.level - 1)
        gfn = self.mapped_by.get(index)
        linear = page.gfn + (index & 511) * size
        if gfn is None:
            if guest.rmap is not None:
                yield Violation(3, "a leaf is not in the reverse map", index)
                return
            gfn = linear
        if page.direct and gfn != linear:
            yield Violation(8, f"a direct table maps {gfn:#x} where {linear:#x} belongs", index)
        place = index & 511 if guest.design == SHADOW else 0
        key = said.frame << 11 | place << 2 | page.level
        self.leaves[key] = self.leaves.get(key, 0) | said.rights
        if said.dirty:
            self.dirty.append((said.frame, said.frame + size))

        slot = self.slot_of(gfn)
        if slot is None or gfn + size > slot.end:
            yield Violation(3, f"a leaf maps guest frame {gfn:#x}, which is in no slot", index)
            return
        if size > 1:
            yield from self._large_leaf(page, index, gfn, said, slot)
        gfns, shift = range(gfn, gfn + size), slot.page - slot.gfn
        wrong = self._elsewhere(gfns, shift, said.frame)
        if wrong is not None:
            yield Violation(
                2,
                f"a leaf maps guest frame {wrong:#x} to frame "
                f"{said.frame + wrong - gfn:#x}, which the host has not there",
                index,
            )
            return
        if said.rights & W:
            yield from self._writable(index, gfns, slot)
        if guest.design == SHADOW:
            yield from self._shadow_leaf(page, index, gfn, said.rights)

    def _elsewhere(self, gfns: range, shift: int, frame: int) -> int | None:
        """Rule 2: the first of these guest frames that the host has not in the frames from this
        one on. It has a page of 1 GByte, all of it, where its first frame is.
        """
        first, last = gfns[0] + shift, gfns[-1] + shift
        of_a_giant = first >> GBYTE_SHIFT in self.guest.giants
        if of_a_giant and last >> GBYTE_SHIFT == first >> GBYTE_SHIFT:
            gfns = gfns[:1]  # the rest of the page follows
        for i, gfn in enumerate(gfns):
            if self.guest.frame_of(gfn + shift) != frame + i:
                return gfn
        return None

    def _writable(self, index: int, gfns: range, slot: SlotView) -> Iterator[Violation]:
        """Rules 5, 7 and 22: what is mapped to be written is nothing that must not be, unseen."""
        guest, shift = self.guest, slot.page - slot.gfn
        pages = range(gfns.start + shift, gfns.stop + shift)
        shared = among(pages, guest.shared)
        for gfn in gfns[:1] if slot.readonly else [page - shift for page in shared]:
            yield Violation(
                7, f"a page that must not be written is writable: guest frame {gfn:#x}", index
            )
        for page in among(pages, self.shadowed):
            yield Violation(5, f"the shadowed table {page - shift:#x} can be written", index)
        # Extended page tables tell of writes by their dirty flags instead.
        if slot.log and guest.design != EPT:
            unseen = next((gfn for gfn in gfns if gfn not in slot.dirty), None)
            if unseen is not None:
                yield Violation(
                    22, f"a write to guest frame {unseen:#x} would not be logged", index
                )

    def _large_leaf(
        self, page: TablePage, index: int, gfn: int, said: Entry, slot: SlotView
    ) -> Iterator[Violation]:
        """Rule 21: what is mapped by one large leaf is one page of the host's, wholly in its slot,
        and at least as large a page of the guest's; no code in it, where that is to be so.
        """
        guest, size = self.guest, 1 << 9 * (page.level - 1)
        if (gfn | said.frame | slot.page + gfn - slot.gfn) & size - 1:
            yield Violation(21, f"guest frame {gfn:#x} is mapped large, and not aligned", index)
        backed = slot.page + gfn - slot.gfn
        giant = backed >> GBYTE_SHIFT in guest.giants
        if not giant and (page.level > 2 or backed >> 9 not in guest.huge):
            yield Violation(21, "a large leaf maps smaller pages of the host", index)
        if page.level > 2 and not guest.gbyte_pages:
            yield Violation(21, "a leaf maps a GByte, which the processor cannot", index)
        if guest.multihit and said.rights & X:
            yield Violation(21, "code may be fetched from a large leaf", index)
        if not page.direct:
            role = guest.role_of(page.role)
            gpte = self.guest_entry(page, index, role)
            if gpte is None or not gpte & PAGE_SIZE or not role.page_size:
                yield Violation(21, "a large leaf maps a smaller page of the guest's", index)

    def _shadow_leaf(
        self, page: TablePage, index: int, gfn: int, rights: int
    ) -> Iterator[Violation]:
        """Rules 8, 10, 15 and 20: no more rights than the guest gives, through what it has now."""
        role = self.guest.role_of(page.role)
        if page.direct:
            if rights & ~page.access:
                yield Violation(10, "a leaf has rights that its table was not given", index)
            return
        if page.unsync:
            beyond = rights & ~page.access
            if beyond & ~W or (beyond and (role.wp or rights & U)):
                yield Violation(10, "a leaf has rights that its table was not given", index)
            return
        gpte = self.guest_entry(page, index, role)
        if gpte is None or not gpte & PRESENT or not self._has(page, gpte, ACCESSED):
            yield Violation(8, "a leaf stands for an entry that translates nothing", index)
            return
        named = gpte >> 12 & FRAME >> 12
        if page.level > 1:
            named = first_frame(page.level, index, gpte, role)
        if named != gfn:
            yield Violation(8, f"a leaf maps {gfn:#x}, and the guest's entry another frame", index)
        given = page.access & rights_of(gpte) & ~(0 if self._has(page, gpte, DIRTY) else W)
        if not role.nx and gpte >> 63:
            yield Violation(11, "a leaf stands for an entry with a reserved bit", index)
        if excess(rights, given, role):
            yield Violation(20, "a leaf has rights that the guest's entry does not give", index)

    def _has(self, page: TablePage, gpte: Word, flag: Word) -> bool:
        """Whether a flag that a walk sets is set in the guest's entry: in a table in read-only
        memory it cannot be.
        """
        slot = self.slot_of(page.gfn)
        return gpte & flag != 0 or (slot is not None and slot.readonly)

    def _device(self, page: TablePage, index: int, word: Word) -> Iterator[Violation]:
        """Rule 23: an entry for a device, of this generation of slots, is for no memory."""
        if word >> 52 & GENERATION == self.guest.generation:
            gfn = word >> 12 & DEVICE_GFN
            if self.slot_of(gfn) is not None:
                yield Violation(23, f"guest frame {gfn:#x} is memory, not a device", index)
        if page.level != 1:
            yield Violation(23, "an entry for a device is not in a table of the last level", index)

    # TABLES

    def _link(self, page: TablePage, index: int, frame: int) -> Iterator[Violation]:
        """Rules 8, 10, 11, 12 and 13: what an entry that leads to a table leads to."""
        child = self.guest.tables.get(frame)
        if child is None:
            yield Violation(13, f"frame {frame:#x} is no table in use", index)
            return
        self.links[index] = frame
        if child.level != page.level - 1:
            yield Violation(
                13, f"a table of level {child.level} is below one of {page.level}", index
            )
        if index not in child.parents:
            yield Violation(13, "a table does not know the entry that leads to it", index)
        if (child.unsync or child.unsync_children) and index not in page.unsync_children:
            yield Violation(14, "an unsync page is not marked in the table above it", index)
        role = self.guest.role_of
        if role(child.role)[:-1] != role(page.role)[:-1]:
            yield Violation(11, "a table is used under another role than its own", index)
        if page.direct:
            size = 1 << 9 * (page.level - 1)
            if not child.direct or child.gfn != page.gfn + (index & 511) * size:
                yield Violation(8, "a direct table leads to one for other memory", index)
            if child.access != page.access:
                yield Violation(10, "a table has other rights than those above it", index)
        else:
            yield from self._shadow_link(page, index, child, role(page.role))

    def _shadow_link(
        self, page: TablePage, index: int, child: TablePage, role: Role
    ) -> Iterator[Violation]:
        gpte = self.guest_entry(page, index, role)
        if gpte is None or not gpte & PRESENT:
            yield Violation(8, "a table stands for an entry that leads nowhere", index)
            return
        maps_page = gpte & PAGE_SIZE and page.level < 4 and role.page_size
        given = page.access & rights_of(gpte)
        if child.direct:
            if not maps_page or child.gfn != first_frame(page.level, index, gpte, role):
                yield Violation(8, "a direct table stands for another page of the guest's", index)
            if excess(child.access, given & ~(0 if self._has(page, gpte, DIRTY) else W), role):
                yield Violation(10, "a direct table has rights that the guest does not give", index)
            return
        half = index & 1 if role.entry_bytes == 4 else 0
        if self.guest.role_of(child.role).quadrant != half:
            yield Violation(9, "a table has another quadrant than the entry above it", index)
        if maps_page:
            yield Violation(8, "a table stands where the guest maps a page", index)
        elif child.gfn != gpte >> 12 & FRAME >> 12:
            yield Violation(8, f"table {child.gfn:#x} is not the one that the guest names", index)
        if child.access != given:
            yield Violation(
                10, f"a table was given rights {child.access}, and inherits {given}", index
            )

    def _page(self, page: TablePage) -> Iterator[Violation]:
        """Rules 1, 9, 12 and 13: what a table says of itself."""
        where = page.frame << 9
        if page.unsync and (page.level != 1 or page.direct):
            yield Violation(1, f"a table of level {page.level} is unsync", where)
        if page.invalid:
            yield Violation(12, "an invalid table is in use", where)
        role = self.guest.role_of(page.role)
        if role.quadrant and (page.direct or role.entry_bytes != 4):
            yield Violation(9, "a table of 8-byte entries has a quadrant", where)
        for index in page.parents:
            if self.links.get(index) != page.frame:
                yield Violation(13, "a table claims a parent that does not lead to it", index)
        roots = self.roots.count(page.frame)
        if self.guest.design == SHADOW and page.roots != roots:
            yield Violation(12, f"a table counts {page.roots} roots, and there are {roots}", where)

    def _copies(self) -> Iterator[Violation]:
        """Rule 25: what was written since it was swapped in is known to have been: an entry's dirty
        flag says so, or the copy was given up.
        """
        for page, copy in self.guest.swapped.items():
            frame = self.guest.backed.get(page)
            if frame is None or any(first <= frame < end for first, end in self.dirty):
                continue
            if self.copied[frame] != {frame << 9 | i: word for i, word in copy.items() if word}:
                yield Violation(25, f"page {page} was written, and its copy is still believed")

    # PROCESSORS

    def _processor(self, processor: ProcessorView) -> Iterator[Violation]:
        """Rules 11, 12 and 19: a processor's roots, and all that its core could still use."""
        guest = self.guest
        for root in processor.roots:
            for frame in root:
                if frame and frame not in guest.tables and frame not in guest.dying:
                    yield Violation(12, f"a processor's root, frame {frame:#x}, was freed")
        if guest.design == SHADOW:
            for gbyte, frame in enumerate(processor.roots[0]):
                if frame in guest.tables:
                    yield from self._root(processor, gbyte, guest.tables[frame])
        if processor.flush:
            return
        for pcid, address, level, frame, rights in processor.cached():
            # Shadow tables are walked by the address, second stages by what the guest makes of it.
            place = address >> 3 + 9 * level & 511 if guest.design == SHADOW else 0
            keys = [frame << 11 | place << 2 | level]
            if guest.design != SHADOW:  # or it is a part of a large page
                keys += [frame >> 9 << 20 | 2, frame >> GBYTE_SHIFT << GBYTE_SHIFT + 11 | 3]
            given = [self.leaves[key] for key in keys if key in self.leaves]
            if not given or all(rights & ~those for those in given):
                yield Violation(
                    19,
                    f"a core could use frame {frame:#x} for {address:#x} (PCID "
                    f"{pcid}), as the tables do not let it, without a flush",
                )
        for index, word in processor.upper():
            if index >> 9 in guest.tables:
                said = read_entry(guest.design, guest.tables[index >> 9].level, word)
                if said is None or said.leaf or self.links.get(index) == said.frame:
                    continue
            elif index >> 9 in guest.dying or self._is_memory(index >> 9):
                continue
            yield Violation(19, "a core could walk a table that is gone, without a flush", index)

    def _is_memory(self, frame: int) -> bool:
        return frame in self.guest.backed.values() or any(
            first <= frame < first + (1 << GBYTE_SHIFT) for first in self.guest.giants.values()
        )

    def _root(self, processor: ProcessorView, gbyte: int, root: TablePage) -> Iterator[Violation]:
        """Rules 9, 11 and 17: a root in use is for the processor's registers as they are."""
        cpu, role, mode = processor.cpu, self.guest.role_of(root.role), processor.cpu.mode
        levels = mode.levels if mode.width > 32 else modes.PAE.levels
        if root.level != len(levels):
            yield Violation(11, f"a root of level {root.level} is used in {mode.name}")
        if mode is modes.OFF:
            if not root.direct or root.gfn != gbyte << 18:
                yield Violation(17, f"with paging off the root {gbyte} is for {root.gfn:#x}")
            return
        not_wp = cpu.wp ^ 1
        now = (cpu.nxe, cpu.wp, cpu.smep & not_wp, cpu.smap & not_wp, mode.entry_bytes)
        if role[:5] != now:
            yield Violation(11, f"the root's role {tuple(role[:5])} is not the processor's {now}")
        if role.quadrant != (gbyte if mode.entry_bytes == 4 else 0):
            yield Violation(9, f"quadrant {role.quadrant} is the root of GByte {gbyte}")
        its = cpu.cr3 & mode.root
        if mode is modes.PAE and cpu.pdptes is not None:
            its = cpu.pdptes[gbyte] & FRAME
        if root.direct or root.gfn != its >> 12:
            yield Violation(17, f"the root shadows table {root.gfn:#x}, not the one of CR3")


def first_frame(level: int, index: int, gpte: Word, role: Role) -> int:
    """The first guest frame that an entry of a shadow table maps, where the guest's maps a large
    page: of a 4-MByte page each of two entries has a half (SDM Vol. 3A, table 4-4).
    """
    if role.entry_bytes == 4:
        page = gpte & FRAME_32 & ~low_bits(22) | (gpte >> 13 & low_bits(8)) << 32
        return page >> 12 | (index & 1) << 9
    return (gpte >> 12 & FRAME >> 12) & ~((1 << 9 * (level - 1)) - 1)


def read_entry(design: str, level: int, word: Word) -> Entry | None:
    """What an entry in the format of a design says; None for a device's, which only faults."""
    if design == EPT:
        if word & 7 == W | 4:
            return None
        rights = (word >> 2 & X) | word & W | U
        leaf = level == 1 or word & PAGE_SIZE != 0
        return Entry(leaf, word >> 12 & FRAME >> 12, rights, word & EPT_DIRTY != 0)
    if word & RESERVED:
        return None
    frame = word >> 12 & FRAME >> 12
    leaf = level == 1 or word & PAGE_SIZE != 0
    return Entry(leaf, frame, rights_of(word), word & DIRTY != 0)


def rights_of(entry: Word) -> int:
    """The rights of an entry in the format of ordinary paging."""
    return entry & (W | U) | (entry >> 63 ^ 1)


def among(numbers: range, some: Collection[int | None]) -> list[int]:
    """Which of these numbers are some of those."""
    if len(numbers) < len(some):
        return [number for number in numbers if number in some]
    return [number for number in some if number is not None and number in numbers]


def excess(rights: int, given: int, role: Role) -> bool:
    """Rule 20: whether rights go beyond those given, in the way that CR0.WP=0 allows if it is.

    A user's read-only page that the supervisor writes is then writable and the supervisor's alone,
    and not to be executed with SMEP. With SMAP it would be open to accesses that SMAP stops.
    """
    if not rights & ~given:
        return False
    if role.wp or rights & U or rights & ~given != W:
        return True
    was_user = given & U != 0
    return was_user and (role.smap_not_wp == 1 or (role.smep_not_wp == 1 and rights & X != 0))
