"""``vapama vectors``: test vectors made from the specification, and put to any subject."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console

from vapama.case import BadInput

if TYPE_CHECKING:
    from vapama.vectors.consume import Result
    from vapama.vectors.form import Vector
    from vapama.vectors.questions import Kind

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Test vectors: questions about translation, with the answers that are right.",
)
console = Console(highlight=False, emoji=False)
notes = Console(stderr=True, highlight=False, emoji=False)
SHOWN = 10
"""How many failures are shown; JSON has them all."""


@app.command()
def fill(
    file: Annotated[Path, typer.Argument(help="Where to write them, as JSON lines.")],
    kind: Annotated[
        list[str] | None, typer.Option(help="A kind of question; all of them by default.")
    ] = None,
    random: Annotated[int, typer.Option(min=0, help="Random vectors of each kind besides.")] = 0,
    seed: Annotated[int, typer.Option(help="The seed of what is random.")] = 0,
    mistakes: Annotated[
        bool, typer.Option("--mistakes", help="Add one that tells each seeded mistake.")
    ] = False,
    schema: Annotated[
        Path | None, typer.Option(help="Write the JSON schema of a vector here too.")
    ] = None,
) -> None:
    """Make vectors: a witness of every path of every walk, by Z3."""
    from vapama.vectors import fill as filling
    from vapama.vectors import form
    from vapama.vectors.questions import KINDS

    try:
        kinds = filling.kinds_named(kind or [])
    except LookupError as error:
        known = ", ".join(f"'{name}'" for name in KINDS)
        raise BadInput(f"--kind {error.args[0]}: give one of {known}") from None
    with _written(file) as write, _progress() as show:
        vectors, without = filling.fill(kinds, random, seed, mistakes, show)
        for vector in vectors:
            write(vector.to_json())
    if schema is not None:
        with _written(schema) as write:
            write(form.schema())
    for kind_ in kinds:
        own = [vector for vector in vectors if vector.kind == kind_.name]
        ways = len({vector.path for vector in own})
        console.print(f"{kind_.name}: {len(own):,} vectors, {ways:,} ways to end", markup=False)
    _print_coverage(kinds, vectors)
    for name, why in without.items():
        console.print(f"mistake {name}: {why}", markup=False, soft_wrap=True)


def _print_coverage(kinds: "Sequence[Kind]", vectors: "Sequence[Vector]") -> None:
    """How many of the paths that the symbolic engine enumerates the vectors take."""
    from vapama.vectors import fill as filling

    total = left = 0
    for kind_ in kinds:
        if kind_.symbolic:
            own = [vector for vector in vectors if vector.kind == kind_.name]
            with _progress() as show:
                show(f"{kind_.name}: which paths the vectors take")
                paths = filling.paths_of(kind_)
                total += len(paths)
                left += len(filling.missed(kind_, paths, own))
    if total:
        share = f"{(total - left) / total:.0%}" if left else "100%"
        console.print(f"paths of one stage taken: {total - left:,} of {total:,}, {share}")


@app.command()
def consume(
    file: Annotated[
        Path | None, typer.Argument(help="Vectors; those that come with vapama by default.")
    ] = None,
    subject: Annotated[
        str, typer.Option(help="What to check, as in `vapama check`.")
    ] = "optimized",
    hang: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a result that count as hung.")
    ] = 10,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Put vectors to a subject."""
    from vapama.explain import describe_outcome
    from vapama.subjects import load_subject
    from vapama.vectors.consume import consume as put
    from vapama.vectors.form import SHIPPED, read_vectors

    guarded = load_subject(subject)
    # All of them are read first, so that a malformed one is told before anything else.
    vectors = list(read_vectors(file or SHIPPED))
    if not vectors:
        raise BadInput(f"{file}: there are no vectors in it")

    with _progress() as show:

        def shown(result: "Result") -> None:
            show(f"{result.total:,} of {len(vectors):,} vectors")

        result = put(vectors, guarded, hang, describe_outcome, shown)
    if json:
        _print_json(result, subject)
    else:
        _print(result, subject)
    raise typer.Exit(result.status)


def _print_json(result: "Result", subject: str) -> None:
    content = {
        "format": "vapama-consumed",
        "version": 1,
        "subject": subject,
        "exit_status": result.status,
        "passed": result.passed,
        "failed": [{"id": vector.id, "observed": said} for vector, said in result.failed],
        "skipped": dict(result.skipped),
        "known": dict(result.known),
    }
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")


def _print(result: "Result", subject: str) -> None:
    from vapama.explain import describe_outcome

    for vector, said in result.failed[:SHOWN]:
        console.print(f"{vector.id}: {vector.path}", markup=False, soft_wrap=True)
        for outcome in vector.acceptable:
            text = describe_outcome(outcome)
            console.print(f"  acceptable  {text}", markup=False, soft_wrap=True)
        console.print(f"  observed    {said}", markup=False, soft_wrap=True)
    if len(result.failed) > SHOWN:
        console.print(f"... and {len(result.failed) - SHOWN:,} more")
    for why, count in result.skipped.items():
        console.print(f"skipped {count:,}: {why}", markup=False, soft_wrap=True)
    for name, count in result.known.items():
        console.print(f"known departure, {subject} {name}: {count:,}", markup=False, soft_wrap=True)
    failed = f"{len(result.failed):,} FAILED, " if result.failed else ""
    console.print(f"{result.total:,} vectors: {failed}{result.passed:,} passed", markup=False)


@contextmanager
def _written(path: Path) -> Iterator[Callable[[bytes], object]]:
    """A file to write, which is there only when all of it is. Raises `BadInput`."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as out:
            yield out.write
        part.replace(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot write it: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Show what is being done, on a terminal."""
    if not notes.is_terminal:
        yield lambda what: None
        return
    with notes.status("") as status:
        yield status.update
