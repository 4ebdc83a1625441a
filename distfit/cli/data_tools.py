"""`distfit data inspect`, `verify` and `index`: what a data set holds, whether it is whole, where its records lie."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from distfit.cli.frame import say_now
from distfit.errors import RUN_EXIT_CODE, InputError, nearest

if TYPE_CHECKING:
    from distfit.data.inspect.found import Data

DataSet = Annotated[
    list[str], typer.Argument(metavar="DATA...", help="A folder, a pattern in quotes, or TFRecord files.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


def inspect(
    data: DataSet,
    ranks: Annotated[int, typer.Option(metavar="N", min=1, help="Show what each of N ranks takes of an epoch.")] = 1,
    batch_size: Annotated[
        int, typer.Option(metavar="RECORDS", min=1, help="Of a step over all ranks: the global batch.")
    ] = 32,
    split: Annotated[str | None, typer.Option(metavar="NAME", help="This split alone, such as train.")] = None,
    sheet: Annotated[
        str | None,
        typer.Option(metavar="PNG", help="Draw 36 random images of the split (train, if not named) with their labels."),
    ] = None,
    sheet_seed: Annotated[int, typer.Option(metavar="SEED", min=0, help="Draws others.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what a data set holds, and how a job reads it.

    Of each split: files, records, bytes, features, images, classes, the steps of an epoch and what each rank takes of
    it. Features and images are those of all records up to 256 MiB and 200,000 records, else of 1,000 random ones.

    \b
    Example:
      distfit data inspect data/pictures --ranks 8 --batch-size 256
      distfit data inspect "data/pictures/train-*" --sheet train.png
    """
    from distfit.data.inspect.found import find_data
    from distfit.data.inspect.summary import summarize
    from distfit.data.inspect.text import as_json as json_of
    from distfit.data.inspect.text import summary_text
    from distfit.monitor.counting import shown

    found = _only(find_data(data), split)
    summary = summarize(found, ranks=ranks, batch_size=batch_size, count=shown)
    if sheet is not None:
        _draw(found, sheet, sheet_seed)
    say_now(json_of(summary, sheet=sheet) if as_json else summary_text(summary))
    if sheet is not None and not as_json:
        say_now(f"\n{sheet}: a sheet of {summary.splits[0].name}")


def verify(
    data: DataSet,
    jobs: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Processes; by default one a core, fewer for less than 100 MB each."),
    ] = None,
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Hold labels against the classes.")] = True,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image, not only its header.")] = False,
    show_all: Annotated[bool, typer.Option("--all", help="List all that is bad, not only the first 20.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check every byte of a data set, and list what is bad by file, record and offset.

    Checked are all lengths and checksums, that each record is a tf.train.Example, and the header of each image; where
    there is a dataset.json also features, labels and the numbers of records. What follows damage is checked too,
    where it can be found. The exit code is 0 when nothing is bad and 1 when something is.

    \b
    Example:
      distfit data verify data/pictures
      distfit data verify "data/pictures/train-*" --decode --json > bad.json
    """
    from distfit.data.inspect.found import find_data
    from distfit.data.inspect.text import MOST_BAD, verdict_text
    from distfit.data.inspect.text import as_json as json_of
    from distfit.data.inspect.verify import verify as verified
    from distfit.install.process import ended_through_finally
    from distfit.monitor.counting import shown

    with ended_through_finally():
        verdict = verified(find_data(data, whole=False), jobs=jobs, labels=labels, decode=decode, count=shown)
    say_now(json_of(verdict) if as_json else verdict_text(verdict, None if show_all else MOST_BAD))
    if verdict.bad:
        raise typer.Exit(RUN_EXIT_CODE)


def index(
    data: DataSet,
    force: Annotated[bool, typer.Option("--force", help="Scan all files, whatever is known of them.")] = False,
) -> None:
    """Find out where every record lies, before a run does.

    It is kept beside the data, or in the user's cache where that cannot be written. Files that have not changed are
    not scanned again. Of compressed files, which are read as streams, the records are counted.

    \b
    Example:
      distfit data index data/pictures
      distfit data index "/mnt/data/train-*" --force
    """
    from distfit.data.inspect.found import find_data
    from distfit.data.inspect.indexing import index_text, indexed
    from distfit.install.process import ended_through_finally
    from distfit.monitor.counting import shown

    with ended_through_finally():
        for split, files in find_data(data).splits.items():
            say_now(f"{split}: {index_text(indexed(files, fresh=force, count=shown))}")


def _only(data: "Data", split: str | None) -> "Data":
    """The data with one of its splits alone, if one was named."""
    import dataclasses

    if split is None:
        return data
    if split not in data.splits:
        raise InputError(
            f"Expected a split of {data.name!r}, received {split!r}; {nearest(split, sorted(data.splits))}"
        )
    return dataclasses.replace(data, splits={split: data.splits[split]})


def _draw(data: "Data", out: str, seed: int) -> None:
    """Writes the sheet of the first split."""
    from distfit.data.inspect.records_of import records_of
    from distfit.data.inspect.sheet import draw_sheet
    from distfit.data.inspect.summary import in_order
    from distfit.data.records import whole_file

    name, files = next(iter(in_order(data).items()))
    classes = data.description.classes if data.description else ()
    drawn = draw_sheet(records_of(files), title=f"{name} of {data.name}", names=classes, seed=seed)
    try:
        with whole_file(os.path.realpath(out)) as file:
            file.write(drawn)
    except OSError as error:
        raise InputError(
            f"Expected a file that can be written at {out!r}, received: {error.strerror}. Choose another."
        ) from error
