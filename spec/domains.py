"""Domains: the values that a draw may take, in the forms that the engines need.

Each domain knows all of its values (proofs draw any of them), how to decode one from raw bytes with
a bias towards interesting ones (fuzzing), how to encode one back (seeds from recorded cases), and a
few representatives (exhaustive small scopes).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from vapama.spec.cpu import (
    AC,
    CET,
    CR0_DEFINED,
    CR4_DEFINED,
    CR4_UNSPECIFIED,
    EFER_DEFINED,
    EFER_UNSPECIFIED,
    LA57,
    LAM_SUP,
    LAM_U48,
    LAM_U57,
    LMA,
    LME,
    NW,
    NXE,
    PAE,
    PCIDE,
    PE,
    PG,
    PKE,
    PKS,
    PSE,
    RFLAGS_DEFINED,
    RFLAGS_ONE,
    SMAP,
    SMEP,
    VM,
    WP,
)
from vapama.spec.stage import EPT_CAPABILITIES, HOST_CR4_DEFINED, HOST_EFER_DEFINED
from vapama.spec.words import WORD, Word, low_bits

ESCAPE = 0xFF
"""The low byte of a raw word that makes a biased domain take its value as it is from the next."""
Take = Callable[[], Word]
"""Gives the next raw word, any 64 bits, of what a value is decoded from."""


@dataclass(frozen=True)
class Domain:
    """The words ``fixed | x & free`` for every x, or just those of `among`.

    `bias` decodes a value from a raw word whose low byte is not `ESCAPE`. `scope` are
    representatives, the most telling first; without them `among` or the corners stand.
    """

    free: Word = WORD
    fixed: Word = 0
    among: tuple[Word, ...] = ()
    bias: Callable[[int], Word] | None = None
    scope: tuple[Word, ...] = ()
    decode: Callable[[Take], Word] = field(init=False, repr=False, compare=False)
    """A value, from one raw word, or from two after an `ESCAPE`."""

    def __post_init__(self) -> None:
        # A closure of its own for each domain: decoding is what random runs spend most time on.
        object.__setattr__(self, "decode", _decoder(self))

    def holds(self, value: Word) -> bool:
        """Whether `value` is in the domain."""
        if self.among:
            return value in self.among
        return value & ~self.free == self.fixed & ~self.free and value & self.fixed == self.fixed

    def encode(self, value: Word) -> tuple[Word, ...]:
        """Raw words that decode to `value`, a value of the domain."""
        if self.among:
            return (self.among.index(value),)
        return (ESCAPE, value) if self.bias is not None else (value,)

    def representatives(self, width: int | None = None) -> tuple[Word, ...]:
        """A few values for an exhaustive scope; of a long `scope`, the first `width`."""
        corners = tuple(sorted({self.fixed, self.fixed | self.free}))
        return self.scope[:width] or self.among or corners


def narrowed(domain: Domain, by: Domain | None) -> Domain:
    """The values of `domain` that a subject can take, which says by another domain what it can take
    of a draw of this name: in other paging modes the same register is of another domain.
    """
    if by is None or by is domain:
        return domain
    if domain.among or by.among:
        values = tuple(v for v in by.among or domain.among if domain.holds(v) and by.holds(v))
        scope = tuple(v for v in by.scope if v in values)
        return Domain(among=values, scope=scope) if values else domain
    free = domain.free & (by.free | by.fixed)
    fixed, bias = domain.fixed, by.bias
    return Domain(
        free=free,
        fixed=fixed,
        bias=(lambda raw: bias(raw) & free | fixed) if bias is not None else None,
        scope=tuple(dict.fromkeys(value & free | fixed for value in domain.scope)),
    )


def _decoder(domain: Domain) -> Callable[[Take], Word]:
    free, fixed, among, bias = domain.free, domain.fixed, domain.among, domain.bias
    if among:
        count = len(among)
        return lambda take: among[take() % count]
    if bias is None:
        return lambda take: fixed | take() & free

    def biased(take: Take) -> Word:
        raw = take()
        return bias(raw) if raw & 0xFF != ESCAPE else fixed | take() & free

    return biased


FRAMES = 16
"""Biased memories hold this many frames, so that tables alias and reference themselves."""


def entry_of(raw: int) -> Word:
    """A paging-structure entry: mostly present and permissive, in a small pool of frames.

    Raw bits: 7:0 what kind, 19:8 low bits of the entry, 23:20 frame, 35:24 high bits of the entry,
    63:36 bits of an odd frame.
    """
    how = raw & 0xFF
    if how < 6:
        return 0 if how < 3 else raw & ~1
    entry = raw >> 8 & 0xFF7E | 1 | raw << 28 & 0x7FF << 52
    if how & 3:
        entry |= 6
    if how & 0x1C == 0x08:
        entry |= 0x80
        entry ^= (raw >> 20 & 0xF) << 12
        entry |= (raw >> 36 & 1) << 12 | (raw >> 20 & 0xF) << (21 if how & 0x20 else 30)
        if raw >> 60 == 0xF:
            entry |= 1 << 13 + (raw >> 37) % 17
    if how & 0xF0 == 0x30:
        entry |= 1 << 63
    if raw >> 59 == 1:
        entry |= 1 << (raw >> 37) % 40 + 12
    return entry


def shadow_entry_of(raw: int) -> Word:
    """An entry as above, more often read-only and dirty: that of a shadow-stack page."""
    entry = entry_of(raw)
    return entry & ~2 | 0x40 if raw & 0xE0 == 0xC0 else entry


def pae_entry_of(raw: int) -> Word:
    """An entry of PAE paging: as often one that is valid in a PDPT as one for the levels below."""
    if raw >> 56 & 1:
        entry = (raw >> 20 & 0xF) << 12 | (raw >> 24 & 0xF) << 9 | (1 if raw & 0xFF > 2 else 0)
        return entry ^ (0 if raw >> 57 & 7 else 1 << (raw >> 37) % 64)
    return entry_of(raw) & ~(0x7FF << 52 if raw >> 57 & 3 else 0)


def pair_of(raw: int) -> Word:
    """Two 4-byte entries of 32-bit paging."""
    return half_of(raw & 0xFFFF_FFFF) | half_of(raw >> 32) << 32


def half_of(raw: int) -> Word:
    """A 4-byte entry: mostly present and permissive, in the pool of frames.

    Raw bits: 7:0 what kind, 19:8 low bits of the entry, 23:20 frame, 31:24 bits of an odd frame.
    """
    how = raw & 0xFF
    if how < 6:
        return 0 if how < 3 else raw & ~1
    entry = (raw >> 8 & 0xF7E) | 1
    if how & 3:
        entry |= 6
    if how & 0x1C == 0x08:
        above_4g = (raw >> 24 & 0xFF) << 13 if how & 0x40 else 0
        return entry | 0x80 | (raw >> 20 & 0xF) << 22 | above_4g | (raw >> 31 & how >> 5 & 1) << 21
    odd = 1 << 16 + (raw >> 24 & 0xF) if raw >> 28 == 1 else 0
    return entry | (raw >> 20 & 0xF) << 12 | odd


def ept_entry_of(raw: int) -> Word:
    """An EPT entry: mostly present and permissive, in a small pool of frames.

    Raw bits: 7:0 what kind, 11:8 rights, 19:12 memory type, ignore PAT and bits 11:8 of the entry,
    23:20 frame, 35:24 high bits of the entry.
    """
    how = raw & 0xFF
    if how < 6:
        return 0 if how < 3 else raw & ~0x407
    entry = raw >> 8 & 0xFF00 | raw << 28 & 0xFFF << 52
    entry |= (7, 7, 7, 7, 5, 3, 1, raw >> 8 & 7)[how & 7]
    if how & 0x38 == 0x08:
        entry ^= (raw >> 20 & 0xF) << 12
        small = how & 0x40
        entry |= 0x80 | (raw >> 20 & 0xF) << (21 if small else 30)
        if raw >> 62 == 3:
            entry |= 1 << 12 + (raw >> 37) % (9 if small else 18)
    if how & 0x30 == 0 or how & 0x78 == 0x10:
        entry |= (0x30, 0x70, 0x30, raw >> 12 & 0x78)[raw >> 10 & 3]
    if raw >> 59 == 1:
        entry |= 1 << (raw >> 37) % 40 + 12
    return entry


def _gpa(raw: int) -> Word:
    """A guest-physical address: mostly of 48 bits, some of 32 or 52, some with equal indices."""
    how = raw & 0xFF
    if how & 3 == 1:
        return (raw >> 20 & 0x1FF) * 0x80_4020_1000 & low_bits(48) | raw >> 52
    return raw >> 8 & low_bits((32, 48, 32, 48, 48, 48, 52, 39)[how >> 5])


def _address(raw: int) -> Word:
    """A linear address: mostly canonical with 48 bits, some with 57, some with equal indices."""
    how = raw & 0xFF
    address = raw >> 7
    if how & 3 == 1:
        address = address & 0x1FF000 | (address >> 12 & 0x1FF) * 0x8040200000 | raw >> 52
    width = 57 if how & 0x1C == 4 else 48
    if how & 0xF8 == 0xF0:
        return raw ^ raw << 20 & WORD
    address &= (1 << width) - 1
    return address | (WORD ^ (1 << width) - 1 if address >> width - 1 else 0)


def _limit(raw: int) -> Word:
    """The size of a memory: all of the pool of frames, or one that cuts it short."""
    return (FRAMES if raw & 7 else raw >> 8 & 0xF) * 4096


def _cr3(raw: int) -> Word:
    return (raw >> 8 & 0xF) << 12 | raw >> 16 & 0xFFF


def _masked_cr3(raw: int) -> Word:
    return _cr3(raw) | (raw >> 32 & raw >> 34 & 3) << 61


def _tagged_address(raw: int) -> Word:
    """A linear address with something in the bits that may be masked."""
    address = _address(raw >> 8 | (raw & 0xFF) << 56)
    tag = (raw >> 48 & 0x7FFF) << 48
    return address & ~(0x7FFF << 48) | tag if raw & 0xC0 == 0x40 else address


def _pdpte(raw: int) -> Word:
    """A PDPTE register: mostly present, in the pool of frames."""
    entry = (raw >> 8 & 0xE18) | (raw >> 20 & 0xF) << 12
    if raw & 0xF == 0:
        return raw & ~1
    return entry | 1 | (1 << 16 + (raw >> 36) % 36 if raw & 0xF0 == 0x50 else 0)


def _keys(raw: int) -> Word:
    """Rights of the 16 keys, most of them not disabled."""
    return (raw >> 8 | raw >> 16) & raw >> 32 & 0xFFFFFFFF


ANY = Domain()
FLAG = Domain(free=1, scope=(0, 1))
ENTRY = Domain(
    bias=entry_of,
    scope=(
        0x1007 | 2 << 59,  # writable, user, key 2; a table that references itself
        0,
        0x5001 | 1 << 63,  # read-only, supervisor, no-execute; outside a small memory
        0x1087,  # a large page, or a reserved bit where there is none
        0x2003,  # writable, supervisor
        0x2005 | 1 << 59,  # read-only, user, key 1
        0x2007 | 1 << 51,  # a reserved bit
        0x3087,  # a reserved bit of a large page
    ),
)
"""A paging-structure entry: any 64 bits."""
SHADOW_ENTRY = Domain(
    bias=shadow_entry_of,
    scope=(
        0x1007 | 2 << 59,
        0x2045 | 2 << 59,  # read-only and dirty, user
        0,
        0x2041,  # the same, supervisor
        0x5001 | 1 << 63,
        0x1087,
    ),
)
"""A paging-structure entry, where there are shadow stacks: any 64 bits."""
PAE_ENTRY = Domain(bias=pae_entry_of, scope=(0x1001, 0x5007, 0, 0x0087, 0x2087, 0x1007, 0x2003))
"""An entry of PAE paging: any 64 bits."""
PAIR = Domain(
    bias=pair_of,
    scope=(
        0x1007_0000_1007,
        0x2003_0000_2087,  # a large page above 4 GBytes
        0,
        0x5001_0000_5001,
        0x0020_0087_0020_0087,  # a reserved bit of a large page
        0x1003_0000_2045,  # read-only and dirty
    ),
)
"""Two 4-byte entries of 32-bit paging: any 64 bits."""
EPT_ENTRY = Domain(
    bias=ept_entry_of,
    scope=(
        0x1407,  # all rights; a table that references itself, or an UC page
        0,
        0x5405,  # read and fetch; outside a small memory
        0x4B7,  # a large page, WB; a reserved bit where there is none
        0x203E,  # write and execute without read, and a memory type that there is not
        0x2003,  # read and write
        0x2004,  # execute-only
        0x10B7,  # a misaligned large page
        0x2400,  # a user's fetch alone, if anything
        0x203F,  # a memory type that there is not
    ),
)
"""An EPT entry: any 64 bits."""
GPA = Domain(free=(1 << 52) - 1, bias=_gpa, scope=(0x4040_3ABC, 1 << 48 | 0x1234, 0x1234))
"""A guest-physical address: any 52 bits."""
ADDRESS = Domain(bias=_address, scope=(0x1234, 0xFFFF_FF80_0020_0ABC, 1 << 47))
"""A linear address: any 64 bits."""
TAGGED_ADDRESS = Domain(
    bias=_tagged_address,
    scope=(0x1234, 0x7ABC_0000_0020_0ABC, 0x8ABC_FF80_0020_0ABC, 0x00FF_8000_0000_1234),
)
"""A linear address, with metadata more often than not: any 64 bits."""
LIMIT = Domain(free=((1 << 52) - 1) & ~0xFFF, bias=_limit, scope=(0x3000,))
"""How many bytes of memory there are: whole pages, less than 2**52."""

# Control registers: every bit that can be 0 or 1 in long mode, so that a claim over these domains
# says too that the bits which do not concern a walk change nothing. (NW needs CD, and stays 0.)
CR0 = Domain(
    free=CR0_DEFINED & ~(PG | PE | NW),
    fixed=PG | PE,
    scope=(PG | PE, PG | PE | WP),
)
CR3 = Domain(free=(1 << 52) - 1, bias=_cr3, scope=(0x1000,))
"""CR3, of which bits from MAXPHYADDR up are then cut off."""
CR4 = Domain(
    free=CR4_DEFINED & ~CR4_UNSPECIFIED & ~(PAE | CET | LAM_SUP),
    fixed=PAE,
    scope=(
        PAE | SMEP | SMAP | PKE | PKS,
        PAE | LA57 | SMEP | SMAP | PKE | PKS,
        PAE,
    ),
)
EFER = Domain(
    free=EFER_DEFINED & ~EFER_UNSPECIFIED & ~(LME | LMA),
    fixed=LME | LMA,
    scope=(LME | LMA | NXE,),
)
RFLAGS = Domain(
    free=RFLAGS_DEFINED & ~(RFLAGS_ONE | VM),
    fixed=RFLAGS_ONE,
    scope=(RFLAGS_ONE, RFLAGS_ONE | AC),
)
KEYS = Domain(free=(1 << 32) - 1, bias=_keys, scope=(0b101100,))
"""PKRU and IA32_PKRS: two bits a key. In the scope, key 1 is disabled and key 2 read-only."""
PAGE1GB = Domain(free=1, scope=(1,))
MAXPHYADDR = Domain(among=tuple(range(32, 53)), scope=(40,))

# Outside long mode, and with the features that long mode is drawn without. What a state needs of
# several registers at once (CR4.CET needs CR0.WP) is seen to by `nondet.ControlStates`.
MASKED_CR3 = Domain(
    free=(1 << 52) - 1 | LAM_U57 | LAM_U48,
    bias=_masked_cr3,
    scope=(0x1000, 0x1000 | LAM_U57, 0x1000 | LAM_U48),
)
MASKING_CR4 = Domain(
    free=CR4.free | CET | LAM_SUP,
    fixed=PAE,
    scope=(PAE | SMAP | CET | LAM_SUP, PAE | LA57 | PKE | PKS | CET, PAE),
)
LEGACY_CR3 = Domain(free=MASKED_CR3.free, bias=_masked_cr3, scope=(0x1000,))
LEGACY_CR4 = CR4_DEFINED & ~CR4_UNSPECIFIED & ~(PAE | PCIDE)
CR4_32 = Domain(free=LEGACY_CR4, scope=(PSE | SMEP | SMAP | CET, PSE, 0))
PAE_CR4 = Domain(free=LEGACY_CR4, fixed=PAE, scope=(PAE | SMEP | SMAP | CET, PAE))
CR0_OFF = Domain(free=CR0_DEFINED & ~(PG | NW), scope=(0, PE))
CR4_OFF = Domain(free=LEGACY_CR4 | PAE, scope=(0, PAE | CET))
LEGACY_EFER = Domain(free=EFER_DEFINED & ~EFER_UNSPECIFIED & ~(LME | LMA), scope=(NXE, 0))
EFER_OFF = Domain(free=LEGACY_EFER.free | LME, scope=(LME, 0))
LEGACY_RFLAGS = Domain(
    free=RFLAGS_DEFINED & ~RFLAGS_ONE, fixed=RFLAGS_ONE, scope=(RFLAGS_ONE, RFLAGS_ONE | VM | AC)
)
PSE36 = Domain(free=1, scope=(1,))
PDPTE = Domain(bias=_pdpte, scope=(0x2001, 0))
"""A PDPTE register: any 64 bits, of which those reserved in a present one are then cut off."""
OTHER_PDPTE = Domain(bias=_pdpte, scope=(0x2001,))
"""The same for a register that no address of an exhaustive scope selects."""

ACCESSES = (0, 2, 4, 6, 16, 20, 1, 3)
"""Kinds of access: W (2), U (4) and I (16) as in the page-fault error code, 1 if implicit."""
ACCESS = Domain(among=ACCESSES)
SHADOW_STACK_ACCESSES = (64, 66, 68, 70)
"""The same with SS (64)."""
ANY_ACCESS = Domain(among=ACCESSES + SHADOW_STACK_ACCESSES)

# The second stage.
EPTP_ROOT = Domain(
    free=((1 << 52) - 1) & ~0xFFF, bias=lambda raw: _cr3(raw) & ~0xFFF, scope=(0x1000,)
)
"""The frame of EPTP, of which bits from MAXPHYADDR up are then cut off."""
EPTP_LOW = Domain(
    among=tuple(low | ad << 6 for low in (0x1E, 0x26, 0x18, 0x20) for ad in (1, 0)),
    scope=(0x5E, 0x1E, 0x66),
)
"""Bits 11:0 of EPTP: memory type, page-walk length, accessed and dirty flags."""
EPT_FEATURES = 0x43_0001
"""Of the capabilities those that a walk depends on: execute-only, 2-MByte and 1-GByte pages,
advanced information."""
EPT_CAPABILITY = Domain(
    free=EPT_FEATURES,
    fixed=EPT_CAPABILITIES & ~EPT_FEATURES,
    scope=(EPT_CAPABILITIES, EPT_CAPABILITIES & ~EPT_FEATURES),
)
HOST_MODE = Domain(among=(2, 3, 1, 0))
"""A host's paging: 0 32-bit, 1 PAE, 2 4-level, 3 5-level."""
HOST_CR4 = Domain(free=HOST_CR4_DEFINED & ~(PAE | LA57 | PCIDE), scope=(PSE | SMEP | SMAP | PKE,))
HOST_EFER = Domain(free=HOST_EFER_DEFINED & ~(LME | LMA), scope=(NXE,))

# Kinds of guest-physical access: W (2), U (4) and I (16) as in the page-fault error code; 8 to a
# table; 1 for no linear address; 32 writable, 64 no-execute; 128 shadow stack.
GUEST_PHYSICAL_ACCESSES = (
    *(what | user | page for what in (0, 2, 16) for user in (4, 0) for page in (32, 0, 64, 96)),
    *(8 | what | user for what in (0, 2) for user in (0, 4)),
    8 | 1,
    *(128 | what | user | page for what in (0, 2) for user in (0, 4) for page in (0, 32, 64, 96)),
)
GUEST_PHYSICAL_ACCESS = Domain(
    among=GUEST_PHYSICAL_ACCESSES, scope=(0, 2, 20, 8, 9, 16, 10, 2 | 4 | 32 | 128)
)
