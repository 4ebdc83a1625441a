"""The image and the target of serialized Examples, in Python: a record's image is copied once, not three times.

    encoded, targets, wrong = parsed_images(strings, "image", Fixed("label", (), np.dtype(np.int64)))

What has not the declared features is told by row, as the pixels' faults are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from distfit.data.example import NotAnExample, Values, parse_example

_TYPES = {"int64": np.dtype(np.int64), "float32": np.dtype(np.float32), "bytes": np.dtype(object)}


class Fixed(NamedTuple):
    """A feature with a fixed number of values: `tf.io.FixedLenFeature`. Where it is missing, `default` is taken."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    default: Any = None


def fixed(name: str, spec: Any) -> Fixed:
    """From a `tf.io.FixedLenFeature`."""
    dtype = np.dtype(spec.dtype.as_numpy_dtype)
    return Fixed(name, tuple(spec.shape), dtype, spec.default_value)


def parsed_images(
    strings: Sequence[bytes], image: str, target: Fixed | None
) -> tuple[np.ndarray, np.ndarray | None, dict[int, str]]:
    """
    Args:
        strings: serialized Examples.
        image: name of the feature that holds an encoded image.
        target: what is parsed beside it.

    Returns:
        The encoded images, an object array of bytes; the targets [n, *shape]; why rows are bad, whose image and
        target then are empty.
    """
    encoded = np.full(len(strings), b"", object)
    empty = b"" if target is not None and target.dtype == object else 0
    targets = None if target is None else np.full((len(strings), *target.shape), empty, target.dtype)
    wrong: dict[int, str] = {}
    for row, string in enumerate(strings):
        try:
            features = parse_example(string)
            encoded[row] = _values(features, Fixed(image, (), np.dtype(object)))[0]
            if target is not None and targets is not None:
                targets[row] = np.array(_values(features, target), target.dtype).reshape(target.shape)
        except NotAnExample as error:
            wrong[row] = str(error)
    return encoded, targets, wrong


def _values(features: dict[str, Values], wanted: Fixed) -> Sequence:
    found = features.get(wanted.name)
    if found is None and wanted.default is not None:
        return np.broadcast_to(np.asarray(wanted.default, wanted.dtype), wanted.shape).ravel().tolist()
    if found is None:
        raise NotAnExample(f"an Example without a feature {wanted.name!r}")
    count = int(np.prod(wanted.shape))
    if _TYPES[found.kind] != wanted.dtype or len(found.values) != count:
        kind = next(name for name, dtype in _TYPES.items() if dtype == wanted.dtype)
        raise NotAnExample(
            f"an Example whose feature {wanted.name!r} holds {len(found.values)} values of {found.kind}, not {count} "
            f"of {kind}"
        )
    return found.values
