"""Where a run is cut, what is saved and logged, and what stops it."""

import json
import logging
import os
import pathlib
import resource
import signal
import time

import numpy as np
import pytest
import tensorflow as tf

import byol_tf
from byol_tf import checkpoints, training
from byol_tf.errors import Preempted
from byol_tf.keras_api import keras


@pytest.mark.parametrize(
    "start, stop, expected",
    [
        (0, 20, [(0, 5, 4)]),
        (0, 3, [(0, 3, 1)]),
        (0, 13, [(0, 5, 2), (10, 3, 1)]),
        (3, 20, [(3, 2, 1), (5, 5, 3)]),
        (3, 13, [(3, 2, 1), (5, 5, 1), (10, 3, 1)]),
        (6, 8, [(6, 2, 1)]),
        (10, 20, [(10, 5, 2)]),
        (20, 20, []),
        (25, 20, []),
    ],
)
def test_segments(start, stop, expected):
    assert list(training.segments(start, stop, 5)) == expected


def test_segments_take_every_step_once():
    for start in range(12):
        for stop in range(12):
            taken = []
            for first, steps, epochs in training.segments(start, stop, 4):
                assert steps == 4 or epochs == 1
                assert first % 4 + steps <= 4  # no epoch crosses a boundary
                taken += range(first, first + steps * epochs)
            assert taken == list(range(start, stop))


def views(steps=8, size=8):
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, steps * size, 16, 16, 3)).astype(np.float32)
    return tf.data.Dataset.from_tensor_slices({"view1": one, "view2": other}).batch(size)


@pytest.fixture
def model(tiny_encoder):
    keras.utils.set_random_seed(1)
    model = byol_tf.BYOL(tiny_encoder(), projector_hidden_size=16, projector_output_size=4)
    model.compile(keras.optimizers.SGD(byol_tf.WarmupCosine(0.1, 8, 2)))
    return model


@pytest.fixture
def manager(model, tmp_path):
    checkpoint = tf.train.Checkpoint(model=model)
    return checkpoints.Manager(checkpoint, tmp_path / "checkpoints")


@pytest.fixture
def watch(tmp_path, manager):
    update = byol_tf.TargetNetworkUpdate(0.9, total_steps=8)
    return training.Watch(
        tmp_path, log_every=2, batch_size=8, target_update=update, manager=manager
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fit(model, *callbacks, **kwargs):
    update = byol_tf.TargetNetworkUpdate(0.9, total_steps=16)
    given = {"epochs": 2, "steps_per_epoch": 4, "verbose": 0, **kwargs}
    return model.fit(views(), callbacks=[update, *callbacks], **given)


def poison(model, weight, step):
    """A callback that spoils a weight after this step."""

    def spoil(batch, logs):
        if int(model.optimizer.iterations) == step:
            weight.assign(tf.fill(weight.shape, np.nan))

    return keras.callbacks.LambdaCallback(on_train_batch_end=spoil)


def test_checkpoints_every_few_epochs_and_at_the_end(model, manager):
    fit(model, training.Checkpoints(manager, every=2), epochs=3, steps_per_epoch=2)
    assert [path.rsplit("-")[-1] for path in manager.checkpoints] == ["4", "6"]
    saved = [weight.numpy() for weight in model.online_weights + model.target_weights]
    for weight in model.online_weights + model.target_weights:
        weight.assign(tf.zeros_like(weight))
    manager.checkpoint.restore(manager.latest_checkpoint)
    for weight, value in zip(model.online_weights + model.target_weights, saved):
        np.testing.assert_array_equal(weight, value)


def test_a_nan_is_never_saved(model, manager):
    # Which a ReLU hides from the loss.
    kernel = model.online_encoder.trainable_weights[0]
    with pytest.raises(training.TrainingDiverged, match="not a finite number") as caught:
        fit(model, poison(model, kernel, step=6), training.Checkpoints(manager, every=1))
    assert [path.rsplit("-")[-1] for path in manager.checkpoints] == ["4"]
    assert manager.latest_checkpoint in str(caught.value)
    assert "stopped at step 8" in str(caught.value)
    manager.checkpoint.restore(manager.latest_checkpoint)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


def test_an_epochs_last_step_has_a_line(model, watch, tmp_path):
    fit(model, watch, steps_per_epoch=3)
    assert [line["step"] for line in lines(tmp_path)] == [2, 3, 4, 6]


def test_watch_logs(model, manager, watch, tmp_path):
    seen = []
    each = keras.callbacks.LambdaCallback(
        # Before the watch, so still with the mean since the last line.
        on_train_batch_end=lambda batch, logs: seen.append(float(logs["loss"]))
    )
    history = fit(model, each, watch)
    logged = lines(tmp_path)
    assert [line["step"] for line in logged] == [2, 4, 6, 8]
    for k, line in zip((1, 3, 5, 7), logged):
        assert set(line) == {
            "step", "loss", "prediction_loss", "projection_std", "effective_rank",
            "target_ema", "learning_rate", "images_per_second",
        }  # fmt: skip
        assert line["loss"] == pytest.approx(seen[k], rel=1e-5)
        expected = 1 - 0.1 * (np.cos(np.pi * k / 8) + 1) / 2
        assert line["target_ema"] == pytest.approx(expected, abs=1e-6)
        expected = float(byol_tf.WarmupCosine(0.1, 8, 2)(k))
        assert line["learning_rate"] == pytest.approx(expected, rel=1e-5)
        assert line["images_per_second"] > 0
    # What Keras shows at the end of an epoch is not cleared by the line of its last step.
    assert history.history["loss"] == pytest.approx([logged[1]["loss"], logged[3]["loss"]])
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_watch_means_begin_anew_at_every_line(model, watch, tmp_path):
    """Each line is the mean of its two steps alone, whose losses the first run gives."""
    initial = model.get_weights()
    single = []

    class Each(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.reset_metrics()

        def on_train_batch_end(self, batch, logs=None):
            single.append(logs["loss"])

    fit(model, Each())
    model.set_weights(initial)
    model.optimizer.iterations.assign(0)
    for variable in model.optimizer.variables:
        variable.assign(tf.zeros_like(variable))
    fit(model, watch, epochs=1, steps_per_epoch=8)
    expected = [np.mean(single[i : i + 2]) for i in (0, 2, 4, 6)]
    assert [line["loss"] for line in lines(tmp_path)] == pytest.approx(expected, rel=1e-3)


def test_watch_raises_on_nan(model, manager, watch, tmp_path):
    outputs = model.online_projector.trainable_weights[-1]
    with pytest.raises(training.TrainingDiverged, match="none yet") as caught:
        fit(model, poison(model, outputs, step=3), watch, training.Checkpoints(manager, every=1))
    assert "stopped at step 4: the loss" in str(caught.value)
    assert [line["step"] for line in lines(tmp_path)] == [2]  # JSON has no NaN
    assert not manager.checkpoints


def test_watch_warns_of_collapse_once(model, watch, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
    with caplog.at_level(logging.WARNING, "absl"):
        fit(model, watch)
        assert "COLLAPSE" not in caplog.text
        outputs = model.online_projector.trainable_weights[-1]
        hold = keras.callbacks.LambdaCallback(
            on_train_batch_begin=lambda batch, logs: outputs.assign(tf.zeros_like(outputs))
        )
        fit(model, hold, watch)
    warnings = [r.getMessage() for r in caplog.records if "COLLAPSE" in r.getMessage()]
    assert len(warnings) == 1
    assert "--base_target_ema" in warnings[0] and "at step 10" in warnings[0]


def test_throughput_leaves_out_the_first_step(model, watch):
    slow_start = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: time.sleep(3 if batch == 0 else 0)
    )
    fit(model, slow_start, watch, epochs=1, steps_per_epoch=8)
    assert watch.images_per_second > 7 * 8 / 3


@pytest.mark.parametrize("start", [0, 3])
def test_train_takes_the_rest(model, start):
    """From the optimizer's step on, each batch once, and with the epochs' numbers."""
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(start)
    asked, epochs = [], []

    def batches_from(step, steps):
        asked.append(step)
        return views().skip(step).take(steps)

    training.train(
        model,
        batches_from,
        steps_per_epoch=4,
        epochs=2,
        max_steps=7,
        callbacks=[
            byol_tf.TargetNetworkUpdate(0.9, 8),
            keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: epochs.append(epoch)),
        ],
        verbose=0,
    )
    assert int(model.optimizer.iterations) == 7
    assert asked == [start, 4]
    assert epochs == [0, 1]


@pytest.fixture
def stop():
    """A `StopOnSigterm` where SIGTERM raises `Preempted`, as in main.py."""

    def end(number, frame):
        raise Preempted

    before = signal.signal(signal.SIGTERM, end)
    yield training.StopOnSigterm(tf.distribute.get_strategy())
    signal.signal(signal.SIGTERM, before)


def terminate(*_):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("event", "steps"), [("on_train_batch_end", 1), ("on_train_end", 8)])
def test_sigterm_cuts_nothing_short(model, manager, stop, event, steps):
    """Not what other callbacks do with the last checkpoint either."""
    saved = []

    def save(*_):
        terminate()
        terminate()
        saved.append(int(model.optimizer.iterations))

    fit(model, keras.callbacks.LambdaCallback(**{event: save}), stop)
    assert model.stop_training and saved == [steps]


def test_sigterm_awaits_no_measurement(model, manager, watch, stop):
    """It ends with the checkpoint that was to be measured; also if it came in its writing."""
    saves = training.Checkpoints(manager, every=1)
    measure = stop.at_once()(terminate)
    best = checkpoints.KeepBest(manager, saves.save, measure, 4, watch)
    with pytest.raises(Preempted):
        fit(model, watch, saves, best, stop)
    assert manager.latest_checkpoint.endswith("-4")
    late = keras.callbacks.LambdaCallback(on_epoch_end=terminate)
    measure = stop.at_once()(lambda path: pytest.fail("measured"))
    best = checkpoints.KeepBest(manager, saves.save, measure, 8, watch)
    with pytest.raises(Preempted):
        fit(model, watch, late, best, stop)


def test_sigterm_is_no_longer_awaited_after_a_fit(model, stop):
    before = signal.getsignal(signal.SIGTERM)
    fit(model, stop)
    assert not model.stop_training and signal.getsignal(signal.SIGTERM) is before


def test_target_update_must_know_its_steps(model):
    unknown = views().filter(lambda views: True)
    with pytest.raises(ValueError, match="total_steps="):
        model.fit(unknown, callbacks=[byol_tf.TargetNetworkUpdate(0.9)], verbose=0)
    assert int(model.optimizer.iterations) == 0
    for update, kwargs in (
        (byol_tf.TargetNetworkUpdate(0.9), {"steps_per_epoch": 2}),
        (byol_tf.TargetNetworkUpdate(0.9, total_steps=100), {}),
    ):
        before = model.target_pairs[0][0].numpy()
        model.fit(unknown, callbacks=[update], verbose=0, **kwargs)
        assert np.abs(model.target_pairs[0][0].numpy() - before).max() > 0
    with pytest.raises(ValueError, match="past the 2 steps"):
        model.fit(
            unknown, callbacks=[byol_tf.TargetNetworkUpdate(0.9)], verbose=0, steps_per_epoch=2
        )


@pytest.mark.parametrize("tau", [-0.1, 1.1, float("nan")])
def test_target_update_refuses(tau):
    with pytest.raises(ValueError, match="base_target_ema"):
        byol_tf.TargetNetworkUpdate(tau)


def test_what_is_logged_is_not_kept_in_memory(watch):
    """TensorFlow keeps a tensor, of 1 kB, of every Python number that it ever gets."""

    def log(begin, end):
        for watch._step in range(begin, end):
            watch.write({f"figure_{i}": watch._step + i / 100 for i in range(40)})

    log(0, 100)
    before = resident_mb()
    log(100, 700)
    assert resident_mb() - before < 20  # 32 of Python numbers; 11, of which pytest keeps most


def resident_mb():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
