"""The built-in data set: small drawings that need no download, as a TFDS builder."""

import colorsys

import numpy as np
import tensorflow_datasets as tfds

_SIZE = 32  # pixels
_SUPERSAMPLING = 3  # subpixels a side, for smooth edges
_SPLIT_SIZES = {"train": 8000, "test": 2000}


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Ten classes of figures, scattered over images of 32x32 pixels.

    An image shows about nine figures of one class. Colour, size, rotation and place of
    every figure, the background's colours and texture, the lighting and the noise are
    nuisances: no pixel tells the class, and no statistic of colour does. What two crops
    of an image share is the figure. Drawn anew from the number of the image, always alike.
    """

    VERSION = tfds.core.Version("1.0.0")

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
    """Draws one image: uint8 [32, 32, 3] of figures named `figure`, random by `rng`."""
    axis = (np.arange(_SIZE * _SUPERSAMPLING, dtype=np.float32) + 0.5) / _SUPERSAMPLING
    canvas = _background(rng, axis)
    for centre_y, centre_x in _centres(rng):
        _draw_figure(canvas, FIGURES[figure], centre_y, centre_x, rng, axis)
    canvas *= _lighting(rng, axis)
    pixels = canvas.reshape(_SIZE, _SUPERSAMPLING, _SIZE, _SUPERSAMPLING, 3).mean((1, 3))
    pixels += rng.normal(0.0, rng.uniform(0.0, 0.06), pixels.shape)
    return np.round(255 * np.clip(pixels, 0.0, 1.0)).astype(np.uint8)


def _background(rng, axis):
    """A smooth random texture of colours that say nothing of each other: float32 [N, N, 3]."""
    knots = np.float32([[_colour(rng, 0.3, 0.7) for _ in range(5)] for _ in range(5)])
    position = axis / _SIZE * 4
    low = np.minimum(position.astype(int), 3)
    blend = (position - low)[:, np.newaxis, np.newaxis]
    rows = knots[low] * (1 - blend) + knots[low + 1] * blend
    blend = blend[:, 0]
    return rows[:, low] * (1 - blend) + rows[:, low + 1] * blend


def _lighting(rng, axis):
    """Brighter on one side than on the other: float32 [N, N, 1]."""
    slope_y, slope_x = rng.uniform(-0.35, 0.35, 2)
    along = axis / _SIZE - 0.5
    light = 1.0 + slope_y * along[:, np.newaxis] + slope_x * along
    return light[..., np.newaxis].astype(np.float32)


def _centres(rng):
    """Centres (y, x) of the figures in pixels: a shaken grid, turned and shifted."""
    spacing = rng.uniform(9.0, 12.0)
    angle = rng.uniform(0, np.pi / 2)
    offset = rng.uniform(-0.5, 0.5, 2)
    grid = np.stack(np.meshgrid(np.arange(-3, 4), np.arange(-3, 4)), -1).reshape(-1, 2)
    grid = grid + offset + rng.uniform(-0.12, 0.12, grid.shape)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centres = spacing * grid @ turn + _SIZE / 2
    inside = ((centres > -3) & (centres < _SIZE + 3)).all(1)
    return centres[inside]


def _draw_figure(canvas, covers, centre_y, centre_x, rng, axis):
    """Paints one figure on the canvas, of random size, rotation and colour."""
    radius = rng.uniform(4.0, 5.5)
    angle = rng.uniform(0, 2 * np.pi)
    colour = _colour(rng, 0.85, 1.0) if rng.random() < 0.5 else _colour(rng, 0.0, 0.2)
    rows = slice(*np.searchsorted(axis, (centre_y - radius, centre_y + radius)))
    columns = slice(*np.searchsorted(axis, (centre_x - radius, centre_x + radius)))
    y = (axis[rows, np.newaxis] - centre_y) / radius
    x = (axis[columns] - centre_x) / radius
    u = np.cos(angle) * x + np.sin(angle) * y
    v = np.cos(angle) * y - np.sin(angle) * x
    canvas[rows, columns][covers(u, v)] = colour


def _colour(rng, darkest, brightest):
    """An RGB colour of random hue and saturation, float32 [3], with the given brightness."""
    return np.float32(
        colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.7), rng.uniform(darkest, brightest))
    )


def _disc(u, v):
    return u**2 + v**2 < 0.6


def _ring(u, v):
    return np.abs(np.hypot(u, v) - 0.7) < 0.22


def _crescent(u, v):
    return (u**2 + v**2 < 0.9) & ((u - 0.5) ** 2 + v**2 > 0.55)


def _square(u, v):
    return np.maximum(np.abs(u), np.abs(v)) < 0.65


def _frame(u, v):
    return np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.5) < 0.17


def _triangle(u, v):
    return (v > -0.5) & (v + 1.732 * np.abs(u) < 1.0)


def _cross(u, v):
    return (np.minimum(np.abs(u), np.abs(v)) < 0.22) & (np.maximum(np.abs(u), np.abs(v)) < 0.9)


def _corner(u, v):
    inside = np.maximum(np.abs(u), np.abs(v)) < 0.7
    return inside & (np.minimum(u, v) < -0.25)


def _bar(u, v):
    return (np.abs(u) < 0.95) & (np.abs(v) < 0.27)


def _pair(u, v):
    return (np.abs(u) - 0.55) ** 2 + v**2 < 0.15


# Each tells which points (u, v) of the unit disc the figure covers.
FIGURES = {
    "disc": _disc,
    "ring": _ring,
    "crescent": _crescent,
    "square": _square,
    "frame": _frame,
    "triangle": _triangle,
    "cross": _cross,
    "corner": _corner,
    "bar": _bar,
    "pair": _pair,
}
