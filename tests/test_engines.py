"""The same training on every engine: one table, each engine started once (see tests/cases.py).

One device equals keras.Model.fit to the bit; two and three replicas equal it in float64 to 1e-9.
"""

from __future__ import annotations

import numpy as np
import pytest

from distfit.data.build import build_digits
from tests.cases import CASES
from tests.conformance import CHECKS
from tests.ranks import launch

TOLERANCE = 1e-9

# What one job runs: launcher, ranks, cases (all, or as many as show that the controller works), and
# under which name tests ask for each engine of it.
FEW = ("a_short_last_batch", "several_outputs_by_weight", "records_in_files", "a_dataset_of_unknown_length")
JOBS = {
    "reference": ("none", 1, CASES, {"keras": "keras", "single": "single"}),
    "mirrored": ("none", 1, CASES, {"mirrored 2": "mirrored:2", "mirrored 3": "mirrored:3"}),
    "mpirun 2": ("mpirun", 2, CASES, {"mpirun 2": "horovod"}),
    "mpirun 3": ("mpirun", 3, CASES, {"mpirun 3": "horovod"}),
    "gloo 2": ("gloo", 2, FEW, {"gloo 2": "horovod"}),
}
ENGINES = {name: job for job, (_, _, _, names) in JOBS.items() for name in names}


def _marked(engine):
    launcher = JOBS[ENGINES[engine]][0]
    return pytest.param(engine, marks=[] if launcher == "none" else pytest.mark.mpi)


REPLICATED = [_marked(engine) for engine in ENGINES if engine not in ("keras", "single")]

ROWS = [
    pytest.param(case, *engine.values, marks=engine.marks)
    for engine in REPLICATED
    for case in JOBS[ENGINES[engine.values[0]]][2]
]


def run_job(name, folder):
    """The numbers of each engine of a job; `results` in conftest.py calls it when the first one is asked for."""
    launcher, ranks, cases, names = JOBS[name]
    build_digits(folder / "digits")
    arguments = ["-m", "tests.cases", str(folder), ",".join(cases), *names.values()]
    job = launch(arguments, ranks, launcher, limit_s=600)
    assert job.code == 0, job.report()
    return {label: dict(np.load(folder / f"{name.replace(':', '-')}.npz")) for label, name in names.items()}


def _of_case(numbers, case):
    return {key.partition("//")[2]: value for key, value in numbers.items() if key.startswith(f"{case}//")}


@pytest.mark.timeout(700)
@pytest.mark.parametrize("case", CASES)
def test_one_device_is_keras_to_the_bit(results, case):
    expected, received = _of_case(results("keras"), case), _of_case(results("single"), case)
    assert expected.keys() <= received.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(received[key], value, err_msg=key)


@pytest.mark.timeout(700)
@pytest.mark.parametrize(("case", "engine"), ROWS)
def test_several_replicas_are_one_device(results, case, engine):
    expected, received = _of_case(results("single"), case), _of_case(results(engine), case)
    assert expected.keys() == received.keys()
    assert expected
    for key, value in expected.items():
        np.testing.assert_allclose(received[key], value, rtol=TOLERANCE, atol=TOLERANCE, err_msg=key)


@pytest.mark.timeout(700)
@pytest.mark.parametrize("engine", ["single", *REPLICATED])
@pytest.mark.parametrize("check", CHECKS)
def test_conformance(results, check, engine):
    assert _of_case(results(engine), check)["passed"]


@pytest.mark.mpi
@pytest.mark.timeout(700)
def test_both_controllers_of_horovod_give_the_same_bits(results):
    under_mpi, under_gloo = results("mpirun 2"), results("gloo 2")
    for key, value in under_gloo.items():
        np.testing.assert_array_equal(under_mpi[key], value, err_msg=key)
