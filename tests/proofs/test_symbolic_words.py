"""Symbolic words compute what ints do, or refuse: expressions of all kinds, run on both.

An expression is an int, the name of a drawn word, or a tuple of an operation and its operands.
"""

import operator
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, TypeAlias

import pytest
import z3
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from vapama.proofs import symbolic
from vapama.spec.domains import ANY, FLAG, Domain
from vapama.spec.words import WORD, ite

Expression: TypeAlias = Any
Domains: TypeAlias = dict[str, Domain]
Inputs: TypeAlias = dict[str, int]

OPERATIONS: dict[str, Callable[..., Any]] = {
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
    "~": operator.invert,
    "<<": operator.lshift,
    ">>": operator.rshift,
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "ite": ite,
}
COMPARISONS = ("==", "!=", "<", "<=", ">", ">=")


class Leaves(Exception):
    """A result is not one that Python, z3 and uint64 agree about (spec/words.py says which are)."""


def evaluate(
    expression: Expression, words: dict[str, Any], apply: Callable[..., Any], results: list[Any]
) -> Any:
    """The value of an expression. The result of each operation is put into `results`."""
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        return words[expression]
    operation, *operands = expression
    values = [evaluate(operand, words, apply, results) for operand in operands]
    results.append(apply(operation, *values))
    return results[-1]


def apply(operation: str, *values: Any) -> Any:
    return OPERATIONS[operation](*values)


def apply_to_ints(operation: str, *values: int) -> Any:
    """The operation on ints. Raises `Leaves`."""
    negative = sum(value < 0 for value in values)
    if negative and not (operation == "~" or (operation == "&" and negative == 1)):
        raise Leaves
    if max(values) > WORD or (operation in ("<<", ">>") and values[1] > 63):
        raise Leaves
    if operation == "~" and isinstance(values[0], bool):  # never false, and to be an error
        raise Leaves
    result = apply(operation, *values)
    if operation != "~" and not 0 <= result <= WORD:
        raise Leaves
    return result


def on_ints(expression: Expression, inputs: Inputs) -> list[int] | None:
    """The result of every operation but ``~``, whose own is no word. None if one leaves."""
    results: list[int] = []
    try:
        evaluate(expression, dict(inputs), apply_to_ints, results)
    except Leaves:
        return None
    return [result for result in results if result >= 0]


def on_symbols(explorer: Any, engine: Any, expression: Expression, domains: Domains) -> list[Any]:
    """The same on symbolic words, as words of any inputs. Raises `Unfaithful`."""
    results: list[Any] = []

    def claim() -> None:
        results.clear()
        words = {name: explorer.word(name, domain) for name, domain in domains.items()}
        evaluate(expression, words, apply, results)

    (path,) = explorer.explore(claim)
    assert path.failure is None
    assert not path.pruned
    assert all(isinstance(result, engine.Symbol) for result in results)
    return [engine.word(r) for r in results if not isinstance(r, engine.Complement)]


def numbers(words: list[Any], inputs: Inputs) -> list[int]:
    """What symbolic words are for these inputs."""
    values = [(z3.BitVec(name, 64), z3.BitVecVal(value, 64)) for name, value in inputs.items()]
    bit = z3.BitVecVal(0, 1)  # for a concatenation must be of two
    number = z3.simplify(z3.substitute(z3.Concat(bit, bit, *(w.term for w in words)), *values))
    assert isinstance(number, z3.BitVecNumRef)
    return [number.as_long() >> 64 * i & WORD for i in reversed(range(len(words)))]


def check(engine: Any, expression: Expression, domains: Domains, some: Sequence[Inputs]) -> None:
    """Symbols compute what ints do for these inputs, and refuse just if some inputs leave."""
    explorer = engine.Explorer(rlimit=1_000_000)
    words = None
    try:
        words = on_symbols(explorer, engine, expression, domains)
    except engine.Unfaithful:
        assert on_ints(expression, dict(explorer.model())) is None, "refused for no reason"
    for inputs in some:
        expected = on_ints(expression, inputs)
        pinned = engine.Explorer(pins=inputs)
        try:
            found = on_symbols(pinned, engine, expression, domains)
        except engine.Unfaithful:
            assert expected is None, "refused for no reason when pinned"
            assert words is None, "not refused"
            continue
        assert expected is not None, "not refused when pinned"
        assert numbers(found, {}) == expected, "the terms are wrong when pinned"
        if words is not None:
            for word, value in zip(words, expected, strict=True):
                assert word.must & ~value == 0, "a bit that must be 1 is not"
                assert value & ~word.may == 0, "a bit that cannot be 1 is"
            assert numbers(words, inputs) == expected, "the terms are wrong"


SMALL = (
    FLAG,
    Domain(free=3),
    Domain(among=(0, 1, 2)),
    Domain(free=1 << 63 | 1),
    Domain(free=3 << 62),
    Domain(free=1, fixed=WORD - 1),
    Domain(free=4, fixed=1 << 32),
    Domain(among=(0, WORD)),
    Domain(among=(62, 63, 64, 65)),
    Domain(among=(3, 1 << 63, 9)),
    Domain(among=(7,)),
)
LARGE = (ANY, Domain(free=0xFFFF_FFFF), Domain(free=0x3F), Domain(fixed=1 << 63), *SMALL)


def values(domain: Domain) -> Sequence[int]:
    """All values of a small domain."""
    if domain.among:
        return domain.among
    found = {domain.fixed}
    for position in range(64):
        found |= {value | 1 << position & domain.free for value in found}
    return tuple(found)


def every_input(domains: Domains) -> list[Inputs]:
    chosen = product(*(values(domain) for domain in domains.values()))
    return [dict(zip(domains, one, strict=True)) for one in chosen]


counts = st.integers(0, 66)
words = st.one_of(
    st.integers(0, 9),
    st.integers(0, 63).map(lambda position: 1 << position),
    st.integers(0, 63).map(lambda position: WORD >> position),
    st.integers(0, WORD),
)
no_words = st.sampled_from((-1, WORD + 1))
names = st.sampled_from(("x", "y"))


def extended(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    """Expressions of which some operands are `inner`; of constants alone there are none."""

    def binary(*operations: str) -> st.SearchStrategy[Expression]:
        some = st.sampled_from(operations)
        return st.tuples(some, inner, inner | words) | st.tuples(some, words, inner)

    comparison = binary(*COMPARISONS)
    condition = comparison | st.tuples(
        st.sampled_from(("&", "|", "^", "==", "!=")), comparison, comparison
    )
    shift = st.tuples(st.sampled_from(("<<", ">>")), inner | words, inner)
    usual = st.one_of(
        binary("&", "|", "^"),
        binary("+", "-", "*"),
        shift,
        st.tuples(st.sampled_from(("<<", ">>", ">>")), inner, counts),
        st.tuples(st.just("&"), inner, words | st.integers(-WORD, -1)),
        st.tuples(st.just("&"), st.tuples(st.just("~"), inner), inner | words),
        st.tuples(st.just("ite"), condition, inner | words, inner | words),
        condition,
    )
    odd = st.one_of(
        st.tuples(st.just("~"), inner),
        st.tuples(st.sampled_from(sorted(set(OPERATIONS) - {"~", "ite"})), inner, no_words),
    )
    return st.integers(0, 19).flatmap(lambda rarely: usual if rarely else odd)


expressions = st.recursive(names, extended, max_leaves=6).filter(lambda e: isinstance(e, tuple))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(expressions, st.tuples(st.sampled_from(SMALL), st.sampled_from(SMALL)))
def test_symbols_compute_what_ints_do_on_every_input_of_small_domains(
    expression: Expression, domains: tuple[Domain, Domain]
) -> None:
    by_name = dict(zip("xy", domains, strict=True))
    check(symbolic, expression, by_name, every_input(by_name))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    expressions,
    st.tuples(st.sampled_from(LARGE), st.sampled_from(LARGE)),
    st.lists(st.tuples(words, words), min_size=4, max_size=4),
)
def test_symbols_compute_what_ints_do_on_some_inputs_of_large_domains(
    expression: Expression, domains: tuple[Domain, Domain], drawn: list[tuple[int, int]]
) -> None:
    by_name = dict(zip("xy", domains, strict=True))
    inputs = [
        {
            name: domain.among[value % len(domain.among)]
            if domain.among
            else value & domain.free | domain.fixed
            for value, (name, domain) in zip(pair, by_name.items(), strict=True)
        }
        for pair in drawn
    ]
    try:
        check(symbolic, expression, by_name, inputs)
    except symbolic.Undecided:
        reject()


NIBBLE, HIGH = Domain(free=0xF), Domain(free=3, fixed=1 << 63)
SET = Domain(free=2, fixed=5)
SHIFTS = Domain(among=(0, 1, 63, 64))

MISTAKES: dict[str, tuple[str, str, Expression, tuple[Domain, ...]]] = {
    # Known bits. What they decide wrongly, no solver is asked about.
    "and keeps what only one has": (
        "self.must & o.must)\n\n    __rand__",
        "self.must | o.must)\n\n    __rand__",
        ("&", "x", "y"),
        (SET, NIBBLE),
    ),
    "or forgets what one may have": (
        "self.may | o.may, self.must | o.must)",
        "self.may, self.must | o.must)",
        ("|", "x", "y"),
        (SET, NIBBLE),
    ),
    "xor is or": (
        "must = (self.must & ~o.may) | (o.must & ~self.may)",
        "must = self.must | o.must",
        ("^", "x", "y"),
        (SET, NIBBLE),
    ),
    "xor clears what both may have": (
        "& ~(self.must & o.must)",
        "& ~(self.may & o.may)",
        ("^", "x", "y"),
        (SET, NIBBLE),
    ),
    "a sum never carries": (
        "_make(total, _ones(most) & WORD, 0)",
        "_make(total, self.may | o.may, 0)",
        ("+", "x", "y"),
        (NIBBLE, NIBBLE),
    ),
    "a difference never borrows": (
        "_make(self.term - o.term, _ones(self.may), 0)",
        "_make(self.term - o.term, self.may, 0)",
        ("-", "x", 1),
        (Domain(free=2, fixed=8),),
    ),
    "a product is no longer than a factor": (
        "_make(self.term * o.term, _ones(self.may * o.may) & WORD, 0)",
        "_make(self.term * o.term, self.may | o.may, 0)",
        ("*", "x", 3),
        (NIBBLE,),
    ),
    "a left shift keeps its low bits": (
        "a.must << by.may & WORD)",
        "a.must | a.must << by.may & WORD)",
        ("<<", "x", 2),
        (SET,),
    ),
    "a left shift by some is by most": (
        "return _make(a.term << by.term, _ones(a.may << furthest) & WORD, 0)",
        "return _make(a.term << by.term, a.may << furthest & WORD, 0)",
        ("<<", "x", "y"),
        (NIBBLE, NIBBLE),
    ),
    "a right shift keeps its bits in place": (
        "a.may >> by.may, a.must >> by.may)",
        "a.may >> by.may, a.must)",
        (">>", "x", 1),
        (SET,),
    ),
    "a right shift by some is by none": (
        "return _make(z3.LShR(a.term, by.term), _ones(a.may), 0)",
        "return _make(z3.LShR(a.term, by.term), a.may, 0)",
        (">>", "x", "y"),
        (Domain(free=4), FLAG),
    ),
    "an ite is both of its arms": (
        "a.may | b.may, a.must & b.must)",
        "a.may | b.may, a.must | b.must)",
        ("ite", ("<", "x", "y"), "x", "y"),
        (SET, NIBBLE),
    ),
    "a complement lacks only what was sure": (
        "~i.must & o.may & WORD, ~i.may & o.must & WORD)",
        "~i.may & o.may & WORD, ~i.may & o.must & WORD)",
        ("&", "y", ("~", "x")),
        (SET, NIBBLE),
    ),
    "a complement has what was not sure": (
        "~i.must & o.may & WORD, ~i.may & o.must & WORD)",
        "~i.must & o.may & WORD, ~i.must & o.must & WORD)",
        ("&", "y", ("~", "x")),
        (FLAG, SET),
    ),
    "a condition is true": (
        "_constant(1).term, _constant(0).term), 1, 0)",
        "_constant(1).term, _constant(0).term), 1, 1)",
        ("+", ("<", "x", 5), 1),
        (NIBBLE,),
    ),
    "a domain has the bits of its first word": (
        "may, must = may | value, must & value",
        "may, must = may | value, must & values[0]",
        ("|", "x", 0),
        (Domain(among=(3, 5)),),
    ),
    "what may be less is less": (
        "if self.may < o.must:",
        "if self.must < o.must:",
        ("<", "x", 2),
        (NIBBLE,),
    ),
    "what may be equal is not less": (
        "if self.must >= o.may:",
        "if self.may >= o.may:",
        ("<", "x", 2),
        (NIBBLE,),
    ),
    "what has other known bits may be equal": (
        "if self.must & ~o.may or o.must & ~self.may:",
        "if self.must != o.must or o.must & ~self.may:",
        ("==", "x", 2),
        (NIBBLE,),
    ),
    # Terms.
    "words are signed": (
        "return SymBool(z3.ULT(self.term, o.term))",
        "return SymBool(self.term < o.term)",
        ("<", "x", "y"),
        (HIGH, NIBBLE),
    ),
    "a right shift copies the sign": (
        "_make(z3.LShR(a.term, by.term), a.may >> by.may, a.must >> by.may)",
        "_make(a.term >> by.term, a.may >> by.may, a.must >> by.may)",
        (">>", "x", 1),
        (HIGH,),
    ),
    "a reversed difference is not reversed": (
        "return word(other).__sub__(self)",
        "return self.__sub__(other)",
        ("-", 1, "x"),
        (FLAG,),
    ),
    "at most is below": (
        "return word(other) >= self",
        "return word(other) > self",
        ("<=", "x", "y"),
        (FLAG, FLAG),
    ),
    "conditions or'ed are and'ed": (
        "SymBool(z3.Or(self.term, o.term))",
        "SymBool(z3.And(self.term, o.term))",
        ("|", ("<", "x", "y"), ("<", "y", "x")),
        (NIBBLE, NIBBLE),
    ),
    "a condition decided is the other way": (
        "return a if self is YES else b",
        "return b if self is YES else a",
        ("ite", ("<", "x", 16), "x", 0),
        (NIBBLE,),
    ),
    # What must be refused.
    "sums wrap": (
        "if most > WORD:",
        "if most > 2 * WORD:",
        ("+", "x", 1 << 63),
        (HIGH,),
    ),
    "differences wrap": (
        "if self.must < o.may:",
        "if self.may < o.must:",
        ("-", "x", 1),
        (FLAG,),
    ),
    "products wrap": (
        "if self.may * o.may > WORD:",
        "if False:",
        ("*", "x", 2),
        (HIGH,),
    ),
    "left shifts drop bits": (
        "if a.may << furthest > WORD",
        "if a.must << furthest > WORD",
        ("<<", "x", 63),
        (NIBBLE,),
    ),
    "left shifts by 64 are none": (
        'if by.may > 63:\n        running().require(z3.ULT(by.term, 64), "a left',
        'if by.must > 63:\n        running().require(z3.ULT(by.term, 64), "a left',
        ("<<", "y", "x"),
        (SHIFTS, Domain(among=(0,))),
    ),
    "right shifts by 64 are none": (
        'if by.may > 63:\n        running().require(z3.ULT(by.term, 64), "a right',
        'if by.must > 63:\n        running().require(z3.ULT(by.term, 64), "a right',
        (">>", 1, "x"),
        (SHIFTS,),
    ),
    "a negative int is the word with its bits": (
        "    if not 0 <= value <= WORD:\n        raise",
        "    if value > WORD:\n        raise",
        ("|", "x", -1),
        (FLAG,),
    ),
    "a known word is a plain int": (
        "return _constant(may) if may == must else",
        "return may if may == must else",
        ("-", ("&", ("&", "x", 1), 2), 1),
        (FLAG,),
    ),
    "a complement or'ed is a word": (
        "    __or__ = __ror__ = __xor__ =",
        "    __or__ = __ror__ = lambda self, other: SymWord(~self.inner.term) | other\n"
        "    __xor__ =",
        ("|", ("~", "x"), 1),
        (FLAG,),
    ),
}
"""Text of the executor, what a mistake makes of it, and an expression that it gets wrong."""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_the_words_is_seen(name: str, seed: Callable[..., Any]) -> None:
    before, after, expression, domains = MISTAKES[name]
    by_name = dict(zip("xy", domains, strict=False))
    check(symbolic, expression, by_name, every_input(by_name))
    with pytest.raises(AssertionError):
        check(seed((before, after)), expression, by_name, every_input(by_name))
