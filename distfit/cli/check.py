"""`distfit check`: is a training the same on one device, on several, and on ranks?"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distfit.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

# Everything behind the script's name is the script's.
CONTEXT = {"allow_interspersed_args": False}

Target = Annotated[
    str, typer.Argument(metavar="TARGET", help="A script, a configuration (.yaml), or package.module:function.")
]
Arguments = Annotated[
    list[str] | None, typer.Argument(metavar="[ARGUMENT]...", help="The script's own; key=value of a configuration.")
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Of training, and of evaluation, in each run.")]
Devices = Annotated[
    str, typer.Option("--devices", metavar="N,...", help='How many logical devices to try; "" for none.')
]
Ranks = Annotated[str, typer.Option("--ranks", metavar="N,...", help='How many ranks to try; "" for none.')]
Float64 = Annotated[bool, typer.Option("--float64", help="Compute in float64, for a sharp answer.")]
Strict = Annotated[bool, typer.Option("--strict", help="Random layers and BatchNormalization are no excuse.")]
Limit = Annotated[float, typer.Option("--limit-s", metavar="SECONDS", min=1, help="When a run has hung and is ended.")]
Root = Annotated[
    bool, typer.Option("--allow-run-as-root", help="Let root start ranks with Open MPI, say in a container.")
]


def check(
    target: Target,
    arguments: Arguments = None,
    steps: Steps = 5,
    devices: Devices = "2,3",
    ranks: Ranks = "2,3",
    float64: Float64 = False,
    strict: Strict = False,
    limit_s: Limit = 300.0,
    allow_run_as_root: Root = False,
) -> None:
    """Train for a few steps alone, on logical devices and on ranks of this machine, and compare.

    Where an engine comes to another result, the runs are repeated without what cannot be equal, and the report says
    why. The exit code is 0 for the same training, also with BatchNormalization and random layers; 1 otherwise. Options
    come before TARGET.

    \b
    Example:
      distfit check train.py --epochs 90
      distfit check --devices 2 --ranks "" --float64 train.py
      distfit check configs/digits.yaml batch_size=60
      distfit check mypackage.jobs:arguments
    """
    from rich.console import Console

    from distfit.checking import check as examine
    from distfit.checking.report import WIDTH
    from distfit.install.process import ended_through_finally

    numbers = {"devices": _numbers("--devices", devices), "ranks": _numbers("--ranks", ranks)}
    with ended_through_finally(), _progress(Console(stderr=True)) as show:
        report = examine(
            target,
            arguments or (),
            steps=steps,
            **numbers,
            float64=float64,
            strict=strict,
            limit_s=limit_s,
            allow_run_as_root=allow_run_as_root,
            show=show,
        )
    console = Console()
    report.print(console if console.is_terminal else Console(width=WIDTH))
    raise typer.Exit(report.exit_code)


def _numbers(option: str, text: str) -> list[int]:
    """
    >>> _numbers("--ranks", "2, 3"), _numbers("--ranks", "")
    ([2, 3], [])
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"Expected {option} to be whole numbers separated by commas, received {text!r}.")
    return [int(part) for part in parts]


@contextmanager
def _progress(console: "Console") -> Iterator[Any]:
    """On a terminal a line for each run that is under way, with its seconds; elsewhere a line when one ends."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def show(run: str, ended: str | None) -> None:
            if ended is None:
                tasks[run] = bar.add_task(run, total=None)
            else:
                bar.remove_task(tasks.pop(run))
                console.print(f"{run}: {ended}", highlight=False, markup=False)

        yield show
