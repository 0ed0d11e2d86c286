"""What an audit needs to see of a hypervisor's memory subsystem: its real tables, and its books.

A hypervisor shows these by the names here; the objects may be its own. Indices count 8-byte words
of machine memory; frames are pages of it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from vapama.spec.cpu import Cpu
from vapama.spec.words import Word

GBYTE_SHIFT = 18
"""A GByte has ``1 << GBYTE_SHIFT`` pages of 4 KBytes."""


class Role(NamedTuple):
    """What the meaning of a shadow page's entries depends on besides the guest's table: EFER.NX,
    CR0.WP, and SMEP and SMAP with CR0.WP=0; how many bytes an entry of the guest's has, and whether
    PS in it can map a page (not in 32-bit paging without CR4.PSE).

    A table of 4-byte entries has 1024 of them, and several pages stand for it: at level 1 quadrant
    0 or 1 for each half of it, at level 2 quadrants 0 to 3, a GByte each, in which two entries
    stand for one of the guest's.
    """

    nx: int
    wp: int
    smep_not_wp: int
    smap_not_wp: int
    entry_bytes: int = 8
    page_size: int = 1
    quadrant: int = 0


class TablePage(Protocol):
    """A table of the hypervisor's, for hardware to walk.

    `direct` tables map a range of the guest's memory from frame `gfn` on; others shadow the guest's
    table at `gfn`. `access` are the rights inherited from above (X 1, W 2, U 4). `parents` are the
    indices of the entries that lead here, `unsync_children` of its own entries below which a page
    is `unsync`. `roots` is how many processors hold it as a root.
    """

    frame: int
    gfn: int
    level: int
    access: int
    role: int
    direct: int
    unsync: bool
    invalid: bool
    roots: int

    @property
    def parents(self) -> Collection[int]:
        """Indices of the entries that lead here."""

    @property
    def unsync_children(self) -> Collection[int]:
        """Indices of its entries below which a page is unsync."""


class SlotView(Protocol):
    """A memory slot: guest frames from `gfn` to before `end`, backed from `page` on; whether it is
    read-only; whether writes are logged, and the guest frames in its log.
    """

    @property
    def gfn(self) -> int:
        """Its first guest frame."""

    @property
    def end(self) -> int:
        """The guest frame after its last."""

    @property
    def page(self) -> int:
        """The page of the backing that is its first."""

    @property
    def readonly(self) -> bool:
        """Stores to it go to a device."""

    @property
    def log(self) -> bool:
        """Writes to it are logged."""

    @property
    def dirty(self) -> Collection[int]:
        """The guest frames in its log."""


class Cached(NamedTuple):
    """A translation that a core has cached.

    `rights` are those of all levels together (X 1, W 2, U 4), and `frame` is where the page begins
    that an entry of `level` maps.
    """

    pcid: int
    address: Word
    level: int
    frame: int
    rights: int


class ProcessorView(NamedTuple):
    """A virtual processor.

    `roots` are its roots, that in use first: the frames of one table, or of the four that PDPTEs
    of PAE paging lead to, 0 where there is none. `flush` and `sync` say what it will do before it
    enters the guest again; `upper` are entries of upper levels that its core has cached, by index.
    """

    cpu: Cpu
    roots: Sequence[Sequence[int]]
    flush: bool
    sync: bool
    cached: Callable[[], Iterable[Cached]]
    upper: Callable[[], Iterable[tuple[int, Word]]]


class Anatomy(NamedTuple):
    """A guest's memory as its hypervisor keeps it.

    `backed` are the frames of backing pages, `shared` the pages that must not be written in place,
    `swapped` the words of pages as they were swapped out, also of those that are in a frame again
    and are not known to have been written since.
    `tables` are the tables in use by frame, and `dying` those that are some processor's root still.
    `rmap` has, by ``gfn << 2 | level``, the indices of the entries that map a guest frame.
    `generation` is that of the memory slots, for devices' entries. `extra` are frames taken for
    another purpose. `role_of` explains the `role` of a table. `huge` are the blocks of 512 pages of
    the backing, by number, that are a huge page; `giants` are those of its GBytes, by number, that
    are a page of 1 GByte, and the first frame of each. With `multihit` no large entry may give
    code; without `gbyte_pages` none may map a GByte.
    """

    design: str
    slots: Mapping[int, SlotView]
    backed: Mapping[int, int]
    swapped: Mapping[int, Mapping[int, Word]]
    shared: Collection[int]
    tables: Mapping[int, TablePage]
    dying: Mapping[int, TablePage]
    rmap: Mapping[int, Collection[int]] | None
    generation: int
    processors: Sequence[ProcessorView]
    extra: Collection[int]
    role_of: Callable[[int], Role]
    huge: Collection[int] = ()
    multihit: bool = False
    giants: Mapping[int, int] = {}
    gbyte_pages: bool = True

    def frame_of(self, page: int) -> int | None:
        """The frame of a page of the backing; None if it has none."""
        giant = self.giants.get(page >> GBYTE_SHIFT)
        return self.backed.get(page) if giant is None else giant + (page & (1 << GBYTE_SHIFT) - 1)


class MachineView(NamedTuple):
    """All of a machine: its words by index, the frames that are free and how many there are, its
    guests. `remembered` gives all else that later steps depend on, as numbers, strings, tuples and
    lists of them. There are `giants` pages of 1 GByte besides, of which `free_giants` have no use,
    by their first frames.
    """

    memory: Mapping[int, Word]
    free: Collection[int]
    frames: int
    guests: Sequence[Anatomy]
    remembered: Callable[[], object] = lambda: None
    free_giants: Collection[int] = ()
    giants: int = 0
