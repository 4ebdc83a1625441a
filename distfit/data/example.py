"""`tf.train.Example` and `tf.train.SequenceExample` without TensorFlow, which takes seconds and the devices.

    features = parse_example(serialized)
    features["label"].kind, features["label"].values[0]
    context, lists = parse_sequence(serialized)          # an Example is one without lists

The parser is protobuf's own, in C, from a description of the messages kept here; the tests hold it against
TensorFlow's. A feature that is there without a list of values counts as missing, as for
`tf.io.parse_single_example`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple


class NotAnExample(ValueError):
    """Bytes that are neither an Example nor a SequenceExample; the text says why, after "it is"."""


class Values(NamedTuple):
    """What a feature holds.

    Args:
        kind: "bytes", "int64" or "float32", as `dataset.json` names TensorFlow's three lists.
        values: as many as there are; not copied, so `numpy.array(values, ...)` where they are many.
    """

    kind: str
    values: Sequence


# From the field of `tensorflow.Feature` to its kind here.
_KINDS = {"bytes_list": "bytes", "float_list": "float32", "int64_list": "int64"}


def parse_example(serialized: bytes) -> dict[str, Values]:
    """The features of an Example by name; of a SequenceExample, those of its context.

    >>> example = messages().Example()
    >>> example.features.feature["label"].int64_list.value.append(7)
    >>> parse_example(example.SerializeToString())
    {'label': Values(kind='int64', values=[7])}

    Raises:
        NotAnExample: it is none, nor a SequenceExample.
    """
    return parse_sequence(serialized)[0]


def parse_sequence(serialized: bytes) -> tuple[dict[str, Values], dict[str, list[Values]]]:
    """The features of the context and the feature lists of a SequenceExample, by name.

    The two messages have the first field in common, so an Example is read as a SequenceExample without lists.
    A step of a list that holds no values is left out of it.

    Raises:
        NotAnExample: it is neither.
    """
    from google.protobuf.message import DecodeError

    try:
        message = messages().SequenceExample.FromString(serialized)
    except DecodeError as error:
        raise NotAnExample("no tf.train.Example") from error
    context = _by_name(message.context.feature.items())
    lists = {name: _values(one.feature) for name, one in message.feature_lists.feature_list.items()}
    if serialized and not context and not lists and _is_foreign(message):
        raise NotAnExample("no tf.train.Example, but another message")
    return context, lists


@functools.cache
def messages() -> SimpleNamespace:
    """The message classes of `tensorflow/core/example/{example,feature}.proto`, by their names there.

    They write the same bytes as TensorFlow's and are other classes than those, so neither disturbs the other.

    >>> sorted(vars(messages()))[:3]
    ['BytesList', 'Example', 'Feature']
    """
    from google.protobuf.descriptor_pool import DescriptorPool
    from google.protobuf.message_factory import GetMessageClass

    file = _file()
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    classes = {one.name: f"{file.package}.{one.name}" for one in file.message_type}
    return SimpleNamespace(
        **{name: GetMessageClass(pool.FindMessageTypeByName(full)) for name, full in classes.items()}
    )


def _by_name(items: Iterable[tuple[str, Any]]) -> dict[str, Values]:
    kinds = ((name, feature, feature.WhichOneof("kind")) for name, feature in items)
    return {name: Values(_KINDS[field], getattr(feature, field).value) for name, feature, field in kinds if field}


def _values(steps: Iterable[Any]) -> list[Values]:
    kinds = ((feature, feature.WhichOneof("kind")) for feature in steps)
    return [Values(_KINDS[field], getattr(feature, field).value) for feature, field in kinds if field]


def _is_foreign(message: Any) -> bool:
    """Whether nothing was understood because it is something else, rather than empty."""
    from google.protobuf.unknown_fields import UnknownFieldSet

    return len(UnknownFieldSet(message)) > 0


def _file() -> Any:
    """The description of the messages, as the two .proto files have them."""
    from google.protobuf.descriptor_pb2 import FileDescriptorProto

    file = FileDescriptorProto(name="distfit/example.proto", package="tensorflow", syntax="proto3")
    add = functools.partial(_add, file.message_type)
    for name, kind in (("BytesList", "BYTES"), ("FloatList", "FLOAT"), ("Int64List", "INT64")):
        add(name, value=f"repeated {kind}")
    feature = add("Feature", bytes_list="BytesList", float_list="FloatList", int64_list="Int64List")
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    _map_entry(add("Features", feature="repeated Features.FeatureEntry"), "FeatureEntry", "Feature")
    add("FeatureList", feature="repeated Feature")
    _map_entry(
        add("FeatureLists", feature_list="repeated FeatureLists.FeatureListEntry"), "FeatureListEntry", "FeatureList"
    )
    add("Example", features="Features")
    add("SequenceExample", context="Features", feature_lists="FeatureLists")
    return file


def _add(types: Any, name: str, **fields: str) -> Any:
    """Adds a message to `types`; a field is a message, or in capitals one of protobuf's own types."""
    message = types.add(name=name)
    for number, (field, words) in enumerate(fields.items(), 1):
        *repeated, kind = words.split()
        added = message.field.add(name=field, number=number)
        added.label = added.LABEL_REPEATED if repeated else added.LABEL_OPTIONAL
        added.type = added.Type.Value(f"TYPE_{kind if kind.isupper() else 'MESSAGE'}")
        if not kind.isupper():
            added.type_name = f".tensorflow.{kind}"
    return message


def _map_entry(message: Any, name: str, of: str) -> None:
    """What protobuf makes of `map<string, of>`: pairs in a message of their own."""
    _add(message.nested_type, name, key="STRING", value=of).options.map_entry = True
