"""``make bench``: what a translation costs, beside an equal loop in C and beside other tools.

On each image every contender first answers all of its addresses, and one that is wrong is not
timed. Then all are timed in one interleaved run of several rounds; printed and plotted are medians,
and how many times the compiled kernel's they are.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import images
import numpy as np
import peers
from images import Question, Words
from peers import Absent, Run

from vapama.impl.listing import mappings_array
from vapama.impl.optimized import (
    Optimized,
    access_word,
    controls,
    stage_controls,
    translate_array,
    translate_nested_array,
)
from vapama.spec.access import Access
from vapama.spec.memory import Image
from vapama.spec.outcomes import Translated
from vapama.spec.paging import translate
from vapama.spec.stage import Ept

ROUNDS = 7
KERNEL, C_LOOP, C_GROUPS = "compiled kernel", "C, the same checks", "C, in groups too"
READ = Access(0, user=1)


@dataclass
class Contender:
    """Something timed: it runs through `count` addresses (or pages) in `times` seconds each."""

    name: str
    run: Callable[[], object]
    count: int
    times: list[float]

    @property
    def nanoseconds(self) -> float:
        """The median of what one address costs."""
        return statistics.median(self.times) / self.count * 1e9


def kernel(question: Question) -> Run:
    """The compiled batch kernel."""

    def run() -> Words:
        _, values = translate_array(question.cpu, question.image, question.addresses, READ)
        return values

    return run


def c_loop(question: Question, name: str = "translate_many") -> Run:
    """The equal loop in C, or another function there that takes and gives the same."""
    many = getattr(peers.library("equal"), name)
    scalar, row = ctypes.c_uint64, ctypes.c_void_p
    many.argtypes = [row, *[scalar] * 6, row, scalar, row, row, scalar]
    many.restype = None
    image, addresses = question.image, question.addresses
    words = controls(question.cpu)

    def run() -> Words:
        statuses, values = np.zeros_like(addresses), np.zeros_like(addresses)
        many(
            peers.pointer(image),
            len(image),
            *words,
            peers.pointer(addresses),
            access_word(READ),
            peers.pointer(statuses),
            peers.pointer(values),
            len(addresses),
        )
        return values

    return run


def in_python(walk: Callable[..., object], question: Question) -> Run:
    """A walk called from Python, an address at a time."""
    memory = Image(question.image)

    def one(address: int) -> int:
        outcome = walk(question.cpu, memory, Access(address, user=1))
        return outcome.pa if isinstance(outcome, Translated) else 0

    return peers.one_by_one(one, question)


ONE_STAGE: dict[str, tuple[Callable[[Question], Run], int]] = {
    KERNEL: (kernel, 1_000_000),
    C_LOOP: (c_loop, 1_000_000),
    C_GROUPS: (partial(c_loop, name="translate_many_in_groups"), 1_000_000),
    "addrxlat (C)": (peers.addrxlat, 200_000),
    "unicorn": (peers.unicorn, 5_000),
    "memprocfs": (peers.memprocfs, 5_000),
    "drgn": (peers.drgn, 5_000),
    "volatility3": (peers.volatility3, 2_000),
    "kernel as Python": (partial(in_python, Optimized().translate), 2_000),
    "reference": (partial(in_python, translate), 2_000),
}
"""Contenders by name, and how many addresses each is given."""


def one_stage(question: Question) -> list[Contender]:
    """Those that translate addresses, each checked; says which are not here, or wrong."""
    found = []
    for name, (make, count) in ONE_STAGE.items():
        asked = replace(
            question, addresses=question.addresses[:count], expected=question.expected[:count]
        )
        try:
            run = make(asked)
        except Absent as absent:
            print(f"  {name:<24} not here: {absent}")
            continue
        right = int((run() == asked.expected).sum())
        if right != count:
            print(f"  {name:<24} {right:,} of {count:,} right: not timed")
            continue
        found.append(Contender(name, run, count, []))
    return found


def two_stages(question: Question, stage: Ept) -> list[Contender]:
    """The compiled kernel and the equal loop in C, each checked."""
    image, addresses, count = question.image, question.addresses, len(question.addresses)

    def kernel() -> Words:
        return translate_nested_array(question.cpu, stage, image, addresses, READ)[1]

    found = [(KERNEL, kernel)]
    try:
        many = peers.library("equal").translate_many_under_ept
        scalar, row = ctypes.c_uint64, ctypes.c_void_p
        many.argtypes = [row, *[scalar] * 9, row, scalar, row, row, row, scalar]
        many.restype = None
        words = (*controls(question.cpu), *stage_controls(stage))

        def in_c() -> Words:
            statuses, values, gpas = (np.zeros_like(addresses) for _ in range(3))
            rows = map(peers.pointer, (statuses, values, gpas))
            where = peers.pointer(image), len(image)
            many(*where, *words, peers.pointer(addresses), access_word(READ), *rows, count)
            return values

        found.append((C_LOOP, in_c))
    except Absent as absent:
        print(f"  {C_LOOP:<24} not here: {absent}")
    right = [(name, run, int((run() == question.expected).sum())) for name, run in found]
    for name, _, agreed in right:
        if agreed != count:
            print(f"  {name:<24} {agreed:,} of {count:,} right: not timed")
    return [Contender(name, run, count, []) for name, run, agreed in right if agreed == count]


def enumeration(question: Question) -> list[Contender]:
    """Those that list all that is mapped, each checked against the kernel's count of 4-KByte
    pages (MemProcFS leaves some out: its own count is printed).
    """
    room = 40_000
    image, cr3 = question.image, question.cpu.cr3
    _, levels, _ = mappings_array(question.cpu, image, room)
    pages = len(levels)
    found = [Contender(KERNEL, lambda: mappings_array(question.cpu, image, room), pages, [])]
    try:
        listing = peers.library("equal").enumerate_mappings
        scalar, row = ctypes.c_uint64, ctypes.c_void_p
        listing.argtypes, listing.restype = [row, scalar, scalar, scalar, row, row, row], scalar

        rows = [np.zeros(room, dtype=np.uint64) for _ in range(3)]

        def in_c() -> int:
            return int(
                listing(peers.pointer(image), len(image), cr3, room, *map(peers.pointer, rows))
            )

        if in_c() == pages:
            found.append(Contender(C_LOOP, in_c, pages, []))
        mapped = int((np.uint64(512) ** (levels - np.uint64(1))).sum())
        theirs = peers.memprocfs_mappings(question)
        print(f"  memprocfs finds {theirs():,} of {mapped:,} 4-KByte pages mapped")
        found.append(Contender("memprocfs", theirs, pages, []))
    except Absent as absent:
        print(f"  not here: {absent}")
    return found


def timed(contenders: list[Contender]) -> None:
    """Several rounds, each contender once a round."""
    for _ in range(ROUNDS):
        for contender in contenders:
            start = time.perf_counter()
            contender.run()
            contender.times.append(time.perf_counter() - start)


def told(contenders: list[Contender]) -> None:
    """Print medians and ratios, the fastest first."""
    base = next(c.nanoseconds for c in contenders if c.name == KERNEL)
    for contender in sorted(contenders, key=lambda c: c.nanoseconds):
        ns = contender.nanoseconds
        print(f"  {contender.name:<24} {ns:12,.1f} ns  {ns / base:10,.2f} x")


def plot(results: dict[str, list[Contender]], path: Path) -> None:
    """Bars of nanoseconds an address, on a logarithmic scale, a panel for each run."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    figure = Figure(figsize=(9, 2.6 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for axes, (title, contenders) in zip(panels, results.items(), strict=True):
        ordered = sorted(contenders, key=lambda c: c.nanoseconds, reverse=True)
        bars = axes.barh([c.name for c in ordered], [c.nanoseconds for c in ordered])
        axes.bar_label(bars, [f"{c.nanoseconds:,.1f}" for c in ordered], padding=3)
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set_title(title, loc="left", fontsize=10)
    panels[-1].set_xlabel("ns, median")
    figure.savefig(path)
    print(f"plot: {path}")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, default=Path("bench.svg"), help="where to write it")
    asked = parser.parse_args()
    results: dict[str, list[Contender]] = {}
    with TemporaryDirectory() as scratch:
        for make in (images.real, images.large):
            question = make(1_000_000, Path(scratch))
            title = f"{question.name}: one stage, a translation"
            print(title)
            results[title] = one_stage(question)
            timed(results[title])
            told(results[title])
            under, stage = images.under_ept(question)
            title = f"{under.name}: two stages, a translation"
            print(title)
            results[title] = two_stages(under, stage)
            timed(results[title])
            told(results[title])
            del under
            if question.name == "linux":
                title = f"{question.name}: enumeration, a mapping"
                print(title)
                results[title] = enumeration(question)
                timed(results[title])
                told(results[title])
    plot(results, asked.plot)


if __name__ == "__main__":
    main()
