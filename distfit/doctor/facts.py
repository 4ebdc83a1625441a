"""What the doctor knows of a machine and an environment: frozen, made by `gather`, read by the checks.

None means that something is not there or could not be found out; the `problem` beside it says why, in one
phrase. A test makes its own facts: a node of GPUs, a second MPI in the way, no Horovod.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Python:
    """The interpreter and the packages of its environment, read from their metadata.

    Args:
        version: e.g. "3.11.7".
        executable: its path.
        prefix: the environment's folder.
        requires_python: what distfit declares; "" when distfit is not installed.
        packages: installed version by package, in lower case.
        requirements: what distfit declares, e.g. "keras<3.16,>=3.15.1"; none when it is not installed.
    """

    version: str
    executable: str
    prefix: str
    requires_python: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    requirements: tuple[str, ...] = ()


@dataclass(frozen=True)
class Library:
    """One MPI library that a process has loaded: the file, links resolved, and what it says of itself."""

    path: str
    version: str


@dataclass(frozen=True)
class TensorFlow:
    """TensorFlow and Keras, as a child program imported them.

    Args:
        version: of TensorFlow; None when it could not be imported.
        keras, backend: Keras' version and the backend that it took; None when it was not reached.
        is_cuda_build: whether this TensorFlow can use NVIDIA GPUs.
        cuda, cudnn: the versions that it was built for, "" without.
        gpus: the GPUs that it sees; None when it was not reached.
        stage: what was being done last.
        problem: why it ended early, None when it did not.
    """

    version: str | None = None
    keras: str | None = None
    backend: str | None = None
    is_cuda_build: bool = False
    cuda: str = ""
    cudnn: str = ""
    gpus: tuple[str, ...] | None = None
    stage: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class Horovod:
    """Horovod, as a child program imported it after TensorFlow.

    Args:
        version: None when it could not be imported.
        built_for: the TensorFlow that it was compiled against; "" when it does not say.
        mpi, gloo, nccl: what it was built with.
        libraries: the MPI libraries that importing it loads.
        problem: why it could not be imported.
        built_key, here_key: `distfit horovod install`'s name for what was built and for what it would build
            here now; None where unknown.
        build_problem: why the latter could not be found out.
    """

    version: str | None = None
    built_for: str = ""
    mpi: bool = False
    gloo: bool = False
    nccl: bool = False
    libraries: tuple[Library, ...] = ()
    problem: str | None = None
    built_key: str | None = None
    here_key: str | None = None
    build_problem: str | None = None


@dataclass(frozen=True)
class Mpi4py:
    """mpi4py by itself, in a child program that did not start MPI."""

    version: str | None = None
    libraries: tuple[Library, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Launcher:
    """The programs that start ranks.

    Args:
        mpirun: the one on PATH, None without.
        says: the line in which it names its version.
        in_environment: the mpirun beside this Python, None without; it may not be on PATH.
        srun, horovodrun: whether they are on PATH.
        problem: why mpirun did not tell its version.
    """

    mpirun: str | None = None
    says: str = ""
    in_environment: str | None = None
    srun: bool = False
    horovodrun: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class Cuda:
    """NVIDIA's driver and toolkit.

    Args:
        driver: its version, None without a driver.
        supports: the newest CUDA that the driver runs, e.g. "12.8"; "" when it does not say.
        gpus: names of all GPUs of the machine, as nvidia-smi tells them.
        problem: why nvidia-smi failed, though it is there.
        toolkit, nccl: what there is to build Horovod against; "" without.
    """

    driver: str | None = None
    supports: str = ""
    gpus: tuple[str, ...] = ()
    problem: str | None = None
    toolkit: str = ""
    nccl: str = ""


@dataclass(frozen=True)
class Rank:
    """One of the two ranks.

    Args:
        stage: what it was doing last; "done" when it came to the end.
        rank, size: None when Horovod did not start.
        device: e.g. "GPU:0"; None when it was not reached.
        libraries: the MPI libraries in its memory once Horovod and mpi4py were loaded.
        right: whether every sum was right; None when there is none.
        seconds, bytes: of one all-reduce; None when there is none.
    """

    stage: str
    rank: int | None = None
    size: int | None = None
    device: str | None = None
    libraries: tuple[Library, ...] = ()
    right: bool | None = None
    seconds: float | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Ranks:
    """Two real ranks under mpirun.

    Args:
        asked: whether they were wanted (`--no-ranks`).
        not_started: why they were not started, None when they were.
        seen: what each left behind.
        problem: how mpirun ended, None when well.
        errors: the end of what it printed.
    """

    asked: bool = True
    not_started: str | None = None
    seen: tuple[Rank, ...] = ()
    problem: str | None = None
    errors: str = ""


@dataclass(frozen=True)
class Machine:
    """Cores and memory.

    Args:
        cores: those that this process may run on (affinity).
        all_cores: those of the machine.
        quota: cores that a container's limit (cgroup) leaves, None without a limit.
        memory, available: bytes; the container's limit counts.
        shm, shm_free: bytes of /dev/shm; None without one.
        load: programs that wanted a core over the last minute, on average.
    """

    cores: int
    all_cores: int
    quota: float | None
    memory: int
    available: int
    shm: int | None
    shm_free: int | None
    load: float = 0.0

    @property
    def usable_cores(self) -> int:
        """Whole cores that can work at a time, at least 1."""
        limit = self.cores if self.quota is None else min(self.cores, int(self.quota))
        return max(1, limit)


@dataclass(frozen=True)
class Network:
    """This host as other ranks find it.

    Args:
        host: its name.
        resolves_to: the addresses behind the name; none when it does not resolve.
        offered: the addresses that the chief would offer to the other ranks' watch, best first.
        override: `DISTFIT_WATCH_ADDRESS`, "" when it is not set.
        problem: why the name could not be looked up.
    """

    host: str
    resolves_to: tuple[str, ...]
    offered: tuple[str, ...]
    override: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class Folder:
    """The run folder, tried.

    Args:
        path: the folder.
        there: it, or the nearest folder above it that exists; this one was tried.
        filesystem: e.g. "ext4"; "" when unknown.
        free: bytes; None when unknown.
        seconds: of writing, fsync and renaming a file; None when that failed.
        problem: what failed.
    """

    path: str
    there: str
    filesystem: str = ""
    free: int | None = None
    seconds: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Job:
    """What a launcher told this process, if one started it.

    Args:
        launched: whether its variables are there.
        rank, size, local_rank, local_size: as `distfit.topology` reads them.
        problem: why they cannot be read.
    """

    launched: bool = False
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    problem: str | None = None


@dataclass(frozen=True)
class Facts:
    """All of it.

    Args:
        settings: the environment variables that matter here (`gather.SETTINGS`), as they are set.
        keras_file: the backend that ~/.keras/keras.json names, None without.
    """

    python: Python
    tensorflow: TensorFlow
    horovod: Horovod
    mpi4py: Mpi4py
    launcher: Launcher
    cuda: Cuda
    ranks: Ranks
    machine: Machine
    network: Network
    folder: Folder
    job: Job = Job()
    settings: Mapping[str, str] = field(default_factory=dict)
    keras_file: str | None = None
