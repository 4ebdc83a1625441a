"""The block that opens a run: what is trained by whom, on what, in which steps, and where it goes.

    log.say(start_block(facts))

Pure text, at most 80 columns, readable in a log file.
"""

import textwrap
from collections import Counter
from dataclasses import dataclass, field

_WIDTH = 80
_LABEL = 18


@dataclass(frozen=True)
class StartFacts:
    """What is known when training starts.

    Args:
        strategy: the engine's name.
        ranks: processes of the job, >= 1.
        hosts: host names, one for each host or one for each rank; repeated ones are counted.
        devices: names of the devices of this run; repeated ones are counted.
        replicas: copies of the model, >= 1.
        global_batch: records of one step over all replicas; None when the data does not say.
        records: records of the data; None when the data does not say.
        endless: an epoch goes on where the one before it stopped, pass after pass; else it is one pass.
        steps_per_epoch: None when the data does not say.
        seed: None when everything is left to chance.
        log_dir: folder of the TensorBoard logs; None when there are none.
        checkpoint: folder of the checkpoints; None when there are none.
        callbacks: where the user's run; "" where there is nothing to say.
        notes: sentences about what cannot be equal to one process, or what was assumed.
    """

    strategy: str
    ranks: int
    hosts: list[str]
    devices: list[str]
    replicas: int
    global_batch: int | None
    records: int | None = None
    endless: bool = False
    steps_per_epoch: int | None = None
    seed: int | None = None
    log_dir: str | None = None
    checkpoint: str | None = None
    callbacks: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def batch_per_replica(self) -> str:
        """Records of one replica in a full step: "32", or "22 or 21" when the batch does not divide.

        >>> StartFacts("mirrored", 1, ["h"], ["CPU"], replicas=3, global_batch=64).batch_per_replica
        '22 or 21'
        """
        if self.global_batch is None:
            return "unknown"
        share, rest = divmod(self.global_batch, self.replicas)
        return f"{share + 1} or {share}" if rest else str(share)


def start_block(facts: StartFacts) -> str:
    """The block, without a newline at its end.

    >>> print(start_block(StartFacts("horovod", 2, ["h0", "h1"], ["GPU", "GPU"], 2, 64, records=1000)))
    distfit
      strategy        horovod
      ranks           2 on h0, h1
      devices         2 x GPU
      replicas        2
      global batch    64 (32 per replica)
      records         1,000 per epoch
      steps           unknown until the first epoch ends
      seed            none: every run is another one
      logs            none
      checkpoint      none
    """
    rows = [
        ("strategy", facts.strategy),
        ("ranks", f"{facts.ranks:,} on {_counted(facts.hosts)}"),
        ("devices", _counted(facts.devices)),
        ("replicas", f"{facts.replicas:,}"),
        ("global batch", _batch(facts)),
        ("records", _records(facts)),
        ("steps", _steps(facts.steps_per_epoch)),
        ("seed", "none: every run is another one" if facts.seed is None else str(facts.seed)),
        ("logs", facts.log_dir or "none"),
        ("checkpoint", facts.checkpoint or "none"),
        *([("callbacks", facts.callbacks)] if facts.callbacks else []),
        *(("note", note) for note in facts.notes),
    ]
    return "\n".join(["distfit", *(_row(label, text) for label, text in rows)])


def _row(label: str, text: str) -> str:
    """One fact; long texts go on below, long paths are broken only where nothing else helps."""
    return textwrap.fill(
        text,
        width=_WIDTH,
        initial_indent=f"  {label}".ljust(_LABEL),
        subsequent_indent=" " * _LABEL,
        break_on_hyphens=False,
    )


def _batch(facts: StartFacts) -> str:
    if facts.global_batch is None:
        return "as the data comes"
    return f"{facts.global_batch:,} ({facts.batch_per_replica} per replica)"


def _records(facts: StartFacts) -> str:
    if facts.records is None:
        return "unknown"
    return f"{facts.records:,}{', read pass after pass' if facts.endless else ' per epoch'}"


def _steps(steps: int | None) -> str:
    return "unknown until the first epoch ends" if steps is None else f"{steps:,} per epoch"


def _counted(names: list[str], most: int = 8) -> str:
    """Names in order, each once with its number, the tail of a long list as a number.

    >>> _counted(["h0", "h0", "h1"]), _counted(["a", "b", "c"], most=2)
    ('2 x h0, h1', 'a, b and 1 more')
    """
    shown = [f"{count} x {name}" if count > 1 else name for name, count in Counter(names).items()]
    tail = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + tail if shown else "unknown"
