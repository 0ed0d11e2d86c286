"""Large pages: alignment, where they may be mapped, hugetlb pools, collapse and split, and costs.

Sizes are in bytes, addresses too; levels are those of the walk (1 is 4 KBytes, 2 is 2 MBytes, 3 is
1 GByte). Follows the Intel SDM Vol. 3A, 4.3 to 4.5 for the pages, Linux's virt/kvm/x86/mmu.rst for
the slots of a guest, and admin-guide/mm/hugetlbpage.rst, mm/hugetlbfs_reserv.rst and
admin-guide/mm/transhuge.rst for the host. The running kernel is compared with all of it
(oracles/linux_mm).
"""

from enum import IntEnum
from typing import NamedTuple

from vapama.spec.words import Condition, Flag, Word, low_bits

SIZE_4K, SIZE_2M, SIZE_4M, SIZE_1G = 1 << 12, 1 << 21, 1 << 22, 1 << 30
SMALL_PAGES = 512
"""How many 4-KByte pages make a page of 2 MBytes, and entries a table."""


# Alignment


def page_bytes(level: int) -> int:
    """The bytes of a page that an entry of this level maps. Source: SDM Vol. 3A, 4.5.4."""
    return 1 << 12 + 9 * (level - 1)


def congruent(size: int, *addresses: Word) -> Condition:
    """Whether addresses have the same offset within a page of `size` bytes (a power of 2).

    A translation keeps the page offset, so the VA, GPA, HVA and machine address of one byte must
    have it in common at the size of each page on the way. Source: SDM Vol. 3A, 4.3 to 4.5.
    """
    first, *others = addresses
    same: Condition = True
    for other in others:
        same = same & ((first ^ other) & (size - 1) == 0)
    return same


def frames_of_4m(pde: Word) -> tuple[Word, Word]:
    """The two 2-MByte frames that stand for a 4-MByte page of 32-bit paging, by its PDE.

    Bits 31:22 are the address, bits 20:13 its bits 39:32. Source: SDM Vol. 3A, table 4-4.
    """
    frame = (pde & (low_bits(32) & ~low_bits(22))) + ((pde >> 13 & low_bits(8)) << 32)
    return frame, frame + SIZE_2M


# Where a guest's memory may be mapped large


class Slot(NamedTuple):
    """A guest's memory slot: `size` bytes at guest-physical `gpa`, backed from host-virtual `hva`.

    All three are multiples of 4 KBytes. Source: Linux, virt/kvm/api.rst, 4.35.
    """

    gpa: Word
    size: Word
    hva: Word


def slot_may_map(slot: Slot, gpa: Word, level: int) -> Condition:
    """Whether the page of this level around `gpa` (in the slot) may be mapped at once.

    The page lies wholly in the slot, and its bytes have the same offset in guest-physical and
    host-virtual memory. Source: virt/kvm/x86/mmu.rst, "Large pages".
    """
    size = page_bytes(level)
    first = gpa & ~(size - 1)
    inside = (slot.gpa <= first) & (first + size <= slot.gpa + slot.size)
    return inside & congruent(size, gpa, slot.hva + (gpa - slot.gpa))


def untracked_level(gpa: Word, tracked: Word) -> int:
    """The level of the largest page around `gpa` that does not hold the byte at `tracked`; 1 if
    that is in the same small page or in the same 2 MBytes.

    Source: virt/kvm/x86/mmu.rst, "Large pages" (disallow_lpage, which is counted by level).
    """
    for level in (3, 2):
        if (gpa ^ tracked) & ~(page_bytes(level) - 1) != 0:
            return level
    return 1


def mapping_level(
    slot: Slot,
    gpa: Word,
    *,
    host: Word,
    guest: Word,
    untracked: Word,
    write: Flag,
    execute: Flag,
    multihit: Flag,
) -> int:
    """The level at which `gpa` is mapped: the largest that everybody concerned allows.

    `host` and `guest` are the levels of the page in the host's and in the guest's tables (3 if the
    guest's do not count: second-stage paging); `host` is 2 at most if the processor lacks 1-GByte
    pages. `untracked` is the level of the largest page around `gpa` in which nothing must not be
    written unseen (a shadowed table, dirty logging). `multihit` is 1 with the iTLB-multihit
    mitigation. Source: virt/kvm/x86/mmu.rst, "Large pages"; admin-guide/hw-vuln/multihit.rst.
    """
    if execute & multihit:
        return 1
    for level in (3, 2):
        seen = (write == 0) | (level <= untracked)
        if (level <= host) & (level <= guest) & seen & slot_may_map(slot, gpa, level):
            return level
    return 1


# hugetlb pools


class Refused(Exception):
    """The pool cannot give what was asked for: ENOMEM, or SIGBUS at a fault."""


class Pool(NamedTuple):
    """The pages of one size. Source: admin-guide/mm/hugetlbpage.rst.

    `total` pages are there, `free` of them unused, `reserved` of these promised to mappings;
    `surplus` pages are beyond what was asked for (nr_hugepages), at most `overcommit` of them.
    """

    total: Word = 0
    free: Word = 0
    reserved: Word = 0
    surplus: Word = 0
    overcommit: Word = 0


def pool_holds(pool: Pool) -> Condition:
    """What is true of a pool always: 0 <= reserved <= free <= total, 0 <= surplus <= total."""
    return (pool.reserved <= pool.free) & (pool.free <= pool.total) & (pool.surplus <= pool.total)


def resized(pool: Pool, count: Word) -> Pool:
    """The pool after nr_hugepages is set to `count` persistent pages.

    Source: mm/hugetlb.c, set_max_huge_pages.
    """
    total, free, reserved, surplus, overcommit = pool
    persistent = total - surplus

    # GROW: surplus pages become persistent first, then pages are allocated
    if count > persistent:
        wanted = count - persistent
        if wanted < surplus:
            return pool._replace(surplus=surplus - wanted)
        new = wanted - surplus
        return Pool(total + new, free + new, reserved, 0, overcommit)

    # SHRINK: free pages go that nobody was promised; pages in use become surplus
    keep = max(total - free + reserved, count)
    if persistent <= keep:
        return pool._replace(surplus=total - count)
    excess = min(persistent - keep, free)
    return Pool(total - excess, free - excess, reserved, total - excess - count, overcommit)


def reserved_for(pool: Pool, count: Word) -> Pool:
    """The pool after a mapping of `count` pages was made. Raises `Refused` (ENOMEM).

    What is not free and not promised comes as surplus pages, all of it or nothing.
    Source: mm/hugetlbfs_reserv.rst, "Creating Reservations"; mm/hugetlb.c, hugetlb_acct_memory.
    """
    total, free, reserved, surplus, overcommit = pool
    if reserved + count <= free:
        return pool._replace(reserved=reserved + count)
    lacking = reserved + count - free
    if surplus + lacking > overcommit:
        raise Refused
    return Pool(total + lacking, free + lacking, reserved + count, surplus + lacking, overcommit)


def unreserved(pool: Pool, count: Word) -> Pool:
    """The pool after `count` promised pages are not wanted any more; surplus pages go with them.

    Source: mm/hugetlb.c, return_unused_surplus_pages.
    """
    total, free, reserved, surplus, overcommit = pool
    gone = min(count, surplus, free)
    return Pool(total - gone, free - gone, reserved - count, surplus - gone, overcommit)


def faulted(pool: Pool, promised: Flag) -> Pool:
    """The pool after a page is faulted in, `promised` or not. Raises `Refused` (SIGBUS).

    Source: mm/hugetlbfs_reserv.rst, "Consuming Reservations/Allocating a Huge Page".
    """
    total, free, reserved, surplus, overcommit = pool
    if promised:
        return pool._replace(free=free - 1, reserved=reserved - 1)
    if free > reserved:
        return pool._replace(free=free - 1)
    if surplus >= overcommit:
        raise Refused
    return pool._replace(total=total + 1, surplus=surplus + 1)


def freed(pool: Pool, promise_again: Flag) -> Pool:
    """The pool after a page is freed; with `promise_again` its mapping may fault it in again.

    Source: mm/hugetlbfs_reserv.rst, "Freeing Huge Pages"; mm/hugetlb.c, free_huge_folio.
    """
    if promise_again:
        return pool._replace(free=pool.free + 1, reserved=pool.reserved + 1)
    if pool.surplus > 0:
        return pool._replace(total=pool.total - 1, surplus=pool.surplus - 1)
    return pool._replace(free=pool.free + 1)


# Mappings of hugetlb pages

PRIVATE, SHARED, NORESERVE = 0, 1, 2
"""Kinds of mapping: MAP_PRIVATE, MAP_SHARED, and MAP_PRIVATE with MAP_NORESERVE."""
ABSENT, PROMISED, PRESENT = 0, 1, 2
"""States of a page of a mapping."""


class Area:
    """A hugetlb mapping of one process: its kind and the state of each page."""

    __slots__ = ("kind", "pages")

    def __init__(self, kind: int, count: int) -> None:
        self.kind = kind
        self.pages = [ABSENT if kind == NORESERVE else PROMISED] * count


class Hugetlb:
    """A pool and the mappings that use it; mappings are numbered in the order of their making.

    Each method that may be refused says so by its result. Source: mm/hugetlbfs_reserv.rst.
    """

    def __init__(self) -> None:
        self.pool = Pool()
        self.areas: dict[int, Area] = {}
        self.made = 0

    def resize(self, count: int) -> None:
        """Write `count` to nr_hugepages."""
        self.pool = resized(self.pool, count)

    def overcommit(self, count: int) -> None:
        """Write `count` to nr_overcommit_hugepages; surplus pages that there are stay."""
        self.pool = self.pool._replace(overcommit=count)

    def map(self, kind: int, count: int) -> bool:
        """Map `count` pages (mmap, MAP_HUGETLB); False for ENOMEM."""
        if kind != NORESERVE:
            try:
                self.pool = reserved_for(self.pool, count)
            except Refused:
                return False
        self.areas[self.made] = Area(kind, count)
        self.made += 1
        return True

    def touch(self, number: int, page: int) -> bool:
        """Write to a page; False for SIGBUS."""
        pages = self.areas[number].pages
        if pages[page] == PRESENT:
            return True
        try:
            self.pool = faulted(self.pool, pages[page] == PROMISED)
        except Refused:
            return False
        pages[page] = PRESENT
        return True

    def discard(self, number: int, page: int) -> None:
        """MADV_DONTNEED. A shared page stays in its file; a private owner's is promised again."""
        area = self.areas[number]
        if area.kind != SHARED and area.pages[page] == PRESENT:
            again = self.promises_again(area)
            self.pool = freed(self.pool, again)
            area.pages[page] = PROMISED if again else ABSENT

    def unmap(self, number: int) -> None:
        """Unmap a whole mapping: pages are freed, then promises taken back."""
        area = self.areas.pop(number)
        promises = area.pages.count(PROMISED)
        for _ in range(area.pages.count(PRESENT)):
            again = self.promises_again(area)
            self.pool = freed(self.pool, again)
            promises += again
        self.pool = unreserved(self.pool, promises)

    def promises_again(self, area: Area) -> bool:
        """Whether a page that an area lets go is promised to it again.

        That of a private owner is, as long as no surplus page could be given back instead.
        """
        return area.kind == PRIVATE and self.pool.surplus == 0

    def child_writes(self, number: int, page: int) -> tuple[bool, Pool]:
        """A child is forked, writes to a page and exits: whether it could, and the pool meanwhile.

        A private child has no promises; its copy, or its own first touch, needs a page that nobody
        was promised. Of a shared mapping it uses the page itself, and its promise.
        Source: mm/hugetlbfs_reserv.rst, "Reservations and fork".
        """
        area = self.areas[number]
        if area.kind == SHARED:
            could = self.touch(number, page)
            return could, self.pool
        try:
            self.pool = faulted(self.pool, 0)
        except Refused:
            return False, self.pool
        meanwhile = self.pool
        self.pool = freed(self.pool, 0)
        return True, meanwhile

    def owner_writes(self, number: int, page: int) -> tuple[bool, Pool, bool]:
        """A child is forked, the owner writes to a page, then the child does, then it exits.

        Whether the owner could, the pool then, and whether the child could. The owner of
        reservations whose copy finds no page takes the old one from the child, which is then
        refused. Source: mm/hugetlb.c, hugetlb_wp and unmap_ref_private.
        """
        area = self.areas[number]
        was_present = area.pages[page] == PRESENT
        if area.kind == SHARED or not was_present:
            could = self.touch(number, page)
            meanwhile = self.pool
            child_could, _ = self.child_writes(number, page) if could else (False, meanwhile)
            return could, meanwhile, child_could
        try:
            self.pool = faulted(self.pool, 0)
        except Refused:
            if area.kind == PRIVATE:
                return True, self.pool, False  # stolen: nothing is left for the child
            return False, self.pool, False
        meanwhile = self.pool
        self.pool = freed(self.pool, 0)  # the old page is the child's alone, and goes with it
        return True, meanwhile, True


# Transparent huge pages


class Mapped(IntEnum):
    """What the entry for a block is in the process' page directory."""

    NOTHING = 0
    TABLE = 1
    HUGE = 2
    ZERO = 3
    """The huge zero page, which only reads have touched."""


MAX_PTES_NONE, MAX_PTES_SHARED = 511, 256
"""How many pages of a block may be missing, and how many be of folios that other processes map too,
for khugepaged to collapse it. Source: admin-guide/mm/transhuge.rst."""


class Family:
    """A process and those forked from it, each with a block; the folios that they may share."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        """Those of living processes, in the order of their making."""
        self.folios: dict[int, range] = {}
        """The frames that were allocated together with each."""

    def allocate(self, count: int) -> int:
        """The number of the first of so many new frames, which are one folio."""
        first = len(self.folios)
        self.folios.update(dict.fromkeys(range(first, first + count), range(first, first + count)))
        return first


class Block:
    """An aligned block of 512 small pages of a process, private and anonymous, under MADV_HUGEPAGE.

    `contents` are those of the pages that have a frame, `frames` say by a number which frame it is:
    a new one for each that is allocated. Source: admin-guide/mm/transhuge.rst; mm/huge_memory.c,
    mm/khugepaged.c.
    """

    def __init__(self, family: Family | None = None) -> None:
        self.contents: dict[int, int] = {}
        self.frames: dict[int, int] = {}
        self.mapped = Mapped.NOTHING
        self.advised = True
        self.family = Family() if family is None else family
        self.family.blocks.append(self)

    @property
    def huge(self) -> bool:
        """Whether it is one huge page of its own."""
        return self.mapped == Mapped.HUGE

    def write(self, page: int, content: int) -> None:
        """Store to a page. The first touch of an empty block maps all of it as one huge page; so
        does the first store to one that maps the huge zero page. A page of a folio that another
        process maps too is copied, and it alone: what maps a huge page is split for that.
        """
        if self.mapped == Mapped.ZERO or (self.mapped == Mapped.NOTHING and self.advised):
            self.allocate_all()
        elif page not in self.frames or self.is_shared(page):
            self.frames[page] = self.new_frames(1)
            self.mapped = Mapped.TABLE
        self.contents[page] = content

    def read(self, page: int) -> int:
        """Load from a page; one never written maps the zero page, a small or the huge one."""
        if self.mapped == Mapped.NOTHING:
            self.mapped = Mapped.ZERO if self.advised else Mapped.TABLE
        return self.contents.get(page, 0)

    def discard(self, first: int, count: int) -> None:
        """MADV_DONTNEED. Of a huge page a part splits the mapping; the other pages keep frames.

        The whole leaves an empty entry: a table without pages is freed too.
        """
        for page in range(first, first + count):
            self.contents.pop(page, None)
            self.frames.pop(page, None)
        if count == SMALL_PAGES:
            self.mapped = Mapped.NOTHING
        elif self.mapped != Mapped.NOTHING:
            self.mapped = Mapped.TABLE

    def split(self) -> None:
        """Map the frames one by one (a partial munmap, mprotect or MADV_DONTNEED does it)."""
        if self.mapped != Mapped.NOTHING:
            self.mapped = Mapped.TABLE

    def collapse(self) -> bool:
        """MADV_COLLAPSE: one new huge page with the same contents, holes being zeros.

        False (EINVAL) if huge pages were advised against, or nothing was ever there: a table will
        do, even an empty one. What is huge stays.
        """
        if not self.advised or self.mapped == Mapped.NOTHING:
            return False
        if self.mapped == Mapped.TABLE:
            self.allocate_all()
        return True

    def fork(self) -> "Block":
        """The child's block: it maps the same frames, as they are mapped here.

        Source: mm/memory.c, copy_page_range; mm/huge_memory.c, copy_huge_pmd.
        """
        child = Block(self.family)
        child.contents, child.frames = dict(self.contents), dict(self.frames)
        child.mapped, child.advised = self.mapped, self.advised
        return child

    def exit(self) -> None:
        """The process ends: it maps nothing any more."""
        self.family.blocks.remove(self)

    def is_shared(self, page: int) -> bool:
        """Whether another process maps a frame of the folio that a page is in.

        Of a large folio it need not be this page's. Source: mm/memory.c, wp_can_reuse_anon_folio;
        mm/huge_memory.c, do_huge_pmd_wp_page.
        """
        folio = self.family.folios[self.frames[page]]
        others = (block for block in self.family.blocks if block is not self)
        return any(frame in folio for block in others for frame in block.frames.values())

    def daemon_comes(self) -> None:
        """The block is scanned by khugepaged: small pages are collapsed if huge ones were advised.

        Not too many of them may be missing, or shared. Source: mm/khugepaged.c,
        hpage_collapse_scan_pmd.
        """
        if not self.advised or self.mapped != Mapped.TABLE:
            return
        if SMALL_PAGES - len(self.frames) > MAX_PTES_NONE:
            return
        if sum(map(self.is_shared, self.frames)) <= MAX_PTES_SHARED:
            self.allocate_all()

    def allocate_all(self) -> None:
        """A huge page in place of what was there: all is copied to it, holes are zeros."""
        first = self.new_frames(SMALL_PAGES)
        self.contents = {page: self.contents.get(page, 0) for page in range(SMALL_PAGES)}
        self.frames = {page: first + page for page in range(SMALL_PAGES)}
        self.mapped = Mapped.HUGE

    def new_frames(self, count: int) -> int:
        """The number of the first of so many new frames."""
        return self.family.allocate(count)


# What a mapping costs


def table_pages(size: int, level: int, levels: int = 4) -> int:
    """How many 4-KByte tables map `size` bytes from an address aligned to all of them.

    Source: SDM Vol. 3A, 4.5: each table has 512 entries.
    """
    spans = [page_bytes(above) * SMALL_PAGES for above in range(level, levels + 1)]
    return sum(-(-size // span) for span in spans)


def walk_references(level: int, levels: int = 4) -> int:
    """The memory references of a walk that ends at a page of `level`: one entry a level."""
    return levels - level + 1


def nested_walk_references(guest: int, host: int) -> int:
    """Those of a two-dimensional walk, of `guest` and `host` references in each dimension.

    Each of the guest's entries, and the page at last, needs a walk of the host's tables.
    Source: AMD APM Vol. 2, 15.25.
    """
    return (guest + 1) * (host + 1) - 1


def huge_pages_for(size: int, page: int) -> int:
    """How many huge pages of `page` bytes back `size` bytes: 2048 of 2 MBytes for 4 GBytes."""
    return -(-size // page)
