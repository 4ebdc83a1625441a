"""What a steady step costs, counted exactly: collectives, bytes, traces, and values brought to the host.

Beside what distfit records of itself stands a witness that knows nothing of the record (tests/counters_script.py).
"""

from __future__ import annotations

import json
from collections import Counter

import pytest

from distfit.training.wire import Transfer
from tests.counters_script import BATCH, CLASSES, EPOCHS, LENGTH, READ_STEPS, ROWS, sent_by_timeline
from tests.ranks import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = -(-ROWS // BATCH)
# rows, one normaliser for each loss, three flags: float64
SMALL = Transfer("train.small", "float64", 1 + 1 + 3)
FLOATS = 4 * 8 + 8 + 8 * CLASSES + CLASSES
NORMALISED = 4 * 8 + 8 + 8 * 8 + 8 + 8 * CLASSES + CLASSES + 2 * 2 * 8


def gradients(elements, number=0, dtype="float32", step="train"):
    return Transfer(f"{step}.bucket.{number}", dtype, elements)


def moments(place, more=""):
    """A count, 8 sums and 8 sums of squares, and back again."""
    return Transfer(f"train.moments.{place}{more}", "float64", 1 + 2 * 8)


# What one replica sends in each kind of step, in this order.
PLANS = {
    "mlp": {"train": [SMALL, gradients(FLOATS)], "test": [Transfer("test.small", "float64", 5)]},
    "two_steps_a_call": {"train": [SMALL, gradients(FLOATS)], "test": [Transfer("test.small", "float64", 5)]},
    "accumulation": {
        "accumulate": [Transfer("accumulate.small", "float64", 5)],
        "train": [SMALL, gradients(FLOATS)],
        # Between epochs, where an update is unfinished: what was accumulated, there and back.
        "gather": [gradients(FLOATS, step="gather")],
        "part": [],
    },
    # 128 bytes each: from the last variable to the first, none of them cut.
    "buckets": {"train": [SMALL, gradients(8 * CLASSES + CLASSES), gradients(8, 1), gradients(4 * 8, 2)]},
    "half": {"train": [SMALL, gradients(FLOATS, dtype="float16")]},
    # Two layers of 8 channels: a moving mean and variance each, in the same small vector.
    "batch_norm": {"train": [Transfer("train.small", "float64", 5 + 2 * 2 * 8), gradients(NORMALISED)]},
    "sync_batch_norm": {
        "train": [
            *(moments(0), moments(1)),
            SMALL,
            *(moments(1, ".gradient"), moments(0, ".gradient")),
            gradients(NORMALISED),
        ]
    },
    # A normaliser for each of them.
    "two_masked_outputs": {
        "train": [Transfer("train.small", "float64", 1 + 2 + 3), gradients(4 + 4 + 2 * (4 * CLASSES + CLASSES))]
    },
    # No dense gradient of the table, but the rows that were looked up, and which they are.
    "embedding": {
        "train": [
            SMALL,
            gradients(4 * CLASSES + CLASSES),
            Transfer("train.rows", "float32", 4, gathered=True),
            Transfer("train.indices", "int32", 1, gathered=True),
        ]
    },
}
# How often each kind of step runs in a training; of accumulation over 4 batches every fourth of all batches.
RUNS = {"train": STEPS * EPOCHS, "test": 3 * EPOCHS}
RUNS_OF = {"accumulation": {"train": 3, "accumulate": 12, "gather": 3, "part": 2}}
# The first call of each kind of step, in which it is traced.
FIRST_CALLS = {"mlp": {0, STEPS}, "two_steps_a_call": {0, 3}, "accumulation": {0, 3}}
TWO_STEPS_A_CALL = [2, 2, 1, 2, 1]
FOUND = {"single": ("none", 1), "mirrored-3": ("none", 1), "horovod": ("mpirun", 2)}
REPLICAS = {"mirrored-3": 3, "horovod": 2}
SEVERAL = ["mirrored-3", pytest.param("horovod", marks=pytest.mark.mpi)]
ALL = ["single", *SEVERAL]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """From an engine to what was counted; each job is launched when it is first asked for."""
    folder = tmp_path_factory.mktemp("counters")
    timeline = folder / "timeline.json"
    launched = set()

    def of(engine):
        launcher, ranks = FOUND[engine]
        if launcher not in launched:
            engines = ["horovod"] if ranks > 1 else ["mirrored:3", "single"]
            arguments = ["-m", "tests.counters_script", str(folder), *engines]
            job = launch(arguments, ranks, launcher, limit_s=300, env={"HOROVOD_TIMELINE": str(timeline)})
            assert job.code == 0, job.report()
            assert "retracing" not in job.errors, job.report()
            launched.add(launcher)
        found = json.loads((folder / f"{engine}.json").read_text())
        for case, sent in (sent_by_timeline(timeline) if ranks > 1 else {}).items():
            found[case]["sent"] = sent
        return found

    return of


@pytest.mark.parametrize("engine", SEVERAL)
@pytest.mark.parametrize("case", PLANS)
def test_a_step_sends_its_gradients_once_and_one_small_vector(counted, case, engine):
    found = counted(engine)[case]
    planned = {step: [[*vars(one).values(), one.nbytes] for one in plan] for step, plan in PLANS[case].items()}
    assert found["plans"] == planned


@pytest.mark.parametrize("engine", SEVERAL)
@pytest.mark.parametrize("case", PLANS)
def test_what_ran_is_what_was_planned_as_often_as_there_were_steps(counted, case, engine):
    """By a count in the graph, of every addend, or by Horovod's timeline, of the sum."""
    voices = 1 if engine == "horovod" else REPLICAS[engine]
    runs = RUNS_OF.get(case, RUNS)
    expected = {
        one.name: Counter({one.nbytes: runs[step] * voices})
        for step, plan in PLANS[case].items()
        for one in plan
        if not one.gathered
    }
    sent = {name: Counter(nbytes) for name, nbytes in counted(engine)[case]["sent"].items()}
    gathered = [one for one in PLANS[case]["train"] if one.gathered]
    rows = {one.name: sum(size * times for size, times in sent.pop(one.name).items()) for one in gathered}
    assert sent == expected
    # Each replica without rows looks up one row's words, and these are in the last batch of an epoch.
    looked_up = EPOCHS * (ROWS + REPLICAS[engine] - 1) * LENGTH
    assert rows == {one.name: looked_up * one.nbytes for one in gathered}


def test_a_16_bit_wire_carries_half_the_bytes():
    (_, whole), (_, half) = PLANS["mlp"]["train"], PLANS["half"]["train"]
    assert half.nbytes == 0.5 * whole.nbytes == 2 * FLOATS


@pytest.mark.parametrize("engine", SEVERAL)
@pytest.mark.parametrize("case", PLANS)
def test_every_replica_of_every_rank_has_the_same_order_and_traces_a_step_once(counted, case, engine):
    for step, hashes in counted(engine)[case]["orders"].items():
        assert len(hashes) == REPLICAS[engine], step
        assert len(set(hashes)) == 1, step


@pytest.mark.parametrize("engine", ALL)
def test_nothing_is_traced_after_a_steps_first_call(counted, engine):
    """Over epochs with a validation, a last batch in which replicas have no row, and a rest of a call of two steps."""
    for case, found in counted(engine).items():
        if "calls" in found:
            accumulating_alone = engine == "single" and case == "accumulation"
            expected = {0} if accumulating_alone else FIRST_CALLS.get(case, {0})
            assert {int(call) for call in found["graphs"]} == expected, case
            assert len(found["calls"]) > 2 * max(expected) + 1, case
    assert counted(engine)["two_steps_a_call"]["calls"] == TWO_STEPS_A_CALL * EPOCHS


def test_one_replica_sends_nothing(counted):
    found = counted("single")
    for case in ("mlp", "two_steps_a_call", "accumulation"):
        assert not found[case]["sent"]
        assert not any(found[case]["plans"].values())


def reads(found):
    """How many values came to the host while an epoch's steps ran, by their number from 1 and the step that had made
    them: [of what is no step's output, of the step itself, of the step before]."""
    counts = {step: [0, 0, 0] for step in range(1, READ_STEPS)}
    for read in found["reads"]:
        epoch, step = divmod(read["after"], READ_STEPS)
        if epoch == 1 and step > 0:
            age = None if read["of_call"] is None else read["after"] - read["of_call"]
            counts[step][{None: 0, 0: 1, 1: 2}[age]] += 1
    return counts


@pytest.mark.parametrize("engine", SEVERAL)
def test_several_replicas_read_metrics_at_log_points_and_nothing_of_the_step_that_runs(counted, engine):
    """Ranks read one thing more: the flags of the step before, when this one is on its way."""
    found = counted(engine)["somebody_reads"]
    ranks = engine == "horovod"
    copies = 1 if ranks else REPLICAS[engine]
    at_a_log_point = found["states"] * copies + found["metrics"]
    assert reads(found) == {
        step: [at_a_log_point if step % 3 == 1 else 0, 0, 1 if ranks and step > 1 else 0]
        for step in range(1, READ_STEPS)
    }


@pytest.mark.parametrize("engine", SEVERAL)
def test_several_replicas_make_no_values_of_batches_where_nobody_wants_them(counted, engine):
    of_flags = 1 if engine == "horovod" else 0
    found = reads(counted(engine)["nobody_listens"])
    assert found == {step: [0, 0, of_flags if step > 1 else 0] for step in range(1, READ_STEPS)}


@pytest.mark.parametrize("case", ["nobody_listens", "somebody_listens"])
def test_one_replica_reads_nothing_where_nobody_looks_at_a_value(counted, case):
    assert set(map(tuple, reads(counted("single")[case]).values())) == {(0, 0, 0)}


def test_who_looks_on_one_replica_gets_each_batchs_own_logs_as_keras_gives_them(counted):
    found = counted("single")["somebody_reads"]
    assert set(map(tuple, reads(found).values())) == {(0, found["metrics"], 0)}


@pytest.mark.mpi
def test_a_model_that_sums_more_on_one_rank_is_refused_on_all():
    job = launch(["-m", "tests.counters_script", "one_rank_differs"], ranks=2, limit_s=100)
    assert job.code == 1, job.report()
    said = "Expected every rank to sum the same tensors in the same order in each train step, received "
    assert job.errors.count(said) == 1, job.report()
    assert "train.moments.0" in job.errors, job.report()
    assert "on rank 0 and rank 1 of 2" in job.errors, job.report()
    assert "Traceback" not in job.errors, job.report()
