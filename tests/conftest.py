"""Fixtures that more than one module needs, or that have to begin before theirs."""

from concurrent.futures import ThreadPoolExecutor

import pytest


@pytest.fixture(scope="session")
def results(tmp_path_factory, request):
    """From an engine's name to its numbers (tests/test_engines.py); each job is started once, the two local ones
    together, at the beginning of the session."""
    from tests.test_engines import ENGINES, run_job

    started = {}
    with ThreadPoolExecutor(2) as pool:

        def of(engine):
            return start(ENGINES[engine]).result()[engine]

        def start(job):
            if job not in started:
                started[job] = pool.submit(run_job, job, tmp_path_factory.mktemp("cases"))
            return started[job]

        names = " ".join(item.name for item in request.session.items)
        for job in ("reference", "mirrored"):
            if job == "reference" or job in names:
                start(job)
        yield of
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session", autouse=True)
def _engines_begin_early(request):
    """The local engines need a minute and a half, much of it on one core each: they run beside the tests before
    theirs."""
    modules = {getattr(getattr(item, "module", None), "__name__", "") for item in request.session.items}
    if "tests.test_engines" in modules:
        request.getfixturevalue("results")
