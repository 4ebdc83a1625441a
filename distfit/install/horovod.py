"""Install Horovod into this environment: built from its source package once, then from the user's cache.

    from distfit.install import horovod
    horovod.install()

Against the MPI on PATH when there is one, else against PyPI's Open MPI; with NCCL when CUDA and NCCL are
there. The result is verified by two real ranks before it stays: an install that fails or is interrupted
leaves the Horovod that was there before, or none.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

from distfit.errors import RunError
from distfit.install import environment, facts, recipe
from distfit.install.build import build
from distfit.install.cache import Shelf
from distfit.install.facts import Facts
from distfit.install.process import ended_through_finally
from distfit.install.verify import verify


def install(*, force: bool = False, say: Callable[[str], None] = print) -> None:
    """Make Horovod work in the environment of the running Python.

    Args:
        force: build anew even if it is installed or in the cache.
        say: takes each line that the user should read.

    Raises:
        InputError: something is missing; what, and what to type.
        RunError: a download, the compiler or the verification failed; the environment is as it was, but
            for PyPI's Open MPI and mpi4py, which stay once they are installed.
    """
    with ended_through_finally():
        here = facts.gather()
        recipe.refuse(here)
        here = _with_mpi(here, say)
        key, made_of = recipe.cache_key(here)
        shelf = Shelf(key)
        say(_plan(here))
        if force or not _works_already(here, key, shelf, say):
            wheels = None if force else _from_cache(shelf, say)
            _put_verified(here, wheels or _build(here, shelf, made_of, say), key, shelf, say)


def _with_mpi(here: Facts, say: Callable[[str], None]) -> Facts:
    """The facts with an MPI; PyPI's is installed when there is none."""
    if here.mpi:
        return here
    say("No mpicxx on PATH: installing PyPI's Open MPI and mpi4py into this environment")
    environment.put_mpi(here, Shelf("mpi").install_log)
    here = facts.with_new_mpi(here)
    recipe.refuse(here)
    if here.mpi is None:
        raise RunError(
            f"Expected an mpicxx in {here.bin} after installing PyPI's Open MPI, found none. "
            f"Type: {here.executable} -m pip install --force-reinstall '{recipe.OPEN_MPI}'"
        )
    return here


def _plan(here: Facts) -> str:
    assert here.mpi is not None
    whose = "PyPI's, in this environment" if here.mpi.from_pypi else f"in {here.mpi.bin}"
    flags = recipe.build_flags(here)
    gpu = f"NCCL {here.cuda.nccl_version}" if here.cuda and "HOROVOD_GPU_OPERATIONS" in flags else "CPU only"
    return f"Horovod {recipe.HOROVOD} for TensorFlow {here.tensorflow}, {here.mpi.version} ({whose}), {gpu}"


def _works_already(here: Facts, key: str, shelf: Shelf, say: Callable[[str], None]) -> bool:
    if environment.installed_key() != key:
        return False
    try:
        verify(here, shelf.install_log)
    except RunError:
        say(f"It is installed but two ranks under mpirun fail ({shelf.install_log}); installing it again.")
        return False
    say("It is installed already, and two ranks under mpirun just added numbers with it.")
    return True


def _from_cache(shelf: Shelf, say: Callable[[str], None]) -> list[Path] | None:
    wheels = shelf.load(say)
    if wheels:
        say(f"Taking the wheel from {shelf.folder}")
    return wheels


def _put_verified(here: Facts, wheels: list[Path], key: str, shelf: Shelf, say: Callable[[str], None]) -> None:
    with environment.kept_unless_verified(here, shelf.install_log):
        environment.put(here, wheels, shelf.install_log)
        say("Verifying it with two ranks under mpirun ...")
        verify(here, shelf.install_log)
        environment.mark(key)
    say(f"Horovod {recipe.HOROVOD} works here: two ranks, one MPI library, MPI and Gloo.")


def _build(here: Facts, shelf: Shelf, made_of: dict[str, object], say: Callable[[str], None]) -> list[Path]:
    say(f"Building it takes about two minutes on two cores. Log: {shelf.build_log}")
    shelf.build_log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="distfit-horovod-") as scratch:
        return shelf.store(build(here, shelf.build_log, Path(scratch), say), made_of)
