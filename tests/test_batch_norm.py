"""Batch statistics of all replicas: two replicas against one with Keras' own layer."""

import numpy as np
import pytest
import tensorflow as tf

from byol_tf.batch_norm import SyncBatchNormalization
from byol_tf.keras_api import keras

BATCH = 8


def results(layer_class, strategy, x, weights):
    """Outputs, the gradients of x, gamma and beta, and the moving statistics after a step."""
    channels = x.shape[-1]
    with strategy.scope():
        layer = layer_class(momentum=0.9, epsilon=1e-5)
        layer.build((None, *x.shape[1:]))
        layer.gamma.assign(np.linspace(0.3, 2.0, channels))
        layer.beta.assign(np.linspace(-1.0, 1.0, channels))

    def one_replica(x, weights):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(weights * (y + 0.3 * tf.square(y)))
        return y, *tape.gradient(loss, [x, layer.gamma, layer.beta])

    dataset = tf.data.Dataset.from_tensor_slices((x, weights)).batch(BATCH)
    batch = next(iter(strategy.experimental_distribute_dataset(dataset)))
    step = tf.function(lambda batch: strategy.run(one_replica, args=batch))
    y, of_x, of_gamma, of_beta = (strategy.experimental_local_results(r) for r in step(batch))
    moving = layer.moving_mean.numpy(), layer.moving_variance.numpy()
    return np.concatenate(y), np.concatenate(of_x), sum(of_gamma), sum(of_beta), *moving


@pytest.mark.parametrize("shape", [(BATCH, 5, 4, 6), (BATCH, 6)])
def test_two_replicas_are_one(mirrored, shape):
    random = np.random.default_rng(0)
    x = random.normal(1.0, 3.0, shape).astype(np.float32)
    weights = random.normal(size=shape).astype(np.float32)
    two = results(SyncBatchNormalization, mirrored, x, weights)
    alone = tf.distribute.get_strategy()
    for layer_class in (keras.layers.BatchNormalization, SyncBatchNormalization):
        for ours, keras_own in zip(two, results(layer_class, alone, x, weights)):
            np.testing.assert_allclose(ours, keras_own, rtol=1e-5, atol=1e-5)


def test_bfloat16_and_inference(mirrored):
    with mirrored.scope():
        layer = SyncBatchNormalization(momentum=0.0, dtype="mixed_bfloat16")
        layer.build((None, 4, 4, 3))
    x = tf.cast(tf.random.stateless_normal([4, 4, 4, 3], [0, 0], mean=5.0), tf.bfloat16)
    y = mirrored.run(lambda: layer(x, training=True))
    for part in mirrored.experimental_local_results(y):
        assert part.dtype == tf.bfloat16
        np.testing.assert_allclose(tf.reduce_mean(tf.cast(part, tf.float32)), 0.0, atol=2e-2)
    inferred = layer(x, training=False)
    np.testing.assert_allclose(tf.cast(inferred, tf.float32), tf.cast(part, tf.float32), atol=4e-2)


def test_is_saved_and_loaded():
    layer = SyncBatchNormalization(name="bn")
    config = keras.layers.serialize(layer)
    assert isinstance(keras.layers.deserialize(config), SyncBatchNormalization)
