"""k-NN and linear probe against plain loops and scikit-learn, and the features they judge."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from byol_tf import evaluation
from byol_tf.data import augment, views
from byol_tf.evaluation import Features


def features(vectors, labels):
    names = [str(i) for i in range(len(vectors))]
    return Features(np.asarray(vectors, np.float32), np.asarray(labels, np.int64), names)


def blobs(count, spread, seed, classes=5, size=6):
    """Noisy copies of one centre a class; the centres are the same for every seed."""
    centres = np.random.default_rng(99).normal(size=(classes, size))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return features(centres[labels] + spread * rng.normal(size=(count, size)), labels)


def numpy_knn(train, test, k, temperature):
    correct = 0
    for query, label in zip(test.vectors, test.labels):
        similarities = [
            float(query @ vector / np.linalg.norm(query) / np.linalg.norm(vector))
            for vector in train.vectors
        ]
        nearest = sorted(range(len(similarities)), key=lambda i: -similarities[i])[:k]
        votes = {}
        for i in nearest:
            weight = np.exp(similarities[i] / temperature)
            votes[train.labels[i]] = votes.get(train.labels[i], 0.0) + weight
        correct += max(votes, key=votes.get) == label
    return correct / len(test.labels)


@pytest.mark.parametrize("temperature", [0.07, 10.0])
@pytest.mark.parametrize("k", [1, 20, 200, 1000])
def test_knn_is_the_loop(k, temperature):
    train, test = blobs(300, 1.5, seed=1), blobs(150, 1.5, seed=2)
    expected = numpy_knn(train, test, k, temperature)
    assert 0.2 < expected < 0.95  # neither trivial nor hopeless
    found = evaluation.knn_accuracy(train, test, k=k, temperature=temperature)
    assert found == pytest.approx(expected)


def test_knn_defaults():
    train, test = blobs(300, 1.5, seed=1), blobs(150, 1.5, seed=2)
    assert evaluation.knn_accuracy(train, test) == numpy_knn(train, test, 20, 0.07)


def test_knn_weighs_its_votes():
    """One near neighbour against two far ones: the temperature decides."""
    train = features([[1, 0], [0, 1], [0, 1]], [0, 1, 1])
    test = features([[1, 0.5]], [0])
    assert evaluation.knn_accuracy(train, test, k=3, temperature=0.07) == 1.0
    assert evaluation.knn_accuracy(train, test, k=3, temperature=100.0) == 0.0


def test_knn_of_ties_and_zeros():
    """Equal similarities, where any k of them may vote, and vectors without a direction."""
    same = features(np.ones((6, 3)), [2] * 6)
    assert evaluation.knn_accuracy(same, features(np.ones((2, 3)), [2, 1]), k=4) == 0.5
    zeros = features(np.zeros((4, 3)), [0, 0, 0, 1])
    assert evaluation.knn_accuracy(zeros, features(np.zeros((2, 3)), [0, 0]), k=4) == 1.0


def test_knn_in_chunks(monkeypatch):
    train, test = blobs(100, 1.5, seed=1), blobs(50, 1.5, seed=2)
    expected = evaluation.knn_accuracy(train, test)
    monkeypatch.setattr(evaluation, "_SIMILARITIES", 700)  # seven queries at a time
    assert evaluation.knn_accuracy(train, test) == expected


def test_knn_does_not_overflow():
    train, test = blobs(100, 0.2, seed=1), blobs(50, 0.2, seed=2)
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        assert evaluation.knn_accuracy(train, test, temperature=1e-3) > 0.9


def test_knn_against_scikit_learn():
    """At a high temperature all votes weigh the same; with 2 classes and odd k none ties."""
    train, test = blobs(200, 2.0, seed=1, classes=2), blobs(100, 2.0, seed=2, classes=2)
    judge = KNeighborsClassifier(21, metric="cosine", algorithm="brute")
    expected = judge.fit(train.vectors, train.labels).score(test.vectors, test.labels)
    assert 0.55 < expected < 0.95
    found = evaluation.knn_accuracy(train, test, k=21, temperature=1e4)
    assert found == pytest.approx(expected)


def test_linear_probe_finds_what_is_there_and_no_more():
    train, test = blobs(400, 0.1, seed=1), blobs(400, 0.1, seed=2)
    assert evaluation.linear_probe_accuracy(train, test) > 0.98
    rng = np.random.default_rng(3)
    shuffled = [features(part.vectors, rng.permutation(part.labels)) for part in (train, test)]
    assert abs(evaluation.linear_probe_accuracy(*shuffled) - 0.2) < 0.1


@pytest.mark.parametrize("accuracy", [evaluation.linear_probe_accuracy, evaluation.knn_accuracy])
def test_test_images_teach_nothing(accuracy):
    """Test labels that contradict the training ones cannot be learned, only failed."""
    train, test = blobs(200, 0.1, seed=1), blobs(100, 0.1, seed=2)
    assert accuracy(train, test) > 0.98
    assert accuracy(train, features(test.vectors, (test.labels + 1) % 5)) < 0.02


def test_linear_probe_standardises_by_the_training_images():
    """Far-off, badly scaled features say the same; a shifted test set does not."""
    train, test = blobs(200, 0.5, seed=1), blobs(200, 0.5, seed=2)
    scale, shift = np.logspace(-3, 3, 6), 50.0
    scaled = [features(part.vectors * scale + shift, part.labels) for part in (train, test)]
    plain = evaluation.linear_probe_accuracy(train, test)
    assert evaluation.linear_probe_accuracy(*scaled) == pytest.approx(plain, abs=0.02)
    moved = features(test.vectors + 30.0, test.labels)
    assert evaluation.linear_probe_accuracy(train, moved) < plain - 0.2


def test_linear_probe_can_be_repeated():
    train, test = blobs(200, 2.0, seed=1), blobs(200, 2.0, seed=2)
    first = evaluation.linear_probe_accuracy(train, test, seed=4)
    assert evaluation.linear_probe_accuracy(train, test, seed=4) == first


def test_extract_features(make_source, tiny_encoder):
    source, encoder = make_source(10), tiny_encoder()
    norm = encoder.layers[1]
    norm.moving_mean.assign(np.linspace(-0.5, 0.5, 8))  # unlike those of any batch
    norm.moving_variance.assign(np.linspace(0.5, 2, 8))
    before = encoder.get_weights()
    found = evaluation.extract_features(encoder, source, image_size=16, batch_size=4)
    assert found.names == [f"{i}.png" for i in range(10)]
    assert found.labels.dtype == np.int64 and found.labels.tolist() == [i % 4 for i in range(10)]
    assert found.vectors.dtype == np.float32 and found.vectors.shape == (10, 8)
    (batch,) = views.eval_batches(source, image_size=16, batch_size=10)
    expected = encoder(augment.normalize(batch["image"]), training=False)
    np.testing.assert_allclose(found.vectors, expected, rtol=1e-4, atol=1e-5)
    for weight, value in zip(encoder.get_weights(), before):
        np.testing.assert_array_equal(weight, value)
    in_training = encoder(augment.normalize(batch["image"]), training=True)
    assert np.abs(in_training - expected).max() > 0.1


def test_features_again_and_again(make_source, tiny_encoder, monkeypatch):
    """Of the weights of now, by the graphs of the first time."""
    encoder, source, traced = tiny_encoder(), make_source(10), []
    normalize = augment.normalize
    monkeypatch.setattr(augment, "normalize", lambda x: traced.append(1) or normalize(x))
    extract = evaluation.feature_extractor(encoder, source, image_size=16, batch_size=5)
    before = extract().vectors
    monkeypatch.setattr(views, "eval_batches", None)
    encoder.set_weights([2 * weight for weight in encoder.get_weights()])
    after = extract().vectors
    assert np.abs(after - before).max() > 0.1 and len(traced) == 1
    monkeypatch.undo()
    again = evaluation.extract_features(encoder, source, image_size=16, batch_size=5)
    np.testing.assert_array_equal(after, again.vectors)


def test_features_without_labels(make_source, tiny_encoder):
    found = evaluation.extract_features(tiny_encoder(), make_source(3, labels=False), image_size=16)
    assert found.labels.tolist() == [-1] * 3


def test_raw_pixels(make_source):
    source = make_source(5)
    found = evaluation.raw_pixels(source, image_size=8)
    (batch,) = views.eval_batches(source, image_size=8)
    pixels = batch["image"].numpy() / 255.0
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(found.vectors, expected.reshape(5, -1), rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == [0, 1, 2, 3, 0]
    assert found.names[1] == "1.png"
