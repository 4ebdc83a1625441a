"""A model as a graph of its layers, for TensorBoard's page GRAPHS.

    tf.summary.graph(graph_of_layers(model.to_json()))       # with a writer as default

keras.callbacks.TensorBoard writes a model's configuration, of which the page makes a graph when somebody asks for its
"conceptual graph", and cannot for models with arguments that are no tensors (TensorBoard 2.21, plugins/graph/
keras_util.py). It opens with a graph of operations, and with an error where there is none: this is one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import tensorflow as tf


def graph_of_layers(model: str) -> tf.compat.v1.GraphDef:
    """A node for each layer, also of models within the model, with the layers that it is called on.

    Args:
        model: of `keras.Model.to_json`; Functional or Sequential.

    >>> import keras
    >>> model = keras.Sequential([keras.Input((2,), name="in"), keras.layers.Dense(1, name="out")], name="small")
    >>> [(node.name, node.op, *node.input) for node in graph_of_layers(model.to_json()).node]
    [('small/in', 'InputLayer'), ('small/out', 'Dense', 'small/in')]
    """
    graph = tf.compat.v1.GraphDef()
    described = json.loads(model)
    _add_layers(graph, described, f"{described['config']['name']}/")
    return graph


def _add_layers(graph: tf.compat.v1.GraphDef, described: dict[str, Any], scope: str) -> None:
    before: list[str] = []
    for layer in described["config"]["layers"]:
        name = scope + layer["config"].get("name", layer["class_name"])
        # A Sequential says nothing of connections: each layer follows the one before.
        called_on = [scope + one for one in _tensors(layer["inbound_nodes"])] if "inbound_nodes" in layer else before
        graph.node.add(name=name, op=layer["class_name"], input=dict.fromkeys(called_on))
        before = [name]
        if _is_model(layer):
            _add_layers(graph, layer, f"{name}/")


def _is_model(layer: dict[str, Any]) -> bool:
    layers = layer["config"].get("layers")
    return isinstance(layers, list) and all(
        isinstance(one, dict) and {"class_name", "config"} <= {*one} for one in layers
    )


def _tensors(arguments: Any) -> Iterator[str]:
    """Names of the layers whose outputs are among the arguments of calls, wherever in them.

    >>> tensor = {"class_name": "__keras_tensor__", "config": {"keras_history": ["hidden", 0, 0]}}
    >>> list(_tensors([{"args": [[tensor], 3], "kwargs": {"mask": None}}]))
    ['hidden']
    """
    if isinstance(arguments, dict) and arguments.get("class_name") == "__keras_tensor__":
        yield arguments["config"]["keras_history"][0]
    elif isinstance(arguments, (dict, list)):
        for one in arguments.values() if isinstance(arguments, dict) else arguments:
            yield from _tensors(one)
