"""The encoder and its embeddings, for use elsewhere."""

from absl import flags

from byol_tf import checkpoints, evaluation
from byol_tf.embed import write_embeddings
from byol_tf.export import export_encoder
from byol_tf.tasks import run

FLAGS = flags.FLAGS


def export():
    """Writes the encoder as a SavedModel."""
    path = run.folder() / "saved_model"
    encoder = run.trained_encoder()
    with checkpoints.writing(path):
        export_encoder(encoder, path, image_size=FLAGS.image_size, channels=FLAGS.channels)
    print(f"encoder exported to {path}")


def embed():
    """Writes the embeddings of the images of --embed_split."""
    source = run.source(FLAGS.embed_split)
    features = evaluation.extract_features(
        run.trained_encoder(), source, image_size=FLAGS.image_size
    )
    path = run.folder() / FLAGS.embeddings_file
    with checkpoints.writing(path):
        write_embeddings(features, path, source.class_names)
    print(f"{len(features.vectors)} embeddings written to {path}")
