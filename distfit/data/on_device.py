"""What is done to the rows of a replica on its device, before the model sees them: normalisation, MixUp, CutMix.

    carried = OnDevice([keras.layers.Rescaling(1 / 255), keras.layers.MixUp()])
    data = carried((rows, seeds), training=True)

Rows travel as they are stored (a pixel is one byte) and become numbers where the model runs. What is drawn at random
here is drawn for the rows of a replica together, from the seed of the first of them: it repeats with the same number
of replicas, and belongs to the random layers of the first law with another one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from distfit.errors import InputError

# Beyond any place of a transform, which draws from the same seeds.
_PLACE = 2**16


class OnDevice:
    """Keras layers and functions, applied in their order.

    A layer gets `x`; MixUp and CutMix, which mix rows, get `{"images": x, "labels": y}` as Keras has it. Layers are
    told whether it is a training. A function gets what the transform of the records returned (`x`, or `x, y`, or `x, y,
    sample_weight`) and returns the same; parameters named `training` and `seed` (int32 [2]) get these as well.

    Args:
        parts: one of them, or several.

    Raises:
        InputError: something else.
    """

    def __init__(self, parts: Any) -> None:
        self.parts: Sequence[Any] = parts if isinstance(parts, (list, tuple)) else [parts]
        for part in self.parts:
            if not callable(part):
                raise InputError(
                    f"Expected on_device to be Keras layers and functions, received {type(part).__name__}. Pass a "
                    "layer such as keras.layers.Rescaling(1 / 255), a function of (x, y), or a list of them."
                )

    def __call__(self, carried: Any, training: bool) -> Any:
        """The rows as the model gets them.

        Args:
            carried: (rows, their seeds: int32 [n, 2]).
        """
        from distfit.data.transforms.draws import derived, repeatable

        data, seeds = carried
        for place, part in enumerate(self.parts):
            with repeatable(seeds[0], _PLACE + place):
                data = self._applied(part, data, training, partial(derived, seeds[0], _PLACE + place))
        return data

    def _applied(self, part: Any, data: Any, training: bool, seed: Callable[[], Any]) -> Any:
        import keras

        if isinstance(part, (keras.layers.MixUp, keras.layers.CutMix)):
            return _mixed(part, data, training)
        if isinstance(part, keras.layers.Layer):
            options = {"training": training} if "training" in inspect.signature(part.call).parameters else {}
            x, *rest = data if isinstance(data, tuple) else (data,)
            x = part(x, **options)
            return (x, *rest) if isinstance(data, tuple) else x
        asked = inspect.signature(part).parameters
        options = {"training": training} if "training" in asked else {}
        options |= {"seed": seed()} if "seed" in asked else {}
        return part(*(data if isinstance(data, tuple) else (data,)), **options)


def _mixed(layer: Any, data: Any, training: bool) -> Any:
    if not isinstance(data, tuple) or len(data) != 2:
        raise InputError(
            f"Expected (x, y) for {type(layer).__name__}, which mixes rows with their labels, received data without y "
            "or with sample weights. Let the transform return (x, y), y as one-hot numbers."
        )
    mixed = layer({"images": data[0], "labels": data[1]}, training=training)
    return mixed["images"], mixed["labels"]


def of(standardise: Any, parts: Any) -> OnDevice | None:
    """What a recipe leaves to the device, and what was asked for besides; None for nothing.

    Args:
        standardise: from x to x, or None.
    """
    own = [] if parts is None else OnDevice(parts).parts
    if standardise is None:
        return OnDevice(own) if own else None

    def standardised(x: Any, *rest: Any) -> Any:
        return (standardise(x), *rest) if rest else standardise(x)

    return OnDevice([standardised, *own])
