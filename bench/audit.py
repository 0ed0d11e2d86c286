"""How long an audit takes: the real guest behind a 4K EPT whose frames lie in no order at all.

``python bench/audit.py`` prints the seconds of several audits; the first one loads machine code.
"""

import time

import numpy as np

from vapama.impl.listing import Pieces, at_each_position
from vapama.snapshot.audit import Options, audit
from vapama.snapshot.images import Image, open_image
from vapama.snapshot.sides import Given, sides_of
from vapama.snapshot.slots import UNKNOWN, Slots
from vapama.snapshot.truth import SHIPPED

BYTES = 5 << 29
"""The guest's memory: 2.5 GBytes."""
MEMORY, TABLES = 4 << 30, 16 << 30
"""Where in the host its frames and the second stage's tables are."""


def second_stage() -> Image:
    """An image of the tables: one PML4, one PDPT, PDs, and PTs of frames in a random order."""
    u64 = np.uint64
    pages = BYTES >> 12
    order = np.random.default_rng(0).permutation(pages).astype(np.uint64)
    leaves = (order << u64(12)) + u64(MEMORY) | u64(0x37)
    levels = [leaves]
    place = TABLES + 4096
    while len(levels[-1]) > 512:
        count = len(levels[-1]) >> 9
        above = np.arange(count, dtype=np.uint64) * u64(4096) + u64(place) | u64(7)
        place += 4096 * count
        levels.append(np.pad(above, (0, -count % 512)))
    pml4 = np.zeros(512, dtype=np.uint64)
    pml4[0] = u64(place | 7)
    parts = [pml4, *levels]
    words = np.concatenate(parts)
    row = [np.array([value], dtype=np.uint64) for value in (TABLES, TABLES + words.nbytes, 0)]
    return Image("EPT", "raw", words, Pieces(at_each_position(words.data, words.nbytes), *row))


def main() -> None:
    """Print how long audits take."""
    guest, host = open_image(SHIPPED), second_stage()
    zero, end, unknown = (np.array([v], dtype=np.uint64) for v in (0, BYTES, UNKNOWN))
    no = np.zeros(1, dtype=bool)
    slots = Slots(zero, end, unknown, unknown, no, no, zero[:0])
    given = Given(guest, host, {}, {"eptp": TABLES | 0x1E}, None, None, False, 0, slots)
    for _ in range(4):
        start = time.perf_counter()
        report = audit(*sides_of(given), slots, Options())
        seconds = time.perf_counter() - start
        print(
            f"{seconds:.2f} s: {report.pages:,} pages, {report.tables:,} tables, "
            f"{report.entries:,} entries, {len(report.findings)} findings"
        )


if __name__ == "__main__":
    main()
