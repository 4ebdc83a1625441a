"""The order of records: every record once, whatever the number of processes and replicas."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def all_of(order):
    return order.positions(0, len(order)).tolist()


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
        order = plan.Order(records, seed=5, epoch=2)
        seen = [
            record
            for shares in shares_of(records, batch, size, replicas, order)
            for rank, share in enumerate(shares)
            for record in own(share, rank, size, replicas)
        ]
        assert seen == all_of(order)


def test_a_share_is_never_empty_and_lies_at_its_origin():
    for records, batch, size, replicas in jobs():
        order = plan.Order(records, seed=5, epoch=2)
        for step, shares in enumerate(shares_of(records, batch, size, replicas, order)):
            start, stop = plan.batch_positions(records, batch, step)
            whole = order.positions(start, stop)
            for share in shares:
                assert share.global_rows == len(whole)
                assert len(share.records) >= 1
                there = whole[share.origin : share.origin + len(share.records)]
                np.testing.assert_array_equal(share.records, there)


def test_a_process_without_rows_gets_the_first_record_of_the_batch():
    share = plan.process_share(plan.Order(65, shuffle=False), 32, step=2, rank=2, size=3)
    assert (share.global_rows, share.origin, share.records.tolist()) == (1, 0, [64])
    assert plan.process_bounds(1, rank=2, size=3) == (1, 1)


def test_a_short_last_batch_counts_as_a_step():
    assert [plan.steps_per_epoch(n, 32) for n in (1, 32, 33, 64)] == [1, 1, 2, 2]
    assert plan.batch_positions(33, 32, 1) == (32, 33)


def test_the_order_is_a_permutation_of_seed_and_epoch():
    orders = {(seed, epoch): plan.Order(50, seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len({tuple(all_of(order)) for order in orders.values()}) == 9
    for (seed, epoch), order in orders.items():
        assert order.positions(0, 50).dtype == np.int64
        assert sorted(all_of(order)) == list(range(50))
        assert all_of(order) == all_of(plan.Order(50, seed, epoch))


def test_the_order_is_the_one_of_all_other_versions():
    # A changed order would make a resumed run see records twice; these numbers must never change.
    assert all_of(plan.Order(8)) == [0, 3, 7, 5, 1, 2, 6, 4]
    assert plan.Order(10**9, seed=1, epoch=2).positions(10**8, 10**8 + 4).tolist() == [
        981548964,
        931781203,
        575261485,
        209971750,
    ]
    assert all_of(plan.Order(9, seed=1, window=4, block=2)) == [3, 7, 2, 6, 4, 8, 5, 0, 1]
    assert plan.record_seeds(seed=1, epoch=2, records=np.array([3, 10**9])).tolist() == [
        [2393564635, 3300257158],
        [1489599746, 974883594],
    ]


def test_without_shuffling_every_epoch_is_in_the_order_of_the_files():
    for epoch in range(3):
        assert all_of(plan.Order(9, seed=1, epoch=epoch, shuffle=False)) == list(range(9))
        assert all_of(plan.Order(9, seed=1, epoch=epoch, shuffle=False, window=4)) == list(range(9))


def test_a_negative_seed_is_refused():
    with pytest.raises(InputError, match="seed of 0 or more, received -1"):
        plan.Order(9, seed=-1)


@pytest.mark.parametrize(("window", "block"), [(0, 1), (2, 3), (5, 2), (4, 0)])
def test_a_window_of_no_whole_blocks_is_refused(window, block):
    with pytest.raises(InputError, match="Expected a shuffle window of whole blocks, received"):
        plan.Order(9, window=window, block=block)


blocks = st.integers(1, 9)
orders = st.builds(
    lambda records, seed, epoch, block, each, windows: plan.Order(
        records, seed, epoch, window=block * each if windows else None, block=block
    ),
    st.integers(1, 300),
    st.integers(0, 2**40),
    st.integers(0, 2**20),
    blocks,
    blocks,
    st.booleans(),
)


@given(orders, st.integers(1, 70), st.integers(1, 9), st.integers(1, 3))
@settings(deadline=None)
def test_each_step_is_the_same_list_for_any_number_of_processes(order, batch, size, replicas):
    steps = shares_of(len(order), batch, size, replicas, order)
    read = [
        [record for rank, share in enumerate(step) for record in own(share, rank, size, replicas)] for step in steps
    ]
    whole = all_of(order)
    assert read == [whole[start : start + batch] for start in range(0, len(order), batch)]
    assert sorted(whole) == list(range(len(order)))


@given(orders, st.data())
@settings(deadline=None)
def test_any_position_is_reached_without_those_before_it(order, data):
    start = data.draw(st.integers(0, len(order)))
    stop = data.draw(st.integers(start, len(order)))
    assert order.positions(start, stop).tolist() == all_of(order)[start:stop]


@given(orders, st.integers(1, 70), st.integers(1, 9), st.integers(1, 9), st.data())
@settings(deadline=None)
def test_another_number_of_processes_goes_on_at_any_step(order, batch, before, after, data):
    steps = plan.steps_per_epoch(len(order), batch)
    at = data.draw(st.integers(0, steps))
    first = shares_of(len(order), batch, before, 1, order)[:at]
    rest = shares_of(len(order), batch, after, 1, order)[at:]
    read = [
        record
        for size, part in ((before, first), (after, rest))
        for shares in part
        for rank, share in enumerate(shares)
        for record in own(share, rank, size, 1)
    ]
    assert read == all_of(order)


@given(st.integers(plan.EXACT + 1, 2**31), st.integers(0, 2**40), st.integers(0, 1000), st.data())
@settings(deadline=None, max_examples=50)
def test_large_orders_repeat_no_record(records, seed, epoch, data):
    order = plan.Order(records, seed, epoch)
    starts = [data.draw(st.integers(0, records - 500)) for _ in range(4)]
    positions, first = np.unique(np.concatenate([np.arange(at, at + 500) for at in starts]), return_index=True)
    found = np.concatenate([order.positions(at, at + 500) for at in starts])[first]
    assert len(np.unique(found)) == len(positions)
    assert 0 <= found.min() <= found.max() < records


def test_a_large_order_is_a_permutation():
    for records in (plan.EXACT + 1, plan.EXACT + 12_345):
        found = np.sort(plan.Order(records, seed=3).positions(0, records))
        np.testing.assert_array_equal(found, np.arange(records))


def test_a_billion_records_take_no_memory():
    # In a process of its own: what it takes at most is known of whole processes alone.
    code = (
        "import resource, numpy as np; from distfit.data.plan import Order, process_share\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = used()\n"
        "for epoch in range(3):\n"
        "    for step in range(0, 10**9 // 4096, 10_000):\n"
        "        for options in ({}, {'window': 65_536, 'block': 4096}):\n"
        "            assert len(process_share(Order(10**9, 1, epoch, **options), 4096, step, 3, 8).records) == 512\n"
        "print((used() - before) // 1024)"
    )
    found = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 64  # MiB


def chi_squared(counts):
    """Of counts that should be equal within each row, in standard deviations from what is to be expected."""
    expected = counts.mean(axis=-1, keepdims=True)
    freedom = counts.size - expected.size
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def test_every_small_order_is_as_likely_as_any_other():
    found = [tuple(all_of(plan.Order(4, seed))) for seed in range(4800)]
    counts = np.array([found.count(order) for order in itertools.permutations(range(4))])
    assert abs(chi_squared(counts)) < 4


@pytest.mark.parametrize(
    ("records", "block", "window"),
    [(100_000, 1, None), (3_000_000, 1, None), (100_000, 8, 1024), (3_000_000, 64, 2**15)],
)
def test_records_come_from_everywhere_at_any_time(records, block, window):
    parts, taken = 16, 2**15 if window else 2000
    counts = np.zeros((parts, parts), int)
    for epoch, part in itertools.product(range(8), range(parts)):
        order, start = plan.Order(records, seed=7, epoch=epoch, window=window, block=block), part * records // parts
        found = order.positions(start, min(start + taken, (part + 1) * records // parts))
        # Of a block, the records come together: so it is blocks that come from everywhere.
        counts[part] += np.bincount(np.unique(found // block) * block * parts // records, minlength=parts)
    assert abs(chi_squared(counts)) < 5


@pytest.mark.parametrize("records", [10_000, 3_000_000])
def test_neighbours_in_a_file_do_not_stay_neighbours(records):
    found = plan.Order(records, seed=1).positions(0, 10_000)
    # Of 10,000 neighbours in a random order, 2 are neighbours in the file as well, if there are no more records.
    assert np.count_nonzero(np.abs(np.diff(found)) == 1) <= 10
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.05
    assert abs(np.corrcoef(found, np.arange(len(found)))[0, 1]) < 0.05


def test_within_a_window_neighbours_do_not_stay_neighbours():
    order = plan.Order(100_000, seed=1, window=4096, block=256)
    window = order.window_of(50_000)
    assert len(window) == 4096
    assert len(np.unique(window // 256)) <= 17  # blocks of 256 records side by side
    assert np.count_nonzero(np.abs(np.diff(window)) == 1) <= 16


def test_seeds_of_records_differ_and_repeat():
    seeds = [plan.record_seeds(seed, epoch, np.arange(1000)) for seed in range(3) for epoch in range(3)]
    assert len(np.unique(np.concatenate(seeds), axis=0)) == 9000
    assert seeds[0].dtype == np.uint32
    np.testing.assert_array_equal(plan.record_seeds(0, 0, np.array([17, 3])), seeds[0][[17, 3]])
    bits = np.unpackbits(np.concatenate(seeds).view(np.uint8), axis=1)
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.03


def test_the_plan_needs_no_tensorflow():
    code = "import sys, distfit.data.tfrecords, distfit.data.build; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
