"""Where this process stands in the job: frozen facts, read from the environment, no TensorFlow.

    topology = from_environment(os.environ)
    topology.rank, topology.size, topology.num_replicas, topology.is_chief

A *process* (rank of size) is one Python process of the job. A *replica* is one copy of the model's
computation; a process runs `replicas_per_process` of them. Keeping the two apart removes most branches:
the input shard belongs to the process, the slice of a batch to the replica.
"""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from distfit.errors import InputError

# (rank, size, local rank, local size) as the launchers name them, the most specific first. A batch
# scheduler's allocation alone (SLURM_NTASKS without SLURM_STEP_ID) starts one process, so it is not here.
_LAUNCHERS = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMIX_RANK", "PMIX_SIZE", "PMIX_LOCAL_RANK", "PMIX_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


@dataclass(frozen=True)
class Topology:
    """The place of one process in the job.

    Args:
        rank: 0 <= rank < size; rank 0 is the chief, the process that publishes and speaks.
        size: number of processes, >= 1.
        local_rank: 0 <= local_rank < local_size; picks this process's GPU.
        local_size: processes of the job on this host.
        replicas_per_process: copies of the model in each process, >= 1, the same everywhere.
        host: this host's name, for messages.

    Raises:
        InputError: a number is out of its range.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    replicas_per_process: int = 1
    host: str = field(default_factory=socket.gethostname)

    def __post_init__(self) -> None:
        for index, count in (("rank", "size"), ("local_rank", "local_size")):
            low, high = getattr(self, index), getattr(self, count)
            if not 0 <= low < high:
                raise InputError(
                    f"Expected 0 <= {index} < {count}, received {index}={low} and {count}={high}. "
                    "Check the launcher's environment variables."
                )
        if self.replicas_per_process < 1:
            raise InputError(f"Expected at least one replica in each process, received {self.replicas_per_process}.")

    @property
    def num_replicas(self) -> int:
        """Replicas of the whole job."""
        return self.size * self.replicas_per_process

    @property
    def is_chief(self) -> bool:
        """Whether this process publishes and speaks."""
        return is_chief(self.rank)

    @property
    def first_replica(self) -> int:
        """The job-wide number of this process's first replica."""
        return self.rank * self.replicas_per_process

    def with_replicas(self, replicas_per_process: int) -> "Topology":
        """The same place with another number of replicas in each process."""
        return replace(self, replicas_per_process=replicas_per_process)


def is_chief(rank: int) -> bool:
    """Whether the process of this rank publishes and speaks: the one place that decides it."""
    return rank == 0


def from_environment(environment: Mapping[str, str]) -> Topology:
    """The facts that the launcher left in the environment; one process of one where there are none.

    Raises:
        InputError: a launcher's variable is set but is no whole number.

    >>> from_environment({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "4"}).rank
    1
    >>> from_environment({}).size
    1
    """
    for rank, size, local_rank, local_size in _LAUNCHERS:
        if rank in environment and size in environment:
            return Topology(
                rank=_number(environment, rank, 0),
                size=_number(environment, size, 1),
                local_rank=_number(environment, local_rank, 0),
                local_size=_number(environment, local_size, 1 + _number(environment, local_rank, 0)),
            )
    return Topology()


def launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this process, be it as one of one.

    >>> launched({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "1"}), launched({})
    (True, False)
    """
    return any(rank in environment and size in environment for rank, size, *_ in _LAUNCHERS)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name)
    if text is None:
        return default
    values = _by_node(text)
    node = environment.get("SLURM_NODEID", "0") if len(values) > 1 else "0"
    if not node.isdigit() or int(node) >= len(values):
        raise InputError(f"Expected a whole number in the environment variable {name}, received {text!r}.")
    return values[int(node)]


def _by_node(text: str) -> list[int]:
    """A launcher's number, or Slurm's of each node; nothing when it is neither.

    >>> _by_node("8"), _by_node("4(x2),3"), _by_node("many")
    ([8], [4, 4, 3], [])
    """
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    if not all(parts):
        return []
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
