"""Lines on what is installed: versions, whether they fit together, what was built for what. Pure."""

from typing import Any

from distfit.doctor.facts import Facts
from distfit.doctor.lines import Line, failure, ok, warning

_HOROVOD_INSTALL = "Type: distfit horovod install"
_ONE_PROCESS = "; or --no-ranks, if one process is all that runs here."


def python(facts: Facts) -> Line:
    """The interpreter, against what distfit declares."""
    from packaging.specifiers import SpecifierSet

    here = facts.python
    text = f"Python {here.version} ({here.executable})"
    if here.version in SpecifierSet(here.requires_python):
        return ok("python", text, version=here.version, executable=here.executable)
    wanted = here.requires_python
    return failure(
        "python",
        f"{text}, and distfit is made for {wanted}",
        "Make an environment with one of those: python3.12 -m venv .venv",
        version=here.version,
        executable=here.executable,
    )


def packages(facts: Facts) -> Line:
    """The installed packages, against the ranges that distfit declares: read from its metadata, not repeated."""
    if not facts.python.requirements:
        return warning(
            "packages",
            "distfit runs from a source folder and is not installed: which versions it needs cannot be looked up",
            f"In that folder, type: {facts.python.executable} -m pip install -e .",
        )
    checked, wrong = _against_ranges(facts)
    if not wrong:
        return ok("packages", f"all {len(checked)} packages have the versions that distfit needs", versions=checked)
    return failure(
        "packages",
        "; ".join(f"{name} {checked[name] or 'is missing'}, distfit needs {range}" for name, range in wrong.items()),
        f"Type: {facts.python.executable} -m pip install "
        + " ".join(f"'{name}{range}'" for name, range in wrong.items()),
        versions=checked,
    )


def _against_ranges(facts: Facts) -> tuple[dict[str, str | None], dict[str, str]]:
    """(version of every package that is needed or optional and there, range of each that does not fit)."""
    from packaging.requirements import Requirement

    checked: dict[str, str | None] = {}
    wrong: dict[str, str] = {}
    for requirement in map(Requirement, facts.python.requirements):
        name = requirement.name.lower()
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        here = facts.python.packages.get(name)
        if here is None and name == "tensorflow":  # tensorflow-cpu and nightly builds have other names
            here = facts.tensorflow.version
        optional = not needed and here is not None and _for_ranks(requirement.marker)
        if needed or optional:
            checked[name] = here
            if here is None or not requirement.specifier.contains(here, prereleases=True):
                wrong[name] = str(requirement.specifier)
    return checked, wrong


def _for_ranks(marker: object) -> bool:
    """Whether a requirement is of the extra `mpi`; those of `dev` are the developers' own."""
    return 'extra == "mpi"' in str(marker)


def settings(facts: Facts) -> Line:
    """The environment variables that matter here, for whoever is asked for help."""
    shown = ", ".join(f"{name}={value}" for name, value in sorted(facts.settings.items()))
    return ok("settings", shown or "no environment variable that matters here is set", set=dict(facts.settings))


def tensorflow(facts: Facts) -> Line:
    """Whether it can be imported, and what it was built for."""
    here = facts.tensorflow
    if here.version is None:
        return failure("tensorflow", *_unimported(facts, "TensorFlow"))
    built = f"built for CUDA {here.cuda} and cuDNN {here.cudnn}" if here.is_cuda_build else "built for the CPU alone"
    found: dict[str, Any] = {
        "version": here.version,
        "cuda": here.cuda,
        "cudnn": here.cudnn,
        "is_cuda_build": here.is_cuda_build,
    }
    if here.gpus is None:
        return failure("tensorflow", *_unimported(facts, f"TensorFlow {here.version}"), **found)
    return ok("tensorflow", f"TensorFlow {here.version}, {built}", **found)


def keras(facts: Facts) -> Line:
    """Keras 3 on TensorFlow; another backend or legacy Keras is refused by `fit`."""
    here, settings = facts.tensorflow, facts.settings
    found: dict[str, Any] = {"version": here.keras, "backend": here.backend}
    wanted = settings.get("KERAS_BACKEND") or facts.keras_file or here.backend
    # Before the import is judged: one of a backend that is not installed fails.
    if wanted not in (None, "tensorflow"):
        where = "KERAS_BACKEND" if settings.get("KERAS_BACKEND") else "~/.keras/keras.json"
        return failure(
            "keras",
            f"Keras is told to run on {wanted!r} ({where}), and distfit trains on TensorFlow",
            "Type: export KERAS_BACKEND=tensorflow",
            **found,
        )
    if here.keras is None:
        if here.gpus is None:
            return warning("keras", "not tried, as TensorFlow failed", "Mend the line tensorflow first.")
        return failure("keras", *_unimported(facts, "Keras"))
    if settings.get("TF_USE_LEGACY_KERAS", "").lower() in ("1", "true"):
        return warning(
            "keras",
            f"Keras {here.keras}, but TF_USE_LEGACY_KERAS makes `tf.keras` legacy Keras, whose models are refused",
            "Type: unset TF_USE_LEGACY_KERAS",
            **found,
        )
    return ok("keras", f"Keras {here.keras} on TensorFlow", **found)


def horovod(facts: Facts) -> Line:
    """Whether ranks can use it: there, with MPI and Gloo in it, and compiled against this TensorFlow."""
    here = facts.horovod
    if here.version is None:
        return _without_horovod(facts)
    parts = {"MPI": here.mpi, "Gloo": here.gloo, "NCCL": here.nccl}
    absent = [name for name, there in parts.items() if not there]
    text = f"Horovod {here.version} with {', '.join(name for name in parts if parts[name])}"
    text += f", without {', '.join(absent)}" if absent else ""
    text += f", compiled against TensorFlow {here.built_for}" if here.built_for else ""
    found: dict[str, Any] = {
        "version": here.version,
        "built_for": here.built_for,
        **{f"has_{k.lower()}": v for k, v in parts.items()},
    }
    if here.built_for and facts.tensorflow.version not in (None, here.built_for):
        return failure(
            "horovod", f"{text}, and TensorFlow {facts.tensorflow.version} is here", f"{_HOROVOD_INSTALL}.", **found
        )
    if not here.mpi:
        return failure("horovod", f"{text}: ranks under mpirun do not find each other", f"{_AGAIN}.", **found)
    if not here.gloo:
        return warning("horovod", f"{text}: `horovodrun --gloo` cannot be used", f"{_AGAIN}.", **found)
    if here.build_problem:
        return warning(
            "horovod",
            f"{text}; what this machine has to build it with cannot be told: {here.build_problem}",
            "Look which of these does not answer: mpirun --version, nvcc --version.",
            **found,
        )
    if here.built_key and here.here_key and here.built_key != here.here_key:
        return warning(
            "horovod",
            f"{text}; it was built for another combination of Python, TensorFlow, MPI and CUDA than is found here now",
            f"{_HOROVOD_INSTALL}, or take what has been put in front on PATH away again.",
            **found,
        )
    return ok("horovod", text, **found)


_AGAIN = "Unset HOROVOD_WITHOUT_* and type: distfit horovod install --force"


def _without_horovod(facts: Facts) -> Line:
    reason = facts.horovod.problem
    if not facts.ranks.asked:
        return ok("horovod", "not needed for one process", "distfit horovod install, for jobs of several ranks.")
    if reason is None:
        return warning("horovod", "not tried, as TensorFlow or Keras failed", "Mend the lines above first.")
    if "No module named 'horovod'" in reason:
        return failure(
            "horovod",
            "not installed: one process can train here, several ranks cannot",
            f"{_HOROVOD_INSTALL} (about two minutes){_ONE_PROCESS}",
        )
    if _timed_out(reason):
        return failure("horovod", f"importing it {reason}", _AGAIN_SLOWLY)
    return failure("horovod", f"cannot be imported: {reason}", f"{_HOROVOD_INSTALL} --force{_ONE_PROCESS}")


def mpi4py(facts: Facts) -> Line:
    """The carrier of values outside the steps."""
    here = facts.mpi4py
    if here.version is not None and here.problem is None:
        library = here.libraries[0].version.split(",")[0] if here.libraries else "no MPI library found"
        return ok("mpi4py", f"mpi4py {here.version} ({library})", version=here.version)
    if not facts.ranks.asked:
        return ok("mpi4py", "not needed for one process")
    reason = here.problem or "it said nothing"
    if "No module named 'mpi4py'" in reason:
        return failure("mpi4py", "not installed: ranks under mpirun need it", f"{_HOROVOD_INSTALL}, which brings it.")
    if _timed_out(reason):
        return failure("mpi4py", f"importing it {reason}", _AGAIN_SLOWLY)
    return failure(
        "mpi4py",
        f"mpi4py {here.version or ''} cannot load an MPI library: {reason}".replace("  ", " "),
        f"{_HOROVOD_INSTALL}, which brings one or builds for the one on PATH; or: module load openmpi",
    )


_AGAIN_SLOWLY = "Try again: a first import from a network file system is slow; --limit-s 120 waits longer."


def _timed_out(problem: str) -> bool:
    return problem.startswith("did not answer")


def _unimported(facts: Facts, what: str) -> tuple[str, str]:
    here = facts.tensorflow
    reason = here.problem or "it said nothing"
    if _timed_out(reason):
        return f"{here.stage} {reason}", _AGAIN_SLOWLY
    if "No module named 'tensorflow'" in reason:
        return "not installed", f"Type: {facts.python.executable} -m pip install tensorflow"
    return (
        f"{what} does not work: {here.stage} ended with: {reason}",
        f"Type: {facts.python.executable} -c 'import tensorflow, keras', and install what its error names; "
        "a new environment (python3.12 -m venv .venv) is often quicker.",
    )
