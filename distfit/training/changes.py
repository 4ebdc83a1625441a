"""Which variables a traced step changes, to find those of which replicas would have no copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# What changes a variable; the first input is its handle.
_CHANGES = (
    *("AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp", "ResourceStridedSliceAssign"),
    *("ResourceScatterAdd", "ResourceScatterUpdate", "ResourceScatterNdAdd", "ResourceScatterNdUpdate"),
    "RngReadAndSkip",
)


def changed_elsewhere(graph: Any, shared: Iterable[Any]) -> list[str]:
    """The names of variables that a step's graph changes, beside those that replicas share.

    Args:
        graph: of the traced step.
        shared: Keras variables.
    """
    known = {id(copy.handle) for variable in shared for copy in _copies(variable._value)}
    outer = {inner.name: handle for handle, inner in graph.captures}
    unknown = {id(outer[name]) for name in _changed(graph) if name in outer} - known
    names = {variable.name for variable in graph.variables if id(variable.handle) in unknown}
    return sorted(name.removesuffix(":0") for name in names)


def _copies(value: Any) -> Sequence[Any]:
    return value.values if hasattr(value, "values") else [value]


def _changed(graph: Any) -> Iterator[str]:
    """What is changed in a graph and in the functions that it calls (a branch, a loop), by its tensors' names."""
    for op in graph.get_operations():
        if op.type in _CHANGES:
            yield op.inputs[0].name
        for inner in _called(op, graph):
            # A branch is called without the condition before it, which comes first among the inputs.
            arguments = op.inputs[len(op.inputs) - len(inner.inputs) :]
            names = {own.name: given.name for own, given in zip(inner.inputs, arguments, strict=True)}
            yield from (names[name] for name in _changed(inner) if name in names)


def _called(op: Any, graph: Any) -> Iterator[Any]:
    names = [op.get_attr(name).name for name in ("f", "then_branch", "else_branch", "body") if name in op.node_def.attr]
    for function in map(graph._get_function, names):
        if function is not None and function.graph is not None:
            yield function.graph
