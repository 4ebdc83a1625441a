"""`distfit train` and `distfit evaluate`: what a configuration describes."""

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from distfit.errors import RUN_EXIT_CODE

if TYPE_CHECKING:
    from distfit.config import RunConfig
    from distfit.experiment import Evaluation

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="The run's configuration, a YAML file.")]
MaybeConfig = Annotated[
    str | None, typer.Argument(metavar="CONFIG", help="The run's configuration, a YAML file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Replaces a field: a dotted name and a YAML value."),
]


def train(
    ctx: typer.Context,
    config: MaybeConfig = None,
    overrides: Overrides = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Two steps of everything in a folder that is removed, and a verdict.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of configurations, for editors, and exit.")
    ] = False,
) -> None:
    """Train what a configuration describes, on this process or as one rank of many.

    \b
    Example:
      distfit train configs/digits.yaml epochs=5 optimizer.learning_rate=0.01
      mpirun -np 2 distfit train configs/digits.yaml run_dir=runs/two
      distfit train --smoke configs/digits.yaml
      distfit train --schema > distfit.schema.json
    """
    if schema:
        if config is not None or smoke:
            ctx.fail("--schema stands alone: the schema is the same for every CONFIG.")
        _print_schema()
        return
    if config is None:
        ctx.fail("Missing argument 'CONFIG'.")
    run = _loaded(config, overrides)
    from distfit import experiment

    if not smoke:
        experiment.train(run)
        return
    verdict = experiment.smoke(run)
    _say(verdict.text())
    if not verdict.passed:
        raise typer.Exit(RUN_EXIT_CODE)


def evaluate(
    config: Config,
    overrides: Overrides = None,
    split: Annotated[
        str | None,
        typer.Option("--split", help="Of the data set; without it, the one that is validated on.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="A .keras file; without it, the run folder's.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON and nothing else.")] = False,
) -> None:
    """Evaluate a trained model, as training validates it: on this process or as one rank of many.

    \b
    Example:
      distfit evaluate configs/digits.yaml
      distfit evaluate configs/digits.yaml --split train --json
    """
    run = _loaded(config, overrides)
    from distfit import experiment

    found = experiment.evaluate(run, split, model, verbose=0 if as_json else run.verbose)
    _say(found.to_json() if as_json else _as_lines(found))


def _loaded(config: str, overrides: list[str] | None) -> "RunConfig":
    from distfit.config import load
    from distfit.keras_backend import refuse_others

    run = load(config, overrides or [])
    refuse_others(os.environ)
    # As `python -m` does: `model: mine:build` finds mine.py in the current folder.
    sys.path.insert(0, os.getcwd())
    return run


def _print_schema() -> None:
    import json

    from distfit.config import schema

    print(json.dumps(schema(), indent=2))


def _as_lines(found: "Evaluation") -> str:
    """The metrics below each other, with as many digits as a float32 has."""
    width = max(map(len, found.metrics)) + 2
    title = f"{found.model} on {found.records:,} records of {found.split}"
    return "\n".join([title, *(f"  {name:<{width}}{value:.7g}" for name, value in found.metrics.items())])


def _say(text: str) -> None:
    """On the chief: every rank has the same to say."""
    from distfit.session import init

    if init().is_chief:
        print(text, flush=True)
