"""Unicorn as a subject: QEMU 5's page walker, asked by real loads, stores and fetches.

A case's tables lie in the emulator's RAM, the pool of frames at physical address 0. A stub of
emulated code makes the access at CPL 0 or 3. The stub must stay reachable through tables that can
hold anything: its frames are far above RAM, where no entry of the case leads, and it is entered
through an entry of the case's own root table that the walk under test does not read. The physical
address is what Unicorn's memory hooks report, and they report it where there is no memory too.

There are two emulators: one in 64-bit mode for 4-level and 5-level paging, one in protected mode
for 32-bit and PAE paging. The second is made when it is first needed.
"""

import ctypes
import mmap
from dataclasses import replace
from typing import Any

from vapama.spec import domains
from vapama.spec.access import Access
from vapama.spec.cpu import (
    CET,
    LAM_SUP,
    LMA,
    LME,
    NXE,
    PAE,
    PE,
    PG,
    PKS,
    RFLAGS_ONE,
    VM,
    WP,
    Cpu,
)
from vapama.spec.domains import FRAMES, Domain
from vapama.spec.memory import PAGE_BYTES, Memory, Sparse
from vapama.spec.outcomes import (
    RSVD,
    I,
    NonCanonical,
    Outcome,
    OutsideMemory,
    P,
    PageFault,
    Translated,
    U,
    Update,
    W,
)
from vapama.spec.subject import (
    EFFECTS,
    ERROR_CODE,
    OTHER_MODES,
    PA,
    Capabilities,
    NotCovered,
    agree,
)
from vapama.spec.words import WORD, Word

# Bits of a paging-structure entry (SDM Vol. 3A, tables 4-14 to 4-20).
PRESENT, WRITABLE, USER, ACCESSED, DIRTY, PAGE_SIZE = 1, 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 7
FRAME, FRAME_32, PDPT = 0x000F_FFFF_FFFF_F000, 0xFFFF_F000, 0xFFFF_FFE0

RAM_BYTES = FRAMES * PAGE_BYTES
EMPTY = bytes(RAM_BYTES)
MAXPHYADDR = 40
"""QEMU 5's TCG_PHYS_ADDR_BITS, whatever the CPU model says."""
PDPTE_LOW_RESERVED = 0x1E6
TF = 1 << 8
"""RFLAGS.TF. Its debug trap would come after the access and end the run in its place."""

NARROW = {
    "maxphyaddr": Domain(among=(MAXPHYADDR,)),
    "page1gb": Domain(among=(1,)),
    "pse36": Domain(among=(1,)),
    "guest.limit": Domain(among=(RAM_BYTES,)),
    "cr3": replace(domains.CR3, free=RAM_BYTES - 1),
    "cr4": replace(
        domains.CR4,
        free=domains.CR4.free & ~PKS,
        scope=tuple(cr4 & ~PKS for cr4 in domains.CR4.scope),
    ),
    "rflags": replace(domains.RFLAGS, free=domains.RFLAGS.free & ~TF),
    "access": Domain(among=tuple(kind for kind in domains.ACCESSES if kind & 1 == 0)),
}
"""The draws that Unicorn can take only some values of. Its CPU has no PKS, CET and LAM, and always
1-GByte pages and PSE-36; the root table has to be in RAM, and no instruction makes an implicit
access anywhere."""

DEPARTURES = {
    "reserved-1-gbyte-page-is-marked-accessed": (
        "a PDPTE that maps a page has its accessed flag set before its reserved bits 29:13 are "
        "checked; an entry that faults so translates nothing, SDM Vol. 3A, 4.8 "
        "(QEMU 5, target/i386/excp_helper.c: handle_mmu_fault)"
    ),
    "low-reserved-bits-of-a-pdpte-are-ignored": (
        "where PDPTEs of PAE paging are in memory, their reserved bits 2:1 and 8:5 go unchecked, "
        "SDM Vol. 3A, table 4-8 (QEMU 5, target/i386/excp_helper.c: handle_mmu_fault)"
    ),
    "table-outside-memory-reads-0": (
        "where there is no memory a table reads as entries that are not present; what a machine "
        "reads there is its own, see spec/memory.py (QEMU 5, memory.c: unassigned_mem_read)"
    ),
}

STUB = 0x5A_5A5A_0000
STUB_32 = 0x7A5A_0000
"""The same where physical addresses of entries have 32 bits."""
# The stub is two frames. The first is a paging structure at every level below the root: its entry 0
# maps the frame itself, entries 1 and 2 map the second frame, the code, for either mode. The first
# frame also holds the GDT and the stack for the one IRET that enters ring 3. A third frame is the
# same paging structure for 32-bit paging, whose entries have 4 bytes.
SUPERVISOR_PAGE, USER_PAGE = 1 * PAGE_BYTES, 2 * PAGE_BYTES
GDT, STACK = 0x800, 0xC00
MARKED = PRESENT | WRITABLE | USER | ACCESSED | DIRTY
"""Flags of the entries that lead to the stub, so that entering it sets none."""
ENTRANCES = range(511, 255, -1)
"""The indices of root entries to enter the stub by, all in the upper half of linear addresses. In
32-bit paging there are as many again beyond them."""

LOAD, STORE, JUMP, IRETQ, IRETD = 0x00, 0x10, 0x20, 0x30, 0x31
INSTRUCTIONS = {
    LOAD: "0f01ef 8a03",  # wrpkru; mov al, [rbx]
    STORE: "0f01ef 8803",  # wrpkru; mov [rbx], al
    JUMP: "0f01ef ffe3",  # wrpkru; jmp rbx
    IRETQ: "48cf",  # the second byte is IRETD
}
WRPKRU_BYTES, ACCESS_BYTES = 3, 2
"""WRPKRU is skipped while CR4.PKE is 0: it is undefined then, and PKRU without effect."""
USER_CODE, USER_DATA = 0x08 | 3, 0x10 | 3
DESCRIPTORS = (0, 0x00AF_FB00_0000_FFFF, 0x00CF_F300_0000_FFFF)
DESCRIPTORS_32 = (0, 0x00CF_FB00_0000_FFFF, 0x00CF_F300_0000_FFFF)
IA32_EFER = 0xC000_0080
GENERAL_PROTECTION, PAGE_FAULT = 13, 14

START = Cpu(cr0=PG | WP | PE, cr3=0, cr4=PAE, efer=LME | LMA | NXE, maxphyaddr=MAXPHYADDR)
START_32 = Cpu(cr0=PG | WP | PE, cr3=0, cr4=0, efer=0, maxphyaddr=MAXPHYADDR)
KNOWN_FAULTS = (
    (0, 0, 0, 0),
    (0, 1, 0, W),
    (0, 0, 1, U),
    (PRESENT, 1, 0, P | W),
    (PRESENT, 0, 1, P | U),
    (PRESENT, 1, 1, P | W | U),
)
"""An entry that is its own table at every level, W and U of an access by it, the error code."""


class Unicorn:
    """Unicorn behind the subject protocol. Raises `ImportError` if it is not installed."""

    capabilities = Capabilities(
        observes=frozenset({PA, ERROR_CODE, EFFECTS, OTHER_MODES}), preload=True, narrow=NARROW
    )
    start, stub = START, STUB
    """A state to begin with, and where the stub is."""

    def __init__(self) -> None:
        # An optional dependency, and a large one: imported by those who ask for it.
        import unicorn
        from unicorn import x86_const

        self._address_bits = WORD if self.start.long_mode else 0xFFFF_FFFF
        self._unicorn: Any = unicorn
        self._x86: Any = x86_const
        self._memory = mmap.mmap(-1, RAM_BYTES)
        self._ram = memoryview(self._memory).cast("Q")
        self._vector: int | None = None
        self._pa: int | None = None
        self._overwritten = 0
        self._uc = self._emulator()
        self._rings = self._contexts()
        self._faulted = self._uc.context_save()
        self._error_code = self._locate_error_code()
        self._other: Protected | None = None

    def translate(self, cpu: Cpu, memory: Sparse, access: Access) -> Outcome:
        """The outcome of the access made by emulated code, with the flags then found set in RAM.

        Raises `NotCovered`.
        """
        if cpu.long_mode != self.start.long_mode:
            self._other = self._other or Protected()
            return self._other.translate(cpu, memory, access)
        require_askable(cpu, memory, access)
        updates = self._ask(cpu, memory, access)
        if self._vector == PAGE_FAULT:
            self._uc.context_update(self._faulted)
            return PageFault(self._error_code.value, updates)
        if self._vector == GENERAL_PROTECTION:
            return NonCanonical()
        assert self._pa is not None
        return Translated(self._pa, 0, updates)

    def departure(
        self, cpu: Cpu, memory: Memory, access: Access, expected: Outcome, observed: Outcome
    ) -> str | None:
        """The name in `DEPARTURES` of this disagreement, None if it is not one of them."""
        if self._ignores_bits_of_the_pdpte(cpu, memory, access, expected, observed):
            return "low-reserved-bits-of-a-pdpte-are-ignored"
        if not isinstance(observed, PageFault):
            return None
        if isinstance(expected, OutsideMemory):
            beyond = OutsideMemory(expected.address, observed.may_update)
            if observed.error_code == describing(cpu, access) and self._agree(
                expected, beyond, memory
            ):
                return "table-outside-memory-reads-0"
        elif observed.error_code & RSVD:
            unmarked = without_reserved_1g(observed, memory, access)
            if unmarked != observed and self._agree(expected, unmarked, memory):
                return "reserved-1-gbyte-page-is-marked-accessed"
        return None

    def _ignores_bits_of_the_pdpte(
        self, cpu: Cpu, memory: Memory, access: Access, expected: Outcome, observed: Outcome
    ) -> bool:
        """Whether the PDPTE is to fault by bits 2:1 or 8:5, and without them it is all the same."""
        if cpu.long_mode or not cpu.cr4 & PAE or cpu.pdptes is not None:
            return False
        if not isinstance(expected, PageFault) or not expected.error_code & RSVD:
            return False
        where = cpu.cr3 & PDPT | (access.address >> 30 & 3) << 3
        pdpte = memory.load(where)
        if not pdpte & PRESENT or not pdpte & PDPTE_LOW_RESERVED:
            return False
        if (pdpte ^ where) & FRAME == 0:
            return True  # The PDPTE may be read as PDE too, where these bits count.
        without = Sparse({where: pdpte & ~PDPTE_LOW_RESERVED}, RAM_BYTES)
        return self.translate(cpu, without, access) == observed

    def _agree(self, expected: Outcome, observed: Outcome, memory: Memory) -> bool:
        return bool(agree(expected, observed, memory, self.capabilities))

    def _emulator(self) -> Any:
        """An emulator with RAM, the stub, and hooks that keep what happens first."""
        u, x86 = self._unicorn, self._x86
        uc = u.Uc(u.UC_ARCH_X86, u.UC_MODE_64 if self.start.long_mode else u.UC_MODE_32)
        uc.ctl_set_cpu_model(x86.UC_CPU_X86_ICELAKE_SERVER)
        uc.ctl_set_tlb_mode(u.UC_TLB_CPU)
        # Only the code can be executed, so that a fetch anywhere else is reported and goes no
        # further. Stores cannot be kept out so: flags could not be set in a read-only frame.
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        uc.mem_map_ptr(0, RAM_BYTES, u.UC_PROT_READ | u.UC_PROT_WRITE, address)
        tables = u.UC_PROT_READ | u.UC_PROT_WRITE
        uc.mem_map(self.stub, PAGE_BYTES, tables)
        uc.mem_map(self.stub + PAGE_BYTES, PAGE_BYTES, u.UC_PROT_READ | u.UC_PROT_EXEC)
        uc.mem_map(self.stub + 2 * PAGE_BYTES, PAGE_BYTES, tables)
        uc.hook_add(u.UC_HOOK_INTR, self._on_exception)
        uc.hook_add(u.UC_HOOK_MEM_READ | u.UC_HOOK_MEM_WRITE, self._on_access)
        beyond = u.UC_HOOK_MEM_UNMAPPED | u.UC_HOOK_MEM_FETCH_PROT
        uc.hook_add(beyond, self._on_refused_access)
        return uc

    def _on_exception(self, uc: Any, vector: int, data: object) -> None:
        self._vector = vector
        uc.emu_stop()

    def _on_access(self, uc: Any, kind: int, pa: int, size: int, value: int, data: object) -> None:
        """Before an access to RAM, and before a store anywhere."""
        self._pa = pa
        if kind == self._unicorn.UC_MEM_WRITE and pa < RAM_BYTES:
            self._overwritten = self._memory[pa]

    def _on_refused_access(
        self, uc: Any, kind: int, pa: int, size: int, value: int, data: object
    ) -> bool:
        """On an access where there is no memory, and a fetch where there is no code."""
        self._pa = pa
        return False

    def _contexts(self) -> tuple[Any, Any]:
        """The stub's state at CPL 0 and at CPL 3, which an emulated IRET enters."""
        uc, x86 = self._uc, self._x86
        entries, base = self._first_way_in()
        iret = self._write_stub(base)
        uc.reg_write(x86.UC_X86_REG_GDTR, (0, base + GDT, 8 * len(DESCRIPTORS) - 1, 0))
        uc.reg_write(self._register("SP"), base + STACK)
        self._set_controls(self.start)
        supervisor = uc.context_save()
        for address, entry in entries.items():
            self._ram[address >> 3] = entry
        # Unicorn looks up the byte before the end of a run, as what then runs, and would keep the
        # fault of a page that is not the user's: so the landing is not the page's first byte.
        uc.emu_start(base + SUPERVISOR_PAGE + iret, base + USER_PAGE + iret)
        for address in entries:
            self._ram[address >> 3] = 0
        return supervisor, uc.context_save()

    def _write_stub(self, base: Word) -> int:
        """Fill the stub's frames; where in the code the IRET stands that enters ring 3."""
        write_stub(self._uc, self.stub, words(*DESCRIPTORS))
        landing = base + USER_PAGE + IRETQ
        frame = words(landing, USER_CODE, RFLAGS_ONE, 0, USER_DATA)
        self._uc.mem_write(self.stub + STACK, frame)
        return IRETQ

    def _first_way_in(self) -> tuple[dict[Word, Word], Word]:
        """The way in while there is no case."""
        return self._way_in(self.start, Sparse({}, RAM_BYTES), Access(0))

    def _way_in(self, cpu: Cpu, memory: Sparse, access: Access) -> tuple[dict[Word, Word], Word]:
        """What to put into RAM besides the case's entries so that the stub can be reached, and the
        linear address of the stub.
        """
        entrance = free_entrance(cpu, memory)
        return {entrance: STUB | MARKED}, linear_address(cpu, entrance)

    def _register(self, name: str) -> int:
        """The API's number of a general register, of 64 bits or of 32."""
        number: int = getattr(self._x86, f"UC_X86_REG_{'RE'[self.start is START_32]}{name}")
        return number

    def _locate_error_code(self) -> ctypes.c_uint32:
        """Where a saved context holds the error code, for which the API has no name.

        It is found by faults whose codes are known. Raises `RuntimeError` if that fails.
        """
        places = set(range(0, self._faulted.size - 3, 4))
        for entry, write, user, code in KNOWN_FAULTS:
            self._ask(self.start, Sparse({0: entry}, RAM_BYTES), Access(0, write, 0, user))
            self._uc.context_update(self._faulted)
            context = bytes(self._faulted)
            places = {p for p in places if context[p : p + 4] == code.to_bytes(4, "little")}
        if len(places) != 1:
            version = self._unicorn.__version__
            raise RuntimeError(
                f"Unicorn {version}: its contexts hold the error code of a page fault in "
                f"{len(places)} places; 2.1.4 is known to work"
            )
        return ctypes.c_uint32.from_address(self._faulted.context.value + places.pop())

    def _ask(self, cpu: Cpu, memory: Sparse, access: Access) -> tuple[Update, ...]:
        """Make the access with these entries in RAM; the flags then found set. Leaves RAM empty."""
        entries, stub = self._way_in(cpu, memory, access)
        given = Sparse(memory.touched | entries, RAM_BYTES)
        for address, entry in given.touched.items():
            self._ram[address >> 3] = entry
        try:
            self._run(cpu, access, stub)
        finally:
            self._undo_store(access)
            updates = self._take_updates(given)
        self._require_made(access, given, updates)
        return updates

    def _run(self, cpu: Cpu, access: Access, stub: Word) -> None:
        """Make the access from the stub at this linear address. Sets `_vector` or `_pa`."""
        uc = self._uc
        self._vector = self._pa = None
        # This also clears the last exception, which would make the next one a double fault.
        uc.context_restore(self._rings[access.user])
        self._set_controls(cpu)
        uc.reg_write(self._register("BX"), access.address & self._address_bits)
        page = stub + (USER_PAGE if access.user else SUPERVISOR_PAGE)
        start = page + (JUMP if access.fetch else STORE if access.write else LOAD)
        until = start + WRPKRU_BYTES + ACCESS_BYTES
        if cpu.pke & cpu.long_mode:
            uc.reg_write(self._register("AX"), cpu.pkru)
        else:
            start += WRPKRU_BYTES
        try:
            uc.emu_start(start, until)
        except self._unicorn.UcError:
            if self._pa is None:
                raise

    def _set_controls(self, cpu: Cpu) -> None:
        """Set the registers that a walk depends on; that of CR3 flushes the TLB."""
        write, x86 = self._uc.reg_write, self._x86
        write(x86.UC_X86_REG_MSR, (IA32_EFER, cpu.efer))
        write(x86.UC_X86_REG_CR0, cpu.cr0)
        write(x86.UC_X86_REG_CR4, cpu.cr4)
        write(x86.UC_X86_REG_EFLAGS, cpu.rflags)
        write(x86.UC_X86_REG_CR3, cpu.cr3)

    def _require_made(self, access: Access, memory: Sparse, updates: tuple[Update, ...]) -> None:
        """Check that the run was just the access: no fault of the stub's, no flag cleared."""
        reached = self._pa is not None
        if self._vector == PAGE_FAULT:
            cr2 = self._uc.reg_read(self._x86.UC_X86_REG_CR2)
            made = not reached and cr2 == access.address & self._address_bits
        elif self._vector == GENERAL_PROTECTION:
            made = not reached and not updates
        else:
            made = reached and self._vector is None
        if not made or any(bits & memory.load(address) for address, bits in updates):
            raise RuntimeError(
                f"Unicorn did something other than the access: exception {self._vector}, "
                f"PA {self._pa}, changes {updates}"
            )

    def _undo_store(self, access: Access) -> None:
        if access.write and self._pa is not None and self._pa < RAM_BYTES:
            self._memory[self._pa] = self._overwritten

    def _take_updates(self, memory: Sparse) -> tuple[Update, ...]:
        """The entries in RAM that changed, and their bits that did. Leaves RAM empty."""
        ram, updates = self._ram, []
        for address, entry in memory.touched.items():
            changed = ram[address >> 3] ^ entry
            if changed:
                updates.append(Update(address, changed))
            ram[address >> 3] = 0
        if self._memory[:] != EMPTY:
            updates += [Update(i << 3, bits) for i, bits in enumerate(ram) if bits]
            self._memory[:] = EMPTY
        return tuple(updates)


class Protected(Unicorn):
    """The emulator of 32-bit and PAE paging."""

    start, stub = START_32, STUB_32

    def _write_stub(self, base: Word) -> int:
        write_stub(self._uc, self.stub, words(*DESCRIPTORS_32))
        landing = base + USER_PAGE + IRETD
        frame = halves(landing, USER_CODE, RFLAGS_ONE, 0, USER_DATA)
        self._uc.mem_write(self.stub + STACK, frame)
        return IRETD

    def _first_way_in(self) -> tuple[dict[Word, Word], Word]:
        # The stack segment is one of 16 bits until IRET loads it, so the stack is in the first 64K.
        return {0: self.stub + 2 * PAGE_BYTES | MARKED}, 0

    def _way_in(self, cpu: Cpu, memory: Sparse, access: Access) -> tuple[dict[Word, Word], Word]:
        if cpu.cr4 & PAE:
            return pae_way_in(cpu, memory, access, self.stub)
        return way_in_32(cpu, memory, self.stub + 2 * PAGE_BYTES)


def way_in_32(cpu: Cpu, memory: Sparse, tables: Word) -> tuple[dict[Word, Word], Word]:
    """The way in by a pair of entries of the page directory that the walk does not read."""
    root = cpu.cr3 & FRAME_32
    for index in range(1022, 510, -2):
        address = root | index << 2
        if address not in memory.touched:
            return {address: tables | MARKED}, index << 22
    raise NotCovered("the case gives every entry of the page directory: none is left for the stub")


def pae_way_in(
    cpu: Cpu, memory: Sparse, access: Access, tables: Word
) -> tuple[dict[Word, Word], Word]:
    """The way in by a PDPTE of another quarter than the access's. Unicorn has no PDPTE registers:
    it reads the four where CR3 says, so they are put there.
    """
    root, own = cpu.cr3 & PDPT, access.address >> 30 & 3
    quarter = own ^ 1
    pdptes = {root | index << 3: pdpte for index, pdpte in enumerate(cpu.pdptes or ())}
    if cpu.pdptes is not None and pdptes.keys() & memory.touched.keys():
        raise NotCovered("the walk reads memory where the PDPTEs are, which are in registers")
    entrance = root | quarter << 3
    if entrance in memory.touched:
        raise NotCovered("the walk reads the PDPTE that the stub is reached by")
    return {**pdptes, entrance: tables | PRESENT}, quarter << 30


def require_askable(cpu: Cpu, memory: Sparse, access: Access) -> None:
    """Raise `NotCovered` for a case that Unicorn cannot be asked, or not from this stub."""
    if cpu.maxphyaddr != MAXPHYADDR or not cpu.page1gb or not cpu.pse36 or cpu.rflags & TF:
        raise NotCovered("Unicorn's CPU has MAXPHYADDR 40, 1-GByte pages, PSE-36; TF hides faults")
    if cpu.cr4 & (PKS | CET | LAM_SUP) or cpu.cr3 >> MAXPHYADDR:
        raise NotCovered("Unicorn's CPU has no PKS, CET and LAM")
    if not cpu.cr0 & PG or cpu.rflags & VM:
        raise NotCovered("the stub runs with paging, and not in virtual-8086 mode")
    if access.implicit:
        raise NotCovered("no instruction makes an implicit access at an address of one's choice")
    if memory.limit < RAM_BYTES or cpu.cr3 & FRAME >= RAM_BYTES:
        raise NotCovered(f"the first {RAM_BYTES:#x} bytes are memory here, the root table in them")
    for address, entry in [*memory.touched.items(), *enumerate(cpu.pdptes or ())]:
        if address >= RAM_BYTES:
            raise NotCovered(f"a table at {address:#x}, beyond the {RAM_BYTES:#x} bytes of RAM")
        if leads_to_the_stub(cpu, entry):
            raise NotCovered(f"entry {entry:#x} leads to the region that holds the stub")


def leads_to_the_stub(cpu: Cpu, entry: Word) -> bool:
    """Whether the entry, or one of the two in 32-bit paging, leads to where the stub may be."""
    if cpu.long_mode:
        return (entry ^ STUB) & FRAME < 1 << 30
    halves_ = (entry,) if cpu.cr4 & PAE else (entry & 0xFFFF_FFFF, entry >> 32)
    return any((half ^ STUB_32) & FRAME < 1 << 22 for half in halves_)


def free_entrance(cpu: Cpu, memory: Sparse) -> Word:
    """The address of an entry of the root table that the walk under test does not read."""
    root = cpu.cr3 & FRAME
    for index in ENTRANCES:
        address = root | index << 3
        if address not in memory.touched:
            return address
    raise NotCovered("the case gives every entry of the root table: none is left for the stub")


def linear_address(cpu: Cpu, entrance: Word) -> Word:
    """The first linear address that the root entry at `entrance`, of the upper half, translates."""
    index = entrance >> 3 & 0x1FF
    return (index - 512 << (12 + 9 * (cpu.levels - 1))) & WORD


def write_stub(uc: Any, stub: Word, descriptors: bytes) -> None:
    """Fill the stub's frames."""
    code, tables_32 = stub + PAGE_BYTES, stub + 2 * PAGE_BYTES
    entries = stub | MARKED, code | MARKED & ~USER, code | MARKED
    uc.mem_write(stub, words(*entries))
    uc.mem_write(stub + GDT, descriptors)
    for offset, instructions in INSTRUCTIONS.items():
        uc.mem_write(code + offset, bytes.fromhex(instructions))
    if tables_32 < 1 << 32:
        uc.mem_write(tables_32, halves(*entries))


def halves(*values: Word) -> bytes:
    """Values of 4 bytes as memory holds them."""
    return b"".join(value.to_bytes(4, "little") for value in values)


def words(*values: Word) -> bytes:
    """Words as memory holds them."""
    return b"".join(value.to_bytes(8, "little") for value in values)


def describing(cpu: Cpu, access: Access) -> Word:
    """The error code of a not-present #PF: what it says of the access. SDM Vol. 3A, 4.7."""
    fetch = access.fetch & (cpu.nxe & cpu.cr4 >> 5 | cpu.smep)
    return access.write * W | access.user * U | fetch * I


def without_reserved_1g(fault: PageFault, memory: Memory, access: Access) -> PageFault:
    """The fault without the accessed flag of a PDPTE on its path with PS and bits 29:13 not 0."""

    def excused(update: Update) -> bool:
        entry = memory.load(update.address)
        on_path = update.address >> 3 & 0x1FF == access.address >> 30 & 0x1FF
        large = entry & (PRESENT | PAGE_SIZE) == PRESENT | PAGE_SIZE
        return on_path and large and entry & 0x3FFF_E000 != 0 and update.bits == ACCESSED

    return replace(fault, may_update=tuple(u for u in fault.may_update if not excused(u)))
