"""Parts of a step as XLA programs of their own, so that no collective lies inside of one.

A model with `jit_compile` asks for its whole step in one program. With one replica that is what it gets, as
in keras.Model.fit. With several the step has collectives, which XLA cannot compile, and a program that waited for
another replica would block the device. So what lies between them is compiled: forward and backward pass together,
and the update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import tensorflow as tf
from keras.src.backend import get_keras_mask, set_keras_mask

# Runs a function of no arguments that returns a structure of tensors, and returns what it returns.
Program: TypeAlias = Callable[[Callable[[], Any]], Any]


def as_it_is(function: Callable[[], Any]) -> Any:
    """Without XLA, in the step's own graph."""
    return function()


def compiled(function: Callable[[], Any]) -> Any:
    """As one XLA program. What tensors carry along (the masks of Keras) comes along.

    No gradient can be taken through it: what a loop keeps for its backward pass (tf.TensorList) cannot leave a
    program, so that forward and backward pass have to be in the same one.
    """

    def with_masks() -> tuple[Any, list[Any]]:
        result = function()
        return result, [_mask(leaf) for leaf in keras.tree.flatten(result)]

    result, masks = tf.function(with_masks, jit_compile=True, autograph=False)()
    for leaf, mask in zip(keras.tree.flatten(result), masks, strict=True):
        if mask is not None:
            set_keras_mask(leaf, mask)
    return result


def _mask(leaf: Any) -> Any:
    return None if leaf is None else get_keras_mask(leaf)
