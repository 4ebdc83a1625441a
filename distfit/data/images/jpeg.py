"""JPEG images by libjpeg-turbo: only as far down as a box reaches, and as small as the target allows.

    height, width, colors = header(encoded)
    pixels = decoded(encoded, box, reduction=2, channels=3, fast=True)

Two ways to decode less, which change no pixel of a box at the same reduction:

- libjpeg's scaled DCT computes a half, a quarter or an eighth of each side.
- Below the box nothing is decoded: the frame header of a copy is given a smaller height, and libjpeg ends there. It is
  the public way to do it, as simplejpeg has no cropping and TensorFlow's `decode_and_crop_jpeg`, which has, was
  slower than decoding everything here. Above and beside the box nothing can be left out, as each block of a JPEG is
  stored as its difference from the one before it. Progressive images are decoded whole.

What libjpeg only warns about is an image, as it is for TensorFlow; one that ends early is none.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg

from distfit.data.images.formats import NotAnImage
from distfit.data.images.geometry import Box, reduced

_SEQUENTIAL = (0xC0, 0xC1)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN, _ADOBE, _END = 0xDA, 0xEE, b"\xff\xd9"
_CUT_OFF = "Premature end of JPEG file"
# Said of every image whose height was lowered, and of images with a few stray bytes.
_MORE_BYTES = "extraneous bytes before marker"
_FOUR_INKS = ("CMYK", "YCCK")
_DEPTHS = {"CMYK": 4, "RGB": 3, "GRAY": 1}
# A buffer is kept for each thread: fresh pages cost a sixth of decoding 12 megapixels. Larger ones are not kept.
_MOST_KEPT_BYTES = 64 * 2**20
_own = threading.local()


class Frame(NamedTuple):
    """Where the frame header lies and what it says; `lowest` is 0 where the height cannot be lowered."""

    at: int
    height: int
    width: int
    lowest: int
    adobe: bool


def header(encoded: bytes) -> tuple[int, int, str]:
    """Height, width and colour space as libjpeg reads them from the header.

    Raises:
        NotAnImage: it cannot.
    """
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(encoded)
    except (ValueError, KeyError) as error:  # KeyError: colours that simplejpeg has no name for
        raise _damaged(error) from error
    return height, width, colors


def decoded(
    encoded: bytes,
    size: tuple[int, int, str],
    box: Box,
    reduction: int,
    channels: int,
    fast: bool,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The pixels of a box, uint8 [height / reduction, width / reduction, channels].

    Args:
        encoded: the image.
        size: from `header`.
        box: in pixels of the whole image.
        reduction: 1, 2, 4 or 8.
        channels: 3 for RGB, 1 for gray.
        fast: the quicker of libjpeg-turbo's two transforms, and colours that are repeated, not interpolated.
        out: where the pixels are put, and what is returned, if it has the shape of the whole image; other pixels are
            valid until the next call of this thread.

    Raises:
        NotAnImage: the image ends early or libjpeg refuses it.
    """
    height, width, colors = size
    bottom = box.top + box.height
    if bottom < height:
        encoded, height = lowered(encoded, bottom, interpolated=not fast)
    inks = "CMYK" if colors in _FOUR_INKS else "RGB" if channels == 3 else "GRAY"
    tall, wide, depth = -(-height // reduction), -(-width // reduction), _DEPTHS[inks]
    part = reduced(box, reduction, tall, wide)
    in_place = out is not None and out.shape == (tall, wide, depth) and part == (0, 0, tall, wide)
    pixels = out if out is not None and in_place else _buffer(tall * wide * depth).reshape(tall, wide, depth)
    smaller = {"min_height": tall, "min_width": wide, "min_factor": reduction} if reduction > 1 else {}
    _decode_into(pixels, encoded, {"colorspace": inks, "fastdct": fast, "fastupsample": fast, **smaller})
    if in_place:
        return pixels
    pixels = pixels[part.top : part.top + part.height, part.left : part.left + part.width]
    return pixels if inks != "CMYK" else _from_inks(pixels, frame(encoded).adobe, channels)


def lowered(encoded: bytes, bottom: int, interpolated: bool) -> tuple[bytes, int]:
    """The image with a frame header that ends it with the blocks of row `bottom`, and its new height.

    Where colours are `interpolated` one more row of blocks is kept, which the last rows look at. It is the image
    itself where that gains nothing or would not work: several scans, each of which covers the whole height.
    """
    found = frame(encoded)
    if not found.lowest:
        return encoded, found.height
    height = (-(-bottom // found.lowest) + interpolated) * found.lowest
    if height >= found.height:
        return encoded, found.height
    shorter = bytearray(encoded)
    shorter[found.at + 5 : found.at + 7] = height.to_bytes(2, "big")
    return bytes(shorter), height


def frame(encoded: bytes) -> Frame:
    """The frame header, found by going from segment to segment up to the first scan.

    Raises:
        NotAnImage: there is none.
    """
    at, found, adobe = 2, None, False
    while at + 9 < len(encoded):
        marker = encoded[at + 1]
        if encoded[at] != 0xFF or marker == 0xFF:
            at += 1  # stray and fill bytes, which libjpeg skips too
            continue
        if marker in _FRAMES:
            found = _frame_at(encoded, at)
        elif marker == _ADOBE:
            adobe = adobe or encoded.startswith(b"Adobe", at + 4)
        elif marker == _SCAN and found is not None:
            # Scans of single colours follow one another, each of the whole height.
            return found._replace(adobe=adobe, lowest=found.lowest if encoded[at + 4] == encoded[found.at + 9] else 0)
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    raise NotAnImage("a JPEG image that is cut off in its header")


def _frame_at(encoded: bytes, at: int) -> Frame:
    samplings = encoded[at + 11 : at + 10 + 3 * encoded[at + 9] : 3]
    rows_of_blocks = 8 * max((sampling & 15 for sampling in samplings), default=0)
    lowest = rows_of_blocks if encoded[at + 1] in _SEQUENTIAL else 0
    height, width = (int.from_bytes(encoded[place : place + 2], "big") for place in (at + 5, at + 7))
    return Frame(at, height, width, lowest, adobe=False)


def _decode_into(pixels: np.ndarray, encoded: bytes, options: dict[str, Any]) -> None:
    try:
        simplejpeg.decode_jpeg(encoded, buffer=pixels, **options)
    except ValueError as error:
        # libjpeg has gone to the end before simplejpeg raises for a warning: the pixels are there.
        if _MORE_BYTES not in str(error):
            _refuse_all_but_warnings(pixels, encoded, options, error)


def _refuse_all_but_warnings(pixels: np.ndarray, encoded: bytes, options: dict[str, Any], error: ValueError) -> None:
    if _CUT_OFF in str(error):
        raise _damaged(error)
    try:
        simplejpeg.decode_jpeg(encoded, buffer=pixels, strict=False, **options)
    except ValueError as fatal:
        raise _damaged(fatal) from fatal
    # Only the first warning is told, and this would be a later one.
    if encoded.rfind(_END) < frame(encoded).at:
        raise _damaged(ValueError(_CUT_OFF))


def _buffer(count: int) -> np.ndarray:
    if count > _MOST_KEPT_BYTES:
        return np.empty(count, np.uint8)
    kept = getattr(_own, "buffer", None)
    if kept is None or len(kept) < count:
        kept = _own.buffer = np.empty(count, np.uint8)
    return kept[:count]


def _from_inks(pixels: np.ndarray, adobe: bool, channels: int) -> np.ndarray:
    """Cyan, magenta, yellow and black as TensorFlow turns them into colours; Adobe stores them inverted."""
    inks = pixels.astype(np.uint16)
    inks = inks if adobe else 255 - inks
    colors = (inks[..., :3] * inks[..., 3:] // 255).astype(np.uint8)
    return colors if channels == 3 else cv2.cvtColor(colors, cv2.COLOR_RGB2GRAY)[..., None]


def _damaged(error: Exception) -> NotAnImage:
    return NotAnImage(f"a JPEG image that is cut off or damaged ({error})")
