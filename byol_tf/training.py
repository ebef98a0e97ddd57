"""Pretraining from the first step to the last: `fit`, checkpoints, and a watch for trouble."""

import contextlib
import json
import signal
import time

import numpy as np
import tensorflow as tf
from absl import logging

from byol_tf import distribution
from byol_tf.checkpoints import writing
from byol_tf.errors import Preempted
from byol_tf.keras_api import keras
from byol_tf.workdir import write_text

# Of the normalised projections, 1 on a uniform sphere. Healthy runs stay far above.
COLLAPSED_STD = 0.05


class TrainingDiverged(RuntimeError):
    """The loss or a weight is no longer a finite number."""


def train(model, batches_from, *, steps_per_epoch, epochs, max_steps, callbacks, verbose):
    """Trains from the optimizer's step on to the last, exactly `model.fit`'s way.

    Args:
      model: a compiled `BYOL`.
      batches_from: function from a step and a number of steps to the dataset of their batches.
      steps_per_epoch, epochs: of the whole run.
      max_steps: stop there, or None.
      callbacks, verbose: as in `fit`.

    Raises:
      TrainingDiverged: if a callback below finds a loss or a weight that is not finite.
    """
    stop = steps_per_epoch * epochs
    stop = min(stop, max_steps or stop)
    start = int(model.optimizer.iterations.numpy())
    for first, steps, whole_epochs in segments(start, stop, steps_per_epoch):
        epoch = first // steps_per_epoch
        model.fit(
            batches_from(first, steps * whole_epochs),
            initial_epoch=epoch,
            epochs=epoch + whole_epochs,
            steps_per_epoch=steps,
            callbacks=callbacks,
            verbose=verbose,
        )
        if model.stop_training:
            return


def segments(start, stop, steps_per_epoch):
    """Cuts the steps from start to stop into fits of equal epochs.

    A run that resumes or stops amid an epoch has a short one there.

    Yields: (first step, steps an epoch, number of epochs).
    """
    while start < stop:
        epoch_end = (start // steps_per_epoch + 1) * steps_per_epoch
        if start % steps_per_epoch or epoch_end > stop:
            steps, whole_epochs = min(epoch_end, stop) - start, 1
        else:
            steps, whole_epochs = steps_per_epoch, (stop - start) // steps_per_epoch
        yield start, steps, whole_epochs
        start += steps * whole_epochs


class Checkpoints(keras.callbacks.Callback):
    """Saves model and optimizer every few epochs and at the end, never one with a NaN.

    Args:
      manager: a `checkpoints.Manager`.
      every: epochs between two.
    """

    _supports_tf_logs = True

    def __init__(self, manager, every):
        super().__init__()
        self.manager = manager
        self.every = every

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every == 0:
            self.save()

    def on_train_end(self, logs=None):
        self.save()

    def save(self):
        """Saves this step, if the newest checkpoint is not of it."""
        step = int(self.model.optimizer.iterations.numpy())
        latest = self.manager.latest_checkpoint
        if latest and latest.endswith(f"-{step}"):
            return
        for weight in self.model.online_weights + self.model.target_weights:
            if not bool(tf.reduce_all(tf.math.is_finite(weight))):
                raise _diverged(f"the weight {weight.name}", step, latest)
        self.manager.save(checkpoint_number=step)


class StopOnSigterm(keras.callbacks.Callback):
    """Ends the fit after the step in which SIGTERM came, to this process or to any worker.

    The last of the callbacks, so that none of it cuts short a checkpoint of theirs.

    Args: strategy: of `distribution.make_strategy`; its workers agree on the step.
    """

    _supports_tf_logs = True

    def __init__(self, strategy):
        super().__init__()
        self.strategy = strategy
        self._signalled = False
        self._before = signal.getsignal(signal.SIGTERM)

    def on_train_begin(self, logs=None):
        self._before = signal.signal(signal.SIGTERM, self._on_signal)

    def on_train_batch_end(self, batch, logs=None):
        if distribution.any_worker(self.strategy, self._signalled):
            self.model.stop_training = True

    def on_train_end(self, logs=None):
        self.on_train_batch_end(None)  # it may have come since the last step
        if not self._signalled:
            signal.signal(signal.SIGTERM, self._before)

    @contextlib.contextmanager
    def at_once(self):
        """Inside, where a checkpoint is there and long work begins, SIGTERM awaits no step.

        But where workers have to agree on the step.
        """
        if distribution.num_workers(self.strategy) > 1:
            yield
            return
        if self._signalled:
            raise Preempted("stopped by SIGTERM")
        awaiting = signal.signal(signal.SIGTERM, self._before)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, awaiting)

    def _on_signal(self, number, frame):
        self._signalled = True
        signal.signal(number, signal.SIG_IGN)  # the run ends: a second one has nothing to add


class Watch(keras.callbacks.Callback):
    """Logs to metrics.jsonl and TensorBoard, and looks out for collapse and NaN.

    Losses, accuracy, deviation and rank are means since the line before, the other figures
    those of the step; `images_per_second` leaves out the first step, which compiles.

    Args:
      workdir: folder of metrics.jsonl and tensorboard/.
      log_every: steps between two lines; an epoch's last step always has one.
      batch_size: global, in images.
      target_update: a `TargetNetworkUpdate`, to log its tau, or None without target network.
      manager: a `checkpoints.Manager`, to name the last checkpoint in an error.
    """

    _supports_tf_logs = True  # copies the logs to the host only when a line is due

    def __init__(self, workdir, *, log_every, batch_size, target_update, manager):
        super().__init__()
        self.metrics_file = workdir / "metrics.jsonl"
        with writing(workdir):
            self.writer = tf.summary.create_file_writer(str(workdir / "tensorboard"))
        self.log_every = log_every
        self.batch_size = batch_size
        self.target_update = target_update
        self.manager = manager
        self.images_per_second = None
        self._step = 0
        self._timed_steps = 0
        self._started = None
        self._collapsed = False
        self._logged = False
        self._unlogged = None

    def on_train_begin(self, logs=None):
        self._step = int(self.model.optimizer.iterations.numpy())
        self._timed_steps = 0
        self._started = None
        self._forget_later_steps()

    def on_train_batch_begin(self, batch, logs=None):
        if self._logged:  # not at once: Keras still shows the means at the end of an epoch
            self.model.reset_metrics()
            self._logged = False

    def on_train_batch_end(self, batch, logs=None):
        self._step += 1
        if self._started is None:
            self._started = time.perf_counter()
        else:
            self._timed_steps += 1
        self._unlogged = logs
        if self._step % self.log_every == 0:
            self._log(logs)

    def on_epoch_end(self, epoch, logs=None):
        if self._unlogged is not None:
            self._log(self._unlogged)  # Keras begins its means anew

    def on_train_end(self, logs=None):
        self._time()
        with writing(self.metrics_file.parent):
            self.writer.flush()

    def write(self, figures):
        """Writes floats by their names, of the last step, to metrics.jsonl and TensorBoard."""
        with writing(self.metrics_file.parent):
            with self.metrics_file.open("a") as file:
                file.write(json.dumps({"step": self._step, **figures}) + "\n")
            # NumPy's numbers: TensorFlow keeps a tensor of every Python number for ever.
            with self.writer.as_default(step=np.int64(self._step)):
                for name, value in figures.items():
                    tf.summary.scalar(name, np.float32(value))

    def show(self, name, image, step):
        """Writes an image, uint8 [H, W, 3], to TensorBoard."""
        with writing(self.metrics_file.parent), self.writer.as_default(step=step):
            tf.summary.image(name, image[tf.newaxis])
            self.writer.flush()  # to be seen while the first steps run

    def has_logged(self, name):
        """Whether metrics.jsonl has a figure of this name, of the last step."""
        found = read_metrics(self.metrics_file)
        return any(figures["step"] == self._step and name in figures for figures in found)

    @contextlib.contextmanager
    def paused(self):
        """Leaves what happens meanwhile out of `images_per_second`."""
        begun = time.perf_counter()
        yield
        if self._started is not None:
            self._started += time.perf_counter() - begun

    def _forget_later_steps(self):
        """Drops lines of steps that were lost when a run was killed and are done again."""
        lines = _lines(self.metrics_file)
        kept = [line for line in lines if _figures(line)["step"] <= self._step]
        if kept != lines:
            write_text(self.metrics_file, "".join(kept))

    def _time(self):
        if self._timed_steps:
            seconds = time.perf_counter() - self._started
            self.images_per_second = self._timed_steps * self.batch_size / seconds

    def _log(self, logs):
        figures = {name: float(value) for name, value in logs.items()}
        self._logged = True  # the next line begins anew
        self._unlogged = None
        self._time()
        k = np.int64(self._step - 1)  # not a Python number, as in `write`
        if self.target_update is not None:
            figures["target_ema"] = float(self.target_update.tau(k))
        rate = self.model.optimizer.learning_rate
        # LAMB, an optimizer of the old kind, has the schedule here.
        figures["learning_rate"] = float(tf.convert_to_tensor(rate(k) if callable(rate) else rate))
        if self.images_per_second:
            figures["images_per_second"] = self.images_per_second
        if not all(map(_is_finite, figures.values())):
            raise _diverged("the loss", self._step, self.manager.latest_checkpoint)
        self.write(figures)
        if "projection_std" in figures:
            self._look_for_collapse(figures["projection_std"])

    def _look_for_collapse(self, projection_std):
        collapsed = projection_std < COLLAPSED_STD
        if collapsed and not self._collapsed:
            logging.warning(
                "COLLAPSE at step %d: all images get the same projection (projection_std "
                "%.4f; 1 is healthy): raise --base_target_ema or lower --base_learning_rate.",
                self._step,
                projection_std,
            )
        self._collapsed = collapsed


def read_metrics(file):
    """The figures of metrics.jsonl, a dict a line with "step"; lines that are damaged are left out.

    Args: file: its path; where there is none, there are no figures.
    """
    return [found for found in map(_figures, _lines(file)) if found["step"] < float("inf")]


def _lines(file):
    if not file.exists():
        return []
    return file.read_text(errors="replace").splitlines(keepends=True)


def _figures(line):
    """What a line of metrics.jsonl holds; of one that was cut off, a step that never comes."""
    try:
        found = json.loads(line) if line.endswith("\n") else {}
    except ValueError:
        found = {}
    whole = isinstance(found, dict) and isinstance(found.get("step"), int)
    return found if whole else {"step": float("inf")}


def _is_finite(value):
    return abs(value) < float("inf")


def _diverged(what, step, checkpoint):
    return TrainingDiverged(
        f"stopped at step {step}: {what} is not a finite number. The last good checkpoint is "
        f"{checkpoint or 'none yet'}: lower --base_learning_rate or raise --warmup_epochs."
    )
