import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()


def make(*arguments: str) -> str:
    """What make prints, in an environment that is not there yet."""
    command = ["make", "--no-print-directory", *arguments, "VENV=/nonexistent/venv", "PYTHON=python3"]
    # Under `make test` this make must not take part in the outer one.
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def test_help_names_every_target():
    targets = re.search(r"^\.PHONY: help (.*)$", MAKEFILE, re.MULTILINE)[1].split()
    said = make("help")
    assert [target for target in targets if f"make {target} " not in said] == []


def test_the_demonstration_needs_neither_mpi_nor_horovod():
    typed = make("-n", "demo", "GPUS=")
    assert "strategy=mirrored devices=2" in typed
    assert "horovod" not in typed
    assert "mpi" not in typed


def test_on_a_machine_with_gpus_the_demonstration_takes_them_all():
    typed = make("-n", "demo", "GPUS=/dev/nvidia0")
    assert "--editable .[cuda]" in typed
    assert "devices=" not in typed


def test_the_suite_is_installed_with_horovod_and_run_whole():
    typed = make("-n", "test")
    assert typed.index("distfit horovod install") < typed.index("python -m pytest")
    assert " -m " not in typed.split("python -m pytest", 1)[1]


def test_continuous_integration_calls_exactly_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "exec make test"


@pytest.mark.parametrize(("second", "status"), [(0.5000001, 0), (0.5001, 1)])
def test_the_losses_of_two_runs_are_compared(tmp_path, second, status):
    for name, loss in (("one", 0.5), ("two", second)):
        (tmp_path / name).mkdir()
        history = {"history": {"loss": [1.0, loss], "accuracy": [0.5, 0.9]}}
        (tmp_path / name / "history.json").write_text(json.dumps(history))
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "final_losses.py"),
        tmp_path / "one",
        tmp_path / "two",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    assert "0.50000000" in done.stdout
