"""The feature maps: of the encoder itself, at their strides, elsewhere, and in a detector."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from byol_tf import resnet
from byol_tf.backbone import resnet_backbone, save_backbone
from byol_tf.keras_api import keras

# A fresh process, isolated and in another folder, where byol_tf cannot be imported.
LOAD = """
import importlib, sys

sys.modules["byol_tf"] = None  # an import of it fails
keras = importlib.import_module(sys.argv[1])
import numpy as np

backbone = keras.models.load_model("backbone.h5", compile=False)
maps = backbone(np.load("images.npy"))
np.savez("maps.npz", **{name: np.array(value) for name, value in maps.items()})
"""


def make_encoder(name="resnet18", stem="imagenet", synchronized=True):
    encoder = resnet.resnet_encoder(
        name,
        width_multiplier=0.0625,
        stem=stem,
        image_size=64,
        synchronized_batch_norm=synchronized,
    )
    rng = np.random.default_rng(0)
    for layer in encoder.layers:  # as after some training
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_mean.assign(rng.normal(0, 0.1, layer.moving_mean.shape))
            layer.beta.assign(rng.normal(0, 0.1, layer.beta.shape))
    return encoder


IMAGES = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_maps_are_the_encoders(name, stem):
    encoder = make_encoder(name, stem)
    backbone = resnet_backbone(encoder)
    assert {type(layer).__module__.split(".")[0] for layer in backbone.layers} == {
        keras.__name__.split(".")[0]
    }  # none of byol_tf's, though these are synchronized
    maps = backbone(IMAGES)
    blocks = resnet.BLOCKS_PER_GROUP[name]
    for group, stride in enumerate((4, 8, 16, 32)):
        stride //= 1 if stem == "imagenet" else 4
        last = encoder.get_layer(f"group{group}_block{blocks[group] - 1}_relu")
        expected = keras.Model(encoder.input, last.output)(IMAGES)
        assert expected.shape[1:3] == (64 // stride, 64 // stride)
        np.testing.assert_allclose(maps[f"C{group + 2}"], expected, atol=1e-5)
    np.testing.assert_allclose(tf.reduce_mean(maps["C5"], [1, 2]), encoder(IMAGES), atol=1e-5)


def test_other_sizes():
    maps = resnet_backbone(make_encoder())(tf.zeros([1, 70, 100, 3]))
    assert [tuple(maps[f"C{i}"].shape[1:3]) for i in (2, 3, 4, 5)] == [
        *((18, 25), (9, 13)),
        *((5, 7), (3, 4)),
    ]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_dilated(name):
    """The same weights at stride 16; where all pixels see the same, the same values."""
    encoder = make_encoder(name)
    plain, dilated = resnet_backbone(encoder), resnet_backbone(encoder, dilated=True)
    for layer in dilated.layers:
        if isinstance(layer, keras.layers.Conv2D):
            of_last = layer.name.startswith("group3_")
            dilation = 2 if of_last and layer.kernel_size == (3, 3) else 1
            assert layer.dilation_rate == (dilation, dilation), layer.name
            assert not of_last or layer.strides == (1, 1)
    maps, expected = dilated(IMAGES), plain(IMAGES)
    np.testing.assert_array_equal(maps["C4"], expected["C4"])
    assert maps["C5"].shape[1:3] == maps["C4"].shape[1:3]
    flat = np.ones((1, 640, 640, 3), np.float32)  # the centre does not see the border
    centre = dilated(flat)["C5"][0, 20, 20]
    assert np.std(centre) > 1e-2
    np.testing.assert_allclose(centre, plain(flat)["C5"][0, 10, 10], atol=1e-4)


def test_a_copy():
    encoder = make_encoder()
    weights = encoder.get_weights()
    backbone = resnet_backbone(encoder)
    for weight in backbone.weights:
        weight.assign(weight + 1.0)
    assert all(map(np.array_equal, encoder.get_weights(), weights))


def test_another_encoder():
    other = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.GlobalAveragePooling2D()])
    with pytest.raises(ValueError, match="must be one of byol_tf.resnet_encoder"):
        resnet_backbone(other)


def _load_elsewhere(backbone, tmp_path, package):
    """The maps, by this Keras in a process without byol_tf."""
    save_backbone(backbone, tmp_path / "backbone.h5")
    save_backbone(backbone, tmp_path / "backbone.h5")  # over what is there
    assert [path.name for path in tmp_path.iterdir()] == ["backbone.h5"]
    np.save(tmp_path / "images.npy", IMAGES)
    command = [sys.executable, "-I", "-c", LOAD, package]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(tmp_path / "maps.npz")


@pytest.mark.parametrize("package", dict.fromkeys([keras.__name__.split(".")[0], "keras"]))
def test_loads_without_byol_tf(tmp_path, package):
    """By Keras 2 and, where it is there, by Keras 3."""
    backbone = resnet_backbone(make_encoder())
    maps, expected = _load_elsewhere(backbone, tmp_path, package), backbone(IMAGES)
    assert set(maps) == {"C2", "C3", "C4", "C5"}
    for name, value in expected.items():
        np.testing.assert_allclose(maps[name], value, atol=1e-5)


# docs/evaluation.md has what each library needs to know of the backbone; these run it.
def test_detector_of_keras_cv(tmp_path):
    keras_cv = pytest.importorskip(
        "keras_cv", reason="KerasCV is not installed: ITS DETECTOR WAS NOT TESTED"
    )
    save_backbone(resnet_backbone(make_encoder()), tmp_path / "backbone.h5")
    backbone = keras.models.load_model(tmp_path / "backbone.h5", compile=False)
    backbone.pyramid_level_inputs = {"P3": "C3", "P4": "C4", "P5": "C5"}
    detector = keras_cv.models.RetinaNet(backbone, num_classes=3, bounding_box_format="xyxy")
    detector.compile(
        optimizer=keras.optimizers.SGD(0.01, global_clipnorm=10.0),
        box_loss="smoothl1",
        classification_loss="focal",
        jit_compile=False,
    )
    boxes = np.array([[[8, 8, 48, 48]], [[16, 0, 60, 30]]], np.float32)
    _check_detector(detector, {"boxes": boxes, "classes": np.array([[0.0], [2.0]])}, backbone)


def test_detector_of_keras_hub(tmp_path):
    keras_hub = pytest.importorskip(
        "keras_hub", reason="KerasHub is not installed: ITS DETECTOR WAS NOT TESTED"
    )
    import keras as keras3

    save_backbone(resnet_backbone(make_encoder()), tmp_path / "backbone.h5")
    encoder = keras3.models.load_model(tmp_path / "backbone.h5", compile=False)
    encoder.pyramid_outputs = {f"P{i}": encoder.get_layer(f"C{i}").output for i in (3, 4, 5)}
    backbone = keras_hub.models.RetinaNetBackbone(encoder, min_level=3, max_level=7, use_p5=False)
    detector = keras_hub.models.RetinaNetObjectDetector(
        backbone, num_classes=3, bounding_box_format="xyxy"
    )
    detector.compile(optimizer=keras3.optimizers.SGD(0.01, global_clipnorm=10.0))
    boxes = np.array([[[8, 8, 48, 48]], [[16, 0, 60, 30]]], np.float32)
    _check_detector(detector, {"boxes": boxes, "labels": np.array([[0.0], [2.0]])}, encoder)


def _check_detector(detector, boxes, backbone):
    """Its loss falls, the encoder in it learns, and it detects."""
    before = backbone.get_layer("group1_block0_0_conv").get_weights()[0]
    losses = detector.fit(IMAGES, boxes, batch_size=2, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    after = backbone.get_layer("group1_block0_0_conv").get_weights()[0]
    assert not np.array_equal(before, after)
    found = detector.predict(IMAGES, verbose=0)
    assert found["boxes"].shape[0] == 2 and found["boxes"].shape[2] == 4
