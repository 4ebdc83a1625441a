"""The private parts of Keras and TensorFlow that distfit uses: one table, checked when distfit is imported.

    missing()   # what this TensorFlow and Keras lack, by name
    check()     # InputError if anything is

A new one is one line in `REPLACED`, `CALLED` or `IMPORTED`. docs/versions.md shows this table (`python
docs/generated.py` writes it there), and tests/test_seams.py takes each part away and sees it missed. Checking looks
at modules, classes and the code of functions, in a few milliseconds, and makes no tensor: it does not start
TensorFlow, whose devices are chosen later.
"""

from __future__ import annotations

import dis
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from distfit.errors import InputError

# How many of the missing parts a message names.
_MOST_NAMES = 4


@dataclass(frozen=True)
class Hook:
    """One part of Keras or TensorFlow that is not public, or public and replaced.

    Attributes:
        path: dotted. The last name is a member of a module or class, an attribute that a method of the class gives
            to instances, or a name that the code of a function uses.
        why: what distfit wants with it, in one phrase.
        asked_by: dotted path of a function that has to use the name, for what is replaced: a replacement that
            nobody asks for any more would do nothing, in silence. "" where scripts ask for it.
    """

    path: str
    why: str
    asked_by: str = ""

    @property
    def name(self) -> str:
        """The last part of the path.

        >>> Hook("keras.Variable._value", "").name
        '_value'
        """
        return self.path.rpartition(".")[2]


# Replaced on a user's objects for the time of a run, then put back.
REPLACED = (
    Hook(
        "keras.Variable._value",
        "a mirrored variable in its place: a built model trains on several devices and stays the same object",
        asked_by="keras.Variable.value",
    ),
    Hook(
        "tensorflow.python.distribute.mirrored_strategy.MirroredExtended._use_merge_call",
        "the optimizer updates the replica's own copies; with a merge call, accumulation fails",
        asked_by="tensorflow.python.distribute.merge_call_interim.strategy_supports_no_merge_call",
    ),
    Hook(
        "tensorflow.distribute.MirroredStrategy.num_replicas_in_sync",
        "public, but 1 inside a replica: Keras divides some losses by it and others not",
        asked_by="keras.src.losses.loss.scale_loss_for_distribution",
    ),
    Hook(
        "keras.optimizers.Optimizer._all_reduce_sum_gradients",
        "the step has summed the gradients already",
        asked_by="keras.optimizers.Optimizer._backend_update_step",
    ),
    Hook(
        "keras.optimizers.Optimizer._distribution_strategy",
        "the optimizer updates variables of the run's strategy",
        asked_by="keras.optimizers.Optimizer._backend_update_step",
    ),
    Hook(
        "keras.optimizers.Optimizer._var_key",
        "the optimizer finds its state under the mirrored variables",
        asked_by="keras.optimizers.Optimizer._get_variable_index",
    ),
    Hook(
        "keras.random.SeedGenerator.next",
        "public, but wrapped: each replica draws from its own stream",
        asked_by="keras.src.random.seed_generator.draw_seed",
    ),
    Hook(
        "keras.src.trainers.compile_utils.CompileLoss._flat_losses",
        "each compiled loss tells its divisor and takes its factor",
        asked_by="keras.src.trainers.compile_utils.CompileLoss.call",
    ),
    Hook(
        "keras.Model._losses_override",
        "`model.losses` answers this replica's, weighted",
        asked_by="keras.Model.losses",
    ),
    Hook(
        "keras.Variable.assign",
        "public, but wrapped: notes which moving statistics a forward pass moves",
        asked_by="keras.layers.BatchNormalization.call",
    ),
    Hook(
        "keras.layers.BatchNormalization._moments",
        "moments of all replicas' rows, where they are asked for",
        asked_by="keras.layers.BatchNormalization.call",
    ),
    Hook(
        "keras.Layer._losses",
        "losses of a layer's last call, each replica's own",
        asked_by="keras.Layer.add_loss",
    ),
    Hook("keras.metrics.Mean.update_state", "public, but wrapped: a scalar of a step counts by rows"),
    Hook("keras.metrics.MeanMetricWrapper.update_state", "public, but wrapped: one number for a batch counts by rows"),
    Hook("keras.Metric.result", "public, but wrapped: what a model's own step returns is a metric's result or not"),
    Hook(
        "keras.optimizers.Optimizer.apply",
        "public, but wrapped: a model's own step applies the same everywhere",
    ),
    Hook("keras.optimizers.Optimizer.build", "public, but refused inside a step: replicas share state that is there"),
    Hook("keras.Loss.__call__", "public, but wrapped: a loss in a model's own step is weighed by its divisor"),
    Hook("tensorflow.GradientTape.gradient", "public, but wrapped: a model's own step sees the global loss"),
    Hook(
        "keras.callbacks.TensorBoard._compute_steps_per_second",
        "steps without the validation, and counted as steps",
        asked_by="keras.callbacks.TensorBoard._log_epoch_metrics",
    ),
    Hook(
        "keras.src.utils.file_utils.urlretrieve",
        "a download gets its name when it is whole: another rank takes the half file for complete",
        asked_by="keras.src.utils.file_utils.get_file",
    ),
)

# Called, read or overridden.
CALLED = (
    Hook("keras.Layer._flatten_layers", "finds layers that mix rows within others"),
    Hook("keras.metrics.MeanMetricWrapper._fn_kwargs", "over which axis a metric of Keras averages"),
    Hook("keras.Model._symbolic_build", "makes every variable before replicas share them"),
    Hook("keras.src.backend.compute_output_spec", "calls a model on shapes alone"),
    Hook("keras.Model._flatten_layers", "finds random layers, BatchNormalization and losses of layers"),
    Hook("keras.Model._get_own_losses", "losses of rows: divided as rows are"),
    Hook("keras.Model._get_regularization_losses", "losses of weights: each replica has an equal part"),
    Hook("keras.Model._compile_loss", "the compiled losses, each a term of its own"),
    Hook("keras.Model._compile_metrics", "which metrics are not Keras' own"),
    Hook("keras.Layer._non_trainable_variables", "which layers have state that is not Keras' own"),
    Hook("keras.Model._compute_loss", "a piece of `keras.Model.train_step`"),
    Hook("keras.Model._loss_tracker", "a piece of `keras.Model.train_step`"),
    Hook("keras.Model._call_has_training_arg", "a piece of `keras.Model.train_step`"),
    Hook("keras.Model._initial_epoch", "a piece of `keras.Model.fit`"),
    Hook("keras.Model._should_eval", "a piece of `keras.Model.fit`"),
    Hook("keras.Model._get_metrics_result_or_logs", "a piece of `keras.Model.fit`"),
    Hook("keras.Model._flatten_metrics_in_order", "`evaluate` returns its results as Keras does"),
    Hook("keras.optimizers.Optimizer._accumulated_gradients", "accumulated gradients are summed once an update"),
    Hook("keras.optimizers.Optimizer._get_variable_index", "which accumulator is a variable's"),
    Hook("keras.optimizers.Optimizer._trainable_variables", "what an optimizer updates when nobody says"),
    Hook("keras.optimizers.Optimizer._learning_rate", "a learning rate is replaced by a schedule, and put back"),
    Hook("keras.optimizers.Optimizer._variables", "a learning rate that is put back takes its place in what is saved"),
    Hook("tensorflow.python.eager.context.Context._seed", "ranks that are threads each have TensorFlow's global seed"),
    Hook("tensorflow.python.eager.context.Context._rng", "and the stream that seeds of operations come from"),
    Hook("tensorflow.python.framework.ops.Graph._get_function", "what a step changes in a branch or a loop"),
    Hook("keras.optimizers.Optimizer._iterations", "how many batches an optimizer has accumulated"),
    Hook(
        "keras.src.trainers.data_adapters.array_data_adapter.ArrayDataAdapter._num_samples",
        "records of an epoch, for the start block",
    ),
    Hook("keras.src.trainers.epoch_iterator.EpochIterator._get_iterator", "overridden: a feed brings its own batches"),
    Hook("keras.src.trainers.epoch_iterator.EpochIterator._epoch_iterator", "the epoch that a feed is in"),
    Hook("keras.src.trainers.epoch_iterator.EpochIterator._num_batches", "how many batches a feed has"),
    Hook("keras.callbacks.TensorBoard._global_train_batch", "the axis of batches goes on after a resume"),
    Hook("keras.callbacks.TensorBoard._global_test_batch", "the steps of validations go on after a resume"),
    Hook("keras.callbacks.TensorBoard._previous_epoch_iterations", "the speed of an epoch that goes on"),
    Hook("keras.callbacks.TensorBoard._epoch_start_time", "the same"),
    Hook("keras.callbacks.TensorBoard._should_write_train_graph", "the graph is there after a resume"),
    Hook("keras.callbacks.TensorBoard._push_writer", "files of a run that goes on are cleaned before it writes"),
    Hook("keras.callbacks.TensorBoard._pop_writer", "the same"),
    Hook("keras.callbacks.TensorBoard._train_dir", "the same"),
    Hook("keras.callbacks.TensorBoard._val_dir", "the same"),
    Hook(
        "keras.src.trainers.data_adapters.array_data_adapter.ArrayDataAdapter._inputs",
        "a resumed run recognises its arrays",
    ),
    Hook("tensorflow.data.Dataset._as_serialized_graph", "whether passes over a dataset depend on each other"),
    Hook("keras.callbacks.TensorBoard._batch_start_time", "a call of several steps counts as so many"),
    Hook("keras.callbacks.TensorBoard._should_trace", "whether steps are profiled"),
    Hook("keras.callbacks.TensorBoard._start_batch", "the first step that is profiled may lie within a call"),
    Hook("keras.callbacks.TensorBoard._write_keras_model_summary", "the graph, when the training begins"),
    Hook("keras.callbacks.TensorBoard._train_writer", "the hyper-parameters, and what an earlier run left"),
    Hook("keras.callbacks.TensorBoard._val_writer", "the same for the validation"),
    Hook("keras.callbacks.TensorBoard._writers", "flushed after each epoch"),
    Hook("keras.callbacks.TensorBoard._close_writers", "an evaluation by itself ends its files"),
    Hook(
        "tensorflow.python.ops.summary_ops_v2._ResourceSummaryWriter._resource",
        "events that are still true are written to a new file of TensorBoard's",
    ),
    Hook(
        "keras.src.utils.traceback_utils.inject_argument_info_in_traceback._keras_call_info_injected",
        "an error that a layer raises in distfit's name keeps to its one paragraph",
    ),
)

# Imported by its private path.
IMPORTED = (
    Hook("tensorflow.__internal__.autograph.tf_convert", "Python's if and for in a transform, as in tf.data's map"),
    Hook("tensorflow.__internal__.autograph.control_status_ctx", "the same"),
    Hook(
        "tensorflow.python.ops.control_flow_v2_func_graphs.CondBranchFuncGraph",
        "a transform may draw random numbers in a branch, but not in a loop",
    ),
    Hook(
        "keras.src.backend.tensorflow.trainer.potentially_ragged_concat",
        "rows of several shapes in a prediction come back as Keras gives them",
    ),
    Hook("keras.src.utils.naming.to_snake_case", "which names of layers Keras made up"),
    Hook("keras.src.random.seed_generator.global_seed_generator", "the stream of random calls without a seed"),
    Hook("keras.src.random.seed_generator.GLOBAL_SEED_GENERATOR", "where Keras keeps that stream"),
    Hook("keras.src.random.seed_generator.make_default_seed", "the seed that Keras draws for that stream"),
    Hook("keras.src.backend.common.global_state.get_global_attribute", "what Keras keeps for each thread"),
    Hook("keras.src.backend.common.global_state.set_global_attribute", "what Keras keeps for each thread"),
    Hook(
        "keras.src.trainers.epoch_iterator.EpochIterator",
        "decides how many steps an epoch has, and warns as Keras does",
    ),
    Hook("keras.src.trainers.data_adapters", "Keras' order and batches of arrays, to the bit"),
    Hook("keras.src.trainers.data_adapters.data_adapter.DataAdapter", "what of the data is an adapter already"),
    Hook("keras.src.trainers.data_adapters.tf_dataset_adapter.TFDatasetAdapter", "length of a `tf.data.Dataset`"),
    Hook(
        "keras.src.trainers.data_adapters.data_adapter_utils.unpack_x_y_sample_weight",
        "what a batch means, `None` where it has no weights",
    ),
    Hook("keras.src.trainers.data_adapters.array_slicing.train_validation_split", "what `validation_split` means"),
    Hook("keras.src.losses.loss.apply_mask", "follows a loss up to its reduction"),
    Hook("keras.src.losses.loss.squeeze_or_expand_to_same_rank", "follows a loss up to its reduction"),
    Hook("keras.src.backend.get_keras_mask", "the mask that a tensor brings along"),
    Hook("keras.src.backend.set_keras_mask", "the mask that a tensor brings along"),
    Hook("tensorflow.__internal__.EagerTensor", "whether a tensor has a value"),
    Hook("keras.src.utils.python_utils.pythonify_logs", "logs of an evaluation as numbers"),
    Hook("keras.src.utils.python_utils.is_default", "which callbacks listen to batches"),
    Hook("keras.src.utils.rng_utils.get_random_seed", "whether the script has set a seed"),
    Hook("tensorflow.python.eager.context.global_seed", "whether the script has set a seed"),
)

HOOKS = (*REPLACED, *CALLED, *IMPORTED)


def check() -> None:
    """
    Raises:
        InputError: this TensorFlow or Keras lacks a private part that distfit uses.
    """
    lacking = missing()
    if lacking:
        import keras
        import tensorflow as tf

        installed = {"tensorflow": tf.__version__, "keras": keras.__version__}
        raise InputError(paragraph(lacking, installed, declared(installed)))


def missing(hooks: Iterable[Hook] = HOOKS) -> list[str]:
    """The paths of what is not there any more, or "PATH in FUNCTION" where the function does not ask for it."""
    return [problem for hook in hooks if (problem := _problem(hook))]


def declared(packages: Iterable[str]) -> dict[str, str]:
    """The ranges of these packages in distfit's own metadata; {} where distfit is not installed."""
    from packaging.requirements import Requirement

    distfit = next(iter(importlib.metadata.distributions(name="distfit")), None)
    needs = [Requirement(need) for need in (distfit.requires or [] if distfit else [])]
    return {need.name: str(need.specifier) for need in needs if need.name in packages and need.marker is None}


def paragraph(lacking: Sequence[str], installed: Mapping[str, str], ranges: Mapping[str, str]) -> str:
    """What is missing from which versions, and what to type.

    Args:
        lacking: of `missing`.
        installed: versions by package.
        ranges: of `declared`.

    >>> paragraph(["keras.Model._f"], {"keras": "3.17.0"}, {"keras": "<3.16"}).partition(", ")[2].partition(" Type")[0]
    'received keras 3.17.0 without keras.Model._f.'
    """
    names = ", ".join(lacking[:_MOST_NAMES])
    more = f" and {len(lacking) - _MOST_NAMES} more" if len(lacking) > _MOST_NAMES else ""
    versions = " and ".join(f"{name} {version}" for name, version in installed.items())
    made_for = ", ".join(f"{name}{range}" for name, range in ranges.items()) or "see pyproject.toml"
    return (
        f"Expected the private parts of TensorFlow and Keras that distfit uses (made for: {made_for}), received "
        f"{versions} without {names}{more}. {_remedy(installed, ranges)}"
    )


def _remedy(installed: Mapping[str, str], ranges: Mapping[str, str]) -> str:
    from packaging.specifiers import SpecifierSet

    pip = f"{sys.executable} -m pip install"
    if not ranges:
        return f"distfit is not installed here but runs from its folder; in that folder, type: {pip} -e ."
    if all(SpecifierSet(range).contains(installed[name], prereleases=True) for name, range in ranges.items()):
        again = " ".join(f"{name}=={version}" for name, version in installed.items())
        return (
            "These versions have them: files are damaged, or something in this process took them away. Type: "
            f"{pip} --force-reinstall --no-deps {again}"
        )
    return f"Type: {pip} " + " ".join(f"'{name}{range}'" for name, range in ranges.items())


def _problem(hook: Hook) -> str:
    if not _is_there(hook):
        return hook.path
    if hook.asked_by and hook.name not in _used_by(hook.asked_by):
        return f"{hook.path} in {hook.asked_by}"
    return ""


def _is_there(hook: Hook) -> bool:
    place = hook.path.rpartition(".")[0]
    try:
        owner = _find(place)
        if inspect.isfunction(owner):
            return hook.name in _used_by(place)
        if inspect.isclass(owner):
            return _has(owner, hook.name) or any(_gives(code, hook.name) for code in _methods(owner))
        _find(hook.path)
    except LookupError:
        return False
    return True


def _find(path: str) -> Any:
    """What a dotted path leads to, imported as far as it has to be.

    Raises:
        LookupError: it leads nowhere.
    """
    first, *rest = path.split(".")
    found, here = importlib.import_module(first), first
    for name in rest:
        here = f"{here}.{name}"
        if _has(found, name):
            found = getattr(found, name)
            continue
        try:
            found = importlib.import_module(here)
        except ImportError as error:
            raise LookupError(here) from error
    return found


def _has(owner: Any, name: str) -> bool:
    """Whether it is the owner's own: every class has the `__call__` of its metaclass, too."""
    if inspect.isclass(owner):
        return any(name in vars(one) for one in owner.__mro__)
    return hasattr(owner, name)


def _methods(owner: type) -> Iterator[CodeType]:
    """The code of every method of a class and its bases, decorators taken off."""
    for one in owner.__mro__:
        for member in vars(one).values():
            if isinstance(member, FunctionType):
                yield inspect.unwrap(member).__code__


def _gives(code: CodeType, name: str) -> bool:
    """Whether a method sets an attribute of this name."""
    return name in code.co_names and any(
        step.opname == "STORE_ATTR" and step.argval == name for step in dis.get_instructions(code)
    )


def _used_by(path: str) -> set[str]:
    """The names that a function, method or property uses, those of attributes among them; none if it is gone."""
    try:
        found = _find(path)
    except LookupError:
        return set()
    function: Any = found.fget if isinstance(found, property) else found
    code = getattr(inspect.unwrap(function), "__code__", None)
    return _names(code) if code else set()


def _names(code: CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)
