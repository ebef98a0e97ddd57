"""Crops: where they are drawn, and what is cut and resized, against slicing and Pillow."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from byol_tf.data import crop

COUNT = 20_000
# `tf.image.resize` has its weights from a table of 1024 steps a pixel; in levels of 0 to 255.
TABLE_ERROR = 0.25


def make_boxes(height, width, count=COUNT, seed=0, **kwargs):
    """Random boxes of images of one size: int64 [4, count]."""
    draws = tf.random.stateless_uniform([count, crop.NUM_DRAWS], [seed, 2])
    boxes = crop.random_crop_boxes(
        tf.fill([count], height), tf.fill([count], width), draws, **kwargs
    )
    assert boxes.dtype == tf.int32
    return boxes.numpy().astype(np.int64).T


def pictures(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def assert_uniform(values, low, high):
    """Kolmogorov's test, at a level of 0.0007, and that the range is kept."""
    assert low - 1e-3 * (high - low) <= values.min() and values.max() <= high + 1e-3 * (high - low)
    expected = np.linspace(0, 1, len(values))
    distance = np.abs((np.sort(values) - low) / (high - low) - expected).max()
    assert distance < 2 / np.sqrt(len(values)), distance


def assert_inside(boxes, height, width):
    top, left, crop_height, crop_width = boxes
    assert min(top.min(), left.min()) >= 0 and min(crop_height.min(), crop_width.min()) >= 1
    assert (top + crop_height <= height).all() and (left + crop_width <= width).all()


@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (500, 375), (32, 32), (7, 9), (3, 2), (96, 40), (4000, 6000)]
)
def test_boxes_are_inside_and_of_the_papers_sizes(height, width):
    boxes = make_boxes(height, width, 5000)
    assert_inside(boxes, height, width)
    _, _, h, w = boxes
    # Both sides are rounded, each by half a pixel at most.
    area = height * width * (1 + 1e-6)
    assert ((h + 0.5) * (w + 0.5) * (1 + 1e-6) >= 0.08 * height * width).all()
    assert ((h - 0.5) * (w - 0.5) <= area).all()
    # Only the fallback may be outside the range of aspects, and it is a square.
    assert ((w + 0.5) / (h - 0.5) >= 0.75 * (1 - 1e-6)).all()
    assert ((w - 0.5) / (h + 0.5) <= 4 / 3 * (1 + 1e-6)).all()


def test_area_is_uniform_and_aspect_log_uniform():
    """Exactly so below 3/4 of the area, where every shape fits into a square."""
    size = 20_000
    boxes = make_boxes(size, size)
    assert_inside(boxes, size, size)
    _, _, h, w = boxes
    area, aspect = h * w / size**2, np.log(w / h)
    small = area < 0.75
    limit = np.log(4 / 3)
    assert_uniform(area[small], 0.08, 0.75)
    assert_uniform(aspect[small], -limit, limit)
    assert abs(np.corrcoef(area[small], aspect[small])[0, 1]) < 4 / np.sqrt(small.sum())
    # Of the pairs that do not fit another is drawn: of those that do, the part that is small.
    share = 0.67 * limit / (1 - np.exp(-limit) - 0.08 * limit)
    assert abs(small.mean() - share) < 4 * np.sqrt(share * (1 - share) / COUNT)
    assert area.max() > 0.98


def test_place_is_uniform():
    size = 20_000
    top, left, h, w = make_boxes(size, size)
    down, right = (top + 0.5) / (size - h + 1), (left + 0.5) / (size - w + 1)
    assert_uniform(down, 0, 1)
    assert_uniform(right, 0, 1)
    pairs = np.corrcoef([down, right, h * w, np.log(w / h)]) - np.eye(4)
    assert np.abs(pairs[:2]).max() < 4 / np.sqrt(COUNT)
    # Every place is as likely, the first and the last too.
    top, left, h, w = make_boxes(6, 6)
    for start, length in ((top, h), (left, w)):
        places = start[length == 4]
        counts = np.bincount(places, minlength=3) / len(places)
        np.testing.assert_allclose(counts, 1 / 3, atol=4 * np.sqrt(2 / 9 / len(places)))


def test_area_range_is_heeded():
    _, _, h, w = make_boxes(10_000, 10_000, area_range=(0.3, 0.5))
    assert_uniform(h * w / 1e8, 0.3, 0.5)


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (3, 500), (1, 40)])
def test_centred_square_where_nothing_fits(height, width):
    boxes = make_boxes(height, width, 100)
    assert_inside(boxes, height, width)
    top, left, h, w = boxes
    assert (h == min(height, width)).all() and (w == h).all()
    assert (np.abs(2 * top + h - height) <= 1).all() and (np.abs(2 * left + w - width) <= 1).all()


def test_one_pixel():
    np.testing.assert_array_equal(make_boxes(1, 1, 200).T, np.tile([0, 0, 1, 1], (200, 1)))


def test_boxes_are_inside_for_the_ends_of_the_draws():
    for draw in (0.0, np.nextafter(np.float32(1), np.float32(0))):
        for height, width in ((375, 500), (1, 1), (33, 32), (3001, 4999)):
            draws = tf.fill([crop.NUM_DRAWS], np.float32(draw))
            box = crop.random_crop_boxes(height, width, draws).numpy()
            assert box.shape == (4,)
            assert_inside(box, height, width)


def test_sizes_of_a_batch_do_not_mix():
    draws = tf.random.stateless_uniform([3, 2, crop.NUM_DRAWS], [0, 0])
    heights = np.array([[30, 31], [400, 40], [10, 1]])
    widths = np.array([[40, 30], [300, 500], [1000, 1]])
    together = crop.random_crop_boxes(heights, widths, draws)
    for i in range(3):
        for j in range(2):
            alone = crop.random_crop_boxes(heights[i, j], widths[i, j], draws[i, j])
            np.testing.assert_array_equal(together[i, j], alone)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(32, 32, 32), (32, 32, 12), (24, 40, 64), (48, 30, 17), (5, 4, 9)],
)
def test_crop_and_resize_is_slicing_and_resize(height, width, size):
    boxes = make_boxes(height, width, 12).T
    corner = [height - 3, width - 2, 3, 2]
    boxes = np.concatenate([boxes, [[0, 0, height, width], corner, [1, 2, 1, 1]]])
    images = pictures(len(boxes), height, width)
    result = crop.crop_and_resize(tf.constant(images), tf.constant(boxes, tf.int32), size)
    assert result.dtype == tf.uint8 and result.shape == (len(boxes), size, size, 3)
    for image, (top, left, h, w), value in zip(images, boxes, result.numpy()):
        cut = image[top : top + h, left : left + w]
        expected = tf.image.resize(cut, [size, size], "bicubic").numpy().clip(0, 255)
        np.testing.assert_allclose(value, expected, atol=0.5 + TABLE_ERROR)
        np.testing.assert_allclose(crop.resize(cut, size), expected, atol=0.5 + 1e-3)


def test_a_box_of_the_size_asked_for_is_cut_exactly():
    images = pictures(2, 20, 30)
    boxes = tf.constant([[3, 4, 16, 16], [4, 14, 16, 16]])
    result = crop.crop_and_resize(tf.constant(images), boxes, 16)
    np.testing.assert_array_equal(result[0], images[0, 3:19, 4:20])
    np.testing.assert_array_equal(result[1], images[1, 4:20, 14:30])


def pillow_resize(image, size):
    """In floats, as otherwise Pillow also clips between the two directions."""
    channels = [Image.fromarray(np.float32(channel)) for channel in np.moveaxis(image, -1, 0)]
    resized = [channel.resize((size, size), Image.Resampling.BICUBIC) for channel in channels]
    return np.stack(resized, -1).clip(0, 255)


def test_resize_is_bicubic_and_its_overshoots_are_clipped():
    """Pillow's bicubic is the same where it enlarges: where it reduces it also smooths."""
    image = np.where(pictures(1, 20, 28)[0] < 128, 0, 255).astype(np.uint8)
    expected = pillow_resize(image, 50)
    resized = crop.resize(image, 50)
    assert resized.dtype == tf.uint8
    np.testing.assert_allclose(resized, expected, atol=0.5 + TABLE_ERROR)
    boxes = tf.constant([[0, 0, 20, 28]])
    cut = crop.crop_and_resize(tf.constant(image[np.newaxis]), boxes, 50)[0]
    np.testing.assert_allclose(cut, expected, atol=0.5 + 1e-2)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (256, 256, [16, 16, 224, 224]),
        (256, 300, [16, 38, 224, 224]),
        (300, 256, [38, 16, 224, 224]),
        (375, 500, [23, 86, 328, 328]),
        (32, 32, [2, 2, 28, 28]),
        (2, 9, [0, 3, 2, 2]),
        (1, 1, [0, 0, 1, 1]),
    ],
)
def test_centre_crop(height, width, box):
    np.testing.assert_array_equal(crop.centre_crop_box(height, width), box)
    top, left, side, _ = box
    images = pictures(2, height, width)
    expected = crop.resize(images[:, top : top + side, left : left + side], 11)
    result = crop.centre_crop_and_resize(images, 11)
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(crop.centre_crop_and_resize(images[0], 11), expected[0])
