"""What a hand-written loop asks for, checked alike on every rank: its data, and how it is run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distfit import checks, prepare
from distfit.data.sources import Request
from distfit.errors import InputError
from distfit.loops.batches import Batches
from distfit.loops.training import Run
from distfit.seeds import check as check_seed
from distfit.seeds import settle_seed
from distfit.training.in_sync import EVERY_STEPS
from distfit.training.reduction import BUCKET_BYTES
from distfit.training.step import Choices

if TYPE_CHECKING:
    from distfit.session import Session


def batches_of(
    session: Session,
    x: Any,
    y: Any,
    sample_weight: Any,
    batch_size: int | None,
    shuffle: bool,
    steps: int | None,
    seed: int | None,
) -> Batches:
    """See `Session.batches`."""
    with session.running("preparing data"):
        session.same_call(
            "init().batches", x=type(x).__name__, batch_size=batch_size, shuffle=shuffle, steps=steps, seed=seed
        )
        session.agree(lambda: checks.arguments("auto", steps=steps))
        session.agree(lambda: None if seed is None else check_seed(seed))
        # Whatever the order of records: arrays are shuffled by the process's random state, which ranks must share.
        of_job = settle_seed(session, None)
        settled = of_job if seed is None else seed
        # Who shuffles, trains: layers that augment records are told so.
        request = Request(y, sample_weight, None, batch_size, steps, shuffle, settled, training=shuffle)
        return Batches(session, prepare.feed_of_any(session, x, request, endless=shuffle), settled)


def run_of(
    session: Session,
    *,
    sync_batch_norm: bool,
    reduction_dtype: str | None,
    bucket_bytes: int | None,
    in_sync_steps: int | None,
    **chosen: Any,
) -> Run:
    """The arguments of `Session.training` that say how, compared and checked; None takes the default."""
    choices = Choices(sync_batch_norm, reduction_dtype, BUCKET_BYTES if bucket_bytes is None else bucket_bytes)
    run = Run(in_sync_steps=EVERY_STEPS if in_sync_steps is None else in_sync_steps, choices=choices, **chosen)
    lengths = {name: getattr(run, name) for name in ("epochs", "initial_epoch", "in_sync_steps", "logs_every_steps")}
    session.same_call("init().training", **lengths, **vars(choices))
    session.agree(lambda: checks.arguments(run.verbose, **lengths))
    session.agree(lambda: checks.choices(choices, session.backend))
    return run


def check_is_data(data: Any) -> None:
    """
    Raises:
        InputError: it did not come from `Session.batches`.
    """
    if not isinstance(data, Batches):
        raise InputError(
            f"Expected the data of a training from session.batches(...), received {type(data).__name__}. Write "
            "data = session.batches(x, y, batch_size=64)."
        )
