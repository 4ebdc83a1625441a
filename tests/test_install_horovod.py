import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from distfit.errors import InputError, RunError
from distfit.install import build, cache, environment, facts, horovod, process, rank_check, recipe, verify
from distfit.install.facts import Cuda, Facts, Mpi

PYPI_MPI = Mpi(bin=Path("/env/bin"), version="mpirun (Open MPI) 4.1.8", from_pypi=True)
SYSTEM_MPI = Mpi(bin=Path("/opt/mpich/bin"), version="HYDRA build details: Version: 4.2.1", from_pypi=False)
CUDA = Cuda(Path("/usr/local/cuda"), "12.5", Path("/nccl/include"), Path("/nccl/lib/libnccl.so.2"), "2.25.1")
COMPLETE = Facts(
    executable=Path("/env/bin/python"),
    python="3.12.1",
    abi="cpython-312-x86_64-linux-gnu",
    platform="linux-x86_64 glibc 2.36",
    site=Path("/env/lib/python3.12/site-packages"),
    site_writable=True,
    has_pip=True,
    headers=True,
    tensorflow="2.21.0",
    compiler="/usr/bin/c++",
    make="/usr/bin/make",
    mpi=PYPI_MPI,
    cuda=None,
    settings=(),
    free_bytes=50_000_000_000,
)


# What is missing


def test_complete_facts_are_not_refused():
    recipe.refuse(COMPLETE)
    recipe.refuse(replace(COMPLETE, mpi=None))


@pytest.mark.parametrize(
    ("change", "expected", "remedy"),
    [
        ({"python": "3.14.0"}, "Python 3.11 to 3.13", "-m venv"),
        ({"python": "3.10.9"}, "/env/bin/python is 3.10.9", "-m venv"),
        ({"has_pip": False}, "pip", "/env/bin/python -m ensurepip"),
        ({"site_writable": False}, "not writable", "virtual environment"),
        ({"tensorflow": None}, "TensorFlow", "/env/bin/python -m pip install tensorflow"),
        ({"compiler": None}, "C++ compiler", "apt install g++"),
        ({"make": None}, "make", "apt install g++ make"),
        ({"mpi": replace(SYSTEM_MPI, version="")}, "/opt/mpich/bin", "module load openmpi"),
        ({"mpi": SYSTEM_MPI, "headers": False}, "Python.h", "python3-dev"),
        ({"free_bytes": 300_000_000}, "0.3 GB are free", "TMPDIR="),
    ],
)
def test_what_is_missing_is_said_with_what_to_type(change, expected, remedy):
    with pytest.raises(InputError) as refusal:
        recipe.refuse(replace(COMPLETE, **change))
    assert expected in str(refusal.value)
    assert remedy in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_python_headers_are_not_needed_with_the_wheel_of_mpi4py():
    recipe.refuse(replace(COMPLETE, headers=False))


# The key and the environment of the build


@pytest.mark.parametrize(
    "change",
    [
        {"python": "3.12.2"},
        {"abi": "cpython-312t-x86_64-linux-gnu"},
        {"platform": "linux-aarch64 glibc 2.36"},
        {"tensorflow": "2.21.1"},
        {"mpi": replace(PYPI_MPI, version="mpirun (Open MPI) 4.1.9")},
        {"mpi": SYSTEM_MPI},
        {"cuda": CUDA},
        {"settings": (("HOROVOD_CPU_OPERATIONS", "GLOO"),)},
    ],
)
def test_each_fact_that_matters_changes_the_key(change):
    assert recipe.cache_key(replace(COMPLETE, **change))[0] != recipe.cache_key(COMPLETE)[0]


def test_environments_in_other_folders_share_a_build_for_pypis_mpi_only():
    elsewhere = {"executable": Path("/b/bin/python"), "site": Path("/b/lib"), "free_bytes": 9_000_000_000}
    moved = replace(COMPLETE, **elsewhere, mpi=replace(PYPI_MPI, bin=Path("/b/bin")))
    assert recipe.cache_key(moved) == recipe.cache_key(COMPLETE)
    other = replace(SYSTEM_MPI, bin=Path("/opt/other/bin"))
    assert recipe.cache_key(replace(COMPLETE, mpi=other)) != recipe.cache_key(replace(COMPLETE, mpi=SYSTEM_MPI))


def test_the_chosen_mpi_and_this_python_come_first_on_path():
    path = recipe.run_environment(replace(COMPLETE, mpi=SYSTEM_MPI), {"PATH": "/usr/bin"})["PATH"]
    assert path == "/opt/mpich/bin:/env/bin:/usr/bin"


def test_build_tools_come_before_the_environments_own():
    built = recipe.build_environment(
        COMPLETE, {"PATH": "/usr/bin", "PYTHONPATH": "/mine"}, Path("/tools"), Path("/links"), 2
    )
    assert built["PATH"].startswith("/tools/bin:")
    assert built["PYTHONPATH"] == "/tools:/mine"
    assert built["MAKEFLAGS"] == "-j2"
    assert built["HOROVOD_WITH_MPI"] == built["HOROVOD_WITH_GLOO"] == "1"
    assert "HOROVOD_GPU_OPERATIONS" not in built


def test_nccl_is_built_in_where_cuda_and_nccl_are():
    built = recipe.build_environment(replace(COMPLETE, cuda=CUDA), {}, Path("/tools"), Path("/links"), 2)
    assert built["HOROVOD_GPU_OPERATIONS"] == "NCCL"
    assert built["HOROVOD_NCCL_INCLUDE"] == "/nccl/include"
    assert built["HOROVOD_NCCL_LIB"] == "/links"
    assert built["PATH"].startswith("/tools/bin:/usr/local/cuda/bin:")
    own = replace(CUDA, nccl_library=Path("/opt/nccl/lib/libnccl.so"))
    built = recipe.build_environment(replace(COMPLETE, cuda=own), {}, Path("/tools"), Path("/links"), 2)
    assert built["HOROVOD_NCCL_LIB"] == "/opt/nccl/lib"


def test_environments_with_pypis_nccl_share_a_build():
    def key_of(root: str) -> str:
        site = Path(root) / "site-packages"
        nccl = replace(CUDA, nccl_library=site / "nvidia/nccl/lib/libnccl.so.2", nccl_include=site / "include")
        return recipe.cache_key(replace(COMPLETE, site=site, cuda=nccl))[0]

    assert key_of("/a") == key_of("/b")


def test_an_empty_setting_of_the_user_turns_nccl_off():
    chosen = replace(COMPLETE, cuda=CUDA, settings=(("HOROVOD_GPU_OPERATIONS", ""),))
    built = recipe.build_environment(chosen, {"HOROVOD_GPU_OPERATIONS": ""}, Path("/t"), Path("/l"), 1)
    assert "HOROVOD_GPU_OPERATIONS" not in built


def test_only_open_mpi_gets_open_mpis_options():
    assert "--oversubscribe" in recipe.mpirun_command(PYPI_MPI, 2, ["true"])
    assert recipe.mpirun_command(SYSTEM_MPI, 2, ["true"]) == ["mpirun", "-np", "2", "true"]


def test_requirements_are_those_of_the_extra():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["mpi"] == [recipe.OPEN_MPI, recipe.MPI4PY]


# The edits


@pytest.mark.parametrize("edit", recipe.EDITS, ids=lambda edit: edit.file)
def test_each_edit_changes_one_line_and_refuses_another_source(edit):
    assert recipe.apply(edit, f"before\n{edit.line}after") == f"before\n{edit.new}after"
    for text in ("nothing of it", edit.line * 2):
        with pytest.raises(RunError, match=f"exactly once in {edit.file}"):
            recipe.apply(edit, text)


def test_the_library_finds_mpi_relative_to_itself():
    edited = "".join(edit.new for edit in recipe.EDITS)
    assert '"\\$ORIGIN/../../../..;' in edited


# Looking around


def program(path: Path, prints: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{prints}\nEND\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def only_here(monkeypatch, tmp_path):
    """An interpreter whose `bin` folder is empty, and a PATH that has what the fake programs need."""
    own = tmp_path / "env" / "bin"
    own.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(own / "python"))
    for name in ("cat", "sh"):
        (own / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(own))
    return tmp_path


def test_a_system_mpi_on_path_is_found_with_its_version(only_here):
    folder = only_here / "mpi" / "bin"
    program(folder / "mpicxx", "")
    program(folder / "mpirun", "mpirun (Open MPI) 5.0.3\n\nReport bugs")
    found = facts.gather({"PATH": str(folder)}).mpi
    assert found == Mpi(folder, "mpirun (Open MPI) 5.0.3", from_pypi=False)
    assert found.is_open_mpi


def test_mpich_names_its_version_further_down(only_here):
    program(only_here / "mpi" / "mpicxx", "")
    program(only_here / "mpi" / "mpirun", "HYDRA build details:\n    Version:   4.2.1\n    CC: gcc")
    found = facts.gather({"PATH": str(only_here / "mpi")}).mpi
    assert found.version == "HYDRA build details: Version:   4.2.1"
    assert not found.is_open_mpi


def test_without_mpicxx_there_is_no_mpi_and_without_mpirun_no_version(only_here):
    assert facts.gather({"PATH": ""}).mpi is None
    program(only_here / "mpi" / "mpicxx", "")
    assert facts.gather({"PATH": str(only_here / "mpi")}).mpi.version == ""


def test_cuda_counts_only_together_with_nccl(only_here, monkeypatch):
    monkeypatch.setattr(facts, "_nccl_places", lambda home, site, env: [(home / "include", home / "libnccl.so.2")])
    home = only_here / "cuda"
    program(home / "bin" / "nvcc", "Cuda compilation tools, release 12.5, V12.5.40")
    surroundings = {"PATH": "", "CUDA_HOME": str(home)}
    assert facts.gather(surroundings).cuda is None
    (home / "include").mkdir()
    (home / "include" / "nccl.h").write_text("#define NCCL_MAJOR 2\n#define NCCL_MINOR 25\n#define NCCL_PATCH 1\n")
    (home / "libnccl.so.2").touch()
    found = facts.gather(surroundings).cuda
    assert (found.version, found.nccl_version, found.home) == ("12.5", "2.25.1", home)


def test_cuda_is_where_nvcc_says_not_where_its_wrapper_lies(only_here):
    nvcc = program(only_here / "bin" / "nvcc", f"#$ _SPACE_=\n#$ TOP={only_here}/cuda-12.5/bin/..")
    (only_here / "cuda-12.5" / "bin").mkdir(parents=True)
    assert facts._toolkit_home(str(nvcc)) == only_here / "cuda-12.5"
    silent = program(only_here / "cuda-12.4" / "bin" / "nvcc", "")
    assert facts._toolkit_home(str(silent)) == only_here / "cuda-12.4"


def test_a_failing_build_shows_the_compilers_words_not_those_of_setup(tmp_path):
    program(tmp_path / "python", "a.cc:1: error: no XLA here\nTraceback (most recent call last):\n  File setup.py")
    (tmp_path / "python").write_text((tmp_path / "python").read_text() + "exit 1\n")
    here = replace(COMPLETE, executable=tmp_path / "python", cuda=CUDA)
    with (
        process.Progress("Compiling", lambda line: None) as watch,
        pytest.raises(RunError, match="no XLA here") as failure,
    ):
        build._compile(here, os.environ, tmp_path, tmp_path, tmp_path / "log", watch)
    assert "File setup.py" not in str(failure.value)
    assert "HOROVOD_GPU_OPERATIONS= distfit" in str(failure.value)


def test_only_build_settings_of_horovod_are_taken(only_here):
    given = {"PATH": "", "HOROVOD_RANK": "1", "HOROVOD_TIMELINE": "t", "HOROVOD_CUDA_HOME": "/c"}
    assert facts.gather(given).settings == (("HOROVOD_CUDA_HOME", "/c"),)


def test_no_compiler_no_make(only_here):
    found = facts.gather({"PATH": ""})
    assert found.compiler is None
    assert found.make is None


# The cache


@pytest.fixture
def shelf(tmp_path):
    return cache.Shelf("key", {"XDG_CACHE_HOME": str(tmp_path / "cache")})


@pytest.fixture
def stored(shelf, tmp_path):
    wheel = tmp_path / "horovod-0.28.1.whl"
    wheel.write_bytes(b"wheel")
    return shelf.store([wheel], {"tensorflow": "2.21.0"})


def test_a_stored_wheel_comes_back_with_what_it_was_made_of(shelf, stored):
    assert shelf.load(pytest.fail) == stored
    manifest = json.loads((shelf.folder / "manifest.json").read_text())
    assert manifest["made_of"] == {"tensorflow": "2.21.0"}
    assert sorted(os.listdir(shelf.folder)) == ["horovod-0.28.1.whl", "install.log", "manifest.json"]


def test_an_empty_shelf_says_nothing(shelf):
    assert shelf.load(pytest.fail) is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "horovod-0.28.1.whl").write_bytes(b"wheex"), "checksum of horovod"),
        (lambda folder: (folder / "horovod-0.28.1.whl").unlink(), "is gone"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    ],
)
def test_damage_is_said_and_not_used(shelf, stored, damage, said):
    damage(shelf.folder)
    lines = []
    assert shelf.load(lines.append) is None
    assert len(lines) == 1
    assert said in lines[0]
    assert "building anew" in lines[0]


def test_a_relative_cache_folder_is_ignored_and_a_file_in_its_place_refused(tmp_path):
    assert cache.cache_root({"XDG_CACHE_HOME": "cache"}) == Path.home() / ".cache" / "distfit"
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="XDG_CACHE_HOME=/path"):
        cache.Shelf("key", {"XDG_CACHE_HOME": str(tmp_path / "file")})


# Programs and progress


def test_output_goes_to_the_log_and_the_status_comes_back(tmp_path):
    log = tmp_path / "log"
    seen = []

    class Watch:
        line = staticmethod(seen.append)

    command = [sys.executable, "-c", "print('[ 42%] Building'); raise SystemExit(3)"]
    assert process.run(command, environment=os.environ, log=log, watch=Watch()) == 3
    assert seen == ["[ 42%] Building\n"]
    assert "[ 42%] Building" in process.tail(log)


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path):
    script = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    command = [sys.executable, "-c", script]
    assert process.run(command, environment=os.environ, log=tmp_path / "log", timeout_s=1.0) < 0


def test_a_terminated_install_ends_what_it_started(tmp_path):
    script = f"""
import os, pathlib
from distfit.install.process import ended_through_finally, run
with ended_through_finally():
    run(["sh", "-c", "echo $$ > {tmp_path}/pid; exec sleep 60"], environment=os.environ,
        log=pathlib.Path("{tmp_path}/log"))
"""
    installer = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    installer.terminate()
    assert installer.wait(timeout=30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_program_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(RunError, match="no-such-program"):
        process.run(["no-such-program"], environment={"PATH": ""}, log=tmp_path / "log")


def test_progress_without_a_terminal_speaks_every_15_seconds(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    now = [0.0]
    lines = []
    with process.Progress("Compiling", lines.append, clock=lambda: now[0]) as watch:
        for now[0], text in ((5.0, "[ 10%] a"), (16.0, "g++ b"), (20.0, "[ 30%] c"), (40.0, "[ 55%] d")):
            watch.line(text)
    assert lines == [
        "Compiling ...",
        "Compiling: 10 %, 16 s",
        "Compiling: 55 %, 40 s",
        "Compiling: done after 40 s",
    ]


def test_a_failing_pip_shows_its_end_and_the_log(monkeypatch, tmp_path):
    program(tmp_path / "python", "Could not find a version: network is unreachable")
    (tmp_path / "python").write_text((tmp_path / "python").read_text() + "exit 1\n")
    here = replace(COMPLETE, executable=tmp_path / "python")
    with pytest.raises(RunError) as failure:
        build.pip(here, ["install", "cmake"], os.environ, tmp_path / "log")
    for part in ("pip install cmake", "network is unreachable", str(tmp_path / "log"), "HTTPS_PROXY"):
        assert part in str(failure.value)


@pytest.mark.parametrize(("code", "absent"), [(b"gloo", "MPI"), (b"MPI_Allreduce", "Gloo")])
def test_a_library_without_a_transport_is_refused(tmp_path, code, absent):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("horovod/tensorflow/mpi_lib.so", code)
    with pytest.raises(RunError, match=f"without {absent}"):
        build._require_both_transports(tmp_path / "a.whl")


# The verdict of the ranks


def seen_by(rank: int, **change) -> dict:
    right = {"rank": rank, "size": 2, "horovod_sum": 3.0, "mpi4py_sum": 3.0, "mpi": True, "gloo": True}
    return {**right, "libmpi": ["/env/lib/libmpi.so.40"], **change}


def test_two_right_ranks_pass():
    assert verify.judge([seen_by(0), seen_by(1)]) is None


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"horovod_sum": 2.0}, "horovod_sum = 2.0 instead of 3.0 on rank 1"),
        ({"mpi4py_sum": 1.0}, "mpi4py_sum = 1.0 instead of 3.0 on rank 1"),
        ({"gloo": False}, "without gloo"),
        ({"libmpi": ["/env/lib/libmpi.so.40", "/usr/lib/libmpi.so.40"]}, "2 MPI libraries"),
        ({"libmpi": []}, "0 MPI libraries"),
    ],
)
def test_each_wrong_observation_is_named(change, verdict):
    assert verdict in verify.judge([seen_by(0), seen_by(1, **change)])


def test_libmpi_is_told_from_its_bindings():
    maps = "\n".join(
        f"7f00-7f10 r-xp 00000000 08:01 11    {path}"
        for path in (
            "/a/lib/libmpi.so.40.30.8",
            "/a/lib/libmpi_cxx.so.40",
            "/a/lib/libmpich.so.12",
            "/a/x.so",
        )
    )
    assert rank_check.loaded_libmpi(maps) == ["/a/lib/libmpi.so.40.30.8", "/a/lib/libmpich.so.12"]


# The packages of the environment


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages in which a Horovod of one file is installed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod" / "__init__.py").write_text("the old one")
    metadata = tmp_path / "horovod-0.28.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: horovod\nVersion: 0.28.1\n")
    (metadata / "RECORD").write_text("horovod/__init__.py,,\nhorovod-0.28.1.dist-info/METADATA,,\n")
    return tmp_path


def test_the_mark_is_read_back_and_belongs_to_the_package(site):
    assert environment.installed_key() is None
    environment.mark("abc")
    assert environment.installed_key() == "abc"
    assert "horovod-0.28.1.dist-info/distfit.json,,\n" in (site / "horovod-0.28.1.dist-info" / "RECORD").read_text()


@pytest.mark.parametrize("reason", [RunError, KeyboardInterrupt, SystemExit])
def test_the_old_package_comes_back_whatever_the_reason(site, monkeypatch, tmp_path, reason):
    uninstalled = []
    monkeypatch.setattr(environment, "_REPLACED", ("horovod",))
    monkeypatch.setattr(environment, "pip", lambda here, arguments, *_: uninstalled.append(arguments))

    def replaced_and_failed():
        with environment.kept_unless_verified(COMPLETE, tmp_path / "log"):
            (site / "horovod" / "__init__.py").write_text("the new one")
            raise reason

    with pytest.raises(reason):
        replaced_and_failed()
    assert uninstalled == [["uninstall", "--yes", "horovod"]]
    assert (site / "horovod" / "__init__.py").read_text() == "the old one"


def test_the_new_package_stays_when_nothing_fails(site, tmp_path):
    with environment.kept_unless_verified(COMPLETE, tmp_path / "log"):
        (site / "horovod" / "__init__.py").write_text("the new one")
    assert (site / "horovod" / "__init__.py").read_text() == "the new one"


# The order of it all, with the expensive steps faked


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """`install` on a machine that has everything; what it did, in order."""
    did = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(facts, "gather", lambda: COMPLETE)
    monkeypatch.setattr(environment, "installed_key", lambda: None)
    monkeypatch.setattr(environment, "put", lambda *_: did.append("put"))
    monkeypatch.setattr(environment, "_copy_files", lambda name, folder: [])
    monkeypatch.setattr(environment, "_put_back", lambda *_: did.append("put back"))
    monkeypatch.setattr(environment, "mark", lambda key: did.append("mark"))
    monkeypatch.setattr(horovod, "verify", lambda *_: did.append("verify"))

    def fake_build(here, log, scratch, say):
        did.append("build")
        (scratch / "horovod-0.28.1.whl").write_bytes(b"wheel")
        return [scratch / "horovod-0.28.1.whl"]

    monkeypatch.setattr(horovod, "build", fake_build)
    return did


def test_the_second_install_takes_the_wheel_from_the_cache(stage, capsys):
    horovod.install()
    assert stage == ["build", "put", "verify", "mark"]
    stage.clear()
    horovod.install()
    assert stage == ["put", "verify", "mark"]
    assert "Taking the wheel from" in capsys.readouterr().out


def test_force_builds_anew(stage):
    horovod.install()
    stage.clear()
    horovod.install(force=True)
    assert stage == ["build", "put", "verify", "mark"]


def test_what_is_installed_and_works_stays(stage, monkeypatch):
    monkeypatch.setattr(environment, "installed_key", lambda: recipe.cache_key(COMPLETE)[0])
    said = []
    horovod.install(say=said.append)
    assert stage == ["verify"]
    assert "installed already" in said[-1]


def test_what_fails_verification_is_put_back_and_not_marked(stage, monkeypatch):
    def wrong(*_):
        raise RunError("a wrong sum")

    monkeypatch.setattr(horovod, "verify", wrong)
    with pytest.raises(RunError, match="a wrong sum"):
        horovod.install(say=lambda line: None)
    assert stage == ["build", "put", "put back"]


def test_an_interrupted_build_stores_nothing(stage, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(horovod, "build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        horovod.install(say=lambda line: None)
    assert stage == []
    assert not list((tmp_path / "cache").rglob("manifest.json"))


@pytest.mark.mpi
def test_the_installed_horovod_passes(tmp_path):
    verify.verify(facts.gather(), tmp_path / "log")
