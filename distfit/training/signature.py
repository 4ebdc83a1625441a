"""What ranks compare before the first step: the code, the model, how it was compiled, and the data.

    facts = [*of_code(), *of_model(model), *of_data("training data", x, feed)]
    compare(session, lambda: facts)     # InputError: layer 3: Dense units is 32 on ranks 0, 2 and 64 on rank 1

Each fact is two texts, so that ranks can exchange a digest of all of them, and only where digests differ look for the
first fact that does. Values of weights are no facts: all ranks get the chief's. A name that Keras made up counts by its
place among the others, since a rank that has built another model before has `dense_1` where others have `dense`. No
fact contains an address or a number that is drawn anew in each process.
"""

from __future__ import annotations

import base64
import hashlib
import marshal
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.utils.naming import to_snake_case

from distfit.backends.hooks import optimizers_of, variables_of
from distfit.data.tfrecords import TFRecords
from distfit.differences import ranks_text
from distfit.errors import InputError, on_every_rank

if TYPE_CHECKING:
    from distfit.data.feed import Feed
    from distfit.session import Session

# Of configurations: what says again what is said elsewhere, what is made anew in each process, and seeds of layers,
# whose streams come from the chief.
_LEFT_OUT = {"module", "registered_name", "shared_object_id", "build_config", "seed", "tracking_id"}
# Where a configuration has names of layers.
_NAMES = {"name", "keras_history", "input_layers", "output_layers"}
_MOST_SHOWN = 120


@dataclass(frozen=True)
class Fact:
    """Something that is the same on all ranks.

    Args:
        what: it is about, "layer 3: Dense units".
        value: as text.
    """

    what: str
    value: str


def compare(session: Session, make_facts: Callable[[], Sequence[Fact]]) -> None:
    """Refuse ranks that are about to do different things. Collective.

    Args:
        make_facts: called where there are several ranks.

    Raises:
        InputError: some facts differ; on every rank, with the first one.
    """
    if session.size == 1:
        return
    facts = make_facts()
    if len(set(session.transport.gather(_digest(repr(facts).encode())))) == 1:
        return
    chiefs = session.transport.broadcast(list(facts))
    by_rank = session.transport.gather(first_difference(chiefs, facts))
    raise on_every_rank(InputError(paragraph(chiefs, by_rank)))


def first_difference(ours: Sequence[Fact], theirs: Sequence[Fact]) -> tuple[int, Fact] | None:
    """The place of the first fact of theirs that is another one, and that fact; None where there is none.

    >>> first_difference([Fact("model", "A"), Fact("seed", "1")], [Fact("model", "A"), Fact("seed", "2")])
    (1, Fact(what='seed', value='2'))
    """
    pairs = zip_longest(ours, theirs, fillvalue=Fact("nothing more", ""))
    return next(((place, other) for place, (own, other) in enumerate(pairs) if own != other), None)


def paragraph(chiefs: Sequence[Fact], by_rank: Sequence[tuple[int, Fact] | None]) -> str:
    """The message.

    Args:
        chiefs: all facts of the chief.
        by_rank: each rank's first that differs from the chief's; at least one does.

    >>> facts = [Fact("layer 1", "Dense"), Fact("layer 1: Dense units", "32")]
    >>> print(paragraph(facts, [None, (1, Fact("layer 1: Dense units", "64")), None]).partition(". ")[0])
    Expected every rank to begin the same training, received layer 1: Dense units is 32 on ranks 0, 2 and 64 on rank 1
    """
    place = min(found[0] for found in by_rank if found is not None)
    chief = chiefs[place] if place < len(chiefs) else Fact("nothing more", "")
    held = [chief if found is None or found[0] > place else found[1] for found in by_rank]
    holders = {fact: [rank for rank, own in enumerate(held) if own == fact] for fact in held}
    if len({fact.what for fact in held}) == 1:
        shown = f"{chief.what} is " + " and ".join(
            f"{_short(fact.value)} on {ranks_text(r)}" for fact, r in holders.items()
        )
    else:
        shown = " and ".join(f"{fact.what} {_short(fact.value)} on {ranks_text(r)}" for fact, r in holders.items())
    return (
        f"Expected every rank to begin the same training, received {shown}. Let all ranks run the same lines with the "
        "same arguments, files and configuration; what only one rank should do, let it do besides the training."
    )


def of_seeds(found: Sequence[int | None]) -> None:
    """Refuse ranks of which the script has set different seeds; one that has set none takes what the job has.

    Args:
        found: each rank's, in order.

    Raises:
        InputError: two ranks have set different ones; on every rank.

    >>> of_seeds([None, None]); of_seeds([3, 3])
    >>> of_seeds([3, 4])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    distfit.errors.InputError: Expected the same seed on every rank, received 3 on rank 0 and 4 on rank 1. ...
    """
    holders: dict[int, list[int]] = {}
    for rank, seed in enumerate(found):
        if seed is not None:
            holders.setdefault(seed, []).append(rank)
    if len(holders) > 1:
        shown = " and ".join(f"{seed} on {ranks_text(ranks)}" for seed, ranks in holders.items())
        raise on_every_rank(
            InputError(
                f"Expected the same seed on every rank, received {shown}. Call keras.utils.set_random_seed with one "
                "number on all of them, or pass distfit.fit(..., seed=...): replicas have random streams of their own "
                "all the same."
            )
        )


def of_code() -> list[Fact]:
    """The script that this process runs; the versions of packages are compared when the ranks meet.

    Without its first line if that names an interpreter: programs that pip makes (`distfit train`) have the path of
    their environment there, which may be another one on each host.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None or not Path(script).is_file():  # a notebook, or python -c
        return []
    content = Path(script).read_bytes()
    program = content.partition(b"\n")[2] if content.startswith(b"#!") else content
    return [Fact(f"the script {Path(script).name}", f"with digest {_digest(program)}")]


def of_data(name: str, data: Any, feed: Feed) -> list[Fact]:
    """What a feed brings.

    Args:
        name: of the data, for messages: "training data".
        data: as the user passed it.
        feed: made of it.
    """
    source = feed.source
    facts = [Fact(name, type(data).__name__)]
    if not source.uneven:  # what each rank has by itself may be more or less
        counted = {"batch_size": source.batch_size, "records": source.records, "steps": feed.num_batches}
        facts += [Fact(f"{name}: {what}", str(value)) for what, value in counted.items()]
    facts.append(Fact(f"{name}: structure", str(tf.nest.map_structure(type, feed.data_spec))))
    for place, spec in enumerate(tf.nest.flatten(feed.data_spec)):
        facts.append(Fact(f"{name}: tensor {place}", _of_spec(spec)))
    return facts + _files(name, data)


def of_model(model: keras.Model) -> list[Fact]:
    """A built model: its layers in order, its variables, and how it was compiled."""
    names = _Names()
    layers = [model, *model._flatten_layers(include_self=False)]
    optimizers = optimizers_of(model)
    for thing in (*layers, *optimizers):
        names.add(thing)
    facts = [Fact("model", type(model).__qualname__)]
    for number, layer in enumerate(layers):
        facts += _of_layer("model" if number == 0 else f"layer {number}", layer, names)
    for number, optimizer in enumerate(optimizers):
        facts += _of_optimizer(f"optimizer {number}" if number else "optimizer", optimizer, names)
    return [*facts, *_of_compilation(model, names), *_of_variables(model)]


def _of_layer(place: str, layer: Any, names: _Names) -> Iterator[Fact]:
    kind = type(layer).__qualname__
    yield Fact(place, kind)
    yield Fact(f"{place}: {kind} name", names.of(layer.name))
    yield Fact(f"{place}: {kind} trainable", str(layer.trainable))
    yield Fact(f"{place}: {kind} dtype", layer.dtype_policy.name)
    config = {name: value for name, value in _config(layer).items() if name not in ("name", "trainable", "dtype")}
    # A model's layers come by themselves.
    yield from _flat(f"{place}: {kind}", {name: value for name, value in config.items() if name != "layers"}, names)
    if isinstance(layer, keras.Model) and "layers" in config:
        # What comes after what.
        yield Fact(f"{place}: {kind} connections", str([_connections(one, names) for one in config["layers"]]))


def _connections(layer: Mapping[str, Any], names: _Names) -> list[str]:
    return [fact.value for fact in _flat("", {"inbound": layer.get("inbound_nodes", [])}, names)]


def _of_optimizer(place: str, optimizer: Any, names: _Names) -> Iterator[Fact]:
    kind = type(optimizer).__qualname__
    yield Fact(place, kind)
    config = {name: value for name, value in _config(optimizer).items() if name != "name"}
    yield from _flat(f"{place}: {kind}", config, names)


def _of_compilation(model: keras.Model, names: _Names) -> Iterator[Fact]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of functions without a name, which nobody saves here
            compiled = model.get_compile_config() or {}
    except Exception:  # a user's loss or metric that cannot be described: its class is compared below, by its metrics
        compiled = {}
    for name in ("loss", "loss_weights", "metrics", "weighted_metrics"):
        yield from _flat(f"compile: {name}", compiled.get(name), names)
    if model.compiled:
        for number, metric in enumerate(model.metrics):
            yield Fact(f"metric {number}", type(metric).__qualname__)


def _of_variables(model: keras.Model) -> Iterator[Fact]:
    for number, variable in enumerate(variables_of(model)):
        path = re.sub(r"_\d+(?=[_/]|$)", "", variable.path)
        yield Fact(f"variable {number}", f"{path} {tuple(variable.shape)} {variable.dtype}")


def _config(thing: Any) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(action="ignore"):
            return dict(thing.get_config())
    except Exception:  # a user's class that Keras cannot describe: its class and its variables are compared
        return {}


class _Names:
    """Names that Keras made up, by their place among those of their kind."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._counts: dict[str, int] = {}

    def add(self, thing: Any) -> None:
        kind = to_snake_case(type(thing).__name__)
        if thing.name not in self._known and re.fullmatch(rf"{re.escape(kind)}(_\d+)?", thing.name):
            number = self._counts[kind] = self._counts.get(kind, -1) + 1
            self._known[thing.name] = f"{kind}_{number}" if number else kind

    def of(self, name: str) -> str:
        return self._known.get(name, name)


def _flat(place: str, value: Any, names: _Names, named: bool = False) -> Iterator[Fact]:
    """A configuration as facts, one for each plain value or list of them."""
    if isinstance(value, Mapping):
        value = _without_wrapping(value)
        for name, inner in value.items():
            if name not in _LEFT_OUT:
                yield from _flat(f"{place} {name}", inner, names, named=named or name in _NAMES)
    elif isinstance(value, (list, tuple)) and not all(map(_is_plain, value)):
        for number, inner in enumerate(value):
            yield from _flat(f"{place} {number}", inner, names, named)
    elif isinstance(value, (list, tuple)):
        yield Fact(place, str([_text(inner, names, named) for inner in value]))
    elif isinstance(value, (set, frozenset)):
        yield Fact(place, str(sorted(_text(inner, names, named) for inner in value)))
    elif callable(getattr(value, "get_config", None)) and not isinstance(value, type):
        yield Fact(place, type(value).__qualname__)
        yield from _flat(place, _config(value), names)
    else:
        yield Fact(place, _text(value, names, named))


def _without_wrapping(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Keras' {"class_name": "L2", "config": {"l2": 0.01}} as {"class": "L2", "l2": 0.01}; a made-up name left out."""
    inner = config.get("config")
    if config.get("class_name") == "__lambda__" and isinstance(inner, Mapping):
        return _of_lambda(inner)
    if "class_name" not in config or not isinstance(inner, Mapping):
        return config
    kind = str(config["class_name"])
    made_up = re.fullmatch(rf"{re.escape(to_snake_case(kind))}(_\d+)?", str(inner.get("name", "")))
    more = {name: value for name, value in config.items() if name not in ("class_name", "config", "name")}
    return {"class": kind, **more, **{name: value for name, value in inner.items() if name != "name" or not made_up}}


def _of_lambda(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A function without a name as Keras saves it, without the place of its source."""
    code, defaults, closure = config.get("value") or (config["code"], config["defaults"], config["closure"])
    program = marshal.loads(base64.b64decode(code))
    return {"code": _digest(_of_function(program).encode()), "defaults": defaults, "closure": closure}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic))


def _text(value: Any, names: _Names, named: bool) -> str:
    """A value without its address."""
    if named and isinstance(value, str):
        return names.of(value)
    if isinstance(value, (float, np.floating)):
        return _number(float(value))
    if _is_plain(value):
        return str(value.item() if isinstance(value, np.generic) else value)
    if isinstance(value, (np.ndarray, tf.Tensor, tf.Variable, keras.Variable)):
        array = np.asarray(value)
        return f"{array.dtype}{array.shape} with digest {_digest(array.tobytes())}"
    if callable(value) and hasattr(value, "__code__"):
        return f"{value.__qualname__} with digest {_digest(_of_function(value.__code__).encode())}"
    if isinstance(value, (type, tf.DType)):
        return getattr(value, "__qualname__", None) or str(value)
    return type(value).__qualname__


def _number(value: float) -> str:
    """A float as it was written, also if it has been through 32 bits.

    >>> _number(0.1), _number(float(np.float32(0.1)))
    ('0.1', '0.1')
    """
    with np.errstate(over="ignore"):
        short = np.float32(value)
    return str(short) if float(short) == value else repr(value)


def _of_function(code: CodeType) -> str:
    """What a function does, without where it is."""
    return repr((code.co_code, code.co_names, [_of_constant(one) for one in code.co_consts]))


def _of_constant(constant: Any) -> str:
    if isinstance(constant, CodeType):
        return _of_function(constant)
    # A set of texts has another order in each process.
    return str(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)


def _of_spec(spec: Any) -> str:
    if not isinstance(spec, (tf.TensorSpec, tf.SparseTensorSpec, tf.RaggedTensorSpec)):
        return type(spec).__name__
    # How many rows a batch has may differ: a rank that reads its own batches has its own.
    shape = spec.shape[1:] if spec.shape.rank else spec.shape
    return f"{type(spec).__name__} rows of {shape} {spec.dtype.name}"


def _files(name: str, data: Any) -> list[Fact]:
    if not isinstance(data, TFRecords):
        return []
    files = data.files if isinstance(data.files, list) else [data.files]
    transform = [] if data.transform is None else [Fact(f"{name}: transform", _text(data.transform, _Names(), False))]
    return [*(Fact(f"{name}: file {number}", str(file)) for number, file in enumerate(files)), *transform]


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _short(value: str) -> str:
    return value if len(value) <= _MOST_SHOWN else f"{value[:_MOST_SHOWN]}..."
