"""Data sets from CSV files and from manifests: what is read, what is refused with its line, how little is held."""

import json
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distfit.data import build, description
from distfit.data.build.csv_list import csv_listing
from distfit.data.build.manifest import manifest_listing
from distfit.data.build.names import Names
from distfit.data.build.values import NotAValue, type_of
from distfit.errors import InputError, RunError
from tests.pictures import make_caltech
from tests.test_data_build import bytes_of, command, examples_of, records_of
from tests.test_data_build_resume import Told, stop

LABELS = {"001.ak47": "gun", "002.american-flag": "flag", "257.clutter": "other"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """15 pictures of three classes."""
    return make_caltech(tmp_path_factory.mktemp("lists") / "pictures", classes=3, per_class=5)


@pytest.fixture
def rows(pictures):
    """(path below pictures, label) of each."""
    paths = sorted(str(path.relative_to(pictures)) for path in pictures.glob("*/*"))
    return [(path, LABELS[path.split("/")[0]]) for path in paths]


def written(tmp_path, *lines, name="labels.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    return path


def wrong_of(listing):
    return [f"{bad.where} is {bad.reason}".replace(repr(listing.file), "FILE") for bad in listing.wrong]


# CSV.


def test_a_csv_file_becomes_records_with_the_bytes_of_its_images(pictures, rows, tmp_path):
    file = written(tmp_path, "image,label", *(f"{path},{label}" for path, label in rows))
    built = build.build_csv(file, tmp_path / "out", image_root=pictures)
    assert built.classes == ("flag", "gun", "other")
    assert (built.source, built.image_format) == ("images of 'labels.csv'", "jpeg")
    assert [split.records for split in built.splits.values()] == [12, 3]
    both = [*examples_of(tmp_path / "out", "train"), *examples_of(tmp_path / "out", "validation")]
    assert sorted((name, built.classes[label]) for name, label, _ in both) == sorted(rows)
    assert all(data == (pictures / name).read_bytes() for name, _, data in both)


def test_paths_are_relative_to_the_file_unless_said_otherwise(pictures, rows):
    file = written(pictures, "image,label", *(f"{path},{label}" for path, label in rows))
    try:
        assert csv_listing(file).paths(3) == [str(pictures / rows[3][0])]
        assert csv_listing(file, "elsewhere").paths(3) == [f"elsewhere/{rows[3][0]}"]
    finally:
        file.unlink()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
def test_columns_and_the_sign_between_them_are_found(tmp_path, sign, encoding):
    lines = [["id", "label", "image", "split"], ["7", "über, alles", "a 1.jpg", "train"], ["8", "b", "b.jpg", "Val"]]
    quoted = [sign.join(f'"{field}"' if "," in field else field for field in line) for line in lines]
    listing = csv_listing(written(tmp_path, *quoted, "", encoding=encoding), classes=None)
    assert list(listing.names) == ["a 1.jpg"]
    assert listing.classes == ("über, alles",)
    assert wrong_of(listing) == ["line 3 of FILE ('b.jpg') is of the class 'b', which no training record has"]


def test_columns_may_have_other_names(tmp_path):
    file = written(tmp_path, "part#species#file", "train#cat#1.jpg", "Test#cat#2.jpg", "rest#cat#3.jpg")
    listing = csv_listing(file, columns=build.Columns.parse("file,species,part"), delimiter="#")
    assert (list(listing.names), listing.given_split.tolist()) == (["1.jpg", "2.jpg"], [0, 2])
    assert wrong_of(listing) == ["line 4 of FILE ('3.jpg') is in the split 'rest'; did you mean 'test'?"]
    assert csv_listing(file, columns=build.Columns.parse("file,species"), delimiter="#").given_split is None


def test_classes_that_are_whole_numbers_keep_their_order_as_numbers(tmp_path):
    file = written(tmp_path, "image,label", *(f"{number}.jpg,{number}" for number in range(12)))
    listing = csv_listing(file)
    assert listing.classes == tuple(map(str, range(12)))
    assert listing.labels.tolist() == list(range(12))


def test_classes_may_be_named_in_an_order_of_their_own(tmp_path):
    classes = written(tmp_path, "zebra", "", "ape", "owl", name="classes.txt")
    file = written(tmp_path, "image,label", "1.jpg,ape", "2.jpg,zebra", "3.jpg,aep")
    listing = csv_listing(file, classes=classes)
    assert (listing.classes, listing.labels.tolist()) == (("zebra", "ape", "owl"), [1, 0])
    assert wrong_of(listing) == ["line 4 of FILE ('3.jpg') is of the unknown class 'aep'; did you mean 'ape'?"]
    listing.check_classes()


@pytest.mark.parametrize(
    ("lines", "received"), [(["a", "b", "a"], "'a' twice"), ([""], "an empty file"), (None, "No such file")]
)
def test_a_wrong_file_of_classes_is_refused(tmp_path, lines, received):
    if lines is not None:
        written(tmp_path, *lines, name="classes.txt")
    with pytest.raises(InputError, match=received):
        csv_listing(written(tmp_path, "image,label", "1.jpg,a"), classes=tmp_path / "classes.txt")


def test_splits_may_be_given(pictures, rows, tmp_path):
    splits = ["train", "training", "val", "test", "train"] * 3
    lines = [f"{path},{label},{split}" for (path, label), split in zip(rows, splits, strict=True)]
    built = build.build_csv(written(tmp_path, "image,label,split", *lines), tmp_path / "out", image_root=pictures)
    assert {name: split.per_class for name, split in built.splits.items()} == {
        "train": (3, 3, 3),
        "validation": (1, 1, 1),
        "test": (1, 1, 1),
    }
    assert {name for name, _, _ in examples_of(tmp_path / "out", "test")} == {rows[n][0] for n in (3, 8, 13)}
    assert description.load(tmp_path / "out").validation_fraction is None
    with pytest.raises(InputError, match="Expected no validation fraction"):
        build.build_csv(tmp_path / "labels.csv", tmp_path / "b", image_root=pictures, validation_fraction=0.5)


def spoilt(tmp_path, rows):
    lines = [f"{path},{label}" for path, label in rows]
    lines[2:2] = ["gone.jpg,gun", f"{rows[0][0]},gun", "a.jpg", ",gun", f"{rows[1][0]},flag,more"]
    return written(tmp_path, "image,label", *lines, '"2\n.jpg",other', "../labels.csv,other")


REASONS = (
    "line 4 of FILE ('ROOT/gone.jpg') is a file that cannot be read (No such file or directory)",
    "line 5 of FILE ('001.ak47/001_0001.jpg') is there already, in line 2",
    "line 6 of FILE is of 1 columns, where the first has 2",
    "line 7 of FILE is without an image",
    "line 8 of FILE is of 3 columns, where the first has 2",
    "line 23 of FILE ('ROOT/2\\n.jpg') is a file that cannot be read (No such file or directory)",
    "line 24 of FILE ('ROOT/../labels.csv') is a file that cannot be read (No such file or directory)",
)


def test_lines_that_are_no_records_are_refused_with_their_numbers(pictures, rows, tmp_path):
    file = spoilt(tmp_path, rows)
    result = command("--csv", file, "--image-root", pictures, tmp_path / "out")
    shown = result.stderr.replace(repr(str(file)), "FILE").replace(str(pictures), "ROOT")
    assert result.exit_code == 2
    assert "whole images that TensorFlow decodes, each once and of a known class, received 7 of another kind" in shown
    assert [reason for reason in REASONS if f"\n  {reason}\n" not in shown] == []
    assert os.listdir(tmp_path) == ["labels.csv"]


def test_lines_that_are_no_records_can_be_left_out(pictures, rows, tmp_path):
    file = spoilt(tmp_path, rows)
    result = command("--csv", file, "--image-root", pictures, "--skip-bad", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "left out 7, kept 15 images:\n" in result.stderr
    both = [*examples_of(tmp_path / "out", "train"), *examples_of(tmp_path / "out", "validation")]
    assert sorted(name for name, _, _ in both) == [path for path, _ in rows]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "Expected the column 'image' once in the first line .* received the columns of an empty line"),
        (["a.jpg,cat"], "received the columns 'a.jpg', 'cat'. Name them with --columns"),
        (["image,label,label", "a,b,c"], "Expected the column 'label' once"),
        (["image,label"], "Expected records in .*, received none that can be used"),
        (["image,label", "a.jpg"], "none that can be used: line 2 of .* is of 1 columns"),
        (["image,label", 'a"b.jpg,"cat'], "Expected a CSV file in UTF-8 .*unexpected end of data"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        build.build_csv(written(tmp_path, *lines), tmp_path / "out")
    assert os.listdir(tmp_path) == ["labels.csv"]


def test_text_in_another_encoding_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"Expected a CSV file in UTF-8 in .*can't decode byte 0xe9"):
        build.build_csv(written(tmp_path, "image,label", "é.jpg,cat", encoding="latin-1"), tmp_path / "out")


@pytest.mark.parametrize("sign", ["", ", ", "::"])
def test_a_sign_between_columns_is_one(tmp_path, sign):
    with pytest.raises(InputError, match="Expected one sign between columns, or tab"):
        csv_listing(written(tmp_path, "image,label", "a.jpg,cat"), delimiter=sign)
    assert len(csv_listing(written(tmp_path, "image\tlabel", "a.jpg\tcat"), delimiter="tab")) == 1


def test_a_class_whose_images_were_all_left_out_is_refused(pictures, rows, tmp_path):
    lines = [f"{path},{label}" for path, label in rows]
    file = written(tmp_path, "image,label", *lines, "gone.jpg,ghost")
    with pytest.raises(InputError, match=r"a training record of every class in .*, received none of 'ghost'"):
        build.build_csv(file, tmp_path / "out", image_root=pictures, skip_bad=True)


@pytest.mark.parametrize("text", ["image", "a,b,c,d", "a,"])
def test_wrong_names_of_columns_are_refused(tmp_path, text):
    result = command("--csv", "x.csv", "--columns", text, tmp_path / "out")
    assert (result.exit_code, "two or three columns" in result.stderr) == (2, True)


# Manifests.


def manifest(tmp_path, *records):
    return written(tmp_path, *map(json.dumps, records), name="records.jsonl")


def record(key, label="cat", **parts):
    return {"key": key, "label": label, **parts}


def test_several_files_numbers_and_texts_become_one_record(pictures, rows, tmp_path):
    records = [
        record(
            f"{number}é",
            label,
            files={"image": path, "second": rows[number - 1][0]},
            features={
                "age": number / 2,
                "words": list(range((number + 1) % 4)),
                "caption": f"ein {label} ✓",
                "box": [[1, 2.5]],
            },
        )
        for number, (path, label) in enumerate(rows)
    ]
    result = command("--manifest", manifest(tmp_path, *records), "--image-root", pictures, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    built = description.load(tmp_path / "out")
    assert built.features == {
        **{"image": "bytes", "second": "bytes", "key": "bytes", "label": "int64"},
        **{"age": "float32", "words": "int64[?]", "caption": "bytes", "box": "float32[1,2]"},
    }
    assert "'words' has another length in some records" in result.stderr
    found = [*records_of(tmp_path / "out", "train"), *records_of(tmp_path / "out", "validation")]
    assert sorted(one["key"][0].decode() for one in found) == sorted(one["key"] for one in records)
    for one in found:
        number = int(one["key"][0].decode()[:-1])
        assert one["image"] == [(pictures / rows[number][0]).read_bytes()]
        assert one["second"] == [(pictures / rows[number - 1][0]).read_bytes()]
        assert (one["age"], one["words"], one["box"]) == ([number / 2], list(range((number + 1) % 4)), [1, 2.5])
        assert built.classes[one["label"][0]] == rows[number][1]
        assert one["caption"][0].decode() == f"ein {rows[number][1]} ✓"


def test_tensorflow_parses_what_the_description_says(tmp_path):
    import tensorflow as tf

    records = [record(str(n), str(n % 2), features={"x": [n, 0.5], "ids": [n] * (n + 1)}) for n in range(10)]
    built = build.build_manifest(manifest(tmp_path, *records), tmp_path / "out", shards=1)
    assert (built.features["x"], built.features["ids"], built.image_format) == ("float32[2]", "int64[?]", None)
    features = {"x": tf.io.FixedLenFeature([2], tf.float32), "ids": tf.io.RaggedFeature(tf.int64)}
    for serialized in tf.data.TFRecordDataset(built.files("train")):
        one = tf.io.parse_single_example(serialized, features)
        number = int(one["x"][0])
        assert one["ids"].numpy().tolist() == [number] * (number + 1)


GOOD_RECORD = record("a", files={"image": "a.jpg"}, features={"age": 3.0, "ids": [1, 2], "name": "x", "m": [[1, 2]]})


def changed(**parts):
    one = json.loads(json.dumps(GOOD_RECORD)) | {"key": "b"}
    for name, value in parts.items():
        if isinstance(value, dict) and isinstance(one.get(name), dict):
            one[name] |= value
        else:
            one[name] = value
    return one


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (changed(features={"age": "old"}), "an object whose 'age' is bytes, where the first record has float32"),
        (changed(features={"age": None}), "an object whose 'age' is None, which is no number, text or list"),
        (changed(features={"age": True}), "an object whose 'age' is True, which is no number"),
        (changed(features={"age": [1.0]}), "an object whose 'age' is float32[1], where the first record has float32"),
        (changed(features={"age": 1e39}), "an object whose 'age' is 1e+39, which is too large for float32"),
        (
            changed(features={"ids": [1.5]}),
            "an object whose 'ids' is float32, where the first record has int64[2], with",
        ),
        (changed(features={"ids": [2**63]}), "an object whose 'ids' is [9223372036854775808], which is no number"),
        (changed(features={"ids": 3}), "an object whose 'ids' is int64, where the first record has int64[2]"),
        (changed(features={"name": ["x"]}), "an object whose 'name' is bytes[1], where the first record has bytes"),
        (changed(features={"name": "\ud800"}), "an object whose 'name' is no text"),
        (changed(features={"m": [[1, 2], [3]]}), "an object whose 'm' is [[1, 2], [3]], which is no number"),
        (
            changed(features={"m": [[1, 2, 3]]}),
            "an object whose 'm' is int64[1,3], where the first record has int64[1,2]",
        ),
        (changed(features={"more": 1}), "an object with the feature 'more', other than the first record"),
        (changed(files={"mask": "m.png"}), "an object with the file 'mask', other than the first record"),
        (changed(features=3), "an object whose features are no object, but 3"),
        (changed(files={"image": 3}), "an object whose file 'image' is no path, but 3"),
        (changed(split="train"), "an object with a split, other than the first record"),
        (changed(lable="cat"), "an object with 'lable'; did you mean 'label'?"),
        (changed(key=3), "an object whose key is no text, but 3"),
        (changed(label=None), "an object whose label is no name of a class, but None"),
        (record("b", files={"image": "a.jpg"}), "an object without the feature 'age', other than the first record"),
        ([1], "no object"),
    ],
)
def test_a_record_that_is_not_like_the_first_is_named_with_its_line(tmp_path, second, reason):
    listing = manifest_listing(manifest(tmp_path, GOOD_RECORD, second, changed(key="c")))
    assert len(listing) == 2
    assert [bad.split(" is ", 1)[0] for bad in wrong_of(listing)] == ["line 2 of FILE"]
    assert wrong_of(listing)[0].removeprefix("line 2 of FILE is ").startswith(reason)


def test_lines_that_are_no_json_are_named(tmp_path):
    good, other = json.dumps(GOOD_RECORD), json.dumps(changed())
    nan = json.dumps(changed(features={"age": float("nan")}))
    listing = manifest_listing(written(tmp_path, good, "", "{", nan, other, good, name="r.jsonl"))
    reasons = wrong_of(listing)
    assert reasons[0].startswith("line 3 of FILE is no JSON (Expecting")
    assert reasons[1].startswith("line 4 of FILE is no JSON (NaN, which is no number")
    assert reasons[2:] == ["line 6 of FILE ('a') is there already, in line 1"]
    assert list(listing.names) == ["a", "b"]


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (record("a", features={"label": 3}), "line 1 .* uses the name 'label' twice"),
        (record("a", files={"x": "a.jpg"}, features={"x": 3}), "uses the name 'x' twice"),
        (record("a", features={"x": []}), r"'x' is \[\], which is no number"),
        ({"key": "a"}, "label is no name of a class, but None"),
    ],
)
def test_a_first_record_that_says_no_types_is_refused(tmp_path, first, message):
    with pytest.raises(InputError, match=message):
        manifest_listing(manifest(tmp_path, first, GOOD_RECORD))
    with pytest.raises(InputError, match="No such file"):
        manifest_listing(tmp_path / "none.jsonl")


def test_a_manifest_that_changes_meanwhile_ends_the_build(tmp_path):
    file = manifest(tmp_path, *(record(str(n), str(n % 2), features={"x": n}) for n in range(10)))

    def change():
        file.write_text(file.read_text().replace('"x": ', '"x": 1'))

    with pytest.raises(RunError, match=r"Expected line \d+ of .* as it was when the build began"):
        build.build_manifest(file, tmp_path / "out", shards=1, threads=1, count=Told("Writing", 2, change))
    assert os.listdir(tmp_path) == ["records.jsonl"]


def test_a_file_that_is_shrunk_has_to_be_called_image(pictures, rows, tmp_path):
    file = manifest(tmp_path, *(record(path, label, files={"photo": path}) for path, label in rows))
    with pytest.raises(InputError, match=r"a file called 'image' in the records .* received photo"):
        build.build_manifest(file, tmp_path / "out", image_root=pictures, max_side=10)
    assert build.build_manifest(file, tmp_path / "out", image_root=pictures).image_format is None


def test_only_the_image_is_shrunk_and_a_mask_is_not(pictures, rows, tmp_path):
    records = [record(path, label, files={"mask": path, "image": path}) for path, label in rows]
    built = build.build_manifest(manifest(tmp_path, *records), tmp_path / "out", image_root=pictures, max_side=10)
    assert (built.image_format, built.max_side) == ("jpeg", 10)
    for one in records_of(tmp_path / "out", "train"):
        assert one["mask"] == [(pictures / one["key"][0].decode()).read_bytes()] != one["image"]


@pytest.mark.parametrize("change", ["line", "nothing"])
def test_an_interrupted_build_of_a_manifest_goes_on(pictures, rows, tmp_path, capsys, change):
    records = [record(path, label, files={"image": path}, features={"x": 1}) for path, label in rows]
    arguments = {"image_root": pictures, "shards": 4}
    file = manifest(tmp_path, *records)
    with pytest.raises(KeyboardInterrupt):
        build.build_manifest(file, tmp_path / "out", count=Told("Writing", 8, stop), threads=1, **arguments)
    if change == "line":
        records[0]["features"]["x"] = 2
    build.build_manifest(manifest(tmp_path, *records), tmp_path / "out", **arguments)
    said = {"line": "had other inputs: starting anew", "nothing": "going on"}[change]
    assert said in capsys.readouterr().err
    build.build_manifest(manifest(tmp_path, *records), tmp_path / "direct", **arguments)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "direct")


# Little memory.


def test_a_row_of_a_list_takes_little_memory(tmp_path):
    """300,000 of them then take 60 MB at most, names of 40 bytes included."""
    count, name = 20_000, "n0{0:07d}/some/longer/path/n0_{0:07d}.JPEG"
    file = written(tmp_path, "image,label", *(f"{name.format(number)},{number % 1000}" for number in range(count)))
    tracemalloc.start()
    try:
        listing = csv_listing(file)
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(listing) == count
    assert held / count < 80
    assert most / count < 200


def test_many_records_are_written_without_holding_them(tmp_path):
    """100 MB, of which 16 MiB may be there at a time."""
    count = 10_000
    source = build.Source(
        name="many",
        classes=("a", "b"),
        filenames=Names.of(f"{number:06d}" for number in range(count)),
        labels=np.arange(count, dtype=np.int32) % 2,
        encoded=lambda number: bytes(10_000),
        image_format="none",
        pixels=None,
    )
    tracemalloc.start()
    try:
        build.write_dataset(source, tmp_path / "out")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 2**24


@given(st.lists(st.text(max_size=3), max_size=30))
def test_names_are_a_list_of_strings(names):
    compact = Names.of(names)
    assert list(compact) == names
    assert (len(compact), compact[:2]) == (len(names), names[:2])
    keeps = np.array([len(name) > 1 for name in names], bool)
    assert list(compact.only(keeps)) == [name for name in names if len(name) > 1]
    first = {name: names.index(name) for name in names}
    assert compact.repeated() == [(first[name], again) for again, name in enumerate(names) if first[name] < again]
    with pytest.raises(IndexError):
        compact[len(names)]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=6))
def test_a_value_has_a_type_or_is_refused(value):
    try:
        found = type_of("x", value)
    except NotAValue:
        return
    assert description.parse_feature(str(found)) == description.Feature(found.kind, found.shape)
    assert found.also("x", value) == found
