"""From encoded bytes to the pixels of one row: read the header, decide what is needed, decode it, resize it.

    decode_into(images, encoded, out, seed)

The size in the header is held against `max_pixels` before any pixel is decoded. Resizing is bilinear, with pixels
as squares (`tf.image.resize`); before it an image at least twice as large as its target is reduced by 2, 4 or 8
with averaging, so that no detail is skipped: a JPEG while it is decoded, others after.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import cv2
import numpy as np

from distfit.data.images import jpeg
from distfit.data.images.draws import Draws, Seed
from distfit.data.images.formats import NotAnImage, format_of, size_in_header
from distfit.data.images.geometry import Box, fitted, reduced, reduction

if TYPE_CHECKING:
    from distfit.data.images.recipe import Images

# Without the flag OpenCV would turn the image as its EXIF data say.
_READ = {
    3: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION,
    1: cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION,
}


def decode_into(images: Images, encoded: bytes, out: np.ndarray, seed: Seed | None) -> None:
    """Decodes an image and puts it into `out`, uint8 [height, width, channels] of the recipe's size.

    Raises:
        NotAnImage: it is none, is damaged, or claims more than `max_pixels`.
    """
    name = format_of(encoded)
    size = _jpeg_size(encoded) if name == "jpeg" else size_in_header(name, encoded)
    _refuse_bomb(size[0], size[1], images.max_pixels)
    draws = Draws(seed, "crop") if images.fit == "random_crop" and seed is not None else None
    source, place = fitted(images.fit, size[0], size[1], images.size, draws)
    times = reduction(source, place) if images.scaled else 1
    if len(size) == 3:
        filled = out if place[2:] == out.shape[:2] else None
        pixels = jpeg.decoded(encoded, size, source, times, images.channels, images.fast, filled)
    else:
        pixels = _reduced_part(_decoded(name, encoded, size, images.channels), source, times)
    if pixels is not out:
        _resize_into(pixels, out, place)


def _jpeg_size(encoded: bytes) -> tuple:
    """With the colours, where simplejpeg can decode the image; it stops at warnings in the header."""
    try:
        return jpeg.header(encoded)
    except NotAnImage:
        found = jpeg.frame(encoded)
        return found.height, found.width


def _refuse_bomb(height: int, width: int, most: int) -> None:
    if height * width > most:
        raise NotAnImage(
            f"an image of {height} x {width} pixels, more than max_pixels={most:,}: a decompression bomb, or a scan "
            "that needs a higher limit"
        )


def _decoded(name: str, encoded: bytes, size: tuple[int, int], channels: int) -> np.ndarray:
    pixels = (_by_pillow if name in ("gif", "jpeg") else _by_opencv)(name, encoded, channels)
    if pixels is None or pixels.shape[:2] != size:
        raise NotAnImage(f"a {name.upper()} image that is cut off or damaged")
    return pixels.reshape(*size, channels)


def _by_opencv(name: str, encoded: bytes, channels: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), _READ[channels])
    except cv2.error as error:
        raise NotAnImage(f"a {name.upper()} image that is damaged ({error.err})") from error


def _by_pillow(name: str, encoded: bytes, channels: int) -> np.ndarray:
    """GIF, which OpenCV reads only in some versions and more strictly than TensorFlow, and odd JPEGs."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded), formats=[name.upper()]) as opened:
            image: Image.Image = opened
            if "transparency" in image.info:  # of the first frame of a GIF, which TensorFlow leaves black
                clear = Image.new("RGB", image.size)
                image = Image.composite(image.convert("RGB"), clear, image.convert("RGBA").getchannel("A"))
            return np.asarray(image.convert("RGB" if channels == 3 else "L"))
    except Exception as error:  # Pillow lets through whatever its decoders meet
        raise NotAnImage(f"a {name.upper()} image that is cut off or damaged ({error})") from error


def _reduced_part(pixels: np.ndarray, source: Box, times: int) -> np.ndarray:
    if times > 1:
        height, width = (-(-side // times) for side in pixels.shape[:2])
        pixels = _with_channels(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA))
    part = reduced(source, times, *pixels.shape[:2])
    return pixels[part.top : part.top + part.height, part.left : part.left + part.width]


def _resize_into(pixels: np.ndarray, out: np.ndarray, place: Box) -> None:
    if (place.height, place.width) != out.shape[:2]:
        out[:] = 0
    part = out[place.top : place.top + place.height, place.left : place.left + place.width]
    if pixels.shape == part.shape:
        part[:] = pixels
    else:
        cv2.resize(pixels, (place.width, place.height), dst=part, interpolation=cv2.INTER_LINEAR)


def _with_channels(pixels: np.ndarray) -> np.ndarray:
    """OpenCV leaves out a last axis of 1."""
    return pixels[..., None] if pixels.ndim == 2 else pixels
