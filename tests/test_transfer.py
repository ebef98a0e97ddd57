"""Transfer: the paper's data sets as TFDS has them, their metrics, and both ways to learn."""

import dataclasses
import inspect
import re

import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf
import tensorflow_datasets as tfds
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss

from byol_tf import finetune, transfer
from byol_tf.classifier import binary_loss_and_accuracy
from byol_tf.data import subset, views
from byol_tf.errors import UserError
from byol_tf.evaluation import Features, extract_features
from byol_tf.keras_api import keras


def features(vectors, labels):
    return Features(np.asarray(vectors, np.float32), np.asarray(labels), [""] * len(vectors))


def blobs(count, seed, classes=4, size=6, spread=1.0):
    """Noisy copies of a centre for each class, the same for every seed, off the origin."""
    centres = np.random.default_rng(99).normal(size=(classes, size)) + 3.0
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    scales = np.logspace(0, -1, size)  # some directions matter less
    return features(scales * (centres[labels] + spread * rng.normal(size=(count, size))), labels)


# Metrics ------------------------------------------------------------------------------------


def test_top1_and_mean_per_class():
    """Three of class 0, of which two are right; one of class 2, wrong; class 1 is not there."""
    scores = np.array([[3, 1, 2], [5, 0, 0], [0, 1, 0], [1, 0, 0]])
    labels = np.array([0, 0, 0, 2])
    assert transfer.top1(scores, labels) == 0.5
    assert transfer.mean_per_class(scores, labels) == pytest.approx((2 / 3 + 0) / 2)
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(200, 5)), rng.integers(0, 5, 200) ** 2 // 4
    expected = balanced_accuracy_score(labels, scores.argmax(1))
    assert transfer.mean_per_class(scores, labels) == pytest.approx(expected)


def test_map11_by_hand():
    """Ranked + - + - -: precision 1 up to recall 1/2, then 2/3: (6 * 1 + 5 * 2/3) / 11."""
    scores = np.array([[5.0, 4, 3, 2, 1]]).T
    labels = np.array([[1, 0, 1, 0, 0]]).T
    expected = (6 + 5 * 2 / 3) / 11
    assert transfer.map11(scores, labels) == pytest.approx(expected)
    # One that is not judged changes nothing, wherever it is ranked.
    for score in (6.0, 3.5, 0.0):
        more = np.append(scores, [[score]], 0), np.append(labels, [[-1]], 0)
        assert transfer.map11(*more) == pytest.approx(expected)
    # A second class, the wrong way round: precision 2/5 at best everywhere; a third has no image.
    other = np.stack([labels[:, 0], labels[::-1, 0] * 0 + [0, 0, 0, 1, 1], 0 * labels[:, 0]], 1)
    both = transfer.map11(np.repeat(scores, 3, 1), other)
    assert both == pytest.approx((expected + 2 / 5) / 2)


def test_map11_counts_a_recall_of_three_tenths_as_one():
    """Of ten right ones three come first, then as many wrong ones as bring precision to 1/2."""
    ranked = np.array([1] * 3 + [0] * 10 + [1] * 7)[:, np.newaxis]
    # Recalls 0 to 0.3 have precision 1; from 0.4 on the best is at the end, 10 of 20.
    expected = (4 * 1 + 7 * 10 / 20) / 11
    assert transfer.map11(-np.arange(20.0)[:, np.newaxis], ranked) == pytest.approx(expected)


# Linear -------------------------------------------------------------------------------------


def test_the_regularisations_are_the_papers():
    assert len(transfer.REGULARIZATIONS) == 45
    ratios = transfer.REGULARIZATIONS[1:] / transfer.REGULARIZATIONS[:-1]
    np.testing.assert_allclose(ratios, ratios[0])
    np.testing.assert_allclose(transfer.REGULARIZATIONS[[0, -1]], [1e-6, 1e5])
    np.testing.assert_allclose(transfer.LEARNING_RATES, np.logspace(-4, -1, 7))
    np.testing.assert_allclose(transfer.WEIGHT_DECAYS, [0, *np.logspace(-6, -3, 7)])


@pytest.mark.parametrize("size", [6, 80])  # fewer and more directions than images
def test_logistic_path_is_scikit_learns(size):
    train, other = blobs(60, 1, size=size), blobs(200, 2, size=size)
    strengths = []
    for l2, kernel, bias in transfer.logistic_path(train, 4, [0.1, 100.0, 1.0]):
        strengths.append(l2)
        model = LogisticRegression(C=1 / (2 * l2), tol=1e-9, max_iter=10_000)
        model.fit(train.vectors.astype(np.float64), train.labels)
        found, expected = (
            log_loss(train.labels, softmax(train.vectors @ kernel + bias, 1), normalize=False)
            + l2 * np.square(kernel).sum()
            for kernel, bias in ((kernel, bias), (model.coef_.T, model.intercept_))
        )
        assert found == pytest.approx(expected, rel=1e-3, abs=60 * 1e-3)  # nats of 60 images
        found = softmax(other.vectors @ kernel + bias, 1)
        np.testing.assert_allclose(found, model.predict_proba(other.vectors), atol=0.03)
    assert strengths == [100.0, 1.0, 0.1]  # from strong to weak


def test_logistic_path_of_several_labels_is_one_scikit_learn_each():
    """And what is not judged does not count."""
    train, other = blobs(120, 1), blobs(100, 2)
    rng = np.random.default_rng(3)
    labels = np.stack([train.labels == 0, train.labels < 2, rng.random(120) < 0.1], 1).astype(int)
    labels[::7, 0] = -1
    ((_, kernel, bias),) = transfer.logistic_path(features(train.vectors, labels), 2, [0.5])
    for i in range(3):
        known = labels[:, i] >= 0
        model = LogisticRegression(C=1.0, tol=1e-9, max_iter=10_000)
        model.fit(train.vectors[known].astype(np.float64), labels[known, i])
        logits = other.vectors @ kernel[:, i] + bias[i]
        expected = model.predict_proba(other.vectors)[:, 1]
        np.testing.assert_allclose(1 / (1 + np.exp(-logits)), expected, atol=0.01)


def test_linear_transfer_chooses_on_validation_and_learns_from_both(monkeypatch):
    train, validation, test = blobs(80, 1), blobs(50, 2), blobs(400, 3)
    fits = []
    path = transfer.logistic_path

    def spy(features, num_classes, regularizations):
        fits.append((features, num_classes, list(regularizations)))
        yield from path(features, num_classes, regularizations)

    monkeypatch.setattr(transfer, "logistic_path", spy)
    found = transfer.linear_transfer(train, validation, test)
    (swept, classes, strengths), (joined, _, chosen) = fits
    assert swept is train and classes == 4
    np.testing.assert_array_equal(strengths, transfer.REGULARIZATIONS)
    assert chosen == [found["l2"]]
    np.testing.assert_array_equal(joined.vectors[:80], train.vectors)
    np.testing.assert_array_equal(joined.vectors[80:], validation.vectors)
    np.testing.assert_array_equal(joined.labels, [*train.labels, *validation.labels])
    # The figures are those of scikit-learn, and the strongest of the best is chosen.
    assert len(found["validation"]) == 45
    best = max(found["validation"].values())
    chosen = [float(l2) for l2, value in found["validation"].items() if value == best]
    assert found["l2"] == pytest.approx(max(chosen), rel=0.01)
    assert min(found["validation"].values()) < best
    model = LogisticRegression(C=1 / (2 * found["l2"]), tol=1e-9, max_iter=10_000)
    expected = model.fit(joined.vectors, joined.labels).score(test.vectors, test.labels)
    assert found["value"] == pytest.approx(expected, abs=0.01)


def test_test_images_teach_nothing_and_choose_nothing():
    train, validation, test = (blobs(n, i, spread=0.1) for i, n in enumerate((80, 50, 60)))
    right = transfer.linear_transfer(train, validation, test)
    wrong = features(test.vectors, (test.labels + 1) % 4)
    contradicted = transfer.linear_transfer(train, validation, wrong)
    assert right["value"] > 0.95 and contradicted["value"] < 0.05
    assert contradicted["l2"] == right["l2"]
    assert contradicted["validation"] == right["validation"]


def test_linear_transfer_by_another_metric():
    """Of one class nine times as many images: mean per class and top-1 are not the same."""
    parts = []
    for seed in range(3):
        part = blobs(2000, seed, spread=2.5)
        rare = (part.labels == 0) | (np.arange(2000) % 9 == 0)
        parts.append(features(part.vectors[rare], part.labels[rare]))
    by_image = transfer.linear_transfer(*parts, regularizations=[0.1, 1e4])
    by_class = transfer.linear_transfer(*parts, "mean_per_class", regularizations=[0.1, 1e4])
    assert by_image["value"] > by_class["value"] + 0.1
    hot = [features(part.vectors, np.eye(4, dtype=int)[part.labels]) for part in parts]
    assert 0.3 < transfer.linear_transfer(*hot, "map11", regularizations=[1.0])["value"] < 1.0


def test_a_class_that_only_the_test_images_have():
    train, validation, test = blobs(80, 1), blobs(50, 2), blobs(50, 3, classes=5)
    found = transfer.linear_transfer(train, validation, test, regularizations=[1.0])
    assert 0.3 < found["value"] <= np.mean(test.labels < 4)


def test_few_iterations(monkeypatch):
    """The scaled axes are worth it: the whole path in a few hundred looks at the images."""
    looks = []
    minimize = scipy.optimize.minimize
    monkeypatch.setattr(
        scipy.optimize, "minimize", lambda *a, **k: looks.append(minimize(*a, **k)) or looks[-1]
    )
    train = blobs(500, 1, size=40, spread=2.0)
    far_apart = features(train.vectors * np.logspace(1, -2, 40), train.labels)
    list(transfer.logistic_path(far_apart, 4, transfer.REGULARIZATIONS))
    assert len(looks) == 45 and sum(found.nfev for found in looks) < 1000


# The data sets ------------------------------------------------------------------------------


def test_the_sets_are_the_papers():
    metrics = {chosen.name: chosen.metric for chosen in transfer.SETS}
    assert len(metrics) == 12 and set(metrics.values()) == set(transfer.METRICS)
    per_class = {name for name, metric in metrics.items() if metric == "mean_per_class"}
    assert per_class == {"fgvc_aircraft", "oxford_iiit_pet", "caltech101", "oxford_flowers102"}
    assert metrics["voc/2007"] == "map11"
    # Counts of table 10, of all training images as TFDS has them.
    held_out = {"sun397/standard-part1-120k": (19850, 3970), "oxford_iiit_pet": (3680, 740)}
    held_out |= {"food101": (75750, 7575), "caltech101": (3060, 510), "cars196": (8144, 1650)}
    for name, (images, expected) in held_out.items():
        assert round(transfer.find_set(name).validation * images) == expected


IN_TFDS = [chosen for chosen in transfer.SETS if chosen.name not in transfer.NOT_IN_TFDS]


def by_name(chosen):
    return chosen.name


@pytest.mark.parametrize("chosen", IN_TFDS, ids=by_name)
def test_tfds_has_the_splits_of_the_table(chosen, tmp_path):
    """As its builders name them in what makes them: before a download they tell no other way."""
    builder = tfds.builder(chosen.name, data_dir=tmp_path)
    named = r"Split\.(TRAIN|TEST|VALIDATION)|['\"](train|test|validation)['\"]"
    found = re.findall(named, inspect.getsource(type(builder)._split_generators))
    found = {(upper or lower).lower() for upper, lower in found}
    wanted = {"train", chosen.test}
    wanted |= {chosen.validation} if isinstance(chosen.validation, str) else set()
    if chosen.name.startswith("sun397"):
        wanted.add("validation")  # of its other configuration
    assert found == wanted


def test_tfds_lacks_two_of_them(tmp_path):
    for name in transfer.NOT_IN_TFDS:
        assert name not in tfds.list_builders(with_community_datasets=False)
        with pytest.raises(UserError, match=f"{name} is not in TFDS: put its .*{name}, as train/"):
            transfer.load_set(transfer.find_set(name), str(tmp_path))


def test_names():
    assert transfer.find_set("sun397").name == "sun397/standard-part1-120k"
    assert transfer.find_set("voc") is transfer.find_set("voc/2007")
    other = transfer.find_set("sun397/tfds")
    assert (other.name, other.metric, other.validation) == ("sun397/tfds", "top1", 0.1)


def read(source):
    """(index, encoded image, label) of all images."""
    records = source.dataset.map(source.example).as_numpy_iterator()
    return [(r["index"], r["image"], r["label"].tolist()) for r in records]


@pytest.mark.slow
@pytest.mark.parametrize("chosen", transfer.SETS, ids=by_name)
def test_load_set(chosen, prepare_set, tmp_path):
    """Prepared with the features of TFDS' own builders: which images are in which part."""
    prepare_set(chosen, tmp_path, {"train": 30, "validation": 12, "test": 9})
    parts = transfer.load_set(chosen, str(tmp_path), seed=1)
    train, validation, both, test = (
        [image for _, image, _ in read(source)]
        for source in (parts.train, parts.validation, parts.both, parts.test)
    )
    named = isinstance(chosen.validation, str)
    count = 12 if named else max(1, round(30 * chosen.validation))
    assert (len(train), len(validation)) == (30 if named else 30 - count, count)
    assert len(test) == (12 if chosen.test == "validation" else 9)
    assert sorted(both) == sorted(train + validation)
    assert len(set(train + validation + test)) == len(train + validation + test)
    for source in (parts.train, parts.validation, parts.both, parts.test):
        assert source.num_examples == len(read(source))
    indices = [index for index, _, _ in read(parts.both)]
    assert indices == list(range(len(both)))
    if not named:  # class by class: the first three have ten images each
        held_out = [label for _, _, label in read(parts.validation)]
        assert max(np.bincount(held_out, minlength=3)) - min(np.bincount(held_out)) <= 1
        again = transfer.load_set(chosen, str(tmp_path), seed=1)
        assert [image for _, image, _ in read(again.validation)] == validation
        other = transfer.load_set(chosen, str(tmp_path), seed=2)
        assert [image for _, image, _ in read(other.validation)] != validation


def test_labels_of_voc(prepare_set, tmp_path):
    """Several classes an image; those of "difficult" objects alone are not judged."""
    chosen = transfer.find_set("voc/2007")
    prepare_set(chosen, tmp_path, {"train": 5, "validation": 2, "test": 2})
    source = transfer.load_set(chosen, str(tmp_path)).train
    assert len(source.class_names) == 20 and source.class_names[14] == "person"
    labels = subset.read_labels(source)
    assert labels.dtype == np.int64 and labels.shape == (5, 20)
    # The third image shows a person, and difficult cats; the fourth nothing.
    assert np.flatnonzero(labels[2]).tolist() == [7, 14]
    assert labels[2, 14] == 1 and labels[2, 7] == -1
    assert not labels[3].any()
    (batch,) = views.eval_batches(source, image_size=8)
    np.testing.assert_array_equal(batch["label"], labels)


def test_other_sets_and_what_is_missing(prepare_set, tmp_path):
    own = transfer.TransferSet("mine")
    prepare_set(own, tmp_path, {"train": 20, "validation": 5, "test": 6})
    assert transfer.load_set(transfer.find_set("mine"), str(tmp_path)).test.num_examples == 6
    prepare_set(transfer.TransferSet("yours"), tmp_path, {"train": 20, "validation": 5})
    parts = transfer.load_set(transfer.find_set("yours"), str(tmp_path))
    assert (parts.train.num_examples, parts.validation.num_examples) == (18, 2)
    assert parts.test.num_examples == 5
    with pytest.raises(UserError, match="no split 'test'"):
        transfer.load_set(own.__class__("yours"), str(tmp_path))
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "class0" / "0.png").rename(tmp_path / "flat" / "train" / "a.png")
    with pytest.raises(UserError, match="flat: split 'train' has images without labels"):
        transfer.load_set(transfer.find_set("flat"), str(tmp_path))


def test_linear_features_are_of_the_whole_shorter_side(make_source, tiny_encoder):
    """Appendix D.2 resizes to the size of the crop, where C.1 resizes to 256 of 224."""
    parts = transfer.Parts(*[make_source(n) for n in (6, 4, 10, 5)])
    encoder = tiny_encoder()
    train, validation, test = transfer.extract_parts(encoder, parts, 16)
    assert [len(part.labels) for part in (train, validation, test)] == [6, 4, 5]
    (whole,) = parts.train.dataset.map(lambda r: tf.io.decode_png(r["image"])).batch(6)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = encoder(((whole.numpy() / 255 - mean) / deviation).astype(np.float32))
    np.testing.assert_allclose(train.vectors, expected, rtol=1e-4, atol=1e-5)
    cut = extract_features(encoder, parts.train, image_size=16)
    assert np.abs(cut.vectors - train.vectors).max() > 1e-3


# Fine-tuned ---------------------------------------------------------------------------------


@pytest.fixture
def coloured(make_source):
    """Function to a `Source` of images whose colour tells their class, or several their classes."""

    def make(count, seed=0, several=False):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, (count, 3)) if several else rng.integers(0, 3, count)
        shown = labels if several else np.eye(3, dtype=int)[labels]
        pixels = rng.integers(0, 120, (count, 16, 16, 3)) + 120 * shown[:, None, None]
        slices = {
            "index": np.arange(count),
            "image": [tf.io.encode_png(image.astype(np.uint8)).numpy() for image in pixels],
            "label": labels,
            "name": [str(i) for i in range(count)],
        }
        dataset = tf.data.Dataset.from_tensor_slices(slices)
        return dataclasses.replace(
            make_source(1), dataset=dataset, num_examples=count, class_names=("r", "g", "b")
        )

    return make


def coloured_parts(coloured, **how):
    train, validation, test = (coloured(n, i, **how) for i, n in enumerate((90, 45, 60)))
    return transfer.Parts(train, validation, subset.joined(train, validation), test)


@pytest.mark.parametrize("metric", ["top1", "map11"])
def test_finetune_transfer(coloured, tiny_encoder, monkeypatch, metric):
    """The grid on training images, judged by validation; one last training on both, from the same
    start, judged by the test images."""
    parts = coloured_parts(coloured, several=metric == "map11")
    encoder = tiny_encoder()
    trained, judged, starts = [], [], []
    fit, extractor = transfer.fit_by_sgd, transfer.feature_extractor

    def spy_fit(model, source, **how):
        starts.append(model.get_weights())
        decay, momentum = model.weight_decay, encoder.layers[1].momentum
        trained.append((source, how["learning_rate"], decay, momentum, how["steps"]))
        fit(model, source, **how)

    def spy_judge(model, source, **how):
        judge = extractor(model, source, **how)
        return lambda: judged.append(source) or judge()

    monkeypatch.setattr(transfer, "fit_by_sgd", spy_fit)
    monkeypatch.setattr(transfer, "feature_extractor", spy_judge)
    settings = {"learning_rates": (1e30, 1.0), "weight_decays": (0.0, 1e-4)}
    found = transfer.finetune_transfer(
        encoder, parts, metric, image_size=16, steps=40, batch_size=30, verbose=0, **settings
    )
    assert [step[0] for step in trained] == [parts.train] * 4 + [parts.both]
    assert judged == [parts.validation] * 4 + [parts.test]
    assert [step[1] for step in trained[:4]] == [1e30] * 2 + [1.0] * 2
    np.testing.assert_allclose([step[2] for step in trained[:4]], [0, 1e-34, 0, 1e-4])
    assert all(step[3:] == (0.9, 40) for step in trained)
    for start in starts[1:]:
        for weight, first in zip(start, starts[0]):
            np.testing.assert_array_equal(weight, first)
    assert found["learning_rate"] == 1.0 and found["value"] > 0.9
    assert trained[-1][1:3] == (1.0, found["weight_decay"])
    assert found["validation"]["1"]["0"] > 0.8
    assert set(found["validation"]["1e+30"].values()) == {0.0}


def test_momentum_of_the_statistics(tiny_encoder):
    """max(1 - 10 / s, 0.9), and it is that which `fit` moves them with."""
    encoder = tiny_encoder()
    for steps, momentum in ((1, 0.9), (100, 0.9), (400, 0.975)):
        transfer._set_momentum(encoder, steps)
        assert encoder.layers[1].momentum == pytest.approx(momentum)
    model = finetune.FineTuned(encoder, 3)
    model.compile(keras.optimizers.SGD(0.0))
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)
    batch = tf.data.Dataset.from_tensors({"view1": images, "label": np.zeros(8, int)})
    model.fit(batch, verbose=0)
    mean = encoder.layers[0](images).numpy().mean((0, 1, 2))
    np.testing.assert_allclose(encoder.layers[1].moving_mean, 0.025 * mean, rtol=1e-3, atol=1e-6)


def test_weight_decay(tiny_encoder):
    """Of one step: it draws kernels towards 0 by rate * decay, and nothing else."""
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)
    batch = tf.data.Dataset.from_tensors({"view1": images, "label": np.arange(8) % 3})
    ends = []
    for decay in (0.0, 0.3):
        keras.utils.set_random_seed(1)
        model = finetune.FineTuned(tiny_encoder(), 3)
        start = [weight.numpy() for weight in model.trainable_variables]
        model.weight_decay = decay
        model.compile(keras.optimizers.SGD(0.5))
        model.fit(batch, verbose=0)
        ends.append([weight.numpy() for weight in model.trainable_variables])
    assert {weight.ndim for weight in start} == {1, 2, 4}
    for weight, without, decayed in zip(start, *ends):
        expected = 0.5 * 0.3 * weight if weight.ndim > 1 else np.zeros_like(weight)
        np.testing.assert_allclose(without - decayed, expected, atol=1e-5)


def test_binary_loss():
    """Against Keras' loss of each class; what is not judged does not count."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 4)).astype(np.float32)
    labels = rng.integers(-1, 2, (6, 4))
    loss, accuracy = binary_loss_and_accuracy(tf.constant(logits), tf.constant(labels))
    judge = keras.losses.BinaryCrossentropy(from_logits=True, reduction="none")
    losses = judge(np.maximum(labels, 0)[..., None], logits[..., None]).numpy()
    assert loss.numpy() == pytest.approx((losses * (labels >= 0)).sum() / 6, rel=1e-5)
    known = labels >= 0
    assert accuracy.numpy() == pytest.approx(((logits > 0) == labels)[known].mean())


def test_folders_cannot_tell_several_labels(tmp_path):
    (tmp_path / "voc/2007/train/cat").mkdir(parents=True)
    with pytest.raises(UserError, match="voc/2007: an image of it has several labels"):
        transfer.load_set(transfer.find_set("voc"), tmp_path)
