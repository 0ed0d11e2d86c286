"""A guest's memory as the host has it: the pages of a backing, and the frames they are in.

The backing is the private memory of the process that hosts a guest. A page is in a frame, swapped
out, or was never touched; it may be mapped read-only, because the frame is shared with others (as
same-page merging does). Whoever maps frames elsewhere (a hypervisor's tables) is told, by its
notifier, before a page's frame changes or its right to be written goes: it must have dropped every
mapping when the notifier returns. Source: Linux, Documentation/mm/mmu_notifier.rst.
"""

from collections.abc import Callable

from vapama.impl.hardware import Frames


class Backing:
    """The pages of one guest's backing."""

    __slots__ = ("break_sharing", "copies", "frame", "frames", "notify", "readonly")

    def __init__(self, frames: Frames) -> None:
        self.frames = frames
        self.frame: dict[int, int] = {}
        """The frame that a page is in."""
        self.readonly: set[int] = set()
        """Pages that must not be written in their frame: it is shared."""
        self.copies: dict[int, dict[int, int]] = {}
        """Words of pages as they were swapped out; true still while the page was not written."""
        self.notify: list[Callable[[int], None]] = []
        """Told the page, before what it is mapped to is revoked."""
        self.break_sharing: Callable[[Backing, int], None] | None = None
        """Gives a page of `readonly` a frame of its own, whose notifiers it has called."""

    def fault(self, page: int, write: bool) -> tuple[int, bool]:
        """The frame of a page, which is made present, and whether it may be written."""
        frame = self.frame.get(page)
        if frame is None:
            frame = self.frames.take()
            self.frame[page] = frame
            ram, base = self.frames.ram, frame << 9
            for index, word in self.copies.get(page, {}).items():
                ram[base | index] = word
        elif write and page in self.readonly:
            self.unshare(page)
            frame = self.frame[page]
        return frame, page not in self.readonly

    def unshare(self, page: int) -> None:
        """Give a shared page a frame of its own, with the same words (copy on write)."""
        if self.break_sharing is not None:
            self.break_sharing(self, page)
        else:
            self.move(page, keep=True)
        self.readonly.discard(page)

    def written(self, page: int) -> None:
        """The page was written: the copy of it, if there is one, is out of date."""
        self.copies.pop(page, None)

    def revoke(self, page: int) -> None:
        """Have every mapping of the page dropped."""
        for told in self.notify:
            told(page)

    def swap_out(self, page: int) -> bool:
        """Free the page's frame and keep its words aside; False if it has no frame of its own.

        A page that was not written since it was swapped in needs no new copy.
        """
        frame = self.frame.get(page)
        if frame is None or page in self.readonly:
            return False
        self.revoke(page)
        if page not in self.copies:
            self.copies[page] = self.frames.ram.page(frame)
        del self.frame[page]
        self.frames.give(frame)
        return True

    def move(self, page: int, keep: bool = False) -> bool:
        """Put the page into another frame. The old one is freed, unless others `keep` it."""
        frame = self.frame.get(page)
        if frame is None or (page in self.readonly and not keep):
            return False
        target = self.frames.take()
        self.revoke(page)
        self.frames.ram.copy_page(frame, target)
        self.frame[page] = target
        if not keep:
            self.frames.give(frame)
        return True
