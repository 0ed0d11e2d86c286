"""A subject in any language: a process that is asked, and answers, in JSON lines.

A question has the fields of a test vector (`vapama.vectors.form`): the control state, the access,
and the memory that the walk may read. docs/how-to/check-another-language.md tells the protocol.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

import msgspec

from vapama.case import BadInput
from vapama.spec import subject as subjects
from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import Cpu
from vapama.spec.memory import Sparse
from vapama.spec.outcomes import Outcome
from vapama.spec.stage import Stage
from vapama.spec.subject import Capabilities, NotCovered
from vapama.wire import OutcomeJson, outcome_of, state_to_json

GREETING = b'{"format":"vapama-process","version":1}\n'
GREETING_SECONDS = 20.0
LONGEST = 1 << 20
"""How many bytes an answer may have."""
OBSERVED = sorted(
    {subjects.PA, subjects.LEVEL, subjects.ERROR_CODE, subjects.UPDATES, subjects.EFFECTS}
    | {subjects.SECOND_STAGE, "translate_nested"}
)
"""What a process may say that it observes."""


class Greeting(msgspec.Struct, forbid_unknown_fields=True):
    """What a process says of itself."""

    observes: tuple[str, ...]


class NotCoveredJson(msgspec.Struct, forbid_unknown_fields=True):
    """The answer of a process to a question that it cannot be asked."""

    not_covered: str


class ProcessFailed(Exception):
    """The process gave no answer, or one that is none."""


class Process:
    """The subject that a command is. It is started again when it has died, or did not answer.

    Raises `BadInput` if it cannot be started, or does not greet as it should.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name, self.command = name, list(command)
        if not self.command:
            raise BadInput(f"--subject {name}: give a command, as in process:./mmu")
        self._child: subprocess.Popen[bytes] | None = None
        self._end: Any = None
        greeting = self._greeted()
        unknown = [what for what in greeting.observes if what not in OBSERVED]
        if unknown:
            self.close()
            raise BadInput(
                f"--subject {name}: it observes {unknown[0]!r}, "
                f"and can only observe {', '.join(OBSERVED)}"
            )
        self.capabilities = Capabilities(observes=frozenset(greeting.observes), preload=True)

    def translate(self, cpu: Cpu, memory: Sparse, access: Access) -> Outcome:
        """The outcome of the process."""
        return self._ask({"cpu": state_to_json(cpu), "access": state_to_json(access)}, memory)

    def second_stage(self, stage: Stage, memory: Sparse, access: GuestPhysicalAccess) -> Outcome:
        """Its outcome for a guest-physical address."""
        question = {
            type(stage).__name__.lower(): state_to_json(stage),
            "guest_physical_access": state_to_json(access),
        }
        return self._ask(question, memory)

    def translate_nested(self, cpu: Cpu, stage: Stage, memory: Sparse, access: Access) -> Outcome:
        """Its outcome through both stages."""
        question = {
            "cpu": state_to_json(cpu),
            type(stage).__name__.lower(): state_to_json(stage),
            "access": state_to_json(access),
        }
        return self._ask(question, memory)

    def close(self) -> None:
        """End the process."""
        if self._end is not None:
            self._end()
        self._child = None

    def _ask(self, question: dict[str, Any], memory: Sparse) -> Outcome:
        question["memory"] = {
            "limit": hex(memory.limit),
            "entries": {hex(address): hex(entry) for address, entry in memory.touched.items()},
        }
        if self._child is None:
            self._start()
        line = self._exchange(msgspec.json.encode(question) + b"\n")
        try:
            if b'"not_covered"' in line:
                raise NotCovered(msgspec.json.decode(line, type=NotCoveredJson).not_covered)
            return outcome_of(msgspec.json.decode(line, type=OutcomeJson))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            said = line.decode(errors="replace").strip()
            raise ProcessFailed(f"it answered {said:.100}: {error}") from None

    def _exchange(self, line: bytes) -> bytes:
        assert self._child is not None
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(line)
            self._child.stdin.flush()
            answer = self._child.stdout.readline(LONGEST)
        except OSError:
            answer = b""
        except BaseException:
            # It did not answer in time. What it may answer yet is to no question any more.
            self.close()
            raise
        if not answer.endswith(b"\n"):
            why = self._death()
            self.close()
            raise ProcessFailed(why)
        return answer

    def _death(self) -> str:
        assert self._child is not None
        try:
            status = self._child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the process closed its output"
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        self._said.seek(0)
        said = self._said.read()[-4096:].decode(errors="replace").strip().splitlines()
        return f"the process ended {how}" + (f": {said[-1]:.200}" if said else "")

    def _start(self) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process)
        child = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            start_new_session=True,
        )
        self._child = child
        self._end = weakref.finalize(self, _end, child, self._said)
        assert child.stdout is not None
        assert child.stdin is not None
        # A process that has ended already may have said something first.
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(GREETING)
            child.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            if not selector.select(GREETING_SECONDS):
                self.close()
                raise ProcessFailed(f"it did not greet within {GREETING_SECONDS:g} s")
        self._greeting = child.stdout.readline()
        if not self._greeting.endswith(b"\n"):
            why = self._death()
            self.close()
            raise ProcessFailed(why)

    def _greeted(self) -> Greeting:
        name = f"--subject {self.name}"
        try:
            self._start()
            return msgspec.json.decode(self._greeting, type=Greeting)
        except OSError as error:
            raise BadInput(f"{name}: cannot start it: {error.strerror or error}") from None
        except ProcessFailed as error:
            raise BadInput(f"{name}: {error}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.close()
            raise BadInput(
                f'{name}: it greets otherwise than by a line such as {{"observes":["pa"]}}: {error}'
            ) from None


def _end(child: "subprocess.Popen[bytes]", said: Any) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    for stream in (child.stdin, child.stdout, said):
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()
