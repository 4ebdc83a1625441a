"""Which callbacks of other packages leave something behind: told by where their classes come from.

    is_writer(wandb.integration.keras.WandbMetricsLogger())      # True: the chief alone runs it
    is_writer(keras_tuner's TunerCallback)                       # False: it runs everywhere
    is_writer(MyCallback())                                      # None: nothing is known of it

None of these packages is imported. A user's subclass of one of their classes follows its base.

Not in the table, as they have no callback: ClearML (2.1), which listens to TensorBoard and ModelCheckpoint, and
CodeCarbon (3.3). What starts a run (`wandb.init`, `mlflow.start_run`, `Task.init`, `EmissionsTracker`) is the script's
own call, which it makes on the chief alone; docs/guides/loggers.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Known:
    """What is known of the callbacks of a package.

    Attributes:
        module: the beginning of the dotted name of their modules.
        writes: whether they leave something behind, and so run on the chief alone.
        why: what they do, in a few words.
        source: where that was looked up.
        classes: the names of those that this is said of; empty for all of the module.
    """

    module: str
    writes: bool
    why: str
    source: str
    classes: tuple[str, ...] = ()

    def covers(self, kind: type) -> bool:
        """Whether a class is one of them.

        >>> Known("csv", True, "", "").covers(__import__("csv").DictWriter)
        True
        >>> Known("cs", True, "", "").covers(__import__("csv").DictWriter)
        False
        """
        inside = kind.__module__ == self.module or kind.__module__.startswith(f"{self.module}.")
        return inside and (not self.classes or kind.__name__ in self.classes)


KNOWN = (
    Known("wandb", True, "sends logs, models and tables to a W&B run", "wandb 0.31, integration/keras"),
    Known("mlflow", True, "logs to an MLflow run", "mlflow 3.17, keras/callback.py, tensorflow/callback.py"),
    Known(
        "tensorboard", True, "writes event files of the HParams plugin", "tensorboard 2.21, plugins/hparams/_keras.py"
    ),
    Known("comet_ml", True, "sends logs to a Comet experiment", "comet-ml 3.58, callbacks/_keras.py"),
    Known(
        "neptune_tensorflow_keras",
        True,
        "sends logs to a Neptune run",
        "neptune-tensorflow-keras 2.2, impl/__init__.py",
    ),
    Known("neptune", True, "hands out the same", "neptune-client 0.16, new/integrations/tensorflow_keras"),
    Known("aim", True, "writes to an Aim repository", "aim 3, sdk/adapters/keras.py"),
    Known("dvclive", True, "writes DVCLive's files", "dvclive 3.49, keras.py"),
    Known("tqdm", True, "draws progress bars", "tqdm 4.70, keras.py"),
    Known(
        "keras_tuner",
        True,
        "saves the weights of a trial's best epoch",
        "keras-tuner 1.4, src/engine/tuner_utils.py",
        ("SaveBestEpoch",),
    ),
    # A rank's tuner is told by its own callback; that of another rank has trials of its own.
    Known("keras_tuner", False, "calls the tuner of its rank", "the same", ("TunerCallback",)),
    # It raises where a trial is given up, which all ranks have to do.
    Known("optuna_integration", False, "gives up a trial", "optuna-integration 5.0, keras/keras.py"),
    Known("optuna", False, "gives up a trial", "optuna 3, integration/keras.py, which later became optuna-integration"),
)


def is_writer(callback: Any) -> bool | None:
    """Whether a callback leaves something behind, as far as its package is known; None where it is not.

    Args:
        callback: a keras.callbacks.Callback.

    >>> import keras
    >>> kind = type("WandbMetricsLogger", (keras.callbacks.Callback,), {"__module__": "wandb.integration.keras"})
    >>> is_writer(kind()), is_writer(type("Mine", (kind,), {})()), is_writer(keras.callbacks.EarlyStopping())
    (True, True, None)
    """
    for kind in type(callback).__mro__:
        for known in KNOWN:
            if known.covers(kind):
                return known.writes
    return None
