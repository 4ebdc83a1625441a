"""What a traced row must not do: draw from a stream that others draw from, or change a variable or a table.

    refuse_impure(graph, "the transform's part 2, 'augment'")

Such a row would depend on which rows were made before it, on the number of threads and on that of ranks.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from distfit import log
from distfit.errors import InputError

# Stateful operations of random numbers have one of these in their names, or a seed among their attributes.
_RANDOM_NAMES = ("Random", "Rng", "StatefulUniform", "StatefulStandard", "StatefulTruncated", "NonDeterministic")
_CHANGES = (
    "Assign",
    "LookupTableInsert",
    "LookupTableRemove",
    "ResourceScatter",
    "ResourceStridedSliceAssign",
    "ScatterNdUpdate",
    "ScatterUpdate",
)
_OURS = os.path.dirname(log.__file__)
_PYTHON = ("PyFunc", "PyFuncStateless", "EagerPyFunc")


def refuse_impure(graph: Any, who: str) -> None:
    """Looks at a traced part of a transform and at every function that it calls: branches, loops, maps.

    Args:
        graph: the `FuncGraph`.
        who: the part, for messages.

    Raises:
        InputError: a stateful random operation, or one that changes a variable or a table.
    """
    for op in _operations(graph):
        if is_stateful_random(op.op_def):
            raise InputError(
                f"Expected {who} to draw random numbers from the record's seed alone, received the operation {op.type}"
                f"{_line_of_user(op)}, whose numbers depend on which records came before. Give the function a second "
                "parameter `seed` (int32, shape [2], made from the run's seed, epoch and record) and pass it to "
                "tf.random.stateless_* or tf.image.stateless_random_*, or use keras.random or Keras' random layers."
            )
        if op.type.startswith(_CHANGES) or "Assign" in op.type:
            raise InputError(
                f"Expected {who} to depend on the record alone, received the operation {op.type}{_line_of_user(op)}, "
                "which changes a variable or a table: its value would depend on which records came before. Leave it "
                "out, or do it before training, as `layer.adapt(...)` does."
            )
        if op.type in _PYTHON:
            log.warn_once(
                f"{who} calls Python ({op.type}{_line_of_user(op)}); whether it draws random numbers there cannot be "
                "seen. Its result has to depend on its arguments alone, or records differ from run to run and rank "
                "to rank; pass it the record's `seed`."
            )


def is_stateful_random(definition: Any) -> bool:
    """Whether an operation of TensorFlow draws from a stream.

    Args:
        definition: its `OpDef`. Lookup tables, too, are stateful.
    """
    if not definition.is_stateful or "Dataset" in definition.name or "Iterator" in definition.name:
        return False
    drawn = any(name in definition.name for name in _RANDOM_NAMES)
    # Stateless ones have their seed among the inputs.
    return drawn or any(attribute.name == "seed" for attribute in definition.attr)


def python_random_state() -> tuple[Any, ...]:
    """The state of the two global generators of Python, to be compared."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tobytes(), *rest


def contents(graph: Any) -> list[tuple[str, bytes]]:
    """The operations of a traced part and of all that it calls, each with its value where it is a constant number.

    Texts are left out: those of assertions name operations, whose numbers are drawn anew in each trace.
    """
    return [(op.type, _number_in(op)) for op in _operations(graph)]


def _number_in(op: Any) -> bytes:
    import tensorflow as tf

    value = op.node_def.attr["value"].tensor if op.type == "Const" else None
    return b"" if value is None or value.dtype == tf.string.as_datatype_enum else value.SerializeToString()


def _operations(graph: Any) -> Iterator[Any]:
    for op in graph.get_operations():
        yield op
        for inner in _called(op, graph):
            yield from _operations(inner)


def _called(op: Any, graph: Any) -> Iterator[Any]:
    for attribute in op.node_def.attr.values():
        named = [attribute.func] if attribute.HasField("func") else attribute.list.func
        for function in (graph._get_function(one.name) for one in named):
            # One that was loaded from a file has no graph, and no lines of a user's either.
            if function is not None and function.graph is not None:
                yield function.graph


def _line_of_user(op: Any) -> str:
    """Where the user's code asks for an operation: the innermost line outside the libraries; "" if there is none."""
    libraries = _library_folders()
    for frame in reversed(op.traceback):
        if not frame.filename.startswith((*libraries, "<frozen")) and os.sep in frame.filename:
            return f" ({frame.filename}, line {frame.lineno})"
    return ""


def _library_folders() -> tuple[str, ...]:
    import keras
    import tensorflow as tf

    # TensorFlow's own __file__ may be that of a folder within it.
    tensorflow = os.path.join(tf.__file__.partition(f"{os.sep}tensorflow{os.sep}")[0], "tensorflow")
    return tuple(os.path.join(folder, "") for folder in (tensorflow, os.path.dirname(keras.__file__), _OURS))
