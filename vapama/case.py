"""Cases: one run of an invariant as its ordered, named draws, in JSON.

Every engine writes its counterexamples as Cases and replays those of the others. A Case dropped
into tests/regressions/ is a test.
"""

import zlib
from pathlib import Path

import msgspec

FORMAT, VERSION = "vapama-case", 1
CASES = Path("vapama-cases")
"""Where counterexamples are saved."""


class BadInput(Exception):
    """Something given to vapama cannot be used: one line that says what, where and what to do."""


class Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The draws of one run, in order: names and values (an index, for a draw among options)."""

    format: str = FORMAT
    version: int = VERSION
    invariant: str
    subject: str
    engine: str
    failure: str = ""
    draws: tuple[tuple[str, str], ...]
    """Names and values, the values in hexadecimal."""

    def values(self) -> dict[str, int]:
        """The draws by name."""
        return {name: int(value, 16) for name, value in self.draws}

    def to_json(self) -> bytes:
        """The Case as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    def save(self, directory: Path) -> Path:
        """Write the Case under `directory`, named for its invariant and draws; returns where."""
        directory.mkdir(parents=True, exist_ok=True)
        digest = zlib.crc32(msgspec.json.encode((self.subject, self.draws)))
        path = directory / f"{self.invariant}-{digest:08x}.json"
        path.write_bytes(self.to_json())
        return path


def make_case(
    invariant: str, subject: str, engine: str, failure: str, draws: list[tuple[str, int]]
) -> Case:
    """A Case of these draws."""
    return Case(
        invariant=invariant,
        subject=subject,
        engine=engine,
        failure=failure,
        draws=tuple((name, hex(value)) for name, value in draws),
    )


def load_case(path: Path) -> Case:
    """Read a Case. Raises `BadInput` if it is not one that this version can read."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot read the Case: {error.strerror}") from None
    try:
        head = msgspec.json.decode(raw, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not a Case: {error}") from None
    if head.get("format") != FORMAT:
        raise BadInput(f'{path}: not a Case: it needs "format": "{FORMAT}"')
    version = head.get("version")
    if version != VERSION:
        raise BadInput(
            f"{path}: a Case of version {version}; this vapama reads version {VERSION}: "
            "replay it with the vapama that wrote it, or a newer one"
        )
    try:
        case = msgspec.json.decode(raw, type=Case)
        case.values()
    except (msgspec.ValidationError, ValueError) as error:
        raise BadInput(f"{path}: not a Case: {error}") from None
    return case
