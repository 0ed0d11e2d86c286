"""``vapama snapshot``: where addresses lead in an image of memory, and all that is mapped there."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from vapama.case import BadInput
from vapama.explain import describe_cpu, describe_outcome, explain_access
from vapama.impl.listing import Listing, Runs
from vapama.snapshot import answers
from vapama.snapshot.images import Absent, Image, open_image
from vapama.spec.access import Access
from vapama.spec.cpu import Cpu
from vapama.spec.words import WORD
from vapama.verdict import EXIT_HELD, EXIT_UNDECIDED
from vapama.wire import outcome_to_json, state_to_json

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Where addresses lead in an image of memory, and all that its page tables map.",
)
notes = Console(stderr=True, highlight=False, emoji=False)

FORMS = ("raw", "elf", "npz")
EXIT_PIPE = 141
"""What a shell says of a program that writes where nobody reads any more."""
MOST_RUNS, MOST_READS = 1_000_000, 1 << 32


def number(text: str) -> int:
    """A number given on the command line. Raises `BadInput`."""
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value <= WORD:
        raise BadInput(f"{text}: not a 64-bit number: give one such as 0x7fff12345000")
    return value


def _register(name: str, what: str) -> Any:
    return typer.Option(f"--{name}", parser=number, metavar="NUMBER", help=what)


ImageFile = Annotated[
    str, typer.Argument(help="A raw image, an ELF core, a .npz of tables, or `guest`.")
]
Form = Annotated[
    str, typer.Option("--format", help="raw, elf or npz; its first bytes say it by default.")
]
Cr3 = Annotated[int | None, _register("cr3", "CR3: where the tables are.")]
Cr0 = Annotated[int | None, _register("cr0", "CR0 (PG, PE and WP set).")]
Cr4 = Annotated[int | None, _register("cr4", "CR4 (PAE set).")]
Efer = Annotated[int | None, _register("efer", "EFER (long mode with NXE).")]
Rflags = Annotated[int | None, _register("rflags", "RFLAGS, of which AC counts.")]
Pkru = Annotated[int | None, _register("pkru", "PKRU.")]
Pkrs = Annotated[int | None, _register("pkrs", "IA32_PKRS.")]
MaxPhyAddr = Annotated[
    int | None, _register("maxphyaddr", "Bits of a physical address, 32 to 52 (52).")
]
Processor = Annotated[
    int, typer.Option(min=0, help="Whose registers of an ELF core to take, counted from 0.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _opened(image: str, form: str, processor: int, **given: int | None) -> tuple[Image, Cpu]:
    if form and form not in FORMS:
        raise BadInput(f"--format {form}: give one of {', '.join(FORMS)}")
    path = Path(image)
    if image == "guest":
        from vapama.snapshot.truth import SHIPPED

        path = SHIPPED
    memory = open_image(path, form)
    known = {name: value for name, value in given.items() if value is not None}
    return memory, answers.control_state(memory, known, processor)


@app.command()
def translate(
    image: ImageFile,
    addresses: Annotated[
        list[str], typer.Argument(help="Linear addresses; `-` reads them from standard input.")
    ],
    cr3: Cr3 = None,
    cr0: Cr0 = None,
    cr4: Cr4 = None,
    efer: Efer = None,
    rflags: Rflags = None,
    pkru: Pkru = None,
    pkrs: Pkrs = None,
    maxphyaddr: MaxPhyAddr = None,
    processor: Processor = 0,
    form: Form = "",
    write: Annotated[bool, typer.Option("--write", help="Writes instead of reads.")] = False,
    fetch: Annotated[bool, typer.Option("--fetch", help="Fetches instead of reads.")] = False,
    user: Annotated[bool, typer.Option("--user", help="Made at CPL 3.")] = False,
    walk: Annotated[bool, typer.Option("--walk", help="Show each walk, level by level.")] = False,
    json: Json = False,
) -> None:
    """Say where linear addresses lead, by the reference walk."""
    if write and fetch:
        raise BadInput("give --write or --fetch, not both")
    memory, cpu = _opened(
        image, form, processor, cr3=cr3, cr0=cr0, cr4=cr4, efer=efer, rflags=rflags, pkru=pkru,
        pkrs=pkrs, maxphyaddr=maxphyaddr,
    )  # fmt: skip
    kind = Access(0, write=int(write), fetch=int(fetch), user=int(user))
    asked = (kind._replace(address=address) for address in _addresses(addresses))
    with written():
        if json:
            _translations_as_json(memory, cpu, asked)
        else:
            _translations(memory, cpu, asked, walk)


def _translations(memory: Image, cpu: Cpu, asked: Iterator[Access], walk: bool) -> None:
    for access in asked:
        if not walk:
            outcome = describe_outcome(answers.translate(cpu, memory, access))
            print(f"{access.address:#018x}  {outcome.partition(';')[0]}")
            continue
        try:
            for line in explain_access(cpu, memory, access):
                print(line)
        except Absent as absent:
            print(f"outcome  the walk needs the entry at {absent}, outside memory")


def _translations_as_json(memory: Image, cpu: Cpu, asked: Iterator[Access]) -> None:
    rows = (
        {"access": state_to_json(a), **outcome_to_json(answers.translate(cpu, memory, a))}
        for a in asked
    )
    _print_json(_opening("vapama-translations", memory, cpu), "translations", rows, dict)


def _addresses(texts: list[str]) -> Iterator[int]:
    for text in texts:
        if text == "-":
            yield from (number(word) for line in sys.stdin for word in line.split())
        else:
            yield number(text)


@app.command()
def maps(
    image: ImageFile,
    cr3: Cr3 = None,
    cr0: Cr0 = None,
    cr4: Cr4 = None,
    efer: Efer = None,
    rflags: Rflags = None,
    pkru: Pkru = None,
    pkrs: Pkrs = None,
    maxphyaddr: MaxPhyAddr = None,
    processor: Processor = 0,
    form: Form = "",
    merge: Annotated[
        bool, typer.Option("--merge", help="Join neighbours that lead to neighbours.")
    ] = False,
    most_runs: Annotated[int, typer.Option(min=1, help="Stop after so many lines.")] = MOST_RUNS,
    most_reads: Annotated[
        int, typer.Option(min=512, help="Stop after reading so many table entries.")
    ] = MOST_READS,
    json: Json = False,
) -> None:
    """List all that the page tables map, with the rights that the walk leaves."""
    memory, cpu = _opened(
        image, form, processor, cr3=cr3, cr0=cr0, cr4=cr4, efer=efer, rflags=rflags, pkru=pkru,
        pkrs=pkrs, maxphyaddr=maxphyaddr,
    )  # fmt: skip
    listing = answers.mappings(cpu, memory, merge, most_runs, most_reads)
    with written():
        if json:
            rows = (row for batch in _batches(listing) for row in answers.as_rows(batch))
            summary = partial(_summary, memory, cpu, listing)
            _print_json(_opening("vapama-maps", memory, cpu), "mappings", rows, summary)
        else:
            print(f"{memory.name}: {describe_cpu(cpu)}, CR3 {cpu.cr3:#x}")
            for batch in _batches(listing):
                for line in answers.as_lines(cpu, batch, merge):
                    print(line)
            _print_summary(_summary(memory, cpu, listing), listing.listed)
    if listing.stopped:
        limit = most_runs if listing.stopped == "runs" else most_reads
        notes.print(
            f"vapama: stopped at --most-{listing.stopped} {limit:,}: the list is not whole",
            soft_wrap=True,
        )
    raise typer.Exit(EXIT_UNDECIDED if listing.stopped else EXIT_HELD)


@contextmanager
def written() -> Iterator[None]:
    """Write to standard output; if whoever reads it has read enough, end as others do then."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain again as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_PIPE) from None


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Show what is being done, on a terminal that shows nothing else."""
    if sys.stdout.isatty() or not notes.is_terminal:
        yield lambda what: None
        return
    with notes.status("") as status:
        yield status.update


def _batches(listing: Listing) -> Iterator[Runs]:
    with progress() as show:
        for batch in listing.batches():
            show(f"{listing.pages:,} pages, {listing.reads:,} entries read")
            yield batch


def _summary(memory: Image, cpu: Cpu, listing: Listing) -> dict[str, Any]:
    stopped = listing.stopped
    return {
        "complete": not stopped,
        "stopped": f"most-{stopped}" if stopped else "",
        "pages": listing.pages,
        "pages_in_all": _in_all(memory, cpu, listing) if stopped else listing.pages,
        "entries_read": listing.reads,
        "malformed_entries": listing.malformed,
        "absent_tables": listing.missing,
    }


def _in_all(memory: Image, cpu: Cpu, listing: Listing) -> int | None:
    """How many pages there are where not all were listed; None if that takes too long to tell."""
    with progress() as show:
        show("counting all pages")
        counting = answers.mappings(cpu, memory, False, WORD, listing.most_reads)
        *_, total = counting.counted()
    return total


def _opening(form: str, memory: Image, cpu: Cpu) -> dict[str, Any]:
    return {"format": form, "version": 1, "image": memory.name, "control": state_to_json(cpu)}


def _print_summary(summary: dict[str, Any], runs: int) -> None:
    total = (
        "an unknown number" if summary["pages_in_all"] is None else f"{summary['pages_in_all']:,}"
    )
    of = "" if summary["complete"] else f" of {total}"
    text = f"{summary['pages']:,}{of} pages in {runs:,} lines"
    for what in ("malformed_entries", "absent_tables"):
        if summary[what]:
            text += f"; {summary[what]:,} {what.replace('_', ' ')}"
    print(text)


def _print_json(opening: dict[str, Any], name: str, rows: Iterator[Any], closing: Any) -> None:
    """One object, its rows as they come: a list may be longer than memory."""
    out, encode = sys.stdout.buffer, msgspec.json.encode
    out.write(encode(opening)[:-1] + b',\n"' + name.encode() + b'": [')
    for k, row in enumerate(rows):
        out.write((b",\n" if k else b"\n") + encode(row))
    end = encode(closing())
    out.write(b"\n]" + (b",\n" + end[1:] if end != b"{}" else b"}") + b"\n")
