"""The command line: reads, calls, prints.

Results go to standard output, progress to standard error. Exit status 0: good; 1: a finding, or a
failure of the work; 2: wrong usage.
"""

import errno
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import click

from autoshard import __version__
from autoshard.errors import AutoshardError, PlanFileError, UsageError
from autoshard.model.keras_import import PLANNING_ONLY
from autoshard.model.workload import DEFAULT_OPTIMIZER, DEFAULT_SEQ_LEN, DTYPES, OPTIMIZERS

__all__ = ["chips", "check", "compare", "explain", "inspect", "main", "models", "plan", "verify"]

_DTYPE_HELP = f"Keras dtype policy: {', '.join(DTYPES)}. [default: bfloat16, or what the model has]"


class _Group(click.Group):
    """Turns the package's errors into one line and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AutoshardError as error:
            click.echo(f"autoshard: {error}", err=True)
            ctx.exit(error.exit_status)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            click.echo(f"autoshard: cannot write the result: {error.strerror}", err=True)
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="autoshard")
def main() -> None:
    """Find the LayoutMap that runs a Keras model fastest on a device mesh.

    MODEL is a preset name (see `autoshard models`), package.module:callable, a local preset
    directory, a .keras or config.json file, or a kaggle:// or hf:// handle.
    """
    # An installed script does not look for modules in the folder it is called from.
    with suppress(FileNotFoundError):  # of a folder that was deleted
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())


def _step_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which step on which devices; their defaults are those of `plan`."""
    for option in reversed(
        (
            click.option("--axes", help="Names of the mesh axes, data axis first, with commas."),
            click.option(
                "--target",
                help="Chips, like tpu:v5e:2x4, tpu:v6e, or attached. [default: tpu:v5e]",
            ),
            click.option(
                "--slices", type=click.IntRange(min=1), help="So many of the target, in a network."
            ),
            click.option(
                "--workload",
                default="train",
                show_default=True,
                help="The step: train, lora, prefill or decode.",
            ),
            click.option(
                "--batch",
                type=click.IntRange(min=1),
                help="Sequences in all. [default: 8, or the next multiple of the data axis]",
            ),
            click.option(
                "--seq-len",
                type=click.IntRange(min=1),
                default=DEFAULT_SEQ_LEN,
                show_default=True,
                help="Tokens each.",
            ),
            click.option(
                "--lora-rank", type=click.IntRange(min=1), help="Rank of the low-rank factors."
            ),
            click.option("--dtype", help=_DTYPE_HELP),
            click.option(
                "--optimizer",
                default=DEFAULT_OPTIMIZER,
                show_default=True,
                help=f"Keras optimizer: {', '.join(OPTIMIZERS)}.",
            ),
            click.option(
                "--memory-limit", help="Memory a device, like 15GiB. [default: the chip's]"
            ),
        )
    ):
        command = option(command)
    return command


def _format_option(*forms: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """How the result is printed; the first is the default."""
    return click.option(
        "--format", "form", type=click.Choice(forms), default=forms[0], show_default=True
    )


@main.command()
@click.argument("model")
@click.option("--mesh", help="Devices along each axis, like 1x8.")
@click.option(
    "--devices", type=click.IntRange(min=1), help="Instead of --mesh: choose the mesh's shape too."
)
@_step_options
@click.option(
    "--no-generate",
    "generate",
    flag_value=False,
    default=True,
    help="Take a faster layout under which fit and predict run, but not generate.",
)
@click.option(
    "--top", type=click.IntRange(min=1), default=5, show_default=True, help="Layouts to rank."
)
@click.option(
    "--verify",
    type=click.Choice(["none", "cpu", "target"]),
    default="cpu",
    show_default=True,
    help="Compile the best few: with XLA's partitioner on CPU, or the target's own compiler.",
)
@_format_option("text", "json", "python")
@click.option("--timings", is_flag=True, help="Add the seconds of each stage.")
@click.option("-o", "--output", help="Write the plan file here, also one that is not verified.")
def plan(
    model: str,
    mesh: str | None,
    axes: str | None,
    form: str,
    timings: bool,
    output: str | None,
    **options: Any,
) -> None:
    """Find the fastest layout of MODEL on a mesh, and prove it with the compiler."""
    _set_backend()
    from autoshard.pipeline import make_plan
    from autoshard.report.plan import notes, plan_text

    if output is not None:
        _check_writable(output)
    with _progress() as announce:
        outcome = make_plan(model, mesh, axes=_names(axes), on_progress=announce, **options)
    try:
        if output:
            outcome.plan.save(output)
    finally:  # what was found is printed also where it cannot be written
        if form == "json":
            click.echo(outcome.plan.to_json(), nl=False)
        elif form == "python":
            click.echo(outcome.plan.to_python(), nl=False)
        else:
            click.echo(plan_text(outcome, timings=timings))
    if form != "text":
        for note in notes(outcome):
            click.echo(f"autoshard: {note}", err=True)
    if outcome.failure:
        click.echo(f"autoshard: the plan is not verified: {outcome.failure}", err=True)
    if not outcome.plan.fits:
        click.echo("autoshard: no layout fits the memory; this is the nearest", err=True)
    if outcome.failure or not outcome.plan.fits:
        sys.exit(1)


@main.command()
@click.argument("model")
@click.option("--layer", help="Only the variables under this layer, a line each.")
@click.option("--lora-rank", type=click.IntRange(min=1), help="Rank of low-rank factors to add.")
@click.option("--dtype", help=_DTYPE_HELP)
@_format_option("text", "json", "csv", "markdown")
def inspect(
    model: str, layer: str | None, lora_rank: int | None, dtype: str | None, form: str
) -> None:
    """Print the variable table of MODEL, built without its weights."""
    _set_backend()
    from autoshard.pipeline import inspect as read_table
    from autoshard.report.inspect import INSPECT_FORMATS, layer_text

    table = read_table(model, lora_rank=lora_rank, dtype=dtype)
    if layer is not None:
        table = table.under(layer)
        if form == "text":
            click.echo(layer_text(table.variables))
            return
    click.echo(INSPECT_FORMATS[form](table))


@main.command()
@click.argument("pattern", required=False)
def models(pattern: str | None) -> None:
    """List the presets of the catalogue, those with PATTERN in the name if given."""
    from autoshard.model import catalogue
    from autoshard.report.models import models_text

    click.echo(models_text(catalogue.find(pattern)))


@main.command()
@_format_option("text", "json")
def chips(form: str) -> None:
    """Print the chips that plans can be made for, with the sources of their numbers."""
    from autoshard.hardware.chips import known_chips
    from autoshard.report.chips import chips_json, chips_text

    click.echo((chips_json if form == "json" else chips_text)(known_chips()))


@main.command()
@click.argument("model")
@click.argument("layout")
@click.option("--mesh", help="Check axis names and divisibility against this mesh, like 1x8.")
@click.option("--axes", help="Names of the mesh axes, data axis first, joined by commas.")
@click.option("--seq-len", type=click.IntRange(min=1), help="As in plan, for layer outputs.")
@_format_option("text", "json")
def check(
    model: str, layout: str, mesh: str | None, axes: str | None, seq_len: int | None, form: str
) -> None:
    """Say what is wrong with a hand-written LAYOUT for MODEL.

    LAYOUT is a plan file, Python source with layout_map[...] = (...) lines (read, never run), or
    the word kerashub for the map that KerasHub ships.
    """
    _set_backend()
    from autoshard.checking import check as find
    from autoshard.report.check import findings_json, findings_text
    from autoshard.sharding_plan import Plan, plan_or_map

    given = plan_or_map(layout)
    found = find(model, given, mesh=mesh, axes=_names(axes), seq_len=seq_len)
    click.echo((findings_json if form == "json" else findings_text)(found))
    if mesh is None and not isinstance(given, Plan):
        click.echo("autoshard: axis names and divisibility are checked with --mesh", err=True)
    sys.exit(bool(found))


@main.command()
@click.argument("model")
@click.argument("layouts", metavar="LAYOUT...", nargs=-1, required=True)
@click.option("--mesh", required=True, help="Devices along each axis, like 1x8.")
@_step_options
@_format_option("text", "json")
def compare(
    model: str, layouts: tuple[str, ...], mesh: str, axes: str | None, form: str, **options: Any
) -> None:
    """Price LAYOUTs of MODEL side by side, and say what each spends its communication on.

    A LAYOUT is a plan file, Python source with layout_map[...] = (...) lines (read, never run), the
    word kerashub for the map that KerasHub ships, or autoshard for the one that `plan` finds.
    """
    _set_backend()
    from autoshard.comparison import compare as price
    from autoshard.report.compare import comparison_json, comparison_text

    with _progress() as announce:
        found = price(model, layouts, mesh, axes=_names(axes), on_progress=announce, **options)
    click.echo((comparison_json if form == "json" else comparison_text)(found))
    if any(layout.failure for layout in found.layouts) or found.layouts[0].excess_bytes:
        sys.exit(1)


@main.command()
@click.argument("plan_file", metavar="PLAN")
def explain(plan_file: str) -> None:
    """Say what to know of a PLAN file, and why each family of variables got its spec."""
    from autoshard.report.explanation import explanation_text
    from autoshard.sharding_plan import load

    click.echo(explanation_text(load(plan_file)))


@main.command()
@click.argument("layout")
@click.option("--model", help="The model of a LAYOUT that is no plan.")
@click.option("--mesh", help="Devices along each axis, like 1x8, of a LAYOUT that is no plan.")
@click.option("--axes", help="Names of the mesh axes, data axis first, joined by commas.")
@click.option("--target", help="cpu, tpu:v3:2x2, gpu:h100-sxm:8, attached. [default: a plan's own]")
@click.option("--workload", help="As in plan, of a LAYOUT that is no plan.")
@click.option("--batch", type=click.IntRange(min=1), help="As in plan.")
@click.option("--seq-len", type=click.IntRange(min=1), help="As in plan.")
@click.option("--lora-rank", type=click.IntRange(min=1), help="As in plan.")
@click.option("--dtype", help="As in plan.")
@click.option("--optimizer", help="As in plan.")
@click.option("--memory-limit", help="Memory a device, like 15GiB. [default: the chip's]")
@click.option(
    "--blocks",
    type=click.IntRange(min=1),
    help="Only so many periods of each stack of repeated blocks. [default: all]",
)
@click.option("--no-cache", is_flag=True, help="Ask the compiler again.")
@click.option(
    "--run",
    "runs",
    is_flag=True,
    help="Run it instead, on virtual CPU devices: predict, generate, fit, beside an unsharded run.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="With --run: processes that share the devices.",
)
@_format_option("text", "json")
def verify(
    layout: str,
    axes: str | None,
    no_cache: bool,
    runs: bool,
    processes: int,
    form: str,
    **options: Any,
) -> None:
    """Compile the step of LAYOUT with its target's own compiler, and say what that makes of it.

    LAYOUT is a plan file; with --model and --mesh also Python source with layout_map[...] = (...)
    lines (read, never run), or the word kerashub.
    """
    _set_backend()
    options["axes"] = _names(axes)
    if runs:
        if no_cache:
            raise UsageError("--no-cache is for a compile: leave it out, --run keeps no verdicts")
        _run(layout, processes, form, **options)
        return
    if processes > 1:
        raise UsageError("--processes is for --run: a compile needs one process")
    from autoshard.report.verify import verification_json, verification_text
    from autoshard.verification import verify as compile_step

    with _progress() as announce:
        found = compile_step(layout, cache=not no_cache, on_progress=announce, **options)
    click.echo((verification_json if form == "json" else verification_text)(found))
    if found.fits is False or found.wrong:
        sys.exit(1)


def _run(layout: str, processes: int, form: str, **options: Any) -> None:
    """The part of `verify` that runs a plan."""
    from autoshard.execution.running import run
    from autoshard.report.execution import run_json, run_text

    for name in ("target", "memory_limit"):
        if options.pop(name) is not None:
            option = name.replace("_", "-")
            raise UsageError(f"--run is on virtual CPU devices here: leave out --{option}")
    with _progress() as announce:
        found = run(layout, n_processes=processes, on_progress=announce, **options)
    click.echo((run_json if form == "json" else run_text)(found))
    if not found.passed:
        sys.exit(1)


def _names(axes: str | None) -> list[str] | None:
    return [name.strip() for name in axes.split(",")] if axes else None


def _set_backend() -> None:
    """Planning needs no accelerator; the choice must be made before keras and jax load."""
    os.environ["KERAS_BACKEND"] = "jax"
    os.environ[PLANNING_ONLY] = "1"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _check_writable(output: str) -> None:
    """Fail before the work, not after it."""
    from autoshard.sharding_plan import is_stream

    if not output:
        raise UsageError("the name of the output file is empty")
    path = Path(output)
    if path.suffix == ".py":
        raise UsageError(f"-o writes JSON: name it {path.stem}.json; source is printed")
    if os.path.isdir(path):
        raise PlanFileError(f"cannot write {output}: it is a directory")
    if not is_stream(path) and not os.access(path.absolute().parent, os.W_OK):
        raise PlanFileError(f"cannot write {output}: no such folder, or it is not writable")


def _progress() -> AbstractContextManager[Callable[[str], None]]:
    """A line on standard error that names the stage; a spinner where that is a terminal."""
    if not sys.stderr.isatty():
        return nullcontext(lambda stage: click.echo(f"{stage} ...", err=True))
    from autoshard.progress import spinner

    return spinner()
