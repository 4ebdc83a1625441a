"""The index: found once, kept, brought up to date by what changed, never trusted when it is damaged."""

import errno
import gzip
import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distfit.data import catalog, index_cache, index_request, index_update, records
from distfit.data.files import expand
from distfit.data.index import Index
from distfit.data.index_cache import NAME, cached_counts, count_records, load_index
from distfit.data.reader import Reader
from distfit.errors import InputError, RunError

SIZES = (5, 1, 8)


@pytest.fixture(autouse=True)
def users_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def said(monkeypatch):
    warnings = []
    for module in (index_request, index_update):
        monkeypatch.setattr(module, "warn_once", warnings.append)
    return warnings


@pytest.fixture
def scanned(monkeypatch):
    """The names of the files that were scanned, in any order."""
    names = []
    scan = index_cache.scan_file

    def noting(path):
        names.append(os.path.basename(path))
        return scan(path)

    monkeypatch.setattr(index_cache, "scan_file", noting)
    return names


def payload(shard, number):
    return b"%d.%d." % (shard, number) * (number * 7 % 5)


@pytest.fixture
def folder(tmp_path):
    for shard, count in enumerate(SIZES):
        records.write_records(tmp_path / f"{shard}.tfrecord", (payload(shard, number) for number in range(count)))
    return tmp_path


PAYLOADS = [payload(shard, number) for shard, count in enumerate(SIZES) for number in range(count)]


def load(folder, **options):
    return load_index(expand(folder), **options)


def all_of(index):
    return Reader(index).read(np.arange(len(index))).tolist()


def kept_in_cache(users_cache):
    return sorted((users_cache / "distfit" / "index").iterdir())


# What it says.


def test_every_record_is_found_in_any_order(folder):
    index = load(folder)
    order = np.random.default_rng(0).permutation(len(index))
    assert Reader(index).read(order).tolist() == [PAYLOADS[number] for number in order]
    assert index.starts.tolist() == [0, 5, 6, 14]
    assert index.total_bytes == sum(map(len, PAYLOADS))


def test_located_records_are_those_of_their_files(folder):
    index = load(folder)
    file_of, offsets, lengths = index.locate(np.arange(len(index)))
    assert file_of.tolist() == [0] * 5 + [1] + [2] * 8
    for number in range(3):
        of_file = index.of_file(number)
        np.testing.assert_array_equal(of_file[0], offsets[file_of == number])
        np.testing.assert_array_equal(of_file[1], lengths[file_of == number])


@pytest.mark.parametrize("record", [-1, 14])
def test_a_record_that_is_not_there_is_an_error(folder, record):
    with pytest.raises(IndexError, match="of 14"):
        load(folder).locate(np.array([0, record]))


def test_nothing_is_read_where_nothing_is_asked_for(folder):
    assert Reader(load(folder)).read(np.array([], np.int64)).tolist() == []


lengths_of_shards = st.lists(
    st.lists(st.integers(0, 40) | st.just(9000), min_size=1, max_size=30), min_size=1, max_size=6
)


@settings(max_examples=60, deadline=None)
@given(shards=lengths_of_shards, seed=st.integers(0, 2**32 - 1))
def test_any_shards_are_read_back_in_any_order(tmp_path_factory, shards, seed):
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(seed)
    written = [[rng.bytes(length) for length in lengths] for lengths in shards]
    for number, payloads in enumerate(written):
        records.write_records(folder / f"{number}.tfrecord", payloads)
    index = load(folder)
    everything = [payload for payloads in written for payload in payloads]
    order = rng.permutation(len(everything))
    again = Index.from_bytes(index.to_bytes())
    for found in (index, again, load(folder)):
        assert Reader(found).read(order).tolist() == [everything[number] for number in order]


def test_many_short_records_are_found(tmp_path):
    lengths = np.random.default_rng(0).integers(0, 60, 30_000)
    records.write_records(tmp_path / "a.tfrecord", (bytes(length) for length in lengths.tolist()))
    np.testing.assert_array_equal(load(tmp_path).of_file(0)[1], lengths)


def test_short_records_after_long_ones_are_found(tmp_path):
    lengths = [100_000, 3, 20_000, 1_200_000, 5, 5, 2_000_000, 0, 1]
    records.write_records(tmp_path / "a.tfrecord", map(bytes, lengths))
    assert load(tmp_path).of_file(0)[1].tolist() == lengths


# How it travels.


def test_it_travels_as_bytes(folder):
    sent = load(folder)
    received = Index.from_bytes(sent.to_bytes())
    assert (received.files, received.digest) == (sent.files, sent.digest)
    for ours, theirs in zip(sent.locate(np.arange(14)), received.locate(np.arange(14)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_large_one_stays_in_its_file(folder, monkeypatch):
    monkeypatch.setattr(catalog, "MOST_IN_MEMORY", 8)
    sent = load(folder).to_bytes(most=8)
    received = Index.from_bytes(sent)
    assert received.path == str(folder / NAME)
    assert all_of(received) == PAYLOADS


def test_it_takes_nine_bytes_a_record(tmp_path):
    records.write_records(tmp_path / "a.tfrecord", [b"x"] * 10_000)
    assert len(load(tmp_path).to_bytes()) < 9 * 10_000


def test_one_that_stayed_in_a_file_is_not_confused_with_a_later_one(folder):
    sent = load(folder).to_bytes(most=0)
    records.write_records(folder / "3.tfrecord", [b"new"])
    load(folder)
    with pytest.raises(RunError, match=r"another index, written since.*XDG_CACHE_HOME"):
        Index.from_bytes(sent)


def test_one_that_stayed_in_a_file_of_another_host_says_so(folder):
    sent = load(folder).to_bytes(most=0)
    (folder / NAME).unlink()
    with pytest.raises(RunError, match=r"received: .*No such file.*all hosts"):
        Index.from_bytes(sent)


def test_paths_of_any_bytes_travel(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe \n.tfrecord")
    records.write_records(name, [b"a"])
    assert Index.from_bytes(load_index([name]).to_bytes()).files == (name,)
    assert all_of(load_index([name])) == [b"a"]


# How it is kept.


def test_it_is_scanned_once(folder, scanned):
    assert all_of(load(folder)) == PAYLOADS
    assert sorted(scanned) == ["0.tfrecord", "1.tfrecord", "2.tfrecord"]
    again = load(folder)
    assert len(scanned) == 3
    assert all_of(again) == PAYLOADS
    assert again.digest == load(folder, fresh=True).digest
    assert len(scanned) == 6


def test_it_moves_with_its_folder(folder, scanned, tmp_path_factory):
    load(folder)
    moved = tmp_path_factory.mktemp("elsewhere") / "data"
    folder.rename(moved)
    scanned.clear()
    assert all_of(load(moved)) == PAYLOADS
    assert scanned == []


def test_only_an_added_shard_is_scanned(folder, scanned):
    before = load(folder)
    scanned.clear()
    records.write_records(folder / "1a.tfrecord", [b"new", b"er"])
    index = load(folder)
    assert scanned == ["1a.tfrecord"]
    assert all_of(index) == PAYLOADS[:6] + [b"new", b"er"] + PAYLOADS[6:]
    assert index.digest != before.digest


def test_only_a_replaced_shard_is_scanned(folder, scanned):
    before = load(folder)
    scanned.clear()
    path = folder / "0.tfrecord"
    stat = path.stat()
    turned = [payload(0, number) for number in reversed(range(5))]
    records.write_records(path, turned)
    assert path.stat().st_size == stat.st_size
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns + 1))
    index = load(folder)
    assert scanned == ["0.tfrecord"]
    assert all_of(index) == turned + PAYLOADS[5:]
    assert index.digest != before.digest


def test_a_shard_that_has_grown_is_scanned_whatever_its_time_says(folder, scanned):
    load(folder)
    scanned.clear()
    path = folder / "1.tfrecord"
    stat = path.stat()
    records.write_records(path, [b"longer than before", b"and more"])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert all_of(load(folder)) == [*PAYLOADS[:5], b"longer than before", b"and more", *PAYLOADS[6:]]
    assert scanned == ["1.tfrecord"]


def test_a_shard_that_is_gone_goes(folder, scanned):
    load(folder)
    scanned.clear()
    (folder / "1.tfrecord").unlink()
    assert all_of(load(folder)) == PAYLOADS[:5] + PAYLOADS[6:]
    assert scanned == []
    records.write_records(folder / "3.tfrecord", [b"a"])
    load(folder)
    assert sorted(catalog.load(str(folder / NAME)).names) == ["0.tfrecord", "2.tfrecord", "3.tfrecord"]


def test_the_splits_of_a_folder_share_it(tmp_path, scanned):
    for split in ("train", "validation"):
        records.write_records(tmp_path / f"{split}-00000-of-00001", [split.encode()])
    for _ in range(2):
        for split in ("train", "validation"):
            assert all_of(load(str(tmp_path / f"{split}-*"))) == [split.encode()]
    assert len(scanned) == 2


def test_files_of_several_folders_are_kept_in_the_users_cache(folder, tmp_path_factory, users_cache, scanned):
    other = tmp_path_factory.mktemp("other") / "0.tfrecord"
    records.write_records(other, [b"other"])
    files = [str(folder / "0.tfrecord"), str(other)]
    for _ in range(2):
        assert all_of(load_index(files)) == [*PAYLOADS[:5], b"other"]
    assert len(scanned) == 2
    assert not (folder / NAME).exists()
    assert len(kept_in_cache(users_cache)) == 1


def refuse_to_write(monkeypatch, reason, *folders):
    """As a file system does that is read-only or full; root may write to any other."""
    whole_file = index_update.whole_file

    def refusing(path):
        if any(os.fspath(path).startswith(os.fspath(folder)) for folder in folders):
            raise OSError(reason, os.strerror(reason), path)
        return whole_file(path)

    monkeypatch.setattr(index_update, "whole_file", refusing)


@pytest.mark.parametrize("reason", [errno.EROFS, errno.ENOSPC])
def test_of_a_folder_that_cannot_be_written_it_is_kept_in_the_users_cache(
    folder, users_cache, monkeypatch, scanned, said, reason
):
    refuse_to_write(monkeypatch, reason, folder)
    for _ in range(2):
        assert all_of(load(folder)) == PAYLOADS
    assert len(scanned) == 3
    assert len(kept_in_cache(users_cache)) == 1
    assert said == []


def test_where_nothing_can_be_written_it_stays_in_memory_and_says_so(folder, users_cache, monkeypatch, scanned, said):
    refuse_to_write(monkeypatch, errno.EROFS, folder, users_cache)
    for _ in range(2):
        index = load(folder)
        assert all_of(Index.from_bytes(index.to_bytes(most=0))) == PAYLOADS
    assert index.path == ""
    assert len(scanned) == 6
    assert "kept nowhere" in said[0]


def test_an_unusual_reason_is_told(folder, monkeypatch, said):
    refuse_to_write(monkeypatch, errno.EIO, folder)
    load(folder)
    assert len(said) == 1
    assert "cannot be kept" in said[0]


def test_a_disk_that_fills_up_while_it_is_written_leaves_nothing(folder, users_cache, monkeypatch):
    finish = catalog.Writer.finish

    def full(writer):
        finish(writer)
        if os.listdir(users_cache) == []:  # the first place
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(catalog.Writer, "finish", full)
    assert all_of(load(folder)) == PAYLOADS
    assert len(kept_in_cache(users_cache)) == 1
    assert [name for name in os.listdir(folder) if name.startswith(".")] == []


def damaged_copies(whole):
    """Each byte flipped, a few lengths cut, and other things."""
    for place in range(len(whole)):
        yield whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]
    yield from (whole[:size] for size in (0, 1, 16, 17, len(whole) // 2, len(whole) - 1))
    yield whole + b"\0"
    yield b"{}"
    yield whole.replace(b"distfit-index-1", b"distfit-index-2")
    yield gzip.compress(whole)


def test_no_damaged_index_is_ever_taken(folder):
    load(folder)
    path = folder / NAME
    whole = path.read_bytes()
    for damaged in damaged_copies(whole):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"."):
            catalog.load(str(path))


def test_a_damaged_index_is_made_anew_and_said(folder, said, scanned):
    load(folder)
    path = folder / NAME
    path.write_bytes(path.read_bytes()[:-1])
    scanned.clear()
    assert all_of(load(folder)) == PAYLOADS
    assert len(scanned) == 3
    assert len(said) == 1
    assert str(path) in said[0]
    load(folder)
    assert len(scanned) == 3


def test_two_that_write_at_a_time_do_no_harm(tmp_path):
    for number in range(24):
        records.write_records(tmp_path / f"{number:02d}.tfrecord", [b"%d" % number] * (number + 1))
    files, wrong = expand(tmp_path), []

    def use(mine):
        for _ in range(5):
            if all_of(load_index(mine, fresh=True)) != [
                b"%d" % int(f[-11:-9]) for f in mine for _ in range(int(f[-11:-9]) + 1)
            ]:
                wrong.append(mine)

    threads = [threading.Thread(target=use, args=(files[start::3],)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sorted(os.listdir(tmp_path)) == [NAME, *sorted(os.path.basename(file) for file in files)]
    assert catalog.load(str(tmp_path / NAME)) is not None


def test_halves_that_killed_runs_left_long_ago_go(folder):
    old, young = folder / f".{NAME}.old", folder / f".{NAME}.young"
    for half in (old, young):
        half.write_bytes(b"half")
    os.utime(old, (1, 1))
    load_index(expand(folder))
    assert (old.exists(), young.exists()) == (False, True)


def test_progress_is_counted_by_shard(folder):
    from contextlib import contextmanager

    seen = []

    @contextmanager
    def count(title, total, unit):
        seen.append((title, total, unit))
        yield lambda: seen.append("one")

    load(folder, count=count)
    assert seen == [("Indexing", 3, "shards"), "one", "one", "one"]


def test_no_files_are_refused():
    with pytest.raises(InputError, match="received none"):
        load_index([])


def test_a_missing_file_is_refused(folder):
    with pytest.raises(InputError, match=r"9\.tfrecord.*No such file"):
        load_index([str(folder / "9.tfrecord")])


# Compressed files, which have no index.


def compress(path):
    path.write_bytes(gzip.compress(path.read_bytes()))


def test_records_of_compressed_files_are_counted_once(folder, monkeypatch):
    for shard in (0, 2):
        compress(folder / f"{shard}.tfrecord")
    files = expand(folder)
    assert cached_counts(files) is None
    assert count_records(files) == list(SIZES)
    monkeypatch.setattr(index_cache, "scan_file", None)
    assert cached_counts(files) == count_records(files) == list(SIZES)
    assert cached_counts(files[::-1]) == list(SIZES[::-1])


def test_counts_do_not_stand_in_for_an_index(folder):
    compress(folder / "1.tfrecord")
    count_records(expand(folder))
    with pytest.raises(InputError, match=r"1\.tfrecord.*compressed file \(GZIP\)"):
        load(folder)
    with pytest.raises(InputError, match="compressed file"):
        load(folder, damaged="keep")


def test_an_index_knows_the_counts(folder):
    load(folder)
    assert cached_counts(expand(folder)) == list(SIZES)


def test_a_compressed_file_that_is_cut_off_is_not_counted(folder):
    compress(folder / "0.tfrecord")
    path = folder / "0.tfrecord"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"0\.tfrecord"):
        count_records(expand(folder))
    assert cached_counts(expand(folder)) is None


# Files that only TensorFlow can read.


@pytest.fixture
def remote(request):
    import tensorflow as tf

    folder = f"ram://{request.node.name}"
    tf.io.gfile.makedirs(folder)
    for shard, count in enumerate(SIZES):
        with tf.io.TFRecordWriter(f"{folder}/{shard}.tfrecord") as writer:
            for number in range(count):
                writer.write(payload(shard, number))
    return folder


def test_remote_files_are_indexed_and_read(remote, users_cache, scanned):
    for files in (remote, f"{remote}/*.tfrecord", [f"{remote}/{shard}.tfrecord" for shard in range(3)]):
        index = load_index(expand(files))
        order = np.random.default_rng(0).permutation(len(index))
        assert Reader(index).read(order).tolist() == [PAYLOADS[number] for number in order]
    assert len(scanned) == 3
    assert len(kept_in_cache(users_cache)) == 1


def test_remote_files_are_read_by_several_threads(remote):
    reader, wrong = Reader(load(remote)), []

    def use(seed):
        order = np.random.default_rng(seed).integers(0, len(PAYLOADS), 300)
        if reader.read(order).tolist() != [PAYLOADS[number] for number in order]:
            wrong.append(seed)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_missing_remote_files_say_what_is_there(remote):
    with pytest.raises(InputError, match=r"there is no 'valid-\*' in 'ram://.*known are 0\.tfrecord"):
        expand(f"{remote}/valid-*")
    with pytest.raises(InputError, match="there is no folder 'ram://nowhere'"):
        expand("ram://nowhere/train-*")
