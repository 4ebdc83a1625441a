"""Flips and changes of colour of a row of bytes, in place.

    augment(row, seed, "horizontal", Jitter())

The four changes of colour are one 3 x 4 matrix, applied in one pass of OpenCV that rounds once: for bytes it
computes with whole numbers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np

from distfit.data.images.draws import Draws, Seed

if TYPE_CHECKING:
    from distfit.data.images.recipe import Jitter

# Of ITU-R BT.601, as in JPEG.
_GRAY = np.array([0.299, 0.587, 0.114])
_TO_YIQ = np.array([_GRAY, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


def augment(row: np.ndarray, seed: Seed, flip: str | None, jitter: Jitter | None) -> None:
    """
    Args:
        row: uint8 [height, width, channels].
        seed: of the record.
        flip: None, "horizontal", "vertical" or "both".
        jitter: or None.
    """
    draws = Draws(seed, "augment")
    # Drawn always, so that a seed means the same colours whatever is flipped.
    across, down = draws.below(2), draws.below(2)
    if across and flip in ("horizontal", "both"):
        row[:] = cv2.flip(row, 1).reshape(row.shape)
    if down and flip in ("vertical", "both"):
        row[:] = cv2.flip(row, 0).reshape(row.shape)
    if jitter is not None:
        row[:] = cv2.transform(row, _matrix(row, jitter, draws)).reshape(row.shape)


def _matrix(row: np.ndarray, jitter: Jitter, draws: Draws) -> np.ndarray:
    brightness, contrast, saturation = (
        draws.uniform(max(0.0, 1 - most), 1 + most) for most in (jitter.brightness, jitter.contrast, jitter.saturation)
    )
    turn = draws.uniform(-jitter.hue, jitter.hue)
    mean = cv2.mean(row)[: row.shape[2]]
    colors, gray = (_colors(saturation, turn), _GRAY @ mean) if row.shape[2] == 3 else (np.ones((1, 1)), mean[0])
    # Contrast draws all values towards the image's mean gray, which the other two steps leave gray.
    offset = np.full((row.shape[2], 1), (1 - contrast) * brightness * gray)
    return np.hstack([contrast * brightness * colors, offset]).astype(np.float32)


def _colors(saturation: float, turn: float) -> np.ndarray:
    """Less or more colour around the same gray, then turned around the axis of grays."""
    fade = saturation * np.eye(3) + (1 - saturation) * _GRAY
    cosine, sine = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    rotation = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    return _FROM_YIQ @ rotation @ _TO_YIQ @ fade
