"""The failure watch: when one rank fails, every rank ends, within seconds and with one report.

Ranks spend their time in blocking collectives; when one of them raises, exits, is killed or stays away, the
others would wait for ever. So each rank keeps, beside the engine and independent of it, one TCP connection
to the chief from a daemon thread. No TensorFlow, no engine.

    watch = start(topology, broadcast)             # collective
    watch.install_hooks()                          # uncaught exceptions of the user's script
    with watch.running():                          # every rank is needed until the end of this block
        for step in steps:
            watch.position = f"epoch 2, step {step}"
            with watch.waiting(watch.position):    # inside something collective
                collective()

A callback's collective begins when all ranks are about to make it: one under `if session.is_chief` would pair up with
another one of the others.

    with watch.in_callback("Probe.on_epoch_end", everywhere=True):
        callback.on_epoch_end(epoch, logs)         # may wait and run as above

With one rank `start` returns a `NoWatch`: the same methods, nothing watched, exceptions take their
normal way. Callers never ask.
"""

from distfit.watch.face import NoWatch, Watch
from distfit.watch.here import Here
from distfit.watch.rank import RankWatch, start
from distfit.watch.shared import SharedWatch

__all__ = ["Here", "NoWatch", "RankWatch", "SharedWatch", "Watch", "start"]
