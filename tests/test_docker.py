"""The Dockerfile is linted and its commands are the Makefile's; there is no Docker engine where these tests run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib

import pytest
import yaml

from tests.ranks import BIN, ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
TARGETS = ("cpu", "cuda")


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each, continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in joined.splitlines() if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, FROM included, by its name."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            name = rest.split()[-1]
        if name:
            found.setdefault(name, []).append((word, rest))
    return found


def of(stage: str, word: str) -> list[str]:
    return [rest for found, rest in stages()[stage] if found == word]


def test_hadolint_finds_nothing():
    done = subprocess.run([BIN / "hadolint", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_both_targets_are_there_and_take_what_their_own_first_stage_built():
    assert set(stages()) == {name for target in TARGETS for name in (target, f"{target}-build")}
    for target in TARGETS:
        assert f"--from={target}-build /opt/venv /opt/venv" in of(target, "COPY")


@pytest.mark.parametrize(("target", "extra"), [("cpu", " ."), ("cuda", " .[cuda]")])
def test_what_is_installed_is_the_makefiles_business(target, extra):
    (command,) = [run for run in of(f"{target}-build", "RUN") if " make " in f" {run} " and "apt-get" not in run]
    words = shlex.split(command[command.index("make ") :])
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        [*words, "-n", "VENV=/nonexistent/venv", "PYTHON=python3"],
        cwd=ROOT,
        env=own,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert f"--editable{extra}\n" in done.stdout
    assert "distfit horovod install" in done.stdout
    assert "VENV=/opt/venv" in words


def test_what_is_copied_is_there_and_enough_to_install():
    for target in TARGETS:
        for stage in (target, f"{target}-build"):
            own = [copy.split()[:-1] for copy in of(stage, "COPY") if not copy.startswith("--from")]
            copied = {name for names in own for name in names}
            assert {name for name in copied if not (ROOT / name).exists() or name in IGNORED} == set()
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert {project["readme"], *project["license-files"], "pyproject.toml", "distfit"} <= copied


def test_data_runs_and_history_stay_out():
    assert {".git", ".venv", "data", "runs"} <= set(IGNORED)


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_a_command_as_a_user_without_rights(target):
    last = dict(stages()[target])
    assert last["USER"] == "1000:1000"
    assert last["ENTRYPOINT"] == '["tini", "--"]'
    assert any("tini=" in run and "--uid 1000" in run for run in of(target, "RUN"))
    assert {"title", "description", "licenses"} == set(re.findall(r"org\.opencontainers\.image\.(\w+)=", last["LABEL"]))


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_serves_the_kubernetes_job(target):
    job = yaml.safe_load((ROOT / "launch" / "mpijob.yaml").read_text())
    replicas = job["spec"]["mpiReplicaSpecs"]
    launcher, worker = (replicas[name]["template"]["spec"] for name in ("Launcher", "Worker"))
    assert {f"{pod['securityContext']['runAsUser']}:1000" for pod in (launcher, worker)} == set(of(target, "USER"))
    assert worker["containers"][0]["command"][0] == "/usr/sbin/sshd"
    # An sshd of a user cannot ask PAM, which then denies everybody.
    assert any("openssh-server=" in run and "UsePAM no" in run for run in of(target, "RUN"))
    configuration = re.search(r"distfit train (configs/\S+)", str(launcher["containers"][0]["args"]))[1]
    assert (ROOT / configuration).exists()
    assert "configs configs" in of(target, "COPY")


def test_apt_leaves_no_lists_and_names_versions():
    for run in (rest for word, rest in instructions() if word == "RUN" and "apt-get" in rest):
        packages = re.search(r"--no-install-recommends (.*?) &&", run)[1].split()
        assert [package for package in packages if "=" not in package] == []
        assert "rm -rf /var/lib/apt/lists/*" in run


def test_the_python_of_the_image_is_one_that_distfit_accepts():
    arguments = dict(rest.split("=") for word, rest in instructions() if word == "ARG")
    assert arguments["PYTHON"] in ("3.11", "3.12", "3.13")
    assert int(arguments["CUDA"].split(".")[0]) == 12
