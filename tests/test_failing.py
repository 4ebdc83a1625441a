"""Whatever breaks on one rank, all ranks end soon, with one report; run under the real launchers.

`tests/test_watch.py` has the watch by itself; here everything is real, from `distfit.fit` to mpirun.
"""

import json
import re
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from distfit.checkpoint.folder import Checkpoints
from tests.ranks import launch

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

END_LIMIT_S = 10.0  # the promise: this long after one rank broke, none is left
# A collective that some ranks never make is no break: it is found out, in seconds, and not by the limit of 600 s.
FOUND_OUT_S = 60.0
# TensorFlow's native code says these on every process, before anybody could silence it.
TENSORFLOW_SAYS = re.compile(r"WARNING: All log messages before absl|[IWE]0000 ")
LAUNCHER_TAG = re.compile(r"^\[\d+\]<std(?:err|out)>:", re.M)


@pytest.fixture
def fail(tmp_path):
    """Runs a case of tests/failing_script.py; fails the test when the ranks outlive the promise."""

    def run(case, ranks=3, within_s=END_LIMIT_S, **arguments):
        job = launch(["-m", "tests.failing_script", case, str(tmp_path)], ranks=ranks, limit_s=120, **arguments)
        ended = time.monotonic()
        broke = tmp_path / "broke"
        assert broke.exists(), job.report()
        assert ended - float(broke.read_text()) < within_s, job.report()
        assert job.code != 0, job.report()
        return job

    return run


def errors(job):
    """What the ranks and the launcher wrote to standard error, TensorFlow's own lines left out."""
    lines = LAUNCHER_TAG.sub("", job.errors).splitlines(keepends=True)
    return "".join(line for line in lines if not TENSORFLOW_SAYS.search(line))


def assert_reported_once(job, *parts):
    said = errors(job)
    for part in (*parts, "distfit: all ranks end with exit code 1"):
        assert said.count(part) == 1, f"{part!r} {said.count(part)} times\n{job.report()}"
    assert "distfit: " not in job.output, job.report()


def assert_only_whole_files(folder, ended=False):
    """Nothing unfinished is there, the model of a training that has ended, and no damaged checkpoint."""
    names = {path.name for path in (folder / "checkpoint").iterdir() if not path.name.startswith("step-")}
    assert names - {"latest"} == ({"run.lock", "model.keras"} if ended else {"run.lock"})
    assert Checkpoints(folder / "checkpoint").newest()[1] == []


@pytest.mark.parametrize(("launcher", "ranks"), [("mpirun", 3), ("gloo", 2)])
def test_exception_on_one_rank_ends_all_with_its_traceback_once(fail, tmp_path, launcher, ranks):
    job = fail("exception_on_rank_1", ranks, launcher=launcher)
    where = "at epoch 2, step 3 in At.on_train_batch_end"
    header = rf"distfit: rank 1 of {ranks} on host \S+ failed {where}: OSError: the valve is stuck\n"
    assert len(re.findall(header, errors(job))) == 1, job.report()
    assert_reported_once(job, 'raise OSError("the valve is stuck")', "\nOSError: the valve is stuck\n")
    assert_only_whole_files(tmp_path)


def test_the_same_exception_on_all_ranks_is_printed_once(fail):
    job = fail("exception_everywhere")
    assert_reported_once(
        job, "failed at epoch 2, step 3 in At.on_train_batch_end", 'raise OSError("the valve is stuck")'
    )


def test_traceback_of_one_process_does_not_meet_the_progress_line(fail):
    job = fail("exception_everywhere", 1, launcher="mpirun")  # whose ranks have a terminal as standard output
    assert errors(job).count("\nOSError: the valve is stuck\n") == 1, job.report()
    assert "valve" not in job.output, job.report()


def test_exit_inside_a_training_is_a_failure(fail):
    job = fail("exit_with_3")
    assert_reported_once(
        job, "failed at epoch 2, step 3 in At.on_train_batch_end: SystemExit: 3", "lambda: sys.exit(3)"
    )


def test_rank_that_leaves_before_its_training_is_missed(fail):
    job = fail("rank_1_leaves_before_its_fit")
    assert_reported_once(job, "exited while the others were training")
    assert "Segmentation fault" not in job.errors, job.report()


@pytest.mark.parametrize(("launcher", "ranks"), [("mpirun", 3), ("gloo", 2)])
def test_killed_rank_is_named(fail, tmp_path, launcher, ranks):
    job = fail("kill_rank_1", ranks, launcher=launcher)
    assert_reported_once(job, f"distfit: rank 1 of {ranks} on host ", "was killed or crashed", "at epoch 2, step ")
    assert_only_whole_files(tmp_path)


def test_killed_chief_is_named_by_another_rank(fail, tmp_path):
    job = fail("kill_the_chief")
    assert_reported_once(job, "(the chief) was killed or crashed", "at epoch 2, step ")
    assert_only_whole_files(tmp_path)


def test_rank_that_stays_away_ends_the_run_with_all_stacks(fail):
    job = fail("stall")
    said = errors(job)
    assert_reported_once(job, "has waited for the other ranks for 4 s", "rank 1 on host")
    assert said.index("in sleep_like_a_dormouse") < said.index("each of ranks 0, 2"), job.report()
    assert said.count("in sleep_like_a_dormouse") == 1, job.report()


@pytest.mark.parametrize(
    ("case", "ranks", "called"), [("evaluate_if_chief", 3, "distfit.evaluate"), ("horovod_if_chief", 2, "horovod.")]
)
def test_collective_under_a_condition_of_one_rank_is_reported_by_name(fail, case, ranks, called):
    job = fail(case, ranks, within_s=FOUND_OUT_S)
    others = "rank 1 did not, but waits in" if ranks == 2 else "ranks 1-2 did not, but wait in"
    assert_reported_once(job, f"called {called}", "in Calls.on_epoch_end (failing_script.py, line", others)
    assert "limit" not in errors(job), job.report()


def test_collective_in_a_callback_of_the_chief_is_an_error_at_once(fail):
    job = fail("evaluate_in_a_callback_of_the_chief", 2)
    called = "\ndistfit.errors.RunError: Calls.on_epoch_end runs on the chief alone and called distfit.evaluate ("
    assert_reported_once(job, "failed at epoch 1, step 4 in Calls.on_epoch_end", called)


def test_ctrl_c_ends_all_without_a_flood_of_tracebacks(fail):
    job = fail("ctrl_c")
    assert "Traceback" not in errors(job), job.report()


def test_several_ranks_without_horovod_say_what_to_type(fail, tmp_path):
    job = fail("without_horovod")
    (line,) = [line for line in errors(job).splitlines() if line.startswith("distfit")]
    assert line.startswith("distfit: error: This job needs Horovod (3 ranks were started)")
    assert "distfit horovod install" in line
    assert job.code == 2, job.report()
    assert not (tmp_path / "logs").exists()


def test_a_strategy_for_one_process_is_refused_on_several(fail, tmp_path):
    job = fail("a_strategy_for_one_process", 2)
    (line,) = [line for line in errors(job).splitlines() if line.startswith("distfit")]
    assert "received 'single' and 2 ranks" in line
    assert job.code == 2, job.report()
    assert not (tmp_path / "logs").exists()


def test_datasets_that_differ_between_ranks_are_refused_on_all(tmp_path):
    job = launch(["-m", "tests.failing_script", "datasets_that_differ", str(tmp_path)], ranks=2)
    assert job.code == 2, job.report()
    refusals = (tmp_path / "refusals-0").read_text()
    assert refusals == (tmp_path / "refusals-1").read_text()
    shuffled, shorter = refusals.splitlines()
    assert "Expected every rank to iterate the same global batches, received different ones at step 1" in shuffled
    assert "rank 0 has 4, rank 1 has 3" in shorter
    assert errors(job).count(f"distfit: error: {shuffled}\n") == 1, job.report()
    assert "Traceback" not in errors(job), job.report()


def test_uneven_local_data_are_trained_on_once_each(tmp_path):
    job = launch(["-m", "tests.failing_script", "uneven_local_data", str(tmp_path)], ranks=2)
    assert job.code == 0, job.report()
    history = json.loads((tmp_path / "history.json").read_text())
    # 27 powers of two that sum up to 2**27 - 1 are all different.
    assert history["rows"] == [27.0, 27.0]
    assert history["powers"] == [2.0**27 - 1] * 2


def test_a_normal_run_is_silent_on_all_ranks_but_the_chief(tmp_path):
    arguments = ["-m", "tests.failing_script", "all_is_well", str(tmp_path)]
    job = launch(arguments, ranks=3, env={"OMPI_MCA_orte_tag_output": "1"})
    assert job.code == 0, job.report()
    tagged = [line for line in (job.output + job.errors).splitlines() if not TENSORFLOW_SAYS.search(line)]
    assert not [line for line in tagged if re.match(r"\[1,[12]\]", line)], job.report()
    assert [line for line in tagged if line.startswith("[1,0]<stderr>:distfit")], job.report()
    assert_only_whole_files(tmp_path, ended=True)
    history = json.loads((tmp_path / "history.json").read_text())
    # The same rows, evaluated by a callback within the training.
    assert history["own_loss"] == pytest.approx(history["val_loss"], rel=1e-6)
    for folder, prefix in (("train", ""), ("validation", "val_")):
        logged = read_logs(tmp_path / "logs" / folder)
        assert logged["epoch_loss"] == pytest.approx(history[f"{prefix}loss"], rel=1e-6)
        assert logged["epoch_accuracy"] == pytest.approx(history[f"{prefix}accuracy"], rel=1e-6)


def read_logs(folder):
    """Tag -> values by epoch, of a folder to which one process wrote."""
    assert len(list(folder.iterdir())) == 1
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [float(make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]
        for tag in ("epoch_loss", "epoch_accuracy")
    }
