"""Building the wheels in a scratch folder; the user's environment is not touched.

    wheels = build(facts, log, scratch, say)      # Horovod's, and mpi4py's for an MPI of the system

About two minutes on two cores. The build tools are installed into the scratch folder, since Horovod needs
older ones (cmake < 4, setuptools < 80) than the environment may want.
"""

import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from distfit.errors import RunError
from distfit.install import recipe
from distfit.install.facts import Facts
from distfit.install.process import Progress, run, tail


def build(facts: Facts, log: Path, scratch: Path, say: Callable[[str], None]) -> list[Path]:
    """Build the wheels for these facts.

    Args:
        facts: checked by `recipe.refuse`, with an MPI.
        log: gets the full output.
        scratch: an empty folder with `recipe.BUILD_BYTES` of room.
        say: where progress goes when there is no terminal.

    Raises:
        RunError: a step failed; with the end of its output and the log's path.
    """
    tools, links, wheels = (_new(scratch / name) for name in ("tools", "links", "wheels"))
    jobs = recipe.build_jobs(len(os.sched_getaffinity(0)), psutil.virtual_memory().available)
    environment = recipe.build_environment(facts, os.environ, tools, links, jobs)
    if facts.cuda:
        (links / "libnccl.so").symlink_to(facts.cuda.nccl_library)
    with Progress("Fetching the build tools and Horovod's source", say) as watch:
        _fetch_tools(facts, environment, tools, log, watch)
        source = _fetch_source(facts, environment, scratch, log, watch)
    _apply_edits(source)
    with Progress(f"Compiling Horovod {recipe.HOROVOD} ({jobs} at a time)", say) as watch:
        _compile(facts, environment, source, wheels, log, watch)
    _require_both_transports(next(wheels.glob("horovod-*.whl")))
    if facts.mpi and not facts.mpi.from_pypi:
        with Progress(f"Compiling mpi4py against the MPI in {facts.mpi.bin}", say) as watch:
            _compile_mpi4py(facts, environment, wheels, log, watch)
    return sorted(wheels.glob("*.whl"))


def pip(
    facts: Facts,
    arguments: list[str],
    environment: Mapping[str, str],
    log: Path,
    watch: Progress | None = None,
) -> None:
    """Run this environment's pip.

    Raises:
        RunError: it failed.
    """
    command = [str(facts.executable), "-m", "pip", *arguments]
    if run(command, environment=environment, log=log, watch=watch) != 0:
        raise RunError(
            f"`pip {' '.join(arguments)}` failed. When it could not reach the package index: check the "
            "network, or a proxy (HTTPS_PROXY), or name your site's index (PIP_INDEX_URL), and try again. "
            f"The end of its output (all of it: {log}):\n{tail(log)}"
        )


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _fetch_tools(facts: Facts, environment: Mapping[str, str], tools: Path, log: Path, watch: Progress) -> None:
    pip(facts, ["install", "--target", str(tools), *recipe.BUILD_TOOLS], environment, log, watch)


def _fetch_source(facts: Facts, environment: Mapping[str, str], scratch: Path, log: Path, watch: Progress) -> Path:
    """Horovod's published source package, unpacked, its checksum tested by pip before it is touched."""
    wanted = scratch / "horovod.txt"
    wanted.write_text(f"horovod=={recipe.HOROVOD} --hash=sha256:{recipe.HOROVOD_SHA256}\n")
    download = ["download", "--no-deps", "--no-binary", "horovod", "--no-build-isolation"]
    pip(facts, [*download, "--dest", str(scratch), "--requirement", str(wanted)], environment, log, watch)
    shutil.unpack_archive(next(scratch.glob("horovod-*.tar.gz")), scratch)
    return scratch / f"horovod-{recipe.HOROVOD}"


def _apply_edits(source: Path) -> None:
    for edit in recipe.EDITS:
        file = source / edit.file
        file.write_text(recipe.apply(edit, file.read_text()))


def _compile(
    facts: Facts, environment: Mapping[str, str], source: Path, wheels: Path, log: Path, watch: Progress
) -> None:
    # Not through pip, which shows a build's output only when it is over.
    command = [str(facts.executable), "setup.py", "bdist_wheel", "--dist-dir", str(wheels)]
    if run(command, environment=environment, log=log, folder=source, watch=watch) != 0:
        # setup.py ends in a traceback of its own; the compiler's words are in front of it.
        told = tail(log, before="\nTraceback (most recent call last)")
        without_gpu = (
            f" It was built for NCCL {facts.cuda.nccl_version} with CUDA {facts.cuda.version}; "
            "`HOROVOD_GPU_OPERATIONS= distfit horovod install` builds it for the CPU alone."
            if facts.cuda
            else ""
        )
        raise RunError(
            f"Expected Horovod {recipe.HOROVOD} to compile against TensorFlow {facts.tensorflow} and "
            f"{facts.mpi.version if facts.mpi else 'no MPI'}, received an error.{without_gpu} "
            f"Nothing was installed. The end of the output (all of it: {log}):\n{told}"
        )


def _require_both_transports(wheel: Path) -> None:
    """Horovod's CMake leaves a transport out that it does not find, which would show much later."""
    with zipfile.ZipFile(wheel) as archive:
        library = next(name for name in archive.namelist() if "tensorflow/mpi_lib" in name)
        code = archive.read(library)
    absent = [name for name, symbol in (("MPI", b"MPI_Allreduce"), ("Gloo", b"gloo")) if symbol not in code]
    if absent:
        raise RunError(
            f"Expected Horovod's library to have MPI and Gloo in it, received one without {absent[0]}. "
            "Unset HOROVOD_WITHOUT_* in the environment and try again."
        )


def _compile_mpi4py(facts: Facts, environment: Mapping[str, str], wheels: Path, log: Path, watch: Progress) -> None:
    """mpi4py's own wheel loads the libmpi it finds first; one built here is linked to the right one."""
    # pip's cache would give back the one it built for another MPI. Its one huge source file takes minutes at
    # Python's own -O3 -g, and only carries small messages for distfit.
    options = ["--no-cache-dir", "--no-deps", "--no-binary", "mpi4py", "--wheel-dir", str(wheels)]
    settings = {"CFLAGS": "-O1 -g0", "MPICC": str(facts.mpi.bin / "mpicc")} if facts.mpi else {}
    clean = {name: value for name, value in environment.items() if name != "PYTHONPATH"}  # its own tools
    pip(facts, ["wheel", *options, recipe.MPI4PY], {**clean, **settings}, log, watch)
