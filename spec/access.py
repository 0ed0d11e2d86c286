"""Accesses: to a linear address, and to a guest-physical address."""

from typing import NamedTuple

from vapama.spec.words import Flag, Word


class Access(NamedTuple):
    """One access to a linear address; at most one of `write` and `fetch` is 1, a read has neither.

    `user` is 1 for a user-mode access (made at CPL 3). `implicit` is 1 for an access that the
    processor makes by itself to a system structure (GDT, LDT, IDT, TSS): a supervisor-mode data
    access at any CPL, which RFLAGS.AC does not exempt from SMAP. `shadow_stack` is 1 for a read or
    write of a shadow stack, `user` with it at CPL 3 and for WRUSS at any CPL; there are such
    accesses only with CR4.CET=1, without it the mark does not count. Source: SDM Vol. 3A, 4.6.
    """

    address: Word
    write: Flag = 0
    fetch: Flag = 0
    user: Flag = 0
    implicit: Flag = 0
    shadow_stack: Flag = 0


class GuestPhysicalAccess(NamedTuple):
    """One access to a guest-physical address, as a second stage sees it.

    At most one of `write` and `fetch` is 1, a read has neither. `table` is 1 for an access to an
    entry of the guest's paging structures: a read of it in a walk, or with `write` the update of
    its accessed and dirty flags. `linear` is 1 if a linear address is behind the access, 0 for a
    guest's PDPTEs loaded by MOV to CR (with `table`).

    The others tell what the guest's paging says of the page, which a second stage may consult or
    report: `user` is 1 for a user-mode linear address (U/S is 1 in every entry that translates it;
    CPL does not count), `writable` the AND of R/W, `no_execute` the OR of XD; without paging a page
    is user, writable and executable. `shadow_stack` is 1 for a shadow-stack access.

    Source: SDM Vol. 3C, 31.3.3.2 and table 30-7; APM Vol. 2, 15.25.6.
    """

    address: Word
    write: Flag = 0
    fetch: Flag = 0
    user: Flag = 0
    table: Flag = 0
    linear: Flag = 1
    writable: Flag = 1
    no_execute: Flag = 0
    shadow_stack: Flag = 0
