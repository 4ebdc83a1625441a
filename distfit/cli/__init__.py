"""The command `distfit`: this module is its table of contents, each command has a module beside it.

    distfit data build --images DIR OUT
    distfit data inspect DATA
    distfit checkpoint list RUN
    distfit train CONFIG.yaml key=value ...
    distfit evaluate CONFIG.yaml
    distfit launch -np N --hosts h1:4,h2:4 -- PROGRAM
    distfit check train.py
    distfit doctor
    distfit horovod install

A command imports what it needs when it runs, so that `distfit --help` loads neither TensorFlow nor Keras.
Errors that a person can act on are one paragraph on standard error, in a job of several ranks once; `--debug`
adds the traceback. Exit codes: 0, those of `distfit.errors`, 2 for a wrong command line, 130 for Ctrl-C.
"""

import os

from distfit.cli import bench, check, checkpoint, data_build, data_tools, doctor, horovod, launch, train
from distfit.cli.frame import command_line, group

app = command_line(
    "Distributed training for Keras 3: the same training on one process, a node or a cluster.",
    "distfit data build --from digits data/digits",
    "distfit train configs/digits.yaml epochs=5",
)
app.command()(train.train)
app.command()(train.evaluate)
app.command(context_settings=launch.CONTEXT)(launch.launch)
app.command(context_settings=check.CONTEXT)(check.check)
app.command()(doctor.doctor)

_data = group(
    "Build, look at and verify data sets of TFRecord shards.",
    "distfit data build --images photos data/photos",
    "distfit data inspect data/photos --ranks 8",
)
_data.command()(data_build.build)
_data.command()(data_tools.inspect)
_data.command()(data_tools.verify)
_data.command()(data_tools.index)
app.add_typer(_data, name="data")

_checkpoint = group(
    "Look at, verify, compare and export what a run has kept.",
    "distfit checkpoint list runs/a",
    "distfit checkpoint export runs/a --to model.keras",
)
_checkpoint.command("list")(checkpoint.list_)
_checkpoint.command()(checkpoint.verify)
_checkpoint.command()(checkpoint.show)
_checkpoint.command()(checkpoint.diff)
_checkpoint.command()(checkpoint.prune)
_checkpoint.command()(checkpoint.export)
app.add_typer(_checkpoint, name="checkpoint")

_bench = group("Measure this machine.", "distfit bench input --quick")
_bench.command("input")(bench.bench_input)
app.add_typer(_bench, name="bench")

_horovod = group("Horovod, for jobs of several ranks.", "distfit horovod install")
_horovod.command()(horovod.install)
app.add_typer(_horovod, name="horovod")


def main() -> None:
    """What the command `distfit` runs."""
    # TensorFlow reads it when it is imported; its notes on this machine's CPU would come from every rank.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app(prog_name="distfit")
