"""An access to a linear address: what is done, and by whom."""

from typing import NamedTuple

from vapama.spec.words import Flag, Word


class Access(NamedTuple):
    """One access to a linear address; at most one of `write` and `fetch` is 1, a read has neither.

    `user` is 1 for a user-mode access (made at CPL 3). `implicit` is 1 for an access that the
    processor makes by itself to a system structure (GDT, LDT, IDT, TSS): a supervisor-mode data
    access at any CPL, which RFLAGS.AC does not exempt from SMAP. Source: SDM Vol. 3A, 4.6.
    """

    address: Word
    write: Flag = 0
    fetch: Flag = 0
    user: Flag = 0
    implicit: Flag = 0
