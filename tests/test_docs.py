"""The site is built in strict mode, is complete, and its examples run."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import distfit
from distfit.config import descriptions, load
from tests import pages
from tests.pictures import make_caltech
from tests.ranks import BIN, ROOT, environment, launch

WITH_PYTHON = [page for page in pages.SITE if pages.script(page)]
LANGUAGES = {"", "python", "sh", "text", "yaml", "json", "diff", "{toctree}", "{eval-rst}"}

# Every page in a folder of its own, all in one process of two devices: TensorFlow takes seconds to start.
RUN_PAGES = """
import os, runpy, sys
import distfit

distfit.init()
for path in sys.argv[1:]:
    os.chdir(os.path.dirname(path))
    print("page", path, flush=True)
    runpy.run_path(path, run_name="__main__")
print("all pages ran")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-d", folder / "trees"]
    done = subprocess.run(
        [*command, ROOT / "docs", folder / "html"], env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


def shown(site: Path, page: str) -> str:
    """The words of a page of the site."""
    return html.unescape(re.sub(r"<[^>]+>", "", (site / page).read_text()))


def test_every_page_is_on_the_site(site):
    built = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    assert {page.removeprefix("docs/").replace(".md", ".html") for page in pages.SITE} - built == set()


def test_the_reference_has_every_public_name(site):
    ids = set(re.findall(r'id="distfit\.(\w+)"', (site / "reference" / "api.html").read_text()))
    assert set(distfit.__all__) - ids == set()


def test_the_reference_has_every_command_and_field(site):
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import generated
    finally:
        sys.path.remove(str(ROOT / "docs"))
    commands = shown(site, "reference/cli.html")
    walked = [(" ".join(words), context) for words, context in generated.walk()]
    assert {"distfit train", "distfit launch", "distfit doctor", "distfit data build"} <= {name for name, _ in walked}
    for name, context in walked:
        assert f"Usage: {name}" in commands
        assert context.get_help() in commands
    fields = shown(site, "reference/configuration.html")
    assert [name for name, meaning in descriptions() if meaning not in fields or name not in fields] == []


def test_examples_of_docstrings_are_code_on_the_site(site):
    assert "```" not in (site / "reference" / "api.html").read_text()
    assert ">>> history = fit(" in shown(site, "reference/api.html")


def test_the_page_of_environment_variables_has_all_of_ours():
    source = "\n".join(path.read_text() for path in (ROOT / "distfit").rglob("*.py"))
    ours = set(re.findall(r'"(DISTFIT_[A-Z_]+)"', source))
    assert set(re.findall(r"`(DISTFIT_[A-Z_]+)`", pages.read("docs/reference/environment.md"))) == ours


@pytest.mark.parametrize("page", pages.SITE)
def test_every_block_names_its_language_and_says_if_it_is_not_run(page):
    for block in pages.blocks(page):
        assert block.language in LANGUAGES
        assert re.fullmatch(r"|run|file: \S+|not run: .{10,}", block.mark), block.mark
        assert block.mark != "run" or block.language == "sh"


@pytest.mark.parametrize("page", pages.SITE)
def test_configurations_that_are_shown_load(page, tmp_path):
    for block in pages.blocks(page):
        if block.language == "yaml" and "data:" in block.text:
            (tmp_path / "shown.yaml").write_text(block.text)
            load(tmp_path / "shown.yaml")


@pytest.mark.slow
def test_the_examples_of_all_pages_run(tmp_path):
    scripts = [tmp_path / page.removesuffix(".md") / "page.py" for page in WITH_PYTHON]
    for page, path in zip(WITH_PYTHON, scripts, strict=True):
        path.parent.mkdir(parents=True)
        path.write_text(pages.script(page))
        make_caltech(path.parent / "pictures", classes=3, per_class=5)
    job = launch(["-c", RUN_PAGES, *map(str, scripts)], cwd=tmp_path, env={"DISTFIT_DEVICES": "2"})
    assert job.output.endswith("all pages ran\n"), job.report()
    assert len(scripts) >= 5


@pytest.mark.slow
@pytest.mark.mpi
def test_the_tutorial_runs_as_it_is_written(tmp_path):
    page = "docs/tutorial.md"
    (before_name, before), (name, text) = pages.files(page)
    assert before_name == name == "train.py"
    (tmp_path / name).write_text(text)
    commands = [block.text for block in pages.blocks(page) if block.mark == "run"]
    done = _shell("\n".join(commands), tmp_path)
    epochs = re.findall(r"^epoch 5/5 - .*? (loss: .*?) - [\d.,]+ records/s$", done, re.MULTILINE)
    assert len(epochs) == 2, done
    assert epochs[0] == epochs[1], "two devices and two ranks end with the same numbers"
    assert "-np 4" in done, "the command for two machines"
    # What the page shows of it, but for the time it took.
    for line in re.findall(r"^epoch 1/5 .* val_loss: [\d.]+", pages.read(page), re.MULTILINE):
        assert line.split(" - ", 3)[3] in done
    assert _after_the_difference(before) == text.split("distfit.fit")[0]


def _after_the_difference(before: str) -> str:
    """The first script of the tutorial with the lines that the second one adds, up to the training."""
    start = "import distfit\n\ndistfit.init()  # before the first tensor or model: it takes the devices\n"
    return before.split("model.fit")[0].replace("keras.utils.set", start + "keras.utils.set", 1)


def _shell(commands: str, folder: Path) -> str:
    """What the commands print; the first that fails ends them and the test."""
    job = launch(["-c", _BASH, commands], cwd=folder, env={"PATH": f"{_with_distfit(folder)}:{BIN}:/usr/bin:/bin"})
    assert job.code == 0, job.report()
    return job.output


_BASH = "import subprocess, sys; sys.exit(subprocess.run(['bash', '-euc', sys.argv[1]]).returncode)"


def _with_distfit(folder: Path) -> Path:
    """A folder with the command `distfit`, which an environment in which it is not installed lacks."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "distfit").write_text(f'#!/bin/sh\nexec {sys.executable} -m distfit "$@"\n')
    (programs / "distfit").chmod(0o755)
    return programs
