"""Semi-supervised evaluation: encoder and classifier learn from few labels (appendix C.2)."""

import itertools

import tensorflow as tf

from byol_tf.classifier import linear_classifier, loss_and_accuracy
from byol_tf.data import crop
from byol_tf.evaluation import top_k_accuracies
from byol_tf.keras_api import keras
from byol_tf.linear_eval import fit_by_sgd
from byol_tf.model import unpack_views

LEARNING_RATES = (0.01, 0.02, 0.05, 0.1, 0.005)
EPOCHS = (30, 50)


class FineTuned(keras.Model):
    """A pretrained encoder and a linear classifier, both trained by cross-entropy on one view.

    Takes batches as of `byol_tf.pretrain_batches` with "view1" and "label", and SGD.

    Args:
      encoder: a `keras.Model` from images [B, H, W, C] to a vector [B, D]; batch statistics are
        those of the batch, as in pretraining.
      num_classes: int.
      classifier_rate: the classifier's learning rate over the encoder's.
    """

    def __init__(self, encoder, num_classes, classifier_rate=1.0):
        super().__init__(name="fine_tuned")
        self.encoder = encoder
        self.classifier = linear_classifier(encoder.output_shape[-1], num_classes)
        self.classifier_rate = classifier_rate
        self.distribute_reduction_method = "first"  # as in `BYOL.compile`
        self._means = {key: keras.metrics.Mean(key) for key in ("loss", "accuracy")}
        self.built = True

    def train_step(self, batch):
        batch = unpack_views(batch)
        encoder, classifier = (part.trainable_variables for part in (self.encoder, self.classifier))
        with tf.GradientTape() as tape:
            loss, accuracy = loss_and_accuracy(self(batch["view1"], training=True), batch["label"])
            # Keras sums the gradients of the replicas.
            replica_loss = loss / self.distribute_strategy.num_replicas_in_sync
        of_encoder, of_classifier = tape.gradient(replica_loss, (encoder, classifier))
        # The steps of SGD are linear in the gradient.
        of_classifier = [self.classifier_rate * gradient for gradient in of_classifier]
        self.optimizer.apply_gradients(zip([*of_encoder, *of_classifier], [*encoder, *classifier]))
        self._means["loss"].update_state(loss)
        self._means["accuracy"].update_state(accuracy)
        return {key: mean.result() for key, mean in self._means.items()}

    def call(self, images, training=False):
        """Logits of the classes: float [B, H, W, C] -> float32 [B, num_classes]."""
        return self.classifier(self.encoder(images, training=training))

    @property
    def metrics(self):
        return list(self._means.values())


def fine_tune(
    encoder,
    train,
    held_out,
    test,
    *,
    image_size,
    learning_rates=LEARNING_RATES,
    epochs=EPOCHS,
    batch_size=1024,
    classifier_rate=1.0,
    min_crop_area=crop.AREA_RANGE[0],
    seed=0,
    verbose=2,
):
    """Fine-tunes an encoder on labels and judges it (appendix C.2; with all labels as well).

    For each number of epochs and each learning rate, always from the same start, encoder and
    classifier learn by `linear_eval.fit_by_sgd`. Those with the best top-1 accuracy on held-out
    images are judged on the test images; there is no second training on all.

    Args:
      encoder: a `keras.Model` from images [B, H, W, C] to a vector [B, D]; it ends with the weights
        that were chosen.
      train, held_out, test: `byol_tf.data.source.Source`s of different images; of the first two
        every image has a label.
      image_size, min_crop_area, batch_size, seed, verbose: as of `linear_eval.fit_by_sgd`.
      learning_rates: base rates of the encoder.
      epochs: ints.
      classifier_rate: the classifier's rate over the encoder's.

    Returns: a dict of "top1" and "top5", floats in [0, 1], of the test images; "learning_rate" and
      "epochs", those chosen; "held_out_top1", a dict from each number of epochs to a dict from
      each rate, both strings, to the accuracy. What diverged has accuracy 0.
    """
    model = FineTuned(encoder, len(train.class_names), classifier_rate)
    start = model.get_weights()
    accuracies = {}
    for number, rate in itertools.product(epochs, learning_rates):
        if verbose:
            print(f"fine-tuning for {number} epochs at learning rate {rate:g}", flush=True)
        model.set_weights(start)
        fit_by_sgd(
            model,
            train,
            learning_rate=rate,
            image_size=image_size,
            epochs=number,
            batch_size=batch_size,
            min_crop_area=min_crop_area,
            seed=seed,
            verbose=verbose,
        )
        top1, _ = top_k_accuracies(model, held_out, image_size=image_size)
        accuracies[number, rate] = float(top1)
        best = max(accuracies, key=accuracies.get)
        if best == (number, rate):
            weights = model.get_weights()
    model.set_weights(weights)
    top1, top5 = top_k_accuracies(model, test, image_size=image_size)
    return {
        "top1": float(top1),
        "top5": float(top5),
        "epochs": best[0],
        "learning_rate": best[1],
        "held_out_top1": {
            str(number): {f"{rate:g}": accuracies[number, rate] for rate in learning_rates}
            for number in epochs
        },
    }
