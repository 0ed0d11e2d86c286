"""How fast pages are scanned and merged: the optimized merger beside ksmd, on the same pages.

``python bench/ksm.py [MIB]``. ksmd is driven only where `vapama.oracles.linux_mm` can (as root; it
changes KSM's knobs, and restores them). Each line is the best of the scans of its kind, in seconds
of a processor: ksmd is nice, and would seem slow on a busy machine.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from vapama.impl.ksm import Items, Ksm
from vapama.impl.merging import row_of
from vapama.impl.processes import Processes
from vapama.oracles.linux_mm.child import PAGE
from vapama.oracles.linux_mm.knobs import Unavailable
from vapama.oracles.linux_mm.ksm import LinuxKsm
from vapama.oracles.linux_mm.processes import MAP_ANONYMOUS, MAP_PRIVATE, MERGEABLE, NOHUGEPAGE


def contents(pages: int, alike: bool) -> list[int]:
    """The contents of pages: all different, or each twice."""
    return [1 + (page // 2 if alike else page) for page in range(pages)]


def measured(scan: Callable[[], object], clock: Callable[[], float], scans: int) -> list[float]:
    """The seconds of each of so many scans, by this clock."""
    found = []
    for _ in range(scans):
        start = clock()
        scan()
        found.append(clock() - start)
    return found


def ksmd_clock() -> Callable[[], float]:
    """The seconds that ksmd has spent on a processor."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and (process / "comm").read_text() == "ksmd\n":
            return lambda: int((process / "schedstat").read_text().split()[0]) / 1e9
    raise Unavailable("there is no ksmd")


def ours(pages: int) -> dict[str, float]:
    """The merger's seconds: an unmerged scan, and one that merges pages in pairs."""
    seconds = {}
    for alike in (False, True):
        host = Processes(pages, frames=pages + 16)
        merger = Ksm(host)
        host.watcher = merger
        process = host.alive[0]
        process.mergeable[:] = True
        for page, content in enumerate(contents(pages, alike)):
            host.store(process, page, row_of(content))
        spent = measured(merger.scan, time.process_time, 4)
        assert merger.counters()[:3] == ((pages // 2, pages // 2, 0) if alike else (0, 0, pages))
        seconds["merge" if alike else "scan"] = spent[1] if alike else min(spent[2:])
    return seconds


def ksmd(pages: int) -> dict[str, float]:
    """The kernel's seconds, for the same. Raises `Unavailable`."""
    kernel, clock = LinuxKsm(), ksmd_clock()
    seconds = {}
    try:
        for alike in (False, True):
            kernel.ksm(1, 256, 0, 0)
            child = kernel.parent.fork()
            base = child.ask(b"m", pages * PAGE, MAP_PRIVATE | MAP_ANONYMOUS)
            child.ask(b"a", base, pages * PAGE, NOHUGEPAGE)
            child.ask(b"a", base, pages * PAGE, MERGEABLE)
            for page, content in enumerate(contents(pages, alike)):
                child.ask(b"w", base + page * PAGE, content, kernel.salt)
            spent = measured(kernel.step, clock, 4)
            items, merged, _ = child.merging()
            assert (items, merged) == (pages, pages if alike else 0)
            seconds["merge" if alike else "scan"] = spent[1] if alike else min(spent[2:])
            child.end()
    finally:
        kernel.close()
    return seconds


def main() -> None:
    """Print both."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    pages = megabytes << 8
    results = {"optimized": ours(pages)}
    try:
        results["ksmd"] = ksmd(pages)
    except Unavailable as reason:
        print(f"ksmd is left out: {reason}")
    print(f"{megabytes} MiB, {Items.BYTES_A_PAGE} bytes a page kept, and 4 a frame")
    for name, seconds in results.items():
        for what, spent in seconds.items():
            print(f"{name:<10} {what:<6} {megabytes / spent:>8,.0f} MiB/s")


if __name__ == "__main__":
    main()
