"""Maps: functions of words to words, as parts of a state of which there is no end.

`Table` is one that a run keeps. `Drawn` is any at all: what a claim says of it, it says of every
function, over all words, with no bound on how many pages, processors or frames there are.
"""

from collections.abc import Iterator
from operator import is_
from typing import Protocol

from vapama.spec.domains import Domain
from vapama.spec.nondet import Nondet
from vapama.spec.words import Condition, Word, ite


class Map(Protocol):
    """A function of words to words."""

    def __call__(self, *place: Word) -> Word:
        """The word at a place."""

    def put(self, *place_and_word: Word) -> None:
        """Change the word at one place."""

    def clear(self, *start: Word) -> None:
        """Make 0 what is at all places that start so."""


class Table(dict[tuple[Word, ...], Word]):
    """A map that is 0 but at a few places."""

    def __call__(self, *place: Word) -> Word:
        """The word at a place."""
        return self.get(place, 0)

    def put(self, *place_and_word: Word) -> None:
        """Change the word at one place."""
        *place, word = place_and_word
        self[tuple(place)] = word

    def clear(self, *start: Word) -> None:
        """Make 0 what is at all places that start so."""
        for place in [place for place in self if place[: len(start)] == start]:
            del self[place]


class Drawn:
    """Any map to the words of a domain: a word is drawn for each place that is asked for, and is
    the same for equal places (Ackermann's reduction). So a proof has no array and no bound.
    """

    def __init__(self, nondet: Nondet, name: str, words: Domain) -> None:
        self.nondet, self.name, self.words = nondet, name, words
        self.drawn: list[tuple[tuple[Word, ...], Word]] = []
        self.changes: list[tuple[tuple[Word, ...], Word]] = []
        self.asked = 0

    def __call__(self, *place: Word) -> Word:
        """The word at a place, after the changes."""
        word = self._first(place)
        for start, changed in self.changes:
            word = ite(_starts(place, start), changed, word)
        return word

    def _first(self, place: tuple[Word, ...]) -> Word:
        """The word at a place before any change. Draws are counted by calls, whatever is asked for,
        so that they have the same names on ints and on symbols.
        """
        self.asked += 1
        for known, word in self.drawn:
            if all(map(is_, known, place)):
                return word
        earlier: list[tuple[Condition, Word]] = []
        for known, word in self.drawn:
            same = _starts(place, known)
            if same is True:
                return word
            if same is not False:
                earlier.append((same, word))
        word = self.nondet.word(f"{self.name} {self.asked}", self.words)
        for same, known_word in reversed(earlier):
            word = ite(same, known_word, word)
        self.drawn.append((place, word))
        return word

    def told(self) -> Iterator[str]:
        """The words at the places asked for, and what they have become, of a run on ints."""
        for place, first in self.drawn:
            word = first
            for start, changed in self.changes:
                word = ite(_starts(place, start), changed, word)
            then = "" if word == first else f", then {word:#x}"
            yield f"{self.name}({', '.join(map(hex, place))}) = {first:#x}{then}"

    def put(self, *place_and_word: Word) -> None:
        """Change the word at one place."""
        *place, word = place_and_word
        self.changes.append((tuple(place), word))

    def clear(self, *start: Word) -> None:
        """Make 0 what is at all places that start so."""
        self.changes.append((start, 0))


def _starts(place: tuple[Word, ...], start: tuple[Word, ...]) -> Condition:
    """Whether a place starts so."""
    same: Condition = True
    for a, b in zip(place, start, strict=False):
        same = same & (a == b)
        if same is False:
            break
    return same
