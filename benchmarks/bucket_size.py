"""How many bytes of gradients should travel together: seconds a step over the size of a bucket, two ranks.

    python -m benchmarks.bucket_size                      on one host, by mpirun; 15 minutes on two cores
    python -m benchmarks.bucket_size --link-mbit 2000     two hosts (network namespaces, as root) with such a link
    mpirun -np 16 -H ... python -m benchmarks.bucket_size      on a cluster of yours, inside of a job

The gradients are those of ResNet-50's kernels: 54 tensors, 102 MB, made by layers that compute nothing. The first table
has nothing but the sum, the second a backward pass that takes its time, as on a GPU: each layer sleeps, which leaves
the cores to the communication. Layers that really compute cannot be used on a machine of few cores: they, MPI and the
copies into buckets fight for them, and nothing can be hidden behind anything.

Every figure goes through `distfit.fit(bucket_bytes=...)`. Sizes take turns in rounds, and each is compared to
the default's time of its own round. Run it in the root of a checkout, with `distfit horovod install` done.
docs/guides/communication.md has what was seen.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from distfit.topology import launched
from distfit.training.reduction import BUCKET_BYTES
from tests.ranks import ROOT, command, environment
from tests.two_hosts import INTERFACE, NAMES, two_hosts

KIB, MIB = 2**10, 2**20
SIZES_KIB = (256, 1024, 4096, 8192, 16384, 32768, 65536, 262144)
# The first ones trace, and compare the ranks.
WARM_UP_STEPS = 3
LIMIT_S = 3000


def main(arguments: Sequence[str]) -> int:
    """Start the ranks, or be one of them."""
    asked = _parsed(arguments)
    if launched(os.environ):
        measure(asked)
        return 0
    # Sleeping layers each keep a thread waiting.
    env = environment(TF_NUM_INTEROP_THREADS="4")
    program = ["-m", "benchmarks.bucket_size", *arguments]
    if asked.link_mbit is None:
        return subprocess.run(command(program, asked.ranks, "mpirun"), cwd=ROOT, env=env, check=False).returncode
    return _on_two_hosts(program, env, asked.link_mbit)


def measure(asked: argparse.Namespace) -> None:
    """In a rank: time every size, and let the chief print the curve."""
    import distfit

    session = distfit.init()
    say = print if session.is_chief else _silent
    for backward_ms in asked.backward_ms:
        model = gradients_of_resnet50(backward_ms / 1e3)
        sizes = sorted({BUCKET_BYTES, *(kib * KIB for kib in asked.kib)})
        seconds: dict[int, list[float]] = {size: [] for size in sizes}
        for number in range(asked.rounds):
            for size in sizes if number % 2 == 0 else reversed(sizes):
                seconds[size].append(_seconds_a_step(model, size, asked.steps, session.num_replicas))
        say(f"\n{session.size} ranks, backward pass of {backward_ms:g} ms")
        say("\n".join(table(seconds, BUCKET_BYTES)), flush=True)


def table(seconds: dict[int, list[float]], default: int) -> list[str]:
    """The curve, a line a size.

    Args:
        seconds: a step's, of each size in each round.
        default: what others are compared to.

    >>> print("\\n".join(table({2**20: [0.3, 0.2], 2**25: [0.2, 0.1]}, 2**25)))
       bucket   ms a step   of the default's
        1 MiB       250.0               1.75
       32 MiB       150.0               1.00
    """
    rows = [f"{'bucket':>9}   {'ms a step':>9}   {'of the default' + chr(39) + 's':>16}"]
    for size, own in seconds.items():
        ratio = median(each / of_default for each, of_default in zip(own, seconds[default], strict=True))
        rows.append(f"{_in_words(size):>9}   {median(own) * 1e3:>9.1f}   {ratio:>16.2f}")
    return rows


def gradients_of_resnet50(backward_s: float) -> Any:
    """A model with the kernels of ResNet-50, whose layers compute nothing and whose backward pass takes its time.

    Args:
        backward_s: spread over the layers; 0 for none.
    """
    import keras

    original = keras.applications.ResNet50(weights=None)
    kernels = [tuple(weight.shape) for weight in original.trainable_weights if len(weight.shape) > 1]
    layers = [_idle_layer(kernel, backward_s / len(kernels)) for kernel in kernels]
    model = keras.Sequential([keras.Input((1,)), *layers])
    model.compile(keras.optimizers.SGD(1e-9), "mse")
    return model


def _idle_layer(shape: tuple[int, ...], pause_s: float) -> Any:
    import keras
    import numpy as np
    import tensorflow as tf

    def rest(_: Any) -> Any:
        time.sleep(pause_s)
        return np.float32(0)

    @tf.custom_gradient
    def idle(x: Any, kernel: Any) -> Any:
        def gradient(upstream: Any) -> Any:
            # Depends on what comes from the layer behind, so that layers follow one another.
            zero = tf.numpy_function(rest, [upstream], tf.float32) if pause_s else 0 * tf.reduce_sum(upstream)
            zero = tf.ensure_shape(zero, [])
            return upstream + zero, tf.broadcast_to(zero, kernel.shape)

        return tf.identity(x), gradient

    class Idle(keras.layers.Layer):
        def build(self, input_shape: Any) -> None:
            self.kernel = self.add_weight(shape=shape, initializer="zeros")

        def call(self, x: Any) -> Any:
            return idle(x, tf.convert_to_tensor(self.kernel.value))

    return Idle()


def _seconds_a_step(model: Any, bucket_bytes: int, steps: int, replicas: int) -> float:
    import keras
    import numpy as np

    import distfit

    times: list[float] = []
    clock = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: times.append(time.perf_counter()))
    rows = np.zeros(((WARM_UP_STEPS + steps) * replicas, 1), np.float32)
    distfit.fit(
        model, rows, rows, batch_size=replicas, verbose=0, callbacks=[clock], bucket_bytes=bucket_bytes, shuffle=False
    )
    return median(np.diff(times)[WARM_UP_STEPS - 1 :])


def _on_two_hosts(program: list[str], env: dict[str, str], link_mbit: int) -> int:
    with tempfile.TemporaryDirectory() as scratch, two_hosts(Path(scratch)) as hosts:
        for name in NAMES:
            # The queue holds what a link of this speed carries in 10 ms.
            shape = f"tc qdisc add dev {INTERFACE} root tbf rate {link_mbit}mbit burst 256kb latency 10ms"
            shaped = hosts.run(name, shape.split(), env, ROOT)
            if shaped.code:
                print(shaped.report())
                return shaped.code
        options = ["--hosts", ",".join(f"{name}:1" for name in NAMES), "--interface", INTERFACE, "--launcher", "mpirun"]
        launch = [sys.executable, "-m", "distfit", "launch", *options, "--allow-run-as-root", "--", "python", *program]
        job = hosts.run("h1", launch, env, ROOT, limit_s=LIMIT_S)
    print(job.output if job.code == 0 else job.report())
    return job.code


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.bucket_size", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--link-mbit", type=int, help="two hosts of one rank each, with a link of so many Mbit/s")
    parser.add_argument("--kib", type=int, nargs="+", default=SIZES_KIB, help="sizes beside the default's")
    parser.add_argument("--backward-ms", type=float, nargs="+", default=[0, 150])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    return parser.parse_args(arguments)


def _in_words(size: int) -> str:
    """
    >>> _in_words(256 * KIB), _in_words(32 * MIB)
    ('256 KiB', '32 MiB')
    """
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def _silent(*words: Any, **options: Any) -> None:
    """What ranks other than the chief say."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
