"""The command line. Exit status: 0 all held, 1 a counterexample, 2 bad input, 3 undecided."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from vapama import cli_oracles, cli_snapshot, cli_vectors
from vapama.case import CASES, BadInput
from vapama.jobs import Event, Job
from vapama.snapshot import truth
from vapama.verdict import (
    EXIT_BAD_INPUT,
    EXIT_COUNTEREXAMPLE,
    EXIT_HELD,
    EXIT_UNDECIDED,
    Verdict,
    budget_named,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Is my address translation right? Checks it against an executable specification.",
    epilog="Exit status: 0 all held, 1 a counterexample, 2 bad input or usage, 3 undecided.",
)
app.add_typer(cli_snapshot.app, name="snapshot")
app.add_typer(cli_oracles.app, name="oracles")
app.add_typer(cli_vectors.app, name="vectors")
console = Console(highlight=False, emoji=False)
notes = Console(stderr=True, highlight=False, emoji=False)

Names = Annotated[list[str] | None, typer.Argument(help="Invariants by name; all by default.")]
Subject = Annotated[
    str | None,
    typer.Option(help="What to check: a short name (see `vapama list`) or module:factory."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def main() -> None:
    """Run the command line, with bad input told in one line."""
    if not __debug__:
        notes.print("vapama: run Python without -O: the invariants are asserts", soft_wrap=True)
        sys.exit(EXIT_BAD_INPUT)
    try:
        app()
    except BadInput as error:
        notes.print(f"vapama: {' '.join(str(error).split())}", soft_wrap=True, markup=False)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        notes.print("vapama: interrupted")
        sys.exit(130)


@app.command()
def check(
    invariants: Names = None,
    subject: Subject = None,
    engines: Annotated[str, typer.Option(help="Engines, comma-separated.")] = (
        "z3,exhaustive,random,hypothesis,atheris"
    ),
    budget: Annotated[
        str, typer.Option(help="quick, standard, nightly, or seconds for each engine.")
    ] = "standard",
    guest: Annotated[
        Path | None, typer.Option(help="A .npz snapshot to check besides (the shipped one).")
    ] = None,
    hang: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a result that count as hung.")
    ] = 10,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML here.")] = None,
    json: Json = False,
) -> None:
    """Check every invariant by every engine, and the page tables of a real Linux guest."""
    from vapama import check as checking
    from vapama import report as reporting

    chosen = checking.chosen_invariants(invariants or [])
    if guest is None and subject is None and not invariants:
        guest = checking.DEFAULT_GUEST
    if guest is not None:
        truth.load_snapshot(guest)
    spent = budget_named(budget, hang)
    jobs, skipped = checking.plan(
        chosen, checking.chosen_engines(engines), spent, subject, guest, regression_cases()
    )
    with progress(len(jobs)) as listener:
        result = checking.check(jobs, spent, skipped, listener)
    saved = save_cases(result.counterexamples)
    for path, write in ((junit, reporting.write_junit), (report, reporting.write_html)):
        if path is not None:
            try:
                write(result, path)
            except OSError as error:
                raise BadInput(f"{path}: cannot write the report: {error.strerror}") from None
    if json:
        sys.stdout.buffer.write(reporting.as_json(result))
    else:
        reporting.print_report(result, console, saved)
    raise typer.Exit(result.status)


@app.command("list")
def list_(
    mistakes: Annotated[bool, typer.Option(help="List the seeded mistakes instead.")] = False,
    json: Json = False,
) -> None:
    """List the invariants with their sources, and the subjects."""
    from vapama.bugs.mistakes import MISTAKES
    from vapama.spec.nondet import load_invariants
    from vapama.subjects import SHORT_NAMES

    if json:
        import msgspec

        listed = [
            {"name": i.name, "source": i.source, "claim": i.claim.__doc__, "twin": i.twin}
            for i in load_invariants().values()
        ]
        content = {"invariants": listed, "subjects": list(SHORT_NAMES), "mistakes": list(MISTAKES)}
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
        return
    if mistakes:
        for mistake in MISTAKES.values():
            console.print(f"{mistake.name}  (breaks {mistake.breaks})", markup=False)
        return
    for invariant in load_invariants().values():
        claim = " ".join((invariant.claim.__doc__ or "").split())
        console.print(f"[bold]{invariant.name}[/]\n    {claim}\n    [dim]{invariant.source}[/]")
    console.print(f"subjects: {', '.join(SHORT_NAMES)}, mistake:NAME, module:factory")


@app.command()
def prove(
    invariants: Names = None,
    subject: Subject = None,
    mistakes: Annotated[
        bool, typer.Option(help="Refute the seeded mistakes of these claims, or all, instead.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write each proof's SMT-LIB into this folder.")
    ] = None,
    json: Json = False,
) -> None:
    """Prove invariants for all inputs with Z3, each proof checked again by bitwuzla.

    Without names the whole ledger; with names also the lemmas that they rest on.
    """
    from vapama import check as checking

    chosen = checking.chosen_invariants(invariants or [])
    budget = budget_named("standard")
    if mistakes:
        from vapama.proofs.apart import apart
        from vapama.proofs.prover import refute

        hunt_mistakes(
            lambda i, name: apart(partial(refute, i, name, budget.rlimit)), "z3", invariants, json
        )
    jobs, skipped = checking.plan(chosen, ("z3",), budget, subject or "optimized")
    if skipped:
        raise BadInput(f"--subject {subject}: {skipped['z3']}")
    import msgspec

    jobs = [msgspec.structs.replace(job, export=str(export) if export else "") for job in jobs]
    start = time.monotonic()
    with progress(len(jobs)) as listener:
        result = checking.check(jobs, budget, skipped, listener)
    if not invariants and not json:
        from vapama.report import print_ledger

        print_ledger(result.verdicts, time.monotonic() - start, console)
        finish([v for v in result.verdicts if not v.good], json, of=result.verdicts)
    finish(result.verdicts, json)


@app.command()
def fuzz(
    invariants: Annotated[
        list[str] | None,
        typer.Argument(help="Invariants by name, or `all`; by default the walk's equality."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="How long.")] = 30,
    engine: Annotated[str, typer.Option(help="atheris, random or hypothesis.")] = "atheris",
    subject: Subject = None,
    corpus: Annotated[
        Path | None, typer.Option(help="The corpus to start from and add to (a cache folder).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The random seed; a fresh one each time.")
    ] = None,
    mistakes: Annotated[
        bool,
        typer.Option(
            help="Hunt the seeded mistakes of these claims, or all, for `--seconds` each, instead."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Fuzz invariants, and report runs a second and the coverage reached."""
    from vapama import check as checking
    from vapama import fuzzing

    names = invariants or [checking.WALK]
    chosen = checking.chosen_invariants([] if names == ["all"] else names)
    if not seconds < 1e7:
        raise BadInput(f"--seconds {seconds:g}: give a number of seconds")
    if engine not in fuzzing.ENGINES:
        raise BadInput(f"--engine {engine}: give one of {', '.join(fuzzing.ENGINES)}")
    if mistakes:
        hunt_mistakes(
            lambda i, name: fuzzing.hunt(i, f"mistake:{name}", engine, seconds),
            engine,
            [invariant.name for invariant in chosen] if invariants else None,
            json,
        )
    jobs, folder = fuzzing.plan(chosen, subject or "optimized", engine, seconds, seed, corpus)
    with progress(len(jobs)) as listener:
        result = checking.check(jobs, jobs[0].budget, {}, listener)
    total = sum(v.executions for v in result.verdicts)
    spent = sum(v.seconds for v in result.verdicts)
    if not json:
        rate = total / max(spent, 1e-9)
        console.print(f"{engine}: {total:,} runs in {spent:.1f} s, {rate:,.0f} a second on a core")
        if result.coverage:
            console.print(f"coverage: {result.coverage}")
        if engine == "atheris":
            for line in fuzzing.source_coverage(folder, chosen, subject or "optimized"):
                console.print(f"coverage: {line}", markup=False)
    finish(result.verdicts, json)


@app.command()
def bugs(
    names: Annotated[
        list[str] | None, typer.Argument(help="Seeded mistakes; those of the hypervisor.")
    ] = None,
    engines: Annotated[
        str, typer.Option(help="Which are to hunt: random, hypothesis, exhaustive, atheris.")
    ] = "random,hypothesis",
    seconds: Annotated[float, typer.Option(min=0.1, help="For each, but for hypothesis.")] = 20,
    record: Annotated[
        Path | None, typer.Option(help="A JSON file to add what was found to.")
    ] = None,
    new: Annotated[bool, typer.Option("--new", help="Only what the record does not have.")] = False,
    json: Json = False,
) -> None:
    """Hunt seeded mistakes: which engine finds which, and how soon."""
    from vapama import hunting

    chosen = hunting.chosen_mistakes(names or [])
    by = [engine.strip() for engine in engines.split(",")]
    unknown = [engine for engine in by if engine not in hunting.ENGINES]
    if unknown:
        raise BadInput(f"--engines {unknown[0]}: give some of {', '.join(hunting.ENGINES)}")
    kept = hunting.read_record(record) if record is not None else hunting.Record()
    if new:
        if record is None:
            raise BadInput("--new is about a record: give --record FILE")
        there = {(hunt.mistake, hunt.engine) for hunt in kept.hunts}
        chosen = [m for m in chosen if any((m.name, engine) not in there for engine in by)]
    found: dict[str, bool] = {}
    for hunt, _ in hunting.hunts(chosen, by, seconds):
        found[hunt.mistake] = found.get(hunt.mistake, False) or hunt.found
        kept.add(hunt)
        if record is not None:
            record.write_bytes(kept.to_json())
        if not json:
            what = f"found in {hunt.seconds:7.2f} s" if hunt.found else "not found       "
            text = f"{what}  {hunt.engine:<11} {hunt.mistake}  {hunt.failure}"
            console.print(text, markup=False, soft_wrap=True)
    if json:
        sys.stdout.buffer.write(kept.to_json())
    else:
        console.print(f"{sum(found.values())} of {len(found)} seeded mistakes found")
    raise typer.Exit(EXIT_HELD if all(found.values()) else EXIT_UNDECIDED)


@app.command()
def replay(
    case: Annotated[Path, typer.Argument(help="A Case, as an engine wrote it.")],
    subject: Subject = None,
) -> None:
    """Run a Case again, by every engine that can."""
    from vapama import replaying

    results = replaying.replay_everywhere(case, subject)
    for engine, answer in results.items():
        console.print(f"{engine:<11} {answer.text}", markup=False, soft_wrap=True)
    raise typer.Exit(replaying.status(results))


@app.command()
def explain(
    what: Annotated[str, typer.Argument(help="A Case, or a .npz snapshot, or `guest`.")],
    addresses: Annotated[list[str] | None, typer.Argument(help="Linear addresses.")] = None,
    subject: Subject = None,
    write: Annotated[bool, typer.Option("--write")] = False,
    fetch: Annotated[bool, typer.Option("--fetch")] = False,
    user: Annotated[bool, typer.Option("--user")] = False,
) -> None:
    """Show a walk as a person reads it: a Case's, or that of addresses in a snapshot."""
    from vapama import replaying

    if addresses:
        path = truth.SHIPPED if what == "guest" else Path(what)
        if write and fetch:
            raise BadInput("give --write or --fetch, not both")
        lines = replaying.explain_addresses(path, addresses, write=write, fetch=fetch, user=user)
    elif what == "guest" or what.endswith(".npz"):
        raise BadInput(f"vapama explain {what}: give linear addresses to explain")
    else:
        lines = replaying.explain_case(Path(what), subject)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


@app.command()
def simulate(
    host: Annotated[
        bool, typer.Option(help="Look at this host's pools and KSM counters instead.")
    ] = False,
    memory: Annotated[int, typer.Option(min=2, help="The guest's memory, in MiB.")] = 4096,
    pages: Annotated[str, typer.Option(help="The host's pages to set up: 4K, 2M or 1G.")] = "2M",
    guest_pages: Annotated[str, typer.Option(help="The guest's own pages.")] = "4K",
    guests: Annotated[int, typer.Option(min=1, max=64, help="Guests that KSM merges.")] = 4,
    size: Annotated[int, typer.Option(min=1, max=65536, help="Pages of each.")] = 512,
    alike: Annotated[float, typer.Option(min=0, max=1, help="What part is the same.")] = 0.5,
    writes: Annotated[int, typer.Option(min=0, help="Pages each writes between scans.")] = 8,
    scans: Annotated[int, typer.Option(min=1, max=10_000, help="How many scans.")] = 12,
    steps: Annotated[int, typer.Option(min=8, help="Steps of each workload.")] = 2000,
    seed: Annotated[int, typer.Option(help="The random seed.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write the plots here, as SVG.")] = None,
    json: Json = False,
) -> None:
    """Weigh page sizes and same-page merging against each other, in numbers; or check this host."""
    from vapama import simulate as simulating

    if host:
        findings = simulating.look_at_host()
        if json:
            _print_as_json(findings)
        for finding in [] if json else findings:
            word = "holds" if finding.holds else "VIOLATED"
            console.print(f"{word:<9} {finding.what}: {finding.told}", markup=False)
        broken = any(not finding.holds for finding in findings)
        raise typer.Exit(EXIT_COUNTEREXAMPLE if broken else EXIT_HELD)
    for option, value in (("--pages", pages), ("--guest-pages", guest_pages)):
        if value not in simulating.SIZES:
            raise BadInput(f"{option} {value}: give one of {', '.join(simulating.SIZES)}")
    walks = simulating.walks(memory << 20, guest_pages)
    over_time = list(simulating.merging(guests, size, alike, writes, scans, seed))
    left = list(simulating.exits(steps, seed))
    setup = simulating.setup(memory << 20, pages, "/dev/hugepages")
    if plot is not None:
        from vapama.plots import svg

        try:
            plot.write_text(svg(simulating.panels(walks, over_time, left)), encoding="utf-8")
        except OSError as error:
            raise BadInput(f"{plot}: cannot write the plots: {error.strerror}") from None
    if json:
        _print_as_json({"walks": walks, "ksm": over_time, "exits": left, "setup": setup})
        return
    console.print(f"a guest of {memory} MiB with {guest_pages} pages, under nested paging")
    for walk in walks:
        console.print(
            f"  host {walk.pages}: {walk.references:>2} references a walk, "
            f"{walk.table_bytes >> 10:>6,} KiB of tables, {walk.huge_pages:>5,} huge pages"
        )
    console.print(f"KSM: {guests} guests of {size} pages, {writes} writes each between scans")
    console.print("  scan    scanned     broken      saved")
    bars = simulating.plotted([scan.saved for scan in over_time], 40)
    for scan, bar in zip(over_time, bars, strict=True):
        console.print(f"  {scan.scan:>4} {scan.scanned:>10,} {scan.broken:>10,} {bar}")
    console.print(f"exits: {steps} steps of a guest, by faults + intercepts, and tables then")
    for each in left:
        console.print(
            f"  {each.workload:<11} {each.design:<6} {each.pages}: "
            f"{each.faults:>6,} + {each.intercepts:>5,}, {each.tables:>3} tables"
        )
    console.print(f"to have {pages} pages:")
    for line in setup:
        console.print(f"  {line}", markup=False, soft_wrap=True)


def _print_as_json(result: object) -> None:
    import msgspec

    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(result)) + b"\n")


def hunt_mistakes(
    hunt: Callable[..., Verdict], engine: str, names: list[str] | None, json: bool
) -> None:
    """Hunt the seeded mistakes, say how each fared, and exit: 0 if all were refuted.

    Those that break one of these claims, or any; but none that the engine does not run.
    """
    from vapama.bugs.mistakes import MISTAKES
    from vapama.spec.nondet import load_invariants

    registry = load_invariants()
    verdicts = []
    for mistake in MISTAKES.values():
        broken = registry[mistake.breaks]
        if names is not None and broken.name not in names:
            continue
        if engine in broken.unsuited or (engine == "z3" and broken.searched):
            continue
        verdict = hunt(broken, mistake.name)
        verdicts.append(verdict)
        refuted = verdict.status == "counterexample"
        style, text = (
            ("green", "refuted") if refuted else ("bold red", f"NOT REFUTED {verdict.why}")
        )
        if not json:
            console.print(f"[{style}]{text:<9}[/] {verdict.seconds:6.2f} s  {mistake.name}")
    if not verdicts:
        raise BadInput(f"--mistakes: none breaks {', '.join(names or ())} that {engine} runs")
    survived = [v for v in verdicts if v.status != "counterexample"]
    if json:
        print_json(verdicts)
    else:
        slowest = max(v.seconds for v in verdicts)
        caught = len(verdicts) - len(survived)
        console.print(
            f"{caught} of {len(verdicts)} seeded mistakes refuted, the slowest in {slowest:.2f} s"
        )
    raise typer.Exit(EXIT_UNDECIDED if survived else EXIT_HELD)


def finish(verdicts: list[Verdict], json: bool, of: list[Verdict] | None = None) -> None:
    """Print verdicts one by one, save counterexamples, and exit with the status of them all."""
    from vapama.report import STYLES
    from vapama.verdict import exit_status

    saved = save_cases([v for v in verdicts if v.status == "counterexample"])
    if json:
        print_json(verdicts)
    else:
        for v in sorted(verdicts, key=lambda v: v.invariant):
            console.print(
                f"[{STYLES[v.status]}]{v.status:<14}[/] {v.seconds:6.2f} s  {v.invariant}  "
                f"[dim]{v.detail}[/] {v.why}",
                soft_wrap=True,
            )
            for path in [saved[id(v)]] if id(v) in saved else []:
                console.print(f"               replay it: vapama explain {path}", soft_wrap=True)
    raise typer.Exit(exit_status(of or verdicts))


def print_json(verdicts: list[Verdict]) -> None:
    """Verdicts as JSON on standard output."""
    import msgspec

    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(verdicts)) + b"\n")


def save_cases(counterexamples: list[Verdict]) -> dict[int, Path]:
    """Write the Cases of counterexamples to a folder; where each is, by the verdict's id."""
    return {id(v): v.case.save(CASES) for v in counterexamples if v.case is not None}


def regression_cases() -> list[Path]:
    """The Cases of the project at hand, for the engines to begin with."""
    return sorted(Path("tests/regressions").glob("*.json"))


@contextmanager
def progress(jobs: int) -> Iterator[Callable[[Job, Event], None]]:
    """Show what the jobs are at, on a terminal; quiet elsewhere."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=notes,
        transient=True,
        disable=not notes.is_terminal,
    )
    tasks: dict[Job, TaskID] = {}
    done: dict[Job, int] = {}

    def listen(job: Job, event: Event) -> None:
        if job not in tasks:
            tasks[job] = bar.add_task("")
        if event.verdict is not None:
            done[job] = done.get(job, 0) + 1
        where = f"{done.get(job, 0)}/{len(job.invariants)}" if job.invariants else ""
        count = f" {event.executions:,}" if event.executions else ""
        if event.at:
            name = f"{job.engine} {job.subject}".strip()
            bar.update(tasks[job], description=f"{name} {where} {event.at}{count}")
        if job.invariants and done.get(job, 0) == len(job.invariants):
            bar.update(tasks[job], visible=False)

    with bar:
        yield listen


if __name__ == "__main__":
    main()
