"""Which records the steps of a training saw, in their order: `python -m tests.ledger_script FOLDER OUT`, on any ranks.

Every record holds its own number. A step gathers the numbers of the whole global batch, so that the ledger is the
same list on every rank, and for any number of ranks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import distfit
from distfit.data.files import expand
from distfit.data.index_cache import count_records
from distfit.data.records import write_records

RECORDS, BATCH, SEED = 1003, 64, 5
# Five shards of unequal size.
SHARDS = (400, 3, 250, 349, 1)
BAD = (7, 402, 900)


def number_of(record):
    return tf.strings.to_number(record, tf.int64)


def write(folder):
    """`plain`, `gzip` and `counted` (of which the records are counted), and `damaged`, with bad records."""
    folder = Path(folder)
    for name in ("plain", "gzip", "counted", "damaged", "few"):
        (folder / name).mkdir(parents=True)
        first = 0
        for shard, records in enumerate(SHARDS if name != "few" else (1, 1)):
            path = folder / name / f"train-{shard:05d}-of-{5 if name != 'few' else 2:05d}.tfrecord"
            numbers = range(first, first + records)
            _write(path, numbers, compressed=name in ("gzip", "counted"), bad=BAD if name == "damaged" else ())
            first += records
    count_records(expand(folder / "counted"))


def _write(path, numbers, compressed, bad):
    payloads = [b"x" if number in bad else b"%d" % number for number in numbers]
    if not compressed:
        write_records(path, payloads)
        return
    with tf.io.TFRecordWriter(str(path), "GZIP") as file:
        for payload in payloads:
            file.write(payload)


def unequal(context):
    """Of unknown and unequal lengths: rank r has the numbers that leave r, but the last rank almost none."""
    numbers = tf.data.Dataset.range(RECORDS)
    last = context.size - 1

    def own(number):
        mine = number % context.size == context.rank
        if last == 0:
            return mine
        few = number >= 50
        return (mine & ~few) | (few & (context.rank == number % last)) if context.rank < last else mine & ~few

    return numbers.filter(own).batch(max(1, context.batch_size))


# What is trained on, and with which options of `batches` and `training`.
CASES = {
    "everything": ("plain", {}, {}, {"epochs": 2}),
    "in the order of the files": ("plain", {}, {"shuffle": False}, {}),
    "by windows": ("plain", {"shuffle_window": 128}, {}, {"epochs": 2}),
    "streams": ("gzip", {}, {}, {"epochs": 2}),
    "streams that were counted": ("counted", {}, {}, {"epochs": 2}),
    "without the bad ones": ("damaged", {"bad_records": "skip"}, {}, {}),
    "fewer than ranks": ("few", {}, {}, {"epochs": 2}),
    "longer epochs": ("plain", {}, {"steps": 20}, {"epochs": 3}),
    "longer epochs, resumed": ("plain", {}, {"steps": 20}, {"epochs": 3, "initial_epoch": 1}),
    "longer epochs of streams": ("gzip", {}, {"steps": 20}, {"epochs": 2}),
    "longer epochs of counted streams, resumed": ("counted", {}, {"steps": 20}, {"epochs": 3, "initial_epoch": 1}),
    "unequal": (None, {}, {}, {}),
}


def trained(session, folder, case):
    """For each epoch its steps, for each step the records of the global batch, as a training sees them."""
    data, of_training = data_of(session, folder, case), CASES[case][3]
    model, optimizer = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]), keras.optimizers.SGD(1e-9)

    @session.step
    def train(numbers):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(tf.cast(numbers, tf.float32)[:, None]))
            scaled = session.scale_loss(loss, count=tf.shape(numbers)[0])
        session.apply(optimizer, tape.gradient(scaled, model.trainable_variables), model.trainable_variables)
        return session.gather(numbers)

    epochs = []
    with session.training(model, optimizer, data, verbose=0, **of_training) as training:
        for _ in training:
            epochs.append([np.asarray(train(step)[0]).tolist() for step in data])
    return epochs


def fed(session, folder, case):
    """The same without a training."""
    feed, of_training = data_of(session, folder, case).feed, CASES[case][3]
    first = of_training.get("initial_epoch", 0)
    feed.start_at(first)
    epochs = []
    for _ in range(first, of_training.get("epochs", 1)):
        own = []
        with feed.catch_stop_iteration():
            for _, _, batches in feed:
                _, shards = next(batches)
                own.append([number for rows, numbers in shards for number in numbers[:rows].numpy().tolist()])
        of_ranks = session.transport.gather(own)
        epochs.append([[number for part in step for number in part] for step in zip(*of_ranks, strict=True)])
    return epochs


def data_of(session, folder, case):
    """The batches of a case."""
    name, options, of_batches, _ = CASES[case]
    x = distfit.local(unequal) if name is None else distfit.TFRecords(Path(folder) / name, None, number_of, **options)
    batch = BATCH if name is not None else session.size * 16
    return session.batches(x, batch_size=batch, **{"shuffle": True, "seed": SEED, **of_batches})


def ledgers(folder, ledger):
    """Of every case, as each rank sees them."""
    session = distfit.init()
    return {case: ledger(session, folder, case) for case in CASES}


if __name__ == "__main__":
    found = ledgers(sys.argv[1], trained)
    of_ranks = distfit.init().transport.gather(found)
    assert all(other == found for other in of_ranks)
    if distfit.init().is_chief:
        Path(sys.argv[2]).write_text(json.dumps(found))
