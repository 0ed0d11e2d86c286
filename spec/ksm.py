"""Same-page merging (KSM): what it may and may not do, and what a scan does, page by page.

What it may do is one sentence: a page may share a frame with pages of the same content, and then
none of them may write to that frame. `Pages` is private memory, `Ksm` the merger over it. Scans are
stated exactly, so that counters can be predicted: this is what Linux 6.18 does. Follows the Linux
kernel documentation, admin-guide/mm/ksm.rst and mm/ksm.rst, and where these are silent mm/ksm.c.
"""

from collections.abc import Iterator
from typing import NamedTuple

FIRST_SKIPPED_AGE = 3
"""Smart scan leaves out no page that is younger than this, in scans."""
OLDEST = 255
"""The age of a page is counted up to this, in scans."""


class Options(NamedTuple):
    """The knobs under /sys/kernel/mm/ksm that change what a scan does."""

    max_page_sharing: int = 256
    use_zero_pages: int = 0
    smart_scan: int = 0


class Counters(NamedTuple):
    """What /sys/kernel/mm/ksm shows. Source: admin-guide/mm/ksm.rst, "KSM daemon sysfs interface".

    `shared` KSM frames are in use, `sharing` further pages use them; `unshared` pages were unique
    at the last scan and `volatile` ones changed too fast. `zero` pages map the zero page.
    """

    shared: int
    sharing: int
    unshared: int
    volatile: int
    zero: int
    skipped: int


class ProcessCounters(NamedTuple):
    """What /proc/PID/ksm_stat shows: `ksm_rmap_items`, `ksm_merging_pages`, `ksm_zero_pages`."""

    items: int
    merging: int
    zero: int


class Frame:
    """A page frame: its content, the pages that map it, and its stable node if it is KSM's."""

    __slots__ = ("content", "mapped", "node")

    def __init__(self, content: int) -> None:
        self.content, self.mapped = content, 0
        self.node: Node | None = None


class Node:
    """A KSM frame in the stable tree, with the items that were merged into it.

    `chained` if it stands in a chain: several frames of one content (max_page_sharing).
    """

    __slots__ = ("chained", "frame", "items")

    def __init__(self, frame: Frame) -> None:
        self.frame, self.chained = frame, False
        self.items: list[Item] = []


class Item:
    """What the scanner remembers of a page between scans (Linux: `ksm_rmap_item`)."""

    __slots__ = ("age", "checksum", "key", "node", "page", "process", "skips", "unstable")

    def __init__(self, process: "Process", page: int) -> None:
        self.process, self.page = process, page
        self.checksum: int | None = None
        self.key = 0
        self.node: Node | None = None
        self.unstable = False
        self.age = self.skips = 0


class Process:
    """An address space: its pages, which of them are MERGEABLE, and the scanner's items.

    `zeroed` are the pages that KSM made map the zero page.
    """

    __slots__ = ("frames", "items", "mergeable", "zeroed")

    def __init__(self, pages: int) -> None:
        self.frames: list[Frame | None] = [None] * pages
        self.mergeable = [False] * pages
        self.items: dict[int, Item] = {}
        self.zeroed: set[int] = set()


class Pages:
    """Private anonymous memory of processes that fork and copy on write, with no merging yet.

    Processes are numbered in the order of their creation; those that exited keep their number.
    """

    def __init__(self, pages: int) -> None:
        self.zero = Frame(0)
        self.zero.mapped = 1
        self.numbered = [Process(pages)]
        self.alive = [self.numbered[0]]

    def write(self, process: int, page: int, content: int) -> None:
        """Store: in place in a frame that is the page's alone, else in a new frame (a copy)."""
        owner = self.numbered[process]
        frame = owner.frames[page]
        if frame is None or frame is self.zero or frame.node is not None or frame.mapped > 1:
            self.map(owner, page, Frame(content))
        else:
            frame.content = content

    def read(self, process: int, page: int) -> int:
        """Load: the content. A page never touched maps the zero page from then on."""
        owner = self.numbered[process]
        if owner.frames[page] is None:
            self.map(owner, page, self.zero)
        frame = owner.frames[page]
        return 0 if frame is None else frame.content

    def discard(self, process: int, page: int) -> None:
        """MADV_DONTNEED: the page is not present any more and reads as zeros."""
        self.unmap(self.numbered[process], page)

    def fork(self, process: int) -> int:
        """A child that shares every frame; its number."""
        parent = self.numbered[process]
        child = Process(len(parent.frames))
        child.mergeable = list(parent.mergeable)
        child.zeroed = set(parent.zeroed)
        for page, frame in enumerate(parent.frames):
            if frame is not None:
                child.frames[page] = frame
                frame.mapped += 1
        self.numbered.append(child)
        self.alive.append(child)
        return len(self.numbered) - 1

    def exit(self, process: int) -> None:
        """The process ends: it maps nothing any more."""
        ended = self.numbered[process]
        for page in range(len(ended.frames)):
            self.unmap(ended, page)
        self.alive.remove(ended)

    def map(self, process: Process, page: int, frame: Frame) -> None:
        """Let the page use this frame, whatever it used before."""
        self.unmap(process, page)
        process.frames[page] = frame
        frame.mapped += 1

    def unmap(self, process: Process, page: int) -> None:
        """Let the page use no frame."""
        frame = process.frames[page]
        if frame is not None:
            frame.mapped -= 1
        process.frames[page] = None
        process.zeroed.discard(page)

    def contents(self, process: int) -> list[int]:
        """What a load of each page gives."""
        return [0 if f is None else f.content for f in self.numbered[process].frames]

    def present(self, process: int) -> list[bool]:
        """Which pages have a frame of their own or shared; one that maps the zero page has none."""
        return [f is not None and f is not self.zero for f in self.numbered[process].frames]

    def partition(self) -> list[int | None]:
        """Which pages share a frame: a label for each page of each living process, in order.

        Labels count up by first occurrence. A page without a frame, or of the zero page, has None.
        """
        labels: dict[int, int] = {}
        frames = [frame for process in self.alive for frame in process.frames]
        return [
            None if f is None or f is self.zero else labels.setdefault(id(f), len(labels))
            for f in frames
        ]


class Ksm(Pages):
    """The merger: processes say which pages it may merge, and `scan` is one full scan of ksmd."""

    def __init__(self, pages: int, options: Options | None = None) -> None:
        super().__init__(pages)
        self.options = options or Options()
        self.exited: list[Process] = []
        self.stable: dict[int, list[Node]] = {}
        """By content, the KSM frames that have it, the head of the chain first."""
        self.unstable: dict[int, Item] = {}
        self.shared = self.sharing = self.unshared = self.skipped = 0
        self.tied = False
        """Whether a page had a choice that is not settled here: see `stable_node`."""

    # What processes ask for

    def exit(self, process: int) -> None:
        """The process ends. Its items stay until the next scan, and so do counters."""
        ended = self.numbered[process]
        super().exit(process)
        self.exited.insert(0, ended)

    def advise(self, process: int, first: int, count: int, mergeable: int) -> None:
        """MADV_MERGEABLE or MADV_UNMERGEABLE. The latter copies each shared page back, at once.

        Source: admin-guide/mm/ksm.rst, "Controlling KSM with madvise".
        """
        owner = self.numbered[process]
        for page in range(first, first + count):
            if not mergeable and owner.mergeable[page]:
                self.break_sharing(owner, page)
            owner.mergeable[page] = bool(mergeable)

    def unmerge(self) -> None:
        """run=2: every page of a MERGEABLE area gets its own frame, and all items are forgotten.

        A KSM frame that is still mapped from elsewhere keeps its node.
        """
        for process in self.alive:
            for page, mergeable in enumerate(process.mergeable):
                if mergeable:
                    self.break_sharing(process, page)
            process.items.clear()
        self.exited.clear()
        self.unstable.clear()
        for content, nodes in list(self.stable.items()):
            for node in nodes:
                node.items.clear()
            self.living_nodes(content)
        self.shared = self.sharing = self.unshared = 0

    def break_sharing(self, process: Process, page: int) -> None:
        """Give a page that KSM shares a frame of its own, with the same content."""
        frame = process.frames[page]
        if frame is not None and (frame.node is not None or page in process.zeroed):
            self.map(process, page, Frame(frame.content))

    # One scan

    def scan(self) -> None:
        """One full scan: what exited is forgotten, then pages in order of process and address.

        Processes come in the order in which they were made (a fork appends). The unstable tree is
        built anew by each scan. Source: mm/ksm.rst, "Design".
        """
        self.unstable.clear()
        for process in self.exited:
            for item in process.items.values():
                self.detach(item)
        self.exited.clear()
        for item in self.candidates():
            if not self.leave_out(item):
                self.compare_and_merge(item)

    def candidates(self) -> Iterator[Item]:
        """The items to scan: one for each present page of a MERGEABLE area. Others are dropped."""
        for process in list(self.alive):
            for page, frame in enumerate(process.frames):
                if process.mergeable[page] and frame is not None and frame is not self.zero:
                    item = process.items.get(page)
                    if item is None:
                        item = process.items[page] = Item(process, page)
                    yield item
                elif page in process.items:
                    self.detach(process.items.pop(page))

    def leave_out(self, item: Item) -> bool:
        """Whether smart scan leaves the page out: if it did not merge for `age` scans already.

        Source: admin-guide/mm/ksm.rst, "smart_scan"; mm/ksm.c, should_skip_rmap_item.
        """
        frame = item.process.frames[item.page]
        if not self.options.smart_scan or frame is None or frame.node is not None:
            return False
        age = item.age
        item.age = min(age + 1, OLDEST)
        if age < FIRST_SKIPPED_AGE:
            return False
        if item.skips == 0:
            item.skips = scans_to_skip(age)
            return False
        item.skips -= 1
        self.skipped += 1
        self.detach(item)
        return True

    def compare_and_merge(self, item: Item) -> None:
        """What a scan does with one page. Source: mm/ksm.c, cmp_and_merge_page.

        It joins an existing KSM frame of its content, or else another page that this scan found to
        have it; the frame that stays is that of the page scanned second.
        """
        process, page = item.process, item.page
        frame = process.frames[page]
        assert frame is not None
        content = frame.content

        # A KSM FRAME ALREADY: merged before, or inherited by a fork (which may exceed the limit)
        if frame.node is not None:
            if item.node is not frame.node:
                self.detach(item)
                self.attach(item, frame.node)
            return

        # CHECKSUM: a page that changed since it was last looked at is not merged yet
        self.detach(item)
        if item.checksum != content:
            item.checksum = content
            return

        # THE ZERO PAGE
        if self.options.use_zero_pages and content == 0:
            self.map(process, page, self.zero)
            process.zeroed.add(page)
            return

        # THE STABLE TREE
        node = self.stable_node(content)
        if node is not None:
            self.map(process, page, node.frame)
            self.attach(item, node)
            return

        # THE UNSTABLE TREE
        other = self.unstable.get(content)
        if other is None:
            item.unstable, item.key = True, content
            self.unshared += 1
            self.unstable[content] = item
            return
        if other.process.frames[other.page] is frame:
            return  # one frame, shared by a fork: there is nothing to merge
        self.detach(other)
        node = frame.node = Node(frame)
        self.map(other.process, other.page, frame)
        self.insert(node)
        self.attach(other, node)
        self.attach(item, node)

    # The trees

    def stable_node(self, content: int) -> Node | None:
        """The KSM frame that a page of this content joins: the fullest one that has room.

        A frame with no items is none. In a chain the one found moves to the head, unless it is
        full with the page that joins. Source: mm/ksm.c, stable_node_dup.

        Of several that are equally full the first is taken. But the kernel reorders a chain also
        when a search for another content passes by it, which depends on the shape of its tree: what
        follows from such a choice (`tied`) is not settled.
        """
        nodes = self.living_nodes(content)
        limit = self.options.max_page_sharing
        open_nodes = [node for node in nodes if 0 < len(node.items) < limit]
        if not open_nodes:
            return None
        fullest = max(open_nodes, key=lambda node: len(node.items))
        self.tied |= sum(len(node.items) == len(fullest.items) for node in open_nodes) > 1
        if nodes[0].chained:
            if len(nodes) == 1:
                fullest.chained = False
            elif nodes[0] is not fullest and len(fullest.items) + 1 < limit:
                nodes.remove(fullest)
                nodes.insert(0, fullest)
        return fullest

    def living_nodes(self, content: int) -> list[Node]:
        """The KSM frames of this content that are still mapped; the others leave the tree."""
        nodes = self.stable.get(content, [])
        nodes[:] = [node for node in nodes if node.frame.mapped and node.frame.node is node]
        if not nodes:
            self.stable.pop(content, None)
        return nodes

    def insert(self, node: Node) -> None:
        """Put a new KSM frame into the stable tree; at the head of a chain if there are others."""
        content = node.frame.content
        others = self.living_nodes(content)
        if others:
            for other in others:
                other.chained = True
            node.chained = True
        self.stable[content] = [node, *others]

    def attach(self, item: Item, node: Node) -> None:
        """Count the page as one that uses this KSM frame."""
        if node.items:
            self.sharing += 1
        else:
            self.shared += 1
        item.node = node
        node.items.append(item)

    def detach(self, item: Item) -> None:
        """Take the page out of the tree that it is in."""
        if item.node is not None:
            item.node.items.remove(item)
            if item.node.items:
                self.sharing -= 1
            else:
                self.shared -= 1
            item.node = None
        elif item.unstable:
            item.unstable = False
            self.unshared -= 1
            if self.unstable.get(item.key) is item:
                del self.unstable[item.key]

    # What can be observed

    def counters(self) -> Counters:
        """The counters of the system. All but `zero` change only in a scan (or by run=2)."""
        items = sum(len(process.items) for process in (*self.alive, *self.exited))
        volatile = items - self.shared - self.sharing - self.unshared
        zero = sum(len(process.zeroed) for process in self.alive)
        return Counters(self.shared, self.sharing, self.unshared, volatile, zero, self.skipped)

    def process_counters(self, process: int) -> ProcessCounters:
        """The counters of one process."""
        owner = self.numbered[process]
        merging = sum(item.node is not None for item in owner.items.values())
        return ProcessCounters(len(owner.items), merging, len(owner.zeroed))


def scans_to_skip(age: int) -> int:
    """How many scans smart scan leaves a page of this age out. Source: mm/ksm.c, skip_age."""
    if age <= 3:
        return 1
    if age <= 5:
        return 2
    if age <= 8:
        return 4
    return 8
