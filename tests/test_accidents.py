"""Accidents that happen to everybody once, on real ranks; tests/test_meeting.py has those of machines with GPUs."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest

import distfit
from distfit import checks
from distfit.backends import devices
from distfit.callbacks.saver import ModelSaver
from distfit.session import Session
from distfit.topology import Topology
from distfit.training.memory import out_of_memory
from tests.ranks import launch
from tests.test_failing import errors


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of three ranks saw, the order of what they did, and what the job printed."""
    out = tmp_path_factory.mktemp("accidents")
    job = launch(["-m", "tests.accidents_script", "together", str(out)], ranks=3)
    assert job.code == 0, job.report()
    ranks = [json.loads((out / f"seen-{rank}.json").read_text()) for rank in range(3)]
    return ranks, (out / "order").read_text().splitlines(), job


@pytest.mark.mpi
@pytest.mark.slow
def test_the_chief_goes_first_and_the_others_follow(seen):
    ranks, order, _ = seen
    assert order[0] == "first 0"
    assert sorted(order[1:3]) == ["first 1", "first 2"]
    assert [rank["in turn"] for rank in ranks] == [True] * 3
    assert "must not be reached" not in order


@pytest.mark.mpi
@pytest.mark.slow
def test_a_chief_that_fails_first_stops_those_who_wait(seen):
    said = [rank["fails on the chief"] for rank in seen[0]]
    assert said[0] == "InputError: the chief's disk is full"
    assert (
        said[1:]
        == ["RunError: Rank 0 of 3 failed while the others waited for it: InputError: the chief's disk is full"] * 2
    )


@pytest.mark.mpi
@pytest.mark.slow
def test_ranks_that_download_the_same_get_whole_files_and_are_told_once(seen):
    ranks, _, job = seen
    assert [rank["at the same time"] for rank in ranks] == [True] * 3
    # What several ranks downloaded lies there once, whole, and nothing beside it.
    assert ranks[0]["left over"] == ["at-once.h5", "in-turn.h5", "pretrained.h5"]
    assert errors(job).count("every rank downloads") == 1, job.report()
    assert "with distfit.init().chief_first():" in errors(job)


@pytest.mark.mpi
@pytest.mark.slow
def test_a_builder_function_runs_on_the_chief_first(seen):
    ranks, order, _ = seen
    builds = [line for line in order if line.startswith("builds")]
    assert builds[0] == "builds 0"
    assert sorted(builds) == ["builds 0", "builds 1", "builds 2"]
    assert ranks[0]["history"] == ranks[1]["history"] == ranks[2]["history"]


@pytest.mark.mpi
@pytest.mark.slow
def test_other_configurations_are_refused_with_a_table(seen):
    for rank in seen[0]:
        words = " ".join(rank["configurations"].split())
        assert words.startswith("InputError: Expected the same configuration on every rank, received: ranks 0-1 rank 2")
        assert words.endswith("epochs 0 1 Copy it.")


@pytest.mark.mpi
@pytest.mark.slow
def test_other_versions_are_refused_before_anything_starts(tmp_path):
    job = launch(["-m", "tests.accidents_script", "other_versions", str(tmp_path)], ranks=2)
    assert job.code == 2, job.report()
    assert errors(job).count("Expected the same versions on every rank") == 1, job.report()
    assert "3.15.2" in errors(job)
    assert "Traceback" not in job.errors
    assert not list(tmp_path.iterdir())


@pytest.mark.mpi
@pytest.mark.slow
def test_a_launcher_of_another_mpi_is_refused(tmp_path):
    job = launch(["-m", "tests.accidents_script", "foreign_launcher", str(tmp_path)], launcher="none")
    assert job.code == 2, job.report()
    assert "Expected the 2 ranks that the launcher started, received a job of 1" in errors(job), job.report()
    assert not list(tmp_path.iterdir())


@pytest.mark.mpi
@pytest.mark.slow
def test_out_of_memory_says_the_rows_of_a_replica_and_what_to_lower(tmp_path):
    job = launch(["-m", "tests.accidents_script", "out_of_memory", str(tmp_path)], ranks=2)
    assert job.code != 0
    said = errors(job)
    assert "Out of memory on CPU:0: 4 rows of the batch of 8 for each of the 2 replicas" in said, job.report()
    assert "Lower batch_size (4 halves the rows" in said


def test_out_of_memory_without_a_known_batch():
    assert "Make the batches smaller (gradient_accumulation_steps=2" in out_of_memory("OOM", ["GPU:0"], None, 2)


def test_out_of_memory_with_one_row_a_replica_does_not_ask_for_fewer():
    text = out_of_memory("OOM", ["GPU:0"], 8, 8)
    assert "a single row for each of the 8 replicas was too much (OOM). Make the model or its inputs smaller" in text
    assert "batch_size" not in text


class Job:
    """Sessions of ranks as threads, of which `hosts` says who is where."""

    def __init__(self, hosts):
        self.size = len(hosts)
        self._values, self._barrier = [None] * self.size, threading.Barrier(self.size, timeout=20)
        self.sessions = [self._session(rank, hosts) for rank in range(self.size)]

    def _session(self, rank, hosts):
        session = Session.__new__(Session)
        session.topology = Topology(rank, self.size, hosts[:rank].count(hosts[rank]), hosts.count(hosts[rank]))
        session.in_turn = False
        session.transport = type("Transport", (), {"gather": lambda _, value: self._gather(rank, value)})()
        return session

    def _gather(self, rank, value):
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def run(self, function):
        """What each rank's call returned or raised."""
        results = [None] * self.size

        def one(rank):
            try:
                results[rank] = function(self.sessions[rank])
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results


def test_after_the_chief_comes_one_rank_of_each_other_host():
    order = []

    def block(session):
        with session.chief_first():
            order.append(session.rank)

    assert Job(["a", "a", "b", "b", "c"]).run(block) == [None] * 5
    assert order[0] == 0
    assert set(order[1:3]) == {2, 4}
    assert set(order[3:]) == {1, 3}


@pytest.mark.parametrize(("failing", "ran"), [(0, {0}), (2, {0, 2, 4}), (3, {0, 1, 2, 3, 4})])
def test_whoever_waits_for_a_rank_that_fails_is_told(failing, ran):
    entered = set()

    def block(session):
        with session.chief_first():
            entered.add(session.rank)
            if session.rank == failing:
                raise OSError("no space")

    results = Job(["a", "a", "b", "b", "c"]).run(block)
    assert entered == ran
    assert isinstance(results[failing], OSError)
    told = [result for rank, result in enumerate(results) if rank != failing and result is not None]
    assert len(told) == (0 if failing == 3 else 4)
    assert all(isinstance(error, distfit.RunError) and error.agreed and "no space" in str(error) for error in told)


def test_a_builder_that_takes_turns_by_itself_may_be_called_in_turns():
    def build(session):
        with session.chief_first():
            if session.is_chief:
                raise distfit.InputError("no such weights")

    results = Job(["a", "a", "b", "b"]).run(lambda session: session.agree(lambda: build(session), in_turns=True))
    assert {type(error) for error in results} == {distfit.InputError}
    assert {str(error) for error in results} == {"no such weights"}


DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return number > 1; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { memset(uuid, device + 10, 16); return 0; }
"""


@pytest.mark.mpi  # a compiler is needed, as for Horovod
def test_gpus_are_told_apart_by_the_driver(tmp_path, monkeypatch):
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True, timeout=60)
    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: real(str(library) if name == "libcuda.so.1" else name))
    assert devices._uuid(0) == "GPU-" + "0a" * 16
    assert devices._uuid(1) == "GPU-" + "0b" * 16
    assert devices._uuid(2) is None


def test_without_a_driver_a_number_has_to_do(monkeypatch):
    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert devices._uuid(0) is None


def test_a_process_that_sees_one_gpu_takes_it_whatever_its_local_rank(monkeypatch):
    pinned = []
    monkeypatch.setattr("tensorflow.config.list_physical_devices", lambda kind: ["one"])
    monkeypatch.setattr("tensorflow.config.set_visible_devices", lambda gpu, kind: pinned.append(gpu))
    monkeypatch.setattr(devices, "visible_gpus", lambda: ["one"])
    assert devices.pin_gpu(3) == ["GPU:0"]
    assert pinned == ["one"]


def test_a_folder_without_room_for_the_model_is_refused(tmp_path, monkeypatch):
    import keras

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    weights = [keras.Variable(np.zeros((1000, 500), np.float32))]
    with pytest.raises(distfit.InputError, match=r"room for the model in .* twice.* 4\.0 MB .* received 0\.0 MB free"):
        checks.room(tmp_path / "not" / "there", weights)
    checks.room(None, weights)
    checks.room(tmp_path, [])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a file system is not permitted here: {mounted.stderr.strip()}")
    yield folder
    # Lazily: a writer of logs, whose run has failed, still has its file open.
    subprocess.run(["umount", "-l", folder], check=True, timeout=30)


def test_a_full_run_folder_is_refused_before_training(small_disk):
    (small_disk / "filler").write_bytes(b"\0" * 300_000)
    with pytest.raises(distfit.InputError, match=r"Expected to be able to write .* No space left on device"):
        checks.writable(small_disk / "run")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_run_folder_that_fills_up_keeps_the_model_of_the_epoch_before(small_disk):
    import keras

    model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(400)])
    saver = ModelSaver(small_disk / "run")
    saver.set_model(model)
    saver.on_epoch_end(0)
    words = r"model of epoch 2 .* No space left .* the epoch before is there, whole"
    with pytest.raises(distfit.RunError, match=words):
        saver.on_epoch_end(1)
    assert os.listdir(small_disk / "run") == ["model.keras"]
    keras.models.load_model(small_disk / "run" / "model.keras")


@pytest.mark.slow
def test_a_disk_that_fills_up_under_the_logs_is_no_lack_of_memory(small_disk):
    # In a process of its own: the writer of the logs stays behind and fails again whenever anybody logs.
    job = launch(["-m", "tests.accidents_script", "disk_fills_up", str(small_disk)])
    assert job.code == 1, job.report()
    last = errors(job).splitlines()[-1]
    assert re.search(r"RunError: TensorFlow could not write .*No space left on device\. Make room there", last), (
        job.report()
    )
