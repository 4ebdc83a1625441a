"""The order of records: every record once, whatever the number of processes and replicas."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from distfit.data import plan
from distfit.errors import InputError

RECORDS = (1, 2, 5, 64, 67, 101)
BATCHES = (1, 3, 8, 32, 200)
JOBS = ((1, 1), (2, 1), (3, 1), (1, 2), (2, 3), (7, 2))  # (size, replicas per process)


def jobs():
    return ((n, b, size, replicas) for n in RECORDS for b in BATCHES for size, replicas in JOBS)


def shares_of(records, batch, size, replicas, order):
    """For each step the share of each process."""
    return [
        [plan.process_share(order, batch, step, rank, size, replicas) for rank in range(size)]
        for step in range(plan.steps_per_epoch(records, batch))
    ]


def own(share, rank, size, replicas):
    """The records that the replicas of a process count; none for a process that only keeps step."""
    start, stop = plan.process_bounds(share.global_rows, rank, size, replicas)
    return share.records[: stop - start]


@pytest.mark.parametrize("rows", [0, 1, 5, 12, 13])
@pytest.mark.parametrize("parts", [1, 2, 5, 13])
def test_slices_are_contiguous_and_balanced(rows, parts):
    bounds = [plan.slice_bounds(rows, part, parts) for part in range(parts)]
    assert [bounds[0][0], bounds[-1][1]] == [0, rows]
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(bounds))
    sizes = [stop - start for start, stop in bounds]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_a_process_takes_the_slices_of_its_replicas():
    for rows in range(20):
        for size, replicas in JOBS:
            for rank in range(size):
                slices = [
                    plan.slice_bounds(rows, rank * replicas + replica, size * replicas) for replica in range(replicas)
                ]
                taken = [row for start, stop in slices for row in range(start, stop)]
                assert taken == list(range(*plan.process_bounds(rows, rank, size, replicas)))


def test_every_record_once_in_the_order_of_one_process():
    for records, batch, size, replicas in jobs():
        order = plan.epoch_order(records, seed=5, epoch=2, shuffle=True)
        seen = [
            record
            for shares in shares_of(records, batch, size, replicas, order)
            for rank, share in enumerate(shares)
            for record in own(share, rank, size, replicas)
        ]
        assert seen == order.tolist()


def test_a_share_is_never_empty_and_lies_at_its_origin():
    for records, batch, size, replicas in jobs():
        order = plan.epoch_order(records, seed=5, epoch=2, shuffle=True)
        for step, shares in enumerate(shares_of(records, batch, size, replicas, order)):
            start, stop = plan.batch_positions(records, batch, step)
            whole = order[start:stop]
            for share in shares:
                assert share.global_rows == len(whole)
                assert len(share.records) >= 1
                there = whole[share.origin : share.origin + len(share.records)]
                np.testing.assert_array_equal(share.records, there)


def test_a_process_without_rows_gets_the_first_record_of_the_batch():
    share = plan.process_share(np.arange(65), 32, step=2, rank=2, size=3)
    assert (share.global_rows, share.origin, share.records.tolist()) == (1, 0, [64])
    assert plan.process_bounds(1, rank=2, size=3) == (1, 1)


def test_a_short_last_batch_counts_as_a_step():
    assert [plan.steps_per_epoch(n, 32) for n in (1, 32, 33, 64)] == [1, 1, 2, 2]
    assert plan.batch_positions(33, 32, 1) == (32, 33)


def test_the_order_is_a_permutation_of_seed_and_epoch():
    orders = {(seed, epoch): plan.epoch_order(50, seed, epoch, shuffle=True) for seed in range(3) for epoch in range(3)}
    assert len({order.tobytes() for order in orders.values()}) == 9
    for (seed, epoch), order in orders.items():
        assert order.dtype == np.int64
        assert sorted(order.tolist()) == list(range(50))
        np.testing.assert_array_equal(order, plan.epoch_order(50, seed, epoch, shuffle=True))


def test_the_order_is_the_one_of_all_other_versions():
    # A changed order would make a resumed run see records twice; these numbers must never change.
    assert plan.epoch_order(8, seed=0, epoch=0, shuffle=True).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]


def test_without_shuffling_every_epoch_is_in_the_order_of_the_files():
    for epoch in range(3):
        order = plan.epoch_order(9, seed=1, epoch=epoch, shuffle=False)
        assert order.tolist() == list(range(9))


def test_a_negative_seed_is_refused():
    with pytest.raises(InputError, match="seed of 0 or more, received -1"):
        plan.epoch_order(9, seed=-1, epoch=0, shuffle=True)


def test_the_plan_needs_no_tensorflow():
    code = "import sys, distfit.data.tfrecords, distfit.data.build; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
