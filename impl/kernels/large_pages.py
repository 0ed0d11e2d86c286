"""Large pages in words: where one may be mapped, and what it is split into.

Levels are those of the walk: 1 maps 4 KBytes, 2 maps 2 MBytes, 3 maps 1 GByte. Addresses are in
bytes. Nothing here is shared with `vapama.spec.hugepages`, against which it is proved.
"""

from vapama.spec.words import Flag, Word, flag, ite

FRAME = 0x000FFFFFFFFFF000
PAGE_SIZE_BIT = 1 << 7
PAT_LARGE = 1 << 12
EXECUTABLE_HUGE_LEVEL = 1


def offset_mask(level: Word) -> Word:
    """The bits of an address below a page of this level."""
    return (1 << (9 * level + 3)) - 1


def slot_allows(base: Word, size: Word, hva: Word, gpa: Word, level: Word) -> Flag:
    """1 if a slot of `size` bytes at guest-physical `base`, backed from host-virtual `hva`, may
    map the page of this level around `gpa` at once.

    The two addresses differ by a multiple of the page's size, and the page is not one that a ragged
    edge of the slot cuts.
    """
    mask = offset_mask(level)
    congruent = flag((base ^ hva) & mask == 0)
    first = gpa & ~mask
    return congruent & flag(first >= base) & flag(first + mask < base + size)


def largest_level(base: Word, size: Word, hva: Word, gpa: Word, host: Word, guest: Word) -> Word:
    """The largest level at which `gpa` may be mapped, given the host's and the guest's page."""
    most = ite(guest < host, guest, host)
    two = flag(most >= 2) & slot_allows(base, size, hva, gpa, 2)
    three = flag(most >= 3) & slot_allows(base, size, hva, gpa, 3)
    return 1 + (two | three) + three


def untracked_level(gfn: Word, tracked: Word) -> Word:
    """The largest level whose page around a guest frame does not hold the frame `tracked`."""
    apart = gfn ^ tracked
    return 1 + flag(apart >> 9 != 0) + flag(apart >> 18 != 0)


def restricted(level: Word, untracked: Word, write: Flag, execute: Flag, multihit: Flag) -> Word:
    """The level left when pages larger than of level `untracked` hold one that is write-tracked,
    or code must not be huge.

    `multihit` is 1 with the iTLB-multihit mitigation: then no executable page is large.
    """
    left = ite(flag(untracked < level) & write != 0, untracked, level)
    return ite(execute & multihit != 0, EXECUTABLE_HUGE_LEVEL, left)


def split_child(entry: Word, level: Word, index: Word) -> Word:
    """The index-th of 512 entries that together map what a large `entry` of `level` mapped.

    One level down a page is large still, or it is a PTE, whose PAT bit is bit 7.
    """
    size = 1 << (9 * level + 3)
    attributes = entry & ~(FRAME | PAGE_SIZE_BIT)
    frame = entry & FRAME & ~(size - 1)
    pat = entry & PAT_LARGE
    shape = ite(level == 2, pat >> 5, PAGE_SIZE_BIT | pat)
    return attributes | frame | index << (9 * level - 6) | shape


def half_of_4m(entry: Word, address: Word) -> Word:
    """The frame of the 2-MByte half of a 4-MByte page (a PDE of 32-bit paging) at `address`.

    Bits 20:13 of the PDE are bits 39:32 of the frame (PSE-36).
    """
    return entry & 0xFFC00000 | (entry >> 13 & 0xFF) << 32 | address & 0x200000


def joins(entry: Word, first: Word, index: Word, level: Word) -> Flag:
    """1 if a small entry may be the index-th of a block that becomes one page of `level`.

    It continues the frames of the first, which are aligned, with the same rights and attributes;
    the accessed and dirty bits need not be the same.
    """
    size = 1 << (9 * level + 3)
    frame = FRAME & ~ite(level == 3, PAT_LARGE, 0)
    accessed_dirty = 0x60
    same = flag((entry ^ first) & ~(frame | accessed_dirty) == 0)
    aligned = flag(first & frame & (size - 1) == 0)
    follows = flag(entry & frame == (first & frame) + (index << (9 * level - 6)))
    return same & aligned & follows & entry & 1


def joined(first: Word, level: Word) -> Word:
    """The large entry of `level` in place of 512 that start with `first`."""
    size = 1 << (9 * level + 3)
    attributes = first & ~(FRAME | PAGE_SIZE_BIT)
    pat = ite(level == 2, (first & PAGE_SIZE_BIT) << 5, first & PAT_LARGE)
    return attributes | first & FRAME & ~(size - 1) | PAGE_SIZE_BIT | pat
