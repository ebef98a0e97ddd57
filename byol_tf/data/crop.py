"""Where a view is cut: the paper's random resized crop, and the centre crop of evaluation."""

import math

import numpy as np
import tensorflow as tf

AREA_RANGE = (0.08, 1.0)  # of the image's area (paper, appendix B)
ASPECT_RANGE = (3 / 4, 4 / 3)  # width over height, drawn logarithmically
CENTRE_FRACTION = 224 / 256  # of the shorter side, for evaluation (appendix C.1)
_ATTEMPTS = 10
NUM_DRAWS = 2 * _ATTEMPTS + 2


def random_crop_boxes(heights, widths, draws, area_range=AREA_RANGE):
    """Draws one crop an image: area uniform, aspect ratio log-uniform (appendix B).

    Ten (area, aspect) pairs are drawn and the first that fits is taken, at a uniform
    place; where none fits the largest centred square is taken. A pure function of its
    arguments, so a run can be repeated and resumed.

    Args:
      heights, widths: int [...], of the images, in pixels.
      draws: float32 [..., NUM_DRAWS], uniform in [0, 1).
      area_range: smallest and largest part of the image's area.

    Returns:
      int32 [..., 4]: top, left, height and width of the crop, in pixels.
    """
    height, width = (tf.cast(side, tf.float32)[..., tf.newaxis] for side in (heights, widths))
    smallest, largest = area_range
    areas = height * width * (smallest + (largest - smallest) * draws[..., :_ATTEMPTS])
    low, high = (math.log(ratio) for ratio in ASPECT_RANGE)
    aspects = tf.exp(low + (high - low) * draws[..., _ATTEMPTS : 2 * _ATTEMPTS])
    crop_heights = tf.round(tf.sqrt(areas / aspects))
    crop_widths = tf.round(tf.sqrt(areas * aspects))

    fits = (
        (crop_heights >= 1) & (crop_heights <= height) & (crop_widths >= 1) & (crop_widths <= width)
    )
    # A last pair that always fits, so that argmax finds the first that does.
    square = tf.minimum(height, width)
    fits = tf.concat([fits, tf.ones_like(fits[..., :1])], -1)
    first = tf.argmax(tf.cast(fits, tf.int32), -1)[..., tf.newaxis]
    crop_height = tf.gather(tf.concat([crop_heights, square], -1), first, batch_dims=-1)
    crop_width = tf.gather(tf.concat([crop_widths, square], -1), first, batch_dims=-1)

    fell_back = first == _ATTEMPTS
    place_y, place_x = draws[..., -2:-1], draws[..., -1:]
    top = tf.floor((height - crop_height + 1) * tf.where(fell_back, 0.5, place_y))
    left = tf.floor((width - crop_width + 1) * tf.where(fell_back, 0.5, place_x))
    return tf.cast(tf.concat([top, left, crop_height, crop_width], -1), tf.int32)


def enclosing_box(boxes):
    """The smallest box, int32 [4], that holds all of boxes, int32 [N, 4]."""
    top_left = tf.reduce_min(boxes[:, :2], 0)
    bottom_right = tf.reduce_max(boxes[:, :2] + boxes[:, 2:], 0)
    return tf.concat([top_left, bottom_right - top_left], 0)


def cut(image, box, corner=0):
    """Cuts a box, int32 [4], out of an image, [H, W, C], whose top left corner is at `corner`."""
    start = tf.pad(box[:2] - corner, [[0, 1]])
    return tf.slice(image, start, tf.pad(box[2:], [[0, 1]], constant_values=-1))  # -1: all


def centre_crop_box(height, width):
    """The centred square of 224/256 of the shorter side (appendix C.1).

    Args: height, width: int32 scalars, in pixels. Returns: int32 [4], as
    `random_crop_boxes`.
    """
    shorter = tf.minimum(height, width)
    side = tf.cast(tf.round(tf.cast(shorter, tf.float32) * CENTRE_FRACTION), tf.int32)
    side = tf.maximum(side, 1)
    return tf.stack([(height - side) // 2, (width - side) // 2, side, side])


def resize(images, size):
    """Bicubic resize of uint8 [..., H, W, C] to uint8 [..., size, size, C], overshoots clipped."""
    images = tf.image.resize(images, [size, size], "bicubic")
    return tf.cast(tf.round(tf.clip_by_value(images, 0.0, 255.0)), tf.uint8)


def centre_crop_and_resize(images, size):
    """The evaluation's view: uint8 [..., H, W, C] of any size -> uint8 [..., size, size, C]."""
    shape = tf.shape(images)
    box = centre_crop_box(shape[-3], shape[-2])
    top, left, height, width = tf.unstack(box)
    return resize(images[..., top : top + height, left : left + width, :], size)


def crop_and_resize(images, boxes, size):
    """Cuts a box from each of equally large images and resizes it, all in two matmuls.

    The same result as slicing and `resize` (a bicubic resize is linear and separable, so a
    crop with its resize is one [size, H] matrix on the left and one [W, size] on the right),
    many times faster for small images.

    Args:
      images: uint8 [B, H, W, C].
      boxes: int32 [B, 4], as `random_crop_boxes`.
      size: side of the result, in pixels.

    Returns: uint8 [B, size, size, C].
    """
    height, width, channels = images.shape[1:]
    rows = _bicubic_matrix(boxes[:, 0], boxes[:, 2], height, size)  # [B, size, H]
    columns = _bicubic_matrix(boxes[:, 1], boxes[:, 3], width, size)  # [B, size, W]
    pixels = tf.cast(images, tf.float32)
    pixels = tf.matmul(rows, tf.reshape(pixels, [-1, height, width * channels]))
    pixels = tf.transpose(tf.reshape(pixels, [-1, size, width, channels]), [0, 2, 1, 3])
    pixels = tf.matmul(columns, tf.reshape(pixels, [-1, width, size * channels]))
    pixels = tf.transpose(tf.reshape(pixels, [-1, size, size, channels]), [0, 2, 1, 3])
    return tf.cast(tf.round(tf.clip_by_value(pixels, 0.0, 255.0)), tf.uint8)


def _bicubic_matrix(starts, lengths, full_length, size):
    """float32 [B, size, full_length]: weights of every input pixel in every output pixel."""
    starts, lengths = (tf.cast(t, tf.float32)[:, tf.newaxis, tf.newaxis] for t in (starts, lengths))
    outputs = tf.range(size, dtype=tf.float32)[:, tf.newaxis]
    inputs = np.arange(full_length, dtype=np.float32)
    centres = starts + (outputs + 0.5) * lengths / size - 0.5
    weights = _keys_kernel(tf.abs(inputs - centres))
    inside = (inputs >= starts) & (inputs < starts + lengths)
    weights = tf.where(inside, weights, 0.0)
    return weights / tf.reduce_sum(weights, -1, keepdims=True)


def _keys_kernel(distance):
    """Keys' cubic convolution kernel with a = -0.5, as `tf.image.resize` uses it."""
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    return tf.where(distance < 1.0, near, tf.where(distance < 2.0, far, 0.0))
