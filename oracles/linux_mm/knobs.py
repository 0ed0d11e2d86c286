"""Knobs of the running kernel: recorded on disk before they are changed, and always restored.

They are restored on exit and on SIGTERM; after SIGKILL the record is still there, and whoever comes
next restores from it before anything else. One process at a time may hold them.
"""

import atexit
import contextlib
import fcntl
import json
import os
import signal
from pathlib import Path
from typing import Any, NoReturn

from platformdirs import user_state_path

RECORD = user_state_path("vapama") / "linux-mm-knobs.json"


class Unavailable(BaseException):
    """The kernel cannot be driven here; the reason.

    Not an `Exception`, so that no engine takes it for something that the kernel did.
    """


def written(path: str, value: str) -> None:
    """Write a value to a knob. Raises `OSError`."""
    with open(path, "w") as knob:
        knob.write(value)


def read(path: str) -> str:
    """What a knob says; of ``a [b] c``, the choice in brackets."""
    text = Path(path).read_text().strip()
    return text[text.index("[") + 1 : text.index("]")] if "[" in text else text


class Knobs:
    """The right to change knobs. `first` are written before the others are restored."""

    def __init__(self, first: tuple[tuple[str, str], ...] = (), record: Path = RECORD) -> None:
        """Take the lock, and restore what a killed holder left. Raises `Unavailable`."""
        self.record, self.first = record, first
        self.saved: dict[str, str] = {}
        record.parent.mkdir(parents=True, exist_ok=True)
        self.lock: Any = open(record.with_suffix(".lock"), "w")  # noqa: SIM115 (held while we live)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise Unavailable("another process drives the kernel's memory management") from None
        self.recover()
        atexit.register(self.restore)
        signal.signal(signal.SIGTERM, _terminated)

    def recover(self) -> None:
        """Restore what the record on disk says, if there is one."""
        if self.record.exists():
            left = json.loads(self.record.read_text())
            self.first = tuple(map(tuple, left["first"])) or self.first
            self.saved = left["saved"]
            self.restore()

    def set(self, path: str, value: str | int) -> None:
        """Change a knob; its original is on disk before. Raises `OSError`."""
        if path not in self.saved:
            self.saved[path] = read(path)
            beside = self.record.with_suffix(".new")
            with beside.open("w") as new:
                json.dump({"first": self.first, "saved": self.saved}, new)
                new.flush()
                os.fsync(new.fileno())
            beside.replace(self.record)
        written(path, str(value))

    def close(self) -> None:
        """Put every knob back, and let others have them."""
        self.restore()
        atexit.unregister(self.restore)
        self.lock.close()

    def restore(self) -> None:
        """Put every knob back, the first that was changed last, and drop the record."""
        if self.saved:
            for path, value in self.first:
                with contextlib.suppress(OSError):
                    written(path, value)
            for path, value in reversed(self.saved.items()):
                written(path, value)
        self.saved = {}
        self.record.unlink(missing_ok=True)


def _terminated(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)
