"""Ready image recipes: their pixels against TensorFlow's, their faults, and that a seed means one row."""

from __future__ import annotations

import io
import math
import os
import struct
import subprocess
import sys
from typing import Any

import cv2
import keras
import numpy as np
import pytest
import simplejpeg
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distfit.data.images import (
    Draws,
    Images,
    Jitter,
    NotAnImage,
    decode_rows,
    draws,
    format_of,
    geometry,
    jpeg,
    memory,
)
from distfit.data.images.augment import augment
from distfit.data.images.geometry import Box
from distfit.data.images.rows import augment_rows
from distfit.errors import InputError
from tests.ranks import ROOT, environment

CHANGES = Jitter(brightness=0.2, contrast=0.3, saturation=0.4, hue=0.05)
SEED = np.array([7, 11], np.uint32)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth areas with some detail, like a photograph."""
    noise = np.random.default_rng(seed)
    layers = [
        amplitude * cv2.resize(noise.standard_normal((side, side, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
        for side, amplitude in ((3, 60), (8, 30), (30, 10))
    ]
    return np.clip(128 + sum(layers), 0, 255).astype(np.uint8)


PICTURE = picture(40, 60)
ALPHA = np.dstack([PICTURE, picture(40, 60, 1)[..., 0]])
# What most pixels have, in the palette of mode P.
COMMON = int(np.bincount(np.asarray(Image.fromarray(PICTURE).convert("P")).ravel()).argmax())
SIXTEEN = np.random.default_rng(2).integers(0, 2**16, (40, 60, 3)).astype(np.uint16)


def saved(format: str, mode: str = "RGB", pixels: np.ndarray = PICTURE, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format, **options)
    return file.getvalue()


def animated(format: str) -> bytes:
    return saved(format, save_all=True, append_images=[Image.fromarray(255 - PICTURE)])


JPEGS = {
    "jpeg": saved("JPEG"),
    "sharp colours": saved("JPEG", subsampling=0),
    "4:2:2": saved("JPEG", subsampling=1),
    "progressive": saved("JPEG", progressive=True),
    "gray": saved("JPEG", "L"),
    "four inks": saved("JPEG", "CMYK"),
    "stored as RGB": saved("JPEG", keep_rgb=True),
    "stray bytes": saved("JPEG")[:-2] + b"\0\0\0\xff\xd9",
    "bytes behind": saved("JPEG") + b"behind",
}
OTHERS = {
    "png": saved("PNG"),
    "png gray": saved("PNG", "L"),
    "png palette": saved("PNG", "P"),
    "png palette transparent": saved("PNG", "P", transparency=3),
    "png black and white": saved("PNG", "1"),
    "png alpha": saved("PNG", "RGBA", ALPHA),
    "png gray alpha": saved("PNG", "LA"),
    "png 16 bits": cv2.imencode(".png", SIXTEEN)[1].tobytes(),
    "png 16 bits gray": cv2.imencode(".png", SIXTEEN[..., 0])[1].tobytes(),
    "gif": saved("GIF", "P"),
    "gif transparent": saved("GIF", "P", transparency=COMMON),
    "gif animated": animated("GIF"),
    "bmp": saved("BMP"),
    "bmp gray": saved("BMP", "L"),
    "bmp alpha": saved("BMP", "RGBA", ALPHA),
    "webp": saved("WEBP"),
    "webp lossless": saved("WEBP", lossless=True),
}


def decoded(encoded: bytes, seed: np.ndarray | None = None, **recipe: Any) -> np.ndarray:
    defaults: dict[str, Any] = {"size": (40, 60), "fit": "stretch", "fast": False}
    images = Images(**(defaults | recipe))
    out = np.full(images.shape, 99, np.uint8)
    images.decode(encoded, out, seed)
    return out


def by_tensorflow(encoded: bytes, fast: bool = False) -> np.ndarray:
    method = "INTEGER_FAST" if fast else "INTEGER_ACCURATE"
    return tf.io.decode_jpeg(encoded, channels=3, dct_method=method, fancy_upscaling=not fast).numpy()


class TestPixels:
    @pytest.mark.parametrize("fast", [False, True])
    @pytest.mark.parametrize("name", JPEGS)
    def test_of_a_jpeg_are_those_of_tensorflow_to_the_bit(self, name, fast):
        assert np.array_equal(decoded(JPEGS[name], fast=fast), by_tensorflow(JPEGS[name], fast))

    @pytest.mark.parametrize("name", OTHERS)
    def test_of_other_formats_are_those_of_tensorflow_to_the_bit(self, name):
        expected = tf.io.decode_image(OTHERS[name], channels=3, expand_animations=False).numpy()
        assert np.array_equal(decoded(OTHERS[name]), expected)

    @pytest.mark.parametrize("name", ["jpeg", "gray", "progressive", "png", "png palette", "png 16 bits", "png alpha"])
    def test_of_one_channel_are_the_gray_of_tensorflow(self, name):
        encoded = (JPEGS | OTHERS)[name]
        decode = tf.io.decode_png if format_of(encoded) == "png" else tf.io.decode_jpeg
        options = {} if format_of(encoded) == "png" else {"dct_method": "INTEGER_ACCURATE"}
        assert np.array_equal(decoded(encoded, channels=1), decode(encoded, channels=1, **options).numpy())

    @pytest.mark.parametrize("name", ["four inks", "gif", "bmp", "webp"])
    def test_of_one_channel_are_the_gray_of_the_colours_where_tensorflow_has_none(self, name):
        encoded = (JPEGS | OTHERS)[name]
        colours = decoded(encoded).astype(float)
        assert np.abs(decoded(encoded, channels=1)[..., 0] - colours @ [0.299, 0.587, 0.114]).max() <= 1

    def test_are_not_turned_as_the_exif_data_say(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        for format in ("JPEG", "PNG", "WEBP"):
            turned = saved(format, exif=exif, lossless=True) if format == "WEBP" else saved(format, exif=exif)
            expected = tf.io.decode_image(turned, channels=3, expand_animations=False).numpy()
            # Its default is the quicker transform with interpolated colours.
            assert np.abs(decoded(turned).astype(int) - expected).max() <= 4, format

    def test_of_a_jpeg_with_a_header_that_libjpeg_warns_of_are_those_of_tensorflow(self):
        odd = saved("JPEG").replace(b"JFIF\0\1", b"JFIF\0\7")
        assert np.array_equal(decoded(odd), by_tensorflow(odd))

    def test_are_decoded_by_content_whatever_the_name(self):
        assert [format_of(encoded) for encoded in (OTHERS["png"], JPEGS["jpeg"])] == ["png", "jpeg"]

    def test_the_fast_way_costs_one_or_two_levels_on_average(self):
        encoded = simplejpeg.encode_jpeg(picture(300, 365), 88, colorsubsampling="420")
        difference = np.abs(
            decoded(encoded, size=(300, 365), fast=True).astype(int) - decoded(encoded, size=(300, 365))
        )
        assert 0 < difference.mean() < 2


class TestFit:
    @pytest.mark.parametrize("shape", [(300, 365), (365, 300), (50, 40), (224, 224), (17, 400)])
    def test_pad_is_resize_with_pad(self, shape):
        pixels = picture(*shape)
        expected = tf.image.resize_with_pad(pixels, 224, 192).numpy()
        found = decoded(saved("PNG", pixels=pixels), size=(224, 192), fit="pad", scaled=False)
        assert np.abs(found - expected).max() <= 1

    @pytest.mark.parametrize("shape", [(300, 365), (365, 300), (50, 40), (224, 224), (17, 400)])
    def test_center_crop_is_the_one_of_keras(self, shape):
        pixels = picture(*shape)
        layer = keras.layers.Resizing(96, 128, crop_to_aspect_ratio=True)
        found = decoded(saved("PNG", pixels=pixels), size=(96, 128), fit="center_crop", scaled=False)
        assert np.abs(found - np.asarray(layer(pixels.astype(np.float32)))).max() <= 1

    def test_stretch_is_resize(self):
        pixels = picture(300, 365)
        found = decoded(saved("PNG", pixels=pixels), size=(224, 224), scaled=False)
        assert np.abs(found - tf.image.resize(pixels, (224, 224)).numpy()).max() <= 1

    @pytest.mark.parametrize("format", ["JPEG", "PNG"])
    def test_a_large_image_is_averaged_not_sampled(self, format):
        pixels = picture(640, 480)
        pixels[::8] = 0  # lines that resizing alone would not see
        options: dict[str, Any] = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
        encoded = saved(format, pixels=pixels, **options)
        expected = cv2.resize(pixels, (60, 80), interpolation=cv2.INTER_AREA).astype(int)
        assert np.abs(decoded(encoded, size=(80, 60)) - expected).mean() < 1.5
        assert np.abs(decoded(encoded, size=(80, 60), scaled=False) - expected).mean() > 5

    @pytest.mark.parametrize("fit", ["pad", "center_crop", "stretch", "random_crop"])
    def test_a_scaled_decode_is_near_the_whole_one(self, fit):
        encoded = simplejpeg.encode_jpeg(cv2.GaussianBlur(picture(701, 999), (0, 0), 4), 95)
        whole = decoded(encoded, SEED, size=(64, 64), fit=fit, scaled=False).astype(int)
        assert np.abs(decoded(encoded, SEED, size=(64, 64), fit=fit) - whole).mean() < 1.5

    @given(
        st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32 - 1)
    )
    @settings(deadline=None)
    def test_every_box_lies_inside(self, height, width, tall, wide, seed):
        for fit in ("pad", "center_crop", "stretch", "random_crop"):
            source, place = geometry.fitted(fit, height, width, (tall, wide), Draws((seed, 0), "crop"))
            times = geometry.reduction(source, place)
            small = (-(-height // times), -(-width // times))
            for box, (down, across) in (
                (source, (height, width)),
                (place, (tall, wide)),
                (geometry.reduced(source, times, *small), small),
            ):
                assert min(box.top, box.left) >= 0
                assert min(box.height, box.width) >= 1
                assert box.top + box.height <= down
                assert box.left + box.width <= across

    @pytest.mark.parametrize("shape", [(96, 128), (192, 256), (191, 256), (192, 255), (193, 256), (97, 128)])
    @pytest.mark.parametrize("fit", ["pad", "center_crop", "stretch"])
    def test_images_of_the_target_s_size_or_near_twice_as_large_come_out_as_others(self, shape, fit):
        pixels = cv2.GaussianBlur(picture(*shape), (0, 0), 3)
        encoded = simplejpeg.encode_jpeg(pixels, 95)
        found = decoded(encoded, size=(96, 128), fit=fit).astype(int)
        assert np.abs(found - decoded(saved("PNG", pixels=pixels), size=(96, 128), fit=fit)).mean() < 1.5


class TestRandomCrop:
    def test_has_the_areas_and_proportions_that_are_usual(self):
        boxes = [geometry.random_crop(400, 400, Draws((0, seed), "crop")) for seed in range(4000)]
        areas = np.array([box.height * box.width / 160_000 for box in boxes])
        proportions = np.array([box.width / box.height for box in boxes])
        assert 0.079 < areas.min() < 0.1
        assert 0.85 < areas.max() <= 1
        assert 0.74 < proportions.min() < 0.77
        assert 1.3 < proportions.max() < 1.35
        assert abs(np.log(proportions).mean()) < 0.02
        freedom = [(400 - box.height, box.top) for box in boxes if box.height < 300]
        assert abs(np.mean([top / free for free, top in freedom]) - 0.5) < 0.02

    def test_of_a_strip_is_its_centre(self):
        assert geometry.random_crop(10, 1000, Draws((0, 0), "crop")) == Box(0, 493, 10, 13)

    @pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411"])
    @pytest.mark.parametrize("fast", [False, True])
    def test_decodes_the_crop_alone_to_the_same_pixels(self, sampling, fast):
        encoded = simplejpeg.encode_jpeg(picture(211, 187), 90, colorsubsampling=sampling)
        size = jpeg.header(encoded)
        noise = np.random.default_rng(0)
        for reduction in (1, 2, 4):
            whole = jpeg.decoded(encoded, size, Box(0, 0, 211, 187), reduction, 3, fast).copy()
            for top, left in noise.integers(0, 150, (12, 2)).tolist():
                box = Box(top, left, *noise.integers(16, 37, 2).tolist())
                part = geometry.reduced(box, reduction, *whole.shape[:2])
                expected = whole[part.top : part.top + part.height, part.left : part.left + part.width]
                assert np.array_equal(jpeg.decoded(encoded, size, box, reduction, 3, fast), expected)

    def test_does_not_decode_what_lies_below(self):
        encoded = simplejpeg.encode_jpeg(picture(400, 300), 90)
        shorter, height = jpeg.lowered(encoded, 100, interpolated=False)
        assert height == jpeg.header(shorter)[0] == 104

    @pytest.mark.parametrize("options", [{"progressive": True}, {"progressive": True, "subsampling": 0}])
    def test_decodes_all_of_a_progressive_image(self, options):
        encoded = saved("JPEG", pixels=picture(211, 187), **options)
        assert jpeg.lowered(encoded, 50, interpolated=False) == (encoded, 211)
        found = jpeg.decoded(encoded, jpeg.header(encoded), Box(20, 30, 40, 50), 1, 3, False)
        assert np.array_equal(found, by_tensorflow(encoded)[20:60, 30:80])

    def test_of_a_row_is_the_crop_of_the_whole_image(self):
        encoded = simplejpeg.encode_jpeg(picture(211, 187), 90)
        box = geometry.random_crop(211, 187, Draws(SEED, "crop"))
        part = by_tensorflow(encoded)[box.top : box.top + box.height, box.left : box.left + box.width]
        expected = cv2.resize(part, (60, 40), interpolation=cv2.INTER_LINEAR)
        assert np.array_equal(decoded(encoded, SEED, fit="random_crop", scaled=False), expected)

    def test_that_is_cut_off_below_the_crop_is_a_bad_record_all_the_same(self):
        encoded = simplejpeg.encode_jpeg(picture(400, 300), 90)
        with pytest.raises(NotAnImage, match="cut off"):
            jpeg.decoded(encoded[:-200], jpeg.header(encoded), Box(0, 0, 50, 50), 1, 3, True)


class TestFaults:
    @pytest.mark.parametrize(
        ("encoded", "reason"),
        [
            (b"", "no bytes"),
            (b"a caption that was stored as an image", "no jpeg, png, gif, bmp or webp"),
            (saved("TIFF"), "no jpeg, png, gif, bmp or webp"),
            (JPEGS["jpeg"][:300], "cut off"),
            (JPEGS["jpeg"][:-40], "Premature end"),
            (JPEGS["progressive"][:-40], "Premature end"),
            (JPEGS["jpeg"][:8], "cut off"),
            (OTHERS["png"][:20], "cut off in its header"),
            (OTHERS["png"][:-60], "cut off"),
            (OTHERS["png"][:60] + b"\1" + OTHERS["png"][61:], "damaged"),
            (OTHERS["gif"][:7], "cut off in its header"),
            (OTHERS["gif"][:700], "cut off"),
            (OTHERS["bmp"][:3000], "cut off"),
            (OTHERS["webp"][:28], "cut off"),
            (OTHERS["webp"][:100], "cut off"),
            (saved("BMP", "1"), "1 bits a pixel"),
            (saved("BMP", "P"), "palette"),
            (saved("WEBP", "RGBA", ALPHA), "alpha"),
            (animated("WEBP"), "animated"),
        ],
    )
    def test_are_told(self, encoded, reason):
        with pytest.raises(NotAnImage, match=reason):
            decoded(encoded)

    def test_a_damaged_jpeg_is_one_where_it_is_one_for_tensorflow(self):
        noise = np.random.default_rng(3)
        accepted = 0
        for _ in range(200):
            damaged = bytearray(JPEGS["jpeg"])
            damaged[int(noise.integers(2, len(damaged)))] ^= 1 << int(noise.integers(8))
            try:
                expected = by_tensorflow(bytes(damaged))
            except tf.errors.InvalidArgumentError:
                with pytest.raises(NotAnImage):
                    decoded(bytes(damaged))
            else:
                assert np.array_equal(decoded(bytes(damaged), size=expected.shape[:2]), expected)
                accepted += 1
        assert 0 < accepted < 200

    @pytest.mark.parametrize("name", ["jpeg", "png", "gif", "bmp", "webp", "webp lossless"])
    def test_a_decompression_bomb_is_refused_before_it_is_decoded(self, name, monkeypatch):
        def decode(*arguments, **options):
            raise AssertionError("a bomb was decoded")

        monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
        monkeypatch.setattr(cv2, "imdecode", decode)
        monkeypatch.setattr(Image, "open", decode)
        with pytest.raises(NotAnImage, match=r"of 16000 x 15000 pixels, more than max_pixels=89,478,485"):
            decoded(claiming(name, 16000, 15000))

    def test_the_limit_can_be_raised_and_lowered(self):
        with pytest.raises(NotAnImage, match="max_pixels=2,399"):
            decoded(OTHERS["png"], max_pixels=40 * 60 - 1)
        decoded(OTHERS["png"], max_pixels=40 * 60)


def claiming(name: str, height: int, width: int) -> bytes:
    """A small image whose header claims another size."""
    encoded = bytearray((JPEGS | OTHERS)[name])
    if name == "jpeg":
        struct.pack_into(">HH", encoded, jpeg.frame(bytes(encoded)).at + 5, height, width)
    elif name == "png":
        struct.pack_into(">II", encoded, 16, width, height)
    elif name == "gif":
        struct.pack_into("<HH", encoded, 6, width, height)
    elif name == "bmp":
        struct.pack_into("<ii", encoded, 18, width, -height)
    elif name == "webp":
        struct.pack_into("<HH", encoded, 26, width, height)
    else:
        struct.pack_into("<I", encoded, 21, (height - 1) << 14 | (width - 1))
    return bytes(encoded)


class TestAugment:
    def test_flips_one_way_or_the_other(self):
        rows: dict[str, set[bytes]] = {}
        for seed in range(40):
            for flip in ("horizontal", "vertical", "both"):
                row = PICTURE.copy()
                augment(row, (seed, 0), flip, None)
                rows.setdefault(flip, set()).add(row.tobytes())
        across, down = PICTURE[:, ::-1], PICTURE[::-1]
        assert rows["horizontal"] == {PICTURE.tobytes(), across.tobytes()}
        assert rows["vertical"] == {PICTURE.tobytes(), down.tobytes()}
        assert rows["both"] == {PICTURE.tobytes(), across.tobytes(), down.tobytes(), across[::-1].tobytes()}

    @pytest.mark.parametrize("channels", [3, 1])
    def test_colours_are_those_of_the_definition(self, channels):
        pixels = PICTURE[..., :channels] // 2 + 60
        for seed in range(20):
            row = pixels.copy()
            augment(row, (seed, 0), None, CHANGES)
            expected = slowly(pixels, Draws((seed, 0), "augment"), CHANGES)
            assert np.abs(row - np.clip(expected, 0, 255)).max() < 1.5

    def test_no_change_is_no_change(self):
        row = PICTURE.copy()
        augment(row, SEED, None, Jitter(brightness=0, contrast=0, saturation=0, hue=0))
        assert np.array_equal(row, PICTURE)

    def test_gray_stays_gray(self):
        row = np.repeat(PICTURE[..., :1], 3, axis=2)
        augment(row, SEED, None, Jitter(hue=0.5))
        assert np.ptp(row, axis=2).max() <= 1


def slowly(pixels: np.ndarray, draws: Draws, jitter: Jitter) -> np.ndarray:
    """Brightness, contrast, saturation and hue, one after the other, without rounding."""
    draws.below(2), draws.below(2)
    factors = [draws.uniform(1 - most, 1 + most) for most in (jitter.brightness, jitter.contrast, jitter.saturation)]
    turn = draws.uniform(-jitter.hue, jitter.hue)
    gray = np.array([0.299, 0.587, 0.114]) if pixels.shape[2] == 3 else np.ones(1)
    values = pixels * factors[0]
    values = (values @ gray).mean() * (1 - factors[1]) + values * factors[1]
    if pixels.shape[2] == 1:
        return values
    values = (values @ gray)[..., None] * (1 - factors[2]) + values * factors[2]
    luma = values @ gray
    first = values @ [0.595716, -0.274453, -0.321263]
    second = values @ [0.211456, -0.522591, 0.311135]
    angle = 2 * math.pi * turn
    turned = first * math.cos(angle) - second * math.sin(angle), first * math.sin(angle) + second * math.cos(angle)
    back = np.array([[1, 0.9563, 0.6210], [1, -0.2721, -0.6474], [1, -1.1070, 1.7046]])
    return np.stack([luma, *turned], axis=-1) @ back.T


class TestDraws:
    def test_are_splitmix64(self):
        # The first numbers of the seed 1234567, of the algorithm's public test vectors.
        states = (1234567 + step * 0x9E3779B97F4A7C15 & 2**64 - 1 for step in range(3))
        assert [draws._mixed(state) for state in states] == [
            6457827717110365317,
            3203168211198807973,
            9817491932198370423,
        ]

    def test_are_uniform_and_apart_for_neighbouring_seeds(self):
        numbers = np.array([[Draws((0, seed), use).uniform() for use in ("crop", "augment")] for seed in range(8000)])
        for column in numbers.T:
            counts = np.histogram(column, 20, (0, 1))[0]
            assert ((counts - 400) ** 2 / 400).sum() < 43.8  # chi-squared of 19 degrees, one in a thousand
        assert abs(np.corrcoef(numbers[1:, 0], numbers[:-1, 0])[0, 1]) < 0.05
        assert abs(np.corrcoef(*numbers.T)[0, 1]) < 0.05


class TestRows:
    IMAGES = Images((48, 64), fit="random_crop", flip="both", jitter=Jitter(), target=None)
    ENCODED = [*JPEGS.values(), *OTHERS.values()] * 3
    SEEDS = np.random.default_rng(4).integers(0, 2**32, (len(ENCODED), 2), dtype=np.uint32)

    def test_are_the_same_by_any_number_of_threads(self):
        one, bad = decode_rows(self.IMAGES, self.ENCODED, self.SEEDS, 1)
        assert one.shape == (len(self.ENCODED), 48, 64, 3)
        assert bad == {}
        for threads in (2, 5):
            assert np.array_equal(decode_rows(self.IMAGES, self.ENCODED, self.SEEDS, threads)[0], one)

    def test_depend_on_their_seed_alone(self):
        rows, _ = decode_rows(self.IMAGES, self.ENCODED, self.SEEDS, 2)
        turned, _ = decode_rows(self.IMAGES, self.ENCODED[::-1], self.SEEDS[::-1], 2)
        assert np.array_equal(turned[::-1], rows)
        others, _ = decode_rows(self.IMAGES, self.ENCODED, self.SEEDS + 1, 2)
        assert not np.array_equal(others, rows)

    def test_that_are_bad_are_told_and_black(self):
        encoded = [JPEGS["jpeg"], b"", JPEGS["jpeg"][:200], OTHERS["png"]]
        rows, bad = decode_rows(Images((40, 60)), encoded, None, 2)
        assert list(bad) == [1, 2]
        assert "no bytes" in bad[1]
        assert "cut off" in bad[2]
        assert not rows[1].any()
        assert not rows[2].any()
        assert rows[3].any()

    def test_of_a_cache_are_augmented_to_the_same(self):
        images = Images((48, 64), flip="both", jitter=Jitter())
        at_once, _ = decode_rows(images, self.ENCODED, self.SEEDS, 2)
        kept, _ = decode_rows(images, self.ENCODED, self.SEEDS, 2, augmented=False)
        augment_rows(images, kept, self.SEEDS, 2)
        assert np.array_equal(kept, at_once)

    def test_an_error_of_the_program_is_no_bad_record(self):
        with pytest.raises(IndexError):
            decode_rows(self.IMAGES, self.ENCODED, self.SEEDS[:3], 2)

    def test_are_decoded_in_a_child_too(self):
        decode_rows(Images((40, 60)), self.ENCODED[:4], None, 2)
        child = os.fork()
        if child == 0:
            rows, _ = decode_rows(Images((40, 60)), self.ENCODED[:4], None, 2)
            os._exit(0 if rows.any() else 1)
        assert os.waitpid(child, 0)[1] == 0


class TestMemory:
    def test_is_used_again_when_the_last_view_is_gone(self):
        rows = memory.rows((4, 30, 20, 3))
        place, view = rows.ctypes.data, rows[1:, ::2]
        assert rows.shape == (4, 30, 20, 3)
        assert place % 64 == 0
        del rows
        other = memory.rows((4, 30, 20, 3))
        assert not np.shares_memory(other, view)
        del view
        assert memory.rows((3, 30, 20, 3)).ctypes.data == place

    def test_of_a_tensor_is_not_written_to(self):
        def made(value):
            rows = memory.rows((8, 64, 64, 3))
            rows[:] = value
            return rows

        function = tf.function(lambda value: tf.numpy_function(made, [value], tf.uint8))
        tensors = [function(tf.constant(value, tf.uint8)) for value in range(20)]
        assert [sorted(set(tensor.numpy().ravel().tolist())) for tensor in tensors] == [[value] for value in range(20)]

    def test_is_not_kept_where_it_is_much(self):
        rows = memory.rows((memory._MOST_KEPT_BYTES + 1,))
        kept = len(memory._kept)
        del rows
        assert len(memory._kept) == kept


class TestRecipe:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"size": (0, 3)}, "size"),
            ({"size": 2.5}, "size"),
            ({"fit": "centre_crop"}, "center_crop"),
            ({"flip": "horizontl"}, "horizontal"),
            ({"jitter": 0.4}, "Jitter"),
            ({"standardize": "imagenet"}, "scale"),
            ({"standardize": ((0.5, 0.5), (0.1, 0.1))}, "3 channels"),
            ({"standardize": (0.5, 0)}, "standardize"),
            ({"channels": 4}, "channels"),
            ({"max_pixels": 0}, "max_pixels"),
            ({"image": None}, "names of features"),
        ],
    )
    def test_checks_itself(self, arguments, words):
        with pytest.raises(InputError, match=words):
            Images(**arguments)

    @pytest.mark.parametrize("arguments", [{"hue": 0.6}, {"brightness": -1}, {"contrast": "0.4"}])
    def test_jitter_checks_itself(self, arguments):
        with pytest.raises(InputError, match=f"jitter's {next(iter(arguments))}"):
            Jitter(**arguments)

    def test_can_be_compared_and_hashed(self):
        one = Images(96, standardize=([0.5, 0.4, 0.3], [0.2, 0.2, 0.2]), jitter=Jitter())
        same = Images((96, 96), standardize=((0.5, 0.4, 0.3), 0.2), jitter=Jitter())
        assert one == same
        assert hash(one) == hash(same)

    def test_says_what_a_cache_can_keep(self):
        assert Images((32, 48), flip="both").cacheable_shape == (32, 48, 3)
        assert Images((32, 48), fit="random_crop").cacheable_shape is None
        assert not Images().is_random
        assert Images(jitter=Jitter()).is_random
        assert Images(fit="random_crop").is_random

    def test_leaves_chance_out_for_validation(self):
        recipe = Images((32, 48), fit="random_crop", flip="both", jitter=Jitter(), standardize="scale")
        assert recipe.without_chance() == Images((32, 48), fit="center_crop", standardize="scale")
        assert Images((32, 48), fit="pad").without_chance() == Images((32, 48), fit="pad")

    @pytest.mark.parametrize(
        ("standardize", "expected"),
        [
            (None, lambda pixels: pixels),
            ("scale", lambda pixels: pixels / 255.0),
            ("image", lambda pixels: tf.image.per_image_standardization(pixels).numpy()),
            (((0.5, 0.4, 0.3), 0.25), lambda pixels: (pixels / 255.0 - [0.5, 0.4, 0.3]) / 0.25),
        ],
    )
    def test_standardizes_on_the_device(self, standardize, expected):
        batch = np.stack([PICTURE, 255 - PICTURE])
        found = Images(standardize=standardize).on_device()(tf.constant(batch))
        assert np.allclose(found, expected(batch), atol=1e-5)
        assert found.dtype == (tf.uint8 if standardize is None else tf.float32)

    def test_is_made_without_loading_a_decoder_or_tensorflow(self):
        program = (
            "import sys, distfit.data.images; print(*({'tensorflow', 'keras', 'cv2', 'simplejpeg'} & {*sys.modules}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment(), cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == []
