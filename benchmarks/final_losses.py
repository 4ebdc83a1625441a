"""The last epoch of several runs side by side; fails when their losses differ.

    python benchmarks/final_losses.py runs/demo-one runs/demo-two

The same seed, data and global batch are the same training whatever the number of ranks, so the losses
agree to the rounding of float32 sums in another order.
"""

import json
import math
import sys
from pathlib import Path

TOLERANCE = 1e-5  # relative to the loss; see docs/design.md, "Same training"


def last_epoch(run: Path) -> dict[str, float]:
    """The last value of each metric of a run."""
    history = json.loads((run / "history.json").read_text())["history"]
    return {name: values[-1] for name, values in history.items()}


def main(runs: list[Path]) -> int:
    """Print a table, a column a run; 1 when a loss differs from the first run's."""
    ends = [last_epoch(run) for run in runs]
    names = [name for name in ends[0] if all(name in end for end in ends)]
    print(f"{'last epoch':<16}" + "".join(f"{run.name:>16}" for run in runs))
    for name in names:
        print(f"{name:<16}" + "".join(f"{end[name]:>16.8f}" for end in ends))
    losses = [name for name in names if name.endswith("loss")]
    differing = [
        name for name in losses if not all(math.isclose(end[name], ends[0][name], rel_tol=TOLERANCE) for end in ends)
    ]
    if differing or not losses:
        print(f"Expected the same losses to {TOLERANCE:g}; these differ: {differing or 'none were recorded'}")
        return 1
    print(f"The same training: losses agree to {TOLERANCE:g}.")
    return 0


if __name__ == "__main__":
    sys.exit(main([Path(argument) for argument in sys.argv[1:]]))
