import keras
import numpy as np
import pytest

import distfit
from distfit.callbacks.policy import callbacks_of_rank
from distfit.callbacks.saver import ModelSaver
from distfit.checks import shareable
from distfit.errors import InputError, RunError


class OwnCheckpoint(keras.callbacks.ModelCheckpoint):
    pass


class Own(keras.callbacks.Callback):
    pass


@pytest.fixture
def model():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def test_writers_and_their_subclasses_run_on_the_chief_alone(tmp_path):
    writers = [OwnCheckpoint(str(tmp_path / "m.keras")), keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))]
    others = [keras.callbacks.EarlyStopping(), Own()]
    assert callbacks_of_rank([*writers, *others], is_chief=True, size=2) == [*writers, *others]
    assert callbacks_of_rank([*writers, *others], is_chief=False, size=2) == others


def test_none_one_callback_and_a_list_of_keras_are_taken():
    own = Own()
    assert callbacks_of_rank(None, is_chief=True, size=1) == []
    assert callbacks_of_rank(own, is_chief=True, size=1) == [own]
    assert own in callbacks_of_rank(keras.callbacks.CallbackList([own]), is_chief=True, size=1)


def test_what_ranks_would_restore_over_each_other_is_refused_for_several(tmp_path):
    backup = keras.callbacks.BackupAndRestore(str(tmp_path))
    assert callbacks_of_rank([backup], is_chief=True, size=1) == [backup]
    with pytest.raises(InputError, match="BackupAndRestore, which every rank would write"):
        callbacks_of_rank([backup], is_chief=True, size=2)


def test_the_saved_model_is_replaced_whole(model, tmp_path, monkeypatch):
    saver = ModelSaver(tmp_path / "new" / "folder")
    saver.set_model(model)
    saver.on_epoch_end(0)
    path = tmp_path / "new" / "folder" / "model.keras"
    good = path.read_bytes()

    def breaks_half_way(partial):
        partial.write_bytes(good[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(model, "save", breaks_half_way)
    with pytest.raises(RunError, match="no space"):
        saver.on_epoch_end(1)
    assert path.read_bytes() == good
    assert list(path.parent.iterdir()) == [path]


def test_what_replicas_would_compute_wrongly_is_refused():
    normal = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization(synchronized=True)])
    shareable(normal, replicas=2)
    fixed = keras.Sequential([keras.Input(batch_shape=(8, 2)), keras.layers.Dense(1)])
    with pytest.raises(InputError, match="built for batches of 8"):
        shareable(fixed, replicas=2)


def test_an_evaluation_leaves_the_history_of_the_training(model):
    rows = np.ones((4, 2)), np.ones((4, 1))
    history = distfit.fit(model, *rows, epochs=2, verbose=0)
    distfit.evaluate(model, *rows, verbose=0)
    distfit.predict(model, rows[0], verbose=0)
    assert model.history is history


def test_the_same_engine_in_another_spelling_is_the_same_session():
    session = distfit.init()
    assert distfit.init("single") is session
    assert distfit.init("single", devices=1) is session
    assert distfit.init(devices=1) is session


def test_a_callback_stops_a_prediction_of_one_process(model):
    class Stop(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch, logs=None):
            self.model.stop_predicting = True

    rows = distfit.predict(model, np.ones((10, 2)), batch_size=4, callbacks=[Stop()], verbose=0)
    assert rows.shape == (4, 1)
