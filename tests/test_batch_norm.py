"""Batch statistics of all replicas: two replicas against one with Keras' own layer."""

import numpy as np
import pytest
import tensorflow as tf

from byol_tf import batch_norm
from byol_tf.batch_norm import SyncBatchNormalization
from byol_tf.keras_api import keras


def results(layer_class, strategy, x, weights, cut=None, moving_mean=0.0):
    """Outputs, the gradients of x, gamma and beta, and the moving statistics after a step.

    Args: cut: where the second replica's part of the batch begins, if there are two.
    """
    channels = x.shape[-1]
    with strategy.scope():
        layer = layer_class(momentum=0.9, epsilon=1e-5)
        layer.build((None, *x.shape[1:]))
        layer.gamma.assign(np.linspace(0.3, 2.0, channels))
        layer.beta.assign(np.linspace(-1.0, 1.0, channels))
        layer.moving_mean.assign(np.full(channels, moving_mean))

    def one_replica(x, weights):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(weights * (y + 0.3 * tf.square(y)))
        return y, *tape.gradient(loss, [x, layer.gamma, layer.beta])

    def parts(array):
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(
                np.split(array, cut or [])[context.replica_id_in_sync_group]
            )
        )

    step = tf.function(lambda *batch: strategy.run(one_replica, args=batch))
    y, of_x, of_gamma, of_beta = (
        strategy.experimental_local_results(r) for r in step(parts(x), parts(weights))
    )
    moving = layer.moving_mean.numpy(), layer.moving_variance.numpy()
    return np.concatenate(y), np.concatenate(of_x), sum(of_gamma), sum(of_beta), *moving


def assert_two_replicas_are_one(mirrored, shape, cut, mean=1.0, moving_mean=0.0, tolerance=1e-5):
    random = np.random.default_rng(0)
    x = random.normal(mean, 3.0, shape).astype(np.float32)
    weights = random.normal(size=shape).astype(np.float32)
    two = results(SyncBatchNormalization, mirrored, x, weights, [cut], moving_mean)
    alone = tf.distribute.get_strategy()
    for layer_class in (keras.layers.BatchNormalization, SyncBatchNormalization):
        one = results(layer_class, alone, x, weights, moving_mean=moving_mean)
        for ours, keras_own in zip(two, one):
            np.testing.assert_allclose(ours, keras_own, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cut", [4, 6, 8])  # 4 and 4, 6 and 2, 8 and 0
@pytest.mark.parametrize("shape", [(8, 5, 4, 6), (8, 6)])
def test_two_replicas_are_one(mirrored, shape, cut):
    assert_two_replicas_are_one(mirrored, shape, cut)


def test_without_the_kernel_that_is_not_deterministic(mirrored, monkeypatch):
    monkeypatch.setattr(batch_norm.config, "is_op_determinism_enabled", lambda: True)
    monkeypatch.setattr(tf.raw_ops, "FusedBatchNormGradV3", None)
    assert_two_replicas_are_one(mirrored, (8, 5, 4, 6), cut=6)


def test_large_means(mirrored):
    shape = (8, 5, 4, 6)
    assert_two_replicas_are_one(mirrored, shape, 6, mean=1e3, moving_mean=990.0, tolerance=5e-4)


def test_nearly_constant_channels_have_no_variance_below_zero(mirrored):
    x = np.full((8, 4, 4, 64), 30.0, np.float32)
    x[4:] *= np.linspace(1.0, 1.0 + 1e-4, 64, dtype=np.float32)
    for result in results(SyncBatchNormalization, mirrored, x, np.ones_like(x), [4]):
        assert np.isfinite(result).all()


@pytest.mark.parametrize("how", [{"axis": 1}, {"scale": False}, {"center": False}])
def test_what_it_cannot_do_is_refused(how):
    with pytest.raises(ValueError, match="only the last axis"):
        SyncBatchNormalization(**how).build((None, 4, 4, 3))


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
