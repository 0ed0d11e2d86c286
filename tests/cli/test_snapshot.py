"""`vapama snapshot`: images of every format, hostile ones too, and what their tables map."""

import json
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vapama.snapshot.images import open_image
from vapama.snapshot.truth import SHIPPED

Vapama = Callable[..., Any]
PAGE = 4096
XD = 1 << 63
LONG_MODE = ("--cr0", "0x80010001", "--cr4", "0x20", "--efer", "0xd00")


def pages(entries: dict[int, int], count: int = 8) -> bytes:
    """So many pages of physical memory with these entries, by address."""
    image = np.zeros(count * 512, dtype="<u8")
    for address, entry in entries.items():
        image[address >> 3] = entry
    return image.tobytes()


SMALL = pages(
    {
        0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007, 0x3008: 0x40_0083,
        0x4000: 0x5027, 0x4008: 0x6005 | XD, 0x4010: 0x7003, 0x4018: 0x8003, 0x4028: 0x7006,
        0x1FF8: 0x10_0000_2007, 0x1FF0: 0x2087,
    }
)  # fmt: skip
"""CR3 is 0x1000. It maps a page of 2 MBytes and four of 4; one table is absent, one malformed."""
SHOWN = [
    "0x0000000000000000-0x0000000000000fff  1 x 4 KBytes   0x0000000005000  rwx user       A",
    "0x0000000000001000-0x0000000000001fff  1 x 4 KBytes   0x0000000006000  r-- user",
    "0x0000000000002000-0x0000000000002fff  1 x 4 KBytes   0x0000000007000  rwx supervisor",
    "0x0000000000003000-0x0000000000003fff  1 x 4 KBytes   0x0000000008000  rwx supervisor",
    "0x0000000000200000-0x00000000003fffff  1 x 2 MBytes   0x0000000400000  rwx supervisor",
    "5 pages in 5 lines; 1 malformed entries; 1 absent tables",
]


def elf(
    memory: dict[int, bytes],
    bits: int = 64,
    notes: bytes = b"",
    extended: bool = False,
    **changes: int,
) -> bytes:
    """An ELF core: pieces of memory by physical address, its program headers first."""
    kind = {"type": 4, "machine": 62 if bits == 64 else 3, "order": 1, "class": bits // 32}
    kind |= changes
    head = 64 if bits == 64 else 52
    step = 56 if bits == 64 else 32
    rows, body = [], b""
    start = head + step * (len(memory) + 1) + (64 if extended else 0)
    for address, content in memory.items():
        rows.append((1, start + len(body), address, len(content)))
        body += content
    rows.append((4, start + len(body), 0, len(notes)))
    body += notes
    headers = b"".join(
        struct.pack("<IIQQQQQQ", t, 0, offset, 0, paddr, size, size, 0)
        if bits == 64
        else struct.pack("<8I", t, offset, 0, paddr, size, size, 0, 0)
        for t, offset, paddr, size in rows
    )
    ident = b"\x7fELF" + bytes([kind["class"], kind["order"], 1]) + bytes(9)
    layout = "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH"
    shoff = head + len(headers) if extended else 0
    count = 0xFFFF if extended else len(rows)
    section = struct.pack("<IIQQQQII", 0, 0, 0, 0, 0, 0, 0, len(rows)) if extended else b""
    header = struct.pack(
        layout, kind["type"], kind["machine"], 1, 0, head, shoff, 0, head, step, count, 0, 0, 0
    )
    return ident + header + headers + section.ljust(64 if extended else 0, b"\0") + body


def qemu_note(cr0: int, cr3: int, cr4: int, version: int = 1) -> bytes:
    desc = struct.pack("<II", version, 440) + bytes(17 * 8) + struct.pack("<Q", 2) + bytes(240)
    desc += struct.pack("<6Q", cr0, 0, 0, cr3, cr4, 0)
    other = struct.pack("<III", 5, 8, 1) + b"CORE\0\0\0\0" + bytes(8)
    return other + struct.pack("<III", 5, len(desc), 0) + b"QEMU\0\0\0\0" + desc


NOTES = qemu_note(0x8001_0001, 0x1000, 0x20)


def images() -> list[Any]:
    """The small memory in every format."""
    halves = {0x4000: SMALL[0x4000:], 0: SMALL[:0x4000]}
    return [
        pytest.param(SMALL, (*LONG_MODE, "--cr3", "0x1000"), id="raw"),
        pytest.param(SMALL, ("--cr3", "4096"), id="raw, all else by default"),
        pytest.param(elf({0: SMALL}), ("--cr3", "0x1000"), id="elf"),
        pytest.param(elf({0: SMALL}, notes=NOTES), (), id="elf with notes"),
        pytest.param(elf(halves, notes=NOTES), (), id="elf in two segments"),
        pytest.param(elf(halves, notes=NOTES, extended=True), (), id="elf of many segments"),
        pytest.param(
            elf({0: SMALL}, bits=32), (*LONG_MODE, "--cr3", "0x1000"), id="elf of 32 bits"
        ),
    ]


@pytest.mark.parametrize(("content", "options"), images())
def test_an_image_of_any_format_maps_the_same(
    vapama: Vapama, folder: Path, content: bytes, options: tuple[str, ...]
) -> None:
    (folder / "image").write_bytes(content)
    result = vapama("snapshot", "maps", "image", *options)
    assert (result.status, result.err) == (0, "")
    assert result.out.splitlines()[1:] == SHOWN


def test_a_npz_of_tables_maps_the_same(vapama: Vapama, folder: Path) -> None:
    """The frames in no order; the registers within."""
    tables = np.frombuffer(SMALL, dtype="<u8").reshape(-1, 512)
    order = np.array([5, 0, 4, 1, 3, 2, 7, 6])
    np.savez(
        folder / "image.npz",
        frames=(order << 12).astype(np.uint64),
        tables=tables[order],
        cr3=np.uint64(0x1000),
    )
    result = vapama("snapshot", "maps", "image.npz")
    assert (result.status, result.err) == (0, "")
    assert result.out.splitlines()[1:] == SHOWN


def test_neighbours_are_merged_on_request(vapama: Vapama, folder: Path) -> None:
    (folder / "image").write_bytes(SMALL)
    result = vapama("snapshot", "maps", "image", "--cr3", "0x1000", "--merge", "--json")
    report = json.loads(result.out)
    assert [(m["address"], m["pages"]) for m in report["mappings"]] == [
        ("0x0", 1),
        ("0x1000", 1),
        ("0x2000", 2),
        ("0x200000", 1),
    ]


def test_maps_as_json_say_all_that_there_is(vapama: Vapama, folder: Path) -> None:
    (folder / "image").write_bytes(SMALL)
    report = json.loads(vapama("snapshot", "maps", "image", "--cr3", "0x1000", "--json").out)
    assert report["mappings"][1] == {
        "address": "0x1000",
        "physical": "0x6000",
        "page_bytes": 4096,
        "pages": 1,
        "read": True,
        "write": False,
        "user": True,
        "execute": False,
        "entry": "0x8000000000006005",
    }
    del report["mappings"], report["control"]
    assert report == {
        "format": "vapama-maps",
        "version": 1,
        "image": "image",
        "complete": True,
        "stopped": "",
        "pages": 5,
        "pages_in_all": 5,
        "entries_read": 4 * 512,
        "malformed_entries": 1,
        "absent_tables": 1,
    }


def test_the_guest_that_ships_is_listed_whole(vapama: Vapama) -> None:
    result = vapama("snapshot", "maps", "guest", "--merge")
    assert result.status == 0
    lines = result.out.splitlines()
    assert lines[-1] == f"38,697 pages in {len(lines) - 2:,} lines"


# TRANSLATE


def test_addresses_are_translated_one_a_line(vapama: Vapama, folder: Path) -> None:
    (folder / "image").write_bytes(SMALL)
    asked = ("0x123", "0x200abc", "0x1000", "0x6000", "0xfffffffffffff000", "0x800000000000")
    result = vapama("snapshot", "translate", "image", *asked, "--cr3", "0x1000", "--write")
    assert (result.status, result.err) == (0, "")
    assert [line.split("  ", 1)[1] for line in result.out.splitlines()] == [
        "translated to 0x5123, a page of 4 KBytes",
        "translated to 0x400abc, a page of 2 MBytes",
        "#PF, error code 0x3 (P W)",
        "#PF, error code 0x2 (W)",
        "the walk needs the entry at 0x1000002ff8, outside memory",
        "#GP(0): the address is not canonical",
    ]


def test_addresses_are_read_from_standard_input(folder: Path) -> None:
    (folder / "image").write_bytes(SMALL)
    done = command(folder, "translate", "image", "-", "--cr3", "0x1000", "--json", given="0 0x1\n2")
    found = json.loads(done.stdout)["translations"]
    assert [(t["access"]["address"], t["outcome"], t["pa"]) for t in found] == [
        (hex(k), "translated", hex(0x5000 + k)) for k in range(3)
    ]


def test_an_entry_in_a_gap_is_outside_memory(vapama: Vapama, folder: Path) -> None:
    (folder / "core").write_bytes(elf({0: SMALL[:0x3000], 0x4000: SMALL[0x4000:]}))
    result = vapama("snapshot", "translate", "core", "0x0", "--cr3", "0x1000")
    assert "the walk needs the entry at 0x3000, outside memory" in result.out
    walk = vapama("snapshot", "translate", "core", "0x0", "--cr3", "0x1000", "--walk")
    assert "PDPTE[  0] at 0x2000 = 0x0000000000003007" in walk.out
    assert "outcome  the walk needs the entry at 0x3000, outside memory" in walk.out
    assert "0 pages" in vapama("snapshot", "maps", "core", "--cr3", "0x1000").out


def test_registers_on_the_command_line_go_before_those_of_the_image(
    vapama: Vapama, folder: Path
) -> None:
    notes = qemu_note(0x8001_0001, 0x7000, 0x20) + qemu_note(0x8001_0001, 0x1000, 0x20)
    (folder / "core").write_bytes(elf({0: SMALL}, notes=notes))
    assert "#PF" in vapama("snapshot", "translate", "core", "0x123").out
    for options in (("--cr3", "0x1000"), ("--processor", "1")):
        assert "to 0x5123" in vapama("snapshot", "translate", "core", "0x123", *options).out


# OTHER MODES, AND SECOND STAGES

HOST = 0x10_0000
"""Where in the host's memory the guest's is; its second stage's tables are before it."""


def host(second_stage: dict[int, int]) -> bytes:
    """A host that holds the small memory, from which another page of 4 KBytes is left out."""
    return pages(second_stage, HOST >> 12) + SMALL


EPT_TABLES = {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007} | {
    0x4000 + 8 * page: HOST + (page << 12) | 0x37 for page in range(7)
}
NPT_TABLES = {a: e & ~0x30 for a, e in EPT_TABLES.items()}
LED_ON = [
    "0x0000000000000000-0x0000000000000fff  1 x 4 KBytes   0x0000000105000  rwx user       A",
    "0x0000000000001000-0x0000000000001fff  1 x 4 KBytes   0x0000000106000  r-- user",
    "5 pages in 2 lines; 1 malformed entries; 1 absent tables; 2,105,344 bytes without memory",
]


@pytest.mark.parametrize(
    ("tables", "options"),
    [
        (EPT_TABLES, ("--eptp", "0x101e")),
        (EPT_TABLES, ("--eptp", "0x105e")),
        (NPT_TABLES, ("--ncr3", "0x1000")),
    ],
    ids=["EPT", "EPT with accessed and dirty flags", "nested paging"],
)
def test_what_a_guest_maps_is_led_on_through_its_second_stage(
    vapama: Vapama, folder: Path, tables: dict[int, int], options: tuple[str, ...]
) -> None:
    (folder / "host").write_bytes(host(tables))
    result = vapama("snapshot", "maps", "host", "--cr3", "0x1000", *options)
    assert (result.status, result.err) == (0, "")
    assert result.out.splitlines()[1:] == LED_ON


def test_an_address_is_translated_through_both_stages(vapama: Vapama, folder: Path) -> None:
    (folder / "host").write_bytes(host({**EPT_TABLES, 0x4000 + 8 * 6: HOST + 0x6000 | 0x34}))
    options = ("--cr3", "0x1000", "--eptp", "0x101e")
    asked = ("0x123", "0x1000", "0x6000", "0x3000")
    result = vapama("snapshot", "translate", "host", *asked, *options)
    assert (result.status, result.err) == (0, "")
    said = [line.split("  ", 1)[1] for line in result.out.splitlines()]
    assert said[0] == "translated to 0x105123, a page of 4 KBytes"
    assert said[1].startswith("EPT violation at 0x6000")
    assert said[2].startswith("#PF, error code 0x0")
    assert "EPT violation at 0x8000" in said[3]


def test_a_second_stage_takes_rights_away_and_splits_pages(vapama: Vapama, folder: Path) -> None:
    """The guest's 2-MByte page goes to two places: 4 KBytes to read, and the rest nowhere."""
    tables = {**EPT_TABLES, 0x4000 + 8 * 5: HOST + 0x5000 | 0x35, 0x3010: 0x5007, 0x5000: 0x9031}
    (folder / "host").write_bytes(host(tables))
    result = vapama("snapshot", "maps", "host", "--cr3", "0x1000", "--eptp", "0x101e")
    shown = [line.split() for line in result.out.splitlines()[1:-1]]
    assert [(words[0].split("-")[0], *words[5:7]) for words in shown] == [
        ("0x0000000000000000", "0x0000000105000", "r-x"),
        ("0x0000000000001000", "0x0000000106000", "r--"),
        ("0x0000000000200000", "0x0000000009000", "r--"),
    ]


def test_tables_that_the_second_stage_forbids_are_absent(vapama: Vapama, folder: Path) -> None:
    tables = {**EPT_TABLES, 0x4000 + 8 * 3: HOST + 0x3000 | 0x34}
    (folder / "host").write_bytes(host(tables))
    result = vapama("snapshot", "maps", "host", "--cr3", "0x1000", "--eptp", "0x101e")
    assert result.out.splitlines()[-1] == "0 pages in 0 lines; 1 malformed entries; 2 absent tables"


def test_a_second_stage_is_listed_by_itself(vapama: Vapama, folder: Path) -> None:
    (folder / "host").write_bytes(host(EPT_TABLES))
    result = vapama("snapshot", "maps", "host", "--eptp", "0x101e", "--gpa", "--merge")
    assert result.out.splitlines() == [
        "host: 4-level EPT, EPTP 0x101e",
        "0x0000000000000000-0x0000000000006fff  7 x 4 KBytes   0x0000000100000  rwx WB PAT",
        "7 pages in 1 lines",
    ]
    options = ("--eptp", "0x101e", "--gpa", "--write")
    asked = vapama("snapshot", "translate", "host", "0x1234", "0x9000", *options)
    first, second = asked.out.splitlines()
    assert first == "0x0000000000001234  translated to 0x101234, a page of 4 KBytes"
    assert second.startswith("0x0000000000009000  EPT violation at 0x9000")


def test_a_second_stage_too_large_to_list_is_told(vapama: Vapama, folder: Path) -> None:
    (folder / "cycle").write_bytes(pages({0x1000 + 8 * k: 0x1007 for k in range(512)}, 2))
    options = ("--cr3", "0x1000", "--eptp", "0x101e", "--most-runs", "1000")
    result = vapama("snapshot", "maps", "cycle", *options)
    require_one_line(result, "the second stage maps more than --most-runs allows")


@pytest.mark.parametrize(
    ("entries", "options", "line"),
    [
        (
            {0x1000: 0x2007, 0x1004: 0x40_0087, 0x2000: 0x3027},
            ("--cr4", "0x10", "--efer", "0"),
            "0x0000000000400000-0x00000000007fffff  1 x 4 MBytes   0x0000000400000  rwx user",
        ),
        (
            {0x1020: 0x2001, 0x2000: 0x20_0087 | XD},
            ("--cr4", "0x20", "--efer", "0x800"),
            "0x0000000000000000-0x00000000001fffff  1 x 2 MBytes   0x0000000200000  rw- user",
        ),
    ],
    ids=["32-bit", "PAE"],
)
def test_a_guest_in_another_mode_is_listed(
    vapama: Vapama, folder: Path, entries: dict[int, int], options: tuple[str, ...], line: str
) -> None:
    image = bytearray(0x3000)
    for address, entry in entries.items():
        size = 4 if "0x10" in options else 8
        image[address : address + size] = entry.to_bytes(size, "little")
    (folder / "image").write_bytes(image)
    cr3 = "0x1000" if "0x10" in options else "0x1020"
    result = vapama("snapshot", "maps", "image", "--cr3", cr3, *options)
    assert result.status == 0, result.err
    assert line in result.out.splitlines()


# LARGE AND HOSTILE


def command(folder: Path, *arguments: str, given: str = "", **options: Any) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "vapama.cli", "snapshot", *arguments],
        cwd=folder,
        input=given,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_a_sparse_image_of_100_gbytes_takes_little_memory(folder: Path) -> None:
    base = 90 << 30
    moved = np.frombuffer(SMALL, dtype="<u8").copy()
    tables = (moved & np.uint64(1) == 1) & (np.arange(len(moved)) < 4 * 512)
    large = moved & np.uint64(0x80) != 0
    moved[tables & ~large] += np.uint64(base)
    with (folder / "huge").open("wb") as file:
        file.truncate(100 << 30)
        file.seek(base)
        file.write(moved.tobytes())
    if (folder / "huge").stat().st_blocks > 1 << 20:
        pytest.skip("the file system here has no sparse files")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = command(folder, "maps", "huge", "--cr3", hex(base + 0x1000))
    assert done.returncode == 0, done.stderr
    assert "5 pages in 5 lines" in done.stdout
    # In KBytes, of this child or the largest before it: numba alone takes some 200,000.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < max(before, 600_000)


def test_tables_that_contain_themselves_end_at_the_limit(vapama: Vapama, folder: Path) -> None:
    (folder / "cycle").write_bytes(pages({0x1000 + 8 * k: 0x1007 for k in range(512)}, 2))
    options = ("--cr3", "0x1000", "--cr4", "0x1020", "--most-runs", "1000")
    result = vapama("snapshot", "maps", "cycle", *options)
    assert result.status == 3
    assert result.out.splitlines()[-1] == "1,000 of 35,184,372,088,832 pages in 1,000 lines"
    assert result.err == "vapama: stopped at --most-runs 1,000: the list is not whole\n"
    result = vapama("snapshot", "maps", "cycle", *options, "--most-reads", "1024", "--json")
    report = json.loads(result.out)
    assert (result.status, report["complete"], report["stopped"]) == (3, False, "most-reads")
    assert report["pages_in_all"] is None


def test_an_interrupt_ends_a_long_list_cleanly(folder: Path) -> None:
    (folder / "cycle").write_bytes(pages({0x1000 + 8 * k: 0x1007 for k in range(512)}, 2))
    limit = ("--most-runs", str(1 << 40))
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vapama.cli",
            "snapshot",
            "maps",
            "cycle",
            "--cr3",
            "0x1000",
            *limit,
        ],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(3)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "Traceback" not in said


def test_a_reader_that_has_read_enough_ends_the_list(folder: Path) -> None:
    script = (
        f"{sys.executable} -m vapama.cli snapshot maps guest | head -1; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[1:] == ["141"]
    assert done.stderr == ""


# WHAT QEMU WRITES


def test_a_dump_by_qemu_is_read(vapama: Vapama, folder: Path) -> None:
    """A machine that never ran, with the small memory loaded at 1 MByte."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    base = 1 << 20
    moved = np.frombuffer(SMALL, dtype="<u8").copy()
    for address in (0x1000, 0x2000, 0x3000):
        moved[address >> 3] += np.uint64(base)
    (folder / "memory").write_bytes(moved.tobytes())
    monitor = "dump-guest-memory core\nquit\n"
    loader = f"loader,file=memory,addr={base:#x},force-raw=on"
    options = ["-S", "-m", "16", "-display", "none", "-nodefaults", "-monitor", "stdio"]
    options += ["-accel", "tcg", "-device"]
    done = subprocess.run(
        [qemu, *options, loader],
        input=monitor,
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        timeout=60,
    )
    assert (folder / "core").exists(), done.stderr
    # The value at reset (SDM Vol. 3A, 10.1.1).
    assert [state["cr0"] for state in open_image(folder / "core").registers] == [0x6000_0010]
    result = vapama("snapshot", "maps", "core", *LONG_MODE, "--cr3", hex(base + 0x1000))
    assert result.status == 0, result.err
    assert [line[38:70] for line in result.out.splitlines()[1:6]] == [
        line[38:70] for line in SHOWN[:5]
    ]


# BAD INPUT


def require_one_line(result: Any, says: str) -> None:
    assert "Traceback" not in result.err
    assert result.err.startswith("vapama: "), result
    assert result.err.count("\n") == 1, result
    assert says in result.err
    assert (result.status, result.out) == (2, "")


WHOLE = elf({0: SMALL}, notes=NOTES)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the image is empty"),
        (b"\0" * 4095, "the image holds no whole page of memory"),
        (b"KDUMP   " + bytes(8192), "a kdump-compressed dump: dump again as ELF"),
        (b"makedumpfile" + bytes(8192), "a flattened dump"),
        (b"PAGEDU64" + bytes(8192), "a Windows crash dump"),
        (b"EMiL" + bytes(8192), "a LiME dump"),
        (b"QFI\xfb" + bytes(8192), "a qcow2 image"),
        (b"\x1f\x8b" + bytes(8192), "compressed by gzip"),
        (b"PK\x03\x04" + bytes(8192), "not a whole .npz image"),
        (WHOLE[:40], "not a whole ELF core: its headers are cut short"),
        (WHOLE[:90], "not a whole ELF core: its headers are cut short"),
        (WHOLE[:-1], "ends at byte"),
        (elf({0: SMALL}, type=2), "an ELF file, but no core of an x86 machine"),
        (elf({0: SMALL}, machine=183), "an ELF file, but no core of an x86 machine"),
        (elf({0: SMALL}, order=2), "an ELF file of another kind than little-endian"),
        (elf({}), "an ELF core that holds no memory"),
        (elf({0x10: SMALL[:PAGE]}), "holds no whole page"),
        (elf({0: SMALL, 0x1000: SMALL}), "two segments hold physical address 0x1000"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("what", ["maps", "translate"])
def test_an_image_that_cannot_be_read_is_refused(
    vapama: Vapama, folder: Path, what: str, content: bytes, says: str
) -> None:
    (folder / "image").write_bytes(content)
    addresses = ["0x0"] if what == "translate" else []
    require_one_line(vapama("snapshot", what, "image", *addresses, "--cr3", "0x1000"), says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("maps", "none"), "none: cannot read the image: No such file or directory"),
        (("maps", "."), ".: cannot read the image: it is a folder"),
        (("maps", "/dev/null"), "/dev/null: cannot read the image: give a file"),
        (("maps", "image"), "image does not say where the tables are: give --cr3"),
        (("maps", "image", "--cr3", "soon"), "soon: not a 64-bit number"),
        (("maps", "image", "--cr3", "-1"), "-1: not a 64-bit number"),
        (("maps", "image", "--cr3", "0x100000"), "does not hold the root table at 0x100000"),
        (("maps", "image", "--cr3", "0x1000", "--maxphyaddr", "64"), "MAXPHYADDR is 32 to 52"),
        (("maps", "image", "--cr3", "0x1000", "--efer", "0x400"), "EFER.LMA is EFER.LME"),
        (("maps", "image", "--cr3", "0x1000", "--format", "zip"), "give one of raw, elf, npz"),
        (("maps", "image", "--cr3", "0x1000", "--processor", "1"), "has registers of 0"),
        (("maps", "image", "--cr3", "0x1000", "--cr0", "1", "--efer", "0"), "paging is off"),
        (("maps", "image", "--eptp", "0x101e", "--ncr3", "0x1000"), "--eptp or --ncr3, not both"),
        (("maps", "image", "--cr3", "0x1000", "--gpa"), "give --eptp or --ncr3"),
        (("maps", "image", "--cr3", "0", "--eptp", "0x1000"), "the second stage: EPTP bits 5:3"),
        (("maps", "image", "--cr3", "0", "--eptp", "0x90001e"), "check --eptp"),
        (("translate", "image", "x", "--cr3", "0x1000"), "x: not a 64-bit number"),
        (("translate", "image", "0", "--cr3", "0x1000", "--write", "--fetch"), "not both"),
        (("maps", "image", "--cr3", "0x1000", "--format", "elf"), "an ELF file of another kind"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_value_that_makes_no_sense_is_refused(
    vapama: Vapama, folder: Path, arguments: tuple[str, ...], says: str
) -> None:
    (folder / "image").write_bytes(SMALL)
    require_one_line(vapama("snapshot", *arguments), says)


def test_arrays_that_would_fill_memory_are_refused(
    vapama: Vapama, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vapama.snapshot.images.LARGEST_ARRAYS", 1 << 20)
    require_one_line(vapama("snapshot", "maps", str(SHIPPED)), "arrays of 25,1")


def test_memory_can_be_read_as_raw_whatever_it_begins_with(vapama: Vapama, folder: Path) -> None:
    (folder / "image").write_bytes(b"KDUMP   " + SMALL[8:])
    options = ("--cr3", "0x1000", "--format", "raw")
    assert vapama("snapshot", "maps", "image", *options).out.splitlines()[1:] == SHOWN
