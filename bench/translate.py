"""What a translation costs on the real guest's tables: compiled, as Python, by the reference.

``python bench/translate.py``: every contender translates the same random addresses of the shipped
Linux guest. The results are checked first, then all are timed in one interleaved run, and the
medians and their ratios to the compiled kernel are printed.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vapama.impl.optimized import Optimized, translate_array
from vapama.snapshot.truth import SHIPPED, load_snapshot
from vapama.spec.access import Access
from vapama.spec.memory import Image
from vapama.spec.outcomes import Translated
from vapama.spec.paging import translate

ROUNDS = 7
FAST, SLOW = 1_000_000, 5_000
Words = npt.NDArray[np.uint64]
Contender = Callable[[Words], Words]


def contenders() -> dict[str, tuple[Contender, int]]:
    """By name: a function from addresses to physical addresses, and how many to give it."""
    guest = load_snapshot(SHIPPED)
    memory, plain = Image(guest.image), Optimized()

    def compiled(addresses: Words) -> Words:
        statuses, values = translate_array(guest.cpu, guest.image, addresses, Access(0, user=1))
        return np.where(statuses <= 3, values, 0).astype(np.uint64)

    def one_by_one(walk: Callable[..., object]) -> Contender:
        def run(addresses: Words) -> Words:
            outcomes = [walk(guest.cpu, memory, Access(a, user=1)) for a in addresses.tolist()]
            pas = [o.pa if isinstance(o, Translated) else 0 for o in outcomes]
            return np.array(pas, dtype=np.uint64)

        return run

    return {
        "compiled kernel": (compiled, FAST),
        "kernel as Python": (one_by_one(plain.translate), SLOW),
        "reference": (one_by_one(translate), SLOW),
    }


def main() -> None:
    """Check, time and print."""
    guest = load_snapshot(SHIPPED)
    users = np.array(["U" in letters for letters in guest.truth_flags])
    random = np.random.default_rng(0)
    picked = random.integers(0, int(users.sum()), FAST)
    offsets = random.integers(0, 4096, FAST, dtype=np.uint64)
    addresses = guest.truth_va[users][picked] | offsets
    expected = guest.truth_pa[users][picked] | offsets
    runners = contenders()
    for name, (run, count) in runners.items():
        right = int((run(addresses[:count]) == expected[:count]).sum())
        print(f"{name}: {right:,} of {count:,} right")
        if right != count:
            raise SystemExit(f"{name} is wrong: not timed")
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(ROUNDS):
        for name, (run, count) in runners.items():
            start = time.perf_counter()
            run(addresses[:count])
            times[name].append((time.perf_counter() - start) / count * 1e9)
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    least = medians["compiled kernel"]
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        print(f"{name:<24} {median:10,.1f} ns a translation  {median / least:8.1f} x")


if __name__ == "__main__":
    main()
