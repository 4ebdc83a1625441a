"""TFRecord files and their index: the same bytes as TensorFlow's, and nothing damaged goes unseen."""

import gzip
import os

import numpy as np
import pytest

from distfit.data import index, records
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
    with pytest.raises(InputError, match="must be uncompressed"):
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
    with open(path, "rb") as file, pytest.raises(RunError, match="has changed"):
        records.read_at(file.fileno(), int(offsets[-1]), int(lengths[-1]), str(path))


# The index and the files that it is made of.


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        name = tmp_path / f"train-{shard:05d}-of-00003.tfrecord"
        records.write_records(name, [b"%d.%d" % (shard, number) for number in range(shard + 1)])
    return tmp_path


def test_the_index_finds_every_record(shards):
    found = index.build_index(index.expand(shards))
    assert len(found) == 6
    assert found.total_bytes == 18
    assert found.file_of.tolist() == [0, 1, 1, 2, 2, 2]
    for number, payload in enumerate([b"0.0", b"1.0", b"1.1", b"2.0", b"2.1", b"2.2"]):
        with open(found.files[found.file_of[number]], "rb") as file:
            file.seek(found.offsets[number])
            assert file.read(found.lengths[number]) == payload


def test_the_index_travels_as_bytes(shards):
    sent = index.build_index(index.expand(shards))
    received = index.Index.from_bytes(sent.to_bytes())
    assert received.files == sent.files
    for name in ("file_of", "offsets", "lengths"):
        np.testing.assert_array_equal(getattr(received, name), getattr(sent, name))
        assert getattr(received, name).dtype == getattr(sent, name).dtype


def test_folder_pattern_and_list_mean_the_same(shards):
    expected = [str(shards / f"train-{shard:05d}-of-00003.tfrecord") for shard in range(3)]
    assert index.expand(shards) == expected
    assert index.expand(str(shards / "train-*")) == expected
    assert index.expand(reversed(expected)) == expected


def test_a_folder_passes_over_what_are_no_records(shards):
    (shards / "dataset.json").write_text("{}")
    (shards / ".train-00000-of-00003.tfrecord.x1").write_bytes(b"half")
    assert len(index.expand(shards)) == 3


def test_missing_shards_are_named(shards):
    (shards / "train-00001-of-00003.tfrecord").unlink()
    for files in (shards, str(shards / "*.tfrecord"), sorted(shards.iterdir())):
        with pytest.raises(InputError, match=r"all 3 shards.*received 2: missing train-00001-of-00003\."):
            index.expand(files)


def test_one_shard_named_alone_is_taken(shards):
    one = str(shards / "train-00001-of-00003.tfrecord")
    assert index.expand(one) == [one]


def test_several_splits_in_a_folder_are_refused(shards):
    records.write_records(shards / "validation-00000-of-00001.tfrecord", [b"v"])
    with pytest.raises(InputError, match=r"received train, validation.*train-\*"):
        index.expand(shards)


def test_a_file_twice_is_refused(shards):
    one = str(shards / "train-00001-of-00003.tfrecord")
    with pytest.raises(InputError, match="twice"):
        index.expand([one, one])


def test_a_missing_folder_gets_the_nearest_name(tmp_path):
    (tmp_path / "digits").mkdir()
    for number in range(9):
        (tmp_path / f"other{number}").mkdir()
    with pytest.raises(InputError, match=r"no 'digts' in .*did you mean 'digits'"):
        index.expand(tmp_path / "digts")
    with pytest.raises(InputError, match=r"no 'digts' in .*did you mean 'digits'"):
        index.expand(str(tmp_path / "digts" / "train-*"))


def test_a_pattern_without_a_match_says_what_is_there(shards):
    with pytest.raises(InputError, match=r"no 'valid-\*' in .*train-00000-of-00003"):
        index.expand(str(shards / "valid-*"))


def test_a_missing_file_in_a_list_gets_the_nearest_name(shards):
    with pytest.raises(InputError, match="did you mean 'train-0000"):
        index.expand([shards / "train-00000-of-0003.tfrecord"])


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="received an empty folder"):
        index.expand(tmp_path)


def test_a_folder_without_records_says_what_it_holds(tmp_path):
    (tmp_path / "cat.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"a folder with cat\.jpg"):
        index.expand(tmp_path)


def test_a_remote_path_is_refused():
    with pytest.raises(InputError, match="mounted"):
        index.expand("gs://bucket/train-*")


def test_an_empty_list_is_refused():
    with pytest.raises(InputError, match="received none"):
        index.build_index(index.expand([]))
