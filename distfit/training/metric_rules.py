"""How the states of a metric on N replicas become the one that one process would have.

    metric = distfit.reduced(Largest(), by="max")     # a user says it
    rule_of(metric)                                   # said, or found when a step was traced; else sums

Keras' own metrics keep sums and counts, and so do most of their kind. For any other class the rule is found by trying
it out (training/metric_experiment.py); a metric of which no rule holds is given the rows of the whole batch on every
replica (training/metric_updates.py), which is right for all of them. Nothing is ever averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
import numpy as np

from distfit.errors import InputError, nearest

# Of one variable: a name, or a function of what all replicas hold, [replicas, ...].
Reduce: TypeAlias = str | Callable[[np.ndarray], Any]
# Of one replica: what it holds, by the variables' names.
State: TypeAlias = dict[str, np.ndarray]
By: TypeAlias = str | Mapping[str, Reduce] | Callable[[list[State]], Mapping[str, Any]]

SUM, MAX, MIN = "sum", "max", "min"
NAMES = (SUM, MAX, MIN)
# Of a whole metric: what an update adds is a mean over rows.
ROWS = "rows"
# All replicas hold the same: the first one's is taken.
SAME = "same"
# What a metric object remembers; written past Keras, which would track it.
_DECLARED, _RULE, _INITIAL = "_distfit_declared", "_distfit_rule", "_distfit_initial"


@dataclass(frozen=True)
class Rule:
    """How a metric is updated on each replica, and how its states are put together.

    Args:
        of_each: for each of the metric's variables: "sum" (what was there after a reset, and what each replica has
            added to it), "max", "min", "same" (on every replica), or a user's function.
        of_all: a user's function of all replicas' states, in place of `of_each`.
        by_rows: what an update adds is a mean over the replica's rows, and counts by their share of all rows.
    """

    of_each: tuple[Reduce, ...]
    of_all: Callable[[list[State]], Mapping[str, Any]] | None = None
    by_rows: bool = False

    def __str__(self) -> str:
        """For messages, and for comparing what ranks found.

        >>> str(Rule(("max", "sum"))), str(Rule(("sum", "sum"), by_rows=True))
        ('max sum', 'sum sum by rows')
        """
        names = ["function"] if self.of_all else [one if isinstance(one, str) else "function" for one in self.of_each]
        return " ".join(names) + (" by rows" if self.by_rows else "")


def reduced(metric: Any, by: By) -> Any:
    """Say how a metric's states on several replicas become the one that one process would have.

    Keras' own metrics need no such word, and for other classes distfit finds the rule by trying it out. Say it where a
    metric keeps what cannot be tried out (it is given something else than rows), or to save the gathering of rows for a
    metric whose states can be put together by a formula.

    Args:
        metric: a keras.metrics.Metric.
        by: "sum", "max" or "min" for all of its variables; "rows" where every update adds a mean over all of its rows
            (not over those that a mask leaves), which then counts by the replica's share of the rows; or a dict from
            each variable's name to "sum", "max", "min" or a
            function of a float64 array [replicas, ...] of what each replica holds; or a function of a list of the
            replicas' states (a dict of float64 arrays by variable name each) that returns the one state, such as
            that of a parallel variance (Chan, Golub and LeVeque 1979). A replica that has seen no rows holds what
            `reset_state` leaves. Where a metric keeps others whose variables share a name, the name is preceded by
            the other's: "mean/total".

    Returns:
        The metric, so that it can be said inside `compile(metrics=[...])`.

    Raises:
        InputError: it is no metric, or there is no such rule. That variables have other names is refused when the
            first step is traced.

    >>> metric = reduced(keras.metrics.Sum(name="largest"), by="max")
    >>> metric.name
    'largest'
    """
    if not isinstance(metric, keras.metrics.Metric):
        raise InputError(
            f"Expected distfit.reduced to be given a keras.metrics.Metric, received {type(metric).__name__}. Wrap a "
            "function first: keras.metrics.MeanMetricWrapper(function)."
        )
    for one in by.values() if isinstance(by, Mapping) else [] if by == ROWS else [by]:
        if isinstance(one, str) and one not in NAMES:
            raise InputError(
                f"Expected the states of metric {metric.name!r} to be reduced by one of {', '.join(NAMES)} or by a "
                f"function, received {one!r}; {nearest(one, list(NAMES))}"
            )
        if not isinstance(one, str) and not callable(one):
            raise InputError(
                f"Expected the states of metric {metric.name!r} to be reduced by one of {', '.join(NAMES)}, a "
                f"function, or a dict of these by variable name, received {type(one).__name__}."
            )
    vars(metric)[_DECLARED] = dict(by) if isinstance(by, Mapping) else by
    return metric


def is_declared(metric: Any) -> bool:
    """Whether `reduced` was called for it."""
    return _DECLARED in vars(metric)


def declared(metric: Any) -> Rule:
    """What was said by `reduced`.

    Raises:
        InputError: the metric has other variables.
    """
    by, names = vars(metric)[_DECLARED], names_of(metric)
    if by == ROWS:
        whole = [name for name, one in zip(names, metric.variables, strict=True) if "float" not in str(one.dtype)]
        if whole:
            raise InputError(
                f"Expected the variables of metric {metric.name!r} to be floating-point numbers, as "
                f'distfit.reduced(..., by="rows") takes shares of what is added, received whole numbers in '
                f"{', '.join(whole)}. Make them floats."
            )
        return Rule((SUM,) * len(names), by_rows=True)
    if isinstance(by, str):
        return Rule((by,) * len(names))
    if not isinstance(by, Mapping):
        return Rule((), of_all=by)
    if set(by) != set(names):
        raise InputError(
            f"Expected distfit.reduced to say for each variable of metric {metric.name!r} ({type(metric).__name__}) "
            f"how it is reduced, {', '.join(names)}, received {', '.join(by) or 'none'}. Name these and no others."
        )
    return Rule(tuple(by[name] for name in names))


def rule_of(metric: Any) -> Rule:
    """How its states are put together: as was said or found; of Keras' own, and of one that saw nothing, by sums."""
    if is_declared(metric):
        return declared(metric)
    return found(metric) or Rule((SUM,) * len(metric.variables))


def found(metric: Any) -> Rule | None:
    """What was found when a step was traced."""
    return vars(metric).get(_RULE)


def note_found(metric: Any, rule: Rule) -> None:
    """Remember it until the next run."""
    vars(metric)[_RULE] = rule


def begin(metric: Any) -> None:
    """Before the first step of a run: forget what was found for other data, and note what a reset leaves.

    What a reset does not touch begins with what it holds now, the same on all replicas.
    """
    vars(metric).pop(_RULE, None)
    if not is_keras_own(metric):
        vars(metric)[_INITIAL] = [np.asarray(value, np.float64) for value in after_reset(metric)]


def initial_of(metric: Any) -> list[np.ndarray]:
    """What each variable holds before the first update; zeros in metrics of Keras."""
    zeros = [np.zeros(tuple(variable.shape)) for variable in metric.variables]
    return vars(metric).get(_INITIAL) or zeros


def after_reset(metric: Any) -> list[Any]:
    """The values of its variables after `reset_state`, which is tried without effect."""
    with keras.StatelessScope() as scope:
        metric.reset_state()
    values = [scope.get_current_value(variable) for variable in metric.variables]
    return [
        variable.numpy() if value is None else keras.ops.convert_to_numpy(value)
        for variable, value in zip(metric.variables, values, strict=True)
    ]


def names_of(metric: Any) -> list[str]:
    """A name for each of its variables, unique within the metric.

    >>> names_of(keras.metrics.Mean())
    ['total', 'count']
    """
    variables = metric.variables
    short, paths = [variable.name for variable in variables], [variable.path for variable in variables]
    longer = [f"{path}.{place}" if paths.count(path) > 1 else path for place, path in enumerate(paths)]
    return [path if short.count(name) > 1 else name for name, path in zip(short, longer, strict=True)]


def metrics_of(model: Any) -> list[Any]:
    """The metrics of a model that are updated each by itself, once each: those of `compile` one by one."""
    compiled = model._compile_metrics
    found: dict[int, Any] = {}
    for metric in model.metrics:
        for one in compiled.metrics if metric is compiled and compiled is not None else [metric]:
            found[id(one)] = one
    return list(found.values())


def is_keras_own(metric: Any) -> bool:
    """Whether its class is one of Keras', and not a function or a subclass of a user's."""
    kind = type(metric)
    return kind.__module__.startswith("keras.") and kind is not keras.metrics.MeanMetricWrapper


def notes(model: Any) -> list[str]:
    """For the start of a run: which metrics are not Keras' own, and what becomes of them."""
    others = [metric for metric in metrics_of(model) if not is_keras_own(metric) and not is_declared(metric)]
    if not others:
        return []
    names = ", ".join(sorted({metric.name for metric in others}))
    return [
        f"Metrics that are not Keras' own ({names}): before the first step it is tried out how the states of replicas "
        "become that of one process; where no rule holds, each step gathers the metric's rows (distfit.reduced says "
        "the rule)."
    ]


def states_by_name(metric: Any, stacked: Sequence[np.ndarray]) -> Iterator[State]:
    """Each replica's state, from what all replicas hold in each variable, [replicas, ...]."""
    names = names_of(metric)
    for replica in range(len(stacked[0]) if stacked else 0):
        yield {name: values[replica] for name, values in zip(names, stacked, strict=True)}
