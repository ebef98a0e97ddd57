"""The supervised baseline: the same encoder and augmentations, learned from labels."""

import tensorflow as tf

from byol_tf.keras_api import keras
from byol_tf.resnet import kernel_initializer


class Supervised(keras.Model):
    """An encoder and a linear classifier trained by cross-entropy on both views.

    Takes the batches of `byol_tf.pretrain_batches`, which must have labels, and the same
    optimizers as `byol_tf.BYOL`.

    Args:
      encoder: a `keras.Model` from images [B, H, W, C] to a vector [B, D].
      num_classes: int.
      augment: as of `byol_tf.BYOL`.
    """

    def __init__(self, encoder, num_classes, augment=None):
        super().__init__(name="supervised")
        self.online_encoder = encoder  # called so that all tasks find it in a checkpoint
        self.classifier = keras.layers.Dense(
            num_classes, kernel_initializer=kernel_initializer(), dtype="float32", name="classifier"
        )
        self.classifier.build((None, encoder.output_shape[-1]))
        self.augment = augment
        self._means = {key: keras.metrics.Mean(key) for key in ("loss", "accuracy")}
        self.built = True

    def train_step(self, batch):
        if self.augment is not None:
            batch = self.augment(batch)
        labels = batch["label"]
        with tf.GradientTape() as tape:
            logits = [self(batch[view], training=True) for view in ("view1", "view2")]
            losses = [
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels, of_view)
                for of_view in logits
            ]
            loss = tf.reduce_mean(losses) / self.distribute_strategy.num_replicas_in_sync
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        self._means["loss"].update_state(losses)
        self._means["accuracy"].update_state(tf.equal(tf.argmax(logits, -1), labels))
        return {key: mean.result() for key, mean in self._means.items()}

    def call(self, images, training=False):
        """Logits of the classes: float [B, H, W, C] -> float32 [B, num_classes]."""
        return self.classifier(self.online_encoder(images, training=training))

    @property
    def metrics(self):
        return list(self._means.values())

    @property
    def online_weights(self):
        """All weights, in a fixed order."""
        return self.online_encoder.weights + self.classifier.weights

    @property
    def target_weights(self):
        """None: there is no target network."""
        return []
