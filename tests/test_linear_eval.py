"""The evaluations that train: linear evaluation, fine-tuning, and what they learn from."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from byol_tf import finetune, linear_eval
from byol_tf.classifier import linear_classifier
from byol_tf.data import augment, subset, views
from byol_tf.data.source import Source
from byol_tf.errors import UserError
from byol_tf.evaluation import top_k_accuracies
from byol_tf.keras_api import keras
from byol_tf.schedules import WarmupCosine

RATES = (0.4, 0.1, 0.02)


@pytest.fixture
def coloured():
    """Function to a `Source` of 16x16 images whose colour tells which of 3 classes they are of."""

    def make(count, seed=0, informative=True):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 3, count)
        shown = labels if informative else rng.integers(0, 3, count)
        pixels = (
            rng.integers(0, 120, (count, 16, 16, 3))
            + 120 * np.eye(3, dtype=int)[shown][:, None, None]
        )
        slices = {
            "index": np.arange(count),
            "image": [tf.io.encode_png(image.astype(np.uint8)).numpy() for image in pixels],
            "label": labels,
            "name": [str(i) for i in range(count)],
        }
        dataset = tf.data.Dataset.from_tensor_slices(slices)
        return Source(dataset, count, ("red", "green", "blue"), (16, 16, 3))

    return make


def batches_of(data, size=8):
    return tf.data.Dataset.from_tensor_slices(data).batch(size)


def random_batches(count=40, classes=3):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(count, 16, 16, 3)).astype(np.float32)
    return {"view1": images, "label": rng.integers(0, classes, count)}


def schedule(peak):
    return WarmupCosine(peak, total_steps=15)


def sgd(peak):
    return keras.optimizers.SGD(schedule(peak), momentum=0.9, nesterov=True)


def trained_together(encoder, data, strategy=None):
    strategy = strategy or tf.distribute.get_strategy()
    with strategy.scope():
        keras.utils.set_random_seed(1)
        model = linear_eval.LinearClassifiers(encoder(), 3, RATES)
        start = model.classifiers.get_weights()
        model.compile(sgd(1.0))
    history = model.fit(batches_of(data), epochs=3, verbose=0).history
    return start, model.classifiers.get_weights(), history


def test_together_is_each_alone(tiny_encoder):
    """Three rates at once are Keras' own SGD on three models, momentum and schedule included."""
    data = random_batches()
    start, end, history = trained_together(tiny_encoder, data)
    keras.utils.set_random_seed(1)
    representation = tiny_encoder()(data["view1"], training=False).numpy()
    for i, rate in enumerate(RATES):
        columns = slice(3 * i, 3 * i + 3)
        alone = keras.Sequential([keras.layers.Dense(3)])
        alone.build((None, 8))
        alone.set_weights([start[0][:, columns], start[1][columns]])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        alone.compile(sgd(rate), loss)
        alone_history = alone.fit(
            representation, data["label"], batch_size=8, epochs=3, shuffle=False, verbose=0
        ).history
        for found, expected in zip((end[0][:, columns], end[1][columns]), alone.get_weights()):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
            assert np.abs(expected).max() > 0.005
        np.testing.assert_allclose(history[f"loss_at_{rate:g}"], alone_history["loss"], rtol=1e-4)
    assert np.abs(end[0][:, :3] - start[0][:, :3]).max() > 0.1


def test_together_on_two_replicas(tiny_encoder, mirrored):
    data = random_batches()
    _, one, _ = trained_together(tiny_encoder, data)
    _, two, _ = trained_together(tiny_encoder, data, mirrored)
    for a, b in zip(one, two):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_rate_that_diverges_harms_no_other(coloured, tiny_encoder):
    keras.utils.set_random_seed(0)
    encoder, train, test = tiny_encoder(), coloured(60), coloured(40, seed=1)
    settings = {"image_size": 16, "epochs": 20, "batch_size": 20, "verbose": 0}
    rates = (np.inf, 0.4)
    figures = linear_eval.linear_evaluation(
        encoder, train, test, test, learning_rates=rates, **settings
    )
    assert figures["held_out_top1"]["inf"] == 0.0
    assert figures["learning_rate"] == 0.4 and figures["top1"] > 0.8
    figures = linear_eval.linear_evaluation(
        encoder, train, test, test, learning_rates=[np.inf], **{**settings, "epochs": 1}
    )
    assert figures["top1"] == figures["top5"] == 0.0


def test_linear_evaluation(coloured, tiny_encoder):
    """Learns what is there and no more, from a frozen encoder whose statistics are no batch's."""
    keras.utils.set_random_seed(0)
    encoder = tiny_encoder()
    encoder.layers[1].moving_mean.assign(np.linspace(-0.5, 0.5, 8))
    encoder.layers[1].moving_variance.assign(np.linspace(0.5, 2, 8))
    before = encoder.get_weights()
    found = []
    for informative in (True, False):
        sources = [coloured(n, i, informative) for i, n in enumerate((120, 60, 60))]
        found.append(
            linear_eval.linear_evaluation(
                encoder, *sources, image_size=16, epochs=20, batch_size=40, verbose=0
            )
        )
    learned, guessed = found
    assert learned["top1"] > 0.95 and learned["top5"] == 1.0  # of three classes
    assert abs(guessed["top1"] - 1 / 3) < 0.2
    assert list(learned["held_out_top1"]) == ["0.4", "0.3", "0.2", "0.1", "0.05"]
    best = max(learned["held_out_top1"].values())
    assert learned["held_out_top1"][f"{learned['learning_rate']:g}"] == best
    for weight, value in zip(encoder.get_weights(), before):
        np.testing.assert_array_equal(weight, value)


def test_fine_tuning(coloured, tiny_encoder):
    """Trains all weights and the statistics; ends with those of the setting that it reports."""
    keras.utils.set_random_seed(0)
    encoder = tiny_encoder()
    before = encoder.get_weights()
    train, held_out, test = (coloured(n, i) for i, n in enumerate((90, 60, 60)))
    figures = finetune.fine_tune(
        encoder,
        *(train, held_out, test),
        image_size=16,
        learning_rates=(0.5, np.inf),
        epochs=(8, 1),
        batch_size=30,
        verbose=0,
    )
    assert figures["top1"] > 0.9 and figures["top5"] == 1.0
    assert (figures["epochs"], figures["learning_rate"]) == (8, 0.5)
    # The last training is not the one that was chosen: it diverged.
    assert figures["held_out_top1"]["1"]["inf"] == 0.0
    for weight, value in zip(encoder.get_weights(), before):  # moving statistics as well
        assert np.abs(weight - value).max() > 1e-3


def fine_tuned(encoder, data, classifier_rate=1.0, strategy=None):
    strategy = strategy or tf.distribute.get_strategy()
    with strategy.scope():
        keras.utils.set_random_seed(1)
        model = finetune.FineTuned(encoder(strategy.num_replicas_in_sync > 1), 3, classifier_rate)
        start = weights_of(model)
        model.compile(sgd(0.05))
    model.fit(batches_of(data, 20), epochs=3, verbose=0)
    return start, weights_of(model)


def weights_of(model):
    return model.encoder.get_weights() + model.classifier.get_weights()


def test_fine_tuning_is_keras_training(tiny_encoder):
    """With one rate it is `fit` of the two layers after each other."""
    data = random_batches()
    start, end = fine_tuned(tiny_encoder, data)
    plain = keras.Sequential([tiny_encoder(), linear_classifier(8, 3)])
    plain.build((None, 16, 16, 3))
    plain.set_weights(start)
    plain.compile(sgd(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    plain.fit(data["view1"], data["label"], batch_size=20, epochs=3, shuffle=False, verbose=0)
    for found, expected in zip(end, plain.get_weights()):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_classifier_rate(tiny_encoder):
    """Of one step: ten times as far for the classifier, as far for the encoder."""
    data = {key: value[:20] for key, value in random_batches().items()}
    moved = []
    for rate in (1.0, 10.0):
        keras.utils.set_random_seed(1)
        model = finetune.FineTuned(tiny_encoder(), 3, rate)
        model.compile(keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True))
        before = model.trainable_variables[0].numpy(), model.classifier.kernel.numpy()
        model.fit(batches_of(data, 20), verbose=0)
        after = model.trainable_variables[0].numpy(), model.classifier.kernel.numpy()
        moved.append([a - b for a, b in zip(after, before)])
    np.testing.assert_allclose(moved[1][0], moved[0][0], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(moved[1][1], 10 * moved[0][1], rtol=1e-3, atol=1e-6)
    assert min(np.abs(step).max() for step in moved[0]) > 1e-4


def test_fine_tuning_on_two_replicas(tiny_encoder, mirrored):
    data = random_batches()
    _, one = fine_tuned(tiny_encoder, data)
    _, two = fine_tuned(tiny_encoder, data, strategy=mirrored)
    for a, b in zip(one, two):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_both_on_two_replicas_to_the_end(coloured, tiny_encoder, mirrored):
    """With a batch that two do not divide, and evaluation outside of `fit`."""
    keras.utils.set_random_seed(0)
    sources = [coloured(n, i) for i, n in enumerate((45, 20, 20))]
    with mirrored.scope():
        encoder = tiny_encoder(synchronized=True)
        settings = {"image_size": 16, "batch_size": 1024, "verbose": 0}
        figures = linear_eval.linear_evaluation(encoder, *sources, epochs=40, **settings)
        assert figures["top1"] > 0.8
        figures = finetune.fine_tune(
            encoder, *sources, epochs=(20,), learning_rates=(0.5,), **settings
        )
        assert figures["top1"] > 0.8


@pytest.mark.parametrize("classes", [3, 10])
def test_top_k_accuracies(make_source, classes):
    """Against a sort of each image's logits, for two classifiers at once; labels may be missing."""
    source = make_source(30)
    labels = np.where(np.arange(30) % 7 == 0, -1, np.arange(30) % classes)
    relabel = tf.constant(labels, tf.int64)
    dataset = source.dataset.map(lambda r: {**r, "label": tf.gather(relabel, r["index"])})
    source = dataclasses.replace(source, dataset=dataset)
    projection = np.random.default_rng(0).normal(size=(3, 2 * classes)).astype(np.float32)

    def classify(images):
        logits = tf.reduce_mean(images, (1, 2)) @ projection
        return tf.reshape(logits, [-1, 2, classes])

    found = top_k_accuracies(classify, source, image_size=16, batch_size=8)
    (batch,) = views.eval_batches(source, image_size=16)
    order = np.argsort(-classify(augment.normalize(batch["image"])).numpy(), axis=-1)
    for i in range(2):
        for row, k in enumerate((1, 5)):
            hits = [labels[n] in order[n, i, :k] for n in range(30) if labels[n] >= 0]
            assert found[row, i] == pytest.approx(np.mean(hits))
    assert (found[1] == 1.0).all() == (classes == 3)


def test_top_k_of_what_is_not_finite(make_source):
    for value in (np.nan, np.inf):

        def classify(images):
            zeros = tf.zeros([tf.shape(images)[0], 4])
            return tf.concat([zeros[:, :3], zeros[:, 3:] + value], 1)

        assert top_k_accuracies(classify, make_source(8), image_size=16).max() == 0.0


# What they learn from -----------------------------------------------------------------------


def test_read_labels(make_source):
    assert subset.read_labels(make_source(10)).tolist() == [i % 4 for i in range(10)]
    assert subset.read_labels(make_source(3, labels=False)).tolist() == [-1] * 3


def test_hold_out():
    labels = np.repeat([0, 1, 2, -1], [500, 300, 200, 100])
    training, held_out = subset.hold_out(labels, seed=3)
    assert len(held_out) == 100 and len(training) == 900
    assert sorted([*training, *held_out]) == list(range(1000))
    assert np.bincount(labels[held_out]).tolist() == [50, 30, 20]
    again = subset.hold_out(labels, seed=3)
    np.testing.assert_array_equal(again[1], held_out)
    assert set(subset.hold_out(labels, seed=4)[1]) != set(held_out)


def test_hold_out_of_many_and_of_few():
    training, held_out = subset.hold_out(np.arange(200_000) % 1000, seed=0)
    assert len(held_out) == 10_009 and len(training) == 189_991
    training, held_out = subset.hold_out(np.array([-1, 0, 1, 1]), seed=0)  # a class of one image
    assert 1 in training and len(held_out) == 1
    with pytest.raises(UserError, match="1 labelled images"):
        subset.hold_out(np.array([-1, 5]), seed=0)


def test_stratified():
    labels = np.array([0] * 500 + [1] * 50 + [2] + [-1] * 9)
    chosen = subset.stratified(labels, 56, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [50, 5, 1]
    assert len(set(chosen)) == 56 and (np.diff(chosen) > 0).all()
    assert np.bincount(labels[subset.stratified(labels, 3, seed=0)]).tolist() == [1, 1, 1]
    assert len(subset.stratified(labels, 10**6, seed=0)) == 551
    assert set(subset.stratified(labels, 56, seed=1)) != set(chosen)


def test_subset_is_these_images_and_no_other(make_source):
    """Nothing else is trained on, in any epoch, decoded or not."""
    source = make_source(20)
    places = np.array([1, 4, 5, 11, 19])
    part = subset.subset(source, places)
    (batch,) = views.eval_batches(part, image_size=16)
    assert part.num_examples == 5 and batch["index"].numpy().tolist() == places.tolist()
    marked = source.dataset.map(lambda r: {**r, "label": r["index"]})
    for shape in ((16, 16, 3), None):
        labelled = dataclasses.replace(source, dataset=marked, image_shape=shape)
        batches = views.pretrain_batches(
            subset.subset(labelled, places), image_size=16, batch_size=5, epochs=3, num_views=1
        )
        seen = [sorted(batch["label"].numpy().tolist()) for batch in batches]
        assert seen == [places.tolist()] * 3


def test_fingerprints(make_source):
    source = make_source(10)
    numbers = subset.read_fingerprints(source)
    assert len(set(numbers)) == 10
    part = subset.read_fingerprints(subset.subset(source, np.array([2, 7])))
    assert np.flatnonzero(np.isin(numbers, part)).tolist() == [2, 7]
    # Of more channels than files have, the images are pixels.
    pixels = tf.random.stateless_uniform([5, 4, 4, 13], [0, 0], 0, 256, tf.int32)
    records = {"image": tf.cast(pixels, tf.uint8), "index": tf.range(5, dtype=tf.int64)}
    records |= {"label": tf.zeros([5], tf.int64), "name": [str(i) for i in range(5)]}
    records = tf.data.Dataset.from_tensor_slices(records)
    assert len(set(subset.read_fingerprints(Source(records, 5, None, None, channels=13)))) == 5


@pytest.mark.parametrize("shape", [(16, 16, 3), None])
def test_one_view_is_a_crop_maybe_flipped(make_source, shape):
    """The first view has the same drawing; with the whole image it is the image or its mirror."""
    source = dataclasses.replace(make_source(32), image_shape=shape)
    (batch,) = views.pretrain_batches(
        source,
        image_size=16,
        batch_size=32,
        epochs=1,
        min_crop_area=1.0,
        augmentation="crop_flip",
        num_views=1,
    )
    assert set(batch) == {"view1", "label"}
    (whole,) = source.dataset.map(lambda r: tf.io.decode_png(r["image"])).batch(32)
    whole = augment.normalize(whole).numpy()
    both = np.concatenate([whole, whole[:, :, ::-1]])
    flipped = []
    for view in batch["view1"].numpy():
        distance = np.abs(both - view).max((1, 2, 3))
        if distance.min() < 1e-4:  # where the drawn shape was the square
            flipped.append(distance.argmin() >= 32)
    assert 0 < sum(flipped) < len(flipped)
