"""TensorBoard's event files of a run: those of keras.callbacks.TensorBoard, of global values, going on after a resume.

    distfit.fit(model, train, log_dir="runs/a/logs")                     # short for
    distfit.fit(model, train, callbacks=[distfit.TensorBoard("runs/a/logs", write_steps_per_second=True)])

The chief writes, as for all writers (policy.py). What is added to Keras': throughput, the hyper-parameters of the run
(hparams.py), an axis of steps that goes on where an earlier run stopped, no point twice (event_files.py), and no wait
for the device after each step where batches are not asked for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from distfit.callbacks import event_files
from distfit.callbacks import hparams as of_run
from distfit.callbacks.event_files import Place
from distfit.callbacks.hparams import RunFacts, Value
from distfit.callbacks.layers_graph import graph_of_layers
from distfit.log import say
from distfit.monitor.progress import Pace

# The folders of a run.
_PARTS = ("train", "validation")


@dataclass
class _Training:
    """One training, from its first epoch on.

    Attributes:
        hparams: the hyper-parameters of the run.
        tags: by folder, those that earlier runs have left and that are true.
        void: folders whose earlier files are elsewhere.
        begun: folders in which this run has said what it is.
        step: batches that have been trained on, earlier runs included.
        written: the step of the last values of a batch that were written.
        before_epoch: `step` when the epoch began; None before its first batch.
    """

    hparams: dict[str, Value]
    tags: dict[str, frozenset[str]]
    void: frozenset[str]
    step: int
    written: int
    begun: list[str] = field(default_factory=list)
    before_epoch: int | None = None


class TensorBoard(keras.callbacks.TensorBoard):
    """keras.callbacks.TensorBoard for runs of distfit; without them it works as well.

    Tags and steps are Keras'. Beyond them:

    - `epoch_records_per_second` and `epoch_records_per_second_per_device` of the training steps: without the
      validation, and without the first call of an epoch, which compiles, where there is a second one. With
      `write_steps_per_second` also `epoch_steps_per_second`, measured in the same way.
    - The HParams page lists `train` and `validation` with the hyper-parameters of the run.
    - A run that goes on from a checkpoint at whatever step, one with `initial_epoch`, or one that
      keras.callbacks.BackupAndRestore has restored, goes on in the same folder: batches are counted on, and what a
      killed run wrote beyond the place where this one begins is taken away.
    - A run from the start into a folder that has a run already gives that run a folder of its own beside it,
      `earlier-1`, which TensorBoard lists: nothing is mixed, nothing lost.
    - Files are flushed after each epoch.

    Several replicas have values of batches every so many steps (`logs_every_steps` of `distfit.fit`): a point is
    written where there is a new value, at its step. With `steps_per_execution` batches are counted, not calls as by
    Keras.

    Args:
        log_dir: the folder of one run.
        histogram_freq, write_graph, write_images, write_steps_per_second, update_freq, profile_batch, embeddings_freq,
            embeddings_metadata: as in keras.callbacks.TensorBoard. The graph is that of the model's layers, as Keras
            writes it, and once more so that the page opens with it. `profile_batch` traces the chief.
        hparams: hyper-parameters of your own, by name: True or False, numbers or strings. They stand beside what
            distfit knows (batch size, epochs, optimizer, learning rate at the start, seed, replicas, ranks, engine,
            precision), and replace what has the same name.

    Raises:
        InputError: TensorBoard could not show one of `hparams`.

    >>> import keras, numpy as np, tempfile
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     board = TensorBoard(folder, hparams={"width": 1})
    ...     history = model.fit(np.ones((8, 2)), np.ones((8, 1)), callbacks=[board], verbose=0)
    ...     os.listdir(folder)
    ['train']
    """

    _batch_start_time: float  # Keras'
    _writers: dict[str, Any]

    def __init__(
        self,
        log_dir: str | os.PathLike = "logs",
        histogram_freq: int = 0,
        write_graph: bool = True,
        write_images: bool = False,
        write_steps_per_second: bool = False,
        update_freq: str | int = "epoch",
        profile_batch: Any = 0,
        embeddings_freq: int = 0,
        embeddings_metadata: Any = None,
        *,
        hparams: Mapping[str, Any] | None = None,
    ) -> None:
        self._own_hparams = of_run.checked(hparams)
        super().__init__(
            log_dir,
            histogram_freq,
            write_graph,
            write_images,
            write_steps_per_second,
            update_freq,
            profile_batch,
            embeddings_freq,
            embeddings_metadata,
        )
        self._facts: RunFacts | None = None
        self._pace = Pace(None, None, None)
        self._training: _Training | None = None
        self._then: dict[str, Any] | None = None

    @property
    def reads_batch_logs(self) -> bool:
        """Of distfit.callbacks.listening: whether it wants the values of batches."""
        return self.update_freq != "epoch"

    def of_run(self, facts: RunFacts) -> None:
        """What the model does not know of a run that begins."""
        self._facts = facts
        self._pace = Pace(facts.batch_size, facts.records, None)

    def set_model(self, model: keras.Model) -> None:
        # Here Keras writes the graph, before anybody knows whether a training comes, and what an earlier one left.
        if self.embeddings_freq:  # for which Keras wants that folder to be there
            tf.io.gfile.makedirs(self.log_dir)
        with self._without("write_graph"):
            super().set_model(model)

    def on_train_begin(self, logs: Any = None) -> None:
        # The rest when the first epoch begins: a callback after this one may restore the run that goes on.
        self._training = self._then = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the axis of steps, and what was measured of an epoch."""
        training, pace = self._training, self._pace
        if training is None:  # nothing was trained
            return {}
        return {
            "step": training.step,
            "written": training.written,
            "learning_rate": training.hparams.get("learning_rate"),
            "measured": list(pace.measured),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """After `on_train_begin`: go on where the checkpoint was."""
        self._then = dict(state) or None

    def on_epoch_resumed(self, epoch: int, step: int) -> None:
        """Of distfit.callbacks.listening: an epoch goes on, of which so many steps have run."""
        measured = (self._then or {}).get("measured")
        self._training = self._begun(epoch, step)
        self._training.before_epoch = self._training.step - step
        self._pace.begin(step, None if measured is None else (int(measured[0]), float(measured[1])))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # Not Keras': it reads the updates that an optimizer has made, to tell the steps of the epoch from them.
        if self._training is None:
            self._training = self._begun(epoch)
        self._training.before_epoch = None
        self._pace.begin()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        training = self._of_training()
        if training.before_epoch is None:
            training.before_epoch = max(0, training.step - batch)
        step = training.before_epoch + batch + 1
        if self._should_trace and step <= self._start_batch < step + self.model.steps_per_execution:
            step = self._start_batch  # the step that a trace begins with is within this call
        # Keras adds one.
        self._global_train_batch = step - 1
        super().on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        training, steps = self._of_training(), self.params.get("steps")
        # The last call may have fewer steps than its number says.
        done = min(batch + 1, steps or batch + 1)
        if done == steps:
            _wait_for_device(logs)
        self._pace.step(done)
        before = training.step
        training.step = self._global_train_batch = (training.before_epoch or 0) + done
        if self._is_due(training, batch, logs):
            with self._train_writer.as_default(), self._recording():
                super().on_train_batch_end(batch, self._numbers(logs, steps=training.step - before))
        elif self._should_trace:
            with self._without("write_steps_per_second"):
                super().on_train_batch_end(batch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        with self._recording():
            super().on_epoch_end(epoch, {**(logs or {}), **self._throughput()})
        for writer in self._writers.values():
            writer.flush()

    def on_train_end(self, logs: Any = None) -> None:
        training, self._training = self._training, None
        if training is None:  # no epoch was left to train
            return
        for part in training.begun:
            self._write_summary(part, of_run.ended())
        super().on_train_end(logs)

    def on_test_begin(self, logs: Any = None) -> None:
        if self._training is not None:
            self._write_beginning(self._training, "validation")
        super().on_test_begin(logs)

    def on_test_end(self, logs: Any = None) -> None:
        with self._recording():
            super().on_test_end(logs)
        if self._training is None:  # an evaluation by itself, of which Keras tells no end
            self._close_writers()
            self._writers = {}

    def _begun(self, epoch: int, within: int = 0) -> _Training:
        """What is there is settled, and what every run says of itself is written.

        Args:
            within: steps of the epoch that have run before.
        """
        place, then = self._place_of(epoch, within), self._then or {}
        values = of_run.of_run(self.model, self._facts, self.params.get("epochs"), self._own_hparams)
        if then.get("learning_rate") is not None:  # that at the start, not what became of it
            values["learning_rate"] = then["learning_rate"]
        tags, void = self._settle(place, values)
        training = _Training(values, tags, void, step=place.step, written=int(then.get("written", place.step)))
        super().on_train_begin()
        self._write_beginning(training, "train")
        if self.write_graph and event_files.GRAPH_TAG not in tags["train"]:
            self._write_graph()
        return training

    def _place_of(self, epoch: int, within: int) -> Place:
        optimizer = getattr(self.model, "optimizer", None)
        by_epochs = epoch * (self.params.get("steps") or 0) + within
        if optimizer is None:  # hand-written steps may have several
            return Place(epoch, by_epochs, 0, within)
        updates = int(optimizer.iterations.numpy())
        if self._then is not None:
            return Place(epoch, int(self._then["step"]), updates, within)
        if epoch == 0:
            return Place(0, within, updates, within)
        # Of an optimizer that was not restored the epochs tell more; of data whose length nobody knows, the optimizer.
        steps = int(getattr(optimizer, "inner_optimizer", optimizer)._iterations.numpy())
        steps = max(steps, by_epochs)
        return Place(epoch, steps, updates or steps, within)

    def _settle(self, place: Place, values: dict[str, Value]) -> tuple[dict[str, frozenset[str]], frozenset[str]]:
        """Nothing remains that this run writes again; the tags that do, and which folders are empty now."""
        earlier = {part: event_files.survey(os.path.join(self.log_dir, part), place, values) for part in _PARTS}
        stale = [part for part in _PARTS if earlier[part].stale]
        if stale and place.is_start:
            void = [part for part in _PARTS if earlier[part].files]
            aside = event_files.put_aside(self.log_dir, [earlier[part].folder for part in void])
            if self.params.get("verbose", 1) != 0:
                say(f"TensorBoard: {self.log_dir} had the logs of an earlier run, which are in {aside} now.")
            return dict.fromkeys(_PARTS, frozenset()), frozenset(void)
        for part in stale:
            event_files.carry_over(earlier[part], place, values)
        return {part: found.tags for part, found in earlier.items()}, frozenset()

    def _write_beginning(self, training: _Training, part: str) -> None:
        """What stands first among that which a run writes into a folder."""
        if part in training.begun:
            return
        training.begun.append(part)
        if part in training.void:
            event_files.begin_anew(self._writer_of(part))
        if of_run.STARTED_TAG not in training.tags[part]:
            self._write_summary(part, of_run.started(training.hparams))

    def _write_graph(self) -> None:
        """Keras' own, and the one with which the page opens."""
        self._write_keras_model_summary()
        if type(self.model).__name__ not in ("Functional", "Sequential"):  # of which Keras writes one
            return
        try:
            described = self.model.to_json()
        except Exception:  # of a layer's get_config, for which Keras has just warned
            return
        with self._train_writer.as_default():
            self.summary.graph(graph_of_layers(described))

    def _write_summary(self, part: str, serialized: bytes) -> None:
        with self._writer_of(part).as_default(), self._recording():
            self.summary.experimental.write_raw_pb(serialized, step=0)

    def _writer_of(self, part: str) -> Any:
        return self._train_writer if part == "train" else self._val_writer

    def _of_training(self) -> _Training:
        assert self._training is not None, "an epoch begins before its batches"
        return self._training

    def _is_due(self, training: _Training, batch: int, logs: Any) -> bool:
        """Whether these are new values, after so many steps as the user wants from one point to the next."""
        of_step = getattr(logs, "step", None)  # of distfit.callbacks.logs
        if self.update_freq == "epoch" or of_step not in (None, batch):
            return False
        due = training.step // self.update_freq > training.written // self.update_freq
        training.written = training.step if due else training.written
        return due

    def _numbers(self, logs: Any, steps: int) -> dict[str, Any]:
        """The values of a batch, for which it waits for the device; Keras takes the steps of a call for one."""
        found = dict(logs or {})
        if self.write_steps_per_second:
            now = time.time()
            self._batch_start_time = now - (now - self._batch_start_time) / steps
        return found

    def _throughput(self) -> dict[str, float]:
        speed = self._pace.records_per_second
        if speed is None or self._facts is None:
            return {}
        return {"records_per_second": speed, "records_per_second_per_device": speed / self._facts.replicas}

    def _compute_steps_per_second(self) -> float:
        """Instead of Keras', which takes the validation for a part of the steps and an update for a step."""
        return self._pace.steps_per_second or 0.0

    def _recording(self) -> Any:
        """Where a number is given for `update_freq`, Keras leaves summaries off after every other batch, those of the
        epoch included when it is the last one."""
        return self.summary.record_if(True)

    @contextmanager
    def _without(self, option: str) -> Iterator[None]:
        """Keras' methods, with an option of theirs switched off."""
        wanted = getattr(self, option)
        setattr(self, option, False)
        try:
            yield
        finally:
            setattr(self, option, wanted)


def _wait_for_device(logs: Any) -> None:
    """Steps are begun before the ones before them are done; one value of the last says when they are."""
    next(iter((logs or {}).values()), None)
