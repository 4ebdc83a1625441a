"""Large images made smaller and stored as JPEG: `--max-side 512 --quality 90`.

    shrink = Shrink(max_side=512, quality=90)
    if side > shrink.max_side:
        data = shrink(data)

What comes out is what TensorFlow decodes of the original, smaller: it looks at neither orientation, colour profile
nor transparency, so pixels are not turned, profiles are left out, and colours behind transparency are kept as they
are. A 16-bit picture gives its upper 8 bits, CMYK becomes RGB, and of an animation the first picture is taken. The
same bytes come out of the same Pillow with the same libjpeg, whatever the number of threads.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from distfit.errors import InputError

QUALITY = 90
# JPEG's decoder can give an eighth, a quarter or a half of a side almost for nothing; so many times the wanted side
# is asked of it, from where a filter does the rest.
_DRAFT = 2
_GRAY = {"L", "LA", "La", "1", "I", "I;16", "I;16B", "F"}


@dataclass(frozen=True)
class Shrink:
    """Makes images smaller.

    Args:
        max_side: pixels that the longer side may have, 1 or more.
        quality: of JPEG, 1 to 100.

    Raises:
        InputError: one is out of its range.
    """

    max_side: int
    quality: int = QUALITY

    def __post_init__(self) -> None:
        if self.max_side < 1:
            raise InputError(f"Expected a longer side of 1 pixel or more, received {self.max_side}. Try 512.")
        if not 1 <= self.quality <= 100:
            raise InputError(f"Expected a JPEG quality from 1 to 100, received {self.quality}. Try {QUALITY}.")

    def __call__(self, data: bytes) -> bytes:
        """An encoded image whose longer side is `max_side`, as JPEG, of a whole image whose side is longer."""
        from PIL import Image

        with Image.open(io.BytesIO(data)) as image:
            size = fitting(image.size, self.max_side)
            image.draft(image.mode, (_DRAFT * size[0], _DRAFT * size[1]))
            smaller = _plain(image).resize(size, Image.Resampling.BICUBIC, reducing_gap=_DRAFT)
        buffer = io.BytesIO()
        smaller.save(buffer, "JPEG", quality=self.quality, subsampling="4:2:0")
        return buffer.getvalue()


def fitting(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Width and height with the same proportion and the longer one as asked for.

    >>> fitting((4000, 3000), 512), fitting((10, 9000), 512)
    ((512, 384), (1, 512))
    """
    most = max(size)
    width, height = (max(1, (2 * side * longest + most) // (2 * most)) for side in size)
    return width, height


def libraries() -> str:
    """The versions that decide about the bytes."""
    import PIL
    from PIL import features

    return f"Pillow {PIL.__version__} with libjpeg {features.version('libjpeg_turbo') or features.version('jpg')}"


def _plain(image: Any) -> Any:
    """Gray or RGB of 8 bits, as TensorFlow sees it."""
    from PIL import Image

    if image.mode in ("I", "I;16", "I;16B"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    mode = "L" if image.mode in _GRAY else "RGB"
    return image if image.mode == mode else image.convert(mode)
