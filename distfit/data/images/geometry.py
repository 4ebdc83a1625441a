"""Which part of an image goes where: pure arithmetic on heights and widths, no pixel is touched.

source, place = fitted("pad", 300, 365, (224, 224))    # Box(0, 0, 300, 365), Box(20, 0, 184, 224)
reduction(source, place)                               # 1: the target is not half as large
"""

from __future__ import annotations

import math
from typing import NamedTuple

from distfit.data.images.draws import Draws

# The random resized crop of Inception (Szegedy et al., 2015), with the figures that torchvision made usual.
AREA = (0.08, 1.0)
PROPORTIONS = (3 / 4, 4 / 3)
TRIES = 10
# What libjpeg's scaled DCT does at full speed; 3/8, 5/8, ... are slower than decoding everything.
REDUCTIONS = (8, 4, 2)


class Box(NamedTuple):
    """A rectangle of pixels: its upper left corner, its height and width."""

    top: int
    left: int
    height: int
    width: int


def fitted(fit: str, height: int, width: int, size: tuple[int, int], draws: Draws | None = None) -> tuple[Box, Box]:
    """The part of an image of `height` x `width` that is used, and its place in the result.

    Args:
        fit: "pad", "center_crop", "stretch" or "random_crop".
        size: (height, width) of the result.
        draws: where a random crop comes from.

    >>> fitted("center_crop", 300, 365, (224, 224))
    (Box(top=0, left=32, height=300, width=300), Box(top=0, left=0, height=224, width=224))
    """
    everything, whole = Box(0, 0, height, width), Box(0, 0, *size)
    if fit == "pad":
        return everything, _padded(height, width, size)
    if fit == "center_crop":
        return _centred(height, width, size), whole
    if fit == "random_crop" and draws is not None:
        return random_crop(height, width, draws), whole
    return everything, whole


def _padded(height: int, width: int, size: tuple[int, int]) -> Box:
    """As tf.image.resize_with_pad places it, to the pixel."""
    ratio = max(height / size[0], width / size[1])
    inner = height / ratio, width / ratio
    top, left = (max(0, math.floor((outer - side) / 2)) for outer, side in zip(size, inner, strict=True))
    return Box(top, left, *(max(1, math.floor(side)) for side in inner))


def _centred(height: int, width: int, size: tuple[int, int]) -> Box:
    """As keras.layers.Resizing(crop_to_aspect_ratio=True) cuts it."""
    tall = max(1, min(height, int(width * size[0] / size[1])))
    wide = max(1, min(width, int(height * size[1] / size[0])))
    return Box(int((height - tall) / 2), int((width - wide) / 2), tall, wide)


def random_crop(height: int, width: int, draws: Draws) -> Box:
    """A part of 8 to 100 % of the area with a width of 3/4 to 4/3 of its height, anywhere.

    What does not fit is drawn again, ten times; then it is the largest centred part of such proportions. As
    torchvision.transforms.RandomResizedCrop.
    """
    low, high = (math.log(proportion) for proportion in PROPORTIONS)
    for _ in range(TRIES):
        area = height * width * draws.uniform(*AREA)
        proportion = math.exp(draws.uniform(low, high))
        tall, wide = round(math.sqrt(area / proportion)), round(math.sqrt(area * proportion))
        if 0 < tall <= height and 0 < wide <= width:
            return Box(draws.below(height - tall + 1), draws.below(width - wide + 1), tall, wide)
    wide = max(1, min(width, round(height * PROPORTIONS[1])))
    tall = max(1, min(height, round(width / PROPORTIONS[0])))
    return Box((height - tall) // 2, (width - wide) // 2, tall, wide)


def reduction(source: Box, place: Box) -> int:
    """The largest of 8, 4, 2 and 1 by which the source may be reduced and is still as large as its place.

    >>> reduction(Box(0, 0, 3000, 4000), Box(28, 0, 168, 224))
    8
    """
    most = min(source.height // place.height, source.width // place.width)
    return next((times for times in REDUCTIONS if times <= most), 1)


def reduced(box: Box, times: int, height: int, width: int) -> Box:
    """The box in an image that was reduced to `height` x `width`, to the nearest pixel."""
    if times == 1:
        return box
    top, left = min(round(box.top / times), height - 1), min(round(box.left / times), width - 1)
    bottom, right = round((box.top + box.height) / times), round((box.left + box.width) / times)
    return Box(top, left, max(1, min(bottom, height) - top), max(1, min(right, width) - left))
