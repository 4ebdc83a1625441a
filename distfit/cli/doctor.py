"""`distfit doctor`: what somebody needs before asking for help."""

import shutil
from typing import Annotated

import typer

from distfit.cli.frame import place


def doctor(
    run_dir: Annotated[
        str, typer.Option("--run-dir", metavar="DIR", help="Try this folder's disk: one that a run would write to.")
    ] = "runs",
    ranks: Annotated[
        bool, typer.Option("--ranks/--no-ranks", help="Whether jobs of several ranks are to run here.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
    limit_s: Annotated[
        float, typer.Option("--limit-s", metavar="SECONDS", min=1, help="When a part that does not answer has failed.")
    ] = 17.0,
) -> None:
    """Examine this machine and this environment, start two ranks, and say what to mend.

    Takes less than 20 seconds. Each line is ok, warning (it works, but not everywhere or not as well) or failure,
    with the remedy below it. The exit code is 1 with a failure and 0 without; warnings do not count.

    \b
    Example:
      distfit doctor --run-dir runs/mine
      distfit doctor --json > report.json
    """
    from distfit.doctor.examine import examine
    from distfit.install.process import ended_through_finally

    if not place().is_chief:
        return  # in a job one rank examines and prints
    with ended_through_finally():
        report = examine(run_dir, ranks, limit_s)
    columns = shutil.get_terminal_size((100, 24)).columns  # of a file or a launcher's pipe: 100
    print(report.as_json() if as_json else report.as_text(columns), flush=True)
    raise typer.Exit(report.exit_code)
