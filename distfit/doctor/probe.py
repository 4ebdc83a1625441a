"""A child program that loads one part of the environment and says what it finds, stage by stage.

    python -P -m distfit.doctor.probe tensorflow      # TensorFlow, Keras, then Horovod
    python -P -m distfit.doctor.probe mpi4py
    python -P -m distfit.doctor.probe build           # what `distfit horovod install` would build against

Each stage prints a line of JSON before the next one starts: a crash tells the stage by what is missing.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distfit.install.rank_check import loaded_libmpi

LAST_STAGE = "importing Horovod"


def tensorflow() -> None:
    """TensorFlow, its build and its GPUs; Keras and its backend; Horovod and its MPI."""
    say(stage="importing TensorFlow")
    import tensorflow as tf

    build = tf.sysconfig.get_build_info()
    say(
        tensorflow=tf.__version__,
        is_cuda_build=bool(build.get("is_cuda_build")),
        built_for_cuda=str(build.get("cuda_version", "")),
        built_for_cudnn=str(build.get("cudnn_version", "")),
        stage="asking TensorFlow for its devices",
    )
    say(gpus=[gpu.name for gpu in tf.config.list_physical_devices("GPU")], stage="importing Keras")
    import keras

    say(keras=keras.__version__, keras_backend=keras.backend.backend(), stage=LAST_STAGE)
    horovod()


def horovod() -> None:
    """What Horovod was built with, and the MPI library that it loads."""
    try:
        import horovod
        import horovod.tensorflow as hvd
    except ImportError as error:
        say(horovod_problem=f"{type(error).__name__}: {error}")
        return
    metadata = Path(str(horovod.__file__)).with_name("metadata.json")
    built_for = json.loads(metadata.read_text()).get("tensorflow", "") if metadata.is_file() else ""
    say(
        horovod_version=horovod.__version__,
        horovod_built_for=built_for,
        built_with_mpi=bool(hvd.mpi_built()),
        built_with_gloo=bool(hvd.gloo_built()),
        built_with_nccl=bool(hvd.nccl_built()),
        horovod_libmpi=libmpi(),
    )


def mpi4py() -> None:
    """mpi4py, and the MPI library that it loads by itself; MPI is not started."""
    say(stage="importing mpi4py")
    try:
        import mpi4py
    except ImportError as error:
        say(mpi4py_problem=f"{type(error).__name__}: {error}")
        return
    mpi4py.rc.initialize = False
    say(mpi4py=mpi4py.__version__, stage="loading its MPI library")
    from mpi4py import MPI  # noqa: F401

    say(mpi4py_libmpi=libmpi())


def build() -> None:
    """What `distfit horovod install` would find, and whether that is what the installed Horovod was built for."""
    say(stage="the compiler, MPI and CUDA of this machine")
    from distfit.install import environment, facts, recipe

    here = facts.gather()
    if here.cuda:
        say(toolkit=here.cuda.version, nccl=here.cuda.nccl_version)
    if here.mpi:
        say(mpi_bin=str(here.mpi.bin), mpi=here.mpi.version, key=recipe.cache_key(here)[0])
    say(installed_key=environment.installed_key())


def libmpi() -> list[dict[str, str]]:
    """Each MPI library that this process has loaded: its path, and what it says of itself."""
    maps = Path("/proc/self/maps").read_text()
    return [{"path": path, "version": _version_of(path)} for path in loaded_libmpi(maps)]


def _version_of(path: str) -> str:
    # Allowed before MPI starts; 8192 is the longest that any MPI declares (MPI_MAX_LIBRARY_VERSION_STRING).
    text, length = ctypes.create_string_buffer(8192), ctypes.c_int(0)
    ctypes.CDLL(path).MPI_Get_library_version(text, ctypes.byref(length))
    return text.value.decode(errors="replace").strip().split("\n")[0]


def say(**found: Any) -> None:
    """Print what was found, at once."""
    print(json.dumps(found), flush=True)


PARTS: dict[str, Callable[[], None]] = {part.__name__: part for part in (tensorflow, mpi4py, build)}

if __name__ == "__main__":
    PARTS[sys.argv[1]]()
