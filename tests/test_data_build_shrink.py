"""Images made smaller: which, how large, what they look like to TensorFlow, and how many files they fill."""

import io

import numpy as np
import pytest
from PIL import Image

from distfit.data import build, description
from distfit.data.build.image_check import checked_image
from distfit.data.build.shrink import Shrink, fitting
from distfit.errors import InputError
from tests.test_data_build import bytes_of, command, records_of
from tests.test_image_folder import BAD, GOOD, encoded, put

SMOOTH = Image.fromarray(np.linspace(0, 255, 40 * 60 * 3).reshape(3, 40, 60).transpose(1, 2, 0).astype(np.uint8))


def decoded(data, channels=3):
    import tensorflow as tf

    return tf.io.decode_image(data, channels=channels, expand_animations=False).numpy().astype(int)


@pytest.mark.parametrize("name", GOOD)
def test_every_image_becomes_a_jpeg_of_the_side_that_was_asked_for(name):
    data = GOOD[name][1]
    smaller = Shrink(20)(data)
    assert checked_image(smaller) == ("jpeg", 20)
    assert Image.open(io.BytesIO(smaller)).size == (20, 13)
    assert Shrink(20)(data) == smaller


@pytest.mark.parametrize(
    ("name", "image", "options"),
    [
        ("jpeg", SMOOTH, {"quality": 95}),
        ("png", SMOOTH, {}),
        ("gray png", SMOOTH.convert("L"), {}),
        ("CMYK jpeg", SMOOTH.convert("CMYK"), {"quality": 95}),
        ("png with a palette", SMOOTH.convert("P", palette=Image.Palette.ADAPTIVE, colors=255), {}),
        ("16-bit png", Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27), {}),
        ("png with gray and transparency", SMOOTH.convert("LA"), {}),
        ("bmp", SMOOTH, {}),
        ("gif", SMOOTH, {}),
        ("webp", SMOOTH, {"quality": 95}),
    ],
)
def test_a_smaller_image_looks_to_tensorflow_as_the_larger_one_did(name, image, options):
    """Colours, compared by the means of quarters; GIF and its like have noise of their own."""
    kind = next(kind for kind in ("jpeg", "png", "bmp", "gif", "webp") if kind in name)
    before = encoded(kind, image, **options)
    after = decoded(Shrink(30, quality=100)(before))
    quarters = decoded(before).reshape(2, 20, 2, 30, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(after.reshape(2, 10, 2, 15, 3).mean(axis=(1, 3)), quarters, atol=4)


def test_colours_behind_transparency_stay_as_tensorflow_sees_them():
    pixels = np.dstack([np.asarray(SMOOTH), np.zeros((40, 60), np.uint8)])
    before = encoded("png", Image.fromarray(pixels))
    after = decoded(Shrink(30, quality=100)(before))
    assert abs(after.mean() - decoded(before).mean()) < 3


def test_an_orientation_is_neither_applied_nor_kept():
    """TensorFlow's decoder looks at none, and a shrunk picture shall lie as those beside it that are kept."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    smaller = Image.open(io.BytesIO(Shrink(30)(encoded("jpeg", SMOOTH, exif=exif))))
    assert smaller.size == (30, 20)
    assert 0x0112 not in smaller.getexif()


@pytest.mark.parametrize(
    ("size", "expected"), [((3000, 4000), (384, 512)), ((513, 513), (512, 512)), ((9, 9999), (1, 512))]
)
def test_proportions_are_kept_and_no_side_vanishes(size, expected):
    assert fitting(size, 512) == expected


def test_fine_detail_is_averaged_and_not_sampled():
    lines = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (80, 40)))
    assert abs(decoded(Shrink(10)(encoded("png", lines)), channels=1) - 127.5).max() < 12


@pytest.fixture
def mixed(tmp_path):
    """Two classes: large JPEGs and PNGs, and small ones."""
    for number in range(20):
        folder = tmp_path / "pictures" / "ab"[number % 2]
        put(folder / f"{number}.jpg", encoded("jpeg", SMOOTH.resize((300, 200))))
        put(folder / f"{number}.png", encoded("png", SMOOTH.rotate(number)))
        put(folder / f"{number}small.jpg", encoded("jpeg", SMOOTH.resize((30, 20))))
    return tmp_path / "pictures"


def test_larger_images_are_shrunk_and_others_keep_their_bytes(mixed, tmp_path):
    built = build.build_images(mixed, tmp_path / "out", max_side=50, quality=80)
    assert (built.image_format, built.max_side, built.quality) == ("jpeg", 50, 80)
    assert description.load(tmp_path / "out").max_side == 50
    for record in records_of(tmp_path / "out", "train"):
        data, name = record["image"][0], record["filename"][0].decode()
        if "small" in name:
            assert data == (mixed / name).read_bytes()
        else:
            assert data == Shrink(50, 80)((mixed / name).read_bytes())
            assert checked_image(data) == ("jpeg", 50)


def test_the_format_is_that_of_what_is_stored(mixed, tmp_path):
    assert build.build_images(mixed, tmp_path / "a").image_format == "mixed"
    assert build.build_images(mixed, tmp_path / "b", max_side=60).image_format == "mixed"
    assert build.build_images(mixed, tmp_path / "c", max_side=59).image_format == "jpeg"


def test_shards_are_counted_by_the_bytes_after_shrinking(mixed, tmp_path):
    built = build.build_images(mixed, tmp_path / "out", max_side=50, shard_bytes=8000)
    size = sum(shard.bytes for shard in built.split("train").shards)
    assert abs(len(built.split("train").shards) - size / 8000) <= 1
    again = build.build_images(mixed, tmp_path / "again", max_side=50, shard_bytes=8000, threads=1)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "again")
    assert again.split("train") == built.split("train")


def test_a_damaged_image_is_refused_although_it_would_be_shrunk(mixed, tmp_path):
    put(mixed / "a" / "half.jpg", BAD["half a jpeg"][1])
    with pytest.raises(InputError, match=r"half\.jpg' is a JPEG image that is cut off"):
        build.build_images(mixed, tmp_path / "out", max_side=50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quality", 80], "Expected --quality with --max-side"),
        (["--max-side", 50, "--quality", 0], "quality from 1 to 100, received 0"),
        (["--max-side", 50, "--quality", 101], "quality from 1 to 100, received 101"),
        (["--shard-size", "big"], "size such as 128MiB or 1GB, received 'big'"),
        (["--shard-size", "0"], "shard of 1 byte or more, received 0"),
        (["--shard-size", "1MB", "--shards", 3], "number of shards or their size, received both"),
    ],
)
def test_wrong_options_are_refused(mixed, tmp_path, options, message):
    result = command("--images", mixed, *options, tmp_path / "out")
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_shrinks(mixed, tmp_path):
    options = ["--max-side", 50, "--quality", 70, "--shard-size", "8kB", "--threads", 2]
    result = command("--images", mixed, *options, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    built = description.load(tmp_path / "out")
    assert (built.max_side, built.quality) == (50, 70)
    assert len(built.split("train").shards) > 4
