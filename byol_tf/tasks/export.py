"""The encoder, for use elsewhere."""

from absl import flags

from byol_tf import checkpoints
from byol_tf.export import export_encoder
from byol_tf.tasks import run

FLAGS = flags.FLAGS


def export():
    """Writes the encoder as a SavedModel, where TensorFlow Serving looks for version 1."""
    path = run.folder() / "saved_model" / "1"
    encoder = run.trained_encoder()
    with checkpoints.writing(path):
        export_encoder(encoder, path, image_size=FLAGS.image_size, channels=FLAGS.channels)
    print(f"encoder exported to {path}")
