"""The guide to data: what it shows runs, in its order."""

import re
import subprocess
import sys

import pytest

from tests.pictures import make_caltech
from tests.ranks import ROOT, environment


@pytest.mark.slow
def test_the_guide_to_data_runs_as_it_is_written(tmp_path):
    page = (ROOT / "docs" / "guides" / "data.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 4
    make_caltech(tmp_path / "pictures", classes=3, per_class=5)
    program = "\n".join(blocks) + "\nprint('rows of faces', len(faces.load_index()))\n"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("('001.ak47', '002.american-flag', '257.clutter') (4, 4, 4)\n")
    assert done.stdout.endswith("rows of faces 40\n")
