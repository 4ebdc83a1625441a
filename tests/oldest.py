"""The oldest versions that pyproject.toml allows, as constraints for pip: `make test-oldest` tests with them.

    python tests/oldest.py > oldest.txt
    pip install --constraint oldest.txt --editable . pytest pytest-timeout

Nothing but Python's own library, as it runs in an environment that is still empty.
"""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
_NEED = re.compile(r"(?P<name>[\w.-]+)(\[[\w,-]+\])?>=(?P<oldest>[\w.]+)")


def constraints(project: dict) -> list[str]:
    """A line for every requirement with a lower bound, those of the extras included.

    >>> constraints({"dependencies": ["numpy>=2.0,<3"], "optional-dependencies": {"cuda": ["jax[cuda]>=0.5", "six"]}})
    ['jax==0.5', 'numpy==2.0']
    """
    needs = [*project["dependencies"], *(need for extra in project["optional-dependencies"].values() for need in extra)]
    found = {match["name"]: match["oldest"] for match in map(_NEED.match, needs) if match}
    return [f"{name}=={oldest}" for name, oldest in sorted(found.items())]


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in constraints(tomllib.loads(PROJECT.read_text())["project"]))
