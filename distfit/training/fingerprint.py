"""Fingerprints of tensors: 64 bits each, computed where the tensor lies, changed by any bit that flips.

    fingerprints([kernel, bias])      # an int64 vector of two numbers; also inside a replica's traced function

A tensor is read as 64-bit words. Each is mixed (multiplied, its upper half folded into its lower half), multiplied with
an odd number of its position, and the products are added up, all modulo 2**64. Each step can be undone, so that
no change of one word alone can leave the sum as it was. That changes of several words cancel each other has a chance
below 2**-31. It takes all of it: factors in a simple order (1, 3, 5) would let equal and opposite changes of neighbours
cancel, and without the mixing two flipped signs would, as the highest bit times any odd number is itself. Integers add
up to the same in any order, so that devices that sum in other orders agree, where floats would not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

# Words that are worked on at a time, so that a large table needs no second place in memory. These 4 MiB were as fast as
# any from 256 KiB to 32 MiB, and make few nodes of a graph.
CHUNK = 2**19
_WORD_BYTES = 8
# Multipliers of SplitMix64 (Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators).
_GOLDEN, _MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
_INTEGERS = {1: tf.uint8, 2: tf.int16, 4: tf.int32}


def fingerprints(values: Sequence[Any], nan_alike: bool = False, chunk: int = CHUNK) -> Any:
    """One number a tensor.

    Args:
        values: of static shapes; any type of numbers, and bool.
        nan_alike: all NaN count as the same one. Which of two NaN a sum keeps may depend on their order.
        chunk: words at a time.

    >>> one, two, same = fingerprints([tf.zeros([3]), tf.constant([0.0, -0.0, 0.0]), tf.zeros([3])]).numpy()
    >>> bool(one == same), bool(one == two)
    (True, False)
    """
    most = max(_WORD_BYTES, min(chunk, max(map(_words, values), default=0)))
    factors = _odd(tf.range(most, dtype=tf.int64))
    found: list[Any] = []
    for value in values:
        # One after the other, so that one chunk at a time lies in memory.
        with tf.control_dependencies(found[-1:]):
            found.append(_fingerprint(_nan_alike(value) if nan_alike else tf.identity(value), factors, chunk))
    return tf.stack(found) if found else tf.zeros([0], tf.int64)


def _fingerprint(value: Any, factors: Any, chunk: int) -> Any:
    total = tf.zeros([], tf.int64)
    for number, words in enumerate(_chunks(value, chunk)):
        with tf.control_dependencies([total]):
            own = tf.reduce_sum(_mixed(words) * factors[: words.shape[0]])
        total += own * _odd_number(number)
    return total


def _chunks(value: Any, size: int) -> Iterator[Any]:
    """The words of a tensor; the elements that fill no word at its end are words of their own."""
    flat = tf.reshape(tf.cast(value, tf.uint8) if value.dtype == tf.bool else value, [-1])
    each = max(1, _WORD_BYTES // flat.dtype.size)
    whole = flat.shape[0] // each
    for start in range(0, whole, size):
        stop = min(start + size, whole)
        yield _as_words(flat[start * each : stop * each], each)
    if whole * each < flat.shape[0]:
        yield tf.cast(tf.bitcast(flat[whole * each :], _INTEGERS[flat.dtype.size]), tf.int64)


def _as_words(flat: Any, each: int) -> Any:
    # complex128 has two words an element.
    return tf.reshape(tf.bitcast(tf.reshape(flat, [-1, each]) if each > 1 else flat, tf.int64), [-1])


def _mixed(words: Any) -> Any:
    # Without a sign, so that zeros come in from the left.
    plain = tf.bitcast(words * _signed(_MIX), tf.uint64)
    folded = tf.bitwise.bitwise_xor(plain, tf.bitwise.right_shift(plain, tf.constant(32, tf.uint64)))
    return tf.bitcast(folded, tf.int64)


def _words(value: Any) -> int:
    return value.shape.num_elements() * max(1, value.dtype.size // _WORD_BYTES)


def _nan_alike(value: Any) -> Any:
    if not value.dtype.is_floating:
        return tf.identity(value)
    return tf.where(tf.math.is_nan(value), tf.constant(float("nan"), value.dtype), value)


def _odd(numbers: Any) -> Any:
    """For each number of a position an odd one that nothing else is near to."""
    mixed = (numbers + 1) * _signed(_GOLDEN)
    mixed = tf.bitwise.bitwise_xor(mixed, tf.bitwise.right_shift(mixed, tf.constant(30, tf.int64))) * _signed(_MIX)
    mixed = tf.bitwise.bitwise_xor(mixed, tf.bitwise.right_shift(mixed, tf.constant(27, tf.int64)))
    return tf.bitwise.bitwise_or(mixed, tf.constant(1, tf.int64))


def _odd_number(number: int) -> int:
    """As `_odd` in spirit, of a chunk's number: another odd factor for each."""
    mixed = ((number + 1) * _MIX) % 2**64
    return _signed((mixed ^ (mixed >> 31)) | 1)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
