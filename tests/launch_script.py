"""A rank that shows what it was given and then waits to be ended: `python tests/launch_script.py FOLDER`.

Writes FOLDER/rank-N.json with its environment and its process id, whole or not at all.
"""

import json
import os
import sys
import time
from pathlib import Path

from distfit.topology import from_environment

place = from_environment(os.environ)
file = Path(sys.argv[1]) / f"rank-{place.rank}.json"
temporary = file.with_suffix(".writing")
temporary.write_text(json.dumps({"pid": os.getpid(), "size": place.size, "environment": dict(os.environ)}))
temporary.rename(file)
time.sleep(300)
