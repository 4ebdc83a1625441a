"""The parts of docs/why-loops-differ.md that come from results.json: the tables, and where the figures were made.

    written = filled(page, load())      # the page's text with its parts as they should be

Between `<!-- results: NAME -->` and `<!-- end -->` stands what this module writes; NAME is a group of causes,
"where" or "answer". All else is prose.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.why_loops_differ.causes import CAUSES, GROUPS, Cause
from benchmarks.why_loops_differ.figures import TITLES
from benchmarks.why_loops_differ.runs import Results, Run

FAR = 2
PAGE = "docs/why-loops-differ.md"
_PART = re.compile(r"(?<=^<!-- results: )(\w+) -->\n.*?(?=^<!-- end -->$)", re.MULTILINE | re.DOTALL)


def filled(page: str, results: Results) -> str:
    """The page with its parts as the results have them."""
    return _PART.sub(lambda found: f"{found[1]} -->\n\n{part(found[1], results)}\n\n", page)


def prose(page: str) -> str:
    """The page without its written parts."""
    return _PART.sub("", page)


def part(name: str, results: Results) -> str:
    """What stands between two marks."""
    parts = {"where": where, "answer": answer}
    return parts[name](results) if name in parts else f"{picture(name)}\n\n{table(name, results)}"


def answer(results: Results) -> str:
    """The causes by what they did, a line for each."""
    found: dict[str, list[str]] = {}
    for cause in CAUSES.values():
        found.setdefault(verdict(cause, results), []).append(f"`{cause.name}`")
    order = sorted(found, key=lambda text: [text.startswith(start) for start in _VERDICTS], reverse=True)
    return "\n".join(f"- {text}: {', '.join(found[text])}." for text in order)


_VERDICTS = (
    "Trained worse on both",
    "Trained worse",
    "Trained better",
    "Nothing measurable",
    "Reported what is not so",
)


def verdict(cause: Cause, results: Results) -> str:
    """What a cause did, and on which data sets; a report that is wrong says nothing of the training."""
    pairs = {data: (runs[f"fit_{cause.optimizer}"], runs[cause.name]) for data, runs in results.runs.items()}
    if any(misreported(run) for _, run in pairs.values()):
        return "Reported what is not so"
    for effect in ("worse", "better"):
        where = [data for data, pair in pairs.items() if effect_of(*pair) == effect]
        if where:
            return f"Trained {effect} on {'both' if len(where) == 2 else f'the {where[0]}'}"
    return "Nothing measurable"


def misreported(run: Run) -> bool:
    """Whether the accuracy that a training reports is not that of its weights; both are kept with five digits.

    >>> misreported(Run(["a"], {"accuracy": [[0.98]], "true_accuracy": [[0.97]]}))
    True
    """
    return bool((abs(run.final("accuracy") - run.final("true_accuracy")) > 2e-5).any())


def effect_of(fit: Run, run: Run) -> str:
    """ "worse" if the cross-entropy or the accuracy is, measurably; else "better" if either is; else "".

    >>> fit = Run(["a"], {"true_loss": [[1.0]], "true_accuracy": [[0.5]]})
    >>> effect_of(fit, Run(["b"], {"true_loss": [[2.0]], "true_accuracy": [[0.6]]}))
    'worse'
    """
    moves = {
        sign * np.sign(run.final(name).mean() - fit.final(name).mean())
        for name, sign in (("true_loss", 1), ("true_accuracy", -1))
        if measurable(fit, run, name)
    }
    return "worse" if 1 in moves else "better" if -1 in moves else ""


def where(results: Results) -> str:
    """The machine, the versions, and how much was trained."""
    sizes = "; ".join(
        f"{data}: {train:,} records to train on, {valid} to validate with, {classes} classes, {epochs} epochs"
        for data, (train, valid, classes, epochs) in results.sizes.items()
    )
    seeds = ", ".join(map(str, results.seeds))
    return f"Figures of {results.machine}. {sizes[0].upper()}{sizes[1:]}. Seeds {seeds}. {results.minutes} minutes."


def picture(group: str) -> str:
    return f"![{GROUPS[group].title}: curves of every cause beside fit](_static/why-loops-{group}.svg)"


def table(group: str, results: Results) -> str:
    """A group's causes, each beside fit with the same optimizer."""
    shown = (*GROUPS[group].shown, *GROUPS[group].also)
    causes = [cause for cause in CAUSES.values() if cause.group == group]
    head = ["", "weights", *(f"{data}: {TITLES[name]}" for data in results.runs for name in shown)]
    lines = [head, ["---"] * len(head)]
    for optimizer in dict.fromkeys(cause.optimizer for cause in causes):
        fit, under = f"fit_{optimizer}", {"adam": "Adam", "sgd": "SGD"}[optimizer]
        lines.append([f"`fit`, {under}", "", *_fit(results, fit, shown)])
        lines.append([f"the right loop, {under}", *_row(results, fit, f"loop_{optimizer}", shown)])
        own = [cause.name for cause in causes if cause.optimizer == optimizer]
        lines += [[f"`{name}`", *_row(results, fit, name, shown)] for name in own]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fit(results: Results, fit: str, shown: Iterable[str]) -> list[str]:
    """What everything else is compared with: the mean, and how far the seeds are apart."""
    finals = [runs[fit].final(name) for runs in results.runs.values() for name in shown]
    return [f"{final.mean():.3g} ({final.min():.3g} to {final.max():.3g})" for final in finals]


def _row(results: Results, fit: str, which: str, shown: Sequence[str]) -> list[str]:
    """Whether the weights are fit's, and each number beside fit's."""
    pairs = [(runs[fit], runs[which]) for runs in results.runs.values()]
    same = ["same bits" if expected.weights == received.weights else "other" for expected, received in pairs]
    return [", ".join(dict.fromkeys(same)), *(cell(*pair, name) for pair in pairs for name in shown)]


def cell(fit: Run, run: Run, name: str) -> str:
    """A number's mean over the seeds and how far it is from fit's; bold where that is measurable.

    >>> fit, run = (Run([weights], {"loss": [[loss]]}) for weights, loss in (("a", 1.0), ("b", 3.0)))
    >>> cell(fit, run, "loss"), cell(fit, fit, "loss")
    ('**3** (+2)', '1')
    """
    expected, received = fit.final(name), run.final(name)
    change = received.mean() - expected.mean()
    if not np.isfinite(change):
        return "**not a number**"
    text = f"{received.mean():.3g}"
    if (expected == received).all():
        return text
    return f"**{text}** ({change:+.2g})" if measurable(fit, run, name) else f"{text} ({change:+.2g})"


def measurable(fit: Run, run: Run, name: str) -> bool:
    """Whether a number moved by more than another seed would move it.

    With every seed in the same direction, and on the mean by more than FAR times what fit's seeds are apart. Of three
    seeds each, equal trainings (normal numbers) pass in 3 of 100 comparisons, with FAR = 1 in 10. Where the weights
    are fit's, to the bit, only the report can differ, and every difference counts.
    """
    moved = run.final(name) - fit.final(name)
    if fit.weights == run.weights:
        return bool((moved != 0).any())
    together = (moved > 0).all() or (moved < 0).all()
    return bool(together and abs(moved.mean()) > FAR * np.ptp(fit.final(name)))
