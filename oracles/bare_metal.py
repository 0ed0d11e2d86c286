"""A machine with our guest in it, behind the subject protocol."""

from collections.abc import Callable
from functools import partial
from typing import Any

from vapama.oracles import native, virtual
from vapama.oracles.departures import Departure, Disagreement, described, named
from vapama.oracles.emulator import MachineDied
from vapama.oracles.machine import Machine
from vapama.oracles.native import POOL_BYTES, RECORD_BYTES, STAMPS
from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import Cpu
from vapama.spec.memory import Memory, Sparse
from vapama.spec.outcomes import I, Outcome, Translated, U, W
from vapama.spec.stage import Stage
from vapama.spec.subject import EFFECTS, ERROR_CODE, OTHER_MODES, PA, SECOND_STAGE, Capabilities

OBSERVES = frozenset({PA, ERROR_CODE, EFFECTS, OTHER_MODES, SECOND_STAGE})


class BareMetal:
    """A machine with our guest in it.

    `departures` are the disagreements of this machine with the manual that are known by name.
    """

    reference: Callable[[Any, Memory, Any], Outcome] | None = None
    """What the reference says of a case. Who has it sets it: some departures are told by what it
    says of another memory."""

    def __init__(self, machine: Machine, departures: tuple[Departure, ...]) -> None:
        self.machine, self.departures = machine, departures
        virtualizes = machine.features.svm or machine.features.vmx
        self.capabilities = Capabilities(
            observes=OBSERVES if virtualizes else OBSERVES - {SECOND_STAGE},
            preload=True,
            narrow={**native.narrow(machine), **virtual.narrow(machine)},
        )

    def translate(self, cpu: Cpu, memory: Sparse, access: Access) -> Outcome:
        """The outcome of the access made by the guest. Raises `NotCovered`."""
        asked = native.ask(cpu, memory, access, self.machine)
        result = self._run(asked.flavor, asked.record)
        outcome = native.observed(asked, result, memory.touched)
        if isinstance(outcome, Translated):
            outcome.pa |= access.address & 7
        return outcome

    def second_stage(self, stage: Stage, memory: Sparse, access: GuestPhysicalAccess) -> Outcome:
        """The outcome of the access made by the guest of a virtual machine. Raises `NotCovered`."""
        asked = virtual.ask(stage, memory, access, self.machine)
        result = self._run(asked.flavor, asked.record)
        return virtual.observed(asked, result, access, memory)

    def _run(self, flavor: int, record: bytes) -> bytes:
        """The record as it comes back. Raises `RuntimeError` if the machine died of it."""
        try:
            result = self.machine.run(flavor, record, RECORD_BYTES)
        except MachineDied as death:
            self.machine.start()
            raise RuntimeError(f"{death}; started again") from None
        if self.machine.read(0, POOL_BYTES) != STAMPS:
            self.machine.start()
            raise RuntimeError("memory changed that is neither an entry of the walk nor its page")
        return result

    def departure(
        self,
        state: Cpu | Stage,
        memory: Memory,
        access: Any,
        expected: Outcome,
        outcome: Outcome,
    ) -> str | None:
        """The name of this disagreement among the known departures, None if it is not one."""
        size, code, open_bits = 8, access.write * W | access.user * U | access.fetch * I, I
        if isinstance(state, Cpu):
            size, code, open_bits = state.mode.entry_bytes, described(state, access), 0
        reference = None if self.reference is None else partial(self._by_reference, state, access)
        return named(
            self.departures,
            Disagreement(
                memory, expected, outcome, self.capabilities, size, code, reference, open_bits
            ),
        )

    def _by_reference(self, state: Cpu | Stage, access: Any, memory: Memory) -> Outcome:
        assert self.reference is not None
        return self.reference(state, memory, access)
