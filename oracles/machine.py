"""A machine that runs cases: our bare-metal guest (guest/guest.asm) and the host's side of it.

The guest is assembled when it is first needed. The host lays out in its RAM what it works with
(page tables, descriptor tables, control blocks), writes records, gives a command, and reads the
records back. How RAM is reached, and what is started, is a `Machine`'s own: see qemu.py, bochs.py.
"""

import struct
import time
from abc import abstractmethod
from pathlib import Path
from typing import NamedTuple

from vapama.oracles.emulator import Emulator, MachineDied, assembled
from vapama.spec.words import WORD, Word

SOURCE = Path(__file__).parent / "guest" / "guest.asm"
SECTORS = 16

# Physical memory of the machine: what a case may use, then the guest's own.
RAM_BYTES = 64 << 20
SERVER = 56 << 20
"""The first address that belongs to the guest itself: the size of a case's memory."""
HOLE = range(0xA_0000, 0x10_0000)
"""Where a PC has no RAM, but the memory of a display, and ROM."""
CODE_PAGE = SERVER + 0x1000
STACK = SERVER + 0x5000
MAIL = SERVER + 0x6000
WORLD_STACK = SERVER + 0x7000
ROOT_4, IDENTITY_PDPT, IDENTITY_PD = SERVER + 0x8000, SERVER + 0x9000, SERVER + 0xA000
ROOT_5, ROOT_PAE, ROOT_32 = SERVER + 0xB000, SERVER + 0xC000, SERVER + 0xD000
WORLDS = SERVER + 0x1_0000
CONTROL_BLOCKS = SERVER + 0xC_0000
HSAVE, VMXON_REGION = CONTROL_BLOCKS, CONTROL_BLOCKS + 0x1000
PERMISSIONS = CONTROL_BLOCKS + 0x2000
"""Bitmaps of I/O and MSR permissions, all 0: nothing is intercepted by them."""
BLOCKS = CONTROL_BLOCKS + 0x8000
RECORDS = SERVER + 0x20_0000
RECORDS_END = RAM_BYTES

# Flavors: how a record is run.
LEGACY, LEGACY_PAE, LONG_4, LONG_5, SVM, VMX, SVM_5, SVM_PAE = range(1, 9)
"""`SVM` has a host in 4-level paging, the others in 5-level and PAE paging."""

# Offsets in the mailbox.
COMMAND, COUNT, STRIDE, RECORDS_AT, READY, CURRENT, LEFT = range(0, 28, 4)
FEATURES, HOST_KEYS, OWN_GDT, EPT_CAPABILITIES = 0x20, 0x40, 0x44, 0x48
ALIVE = 0x600D_600D

# A record: 18 words, then pokes of two words each. See guest.asm.
HEAD = struct.Struct("<QQBBBxIQQQQQIIQQ7Q")
HEAD_BYTES = 0x90
RESULT = struct.Struct("<QQQIIQQQ")
RESULT_AT = 0x58
READ, WRITE, FETCH = 0x00, 0x10, 0x20
"""The offset of each access in the code page."""
STAMP_TAIL = 0x5A5A_CC00_0000_00B8
DONE = 3
"""The vector of INT3: the access was made."""

PRESENT, WRITABLE, USER, ACCESSED, DIRTY, PAGE_SIZE = 1, 2, 4, 0x20, 0x40, 0x80
MARKED = PRESENT | WRITABLE | USER | ACCESSED | DIRTY
"""Flags of the entries of our own, so that using them sets none."""
FRAME = 0x000F_FFFF_FFFF_F000
PAGE = 0x1000


class Features(NamedTuple):
    """What CPUID says of the machine's processor."""

    basic_c: int
    basic_d: int
    seven_c: int
    seven_d: int
    seven_b: int
    sizes: int
    extended_c: int
    extended_d: int

    @property
    def maxphyaddr(self) -> int:
        """The width of physical addresses."""
        return self.sizes & 0xFF

    @property
    def page1gb(self) -> bool:
        """1-GByte pages exist."""
        return bool(self.extended_d >> 26 & 1)

    @property
    def pse36(self) -> bool:
        """4-MByte pages can lie above 4 GBytes."""
        return bool(self.basic_d >> 17 & 1)

    @property
    def svm(self) -> bool:
        """AMD's virtualization."""
        return bool(self.extended_c >> 2 & 1)

    @property
    def vmx(self) -> bool:
        """Intel's virtualization."""
        return bool(self.basic_c >> 5 & 1)

    @property
    def cr4(self) -> Word:
        """The bits of CR4 that can be set."""
        bits = 0x1DF | 0x200 * (self.basic_d >> 24 & 1) | 0x400 * (self.basic_d >> 25 & 1)
        for cr4_bit, word, feature_bit in (
            (11, self.seven_c, 2),  # UMIP
            (12, self.seven_c, 16),  # LA57
            (16, self.seven_b, 0),  # FSGSBASE
            (17, self.basic_c, 17),  # PCIDE
            (18, self.basic_c, 26),  # OSXSAVE
            (20, self.seven_b, 7),  # SMEP
            (21, self.seven_b, 20),  # SMAP
            (22, self.seven_c, 3),  # PKE
            (24, self.seven_c, 31),  # PKS
        ):
            bits |= (word >> feature_bit & 1) << cr4_bit
        return bits | 1 << 5


def stamp(index: int) -> Word:
    """What the guest leaves in the `index`-th word of RAM: see guest.asm."""
    return STAMP_TAIL | index << 8


# WORLDS


class World(NamedTuple):
    """A way into the guest's own pages from a case's root table; see guest.asm.

    The root entry of this number leads to the stub frame, and maps the world at `base`. There is a
    stub frame for each protection key that its pages can have, in a row.
    """

    entry: int
    base: Word
    stubs: int

    def stub(self, key: int) -> int:
        """The stub frame whose pages have this protection key."""
        return self.stubs + key * PAGE


KEYS = 16
ENTRANCES = (0x1F7, 0x1A5, 0x133, 0x0C9)
"""Root entries by which the stub can be entered, in 4- and 5-level paging."""
ENTRANCES_32 = (0x3F7, 0x2E5, 0x1D3, 0x0C1)
ENTRANCES_PAE = (1, 2, 3)


def _sign_extended(address: Word, width: int) -> Word:
    return address | (WORD >> width << width if address >> (width - 1) & 1 else 0)


def _plan_worlds() -> dict[int, tuple[World, ...]]:
    """Where the worlds of each native flavor are. Each has an IDT, a GDT, and its stub frames."""
    at, worlds = WORLDS, {}
    for flavor, indices, shift, width, keys in (
        (LEGACY, ENTRANCES_32, 22, 32, 1),
        (LEGACY_PAE, ENTRANCES_PAE, 30, 32, 1),
        (LONG_4, ENTRANCES, 39, 48, KEYS),
        (LONG_5, ENTRANCES, 48, 57, KEYS),
    ):
        planned = []
        for index in indices:
            base = index << shift
            if width > 32:
                base = _sign_extended(base, width)
            planned.append(World(index, base, at + 2 * PAGE))
            at += (2 + keys) * PAGE
        worlds[flavor] = tuple(planned)
    assert at <= CONTROL_BLOCKS
    return worlds


WORLDS_OF = _plan_worlds()
OFF_WORLD = World(0, CONTROL_BLOCKS + 0x1_0000, 0)
"""Without paging: the pages of a world, one after the other in physical memory."""

SUPERVISOR_CODE, USER_CODE, IDT, GDT, WORLD_STACK_PAGE = (n * PAGE for n in range(1, 6))
CODE32, DATA32, CODE64 = 0x08, 0x10, 0x18
USER32, USER_DATA, USER64 = 0x23, 0x2B, 0x33
DESCRIPTORS = (
    0,
    0x00CF_9B00_0000_FFFF,
    0x00CF_9300_0000_FFFF,
    0x00AF_9B00_0000_FFFF,
    0x00CF_FB00_0000_FFFF,
    0x00CF_F300_0000_FFFF,
    0x00AF_FB00_0000_FFFF,
)
TSS_OFFSET, TSS_LIMIT = 0x100, 0x67
RING_0_STACK = WORLD_STACK_PAGE + 0xD00
HANDLERS_64, HANDLERS_32 = 0x200, 0x400


def _words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def _doublewords(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def _gates(base: Word, long: bool) -> bytes:
    """An IDT of 32 interrupt gates that both rings may use."""
    gates = b""
    for vector in range(32):
        handlers = HANDLERS_64 if long else HANDLERS_32
        target = base + SUPERVISOR_CODE + handlers + 16 * vector
        selector = CODE64 if long else CODE32
        gate = target & 0xFFFF | selector << 16 | 0xEE00 << 32 | (target >> 16 & 0xFFFF) << 48
        gates += _words(gate, target >> 32) if long else _words(gate)
    return gates


def _descriptors(base: Word, long: bool) -> bytes:
    """A page with the GDT, and in it the task-state segment that its last descriptor describes."""
    tss = base + GDT + TSS_OFFSET
    task = TSS_LIMIT | (tss & 0xFF_FFFF) << 16 | 0x89 << 40 | (tss >> 24 & 0xFF) << 56
    table = _words(*DESCRIPTORS, task, tss >> 32 if long else 0)
    page = bytearray(PAGE)
    page[: len(table)] = table
    if long:
        struct.pack_into("<Q", page, TSS_OFFSET + 4, base + RING_0_STACK)
    else:
        struct.pack_into("<II", page, TSS_OFFSET + 4, base + RING_0_STACK, DATA32)
    struct.pack_into("<H", page, TSS_OFFSET + 0x66, TSS_LIMIT + 1)
    return bytes(page)


def _stub(world: World, key: int) -> tuple[int, ...]:
    """The entries of a stub frame: itself, then the world's pages. It serves at every level."""
    idt, gdt = world.stubs - 2 * PAGE, world.stubs - PAGE
    own = MARKED & ~USER | key << 59
    code = PRESENT | ACCESSED
    return (
        world.stub(key) | MARKED,
        CODE_PAGE | code | key << 59,
        CODE_PAGE | code | USER | key << 59,
        idt | own,
        gdt | own,
        WORLD_STACK | own,
    )


# CONTROL BLOCKS OF VIRTUAL MACHINES

VMCB_SEGMENT = struct.Struct("<HHIQ")


def vmcb(long: bool, user: bool) -> bytes:
    """A VMCB in which every exception is intercepted. Source: AMD APM Vol. 2, appendix B.

    What a record changes is left 0: see guest.asm.
    """
    block = bytearray(PAGE)
    put = struct.pack_into
    put("<I", block, 0x08, 0xFFFF_FFFF)  # exceptions
    put("<I", block, 0x0C, 1 << 0 | 1 << 1 | 1 << 24 | 1 << 31)  # INTR, NMI, HLT, shutdown
    put("<I", block, 0x10, 1 << 0 | 1 << 1)  # VMRUN, VMMCALL
    put("<QQ", block, 0x40, PERMISSIONS, PERMISSIONS + 0x3000)
    put("<I", block, 0x58, 1)  # ASID
    ring = 3 if user else 0
    data = (USER_DATA if user else DATA32, 0xC93 | ring << 5, 0xFFFF_FFFF, 0)
    code_attributes = (0xA9B if long else 0xC9B) | ring << 5
    selector = (USER64 if user else CODE64) if long else (USER32 if user else CODE32)
    for offset in (0x400, 0x420, 0x430, 0x440, 0x450):  # ES, SS, DS, FS, GS
        VMCB_SEGMENT.pack_into(block, offset, *data)
    VMCB_SEGMENT.pack_into(block, 0x410, selector, code_attributes, 0xFFFF_FFFF, 0)
    VMCB_SEGMENT.pack_into(block, 0x490, TASK_SELECTOR, 0x8B, TSS_LIMIT, 0)  # TR
    put("<B", block, 0x4CB, ring)
    put("<QQ", block, 0x560, 0x400, 0xFFFF_0FF0)  # DR7, DR6
    put("<Q", block, 0x668, 0x0007_0406_0007_0406)  # PAT
    return bytes(block)


def vmcs_fields(long: bool, user: bool, gdt: int) -> dict[int, int]:
    """The fields of a VMCS by encoding: every exception exits. Source: SDM Vol. 3C, appendix B.

    What a record changes is not among them: see guest.asm. `gdt` is where the host's GDT is.
    """
    ring = 3 if user else 0
    code = (USER64 if user else CODE64) if long else (USER32 if user else CODE32)
    data = USER_DATA if user else DATA32
    fields = {
        0x4000: 0x16,  # pin-based controls
        0x4002: 0x0401_E172 | 1 << 31 | 1 << 7,  # processor-based; secondary controls, HLT
        0x4004: 0xFFFF_FFFF,  # exceptions
        0x400C: 0x3_6DFF | 1 << 9 | 1 << 20 | 1 << 21,  # exit: a 64-bit host, EFER saved and loaded
        0x4012: 0x11FF | long << 9 | 1 << 15,  # entry: IA-32e mode, EFER loaded
        **dict.fromkeys(
            (0x4006, 0x4008, 0x400A, 0x400E, 0x4010, 0x4014, 0x4016, 0x6000, 0x6002), 0
        ),
        0x2800: WORD,  # no linked VMCS
        # The host
        **dict.fromkeys((0xC00, 0xC04, 0xC06, 0xC08, 0xC0A, 0x4C00, 0x6C10, 0x6C12), 0),
        0xC02: CODE64,
        0xC0C: TASK_SELECTOR,
        0x6C00: CR0_OWN,
        0x6C02: ROOT_4,
        0x6C04: CR4_OWN | 1 << 5 | 1 << 13,
        **dict.fromkeys((0x6C06, 0x6C08, 0x6C0E), 0),
        0x6C0A: WORLDS_OF[LONG_4][0].base + GDT + TSS_OFFSET,
        0x6C0C: gdt,
        0x2C02: 0x500,
        # The guest
        0x681A: 0x400,  # DR7
        **dict.fromkeys((0x681C, 0x4824, 0x4826, 0x482A, 0x6822, 0x6824, 0x6826, 0x2802), 0),
    }
    for segment in range(6):  # ES, CS, SS, DS, FS, GS
        is_code = segment == 1
        kind = (0xA09B if long else 0xC09B) if is_code else 0xC093
        fields[0x800 + 2 * segment] = code if is_code else data
        fields[0x4800 + 2 * segment] = 0xFFFF_FFFF
        fields[0x6806 + 2 * segment] = 0
        fields[0x4814 + 2 * segment] = kind | ring << 5
    fields |= {0x80C: 0, 0x480C: 0, 0x4820: 0x1_0000, 0x6812: 0}  # LDTR: unusable
    fields |= {0x80E: TASK_SELECTOR, 0x480E: TSS_LIMIT, 0x4822: 0x8B, 0x6814: 0}  # TR
    fields |= dict.fromkeys((0x4810, 0x4812, 0x6816, 0x6818), 0)  # GDTR, IDTR
    return fields


CR0_OWN, CR4_OWN = 0x8000_0031, 0x610
TASK_SELECTOR = 0x38
BLOCK_OF = {
    (long, user): BLOCKS + 2 * PAGE * (2 * long + user)
    for long in (False, True)
    for user in (False, True)
}
"""The VMCB or VMCS for a 32-bit or 64-bit code segment, supervisor or user."""

# THE WAY IN UNDER A SECOND STAGE


class Nested(NamedTuple):
    """A way into the guest's own pages from the root of a second stage; see virtual.py.

    The root entry of this number leads to the frame `ept` or `npt`, which serves at every level and
    maps the pages at `base`: the code page, and `guest`, which serves as the guest's table at every
    level. Linear addresses in there: the code for the supervisor and for the user, and `TARGET`.
    """

    entry: int
    base: Word
    ept: int
    npt: int
    guest: int


TARGET = 3 * PAGE
EPT_ALL, EPT_MARKED, EPT_WRITE_BACK = 7, 0x300, 6 << 3


def _plan_nested(entries: tuple[int, ...], shift: int, first: int) -> tuple[Nested, ...]:
    at = range(CONTROL_BLOCKS + 0x2_0000 + PAGE * first, RECORDS, 3 * PAGE)
    return tuple(
        Nested(entry, entry << shift, frame, frame + PAGE, frame + 2 * PAGE)
        for entry, frame in zip(entries, at, strict=False)
    )


NESTED = {
    4: _plan_nested((1, 0, 0x1F7), 39, 0),
    5: _plan_nested((1, 0, 0xB), 48, 9),
    3: _plan_nested((3, 2, 1, 0), 30, 18),
}
"""Those of roots of so many levels."""


# THE MACHINE


def image() -> bytes:
    """The guest, assembled. Raises `CannotStart`."""
    return assembled(SOURCE, _ASSEMBLED)


_ASSEMBLED = {
    "SERVER": SERVER,
    "RAM": RAM_BYTES,
    "SECTORS": SECTORS,
    "MAIL": MAIL,
    "STACK": STACK,
    "ROOT_4": ROOT_4,
    "ROOT_5": ROOT_5,
    "ROOT_PAE": ROOT_PAE,
    "ROOT_32": ROOT_32,
    "LEGACY": LEGACY,
    "LEGACY_PAE": LEGACY_PAE,
    "LONG_4": LONG_4,
    "LONG_5": LONG_5,
    "SVM": SVM,
    "SVM_5": SVM_5,
    "SVM_PAE": SVM_PAE,
    "VMX": VMX,
    "HSAVE": HSAVE,
    "VMXON_REGION": VMXON_REGION,
}
"""The constants that guest.asm takes from here."""


class Machine(Emulator):
    """A started emulator with our guest in it. `start` starts another after one has died."""

    features: Features
    ept_capabilities: Word = 0
    """IA32_VMX_EPT_VPID_CAP."""
    avoid: Word = 0
    """Bits of CR4 that are better left alone here, though the processor has them."""
    starts = 0
    patience = 20.0
    """Seconds in which some record must be finished."""

    def __init__(self) -> None:
        super().__init__()
        (self.folder / "guest.img").write_bytes(image().ljust(1474560, b"\0"))
        self.start()

    # What a kind of machine knows

    @abstractmethod
    def command(self) -> list[str]:
        """What is run."""

    @abstractmethod
    def find_memory(self) -> None:
        """Wait until RAM can be reached and the guest has booted."""

    @abstractmethod
    def read(self, address: int, count: int) -> bytes:
        """Bytes of RAM."""

    @abstractmethod
    def write(self, address: int, data: bytes) -> None:
        """Put bytes into RAM."""

    # Life and death

    def start(self) -> None:
        """Start it, and lay out what the guest works with. Raises `CannotStart`."""
        self.launch(self.command())
        self.starts += 1
        self.find_memory()
        self._prepare()

    @property
    def cr4(self) -> Word:
        """The bits of CR4 that a case may set."""
        return self.features.cr4 & ~self.avoid

    def wait_until_ready(self, seconds: float = 60) -> None:
        """Wait for the guest's word that it has booted."""
        deadline = time.monotonic() + seconds
        while self._mail(READY) != ALIVE:
            self.require_starting(deadline)
            time.sleep(0.01)

    def _mail(self, offset: int) -> int:
        return int.from_bytes(self.read(MAIL + offset, 4), "little")

    def _prepare(self) -> None:
        features = struct.unpack("<8I", self.read(MAIL + FEATURES, 32))
        self.features = Features(*features)
        identity = [n << 21 | MARKED & ~USER | PAGE_SIZE for n in range(512)]
        self.write(IDENTITY_PD, _words(*identity))
        self.write(IDENTITY_PDPT, _words(IDENTITY_PD | MARKED))
        self.write(ROOT_4, _words(IDENTITY_PDPT | MARKED))
        self.write(ROOT_5, _words(ROOT_4 | MARKED))
        self.write(ROOT_PAE, _words(IDENTITY_PD | PRESENT, 0, 0, 0))
        self.write(ROOT_32, _doublewords(*(n << 22 | MARKED & ~USER | 0x80 for n in range(16))))
        for flavor, root in (
            (LEGACY, ROOT_32),
            (LEGACY_PAE, ROOT_PAE),
            (LONG_4, ROOT_4),
            (LONG_5, ROOT_5),
        ):
            for world in WORLDS_OF[flavor]:
                self._prepare_world(flavor, world, root)
        base = OFF_WORLD.base
        for code in (SUPERVISOR_CODE, USER_CODE):
            self.write(base + code, self.read(CODE_PAGE, PAGE))
        self.write(base + IDT, _gates(base, long=False).ljust(PAGE, b"\0"))
        self.write(base + GDT, _descriptors(base, long=False))
        gdt = self._mail(OWN_GDT)
        for (long, user), block in BLOCK_OF.items():
            if self.features.svm:
                self.write(block, vmcb(long, user))
            elif self.features.vmx:
                fields = vmcs_fields(long, user, gdt)
                pairs = [word for pair in fields.items() for word in pair]
                self.write(block + PAGE, _words(len(fields), 0, *pairs))
        for nested in (way for ways in NESTED.values() for way in ways):
            self._prepare_nested(nested)
        if self.features.vmx:
            self.run(VMX, b"", 1)
            self.ept_capabilities = int.from_bytes(self.read(MAIL + EPT_CAPABILITIES, 8), "little")
        keys = self.cr4 >> 22 & 1
        self.write(MAIL + HOST_KEYS, _doublewords(keys))

    def _prepare_world(self, flavor: int, world: World, root: int) -> None:
        long = flavor in (LONG_4, LONG_5)
        self.write(world.stubs - 2 * PAGE, _gates(world.base, long).ljust(PAGE, b"\0"))
        self.write(world.stubs - PAGE, _descriptors(world.base, long))
        pack = _doublewords if flavor == LEGACY else _words
        for key in range(KEYS if long else 1):
            self.write(world.stub(key), pack(*_stub(world, key)).ljust(PAGE, b"\0"))
        size = 4 if flavor == LEGACY else 8
        flags = PRESENT if flavor == LEGACY_PAE else MARKED
        self.write(root + size * world.entry, pack(world.stub(0) | flags))

    def _prepare_nested(self, nested: Nested) -> None:
        code, tables = nested.base + SUPERVISOR_CODE, nested.base + TARGET
        leaf = EPT_ALL | EPT_MARKED | EPT_WRITE_BACK
        ept = (nested.ept | EPT_ALL | EPT_MARKED, CODE_PAGE | leaf, 0, nested.guest | leaf)
        npt = (nested.npt | MARKED, CODE_PAGE | MARKED, 0, nested.guest | MARKED)
        supervisor = PRESENT | ACCESSED
        guest = (tables | MARKED, code | supervisor, code | supervisor | USER, 0)
        for frame, entries in ((nested.ept, ept), (nested.npt, npt), (nested.guest, guest)):
            self.write(frame, _words(*entries).ljust(PAGE, b"\0"))

    # Running records

    def give(self, flavor: int, records: bytes, stride: int, at: int = RECORDS) -> None:
        """Start on these records."""
        count = len(records) // stride
        if records:
            self.write(at, records)
        self.write(MAIL + COUNT, _doublewords(count, stride, at))
        self.write(MAIL + COMMAND, _doublewords(flavor))

    def finished(self) -> bool:
        """Whether the records given are done. Raises `MachineDied`."""
        try:
            if self._mail(COMMAND) == 0:
                return True
        except OSError:
            raise MachineDied(f"{self.name} ended") from None
        if not self.alive():
            raise MachineDied(f"{self.name} ended")
        return False

    def left(self) -> int:
        """How many of the records given are not finished."""
        return self._mail(LEFT)

    def await_finish(self) -> None:
        """Wait for it. Raises `MachineDied`, also when it takes more than `patience`."""
        polls, last, since = 0, -1, time.monotonic()
        while not self.finished():
            polls += 1
            if polls < 200:
                continue
            time.sleep(0.0002)
            if polls % 500 == 0:
                left = self.left()
                if left != last:
                    last, since = left, time.monotonic()
                elif time.monotonic() - since > self.patience:
                    raise MachineDied(f"{self.name} hung, with {left} records left")

    def run(self, flavor: int, records: bytes, stride: int) -> bytes:
        """Run records and give them back with their results. Raises `MachineDied`."""
        if not self.alive() or self._mail(COMMAND):
            self.start()  # it was left in the middle of something
        self.give(flavor, records, stride)
        self.await_finish()
        return self.read(RECORDS, len(records))
