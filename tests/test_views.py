"""Batches of views: the same for the same seed, from any step on, and nothing done twice."""

import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow as tf

from byol_tf.data import crop
from byol_tf.data.augment import NUM_DRAWS
from byol_tf.data.views import augment_batch, eval_batches, pretrain_batches, steps_per_epoch
from byol_tf.errors import UserError

COUNT, BATCH, STEPS = 26, 4, 6  # two images are left over every epoch


@pytest.fixture(params=["in memory", "streamed"])
def source(request, make_source):
    """Of both kinds; the label of an image is its index."""
    made = labelled_by_index(make_source(COUNT))
    return made if request.param == "in memory" else dataclasses.replace(made, image_shape=None)


def labelled_by_index(source):
    dataset = source.dataset.map(lambda record: {**record, "label": record["index"]})
    return dataclasses.replace(source, dataset=dataset)


def with_read(source, reads=None):
    """The images no longer in the records but read; `reads` gets the index of every one."""
    encoded = tf.constant([record["image"].numpy() for record in source.dataset])

    def read(record):
        def count(index):
            if reads is not None:
                reads.append(int(index))
            return np.int64(index)

        index = tf.numpy_function(count, [record["index"]], tf.int64, stateful=True)
        return tf.ensure_shape(tf.gather(encoded, index), [])

    dataset = source.dataset.map(lambda r: {k: v for k, v in r.items() if k != "image"})
    return dataclasses.replace(source, dataset=dataset, read=read)


def of_one_picture(source, size=48):
    """All images the same: views can only differ by what is drawn."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    encoded = tf.io.encode_png(pixels).numpy()
    dataset = source.dataset.map(lambda record: {**record, "image": encoded})
    return dataclasses.replace(source, dataset=dataset, image_shape=(size, size, 3))


def run(source, epochs=1, batch_size=BATCH, **kwargs):
    """The cropped views of all batches, as they come: a list of dicts of arrays."""
    kwargs = {"image_size": 12, "augment_on": "accelerator", **kwargs}
    batches = pretrain_batches(source, batch_size=batch_size, epochs=epochs, **kwargs)
    return list(batches.as_numpy_iterator())


def joined(batches):
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def labels(batches):
    return [batch["label"].tolist() for batch in batches]


def by_index(batches):
    """One epoch in the order of the source, and which images it has."""
    batch = joined(batches)
    order = np.argsort(batch["label"])
    return {key: value[order] for key, value in batch.items()}


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert batch.keys() == other.keys()
        for key, value in batch.items():
            np.testing.assert_array_equal(value, other[key])


def test_what_a_batch_holds(source):
    batches = pretrain_batches(
        source, image_size=12, batch_size=BATCH, epochs=1, augment_on="accelerator"
    )
    spec = {key: (tuple(s.shape), s.dtype) for key, s in batches.element_spec.items()}
    views = dict.fromkeys(["view1", "view2"], ((BATCH, 12, 12, 3), tf.uint8))
    draws = dict.fromkeys(["draws1", "draws2"], ((BATCH, NUM_DRAWS), tf.float32))
    assert spec == {**views, **draws, "label": ((BATCH,), tf.int64)}


def test_two_runs_see_the_same_whatever_the_users_seed(source):
    """Also where one is to be longer; and the user's own random numbers stay as they are."""
    runs, drawn = [], []
    for seed, epochs in ((7, 2), (8, 3)):
        tf.random.set_seed(seed)
        runs.append(run(source, epochs=epochs, seed=3))
        drawn.append(tf.random.uniform([4]).numpy())
        tf.random.set_seed(seed)
        np.testing.assert_array_equal(drawn[-1], tf.random.uniform([4]))
    assert [len(batches) for batches in runs] == [2 * STEPS, 3 * STEPS]
    assert_same(runs[0], runs[1][: 2 * STEPS])
    assert (drawn[0] != drawn[1]).all()


def test_a_later_start_continues_an_uninterrupted_run(source):
    whole = run(source, epochs=3)
    for start in (2, STEPS, 2 * STEPS + 5):
        assert_same(whole[start:], run(source, epochs=3, start_step=start))


def test_another_seed_gives_another_order_and_other_views(make_source):
    source = labelled_by_index(make_source(COUNT))
    runs = [run(source, seed=seed) for seed in (0, 1, 2**31 - 2)]
    for batches, others in itertools.combinations(runs, 2):
        assert labels(batches) != labels(others)
        one, other = by_index(batches), by_index(others)
        _, rows, other_rows = np.intersect1d(one["label"], other["label"], return_indices=True)
        assert len(rows) >= COUNT - 4
        for key in ("draws1", "draws2"):
            assert (one[key][rows] != other[key][other_rows]).any(-1).all()
        for key in ("view1", "view2"):
            assert (one[key][rows] != other[key][other_rows]).any((1, 2, 3)).mean() > 0.9


def test_every_image_once_an_epoch_in_a_new_order(source):
    batches = run(source, epochs=3)
    epochs = [joined(batches[i * STEPS : (i + 1) * STEPS])["label"].tolist() for i in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == STEPS * BATCH and set(epoch) <= set(range(COUNT))
        assert epoch != sorted(epoch)
        # Mixed over the whole: what is stored first does not stay among the first.
        assert abs(np.corrcoef(epoch, range(len(epoch)))[0, 1]) < 0.6
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert len({frozenset(epoch) for epoch in epochs}) > 1


def test_in_memory_and_streamed_views_are_the_same(make_source):
    made = make_source(COUNT)
    streamed = dataclasses.replace(made, image_shape=None)
    one, other = joined(run(made)), joined(run(streamed))
    for key in ("label", "draws1", "draws2"):
        np.testing.assert_array_equal(one[key], other[key])
    for key in ("view1", "view2"):
        # By matmul and by `tf.image.resize`, with rounding at the end.
        np.testing.assert_allclose(np.int32(one[key]), other[key], atol=1)


def test_no_two_views_are_alike(make_source):
    """Not those of one image, of two images, of two epochs or of two seeds."""
    source = of_one_picture(make_source(24))
    batch = joined([batch for seed in (0, 1) for batch in run(source, epochs=2, seed=seed)])
    for names, most in ((("view1", "view2"), 0.98), (("draws1", "draws2"), 1.0)):
        rows = np.concatenate([batch[name].reshape(2 * 2 * 24, -1) for name in names])
        assert len(np.unique(rows, axis=0)) >= most * len(rows)
    draws = np.concatenate([batch["draws1"], batch["draws2"]], -1)
    correlations = np.corrcoef(draws.T) - np.eye(2 * NUM_DRAWS)
    assert np.abs(correlations).max() < 4.5 / np.sqrt(len(draws))
    assert 0 <= draws.min() < 0.01 and 0.99 < draws.max() < 1


@pytest.mark.parametrize("shape", [(16, 16, 3), None], ids=["in memory", "streamed"])
def test_accelerator_and_host_give_the_same(make_source, shape):
    """Streamed images are augmented one by one on the host."""
    source = dataclasses.replace(make_source(16), image_shape=shape)
    batches = pretrain_batches(source, image_size=20, batch_size=8, epochs=1)
    views = dict.fromkeys(["view1", "view2"], ((8, 20, 20, 3), tf.float32))
    spec = {key: (tuple(s.shape), s.dtype) for key, s in batches.element_spec.items()}
    assert spec == {**views, "label": ((8,), tf.int64)}
    on_accelerator = [augment_batch(batch) for batch in run(source, batch_size=8, image_size=20)]
    count = 0
    for batch, other in zip(batches.as_numpy_iterator(), on_accelerator):
        assert batch.keys() == other.keys()
        for key, value in batch.items():
            np.testing.assert_allclose(value, other[key], atol=1e-5)
        count += 1
    assert count == len(on_accelerator) == 2


@pytest.mark.parametrize(("start", "epochs", "expected"), [(4, 1, 8), (9, 2, 12)])
def test_what_is_skipped_is_not_read(make_source, start, epochs, expected):
    reads = []
    source = with_read(dataclasses.replace(make_source(24), image_shape=None), reads)
    run(source, epochs=epochs, start_step=start)
    assert len(reads) == expected


def test_what_is_skipped_is_not_decoded(make_source):
    """Broken images do no harm where they are skipped."""
    source = labelled_by_index(dataclasses.replace(make_source(24), image_shape=None))
    whole = run(source)
    skipped = tf.constant(joined(whole[:4])["label"])

    def break_skipped(record):
        broken = tf.reduce_any(record["index"] == skipped)
        return {**record, "image": tf.where(broken, b"broken", record["image"])}

    source = dataclasses.replace(source, dataset=source.dataset.map(break_skipped))
    assert_same(whole[4:], run(source, start_step=4))
    with pytest.raises(tf.errors.InvalidArgumentError):
        run(source)


def test_images_in_memory_are_read_once(make_source):
    reads = []
    assert len(run(with_read(make_source(COUNT), reads), epochs=3)) == 3 * STEPS
    assert sorted(reads) == list(range(COUNT))


@pytest.mark.parametrize(("augment_on", "shape"), [("host", (16, 16, 3)), ("accelerator", None)])
def test_no_labels_where_there_are_none(make_source, augment_on, shape):
    source = dataclasses.replace(make_source(8, labels=False), image_shape=shape)
    batches = pretrain_batches(source, image_size=12, batch_size=4, epochs=1, augment_on=augment_on)
    draws = {"draws1", "draws2"} if augment_on == "accelerator" else set()
    assert set(batches.element_spec) == {"view1", "view2"} | draws


def test_labels_are_those_of_the_images(make_source):
    """Each image of a colour of its own, which no crop changes."""
    source = make_source(24)

    def paint(record):
        image = tf.fill([16, 16, 3], tf.cast(10 * record["index"], tf.uint8))
        return {**record, "image": tf.io.encode_png(image), "label": record["index"]}

    for shape in ((16, 16, 3), None):
        painted = dataclasses.replace(source, dataset=source.dataset.map(paint), image_shape=shape)
        batch = joined(run(painted))
        for key in ("view1", "view2"):
            expected = np.broadcast_to(10 * batch["label"], (12, 12, 3, 24)).transpose(3, 0, 1, 2)
            np.testing.assert_array_equal(batch[key], expected)


def test_full_batches_only(make_source):
    assert steps_per_epoch(make_source(COUNT), BATCH) == STEPS
    assert steps_per_epoch(make_source(8), 8) == 1 == len(run(make_source(8), batch_size=8))
    for function in (steps_per_epoch, lambda s, size: run(s, batch_size=size)):
        with pytest.raises(UserError, match=r"--batch_size=27 .*26 images"):
            function(make_source(COUNT), 27)


def test_eval_batches(source):
    batches = list(eval_batches(source, image_size=10, batch_size=8).as_numpy_iterator())
    assert [len(batch["index"]) for batch in batches] == [8, 8, 8, 2]
    assert set(batches[0]) == {"image", "label", "index", "name"}
    whole = joined(batches)
    for key in ("index", "label"):
        assert whole[key].dtype == np.int64
        np.testing.assert_array_equal(whole[key], range(COUNT))
    assert whole["name"].tolist() == [b"%d.png" % i for i in range(COUNT)]
    assert whole["image"].dtype == np.uint8 and whole["image"].shape == (COUNT, 10, 10, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(whole["image"], crop.resize(pixels[:, 1:15, 1:15], 10))


def test_images_of_many_sizes(make_source):
    shapes = [(8, 8), (30, 11), (3, 90), (1, 1), (17, 64), (200, 150)]
    pixels = [
        np.random.default_rng(i).integers(0, 256, (*s, 3), np.uint8) for i, s in enumerate(shapes)
    ]
    encoded = tf.stack(
        [tf.io.encode_jpeg(p) if i % 2 else tf.io.encode_png(p) for i, p in enumerate(pixels)]
    )
    source = make_source(len(shapes))
    dataset = source.dataset.map(lambda r: {**r, "image": tf.gather(encoded, r["index"])})
    source = dataclasses.replace(source, dataset=dataset, image_shape=None)
    batches = run(source, epochs=2, batch_size=3)
    assert len(batches) == 4 and batches[0]["view2"].shape == (3, 12, 12, 3)
    (batch,) = eval_batches(source, image_size=14)
    for i in (0, 2, 4):
        expected = crop.centre_crop_and_resize(pixels[i], 14)
        np.testing.assert_array_equal(batch["image"][i], expected)
