"""The files in launch/, as linters and the APIs see them; tests/test_launch_ranks.py runs the scripts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.ranks import BIN, ROOT, environment

LAUNCH = ROOT / "launch"
SCRIPTS = ["mpirun.sh", "horovodrun.sh", "single-node.sh", "slurm.sbatch"]


def test_the_folder_holds_what_the_guide_names():
    assert sorted(file.name for file in LAUNCH.iterdir()) == sorted([*SCRIPTS, "mpijob.yaml"])
    guide = (ROOT / "docs" / "guides" / "launching.md").read_text()
    assert [file.name for file in LAUNCH.iterdir() if f"launch/{file.name}" not in guide] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name):
    done = subprocess.run(
        [str(BIN / "shellcheck"), str(LAUNCH / name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_open_with_when_to_use_them_and_stop_at_the_first_error(name):
    lines = (LAUNCH / name).read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    comment = [line for line in lines[1:] if line.startswith("#")]
    assert f"launch/{name}" in "\n".join(comment)
    assert "set -euo pipefail" in lines
    assert len(lines) <= 45
    variables = [line for line in lines if re.match(r"[A-Z_]+=\$\{", line)]
    assert variables
    assert lines.index(variables[-1]) < lines.index("[[ $# -gt 0 ]] || set -- distfit train configs/digits.yaml")
    assert os.access(LAUNCH / name, os.X_OK) is name.endswith(".sh")


@pytest.fixture(scope="module")
def job():
    return yaml.safe_load((LAUNCH / "mpijob.yaml").read_text())


@pytest.fixture(scope="module")
def schema():
    return json.loads((ROOT / "tests" / "mpijob_schema.json").read_text())


def test_the_mpijob_is_one(job, schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(job, schema)


def test_its_pods_are_pods(job):
    for replicas in job["spec"]["mpiReplicaSpecs"].values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, **replicas["template"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_its_ranks_start_as_many_threads_as_their_pod_has_cores(job):
    """TensorFlow does not see a pod's limit."""
    launcher, worker = (
        job["spec"]["mpiReplicaSpecs"][name]["template"]["spec"]["containers"][0] for name in ("Launcher", "Worker")
    )
    threads = int(worker["resources"]["limits"]["cpu"]) // job["spec"]["slotsPerWorker"]
    assert f"-x OMP_NUM_THREADS={threads} -x TF_NUM_INTRAOP_THREADS={threads} " in launcher["args"][0]


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (["apiVersion"], "kubeflow.org/v1"),
        (["spec", "slotsPerWorkers"], 2),
        (["spec", "runPolicy", "cleanPodPolicy"], "Never"),
        (["spec", "mpiReplicaSpecs", "Launcher", "replicas"], 2),
        (["spec", "mpiReplicaSpecs", "Workers"], {"template": {"spec": {"containers": [{}]}}}),
    ],
)
def test_the_schema_refuses_what_the_operator_refuses(job, schema, path, wrong):
    broken = json.loads(json.dumps(job))
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


# --- asked to leave

# In place of a launcher: notes its arguments and what it hears, and leaves as ranks do that have saved.
HEARS = f"""#!{sys.executable}
import os, signal, sys, time
if "--version" in sys.argv:
    sys.exit(print("mpirun (Open MPI) 4.1.8"))
told = open("told", "a", buffering=1)
def leave(number, frame):
    told.write(signal.Signals(number).name + "\\n")
    time.sleep(0.2)  # the save, while nobody gives up waiting
    os._exit(130 if number == signal.SIGUSR2 else 75 if number == signal.SIGUSR1 else 1)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, leave)
told.write(" ".join(sys.argv[1:]) + "\\n")
time.sleep(30)
"""


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def with_programs(folder: Path, **more: str) -> dict[str, str]:
    return environment(**more, PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")


@contextmanager
def listening(folder, *command):
    """A script whose launcher is `HEARS`, once that listens; what it was told is in the file `told`."""
    process = subprocess.Popen(
        command, cwd=folder, env=with_programs(folder), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 30
        while not (folder / "told").exists() or not (folder / "told").read_text():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("code", "queued"), [(0, ""), (3, ""), (75, "requeue 4711\n"), (143, "")])
def test_the_slurm_script_queues_its_job_again_after_75(tmp_path, code, queued):
    program(tmp_path, "srun", f"#!/bin/sh\necho $@ > started; exit {code}\n")
    program(tmp_path, "scontrol", "#!/bin/sh\necho $@ > queued\n")
    given = with_programs(tmp_path, SLURM_CPUS_PER_TASK="3", SLURM_JOB_ID="4711")
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "python", "train.py"]
    assert subprocess.run(command, cwd=tmp_path, env=given, check=False, timeout=60).returncode == code
    assert (tmp_path / "started").read_text() == "--mpi=pmix --cpus-per-task=3 --kill-on-bad-exit=1 python train.py\n"
    found = tmp_path / "queued"
    assert (found.read_text() if found.exists() else "") == queued


def test_slurm_warns_the_ranks_and_may_queue_the_job_again():
    options = re.findall(r"^#SBATCH (\S+)", (LAUNCH / "slurm.sbatch").read_text(), re.M)
    # Without B: it goes to the ranks, and not to the script, which would die of it.
    assert {"--signal=USR1@120", "--requeue", "--open-mode=append"} <= set(options)


@pytest.mark.parametrize(
    ("told", "heard", "code"),
    [(signal.SIGTERM, "SIGUSR1", 75), (signal.SIGUSR1, "SIGUSR1", 75), (signal.SIGINT, "SIGUSR2", 130)],
)
@pytest.mark.parametrize(("script", "launcher"), [("mpirun.sh", "mpirun"), ("horovodrun.sh", "python")])
def test_scripts_pass_on_what_lets_ranks_save_and_leave(tmp_path, script, launcher, told, heard, code):
    """The terminal's Ctrl-C goes to the whole group, and reaches the launcher through the script alone."""
    program(tmp_path, launcher, HEARS)
    with listening(tmp_path, str(LAUNCH / script), "python", "train.py") as process:
        os.killpg(process.pid, told)
        assert process.wait(timeout=30) == code
    arguments, *signals = (tmp_path / "told").read_text().splitlines()
    assert arguments.endswith("python train.py")
    assert signals == [heard]


@pytest.fixture
def launcher(job):
    """What the MPIJob's launcher runs, with its folders in the working one."""
    (text,) = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]["args"]
    for path in ("/job-ssh", "/etc/mpi", "/tmp/known_hosts"):
        assert path in text
        text = text.replace(path, f".{path}")
    return text


def test_the_mpijobs_launcher_waits_for_its_workers_and_hands_on_that_they_have_to_leave(tmp_path, launcher):
    for folder in ("job-ssh", "etc/mpi", "tmp"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "job-ssh" / "id_rsa.pub").write_text("ssh-rsa AAAA\n")
    (tmp_path / "etc/mpi/hostfile").write_text("distfit-worker-0.distfit slots=1\ndistfit-worker-1.distfit slots=1\n")
    # The second worker is not there at first.
    program(tmp_path, "ssh", "#!/bin/sh\nprintf '%s\\n' \"$*\" >> asked\n[ $(wc -l < asked) != 2 ]\n")
    program(tmp_path, "sleep", "#!/bin/sh\n")
    program(tmp_path, "mpirun", HEARS)
    with listening(tmp_path, "bash", "-euc", launcher) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75
    asked = [line.split()[-2:] for line in (tmp_path / "asked").read_text().splitlines()]
    assert asked == [[f"distfit-worker-{number}.distfit", "true"] for number in (0, 1, 1)]
    arguments, *signals = (tmp_path / "told").read_text().splitlines()
    assert "distfit train" in arguments
    assert signals == ["SIGUSR1"]


def test_a_worker_that_has_to_leave_tells_its_ranks_and_waits_for_them(job, tmp_path):
    container = job["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    shell, option, text = container["lifecycle"]["preStop"]["exec"]["command"]
    ranks = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    daemon = tmp_path / "proc" / "41"
    for folder, name in ((daemon, "orted"), (tmp_path / "proc" / "7", "sshd")):
        (folder / "task" / folder.name).mkdir(parents=True)
        (folder / "comm").write_text(f"{name}\n")
        children = [rank.pid for rank in ranks] if name == "orted" else [os.getpid()]
        (folder / "task" / folder.name / "children").write_text("".join(f"{pid} " for pid in children))
    # The daemon goes when its ranks have gone, which is looked at in between.
    program(tmp_path, "sleep", "#!/bin/sh\nrm -r proc/41\n")
    done = subprocess.run(
        [shell, option, text.replace("/proc/", "proc/")], cwd=tmp_path, env=with_programs(tmp_path), timeout=60
    )
    assert done.returncode == 0
    assert [rank.wait(timeout=30) for rank in ranks] == [-signal.SIGUSR1] * 2
    assert not daemon.exists()


def test_the_mpijobs_pods_have_the_time_to_save_and_are_tried_again(job):
    assert job["spec"]["runPolicy"]["backoffLimit"] > 0
    for replicas in job["spec"]["mpiReplicaSpecs"].values():
        assert replicas["restartPolicy"] in ("Never", "OnFailure")  # ExitCode is Never to the operator
        assert replicas["template"]["spec"]["terminationGracePeriodSeconds"] == 120


def test_shellcheck_finds_nothing_in_the_mpijob(job):
    pods = {name: replicas["template"]["spec"] for name, replicas in job["spec"]["mpiReplicaSpecs"].items()}
    scripts = [
        pods["Launcher"]["containers"][0]["args"][0],
        pods["Worker"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1],
    ]
    for script in scripts:
        # Options, hosts and process ids are words of their own.
        command = [str(BIN / "shellcheck"), "--shell=bash", "--exclude=SC2013,SC2046,SC2086", "-"]
        done = subprocess.run(command, input=script, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
