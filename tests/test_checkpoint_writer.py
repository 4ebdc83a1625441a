"""Copies at a boundary and writing in the background: what is written is the state of that boundary, in memory that was
there before, one job at a time, and no error is lost."""

import subprocess
import sys
import threading
import tracemalloc

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from distfit.checkpoint import pace as pace_module
from distfit.checkpoint import snapshot as snapshots
from distfit.checkpoint import tensors as tensors_module
from distfit.checkpoint.pace import Pace, rest
from distfit.checkpoint.snapshot import Snapshot, memory_of, non_finite
from distfit.checkpoint.tensors import write_tensors
from distfit.checkpoint.writer import NICENESS, Writer
from distfit.errors import InputError, RunError
from tests.ranks import ROOT, environment

TYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint32", "int8", "uint8", "bool"]
SOON_S = 60  # for what should happen at once


def address(array):
    return array.__array_interface__["data"][0]


def named(variables):
    return [(str(number), variable) for number, variable in enumerate(variables)]


def memory_during(call):
    """Bytes of NumPy and Python that a call has left behind, and the most that it held."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


@pytest.fixture
def threads_copy(monkeypatch):
    """As for a large state on several cores: each tensor is copied in parts."""
    monkeypatch.setattr(snapshots, "_WORTH_THREADS", 64)
    monkeypatch.setattr(snapshots.os, "sched_getaffinity", lambda _: {0, 1, 2})


class SlowWriting:
    """A job that waits in the middle of its work until it is let go, and keeps what it read after that."""

    def __init__(self, tensors):
        self._tensors = tensors
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.written = {}

    def __call__(self):
        self.begun.set()
        assert self.go_on.wait(SOON_S)
        self.written = {name: tensor.copy() for name, tensor in self._tensors.items()}


# --- what is copied -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_is_copied_to_the_bit(dtype):
    values = np.array([[1, 0, 3], [0, 5, 1]]).astype(tf.as_dtype(dtype).as_numpy_dtype)
    scalar, empty = tf.Variable(values[1, 1]), tf.Variable(values[:0])
    snapshot = Snapshot(named([tf.Variable(values), scalar, empty]))
    snapshot.take()
    copied, one, none = snapshot.tensors.values()
    assert (copied.dtype, copied.shape, copied.tobytes()) == (values.dtype, (2, 3), values.tobytes())
    assert (one.shape, one.item()) == ((), values[1, 1].item())
    assert (none.shape, none.dtype) == ((0, 3), values.dtype)


def test_nan_keep_their_bits():
    bits = np.array([0x7FC00001, 0xFFC12345, 0x7F800001], np.uint32)
    snapshot = Snapshot([("a", tf.Variable(bits.view(np.float32)))])
    snapshot.take()
    assert snapshot.tensors["a"].view(np.uint32).tolist() == bits.tolist()


def test_tensors_that_threads_copy_in_parts_are_whole(threads_copy):
    rng = np.random.default_rng(0)
    values = [rng.random(size).astype("float32") for size in (1, 16, 17, 1001)]
    snapshot = Snapshot(named(map(tf.Variable, values)))
    snapshot.take()
    for copied, value in zip(snapshot.tensors.values(), values, strict=True):
        np.testing.assert_array_equal(copied, value)


def test_what_is_written_is_the_boundary_although_the_training_goes_on():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    x, y = np.random.default_rng(0).random((32, 8)), np.ones((32, 1))
    model.train_on_batch(x, y)
    variables = [*model.weights, *model.optimizer.variables]
    snapshot = Snapshot(named(variables), lambda variable: variable._value)
    snapshot.take()
    at_boundary = [variable.numpy() for variable in variables]
    job = SlowWriting(snapshot.tensors)
    with Writer("runs/a") as writer:
        writer.start(job)
        assert job.begun.wait(SOON_S)
        for _ in range(3):
            model.train_on_batch(x, y)
        assert writer.busy
        job.go_on.set()
    for written, then, variable in zip(job.written.values(), at_boundary, variables, strict=True):
        np.testing.assert_array_equal(written, then)
        assert (variable.numpy() != then).any() or variable.path.endswith("learning_rate"), variable.path


# --- in which memory ------------------------------------------------------------------------------------------------


def test_buffers_are_there_before_and_are_used_again(threads_copy):
    elements = 2**18
    variables = [tf.Variable(tf.zeros([elements])) for _ in range(4)]
    snapshot = Snapshot(named(variables))
    snapshot.prepare()
    where = [address(tensor) for tensor in snapshot.tensors.values()]
    for number in range(3):
        for variable in variables:
            variable.assign_add(tf.ones([elements]))
        _, most = memory_during(snapshot.take)
        assert most < elements  # bytes: a quarter of one tensor
        assert [address(tensor) for tensor in snapshot.tensors.values()] == where
        assert all((tensor == number + 1).all() for tensor in snapshot.tensors.values())


def test_buffers_hold_hardly_more_than_the_state():
    snapshot = Snapshot(named([tf.Variable(tf.zeros([1001], tf.int8)) for _ in range(50)]))
    held, _ = memory_during(snapshot.prepare)
    assert snapshot.nbytes == 50 * 1001 <= held <= 1.1 * 50 * 1001 + 50 * 400  # of an array object, a few hundred


def test_variables_stay_where_they_are():
    """Had anything of the read lived on, the next update would have moved the variable to a copy."""
    plain, table = tf.Variable(tf.zeros([1000])), tf.Variable(tf.zeros([100, 10]))
    tf.gather(table, [3])  # from now on TensorFlow would copy the table whenever it is read
    snapshot = Snapshot(named([plain, table]))
    where = [address(memory_of(variable)) for variable in (plain, table)]
    snapshot.take()
    plain.assign_add(tf.ones([1000]))
    table.scatter_add(tf.IndexedSlices(tf.ones([1, 10]), tf.constant([3])))
    assert [address(memory_of(variable)) for variable in (plain, table)] == where
    snapshot.take()
    assert snapshot.tensors["1"].sum() == 10
    assert (snapshot.tensors["0"] == 1).all()


def test_a_table_that_is_read_by_rows_is_not_copied_to_be_read():
    table = tf.Variable(tf.zeros([100, 10]))
    tf.gather(table, [3])
    first, second = memory_of(table), memory_of(table)
    assert address(first) == address(second)
    table.scatter_add(tf.IndexedSlices(tf.ones([1, 10]), tf.constant([3])))
    assert (first == 0).all()  # what somebody holds does not change


# --- variables that change ------------------------------------------------------------------------------------------


def test_variables_that_join_leave_or_change_their_shape_get_new_buffers():
    variables = [("a", np.arange(3.0)), ("b", np.arange(4.0))]
    snapshot = Snapshot(variables)
    snapshot.take()
    first = snapshot.tensors
    for changed in (
        [*variables, ("c", np.arange(5))],  # as of an optimizer that is built late
        [("a", np.arange(3.0))],
        [("a", np.arange(6.0).reshape(2, 3)), ("b", np.arange(4.0))],
        [("a", np.arange(3.0)), ("b", np.arange(4, dtype="float32"))],
        [("b", np.arange(4.0)), ("a", np.arange(3.0))],
    ):
        variables[:] = changed
        snapshot.take()
        assert list(snapshot.tensors) == [name for name, _ in changed]
        for name, value in changed:
            copied = snapshot.tensors[name]
            assert copied.dtype == value.dtype
            np.testing.assert_array_equal(copied, value)
    assert [tensor.tolist() for tensor in first.values()] == [[0, 1, 2], [0, 1, 2, 3]]  # who holds the old ones


def test_a_variable_that_changes_while_it_is_copied_is_refused():
    sizes = iter(range(9))
    with pytest.raises(RunError, match="changes its shape"):
        Snapshot([("a", None)], lambda _: np.zeros(next(sizes))).take()


def test_arrays_that_do_not_lie_in_a_row_are_copied():
    value = np.arange(12).reshape(3, 4).T[:, ::2]
    snapshot = Snapshot([("a", value)])
    snapshot.take()
    np.testing.assert_array_equal(snapshot.tensors["a"], value)


def test_a_name_that_comes_twice_is_refused():
    with pytest.raises(InputError, match="received 'a' twice"):
        Snapshot([("a", np.zeros(1)), ("b", np.zeros(1)), ("a", np.ones(1))]).take()


def test_a_variable_of_text_is_refused():
    with pytest.raises(InputError, match="hold numbers, received 'words'"):
        Snapshot([("words", tf.Variable(["a"]))]).prepare()


# --- what is not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "complex64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_non_finite_are_found(dtype, bad, monkeypatch):
    monkeypatch.setattr(snapshots, "_BLOCK", 7)
    type_ = np.dtype(getattr(ml_dtypes, dtype, dtype))
    damaged = np.ones((10, 3)).astype(type_)
    damaged[9, 2] = bad
    tensors = {"good": np.ones(30).astype(type_), "bad": damaged, "one": np.asarray(bad).astype(type_)}
    assert non_finite(tensors) == ["bad", "one"]


def test_integers_and_empty_tensors_are_finite():
    int4 = np.zeros(2, ml_dtypes.int4)
    assert non_finite({"a": np.arange(3), "b": np.zeros((0, 3)), "c": np.array(True), "d": int4}) == []


def test_looking_for_them_takes_no_second_tensor():
    tensor = np.ones(2**21, np.float32)
    _, most = memory_during(lambda: non_finite({"a": tensor}))
    assert most < tensor.nbytes / 10


# --- the writer -----------------------------------------------------------------------------------------------------


def test_one_job_is_in_flight():
    job, second = SlowWriting({}), []
    with Writer("runs/a") as writer:
        assert not writer.busy
        assert writer.wait(0)
        writer.start(job)
        assert writer.busy
        assert not writer.wait(0.01)
        with pytest.raises(RunError, match="the save before to have ended"):
            writer.start(lambda: second.append(1))
        job.go_on.set()
        assert writer.wait(SOON_S)
        assert not writer.busy
        writer.start(lambda: second.append(2))
    assert second == [2]


def test_jobs_run_elsewhere_and_stand_back():
    seen = []
    with Writer("runs/a") as writer:
        writer.start(lambda: seen.append((threading.current_thread(), snapshots.os.getpriority(0, 0))))
    thread, niceness = seen[0]
    assert thread is not threading.main_thread()
    assert niceness >= NICENESS
    assert snapshots.os.getpriority(0, 0) < NICENESS


def test_a_sandbox_that_forbids_priorities_costs_no_save(monkeypatch):
    def forbidden(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(snapshots.os, "setpriority", forbidden)
    written = []
    with Writer("runs/a") as writer:
        writer.start(lambda: written.append(1))
    assert written == [1]


def begins(writer, done):
    """The next boundary, and that the job is done after it."""
    writer.check()
    assert done.wait(SOON_S)


def test_a_job_begins_at_the_next_boundary(monkeypatch):
    """The step that met the copy has enough of it."""
    monkeypatch.setattr(pace_module, "_MOST_S", 10 * SOON_S)
    done = threading.Event()
    with Writer("runs/a") as writer:
        writer.start(done.set)
        assert not done.wait(0.05)
        begins(writer, done)


def test_a_job_whose_boundary_does_not_come_begins_by_itself(monkeypatch):
    monkeypatch.setattr(pace_module, "_MOST_S", 0.01)
    done = threading.Event()
    with Writer("runs/a") as writer:
        writer.start(done.set)
        assert done.wait(SOON_S)


class Clock:
    """A thread's time, and what it waits for."""

    def __init__(self, monkeypatch, load, cores=4):
        self.worked, self.waits, self.hurries = 0.0, [], False
        monkeypatch.setattr(pace_module.time, "thread_time", lambda: self.worked)
        monkeypatch.setattr(pace_module.os, "getloadavg", lambda: (load, 0.0, 0.0))
        monkeypatch.setattr(pace_module.os, "sched_getaffinity", lambda pid: range(cores))

    def wait(self, timeout=None):
        self.waits.append(timeout)

    def set(self):
        self.hurries = True

    def is_set(self):
        return self.hurries


def paced(monkeypatch, load, pieces, hurried_before=99):
    """How long a job rested that did pieces of so many seconds."""
    clock, pace = Clock(monkeypatch, load), Pace()
    pace._hurries = clock
    pace.begin()
    with pace.kept():
        for number, seconds in enumerate(pieces):
            if number == hurried_before:
                pace.hurry()
            clock.worked += seconds
            rest()
    return clock.waits


def test_a_job_rests_nine_times_as_long_as_it_works(monkeypatch):
    assert paced(monkeypatch, 3.5, [0.002, 0.004]) == pytest.approx([0.018, 0.036])


def test_short_pieces_are_put_together(monkeypatch):
    assert paced(monkeypatch, 3.5, [0.0004, 0.0004, 0.0004, 0.0004]) == pytest.approx([0.0108])


def test_where_a_core_is_free_nobody_rests(monkeypatch):
    assert paced(monkeypatch, 3.0, [0.002, 0.004]) == []


def test_where_nobody_knows_the_load_a_job_rests(monkeypatch):
    def unknown():
        raise OSError("Load averages are unobtainable")

    clock, pace = Clock(monkeypatch, load=0), Pace()
    monkeypatch.setattr(pace_module.os, "getloadavg", unknown)
    pace._hurries = clock
    clock.worked = 0.002
    pace.rest()
    assert clock.waits == pytest.approx([0.018])


def test_a_job_that_somebody_waits_for_does_not_rest(monkeypatch):
    assert paced(monkeypatch, 3.5, [0.002, 0.002, 0.002], hurried_before=1) == pytest.approx([0.018])


def test_outside_of_a_job_nobody_rests(monkeypatch):
    clock = Clock(monkeypatch, load=9)
    clock.worked = 5.0
    rest()
    assert clock.waits == []


def test_writing_checking_and_looking_rest_between_blocks(tmp_path, monkeypatch):
    rests = []
    for module in (tensors_module, snapshots):
        monkeypatch.setattr(module, "rest", lambda: rests.append(1))
    tensor = {"a": np.zeros(3 * 2**20 // 4, "float32")}
    fact = write_tensors(tmp_path / "a", tensor)
    assert len(rests) == 4, "a header and three blocks of a MiB"
    tensors_module.check_file(tmp_path / "a", fact)
    assert len(rests) == 4 + 4
    assert snapshots.non_finite(tensor) == []
    assert len(rests) == 4 + 4 + 3


def failing(error):
    def job():
        raise error

    return job


def test_an_error_is_raised_once_at_the_next_boundary():
    writer = Writer("runs/a")
    writer.check()
    error = OSError(28, "No space left on device")
    writer.start(failing(error))
    writer.wait(SOON_S)
    with pytest.raises(RunError, match="write a checkpoint to runs/a, received: No space left on device") as caught:
        writer.check()
    assert caught.value.__cause__ is error
    writer.check()
    writer.close()


def test_no_error_before_a_job_has_ended():
    writer, job = Writer("runs/a"), SlowWriting({"a": None})
    writer.start(job)
    writer.check()
    job.go_on.set()
    with pytest.raises(RunError, match="AttributeError: 'NoneType'"):
        writer.close()


def test_a_sentence_stays_what_it_is():
    writer, error = Writer("runs/a"), RunError("Expected this, received that.")
    writer.start(failing(error))
    with pytest.raises(RunError) as caught:
        writer.close()
    assert caught.value is error


def test_the_next_job_does_not_hide_an_error():
    writer, ran = Writer("runs/a"), []
    writer.start(failing(ValueError("first")))
    writer.wait(SOON_S)
    with pytest.raises(RunError, match="ValueError: first"):
        writer.start(lambda: ran.append(1))
    assert not ran
    assert not writer.busy
    writer.close()


def test_an_error_on_its_way_out_goes_on_and_the_job_s_is_said(monkeypatch):
    said = []
    monkeypatch.setattr("distfit.checkpoint.writer.warn_once", said.append)

    def training():
        with Writer("runs/a") as writer:
            writer.start(failing(ValueError("the save's")))
            raise KeyError("the training's")

    with pytest.raises(KeyError, match="the training's"):
        training()
    assert len(said) == 1
    assert "ValueError: the save's" in said[0]


AT_EXIT = """
import sys, time
from distfit.checkpoint.writer import Writer

def job():
    time.sleep(0.5)
    open(sys.argv[1], "w").write("whole")
    raise OSError(5, "Input/output error")

Writer("runs/a").start(job)
"""


def test_the_interpreter_ends_after_the_last_save_and_says_its_error(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, str(tmp_path / "file")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SOON_S,
    )
    assert (tmp_path / "file").read_text() == "whole"
    assert "checkpoint to runs/a, received: Input/output error" in done.stderr
