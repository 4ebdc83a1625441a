"""A folder of class folders with JPEGs of varying size, like Caltech-256's, made from nothing but a seed.

    make_folder("/tmp/pictures", total=1189)

makes `001.disk-0/001_0001.jpg` and so on. A class is a shape filled with stripes of one direction; colours, place,
size, contrast and noise say nothing about it, so that a small network learns the classes, but not perfectly. Classes
are unbalanced: the largest has three times the pictures of the smallest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

SHAPES = ("disk", "square", "triangle", "ring", "cross", "bar")
DIRECTIONS = (0, 45, 90, 135)
SMALLEST, LARGEST = 64, 112


def make_folder(folder: str | Path, total: int, seed: int = 0) -> Path:
    """Writes `total` pictures of 24 classes and returns the folder.

    Args:
        folder: is made.
        total: pictures.
        seed: of all that is random.
    """
    folder, random = Path(folder), np.random.default_rng(seed)
    names = [f"{shape}-{direction}" for shape in SHAPES for direction in DIRECTIONS]
    for number, (name, count) in enumerate(zip(names, counts(total, len(names)), strict=True), start=1):
        (folder / f"{number:03d}.{name}").mkdir(parents=True)
        for index in range(1, count + 1):
            image = picture(random, name.split("-")[0], int(name.split("-")[1]))
            image.save(folder / f"{number:03d}.{name}" / f"{number:03d}_{index:04d}.jpg", quality=85)
    return folder


def counts(total: int, classes: int) -> list[int]:
    """Pictures of each class: from the smallest to three times as many, in an order that repeats itself.

    >>> sum(counts(1189, 24)), max(counts(1189, 24)), min(counts(1189, 24))
    (1189, 75, 25)
    """
    weights = 1 + 2 * (np.arange(classes) * 7 % classes) / (classes - 1)
    edges = np.round(np.cumsum(weights) / weights.sum() * total).astype(int)
    return np.diff(edges, prepend=0).tolist()


def picture(random: np.random.Generator, shape: str, direction: int):
    """A PIL image of a class."""
    from PIL import Image

    height, width = random.integers(SMALLEST, LARGEST + 1, 2)
    rows, columns = np.mgrid[:height, :width].astype(float)
    size = min(height, width) * random.uniform(0.36, 0.46)
    y = (rows - height * random.uniform(0.4, 0.6)) / size
    x = (columns - width * random.uniform(0.4, 0.6)) / size
    ground, dark, light = (random.uniform(low, low + 80, 3) for low in (80, 20, 160))
    angle = np.radians(direction + random.normal(0, 6))
    waves = np.sin(np.pi * random.uniform(3.0, 3.6) * (x * np.cos(angle) + y * np.sin(angle)))[..., None]
    filled = np.where(waves > 0, light, dark)
    pixels = np.where(inside(shape, x, y)[..., None], filled, ground) + random.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which pixels a shape covers; it reaches from -1 to 1."""
    radius = np.hypot(x, y)
    return {
        "disk": radius < 1,
        "square": np.maximum(abs(x), abs(y)) < 0.9,
        "triangle": (y < 0.8) & (abs(x) < (y + 1) * 0.55),
        "ring": (radius < 1) & (radius > 0.55),
        "cross": (np.minimum(abs(x), abs(y)) < 0.35) & (np.maximum(abs(x), abs(y)) < 1),
        "bar": (abs(y) < 0.4) & (abs(x) < 1),
    }[shape]
