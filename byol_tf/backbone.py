"""The encoder's feature maps C2 to C5, for dense prediction and detectors of other libraries."""

import pathlib
import re
import warnings

from byol_tf.batch_norm import SyncBatchNormalization
from byol_tf.keras_api import keras
from byol_tf.whole import whole_file


def resnet_backbone(encoder, *, dilated=False, keras_only=True):
    """A copy of an encoder that gives the feature map of each of its groups.

    It has weights of its own: to train it leaves the encoder as it is.

    Args:
      encoder: from `byol_tf.resnet_encoder`, trained or not.
      dilated: give the 3x3 convolutions of the last group dilation 2 and stride 1 (appendix
        D.4): "C5" then has the resolution of "C4", with the same weights.
      keras_only: take layers of Keras alone, so that what is saved of it loads without byol_tf.
        False: batch norm shares its statistics across replicas where the encoder's does.

    Returns:
      A `keras.Model` from normalised images, float [B, H, W, C] of any size, to a dict of "C2",
      "C3", "C4" and "C5": what the last block of each group gives, float
      [B, ceil(H / s), ceil(W / s), D] with strides s of 4, 8, 16 and 32 (1, 2, 4 and 8 with the
      small stem). The layers that give them have these names too.

    Raises:
      ValueError: if the encoder's layers are not those of `byol_tf.resnet_encoder`.
    """
    groups = [re.match(r"group\d+_", layer.name) for layer in encoder.layers]
    groups = list(dict.fromkeys(match[0] for match in groups if match))
    if not groups:
        raise ValueError(f"encoder {encoder.name!r}: must be one of byol_tf.resnet_encoder.")

    def copy(layer):
        config = layer.get_config()
        if keras_only and isinstance(layer, SyncBatchNormalization):
            return keras.layers.BatchNormalization.from_config(config)
        if dilated and layer.name.startswith(groups[-1]) and "strides" in config:
            config["strides"] = (1, 1)
            if config.get("kernel_size") == (3, 3):
                config["dilation_rate"] = (2, 2)
        return type(layer).from_config(config)

    images = keras.Input((None, None, encoder.input_shape[-1]), name="images")
    copied = keras.models.clone_model(encoder, input_tensors=images, clone_function=copy)
    copied.set_weights(encoder.get_weights())
    maps = {}
    for number, group in enumerate(groups, 2):
        last = [layer for layer in copied.layers if layer.name.startswith(group)][-1]
        maps[f"C{number}"] = keras.layers.Identity(name=f"C{number}")(last.output)
    return keras.Model(images, maps, name=f"{encoder.name}_backbone")


def save_backbone(backbone, path):
    """Writes a whole HDF5 file, or none, that `keras.models.load_model` of Keras 2 and 3 reads.

    Not a .keras file, which Keras 3 does not read where Keras 2 wrote it.

    Raises:
      OSError: if it cannot be written; what was at `path` is still there then.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are saving your model as an HDF5 file")
        backbone.save(unfinished, save_format="h5", include_optimizer=False)
