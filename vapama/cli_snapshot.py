"""``vapama snapshot``: where addresses lead in an image of memory, all that is mapped there, and
what should not be.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from vapama.case import BadInput
from vapama.explain import describe_cpu, describe_outcome, explain_access
from vapama.impl.listing import Listing, Runs
from vapama.snapshot import answers, findings, sides
from vapama.snapshot import audit as audits
from vapama.snapshot.answers import Guest, Rows
from vapama.snapshot.images import Absent, Image, open_image
from vapama.snapshot.slots import read_slots
from vapama.spec.access import Access, GuestPhysicalAccess
from vapama.spec.cpu import Cpu
from vapama.spec.outcomes import Outcome
from vapama.spec.stage import Ept, Npt, Stage
from vapama.spec.words import WORD
from vapama.verdict import EXIT_COUNTEREXAMPLE, EXIT_HELD, EXIT_UNDECIDED
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
MOST_RUNS, MOST_READS, MOST_PAGES = 1_000_000, 1 << 32, 1 << 26


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
Eptp = Annotated[int | None, _register("eptp", "EPTP: the image is a host's, the guest has EPT.")]
Ncr3 = Annotated[int | None, _register("ncr3", "nCR3: the guest has nested page tables.")]
HostCr4 = Annotated[int | None, _register("host-cr4", "With --ncr3, the host's CR4 (PAE).")]
HostEfer = Annotated[int | None, _register("host-efer", "With --ncr3, the host's EFER.")]
Mbec = Annotated[
    bool, typer.Option("--mbec", help="With --eptp, mode-based execute control is on.")
]
Gpa = Annotated[
    bool, typer.Option("--gpa", help="The second stage alone: addresses are guest-physical.")
]
Processor = Annotated[
    int, typer.Option(min=0, help="Whose registers of an ELF core to take, counted from 0.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@dataclass
class Asked:
    """What a command is about: an image, the state to walk in, and a second stage if there is one.

    Without `cpu` it is about the second stage alone.
    """

    image: Image
    cpu: Cpu | None
    stage: Stage | None

    @property
    def first(self) -> Cpu | Stage:
        """The state of the stage that addresses belong to."""
        state = self.cpu if self.cpu is not None else self.stage
        assert state is not None
        return state


def _asked(
    image: str, form: str, processor: int, mbec: bool, gpa: bool, **given: int | None
) -> Asked:
    memory = _opened(image, form)
    known = {name: value for name, value in given.items() if value is not None}
    if not known.keys() & {"eptp", "ncr3"}:
        for own in memory.registers[processor : processor + 1]:
            known |= {name: own[name] for name in ("eptp", "ncr3") if name in own}
    stage = answers.second_stage_state(known, known.get("maxphyaddr"), mbec)
    if gpa and stage is None:
        raise BadInput("--gpa is about a second stage: give --eptp or --ncr3")
    cpu = None if gpa else answers.control_state(memory, known, processor)
    return Asked(memory, cpu, stage)


def _opened(image: str, form: str) -> Image:
    """The image in a file, or the one that comes with vapama. Raises `BadInput`."""
    if form and form not in FORMS:
        raise BadInput(f"--format {form}: give one of {', '.join(FORMS)}")
    path = Path(image)
    if image == "guest":
        from vapama.snapshot.truth import SHIPPED

        path = SHIPPED
    return open_image(path, form)


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
    eptp: Eptp = None,
    ncr3: Ncr3 = None,
    host_cr4: HostCr4 = None,
    host_efer: HostEfer = None,
    mbec: Mbec = False,
    gpa: Gpa = False,
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
    about = _asked(
        image, form, processor, mbec, gpa, cr3=cr3, cr0=cr0, cr4=cr4, efer=efer, rflags=rflags,
        pkru=pkru, pkrs=pkrs, maxphyaddr=maxphyaddr, eptp=eptp, ncr3=ncr3, host_cr4=host_cr4,
        host_efer=host_efer,
    )  # fmt: skip
    kind = {"write": int(write), "fetch": int(fetch), "user": int(user)}
    with written():
        if json:
            rows = (
                {"access": state_to_json(access), **outcome_to_json(outcome)}
                for access, outcome in _outcomes(about, _addresses(addresses), kind)
            )
            _print_json(_opening("vapama-translations", about), "translations", rows, dict)
        elif walk:
            _print_walks(about, _addresses(addresses), kind)
        else:
            for access, outcome in _outcomes(about, _addresses(addresses), kind):
                text = describe_outcome(outcome).partition(";")[0]
                print(f"{access.address:#018x}  {text}")


def _outcomes(
    about: Asked, addresses: Iterator[int], kind: dict[str, int]
) -> Iterator[tuple[Access | GuestPhysicalAccess, Outcome]]:
    for address in addresses:
        if about.cpu is None:
            assert about.stage is not None
            physical = GuestPhysicalAccess(address, **kind, linear=0)
            yield physical, answers.second_stage_translate(about.stage, about.image, physical)
        else:
            access = Access(address, **kind)
            yield access, answers.translate(about.cpu, about.image, access, about.stage)


def _print_walks(about: Asked, addresses: Iterator[int], kind: dict[str, int]) -> None:
    if about.cpu is None or about.stage is not None:
        raise BadInput("--walk shows walks of one stage: leave out --eptp and --ncr3")
    for address in addresses:
        try:
            for line in explain_access(about.cpu, about.image, Access(address, **kind)):
                print(line)
        except Absent as absent:
            print(f"outcome  the walk needs the entry at {absent}, outside memory")


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
    eptp: Eptp = None,
    ncr3: Ncr3 = None,
    host_cr4: HostCr4 = None,
    host_efer: HostEfer = None,
    mbec: Mbec = False,
    gpa: Gpa = False,
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
    about = _asked(
        image, form, processor, mbec, gpa, cr3=cr3, cr0=cr0, cr4=cr4, efer=efer, rflags=rflags,
        pkru=pkru, pkrs=pkrs, maxphyaddr=maxphyaddr, eptp=eptp, ncr3=ncr3, host_cr4=host_cr4,
        host_efer=host_efer,
    )  # fmt: skip
    lists = Maps(about, merge, most_runs, most_reads)
    with written():
        if json:
            rows = (o for rows in lists.rows() for o in answers.as_objects(rows))
            _print_json(_opening("vapama-maps", about), "mappings", rows, lists.summary)
        else:
            print(f"{about.image.name}: {_described(about)}")
            for batch in lists.rows():
                for line in answers.as_lines(about.first, batch, merge):
                    print(line)
            _print_summary(lists.summary(), lists.lines)
    if lists.stopped:
        limit = most_runs if lists.stopped == "runs" else most_reads
        notes.print(
            f"vapama: stopped at --most-{lists.stopped} {limit:,}: the list is not whole",
            soft_wrap=True,
        )
    raise typer.Exit(EXIT_UNDECIDED if lists.stopped else EXIT_HELD)


HostMaxPhyAddr = Annotated[
    int | None, _register("host-maxphyaddr", "MAXPHYADDR of the hypervisor's tables (52).")
]


@app.command()
def capture(
    file: Annotated[Path, typer.Argument(help="The .npz file to write.")],
    kind: Annotated[
        str,
        typer.Option(help="4-level, 5-level, pae or 32-bit; or nested, a guest of KVM's."),
    ] = "4-level",
    json: Json = False,
) -> None:
    """Boot a Linux in QEMU, save its page tables with the truth about them, and check those."""
    from vapama import capture as captures
    from vapama.oracles.capture import save
    from vapama.oracles.emulator import CannotStart
    from vapama.snapshot.truth import check_snapshot, load_snapshot

    if kind not in captures.KINDS:
        raise BadInput(f"--kind {kind}: give one of {', '.join(captures.KINDS)}")
    with TemporaryDirectory(prefix="vapama-") as folder, progress() as show:
        show(f"booting a Linux: {kind}")
        try:
            save(file, captures.captured(kind, Path(folder)))
        except CannotStart as error:
            raise BadInput(f"vapama snapshot capture: {error}") from None
        except OSError as error:
            raise BadInput(f"{file}: cannot be written: {error.strerror or error}") from None
        agreements = check_snapshot(load_snapshot(file), show)
    if json:
        told = {"file": str(file), "kind": kind, "agreements": agreements}
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(told)) + b"\n")
    else:
        for agreement in agreements:
            print(f"{agreement.right:>8,} of {agreement.total:,} mappings  {agreement.what}")
            if agreement.first_difference:
                print(f"         {agreement.first_difference}")
    good = all(agreement.good for agreement in agreements)
    raise typer.Exit(EXIT_HELD if good else EXIT_COUNTEREXAMPLE)


@app.command()
def audit(
    image: ImageFile,
    host: Annotated[
        str, typer.Option(help="The image with the hypervisor's tables; IMAGE is the guest's then.")
    ] = "",
    eptp: Eptp = None,
    ncr3: Ncr3 = None,
    shadow: Annotated[int | None, _register("shadow", "The root of shadow tables.")] = None,
    slots: Annotated[str, typer.Option(metavar="FILE", help="The memory slots, in JSON.")] = "",
    device: Annotated[
        str,
        typer.Option(
            metavar="VALUE/MASK", help="Entries that are the hypervisor's marks for devices."
        ),
    ] = "",
    generation: Annotated[
        str, typer.Option(metavar="VALUE/MASK", help="Which of those marks are not outdated.")
    ] = "",
    unsync: Annotated[
        list[int] | None, _register("unsync", "A guest's table that may be out of sync.")
    ] = None,
    no_executable_large: Annotated[
        bool, typer.Option("--no-executable-large", help="Large pages must not be executable.")
    ] = False,
    cr3: Cr3 = None,
    cr0: Cr0 = None,
    cr4: Cr4 = None,
    efer: Efer = None,
    maxphyaddr: MaxPhyAddr = None,
    host_cr4: HostCr4 = None,
    host_efer: HostEfer = None,
    host_maxphyaddr: HostMaxPhyAddr = None,
    mbec: Mbec = False,
    processor: Processor = 0,
    form: Form = "",
    most: Annotated[int, typer.Option(min=1, help="Tell of so many findings of a rule.")] = 10,
    most_pages: Annotated[int, typer.Option(min=1, help="Stop after so many pages.")] = MOST_PAGES,
    most_reads: Annotated[
        int, typer.Option(min=512, help="Stop after reading so many table entries.")
    ] = MOST_READS,
    json: Json = False,
) -> None:
    """Find what nothing justifies in a hypervisor's tables, or in a guest's own."""
    given = {"cr3": cr3, "cr0": cr0, "cr4": cr4, "efer": efer, "maxphyaddr": maxphyaddr}
    own = {"eptp": eptp, "ncr3": ncr3, "host_cr4": host_cr4, "host_efer": host_efer}
    about = sides.Given(
        _opened(image, form),
        _opened(host, form) if host else None,
        {name: value for name, value in given.items() if value is not None},
        {name: value for name, value in own.items() if value is not None},
        shadow,
        host_maxphyaddr,
        mbec,
        processor,
        read_slots(Path(slots)) if slots else None,
    )
    hypervisor, guest = sides.sides_of(about)
    options = audits.Options(
        most,
        most_pages,
        most_reads,
        _mark("device", device),
        _mark("generation", generation),
        tuple(unsync or ()),
        not no_executable_large,
    )
    with progress() as show:
        show("auditing")
        report = audits.audit(hypervisor, guest, about.slots, options)
    with written():
        if json:
            _print_json(
                {"format": "vapama-audit", "version": 1, "image": about.image.name},
                "findings",
                iter(report.findings),
                lambda: findings.summary(report),
            )
        else:
            for side in (hypervisor, guest):
                if side is not None:
                    print(f"{side.name}: {side.image.name}, {side.described()}")
            for line in findings.as_lines(report):
                print(line)
    if report.stopped:
        notes.print(
            f"vapama: stopped at --most-{report.stopped}: not everything was looked at",
            soft_wrap=True,
        )
    raise typer.Exit(findings.exit_status(report))


def _mark(name: str, text: str) -> tuple[int, int] | None:
    """The value and mask that an option gives. Raises `BadInput`."""
    if not text:
        return None
    value, slash, mask = text.partition("/")
    if not slash:
        raise BadInput(f"--{name} {text}: give VALUE/MASK, such as 0x6/0x7")
    return number(value), number(mask)


class Maps:
    """All that is mapped, as `rows`; `lines` is how many of them there were so far."""

    def __init__(self, about: Asked, merge: bool, most_runs: int, most_reads: int) -> None:
        self.about, self.merge = about, merge
        self.most_runs, self.most_reads = most_runs, most_reads
        self.guest: Guest | None = None
        if about.stage is not None and about.cpu is not None:
            self.guest = answers.guest_memory(about.stage, about.image, most_runs, most_reads)
        self.listing = self._listing(merge, most_runs)
        self.lines = 0

    def _listing(self, merge: bool, most_runs: int) -> Listing:
        pieces = self.about.image.pieces if self.guest is None else self.guest.pieces
        name = self.about.image.name
        return answers.listing_of(self.about.first, pieces, name, merge, most_runs, self.most_reads)

    @property
    def stopped(self) -> str:
        """The limit that was met, if one was."""
        return self.listing.stopped

    def rows(self) -> Iterator[Rows]:
        """The rows, a batch at a time, as far as the limits go."""
        with progress() as show:
            for batch in self.listing.batches():
                show(f"{self.listing.pages:,} pages, {self.listing.reads:,} entries read")
                for rows in self._led_on(batch):
                    left = self.most_runs - self.lines
                    if len(rows.pages) > left:
                        self.listing.stopped = "runs"
                        rows = Rows(*(column[:left] for column in rows))  # noqa: PLW2901
                    self.lines += len(rows.pages)
                    yield rows
                    if self.stopped and self.lines == self.most_runs:
                        return

    def _led_on(self, batch: Runs) -> Iterator[Rows]:
        if self.guest is None or self.about.cpu is None:
            yield answers.as_rows(self.about.first, batch)
        else:
            yield from self.guest.through(self.about.cpu, batch, self.merge)

    def summary(self) -> dict[str, Any]:
        """What is to be said in the end."""
        listing = self.listing
        total: int | None = listing.pages
        if self.stopped:
            with progress() as show:
                show("counting all pages")
                *_, total = self._listing(False, WORD).counted()
        unmapped = {} if self.guest is None else {"bytes_without_memory": self.guest.unmapped}
        return {
            "complete": not self.stopped,
            "stopped": f"most-{self.stopped}" if self.stopped else "",
            "pages": listing.pages,
            "pages_in_all": total,
            "entries_read": listing.reads,
            "malformed_entries": listing.malformed,
            "absent_tables": listing.missing,
            **unmapped,
        }


def _described(about: Asked) -> str:
    said = []
    if about.cpu is not None:
        said.append(f"{describe_cpu(about.cpu)}, CR3 {about.cpu.cr3:#x}")
    if isinstance(about.stage, Ept):
        said.append(f"{about.stage.levels}-level EPT, EPTP {about.stage.eptp:#x}")
    elif about.stage is not None:
        said.append(f"nested paging of {about.stage.levels} levels, nCR3 {about.stage.ncr3:#x}")
    return "; ".join(said)


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


def _opening(form: str, about: Asked) -> dict[str, Any]:
    states = {
        "control": about.cpu,
        "ept": about.stage if isinstance(about.stage, Ept) else None,
        "npt": about.stage if isinstance(about.stage, Npt) else None,
    }
    shown = {name: state_to_json(state) for name, state in states.items() if state is not None}
    return {"format": form, "version": 1, "image": about.image.name, **shown}


def _print_summary(summary: dict[str, Any], runs: int) -> None:
    total = (
        "an unknown number" if summary["pages_in_all"] is None else f"{summary['pages_in_all']:,}"
    )
    of = "" if summary["complete"] else f" of {total}"
    text = f"{summary['pages']:,}{of} pages in {runs:,} lines"
    for what in ("malformed_entries", "absent_tables", "bytes_without_memory"):
        if summary.get(what):
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
