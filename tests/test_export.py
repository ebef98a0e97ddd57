"""The SavedModel, loaded where there is no byol_tf, and the files of embeddings."""

import io
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from byol_tf import evaluation, resnet
from byol_tf.data.source import Source
from byol_tf.embed import write_embeddings
from byol_tf.export import export_encoder
from byol_tf.keras_api import keras

SIZE = 16
# A fresh process: isolated (-I), in another folder, with neither byol_tf nor any Keras.
SERVE = """
import sys

for name in ("byol_tf", "keras", "tf_keras"):
    sys.modules[name] = None  # an import of it fails

import numpy as np
import tensorflow as tf

try:
    import byol_tf
except ImportError:
    pass
else:
    raise SystemExit("byol_tf can be imported")
given = np.load("in.npz", allow_pickle=True)
model = tf.saved_model.load(sys.argv[1])
out = {}
for name in given.files:
    if name.startswith("images"):
        result = model.signatures["serving_default"](images=tf.constant(given[name]))
    else:
        encoded = tf.constant(list(given[name]), tf.string)
        result = model.signatures["serving_bytes"](image_bytes=encoded)
    assert list(result) == ["embedding"], list(result)
    out[name] = result["embedding"].numpy()
np.savez("out.npz", **out)
"""


def make_encoder(seed=0):
    keras.utils.set_random_seed(seed)
    encoder = resnet.resnet_encoder(
        "resnet18", width_multiplier=0.05, stem="small", image_size=SIZE
    )
    for layer in encoder.layers:  # statistics as after some training
        if isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.moving_mean.shape
            layer.moving_mean.assign(np.random.default_rng(1).normal(0, 0.1, shape))
    return encoder


def picture(height=20, width=30, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, rng.integers(20, 256, 3), (height, width, 3), np.uint8)  # a colour each


def encode(pixels, kind):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def in_process(encoder, encoded):
    """What the evaluation gives for these files."""
    count = len(encoded)
    slices = {
        "index": np.arange(count, dtype=np.int64),
        "image": encoded,
        "label": np.full(count, -1, np.int64),
        "name": [str(i) for i in range(count)],
    }
    source = Source(tf.data.Dataset.from_tensor_slices(slices), count, None, None)
    return evaluation.extract_features(encoder, source, image_size=SIZE).vectors


@pytest.fixture(scope="module")
def encoder():
    return make_encoder()


@pytest.fixture(scope="module")
def exported(encoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "saved_model"
    export_encoder(encoder, path, image_size=SIZE)
    return path


@pytest.fixture(scope="module")
def loaded(exported):
    return tf.saved_model.load(str(exported))


def test_served_without_byol_tf(encoder, exported, tmp_path):
    """Arrays of several sizes and files of all kinds give what the evaluation gives."""
    images = {
        f"images{i}": np.stack([picture(height, width, seed) for seed in range(count)])
        for i, (count, height, width) in enumerate([(3, 20, 30), (2, 16, 16), (1, 90, 50)])
    }
    grey = picture()[..., 0]
    files = [encode(picture(), kind) for kind in ("JPEG", "PNG", "BMP", "GIF")]
    files += [encode(picture(50, 40, seed=5), "JPEG"), encode(grey, "PNG"), encode(grey, "JPEG")]
    np.savez(tmp_path / "in.npz", **images, files=np.array(files, object))
    command = [sys.executable, "-I", "-c", SERVE, str(exported)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    served = np.load(tmp_path / "out.npz")
    assert served["files"].dtype == np.float32 and served["files"].shape == (7, 25)
    np.testing.assert_allclose(served["files"], in_process(encoder, files), rtol=1e-4, atol=1e-5)
    for name, stack in images.items():
        expected = in_process(encoder, [encode(image, "PNG") for image in stack])
        np.testing.assert_allclose(served[name], expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(served["files"], axis=0).max() > 1e-2  # the comparisons above can fail


def test_saved_model_cli(encoder, exported, tmp_path):
    tool = pathlib.Path(sys.executable).with_name("saved_model_cli")
    run = [str(tool), "run", "--dir", str(exported), "--tag_set", "serve", "--signature_def"]
    stack = np.stack([picture(seed=1), picture(seed=2)])
    np.save(tmp_path / "images.npy", stack)
    escaped = "".join(f"\\x{byte:02x}" for byte in encode(stack[0], "PNG"))
    for signature, given in (
        ("serving_default", ["--inputs", f"images={tmp_path}/images.npy"]),
        ("serving_bytes", ["--input_exprs", f"image_bytes=[b'{escaped}']"]),
    ):
        command = [*run, signature, *given, "--outdir", str(tmp_path), "--overwrite"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found = np.load(tmp_path / "embedding.npy")
        files = [encode(image, "PNG") for image in stack]
        expected = in_process(encoder, files)[: len(found)]
        assert len(found) == (2 if signature == "serving_default" else 1)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_none_and_one(loaded, count):
    images = np.zeros((count, 12, 12, 3), np.uint8)
    embedding = loaded.signatures["serving_default"](images=tf.constant(images))["embedding"]
    assert embedding.shape == (count, 25)
    encoded = tf.constant([encode(picture(), "PNG")] * count, tf.string, [count])
    embedding = loaded.signatures["serving_bytes"](image_bytes=encoded)["embedding"]
    assert embedding.shape == (count, 25)


@pytest.mark.parametrize("broken", [b"", b"no image", encode(picture(), "JPEG")[:200]])
def test_broken_bytes_are_refused(loaded, broken):
    good = encode(picture(), "PNG")
    with pytest.raises(tf.errors.InvalidArgumentError):
        loaded.signatures["serving_bytes"](image_bytes=tf.constant([good, broken]))
    # And it serves on.
    loaded.signatures["serving_bytes"](image_bytes=tf.constant([good]))


def test_export_replaces(encoder, tmp_path):
    path = tmp_path / "new" / "saved_model"
    images = tf.constant(picture()[np.newaxis])
    embeddings = []
    for each in (encoder, make_encoder(seed=1)):
        export_encoder(each, path, image_size=SIZE)
        served = tf.saved_model.load(str(path)).signatures["serving_default"](images=images)
        embeddings.append(served["embedding"].numpy())
        assert [child.name for child in path.parent.iterdir()] == ["saved_model"]
    assert np.abs(embeddings[0] - embeddings[1]).max() > 1e-3


FOUND = evaluation.Features(
    np.arange(6, dtype=np.float32).reshape(3, 2), np.array([1, -1, 0]), ["a.jpg", "ü/b.jpg", "c"]
)


def test_embeddings_npz(tmp_path):
    path = tmp_path / "new" / "embeddings.npz"
    write_embeddings(FOUND, path, ("cat", "dog"))
    written = np.load(path)  # without pickle
    assert sorted(written.files) == ["class_names", "embedding", "label", "name"]
    np.testing.assert_array_equal(written["embedding"], FOUND.vectors)
    assert written["embedding"].dtype == np.float32 and written["label"].dtype == np.int64
    assert written["label"].tolist() == [1, -1, 0]
    assert written["name"].tolist() == FOUND.names
    assert written["class_names"].tolist() == ["cat", "dog"]
    write_embeddings(FOUND, path)
    assert sorted(np.load(path).files) == ["embedding", "name"]
    assert [child.name for child in path.parent.iterdir()] == ["embeddings.npz"]


def test_embeddings_parquet(tmp_path):
    import pyarrow.parquet

    path = tmp_path / "embeddings.parquet"
    write_embeddings(FOUND, path, ("cat", "dog"))
    assert pyarrow.parquet.read_table(path).to_pydict() == {
        "name": FOUND.names,
        "embedding": [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]],
        "label": [1, None, 0],
        "class_name": ["dog", None, "cat"],
    }
    unlabelled = evaluation.Features(FOUND.vectors, np.full(3, -1), FOUND.names)
    write_embeddings(unlabelled, path)
    table = pyarrow.parquet.read_table(path)
    assert table["label"].to_pylist() == table["class_name"].to_pylist() == [None] * 3
    assert [child.name for child in tmp_path.iterdir()] == ["embeddings.parquet"]


def test_embeddings_in_another_format(tmp_path):
    with pytest.raises(ValueError, match="must end in .npz or .parquet"):
        write_embeddings(FOUND, tmp_path / "embeddings.csv")
    assert not list(tmp_path.iterdir())
