"""Words: the unsigned 64-bit quantities that every specification here is written in.

A `Word` is a Python int from 0 to 2**64 - 1 in tests, a numba uint64 in compiled kernels and a
bit-vector in proofs. Code over words therefore uses only ``& | ^ ~ << >> + - *``, comparisons,
`ite` and ``if``; a sum, difference, product or left shift stays within 64 bits, and a complement
(``~``) stands only under an ``&``: then all three arithmetics agree. The symbolic executor refuses
a proof in which they might not.
"""

from typing import TypeAlias

Word: TypeAlias = int
Flag: TypeAlias = int
"""A word that is 0 or 1."""
Condition: TypeAlias = bool
"""The result of a comparison. In a proof it is symbolic: combine them with ``&`` and ``|``."""

WORD = (1 << 64) - 1


def ite(condition: Condition, then: Word, otherwise: Word) -> Word:
    """`then` if `condition` holds, else `otherwise`, without forking the path of a proof."""
    if condition is True:
        return then
    if condition is False:
        return otherwise
    merged: Word = condition.ite(then, otherwise)
    return merged


def flag(condition: Condition) -> Flag:
    """A condition as a word: 1 if it holds, else 0."""
    return ite(condition, 1, 0)


def bit(word: Word, position: int) -> Flag:
    """The bit of `word` at `position`, 0 being the least significant."""
    return (word >> position) & 1


def low_bits(count: Word) -> Word:
    """A mask of the `count` least significant bits, `count` being less than 64."""
    return (1 << count) - 1


def is_canonical(address: Word, width: int) -> Condition:
    """Whether bits 63:width-1 of a linear address are all equal.

    `width` is the number of linear-address bits in use: 48 with 4-level paging, 57 with 5-level
    paging. Source: Intel SDM Vol. 1, 3.3.7.1 "Canonical Addressing".
    """
    upper = address >> (width - 1)
    return (upper == 0) | (upper == low_bits(65 - width))
