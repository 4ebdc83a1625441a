"""`distfit train`: what a configuration describes."""

import os
import sys
from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="The run's configuration, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Replaces a field: a dotted name and a YAML value."),
]


def train(config: Config, overrides: Overrides = None) -> None:
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
