"""Words as natural numbers: a claim that only counts is proved for any numbers at all.

Where a claim adds, subtracts and compares, and looks at no bits, its symbols can stand for integers
instead of words: there are more of them, and a solver is done in milliseconds where sums of many
bits take it minutes. What is proved of all natural numbers is true of Python's ints, and of words
as long as no sum exceeds them. A difference must be shown to be none that is negative.
"""

from __future__ import annotations

from typing import Any

import z3

from vapama.proofs.symbolic import Explorer, Symbol, Undecided, Unfaithful, running
from vapama.spec import domains
from vapama.spec.domains import Domain, narrowed
from vapama.spec.nondet import Reject


class Count(Symbol):
    """A natural number that is an SMT term."""

    __slots__ = ("term",)
    __hash__ = Symbol.__hash__

    def __init__(self, term: z3.ArithRef) -> None:
        self.term = term

    def __add__(self, other: Any) -> Count:
        return Count(self.term + _term(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Count:
        return _difference(self.term, _term(other))

    def __rsub__(self, other: Any) -> Count:
        return _difference(_term(other), self.term)

    def __xor__(self, other: Any) -> Count:
        a, b = _flag(self.term), _flag(_term(other))
        return Count(z3.If(a == b, z3.IntVal(0), z3.IntVal(1)))

    __rxor__ = __xor__

    def __and__(self, other: Any) -> Count:
        a, b = _flag(self.term), _flag(_term(other))
        return Count(z3.If(z3.And(a == 1, b == 1), z3.IntVal(1), z3.IntVal(0)))

    __rand__ = __and__

    def __eq__(self, other: object) -> Any:
        return Truth(self.term == _term(other))

    def __ne__(self, other: object) -> Any:
        return Truth(self.term != _term(other))

    def __lt__(self, other: Any) -> Truth:
        return Truth(self.term < _term(other))

    def __le__(self, other: Any) -> Truth:
        return Truth(self.term <= _term(other))

    def __gt__(self, other: Any) -> Truth:
        return Truth(self.term > _term(other))

    def __ge__(self, other: Any) -> Truth:
        return Truth(self.term >= _term(other))

    def __bool__(self) -> bool:
        return running().branch(self.term != 0)


class Truth(Symbol):
    """A condition on natural numbers."""

    __slots__ = ("term",)
    __hash__ = Symbol.__hash__
    __class__ = property(lambda symbol: bool)

    def __init__(self, term: z3.BoolRef) -> None:
        self.term = term

    def __and__(self, other: Any) -> Truth:
        return Truth(z3.And(self.term, _truth(other)))

    __rand__ = __and__

    def __or__(self, other: Any) -> Truth:
        return Truth(z3.Or(self.term, _truth(other)))

    __ror__ = __or__

    def __eq__(self, other: object) -> Any:
        return Truth(self.term == _truth(other))

    def __ne__(self, other: object) -> Any:
        return Truth(self.term != _truth(other))

    def __bool__(self) -> bool:
        return running().branch(self.term)

    def ite(self, then: Any, otherwise: Any) -> Count:
        """See `spec.words.ite`."""
        return Count(z3.If(self.term, _term(then), _term(otherwise)))


def _term(value: Any) -> z3.ArithRef:
    """Any operand as a number. Raises `Unfaithful` for what is none."""
    if type(value) is Count:
        return value.term
    if type(value) is Truth:
        return z3.If(value.term, z3.IntVal(1), z3.IntVal(0))
    if type(value) not in (int, bool) or value < 0:
        raise Unfaithful(f"a {type(value).__name__} is used as a natural number")
    return z3.IntVal(int(value))


def _truth(value: Any) -> z3.BoolRef:
    if type(value) is Truth:
        return value.term
    if type(value) is bool:
        return z3.BoolVal(value)
    raise Unfaithful(f"a {type(value).__name__} is used as a condition")


def _flag(term: z3.ArithRef) -> z3.ArithRef:
    """A number that is 0 or 1: of others the bits are not known."""
    running().require(z3.And(term >= 0, term <= 1), "bits are asked for of a number that has many")
    return term


def _difference(a: z3.ArithRef, b: z3.ArithRef) -> Count:
    running().require(a >= b, "a difference may be negative")
    return Count(a - b)


class Naturals(Explorer):
    """An explorer whose draws are natural numbers: of a domain of some low bits, any; of one bit
    and of a few values, these.
    """

    def word(self, name: str, domain: Domain = domains.ANY) -> Any:
        """A fresh number."""
        domain = narrowed(domain, self.narrow.get(name))
        if not domain.among and (domain.fixed or domain.free & domain.free + 1):
            raise Unfaithful(f"the domain of {name} is not one of numbers up to some number")
        if self.pins is not None:
            value = self.pins.get(name, domain.representatives()[0])
            if not domain.holds(value):
                raise Reject
            self._drawn(name, z3.IntVal(value))
            return Count(z3.IntVal(value))
        symbol = z3.Int(name)
        self._drawn(name, symbol)
        if domain.among:
            self._assume(z3.Or(*(symbol == value for value in domain.among)))
        elif domain.free == 1:
            self._assume(z3.And(symbol >= 0, symbol <= 1))
        else:
            self._assume(symbol >= 0)
        return Count(symbol)

    def memory(self, *_: Any, **__: Any) -> Any:
        """Refused: memory is of words."""
        raise Unfaithful("a claim about numbers draws a memory")

    def model(self) -> list[tuple[str, int]]:
        """Values of all draws that take the current path, in order."""
        if self.solver.check() != z3.sat:
            raise Undecided("a path that was possible has no model")
        model = self.solver.model()
        return [
            (name, model.eval(term, model_completion=True).as_long())
            for name, term in self.draws.items()
        ]
