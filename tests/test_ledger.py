"""Every record once an epoch, in an order that no number of ranks changes: the ledgers of tests/ledger_script.py."""

from __future__ import annotations

import itertools
import json

import pytest

from distfit import thread_ranks
from tests.ledger_script import BAD, BATCH, CASES, RECORDS, fed, ledgers, write
from tests.ranks import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# What the ranks see of these together is a matter of their number.
BY_RANKS = ("unequal",)
RANKS = ("3, mpirun", "1", "2", "5")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ledger")
    write(folder)
    job = launch(["-m", "tests.ledger_script", str(folder), str(folder / "out.json")], 3, "mpirun", limit_s=400)
    assert job.code == 0, job.report()
    assert "AUTO sharding" not in job.report()
    found = {"3, mpirun": json.loads((folder / "out.json").read_text())}
    for ranks in (1, 2, 5):
        first, *others = thread_ranks.run(lambda: ledgers(folder, fed), ranks=ranks, limit_s=400)
        assert all(other == first for other in others)
        found[str(ranks)] = first
    return found


def records_of(epoch):
    return [record for step in epoch for record in step]


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", [case for case in CASES if "longer" not in case])
def test_every_record_comes_once_an_epoch(found, case, ranks):
    there = {"fewer than ranks": range(2), "without the bad ones": sorted(set(range(RECORDS)) - set(BAD))}
    for epoch in found[ranks][case]:
        assert sorted(records_of(epoch)) == list(there.get(case, range(RECORDS)))


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS[1:])
@pytest.mark.parametrize("case", [case for case in CASES if case not in BY_RANKS])
def test_the_order_is_the_same_for_any_number_of_ranks(found, case, ranks):
    assert found[ranks][case] == found["3, mpirun"][case]


@pytest.mark.mpi
def test_epochs_have_orders_of_their_own(found):
    for case, (_, _, of_batches, of_training) in CASES.items():
        if of_training.get("epochs", 1) > 1 and case != "fewer than ranks":
            orders = [records_of(epoch) for epoch in found["1"][case]]
            assert all(one != other for one, other in itertools.combinations(orders, 2)), of_batches


@pytest.mark.mpi
def test_batches_are_full_but_the_last(found):
    for case in ("everything", "in the order of the files", "by windows", "streams that were counted"):
        for epoch in found["1"][case]:
            assert [len(step) for step in epoch] == [BATCH] * 15 + [RECORDS - 15 * BATCH]
    assert records_of(found["1"]["in the order of the files"][0]) == list(range(RECORDS))


@pytest.mark.mpi
def test_what_is_left_out_changes_no_other_row(found):
    (plain, _), (without,) = (found["1"][case] for case in ("everything", "without the bad ones"))
    assert [[record for record in step if record not in BAD] for step in plain] == without


@pytest.mark.mpi
@pytest.mark.parametrize(("case", "passes"), [("longer epochs", "everything"), ("longer epochs of streams", "streams")])
def test_epochs_longer_than_the_data_go_on_into_the_next_pass(found, case, passes):
    assert [len(epoch) for epoch in found["1"][case]] == [20] * len(found["1"][case])
    steps = [step for epoch in found["1"][case] for step in epoch]
    expected = [step for epoch in found["1"][passes] for step in epoch]
    assert steps[: len(expected)] == expected[: len(steps)]


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_a_training_that_goes_on_later_sees_the_rest(found, ranks):
    assert found[ranks]["longer epochs, resumed"] == found["1"]["longer epochs"][1:]
    resumed, counted = (
        found[ranks]["longer epochs of counted streams, resumed"],
        found["1"]["streams that were counted"],
    )
    whole = [step for epoch in counted for step in epoch]
    assert resumed[0][: len(whole) - 20] == whole[20:]
