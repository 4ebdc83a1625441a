"""A process that measures on its cores, asked line by line.

    python -m distfit.bench.child '{"kind": "25 KB", "files": [...], "cores": [0, 1], "seconds": 1.0}'

Each line on standard input names a way; the answer is a line of JSON: how many images it decoded, in how many
seconds. The first time a way is asked for, it is prepared and tried with a few images, from which follows how many
take about so many seconds. The end of standard input ends it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main(request: dict[str, Any]) -> None:
    """Answer until nobody asks any more."""
    # Before TensorFlow and OpenCV are loaded, which count the cores once.
    os.sched_setaffinity(0, request["cores"])
    # Libraries print where they like; the answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from distfit.bench.samples import KINDS, loaded
    from distfit.bench.ways import WAYS

    kind = KINDS[request["kind"]]
    sample = loaded(kind, request["files"])
    prepared: dict[str, tuple[int, Any]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in prepared:
            way = WAYS[name](sample, len(request["cores"]))
            prepared[name] = _sized(way, kind.batch, kind.records, request["seconds"])
        records, run = prepared[name]
        print(json.dumps({"images": records, "seconds": _timed(run)}), file=answers)


def _sized(way: Any, batch: int, most: int, seconds: float) -> tuple[int, Any]:
    """A pass of about so many seconds: whole batches, two at least, all records at most."""
    few = way(2 * batch)
    few()  # the first pass traces graphs and touches the files
    rate = 2 * batch / _timed(few)
    batches = max(2, min(round(rate * seconds / batch), most // batch))
    run = way(batches * batch)
    run()
    return batches * batch, run


def _timed(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
