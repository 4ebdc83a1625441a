"""Reads every byte of a data set and says what is bad, going on behind damage where the files allow it.

    verdict = verify(find_data(["data/digits"]), jobs=4)
    verdict.bad            # (Bad(".../train-00003-of-00008.tfrecord", 17, 48213, "the feature 'image' is ..."),)

Files are shared out to processes: parsing and reading headers hold Python's lock, so threads would take turns.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from distfit.data import description as described
from distfit.data import storage
from distfit.data.description import Description, parse_feature
from distfit.data.framing import Damaged
from distfit.data.inspect.features import Seen
from distfit.data.inspect.file_check import TICK_BYTES, Bad, Checked, Task, check_file, records_in
from distfit.data.inspect.found import Data
from distfit.data.inspect.processes import in_processes
from distfit.data.inspect.record_check import IMAGE, Expected
from distfit.data.inspect.walk import Payload
from distfit.monitor.counting import Counting, silent

# Of the first records of a split, to see what they are and which features are images.
_SAMPLE = 64
# Starting a process takes as long as checking so much.
_BYTES_WORTH_A_PROCESS = 10**8


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Args:
        files, bytes: that were read.
        records: whole ones.
        images: values of image features that were looked at.
        bad: what is bad, in the order of the files.
        notes: what was not checked and why, sentences.
        seconds: it took.
    """

    files: int
    bytes: int
    records: int
    images: int
    bad: tuple[Bad, ...]
    notes: tuple[str, ...]
    seconds: float


def verify(
    data: Data,
    *,
    jobs: int | None = None,
    labels: bool = True,
    decode: bool = False,
    count: Counting = silent,
) -> Verdict:
    """Checks every length and checksum, that every record parses and every image has a good header; with a
    `dataset.json` also features, labels and counts.

    Args:
        data: which files, and what is said about them; files that are missing are bad.
        jobs: processes, by default one a core where there is enough to do. More than one start Python anew, so a
            script that calls this has to guard its main part by `if __name__ == "__main__"`.
        labels: whether to hold labels against the classes.
        decode: decode every image, instead of reading its header.
        count: shows how far it is, in MB.

    Raises:
        RunError: a process was killed.
    """
    start = time.monotonic()
    asked = {split: _asked(data.description, files, labels, decode) for split, files in data.splits.items()}
    tasks = {split: _tasks(data.description, split, files, asked[split]) for split, files in data.splits.items()}
    flat = [task for of_split in tasks.values() for task in of_split]
    megabytes = sum(_size(task.path) for task in flat) // TICK_BYTES
    with count("Verifying", megabytes, "MB") as done:
        results = iter(in_processes(check_file, flat, jobs or _jobs(megabytes), done))
    checked = {split: list(itertools.islice(results, len(of_split))) for split, of_split in tasks.items()}
    return _verdict(data.description if labels else None, checked, asked, time.monotonic() - start)


def _asked(description: Description | None, files: Sequence[str], labels: bool, decode: bool) -> Expected:
    """What the records of a split have to be, by what is said of them and by the first of them."""
    seen = Seen()
    for serialized in itertools.islice(_first_records(files), _SAMPLE):
        seen.add(serialized)
    images = tuple(found.feature for found in seen.images())
    if description is None:
        # Of records none of which can be read nobody knows.
        return Expected(images=images, decode=decode, examples=seen.others < seen.records or not seen.records)
    if description.image_format is not None:
        images = (*dict.fromkeys([*images, IMAGE]),)
    return Expected(
        features={name: parse_feature(text) for name, text in description.features.items()},
        images=images,
        classes=len(description.classes) if labels else None,
        decode=decode,
    )


def _first_records(files: Sequence[str]) -> Iterator[bytes]:
    for path in files:
        try:
            yield from (found.data for found in records_in(path) if isinstance(found, Payload))
        except (OSError, Damaged):
            continue  # said when the file's turn comes


def _tasks(description: Description | None, split: str, files: Sequence[str], expected: Expected) -> list[Task]:
    if description is None:
        return [Task(path, expected) for path in files]
    says = {shard.name: (shard.records, shard.bytes) for shard in description.splits[split].shards}
    return [Task(path, expected, says[os.path.basename(path)]) for path in files]


def _size(path: str) -> int:
    """Bytes of a file, 0 where it cannot be asked: that is told when its turn comes."""
    try:
        return storage.size_and_time(path)[0]
    except OSError:
        return 0


def _jobs(megabytes: int) -> int:
    return max(1, min(len(os.sched_getaffinity(0)), megabytes * TICK_BYTES // _BYTES_WORTH_A_PROCESS))


def _verdict(
    description: Description | None, checked: Mapping[str, list[Checked]], asked: Mapping[str, Expected], seconds: float
) -> Verdict:
    files = [one for of_split in checked.values() for one in of_split]
    bad = [bad for one in files for bad in one.bad]
    if description is not None:
        for split, of_split in checked.items():
            bad += _class_counts(description, split, of_split)
    notes = [
        f"The records of {split} are no tf.train.Examples: their framing alone was checked."
        for split, expected in asked.items()
        if not expected.examples
    ]
    return Verdict(
        files=len(files),
        bytes=sum(one.bytes for one in files),
        records=sum(one.records for one in files),
        images=sum(one.images for one in files),
        bad=tuple(bad),
        notes=tuple(notes),
        seconds=seconds,
    )


def _class_counts(description: Description, split: str, checked: Sequence[Checked]) -> list[Bad]:
    """Where all records are good, they can still be of other classes than was said."""
    if any(one.bad for one in checked):
        return []
    found = sum((one.labels for one in checked), Counter[int]())
    path = os.path.join(description.folder, described.NAME)
    return [
        Bad(path, None, None, f"{says} {split} records of the class {name!r}, where there are {found[label]}")
        for label, (name, says) in enumerate(zip(description.classes, description.splits[split].per_class, strict=True))
        if found[label] != says
    ]
