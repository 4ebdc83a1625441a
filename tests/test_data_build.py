"""Built data sets: the digits and tables, once each, stratified, the same bytes for a seed, whole or absent."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from distfit import cli
from distfit.data import build, description
from distfit.data.build.split import stratified_split
from distfit.data.build.whole_folder import check_free
from distfit.data.example import parse_example
from distfit.data.records import read_at, scan, write_records
from distfit.errors import InputError, RunError


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "digits"
    build.build_digits(folder)
    return folder


@pytest.fixture
def small(tmp_path):
    """A data set of two classes and 20 images, quick to build and free to damage."""
    folder = tmp_path / "small"
    build.write_dataset(small_source(), folder, shards=2, validation_shards=1)
    return folder


def small_source(labels=(0, 1) * 10):
    return build.Source(
        name="small",
        classes=("cat", "dog"),
        filenames=[f"{number}.png" for number in range(len(labels))],
        labels=np.array(labels),
        encoded=lambda number: b"image %d" % number,
        image_format="png",
        pixels="none",
    )


def records_of(folder, split):
    """The features of each record of a split, {name: values}."""
    for path in description.load(folder).files(split):
        offsets, lengths = scan(path)
        with open(path, "rb") as file:
            for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
                record = parse_example(read_at(file.fileno(), offset, length, path))
                yield {name: list(found.values) for name, found in record.items()}


def examples_of(folder, split):
    for record in records_of(folder, split):
        yield record["filename"][0].decode(), record["label"][0], record["image"][0]


def bytes_of(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def test_every_digit_is_there_once_with_its_pixels_and_label(digits):
    from PIL import Image
    from sklearn.datasets import load_digits

    scans = load_digits()
    both = [*examples_of(digits, "train"), *examples_of(digits, "validation")]
    assert sorted(name for name, _, _ in both) == [f"digits/{number:04d}.png" for number in range(1797)]
    for name, label, encoded in both:
        number = int(name[7:11])
        pixels = np.asarray(Image.open(io.BytesIO(encoded)))
        assert pixels.dtype == np.uint8
        assert label == scans.target[number]
        np.testing.assert_array_equal(pixels, np.floor(scans.images[number] * 255 / 16 + 0.5))


def test_the_files_are_what_the_description_says(digits):
    described = description.load(digits)
    names = [f"train-{shard:05d}-of-00008.tfrecord" for shard in range(8)]
    names += [f"validation-{shard:05d}-of-00002.tfrecord" for shard in range(2)]
    assert sorted(os.listdir(digits)) == sorted(["dataset.json", *names])
    assert described.classes == tuple("0123456789")
    assert (described.seed, described.version, described.image_format) == (0, 1, "png")
    assert described.features == {"image": "bytes", "filename": "bytes", "label": "int64"}
    for split in ("train", "validation"):
        labels = [label for _, label, _ in examples_of(digits, split)]
        assert described.split(split).records == len(labels)
        assert described.split(split).per_class == tuple(np.bincount(labels))
        for path, shard in zip(described.files(split), described.split(split).shards, strict=True):
            lengths = scan(path)[1]
            assert (len(lengths), os.path.getsize(path), max(lengths)) == (shard.records, shard.bytes, shard.longest)
        lengths = np.concatenate([scan(path)[1] for path in described.files(split)])
        assert described.split(split).longest_record == max(lengths)
        assert described.split(split).mean_record == pytest.approx(np.mean(lengths))


def test_tensorflow_reads_the_images(digits):
    import tensorflow as tf

    features = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}
    dataset = tf.data.TFRecordDataset(description.load(digits).files("validation"))
    for record in dataset.take(3):
        image = tf.io.decode_png(tf.io.parse_single_example(record, features)["image"])
        assert image.shape == (8, 8, 1)


def test_shards_differ_by_one_record_at_most(digits):
    for split in description.load(digits).splits.values():
        counts = [shard.records for shard in split.shards]
        assert max(counts) - min(counts) <= 1


def test_one_seed_builds_the_same_bytes(digits, tmp_path):
    # In a process of its own: within one, even an order that is drawn at its start would look fixed.
    code = "import sys; from distfit.data import build; build.build_digits(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path / "again"], check=True, timeout=120)
    assert bytes_of(tmp_path / "again") == bytes_of(digits)


def test_another_seed_builds_another_split(small, tmp_path):
    build.write_dataset(small_source(), tmp_path / "other", seed=1, shards=2, validation_shards=1)
    first, second = (
        {name for name, _, _ in examples_of(folder, "validation")} for folder in (small, tmp_path / "other")
    )
    assert first != second


def test_the_split_depends_on_the_seed_and_not_on_the_shards(small, tmp_path):
    build.write_dataset(small_source(), tmp_path / "other", shards=5, validation_shards=2)
    for split in ("train", "validation"):
        one, other = ({name for name, _, _ in examples_of(f, split)} for f in (small, tmp_path / "other"))
        assert one == other


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.25, 0.37, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_class_is_split_to_within_one_record(fraction, seed):
    labels = np.random.default_rng(seed).choice(7, size=503, p=[0.4, 0.2, 0.2, 0.1, 0.05, 0.03, 0.02])
    members = stratified_split(labels, seed, fraction)
    assert sorted([*members["train"], *members["validation"]]) == list(range(503))
    assert len(members["validation"]) == round(503 * fraction)
    exact = np.bincount(labels, minlength=7) * fraction
    assert (abs(np.bincount(labels[members["validation"]], minlength=7) - exact) < 1).all()


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_no_class_gives_its_last_record(fraction):
    labels = np.repeat(np.arange(40), [1] * 20 + [2] * 10 + [3] * 10)
    members = stratified_split(labels, 0, fraction)
    assert (np.bincount(labels[members["train"]], minlength=40) > 0).all()
    assert len(members["validation"]) > 0


def test_classes_of_one_record_each_cannot_be_split(tmp_path):
    with pytest.raises(InputError, match="records for the split 'validation' of small, received none"):
        build.write_dataset(small_source(labels=(0, 1)), tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_not_overwritten(small):
    before = bytes_of(small)
    with pytest.raises(InputError, match=r"with 4 entries.*--force"):
        build.write_dataset(small_source(), small)
    assert bytes_of(small) == before


def test_force_replaces_a_data_set(small):
    build.write_dataset(small_source(), small, seed=3, shards=1, validation_shards=1, force=True)
    assert description.load(small).seed == 3
    assert len(os.listdir(small)) == 3
    assert os.listdir(small.parent) == ["small"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit(143), OSError(5, "Input/output error")])
def test_what_was_to_be_replaced_is_back_when_the_last_step_is_cut_off(small, monkeypatch, stop):
    before, rename = bytes_of(small), os.rename

    def cut_off(source, target):
        if os.path.basename(source) == "new":
            raise stop
        rename(source, target)

    monkeypatch.setattr(os, "rename", cut_off)
    with pytest.raises((KeyboardInterrupt, SystemExit, RunError)):
        build.write_dataset(small_source(), small, seed=3, shards=1, validation_shards=1, force=True)
    assert bytes_of(small) == before
    assert os.listdir(small.parent) == ["small"]


def test_force_does_not_remove_what_is_no_data_set(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="empty this one"):
        build.write_dataset(small_source(), tmp_path, shards=1, validation_shards=1, force=True)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_force_keeps_what_lies_beside_the_data_set(small):
    (small / "images").mkdir()
    (small / "images" / "1.jpg").write_bytes(b"the only copy")
    with pytest.raises(InputError, match=r"received 'images' in it, which is no part of one \(1 of 5 entries\)"):
        build.write_dataset(small_source(), small, shards=1, validation_shards=1, force=True)
    assert (small / "images" / "1.jpg").read_bytes() == b"the only copy"


def test_a_place_that_cannot_take_a_new_name_is_refused_first(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: path == str(tmp_path))
        with pytest.raises(InputError, match=f"Name a folder in it: {tmp_path}/NAME"):
            check_free(str(tmp_path), description.NAME, force=False)
    # Root may write everywhere, so the answer of the kernel is made up.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match=f"received '{tmp_path}' above it, where this user may not write"):
        check_free(str(tmp_path / "new" / "out"), description.NAME, force=False)


def test_an_empty_folder_is_filled(tmp_path):
    build.write_dataset(small_source(), tmp_path / "a", shards=1, validation_shards=1)
    (tmp_path / "b").mkdir()
    build.write_dataset(small_source(), tmp_path / "b", shards=1, validation_shards=1)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_a_build_that_fails_leaves_nothing_and_keeps_what_was_there(small):
    def failing(number):
        raise KeyError("stop")

    source = build.Source("bad", ("a",), ["x"] * 9, np.zeros(9, np.int64), failing, "png", "none")
    before = bytes_of(small)
    for out in (small, small.parent / "new" / "deep"):
        with pytest.raises(KeyError):
            build.write_dataset(source, out, shards=1, validation_shards=1, force=True)
    assert bytes_of(small) == before
    assert os.listdir(small.parent) == ["small"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError, match="received the file"):
        build.write_dataset(small_source(), tmp_path / "a", shards=1, validation_shards=1)


def test_a_place_that_cannot_be_written_is_refused():
    with pytest.raises(InputError, match="can be written at '/proc/1/nothing'"):
        build.write_dataset(small_source(), "/proc/1/nothing", shards=1, validation_shards=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shards": 0}, "1 to 16 shards for the 16 records of 'train', received 0"),
        ({"validation_shards": 5}, "1 to 4 shards for the 4 records of 'validation', received 5"),
        ({"validation_fraction": 1.0}, "between 0 and 1, received 1.0"),
        ({"validation_fraction": 0}, "between 0 and 1, received 0"),
        ({"seed": -1}, "received -1"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(tmp_path, arguments, message):
    arguments = {"shards": 1, "validation_shards": 1} | arguments
    with pytest.raises(InputError, match=message):
        build.write_dataset(small_source(), tmp_path / "a", **arguments)
    assert os.listdir(tmp_path) == []


def test_a_number_of_shards_and_their_size_are_not_both_taken(tmp_path):
    with pytest.raises(InputError, match="number of shards or their size, received both, 2 shards and 100 bytes"):
        build.write_dataset(small_source(), tmp_path / "a", shards=2, shard_bytes=100)


def test_shards_have_the_size_that_was_asked_for(tmp_path):
    """Names are 10 bytes, images 9 or so, and framing and the names of features are counted as 100."""
    source = dataclasses.replace(small_source(labels=(0, 1) * 500), sizes=np.full(1000, 20))
    built = build.write_dataset(source, tmp_path / "a", shard_bytes=9600, validation_shards=4)
    assert [len(split.shards) for split in built.splits.values()] == [10, 4]
    assert max(shard.bytes for shard in built.split("train").shards) <= 9600


def test_a_test_split_may_be_given(tmp_path):
    given = np.array([0, 1, 2, 0, 0, 2, 2, 0, 0, 0], np.int8)
    source = dataclasses.replace(small_source(labels=(0, 1) * 5), given_split=given)
    built = build.write_dataset(source, tmp_path / "a")
    assert {name: split.records for name, split in built.splits.items()} == {"train": 6, "validation": 1, "test": 3}
    assert {name for name, _, _ in examples_of(tmp_path / "a", "test")} == {"2.png", "5.png", "6.png"}


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_number_of_threads_does_not_matter(tmp_path, small, threads):
    build.write_dataset(small_source(), tmp_path / "a", shards=2, validation_shards=1, threads=threads)
    assert bytes_of(tmp_path / "a") == bytes_of(small)


def test_the_first_shard_that_fails_stops_the_others(tmp_path):
    read = []

    def failing(number):
        read.append(number)
        if len(read) == 20:
            raise KeyError("stop")
        time.sleep(0.001)
        return b"image"

    source = dataclasses.replace(small_source(labels=(0, 1) * 500), encoded=failing)
    with pytest.raises(KeyError, match="stop"):
        build.write_dataset(source, tmp_path / "a", shards=4, threads=3)
    assert len(read) < 100
    assert os.listdir(tmp_path) == []


def test_what_distfit_keeps_beside_records_does_not_hinder_replacing_them(small):
    (small / ".distfit-index").write_bytes(b"")
    build.write_dataset(small_source(), small, shards=1, validation_shards=1, force=True)
    assert len(os.listdir(small)) == 3


def test_records_are_written_as_tensorflow_writes_them(tmp_path):
    """Types, lists, none and many values; in the order of a map that is the same in every process."""
    import tensorflow as tf

    types = {"zeta": "float32[2]", "Alpha": "bytes[?]", "\u00e9": "int64[?]", "": "bytes", "a": "float32"}

    class Varied:
        name, classes, labels = "varied", ("a",), np.zeros(6, np.int64)
        image_format = pixels = sizes = given_split = None
        features = types | {"label": "int64"}

        def record(self, number):
            words, numbers = [b"w" * one for one in range(number)], np.array([-1, 0, 2**62, 300])[:number]
            rest = {"zeta": np.array([[0.5], [-0.0]]), "": b"\xff", "a": np.float32(number)}
            return {"Alpha": words, "\u00e9": numbers, **rest}

    built = build.write_dataset(Varied(), tmp_path / "a", shards=1, validation_shards=1)
    lists = {"bytes": ("bytes_list", tf.train.BytesList), "int64": ("int64_list", tf.train.Int64List)}
    lists["float32"] = ("float_list", tf.train.FloatList)
    expected = []
    for number in range(6):
        values = {**Varied().record(number), "label": 0}
        features = {}
        for name, text in Varied.features.items():
            field, of = lists[text.split("[")[0]]
            value = [values[name]] if isinstance(values[name], bytes) else values[name]
            features[name] = tf.train.Feature(
                **{field: of(value=value if isinstance(value, list) else np.ravel(value))}
            )
        example = tf.train.Example(features=tf.train.Features(feature=features))
        expected.append(example.SerializeToString(deterministic=True))
    files = [path for split in built.splits for path in description.load(tmp_path / "a").files(split)]
    assert sorted(record.numpy() for record in tf.data.TFRecordDataset(files)) == sorted(expected)


def test_a_source_whose_label_is_no_class_is_refused():
    with pytest.raises(InputError, match=r"from 0 to 1 in small, received 2 for '1\.png'"):
        small_source(labels=(0, 2))


# Tables.


@pytest.mark.parametrize("name", build.TABLES)
def test_every_row_of_a_table_is_there_once_as_it_was_measured(name, tmp_path):
    import tensorflow as tf

    table = build.table_source(name)
    built = build.build_table(name, tmp_path / "table")
    width = table.inputs.shape[1]
    assert built.features == {"inputs": f"float32[{width}]", "label": "int64"}
    assert (built.image_format, built.pixels) == (None, None)
    features = {"inputs": tf.io.FixedLenFeature([width], tf.float32), "label": tf.io.FixedLenFeature([], tf.int64)}
    rows = []
    for split in ("train", "validation"):
        for record in tf.data.TFRecordDataset(built.files(split)):
            example = tf.io.parse_single_example(record, features)
            rows.append((*example["inputs"].numpy().tolist(), int(example["label"])))
    expected = zip(table.inputs.tolist(), table.labels.tolist(), strict=True)
    assert sorted(rows) == sorted((*row, label) for row, label in expected)


# The command.


def command(*arguments):
    return CliRunner().invoke(cli.app, ["data", "build", *map(str, arguments)], prog_name="distfit")


def test_the_command_builds_a_table_and_says_what(tmp_path):
    result = command("--from", "wine", "--shards", 3, "--validation-fraction", 0.5, tmp_path / "wine")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{tmp_path / 'wine'}: 89 train, 89 validation records of 3 classes.\n"
    assert len(description.load(tmp_path / "wine").split("train").shards) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--manifest FILE or --from NAME, received none"),
        (["--images", "a", "--from", "wine"], "--from NAME, received --images and --from"),
        (["--from", "wine", "--skip-bad"], "Expected --skip-bad with --images"),
        (["--from", "wine", "--validation-images", "a"], "Expected --validation-images with --images"),
        (
            ["--images", "a", "--image-root", "b"],
            "Expected --image-root with --csv or --manifest, received it with --im",
        ),
        (["--manifest", "a", "--columns", "b,c"], "Expected --columns with --csv"),
    ],
)
def test_the_command_takes_one_origin_of_records(tmp_path, arguments, message):
    result = command(*arguments, tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert os.listdir(tmp_path) == []


# The description and the labels.


@pytest.mark.parametrize(
    ("text", "kind", "shape"),
    [
        ("int64", "int64", ()),
        ("float32[13]", "float32", (13,)),
        ("float32[2, 3]", "float32", (2, 3)),
        ("bytes[?]", "bytes", (None,)),
    ],
)
def test_the_type_of_a_feature_is_read(text, kind, shape):
    assert description.parse_feature(text) == description.Feature(kind, shape)


@pytest.mark.parametrize("text", ["float", "float32[]", "float32[a]", "float32[3", "int64[?,3]", ""])
def test_an_unknown_type_of_a_feature_is_refused(small, text):
    edited(small, features={"image": text})
    with pytest.raises(InputError, match=r"such as float32\[13\], or int64\[\?\] where .* received "):
        description.load(small)


def test_a_description_survives_its_file_and_a_move(small):
    before = description.load(small)
    os.rename(small, small.parent / "moved")
    after = description.load(small.parent / "moved")
    assert after.to_json() == before.to_json()
    assert after.files("train")[0] == str(small.parent / "moved" / "train-00000-of-00002.tfrecord")


def test_a_description_of_an_older_version_of_distfit_is_read(small):
    fields = json.loads((small / "dataset.json").read_text())
    for name in ("max_side", "quality"):
        del fields[name]
    for split in fields["splits"].values():
        for shard in split["shards"]:
            del shard["longest"]
    (small / "dataset.json").write_text(json.dumps(fields))
    described = description.load(small)
    assert (described.max_side, described.split("train").longest_record) == (None, None)
    assert described.split("train").mean_record > 0


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"is not there. Build one with `distfit data build"):
        description.load(tmp_path / "nowhere")


def test_a_folder_without_a_description_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"Expected dataset\.json in the folder"):
        description.load(tmp_path)


def test_a_description_that_is_no_json_is_refused(small):
    (small / "dataset.json").write_text('{"version": 1,')
    with pytest.raises(InputError, match="text that is no JSON"):
        description.load(small)


def edited(folder, **changes):
    fields = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**fields, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 1 of the format .* received version 2"),
        ({"version": None}, "received version: Input should be"),
        ({"classes": 10}, "received classes: Input should be"),
        ({"splits": {"train": {}}}, r"received splits\.train\.records: Field required"),
    ],
)
def test_a_description_of_another_form_is_refused(small, changes, message):
    edited(small, **changes)
    with pytest.raises(InputError, match=message):
        description.load(small)


def test_a_missing_shard_is_refused(small):
    (small / "train-00001-of-00002.tfrecord").unlink()
    with pytest.raises(InputError, match=r"train-00001-of-00002\.tfrecord.*received no such file"):
        description.load(small)


def test_a_shard_of_another_size_is_refused(small):
    with open(small / "train-00001-of-00002.tfrecord", "ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"train-00001-of-00002\.tfrecord' with \d+ bytes.*received \d+"):
        description.load(small)


def test_an_unknown_split_gets_the_nearest_name(small):
    with pytest.raises(InputError, match="received 'valid'; did you mean 'validation'"):
        description.load(small).files("valid")


def test_good_labels_pass(digits):
    described = description.load(digits)
    assert [description.check_labels(described, split) for split in ("train", "validation")] == [True, True]


def test_a_label_outside_the_classes_names_file_record_and_range(small):
    edited(small, classes=["cat"])
    labels = [label for _, label, _ in examples_of(small, "validation")]
    message = f"from 0 to 0, .* received 1 in record {labels.index(1)} of '.*validation-00000-of-00001"
    with pytest.raises(InputError, match=message):
        description.check_labels(description.load(small), "validation")


def test_a_record_without_a_label_is_refused(small):
    name = "validation-00000-of-00001.tfrecord"
    write_records(small / name, [b"", b"\xff no protobuf"])
    edited_splits = json.loads((small / "dataset.json").read_text())["splits"]
    edited_splits["validation"]["shards"][0]["bytes"] = os.path.getsize(small / name)
    edited(small, splits=edited_splits)
    with pytest.raises(InputError, match="received no int64 label in record 0 of"):
        description.check_labels(description.load(small), "validation")


def test_a_large_split_is_left_unread(small, monkeypatch):
    monkeypatch.setattr(description, "LABELS_MOST_BYTES", 10)
    assert description.check_labels(description.load(small), "train") is False
