"""What becomes of an image: one frozen description that checks itself.

recipe = Images((224, 224), fit="random_crop", flip="horizontal", jitter=Jitter(hue=0.0))
recipe.decode(encoded, out, seed)       # the part that a crop is drawn for; out: uint8 [224, 224, 3]
recipe.augment(out, seed)               # flips and colours, in place
recipe.on_device()(batch)               # floats, where the model runs
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from distfit.data.images.draws import Seed
from distfit.errors import InputError, nearest

FITS = ("pad", "center_crop", "stretch", "random_crop")
FLIPS = ("horizontal", "vertical", "both")
# Pillow's limit: a quarter of a gibibyte of pixels.
MAX_PIXELS = 89_478_485

Standard: TypeAlias = str | tuple[Any, Any] | None


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Random changes of colour, each drawn anew for each record.

    Brightness, contrast and saturation are multiplied by a factor of 1 - x to 1 + x, not below 0; the hue turns by up
    to x of the whole circle, both ways. They are done in this order, in one matrix over the three colours with one
    rounding at the end: the hue turns in the YIQ colour space, so that gray stays gray.

    Args:
        brightness, contrast, saturation: 0 or more; 0 changes nothing.
        hue: 0 to 0.5.

    Raises:
        InputError: outside of these.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation", "hue"):
            value, most = getattr(self, name), 0.5 if name == "hue" else float("inf")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
                limit = "from 0 to 0.5, a share of the circle" if name == "hue" else "of 0 or more"
                raise InputError(f"Expected the jitter's {name} to be a number {limit}, received {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Images:
    """A ready image recipe: give it to `distfit.TFRecords` as its transform.

    JPEG, PNG, GIF (its first frame), BMP and WebP are told by their content and decoded to the pixels of
    `tf.io.decode_image(channels=3, expand_animations=False)`: gray becomes three equal channels, palettes become
    colours, alpha is dropped (transparent pixels of a GIF are black), 16 bits lose the lower 8, four inks (CMYK) become
    colours. EXIF orientation is ignored, as it is by TensorFlow. What TensorFlow does not decode is a bad record. JPEGs
    have the pixels of `tf.io.decode_jpeg` with `dct_method="INTEGER_FAST", fancy_upscaling=False` or, where `fast` is
    False, with `"INTEGER_ACCURATE"`; TensorFlow's default lies between them, a level of 255 from each on average.

    Everything random comes from the record's own seed, made from (seed, epoch, record): a record is augmented alike
    on any number of processes and threads. Random numbers are the same bits on any machine; pixels are with the same
    versions of simplejpeg and OpenCV.

    Args:
        size: (height, width) of the result in pixels; one number is a square.
        image: name of the feature that holds the encoded image.
        target: name of the feature that is given beside it; None for x alone.
        fit: "pad" keeps the proportions between black bars (as tf.image.resize_with_pad), "center_crop" takes the
            largest part of the target's proportions from the centre (as keras.layers.Resizing with
            crop_to_aspect_ratio), "stretch" changes the proportions, "random_crop" is the random resized crop of 8
            to 100 % of the area with proportions from 3:4 to 4:3 (Szegedy et al., 2015; torchvision's defaults).
        flip: None, "horizontal", "vertical" or "both", each with a chance of a half.
        jitter: random changes of colour, or None.
        standardize: what `on_device` makes of the bytes: None leaves them, "scale" divides by 255, "image" gives
            each image a mean of 0 and a deviation of 1 (tf.image.per_image_standardization), (mean, deviation) does
            it for the data set, for all or for each channel, in units of the scale from 0 to 1.
        channels: 3 or 1, which is gray.
        max_pixels: images that claim more in their header are refused before they are decoded. Pillow's limit by
            default; two threads of one process may hold 3 bytes for each.
        fast: libjpeg-turbo's quicker transform, and colours repeated instead of interpolated. It saves some of the
            decoding and changes pixels by a few levels of 255, more along coloured edges.
        scaled: an image at least twice as large as its target is decoded at a half, a quarter or an eighth of its
            sides, which is also the better picture, as bilinear resizing alone would skip pixels.

    Raises:
        InputError: one of them cannot be.

    >>> Images((224, 224), fit="center_crop").shape
    (224, 224, 3)
    """

    size: Any = field(default=(224, 224), kw_only=False)
    image: str = "image"
    target: str | None = "label"
    fit: str = "pad"
    flip: str | None = None
    jitter: Jitter | None = None
    standardize: Standard = None
    channels: int = 3
    max_pixels: int = MAX_PIXELS
    fast: bool = True
    scaled: bool = True

    def __post_init__(self) -> None:
        size = (self.size, self.size) if _is_whole(self.size) else self.size
        if not (isinstance(size, (tuple, list)) and len(size) == 2 and all(_is_whole(side) for side in size)):
            raise InputError(
                f"Expected the size of images to be (height, width) in whole pixels, received {self.size!r}."
            )
        object.__setattr__(self, "size", (int(size[0]), int(size[1])))
        _check_choice("fit", self.fit, FITS)
        _check_choice("flip", self.flip, FLIPS, none=True)
        if self.channels not in (1, 3):
            raise InputError(f"Expected 3 channels, or 1 for gray, received {self.channels!r}.")
        if not _is_whole(self.max_pixels):
            raise InputError(f"Expected max_pixels to be a whole number of 1 or more, received {self.max_pixels!r}.")
        _check_names(self.image, self.target)
        if self.jitter is not None and not isinstance(self.jitter, Jitter):
            raise InputError(
                f"Expected jitter to be a distfit.Jitter or None, received {type(self.jitter).__name__}. "
                "Write Jitter(brightness=0.4)."
            )
        object.__setattr__(self, "standardize", _checked_standard(self.standardize, self.channels))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a row: (height, width, channels)."""
        return (*self.size, self.channels)

    @property
    def cacheable_shape(self) -> tuple[int, int, int] | None:
        """Of a row after the part that is the same in every epoch; None where each epoch decodes another crop."""
        return None if self.fit == "random_crop" else self.shape

    @property
    def is_random(self) -> bool:
        """Whether a row depends on its seed."""
        return self.fit == "random_crop" or self.augments

    @property
    def augments(self) -> bool:
        """Whether `augment` does anything."""
        return self.flip is not None or self.jitter is not None

    def without_chance(self) -> Images:
        """The recipe for validation: no flips, no changes of colour, and the centre in place of a random crop."""
        fit = "center_crop" if self.fit == "random_crop" else self.fit
        return dataclasses.replace(self, fit=fit, flip=None, jitter=None)

    def decode(self, encoded: bytes, out: np.ndarray, seed: Seed | None = None) -> None:
        """Decodes and resizes one image.

        Args:
            encoded: the image.
            out: uint8 of `shape`; what it held is replaced.
            seed: uint32 [2] of the record; only a random crop needs it.

        Raises:
            NotAnImage: the bytes are none, are damaged, or claim more than `max_pixels`; `out` is then undefined.
        """
        # OpenCV takes a tenth of a second to load, which a process that only describes a recipe need not pay.
        from distfit.data.images.pixels import decode_into

        decode_into(self, encoded, out, seed)

    def augment(self, row: np.ndarray, seed: Seed) -> None:
        """Flips and changes colours of a decoded row, uint8 of `shape`, in place."""
        if self.augments:
            from distfit.data.images.augment import augment

            augment(row, seed, self.flip, self.jitter)

    def on_device(self) -> Callable[[Any], Any]:
        """A function from a uint8 batch [n, height, width, channels] to float32, of TensorFlow operations.

        It belongs where the model runs: bytes travel to a device four times faster than floats. With
        `standardize=None` it hands the batch on as it is.
        """
        return functools.partial(_standardized, self.standardize)


def _standardized(standard: Standard, batch: Any) -> Any:
    import tensorflow as tf

    if standard is None:
        return batch
    pixels = tf.cast(batch, tf.float32)
    if standard == "image":
        return tf.image.per_image_standardization(pixels)
    if isinstance(standard, tuple):
        mean, deviation = (np.asarray(part, np.float32) for part in standard)
        return (pixels / 255.0 - mean) / deviation
    return pixels / 255.0


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 1)


def _check_choice(name: str, value: Any, known: tuple[str, ...], none: bool = False) -> None:
    if value in known or (none and value is None):
        return
    choices = ", ".join(repr(choice) for choice in known)
    hint = f" {nearest(value, list(known)).capitalize()}" if isinstance(value, str) else ""
    raise InputError(f"Expected {name} to be one of {choices}{' or None' if none else ''}, received {value!r}.{hint}")


def _check_names(image: Any, target: Any) -> None:
    if not isinstance(image, str) or not isinstance(target, (str, type(None))):
        raise InputError(f"Expected image and target to be names of features, received {image!r} and {target!r}.")


def _checked_standard(standard: Any, channels: int) -> Standard:
    """The same with plain numbers, so that a recipe can be hashed."""
    if standard is None or (isinstance(standard, str) and standard in ("scale", "image")):
        return standard
    try:
        parts = [np.broadcast_to(np.asarray(part, np.float64), (channels,)) for part in standard]
    except (TypeError, ValueError):
        parts = []
    if isinstance(standard, str) or len(parts) != 2 or not np.isfinite(parts).all() or (parts[1] <= 0).any():
        raise InputError(
            'Expected standardize to be None, "scale", "image" or (mean, deviation), each a number or one for each of '
            f"{channels} channels, on the scale from 0 to 1, received {standard!r}."
        )
    return tuple(parts[0].tolist()), tuple(parts[1].tolist())
