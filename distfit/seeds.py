"""One seed for the job."""

from __future__ import annotations

import numbers
import secrets
from typing import TYPE_CHECKING

import keras
from keras.src.utils.rng_utils import get_random_seed
from tensorflow.python.eager.context import global_seed

from distfit.errors import InputError
from distfit.training.signature import of_seeds

if TYPE_CHECKING:
    from distfit.session import Session


def settle_seed(session: Session, seed: int | None, kept: bool = False, before: int | None = None) -> int:
    """The seed of a run, the same on every rank.

    One that is given is set as keras.utils.set_random_seed sets it. Without one, a seed that the script has
    set on all ranks is left alone; ranks that have none get that of the others, or one that the chief draws, because
    they have to shuffle alike. One process keeps its random state, as under keras.Model.fit, and the drawn
    number orders records only, unless the run is to be gone on with.

    Args:
        kept: the run may be gone on with: one process without a seed gets a drawn one too.
        before: the seed of the run that goes on, in place of a drawn one.

    Raises:
        InputError: it is no whole number from 0 to 2**32 - 1, or scripts have set different ones; on every rank.
    """
    if seed is not None:
        session.agree(lambda: check(seed))
        keras.utils.set_random_seed(seed)
        return seed
    own = get_random_seed()
    found = session.transport.gather(global_seed() if own is None else own)
    of_seeds(found)
    set_somewhere = [seed for seed in found if seed is not None]
    if len(set_somewhere) == len(found):
        return found[0]
    settled = set_somewhere[0] if set_somewhere else session.transport.broadcast(_drawn(before))
    if session.size > 1 or (kept and not set_somewhere):
        keras.utils.set_random_seed(settled)
    return settled


def _drawn(before: int | None) -> int:
    return secrets.randbelow(2**31) if before is None else before


def check(seed: int) -> None:
    """
    Raises:
        InputError: it is no whole number from 0 to 2**32 - 1.
    """
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise InputError(f"Expected seed to be a whole number from 0 to {2**32 - 1}, received {seed!r}.")
