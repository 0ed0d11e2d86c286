"""Domains: every form of a domain describes the same values."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapama.fuzz.decoded import RandomDraws
from vapama.oracles.unicorn import NARROW
from vapama.runs import Replay
from vapama.spec import domains
from vapama.spec.cpu import PKS
from vapama.spec.domains import ESCAPE, Domain
from vapama.spec.invariants.rights import RIGHTS, WHICH
from vapama.spec.invariants.walk import DIFFERENCE
from vapama.spec.nondet import draws_of
from vapama.spec.words import WORD

DOMAINS = {
    **{name: value for name, value in vars(domains).items() if isinstance(value, Domain)},
    "RIGHTS": RIGHTS,
    "WHICH": WHICH,
    "DIFFERENCE": DIFFERENCE,
    **{f"Unicorn's {name}": domain for name, domain in NARROW.items()},
}
every_domain = pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)


def members(domain: Domain) -> st.SearchStrategy[int]:
    if domain.among:
        return st.sampled_from(domain.among)
    free = st.integers(0, WORD) | st.sampled_from([0, WORD])
    plain = free.map(lambda x: domain.fixed | x & domain.free)
    return plain | raw_words.map(lambda raw: decoded(domain, raw))


raw_words = st.tuples(st.integers(0, WORD), st.integers(0, WORD))


def decoded(domain: Domain, raw: tuple[int, ...]) -> int:
    return domain.decode(iter(raw).__next__)


@every_domain
@given(raw=raw_words)
def test_what_is_decoded_is_a_member(domain: Domain, raw: tuple[int, int]) -> None:
    assert domain.holds(decoded(domain, raw))


@every_domain
@given(data=st.data())
def test_every_member_decodes_from_its_encoding(domain: Domain, data: st.DataObject) -> None:
    value = data.draw(members(domain))
    raw = domain.encode(value)
    assert all(0 <= word <= WORD for word in raw)
    rest = iter(raw)
    assert domain.decode(rest.__next__) == value
    assert list(rest) == []


@every_domain
@pytest.mark.parametrize("width", [None, 1, 2, 5])
def test_representatives_are_different_members(domain: Domain, width: int | None) -> None:
    representatives = domain.representatives(width)
    assert all(map(domain.holds, representatives))
    assert len(set(representatives)) == len(representatives) > 0
    if width and domain.scope:
        assert len(representatives) <= width


@every_domain
@given(value=st.integers(-WORD, 2 * WORD))
def test_a_value_is_held_just_if_it_can_be_composed(domain: Domain, value: int) -> None:
    if domain.among:
        assert domain.holds(value) == (value in domain.among)
    else:
        free, fixed = domain.free, domain.fixed
        assert domain.holds(value) == (0 <= value <= WORD and value == fixed | value & free)


@pytest.mark.parametrize(
    ("domain", "outside"),
    [
        (domains.FLAG, 2),
        (domains.LIMIT, 0x1008),
        (domains.LIMIT, 1 << 52),
        (domains.CR0, 0),
        (domains.CR4, domains.CR4.fixed | 1 << 23),
        (domains.MAXPHYADDR, 60),
        (domains.ACCESS, 18),
        (domains.ANY, 1 << 64),
        (domains.ANY, -1),
    ],
)
def test_other_values_are_not_held(domain: Domain, outside: int) -> None:
    assert not domain.holds(outside)


def test_a_biased_domain_still_gives_any_of_its_values() -> None:
    anything = 0x0123_4567_89AB_CDE0
    assert decoded(domains.ENTRY, (ESCAPE, anything)) == anything


def test_the_bias_of_entries_is_towards_present_tables_in_a_small_pool() -> None:
    drawn = [decoded(domains.ENTRY, (n * 0x9E37_79B9_7F4A_7C15 & WORD, 0)) for n in range(4096)]
    assert sum(entry & 1 for entry in drawn) > 0.9 * len(drawn)
    pool = {entry >> 12 & 0xFF_FFFF_FFFF for entry in drawn if not entry & 0x80}
    assert set(range(domains.FRAMES)) <= pool


@pytest.mark.parametrize(
    "count",
    [1, 256, 257, 300],
)
def test_every_option_of_a_domain_can_be_drawn(count: int) -> None:
    domain = Domain(among=tuple(range(count)))
    drawn = {decoded(domain, domain.encode(n)) for n in range(count)}
    assert drawn == set(range(count))


@pytest.mark.parametrize("name", ["access", "cpu", "guest_physical_access", "ept", "npt"])
def test_draws_give_what_they_are_the_draws_of(name: str) -> None:
    for seed in range(200):
        drawn = getattr(RandomDraws(Random(seed)), name)()
        assert getattr(Replay(draws_of(drawn)), name)() == drawn


def test_a_domain_is_narrowed_to_what_a_subject_can_take() -> None:
    takes = replace(domains.CR4, free=domains.CR4.free & ~PKS)
    assert domains.narrowed(domains.CR4, takes).free == takes.free
    # The same register in 32-bit paging, where PAE is 0: no state is made that cannot be.
    legacy = domains.narrowed(domains.CR4_32, takes)
    assert (legacy.free, legacy.fixed) == (domains.CR4_32.free & takes.free, 0)
    assert all(legacy.holds(value) for value in legacy.scope)
    assert domains.narrowed(domains.MAXPHYADDR, Domain(among=(40, 99))).among == (40,)
    assert domains.narrowed(domains.CR4, None) is domains.CR4
