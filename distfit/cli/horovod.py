"""`distfit horovod ...`: the library that jobs of several ranks need."""

from typing import Annotated

import typer

from distfit.cli.frame import say_now


def install(
    force: Annotated[bool, typer.Option("--force", help="Build anew, whatever is there.")] = False,
) -> None:
    """Build Horovod for this Python environment, or take it from the cache.

    \b
    Example:
      distfit horovod install
    """
    from distfit.install import horovod

    horovod.install(force=force, say=say_now)
