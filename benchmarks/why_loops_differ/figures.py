"""The curves of the page: one picture for each group of causes, drawn from results.json.

draw(load(), folder)        # writes docs/_static/why-loops-*.svg
drawn_from(path)            # the digest of the results that a picture was drawn from
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.why_loops_differ.runs import Results

TITLES = {
    "true_loss": "cross-entropy",
    "true_accuracy": "accuracy",
    "loss": "reported loss",
    "accuracy": "reported accuracy",
}
STYLE: Any = {
    # Text stays text: small files that can be searched. No dates, no random names: the same results, the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "why loops differ",
    "font.family": "sans-serif",
    "font.size": 9,
    "path.simplify": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes every group's picture and returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from benchmarks.why_loops_differ.causes import GROUPS

    with matplotlib.rc_context(STYLE):
        return [_group(results, group, folder / f"why-loops-{group}.svg") for group in GROUPS]


def _group(results: Results, group: str, path: Path) -> Path:
    """One picture: a column for each data set, a row for each of two numbers."""
    from matplotlib import pyplot as plt

    from benchmarks.why_loops_differ.causes import GROUPS

    shown, data = GROUPS[group].shown, list(results.runs)
    figure, axes = plt.subplots(
        len(shown), len(data), figsize=(9, 6), sharex="col", squeeze=False, layout="constrained"
    )
    for row, name in enumerate(shown):
        for column, own in enumerate(data):
            _panel(axes[row][column], results, own, group, name)
    for axis, own in zip(axes[0], data, strict=True):
        axis.set_title(own)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    lines = {line.get_label(): line for axis in axes[:, 0] for line in axis.get_legend_handles_labels()[0]}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    text = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Description": f"results {digest(results)}"}
    figure.savefig(text, format="svg", metadata=metadata)
    path.write_text(smaller(text.getvalue()))
    plt.close(figure)
    return path


def smaller(svg: str) -> str:
    """Half of a file is decimals of points, and a list of fonts with every word.

    >>> smaller("<text style=\\"font: 9px 'DejaVu Sans', 'Geneva', sans-serif\\" x='1.234567'/>")
    '<text style="font: 9px sans-serif" x=\\'1.23\\'/>'
    """
    return re.sub(r"'DejaVu Sans', [^\"]*sans-serif", "sans-serif", re.sub(r"(\d\.\d\d)\d+", r"\1", svg))


def _panel(axis: Any, results: Results, data: str, group: str, name: str) -> None:
    """One number on one data set: the band of fit's seeds, the right loop on it, and each cause's mean."""
    from matplotlib import ticker

    from benchmarks.why_loops_differ.causes import CAUSES, GROUPS

    runs, optimizer = results.runs[data], GROUPS[group].optimizer
    own = [cause for cause in CAUSES.values() if cause.group == group and cause.name in runs]
    fit = runs[f"fit_{optimizer}"].curve(name)
    epochs = np.arange(1, fit.shape[1] + 1)
    axis.fill_between(epochs, fit.min(0), fit.max(0), color="0.85", linewidth=0, label="fit, all seeds")
    axis.plot(epochs, fit.mean(0), color="0.45", linewidth=4, label="fit, mean")
    axis.plot(epochs, runs[f"loop_{optimizer}"].curve(name).mean(0), "k--", linewidth=1.2, label="the right loop")
    for other in sorted({cause.optimizer for cause in own} - {optimizer}):
        mean = runs[f"fit_{other}"].curve(name).mean(0)
        axis.plot(epochs, mean, color="0.45", linestyle=":", linewidth=2, label=f"fit under {other.title()}, mean")
    for number, cause in enumerate(own):
        mean = runs[cause.name].curve(name).mean(0)
        axis.plot(epochs, mean, color=f"C{number}", linewidth=1.3, label=cause.label)
        for also in GROUPS[group].also:
            reported = runs[cause.name].curve(also).mean(0)
            if name == f"true_{also}" and not np.allclose(reported, mean, atol=1e-4):
                label = f"{cause.label}, as reported"
                axis.plot(epochs, reported, color=f"C{number}", linestyle=":", linewidth=2, label=label)
    axis.set_ylabel(TITLES[name])
    axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    if "loss" in name:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.minorticks_off()


def digest(results: Results) -> str:
    """Which results: the same for the same numbers."""
    return hashlib.sha256(json.dumps(asdict(results), sort_keys=True).encode()).hexdigest()[:16]


def drawn_from(path: Path) -> str | None:
    """The digest of the results that a picture was drawn from."""
    found = re.search(r"results ([0-9a-f]{16})", path.read_text())
    return found[1] if found else None
