import json
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from distfit import cli
from distfit.errors import InputError, RunError, on_every_rank

LAUNCHERS = ("OMPI_COMM_WORLD_", "HOROVOD_", "PMI_", "PMIX_", "SLURM_", "DISTFIT_")


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """No launcher in the environment, whoever started the tests."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)


@pytest.fixture
def as_rank(monkeypatch):
    def become(rank, size=2):
        monkeypatch.setenv("HOROVOD_RANK", str(rank))
        monkeypatch.setenv("HOROVOD_SIZE", str(size))
        monkeypatch.setattr("distfit.cli.frame.CHIEF_FIRST_S", 0.0)

    return become


@pytest.fixture
def failing(monkeypatch):
    """`distfit horovod install` made to raise something."""

    def fail_with(error):
        def install(**_):
            raise error

        monkeypatch.setattr("distfit.install.horovod.install", install)
        return run("horovod", "install")

    return fail_with


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments), prog_name="distfit")


COMMANDS = [
    *("bench input", "check"),
    *("checkpoint diff", "checkpoint export", "checkpoint list", "checkpoint prune", "checkpoint show"),
    "checkpoint verify",
    *("data build", "data index", "data inspect", "data verify", "doctor", "evaluate"),
    *("horovod install", "launch", "train"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Example:\n" in result.stdout
    assert f"distfit {command}" in result.stdout.split("Example:\n")[1]


def test_the_tested_commands_are_all_there_are():
    def leaves(command, path=()):
        children = getattr(command, "commands", {})
        return [leaf for name in children for leaf in leaves(children[name], (*path, name))] or [" ".join(path)]

    assert sorted(leaves(typer.main.get_command(cli.app))) == COMMANDS


def test_version_is_one_line():
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("distfit ")
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--fast", "x.yaml"], ["train"], ["data", "build"]])
def test_wrong_command_line_exits_with_2_and_a_plain_message(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert "\u2502" not in result.stderr


def test_error_is_one_paragraph_and_its_exit_code():
    result = run("train", "no-such.yaml")
    assert result.exit_code == InputError.exit_code
    assert result.stderr.startswith("distfit: error: Expected a configuration in YAML at 'no-such.yaml'")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_unknown_key_on_the_command_line_gets_the_nearest_name_and_meaning(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("data: {path: d}\n")
    result = run("train", str(path), "bach_size=3")
    assert result.exit_code == 2
    assert "did you mean 'batch_size'? (the records of one step over all replicas)" in result.stderr


def test_run_error_has_its_own_exit_code(failing):
    result = failing(RunError("the compiler stopped"))
    assert (result.exit_code, result.stderr) == (1, "distfit: error: the compiler stopped\n")


def test_debug_shows_the_traceback():
    result = run("--debug", "train", "no-such.yaml")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "FileNotFoundError" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("distfit: error: ")


def test_an_exception_that_is_no_distfit_error_is_not_hidden(failing):
    result = failing(ZeroDivisionError("a bug"))
    assert isinstance(result.exception, ZeroDivisionError)


def test_ctrl_c_says_interrupted_and_exits_with_130(failing):
    result = failing(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "distfit: interrupted\n")


def test_chief_prints_the_error_of_a_job(failing, as_rank):
    as_rank(0)
    assert failing(on_every_rank(InputError("no"))).stderr == "distfit: error: no\n"


def test_other_ranks_leave_an_agreed_error_to_the_chief(failing, as_rank):
    as_rank(1)
    result = failing(on_every_rank(InputError("no")))
    assert (result.exit_code, result.stderr) == (2, "")


def test_other_ranks_tell_an_error_of_their_own_with_their_rank(failing, as_rank):
    as_rank(1)
    result = failing(InputError("no"))
    assert result.exit_code == 2
    assert result.stderr.startswith("distfit: error: on rank 1 of 2 (")
    assert result.stderr.endswith("): no\n")


def test_broken_launcher_variables_do_not_hide_the_error(failing, monkeypatch):
    monkeypatch.setenv("HOROVOD_RANK", "one")
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    assert failing(InputError("no")).stderr == "distfit: error: no\n"


def test_install_passes_force_and_prints_each_line(monkeypatch):
    seen = []

    def install(*, force, say):
        seen.append(force)
        say("building")

    monkeypatch.setattr("distfit.install.horovod.install", install)
    assert run("horovod", "install", "--force").stdout == "building\n"
    assert run("horovod", "install").exit_code == 0
    assert seen == [True, False]


def test_build_writes_a_data_set_and_says_what(tmp_path):
    out = tmp_path / "digits"
    result = run("data", "build", "--from", "digits", str(out), "--seed", "3")
    assert result.exit_code == 0
    assert result.stdout == f"{out}: 1438 train, 359 validation records of 10 classes.\n"
    assert json.loads((out / "dataset.json").read_text())["seed"] == 3


def test_build_refuses_a_folder_in_use_unless_forced(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    result = run("data", "build", "--from", "digits", str(tmp_path))
    assert result.exit_code == 2
    assert "Expected a new or empty folder" in result.stderr
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_unknown_source_names_the_known():
    result = run("data", "build", "--from", "figits", "x")
    assert result.exit_code == 2
    assert "digits" in result.stderr


def test_command_line_and_its_help_load_neither_tensorflow_nor_keras():
    code = (
        "import sys; from distfit import cli; sys.argv = ['distfit', 'train', '--help']\n"
        "try: cli.main()\n"
        "finally: print(sorted({'tensorflow', 'keras', 'distfit.experiment'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"


def test_module_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "distfit", "train", "none.yaml"], timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("distfit: error: ")
