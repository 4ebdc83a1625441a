"""Folders of images: what is found, what is refused and why, and that TensorFlow agrees."""

import errno
import io
import os
import resource
import shutil
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from distfit import cli
from distfit.data import build, description
from distfit.data.build import image_folder
from distfit.data.build.check import check_files
from distfit.data.build.image_check import NotAnImage, checked_image
from distfit.data.build.listing import Wrong
from distfit.errors import InputError, RunError
from tests.pictures import class_folders, make_caltech
from tests.test_data_build import bytes_of, examples_of

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8))


def encoded(kind, image=PICTURE, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gray16():
    return Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27)


def png_with_bad_checksum():
    data = bytearray(encoded("png"))
    data[len(data) // 2] ^= 255
    return bytes(data)


def png_with(kind, content):
    chunk = struct.pack(">I", len(content)) + kind + content
    return encoded("png")[:33] + chunk + struct.pack(">I", zlib.crc32(kind + content)) + encoded("png")[33:]


def run_length_bmp():
    data = bytearray(encoded("bmp", PICTURE.convert("L")))
    data[30] = 1
    return bytes(data)


def animated(kind):
    return encoded(kind, save_all=True, append_images=[PICTURE.rotate(90), PICTURE.rotate(180)])


GOOD = {
    "jpeg": ("jpeg", encoded("jpeg")),
    "gray jpeg": ("jpeg", encoded("jpeg", PICTURE.convert("L"))),
    "CMYK jpeg": ("jpeg", encoded("jpeg", PICTURE.convert("CMYK"))),
    "progressive jpeg": ("jpeg", encoded("jpeg", progressive=True)),
    "two pictures in one jpeg": ("jpeg", encoded("mpo", save_all=True, append_images=[PICTURE])),
    "jpeg with something behind it": ("jpeg", encoded("jpeg") + b"junk"),
    "png": ("png", encoded("png")),
    "png with transparency": ("png", encoded("png", PICTURE.convert("RGBA"))),
    "png with a palette": ("png", encoded("png", PICTURE.convert("P"))),
    "16-bit png": ("png", encoded("png", gray16())),
    "1-bit png": ("png", encoded("png", PICTURE.convert("1"))),
    "png with a comment": ("png", png_with(b"tEXt", b"a\0b")),
    "gif": ("gif", encoded("gif")),
    "animated gif": ("gif", animated("gif")),
    "bmp": ("bmp", encoded("bmp")),
    "gray bmp": ("bmp", encoded("bmp", PICTURE.convert("L"))),
    "webp": ("webp", encoded("webp")),
}
# Pillow writes no alpha channel where all of it is opaque.
CLEAR = PICTURE.convert("RGBA")
CLEAR.putalpha(PICTURE.convert("L"))
BAD = {
    "nothing": ("an empty file", b""),
    "text": ("no image", b"hello, no image at all"),
    "a page": ("no image", b"<html>404</html>"),
    "half a jpeg": ("a JPEG image that is cut off", encoded("jpeg")[:2000]),
    "a jpeg without its last bytes": ("a JPEG image that is cut off", encoded("jpeg")[:-2]),
    "half a progressive jpeg": ("a JPEG image that is cut off", encoded("jpeg", progressive=True)[:1500]),
    "the start of a jpeg": ("a JPEG image that is cut off", encoded("jpeg")[:4]),
    "half a png": ("a PNG image that is cut off", encoded("png")[:3000]),
    "a png without its end": ("a PNG image that is cut off", encoded("png")[:-12]),
    "a damaged png": ("a PNG image that is cut off or damaged", png_with_bad_checksum()),
    "half a gif": ("a GIF image that is cut off", encoded("gif")[:1500]),
    "a bmp without its last byte": ("a BMP image that is cut off", encoded("bmp")[:-1]),
    "a 1-bit bmp": ("a BMP image of 1 bits", encoded("bmp", PICTURE.convert("1"))),
    "half a webp": ("a WEBP image that is cut off", encoded("webp")[:900]),
    "an animated webp": ("an animated WEBP", animated("webp")),
    "a webp with transparency": ("a WEBP image with an alpha channel", encoded("webp", CLEAR)),
    "a tiff": ("an image in the format TIFF", encoded("tiff")),
}
# TensorFlow takes these, and reads something else than the picture, or a part of it.
WRONG_THOUGH_DECODED = {
    "a bmp with a palette": ("a BMP image with a palette", encoded("bmp", PICTURE.convert("P"))),
    "a compressed bmp": ("a BMP image of 8 bits a pixel and compression 1", run_length_bmp()),
    "half an animated gif": ("a GIF image that is cut off", animated("gif")[:6000]),
}


def tensorflow_decodes(data):
    import tensorflow as tf

    try:
        return tf.io.decode_image(data, channels=3, expand_animations=False).shape == (40, 60, 3)
    except tf.errors.InvalidArgumentError:
        return False


@pytest.mark.parametrize("name", GOOD)
def test_an_image_is_taken_as_tensorflow_takes_it(name):
    kind, data = GOOD[name]
    assert checked_image(data) == (kind, 60)
    assert tensorflow_decodes(data)


@pytest.mark.parametrize("name", BAD | WRONG_THOUGH_DECODED)
def test_no_image_is_refused_as_tensorflow_refuses_it(name):
    reason, data = (BAD | WRONG_THOUGH_DECODED)[name]
    with pytest.raises(NotAnImage) as refused:
        checked_image(data)
    assert str(refused.value).startswith(reason)
    assert tensorflow_decodes(data) == (name in WRONG_THOUGH_DECODED)


# A folder.


@pytest.fixture
def pictures(tmp_path):
    return make_caltech(tmp_path / "pictures", classes=3, per_class=5)


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_a_caltech_folder_becomes_records_with_its_bytes(pictures, tmp_path):
    built = build.build_images(pictures, tmp_path / "out")
    assert built.classes == tuple(class_folders(3))
    assert (built.image_format, built.pixels, built.validation_fraction) == ("jpeg", None, 0.2)
    assert built.features == {"image": "bytes", "filename": "bytes", "label": "int64"}
    assert [split.records for split in built.splits.values()] == [12, 3]
    assert built.split("validation").per_class == (1, 1, 1)
    both = [*examples_of(tmp_path / "out", "train"), *examples_of(tmp_path / "out", "validation")]
    files = sorted(str(path.relative_to(pictures)) for path in pictures.glob("*/*"))
    assert sorted(name for name, _, _ in both) == files
    for name, label, data in both:
        assert data == (pictures / name).read_bytes()
        assert built.classes[label] == name.split("/")[0]


def test_the_order_of_the_file_system_does_not_matter(pictures, tmp_path):
    other = tmp_path / "other" / "pictures"
    for path in sorted(pictures.glob("*/*"), key=lambda path: path.name, reverse=True):
        put(other / path.relative_to(pictures), path.read_bytes())
    build.build_images(pictures, tmp_path / "a", seed=3)
    build.build_images(other, tmp_path / "b", seed=3)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_nested_folders_links_and_odd_names_belong_to_their_class(pictures, tmp_path):
    put(pictures / "001.ak47" / "greg" / "vision" / "a b.JPEG", encoded("jpeg"))
    put(tmp_path / "elsewhere" / "x", encoded("png"))
    (pictures / "257.clutter" / "link").symlink_to(tmp_path / "elsewhere")
    put(pictures / os.fsdecode(b"zo\xff") / os.fsdecode(b"\xe9.jpg"), encoded("jpeg"))
    found = image_folder.find_images(pictures)
    assert found.wrong == []
    assert found.names[5] == "001.ak47/greg/vision/a b.JPEG"
    assert found.names[-2:] == ["257.clutter/link/x", os.fsdecode(b"zo\xff/\xe9.jpg")]
    assert found.labels.tolist() == [0] * 6 + [1] * 5 + [2] * 6 + [3]
    built = build.build_images(pictures, tmp_path / "out")
    assert description.load(tmp_path / "out").classes[3] == os.fsdecode(b"zo\xff")
    assert built.image_format == "mixed"


def test_what_systems_leave_in_folders_is_passed_over(pictures):
    for name in (".DS_Store", "001.ak47/Thumbs.db", "001.ak47/._001_0001.jpg", ".hidden/a.jpg", "__MACOSX/a.jpg"):
        put(pictures / name, b"something")
    found = image_folder.find_images(pictures)
    assert (len(found.names), found.classes, found.wrong) == (15, tuple(class_folders(3)), [])


@pytest.fixture
def spoilt(pictures):
    """Pictures with six things beside them that are none."""
    put(pictures / "README.txt", b"about")
    put(pictures / "001.ak47" / "RENAME2", b"#!/bin/sh")
    put(pictures / "001.ak47" / "half.jpg", encoded("jpeg")[:2000])
    (pictures / "257.clutter" / "circle").symlink_to(pictures)
    (pictures / "257.clutter" / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(pictures / "257.clutter" / "pipe.jpg")
    return pictures


REASONS = (
    "README.txt' is in no class folder",
    "257.clutter/circle' is a link to a folder that it lies in",
    "001.ak47/RENAME2' is no image",
    "001.ak47/half.jpg' is a JPEG image that is cut off or damaged (image file is truncated",
    "257.clutter/gone.jpg' is a file that cannot be read (No such file or directory)",
    "257.clutter/pipe.jpg' is no regular file",
)


def test_all_that_is_no_image_is_listed_and_refused(spoilt, tmp_path):
    result = CliRunner().invoke(cli.app, ["data", "build", "--images", str(spoilt), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "received 6 of another kind beside 15 images:\n" in result.stderr
    assert [reason for reason in REASONS if reason not in result.stderr] == []
    assert "--skip-bad" in result.stderr
    assert os.listdir(tmp_path) == ["pictures"]


def test_what_begins_as_no_image_is_not_read_whole(pictures):
    """An archive or a film among the images may be larger than the memory."""
    huge = pictures / "001.ak47" / "all.tar"
    with huge.open("wb") as file:
        file.truncate(2**40)  # takes no room
    listing = image_folder.folder_listing(pictures)
    tracemalloc.start()
    try:
        checked = check_files(listing)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert checked.listing.wrong == [Wrong(repr(str(huge)), "no image")]
    assert most < 2**26


def test_a_long_list_is_cut(pictures, tmp_path):
    for number in range(25):
        put(pictures / "001.ak47" / f"z{number}.txt", b"text")
    with pytest.raises(InputError) as refused:
        build.build_images(pictures, tmp_path / "out")
    assert str(refused.value).count("is no image") == 20
    assert "\n  and 5 more\n" in str(refused.value)


def test_skip_bad_lists_what_it_leaves_out(spoilt, tmp_path):
    arguments = ["data", "build", "--skip-bad", "--images", str(spoilt), str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0
    assert "left out 6, kept 15 images:\n" in result.stderr
    assert [reason for reason in REASONS if reason not in result.stderr] == []
    assert result.stdout == f"{tmp_path / 'out'}: 12 train, 3 validation records of 3 classes.\n"


def test_a_folder_that_cannot_be_listed_is_said(pictures, monkeypatch):
    scandir = os.scandir

    def forbidding(path):
        if str(path).endswith("002.american-flag"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    with pytest.raises(InputError, match=r"none in '002.*folder that cannot be read \(Permission denied\)"):
        build.build_images(pictures, pictures.parent / "out")


# Layouts.


def test_splits_that_are_made_already_are_recognised(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "net" / "train")
    shutil.copytree(pictures, tmp_path / "net" / "Val")
    options = f"--images {tmp_path}/net/train --validation-images {tmp_path}/net/Val"
    with pytest.raises(InputError, match=options):
        image_folder.find_images(tmp_path / "net")


def test_images_for_validation_may_be_apart(pictures, tmp_path):
    put(tmp_path / "val" / "257.clutter" / "257_0001.jpg", encoded("jpeg"))
    put(tmp_path / "val" / "257.clutter" / "a.png", encoded("png"))
    built = build.build_images(pictures, tmp_path / "out", validation_images=tmp_path / "val")
    assert built.split("train").per_class == (5, 5, 5)
    assert built.split("validation").per_class == (0, 0, 2)
    assert (built.validation_fraction, built.image_format) == (None, "mixed")
    assert description.load(tmp_path / "out").validation_fraction is None
    assert {(name, label) for name, label, _ in examples_of(tmp_path / "out", "validation")} == {
        ("val/257.clutter/257_0001.jpg", 2),
        ("val/257.clutter/a.png", 2),
    }
    assert next(examples_of(tmp_path / "out", "train"))[0].startswith("pictures/")


def test_a_class_that_only_validation_has_is_refused(pictures, tmp_path):
    put(tmp_path / "val" / "001.ak48" / "a.jpg", encoded("jpeg"))
    with pytest.raises(InputError, match=r"received '001\.ak48' \(1 of 1 .* did you mean '001\.ak47'"):
        build.build_images(pictures, tmp_path / "out", validation_images=tmp_path / "val")


def test_a_folder_above_the_classes_names_the_one_below(pictures, tmp_path):
    shutil.move(pictures, tmp_path / "above" / "pictures")
    with pytest.raises(InputError, match=f"holds 3 folders itself: pass --images {tmp_path}/above/pictures"):
        image_folder.find_images(tmp_path / "above")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "received '.*': No such file or directory"),
        (lambda folder: (shutil.rmtree(folder), put(folder, b"a file")), "received '.*': Not a directory"),
        (lambda folder: (shutil.rmtree(folder), put(folder / "a.jpg", b"")), "received 0 and 1 other files"),
        (lambda folder: (folder / "003.empty").mkdir(), r"received none in '003\.empty' \(1 of 4 folders\)"),
    ],
)
def test_a_folder_of_another_layout_is_refused(pictures, tmp_path, change, message):
    change(pictures)
    with pytest.raises(InputError, match=message):
        build.build_images(pictures, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_class_whose_images_were_all_left_out_is_refused(pictures, tmp_path):
    put(pictures / "003.text" / "a.jpg", b"text")
    with pytest.raises(InputError, match=r"received none in '003\.text'"):
        build.build_images(pictures, tmp_path / "out", skip_bad=True)


def test_a_place_within_the_images_is_refused(pictures):
    with pytest.raises(InputError, match="outside of the images"):
        build.build_images(pictures, pictures / "new" / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shards": 13}, "1 to 12 shards"),
        ({"validation_fraction": 1.5}, "between 0 and 1, received 1.5"),
        ({"validation_images": "val", "validation_fraction": 0.5}, "Expected no validation fraction"),
        ({"validation_images": "pictures"}, "Expected other images for validation than for training"),
    ],
)
def test_arguments_are_refused_before_an_image_is_read(pictures, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, tmp_path / "val")
    monkeypatch.setattr("distfit.data.build.listed.check_files", None)
    with pytest.raises(InputError, match=message):
        build.build_images("pictures", "out", **arguments)


def test_images_for_validation_that_were_all_left_out_are_refused(pictures, tmp_path):
    put(tmp_path / "val" / "257.clutter" / "a.jpg", b"text")
    with pytest.raises(InputError, match=r"Expected images for validation in '.*val', received none"):
        build.build_images(pictures, tmp_path / "out", validation_images=tmp_path / "val", skip_bad=True)


# While it is written.


def test_an_image_that_changes_meanwhile_ends_the_build(pictures, tmp_path):
    changed = pictures / "001.ak47" / "001_0001.jpg"

    def between(*arguments):
        checked = check_files(*arguments)
        changed.write_bytes(encoded("jpeg"))
        return checked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distfit.data.build.listed.check_files", between)
        with pytest.raises(RunError, match=r"001_0001\.jpg' as it was when it was checked, received other bytes"):
            build.build_images(pictures, tmp_path / "out")
    assert os.listdir(tmp_path) == ["pictures"]


def test_too_little_space_is_said_before_and_a_full_disk_leaves_nothing(pictures, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
        with pytest.raises(InputError, match=r"Expected .* kB of free space .* received 1\.0 kB"):
            build.build_images(pictures, tmp_path / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(RunError, match=r"received: File too large\. Nothing of it is left"):
            build.build_images(pictures, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["pictures"]


def test_shards_are_chosen_by_size(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("distfit.data.build.split.SHARD_BYTES", 2000)
    built = build.build_images(pictures, tmp_path / "out")
    images = sum(len(data) for _, _, data in examples_of(tmp_path / "out", "train"))
    assert len(built.split("train").shards) == max(8, -(-images // 2000))
    assert len(built.split("validation").shards) == max(2, -(-built_bytes(tmp_path / "out") // 2000))


def built_bytes(folder):
    return sum(len(data) for _, _, data in examples_of(folder, "validation"))
