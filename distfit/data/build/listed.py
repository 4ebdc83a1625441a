"""From a listing to a data set: list, check every file, write; what an interrupted build has done is kept.

build_listed(lambda: folder_listing("pictures"), "data/pictures", seed=0, max_side=512)
"""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable
from contextlib import closing
from typing import Any

from distfit.data.ahead import ahead
from distfit.data.build.check import check_files
from distfit.data.build.checked_images import CheckedImages
from distfit.data.build.journal import Journal
from distfit.data.build.listing import IMAGE, Listing
from distfit.data.build.shrink import QUALITY, Shrink, libraries
from distfit.data.build.split import Layout
from distfit.data.build.whole_folder import INPUTS, check_free, whole_folder
from distfit.data.build.writer import write_in
from distfit.data.description import NAME, Description
from distfit.errors import InputError
from distfit.monitor.counting import Counting, silent

MOST_LISTED = 20
# Of what a build writes for the same inputs: a build that another version of it began is not gone on with.
VERSION = 1
# Files whose size and time one thread asks for.
_BLOCK = 512


def build_listed(
    listing_of: Callable[[], Listing],
    out: str | os.PathLike,
    *,
    skip_bad: bool = False,
    max_side: int | None = None,
    quality: int | None = None,
    force: bool = False,
    fresh: bool = False,
    threads: int | None = None,
    count: Counting = silent,
    **layout: Any,
) -> Description:
    """Builds a data set from what is listed; the bytes of an image are stored as they are, or it is shrunk.

    Interrupted by Ctrl-C, SIGTERM or SIGKILL it keeps what it has done in a hidden folder beside `out`, and the same
    call goes on from there. The result is the same bytes in any case, and with any number of threads.

    Args:
        listing_of: lists what the data set shall be made of.
        out: the folder to make.
        skip_bad: leave out what can be no record and list it on standard error, instead of refusing it.
        max_side: pixels; an image (of the feature `image`) whose longer side has more is made so small and stored
            as JPEG. None keeps all as they are.
        quality: of that JPEG, 1 to 100, by default 90.
        force: replace a data set that is there already.
        fresh: do not go on with an interrupted build.
        threads: as for `write_dataset`.
        count: shows how far it is.
        layout: seed, validation_fraction, shards, validation_shards, shard_bytes, as for `write_dataset`.

    Raises:
        InputError: something can be no record, a class has none, an option is out of its range, or `out` is no
            place to build in.
        RunError: a file changed while the data set was built, or writing failed; nothing is left of it.
    """
    shared_out, shrink = Layout(**layout), _shrink(max_side, quality)
    place = os.path.realpath(out)
    check_free(place, NAME, force)
    listing = listing_of()
    _check_listing(listing, shared_out, shrink)
    for note in listing.notes:
        _say(note)
    facts = _facts(listing, shared_out, shrink, skip_bad)
    with whole_folder(place, NAME, force, facts, fresh, _say) as work:
        if work.resumed:
            _say("going on with the build that was interrupted; --fresh begins anew.")
        with closing(Journal(work.file("checked"))) as journal:
            checked = check_files(listing, journal, threads, count)
        _check_wrong(checked.listing, skip_bad)
        checked.listing.check_classes()
        source = CheckedImages.of(checked, shrink, threads)
        built = write_in(work, source, shared_out, threads, count, shrink)
    return dataclasses.replace(built, folder=place)


def _shrink(max_side: int | None, quality: int | None) -> Shrink | None:
    if max_side is not None:
        return Shrink(max_side, QUALITY if quality is None else quality)
    if quality is not None:
        raise InputError(
            f"Expected --quality with --max-side, as other images are stored as they are, received quality {quality} "
            "alone. Pass both, or leave it out."
        )
    return None


def _check_listing(listing: Listing, layout: Layout, shrink: Shrink | None) -> None:
    """Refuses before hours of reading what would be refused after them."""
    listing.check_classes()
    layout.files(listing, layout.members(listing))
    if shrink and IMAGE not in listing.file_features:
        raise InputError(
            f"Expected a file called {IMAGE!r} in the records of {listing.name} to make smaller, received "
            f"{', '.join(listing.file_features) or 'none'}. Rename it, or leave --max-side out."
        )


def _facts(listing: Listing, layout: Layout, shrink: Shrink | None, skip_bad: bool) -> dict[str, Any]:
    """All that decides about the bytes of the data set."""
    return {
        "build": VERSION,
        **dataclasses.asdict(layout),
        "max_side": shrink.max_side if shrink else None,
        "quality": shrink.quality if shrink else None,
        "skip_bad": skip_bad,
        "libraries": libraries(),
        INPUTS: _digest(listing),
    }


def _digest(listing: Listing) -> str:
    """Of all that is listed, and of the sizes and times of its files."""
    digest = listing.digest()
    blocks = (range(start, min(start + _BLOCK, len(listing))) for start in range(0, len(listing), _BLOCK))
    with closing(ahead(lambda block: _sizes_and_times(listing, block), blocks)) as parts:
        for part in parts:
            digest.update(part)
    return digest.hexdigest()


def _sizes_and_times(listing: Listing, numbers: range) -> bytes:
    digest = hashlib.blake2b()
    for number in numbers:
        for path in listing.paths(number):
            try:
                status = os.stat(path)
            except OSError as error:  # the check says so
                digest.update(f"{error.errno};".encode())
            else:
                digest.update(f"{status.st_size} {status.st_mtime_ns};".encode())
    return digest.digest()


def _check_wrong(listing: Listing, skip_bad: bool) -> None:
    wrong = [f"\n  {bad.where} is {bad.reason}" for bad in listing.wrong]
    if skip_bad and wrong:
        _say(f"left out {len(wrong)}, kept {len(listing):,} {listing.unit}:{''.join(wrong)}")
    elif wrong:
        more = f"\n  and {len(wrong) - MOST_LISTED} more" if len(wrong) > MOST_LISTED else ""
        raise InputError(
            f"Expected {listing.expected}, received {len(wrong)} of another kind beside "
            f"{len(listing):,} {listing.unit}:{''.join(wrong[:MOST_LISTED])}{more}\nRemove or replace them, or pass "
            "--skip-bad to leave them out."
        )


def _say(sentence: str) -> None:
    print(f"distfit: {sentence}", file=sys.stderr, flush=True)
