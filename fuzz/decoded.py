"""Draws decoded from raw bytes: from a fuzzer's input, or from a pseudo-random generator.

One decoder serves both, so that what the random engine can reach, the fuzzer can too, and a Case
can be turned into bytes: a seed for the fuzzer's corpus.
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random

from vapama.runs import Concrete, DrawName, recorded
from vapama.spec import domains
from vapama.spec.domains import Domain, Take

decode_entry = domains.ENTRY.decode


class Decoded(Concrete):
    """Draws decoded from what `take` gives, an unsigned integer of so many bytes."""

    take: Callable[[int], int]

    def __init__(self, narrow: Mapping[str, Domain] | None = None) -> None:
        super().__init__(narrow)
        self._decoders: dict[int, tuple[list[str], list[Callable[[Take], int]]]] = {}

    def draw(self, name: DrawName, domain: Domain) -> int:
        """A value decoded by the domain."""
        return domain.decode(self.take)

    # The rest is as in `Concrete`, with fewer calls: this is where random runs spend their time.

    def words(self, draws: Sequence[tuple[str, Domain]]) -> list[int]:
        """Decoded words."""
        found = self._decoders.get(id(draws))
        if found is None:
            narrowed = [self.narrow.get(name, domain) for name, domain in draws]
            found = [name for name, _ in draws], [domain.decode for domain in narrowed]
            self._decoders[id(draws)] = found
        names, decoders = found
        take = self.take
        values = [decode(take) for decode in decoders]
        self.trail.extend(zip(names, values, strict=True))
        return values

    def word(self, name: str, domain: Domain = domains.ANY) -> int:
        """A decoded word."""
        value = self.narrow.get(name, domain).decode(self.take)
        self.trail.append((name, value))
        return value

    def entry(self, memory: str, address: int) -> int:
        """A decoded entry of a memory."""
        value = decode_entry(self.take)
        self.trail.append(((memory, address), value))
        return value

    def choose(self, name: str, count: int) -> int:
        """An index from two bytes."""
        return self.take(2) % count


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
        self.data = data
        self.at = 0

    def take(self, count: int) -> int:  # type: ignore[override]
        """The next `count` bytes, little-endian."""
        start = self.at
        self.at = end = start + count
        return int.from_bytes(self.data[start:end], "little")


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
        self.encoded += value.to_bytes(2, "little")
        return value
