"""Images to measure with: made, not downloaded; the same bytes everywhere for the same versions.

    files = make(KINDS["25 KB"], folder)    # TFRecord shards, in which the images repeat
    sample = loaded(KINDS["25 KB"], files)  # with the images themselves, in memory

Light and shade at every scale, each half as long as the one before and weaker, is what photographs look like to a
JPEG encoder; colours vary at the coarse scales only. The quality is searched so that the files get their size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# Unequal, as shards are.
_SHARES = (0.35, 0.25, 0.2, 0.15, 0.05)
_LOUDEST = 55.0
_COLOURED_SIDE = 40
_QUALITIES = (40, 98)


@dataclass(frozen=True)
class Kind:
    """Images of one size.

    Args:
        name: for people, and in the results.
        height, width: in pixels.
        bytes: of an encoded image, about.
        detail: how much weaker each finer scale is.
        images: different ones.
        records: in the shards, which repeat the images.
        batch: rows of a step.
    """

    name: str
    height: int
    width: int
    bytes: int
    detail: float
    images: int
    records: int
    batch: int


# The kind whose target is much smaller than its images.
SCALED = "12 MP"
KINDS = {
    kind.name: kind
    for kind in (
        Kind("25 KB", 300, 365, 25_000, detail=0.62, images=64, records=4096, batch=32),
        Kind("110 KB", 375, 500, 110_000, detail=0.84, images=32, records=1536, batch=32),
        Kind("12 MP", 3000, 4000, 2_500_000, detail=0.72, images=3, records=60, batch=4),
    )
}


@dataclass(frozen=True)
class Sample:
    """The images of a kind: `encoded` in memory, and `files`, TFRecord shards of kind.records records."""

    kind: Kind
    encoded: tuple[bytes, ...]
    files: tuple[str, ...]


def make(kind: Kind, folder: str, seed: int = 0) -> tuple[str, ...]:
    """Makes the images, writes them into TFRecord shards with the features `image` and `label`; returns the files."""
    from distfit.data.example import messages
    from distfit.data.records import write_records

    images = encoded(kind, seed)
    types = messages()

    def examples(start: int, stop: int) -> Iterator[bytes]:
        for number in range(start, stop):
            image = types.Feature(bytes_list=types.BytesList(value=[images[number % len(images)]]))
            label = types.Feature(int64_list=types.Int64List(value=[number % 10]))
            yield types.Example(features=types.Features(feature={"image": image, "label": label})).SerializeToString()

    bounds = np.round(np.cumsum((0, *_SHARES)) * kind.records).astype(int).tolist()
    files = tuple(os.path.join(folder, f"{kind.height}-{shard:05}.tfrecord") for shard in range(len(_SHARES)))
    for file, start, stop in zip(files, bounds, bounds[1:], strict=False):
        write_records(file, examples(start, stop))
    return files


def loaded(kind: Kind, files: Sequence[str]) -> Sample:
    """What `make` wrote, the images in memory too."""
    from distfit.data.example import parse_example
    from distfit.data.records import read_at, scan

    offsets, lengths = scan(files[0])
    with open(files[0], "rb") as file:
        first = zip(offsets[: kind.images].tolist(), lengths[: kind.images].tolist(), strict=True)
        records = [read_at(file.fileno(), offset, length, files[0]) for offset, length in first]
    return Sample(kind, tuple(parse_example(record)["image"].values[0] for record in records), tuple(files))


def encoded(kind: Kind, seed: int = 0) -> tuple[bytes, ...]:
    """The JPEGs of a kind, 4:2:0 as cameras write them."""
    import simplejpeg

    pictures = [photograph(kind.height, kind.width, kind.detail, (seed, number)) for number in range(kind.images)]

    def at(quality: int, picture: np.ndarray) -> bytes:
        return simplejpeg.encode_jpeg(picture, quality, colorsubsampling="420")

    low, high = _QUALITIES
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if len(at(middle, pictures[0])) < kind.bytes else (low, middle)
    return tuple(at(low, picture) for picture in pictures)


def photograph(height: int, width: int, detail: float, seed: tuple[int, ...]) -> np.ndarray:
    """Something that a JPEG encoder takes for a photograph: uint8 [height, width, 3]."""
    import cv2

    noise = np.random.default_rng(seed)
    halvings = range(int(np.log2(max(height, width))) - 2, -1, -1)
    light: np.ndarray = np.zeros((1, 1), np.float32)
    colours: np.ndarray = np.zeros((1, 1, 2), np.float32)
    amplitude = _LOUDEST
    for halved in halvings:
        shape = -(-height >> halved), -(-width >> halved)
        light = cv2.resize(light, shape[::-1], interpolation=cv2.INTER_CUBIC)
        if halved:  # single pixels are no scale of light: lenses are not that sharp
            light = light + amplitude * noise.standard_normal(shape, np.float32)
        if max(shape) <= _COLOURED_SIDE:
            colours = cv2.resize(colours, shape[::-1], interpolation=cv2.INTER_CUBIC)
            colours = colours + amplitude / 3 * noise.standard_normal((*shape, 2), np.float32)
        amplitude *= detail
    red, blue = np.moveaxis(cv2.resize(colours, (width, height), interpolation=cv2.INTER_LINEAR), -1, 0)
    light += 128
    return np.clip(np.stack([light + red, light - (red + blue) / 2, light + blue], axis=-1), 0, 255).astype(np.uint8)
