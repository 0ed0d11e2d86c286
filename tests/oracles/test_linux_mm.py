"""The running kernel agrees with the models, and gets its knobs back, whatever happens."""

import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vapama.bugs.mistakes import parse
from vapama.fuzz.random_engine import Search
from vapama.oracles.linux_mm import hugetlb, ksm, thp
from vapama.oracles.linux_mm.knobs import Knobs, Unavailable, read
from vapama.runs import Guarded, shrink
from vapama.spec.invariants import hugepages as pool_programs
from vapama.spec.invariants import ksm as ksm_programs
from vapama.spec.nondet import load_invariants

FACTORIES: dict[str, Any] = {
    "linux-ksm": ksm.LinuxKsm,
    "linux-hugetlb": hugetlb.LinuxHugetlb,
    "linux-thp": thp.LinuxThp,
}
PROGRAMS = {
    "linux-ksm": "a_scan_merges_and_counts_as_the_model_says",
    "linux-hugetlb": "a_pool_is_kept_as_the_model_says",
    "linux-thp": "a_block_is_huge_or_small_as_the_model_says",
}


@contextmanager
def driven(name: str) -> Iterator[Any]:
    """The running kernel, if it may be driven: only where that was asked for."""
    if not os.environ.get("VAPAMA_DRIVE_LINUX"):
        pytest.skip("it changes the machine's knobs: set VAPAMA_DRIVE_LINUX=1 to allow it")
    try:
        subject = FACTORIES[name]()
        yield subject
    except Unavailable as reason:
        pytest.skip(str(reason))
    subject.close()


@pytest.fixture(params=FACTORIES)
def kernel(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """The same, of each kind."""
    with driven(request.param) as subject:
        yield request.param, subject


def test_programs_agree_with_the_kernel_after_every_step(kernel: tuple[str, Any]) -> None:
    name, subject = kernel
    invariant, guarded = load_invariants()[PROGRAMS[name]], Guarded(name, subject)
    search = Search(invariant, guarded, seed=0)
    try:
        search.batch(40)
    except Unavailable as reason:
        pytest.skip(str(reason))
    # Others may disturb the kernel: what cannot be shown again is no disagreement.
    assert search.failed is None or shrink(invariant, guarded, search.failed[1], "random") is None


MODELS = {
    "ksm": ("linux-ksm", ksm_programs, ("Ksm",)),
    "hugetlb": ("linux-hugetlb", pool_programs, ("Hugetlb", "Pool", "Refused")),
    "thp": ("linux-thp", pool_programs, ("Block",)),
}
"""By the first word of a mistake's name: the kernel to judge, and what programs take of a model."""
MISTAKES = parse(Path(__file__).with_name("models.mistakes").read_text())


@pytest.mark.parametrize("name", MISTAKES)
def test_the_kernel_shows_a_mistake_in_a_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, programs, taken = MODELS[name.partition("-")[0]]
    model = types.ModuleType("model")
    exec(MISTAKES[name].source(), model.__dict__)
    for what in taken:
        monkeypatch.setattr(programs, what, getattr(model, what))
    with driven(subject) as kernel:
        search = Search(load_invariants()[PROGRAMS[subject]], Guarded(subject, kernel), seed=0)
        while search.failed is None and search.executions < 600:
            search.batch(4)
    assert search.failed is not None


HOLDER = """
import sys, time
from pathlib import Path
from vapama.oracles.linux_mm.knobs import Knobs
knobs = Knobs(record=Path(sys.argv[2]))
knobs.set(sys.argv[1], 42)
knobs.set(sys.argv[1], 43)
print("changed", flush=True)
time.sleep(60)
"""


@contextmanager
def holder(knob: Path, record: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has changed a knob."""
    command = [sys.executable, "-c", HOLDER, str(knob), str(record)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "changed\n"
        yield process


def test_a_killed_run_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    knob, record = tmp_path / "knob", tmp_path / "record.json"
    knob.write_text("7\n")
    with holder(knob, record) as process:
        assert read(str(knob)) == "43"
        with pytest.raises(Unavailable, match="another process"):
            Knobs(record=record)
        process.kill()
    assert (read(str(knob)), record.exists()) == ("43", True)
    next_one = Knobs(record=record)
    assert (read(str(knob)), record.exists()) == ("7", False)
    next_one.close()


def test_a_terminated_run_cleans_up_itself(tmp_path: Path) -> None:
    knob, record = tmp_path / "knob", tmp_path / "record.json"
    knob.write_text("a [b] c\n")
    with holder(knob, record) as process:
        process.terminate()
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert (knob.read_text(), record.exists()) == ("b", False)


def test_ksm_of_a_killed_run_is_restored(tmp_path: Path, kernel: tuple[str, Any]) -> None:
    name, _ = kernel
    if name != "linux-ksm":
        pytest.skip("KSM's knobs stand for all")
    names = ("run", "sleep_millisecs", "pages_to_scan", "max_page_sharing", "smart_scan")
    before = {knob: read(ksm.FOLDER + knob) for knob in names}
    program = (
        "import time\nfrom vapama.oracles.linux_mm.ksm import LinuxKsm\n"
        "LinuxKsm().ksm(2, 4, 1, 1)\nprint('changed', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "changed\n"
        assert read(ksm.FOLDER + "sleep_millisecs") != before["sleep_millisecs"]
        process.kill()
    time.sleep(0.2)
    knobs = Knobs()
    assert {knob: read(ksm.FOLDER + knob) for knob in names} == before
    knobs.close()
