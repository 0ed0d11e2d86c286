"""The kernels as subjects: `optimized` runs their source, `compiled` their machine code."""

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt

from vapama.impl.kernels import long_mode
from vapama.spec.access import Access
from vapama.spec.cpu import Cpu
from vapama.spec.memory import Memory, Sparse
from vapama.spec.outcomes import (
    NonCanonical,
    Outcome,
    OutsideMemory,
    PageFault,
    Translated,
    Update,
)
from vapama.spec.subject import (
    EFFECTS,
    ERROR_CODE,
    LEVEL,
    LOADS,
    MANY,
    PA,
    UPDATES,
    Capabilities,
    NotCovered,
)
from vapama.spec.words import Word


def access_word(access: Access) -> int:
    """An access as the kernels take it."""
    return access.implicit | access.write << 1 | access.user << 2 | access.fetch << 4


def controls(cpu: Cpu) -> tuple[Word, Word, Word, Word, Word]:
    """What the kernels need of the control state: mode, reserved, cr3, pkru, pkrs."""
    return (
        long_mode.mode_word(cpu.cr0, cpu.cr4, cpu.efer, cpu.rflags, cpu.page1gb),
        long_mode.reserved_word(cpu.efer, cpu.maxphyaddr),
        cpu.cr3,
        cpu.pkru,
        cpu.pkrs,
    )


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


class Optimized:
    """The kernels as they are written."""

    capabilities = Capabilities(
        observes=frozenset({PA, LEVEL, ERROR_CODE, UPDATES, LOADS, MANY}), symbolic=True
    )

    kernels = (long_mode,)
    """The modules under test, whose branches a fuzzer looks at."""

    def opaque(self, faculty: str) -> list[tuple[ModuleType, str]]:
        """The kernels behind a faculty, by module and name, where others call them: what a proof
        leaves uninterpreted that rests on a lemma about the faculty.
        """
        return {"translate": [(long_mode, "walk"), (long_mode, "mark")]}[faculty]

    def translate(self, cpu: Cpu, memory: Memory, access: Access) -> Outcome:
        """The outcome of the walk kernel; it sets no flags when it faults."""
        marks = Marks()
        status, value = long_mode.walk_and_mark(
            Entries(memory),
            marks,
            memory.limit >> 3,
            *controls(cpu),
            access.address,
            access_word(access),
            [0] * 6,
        )
        return outcome(status, value, marks.updates)

    def translate_many(
        self, cpu: Cpu, memory: Memory, addresses: Sequence[int], access: Access
    ) -> list[Outcome]:
        """The outcomes of the batch kernel. Their updates are empty: it sets no flags."""
        statuses, values = [0] * len(addresses), [0] * len(addresses)
        long_mode.translate_many(
            Entries(memory),
            memory.limit >> 3,
            *controls(cpu),
            addresses,
            access_word(access),
            [0] * 6,
            statuses,
            values,
        )
        return [outcome(s, v) for s, v in zip(statuses, values, strict=True)]


class Compiled:
    """The kernels' machine code, on a real image: its flags are found in memory afterwards."""

    capabilities = Capabilities(
        observes=frozenset({PA, LEVEL, ERROR_CODE, EFFECTS, MANY}), preload=True
    )
    LARGEST = 1 << 30
    """The largest memory, in bytes, that an image is made for."""

    def __init__(self) -> None:
        # numba takes a while to import, and most commands need none of it.
        from vapama.impl.kernels.compiled import compiled

        self._walk_and_mark = compiled(long_mode.walk_and_mark)
        self._translate_many = compiled(long_mode.translate_many)
        self._image = np.zeros(0, dtype=np.uint64)
        self._path = np.zeros(6, dtype=np.uint64)
        # Compile now, so that the first case does not wait for it.
        cpu = Cpu(cr0=1 << 31 | 1, cr3=0, cr4=1 << 5, efer=1 << 8 | 1 << 10)
        self.translate(cpu, Sparse({0: 0}, 4096), Access(0))

    def translate(self, cpu: Cpu, memory: Sparse, access: Access) -> Outcome:
        """The outcome of the compiled walk, with the flags that it set in memory."""
        image, indices = self._load(memory)
        status, value = self._walk_and_mark(
            image,
            image,
            *_words(memory.limit >> 3, *controls(cpu)),
            *_words(access.address, access_word(access)),
            self._path,
        )
        after = image[indices].tolist()
        image[indices] = 0
        before = memory.touched.items()
        updates = tuple(Update(a, new & ~old) for (a, old), new in zip(before, after, strict=True))
        if status >= long_mode.FAULT:
            updates = tuple(update for update in updates if update.bits)
        return outcome(int(status), int(value), updates)

    def translate_many(
        self, cpu: Cpu, memory: Sparse, addresses: Sequence[int], access: Access
    ) -> list[Outcome]:
        """The outcomes of the compiled batch kernel."""
        image, indices = self._load(memory)
        statuses = np.zeros(len(addresses), dtype=np.uint64)
        values = np.zeros_like(statuses)
        self._translate_many(
            image,
            *_words(memory.limit >> 3, *controls(cpu)),
            np.array(addresses, dtype=np.uint64),
            *_words(access_word(access)),
            self._path,
            statuses,
            values,
        )
        image[indices] = 0
        results = zip(statuses.tolist(), values.tolist(), strict=True)
        return [outcome(status, value) for status, value in results]

    def _load(self, memory: Sparse) -> tuple[npt.NDArray[np.uint64], list[int]]:
        """An image of the memory's size that holds its entries and is 0 elsewhere, and where."""
        if memory.limit > self.LARGEST:
            raise NotCovered(f"a memory of {memory.limit:#x} bytes: no image is made of it")
        if len(self._image) < memory.limit >> 3:
            self._image = np.zeros(memory.limit >> 3, dtype=np.uint64)
        indices = [address >> 3 for address in memory.touched]
        for index, value in zip(indices, memory.touched.values(), strict=True):
            self._image[index] = value
        return self._image, indices


def translate_array(
    cpu: Cpu, image: npt.NDArray[np.uint64], addresses: npt.NDArray[np.uint64], access: Access
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Translate many addresses by the compiled kernel: statuses and values, as it gives them.

    `image` is physical memory as 8-byte entries: an array or a memory map. `access` says what kind
    of access; its own address does not count. No flags are set.
    """
    from vapama.impl.kernels.compiled import compiled

    statuses, values = np.zeros_like(addresses), np.zeros_like(addresses)
    compiled(long_mode.translate_many)(
        image,
        *_words(len(image), *controls(cpu)),
        addresses,
        *_words(access_word(access)),
        np.zeros(6, dtype=np.uint64),
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


def _words(*values: int) -> tuple[np.uint64, ...]:
    return tuple(map(np.uint64, values))
