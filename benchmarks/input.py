"""How fast images come in, against libjpeg-turbo, OpenCV and tf.data: what stands in docs/input-speed.md.

    python -m benchmarks.input              measures (about five minutes), writes input.json and the page
    python -m benchmarks.input --page       the page from input.json; measures nothing
    python -m benchmarks.input --check      does the page say what input.json says?

`distfit bench input` measures the same and prints it. Run it where nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from distfit.bench.report import markdown_rates, markdown_ratios, summary
from distfit.bench.rounds import Results, measured
from distfit.bench.samples import KINDS
from distfit.bench.targets import ratios
from distfit.monitor.counting import shown

RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "input-speed.md"
SECONDS, ROUNDS, CORES = 0.7, 5, (1, 2)
_PART = re.compile(r"(?<=^<!-- results: )(\w+) -->\n.*?(?=^<!-- end -->$)", re.MULTILINE | re.DOTALL)


def main(argv: Sequence[str]) -> int:
    """Measure, or take what was measured; write the page, or compare it."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.input", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", action="store_true", help="the page from input.json; measures nothing")
    parser.add_argument("--check", action="store_true", help="exit code 1 where the page is another")
    options = parser.parse_args(argv)
    if not options.page and not options.check:
        RESULTS.write_text(measured(list(KINDS.values()), CORES, SECONDS, ROUNDS, shown).to_json())
    page = PAGE.read_text()
    written = filled(page, load())
    if options.check:
        return int(written != page)
    PAGE.write_text(written)
    return 0


def load() -> Results:
    """What was measured last."""
    return Results(**json.loads(RESULTS.read_text()))


def filled(page: str, results: Results) -> str:
    """The page with its tables as the results have them."""
    parts = {
        "machine": ", ".join(f"{name} {value}" for name, value in results.machine.items()) + ".",
        "summary": "\n".join(f"- {line}" for line in summary(list(ratios(results.rates))).splitlines()),
        "ratios": markdown_ratios(results.rates),
        "rates": markdown_rates(results.rates),
    }
    return _PART.sub(lambda found: f"{found[1]} -->\n\n{parts[found[1]]}\n\n", page)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
