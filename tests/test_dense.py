"""Segmentation and depth on generated scenes, and their losses and figures by hand."""

import json
import math
import pathlib
import re

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
import test_cli
from PIL import Image

from byol_tf import dense, resnet
from byol_tf.data import augment
from byol_tf.data.dense import count_known, depth_batches, load_dense, segmentation_batches
from byol_tf.errors import UserError, reason
from byol_tf.keras_api import keras

ROOT = pathlib.Path(__file__).parent.parent
SIZE = 32
STEMS = {"segmentation": "small", "depth": "imagenet"}  # so that a few pixels are left


def scenes(count, seed):
    """A rectangle of class 1 or 2 on background 0, uint8 images and masks; a frame of 255."""
    rng = np.random.default_rng(seed)
    colours = np.array([[90, 90, 90], [220, 60, 60], [60, 60, 220]])
    masks = np.zeros((count, SIZE, SIZE), np.uint8)
    for i, mask in enumerate(masks):
        top, left = rng.integers(2, 12, 2)
        height, width = rng.integers(10, 18, 2)
        mask[top : top + height, left : left + width] = 255
        mask[top + 1 : top + height - 1, left + 1 : left + width - 1] = 1 + i % 2
    images = colours[np.where(masks == 255, 0, masks)] + rng.integers(-30, 31, (*masks.shape, 3))
    return images.astype(np.uint8), masks


def rooms(count, seed):
    """Walls that are darker the farther they are: uint8 images and depths of 1 to 5 m, with
    holes of 0 and NaN."""
    rng = np.random.default_rng(seed)
    near, far = rng.uniform(1, 3, (count, 1, 1)), rng.uniform(3, 5, (count, 1, 1))
    depths = near + (far - near) * np.linspace(0, 1, SIZE)[:, np.newaxis] + np.zeros(SIZE)
    images = (250 - 40 * depths)[..., np.newaxis] + rng.integers(-5, 6, (count, SIZE, SIZE, 3))
    depths[:, :3, :3], depths[:, -3:, -3:] = 0.0, np.nan
    return images.astype(np.uint8), depths.astype(np.float32)


def write(folder, images, **targets):
    folder.mkdir(parents=True)
    for name, array in {"images": images, **targets}.items():
        np.save(folder / f"{name}.npy", array)
    return folder.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Function from a target to its source of generated images."""
    root = tmp_path_factory.mktemp("dense")
    for split, count, seed in (("train", 40, 0), ("validation", 10, 1)):
        images, masks = scenes(count, seed)
        write(root / "masks" / split, images, masks=masks)
        images, depths = rooms(count, seed)
        write(root / "depths" / split, images, depths=depths)

    def load(target, split="train"):
        return load_dense(str(root / target), split, target)

    load.root = root
    return load


def make_encoder(stem="small"):
    keras.utils.set_random_seed(0)
    return resnet.resnet(
        [1] * 4, [8, 8, 16, 16], stem_channels=8, bottleneck=False, stem=stem, image_size=SIZE
    )


def learn(task, data, frozen, steps):
    """The model and its figures after training; rates that suit few steps."""
    encoder = make_encoder(STEMS[task])
    if task == "segmentation":
        model = dense.segmentation_model(encoder, 3, frozen=frozen)
        form = {"crop": SIZE, "batch_size": 8, "num_classes": 3}
        batches, target, loss = segmentation_batches, "masks", dense.segmentation_loss
        metric, rate = dense.mean_iou(3), 0.1
        train = batches(data(target), **form, seed=0)
    else:
        model = dense.depth_model(encoder, frozen=frozen)
        form = {"crop": (SIZE, SIZE), "scale": 1.0, "batch_size": 8}
        batches, target, loss = depth_batches, "depths", dense.berhu
        metric, rate = dense.DepthFigures(), 0.005
        # As to evaluate: changes of brightness, which tells these rooms' depths, would hide them.
        train = batches(data(target), **form).repeat()
    options = {"steps": steps, "learning_rate": rate, "weight_decay": 1e-4, "verbose": 0}
    assert dense.train(model, train, loss, **options)
    assert_trained(model, encoder, frozen)
    return model, dense.evaluate(model, batches(data(target, "validation"), **form), metric)


def assert_trained(model, encoder, frozen):
    """The encoder itself is as it was; of the model's copy, if frozen, all is, batch statistics
    too, and else nothing."""
    new = make_encoder(STEMS[model.name])
    assert all(map(np.array_equal, encoder.get_weights(), new.get_weights()))
    before = {weight.name.split(":")[0]: weight for weight in encoder.weights}
    backbone = next(layer for layer in model.layers if isinstance(layer, keras.Model))
    assert len(before) == len(backbone.weights) > 40
    for weight in backbone.weights:
        same = np.array_equal(weight, before[weight.name.split(":")[0]])
        assert same == frozen, weight.name


@pytest.mark.parametrize("frozen", [False, True])
def test_segmentation_learns(data, frozen):
    model, figures = learn("segmentation", data, frozen, steps=40)
    assert figures["miou"] > 0.5  # of background everywhere it is less than 1 / 3


def test_depth_learns(data):
    """Better than the mean depth everywhere. How much better, rounding errors decide."""
    _, figures = learn("depth", data, frozen=False, steps=200)
    _, depths = rooms(10, 1)
    constant = dense.DepthFigures()
    assert np.isnan(float(constant.result()["rms"]))
    constant.update_state(np.nan_to_num(depths), np.full_like(depths, np.nanmean(depths)))
    assert set(figures) == {"pct1.25", "pct1.25^2", "pct1.25^3", "rms", "rel"}
    assert figures["rms"] < float(constant.result()["rms"])


def test_depth_of_a_frozen_encoder(data):
    _, figures = learn("depth", data, frozen=True, steps=10)
    assert all(map(np.isfinite, figures.values()))


@pytest.mark.parametrize("frozen", [True, False])
def test_replicas_train(data, mirrored, frozen):
    """Two replicas give the loss of one with the whole batch: BN is frozen or synchronized."""
    losses = []
    form = {"crop": SIZE, "batch_size": 8, "num_classes": 3}
    for scope in (mirrored.scope, lambda: tf.device("CPU:0")):
        with scope():
            model = dense.segmentation_model(make_encoder(), 3, frozen=frozen)
            rng = np.random.default_rng(0)
            model.set_weights(
                [w + rng.uniform(0, 0.1, w.shape).astype(w.dtype) for w in model.get_weights()]
            )
            batches = segmentation_batches(data("masks"), **form, seed=0)
            assert dense.train(
                model,
                batches,
                dense.segmentation_loss,
                steps=3,
                learning_rate=0.1,
                weight_decay=1e-2,
                verbose=0,
            )
            losses.append(model.history.history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_losses_of_replicas_are_those_of_the_batch(mirrored):
    """Although their halves have unlike numbers of known pixels, and unlike residuals."""
    rng = np.random.default_rng(0)
    known = rng.normal(size=(8, 4, 4)) > np.linspace(-2, 2, 8)[:, None, None]
    depths, predictions = np.where(known, 3.0, 0.0), 3 + np.arange(8)[:, None, None] * known
    masks, logits = np.where(known, 1, dense.IGNORED), rng.normal(size=(8, 4, 4, 3))
    for loss, targets, outputs in (
        (dense.berhu, depths.astype(np.float32), predictions.astype(np.float32)),
        (dense.segmentation_loss, masks, logits.astype(np.float32)),
    ):
        halves = [
            mirrored.experimental_distribute_values_from_function(
                lambda context: tf.constant(np.split(x, 2)[context.replica_id_in_sync_group])
            )
            for x in (targets, outputs)
        ]
        parts = mirrored.experimental_local_results(mirrored.run(tf.function(loss), halves))
        assert abs(float(parts[0] - parts[1])) > 1e-2
        assert np.mean(parts) == pytest.approx(float(loss(targets, outputs)), rel=1e-5)


def test_shapes_and_strides():
    """The head sees C5 of stride 16 in segmentation, and of 32 in depth, at any size."""
    encoder = resnet.resnet_encoder("resnet50", width_multiplier=1 / 64, image_size=64)
    images = tf.random.stateless_normal([1, 70, 90, 3], [0, 0])
    model = dense.segmentation_model(encoder, 5)
    assert model(images).shape == (1, 70, 90, 5) and model(images).dtype == tf.float32
    low = keras.Model(model.input, model.get_layer("logits").output)(images)
    assert low.shape == (1, math.ceil(70 / 16), math.ceil(90 / 16), 5)
    for i in range(2):
        conv = model.get_layer(f"head_{i}_conv")
        assert (conv.dilation_rate, conv.filters, conv.use_bias) == ((6, 6), 256, False)
    model = dense.depth_model(encoder)
    assert model(images).shape == (1, 70, 90) and model(images).dtype == tf.float32
    low = keras.Model(model.input, model.get_layer("depth").output)(images)
    assert low.shape == (1, 16 * math.ceil(70 / 32), 16 * math.ceil(90 / 32), 1)
    filters = [model.get_layer(f"up{n}_conv").filters for n in (512, 256, 128, 64)]
    assert filters == [512, 256, 128, 64]


def test_up_convolution_is_unpooling_and_5x5():
    """Laina's slow form: values between zeros, then a plain 5x5 convolution."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 6, 3)).astype(np.float32)
    layer = keras.layers.Conv2DTranspose(4, 5, 2, padding="same", use_bias=False)
    found = layer(x)
    unpooled = np.zeros((2, 10, 12, 3), np.float32)
    unpooled[:, 1::2, 1::2] = x
    kernel = tf.transpose(layer.kernel[::-1, ::-1], [0, 1, 3, 2])
    expected = tf.nn.conv2d(unpooled, kernel, 1, "SAME")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_mean_iou_by_hand():
    """Class 0: 2 of 4, class 1: 1 of 3; class 2 is neither there nor predicted; one ignored."""
    masks = np.array([[[0, 0, 0, 1, 1, 255]]], np.uint8)
    predicted = np.array([[[0, 0, 1, 1, 0, 2]]])
    metric = dense.mean_iou(3)
    metric.update_state(masks, np.eye(3)[predicted])
    assert float(metric.result()) == pytest.approx((2 / 4 + 1 / 3) / 2)
    metric.update_state(np.array([[[2]]]), np.eye(3)[[[[0]]]])  # there, and never found
    assert float(metric.result()) == pytest.approx((2 / 5 + 1 / 3 + 0) / 3)


def test_segmentation_loss_by_hand():
    logits = np.log([[[[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]]]]).astype(np.float32)
    masks = np.array([[[0, 255, 1]]], np.uint8)
    expected = -(math.log(0.5) + math.log(0.8)) / 2
    assert float(dense.segmentation_loss(masks, logits)) == pytest.approx(expected)
    assert float(dense.segmentation_loss(np.full_like(masks, 255), logits)) == 0.0


def test_depth_figures_by_hand():
    depths = np.array([[[2.0, 2.0, 4.0, 1.0, 0.0]]], np.float32)
    predictions = np.array([[[2.2, 1.4, 7.0, -1.0, 9.0]]], np.float32)
    metric = dense.DepthFigures()
    for i in range(5):  # in parts
        metric.update_state(depths[..., i : i + 1], predictions[..., i : i + 1])
    # The ratios are 1.1, 1.43, 1.75 and, of a depth that cannot be, without bound.
    found = {name: float(value) for name, value in metric.result().items()}
    assert found == pytest.approx(
        {
            "pct1.25": 1 / 4,
            "pct1.25^2": 2 / 4,
            "pct1.25^3": 3 / 4,
            "rms": math.sqrt((0.04 + 0.36 + 9 + 4) / 4),
            "rel": (0.1 + 0.3 + 0.75 + 2) / 4,
        }
    )


def test_berhu_by_hand():
    depths = tf.constant([[[1.0, 1.0, 1.0, 0.0]]])
    predictions = tf.Variable([[[6.0, 0.5, 3.0, 99.0]]])
    with tf.GradientTape() as tape:
        loss = dense.berhu(depths, predictions)
    # c is 1: 5 and 2 are beyond it, 0.5 is not; the last has no depth.
    assert float(loss) == pytest.approx(((25 + 1) / 2 + 0.5 + (4 + 1) / 2) / 3)
    gradient = tape.gradient(loss, predictions)
    np.testing.assert_allclose(gradient, [[[5 / 3, -1 / 3, 2 / 3, 0]]], rtol=1e-6)
    assert float(dense.berhu(depths, depths)) == 0.0
    assert float(dense.berhu(tf.zeros([1, 1, 4]), predictions)) == 0.0


def test_decay_momentum_and_schedule(data):
    """Where no pixel counts only the L2 loss moves the kernels, and nothing else."""
    model = dense.segmentation_model(make_encoder(), 3, frozen=True)
    kernels = [weight for weight in model.trainable_weights if weight.shape.rank > 1]
    assert len(kernels) == 3  # the head's
    before = [kernel.numpy() for kernel in kernels]
    form = {"crop": SIZE, "batch_size": 2, "num_classes": 3}
    batches = segmentation_batches(data("masks"), **form, seed=0)
    ignored = batches.map(lambda images, masks: (images, tf.fill(tf.shape(masks), 255)))
    options = {"steps": 10, "learning_rate": 0.5, "weight_decay": 0.1, "verbose": 0}
    assert dense.train(model, ignored, dense.segmentation_loss, **options)
    part, velocity = 1.0, 0.0  # of each kernel
    for rate in [0.5] * 7 + [0.05] * 2 + [0.005]:
        velocity = 0.9 * velocity - rate * 0.1 * part
        part += velocity
    for kernel, value in zip(kernels, before):
        np.testing.assert_allclose(kernel, part * value, rtol=1e-3, atol=1e-7)
    assert np.all(model.get_layer("head_0_bn").gamma.numpy() == 1)


def test_training_crops(data):
    """Crops are of the scene at half to twice the size, image and mask in the same place."""
    source = data("masks")
    batches = segmentation_batches(source, crop=48, batch_size=40, num_classes=3, seed=0)
    images, masks = next(iter(batches))
    assert images.shape == (40, 48, 48, 3) and masks.dtype == tf.uint8
    outside = np.all(np.abs(images) < 1e-6, -1)
    assert np.all(masks.numpy()[outside] == 255)
    inside = (~outside).sum((1, 2))
    assert inside.min() < 24**2 and inside.max() == 48**2
    for value, channel in ((1, 0), (2, 2)):
        colour = images.numpy()[masks == value] * augment.IMAGENET_STD + augment.IMAGENET_MEAN
        assert np.median(colour, 0)[channel] > 0.75 and np.median(colour, 0)[1] < 0.35
    again = next(iter(segmentation_batches(source, crop=48, batch_size=40, num_classes=3, seed=0)))
    np.testing.assert_array_equal(again[0], images)
    other = next(iter(segmentation_batches(source, crop=48, batch_size=40, num_classes=3, seed=1)))
    assert not np.array_equal(other[1], masks)


def test_evaluation_crops(data):
    images, masks = scenes(10, 1)
    source = data("masks", "validation")
    (found,) = segmentation_batches(source, crop=20, batch_size=16, num_classes=3)
    np.testing.assert_array_equal(found[1], masks[:, 6:26, 6:26])
    np.testing.assert_allclose(found[0], augment.normalize(images[:, 6:26, 6:26]), atol=1e-6)
    (found,) = segmentation_batches(source, crop=36, batch_size=16, num_classes=3)
    padded = np.pad(masks, ((0, 0), (2, 2), (2, 2)), constant_values=255)
    np.testing.assert_array_equal(found[1], padded)


def test_depth_batches(data):
    _, depths = rooms(10, 1)
    source = data("depths", "validation")
    (found,) = depth_batches(source, crop=(14, 12), scale=0.5, batch_size=16)
    assert found[0].shape == (10, 14, 12, 3) and found[1].dtype == tf.float32
    (whole,) = depth_batches(source, crop=(SIZE, SIZE), scale=1.0, batch_size=16)
    np.testing.assert_array_equal(whole[1], np.nan_to_num(depths))
    (half,) = depth_batches(source, crop=(16, 16), scale=0.5, batch_size=16)
    assert set(np.unique(half[1])) <= set(np.unique(np.nan_to_num(depths)))  # none in between
    np.testing.assert_array_equal(found[1], half[1][:, 1:15, 2:14])
    batches = depth_batches(data("depths"), crop=(16, 16), scale=0.5, batch_size=40, seed=0)
    images, found = next(iter(batches))
    flipped = found.numpy()[:, 0, -1] == 0  # the hole, at the left before
    assert 8 < flipped.sum() < 32 and np.all(found.numpy()[:, 0, 0] == 0) == False  # noqa: E712
    plain = images * augment.IMAGENET_STD + augment.IMAGENET_MEAN
    gray = np.abs(plain - tf.reduce_mean(plain, -1, keepdims=True)).max((1, 2, 3)) < 1e-3
    assert 4 < gray.sum() < 24


def test_sources_split(data):
    whole = data("masks")
    part, held_out = whole.split(5)
    assert (part.num_examples, held_out.num_examples) == (32, 8)
    every, of_part, of_held_out = (
        list(s.records.as_numpy_iterator()) for s in (whole, part, held_out)
    )
    assert of_held_out == every[::5]
    assert of_part == [record for i, record in enumerate(every) if i % 5]


class Scenes(tfds.core.GeneratorBasedBuilder):
    """A TFDS data set of the same scenes, with masks of one channel and float16 depths."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
            "depth": tfds.features.Tensor(shape=(SIZE, SIZE), dtype=np.float16),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, (image, mask) in enumerate(zip(*scenes(6, 0))):
            depth = np.full((SIZE, SIZE), 1.5, np.float16)
            depth[0, 0] = np.nan
            yield (
                i,
                {
                    "image": image,
                    "segmentation_mask": mask[..., np.newaxis],
                    "depth": depth,
                    "label": 0,
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Scenes(data_dir=folder).download_and_prepare()
    return str(folder)


def test_tfds(prepared):
    images, masks = scenes(6, 0)
    source = load_dense("scenes", "train", "masks", prepared)
    assert source.num_examples == 6
    (found,) = segmentation_batches(source, crop=SIZE, batch_size=8, num_classes=3)
    np.testing.assert_array_equal(found[1], masks)
    np.testing.assert_allclose(found[0], augment.normalize(images), atol=1e-6)
    (found,) = depth_batches(
        load_dense("scenes", "train", "depths", prepared),
        crop=(SIZE, SIZE),
        scale=1.0,
        batch_size=8,
    )
    assert np.unique(found[1]).tolist() == [0.0, 1.5] and found[1].dtype == tf.float32
    part, held_out = source.split(5)
    assert [len(list(s.records)) for s in (part, held_out)] == [4, 2]


def error_of(*arguments):
    with pytest.raises(UserError) as caught:
        load_dense(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_errors(tmp_path, prepared):
    images, masks = scenes(2, 0)
    root = write(tmp_path / "train", images, masks=masks[:1], depths=masks)
    assert "train/masks.npy: is uint8 [1, 32, 32]: must be uint8 [2," in error_of(
        str(root), "train", "masks"
    )
    assert "must be float [2, 32, 32]" in error_of(str(root), "train", "depths")
    assert "test/images.npy: no array" in error_of(str(root), "test", "masks")
    nowhere = f"{root}_of_before"
    assert f"--dense_data={nowhere}: no such folder" in error_of(nowhere, "test", "masks")
    (root / "train" / "images.npy").write_bytes(b"no array")
    assert "images.npy: no array that can be read" in error_of(str(root), "train", "masks")
    np.save(root / "train" / "images.npy", images.astype(float))
    assert "must be uint8 [N, H, W, 3]" in error_of(str(root), "train", "masks")
    assert "no split 'test'; there are train" in error_of("scenes", "test", "masks", prepared)
    shapes = error_of("no_such_set", "train", "masks", prepared)
    assert shapes.startswith("--dense_data=no_such_set: no such data set")


@pytest.mark.parametrize("dtype", ["uint8", "int8", "<u4", ">i8", ">f4", "f8"])
def test_arrays_of_any_kind(tmp_path, dtype):
    images, masks = scenes(3, 0)
    target = "depths" if "f" in dtype else "masks"
    root = write(tmp_path / "train", images, **{target: masks.astype(dtype)})
    source = load_dense(str(root), "train", target)
    pairs = list(source.records.map(source.read))
    np.testing.assert_array_equal([image for image, _ in pairs], images)
    np.testing.assert_array_equal([values for _, values in pairs], masks)
    np.save(root / "train" / "images.npy", np.asfortranarray(images))
    assert "np.ascontiguousarray" in error_of(str(root), "train", target)


@pytest.mark.parametrize("dtype", ["u1", "u2", "<u4", ">i8"])
def test_masks_of_many_classes(tmp_path, dtype):
    """As ADE20K's 150; what wraps around to a class is none."""
    images, masks = scenes(3, 0)
    masks = np.where(masks == 255, 255, 150 + masks.astype(int)).astype(dtype)
    if masks.itemsize > 1:
        masks[2, 0, 0] = 65535
    root = write(tmp_path / "train", images, masks=masks)
    batches = segmentation_batches(
        load_dense(str(root), "train", "masks"), crop=SIZE, batch_size=1, num_classes=153
    )
    if masks.itemsize > 1:
        with pytest.raises(tf.errors.InvalidArgumentError, match="allow:.*65535"):
            list(batches)
    np.testing.assert_array_equal([mask[0] for _, mask in batches.take(2)], masks[:2])


def test_masks_beyond_the_classes(tmp_path):
    images, masks = scenes(4, 0)
    root = write(tmp_path / "train", images, masks=masks)
    source = load_dense(str(root), "train", "masks")
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        list(segmentation_batches(source, crop=SIZE, batch_size=2, num_classes=2))
    wrong = "a mask has a value that --segmentation_classes=2 does not allow: 2"
    assert reason(caught.value) == wrong
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        count_known(source, num_classes=2)
    assert reason(caught.value) == wrong
    assert count_known(source, num_classes=3) == np.sum(masks != 255)


def test_voc_as_arrays(tmp_path):
    """The code of docs/evaluation.md, on a devkit of two images."""
    page = (ROOT / "docs" / "evaluation.md").read_text()
    (code,) = (
        block for block in re.findall("```python\n(.*?)```", page, re.DOTALL) if "voc" in block
    )
    voc = tmp_path / "VOC2012"
    images, masks = [x[:, :20] for x in scenes(2, 0)]
    for folder, kind, pixels in (
        ("JPEGImages", "jpg", images),
        ("SegmentationClass", "png", masks),
    ):
        (voc / folder).mkdir(parents=True)
        for i in range(2):
            picture = Image.fromarray(pixels[i])
            if kind == "png":
                picture = picture.convert("P")
                picture.putdata(pixels[i].ravel().tolist())
            picture.save(voc / folder / f"{i}.{kind}")
    (voc / "val.txt").write_text("0\n1\n")
    names = {}
    exec(code, names)
    names["convert"](voc, voc / "val.txt", tmp_path / "arrays" / "validation")
    source = load_dense(str(tmp_path / "arrays"), "validation", "masks")
    (found,) = segmentation_batches(source, crop=512, batch_size=4, num_classes=3)
    place = slice(246, 266), slice(240, 272)
    np.testing.assert_array_equal(found[1][:, place[0], place[1]], masks)
    assert np.sum(found[1] != 255) == np.sum(masks != 255)
    expected = augment.normalize(images)
    assert np.mean(np.abs(found[0][:, place[0], place[1]] - expected)) < 0.5  # JPEG
    assert np.abs(found[0][:, 0]).max() < 0.02


@pytest.mark.slow
def test_tasks(main, data, prepared, tmp_path):
    """Both tasks from a TFDS data set, then a sweep of a frozen encoder from arrays."""
    root = tmp_path / "images"
    for i, image in enumerate(scenes(8, 2)[0]):
        path = root / "train" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_png(image).numpy())
    workdir = tmp_path / "run"
    pretraining = f"""--dataset=image_folder --data_dir={root} --train_split=train --encoder=resnet18
        --width_multiplier=0.05 --image_size=16 --stem=small --projector_hidden_size=16
        --projector_output_size=8 --batch_size=8 --epochs=1 --warmup_epochs=0"""
    segmentation = "--segmentation_classes=3 --segmentation_steps=2 --segmentation_batch_size=4"
    small = f"{segmentation} --segmentation_crop=32 --depth_steps=2 --depth_batch_size=2"
    small += " --depth_crop=24,32 --depth_scale=1 --segmentation_learning_rates=0.01"
    tfds_data = f"--dense_data=scenes --dense_data_dir={prepared} --dense_eval_split=train"
    flags = f"{pretraining} {small} {tfds_data} --task=pretrain,segmentation,depth,export".split()
    test_cli.succeed(main(f"--workdir={workdir}", *flags))
    found = json.loads((workdir / "results.json").read_text())
    assert 0 <= found["segmentation"]["tuned"]["miou"] <= 1
    assert found["segmentation"]["tuned"]["images"] == 6
    assert {"pct1.25", "pct1.25^2", "pct1.25^3", "rms", "rel"} < set(found["depth"]["tuned"])
    assert (workdir / "backbone.h5").exists()

    arrays = f"--dense_data={data.root / 'masks'} --dense_eval_split=validation --dense_frozen"
    again = [f"--workdir={workdir}", "--task=segmentation", *arrays.split()]
    test_cli.succeed(main(*again, "--segmentation_learning_rates=0.01,1e30"))
    figures = json.loads((workdir / "results.json").read_text())["segmentation"]
    assert set(figures) == {"tuned", "frozen"}
    assert figures["frozen"]["learning_rate"] == 0.01
    assert figures["frozen"]["held_out_miou"]["1e+30"] == 0.0

    line = test_cli.error_of(main(*again, "--segmentation_classes=2"))
    assert "a mask has a value that --segmentation_classes=2 does not allow: 2" in line
    line = test_cli.error_of(
        main(f"--workdir={workdir}", "--task=depth", "--depth_learning_rate=1e30")
    )
    assert "--depth_learning_rate=1e+30: the training has diverged" in line
    unknown = write(tmp_path / "unknown" / "train", np.zeros([2, 32, 32, 3], np.uint8))
    np.save(unknown / "train" / "depths.npy", np.zeros([2, 32, 32]))
    line = test_cli.error_of(
        main(f"--workdir={workdir}", "--task=depth", f"--dense_data={unknown}")
    )
    assert "no pixel in 'train' has a value that counts" in line

    gray = f"--workdir={tmp_path / 'gray'} --task=pretrain,depth --channels=1 {pretraining}"
    line = test_cli.error_of(main(*gray.split(), *small.split(), *tfds_data.split()))
    assert "--dense_data=scenes: its images have 3 channels, the encoder's 1" in line
