"""Invariants, and the source of choices they draw from.

An invariant is a function of two arguments with plain asserts. `nondet` gives it any value there is
(the name is Kani's and CBMC's): an engine decides how, by random choice, by enumeration, or by
symbols that stand for all values at once. `subject` is the implementation under test.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vapama.spec import domains
from vapama.spec.access import Access
from vapama.spec.cpu import Cpu
from vapama.spec.domains import Domain
from vapama.spec.memory import Memory
from vapama.spec.subject import TRANSLATE
from vapama.spec.words import Condition, Flag, Word, low_bits

T = TypeVar("T")


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
    def memory(self, name: str, given: Sequence[tuple[Word, Word]] = ()) -> Memory:
        """Any memory: any size in whole pages, any content but for the `given` entries (address
        and value), which it holds.
        """

    @abstractmethod
    def assume(self, condition: Condition) -> None:
        """Consider only runs in which `condition` holds."""

    @abstractmethod
    def reach(self, label: str) -> None:
        """Note that this run comes by here. See `Invariant.reaches`."""

    @abstractmethod
    def seen(self, state: Hashable) -> None:
        """Say that the rest of the run depends on `state` alone. An engine that has explored all
        that follows from it ends the run here; others go on.
        """

    def words(self, draws: Sequence[tuple[str, Domain]]) -> Sequence[Word]:
        """Any words of these domains, by name."""
        return [self.word(name, domain) for name, domain in draws]

    def flag(self, name: str) -> Flag:
        """0 or 1."""
        return self.word(name, domains.FLAG)

    def access(self) -> Access:
        """Any access to any linear address."""
        kind, address = self.words(ACCESS_DRAWS)
        return Access(address, kind >> 1 & 1, kind >> 4 & 1, kind >> 2 & 1, kind & 1)

    def cpu(self) -> Cpu:
        """Any control state with 4-level or 5-level paging."""
        maxphyaddr, cr0, cr3, *others = self.words(CPU_DRAWS)
        cr3 = cr3 & low_bits(maxphyaddr)
        # The domains hold nothing impossible (a test says so), so the check is not paid each time.
        return Cpu._make((cr0, cr3, *others, maxphyaddr))


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
ACCESS_DRAWS = (("access", domains.ACCESS), ("address", domains.ADDRESS))

Claim = Callable[[Nondet, Any], None]


@dataclass(frozen=True)
class Invariant:
    """A registered claim.

    `reaches` are the labels that a run must be able to reach: a check that never reached one of
    them is vacuous and does not count. `needs` is what a subject must observe for the claim to say
    something about it. `twin` names the seeded mistake (`vapama.bugs.mistakes`) that this invariant
    must be seen to refute. `bound` says what a proof does not range over, if anything. `searched`
    says why a claim is left to the engines that search and not proved, if it is: a program of many
    steps over objects, which another claim proves step by step.
    """

    name: str
    claim: Claim
    source: str
    reaches: tuple[str, ...]
    needs: frozenset[str]
    twin: str
    bound: str
    searched: str = ""

    @property
    def title(self) -> str:
        """The name as a sentence."""
        return self.name.replace("_", " ")


REGISTRY: dict[str, Invariant] = {}


def invariant(
    *,
    source: str,
    reaches: Sequence[str] = (),
    needs: Sequence[str] = (),
    twin: str = "",
    bound: str = "",
    searched: str = "",
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
        )
        return claim

    return register


def load_invariants() -> dict[str, Invariant]:
    """Import every module of `vapama.spec.invariants`; the registry, in the order of loading."""
    package = importlib.import_module("vapama.spec.invariants")
    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"{package.__name__}.{module}")
    return REGISTRY
