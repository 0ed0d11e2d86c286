"""The command line as a process: interrupts, `python -O`, and what it leaves behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vapama.fuzz import atheris_engine

VAPAMA = (sys.executable, "-m", "vapama.cli")
PATIENCE = 60.0
"""Seconds in which what has to happen has happened, however slow the machine."""


def children(pid: int) -> set[int]:
    """The processes that a process has started, and those that they have."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        found = {int(c) for task in tasks for c in (task / "children").read_text().split()}
    except OSError:
        return set()
    return found.union(*map(children, found)) if found else found


def alive(pid: int) -> bool:
    """Whether a process runs: a zombie, which nobody has waited for, does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("engine", "processes"), [("random", 1), ("hypothesis", 1), ("atheris", 2)]
)
def test_an_interrupt_ends_all_processes_promptly_and_quietly(
    folder: Path, engine: str, processes: int
) -> None:
    if engine == "atheris" and atheris_engine.unavailable():
        pytest.skip(atheris_engine.unavailable())
    fuzzing = subprocess.Popen(
        [*VAPAMA, "fuzz", "--seconds", "600", "--engine", engine],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with fuzzing:
        try:
            started: set[int] = set()
            deadline = time.monotonic() + PATIENCE
            while len(started) < processes and time.monotonic() < deadline:
                time.sleep(0.05)
                started = children(fuzzing.pid)
            assert len(started) == processes
            time.sleep(1.0)
            fuzzing.send_signal(signal.SIGINT)
            out, err = fuzzing.communicate(timeout=PATIENCE)
        finally:
            fuzzing.kill()
    while any(map(alive, started)) and time.monotonic() < deadline + PATIENCE:
        time.sleep(0.05)
    assert not any(map(alive, started))
    assert "Traceback" not in err
    assert fuzzing.returncode == 130
    assert out == ""
    assert err in ("", "vapama: interrupted\n")


def test_the_command_is_installed(folder: Path) -> None:
    command = Path(sys.executable).parent / "vapama"
    told = subprocess.check_output([command, "--help"], text=True)
    for name in ("check", "list", "prove", "fuzz", "replay", "explain"):
        assert f"  {name} " in told
    codes = "Exit status: 0 all held, 1 a counterexample, 2 bad input or usage, 3 undecided."
    assert codes in " ".join(told.split())


@pytest.mark.parametrize("option", ["-O", "-OO"])
def test_python_without_asserts_is_refused(folder: Path, option: str) -> None:
    result = subprocess.run(
        [sys.executable, option, *VAPAMA[1:], "list"], capture_output=True, text=True, check=False
    )
    assert result.stdout == ""
    assert result.stderr == "vapama: run Python without -O: the invariants are asserts\n"
    assert result.returncode == 2


@pytest.mark.parametrize("arguments", [(), ("--help",), ("check", "--help")])
def test_help_is_quick_to_import(folder: Path, arguments: tuple[str, ...]) -> None:
    slow = "numba", "z3", "hypothesis", "unicorn", "atheris"
    script = (
        "import sys; from vapama import cli; sys.argv[1:] = " + repr(list(arguments)) + "\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        f"print('imported', [m for m in {slow!r} if m in sys.modules])"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert told.stdout.splitlines()[-1] == "imported []"
    assert os.listdir(folder) == ["mmus.py"]
