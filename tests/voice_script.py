"""One job for tests/test_voice.py: `python -m tests.voice_script RECORDS` in a folder of its own.

Everything of distfit that leaves files behind, warnings of all ranks and of some. Each rank says at its end, in a file
of JSON, which files it opened for writing.
"""

import json
import logging
import os
import sys
import warnings
from pathlib import Path

OPENED: list[str] = []
# Below which a file counts; a launcher's and a library's own pipes and devices do not.
WATCHED = tuple(os.environ[name] for name in ("HOME", "TMPDIR", "VOICE_CWD"))
WRITING = os.O_WRONLY | os.O_RDWR


def note(event: str, arguments: tuple) -> None:
    """Of Python's audit hook: every file that Python opens."""
    if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & WRITING:
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if path.startswith(WATCHED):
            OPENED.append(path)


sys.addaudithook(note)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import distfit  # noqa: E402
from distfit.log import warn_once  # noqa: E402


class Warns(keras.callbacks.Callback):
    """In words that all ranks have in common, and in some that only some have; again in every epoch."""

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        session = distfit.init()
        warnings.warn("of everybody", stacklevel=1)
        logging.getLogger("a.library").warning("logged by everybody")
        if session.rank in (0, 2):
            warn_once("of zero and two")
        if session.rank == session.size - 1:
            warnings.warn("of the last rank", stacklevel=1)


def data(folder: str) -> distfit.TFRecords:
    features = {"x": tf.io.FixedLenFeature([4], tf.float32), "y": tf.io.FixedLenFeature([1], tf.float32)}
    return distfit.TFRecords(
        folder, features, lambda row: (row["x"], row["y"]), batch_size=12, streaming=False, cache="disk"
    )


def model() -> keras.Model:
    keras.utils.set_random_seed(7)
    built = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    built.compile("sgd", "mse", metrics=["mae"])
    return built


def main(folder: str) -> None:
    trained, x = model(), np.ones((24, 4), np.float32)
    distfit.fit(
        trained,
        data(folder),
        epochs=2,
        validation_data=data(folder),
        log_dir="runs/logs",
        checkpoint="runs/kept",
        callbacks=[
            keras.callbacks.ModelCheckpoint("best.keras", monitor="val_loss", save_best_only=True),
            keras.callbacks.ModelCheckpoint("weights/{epoch}.weights.h5", save_weights_only=True),
            keras.callbacks.CSVLogger("history.csv"),
            keras.callbacks.TensorBoard("more-logs", histogram_freq=1),
            keras.callbacks.EarlyStopping("val_loss", patience=3),
            Warns(),
        ],
    )
    distfit.evaluate(trained, data(folder), verbose=2)
    distfit.predict(trained, x, batch_size=12, verbose=2)
    told = {"rank": distfit.init().rank, "opened": sorted(set(OPENED))}
    Path(os.environ["VOICE_TOLD"], f"{told['rank']}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
