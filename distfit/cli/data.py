"""`distfit data ...`: data sets of TFRecord shards."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from distfit.cli.frame import say_now
from distfit.errors import InputError


class BuiltIn(StrEnum):
    """Data sets that `distfit data build` knows."""

    digits = "digits"
    wine = "wine"
    breast_cancer = "breast-cancer"


def _option(*names: str, help: str, metavar: str | None = None, least: int | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, min=least)


Images = Annotated[
    str | None,
    _option(
        help="Build from images: DIR holds a folder for each class. JPEG, PNG, GIF, BMP and WebP are kept as they are.",
        metavar="DIR",
    ),
]
ValidationImages = Annotated[
    str | None, _option(help="The same for validation, where its images are apart already.", metavar="DIR")
]
From = Annotated[
    BuiltIn | None,
    _option(
        "--from", help="Build a small set of scikit-learn's: digits (images), or the tables wine or breast-cancer."
    ),
]
Seed = Annotated[int, _option(help="Decides the split and the order of records.", least=0)]
Fraction = Annotated[
    float | None,
    _option(
        help="The share of each class for validation; 0.2 unless there are --validation-images.", metavar="FRACTION"
    ),
]
Shards = Annotated[
    int | None,
    _option(help="Files of training records; by default one for each 128 MiB, 8 at least.", metavar="N"),
]
ValidationShards = Annotated[
    int | None,
    _option(help="Files of validation records; by default one for each 128 MiB, 2 at least.", metavar="N"),
]
SkipBad = Annotated[
    bool, _option("--skip-bad", help="List and leave out what is no whole image, instead of refusing it.")
]
Force = Annotated[bool, _option("--force", help="Replace a data set that is there.")]


def build(
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to make.")],
    images: Images = None,
    validation_images: ValidationImages = None,
    source: From = None,
    seed: Seed = 0,
    validation_fraction: Fraction = None,
    shards: Shards = None,
    validation_shards: ValidationShards = None,
    skip_bad: SkipBad = False,
    force: Force = False,
) -> None:
    """Write labelled records into TFRecord shards with a dataset.json beside them.

    Every image is decoded first. What is no whole image is listed and refused, and nothing is written. The
    split is stratified; with the same seed it is the same, to the bytes of the files.

    \b
    Example:
      distfit data build --images 256_ObjectCategories data/caltech256 --skip-bad
      distfit data build --images net/train --validation-images net/val data/net
      distfit data build --from digits data/digits
    """
    from distfit.data import build as data
    from distfit.install.process import ended_through_finally
    from distfit.monitor.counting import shown

    _check_origin(images, validation_images, source, skip_bad)
    arguments: dict[str, Any] = {
        "seed": seed,
        "shards": shards,
        "validation_fraction": validation_fraction,
        "validation_shards": validation_shards,
        "force": force,
        "count": shown,
    }
    with ended_through_finally():
        if source is None:
            arguments |= {"validation_images": validation_images, "skip_bad": skip_bad}
            built = data.build_images(str(images), out, **arguments)
        elif source is BuiltIn.digits:
            built = data.build_digits(out, **arguments)
        else:
            built = data.build_table(source.value, out, **arguments)
    _tell(out, built)


def _check_origin(images: str | None, validation_images: str | None, source: BuiltIn | None, skip_bad: bool) -> None:
    """Refuses options that belong to another origin of the records than the one that was named."""
    if (images is None) == (source is None):
        raise InputError(
            "Expected one origin of the records, --images DIR or --from NAME, received "
            f"{'none' if images is None else 'both'}. Pass one of them: `distfit data build --images DIR OUT`."
        )
    if source is not None and (validation_images is not None or skip_bad):
        option = "--skip-bad" if validation_images is None else "--validation-images"
        raise InputError(f"Expected {option} with --images, received it with --from {source}. Leave it out.")


def _tell(out: str, built: Any) -> None:
    counts = ", ".join(f"{split.records} {name}" for name, split in built.splits.items())
    say_now(f"{out}: {counts} records of {len(built.classes)} classes.")
    for name, split in built.splits.items():
        without = split.per_class.count(0)
        if without:
            say_now(f"{without} of them without a {name} record.")
