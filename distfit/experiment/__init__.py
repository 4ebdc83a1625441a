"""From a configuration to a run: what `distfit train` and `distfit evaluate` do, as functions.

    config = load("configs/digits.yaml", ["epochs=2"])
    smoke(config).passed                # two steps of everything, nothing kept
    history = train(config)
    evaluate(config).metrics            # from state summed over all replicas

The run folder gets `config.yaml` (resolved) when training starts, TensorBoard logs in `logs/` and the model
in `checkpoint/` as it goes, and `history.json` when it has ended. A second run into the same folder replaces
all but the older logs, beside which its own appear, as with Keras.
"""

from distfit.experiment.run import Evaluation, evaluate, train
from distfit.experiment.trial import Verdict, smoke

__all__ = ["Evaluation", "Verdict", "evaluate", "smoke", "train"]
