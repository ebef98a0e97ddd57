"""From a source to what the networks see: augmented views, or one plain view.

The data's way: source (encoded images) -> crop and resize (uint8) -> photometric
augmentation (float32), the last on the host or on the accelerator.
"""

import dataclasses
import os

import numpy as np
import tensorflow as tf

from byol_tf.data import augment, crop, decode
from byol_tf.errors import UserError

# Decoded images of one common size up to this many bytes stay in memory between epochs.
_CACHE_BYTES = 2**30
# Of a data set that is streamed, and stored in random order already: 2 GB of ImageNet; no more
# where it is of pixels.
_SHUFFLED_RECORDS = 16_384
_SHUFFLED_BYTES = 2**31
_PARALLEL_CALLS = max(2, os.cpu_count() or 2)
_DRAWS = crop.NUM_DRAWS + augment.NUM_DRAWS


def steps_per_epoch(source, batch_size):
    """Full batches in one pass over the source; the remainder is left out, as in the paper.

    Args: source: a `byol_tf.data.source.Source`. batch_size: global, in images.

    Returns: int, at least 1.

    Raises:
      UserError: if there are fewer images than one batch.
    """
    if source.num_examples < batch_size:
        raise UserError(
            f"--batch_size={batch_size} is larger than the data set "
            f"({source.num_examples} images): choose a smaller batch."
        )
    return source.num_examples // batch_size


def pretrain_batches(
    source,
    *,
    image_size,
    batch_size,
    epochs,
    seed=0,
    start_step=0,
    augment_on="host",
    min_crop_area=crop.AREA_RANGE[0],
    augmentation="paper",
    num_views=2,
    worker=0,
    num_workers=1,
):
    """Batches of two views of every image, epoch after epoch.

    Every random choice is a pure function of (seed, step, place in the batch, view), and
    the order one of (seed, epoch): two runs see the same, and a run that begins at
    `start_step` sees what an uninterrupted one would. What it skips is not decoded.

    Args:
      source: a `byol_tf.data.source.Source`.
      image_size: side of a view, in pixels.
      batch_size: global batch size, in images.
      epochs: how often to pass over the source.
      seed: int.
      start_step: batches to skip.
      augment_on: "host" for finished views; "accelerator" for cropped ones, which
        `augment_batch` finishes inside the step.
      min_crop_area: the smallest part of an image's area that a view shows.
      augmentation: one of `augment.AUGMENTATIONS`, for "host".
      num_views: 2, or 1 for "view1" alone.
      worker, num_workers: of every global batch give the part of this one of so many workers,
        in the order of the workers; the rest is neither decoded nor augmented.

    Returns:
      A dataset of dicts: "view1" and "view2", float32 [B, image_size, image_size, C], and
      "label", int64 [B], where the source has labels; B = batch_size / num_workers, and C the
      source's channels. On the accelerator the views are uint8 and come with their "draws1" and
      "draws2", float32 [B, NUM_DRAWS].

    Raises:
      UserError: if there are fewer images than one batch.
      ValueError: if num_workers does not divide batch_size.
    """
    if batch_size % num_workers:
        raise ValueError(f"batch_size={batch_size}: must divide by num_workers={num_workers}.")
    per_epoch = steps_per_epoch(source, batch_size)
    start_epoch, skipped_batches = divmod(start_step, per_epoch)
    in_memory = _fits_in_memory(source)
    records = _decoded(source).cache() if in_memory else source.dataset
    light = in_memory or source.read is not None
    area_range = (min_crop_area, crop.AREA_RANGE[1])
    shuffle_buffer = source.num_examples if light else _shuffled(source)

    def one_epoch(epoch):
        # Of this function's graph only: without it the user's global seed changes the order.
        tf.random.set_seed(1)
        skipped = tf.where(epoch == start_epoch, skipped_batches * batch_size, 0)
        shuffled = records.shuffle(
            shuffle_buffer, seed=seed * 1_000_003 + epoch, reshuffle_each_iteration=False
        )
        return shuffled.take(per_epoch * batch_size).skip(tf.cast(skipped, tf.int64))

    examples = tf.data.Dataset.range(start_epoch, epochs).flat_map(one_epoch)
    part = batch_size // num_workers
    first = worker * part

    def draws_of_step(step):
        """All random numbers of a batch: float32 [B, num_views, _DRAWS] in [0, 1)."""
        draws = tf.random.stateless_uniform([batch_size, num_views, _DRAWS], [seed, step])
        return draws[first : first + part]

    draws = tf.data.Dataset.range(start_step, epochs * per_epoch).map(draws_of_step)
    if num_workers > 1:
        places = tf.data.Dataset.range(batch_size).repeat()
        examples = (
            tf.data.Dataset.zip((places, examples))
            .filter(lambda place, _: place // part == worker)
            .map(lambda _, record: record)
        )
    on_host = augment_on == "host"

    def views_of_batch(batch, draws):
        cropped = _crop_batch(batch, draws, image_size, area_range)
        return augment_batch(cropped, augmentation) if on_host else cropped

    def views_of_image(record, draws):
        cropped = _crop_encoded(source, record, draws, image_size, area_range)
        if not on_host:
            return cropped
        # One at a time: a batch of large images leaves the processor's cache at every step.
        batch = {name: value[tf.newaxis] for name, value in cropped.items()}
        return {name: value[0] for name, value in augment_batch(batch, augmentation).items()}

    if in_memory:
        examples = examples.batch(part, drop_remainder=True)
        batches = _map(tf.data.Dataset.zip((examples, draws)), views_of_batch)
    else:
        images = tf.data.Dataset.zip((examples, draws.unbatch()))
        batches = _map(images, views_of_image).batch(part, drop_remainder=True)
    if source.class_names is None:
        batches = batches.map(lambda batch: {k: v for k, v in batch.items() if k != "label"})
    return batches.with_options(_options()).prefetch(2)


def augment_batch(batch, augmentation="paper"):
    """Finishes the cropped views of a batch (paper, appendix B).

    Args:
      batch: from `pretrain_batches` for the accelerator: "view1" and "view2", uint8
        [B, S, S, C], "draws1" and "draws2", float32 [B, NUM_DRAWS], and maybe "label".
      augmentation: one of `augment.AUGMENTATIONS`.

    Returns: a dict of the views that there are, float32 [B, S, S, C], and the label.
    """
    views = {
        f"view{i}": augment.augment(batch[f"view{i}"], batch[f"draws{i}"], view)
        for i, view in enumerate(augment.AUGMENTATIONS[augmentation], 1)
        if f"view{i}" in batch
    }
    return {**views, **({"label": batch["label"]} if "label" in batch else {})}


def eval_batches(source, *, image_size, batch_size=256, fraction=crop.CENTRE_FRACTION):
    """Every image once, in order, centre-cropped (paper, appendix C.1).

    Args:
      source: a `byol_tf.data.source.Source`.
      image_size: side of the result, in pixels.
      batch_size: in images.
      fraction: side of the crop over the shorter side of the image.

    Returns:
      A dataset of dicts: "image", uint8 [B, image_size, image_size, source.channels], "label" and
      "index", int64 [B], "name", string [B]. The last batch may be smaller.
    """

    def centre(record):
        example = source.example(record)
        image = decode.decode(example["image"], source.channels)
        image = crop.centre_crop_and_resize(image, image_size, fraction)
        image = tf.ensure_shape(image, [image_size, image_size, source.channels])
        return {**example, "image": image}

    batches = _map(source.dataset, centre).batch(batch_size)
    return batches.with_options(_options()).prefetch(2)


def images_at(source, places, image_size):
    """The images at these places of a source, centre-cropped; no other is decoded.

    Args: source: a `byol_tf.data.source.Source`. places: N integers. image_size: in pixels.

    Returns: uint8 array [N, image_size, image_size, C].
    """
    wanted = tf.constant(places, tf.int64)
    chosen = source.dataset.filter(lambda record: tf.reduce_any(record["index"] == wanted))
    images = {}
    for batch in eval_batches(dataclasses.replace(source, dataset=chosen), image_size=image_size):
        images.update(zip(batch["index"].numpy(), batch["image"].numpy()))
    return np.stack([images[place] for place in places])


def view_pairs(
    source,
    count,
    *,
    image_size,
    seed=0,
    step=0,
    min_crop_area=crop.AREA_RANGE[0],
    augmentation="paper",
):
    """Both views of a few images as the networks see them, in 8 bits to look at.

    The images, drawn among the first thousand (of files, among all), are not those of the
    step, which would take a pass over an epoch's order; their views are made the same way.

    Args:
      source: a `byol_tf.data.source.Source`.
      count: pairs; as many as there are images where they are fewer.
      step: of the training; each gives other views.
      image_size, seed, min_crop_area, augmentation: as of `pretrain_batches`.

    Returns: uint8 array [count, 2, image_size, image_size, C].
    """
    count = min(count, source.num_examples)
    among = source.num_examples if source.read else 1024
    records = source.dataset.shuffle(among, seed=seed, reshuffle_each_iteration=False).take(count)
    draws = tf.random.stateless_uniform([count, 2, _DRAWS], [seed, step])
    area_range = (min_crop_area, crop.AREA_RANGE[1])

    def crop_both(record, draws):
        return _crop_encoded(source, record, draws, image_size, area_range)

    records = tf.data.Dataset.zip((records, tf.data.Dataset.from_tensor_slices(draws)))
    batch = next(iter(_map(records, crop_both).batch(count)))
    # Not in the dataset: to trace the augmentation takes seconds, to do it once does not.
    batch = augment_batch(batch, augmentation)
    return augment.denormalize(tf.stack([batch["view1"], batch["view2"]], 1)).numpy()


def _fits_in_memory(source):
    """Whether the decoded images, all of one size, are worth keeping."""
    shape = source.image_shape
    return bool(shape) and source.num_examples * shape[0] * shape[1] * shape[2] <= _CACHE_BYTES


def _shuffled(source):
    """How many records of a streamed source are shuffled at a time."""
    pixels = source.dataset.element_spec["image"].shape.num_elements()  # 1 of encoded images
    return max(1, min(_SHUFFLED_RECORDS, _SHUFFLED_BYTES // (pixels or 2**20)))


def _decoded(source):
    """The source's images as pixels, whole, with index and label."""

    def decode_whole(record):
        example = source.example(record)
        image = decode.decode(example["image"], source.channels)
        image = tf.ensure_shape(image, source.image_shape)
        return {"image": image, "index": example["index"], "label": example["label"]}

    return _map(source.dataset, decode_whole)


def _crop_batch(batch, draws, image_size, area_range):
    """The crops of every decoded image of a batch, in a few matmuls."""
    images = batch["image"]
    cropped = {"label": batch["label"]}
    for i in range(draws.shape[1]):
        heights = tf.fill([tf.shape(images)[0]], images.shape[1])
        widths = tf.fill([tf.shape(images)[0]], images.shape[2])
        boxes = crop.random_crop_boxes(heights, widths, draws[:, i, : crop.NUM_DRAWS], area_range)
        cropped[f"view{i + 1}"] = crop.crop_and_resize(images, boxes, image_size)
        cropped[f"draws{i + 1}"] = draws[:, i, crop.NUM_DRAWS :]
    return cropped


def _crop_encoded(source, record, draws, image_size, area_range):
    """The crops of one encoded image, of which as much is decoded, once, as all need."""
    example = source.example(record)
    num_views = draws.shape[0]
    height, width = tf.unstack(decode.image_size(example["image"]))
    heights, widths = tf.fill([num_views], height), tf.fill([num_views], width)
    boxes = crop.random_crop_boxes(heights, widths, draws[:, : crop.NUM_DRAWS], area_range)
    enclosing = crop.enclosing_box(boxes)
    pixels = decode.decode_and_crop(example["image"], enclosing, source.channels)
    cropped = {"label": example["label"]}
    for i in range(num_views):
        view = crop.resize(crop.cut(pixels, boxes[i], enclosing[:2]), image_size)
        cropped[f"view{i + 1}"] = tf.ensure_shape(view, [image_size, image_size, source.channels])
        cropped[f"draws{i + 1}"] = draws[i, crop.NUM_DRAWS :]
    return cropped


def _map(dataset, function):
    # Autograph would take seconds to find that there is nothing to convert.
    function = tf.autograph.experimental.do_not_convert(function)
    return dataset.map(function, num_parallel_calls=_PARALLEL_CALLS, deterministic=True)


def _options():
    options = tf.data.Options()
    options.deterministic = True
    # Its thread can hold up the end of a short fit for as long as its period.
    options.autotune.enabled = False
    # The parallel calls have work for every core: an operation need not be cut up among them.
    options.threading.max_intra_op_parallelism = 1
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return options
