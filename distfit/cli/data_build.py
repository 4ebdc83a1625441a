"""`distfit data build`: images, lists of them, or a small set of scikit-learn's into TFRecord shards."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

import typer

from distfit.cli.frame import INTERRUPTED_EXIT_CODE, say_now
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
Csv = Annotated[
    str | None,
    _option(
        help="Build from images that a CSV file lists: columns image, label and, if it has one, split.", metavar="FILE"
    ),
]
Manifest = Annotated[
    str | None,
    _option(help="Build from JSON lines: several files a record, numbers and texts.", metavar="FILE"),
]
ImageRoot = Annotated[
    str | None, _option(help="What paths in the file are relative to; by default the file's folder.", metavar="DIR")
]
ColumnNames = Annotated[
    str | None, _option(help="Columns of the CSV file by other names.", metavar="IMAGE,LABEL[,SPLIT]")
]
Delimiter = Annotated[
    str | None, _option(help="Between its columns; by default the one that its first line has.", metavar="SIGN")
]
Classes = Annotated[
    str | None,
    _option(help="The classes of the file in order, one a line; by default those it has, sorted.", metavar="FILE"),
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
    _option(help="The share of each class for validation; 0.2 where the source is not split.", metavar="FRACTION"),
]
Shards = Annotated[
    int | None,
    _option(help="Files of training records; by default one for each 128 MiB, 8 at least.", metavar="N"),
]
ValidationShards = Annotated[
    int | None,
    _option(help="Files of validation records; by default one for each 128 MiB, 2 at least.", metavar="N"),
]
ShardSize = Annotated[
    str | None, _option(help="The size of a file instead of their number, such as 64MiB or 1GB.", metavar="SIZE")
]
MaxSide = Annotated[
    int | None,
    _option(help="Shrink images whose longer side has more pixels, and store them as JPEG.", metavar="PIXELS", least=1),
]
Quality = Annotated[int | None, _option(help="Of those JPEGs, 1 to 100; 90 by default.", metavar="N")]
Threads = Annotated[
    int | None, _option(help="That check and write; by default the cores and four more.", metavar="N", least=1)
]
SkipBad = Annotated[
    bool, _option("--skip-bad", help="List and leave out what is no whole image, instead of refusing it.")
]
Force = Annotated[bool, _option("--force", help="Replace a data set that is there.")]
Fresh = Annotated[bool, _option("--fresh", help="Do not go on with a build that was interrupted.")]

# The keyword of each origin of records, and the options that belong to some of them only.
_ORIGINS = {"images": "--images", "csv": "--csv", "manifest": "--manifest", "source": "--from"}
_LISTED = ("images", "csv", "manifest")
_ONLY_WITH = {
    "validation_images": ("images",),
    "image_root": ("csv", "manifest"),
    "columns": ("csv",),
    "delimiter": ("csv",),
    "classes": ("csv", "manifest"),
    "max_side": _LISTED,
    "quality": _LISTED,
    "skip_bad": _LISTED,
    "fresh": _LISTED,
}


def build(
    ctx: typer.Context,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to make.")],
    images: Images = None,
    validation_images: ValidationImages = None,
    csv: Csv = None,
    manifest: Manifest = None,
    image_root: ImageRoot = None,
    columns: ColumnNames = None,
    delimiter: Delimiter = None,
    classes: Classes = None,
    source: From = None,
    seed: Seed = 0,
    validation_fraction: Fraction = None,
    shards: Shards = None,
    validation_shards: ValidationShards = None,
    shard_size: ShardSize = None,
    max_side: MaxSide = None,
    quality: Quality = None,
    threads: Threads = None,
    skip_bad: SkipBad = False,
    force: Force = False,
    fresh: Fresh = False,
) -> None:
    """Write labelled records into TFRecord shards with a dataset.json beside them.

    Every image is decoded first. What is no whole image is listed and refused, and nothing is written. The
    split is stratified; with the same seed it is the same, to the bytes of the files. After Ctrl-C or a crash
    the same command goes on where it stopped.

    \b
    Example:
      distfit data build --images 256_ObjectCategories data/caltech256 --skip-bad
      distfit data build --images net/train --validation-images net/val data/net --max-side 512
      distfit data build --csv labels.csv --image-root pictures data/birds
      distfit data build --from digits data/digits
    """
    from distfit.install.process import ended_through_finally

    given = {name: value for name, value in ctx.params.items() if value is not None and value is not False}
    origin = _origin(given)
    with ended_through_finally(), _told_how_to_go_on(out):
        built = _built(origin, given)
    _tell(out, built)


def parse_bytes(text: str) -> int:
    """A number of bytes, with a unit or without.

    >>> parse_bytes("128MiB"), parse_bytes("1.5 GB"), parse_bytes("4096")
    (134217728, 1500000000, 4096)

    Raises:
        InputError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", text.strip().lower())
    if not found:
        raise InputError(f"Expected a size such as 128MiB or 1GB, received {text!r}.")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("kmgt".index(unit) + 1 if unit else 0))


def _origin(given: dict[str, Any]) -> str:
    """Where the records come from; refuses options that belong to another origin."""
    named = [origin for origin in _ORIGINS if origin in given]
    if len(named) != 1:
        received = " and ".join(_ORIGINS[origin] for origin in named) or "none"
        raise InputError(
            "Expected one origin of the records, --images DIR, --csv FILE, --manifest FILE or --from NAME, received "
            f"{received}. Pass one of them: `distfit data build --images DIR OUT`."
        )
    for option, origins in _ONLY_WITH.items():
        if option in given and named[0] not in origins:
            words = " or ".join(_ORIGINS[origin] for origin in origins)
            raise InputError(
                f"Expected --{option.replace('_', '-')} with {words}, received it with {_ORIGINS[named[0]]}. "
                "Leave it out."
            )
    return named[0]


def _built(origin: str, given: dict[str, Any]) -> Any:
    from distfit.data import build as data
    from distfit.monitor.counting import shown

    named, out = given[origin], given["out"]
    options = {name: value for name, value in given.items() if name not in (origin, "out", "shard_size")}
    options["count"] = shown
    if "shard_size" in given:
        options["shard_bytes"] = parse_bytes(given["shard_size"])
    if "columns" in given:
        options["columns"] = data.Columns.parse(given["columns"])
    if named is BuiltIn.digits:
        return data.build_digits(out, **options)
    if origin == "source":
        return data.build_table(named.value, out, **options)
    builders: dict[str, Any] = {"images": data.build_images, "csv": data.build_csv, "manifest": data.build_manifest}
    return builders[origin](named, out, **options)


@contextlib.contextmanager
def _told_how_to_go_on(out: str) -> Iterator[None]:
    """After Ctrl-C and SIGTERM one line says what is left and what to do with it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        from distfit.data.build.whole_folder import work_folder_of

        if not os.path.isdir(work_folder_of(out)):
            raise
        print(
            "distfit: interrupted; the same command goes on from here (--fresh starts anew). What is done lies in "
            f"{work_folder_of(out)!r}.",
            file=sys.stderr,
            flush=True,
        )
        if isinstance(stop, SystemExit):
            raise
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None


def _tell(out: str, built: Any) -> None:
    counts = ", ".join(f"{split.records} {name}" for name, split in built.splits.items())
    say_now(f"{out}: {counts} records of {len(built.classes)} classes.")
    for name, split in built.splits.items():
        without = split.per_class.count(0)
        if without:
            say_now(f"{without} of them without a {name} record.")
