"""The examples in docstrings are true: each is run."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys

import pytest

from tests.ranks import ROOT, environment
from tests.test_layers import PURE, layer_of, rooms


def source(module):
    """The file of a module; of a package, its `__init__`."""
    path = ROOT / "distfit" / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


HAVE_EXAMPLES = [module for module in rooms() if ">>> " in source(module).read_text()]
LIGHT = [module for module in HAVE_EXAMPLES if layer_of(module) in PURE]
HEAVY = [module for module in HAVE_EXAMPLES if layer_of(module) not in PURE]

# TensorFlow is started, and devices are taken, in a process of its own.
PROGRAM = """
import doctest, importlib, sys
results = [doctest.testmod(importlib.import_module(f"distfit.{name}")) for name in sys.argv[1:]]
print([(failed, attempted > 0) for failed, attempted in results])
"""


@pytest.mark.parametrize("module", LIGHT)
def test_examples_of_pure_modules(module):
    failed, attempted = doctest.testmod(importlib.import_module(f"distfit.{module}"))
    assert attempted
    assert not failed


def test_examples_of_modules_with_tensorflow():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *HEAVY],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout.splitlines()[-1:] == [str([(0, True)] * len(HEAVY))], done.stdout + done.stderr
    assert HEAVY
