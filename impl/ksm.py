"""Same-page merging at the speed of memory: checksums of whole areas at once, trees of what recurs.

A scan hashes every page that is not merged yet in machine code. Nearly all of them turn out to have
changed, or to be like no other page: these are dealt with as arrays. Only pages whose hash recurs
are looked at one by one, in order, with a real comparison before any merge. Most of these are like
pages of the same scan alone, and wait in no tree: the first of them for the second, and the others
for no more than that they are equal.

A page costs `Items.BYTES_A_PAGE` bytes (Linux: 64 for a `ksm_rmap_item`), a frame 4 bytes, and a
shared frame a `Node` besides. Whoever owns the pages is a `Host`: its areas are what is scanned
together (a process, a guest's memory), and may be keys of a dict. It write-protects a frame in
every page table and TLB (its rmap), maps a frame in place of another, and copies a frame that KSM
owns when it is written.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vapama.impl.kernels.sharing import may_merge
from vapama.spec.words import Flag, flag

Frames = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
NO_NODE = -1
KNOWN, SUMMED, UNSTABLE = 1, 2, 4
"""Bits of an item's state: it exists, its checksum is stored, it is in the unstable tree."""
FIRST_SKIPPED_AGE, OLDEST = 3, 255


class Host(Protocol):
    """Who owns frames and maps them: what KSM needs of it."""

    contents: Frames
    """The frames' contents, 512 words a row."""
    mapped: npt.NDArray[np.int32]
    """How many pages map each frame."""

    def areas(self) -> Sequence[Any]:
        """The areas in the order in which they are scanned."""

    def frames_of(self, area: Any) -> Numbers:
        """The frame of each page of an area; -1 where KSM has nothing to look at."""

    def frame_at(self, area: Any, page: int) -> int:
        """The same of one page."""

    def is_pinned(self, area: Any, page: int) -> Flag:
        """1 if a device holds the page's frame, which then must stay the page's."""

    def protect(self, area: Any, page: int) -> None:
        """Take write access to the page's frame from every page table and TLB."""

    def share(self, area: Any, page: int, frame: int) -> None:
        """Let the page use this frame, read-only, in place of its own."""

    def unmerge(self, area: Any) -> None:
        """Give every page that KSM shares, and that it may look at, a frame of its own."""

    def map_zero(self, area: Any, page: int) -> None:
        """Let the page use the zero page."""


class Node:
    """A shared frame, and how many items were merged into it. `frame` is -1 once it is freed."""

    __slots__ = ("chained", "frame", "hash", "items")

    def __init__(self, frame: int, checksum: int) -> None:
        self.frame, self.hash = frame, checksum
        self.items = 0
        self.chained = False


class Items:
    """What is remembered of the pages of one area from scan to scan, as arrays."""

    BYTES_A_PAGE = 4 + 4 + 1 + 1 + 1

    def __init__(self, pages: int) -> None:
        self.checksum = np.zeros(pages, dtype=np.uint32)
        self.node = np.full(pages, NO_NODE, dtype=np.int32)
        self.state = np.zeros(pages, dtype=np.uint8)
        self.age = np.zeros(pages, dtype=np.uint8)
        self.skips = np.zeros(pages, dtype=np.uint8)

    @property
    def size(self) -> int:
        """The bytes that the arrays take."""
        arrays = (self.checksum, self.node, self.state, self.age, self.skips)
        return sum(array.nbytes for array in arrays)


Waiting = tuple[Any, Items, int, int, int]
"""The first page of a group of equals that no tree knows of: area, items, page, frame; then, with
the frame that is shared, the group's node, `NO_NODE` before."""
Work = tuple[Any, Items, Numbers, Numbers]
"""A part of an area to scan: the area, its items, the pages and their frames."""


class Ksm:
    """The merger. `checksum_bits` may be few, to see that nothing rests on checksums but speed."""

    def __init__(
        self,
        host: Host,
        *,
        max_page_sharing: int = 256,
        use_zero_pages: int = 0,
        smart_scan: int = 0,
        checksum_bits: int = 64,
    ) -> None:
        self.host = host
        self.max_page_sharing = max_page_sharing
        self.use_zero_pages, self.smart_scan = use_zero_pages, smart_scan
        self.hash_mask = (1 << checksum_bits) - 1
        self.items: dict[Any, Items] = {}
        self.exited: list[Items] = []
        self.nodes: list[Node] = []
        self.spare_nodes: list[int] = []
        self.node_at = np.full(len(host.contents), NO_NODE, dtype=np.int32)
        """The node of each frame, `NO_NODE` if it is not shared."""
        self.stable: dict[int, list[list[int]]] = {}
        """By hash, a chain of nodes for each content (rarely more than one), the head first."""
        self.unstable: dict[int, list[tuple[Any, int]]] = {}
        self.batches: list[tuple[Any, Numbers, Frames]] = []
        """What was met once so far in an unfinished scan: area, pages, and their hashes."""
        zeros = hashed(np.zeros((1, 512), dtype=np.uint64), np.zeros(1, dtype=np.int64))
        self.zero_digest = int(zeros[0]) & self.hash_mask
        self.cursor: tuple[Any, int] | None = None
        self.scanned: set[Any] = set()
        self.shared = self.sharing = self.unshared = self.skipped = self.full_scans = 0

    # What the host tells

    def shares(self, frame: int) -> bool:
        """Whether KSM owns the frame, so that nobody may write to it."""
        return bool(self.node_at[frame] != NO_NODE)

    def freed(self, frame: int) -> None:
        """A frame is mapped nowhere any more: it leaves the trees."""
        number = int(self.node_at[frame])
        if number != NO_NODE:
            self.node_at[frame] = NO_NODE
            node = self.nodes[number]
            node.frame = -1
            chains = self.stable[node.hash]
            for chain in chains:
                if number in chain:
                    chain.remove(number)
            chains[:] = [chain for chain in chains if chain]
            if not chains:
                del self.stable[node.hash]
            self.retire(number)

    def moved(self, frame: int, to: int) -> None:
        """A frame was migrated: the node goes with its content."""
        number = int(self.node_at[frame])
        if number != NO_NODE:
            self.node_at[frame], self.node_at[to] = NO_NODE, number
            self.nodes[number].frame = to

    def leave(self, area: Any) -> None:
        """An area is gone (its process ended). Its items count until the next scan."""
        items = self.items.pop(area, None)
        if items is not None:
            self.exited.append(items)
        self.scanned.discard(area)
        if self.cursor is not None and self.cursor[0] is area:
            self.cursor = None

    def unmerge(self) -> None:
        """run=2: every page that may be merged gets a frame of its own; nothing is remembered."""
        for area in self.host.areas():
            self.host.unmerge(area)
        self.items.clear()
        self.exited.clear()
        self.unstable.clear()
        self.batches.clear()
        self.cursor = None
        self.scanned.clear()
        for number, node in enumerate(self.nodes):
            node.items = 0
            self.retire(number)
        self.shared = self.sharing = self.unshared = 0

    # Scanning

    def scan(self, most: int | None = None) -> int:
        """Scan up to `most` pages on from where the last scan stopped, or to the end of the areas.

        Returns how many pages there were to scan. The scan ends with the last area, and the next
        one begins anew.
        """
        if not self.scanned and self.cursor is None:
            self.unstable.clear()
            self.batches.clear()
        self.drop_exited()
        work: list[Work] = []
        left = 1 << 62 if most is None else most
        total = 0
        for area in self.host.areas():
            if area in self.scanned:
                continue
            if left == 0:
                self.cursor = self.cursor or (area, 0)
                break
            start = self.cursor[1] if self.cursor is not None and self.cursor[0] is area else 0
            self.cursor = None
            frames = self.host.frames_of(area)
            stop = min(len(frames), start + left)
            pages = np.arange(start, stop)
            items = self.items_of(area, len(frames))
            work.append((area, items, pages, frames[start:stop]))
            total, left = total + stop - start, left - (stop - start)
            if stop < len(frames):
                self.cursor = (area, stop)
                break
            self.scanned.add(area)
        self.merge(work)
        if self.cursor is None:
            self.scanned.clear()
            self.full_scans += 1
        return total

    def items_of(self, area: Any, pages: int) -> Items:
        """The items of an area, made at its first scan."""
        items = self.items.get(area)
        if items is None:
            items = self.items[area] = Items(pages)
        return items

    def drop_exited(self) -> None:
        """Forget the items of areas that are gone."""
        for items in self.exited:
            for page in np.flatnonzero(items.state & KNOWN).tolist():
                self.detach(items, page)
        self.exited.clear()

    def merge(self, work: list[Work]) -> None:
        """Scan these pages. What is like no other page is settled in bulk, the rest in order."""
        if not work:
            return
        settled = [self.settle(*each) for each in work]
        recurring, groups = self.recurring(
            np.concatenate([digests[candidates] for _, candidates, digests in settled]),
            np.concatenate([digests[candidates & slow] for slow, candidates, digests in settled]),
        )
        start = 0
        once: list[tuple[Any, Numbers, Frames]] = []
        for (area, items, pages, frames), (slow, candidates, digests) in zip(
            work, settled, strict=True
        ):
            again = np.zeros(len(pages), dtype=np.bool_)
            stop = start + int(np.count_nonzero(candidates))
            again[candidates] = recurring[start:stop]
            start = stop
            alone = candidates & ~again & ~slow
            items.state[pages[alone]] |= UNSTABLE
            self.unshared += int(np.count_nonzero(alone))
            once.append((area, pages[alone], digests[alone]))
            some = np.flatnonzero(slow | again)
            for special, page, frame, digest in zip(
                *(array[some].tolist() for array in (slow, pages, frames, digests)), strict=True
            ):
                if special:
                    self.visit(area, items, page, digest)
                elif digest in groups:
                    self.gather(groups, (area, items, page, frame, NO_NODE), digest)
                else:
                    self.look_up(area, items, page, frame, digest)
        if self.cursor is not None:
            self.batches += [part for part in once if len(part[1])]

    def settle(
        self, area: Any, items: Items, pages: Numbers, frames: Numbers
    ) -> tuple[Flags, Flags, Frames]:
        """Do what needs no other page: drop items of absent pages, age pages, hash the others.

        Returns which pages must be visited one by one, in order; which may be like another page
        (these, and those whose checksum is the same as before); and the hashes.
        """
        present = frames >= 0
        shared = self.owned(frames)
        known = items.state[pages] & KNOWN != 0
        # What leaves a node, or has a frame that may be merged under another name meanwhile,
        # depends on the pages before it.
        several = present & (self.host.mapped[frames] > 1) & (shared == NO_NODE)
        slow = (items.node[pages] != shared) & (known | present) | several
        plain = ~slow & present & (shared == NO_NODE)
        gone = pages[~slow & ~present & known]
        if len(gone):
            self.leave_unstable(items, gone)
            for array in (items.state, items.age, items.skips):
                array[gone] = 0
        items.state[pages[plain]] |= KNOWN
        if self.smart_scan:
            plain &= ~self.leave_out(items, pages, plain)
        self.leave_unstable(items, pages[plain])
        candidates = slow & present & (shared == NO_NODE)
        digests = np.zeros(len(pages), dtype=np.uint64)
        digests[plain | candidates] = self.digests(frames[plain | candidates])
        candidates[plain] = self.store_checksums(items, pages[plain], digests[plain])
        return slow, candidates, digests

    def owned(self, frames: Numbers) -> npt.NDArray[np.int32]:
        """The node of each frame, `NO_NODE` where it has none."""
        nodes: npt.NDArray[np.int32] = np.where(frames >= 0, self.node_at[frames], NO_NODE)
        return nodes

    def digests(self, frames: Numbers) -> Frames:
        """The hashes of frames' contents."""
        return hashed(self.host.contents, frames) & np.uint64(self.hash_mask)

    def leave_unstable(self, items: Items, pages: Numbers) -> None:
        """These pages are not in the unstable tree any more."""
        state = items.state[pages]
        self.unshared -= int(np.count_nonzero(state & UNSTABLE))
        items.state[pages] = state & ~np.uint8(UNSTABLE)

    def leave_out(self, items: Items, pages: Numbers, candidates: Flags) -> Flags:
        """Smart scan: count the ages up, and leave out what did not merge for many scans."""
        age, skips = items.age[pages].astype(np.int64), items.skips[pages]
        old = candidates & (age >= FIRST_SKIPPED_AGE)
        out = old & (skips > 0)
        renewed = old & (skips == 0)
        skips[out] -= 1
        skips[renewed] = np.array([1, 2, 4, 8])[np.digitize(age[renewed], [4, 6, 9])]
        items.skips[pages] = skips
        items.age[pages[candidates]] = np.minimum(age[candidates] + 1, OLDEST)
        self.leave_unstable(items, pages[out])
        self.skipped += int(np.count_nonzero(out))
        return out

    def store_checksums(self, items: Items, pages: Any, digests: Any) -> Any:
        """Store the checksums of pages, or of one; which of them were the same as before."""
        sums = digests.astype(np.uint32)
        same = (items.state[pages] & SUMMED != 0) & (items.checksum[pages] == sums)
        items.checksum[pages] = sums
        items.state[pages] |= SUMMED
        return same

    # One page, in order

    def visit(self, area: Any, items: Items, page: int, digest: int) -> None:
        """Scan one page from the beginning, by what it maps now: contents stay what they are during
        a scan, and so does the hash, if it is of a page that is not shared.
        """
        frame = self.host.frame_at(area, page)
        if frame < 0:
            self.detach(items, page)
            items.state[page] = items.age[page] = items.skips[page] = 0
            return
        items.state[page] |= KNOWN
        if self.smart_scan and not self.shares(frame):
            one = np.array([page])
            if self.leave_out(items, one, np.ones(1, dtype=np.bool_))[0]:
                self.detach(items, page)
                return
        self.compare_and_merge(area, items, page, frame, digest)

    def compare_and_merge(
        self, area: Any, items: Items, page: int, frame: int, digest: int
    ) -> None:
        """What a scan does with one page: a shared frame counts, a changed page waits."""
        number = int(self.node_at[frame])
        if number != NO_NODE:
            if int(items.node[page]) != number:
                self.detach(items, page)
                self.attach(items, page, number)
            return
        self.detach(items, page)
        if self.store_checksums(items, page, np.uint64(digest)):
            self.look_up(area, items, page, frame, digest)

    def look_up(self, area: Any, items: Items, page: int, frame: int, digest: int) -> None:
        """Let a page that did not change join a frame of its content, or another page its own."""
        # A FRAME THAT BECAME SHARED JUST NOW
        if self.shares(frame):
            self.compare_and_merge(area, items, page, frame, digest)
            return

        # THE ZERO PAGE
        pinned = self.host.is_pinned(area, page)
        if self.use_zero_pages and not self.host.contents[frame].any():
            if not pinned:
                self.host.protect(area, page)
                self.host.map_zero(area, page)
            return

        # THE STABLE TREE
        chain = self.chain_of(digest, frame)
        number = self.open_node(chain)
        if number != NO_NODE:
            theirs = self.nodes[number].frame
            if may_merge(self.equal(frame, theirs), pinned):
                self.join(area, items, page, number)
            return

        # THE UNSTABLE TREE
        found = self.unstable_page(digest, frame)
        if found is None:
            self.wait(area, items, page, digest)
            return
        other, at = found
        theirs = self.host.frame_at(other, at)
        either = pinned | self.host.is_pinned(other, at)
        if theirs == frame or not may_merge(self.equal(frame, theirs), either):
            return
        self.detach(self.items[other], at)
        self.pair((area, items, page, frame), (other, self.items[other], at), digest, chain)

    def gather(self, groups: dict[int, Waiting | None], mine: Waiting, digest: int) -> None:
        """What `look_up` comes to for a page whose hash only pages of this scan have, none of them
        met in a special way: what their group knows is enough.
        """
        group = groups[digest]
        if group is None:
            groups[digest] = mine
            return
        area, items, page, frame, _ = mine
        other, other_items, at, theirs, number = group
        pinned = self.host.is_pinned(area, page)
        if number == NO_NODE:
            pinned = pinned | self.host.is_pinned(other, at)
        if not may_merge(self.equal(frame, theirs), pinned):
            # A hash of two contents, or a device's page: from now on by the trees.
            del groups[digest]
            if number == NO_NODE:
                self.wait(other, other_items, at, digest)
            self.look_up(area, items, page, frame, digest)
        elif number == NO_NODE:
            number = self.pair((area, items, page, frame), (other, other_items, at), digest, [])
            groups[digest] = area, items, page, frame, number
        else:
            self.join(area, items, page, number)

    def wait(self, area: Any, items: Items, page: int, digest: int) -> None:
        """Put a page into the unstable tree."""
        items.state[page] |= UNSTABLE
        self.unshared += 1
        self.unstable.setdefault(digest, []).append((area, page))

    def join(self, area: Any, items: Items, page: int, number: int) -> None:
        """Let a page use a shared frame of its content in place of its own."""
        self.host.protect(area, page)
        self.host.share(area, page, self.nodes[number].frame)
        self.attach(items, page, number)

    def pair(
        self,
        mine: tuple[Any, Items, int, int],
        theirs: tuple[Any, Items, int],
        digest: int,
        chain: list[int],
    ) -> int:
        """Make the frame of the page that is scanned now a shared one, of the chain of its content:
        the other page, scanned before, uses it too. Returns its node.
        """
        (area, items, page, frame), (other, other_items, at) = mine, theirs
        self.host.protect(area, page)
        self.host.protect(other, at)
        number = self.new_node(frame, digest, chain)
        self.host.share(other, at, frame)
        self.attach(other_items, at, number)
        self.attach(items, page, number)
        return number

    def equal(self, frame: int, other: int) -> Flag:
        """1 if two frames have the same content, word for word."""
        return flag(bool(_same()(self.host.contents, frame, other)))

    # The trees

    def chain_of(self, digest: int, frame: int) -> list[int]:
        """The shared frames of this very content, head first; none if there are none."""
        for chain in self.stable.get(digest, ()):
            if self.equal(self.nodes[chain[0]].frame, frame):
                return chain
        return []

    def open_node(self, chain: list[int]) -> int:
        """The fullest shared frame of a chain that has room, moved to its head; or `NO_NODE`."""
        nodes, limit = self.nodes, self.max_page_sharing
        room = [number for number in chain if 0 < nodes[number].items < limit]
        if not room:
            return NO_NODE
        fullest = max(room, key=lambda number: nodes[number].items)
        if nodes[chain[0]].chained:
            if len(chain) == 1:
                nodes[fullest].chained = False
            elif chain[0] != fullest and nodes[fullest].items + 1 < limit:
                chain.remove(fullest)
                chain.insert(0, fullest)
        return fullest

    def unstable_page(self, digest: int, frame: int) -> tuple[Any, int] | None:
        """A page of this very content that this scan met before, and that still has it."""
        for area, page in (*self.unstable.get(digest, ()), *self.met(digest)):
            items = self.items.get(area)
            if items is not None and items.state[page] & UNSTABLE:
                theirs = self.host.frame_at(area, page)
                if theirs >= 0 and self.equal(theirs, frame):
                    return area, page
        return None

    def met(self, digest: int) -> list[tuple[Any, int]]:
        """The pages of this hash that earlier parts of the scan met once."""
        return [
            (area, int(page))
            for area, pages, digests in self.batches
            for page in pages[digests == np.uint64(digest)]
        ]

    def recurring(
        self, digests: Frames, special: Frames
    ) -> tuple[Flags, dict[int, Waiting | None]]:
        """Which hashes occur twice here, or may be those of what was met before; and groups, empty
        yet, for those that were not met before, and that pages which are `special` do not have.
        """
        values, stable, unstable = digests.tolist(), self.stable, self.unstable
        counts = Counter(values)
        known = {value for value in counts if value in stable or value in unstable}
        if self.use_zero_pages:
            known.add(self.zero_digest)
        flags = [counts[value] > 1 or value in known for value in values]
        again: Flags = np.array(flags, dtype=np.bool_)
        for _, _, before in self.batches:
            again |= np.isin(digests, before)
        if self.batches:
            return again, {}
        known.update(special.tolist())
        limit = self.max_page_sharing
        groups = {v: None for v, count in counts.items() if 1 < count <= limit and v not in known}
        return again, dict[int, Waiting | None](groups)

    def new_node(self, frame: int, digest: int, chain: list[int]) -> int:
        """Make a frame a shared one, the head of the chain of its content if there is one."""
        node = Node(frame, digest)
        if self.spare_nodes:
            number = self.spare_nodes.pop()
            self.nodes[number] = node
        else:
            number = len(self.nodes)
            self.nodes.append(node)
        if chain:
            node.chained = True
            for other in chain:
                self.nodes[other].chained = True
            chain.insert(0, number)
        else:
            self.stable.setdefault(digest, []).append([number])
        self.node_at[frame] = number
        return number

    def retire(self, number: int) -> None:
        """A node without frame and items may be used again."""
        node = self.nodes[number]
        if node.frame < 0 and node.items == 0 and number not in self.spare_nodes:
            self.spare_nodes.append(number)

    def attach(self, items: Items, page: int, number: int) -> None:
        """Count the page as one that uses this shared frame."""
        node = self.nodes[number]
        if node.items:
            self.sharing += 1
        else:
            self.shared += 1
        node.items += 1
        items.node[page] = number

    def detach(self, items: Items, page: int) -> None:
        """Take the page out of the tree that it is in."""
        number = int(items.node[page])
        if number != NO_NODE:
            node = self.nodes[number]
            node.items -= 1
            if node.items:
                self.sharing -= 1
            else:
                self.shared -= 1
            items.node[page] = NO_NODE
            self.retire(number)
        elif items.state[page] & UNSTABLE:
            items.state[page] &= ~np.uint8(UNSTABLE)
            self.unshared -= 1

    # What can be observed

    def remembered(self) -> object:
        """All that later scans depend on besides the pages themselves."""
        items = [
            [array.tobytes() for array in (i.checksum, i.node, i.state, i.age, i.skips)]
            for i in (*self.items.values(), *self.exited)
        ]
        nodes = [(node.frame, node.items, node.chained) for node in self.nodes]
        return items, nodes, sorted(self.stable.items()), self.spare_nodes

    def counters(self) -> tuple[int, int, int, int, int]:
        """Pages shared, sharing, unshared and volatile, and skipped so far."""
        every = [*self.items.values(), *self.exited]
        known = sum(int(np.count_nonzero(items.state & KNOWN)) for items in every)
        volatile = known - self.shared - self.sharing - self.unshared
        return self.shared, self.sharing, self.unshared, volatile, self.skipped

    def area_counters(self, area: Any) -> tuple[int, int]:
        """Items and merged pages of one area."""
        items = self.items.get(area)
        if items is None:
            return 0, 0
        known = int(np.count_nonzero(items.state & KNOWN))
        return known, int(np.count_nonzero(items.node != NO_NODE))


def hashed(contents: Frames, frames: Numbers) -> Frames:
    """A 64-bit hash of each of these frames, by machine code."""
    out = np.empty(len(frames), dtype=np.uint64)
    if len(frames):
        _hasher()(contents, frames, out)
    return out


@cache
def _hasher() -> Callable[..., None]:
    return _machine_code(_hash_frames)


@cache
def _same() -> Callable[..., bool]:
    return _machine_code(_equal_frames)


def _machine_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled; kept on disk unless it is of a copy that was patched in memory."""
    import numba

    has_a_file = not function.__code__.co_filename.startswith("<")
    compiled: Callable[..., Any] = numba.njit(function, nogil=True, cache=has_a_file)
    return compiled


def _equal_frames(contents: Any, frame: Any, other: Any) -> bool:
    """Whether two frames hold the same words."""
    for at in range(512):  # noqa: SIM110  (numba compiles loops, not generators)
        if contents[frame, at] != contents[other, at]:
            return False
    return True


def _hash_frames(contents: Any, frames: Any, out: Any) -> None:
    """Four lanes of multiply and rotate over the 512 words of a frame, then folded.

    The lanes keep a core's multiplier busy; the order of words counts in each.
    """
    prime, other = np.uint64(0x9E3779B185EBCA87), np.uint64(0xC2B2AE3D27D4EB4F)
    left, right = np.uint64(31), np.uint64(33)
    for i in range(len(frames)):
        row = contents[frames[i]]
        a, b = prime, other
        c, d = prime ^ other, ~prime
        for at in range(0, 512, 4):
            a = (a ^ row[at]) * prime
            b = (b ^ row[at + 1]) * prime
            c = (c ^ row[at + 2]) * prime
            d = (d ^ row[at + 3]) * prime
            a = a << left | a >> right
            b = b << left | b >> right
            c = c << left | c >> right
            d = d << left | d >> right
        h = (a ^ b << left ^ b >> right) * other
        h = (h ^ c ^ c >> right) * other
        h = (h ^ d ^ d >> right) * prime
        out[i] = h ^ h >> left
