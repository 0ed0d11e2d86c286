"""The kernels' machine code does what their source says, on unsigned 64-bit words alone."""

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vapama.bugs.mistakes import MISTAKES
from vapama.fuzz.random_engine import Search
from vapama.impl.kernels import batches, long_mode, mappings
from vapama.impl.kernels import compiled as compiling
from vapama.impl.kernels.compiled import compiled
from vapama.impl.listing import Listing, Pieces, at_each_position, form_of
from vapama.impl.optimized import WIDTH, Compiled, access_word
from vapama.runs import Guarded
from vapama.spec.access import Access
from vapama.spec.cpu import LA57, LMA, LME, NXE, PAE, PE, PG, Cpu
from vapama.spec.domains import ACCESSES
from vapama.spec.memory import Sparse
from vapama.spec.nondet import load_invariants
from vapama.spec.stage import Ept
from vapama.verdict import COUNTEREXAMPLE, HELD

Words = npt.NDArray[np.uint64]
Images = Callable[[int, int], Words]
u64 = np.uint64
WORD = (1 << 64) - 1
FRAME = 0x000F_FFFF_FFFF_F000
PAGES = 6

KERNELS: dict[str, Callable[..., Any]] = {
    name: function
    for module in (long_mode, mappings, batches)
    for name, function in vars(module).items()
    if inspect.isfunction(function)
    and function.__module__ == module.__name__
    and name != "translate_many_singly"  # of legacy modes, whose kernels are not checked here
}
ARRAYS = {
    *("memory", "marks", "path", "addresses", "statuses", "values"),
    *("firsts", "ends", "places", "form", "state", "keys", "counts", "found_address"),
    *("found_pa", "found_shift", "found_pages", "found_rights", "found_entry"),
    *("gpas", "shifts", "pages", "stage_gpas", "stage_pas", "stage_shifts", "stage_pages"),
    *("found_run", "found_stage", "trace", "pdptes"),
}
TABLES = {"lanes", "paths"}
"""Parameters of kernels that are arrays, of one dimension and of two; all others are words."""

words = st.integers(0, WORD) | st.integers(0, 63).map(lambda n: 1 << n) | st.sampled_from([0, WORD])
addresses = words | st.integers(0, WORD >> 16).map(lambda a: a | WORD ^ (1 << 47) - 1)
controls = st.fixed_dictionaries(
    {
        "mode": words,
        "reserved": st.sampled_from([0, 1 << 63, (1 << 52) - (1 << 40), 0x800F_0000_0000_0000]),
        "cr3": st.integers(0, PAGES).map(lambda frame: frame << 12) | words,
        "pkru": st.integers(0, (1 << 32) - 1),
        "pkrs": st.integers(0, (1 << 32) - 1),
    }
)


def as_uint64(values: dict[str, int]) -> list[np.uint64]:
    return [u64(value) for value in values.values()]


@pytest.mark.parametrize("name", ["mode_word", "reserved_word", "finish"])
@given(data=st.data())
def test_straight_line_kernels_equal_their_source(name: str, data: st.DataObject) -> None:
    narrow = {"maxphyaddr": st.integers(32, 52), "shift": st.sampled_from([12, 21, 30])}
    kernel = KERNELS[name]
    arguments = {p: data.draw(narrow.get(p, words)) for p in inspect.signature(kernel).parameters}
    assert compiled(kernel)(*as_uint64(arguments)) == kernel(*arguments.values())


@given(
    seed=st.integers(0, 1 << 32),
    control=controls,
    address=addresses,
    access=st.sampled_from(ACCESSES) | words,
    entries=st.integers(0, PAGES * 512),
)
def test_a_compiled_walk_equals_its_source_with_flags_and_path(
    hostile: Images, seed: int, control: dict[str, int], address: int, access: int, entries: int
) -> None:
    image = hostile(seed, PAGES)
    listed = image.tolist()
    path, path_listed = np.zeros(6, dtype=u64), [0] * 6
    scalars = {"entries": entries} | control | {"address": address, "access": access}
    observed = compiled(long_mode.walk_and_mark)(image, image, *as_uint64(scalars), path)
    expected = KERNELS["walk_and_mark"](listed, listed, *scalars.values(), path_listed)
    assert observed == expected
    assert path.tolist() == path_listed
    assert image.tolist() == listed


@given(
    levels=st.sampled_from([4, 5]),
    level=st.integers(1, 3),
    write=st.integers(0, 1),
    path=st.lists(st.integers(0, 15), min_size=6, max_size=6),
    seed=st.integers(0, 1 << 32),
)
def test_marking_sets_flags_in_place_and_nothing_else(
    levels: int, level: int, write: int, path: list[int], seed: int
) -> None:
    before = np.random.default_rng(seed).integers(0, 1 << 64, 16, dtype=u64)
    image = before.copy()
    expected = before.tolist()
    for index in path[level : levels + 1]:
        expected[index] |= 0x20
    expected[path[level]] |= write << 6
    arguments = u64(levels), u64(level), u64(write), np.array(path, dtype=u64)
    compiled(long_mode.mark)(image, *arguments)
    assert image.tolist() == expected


def test_batches_equal_the_source_of_the_walk_at_addresses_of_all_kinds(hostile: Images) -> None:
    rng, seen = np.random.default_rng(2024), Counter[int]()
    for seed in range(50):
        image = hostile(seed, PAGES)
        raw = rng.integers(0, 1 << 64, 500, dtype=u64)
        low, high = raw & u64((1 << 56) - 1), raw | u64(WORD ^ (1 << 47) - 1)
        batch = np.where(raw % u64(4) == 0, raw, np.where(raw % u64(4) == 1, high, low >> u64(9)))
        scalars = {
            "entries": len(image),
            "mode": int(rng.integers(0, 512)),
            "reserved": (1 << 52) - (1 << 40),
            "cr3": int(rng.integers(0, PAGES)) << 12,
            "pkru": 0x5A5A_0000,
            "pkrs": 0xA5A5_0000,
        }
        access = ACCESSES[seed % len(ACCESSES)]
        statuses, values = np.zeros_like(batch), np.zeros_like(batch)
        lanes = np.zeros((batches.ROWS, WIDTH), dtype=u64)
        group = as_uint64({"number": len(batch), "access": access})
        compiled(batches.translate_many)(
            image, *as_uint64(scalars), batch, *group, lanes, u64(WIDTH), statuses, values
        )
        listed = image.tolist()
        found = list(zip(statuses.tolist(), values.tolist(), strict=True))
        for address, observed in zip(batch.tolist(), found, strict=True):
            walk = KERNELS["walk"](listed, *scalars.values(), address, access, [0] * 6)
            assert observed == walk
        seen.update(statuses.tolist())
    assert seen.total() == 25_000
    kinds = {1, 2, 3, long_mode.FAULT, long_mode.NONCANONICAL, long_mode.OUTSIDE}
    assert {status for status, count in seen.items() if count > 20} == kinds


# TYPES

UINT64, ARRAY = numba.uint64, numba.uint64[::1]
TABLE = numba.uint64[:, ::1]


@functools.cache
def annotation(kernel: Callable[..., Any], form: Callable[..., Any]) -> Any:
    """What numba makes of a kernel's variables and operations.

    Compiled here and now: numba's cache keeps no types.
    """
    fresh = numba.njit(form(kernel))
    kinds = tuple(
        TABLE if p in TABLES else ARRAY if p in ARRAYS else UINT64
        for p in inspect.signature(kernel).parameters
    )
    fresh.compile(kinds)
    return fresh.overloads[kinds].type_annotation


def off_the_rule(found: Any) -> list[str]:
    """The operations that have an operand or a result other than a uint64 or a truth value."""
    return [
        f"{operation}: {signature}"
        for operation, signature in found.calltypes.items()
        if getattr(signature, "args", None)
        and isinstance(operation, numba.core.ir.Expr)
        and operation.op in ("binop", "inplace_binop", "unary")
        and not {*signature.args, signature.return_type} <= {UINT64, numba.boolean}
    ]


@pytest.mark.parametrize(
    "name",
    KERNELS,
)
def test_every_operation_of_a_compiled_kernel_is_on_uint64(name: str) -> None:
    found = annotation(KERNELS[name], compiling._unsigned)
    assert off_the_rule(found) == []
    numbers = {
        variable
        for variable, kind in found.typemap.items()
        if isinstance(kind, numba.types.Number) and kind is not UINT64
    }
    assert numbers == set()


@pytest.mark.parametrize("name", ["mode_word", "finish", "misconfigured"])
def test_a_kernel_compiled_as_it_stands_would_be_seen_to_be_signed(name: str) -> None:
    assert off_the_rule(annotation(KERNELS[name], lambda kernel: kernel))


# THE END OF THE IMAGE


def guarded(content: Words, poison: int) -> Words:
    """A view of the content with two pages of poison before and after it."""
    around = np.full(len(content) + 2048, poison, dtype=u64)
    around[1024:-1024] = content
    return around[1024:-1024]


POISONS = (0x0, 0x1007, WORD ^ 1 << 51, 0x87)


def walked(kernel: Callable[..., Any], image: Words, arguments: dict[str, int]) -> object:
    path = np.zeros(6, dtype=u64)
    return kernel(image, *as_uint64(arguments), path), path.tolist()


hostile_walks = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1 << 32),
        "entries": st.integers(0, 2 * 512),
        "control": controls,
        "address": st.integers(0, (1 << 47) - 1) | addresses,
    }
)


def differences(kernel: Callable[..., Any], hostile: Images, walk: dict[str, Any]) -> int:
    """How many different results a walk has, as what is around its image differs."""
    scalars = {"entries": walk["entries"]} | walk["control"]
    arguments = scalars | {"address": walk["address"], "access": 4}
    content = hostile(walk["seed"], 2)[: walk["entries"]]
    return len({str(walked(kernel, guarded(content, poison), arguments)) for poison in POISONS})


@given(walk=hostile_walks)
def test_a_compiled_walk_does_not_depend_on_what_is_around_its_image(
    hostile: Images, walk: dict[str, Any]
) -> None:
    assert differences(compiled(long_mode.walk), hostile, walk) == 1


def test_a_read_just_beyond_the_image_would_be_noticed(hostile: Images) -> None:
    wrong = compiled(MISTAKES["the-limit-is-off-by-one"].module().walk)
    control = {"mode": 0, "reserved": 0, "cr3": 0, "pkru": 0, "pkrs": 0}
    walk = {"seed": 1, "entries": 511, "control": control, "address": WORD}
    assert differences(compiled(long_mode.walk), hostile, walk) == 1
    assert differences(wrong, hostile, walk) > 1


@given(
    seed=st.integers(0, 1 << 32),
    entries=st.integers(0, 4 * 512),
    cr3=st.integers(0, 5).map(lambda frame: frame << 12),
    la57=st.sampled_from([0, LA57]),
)
@example(seed=0, entries=4 * 512, cr3=0, la57=0)
def test_a_compiled_enumeration_does_not_depend_on_what_is_around_its_image(
    hostile: Images, seed: int, entries: int, cr3: int, la57: int
) -> None:
    content = hostile(seed, 4)[:entries]
    content[np.random.default_rng(seed).random(entries) < 0.99] = 0
    cpu = Cpu(cr0=PG | PE, cr3=cr3, cr4=PAE | la57, efer=LME | LMA | NXE)
    edges = [np.array([value], dtype=u64) for value in (0, 8 * entries, 0)]
    results = set()
    for poison in POISONS:
        view = guarded(content, poison)
        pieces = Pieces(at_each_position(view.data, view.nbytes), *edges)
        listing = Listing(pieces, form_of(cpu), most_runs=64)
        results.add(str([[c.tolist() for c in runs] for runs in listing.batches(room=65)]))
    assert len(results) == 1


def test_the_access_word_is_the_error_code_of_an_access() -> None:
    assert access_word(Access(WORD, write=1, user=1)) == 0b00110
    assert access_word(Access(WORD, fetch=1)) == 0b10000
    assert access_word(Access(WORD, implicit=1)) == 0b00001


# TWO STAGES

CPU = Cpu(cr0=PG | PE, cr3=0, cr4=PAE, efer=LME | LMA)


@pytest.mark.parametrize(
    "name", ["the_walk_under_ept_equals_the_reference", "the_walk_under_npt_equals_the_reference"]
)
def test_the_compiled_two_dimensional_walk_equals_the_reference(name: str) -> None:
    search = Search(load_invariants()[name], Guarded("compiled", Compiled()), seed=0)
    for _ in range(8):
        search.batch(512)
    verdict = search.verdict("random", 1.0)
    assert (verdict.status, verdict.why) == (HELD, "")


def test_a_mistake_of_the_compiled_two_dimensional_walk_is_found() -> None:
    mistake = MISTAKES["nested-skips-the-guests-flags"]
    mistaken = mistake.module("vapama.impl.optimized").Compiled(ready=False)
    # Compiled here, for a search would take the subject to hang.
    mistaken.translate_nested(CPU, Ept(0x1E), Sparse({0: 0}, 4096), Access(0))
    search = Search(load_invariants()[mistake.breaks], Guarded("mistake", mistaken), seed=0)
    while search.failed is None and search.executions < 20_000:
        search.batch(512)
    assert search.verdict("random", 1.0).status == COUNTEREXAMPLE
