"""Plain values as JSON and arrays, and back: the same types and the same bits, and nothing that could run.

    plain, arrays = packed({"best": 0.1, "seen": (1, 2), "weights": [array]})
    json.dumps(plain, allow_nan=False)         # {"best": 0.1, "seen": {"$tuple": [1, 2]}, "weights": [{"$array": "0"}]}
    unpacked(plain, arrays)

What JSON has stands for itself. Anything else is an object with one name that begins with "$". Arrays of the types that
checkpoint/tensors.py writes are split off; they are copies, so that a background thread may write them.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from distfit.errors import InputError

# Deeper is no plain value but one that contains itself.
_MOST_DEEP = 64
# Beyond it other readers of JSON lose digits, and Python refuses to write or read very long numbers.
_EXACT = 2**53
_ML_TYPES = (
    "bfloat16",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
)
# Of these, those that a file of tensors has a name for.
_IN_FILES = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
_NUMPY_TYPE = re.compile(r"[<>|](b1|[iu][1248]|f(2|4|8|12|16)|c(8|16|24|32)|[US][1-9]\d{0,5}|[mM]8(\[\w{1,10}\])?)")


class NotPlain(InputError):
    """A value that cannot be written.

    Attributes:
        path: where it stands within what was given, as ".best[0]".
        type: of the value.
    """

    def __init__(self, path: str, type_: type) -> None:
        self.path, self.type = path, type_
        super().__init__(
            "Expected a plain value (numbers, strings, None, and lists, tuples, dictionaries, sets and NumPy arrays of "
            f"them), received a {type_.__name__}{f' at {path}' if path else ''}. Keep its numbers instead."
        )


def packed(value: Any, copy: bool = True) -> tuple[Any, dict[str, np.ndarray]]:
    """What JSON holds of a value, and the arrays in it by name: "0", "1", ...

    Args:
        value: None, bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset,
            collections.deque, NumPy arrays and scalars; of subclasses nobody knows what they hold beside.
        copy: the arrays are copies; False gives those of the value.

    Raises:
        NotPlain: something else is in it, or it contains itself.

    >>> packed({"best": float("inf"), "of": {3: np.float32(1)}})[0]
    {'best': {'$float': 'inf'}, 'of': {'$dict': [[3, {'$scalar': ['<f4', '0000803f']}]]}}
    """
    packer = _Packer(copy)
    return packer.pack(value, ""), packer.arrays


def unpacked(plain: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The inverse of `packed`, of what may come from anybody.

    Args:
        plain: as JSON gives it.
        arrays: by name.

    Raises:
        InputError: it is nothing that `packed` writes.

    >>> unpacked({"$tuple": [1, {"$array": "0"}]}, {"0": np.zeros(2)})
    (1, array([0., 0.]))
    """
    return _Unpacker(arrays).unpack(plain, "")


class _Packer:
    def __init__(self, copy: bool) -> None:
        self._copy = copy
        self.arrays: dict[str, np.ndarray] = {}

    def pack(self, value: Any, path: str, depth: int = 0) -> Any:
        if depth > _MOST_DEEP:
            raise NotPlain(path[:80] + "...", type(value))
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if -_EXACT <= value <= _EXACT else {"$int": hex(value)}
        if kind is float:
            return _float(value)
        if kind in (list, tuple, deque):
            return self._sequence(value, path, depth)
        if kind in (set, frozenset):
            items = [self.pack(item, f"{path}{{}}", depth + 1) for item in value]
            return {f"${kind.__name__}": sorted(items, key=json.dumps)}
        if kind is dict:
            return self._dict(value, path, depth)
        if kind in (bytes, bytearray):
            return {f"${kind.__name__}": base64.b64encode(value).decode()}
        if kind is complex:
            return {"$complex": [_float(value.real), _float(value.imag)]}
        if kind is np.ndarray:
            return self._array(value, path)
        if isinstance(value, np.generic):
            return {"$scalar": [_type_name(np.asarray(value).dtype, path), np.asarray(value).tobytes().hex()]}
        raise NotPlain(path, kind)

    def _sequence(self, value: Any, path: str, depth: int) -> Any:
        items = [self.pack(item, f"{path}[{number}]", depth + 1) for number, item in enumerate(value)]
        if isinstance(value, deque):
            return {"$deque": [items, value.maxlen]}
        return items if isinstance(value, list) else {"$tuple": items}

    def _dict(self, value: dict, path: str, depth: int) -> Any:
        """An object of JSON where it says the same: names that mean nothing else, in an order that cannot be lost."""
        items = [
            (self.pack(key, path, depth + 1), self.pack(item, f"{path}.{key}", depth + 1))
            for key, item in value.items()
        ]
        keys = [key for key, _ in items]
        if all(type(key) is str and not key.startswith("$") for key in value) and keys == sorted(keys):
            return dict(items)
        return {"$dict": [list(item) for item in items]}

    def _array(self, value: np.ndarray, path: str) -> Any:
        name = _type_name(value.dtype, path)
        plain = value.dtype.kind in "biuf" and value.dtype.itemsize <= 8 and value.dtype.isnative
        if not plain and name not in _IN_FILES:
            return {"$bits": [name, list(value.shape), base64.b64encode(value.tobytes()).decode()]}
        number = str(len(self.arrays))
        self.arrays[number] = np.array(value, order="C", copy=True) if self._copy else value
        return {"$array": number}


def _float(value: float) -> Any:
    if value != value:  # with its sign and what else is in it
        return {"$nan": struct.pack(">d", value).hex()}
    return {"$float": str(value)} if value in (float("inf"), float("-inf")) else value


def _type_name(dtype: np.dtype, path: str) -> str:
    """A name for what `_type_of` makes a type of again."""
    name = dtype.name if dtype.name in _ML_TYPES else dtype.str
    if dtype.name not in _ML_TYPES and (not _NUMPY_TYPE.fullmatch(name) or dtype.metadata):
        raise NotPlain(path, dtype.type)
    return name


class _Unpacker:
    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays
        self._kinds: dict[str, Callable[[Any, int], Any]] = {
            "$int": lambda given, _: int(_text(given, r"-?0x[0-9a-f]+"), 16),
            "$float": lambda given, _: float(_text(given, r"-?inf")),
            "$nan": lambda given, _: struct.unpack(">d", bytes.fromhex(_text(given, r"[0-9a-f]{16}")))[0],
            "$complex": lambda given, depth: complex(*(_expect(part, float) for part in self._list(given, depth, 2))),
            "$tuple": lambda given, depth: tuple(self._list(given, depth)),
            "$set": lambda given, depth: set(self._list(given, depth)),
            "$frozenset": lambda given, depth: frozenset(self._list(given, depth)),
            "$deque": self._deque,
            "$dict": self._pairs,
            "$bytes": lambda given, _: _bits(given),
            "$bytearray": lambda given, _: bytearray(_bits(given)),
            "$array": lambda given, _: self._arrays[_text(given, r"\d+")],
            "$scalar": lambda given, _: _scalar(*_expect(given, list)),
            "$bits": lambda given, _: _of_bits(*_expect(given, list)),
        }

    def unpack(self, plain: Any, path: str, depth: int = 0) -> Any:
        if depth > _MOST_DEEP:
            raise _malformed(path, "something too deep")
        if plain is None or type(plain) in (bool, int, float, str):
            return plain
        if type(plain) is list:
            return [self.unpack(item, f"{path}[{number}]", depth + 1) for number, item in enumerate(plain)]
        if type(plain) is not dict:
            raise _malformed(path, f"a {type(plain).__name__}")
        if all(type(key) is str and not key.startswith("$") for key in plain):
            return {key: self.unpack(item, f"{path}.{key}", depth + 1) for key, item in plain.items()}
        return self._marked(plain, path, depth)

    def _marked(self, plain: dict, path: str, depth: int) -> Any:
        (kind, given), *others = plain.items()
        if others or kind not in self._kinds:
            raise _malformed(path, f"an object with the names {', '.join(map(str, plain))[:80]}")
        try:
            return self._kinds[kind](given, depth)
        except InputError:
            raise
        except (TypeError, ValueError, KeyError, OverflowError) as error:  # of a number, an unhashable key, a size
            raise _malformed(path, f"a {kind[1:]} that is none ({str(error)[:80]})") from error

    def _list(self, given: Any, depth: int, length: int | None = None) -> list[Any]:
        if length is not None and len(_expect(given, list)) != length:
            raise ValueError(f"{len(given)} parts")
        return [self.unpack(item, "", depth + 1) for item in _expect(given, list)]

    def _pairs(self, given: Any, depth: int) -> dict[Any, Any]:
        return dict(self._list(pair, depth, 2) for pair in _expect(given, list))

    def _deque(self, given: Any, depth: int) -> deque:
        items, most = self._list(given, depth, 2)
        return deque(_expect(items, list), None if most is None else _expect(most, int))


def _scalar(name: Any, digits: Any) -> Any:
    return _of_bits_of(_type_of(name), [], bytes.fromhex(_text(digits, r"([0-9a-f]{2})*")))[()]


def _of_bits(name: Any, shape: Any, text: Any) -> np.ndarray:
    return _of_bits_of(_type_of(name), [_expect(size, int) for size in _expect(shape, list)], _bits(text))


def _of_bits_of(dtype: np.dtype, shape: list[int], content: bytes) -> np.ndarray:
    # Before anything is allocated; -1 would be worked out from the content.
    if any(size < 0 for size in shape) or len(shape) > 32:
        raise ValueError(f"shape {shape}")
    return np.frombuffer(content, dtype).reshape(shape).copy()


def _type_of(name: Any) -> np.dtype:
    if _expect(name, str) in _ML_TYPES:
        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(_text(name, _NUMPY_TYPE.pattern))


def _bits(text: Any) -> bytes:
    return base64.b64decode(_expect(text, str), validate=True)


def _text(value: Any, pattern: str) -> str:
    if not re.fullmatch(pattern, _expect(value, str)):
        raise ValueError(f"{value[:40]!r}")
    return value


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} in place of a {kind.__name__}")
    return value


def _malformed(path: str, received: str) -> InputError:
    where = f" at {path}" if path else ""
    return InputError(
        f"Expected values as distfit writes them into a checkpoint, received {received}{where}. The checkpoint was not "
        "written by this version of distfit, or was changed; use another one."
    )
