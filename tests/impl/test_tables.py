"""What audits know of tables (`vapama.snapshot.tables`) is what the specification says of them."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vapama.impl.kernels import mappings as kernel
from vapama.impl.listing import Words, form_of, whole
from vapama.snapshot import tables
from vapama.snapshot.answers import EXECUTE, USER, WRITE, rights_of
from vapama.snapshot.tables import ABSENT, MISCONFIGURED, PAGE, RESERVED, TABLE, UNALIGNED, Mask
from vapama.spec import domains, ept, modes, npt, paging
from vapama.spec.access import Access
from vapama.spec.cpu import (
    LA57,
    LMA,
    LME,
    NXE,
    PAE,
    PE,
    PG,
    PSE,
    WP,
    Cpu,
    reserved_in_pdptes,
)
from vapama.spec.memory import Image
from vapama.spec.outcomes import Translated
from vapama.spec.stage import EPT_CAPABILITIES, PAGE_1GB, Ept, Npt, Stage

LONG = LME | LMA | NXE
GUESTS = [
    Cpu(PG | PE | WP, 0, PAE, LONG, maxphyaddr=40),
    Cpu(PG | PE | WP, 0, PAE, LME | LMA, page1gb=0, maxphyaddr=36),
    Cpu(PG | PE | WP, 0, PAE | LA57, LONG, maxphyaddr=46),
    Cpu(PG | PE | WP, 0x20, PAE, NXE, maxphyaddr=40),
    Cpu(PG | PE | WP, 0, PSE, 0, maxphyaddr=40),
    Cpu(PG | PE | WP, 0, 0, 0, maxphyaddr=36),
]
STAGES: list[Stage] = [
    Ept(0x1E, 40),
    Ept(0x1E, 46, mbec=1),
    Ept(0x26, 52, capabilities=EPT_CAPABILITIES & ~PAGE_1GB & ~1),
    Npt(0, maxphyaddr=40),
    Npt(0, cr4=PAE | LA57, page1gb=0, efer=LME | LMA, maxphyaddr=46),
    Npt(0, cr4=PAE, efer=NXE, maxphyaddr=40),
    Npt(0, cr4=PSE, efer=0, maxphyaddr=38),
]
states = pytest.mark.parametrize("state", [*GUESTS, *STAGES], ids=lambda state: repr(state)[:60])
guests = pytest.mark.parametrize("cpu", GUESTS, ids=lambda cpu: repr(cpu)[:60])


def kind_of(state: Cpu | Stage, level: int, entry: int) -> set[int]:
    """What an entry may be called, by the specification."""
    if isinstance(state, Ept):
        present = entry & ept.present_bits(state)
        page = ept.maps_a_page(entry, level)
        bad = entry & ept.reserved_at(state, entry, level)
        conflict = not entry & ept.READ and entry & ept.needs_read(state)
        if present and (conflict or (page and ept.is_reserved_type(entry >> 3 & 7))):
            return {MISCONFIGURED}
    elif isinstance(state, Npt):
        present, page = entry & 1, npt.maps_a_page(state, entry, level)
        bad = entry & npt.reserved(state, entry, level)
    elif state.mode is modes.PAE and level == 3:
        present, page = entry & 1, False
        bad = entry & reserved_in_pdptes(state.maxphyaddr)
    else:
        present, page = entry & 1, paging.maps_a_page(entry, level, state.mode)
        bad = entry & (paging.reserved_anywhere(state) | paging.reserved_at(state, entry, level))
        if state.mode.entry_bytes == 4:
            bad &= 0xFFFFFFFF
    if not present:
        return {ABSENT}
    if bad:
        return {RESERVED, UNALIGNED}
    return {PAGE if page else TABLE}


@states
@given(raws=st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=20))
def test_an_entry_is_what_the_specification_says(state: Cpu | Stage, raws: list[int]) -> None:
    form = form_of(state)
    rules = tables.Rules(form)
    narrow = (state.mode.entry_bytes if isinstance(state, Cpu) else 8) == 4
    narrow |= isinstance(state, Npt) and state.levels == 2
    entries = [domains.entry_of(raw) if raw & 1 else raw for raw in raws]
    entries = [entry & 0xFFFFFFFF for entry in entries] if narrow else entries
    for level in range(1, rules.words[kernel.TOP] + 1):
        kinds = rules.kinds(level, np.array(entries, dtype=np.uint64)).tolist()
        for entry, kind in zip(entries, kinds, strict=True):
            assert kind in kind_of(state, level, entry), (level, hex(entry))


def image_of(seed: int, cpu: Cpu) -> Words:
    """Four pages of tables that lead to each other, to themselves and outside."""
    rng = np.random.default_rng(seed)
    words = [
        domains.entry_of(raw) for raw in rng.integers(0, 1 << 64, 2048, dtype=np.uint64).tolist()
    ]
    image = np.array(words, dtype=np.uint64)
    image &= ~np.uint64(0xC << 12)
    image[4:8] = [0x1001, 0x2001, 0x3001, 0x1001]  # PDPTEs of PAE paging, which may have no rights
    if cpu.mode is modes.PAE:
        image &= ~np.uint64(0x7FF << 52)
    if cpu.mode.entry_bytes == 4:
        image |= image << np.uint64(32)
    return image


def never(frames: Words) -> Mask:
    return np.zeros(len(frames), dtype=bool)


@guests
@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), raws=st.lists(st.integers(0, (1 << 64) - 1), min_size=4))
def test_walks_lead_where_the_specification_s_do(cpu: Cpu, seed: int, raws: list[int]) -> None:
    """With the rights that they leave, and the accessed flags on the way."""
    image = image_of(seed, cpu)
    memory = Image(image.tolist())
    bias = domains.ADDRESS.bias
    assert bias is not None
    mask = (1 << 32) - 1 if cpu.mode.width == 32 else (1 << 64) - 1
    addresses = [bias(raw) & mask for raw in raws]
    found = tables.walked(
        form_of(cpu), whole(image), np.array(addresses, dtype=np.uint64), paging.ACCESSED, never
    )
    rights = rights_of(cpu, found.rights).tolist()
    for k, address in enumerate(addresses):
        outcome = paging.translate(cpu, memory, Access(address))
        assert (found.shifts[k] != 0) == isinstance(outcome, Translated), hex(address)
        if not isinstance(outcome, Translated):
            continue
        assert int(found.pas[k]) == outcome.pa
        for needed, access in (
            (USER, Access(address, user=1)),
            (USER | WRITE, Access(address, write=1, user=1)),
            (WRITE, Access(address, write=1)),
            (EXECUTE, Access(address, fetch=1)),
        ):
            allowed = isinstance(paging.translate(cpu, memory, access), Translated)
            assert (rights[k] & needed == needed) == allowed, (hex(address), access)
        clear = any(
            not step.entry & paging.ACCESSED
            for step in paging.path(cpu, memory, address)
            if not (cpu.mode is modes.PAE and step.level == 3)
        )
        assert (int(found.rights[k]) & paging.ACCESSED == 0) == clear


@guests
@pytest.mark.parametrize("seed", range(2))
def test_a_survey_has_every_table_that_walks_come_to(cpu: Cpu, seed: int) -> None:
    image = image_of(seed, cpu)
    memory = Image(image.tolist())
    found = tables.survey(form_of(cpu), whole(image), paging.ACCESSED, 1 << 30)
    there = {(level.level, int(frame) & ~0xFFF) for level in found.levels for frame in level.frames}
    met = set()
    for mapping in islice(paging.mappings(cpu, memory), 5_000):
        if not isinstance(paging.translate(cpu, memory, Access(mapping.address)), Translated):
            continue
        for step in paging.path(cpu, memory, mapping.address):
            met.add((step.level, step.address & ~0xFFF))
    assert met
    assert met <= there
    # Each table is as many addresses as there are, and was read once.
    assert len(there) == found.tables
    for level in found.levels[1:]:
        for base, frame in zip(level.bases.tolist(), level.frames.tolist(), strict=True):
            way = {step.level: step.address for step in paging.path(cpu, memory, base)}
            assert way[level.level] & ~0xFFF == frame & ~0xFFF
