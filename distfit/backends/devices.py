"""Taking the devices before TensorFlow does: GPUs by number, or logical CPUs, and memory as it is needed."""

from __future__ import annotations

import ctypes
import functools

from distfit.errors import InputError

_TOO_LATE = (
    "TensorFlow had already started when distfit wanted to set its devices ({wanted}). Expected distfit to "
    "come first: call distfit.init(...) with the same strategy and devices before the first tensor, variable or "
    "model is made."
)


def visible_gpus() -> list:
    """The GPUs that TensorFlow may use in this process, with memory taken as it is needed."""
    import tensorflow as tf

    gpus = tf.config.get_visible_devices("GPU")
    for gpu in gpus:
        try:
            tf.config.experimental.set_memory_growth(gpu, True)
        except RuntimeError:
            # TensorFlow has started and keeps what it has: growth saves memory, it changes no result.
            break
    return gpus


@functools.cache
def gpu_identities() -> list[str]:
    """What tells the GPUs of this process from those of another on the same host, in TensorFlow's order.

    Launchers bind GPUs in different ways: all ranks see all of them, or each sees its own as number 0. CUDA's
    driver knows a UUID for each, which costs no memory on the device and starts nothing; without one, the
    number has to do.
    """
    import tensorflow as tf

    numbers = range(len(tf.config.list_physical_devices("GPU")))
    return [_uuid(number) or f"GPU {number}" for number in numbers]


def _uuid(number: int) -> str | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, uuid = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), number),
        # The first version gives all slices of a GPU (MIG), which are devices of their own, the UUID of the whole.
        lambda: driver.cuDeviceGetUuid_v2(ctypes.byref(uuid), device),
    )
    return f"GPU-{bytes(uuid).hex()}" if all(call() == 0 for call in calls) else None


def pin_gpu(local_rank: int) -> list[str]:
    """Leave this process the one GPU of its local rank, or the CPU where there is none.

    A process that sees a single GPU takes it: its launcher has bound it (srun --gpus-per-task=1). That no two
    ranks take the same is checked when they meet.

    Raises:
        InputError: fewer GPUs than ranks on this host, or TensorFlow has already started.
    """
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return ["CPU:0"]
    number = 0 if len(gpus) == 1 else local_rank
    if number >= len(gpus):
        raise InputError(
            f"Expected a GPU for each rank of this host, received local rank {local_rank} and {len(gpus)} GPUs. "
            "Start at most one rank a GPU on each host (mpirun --map-by ppr:N:node), or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES=''."
        )
    try:
        tf.config.set_visible_devices(gpus[number], "GPU")
    except RuntimeError as error:
        raise InputError(_TOO_LATE.format(wanted=f"GPU {number} for this rank")) from error
    visible_gpus()
    return [f"GPU:{number}"]


def replica_devices(count: int | None) -> list[str]:
    """The devices of `count` replicas in this process; None takes every GPU, or one CPU.

    Without GPUs, `count` logical CPU devices are made, which lets a laptop run what a node of GPUs runs.

    Raises:
        InputError: more devices than there are, or TensorFlow has already started with fewer.
    """
    gpus = visible_gpus()
    if gpus:
        if count is not None and count > len(gpus):
            raise InputError(
                f"Expected devices to be at most the {len(gpus)} GPUs that this process sees, received {count}. "
                "Ask for fewer, or check CUDA_VISIBLE_DEVICES; `distfit doctor` shows what each rank would take."
            )
        return [f"GPU:{number}" for number in range(count or len(gpus))]
    return _logical_cpus(count or 1)


def _logical_cpus(count: int) -> list[str]:
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        # More than one is never taken back: another session of this process may ask for as many again.
        if count > len(tf.config.get_logical_device_configuration(cpu) or [None]):
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError as error:
        raise InputError(_TOO_LATE.format(wanted=f"{count} logical CPU devices")) from error
    have = len(tf.config.list_logical_devices("CPU"))
    if have < count:
        raise InputError(_TOO_LATE.format(wanted=f"{count} logical CPU devices, there are {have}"))
    return [f"CPU:{number}" for number in range(count)]
