"""The slow half of BYOL: the target network follows the online one (section 3.1)."""

import tensorflow as tf

from byol_tf.keras_api import keras
from byol_tf.schedules import target_ema


class TargetNetworkUpdate(keras.callbacks.Callback):
    """Moves the target weights after every optimizer step.

    target += (1 - tau_k) (online - target), with tau_k rising from `base_target_ema` at
    the first step to 1 at the last (paper, section 3.2). Only weights move: the target
    keeps its own batch statistics. Each replica updates its own copy, all in one compiled
    call that reads the step from the optimizer, so nothing travels to the host.

    Args:
      base_target_ema: tau of the first step (0.996 in the paper for 1000 epochs, 0.99 for
        300 and fewer). 1 never moves the target, 0 copies the online weights at first.
      total_steps: K, over which tau rises; by default all steps of `fit`, which must then
        know its number of steps an epoch.
      constant: keep tau at `base_target_ema`; the paper does so for tau = 0 (table 5a).

    Raises:
      ValueError: if `base_target_ema` is not in [0, 1], K cannot be known, or a fit begins
        after it, when the target would no longer move.
    """

    # Without this Keras copies the logs of every step to the host.
    _supports_tf_logs = True

    def __init__(self, base_target_ema=0.996, total_steps=None, constant=False):
        super().__init__()
        if not 0.0 <= base_target_ema <= 1.0:
            raise ValueError(f"base_target_ema={base_target_ema}: must be in [0, 1].")
        self.base_target_ema = base_target_ema
        self.total_steps = total_steps
        self.constant = constant
        self._update = None
        self._updated_model = None

    def tau(self, step):
        """tau_k of a step k, counted from 0: float32 scalar."""
        if self.constant:
            return tf.constant(self.base_target_ema)
        return target_ema(step, self.base_target_ema, self.total_steps)

    def on_train_begin(self, logs=None):
        if self.total_steps is None and not self.constant:
            if not self.params.get("steps"):
                raise ValueError(
                    "TargetNetworkUpdate cannot tell how many steps this fit takes: give it "
                    "total_steps=, or give fit steps_per_epoch=."
                )
            self.total_steps = self.params["steps"] * self.params["epochs"]
        step = int(self.model.optimizer.iterations.numpy())
        if not self.constant and step >= self.total_steps:
            raise ValueError(
                f"This fit begins at step {step}, past the {self.total_steps} steps over which tau "
                "rises: give TargetNetworkUpdate total_steps=, of all fits together."
            )
        if self._updated_model is not self.model:  # compiled once, not for every fit
            self._updated_model = self.model
            self._update = self._compiled_update()

    def on_train_batch_end(self, batch, logs=None):
        self._update()

    def _compiled_update(self):
        iterations = self.model.optimizer.iterations
        pairs = self.model.target_pairs
        strategy = self.model.distribute_strategy
        # On a CPU XLA moves a weight in one pass over the memory instead of three.
        fused = strategy.num_replicas_in_sync == 1 and bool(pairs) and "CPU" in pairs[0][0].device

        @tf.function(jit_compile=fused)
        def update():
            # The optimizer has counted this step already; k counts from 0.
            rate = 1.0 - self.tau(iterations - 1)
            for target, online in pairs:
                strategy.extended.update(target, _move_towards, args=(online, rate))

        return update


def _move_towards(target, online, rate):
    target.assign_add(tf.cast(rate, target.dtype) * (online - target))
