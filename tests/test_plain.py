"""Plain values through JSON: the same types and bits come back, and what was not written so is refused."""

from __future__ import annotations

import collections
import enum
import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

from distfit.checkpoint.plain import NotPlain, packed, unpacked
from distfit.errors import InputError

ML_TYPES = [np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3")]

FLOATS = st.floats() | st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack(">d", bits.to_bytes(8, "big"))[0])
HASHABLE = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text() | st.binary() | st.complex_numbers(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
TYPES = of_numpy.scalar_dtypes() | of_numpy.unicode_string_dtypes(max_len=5) | of_numpy.byte_string_dtypes(max_len=5)
ARRAYS = of_numpy.arrays(TYPES, of_numpy.array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=3))
OF_ML = st.builds(
    lambda dtype, bits: np.frombuffer(bits[: len(bits) // dtype.itemsize * dtype.itemsize], dtype),
    st.sampled_from(ML_TYPES),
    st.binary(max_size=8),
)
SCALARS = of_numpy.arrays(TYPES, ()).map(lambda array: array[()])
LEAVES = HASHABLE | st.binary().map(bytearray) | ARRAYS | OF_ML | SCALARS
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(HASHABLE | st.sampled_from(["$set", "$", "$dict"]), inner, max_size=3)
        | st.builds(collections.deque, st.lists(inner, max_size=3), st.none() | st.integers(0, 4))
        | st.sets(HASHABLE, max_size=3)
    ),
    max_leaves=12,
)


def identity(value):
    """What tells two values apart, down to the bits."""
    kind = type(value)
    if kind is float:
        return kind, struct.pack(">d", value)
    if kind is complex:
        return kind, identity(value.real), identity(value.imag)
    if isinstance(value, (np.ndarray, np.generic)):
        return kind, np.asarray(value).dtype, value.shape, value.tobytes()
    if kind in (list, tuple, collections.deque):
        return kind, getattr(value, "maxlen", None), [identity(item) for item in value]
    if kind in (set, frozenset):
        return kind, sorted(repr(identity(item)) for item in value)
    if kind is dict:
        return kind, [(identity(key), identity(item)) for key, item in value.items()]
    return kind, value


def through_json(value):
    plain, arrays = packed(value)
    text = json.dumps(plain, allow_nan=False, sort_keys=True)
    return unpacked(json.loads(text), arrays)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_every_value_comes_back_with_its_types_and_bits(value):
    assert identity(through_json(value)) == identity(value)


@pytest.mark.parametrize(
    "value",
    [
        0.1 + 0.2,
        -0.0,
        5e-324,
        struct.unpack(">d", bytes.fromhex("fff8000000000001"))[0],
        [10**5000, -(10**5000)],
        -(2**53) - 1,
        {True: 1, "True": 2},
        {1: "one", "1": "text"},
        {"b": 1, "a": 2},
        {"$array": "0"},
        np.float32(0.1),
        np.str_(""),
        np.datetime64("2026-01-01", "ms"),
        np.zeros((2, 0, 3), "float16"),
        np.arange(6.0).reshape(2, 3).T,
        np.array([1, 2], ">i4"),
        np.array(["ab", "c"]),
        ml_dtypes.bfloat16(1.5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_easily_lost_is_kept(value):
    assert identity(through_json(value)) == identity(value)


def test_arrays_go_to_files_of_tensors_and_are_copies():
    array = np.arange(3.0)
    plain, arrays = packed({"weights": [array, array[::2]]})
    array[:] = 0
    assert plain == {"weights": [{"$array": "0"}, {"$array": "1"}]}
    assert [each.tolist() for each in arrays.values()] == [[0, 1, 2], [0, 2]]
    assert packed(array, copy=False)[1]["0"] is array


def _endless():
    endless: list = []
    endless.append(endless)
    return endless


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        ({"best": [1, object()]}, ".best[1]", object),
        ({"of": {3: len}}, ".of.3", type(len)),
        (Colour.RED, "", Colour),
        (collections.OrderedDict(a=1), "", collections.OrderedDict),
        ((np.ma.masked_array([1.0]),), "[0]", np.ma.MaskedArray),
        ([np.array([object()])], "[0]", np.object_),
        ([np.zeros(1, [("a", "f4")])], "[0]", np.void),
    ],
)
def test_what_is_not_plain_is_named_with_its_place(value, path, kind):
    with pytest.raises(NotPlain, match="Expected a plain value") as caught:
        packed(value)
    assert (caught.value.path, caught.value.type) == (path, kind)


def test_a_value_within_itself_is_refused():
    with pytest.raises(NotPlain, match="received a list"):
        packed(_endless())


DEEP = "x"
for _ in range(80):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "plain",
    [
        {"$pickle": "gASVIAAAAA=="},
        {"$int": "__import__('os')"},
        {"$int": 5},
        {"$float": "1e5"},
        {"$nan": "00"},
        {"$complex": [1, 2]},
        {"$complex": [1.0]},
        {"$tuple": {"a": 1}},
        {"$set": [[1]]},
        {"$set": [{"$dict": []}]},
        {"$dict": [[1]]},
        {"$dict": [[[1], 2]]},
        {"$dict": {"a": 1}},
        {"$deque": [[1], "three"]},
        {"$deque": [[1], -1]},
        {"$deque": [1, None]},
        {"$bytes": "not base64!"},
        {"$bytes": None},
        {"$array": "7"},
        {"$array": 0},
        {"$array": "../0"},
        {"$scalar": ["O", "0000000000000000"]},
        {"$scalar": ["<f4", ""]},
        {"$scalar": ["<f4", "00000000", 1]},
        {"$scalar": ["float128x", "00"]},
        {"$bits": ["<f8", [1000000000000], ""]},
        {"$bits": ["<f8", [-1], "AAAAAAAAAAA="]},
        {"$bits": ["<U999999999", [1], ""]},
        {"$bits": ["|O", [1], "AAAAAAAAAAA="]},
        {"$bits": ["|V8", [1], "AAAAAAAAAAA="]},
        {"$bits": ["<f8", [1] * 65, "AAAAAAAAAAA="]},
        {"$bits": ["<M8[nonsense]", [1], "AAAAAAAAAAA="]},
        {"$tuple": [1], "other": 2},
        {3: 4},
        (1, 2),
        object(),
        DEEP,
    ],
    ids=lambda plain: "an object" if type(plain) is object else repr(plain)[:40],
)
def test_what_nobody_has_packed_is_refused(plain):
    with pytest.raises(InputError, match="Expected values as distfit writes them"):
        unpacked(plain, {"0": np.zeros(1)})


KINDS = ("int", "float", "nan", "complex", "tuple", "set", "frozenset", "deque", "dict", "bytes", "bytearray")
KINDS += ("array", "scalar", "bits")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.just("<f4"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
        | st.builds(
            lambda kind, given: {kind: given},
            st.sampled_from(KINDS).map("${}".format),
            inner,
        )
    ),
    max_leaves=10,
)


@settings(max_examples=500, deadline=None)
@given(JSON)
def test_any_json_gives_plain_data_or_is_refused(plain):
    try:
        value = unpacked(plain, {"0": np.zeros(1)})
    except InputError:
        return
    assert identity(through_json(value)) == identity(value)
    assert not callable(value)
