"""The command `distfit`.

    distfit train CONFIG.yaml key=value ...
    distfit data build --from digits OUT
    distfit horovod install

A command imports what it needs when it runs, so that `distfit --help` loads neither TensorFlow nor Keras.
Errors that a person can act on are one paragraph on standard error, in a job of several ranks once; `--debug`
adds the traceback. Exit codes: 0, those of `distfit.errors`, 2 for a wrong command line, 130 for Ctrl-C.
"""

import os
import sys
import time
import traceback
from enum import StrEnum
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from distfit.errors import DistfitError, InputError

INTERRUPTED_EXIT_CODE = 130
# mpirun ends the others as soon as one rank has left, so the chief's words have to come first. A rank that
# is still there after this and met its error alone has something to tell.
CHIEF_FIRST_S = 3.0


class _Plain(TyperGroup):
    """The one place where errors of all commands become a paragraph and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DistfitError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            _tell(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            print("distfit: interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED_EXIT_CODE) from None


# \b keeps the lines of an example apart.
app = typer.Typer(
    cls=_Plain,
    name="distfit",
    help="Distributed training for Keras 3: the same training on one process, a node or a cluster.\n\n"
    "\b\nExample:\n  distfit data build --from digits data/digits\n"
    "  distfit train configs/digits.yaml epochs=5",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(
    help="Build data sets of TFRecord shards.\n\n\b\nExample:\n  distfit data build --from digits data/digits",
    no_args_is_help=True,
    rich_markup_mode=None,
)
horovod_app = typer.Typer(
    help="Horovod, for jobs of several ranks.\n\n\b\nExample:\n  distfit horovod install",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")
app.add_typer(horovod_app, name="horovod")


class BuiltIn(StrEnum):
    """Data sets that `distfit data build` knows."""

    digits = "digits"


def main() -> None:
    """What the command `distfit` runs."""
    # TensorFlow reads it when it is imported; its notes on this machine's CPU would come from every rank.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app(prog_name="distfit")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        installed = [found.version for found in metadata.distributions(name="distfit")]
        print(f"distfit {installed[0] if installed else '(a source folder, not installed)'}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Options of every command; `_Plain` and `_show_version` read them."""


@app.command()
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The run's configuration, a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Replaces a field: a dotted name and a YAML value."),
    ] = None,
) -> None:
    """Train what a configuration describes, on this process or as one rank of many.

    \b
    Example:
      distfit train configs/digits.yaml epochs=5 optimizer.learning_rate=0.01
      mpirun -np 2 distfit train configs/digits.yaml run_dir=runs/two
    """
    from distfit.config import load

    run = load(config, overrides or [])
    # As `python -m` does: `model: mine:build` finds mine.py in the current folder.
    sys.path.insert(0, os.getcwd())
    from distfit import experiment

    experiment.train(run)


@data_app.command()
def build(
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to make.")],
    source: Annotated[BuiltIn, typer.Option("--from", help="Where the images come from.")],
    seed: Annotated[int, typer.Option(min=0, help="Decides the split and the order of records.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a data set that is there.")] = False,
) -> None:
    """Write labelled images into TFRecord shards with a dataset.json beside them.

    \b
    Example:
      distfit data build --from digits data/digits
    """
    from distfit.data.build import build_digits

    built = {BuiltIn.digits: build_digits}[source](out, seed=seed, force=force)
    counts = ", ".join(f"{split.records} {name}" for name, split in built.splits.items())
    print(f"{out}: {counts} records of {len(built.classes)} classes.")


@horovod_app.command()
def install(
    force: Annotated[bool, typer.Option("--force", help="Build anew, whatever is there.")] = False,
) -> None:
    """Build Horovod for this Python environment, or take it from the cache.

    \b
    Example:
      distfit horovod install
    """
    from distfit.install import horovod

    horovod.install(force=force, say=_say_now)


def _say_now(line: str) -> None:
    print(line, flush=True)


def _tell(error: DistfitError) -> None:
    """One paragraph, from one rank; most errors are everybody's."""
    rank, size, host = _place()
    if rank == 0:
        print(f"distfit: error: {error}", file=sys.stderr, flush=True)
        return
    time.sleep(CHIEF_FIRST_S)
    if not error.agreed:
        print(f"distfit: error: on rank {rank} of {size} ({host}): {error}", file=sys.stderr, flush=True)


def _place() -> tuple[int, int, str]:
    from distfit.topology import Topology, from_environment

    try:
        place = from_environment(os.environ)
    except InputError:
        # The launcher's variables are what is wrong, and what the error is about: every rank speaks.
        place = Topology()
    return place.rank, place.size, place.host
