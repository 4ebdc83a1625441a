"""Optimizers, clipping, accumulation and learning rates."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tests.cases.models import LABEL, WEIGHT, X, adam, classifier, sgd
from tests.cases.table import Result, case

VALIDATION = X[40:], LABEL[40:]


@case(saved=True)
def adam_saved(engine) -> Result:
    """Adam with AMSGrad; the saved file"""
    return engine.fit(classifier(adam(amsgrad=True)), X, LABEL)


@case()
def global_clipnorm(engine) -> Result:
    """`global_clipnorm`"""
    return engine.fit(classifier(sgd(global_clipnorm=0.05)), X, LABEL)


@case()
def clipnorm_and_schedule(engine) -> Result:
    """Adam, `clipnorm`, a learning-rate schedule"""
    rate = keras.optimizers.schedules.CosineDecay(0.05, 9)
    return engine.fit(classifier(adam(learning_rate=rate, clipnorm=0.05)), X, LABEL)


@case()
def decay_and_ema(engine) -> Result:
    """AdamW: weight decay, EMA that overwrites the weights every second update"""
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1, use_ema=True, ema_overwrite_frequency=2)
    return engine.fit(classifier(optimizer), X, LABEL)


@case()
def lion(engine) -> Result:
    """Lion"""
    return engine.fit(classifier(keras.optimizers.Lion(0.003)), X, LABEL)


@case()
def plateau(engine) -> Result:
    """`ReduceLROnPlateau` on a validation"""
    slower = keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.3, patience=1, min_delta=0.02)
    model = classifier(sgd(), metrics=["accuracy"])
    return engine.fit(model, X, LABEL, epochs=4, validation_data=VALIDATION, callbacks=[slower])


@case(saved=True)
def several_optimizers(engine) -> Result:
    """`MultiOptimizer`: Adam for the first layer, SGD for the rest; the saved file"""
    model = classifier(sgd())
    first = model.layers[1].path
    chosen = keras.optimizers.OptimizerMap(sgd(), {f"{first}/.*": adam()})
    model.compile(keras.optimizers.MultiOptimizer(chosen), model.loss, metrics=["accuracy"])
    return engine.fit(model, X, LABEL)


class Watching(keras.callbacks.Callback):
    """Evaluates after the first batch of each epoch."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.engine, self.losses = engine, []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 0:
            self.losses.append(self.engine.evaluate(self.model, X, LABEL))


@case()
def an_evaluation_in_the_middle_of_an_update(engine) -> Result:
    """Accumulation over 2, and a callback that evaluates the model between two batches"""
    watching = Watching(engine)
    result = engine.fit(classifier(adam(gradient_accumulation_steps=2)), X, LABEL, callbacks=[watching])
    # What the epoch shows is of the evaluation, too, in Keras as here.
    return {"weights": result["weights"], "evaluated": np.array(watching.losses)}


@case(saved=True)
def accumulation(engine) -> Result:
    """Accumulation over 2 of 3 batches an epoch: updates span epochs; the file saved in the middle of one"""
    return engine.fit(classifier(adam(gradient_accumulation_steps=2)), X, LABEL, sample_weight=WEIGHT)
