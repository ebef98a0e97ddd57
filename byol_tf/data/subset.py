"""Parts of a source: held-out images to choose by, and a share of the labels."""

import dataclasses

import numpy as np
import tensorflow as tf

from byol_tf.errors import UserError

_HELD_OUT_IMAGES = 10_009  # of ImageNet (appendix C.1)
_HELD_OUT_SHARE = 10  # of smaller sets one in so many
_PARALLEL_CALLS = 8  # for files that are read


def read_labels(source):
    """The labels of a source, int64 [N], -1 where there is none; no image is decoded."""
    return _values(source, lambda record: record["label"])


def read_fingerprints(source):
    """A number for each encoded image, int64 [N]: alike for the same file in another source."""

    def fingerprint(record):
        image = source.example(record)["image"]
        if image.dtype != tf.string:  # pixels, of more channels than files have
            image = tf.io.serialize_tensor(image)
        return tf.strings.to_hash_bucket_fast(image, 2**62)

    return _values(source, fingerprint)


def _values(source, function):
    """What a function makes of every record, an array in the source's order."""
    function = tf.autograph.experimental.do_not_convert(function)
    values = source.dataset.map(function, num_parallel_calls=_PARALLEL_CALLS).batch(4096)
    return np.concatenate([batch.numpy() for batch in values])


def stratified(labels, count, seed):
    """Draws images so that every class has its share, and at least one while there are enough.

    Args:
      labels: int [N]; -1: not to be drawn.
      count: how many; all with a label where there are fewer.
      seed: int, of the draw.

    Returns: int64 [count], their places in increasing order.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(np.flatnonzero(labels >= 0))
    drawn = drawn[np.argsort(labels[drawn], kind="stable")]  # by class, at random in each
    _, first, sizes = np.unique(labels[drawn], return_index=True, return_counts=True)
    rank = np.arange(len(drawn)) - np.repeat(first, sizes)
    order = np.lexsort((rng.random(len(drawn)), rank / np.repeat(sizes, sizes)))
    return np.sort(drawn[order[:count]])


def hold_out(labels, seed):
    """Divides labelled images into those to train on and those to choose settings by.

    Held out are 10,009 images, as of ImageNet in the paper (appendix C.1), but at most a tenth.

    Args: labels: int [N]; -1: in neither part. seed: int, of the draw.

    Returns: the places of either part, int64 arrays in increasing order.

    Raises:
      UserError: if there are not two images to divide.
    """
    labelled = np.flatnonzero(labels >= 0)
    if len(labelled) < 2:
        raise UserError(
            f"{len(labelled)} labelled images to train on: at least two are needed, one of them "
            "to choose the learning rate by."
        )
    held_out = min(_HELD_OUT_IMAGES, max(1, len(labelled) // _HELD_OUT_SHARE))
    training = stratified(labels, len(labelled) - held_out, seed)
    return training, np.setdiff1d(labelled, training)


def joined(first, second):
    """The `Source` of the images of two parts of one data set, one part after the other."""

    @tf.autograph.experimental.do_not_convert
    def after_the_first(record):
        return {**record, "index": record["index"] + first.num_examples}

    return dataclasses.replace(
        first,
        dataset=first.dataset.concatenate(second.dataset.map(after_the_first)),
        num_examples=first.num_examples + second.num_examples,
        find_fault=lambda: first.find_fault() or second.find_fault(),
    )


def subset(source, places):
    """The `Source` of the images at these places, in their order in the whole source.

    Where the images are not files of their own the others are read past, in every epoch.

    Args: source: a `byol_tf.data.source.Source`. places: int [M], each once.
    """
    chosen = np.zeros(source.num_examples, bool)
    chosen[places] = True
    chosen = tf.constant(chosen)

    @tf.autograph.experimental.do_not_convert
    def is_chosen(record):
        return tf.gather(chosen, record["index"])

    return dataclasses.replace(
        source, dataset=source.dataset.filter(is_chosen), num_examples=len(places)
    )
