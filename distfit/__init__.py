"""distfit: model.fit(...) becomes distfit.fit(model, ...), on one process, a node, or a cluster.

The names are imported when they are first used: `distfit --help` need not wait for TensorFlow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distfit.checking import check
    from distfit.data.images.recipe import Images, Jitter
    from distfit.data.local import InputContext, local
    from distfit.data.tfrecords import TFRecords
    from distfit.errors import DistfitError, InputError, RunError
    from distfit.fitting import evaluate, fit, predict
    from distfit.session import Session, init

_HOMES = {
    "DistfitError": "distfit.errors",
    "Images": "distfit.data.images.recipe",
    "InputContext": "distfit.data.local",
    "InputError": "distfit.errors",
    "Jitter": "distfit.data.images.recipe",
    "RunError": "distfit.errors",
    "Session": "distfit.session",
    "TFRecords": "distfit.data.tfrecords",
    "check": "distfit.checking",
    "evaluate": "distfit.fitting",
    "fit": "distfit.fitting",
    "init": "distfit.session",
    "local": "distfit.data.local",
    "predict": "distfit.fitting",
}
__all__ = [
    "DistfitError",
    "Images",
    "InputContext",
    "InputError",
    "Jitter",
    "RunError",
    "Session",
    "TFRecords",
    "check",
    "evaluate",
    "fit",
    "init",
    "local",
    "predict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distfit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
