"""predict and evaluate on several ranks: every row once and in order, and no rank holds more than it was asked to.

Ranks are threads here, but for one launch under mpirun (tests/predict_script.py).
"""

from __future__ import annotations

import json
import resource
from contextlib import contextmanager

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import distfit
from distfit.errors import InputError, RunError
from distfit.thread_ranks import run
from distfit.training import predicting
from tests.ranks import launch

RANKS = 3
ROWS = 37
X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("float32")
BATCH = 8  # the last batch has 5 rows
CHUNK_BYTES = 2 * BATCH * 3 * 4


def _built(outputs, model=keras.Model):
    """A model over X, the same each time it is made."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,))
    return model(inputs, outputs(keras.layers.Dense(3)(inputs)))


def _strings(rows):
    return keras.layers.Lambda(lambda value: tf.strings.as_string(value), output_shape=(3,))(rows)


def _rows_of_several_lengths(rows):
    """Two columns in a whole batch, one in a shorter one."""
    return _columns(rows, BATCH)


def _columns(rows, whole):
    def cut(value):
        return value[:, : 1 + tf.cast(tf.shape(value)[0] == whole, tf.int32)]

    return keras.layers.Lambda(cut, output_shape=(None,))(rows)


MODELS = {
    "one output": lambda rows: rows,
    "a number a row": lambda rows: keras.ops.sum(rows, axis=1),
    "a list": lambda rows: [keras.layers.Identity(name="first")(rows), keras.layers.ReLU(name="second")(rows)],
    "names": lambda rows: {"left/right": rows, "up": -rows},
    "nested": lambda rows: {"a": rows, "b": [rows + 1, rows + 2]},
    "strings": _strings,
}


def predicted(outputs=MODELS["one output"], x=X, **arguments):
    """What a rank gets of a prediction."""
    return distfit.predict(_built(outputs), x, **{"batch_size": BATCH, "verbose": 0} | arguments)


def same(received, expected):
    """Equal structures, and equal arrays in them up to the rounding of another batch size."""
    keras.tree.assert_same_structure(received, expected)
    for own, other in zip(keras.tree.flatten(received), keras.tree.flatten(expected), strict=True):
        assert own.dtype == other.dtype
        if own.dtype == object:
            np.testing.assert_array_equal(own, other)
        else:
            np.testing.assert_allclose(own, other, atol=1e-6)


@pytest.fixture
def chunks_of_two_steps(monkeypatch):
    """A chunk has two batches of three float32 a row; the `Outputs` of a test's predictions, in a list."""
    made = []

    class Seen(predicting.Outputs):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(predicting, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(predicting, "Outputs", Seen)
    return made


@pytest.fixture
def exchanges(monkeypatch):
    """Host exchanges by the chief's transport: their names, in order."""
    from distfit.backends import threads

    made = []

    def counted(name):
        method = getattr(threads._Meeting, name)

        def call(self, value):
            if self._topology.is_chief:
                made.append(name)
            return method(self, value)

        return call

    for name in ("sum", "gather", "collect"):
        monkeypatch.setattr(threads._Meeting, name, counted(name))
    return made


def test_every_rank_gets_all_rows_in_order():
    def everything():
        return {name: predicted(outputs) for name, outputs in MODELS.items()}

    for received in run(everything, RANKS):
        for name, outputs in MODELS.items():
            same(received[name], _built(outputs).predict(X, batch_size=BATCH, verbose=0))


@pytest.mark.parametrize("name", MODELS)
def test_one_process_is_keras_to_the_bit(name):
    expected = _built(MODELS[name]).predict(X, batch_size=BATCH, verbose=0)
    for own, other in zip(*map(keras.tree.flatten, (predicted(MODELS[name]), expected)), strict=True):
        np.testing.assert_array_equal(own, other)


def test_the_chief_alone_gets_all_rows(chunks_of_two_steps, exchanges):
    chief, *others = run(lambda: predicted(gather="chief", x=np.tile(X, (4, 1))), RANKS)
    same(chief, np.tile(predicted(), (4, 1)))
    assert others == [None] * (RANKS - 1)
    # 148 rows are 19 steps: the first tells how large one is, then two a chunk.
    assert exchanges.count("collect") == 10
    held = [outputs.most_rows for outputs in chunks_of_two_steps[:RANKS]]
    assert sorted(held) == [4, 6, 2 * BATCH], "ranks hold their part of a chunk, the chief a chunk"


def test_exchanges_are_few(exchanges):
    run(lambda: predicted(gather="chief", x=np.tile(X, (100, 1))), 2)
    # 463 steps, of which 256 make a chunk at most.
    assert exchanges.count("collect") == 3


@pytest.mark.parametrize("name", ["one output", "a number a row", "a list", "names", "nested"])
def test_rows_are_written_as_they_come(name, tmp_path, chunks_of_two_steps):
    folder = tmp_path / "of" / "a run"
    expected = predicted(MODELS[name])
    chief, *others = run(lambda: predicted(MODELS[name], to=folder), RANKS)
    assert others == [None] * (RANKS - 1)
    assert all(isinstance(rows, np.memmap) for rows in keras.tree.flatten(chief))
    same(keras.tree.map_structure(np.array, chief), expected)
    listing = json.loads((folder / "predictions.json").read_text())
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(
        [*(f"{n}.npy" for n in listing), "predictions.json"]
    )
    for own, rows in zip(listing.items(), keras.tree.flatten(expected), strict=True):
        file, facts = own
        np.testing.assert_allclose(np.load(folder / f"{file}.npy"), rows, atol=1e-6)
        assert facts == {"dtype": str(rows.dtype), "shape": list(rows.shape)}
    assert [entry.name for entry in folder.parent.iterdir()] == ["a run"]
    bytes_of_row = sum(rows[0].nbytes for rows in keras.tree.flatten(expected))
    assert max(outputs.most_rows for outputs in chunks_of_two_steps[1:]) <= max(BATCH, CHUNK_BYTES // bytes_of_row)


def test_files_have_the_names_of_outputs():
    assert predicting.names_of({"a/b": 0, "a_b": 0, "..": 0}) == ["output", "a_b", "a_b.2"]
    assert predicting.names_of([0, 0], ["only one name"]) == ["0", "1"]


def test_a_type_that_numpy_does_not_know_is_written_too(tmp_path):
    half = lambda rows: keras.ops.cast(rows, "bfloat16")  # noqa: E731
    rows = predicted(half, to=tmp_path / "p")
    assert rows.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.array(rows), predicted(half))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gather": "rank 0"}, "gather to be 'all' or 'chief'"),
        ({"to": 5}, "the path of a folder"),
        ({"to": "new", "gather": "all"}, "chief alone opens"),
        ({"to": "taken"}, "holds mine.txt. Remove it"),
        ({"to": "taken/mine.txt"}, "mine.txt"),
    ],
)
def test_ways_that_do_not_go_are_refused_on_every_rank(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    refused = run(lambda: _refusal(**arguments), 2)
    assert all(message in text for text in refused), refused
    assert (tmp_path / "taken" / "mine.txt").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def _refusal(*args, **arguments):
    with pytest.raises(InputError) as refused:
        predicted(*args, **arguments)
    return str(refused.value)


def test_what_no_file_can_hold_is_refused_and_leaves_nothing(tmp_path, chunks_of_two_steps):
    assert "strings, say" in _refusal(MODELS["strings"], to=tmp_path / "p")
    assert "rows of one shape" in _refusal(_rows_of_several_lengths, to=tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_rows_of_several_lengths_are_ragged_as_in_keras():
    expected = _built(_rows_of_several_lengths).predict(X, batch_size=BATCH, verbose=0)
    assert isinstance(expected, tf.RaggedTensor)
    for received in (
        predicted(_rows_of_several_lengths),
        *run(lambda: predicted(lambda rows: _columns(rows, BATCH // 2)), 2),
    ):
        assert isinstance(received, tf.RaggedTensor)
        assert received.shape[0] == ROWS
    np.testing.assert_allclose(predicted(_rows_of_several_lengths).flat_values, expected.flat_values)


def test_ragged_and_sparse_outputs_are_refused_by_name():
    ragged = keras.layers.Lambda(lambda value: tf.RaggedTensor.from_tensor(value), output_shape=(None,))
    assert "received a RaggedTensor" in _refusal(lambda rows: ragged(rows))


def test_a_killed_prediction_leaves_the_folder_free(tmp_path):
    left = tmp_path / ".p.partial"
    left.mkdir()
    (left / "output.npy").write_text("half of it")
    same(np.array(predicted(to=tmp_path / "p")), predicted())
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


def test_a_failing_callback_leaves_no_files(tmp_path):
    class Fails(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch, logs=None):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        predicted(to=tmp_path / "p", callbacks=[Fails()])
    assert list(tmp_path.iterdir()) == []


@contextmanager
def files_of_at_most(limit):
    """Nothing can be written beyond so many bytes of a file: the system's answer is that of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_it_with_a_sentence_and_leaves_nothing(tmp_path):
    with files_of_at_most(2**17), pytest.raises(RunError, match=r"received: File too large.*Make room"):
        predicted(to=tmp_path / "p", x=np.tile(X, (500, 1)), batch_size=512)
    assert list(tmp_path.iterdir()) == []


def test_two_predictions_into_one_folder_are_not_mixed(tmp_path):
    class Another(keras.callbacks.Callback):
        def on_predict_begin(self, logs=None):
            predicted(to=tmp_path / "p", x=-X)

    with pytest.raises(RunError, match="another process writes there"):
        predicted(to=tmp_path / "p", callbacks=[Another()])
    same(np.array(np.load(tmp_path / "p" / "output.npy")), predicted(x=-X))


def test_steps_and_datasets_of_unknown_length():
    even = tf.data.Dataset.from_tensor_slices(X).filter(lambda row: row[0] > 0).batch(BATCH)
    chosen = X[X[:, 0] > 0]

    def ways():
        return {
            "two steps": predicted(steps=2),
            "unknown": predicted(x=even, batch_size=None, gather="chief"),
            "fewer than ranks": predicted(x=X[:1]),
        }

    chief, other, _ = run(ways, RANKS)
    whole = predicted()
    for received in (chief, other):
        same(received["two steps"], whole[: 2 * BATCH])
        same(received["fewer than ranks"], whole[:1])
    same(chief["unknown"], predicted(x=chosen))
    assert other["unknown"] is None


def test_data_without_a_batch_are_refused_on_every_rank():
    none = tf.data.Dataset.from_tensor_slices(X).filter(lambda row: row[0] > 1e9).batch(BATCH)
    assert all("at least one batch" in text for text in run(lambda: _refusal(x=none, batch_size=None), 2))


def test_with_local_data_each_rank_keeps_its_own():
    whole = predicted()

    def own():
        rank = distfit.init().rank
        part = distfit.local(tf.data.Dataset.from_tensor_slices(X[: 10 * rank]).batch(4))
        return predicted(x=part, batch_size=None), _refusal(x=part, batch_size=None, gather="chief")

    for rank, (received, refused) in enumerate(run(own, RANKS)):
        same(received, whole[: 10 * rank])
        assert "each rank predicts its own" in refused


class StopsAfter(keras.callbacks.Callback):
    """On one rank only."""

    def __init__(self, step, rank):
        super().__init__()
        self.step, self.rank, self.seen = step, rank, []

    def on_predict_batch_end(self, batch, logs=None):
        self.seen.append(logs["outputs"])
        if batch == self.step and distfit.init().rank == self.rank:
            self.model.stop_predicting = True


@pytest.mark.parametrize("arguments", [{}, {"gather": "chief"}])
def test_when_one_rank_stops_all_return_the_rows_up_to_that_step(arguments, chunks_of_two_steps):
    def stopped():
        return predicted(callbacks=[StopsAfter(1, rank=2)], **arguments)

    chief, *others = run(stopped, RANKS)
    expected = predicted()[: 2 * BATCH]
    same(chief, expected)
    for received in others:
        assert received is None if arguments else same(received, expected) is None


def test_callbacks_see_the_outputs_for_the_rows_of_their_rank():
    def seen():
        watching = StopsAfter(None, rank=0)
        return predicted(callbacks=[watching]), watching.seen

    whole = predicted()
    by_rank = [seen for _, seen in run(seen, 2)]
    same(np.concatenate([rows for of_step in zip(*by_rank, strict=True) for rows in of_step]), whole)
    alone = StopsAfter(None, rank=0)
    model = _built(MODELS["one output"])
    model.compile(steps_per_execution=2)
    distfit.predict(model, X, batch_size=BATCH, callbacks=[alone], verbose=0)
    assert [len(rows) for rows in alone.seen] == [16, 16, 5]
    same(np.concatenate(alone.seen), whole)


def test_ranks_that_see_other_batches_are_told_apart():
    def own_rows():
        data = tf.data.Dataset.from_tensor_slices(X + distfit.init().rank).batch(BATCH)
        return _refusal(x=data, batch_size=None)

    assert all("different ones at step 1" in text for text in run(own_rows, 2))


# Evaluation ---------------------------------------------------------------------------------------------------------

Y = (X.sum(axis=1, keepdims=True) > 0).astype("float32")
WEIGHT = np.random.default_rng(1).uniform(size=ROWS).astype("float32")


def _judged():
    """Two outputs with losses, weights and metrics of their own."""
    keras.utils.set_random_seed(2)
    inputs = keras.Input((4,))
    left, right = keras.layers.Dense(1, "sigmoid", name="left"), keras.layers.Dense(1, "sigmoid", name="right")
    model = keras.Model(inputs, [left(inputs), right(inputs)])
    model.compile(
        "sgd",
        {"left": "binary_crossentropy", "right": "mae"},
        loss_weights={"left": 1.0, "right": 0.25},
        metrics={"left": keras.metrics.AUC(name="auc")},
        weighted_metrics={"right": "accuracy"},
    )
    return model


EVALUATIONS = {
    "steps": {"steps": 3},
    "weights, and a last batch without rows on two ranks": {
        "rows": 2 * BATCH + 1,
        "sample_weight": [WEIGHT, WEIGHT**2],
    },
}


def _evaluated(evaluate, model, rows=ROWS, **arguments):
    if "sample_weight" in arguments:
        arguments["sample_weight"] = [weight[:rows] for weight in arguments["sample_weight"]]
    return evaluate(model, X[:rows], [Y[:rows], 1 - Y[:rows]], batch_size=BATCH, verbose=0, **arguments)


def _everything(evaluate):
    def numbers():
        model = _judged()
        named = {name: _evaluated(evaluate, model, return_dict=True, **how) for name, how in EVALUATIONS.items()}
        return named, _evaluated(evaluate, model, rows=2)

    return numbers


def test_evaluate_on_ranks_is_that_of_one_process():
    expected, listed = _everything(lambda model, *data, **how: model.evaluate(*data, **how))()
    for received, own_list in run(_everything(distfit.evaluate), RANKS):
        assert received.keys() == expected.keys()
        for name, numbers in expected.items():
            assert list(received[name]) == list(numbers)
            for key in numbers:
                np.testing.assert_allclose(
                    received[name][key], numbers[key], rtol=1e-6, atol=1e-6, err_msg=f"{name} {key}"
                )
        assert len(own_list) == len(listed)
        for own, other in zip(own_list, listed, strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-6, atol=1e-6)


def test_evaluate_of_local_data_counts_rows_not_ranks():
    def own():
        rank = distfit.init().rank
        bounds = [0, 0, 30, ROWS]  # none, most, few
        part = slice(bounds[rank], bounds[rank + 1])
        data = tf.data.Dataset.from_tensor_slices((X[part], (Y[part], 1 - Y[part]))).batch(4)
        return distfit.evaluate(_judged(), distfit.local(data), verbose=0, return_dict=True)

    expected = _judged().evaluate(X, [Y, 1 - Y], verbose=0, return_dict=True)
    # Keras averages an output's loss over batches, so that it depends on how they are cut; see the test above.
    del expected["left_loss"], expected["right_loss"]
    for received in run(own, RANKS):
        for name, value in expected.items():
            np.testing.assert_allclose(received[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.mpi
@pytest.mark.slow
def test_processes_do_the_same_and_a_killed_one_leaves_no_half(tmp_path):
    def job(how):
        return launch(["-m", "tests.predict_script", str(tmp_path / "p"), how], ranks=2)

    killed = job("killed")
    assert killed.code != 0
    assert "prediction, step 4" in killed.report()
    assert not (tmp_path / "p").exists()
    whole = job("whole")
    assert whole.code == 0, whole.report()
    same(np.load(tmp_path / "p" / "output.npy"), predicted())
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]
