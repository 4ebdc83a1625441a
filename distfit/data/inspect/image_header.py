"""What the first bytes of an encoded image say about it, without decoding it.

looks_like_an_image(data)            # by its first bytes, which no text begins with
read_header(data)                    # Header(format="jpeg", width=365, height=300, mode="RGB"), or NotAnImage
"""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

from distfit.data.build.image_check import FORMATS, NotAnImage
from distfit.data.images import formats

_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
_FORMATS = tuple(name.upper() for name in FORMATS)
# A JPEG with further pictures behind the first, of which any decoder takes the first.
_SAME = {"mpo": "jpeg"}
_BMP_HEADER_SIZES = {12, 40, 52, 56, 108, 124}


class Header(NamedTuple):
    """Format (one of `image_check.FORMATS`), width and height in pixels, and the mode as Pillow names it."""

    format: str
    width: int
    height: int
    mode: str


def looks_like_an_image(data: bytes) -> bool:
    """Whether bytes begin as those of an image in one of the formats that TensorFlow decodes.

    >>> looks_like_an_image(b"GIF89a..."), looks_like_an_image(b"BMW/0001.jpg")
    (True, False)
    """
    if data.startswith(_STARTS):
        return True
    if data[:2] == b"BM":  # two letters begin many a text
        return int.from_bytes(data[14:18], "little") in _BMP_HEADER_SIZES
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def read_header(data: bytes) -> Header:
    """Format and size of an image, in some 20 us. Not for several threads at a time: it silences Pillow's warnings.

    Raises:
        NotAnImage: no header of one of the formats, one that is cut off, one that announces what TensorFlow does not
            decode, or one that claims so many pixels that Pillow takes it for a decompression bomb (more than
            178,956,970).
    """
    from PIL import Image

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            name = str(image.format).lower()
            header = Header(_SAME.get(name, name), *image.size, image.mode)
    except Image.DecompressionBombError as error:
        raise NotAnImage(f"an image that is too large to decode ({error})") from error
    except Exception as error:  # Pillow lets through whatever its parsers meet
        raise NotAnImage("no image, or one whose header is damaged or cut off") from error
    _refuse_as_a_training_does(header.format, data)
    return header


def _refuse_as_a_training_does(name: str, data: bytes) -> None:
    """Palettes of BMP, animation and transparency of WebP: other libraries read them."""
    if name == "jpeg":
        return
    try:
        formats.size_in_header(name, data)
    except formats.NotAnImage as reason:
        raise NotAnImage(str(reason)) from reason
