"""`vapama simulate`: what sharing and large pages cost and give; and a look at this host.

Walks and tables are arithmetic (`vapama.spec.hugepages`). What KSM gives over time is measured on
the optimized merger, with guests that write at random; how often guests are left, on the running
hypervisor. `look_at_host` reads this machine's own
books and checks them against the invariants of accounting.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from random import Random

import msgspec

from vapama.case import BadInput
from vapama.impl.ksm import Ksm
from vapama.impl.merging import row_of
from vapama.impl.processes import Process, Processes
from vapama.impl.vmm import Vmm
from vapama.plots import Panel
from vapama.spec import overcommit, programs
from vapama.spec.access import Access
from vapama.spec.hugepages import (
    Pool,
    huge_pages_for,
    nested_walk_references,
    page_bytes,
    pool_holds,
    table_pages,
    walk_references,
)
from vapama.spec.overcommit import BLOCK, GBYTE
from vapama.spec.paging import PAGE_SIZE
from vapama.spec.steps import (
    EPT,
    NPT,
    SHADOW,
    Collapse,
    Invlpg,
    Load,
    Move,
    Plan,
    Slot,
    Step,
    Store,
)

DESIGNS = (SHADOW, EPT, NPT)
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


class Exits(msgspec.Struct, frozen=True):
    """What a workload costs under a design and with host pages of a size: how often the guest was
    left, by faults and for what the hypervisor must see, and the tables that it then has.
    """

    workload: str
    design: str
    pages: str
    steps: int
    faults: int
    intercepts: int
    tables: int


WORKLOADS = ("memory", "page tables", "processes")
"""What guests do: use their memory; edit their page tables too; switch between processes too."""
BLOCKS = 16
"""Of the guest's memory that is used, in 2 MBytes."""
WINDOW = 16
"""The first entry of the guest's page directory that maps it: by large pages of the guest's own."""


def exits(steps: int, seed: int) -> Iterator[Exits]:
    """Run each workload on the hypervisor under each design, with host pages of each size. The
    guest stored to each of its large pages before; pages of 2 MBytes were made by the host then.
    """
    for workload, design, pages in product(WORKLOADS, DESIGNS, SIZES):
        hypervisor = Vmm(_plan(design, pages))
        for block in range(BLOCKS):
            hypervisor.do(Store(0, 0, Access(WINDOW + block << 21, 1), 1))
            if pages == "2M":
                hypervisor.do(Collapse(0, (1 + block) * BLOCK))
        vcpu = hypervisor.guests[0].vcpus[0]
        before, intercepts = vcpu.exits, 0
        for step in _workload(workload, steps, Random(seed)):
            hypervisor.do(step)
            # With two-dimensional paging these do not concern the hypervisor.
            intercepts += design == SHADOW and isinstance(step, Invlpg | Move)
        tables = len(hypervisor.guests[0].mmu.pages)
        faults = vcpu.exits - before
        yield Exits(workload, design, pages, steps, faults, intercepts, tables)


def _plan(design: str, pages: str) -> Plan:
    """A machine of one guest that uses 32 MBytes of what may be huge, or is of hugetlbfs (1G)."""
    giants = int(pages == "1G")
    machine = programs.plan(0, design)
    own = machine.guests[0]
    image = dict(own.image)
    for block in range(BLOCKS):
        entry = GBYTE + block * BLOCK << 12 | programs.OPEN | PAGE_SIZE
        image[programs.DIRECTORY << 12 | WINDOW + block << 3] = entry
    big = Slot(GBYTE, GBYTE, GBYTE) if giants else Slot(GBYTE, BLOCKS * BLOCK, BLOCK)
    own = own._replace(slots={**own.slots, 3: big}, image=image, giants=giants)
    return machine._replace(guests=(own,), frames=(BLOCKS + 4) * BLOCK, pool=giants)


def _workload(workload: str, steps: int, random: Random) -> Iterator[Step]:
    """Loads and stores to the guest's pages, and one step in eight what else there is: an entry
    changed and its page invalidated, or CR3 written.
    """
    table = programs.LOW << 12 | overcommit.SMALL << 3
    for number in range(steps):
        if number % 8 == 7 and workload == "page tables":
            page = random.randrange(8)
            frame = GBYTE + random.randrange(BLOCKS * BLOCK)
            yield Store(0, 0, Access(table + 8 * page, 1), frame << 12 | programs.USED)
            yield Invlpg(0, 0, overcommit.SMALL + page << 12)
            yield Load(0, 0, Access(overcommit.SMALL + page << 12))
        elif number % 8 == 7 and workload == "processes":
            root = (programs.ROOT, programs.OTHER_ROOT)[number >> 3 & 1]
            yield Move(0, 0, "cr3", root << 12)
        else:
            access = Access((WINDOW << 21) + (random.randrange(BLOCKS * BLOCK) << 12))
            write = random.randrange(4) == 0
            yield Store(0, 0, access._replace(write=1), number) if write else Load(0, 0, access)


def panels(walked: Sequence[Walk], scanned: Sequence[Scan], left: Sequence[Exits]) -> list[Panel]:
    """The plots of a simulation."""
    sizes = [walk.pages for walk in walked]
    merged = {
        "frames saved": [scan.saved for scan in scanned],
        "copies broken": [scan.broken for scan in scanned],
    }
    found = [
        Panel("KSM over scans", [str(scan.scan) for scan in scanned], merged),
        Panel(
            "memory references a walk, by the host's pages",
            sizes,
            {"references": [walk.references for walk in walked]},
            bars=True,
        ),
        Panel(
            "KBytes of tables, by the host's pages",
            sizes,
            {"KBytes": [walk.table_bytes >> 10 for walk in walked]},
            bars=True,
        ),
    ]
    for pages in SIZES:
        series = {
            design: [
                1000 * (each.faults + each.intercepts) / each.steps
                for each in left
                if (each.design, each.pages) == (design, pages)
            ]
            for design in DESIGNS
        }
        title = f"exits in 1,000 steps, by workload, with {pages} pages"
        found.append(Panel(title, WORKLOADS, series, bars=True))
    return found


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
