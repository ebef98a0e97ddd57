"""The paper's encoder (section 3.3): a ResNet v1 that maps images to a representation."""

import tensorflow as tf

from byol_tf.batch_norm import SyncBatchNormalization
from byol_tf.keras_api import keras

BLOCKS_PER_GROUP = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
    "resnet200": (3, 24, 36, 3),
}
STEMS = ("imagenet", "small")
BASIC = ("resnet18", "resnet34")  # two 3x3 convolutions a block; the others are bottlenecks
# With fewer the gradient of a 1x1 kernel of stride 2 writes where it may not, at odd batches: on
# CPUs, by TensorFlow 2.15 and 2.21. So the stride is taken before.
_LEAST_CHANNELS = 16


def kernel_initializer():
    """A normal of stddev 1/sqrt(fan_in) cut off at two sigma, as in DeepMind's reference.

    Keras' VarianceScaling makes up for the variance that the cut takes away (it divides the
    stddev by 0.8796...); haiku does not, so the scale takes that back.
    """
    return keras.initializers.VarianceScaling(0.87962566103423978**2, "fan_in", "truncated_normal")


def batch_norm(inputs, synchronized, name):
    """Batch normalisation with the paper's momentum 0.9 and epsilon 1e-5.

    `synchronized` shares the batch statistics across replicas; None: where the current
    strategy has more than one.
    """
    if synchronized is None:
        synchronized = tf.distribute.get_strategy().num_replicas_in_sync > 1
    layer = SyncBatchNormalization if synchronized else keras.layers.BatchNormalization
    return layer(momentum=0.9, epsilon=1e-5, name=name)(inputs)


def resnet_encoder(
    name="resnet50",
    *,
    width_multiplier=1.0,
    stem="imagenet",
    image_size=None,
    channels=3,
    synchronized_batch_norm=None,
):
    """Builds a ResNet-18/34/50/101/152/200 without its classifier.

    Version 1 (post-activation), the stride of a bottleneck on its 3x3 convolution, no
    convolution bias, a projection shortcut in the first block of every group.

    Args:
      name: one of `BLOCKS_PER_GROUP`.
      width_multiplier: scales every channel count; 1, 2 and 4 in the paper (table 2),
        fractions for small machines.
      stem: "imagenet" (7x7 convolution of stride 2, 3x3 max-pool of stride 2) or
        "small" (3x3 convolution of stride 1) for images of about 32 pixels.
      image_size: side of the square input in pixels, or None for any.
      channels: of the images; 3 for RGB.
      synchronized_batch_norm: share batch statistics across replicas; by default where the
        current strategy has more than one.

    Returns:
      A `keras.Model` from images float [B, image_size, image_size, channels], normalised as
      `augment.normalize` does, to the representation [B, D]; D is
      512 * width_multiplier for ResNet-18/34 and 2048 * width_multiplier otherwise.

    Raises:
      ValueError: for an unknown name or stem, or a width that leaves no channel.
    """
    if name not in BLOCKS_PER_GROUP:
        raise ValueError(f"encoder={name!r}: choose one of {', '.join(BLOCKS_PER_GROUP)}.")
    if stem not in STEMS:
        raise ValueError(f"stem={stem!r}: choose one of {', '.join(STEMS)}.")
    if int(64 * width_multiplier) < 1:
        raise ValueError(f"width_multiplier={width_multiplier}: must be at least 1/64.")

    return resnet(
        BLOCKS_PER_GROUP[name],
        [int(64 * 2**group * width_multiplier) for group in range(4)],
        stem_channels=int(64 * width_multiplier),
        bottleneck=name not in BASIC,
        stem=stem,
        image_size=image_size,
        channels=channels,
        synchronized_batch_norm=synchronized_batch_norm,
        name=name,
    )


def resnet(
    blocks_per_group,
    channels_per_group,
    *,
    stem_channels=64,
    bottleneck=True,
    stem="imagenet",
    image_size=None,
    channels=3,
    synchronized_batch_norm=None,
    name="resnet",
):
    """Builds a ResNet of any size; `resnet_encoder` chooses the paper's.

    Args:
      blocks_per_group: how many blocks each group has; the first group has stride 1, the
        others 2.
      channels_per_group: channels of each group's 3x3 convolutions.
      stem_channels: channels of the first convolution.
      bottleneck: whether a block has a 1x1, a 3x3 and a 1x1 convolution, the last with four
        times the channels, rather than two 3x3 convolutions.
      stem, image_size, channels, synchronized_batch_norm: as in `resnet_encoder`.

    Returns:
      A `keras.Model` from images float [B, image_size, image_size, channels] to float [B, D].
    """

    def conv(x, filters, kernel_size, strides, scope):
        if (kernel_size, strides) == (1, 2) and x.shape[-1] < _LEAST_CHANNELS:
            x = keras.layers.MaxPool2D(1, strides, name=f"{scope}_stride")(x)
            strides = 1
        return keras.layers.Conv2D(
            filters,
            kernel_size,
            strides,
            padding="same",
            use_bias=False,
            kernel_initializer=kernel_initializer(),
            name=f"{scope}_conv",
        )(x)

    def conv_bn(x, filters, kernel_size, strides, scope):
        x = conv(x, filters, kernel_size, strides, scope)
        return batch_norm(x, synchronized_batch_norm, f"{scope}_bn")

    def relu(x, scope):
        return keras.layers.ReLU(name=f"{scope}_relu")(x)

    def block(x, channels, strides, project, scope):
        out_channels = 4 * channels if bottleneck else channels
        shortcut = conv_bn(x, out_channels, 1, strides, f"{scope}_shortcut") if project else x
        if bottleneck:
            layers = [(channels, 1, 1), (channels, 3, strides), (out_channels, 1, 1)]
        else:
            layers = [(channels, 3, strides), (channels, 3, 1)]
        for i, (filters, kernel_size, stride) in enumerate(layers):
            x = conv_bn(x, filters, kernel_size, stride, f"{scope}_{i}")
            if i < len(layers) - 1:
                x = relu(x, f"{scope}_{i}")
        return relu(keras.layers.Add(name=f"{scope}_add")([x, shortcut]), scope)

    images = keras.Input((image_size, image_size, channels), name="images")
    if stem == "imagenet":
        x = relu(conv_bn(images, stem_channels, 7, 2, "stem"), "stem")
        x = keras.layers.MaxPool2D(3, 2, padding="same", name="stem_pool")(x)
    else:
        x = relu(conv_bn(images, stem_channels, 3, 1, "stem"), "stem")
    for group, (blocks, channels) in enumerate(zip(blocks_per_group, channels_per_group)):
        for i in range(blocks):
            strides = 2 if i == 0 and group > 0 else 1
            x = block(x, channels, strides, project=i == 0, scope=f"group{group}_block{i}")
    x = keras.layers.GlobalAveragePooling2D(name="representation")(x)
    return keras.Model(images, x, name=name)


def mlp(name, input_size, sizes, *, synchronized_batch_norm=None):
    """The projector g and the predictor q of the paper: Dense - BN - ReLU - Dense.

    Every hidden layer has a bias, the last layer none (appendix C.1, DeepMind's reference).
    Maps float [B, input_size] to [B, sizes[-1]]; the other sizes are the hidden layers'.
    """
    x = inputs = keras.Input((input_size,), name=f"{name}_inputs")
    *hidden_sizes, output_size = sizes
    for i, size in enumerate(hidden_sizes):
        scope = name if i == 0 else f"{name}_{i}"
        x = keras.layers.Dense(
            size, kernel_initializer=kernel_initializer(), name=f"{scope}_hidden"
        )(x)
        x = batch_norm(x, synchronized_batch_norm, f"{scope}_bn")
        x = keras.layers.ReLU(name=f"{scope}_relu")(x)
    x = keras.layers.Dense(
        output_size,
        use_bias=False,
        kernel_initializer=kernel_initializer(),
        name=f"{name}_outputs",
    )(x)
    return keras.Model(inputs, x, name=name)
