"""Subjects by name: short names of our own, and `module:factory` for any other."""

import contextlib
import importlib
import shlex
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from vapama.case import BadInput
from vapama.process import Process
from vapama.runs import Guarded
from vapama.spec import second_stage
from vapama.spec.cpu import Cpu
from vapama.spec.memory import Memory
from vapama.spec.outcomes import Outcome
from vapama.spec.paging import load_pdptes, translate
from vapama.spec.subject import (
    ERROR_CODE,
    LEVEL,
    LOADS,
    MASKING,
    OTHER_MODES,
    PA,
    PDPTES,
    SECOND_STAGE,
    SHADOW_STACKS,
    UPDATES,
    Capabilities,
)


class Reference:
    """The specification itself as a subject: what invariants say of it, they say of the spec."""

    capabilities = Capabilities(
        observes=frozenset({PA, LEVEL, ERROR_CODE, UPDATES, LOADS, PDPTES, SECOND_STAGE})
        | {OTHER_MODES, MASKING, SHADOW_STACKS},
        symbolic=True,
    )
    translate = staticmethod(translate)
    load_pdptes = staticmethod(load_pdptes)
    second_stage = staticmethod(second_stage.translate)


def _optimized() -> Any:
    from vapama.impl.optimized import Optimized

    return Optimized()


def _compiled() -> Any:
    from vapama.impl.optimized import Compiled

    return Compiled()


def _unicorn() -> Any:
    try:
        from vapama.oracles.unicorn import Unicorn

        return Unicorn()
    except ImportError as error:
        raise BadInput(f"--subject unicorn: {error}: pip install 'vapama[unicorn]'") from None


def _kvm() -> Any:
    from vapama.oracles.kvm import Kvm

    try:
        return Kvm()
    except OSError as error:
        raise BadInput(f"--subject kvm: /dev/kvm: {error.strerror}") from None


def machine(name: str, options: Mapping[str, str]) -> Any:
    """A machine of `MACHINES`, with options by name. Raises `BadInput`."""
    from vapama.oracles.emulator import CannotStart

    module, kinds = MACHINES[name]
    given: dict[str, Any] = {}
    for option, value in options.items():
        if option not in kinds:
            raise BadInput(f"--subject {name}: {option}: give one of {', '.join(kinds)}")
        try:
            given[option] = kinds[option](value)
        except ValueError:
            raise BadInput(f"--subject {name}: {option}={value}: give a number") from None
    try:
        made = getattr(importlib.import_module(module), name)(**given)
    except CannotStart as error:
        raise BadInput(f"--subject {name}: {error}") from None
    made.reference = _reference
    return made


def _reference(state: Any, memory: Memory, access: Any) -> Outcome:
    """What the reference says of a walk of linear addresses, or of a second stage."""
    by = translate if isinstance(state, Cpu) else second_stage.translate
    outcome: Outcome = by(state, memory, access)
    return outcome


def hypervisor(name: str) -> Any:
    """A hypervisor of `HYPERVISORS`. Raises `BadInput`."""
    from vapama.oracles.emulator import CannotStart

    try:
        return importlib.import_module("vapama.kvm_programs").KvmPrograms(HYPERVISORS[name])
    except CannotStart as error:
        raise BadInput(f"--subject {name}: {error}") from None


HYPERVISORS = {"kvm-shadow": False, "kvm-tdp": True}
"""Hypervisors that run programs, by whether they use nested paging."""


MACHINES: dict[str, tuple[str, dict[str, Callable[[str], Any]]]] = {
    "qemu": ("vapama.oracles.qemu", {"model": str, "maxphyaddr": int}),
    "bochs": ("vapama.oracles.bochs", {"model": str}),
}
"""Machines that run our guest: the module of each, and its options (`qemu,model=EPYC`)."""


def _linux(module: str, factory: str) -> Any:
    from vapama.oracles.linux_mm.knobs import Unavailable

    name = f"linux-{module}"
    try:
        return getattr(importlib.import_module(f"vapama.oracles.linux_mm.{module}"), factory)()
    except (Unavailable, OSError) as error:
        raise BadInput(f"--subject {name}: it cannot be driven here: {error}") from None


SHORT_NAMES: dict[str, Callable[[], Any]] = {
    "optimized": _optimized,
    "compiled": _compiled,
    "reference": Reference,
    "unicorn": _unicorn,
    "linux-ksm": lambda: _linux("ksm", "LinuxKsm"),
    "linux-hugetlb": lambda: _linux("hugetlb", "LinuxHugetlb"),
    "linux-thp": lambda: _linux("thp", "LinuxThp"),
    **{name: partial(machine, name, {}) for name in MACHINES},
    **{name: partial(hypervisor, name) for name in HYPERVISORS},
    "kvm": _kvm,
}


def load_subject(name: str) -> Guarded:
    """The subject of this name: a short one, ``mistake:NAME``, ``process:COMMAND``,
    ``cabi:LIBRARY`` or ``module:factory``.

    A factory is a class or a function that takes no arguments; its module is looked for where
    Python finds it, and in the current directory. Raises `BadInput`.
    """
    # What a subject prints as it is loaded is no part of a report.
    with contextlib.redirect_stdout(sys.stderr):
        return Guarded(name, _subject(name))


def _subject(name: str) -> Any:
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]()
    plain, *options = name.split(",")
    if plain in MACHINES:
        return machine(plain, dict(option.partition("=")[::2] for option in options))
    kind, colon, rest = name.partition(":")
    if kind == "mistake" and colon:
        return _mistake(rest)
    if kind == "process" and colon:
        return Process(name, shlex.split(rest))
    if kind == "cabi" and colon:
        return Process(name, [sys.executable, "-m", "vapama.cabi", rest])
    if not colon or not kind or not rest:
        known = ", ".join(SHORT_NAMES)
        raise BadInput(f"--subject {name}: give one of {known}, or module:factory")
    return _foreign(name, kind, rest)


def _mistake(name: str) -> Any:
    from vapama.bugs.mistakes import MISTAKES

    if name not in MISTAKES:
        raise BadInput(f"--subject mistake:{name}: no such mistake; `vapama list --mistakes`")
    return MISTAKES[name].subject()


def _foreign(name: str, module_name: str, factory_name: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
        subject = factory()
    except (Exception, SystemExit) as error:
        raise BadInput(f"--subject {name}: {type(error).__name__}: {error}") from None
    capabilities = getattr(subject, "capabilities", None)
    if not isinstance(capabilities, Capabilities) or not callable(
        getattr(subject, "translate", None)
    ):
        raise BadInput(
            f"--subject {name}: it needs `capabilities` (vapama.spec.subject.Capabilities) and "
            "`translate(cpu, memory, access)`"
        )
    return subject
