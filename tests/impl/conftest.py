"""Images of physical memory for the kernels to walk."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

Words = npt.NDArray[np.uint64]


@pytest.fixture(scope="session")
def hostile() -> Callable[[int, int], Words]:
    """Tables by a seed and a number of pages: they alias, reference themselves, lead outside, map
    large pages, have every kind of right; and one word in ten is plain noise."""

    def image(seed: int, pages: int) -> Words:
        rng = np.random.default_rng(seed)
        noise = rng.integers(0, 1 << 64, pages * 512, dtype=np.uint64)
        frames = rng.integers(0, pages + 1, pages * 512, dtype=np.uint64) << np.uint64(12)
        kind = rng.random(pages * 512)
        table = noise & np.uint64(0x8000_0000_0000_0F78) | frames | np.uint64(7)
        bare = noise & np.uint64(0x7) | frames | np.uint64(1)
        large = table | np.uint64(0x80) | (noise & np.uint64(0xFF_C000_0000))
        return np.select([kind < 0.6, kind < 0.75, kind < 0.9], [table, bare, large], noise)

    return image
