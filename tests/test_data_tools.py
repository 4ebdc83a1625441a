"""`distfit data inspect`, `verify`, `index` and the sheet: what they say of good data, and that they see each fault."""

import dataclasses
import gzip
import io
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from distfit.cli import data_tools
from distfit.cli.frame import command_line
from distfit.data import plan
from distfit.data.description import Description, Shard, Split
from distfit.data.example import messages
from distfit.data.inspect import sheet, text
from distfit.data.inspect.found import find_data
from distfit.data.inspect.processes import _shared_out, in_processes
from distfit.data.inspect.records_of import records_of
from distfit.data.inspect.summary import shares, summarize
from distfit.data.inspect.verify import verify
from distfit.data.inspect.walk import Damage, Payload, walk
from distfit.data.records import header_of, masked_crc, write_records
from distfit.errors import InputError, RunError
from tests.ranks import environment

CLASSES = ("apple", "pear", "plum")
COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))
# Of each split: records of each shard.
SHARDS = {"train": (7, 7, 6), "validation": (4, 3)}

app = command_line("Looks at data.", "distfit data inspect data/digits")
for command in (data_tools.inspect, data_tools.verify, data_tools.index):
    app.command()(command)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="distfit")


def image_of(number, image_format="JPEG"):
    """A plain image in the colour of the record's class; the sizes vary."""
    buffer = io.BytesIO()
    Image.new("RGB", (40 + number, 30), COLOURS[number % 3]).save(buffer, image_format)
    return buffer.getvalue()


def example_of(image=None, label=None, **more):
    """A serialized Example; a feature is one value or a list of them, each an int, a float or bytes."""
    example = messages().Example()
    for name, values in {"image": image, "label": label, **more}.items():
        if values is not None:
            values = values if isinstance(values, list) else [values]
            field = {int: "int64_list", float: "float_list", bytes: "bytes_list"}[type(values[0])]
            getattr(example.features.feature[name], field).value.extend(values)
    return example.SerializeToString(deterministic=True)


def good(number):
    return example_of(image_of(number), number % 3, filename=[b"%d.jpg" % number])


def build(folder, change=None):
    """Two splits of small images with a dataset.json; `change` maps numbers of training records to other bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, counts in SHARDS.items():
        starts = np.cumsum([0, *counts]).tolist()
        written = []
        for shard, count in enumerate(counts):
            name = f"{split}-{shard:05d}-of-{len(counts):05d}.tfrecord"
            numbers = range(starts[shard], starts[shard] + count)
            payloads = [
                (change or {}).get(number, good(number)) if split == "train" else good(number) for number in numbers
            ]
            write_records(folder / name, payloads)
            written.append(Shard(name, count, (folder / name).stat().st_size))
        per_class = np.bincount(np.arange(starts[-1]) % 3, minlength=3).tolist()
        splits[split] = Split(starts[-1], tuple(per_class), tuple(written))
    types = {"filename": "bytes", "image": "bytes", "label": "int64"}
    description = Description(1, "three fruits", 0, 0.25, CLASSES, "jpeg", None, types, splits)
    (folder / "dataset.json").write_text(description.to_json())
    return folder


@pytest.fixture
def fruits(tmp_path):
    return build(tmp_path / "fruits")


def shard(folder, number=0):
    return folder / f"train-{number:05d}-of-00003.tfrecord"


def begin_of(path, number):
    """Where a record begins in a good file."""
    at, data = 0, path.read_bytes()
    for _ in range(number):
        at += 16 + int.from_bytes(data[at : at + 8], "little")
    return at


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def faults_of(*arguments):
    """What `verify` finds, as it says it in JSON."""
    result = run("verify", *arguments, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == (1 if found["bad"] else 0), result.stderr
    return found["bad"]


def only_fault(*arguments):
    (found,) = faults_of(*arguments)
    return found


# inspect


def test_inspect_says_what_a_built_data_set_holds(fruits):
    result = run("inspect", fruits)
    assert (result.exit_code, result.stderr) == (0, "")
    train, validation = result.stdout.split("\n\n")[1:]
    assert train.startswith("train: 20 records in 3 files, ")
    assert "images in 'image': 20 jpeg; width 40 to 59 (median 49), height 30 pixels" in train
    assert "    1      pear   7\n" in train
    assert "  1 step an epoch with batches of 32, the last one of 20 records" in train
    assert validation.startswith("validation: 7 records in 2 files, ")


def test_inspect_in_a_log_has_no_control_characters(fruits):
    result = run("inspect", fruits, "--ranks", 3)
    assert all(character.isprintable() or character == "\n" for character in result.stdout)
    assert all(line == line.rstrip() for line in result.stdout.splitlines())


def test_inspect_json_has_the_same_figures(fruits):
    found = json.loads(run("inspect", fruits, "--json", "--ranks", 2, "--batch-size", 8).stdout)
    assert (found["version"], found["source"], found["ranks"], found["batch_size"]) == (1, "three fruits", 2, 8)
    train, validation = found["splits"]
    lengths = [len(good(number)) for number in range(20)]
    assert (train["records"], train["longest"], train["mean"]) == (20, max(lengths), sum(lengths) / 20)
    assert train["bytes"] == sum(path.stat().st_size for path in fruits.glob("train-*"))
    assert [(one["name"], one["kind"], one["records"]) for one in train["features"]] == [
        ("filename", "bytes", 20),
        ("image", "bytes", 20),
        ("label", "int64", 20),
    ]
    assert (train["steps"], train["last_batch"]) == (3, 4)
    assert [(share["rows"], share["last_rows"], share["records"]) for share in train["shares"]] == [
        ([0, 4], [0, 2], 10),
        ([4, 8], [2, 4], 10),
    ]
    assert [one["records"] for one in validation["classes"]] == [3, 2, 2]


def test_json_is_the_summary_to_the_last_field(fruits):
    summary = summarize(find_data([str(fruits)]), ranks=5, batch_size=7)
    sent = json.loads(text.as_json(summary, sheet=None))
    assert {name: sent[name] for name in ("data", "splits")} == json.loads(
        json.dumps({name: dataclasses.asdict(summary)[name] for name in ("data", "splits")})
    )


@pytest.mark.parametrize(("records", "batch", "ranks"), [(67, 32, 3), (5, 64, 7), (64, 32, 2), (1, 1, 1)])
def test_the_shares_are_those_of_the_plan(records, batch, ranks):
    found = shares(records, batch, ranks)
    order = np.arange(records)
    for share in found:
        taken = 0
        for step in range(plan.steps_per_epoch(records, batch)):
            first, last = plan.batch_positions(records, batch, step)
            start, stop = plan.process_bounds(last - first, share.rank, ranks)
            taken += len(order[first:last][start:stop])
        assert share.records == taken
    assert sum(share.records for share in found) == records
    assert sum(share.fraction for share in found) == pytest.approx(1)


def test_without_a_short_batch_the_last_one_is_as_the_others():
    assert [(share.last_rows, share.records) for share in shares(64, 32, 2)] == [((0, 16), 32), ((16, 32), 32)]


def test_many_ranks_and_classes_are_put_together(tmp_path):
    write_records(tmp_path / "a.tfrecord", [example_of(label=number % 30) for number in range(65)])
    shown = run("inspect", tmp_path, "--ranks", 40, "--batch-size", 64).stdout
    assert "30 classes (from all records) of 2 to 3 records" in shown
    # The last batch has one record, which rank 0 takes; 64 rows are two for some ranks and one for the others.
    ranks = [line.split("  ")[2] for line in shown.split("share\n")[1].splitlines()]
    assert ranks == ["0", "1 to 23", "24 to 39"]
    everything = json.loads(run("inspect", tmp_path, "--ranks", 40, "--json").stdout)["splits"][0]
    assert (len(everything["classes"]), len(everything["shares"])) == (30, 40)


def test_foreign_records_are_read_for_their_features(tmp_path):
    payloads = [
        example_of(inputs=[0.5] * 13, tags=[b"x"] * (1 + number % 3), label=number % 2) for number in range(9)
    ] + [example_of(inputs=[0.5] * 13)]
    write_records(tmp_path / "rows.tfrecord", payloads)
    (split,) = summarize(find_data([str(tmp_path)])).splits
    assert split.name == "records"
    assert {one.name: (one.type, one.records) for one in split.features} == {
        "inputs": ("float32[13]", 10),
        "tags": ("bytes[1 to 3]", 9),
        "label": ("int64", 9),
    }
    assert [(one.label, one.records) for one in split.classes] == [(0, 5), (1, 4)]
    assert split.classes_from == "all records"
    assert split.images == ()
    assert "9 of 10" in run("inspect", tmp_path).stdout


def test_a_feature_of_two_types_and_a_record_of_another_kind_are_said(tmp_path):
    write_records(tmp_path / "a.tfrecord", [example_of(x=[1]), example_of(x=[1.5]), b"hello"])
    shown = run("inspect", tmp_path).stdout
    assert "float32 or int64" in shown
    assert "and 1 record of another kind, no tf.train.Example" in shown


def test_names_out_of_a_file_do_not_steer_the_terminal(tmp_path):
    write_records(tmp_path / "a.tfrecord", [example_of(**{"\x1b[2J\n": 1})])
    shown = run("inspect", tmp_path).stdout
    assert "\x1b" not in shown
    assert r"\x1b[2J\n" in shown


def test_neither_do_a_source_and_names_of_files(fruits, tmp_path):
    said = json.loads((fruits / "dataset.json").read_text())
    (fruits / "dataset.json").write_text(json.dumps(said | {"source": "clear\x1b[2J"}))
    assert "clear\\x1b[2J" in run("inspect", fruits).stdout
    (tmp_path / "bad\x1b[2J.tfrecord").write_bytes(b"")
    assert "bad\\x1b[2J.tfrecord: an empty file" in run("verify", tmp_path / "*.tfrecord").stdout


def test_sequence_examples_are_recognised(tmp_path):
    def sequence(steps):
        example = messages().SequenceExample()
        example.context.feature["length"].int64_list.value.append(steps)
        for step in range(steps):
            example.feature_lists.feature_list["words"].feature.add().int64_list.value.append(step)
        return example.SerializeToString()

    write_records(tmp_path / "text.tfrecord", [sequence(steps) for steps in (2, 5, 3)])
    (split,) = summarize(find_data([str(tmp_path)])).splits
    assert {one.name: one.type for one in split.features} == {"length": "int64", "words": "int64, 2 to 5 steps"}


def test_records_of_no_examples_are_counted_all_the_same(tmp_path):
    write_records(tmp_path / "text.tfrecord", [b"one", b"three"])
    shown = run("inspect", tmp_path).stdout
    assert "2 records in 1 file, 40 B; a record has 4 B on average, 5 B at most" in shown
    assert "no tf.train.Example among all records" in shown


def test_of_a_large_file_a_sample_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("distfit.data.inspect.records_of.MOST_READ", 50)
    monkeypatch.setattr("distfit.data.inspect.records_of.SAMPLE", 20)
    write_records(tmp_path / "a.tfrecord", [example_of(label=number) for number in range(100)])
    (split,) = summarize(find_data([str(tmp_path)])).splits
    assert (split.records, split.read, split.classes_from) == (100, 20, "20 records")
    labels = [one.label for one in split.classes]
    assert len(labels) == 20
    assert max(labels) > 50


def test_compressed_files_are_streams_and_counted_on_request(tmp_path):
    path = tmp_path / "train-00000-of-00001.tfrecord"
    write_records(path, [good(number) for number in range(9)])
    path.write_bytes(gzip.compress(path.read_bytes()))
    shown = run("inspect", tmp_path, "--ranks", 2).stdout
    assert "an unknown number of records" in shown
    assert "`distfit data index` counts them" in shown
    assert "features of the first 9 records" in shown
    assert "9 records in 1 file" in run("index", tmp_path).stdout
    counted = run("inspect", tmp_path, "--ranks", 2).stdout
    assert "train: 9 records in 1 file" in counted
    assert "compressed, so they are read as streams" in counted
    assert "1 step an epoch" in counted


def test_a_pattern_for_a_whole_split_takes_its_classes_from_dataset_json(fruits):
    (split,) = summarize(find_data([str(fruits / "train-*")])).splits
    assert [one.name for one in split.classes] == list(CLASSES)
    (part,) = summarize(find_data([str(shard(fruits, 1))])).splits
    assert (part.records, [one.name for one in part.classes]) == (7, ["0", "1", "2"])


def test_a_pattern_in_the_folder_itself_means_the_same(fruits, monkeypatch):
    monkeypatch.chdir(fruits)
    data = find_data(["train-*"])
    assert data.splits == {"train": tuple(path.name for path in sorted(fruits.glob("train-*")))}
    assert data.description.classes == CLASSES
    assert run("verify", "train-*").exit_code == 0


def test_one_split_can_be_asked_for(fruits):
    assert "validation" not in run("inspect", fruits, "--split", "train").stdout
    wrong = run("inspect", fruits, "--split", "trian")
    assert wrong.exit_code == 2
    assert "did you mean 'train'?" in wrong.stderr


@pytest.mark.parametrize("command", ["inspect", "verify", "index"])
def test_what_is_not_there_is_one_paragraph(command, tmp_path):
    result = run(command, tmp_path / "fruit")
    assert result.exit_code == 2
    assert result.stderr.startswith("distfit: error: Expected ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_inspect_refuses_a_data_set_that_is_not_whole(fruits):
    shard(fruits).unlink()
    result = run("inspect", fruits)
    assert result.exit_code == 2
    assert "no such file" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "verify", "index"])
def test_help_has_an_example(command):
    assert f"distfit data {command} " in run(command, "--help").stdout.split("Example:\n")[1]


# verify


def test_verify_finds_nothing_in_good_data(fruits):
    result = run("verify", fruits)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("no faults; 27 whole records and 27 images in 5 files, ")
    assert run("verify", fruits, "--decode").exit_code == 0


def test_a_flipped_bit_in_a_payload_loses_one_record(fruits):
    begin = begin_of(shard(fruits), 2)
    flip(shard(fruits), begin + 40)
    found = only_fault(fruits)
    assert (found["file"], found["number"], found["offset"]) == (str(shard(fruits)), 2, begin + 12)
    assert "do not match their checksum" in found["reason"]


def test_behind_a_flipped_length_the_next_record_is_found(fruits):
    begin = begin_of(shard(fruits), 2)
    flip(shard(fruits), begin)
    length = begin_of(shard(build(fruits.parent / "again")), 3) - begin
    result = run("verify", fruits, "--json")
    found = json.loads(result.stdout)
    (bad,) = found["bad"]
    assert (bad["number"], bad["offset"]) == (2, begin)
    assert f"the next record was found {length} bytes on" in bad["reason"]
    assert found["records"] == 26


def test_a_length_without_another_record_behind_it_ends_the_check_of_its_file(fruits):
    begin = begin_of(shard(fruits), 6)
    flip(shard(fruits), begin + 9)
    assert "no other record begins" in only_fault(fruits)["reason"]


@pytest.mark.parametrize("left_out", [1, 5, 200])
def test_a_truncated_file_is_cut_off_at_its_record(fruits, left_out):
    path = shard(fruits, 2)
    begin = begin_of(path, 5)
    path.write_bytes(path.read_bytes()[:-left_out])
    found = only_fault(fruits)
    assert (found["file"], found["number"], found["offset"]) == (str(path), 5, begin + 12)
    assert "cut off" in found["reason"]


def test_a_truncation_between_records_is_seen_by_their_number(fruits):
    path = shard(fruits)
    path.write_bytes(path.read_bytes()[: begin_of(path, 5)])
    found = only_fault(fruits)
    assert found["number"] is None
    assert found["reason"].startswith("5 records in ")
    assert "dataset.json says 7 in" in found["reason"]


def test_a_wrong_label_does_not_hide_that_records_are_missing(tmp_path):
    folder = build(tmp_path / "d", {9: example_of(image_of(9), 3, filename=b"9.jpg")})
    path = shard(folder, 1)
    path.write_bytes(path.read_bytes()[: begin_of(path, 6)])
    assert [one["number"] for one in faults_of(folder)] == [2, None]


def test_an_empty_file_a_missing_one_and_another_kind_of_file_are_listed(fruits):
    shard(fruits, 0).write_bytes(b"")
    shard(fruits, 1).unlink()
    shard(fruits, 2).write_bytes(b"image,label\na.png,3\n")
    found = {os.path.basename(one["file"]): one["reason"] for one in faults_of(fruits)}
    assert found["train-00000-of-00003.tfrecord"] == "an empty file (0 bytes)"
    assert found["train-00001-of-00003.tfrecord"] == "missing"
    assert "where the length of a record and its checksum should be" in found["train-00002-of-00003.tfrecord"]


def test_of_records_that_cannot_be_read_nobody_says_that_they_are_no_examples(tmp_path):
    (tmp_path / "a.tfrecord").write_bytes(b"")
    said = run("verify", tmp_path)
    assert said.exit_code == 1
    assert "an empty file" in said.stdout
    assert "no tf.train.Examples" not in said.stdout


@pytest.mark.parametrize("command", ["inspect", "index"])
def test_a_file_that_cannot_be_read_is_one_paragraph(command, fruits):
    os.unlink(fruits / "dataset.json")
    shard(fruits).unlink()
    shard(fruits).symlink_to(shard(fruits).name)
    said = run(command, fruits)
    assert (said.exit_code, said.stdout) == (2, "")
    assert "Too many levels of symbolic links" in said.stderr


def test_a_first_file_that_is_a_folder_is_one_paragraph(tmp_path):
    (tmp_path / "a.tfrecord").mkdir()
    with pytest.raises(InputError, match=r"a\.tfrecord.*Is a directory"):
        records_of([str(tmp_path / "a.tfrecord")])


@pytest.mark.parametrize("named", ["{}", "{}/train-*"])
def test_missing_shards_of_foreign_files_are_listed(tmp_path, named):
    write_records(tmp_path / "train-00000-of-00003", [good(0)])
    write_records(tmp_path / "train-00002-of-00003", [good(0)])
    found = only_fault(named.format(tmp_path))
    assert (os.path.basename(found["file"]), found["reason"]) == ("train-00001-of-00003", "missing")


def test_a_wrong_label_is_a_fault_unless_labels_are_left_out(tmp_path):
    folder = build(tmp_path / "d", {9: example_of(image_of(9), 3, filename=b"9.jpg")})
    found = only_fault(folder)
    assert (found["file"], found["number"]) == (str(shard(folder, 1)), 2)
    assert found["reason"] == "label 3, where classes go from 0 to 2"
    assert faults_of(folder, "--no-labels") == []


def test_good_labels_in_other_numbers_than_described_are_a_fault(tmp_path):
    folder = build(tmp_path / "d", {9: example_of(image_of(9), 1, filename=b"9.jpg")})
    reasons = [one["reason"] for one in faults_of(folder)]
    assert reasons == [
        "7 train records of the class 'apple', where there are 6",
        "7 train records of the class 'pear', where there are 8",
    ]
    assert faults_of(folder, "--no-labels") == []


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"hello", "no tf.train.Example"),
        (example_of(image_of(9), filename=b"9.jpg"), "no feature 'label'"),
        (example_of(image_of(9), label=[0.5], filename=b"9.jpg"), "float32 in the feature 'label', where int64"),
        (example_of(image_of(9), label=[0, 0], filename=b"9.jpg"), "2 values in the feature 'label'"),
        (example_of(b"<html>404", 0, filename=b"9.jpg"), "the feature 'image' is no image"),
        (example_of(image_of(9)[:10], 0, filename=b"9.jpg"), "header is damaged or cut off"),
        (example_of(b"", 0, filename=b"9.jpg"), "the feature 'image' is no image"),
    ],
)
def test_a_record_that_is_not_as_described_is_a_fault(tmp_path, record, reason):
    folder = build(tmp_path / "d", {9: record})
    found = only_fault(folder)
    assert (found["file"], found["number"]) == (str(shard(folder, 1)), 2)
    assert reason in found["reason"]


def test_of_images_that_are_described_none_may_be_something_else(tmp_path):
    folder = build(tmp_path / "d", {number: example_of(b"<html>", number % 3, filename=b"x") for number in range(20)})
    assert len(faults_of(folder)) == 20


def test_a_png_called_jpg_and_unusual_images_are_fine(tmp_path):
    def saved(image, image_format):
        buffer = io.BytesIO()
        image.save(buffer, image_format)
        return buffer.getvalue()

    images = [
        image_of(0, "PNG"),
        saved(Image.new("CMYK", (5, 5)), "JPEG"),
        saved(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), "PNG"),
        saved(Image.new("L", (3, 3)), "BMP"),
        saved(Image.new("P", (3, 3)), "GIF"),
        saved(Image.new("RGB", (3, 3)), "WEBP"),
    ]
    change = {number: example_of(image, number % 3, filename=[b"x.jpg"]) for number, image in enumerate(images)}
    assert faults_of(build(tmp_path / "d", change)) == []


def test_what_a_training_would_refuse_is_seen_by_its_header(tmp_path):
    def saved(image, image_format, **more):
        buffer = io.BytesIO()
        image.save(buffer, image_format, **more)
        return buffer.getvalue()

    plain, clear = Image.new("RGB", (3, 3)), Image.new("RGBA", (3, 3))
    images = [
        saved(clear, "WEBP"),
        saved(clear, "WEBP", lossless=True),
        saved(plain, "WEBP", save_all=True, append_images=[Image.new("RGB", (3, 3), "red")]),
        saved(Image.new("RGB", (3, 3), "red").quantize(2), "BMP"),
        saved(Image.new("1", (3, 3)), "BMP"),
    ]
    change = {number: example_of(image, number % 3, filename=[b"x"]) for number, image in enumerate(images)}
    reasons = [one["reason"] for one in faults_of(build(tmp_path / "d", change))]
    said = ["alpha channel", "alpha channel", "animated", "a palette", "1 bits a pixel"]
    assert [part for part, reason in zip(said, reasons, strict=True) if part not in reason] == []


def bomb():
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_decompression_bomb_is_seen_by_its_header(tmp_path):
    folder = build(tmp_path / "d", {9: example_of(bomb(), 0, filename=[b"9.png"])})
    assert "too large to decode" in only_fault(folder)["reason"]


def test_a_picture_that_is_cut_off_behind_its_header_is_seen_by_decoding(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((60, 60), 50).save(buffer, "JPEG")
    cut_off = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    folder = build(tmp_path / "d", {9: example_of(cut_off, 0, filename=b"9.jpg")})
    assert faults_of(folder) == []
    found = only_fault(folder, "--decode")
    assert found["number"] == 2
    assert "cut off" in found["reason"]


def test_foreign_images_are_checked_too(tmp_path):
    payloads = [example_of(photo=[image_of(number)], name=[b"BMW"]) for number in range(9)]
    payloads[4] = example_of(photo=[image_of(4)[:8]], name=[b"BMW"])
    write_records(tmp_path / "a.tfrecord", payloads)
    found = only_fault(tmp_path)
    assert found["number"] == 4
    assert found["reason"].startswith("the feature 'photo' is no image")


def test_of_records_that_are_no_examples_the_framing_is_checked(tmp_path):
    path = tmp_path / "a.tfrecord"
    write_records(path, [b"some text", b"some more"])
    result = run("verify", tmp_path)
    assert result.exit_code == 0
    assert "no tf.train.Examples: their framing alone was checked" in result.stdout
    flip(path, 14)
    assert only_fault(tmp_path)["number"] == 0


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress])
def test_compressed_files_are_checked_and_their_damage_is_seen(tmp_path, compress):
    path = tmp_path / "a.tfrecord"
    write_records(path, [good(number) for number in range(9)])
    whole = path.read_bytes()
    path.write_bytes(compress(whole))
    assert faults_of(tmp_path) == []
    inner = bytearray(whole)
    inner[begin_of_bytes(whole, 3) + 40] ^= 1
    path.write_bytes(compress(bytes(inner)))
    assert only_fault(tmp_path)["number"] == 3
    path.write_bytes(compress(whole)[:-20])
    assert "the rest of the file is not checked" in only_fault(tmp_path)["reason"]


def begin_of_bytes(data, number):
    at = 0
    for _ in range(number):
        at += 16 + int.from_bytes(data[at : at + 8], "little")
    return at


def test_twenty_faults_are_shown_and_all_on_request(tmp_path):
    write_records(tmp_path / "a.tfrecord", [b"x" * 50] * 30)
    for number in range(25):
        flip(tmp_path / "a.tfrecord", number * 66 + 20)
    few, every = (run("verify", tmp_path, *more).stdout.splitlines() for more in ([], ["--all"]))
    assert len(few) == 20 + 3
    assert "and 5 more; --all lists them" in few
    assert few[0] == f"{tmp_path}/a.tfrecord, record 0 at byte 12: 50 bytes that do not match their checksum"
    assert len(every) == 25 + 2
    assert every[-1].startswith("25 faults; 5 whole records in 1 file, ")


def test_several_processes_find_what_one_finds(tmp_path):
    folder = build(tmp_path / "d", {9: b"hello", 3: example_of(image_of(3), 7, filename=[b"x"])})
    flip(shard(folder, 2), 14)
    data = find_data([str(folder)], whole=False)
    one, two = verify(data, jobs=1), verify(data, jobs=2)
    assert len(one.bad) == 3
    assert (two.bad, two.records, two.images, two.bytes) == (one.bad, one.records, one.images, one.bytes)


def doubled(number, tick):
    tick()
    return 2 * number


def killed(number, tick):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return number


def test_tasks_are_shared_out_and_their_results_come_in_order():
    ticks = []
    assert in_processes(doubled, range(7), 2, lambda: ticks.append(1)) == [0, 2, 4, 6, 8, 10, 12]
    assert len(ticks) == 7


def test_a_process_that_is_killed_ends_the_work():
    with pytest.raises(RunError, match="killed"):
        in_processes(killed, range(20), 2, lambda: None)


@pytest.mark.parametrize("after_s", [0, 0.2], ids=["before it was sent", "before it was read"])
def test_a_process_that_is_killed_without_its_task_ends_the_work(after_s):
    here, there = multiprocessing.Pipe()
    threading.Timer(after_s, there.close).start() if after_s else there.close()
    with pytest.raises(RunError, match="killed"):
        _shared_out([1], [here], lambda: None)


# The walk along a file.

PAYLOADS = [bytes([number]) * (number * 37 % 251) for number in range(40)]


def framed(payloads):
    buffer = io.BytesIO()
    for payload in payloads:
        buffer.write(header_of(len(payload)) + payload + struct.pack("<I", masked_crc(payload)))
    return buffer.getvalue()


def in_chunks(data, size):
    return (data[at : at + size] for at in range(0, len(data), size))


@pytest.mark.parametrize("size", [1, 7, 100, 10**6])
def test_records_are_found_whatever_the_chunks(size):
    data = framed(PAYLOADS)
    found = list(walk(in_chunks(data, size), len(data)))
    assert [one.data for one in found] == PAYLOADS
    assert [data[one.offset : one.offset + len(one.data)] for one in found] == PAYLOADS


def test_any_flipped_bit_is_a_fault_and_loses_little():
    data = framed(PAYLOADS[:8])
    whole = list(walk([data], len(data)))
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 1 << at % 8
        found = list(walk([bytes(broken)], len(data)))
        good = [one.data for one in found if isinstance(one, Payload)]
        assert [type(one) for one in found].count(Damage) == 1, at
        assert good == [one.data for one in whole if not one.offset - 12 <= at < one.offset + len(one.data) + 4], at


def test_a_file_put_behind_one_that_was_cut_off_is_found():
    data = framed(PAYLOADS[:6])
    for cut in range(1, 12):  # within the header of a seventh record
        broken = data + header_of(100)[:cut] + data
        assert [type(one) for one in walk([broken], len(broken))] == [Payload] * 6 + [Damage] + [Payload] * 6


def test_the_search_finds_a_header_across_its_windows(monkeypatch):
    monkeypatch.setattr("distfit.data.inspect.walk._WINDOW_BYTES", 64)
    for length in range(200, 200 + 64):
        broken = bytearray(framed([bytes(length), b"next"]))
        broken[0] ^= 1
        assert [type(one) for one in walk([bytes(broken)], len(broken))] == [Damage, Payload]


def test_the_search_passes_over_zeros_and_ends_within_bounds(monkeypatch):
    monkeypatch.setattr("distfit.data.inspect.walk.SEARCH_BYTES", 3_000_000)
    data = framed(PAYLOADS[:2])
    near, far = (data + bytes(zeros) + data for zeros in (2_500_000, 4_500_000))
    assert [type(one) for one in walk([near], len(near))] == [Payload, Payload, Damage, Payload, Payload]
    assert [type(one) for one in walk([far], len(far))] == [Payload, Payload, Damage]


# index


def test_index_says_what_was_scanned_and_where_it_lies(fruits):
    first = run("index", fruits)
    assert (first.exit_code, first.stderr) == (0, "")
    lines = first.stdout.splitlines()
    assert lines[0].startswith("train: 20 records in 3 files, 3 of them scanned; ")
    assert lines[1].startswith("validation: 7 records in 2 files, 2 of them scanned; ")
    assert os.path.isfile(lines[0].split("; ")[1])
    again = run("index", fruits).stdout
    assert again.count("0 of them scanned") == 2
    os.utime(shard(fruits, 1), ns=(1, 1))
    assert "train: 20 records in 3 files, 1 of them scanned" in run("index", fruits).stdout
    assert run("index", fruits, "--force").stdout == first.stdout


def test_index_refuses_what_is_damaged(fruits):
    data = bytearray(shard(fruits).read_bytes())
    data[0] ^= 1
    shard(fruits).write_bytes(data)
    result = run("index", fruits)
    assert result.exit_code == 2
    assert "byte 0" in result.stderr


# The sheet.


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_sheet_shows_every_record_in_its_colour(fruits, tmp_path):
    out = tmp_path / "sheet.png"
    result = run("inspect", fruits, "--sheet", out)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == f"{out}: a sheet of train"
    pixels = pixels_of(out).astype(int)
    for number in range(20):  # all of them, so in their order
        row, column = divmod(number, sheet.COLUMNS)
        centre = pixels[32 + row * 184 + 72, 8 + column * 152 + 72]
        assert np.abs(centre - COLOURS[number % 3]).max() < 12
    text_below = pixels[32 + 146 : 32 + 176, 8:152]
    assert text_below.min() < 60
    assert (pixels[-1] == 255).all()


def test_the_seed_of_the_sheet_chooses_its_records(tmp_path):
    write_records(tmp_path / "a.tfrecord", [good(number) for number in range(100)])
    records = records_of(find_data([str(tmp_path)]).splits["records"])
    first, again, other = (sheet.draw_sheet(records, title="t", seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_the_sheet_shows_where_an_image_cannot_be_decoded_and_what_has_no_name(tmp_path):
    payloads = [good(number) for number in range(5)] + [example_of(b"\xff\xd8\xff broken", 77)]
    write_records(tmp_path / "a.tfrecord", payloads)
    records = records_of(find_data([str(tmp_path)]).splits["records"])
    pixels = np.asarray(Image.open(io.BytesIO(sheet.draw_sheet(records, title="t", names=CLASSES))))
    tile = pixels[32 : 32 + sheet.TILE, 8 + 5 * 152 : 8 + 5 * 152 + sheet.TILE]
    assert (tile[0] == 235).all()
    assert tile.min() < 60


def test_a_sheet_keeps_sixteen_bits_and_gray(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.full((50, 50), 0x8000, np.uint16)).save(buffer, "PNG")
    write_records(tmp_path / "a.tfrecord", [example_of(buffer.getvalue(), 0)])
    records = records_of(find_data([str(tmp_path)]).splits["records"])
    pixels = np.asarray(Image.open(io.BytesIO(sheet.draw_sheet(records, title="t"))))
    assert pixels[32 + 72, 8 + 72].tolist() == [128, 128, 128]


def test_a_sheet_of_rows_is_refused(tmp_path):
    write_records(tmp_path / "a.tfrecord", [example_of(inputs=[0.5] * 13)])
    result = run("inspect", tmp_path, "--sheet", tmp_path / "sheet.png")
    assert result.exit_code == 2
    assert "received records with inputs (float32[13])" in result.stderr
    assert not (tmp_path / "sheet.png").exists()


def test_a_sheet_that_cannot_be_written_leaves_nothing(fruits, tmp_path):
    result = run("inspect", fruits, "--sheet", tmp_path / "no" / "sheet.png")
    assert result.exit_code == 2
    assert "can be written" in result.stderr


def test_a_sheet_of_a_stream_takes_the_first_records(tmp_path):
    path = tmp_path / "a.tfrecord"
    write_records(path, [good(number) for number in range(9)])
    path.write_bytes(gzip.compress(path.read_bytes()))
    result = run("inspect", tmp_path, "--sheet", tmp_path / "sheet.png")
    assert result.exit_code == 0
    assert pixels_of(tmp_path / "sheet.png").shape[0] == 2 * 184 + 32


def test_the_tools_need_no_tensorflow(fruits):
    code = (
        "import sys; from distfit.data.inspect.found import find_data; from distfit.data.inspect.verify import verify; "
        "from distfit.data.inspect.summary import summarize; import distfit.cli.data_tools; "
        "verify(find_data(sys.argv[1:])); summarize(find_data(sys.argv[1:])); "
        "assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(fruits)], env=environment(), check=True, timeout=60)
