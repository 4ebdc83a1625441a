"""What `fit` accepts as data, brought into one form: a source of batches that replicas can cut.

    source = source_of(x, y, batch_size=64, topology=session.topology, ...)
    for global_rows, origin, data in source.dataset(epoch, 0): ...

A source yields either *global* batches (every process sees the same one and takes its replicas' slices),
this process's part of one (`TFRecords`), or this process's own batches (`distfit.local`).
"""

from __future__ import annotations

import inspect
import numbers
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import keras
import tensorflow as tf
from keras.src.trainers import data_adapters
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.data_adapter import DataAdapter
from keras.src.trainers.data_adapters.tf_dataset_adapter import TFDatasetAdapter

from distfit.data.bad_records import Tally
from distfit.data.identity import of_arrays
from distfit.data.local import InputContext, Local
from distfit.data.on_device import OnDevice
from distfit.data.passes import Needs, needs_of
from distfit.data.reading import Asked
from distfit.data.tfrecords import TFRecords
from distfit.errors import InputError
from distfit.log import warn_once
from distfit.topology import Topology

# Keras' own default, for arrays and for records alike.
DEFAULT_BATCH_SIZE = 32
# Keras prints whole arrays into its messages.
_MOST_WORDS = 300


@dataclass(frozen=True)
class Source:
    """Batches for the replicas of this process.

    Args:
        adapter: Keras' view of the data: number of batches, beginnings and ends of epochs.
        dataset: from the number of the pass over the data, and of its first step that is wanted (0 unless
            `numbered`), to a tf.data.Dataset of `(global_rows, origin, data)`: int64 scalars and
            (x, y, sample_weight) as Keras packs them. Row 0 of data is row `origin` of the batch that is cut.
        parts: how many slices a batch is cut into, and
        first_part: the number of this process's first.
        compared: every process must see the same batches, which is checked.
        uneven: processes may have different numbers of batches.
        numbered: the order depends on the number of the pass alone, not on how often the data were iterated.
        records: of the whole data set; None when unknown.
        batch_size: of the global batch; None when unknown.
        explain: turns an error that came out of the dataset into the one to show.
        in_order: its rows are all of the data's, in their order.
        on_device: what is done to the rows of a replica where the model runs; they come as (rows, seeds) then.
        tally: counts the records that this process leaves out.
        notes: what the start of a run says about them, a sentence each.
        begin: called before each pass.
        needs: what of earlier passes has to be made again for a pass to be what it was.
        per_process: its batches are cut by the number of processes.
        identity: what the data are recognised by, beside the types of their rows.
    """

    adapter: DataAdapter
    dataset: Callable[[int, int], tf.data.Dataset]
    parts: int
    first_part: int
    compared: bool = False
    uneven: bool = False
    numbered: bool = False
    records: int | None = None
    batch_size: int | None = None
    explain: Callable[[Exception], Exception] = lambda error: error
    in_order: bool = True
    on_device: OnDevice | None = None
    tally: Tally = field(default_factory=Tally)
    notes: Sequence[str] = ()
    begin: Callable[[], None] = lambda: None
    needs: Callable[[], Needs] = lambda: Needs.BATCHES
    per_process: bool = False
    identity: Callable[[], Mapping[str, Any]] = dict


@dataclass(frozen=True)
class Request:
    """How the data are asked for, as in keras.Model.fit.

    Args:
        batch_size: rows of the global batch; None takes the source's own, else 32.
        shuffle: of arrays and records; `tf.data` datasets shuffle themselves.
        seed: of the order of records.
        training: what random transforms of records are for.
    """

    y: Any = None
    sample_weight: Any = None
    class_weight: Any = None
    batch_size: int | None = None
    steps: int | None = None
    shuffle: Any = False
    seed: int = 0
    training: bool = False


def source_of(x: Any, request: Request, topology: Topology) -> Source:
    """The source for what a user passed as `x` (and `y`, `sample_weight`). No process waits for another.

    `TFRecords` look at their files here, unless they were told what another process found (`TFRecords.use`).

    Raises:
        InputError: nothing can be made of it, or it cannot serve several processes.
    """
    _check_batch_size(request.batch_size, topology)
    if isinstance(x, TFRecords):
        return _records_source(x, request, topology)
    if isinstance(x, Local):
        return _local_source(x, request, topology)
    return _keras_source(x, request, topology)


def _check_batch_size(batch_size: int | None, topology: Topology) -> None:
    if batch_size is None:
        return
    if isinstance(batch_size, bool) or not isinstance(batch_size, numbers.Integral) or batch_size < 1:
        raise InputError(f"Expected batch_size to be a whole number of at least 1, received {batch_size!r}.")
    if batch_size < topology.num_replicas:
        raise InputError(
            f"Expected batch_size, the rows of one step over all replicas, to be at least the number of replicas, "
            f"received batch_size={batch_size} and {topology.num_replicas} replicas: some would never get a row. "
            "Raise batch_size, or start fewer ranks or devices."
        )


def _keras_source(x: Any, request: Request, topology: Topology) -> Source:
    _refuse_no_data(x)
    if topology.size > 1 and inspect.isgenerator(x):
        raise InputError(
            "Expected data that every rank can read on its own, received a Python generator, which each of the "
            f"{topology.size} ranks would run for itself. Pass arrays, a tf.data.Dataset or distfit.local(...)."
        )
    adapter = _adapter_of(x, request)
    is_dataset = isinstance(adapter, TFDatasetAdapter)
    if is_dataset and topology.size > 1:
        warn_once(
            "every rank iterates the whole tf.data.Dataset and takes its slice of each batch, so every rank decodes "
            "everything; distfit.TFRecords or distfit.local read only a part."
        )
    dataset = adapter.get_tf_dataset()
    batches = _with_bounds(dataset)
    batch_size = adapter.batch_size
    _check_batch_size(batch_size, topology)
    is_arrays = isinstance(adapter, ArrayDataAdapter)
    return Source(
        adapter=adapter,
        dataset=lambda epoch, first_step: batches,
        parts=topology.num_replicas,
        first_part=topology.first_replica,
        compared=topology.size > 1,
        records=getattr(adapter, "_num_samples", None),
        batch_size=batch_size,
        # Keras' shuffle of arrays begins anew from the global seed in each pass.
        needs=lambda: Needs.NOTHING if is_arrays else needs_of(dataset) if is_dataset else Needs.BATCHES,
        identity=lambda: _identity(x, adapter, request.shuffle),
    )


def _adapter_of(x: Any, request: Request) -> DataAdapter:
    with warnings.catch_warnings(), keras_refusals(x):
        # The default of `fit`, meant for arrays: Keras warns, on every rank, of data that shuffle themselves.
        warnings.filterwarnings("ignore", "`shuffle=True` was passed")
        return data_adapters.get_data_adapter(
            x=x,
            y=request.y,
            sample_weight=request.sample_weight,
            batch_size=request.batch_size,
            steps_per_epoch=request.steps,
            shuffle=request.shuffle,
            class_weight=request.class_weight,
        )


def _identity(x: Any, adapter: DataAdapter, shuffle: Any) -> Mapping[str, Any]:
    """Of what Keras takes: arrays by their content; of all else there is only the kind and the number of batches."""
    if isinstance(adapter, ArrayDataAdapter):
        leaves = [leaf for leaf in tf.nest.flatten(adapter._inputs, expand_composites=True) if leaf is not None]
        arrays = [array for leaf in leaves for array in _dense_parts(leaf)]
        return {"kind": "arrays", **of_arrays(arrays), "shuffle": shuffle}
    if isinstance(x, keras.utils.PyDataset):
        return {"kind": f"PyDataset {type(x).__name__}", "batches": adapter.num_batches, "shuffle": shuffle}
    if isinstance(adapter, TFDatasetAdapter):
        return {"kind": "tf.data.Dataset", "batches": adapter.num_batches}
    return {"kind": type(x).__name__}


def _dense_parts(leaf: Any) -> Sequence[Any]:
    """A dense array itself, what a sparse one of SciPy holds."""
    if hasattr(leaf, "tocsr"):
        rows = leaf.tocsr()
        return rows.data, rows.indices, rows.indptr
    return (leaf,)


@contextmanager
def keras_refusals(x: Any) -> Iterator[None]:
    """Around Keras' own checks of data: what they raise, in one paragraph, the same on every rank.

    Raises:
        InputError: Keras refused the data.
    """
    try:
        yield
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        if isinstance(x, keras.utils.PyDataset) or inspect.isgenerator(x):
            raise  # the user's own code, which Keras has begun to run
        words = " ".join(str(error).split())
        raise InputError(
            "Expected data as keras.Model.fit takes them (NumPy arrays of equal length, a tf.data.Dataset of "
            "batches), distfit.TFRecords or distfit.local(...), received what Keras refuses with "
            f"{type(error).__name__}: {words[:_MOST_WORDS]}{'...' if len(words) > _MOST_WORDS else ''}"
        ) from error


def _refuse_no_data(x: Any) -> None:
    if x is None:
        raise InputError("Expected data in x, received None. Pass arrays, a tf.data.Dataset or distfit.TFRecords.")
    if isinstance(x, (str, os.PathLike)):
        raise InputError(
            f"Expected data in x, received the name {os.fspath(x)!r}. Pass distfit.TFRecords(...) to train "
            "on the record files of a folder."
        )


def _local_source(x: Local, request: Request, topology: Topology) -> Source:
    _refuse_arrays(request, "distfit.local")
    batch_size = request.batch_size
    if batch_size is not None and batch_size % topology.size:
        raise InputError(
            f"Expected batch_size to divide by the number of ranks with distfit.local, received {batch_size} "
            f"and {topology.size} ranks."
        )
    process_batch = None if batch_size is None else batch_size // topology.size
    dataset = x.dataset(InputContext(topology.rank, topology.size, process_batch))
    adapter = TFDatasetAdapter(dataset, class_weight=request.class_weight)
    own = adapter.get_tf_dataset()
    batches = _with_bounds(own)
    return Source(
        adapter=adapter,
        dataset=lambda epoch, first_step: batches,
        parts=topology.replicas_per_process,
        first_part=0,
        uneven=topology.size > 1,
        batch_size=batch_size,
        needs=lambda: needs_of(own),
        per_process=True,
        identity=lambda: {"kind": "distfit.local"},
    )


def _records_source(x: TFRecords, request: Request, topology: Topology) -> Source:
    _refuse_arrays(request, "distfit.TFRecords")
    batch_size = request.batch_size or x.batch_size or DEFAULT_BATCH_SIZE
    _check_batch_size(batch_size, topology)
    seed = request.seed if x.seed is None else x.seed
    place, workers = (topology.rank, topology.size, topology.replicas_per_process), x.workers_of(topology.local_size)

    def dataset(epoch: int, first_step: int) -> tf.data.Dataset:
        asked = Asked(seed, epoch, bool(request.shuffle), batch_size, place, workers, first_step, request.training)
        return x.batches(asked)

    return Source(
        adapter=_RecordsAdapter(x.steps_per_epoch(batch_size), batch_size),
        dataset=dataset,
        parts=topology.replicas_per_process if x.uneven else topology.num_replicas,
        first_part=0 if x.uneven else topology.first_replica,
        uneven=x.uneven and topology.size > 1,
        numbered=True,
        records=x.records,
        batch_size=batch_size,
        explain=partial(x.explain, training=request.training),
        in_order=not x.uneven,
        on_device=x.on_device,
        tally=x.tally(request.training),
        notes=x.notes(),
        begin=partial(x.begin, topology.is_chief, request.training),
        identity=lambda: {"kind": "TFRecords", **x.identity(), "shuffle": bool(request.shuffle)},
    )


class _RecordsAdapter(DataAdapter):
    """Keras' view of record files: how many batches of what size."""

    def __init__(self, num_batches: int | None, batch_size: int) -> None:
        self._num_batches = num_batches
        self._batch_size = batch_size

    @property
    def num_batches(self) -> int | None:
        return self._num_batches

    @property
    def batch_size(self) -> int:
        return self._batch_size


def _refuse_arrays(request: Request, what: str) -> None:
    for name in ("y", "sample_weight"):
        if getattr(request, name) is not None:
            raise InputError(f"Expected {name} to be part of the data of {what}, received it as an argument as well.")
    if request.class_weight is not None and what == "distfit.TFRecords":
        raise InputError("Expected sample weights from the transform of distfit.TFRecords, received class_weight.")


def _with_bounds(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Whole batches as a `Source` gives them: with their number of rows and origin 0."""
    packed = isinstance(dataset.element_spec, tuple)

    def with_bounds(*data: Any) -> tuple:
        return _row_count(data), tf.constant(0, tf.int64), data if packed else data[0]

    return dataset.map(with_bounds)


def _row_count(data: Any) -> tf.Tensor:
    leaf = next(leaf for leaf in keras.tree.flatten(data) if leaf is not None)
    if isinstance(leaf, (tf.SparseTensor, tf.RaggedTensor)):
        return tf.cast(leaf.dense_shape[0] if isinstance(leaf, tf.SparseTensor) else leaf.nrows(), tf.int64)
    return tf.shape(leaf, out_type=tf.int64)[0]
