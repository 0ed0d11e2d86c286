"""``vapama oracles``: the real systems that this host has to judge by, and long runs on them."""

import sys
from typing import Annotated, Any, NoReturn

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vapama.case import CASES, BadInput
from vapama.explain_programs import describe_step
from vapama.subjects import HYPERVISORS, MACHINES, machine
from vapama.verdict import EXIT_COUNTEREXAMPLE, EXIT_HELD

app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
    help="The real systems to judge by that this host has, and why it lacks the others.",
)
console = Console(highlight=False, emoji=False)
notes = Console(stderr=True, highlight=False, emoji=False)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.callback()
def list_(context: typer.Context, json: Json = False) -> None:
    """List the oracles, if this host has them or why not, and their known departures."""
    if context.invoked_subcommand is not None:
        return
    from vapama.oracles.registry import ORACLES, missing

    if json:
        listed = [
            {
                "name": oracle.name,
                "what": oracle.what,
                "missing": missing(oracle),
                "departures": [
                    {"name": d.name, "what": d.what, "source": d.source} for d in oracle.departures
                ],
            }
            for oracle in ORACLES
        ]
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(listed)) + b"\n")
        return
    for oracle in ORACLES:
        why = missing(oracle)
        state = f"[yellow]no: {escape(why)}[/]" if why else "[green]here[/]"
        console.print(f"[bold]{oracle.name}[/]  {state}\n    {escape(oracle.what)}", soft_wrap=True)
        for departure in oracle.departures:
            console.print(f"    [dim]known departure {departure.name}[/]", soft_wrap=True)


@app.command()
def run(
    oracle: Annotated[str, typer.Argument(help="qemu, bochs, kvm-shadow or kvm-tdp.")],
    cases: Annotated[
        int, typer.Option(min=1, help="How many cases, or programs, are to be judged.")
    ] = 100_000,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Stop after so long (kvm-shadow and kvm-tdp only).")
    ] = None,
    seed: Annotated[int, typer.Option(help="The random seed.")] = 0,
    model: Annotated[
        str | None, typer.Option(help="The emulator's CPU model; the one with most features.")
    ] = None,
    maxphyaddr: Annotated[
        int | None, typer.Option(min=32, max=52, help="MAXPHYADDR (qemu only).")
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(help="Only 4- and 5-level paging, made and judged by compiled kernels."),
    ] = False,
    json: Json = False,
) -> None:
    """Run random cases of every paging mode on a machine, in batches, and judge each; or programs
    of guest and host steps on a hypervisor.
    """
    from vapama import oracle_batches, oracle_runs

    if oracle in HYPERVISORS:
        if model is not None or maxphyaddr is not None or compiled:
            raise BadInput(
                f"vapama oracles run {oracle}: --model, --maxphyaddr and --compiled are "
                "about machines that run single cases"
            )
        _run_programs(oracle, cases, seed, seconds, json)
    if oracle not in MACHINES:
        known = ", ".join((*MACHINES, *HYPERVISORS))
        raise BadInput(f"vapama oracles run {oracle}: give one of {known}")
    if seconds is not None:
        raise BadInput(f"vapama oracles run {oracle}: --seconds is about kvm-shadow and kvm-tdp")
    given = {"model": model, "maxphyaddr": maxphyaddr}
    options = {name: str(value) for name, value in given.items() if value is not None}
    subject = machine(oracle, options)
    try:
        runs = oracle_batches.run if compiled else oracle_runs.run
        tally = runs(subject, cases, seed, _progress)
    finally:
        subject.machine.end()
    if json:
        sys.stdout.buffer.write(msgspec.json.format(oracle_runs.as_json(tally)) + b"\n")
    else:
        _print(oracle, tally)
    raise typer.Exit(EXIT_COUNTEREXAMPLE if tally.differences else EXIT_HELD)


def _run_programs(
    oracle: str, count: int, seed: int, seconds: float | None, json: bool
) -> NoReturn:
    """Run programs on KVM in an emulator, and tell what came of them. Raises `BadInput`."""
    from vapama import oracle_programs
    from vapama.oracles.emulator import CannotStart
    from vapama.oracles.nested_kvm import NestedKvm

    try:
        hypervisor = NestedKvm(HYPERVISORS[oracle])
    except CannotStart as error:
        raise BadInput(f"vapama oracles run {oracle}: {error}") from None
    try:
        tally = oracle_programs.run(hypervisor, count, seed, seconds, _progress)
    finally:
        hypervisor.end()
    if json:
        sys.stdout.buffer.write(msgspec.json.format(oracle_programs.as_json(tally)) + b"\n")
    else:
        _print_programs(oracle, tally)
    raise typer.Exit(EXIT_COUNTEREXAMPLE if tally.differences else EXIT_HELD)


def _print_programs(oracle: str, tally: Any) -> None:
    for what, steps in sorted(tally.agreed.items()):
        console.print(f"{steps:>10,}  {what}")
    for name, steps in sorted(tally.known.items()):
        console.print(f"known departure, {name}: {steps:,} steps")
    for found in tally.differences[:10]:
        again = "" if found.again else " (not seen again)"
        console.print(f"[bold red]difference[/]{again}: {escape(found.what)}", soft_wrap=True)
        for step in found.program.steps[: found.at + 1]:
            console.print(f"    {describe_step(step)}", soft_wrap=True, markup=False)
        path = found.case(oracle, HYPERVISORS[oracle]).save(CASES)
        console.print(f"    explain it: vapama explain {path}", soft_wrap=True)
    deaths = f", {tally.deaths} times started anew" if tally.deaths else ""
    console.print(
        f"{oracle}: {tally.judged:,} programs judged in {tally.seconds:.1f} s, "
        f"{tally.steps:,} steps{deaths}: {len(tally.differences)} unexplained differences"
    )


@app.command()
def linux(
    flavor: Annotated[
        str, typer.Option(help="cloud-amd64; or 686-pae or 686, which `snapshot capture` boots.")
    ] = "cloud-amd64",
    json: Json = False,
) -> None:
    """Download Debian's kernel, which kvm-shadow, kvm-tdp and `snapshot capture` boot."""
    from vapama.oracles import linux as kernels
    from vapama.oracles.emulator import CannotStart

    if flavor not in (kernels.CLOUD, kernels.PAE, kernels.LEGACY):
        raise BadInput(f"--flavor {flavor}: give cloud-amd64, 686-pae or 686")
    try:
        found = kernels.download(flavor)
    except CannotStart as error:
        raise BadInput(f"vapama oracles linux: {error}") from None
    if json:
        told = {"kernel": str(found.kernel), "modules": str(found.modules)}
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(told)) + b"\n")
    else:
        console.print(f"{found.kernel.name} is here", soft_wrap=True)


def _progress(tally: Any) -> None:
    if notes.is_terminal:
        notes.print(f"{tally.judged:,} cases judged", end="\r")


def _print(oracle: str, tally: Any) -> None:
    """The table of a run, and who says what in each difference."""
    table = Table(box=None, pad_edge=False)
    table.add_column("mode")
    table.add_column("outcome")
    table.add_column("cases", justify="right")
    for (mode, outcome), count in sorted(tally.agreed.items()):
        table.add_row(mode, outcome, f"{count:,}")
    console.print(table)
    for name, count in sorted(tally.known.items()):
        console.print(f"known departure, {name}: {count:,} cases")
    for why, count in sorted(tally.left_out.items()):
        console.print(f"left out: {count:,} cases: {why}", soft_wrap=True, style="dim")
    for found in tally.differences[:10]:
        case = found.case
        console.print(f"[bold red]difference[/], {case.mode}: {case.access}", soft_wrap=True)
        for who, what in (("the reference", case.expected), (oracle, found.observed)):
            console.print(f"    {who}: {what}", soft_wrap=True, markup=False)
        console.print(f"    {case.state}", soft_wrap=True, markup=False)
        entries = {hex(a): hex(v) for a, v in case.memory.touched.items()}
        console.print(f"    {entries}", soft_wrap=True, markup=False)
    rate = tally.judged / max(tally.seconds, 1e-9)
    if tally.sampled:
        console.print(f"judged again by the reference, as a sample: {tally.sampled:,} cases")
    deaths = f", {tally.deaths} times started anew" if tally.deaths else ""
    console.print(
        f"{oracle}: {tally.judged:,} cases judged in {tally.seconds:.1f} s, {rate:,.0f} a second"
        f"{deaths}: {len(tally.differences)} unexplained differences"
    )
