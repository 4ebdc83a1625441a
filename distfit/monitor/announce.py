"""Says at the start of a run who will train what, and what cannot be equal to one device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import keras

from distfit.backends.hooks import seed_generators_of
from distfit.log import say
from distfit.monitor.start_block import StartFacts, start_block
from distfit.training import batch_norm, own_step
from distfit.training.own_step import overrides
from distfit.training.step import Choices, synchronises

if TYPE_CHECKING:
    from distfit.data.feed import Feed
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
) -> None:
    """The start block, on the chief. Collective: hosts and devices come from every rank."""
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
        checkpoint=None if checkpoint is None else os.fspath(checkpoint),
        notes=unequal(model, choices, session.backend.supports_jit) if session.num_replicas > 1 else [],
    )
    if verbose != 0:
        say(start_block(facts))


def unequal(model: keras.Model, choices: Choices, supports_jit: bool) -> list[str]:
    """What several replicas do otherwise than one device would, a sentence each."""
    notes = own_step.notes(model)
    if _normalises_by_replica(model, choices):
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
    if choices.reduction_dtype is not None:
        notes.append(f"Gradients are added in {choices.reduction_dtype}, which rounds them.")
    notes.extend(
        f"{name}: a replica's state is added to the others', as is right for sums and counts only."
        for name in _metrics_of_users(model)
    )
    notes.extend(
        f"{name}: weights that it assigns by itself become their mean over the replicas, weighted by rows, as is "
        "right for averages only."
        for name in _layers_of_users_with_state(model)
    )
    if model.jit_compile and not supports_jit and synchronises(model, choices):
        notes.append("jit_compile is off: replicas meet inside the forward pass, for BatchNormalization's moments.")
    return notes


def _normalises_by_replica(model: keras.Model, choices: Choices) -> bool:
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


def _metrics_of_users(model: keras.Model) -> list[str]:
    """Classes of metrics that are not Keras' own, whose states are all sums."""
    compiled = model._compile_metrics
    metrics = [*model.metrics, *(compiled.metrics if compiled is not None else [])]
    return sorted({type(metric).__name__ for metric in metrics if not type(metric).__module__.startswith("keras.")})
