"""Rows kept between epochs: what was put is found, by every process of the host, and nothing else; nothing is left."""

import errno
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from distfit.data import cache_file
from distfit.data.cache import Field, RowCache, cached, check_place, fields_of
from distfit.errors import InputError, RunError
from tests.ranks import environment

FIELDS = (Field((5, 3), np.dtype(np.uint8)), Field((), np.dtype(np.int64)), Field((2,), np.dtype(np.float32)))
RECORDS = 50


def rows_of(numbers):
    """What belongs to these records."""
    seeds = [np.random.default_rng(number) for number in numbers]
    return [
        np.stack([seed.integers(0, 256, (5, 3)).astype(np.uint8) for seed in seeds]),
        np.asarray(numbers, np.int64),
        np.stack([seed.normal(size=2).astype(np.float32) for seed in seeds]),
    ]


@pytest.fixture
def make(tmp_path):
    """A cache in a folder of this test; closed in the end."""
    made = []

    def one(where="disk", name="test", records=RECORDS, fields=FIELDS, folder=tmp_path):
        made.append(RowCache(records, fields, where, name, folder))
        return made[-1]

    yield one
    for cache in made:
        cache.close()


def assert_rows(cache, numbers, there):
    hits, rows = cache.get(np.array(numbers))
    assert hits.tolist() == there
    expected = rows_of(numbers)
    for got, wanted in zip(rows, expected, strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_array_equal(got[hits], wanted[hits])
        assert not got[~hits].any()


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_rows_are_found_after_they_were_put(make, where):
    cache = make(where, f"test-{os.getpid()}")
    assert_rows(cache, [3, 0, 49], [False] * 3)
    cache.put(np.array([0, 49]), rows_of([0, 49]))
    assert_rows(cache, [3, 0, 49, 48], [False, True, True, False])
    assert os.path.getsize(cache.path) == cache.bytes
    assert cache.path.startswith("/dev/shm") == (where == "memory")


def test_a_row_of_zeros_is_there(make):
    cache = make(fields=[Field((4,), np.dtype(np.float32))])
    cache.put(np.array([0, 1]), [np.zeros([2, 4], np.float32)])
    assert cache.get(np.array([0, 1, 2]))[0].tolist() == [True, True, False]


def test_the_file_takes_room_as_it_fills(make):
    cache = make(records=2**20, fields=[Field((4096,), np.dtype(np.uint8))])
    assert cache.bytes > 2**32
    assert os.stat(cache.path).st_blocks * 512 < 2**20
    cache.put(np.array([2**20 - 1]), [np.ones([1, 4096], np.uint8)])
    assert 4096 <= os.stat(cache.path).st_blocks * 512 < 2**20


def test_two_caches_of_one_name_are_one_file(make):
    left, right = make(), make()
    left.put(np.array([7]), rows_of([7]))
    assert_rows(right, [7, 8], [True, False])
    left.close()
    right.put(np.array([8]), rows_of([8]))
    assert_rows(right, [7, 8], [True, True])


def test_caches_of_other_names_or_rows_are_others(make):
    make().put(np.array([7]), rows_of([7]))
    assert_rows(make(name="other"), [7], [False])
    assert_rows(make(records=RECORDS + 1), [7], [False])


FILLER = """
import sys, numpy as np
from tests.test_cache import FIELDS, RECORDS, RowCache, rows_of
cache = RowCache(RECORDS, FIELDS, "disk", "test", sys.argv[1])
numbers = np.arange(*map(int, sys.argv[2:4]))
cache.put(numbers, rows_of(numbers))
print("ready", flush=True)
sys.stdin.read()
"""


def process(folder, start, stop):
    arguments = [sys.executable, "-c", FILLER, str(folder), str(start), str(stop)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(arguments, env=environment(), text=True, **pipes)


def test_processes_share_what_each_has_made(make, tmp_path):
    cache = make()
    others = [process(tmp_path, start, start + 20) for start in (0, 20)]
    assert [other.stdout.readline() for other in others] == ["ready\n"] * 2
    assert_rows(cache, range(RECORDS), [True] * 40 + [False] * 10)
    for other in others:
        other.communicate(timeout=60)
    assert_rows(cache, range(40), [True] * 40)
    cache.close()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_leaves_goes_with_the_next_run(make, tmp_path):
    killed = process(tmp_path, 0, 20)
    assert killed.stdout.readline() == "ready\n"
    in_use = make(name="in-use")
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert len(os.listdir(tmp_path)) == 2
    # Of the same name: it may have been of other data.
    cache = make()
    assert_rows(cache, range(20), [False] * 20)
    assert sorted(os.listdir(tmp_path)) == sorted(map(os.path.basename, [in_use.path, cache.path]))


def test_what_another_run_has_open_stays(make, tmp_path):
    running = make(name="running")
    running.put(np.array([1]), rows_of([1]))
    make(name="starting")
    assert os.path.exists(running.path)
    assert_rows(running, [1], [True])


@pytest.mark.parametrize("how", ["close", "forget", "exit"])
def test_nothing_is_left_when_a_run_ends(tmp_path, how):
    if how == "exit":
        ended = process(tmp_path, 0, 3)
        ended.communicate(timeout=60)
        assert ended.returncode == 0
    else:
        cache = RowCache(RECORDS, FIELDS, "disk", "test", tmp_path)
        cache.put(np.array([1]), rows_of([1]))
        if how == "close":
            cache.close()
            cache.close()
        del cache
        gc.collect()
    assert os.listdir(tmp_path) == []


def test_after_the_end_nothing_is_found_or_kept_and_no_other_file_is_touched(tmp_path):
    """Readers ahead may still be at work; the number of a closed file may be another's by then."""
    cache = RowCache(RECORDS, FIELDS, "disk", "test", tmp_path)
    cache.put(np.array([1]), rows_of([1]))
    cache.close()
    others = [open(tmp_path / str(number), "w+b") for number in range(3)]  # noqa: SIM115
    cache.put(np.array([0, 1]), rows_of([0, 1]))
    assert_rows(cache, [0, 1], [False, False])
    for other in others:
        other.close()
    assert [os.path.getsize(tmp_path / str(number)) for number in range(3)] == [0] * 3


def test_the_end_of_a_forked_process_does_not_take_the_file(make, monkeypatch):
    cache = make()
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: -1)
        cache._file.remove()
    assert os.path.exists(cache.path)
    cache._file.remove()
    assert not os.path.exists(cache.path)


def test_closing_late_does_not_take_the_next_runs_file(make):
    late, early = make(), make()
    early.close()
    new = make()
    late.close()
    assert os.path.exists(new.path)
    new.put(np.array([1]), rows_of([1]))
    assert_rows(make(), [1], [True])


@pytest.mark.parametrize("damage", range(4))
def test_half_a_row_is_none(make, damage):
    """As a reader finds it that comes between two writes, or after a process was killed while it wrote."""
    cache = make()
    cache.put(np.array([6, 7, 8]), rows_of([6, 7, 8]))
    slot = cache.bytes // RECORDS
    with open(cache.path, "r+b") as file:
        file.seek(7 * slot)
        whole = file.read(slot)
        stop = slot * (damage + 1) // 5
        # Written up to somewhere, or from somewhere on.
        torn = [whole[:stop] + bytes(slot - stop), bytes(stop) + whole[stop:]][damage % 2]
        file.seek(7 * slot)
        file.write(torn)
    assert torn != whole
    assert_rows(cache, [6, 7, 8], [True, False, True])


def test_a_row_in_another_records_place_is_none(make):
    cache = make()
    cache.put(np.array([6]), rows_of([6]))
    slot = cache.bytes // RECORDS
    with open(cache.path, "r+b") as file:
        file.seek(6 * slot)
        row = file.read(slot)
        file.seek(7 * slot)
        file.write(row)
    assert_rows(cache, [6, 7], [True, False])


def test_readers_beside_writers_see_whole_rows_only(make):
    cache, large = make(fields=[Field((200_000,), np.dtype(np.uint8))], records=4), np.arange(4)
    values = np.repeat(np.arange(1, 5, dtype=np.uint8)[:, None], 200_000, axis=1)
    stop, seen = threading.Event(), []

    def read():
        while not stop.is_set():
            hits, (rows,) = cache.get(large)
            seen.append(np.array_equal(rows[hits], values[hits]))

    reader = threading.Thread(target=read)
    reader.start()
    deadline = time.monotonic() + 20
    while len(seen) < 20 and time.monotonic() < deadline:
        cache.put(large, [values])
    stop.set()
    reader.join()
    assert len(seen) >= 20
    assert all(seen)


def test_a_file_cut_off_by_somebody_is_an_error(make):
    cache = make()
    os.truncate(cache.path, 10)
    with pytest.raises(RunError, match="cut off meanwhile"):
        cache.get(np.array([5]))


@pytest.mark.parametrize(("where", "remedy"), [("memory", 'take cache="disk"'), ("disk", "name another folder")])
def test_too_little_room_is_refused_with_figures(make, monkeypatch, where, remedy):
    monkeypatch.setattr(cache_file, "room_in", lambda folder: 3 * 2**20)
    with pytest.raises(InputError, match=rf"{where}', 1,000 MiB and 64 to spare|1,000 MiB.*3 MiB in .*{remedy}"):
        make(where, fields=[Field((20 * 2**20 - 8,), np.dtype(np.uint8))])


def test_room_is_that_of_the_file_system_and_of_the_container(monkeypatch, tmp_path):
    free = os.statvfs("/dev/shm")
    monkeypatch.setattr(cache_file.cgroups, "memory_left", lambda groups: 12345)
    assert cache_file.room_in("/dev/shm") == min(12345, free.f_bavail * free.f_frsize)
    assert cache_file.room_in(str(tmp_path)) > 12345


def test_without_room_in_memory_it_goes_to_the_temporary_folder_and_says_so(make, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(cache_file, "room_in", lambda folder: 0 if folder == "/dev/shm" else 2**40)
    monkeypatch.setattr(cache_file.tempfile, "gettempdir", lambda: str(tmp_path))
    with caplog.at_level(logging.INFO, "distfit"):
        left = make("memory", f"test-{os.getpid()}")
    assert "does not fit into /dev/shm and goes to" in caplog.text
    assert os.path.dirname(left.path) == str(tmp_path)
    # A rank that comes later finds it, whatever room there is by then.
    monkeypatch.setattr(cache_file, "room_in", lambda folder: 0)
    assert make("memory", f"test-{os.getpid()}").path == left.path


@pytest.mark.parametrize("kind", ["full", "part"])
def test_a_disk_that_fills_up_is_said_and_nothing_is_lost(make, monkeypatch, kind, caplog):
    cache = make(name=kind)
    cache.put(np.array([0]), rows_of([0]))
    write = os.pwritev

    def full(fd, buffers, offset):
        if kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, [buffers[0][:20]], offset)

    monkeypatch.setattr("distfit.data.cache.os.pwritev", full)
    with caplog.at_level(logging.WARNING, "distfit"):
        for number in (1, 2):
            cache.put(np.array([number]), rows_of([number]))
    assert caplog.text.count("has filled up") == 1
    assert_rows(cache, [0, 1, 2], [True, False, False])


def test_a_disk_that_fails_is_an_error(make, monkeypatch):
    def broken(fd, buffers, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    cache = make()
    monkeypatch.setattr("distfit.data.cache.os.pwritev", broken)
    with pytest.raises(RunError, match=r"Expected to write the cache .*Input/output error"):
        cache.put(np.array([1]), rows_of([1]))


def test_a_folder_that_cannot_be_made_is_refused(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"that can be written and locked, received .*file"):
        make(folder=tmp_path / "file" / "folder")


def test_the_users_cache_folder_is_taken_where_none_is_named(make, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert os.path.dirname(make(folder=None).path) == str(tmp_path / "own" / "distfit")


@pytest.mark.parametrize("place", ["tape", True])
def test_other_places_are_refused(place):
    with pytest.raises(InputError, match='Expected cache to be "memory", "disk" or None'):
        check_place(place)


def test_rows_without_a_fixed_size_are_refused_by_name():
    import tensorflow as tf

    for strange, words in {
        tf.TensorSpec([], tf.string): "string of shape",
        tf.TensorSpec([None, 3], tf.uint8): r"uint8 of shape \(None, 3\)",
        tf.SparseTensorSpec([5], tf.int64): "int64 of shape",
    }.items():
        with pytest.raises(InputError, match=rf"received '0/image' as {words}"):
            fields_of(({"image": strange, "size": tf.TensorSpec([2], tf.int64)}, tf.TensorSpec([], tf.int64)))
    with pytest.raises(InputError, match="received the row as string"):
        fields_of(tf.TensorSpec([], tf.string))


def test_fields_come_in_tensorflows_order():
    import tensorflow as tf

    spec = ({"b": tf.TensorSpec([2], tf.int64), "a": [tf.TensorSpec([3], tf.uint8)]}, tf.TensorSpec([], tf.bool))
    assert [field.shape for field in fields_of(spec)] == [tuple(one.shape) for one in tf.nest.flatten(spec)]


def plain_python(function, types):
    import tensorflow as tf

    return lambda *arguments: tf.numpy_function(function, arguments, types, stateful=False)


def test_a_row_function_works_once_for_each_record(make):
    import tensorflow as tf

    from distfit.data.transforms import row_function
    from distfit.data.transforms.draws import derived

    made = []

    def counted(serialized):
        made.append(serialized)
        return np.int64(serialized)

    def transform(serialized):
        number = tf.ensure_shape(tf.numpy_function(counted, [serialized], tf.int64), [])
        return {"number": number, "half": tf.cast(number, tf.float32) / 2}

    row = row_function(transform=[transform, lambda both, seed: (both["number"], both["half"], seed)])
    cache = make(fields=fields_of(row.steady_spec))
    steady = cached(row.steady, row.steady_spec, cache, plain_python)
    seed = tf.constant([1, 2])
    records = tf.data.Dataset.range(RECORDS).map(lambda number: (number, tf.strings.as_string(number)))
    rows = records.map(lambda number, record: row.finish(steady(number, record), seed), num_parallel_calls=2)
    expected = [(number, number / 2, derived(seed, 0, 1).numpy().tolist()) for number in range(RECORDS)]
    for _ in range(3):
        assert [(a, b, c.tolist()) for a, b, c in rows.as_numpy_iterator()] == expected
    assert sorted(map(int, made)) == list(range(RECORDS))
    assert rows.element_spec == records.map(lambda number, record: row(record, seed)).element_spec
