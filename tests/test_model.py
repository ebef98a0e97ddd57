"""Loss, gradient, target update and replicas, against NumPy written from the paper's formulas."""

import numpy as np
import pytest
import tensorflow as tf

import byol_tf
from byol_tf.keras_api import keras
from byol_tf.model import effective_rank, l2_normalize, prediction_loss, projection_std


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def batch(size=8, seed=0):
    return {
        "view1": random(size, 16, 16, 3, seed=seed),
        "view2": random(size, 16, 16, 3, seed=seed + 1),
        "label": np.arange(size) % 4,
    }


def make_model(encoder, optimizer=None, **kwargs):
    model = byol_tf.BYOL(
        encoder, projector_hidden_size=16, projector_output_size=4, num_classes=4, **kwargs
    )
    model.compile(optimizer=optimizer or keras.optimizers.SGD(0.5))
    return model


def dataset(size=8, steps=2):
    batches = [batch(size, seed=10 * step) for step in range(steps)]
    stacked = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    return tf.data.Dataset.from_tensor_slices(stacked).batch(size, drop_remainder=True)


def numpy_unit(x):
    return x / np.sqrt(np.maximum((x**2).sum(-1, keepdims=True), 1e-12))


def test_loss_is_the_distance_on_the_sphere():
    prediction, target = random(6, 5), random(6, 5, seed=1)
    prediction[2] = 0.0
    target[3] = 1e-8
    expected = ((numpy_unit(prediction) - numpy_unit(target)) ** 2).sum(-1)
    np.testing.assert_allclose(prediction_loss(prediction, target), expected, rtol=1e-5, atol=1e-6)
    cosine = (numpy_unit(prediction) * numpy_unit(target)).sum(-1)
    np.testing.assert_allclose(
        prediction_loss(prediction, target)[:2], 2 - 2 * cosine[:2], rtol=1e-5
    )


def test_loss_gives_the_target_no_gradient():
    prediction, target = tf.Variable(random(3, 4)), tf.Variable(random(3, 4, seed=1))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(prediction_loss(prediction, target))
    to_prediction, to_target = tape.gradient(loss, [prediction, target])
    assert to_target is None
    assert np.abs(to_prediction).max() > 0.01


def test_normalisation_is_float32_and_bounded_at_zero():
    assert l2_normalize(tf.zeros([1, 3], tf.bfloat16)).dtype == tf.float32
    np.testing.assert_array_equal(l2_normalize(np.zeros((1, 3), np.float32)), np.zeros((1, 3)))


def test_collapse_is_measured():
    healthy = random(512, 64)
    assert abs(float(projection_std(healthy)) - 1) < 0.05
    assert float(projection_std(np.ones((8, 4), np.float32))) < 1e-3
    line = random(64, 1) * random(1, 16, seed=1)
    assert float(effective_rank(line)) == pytest.approx(1.0, abs=1e-3)
    assert 12 < float(effective_rank(random(4096, 16))) <= 16
    assert 12 < float(effective_rank(random(16, 4096))) <= 15


def test_loss_adds_both_orders_of_the_views(tiny_encoder):
    model = make_model(tiny_encoder(), random_target=True)
    data = batch()

    def run(*layers, x):
        for layer in layers:
            x = layer(x, training=True)
        return np.asarray(x)

    online = [model.online_encoder, model.online_projector, model.predictor]
    target = [model.target_encoder, model.target_projector]
    expected = 0.0
    for one, other in (("view1", "view2"), ("view2", "view1")):
        prediction = numpy_unit(run(*online, x=data[one]))
        projection = numpy_unit(run(*target, x=data[other]))
        expected += ((prediction - projection) ** 2).sum(-1).mean()
    logs = model.train_on_batch(data, return_dict=True)
    assert logs["prediction_loss"] == pytest.approx(expected, rel=1e-4)


def test_target_is_not_trainable_and_untouched_by_the_step(tiny_encoder):
    model = make_model(tiny_encoder())
    trainable = {id(weight) for weight in model.trainable_weights}
    assert not trainable & {id(weight) for weight in model.target_weights}
    learned = [target for target, _ in model.target_pairs]
    before = [weight.numpy() for weight in learned]
    model.train_on_batch(batch())
    for weight, value in zip(learned, before):
        np.testing.assert_array_equal(weight, value)


def test_classifier_does_not_touch_the_encoder(tiny_encoder):
    """Two labellings change the classifier, and nothing else."""
    weights = []
    for shift in (0, 1):
        keras.utils.set_random_seed(3)
        model = make_model(tiny_encoder())
        data = batch()
        model.train_on_batch({**data, "label": (data["label"] + shift) % 4})
        weights.append((model.online_encoder.get_weights(), model.classifier.get_weights()))
    for one, other in zip(weights[0][0], weights[1][0]):
        np.testing.assert_array_equal(one, other)
    assert np.abs(weights[0][1][0] - weights[1][1][0]).max() > 1e-4


def test_images_without_label_do_not_count(tiny_encoder):
    weights = []
    for labels in ([0, 1, 2, 3, -1, -1, -1, -1], [0, 1, 2, 3] * 2):
        keras.utils.set_random_seed(3)
        model = make_model(tiny_encoder())
        data = batch()
        half = {key: np.concatenate([value[:4]] * 2) for key, value in data.items()}
        logs = model.train_on_batch({**half, "label": np.array(labels)}, return_dict=True)
        weights.append((logs["classifier_loss"], model.classifier.get_weights()))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-5)
    np.testing.assert_allclose(weights[0][1][0], weights[1][1][0], rtol=1e-5)


def test_target_follows_by_the_formula(tiny_encoder):
    model = make_model(tiny_encoder(), random_target=True)
    base, total = 0.9, 2
    pairs = model.target_pairs
    history = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_end(self, step, logs=None):
            history.append([online.numpy() for _, online in pairs])

    expected = [target.numpy() for target, _ in pairs]
    moving = [w.numpy() for w in model.target_weights]
    model.fit(
        dataset(steps=total),
        callbacks=[byol_tf.TargetNetworkUpdate(base), Record()],
        verbose=0,
    )
    for k, onlines in enumerate(history):
        tau = 1 - (1 - base) * (np.cos(np.pi * k / total) + 1) / 2
        expected = [
            target + (1 - tau) * (online - target) for target, online in zip(expected, onlines)
        ]
    for (target, _), value in zip(pairs, expected):
        np.testing.assert_allclose(target, value, rtol=1e-5, atol=1e-6)
    # Its own batch statistics have moved, by its own batches and not by the formula.
    assert not any("moving" in target.name for target, _ in pairs)
    means = [w.name.count("moving_mean") for w in model.target_weights]
    assert sum(means) == 2
    for is_mean, weight, before in zip(means, model.target_weights, moving):
        if is_mean:
            assert np.abs(weight.numpy() - before).max() > 1e-6


def test_fit_refuses_a_target_that_never_moves(tiny_encoder):
    model = make_model(tiny_encoder())
    with pytest.raises(ValueError, match="TargetNetworkUpdate"):
        model.fit(dataset())
    with pytest.raises(ValueError, match="steps_per_execution"):
        model.compile("sgd", steps_per_execution=4)


def test_evaluate_changes_nothing(tiny_encoder):
    model = make_model(tiny_encoder(), random_target=True)
    before = [w.numpy() for w in model.online_weights + model.target_weights]
    logs = model.evaluate(dataset(), verbose=0, return_dict=True)
    for weight, value in zip(model.online_weights + model.target_weights, before):
        np.testing.assert_array_equal(weight, value)
    expected = []
    for data in dataset():
        online1, online2 = (
            model.predictor(model.online_projector(model(data[view])))
            for view in ("view1", "view2")
        )
        target1, target2 = (
            model.target_projector(model.target_encoder(data[view])) for view in ("view1", "view2")
        )
        expected.append(prediction_loss(online1, target2) + prediction_loss(online2, target1))
    assert logs["prediction_loss"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_encoder_must_give_vectors():
    images = keras.Input((16, 16, 3))
    maps = keras.Model(images, keras.layers.Conv2D(4, 3)(images))
    with pytest.raises(ValueError, match="pooling"):
        byol_tf.BYOL(maps)


def test_two_replicas_are_one(tiny_encoder, mirrored):
    """The same global batches give the same weights, statistics, target and log, although one
    replica has all the labels."""
    weights, logs, initial = [], [], None
    data = dataset(size=16, steps=4).map(
        lambda b: {**b, "label": tf.where(tf.range(16) < 6, b["label"], -1)}
    )
    for strategy in (tf.distribute.get_strategy(), mirrored):
        with strategy.scope():
            keras.utils.set_random_seed(5)
            model = make_model(
                tiny_encoder(synchronized=strategy is mirrored),
                byol_tf.LARS(0.5, 1e-4),
                random_target=True,
            )
        initial = initial or [w.numpy() for w in model.online_weights + model.target_weights]
        for weight, value in zip(model.online_weights + model.target_weights, initial):
            weight.assign(value)
        model.fit(data, callbacks=[byol_tf.TargetNetworkUpdate(0.5)], verbose=0)
        weights.append([w.numpy() for w in model.online_weights + model.target_weights])
        logs.append(model.history.history)
    assert logs[0].keys() == logs[1].keys() >= {"effective_rank", "projection_std"}
    for name in logs[0]:
        np.testing.assert_allclose(logs[1][name], logs[0][name], rtol=1e-3)
    for one, two, before in zip(*weights, initial):
        np.testing.assert_allclose(two, one, rtol=2e-4, atol=2e-5)
    assert any(np.abs(one - before).max() > 1e-3 for one, before in zip(weights[0], initial))
