"""Linux' KVM as a hypervisor that runs programs of guest and host steps, inside an emulator.

QEMU emulates an AMD processor with SVM; on it runs Debian's Linux, with our init (guest/server.c),
which has KVM run guests with our agent in them (guest/agent.asm). `npt` 0 is KVM's real shadow MMU,
1 its MMU for nested page tables. Programs are those of `spec.steps`. A guest's step is made by its
own instructions, with the TLB that the emulator keeps, and what the host does is asked of KVM and
of the Linux that it runs in.

Commands and results go through memory that is shared with the emulated machine (ivshmem).
"""

import mmap
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vapama.oracles import linux
from vapama.oracles.emulator import (
    Emulator,
    MachineDied,
    assembled,
    built,
    defined,
)
from vapama.oracles.machine import ALIVE
from vapama.oracles.native import GENERAL_PROTECTION, PAGE_FAULT, STACK_FAULT
from vapama.oracles.qemu import EMULATOR
from vapama.spec.access import Access
from vapama.spec.cpu import AC, PCIDE, PG, RFLAGS_ONE, SMAP, SMEP, Cpu
from vapama.spec.outcomes import NonCanonical
from vapama.spec.steps import (
    DeviceWrite,
    Done,
    Evict,
    Faulted,
    GuestPlan,
    Harvest,
    Harvested,
    Invlpg,
    Load,
    Loaded,
    Log,
    Migrate,
    Move,
    Plan,
    Reclaim,
    Seen,
    SetSlot,
    Slot,
    Step,
    Store,
    Stored,
    Unmap,
)
from vapama.spec.words import Word

SOURCES = Path(__file__).parent / "guest"
PAGE = 0x1000
WORDS = PAGE // 8

# The guests that there are room for.
MOST_GUESTS, MOST_PROCESSORS, SLOTS = 2, 2, 4
BACKING = 18
"""Pages of a guest's backing."""
FILE_PAGES = 32
"""Pages that a guest's backing is spread over: where a page moves to is among them."""
USED_WORDS = 40
"""The first words of a page, which (with the last 8) are compared after each step; at the end of a
program all are."""

# The agent's pages; see guest/agent.asm.
ENTRANCE = 0x1A5
"""The entry of root tables that leads to them."""
AGENT_BASE = 0xFFFF_0000_0000_0000 | ENTRANCE << 39
AGENT_FRAME = 0x95A_5A80
"""Where no program comes to: its addresses reach the first 16 MBytes of a page, and no more; the
first 128 KBytes of one of 2 MBytes."""
AGENT_MAIL = 6
AGENT_PAGES = AGENT_MAIL + MOST_PROCESSORS
CODE, DATA, USER_CODE, USER_DATA, TSS = 0x08, 0x10, 0x1B, 0x23, 0x200
DESCRIPTORS = (
    0,
    0x00AF_9B00_0000_FFFF,
    0x00CF_9300_0000_FFFF,
    0x00AF_FB00_0000_FFFF,
    0x00CF_F300_0000_FFFF,
)
STEPS, HANDLERS = 0x100, 0x400
"""Offsets in its code."""
OPEN = 0x27
"""Present, writable, for users, accessed."""
SUPERVISOR = 0x63
"""Present, writable, accessed, dirty."""

# The memory that is shared: a mailbox, images, commands, results.
SHARED_BYTES = 16 << 20
IMAGE, AGENT_IMAGE, COMMANDS, RESULTS = 0x1_0000, 0x8_0000, 0x10_0000, 0x40_0000
RAM_BYTES = 512 << 20

# Operations of commands, and how a step ended; see server.c.
RESET, PROCESSOR, SLOT, STEP, UNMAP, MIGRATE, LOG, HARVEST, RECLAIM, END = range(10)
DONE, STUCK, DIED, HUNG, SKIPPED = range(5)
LOAD, STORE, FETCH, INVLPG = 0, 1, 2, 7
REGISTERS = {"cr0": 3, "cr3": 4, "cr4": 5, "efer": 6}
"""The agent's step that writes a register."""
BREAKPOINT, INVALID_OPCODE = 3, 6
CR0_OWN, CR4_OWN = 0x31, 0x600
STAMP, STAMP_LENGTH = 0x5A5A_CC00_0000_00B8, 5
STAMP_AT = 0x800
"""Where in each page a fetch is made: what is there tells which page it is."""


class Command(NamedTuple):
    """A command to the server: an operation, a guest, and numbers that depend on it."""

    op: int
    guest: int = 0
    number: int = 0
    a: Word = 0
    b: Word = 0
    c: Word = 0
    d: Word = 0
    e: Word = 0


COMMAND = struct.Struct("<8Q")


class Result(NamedTuple):
    """What came of a command. `changes` are the words of guests that differ from before: guest,
    word of the backing, value.
    """

    ended: int
    vector: int
    error: int
    fault: Word
    data: Word
    where: Word
    why: int
    devices: tuple[DeviceWrite, ...]
    changes: tuple[tuple[int, int, Word], ...]


NOTHING = Result(DONE, BREAKPOINT, 0, 0, 0, 0, 0, (), ())
"""What comes of a step for which there is nothing to do."""


def stamp(page: int) -> Word:
    """What is in a page for a fetch: MOV EAX, the number of the word; INT3."""
    return stamped(page << 9 | STAMP_AT >> 3)


class NestedKvm(Emulator):
    """KVM in Linux in QEMU, with guests of two processors each."""

    patience = 60.0
    """Seconds in which some command must be finished."""

    def __init__(self, npt: bool, ram: Path | None = None) -> None:
        """Boot it; with `ram`, a file that is to hold its RAM. Raises `CannotStart`."""
        super().__init__()
        self.ram = ram
        self.image = b""
        self.npt, self.name = npt, "kvm-tdp" if npt else "kvm-shadow"
        found = linux.required()
        self.kernel = found.kernel
        agent = assembled(SOURCES / "agent.asm", {})
        self.agent = agent_pages(agent)
        init = self.folder / "init"
        compiler = ["gcc", "-std=gnu11", "-O2", "-Wall", "-static", *defined(CONSTANTS)]
        built([*compiler, "-o", str(init), str(SOURCES / "server.c")])
        modules = {f"{name.split('/')[-1]}.ko": found.module(name) for name in linux.MODULES}
        files = {"init": init.read_bytes(), **{n: data for n, data in modules.items() if data}}
        (self.folder / "initramfs").write_bytes(linux.initramfs(files))
        self.start()

    def start(self) -> None:
        """Boot it. Raises `CannotStart`."""
        shared = Path("/dev/shm")
        path = (shared if shared.is_dir() else self.folder) / f"{self.folder.name}.shared"
        with path.open("wb") as file:
            file.truncate(SHARED_BYTES)
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), SHARED_BYTES)
        own_ram = []
        if self.ram is not None:
            with self.ram.open("wb") as file:
                file.truncate(RAM_BYTES)
            backend = f"memory-backend-file,id=ram,size={RAM_BYTES},mem-path={self.ram},share=on"
            own_ram = ["-object", backend, "-machine", "memory-backend=ram"]
        options = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable"
        try:
            self.launch(
                [
                    EMULATOR,
                    *("-machine", "q35,accel=tcg,mem-merge=off", "-cpu", "EPYC,+svm,+npt"),
                    *("-m", f"{RAM_BYTES >> 20}M", *own_ram),
                    *("-display", "none", "-nodefaults", "-no-user-config", "-no-reboot"),
                    *("-serial", "stdio"),
                    *("-object", f"memory-backend-file,id=s,size=16M,mem-path={path},share=on"),
                    *("-device", "ivshmem-plain,memdev=s"),
                    *("-kernel", str(self.kernel), "-initrd", "initramfs"),
                    *("-append", f"{options} vapama.npt={int(self.npt)}"),
                ]
            )
            deadline = time.monotonic() + 120
            while self._word(3) != ALIVE:
                self.require_starting(deadline)
                time.sleep(0.05)
        finally:
            path.unlink()
        self._shared[AGENT_IMAGE : AGENT_IMAGE + len(self.agent)] = self.agent
        self.set_image(self.image)
        _, seven_b, self.maxphyaddr, _ = (self._word(4 + i) for i in range(4))
        self.cr4 = SMEP * (seven_b >> 7 & 1) | SMAP * (seven_b >> 20 & 1)

    def _word(self, number: int) -> int:
        return int.from_bytes(self._shared[8 * number : 8 * number + 8], "little")

    def set_image(self, image: bytes) -> None:
        """What a guest's backing holds at power-on."""
        self.image = image
        self._shared[IMAGE : IMAGE + len(image)] = image

    def give(self, commands: Sequence[Command]) -> None:
        """Start on commands."""
        data = b"".join(COMMAND.pack(*command) for command in commands)
        self._shared[COMMANDS : COMMANDS + len(data)] = data
        self._shared[0:24] = struct.pack("<3Q", 0, len(commands), 0)
        self._shared[0:8] = struct.pack("<Q", 1)
        self._given = len(commands)

    def await_finish(self) -> list[Result]:
        """What came of the commands given. Raises `MachineDied`."""
        last, since = -1, time.monotonic()
        while self._word(0):
            time.sleep(0.0005)
            done = self._word(2)
            if done != last:
                last, since = done, time.monotonic()
            elif not self.alive():
                raise MachineDied(f"{self.name} ended: {self.last_words()}")
            elif time.monotonic() - since > self.patience:
                raise MachineDied(f"{self.name} hung after {done} of {self._given} commands")
        return list(self._results())

    def _results(self) -> Iterator[Result]:
        at, shared = RESULTS, self._shared
        for _ in range(self._given):
            head, code, fault, data, where, why = struct.unpack_from("<6Q", shared, at)
            devices, changes = head >> 8 & 0xFF_FFFF, head >> 32
            words = struct.unpack_from(f"<{3 * devices + 2 * changes}Q", shared, at + 48)
            at += 48 + 8 * len(words)
            stores, changed = words[: 3 * devices], words[3 * devices :]
            yield Result(
                head & 0xFF,
                code & 0xFF,
                code >> 8,
                fault,
                data,
                where,
                why,
                tuple(map(DeviceWrite, stores[::3], stores[1::3], stores[2::3])),
                tuple(
                    (n >> 32, n & 0xFFFF_FFFF, v)
                    for n, v in zip(changed[::2], changed[1::2], strict=True)
                ),
            )

    def is_busy(self) -> bool:
        """Whether commands that were given are under way, or it has ended."""
        return self._word(0) != 0 or not self.alive()

    def run(self, commands: Sequence[Command]) -> list[Result]:
        """Run commands. Raises `MachineDied`."""
        self.give(commands)
        return self.await_finish()


CONSTANTS = {
    name: value
    for name, value in globals().items()
    if name
    in {
        *("MOST_GUESTS", "MOST_PROCESSORS", "SLOTS", "BACKING", "FILE_PAGES", "USED_WORDS"),
        *("AGENT_FRAME", "AGENT_MAIL", "AGENT_PAGES", "CODE", "DATA", "USER_CODE", "USER_DATA"),
        *("TSS", "SHARED_BYTES", "IMAGE", "AGENT_IMAGE", "COMMANDS", "RESULTS", "ALIVE"),
        *("AGENT_BASE", "STEPS"),
    }
}
"""What server.c takes from here."""


def agent_pages(code: bytes) -> bytes:
    """The agent's pages: three tables, its code, IDT, GDT, and a mailbox for each processor."""
    frame = AGENT_FRAME << 12
    pages = [bytearray(PAGE) for _ in range(AGENT_PAGES)]
    struct.pack_into("<Q", pages[0], 0, frame + PAGE | OPEN)
    struct.pack_into("<Q", pages[1], 0, frame + 2 * PAGE | OPEN)
    mapped = (3 * PAGE | SUPERVISOR, 3 * PAGE | OPEN, 4 * PAGE | SUPERVISOR, 5 * PAGE | SUPERVISOR)
    mails = tuple((AGENT_MAIL + p) * PAGE | SUPERVISOR for p in range(MOST_PROCESSORS))
    for number, entry in enumerate(mapped + mails, 1):
        struct.pack_into("<Q", pages[2], 8 * number, frame + entry)
    pages[3][:] = code
    for vector in range(32):
        target = AGENT_BASE + PAGE + HANDLERS + 16 * vector
        low = target & 0xFFFF | CODE << 16 | 0xEE00 << 32 | (target >> 16 & 0xFFFF) << 48
        struct.pack_into("<QQ", pages[4], 16 * vector, low, target >> 32)
    struct.pack_into(f"<{len(DESCRIPTORS)}Q", pages[5], 0, *DESCRIPTORS)
    for p in range(MOST_PROCESSORS):
        top = AGENT_BASE + (5 + p) * PAGE + PAGE
        struct.pack_into("<Q", pages[AGENT_MAIL + p], TSS + 4, top)
        struct.pack_into("<H", pages[AGENT_MAIL + p], TSS + 0x66, 0x68)
    return b"".join(pages)


_OF_BOTH = {
    "table-outside-memory-is-not-present": "what a machine reads there is its own; Linux 6.1, "
    "arch/x86/kvm/mmu/paging_tmpl.h, FNAME(walk_addr_generic)",
    "code-in-a-device-is-not-emulated": "Linux 6.1, arch/x86/kvm/x86.c, handle_emulation_failure",
    "store-across-pages-is-half-made": "Linux 6.1, arch/x86/kvm/x86.c, emulator_read_write",
    "emulated-code-lacks-int3": "Linux 6.1, arch/x86/kvm/emulate.c, emulate_int",
}
DEPARTURES = {
    **_OF_BOTH,
    "page-fault-leaves-what-is-stale": "SDM Vol. 3A, 4.10.4.1; Linux 6.1, arch/x86/kvm/x86.c, "
    "kvm_inject_emulated_page_fault",
    "store-to-a-device-is-not-walked-for": "SDM Vol. 3A, 4.8; Linux 6.1, arch/x86/kvm/x86.c, "
    "vcpu_mmio_gva_to_gpa",
    "load-from-a-device-in-page-0-sets-dirty": "SDM Vol. 3A, 4.8; Linux 6.1, arch/x86/kvm/x86.c, "
    "retry_instruction",
    "execute-disable-is-not-reserved-once-shared": "SDM Vol. 3A, 4.4.2 and 4.5; Linux 6.1, "
    "arch/x86/kvm/mmu/mmu.c, kvm_init_shadow_mmu",
    "smap-is-lost-where-wp-is-0": "SDM Vol. 3A, 4.6.1; Linux 6.1, Documentation/virt/kvm/x86/"
    "mmu.rst, handling cr0.wp=0; arch/x86/kvm/mmu/paging_tmpl.h, FNAME(page_fault)",
    "memory-put-over-a-device-is-missed": "Linux 6.1, Documentation/virt/kvm/api.rst, 4.35; "
    "arch/x86/kvm/mmu/mmu.c, sync_mmio_spte",
}
"""The departures of KVM's shadow MMU from what the machine allows, with what decides."""
DEPARTURES_OF_TDP = {
    **_OF_BOTH,
    "reserved-bit-fault-lacks-p": "SDM Vol. 3A, 4.7; it is QEMU's",
    "reserved-large-page-is-marked-accessed": "SDM Vol. 3A, 4.8; it is QEMU's",
    "nested-fault-of-a-table-is-taken-for-the-access": "APM Vol. 2, 15.25.6; Linux 6.1, "
    "arch/x86/kvm/x86.c, emulator_read_write_onepage",
    "tables-in-read-only-memory-hang-the-guest": "APM Vol. 2, 15.25.5; Linux 6.1, "
    "arch/x86/kvm/mmu/mmu.c, kvm_mmu_page_fault",
}
"""Those of KVM's MMU for nested page tables, on QEMU."""


# PROGRAMS


def power_on(plan: Plan) -> list[Command]:
    """The commands that set up a machine of this plan."""
    commands = [Command(RESET, a=len(plan.guests))]
    for number, guest in enumerate(plan.guests):
        commands += [_slot(number, n, slot) for n, slot in guest.slots.items()]
        for p, cpu in enumerate(guest.vcpus):
            commands.append(Command(PROCESSOR, number, p, cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer))
    return commands


def image(guest: GuestPlan) -> bytes:
    """The backing of a guest at power-on."""
    words = bytearray(BACKING * PAGE)
    for address, word in guest.image.items():
        (slot,) = (s for s in guest.slots.values() if s.gfn <= address >> 12 < s.gfn + s.pages)
        struct.pack_into("<Q", words, (slot.page - slot.gfn << 12) + address, word)
    return bytes(words)


def _slot(guest: int, number: int, slot: Slot | None) -> Command:
    if slot is None:
        return Command(SLOT, guest, number)
    flags = 1 | slot.readonly << 1
    return Command(SLOT, guest, number, flags, slot.gfn, slot.pages, slot.page)


def command(step: Step, cpu: Cpu) -> Command | None:
    """The command for a step of a processor in this state; None if there is nothing to do."""
    flags = cpu.rflags & AC | RFLAGS_ONE
    match step:
        case Load(guest, vcpu, access):
            how = FETCH if access.fetch else LOAD
            return Command(STEP, guest, vcpu, how, access.address, 0, access.user, flags)
        case Store(guest, vcpu, access, value):
            return Command(STEP, guest, vcpu, STORE, access.address, value, access.user, flags)
        case Move(guest, vcpu, register, value):
            own = CR0_OWN if register == "cr0" else CR4_OWN if register == "cr4" else 0
            if register not in REGISTERS:
                return None
            return Command(STEP, guest, vcpu, REGISTERS[register], 0, value | own, 0, RFLAGS_ONE)
        case Invlpg(guest, vcpu, address):
            return Command(STEP, guest, vcpu, INVLPG, address, 0, 0, RFLAGS_ONE)
        case Unmap(guest, page):
            return Command(UNMAP, guest, a=page)
        case Migrate(guest, page):
            return Command(MIGRATE, guest, a=page)
        case SetSlot(guest, number, slot):
            return _slot(guest, number, slot)
        case Log(guest, number, on):
            return Command(LOG, guest, number, on)
        case Harvest(guest, number):
            return Command(HARVEST, guest, number)
        case Reclaim():
            return Command(RECLAIM)
    return None


def can(step: Step, cr4: Word) -> bool:
    """Whether a step can be made here, on processors that have these bits of CR4: `cr4` of those
    that programs change.
    """
    match step:
        case Move(_, _, "cr0", value) if not value & PG:
            return False  # the agent runs in 4-level paging
        case Move(_, _, "cr4", value):
            return not value & (PCIDE | SMEP | SMAP) & ~cr4
        case Load() | Store() | Move() | Invlpg() | Unmap() | Migrate() | SetSlot() | Log():
            return True
        case Harvest() | Reclaim() | Evict():
            return True
    return False


def was_emulated(step: Load, result: Result, length: int) -> bool:
    """Whether the code of a fetch was run by KVM's emulator, which gave up after so many bytes: it
    stops the supervisor's, and the user's is an undefined instruction to it.
    """
    if not step.access.fetch or result.ended == STUCK:
        return step.access.fetch == 1
    undefined = result.ended == DONE and result.vector == INVALID_OPCODE
    return undefined and result.where == step.access.address + length


class Told(Exception):
    """A step ended in a way that no step of a program does; says how."""


def seen(step: Step, result: Result) -> Seen:
    """What was seen of a step that came to its end. Raises `Told`."""
    if result.ended != DONE:
        how = {STUCK: "KVM gave up", DIED: "the guest died", HUNG: "the guest hung"}
        raise Told(f"{how[result.ended]} ({result.why})")
    match step:
        case Harvest():
            gfns = result.vector | result.error << 8
            return Harvested(frozenset(result.fault + i for i in range(64) if gfns >> i & 1))
        case Load(_, _, access) | Store(_, _, access):
            return _accessed(access, result)
        case Move() | Invlpg() if result.vector != BREAKPOINT:
            raise Told(f"exception {result.vector} ({result.error:#x})")
    return Done()


def _accessed(access: Access, result: Result) -> Seen:
    """What was seen of a load, a fetch or a store. Raises `Told`."""
    how = FETCH if access.fetch else STORE if access.write else LOAD
    start = AGENT_BASE + (2 if access.user else 1) * PAGE + STEPS + 32 * how
    address, found = access.address, result
    if found.vector == BREAKPOINT:
        end = address + 6 if access.fetch else start + 4
        if found.where == end:
            if access.write:
                return Stored(found.devices)
            return Loaded(stamped(found.data) if access.fetch else found.data)
    elif found.where in ({start, address} if access.fetch else {start}):
        if found.vector == PAGE_FAULT:
            return Faulted(found.error, found.fault)
        if found.vector in (GENERAL_PROTECTION, STACK_FAULT):
            return NonCanonical()
    raise Told(
        f"exception {found.vector} ({found.error:#x}) at {found.where:#x}, CR2 {found.fault:#x}"
    )


def stamped(number: Word) -> Word:
    """The word of code that tells this number."""
    return STAMP | number << 8
