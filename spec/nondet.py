"""Invariants, and the source of choices they draw from.

An invariant is a function of two arguments with plain asserts. `nondet` gives it any value there is
(the name is Kani's and CBMC's): an engine decides how, by random choice, by enumeration, or by
symbols that stand for all values at once. `subject` is the implementation under test.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

from vapama.spec import domains
from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import LA57, LAM_U48, LAM_U57, LMA, LME, PAE, Cpu, reserved_in_pdptes
from vapama.spec.domains import Domain
from vapama.spec.memory import Memory
from vapama.spec.stage import Ept, Npt
from vapama.spec.subject import MANY, NESTED, NESTED_MANY, SECOND_STAGE_MANY, TRANSLATE
from vapama.spec.words import Condition, Flag, Word, bit, ite, low_bits

T = TypeVar("T")


class Cloned(Protocol):
    """What a run goes on with, and another run may go on with a clone of."""

    def clone(self) -> Self:
        """Another that goes on from the same state: no step of either changes the other."""


Going = TypeVar("Going", bound=Cloned)


class Reject(BaseException):
    """The draws so far break an assumption: this run says nothing.

    Not an `Exception`, so that no handler in a subject swallows it.
    """


class Nondet(ABC):
    """A source of choices. Every draw has a name, unique within a run."""

    @abstractmethod
    def word(self, name: str, domain: Domain = domains.ANY) -> Word:
        """Any word of `domain`."""

    @abstractmethod
    def one_of(self, name: str, options: Sequence[T]) -> T:
        """Any of `options`. A proof explores each on its own: prefer `word` for mere values."""

    @abstractmethod
    def memory(
        self,
        name: str,
        given: Sequence[tuple[Word, Word]] = (),
        entries: Domain = domains.ENTRY,
    ) -> Memory:
        """Any memory: any size in whole pages, any content but for the `given` entries (address
        and value), which it holds. `entries`, a domain of all 64-bit words, says which of them a
        search is to prefer: those of the tables' format.
        """

    @abstractmethod
    def assume(self, condition: Condition) -> None:
        """Consider only runs in which `condition` holds."""

    @abstractmethod
    def reach(self, label: str) -> None:
        """Note that this run comes by here. See `Invariant.reaches`."""

    @abstractmethod
    def seen(self, state: Hashable, left: int = 0) -> bool:
        """Say that the rest of the run depends on `state` alone, or on what it returns if it is a
        function, which is called only if need be; and on how many steps are `left`. An engine that
        has explored all that follows, in as many steps, ends the run here; others go on. False if
        an earlier run came by here, so that what is to be checked of the state has been.
        """

    def first(self, state: Hashable) -> bool:
        """Whether no run came by here before with a state, or with what it returns if it is a
        function: what is to be checked of it, which must depend on nothing else, has been
        otherwise. Engines that keep no count say so of any.
        """
        return True

    def begun(self, begin: Callable[[], Going]) -> Going:
        """What a run begins with: what `begin` makes, or a clone of what was `kept` in an earlier
        run, which then had the same draws up to there. It is asked for before anything is drawn.
        """
        return begin()

    def kept(self, going: Going) -> bool:
        """Say that a run may go on from a clone of this as well as from what it was made of.
        Whether any may.
        """
        return False

    def words(self, draws: Sequence[tuple[str, Domain]]) -> Sequence[Word]:
        """Any words of these domains, by name."""
        return [self.word(name, domain) for name, domain in draws]

    def flag(self, name: str) -> Flag:
        """0 or 1."""
        return self.word(name, domains.FLAG)

    def access(self, *states: "ControlStates") -> Access:
        """Any access to any linear address, but none to a shadow stack; with a kind of control
        states named, that too, and with metadata in the address.
        """
        kind, address = self.words(states[0].access_draws if states else ACCESS_DRAWS)
        return Access(address, kind >> 1 & 1, kind >> 4 & 1, kind >> 2 & 1, kind & 1, kind >> 6 & 1)

    def cpu(self, *states: "ControlStates") -> Cpu:
        """Any control state of these kinds; of 4-level or 5-level paging if none is named, without
        masked addresses and shadow stacks.
        """
        if states:
            return self._cpu_of(states)[0]
        maxphyaddr, cr0, cr3, cr4, efer, rflags, pkru, pkrs, page1gb = self.words(CPU_DRAWS)
        cr3 = cr3 & low_bits(maxphyaddr)
        # The domains hold nothing impossible (a test says so), so the check is not paid each time.
        return Cpu._make((cr0, cr3, cr4, efer, rflags, pkru, pkrs, page1gb, maxphyaddr, 1, None))

    def walk(self, *states: "ControlStates") -> tuple[Cpu, Memory, Access]:
        """Any control state of these kinds, any memory (named `guest`), any access to any linear
        address, to a shadow stack too.
        """
        cpu, chosen = self._cpu_of(states)
        memory = self.memory("guest", entries=chosen.entries)
        return cpu, memory, self.access(chosen)

    def _cpu_of(self, states: Sequence["ControlStates"]) -> tuple[Cpu, "ControlStates"]:
        chosen = states[0] if len(states) == 1 else self.one_of("states", states)
        return chosen.made_of(self.words(chosen.draws)), chosen

    def guest_physical_access(self) -> GuestPhysicalAccess:
        """Any access to any guest-physical address."""
        kind, address = self.words(GUEST_PHYSICAL_ACCESS_DRAWS)
        return GuestPhysicalAccess(
            address,
            write=kind >> 1 & 1,
            fetch=kind >> 4 & 1,
            user=kind >> 2 & 1,
            table=kind >> 3 & 1,
            linear=kind & 1 ^ 1,
            writable=kind >> 5 & 1,
            no_execute=kind >> 6 & 1,
            shadow_stack=kind >> 7,
        )

    def ept(self) -> Ept:
        """Any extended page tables with any capabilities."""
        maxphyaddr, low, root, mbec, capabilities = self.words(EPT_DRAWS)
        eptp = root & low_bits(maxphyaddr) | low
        return Ept._make((eptp, maxphyaddr, mbec, capabilities))

    def npt(self) -> Npt:
        """Any nested page tables, of a host in any paging mode."""
        maxphyaddr, mode, cr0, ncr3, cr4, efer, page1gb = self.words(NPT_DRAWS)
        five, long_mode = mode & mode >> 1, mode >> 1
        cr4 = cr4 | (mode & 1 | long_mode) * PAE | five * LA57
        efer = efer | long_mode * (LMA | LME)
        ncr3 = ncr3 & low_bits(maxphyaddr if long_mode == 1 else 32)
        return Npt._make((ncr3, cr4, efer, cr0, page1gb, maxphyaddr, 0))


CPU_DRAWS = (
    ("maxphyaddr", domains.MAXPHYADDR),
    ("cr0", domains.CR0),
    ("cr3", domains.CR3),
    ("cr4", domains.CR4),
    ("efer", domains.EFER),
    ("rflags", domains.RFLAGS),
    ("pkru", domains.KEYS),
    ("pkrs", domains.KEYS),
    ("page1gb", domains.PAGE1GB),
)
"""MAXPHYADDR, and the registers in the order of `Cpu`."""
EPT_DRAWS = (
    ("ept.maxphyaddr", domains.MAXPHYADDR),
    ("ept.low", domains.EPTP_LOW),
    ("ept.root", domains.EPTP_ROOT),
    ("ept.mbec", domains.FLAG),
    ("ept.capabilities", domains.EPT_CAPABILITY),
)
NPT_DRAWS = (
    ("npt.maxphyaddr", domains.MAXPHYADDR),
    ("npt.mode", domains.HOST_MODE),
    ("npt.cr0", domains.CR0),
    ("npt.ncr3", domains.CR3),
    ("npt.cr4", domains.HOST_CR4),
    ("npt.efer", domains.HOST_EFER),
    ("npt.page1gb", domains.PAGE1GB),
)
GUEST_PHYSICAL_ACCESS_DRAWS = (
    ("gpa.access", domains.GUEST_PHYSICAL_ACCESS),
    ("gpa", domains.GPA),
)
ACCESS_DRAWS = (("access", domains.ACCESS), ("address", domains.ADDRESS))


class ControlStates:
    """Control states of one kind, to be drawn, and memories for them: see `Nondet.walk`.

    Each register is of its domain: that of `CPU_DRAWS`, or the one given for it. What a state needs
    of several at once is made so: CR3 and PDPTEs within MAXPHYADDR, CR0.WP with CR4.CET, RFLAGS.VM
    in protected mode alone.
    """

    def __init__(
        self,
        name: str,
        registers: Mapping[str, Domain],
        entries: Domain = domains.ENTRY,
        accesses: Domain = domains.ANY_ACCESS,
        pdptes: bool = False,
    ) -> None:
        self.name, self.entries, self.pdptes = name, entries, pdptes
        draws = {**dict(CPU_DRAWS), "pse36": domains.PSE36, **registers}
        if pdptes:
            draws |= {"pdpte0": domains.PDPTE}
            draws |= {f"pdpte{i}": domains.OTHER_PDPTE for i in (1, 2, 3)}
        self.draws = tuple(draws.items())
        masked = registers.get("cr3") is domains.MASKED_CR3
        address = domains.TAGGED_ADDRESS if masked else domains.ADDRESS
        self.access_draws = (("access", accesses), ("address", address))

    def __repr__(self) -> str:
        return self.name

    def made_of(self, values: Sequence[Word]) -> Cpu:
        """The state of these drawn values."""
        maxphyaddr, cr0, cr3, cr4, efer, rflags, *others = values
        pkru, pkrs, page1gb, pse36, *pdptes = others
        cr0 = cr0 | bit(cr4, 23) << 16
        cr3 = cr3 & (low_bits(maxphyaddr) | LAM_U57 | LAM_U48)
        rflags = rflags & ~((bit(cr0, 0) ^ 1) << 17)
        reserved = reserved_in_pdptes(maxphyaddr)
        loaded = tuple(pdpte & ~(bit(pdpte, 0) * reserved) for pdpte in pdptes)
        registers = (cr0, cr3, cr4, efer, rflags, pkru, pkrs, page1gb, maxphyaddr, pse36)
        return Cpu._make((*registers, loaded if self.pdptes else None))


LONG_MODE = ControlStates(
    "4-level and 5-level paging",
    {"cr3": domains.MASKED_CR3, "cr4": domains.MASKING_CR4},
    domains.SHADOW_ENTRY,
)
"""With masked addresses and shadow stacks, other than what `Nondet.cpu` draws of itself."""
_LEGACY = {"cr3": domains.LEGACY_CR3, "efer": domains.LEGACY_EFER, "rflags": domains.LEGACY_RFLAGS}
_PAE = {**_LEGACY, "cr4": domains.PAE_CR4}
PAE_PAGING = ControlStates("PAE paging", _PAE, domains.PAE_ENTRY, pdptes=True)
PAE_IN_MEMORY = ControlStates("PAE paging, PDPTEs in memory", _PAE, domains.PAE_ENTRY)
PAGING_32 = ControlStates("32-bit paging", {**_LEGACY, "cr4": domains.CR4_32}, domains.PAIR)
_OFF = {"cr0": domains.CR0_OFF, "cr4": domains.CR4_OFF, "efer": domains.EFER_OFF}
NO_PAGING = ControlStates("no paging", {**_LEGACY, **_OFF})
LEGACY_PAGING = (PAGING_32, PAE_PAGING, PAE_IN_MEMORY)
EVERY_PAGING = (LONG_MODE, *LEGACY_PAGING)
EVERY_MODE = (*EVERY_PAGING, NO_PAGING)


def draws_of(value: Any) -> dict[str, Word]:
    """The words that `value`, an access or a control state, is drawn from, by the draws' names."""
    match value:
        case Access():
            kind = value.implicit | value.write << 1 | value.user << 2 | value.fetch << 4
            return {"access": kind | value.shadow_stack << 6, "address": value.address}
        case GuestPhysicalAccess():
            kind = value.linear ^ 1 | value.write << 1 | value.user << 2 | value.table << 3
            kind = kind | value.fetch << 4 | value.writable << 5 | value.no_execute << 6
            return {"gpa.access": kind | value.shadow_stack << 7, "gpa": value.address}
        case Ept():
            words = {f"ept.{name}": word for name, word in value._asdict().items()}
            low, root = value.eptp & low_bits(12), value.eptp >> 12 << 12
            return {**words, "ept.low": low, "ept.root": root}
        case Npt():
            words = {f"npt.{name}": word for name, word in value._asdict().items()}
            long_mode, pae = bit(value.efer, 10), bit(value.cr4, 5)
            mode = ite(long_mode == 1, 2 | bit(value.cr4, 12), pae)
            cr4, efer = value.cr4 & ~(PAE | LA57), value.efer & ~(LME | LMA)
            return {**words, "npt.mode": mode, "npt.cr4": cr4, "npt.efer": efer}
    registers: dict[str, Word] = value._asdict()
    return registers


Claim = Callable[[Nondet, Any], None]


@dataclass(frozen=True)
class Invariant:
    """A registered claim.

    `reaches` are the labels that a run must be able to reach: a check that never reached one of
    them is vacuous and does not count. `needs` is what a subject must observe for the claim to say
    something about it. `twin` names the seeded mistake (`vapama.bugs.mistakes`) that this invariant
    must be seen to refute. `bound` says what a proof does not range over, if anything. `searched`
    says why a claim is left to the engines that search and not proved, if it is, such as a program
    of many steps over objects. `unsuited` are engines whose scope holds too little of it to say
    something: there it is not run, and another claim is for them. `counts` says that it adds,
    subtracts and compares numbers and looks at no bits: then it is proved for any natural numbers.
    `scoped` says that it is made for the exhaustive engine, which runs as much of it among many
    claims as of it alone. `in_parts` says that the second solver is given the paths of its proof in
    parts: it finds some claims' so in a third of the time, and others', whose paths share much that
    is hard, in six times as much.
    """

    name: str
    claim: Claim
    source: str
    reaches: tuple[str, ...]
    needs: frozenset[str]
    twin: str
    bound: str
    searched: str = ""
    uses: tuple[str, ...] = ()
    equates: tuple[Callable[..., Any], str] | None = None
    unsuited: tuple[str, ...] = ()
    counts: bool = False
    scoped: bool = False
    in_parts: bool = False

    @property
    def title(self) -> str:
        """The name as a sentence."""
        return self.name.replace("_", " ")

    @property
    def is_composed(self) -> bool:
        """Whether it is about what is made of several walks or steps: it has much to range over."""
        several = {MANY, SECOND_STAGE_MANY, NESTED_MANY, NESTED}
        return bool(self.searched or several & set(self.needs))


REGISTRY: dict[str, Invariant] = {}


def invariant(
    *,
    source: str,
    reaches: Sequence[str] = (),
    needs: Sequence[str] = (),
    twin: str = "",
    bound: str = "",
    searched: str = "",
    uses: Sequence[str] = (),
    equates: tuple[Callable[..., Any], str] | None = None,
    unsuited: Sequence[str] = (),
    counts: bool = False,
    scoped: bool = False,
    in_parts: bool = False,
) -> Callable[[Claim], Claim]:
    """Register the decorated function as an invariant.

    `source` is the section of the manual that the claim follows; see `Invariant` for the rest.
    A claim that needs nothing in particular needs a subject that translates.
    Raises `ValueError` if another invariant has the same name.
    """

    def register(claim: Claim) -> Claim:
        name = claim.__name__
        known = REGISTRY.get(name)
        if known is not None and known.claim.__module__ != claim.__module__:
            where = known.claim.__module__
            raise ValueError(
                f"an invariant named {name} is in {where} already: name this otherwise"
            )
        REGISTRY[name] = Invariant(
            name,
            claim,
            source,
            tuple(reaches),
            frozenset(needs) or frozenset({TRANSLATE}),
            twin,
            bound,
            searched,
            tuple(uses),
            equates,
            tuple(unsuited),
            counts,
            scoped,
            in_parts,
        )
        return claim

    return register


def load_invariants() -> dict[str, Invariant]:
    """Import every module of `vapama.spec.invariants`; the registry, by module, in the order of
    definition, whichever was imported before.
    """
    package = importlib.import_module("vapama.spec.invariants")
    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"{package.__name__}.{module}")
    by_module = sorted(REGISTRY.items(), key=lambda item: item[1].claim.__module__)
    REGISTRY.clear()
    REGISTRY.update(by_module)
    return REGISTRY
