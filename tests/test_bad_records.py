"""Damaged records and files: seen by whoever indexes or reads, told apart, and nothing else is lost with them."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from distfit.data import catalog, records
from distfit.data.bad_records import BadRecord
from distfit.data.files import expand
from distfit.data.index_cache import NAME, load_index
from distfit.data.reader import MOST_OPEN_FILES, Reader
from distfit.errors import InputError, RunError

PAYLOADS = [b"first", b"", b"x" * 300, b"last one"]
BEGINS = [0, 21, 37, 353]  # of the records; payloads are 12 bytes behind
SIZE = 377


@pytest.fixture
def folder(tmp_path):
    for shard in "ab":
        records.write_records(tmp_path / f"{shard}.tfrecord", PAYLOADS)
    return tmp_path


@pytest.fixture
def path(folder):
    """Of the shard that gets damaged; its records are the first four."""
    return folder / "a.tfrecord"


def flip(path, place, mask=1):
    data = bytearray(path.read_bytes())
    data[place] ^= mask
    path.write_bytes(data)


def load(folder, **options):
    return load_index(expand(folder), **options)


def read_all(index):
    return Reader(index).read_each(np.arange(len(index)))


def reasons(found):
    return {number: str(bad) for number, bad in enumerate(found) if isinstance(bad, BadRecord)}


# After it was indexed.


def test_every_flipped_byte_costs_its_record_and_no_other(folder, path):
    reader = Reader(load(folder))
    for place in range(SIZE):
        record = sum(place >= begin for begin in BEGINS) - 1
        flip(path, place)
        found = reader.read_each(np.arange(8))
        flip(path, place)
        bad = found.pop(record)
        assert isinstance(bad, BadRecord)
        assert found == (PAYLOADS * 2)[:record] + (PAYLOADS * 2)[record + 1 :]
        assert ("the header" if place - BEGINS[record] < 12 else "does not match its checksum") in bad.reason
        assert (bad.file, bad.number, bad.offset) == (str(path), record, BEGINS[record] + 12)


def test_a_record_of_another_length_has_changed_since(folder, path):
    index = load(folder)
    records.write_records(path, [b"first", b"", b"x" * 299, b"last one."])
    found = reasons(read_all(index))
    assert list(found) == [2, 3]
    assert "received one of 299 bytes instead of 300: the file has changed since it was indexed" in found[2]
    assert "the header" in found[3]  # which lies a byte before it now


@pytest.mark.parametrize("size", [0, 1, 21, 30, 37, 40, 100, 353, SIZE - 1])
def test_of_a_file_that_was_cut_off_the_rest_is_bad(folder, path, size):
    index = load(folder)
    os.truncate(path, size)
    found = reasons(read_all(index))
    assert list(found) == [number for number, end in enumerate([*BEGINS[1:], SIZE]) if end > size]
    assert all("cut off" in reason for reason in found.values())


def test_of_a_file_that_is_gone_each_record_is_bad(folder, path):
    index = load(folder)
    path.unlink()
    found = reasons(read_all(index))
    assert list(found) == [0, 1, 2, 3]
    assert all("no such file" in reason and "all hosts" in reason for reason in found.values())


def test_a_shard_that_pretends_to_be_the_indexed_one_is_seen(folder, path):
    load(folder)
    stat = path.stat()
    records.write_records(path, [b"first", b"x", b"x" * 299, b"last one"])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    index = load(folder)  # from what is kept: size and time are the same
    found = reasons(read_all(index))
    assert list(found) == [1, 2]
    assert "one of 1 bytes instead of 0: the file has changed since it was indexed" in found[1]
    assert "distfit data index --force" in found[1]
    load(folder, fresh=True)
    assert reasons(read_all(load(folder))) == {}


def test_an_open_file_that_is_replaced_is_still_the_indexed_one(folder, path):
    reader = Reader(load(folder))
    reader.read(np.array([0]))
    records.write_records(path, [b"another"])
    assert reader.read(np.arange(8)).tolist() == PAYLOADS * 2


def test_a_file_that_is_a_folder_now_is_bad(folder, path):
    index = load(folder)
    path.unlink()
    path.mkdir()
    assert list(reasons(read_all(index))) == [0, 1, 2, 3]


def test_read_raises_the_first_and_remembers_it(folder, path):
    index = load(folder)
    flip(path, 60)
    flip(path, 370)
    reader = Reader(index)
    with pytest.raises(BadRecord, match="record 3 at byte 365") as first:
        reader.read(np.array([5, 3, 2]))
    with pytest.raises(BadRecord, match="record 2 at byte 49"):
        reader.read(np.array([5, 2, 3]))
    assert reader.failure is first.value


def test_a_repaired_file_is_read_after_closing(folder, path):
    reader = Reader(load(folder))
    flip(path, 60)
    assert list(reasons(reader.read_each(np.arange(8)))) == [2]
    reader.close()
    flip(path, 60)
    assert reader.read(np.arange(8)).tolist() == PAYLOADS * 2


# While it is indexed.


def in_headers():
    return [begin + place for begin in BEGINS for place in range(12)]


@pytest.mark.parametrize("place", in_headers())
def test_every_flipped_byte_of_a_length_ends_its_shard(folder, path, place):
    flip(path, place)
    record = sum(place >= begin for begin in BEGINS) - 1
    with pytest.raises(InputError, match=rf"at byte {BEGINS[record]} of '.*a\.tfrecord'"):
        load(folder)
    index = load(folder, damaged="keep")
    assert list(index.damaged) == [str(path)]
    assert "do not match" in index.damaged[str(path)]
    assert read_all(index) == PAYLOADS[:record] + PAYLOADS


@pytest.mark.parametrize("size", [1, 11, 30, 40, 100, 352, 354, SIZE - 1])
def test_of_a_cut_off_shard_the_whole_records_are_kept(folder, path, size):
    os.truncate(path, size)
    with pytest.raises(InputError, match=r"a\.tfrecord.*(cut off|no TFRecord file)"):
        load(folder)
    index = load(folder, damaged="keep")
    whole = sum(end <= size for end in [*BEGINS[1:], SIZE])
    assert read_all(index) == PAYLOADS[:whole] + PAYLOADS
    assert index.total_bytes == sum(map(len, PAYLOADS[:whole] + PAYLOADS))


def test_an_empty_shard_is_refused_or_left_out(folder, path):
    path.write_bytes(b"")
    with pytest.raises(InputError, match="empty file"):
        load(folder)
    index = load(folder, damaged="keep")
    assert dict(index.damaged) == {str(path): "an empty file (0 bytes)"}
    assert read_all(index) == PAYLOADS


def test_nothing_but_damage_is_refused(tmp_path):
    (tmp_path / "a.tfrecord").write_bytes(b"")
    with pytest.raises(InputError, match=r"whole records in 1 TFRecord files, received none, .*empty file"):
        load(tmp_path, damaged="keep")


def test_zeros_are_no_records(folder, path):
    # As of a file system that has lost its power while writing.
    with open(path, "r+b") as file:
        file.truncate(37)
        file.truncate(1 << 30)
    index = load(folder, damaged="keep")
    assert "do not match" in index.damaged[str(path)]
    assert read_all(index) == PAYLOADS[:2] + PAYLOADS


def test_damage_is_not_remembered(folder, path):
    flip(path, 40)
    stat = path.stat()
    load(folder, damaged="keep")
    flip(path, 40)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert read_all(load(folder)) == PAYLOADS * 2


def test_damage_found_once_is_refused_the_next_time(folder, path):
    flip(path, 40)
    load(folder, damaged="keep")
    with pytest.raises(InputError, match="damaged"):
        load(folder)


def test_what_was_scanned_before_a_damaged_shard_is_kept(folder, path):
    flip(folder / "b.tfrecord", 40)
    with pytest.raises(InputError, match=r"b\.tfrecord"):
        load(folder)
    assert catalog.load(str(folder / NAME)).names == ["a.tfrecord"]


# Many files, and reading ahead.


def test_files_that_are_crowded_out_are_opened_again(tmp_path):
    count = MOST_OPEN_FILES + 20
    for number in range(count):
        records.write_records(tmp_path / f"{number:04d}.tfrecord", [b"%d" % number])
    reader = Reader(load(tmp_path))
    for _ in range(2):
        assert reader.read(np.arange(count)).tolist() == [b"%d" % number for number in range(count)]
    held = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert sum(name.startswith(str(tmp_path)) for name in held) == MOST_OPEN_FILES
    reader.close()


def test_too_many_open_files_make_no_record_a_bad_one(folder, path, monkeypatch):
    reader = Reader(load(folder))

    def refuse(path):
        raise OSError(errno.EMFILE, "Too many open files", path)

    monkeypatch.setattr(reader, "_open", refuse)
    with pytest.raises(RunError, match=r"Too many open files.*ulimit") as raised:
        reader.read_each(np.array([0]))
    assert not isinstance(raised.value, BadRecord)


def test_threads_that_crowd_out_each_others_files_read_right(tmp_path, monkeypatch):
    monkeypatch.setattr("distfit.data.reader.MOST_OPEN_FILES", 2)
    for number in range(20):
        records.write_records(tmp_path / f"{number:02d}.tfrecord", [b"%d" % number] * 3)
    reader = Reader(load(tmp_path))

    def read(seed):
        order = np.random.default_rng(seed).integers(0, 60, 2000)
        return reader.read(order).tolist() == [b"%d" % (number // 3) for number in order]

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(6)))


def test_near_records_are_fetched_as_one(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, length, advice: asked.append((start, length, advice)))
    for name in "ab":
        records.write_records(tmp_path / f"{name}.tfrecord", [bytes(100_000)] * 10)
    reader = Reader(load(tmp_path))
    reader.will_need(np.array([15, 2, 8, 0, 1, 16]))
    frame = 100_016
    assert asked == [
        (0, 3 * frame, os.POSIX_FADV_WILLNEED),
        (8 * frame, frame, os.POSIX_FADV_WILLNEED),
        (5 * frame, 2 * frame, os.POSIX_FADV_WILLNEED),
    ]


def test_reading_ahead_leaves_missing_files_to_the_reader(folder, path):
    reader = Reader(load(folder))
    path.unlink()
    reader.will_need(np.arange(8))
    reader.will_need(np.array([], np.int64))
    assert list(reasons(reader.read_each(np.arange(8)))) == [0, 1, 2, 3]
