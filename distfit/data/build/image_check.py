"""Is this a whole image that TensorFlow will decode? Asked of the bytes, before training, without TensorFlow.

    checked_image(data)                      # ("jpeg", 500), or NotAnImage: "cut off or damaged (...)"
    refuse_other(file)                       # before all of a file is read: may it be one at all?

An image is decoded here by Pillow, which lets threads decode at a time and says what is wrong; TensorFlow
would do neither, and would take the devices. Where the two differ the rules below follow TensorFlow's
`tf.io.decode_image(data, channels=3, expand_animations=False)`, and the tests hold them against it. Damage in
the middle of a JPEG that both of them decode without an error cannot be seen.
"""

import io
from typing import Any, BinaryIO, NamedTuple

_SIGNATURES = {"jpeg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n", "gif": b"GIF8", "bmp": b"BM"}
_SIGNATURE_BYTES = 12
FORMATS = (*_SIGNATURES, "webp")
_PNG_END = b"IEND\xaeB`\x82"
_BMP_BITS = slice(28, 30)
_BMP_COMPRESSION = slice(30, 34)


class NotAnImage(Exception):
    """Bytes that TensorFlow will not decode to an image; the text says why, after "it is"."""


class CheckedImage(NamedTuple):
    """A whole image: its format, one of `FORMATS`, and the pixels of its longer side."""

    format: str
    side: int


def checked_image(data: bytes) -> CheckedImage:
    """What an encoded image is, whatever its file is called.

    >>> checked_image(b"<html>404</html>")
    Traceback (most recent call last):
    distfit.data.build.image_check.NotAnImage: no image

    Raises:
        NotAnImage: with the reason.
    """
    if not data:
        raise NotAnImage("an empty file")
    found = _signature(data)
    if found is None:
        raise NotAnImage(_other(io.BytesIO(data)))
    _OWN_RULES.get(found, lambda data: None)(data)
    try:
        return CheckedImage(found, _decode(data, found))
    except NotAnImage:
        raise
    except Exception as error:  # Pillow lets through whatever its decoders meet
        raise NotAnImage(f"a {found.upper()} image that is cut off or damaged{_detail(error)}") from error


def refuse_other(file: BinaryIO) -> None:
    """Refuses a file that begins as no image does, an archive of gigabytes say, without reading it whole.

    Raises:
        NotAnImage: with the reason; what has the beginning of an image is read from its start next.
    """
    start = file.read(_SIGNATURE_BYTES)
    file.seek(0)
    if start and _signature(start) is None:
        raise NotAnImage(_other(file))


def _detail(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    # Its text is about the object that held the bytes.
    return "" if isinstance(error, UnidentifiedImageError) else f" ({error})"


def _signature(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for name, start in _SIGNATURES.items() if data.startswith(start)), None)


def _other(file: BinaryIO) -> str:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return f"an image in the format {image.format}, where TensorFlow decodes {', '.join(FORMATS)}"
    except Exception:  # as above; here it only means that Pillow does not know it either
        return "no image"


def _decode(data: bytes, name: str) -> int:
    """The longer side of an image that is whole."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=[name.upper()]) as image:
        side = max(image.size)
        if name == "jpeg":
            image.draft(image.mode, (1, 1))  # reads every bit, but computes an eighth of each side: 4 times faster
        if name == "bmp" and image.mode in ("P", "1"):
            raise NotAnImage("a BMP image with a palette, whose indices TensorFlow would take for gray")
        if name == "webp" and getattr(image, "is_animated", False):
            raise NotAnImage("an animated WEBP image, which TensorFlow does not decode")
        if name == "webp" and image.mode == "RGBA":
            raise NotAnImage("a WEBP image with an alpha channel, which TensorFlow does not decode to three channels")
        _load_all(image) if name == "gif" else image.load()
        return side


def _load_all(image: Any) -> None:
    """TensorFlow reads a whole GIF file for its first frame."""
    while True:
        image.load()
        try:
            image.seek(image.tell() + 1)
        except EOFError:
            return


def _png_ends(data: bytes) -> None:
    if _PNG_END not in data:
        raise NotAnImage("a PNG image that is cut off (its end is missing)")


def _bmp_is_plain(data: bytes) -> None:
    bits, compression = (int.from_bytes(data[part], "little") for part in (_BMP_BITS, _BMP_COMPRESSION))
    if bits not in (8, 24, 32) or compression not in (0, 3):
        raise NotAnImage(
            f"a BMP image of {bits} bits a pixel and compression {compression}; TensorFlow decodes 8, 24 or 32 "
            "bits, uncompressed"
        )


_OWN_RULES = {"png": _png_ends, "bmp": _bmp_is_plain}
