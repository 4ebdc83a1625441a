"""Fixtures that more than one module needs, or that have to begin before theirs."""

from concurrent.futures import ThreadPoolExecutor

import pytest


class Results:
    """From an engine's name to its numbers (tests/test_engines.py); each job is started once, two at a time."""

    def __init__(self, pool, make_folder, wanted):
        self._pool = pool
        self._make_folder = make_folder
        self._wanted = wanted
        self._started = {}

    def start(self, job):
        from tests.test_engines import JOBS, cases_of

        if job not in self._started:
            folder = self._make_folder("cases")
            self._started[job] = folder, self._pool.submit(JOBS[job].run, folder, cases_of(job))
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
        found = Results(pool, tmp_path_factory.mktemp, [job for job in JOBS if job in names])
        yield found
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session", autouse=True)
def _engines_begin_early(request):
    """The local engines need minutes, much of it on one core each: they run beside the tests before theirs."""
    asking = [item for item in request.session.items if "results" in item.fixturenames]
    if asking:
        results = request.getfixturevalue("results")
        results.start("reference")
        if any("mirrored" in item.name for item in asking):
            results.start("mirrored")
