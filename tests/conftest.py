"""What the tests share: two logical CPUs, small sources without files, and main.py."""

import os
import pathlib
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest
import tensorflow as tf

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


@pytest.fixture(scope="module")
def main(tmp_path_factory):
    """Function that runs main.py with these flags: (exit code, stdout, stderr)."""
    home = tmp_path_factory.mktemp("home")
    env = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    env["CUDA_VISIBLE_DEVICES"] = ""
    folder = tmp_path_factory.mktemp("cwd")  # it runs from anywhere
    script = pathlib.Path(__file__).parent.parent / "main.py"

    def run(*args):
        command = [sys.executable, str(script), *map(str, args)]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


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
