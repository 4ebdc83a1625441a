"""What earlier runs left in a folder of TensorBoard's event files, and what of it a run that begins there keeps.

    place = Place(epoch=2, step=200, update=200)
    earlier = survey("logs/train", place, hparams)
    if earlier.stale:                                # points that this run will write again
        carry_over(earlier, place, hparams)          # a resumed run: one file, of the points before its place
        put_aside("logs", [earlier.folder])          # or one from the start: the earlier run gets a folder of its own

TensorBoard knows one mark for a restart, SessionLog.START, and one step with it, beyond which everything of the folder
is void. Keras' tags have three axes (epochs, batches, updates) in one folder, so no such step is right for all of them;
and the loader that is the default drops points tag by tag, when one with the same or a smaller step follows, and never
looks at the mark. What both understand, also in a server that has been running all the time, and every other reader of
the files as well: a new file that begins with a mark at step 0 (all before it is void) and then has the points that are
still true, while the old files go.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from distfit.callbacks import hparams as of_run
from distfit.callbacks.hparams import Value

# Events of a file before those that a run has written itself: the version, and two marks.
_BEGINNING = 3
# Keras' tag of the model's graph.
GRAPH_TAG = "keras"


@dataclass(frozen=True)
class Place:
    """Where a training begins, on each axis that Keras' tags have.

    Attributes:
        epoch: the first that it trains, from 0.
        step: batches that were trained on before.
        update: of the optimizer, as it counts them.
        within: steps of the epoch that have run: its validation, after as many updates or more, has not.
    """

    epoch: int
    step: int
    update: int
    within: int = 0

    def keeps(self, tag: str, step: int) -> bool:
        """Whether a point of an earlier run lies before this place. What has an axis of a user's own does.

        >>> place = Place(epoch=2, step=20, update=10)
        >>> place.keeps("epoch_loss", 1), place.keeps("epoch_loss", 2)
        (True, False)
        >>> place.keeps("batch_loss", 20), place.keeps("evaluation_loss_vs_iterations", 20)
        (True, False)
        """
        if tag.startswith("epoch_") or tag.endswith(("/histogram", "/image")):
            return step < self.epoch
        if tag.startswith("batch_"):
            return step <= self.step
        if tag.startswith("evaluation_") and tag.endswith("_vs_iterations"):
            return step < self.update or (step == self.update and not self.within)
        return True

    @property
    def is_start(self) -> bool:
        """Whether nothing was trained before."""
        return self.epoch == 0 and not self.within


@dataclass(frozen=True)
class Earlier:
    """What is in a folder.

    Attributes:
        folder: `train` or `validation` of a run.
        files: with events, in their order.
        stale: something in them is not true any more, or will be written again.
        tags: of what is true.
    """

    folder: str
    files: tuple[str, ...]
    stale: bool
    tags: frozenset[str]


def survey(folder: str, place: Place, hparams: Mapping[str, Value] | None) -> Earlier:
    """Read what is there. It takes a second for some ten thousand points.

    Args:
        folder: `train` or `validation` of a run.
        place: where the training begins.
        hparams: of this run; None for one whose files say nothing of them, or what somebody else does.
    """
    files = tuple(sorted(tf.io.gfile.glob(os.path.join(folder, "*.tfevents.*"))))
    stale, tags = False, set[str]()
    for event in _events(files):
        for value in event.summary.value:
            if _is_true(value, event.step, place, hparams) and not (value.tag == GRAPH_TAG and value.tag in tags):
                tags.add(value.tag)
            else:
                stale = True
    return Earlier(folder, files, stale, frozenset(tags))


def carry_over(earlier: Earlier, place: Place, hparams: Mapping[str, Value] | None) -> None:
    """Write what is still true to a new file, which appears whole, then take the old ones away."""
    from tensorboard.compat.proto import event_pb2

    partial = os.path.join(earlier.folder, "carried.partial")
    with tf.io.TFRecordWriter(partial) as file:
        file.write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        for event in [*_marks(), *_still_true(earlier, place, hparams)]:
            file.write(event.SerializeToString())
    # Before the files of this run, which are named after a host, in the order in which TensorBoard reads them.
    name = f"events.out.tfevents.{int(time.time()):010d}.0000.carried"
    tf.io.gfile.rename(partial, os.path.join(earlier.folder, name), overwrite=True)
    for old in earlier.files:
        tf.io.gfile.remove(old)


def put_aside(log_dir: str, folders: Sequence[str]) -> str:
    """Move these folders of a run into one that has not been there, beside which the next run begins; its path."""
    candidates = (os.path.join(log_dir, f"earlier-{number}") for number in itertools.count(1))
    aside = next(folder for folder in candidates if not tf.io.gfile.exists(folder))
    tf.io.gfile.makedirs(aside)
    for folder in folders:
        tf.io.gfile.rename(folder, os.path.join(aside, os.path.basename(folder)))
    return aside


def begin_anew(writer: Any) -> None:
    """What was written before is void: for a server that runs meanwhile and has read it."""
    for mark in _marks():
        tf.raw_ops.ImportEvent(writer=writer._resource, event=mark.SerializeToString())


def _marks() -> list[Any]:
    """The first mark in a folder is taken for the beginning of all, every further one for a restart."""
    from tensorboard.compat.proto import event_pb2

    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    return [event_pb2.Event(step=0, wall_time=time.time(), session_log=start) for _ in range(2)]


def _still_true(earlier: Earlier, place: Place, hparams: Mapping[str, Value] | None) -> Iterator[Any]:
    has_graph = False
    for event in _events(earlier.files):
        true = [value for value in event.summary.value if _is_true(value, event.step, place, hparams)]
        if has_graph:  # Keras writes it before anybody knows that the run goes on
            true = [value for value in true if value.tag != GRAPH_TAG]
        has_graph = has_graph or any(value.tag == GRAPH_TAG for value in true)
        if event.WhichOneof("what") == "summary":
            del event.summary.value[:]
            event.summary.value.extend(true)
        if true or event.WhichOneof("what") not in ("summary", "file_version", "session_log", "source_metadata"):
            yield event


def _events(files: Sequence[str]) -> Iterator[Any]:
    """The events of these files, from the last one that begins anew; what a killed run left half is left out."""
    first = max((number for number, file in enumerate(files) if _begins_anew(file)), default=0)
    return itertools.chain.from_iterable(map(_of_file, files[first:]))


def _of_file(file: str) -> Iterator[Any]:
    # As they were written; the loader that TensorBoard has for itself turns some into what they might be today.
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    return LegacyEventFileLoader(file).Load()


def _begins_anew(file: str) -> bool:
    beginning = itertools.islice(_of_file(file), _BEGINNING)
    return any(event.HasField("session_log") and event.step == 0 for event in beginning)


def _is_true(value: Any, step: int, place: Place, hparams: Mapping[str, Value] | None) -> bool:
    if value.tag == of_run.STARTED_TAG:
        return hparams is None or of_run.read(value.metadata.plugin_data.content) == hparams
    return value.tag != of_run.ENDED_TAG and place.keeps(value.tag, step)
