"""What is measured: each way decodes a number of images in one pass, in this process and on its cores.

    way = WAYS["transform"](sample, cores=2)
    decode = way(records=512)               # prepares: traces graphs, opens files
    decode()                                # the pass that is timed

The references are written as people write them. Those by threads take images from memory and hand out nothing, the
others read TFRecord files and give batches, as distfit does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from distfit.bench.samples import Sample

SIDE = 224
Pass: TypeAlias = Callable[[], None]
Way: TypeAlias = Callable[[int], Pass]


def libjpeg(sample: Sample, cores: int) -> Way:
    """libjpeg-turbo alone: simplejpeg in as many threads as cores."""
    return _in_threads(sample, cores, lambda image, number: _whole(image))


def public(sample: Sample, cores: int) -> Way:
    """Decode and resize with padding by the best public way on a CPU: simplejpeg and OpenCV in threads."""
    import cv2

    height, width = sample.kind.height, sample.kind.width
    ratio = max(height, width) / SIDE
    tall, wide = int(height / ratio), int(width / ratio)
    top, left = (SIDE - tall) // 2, (SIDE - wide) // 2
    rows = np.zeros((sample.kind.batch, SIDE, SIDE, 3), np.uint8)

    def row(image: bytes, number: int) -> None:
        pixels = _whole(image, min_height=tall, min_width=wide, min_factor=2)
        part = cv2.resize(pixels, (wide, tall), interpolation=cv2.INTER_LINEAR)
        rows[number % len(rows), top : top + tall, left : left + wide] = part

    return _in_threads(sample, cores, row)


def crop_of_whole(sample: Sample, cores: int) -> Way:
    """The same random resized crops as distfit's, cut from images that were decoded whole, in threads."""
    import cv2

    from distfit.data.images import Draws, geometry

    rows = np.zeros((sample.kind.batch, SIDE, SIDE, 3), np.uint8)

    def row(image: bytes, number: int) -> None:
        pixels = _whole(image)
        box = geometry.random_crop(sample.kind.height, sample.kind.width, Draws((0, number), "crop"))
        part = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
        rows[number % len(rows)] = cv2.resize(part, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)

    return _in_threads(sample, cores, row)


def tutorial(sample: Sample, cores: int) -> Way:
    """One `map` for each operation, one after the other."""

    def dataset(records: int) -> Any:
        import tensorflow as tf

        return (
            tf.data.TFRecordDataset(list(sample.files))
            .take(records)
            .map(_parsed)
            .map(lambda example: (tf.io.decode_jpeg(example["image"], channels=3), example["label"]))
            .map(lambda image, label: (tf.image.resize_with_pad(image, SIDE, SIDE), label))
            .map(lambda image, label: (image / 255.0, label))
            .batch(sample.kind.batch)
        )

    return _of_dataset(dataset)


def recipe(sample: Sample, cores: int) -> Way:
    """What tensorflow.org's guide to better performance recommends: one parallel map, AUTOTUNE, prefetch."""

    def dataset(records: int) -> Any:
        import tensorflow as tf

        def row(record: Any) -> Any:
            example = _parsed(record)
            image = tf.io.decode_jpeg(example["image"], channels=3)
            return tf.image.resize_with_pad(image, SIDE, SIDE) / 255.0, example["label"]

        read = tf.data.TFRecordDataset(list(sample.files), num_parallel_reads=tf.data.AUTOTUNE).take(records)
        return read.map(row, num_parallel_calls=tf.data.AUTOTUNE).batch(sample.kind.batch).prefetch(tf.data.AUTOTUNE)

    return _of_dataset(dataset)


def decode(sample: Sample, cores: int) -> Way:
    """distfit without resizing: pixels as they are in the files."""
    return _distfit(sample, {"size": (sample.kind.height, sample.kind.width), "fit": "stretch"})


def transform(sample: Sample, cores: int) -> Way:
    """distfit: read, decode, resize with padding."""
    return _distfit(sample, {})


def unscaled(sample: Sample, cores: int) -> Way:
    """distfit, every image decoded at its full size."""
    return _distfit(sample, {"scaled": False})


def random_crop(sample: Sample, cores: int) -> Way:
    """distfit: random resized crops."""
    return _distfit(sample, {"fit": "random_crop"})


def in_file_order(sample: Sample, cores: int) -> Way:
    """distfit as in `transform`, the records in the order of the files."""
    return _distfit(sample, {}, shuffle=False)


WAYS: dict[str, Callable[[Sample, int], Way]] = {
    "libjpeg": libjpeg,
    "decode": decode,
    "public": public,
    "transform": transform,
    "in_file_order": in_file_order,
    "tutorial": tutorial,
    "recipe": recipe,
    "crop_of_whole": crop_of_whole,
    "random_crop": random_crop,
    "unscaled": unscaled,
}


def _whole(image: bytes, **smaller: Any) -> np.ndarray:
    """With the settings that distfit decodes with by default."""
    import simplejpeg

    return simplejpeg.decode_jpeg(image, fastdct=True, fastupsample=True, **smaller)


def _in_threads(sample: Sample, cores: int, do: Callable[[bytes, int], Any]) -> Way:
    from distfit.data.images.rows import each

    images = sample.encoded
    return lambda records: lambda: each(lambda row: do(images[row % len(images)], row), records, cores)


def _of_dataset(make: Callable[[int], Any]) -> Way:
    def prepared(records: int) -> Pass:
        dataset = make(records)

        def run() -> None:
            for _ in dataset:
                continue

        return run

    return prepared


def _distfit(sample: Sample, images: dict[str, Any], shuffle: bool = True) -> Way:
    from distfit.data.images import Images
    from distfit.data.plan import Order
    from distfit.data.tfrecords import TFRecords

    source = TFRecords(list(sample.files), transform=Images(**images))
    # A step of whole images of 12 megapixels is made of fewer.
    batch = max(1, sample.kind.batch // (1 if source.transform.size == (SIDE, SIDE) else 2))
    return _of_dataset(
        lambda records: source.process_batches(order=Order(records, shuffle=shuffle), global_batch=batch)
    )


def _parsed(record: Any) -> Any:
    import tensorflow as tf

    features = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}
    return tf.io.parse_single_example(record, features)
