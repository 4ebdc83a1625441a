"""A sheet of thumbnails: random records of a split with their labels, for people who would rather look.

    with whole_file("sheet.png") as file:
        file.write(draw_sheet(records, title="train of data/pictures", names=classes, seed=0))

The images are drawn as a training sees them: decoded without regard to rotation tags and transparency, 16 bits
cut to 8.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distfit.data.example import NotAnExample, Values, parse_example
from distfit.data.inspect.features import Seen
from distfit.data.inspect.record_check import IMAGE, label_of
from distfit.data.inspect.records_of import Records
from distfit.errors import InputError

COLUMNS, ROWS = 6, 6
TILE = 144
_MARGIN, _LINE = 8, 16
_CELL = (TILE + _MARGIN, TILE + 2 * _LINE + _MARGIN)
_PAPER, _INK, _FAINT, _EMPTY = (255, 255, 255), (20, 20, 20), (110, 110, 110), (235, 235, 235)


@dataclass(frozen=True)
class Tile:
    """One record: its number in the split, its encoded image, what stands below it."""

    number: int
    encoded: bytes
    text: str


def draw_sheet(records: Records, *, title: str, names: Sequence[str] = (), seed: int = 0) -> bytes:
    """A PNG image of up to 36 records.

    Args:
        records: of one split.
        title: stands above it.
        names: of the classes by label; a label without one is shown as it is.
        seed: of the choice of records.

    Raises:
        InputError: the records hold no images.
        RunError: a damaged record.
    """
    sample = list(records.sample(COLUMNS * ROWS, seed))
    tiles = _tiles(sample, names)
    return _png(_drawn(tiles, f"{title}: {len(tiles)} of {_count(records)} records, seed {seed}"))


def _count(records: Records) -> str:
    return "its" if records.count is None else f"{records.count:,}"


def _tiles(sample: Sequence[tuple[int, bytes]], names: Sequence[str]) -> list[Tile]:
    feature = _image_feature([serialized for _, serialized in sample])
    return [_tile(number, _features(serialized), feature, names) for number, serialized in sample]


def _image_feature(sample: Sequence[bytes]) -> str:
    seen = Seen()
    for serialized in sample:
        seen.add(serialized)
    images = [one.feature for one in seen.images()]
    if not images:
        types = ", ".join(f"{one.name} ({one.type})" for one in seen.features()) or "no tf.train.Example"
        raise InputError(
            f"Expected records with an encoded image for a sheet, received records with {types}, none of which begins "
            "as an image does. Leave --sheet out."
        )
    return IMAGE if IMAGE in images else images[0]


def _features(serialized: bytes) -> Mapping[str, Values]:
    try:
        return parse_example(serialized)
    except NotAnExample:
        return {}


def _tile(number: int, features: Mapping[str, Values], feature: str, names: Sequence[str]) -> Tile:
    values = features.get(feature)
    encoded = values.values[0] if values and values.kind == "bytes" and len(values.values) else b""
    label = label_of(features)
    text = "" if label is None else names[label] if 0 <= label < len(names) else str(label)
    return Tile(number, encoded, text)


def _drawn(tiles: Sequence[Tile], title: str) -> Any:
    """The sheet as a PIL image."""
    from PIL import Image, ImageDraw, ImageFont

    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    wide, high = _CELL
    sheet = Image.new("RGB", (max(columns, 3) * wide + _MARGIN, rows * high + _LINE + 2 * _MARGIN), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    draw.text((_MARGIN, _MARGIN), _fitting(title, font, sheet.width - 2 * _MARGIN), _INK, font)
    for position, tile in enumerate(tiles):
        row, column = divmod(position, columns)
        left, top = _MARGIN + column * wide, _LINE + 2 * _MARGIN + row * high
        _draw_image(sheet, draw, font, tile, left, top)
        draw.text((left, top + TILE + 1), _fitting(tile.text, font, TILE), _INK, font)
        draw.text((left, top + TILE + 1 + _LINE), f"#{tile.number:,}", _FAINT, font)
    return sheet


def _draw_image(sheet: Any, draw: Any, font: Any, tile: Tile, left: int, top: int) -> None:
    image = _thumbnail(tile.encoded)
    draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), _EMPTY)
    if image is None:
        draw.text((left + _MARGIN, top + TILE // 2), "no image", _INK, font)
    else:
        sheet.paste(image, (left + (TILE - image.width) // 2, top + (TILE - image.height) // 2))


def _thumbnail(encoded: bytes) -> Any:
    """The image in RGB, its longer side as long as a tile; None where it cannot be decoded."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.draft("RGB", (TILE, TILE))
            image = _eight_bits(image)
    except Exception:  # Pillow lets through whatever its decoders meet; the sheet shows where
        return None
    scale = TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Pixels of a tiny image stay visible as squares.
    return image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)


def _eight_bits(image: Any) -> Any:
    from PIL import Image

    if image.mode.startswith("I"):
        # Pillow would cut brighter values off instead of scaling them.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _fitting(text: str, font: Any, width: int) -> str:
    """The text, shortened to so many pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
