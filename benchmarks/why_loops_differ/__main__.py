"""See the package: `python -m benchmarks.why_loops_differ --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import benchmarks.why_loops_differ as package
from benchmarks.why_loops_differ import runs

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "docs" / "_static"
SEEDS = 3


def main(argv: Sequence[str]) -> int:
    """Run what is asked for, then write or compare the page."""
    options = parsed(argv)
    causes = chosen(options.causes)
    if options.check:
        return check(options.data, causes)
    if not options.page:
        results = runs.all_runs(options.data, causes, range(options.seeds), options.epochs)
        agree(results)
        if options.partial:
            return 0
        runs.save(results)
    write(runs.load())
    return 0


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.why_loops_differ",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", choices=["digits", "folder"], help="one of the two; printed")
    parser.add_argument("--causes", help="names with commas; printed")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"how many (default {SEEDS}); printed if not {SEEDS}")
    parser.add_argument("--epochs", type=int, help="instead of each data set's own; printed")
    parser.add_argument("--page", action="store_true", help="the page and the figures from results.json; runs nothing")
    parser.add_argument(
        "--check", action="store_true", help="do short runs, the page and the figures fit results.json?"
    )
    options = parser.parse_args(argv)
    options.partial = bool(options.data or options.causes or options.epochs or options.seeds != SEEDS)
    options.data = [options.data] if options.data else ["digits", "folder"]
    return options


def chosen(names: str | None) -> list[str]:
    """The causes that are named, or all."""
    from benchmarks.why_loops_differ.causes import CAUSES

    wanted = names.split(",") if names else list(CAUSES)
    unknown = [name for name in wanted if name not in CAUSES]
    if unknown:
        sys.exit(f"Expected causes among {', '.join(CAUSES)}, received {', '.join(unknown)}.")
    return wanted


def agree(results: runs.Results) -> None:
    """The right loop has to be fit, to the bit; without that no cause would be alone."""
    for data, own in results.runs.items():
        for optimizer in ("adam", "sgd"):
            fit, loop = own[f"fit_{optimizer}"], own[f"loop_{optimizer}"]
            if fit != loop:
                sys.exit(
                    f"The right loop differs from fit on {data} under {optimizer}, in weights or in what it reports, "
                    "so that nothing can be said about a single mistake. Another version of Keras or TensorFlow?"
                )


def write(results: runs.Results) -> None:
    """The page's parts and its pictures."""
    from benchmarks.why_loops_differ import figures, page

    path = ROOT / page.PAGE
    path.write_text(page.filled(path.read_text(), results))
    print(f"wrote {page.PAGE} and {len(figures.draw(results, STATIC))} pictures")


def check(data: Sequence[str], causes: Sequence[str]) -> int:
    """1 and sentences on standard error where the page, a picture or a short run is not that of the results."""
    stored = runs.load()
    short = runs.all_runs(data, causes, stored.seeds[:1], runs.SHORT_EPOCHS)
    agree(short)
    found = [*outdated(stored), *runs.differing(stored, short)]
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


def outdated(stored: runs.Results) -> list[str]:
    """What was not written from these results, each as a sentence."""
    from benchmarks.why_loops_differ import figures, page
    from benchmarks.why_loops_differ.causes import GROUPS

    text = (ROOT / page.PAGE).read_text()
    paths = [STATIC / f"why-loops-{group}.svg" for group in GROUPS]
    found = [
        f"{path.name} was drawn from others" for path in paths if figures.drawn_from(path) != figures.digest(stored)
    ]
    return found if page.filled(text, stored) == text else [f"{page.PAGE} has other tables", *found]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
