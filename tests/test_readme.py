"""What the README and the other pages say is there, and what the README shows runs."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import typer.main

from distfit import cli
from distfit.config import load
from tests import pages
from tests.ranks import ROOT, launch

README = (ROOT / "README.md").read_text()
PAGES = pages.ALL
COMMAND = re.compile(r"(mpirun .*|horovodrun .*|DISTFIT_\w+=\S+ )?(python -m )?(distfit|make) ")
# Appended to a script: what its training ended with.
SHOW = """
import json
if distfit.init().is_chief:
    print("history", json.dumps(model.history.history))
"""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """What the page tells to type: code blocks' lines and code in sentences, as words."""
    fenced = "\n".join(blocks(page, "(?:bash|sh|console)?")).splitlines()
    indented = re.findall(r"^    (\S.*)$", re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S), re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", page)
    return [shlex.split(line.split("  #")[0]) for line in (*fenced, *indented, *spans) if COMMAND.match(line + " ")]


def distfit_commands(page: str) -> list[list[str]]:
    """The arguments of each `distfit ...` that is more than the bare name, also behind `distfit launch ... --`."""
    parts = [part for words in commands(page) for part in _parts(words)]
    found = [words[words.index("distfit") + 1 :] for words in parts if "distfit" in words]
    return [words for words in found if words]


def _parts(words: list[str]) -> list[list[str]]:
    """A command and the program that it starts, which a -- divides."""
    cut = words.index("--") if "--" in words else len(words)
    return [words[:cut], words[cut + 1 :]]


def script(*, before: bool = False) -> str:
    """README's complete script, or what it was before distfit, by undoing the page's difference."""
    text = blocks(README, "python")[0]
    if not before:
        return text
    (difference,) = blocks(README, "diff")
    added = [line[1:] for line in difference.splitlines() if line.startswith("+")]
    (removed,) = [line[1:] for line in difference.splitlines() if line.startswith("-")]
    for line in (line for line in added if line):
        assert text.count(line + "\n") == 1, line
        text = text.replace(line + "\n", removed + "\n" if line == added[-1] else "")
    assert "distfit" not in text
    return text


def final(job) -> dict:
    assert job.code == 0, job.report()
    # horovodrun puts a tag before each line.
    (history,) = re.findall(r"history (\{.*\})", job.output)
    return json.loads(history)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The history of README's script as one process, in which its data examples then run too."""
    folder = tmp_path_factory.mktemp("readme")
    # A sketch is marked as not run.
    whole, *examples = blocks(re.sub(r"<!-- not run: .*?-->\n```.*?^```$", "", README, flags=re.M | re.S), "python")
    assert len(examples) == 3
    (folder / "train.py").write_text("\n".join([whole, SHOW, *examples, 'print("examples ran")']))
    built = launch(["-m", "distfit", "data", "build", "--from", "digits", "data/digits"], cwd=folder)
    assert built.code == 0, built.report()
    job = launch(["train.py"], cwd=folder)
    assert "examples ran" in job.output, job.report()
    return final(job)


@pytest.fixture
def train_py(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(script() + SHOW)
    return str(path)


@pytest.mark.slow
def test_the_script_and_the_data_examples_run(trained):
    assert [len(values) for values in trained.values()] == [5] * 4
    assert trained["loss"][-1] < trained["loss"][0]


@pytest.mark.slow
def test_the_script_is_the_one_before_it_to_the_bit(trained, tmp_path):
    path = tmp_path / "before.py"
    path.write_text(script(before=True) + SHOW.replace("distfit.init().is_chief", "True"))
    assert final(launch([str(path)])) == trained


@pytest.mark.slow
def test_the_script_on_two_devices_is_the_same_training(trained, train_py):
    _same(final(launch([train_py], env={"DISTFIT_DEVICES": "2"})), trained)


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
def test_the_script_on_two_ranks_is_the_same_training(trained, train_py, launcher):
    _same(final(launch([train_py], ranks=2, launcher=launcher)), trained)


def _same(received: dict, expected: dict) -> None:
    assert received.keys() == expected.keys()
    for name, values in expected.items():
        assert received[name] == pytest.approx(values, rel=1e-5), name


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    known = typer.main.get_command(cli.app)
    for words in distfit_commands((ROOT / page).read_text()):
        command, rest = known, list(words)
        while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
            assert rest[0] in command.commands, words
            command = command.commands[rest.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        if not command.context_settings.get("allow_interspersed_args", True):  # what follows a program is the program's
            rest = rest[: next((place for place, word in enumerate(rest) if word.endswith(".py")), len(rest))]
        assert {word for word in rest if word.startswith("--")} - options == set()


@pytest.mark.parametrize("page", PAGES)
def test_configurations_load_with_their_overrides(page):
    for words in distfit_commands((ROOT / page).read_text()):
        configuration = next((word for word in words if word.startswith("configs/")), None)
        if configuration is not None and "key=value" not in words:
            load(ROOT / configuration, [word for word in words if re.match(r"[a-z][\w.]*=", word)])


def test_the_readme_has_commands_that_these_tests_see():
    found = [" ".join(words) for words in distfit_commands(README)]
    assert "horovod install" in found
    assert "data build --from digits data/digits" in found
    assert len([words for words in found if words.startswith("train configs/caltech256.yaml")]) >= 2


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for words in commands((ROOT / page).read_text()) if words[0] == "make"}
    assert named - targets == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text())
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


NAMED_FILE = re.compile(r"`((?:tests|distfit|benchmarks|configs|docs)/[\w./-]+\.\w+)(?:::|`,\s`)?(\w+)?`")


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_that_are_named_exist(page):
    for name, function in NAMED_FILE.findall((ROOT / page).read_text()):
        assert (ROOT / name).exists(), name
        if function:
            defined = re.search(rf"^def {function}\(", (ROOT / name).read_text(), re.MULTILINE)
            assert defined, f"{name}::{function}"


@pytest.mark.parametrize("page", PAGES)
def test_settings_and_parameters_that_are_named_exist(page):
    source = "\n".join(path.read_text() for path in (ROOT / "distfit").rglob("*.py"))
    named = set(re.findall(r"DISTFIT_[A-Z_]+", (ROOT / page).read_text()))
    assert {name for name in named if f'"{name}"' not in source} == set()


def test_every_guarantee_names_a_test():
    section = README.split("## What it guarantees", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 5
    assert [row for row in rows if not re.search(r"`tests/\w+\.py::test_\w+`", row)] == []
