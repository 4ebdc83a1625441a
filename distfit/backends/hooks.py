"""What every engine with several replicas does to a Keras model for the time of a run, and undoes.

Hooks go on the instance, never on a subclass: a dynamically made optimizer class is saved under its base's
name and its `.keras` file does not load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from distfit.errors import InputError

if TYPE_CHECKING:
    from distfit.backends.base import Backend

# Any odd number far from small seeds: the first word of replica r's seed is the generator's own plus r times it.
_STREAM_STEP = 0x5851F42D


def variables_of(model: Any) -> list[Any]:
    """Every Keras variable that training changes, once each: weights, seeds, metrics, optimizer."""
    found: dict[int, Any] = {}
    for variable in [*model.variables, *model.metrics_variables, *_optimizer_variables(model)]:
        found.setdefault(id(variable), variable)
    return list(found.values())


def optimizers_of(model: Any) -> list[Any]:
    """The model's optimizer and the one that it wraps, if it wraps one; empty for a model without."""
    optimizers = []
    optimizer = getattr(model, "optimizer", None)
    while optimizer is not None:
        optimizers.append(optimizer)
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizers


def seed_generators_of(model: Any) -> list[Any]:
    """The random streams of the model's layers, once each."""
    found: dict[int, Any] = {}
    for layer in model._flatten_layers():
        for generator in getattr(layer, "_seed_generators", []):
            found.setdefault(id(generator), generator)
    return list(found.values())


def build(model: Any, data_spec: Any, targets: bool = True) -> None:
    """Make every variable that a step would make on its first trace: weights, metrics, the optimizer's.

    Args:
        targets: a loss and metrics follow; False for a prediction, which needs the layers alone.

    Raises:
        InputError: Keras cannot build the model from the shapes of its data alone.
    """
    import keras

    try:
        if targets:
            model._symbolic_build(data_batch=data_spec)
        elif not all(layer.built for layer in model._flatten_layers()):
            x, _, _ = keras.utils.unpack_x_y_sample_weight(data_spec)
            symbols = keras.tree.map_structure(lambda spec: keras.KerasTensor(spec.shape, spec.dtype.name), x)
            keras.src.backend.compute_output_spec(model, symbols, training=False)
    except (RuntimeError, ValueError) as error:
        shapes = keras.tree.map_structure(lambda spec: str(spec.shape), data_spec)
        raise InputError(
            f"Expected to build {type(model).__name__} from the shapes of its data, {shapes}, before the replicas "
            f"share its variables, received: {error} Call the model on one batch before passing it, or correct its "
            "data or loss."
        ) from error


@contextmanager
def replaced(thing: Any, method: str, own: Any) -> Iterator[None]:
    """A method of one object for a while; what was there before comes back, another run's hook included."""
    before = vars(thing).get(method)
    thing.__dict__[method] = own
    try:
        yield
    finally:
        if before is None:
            del thing.__dict__[method]
        else:
            thing.__dict__[method] = before


@contextmanager
def hooked(model: Any, backend: Backend, strategy: tf.distribute.Strategy | None = None) -> Iterator[None]:
    """The model with its optimizers and random streams in several replicas' hands."""
    with ExitStack() as stack:
        for optimizer in optimizers_of(model):
            stack.enter_context(_reduced_already(optimizer, strategy))
        for generator in seed_generators_of(model):
            stack.enter_context(_own_stream(generator, backend))
        stack.enter_context(_traced_anew(model))
        yield


def _optimizer_variables(model: Any) -> Sequence[Any]:
    return [variable for optimizer in optimizers_of(model) for variable in optimizer.variables]


@contextmanager
def _reduced_already(optimizer: Any, strategy: tf.distribute.Strategy | None) -> Iterator[None]:
    """The optimizer takes gradients as they are, and finds its state under the strategy's variables."""
    own_strategy, own_indices = optimizer._distribution_strategy, optimizer._trainable_variables_indices
    if strategy is not None:
        optimizer._distribution_strategy = strategy
        optimizer._trainable_variables_indices = {
            optimizer._var_key(variable): index for index, variable in enumerate(optimizer._trainable_variables)
        }
    try:
        with replaced(optimizer, "_all_reduce_sum_gradients", lambda gradients_and_variables: gradients_and_variables):
            yield
    finally:
        optimizer._distribution_strategy = own_strategy
        optimizer._trainable_variables_indices = own_indices


@contextmanager
def _own_stream(generator: Any, backend: Backend) -> Iterator[None]:
    """Each replica draws from a stream of its own; replica 0 from Keras' own, so one saved state serves all."""
    draw = generator.next

    def folded(ordered: bool = True) -> Any:
        seed = draw(ordered)
        replica = backend.replica()
        return seed if replica == 0 else seed + tf.constant([_STREAM_STEP * replica, 0], seed.dtype)

    # Inside a run of another call (an evaluation by a callback) the stream is the replica's own already.
    with nullcontext() if "next" in vars(generator) else replaced(generator, "next", folded):
        yield


@contextmanager
def _traced_anew(model: Any) -> Iterator[None]:
    """Functions that Keras traced hold the variables of their time; none outlives a change of them."""
    _forget_functions(model)
    try:
        yield
    finally:
        _forget_functions(model)


def _forget_functions(model: Any) -> None:
    model.train_function = model.test_function = model.predict_function = None
