"""How the batches of a training follow each other over epochs and passes over the data."""

import numpy as np
import pytest
import tensorflow as tf

from distfit.backends.transport import Alone
from distfit.data.feed import Feed
from distfit.data.records import write_records
from distfit.data.sources import Request, source_of
from distfit.data.tfrecords import TFRecords
from distfit.topology import Topology

RECORDS, BATCH = 10, 4  # three steps a pass, the last one of two rows


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    write_records(str(folder / "numbers.tfrecord"), [b"%d" % number for number in range(RECORDS)])
    return TFRecords(folder, transform=lambda text: tf.strings.to_number(text, tf.int64))


def epochs(records, count, *, first=0, steps=None, endless=True):
    """The records of each epoch's steps."""
    request = Request(batch_size=BATCH, steps=steps, shuffle=True, seed=3)
    feed = Feed(source_of(records, request, Topology()), Topology(), Alone(), steps, endless)
    feed.start_at(first)
    return [_epoch(feed) for _ in range(count)]


def _epoch(feed):
    with feed.catch_stop_iteration():
        return [next(batches)[1][0][1].numpy().tolist() for _, _, batches in feed]


def flat(by_epoch):
    return [step for epoch in by_epoch for step in epoch]


def test_an_epoch_longer_than_the_data_goes_on_into_the_next_pass(records):
    passes = epochs(records, 8)
    longer = epochs(records, 3, steps=8)
    assert [len(epoch) for epoch in longer] == [8, 8, 8]
    assert flat(longer) == flat(passes)


def test_an_epoch_shorter_than_the_data_leaves_the_rest_to_the_next_one(records):
    shorter = epochs(records, 6, steps=2)
    assert flat(shorter) == flat(epochs(records, 4))
    assert sorted(np.concatenate(flat(shorter)[:3])) == list(range(RECORDS))


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_a_training_that_starts_later_sees_what_it_would_have_seen(records, steps):
    assert epochs(records, 2, first=3, steps=steps) == epochs(records, 5, steps=steps)[3:]


@pytest.mark.filterwarnings("ignore:.*ran out of data")
def test_an_evaluation_of_more_steps_than_the_data_sees_no_record_twice(records):
    assert epochs(records, 1, steps=8, endless=False) == epochs(records, 1)
