"""Checked records as the writer takes them, large images made smaller on the way.

source = CheckedImages.of(checked, Shrink(512), threads=None)
source.record(7), source.sizes, source.image_format
"""

import dataclasses
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from distfit.data.ahead import ahead
from distfit.data.build.check import Checked
from distfit.data.build.image_check import FORMATS
from distfit.data.build.listing import IMAGE
from distfit.data.build.shrink import Shrink
from distfit.data.plan import permutation

# How large shrunk images will be is learnt from so many.
_SAMPLE = 256
_JPEG = FORMATS.index("jpeg")


@dataclass(frozen=True, eq=False)
class CheckedImages:
    """A `labelled.Writable` of records whose files were checked.

    Args:
        checked: the records.
        shrink: makes images smaller; None where all are stored as they are.
        large: whether the image of a record is shrunk, bool.
        sizes: bytes of the files of each record; estimated where the image is shrunk.
    """

    checked: Checked
    shrink: Shrink | None
    large: np.ndarray
    sizes: np.ndarray

    pixels = None

    @classmethod
    def of(cls, checked: Checked, shrink: Shrink | None, threads: int | None) -> "CheckedImages":
        """The records, those whose image is larger than `shrink` allows shrunk when they are read.

        Args:
            threads: that shrink a sample, from which the sizes are estimated.
        """
        sizes = checked.facts["size"].sum(axis=1)
        if shrink is None:
            return cls(checked, None, np.zeros(len(sizes), bool), sizes)
        image = checked.facts[:, checked.listing.file_features.index(IMAGE)]
        images = cls(checked, shrink, image["side"] > shrink.max_side, sizes)
        after = images._share_of_bytes(threads) * image["size"]
        return dataclasses.replace(images, sizes=np.where(images.large, sizes - image["size"] + after, sizes))

    def _share_of_bytes(self, threads: int | None) -> float:
        """Bytes after by bytes before of a sample, which depends on nothing but how many images are large, so that
        the number of shards does, too."""
        numbers = np.flatnonzero(self.large)
        sample = numbers[permutation(len(numbers), 0)[:_SAMPLE]].tolist()
        with closing(ahead(self._bytes_before_and_after, sample, threads)) as sizes:
            before, after = np.array([(0, 0), *sizes]).sum(axis=0).tolist()
        return after / max(1, before)

    def _bytes_before_and_after(self, number: int) -> tuple[int, int]:
        assert self.shrink is not None
        image = self.checked.read(number)[IMAGE]
        return len(image), len(self.shrink(image))

    @property
    def name(self) -> str:
        return self.checked.listing.name

    @property
    def classes(self) -> tuple[str, ...]:
        return self.checked.listing.classes

    @property
    def labels(self) -> np.ndarray:
        return self.checked.listing.labels

    @property
    def features(self) -> dict[str, str]:
        return self.checked.listing.features

    @property
    def given_split(self) -> np.ndarray | None:
        return self.checked.listing.given_split

    @property
    def image_format(self) -> str | None:
        """The one format of all that is stored as `image`, "mixed", or None where nothing is."""
        if IMAGE not in self.checked.listing.file_features:
            return None
        stored = self.checked.facts["format"][:, self.checked.listing.file_features.index(IMAGE)]
        names = {FORMATS[code] for code in np.unique(np.where(self.large, _JPEG, stored))}
        return names.pop() if len(names) == 1 else "mixed"

    def record(self, number: int) -> dict[str, Any]:
        """The features of one record without its label.

        Raises:
            RunError: a file has changed since it was checked.
        """
        files: dict[str, Any] = self.checked.read(number)
        if self.shrink and self.large[number]:
            files[IMAGE] = self.shrink(files[IMAGE])
        return files | self.checked.listing.rest(number)
