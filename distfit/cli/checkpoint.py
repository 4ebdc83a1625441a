"""`distfit checkpoint ...`: what a run has kept, whether it is whole, how two states differ, and a model out of one."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distfit.cli.frame import say_now
from distfit.errors import RUN_EXIT_CODE, InputError

if TYPE_CHECKING:
    from distfit.checkpoint.folder import Checkpoints, Stored

# As diff(1): the two are not the same.
DIFFERENT_EXIT_CODE = 1
# Where `distfit train` puts the checkpoints of a run folder.
_OF_TRAIN = "checkpoint"

Run = Annotated[str, typer.Argument(metavar="RUN", help="The run's folder, as given to fit(checkpoint=...).")]
Step = Annotated[
    int | None, typer.Option("--step", metavar="N", min=0, help="Of the run; else the newest.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


def list_(run: Run, as_json: AsJson = False) -> None:
    """List a run's checkpoints: step, place, age, size, metrics, and which is the latest or damaged.

    Damage is seen here by names, sizes and manifests; `distfit checkpoint verify` reads every byte.

    \b
    Example:
      distfit checkpoint list runs/a
      distfit checkpoint list runs/a --json
    """
    import time

    from distfit.checkpoint.listing import listed, listing_text
    from distfit.checkpoint.tables import as_json as json_of

    listing = listed(_checkpoints(run, some=False))
    say_now(json_of(listing) if as_json else listing_text(listing, time.time()))


def verify(
    run: Run,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", min=0, help="This one alone.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read every byte of a run's checkpoints and hold it against their checksums.

    The exit code is 0 when all are whole and 1 when one is damaged.

    \b
    Example:
      distfit checkpoint verify runs/a
      distfit checkpoint verify runs/a --step 1200
    """
    from distfit.checkpoint.listing import verdict_text, verified
    from distfit.checkpoint.tables import as_json as json_of
    from distfit.monitor.counting import shown

    checkpoints = _checkpoints(run)
    verdict = verified(checkpoints, [_step_in(checkpoints, step)] if step is not None else None, shown)
    say_now(json_of(verdict) if as_json else verdict_text(verdict))
    if verdict.damaged:
        raise typer.Exit(RUN_EXIT_CODE)


def show(run: Run, step: Step = None, as_json: AsJson = False) -> None:
    """Show all that is in a checkpoint: place, seed, versions, fields, states of callbacks, and each tensor's numbers.

    \b
    Example:
      distfit checkpoint show runs/a
      distfit checkpoint show runs/a --step 1200 --json
    """
    import time

    from distfit.checkpoint.contents import contents, contents_text
    from distfit.checkpoint.tables import as_json as json_of

    found = contents(_stored(run, step))
    say_now(json_of(found) if as_json else contents_text(found, time.time()))


def diff(
    one: Annotated[str, typer.Argument(metavar="RUN_A[@STEP]", help="A run, or one step of it; else its newest.")],
    other: Annotated[str, typer.Argument(metavar="RUN_B[@STEP]", help="The other; @STEP alone is of the same run.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="Compare tensors alone, not the facts.")] = False,
    show_all: Annotated[bool, typer.Option("--all", help="List all that differs, not only the first 20.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints: each field, and each number of each tensor.

    Of a tensor that differs it says in how many numbers, and by how much at most: absolutely, and relative to the
    larger of the two. The exit code is 0 when both are equal to the bit and 1 when they differ.

    \b
    Example:
      distfit checkpoint diff runs/a runs/b
      distfit checkpoint diff runs/a@1200 @2400
    """
    from distfit.checkpoint.differences import MOST, differences, differences_text
    from distfit.checkpoint.tables import as_json as json_of

    run, step = _run_and_step(one)
    other_run, other_step = _run_and_step(other, run)
    ours, theirs = _stored(run, step), _stored(other_run, other_step)
    facts = [{}, {}] if tensors else [ours.facts, theirs.facts]
    found = differences(facts[0], ours.tensors, facts[1], theirs.tensors)
    names = f"{run}@{ours.step}", f"{other_run}@{theirs.step}"
    if as_json:
        say_now(json_of(found, of=names, equal=found.equal))
    else:
        say_now(differences_text(found, *names, most=None if show_all else MOST))
    if not found.equal:
        raise typer.Exit(DIFFERENT_EXIT_CODE)


def prune(
    run: Run,
    keep: Annotated[int, typer.Option("--keep", metavar="K", min=1, help="So many of the newest stay.")],
    best: Annotated[
        str | None, typer.Option("--best", metavar="METRIC", help="The best by it stays.", show_default=False)
    ] = None,
    mode: Annotated[str, typer.Option("--mode", metavar="min|max|auto", help="Which is best.")] = "auto",
    every_hours: Annotated[
        float | None,
        typer.Option("--every-hours", metavar="N", help="Of each span of N hours one stays.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; delete nothing.")] = False,
) -> None:
    """Delete checkpoints that are not needed any more.

    What stays is read and verified first. The newest one that is whole never goes, damaged ones are left to you, and
    a folder in which a run is at work is refused.

    \b
    Example:
      distfit checkpoint prune runs/a --keep 1 --dry-run
      distfit checkpoint prune runs/a --keep 2 --best val_loss --mode min
    """
    from distfit.checkpoint.options import Checkpoint
    from distfit.checkpoint.pruning import delete, plan_text, planned
    from distfit.monitor.counting import shown

    checkpoints = _checkpoints(run)
    options = Checkpoint(run, keep=keep, best=best, mode=mode, every_hours=every_hours)
    wanted = None if best is None else (best, options.best_mode)
    with nullcontext() if dry_run else _nobody_else(checkpoints):
        plan = planned(checkpoints, keep, wanted, every_hours, shown)
        if not dry_run:
            delete(checkpoints, plan)
    say_now(plan_text(plan, dry_run))


Out = Annotated[
    str, typer.Option("--to", metavar="OUT", help="A file that ends with .keras, or the folder of a SavedModel.")
]
Builder = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="MODULE:FUNCTION", help="Builds the model; else its description does.", show_default=False
    ),
]
Custom = Annotated[
    list[str] | None,
    typer.Option(
        "--custom",
        metavar="MODULE:NAME",
        help="A layer of your own in the description; the others of its module are known, too.",
        show_default=False,
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def export(
    run: Run, to: Out, step: Step = None, model: Builder = None, custom: Custom = None, force: Force = False
) -> None:
    """Write the model of a checkpoint for use without distfit: a .keras file, or a SavedModel for serving.

    The model is not compiled: it predicts as the one that was trained. A description that holds code, a Lambda layer's
    say, is refused; name the function that builds the model with --model.

    \b
    Example:
      distfit checkpoint export runs/a --to model.keras
      distfit checkpoint export runs/a --step 1200 --to serving/model
      distfit checkpoint export runs/a --to model.keras --model mine.models:build
    """
    from distfit.data.build.whole_folder import format_bytes
    from distfit.install.process import ended_through_finally
    from distfit.keras_backend import refuse_others

    stored = _stored(run, step)
    refuse_others(os.environ)
    # As `python -m` does: `--model mine:build` finds mine.py in the current folder.
    sys.path.insert(0, os.getcwd())
    from distfit.checkpoint.export import check_target, trained, write

    check_target(to, force)
    whole = trained(_untrained(stored.facts, model, custom or []), stored.facts, stored.tensors)
    with ended_through_finally():
        size = write(whole, to)
    say_now(f"{to}: the model of step {stored.step:,} of {run}, {format_bytes(size)}")


def _untrained(facts: Mapping[str, Any], function: str | None, custom: Sequence[str]) -> Any:
    """The model that a function builds, or that a checkpoint describes.

    Args:
        function: as `module:function`.
        custom: layers and functions of the user, as `module:name`.
    """
    from distfit.checkpoint.export import described
    from distfit.experiment.names import call, named, own_objects

    if function is not None:
        return call("--model", named("--model", function))
    objects: dict[str, Any] = {}
    for path in custom:
        named("--custom", path)
        objects |= own_objects(path)
    return described(facts, objects)


def _checkpoints(run: str, some: bool = True) -> "Checkpoints":
    """The folder's; of a folder of `distfit train`, those that are in it.

    Args:
        some: there have to be some.

    Raises:
        InputError: no such folder, or none in it.
    """
    from distfit.checkpoint.folder import Checkpoints

    if not Path(run).is_dir():
        raise InputError(
            f"Expected the folder of a run, received {run!r}, which is "
            f"{'no folder' if Path(run).exists() else 'not there'}. Name what fit(checkpoint=...) was given."
        )
    for folder in (Path(run), Path(run) / _OF_TRAIN):
        checkpoints = Checkpoints(folder)
        if checkpoints.entries():
            return checkpoints
    if some:
        raise InputError(
            f"Expected a folder with checkpoints, received {run!r}, which has none. Name what fit(checkpoint=...) was "
            "given."
        )
    return Checkpoints(run)


def _step_in(checkpoints: "Checkpoints", step: int) -> int:
    """
    Raises:
        InputError: there is no checkpoint of this step.
    """
    steps = [entry.step for entry in checkpoints.entries()]
    if step not in steps:
        raise InputError(
            f"Expected a step of {checkpoints.folder} that has a checkpoint, received {step}; "
            f"there are {', '.join(map(str, steps))}."
        )
    return step


def _stored(run: str, step: int | None) -> "Stored":
    """A checkpoint, verified; the newest that is whole where no step is named."""
    from distfit.checkpoint.folder import Damaged

    checkpoints = _checkpoints(run)
    if step is not None:
        try:
            return checkpoints.read(_step_in(checkpoints, step))
        except Damaged as error:
            raise type(error)(error.path, f"{error.why}. `distfit checkpoint verify` says which are whole") from error
    stored, damaged = checkpoints.newest()
    for one in damaged:
        print(f"distfit: {one}", file=sys.stderr, flush=True)
    if stored is None:
        raise InputError(f"Expected a whole checkpoint in {run!r}, received {len(damaged)} that are all damaged.")
    return stored


def _run_and_step(text: str, run: str | None = None) -> tuple[str, int | None]:
    """
    >>> _run_and_step("runs/a@120"), _run_and_step("runs/a"), _run_and_step("@160", "runs/a")
    (('runs/a', 120), ('runs/a', None), ('runs/a', 160))
    """
    name, at, step = text.rpartition("@")
    if not at or os.path.exists(text):
        return text, None
    if not step.isdecimal() or not (name or run):
        raise InputError(f"Expected a run's folder or RUN@STEP such as runs/a@120, received {text!r}.")
    return name or str(run), int(step)


@contextmanager
def _nobody_else(checkpoints: "Checkpoints") -> Iterator[None]:
    """While checkpoints go, no run may write some; what a killed one has left in the lock stays for the next."""
    from distfit.checkpoint.lock import RunLock

    lock = RunLock(checkpoints.folder, "distfit checkpoint prune")
    lock.acquire()
    try:
        yield
    finally:
        lock.release(keep=lock.left)
