"""The encoder as a SavedModel that serves: images or encoded bytes in, embeddings out."""

import pathlib
import shutil

import tensorflow as tf

from byol_tf import whole
from byol_tf.data import augment, crop, decode


def export_encoder(encoder, directory, *, image_size, channels=3):
    """Writes a SavedModel that needs neither byol_tf nor Keras to be loaded.

    Signatures, both with the output "embedding", float32 [N, D]:

    * "serving_default": "images", uint8 [N, H, W, channels] of any height and width,
    * "serving_bytes": "image_bytes", string [N], whole JPEG, PNG, BMP or GIF files; not where
      there are more than 4 channels, which no such file has.

    Both crop the centre, resize and normalise inside, exactly as the evaluation does. What
    was at `directory` is replaced only when the new model is complete.

    Args:
      encoder: a `keras.Model` from normalised images to vectors.
      directory: path of the SavedModel.
      image_size: side of the encoder's input in pixels.
      channels: of the encoder's input.

    Raises:
      OSError, tf.errors.OpError: if the directory cannot be written; what was there is still
        there then.
    """
    shape = (image_size, image_size, channels)
    module = tf.Module()
    module.weights = list(encoder.weights)  # without the layers: no Keras in the SavedModel

    def embed(cropped):
        count = tf.shape(cropped)[0]
        # TensorFlow 2.15's convolutions refuse an empty batch, so that one gets a blank image.
        blank = tf.zeros([tf.cast(count == 0, tf.int32), *shape], tf.uint8)
        images = augment.normalize(tf.concat([cropped, blank], 0))
        embedding = encoder(images, training=False)[:count]
        return {"embedding": tf.cast(embedding, tf.float32)}

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, channels], tf.uint8, "images")])
    def serve_images(images):
        cropped = crop.centre_crop_and_resize(images, image_size)
        return embed(tf.ensure_shape(cropped, [None, *shape]))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")])
    def serve_bytes(image_bytes):
        def crop_encoded(encoded):
            return crop.centre_crop_and_resize(decode.decode(encoded, channels), image_size)

        signature = tf.TensorSpec(shape, tf.uint8)
        return embed(tf.map_fn(crop_encoded, image_bytes, fn_output_signature=signature))

    signatures = {"serving_default": serve_images}
    if channels <= decode.MAX_CHANNELS:
        signatures["serving_bytes"] = serve_bytes

    directory = pathlib.Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    new = whole.unfinished(directory)
    try:
        tf.saved_model.save(module, str(new), signatures=signatures)
        _replace_directory(new, directory)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _replace_directory(new, old):
    """Puts the directory `new` in the place of `old`, which may not exist yet."""
    if old.exists():
        aside = whole.unfinished(old.with_name(f"{old.name}.old"))
        old.rename(aside)
        new.rename(old)
        shutil.rmtree(aside)
    else:
        new.rename(old)
