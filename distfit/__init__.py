"""distfit: model.fit(...) becomes distfit.fit(model, ...), on one process, a node, or a cluster.

The names are imported when they are first used: `distfit --help` need not wait for TensorFlow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distfit.callbacks.policy import callback_policies, chief_only, on_every_rank
    from distfit.callbacks.tensorboard import TensorBoard
    from distfit.checking import check
    from distfit.checkpoint.options import Checkpoint
    from distfit.data.images.recipe import Images, Jitter
    from distfit.data.local import InputContext, local
    from distfit.data.tfrecords import TFRecords
    from distfit.errors import DistfitError, InputError, RunError
    from distfit.fitting import evaluate, fit, predict
    from distfit.session import Session, init
    from distfit.training.metric_rules import reduced

_HOMES = {
    "Checkpoint": "distfit.checkpoint.options",
    "DistfitError": "distfit.errors",
    "Images": "distfit.data.images.recipe",
    "InputContext": "distfit.data.local",
    "InputError": "distfit.errors",
    "Jitter": "distfit.data.images.recipe",
    "RunError": "distfit.errors",
    "Session": "distfit.session",
    "TFRecords": "distfit.data.tfrecords",
    "TensorBoard": "distfit.callbacks.tensorboard",
    "callback_policies": "distfit.callbacks.policy",
    "check": "distfit.checking",
    "chief_only": "distfit.callbacks.policy",
    "evaluate": "distfit.fitting",
    "fit": "distfit.fitting",
    "init": "distfit.session",
    "local": "distfit.data.local",
    "on_every_rank": "distfit.callbacks.policy",
    "predict": "distfit.fitting",
    "reduced": "distfit.training.metric_rules",
}
__all__ = [
    "Checkpoint",
    "DistfitError",
    "Images",
    "InputContext",
    "InputError",
    "Jitter",
    "RunError",
    "Session",
    "TFRecords",
    "TensorBoard",
    "callback_policies",
    "check",
    "chief_only",
    "evaluate",
    "fit",
    "init",
    "local",
    "on_every_rank",
    "predict",
    "reduced",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distfit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
