"""Models that the example configurations name; a `model:` field may name any function like them.

    model = digits_cnn(input_shape=(8, 8, 1), classes=10)

Such a function takes `input_shape` and `classes`, which `distfit train` knows from the data, and whatever
`model_options` says, and returns an uncompiled Keras model. One that has parameters `mean` and `variance`
without defaults gets those of each column of the training data. Keras is imported inside, so that naming a
model costs nothing.
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

    _check_size("digits_cnn", input_shape, least=4)
    inputs = x = Input(input_shape)
    for width in (filters, 2 * filters):
        x = layers.Conv2D(width, 3, padding="same", activation="tanh")(x)
        x = layers.Conv2D(width, 3, padding="same", activation="tanh")(x)
        x = _root_mean_square_pool(x)
    x = layers.Dense(units, activation="tanh")(layers.Flatten()(x))
    return Model(inputs, layers.Dense(classes)(x), name="digits_cnn")


def _check_size(name: str, input_shape: tuple[int, int, int], least: int) -> None:
    if min(input_shape[:2]) < least:
        raise InputError(
            f"Expected images of at least {least}x{least} pixels for {name}, received "
            f"{input_shape[0]}x{input_shape[1]}. Set data.image.size."
        )


def _root_mean_square_pool(x: Any) -> Any:
    """Halves height and width; the constant keeps the root's slope finite where all is zero."""
    from keras import layers, ops

    return ops.sqrt(layers.AveragePooling2D(2)(ops.square(x)) + 1e-3)


def four_convolutions(
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 257,
    filters: tuple[int, ...] = (64, 64, 128, 256),
) -> Any:
    """Convolutions (3x3, stride 2, ReLU, He-normal), global average pooling, a dense layer of logits.

    Args:
        input_shape: (height, width, channels), height and width at least 2 ** (convolutions + 1) - 1.
        classes: outputs, as logits.
        filters: of each convolution.

    Returns:
        An uncompiled keras.Model.

    Raises:
        InputError: images too small for so many convolutions.
    """
    from keras import Input, Model, layers

    _check_size("four_convolutions", input_shape, least=2 ** (len(filters) + 1) - 1)
    inputs = x = Input(input_shape)
    for width in filters:
        x = layers.Conv2D(width, 3, strides=2, activation="relu", kernel_initializer="he_normal")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return Model(inputs, layers.Dense(classes)(x), name="four_convolutions")


# Of ImageNet's training images, red, green, blue, where a pixel is 0..1; the figures that published models use.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_VARIANCE = (0.229**2, 0.224**2, 0.225**2)


def resnet50(
    input_shape: tuple[int, int, int] = (256, 256, 3), classes: int = 1000, crop: tuple[int, int] | None = (224, 224)
) -> Any:
    """Keras' ResNet-50 (He et al. 2015, arXiv:1512.03385) with random weights, behind its augmentation.

    In a training each image is enlarged by up to two thirds, shifted and mirrored at random before its middle is cut
    out; otherwise the middle is all that happens. Pixels of 0..1 are normalised by ImageNet's mean and
    variance, in float32 whatever the layers behind compute in.

    Args:
        input_shape: (height, width, 3), at least 32x32 after the crop.
        classes: outputs, as logits.
        crop: (height, width) that the network sees; None for the whole image.

    Returns:
        An uncompiled keras.Model.

    Raises:
        InputError: images smaller than the crop.
    """
    from keras import Input, Model, applications, layers

    inputs = x = Input(input_shape)
    height, width = crop or input_shape[:2]
    if height > input_shape[0] or width > input_shape[1]:
        raise InputError(
            f"Expected images of at least {height}x{width} pixels to crop, received {input_shape[0]}x{input_shape[1]}. "
            "Set data.image.size, or model_options.crop to less or null."
        )
    # keras.layers.RandomCrop of Keras 3.15 leaves images as large as they are outside of a training.
    room = [(1 - height / input_shape[0]) / 2, (1 - width / input_shape[1]) / 2]
    x = layers.RandomZoom((-0.4, 0.0), dtype="float32")(x)
    x = layers.RandomTranslation(*room, dtype="float32")(x)
    x = layers.RandomFlip("horizontal", dtype="float32")(x)
    x = layers.CenterCrop(height, width, dtype="float32")(x)
    x = layers.Normalization(mean=IMAGENET_MEAN, variance=IMAGENET_VARIANCE, dtype="float32")(x)
    network = applications.ResNet50(
        weights=None, input_shape=(height, width, 3), classes=classes, classifier_activation=None
    )
    # Logits in float32: a loss loses digits in less, and TensorFlow ranks no other (top_k_categorical_accuracy).
    logits = layers.Activation("linear", dtype="float32", name="logits")(network(x))
    return Model(inputs, logits, name="resnet50")


def table_network(
    input_shape: tuple[int], classes: int, mean: list[float], variance: list[float], units: tuple[int, ...] = (32, 32)
) -> Any:
    """A small dense network for columns of numbers, which it normalises itself: the saved model takes them raw.

    Args:
        input_shape: (columns,).
        classes: outputs, as logits.
        mean, variance: of each column of the training data; `distfit train` measures them.
        units: of each hidden layer.

    Returns:
        An uncompiled keras.Model.
    """
    from keras import Input, Model, layers

    inputs = Input(input_shape)
    x = layers.Normalization(mean=mean, variance=variance)(inputs)
    for width in units:
        x = layers.Dense(width, activation="tanh")(x)
    return Model(inputs, layers.Dense(classes)(x), name="table_network")
