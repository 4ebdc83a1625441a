"""The runs of tests/test_counters.py: small trainings that count what their steps do.

    python -m tests.counters_script OUT single mirrored:3
    mpirun -np 2 python -m tests.counters_script OUT horovod
    mpirun -np 2 python -m tests.counters_script one_rank_differs

The chief writes what was counted to `OUT/ENGINE.json`, by case.

* Of a case in `STEPS_OF`: what the wire recorded while steps were traced, on every replica; which calls of steps made
  TensorFlow trace anything; and beside the record what ran. With one process the graph itself counts, by a Python
  function that stands before every collective; with several it is Horovod's own timeline.
* Of a case in `READS`: every value that was brought to the host while steps ran.
"""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tensorflow.python.framework import func_graph, ops

import distfit
from distfit.backends.hooks import replaced
from distfit.session import Session, init
from distfit.training.loop import Loop
from distfit.training.wire import Transfer, Wire
from tests.ranks import show_stacks_when_asked

# Five steps an epoch, of which the last has one row: all replicas but one have none.
BATCH, ROWS, EPOCHS, CLASSES, WORDS, LENGTH = 12, 49, 3, 3, 10, 5
# Of an epoch of the runs that count reads; with several replicas there is a log point at every third.
READ_STEPS, LOGS_EVERY_STEPS = 60, 3
BUCKET_BYTES = 128
RNG = np.random.default_rng(0)
CASE_MARK = "counters."
PACKAGES = {package.__name__: str(Path(str(package.__file__)).parent) for package in (distfit, keras)}
Found = dict[str, Any]
Setting = tuple[Any, tuple, dict[str, Any]]


def mlp(rows: int = ROWS, **compiling: Any) -> Setting:
    """67 weights: 4 x 8 + 8 and 8 x 3 + 3."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "tanh"), layers.Dense(CLASSES)])
    return compiled(model, **compiling), features(rows), {}


def compiled(model: Any, optimizer: Any = "sgd", **compiling: Any) -> Any:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], **compiling)
    return model


def features(rows: int) -> tuple[Any, Any]:
    return RNG.random((rows, 4), np.float32), RNG.integers(0, CLASSES, rows)


def small_buckets() -> Setting:
    model, data, options = mlp()
    return model, data, options | {"bucket_bytes": BUCKET_BYTES}


def half() -> Setting:
    model, data, _ = mlp()
    return model, data, {"reduction_dtype": "float16"}


def normalised(**arguments: Any) -> Setting:
    """Two layers of 8 channels, which bring 2 x 2 x 8 weights, and as many moving statistics. Their names are others
    on a rank that has made a layer before, and no rank may wait for another because of that."""
    norm = layers.BatchNormalization
    for _ in range(init().rank):
        norm()
    parts = [layers.Dense(8), norm(), layers.Dense(8), norm(), layers.Dense(CLASSES)]
    model = keras.Sequential([keras.Input((4,)), *parts])
    return compiled(model), features(ROWS), arguments


def two_masked_outputs() -> Setting:
    """Two sequences of which each timestep may be masked: three normalisers a step would be one too many."""
    x = keras.Input((LENGTH,), dtype="int32")
    hidden = layers.Dense(4)(layers.Masking()(layers.Reshape((LENGTH, 1))(x)))
    model = keras.Model(x, [layers.Dense(CLASSES)(hidden), layers.Dense(CLASSES)(hidden)])
    loss = [keras.losses.SparseCategoricalCrossentropy(from_logits=True) for _ in range(2)]
    model.compile("sgd", loss)
    labels = RNG.integers(0, CLASSES, (2, ROWS, LENGTH))
    return model, (RNG.integers(0, 3, (ROWS, LENGTH)), list(labels)), {}


def embedding() -> Setting:
    """The gradient of a table: rows of 4 numbers, one for each word of a batch."""
    parts = [layers.Embedding(WORDS, 4), layers.GlobalAveragePooling1D(), layers.Dense(CLASSES)]
    model = keras.Sequential([keras.Input((LENGTH,), dtype="int32"), *parts])
    rows = ROWS
    return compiled(model), (RNG.integers(0, WORDS, (rows, LENGTH)), RNG.integers(0, CLASSES, rows)), {}


def accumulating(batches: int) -> Any:
    return keras.optimizers.SGD(0.1, gradient_accumulation_steps=batches)


def validated(**compiling: Any) -> Setting:
    model, data, _ = mlp(**compiling)
    return model, data, {"validation_data": features(2 * BATCH + 1)}


STEPS_OF: dict[str, Callable[[], Setting]] = {
    "mlp": validated,
    "two_steps_a_call": partial(validated, steps_per_execution=2),
    "accumulation": lambda: mlp(optimizer=accumulating(4)),
    "buckets": small_buckets,
    "half": half,
    "batch_norm": normalised,
    "sync_batch_norm": partial(normalised, sync_batch_norm=True),
    "two_masked_outputs": two_masked_outputs,
    "embedding": embedding,
}
# Those that say something of one replica, too.
ALONE = ("mlp", "two_steps_a_call", "accumulation")


class Listener(keras.callbacks.Callback):
    """Wants to know of every batch, and of no value."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches += 1


class Reader(Listener):
    """Looks at every batch's loss."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        assert np.isfinite(logs["loss"])


READS: dict[str, list[Callable[[], Any]]] = {
    "nobody_listens": [],
    "somebody_listens": [Listener],
    "somebody_reads": [Reader],
}


class Engine:
    """One of distfit's, such as "mirrored:3"."""

    def __init__(self, text: str) -> None:
        name, _, devices = text.partition(":")
        self.options: dict[str, Any] = {"strategy": name, "devices": int(devices) if devices else None}
        self.session: Session = init(**self.options)

    def fit(self, setting: Setting, **arguments: Any) -> None:
        model, (x, y), chosen = setting
        common: dict[str, Any] = {"batch_size": BATCH, "epochs": EPOCHS, "verbose": 0, "seed": 1, "shuffle": False}
        distfit.fit(model, x, y, **(common | chosen | arguments | self.options))


def count_steps(engine: Engine, case: str) -> Found:
    """What each step planned to send, on every replica of the job, what was sent in all of the training, and when
    anything was traced."""
    session = engine.session
    witness = _timeline if session.size > 1 else _executions
    with (
        pytest.MonkeyPatch.context() as patch,
        _recorded(patch) as recorded,
        _graphs_by_call(patch) as (calls, graphs),
        witness(session, case) as sent,
    ):
        engine.fit(STEPS_OF[case]())
    hashes = session.transport.gather({step: [_hash(one) for one in lists] for step, lists in recorded.items()})
    return {
        "plans": {step: [[*vars(one).values(), one.nbytes] for one in lists[0]] for step, lists in recorded.items()},
        "orders": {step: [one for rank in hashes for one in rank[step]] for step in recorded},
        "sent": sent,
        "calls": calls,
        "graphs": graphs,
    }


def _hash(transfers: list[Transfer]) -> str:
    """Of names, types and sizes, in their order."""
    return hashlib.sha256(repr(transfers).encode()).hexdigest()


@contextmanager
def _recorded(patch: pytest.MonkeyPatch) -> Iterator[dict[str, list[list[Transfer]]]]:
    """By the step's name, what the wire recorded each time that a replica of this process was traced."""
    found: dict[str, list[list[Transfer]]] = defaultdict(list)
    step = Wire.step

    @contextmanager
    def recording(wire: Wire, name: str, data: Any = ()) -> Iterator[list[Transfer]]:
        with step(wire, name, data) as transfers:
            yield transfers
        found[name].append(transfers)

    patch.setattr(Wire, "step", recording)
    yield found


@contextmanager
def _executions(session: Session, case: str) -> Iterator[dict[str, list[int]]]:
    """By a collective's name, the bytes that a replica brought each time that it ran: all replicas, all steps."""
    sent: dict[str, list[int]] = defaultdict(list)

    def counted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def counting(tensors: Any, name: str) -> Any:
            for tensor in tensors:
                tf.numpy_function(lambda values: sent[name].append(values.nbytes), [tensor], [])
            return collective(tensors, name)

        return counting

    backend = session.backend
    with (
        replaced(backend, "sum", counted(backend.sum)),
        replaced(backend, "gather", counted(backend.gather)),
    ):
        yield sent


@contextmanager
def _timeline(session: Session, case: str) -> Iterator[dict[str, list[int]]]:
    """Horovod writes everything down until it ends (HOROVOD_TIMELINE); a broadcast says where a case begins."""
    import horovod.tensorflow as hvd

    def mark(name: str) -> None:
        # In a graph, as Horovod knows an op outside of one by its type alone.
        send = tf.function(lambda value: hvd.broadcast(value, root_rank=0, name=f"{CASE_MARK}{name}"))
        send.get_concrete_function(tf.TensorSpec([1]))(tf.zeros([1]))

    mark(case)
    yield {}
    mark("none")


def sent_by_timeline(path: Path) -> dict[str, dict[str, list[int]]]:
    """From a case to a collective's name to the bytes of its result each time that it ran; `_executions` of ranks.

    Events are of Chrome's trace format; a tensor is a process there, with its name in the event that begins it. An
    operation ends with the type and the shape of what came out.
    """
    events = json.loads(path.read_text())
    names: dict[int, str] = {}
    found: dict[str, dict[str, list[int]]] = {}
    case = "none"
    for event in events:
        arguments = event.get("args", {})
        if event.get("name") == "process_name":
            names[event["pid"]] = arguments.get("name", "the timeline")
        name = names.get(event.get("pid"), "")
        if CASE_MARK in name:
            case = name.rpartition(CASE_MARK)[2]
        elif case != "none" and "shape" in arguments:
            # TensorFlow puts the function's name before ours, and the backend a number behind it.
            own = name.rpartition("distfit.")[2].rpartition(".")[0]
            found.setdefault(case, {}).setdefault(own, []).append(_bytes(arguments))
    return found


def _bytes(arguments: dict[str, str]) -> int:
    return int(np.prod(json.loads(arguments["shape"]))) * np.dtype(arguments["dtype"]).itemsize


@contextmanager
def _graphs_by_call(patch: pytest.MonkeyPatch) -> Iterator[tuple[list[int], Counter[int]]]:
    """How many steps each call had, and how many graphs TensorFlow made in it, by the call's number from 0."""
    calls: list[int] = []
    graphs: Counter[int] = Counter()
    inside = False
    run, make = Loop._run, func_graph.FuncGraph.__init__

    def running(loop: Loop, feed: Any, batches: Any, *rest: Any, **options: Any) -> Any:
        nonlocal inside
        calls.append(len(batches))
        inside = True
        try:
            return run(loop, feed, batches, *rest, **options)
        finally:
            inside = False

    def making(graph: Any, *arguments: Any, **options: Any) -> None:
        graphs.update([len(calls) - 1] if inside else [])
        make(graph, *arguments, **options)

    patch.setattr(Loop, "_run", running)
    patch.setattr(func_graph.FuncGraph, "__init__", making)
    yield calls, graphs


class Reads:
    """Values that came to the host, in the order in which it happened."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self.calls = 0
        self._value = ops._EagerTensorBase._numpy

    def noted(self, patch: pytest.MonkeyPatch) -> None:
        """Every way from a tensor to Python passes `_numpy`, but for NumPy, which may look into its memory. Outputs of
        steps are handed out in envelopes, into which it cannot look."""
        patch.setattr(ops._EagerTensorBase, "_numpy", lambda tensor: self.value(tensor, None))
        for name in ("array", "asarray"):
            patch.setattr(np, name, self._noting_tensors(getattr(np, name)))
        patch.setattr(Loop, "_run", self._handing_out_envelopes(Loop._run))

    def value(self, tensor: Any, of_call: int | None) -> Any:
        self._note(of_call)
        return self._value(tensor)

    def _note(self, of_call: int | None) -> None:
        self.found.append({"after": self.calls, "of_call": of_call, "by": _caller()})

    def _noting_tensors(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def noting(given: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(given, ops.EagerTensor):
                self._note(None)
            return make(given, *arguments, **options)

        return noting

    def _handing_out_envelopes(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def running(*arguments: Any, **options: Any) -> Any:
            results = run(*arguments, **options)
            self.calls += 1
            return tf.nest.map_structure(partial(Envelope, self, self.calls), results)

        return running


class Envelope:
    """A step's output, whose value nobody gets unnoticed: there is no other way to it than these methods."""

    def __init__(self, reads: Reads, call: int, tensor: Any) -> None:
        self._reads, self._call, self._tensor = reads, call, tensor

    def numpy(self) -> Any:
        return self._reads.value(self._tensor, self._call)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self.numpy(), dtype)

    def __float__(self) -> float:
        return float(self.numpy())


def _caller() -> str:
    """The innermost function of distfit or Keras that asked: "distfit/training/loop.py:_read"."""
    for frame, _ in traceback.walk_stack(None):
        code = frame.f_code
        for package, root in PACKAGES.items():
            if code.co_filename.startswith(root):
                return f"{package}{code.co_filename.removeprefix(root)}:{code.co_name}"
    return "elsewhere"


def count_reads(engine: Engine, case: str) -> Found:
    reads = Reads()
    model, data, _ = mlp(BATCH * READ_STEPS)
    with pytest.MonkeyPatch.context() as patch:
        reads.noted(patch)
        callbacks = [make() for make in READS[case]]
        engine.fit((model, data, {}), epochs=2, callbacks=callbacks, logs_every_steps=LOGS_EVERY_STEPS)
    variables = [variable for metric in model.metrics for variable in metric.variables]
    return {"reads": reads.found, "metrics": len(model.metrics), "states": len(variables)}


class Silent(layers.BatchNormalization):
    """Does not tell that it is synchronised: what ranks compare before the first step cannot show it."""

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"synchronized": False}


def one_rank_differs() -> None:
    """The same variables everywhere, and on rank 1 moments for which it would wait for the others."""
    parts = [layers.Dense(8), Silent(synchronized=init().rank == 1), layers.Dense(CLASSES)]
    model = keras.Sequential([keras.Input((4,)), *parts])
    x, y = features(BATCH)
    distfit.fit(compiled(model), x, y, batch_size=BATCH, verbose=0)


def count(text: str, folder: Path) -> None:
    engine = Engine(text)
    several = engine.session.num_replicas > 1
    found = {case: count_steps(engine, case) for case in (STEPS_OF if several else ALONE)}
    found |= {case: count_reads(engine, case) for case in READS}
    if engine.session.is_chief:
        (folder / f"{text.replace(':', '-')}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    show_stacks_when_asked()
    if sys.argv[1] == one_rank_differs.__name__:
        one_rank_differs()
    for name in sys.argv[2:]:
        count(name, Path(sys.argv[1]))
