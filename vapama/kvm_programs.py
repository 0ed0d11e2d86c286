"""KVM in an emulator as a subject: it runs programs of guest and host steps, one step at a time.

As a subject it takes the claims of `spec/invariants/vmm.py`, and replays and explains their Cases.
`vapama.oracle_programs` runs programs in batches, which is faster.
"""

from vapama.oracle_programs import Program, Tally, fitted, judge, ready, style_of
from vapama.oracles import nested_kvm as k
from vapama.oracles.emulator import MachineDied
from vapama.oracles.nested_kvm import Command, NestedKvm, Result
from vapama.spec.domains import Domain
from vapama.spec.machine import Map
from vapama.spec.steps import NPT, SHADOW, Move, Plan, Seen, SetSlot, Step
from vapama.spec.subject import VMM, Capabilities, NotCovered
from vapama.spec.words import Word

STYLE = (1 << 29) - 1 | 0xF << 36
"""The bits of a style of programs that stay in 4-level paging, with memory that is there from the
beginning: see `programs.plan`."""


class KvmPrograms:
    """KVM with its shadow MMU, or with the one for nested paging."""

    def __init__(self, npt: bool) -> None:
        """Boot it. Raises `CannotStart`."""
        self.hypervisor = NestedKvm(npt)
        self.capabilities = Capabilities(
            observes=frozenset({VMM}),
            narrow={"style": Domain(free=style_of(STYLE, self.hypervisor.cr4))},
            confirmations=1,
            unseen=frozenset({"table outside memory"}),  # to KVM it is one without entries
        )
        self._last: Guests | None = None

    def vmm(self, plan: Plan) -> "Guests":
        """The guests of a plan at power-on. Raises `NotCovered`."""
        first, *others = plan.guests
        if plan.design != (NPT if self.hypervisor.npt else SHADOW):
            raise NotCovered("a hypervisor of another design")
        if any(guest.image != first.image for guest in others):
            raise NotCovered("guests whose memory is not alike at power-on")
        for guest in plan.guests:
            end = max((slot.page + slot.pages for slot in guest.slots.values()), default=0)
            if max(guest.slots, default=0) >= k.SLOTS - 1 or end > k.BACKING:
                raise NotCovered("guests with so many memory slots, or so much memory")
            if any(cpu.levels != 4 for cpu in guest.vcpus) or len(guest.vcpus) > k.MOST_PROCESSORS:
                raise NotCovered("processors that are not in 4-level paging, or more than two")
        if len(plan.guests) > k.MOST_GUESTS or plan.swapped:
            raise NotCovered("more than two guests, or such as begin swapped out")
        self._last = Guests(self.hypervisor, ready(plan))
        return self._last

    def departure_of_program(self) -> str | None:
        """The known departure that the last program shows; None if there is none, or something
        else besides.
        """
        return None if self._last is None else self._last.departure()


class Guests:
    """Guests on KVM, from power-on. `plan` has what our agent needs in their memory."""

    stateful = True

    def __init__(self, hypervisor: NestedKvm, plan: Plan) -> None:
        self.hypervisor, self.plan = hypervisor, plan
        self._cpus = [list(guest.vcpus) for guest in plan.guests]
        self._maps = [Map(guest.slots, {}) for guest in plan.guests]
        for guest, its in zip(plan.guests, self._maps, strict=True):
            its.backing.update((its.word_of(at), word) for at, word in guest.image.items())
        self._done: list[tuple[Step, Command | None]] = []
        self._results: list[Result] = []
        if hypervisor.is_busy():
            hypervisor.start()  # a step was given up
        hypervisor.set_image(k.image(plan.guests[0]))
        self._run(k.power_on(plan))

    def _run(self, commands: list[Command]) -> list[Result]:
        """What came of commands. Raises `RuntimeError` if KVM or its emulator died of them."""
        try:
            return self.hypervisor.run(commands)
        except MachineDied as death:
            self.hypervisor.start()
            raise RuntimeError(f"{death}; started again") from None

    def fit(self, step: Step) -> Step:
        """The step as it can be made here."""
        return fitted(step, self.hypervisor.cr4)

    def do(self, step: Step) -> Seen:
        """Make a step. Raises `nested_kvm.Told` if it ended as no step of a program may."""
        guest, vcpu = getattr(step, "guest", 0), getattr(step, "vcpu", 0)
        command = k.command(step, self._cpus[guest][vcpu])
        result = k.NOTHING
        if command is not None:
            # All memory is compared, wherever the step may have written.
            result, rest = self._run([command, Command(k.END)])
            result = result._replace(changes=result.changes + rest.changes)
            self._results.append(result)
            for number, word, value in result.changes:
                self._maps[number].backing[word] = value
        self._done.append((step, command))
        seen = k.seen(step, result)
        if isinstance(step, Move):
            self._cpus[guest][vcpu] = step.on(self._cpus[guest][vcpu])
        elif isinstance(step, SetSlot):
            self._maps[guest].set_slot(step.number, step.slot)
        return seen

    def word(self, guest: int, address: Word) -> Word:
        """A guest's word at an aligned guest-physical address."""
        return self._maps[guest].load(address)

    def held(self, guest: int) -> set[int]:
        """Which words of a guest's backing are not 0."""
        return {word for word, value in self._maps[guest].backing.items() if value}

    def departure(self) -> str | None:
        """The known departure that the steps so far show; None if there is none, or something else
        besides.
        """
        steps, commands = zip(*self._done, strict=True) if self._done else ((), ())
        program = Program(0, (), self.plan, steps, commands)
        setting_up = [k.NOTHING] * len(k.power_on(self.plan))
        tally = Tally()
        judge(program, [*setting_up, *self._results, k.NOTHING], tally, self.hypervisor.npt)
        return None if tally.differences else next(iter(tally.known), None)
