"""Streams: every record once and the same batches for any number of processes, whatever the files are like."""

import contextlib
import gc
import gzip
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distfit.data import framing, records, streaming
from distfit.data.bad_records import BadRecord, Tally
from distfit.data.lanes import Deal
from distfit.data.streaming import Streams
from distfit.errors import InputError, RunError
from tests.ranks import environment

SIZES = (5, 40, 1, 17, 0, 23, 9)
RECORDS = sum(SIZES)
FORMS = {"plain": bytes, "gzip": gzip.compress, "zlib": lambda data: zlib.compress(data, 4)}


def payload_of(shard, number):
    return b"%d.%d" % (shard, number) * (1 + number % 3)


def write_shards(folder, sizes, form="plain"):
    """Files of these many records; one without any is compressed, as an empty file is none."""
    files = []
    for shard, size in enumerate(sizes):
        path = folder / f"train-{shard:05d}"
        records.write_records(path, [payload_of(shard, number) for number in range(size)])
        compress = FORMS[form if size or form != "plain" else "gzip"]
        path.write_bytes(compress(path.read_bytes()))
        files.append(str(path))
    return files


@pytest.fixture
def files(tmp_path):
    return write_shards(tmp_path, SIZES)


def all_numbers(sizes=SIZES):
    return sorted(shard << 40 | number for shard, size in enumerate(sizes) for number in range(size))


def steps_of(streams, **arguments):
    """The numbers of each step of one process; that records are those of their numbers is looked at here."""
    asked = {"seed": 0, "epoch": 0, "shuffle": True, "global_batch": 16, **arguments}
    steps = []
    for numbers, payloads in streams.steps(**asked):
        assert numbers.dtype == np.int64
        assert payloads == [payload_of(number >> 40, number & 2**40 - 1) for number in numbers.tolist()]
        steps.append(numbers.tolist())
    return steps


def together(files, size, sizes=None, **arguments):
    """The global batches that `size` processes read; with known `sizes` of files or without."""
    options = {name: arguments.pop(name) for name in ("lanes", "window") if name in arguments}
    ranks = [
        steps_of(Streams(files, counts=sizes, **options), rank=rank, size=size, **arguments) for rank in range(size)
    ]
    most = max(map(len, ranks))
    assert sizes is None or {len(steps) for steps in ranks} == {most}
    return [[number for steps in ranks if step < len(steps) for number in steps[step]] for step in range(most)]


def flat(steps):
    return [number for step in steps for number in step]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("distfit-lane")]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    if threads():  # an epoch that was left, held by a traceback
        gc.collect()
    assert threads() == []


# Each record once, in one order.


@pytest.mark.parametrize("counts", [None, SIZES], ids=["unknown", "counted"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_record_comes_once(tmp_path, form, shuffle, counts):
    files = write_shards(tmp_path, SIZES, form)
    steps = steps_of(Streams(files, lanes=4, window=8, counts=counts), shuffle=shuffle)
    assert sorted(flat(steps)) == all_numbers()


@pytest.mark.parametrize("compression", ["GZIP", "ZLIB", None])
def test_the_form_can_be_said(tmp_path, compression):
    files = write_shards(tmp_path, (3, 4), {"GZIP": "gzip", "ZLIB": "zlib", None: "plain"}[compression])
    assert sorted(flat(steps_of(Streams(files, compression)))) == all_numbers((3, 4))


def test_what_tensorflow_compresses_is_read(tmp_path):
    import tensorflow as tf

    for shard, options in enumerate(("GZIP", "ZLIB", tf.io.TFRecordOptions("ZLIB", compression_level=3))):
        with tf.io.TFRecordWriter(str(tmp_path / str(shard)), options) as writer:
            for number in range(6):
                writer.write(payload_of(shard, number))
    files = [str(tmp_path / str(shard)) for shard in range(3)]
    assert sorted(flat(steps_of(Streams(files)))) == all_numbers((6, 6, 6))


def test_a_file_system_of_tensorflow_is_read(tmp_path):
    import tensorflow as tf

    local = write_shards(tmp_path, (12, 3), "gzip")
    files = [f"ram://streams/{os.path.basename(file)}" for file in local]
    for here, there in zip(local, files, strict=True):
        tf.io.gfile.copy(here, there, overwrite=True)
    assert sorted(flat(steps_of(Streams(files)))) == all_numbers((12, 3))


@pytest.mark.parametrize("counts", [None, SIZES], ids=["unknown", "counted"])
@pytest.mark.parametrize("size", [2, 3, 5, 40])
def test_any_number_of_processes_reads_the_same_batches(files, size, counts):
    options = {"sizes": counts, "lanes": 4, "window": 6}
    assert together(files, size, **options) == together(files, 1, **options)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_batches_are_the_same_for_anyone(tmp_path_factory, data):
    sizes = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=6), "sizes")
    files = write_shards(tmp_path_factory.mktemp("shards"), sizes)
    options = {
        "sizes": data.draw(st.sampled_from([None, sizes]), "counts"),
        "lanes": data.draw(st.integers(1, 8), "lanes"),
        "window": data.draw(st.integers(1, 20), "window"),
        "global_batch": data.draw(st.integers(1, 40), "global_batch"),
        "shuffle": data.draw(st.booleans(), "shuffle"),
        "epoch": data.draw(st.integers(0, 3), "epoch"),
    }
    steps = together(files, data.draw(st.integers(1, 12), "size"), **options)
    assert steps == together(files, 1, **options)
    assert sorted(flat(steps)) == all_numbers(sizes)
    assert all(steps)
    if options["sizes"] is not None:
        batch = options["global_batch"]
        assert [len(step) for step in steps[:-1]] == [batch] * (len(steps) - 1)
        assert len(steps) == Streams(files, counts=sizes).num_steps(batch)


def test_epochs_and_seeds_differ_and_repeat(files):
    streams = Streams(files, lanes=3, window=8)
    orders = [flat(steps_of(streams, seed=seed, epoch=epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_without_shuffle_lanes_take_turns_in_the_order_of_the_files(tmp_path):
    files = write_shards(tmp_path, (4, 4, 4, 4))
    steps = steps_of(Streams(files, lanes=2, window=3), shuffle=False, global_batch=4)
    assert [[(number >> 40, number & 255) for number in step] for step in steps] == [
        [(0, 0), (0, 1), (1, 0), (1, 1)],
        [(0, 2), (0, 3), (1, 2), (1, 3)],
        [(2, 0), (2, 1), (3, 0), (3, 1)],
        [(2, 2), (2, 3), (3, 2), (3, 3)],
    ]


def test_one_lane_without_shuffle_is_the_order_of_the_files(files):
    assert flat(steps_of(Streams(files, lanes=1), shuffle=False)) == all_numbers()


def test_a_window_mixes_as_far_as_it_reaches_and_no_further_ahead(tmp_path):
    files = write_shards(tmp_path, (2000,))
    window = 100
    order = np.array(flat(steps_of(Streams(files, window=window))))
    moved = order - np.arange(2000)
    assert moved.max() < window
    # Each record waits for a number of draws that is geometric with a mean of the window.
    assert 0.7 * window < np.abs(moved).mean() < 1.3 * window
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.05


def test_the_order_is_the_one_of_the_first_release(tmp_path):
    """A resumed run meets the order that it began with, whatever the versions of numpy and Python."""
    files = write_shards(tmp_path, (4, 4, 4))
    steps = steps_of(Streams(files, lanes=2, window=2), global_batch=6, seed=7, epoch=1)
    assert [[(number >> 40) * 10 + (number & 255) for number in step] for step in steps] == [
        [0, 1, 3, 21, 22, 20],
        [10, 11, 12, 23],
        [13, 2],
    ]


@pytest.mark.parametrize("counts", [None, SIZES], ids=["unknown", "counted"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_later_step_can_be_the_first(files, size, counts):
    options = {"sizes": counts, "lanes": 4, "window": 6, "global_batch": 8}
    whole = together(files, size, **options)
    assert together(files, size, first_step=5, **options) == whole[5:]


@pytest.mark.parametrize("shuffle", [True, False])
def test_files_that_lie_before_the_first_step_are_not_read(tmp_path, monkeypatch, shuffle):
    sizes = (50,) * 20
    files = write_shards(tmp_path, sizes)
    whole = together(files, 1, sizes=sizes, lanes=2, window=5, shuffle=shuffle)
    read, original = [], streaming.read_shard
    monkeypatch.setattr(streaming, "read_shard", lambda file, form: read.append(file) or original(file, form))
    rest = together(files, 1, sizes=sizes, lanes=2, window=5, shuffle=shuffle, first_step=50)  # of 63
    assert rest == whole[50:]
    assert 4 <= len(read) <= 7


# How the lanes are shared out.


def test_long_files_are_spread_over_the_whole_epoch(tmp_path):
    sizes = (1000, 10, 10, 10)
    files = write_shards(tmp_path, sizes)
    steps = together(files, 1, sizes=sizes, lanes=4, global_batch=103)
    assert [len(step) for step in steps] == [103] * 10
    assert [sum(number >> 40 == 0 for number in step) for step in steps] == [100] * 10


def test_processes_have_an_equal_share_of_a_step_whatever_their_number():
    for counts in (None, [1000 + 7 * file for file in range(37)], [10, 2000, 30, 500]):
        deal = Deal.of(37 if counts is None else len(counts), 16, seed=0, epoch=0, shuffle=True, counts=counts)
        for size in (2, 3, 5, 8, 16, 24):
            rows = [
                sum(own.stop - own.start for _, _, own in deal.part(rank, size).of_step(960, 1440))
                for rank in range(size)
            ]
            assert sum(rows) == 480
            assert max(rows) <= 480 / size * 1.25 + 1


def test_no_lane_is_read_twice_where_lanes_are_a_multiple_of_the_processes():
    deal = Deal.of(files=100, lanes=16, seed=0, epoch=0, shuffle=True, counts=[1250 + file % 3 for file in range(100)])
    for size in (1, 2, 4, 8, 16):
        read = [lane for rank in range(size) for lane in deal.part(rank, size).shares]
        assert read == list(range(16))


def test_the_number_of_steps_is_known_where_records_are_counted(files):
    assert Streams(files, counts=SIZES).num_steps(16) == -(-RECORDS // 16)
    assert Streams(files, counts=SIZES).records == RECORDS
    assert Streams(files).num_steps(16) is None
    assert Streams(files).records is None


def test_a_number_says_where_its_record_is(files):
    assert Streams(files).place_of(3 << 40 | 12) == (files[3], 12, None)


# What is damaged.


def flip(path, at):
    data = bytearray(Path(path).read_bytes())
    data[at] ^= 1
    Path(path).write_bytes(data)


def start_of(number, shard=1):
    return sum(16 + len(payload_of(shard, before)) for before in range(number))


def cut(path, size):
    os.truncate(path, size)


# What is done to the second file, of 40 records; the records that are then gone, and what is said.
FAULTS = {
    "a flipped bit in a payload": (lambda path: flip(path, start_of(7) + 12), [7], "do not match their checksum"),
    "a flipped bit in a length": (lambda path: flip(path, start_of(7)), range(7, 40), "length that does not match"),
    "a file that is cut off": (lambda path: cut(path, start_of(7) + 5), range(7, 40), "the end of the file"),
    "a file cut within a payload": (lambda path: cut(path, start_of(8) - 5), range(7, 40), "the end of the file"),
    "an empty file": (lambda path: cut(path, 0), range(40), "an empty file"),
    "a file that has vanished": (os.unlink, range(40), "is not there"),
    "a text": (lambda path: Path(path).write_text("name,label\na,1\n"), range(40), "no TFRecord file"),
}


@pytest.mark.parametrize("counts", [None, SIZES], ids=["unknown", "counted"])
@pytest.mark.parametrize("fault", FAULTS)
def test_damage_raises(files, fault, counts):
    damage, gone, what = FAULTS[fault]
    damage(files[1])
    with pytest.raises(BadRecord, match=what) as caught:
        steps_of(Streams(files, counts=counts))
    assert caught.value.file == files[1]
    assert caught.value.number in (None, gone[0])


@pytest.mark.parametrize("counts", [None, SIZES], ids=["unknown", "counted"])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_left_out_and_nothing_else(files, fault, size, counts):
    whole = together(files, size, sizes=counts, lanes=4)
    damage, gone, _ = FAULTS[fault]
    damage(files[1])
    tally = Tally("skip", most=1)
    steps = together(files, size, sizes=counts, lanes=4, tally=tally)
    lost = {1 << 40 | number for number in gone}
    assert sorted(flat(steps)) == sorted(set(all_numbers()) - lost)
    if counts is not None:
        assert steps == [[number for number in step if number not in lost] for step in whole]
        assert tally.by_file == {files[1]: len(gone)}
    else:
        assert tally.by_file == {files[1]: 1}


@pytest.mark.parametrize("form", ["gzip", "zlib"])
@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: cut(path, os.path.getsize(path) // 2), "the end of the file within its"),
        (lambda path: cut(path, os.path.getsize(path) - 3), "the end of the file within its"),
        (lambda path: flip(path, os.path.getsize(path) // 2), "bytes that are not|length that does not match"),
        (lambda path: flip(path, os.path.getsize(path) - 1), "bytes that are not"),
        (lambda path: Path(path).write_bytes(Path(path).read_bytes() + b"more"), "bytes that are not|after the end"),
    ],
    ids=["cut off", "last bytes missing", "flipped bit", "flipped bit in the checksum", "bytes behind it"],
)
def test_damaged_compression_loses_the_rest_of_its_file(tmp_path, form, damage, what):
    files = write_shards(tmp_path, (400, 6), form)
    damage(files[0])
    with pytest.raises(BadRecord, match=what):
        steps_of(Streams(files))
    tally = Tally("skip", most=1)
    seen = flat(steps_of(Streams(files), tally=tally))
    first = [number for number in seen if number >> 40 == 0]
    assert sorted(first) == list(range(len(first)))
    assert len(seen) == len(first) + 6
    assert set(tally.by_file) == {files[0]}


def test_what_is_lost_says_how_much_was_read(files):
    flip(files[1], start_of(7))
    with pytest.raises(BadRecord, match="what comes after the first 7 records of this file is lost"):
        steps_of(Streams(files))


def test_more_bad_records_than_may_be_end_the_run(files):
    cut(files[1], start_of(7))
    with pytest.raises(RunError, match=r"at most 5\.00% of 95 records"):
        steps_of(Streams(files, counts=SIZES), tally=Tally("skip", most=0.05, records=RECORDS))


@pytest.mark.parametrize("shard", [1, 6], ids=["followed by others", "the last of its lane"])
def test_a_file_that_has_grown_since_it_was_counted_is_noticed(files, shard):
    records.write_records(files[shard], [payload_of(shard, number) for number in range(SIZES[shard] + 1)])
    with pytest.raises(RunError, match="received more: the file has changed"):
        steps_of(Streams(files, lanes=2, counts=SIZES), shuffle=False)


def test_a_file_that_has_shrunk_since_it_was_counted_is_noticed(files):
    records.write_records(files[3], [payload_of(3, number) for number in range(16)])
    with pytest.raises(BadRecord, match="17 records were counted in it, and it has 16 now"):
        steps_of(Streams(files, counts=SIZES))


def test_storage_that_fails_ends_the_run_also_where_bad_records_are_skipped(files):
    os.unlink(files[2])
    os.mkdir(files[2])
    with pytest.raises(RunError, match=r"Expected to read .*: Is a directory"):
        steps_of(Streams(files), tally=Tally("skip", most=1))


def test_a_form_that_is_not_the_files_is_said(tmp_path):
    files = write_shards(tmp_path, (3,), "gzip")
    with pytest.raises(BadRecord, match=r"this file is compressed \(GZIP\)"):
        steps_of(Streams(files, compression=None))
    with pytest.raises(BadRecord, match="bytes that are not ZLIB"):
        steps_of(Streams(files, compression="ZLIB"))


# The framing.


def read(path):
    return list(framing.read_shard(str(path)))


def test_records_that_begin_like_compressed_files_are_read(tmp_path):
    for begin in (0x8B1F, 0x0178, 0x9C78):
        records.write_records(tmp_path / "a", [bytes(begin)])
        assert read(tmp_path / "a") == [bytes(begin)]


def test_long_records_cross_pieces(tmp_path):
    payloads = [bytes([number]) * size for number, size in enumerate((10, 3 * framing.PIECE + 7, 0, 2 * framing.PIECE))]
    records.write_records(tmp_path / "a", payloads)
    assert read(tmp_path / "a") == payloads
    (tmp_path / "b").write_bytes(gzip.compress((tmp_path / "a").read_bytes()))
    assert read(tmp_path / "b") == payloads


def test_gzip_files_one_after_the_other_are_one(tmp_path):
    first, second = (Path(file).read_bytes() for file in write_shards(tmp_path, (3, 4), "gzip"))
    (tmp_path / "both").write_bytes(first + second)
    assert read(tmp_path / "both") == [payload_of(0, n) for n in range(3)] + [payload_of(1, n) for n in range(4)]


def test_a_little_that_becomes_much_is_expanded_in_pieces(tmp_path):
    compressed = zlib.compress(bytes(64 * framing.PIECE))
    assert len(compressed) < framing.PIECE / 10
    pieces = list(framing.expanded(iter([compressed]), "ZLIB"))
    assert sum(map(len, pieces)) == 64 * framing.PIECE
    assert max(map(len, pieces)) <= framing.PIECE


@settings(deadline=None, max_examples=50)
@given(
    payloads=st.lists(st.binary(max_size=300), max_size=20),
    piece=st.integers(1, 700),
    form=st.sampled_from(["GZIP", "ZLIB"]),
)
def test_any_cut_into_pieces_expands_to_the_same(payloads, piece, form):
    data = b"".join(payloads)
    compressed = gzip.compress(data) if form == "GZIP" else zlib.compress(data)
    pieces = [compressed[at : at + piece] for at in range(0, len(compressed), piece)]
    assert b"".join(framing.expanded(iter(pieces), form)) == data


def test_counting_reads_the_whole_file(tmp_path):
    files = write_shards(tmp_path, (30,), "gzip")
    (tmp_path / "plain").mkdir()
    plain = records.scan_file(write_shards(tmp_path / "plain", (30,))[0])
    assert framing.count_records(files[0]) == (30, plain.framing)
    cut(files[0], os.path.getsize(files[0]) - 20)
    with pytest.raises(BadRecord, match="the end of the file within its GZIP"):
        framing.count_records(files[0])


# Threads.


def test_threads_end_with_the_epoch(files):
    steps_of(Streams(files, lanes=3))
    assert threads() == []


@pytest.fixture
def long_files(tmp_path):
    """More than fits into what is read ahead."""
    for name in "abc":
        records.write_records(tmp_path / name, [bytes(100_000)] * 100)
    return [str(tmp_path / name) for name in "abc"]


def test_threads_end_where_an_epoch_is_left(long_files):
    steps = Streams(long_files, window=4).steps(seed=0, epoch=0, shuffle=True, global_batch=4)
    next(steps)
    assert threads() != []
    del steps
    gc.collect()
    assert threads() == []


def test_threads_end_when_the_streams_are_closed_and_the_rest_is_refused(long_files):
    streams = Streams(long_files, window=4)

    def begin():
        return streams.steps(seed=0, epoch=0, shuffle=True, global_batch=4)

    steps = begin()
    next(steps)
    streams.close()
    assert threads() == []
    with pytest.raises(RunError, match="streams that are open"):
        list(steps)
    assert sum(len(numbers) for numbers, _ in begin()) == 300  # a later epoch opens the files again


def framed(payload):
    return records.header_of(len(payload)) + payload + records.masked_crc(payload).to_bytes(4, "little")


def test_closing_does_not_wait_for_what_comes_before_the_first_step(tmp_path):
    os.mkfifo(tmp_path / "endless")

    def write():
        with contextlib.suppress(BrokenPipeError), open(tmp_path / "endless", "wb") as file:
            while True:
                file.write(framed(b"a") * 1000)

    writer = threading.Thread(target=write)
    writer.start()
    streams = Streams([str(tmp_path / "endless")], compression=None)
    threading.Timer(0.3, streams.close).start()
    with pytest.raises(RunError, match="streams that are open"):
        next(streams.steps(seed=0, epoch=0, shuffle=True, global_batch=4, first_step=10**12))
    writer.join(60)
    assert not writer.is_alive()


def test_ctrl_c_while_waiting_for_storage_ends_the_threads(tmp_path):
    os.mkfifo(tmp_path / "silent")
    writing = []
    # The reader's thread hangs in a read until the other end is closed.
    opener = threading.Thread(target=lambda: writing.append(os.open(tmp_path / "silent", os.O_WRONLY)))
    opener.start()
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    threading.Timer(0.6, lambda: os.close(writing.pop())).start()
    with pytest.raises(KeyboardInterrupt):
        steps_of(Streams([str(tmp_path / "silent")], compression=None))
    opener.join(60)
    assert threads() == []


def test_threads_end_where_the_opening_of_lanes_is_interrupted(long_files, monkeypatch):
    streams = Streams(long_files, window=4)
    original, opened = streams._ahead, []

    def interrupted(*arguments):
        if len(opened) == 2:
            raise KeyboardInterrupt
        opened.append(original(*arguments))
        return opened[-1]

    monkeypatch.setattr(streams, "_ahead", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(streams.steps(seed=0, epoch=0, shuffle=True, global_batch=4))
    assert len(opened) == 2
    assert threads() == []


LEAVING = """
import sys
from distfit.data.streaming import Streams

steps = Streams(sys.argv[1:], window=4).steps(seed=0, epoch=0, shuffle=True, global_batch=4)
print(len(next(steps)[0]), "tensorflow" in sys.modules)
"""


def test_a_program_ends_while_streams_are_open_and_needs_no_tensorflow(long_files):
    command = [sys.executable, "-c", LEAVING, *long_files]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "4 False\n", "")


def test_memory_is_bounded_while_nobody_takes(tmp_path):
    path = tmp_path / "a"
    records.write_records(path, [bytes(100_000)] * 200)  # 20 MB
    opened = []
    original = framing.chunks

    def counted(file, size):
        for piece in original(file, size):
            opened.append(len(piece))
            yield piece

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(framing, "chunks", counted)
        steps = Streams([str(path)], window=10, read_ahead=2).steps(seed=0, epoch=0, shuffle=True, global_batch=1)
        next(steps)
        time.sleep(0.3)
        # A window of a megabyte, two blocks that wait, one with the taker, one in work, and a piece.
        assert sum(opened) <= 7 * 2**20
        steps.close()


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"files": []}, "at least one TFRecord file"),
        ({"compression": "LZ4"}, "compression"),
        ({"lanes": 0}, "lanes"),
        ({"window": 0}, "window"),
        ({"read_ahead": 0.5}, "read_ahead"),
        ({"counts": [1, 2]}, "a count for each"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Streams(**{"files": ["a"], **arguments})


def test_a_step_beyond_the_epoch_is_refused(files):
    with pytest.raises(InputError, match="below the epoch's 6 steps"):
        steps_of(Streams(files, counts=SIZES), first_step=6)
    with pytest.raises(InputError, match="0 or more, received -1"):
        steps_of(Streams(files), first_step=-1)
