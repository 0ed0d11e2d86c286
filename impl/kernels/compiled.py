"""Kernels turned into machine code by numba, with one rule: every integer is a uint64.

numba gives a uint64 combined with a literal the type int64, whose right shifts and comparisons are
signed. So each kernel is compiled from a copy whose literals and global constants are uint64, and
whose calls to other kernels go to their compiled forms: what runs then is exactly the unsigned
64-bit arithmetic that the proofs are about. (`len` stays signed, and only bounds loops.)

Callees are inlined: a call that passes an array costs numba as much as the rest of a walk.
"""

import hashlib
import types
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from vapama.spec.words import WORD, Condition, Word, ite

Kernel = Callable[..., Any]

APART = ("nested.walk_stage", "nested.walk", "batches.descend")
"""Kernels too large to be inlined: several walks, called from several places."""


def select(condition: Condition, then: Word, otherwise: Word) -> Word:
    """`ite` on conditions that are known."""
    return then if condition else otherwise


INSTEAD: dict[object, Kernel] = {ite: select}
"""What is compiled in place of functions that ask what kind of condition they are given."""

_compiled: dict[Kernel, Kernel] = {}


def compiled(kernel: Kernel) -> Kernel:
    """The machine-code form of a plain kernel function, made once a process."""
    if kernel not in _compiled:
        _compiled[kernel] = numba.njit(
            _unsigned(kernel),
            cache=_has_a_file(kernel),
            nogil=True,
            inline="never" if _short_name(kernel) in APART else "always",
        )
    return _compiled[kernel]


def _unsigned(kernel: Kernel) -> Kernel:
    """A copy of `kernel` in which every int constant is a uint64 and every callee compiled."""
    assert isinstance(kernel, types.FunctionType)
    code = kernel.__code__
    names = {name: _constant(kernel.__globals__[name]) for name in _globals_of(kernel)}
    names["__name__"] = kernel.__module__
    # numba keeps machine code by the bytecode and the closure of a function, and the age of its
    # file. So the copy has a closure that tells when a callee or a constant elsewhere changes.
    copy = types.FunctionType(
        code.replace(co_consts=tuple(map(_constant, code.co_consts)), co_freevars=("fingerprint",)),
        names,
        kernel.__name__,
        closure=(types.CellType(fingerprint(kernel)),),
    )
    copy.__module__, copy.__qualname__ = kernel.__module__, kernel.__qualname__
    return copy


def fingerprint(kernel: Kernel) -> str:
    """A hash of what a kernel's machine code is made of: its code, its callees and constants."""
    assert isinstance(kernel, types.FunctionType)
    code = kernel.__code__
    parts = [code.co_code.hex(), repr(code.co_consts)]
    for name in _globals_of(kernel):
        value = kernel.__globals__[name]
        value = INSTEAD.get(value, value) if callable(value) else value
        known = fingerprint(value) if isinstance(value, types.FunctionType) else repr(value)
        parts.append(f"{name} {known}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _globals_of(kernel: types.FunctionType) -> list[str]:
    return [name for name in kernel.__code__.co_names if name in kernel.__globals__]


def _constant(value: object) -> object:
    if type(value) is int:
        return np.uint64(value & WORD)  # a complement, as all of them, stands under an `&`
    if isinstance(value, tuple):
        return tuple(map(_constant, value))
    if isinstance(value, types.FunctionType):
        return compiled(INSTEAD.get(value, value))
    return value


def _short_name(kernel: Kernel) -> str:
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


def _has_a_file(kernel: Kernel) -> bool:
    """Whether numba can key its on-disk cache: not for kernels patched in memory."""
    return not kernel.__code__.co_filename.startswith("<")
