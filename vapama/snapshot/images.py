"""Images: physical memory in a file, by memory map, so that only what is looked at is read.

Three formats: raw (the byte at position p is that at physical address p), ELF core as QEMU's
``dump-guest-memory`` writes it (segments by physical address, the control registers in notes), and
.npz (page-table pages by frame, control registers; see data/README.md). Memory is held in whole
4-KByte pages: what a file has of a page that is not whole counts as absent.
"""

import mmap
import os
import stat
import struct
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vapama.case import BadInput
from vapama.impl.listing import Pieces, at_each_position

PAGE = 4096
LARGEST_ADDRESS = 1 << 52
LARGEST_ARRAYS = 8 << 30
"""How many bytes the arrays of a .npz file may take, for they are unpacked into memory."""
MOST_SEGMENTS = 1 << 20


class Absent(LookupError):
    """A physical address that an image does not hold."""

    def __init__(self, address: int) -> None:
        super().__init__(f"{address:#x}")
        self.address = address


class Piece(NamedTuple):
    """Physical addresses from `first` up to `end`, at the positions from `place` on."""

    first: int
    end: int
    place: int


@dataclass
class Image:
    """Physical memory: its pieces, and the control registers of each processor if it has them.

    `machine` is 32 for a machine that was not in long mode, 64 for one that was, 0 if unknown.
    """

    name: str
    form: str
    data: Any
    pieces: Pieces
    registers: tuple[dict[str, int], ...] = ()
    machine: int = 0
    limit: int = field(init=False)
    """The end of the last piece."""

    def __post_init__(self) -> None:
        self._firsts, self._ends, self._places = (row.tolist() for row in self.pieces[1:])
        self.limit = max(self._ends, default=0)

    @property
    def held(self) -> int:
        """How many bytes of memory it holds."""
        return int((self.pieces.ends - self.pieces.firsts).sum())

    def load(self, address: int) -> int:
        """The 8-byte entry at an aligned physical address. Raises `Absent`."""
        k = bisect_right(self._firsts, address) - 1
        if k < 0 or address >= self._ends[k]:
            raise Absent(address)
        return int(self.pieces.memory[self._places[k] + address - self._firsts[k]])

    def positions(self, gpa: int, first: int, size: int) -> Iterator["Piece"]:
        """The pieces of a guest's memory, from `gpa` on, that `size` bytes from `first` on are."""
        k = max(bisect_right(self._firsts, first) - 1, 0)
        while k < len(self._firsts) and self._firsts[k] < first + size:
            start, end = max(first, self._firsts[k]), min(first + size, self._ends[k])
            if start < end:
                place = self._places[k] + start - self._firsts[k]
                yield Piece(gpa + start - first, gpa + end - first, place)
            k += 1


def open_image(path: Path, form: str = "") -> Image:
    """The image in a file; without `form` (raw, elf, npz) its first bytes say what it is.

    Raises `BadInput`.
    """
    try:
        data, size = _mapped(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot read the image: {error.strerror or error}") from None
    head = bytes(data[:16])
    form = form or _form_of(path, head)
    if form == "npz":
        return _npz(path)
    if form == "elf":
        return _elf(path, data, size)
    return Image(path.name, "raw", data, _pieces(path, data, size, [Piece(0, size, 0)]))


def _mapped(path: Path) -> tuple[Any, int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise BadInput(f"{path}: cannot read the image: it is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise BadInput(f"{path}: cannot read the image: give a file, which can be mapped")
        if not status.st_size:
            raise BadInput(f"{path}: the image is empty")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), status.st_size
    finally:
        os.close(descriptor)


REFUSED = {
    b"KDUMP   ": "a kdump-compressed dump: dump again as ELF (dump-guest-memory without -z, -l, -s "
    "or -R; virsh dump --memory-only --format elf)",
    b"DISKDUMP": "a diskdump-compressed dump: convert it to ELF (makedumpfile -E)",
    b"makedumpfile": "a flattened dump: rearrange it (makedumpfile -R), and have it in ELF",
    b"PAGEDU": "a Windows crash dump: dump again as ELF (dump-guest-memory without -w)",
    b"EMiL": "a LiME dump: take it again with format=padded, which is raw",
    b"QEVM": "a QEMU migration stream: use dump-guest-memory or pmemsave",
    b"QFI\xfb": "a qcow2 image, of a disk: use dump-guest-memory or pmemsave",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"\xfd7zXZ": "compressed by xz: unpack it first",
}
"""What a file begins with that is in none of the formats, and what to do about it."""


def _form_of(path: Path, head: bytes) -> str:
    for magic, what in REFUSED.items():
        if head.startswith(magic):
            raise BadInput(f"{path}: {what}; if it is raw memory nonetheless, say --format raw")
    if head.startswith(b"\x7fELF"):
        return "elf"
    return "npz" if head.startswith(b"PK") or path.suffix == ".npz" else "raw"


def _pieces(path: Path, data: Any, size: int, pieces: list[Piece]) -> Pieces:
    """Pieces put in order, joined where they are neighbours, and trimmed to whole pages."""
    joined: list[Piece] = []
    for piece in sorted(pieces):
        before = joined[-1] if joined else None
        if before is not None and piece.first < before.end:
            if piece.place - piece.first != before.place - before.first:
                raise BadInput(
                    f"{path}: two segments hold physical address {piece.first:#x}: is it the core "
                    "of a process, and not of a machine?"
                )
            joined[-1] = before._replace(end=max(before.end, piece.end))
        elif before is not None and (
            (piece.first, piece.place) == (before.end, before.place + before.end - before.first)
        ):
            joined[-1] = before._replace(end=piece.end)
        else:
            joined.append(piece)
    whole = [trimmed for piece in joined if (trimmed := _trimmed(piece)) is not None]
    if not whole:
        raise BadInput(f"{path}: the image holds no whole page of memory")
    columns = [np.array(column, dtype=np.uint64) for column in zip(*whole, strict=True)]
    return Pieces(at_each_position(data, size), *columns)


def _trimmed(piece: Piece) -> Piece | None:
    first, end = -(-piece.first // PAGE) * PAGE, min(piece.end, LARGEST_ADDRESS) // PAGE * PAGE
    return Piece(first, end, piece.place + first - piece.first) if first < end else None


# ELF


class Segment(NamedTuple):
    """A program header: its type, and the part of the file and of physical memory it is about."""

    type: int
    offset: int
    paddr: int
    filesz: int


ET_CORE, EM_386, EM_X86_64, PT_LOAD, PT_NOTE, PN_XNUM = 4, 3, 62, 1, 4, 0xFFFF
# Of each class: the header behind e_ident, a program header, and the same put in Segment's order;
# where a section header has sh_info, which holds the number of segments if it exceeds 16 bits.
HEADERS = {1: "<HHIIIIIHHHHHH", 2: "<HHIQQQIHHHHHH"}
SEGMENTS = {1: ("<8I", (0, 1, 3, 4)), 2: ("<IIQQQQQQ", (0, 2, 4, 5))}
SH_INFO = {1: 28, 2: 44}
# QEMU's note (target/i386/arch_dump.c, QEMUCPUState, version 1): 18 registers of 8 bytes and 10
# segments of 24 stand between its first 8 bytes and CR0 to CR4.
CR_OFFSET, NOTE_VERSION = 8 + 18 * 8 + 10 * 24, 1
RFLAGS_OFFSET = 8 + 17 * 8


def _elf(path: Path, data: Any, size: int) -> Image:
    try:
        machine, segments = _segments(path, data)
    except struct.error:
        raise BadInput(f"{path}: not a whole ELF core: its headers are cut short") from None
    loads = []
    for segment in segments:
        if segment.type in (PT_LOAD, PT_NOTE) and segment.offset + segment.filesz > size:
            raise BadInput(
                f"{path}: not a whole ELF core: the segment at {segment.paddr:#x} ends at byte "
                f"{segment.offset + segment.filesz:,} of a file of {size:,}"
            )
        if segment.type == PT_LOAD and segment.filesz:
            loads.append(Piece(segment.paddr, segment.paddr + segment.filesz, segment.offset))
    if not loads:
        raise BadInput(f"{path}: an ELF core that holds no memory: it has no PT_LOAD segment")
    registers: list[dict[str, int]] = []
    for segment in segments:
        if segment.type == PT_NOTE:
            registers += _qemu_notes(data[segment.offset : segment.offset + segment.filesz])
    return Image(
        path.name,
        "elf",
        data,
        _pieces(path, data, size, loads),
        tuple(registers),
        64 if machine == EM_X86_64 else 32,
    )


def _segments(path: Path, data: Any) -> tuple[int, list[Segment]]:
    kind, order = data[4], data[5]
    if kind not in HEADERS or order != 1:
        raise BadInput(f"{path}: an ELF file of another kind than little-endian 32- or 64-bit")
    header = struct.unpack_from(HEADERS[kind], data, 16)
    file_type, machine, phoff, shoff, count = header[0], header[1], header[4], header[5], header[9]
    if file_type != ET_CORE or machine not in (EM_386, EM_X86_64):
        raise BadInput(f"{path}: an ELF file, but no core of an x86 machine")
    if count == PN_XNUM:
        (count,) = struct.unpack_from("<I", data, shoff + SH_INFO[kind])
    if count > MOST_SEGMENTS:
        raise BadInput(f"{path}: {count:,} segments, of at most {MOST_SEGMENTS:,}")
    layout, order_ = SEGMENTS[kind]
    step = struct.calcsize(layout)
    rows = (struct.unpack_from(layout, data, phoff + step * k) for k in range(count))
    return machine, [Segment(*(row[k] for k in order_)) for row in rows]


def _qemu_notes(notes: bytes) -> Iterator[dict[str, int]]:
    """The control registers of each processor, from the notes that QEMU writes."""
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        name = notes[at + 12 : at + 12 + name_size]
        start = at + 12 + -(-name_size // 4) * 4
        desc = notes[start : start + size]
        at = start + -(-size // 4) * 4
        if name.rstrip(b"\0") == b"QEMU" and kind == 0 and len(desc) >= CR_OFFSET + 40:
            version, _ = struct.unpack_from("<II", desc)
            if version == NOTE_VERSION:
                cr0, _, _, cr3, cr4 = struct.unpack_from("<5Q", desc, CR_OFFSET)
                (rflags,) = struct.unpack_from("<Q", desc, RFLAGS_OFFSET)
                yield {"cr0": cr0, "cr3": cr3, "cr4": cr4, "rflags": rflags}


# NPZ

TABLES = ("frames", "tables")
REGISTERS = ("cr0", "cr3", "cr4", "efer", "rflags", "pkru", "pkrs", "maxphyaddr", "eptp", "ncr3")
"""Registers that a .npz file may hold, each as a single number."""
DIMENSIONS = {"frames": 1, "tables": 2, "truth_va": 1, "truth_pa": 1, "truth_flags": 1}


def read_arrays(path: Path, needed: tuple[str, ...], others: tuple[str, ...] = ()) -> Any:
    """Arrays of a .npz file by name: all of `needed`, and those of `others` that it has.

    Raises `BadInput`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        size = sum(m.file_size for m in members if m.filename[:-4] in needed + others)
        if size > LARGEST_ARRAYS:
            raise BadInput(f"{path}: arrays of {size:,} bytes, of at most {LARGEST_ARRAYS:,}")
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in needed if name not in arrays]
            if missing:
                raise BadInput(f"{path}: not a snapshot: it lacks {', '.join(missing)}")
            found = {name: arrays[name] for name in (*needed, *others) if name in arrays}
    except OSError as error:
        raise BadInput(f"{path}: cannot read the image: {error.strerror or error}") from None
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError) as error:
        raise BadInput(f"{path}: not a whole .npz image: {error}") from None
    for name, array in found.items():
        dimensions, kind = DIMENSIONS.get(name, 0), "U" if name == "truth_flags" else "u"
        if array.ndim != dimensions or array.dtype.kind != kind:
            what = "text" if kind == "U" else "unsigned integers"
            raise BadInput(f"{path}: `{name}` must hold {what}, in {dimensions} dimensions")
    frames, tables = found["frames"], found["tables"]
    if tables.shape != (len(frames), 512) or tables.dtype != np.uint64 or not len(frames):
        raise BadInput(f"{path}: `tables` must be 512 uint64 entries for each of `frames`")
    return found


def _npz(path: Path) -> Image:
    found = read_arrays(path, TABLES, REGISTERS)
    frames, tables = found["frames"], np.ascontiguousarray(found["tables"])
    if (frames & np.uint64(PAGE - 1)).any() or int(frames.max()) >= LARGEST_ADDRESS:
        raise BadInput(f"{path}: `frames` must be page-aligned and below {LARGEST_ADDRESS:#x}")
    pieces = [Piece(first, first + PAGE, k * PAGE) for k, first in enumerate(frames.tolist())]
    registers = {name: int(found[name]) for name in REGISTERS if name in found}
    shown = (registers,) if registers else ()
    return Image(path.name, "npz", tables, _pieces(path, tables.data, tables.nbytes, pieces), shown)
