"""The embeddings of a data set, in --embeddings_file."""

import pathlib
import zipfile

from absl import flags, logging

from byol_tf import checkpoints, evaluation, workdir
from byol_tf.embed import read_embeddings, write_embeddings
from byol_tf.errors import one_line
from byol_tf.tasks import run

FLAGS = flags.FLAGS


def embed():
    """Writes the embeddings of the images of --embed_split."""
    _embed(run.trained_encoder())


def up_to_date(encoder):
    """The embeddings of the images of --embed_split: of the file, or else made now and written.

    Returns: embeddings, float32 [N, D], and names, a list of N strings.
    """
    path = _path()
    if not path.exists():
        return _embed(encoder)
    try:
        vectors, names, origin = read_embeddings(path)
        stale = _difference(names, origin, encoder)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        stale = f"cannot be read ({one_line(error)})"
    if stale:
        logging.warning("%s %s: embedding the images anew", path, stale)
        return _embed(encoder)
    print(f"using the {len(names)} embeddings of {path}", flush=True)
    return vectors, names


def _path():
    return run.folder() / FLAGS.embeddings_file


def _embed(encoder):
    source, path = run.source(FLAGS.embed_split), _path()
    features = evaluation.extract_features(encoder, source, image_size=FLAGS.image_size)
    with checkpoints.writing(path):
        write_embeddings(features, path, source.class_names, _origin(encoder))
    print(f"{len(features.vectors)} embeddings written to {path}", flush=True)
    return features.vectors, features.names


def _origin(encoder):
    """What tells whether embeddings are those that the flags ask for."""
    folder = FLAGS.data_dir and str(pathlib.Path(FLAGS.data_dir).expanduser().resolve())
    return {
        "weights": workdir.weights_sha256(encoder.weights),
        "dataset": FLAGS.dataset,
        "data_dir": folder,
        "split": FLAGS.embed_split,
        "image_size": FLAGS.image_size,
        "channels": FLAGS.channels,
    }


def _difference(names, origin, encoder):
    """How the embeddings differ from those that the flags ask for, or None."""
    wanted = _origin(encoder)
    for key, value in wanted.items():
        if (origin or {}).get(key) != value:
            return f"is of other {key.replace('_', ' ')}"
    source = run.source(FLAGS.embed_split)
    # The names of a prepared data set do not change, and to read them takes reading all of it.
    in_files = source.read is not None
    if len(names) != source.num_examples or (in_files and names != evaluation.names_of(source)):
        return "is of other images"
    return None
