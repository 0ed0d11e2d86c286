"""Symbolic words, and an explorer that runs plain Python on them, path by path.

A `SymWord` stands for every value of a 64-bit word at once; asking for the truth of a condition
(``if``, ``assert``) forks the path. Paths are explored by running the function again from the
start, following the recorded decisions and taking the next one the other way.

Python's ints do not wrap, z3's bit-vectors and numba's uint64 do. So that a proof carries over to
all three, an operation whose result could leave 64 bits, a shift by 64 or more, or a load outside
memory must be shown impossible on its path; otherwise the run ends in `Unfaithful`. So does all
that an int can do and a symbol cannot: be a key or an index, be divided, tell its text. (Only what
Python lets nobody redefine goes unseen, ``is`` and ``type``; and arithmetic on plain ints, which
are no part of the input, is Python's own.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Number
from typing import Any, TypeVar, cast

import z3

from vapama.spec import domains
from vapama.spec.domains import Domain, narrowed
from vapama.spec.nondet import Nondet, Reject
from vapama.spec.words import WORD

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Operand = Any


class Stop(BaseException):
    """Ends an exploration. The explorer notes it, so that no handler in a claim swallows it."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        if _explorer is not None and _explorer.stopped is None:
            _explorer.stopped = self


class Unfaithful(Stop):
    """On some path an operation means different things to Python, z3 and the compiled kernels."""


class Undecided(Stop):
    """The solver reached its resource limit."""


class NotDeterministic(Stop):
    """A re-run with the same decisions asked for another one: its result cannot be trusted."""


# The explorer that is running, which truth tests and obligations go to.
_explorer: Explorer | None = None


def running() -> Explorer:
    """The exploration that is under way."""
    if _explorer is None:
        raise RuntimeError("a symbolic word was used outside of an exploration")
    return _explorer


_COMPLEMENT = "a complement is used other than and'ed with a word"
COMPARED = "the text of a word may have been compared: its path goes on"
_FOREIGN = "an operation that words do not have (spec/words.py says which they have)"


def refusal(why: str) -> Any:
    """A method that refuses, whatever it is given."""

    def refuse(*_: object) -> Any:
        raise Unfaithful(why)

    return refuse


class Symbol:
    """What a claim holds in place of an int, and takes for one.

    Here is all that ints can do and symbols cannot. It is refused by an `Unfaithful`, and not by
    an exception that a claim might handle: on ints the claim goes on.
    """

    __slots__ = ()
    __hash__ = refusal("a word is a key (of a dict, a set, a cache), which must be one value")
    __index__ = refusal("a word is made an index, a length or a plain number")
    __neg__ = __pos__ = __abs__ = __round__ = __trunc__ = refusal(_FOREIGN)
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = refusal(_FOREIGN)
    __mod__ = __rmod__ = __divmod__ = __rdivmod__ = __pow__ = __rpow__ = refusal(_FOREIGN)

    # To `isinstance` a word is an int, as it is without symbols.
    __class__ = property(lambda symbol: int)

    def __getattr__(self, name: str) -> Any:
        if hasattr(int, name):
            raise Unfaithful(f"a word is asked for its {name}")
        raise AttributeError(f"'int' object has no attribute {name!r}")

    def __format__(self, spec: str) -> str:
        if _explorer is not None:
            _explorer.told = True
        return "(a symbolic word)"

    def __repr__(self) -> str:
        return format(self)


def once(operation: F) -> F:
    """The operation, which depends on its operands alone, done once for the same ones.

    Runs of one exploration build the same terms over and over, and building them takes z3 longer
    than it takes to look the result up. Operands are told apart by identity, and kept.
    """

    def remembered(*operands: Operand) -> Any:
        if _explorer is None:
            return operation(*operands)
        key = (operation, *((o,) if type(o) is int else id(o) for o in operands))
        found = _explorer.built.get(key)
        if found is None:
            found = _explorer.built[key] = (operands, operation(*operands))
        return found[1]

    return cast(F, remembered)


class SymWord(Symbol):
    """A word that is an SMT term, with the bits known to be possibly (`may`) and surely (`must`) 1.

    The known bits decide many conditions without the solver; `must` is also the least value the
    word can have, and `may` the greatest.
    """

    __slots__ = ("may", "must", "term")

    def __init__(self, term: z3.BitVecRef, may: int = WORD, must: int = 0) -> None:
        self.term, self.may, self.must = term, may, must

    @once
    def __and__(self, other: Operand) -> Operand:
        if type(other) is Complement:
            return other & self
        if type(other) is int and other < 0:
            other &= WORD
        o = word(other)
        return made(self.term & o.term, self.may & o.may, self.must & o.must)

    __rand__ = __and__

    @once
    def __or__(self, other: Operand) -> Operand:
        o = word(other)
        return made(self.term | o.term, self.may | o.may, self.must | o.must)

    __ror__ = __or__

    @once
    def __xor__(self, other: Operand) -> Operand:
        o = word(other)
        must = (self.must & ~o.may) | (o.must & ~self.may)
        may = (self.may | o.may) & ~(self.must & o.must)
        return made(self.term ^ o.term, may, must)

    __rxor__ = __xor__

    def __invert__(self) -> Complement:
        return Complement(self)

    def __add__(self, other: Operand) -> Operand:
        o = word(other)
        total = _sum(self, o)
        most = self.may + o.may
        if most > WORD:
            running().require(z3.UGE(total.term, self.term), "a sum may exceed 64 bits")
        return total

    __radd__ = __add__

    def __sub__(self, other: Operand) -> Operand:
        o = word(other)
        if self.must < o.may:
            running().require(z3.UGE(self.term, o.term), "a difference may be negative")
        return _difference(self, o)

    def __rsub__(self, other: Operand) -> Operand:
        return word(other).__sub__(self)

    def __mul__(self, other: Operand) -> Operand:
        o = word(other)
        if self.may * o.may > WORD:
            wide = z3.ZeroExt(64, self.term) * z3.ZeroExt(64, o.term)
            running().require(z3.Extract(127, 64, wide) == 0, "a product may exceed 64 bits")
        return _product(self, o)

    __rmul__ = __mul__

    def __lshift__(self, other: Operand) -> Operand:
        return _shift_left(self, word(other))

    def __rlshift__(self, other: Operand) -> Operand:
        return _shift_left(word(other), self)

    def __rshift__(self, other: Operand) -> Operand:
        return _shift_right(self, word(other))

    def __rrshift__(self, other: Operand) -> Operand:
        return _shift_right(word(other), self)

    @once
    def __eq__(self, other: object) -> Any:
        if not isinstance(other, Number):
            return NotImplemented
        o = word(other)
        if self.must & ~o.may or o.must & ~self.may:
            return NO
        return SymBool(self.term == o.term)

    def __ne__(self, other: object) -> Any:
        return _negated(self == other)

    @once
    def __lt__(self, other: Operand) -> Any:
        o = word(other)
        if self.may < o.must:
            return YES
        if self.must >= o.may:
            return NO
        return SymBool(z3.ULT(self.term, o.term))

    def __ge__(self, other: Operand) -> Any:
        return _negated(self < other)

    def __gt__(self, other: Operand) -> Any:
        return word(other) < self

    def __le__(self, other: Operand) -> Any:
        return word(other) >= self

    def __bool__(self) -> bool:
        if self.must:
            return True
        if not self.may:
            return False
        return running().branch(_nonzero(self).term)

    # A word that is the same on all inputs can do what any int can.

    def __hash__(self) -> int:
        value = self._only_value()
        return super().__hash__() if value is None else hash(value)

    def __index__(self) -> int:
        value = self._only_value()
        return super().__index__() if value is None else value

    def __format__(self, spec: str) -> str:
        value = self._only_value()
        return super().__format__(spec) if value is None else format(value, spec)

    def _only_value(self) -> int | None:
        if self.may == self.must:
            return self.must
        simple = _simple(self)
        return simple.as_long() if isinstance(simple, z3.BitVecNumRef) else None


class Complement(Symbol):
    """``~word``: a negative int to Python. It may only be and'ed with a word, or undone."""

    __slots__ = ("inner",)

    def __init__(self, inner: SymWord) -> None:
        self.inner = inner

    @once
    def __and__(self, other: Operand) -> Operand:
        o = word(other)
        i = self.inner
        return made(~i.term & o.term, ~i.must & o.may & WORD, ~i.may & o.must & WORD)

    __rand__ = __and__

    def __invert__(self) -> SymWord:
        return self.inner

    __or__ = __ror__ = __xor__ = __rxor__ = __add__ = __radd__ = refusal(_COMPLEMENT)
    __sub__ = __rsub__ = __mul__ = __rmul__ = refusal(_COMPLEMENT)
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = refusal(_COMPLEMENT)
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = refusal(_COMPLEMENT)
    __hash__ = Symbol.__hash__


def _of_words(operation: str) -> Any:
    """The operation of a condition taken as a word."""
    return lambda condition, other: getattr(word(condition), operation)(other)


class SymBool(Symbol):
    """A condition that is an SMT term. It counts as 0 or 1, as Python's conditions do."""

    __slots__ = ("term",)
    __hash__ = Symbol.__hash__
    __class__ = property(lambda symbol: bool)

    def __init__(self, term: z3.BoolRef) -> None:
        self.term = term

    def __bool__(self) -> bool:
        if self is YES or self is NO:
            return self is YES
        return running().branch(self.term)

    @once
    def __and__(self, other: Operand) -> Operand:
        o = _condition(other)
        if o is None:
            return word(self) & other
        if o is YES or self is NO:
            return self
        return o if o is NO or self is YES else SymBool(z3.And(self.term, o.term))

    __rand__ = __and__

    @once
    def __or__(self, other: Operand) -> Operand:
        o = _condition(other)
        if o is None:
            return word(self) | other
        if o is NO or self is YES:
            return self
        return o if o is YES or self is NO else SymBool(z3.Or(self.term, o.term))

    __ror__ = __or__

    def __eq__(self, other: object) -> Any:
        o = _condition(other)
        if o is None:
            return word(self) == other
        return SymBool(self.term == o.term)

    def __ne__(self, other: object) -> Any:
        return _negated(self == other)

    def __xor__(self, other: Operand) -> Operand:
        return word(self) ^ other if _condition(other) is None else self != other

    __rxor__ = __xor__
    __invert__ = refusal("~ of a condition is -1 or -2, never false: use `not`, or == False")
    __add__, __radd__ = _of_words("__add__"), _of_words("__radd__")
    __sub__, __rsub__ = _of_words("__sub__"), _of_words("__rsub__")
    __mul__, __rmul__ = _of_words("__mul__"), _of_words("__rmul__")
    __lshift__, __rlshift__ = _of_words("__lshift__"), _of_words("__rlshift__")
    __rshift__, __rrshift__ = _of_words("__rshift__"), _of_words("__rrshift__")
    __lt__, __le__ = _of_words("__lt__"), _of_words("__le__")
    __gt__, __ge__ = _of_words("__gt__"), _of_words("__ge__")

    def ite(self, then: Operand, otherwise: Operand) -> Operand:
        """`then` where the condition holds, else `otherwise`: see `spec.words.ite`."""
        a, b = word(then), word(otherwise)
        # What a path knows is no property of the operands: so the answer is not kept.
        known = self is YES or (None if _explorer is None else _explorer.known_truth(self.term))
        return _choice(self, a, b) if known is None else a if known else b


TRUE = z3.BoolVal(True)
YES, NO = SymBool(TRUE), SymBool(z3.BoolVal(False))
"""Conditions decided by known bits. They stay symbolic, so that what is made of them is checked."""


def _condition(value: Operand) -> SymBool | None:
    """A condition, symbolic or plain, as a symbolic one; None if it is none."""
    if type(value) is SymBool:
        return value
    if type(value) is bool:
        return YES if value else NO
    return None


@once
def _negated(condition: Any) -> Any:
    if condition is YES or condition is NO:
        return NO if condition is YES else YES
    return SymBool(z3.Not(condition.term)) if type(condition) is SymBool else not condition


def word(value: Operand) -> SymWord:
    """Any operand as a symbolic word. Raises `Unfaithful` for what is none of 64 bits."""
    if type(value) is SymWord:
        return value
    if type(value) is SymBool:
        return _of_condition(value)
    if type(value) is Complement:
        raise Unfaithful(_COMPLEMENT)
    if not isinstance(value, int):
        raise Unfaithful(f"a {type(value).__name__} is used as a word")
    return _constant(int(value))


@once
def _of_condition(condition: SymBool) -> SymWord:
    """1 where the condition holds, else 0."""
    if condition is YES or condition is NO:
        return _constant(int(condition is YES))
    return made(z3.If(condition.term, _constant(1).term, _constant(0).term), 1, 0)


@once
def _choice(condition: SymBool, a: SymWord, b: SymWord) -> SymWord:
    return made(z3.If(condition.term, a.term, b.term), a.may | b.may, a.must & b.must)


@once
def _nonzero(a: SymWord) -> SymBool:
    return SymBool(a.term != 0)


@once
def _sum(a: SymWord, b: SymWord) -> SymWord:
    return made(a.term + b.term, _ones(a.may + b.may) & WORD, 0)


@once
def _difference(a: SymWord, b: SymWord) -> SymWord:
    return made(a.term - b.term, _ones(a.may), 0)


@once
def _product(a: SymWord, b: SymWord) -> SymWord:
    """The product as a term that is easy to decide: by a flag a choice, by a power of 2 a shift."""
    may = _ones(a.may * b.may) & WORD
    for factor, other in ((a, b), (b, a)):
        if factor.may == 1:
            return made(z3.If(factor.term == 1, other.term, _constant(0).term), may, 0)
        if factor.may == factor.must and factor.may.bit_count() == 1:
            return made(other.term << factor.may.bit_length() - 1, may, 0)
    return made(a.term * b.term, may, 0)


@lru_cache(maxsize=4096)
def _constant(value: int) -> SymWord:
    if not 0 <= value <= WORD:
        raise Unfaithful(f"the constant {value:#x} is not an unsigned 64-bit word")
    return SymWord(z3.BitVecVal(value, 64), value, value)


THREE = _constant(3)


def made(term: z3.BitVecRef, may: int = WORD, must: int = 0) -> SymWord:
    """A word of this term; a constant if all of its bits are known. The same for the same term."""
    if may == must:
        return _constant(may)
    made = SymWord(term, may, must)
    if _explorer is None:
        return made
    # The word keeps the term alive, so that no other gets its number.
    return _explorer.words_made.setdefault((term.get_id(), may, must), made)


def _ones(most: int) -> int:
    """The bits that a value of at most `most` can have."""
    return (1 << most.bit_length()) - 1


def _shift_left(a: SymWord, by: SymWord) -> Operand:
    if by.may > 63:
        running().require(z3.ULT(by.term, 64), "a left shift may be by 64 or more")
    furthest = min(by.may, 63)
    if a.may << furthest > WORD and not (a.may == 1 and furthest <= 63):
        back = z3.LShR(a.term << by.term, by.term) == a.term
        running().require(back, "a left shift may exceed 64 bits")
    return _shifted_left(a, by, furthest)


@once
def _shifted_left(a: SymWord, by: SymWord, furthest: int) -> SymWord:
    if by.may == by.must:
        return made(a.term << by.term, a.may << by.may & WORD, a.must << by.may & WORD)
    return made(a.term << by.term, _ones(a.may << furthest) & WORD, 0)


def _shift_right(a: SymWord, by: SymWord) -> Operand:
    if by.may > 63:
        running().require(z3.ULT(by.term, 64), "a right shift may be by 64 or more")
    return _shifted_right(a, by)


@once
def _shifted_right(a: SymWord, by: SymWord) -> SymWord:
    if by.may == by.must:
        return made(z3.LShR(a.term, by.term), a.may >> by.may, a.must >> by.may)
    return made(z3.LShR(a.term, by.term), _ones(a.may), 0)


@lru_cache(maxsize=64)
def _array(name: str) -> z3.ArrayRef:
    # Named apart, for a word may have the same name.
    return z3.Array(f"{name}[]", z3.BitVecSort(64), z3.BitVecSort(64))


class SymMemory:
    """Any memory: an SMT array of entries by address, and any limit."""

    def __init__(self, name: str, limit: Operand) -> None:
        self.name, self.limit = name, limit
        self.array = _array(name)
        self.loads: list[tuple[z3.BitVecRef, z3.BitVecRef]] = []
        self.given: list[tuple[SymWord, Operand]] = []
        self.by_index: dict[int, SymWord] = {}
        self.known_same: list[SymWord] = []

    def load(self, address: Operand) -> Operand:
        """The entry at `address`, which must be aligned and below the limit."""
        where = word(address)
        if where.may & 7:
            running().require((where & 7 == 0).term, "a load may be unaligned")
        running().require((where < self.limit).term, "a load may be outside memory")
        for at, given in self.given:
            if running().always((where == at).term):
                return given
        # Kernels come back from an entry's index to its address. Where that leads to the address of
        # an earlier load the entry is the same term, which all that is made of it is easier for.
        same = self.by_index.get(_simple_id(where))
        if same is not None and running().always((where == same).term):
            return _entry(self.array, same)
        value = _entry(self.array, where)
        self.loads.append((where.term, value.term))
        if where.may & 7:
            self.by_index[_simple_id(_shifted_left(_shifted_right(where, THREE), THREE, 3))] = where
        return value

    def same_address(self, a: z3.ExprRef, b: z3.ExprRef) -> None:
        """Two terms are known to be equal. If one is the address of an earlier load, a load from
        the other gives the same term, for the reason given there.
        """
        for loaded, other in ((a, b), (b, a)):
            if any(loaded.eq(at) for at, _ in self.loads):
                word_ = made(other)
                self.by_index[_simple_id(word_)] = made(loaded)
                self.known_same.append(word_)


@once
def _entry(array: z3.ArrayRef, where: SymWord) -> SymWord:
    return made(z3.Select(array, where.term))


@once
def _simple(a: SymWord) -> z3.BitVecRef:
    return z3.simplify(a.term)


def _simple_id(a: SymWord) -> int:
    """What is the same for words that z3 simplifies to the same term, as long as they are kept."""
    number: int = _simple(a).get_id()
    return number


BRANCH, ASSUME, CHOICE, MUST, ASK = "branch", "assume", "choice", "must", "ask"


@dataclass(slots=True)
class Decision:
    """A point of a run where the solver was asked: what for, and which way the run goes.

    `options` are the conditions of the ways there are. `open` are those still to be explored,
    `models` has a model of each way that is not explored yet, where one is known. `edge` is the
    number of the way that is taken, of all ways that any run of the exploration takes.
    """

    kind: str
    options: list[z3.BoolRef]
    taken: int
    open: list[int] = field(default_factory=list)
    models: dict[int, z3.ModelRef | None] = field(default_factory=dict)
    edge: int = 0


@dataclass(slots=True, frozen=True)
class Fact:
    """A condition simplified and without its outer negation, and whether it had one.

    `sides` are the condition, in its own sense, and its opposite; `number` z3's of `simple`; `term`
    is the condition, kept so that z3 gives its number to no other.
    """

    term: z3.BoolRef
    simple: z3.BoolRef
    number: int
    negated: bool
    sides: list[z3.BoolRef]


@dataclass(slots=True)
class Path:
    """A finished path: what its run asked (the kind of decision, the conditions of the ways there
    are) and which way it was told to go, whether an assumption cut it short, what it reached, and
    what an assertion on it said if it failed.
    """

    decisions: list[tuple[str, list[z3.BoolRef], int]]
    pruned: bool
    reached: set[str]
    failure: str | None = None

    def conditions(self) -> list[z3.BoolRef]:
        """What holds on this path, of all that its run asked."""
        return [options[taken] for kind, options, taken in self.decisions if taken >= 0]


class Explorer(Nondet):
    """Runs a function for every feasible path, drawing symbols. A `Nondet` of the z3 engine.

    `rlimit` bounds each solver query in the solver's own steps (0: no bound), so that a verdict
    does not depend on the machine. `pins` are draws that get the given value instead of any.
    """

    def __init__(self, rlimit: int = 0, narrow: Any = None, pins: dict[str, int] | None = None):
        self.solver = z3.SimpleSolver()
        self.solver.set("rlimit", rlimit)
        self.rlimit = rlimit
        self.narrow = narrow or {}
        self.pins = pins
        self.checks = 0
        self.trail: list[Decision] = []
        self.depth = 0
        self.position = 0
        self.asked: list[tuple[str, list[z3.BoolRef], int]] = []
        self.draws: dict[str, Any] = {}
        self.memories: list[SymMemory] = []
        self.reached: set[str] = set()
        self.told = False
        self.stopped: Stop | None = None
        self.known: dict[int, bool] = {}
        self.given: dict[int, bool] = {}
        """What is known before a run begins."""
        self.edge = self.edges = 0
        self.built: dict[tuple[Any, ...], tuple[Any, Any]] = {}
        """Operands and results of operations on symbols: see `once`."""
        self.words_made: dict[tuple[int, int, int], SymWord] = {}
        self.symbols: dict[tuple[str, int, int], tuple[z3.BitVecRef, SymWord]] = {}
        """Draws by name and domain, and their terms."""
        self.simplified: dict[int, Fact] = {}
        self.witness: z3.ModelRef | None = None
        self.on_path: Callable[[int], None] = lambda paths: None
        self.on_check: Callable[[bool], None] = lambda begins: None
        """Called before (with True) and after each query, which may take its time."""

    # Nondet

    def word(self, name: str, domain: Domain = domains.ANY) -> Any:
        """A fresh symbol that ranges over the domain."""
        domain = narrowed(domain, self.narrow.get(name))
        key = name, domain.free, domain.fixed
        known = self.symbols.get(key)
        if known is not None and not domain.among:
            self._drawn(name, known[0])
            return known[1]
        values = (domain.free, domain.fixed, *domain.among)
        if min(values) < 0 or max(values) > WORD:
            raise Unfaithful(f"the domain of {name} is not of 64-bit words")
        if self.pins is not None:
            value = self.pins.get(name, domain.representatives()[0])
            if not domain.holds(value):
                raise Reject
            return made(self._drawn(name, z3.BitVecVal(value, 64)))
        if domain.among:
            return self._among(name, domain.among)
        symbol = z3.BitVec(name, 64)
        any_word = domain.free == WORD and not domain.fixed
        term = symbol if any_word else symbol & domain.free | domain.fixed
        drawn = made(self._drawn(name, term), domain.free | domain.fixed, domain.fixed)
        self.symbols[key] = term, drawn
        return drawn

    def _among(self, name: str, values: tuple[int, ...]) -> SymWord:
        symbol = self._drawn(name, z3.BitVec(name, 64))
        may, must = 0, WORD
        for value in values:
            may, must = may | value, must & value
        low, high = min(values), max(values)
        if len(set(values)) == high - low + 1:
            self._assume(z3.And(z3.UGE(symbol, low), z3.ULE(symbol, high)))
        else:
            self._assume(z3.Or(*(symbol == value for value in values)))
        return made(symbol, may, must)

    def _drawn(self, name: str, term: z3.BitVecRef) -> z3.BitVecRef:
        """Keep the term of a draw."""
        if name in self.draws:
            raise Unfaithful(f"two draws are named {name}: give each its own name")
        self.draws[name] = term
        return term

    def one_of(self, name: str, options: Sequence[T]) -> T:
        """Each option in turn, on its own path."""
        if self.pins is not None:
            chosen = self.pins.get(name, 0)
            if chosen >= len(options):
                raise Reject
        else:
            chosen = self.choose(len(options))
        self._drawn(name, z3.BitVecVal(chosen, 64))
        return options[chosen]

    def choose(self, count: int) -> int:
        """Each number below `count`, on its own path."""
        return self._decide(CHOICE, [TRUE] * count)

    def memory(
        self,
        name: str,
        given: Sequence[tuple[Any, Any]] = (),
        entries: Domain = domains.ENTRY,
    ) -> Any:
        """A fresh SMT array."""
        memory = SymMemory(name, self.word(f"{name}.limit", domains.LIMIT))
        if self.pins is not None:
            memory.array = _pinned(name, self.pins, given)
        for address, value in given:
            self.assume(address < memory.limit)
            self._assume(z3.simplify((memory.load(address) == value).term))
            memory.given.append((word(address), value))
        memory.loads.clear()
        self.memories.append(memory)
        return memory

    def assume(self, condition: Any) -> None:
        """Go on where the condition holds. Where it does not, another path ends here."""
        if not condition:
            raise Reject
        if type(condition) is SymBool and z3.is_eq(condition.term):
            for memory in self.memories:
                memory.same_address(*condition.term.children())

    def reach(self, label: str) -> None:
        """Count the label as reached by this path, if the path goes on to its end."""
        self.reached.add(label)

    def seen(self, state: Hashable, left: int = 0) -> bool:
        """A proof follows every path."""
        return True

    # Decisions

    def branch(self, term: z3.BoolRef) -> bool:
        """The truth of a condition on this path; explores both where both are possible."""
        fact = self._fact(term)
        if fact.simple is TRUE:
            return not fact.negated
        if fact.number not in self.known:
            self._learn(fact, self._decide(BRANCH, fact.sides) == 0)
        return self.known[fact.number] is not fact.negated

    def _learn(self, fact: Fact, holds: bool) -> None:
        """From here on the path knows a condition, and the parts of a conjunction that holds: it
        is here the negation of a disjunction.
        """
        holds = holds is not fact.negated
        self.known[fact.number] = holds
        if not holds and z3.is_or(fact.simple):
            for part in fact.simple.children():
                self._learn(self._fact(part), False)

    def known_truth(self, term: z3.BoolRef) -> bool | None:
        """The truth of a condition that this path has met already, else None; asks no solver."""
        fact = self._fact(term)
        holds = True if fact.simple is TRUE else self.known.get(fact.number)
        return None if holds is None else holds is not fact.negated

    def require(self, term: z3.BoolRef, otherwise: str) -> None:
        """End in `Unfaithful` unless the condition always holds on this path."""
        fact = self._fact(term)
        if fact.simple is TRUE:
            holds = not fact.negated
        elif fact.number in self.known:
            holds = self.known[fact.number] is not fact.negated
        else:
            holds = self._decide(MUST, fact.sides) == 0
            if holds:
                self.known[fact.number] = not fact.negated
        if not holds:
            raise Unfaithful(otherwise)

    def _fact(self, term: z3.BoolRef) -> Fact:
        """Terms that mean the same on a re-run are the same to z3, so the work is done once."""
        found = self.simplified.get(term.get_id())
        if found is None:
            # Of what De Morgan makes of one another, all are the same then.
            simple = z3.simplify(term, elim_and=True)
            negated = False
            while z3.is_not(simple):
                simple, negated = simple.arg(0), not negated
            if z3.is_false(simple):
                simple, negated = TRUE, not negated
            elif z3.is_true(simple):
                simple = TRUE
            opposite = z3.Not(simple)
            sides = [opposite, simple] if negated else [simple, opposite]
            found = Fact(term, simple, simple.get_id(), negated, sides)
            self.simplified[term.get_id()] = found
        return found

    def always(self, term: z3.BoolRef) -> bool:
        """Whether the condition holds for all values on this path; forks nothing."""
        fact = self._fact(term)
        if fact.simple is TRUE:
            return not fact.negated
        return self._decide(ASK, [fact.sides[0], TRUE]) == 0

    def _assume(self, term: z3.BoolRef) -> None:
        if z3.is_true(term):
            return
        if z3.is_false(term) or self._decide(ASSUME, [term]) < 0:
            raise Reject

    def _decide(self, kind: str, options: list[z3.BoolRef]) -> int:
        """The option that this run takes at its next decision; -1 if none is possible."""
        at = self.position
        self.position += 1
        if at < len(self.trail):
            decision = self.trail[at]
            if decision.kind != kind or not same_terms(decision.options, options):
                raise NotDeterministic(f"decision {at} changed on a re-run ({kind})")
        else:
            decision = self._new_decision(kind, options)
            self._enter(decision)
            self.trail.append(decision)
        if at >= self.depth:
            self.solver.push()
            if decision.taken >= 0:
                self.solver.add(options[decision.taken])
                self.witness = decision.models.pop(decision.taken, None)
            self.depth += 1
        self.asked.append((kind, options, decision.taken))
        self.edge = decision.edge
        return decision.taken

    def _enter(self, decision: Decision) -> None:
        """The way that is taken at a decision gets a number of its own."""
        self.edges += 1
        decision.edge = self.edges

    def _new_decision(self, kind: str, options: list[z3.BoolRef]) -> Decision:
        before = self.witness
        if kind == CHOICE:
            ways = list(range(len(options)))
            return Decision(kind, options, ways[0], ways[1:], dict.fromkeys(ways, before))
        if kind == MUST:
            # Only the failing side matters: if it is possible, this run reports it.
            if self._possible(options[1]):
                return Decision(kind, options, 1, models={1: self.witness})
            return Decision(kind, options, 0, models={0: before})
        if kind == ASK:
            taken = 1 if self._possible(z3.Not(options[0])) else 0
            return Decision(kind, options, taken, models={taken: before})
        models: dict[int, z3.ModelRef | None] = {}
        for i, option in enumerate(options):
            self.witness = before
            last = i == len(options) - 1
            if (last and not models and kind == BRANCH) or self._possible(option):
                models[i] = self.witness
        if not models:
            return Decision(kind, options, -1)
        first, *others = models
        return Decision(kind, options, first, others, models)

    def _possible(self, term: z3.BoolRef) -> bool:
        """Whether the condition can hold on this path. If so, the witness is a model of it."""
        if self.witness is not None and z3.is_true(self.witness.eval(term, True)):
            return True
        self.checks += 1
        self.on_check(True)
        answer = self.solver.check(term)
        if answer == z3.sat:
            self.witness = self.solver.model()
        elif answer == z3.unknown:
            answer = self._ask_afresh(term)
        self.on_check(False)
        return bool(answer == z3.sat)

    def _ask_afresh(self, term: z3.BoolRef) -> z3.CheckSatResult:
        """Ask as if it were the first query of its process, of all that z3 knows how to do.

        The same query can take a second or come to the limit: that depends on the terms made
        before it and on what the solver has learnt, which is mostly luck. Raises `Undecided`.
        """
        context = z3.Context()
        solver = z3.Solver(ctx=context)
        solver.set("rlimit", self.rlimit)
        solver.add(*(known.translate(context) for known in (*self.solver.assertions(), term)))
        answer = solver.check()
        if answer == z3.unknown:
            raise Undecided(solver.reason_unknown())
        if answer == z3.sat:
            self.witness = solver.model().translate(term.ctx)
        return answer

    # Exploration

    def explore(self, function: Callable[[], None]) -> list[Path]:
        """Run `function` on every feasible path. A failed assertion ends its path, not the run.

        Stops after the first path with a failure, which is then the last; `model` gives its values.
        Raises `Unfaithful`, `Undecided`, `NotDeterministic`, or whatever else `function` raises.
        """
        paths: list[Path] = []
        while True:
            path = self._run(function)
            if self.told and path.failure is None:
                raise Unfaithful(COMPARED)
            paths.append(path)
            self.on_path(len(paths))
            if path.failure is not None or not self._next_path():
                return paths

    def _run(self, function: Callable[[], None]) -> Path:
        """Run `function` on the path that the trail so far leads to."""
        global _explorer  # noqa: PLW0603  (one exploration at a time)
        self.position, self.asked, self.told, self.edge = 0, [], False, 0
        self.draws, self.memories, self.reached, self.known = {}, [], set(), dict(self.given)
        outer, _explorer = _explorer, self
        try:
            function()
            path = self._path(pruned=False)
        except Reject:
            path = self._path(pruned=True)
        except AssertionError as error:
            path = self._path(pruned=False, failure=str(error) or "the claim does not hold")
        finally:
            _explorer = outer
        if self.stopped is not None:
            raise self.stopped
        if self.position < len(self.trail):
            raise NotDeterministic("a re-run ended before its last decision")
        return path

    def aside(self, function: Callable[[Explorer], None]) -> list[Path]:
        """All paths of a function of an explorer from here on, those that fail as well, without a
        decision of this one's. It may draw nothing. Raises as `explore` does.
        """
        aside = Explorer(self.rlimit, self.narrow)
        aside.solver, aside.witness, aside.given = self.solver, self.witness, self.known
        aside.built, aside.words_made, aside.simplified = (
            self.built,
            self.words_made,
            self.simplified,
        )
        aside.on_check = self.on_check
        paths: list[Path] = []
        try:
            while True:
                paths.append(aside._run(lambda: function(aside)))
                if aside.told:
                    raise Unfaithful(COMPARED)
                if aside.draws:
                    raise Unfaithful("something is drawn where nothing can be")
                if not aside._next_path():
                    return paths
        finally:
            self.checks += aside.checks
            self.stopped = self.stopped or aside.stopped

    def settled(self, kind: str, options: list[z3.BoolRef], taken: int) -> None:
        """Note a decision that was asked aside, or by an earlier run that came this way."""
        if self.position == len(self.trail):
            noted = Decision(kind, options, taken, models={taken: self.witness})
            self._enter(noted)
            self.trail.append(noted)
        if self._decide(kind, options) != taken:
            raise NotDeterministic(f"decision {self.position - 1} was another before ({kind})")

    def learn(self, term: z3.BoolRef) -> None:
        """Know a condition from here on that was shown to hold."""
        fact = self._fact(term)
        if fact.simple is not TRUE:
            self._learn(fact, True)

    def suppose(self, ways: list[list[z3.BoolRef]]) -> None:
        """Go on where all conditions of one of these ways hold; what is in each of them is known
        from here on.
        """
        self._assume(_any_of([_all_of(way) for way in ways]))
        facts = [[self._fact(term) for term in way] for way in ways]
        for fact in facts[0]:
            same = fact.number, fact.negated
            if all(any((f.number, f.negated) == same for f in others) for others in facts[1:]):
                self._learn(fact, True)

    def _path(self, pruned: bool, failure: str | None = None) -> Path:
        return Path(self.asked, pruned, self.reached, failure)

    def _next_path(self) -> bool:
        """Go back to the last decision with a way still open, and take it."""
        while self.trail and not self.trail[-1].open:
            self.trail.pop()
        if self.depth > max(len(self.trail) - 1, 0):
            drop = self.depth - max(len(self.trail) - 1, 0)
            self.solver.pop(drop)
            self.depth -= drop
        if not self.trail:
            return False
        last = self.trail[-1]
        last.taken = last.open.pop(0)
        self._enter(last)
        return True

    def model(self) -> list[tuple[str, int]]:
        """Values of all draws and loaded entries that take the current path, in order."""
        if self.solver.check() != z3.sat:
            raise Undecided("a path that was possible has no model")
        model = self.solver.model()

        def value(term: z3.BitVecRef) -> int:
            number = model.eval(term, model_completion=True)
            assert isinstance(number, z3.BitVecNumRef)
            result: int = number.as_long()
            return result

        draws = [(name, value(term)) for name, term in self.draws.items()]
        for memory in self.memories:
            entries = {value(a): value(v) for a, v in memory.loads}
            draws += [(f"{memory.name}[{a:#x}]", v) for a, v in entries.items()]
        return draws


def _pinned(
    memory: str, pins: dict[str, int], given: Sequence[tuple[Operand, Operand]]
) -> z3.ArrayRef:
    """A memory of just these entries, and 0 elsewhere."""
    array = z3.K(z3.BitVecSort(64), _constant(0).term)
    for name, value in pins.items():
        if name.startswith(f"{memory}["):
            array = z3.Store(array, int(name[len(memory) + 1 : -1], 16), value)
    for address, entry in given:
        array = z3.Store(array, word(address).term, word(entry).term)
    return array


def _all_of(conditions: list[z3.BoolRef]) -> z3.BoolRef:
    return conditions[0] if len(conditions) == 1 else z3.And(*conditions)


def _any_of(conditions: list[z3.BoolRef]) -> z3.BoolRef:
    return conditions[0] if len(conditions) == 1 else z3.Or(*conditions)


def same_terms(a: list[z3.BoolRef], b: list[z3.BoolRef]) -> bool:
    """Whether these are the same terms, one by one."""
    if a is b:
        return True
    return len(a) == len(b) and all(x is y or x.eq(y) for x, y in zip(a, b, strict=True))
