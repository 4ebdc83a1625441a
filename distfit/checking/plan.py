"""Which runs there are: an engine, and how the training is changed to find out why it differs. Pure.

Run(Engine("2 devices", devices=2), Variant(sync_batch_norm=True))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distfit.errors import InputError


@dataclass(frozen=True)
class Engine:
    """Who trains.

    Args:
        name: for the table.
        devices: logical devices of one process, >= 1.
        ranks: processes, >= 1; several are started by a launcher.
        permuted: the rows of every global batch are in another order: what rounding alone does.
    """

    name: str
    devices: int = 1
    ranks: int = 1
    permuted: bool = False


ALONE = Engine("alone")
PERMUTED = Engine("alone, rows permuted", permuted=True)


@dataclass(frozen=True)
class Variant:
    """How a training is changed, on every engine alike; by default not at all.

    Args:
        sync_batch_norm: BatchNormalization takes the moments of the global batch.
        random_off: layers that draw are called with training=False; what is drawn nevertheless (a VAE's noise, a
            GAN's) is drawn for the global batch, and each replica takes the numbers of its rows.
    """

    sync_batch_norm: bool = False
    random_off: bool = False

    @property
    def title(self) -> str:
        """For the table and for messages.

        >>> Variant(True, True).title, Variant(sync_batch_norm=True).title
        ('with both', 'with sync_batch_norm=True')
        """
        if self.sync_batch_norm and self.random_off:
            return "with both"
        if self.sync_batch_norm:
            return "with sync_batch_norm=True"
        return "with random layers off" if self.random_off else "as it is written"

    @property
    def alone(self) -> Variant:
        """The same for one device, whose moments are those of the global batch anyway."""
        return Variant(random_off=self.random_off)


AS_WRITTEN = Variant()


@dataclass(frozen=True)
class Run:
    """One training, in processes of its own."""

    engine: Engine
    variant: Variant = AS_WRITTEN

    def __str__(self) -> str:
        return self.engine.name + ("" if self.variant == AS_WRITTEN else f" {self.variant.title}")

    @property
    def truth(self) -> Run:
        """What it is compared with."""
        return Run(ALONE, self.variant.alone)

    @property
    def control(self) -> Run:
        """What rounding alone does to that."""
        return Run(PERMUTED, self.variant.alone)


def engines_of(devices: Sequence[int], ranks: Sequence[int]) -> list[Engine]:
    """The engines that are compared with one device, the cheapest first.

    Raises:
        InputError: a number below 2, or none at all.

    >>> [engine.name for engine in engines_of([2, 3], [2])]
    ['2 devices', '3 devices', '2 ranks']
    """
    for what, numbers in (("devices", devices), ("ranks", ranks)):
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or number < 2:
                raise InputError(f"Expected numbers of {what} of at least 2 to compare with one, received {number!r}.")
    found = [Engine(f"{number} devices", devices=number) for number in dict.fromkeys(devices)]
    found += [Engine(f"{number} ranks", ranks=number) for number in dict.fromkeys(ranks)]
    if not found:
        raise InputError("Expected devices or ranks to compare with one device, received none of both.")
    return found


def variants_of(batch_norm: bool, random: bool) -> list[Variant]:
    """What is tried when a training differs: each change alone, and at last all of them.

    Args:
        batch_norm: the model normalises with the moments of each replica's rows.
        random: it draws random numbers.

    >>> [variant.title for variant in variants_of(True, True)]
    ['with sync_batch_norm=True', 'with random layers off', 'with both']
    """
    single = [Variant(sync_batch_norm=True)] * batch_norm + [Variant(random_off=True)] * random
    return single + [Variant(True, True)] * (batch_norm and random)
