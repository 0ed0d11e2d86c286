"""`vapama simulate`: what sharing and large pages cost and give; and a look at this host.

Walks and tables are arithmetic (`vapama.spec.hugepages`). What KSM gives over time is measured on
the optimized merger, with guests that write at random. `look_at_host` reads this machine's own
books and checks them against the invariants of accounting.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import msgspec

from vapama.case import BadInput
from vapama.impl.ksm import Ksm
from vapama.impl.merging import row_of
from vapama.impl.processes import Process, Processes
from vapama.spec.hugepages import (
    Pool,
    huge_pages_for,
    nested_walk_references,
    page_bytes,
    pool_holds,
    table_pages,
    walk_references,
)

SIZES = {"4K": 1, "2M": 2, "1G": 3}
"""The level of each page size."""


class Walk(msgspec.Struct, frozen=True):
    """What mapping a guest's memory costs with host pages of one size, the guest's being 4K."""

    pages: str
    references: int
    tables: int
    table_bytes: int
    huge_pages: int


class Scan(msgspec.Struct, frozen=True):
    """What KSM had done after a scan: pages scanned and copies broken so far, frames saved now."""

    scan: int
    scanned: int
    saved: int
    broken: int


def walks(size: int, guest: str) -> list[Walk]:
    """For each size of the host's pages, the cost of `size` bytes under nested paging."""
    inner = walk_references(SIZES[guest])
    found = []
    for pages, level in SIZES.items():
        outer = walk_references(level)
        tables = table_pages(size, level)
        huge = huge_pages_for(size, page_bytes(level)) if level > 1 else 0
        references = nested_walk_references(inner, outer)
        found.append(Walk(pages, references, tables, tables * 4096, huge))
    return found


def merging(
    guests: int, pages: int, alike: float, writes: int, scans: int, seed: int
) -> Iterator[Scan]:
    """KSM on guests of so many pages, of which the part `alike` is the same in all of them.

    Between scans each guest writes to `writes` pages chosen at random.
    """
    random = Random(seed)
    host = Processes(pages, frames=2 * guests * pages + 1)
    merger = Ksm(host)
    host.watcher = merger
    processes: list[Process] = [
        host.alive[0],
        *(host.fork(host.alive[0]) for _ in range(guests - 1)),
    ]
    fresh = 1
    for number, process in enumerate(processes):
        process.mergeable[:] = True
        for page in range(pages):
            same = page < alike * pages
            content = 1 + page if same else (1 << 32) + number * pages + page
            host.store(process, page, row_of(content))
    broken = scanned = 0
    for scan in range(1, scans + 1):
        scanned += merger.scan()
        yield Scan(scan, scanned, merger.sharing, broken)
        for process in processes:
            for _ in range(writes):
                page, fresh = random.randrange(pages), fresh + 1
                broken += merger.shares(int(process.table[page]) >> 12)
                host.store(process, page, row_of((1 << 40) + fresh))


def setup(size: int, pages: str, mount: str) -> list[str]:
    """How a Linux host is set up so that a guest of `size` bytes has these pages."""
    megabytes = size >> 20
    if pages == "4K":
        return [
            "echo never > /sys/kernel/mm/transparent_hugepage/enabled",
            f"qemu-system-x86_64 -m {megabytes} -machine mem-merge=on ...",
        ]
    bytes_a_page = page_bytes(SIZES[pages])
    count = huge_pages_for(size, bytes_a_page)
    kilobytes = bytes_a_page >> 10
    unit = "1" if pages == "1G" else "2"
    libvirt = f"<page size='{unit}' unit='{pages[-1]}iB'/>"
    return [
        f"echo {count} > /sys/kernel/mm/hugepages/hugepages-{kilobytes}kB/nr_hugepages",
        f"mount -t hugetlbfs -o pagesize={pages} none {mount}",
        f"qemu-system-x86_64 -m {megabytes} -mem-path {mount} -mem-prealloc ...",
        f"<memoryBacking><hugepages>{libvirt}</hugepages></memoryBacking>   (libvirt)",
    ]


def plotted(values: list[int], width: int = 60) -> list[str]:
    """A plot of values in text, one line each."""
    most = max(values, default=0) or 1
    return [f"{value:>10,} {'#' * round(width * value / most)}" for value in values]


# This host


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at: what, what it is, and whether the accounting holds."""

    what: str
    told: str
    holds: bool


def look_at_host(root: Path = Path("/")) -> list[Finding]:
    """This host's huge-page pools and KSM counters against what must hold of them.

    Counters move while they are read: what does not hold is read twice more before it counts.
    Raises `BadInput` where there is no such Linux.
    """
    if not (root / "proc/meminfo").exists():
        raise BadInput("--host: there is no /proc/meminfo: it takes a Linux host")
    looks: list[Callable[[], list[Finding]]] = [
        lambda: list(_pools(root)),
        lambda: list(_meminfo(root)),
        lambda: list(_ksm(root)),
    ]
    found: list[Finding] = []
    for look in looks:
        for _ in range(3):
            findings = look()
            if all(finding.holds for finding in findings):
                break
        found += findings
    return found


def _pools(root: Path) -> Iterator[Finding]:
    folder = root / "sys/kernel/mm/hugepages"
    for path in sorted(folder.glob("hugepages-*kB")):
        names = ("nr", "free", "resv", "surplus", "nr_overcommit")
        pool = Pool(*(_number(path / f"{name}_hugepages") for name in names))
        told = ", ".join(f"{name} {value}" for name, value in pool._asdict().items())
        yield Finding(f"pool {path.name}", told, bool(pool_holds(pool)))


def _meminfo(root: Path) -> Iterator[Finding]:
    lines = (root / "proc/meminfo").read_text().splitlines()
    info = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    if "Hugepagesize" not in info:
        return
    total, free, reserved, surplus = (
        info[f"HugePages_{name}"] for name in ("Total", "Free", "Rsvd", "Surp")
    )
    pool = Pool(total, free, reserved, surplus)
    size = info["Hugepagesize"]
    told = f"{total} huge pages of {size} kB, {free} free"
    yield Finding("meminfo, hugetlb", told, bool(pool_holds(pool)))
    persistent = _number(root / "proc/sys/vm/nr_hugepages")
    told = f"vm.nr_hugepages {persistent}, total less surplus {total - surplus}"
    yield Finding("vm.nr_hugepages", told, persistent == total - surplus)
    anonymous = info.get("AnonHugePages", 0)
    yield Finding("transparent huge pages", f"{anonymous} kB", anonymous % size == 0)
    everything = sum(
        _number(path / "nr_hugepages") * int(path.name[10:-2])
        for path in (root / "sys/kernel/mm/hugepages").glob("hugepages-*kB")
    )
    told = f"Hugetlb {info.get('Hugetlb', 0)} kB, all pools {everything} kB"
    yield Finding("memory in pools", told, info.get("Hugetlb", everything) == everything)


def _ksm(root: Path) -> Iterator[Finding]:
    folder = root / "sys/kernel/mm/ksm"
    if not folder.is_dir():
        return
    names = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
    shared, sharing, unshared, volatile = (_number(folder / name) for name in names)
    told = f"shared {shared}, sharing {sharing}, unshared {unshared}, volatile {volatile}"
    yield Finding("KSM", told, min(shared, sharing, unshared, volatile) >= 0)
    least = sharing >= 0 and (shared > 0 or sharing == 0)
    yield Finding("KSM shares only what is shared", f"{sharing} by {shared}", least)
    items, merging_pages, unreadable = 0, 0, 0
    for process in (root / "proc").iterdir():
        if process.name.isdigit():
            try:
                text = (process / "ksm_stat").read_text().replace(":", "")
            except FileNotFoundError:
                continue
            except OSError:
                unreadable += 1
                continue
            counted = dict(line.split()[:2] for line in text.splitlines() if line)
            items += int(counted.get("ksm_rmap_items", 0))
            merging_pages += int(counted.get("ksm_merging_pages", 0))
    if unreadable or os.geteuid() != 0:
        return
    told = f"{merging_pages} by processes, {shared + sharing} in all"
    yield Finding("KSM pages of processes", told, merging_pages == shared + sharing)
    every = shared + sharing + unshared + volatile
    yield Finding("KSM items of processes", f"{items}, {every} in all", items == every)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except OSError:
        return 0
