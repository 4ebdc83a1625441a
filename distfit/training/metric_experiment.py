"""How the states of a metric's parts become that of the whole: found by trying it out, before the first step.

    rule = found_rule(metric, update, args, kwargs, rows=[True, True])      # None: none of them holds

The metric is updated with random rows of the kind that a step gives it: by one replica with all of them, and by two
replicas with some of them each, for several steps, sizes and kinds of rows, without effect on its variables. A rule
holds if it makes of the two replicas' states the state of the one, every time; a variable that never moved proves
nothing. What holds for two holds for any number, as two of them are one.

A mean over rows is not looked for: random rows cannot show by what a metric divides where users mask a value of their
own (a label of -1, 255 or -100), and means over valid rows would be averaged wrongly. `distfit.reduced(metric,
by="rows")` says it.

The same rows and sizes everywhere, so that all ranks find the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend import get_keras_mask, set_keras_mask

from distfit.training.metric_rules import MAX, MIN, SUM, Rule, after_reset

# Rows of two replicas in each of two steps: uneven ones, a replica without, and as many as batches have.
_SIZES = (((3, 2), (1, 4)), ((1, 1), (2, 1)), ((2, 5), (3, 0)), ((0, 2), (3, 0)), ((300, 111), (3, 2)))
# Numbers that a trial may draw for a tensor: of larger rows fewer are drawn, of the largest as few as there are.
_MOST_NUMBERS = 2**20
_FEWEST = _SIZES[1]
# How the first tensor of rows is drawn, and the others: targets, and what a model answers for them.
_KINDS = (
    ("classes", "uniform"),
    ("classes", "normal"),
    ("one_hot", "simplex"),
    ("uniform", "uniform"),
    ("normal", "normal"),
)
# What users mask: labels that stand for none, missing values. Targets that have them among others show whether a mean
# leaves them out, as sums of such means are no sums of the whole.
_MASKED = (-1, 255, -100, -999, math.nan)
_SHARE_OF_MASKED = 0.4
# In so many trials a rule has to be right; in others the metric refuses such rows, or is not finite.
_ENOUGH = 4
# Times the rounding of the state's type: what sums in another order may differ by.
_ROUNDINGS = 64

State = list[np.ndarray]


@dataclass(frozen=True)
class _Variant:
    """Of a trial: rows have weights; some of the first tensor's numbers are this one."""

    weighted: bool
    masked: float | None = None


@dataclass(frozen=True)
class Given:
    """What a step gives to a metric: args and kwargs in one structure, of which some leaves have a row each.

    Args:
        structure: (args, kwargs).
        rows: for each of its leaves, whether it has rows.
        weights: the place of the leaf that weighs rows, or may do so (None in this step); None where there is none.
    """

    structure: Any
    rows: Sequence[bool]
    weights: int | None = None

    def drawn(self, kinds: tuple[str, str], generator: np.random.Generator, count: int, variant: _Variant) -> list[Any]:
        """All leaves, with so many random rows in place of those of the step."""
        leaves = tf.nest.flatten(self.structure)
        numbers = [leaf for place, leaf in enumerate(leaves) if self.rows[place] and place != self.weights]
        classes = max(2, *(_last_axis(leaf) for leaf in numbers if leaf.dtype.is_floating), 2)
        kind_of = {id(leaf): kinds[min(number, 1)] for number, leaf in enumerate(numbers)}
        drawn: list[Any] = [
            _weights_like(leaf, generator, count, variant.weighted)
            if place == self.weights
            else _Rows.like(leaf, kind_of[id(leaf)], generator, count, classes)
            if self.rows[place]
            else leaf
            for place, leaf in enumerate(leaves)
        ]
        first = next((place for place, leaf in enumerate(leaves) if numbers and leaf is numbers[0]), None)
        if first is not None and variant.masked is not None:
            drawn[first] = drawn[first].among(variant.masked, generator)
        return drawn

    def sizes(self) -> Sequence[Any]:
        """Those of `_SIZES` that rows of this kind are not too large for."""
        leaves = [leaf for leaf, of_rows in zip(tf.nest.flatten(self.structure), self.rows, strict=True) if of_rows]
        row = max((math.prod(_shape(leaf, 1)) for leaf in leaves), default=1)
        return [
            sizes
            for sizes in _SIZES
            if sizes is _FEWEST or max(one + other for one, other in sizes) * row <= _MOST_NUMBERS
        ]

    def packed(self, leaves: Sequence[Any], chosen: slice) -> Any:
        """(args, kwargs) with some of the rows that were drawn."""
        own = [leaf.part(chosen) if isinstance(leaf, _Rows) else leaf for leaf in leaves]
        return tf.nest.pack_sequence_as(self.structure, own)


def found_rule(metric: Any, update: Callable[..., Any], given: Given) -> Rule | None:
    """The rule that makes of replicas' states that of one process; None if no rule does.

    Args:
        metric: whose `update_state` is `update`, with all its variables made.
        given: what a step gives it.
    """
    with tf.init_scope():
        trial = _Trial(metric, update, given)
        return _rule(trial)


class _Trial:
    """The metric in the hands of one replica and of two, eagerly and without effect."""

    def __init__(self, metric: Any, update: Callable[..., Any], given: Given) -> None:
        self._variables = list(metric.variables)
        self._update = update
        self._given = given
        self.initial: State = [np.asarray(value) for value in after_reset(metric)]

    def runs(self) -> Iterator[tuple[State, State, State]]:
        """For each trial that says something: what one process, and each of two replicas, end with."""
        weights = (False,) if self._given.weights is None else (False, True)
        sizes, variants = self._given.sizes(), [_Variant(weighted) for weighted in weights]
        trials = [*itertools.product(_KINDS, sizes, variants)]
        trials += itertools.product(_KINDS, sizes[:1], [_Variant(False, masked) for masked in _MASKED])
        for seed, trial in enumerate(trials):
            states = self._run(*trial, np.random.default_rng(seed))
            if states is not None and all(np.isfinite(value).all() for value in states[0]):
                yield states

    def _run(
        self, kinds: tuple[str, str], sizes: Any, variant: _Variant, generator: np.random.Generator
    ) -> tuple[State, State, State] | None:
        whole, first, second = ([tf.constant(value) for value in self.initial] for _ in range(3))
        try:
            for one, other in sizes:
                rows, count = self._given.drawn(kinds, generator, one + other, variant), one + other
                whole = self._updated(whole, rows, slice(0, count))
                first = self._updated(first, rows, slice(0, one))
                second = self._updated(second, rows, slice(one, count))
            return _numbers(whole), _numbers(first), _numbers(second)
        except Exception:
            # Whatever a user's metric raises for random rows: this trial says nothing about a rule.
            return None

    def _updated(self, state: list[Any], rows: Sequence[Any], chosen: slice) -> list[Any]:
        if chosen.start == chosen.stop:
            return state
        args, kwargs = self._given.packed(rows, chosen)
        with keras.StatelessScope(state_mapping=list(zip(self._variables, state, strict=True))) as scope:
            self._update(*args, **kwargs)
        return [scope.get_current_value(variable) for variable in self._variables]


def _rule(trial: _Trial) -> Rule | None:
    """For each variable the first reduction that is right in all trials, if each has one."""
    candidates = [[SUM, MAX, MIN] for _ in trial.initial]
    moved, trials = [False] * len(candidates), 0
    for whole, first, second in trial.runs():
        trials += 1
        for place, initial in enumerate(trial.initial):
            parts = first[place], second[place]
            moved[place] |= not np.array_equal(whole[place], initial)
            candidates[place] = [by for by in candidates[place] if _right(by, initial, parts, whole[place])]
        if not all(candidates):
            return None
    if trials < _ENOUGH or not all(moved):
        return None
    return Rule(tuple(left[0] for left in candidates))


@dataclass(frozen=True)
class _Rows:
    """Random rows in place of a tensor of a step, and of the mask that it brings along."""

    values: np.ndarray
    mask: np.ndarray | None = None

    @classmethod
    def like(cls, leaf: Any, kind: str, generator: np.random.Generator, count: int, classes: int) -> _Rows:
        """Of a tensor's type and shape; an axis of unknown length has four."""
        shape = _shape(leaf, count)
        if leaf.dtype.is_floating:
            values = _floats(kind, generator, shape, classes)
        else:
            values = generator.integers(0, 2 if leaf.dtype.is_bool else classes, shape)
        mask = get_keras_mask(leaf)
        return cls(
            values.astype(leaf.dtype.as_numpy_dtype),
            None if mask is None else generator.integers(0, 2, _shape(mask, count)).astype(bool),
        )

    def among(self, masked: float, generator: np.random.Generator) -> _Rows:
        """With that number in some places, if the type has it."""
        if not np.issubdtype(self.values.dtype, np.floating):
            if self.values.dtype == bool or math.isnan(masked):
                return self
            limits = np.iinfo(self.values.dtype)
            if not limits.min <= masked <= limits.max:
                return self
        values = np.where(generator.random(self.values.shape) < _SHARE_OF_MASKED, masked, self.values)
        return _Rows(values.astype(self.values.dtype), self.mask)

    def part(self, chosen: slice) -> Any:
        own = tf.constant(self.values[chosen])
        if self.mask is not None:
            set_keras_mask(own, tf.constant(self.mask[chosen]))
        return own


def _shape(leaf: Any, count: int) -> tuple[int, ...]:
    return (count, *(4 if size is None else size for size in leaf.shape[1:]))


def _last_axis(leaf: Any) -> int:
    return (leaf.shape[-1] or 4) if len(leaf.shape) > 1 else 1


def _weights_like(leaf: Any, generator: np.random.Generator, count: int, weighted: bool) -> _Rows | None:
    """Of which some are zero."""
    shape = (count,) if leaf is None else _shape(leaf, count)
    values = np.maximum(generator.uniform(-0.5, 2.0, shape), 0.0).astype(keras.config.floatx())
    return _Rows(values) if weighted else None


def _right(by: str, initial: np.ndarray, parts: tuple[np.ndarray, np.ndarray], whole: np.ndarray) -> bool:
    """Whether a rule makes the whole of the parts."""
    if by != SUM:
        reduce = np.maximum if by == MAX else np.minimum
        return np.array_equal(reduce(*parts), whole)
    numbers = [np.asarray(value, np.float64) for value in (initial, *parts, whole)]
    with np.errstate(invalid="ignore"):  # a maximum may begin with -inf
        made = numbers[0] + sum(part - numbers[0] for part in numbers[1:3])
    largest = max(float(np.max(np.abs(value), initial=0.0)) for value in numbers)
    rounding = np.finfo(whole.dtype).eps if np.issubdtype(whole.dtype, np.floating) else 0.0
    return bool(np.all(np.abs(made - numbers[3]) <= _ROUNDINGS * rounding * largest))


def _floats(kind: str, generator: np.random.Generator, shape: tuple[int, ...], classes: int) -> np.ndarray:
    several = len(shape) > 1 and shape[-1] > 1
    if kind == "classes":
        return generator.integers(0, 2 if several else classes, shape)
    if kind == "one_hot" and several:
        return np.eye(shape[-1])[generator.integers(0, shape[-1], shape[:-1])]
    if kind == "simplex" and several:
        values = generator.uniform(0.01, 1.0, shape)
        return values / values.sum(axis=-1, keepdims=True)
    if kind == "normal":
        return generator.normal(size=shape)
    return generator.uniform(0.0, 1.0, shape)


def _numbers(state: Sequence[Any]) -> State:
    return [np.asarray(value.numpy()) for value in state]
