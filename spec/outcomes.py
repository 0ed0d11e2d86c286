"""Outcomes of one access through paging, with the architecture's own codes.

Where the architecture leaves a choice, an outcome holds the set of what is allowed, as bits that
may be set besides those that must: `may_update` and `open_bits`.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from vapama.spec.words import Word

# Page-fault error code (Intel SDM Vol. 3A, 4.7).
P, W, U, RSVD, I, PK, SS = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6


class Update(NamedTuple):
    """Bits to be set (or'ed) into the 8 bytes of memory at a physical address.

    They hold one 8-byte entry, or two of 4 bytes: flags of the second stand 32 bits further up.
    """

    address: Word
    bits: Word


@dataclass(slots=True)
class Translated:
    """The access goes to physical address `pa`, through a page mapped at `level` (1, 2 or 3; 0 if
    paging is off, and there are no pages).

    `updates` are the accessed and dirty flags it sets, in the order of the walk, one for every
    entry used, whether or not the flags were set before.
    """

    pa: Word
    level: int
    updates: tuple[Update, ...]


@dataclass(slots=True)
class PageFault:
    """#PF with this error code.

    `may_update` are the accessed flags that a processor may have set on the way (any subset);
    `open_bits` are bits of the error code that the manuals leave undecided.
    """

    error_code: Word
    may_update: tuple[Update, ...] = ()
    open_bits: Word = 0


@dataclass(slots=True)
class NonCanonical:
    """The linear address is not canonical: #GP(0), or #SS(0) for a stack access."""


@dataclass(slots=True)
class GeneralProtection:
    """#GP(0): an instruction is refused, and changes nothing."""


@dataclass(slots=True)
class OutsideMemory:
    """The walk needs the entry at this physical address, where the machine has no memory."""

    address: Word
    may_update: tuple[Update, ...] = ()


@dataclass(slots=True)
class EptViolation:
    """VM exit 48: the EPT entries for guest-physical address `gpa` do not allow the access.

    `qualification` is the exit qualification; `open_bits` are those of its bits that the manual
    leaves undefined, or that depend on more than the access. `may_update` is as in `PageFault`.
    """

    qualification: Word
    gpa: Word
    may_update: tuple[Update, ...] = ()
    open_bits: Word = 0


@dataclass(slots=True)
class EptMisconfiguration:
    """VM exit 49: an EPT entry for guest-physical address `gpa` has an unsupported value."""

    gpa: Word
    may_update: tuple[Update, ...] = ()


@dataclass(slots=True)
class NestedPageFault:
    """#VMEXIT(NPF): the nested tables do not allow the access to guest-physical address `gpa`.

    `exitinfo1` is EXITINFO1, `gpa` EXITINFO2; `open_bits` are bits of EXITINFO1 that the manual
    leaves undecided. `may_update` is as in `PageFault`.
    """

    exitinfo1: Word
    gpa: Word
    may_update: tuple[Update, ...] = ()
    open_bits: Word = 0


Outcome: TypeAlias = (
    Translated
    | PageFault
    | NonCanonical
    | OutsideMemory
    | EptViolation
    | EptMisconfiguration
    | NestedPageFault
)


def kind(outcome: Outcome) -> str:
    """The kind of an outcome in words, as reports and non-vacuity checks name it."""
    return _KINDS[type(outcome)]


_KINDS = {
    Translated: "translated",
    PageFault: "page fault",
    NonCanonical: "non-canonical address",
    OutsideMemory: "entry outside memory",
    EptViolation: "EPT violation",
    EptMisconfiguration: "EPT misconfiguration",
    NestedPageFault: "nested page fault",
}
