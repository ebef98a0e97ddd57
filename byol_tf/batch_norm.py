"""Batch normalisation whose statistics are those of all replicas together (paper, appendix C)."""

import tensorflow as tf

from byol_tf.keras_api import keras


@keras.utils.register_keras_serializable(package="byol_tf")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """Keras' layer with the batch statistics of all replicas, over the last axis.

    `BatchNormalization(synchronized=True)` gives the same numbers, but sums three times
    across the replicas and never takes the fused kernel. Here it is one sum forward, one
    backward, and the fused kernel both ways. Inference and a single replica are Keras' own.
    """

    def call(self, inputs, training=None):
        context = tf.distribute.get_replica_context()
        training = self._get_training_value(training)
        if not training or context is None or context.num_replicas_in_sync == 1:
            return super().call(inputs, training=training)
        outputs, mean, variance = _normalize(inputs, self.gamma, self.beta, self.epsilon)
        if len(inputs.shape) == 4:  # where Keras takes the fused kernel it keeps the unbiased one
            count = tf.cast(tf.size(inputs) // inputs.shape[-1], tf.float32)
            count *= context.num_replicas_in_sync
            variance *= count / (count - 1.0)
        for moving, now in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign_sub((moving - now) * (1.0 - self.momentum))
        return outputs


def _normalize(inputs, gamma, beta, epsilon):
    """Normalises by the mean and the variance over all replicas.

    Args: inputs: float [B, ..., C]; gamma, beta: float32 [C]; epsilon: float.

    Returns: outputs as inputs, and mean and variance, float32 [C].
    """
    context = tf.distribute.get_replica_context()
    channels = inputs.shape[-1]
    count = tf.cast(tf.size(inputs) // channels, tf.float32)  # of this replica

    def means_of_all(*vectors):
        """The means over the replicas of float32 [C] each."""
        total = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.stack(vectors))
        return tf.unstack(total / context.num_replicas_in_sync)

    @tf.custom_gradient
    def normalize(x, gamma, beta):
        own_mean, own_variance = _mean_and_variance(x, count)
        mean, square = means_of_all(own_mean, own_variance + tf.square(own_mean))
        variance = square - tf.square(mean)
        outputs = _fused(x, gamma, beta, mean, variance, epsilon)

        def gradients(upstream, *_):
            through_x, gamma_sum, beta_sum, *_ = tf.raw_ops.FusedBatchNormGradV3(
                **{"y_backprop": upstream, "x": x, "scale": gamma},
                **{"reserve_space_1": mean, "reserve_space_2": variance, "reserve_space_3": mean},
                **{"epsilon": epsilon, "is_training": False},
            )
            # That was with constant statistics; through them goes an affine function of x.
            of_gamma, of_beta = means_of_all(gamma_sum / count, beta_sum / count)
            scale = gamma * tf.math.rsqrt(variance + epsilon)
            through_statistics = _fused(
                x, scale * of_gamma, scale * of_beta, mean, variance, epsilon
            )
            return through_x - through_statistics, gamma_sum, beta_sum

        return (outputs, mean, variance), gradients

    # The kernels take four dimensions.
    x = inputs if len(inputs.shape) == 4 else tf.reshape(inputs, [-1, 1, 1, channels])
    outputs, mean, variance = normalize(x, gamma, beta)
    outputs = tf.ensure_shape(tf.reshape(outputs, tf.shape(inputs)), inputs.shape)
    return outputs, tf.stop_gradient(mean), tf.stop_gradient(variance)


def _fused(x, gamma, beta, mean, variance, epsilon):
    """gamma (x - mean) / sqrt(variance + epsilon) + beta in one pass over x."""
    statistics = {"mean": mean, "variance": variance, "epsilon": epsilon}
    return tf.raw_ops.FusedBatchNormV3(
        x=x, scale=gamma, offset=beta, is_training=False, **statistics
    ).y


def _mean_and_variance(x, count):
    """float32 [C] each, by the kernel that would normalise with them at once."""
    ones, none = tf.ones([x.shape[-1]]), tf.zeros([0])
    result = tf.raw_ops.FusedBatchNormV3(
        x=x, scale=ones, offset=ones, mean=none, variance=none, is_training=True
    )
    # The kernel's variance is the unbiased one.
    return result.batch_mean, result.batch_variance * ((count - 1.0) / count)
