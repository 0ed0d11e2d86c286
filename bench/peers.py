"""What else translates: each peer as a function from a question to its physical addresses.

A peer that is not installed raises `Absent` with what would bring it.
"""

import ctypes
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from images import DIRECT_MAP, Question, Words

Run = Callable[[], Words]
"""One timed run: the physical addresses of all the addresses asked for."""
BENCH = Path(__file__).parent


class Absent(Exception):
    """A peer is not here: says what would bring it."""


@cache
def library(name: str, *flags: str) -> ctypes.CDLL:
    """A C file beside this one as a shared library, compiled by gcc -O3. Raises `Absent`."""
    built = Path(mkdtemp()) / f"{name}.so"
    command = ["gcc", "-O3", "-march=native", "-shared", "-fPIC", str(BENCH / f"{name}.c")]
    try:
        done = subprocess.run(
            [*command, "-o", str(built), *flags], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise Absent("gcc is not installed") from None
    if done.returncode:
        why = done.stderr.strip().splitlines()
        raise Absent(f"gcc does not compile bench/{name}.c: {why[0] if why else 'no reason given'}")
    return ctypes.CDLL(str(built))


def pointer(array: Words) -> int:
    """Where an array is in memory."""
    return int(array.ctypes.data)


def addrxlat(question: Question) -> Run:
    """The walker of libkdumpfile, in C, called from C."""
    try:
        many = library("addrxlat", "-laddrxlat").addrxlat_many
    except Absent as absent:
        raise Absent(f"{absent} (Debian's package is libkdumpfile-dev)") from None
    row, scalar = ctypes.c_void_p, ctypes.c_uint64
    many.argtypes = [row, scalar, scalar, row, row, scalar]
    image, addresses, found = question.image, question.addresses, question.addresses.copy()

    def run() -> Words:
        many(
            pointer(image),
            len(image),
            question.cpu.cr3,
            pointer(addresses),
            pointer(found),
            len(addresses),
        )
        return found

    return run


def one_by_one(walk: Callable[[int], int], question: Question) -> Run:
    """A peer that translates one address a call."""
    addresses = question.addresses.tolist()
    return lambda: np.array([walk(address) for address in addresses], dtype=np.uint64)


def memprocfs(question: Question) -> Run:
    """MemProcFS on the raw file."""
    process = memprocfs_process(question)
    return one_by_one(process.memory.virt2phys, question)


def memprocfs_mappings(question: Question) -> Callable[[], int]:
    """How many pages MemProcFS finds mapped, on the raw file: its own map, made anew each time."""

    def run() -> int:
        process = memprocfs_process(question)
        return sum(int(run["pages"]) for run in process.maps.pte(False))

    return run


def memprocfs_process(question: Question) -> "object":  # it comes without types
    """The one process that MemProcFS sees in the raw file."""
    try:
        import memprocfs as library_
    except ImportError:
        raise Absent("pip install memprocfs") from None
    cr3 = hex(question.cpu.cr3)
    machine = library_.Vmm(["-device", str(question.file), "-cr3", cr3, "-norefresh"])
    KEPT.append(machine)
    return machine.process_list()[0]


KEPT: list[object] = []
"""What must live as long as the peer that is made of it."""


def volatility3(question: Question) -> Run:
    """Volatility 3's Intel layer on the raw file."""
    try:
        from volatility3.framework import contexts
        from volatility3.framework.layers import intel, physical
    except ImportError:
        raise Absent("pip install volatility3") from None
    context = contexts.Context()
    context.config["phys.location"] = question.file.as_uri()
    context.add_layer(physical.FileLayer(context, "phys", "phys"))
    context.config["virtual.memory_layer"] = "phys"
    context.config["virtual.page_map_offset"] = question.cpu.cr3
    layer = intel.Intel32e(context, "virtual", "virtual")
    context.add_layer(layer)
    mask = layer.address_mask
    return one_by_one(lambda address: int(layer.translate(address & mask)[0]), question)


def drgn(question: Question) -> Run:
    """The walk of page tables that drgn's helper for Linux uses, on an ELF core."""
    try:
        import _drgn
        from drgn import Program
    except ImportError:
        raise Absent("pip install drgn") from None
    program = Program()
    program.set_core_dump(str(question.core))
    follow, tables = _drgn._linux_helper_follow_phys, DIRECT_MAP + question.cpu.cr3
    return one_by_one(lambda address: int(follow(program, tables, address)), question)


def unicorn(question: Question) -> Run:
    """Unicorn's translation without an access, on the image in place."""
    try:
        import unicorn as library_
        from unicorn import x86_const as x86
        from unicorn.unicorn_py3.unicorn import uclib
    except ImportError:
        raise Absent("pip install unicorn") from None
    engine = library_.Uc(library_.UC_ARCH_X86, library_.UC_MODE_64)
    engine.ctl_set_tlb_mode(library_.UC_TLB_CPU)
    image = question.image
    engine.mem_map_ptr(0, image.nbytes, library_.UC_PROT_ALL, pointer(image))
    cpu = question.cpu
    engine.reg_write(x86.UC_X86_REG_CR3, cpu.cr3)
    engine.reg_write(x86.UC_X86_REG_CR4, cpu.cr4)
    engine.reg_write(x86.UC_X86_REG_CR0, cpu.cr0)
    engine.reg_write(x86.UC_X86_REG_MSR, (0xC000_0080, cpu.efer))
    translate = uclib.uc_vmem_translate
    translate.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_uint64),
    ]
    found = ctypes.c_uint64()
    where, handle, read = ctypes.byref(found), engine._uch, library_.UC_PROT_READ

    def walk(address: int) -> int:
        return found.value if translate(handle, address, read, where) == 0 else 0

    KEPT.append(engine)
    return one_by_one(walk, question)
