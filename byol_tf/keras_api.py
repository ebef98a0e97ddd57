"""The one place that picks Keras: always the Keras-2 API, whatever TensorFlow brings.

TensorFlow up to 2.15 ships Keras 2 as `keras`; from 2.16 on `keras` is Keras 3 and
Keras 2 lives on as the package `tf_keras`. Every other module writes
`from byol_tf.keras_api import keras`.
"""

import tensorflow as tf

if tuple(int(part) for part in tf.__version__.split(".")[:2]) < (2, 16):
    import keras
else:
    try:
        import tf_keras as keras
    except ImportError as error:
        raise ImportError(
            f"byol_tf with TensorFlow {tf.__version__} needs the package tf-keras of the "
            "same version: run `pip install -r requirements.txt`."
        ) from error

__all__ = ["keras"]
