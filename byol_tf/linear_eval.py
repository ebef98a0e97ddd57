"""Linear evaluation by the paper's protocol: a sweep of learning rates (appendix C.1)."""

import numpy as np
import tensorflow as tf

from byol_tf.classifier import linear_classifier
from byol_tf.data import crop, views
from byol_tf.evaluation import top_k_accuracies
from byol_tf.keras_api import keras
from byol_tf.model import unpack_views
from byol_tf.schedules import WarmupCosine

LEARNING_RATES = (0.4, 0.3, 0.2, 0.1, 0.05)


class LinearClassifiers(keras.Model):
    """Linear classifiers of one frozen representation, a learning rate for each.

    They learn side by side from one forward pass of the encoder, which is in inference mode:
    neither its weights nor its batch statistics change. Takes batches as of
    `byol_tf.pretrain_batches` with "view1" and "label", none of them -1.

    Compile it with an SGD of learning rate 1 or a schedule that begins there. The steps of SGD,
    momentum included, are linear in the gradient, so each classifier's loss is weighted by
    its rate: the weights go the way of training it alone at that rate.

    Args:
      encoder: a `keras.Model` from images [B, H, W, C] to a vector [B, D].
      num_classes: int.
      learning_rates: L floats.
    """

    def __init__(self, encoder, num_classes, learning_rates):
        super().__init__(name="linear_classifiers")
        self.encoder = encoder
        self.learning_rates = learning_rates
        # Side by side in one layer, so that they are one product of matrices.
        self.classifiers = linear_classifier(
            encoder.output_shape[-1], len(learning_rates) * num_classes
        )
        self.distribute_reduction_method = "first"  # as in `BYOL.compile`
        self._losses = [keras.metrics.Mean(f"loss_at_{rate:g}") for rate in learning_rates]
        self.built = True

    def train_step(self, batch):
        batch = unpack_views(batch)
        representation = self.encoder(batch["view1"], training=False)
        labels = tf.tile(batch["label"][:, tf.newaxis], [1, len(self.learning_rates)])
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
                labels, self._logits(representation)
            )
            losses = tf.reduce_mean(losses, 0)
            # Keras sums the gradients of the replicas.
            weights = (
                tf.constant(self.learning_rates) / self.distribute_strategy.num_replicas_in_sync
            )
            loss = tf.reduce_sum(losses * weights)
        variables = self.classifiers.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        for mean, value in zip(self._losses, tf.unstack(losses)):
            mean.update_state(value)
        return {mean.name: mean.result() for mean in self._losses}

    def call(self, images, training=False):
        """Logits: float [B, H, W, C] -> float32 [B, L, num_classes]; never in training mode."""
        return self._logits(self.encoder(images, training=False))

    def _logits(self, representation):
        logits = self.classifiers(representation)
        num_classes = logits.shape[-1] // len(self.learning_rates)
        return tf.reshape(logits, [-1, len(self.learning_rates), num_classes])

    @property
    def metrics(self):
        return self._losses


def linear_evaluation(
    encoder,
    train,
    held_out,
    test,
    *,
    image_size,
    learning_rates=LEARNING_RATES,
    epochs=80,
    batch_size=1024,
    min_crop_area=crop.AREA_RANGE[0],
    seed=0,
    verbose=2,
):
    """Linear evaluation of a frozen encoder (appendix C.1).

    For every learning rate a linear classifier learns by `fit_by_sgd`. The one of the best top-1
    accuracy on held-out images is judged on the test images; as DeepMind's reference describes
    it, there is no second training on all.

    Args:
      encoder: a `keras.Model` from images [B, H, W, C] to a vector [B, D].
      train, held_out, test: `byol_tf.data.source.Source`s of different images; of the first two
        every image has a label.
      image_size, min_crop_area, epochs, batch_size, seed, verbose: as of `fit_by_sgd`.
      learning_rates: base rates.

    Returns: a dict of "top1" and "top5", floats in [0, 1], of the test images; "learning_rate", the
      one chosen; "held_out_top1", a dict from every rate, a string, to its accuracy. A rate that
      diverged has accuracy 0.
    """
    model = LinearClassifiers(encoder, len(train.class_names), learning_rates)
    fit_by_sgd(
        model,
        train,
        learning_rate=1.0,  # times the rates, which are inside
        image_size=image_size,
        epochs=epochs,
        batch_size=batch_size,
        min_crop_area=min_crop_area,
        seed=seed,
        verbose=verbose,
    )
    found, _ = top_k_accuracies(model, held_out, image_size=image_size)
    best = int(np.argmax(found))
    top1, top5 = top_k_accuracies(lambda x: model(x)[:, best], test, image_size=image_size)
    return {
        "top1": float(top1),
        "top5": float(top5),
        "learning_rate": learning_rates[best],
        "held_out_top1": {f"{rate:g}": float(top1) for rate, top1 in zip(learning_rates, found)},
    }


def fit_by_sgd(
    model,
    source,
    *,
    learning_rate,
    image_size,
    epochs,
    batch_size,
    min_crop_area=crop.AREA_RANGE[0],
    seed=0,
    verbose=2,
):
    """Trains a classifier by the protocol of the paper's evaluations (appendices C.1 and C.2).

    Random crops and flips, SGD with Nesterov momentum 0.9, no regularisation. As in DeepMind's
    reference the rate decays with a cosine from learning_rate * batch / 256, without warm-up.

    Args:
      model: a `keras.Model` whose `train_step` takes batches with "view1" and "label".
      source: a `byol_tf.data.source.Source`.
      learning_rate: float, base rate.
      image_size: side of the views in pixels.
      epochs: passes over the source.
      batch_size: images a step, over all replicas; the whole source where it is smaller.
      min_crop_area: smallest part of an image's area in a view.
      seed: int, of order and views.
      verbose: as of `fit`.
    """
    replicas = model.distribute_strategy.num_replicas_in_sync
    batch_size = max(1, min(batch_size, source.num_examples) // replicas) * replicas
    steps = views.steps_per_epoch(source, batch_size)
    schedule = WarmupCosine(learning_rate * batch_size / 256, epochs * steps)
    model.compile(keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True))
    batches = views.pretrain_batches(
        source,
        image_size=image_size,
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        min_crop_area=min_crop_area,
        augmentation="crop_flip",
        num_views=1,
    )
    stop = keras.callbacks.TerminateOnNaN()  # of a model with one "loss"
    model.fit(batches, epochs=epochs, steps_per_epoch=steps, callbacks=[stop], verbose=verbose)
