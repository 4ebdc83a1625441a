"""A run that is asked to end saves, leaves with 75 or 130 and one line, and goes on as if nothing had happened.

`tests/test_interrupt.py` has the signals by themselves, `tests/test_launch.py` what `distfit launch` passes on.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from distfit.errors import Interrupted, Preempted
from tests.preemption_script import Asked, tell, train
from tests.ranks import ROOT, environment, launch, require

END_LIMIT_S = 10.0
SCRIPT = ["-m", "tests.preemption_script"]
SAYS = re.compile(r"distfit: (?:preempted|interrupted).*")


def run(case, folder, ranks=2):
    return launch([*SCRIPT, str(folder), case], ranks=ranks, limit_s=120)


def saved_in(folder, line):
    """The checkpoint that a line names is there."""
    (path,) = re.findall(r"checkpoint (\S+) is saved", line)
    return path.startswith(str(folder / "run" / "step-")) and (folder / "run" / path.rsplit("/", 1)[1]).is_dir()


def result(folder, case):
    with np.load(folder / f"{case}.npz") as weights:
        return {name: weights[name] for name in weights}, json.loads((folder / f"{case}.json").read_text())


@pytest.mark.mpi
@pytest.mark.slow
def test_two_ranks_that_are_asked_three_times_end_as_if_nobody_had_asked(tmp_path):
    """SIGTERM to one rank, SIGUSR1 to mpirun, Ctrl-C to `distfit launch`; then to the end, with the same bits."""
    job = run("reference_and_two_requests", tmp_path)
    assert job.code == 75, job.report()
    first, second = SAYS.findall(job.errors)
    assert re.match(r"distfit: preempted \(SIGTERM on rank 1\) at epoch 2, step \d+ .*; exit 75$", first), job.report()
    assert re.match(r"distfit: preempted \(SIGUSR1 on ranks? 0.*\) at epoch 3, step \d+ .*; exit 75$", second)
    assert saved_in(tmp_path, first), first
    assert "Traceback" not in job.errors, job.report()
    assert {file.name for file in tmp_path.glob("exit-*")} == {"exit-0", "exit-1"}

    require("mpirun")
    asked = [sys.executable, "-m", "distfit", "launch", "-np", "2", "--allow-run-as-root", "--", sys.executable]
    done = subprocess.run(
        [*asked, *SCRIPT, str(tmp_path), "ctrl_c_at_distfit_launch"],
        capture_output=True, text=True, check=False, timeout=120, cwd=ROOT, env=environment(), start_new_session=True,
    )  # fmt: skip
    (line,) = SAYS.findall(done.stderr)
    assert re.match(r"distfit: interrupted \(Ctrl-C on ranks? .*\) at epoch 4, step \d+ .*; exit 130$", line)
    assert saved_in(tmp_path, line), line
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr, done.stderr

    job = run("to_the_end", tmp_path)
    assert job.code == 0, job.report()
    weights, history = result(tmp_path, "reference")
    resumed, told = result(tmp_path, "resumed")
    assert {name: np.array_equal(resumed[name], value) for name, value in weights.items()} == dict.fromkeys(
        weights, True
    )
    assert told == history


@pytest.mark.mpi
@pytest.mark.slow
def test_a_second_signal_ends_all_ranks_at_once(tmp_path):
    job = run("told_twice", tmp_path)
    assert time.monotonic() - float((tmp_path / "told").read_text()) < END_LIMIT_S, job.report()
    assert job.code == 75, job.report()
    (line,) = SAYS.findall(job.errors)
    assert re.match(
        r"distfit: preempted again \(SIGTERM\) on rank 1 of 2 on host \S+ .*: ended at once; exit 75$", line
    )
    assert "Traceback" not in job.errors, job.report()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "code", "says"),
    [
        (
            "sigterm_alone",
            75,
            r"distfit: preempted \(SIGTERM\) at epoch 2, step 4 \(.*\): checkpoint \S+ is saved; exit 75",
        ),
        (
            "ctrl_c_alone",
            130,
            r"distfit: interrupted \(Ctrl-C\) at epoch 3, step 4 \(.*\): checkpoint \S+ is saved; exit 130",
        ),
    ],
)
def test_a_script_of_one_process_ends_with_one_line(tmp_path, case, code, says):
    job = run(case, tmp_path, ranks=1)
    assert job.code == code, job.report()
    said = [line for line in job.errors.splitlines() if line.startswith(("distfit", "Traceback"))]
    assert re.fullmatch(says, said[-1]), job.report()
    assert not [line for line in said if line.startswith("Traceback")], job.report()
    assert (tmp_path / "exit").exists() is (case == "sigterm_alone")


def test_a_signal_in_a_step_in_validation_or_between_epochs_changes_nothing_in_the_end(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    reference = train(None)
    requests = [
        (Preempted, Asked(tell(signal.SIGTERM), epoch=0)),
        (Preempted, Asked(tell(signal.SIGUSR1), epoch=1, batch=1, method="test")),
        (Interrupted, Asked(tell(signal.SIGINT), epoch=2, batch=None)),
    ]
    for kind, asked in requests:
        with pytest.raises(kind):
            train(tmp_path / "run", asked)
    resumed = train(tmp_path / "run")
    assert resumed.history == reference.history
    for received, expected in zip(resumed.model.get_weights(), reference.model.get_weights(), strict=True):
        np.testing.assert_array_equal(received, expected)
    assert signal.getsignal(signal.SIGINT) is before[2]
