"""The command line run in this process, in a folder of its own, with subjects to give it."""

import gc
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from vapama import cli

SUBJECTS = '''
"""Subjects of somebody else's: one right, the others wrong in all ways."""

import os
import time

from vapama.spec.outcomes import PageFault, Translated
from vapama.spec.paging import translate
from vapama.spec.subject import ERROR_CODE, LEVEL, PA, Capabilities


class Right:
    capabilities = Capabilities(observes=frozenset({PA, LEVEL, ERROR_CODE}))

    def translate(self, cpu, memory, access):
        return translate(cpu, memory, access)


class Wrong(Right):
    def translate(self, cpu, memory, access):
        outcome = translate(cpu, memory, access)
        if isinstance(outcome, Translated) and access.write:
            return Translated(outcome.pa ^ 1, outcome.level, outcome.updates)
        return outcome


class Raises(Right):
    def translate(self, cpu, memory, access):
        raise ZeroDivisionError("the walk divides by nothing\\nand says more")


class ReturnsNone(Right):
    def translate(self, cpu, memory, access):
        return None


class ReturnsText(Right):
    def translate(self, cpu, memory, access):
        return "0x1000"


class Sleeps(Right):
    def translate(self, cpu, memory, access):
        time.sleep(1000)


class Spins(Right):
    def translate(self, cpu, memory, access):
        while True:
            pass


class Exits(Right):
    def translate(self, cpu, memory, access):
        raise SystemExit(0)


class Dies(Right):
    def translate(self, cpu, memory, access):
        os.kill(os.getpid(), 9)


class Chatters(Right):
    """Writes where its worker tells its events, as a library in C or a child process would."""

    def translate(self, cpu, memory, access):
        os.write(1, b"an entry was read\\n")
        return translate(cpu, memory, access)


class Greets(Right):
    def __init__(self):
        print("my MMU, version 1")


class NoCapabilities:
    def translate(self, cpu, memory, access):
        return None


class NoTranslate:
    capabilities = Right.capabilities


class Unbuildable(Right):
    def __init__(self):
        raise OSError("no such\\ndevice")


number = 5
'''


class Result(NamedTuple):
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str


Vapama = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: empty but for `mmus.py`, a module of subjects."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mmus", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "mmus.py").write_text(SUBJECTS)
    return tmp_path


@pytest.fixture
def vapama(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Vapama:
    """Runs `vapama` with these arguments in the folder."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["vapama", *map(str, arguments)])
        capfd.readouterr()
        status: object = 0
        # What a command leaves open is looked at by a test of its own.
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            try:
                cli.main()
            except SystemExit as ended:
                status = ended.code or 0
            gc.collect()
        assert isinstance(status, int), status
        out, err = capfd.readouterr()
        return Result(status, out, err)

    return run
