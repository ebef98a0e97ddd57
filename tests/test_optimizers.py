"""LARS and the schedules against NumPy written from the formulas."""

import math

import numpy as np
import pytest
import tensorflow as tf

import byol_tf
from byol_tf.keras_api import keras
from byol_tf.optimizers import OPTIMIZERS


def numpy_lars(weights, gradients, rates, decay):
    weights = [w.astype(np.float64) for w in weights]
    momenta = [np.zeros_like(w) for w in weights]
    for step, rate in enumerate(rates):
        for i, gradient in enumerate(gradients[step]):
            gradient = gradient.astype(np.float64)
            if weights[i].ndim > 1:
                gradient = gradient + decay * weights[i]
                norms = np.linalg.norm(weights[i]), np.linalg.norm(gradient)
                gradient = gradient * (1e-3 * norms[0] / norms[1] if min(norms) > 0 else 1.0)
            momenta[i] = 0.9 * momenta[i] + gradient
            weights[i] = weights[i] - rate * momenta[i]
    return weights


@pytest.mark.parametrize("decay", [0.05, 0.0])
def test_lars_follows_the_formula(decay):
    """Without decay a zero gradient of a weight leaves a norm of 0 to divide by."""
    rng = np.random.default_rng(0)
    shapes = [(3, 4), (4,), (2, 2), (3, 3, 2, 2)]
    weights = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    weights[2][:] = 0.0  # a zero norm
    gradients = [[rng.normal(size=s).astype(np.float32) for s in shapes] for _ in range(8)]
    gradients[0][3][:] = 0.0
    schedule = byol_tf.WarmupCosine(3.0, 8, 3)
    rates = [float(schedule(step)) for step in range(8)]
    variables = [tf.Variable(weight) for weight in weights]
    optimizer = byol_tf.LARS(schedule, weight_decay=decay)
    for step in gradients:
        optimizer.apply_gradients(zip(map(tf.constant, step), variables))
    for variable, expected in zip(variables, numpy_lars(weights, gradients, rates, decay)):
        np.testing.assert_allclose(variable, expected, rtol=2e-5, atol=1e-6)


def test_lars_can_be_saved():
    config = keras.optimizers.serialize(byol_tf.LARS(0.3, weight_decay=0.1))
    restored = keras.optimizers.deserialize(config)
    assert restored.get_config()["weight_decay"] == pytest.approx(0.1)


def test_learning_rate_warms_up_and_decays():
    schedule = byol_tf.WarmupCosine(0.8, total_steps=100, warmup_steps=10)
    for step in (0, 1, 9, 10, 50, 99, 100):
        if step < 10:
            expected = 0.8 * step / 10
        else:
            expected = 0.8 * (math.cos(math.pi * (step - 10) / 90) + 1) / 2
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-6)


def test_target_ema_rises_to_one():
    assert float(byol_tf.target_ema(150, 0.99, 100)) == 1.0
    for k in (0, 1, 50, 100):
        expected = 1 - (1 - 0.99) * (math.cos(math.pi * k / 100) + 1) / 2
        assert float(byol_tf.target_ema(k, 0.99, 100)) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_decay_kernels_only(name):
    """With a zero gradient only what is decayed moves; LAMB's ratio needs the same check."""
    if name == "lamb":
        pytest.importorskip("tensorflow_addons")
    layer = keras.layers.Dense(3)
    layer.build((None, 3))
    layer.bias.assign(np.ones(3))
    kernel = layer.kernel.numpy()
    optimizer = byol_tf.make_optimizer(name, 0.1, 0.5)
    for _ in range(3):
        optimizer.apply_gradients((tf.zeros_like(w), w) for w in layer.trainable_weights)
    np.testing.assert_array_equal(layer.bias, np.ones(3))
    assert np.linalg.norm(layer.kernel) < np.linalg.norm(kernel)


def test_lamb_without_addons_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_addons", None)
    with pytest.raises(byol_tf.UserError, match="TensorFlow Addons"):
        byol_tf.make_optimizer("lamb", 0.1, 0.0)
