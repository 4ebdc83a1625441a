"""The same training on every engine: one table, each engine started once (tests/cases, docs/same-training.md).

One device equals keras.Model.fit to the bit. Three replicas of a process and two ranks equal it in float64 to 1e-9
(tests/cases/table.py); in chosen rows two replicas and three ranks do, too, and all in float32 to 1e-5 of the norm.
Every engine ends with the same bits when it runs the same training again. `make test-thorough` runs all rows on all.
"""

from __future__ import annotations

import doctest
import sys

import numpy as np
import pytest

from benchmarks import same_training
from tests import compare
from tests.cases import CASES, engines
from tests.cases.jobs import LIMIT_S, Job
from tests.cases.table import FLOAT32, FLOAT64, WRITTEN
from tests.compare import ERROR, SAVED, SECONDS, apart, of_case
from tests.conformance import CHECKS
from tests.ranks import ROOT, launch

# As many as show that Horovod's other controller works.
FEW = ("a_short_last_batch", "several_outputs", "records_in_files", "a_dataset_of_unknown_length")
# All rows run in float64 on one device, on Mirrored 3 and on mpirun 2. These run in float32 and with the other numbers
# of replicas, too: sums of other sizes, divisions by them, signs and thresholds of them, and rows of each part. The
# script of the page (benchmarks/same_training.py) and `make test-thorough` run all rows on all engines.
CHOSEN = (
    *FEW,
    "a_last_batch_smaller_than_the_replicas",
    "weights_as_divisor",
    "masked_sequences_by_weight",
    "metrics_of_each_output",
    "two_optimizers",
    "global_clipnorm",
    "embeddings",
    "the_same_bits_again",
    "batch_norm_of_masks_in_sync",
    "three_steps_per_execution",
    "shuffled_arrays_with_validation",
    "uneven_parts_of_static_shape",
    "a_rank_that_wants_to_stop",
    "xla_accumulation_and_clipping",
)
JOBS = {
    "reference": Job("none", 1, ("keras", "single")),
    "reference float32": Job("none", 1, ("keras/float32", "single/float32")),
    "mirrored 3": Job("none", 1, ("mirrored:3",)),
    "mirrored 2": Job("none", 1, ("mirrored:2",)),
    "mirrored 3 float32": Job("none", 1, ("mirrored:3/float32",)),
    "mpirun 2": Job("mpirun", 2, ("horovod",)),
    "mpirun 3": Job("mpirun", 3, ("horovod",)),
    "mpirun 2 float32": Job("mpirun", 2, ("horovod/float32",)),
    "gloo 2": Job("gloo", 2, ("horovod",)),
}
REPLICATED = ("mirrored 2", "mirrored 3", "mirrored 3 float32", "mpirun 2", "mpirun 3", "mpirun 2 float32", "gloo 2")


def cases_of(job, thorough=True):
    """The cases that a job runs: all, or those that are enough beside the other jobs."""
    if job == "gloo 2":
        return FEW
    if thorough or job in ("reference", "mirrored 3", "mpirun 2"):
        return tuple(CASES)
    return tuple(name for name, case in CASES.items() if name in CHOSEN or case.saved or FLOAT64 not in case.tolerance)


def place_of(engine):
    """The job of an engine and its name on the job's command line.

    >>> place_of("mirrored 3 float32"), place_of("gloo 2"), place_of("keras float32")
    (('mirrored 3 float32', 'mirrored:3/float32'), ('gloo 2', 'horovod'), ('reference float32', 'keras/float32'))
    """
    name, _, rest = engine.partition(" ")
    size, _, precision = rest.partition(" ")
    suffix = f"/{precision}" if precision else ""
    if name == "mirrored":
        return engine, f"mirrored:{size}{suffix}"
    if name in ("mpirun", "gloo"):
        return engine, f"horovod{suffix}"
    return ("reference float32", f"{name}/{rest}") if rest else ("reference", name)


def of_precision(engine, precision):
    """The name of an engine in a precision, which float64's leaves out.

    >>> of_precision("single", "float64"), of_precision("single", "float32")
    ('single', 'single float32')
    """
    return engine if precision == FLOAT64 else f"{engine} {precision}"


def precision_of(engine):
    """
    >>> precision_of("mpirun 2 float32"), precision_of("mpirun 3")
    ('float32', 'float64')
    """
    return FLOAT32 if engine.endswith(FLOAT32) else FLOAT64


def _marked(engine, *before):
    job = place_of(engine)[0]
    marks = [pytest.mark.mpi] if JOBS[job].ranks > 1 else []
    if before and before[0] not in cases_of(job, thorough=False):
        marks.append(pytest.mark.thorough)
    return pytest.param(*before, engine, marks=marks)


ALONE = [_marked(of_precision("single", precision), case) for case in CASES for precision in CASES[case].tolerance]
ROWS = [
    _marked(engine, case)
    for engine in REPLICATED
    for case in cases_of(place_of(engine)[0])
    if precision_of(engine) in CASES[case].tolerance
]


def numbers_of(numbers, case):
    """A case's numbers; fails when it raised."""
    found = of_case(numbers, case)
    found.pop(SECONDS)
    assert ERROR not in found, str(found[ERROR])
    return found


@pytest.mark.timeout(LIMIT_S + 900)
@pytest.mark.parametrize(("case", "engine"), ALONE)
def test_one_device_is_keras_to_the_bit(results, case, engine):
    expected = numbers_of(results(of_precision("keras", precision_of(engine))), case)
    received = numbers_of(results(engine), case)
    assert expected.keys() <= received.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(received[key], value, err_msg=key)


@pytest.mark.timeout(LIMIT_S + 900)
@pytest.mark.parametrize(("case", "engine"), ROWS)
def test_several_replicas_are_one_device(results, case, engine):
    precision = precision_of(engine)
    expected = numbers_of(results(of_precision("single", precision)), case)
    received = numbers_of(results(engine), case)
    assert expected.keys() == received.keys()
    found = apart(expected, received)
    limit = CASES[case].tolerance[precision]
    assert max(found.values()) <= limit, found


SAVING = [
    pytest.param(("single float32", "mirrored 3 float32"), id="single, mirrored 3"),
    pytest.param(("mpirun 2 float32",), id="mpirun 2", marks=pytest.mark.mpi),
]


@pytest.mark.timeout(LIMIT_S + 900)
@pytest.mark.parametrize("writers", SAVING)
def test_saved_models_load_without_distfit(results, tmp_path, writers):
    expected = {path: numbers for engine in writers for path, numbers in saved_by(results, engine).items()}
    job = launch(["-m", "tests.load_models", str(tmp_path / "loaded.npz"), *expected])
    assert job.code == 0, job.report()
    loaded = np.load(tmp_path / "loaded.npz")
    for path, numbers in expected.items():
        np.testing.assert_array_equal(loaded[path], numbers, err_msg=path)


def saved_by(results, engine):
    """Every file that an engine saved, with the weights and the optimizer state that it must hold."""
    numbers = results(engine)
    folder = results.folder(engine) / "models" / engines.file_of(place_of(engine)[1])
    found = {str(path): numbers_of(numbers, path.stem)[SAVED] for path in folder.iterdir()}
    assert len(found) == sum(case.saved for case in CASES.values())
    return found


@pytest.mark.timeout(LIMIT_S + 900)
@pytest.mark.parametrize(
    "engine", [_marked(engine) for engine in ("single", *REPLICATED) if precision_of(engine) == FLOAT64]
)
@pytest.mark.parametrize("check", CHECKS)
def test_conformance(results, check, engine):
    assert of_case(results(engine), check)["passed"]


@pytest.mark.mpi
@pytest.mark.timeout(LIMIT_S + 900)
def test_both_controllers_of_horovod_give_the_same_bits(results):
    for case in FEW:
        under_mpi, under_gloo = (numbers_of(results(engine), case) for engine in ("mpirun 2", "gloo 2"))
        for key, value in under_gloo.items():
            np.testing.assert_array_equal(under_mpi[key], value, err_msg=f"{case} {key}")


def test_the_page_shows_every_case():
    page = (ROOT / same_training.PAGE).read_text()
    assert same_training.rows_of(page) == list(CASES)


def test_no_row_is_left_out():
    assert set(WRITTEN) == set(CASES), "a module of tests/cases is missing in PARTS"
    assert set(CHOSEN) <= set(CASES), "a row has another name"


def test_every_row_can_be_kept():
    """Its control, one device with rows permuted, is far below its limit: what is above is a mistake."""
    for name, found in same_training.controls_of((ROOT / same_training.PAGE).read_text()).items():
        limits = CASES[name].tolerance.values()
        assert all(control <= limit / 10 for control, limit in zip(found, limits, strict=False)), name


@pytest.mark.parametrize("module", [same_training, compare, engines, sys.modules[__name__]])
def test_examples_of_what_makes_the_table(module):
    assert doctest.testmod(module).failed == 0
