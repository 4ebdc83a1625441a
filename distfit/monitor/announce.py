"""Says at the start of a run who will train what, and what cannot be equal to one device."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from distfit.backends.hooks import seed_generators_of
from distfit.callbacks.policy import callback_policies
from distfit.folders import from_here
from distfit.log import say
from distfit.monitor.start_block import StartFacts, start_block
from distfit.training import batch_norm, metric_rules, own_step
from distfit.training.accumulation import batches_per_update, communicates_every_batch
from distfit.training.own_step import overrides
from distfit.training.step import Choices, synchronises

if TYPE_CHECKING:
    from distfit.data.feed import Feed
    from distfit.data.on_device import OnDevice
    from distfit.session import Session


def announce(
    session: Session,
    model: keras.Model,
    train: Feed,
    seed: int,
    choices: Choices,
    log_dir: str | os.PathLike | None,
    checkpoint: str | os.PathLike | None,
    verbose: str | int,
    learning_rate: str = "",
    callbacks: Any = None,
) -> None:
    """The start block, on the chief. Collective: hosts and devices come from every rank.

    Args:
        learning_rate: what was done about it, a sentence; "" for nothing.
        callbacks: of the user.
    """
    places = session.transport.gather((session.topology.host, session.backend.devices))
    hosts = [host for host, _ in places]
    facts = StartFacts(
        strategy=session.backend.title,
        ranks=session.size,
        hosts=hosts if len(set(hosts)) > 1 else hosts[:1],
        devices=[device for _, devices in places for device in devices],
        replicas=session.num_replicas,
        global_batch=train.source.batch_size,
        records=train.source.records,
        endless=train.endless,
        steps_per_epoch=train.num_batches,
        seed=seed,
        log_dir=None if log_dir is None else os.fspath(log_dir),
        checkpoint=None if checkpoint is None else from_here(checkpoint),
        callbacks=callback_policies(callbacks) if session.size > 1 else "",
        notes=[
            *([learning_rate] if learning_rate else []),
            *train.source.notes,
            *(unequal(model, choices, session.backend.supports_jit) if session.num_replicas > 1 else []),
            *(_of_the_device(train.source.on_device) if session.num_replicas > 1 else []),
        ],
    )
    if verbose != 0:
        say(start_block(facts))


def unequal(model: keras.Model, choices: Choices, supports_jit: bool) -> list[str]:
    """What several replicas do otherwise than one device would, a sentence each."""
    notes = own_step.notes(model)
    if normalises_by_replica(model, choices):
        notes.append(
            "BatchNormalization: each replica normalises with the moments of its own rows; sync_batch_norm=True takes "
            "those of the global batch."
        )
    if seed_generators_of(model):
        notes.append("Random layers: each replica draws from a stream of its own, made from the one seed.")
    if overrides(model, "compute_loss"):
        notes.append(
            "The model's own compute_loss counts as a mean over rows; so does a scalar that it gives "
            "to a keras.metrics.Mean."
        )
    return [*notes, *_of_the_wire(model, choices), *_of_states(model), *_of_xla(model, choices, supports_jit)]


def _of_the_device(on_device: OnDevice | None) -> list[str]:
    random = on_device is not None and any(
        seed_generators_of(part) or "seed" in inspect.signature(part).parameters for part in on_device.parts
    )
    return ["on_device: what is random there is drawn for the rows of each replica together."] if random else []


def _of_the_wire(model: keras.Model, choices: Choices) -> list[str]:
    notes = []
    if _rounds(model, choices):
        too_large = tf.as_dtype(choices.reduction_dtype).max
        notes.append(
            f"Gradients are added in {choices.reduction_dtype}, which rounds them; a sum above {too_large:.3g} is inf."
        )
    if communicates_every_batch(model):
        notes.append("gradient_accumulation_steps: replicas sum gradients after every batch, not once an update.")
    elif batches_per_update(model) > 1:
        notes.append(
            "Gradient accumulation: within an epoch the first replica's optimizer holds its own part of the gradients, "
            "and so does what a callback saves between two batches (ModelCheckpoint with a save_freq in batches)."
        )
    return notes


def _of_states(model: keras.Model) -> list[str]:
    """Of what a user's layers and metrics keep from step to step."""
    return [
        *metric_rules.notes(model),
        *(
            f"{name}: weights that it assigns by itself become their mean over the replicas, weighted by rows, as is "
            "right for averages only."
            for name in _layers_of_users_with_state(model)
        ),
    ]


def _of_xla(model: keras.Model, choices: Choices, supports_jit: bool) -> list[str]:
    if not model.jit_compile or supports_jit:
        return []
    if overrides(model, "train_step"):
        return ["jit_compile is off: replicas meet inside the model's own train_step."]
    if synchronises(model, choices):
        return ["jit_compile is off: replicas meet inside the forward pass, for BatchNormalization's moments."]
    return []


def _rounds(model: keras.Model, choices: Choices) -> bool:
    """Whether gradients lose digits on the wire."""
    if choices.reduction_dtype is None:
        return False
    sent = tf.as_dtype(choices.reduction_dtype).size
    return any(tf.as_dtype(weight.dtype).size > sent for weight in model.trainable_weights)


def normalises_by_replica(model: keras.Model, choices: Choices) -> bool:
    """Whether a BatchNormalization of the model takes the moments of a replica's rows."""
    together = {id(layer) for layer in batch_norm.layers_of(model, everywhere=choices.sync_batch_norm)}
    layers = model._flatten_layers(include_self=False)
    return any(isinstance(layer, keras.layers.BatchNormalization) and id(layer) not in together for layer in layers)


def _layers_of_users_with_state(model: keras.Model) -> list[str]:
    """Classes of layers that are not Keras' own and hold floating-point weights that no gradient moves."""
    holders = [
        layer
        for layer in model._flatten_layers(include_self=False)
        if any(not variable.trainable and "float" in variable.dtype for variable in layer._non_trainable_variables)
    ]
    return sorted({type(layer).__name__ for layer in holders if not type(layer).__module__.startswith("keras.")})
