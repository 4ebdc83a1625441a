"""Models that the example configurations name; a `model:` field may name any function like them.

    model = digits_cnn(input_shape=(8, 8, 1), classes=10)

Such a function takes `input_shape` and `classes`, which `distfit train` knows from the data, and whatever
`model_options` says, and returns an uncompiled Keras model. Keras is imported inside, so that naming a model
costs nothing.
"""

from typing import Any

from distfit.errors import InputError


def digits_cnn(
    input_shape: tuple[int, int, int] = (8, 8, 1), classes: int = 10, filters: int = 32, units: int = 64
) -> Any:
    """A small convolutional network for scanned digits, smooth everywhere.

    It has no BatchNorm and no Dropout, which mean another training on another number of replicas. Nor has it
    kinks: under ReLU or max pooling two engines, whose sums differ in the last bit, sooner or later route a
    gradient differently, and their losses part by up to 1e-3. Through tanh and root-mean-square pooling,
    which keeps most of what a maximum sees, they stay within 1e-7.

    Args:
        input_shape: (height, width, channels), height and width at least 4.
        classes: outputs, as logits.
        filters: of the first two convolutions; the next two have twice as many.
        units: of the hidden dense layer.

    Returns:
        An uncompiled keras.Model.

    Raises:
        InputError: images too small for two halvings.
    """
    from keras import Input, Model, layers

    if min(input_shape[:2]) < 4:
        raise InputError(
            f"Expected images of at least 4x4 pixels for digits_cnn, received "
            f"{input_shape[0]}x{input_shape[1]}. Set data.image.size."
        )
    inputs = x = Input(input_shape)
    for width in (filters, 2 * filters):
        x = layers.Conv2D(width, 3, padding="same", activation="tanh")(x)
        x = layers.Conv2D(width, 3, padding="same", activation="tanh")(x)
        x = _root_mean_square_pool(x)
    x = layers.Dense(units, activation="tanh")(layers.Flatten()(x))
    return Model(inputs, layers.Dense(classes)(x), name="digits_cnn")


def _root_mean_square_pool(x: Any) -> Any:
    """Halves height and width; the constant keeps the root's slope finite where all is zero."""
    from keras import layers, ops

    return ops.sqrt(layers.AveragePooling2D(2)(ops.square(x)) + 1e-3)
