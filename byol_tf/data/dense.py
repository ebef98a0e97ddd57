"""Images with a value for every pixel, from arrays or TFDS, and the batches made of them."""

import dataclasses
import math
import pathlib
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from byol_tf.data import augment
from byol_tf.data.source import open_builder
from byol_tf.dense import IGNORED
from byol_tf.errors import UserError, one_line

# What TFDS calls them; of masks with several channels the first is taken.
_FEATURES = {
    "masks": ("segmentation_mask", "segmentation_label", "annotation"),
    "depths": ("depth",),
}
_SHUFFLED_IMAGES = 512  # held, decoded, to shuffle them
_SCALES = (0.5, 2.0)
_GRAYSCALE, _BRIGHTNESS, _SATURATION, _HUE = 0.3, 0.1255, (0.5, 1.5), 0.2


@dataclasses.dataclass(frozen=True)
class DenseSource:
    """Images and what is known of their pixels, in a fixed order.

    Attributes:
      records: a `tf.data.Dataset` of records.
      num_examples: int.
      read: from a record to an image, uint8 [H, W, C], and its masks, int32 [H, W], or depths,
        float32 [H, W] in metres.
    """

    records: tf.data.Dataset
    num_examples: int
    read: Callable

    def split(self, every):
        """Two sources: one without, one with every so-many-th example."""
        held_out = len(range(0, self.num_examples, every))
        numbered = self.records.enumerate()

        def part(chosen, count):
            records = numbered.filter(lambda i, *_: chosen(i)).map(lambda _, record: record)
            return dataclasses.replace(self, records=records, num_examples=count)

        return (
            part(lambda i: i % every != 0, self.num_examples - held_out),
            part(lambda i: i % every == 0, held_out),
        )


def load_dense(data, split, target, data_dir=None, channels=3):
    """Opens images with masks or depths.

    Args:
      data: a folder, in which `<split>/images.npy` is uint8 [N, H, W, channels] and
        `<split>/masks.npy` uint8 [N, H, W] or `<split>/depths.npy` float [N, H, W] in metres; or
        the name of a TFDS data set with a mask or a depth of every pixel. Pixels that do not
        count have 255 or -1 in a mask, and in depths what is not above 0 or not finite.
      split: name of the folder inside, or of TFDS's split.
      target: "masks" or "depths".
      data_dir: of TFDS's prepared data sets (None for `~/tensorflow_datasets`).
      channels: of the images.

    Returns: a `DenseSource`.

    Raises:
      UserError: if there is no such data, or it is not of that form.
    """
    folder = pathlib.Path(data).expanduser()
    if folder.is_dir():
        return _from_arrays(folder / split, target, channels)
    if folder.is_absolute() or str(data).startswith("."):  # no name of TFDS
        raise UserError(f"--dense_data={data}: no such folder: check the path.")
    return _from_tfds(data, split, target, data_dir, channels)


def _from_arrays(folder, target, channels):
    images, targets = _array(folder / "images.npy"), _array(folder / f"{target}.npy")
    kinds = "iu" if target == "masks" else "f"
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != channels:
        raise UserError(
            f"{folder}/images.npy: {_form(images)}: must be uint8 [N, H, W, {channels}]."
        )
    if targets.shape != images.shape[:3] or targets.dtype.kind not in kinds:
        kind = "uint8" if target == "masks" else "float"
        raise UserError(
            f"{folder}/{target}.npy: {_form(targets)}: must be {kind} {list(images.shape[:3])}, "
            "as the images."
        )

    # Not a function of Python: as a fit ends amid a batch, TensorFlow would await it while it
    # itself keeps Python from running.
    def read(record):
        image = tf.reshape(tf.io.decode_raw(record["image"], tf.uint8), images.shape[1:])
        dtype = targets.dtype.newbyteorder("=")
        if dtype.kind == "u" and dtype.itemsize > 2:  # which it does not read; no class is so large
            dtype = np.dtype(f"i{dtype.itemsize}")
        little = not targets.dtype.str.startswith(">")
        values = tf.io.decode_raw(record["target"], dtype, little)
        return image, _known(tf.reshape(values, targets.shape[1:]), targets.shape[1:])

    records = tf.data.Dataset.zip({"image": _records(images), "target": _records(targets)})
    return DenseSource(records, len(images), read)


def _records(array):
    """The parts of an array's file along the first axis, as bytes."""
    size = max(1, array.itemsize * math.prod(array.shape[1:]))
    return tf.data.FixedLengthRecordDataset(str(array.filename), size, array.offset)


def _array(path):
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not array.flags.c_contiguous:
            raise ValueError(
                "its first axis changes fastest: np.save(..., np.ascontiguousarray(a))"
            )
        return array
    except (OSError, ValueError) as error:
        raise UserError(
            f"--dense_data: {path}: no array that can be read ({one_line(error)}): see "
            "docs/evaluation.md for the files that it needs."
        ) from error


def _form(array):
    return f"is {array.dtype} {list(array.shape)}"


def _from_tfds(name, split, target, data_dir, channels):
    builder = open_builder(name, data_dir, flag="dense_data")
    features = builder.info.features
    found = [feature for feature in _FEATURES[target] if feature in features]
    if "image" not in features or not found:
        raise UserError(
            f"--dense_data={name}: no folder, and as a TFDS data set without {target}: its "
            f"examples have {', '.join(features)}, not image and {' or '.join(_FEATURES[target])}."
        )
    if features["image"].shape[-1] != channels:
        raise UserError(
            f"--dense_data={name}: its images have {features['image'].shape[-1]} channels, the "
            f"encoder's {channels}: give arrays of {channels}."
        )
    try:
        count = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise UserError(
            f"--dense_data={name}: no split {split!r}; there are {', '.join(builder.info.splits)}."
        ) from error
    examples = builder.as_dataset(
        split=split,
        shuffle_files=False,
        decoders=_only("image", found[0]),
    )

    def read(example):
        values = example[found[0]]
        if values.shape.rank == 3:
            values = values[..., 0]
        return example["image"], _known(values, example["image"].shape[:2])

    return DenseSource(examples, count, read)


def _only(*names):
    import tensorflow_datasets as tfds

    return tfds.decode.PartialDecoding({name: True for name in names})


def _known(values, shape):
    """Masks as int32, or depths as float32 with 0 where there is none; of this shape."""
    values = tf.ensure_shape(values, shape)
    if values.dtype.is_floating:
        values = tf.cast(values, tf.float32)
        return tf.where(tf.math.is_finite(values), tf.maximum(values, 0.0), 0.0)
    # What does not fit remains a value that no mask may have.
    values = tf.cast(tf.clip_by_value(tf.cast(values, tf.int64), -2, 2**31 - 1), tf.int32)
    return tf.where(values == -1, IGNORED, values)


def segmentation_batches(source, *, crop, batch_size, num_classes, seed=None):
    """Pairs of normalised images and masks (appendix D.4).

    To train on, at random: scaled by a ratio in [0.5, 2], cropped and flipped, without end. To
    evaluate: the central crop. What is outside the image is `IGNORED`, and of the mean colour.

    Args:
      source: a `DenseSource` of masks.
      crop: side of the crop in pixels, 513 in the paper.
      batch_size: images a batch.
      num_classes: int; a mask has values below it, and `IGNORED`.
      seed: int, of all that is random; None: to evaluate, every image once.

    Returns: a dataset of images, float32 [B, crop, crop, 3], and masks, uint8 [B, crop, crop].
    """

    def example(image, mask, draws):
        image, mask = augment.normalize(image), mask[..., tf.newaxis]
        mask = _of_classes(mask, num_classes) - IGNORED  # the border that is added is 0
        if draws is not None:
            image, mask = _scale_and_crop(image, mask, crop, draws)
        image = tf.image.resize_with_crop_or_pad(image, crop, crop)
        mask = tf.image.resize_with_crop_or_pad(mask, crop, crop)[..., 0] + IGNORED
        return image, tf.cast(mask, tf.uint8)

    return _batches(source, example, batch_size, seed)


def _of_classes(mask, num_classes):
    """A mask, int32, which is refused if it has values beyond the classes."""
    strange = (mask < 0) | (mask >= num_classes) & (mask != IGNORED)
    first = tf.reduce_max(tf.boolean_mask(mask, strange)[:1])
    text = f"a mask has a value that --segmentation_classes={num_classes} does not allow:"
    with tf.control_dependencies([tf.debugging.Assert(~tf.reduce_any(strange), [text, first])]):
        return tf.identity(mask)


def count_known(source, num_classes=None):
    """How many pixels of a `DenseSource` count, an int; reads all of it, as what is wrong with one
    image is better known before an hour of training.

    Args: num_classes: of masks.

    Raises:
      tf.errors.OpError: if an image or a mask cannot be read, or has values beyond the classes.
    """

    def count(record):
        _, values = source.read(record)
        known = values > 0 if num_classes is None else _of_classes(values, num_classes) != IGNORED
        return tf.reduce_sum(tf.cast(known, tf.int64))

    counts = source.records.map(count, num_parallel_calls=tf.data.AUTOTUNE)
    return int(sum(counts.as_numpy_iterator()))


def _scale_and_crop(image, mask, crop, draws):
    """Scales at random, then cuts to at most crop x crop, and flips."""
    ratio, top, left, flip = tf.unstack(draws[:4])
    low, high = _SCALES
    size = tf.cast(tf.shape(image)[:2], tf.float32)
    size = tf.maximum(tf.cast(tf.round(size * (low + (high - low) * ratio)), tf.int32), 1)
    image, mask = tf.image.resize(image, size), tf.image.resize(mask, size, "nearest")
    room = tf.cast(tf.maximum(size - crop, 0) + 1, tf.float32)
    start = tf.cast(tf.stack([top, left]) * room, tf.int32)
    stop = start + tf.minimum(size, crop)
    parts = [x[start[0] : stop[0], start[1] : stop[1]] for x in (image, mask)]
    return _flip(parts, flip)


def depth_batches(source, *, crop, scale, batch_size, seed=None):
    """Pairs of normalised images and depths (appendix D.6).

    Images are scaled and cut to the central crop; to train on, they are then flipped at random
    and changed in colour: grayscale with probability 0.3, brightness by at most 0.1255,
    saturation by a factor of 0.5 to 1.5, hue by at most 0.2 turns; of images that are not RGB
    only the brightness. Depths are not interpolated.

    Args:
      source: a `DenseSource` of depths.
      crop: height and width in pixels; (228, 304) in the paper.
      scale: float, 0.5 in the paper.
      batch_size: images a batch.
      seed: as of `segmentation_batches`.

    Returns: a dataset of images, float32 [B, *crop, 3], and depths, float32 [B, *crop], 0 where
      there is none.
    """

    def example(image, depth, draws):
        size = tf.cast(tf.round(tf.cast(tf.shape(image)[:2], tf.float32) * scale), tf.int32)
        image = tf.image.resize(tf.cast(image, tf.float32) / 255.0, size, antialias=True)
        depth = tf.image.resize(depth[..., tf.newaxis], size, "nearest")
        image, depth = (tf.image.resize_with_crop_or_pad(x, *crop) for x in (image, depth))
        if draws is not None:
            image, depth = _flip([_recolour(image, draws), depth], draws[4])
        return augment.normalize(image), depth[..., 0]

    return _batches(source, example, batch_size, seed)


def _recolour(image, draws):
    """The paper's changes of colour, in its order: float32 [H, W, C] in [0, 1] -> the same."""
    gray, brightness, saturation, hue = tf.unstack(draws[:4])
    low, high = _SATURATION
    is_rgb = image.shape[-1] == 3
    if is_rgb:
        image = tf.cond(
            gray < _GRAYSCALE,
            lambda: tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image)),
            lambda: image,
        )
    image = tf.image.adjust_brightness(image, _BRIGHTNESS * (2.0 * brightness - 1.0))
    image = tf.clip_by_value(image, 0.0, 1.0)
    if not is_rgb:
        return image
    image = tf.image.adjust_saturation(image, low + (high - low) * saturation)
    return tf.image.adjust_hue(image, _HUE * (2.0 * hue - 1.0))


def _flip(parts, draw):
    return [tf.cond(draw < 0.5, lambda x=x: x[:, ::-1], lambda x=x: x) for x in parts]


def _batches(source, example, batch_size, seed):
    """Every record once through `example`, or without end with a seed and draws."""
    records = source.records
    if seed is None:
        pairs = records.map(
            lambda record: example(*source.read(record), None), num_parallel_calls=tf.data.AUTOTUNE
        )
        return pairs.batch(batch_size).prefetch(2)
    records = records.shuffle(_SHUFFLED_IMAGES, seed=seed).repeat()

    def drawn(number, record):
        draws = tf.random.stateless_uniform([5], [tf.cast(seed, tf.int64), number])
        return example(*source.read(record), draws)

    pairs = records.enumerate().map(drawn, num_parallel_calls=tf.data.AUTOTUNE)
    return pairs.batch(batch_size, drop_remainder=True).prefetch(2)
