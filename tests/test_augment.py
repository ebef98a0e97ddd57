"""Photometric augmentation: every step against an oracle, and how often and how strong it is."""

import colorsys
import dataclasses
import itertools
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from byol_tf.data import augment
from byol_tf.data.augment import VIEW_1, VIEW_2
from byol_tf.data.views import augment_batch

REFERENCE = np.load(pathlib.Path(__file__).parent / "reference" / "augment_ops.npz")
ADJUSTMENTS = {
    "brightness": augment.adjust_brightness,
    "contrast": augment.adjust_contrast,
    "saturation": augment.adjust_saturation,
    "hue": augment.adjust_hue,
}
ORDERS = list(itertools.permutations(range(4)))
COLUMNS = [
    *("flip", "jitter", "order", "brightness", "contrast", "saturation", "hue"),
    *("gray", "blur", "sigma", "solarize"),
]
PROBABILITIES = [
    field.name
    for field in dataclasses.fields(augment.ViewAugmentation)
    if field.name.endswith("_probability")
]
COUNT = 4000  # images, where shares are counted


def pictures(count=3, size=32, seed=0):
    """Float images of random colours, the first with all that is special to HSV."""
    images = np.random.default_rng(seed).uniform(size=(count, size, size, 3)).astype(np.float32)
    special = [*itertools.product([0.0, 0.5, 1.0], repeat=3), [0.3, 0.3, 0.3 + 1e-7]]
    images[0].reshape(-1, 3)[: len(special)] = special
    return images


def make_draws(count, seed=0, **fixed):
    draws = tf.random.stateless_uniform([count, augment.NUM_DRAWS], [seed, 1]).numpy()
    for name, values in fixed.items():
        draws[:, COLUMNS.index(name)] = values
    return draws


def only(view, *kept, **changes):
    """The view with all that happens at random left out, but for `kept` and `changes`."""
    off = {name: 0.0 for name in PROBABILITIES if name not in kept}
    return dataclasses.replace(view, **{**off, **changes})


def by_planes(function, images, *parameters):
    """Calls a function of planes with [B, S, S, 3], the parameters the same for all images."""
    parameters = [tf.fill([len(images)], np.float32(value)) for value in parameters]
    planes = tf.unstack(tf.constant(images, tf.float32), axis=-1)
    return tf.stack(function(planes, *parameters), -1).numpy()


def augmented(images, draws, view):
    """What `augment` gives, brought back to [0, 1]."""
    return augment.augment(images, draws, view) * augment.IMAGENET_STD + augment.IMAGENET_MEAN


def tiled(image, count=COUNT):
    return np.tile(np.asarray(image, np.float32), (count, 1, 1, 1))


def as_normalized(images):
    return (images - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])


# Oracles in NumPy, for one image in float64.


def numpy_hsv(image, change):
    def pixel(*rgb):
        return colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*rgb)))

    return np.stack(np.vectorize(pixel)(*np.moveaxis(image, -1, 0)), -1)


def numpy_adjust(name, image, value):
    if name == "brightness":
        return np.clip(image + value, 0, 1)
    if name == "contrast":
        mean = image.mean((0, 1))
        return np.clip(mean + (image - mean) * value, 0, 1)
    if name == "saturation":
        return numpy_hsv(image, lambda h, s, v: (h, min(s * value, 1), v))
    return numpy_hsv(image, lambda h, s, v: ((h + value) % 1, s, v))


def numpy_blur(image, sigma):
    radius = image.shape[0] // 10 // 2
    kernel = np.exp(-(np.arange(-radius, radius + 1.0) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (0, 1):
        image = np.apply_along_axis(np.convolve, axis, image, kernel, "same")
    return image


def numpy_gray(image):
    return np.repeat(image @ [[0.2989], [0.5870], [0.1140]], 3, -1)


def assert_uniform(values, low, high):
    """Kolmogorov's test, at a level of 0.0007, and that the range is kept."""
    assert low - 1e-5 <= values.min() and values.max() <= high + 1e-5
    expected = np.linspace(0, 1, len(values))
    distance = np.abs((np.sort(values) - low) / (high - low) - expected).max()
    assert distance < 2 / np.sqrt(len(values)), distance


def assert_share(happened, probability):
    sigma = np.sqrt(probability * (1 - probability) / len(happened))
    assert abs(np.mean(happened) - probability) <= 4 * sigma, np.mean(happened)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("brightness", [-0.4, 0.0, 0.3, 2.0]),
        ("contrast", [0.0, 0.6, 1.0, 1.4]),
        ("saturation", [0.0, 0.8, 1.0, 1.2, 3.0]),
        ("hue", [-0.5, -0.1, 0.0, 0.07, 0.1, 0.5]),
    ],
)
def test_jitters(name, values):
    images = pictures(size=12)
    of_tensorflow = getattr(tf.image, f"adjust_{name}")
    for value in values:
        result = by_planes(ADJUSTMENTS[name], images, value)
        expected = [numpy_adjust(name, image, value) for image in images.astype(np.float64)]
        np.testing.assert_allclose(result, expected, atol=2e-6)
        expected = np.clip(of_tensorflow(images, value), 0, 1)
        np.testing.assert_allclose(result, expected, atol=2e-6)


def test_each_image_has_its_own_strength():
    images, values = pictures(), np.float32([-0.1, 0.05, 0.1])
    planes = tf.unstack(images, axis=-1)
    for name, function in ADJUSTMENTS.items():
        amounts = values + (name in ("contrast", "saturation"))
        together = tf.stack(function(planes, tf.constant(amounts)), -1)
        for image, amount, result in zip(images, amounts, together):
            alone = by_planes(function, image[np.newaxis], amount)[0]
            np.testing.assert_allclose(result, alone, atol=1e-6)


def test_grayscale():
    images = pictures()
    result = by_planes(augment.to_grayscale, images)
    np.testing.assert_allclose(
        result, np.repeat(tf.image.rgb_to_grayscale(images), 3, -1), atol=1e-6
    )
    np.testing.assert_allclose(result, numpy_gray(images), atol=1e-6)


def test_solarize():
    levels = np.float32([0.0, 0.2, 0.4999, 0.5, 0.75, 1.0])
    images = np.broadcast_to(levels[:, np.newaxis, np.newaxis, np.newaxis], (6, 4, 4, 3))
    result = by_planes(augment.solarize, images)
    np.testing.assert_allclose(result[:, 0, 0, 0], [0.0, 0.2, 0.4999, 0.5, 0.25, 0.0], atol=1e-7)
    lower = by_planes(lambda planes: augment.solarize(planes, 0.1), images)
    np.testing.assert_allclose(lower[:, 0, 0, 0], [0.0, 0.8, 0.5001, 0.5, 0.25, 0.0], atol=1e-7)


@pytest.mark.parametrize("size", [8, 20, 32, 59, 96])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur(size, sigma):
    images = pictures(2, size)
    result = by_planes(augment.gaussian_blur, images, sigma)
    expected = [numpy_blur(image, sigma) for image in images.astype(np.float64)]
    np.testing.assert_allclose(result, expected, atol=2e-6)


def test_a_sigma_of_0_leaves_all_as_it_is():
    images = pictures(2)
    np.testing.assert_array_equal(by_planes(augment.gaussian_blur, images, 0.0), images)


@pytest.mark.parametrize(("size", "width"), [(32, 3), (96, 9), (224, 23)])
def test_blur_as_in_tensorflow_addons(size, width):
    filters = pytest.importorskip("tensorflow_addons").image
    images = pictures(2, size)
    for sigma in (0.3, 2.0):
        expected = filters.gaussian_filter2d(images, (width, width), sigma, padding="CONSTANT")
        result = by_planes(augment.gaussian_blur, images, sigma)
        np.testing.assert_allclose(result, expected, atol=2e-6)


@pytest.mark.parametrize("key", [key for key in REFERENCE if "(" in key])
def test_jitters_of_the_reference(key):
    name, value = key.rstrip(")").split("(")
    result = by_planes(ADJUSTMENTS[name], REFERENCE["image"][np.newaxis], float(value))
    np.testing.assert_allclose(result[0], REFERENCE[key], atol=2e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_jitters_of_the_reference_in_every_order(order):
    images = REFERENCE["image"][np.newaxis]
    functions, values = list(ADJUSTMENTS.values()), REFERENCE["order_params"]
    for i in order:
        images = by_planes(functions[i], images, values[i])
    expected = REFERENCE["order_{}{}{}{}".format(*order)]
    np.testing.assert_allclose(images[0], expected, atol=4e-6)


def test_other_steps_of_the_reference():
    images = REFERENCE["image"][np.newaxis]
    gray = by_planes(augment.to_grayscale, images)[0]
    np.testing.assert_allclose(gray, REFERENCE["gray"], atol=1e-6)
    solarized = by_planes(augment.solarize, images)[0]
    np.testing.assert_allclose(solarized, REFERENCE["solarize"], atol=1e-7)


@pytest.mark.parametrize(("size", "step"), [(32, 1), (96, 1), (224, 7)])
@pytest.mark.parametrize("sigma", ["0.1", "0.7", "2.0"])
def test_blur_of_the_reference(size, step, sigma):
    images = REFERENCE[f"blur_in_{size}"][np.newaxis]
    result = by_planes(augment.gaussian_blur, images, float(sigma))[0, ::step, ::step]
    np.testing.assert_allclose(result, REFERENCE[f"blur_{size}_{sigma}"], atol=2e-6)


def reference_strengths():
    """The draws that give the strengths of the reference's orders."""
    brightness, contrast, saturation, hue = REFERENCE["order_params"]
    return {
        "brightness": (brightness / 0.4 + 1) / 2,
        "contrast": ((contrast - 1) / 0.4 + 1) / 2,
        "saturation": ((saturation - 1) / 0.2 + 1) / 2,
        "hue": (hue / 0.1 + 1) / 2,
    }


def orders_seen(draws):
    """bool [B, 24]: the orders of the reference that each image could have been jittered in.

    Two orders where saturation and hue are neighbours give the same.
    """
    draws = np.copy(draws)
    for name, values in reference_strengths().items():
        draws[:, COLUMNS.index(name)] = values
    view = only(VIEW_1, jitter_probability=1.0)
    result = augmented(tiled(REFERENCE["image"], len(draws)), draws, view).numpy()
    result = result[:, ::3, ::3]
    known = [REFERENCE["order_{}{}{}{}".format(*order)][::3, ::3] for order in ORDERS]
    return np.stack([np.abs(result - image).max((1, 2, 3)) < 1e-5 for image in known], -1)


def neighbours(order):
    return abs(order.index(2) - order.index(3)) == 1


def test_every_order_is_drawn():
    seen = orders_seen(make_draws(24, order=(np.arange(24) + 0.5) / 24))
    np.testing.assert_array_equal(seen.sum(0), [2 if neighbours(order) else 1 for order in ORDERS])


def test_orders_are_equally_likely():
    seen = orders_seen(make_draws(2400))
    assert seen.any(-1).all()
    for order, happened in zip(ORDERS, seen.T):
        assert_share(happened, (2 if neighbours(order) else 1) / 24)


def test_whole_in_its_order():
    """Flip, jitter, grayscale or not, blur, solarize, normalize: all on, against NumPy."""
    images = pictures(4, 40)
    draws = make_draws(4, order=[0.01, 0.3, 0.6, 0.99])
    for gray in (0.0, 1.0):
        probabilities = {**dict.fromkeys(PROBABILITIES, 1.0), "grayscale_probability": gray}
        result = augment.augment(images, draws, dataclasses.replace(VIEW_1, **probabilities))
        for image, row, value in zip(images.astype(np.float64), draws, result):
            row = dict(zip(COLUMNS, row))
            image = image[:, ::-1]
            strengths = {
                "brightness": 0.8 * row["brightness"] - 0.4,
                "contrast": 0.8 * row["contrast"] + 0.6,
                "saturation": 0.4 * row["saturation"] + 0.8,
                "hue": 0.2 * row["hue"] - 0.1,
            }
            for name in (list(strengths)[i] for i in ORDERS[int(24 * row["order"])]):
                image = numpy_adjust(name, image, strengths[name])
            image = numpy_gray(image) if gray else image
            image = numpy_blur(image, 0.1 + 1.9 * row["sigma"])
            image = np.where(image < 0.5, image, 1 - image)
            np.testing.assert_allclose(value, as_normalized(image), atol=2e-5)


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_whole_without_rgb(channels):
    """As above, channel by channel: brightness and contrast in both orders, and no grayscale."""
    images = np.random.default_rng(0).uniform(size=(4, 40, 40, channels)).astype(np.float32)
    draws = make_draws(4, order=[0.01, 0.49, 0.51, 0.99])
    view = dataclasses.replace(VIEW_1, **dict.fromkeys(PROBABILITIES, 1.0))
    results = augment.augment(images, draws, view)
    alone = [augment.augment(images[i : i + 1], draws[i : i + 1], view)[0] for i in range(4)]
    for image, row, *values in zip(images.astype(np.float64), draws, results, alone):
        row = dict(zip(COLUMNS, row))
        image = image[:, ::-1]
        strengths = {
            "brightness": 0.8 * row["brightness"] - 0.4,
            "contrast": 0.8 * row["contrast"] + 0.6,
        }
        for name in list(strengths)[:: 1 if row["order"] < 0.5 else -1]:
            image = numpy_adjust(name, image, strengths[name])
        image = numpy_blur(image, 0.1 + 1.9 * row["sigma"])
        image = np.where(image < 0.5, image, 1 - image)
        for value in values:
            np.testing.assert_allclose(value, (image - 0.449) / 0.226, atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 8, 9, 3), (2, 8, 8, None), (8, 8, 3), (2, None, None, 3)])
def test_images_that_are_not_square_are_refused(shape):
    draws = make_draws(2)

    def call(images):
        return augment.augment(images, draws, VIEW_1)

    with pytest.raises(ValueError, match="must be"):
        tf.function(call).get_concrete_function(tf.TensorSpec(shape))


def test_from_bytes_to_normalized_floats():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    expected = as_normalized(pixels / 255)
    result = augment.augment(pixels, make_draws(3), only(VIEW_1))
    assert result.dtype == tf.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)
    np.testing.assert_allclose(augment.normalize(tf.constant(pixels)), expected, atol=1e-6)
    for view in (VIEW_1, VIEW_2):
        result = augment.augment(pixels, make_draws(3), view)
        from_floats = augment.augment(np.float32(pixels / 255), make_draws(3), view)
        np.testing.assert_allclose(result, from_floats, atol=1e-5)


def test_range_is_kept():
    """Not even by rounding: a blur of white may come to a little more than 1."""
    draws = make_draws(300)
    ends = np.repeat([0.0, 1.0], 3).reshape(2, 1, 1, 3)
    black, white = augment.augment(np.float32(ends), draws[:2], only(VIEW_1)).numpy()
    images = pictures(300) > 0.5
    images[:100] = True
    strong = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}
    for view in (only(VIEW_1, blur_probability=1.0), dataclasses.replace(VIEW_2, **strong)):
        result = augment.augment(np.float32(images), draws, view).numpy()
        assert (result >= black).all() and (result <= white).all()
        assert result.min() < -1.9 and result.max() > 2.1


@pytest.mark.parametrize("view", [VIEW_1, VIEW_2])
def test_images_of_a_batch_do_not_mix(view):
    images, draws = pictures(24, 20), make_draws(24)
    together = augment.augment(images, draws, view)
    for i in range(24):
        alone = augment.augment(images[i : i + 1], draws[i : i + 1], view)
        np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-5)


def test_host_and_accelerator_give_the_same():
    size = 24
    batch = {
        "view1": np.uint8(255 * pictures(size, 20)),
        "view2": np.uint8(255 * pictures(size, 20, seed=1)),
        "draws1": make_draws(size),
        "draws2": make_draws(size, seed=1),
        "label": np.arange(size),
    }
    on_accelerator = tf.function(augment_batch)(batch)
    dataset = tf.data.Dataset.from_tensor_slices(batch).batch(size).map(augment_batch)
    assert dataset.element_spec["view1"].shape.as_list() == [None, 20, 20, 3]
    on_host = next(iter(dataset))
    assert sorted(on_host) == sorted(on_accelerator) == ["label", "view1", "view2"]
    for name, value in on_host.items():
        np.testing.assert_allclose(value, on_accelerator[name], atol=1e-5)
    for number, view in enumerate((VIEW_1, VIEW_2), 1):
        expected = augment.augment(batch[f"view{number}"], batch[f"draws{number}"], view)
        np.testing.assert_allclose(on_host[f"view{number}"], expected, atol=1e-5)


def changed(view, name, draws):
    """bool [B]: the images of a batch to which one random step did something."""
    # So that every blur shows.
    view = dataclasses.replace(view, blur_sigma=(2.0, 2.0))
    images = tiled(pictures(1, 20)[0], len(draws))
    plain = augment.augment(images, draws, only(view))
    return (np.abs(augment.augment(images, draws, only(view, name)) - plain) > 1e-3).any((1, 2, 3))


@pytest.mark.parametrize(
    ("name", "in_view_1", "in_view_2"),
    [
        ("flip_probability", 0.5, 0.5),
        ("jitter_probability", 0.8, 0.8),
        ("grayscale_probability", 0.2, 0.2),
        ("blur_probability", 1.0, 0.1),
        ("solarize_probability", 0.0, 0.2),
    ],
)
def test_probabilities_are_the_papers(name, in_view_1, in_view_2):
    assert_share(changed(VIEW_1, name, make_draws(COUNT)), in_view_1)
    assert_share(changed(VIEW_2, name, make_draws(COUNT, seed=1)), in_view_2)


def jitter_strengths(view, draws):
    """What the jitters did to images that show it: name -> [B]."""
    names = list(ADJUSTMENTS)

    def jittered(name, image):
        others = {other: 0.0 for other in names if other != name}
        view_of_one = only(view, jitter_probability=1.0, **others)
        return augmented(tiled(image, len(draws)), draws, view_of_one).numpy()

    halves = np.repeat([[[0.3], [0.7]]], 3, -1).repeat(2, 0)
    dull = np.tile([0.6, 0.5, 0.4], (2, 2, 1))
    red = np.tile([0.8, 0.2, 0.2], (2, 2, 1))
    contrast, saturation = jittered("contrast", halves), jittered("saturation", dull)[:, 0, 0]
    np.testing.assert_allclose(contrast.mean((1, 2)), 0.5, atol=1e-6)
    np.testing.assert_allclose(saturation[:, 0], 0.6, atol=1e-6)
    hues = np.array([colorsys.rgb_to_hsv(*pixel)[0] for pixel in jittered("hue", red)[:, 0, 0]])
    return {
        "brightness": jittered("brightness", np.full((2, 2, 3), 0.5))[:, 0, 0, 1] - 0.5,
        "contrast": (contrast[:, 0, 1] - contrast[:, 0, 0])[:, 0] / 0.4,
        "saturation": (saturation[:, 0] - saturation[:, 2]) / 0.2,
        "hue": (hues + 0.5) % 1.0 - 0.5,
    }


@pytest.mark.parametrize("view", [VIEW_1, VIEW_2])
def test_strengths_are_the_papers(view):
    strengths = jitter_strengths(view, make_draws(COUNT))
    assert_uniform(strengths["brightness"], -0.4, 0.4)
    assert_uniform(strengths["contrast"], 0.6, 1.4)
    assert_uniform(strengths["saturation"], 0.8, 1.2)
    assert_uniform(strengths["hue"], -0.1, 0.1)


def blur_sigmas(draws):
    """Measured on a white dot, down to about 0.2, below which it stays a dot."""
    dot = np.zeros((20, 20, 3), np.float32)
    dot[10, 10] = 1.0
    view = only(VIEW_1, "blur_probability")
    blurred = augmented(tiled(dot, len(draws)), draws, view).numpy()
    ratio = blurred[:, 10, 11, 0] / blurred[:, 10, 10, 0]
    return np.sqrt(-0.5 / np.log(np.maximum(ratio, 1e-8)))


def test_blur_is_as_wide_as_the_papers():
    sigmas = blur_sigmas(make_draws(COUNT))
    assert_share(sigmas < 0.2, 0.1 / 1.9)
    assert_uniform(sigmas[sigmas >= 0.2], 0.2, 2.0)


def test_choices_are_independent():
    draws = make_draws(COUNT)
    choices = [changed(VIEW_2, name, draws) for name in PROBABILITIES]
    choices += jitter_strengths(VIEW_2, draws).values()
    choices += [blur_sigmas(draws), orders_seen(draws).argmax(-1)]
    correlations = np.corrcoef(np.array(choices, float)) - np.eye(len(choices))
    assert np.abs(correlations).max() < 4.5 / np.sqrt(COUNT)
