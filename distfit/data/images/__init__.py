"""Ready image recipes: encoded images become rows of uint8 pixels, without TensorFlow.

    recipe = Images((224, 224), fit="random_crop", flip="horizontal", standardize=(MEAN, STD))
    distfit.TFRecords("data/*.tfrecord", features=..., transform=recipe)

libjpeg-turbo decodes (by simplejpeg), OpenCV resizes, a pool of threads does the rows of a batch (`rows`), pixels
travel to the device as bytes and become floats there (`on_device`). What TensorFlow decodes is decoded to
TensorFlow's pixels; what it does not is refused with a reason (`NotAnImage`).
"""

from distfit.data.images.draws import Draws
from distfit.data.images.formats import FORMATS, NotAnImage, format_of
from distfit.data.images.recipe import Images, Jitter
from distfit.data.images.rows import decode_rows

__all__ = ["FORMATS", "Draws", "Images", "Jitter", "NotAnImage", "decode_rows", "format_of"]
