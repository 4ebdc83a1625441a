"""A feed that seeks sees what a run that was not interrupted sees, whatever the data and the number of replicas."""

from __future__ import annotations

import functools
import random
import re
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import distfit
from distfit import thread_ranks
from distfit.backends.transport import Alone
from distfit.data import identity, reader
from distfit.data.feed import Feed
from distfit.data.files import expand
from distfit.data.index_cache import count_records
from distfit.data.passes import Needs, needs_of
from distfit.data.records import write_records
from distfit.data.sources import Request, source_of
from distfit.data.tfrecords import TFRecords
from distfit.errors import InputError
from distfit.topology import Topology

RECORDS, BATCH, EPOCHS = 19, 4, 3  # five steps a pass, the last one of three rows
BAD = (1, 9, 10)


def number_of(record):
    return tf.strings.to_number(record, tf.int64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seek")
    for name in ("plain", "gzip", "counted", "damaged"):
        (folder / name).mkdir()
        bounds = [0, 9, 10, RECORDS]
        for shard in range(3):
            numbers = range(bounds[shard], bounds[shard + 1])
            path = folder / name / f"a-{shard:05d}-of-00003.tfrecord"
            payloads = [b"x" if name == "damaged" and number in BAD else b"%d" % number for number in numbers]
            if name in ("plain", "damaged"):
                write_records(path, payloads)
                continue
            with tf.io.TFRecordWriter(str(path), "GZIP") as file:
                for payload in payloads:
                    file.write(payload)
    count_records(expand(folder / "counted"))
    return folder


def numbers():
    return tf.data.Dataset.range(RECORDS)


class Shuffled(keras.utils.PyDataset):
    """Shuffles itself after each epoch, as many a script does."""

    def __init__(self):
        super().__init__()
        self.order = np.arange(RECORDS)

    def __len__(self):
        return -(-RECORDS // BATCH)

    def __getitem__(self, step):
        return (self.order[step * BATCH : (step + 1) * BATCH],)

    def on_epoch_end(self):
        np.random.shuffle(self.order)


def drawn_in_python():
    """Whose order is drawn where tf.data does not look."""

    def draw():
        order = list(range(RECORDS))
        random.shuffle(order)
        yield from order

    return tf.data.Dataset.from_generator(draw, output_signature=tf.TensorSpec([], tf.int64))


def unequal(context):
    """Of a length that only its end tells, another one on each rank."""
    mine = numbers().filter(lambda number: number % (context.size + context.rank) == 0)
    return mine.shuffle(50, seed=2).batch(2)


# By name: the data, and what they are asked for. Datasets are made of global batches.
KINDS = {
    "records": lambda folder: TFRecords(folder / "plain", transform=number_of),
    "records by windows": lambda folder: TFRecords(folder / "plain", transform=number_of, shuffle_window=8),
    "records, bad ones left out": lambda folder: TFRecords(
        folder / "damaged", transform=number_of, bad_records="skip", most_bad=0.5
    ),
    "streams": lambda folder: TFRecords(folder / "gzip", transform=number_of),
    "streams that were counted": lambda folder: TFRecords(folder / "counted", transform=number_of),
    "arrays": lambda folder: np.arange(RECORDS),
    "arrays, batches shuffled": lambda folder: np.arange(RECORDS),
    "dataset in order": lambda folder: numbers().batch(BATCH),
    "shuffled dataset": lambda folder: numbers().shuffle(50, seed=1).batch(BATCH),
    "shuffled and repeated": lambda folder: numbers().shuffle(50, seed=1).repeat(2).batch(BATCH),
    "shuffled for ever": lambda folder: numbers().shuffle(50, seed=1).repeat().batch(BATCH),
    "of unknown length": lambda folder: numbers().shuffle(50, seed=1).filter(lambda n: n % 5 > 0).batch(BATCH),
    "random numbers": lambda folder: (
        numbers().map(lambda n: n + tf.random.uniform([], 0, 99, tf.int64, 3)).batch(BATCH)
    ),
    "drawn in Python": lambda folder: drawn_in_python().batch(BATCH),
    "PyDataset": lambda folder: Shuffled(),
    "each rank its own": lambda folder: distfit.local(unequal),
}


@functools.cache
def kept(kind, folder, thread):
    """Record files, of which TensorFlow's functions are traced once."""
    return KINDS[kind](folder)


def data_of(kind, folder):
    # A dataset that was iterated goes on with its next order.
    return (kept if kind.startswith(("records", "streams")) else _new)(kind, folder, threading.get_ident())


def _new(kind, folder, _):
    return KINDS[kind](folder)


ENDLESS = ("shuffled for ever",)
OF_RANKS = (
    "records",
    "records, bad ones left out",
    "streams",
    "arrays",
    "shuffled dataset",
    "of unknown length",
    "each rank its own",
)


# Epochs of fewer steps than a pass, of more, and of several a call. Not of a PyDataset, which shuffles while Keras
# reads on in it: its own epochs differ from run to run then.
EPOCHS_OF_STEPS = [
    *((kind, 4, 1) for kind in ("records", "streams that were counted")),
    *((kind, 4, 1) for kind in list(KINDS)[5:] if kind != "PyDataset"),
    *((kind, 8, 1) for kind in ("records by windows", "records, bad ones left out", "streams", "arrays")),
    *((kind, 3, 2) for kind in ("records", "arrays", "shuffled dataset", "shuffled for ever", "of unknown length")),
]


def feed_of(kind, folder, steps=None, execution=1, topology=None, transport=None):
    shuffle = "batch" if kind == "arrays, batches shuffled" else True
    keras.utils.set_random_seed(7)
    x = data_of(kind, folder)
    batch = BATCH if kind.startswith(("records", "streams", "arrays")) else None
    request = Request(batch_size=batch, steps=steps, shuffle=shuffle, seed=3, training=True)
    topology = topology or Topology()
    feed = Feed(source_of(x, request, topology), topology, transport or Alone(), steps, True, execution)
    feed.reset()
    return feed


def rest_of(feed, epochs):
    """For each epoch its calls: (first, the rows of each batch), and what was left out."""
    return [_epoch(feed) for _ in range(epochs)]


def _epoch(feed):
    calls = []
    with feed.catch_stop_iteration():
        for first, last, batches in feed:
            taken = [next(batches)]
            taken += [batch for _ in range(last - first) if (batch := next(batches, None)) is not None]
            calls.append((first, [_rows(batch) for batch in taken]))
    return calls, feed.left_out()


def _rows(batch):
    parts = [data[0] if isinstance(data, tuple) else data for rows, data in batch[1]]
    counts = [int(rows) for rows, _ in batch[1]]
    return [number for count, part in zip(counts, parts, strict=True) for number in part[:count].numpy().tolist()]


def taken_of(calls):
    return sum(len(batches) for _, batches in calls)


def places(whole, execution):
    """Where to seek: beginnings, middles and the ends of epochs."""
    for epoch, (calls, _) in enumerate(whole):
        total = taken_of(calls)
        middle = total // 2 // execution * execution
        for step in sorted(({min(execution, total), total}, {0, middle}, {middle, total})[epoch]):
            yield epoch, step


def after(whole, epoch, step):
    """What an uninterrupted run sees from there on."""
    (calls, left_out), rest = whole[epoch], whole[epoch + 1 :]
    passed, kept = 0, []
    for first, batches in calls:
        if passed >= step:
            kept.append((first, batches))
        passed += len(batches)
    return [(kept, left_out), *rest]


def check(kind, folder, steps=None, execution=1, **where):
    """Every place of some epochs, sought and seen."""
    whole = rest_of(feed_of(kind, folder, steps, execution, **where), EPOCHS)
    for epoch, step in places(whole, execution):
        feed = feed_of(kind, folder, steps, execution, **where)
        feed.seek(epoch, step)
        found, expected = rest_of(feed, EPOCHS - epoch), after(whole, epoch, step)
        if steps is not None:  # what is read ahead at the end of an epoch may count for it
            found, expected = ([calls for calls, _ in epochs] for epochs in (found, expected))
        assert found == expected, (epoch, step)


@pytest.mark.filterwarnings("ignore:.*ran out of data")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ENDLESS])
def test_a_feed_that_seeks_sees_the_rest(kind, folder):
    check(kind, folder)


@pytest.mark.filterwarnings("ignore:.*ran out of data")
@pytest.mark.parametrize(("kind", "steps", "execution"), EPOCHS_OF_STEPS)
def test_so_does_one_whose_epochs_are_no_passes(kind, folder, steps, execution):
    check(kind, folder, steps, execution)


@pytest.mark.filterwarnings("ignore:.*ran out of data")
@pytest.mark.parametrize("kind", ["records", "streams", "arrays", "shuffled dataset", "of unknown length"])
def test_so_does_one_that_takes_several_steps_a_call(kind, folder):
    check(kind, folder, execution=4)


@pytest.mark.filterwarnings("ignore:.*ran out of data")
@pytest.mark.parametrize("kind", OF_RANKS)
def test_ranks_see_together_what_one_sees(kind, folder):
    """The whole run on two ranks, the rest on one, two and three; of what each rank brings, on two."""
    whole = together(kind, folder, 2, 0, 0)
    for size, epoch, step in [(1, 0, 2), (2, 1, 0), (3, 1, 2), (1, 2, taken_of(whole[2][0])), (2, 2, 3)]:
        if kind != "each rank its own" or size == 2:
            assert together(kind, folder, size, epoch, step) == after(whole, epoch, step), (size, epoch, step)


def together(kind, folder, size, epoch, step):
    """The rows of all ranks."""

    def one():
        session = distfit.init()
        feed = feed_of(kind, folder, topology=session.topology, transport=session.transport)
        feed.seek(epoch, step)
        return [
            ([(first, rows_of_ranks) for first, *rows_of_ranks in _gathered(session, calls)], left_out)
            for calls, left_out in rest_of(feed, EPOCHS - epoch)
        ]

    first, *others = thread_ranks.run(one, ranks=size)
    assert all(other == first for other in others)
    return first


def _gathered(session, calls):
    of_ranks = session.transport.gather(calls)
    for of_call in zip(*of_ranks, strict=True):
        batches = zip(*[batches for _, batches in of_call], strict=True)
        yield of_call[0][0], *[[number for rows in parts for number in rows] for parts in batches]


@pytest.mark.filterwarnings("ignore:.*ran out of data")
@settings(max_examples=6, deadline=None)
@given(
    epoch=st.integers(0, 6),
    step=st.integers(0, 20),
    steps=st.sampled_from([None, 2, 5, 7]),
    execution=st.integers(1, 3),
)
def test_arrays_seek_to_any_place(epoch, step, steps, execution):
    feed = feed_of("arrays", None, steps, execution)
    total = taken_of(rest_of(feed, epoch + 1)[epoch][0])
    step = min(step // execution * execution, total)
    whole = rest_of(feed_of("arrays", None, steps, execution), epoch + 2)
    feed = feed_of("arrays", None, steps, execution)
    feed.seek(epoch, step)
    assert rest_of(feed, 2) == after(whole, epoch, step)


def test_nothing_before_the_place_is_read_of_numbered_records(folder, monkeypatch):
    read = []
    read_each = reader.Reader.read_each
    monkeypatch.setattr(
        reader.Reader, "read_each", lambda self, numbers: read.extend(numbers.tolist()) or read_each(self, numbers)
    )
    feed = feed_of("records", folder)
    feed.seek(2, 3)
    seen = [number for (calls, _) in rest_of(feed, 1) for _, batches in calls for number in batches[0]]
    assert sorted(read) == sorted(seen)
    assert len(read) == RECORDS - 3 * BATCH


def test_weights_come_with_the_rows_that_they_are_of():
    def feed():
        keras.utils.set_random_seed(1)
        x = np.arange(RECORDS)
        request = Request(y=x % 3, class_weight={0: 1.0, 1: 2.0, 2: 3.0}, batch_size=BATCH, shuffle=True)
        made = Feed(source_of(x, request, Topology()), Topology(), Alone())
        made.reset()
        return made

    whole = [[leaf.numpy().tolist() for leaf in next(batches)[1][0][1]] for _, _, batches in feed()]
    sought = feed()
    sought.seek(5, 2)
    assert [[leaf.numpy().tolist() for leaf in next(batches)[1][0][1]] for _, _, batches in sought] == whole[2:]


def test_a_run_that_began_later_has_passed_over_its_data_less_often(folder):
    whole = rest_of(feed_of("shuffled dataset", folder), EPOCHS)
    feed = feed_of("shuffled dataset", folder)
    feed.seek(6, 2, began=5)
    assert rest_of(feed, 1) == after(whole, 1, 2)[:1]


def test_a_feed_that_is_reset_begins_at_its_beginning(folder):
    feed = feed_of("arrays", folder)
    whole = rest_of(feed, 1)
    feed.seek(3, 2)
    feed.reset()
    assert rest_of(feed, 1) == whole


def test_states_of_python_that_no_data_draw_on_stay(folder):
    feed = feed_of("shuffled dataset", folder)
    random.seed(5)
    np.random.seed(6)
    expected = random.Random(5).random(), np.random.RandomState(6).rand()
    feed.seek(1, 1)
    assert (random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("replicas", [1, 3])
def test_the_fingerprint_of_the_place_is_that_of_the_batch_before_it(folder, replicas):
    topology = Topology(replicas_per_process=replicas)
    feed = feed_of("random numbers", folder, topology=topology)
    alone = feed_of("random numbers", folder)
    assert feed.fingerprint() is None
    found = []
    with alone.catch_stop_iteration():
        for _, _, batches in alone:
            next(batches)
            found.append(alone.fingerprint())
    feed.seek(0, 3)
    assert feed.fingerprint() == found[2]
    assert len(set(found)) == len(found)


def test_a_step_that_there_is_not_is_refused(folder):
    with pytest.raises(InputError, match="within the 5 steps of an epoch, received step 6"):
        feed_of("arrays", folder).seek(1, 6)
    with pytest.raises(InputError, match=r"Expected data with 7 batches in an epoch.* received 5"):
        feed_of("drawn in Python", folder).seek(0, 7)


@pytest.mark.parametrize("kind", ["records", "arrays", "drawn in Python"])
def test_a_step_within_a_call_of_several_is_refused(kind, folder):
    with pytest.raises(InputError, match="a multiple of steps_per_execution=2, received step 3"):
        feed_of(kind, folder, execution=2).seek(1, 3)


def test_local_data_of_another_number_of_ranks_go_on_between_epochs_only(folder):
    with pytest.raises(InputError, match="go on within an epoch on 2 ranks, as it began, received 1"):
        feed_of("each rank its own", folder).seek(1, 1, ranks=2)
    feed_of("each rank its own", folder).seek(1, 0, ranks=2)


RANDOM = tf.random.Generator.from_seed(1)
DATASETS = {
    "in order": (lambda: numbers().batch(2), Needs.NOTHING),
    "kept": (lambda: numbers().cache().repeat(2).batch(2), Needs.NOTHING),
    "shuffled": (lambda: numbers().shuffle(9, seed=1).batch(2).prefetch(2), Needs.BEGINNINGS),
    "shuffled in the midst": (
        lambda: numbers().shuffle(9, seed=1).filter(lambda n: n > 2).map(lambda n: n + 1, 2).padded_batch(3).skip(1),
        Needs.BEGINNINGS,
    ),
    "shuffled files": (
        lambda: numbers().shuffle(9, seed=1).interleave(tf.data.Dataset.range, num_parallel_calls=2).batch(2).take(9),
        Needs.BEGINNINGS,
    ),
    "shuffled beside others": (
        lambda: tf.data.Dataset.zip(numbers(), numbers().shuffle(9, seed=1).shard(2, 1).enumerate()).batch(2).unbatch(),
        Needs.BEGINNINGS,
    ),
    "shuffled twice": (lambda: numbers().shuffle(9, seed=1).map(lambda n: n + 1).shuffle(9, seed=2), Needs.BATCHES),
    "repeated": (lambda: numbers().shuffle(9, seed=1).repeat(2), Needs.BATCHES),
    "shuffled, kept": (lambda: numbers().shuffle(9, seed=1).cache(), Needs.BATCHES),
    "shuffled within": (
        lambda: numbers().interleave(lambda n: tf.data.Dataset.range(n).shuffle(9, seed=1)),
        Needs.BATCHES,
    ),
    "given from outside": (
        lambda: (lambda inner: numbers().flat_map(lambda _: inner))(numbers().shuffle(9, seed=1)),
        Needs.BATCHES,
    ),
    "random": (lambda: numbers().map(lambda _: tf.random.uniform([], seed=1)), Needs.BATCHES),
    "a generator": (lambda: numbers().map(lambda _: RANDOM.uniform([])), Needs.BATCHES),
    "Python": (drawn_in_python, Needs.BATCHES),
    "Python that says it has no state": (
        lambda: numbers().map(lambda n: tf.numpy_function(np.negative, [n], tf.int64, stateful=False)),
        Needs.BATCHES,
    ),
}


@pytest.mark.parametrize("name", DATASETS)
def test_what_a_pass_depends_on(name):
    make, expected = DATASETS[name]
    assert needs_of(make()) is expected


@pytest.mark.parametrize("name", [name for name, (_, needs) in DATASETS.items() if needs is not Needs.BATCHES])
def test_a_pass_is_what_it_was_after_as_much_as_it_depends_on(name):
    make, needs = DATASETS[name]

    def rows(dataset):
        return str(list(dataset.as_numpy_iterator()))

    read, begun = make(), make()
    for _ in range(3):
        rows(read)
        if needs is Needs.BEGINNINGS:
            iter(begun)
    assert rows(begun) == rows(read)


def identity_of(x, steps=None, **asked):
    request = Request(**{"batch_size": BATCH, "shuffle": True, **asked})
    return Feed(source_of(x, request, Topology()), Topology(), Alone(), steps).identity()


def test_files_are_recognised_elsewhere_and_others_are_not(folder, tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_records(tmp_path / name / "a.tfrecord", [b"1", b"2"])
    here, there = (identity_of(TFRecords(tmp_path / name, transform=number_of)) for name in ("here", "there"))
    assert here == there
    assert here["records"] == 2
    assert here["rows"] == "int64[]"
    write_records(tmp_path / "there" / "a.tfrecord", [b"1", b"23"])
    changed = identity_of(TFRecords(tmp_path / "there", transform=number_of))
    assert [name for name in here if here[name] != changed[name]] == ["bytes", "names and sizes"]
    streams = identity_of(TFRecords(folder / "gzip", transform=number_of))
    counted = identity_of(TFRecords(folder / "counted", transform=number_of))
    assert streams == counted
    assert streams["read"] == "as streams"


def test_arrays_are_recognised_by_their_content():
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    same, other = identity_of(x.copy(), y=y), x.copy()
    other[5, 1] = 7
    assert identity_of(x, y=y) == same
    assert [name for name, value in identity_of(other, y=y).items() if value != same[name]] == ["content"]
    assert same["arrays"] == "float64[6,2], int64[6]"
    assert identity_of(x, y=y, steps=3)["steps per epoch"] == 3


def test_of_large_arrays_blocks_are_read_and_the_value_says_so():
    x = np.arange(2**22, dtype=np.int64)
    found = identity.of_arrays([x, np.arange(3)], most_bytes=2**23)["content"]
    assert re.search(r"blocks of [78],\d{3},\d{3} of 33,554,456 bytes", found)
    for place in (0, -1):
        changed = x.copy()
        changed[place] = 1
        assert identity.of_arrays([changed, np.arange(3)], most_bytes=2**23)["content"] != found


def test_strings_of_python_are_recognised_by_what_they_say():
    texts = [np.array(["".join(word), None], dtype=object) for word in ("ab", "ab", "ac")]
    one, same, other = (identity.of_arrays([text])["content"] for text in texts)
    assert one == same != other


def test_identity_of_all_else_is_its_kind_and_length():
    assert identity_of(numbers().batch(3), batch_size=None) == {
        "kind": "tf.data.Dataset",
        "batches": 7,
        "rows": "int64[]",
    }
    assert identity_of(Shuffled(), batch_size=None)["kind"] == "PyDataset Shuffled"
    own = distfit.local(lambda context: numbers().batch(2))
    assert identity_of(own, batch_size=None) == {"kind": "distfit.local", "rows": "int64[]"}
