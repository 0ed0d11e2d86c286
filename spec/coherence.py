"""Shadow pages and flushes as a state machine: what a hypervisor may do, for any number of steps.

The state is functions of words. The guest's frames hold its tables (`content`); a shadow page
stands for one of them (`table`), or, if it is direct, for a range of memory; its entries (`spte`)
map guest frames, and a reverse map (`maps`) says which. The host has guest frames in frames of
machine memory (`frame`, and `owner` the other way). Cores cache entries (`cached`), and use them
while they are `ready`, which is until a flush was requested.

Each transition makes its step and returns whether the rules allow it. The rules look only at what a
hypervisor has at hand: its books, and whether a flush is `owed`, since an entry lost rights that a
core may have cached. `truths` are what then is true of every state, whatever cores do in between.

A *reader* is a processor as far as one linear address goes: it caches what serves this address, and
INVLPG is for it. `past` is the specification's own: 1 for a value that the guest's entry had at
some time since the reader last invalidated it, and by which it may still be served.

Entries are of the last level, where alone a page may be unsync, and CR0.WP is 1. A second stage is
the case in which all pages are direct. Source: Linux, Documentation/virt/kvm/x86/mmu.rst
("Synchronized and unsynchronized pages", "Reaction to events"), virt/kvm/locking.rst and
mm/mmu_notifier.rst; Intel SDM Vol. 3A, 4.10.
"""

from collections.abc import Callable, Iterator, Sequence

from vapama.spec.maps import Map
from vapama.spec.paging import ACCESSED, DIRTY, FRAME, PRESENT, WRITABLE
from vapama.spec.shadow import rights_of
from vapama.spec.words import Condition, Word, flag, ite

UNSYNC, DIRECT, ROM, INHERITED = 1 << 1, 1 << 2, 1 << 3, 4
"""Of a shadow page's word, beside PRESENT and its guest frame. Bits 6:4 are inherited rights; no
walk sets flags in a table in ROM, and none are waited for."""
LOGGED, WRITTEN, DUE = 1, 2, 4
"""Of a guest frame's log: writes are noted; there was one; the frame is about to be protected,
since its log begins or was harvested."""


def named(word: Word) -> Word:
    """The frame that a word names, of the guest or of the machine."""
    return word >> 12 & FRAME >> 12


def naming(frame: Word) -> Word:
    """A present word that names a frame."""
    return frame << 12 | PRESENT


def within(new: Word, old: Word) -> Condition:
    """Whether an entry lets nothing pass that another does not."""
    same = (old & PRESENT != 0) & (named(new) == named(old))
    return (new & PRESENT == 0) | same & (rights_of(new) & ~rights_of(old) == 0)


def justified(page: Word, entry: Word, gfn: Word, spte: Word) -> Condition:
    """Whether the guest's `entry`, in the table that a shadow page stands for, gives what an SPTE
    gives: the frame, and the rights, once it is accessed, and for a write dirty.
    """
    used = (entry & PRESENT != 0) & ((entry & ACCESSED != 0) | (page & ROM != 0))
    dirty = entry >> 5 | page >> 2  # bits 6 and 3, DIRTY and ROM, in the place of WRITABLE
    given = page >> INHERITED & rights_of(entry) & (~WRITABLE & 7 | dirty & WRITABLE)
    gives = used & (named(entry) == gfn) & (rights_of(spte) & ~given == 0)
    return (page & DIRECT != 0) | gives


class Model:
    """A state of one guest's shadow pages, and its transitions.

    `readers`, `entries` and `pages` are those that a rule about all of them looks at: all there
    are, where a program is followed; in a proof those that it is about, so that it has less to go
    by than the rule gives, and what it shows of them holds for any.
    """

    def __init__(
        self,
        new: Callable[[str], Map],
        owed: Word,
        readers: Sequence[Word],
        entries: Sequence[tuple[Word, Word]],
        pages: Sequence[Word],
    ) -> None:
        self.owed, self.readers, self.entries, self.pages = owed, readers, entries, pages
        self.content = new("content")
        """The guest's words: of guest frame and place."""
        self.table = new("table")
        """Of a shadow page: what it stands for."""
        self.spte, self.maps = new("spte"), new("maps")
        """Of a shadow page and place: the entry, and the guest frame by the reverse map."""
        self.frame, self.owner = new("frame"), new("owner")
        """Of a guest frame: its frame, WRITABLE if it may be. Of a frame: its guest frame."""
        self.log = new("log")
        """Of a guest frame: its dirty log."""
        self.ready = new("ready")
        """Of a reader: whether it uses what it has cached. If not, it drops it first."""
        self.cached, self.cached_for = new("cached"), new("cached_for")
        """Of reader, page and place: the entry as it was cached, and what it mapped."""
        self.past = new("past")
        """Of page, place, reader and value: see above."""
        self.source, self.cached_source = new("source"), new("cached_source")
        """As `spte` and `cached`: the value of the guest's entry that they were made from."""

    def power_on(self) -> Condition:
        """Everything is 0."""
        for everywhere in vars(self).values():
            if hasattr(everywhere, "clear") and hasattr(everywhere, "put"):
                everywhere.clear()
        self.owed = self.owed & 0
        return True

    # THE BOOKS

    def entry_of(self, page: Word, place: Word) -> Word:
        """The guest's entry that an SPTE stands for, as it is now."""
        return self.content(named(self.table(page)), place)

    def shadows(self, page: Word, gfn: Word) -> Condition:
        """Whether a page that is not unsync stands for a table in a guest frame."""
        word = self.table(page)
        return (word & (PRESENT | UNSYNC | DIRECT) == PRESENT) & (named(word) == gfn)

    def unshadowed(self, gfn: Word) -> Condition:
        """Whether none does."""
        none: Condition = True
        for page in self.pages:
            none = none & (flag(self.shadows(page, gfn)) == 0)
        return none

    def unmapped(self, gfn: Word, rights: Word) -> Condition:
        """Whether no SPTE with one of these bits maps a guest frame, by the reverse map."""
        none: Condition = True
        for entry in self.entries:
            none = none & ((self.maps(*entry) != naming(gfn)) | (self.spte(*entry) & rights == 0))
        return none

    def noted(self, gfn: Word) -> Condition:
        """Whether a write to a guest frame is in its log, or is about to be, or it has none."""
        return self.log(gfn) & (LOGGED | WRITTEN | DUE) != LOGGED

    def usable(self, reader: Word, page: Word, place: Word) -> Condition:
        """Whether a core may use what it has cached of an SPTE."""
        return (self.cached(reader, page, place) & PRESENT != 0) & (self.ready(reader) == 1)

    # WHAT THE HYPERVISOR DOES

    def set_spte(self, page: Word, place: Word, spte: Word, gfn: Word) -> Condition:
        """An SPTE is made, changed, protected or dropped.

        Rights may go at any time, and then a flush is owed. Others come from the guest's entry as
        it is now, and from the host; the right to write only where no table is shadowed but by
        pages that are unsync, and once the log has it.
        """
        old, word, entry = self.spte(page, place), self.table(page), self.entry_of(page, place)
        less = (spte & PRESENT == 0) | within(spte, old) & (self.maps(page, place) == naming(gfn))
        host = self.frame(gfn)
        more = (word & PRESENT != 0) & justified(word, entry, gfn, spte)
        more = more & (host & PRESENT != 0) & (named(host) == named(spte))
        write = (host & WRITABLE != 0) & self.unshadowed(gfn) & self.noted(gfn)
        may = less | more & ((spte & WRITABLE == 0) | write)

        self.owed = ite(within(old, spte), self.owed, 1)
        self.source.put(page, place, ite(less, self.source(page, place), entry))
        self.maps.put(page, place, ite(spte & PRESENT != 0, naming(gfn), 0))
        self.spte.put(page, place, spte)
        return may

    def request_flush(self) -> Condition:
        """Every processor is told to drop what it has cached before it goes on."""
        self.ready.clear()
        self.owed = self.owed & 0
        return True

    def shadow(self, page: Word, word: Word) -> Condition:
        """A frame becomes a shadow page, which is unsync at first if it stands for a table."""
        may = (self.table(page) == 0) & (word & PRESENT != 0) & (word & (UNSYNC | DIRECT) != 0)
        self.past.clear(page)
        self.table.put(page, word)
        return may

    def unshadow(self, page: Word) -> Condition:
        """A shadow page is freed: it has no entries, and no core has any."""
        may: Condition = self.owed == 0
        for where, place in self.entries:
            may = may & ((where != page) | (self.spte(where, place) & PRESENT == 0))
        self.table.put(page, self.table(page) & 0)
        return may

    def unsync(self, page: Word) -> Condition:
        """A page is not kept true any more: the guest may write to its table."""
        self.table.put(page, self.table(page) | UNSYNC)
        return self.table(page) & PRESENT != 0

    def synced(self, page: Word) -> Condition:
        """A page is kept true from now on: its table is protected, cores know it, and then its
        entries were compared with the guest's.
        """
        word = self.table(page)
        may = (self.owed == 0) & self.unmapped(named(word), WRITABLE)
        for where, place in self.entries:
            spte, gfn = self.spte(where, place), named(self.maps(where, place))
            true = justified(word, self.entry_of(where, place), gfn, spte)
            may = may & ((where != page) | (spte & PRESENT == 0) | true)
        self.table.put(page, word & ~UNSYNC)
        return may & (word & PRESENT != 0)

    def store_for_guest(self, gfn: Word, place: Word, value: Word) -> Condition:
        """A store that left the guest is made: what stands for the entry is dropped."""
        self._write(gfn, place, value)
        for page in self.pages:
            drops = self.shadows(page, gfn) & (self.spte(page, place) & PRESENT != 0)
            self.spte.put(page, place, ite(drops, 0, self.spte(page, place)))
            self.maps.put(page, place, ite(drops, 0, self.maps(page, place)))
            self.owed = ite(drops, 1, self.owed)
        return True

    def set_flags(self, gfn: Word, place: Word, flags: Word) -> Condition:
        """Accessed and dirty flags of a guest's entry are set by a walk."""
        self._write(gfn, place, self.content(gfn, place) | flags)
        return flags & ~(ACCESSED | DIRTY) == 0

    def remap(self, gfn: Word, to: Word) -> Condition:
        """The host puts a guest frame into another frame, or none, or changes whether it may be
        written: nothing maps it, and no core has what did.
        """
        old, other = self.frame(gfn), self.owner(named(to))
        may = (self.owed == 0) & self.unmapped(gfn, PRESENT)
        may = may & ((to & PRESENT == 0) | (other == 0) | (other == naming(gfn)))
        self.owner.put(named(old), ite(old & PRESENT != 0, 0, self.owner(named(old))))
        self.owner.put(named(to), ite(to & PRESENT != 0, naming(gfn), self.owner(named(to))))
        self.frame.put(gfn, to)
        return may

    def log_written(self, gfn: Word) -> Condition:
        """A guest frame is put into its log."""
        self.log.put(gfn, self.log(gfn) | WRITTEN)
        return True

    def begin_log(self, gfn: Word) -> Condition:
        """A log begins, or what it had was harvested: the frame is to be protected."""
        self.log.put(gfn, LOGGED | DUE)
        return True

    def protected(self, gfn: Word) -> Condition:
        """That is done, and cores know it; or the guest has written again."""
        may = (self.owed == 0) & self.unmapped(gfn, WRITABLE)
        may = may | (self.log(gfn) & WRITTEN != 0)
        self.log.put(gfn, self.log(gfn) & ~DUE)
        return may

    def end_log(self, gfn: Word) -> Condition:
        """There is no log any more."""
        self.log.put(gfn, self.log(gfn) & 0)
        return True

    # WHAT A PROCESSOR DOES

    def enter(self, reader: Word) -> Condition:
        """It drops what it has cached, and then goes on."""
        self.cached.clear(reader)
        self.ready.put(reader, 1)
        return True

    def fill(self, reader: Word, page: Word, place: Word) -> Condition:
        """A walk caches an SPTE."""
        self.cached.put(reader, page, place, self.spte(page, place))
        self.cached_for.put(reader, page, place, self.maps(page, place))
        self.cached_source.put(reader, page, place, self.source(page, place))
        return (self.ready(reader) == 1) & (self.spte(page, place) & PRESENT != 0)

    def store(self, reader: Word, page: Word, place: Word, where: Word, value: Word) -> Condition:
        """A store by what is cached: to the guest frame that is where the core believes."""
        cached = self.cached(reader, page, place)
        self._write(named(self.owner(named(cached))), where, value)
        return self.usable(reader, page, place) & (cached & WRITABLE != 0)

    def invalidate(self, reader: Word, page: Word, place: Word) -> Condition:
        """INVLPG, or MOV to CR3 for one of its addresses: only the guest's entry of now counts. An
        SPTE of an unsync page was compared with it.
        """
        spte, word, entry = self.spte(page, place), self.table(page), self.entry_of(page, place)
        true = justified(word, entry, named(self.maps(page, place)), spte)
        may = (spte & PRESENT == 0) | (word & UNSYNC == 0) | true
        self.cached.clear(reader, page, place)
        self.past.clear(page, place, reader)
        self.source.put(page, place, entry)
        return may

    def _write(self, gfn: Word, place: Word, value: Word) -> None:
        """The guest's memory changes: its entries had a value that readers may still go by."""
        before = self.content(gfn, place)
        for page in self.pages:
            word = self.table(page)
            stands = (word & PRESENT != 0) & (named(word) == gfn)
            for reader in self.readers:
                had = self.past(page, place, reader, before)
                self.past.put(page, place, reader, before, ite(stands, 1, had))
        self.content.put(gfn, place, value)

    # WHAT IS TRUE OF EVERY STATE

    def truths(
        self, reader: Word, page: Word, place: Word, other: Word
    ) -> Iterator[tuple[str, Condition]]:
        """Of any reader, any SPTE, and any `other` shadow page: each truth, as what breaks it."""
        spte, maps, word = self.spte(page, place), self.maps(page, place), self.table(page)
        gfn, absent = named(maps), spte & PRESENT == 0
        entry, source = self.entry_of(page, place), self.source(page, place)
        given = self.gave(reader, page, place, gfn, spte, source)
        true = (word & UNSYNC != 0) | justified(word, entry, gfn, spte)
        yield "a table that is not in use has an entry", absent | (word & PRESENT != 0)
        yield "the reverse map is wrong", maps == ite(absent, 0, naming(gfn))
        yield "an SPTE leads where the host has something else", absent | self.hosts(gfn, spte)
        yield "an SPTE writes to a table that is kept true", absent | self.spares(gfn, spte, other)
        yield "an SPTE writes and no log has it", absent | self.logs(gfn, spte)
        yield "an SPTE of a page that is kept true is not", absent | true
        yield "an SPTE is of a value that was invalidated", absent | given

        cached, maps_too = self.cached(reader, page, place), self.cached_for(reader, page, place)
        unusable, was = flag(self.usable(reader, page, place)) == 0, named(maps_too)
        source = self.cached_source(reader, page, place)
        given = self.gave(reader, page, place, was, cached, source)
        same = within(cached, spte) & (maps_too == maps)
        yield "a core uses a table that is freed", unusable | (word & PRESENT != 0)
        yield "a core uses what maps nothing", unusable | (maps_too == naming(was))
        yield "a core uses a frame that is not the page's", unusable | self.hosts(was, cached)
        yield (
            "a core writes to a table that is kept true",
            (unusable | self.spares(was, cached, other)),
        )
        yield "a core writes and no log has it", unusable | self.logs(was, cached)
        yield "a core uses a value that it invalidated", unusable | given
        yield (
            "a core has more than the SPTE, and no flush is owed",
            (unusable | (self.owed != 0) | same),
        )

    def owns(self, gfn: Word) -> Condition:
        """A frame that a guest frame is in is its own."""
        frame = self.frame(gfn)
        return (frame & PRESENT == 0) | (self.owner(named(frame)) == naming(gfn))

    def hosts(self, gfn: Word, spte: Word) -> Condition:
        """An entry leads where the host has a guest frame, and writes only if it may."""
        host = self.frame(gfn)
        there = (host & PRESENT != 0) & (named(host) == named(spte)) & self.owns(gfn)
        return there & (spte & ~host & WRITABLE == 0)

    def spares(self, gfn: Word, spte: Word, page: Word) -> Condition:
        """An entry does not write to the table that a page is kept true of."""
        return (spte & WRITABLE == 0) | (flag(self.shadows(page, gfn)) == 0)

    def logs(self, gfn: Word, spte: Word) -> Condition:
        """What an entry writes to is in the log, if there is one."""
        return (spte & WRITABLE == 0) | self.noted(gfn)

    def gave(
        self, reader: Word, page: Word, place: Word, gfn: Word, spte: Word, source: Word
    ) -> Condition:
        """The guest's entry had the value that an entry was made from, since the reader's last
        invalidation, and it gives it.
        """
        word, now = self.table(page), self.entry_of(page, place)
        held = (source == now) | (self.past(page, place, reader, source) == 1)
        return (word & DIRECT != 0) | held & justified(word, source, gfn, spte)
