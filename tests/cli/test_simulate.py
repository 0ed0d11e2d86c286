"""`vapama simulate`: its numbers, and what it says of hosts, sound and broken."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from vapama import simulate
from vapama.case import BadInput


def test_the_numbers_of_a_small_simulation(vapama: Any) -> None:
    result = vapama("simulate", "--size", "64", "--scans", "4", "--memory", "4096", "--json")
    assert result.status == 0
    told = json.loads(result.out)
    assert [walk["references"] for walk in told["walks"]] == [24, 19, 14]
    assert told["walks"][1]["huge_pages"] == 2048
    # 32 pages of each of 4 guests are alike; each wrote to 8 of its pages before the second scan.
    assert 3 * 32 - 4 * 8 <= told["ksm"][1]["saved"] <= 3 * 32
    assert told["ksm"][0] == {"scan": 1, "scanned": 256, "saved": 0, "broken": 0}
    assert any("nr_hugepages" in line for line in told["setup"])


def test_exits_are_fewest_where_the_hardware_walks_and_pages_are_huge(
    vapama: Any, tmp_path: Path
) -> None:
    plot = tmp_path / "plots.svg"
    sizes = ("--size", "16", "--scans", "3", "--steps", "400")
    result = vapama("simulate", *sizes, "--json", "--plot", str(plot))
    assert result.status == 0
    told = json.loads(result.out)["exits"]
    left = {(e["workload"], e["design"], e["pages"]): e["faults"] + e["intercepts"] for e in told}
    assert len(left) == 3 * 3 * 3
    for workload in simulate.WORKLOADS:
        for design in simulate.DESIGNS:
            at = {pages: left[workload, design, pages] for pages in simulate.SIZES}
            assert at["1G"] < at["2M"] < at["4K"] / 2
    assert left["page tables", "ept", "2M"] < left["page tables", "shadow", "2M"]
    assert left["processes", "npt", "2M"] < left["processes", "shadow", "2M"]
    image = ElementTree.fromstring(plot.read_text())
    assert sum(child.tag.endswith("rect") for child in image) == 2 * 3 + 3 * 3 * 3
    assert sum(child.tag.endswith("polyline") for child in image) == 2


def test_plots_that_cannot_be_written_are_bad_input(vapama: Any, tmp_path: Path) -> None:
    small = ("--size", "16", "--scans", "1", "--steps", "8")
    result = vapama("simulate", *small, "--plot", str(tmp_path / "no" / "where.svg"))
    assert result.status == 2
    assert "cannot write the plots" in result.err


@pytest.mark.parametrize("option", ["--pages", "--guest-pages"])
def test_a_size_that_is_none_is_refused_in_one_line(vapama: Any, option: str) -> None:
    result = vapama("simulate", option, "3M")
    assert result.status == 2
    assert f"{option} 3M: give one of 4K, 2M, 1G" in result.err


def host(root: Path, free: int) -> Path:
    """A host with a pool of 4 pages, `free` of them free."""
    pool = root / "sys/kernel/mm/hugepages/hugepages-2048kB"
    pool.mkdir(parents=True)
    for name, value in (("nr", 4), ("free", free), ("resv", 1), ("surplus", 1)):
        (pool / f"{name}_hugepages").write_text(f"{value}\n")
    (pool / "nr_overcommit_hugepages").write_text("1\n")
    (root / "proc/sys/vm").mkdir(parents=True)
    (root / "proc/sys/vm/nr_hugepages").write_text("3\n")
    (root / "proc/meminfo").write_text(
        f"HugePages_Total: 4\nHugePages_Free: {free}\nHugePages_Rsvd: 1\nHugePages_Surp: 1\n"
        "Hugepagesize: 2048 kB\nHugetlb: 8192 kB\nAnonHugePages: 4096 kB\n"
    )
    return root


def test_a_sound_host_holds(tmp_path: Path) -> None:
    findings = simulate.look_at_host(host(tmp_path, free=2))
    assert len(findings) == 5
    assert all(finding.holds for finding in findings)


def test_a_host_whose_books_are_wrong_is_caught(tmp_path: Path) -> None:
    findings = simulate.look_at_host(host(tmp_path, free=0))
    assert [finding.what for finding in findings if not finding.holds] == [
        "pool hugepages-2048kB",
        "meminfo, hugetlb",
    ]


def test_what_is_no_linux_host_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="it takes a Linux host"):
        simulate.look_at_host(tmp_path)
