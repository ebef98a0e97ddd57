"""The photometric part of BYOL's augmentation (paper, appendix B), a batch at a time.

Flip, colour jitter, grayscale, blur, solarize and normalize. Every random choice comes in
as a uniform draw, so that the whole is a pure function, on the host or on the accelerator.

Images of three channels are RGB. Of any other number, the channels are treated alike, without what
is of colours alone: saturation, hue and grayscale.
"""

import dataclasses
import functools
import itertools

import numpy as np
import tensorflow as tf

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_GRAY_WEIGHTS = (0.2989, 0.5870, 0.1140)
_BLURRED_ROWS = 32  # at once: few enough to save products, enough for fast ones
_TINY = 1e-20  # in place of a chroma of 0, to divide by
NUM_DRAWS = 11


@dataclasses.dataclass(frozen=True)
class ViewAugmentation:
    """How one view is augmented; the defaults are the paper's (table 6)."""

    blur_probability: float
    solarize_probability: float
    flip_probability: float = 0.5
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale_probability: float = 0.2
    blur_sigma: tuple = (0.1, 2.0)
    solarize_threshold: float = 0.5


VIEW_1 = ViewAugmentation(blur_probability=1.0, solarize_probability=0.0)
VIEW_2 = ViewAugmentation(blur_probability=0.1, solarize_probability=0.2)


def _without(**probabilities):
    return tuple(dataclasses.replace(view, **probabilities) for view in (VIEW_1, VIEW_2))


# Both views of the sets of figure 3b. Its last two do not flip: the paper's table of all
# sets has crop alone (59.4 %) apart from crop and flip (60.1 %), the evaluations' views.
_NO_COLOR = {"jitter_probability": 0.0, "grayscale_probability": 0.0}
_CROP_BLUR = {**_NO_COLOR, "solarize_probability": 0.0, "flip_probability": 0.0}
AUGMENTATIONS = {
    "paper": (VIEW_1, VIEW_2),
    "no_grayscale": _without(grayscale_probability=0.0),
    "no_color": _without(**_NO_COLOR),
    "crop_blur": _without(**_CROP_BLUR),
    "crop": _without(**_CROP_BLUR, blur_probability=0.0),
    "crop_flip": _without(**_NO_COLOR, blur_probability=0.0, solarize_probability=0.0),
}


def augment(images, draws, view):
    """Augments and normalizes one view of every image of a batch.

    In between, and in the functions of a single step below, the images are planes: a list
    of the channels, float32 [B, S, S] in [0, 1] each. Steps on whole planes are several
    times faster than on three interleaved channels. Of a batch the images that are due for
    the same step are put together for it; a single image takes its own way, which is faster
    where images are so large that a batch leaves the processor's cache.

    Args:
      images: uint8 or float32 in [0, 1], [B, S, S, C]; RGB where C is 3.
      draws: float32 [B, NUM_DRAWS], uniform in [0, 1).
      view: a `ViewAugmentation`.

    Returns: float32 [B, S, S, C].

    Raises:
      ValueError: if the images are not square, or S or C is not known.
    """
    size, channels = images.shape[1], images.shape[-1]
    if None in (size, channels) or images.shape[2:] != (size, channels):
        raise ValueError(f"images: shape {images.shape}, must be [B, S, S, C], S and C known.")
    flip, jitter, order, *strengths, gray, blur, sigma, solar = tf.unstack(
        draws, NUM_DRAWS, axis=-1
    )
    planes = [_to_float(plane) for plane in tf.unstack(images, axis=-1)]
    planes = _sometimes(flip, view.flip_probability, _flip, planes)
    planes = _sometimes(
        jitter,
        view.jitter_probability,
        lambda planes, *jitter_draws: _jitter(planes, *jitter_draws, view=view),
        planes,
        order,
        *strengths,
    )
    if channels == 3:
        planes = _sometimes(gray, view.grayscale_probability, to_grayscale, planes)
    low, high = view.blur_sigma
    sigma = low + (high - low) * sigma
    planes = _sometimes(blur, view.blur_probability, gaussian_blur, planes, sigma)
    planes = _sometimes(
        solar,
        view.solarize_probability,
        lambda planes: solarize(planes, view.solarize_threshold),
        planes,
    )
    planes = [
        _standardize(plane, mean, std) for plane, mean, std in zip(planes, *_mean_and_std(channels))
    ]
    # Faster than to stack them as the last axis.
    return tf.transpose(tf.stack(planes), [1, 2, 3, 0])


def normalize(images):
    """Subtracts ImageNet's mean and divides by its standard deviation, channel by channel.

    Where the channels are not three, all have the averages over red, green and blue: 0.449 and
    0.226.

    Args: images: uint8 or float in [0, 1], [..., C]. Returns: float32 [..., C].
    """
    mean, std = _mean_and_std(images.shape[-1])
    return _standardize(_to_float(images), tf.constant(mean), tf.constant(std))


def denormalize(images):
    """`normalize` undone, to look at: float [..., C] -> uint8 [..., C], rounded."""
    mean, std = _mean_and_std(images.shape[-1])
    images = images * tf.constant(std) + tf.constant(mean)
    return tf.saturate_cast(tf.round(255.0 * images), tf.uint8)


def adjust_brightness(planes, offset):
    """Adds offset [B] to every channel; see `augment` about planes."""
    offset = _per_image(offset)
    return [tf.clip_by_value(plane + offset, 0.0, 1.0) for plane in planes]


def adjust_contrast(planes, factor):
    """Scales every channel by factor [B] about its own mean over the image."""
    factor = _per_image(factor)
    means = [tf.reduce_mean(plane, [1, 2], keepdims=True) for plane in planes]
    return [
        tf.clip_by_value(plane * factor + mean * (1.0 - factor), 0.0, 1.0)
        for plane, mean in zip(planes, means)
    ]


def adjust_saturation(planes, factor):
    """Scales S of HSV by factor [B] >= 0, at most to 1.

    The distance of every channel from the largest, V, is proportional to S = chroma / V.
    """
    value, chroma = _value_and_chroma(planes)
    factor = tf.minimum(_per_image(factor), value / tf.maximum(chroma, _TINY))
    # Rounded, the largest factor may lead below 0.
    return [tf.maximum(value - (value - plane) * factor, 0.0) for plane in planes]


def adjust_hue(planes, offset):
    """Adds offset [B], of at most half a turn, to H of HSV.

    H, in sixths of a turn, decides which part of the chroma each channel has: all of it
    within one sixth of the channel's own hue, and none from two sixths on. Here all angles
    are times the chroma, to which a division by it would only lead back.
    """
    red, green, blue = planes
    value, chroma = _value_and_chroma(planes)
    two = chroma + chroma
    four = two + two
    hue = tf.where(
        value == red,
        green - blue,
        tf.where(value == green, two + (blue - red), four + (red - green)),
    )
    hue += chroma * (6.0 * _per_image(offset))
    three, seven = two + chroma, four + two + chroma
    shifted = []
    for from_own in (hue, hue - two, hue - four):
        # Of the circle of 6: d - 1, where d = 3 - |x - 3| up to 6, and x - 6 beyond.
        x = tf.abs(from_own)
        part = tf.maximum(two - tf.abs(x - three), x - seven)
        shifted.append(value - tf.maximum(tf.minimum(part, chroma), 0.0))
    return shifted


def to_grayscale(planes):
    """Replaces every channel by their luma."""
    gray = tf.add_n([weight * plane for weight, plane in zip(_GRAY_WEIGHTS, planes)])
    return [gray, gray, gray]


def gaussian_blur(planes, sigma):
    """Blurs with a Gaussian of sigma [B], in pixels.

    The kernel reaches S // 10 // 2 pixels to each side and sums to 1; outside the image
    is black.
    """
    weights = _blur_weights(sigma, radius=planes[0].shape[-1] // 10 // 2)
    for _ in range(2):  # down the columns, then along the rows, which have become columns
        planes = _blur_columns(planes, weights)
    return planes


def solarize(planes, threshold=0.5):
    """Inverts what is not below the threshold."""
    return [tf.where(plane < threshold, plane, 1.0 - plane) for plane in planes]


def _flip(planes):
    """Mirrors left to right."""
    return [tf.reverse(plane, [2]) for plane in planes]


def _jitter(planes, order, brightness, contrast, saturation, hue, view):
    """The four colour jitters, or the first two where there is no RGB, in each image's own order.

    Args: planes: as in `augment`; the others: draws, float32 [B]. Returns: as planes.
    """
    jitters = (
        (adjust_brightness, view.brightness * (2.0 * brightness - 1.0)),
        (adjust_contrast, 1.0 + view.contrast * (2.0 * contrast - 1.0)),
        (adjust_saturation, 1.0 + view.saturation * (2.0 * saturation - 1.0)),
        (adjust_hue, view.hue * (2.0 * hue - 1.0)),
    )
    if len(planes) != 3:
        jitters = jitters[:2]
    orders = list(itertools.permutations(range(len(jitters))))
    orders = tf.gather(tf.constant(orders), tf.cast(order * len(orders), tf.int32))
    for turn in range(len(jitters)):
        if order.shape[0] == 1:
            choices = [functools.partial(adjust, planes, amount) for adjust, amount in jitters]
            planes = tf.switch_case(orders[0, turn], choices)
            continue
        # The images that are due for the same jitter get it together.
        groups = _groups(orders[:, turn], len(jitters))
        parts = [
            adjust(_pick(planes, rows), tf.gather(amount, rows))
            for rows, (adjust, amount) in zip(groups, jitters)
        ]
        planes = _put_together(groups, parts, planes)
    return planes


def _sometimes(draw, probability, function, planes, *parameters):
    """Applies a function to the images whose draw is less than the probability.

    Args: draw: float32 [B]; function: of planes and parameters; planes: list of [B, ...];
    parameters: tensors [B]. Returns: as planes.
    """
    if probability <= 0.0:
        return planes
    if probability >= 1.0:
        return function(planes, *parameters)
    if draw.shape[0] == 1:
        return tf.cond(
            draw[0] < probability, lambda: function(planes, *parameters), lambda: list(planes)
        )
    groups = _groups(tf.cast(draw < probability, tf.int32), 2)
    left_out, chosen = groups
    changed = function(_pick(planes, chosen), *_pick(parameters, chosen))
    return _put_together(groups, [_pick(planes, left_out), changed], planes)


def _groups(labels, count):
    """For each of `count` labels the positions in labels, int32 [B], that have it."""
    return tf.dynamic_partition(tf.range(tf.shape(labels)[0]), labels, count)


def _pick(tensors, rows):
    return [tf.gather(tensor, rows) for tensor in tensors]


def _put_together(groups, parts, like):
    """Undoes `_groups` and `_pick`: one list of tensors a group -> tensors shaped as in like."""
    return [
        tf.ensure_shape(tf.dynamic_stitch(groups, pieces), tensor.shape)
        for *pieces, tensor in zip(*parts, like)
    ]


def _value_and_chroma(planes):
    """V of HSV, and how far it is above the smallest channel; float32 [B, S, S] each."""
    red, green, blue = planes
    value = tf.maximum(tf.maximum(red, green), blue)
    return value, value - tf.minimum(tf.minimum(red, green), blue)


def _blur_columns(planes, weights):
    """Blurs down the columns and transposes: planes [B, S, S] -> the same.

    By products of matrices, some rows at a time: those farther away have no part in them.
    """
    size, count = planes[0].shape[-1], len(planes)
    radius = (weights.shape[-1] - _BLURRED_ROWS) // 2
    lines = tf.reshape(tf.stack(planes, axis=2), [-1, size, count * size])
    one = weights.shape[0] == 1
    if one:  # rows are then taken without copying
        lines, weights = lines[0], weights[0]
    blurred = []
    for start in range(0, size, _BLURRED_ROWS):
        stop = min(start + _BLURRED_ROWS, size)
        first, last = max(start - radius, 0), min(stop + radius, size)
        reach = slice(first - start + radius, last - start + radius)
        own = weights[..., : stop - start, reach]
        blurred.append(tf.matmul(own, lines[..., first:last, :]))
    # Rounded, the weights may sum to more than 1.
    lines = tf.linalg.matrix_transpose(tf.minimum(tf.concat(blurred, -2), 1.0))
    if one:
        return tf.unstack(tf.reshape(lines, [count, 1, size, size]))
    return tf.unstack(tf.reshape(lines, [-1, count, size, size]), axis=1)


def _blur_weights(sigma, radius):
    """float32 [B, R, R + 2 radius]: of the pixels around R rows in each of them; R rows at once."""
    sigma = tf.maximum(sigma, 1e-3)  # 0 would be divided by; this too leaves all as it is
    scale = -0.5 / tf.square(sigma)[:, tf.newaxis]
    taps = tf.exp(scale * tf.square(tf.range(-radius, radius + 1, dtype=tf.float32)))
    taps /= tf.reduce_sum(taps, -1, keepdims=True)
    tap = np.arange(_BLURRED_ROWS + 2 * radius) - np.arange(_BLURRED_ROWS)[:, np.newaxis]
    zero = 2 * radius + 1  # one more tap
    tap = np.where((tap >= 0) & (tap < zero), tap, zero)
    return tf.gather(tf.pad(taps, [[0, 0], [0, 1]]), tap, axis=-1)


def _to_float(images):
    if images.dtype == tf.uint8:
        return tf.cast(images, tf.float32) / 255.0
    return tf.cast(images, tf.float32)


def _mean_and_std(channels):
    """What `normalize` takes: two tuples of a value a channel, of pixels in [0, 1]."""
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return tuple((sum(of_rgb) / 3,) * channels for of_rgb in (IMAGENET_MEAN, IMAGENET_STD))


def _standardize(values, mean, std):
    return (values - mean) / std


def _per_image(values):
    return values[:, tf.newaxis, tf.newaxis]
