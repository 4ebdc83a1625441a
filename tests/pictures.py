"""A small folder of JPEGs in the layout of Caltech-256, for tests that begin at a folder of pictures.

    make_caltech(tmp_path / "pictures", classes=3, per_class=10)

makes `001.ak47/001_0001.jpg` ... `003.backpack/003_0010.jpg`, and `257.clutter` as the last of the classes.
Every class has a colour of its own under noise, so that a model can learn them within a few steps; sizes and
proportions vary, and every tenth picture is gray, as in the original.
"""

from pathlib import Path

import numpy as np

NAMES = ("ak47", "american-flag", "backpack", "baseball-bat", "baseball-glove", "basketball-hoop", "bat", "bathtub")
CLUTTER = "257.clutter"


def class_folders(classes: int) -> list[str]:
    """Folder names in order: the first ones of Caltech-256, and its clutter as the last.

    >>> class_folders(3)
    ['001.ak47', '002.american-flag', '257.clutter']
    """
    numbered = [f"{number:03d}.{name}" for number, name in enumerate(NAMES[: classes - 1], start=1)]
    return [*numbered, CLUTTER]


def make_caltech(folder, classes: int = 3, per_class: int = 10, *, side: int = 48, seed: int = 0) -> Path:
    """Writes the pictures and returns the folder.

    Args:
        folder: is made.
        classes: class folders, 2 to 9, `257.clutter` included.
        per_class: pictures of each.
        side: the longer side of a picture in pixels; the shorter one is half of it or more.
        seed: of colours, sizes and noise.
    """
    folder = Path(folder)
    random = np.random.default_rng(seed)
    for label, name in enumerate(class_folders(classes)):
        (folder / name).mkdir(parents=True)
        for number in range(1, per_class + 1):
            image = picture(random, label, classes, side, gray=number % 10 == 0)
            image.save(folder / name / f"{name[:3]}_{number:04d}.jpg", quality=90)
    return folder


def picture(random: np.random.Generator, label: int, classes: int, side: int, gray: bool = False):
    """A PIL image: the colour of a class under noise."""
    from PIL import Image

    height, width = random.permuted([side, int(random.integers(side // 2, side + 1))])
    colour = np.array(Image.new("HSV", (1, 1), (label * 256 // classes, 200, 200)).convert("RGB"))[0, 0]
    pixels = colour + random.normal(0, 20, (height, width, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image.convert("L") if gray else image
