"""Whose tables an audit is about: the hypervisor's, and the guest's own."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from vapama.case import BadInput
from vapama.explain import describe_cpu, describe_stage
from vapama.impl.listing import Form, Pieces, form_of
from vapama.snapshot import answers
from vapama.snapshot.images import Absent, Image, Piece
from vapama.snapshot.slots import UNKNOWN, Slots
from vapama.spec import ept, modes, npt, paging
from vapama.spec.cpu import LA57, PAE, Cpu
from vapama.spec.stage import Ept, Stage


@dataclass
class Side:
    """Tables: whose they are, the state that they are walked in, and the memory they stand in."""

    name: str
    state: Cpu | Stage
    image: Image
    form: Form = field(init=False)

    def __post_init__(self) -> None:
        if not self.unpaged:
            self.form = form_of(self.state)

    @property
    def unpaged(self) -> bool:
        """Whether there are no tables, for paging is off."""
        return isinstance(self.state, Cpu) and self.state.mode is modes.OFF

    def described(self) -> str:
        """The state, in words."""
        if isinstance(self.state, Cpu):
            return f"{describe_cpu(self.state)}, CR3 {self.state.cr3:#x}"
        root = self.state.eptp if isinstance(self.state, Ept) else self.state.ncr3
        name = "EPTP" if isinstance(self.state, Ept) else "nCR3"
        return f"{describe_stage(self.state)}, {name} {root:#x}"

    @property
    def flags(self) -> int:
        """The bit for accessed; that for dirty is the next. 0 if there are none."""
        if isinstance(self.state, Ept):
            return ept.ACCESSED * self.state.ad
        return paging.ACCESSED

    def path(self, address: int) -> Iterator[paging.Step]:
        """The walk for an address, as far as the image holds it."""
        memory = self.image
        try:
            if isinstance(self.state, Ept):
                yield from ept.path(self.state, memory, address)
            elif isinstance(self.state, Cpu):
                if not self.unpaged:
                    yield from paging.path(self.state, memory, address)
            else:
                yield from npt.path(self.state, memory, address)
        except Absent:
            return


@dataclass(frozen=True)
class Given:
    """What is given to audit: the image, and the hypervisor's if that is another; the guest's
    registers; EPTP or nCR3 and the host's registers; the root of shadow tables; the slots.
    """

    image: Image
    host: Image | None
    registers: dict[str, int]
    stage: dict[str, int]
    shadow: int | None
    host_maxphyaddr: int | None
    mbec: bool
    processor: int
    slots: Slots | None


def sides_of(given: Given) -> tuple[Side | None, Side | None]:
    """The hypervisor's tables and the guest's, as far as they are given. Raises `BadInput`.

    In one image, which is the host's then, the guest's memory is what the second stage makes of it,
    or where the slots have it.
    """
    stage = answers.second_stage_state(given.stage, given.host_maxphyaddr, given.mbec)
    if given.shadow is not None and stage is not None:
        raise BadInput("give one of --eptp, --ncr3 and --shadow")
    if given.shadow is None and stage is None:
        if given.host is not None or given.slots is not None:
            raise BadInput("say what maps the guest's memory: give --eptp, --ncr3 or --shadow")
        state = answers.control_state(given.image, given.registers, given.processor)
        return None, Side("guest's tables", state, given.image)
    memory = given.host or given.image
    if given.shadow is None:
        assert stage is not None
        return Side("second stage", stage, memory), _guest_behind(given, stage)
    guest = _guest_shadowed(given)
    assert isinstance(guest.state, Cpu)
    root = {"cr3": given.shadow, "maxphyaddr": given.host_maxphyaddr or answers.MAXPHYADDR}
    root |= {name: given.stage[f"host_{name}"] for name in ("cr4", "efer")
             if f"host_{name}" in given.stage}  # fmt: skip
    if guest.state.levels == 5:
        root.setdefault("cr4", PAE | LA57)
    bare = replace(memory, registers=(), machine=64)
    return Side("shadow tables", answers.control_state(bare, root), memory), guest


def _guest_behind(given: Given, stage: Stage) -> Side | None:
    """The guest's own tables under a second stage, if it is said where they are."""
    if given.host is not None:
        if "cr3" not in given.registers and not given.image.registers:
            return None
        state = answers.control_state(given.image, given.registers, given.processor)
        return Side("guest's tables", state, given.image)
    if "cr3" not in given.registers:
        return None
    memory = answers.guest_memory(stage, given.image, 1 << 24, 1 << 32)
    image = replace(given.image, registers=(), pieces=memory.pieces)
    return Side("guest's tables", answers.control_state(image, given.registers), image)


def _guest_shadowed(given: Given) -> Side:
    """The guest's own tables, which shadow tables are made of. Raises `BadInput`."""
    image = given.image
    if given.host is None:
        pieces = [] if given.slots is None else list(_held(given.image, given.slots))
        if not pieces:
            raise BadInput(
                "where is the guest's memory? give its image and --host, or --slots with `hpa`"
            )
        columns = (np.array(column, dtype=np.uint64) for column in zip(*pieces, strict=True))
        image = replace(image, registers=(), pieces=Pieces(image.pieces.memory, *columns))
    state = answers.control_state(image, given.registers, given.processor)
    return Side("guest's tables", state, image)


def _held(image: Image, slots: Slots) -> Iterator[Piece]:
    """The guest's memory in a host's image, by the slots."""
    for gpa, end, hpa in zip(
        slots.gpas.tolist(), slots.ends.tolist(), slots.hpas.tolist(), strict=True
    ):
        if hpa != UNKNOWN:
            yield from image.positions(gpa, hpa, end - gpa)
