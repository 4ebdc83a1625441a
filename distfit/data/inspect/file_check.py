"""One file of a data set, read from its beginning to its end: what is in it and what is bad.

    checked = check_file(Task("train-00000-of-00008.tfrecord", Expected(classes=10)), tick=lambda: None)
    checked.records, checked.bad

What follows damage is checked as well, as far as `walk` finds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from distfit.data import description as described
from distfit.data import storage
from distfit.data.example import NotAnExample, parse_example
from distfit.data.framing import Damaged, expanded
from distfit.data.inspect.processes import Tick
from distfit.data.inspect.record_check import Expected, faults, label_of
from distfit.data.inspect.walk import Damage, Payload, walk
from distfit.data.records import HEADER_BYTES, compression_of

TICK_BYTES = 10**6


def _silent() -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Bad:
    """Something that is bad.

    Args:
        file: that holds it.
        number: of the record in its file, from 0; None where it is about the whole file.
        offset: where the record's payload begins or, where its length is damaged, that length; in bytes, of what
            comes out of a compressed file. None as above.
        reason: what is wrong.
    """

    file: str
    number: int | None
    offset: int | None
    reason: str

    def __str__(self) -> str:
        """
        >>> print(Bad("train-00003", 17, 48213, "label 7, where classes go from 0 to 4"))
        train-00003, record 17 at byte 48213: label 7, where classes go from 0 to 4
        """
        place = "" if self.number is None else f", record {self.number}"
        return f"{self.file}{place}{'' if self.offset is None else f' at byte {self.offset}'}: {self.reason}"


@dataclass(frozen=True)
class Task:
    """One file.

    Args:
        path: of the file.
        expected: of its records.
        says: records and bytes of the file as `dataset.json` says; None without one.
    """

    path: str
    expected: Expected
    says: tuple[int, int] | None = None


@dataclass
class Checked:
    """What was found in one file: `bytes` of it, its whole `records`, the `images` in them, how often each of the
    `labels` came, what is `bad`, and whether all its records are there (`whole`), good or not."""

    bytes: int = 0
    records: int = 0
    images: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    bad: list[Bad] = field(default_factory=list)
    whole: bool = True


def check_file(task: Task, tick: Tick) -> Checked:
    """Reads one file from its beginning to its end.

    Args:
        task: the file.
        tick: called for each MB.
    """
    checked = Checked()
    try:
        checked.bytes = storage.size_and_time(task.path)[0]
        if checked.bytes:
            _check_records(task, checked, tick)
            _check_size(task, checked)
        else:
            checked.bad.append(Bad(task.path, None, None, "an empty file (0 bytes)"))
    except FileNotFoundError:
        checked.bad.append(Bad(task.path, None, None, "missing"))
    except OSError as error:
        checked.bad.append(Bad(task.path, None, None, f"cannot be read: {error.strerror or error}"))
    return checked


def _check_records(task: Task, checked: Checked, tick: Tick) -> None:
    """Adds what is found in the file to `checked`."""
    at = 0
    try:
        for number, found in enumerate(records_in(task.path, tick)):
            at = number + 1
            if isinstance(found, Damage):
                checked.whole = False
                checked.bad.append(Bad(task.path, *found))
            else:
                checked.records += 1
                reasons = _check_record(found, task.expected, checked)
                checked.bad += [Bad(task.path, found.number, found.offset, reason) for reason in reasons]
    except Damaged as damage:
        checked.whole = False
        checked.bad.append(Bad(task.path, at, None, f"{damage}; the rest of the file is not checked"))


def _check_record(found: Payload, expected: Expected, checked: Checked) -> Iterator[str]:
    if not expected.examples:
        return
    try:
        features = parse_example(found.data)
    except NotAnExample as reason:
        yield str(reason)
        return
    checked.images += sum(len(features[name].values) for name in expected.images if name in features)
    if (label := label_of(features)) is not None:
        checked.labels[label] += 1
    yield from faults(features, expected)


def _check_size(task: Task, checked: Checked) -> None:
    """A file that ends after a whole record is cut off too, when there were more."""
    if task.says is None or not checked.whole:
        return
    if (checked.records, checked.bytes) != task.says:
        records, size = task.says
        reason = f"{checked.records} records in {checked.bytes} bytes, where {described.NAME} says {records} in {size}"
        checked.bad.append(Bad(task.path, None, None, reason))


def records_in(path: str, tick: Tick = _silent) -> Iterator[Payload | Damage]:
    """The records of a file, compressed or not."""
    size = storage.size_and_time(path)[0]
    form = compression_of(storage.open_file(path).read_at(0, HEADER_BYTES))
    chunks = _ticking(storage.chunks(path), tick)
    return walk(chunks, size) if form is None else walk(expanded(chunks, form))


def _ticking(chunks: Iterable[bytes], tick: Tick) -> Iterator[bytes]:
    read = 0
    for chunk in chunks:
        yield chunk
        ticks = (read + len(chunk)) // TICK_BYTES - read // TICK_BYTES
        read += len(chunk)
        for _ in range(ticks):
            tick()
