"""How good a representation is: k-nearest neighbours and a linear probe on frozen features."""

import dataclasses
import warnings

import numpy as np
import tensorflow as tf

from byol_tf.data import augment, crop, views
from byol_tf.errors import UserError

TEMPERATURE = 0.07  # of the neighbours' votes (Wu et al. 2018)
_PROBE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # scikit-learn's C, tried on a held-out part
_HELD_OUT = 0.1  # of the training images
_PROBE_ITERATIONS = 100
_PROBE_IMAGES = 50_000  # to train on at most: L-BFGS holds them all, several times
_SIMILARITIES = 2**26  # held at a time: 256 MB


@dataclasses.dataclass(frozen=True)
class Features:
    """One vector an image, in the source's order.

    Attributes:
      vectors: float32 [N, D].
      labels: int64 [N], -1 where there is none; of a source with several labels an image [N, K].
      names: list of N strings.
    """

    vectors: np.ndarray
    labels: np.ndarray
    names: list


def extract_features(encoder, source, *, image_size, batch_size=256, fraction=crop.CENTRE_FRACTION):
    """Runs every image of a source, centre-cropped, through a frozen encoder.

    Args:
      encoder: a `keras.Model` from normalised images to vectors; runs in inference mode.
      source: a `byol_tf.data.source.Source`.
      image_size: side of the encoder's input in pixels.
      batch_size: images at a time.
      fraction: side of the crop over the shorter side of the image.

    Returns: `Features` with D the encoder's output size.
    """
    extract = feature_extractor(
        encoder, source, image_size=image_size, batch_size=batch_size, fraction=fraction
    )
    return extract()


def feature_extractor(
    encoder, source, *, image_size, batch_size=256, fraction=crop.CENTRE_FRACTION
):
    """`extract_features` for whoever needs it again and again, of an encoder that learns.

    Its graphs are made once: those that nobody needs any more are cycles of 5 MB, which Python's
    collector finds too late, if at all.

    Returns: function without arguments to the `Features` of the encoder as it is by then.
    """

    shape = [None, image_size, image_size, source.channels]

    # Not a `keras.Model`, which would take the strategy of a `fit` that this is called in.
    @tf.function(input_signature=[tf.TensorSpec(shape, tf.uint8)])
    def embed(images):
        return encoder(augment.normalize(images), training=False)

    batches = views.eval_batches(
        source, image_size=image_size, batch_size=batch_size, fraction=fraction
    )
    return lambda: _collect(batches, embed)


def names_of(source):
    """The names of a source's images, as those of their `Features`."""
    batches = source.dataset.map(lambda record: record["name"]).batch(4096)
    return [_text(name) for batch in batches for name in batch.numpy()]


def raw_pixels(source, *, image_size):
    """`Features` of the normalised pixels themselves: what no learning at all gives."""

    def flatten(images):
        return augment.normalize(images).numpy().reshape(len(images), -1)

    return _collect(views.eval_batches(source, image_size=image_size), flatten)


def _collect(batches, vectors_of):
    vectors, labels, names = [], [], []
    for batch in batches:
        vectors.append(np.asarray(vectors_of(batch["image"]), np.float32))
        labels.append(batch["label"].numpy())
        names += map(_text, batch["name"].numpy())
    return Features(np.concatenate(vectors), np.concatenate(labels), names)


def _text(name):
    return name.decode(errors="replace")


def knn_accuracy(train, test, *, k=20, temperature=TEMPERATURE):
    """Top-1 accuracy of `knn_predictions`: a float in [0, 1]."""
    predictions = knn_predictions(train, test, k=k, temperature=temperature)
    return float(np.mean(predictions == test.labels))


def knn_predictions(train, test, *, k=20, temperature=TEMPERATURE):
    """The labels for which the k nearest training images vote (Wu et al. 2018).

    Nearest by cosine similarity s; each votes for its label with weight exp(s / temperature).

    Args:
      train, test: `Features`, of images kept apart.
      k: number of voters; all training images where there are fewer.
      temperature: of the vote.

    Returns: int64 [N], one label an image of `test`.
    """
    num_classes = int(train.labels.max()) + 1
    predictions = []
    for nearest, similarity in _nearest(train.vectors, test.vectors, k):
        weights = np.exp((similarity - 1.0) / temperature)  # at most 1: no overflow
        votes = np.zeros((len(nearest), num_classes))
        rows = np.arange(len(nearest))[:, np.newaxis]
        np.add.at(votes, (rows, train.labels[nearest]), weights)
        predictions.append(votes.argmax(1))
    return np.concatenate(predictions)


def unit(vectors):
    """Vectors [N, D] of length 1, all but those that are zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _nearest(vectors, queries, k):
    """Yields places and similarities, [chunk, k], of the k nearest, in no order."""
    vectors, queries = unit(vectors), unit(queries)
    k = min(k, len(vectors))
    chunk = max(1, _SIMILARITIES // len(vectors))
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ vectors.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        yield nearest, np.take_along_axis(similarity, nearest, axis=1)


def linear_probe_accuracy(train, test, *, seed=0):
    """Top-1 accuracy of logistic regression on the frozen features, fitted by L-BFGS.

    Features are standardised by the training images' mean and deviation. The strength of
    the L2 regularisation is chosen on a tenth of the training images, then all are fitted, in
    at most 100 iterations. Of more than 50,000 training images so many are drawn.

    Args:
      train, test: `Features`, of images kept apart.
      seed: of these choices.

    Returns: a float in [0, 1].
    """
    from sklearn.exceptions import ConvergenceWarning  # slow to import
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    order = np.random.default_rng(seed).permutation(len(train.vectors))[:_PROBE_IMAGES]
    labels = train.labels[order]
    if len(np.unique(labels)) < 2:
        raise UserError("the linear probe needs training images of at least two classes.")
    scaler = StandardScaler().fit(train.vectors[order])
    vectors, test_vectors = scaler.transform(train.vectors[order]), scaler.transform(test.vectors)
    order = np.arange(len(vectors))  # drawn at random already
    held_out, fitted = np.split(order, [max(1, int(_HELD_OUT * len(order)))])

    def fit(rows, strength):
        probe = LogisticRegression(C=strength, max_iter=_PROBE_ITERATIONS)
        with warnings.catch_warnings():
            # To stop early is one more regularisation, and no news to the user; nor are
            # few images a class.
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
            return probe.fit(vectors[rows], labels[rows])

    def held_out_accuracy(strength):
        return fit(fitted, strength).score(vectors[held_out], labels[held_out])

    best = max(_PROBE_STRENGTHS, key=held_out_accuracy)
    return float(fit(order, best).score(test_vectors, test.labels))


def top_k_accuracies(classify, source, *, image_size, batch_size=256):
    """Top-1 and top-5 accuracy on the labelled images of a source, centre-cropped.

    Args:
      classify: function from normalised images [B, S, S, C] to logits [B, ..., classes].
      source: a `byol_tf.data.source.Source`.
      image_size: S, in pixels.
      batch_size: images at a time.

    Returns: float64 [2, ...]: top-1, and top-5, which of fewer classes takes all. Logits that are
      not finite are wrong, so that what has diverged has accuracy 0.
    """

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, image_size, image_size, source.channels], tf.uint8),
            tf.TensorSpec([None], tf.int64),
        ]
    )
    def count_correct(images, labels):
        logits = classify(augment.normalize(images))
        best = tf.math.top_k(logits, min(5, logits.shape[-1])).indices
        labels = tf.reshape(labels, [-1] + [1] * (len(logits.shape) - 1))
        hits = tf.equal(tf.cast(best, tf.int64), labels)
        hits &= tf.reduce_all(tf.math.is_finite(logits), -1, keepdims=True)
        correct = tf.stack([hits[..., 0], tf.reduce_any(hits, -1)])
        return tf.reduce_sum(tf.cast(correct, tf.int64), 1)

    correct, labelled = 0, 0
    for batch in views.eval_batches(source, image_size=image_size, batch_size=batch_size):
        correct += count_correct(batch["image"], batch["label"]).numpy()
        labelled += np.sum(batch["label"].numpy() >= 0)
    return correct / labelled
