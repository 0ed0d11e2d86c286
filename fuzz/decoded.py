"""Draws decoded from raw words: of a fuzzer's input, or of a pseudo-random generator.

One decoder serves both, so that what the random engine can reach, the fuzzer can too, and a Case
can be turned into bytes: a seed for the fuzzer's corpus.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, repeat
from random import Random
from struct import Struct
from typing import Any

from vapama.runs import Concrete, DrawName, recorded
from vapama.spec.domains import ESCAPE, Domain, Take, narrowed
from vapama.spec.nondet import Reject


class Decoded(Concrete):
    """Draws decoded from the raw words that `take` gives, 64 bits at a time."""

    take: Take

    def __init__(self, narrow: Mapping[str, Domain] | None = None) -> None:
        super().__init__(narrow)
        self.groups = GROUPS.setdefault(id(self.narrow), {})

    def draw(self, name: DrawName, domain: Domain) -> int:
        """A value decoded by the domain."""
        return domain.decode(self.take)

    def choose(self, name: str, count: int) -> int:
        """An index from a raw word."""
        return self.take() % count

    # The rest is as in `Concrete`, with fewer calls: this is where random runs spend their time.

    def words(self, draws: Sequence[tuple[str, Domain]]) -> Sequence[int]:
        """Words decoded together."""
        group = self.groups.get(id(draws))
        if group is None:
            if len(self.groups) == MOST_GROUPS:
                return super().words(draws)
            group = self.groups[id(draws)] = Group(draws, self.narrow)
        values = group.decode(self.take)
        self.trail.append((group.names, values))
        return values

    def entry(self, memory: str, address: int, domain: Domain) -> int:
        """A decoded entry of a memory."""
        value = domain.decode(self.take)
        self.trail.append(((memory, address), value))
        return value


class Group:
    """Several draws decoded together: their names, and a decoder.

    The decoder is one expression made for the group, as `collections.namedtuple` makes its
    constructors, that says what `Domain.decode` does: a call for each draw would cost more than the
    rest of a run.
    """

    def __init__(self, draws: Sequence[tuple[str, Domain]], narrow: Mapping[str, Domain]) -> None:
        self.made_of = draws, narrow  # kept alive: their ids are this group's key
        self.names = tuple(name for name, _ in draws)
        parts: list[str] = []
        known: dict[str, Any] = {}
        for i, (name, domain) in enumerate(draws):
            less = narrowed(domain, narrow.get(name))
            plain = f"take() & {less.free}" + (f" | {less.fixed}" if less.fixed else "")
            if less.among:
                known[f"among{i}"] = less.among
                parts.append(f"among{i}[take() % {len(less.among)}]")
            elif less.bias is not None:
                known[f"bias{i}"] = less.bias
                parts.append(f"bias{i}(raw) if (raw := take()) & 0xFF != {ESCAPE} else {plain}")
            else:
                parts.append(plain)
        self.decode: Callable[[Take], tuple[int, ...]] = eval(
            f"lambda take: ({', '.join(parts)},)", known
        )


GROUPS: dict[int, dict[int, Group]] = {}
"""By the ids of narrowing and draws, which the groups keep alive; for each narrowing at most
`MOST_GROUPS`, so that draws made anew for each run are decoded one by one."""
MOST_GROUPS = 64


class RandomDraws(Decoded):
    """Draws from a pseudo-random generator."""

    def __init__(self, random: Random, narrow: Mapping[str, Domain] | None = None) -> None:
        super().__init__(narrow)
        self.take = partial(random.getrandbits, 64)


class ByteDraws(Decoded):
    """Draws from a fuzzer's input, 8 bytes a raw word; zeros after its end."""

    def __init__(self, data: bytes = b"", narrow: Mapping[str, Domain] | None = None) -> None:
        super().__init__(narrow)
        self.begin(data)

    def begin(self, data: bytes) -> None:
        """Begin another run, on this input."""
        self.trail.clear()
        count = len(data) + 7 >> 3
        raw = UNPACK[count](data.ljust(count << 3, b"\0"))
        self.take = chain(raw, repeat(0)).__next__


class Unpack(dict[int, Callable[[bytes], tuple[int, ...]]]):
    """What takes bytes apart into so many words, made when first asked for."""

    def __missing__(self, count: int) -> Callable[[bytes], tuple[int, ...]]:
        """So many little-endian words of 8 bytes."""
        self[count] = unpack = Struct(f"<{count}Q").unpack
        return unpack


UNPACK = Unpack()


def picked(data: bytes, count: int) -> int:
    """Which of `count` invariants a fuzzer's input is for: always the same, evenly spread."""
    return zlib.crc32(data) % count if count > 1 else 0


def addressed(data: bytes, which: int, count: int) -> bytes:
    """The input with a few bytes added that no draw reads, so that invariant `which` is picked."""
    for filler in range(1 << 16):
        candidate = data + filler.to_bytes(2, "little")
        if picked(candidate, count) == which:
            return candidate
    raise AssertionError("two bytes reach every value of a checksum modulo a small count")


class Encoder(Concrete):
    """Replays a Case's values and gathers the bytes from which `ByteDraws` decodes them."""

    def __init__(
        self, values: Mapping[str, int], narrow: Mapping[str, Domain] | None = None
    ) -> None:
        super().__init__(narrow)
        self.values = values
        self.encoded = bytearray()

    def draw(self, name: DrawName, domain: Domain) -> int:
        """The Case's value, or the simplest."""
        value = recorded(self.values, name, domain)
        for raw in domain.encode(value):
            self.encoded += raw.to_bytes(8, "little")
        return value

    def choose(self, name: str, count: int) -> int:
        """The Case's index."""
        value = self.values.get(name, 0)
        if value >= count:
            raise Reject
        self.encoded += value.to_bytes(8, "little")
        return value
