"""The paper's ablations: accumulated gradients, negative pairs, SimCLR, fixed targets, labels."""

import pathlib

import numpy as np
import pytest
import tensorflow as tf
from absl import flags

import byol_tf
from byol_tf import config, optimizers, resnet
from byol_tf.data import augment
from byol_tf.keras_api import keras
from byol_tf.model import contrastive_loss

FLAG_FILES = pathlib.Path(__file__).parent.parent / "flags" / "ablation"
# What each file states, on top of a batch of 6 in 3 parts.
CHANGES = {
    "tau_0": {"base_target_ema": 0.0, "constant_target_ema": True},
    **{f"tau_{tau:g}": {"base_target_ema": tau} for tau in (0.9, 0.99, 0.999, 1.0)},
    **{
        f"batch_{4096 // parts}": {"batch_size": 4096, "accumulation_steps": parts}
        for parts in (1, 2, 4, 8, 16, 32, 64)
    },
    "no_predictor": {"predictor": False},
    "no_target": {"target_network": False},
    "no_predictor_no_target": {"predictor": False, "target_network": False},
    "beta_1": {"contrastive_weight": 1.0},
    "beta_1_no_predictor": {"contrastive_weight": 1.0, "predictor": False},
    "beta_1_no_target": {"contrastive_weight": 1.0, "target_network": False},
    "simclr": {"contrastive_weight": 1.0, "predictor": False, "target_network": False},
    **{
        f"augmentation_{name}": {"augmentation": name}
        for name in augment.AUGMENTATIONS
        if name != "paper"
    },
    **{
        f"{head}_depth_{n}": {f"{head}_depth": n}
        for head in ("projector", "predictor")
        for n in (1, 3)
    },
    **{f"projection_{n}": {"projector_output_size": n} for n in (16, 32, 64, 128, 512)},
    "weight_decay_0": {"weight_decay": 0.0},
    "supervised": {"method": "supervised"},
}


def unit(x):
    """Vectors of length 1; one that is 0, as of a head all of whose ReLUs are off, stays 0."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def batches(steps=3, size=16):
    """Batches of always the same images."""
    data = {
        "view1": random(steps * size, 16, 16, 3),
        "view2": random(steps * size, 16, 16, 3, seed=1),
        "label": np.arange(steps * size) % 4,
    }
    return tf.data.Dataset.from_tensor_slices(data).batch(size, drop_remainder=True)


def small_byol(encoder, **kwargs):
    """A model of 16 and 8 units; `kwargs` as of `BYOL`."""
    return byol_tf.BYOL(encoder, projector_hidden_size=16, projector_output_size=8, **kwargs)


def trained(encoder, strategy=None, freeze=False, data=None, **kwargs):
    """All online and target weights after three steps from always the same start."""
    strategy = strategy or tf.distribute.get_strategy()
    with strategy.scope():
        model = small_byol(
            encoder(strategy.num_replicas_in_sync > 1),
            num_classes=4,
            random_target=True,
            **kwargs,
        )
        if freeze:
            for layer in model.submodules:
                if isinstance(layer, keras.layers.BatchNormalization):
                    layer.trainable = False
        model.compile(optimizer=keras.optimizers.SGD(0.2, momentum=0.9))
    rng = np.random.default_rng(7)
    for weight in model.online_weights + model.target_weights:
        value = rng.normal(size=weight.shape) * 0.3
        weight.assign(np.abs(value) + 0.5 if "variance" in weight.name else value)
    model.fit(data or batches(), callbacks=[byol_tf.TargetNetworkUpdate(0.5)], verbose=0)
    return [weight.numpy() for weight in model.online_weights + model.target_weights]


def assert_same(one, other, tolerance=2e-4):
    """Up to rounding errors, relative to the greatest value of each tensor."""
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * np.abs(a).max())


def test_accumulated_gradients_are_those_of_one_batch(tiny_encoder):
    """With frozen batch norm nothing but the batch's cut distinguishes the two."""
    one = trained(tiny_encoder, freeze=True)
    assert_same(one, trained(tiny_encoder, freeze=True, accumulation_steps=4))


def test_accumulation_has_batch_statistics_of_its_own(tiny_encoder):
    one = trained(tiny_encoder)
    parts = trained(tiny_encoder, accumulation_steps=4)
    assert max(np.abs(a - b).max() for a, b in zip(one, parts)) > 1e-3


def test_accumulation_on_two_replicas(tiny_encoder, mirrored):
    """Each replica cuts its own half: frozen batch norm makes it all the same."""
    one = trained(tiny_encoder, freeze=True)
    assert_same(one, trained(tiny_encoder, mirrored, freeze=True, accumulation_steps=2))


def test_accumulation_shares_statistics_across_replicas(tiny_encoder, mirrored):
    """A part is of the same images as on one replica. One step: in the second a rounding error
    crosses a ReLU's kink."""
    one = trained(tiny_encoder, data=batches().take(1), accumulation_steps=2)
    two = trained(tiny_encoder, mirrored, data=batches().take(1), accumulation_steps=2)
    assert_same(one, two, tolerance=5e-4)


@pytest.mark.parametrize(
    "wrong", [{"accumulation_steps": 0}, {"projector_depth": 0}, {"predictor_depth": -1}]
)
def test_what_cannot_be_built(tiny_encoder, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        byol_tf.BYOL(tiny_encoder(), projector_hidden_size=8, projector_output_size=4, **wrong)


def test_a_batch_must_divide_by_the_accumulation_steps(tiny_encoder):
    with pytest.raises(ValueError, match="batch of 16 images .* accumulation_steps=3"):
        trained(tiny_encoder, accumulation_steps=3)
    with pytest.raises(ValueError, match="drop_remainder=True"):
        trained(tiny_encoder, accumulation_steps=2, data=batches().unbatch().batch(16))


def numpy_negatives(prediction, same, other, temperature):
    p, s, o = unit(prediction), unit(same), unit(other)
    losses = []
    for i in range(len(p)):
        total = sum(np.exp(p[i] @ s[j] / temperature) for j in range(len(p)) if j != i)
        total += sum(np.exp(p[i] @ o[j] / temperature) for j in range(len(p)))
        losses.append(2 * temperature * np.log(total))
    return losses


def test_negative_pairs_against_numpy():
    vectors = [random(5, 6, seed=i) for i in range(3)]
    found = contrastive_loss(*map(tf.constant, vectors), temperature=0.3)
    np.testing.assert_allclose(found, numpy_negatives(*vectors, 0.3), rtol=1e-5)


@pytest.mark.parametrize("use_predictor", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_table_5b_against_numpy(tiny_encoder, use_predictor, beta):
    """With a target network: the loss with and without predictor, at a beta of equation 8."""
    model = small_byol(
        tiny_encoder(),
        random_target=True,
        use_predictor=use_predictor,
        contrastive_weight=beta,
        temperature=0.3,
    )
    model.compile(optimizer="sgd")
    (data,) = batches(steps=1)
    online, target = [], []
    for view in (data["view1"], data["view2"]):
        z = model.online_projector(model.online_encoder(view, training=True), training=True)
        online.append(model.predictor(z, training=True) if use_predictor else z)
        z = model.target_encoder(view, training=True)
        target.append(model.target_projector(z, training=True))
    online, target = np.array(online), np.array(target)
    prediction = ((unit(online) - unit(target[::-1])) ** 2).sum(-1).mean(-1).sum()
    negatives = sum(
        np.mean(numpy_negatives(online[v], target[v], target[1 - v], 0.3)) for v in (0, 1)
    )
    logs = model.train_on_batch(data, return_dict=True)
    assert logs["prediction_loss"] == pytest.approx(prediction, rel=1e-4)
    assert logs["loss"] == pytest.approx(prediction + beta * negatives, rel=1e-4)


def test_simclr_is_nt_xent(tiny_encoder):
    """2 + 2 a NT-Xent an anchor; and its gradient is that of NT-Xent, through both views."""
    model = small_byol(
        tiny_encoder(),
        use_predictor=False,
        use_target=False,
        contrastive_weight=1.0,
        temperature=0.2,
    )
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    (data,) = batches(steps=1)
    before = model.online_encoder.get_weights() + model.online_projector.get_weights()
    with tf.GradientTape() as tape:
        z = [
            model.online_projector(model.online_encoder(data[view], training=True), training=True)
            for view in ("view1", "view2")
        ]
        z = tf.math.l2_normalize(tf.concat(z, 0), -1)
        logits = tf.matmul(z, z, transpose_b=True) / 0.2
        logits = tf.linalg.set_diag(logits, tf.fill([32], -1e9))
        positives = tf.concat([tf.range(16, 32), tf.range(16)], 0)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(positives, logits)
        nt_xent = 2 * (2 + 2 * 0.2 * tf.reduce_mean(losses))  # the two orders are added
    gradients = tape.gradient(nt_xent, model.trainable_variables)
    for layer in (model.online_encoder, model.online_projector):
        weights = len(layer.weights)
        layer.set_weights(before[:weights])
        before = before[weights:]
    expected = [v.numpy() - 0.1 * g.numpy() for v, g in zip(model.trainable_variables, gradients)]
    logs = model.train_on_batch(data, return_dict=True)
    assert logs["loss"] == pytest.approx(float(nt_xent), rel=1e-4)
    for variable, value in zip(model.trainable_variables, expected):
        np.testing.assert_allclose(variable, value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("use_target", [True, False])
def test_negatives_are_those_of_all_replicas(tiny_encoder, mirrored, use_target):
    how = {"contrastive_weight": 1.0, "use_target": use_target}
    one, two = trained(tiny_encoder, **how), trained(tiny_encoder, mirrored, **how)
    for a, b in zip(one, two, strict=True):  # three steep steps multiply the rounding errors
        np.testing.assert_allclose(b, a, rtol=5e-3, atol=5e-4)


def test_tau_can_be_constant(tiny_encoder):
    update = byol_tf.TargetNetworkUpdate(0.0, constant=True)
    model = small_byol(tiny_encoder(), random_target=True)
    model.compile(optimizer="sgd")
    model.fit(batches(), callbacks=[update], verbose=0)
    assert float(update.tau(0)) == float(update.tau(2)) == 0.0
    for target, online in model.target_pairs:
        np.testing.assert_allclose(target, online, atol=1e-6)


def test_without_target_the_target_network_rests(tiny_encoder):
    model = small_byol(tiny_encoder(), use_target=False)
    model.compile(optimizer="sgd")
    before = [weight.numpy() for weight in model.target_weights]
    model.fit(batches(), callbacks=[byol_tf.TargetNetworkUpdate(0.5)], verbose=0)
    for weight, value in zip(model.target_weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_depths():
    images = keras.Input((4,))
    encoder = keras.Model(images, keras.layers.Dense(6)(images))
    model = small_byol(
        encoder,
        projector_depth=3,
        predictor_depth=1,
    )
    shapes = [tuple(w.shape) for w in model.online_projector.weights if "kernel" in w.name]
    assert shapes == [(6, 16), (16, 16), (16, 8)]
    assert [tuple(w.shape) for w in model.predictor.weights] == [(8, 8)]


def test_augmentation_sets():
    """What figure 3b takes away is gone, and the rest is the paper's."""
    fields = ("flip", "jitter", "grayscale", "blur", "solarize")
    expected = {
        "paper": [(0.5, 0.8, 0.2, 1.0, 0.0), (0.5, 0.8, 0.2, 0.1, 0.2)],
        "no_grayscale": [(0.5, 0.8, 0.0, 1.0, 0.0), (0.5, 0.8, 0.0, 0.1, 0.2)],
        "no_color": [(0.5, 0.0, 0.0, 1.0, 0.0), (0.5, 0.0, 0.0, 0.1, 0.2)],
        "crop_blur": [(0.0, 0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 0.1, 0.0)],
        "crop": [(0.0, 0.0, 0.0, 0.0, 0.0)] * 2,
        "crop_flip": [(0.5, 0.0, 0.0, 0.0, 0.0)] * 2,
    }
    assert set(augment.AUGMENTATIONS) == set(expected)
    for name, views in augment.AUGMENTATIONS.items():
        found = [tuple(getattr(v, f"{f}_probability") for f in fields) for v in views]
        assert found == expected[name]


def test_supervised_learns_from_labels(tiny_encoder):
    model = byol_tf.Supervised(tiny_encoder(), num_classes=2)
    model.compile(optimizer=keras.optimizers.Adam(0.02))
    labels = np.arange(32) % 2
    views = random(32, 16, 16, 3) + labels[:, None, None, None]
    data = {"view1": views, "view2": views[:, ::-1], "label": labels.astype(np.int64)}
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(16)
    before = model.online_encoder.get_weights()[0]
    history = model.fit(dataset, epochs=15, verbose=0).history
    assert history["accuracy"][-1] > 0.9
    assert np.abs(model.online_encoder.get_weights()[0] - before).max() > 1e-2


def supervised_weights(encoder, data, strategy=None):
    """What a supervised model has learned from the batches, from always the same start."""
    strategy = strategy or tf.distribute.get_strategy()
    with strategy.scope():
        keras.utils.set_random_seed(3)
        model = byol_tf.Supervised(encoder(strategy.num_replicas_in_sync > 1), num_classes=4)
        model.compile(optimizer=keras.optimizers.SGD(0.2))
    model.fit(data, verbose=0)
    return [weight.numpy() for weight in model.online_weights]


def test_supervised_on_two_replicas(tiny_encoder, mirrored):
    one = supervised_weights(tiny_encoder, batches())
    assert_same(one, supervised_weights(tiny_encoder, batches(), mirrored))


def test_supervised_images_without_label_do_not_count(tiny_encoder):
    """The same images twice, the second time without label; batch norm sees no difference."""
    (data,) = batches(steps=1)
    twice = {key: tf.concat([value[:8]] * 2, 0) for key, value in data.items()}
    half = {**twice, "label": tf.concat([twice["label"][:8], tf.fill([8], np.int64(-1))], 0)}
    one, other = (
        supervised_weights(tiny_encoder, tf.data.Dataset.from_tensors(d)) for d in (twice, half)
    )
    assert_same(one, other)


def test_supervised_evaluates_what_fit_takes(tiny_encoder):
    """Tuples of (views, ...) too, and in inference mode; a missing label counts nowhere."""
    model = byol_tf.Supervised(tiny_encoder(), num_classes=4)
    model.compile(optimizer="sgd")
    (data,) = batches(steps=1)
    labels = np.where(np.arange(16) < 4, -1, data["label"])
    dataset = tf.data.Dataset.from_tensors(({**data, "label": labels}, np.zeros(16)))
    before = [weight.numpy() for weight in model.online_weights]
    logs = model.evaluate(dataset, verbose=0, return_dict=True)
    for weight, value in zip(model.online_weights, before):
        np.testing.assert_array_equal(weight, value)
    logits = np.concatenate([model(data[view])[4:] for view in ("view1", "view2")])
    labels = np.tile(labels[4:], 2)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(24), labels]
    assert logs["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert logs["accuracy"] == pytest.approx((logits.argmax(-1) == labels).mean())
    model.fit(dataset, verbose=0)
    assert np.abs(model.online_weights[0] - before[0]).max() > 0


@pytest.mark.parametrize("name", CHANGES)
def test_flag_files(name):
    """Every file of flags/ablation changes what it says, and nothing else."""
    values = flags.FlagValues()
    for module in config.MODULES:
        for flag in flags.FLAGS.get_flags_for_module(module.__name__):
            values[flag.name] = flag
    given = ["main.py", "--batch_size=6", "--accumulation_steps=3"]
    values(given)
    before = values.flag_values_dict()
    values([*given, f"--flagfile={FLAG_FILES / name}.flags"])
    after = values.flag_values_dict()
    values.unparse_flags()
    for flag in values:
        values[flag].unparse()
    assert {flag: after[flag] for flag in after if after[flag] != before[flag]} == CHANGES[name]


def test_no_flag_file_is_unknown():
    assert {path.stem for path in FLAG_FILES.glob("*.flags")} == set(CHANGES)


def test_flags_offer_what_the_modules_know():
    """They are read before TensorFlow loads, so the names stand in both."""
    known = {
        "augmentation": augment.AUGMENTATIONS,
        "encoder": resnet.BLOCKS_PER_GROUP,
        "optimizer": optimizers.OPTIMIZERS,
        "stem": resnet.STEMS,
    }
    for name, values in known.items():
        assert list(flags.FLAGS[name].parser.enum_values) == list(values)
