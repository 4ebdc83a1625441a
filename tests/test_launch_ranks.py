"""`distfit launch` and the scripts of launch/ with real launchers: what ranks get, how they end, and two hosts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.ranks import ROOT, environment, require
from tests.two_hosts import INTERFACE, two_hosts

SECRET = "s3cr3t-4711"
LAUNCH = [sys.executable, "-m", "distfit", "launch"]
# Own words for root, as containers and these machines are.
LAUNCHERS = {
    "mpirun": ["--launcher", "mpirun", "--allow-run-as-root"],
    "gloo": ["--gloo"],
}
WAITING = ["python", str(ROOT / "tests" / "launch_script.py")]


def surroundings(tmp_path: Path, **more: str) -> dict[str, str]:
    """The environment of a user with a secret, whom nobody allowed to be root."""
    mine = environment(AWS_SECRET_ACCESS_KEY=SECRET, HOME=str(tmp_path), TMPDIR=str(tmp_path), **more)
    return {name: value for name, value in mine.items() if not name.startswith("OMPI_ALLOW")}


@contextmanager
def waiting_job(tmp_path: Path, launcher: str, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Two ranks of tests/launch_script.py that have started; nothing of them is left afterwards."""
    require("mpirun" if launcher == "mpirun" else "horovodrun")
    process = subprocess.Popen(
        [*LAUNCH, "-np", "2", *LAUNCHERS[launcher], "--", *WAITING, str(tmp_path), *more],
        env=surroundings(tmp_path),
        stdin=subprocess.DEVNULL,
        stdout=(tmp_path / "log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    family = []
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("rank-*.json"))) < 2:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        family = family_of(process.pid)  # which cannot be asked for when the launcher has ended before its ranks
        yield process
    finally:
        for one in {*family, *family_of(process.pid)}:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def family_of(pid: int) -> list[psutil.Process]:
    """A process and its descendants, those that are gone meanwhile left out."""
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def records_of(process: psutil.Process) -> list[str]:
    """What the kernel shows of a process; nothing of one that is gone meanwhile."""
    try:
        return [Path(f"/proc/{process.pid}/{name}").read_text() for name in ("cmdline", "environ")]
    except (FileNotFoundError, ProcessLookupError):
        return []


def ranks_in(folder: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*.json"))]


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_secret_reaches_no_rank_command_line_or_file_and_ctrl_c_ends_all(launcher, tmp_path):
    with waiting_job(tmp_path, launcher) as process:
        everybody = family_of(process.pid)
        ranks = ranks_in(tmp_path)
        assert [rank["size"] for rank in ranks] == [2, 2]
        assert {rank["pid"] for rank in ranks} <= {one.pid for one in everybody}
        for rank in ranks:
            assert SECRET not in rank["environment"].values()
            assert rank["environment"]["OMP_NUM_THREADS"] == "1"
            assert rank["environment"]["PYTHONPATH"] == str(ROOT)
        # The kernel's own record of each process: its arguments and what it was started with. What the person typed
        # has the person's environment, as the shell around it.
        started = [one for one in everybody if one.pid != process.pid]
        seen = [text for one in started for text in records_of(one)]
        assert any("launch_script.py" in text for text in seen)
        assert [text for text in seen if SECRET in text] == []
        written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
        assert [text for text in written if SECRET.encode() in text] == []

        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert psutil.wait_procs(everybody, timeout=15)[1] == []


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_that_save_get_the_time_and_their_code_is_the_jobs(launcher, tmp_path):
    """SIGTERM to distfit launch, and to its group; a save takes longer than mpirun would give it."""
    with waiting_job(tmp_path, launcher, "saves") as process:
        everybody = family_of(process.pid)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=30) == 75
        assert psutil.wait_procs(everybody, timeout=15)[1] == []
    assert sorted(file.name for file in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_ends_the_job(launcher, tmp_path):
    with waiting_job(tmp_path, launcher) as process:
        everybody = family_of(process.pid)
        os.kill(ranks_in(tmp_path)[1]["pid"], signal.SIGKILL)
        assert process.wait(timeout=30) == 128 + signal.SIGKILL
        assert psutil.wait_procs(everybody, timeout=15)[1] == []


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with the digits, and the loss of one epoch by one process."""
    folder = tmp_path_factory.mktemp("digits")
    for words in (["data", "build", "--from", "digits", "data/digits"], train("alone", "strategy=single")):
        command = [sys.executable, "-m", "distfit", *words]
        subprocess.run(command, check=True, cwd=folder, env=environment(), timeout=120, capture_output=True)
    return folder


def train(run: str, *more: str) -> list[str]:
    return ["train", str(ROOT / "configs" / "digits.yaml"), "epochs=1", f"run_dir=runs/{run}", *more]


def compare(folder: Path, run: str) -> None:
    """A run's losses are those of one process alone."""
    expected, received = (
        json.loads((folder / "runs" / name / "history.json").read_text())["history"] for name in ("alone", run)
    )
    for metric in ("loss", "val_loss"):
        assert received[metric] == pytest.approx(expected[metric], abs=1e-5)


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_across_two_hosts_the_digits_end_as_on_one(launcher, digits, tmp_path):
    """Ranks on two machines train the same; ssh is called without a word about host keys, and hands on no secret."""
    require("mpirun" if launcher == "mpirun" else "horovodrun")
    options = ["--hosts", "h1:1,h2:1", "--interface", INTERFACE, *LAUNCHERS[launcher]]
    with two_hosts(tmp_path) as hosts:
        argv = [*LAUNCH, *options, "--", "python", "-m", "distfit", *train(launcher)]
        job = hosts.run("h1", argv, surroundings(tmp_path), cwd=digits)
        assert job.code == 0, job.report()
        assert "ranks           2 on h1, h2" in job.errors
        assert "h2" in hosts.ssh_log
        assert "StrictHostKeyChecking" not in hosts.ssh_log
        assert SECRET not in hosts.ssh_log + job.report()
    compare(digits, launcher)


SCRIPTS = {
    "mpirun.sh": ("mpirun", {}, "ranks           2 on"),
    "horovodrun.sh": ("gloo", {}, "ranks           2 on"),
    "horovodrun.sh with MPI": ("horovodrun-mpi", {"CONTROLLER": "mpi"}, "ranks           2 on"),
    "single-node.sh": ("none", {}, "devices         CPU:0, CPU:1"),
}


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_train_the_digits_as_one_process_does(name, digits):
    launcher, variables, told = SCRIPTS[name]
    require(launcher)
    run = name.replace(" ", "-")
    command = [str(ROOT / "launch" / name.split()[0]), "python", "-m", "distfit", *train(run)]
    env = environment(AWS_SECRET_ACCESS_KEY=SECRET, **variables)
    done = subprocess.run(command, cwd=digits, env=env, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert told in done.stderr
    compare(digits, run)
