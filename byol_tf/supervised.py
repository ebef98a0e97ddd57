"""The supervised baseline: the same encoder and augmentations, learned from labels."""

import tensorflow as tf

from byol_tf.classifier import linear_classifier, loss_and_accuracy
from byol_tf.keras_api import keras
from byol_tf.model import unpack_views


class Supervised(keras.Model):
    """An encoder and a linear classifier trained by cross-entropy on both views.

    Takes the batches of `byol_tf.pretrain_batches`, which must have labels (-1: an image that
    does not count), and the same optimizers as `byol_tf.BYOL`.

    Args:
      encoder: a `keras.Model` from images [B, H, W, C] to a vector [B, D].
      num_classes: int.
      augment: as of `byol_tf.BYOL`.
    """

    def __init__(self, encoder, num_classes, augment=None):
        super().__init__(name="supervised")
        self.online_encoder = encoder  # called so that all tasks find it in a checkpoint
        self.classifier = linear_classifier(encoder.output_shape[-1], num_classes)
        self.augment = augment
        self.distribute_reduction_method = "first"  # as in `BYOL.compile`
        self._means = {key: keras.metrics.Mean(key) for key in ("loss", "accuracy")}
        self.built = True

    def train_step(self, batch):
        batch = unpack_views(batch, self.augment)
        with tf.GradientTape() as tape:
            loss, accuracy = self._loss_and_accuracy(batch, training=True)
            # Keras sums the gradients of the replicas.
            replica_loss = loss / self.distribute_strategy.num_replicas_in_sync
        gradients = tape.gradient(replica_loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return self._updated_means(loss, accuracy)

    def test_step(self, batch):
        """The same loss on held-out views, for `evaluate`; in inference mode."""
        batch = unpack_views(batch, self.augment)
        return self._updated_means(*self._loss_and_accuracy(batch, training=False))

    def _loss_and_accuracy(self, batch, training):
        # One after the other: each view has batch statistics of its own, as in BYOL.
        logits = [self(batch[view], training=training) for view in ("view1", "view2")]
        return loss_and_accuracy(tf.concat(logits, 0), tf.tile(batch["label"], [2]))

    def _updated_means(self, loss, accuracy):
        self._means["loss"].update_state(loss)
        self._means["accuracy"].update_state(accuracy)
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
