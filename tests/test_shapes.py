"""The built-in data set: deterministic, balanced, prepared once, and no easy prey."""

import numpy as np

from byol_tf.data import decode, shapes
from byol_tf.data.source import load_source


def images(count, split):
    names = list(shapes.FIGURES)
    return np.stack(
        [shapes.draw(names[i % 10], np.random.default_rng([split, i])) for i in range(count)]
    )


def test_drawing_is_a_function_of_the_random_numbers():
    first = shapes.draw("rings", np.random.default_rng(3))
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, shapes.draw("rings", np.random.default_rng(3)))
    other = shapes.draw("rings", np.random.default_rng(4))
    assert np.mean(np.abs(first.astype(int) - other)) > 20


def test_figures_differ_on_the_same_random_numbers():
    drawn = [shapes.draw(name, np.random.default_rng(5)).astype(int) for name in shapes.FIGURES]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert np.mean(np.abs(one - other)) > 10


def test_neither_mean_colour_nor_pixels_tell_the_class():
    train, test = images(500, 0), images(200, 1)
    labels = np.arange(500) % 10, np.arange(200) % 10
    for view in (lambda x: x.mean((1, 2)), lambda x: x[:, ::2, ::2].reshape(len(x), -1)):
        a, b = view(train.astype(float)), view(test.astype(float))
        distance = (b**2).sum(1)[:, None] - 2 * b @ a.T + (a**2).sum(1)
        found = labels[0][distance.argmin(1)]
        assert np.mean(found == labels[1]) < 0.4


def test_prepared_once_and_like_any_other_set(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "_SPLIT_SIZES", {"train": 20, "test": 10})
    loaded = load_source("shapes", "train", str(tmp_path))
    assert loaded.class_names == tuple(shapes.FIGURES)
    assert loaded.image_shape == (64, 64, 3)
    found = list(loaded.dataset.as_numpy_iterator())
    assert [example["label"] for example in found] == [*range(10)] * 2
    for i, example in enumerate(found):
        drawn = shapes.draw(list(shapes.FIGURES)[i % 10], np.random.default_rng([0, i]))
        np.testing.assert_array_equal(decode.decode(example["image"]), drawn)
    monkeypatch.setattr(shapes, "draw", None)  # not to be called again
    assert load_source("shapes", "test", str(tmp_path)).num_examples == 10
