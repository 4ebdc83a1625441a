"""`python -m tests.load_models OUT FILE...` loads models in a process that has no distfit.

Writes OUT, an .npz with the numbers of each file's weights and optimizer state.
"""

import sys

import keras
import numpy as np

from tests.compare import flat


def main(out: str, *paths: str) -> None:
    sys.modules["distfit"] = None  # whoever imports it gets ImportError
    loaded = {path: keras.models.load_model(path) for path in paths}
    np.savez(out, **{path: flat([*model.weights, *model.optimizer.variables]) for path, model in loaded.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
