"""Fixtures that more than one module needs, and what keeps the suite short on two cores.

`make test` runs files on two workers (pytest-xdist), so that a test that computes in its own process leaves no core
idle. Tests of real ranks hold a lock: two jobs at once would be six ranks on two cores, and stall limits are given in
seconds. Tests marked `thorough` run in `make test-thorough` alone.
"""

import fcntl
import os
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from tests.ranks import collect_less_garbage

# Of this run of pytest: its workers inherit the variable, and what tests start does not (tests.ranks.environment).
_OWN = f"{tempfile.gettempdir()}/distfit-tests-{os.getpid()}.lock"
_LOCK = Path(os.environ.setdefault("DISTFIT_TESTS_LOCK", _OWN))
# Its jobs take longest: whoever waits for them waits beside all others.
_FIRST = "test_engines.py"


@contextmanager
def only_ranks():
    """Held while real ranks run: one job at a time, on both workers and in all threads."""
    with open(_LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pytest_configure():
    # What a shell starts in the background ignores Ctrl-C, and so would all that tests start and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_collection_finish():
    if "tensorflow" in sys.modules:
        collect_less_garbage()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    # Outside of pytest-timeout, as waiting is no hang. The jobs of `results` take the lock themselves.
    if item.get_closest_marker("mpi") is None or "results" in item.fixturenames:
        return (yield)
    with only_ranks():
        return (yield)


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="also what is marked thorough: make test-thorough")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name != _FIRST)
    if not config.getoption("--thorough"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)


def pytest_sessionfinish():
    if str(_LOCK) == _OWN:
        _LOCK.unlink(missing_ok=True)


class Results:
    """From an engine's name to its numbers (tests/test_engines.py); each job is started once, two at a time."""

    def __init__(self, pool, make_folder, wanted, thorough):
        self._pool = pool
        self._make_folder = make_folder
        self._wanted = wanted
        self._thorough = thorough
        self._started = {}

    def start(self, job):
        from tests.test_engines import JOBS, cases_of

        if job not in self._started:
            folder = self._make_folder("cases")
            self._started[job] = folder, self._pool.submit(_run, JOBS[job], folder, cases_of(job, self._thorough))
        return self._started[job]

    def __call__(self, engine):
        from tests.test_engines import place_of

        job, name = place_of(engine)
        # Whoever asks first waits longest: meanwhile the other jobs that this session wants can run.
        for other in self._wanted:
            self.start(other)
        return self.start(job)[1].result()[name]

    def folder(self, engine):
        """Where the job of an engine writes."""
        from tests.test_engines import place_of

        return self.start(place_of(engine)[0])[0]


@pytest.fixture(scope="session")
def results(tmp_path_factory, request):
    from tests.test_engines import JOBS

    names = " ".join(item.name for item in request.session.items)
    with ThreadPoolExecutor(2) as pool:
        wanted = [job for job in JOBS if job.removeprefix("reference ") in names]
        found = Results(pool, tmp_path_factory.mktemp, wanted, request.config.getoption("--thorough"))
        yield found
        pool.shutdown(cancel_futures=True)


def _run(job, folder, cases):
    with only_ranks() if job.ranks > 1 else nullcontext():
        return job.run(folder, cases)
