"""An emulator as a process: started, watched, and stopped for certain, with a folder of its own."""

import shutil
import subprocess
import tempfile
import time
import weakref
from abc import ABC
from collections.abc import Mapping
from pathlib import Path


class MachineDied(Exception):
    """The machine ended, or gave no answer in time, with a batch under way."""


class CannotStart(Exception):
    """The machine could not be started; says why."""


class Emulator(ABC):
    """A process, and a folder that is removed with the object."""

    name: str

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="vapama-")
        self.folder = Path(self._folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer = weakref.finalize(self, _remove, self._folder)

    def launch(self, command: list[str]) -> None:
        """Run a command in the folder, in place of one that still runs. Raises `CannotStart`."""
        self.end()
        if shutil.which(command[0]) is None:
            raise CannotStart(f"{command[0]} is not installed")
        # Linux ends it with us, however we end.
        follow = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        log = self.folder / "log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*follow, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
            )
        self._killer = weakref.finalize(self, _kill, self._process)

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process is not None
        return self._process.pid

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process is not None and self._process.poll() is None

    def end(self) -> None:
        """Stop it for certain."""
        if self._process is not None:
            self._killer()
            self._process = None

    def require_starting(self, deadline: float) -> None:
        """Raise `CannotStart` if it has died, or takes too long."""
        if self.alive() and time.monotonic() < deadline:
            return
        why = "it ended" if not self.alive() else "the guest did not boot in time"
        raise CannotStart(f"{self.name}: {why}: {self.last_words() or 'it said nothing'}")

    def last_words(self) -> str:
        """The last line that it printed."""
        lines = (self.folder / "log").read_text(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


def assembled(source: Path, constants: Mapping[str, int]) -> bytes:
    """A source of ours, assembled with these constants. Raises `CannotStart`."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "assembled"
        built(["nasm", "-f", "bin", "-o", str(target), *defined(constants), str(source)])
        return target.read_bytes()


def defined(constants: Mapping[str, int]) -> list[str]:
    """Constants as options of an assembler or compiler."""
    return [f"-D{name}={value:#x}" for name, value in constants.items()]


def built(command: list[str]) -> None:
    """Run a tool that builds something. Raises `CannotStart`."""
    if shutil.which(command[0]) is None:
        raise CannotStart(f"{command[0]} is not installed (apt install {command[0]})")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotStart(f"{command[0]}: {done.stderr.strip()}")


def _kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def _remove(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
