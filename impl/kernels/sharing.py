"""Frames that pages share, in words: who may write where, and what a page's word becomes.

A page's word says whether it is present, whether its owner may write to it, and its frame. These
are the only functions by which `vapama.impl.processes` and KSM change the rights or the frame of a
page that has content, and they are proved to keep apart what processes see.
"""

from vapama.spec.words import Flag, Word, ite

PRESENT, WRITABLE, HUGE, MIGRATING = 1 << 0, 1 << 1, 1 << 2, 1 << 3
"""Bits of a page's word; a page under migration is not present."""
FRAME_SHIFT = 12


def frame_of(word: Word) -> Word:
    """The number of the frame that a word names."""
    return word >> FRAME_SHIFT & 0xFFFFFFFFFF


def maps(frame: Word, rights: Word) -> Word:
    """A present word of this frame with these rights."""
    return frame << FRAME_SHIFT | rights | PRESENT


def may_write(word: Word) -> Flag:
    """1 if the page is written in place, without a fault."""
    return word & PRESENT & word >> 1


def after_write_fault(word: Word, exclusive: Flag, fresh: Word) -> Word:
    """The word that a write fault leaves: the page's own frame, or a fresh one with a copy.

    `exclusive` is 1 if no other page, KSM or file uses the frame.
    """
    return ite(word & PRESENT & exclusive != 0, word | WRITABLE, maps(fresh, WRITABLE))


def forked_parent(word: Word, pinned: Flag) -> Word:
    """The parent's word after a fork: read-only, unless a device writes to the frame."""
    return ite(pinned != 0, word, word & ~WRITABLE)


def forked_child(word: Word, pinned: Flag, fresh: Word) -> Word:
    """The child's word after a fork: the same frame, read-only, or a copy of a pinned one."""
    return ite(pinned != 0, maps(fresh, WRITABLE), word & ~WRITABLE)


def protected(word: Word) -> Word:
    """The word without write access."""
    return word & ~WRITABLE


def may_merge(equal: Flag, pinned: Flag) -> Flag:
    """1 if two pages of `equal` content may share a frame: no device holds one of theirs."""
    return equal & (pinned ^ 1)


def merged(word: Word) -> Word:
    """The word of a page that now uses the frame which `word` names: never writable."""
    return maps(frame_of(word), 0)


def unshared(fresh: Word) -> Word:
    """The word of a page that gets back a frame of its own, with a copy of the content."""
    return maps(fresh, WRITABLE)
