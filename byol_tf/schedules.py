"""How the learning rate and the target EMA change over training (sections 3.2 and 3.3)."""

import math

import tensorflow as tf

from byol_tf.keras_api import keras


def target_ema(step, base_target_ema, total_steps):
    """tau_k = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2, float32 (paper, section 3.2).

    From step K on it is 1.

    Args: step: k, int scalar counted from 0. base_target_ema: tau_base. total_steps: K.
    """
    progress = tf.minimum(tf.cast(step, tf.float32) / float(total_steps), 1.0)
    return 1.0 - (1.0 - base_target_ema) * (tf.cos(math.pi * progress) + 1.0) / 2.0


class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from 0, then a cosine decay to 0 (paper, section 3.3).

    Args:
      peak: float, learning rate at the end of the warm-up: base rate * global batch / 256.
      total_steps: int, the step at which the rate reaches 0.
      warmup_steps: int, length of the warm-up, 10 epochs in the paper.

    Called with a step, an int scalar counted from 0, it returns a float32 scalar.
    """

    def __init__(self, peak, total_steps, warmup_steps=0):
        self.peak = peak
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps

    def __call__(self, step):
        step = tf.cast(step, tf.float32)
        warmup = self.peak * step / max(self.warmup_steps, 1)
        decay_steps = max(self.total_steps - self.warmup_steps, 1)
        progress = tf.minimum((step - self.warmup_steps) / decay_steps, 1.0)
        cosine = self.peak * (tf.cos(math.pi * progress) + 1.0) / 2.0
        return tf.where(step < self.warmup_steps, warmup, cosine)

    def get_config(self):
        return {
            "peak": self.peak,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
        }
