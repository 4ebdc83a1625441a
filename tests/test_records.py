"""TFRecord files: the same bytes as TensorFlow's, and nothing damaged goes unseen."""

import gzip
import os

import numpy as np
import pytest

from distfit.data import records
from distfit.errors import InputError, RunError

PAYLOADS = [b"", b"a", b"x" * 1000, bytes(range(256))]


@pytest.fixture
def path(tmp_path):
    name = tmp_path / "some.tfrecord"
    records.write_records(name, PAYLOADS)
    return name


def payloads_of(path):
    offsets, lengths = records.scan(path)
    with open(path, "rb") as file:
        return [
            records.read_at(file.fileno(), int(offset), int(length), str(path))
            for offset, length in zip(offsets, lengths, strict=True)
        ]


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_what_is_written_is_read_again(path):
    assert payloads_of(path) == PAYLOADS


def test_writing_says_how_many(tmp_path):
    assert records.write_records(tmp_path / "a", iter(PAYLOADS)) == 4


def test_tensorflow_reads_what_is_written(path):
    import tensorflow as tf

    assert [payload.numpy() for payload in tf.data.TFRecordDataset(str(path))] == PAYLOADS


def test_what_tensorflow_writes_is_the_same_file(path, tmp_path):
    import tensorflow as tf

    theirs = tmp_path / "theirs"
    with tf.io.TFRecordWriter(str(theirs)) as writer:
        for payload in PAYLOADS:
            writer.write(payload)
    assert theirs.read_bytes() == path.read_bytes()
    assert payloads_of(theirs) == PAYLOADS


def test_a_file_whose_writing_fails_leaves_nothing(tmp_path):
    def failing():
        yield b"one"
        raise KeyError("stop")

    with pytest.raises(KeyError):
        records.write_records(tmp_path / "a", failing())
    assert os.listdir(tmp_path) == []


def test_a_written_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    records.write_records(tmp_path / "a", PAYLOADS)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_damaged_length_names_file_and_byte(path):
    flip(path, 16)  # the second record's length
    with pytest.raises(InputError, match=r"at byte 16 of '.*some\.tfrecord'.*damaged"):
        records.scan(path)


def test_a_file_of_another_kind_is_refused(path):
    path.write_bytes(b"image,label\na.png,3\n")
    with pytest.raises(InputError, match=r"at byte 0 of .*no TFRecord file"):
        records.scan(path)


def test_a_file_of_another_kind_that_is_tiny_is_refused(path):
    path.write_bytes(b"hello")
    with pytest.raises(InputError, match=r"at byte 0 of .*no TFRecord file"):
        records.scan(path)


def test_an_empty_file_is_refused(path):
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"some\.tfrecord.*empty file"):
        records.scan(path)


def test_a_compressed_file_is_refused_as_such(path):
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match=r"received a compressed file.*Decompress it"):
        records.scan(path)


def test_a_record_that_begins_like_a_compressed_file_is_read(tmp_path):
    payload = bytes(0x8B1F)  # its length is stored as 1f 8b, the first bytes of gzip
    records.write_records(tmp_path / "a", [payload])
    assert payloads_of(tmp_path / "a") == [payload]


def test_every_truncation_is_seen(path):
    whole = path.read_bytes()
    ends = np.cumsum([16 + len(payload) for payload in PAYLOADS]).tolist()
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        if size in ends:  # a file may well end after a record
            assert len(records.scan(path)[0]) == ends.index(size) + 1
        else:
            with pytest.raises(InputError):
                records.scan(path)


def test_a_truncation_names_where_and_what_to_do(path):
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"record of 256 bytes at byte 1049 .*byte 1320: .*Copy it again"):
        records.scan(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.*No such file"):
        records.scan(tmp_path / "nowhere")


def test_a_damaged_payload_names_file_and_byte(path):
    flip(path, 50)  # in the third record, whose payload begins at 45
    with pytest.raises(RunError, match=r"at byte 45 of '.*some\.tfrecord'.*checksum"):
        payloads_of(path)


def test_a_file_that_has_shrunk_since_its_scan_is_seen(path):
    offsets, lengths = records.scan(path)
    path.write_bytes(path.read_bytes()[:-10])
    with open(path, "rb") as file, pytest.raises(RunError, match="262 of its 272 bytes: the file is cut off"):
        records.read_at(file.fileno(), int(offsets[-1]), int(lengths[-1]), str(path))
