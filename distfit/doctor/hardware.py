"""Lines on the machine: devices, CUDA, cores and threads, memory, the run folder, the network, the job. Pure."""

from typing import Any

from distfit.doctor.facts import Facts
from distfit.doctor.lines import Line, failure, ok, warning

_GIB = 2**30
# NCCL takes about 10 MB a connection and Open MPI 4 MB a rank; Docker's default of 64 MiB is used up by a few GPUs.
_SHM_BYTES = 512 * 2**20
_FOLDER_BYTES, _FOLDER_LOW_BYTES = 100 * 2**20, 2 * _GIB
_FOLDER_S = 5.0
_MEMORY_BYTES = 2 * _GIB  # TensorFlow and a small model take one
_THREADS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")


def cuda(facts: Facts) -> Line:
    """NVIDIA's driver, against what TensorFlow was built for and what it sees."""
    here, tensorflow = facts.cuda, facts.tensorflow
    found: dict[str, Any] = {
        "driver": here.driver,
        "supports": here.supports,
        "gpus": list(here.gpus),
        "toolkit": here.toolkit,
    }
    if here.problem:
        return failure(
            "cuda",
            f"nvidia-smi is there and fails: {here.problem}",
            "The driver has to be loaded (a reboot after an update); in a container: docker run --gpus all.",
            **found,
        )
    if here.driver is None:
        seen = len(tensorflow.gpus or ())
        text = f"nvidia-smi is not on PATH; TensorFlow sees {seen} GPUs" if seen else "no NVIDIA driver: CPU only"
        return ok("cuda", text, **found)
    # "N/A" in a container into which the driver's CUDA library was not mounted.
    supports = _number(here.supports) != (0, 0)
    text = f"driver {here.driver}" + (f" runs CUDA up to {here.supports}" if supports else "") + f"; {_gpus(here.gpus)}"
    text += f"; toolkit {here.toolkit}" if here.toolkit else ""
    hidden = facts.settings.get("CUDA_VISIBLE_DEVICES")
    if here.gpus and tensorflow.version and not tensorflow.is_cuda_build:
        return failure("cuda", f"{text}, and TensorFlow was built for the CPU alone", _with_cuda(facts), **found)
    if here.gpus and tensorflow.gpus == () and hidden is None:
        return failure("cuda", f"{text}, and TensorFlow sees none of them", _with_cuda(facts), **found)
    if supports and tensorflow.cuda and _number(here.supports) < _number(tensorflow.cuda):
        old = _number(here.supports)[0] < _number(tensorflow.cuda)[0]
        return (failure if old else warning)(
            "cuda",
            f"{text}, and TensorFlow was built for CUDA {tensorflow.cuda}",
            "Update NVIDIA's driver" + ("." if old else "; within one major version most programs run all the same."),
            **found,
        )
    return ok("cuda", text, **found)


def nccl(facts: Facts) -> Line:
    """Whether GPUs talk to each other directly."""
    gpus, here = len(facts.tensorflow.gpus or ()), facts.horovod
    found: dict[str, Any] = {"nccl": facts.cuda.nccl, "horovod_has_nccl": here.nccl}
    if not gpus or not facts.ranks.asked:
        return ok(
            "nccl", "not needed: ranks on CPUs add through MPI" if not gpus else "not needed for one process", **found
        )
    if here.version is None:
        return warning("nccl", "cannot be told without Horovod", "Mend the line horovod first.", **found)
    if here.nccl:
        return ok("nccl", f"Horovod was built with NCCL{f' {facts.cuda.nccl}' if facts.cuda.nccl else ''}", **found)
    how = (
        "Type: distfit horovod install --force"
        if facts.cuda.nccl
        else "Install a CUDA toolkit (nvcc on PATH) and NCCL, then type: distfit horovod install --force"
    )
    return warning(
        "nccl", "Horovod was built without NCCL: every sum over GPUs goes through the CPU's memory", how, **found
    )


def devices(facts: Facts) -> Line:
    """What each rank of this host would take."""
    gpus = facts.tensorflow.gpus
    if gpus is None:
        return warning("devices", "cannot be told, as TensorFlow failed", "Mend the line tensorflow first.")
    hidden, all_gpus = facts.settings.get("CUDA_VISIBLE_DEVICES"), len(facts.cuda.gpus)
    found: dict[str, Any] = {"gpus": list(gpus), "cuda_visible_devices": hidden}
    if hidden is not None and len(gpus) < all_gpus:
        return warning(
            "devices",
            f"CUDA_VISIBLE_DEVICES={hidden!r} leaves {len(gpus)} of {all_gpus} GPUs",
            "Type: unset CUDA_VISIBLE_DEVICES, unless this is meant.",
            **found,
        )
    if facts.settings.get("TF_FORCE_GPU_ALLOW_GROWTH", "").lower() == "false":
        return warning(
            "devices",
            f"{_gpus(gpus)}; TF_FORCE_GPU_ALLOW_GROWTH=false makes each process take a GPU's whole memory at once",
            "Type: unset TF_FORCE_GPU_ALLOW_GROWTH",
            **found,
        )
    if not gpus:
        return ok("devices", "no GPU: one process takes the CPU, and so does each rank", **found)
    last = len(gpus) - 1
    each = "rank 0 takes GPU:0" if not last else f"rank 0 takes GPU:0, ... rank {last} takes GPU:{last}"
    return ok(
        "devices", f"{each}: at most {_gpus(gpus).split(' ')[0]} ranks here; one process takes all of them", **found
    )


def cores(facts: Facts) -> Line:
    """How many cores there really are for this process."""
    here = facts.machine
    found: dict[str, Any] = {
        "cores": here.cores,
        "all_cores": here.all_cores,
        "quota": here.quota,
        "usable": here.usable_cores,
    }
    text = f"{here.usable_cores} of the machine's {here.all_cores} cores can work for this process"
    if here.quota is not None and here.quota < here.cores and not _set_threads(facts):
        return warning(
            "cores",
            f"{text} (the container's quota is {here.quota:g}), and TensorFlow would start {here.cores} threads",
            f"Type: export OMP_NUM_THREADS={here.usable_cores} TF_NUM_INTRAOP_THREADS={here.usable_cores}",
            **found,
        )
    if here.cores == 1 and here.all_cores > 1:
        return warning(
            "cores",
            f"{text}: a launcher bound it to one",
            "Start ranks with mpirun --bind-to none, or srun --cpus-per-task=N.",
            **found,
        )
    return ok("cores", text, **found)


def threads(facts: Facts) -> Line:
    """How many threads a rank starts: ranks times threads should not exceed the cores."""
    usable = facts.machine.usable_cores
    given = {name: facts.settings[name] for name in _THREADS if name in facts.settings}
    found: dict[str, Any] = {"set": given, "usable_cores": usable}
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    wrong = [name for name, value in given.items() if not value.isdigit()]
    if wrong:
        return warning("threads", f"{wrong[0]}={given[wrong[0]]!r} is no number", f"Type: unset {wrong[0]}", **found)
    many = [name for name, value in given.items() if int(value) > usable]
    if many:
        return warning(
            "threads",
            f"{shown}, and {usable} cores can work: threads that wait for a core slow all others down",
            f"Type: export {many[0]}={usable}, or {usable} divided by the ranks of a host.",
            **found,
        )
    if given:
        return ok("threads", shown, **found)
    text = f"none of {', '.join(_THREADS)} is set: each rank would start a thread for every core"
    if not facts.ranks.asked or usable == 1:
        return ok("threads", "not set: a thread for every core", **found)
    return ok(
        "threads",
        text,
        f"For R ranks on this host, export OMP_NUM_THREADS and TF_NUM_INTRAOP_THREADS as {usable} / R; "
        "more ranks than cores also need mpirun --mca mpi_yield_when_idle 1.",
        **found,
    )


def memory(facts: Facts) -> Line:
    """What is left of the machine's or the container's memory."""
    here = facts.machine
    text = f"{here.available / _GIB:.1f} of {here.memory / _GIB:.1f} GiB are free"
    found: dict[str, Any] = {"total": here.memory, "available": here.available}
    if here.available >= _MEMORY_BYTES:
        return ok("memory", text, **found)
    return warning(
        "memory",
        f"{text}; a rank takes about one and its data",
        "End what else runs here, or use fewer ranks.",
        **found,
    )


def shm(facts: Facts) -> Line:
    """Shared memory, over which ranks of one host talk."""
    here = facts.machine
    found: dict[str, Any] = {"total": here.shm, "free": here.shm_free}
    more = "docker run --shm-size=1g (or --ipc=host); Kubernetes: an emptyDir of medium Memory on /dev/shm."
    if here.shm is None or here.shm_free is None:
        return warning("shm", "there is no /dev/shm, over which ranks of one host talk", more, **found)
    text = f"{here.shm_free / 2**20:,.0f} of {here.shm / 2**20:,.0f} MiB of /dev/shm are free"
    if here.shm_free >= _SHM_BYTES:
        return ok("shm", text, **found)
    full = here.shm >= _SHM_BYTES
    return warning(
        "shm",
        f"{text}; NCCL and Open MPI fail with 'No space left on device' or a bus error when it is used up",
        "Remove what ended programs left there: ls -la /dev/shm" if full else more,
        **found,
    )


def run_folder(facts: Facts) -> Line:
    """Writing, fsync, rename and room, where the run would write."""
    here = facts.folder
    found: dict[str, Any] = {
        "path": here.path,
        "filesystem": here.filesystem,
        "free": here.free,
        "seconds": here.seconds,
    }
    kind = f" ({here.filesystem})" if here.filesystem else ""
    if here.problem or here.free is None or here.seconds is None:
        return failure(
            "run-folder",
            f"{here.path}{kind} cannot be written: {here.problem}",
            "Name another folder (--run-dir), or correct its permissions.",
            **found,
        )
    text = f"{here.path}{kind}: {here.free / _GIB:.1f} GiB free"
    text += f"; 8 MiB written, flushed and renamed in {here.seconds:.2f} s"
    if here.free < _FOLDER_LOW_BYTES:
        judged = failure if here.free < _FOLDER_BYTES else warning
        return judged("run-folder", text, "Make room: a checkpoint needs twice its size while it is written.", **found)
    if here.seconds > _FOLDER_S:
        return warning("run-folder", text, "Checkpoints will be slow: name a folder on a faster disk.", **found)
    return ok("run-folder", text, **found)


def network(facts: Facts) -> Line:
    """Whether other hosts could find this one."""
    here = facts.network
    found: dict[str, Any] = {"host": here.host, "resolves_to": list(here.resolves_to), "offered": list(here.offered)}
    if here.problem:
        remedy = f"The name server may be out of reach; add to /etc/hosts: 127.0.1.1 {here.host}"
        return failure("network", f"looking up this host's name {here.problem}", remedy, **found)
    if here.override:
        return ok(
            "network", f"{here.host}: ranks will watch each other over {here.override} (DISTFIT_WATCH_ADDRESS)", **found
        )
    outside = [address for address in here.offered if address not in ("127.0.0.1", "::1")]
    if not here.resolves_to:
        return warning(
            "network",
            f"the name of this host, {here.host!r}, does not resolve: MPI may not start, or wait long",
            f"Add it to /etc/hosts: 127.0.1.1 {here.host}",
            **found,
        )
    if not outside:
        return ok("network", f"{here.host}: loopback only, so ranks on this host only", **found)
    return ok("network", f"{here.host}: other ranks reach the chief over {', '.join(outside)}", **found)


def job(facts: Facts) -> Line:
    """What a launcher told this process."""
    here, slurm = facts.job, facts.settings.get("SLURM_JOB_ID")
    if here.problem:
        return failure("job", here.problem, "Start it with mpirun, horovodrun or srun, or unset these variables.")
    if here.launched:
        place = f"rank {here.rank} of {here.size}, {here.local_rank} of {here.local_size} on this host"
        return ok("job", f"a launcher started this process as {place}", rank=here.rank, size=here.size)
    if slurm:
        return ok(
            "job",
            f"inside Slurm's job {slurm}, but not started by srun: a training started like this is one process",
            "Start trainings with srun.",
        )
    return ok("job", "not started by a launcher: rank 0 of 1", rank=0, size=1)


def _with_cuda(facts: Facts) -> str:
    return f"Type: {facts.python.executable} -m pip install 'tensorflow[and-cuda]', which brings CUDA's libraries."


def _set_threads(facts: Facts) -> bool:
    return "TF_NUM_INTRAOP_THREADS" in facts.settings


def _gpus(names: tuple[str, ...]) -> str:
    kinds = sorted(set(names))
    return f"{len(names)} GPU{'s' * (len(names) != 1)}" + (f" ({', '.join(kinds)})" if 0 < len(kinds) < 3 else "")


def _number(version: str) -> tuple[int, ...]:
    """Major and minor; zeros for what cannot be read.

    >>> _number("12.5.1"), _number("N/A")
    ((12, 5), (0, 0))
    """
    parts = [int(part) if part.isdigit() else 0 for part in version.split(".")[:2]]
    return (*parts, 0)[:2]
