"""What the benchmarks translate: page tables as raw files, and addresses with their truth.

The real image is the shipped Linux guest's. The large one is made: 512 MBytes of PTEs, more than
any cache holds, in page tables at random places.
"""

import struct
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vapama.snapshot.truth import SHIPPED, load_snapshot
from vapama.spec.cpu import LMA, LME, NXE, PAE, PE, PG, WP, Cpu
from vapama.spec.stage import Ept

Words = npt.NDArray[np.uint64]
PRESENT_USER = np.uint64(0x67)
"""P, R/W, U/S, A and D."""
TABLES = 131_072
"""Page tables of the large image: each of 4 KBytes maps 2 MBytes."""


@dataclass(frozen=True)
class Question:
    """An image of physical memory, and user-mode reads with the physical addresses they go to."""

    name: str
    cpu: Cpu
    image: Words
    addresses: Words
    expected: Words
    folder: Path

    @cached_property
    def file(self) -> Path:
        """The image as a raw file, with holes where it is 0."""
        path = self.folder / f"{self.name}.raw"
        pages = self.image.reshape(-1, 512)
        with path.open("wb") as file:
            for frame in np.flatnonzero(pages.any(axis=1)).tolist():
                file.seek(frame * 4096)
                file.write(pages[frame].tobytes())
            file.truncate(self.image.nbytes)
        return path

    @cached_property
    def core(self) -> Path:
        """The image as the ELF core of a Linux kernel, whose own page tables are the guest's."""
        note = _note("VMCOREINFO", _VMCOREINFO.format(root=KERNEL + self.cpu.cr3).encode())
        start, size = 8192, self.image.nbytes
        identity = b"\x7fELF\2\1\1" + bytes(9)
        path = self.folder / f"{self.name}.elf"
        with path.open("wb") as file, self.file.open("rb") as raw:
            file.write(
                struct.pack("<16s2HI3QI6H", identity, 4, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
            )
            file.write(struct.pack("<2I6Q", 4, 0, 64 + 2 * 56, 0, 0, len(note), len(note), 4))
            file.write(struct.pack("<2I6Q", 1, 6, start, DIRECT_MAP, 0, size, size, 4096))
            file.write(note)
            for frame in np.flatnonzero(self.image.reshape(-1, 512).any(axis=1)).tolist():
                raw.seek(frame * 4096)
                file.seek(start + frame * 4096)
                file.write(raw.read(4096))
            file.truncate(start + size)
        return path


def under_ept(question: Question) -> tuple[Question, Ept]:
    """The image as a guest's, under EPT that maps each of its frames to itself in 4 KBytes."""
    frames = len(question.image) // 512
    tables = -(-frames // 512)
    directories = -(-tables // 512)
    image = np.zeros((frames + tables + directories + 2) * 512, dtype=np.uint64)
    for frame in np.flatnonzero(question.image.reshape(-1, 512).any(axis=1)).tolist():
        at = slice(frame * 512, frame * 512 + 512)
        image[at] = question.image[at]

    def link(first: int, targets: Words, bits: int) -> None:
        at = first * 512
        image[at : at + len(targets)] = targets << np.uint64(12) | np.uint64(bits)

    def after(first: int, count: int) -> Words:
        return np.arange(first, first + count, dtype=np.uint64)

    link(frames, after(0, frames), 0x37)
    link(frames + tables, after(frames, tables), 7)
    pdpt = frames + tables + directories
    link(pdpt, after(frames + tables, directories), 7)
    link(pdpt + 1, after(pdpt, 1), 7)
    stage = Ept((pdpt + 1) << 12 | 0x1E, maxphyaddr=40)
    return replace(question, name=f"{question.name} under EPT", image=image), stage


KERNEL, DIRECT_MAP = 0xFFFF_FFFF_8000_0000, 0xFFFF_8DA8_C000_0000
"""Where the shipped guest's kernel maps its image and all physical memory."""
_VMCOREINFO = """OSRELEASE=6.1.0
BUILD-ID=00
PAGESIZE=4096
SYMBOL(init_uts_ns)=ffffffff81000000
SYMBOL(swapper_pg_dir)={root:x}
NUMBER(phys_base)=0
NUMBER(pgtable_l5_enabled)=0
KERNELOFFSET=0
SYMBOL(_stext)=ffffffff80000000
"""


def _note(name: str, content: bytes) -> bytes:
    """An ELF note of type 0."""
    padded = name.encode() + bytes(-len(name) % 4 or 4)
    head = struct.pack("<3I", len(name) + 1, len(content), 0)
    return head + padded + content + bytes(-len(content) % 4)


def real(count: int, folder: Path) -> Question:
    """Random addresses in the user pages of the shipped Linux guest, as far as its image goes."""
    guest = load_snapshot(SHIPPED)
    users = np.array(["U" in letters for letters in guest.truth_flags])
    users &= guest.truth_pa < guest.image.nbytes
    random = np.random.default_rng(0)
    picked = random.integers(0, int(users.sum()), count)
    offsets = random.integers(0, 4096, count, dtype=np.uint64)
    addresses = guest.truth_va[users][picked] | offsets
    expected = guest.truth_pa[users][picked] | offsets
    return Question("linux", guest.cpu, guest.image, addresses, expected, folder)


def large(count: int, folder: Path) -> Question:
    """Random addresses in 256 GBytes of 4-KByte pages, mapped to random frames of the image."""
    random = np.random.default_rng(1)
    frames = random.integers(0, TABLES, TABLES * 512, dtype=np.uint64)
    image = np.zeros((TABLES + TABLES // 512 + 2) * 512, dtype=np.uint64)
    image[: TABLES * 512] = frames << np.uint64(12) | PRESENT_USER
    directories, pdpt, pml4 = TABLES, TABLES + TABLES // 512, TABLES + TABLES // 512 + 1
    order = random.permutation(TABLES).astype(np.uint64)
    image[directories * 512 : pdpt * 512] = order << np.uint64(12) | PRESENT_USER
    at = np.arange(directories, pdpt, dtype=np.uint64)
    image[pdpt * 512 : pdpt * 512 + len(at)] = at << np.uint64(12) | PRESENT_USER
    image[pml4 * 512] = np.uint64(pdpt << 12) | PRESENT_USER
    cpu = Cpu(PG | PE | WP, pml4 << 12, PAE, LME | LMA | NXE, maxphyaddr=40)
    addresses = random.integers(0, TABLES << 21, count, dtype=np.uint64)
    tables = order[(addresses >> np.uint64(21)).astype(np.int64)]
    entries = (tables << np.uint64(9) | addresses >> np.uint64(12) & np.uint64(511)).astype(
        np.int64
    )
    expected = frames[entries] << np.uint64(12) | addresses & np.uint64(4095)
    return Question("large", cpu, image, addresses, expected, folder)
