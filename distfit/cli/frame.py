"""What all commands share: how a group of commands looks, and how an error becomes a paragraph and an exit code."""

import os
import sys
import time
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from distfit.errors import INTERRUPTED_EXIT_CODE, DistfitError, InputError
from distfit.topology import Topology, from_environment

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


def command_line(help: str, *examples: str) -> typer.Typer:
    """The whole command line: handles errors, takes the options of every command."""
    app = group(help, *examples, cls=_Plain, name="distfit", add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_options)
    return app


def group(help: str, *examples: str, **more: Any) -> typer.Typer:
    """Commands under one word, its help ended by examples."""
    # \b keeps the lines of an example apart.
    text = "\n".join([help, "", "\b", "Example:", *(f"  {line}" for line in examples)])
    return typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None, **more)


def say_now(line: str) -> None:
    """Print a line that is seen at once, also in a log file."""
    print(line, flush=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        installed = [found.version for found in metadata.distributions(name="distfit")]
        print(f"distfit {installed[0] if installed else '(a source folder, not installed)'}")
        raise typer.Exit


def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Options of every command; `_Plain` and `_show_version` read them."""


def _tell(error: DistfitError) -> None:
    """One paragraph, from one rank; most errors are everybody's."""
    here = place()
    if here.is_chief:
        print(f"distfit: error: {error}", file=sys.stderr, flush=True)
        return
    time.sleep(CHIEF_FIRST_S)
    if not error.agreed:
        print(f"distfit: error: on rank {here.rank} of {here.size} ({here.host}): {error}", file=sys.stderr, flush=True)


def place() -> Topology:
    """This process's place in the job, as the launcher's variables say."""
    try:
        return from_environment(os.environ)
    except InputError:
        # The launcher's variables are what is wrong, and what the error is about: every rank speaks.
        return Topology()
