"""What the tests share: two logical CPUs, small sources and data sets, and main.py."""

import os
import pathlib
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import forked
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from byol_tf.batch_norm import SyncBatchNormalization
from byol_tf.data.source import Source
from byol_tf.keras_api import keras

# Before anything runs: replicas can be tried on any machine.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


@pytest.fixture(scope="session")
def mirrored():
    """Two replicas. Only once a process: each strategy would count its sums from the start, and
    TensorFlow would take one for another's."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """What runs of main.py are forked from."""
    server = forked.Server(tmp_path_factory.mktemp("home"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def main(server, tmp_path_factory):
    """Function that runs main.py with these flags: (exit code, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("cwd")  # it runs from anywhere

    def run(*args, **kwargs):
        outputs = [pathlib.Path(tempfile.mkstemp(dir=folder)[1]) for _ in range(2)]
        server.start(args, folder, *outputs, **kwargs)
        return server.exit_code(), *(output.read_text() for output in outputs)

    return run


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of blue and red images: 2 x 10 to train (2 batches and a rest), 2 x 4 to test."""
    return write_images(tmp_path_factory.mktemp("images"), train=10, test=4)


@pytest.fixture(scope="session")
def more_images(tmp_path_factory):
    """A folder of blue and red images: 2 x 18 to train, 2 x 20 to test."""
    return write_images(tmp_path_factory.mktemp("more_images"), train=18, test=20)


def write_images(root, **counts):
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for name, colour in (("blue", (40, 40, 215)), ("red", (215, 40, 40))):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.array(colour) + rng.integers(-40, 40, (20, 24, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def make_source():
    """Function to a `Source` of random 16x16 images, with labels of 4 classes."""

    def make(count=64, labels=True):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)
        encoded = [tf.io.encode_png(image).numpy() for image in pixels]
        slices = {
            "index": np.arange(count, dtype=np.int64),
            "image": encoded,
            "label": np.arange(count, dtype=np.int64) % 4 if labels else np.full(count, -1),
            "name": [f"{i}.png" for i in range(count)],
        }
        dataset = tf.data.Dataset.from_tensor_slices(slices)
        return Source(dataset, count, ("a", "b", "c", "d") if labels else None, (16, 16, 3))

    return make


@pytest.fixture
def tiny_encoder():
    """Function to an encoder [B, 16, 16, 3] -> [B, 8], batch norm included."""

    def make(synchronized=False):
        return keras.Sequential(
            [
                keras.Input((16, 16, 3)),
                keras.layers.Conv2D(8, 3, 2, use_bias=False),
                (SyncBatchNormalization if synchronized else keras.layers.BatchNormalization)(),
                keras.layers.ReLU(),
                keras.layers.GlobalAveragePooling2D(),
            ]
        )

    return make


@pytest.fixture(scope="session")
def prepare_set():
    """Function that prepares a `transfer.TransferSet` with so many images a split, of which TFDS'
    own builder tells the features; what TFDS lacks becomes a folder. Three classes, in turn."""
    import tensorflow_datasets as tfds

    def value(feature, i, seed):
        if isinstance(feature, tfds.features.ClassLabel):
            return i % min(3, feature.num_classes)
        if isinstance(feature, tfds.features.Image):
            shape = [side or 12 for side in feature.shape]
            return np.random.default_rng([seed, i]).integers(0, 256, shape, np.uint8)
        if isinstance(feature, tfds.features.BBoxFeature):
            return tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
        return str(i)

    def example(features, i, seed):
        if "objects" in features:  # VOC: people, the third image with difficult cats, then nothing
            there = ["person"] if i % 4 < 3 else []
            return {
                "image": value(features["image"], i, seed),
                "image/filename": str(i),
                "objects": [],
                "labels": ["cat", *there] if i % 4 == 2 else there,
                "labels_no_difficult": there,
            }
        return {name: value(feature, i, seed) for name, feature in features.items()}

    def prepare(chosen, data_dir, counts):
        try:
            builder = tfds.builder(chosen.name, data_dir=data_dir)
        except tfds.core.DatasetNotFoundError:
            for seed, (split, count) in enumerate(counts.items()):
                for i in range(count):
                    path = data_dir / chosen.name / split / f"class{i % 3}" / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    pixels = value(tfds.features.Image(shape=(12, 12, 3)), i, seed)
                    path.write_bytes(tf.io.encode_png(pixels).numpy())
            return
        features = builder.info.features
        tfds.dataset_builders.store_as_tfds_dataset(
            name=builder.name,
            version=str(builder.version),
            config=builder.builder_config.name if builder.builder_config else None,
            features=features,
            split_datasets={
                split: [(i, example(features, i, seed)) for i in range(count)]
                for seed, (split, count) in enumerate(counts.items())
            },
            data_dir=data_dir,
            disable_shuffling=True,
        )

    return prepare
