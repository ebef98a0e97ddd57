"""The built-in data set: drawn patterns of figures that need no download, as a TFDS builder."""

import colorsys

import numpy as np
import tensorflow_datasets as tfds

_SIZE = 64  # pixels
_SUPERSAMPLING = 2  # subpixels a side, for smooth edges
_SPLIT_SIZES = {"train": 6000, "test": 1500}
_PERIOD = (9.0, 20.0)  # pixels from figure to figure
_ROTATION = 0.3  # radians to each side
_WARP = 0.15  # periods, standard deviation: no two figures are alike
_BRIGHTNESS = 0.1  # to each side
_LIGHTING = 0.4  # brighter on one side of the image than on the other, to each side
_NOISE = 0.04  # standard deviation


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Ten classes of figures, strewn over images of 64x64 pixels.

    An image is covered with figures of one class. Their colours, place, size, rotation and
    deformation, the background's colours, the lighting and the noise are nuisances: no
    pixel tells the class. What two crops of an image have in common is the figure. Drawn anew
    from the number of the image, always alike.
    """

    VERSION = tfds.core.Version("2.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=Shapes.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(_SIZE, _SIZE, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=list(FIGURES)),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in _SPLIT_SIZES}

    def _generate_examples(self, split):
        for i in range(_SPLIT_SIZES[split]):
            label = i % len(FIGURES)
            rng = np.random.default_rng([list(_SPLIT_SIZES).index(split), i])
            yield i, {"image": draw(list(FIGURES)[label], rng), "label": label}


def draw(figure, rng):
    """Draws one image: uint8 [64, 64, 3] of figures named `figure`, random by `rng`."""
    axis = (np.arange(_SIZE * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING
    covered = FIGURES[figure](*_lattice(rng, axis))[..., np.newaxis]
    dark, bright = _colours(rng, axis, 0.0, 0.4), _colours(rng, axis, 0.6, 1.0)
    bright_figures = rng.random() < 0.5
    canvas = np.where(covered == bright_figures, bright, dark)
    canvas = canvas * _lighting(rng, axis) + rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)
    pixels = canvas.reshape(_SIZE, _SUPERSAMPLING, _SIZE, _SUPERSAMPLING, 3).mean((1, 3))
    pixels += rng.normal(0.0, _NOISE, pixels.shape)
    return np.round(255 * np.clip(pixels, 0.0, 1.0)).astype(np.uint8)


def _lattice(rng, axis):
    """Coordinates (u, v) of every subpixel, in which figures repeat at every whole number."""
    angle = rng.uniform(-_ROTATION, _ROTATION)
    period = np.exp(rng.uniform(*np.log(_PERIOD)))
    x, y = axis[np.newaxis, :], axis[:, np.newaxis]
    u = (np.cos(angle) * x + np.sin(angle) * y) / period
    v = (np.cos(angle) * y - np.sin(angle) * x) / period
    shift = rng.uniform(0.0, 1.0, 2) + _WARP * _smooth(rng.normal(size=(5, 5, 2)), axis)
    return u + shift[..., 0], v + shift[..., 1]


def _colours(rng, axis, darkest, brightest):
    """Colours that change from place to place, [N, N, 3]: random hues, bounded brightness."""
    knots = [
        colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.8), rng.uniform(darkest, brightest))
        for _ in range(64)
    ]
    return _smooth(np.reshape(knots, (8, 8, 3)), axis)


def _lighting(rng, axis):
    """Brighter on one side than on the other: [N, N, 1]."""
    slope_y, slope_x = rng.uniform(-_LIGHTING, _LIGHTING, 2)
    along = axis / _SIZE - 0.5
    return (1.0 + slope_y * along[:, np.newaxis] + slope_x * along)[..., np.newaxis]


def _smooth(knots, axis):
    """Spreads values at K x K knots over the image: [K, K, C] -> [N, N, C]."""
    position = axis / _SIZE * (len(knots) - 1)
    low = np.minimum(position.astype(int), len(knots) - 2)
    blend = (position - low)[:, np.newaxis]
    blend = blend * blend * (3 - 2 * blend)
    rows = knots[low] * (1 - blend[..., np.newaxis]) + knots[low + 1] * blend[..., np.newaxis]
    return rows[:, low] * (1 - blend) + rows[:, low + 1] * blend


def _cell(u):
    """Where in its cell of the lattice a coordinate is, from -0.5 to 0.5."""
    return u - np.floor(u) - 0.5


def _stripes(u, v):
    return np.abs(_cell(u)) < 0.25


def _checks(u, v):
    return (_cell(u) > 0) ^ (_cell(v) > 0)


def _dots(u, v):
    return np.hypot(_cell(u), _cell(v)) < 0.3


def _rings(u, v):
    return np.abs(np.hypot(_cell(0.8 * u), _cell(0.8 * v)) - 0.32) < 0.11


def _crosses(u, v):
    u, v = np.abs(_cell(0.9 * u)), np.abs(_cell(0.9 * v))
    return (np.minimum(u, v) < 0.1) & (np.maximum(u, v) < 0.38)


def _triangles(u, v):
    u, v = _cell(0.9 * u), _cell(0.9 * v)
    return (v > -0.3) & (v + 2 * np.abs(u) < 0.4)


def _zigzag(u, v):
    return np.abs(_cell(v + 0.7 * (2 * np.abs(_cell(0.7 * u)) - 0.5))) < 0.25


def _grid(u, v):
    return (np.abs(_cell(0.9 * u)) < 0.13) | (np.abs(_cell(0.9 * v)) < 0.13)


def _bricks(u, v):
    row = np.floor(1.3 * v)
    return (np.abs(_cell(1.3 * v)) < 0.38) & (np.abs(_cell(0.6 * u + 0.5 * row)) < 0.42)


def _ovals(u, v):
    column = np.floor(0.6 * u)
    return np.hypot(_cell(0.6 * u) / 0.36, _cell(1.2 * v + 0.5 * column) / 0.3) < 1


# Each tells which points (u, v) of the lattice the figures cover.
FIGURES = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "rings": _rings,
    "crosses": _crosses,
    "triangles": _triangles,
    "zigzag": _zigzag,
    "grid": _grid,
    "bricks": _bricks,
    "ovals": _ovals,
}
