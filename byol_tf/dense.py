"""Dense transfer: segmentation and depth on an encoder (appendices D.4 and D.6)."""

import math

import tensorflow as tf

from byol_tf.backbone import resnet_backbone
from byol_tf.classifier import loss_and_accuracy, means_of_known
from byol_tf.distribution import of_all_replicas
from byol_tf.keras_api import keras
from byol_tf.resnet import batch_norm

IGNORED = 255  # in masks: a pixel that does not count, as in VOC
LEARNING_RATES = (1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1)  # of segmentation, to choose from
_TINY = 1e-6  # metres, in place of predictions that are not positive and of a threshold of 0


def segmentation_model(encoder, num_classes, *, frozen=False):
    """The paper's fully convolutional network on a copy of an encoder (appendix D.4).

    The last group with dilation 2 and stride 1, two 3x3 convolutions of 256 channels and
    dilation 6 with batch norm and ReLU, and a 1x1 convolution. The paper does not say how the
    logits, of stride 16, meet the pixels: here they are resized bilinearly.

    Args:
      encoder: from `byol_tf.resnet_encoder`; it stays as it is.
      num_classes: int, with the background.
      frozen: whether only the head learns; the encoder's batch statistics then stay too. The
        paper does not say; as in MoCo, which it follows, the default is to tune all.

    Returns: a `keras.Model` from normalised images [B, H, W, C] of any size to float32 logits
      [B, H, W, num_classes].
    """
    images, x = _last_map(encoder, dilated=True, frozen=frozen)
    for i in range(2):
        x = _conv(x, 256, 3, f"head_{i}", dilation_rate=6)
        x = keras.layers.ReLU(name=f"head_{i}_relu")(batch_norm(x, None, f"head_{i}_bn"))
    logits = keras.layers.Conv2D(num_classes, 1, name="logits")(x)
    return keras.Model(images, _resize_like(logits, images), name="segmentation")


def depth_model(encoder, *, frozen=False):
    """The decoder of Laina et al. 2016 on a copy of an encoder (appendix D.6).

    A 1x1 convolution that halves the channels, four fast up-projections of 512, 256, 128 and 64
    filters, and a 3x3 convolution. The paper names the up-projections; the rest is from Laina's
    code. What that ends in, a ReLU and half the images' resolution, is here no ReLU, which
    can stop to learn, and a bilinear resize.

    Args:
      encoder: from `byol_tf.resnet_encoder`; it stays as it is.
      frozen: as of `segmentation_model`.

    Returns: a `keras.Model` from normalised images [B, H, W, C] of any size to float32 depths
      [B, H, W], in metres; they may be negative where it knows no better.
    """
    images, x = _last_map(encoder, dilated=False, frozen=frozen)
    x = batch_norm(_conv(x, x.shape[-1] // 2, 1, "head"), None, "head_bn")
    for filters in (512, 256, 128, 64):
        x = _up_projection(x, filters, f"up{filters}")
    depth = keras.layers.Conv2D(1, 3, padding="same", name="depth")(x)
    return keras.Model(images, _resize_like(depth, images)[..., 0], name="depth")


def _last_map(encoder, dilated, frozen):
    """The images, a Keras tensor, and C5 of them by a copy of the encoder."""
    backbone = resnet_backbone(encoder, dilated=dilated, keras_only=False)
    backbone.trainable = not frozen
    images = keras.Input(backbone.input_shape[1:], name="images")
    *_, last = backbone(images).values()
    return images, last


def _conv(x, filters, kernel_size, scope, **kwargs):
    return keras.layers.Conv2D(
        filters, kernel_size, padding="same", use_bias=False, name=f"{scope}_conv", **kwargs
    )(x)


def _up_projection(x, filters, scope):
    """Twice the resolution, with a shortcut (Laina et al. 2016, section 3.2).

    Their unpooling with zeros and a 5x5 convolution is a transposed convolution, which like their
    fast version leaves the products with zeros out. It puts values at odd pixels, not at even.
    """

    def up(branch):
        upsampled = keras.layers.Conv2DTranspose(
            filters, 5, 2, padding="same", use_bias=False, name=f"{scope}_{branch}_conv"
        )(x)
        return batch_norm(upsampled, None, f"{scope}_{branch}_bn")

    projected = keras.layers.ReLU(name=f"{scope}_up_relu")(up("up"))
    projected = batch_norm(_conv(projected, filters, 3, scope), None, f"{scope}_bn")
    summed = keras.layers.Add(name=f"{scope}_add")([projected, up("shortcut")])
    return keras.layers.ReLU(name=f"{scope}_relu")(summed)


def _resize_like(x, images):
    return tf.image.resize(x, tf.shape(images)[1:3])


def segmentation_loss(masks, logits):
    """Mean cross-entropy of the pixels that count, a float32 scalar.

    Args: masks: int [B, H, W], `IGNORED` where a pixel does not count; logits: float32
    [B, H, W, num_classes].
    """
    masks = tf.cast(masks, tf.int32)
    return loss_and_accuracy(logits, tf.where(masks == IGNORED, -1, masks))[0]


def mean_iou(num_classes):
    """A Keras metric of masks and logits: intersection over union, averaged over the classes.

    Of all pixels of all images together, as VOC has it; `IGNORED` ones and classes that
    neither are there nor were predicted do not count.
    """
    return keras.metrics.MeanIoU(
        num_classes, name="miou", dtype="float64", ignore_class=IGNORED, sparse_y_pred=False
    )


def berhu(depths, predictions):
    """The reverse Huber loss, averaged over the batch's pixels with a depth: a float32 scalar.

    |r| up to c, (r^2 + c^2) / 2c above, where c is a fifth of the largest |r| of the batch
    (Laina et al. 2016, section 3.3).

    Args: depths: float32 [B, H, W], 0 where there is none; predictions: float32 [B, H, W].
    """
    known = depths > 0
    residuals = tf.where(known, tf.abs(predictions - depths), 0.0)
    largest = tf.reduce_max(of_all_replicas(tf.stop_gradient(tf.reduce_max(residuals))[tf.newaxis]))
    c = tf.maximum(largest / 5.0, _TINY)
    losses = tf.where(residuals <= c, residuals, (residuals**2 + c**2) / (2.0 * c))
    (mean,) = means_of_known(tf.cast(known, tf.float32), losses)
    return mean


class DepthFigures(keras.metrics.Metric):
    """The paper's five figures of depth (table 4b), of all pixels with a depth together.

    "pct1.25", "pct1.25^2" and "pct1.25^3": the part of the pixels where the larger of prediction
    and depth is less than 1.25, 1.25^2 and 1.25^3 times the smaller; "rms": root mean square
    error, in metres; "rel": mean of |prediction - depth| / depth. Takes depths, 0 where there
    is none, and predictions, float32 [B, H, W] in metres. NaN where there is no depth at all.
    """

    def __init__(self, name="depth_figures"):
        super().__init__(name=name, dtype="float64")  # sums of many pixels
        self._sums = self.add_weight("sums", shape=[5], initializer="zeros")
        self._count = self.add_weight("count", initializer="zeros")

    def update_state(self, depths, predictions, sample_weight=None):
        known = depths > 0
        depths, predictions = depths[known], predictions[known]
        errors = predictions - depths
        positive = tf.maximum(predictions, _TINY)
        ratios = tf.maximum(positive / depths, depths / positive)
        figures = [ratios < 1.25, ratios < 1.25**2, ratios < 1.25**3]
        figures += [errors**2, tf.abs(errors) / depths]
        figures = [tf.reduce_sum(tf.cast(figure, tf.float64)) for figure in figures]
        self._sums.assign_add(tf.stack(figures))
        self._count.assign_add(tf.cast(tf.size(depths), tf.float64))

    def result(self):
        *parts, square, rel = tf.unstack(self._sums / self._count)
        named = {f"pct1.25{power}": part for power, part in zip(("", "^2", "^3"), parts)}
        return {**named, "rms": tf.sqrt(square), "rel": rel}


def train(model, batches, loss, *, steps, learning_rate, weight_decay, verbose=2):
    """Trains a dense model by SGD with momentum 0.9 and an L2 loss of its kernels.

    The rate is multiplied by 0.1 at 70 % and at 90 % of the steps: so the paper says of
    segmentation; of depth it names no schedule, and of neither the momentum.

    Args:
      model: from `segmentation_model` or `depth_model`.
      batches: a dataset of at least `steps` pairs, as of `byol_tf.data.dense`.
      loss: `segmentation_loss` or `berhu`.
      steps: int.
      learning_rate, weight_decay: floats; the paper's are 1e-3 to 1e-1 and 1e-4 of segmentation
        with batches of 16, 0.16 and 5e-4 of depth with batches of 256.
      verbose: as of `fit`; an epoch is a tenth of the steps, where they divide by ten.

    Train a model once: the L2 loss stays with it, and would be added again.

    Returns: whether it went well: False if the loss is no longer finite.
    """
    kernels = [weight for weight in model.trainable_weights if weight.shape.rank > 1]
    model.add_loss(lambda: weight_decay * tf.add_n([tf.nn.l2_loss(kernel) for kernel in kernels]))
    rates = [learning_rate, 0.1 * learning_rate, 0.01 * learning_rate]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [math.ceil(0.7 * steps) - 1, math.ceil(0.9 * steps) - 1], rates
    )
    model.compile(keras.optimizers.SGD(schedule, momentum=0.9), loss)
    epochs = 10 if steps % 10 == 0 else 1
    history = model.fit(
        batches,
        epochs=epochs,
        steps_per_epoch=steps // epochs,
        callbacks=[keras.callbacks.TerminateOnNaN()],
        verbose=verbose,
    )
    return math.isfinite(history.history["loss"][-1])


def evaluate(model, batches, metric):
    """The figures of a metric, `mean_iou` or `DepthFigures`: a dict of floats."""
    model.compile(metrics=[metric])
    figures = model.evaluate(batches, return_dict=True, verbose=0)
    del figures["loss"]
    return figures
