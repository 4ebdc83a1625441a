"""tf.train.Example read without TensorFlow: what TensorFlow reads, and refused where TensorFlow refuses."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distfit.data.example import NotAnExample, messages, parse_example, parse_sequence
from tests.ranks import environment

KINDS = {"bytes": "bytes_list", "float32": "float_list", "int64": "int64_list"}
VALUES = st.one_of(
    st.tuples(st.just("bytes"), st.lists(st.binary(max_size=20), max_size=5)),
    st.tuples(st.just("float32"), st.lists(st.floats(width=32, allow_nan=False), max_size=5)),
    st.tuples(st.just("int64"), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5)),
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
FEATURES = st.dictionaries(NAMES, VALUES, max_size=5)
# The first example imports TensorFlow.
patient = settings(deadline=None)
LISTS = st.dictionaries(NAMES, st.lists(VALUES, max_size=4), max_size=3)


def fill(feature, kind, values):
    """Sets a feature of a message, also to no values."""
    held = getattr(feature, KINDS[kind])
    held.SetInParent()
    held.value.extend(values)


def with_tensorflow(features, lists=None):
    from tensorflow import train

    if lists is None:
        example = train.Example()
        context = example.features
    else:
        example = train.SequenceExample()
        context = example.context
        for name, steps in lists.items():
            for kind, values in steps:
                fill(example.feature_lists.feature_list[name].feature.add(), kind, values)
            example.feature_lists.feature_list[name].SetInParent()
    for name, (kind, values) in features.items():
        fill(context.feature[name], kind, values)
    return example.SerializeToString()


def plain(parsed):
    """Without protobuf's containers."""
    return {name: (kind, list(values)) for name, (kind, values) in parsed.items()}


@patient
@given(FEATURES)
def test_an_example_of_tensorflow_is_read(features):
    assert plain(parse_example(with_tensorflow(features))) == features


@patient
@given(FEATURES, LISTS)
def test_a_sequence_example_of_tensorflow_is_read(features, lists):
    context, found = parse_sequence(with_tensorflow(features, lists))
    assert plain(context) == features
    assert {name: [(kind, list(values)) for kind, values in steps] for name, steps in found.items()} == lists


@settings(deadline=None, max_examples=300)
@given(FEATURES, LISTS, st.data())
def test_damaged_bytes_are_refused_or_read_as_tensorflow_does(features, lists, data):
    from google.protobuf.message import DecodeError
    from tensorflow import train

    damaged = bytearray(with_tensorflow(features, lists) or b"\0")
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        theirs = train.SequenceExample.FromString(bytes(damaged))
    except DecodeError:
        with pytest.raises(NotAnExample):
            parse_sequence(bytes(damaged))
        return
    expected = {
        name: (kind, list(getattr(feature, field).value))
        for name, feature in theirs.context.feature.items()
        for kind, field in KINDS.items()
        if feature.WhichOneof("kind") == field
    }
    try:
        assert repr(plain(parse_example(bytes(damaged)))) == repr(expected)  # a damaged float may be NaN
    except NotAnExample:
        assert not expected
        assert not theirs.feature_lists.feature_list


@patient
@given(FEATURES)
def test_what_these_classes_write_is_what_tensorflow_writes(features):
    from tensorflow import train

    ours, theirs = messages().Example(), train.Example()
    for example in (ours, theirs):
        for name, (kind, values) in features.items():
            fill(example.features.feature[name], kind, values)
    assert ours.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)


def test_a_feature_without_a_list_is_missing():
    example = messages().Example()
    example.features.feature["nothing"].SetInParent()
    assert parse_example(example.SerializeToString()) == {}


def test_an_empty_record_is_an_example_without_features():
    assert parse_sequence(b"") == ({}, {})


@pytest.mark.parametrize("other", [b"hello", b"image,label\n", b"\x08\x01", b"\x12\x34\x56"])
def test_other_bytes_are_refused(other):
    with pytest.raises(NotAnExample, match=r"no tf\.train\.Example"):
        parse_example(other)


def test_it_needs_no_tensorflow():
    code = (
        "import sys; from distfit.data.example import messages, parse_example; "
        "parse_example(messages().Example().SerializeToString()); assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=60)
