"""In place of distfit.fit in a child process: the same call for a few steps, its numbers kept, then the end.

    fitting.fit = Caught(spec, watch, keep)      # the script's own call of distfit.fit ends in keep(numbers, facts)

Nothing is written into the user's folders: no logs, no checkpoint, and of the callbacks only those of Keras that
decide about the training.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, NoReturn

import keras
import numpy as np
import tensorflow as tf

from distfit import fitting, prepare
from distfit.callbacks.policy import RESTORERS, WRITERS
from distfit.checking.rows import RowWatch, random_layers
from distfit.checking.spec import Facts, Spec
from distfit.data.local import Local
from distfit.errors import InputError
from distfit.monitor.announce import normalises_by_replica, unequal
from distfit.session import Session, init
from distfit.training.own_step import overrides
from distfit.training.step import Choices

Keep = Callable[[Session, dict[str, np.ndarray], Facts], NoReturn]

# What `announce.unequal` says begins like this; the check finds out by itself how much of a difference is theirs.
EXAMINED = ("BatchNormalization:", "Random layers:")
OF_LOCAL = "distfit.local: which records each rank reads is the script's own choice."
# They run a function of the script's, which may write.
_OF_SCRIPTS = (keras.callbacks.LambdaCallback,)
# They write, or train more replicas otherwise on purpose.
_NOT_USED = {"log_dir": None, "checkpoint": None, "learning_rate_scaling": None, "warmup_epochs": 0.0}


class Caught:
    """`distfit.fit` for `spec.steps` steps.

    Args:
        spec: which run this is.
        watch: of the rows of this process.
        keep: is given the numbers and facts, and ends the process.
    """

    def __init__(self, spec: Spec, watch: RowWatch, keep: Keep) -> None:
        self._spec, self._watch, self._keep = spec, watch, keep
        self._fit, self._signature = fitting.fit, inspect.signature(fitting.fit)
        functools.update_wrapper(self, fitting.fit)

    def __call__(self, *arguments: Any, **options: Any) -> NoReturn:
        given = self._signature.bind(*arguments, **options)
        given.apply_defaults()
        call = given.arguments
        session = init()
        chosen, left_out = callbacks_that_decide(call["callbacks"])
        left_out += [name for name, unused in _NOT_USED.items() if call[name] != unused]
        call |= {"callbacks": chosen, **_NOT_USED, **_training_rows(session, call)}
        call["sync_batch_norm"] = call["sync_batch_norm"] or self._spec.run.variant.sync_batch_norm
        steps = Steps()
        model = self._trained(call, steps)
        reason = why_not_evaluated(model, call["x"])
        evaluation = {} if reason else self._evaluated(model, call)
        choices = Choices(call["sync_batch_norm"], call["reduction_dtype"], call["bucket_bytes"])
        facts = facts_of(session, model, choices, steps, self._watch)
        if isinstance(call["x"], Local):
            facts = replace(facts, notes=(*facts.notes, OF_LOCAL))
        facts = replace(facts, left_out=tuple(left_out), not_evaluated=reason)
        self._keep(session, {**weights_of(model), **steps.numbers(), **evaluation}, facts)

    def _trained(self, call: dict[str, Any], steps: Steps) -> keras.Model:
        first = call["initial_epoch"]
        changed = {
            "model": self._prepared(call["model"]),
            "epochs": first + 1,
            "steps_per_epoch": self._spec.steps,
            "verbose": 0,
            "callbacks": [*call["callbacks"], steps],
            "logs_every_steps": 1,  # each step is compared
            "stall_limit_s": self._spec.stall_limit_s,
        }
        return self._fit(**(call | changed)).model

    def _prepared(self, model: Any) -> Any:
        """A model, or the function that builds it; what is neither, distfit.fit refuses."""
        if isinstance(model, keras.Model):
            return self._watch.switch_off(model)
        return (lambda: self._watch.switch_off(model())) if callable(model) else model

    def _evaluated(self, model: keras.Model, call: dict[str, Any]) -> dict[str, np.ndarray]:
        found = fitting.evaluate(
            model,
            call["x"],
            call["y"],
            batch_size=call["batch_size"],
            verbose=0,
            sample_weight=call["sample_weight"],
            steps=self._spec.steps,
            return_dict=True,
        )
        return {f"evaluation/{name}": np.asarray(value) for name, value in found.items()}


class Steps(keras.callbacks.Callback):
    """What each step logged, and the weights before the first.

    Attributes:
        taken: steps.
        initial: a digest of the weights; None where they were not made before the first step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._logs: list[dict[str, Any]] = []
        self._last: dict[str, Any] = {}
        self.initial: str | None = None

    @property
    def taken(self) -> int:
        return len(self._logs)

    def on_train_begin(self, logs: Any = None) -> None:
        weights = [np.asarray(weight, np.float64).tobytes() for weight in self.model.get_weights()]
        self.initial = hashlib.blake2b(b"".join(weights), digest_size=8).hexdigest() if weights else None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._logs.append({name: np.asarray(value) for name, value in (logs or {}).items()})

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._last = {name: np.asarray(value) for name, value in (logs or {}).items()}

    def numbers(self) -> dict[str, np.ndarray]:
        """The losses of each step, and all that was logged at the end."""
        losses = [name for name in self._last if "loss" in name] or list(self._last)
        by_step = {name: np.array([logs[name] for logs in self._logs if name in logs]) for name in losses}
        return {f"losses/{name}": values for name, values in by_step.items()} | {
            f"metrics/{name}": value for name, value in self._last.items()
        }


def facts_of(session: Session, model: keras.Model, choices: Choices, steps: Steps, watch: RowWatch) -> Facts:
    """What a run says about a training beside its numbers. Collective."""
    return Facts(
        steps=steps.taken,
        dtype=dtype_of(model),
        batch_norm=normalises_by_replica(model, choices),
        random=tuple(that_draw(model, watch.drew)),
        notes=tuple(note for note in unequal(model, choices, False) if not note.startswith(EXAMINED)),
        digests=_over_ranks(session, watch.digests),
        initial=steps.initial,
    )


def callbacks_that_decide(given: Any) -> tuple[list[Any], list[str]]:
    """Of a script's callbacks those of Keras that change the training and write nothing; and the names of the others.

    >>> stop, saver = keras.callbacks.EarlyStopping("loss"), keras.callbacks.ModelCheckpoint("a.keras")
    >>> chosen, left_out = callbacks_that_decide([stop, saver])
    >>> chosen == [stop], left_out
    (True, ['ModelCheckpoint'])
    """
    if given is None:
        return [], []
    flat = given.callbacks if isinstance(given, keras.callbacks.CallbackList) else keras.tree.flatten(given)
    chosen = [
        each
        for each in flat
        if type(each).__module__.startswith(f"{keras.__name__}.")
        and not isinstance(each, (*WRITERS, *RESTORERS, *_OF_SCRIPTS))
    ]
    return chosen, [type(each).__name__ for each in flat if not any(each is one for one in chosen)]


def why_not_evaluated(model: keras.Model, x: Any) -> str:
    """Why there can be no evaluation, "" if there can."""
    if inspect.isgenerator(x):
        return "a Python generator gives its data once"
    own_training = overrides(model, "train_step") and not overrides(model, "test_step")
    if own_training and (model._compile_loss is None or type(model).call is keras.Model.call):
        return "the model has a train_step of its own, and no test_step"
    return ""


def dtype_of(model: keras.Model) -> str:
    """The shortest floating-point type that a layer computes in.

    >>> dtype_of(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, dtype="float64")]))
    'float32'
    """
    found = {tf.as_dtype(layer.compute_dtype) for layer in model._flatten_layers() if layer.compute_dtype is not None}
    return min((dtype for dtype in found if dtype.is_floating), key=lambda dtype: (dtype.size, dtype.name)).name


def that_draw(model: keras.Model, modules: Collection[str]) -> list[str]:
    """Who draws random numbers in a step, none if nobody does.

    Args:
        modules: that were drawn from, "keras.random" or "tf.random".

    >>> that_draw(keras.Sequential([keras.Input((1,)), keras.layers.Dropout(0.5)]), ["keras.random"])
    ['Dropout']
    """
    keepers = sorted({type(layer).__name__ for layer in random_layers(model)})
    return [
        name for module in sorted(modules) for name in (keepers if module == "keras.random" and keepers else [module])
    ]


def _training_rows(session: Session, call: dict[str, Any]) -> dict[str, Any]:
    """The data without those that `validation_split` takes away; nothing is validated on."""
    arrays = call["x"], call["y"], call["sample_weight"]
    (x, y, sample_weight), _ = session.agree(
        lambda: prepare.split(arrays, call["validation_split"], call["validation_data"])
    )
    unused = {"validation_split": 0.0, "validation_data": None, "validation_steps": None}
    return {"x": x, "y": y, "sample_weight": sample_weight, **unused}


def _over_ranks(session: Session, digests: list[int]) -> tuple[int, ...]:
    with session.running("comparing the data"):
        by_rank = session.transport.gather(digests)
    return tuple(sum(of_step) for of_step in zip(*by_rank, strict=False))


def weights_of(model: keras.Model) -> dict[str, np.ndarray]:
    """By place and path.

    Raises:
        InputError: there are none.
    """
    found = {}
    for number, variable in enumerate(model.weights):
        # NumPy's files do not know bfloat16.
        value = keras.ops.cast(variable, "float32") if variable.dtype == "bfloat16" else variable
        found[f"weights/{number}:{variable.path}"] = np.asarray(value)
    if not found:
        raise InputError("Expected a model with weights to train, received one without.")
    return found
