"""Where the images come from: TFDS data sets and folders, behind one `Source`."""

import contextlib
import dataclasses
import difflib
from collections.abc import Callable

import tensorflow as tf
from absl import logging

from byol_tf.data import decode
from byol_tf.errors import NoSplit, UserError, one_line, reason

_NETWORK_TIMEOUT = 10  # seconds; TFDS itself retries for minutes
_DIR_FLAGS = {  # where what a flag names is looked for
    "dataset": "data_dir",
    "finetune_dataset": "data_dir",
    "dense_data": "dense_data_dir",
    "transfer": "transfer_data_dir",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Encoded images, or their pixels, in a fixed order.

    Attributes:
      dataset: a `tf.data.Dataset` of records, dicts of scalars: "index", int64, the position
        in the source; "image", string, the encoded image, or uint8 [H, W, channels]; "label",
        int64, -1 where there is none, or with several labels an image, [K]: 1 for a class that is
        there, 0 for one that is not, -1 where that is not to be judged; "name", string.
      num_examples: int.
      class_names: tuple of strings, or None where there are no labels.
      image_shape: (height, width, channels) where all decoded images are of this size, or None.
      read: where the images are files of their own, the records have no "image" but what
        this function of a record needs to read it, so that they can be shuffled and skipped
        unread.
      find_fault: to call after an error: looks for what cannot be read, which may take as long
        as an epoch, and tells it in one line (else None).
      channels: of the decoded images; encoded ones have 1 to 4, see `decode.decode`.
    """

    dataset: tf.data.Dataset
    num_examples: int
    class_names: tuple | None
    image_shape: tuple | None
    read: Callable | None = None
    find_fault: Callable = lambda: None
    channels: int = 3

    def example(self, record):
        """A record with its encoded image: "index", "image", "label" and "name"."""
        if self.read is None:
            return {name: record[name] for name in ("index", "image", "label", "name")}
        return {
            **{name: record[name] for name in ("index", "label", "name")},
            "image": self.read(record),
        }


def load_source(dataset, split, data_dir=None, channels=3, *, multi_label=False, flag="dataset"):
    """Opens a data set; one from TFDS is downloaded and prepared if it has not been yet.

    Args:
      dataset: "image_folder", "shapes" (built in) or a TFDS name ("cifar10",
        "imagenette/320px-v2").
      split: a split of it, for TFDS with slices ("train[:10%]").
      data_dir: the folder of images, or that of TFDS's prepared data sets (None for
        `~/tensorflow_datasets`).
      channels: of the images. Those in files have 1 to 4, as `decode.decode` tells, whatever the
        files have. More have the examples of TFDS whose "image" is a uint8 `Tensor` of
        [H, W, channels].
      multi_label: of TFDS: the classes are those of "labels", several an image, as of "voc/2007";
        of those only in "labels", not in "labels_no_difficult", nothing is judged.
      flag: that the data set is from, which errors name.

    Returns: a `Source`.

    Raises:
      UserError: if there is no such data set or split, it cannot be read, or has not these
        channels.
    """
    if dataset == "image_folder":
        from byol_tf.data import image_folder

        _check_files_have(channels)
        return image_folder.load(split, data_dir, channels)
    builder = open_builder(dataset, data_dir, flag)
    return _read(builder, f"--{flag}={dataset}", split, channels, multi_label)


def open_builder(dataset, data_dir, flag="dataset"):
    """The TFDS builder of a data set, which is prepared if it has not been yet.

    Raises:
      UserError: as `load_source`; names the flag that the data set is from.
    """
    builder = _builder(dataset, data_dir, flag)
    if not builder.is_prepared():
        _prepare(builder, dataset, data_dir, flag)
        builder = _builder(dataset, data_dir, flag)  # if another process did it, read so here
    return builder


def _check_files_have(channels):
    """Refuses a number of channels that no image file has."""
    if channels > decode.MAX_CHANNELS:
        raise UserError(
            f"--channels={channels}: image files have 1 (gray), 2 (with alpha), 3 (RGB) or 4 (with "
            "alpha): more need a data set of TFDS whose 'image' is a uint8 Tensor."
        )


def _builder(dataset, data_dir, flag):
    """The TFDS builder of a data set."""
    if dataset == "shapes":
        from byol_tf.data.shapes import Shapes

        return Shapes(data_dir=data_dir)
    import tensorflow_datasets as tfds  # slow to import

    try:
        return tfds.builder(dataset, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        known = ["image_folder", "shapes", *tfds.list_builders(with_community_datasets=False)]
        close = ", ".join(difflib.get_close_matches(dataset, known)) or "image_folder, shapes"
        raise UserError(
            f"--{flag}={dataset}: no such data set; try {close}, or another of "
            "https://www.tensorflow.org/datasets/catalog."
        ) from error
    # AssertionError for a wrong version, others for a wrong configuration, a bad name or, of any
    # kind, for files of a prepared data set that are broken.
    except Exception as error:
        raise UserError(
            f"--{flag}={dataset}: TFDS cannot open it; give NAME, NAME/CONFIG or NAME:VERSION "
            f"({one_line(error)})."
        ) from error


def _prepare(builder, dataset, data_dir, flag):
    """Downloads and prepares a data set as TFDS does, but fails within seconds and one line."""
    import tensorflow_datasets as tfds

    try:
        _check_network(builder)
        # Without a look at Google's bucket, which also waits long for a network.
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_config=config)
    # Any of TFDS's thousand builders may raise anything.
    except Exception as error:
        if _builder(dataset, data_dir, flag).is_prepared():  # by another process, which was faster
            return
        where = f"--{_DIR_FLAGS[flag]}={data_dir}" if data_dir else "~/tensorflow_datasets"
        raise UserError(
            f"--{flag}={dataset}: not prepared under {where}, and could not be now "
            f"({type(error).__name__}: {one_line(error)}): {_mend(dataset, data_dir)}."
        ) from error


def _mend(dataset, data_dir):
    """What to do about a data set that could not be prepared."""
    if dataset == "shapes":
        return "choose a --data_dir that can be written"
    place = f", data_dir={str(data_dir)!r}" if data_dir else ""
    command = f"import tensorflow_datasets as tfds; tfds.load({dataset!r}{place})"
    return f'run python -c "{command}" where it can be downloaded'


def _check_network(builder):
    """Raises an exception at once if what `builder` has to download is out of reach."""
    import requests

    urls = [url for url in builder.url_infos or () if url.startswith("http")]
    if urls and not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        requests.head(urls[0], timeout=_NETWORK_TIMEOUT)


def _read(builder, given, split, channels, multi_label):
    """The `Source` of a split of a prepared TFDS data set; `given`: its flag, for errors."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    _check_images(features, given, channels)
    try:
        num_examples = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise NoSplit(
            f"{given}: no split {split!r}; there are "
            f"{', '.join(builder.info.splits)}, and parts of them as in 'train[:10%]'."
        ) from error
    class_names, label_features, read_label = _labels(features, multi_label)
    names = [name for name in ("file_name", "id") if name in features][:1]
    wanted = ["image", *label_features, *names]
    encoded = isinstance(features["image"], tfds.features.Image)
    decoders = tfds.decode.PartialDecoding(
        {name: True for name in wanted},
        decoders={"image": tfds.decode.SkipDecoding()} if encoded else None,
    )
    with _quiet():
        examples = builder.as_dataset(
            split=split, decoders=decoders, read_config=_read_config(), shuffle_files=False
        )

    def as_example(index, example):
        return {
            "index": index,
            "image": example["image"],
            "label": read_label(example),
            "name": tf.strings.as_string(example[names[0]])
            if names
            else tf.strings.join([split, "/", tf.strings.as_string(index)]),
        }

    images = examples.enumerate().map(as_example)
    height, width = features["image"].shape[:2]
    shape = (height, width, channels) if height and width else None
    return Source(
        dataset=images,
        num_examples=num_examples,
        class_names=class_names,
        image_shape=shape,
        find_fault=lambda: _find_fault(
            builder, given, split, images, shape or (None, None, channels)
        ),
        channels=channels,
    )


def _labels(features, multi_label):
    """Class names or None, the features that tell the label, and the function that reads it."""
    import tensorflow_datasets as tfds

    label = _feature(features, "label")
    if multi_label:
        names = tuple(features["labels"].feature.names)

        def several(example):
            there, judged = (
                tf.reduce_any(tf.one_hot(example[name], len(names), True, False), 0)
                for name in ("labels", "labels_no_difficult")
            )
            return tf.cast(judged, tf.int64) - tf.cast(there & ~judged, tf.int64)

        return names, ["labels", "labels_no_difficult"], several
    if isinstance(label, tfds.features.ClassLabel):
        return tuple(label.names), ["label"], lambda example: example["label"]
    return None, [], lambda example: tf.constant(-1, tf.int64)


def _check_images(features, given, channels):
    """Refuses a data set whose examples have no images, or none of so many channels."""
    import tensorflow_datasets as tfds

    image = _feature(features, "image")
    encoded = isinstance(image, tfds.features.Image)
    if not encoded and not (isinstance(image, tfds.features.Tensor) and len(image.shape) == 3):
        raise UserError(
            f"{given}: its examples have no feature 'image', only "
            f"{', '.join(features)}: choose an image data set."
        )
    dtype = tf.as_dtype(image.np_dtype).name
    # 16 bits of a PNG are full range by its standard; those of a sensor are not.
    if dtype not in (("uint8", "uint16") if encoded else ("uint8",)):
        raise UserError(
            f"{given}: its images are {dtype}, whose range is not known: prepare them "
            "as uint8, from 0 to 255."
        )
    if encoded:
        _check_files_have(channels)
    elif image.shape[2] != channels:
        raise UserError(
            f"--channels={channels}: the images of {given} have {image.shape[2]}: "
            f"give --channels={image.shape[2]}."
        )


def _find_fault(builder, given, split, images, shape):
    """What is wrong with the files or the images of a prepared data set, or None; see `Source`."""
    fault = _fault_of_files(builder, split) or _fault_of_images(images, shape)
    return fault and f"{given}: {fault}"


def _fault_of_files(builder, split):
    """Which file of a split does not hold the records that it should, or None."""
    for part in builder.info.splits[split].file_instructions:
        try:
            found = sum(1 for _ in tf.data.TFRecordDataset(part.filename))
            fault = f"{found} records, not {part.examples_in_shard}"
        except tf.errors.OpError as error:
            found, fault = None, reason(error)
        if found != part.examples_in_shard:
            return f"{part.filename} is broken ({fault}): prepare the data set anew"
    return None


def _fault_of_images(images, shape):
    """Which image of a data set cannot be decoded, or is not of `shape`, or None."""

    def decoded(example):
        return tf.ensure_shape(decode.decode(example["image"], shape[-1]), shape)

    @tf.autograph.experimental.do_not_convert
    def place(example):
        with tf.control_dependencies([tf.identity(decoded(example))]):
            return tf.identity(example["index"])

    sound = images.map(place, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    for expected, index in enumerate(sound.ignore_errors()):
        if index != expected:
            (example,) = images.skip(expected).take(1)
            try:
                decoded(example)
            except tf.errors.OpError as error:
                name = example["name"].numpy().decode(errors="replace")
                return f"the image {name} cannot be decoded ({reason(error)}): take it out"
    return None


def _feature(features, name):
    return features[name] if name in features else None


@contextlib.contextmanager
def _quiet():
    """Keeps back warnings: TFDS warns of its own use of what it has deprecated."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _read_config():
    """Reads in one order, file after file, and without autotuning's threads."""
    import tensorflow_datasets as tfds

    options = tf.data.Options()
    options.autotune.enabled = False
    return tfds.ReadConfig(
        options=options,
        try_autocache=False,
        interleave_cycle_length=1,
        num_parallel_calls_for_decode=1,
        num_parallel_calls_for_interleave_files=1,
        skip_prefetch=True,
    )
