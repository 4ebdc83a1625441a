"""`distfit bench ...`: is it fast on this machine?"""

from typing import Annotated

import typer

from distfit.cli.frame import say_now
from distfit.errors import InputError

# What --quick changes: enough to see that everything runs, not to quote.
_QUICK_SECONDS, _QUICK_ROUNDS = 0.1, 1

Seconds = Annotated[float, typer.Option("--seconds", min=0.05, help="Of each pass, about.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Passes of each way; the median counts.")]
Cores = Annotated[str, typer.Option("--cores", metavar="N,...", help="How many cores to measure on.")]
ImageKinds = Annotated[
    str, typer.Option("--images", metavar="KIND,...", help="Of 25 KB, 110 KB and 12 MP; all unless given.")
]
Quick = Annotated[bool, typer.Option("--quick", help="One short pass of each: does it run? The figures mean little.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write all figures there too.")]


def bench_input(
    seconds: Seconds = 0.7,
    rounds: Rounds = 5,
    cores: Cores = "1,2",
    images: ImageKinds = "25 KB,110 KB,12 MP",
    quick: Quick = False,
    json: Json = None,
) -> None:
    """Measure reading, decoding and resizing of JPEGs against what else there is, and print the ratios.

    The references run in the same rounds on the same images and cores: libjpeg-turbo alone, simplejpeg with OpenCV
    in threads, the pipeline of tutorials and tensorflow.org's recipe. Images are made, nothing is downloaded. It takes
    about five minutes and 0.5 GB of the temporary folder; nothing else should run meanwhile.

    \b
    Example:
      distfit bench input
      distfit bench input --cores 1,2,8 --images "25 KB"
      distfit bench input --quick
    """
    from distfit.bench.report import text
    from distfit.bench.rounds import measured
    from distfit.install.process import ended_through_finally
    from distfit.monitor.counting import shown

    if quick:
        seconds, rounds = _QUICK_SECONDS, _QUICK_ROUNDS
    with ended_through_finally():
        results = measured(_kinds(images), _numbers(cores), seconds, rounds, shown)
    if json is not None:
        with open(json, "w", encoding="utf-8") as file:
            file.write(results.to_json())
    say_now(text(results.rates, results.machine))


def _kinds(names: str) -> list:
    from distfit.bench.samples import KINDS

    wanted = [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in KINDS]
    if unknown:
        raise InputError(f"Expected --images among {', '.join(KINDS)}, received {', '.join(map(repr, unknown))}.")
    return [KINDS[name] for name in wanted]


def _numbers(cores: str) -> list[int]:
    try:
        return [int(number) for number in cores.split(",")]
    except ValueError:
        raise InputError(f"Expected --cores to be numbers such as 1,2, received {cores!r}.") from None
