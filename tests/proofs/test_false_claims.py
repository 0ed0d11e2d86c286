"""False claims, each of a kind that a symbolic engine has been seen to "prove", and true siblings.

A false claim must end as a counterexample that fails on plain ints, or as undecided for a reason
that is given. The true siblings show that the engine does not just refuse everything.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from vapama.impl.optimized import Optimized
from vapama.proofs.prover import Options, prove
from vapama.runs import Guarded, replay
from vapama.spec.access import Access
from vapama.spec.domains import Domain
from vapama.spec.memory import PAGE_BYTES, Altered, Marked, Memory
from vapama.spec.nondet import Claim, Invariant, Nondet
from vapama.spec.outcomes import Translated, Update
from vapama.spec.words import WORD, Word, bit, flag, ite
from vapama.verdict import COUNTEREXAMPLE, PROVED, UNDECIDED, Verdict

FRAME = 0x000F_FFFF_FFFF_F000
SMALL = Domain(free=0xFF)


@dataclass(frozen=True)
class Entry:
    """A claim of the table: the status that it must end in, and what is said about it."""

    claim: Claim
    status: str
    why: str = ""
    reaches: tuple[str, ...] = ()
    subject: Any = None

    @property
    def invariant(self) -> Invariant:
        return Invariant(
            self.claim.__name__, self.claim, "a test", self.reaches, frozenset(), "", ""
        )

    def guarded(self) -> Guarded:
        return Guarded("test", self.subject or Optimized())

    def verdict(self, options: Options | None = None) -> Verdict:
        return prove(self.invariant, self.guarded(), options or Options(twin=False))


TABLE: dict[str, Entry] = {}


def _entry(status: str, why: str = "", **more: Any) -> Callable[[Claim], Claim]:
    def add(claim: Claim) -> Claim:
        assert claim.__name__ not in TABLE
        TABLE[claim.__name__] = Entry(claim, status, why, **more)
        return claim

    return add


true = _entry(PROVED)
false = _entry(COUNTEREXAMPLE)


def refused(why: str, **more: Any) -> Callable[[Claim], Claim]:
    return _entry(UNDECIDED, why, **more)


# Arithmetic: Python's ints do not wrap, so a claim about a sum says something else to z3.


@false
def a_sum_fits(nondet: Nondet, _: Any) -> None:
    assert nondet.word("x") + nondet.word("y") <= WORD


@refused("a sum may exceed 64 bits")
def a_sum_is_at_least_each_term(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    assert x + nondet.word("y") >= x


@true
def a_sum_of_halves_fits(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x") >> 1, nondet.word("y") >> 1
    assert (x + y <= WORD) & (x + y >= x)


@false
def a_product_fits(nondet: Nondet, _: Any) -> None:
    assert nondet.word("x") * 3 <= WORD


@true
def a_product_of_half_words_fits(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x") >> 32, nondet.word("y") >> 32
    nondet.assume(y != 0)
    assert x * 3 * (y & 1) <= 3 * x


@false
def a_left_shift_fits(nondet: Nondet, _: Any) -> None:
    assert nondet.word("x") << 1 <= WORD


@refused("a left shift may exceed 64 bits")
def a_left_shift_can_be_undone(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    assert x << 1 >> 1 == x


@true
def addresses_that_are_equal_hold_the_same(nondet: Nondet, _: Any) -> None:
    memory, a, b = nondet.memory("m"), nondet.word("a"), nondet.word("b")
    nondet.assume((a & 7 == 0) & (a < memory.limit))
    first = memory.load(a)
    nondet.assume(a == b)
    assert memory.load(b >> 3 << 3) == first


@false
def addresses_that_may_be_equal_hold_the_same(nondet: Nondet, _: Any) -> None:
    memory, a, b = nondet.memory("m"), nondet.word("a"), nondet.word("b")
    nondet.assume((a & 7 == 0) & (a < memory.limit) & (b & 7 == 0) & (b < memory.limit))
    first = memory.load(a)
    if nondet.flag("same") == 1:
        nondet.assume(a == b)
    assert memory.load(b) == first


@true
def a_left_shift_of_few_bits_can_be_undone(nondet: Nondet, _: Any) -> None:
    x, by = nondet.word("x", SMALL), nondet.word("by") & 0x1F
    assert x << by >> by == x


@false
def a_shift_by_any_word_leaves_something(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x") | 1 << 63
    assert x >> nondet.word("by") != 0


@refused("a right shift may be by 64 or more")
def a_right_shift_never_grows(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    assert x >> nondet.word("by") <= x


@true
def a_shift_by_63_leaves_the_top_bit(nondet: Nondet, _: Any) -> None:
    assert (nondet.word("x") | 1 << 63) >> (nondet.word("by") & 63) != 0


@false
def a_difference_is_not_negative(nondet: Nondet, _: Any) -> None:
    assert nondet.word("x") - nondet.word("y") >= 0


@refused("a difference may be negative")
def a_difference_is_at_most_its_first_term(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    assert x - nondet.word("y") <= x


@refused("a difference may be negative")
def both_arms_of_an_ite_are_computed(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x"), nondet.word("y")
    assert ite(x < y, y - x, x - y) == max(x, y) - min(x, y)


@true
def a_difference_in_order_is_at_most_its_first_term(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x"), nondet.word("y")
    if y <= x:
        assert x - y <= x


@refused("a difference may be negative")
def what_is_known_to_be_zero_has_a_predecessor(nondet: Nondet, _: Any) -> None:
    nothing = nondet.word("x") & 1 & 2
    assert nothing - 1 < 5


@refused("a difference may be negative")
def a_flag_known_to_be_zero_has_a_predecessor(nondet: Nondet, _: Any) -> None:
    assert flag(nondet.word("x") < 0) - 1 < 5


@false
def a_complement_is_a_word(nondet: Nondet, _: Any) -> None:
    assert ~nondet.word("x") >= 0


@refused("a complement")
def a_complement_or_ed_has_all_bits(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    assert ~x | x == -1


@refused("~ of a condition")
def the_complement_of_a_condition_is_its_negation(nondet: Nondet, _: Any) -> None:
    try:
        if ~(nondet.word("x") == 5):
            return
    except Exception:
        return
    assert nondet.word("y") == 0


@refused("a complement")
def two_complements_and_ed(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x"), nondet.word("y")
    assert ~x & ~y == ~(x | y)


@true
def a_complement_under_an_and_clears(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x"), nondet.word("y")
    assert (x & ~y | x & y == x) & (~~x == x) & (~y & x & y == 0) & (x & ~0xFF == x >> 8 << 8)


# Comparisons.


@false
def words_are_signed(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x"), nondet.word("y")
    if x >> 63 == 1 and y >> 63 == 0:
        assert x < y


@true
def words_are_unsigned(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x"), nondet.word("y")
    if x >> 63 == 1 and y >> 63 == 0:
        assert (x > y) & (y < x) & (x >= y) & (y <= x) & (x != y)


@false
def up_to_ten_is_below_ten(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    if x <= 10:
        assert x < 10


@true
def up_to_nine_is_below_ten(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    if x <= 9:
        assert x < 10
    if x < 10:
        assert x <= 9


@false
def chained_comparisons_forget_the_first(nondet: Nondet, _: Any) -> None:
    a, b, c = nondet.word("a"), nondet.word("b"), nondet.word("c")
    assert not (a < b < c) or c > a + 1 >= 2 > b


@true
def chained_comparisons_are_transitive(nondet: Nondet, _: Any) -> None:
    a, b, c = nondet.word("a"), nondet.word("b"), nondet.word("c")
    if a < b < c:
        assert a < c
    if a == b != c:
        assert not a == c


@false
def and_or_not_mean_no_more_than_they_say(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x"), nondet.word("y")
    assert (x < 5 and y < 5) or (not x < 5 and not y < 5)


@true
def and_or_not_follow_de_morgan(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x"), nondet.word("y")
    assert (not (x < 5 and y < 5)) == (not x < 5 or not y < 5)


@false
def one_of_two_words_is_less(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x"), nondet.word("y")
    assert (x < y) + (y < x) == 1


@true
def conditions_count_as_0_and_1(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x"), nondet.word("y")
    assert (x < y) + (y < x) + (x == y) == 1
    assert (x < y) ^ (x >= y) == 1
    assert ((x < y) & 2 == 0) & ((x < y) | 2 >= 2) & ((x < y) != (x >= y))
    assert ((x == y) << 3 | (x != y)) * 2 in (2, 16)


@refused("a float is used as a word")
def no_word_equals_a_float(nondet: Nondet, _: Any) -> None:
    assert not nondet.word("x") == 1.0


@false
def membership_misses_the_last(nondet: Nondet, _: Any) -> None:
    assert nondet.word("x") not in (1, 2, 3)


@true
def membership_is_equality_with_one(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x"), nondet.word("y")
    assert x in (y, x)
    assert not (x in (1, 2, 3) and x > 3)
    assert x in range(4) or x > 3


@false
def tuples_are_equal_if_their_first_words_are(nondet: Nondet, _: Any) -> None:
    x, y, z = nondet.word("x"), nondet.word("y"), nondet.word("z")
    if x == y:
        assert Update(x, z) == Update(y, x)


@false
def outcomes_are_equal_if_their_addresses_are(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x"), nondet.word("y")
    assert Translated(x, 1, (Update(x, 1),)) == Translated(x, 1, (Update(x, y & 1),))


@true
def outcomes_are_equal_if_all_of_their_words_are(nondet: Nondet, _: Any) -> None:
    x, y, z = nondet.word("x"), nondet.word("y"), nondet.word("z")
    if x == y:
        assert Translated(x, 1, (Update(z, y),)) == Translated(y, 1, (Update(z, x),))
    else:
        assert Update(x, z) != Update(y, z)


@false
def the_least_is_below_the_greatest(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x"), nondet.word("y")
    assert min(x, y) < max(x, y)


@true
def sorting_sorts(nondet: Nondet, _: Any) -> None:
    x, y, z = nondet.word("x"), nondet.word("y"), nondet.word("z")
    least, middle, greatest = sorted([x, y, z])
    assert min(x, y, z) == least <= middle <= greatest == max(x, y, z)
    assert (middle == x) | (middle == y) | (middle == z)


@false
def a_word_is_no_int(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    if isinstance(x, int):
        assert x != 9


@true
def a_word_is_an_int(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x"), nondet.word("y")
    assert isinstance(x, int) and isinstance(x < y, bool) and isinstance(~x, int)
    assert x is not None and x != None and not x == object()  # noqa: E711


# Where on the tree of paths a claim is false.


@false
def all_but_one_word(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    assert x ^ x >> 1 != 0x1234_5678_9ABC_DEF0


@false
def all_but_one_word_which_is_asked_for(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    if x ^ x >> 1 == 0x1234_5678_9ABC_DEF0:
        raise AssertionError


@false
def false_on_the_last_path(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    for i in range(8):
        if x == i:
            return
    assert x >= 9


@false
def false_under_branches_forced_by_earlier_ones(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    if x < 10:
        if x < 20:
            if x > 5:
                if not x > 30:
                    assert x != 7


@false
def false_on_the_path_after_a_return(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    if x == 0:
        return
    if x == 1:
        raise AssertionError


@true
def true_where_the_last_model_is_of_another_path(nondet: Nondet, _: Any) -> None:
    f, g = nondet.flag("f"), nondet.flag("g")
    if f == 1:
        if f + g == g:
            raise AssertionError


@true
def true_under_branches_forced_by_earlier_ones(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    if x < 10:
        if x > 20:
            raise AssertionError
        if x > 5:
            assert x >= 6
    elif x < 5:
        raise AssertionError


@false
def false_where_a_branch_is_taken_again(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    if x != 5:
        nondet.reach("first")
    if x != 5:
        nondet.reach("again")
        assert x != 9


@false
def false_after_an_assumption(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    nondet.assume(x < 8)
    assert x < 7


@false
def false_beside_an_assumption(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    if x & 1:
        nondet.assume(x < 100)
    else:
        assert x != 6


@true
def true_after_an_assumption(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x"), nondet.word("y")
    nondet.assume((x < 8) & (y > 3))
    nondet.assume(y < x)
    nondet.assume(x & 4)  # type: ignore[arg-type]
    assert 4 < x < 8 and y != 7


@false
def false_but_for_an_early_return(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    if x & 1:
        return
    assert x & 3 == 0


@false
def false_in_the_sixth_round_of_a_loop(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x", SMALL)
    for i in range(8):
        assert not (i == 5 and bit(x, i) == 1 and x < 33)


@false
def false_in_a_loop_that_is_like_another(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x", SMALL)
    for i in range(50):
        assert (x >> 4) + i <= 15 + i
    for i in range(50):
        assert (x >> 4) + i <= 14 + i


@false
def false_of_two_operations_on_the_same_words(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x", SMALL), nondet.word("y", SMALL)
    both = x & y
    assert x | y == both


@false
def false_of_a_choice_that_another_path_has_made(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    if x == 5:
        nondet.reach("five")
    assert ite(x == 5, 1, 0) == 1


@true
def true_in_each_round_of_a_loop(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x", SMALL)
    for i in range(4):
        assert bit(x, i) == 0 or x >= 1 << i


@false
def false_for_the_last_option(nondet: Nondet, _: Any) -> None:
    a, b = nondet.one_of("a", (1, 2, 3)), nondet.one_of("b", (10, 20, 30))
    assert a + b != 33


@false
def false_for_the_middle_option(nondet: Nondet, _: Any) -> None:
    assert nondet.word("x", Domain(free=3)) + nondet.one_of("a", (1, 2, 0)) < 5


@true
def true_for_every_option(nondet: Nondet, _: Any) -> None:
    assert nondet.word("x", Domain(free=3)) + nondet.one_of("a", (1, 2, 3)) in range(1, 7)


# Domains.


@false
def false_for_the_last_word_of_a_domain(nondet: Nondet, _: Any) -> None:
    assert nondet.word("x", Domain(among=(0, 1, 2, 3, 4))) != 4


@false
def false_for_one_word_of_a_domain_with_gaps(nondet: Nondet, _: Any) -> None:
    assert nondet.word("x", Domain(among=(16, 2, 9))) != 9


@true
def a_word_is_in_its_domain(nondet: Nondet, _: Any) -> None:
    assert nondet.word("some", Domain(among=(16, 2, 9))) in (2, 9, 16)
    assert 3 <= nondet.word("run", Domain(among=(5, 3, 4))) <= 5
    assert nondet.word("one", Domain(among=(7,))) == 7
    assert nondet.word("free", Domain(free=6, fixed=1)) in (1, 3, 5, 7)
    assert nondet.word("odd", Domain(fixed=1)) & 1 == 1
    assert nondet.flag("flag") < 2


@false
def the_known_bits_are_all_there_are(nondet: Nondet, _: Any) -> None:
    assert nondet.word("odd", Domain(fixed=1)) == 1


@false
def a_bit_survives_an_xor(nondet: Nondet, _: Any) -> None:
    assert nondet.word("odd", Domain(fixed=1)) ^ 1 != 0


@refused("not of 64-bit words")
def a_domain_of_negative_words(nondet: Nondet, _: Any) -> None:
    assert nondet.word("x", Domain(free=~0xFFF)) < 5


@refused("not of 64-bit words")
def a_domain_of_longer_words(nondet: Nondet, _: Any) -> None:
    assert nondet.word("x", Domain(among=(0, 1 << 64))) == 0


# Memory: any two addresses may be one.


def _entry_in(nondet: Nondet, memory: Memory, name: str) -> Word:
    address = nondet.word(name, Domain(free=FRAME | 0xFF8))
    nondet.assume(address < memory.limit)
    return address


@false
def two_addresses_differ(nondet: Nondet, _: Any) -> None:
    memory = nondet.memory("m")
    a, b = _entry_in(nondet, memory, "a"), _entry_in(nondet, memory, "b")
    assert Altered(memory, 1, at=a).load(b) == memory.load(b)


@true
def a_write_leaves_other_addresses_alone(nondet: Nondet, _: Any) -> None:
    memory = nondet.memory("m")
    a, b = _entry_in(nondet, memory, "a"), _entry_in(nondet, memory, "b")
    written = Altered(memory, 1, at=a)
    assert (written.load(b) == memory.load(b)) | (a == b)
    assert written.load(a) == memory.load(a) ^ 1


@false
def different_entries_hold_different_words(nondet: Nondet, _: Any) -> None:
    memory = nondet.memory("m")
    a, b = _entry_in(nondet, memory, "a"), _entry_in(nondet, memory, "b")
    assert (memory.load(a) != memory.load(b)) | (a == b)


@false
def all_entries_are_equal(nondet: Nondet, _: Any) -> None:
    memory = nondet.memory("m")
    a, b = _entry_in(nondet, memory, "a"), _entry_in(nondet, memory, "b")
    assert memory.load(a) == memory.load(b)


@true
def an_entry_does_not_change(nondet: Nondet, _: Any) -> None:
    memory = nondet.memory("m")
    a, b = _entry_in(nondet, memory, "a"), _entry_in(nondet, memory, "b")
    first = memory.load(a)
    assert (memory.load(b) == first) | (a != b)


@false
def no_table_references_itself(nondet: Nondet, _: Any) -> None:
    memory = nondet.memory("m")
    table = nondet.word("table", Domain(free=FRAME))
    nondet.assume(table < memory.limit)
    entry = memory.load(table)
    if (entry & 1 == 1) & (entry & FRAME < memory.limit):
        assert memory.load(entry & FRAME) != entry


@false
def a_mark_is_all_that_is_marked(nondet: Nondet, _: Any) -> None:
    memory = nondet.memory("m")
    a, b = _entry_in(nondet, memory, "a"), _entry_in(nondet, memory, "b")
    marked = Marked(memory, (Update(a, 0x20), Update(b, 0x40)))
    assert marked.load(a) == memory.load(a) | 0x20


@true
def marks_of_one_entry_add_up(nondet: Nondet, _: Any) -> None:
    memory = nondet.memory("m")
    a, b = _entry_in(nondet, memory, "a"), _entry_in(nondet, memory, "b")
    marked = Marked(memory, (Update(a, 0x20), Update(b, 0x40)))
    assert marked.load(a) == memory.load(a) | 0x20 | ite(a == b, 0x40, 0)


@false
def a_given_entry_is_elsewhere(nondet: Nondet, _: Any) -> None:
    a, b = nondet.word("a", Domain(free=0xFF8)), nondet.word("b", Domain(free=0xFF8))
    memory = nondet.memory("m", given=[(a, 7)])
    assert memory.load(b) != 7


@false
def a_given_entry_is_everywhere(nondet: Nondet, _: Any) -> None:
    a, b = nondet.word("a", Domain(free=0xFF8)), nondet.word("b", Domain(free=0xFF8))
    memory = nondet.memory("m", given=[(a, 7)])
    assert memory.load(b) == 7


@true
def a_given_entry_is_where_it_was_put(nondet: Nondet, _: Any) -> None:
    a, b = nondet.word("a", Domain(free=0xFF8)), nondet.word("b", Domain(free=0xFF8))
    memory = nondet.memory("m", given=[(a, 7)])
    assert memory.load(a) == 7
    assert (memory.load(b) == 7) | (a != b)


@false
def memory_goes_on_beyond_its_limit(nondet: Nondet, _: Any) -> None:
    memory = nondet.memory("m")
    address = nondet.word("a", Domain(free=FRAME))
    nondet.assume(address <= memory.limit)
    assert memory.load(address) <= WORD


@false
def entries_are_at_any_address(nondet: Nondet, _: Any) -> None:
    memory = nondet.memory("m")
    address = nondet.word("a", Domain(free=0xFFF))
    nondet.assume(memory.limit >= PAGE_BYTES)
    assert memory.load(address) <= WORD


# What cannot be done with a symbol must be refused, and not by an exception that a claim, or the
# subject, may catch: there the run on ints would go on.


@false
def words_as_keys_of_a_dict(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x"), nondet.word("y")
    assert len({x: 1, y: 2}) == 2


@false
def outcomes_as_members_of_a_set(nondet: Nondet, _: Any) -> None:
    x, y = nondet.word("x"), nondet.word("y")
    assert len({Update(x, 1), Update(y, 1)}) == 2


def _swallowing(what: str, operation: Callable[[Any], object]) -> None:
    """A claim that is false where `operation` works, and swallows that it does not."""

    def claim(nondet: Nondet, _: Any) -> None:
        x = nondet.word("x", Domain(free=1, fixed=2))
        try:
            operation(x)
        except Exception:
            return
        assert nondet.word("y") >= x

    claim.__name__ = f"swallowing_{what}"
    false(claim)


SWALLOWED: dict[str, Callable[[Any], object]] = {
    "a_key": lambda x: {x: 1},
    "a_hash": hash,
    "an_index": lambda x: [0, 1, 2, 3][x],
    "int": int,
    "float": float,
    "range": lambda x: list(range(x)),
    "hex": hex,
    "a_percent_format": lambda x: "%d" % x,
    "bytes": lambda x: x.to_bytes(8, "little"),
    "bit_length": lambda x: x.bit_length(),
    "a_remainder": lambda x: x % 3,
    "a_quotient": lambda x: 9 // x,
    "a_fraction": lambda x: x / 2,
    "a_power": lambda x: 2**x,
    "divmod": lambda x: divmod(x, 2),
    "minus": lambda x: -x,
    "plus": lambda x: +x,
    "abs": abs,
    "round": round,
    "a_float_operand": lambda x: x + 1.5,
    "a_float_bound": lambda x: x < 1.5,
    "a_repeated_list": lambda x: [0] * x,
    "a_condition_as_index": lambda x: [0, 1][x == 2],
    "a_condition_as_key": lambda x: {x == 2: 0},
    "a_complement_as_key": lambda x: {~x: 0},
    "a_sum_that_leaves": lambda x: x + WORD,
    "a_complement": lambda x: ~x | 1,
}
for _what, _operation in SWALLOWED.items():
    _swallowing(_what, _operation)


@refused("the text of a word")
def a_text_tells_nothing(nondet: Nondet, _: Any) -> None:
    assert f"{nondet.word('x', SMALL)}" != "5"


@false
def a_text_decides_an_assumption(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x", SMALL)
    nondet.assume(str(x) != "5")
    raise AssertionError


@false
def a_message_names_a_word(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    assert x < 5, f"{x:#x} is too large, and {x} and {x!r} and {x < 5} too"


@true
def a_message_of_a_true_claim_names_a_word(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    assert x <= WORD, f"{x:#x} is too large"


def _all_exceptions(nondet: Nondet, operation: Callable[[Word], object]) -> None:
    x = nondet.word("x")
    try:
        operation(x)
    except BaseException:
        return
    assert x != 9


@refused("made an index")
def every_exception_is_swallowed_1(nondet: Nondet, _: Any) -> None:
    _all_exceptions(nondet, lambda x: [x].index(x) + int(x))


@refused("a sum may exceed 64 bits")
def every_exception_is_swallowed_2(nondet: Nondet, _: Any) -> None:
    _all_exceptions(nondet, lambda x: (x | 1 << 63) + (1 << 63))


@false
def an_assumption_is_swallowed(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    try:
        nondet.assume(x < 5)
    finally:
        assert x < 5
        return  # noqa: B012


@false
def a_failed_assertion_may_be_swallowed(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    try:
        if x >= 5:
            raise AssertionError
    except AssertionError:
        assert x > 5


# Draws.


@refused("two draws are named x")
def one_name_for_two_words(nondet: Nondet, _: Any) -> None:
    try:
        x, y = nondet.word("x"), nondet.word("x")
    except Exception:
        return
    assert x == y


@refused("two draws are named x")
def one_name_for_two_choices(nondet: Nondet, _: Any) -> None:
    assert nondet.one_of("x", (1, 2)) == nondet.one_of("x", (1, 2))


@refused("two draws are named m.limit")
def one_name_for_two_memories(nondet: Nondet, _: Any) -> None:
    assert nondet.memory("m").limit == nondet.memory("m").limit


# Claims that are not functions of their draws.

_runs: list[Nondet] = []


@refused("not the same on every run")
def a_claim_with_a_memory(nondet: Nondet, _: Any) -> None:
    _runs.append(nondet)
    if _runs.count(nondet) > 1:
        return
    x = nondet.word("x")
    if x < 5:
        assert x != 7
    assert x != 7


@refused("not the same on every run")
def a_claim_that_throws_dice(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    if x < random.getrandbits(60):
        assert x != 1 << 63
    assert x != random.getrandbits(60)


@true
def one_name_for_a_word_and_a_memory(nondet: Nondet, _: Any) -> None:
    word, memory = nondet.word("m"), nondet.memory("m")
    nondet.assume(memory.limit >= PAGE_BYTES)
    if memory.load(8) == word:
        assert word == memory.load(8)


# Vacuous claims.


@refused("its assumptions cannot be met")
def an_impossible_assumption(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    nondet.assume(x < 5)
    nondet.assume(x > 5)
    raise AssertionError


@refused("no input reaches there", reaches=("there",))
def a_label_under_an_impossible_condition(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    if x & 6 == 6 and x & 3 == 1:
        nondet.reach("there")


@refused("no input reaches there", reaches=("there",))
def a_label_where_the_last_model_is_of_another_path(nondet: Nondet, _: Any) -> None:
    f, g = nondet.flag("f"), nondet.flag("g")
    if f == 1:
        if f + g == g:
            nondet.reach("there")


@refused("no input reaches there", reaches=("there",))
def a_label_before_an_impossible_assumption(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    if x < 5:
        nondet.reach("there")
        nondet.assume(x > 6)
        raise AssertionError


@_entry(PROVED, reaches=("there",))
def a_label_that_is_reached(nondet: Nondet, _: Any) -> None:
    x = nondet.word("x")
    if x & 6 == 6:
        nondet.reach("there")
        assert x & 2


# Subjects.


class Raising(Optimized):
    """Raises for one address."""

    def translate(self, cpu: Any, memory: Any, access: Any) -> Any:
        if access.address == 0x1234:
            raise ValueError("not this one")
        return Translated(0, 1, ())


class RaisingOnSymbols(Optimized):
    """Can be asked for plain ints only."""

    def translate(self, cpu: Any, memory: Any, access: Any) -> Any:
        if type(access.address) is not int:
            raise TypeError("give me an int")
        return Translated(0, 1, ())


@_entry(COUNTEREXAMPLE, "the subject raised ValueError: not this one", subject=Raising())
def a_subject_that_raises(nondet: Nondet, subject: Any) -> None:
    subject.translate(None, None, Access(nondet.word("x")))


@refused("the subject raised TypeError: give me an int", subject=RaisingOnSymbols())
def a_subject_that_raises_on_symbols(nondet: Nondet, subject: Any) -> None:
    subject.translate(None, None, Access(nondet.word("x")))


@pytest.mark.parametrize("name", TABLE)
def test_a_claim_is_proved_only_if_it_is_true(name: str) -> None:
    entry = TABLE[name]
    verdict = entry.verdict()
    assert (verdict.status, verdict.why) == (entry.status, verdict.why)
    assert entry.why in verdict.why
    if entry.status == COUNTEREXAMPLE:
        assert verdict.case is not None
        failure, _ = replay(entry.invariant, verdict.case, entry.guarded())
        assert failure is not None


# Mistakes of the executor itself, and what shows each: a re-run that differs, path completeness,
# the replay of a counterexample, or of the paths' models (with `Options.witnesses`). Of others the
# prover knows nothing, and the table above is what there is.

DETERMINISM = "not the same on every run"
COMPLETENESS = "path completeness: bitwuzla says not valid"
REPLAY = "does not fail on ints"
NO_MODEL = "a path that was possible has no model"
WITNESS_FAILS = "the model of a proved path fails on ints"
WITNESS_REACHES = "on ints a path reaches"
TABLE_ALONE = ""


@dataclass(frozen=True)
class Mistake:
    """A change of the executor's text, a claim that it gets wrong, and what shows that."""

    before: str
    after: str
    claim: Claim
    shown: str
    witnesses: bool = False
    rlimit: int = 0
    also: tuple[tuple[str, str], ...] = ()


_FORCED = """            self.trail.append(decision)
"""
_NOT_RECORDED = """            if kind == BRANCH and not decision.open:
                self.position -= 1
                return decision.taken
            self.trail.append(decision)
"""
_FITTING = "self.witness = decision.models.pop(decision.taken, None)\n"
_REMEMBERED = "self._learn(fact, self._decide(BRANCH, fact.sides) == 0)\n"

MISTAKES = {
    "forced branches are not recorded": Mistake(
        _FORCED,
        _NOT_RECORDED,
        false_under_branches_forced_by_earlier_ones,
        DETERMINISM,
    ),
    "forced branches are not recorded, nor re-runs compared": Mistake(
        _FORCED,
        _NOT_RECORDED,
        false_under_branches_forced_by_earlier_ones,
        DETERMINISM,
        also=(
            ("if decision.kind != kind or not same_terms(decision.options, options):", "if False:"),
            ("if self.position < len(self.trail):", "if False:"),
        ),
    ),
    "conditions are remembered from run to run": Mistake(
        "self.known = {}, [], set(), dict(self.given)\n",
        "_ = {}, [], set(), {}\n",
        false_on_the_last_path,
        DETERMINISM,
    ),
    "a path is run again instead of the next": Mistake(
        "last.taken = last.open.pop(0)",
        "last.open.pop(0)",
        false_but_for_an_early_return,
        DETERMINISM,
    ),
    "the solver's giving up is a no": Mistake(
        "raise Undecided(solver.reason_unknown())",
        "return z3.unsat",
        all_but_one_word_which_is_asked_for,
        COMPLETENESS,
        rlimit=1,
    ),
    "too few frames are popped": Mistake(
        "self.solver.pop(drop)",
        "self.solver.pop(drop - 1)",
        false_on_the_path_after_a_return,
        NO_MODEL,
    ),
    "the other side of a branch is dropped": Mistake(
        "Decision(kind, options, first, others, models)",
        "Decision(kind, options, first, [], models)",
        false_but_for_an_early_return,
        COMPLETENESS,
    ),
    "every second option is dropped": Mistake(
        "list(range(len(options)))",
        "list(range(0, len(options), 2))",
        false_for_the_middle_option,
        COMPLETENESS,
    ),
    "nothing is explored after a path cut short": Mistake(
        "if path.failure is not None or not self._next_path():",
        "if path.failure is not None or path.pruned or not self._next_path():",
        false_beside_an_assumption,
        COMPLETENESS,
    ),
    "what may hold holds": Mistake(
        "if self._possible(options[1]):",
        "if not self._possible(options[0]):",
        a_sum_fits,
        COMPLETENESS,
    ),
    "addresses that may be equal are": Mistake(
        "1 if self._possible(z3.Not(options[0])) else 0",
        "0 if self._possible(options[0]) else 1",
        a_given_entry_is_everywhere,
        COMPLETENESS,
    ),
    "a model is kept where it does not fit": Mistake(
        _FITTING,
        "pass\n",
        true_where_the_last_model_is_of_another_path,
        NO_MODEL,
    ),
    "a model that does not fit reaches a label": Mistake(
        _FITTING,
        "pass\n",
        a_label_where_the_last_model_is_of_another_path,
        NO_MODEL,
        witnesses=True,
    ),
    "the last side of a branch is always possible": Mistake(
        "if (last and not models and kind == BRANCH)",
        "if (last and kind == BRANCH)",
        true_under_branches_forced_by_earlier_ones,
        NO_MODEL,
    ),
    "a domain is a branch": Mistake(
        "self._decide(ASSUME, [term]) < 0",
        "self._decide(BRANCH, [term, z3.Not(term)]) < 0",
        a_word_is_in_its_domain,
        REPLAY,
    ),
    "an assumption assumes nothing": Mistake(
        "        if not condition:\n            raise Reject\n",
        "        return\n",
        true_after_an_assumption,
        REPLAY,
    ),
    "a condition is remembered without its sense": Mistake(
        _REMEMBERED,
        "taken = self._decide(BRANCH, fact.sides) == 0\n"
        "            self.known[fact.number] = taken\n"
        "            return taken\n",
        false_where_a_branch_is_taken_again,
        WITNESS_REACHES,
        witnesses=True,
    ),
    "a term is known by a number that it gave back": Mistake(
        "found = Fact(term, simple,",
        "found = Fact(simple, simple,",
        false_in_a_loop_that_is_like_another,
        TABLE_ALONE,
        # What was built before keeps the terms too.
        also=(
            ("found = _explorer.built[key] =", "found ="),
            (
                "return _explorer.words_made.setdefault((term.get_id(), may, must), made)",
                "return made",
            ),
        ),
    ),
    "operations are known by their operands alone": Mistake(
        "key = (operation, *",
        "key = (None, *",
        false_of_two_operations_on_the_same_words,
        TABLE_ALONE,
    ),
    "a choice that a path has made is kept for others": Mistake(
        "    def ite(self, then",
        "    @once\n    def ite(self, then",
        false_of_a_choice_that_another_path_has_made,
        TABLE_ALONE,
    ),
    "words are signed": Mistake(
        "SymBool(z3.ULT(self.term, o.term))",
        "SymBool(self.term < o.term)",
        words_are_signed,
        WITNESS_FAILS,
        witnesses=True,
    ),
    "a refusal is an exception like any other": Mistake(
        "class Stop(BaseException):",
        "class Stop(Exception):",
        TABLE["swallowing_a_remainder"].claim,
        WITNESS_FAILS,
        witnesses=True,
        also=(("            _explorer.stopped = self\n", "            pass\n"),),
    ),
    "a refusal may be swallowed": Mistake(
        "            _explorer.stopped = self\n",
        "            pass\n",
        every_exception_is_swallowed_1,
        TABLE_ALONE,
    ),
    "texts are not noted": Mistake(
        "            _explorer.told = True\n",
        "            pass\n",
        a_text_tells_nothing,
        TABLE_ALONE,
    ),
    "words are no ints": Mistake(
        "property(lambda symbol: int)",
        "property(type)",
        a_word_is_no_int,
        TABLE_ALONE,
    ),
    "memory has no end": Mistake(
        'running().require((where < self.limit).term, "a load may be outside memory")',
        "pass",
        memory_goes_on_beyond_its_limit,
        TABLE_ALONE,
    ),
    "memory is one entry": Mistake(
        "z3.Select(array, where.term)",
        "z3.Select(array, _constant(0).term)",
        all_entries_are_equal,
        TABLE_ALONE,
    ),
    "entries are at any address": Mistake(
        "if where.may & 7:\n            running()",
        "if False:\n            running()",
        entries_are_at_any_address,
        TABLE_ALONE,
    ),
    "a failure without a message is none": Mistake(
        'str(error) or "the claim does not hold"',
        "str(error) or None",
        all_but_one_word_which_is_asked_for,
        TABLE_ALONE,
    ),
    "what an assumption cuts short counts": Mistake(
        "self._path(pruned=True)",
        "self._path(pruned=False)",
        an_impossible_assumption,
        TABLE_ALONE,
    ),
    "a name is a word": Mistake(
        "if name in self.draws:",
        "if False:",
        one_name_for_two_words,
        TABLE_ALONE,
    ),
    "a domain lacks its last word": Mistake(
        "z3.ULE(symbol, high)",
        "z3.ULT(symbol, high)",
        false_for_the_last_word_of_a_domain,
        TABLE_ALONE,
    ),
    "sums wrap": Mistake(
        "if most > WORD:",
        "if False:",
        a_sum_fits,
        TABLE_ALONE,
    ),
    "xor is or": Mistake(
        "must = (self.must & ~o.may) | (o.must & ~self.may)",
        "must = self.must | o.must",
        a_bit_survives_an_xor,
        TABLE_ALONE,
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_the_executor_is_shown(name: str, seed: Callable[..., Any]) -> None:
    mistake = MISTAKES[name]
    entry = TABLE[mistake.claim.__name__]
    seed((mistake.before, mistake.after), *mistake.also)
    plain = Options(twin=False, rlimit=mistake.rlimit)
    verdict = entry.verdict(plain)
    if mistake.witnesses:
        assert verdict.status == PROVED, "nothing else shows it"
        verdict = entry.verdict(replace(plain, witnesses=True))
    if mistake.shown is TABLE_ALONE:
        assert entry.status != PROVED
        assert verdict.status == PROVED
    else:
        assert verdict.status == UNDECIDED
        assert mistake.shown in verdict.why
