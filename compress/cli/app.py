"""The commands. A failure prints one line on stderr and exits with 2 for a user's mistake, 1 for others."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.exceptions import TyperException

from compress.cli.failure import explained
from compress.distributed import processes
from compress.errors import UserError

Device = Literal["cpu", "cuda"]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML.")]
Artifacts = Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="Directories of models.")]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045, typer reads the annotation at run time
    typer.Option("--set", metavar="PATH=VALUE", help="Change a value, such as stages.small.train.steps=10."),
]
Workdir = Annotated[Optional[Path], typer.Option(help="Directory for results (default: runs/NAME).")]  # noqa: UP045
OnDevice = Annotated[Optional[Device], typer.Option(help="Default: cuda if available.")]  # noqa: UP045

_STOPPED = 128 + signal.SIGINT

app = typer.Typer(
    name="compress-lm",
    help="Compress GPT-2, Llama, BART and mBART models with a recipe: prune, distil, quantize, export, measure.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> NoReturn:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(_exit_code())


def _exit_code() -> int:
    try:
        code = app(standalone_mode=False) or 0
    except TyperException as error:
        return _report_once(getattr(error, "format_message", error.__str__)(), UserError.exit_code)
    except Exception as error:
        if (failure := explained(error)) is None:
            raise
        return _report_once(*failure)
    if code == _STOPPED:
        _report_once("stopped; run the same command again to continue", code)
    return int(code)


def _report_once(text: str, code: int) -> int:
    """Only the first process of each machine reports an error, because every process meets the same one.

    The other processes exit with 0, because a launcher ends the first one if another fails before it has reported.
    """
    return 0 if processes.local_rank() else _report(text, code)


def _report(text: str, code: int) -> int:
    line = " ".join(text.split())
    typer.echo(line if code == _STOPPED else f"error: {line}", err=True)
    return code


def _interrupt(_signal: int, frame: FrameType | None) -> None:
    """Stop as cleanly for a scheduler's SIGTERM as for Ctrl-C, also in the background, where Ctrl-C is ignored."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


def console() -> Console:
    """Return standard output. When written to a file, lines of text have 140 columns."""
    screen = Console()
    return screen if screen.is_terminal else Console(width=140)


def show(screen: Console, found: Table) -> None:
    """Print a table of numbers. Outside a terminal, it is printed at its full width."""
    from compress.measure.table import width

    (screen if screen.is_terminal else Console(width=max(width(found, screen), screen.width))).print(found)


def show_records(screen: Console, records: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of measured values. A terminal that is too narrow shows its first columns, none of them cut."""
    from compress.measure.table import fit, records_table, width

    shown = records_table(records)
    if not screen.is_terminal:
        show(screen, shown)
        return
    needed = width(shown, screen)
    left_out = fit(shown, screen)
    screen.print(shown)
    if left_out:
        screen.print(f"[dim]{left_out} more columns in a window of {needed} characters[/dim]", highlight=False)


def _version(asked: bool) -> None:
    if asked:
        from compress import __version__

        typer.echo(f"compress-lm {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def check(recipe: RecipeFile, workdir: Workdir = None, settings: Settings = None) -> None:
    """Find all mistakes that can be found without training, and show what a run would do."""
    from compress.cli.tables import cut_rows, plan_table
    from compress.pipeline import Inputs, default_workdir, make_plan
    from compress.recipe import read_recipe

    read = read_recipe(recipe, settings or ())
    screen = console()
    plan = make_plan(Inputs(read, workdir or default_workdir(read)))
    show(screen, plan_table(plan))
    for line in cut_rows(plan):
        screen.print(line, highlight=False, soft_wrap=True)
    screen.print(f"[green]✓[/green] {escape(str(recipe))} is valid", highlight=False, soft_wrap=True)


@app.command()
def run(recipe: RecipeFile, workdir: Workdir = None, device: OnDevice = None, settings: Settings = None) -> None:
    """Run a recipe. Finished results are reused, and interrupted stages continue."""
    from compress.distributed.collectives import leave
    from compress.pipeline import run as run_recipe
    from compress.recipe import read_recipe
    from compress.report import build, slow_exports

    screen = console()
    done = run_recipe(read_recipe(recipe, settings or ()), workdir, device=device, console=screen)
    leave()
    if processes.is_main():
        build([done.workdir], done.workdir)
        show_records(screen, done.records)
        for line in slow_exports(done.workdir):
            screen.print(f"[yellow]{escape(line)}[/yellow]", highlight=False, soft_wrap=True)
        _say_report(screen, done.workdir)


@app.command()
def report(
    workdirs: Annotated[list[Path], typer.Argument(metavar="WORKDIR...", help="Several are compared.")],
    out: Annotated[Optional[Path], typer.Option(help="Default: WORKDIR, or ./comparison for several.")] = None,  # noqa: UP045
) -> None:
    """Write report.md, report.html and report.json from finished runs, without loading a model."""
    from compress.report import build

    place = out or (workdirs[0] if len(workdirs) == 1 else Path("comparison"))
    build(workdirs, place)
    _say_report(console(), place)


def _say_report(screen: Console, place: Path) -> None:
    name = escape(str(place / "report.html"))
    screen.print(f"report: [bold]{name}[/bold] (and .md, .json)", highlight=False, soft_wrap=True)


@app.command()
def bench(
    artifacts: Artifacts,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Number of prompt tokens.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    threads: Annotated[Optional[int], typer.Option(min=1, max=1024, help="Default: all cores.")] = None,  # noqa: UP045
    rounds: Annotated[int, typer.Option(min=1, help="How many times each model decodes.")] = 10,
    device: OnDevice = None,
) -> None:
    """Compare the speed of models in one interleaved run.

    Times are medians and 95th percentiles. "faster" shows how many times as fast as the first model each model is. The
    floor is the time this machine needs to read the weights of one token from memory.
    """
    from compress.cli.bench import bench_models

    settings = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        "threads": threads,
        "rounds": rounds,
    }
    screen = console()
    show_records(screen, bench_models(artifacts, settings, device, screen))


@app.command()
def generate(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A model directory.")],
    prompt: Annotated[str, typer.Option(help="Text to continue (GPT-2, Llama) or to respond to (BART, mBART).")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0 always takes the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    num_beams: Annotated[int, typer.Option(min=1, max=1024, help="Number of beams; 1 means no beam search.")] = 1,
) -> None:
    """Continue a prompt or respond to it with a model directory, torch or ONNX."""
    from compress.cli.generate import Request, texts

    for text in texts(artifact, Request(prompt, max_new_tokens, temperature, seed, num_beams)):
        typer.echo(text, nl=False)
    typer.echo()


@app.command(name="list")
def list_names() -> None:
    """List all stages, loss terms, measurements and metrics that a recipe can use."""
    from compress.cli.describe import overview

    console().print(overview())


@app.command()
def describe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A stage, term, measurement or metric, or 'recipe'.")],
    json_schema: Annotated[bool, typer.Option("--json-schema", help="Print a JSON schema.")] = False,
) -> None:
    """Show the fields, defaults and meaning of a stage, term, measurement, metric or recipe."""
    from compress.cli.describe import description, schema

    if json_schema:
        typer.echo(schema(name))
    else:
        console().print(description(name))
