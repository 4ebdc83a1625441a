"""A rank that shows what it was given and then waits to be ended: `python tests/launch_script.py FOLDER [saves]`.

Writes FOLDER/rank-N.json with its environment and its process id, whole or not at all. With `saves`, SIGUSR1 lets it
take three seconds to write FOLDER/saved-N and leave with 75; ranks leave together.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from distfit.topology import from_environment

place = from_environment(os.environ)
folder = Path(sys.argv[1])


def save(number, frame):
    time.sleep(3)
    (folder / f"saved-{place.rank}").touch()
    while len(list(folder.glob("saved-*"))) < place.size:
        time.sleep(0.01)
    os._exit(75)


if "saves" in sys.argv:
    signal.signal(signal.SIGUSR1, save)
file = folder / f"rank-{place.rank}.json"
temporary = file.with_suffix(".writing")
temporary.write_text(json.dumps({"pid": os.getpid(), "size": place.size, "environment": dict(os.environ)}))
temporary.rename(file)
time.sleep(300)
