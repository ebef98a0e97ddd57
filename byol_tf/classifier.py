"""A linear classifier of images of which some may have no label."""

import tensorflow as tf

from byol_tf.distribution import all_reduce
from byol_tf.keras_api import keras
from byol_tf.resnet import kernel_initializer


def linear_classifier(embedding_size, num_classes):
    """A built float32 layer from representations [B, embedding_size] to logits."""
    classifier = keras.layers.Dense(
        num_classes, kernel_initializer=kernel_initializer(), dtype="float32", name="classifier"
    )
    classifier.build((None, embedding_size))
    return classifier


def binary_loss_and_accuracy(logits, labels):
    """Cross-entropy, summed over the classes, and accuracy of yes or no; float32 scalars.

    Averaged over the replicas they are those of the global batch.

    Args: logits: float32 [B, K]. labels: int [B, K]; 1: there, 0: not, -1: does not count.
    """
    known = tf.cast(labels >= 0, tf.float32)
    there = tf.cast(labels > 0, tf.float32)
    losses = tf.nn.sigmoid_cross_entropy_with_logits(there, logits)
    correct = tf.cast(tf.equal(logits > 0, labels > 0), tf.float32)
    loss = tf.reduce_mean(tf.reduce_sum(losses * known, -1))
    return loss, *means_of_known(known, correct)


def loss_and_accuracy(logits, labels):
    """Cross-entropy and accuracy, float32 scalars, of the images that have a label.

    Averaged over the replicas they are those of the global batch.

    Args: logits: float32 [B, num_classes]. labels: int [B]; -1: an image without label.
    """
    known = tf.cast(labels >= 0, tf.float32)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(labels, 0), logits)
    correct = tf.cast(tf.equal(tf.argmax(logits, -1), tf.cast(labels, tf.int64)), tf.float32)
    return means_of_known(known, losses, correct)


def means_of_known(known, *values):
    """The means of values where they are known, which the mean over the replicas makes exact.

    So all divide by the same count, however the known ones fell among the replicas.

    Args: known: float32, 1 or 0; values: float32, of the same shape.

    Returns: a tuple of float32 scalars, 0 where none is known.
    """
    count = all_reduce("MEAN", tf.reduce_sum(known))
    return tuple(tf.math.divide_no_nan(tf.reduce_sum(v * known), count) for v in values)
