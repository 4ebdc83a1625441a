"""From what the child programs answered to facts. Pure."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

from distfit.doctor.asking import Answer
from distfit.doctor.facts import Cuda, Horovod, Library, Mpi4py, Rank, TensorFlow
from distfit.doctor.probe import LAST_STAGE


def tensorflow(answer: Answer) -> TensorFlow:
    """Of the part `tensorflow`."""
    said = answer.said
    return TensorFlow(
        version=said.get("tensorflow"),
        keras=said.get("keras"),
        backend=said.get("keras_backend"),
        is_cuda_build=said.get("is_cuda_build", False),
        cuda=said.get("built_for_cuda", ""),
        cudnn=said.get("built_for_cudnn", ""),
        gpus=tuple(said["gpus"]) if "gpus" in said else None,
        stage=said.get("stage", "starting Python"),
        problem=answer.problem,
    )


def horovod(answer: Answer, build: Answer) -> Horovod:
    """Of the part `tensorflow`, which loads it last, and the part `build`."""
    said = answer.said
    unreached = answer.problem if said.get("stage") == LAST_STAGE else None
    return Horovod(
        version=said.get("horovod_version"),
        built_for=said.get("horovod_built_for", ""),
        mpi=said.get("built_with_mpi", False),
        gloo=said.get("built_with_gloo", False),
        nccl=said.get("built_with_nccl", False),
        libraries=_libraries(said.get("horovod_libmpi", [])),
        problem=said.get("horovod_problem") or unreached,
        built_key=build.said.get("installed_key"),
        here_key=build.said.get("key"),
        build_problem=build.problem,
    )


def mpi4py(answer: Answer) -> Mpi4py:
    """Of the part `mpi4py`."""
    said = answer.said
    libraries = _libraries(said.get("mpi4py_libmpi", []))
    return Mpi4py(said.get("mpi4py"), libraries, said.get("mpi4py_problem") or answer.problem)


def cuda(answer: Answer | None, build: Answer) -> Cuda:
    """Of nvidia-smi, None where there is none, and the part `build`."""
    toolkit = Cuda(toolkit=build.said.get("toolkit", ""), nccl=build.said.get("nccl", ""))
    if answer is None:
        return toolkit
    if answer.problem:
        return replace(toolkit, problem=(answer.output or answer.problem).splitlines()[0])
    return replace(toolkit, **parse_nvidia_smi(answer.output))


def parse_nvidia_smi(xml: str) -> dict[str, Any]:
    """Driver, CUDA and GPUs out of `nvidia-smi -q -x`.

    >>> parse_nvidia_smi("<log><driver_version>570.1</driver_version><cuda_version>12.8</cuda_version></log>")
    {'driver': '570.1', 'supports': '12.8', 'gpus': ()}
    """
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        return {"problem": f"nvidia-smi answered with something else than XML ({error})"}
    names = tuple(gpu.findtext("product_name", "GPU") for gpu in root.iter("gpu"))
    return {
        "driver": root.findtext("driver_version", ""),
        "supports": root.findtext("cuda_version", ""),
        "gpus": names,
    }


def named(answer: Answer) -> str:
    """The line in which an mpirun names itself: the first one, with MPICH's `Version:` further down.

    >>> named(Answer(output="HYDRA build details:\\n    Version:  4.2.1"))
    'HYDRA build details: Version:  4.2.1'
    """
    lines = [line.strip() for line in answer.output.splitlines() if line.strip()]
    return " ".join([*lines[:1], *[line for line in lines[1:] if line.startswith("Version:")][:1]])


def rank(said: Mapping[str, Any]) -> Rank:
    """Of what a rank left in its file."""
    return Rank(
        stage=said.get("stage", "starting"),
        rank=said.get("rank"),
        size=said.get("size"),
        device=said.get("device"),
        libraries=_libraries(said.get("libmpi", [])),
        right=said.get("right"),
        seconds=said.get("seconds"),
        bytes=said.get("bytes"),
    )


def _libraries(found: list[dict[str, str]]) -> tuple[Library, ...]:
    return tuple(Library(os.path.realpath(one["path"]), one["version"]) for one in found)
