"""What encoded bytes are, told from their first bytes: the format and its size in pixels, before anything is decoded.

    format_of(encoded)                      # "png", whatever the file is called; or NotAnImage
    size_in_header("png", encoded)          # (height, width)

What TensorFlow's `tf.io.decode_image(encoded, channels=3, expand_animations=False)` decodes is an image; the rest
is none, also where another library would read it.
"""

from __future__ import annotations

import struct

FORMATS = ("jpeg", "png", "gif", "bmp", "webp")
_STARTS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG\r\n\x1a\n": "png", b"GIF8": "gif", b"BM": "bmp"}
_WEBP_ANIMATION = 0x02
_WEBP_ALPHA = 0x10
_BMP_UNCOMPRESSED = (0, 3)


class NotAnImage(Exception):
    """Bytes that are not decoded; the text says what they are, to stand after "received"."""


def format_of(encoded: bytes) -> str:
    """One of `FORMATS`, by content.

    >>> format_of(b"GIF89a")
    'gif'
    >>> format_of(b"<html>404</html>")
    Traceback (most recent call last):
    distfit.data.images.formats.NotAnImage: bytes that are no jpeg, png, gif, bmp or webp image

    Raises:
        NotAnImage: none of them.
    """
    for start, name in _STARTS.items():
        if encoded.startswith(start):
            return name
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return "webp"
    if not encoded:
        raise NotAnImage("no bytes where an image should be")
    raise NotAnImage(f"bytes that are no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image")


def size_in_header(name: str, encoded: bytes) -> tuple[int, int]:
    """(height, width) as the header of a PNG, GIF, BMP or WebP image claims it.

    Raises:
        NotAnImage: there is no whole header, or it announces what TensorFlow does not decode.
    """
    try:
        height, width = _SIZES[name](encoded)
    except struct.error as error:
        raise NotAnImage(f"a {name.upper()} image that is cut off in its header") from error
    if height < 1 or width < 1:
        raise NotAnImage(f"a {name.upper()} image of {height} x {width} pixels")
    return height, width


def _png(encoded: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", encoded, 16)
    return height, width


def _gif(encoded: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", encoded, 6)
    return height, width


def _bmp(encoded: bytes) -> tuple[int, int]:
    width, height, _, bits, compression = struct.unpack_from("<iiHHI", encoded, 18)
    if bits not in (8, 24, 32) or compression not in _BMP_UNCOMPRESSED:
        raise NotAnImage(
            f"a BMP image of {bits} bits a pixel and compression {compression}, where 8, 24 or 32 uncompressed bits "
            "are decoded"
        )
    if bits == 8 and not _is_gray(encoded):
        raise NotAnImage("a BMP image with a palette, whose indices TensorFlow would take for gray")
    return abs(height), width


def _is_gray(encoded: bytes) -> bool:
    """Whether the palette of a BMP image maps each value to that gray."""
    (header,) = struct.unpack_from("<I", encoded, 14)
    (pixels,) = struct.unpack_from("<I", encoded, 10)
    palette = encoded[14 + header : pixels]
    return all(palette[4 * value : 4 * value + 3] == bytes([value] * 3) for value in range(len(palette) // 4))


def _webp(encoded: bytes) -> tuple[int, int]:
    kind = encoded[12:16]
    if kind == b"VP8X":
        (flags,) = struct.unpack_from("<B", encoded, 20)
        width, height = (int.from_bytes(encoded[at : at + 3], "little") + 1 for at in (24, 27))
        _refuse_webp(flags & _WEBP_ANIMATION, flags & _WEBP_ALPHA)
        return height, width
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", encoded, 21)
        _refuse_webp(0, bits >> 28 & 1)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", encoded, 26)
    return height & 0x3FFF, width & 0x3FFF


def _refuse_webp(animated: int, alpha: int) -> None:
    if animated:
        raise NotAnImage("an animated WEBP image, which TensorFlow does not decode")
    if alpha:
        raise NotAnImage("a WEBP image with an alpha channel, which TensorFlow does not decode to other channels")


_SIZES = {"png": _png, "gif": _gif, "bmp": _bmp, "webp": _webp}
