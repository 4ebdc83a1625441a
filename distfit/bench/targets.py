"""The ratios that say whether the input is fast: what is divided by what, and how much it should be. Pure.

    for ratio in ratios(rates):
        ratio.name, ratio.value, ratio.least, ratio.reached

A ratio is the median over rounds of the two rates of one round, which were measured one soon after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from distfit.bench.samples import SCALED, Kind

# way, reference, least, in words.
_TARGETS = (
    ("decode", "libjpeg", 0.85, "decoding, of libjpeg-turbo alone"),
    ("transform", "public", 0.85, "decoding and resizing, of simplejpeg and OpenCV in threads"),
    ("transform", "tutorial", 2.0, "of the tutorial pipeline"),
    ("transform", "recipe", 1.0, "of tensorflow.org's recipe"),
    ("random_crop", "crop_of_whole", 1.2, "random resized crop, of cutting it from the whole image"),
    ("transform", "in_file_order", 0.95, "global shuffle, of the files' order"),
)
_SCALED = ("transform", "unscaled", 2.5, "scaled decoding, of decoding everything")
_TWO_CORES = ("transform", 1.9, "two cores, of one")


@dataclass(frozen=True)
class Ratio:
    """
    Args:
        kind: name of the kind of image.
        cores: they were measured on.
        name: what is divided by what, in words.
        value: the median over rounds.
        low, high: the smallest and the largest of a round.
        least: what it should be.
    """

    kind: str
    cores: str
    name: str
    value: float
    low: float
    high: float
    least: float

    @property
    def reached(self) -> bool:
        """To the two decimals that are shown."""
        return round(self.value, 2) >= self.least


def ways_of(kind: Kind) -> list[str]:
    """The ways that a kind's ratios need, each once."""
    pairs = [target[:2] for target in _targets_of(kind.name)]
    return list(dict.fromkeys(way for pair in pairs for way in pair))


def ratios(rates: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> Iterator[Ratio]:
    """All of them, kind by kind, fewer cores first.

    >>> found = ratios({"25 KB": {"1": {"decode": [75.0, 50.0], "libjpeg": [100.0, 100.0]}}})
    >>> next(found)
    Ratio(kind='25 KB', cores='1', name='decoding, of libjpeg-turbo alone', value=0.625, low=0.5, high=0.75, least=0.85)
    """
    for kind, by_cores in rates.items():
        for cores, by_way in by_cores.items():
            for way, reference, least, name in _targets_of(kind):
                if way in by_way and reference in by_way:
                    yield _ratio(kind, cores, name, by_way[way], by_way[reference], least)
        if "1" in by_cores and "2" in by_cores:
            way, least, name = _TWO_CORES
            yield _ratio(kind, "2", name, by_cores["2"][way], by_cores["1"][way], least)


def _targets_of(kind: str) -> list[tuple[str, str, float, str]]:
    return [*_TARGETS, _SCALED] if kind == SCALED else list(_TARGETS)


def _ratio(
    kind: str, cores: str, name: str, rates: Sequence[float], references: Sequence[float], least: float
) -> Ratio:
    values = [rate / reference for rate, reference in zip(rates, references, strict=True)]
    return Ratio(kind, cores, name, median(values), min(values), max(values), least)
