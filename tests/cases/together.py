"""Combinations: what goes wrong where two features meet."""

from __future__ import annotations

import keras

from tests.cases.batch_norm import normalised
from tests.cases.engines import dataset, precision
from tests.cases.models import (
    LABEL,
    SPARSE,
    TARGET,
    WEIGHT,
    X,
    adam,
    classifying,
    seeded_input,
    sgd,
    two_outputs,
)
from tests.cases.precision import BFLOAT16
from tests.cases.table import FLOAT32, Result, case


@case()
def accumulation_clipping_outputs_and_weights(engine) -> Result:
    """Accumulation over 3 of 4 batches, `global_clipnorm`, AdamW, EMA, two outputs of different reductions, weights"""
    options = {"weight_decay": 0.1, "use_ema": True, "global_clipnorm": 0.1, "gradient_accumulation_steps": 3}
    losses = [
        SPARSE(from_logits=True, reduction="mean_with_sample_weight"),
        keras.losses.MeanSquaredError(reduction="sum"),
    ]
    model = two_outputs(keras.optimizers.AdamW(0.01, **options), losses, loss_weights=[1.0, 0.05])
    weights = [WEIGHT, WEIGHT[::-1].copy()]
    return engine.fit(model, X, [LABEL, TARGET], sample_weight=weights, batch_size=20)


@case()
def xla_accumulation_and_clipping(engine) -> Result:
    """`jit_compile=True`, accumulation over 2, `clipnorm`, regularisation"""
    x = seeded_input()
    h = keras.layers.Dense(6, "tanh", use_bias=False, kernel_regularizer="l2")(x)
    optimizer = adam(gradient_accumulation_steps=2, clipnorm=0.1)
    return engine.fit(classifying(x, h, optimizer, jit_compile=True), X[:64], LABEL[:64])


@case(BFLOAT16)
def bfloat16_batch_norm_and_accumulation(engine) -> Result:
    """`mixed_bfloat16`, `sync_batch_norm=True`, accumulation over 2, weights"""
    with precision(FLOAT32, "mixed_bfloat16"):
        x = seeded_input()
        h = normalised(keras.layers.Dense(6, "tanh", use_bias=False)(x))
        model = classifying(x, h, sgd(gradient_accumulation_steps=2))
        return engine.fit(model, dataset(X, LABEL, WEIGHT).batch(20), batch_size=None, sync_batch_norm=True)
