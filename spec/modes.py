"""The paging modes as tables: what each level of a walk looks at, and what must be 0 there.

Held beside the Intel SDM Vol. 3A: table 4-1 (the modes), 4.3 (32-bit paging), 4.4 (PAE paging), 4.5
(4-level and 5-level paging), tables 4-4 to 4-20 (the entries). Which mode is in use is `Cpu.mode`.
"""

from typing import NamedTuple

from vapama.spec.words import Word, low_bits

# Bits of a paging-structure entry (SDM Vol. 3A, tables 4-4 to 4-20).
PRESENT, WRITABLE, USER = 1 << 0, 1 << 1, 1 << 2
WRITE_THROUGH, CACHE_DISABLE = 1 << 3, 1 << 4
ACCESSED, DIRTY, PAGE_SIZE, GLOBAL = 1 << 5, 1 << 6, 1 << 7, 1 << 8
EXECUTE_DISABLE = 1 << 63
FRAME = 0x000F_FFFF_FFFF_F000
"""Bits 51:12 of an 8-byte entry, the physical address of a page or of the next structure."""
FRAME_32 = 0xFFFF_F000
"""Bits 31:12, the same in a 4-byte entry that does not map a 4-MByte page."""
PDPT = 0xFFFF_FFE0
"""Bits 31:5 of CR3, the physical address of the four PDPTEs of PAE paging."""


class Level(NamedTuple):
    """A level of paging structures.

    `number` is 1 for PTEs, 2 for PDEs, and so on up. A page mapped here leaves the low `shift` bits
    of a linear address alone; those from there up, as many as `mask` has, select the entry. An
    entry maps a page if the bit `large` is 1 in it, and at level 1 always. The bits `reserved` must
    be 0 in every present entry, the bits `reserved_large` in one that maps a page.
    """

    number: int
    shift: int
    mask: Word = low_bits(9)
    large: Word = 0
    reserved: Word = 0
    reserved_large: Word = 0


class Mode(NamedTuple):
    """A paging mode. It translates `width` bits of a linear address by entries of 1 << `scale`
    bytes, from the structure at the bits `root` of CR3 down through `levels`.

    In PAE paging what CR3 leads to are the four PDPTEs. They are no level like others: loaded into
    registers beforehand, without rights, not marked accessed.
    """

    name: str
    width: int
    scale: int
    root: Word
    levels: tuple[Level, ...]

    @property
    def entry_bytes(self) -> int:
        """How many bytes an entry has: 8, or 4 in 32-bit paging."""
        return 1 << self.scale

    def level(self, number: int) -> Level:
        """The level of this number."""
        return self.levels[-number]


PML5E = Level(5, 48, reserved=PAGE_SIZE)
PML4E = Level(4, 39, reserved=PAGE_SIZE)
PDPTE = Level(3, 30, large=PAGE_SIZE, reserved_large=low_bits(30) & ~low_bits(13))
PDE = Level(2, 21, large=PAGE_SIZE, reserved_large=low_bits(21) & ~low_bits(13))
PTE = Level(1, 12)
FIVE_LEVEL = Mode("5-level paging", 57, 3, FRAME, (PML5E, PML4E, PDPTE, PDE, PTE))
FOUR_LEVEL = Mode("4-level paging", 48, 3, FRAME, (PML4E, PDPTE, PDE, PTE))

# PAE paging ignores no upper bits: all from MAXPHYADDR to 62 are reserved.
PAE_RESERVED = low_bits(63) & ~low_bits(52)
PAE_PDE = PDE._replace(reserved=PAE_RESERVED)
PAE_PTE = PTE._replace(reserved=PAE_RESERVED)
PAE = Mode("PAE paging", 32, 3, PDPT, (PAE_PDE, PAE_PTE))
PDPTE_RESERVED = PAE_RESERVED | EXECUTE_DISABLE | 0b1111 << 5 | WRITABLE | USER
"""Bits that must be 0 in a present PDPTE of PAE paging, besides those from MAXPHYADDR to 51."""

# Which bits are reserved below the frame of a 4-MByte page depends on PSE-36: see `paging`.
SMALL_PDE_32 = Level(2, 22, mask=low_bits(10))
PDE_32 = SMALL_PDE_32._replace(large=PAGE_SIZE)
PTE_32 = Level(1, 12, mask=low_bits(10))
TWO_LEVEL = Mode("32-bit paging", 32, 2, FRAME_32, (SMALL_PDE_32, PTE_32))
"""With CR4.PSE=0: the PS bit of a PDE is ignored, and every page has 4 KBytes."""
TWO_LEVEL_PSE = Mode("32-bit paging with 4-MByte pages", 32, 2, FRAME_32, (PDE_32, PTE_32))

OFF = Mode("no paging", 32, 3, 0, ())
"""CR0.PG=0: a linear address is a physical address."""
