"""Draws decoded from raw bytes: from a fuzzer's input, or from a pseudo-random generator.

One decoder serves both, so that what the random engine can reach, the fuzzer can too, and a Case
can be turned into bytes: a seed for the fuzzer's corpus.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from random import Random

from vapama.runs import Concrete, DrawName, recorded
from vapama.spec.domains import Domain
from vapama.spec.nondet import Reject


class Decoded(Concrete):
    """Draws decoded from what `take` gives, an unsigned integer of so many bytes."""

    take: Callable[[int], int]

    def draw(self, name: DrawName, domain: Domain) -> int:
        """A value decoded by the domain."""
        return domain.decode(self.take(domain.raw_bytes))

    def choose(self, name: str, count: int) -> int:
        """An index from two bytes."""
        return self.take(2) % count

    # The rest is as in `Concrete`, with fewer calls: this is where random runs spend their time.

    def words(self, draws: Sequence[tuple[str, Domain]]) -> Sequence[int]:
        """Decoded words, from one `take` for all of them."""
        key = id(draws), id(self.narrow)
        group = GROUPS.get(key)
        if group is None:
            if len(GROUPS) == MOST_GROUPS:
                return super().words(draws)
            group = GROUPS[key] = Group(draws, self.narrow)
        values = group.decode(self.take(group.raw_bytes))
        self.trail.append((group.names, values))
        return values

    def entry(self, memory: str, address: int, domain: Domain) -> int:
        """A decoded entry of a memory."""
        value = domain.decode(self.take(domain.raw_bytes))
        self.trail.append(((memory, address), value))
        return value


class Group:
    """Several draws decoded together: their names, how many raw bytes they take, and a decoder.

    The decoder is one expression made for the group, as `collections.namedtuple` makes its
    constructors: a call for each draw would cost more than the rest of a run.
    """

    def __init__(self, draws: Sequence[tuple[str, Domain]], narrow: Mapping[str, Domain]) -> None:
        self.made_of = draws, narrow  # kept alive: their ids are this group's key
        self.names = tuple(name for name, _ in draws)
        self.raw_bytes = 0
        parts, known = [], {}
        for i, (name, domain) in enumerate(draws):
            narrowed = narrow.get(name, domain)
            shift = self.raw_bytes << 3
            if narrowed.among or narrowed.bias is not None:
                known[f"decode{i}"] = narrowed.decode
                parts.append(f"decode{i}(raw >> {shift})")
            else:
                parts.append(f"{narrowed.fixed} | raw >> {shift} & {narrowed.free}")
            self.raw_bytes += narrowed.raw_bytes
        self.decode: Callable[[int], tuple[int, ...]] = eval(
            f"lambda raw: ({', '.join(parts)},)", known
        )


GROUPS: dict[tuple[int, int], Group] = {}
"""By the ids of draws and narrowing, which the groups keep alive; at most `MOST_GROUPS`, so that
draws made anew for each run are decoded one by one."""
MOST_GROUPS = 64


class RandomDraws(Decoded):
    """Draws from a pseudo-random generator."""

    def __init__(self, random: Random, narrow: Mapping[str, Domain] | None = None) -> None:
        super().__init__(narrow)
        bits = random.getrandbits
        self.take = lambda count: bits(count << 3)


class ByteDraws(Decoded):
    """Draws from a fuzzer's input; zeros after its end."""

    def __init__(self, data: bytes, narrow: Mapping[str, Domain] | None = None) -> None:
        super().__init__(narrow)
        at = 0

        def take(count: int) -> int:
            nonlocal at
            start = at
            at = end = start + count
            return int.from_bytes(data[start:end], "little")

        self.take = take


def picked(data: bytes, count: int) -> int:
    """Which of `count` invariants a fuzzer's input is for: always the same, evenly spread."""
    return zlib.crc32(data) % count


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
        self.encoded += domain.encode(value)
        return value

    def choose(self, name: str, count: int) -> int:
        """The Case's index."""
        value = self.values.get(name, 0)
        if value >= count:
            raise Reject
        self.encoded += value.to_bytes(2, "little")
        return value
