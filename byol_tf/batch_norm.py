"""Batch normalisation whose statistics are those of all replicas together (paper, appendix C)."""

import tensorflow as tf
from tensorflow.python.framework import config  # the only place that says it

from byol_tf.distribution import replica_context
from byol_tf.keras_api import keras


@keras.utils.register_keras_serializable(package="byol_tf")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """Keras' layer with the batch statistics of all replicas, over the last axis.

    Outputs, gradients and moving statistics are those of Keras' layer on one replica with
    the whole batch, in whatever parts the replicas have it, also none. (As there, the moving
    variance of [B, H, W, C] is the unbiased one; `synchronized=True` keeps the biased one.)
    It sums once across the replicas forward and once backward, where `synchronized=True`
    does three times, and takes fused kernels, which is faster on CPUs; on GPUs it was not
    measured. Inference and a single replica are Keras' own. A mask is not looked at.

    The sums are of distances from the moving mean, so that large means cost no precision;
    of the first steps, when the moving mean is not there yet, they do, in the variance.

    Raises:
      ValueError: when it is built, if the axis is not the last one or gamma or beta is left out.
    """

    def build(self, input_shape):
        super().build(input_shape)  # a saved layer's axis is known as the last one only here
        if self.axis != [len(input_shape) - 1] or not (self.scale and self.center):
            raise ValueError(f"{self.name}: only the last axis, with scale=True and center=True.")

    def call(self, inputs, training=None):
        training = self._get_training_value(training)
        if not training or replica_context() is None:
            return super().call(inputs, training=training)
        outputs, mean, variance, count = _normalize(
            inputs, self.gamma, self.beta, tf.convert_to_tensor(self.moving_mean), self.epsilon
        )
        if len(inputs.shape) == 4:  # where Keras takes the fused kernel it keeps the unbiased one
            variance *= count / tf.maximum(count - 1.0, 1.0)
        for moving, now in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign_sub((moving - now) * (1.0 - self.momentum))
        return outputs


def _normalize(inputs, gamma, beta, shift, epsilon):
    """Normalises by the mean and the variance over all replicas.

    Args:
      inputs: float [B, ..., C]; B may differ between replicas.
      gamma, beta: float32 [C].
      shift: float32 [C], the same on all replicas; the nearer the mean, the more precise.
      epsilon: float.

    Returns: outputs as inputs, mean and variance, float32 [C], and the count of values, [1].
    """
    context = tf.distribute.get_replica_context()
    channels = inputs.shape[-1]

    def sum_of_all(vectors):
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.concat(vectors, 0))

    @tf.custom_gradient
    def normalize(x, gamma, beta):
        total = sum_of_all(_count_and_sums(x, shift))
        count = total[:1]
        distance, square = tf.split(total[1:] / count, 2)
        mean, variance = shift + distance, tf.maximum(square - tf.square(distance), 0.0)
        outputs = _fused(x, gamma, beta, mean, variance, epsilon)

        def gradients(upstream, *_):
            through_x, *sums = _gradients(upstream, x, gamma, mean, variance, epsilon)
            # That was with constant statistics; through them goes an affine function of x.
            of_gamma, of_beta = tf.split(sum_of_all(sums) / count, 2)
            scale = gamma * tf.math.rsqrt(variance + epsilon)
            through_statistics = _fused(
                x, scale * of_gamma, scale * of_beta, mean, variance, epsilon
            )
            return through_x - through_statistics, *sums

        return (outputs, mean, variance, count), gradients

    # The kernels take four dimensions.
    x = inputs if len(inputs.shape) == 4 else tf.reshape(inputs, [-1, 1, 1, channels])
    outputs, *statistics = normalize(x, gamma, beta)
    outputs = tf.ensure_shape(tf.reshape(outputs, tf.shape(inputs)), inputs.shape)
    return outputs, *(tf.stop_gradient(statistic) for statistic in statistics)


def _count_and_sums(x, shift):
    """How many values a channel has, [1], the sum of their distances from shift, and of the
    squares, float32 [C], by the kernel that would normalise with its statistics at once."""
    count = tf.cast(tf.size(x) // x.shape[-1], tf.float32)
    ones, none = tf.ones([x.shape[-1]]), tf.zeros([0])
    result = tf.raw_ops.FusedBatchNormV3(
        x=x, scale=ones, offset=ones, mean=none, variance=none, is_training=True
    )
    distance = result.batch_mean - shift
    variance = result.batch_variance * ((count - 1.0) / count)  # the kernel's is the unbiased one
    # Of no values both are NaN.
    sums = [tf.math.multiply_no_nan(m, count) for m in (distance, variance + tf.square(distance))]
    return [count[tf.newaxis], *sums]


def _gradients(upstream, x, gamma, mean, variance, epsilon):
    """Gradients of x, as x, and of gamma and beta, float32 [C]; mean and variance are constant."""
    if not config.is_op_determinism_enabled():
        # Not in training the kernel takes the variance itself; cuDNN's inverse deviation
        # is of training only.
        return tf.raw_ops.FusedBatchNormGradV3(
            **{"y_backprop": upstream, "x": x, "scale": gamma},
            **{"reserve_space_1": mean, "reserve_space_2": variance, "reserve_space_3": mean},
            **{"epsilon": epsilon, "is_training": False},
        )[:3]
    # On GPUs that kernel has no deterministic way.
    axes = [0, 1, 2]
    inverse = tf.math.rsqrt(variance + epsilon)
    wide, upstream = tf.cast(x, tf.float32), tf.cast(upstream, tf.float32)
    of_gamma = tf.reduce_sum(upstream * (wide - mean), axes) * inverse
    through_x = tf.cast(upstream * (gamma * inverse), x.dtype)
    return through_x, of_gamma, tf.reduce_sum(upstream, axes)


def _fused(x, gamma, beta, mean, variance, epsilon):
    """gamma (x - mean) / sqrt(variance + epsilon) + beta in one pass over x."""
    statistics = {"mean": mean, "variance": variance, "epsilon": epsilon}
    return tf.raw_ops.FusedBatchNormV3(
        x=x, scale=gamma, offset=beta, is_training=False, **statistics
    ).y
