"""What every engine with several replicas does to a Keras model for the time of a run, and undoes.

    with everything_shared(model) as variables:   # weights, metrics, random streams, optimizers: once each
        ...                                       # every replica gets the chief's values
        with hooked(model, backend):              # optimizers and streams know that there are several replicas
            ...

Hooks go on the instance, never on a subclass: a dynamically made optimizer class is saved under its base's
name and its `.keras` file does not load.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR, global_seed_generator, make_default_seed

from distfit.errors import InputError, on_every_rank

if TYPE_CHECKING:
    from distfit.backends.base import Backend

# Any odd number far from small seeds: the first word of replica r's seed is the generator's own plus r times it.
_STREAM_STEP = 0x5851F42D
# What replicas share already: a callback may evaluate the model in the middle of a training, and each replica keeps
# what it has (its part of accumulated gradients, its copies).
_shared: set[int] = set()
# What Keras keeps for each thread and draws on inside a step: a replica may be traced in a thread of its own.
_OF_A_THREAD = (GLOBAL_SEED_GENERATOR, "dtype_policy")


def variables_of(model: Any) -> list[Any]:
    """Every Keras variable of the model that training changes, once each: weights, random streams, metrics, and the
    state of its optimizers."""
    streams = [generator.state for generator in seed_generators_of(model)]
    state = [variable for optimizer in optimizers_of(model) for variable in optimizer.variables]
    return _once([*model.variables, *model.metrics_variables, *streams, *state])


def optimizers_of(model: Any) -> list[Any]:
    """Every optimizer of the model, once each: the compiled one first; those that the model and its layers keep in
    attributes of their own (a GAN's `d_optimizer`); and behind each those that it wraps, as
    `keras.optimizers.LossScaleOptimizer` and `MultiOptimizer` do.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()), "mse")
    >>> model.others = {"slow": [keras.optimizers.SGD()]}
    >>> [type(optimizer).__name__ for optimizer in optimizers_of(model)]
    ['LossScaleOptimizer', 'Adam', 'SGD']
    """
    return _held(model, keras.optimizers.Optimizer)


def seed_generators_of(model: Any) -> list[Any]:
    """The random streams that the model, its layers and its losses keep, once each; not Keras' global one."""
    return _held(model, keras.random.SeedGenerator)


def untracked_of(model: Any) -> list[Any]:
    """Keras variables that layers keep without counting them among their own, once each: what a stateful RNN carries
    from batch to batch. `variables_of` has them not."""
    known = {id(variable) for variable in variables_of(model)}
    return [variable for variable in _held(model, keras.Variable) if id(variable) not in known]


def raw_variables_of(model: Any) -> list[tf.Variable]:
    """TensorFlow's own variables in attributes of the model and its layers, of which Keras knows nothing."""
    return _held(model, tf.Variable)


@contextmanager
def everything_shared(model: Any) -> Iterator[list[Any]]:
    """Every variable that replicas share from now on, Keras' global random stream among them, which is there for the
    time. Inside another run those that are shared already are left out.

    Layers that call `keras.random.normal(...)` without a seed draw from that stream. Keras makes it when it is first
    needed, from Python's random state. Here it is made beforehand, of the same seed, as replicas cannot make one each;
    if nobody has drawn from it, it is taken away again, and Python's random state is where Keras would have left it.
    """
    made = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR) is None
    python_state = random.getstate()
    stream = global_seed_generator()
    if made:
        random.setstate(python_state)
    before = stream.state.numpy()
    own = [one for one in _once([*variables_of(model), stream.state]) if id(one) not in _shared]
    _shared.update(map(id, own))
    try:
        yield own
    finally:
        _shared.difference_update(map(id, own))
        if made and (stream.state.numpy() == before).all():
            global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, None)
        elif made:
            make_default_seed()


def of_this_thread() -> Callable[[], None]:
    """What Keras keeps for the calling thread, to be called in another one, which then has the same."""
    kept = {name: global_state.get_global_attribute(name) for name in _OF_A_THREAD}

    def taken_over() -> None:
        for name, value in kept.items():
            global_state.set_global_attribute(name, value)

    return taken_over


def build(model: Any, data_spec: Any, targets: bool = True) -> None:
    """Make every variable that a step would make on its first trace: weights, metrics, the optimizer's.

    Args:
        targets: a loss and metrics follow; False for a prediction, which needs the layers alone.

    Raises:
        InputError: Keras cannot build the model from the shapes of its data alone.
    """
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
def hooked(
    model: Any,
    backend: Backend,
    strategy: tf.distribute.Strategy | None = None,
    mirrored: Sequence[tuple[Any, Any]] = (),
) -> Iterator[None]:
    """The model with its optimizers and random streams in several replicas' hands.

    Args:
        strategy: the one whose variables stand in the Keras variables, if there is one.
        mirrored: every Keras variable whose value is the strategy's, with the value that it had before.
    """
    with ExitStack() as stack:
        for optimizer in optimizers_of(model):
            stack.enter_context(_reduced_already(optimizer))
            if strategy is not None:
                stack.enter_context(_under(strategy, optimizer, mirrored))
        for generator in [*seed_generators_of(model), global_seed_generator()]:
            stack.enter_context(_own_stream(generator, backend))
        stack.enter_context(_traced_anew(model))
        yield


def _held(model: Any, kind: type) -> list[Any]:
    """What the model keeps of a kind: in attributes, in lists and dicts there, and so on inside its layers, optimizers
    and losses."""
    found = [getattr(model, "optimizer", None), model]
    return _once(thing for thing in _within(found, set()) if isinstance(thing, kind))


def _within(thing: Any, seen: set[int]) -> Iterator[Any]:
    """All things inside, in one order on every rank: so no sets."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    yield thing
    if isinstance(thing, (keras.layers.Layer, keras.optimizers.Optimizer, keras.losses.Loss)):
        thing = vars(thing)
    if isinstance(thing, dict):
        thing = list(thing.values())
    if isinstance(thing, (list, tuple)):
        for part in thing:
            yield from _within(part, seen)


def _once(things: Iterable[Any]) -> list[Any]:
    return list({id(thing): thing for thing in things}.values())


@contextmanager
def _reduced_already(optimizer: Any) -> Iterator[None]:
    """The optimizer takes gradients as they are: the step has summed them."""
    with ExitStack() as stack:
        stack.enter_context(replaced(optimizer, "_all_reduce_sum_gradients", lambda pairs: pairs))
        if not optimizer.built:
            stack.enter_context(replaced(optimizer, "build", _refusing(optimizer)))
        yield


def _refusing(optimizer: Any) -> Callable[..., None]:
    """Replicas share state that is there when they begin; each would make its own."""

    def refuse(variables: Any) -> None:
        raise on_every_rank(
            InputError(
                f"Expected every optimizer that a step uses to be built before replicas share its state, received "
                f"{type(optimizer).__name__} {optimizer.name!r}, which would be built by its first update. Call its "
                "build(variables) with the variables that it updates before the training starts."
            )
        )

    return refuse


@contextmanager
def _under(strategy: tf.distribute.Strategy, optimizer: Any, mirrored: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """The optimizer updates the strategy's variables and knows them by the keys of those that they stand for.

    Keras keeps by key where a variable's state is, which of several optimizers has it, and whether it decays.
    """
    key = optimizer._var_key
    keys = {key(variable): key(before) for variable, before in mirrored}

    def own_key(variable: Any) -> Any:
        found = key(variable)
        return keys.get(found, found)

    own_strategy = optimizer._distribution_strategy
    optimizer._distribution_strategy = strategy
    try:
        with replaced(optimizer, "_var_key", own_key):
            yield
    finally:
        optimizer._distribution_strategy = own_strategy


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
    for one in _held(model, keras.Model):
        one.train_function = one.test_function = one.predict_function = None
