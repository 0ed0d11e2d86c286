"""Physical memory, as a page walk sees it: 8-byte entries below a limit, and nothing beyond.

What a processor reads where a machine has no memory is not architectural (all ones, all zeros, a
machine check), so a walk that would need such an entry ends there: see `outcomes.OutsideMemory`.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol, SupportsInt

from vapama.spec.words import Word, ite

ENTRY_BYTES = 8
PAGE_BYTES = 4096


class Memory(Protocol):
    """Physical memory of `limit` bytes; `limit` is a multiple of 8."""

    @property
    def limit(self) -> Word:
        """The first address beyond memory, in bytes."""

    def load(self, address: Word) -> Word:
        """The 8 bytes at `address` (8-byte aligned, below the limit), little-endian, as a word."""


class Entries(Protocol):
    """A sequence of entries, as far as memory needs it."""

    def __len__(self) -> int:
        """How many entries there are."""

    def __getitem__(self, index: int, /) -> SupportsInt:
        """The entry with this index."""


class Image:
    """Memory held in a sequence of 64-bit entries: a list, a numpy array or a memory map."""

    def __init__(self, entries: Entries) -> None:
        self.entries = entries
        self.limit: Word = len(entries) * ENTRY_BYTES

    def load(self, address: Word) -> Word:
        """The entry at `address`, as a plain int."""
        return int(self.entries[address >> 3])


class Sparse:
    """Memory of which only some entries are given, by address; the others read 0."""

    def __init__(self, entries: Mapping[int, int], limit: Word) -> None:
        self.touched = dict(entries)
        self.limit = limit

    def load(self, address: Word) -> Word:
        """The entry at `address`, 0 if it was not given."""
        return self.touched.get(address, 0)


class Marked:
    """Another memory with bits or'ed into some entries, as accessed and dirty flags are."""

    def __init__(self, memory: Memory, updates: Iterable[tuple[Word, Word]]) -> None:
        self.memory, self.updates = memory, tuple(updates)
        self.limit: Word = memory.limit

    def load(self, address: Word) -> Word:
        """The memory's own entry with the bits set that its updates name."""
        bits = 0
        for where, more in self.updates:
            bits = bits | ite(address == where, more, 0)
        return self.memory.load(address) | bits


class Altered:
    """Another memory with `bits` toggled in every entry, or just in the one `at` an address."""

    def __init__(self, memory: Memory, bits: Word, at: Word | None = None) -> None:
        self.memory, self.bits, self.at = memory, bits, at
        self.limit: Word = memory.limit

    def load(self, address: Word) -> Word:
        """The memory's own entry with the bits toggled."""
        bits = self.bits if self.at is None else ite(address == self.at, self.bits, 0)
        return self.memory.load(address) ^ bits


class Watched:
    """Another memory that keeps the address of every load, in order."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.limit: Word = memory.limit
        self.loads: list[Word] = []

    def load(self, address: Word) -> Word:
        """The memory's own entry."""
        self.loads.append(address)
        return self.memory.load(address)


class Counted:
    """Another memory that counts its loads."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.limit: Word = memory.limit
        self.count: Word = 0

    def load(self, address: Word) -> Word:
        """The memory's own entry."""
        self.count = self.count + 1
        return self.memory.load(address)
