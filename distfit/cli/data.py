"""`distfit data ...`: data sets of TFRecord shards."""

from enum import StrEnum
from typing import Annotated

import typer


class BuiltIn(StrEnum):
    """Data sets that `distfit data build` knows."""

    digits = "digits"


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
