"""Shadow page tables: a guest's own paging, served by tables of the hypervisor's.

In the manner of Linux KVM (Documentation/virt/kvm/x86/mmu.rst, arch/x86/kvm/mmu/mmu.c and
paging_tmpl.h). A shadow page is a table of the real processor's that stands for one of the guest's
(or, if direct, for a range of its memory), under a role: all that its entries depend on besides the
guest's table. An entry (SPTE) is made when the guest first needs it.

The real processor runs a guest in long mode on tables of as many levels as the guest's own, and
any other on those of PAE paging: four roots, one for each GByte. A table of 32-bit paging has
4-byte entries, twice as many as a shadow page: several shadow pages, its quadrants, stand for it.
With paging off the roots are direct.

What keeps them true: a table that is shadowed is mapped read-only, so that a store to it leaves the
guest and drops what was made of it. Tables of the lowest level may go unsync instead: writable, and
read again when the guest invalidates its TLB, as a processor would. The guest's accessed and dirty
flags are set as its table is walked; a page that is not dirty is mapped read-only until it is.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Self

from vapama.impl.guest import (
    EMULATE,
    FLUSH,
    RELOAD,
    SYNC,
    Guest,
    SlotState,
    Vcpu,
    reflected,
)
from vapama.impl.hardware import (
    LONG_MODE,
    OFF,
    PAE_PAGING,
    PAGING_32,
    SHORT_ENTRIES,
    Core,
    paging_of,
    shallow,
)
from vapama.impl.kernels import long_mode
from vapama.impl.mmu import (
    ACCESSED,
    ALL,
    DIRTY,
    FRAME,
    LARGE,
    PRESENT,
    USER,
    WRITABLE,
    Context,
    Mmu,
    U,
    W,
    X,
    pcid,
    rights_of,
)
from vapama.spec.anatomy import Anatomy, ProcessorView, Role
from vapama.spec.cpu import Cpu
from vapama.spec.steps import Seen

# SPTE bits: the real processor's (see `vapama.impl.mmu`), and two of the software's.
HOST_WRITABLE, MMU_WRITABLE = 1 << 9, 1 << 10
"""The host lets the page be written; the MMU does too, unless it is write-protected for a log."""
NX = 1 << 63
LINK = PRESENT | WRITABLE | USER | ACCESSED
"""An SPTE that leads to a shadow page takes no rights away: leaves have all that there is."""
DEVICE = PRESENT | 1 << 51
"""An SPTE of a device's page has a reserved bit set: bits 62:52 are the generation of the slots,
bits 50:12 the guest frame, and W, U and NX the guest's rights to it."""
DEVICE_GFN, DEVICE_GENERATION = (1 << 39) - 1, (1 << 11) - 1
# Role bits above the level (3:0) and the rights inherited (6:4).
DIRECT, EFER_NX, CR0_WP, SMEP_NOT_WP, SMAP_NOT_WP = 1 << 7, 1 << 8, 1 << 9, 1 << 10, 1 << 11
LEVEL, ACCESS, PAGING, QUADRANT = 0xF, 4, 12, 15
"""Where the level is in a role, the rights, how the guest reads its tables, and the quadrant."""
CACHED_ROOTS = 3
FLOODED = 3
"""Stores to a shadowed table, with no use of it in between, after which it is given up."""
PREFETCH = 8
"""Entries, of an aligned group, that are looked at when one of them is needed."""


class Page:
    """A shadow page: a table of the real processor's in frame `frame`."""

    def __init__(self, frame: int, gfn: int, role: int) -> None:
        role = int(role)  # a plain key, in a proof too: what it means is kept beyond a run
        self.frame, self.base, self.gfn, self.role = frame, frame << 9, gfn, role
        self.level, self.access, self.direct = role & LEVEL, role >> ACCESS & ALL, role & DIRECT
        self.short = not self.direct and role >> PAGING & 7 in SHORT_ENTRIES
        """Whether the guest's table has 4-byte entries, of which this page has the `quadrant`."""
        self.quadrant = role >> QUADRANT & 3
        self.unsync = self.invalid = False
        self.unsync_children: set[int] = set()
        """SPTEs of this page, by index in memory, below which something is unsync."""
        self.parents: dict[int, Page] = {}
        """The SPTEs that lead here, and the pages they are in."""
        self.used: set[int] = set()
        """Indices in memory of the SPTEs that are not 0."""
        self.roots = 0
        """How many roots of processors, in use or cached, have it."""
        self.writes = 0

    @staticmethod
    def clones(*groups: Iterable["Page"]) -> dict[int, "Page"]:
        """Others like these pages, by frame: each parent of one of them is among them too."""
        twins = {page.frame: shallow(page) for group in groups for page in group}
        for page in twins.values():
            page.unsync_children, page.used = page.unsync_children.copy(), page.used.copy()
            page.parents = {index: twins[above.frame] for index, above in page.parents.items()}
        return twins

    def place(self, index: int) -> int:
        """Which entry of the guest's table the SPTE with an index in memory stands for."""
        index &= 511
        if self.short:
            index |= self.quadrant << 9
            if self.level == 2:
                index >>= 1  # a 4-byte entry of this level serves 4 MBytes: two SPTEs
        return index


class Root:
    """What a processor's tables begin at: a shadow page in long mode, else four, for a GByte each.

    None where CR3 or a PDPTE names no memory.
    """

    __slots__ = ("pages",)

    def __init__(self, pages: Sequence[Page | None]) -> None:
        self.pages = pages

    def clone(self, twins: dict[int, Page]) -> "Root":
        """The same with these pages, by frame."""
        return Root([None if page is None else twins[page.frame] for page in self.pages])

    def page(self, address: int) -> Page | None:
        """The page that a walk for an address begins at."""
        pages = self.pages
        return pages[0] if len(pages) == 1 else pages[address >> 30 & 3]

    @property
    def invalid(self) -> bool:
        """Whether one of its pages was zapped."""
        return any(page is not None and page.invalid for page in self.pages)

    def frames(self) -> list[int]:
        """The frames of its pages, 0 where there is none."""
        return [0 if page is None else page.frame for page in self.pages]


class ShadowContext(Context):
    """What the shadow MMU keeps for a virtual processor."""

    def __init__(self) -> None:
        super().__init__()
        self.root: Root | None = None
        self.role = 0
        self.cached: list[tuple[int, int, Root]] = []
        """Roots of before in long mode, the latest first, with CR3 and role."""

    def clone(self, twins: dict[int, Page]) -> "ShadowContext":
        """The same with these pages, by frame."""
        twin = shallow(self)
        twin.root = None if self.root is None else self.root.clone(twins)
        twin.cached = [(cr3, role, root.clone(twins)) for cr3, role, root in self.cached]
        return twin


class ShadowMmu(Mmu):
    """The shadow MMU of one guest."""

    def __init__(self, guest: Guest) -> None:
        super().__init__(guest)
        self.pages: dict[int, Page] = {}
        """Shadow pages in use by frame, the oldest first."""
        self.by_role: dict[tuple[int, int], Page] = {}
        self.shadowing: dict[int, list[Page]] = {}
        """Indirect shadow pages by the guest frame of the table they shadow."""
        self.zapped_roots: dict[int, Page] = {}
        """Invalid pages that are some processor's root still."""
        self.rmap: dict[int, set[int]] = {}
        """SPTEs that map a guest frame at a level, by ``gfn << 2 | level``."""
        self.mapped: dict[int, int] = {}
        """The guest frame that an SPTE maps, by index in memory."""
        self.doomed: list[Page] = []
        """Zapped pages, to be freed after the flush."""
        self.blank = self.frames.take()
        """An empty table: the root while CR3 names no memory."""

    def clone(self, guest: Guest) -> Self:
        """The same for a guest that is a clone too, with contexts for its processors."""
        twin = super().clone(guest)
        twins = Page.clones(self.pages.values(), self.zapped_roots.values(), self.doomed)
        twin.pages = {frame: twins[frame] for frame in self.pages}
        twin.by_role = {key: twins[page.frame] for key, page in self.by_role.items()}
        twin.shadowing = {g: [twins[p.frame] for p in of] for g, of in self.shadowing.items()}
        twin.zapped_roots = {frame: twins[frame] for frame in self.zapped_roots}
        twin.rmap = {key: sptes.copy() for key, sptes in self.rmap.items()}
        twin.mapped = self.mapped.copy()
        twin.doomed = [twins[page.frame] for page in self.doomed]
        for vcpu in guest.vcpus:
            vcpu.context = vcpu.context.clone(twins)
        return twin

    # Processors.

    def new_core(self) -> Core:
        """A core for a virtual processor."""
        return Core(self.ram)

    def power_on(self, vcpu: Vcpu) -> None:
        """Prepare a processor's context."""
        vcpu.context = ShadowContext()
        self._controls(vcpu)

    def _controls(self, vcpu: Vcpu) -> None:
        """Take in the guest's control registers, and set those that the core runs with."""
        cpu, context = vcpu.cpu, vcpu.context
        context.controls(cpu)
        not_wp, long_mode = cpu.wp ^ 1, context.paging == LONG_MODE
        if context.paging == OFF:
            context.role = 2 | ALL << ACCESS | DIRECT | OFF << PAGING
        else:
            context.role = (
                (context.levels if long_mode else 2)
                | ALL << ACCESS
                | cpu.nxe * EFER_NX
                | cpu.wp * CR0_WP
                | (cpu.smep & not_wp) * SMEP_NOT_WP
                | (cpu.smap & not_wp) * SMAP_NOT_WP
                | context.paging << PAGING
            )
        frames = [0] if context.root is None else context.root.frames()
        real = real_cpu(cpu, self.guest.plan.host_maxphyaddr)
        if not long_mode:
            pdptes = tuple(frame << 12 | PRESENT if frame else 0 for frame in frames)
            real = real._replace(pdptes=pdptes if len(frames) == 4 else (0,) * 4)
        vcpu.core.control(real, (frames[0] or self.blank) << 12, pcid(cpu))

    def enter(self, vcpu: Vcpu) -> None:
        """Do what was asked of a processor before it runs the guest on."""
        context = vcpu.context
        if vcpu.requests & RELOAD or context.root is None or context.root.invalid:
            self._load_root(vcpu)
        if vcpu.requests & SYNC:
            vcpu.requests &= ~SYNC
            vcpu.device_page = None
            for page in context.root.pages if context.root is not None else ():
                if page is not None:
                    self._sync_children(vcpu, page)
                    if self.guest.synced is not None:
                        self.guest.synced(page.frame)
        if vcpu.requests & FLUSH:
            vcpu.core.forget_all()
        vcpu.requests = 0

    def _load_root(self, vcpu: Vcpu) -> None:
        """Find or make the root for CR3 and the role; its core then knows nothing of before."""
        context = vcpu.context
        self._reclaim_if_needed()
        self._put_root(context.root)
        context.root = None
        for entry in [e for e in context.cached if e[2].invalid]:
            context.cached.remove(entry)
            self._put_root(entry[2])
        pages: list[Page | None] = []
        for gfn, role in self._tables_of(context):
            page = None
            if gfn is not None and (role & DIRECT or self.guest.slot_of(gfn) is not None):
                page = self._get_page(vcpu, gfn, role)
                page.roots += 1
            pages.append(page)
        context.root = Root(pages)
        vcpu.requests |= SYNC | FLUSH
        self._controls(vcpu)

    def _tables_of(self, context: ShadowContext) -> list[tuple[int | None, int]]:
        """Guest frame and role of each page of a root; no frame for a PDPTE that is not present."""
        role, gfn = context.role, context.cr3 >> 12 & FRAME >> 12
        if context.paging == LONG_MODE:
            return [(gfn, role)]
        if context.paging == OFF:
            return [(gbyte << 18, role) for gbyte in range(4)]
        if context.paging == PAE_PAGING:
            return [
                (pdpte >> 12 & FRAME >> 12 if pdpte & PRESENT else None, role)
                for pdpte in context.pdptes
            ]
        return [(gfn & 0xFFFFF, role | gbyte << QUADRANT) for gbyte in range(4)]

    def _put_root(self, root: Root | None) -> None:
        for page in () if root is None else root.pages:
            if page is None:
                continue
            page.roots -= 1
            if page.roots == 0 and page.invalid:
                del self.zapped_roots[page.frame]
                self.doomed.append(page)
                self._commit(flush=False)

    def moved(self, vcpu: Vcpu, register: str, old: Cpu, new: Cpu, keep: bool) -> None:
        """A control register was written (SDM Vol. 3A, 4.10.4.1)."""
        context = vcpu.context
        before = context.role
        if register == "cr3":
            self._switch(vcpu, old, new)
            if not keep:
                vcpu.core.forget_pcid(pcid(new))
                vcpu.requests |= SYNC
            vcpu.device_page = None
            return
        self._controls(vcpu)
        if context.role != before:
            # All of these registers' bits that matter to a role change it, and so the root.
            self._unload(vcpu)
        elif old.pdptes != new.pdptes or (old.cr4 ^ new.cr4) & (1 << 7 | 1 << 17 | 1 << 20):
            self._unload(vcpu)
        if register in {"cr0", "cr4", "efer"}:
            vcpu.device_page = None

    def _unload(self, vcpu: Vcpu) -> None:
        """Let go of the root and of the cached ones: the next entry finds a new one."""
        context = vcpu.context
        roots = [context.root, *(page for _, _, page in context.cached)]
        context.root, context.cached = None, []
        for root in roots:
            self._put_root(root)
        vcpu.requests |= RELOAD

    def _switch(self, vcpu: Vcpu, old: Cpu, new: Cpu) -> None:
        """MOV to CR3: take a cached root if there is one."""
        context = vcpu.context
        cached: list[tuple[int, int, Root]] = context.cached
        root, role = context.root, context.role
        if root is not None and not root.invalid and context.paging == LONG_MODE:
            cached.insert(0, (old.cr3, role, root))
        elif root is not None:
            self._put_root(root)
        context.root = None
        for entry in cached:
            if entry[0] == new.cr3 and entry[1] == role and not entry[2].invalid:
                cached.remove(entry)
                context.root = entry[2]
                break
        else:
            vcpu.requests |= RELOAD
        while len(cached) > CACHED_ROOTS:
            self._put_root(cached.pop()[2])
        self._controls(vcpu)

    # Invalidations that the guest asks for.

    def invlpg(self, vcpu: Vcpu, address: int) -> None:
        """INVLPG: bring what serves this address in every root up to date."""
        vcpu.core.forget(address)
        vcpu.device_page = None
        context = vcpu.context
        for root in [context.root, *(root for _, _, root in context.cached)]:
            page = None if root is None or root.invalid else root.page(address)
            if page is not None:
                self._sync_address(vcpu, page, address)

    def invpcid(self, vcpu: Vcpu, kind: int, of: int, address: int) -> None:
        """INVPCID; see `steps.Invpcid`."""
        context, current = vcpu.context, pcid(vcpu.cpu)
        if kind >= 2:
            vcpu.core.forget_all()
        elif kind == 1:
            vcpu.core.forget_pcid(of)
        else:
            vcpu.core.forget_of(of, address)
        if kind >= 2 or of == current:
            vcpu.requests |= SYNC
        for cr3, _, root in list(context.cached):
            if (kind >= 2 or cr3 & 0xFFF == of) and not root.invalid:
                for page in root.pages:
                    if page is not None:
                        self._sync_children(vcpu, page)

    def _sync_address(self, vcpu: Vcpu, page: Page, address: int) -> None:
        while True:
            index = page.base | address >> 3 + 9 * page.level & 511
            spte = self.ram[index]
            if page.unsync and spte:
                if self._sync_spte(vcpu, page, index):
                    self.guest.flush()
                return
            if page.level == 1 or not spte & PRESENT or spte & LARGE:
                return
            page = self.pages[spte >> 12 & FRAME >> 12]

    # The fault path.

    def fault(
        self, vcpu: Vcpu, address: int, word: int, status: int, code: int
    ) -> Seen | str | None:
        """An access that the core could not translate: what the guest sees of it, `EMULATE`, or
        None for one to be made again. Raises `NotRam`.
        """
        if status == long_mode.NONCANONICAL:
            return reflected(status, code, address)
        assert status == long_mode.FAULT, "a shadow table leads outside of memory"
        if code & 8 and self._is_device(vcpu, address):
            return EMULATE

        # THE GUEST'S TRANSLATION
        level, gpa = self.walk(vcpu, address, word)
        if level > 3:
            self.invlpg(vcpu, address)  # a page fault drops what is cached of its address
            return reflected(level, gpa, address)
        unpaged = level == 0
        level = level or 2  # a root's
        rights = self._rights(vcpu, level)
        leaf_rights = rights[level]
        write = word & 2
        if not write and not unpaged and not self.gptes[level] & DIRTY:
            leaf_rights &= ~W

        # THE FRAME
        guest, gfn = self.guest, gpa >> 12
        slot = guest.slot_of(gfn)
        if slot is not None and write and slot.readonly:
            return EMULATE
        if slot is not None:
            frame, writable = guest.frame_of(slot, gfn, write != 0)
            if write and not leaf_rights & W and not word & 4 and not vcpu.cpu.wp:
                if leaf_rights & U and vcpu.cpu.smap:
                    # Made a supervisor's page, it would be open to accesses that SMAP must stop.
                    return EMULATE
                if vcpu.cpu.smep and leaf_rights & U:
                    leaf_rights &= ~X
                leaf_rights = leaf_rights & ~U | W
        self._reclaim_if_needed()

        # THE SHADOW PAGES ON THE WAY
        page: Page = vcpu.context.root.page(address)
        while page.level > level:
            index = page.base | address >> 3 + 9 * page.level & 511
            table = self.gptes[page.level] >> 12 & FRAME >> 12
            page = self._child(vcpu, page, index, table, rights[page.level], 0)
        goal = 1
        if slot is not None:
            tables = self.shadowing if level == 1 else self._tables_by_any_name()
            goal = guest.level_of(slot, gfn, level, word >> 4 & 1, tables)
        while page.level > goal or self._stays_small(page, address):
            index = page.base | address >> 3 + 9 * page.level & 511
            start = gfn & ~((1 << 9 * (page.level - 1)) - 1)
            page = self._child(vcpu, page, index, start, leaf_rights, DIRECT)

        # THE LEAF
        index = page.base | address >> 3 + 9 * page.level & 511
        if slot is None:
            self._set_device(page, index, gfn, leaf_rights)
            vcpu.device_page = (address >> 12, gfn, leaf_rights, guest.generation)
            return EMULATE
        if self._map(page, index, slot, gfn, frame, leaf_rights, writable):
            if write:
                return EMULATE
        elif page.level == 1 and not page.direct:
            self._prefetch(vcpu, page, index)
        return None

    def _stays_small(self, page: Page, address: int) -> bool:
        """Whether code was fetched from here, which must not be from a large page."""
        spte = self.ram[page.base | address >> 3 + 9 * page.level & 511]
        small = spte & PRESENT and not spte & (LARGE | 1 << 51)
        return self.guest.plan.multihit and page.level > 1 and bool(small)

    def _rights(self, vcpu: Vcpu, level: int) -> list[int]:
        """The rights that are left at each level of the guest's walk, that level included."""
        rights = [ALL] * 6
        left = ALL
        for at in range(vcpu.context.levels, level - 1, -1):
            left &= rights_of(self.gptes[at])
            rights[at] = left
        return rights

    def _child(
        self, vcpu: Vcpu, page: Page, index: int, gfn: int, access: int, direct: int
    ) -> Page:
        """The shadow page that an SPTE leads to, made and linked if there is none."""
        spte = self.ram[index]
        if spte & PRESENT and not spte & (LARGE | 1 << 51):
            child = self.pages[spte >> 12 & FRAME >> 12]
            child.writes = 0
            if not direct or child.access == access:
                return child
            # A direct page was made for other rights: the guest's large page changed.
            self._unlink(index, child)
            self.guest.flush()
        role = page.role & ~(LEVEL | ALL << ACCESS | DIRECT | 3 << QUADRANT)
        role |= (page.level - 1) | access << ACCESS
        if page.short and not direct:
            role |= (index & 1) << QUADRANT
        child = self._get_page(vcpu, gfn, role | direct)
        if child.unsync_children:
            # What was not present may be present now: the guest need not invalidate to see it.
            self._sync_children(vcpu, child)
        self._link(page, index, child)
        return child

    def _link(self, page: Page, index: int, child: Page) -> None:
        if self.ram[index]:
            self._drop(page, index)
            self.guest.flush()
        self.ram[index] = child.frame << 12 | LINK
        page.used.add(index)
        child.parents[index] = page
        if child.unsync or child.unsync_children:
            self._mark_unsync_above(child)

    def _unlink(self, index: int, child: Page) -> None:
        """Clear an SPTE that leads to a shadow page."""
        page = child.parents.pop(index)
        self.ram.pop(index, None)
        page.used.discard(index)
        self._clear_unsync(page, index)

    # Shadow pages.

    def _get_page(self, vcpu: Vcpu, gfn: int, role: int) -> Page:
        """The shadow page for a guest frame under a role."""
        direct, level = role & DIRECT, role & LEVEL
        if not direct and level > 1:
            # A table of an upper level is write-protected: no page of it may stay unsync.
            names = self.guest.names_of(gfn)
            for other in [p for name in names for p in self.shadowing.get(name, ())]:
                if other.unsync:
                    self._zap(other)
            self._commit(flush=False)
        page = self.by_role.get((gfn, role))
        if page is not None:
            page.writes = 0
            if page.unsync and self._sync_page(vcpu, page):
                self.guest.flush()
            return page
        page = Page(self.frames.take(), gfn, role)
        self.pages[page.frame] = page
        self.by_role[gfn, role] = page
        if not direct:
            self.shadowing.setdefault(gfn, []).append(page)
            if self._write_protect_table(gfn):
                self.guest.flush()
        return page

    def _zap(self, page: Page) -> None:
        """Take a shadow page out of use; `_commit` frees it after the flush."""
        if page.invalid:
            return
        for index in list(page.unsync_children):
            child = self.pages.get(self.ram[index] >> 12 & FRAME >> 12)
            if child is not None:
                self._zap_unsync(child)
        for index in list(page.used):
            self._drop(page, index)
        for index in list(page.parents):
            self._unlink(index, page)
        del self.pages[page.frame]
        del self.by_role[page.gfn, page.role]
        if not page.direct:
            sharing = self.shadowing[page.gfn]
            sharing.remove(page)
            if not sharing:
                del self.shadowing[page.gfn]
        page.unsync = False
        page.invalid = True
        if page.roots:
            self.zapped_roots[page.frame] = page
            for vcpu in self.guest.vcpus:
                vcpu.requests |= RELOAD
        else:
            self.doomed.append(page)

    def _zap_unsync(self, page: Page) -> None:
        """Zap what is unsync at or below a page."""
        for index in list(page.unsync_children):
            child = self.pages.get(self.ram[index] >> 12 & FRAME >> 12)
            if child is not None:
                self._zap_unsync(child)
        if page.unsync:
            self._zap(page)

    def _commit(self, flush: bool) -> None:
        """Flush, if anything was zapped or `flush` says so, and then free what was zapped."""
        if not self.doomed and not flush:
            return
        self.guest.flush()
        for page in self.doomed:
            self.frames.give(page.frame, page.used)
        self.doomed.clear()

    def _reclaim_if_needed(self) -> None:
        most = self.guest.plan.shadow_pages
        if len(self.pages) > most:
            self.reclaim(len(self.pages) - most + 4)

    def reclaim(self, count: int) -> None:
        """Free the oldest pages that are no root."""
        for page in list(self.pages.values()):
            if count <= 0:
                break
            if not page.roots and not page.invalid:
                self._zap(page)
                count -= 1
        self._commit(flush=False)

    def zap_all(self) -> None:
        """Zap every shadow page."""
        for page in list(self.pages.values()):
            self._zap(page)
        self._commit(flush=True)

    # SPTEs.

    def _entries(self, page: Page) -> Iterator[tuple[int, int]]:
        for index in list(page.used):
            yield index, self.ram[index]

    def _drop(self, page: Page, index: int) -> int:
        """Clear an SPTE, whatever it is; returns what it was."""
        spte = self.ram[index]
        if spte & PRESENT and not spte & 1 << 51:
            if page.level > 1 and not spte & LARGE:
                self._unlink(index, self.pages[spte >> 12 & FRAME >> 12])
                return spte
            gfn = self.mapped.pop(index)
            self._account(gfn, spte)
            key = gfn << 2 | page.level
            sptes = self.rmap[key]
            sptes.discard(index)
            if not sptes:
                del self.rmap[key]
        self.ram.pop(index, None)
        page.used.discard(index)
        return spte

    def _account(self, gfn: int, spte: int) -> None:
        """Tell the backing of a page that was written through an SPTE which is to go."""
        if spte & DIRTY:
            slot = self.guest.slot_of(gfn)
            if slot is not None:
                self.guest.backing.written(slot.page + gfn - slot.gfn)

    def _map(
        self,
        page: Page,
        index: int,
        slot: SlotState,
        gfn: int,
        frame: int,
        access: int,
        writable: bool,
        prefetch: bool = False,
    ) -> bool:
        """Make an SPTE map a guest frame. True if a shadowed table there forbade writing."""
        level = page.level
        first = gfn & ~((1 << 9 * (level - 1)) - 1)
        old = self.ram[index]
        if old & PRESENT and not old & 1 << 51:
            linked = level > 1 and not old & LARGE
            if linked or old & FRAME != (frame << 12) & ~((1 << 3 + 9 * level) - 1):
                self._drop(page, index)
                self.guest.flush()
                old = 0
        else:
            old = 0
        spte, protected = self._spte(
            page, slot, first, frame, access, writable, old, prefetch, True
        )
        if old:
            if self._update(slot, gfn, index, old, spte):
                self.guest.flush()
        else:
            self.ram[index] = spte
            page.used.add(index)
            self.mapped[index] = first
            self.rmap.setdefault(first << 2 | level, set()).add(index)
        return protected

    def _spte(
        self,
        page: Page,
        slot: SlotState,
        gfn: int,
        frame: int,
        access: int,
        writable: bool,
        old: int,
        prefetch: bool,
        may_unsync: bool,
    ) -> tuple[int, bool]:
        """An SPTE that gives rights to a frame, and whether a shadowed table forbade writing."""
        level = page.level
        spte = PRESENT | (frame << 12) & ~((1 << 3 + 9 * level) - 1)
        if not prefetch:
            spte |= ACCESSED
        if level > 1:
            spte |= LARGE
        if not access & X or (level > 1 and self.guest.plan.multihit):
            spte |= NX
        if access & U:
            spte |= USER
        if not writable:
            return spte, False
        spte |= HOST_WRITABLE
        if not access & W:
            return spte, False
        if not old & WRITABLE and self._stays_protected(gfn, level, prefetch, may_unsync):
            return spte, True
        self.guest.mark_dirty(slot, gfn)
        return spte | WRITABLE | MMU_WRITABLE, False

    def _update(self, slot: SlotState, gfn: int, index: int, old: int, spte: int) -> bool:
        """Change an SPTE that maps the same frame as before. True if a flush is needed: if rights
        were taken away, which a core may still have cached.
        """
        spte |= old & (ACCESSED | DIRTY)
        if old & WRITABLE and not spte & WRITABLE:
            self._account(gfn, old)
            spte &= ~DIRTY
        self.ram[index] = spte
        return bool(old & ~spte & (WRITABLE | USER) or spte & ~old & NX)

    def _stays_protected(self, gfn: int, level: int, prefetch: bool, may_unsync: bool) -> bool:
        """Whether a guest frame must not be made writable, since a table in it is shadowed.

        Tables of the lowest level go unsync instead, if they may.
        """
        if level > 1:
            end = gfn + (1 << 9 * (level - 1))
            return any(gfn <= table < end for table in self._tables_by_any_name())
        pages = [p for name in self.guest.names_of(gfn) for p in self.shadowing.get(name, ())]
        if not pages:
            return False
        if not may_unsync or any(page.level > 1 for page in pages):
            return True
        if prefetch and not all(page.unsync for page in pages):
            return True
        for page in pages:
            if not page.unsync:
                page.unsync = True
                self._mark_unsync_above(page)
        return False

    def _mark_unsync_above(self, page: Page) -> None:
        for index, parent in page.parents.items():
            if index not in parent.unsync_children:
                parent.unsync_children.add(index)
                self._mark_unsync_above(parent)

    def _clear_unsync(self, page: Page, index: int) -> None:
        """An SPTE of the page has nothing unsync below it any more."""
        if index in page.unsync_children:
            page.unsync_children.discard(index)
            if not page.unsync_children and not page.unsync:
                for above, parent in page.parents.items():
                    self._clear_unsync(parent, above)

    def _tables_by_any_name(self) -> set[int]:
        """Every guest frame that is the page of a table that is shadowed."""
        return {name for gfn in self.shadowing for name in self.guest.names_of(gfn)}

    def _write_protect_table(self, gfn: int) -> bool:
        """The same of a table, which may be stored to by any of its names."""
        had = [self._write_protect(name) for name in self.guest.names_of(gfn)]
        return any(had)

    def _write_protect(self, gfn: int) -> bool:
        """Take the right to write from every SPTE that maps a guest frame. True if any had it."""
        any_had = False
        for level in (1, 2, 3):
            first = gfn & ~((1 << 9 * (level - 1)) - 1)
            for index in self.rmap.get(first << 2 | level, ()):
                spte = self.ram[index]
                if spte & WRITABLE:
                    any_had = True
                    self._account(gfn, spte)
                    self.ram[index] = spte & ~(WRITABLE | DIRTY)
        return any_had

    # Devices.

    def _set_device(self, page: Page, index: int, gfn: int, access: int) -> None:
        """Make an SPTE say that the page is a device's."""
        if self.ram[index] & PRESENT and not self.ram[index] & 1 << 51:
            self._drop(page, index)
            self.guest.flush()
        spte = DEVICE | gfn << 12 | self.guest.generation << 52 | access & (W | U)
        if not access & X:
            spte |= NX
        self.ram[index] = spte
        page.used.add(index)

    def _is_device(self, vcpu: Vcpu, address: int) -> bool:
        """Whether a reserved-bit fault is a device's SPTE, of this generation of the slots."""
        page: Page | None = vcpu.context.root.page(address)
        while page is not None:
            spte = self.ram[page.base | address >> 3 + 9 * page.level & 511]
            if spte & DEVICE == DEVICE:
                break
            if page.level == 1 or not spte & PRESENT or spte & LARGE:
                return False
            page = self.pages.get(spte >> 12 & FRAME >> 12)
        else:
            return False
        if spte >> 52 & DEVICE_GENERATION != self.guest.generation:
            return False
        rights = spte & (W | U) | (spte >> 63 ^ 1)
        vcpu.device_page = (address >> 12, spte >> 12 & DEVICE_GFN, rights, self.guest.generation)
        return True

    def _guest_entry(self, page: Page, index: int) -> int:
        """The guest's entry that an SPTE stands for. Raises `NotRam`."""
        place = page.place(index)
        if page.short:
            return self.guest[page.gfn << 9 | place >> 1] >> ((place & 1) << 5) & 0xFFFF_FFFF
        return self.guest[page.gfn << 9 | place]

    # Unsync pages.

    def _sync_children(self, vcpu: Vcpu, page: Page) -> None:
        """Bring all that is unsync at or below a page up to date, and protect it again.

        Cores know of the protection before a table is read, and of what is dropped before the page
        counts as true: a store in between would be lost.
        """
        for stale in list(self._unsync_below(page)):
            if stale.invalid or not stale.unsync:
                continue
            if self._write_protect_table(stale.gfn):
                self.guest.flush()
            if self._sync_page(vcpu, stale):
                self.guest.flush()
            stale.unsync = False
            for index, parent in stale.parents.items():
                self._clear_unsync(parent, index)

    def _unsync_below(self, page: Page) -> Iterator[Page]:
        if page.unsync:
            yield page
        for index in list(page.unsync_children):
            child = self.pages.get(self.ram[index] >> 12 & FRAME >> 12)
            if child is not None:
                yield from self._unsync_below(child)

    def _sync_page(self, vcpu: Vcpu, page: Page) -> bool:
        """Read the guest's table again for every SPTE there is. True if a flush is needed."""
        flush = False
        for index in list(page.used):
            if self._sync_spte(vcpu, page, index):
                flush = True
        return flush

    def _sync_spte(self, vcpu: Vcpu, page: Page, index: int) -> bool:
        """Read the guest's entry again for an SPTE. True if a flush is needed."""
        old = self.ram[index]
        gpte = self._guest_entry(page, index)
        if not gpte & PRESENT or not gpte & ACCESSED or gpte & vcpu.context.reserved_small:
            self._drop(page, index)
            return not old & 1 << 51
        gfn = gpte >> 12 & FRAME >> 12
        access = page.access & rights_of(gpte)
        if not gpte & DIRTY:
            access &= ~W
        slot = self.guest.slot_of(gfn)
        if old & 1 << 51:
            self._drop(page, index)
            if slot is None:
                self._set_device(page, index, gfn, access)
            return False
        if self.mapped[index] != gfn or slot is None:
            self._drop(page, index)
            return True
        frame, writable = old >> 12 & FRAME >> 12, bool(old & HOST_WRITABLE)
        spte, _ = self._spte(
            page, slot, gfn, frame, access, writable, old, prefetch=True, may_unsync=False
        )
        return self._update(slot, gfn, index, old, spte)

    def _prefetch(self, vcpu: Vcpu, page: Page, index: int) -> None:
        """Map what the guest's neighbouring entries map, where the host has it at hand."""
        first = index & ~(PREFETCH - 1)
        for near in range(first, first + PREFETCH):
            if self.ram[near]:
                continue
            gpte = self._guest_entry(page, near)
            if not gpte & PRESENT or not gpte & ACCESSED or gpte & vcpu.context.reserved_small:
                continue
            gfn = gpte >> 12 & FRAME >> 12
            access = page.access & rights_of(gpte)
            if not gpte & DIRTY:
                access &= ~W
            slot = self.guest.slot_of(gfn)
            if slot is None or (slot.log and access & W):
                continue
            backed = slot.page + gfn - slot.gfn
            frame = self.guest.backing.frame_of(backed)
            if frame is None:
                continue
            writable = not slot.readonly and backed not in self.guest.backing.readonly
            self._map(page, near, slot, gfn, frame, access, writable, prefetch=True)

    # What the VMM asks for.

    def written(self, gpa: int, size: int) -> None:
        """The hypervisor stored to a guest's memory for it: what was made of tables there goes."""
        names = self.guest.names_of(gpa >> 12)
        dropped = False
        for page in [p for name in names for p in self.shadowing.get(name, ())]:
            page.writes += 1
            flooded = page.level > 1 and page.writes >= FLOODED
            if flooded or (gpa | size) & (3 if page.short else 7):
                self._zap(page)
                continue
            for index in self._standing_for(page, gpa, size):
                if index in page.used:
                    self._drop(page, index)
                    dropped = True
        self._commit(flush=dropped)

    def _standing_for(self, page: Page, gpa: int, size: int) -> Iterator[int]:
        """The SPTEs of a page that stand for the entries in so many bytes of the guest's table."""
        if not page.short:
            yield page.base | gpa >> 3 & 511
            return
        for place in range(gpa >> 2 & 0x3FF, (gpa >> 2 & 0x3FF) + (size >> 2)):
            if page.level == 2:
                if place >> 8 == page.quadrant:
                    yield page.base | place << 1 & 511
                    yield page.base | place << 1 & 511 | 1
            elif place >> 9 == page.quadrant:
                yield page.base | place & 511

    def mapped_in(self, gfns: range) -> set[int]:
        """Guest frames, of these, whose entries together map all of these that are mapped."""
        found = set()
        for key in self.rmap:
            first, level = key >> 2, key & 3
            if first < gfns.stop and gfns.start < first + (1 << 9 * (level - 1)):
                found.add(max(first, gfns.start))
        return found

    def revoke(self, gfn: int) -> None:
        """The host takes a guest frame's page away: no SPTE may map it any more."""
        dropped = False
        for level in (1, 2, 3):
            first = gfn & ~((1 << 9 * (level - 1)) - 1)
            for index in list(self.rmap.get(first << 2 | level, ())):
                self._drop(self.pages[index >> 9], index)
                dropped = True
        if dropped:
            self.guest.flush()

    def protect_slot(self, slot: SlotState) -> None:
        """Start to watch a slot for writes."""
        flush = False
        for gfn in self.mapped_in(range(slot.gfn, slot.end)):
            flush |= self._write_protect(gfn)
        if flush:
            self.guest.flush()

    def watch_again(self, slot: SlotState, gfns: frozenset[int]) -> None:
        """Watch guest frames for writes that were found written."""
        flush = False
        for gfn in gfns:
            flush |= self._write_protect(gfn)
        if flush:
            self.guest.flush()

    def collect(self, slot: SlotState) -> None:
        """Put into a slot's log what is not in it yet: nothing, writes are noted as they come."""

    def slot_gone(self, slot: SlotState) -> None:
        """A slot is going: no SPTE may map its frames, and no page shadow a table in it."""
        for gfn in self.mapped_in(range(slot.gfn, slot.end)):
            self.revoke(gfn)
        for page in list(self.pages.values()):
            if slot.gfn <= page.gfn < slot.end and not page.direct:
                self._zap(page)
        self._commit(flush=False)

    def slots_changed(self, wrapped: bool) -> None:
        """The memory slots have a new generation, the first again if it `wrapped`."""
        for vcpu in self.guest.vcpus:
            vcpu.requests |= RELOAD  # there may be memory now where a root had none
            if wrapped:
                vcpu.device_page = None
        if wrapped:
            self.zap_all()

    def remembered(self) -> object:
        """All that later steps depend on and that an audit does not look at."""
        cached = [[root[:2] for root in vcpu.context.cached] for vcpu in self.guest.vcpus]
        return [page.writes for page in self.pages.values()], cached

    def anatomy(self) -> Anatomy:
        """What an audit looks at."""
        guest = self.guest
        return Anatomy(
            guest.plan.design,
            guest.slots,
            guest.backing.frame,
            guest.backing.copies,
            guest.backing.readonly,
            self.pages,
            self.zapped_roots,
            self.rmap,
            guest.generation,
            [self._processor_view(vcpu) for vcpu in guest.vcpus],
            (self.blank,),
            role_view,
            guest.backing.huge,
            guest.plan.multihit,
            guest.backing.giant_frames(),
            guest.plan.gbyte_pages,
        )

    def _processor_view(self, vcpu: Vcpu) -> ProcessorView:
        context, core = vcpu.context, vcpu.core
        roots = [context.root, *(root for _, _, root in context.cached)]
        return ProcessorView(
            vcpu.cpu,
            [[] if root is None else root.frames() for root in roots],
            bool(vcpu.requests & (FLUSH | RELOAD)),
            bool(vcpu.requests & SYNC),
            core.cached,
            core.upper_entries,
        )


@cache
def role_view(role: int) -> Role:
    """A role as an audit reads it."""
    paging = role >> PAGING & 7
    return Role(
        role >> 8 & 1,
        role >> 9 & 1,
        role >> 10 & 1,
        role >> 11 & 1,
        4 if paging in SHORT_ENTRIES else 8,
        int(paging != PAGING_32),
        role >> QUADRANT & 3,
    )


@lru_cache(maxsize=1 << 12)
def real_cpu(cpu: Cpu, maxphyaddr: int) -> Cpu:
    """The control registers that a core runs the guest with: write protection and NX always on,
    PAE paging outside long mode, and with paging off what would restrict the supervisor is too.
    """
    cr0, cr4, efer = cpu.cr0 | 1 << 16, cpu.cr4 | 1 << 5, cpu.efer | 1 << 11
    if paging_of(cpu) == OFF:
        cr0, cr4, efer = cr0 | 1 << 31, cr4 & ~(1 << 20 | 1 << 21), efer & ~(1 << 8)
    return Cpu._make(cpu._replace(cr0=cr0, cr4=cr4, efer=efer, maxphyaddr=maxphyaddr))
