"""The kernels as subjects: `optimized` runs their source, `compiled` their machine code."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as np_typing

from vapama.impl.faculties import HostMemory
from vapama.impl.kernels import batches, ept, legacy, long_mode, nested, npt, tlb, tlb_nested
from vapama.impl.tlb import GuestOperations, Operations, Overlay
from vapama.impl.vmm import Vmm
from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import LMA, LME, PAE, PE, PG, Cpu
from vapama.spec.memory import Memory, Sparse
from vapama.spec.outcomes import (
    EptMisconfiguration,
    EptViolation,
    GeneralProtection,
    NestedPageFault,
    NonCanonical,
    Outcome,
    OutsideMemory,
    PageFault,
    Translated,
    Update,
)
from vapama.spec.stage import Ept, Npt, Stage
from vapama.spec.steps import Plan
from vapama.spec.subject import (
    CACHED,
    EFFECTS,
    ERROR_CODE,
    GUEST_TLB,
    LEVEL,
    LOADS,
    MANY,
    MASKING,
    METADATA,
    NESTED,
    NESTED_MANY,
    OTHER_MODES,
    OVERCOMMIT,
    PA,
    PDPTES,
    SECOND_STAGE,
    SECOND_STAGE_MANY,
    SHADOW_STACKS,
    TLB,
    UPDATES,
    VIEW,
    VMM,
    Cached,
    Capabilities,
    GuestTlb,
    NotCovered,
    Tlb,
)
from vapama.spec.words import Word, ite

T = TypeVar("T")
Refused: TypeAlias = GeneralProtection | OutsideMemory


def access_word(access: Access) -> int:
    """An access as the kernels take it."""
    _, write, fetch, user, implicit, shadow_stack = access
    return implicit | write << 1 | user << 2 | fetch << 4 | shadow_stack << 6


def controls(cpu: Cpu) -> tuple[Word, Word, Word, Word, Word]:
    """What the kernels of long mode need of the control state: mode, reserved, cr3, pkru, pkrs."""
    cr0, cr3, cr4, efer, rflags, pkru, pkrs, page1gb, maxphyaddr, *_ = cpu
    mode = long_mode.mode_word(cr0, cr4, efer, rflags, page1gb)
    return mode, long_mode.reserved_word(efer, maxphyaddr), cr3, pkru, pkrs


def legacy_controls(cpu: Cpu, pdptes: T) -> tuple[Word, Word, Word, T]:
    """What those of the other modes need: mode, reserved, cr3, pdptes."""
    registers = 0 if cpu.pdptes is None else 1
    return (
        legacy.mode_word(cpu.cr0, cpu.cr4, cpu.efer, cpu.rflags, registers),
        legacy.reserved_word(cpu.cr4, cpu.efer, cpu.maxphyaddr, cpu.pse36),
        cpu.cr3,
        pdptes,
    )


def guest_physical_word(access: GuestPhysicalAccess) -> int:
    """A guest-physical access as the kernels take it."""
    return (
        access.linear ^ 1
        | access.write << 1
        | access.user << 2
        | access.table << 3
        | access.fetch << 4
        | access.writable << 5
        | access.no_execute << 6
        | access.shadow_stack << 7
    )


def stage_controls(stage: Stage) -> tuple[Word, Word, Word]:
    """What the kernels need of a second stage's control state: mode, reserved, root."""
    if isinstance(stage, Ept):
        mode = ept.mode_word(stage.eptp, stage.mbec, stage.capabilities)
        return mode, ept.reserved_word(stage.maxphyaddr), stage.eptp
    mode = npt.mode_word(stage.cr4, stage.efer, stage.page1gb)
    return mode, npt.reserved_word(mode, stage.maxphyaddr), stage.ncr3


def stage_words(stage: Stage) -> tuple[Word, Word, Word, Word]:
    """The same with the kind of second stage before it, where a kernel is for both."""
    kind = nested.EPT if isinstance(stage, Ept) else nested.NPT
    return (kind, *stage_controls(stage))


def nested_controls(
    cpu: Cpu, stage: Stage
) -> tuple[Word, Word, Word, Word, Word, Word, Word, Word, Word]:
    """What the two-dimensional kernels need: of the guest's control state, and of the stage's.

    Raises `NotCovered` for a guest in another mode than 4-level and 5-level paging.
    """
    if not cpu.efer & LMA:
        raise NotCovered("two-dimensional kernels walk guests in 4-level and 5-level paging alone")
    return (*controls(cpu), *stage_words(stage))


def stage_kernels(stage: Stage) -> ModuleType:
    """The kernels of a second stage: both modules have the same functions."""
    return ept if isinstance(stage, Ept) else npt


class Pdptes:
    """The PDPTE registers as the kernels index them, by a word that need not be a plain int."""

    __slots__ = ("registers",)

    def __init__(self, registers: Sequence[Word] | None) -> None:
        self.registers = registers or (0, 0, 0, 0)

    def __getitem__(self, index: int) -> Word:
        """The register with this index."""
        a, b, c, d = self.registers
        return ite(index >= 2, ite(index == 2, c, d), ite(index == 0, a, b))


class Entries:
    """A memory as the kernels index it: the i-th 8-byte entry."""

    __slots__ = ("load", "memory")

    def __init__(self, memory: Memory) -> None:
        self.memory, self.load = memory, memory.load

    def __getitem__(self, index: int) -> int:
        """The entry with this index."""
        return self.load(index << 3)


class Marks:
    """In place of memory for the `mark` kernel: keeps the bits that it sets, in order."""

    __slots__ = ("updates",)

    def __init__(self) -> None:
        self.updates: tuple[Update, ...] = ()

    def __getitem__(self, index: int) -> int:
        """No bits: what is written back is then what is set."""
        return 0

    def __setitem__(self, index: int, bits: int) -> None:
        """Keep an update of the entry with this index."""
        self.updates = self.updates + (Update(index << 3, bits),)  # noqa: RUF005 (see lemmas)


class Optimized(HostMemory):
    """The kernels as they are written."""

    capabilities = Capabilities(
        observes=frozenset({PA, LEVEL, ERROR_CODE, UPDATES, LOADS, MANY, PDPTES})
        | {OTHER_MODES, MASKING, METADATA, SHADOW_STACKS}
        | {SECOND_STAGE, SECOND_STAGE_MANY, TLB, GUEST_TLB, CACHED, NESTED, NESTED_MANY}
        | {VMM, VIEW, OVERCOMMIT}
        | HostMemory.OBSERVES,
        symbolic=True,
    )

    kernels = (long_mode, legacy, ept, npt, nested, batches, tlb)
    """The modules under test, whose branches a fuzzer looks at."""

    def opaque(self, faculty: str) -> list[tuple[ModuleType, str]]:
        """The kernels behind a faculty, by module and name, where others call them: what a proof
        leaves uninterpreted that rests on a lemma about the faculty.
        """
        if faculty == SECOND_STAGE:
            own = [(module, name) for module in (ept, npt) for name in ("walk", "mark_walk")]
            names = ("walk_ept", "mark_ept", "walk_npt", "mark_npt")
            return [*own, *((nested, name) for name in names)]
        if faculty == NESTED:
            return [(nested, "walk"), (nested, "mark")]
        if faculty == METADATA:
            return [(module, METADATA) for module in (long_mode, nested)]
        return [(long_mode, "walk"), (long_mode, "mark")]

    def without_metadata(self, cpu: Cpu, access: Access) -> Word:
        """The linear address that is walked in 4-level and 5-level paging: masked, if it is to be.

        Raises `NotCovered` for a control state in another mode.
        """
        if not cpu.efer & LMA:
            raise NotCovered("addresses are masked in 4-level and 5-level paging alone")
        mode, _, cr3, *_ = controls(cpu)
        return long_mode.without_metadata(mode, cr3, access.address, access_word(access))

    def translate(self, cpu: Cpu, memory: Memory, access: Access) -> Outcome:
        """The outcome of the walk kernel; it sets no flags when it faults."""
        kernels, words = _kernels(cpu)
        marks = Marks()
        status, value = kernels.walk_and_mark(
            Entries(memory),
            marks,
            memory.limit >> 3,
            *words,
            access.address,
            access_word(access),
            [0] * 6,
        )
        return outcome(status, value, marks.updates)

    def translate_many(
        self, cpu: Cpu, memory: Memory, addresses: Sequence[int], access: Access
    ) -> list[Outcome]:
        """The outcomes of the batch kernel. Their updates are empty: it sets no flags."""
        kernel, words = _batch(cpu)
        statuses, values = [0] * len(addresses), [0] * len(addresses)
        kernel(
            Entries(memory),
            memory.limit >> 3,
            *words,
            addresses,
            len(addresses),
            access_word(access),
            *self._lanes(),
            statuses,
            values,
        )
        return [outcome(s, v) for s, v in zip(statuses, values, strict=True)]

    def load_pdptes(self, cpu: Cpu, memory: Memory) -> Sequence[Word] | Refused:
        """The PDPTE registers as MOV to CR3 loads them."""
        registers = [0] * 4
        _, reserved, cr3, _ = legacy_controls(cpu, None)
        status = legacy.load_pdptes(Entries(memory), memory.limit >> 3, reserved, cr3, registers)
        return loaded(status, registers, cr3 & legacy.PDPT)

    def second_stage(self, stage: Stage, memory: Memory, access: GuestPhysicalAccess) -> Outcome:
        """The outcome of the second stage's walk kernel; it sets no flags when it faults."""
        marks = Marks()
        status, value = stage_kernels(stage).walk_and_mark(
            Entries(memory),
            marks,
            memory.limit >> 3,
            *stage_controls(stage),
            access.address,
            guest_physical_word(access),
            [0] * 6,
        )
        return stage_outcome(stage, access.address, status, value, marks.updates)

    def second_stage_many(
        self, stage: Stage, memory: Memory, gpas: Sequence[int], access: GuestPhysicalAccess
    ) -> list[Outcome]:
        """The outcomes of the second stage's batch kernel. Their updates are empty."""
        statuses, values = [0] * len(gpas), [0] * len(gpas)
        batches.second_stage_many(
            Entries(memory),
            memory.limit >> 3,
            *stage_words(stage),
            gpas,
            len(gpas),
            guest_physical_word(access),
            *self._lanes(),
            statuses,
            values,
        )
        results = zip(gpas, statuses, values, strict=True)
        return [stage_outcome(stage, gpa, status, value) for gpa, status, value in results]

    def translate_nested(self, cpu: Cpu, stage: Stage, memory: Memory, access: Access) -> Outcome:
        """The outcome of the two-dimensional walk kernel; it sets no flags when it stops."""
        marks = Marks()
        status, value, gpa = nested.walk_and_mark(
            Entries(memory),
            marks,
            memory.limit >> 3,
            *nested_controls(cpu, stage),
            access.address,
            access_word(access),
            [[0] * 6 for _ in range(6)],
            [0] * 18,
        )
        return nested_outcome(stage, gpa, status, value, marks.updates)

    def translate_nested_many(
        self, cpu: Cpu, stage: Stage, memory: Memory, addresses: Sequence[int], access: Access
    ) -> list[Outcome]:
        """The outcomes of the two-dimensional batch kernel. Their updates are empty."""
        results = [[0] * len(addresses) for _ in range(3)]
        batches.translate_nested_many(
            Entries(memory),
            memory.limit >> 3,
            *nested_controls(cpu, stage),
            addresses,
            len(addresses),
            access_word(access),
            [[0] * 6 for _ in range(6)],
            [0] * 18,
            *self._lanes(),
            *results,
        )
        return [nested_outcome(stage, gpa, s, v) for s, v, gpa in zip(*results, strict=True)]

    WIDTH = 2
    """How many walks are a group: so few that two groups are soon met."""

    def _lanes(self) -> tuple[list[list[int]], int]:
        """What the batch kernels keep of a group, and how many walks it has."""
        return [[0] * max(self.WIDTH, 6) for _ in range(batches.ROWS)], self.WIDTH

    def vmm(self, plan: Plan) -> Vmm:
        """A hypervisor at power-on."""
        return Vmm(plan)

    def tlb(self, cpu: Cpu, memory: Memory, vpid: Word = 0, sets: int = 1, ways: int = 4) -> Tlb:
        """A processor with a software TLB, a small one unless told otherwise."""
        return SoftwareTlb(cpu, memory, vpid, sets, ways)

    def guest_tlb(
        self,
        cpu: Cpu,
        stage: Stage,
        memory: Memory,
        vpid: Word = 1,
        sets: int = 1,
        ways: int = 4,
    ) -> GuestTlb:
        """A processor with a software TLB that runs a guest on a second stage."""
        return SoftwareGuestTlb(cpu, stage, memory, vpid, sets, ways)


class Source(Operations):
    """A TLB whose kernels run as they are written, on a memory that can be written to."""

    memory: Overlay

    def _set(self, marks: Marks) -> tuple[Update, ...]:
        """Set in memory the flags that a kernel has set; all of them."""
        for address, bits in marks.updates:
            self.memory.write(address, self.memory.load(address) | bits)
        return marks.updates

    def write(self, address: Word, value: Word) -> None:
        """Put `value` into the entry at `address` in memory, which invalidates nothing."""
        self.memory.write(address, value)


class SoftwareTlb(Source):
    """The kernels of the TLB."""

    def __init__(self, cpu: Cpu, memory: Memory, vpid: Word, sets: int, ways: int) -> None:
        super().__init__(cpu, vpid, sets, ways)
        self.memory = Overlay(memory)

    def translate(self, access: Access) -> Outcome:
        """The outcome of an access; its updates are the flags that it set in memory."""
        marks = Marks()
        status, value = tlb.translate(
            self.translations,
            self.structures,
            self.memory,
            marks,
            self.memory.limit >> 3,
            *controls(self.cpu),
            self.address_space(),
            self.cpu.cr4 >> 7 & 1,
            access.address,
            access_word(access),
            self.path,
        )
        return outcome(status, value, self._set(marks))


class SoftwareGuestTlb(Source, GuestOperations):
    """The kernels of a guest's TLB."""

    def __init__(
        self, cpu: Cpu, stage: Stage, memory: Memory, vpid: Word, sets: int, ways: int
    ) -> None:
        GuestOperations.__init__(self, cpu, stage, vpid, sets, ways)
        self.memory = Overlay(memory)

    def translate(self, access: Access) -> Outcome:
        """The outcome of an access; its updates are the flags that it set in memory."""
        marks = Marks()
        status, value, gpa = tlb_nested.translate(
            self.translations,
            self.structures,
            self.physical,
            self.memory,
            marks,
            self.memory.limit >> 3,
            *nested_controls(self.cpu, self.stage),
            self.address_space(),
            self.cpu.cr4 >> 7 & 1,
            access.address,
            access_word(access),
            self.paths,
            self.trace,
        )
        return nested_outcome(self.stage, gpa, status, value, self._set(marks))


def _kernels(cpu: Cpu) -> tuple[Any, tuple[Any, ...]]:
    """The kernels for a control state's mode, and what they need of it."""
    if cpu.efer & LMA:
        return long_mode, controls(cpu)
    return legacy, legacy_controls(cpu, Pdptes(cpu.pdptes))


def _batch(cpu: Cpu) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """The batch kernel for a control state's mode, and what it needs of it."""
    kernels, words = _kernels(cpu)
    return batches.translate_many if kernels is long_mode else batches.translate_many_singly, words


def _compiled_kernels(cpu: Cpu) -> tuple[Any, tuple[Any, ...]]:
    """The same for machine code."""
    if cpu.efer & LMA:
        return long_mode, _words(*controls(cpu))
    pdptes = np.array(cpu.pdptes or (0, 0, 0, 0), dtype=np.uint64)
    mode, reserved, cr3, _ = legacy_controls(cpu, pdptes)
    return legacy, (*_words(mode, reserved, cr3), pdptes)


class Compiled:
    """The kernels' machine code, on a real image: its flags are found in memory afterwards."""

    capabilities = Capabilities(
        observes=frozenset({PA, LEVEL, ERROR_CODE, EFFECTS, MANY, PDPTES})
        | {OTHER_MODES, MASKING, SHADOW_STACKS}
        | {SECOND_STAGE, SECOND_STAGE_MANY, NESTED, NESTED_MANY, TLB},
        preload=True,
    )
    LARGEST = 1 << 30
    """The largest memory, in bytes, that an image is made for."""

    def __init__(self, ready: bool = True) -> None:
        # numba takes a while to import, and most commands need none of it.
        from vapama.impl.kernels.compiled import compiled

        self._compiled = compiled
        self._image = np.zeros(0, dtype=np.uint64)
        self._path = np.zeros(6, dtype=np.uint64)
        self._paths = np.zeros((6, 6), dtype=np.uint64)
        self._trace = np.zeros(18, dtype=np.uint64)
        if ready:
            self._get_ready()

    def _get_ready(self) -> None:
        """Compile all, so that the first case does not wait for it."""
        for efer in (LME | LMA, 0):
            cpu = Cpu(cr0=PG | PE, cr3=0, cr4=PAE, efer=efer)
            self.translate(cpu, Sparse({0: 0}, 4096), Access(0))
        for stage in (Ept(0x1E), Npt(0)):
            self.second_stage(stage, Sparse({0: 0}, 4096), GuestPhysicalAccess(0))
            self.second_stage_many(stage, Sparse({0: 0}, 4096), [0], GuestPhysicalAccess(0))
        guest = Cpu(cr0=PG | PE, cr3=0, cr4=PAE, efer=LME | LMA)
        self.translate_nested(guest, Ept(0x1E), Sparse({0: 0}, 4096), Access(0))
        self.translate_nested_many(guest, Ept(0x1E), Sparse({0: 0}, 4096), [0], Access(0))
        self._compile_tlb()

    def _compile_tlb(self) -> None:
        cpu = Cpu(cr0=PG | PE, cr3=0, cr4=PAE, efer=LME | LMA)
        cached = self.tlb(cpu, Sparse({0: 0}, 4096))
        cached.translate(Access(0))
        cached.change(cpu)
        cached.invlpg(0)
        for kind in range(4):
            cached.invpcid(kind)
            cached.invvpid(kind)

    def translate(self, cpu: Cpu, memory: Sparse, access: Access) -> Outcome:
        """The outcome of the compiled walk, with the flags that it set in memory."""
        kernels, words = _compiled_kernels(cpu)
        image, indices = self._load(memory)
        status, value = self._compiled(kernels.walk_and_mark)(
            image,
            image,
            *_words(memory.limit >> 3),
            *words,
            *_words(access.address, access_word(access)),
            self._path,
        )
        updates = self._updates(memory, indices, status < long_mode.FAULT)
        return outcome(int(status), int(value), updates)

    def translate_many(
        self, cpu: Cpu, memory: Sparse, addresses: Sequence[int], access: Access
    ) -> list[Outcome]:
        """The outcomes of the compiled batch kernel."""
        image, indices = self._load(memory)
        image = image[: memory.limit >> 3]
        statuses, values = translate_array(cpu, image, _row(addresses), access)
        image[indices] = 0
        results = zip(statuses.tolist(), values.tolist(), strict=True)
        return [outcome(status, value) for status, value in results]

    def load_pdptes(self, cpu: Cpu, memory: Memory) -> Sequence[Word] | Refused:
        """The PDPTE registers as MOV to CR3 loads them, by machine code."""
        first = cpu.cr3 & legacy.PDPT
        inside = range(first, min(first + 32, memory.limit), 8)
        sparse = Sparse({address: memory.load(address) for address in inside}, memory.limit)
        image, indices = self._load(sparse)
        _, reserved, cr3, _ = legacy_controls(cpu, None)
        registers = np.zeros(4, dtype=np.uint64)
        status = self._compiled(legacy.load_pdptes)(
            image, *_words(memory.limit >> 3, reserved, cr3), registers
        )
        image[indices] = 0
        return loaded(int(status), registers.tolist(), first)

    def second_stage(self, stage: Stage, memory: Sparse, access: GuestPhysicalAccess) -> Outcome:
        """The outcome of the second stage's compiled walk, with the flags that it set in memory."""
        image, indices = self._load(memory)
        status, value = self._compiled(stage_kernels(stage).walk_and_mark)(
            image,
            image,
            *_words(memory.limit >> 3, *stage_controls(stage)),
            *_words(access.address, guest_physical_word(access)),
            self._path,
        )
        updates = self._updates(memory, indices, status < long_mode.FAULT)
        return stage_outcome(stage, access.address, int(status), int(value), updates)

    def second_stage_many(
        self, stage: Stage, memory: Sparse, gpas: Sequence[int], access: GuestPhysicalAccess
    ) -> list[Outcome]:
        """The outcomes of the second stage's compiled batch kernel."""
        image, indices = self._load(memory)
        statuses, values = np.zeros((2, len(gpas)), dtype=np.uint64)
        self._compiled(batches.second_stage_many)(
            image,
            *_words(memory.limit >> 3, *stage_words(stage)),
            _row(gpas),
            *_words(len(gpas), guest_physical_word(access)),
            *_lanes(),
            statuses,
            values,
        )
        image[indices] = 0
        results = zip(gpas, statuses.tolist(), values.tolist(), strict=True)
        return [stage_outcome(stage, gpa, status, value) for gpa, status, value in results]

    def tlb(self, cpu: Cpu, memory: Memory, vpid: Word = 0, sets: int = 1, ways: int = 4) -> Tlb:
        """A processor with a software TLB, a small one unless told otherwise."""
        if memory.limit > self.LARGEST or not isinstance(memory, Sparse):
            raise NotCovered(f"a memory of {memory.limit:#x} bytes: no image is made of it")
        return CompiledTlb(cpu, memory, vpid, sets, ways)

    def guest_tlb(
        self, cpu: Cpu, stage: Stage, memory: Memory, vpid: Word = 1, sets: int = 1, ways: int = 4
    ) -> GuestTlb:
        """A processor with a software TLB that runs a guest on a second stage. It takes so long to
        compile that the subject does not offer it to checks; a test compares it with its source.
        """
        if not isinstance(memory, Sparse):
            raise NotCovered("machine code runs on memory that can be laid out")
        return CompiledGuestTlb(cpu, stage, memory, vpid, sets, ways)

    def translate_nested(self, cpu: Cpu, stage: Stage, memory: Sparse, access: Access) -> Outcome:
        """The outcome of the compiled two-dimensional walk, with the flags that it set."""
        words = nested_controls(cpu, stage)
        image, indices = self._load(memory)
        status, value, gpa = self._compiled(nested.walk_and_mark)(
            image,
            image,
            *_words(memory.limit >> 3, *words, access.address, access_word(access)),
            self._paths,
            self._trace,
        )
        updates = self._updates(memory, indices, status < long_mode.FAULT)
        return nested_outcome(stage, int(gpa), int(status), int(value), updates)

    def translate_nested_many(
        self,
        cpu: Cpu,
        stage: Stage,
        memory: Sparse,
        addresses: Sequence[int],
        access: Access,
    ) -> list[Outcome]:
        """The outcomes of the compiled two-dimensional batch kernel."""
        nested_controls(cpu, stage)  # refuses what is not covered while the image is empty
        image, indices = self._load(memory)
        image = image[: memory.limit >> 3]
        results = translate_nested_array(cpu, stage, image, _row(addresses), access)
        image[indices] = 0
        triples = zip(*(row.tolist() for row in results), strict=True)
        return [nested_outcome(stage, gpa, status, value) for status, value, gpa in triples]

    def _updates(self, memory: Sparse, indices: list[int], translated: bool) -> tuple[Update, ...]:
        """The flags that a walk set in the image; with all the entries if it translated. The image
        is cleared for the next walk.
        """
        after = self._image[indices].tolist()
        self._image[indices] = 0
        before = memory.touched.items()
        updates = tuple(Update(a, new & ~old) for (a, old), new in zip(before, after, strict=True))
        return updates if translated else tuple(update for update in updates if update.bits)

    def _load(self, memory: Sparse) -> tuple[np_typing.NDArray[np.uint64], list[int]]:
        """An image of the memory's size that holds its entries and is 0 elsewhere, and where."""
        if memory.limit > self.LARGEST:
            raise NotCovered(f"a memory of {memory.limit:#x} bytes: no image is made of it")
        if len(self._image) < memory.limit >> 3:
            self._image = np.zeros(memory.limit >> 3, dtype=np.uint64)
        indices = [address >> 3 for address in memory.touched]
        for index, value in zip(indices, memory.touched.values(), strict=True):
            self._image[index] = value
        return self._image, indices


class MachineCode(Operations):
    """A TLB whose kernels run as machine code, on an image of memory."""

    image: Any

    def _load(self, memory: Sparse) -> None:
        self.image = self._array(memory.limit >> 3)
        for address, value in memory.touched.items():
            self.image[address >> 3] = value

    def _array(self, count: int) -> Any:
        return np.zeros(count, dtype=np.uint64)

    def _table(self, rows: int, columns: int) -> Any:
        return np.zeros((rows, columns), dtype=np.uint64)

    def _run(self, kernel: Callable[..., Any], cache: Any, *words: Word) -> Any:
        return _compiled(kernel)(cache, *_words(*words))

    def _call(self, kernel: Callable[..., Any], *words: Word) -> Any:
        return _compiled(kernel)(self.translations, self.structures, *_words(*words))

    def _updates(self, before: Any) -> tuple[Update, ...]:
        return tuple(
            Update(int(index) << 3, int(self.image[index] & ~before[index]))
            for index in np.flatnonzero(before != self.image)
        )

    def write(self, address: Word, value: Word) -> None:
        """Put `value` into the entry at `address` in memory, which invalidates nothing."""
        self.image[address >> 3] = value

    def cached(self) -> list[Cached]:
        """All that is cached."""
        return [Cached(*map(int, found)) for found in super().cached()]


class CompiledTlb(MachineCode):
    """The machine code of the TLB's kernels."""

    def __init__(self, cpu: Cpu, memory: Sparse, vpid: Word, sets: int, ways: int) -> None:
        super().__init__(cpu, vpid, sets, ways)
        self._load(memory)

    def translate(self, access: Access) -> Outcome:
        """The outcome of an access; its updates are the bits that it newly set in memory."""
        before = self.image.copy()
        status, value = _compiled(tlb.translate)(
            self.translations,
            self.structures,
            self.image,
            self.image,
            *_words(len(self.image), *controls(self.cpu)),
            *_words(self.address_space(), self.cpu.cr4 >> 7 & 1),
            *_words(access.address, access_word(access)),
            self.path,
        )
        return outcome(int(status), int(value), self._updates(before))


class CompiledGuestTlb(MachineCode, GuestOperations):
    """The machine code of those of a guest's TLB."""

    def __init__(
        self, cpu: Cpu, stage: Stage, memory: Sparse, vpid: Word, sets: int, ways: int
    ) -> None:
        GuestOperations.__init__(self, cpu, stage, vpid, sets, ways)
        self._load(memory)

    def translate(self, access: Access) -> Outcome:
        """The outcome of an access; its updates are the bits that it newly set in memory."""
        before = self.image.copy()
        status, value, gpa = _compiled(tlb_nested.translate)(
            self.translations,
            self.structures,
            self.physical,
            self.image,
            self.image,
            *_words(len(self.image), *nested_controls(self.cpu, self.stage)),
            *_words(self.address_space(), self.cpu.cr4 >> 7 & 1),
            *_words(access.address, access_word(access)),
            self.paths,
            self.trace,
        )
        return nested_outcome(self.stage, int(gpa), int(status), int(value), self._updates(before))


def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    from vapama.impl.kernels.compiled import compiled

    return compiled(kernel)


def translate_nested_array(
    cpu: Cpu,
    stage: Stage,
    image: np_typing.NDArray[np.uint64],
    addresses: np_typing.NDArray[np.uint64],
    access: Access,
) -> tuple[np_typing.NDArray[np.uint64], ...]:
    """`translate_array` for a guest under a second stage: statuses, values and guest-physical
    addresses, as the kernel gives them.
    """
    from vapama.impl.kernels.compiled import compiled

    statuses, values, gpas = (np.zeros_like(addresses) for _ in range(3))
    compiled(batches.translate_nested_many)(
        image,
        *_words(len(image), *nested_controls(cpu, stage)),
        addresses,
        *_words(len(addresses), access_word(access)),
        np.zeros((6, 6), dtype=np.uint64),
        np.zeros(18, dtype=np.uint64),
        *_lanes(),
        statuses,
        values,
        gpas,
    )
    return statuses, values, gpas


def translate_array(
    cpu: Cpu,
    image: np_typing.NDArray[np.uint64],
    addresses: np_typing.NDArray[np.uint64],
    access: Access,
) -> tuple[np_typing.NDArray[np.uint64], np_typing.NDArray[np.uint64]]:
    """Translate many addresses by the compiled kernel: statuses and values, as it gives them.

    `image` is physical memory as 8-byte entries: an array or a memory map. `access` says what kind
    of access; its own address does not count. No flags are set.
    """
    from vapama.impl.kernels.compiled import compiled

    statuses, values = np.zeros_like(addresses), np.zeros_like(addresses)
    kernel, _ = _batch(cpu)
    _, words = _compiled_kernels(cpu)
    compiled(kernel)(
        image,
        *_words(len(image)),
        *words,
        addresses,
        *_words(len(addresses), access_word(access)),
        *_lanes(),
        statuses,
        values,
    )
    return statuses, values


def outcome(status: int, value: int, updates: tuple[Update, ...] = ()) -> Outcome:
    """A kernel's result, and the flags that it set, as an outcome."""
    if status < long_mode.FAULT:
        return Translated(value, status, updates)
    if status == long_mode.FAULT:
        return PageFault(value, updates)
    if status == long_mode.OUTSIDE:
        return OutsideMemory(value, updates)
    return NonCanonical()


def loaded(status: int, registers: Sequence[Word], first: Word) -> Sequence[Word] | Refused:
    """The PDPTE registers by the status of their load, or why it was refused."""
    if status == legacy.GENERAL_PROTECTION:
        return GeneralProtection()
    return OutsideMemory(first) if status == long_mode.OUTSIDE else registers


def stage_outcome(
    stage: Stage, gpa: int, status: int, value: int, updates: tuple[Update, ...] = ()
) -> Outcome:
    """A second stage's kernel's result, and the flags that it set, as an outcome."""
    if status < long_mode.FAULT:
        return Translated(value, status, updates)
    if status == long_mode.OUTSIDE:
        return OutsideMemory(value, updates)
    if not isinstance(stage, Ept):
        return NestedPageFault(value, gpa, updates)
    if status == ept.MISCONFIGURED:
        return EptMisconfiguration(gpa, updates)
    return EptViolation(value, gpa, updates)


def _words(*values: int) -> tuple[np.uint64, ...]:
    return tuple(map(np.uint64, values))


def _row(values: Sequence[int]) -> np_typing.NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


WIDTH = 64
"""How many walks are a group in machine code: of 32, the loops around them take longer, and more
gain nothing.
"""


def _lanes() -> tuple[np_typing.NDArray[np.uint64], np.uint64]:
    """What the batch kernels keep of a group, and how many walks it has."""
    return np.zeros((batches.ROWS, WIDTH), dtype=np.uint64), np.uint64(WIDTH)


def nested_outcome(
    stage: Stage, gpa: int, status: int, value: int, updates: tuple[Update, ...] = ()
) -> Outcome:
    """A two-dimensional kernel's result, and the flags that it set, as an outcome."""
    if gpa & nested.EXIT:
        return stage_outcome(stage, gpa & ~nested.EXIT, status, value, updates)
    return outcome(status, value, updates)
