"""Numbers and texts of JSON as features: their type from one value, held against others.

words = type_of("words", [1, 2, 3])              # int64[3]
words = words.also("words", [4])                 # int64[?]
stored([1, 2], words)                            # what goes into the record
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

_FLOAT_MOST = float(np.finfo(np.float32).max)


class NotAValue(Exception):
    """What cannot be this feature; the text says why, after "it is"."""


@dataclass(frozen=True)
class Type:
    """A feature's type, `str` of which is what `dataset.json` calls it.

    Args:
        kind: "bytes", "int64" or "float32".
        shape: of its values; None where their number differs.
    """

    kind: str
    shape: tuple[int, ...] | None

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.kind}[?]"
        return self.kind + (f"[{','.join(map(str, self.shape))}]" if self.shape else "")

    def also(self, name: str, value: Any) -> "Type":
        """The type that holds this value too; a flat list may have any length.

        >>> str(type_of("age", 3.5).also("age", 4))
        'float32'

        Raises:
            NotAValue: there is none.
        """
        kind, shape = _kind_and_shape(name, value, self.kind)
        if kind != self.kind:
            remedy = ", with a point in the first record if it shall be one" if kind == "float32" else ""
            raise NotAValue(f"an object whose {name!r} is {kind}, where the first record has {self}{remedy}")
        if shape == self.shape:
            return self
        if len(shape) == 1 and (self.shape is None or len(self.shape) == 1):
            return replace(self, shape=None)
        raise NotAValue(f"an object whose {name!r} is {Type(kind, shape)}, where the first record has {self}")


def type_of(name: str, value: Any) -> Type:
    """The type of a value.

    >>> [str(type_of("", value)) for value in (3, 3.0, "cat", [1, 2], [[1.0, 2], [3, 4]], ["a"])]
    ['int64', 'float32', 'bytes', 'int64[2]', 'float32[2,2]', 'bytes[1]']

    Raises:
        NotAValue: it is no number, text or list of them that has a shape.
    """
    return Type(*_kind_and_shape(name, value, None))


def stored(value: Any, of: Type) -> Any:
    """What goes into the record: an array, or bytes, or a list of bytes."""
    if of.kind != "bytes":
        return np.array(value, np.int64 if of.kind == "int64" else np.float32)
    return value.encode() if isinstance(value, str) else [text.encode() for text in value]


def _kind_and_shape(name: str, value: Any, known: str | None) -> tuple[str, tuple[int, ...]]:
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts) and (texts or known == "bytes"):
        _check_texts(name, texts)
        return "bytes", () if isinstance(value, str) else (len(value),)
    try:
        array = np.array(value)
    except (ValueError, OverflowError):
        array = np.array(None)
    if array.size == 0 and array.ndim == 1 and known in ("int64", "float32"):
        return known, array.shape
    if array.dtype.kind not in "if" or not array.size:
        raise NotAValue(
            f"an object whose {name!r} is {_short(value)}, which is no number, text or list of them with a shape"
        )
    if array.dtype.kind == "f" and not (abs(array) <= _FLOAT_MOST).all():
        raise NotAValue(f"an object whose {name!r} is {_short(value)}, which is too large for float32")
    return ("float32" if array.dtype.kind == "f" or known == "float32" else "int64"), array.shape


def _check_texts(name: str, texts: list[str]) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise NotAValue(f"an object whose {name!r} is no text ({error.reason})") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
