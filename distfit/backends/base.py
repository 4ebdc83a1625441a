"""What distfit asks of an engine, and nothing else about it.

A step is one function that every replica runs. Inside it, `sum` is the only collective; around it,
`adopted` lends the model's variables to the engine and gives them back. Capabilities are attributes:
nobody compares a backend's name. A new engine is one file beside this one, its host transport, and the
conformance tests (`tests/conformance.py`) that it must pass.

    backend.start()
    backend.build(model, data_spec)
    with backend.adopted(model):
        results = backend.run(step, shards)      # one result a local replica
    backend.stop()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from distfit.backends.devices import gpu_identities
from distfit.backends.transport import Transport
from distfit.topology import Topology


class Backend(ABC):
    """One engine: how replicas run a step and how they share what they computed.

    Attributes:
        title: for the start block, e.g. "mirrored (tf.distribute.MirroredStrategy)".
        topology: this process's place, complete once `start` has returned.
        transport: carries host values between processes.
        devices: the devices of this process's replicas, e.g. ["GPU:0"].
        supports_jit: whether Keras may put the whole step into one XLA program; False where the step
            contains a collective.
        reduction_dtypes: in which types gradients may travel, and be summed, instead of their own.
    """

    title: str
    topology: Topology
    transport: Transport
    devices: list[str]
    supports_jit = False
    reduction_dtypes: Sequence[str] = ("float32", "float16", "bfloat16")

    @abstractmethod
    def start(self) -> None:
        """Take the devices and meet the other processes.

        Raises:
            InputError: the devices are not there, or TensorFlow has already started without them.
        """

    def gpus_taken(self) -> list[str]:
        """The identities of the GPUs among `devices`; `devices.gpu_identities` has those of all that are seen."""
        numbers = [int(device.removeprefix("GPU:")) for device in self.devices if device.startswith("GPU:")]
        return [gpu_identities()[number] for number in numbers]

    def stop(self) -> None:
        """Leave the job. Nothing to do for an engine that lives in this process alone."""
        return None

    def build(self, model: Any, data_spec: Any, targets: bool = True) -> None:
        """Make every variable that a step would make, where several replicas have to share them.

        Args:
            model: a Keras model.
            data_spec: tf.TypeSpecs of the (x, y, sample_weight) that it will see.
            targets: a loss and metrics follow; False for a prediction, which needs the layers alone.

        Raises:
            InputError: Keras cannot build the model from the shapes of its data alone.
        """
        return None

    @abstractmethod
    def adopted(self, model: Any) -> AbstractContextManager[None]:
        """The model, built, trained by this engine inside and plain Keras again outside.

        On entry every replica holds the chief's values. The objects of the model, its layers, its
        optimizer and the user's references stay what they are.
        """

    @abstractmethod
    def run(self, function: Callable[..., Any], shards: Sequence[Sequence[Any]]) -> list[Any]:
        """Call `function(*shards[r])` on every local replica r; one result each, in their order."""

    @abstractmethod
    def replica(self) -> int:
        """Inside `run`: the job-wide number of the replica that asks."""

    @abstractmethod
    def sum(self, tensors: Sequence[Any], name: str) -> list[Any]:
        """Inside `run`: each tensor summed over all replicas of the job, in one fixed order of collectives.

        Args:
            tensors: dense, of the same shapes and types on every replica.
            name: the same on every replica, distinct within one step.
        """

    @abstractmethod
    def gather(self, tensors: Sequence[Any], name: str) -> list[Any]:
        """Inside `run`: each tensor's rows of all replicas of the job, one after the other in the replicas' order.

        Args:
            tensors: of at least one row; replicas may have different numbers of them.
            name: as of `sum`.
        """

    def updating(self) -> AbstractContextManager[None]:
        """Inside `run`: held around the optimizer, whose gradients are already summed."""
        return nullcontext()

    def failed_elsewhere(self, error: BaseException) -> bool:
        """Whether an error only says that another process has gone, so that its cause is to be told there."""
        return False

    def first_copy(self, variable: Any) -> Any:
        """Outside `run`: the tf.Variable that the first local replica holds for a Keras variable."""
        return variable._value

    def replica_values(self, variable: Any) -> list[Any]:
        """Outside `run`: what each local replica holds in a Keras variable, as NumPy arrays."""
        return [variable.numpy()]
