"""Learning-rate help, off unless asked: the rate for a global batch that grew with the replicas, reached gradually.

    chosen = plan(model, "linear", 5, num_replicas=4, steps_per_epoch=100, callbacks=[])
    chosen.sentence    # Learning rate: 0.1 x 4 replicas (linear) = 0.4, reached over 5 epochs (500 steps) from 0.1.
    with chosen.applied():
        ...            # the training; if it fails before its first step, the rate is what it was

`batch_size` is the global batch in distfit, so that a run on more replicas is the same training and needs no other
rate. This is for scripts that multiply the batch with the replicas.

What is set is a number, or a schedule of Keras' own: the saved model is plain Keras.

Sources: linear scaling and gradual warm-up, Goyal et al. 2017 (arXiv:1706.02677, 2.1 and 2.2); the square root,
Krizhevsky 2014 (arXiv:1404.5997, 5) and Hoffer et al. 2017 (arXiv:1705.08741, 4); the square root for Adam and its
relatives, Malladi et al. 2022 (arXiv:2205.10287).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
from keras.optimizers import schedules

from distfit.backends.hooks import optimizers_of
from distfit.callbacks.policy import callbacks_of_rank
from distfit.errors import InputError
from distfit.training.own_step import overrides

LINEAR, SQUARE_ROOT = "linear", "sqrt"
RULES = (None, LINEAR, SQUARE_ROOT)
# A number, or a schedule of Keras' own.
Rate: TypeAlias = float | schedules.LearningRateSchedule

# The arguments of Keras' schedules that are rates; the others are counts and ratios.
_RATES = {
    schedules.ExponentialDecay: ("initial_learning_rate",),
    schedules.InverseTimeDecay: ("initial_learning_rate",),
    schedules.PolynomialDecay: ("initial_learning_rate", "end_learning_rate"),
    schedules.PiecewiseConstantDecay: ("values",),
    schedules.CosineDecay: ("initial_learning_rate", "warmup_target"),
    schedules.CosineDecayRestarts: ("initial_learning_rate",),
}
# They have no rate of their own, but those inside them.
_WRAPPERS = (keras.optimizers.LossScaleOptimizer, keras.optimizers.MultiOptimizer)
_SETTERS = (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau)


@dataclass(frozen=True)
class Plan:
    """What becomes of a model's learning rates.

    Args:
        sentence: says so; "" where nothing was asked for.
        changes: (optimizer, its new rate), each optimizer once.
    """

    sentence: str = ""
    changes: tuple[tuple[Any, Rate], ...] = ()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Sets the rates, which stay; those of optimizers that have counted no batch when an exception leaves are put
        back, so that whoever corrects the reason and starts again does not scale twice. Entered before replicas share
        the optimizers' variables."""
        with ExitStack() as put_back:
            for optimizer, rate in self.changes:
                put_back.callback(_setting(optimizer, rate))
            yield
            put_back.pop_all()


def check(learning_rate_scaling: Any, warmup_epochs: Any) -> None:
    """
    Raises:
        InputError: the arguments are not what `plan` takes, or contradict each other.
    """
    if learning_rate_scaling not in RULES:
        raise InputError(
            f"Expected learning_rate_scaling to be None, 'linear' or 'sqrt', received {learning_rate_scaling!r}."
        )
    number = isinstance(warmup_epochs, numbers.Real) and not isinstance(warmup_epochs, bool)
    if not number or not 0 <= warmup_epochs < math.inf:
        raise InputError(f"Expected warmup_epochs to be a number of epochs from 0, received {warmup_epochs!r}.")
    if warmup_epochs and learning_rate_scaling is None:
        raise InputError(
            f"Expected learning_rate_scaling beside warmup_epochs={warmup_epochs}, as a warm-up goes from the rate as "
            "it is to the scaled one, received None. Pass 'linear' or 'sqrt', or leave warmup_epochs out."
        )


def plan(
    model: Any,
    scaling: str | None,
    warmup_epochs: float,
    num_replicas: int,
    steps_per_epoch: int | None,
    callbacks: Any = None,
) -> Plan:
    """Decide what becomes of a model's learning rates; changes nothing.

    Args:
        model: compiled.
        scaling: "linear" multiplies every rate by the number of replicas (Goyal et al. 2017, for SGD with momentum);
            "sqrt" by its square root, which suits Adam and its relatives, whose step does not grow with the gradient.
            None leaves all as it is.
        warmup_epochs: over so many epochs the rate rises from what it was to the scaled one, the same amount with
            every step (Goyal et al. 2017: 5). 0 begins with the scaled one.
        num_replicas: of the job.
        steps_per_epoch: None where it is not known. Keras counts steps (batches) here, also where an update takes
            several (`gradient_accumulation_steps`).
        callbacks: as in keras.Model.fit.

    Raises:
        InputError: as `check`; a schedule that is not Keras' own, or that has no room for a warm-up; a warm-up of
            unknown length, beside callbacks that set the rate, or of several optimizers of a model's own.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.SGD(0.1), "mse")
    >>> chosen = plan(model, "linear", 5, num_replicas=4, steps_per_epoch=100)
    >>> chosen.sentence
    'Learning rate: 0.1 x 4 replicas (linear) = 0.4, reached over 5 epochs (500 steps) from 0.1.'
    >>> with chosen.applied():
    ...     model.optimizer.get_config()["learning_rate"]["config"]["decay_steps"]
    500
    """
    check(scaling, warmup_epochs)
    if scaling is None:
        return Plan()
    optimizers = _with_rates(model)
    if warmup_epochs:
        _check_warmup(model, optimizers, steps_per_epoch, callbacks)
    warmup_steps = max(1, round(warmup_epochs * (steps_per_epoch or 0))) if warmup_epochs else 0
    decided = [_decided(one, scaling, num_replicas, warmup_epochs, warmup_steps) for one in optimizers]
    names = [f" of {optimizer.name}" if len(optimizers) > 1 else "" for optimizer in optimizers]
    sentences = [f"Learning rate{name}: {words}." for name, (words, _) in zip(names, decided, strict=True)]
    changes = [(one, rate) for one, (_, rate) in zip(optimizers, decided, strict=True) if rate is not None]
    return Plan(" ".join([*sentences, *_notes(callbacks)]), tuple(changes))


def scaled(rate: Rate, factor: float, warmup_steps: int) -> Rate:
    """A rate times a factor, reached within so many steps.

    Args:
        rate: a number or a schedule of Keras' own.
        warmup_steps: 0 for at once.

    Raises:
        InputError: a schedule whose rates are not known, or that has no room for a warm-up.

    >>> scaled(0.1, 2, warmup_steps=0)
    0.2
    >>> rising = scaled(0.5, 2, warmup_steps=4)
    >>> [float(rising(step)) for step in range(6)]
    [0.5, 0.625, 0.75, 0.875, 1.0, 1.0]
    """
    if isinstance(rate, float):
        if not warmup_steps:
            return rate * factor
        return schedules.PolynomialDecay(rate, warmup_steps, end_learning_rate=rate * factor, name="Warmup")
    if type(rate) not in _RATES:
        raise InputError(
            f"Expected a learning rate that is a number or a schedule of Keras' own, whose rates can be scaled, "
            f"received a {type(rate).__name__}. Scale it where it is made, and leave learning_rate_scaling out."
        )
    config = rate.get_config()
    target = _warmed_up(config, factor, warmup_steps, type(rate)) if warmup_steps else _multiplied(config, factor, rate)
    return type(rate).from_config(target)


def _multiplied(config: dict, factor: float, schedule: schedules.LearningRateSchedule) -> dict:
    def times(value: Any) -> Any:
        return [each * factor for each in value] if isinstance(value, (list, tuple)) else value * factor

    names = [name for name in _RATES[type(schedule)] if config[name] is not None]
    return config | {name: times(config[name]) for name in names}


def _warmed_up(config: dict, factor: float, steps: int, kind: type) -> dict:
    """CosineDecay has a warm-up of its own; its end stays where it was."""
    if kind is not schedules.CosineDecay:
        raise InputError(
            f"Expected a learning rate that can be warmed up, a number or a keras.optimizers.schedules.CosineDecay, "
            f"received a {kind.__name__}. Take one of these, or leave warmup_epochs out and begin the schedule low."
        )
    if config["warmup_target"] is not None:
        raise InputError(
            f"Expected a CosineDecay without a warm-up of its own beside warmup_epochs, received one of "
            f"{config['warmup_steps']} steps to {config['warmup_target']:g}. Leave one of the two out; the schedule's "
            "own is scaled as well."
        )
    if steps >= config["decay_steps"]:
        raise InputError(
            f"Expected a CosineDecay that is longer than the warm-up of {steps} steps, received one of "
            f"{config['decay_steps']}. Give it the steps of the whole training, or lower warmup_epochs."
        )
    return config | {
        "warmup_target": config["initial_learning_rate"] * factor,
        "warmup_steps": steps,
        "decay_steps": config["decay_steps"] - steps,
    }


def _with_rates(model: Any) -> list[Any]:
    """The model's optimizers, each that has a rate of its own.

    Raises:
        InputError: a MultiOptimizer does not know its optimizers yet.
    """
    found = optimizers_of(model)
    if any(isinstance(one, keras.optimizers.MultiOptimizer) and not one.optimizers for one in found):
        raise InputError(
            "Expected optimizers whose learning rates can be scaled before the training, received a MultiOptimizer of "
            "a function, which makes them later. Pass it a keras.optimizers.OptimizerMap, or scale the rates in the "
            "function and leave learning_rate_scaling out."
        )
    return [optimizer for optimizer in found if not isinstance(optimizer, _WRAPPERS)]


def _check_warmup(model: Any, optimizers: list[Any], steps_per_epoch: int | None, callbacks: Any) -> None:
    if steps_per_epoch is None:
        raise InputError(
            "Expected to know how many steps the epochs of warmup_epochs have, received data of unknown length. Pass "
            "steps_per_epoch."
        )
    setters = [type(one).__name__ for one in _all(callbacks) if isinstance(one, _SETTERS)]
    if setters:
        raise InputError(
            f"Expected no callback that sets the learning rate beside warmup_epochs, which makes it a schedule, "
            f"received {', '.join(setters)}: Keras refuses to set the rate on a schedule. Leave one of the two out; a "
            "LearningRateScheduler can warm up by itself."
        )
    if overrides(model, "train_step") and len(optimizers) > 1:
        names = ", ".join(optimizer.name for optimizer in optimizers)
        raise InputError(
            f"Expected a model whose batches are each one step of its optimizer beside warmup_epochs, received a "
            f"train_step of its own with {len(optimizers)} optimizers ({names}), which may use them more or less "
            "often. Leave warmup_epochs out and give each a schedule."
        )


def _decided(
    optimizer: Any, scaling: str, num_replicas: int, warmup_epochs: float, warmup_steps: int
) -> tuple[str, Rate | None]:
    """What to say of an optimizer's rate, and the new one, None for the one that it has."""
    if int(optimizer._iterations) > 0:
        return _left(optimizer), None
    rate, factor = _rate_of(optimizer), _factor(scaling, num_replicas)
    new = scaled(rate, factor, warmup_steps)
    words = _words(rate, factor, scaling, num_replicas)
    if num_replicas == 1:
        return words, None
    return words + _warmup_words(rate, warmup_epochs, warmup_steps), new


def _factor(scaling: str, num_replicas: int) -> float:
    return float(num_replicas) if scaling == LINEAR else math.sqrt(num_replicas)


def _rate_of(optimizer: Any) -> Any:
    """A number as it was written, 0.1 and not float32's 0.10000000149; all else as it is."""
    rate = optimizer._learning_rate
    return float(str(rate.numpy())) if isinstance(rate, keras.Variable) else rate


def _words(rate: Rate, factor: float, scaling: str, num_replicas: int) -> str:
    replicas = f"{num_replicas} replica{'s' if num_replicas != 1 else ''}"
    times = f"{replicas} (linear)" if scaling == LINEAR else f"the square root of {replicas}"
    if not isinstance(rate, float):
        return f"{type(rate).__name__}, whose rates are multiplied by {times}"
    return f"{rate:g} x {times} = {rate * factor:g}"


def _warmup_words(rate: Rate, epochs: float, steps: int) -> str:
    if not steps:
        return ""
    start = rate if isinstance(rate, float) else rate.get_config()["initial_learning_rate"]
    end = "" if isinstance(rate, float) else "; its decay ends where it did"
    return (
        f", reached over {epochs:g} epoch{'s' if epochs != 1 else ''} ({steps} step{'s' if steps != 1 else ''}) "
        f"from {start:g}{end}"
    )


def _left(optimizer: Any) -> str:
    return (
        f"{float(optimizer.learning_rate):g}, left as it is, as its optimizer has seen {int(optimizer._iterations)} "
        "batches and was scaled, if at all, when its training began (to begin anew, compile with a new optimizer)"
    )


def _notes(callbacks: Any) -> list[str]:
    schedulers = [one for one in _all(callbacks) if isinstance(one, keras.callbacks.LearningRateScheduler)]
    return ["A LearningRateScheduler sets it in each epoch, and has the last word."] if schedulers else []


def _all(callbacks: Any) -> list[Any]:
    return callbacks_of_rank(callbacks, is_chief=True, size=1)


def _setting(optimizer: Any, rate: Rate) -> Any:
    """Set an optimizer's rate; returns what puts the old one back unless the optimizer has counted a batch."""
    before, place = optimizer._learning_rate, _place(optimizer)
    number = before.numpy() if isinstance(before, keras.Variable) else None
    optimizer.learning_rate = rate

    def put_back() -> None:
        if int(optimizer._iterations) > 0:
            return
        if optimizer._learning_rate is not before:
            optimizer._learning_rate = before  # which makes it the last of the optimizer's variables
            if place is not None:
                # Variables are saved by their place: where it was, also when others were made meanwhile.
                optimizer._variables.insert(place, optimizer._variables.pop())
        if number is not None:
            before.assign(number)

    return put_back


def _place(optimizer: Any) -> int | None:
    """Where the variable of the rate stands among the optimizer's own, if it is one."""
    own = [id(variable) for variable in optimizer._variables]
    rate = id(optimizer._learning_rate)
    return own.index(rate) if rate in own else None
