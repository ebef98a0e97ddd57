"""LARS, the paper's optimizer (section 3.3), and the others that can be chosen instead."""

import tensorflow as tf

from byol_tf.errors import UserError
from byol_tf.keras_api import keras

# Biases and batch normalisation: neither decayed nor, by LARS, rescaled.
_NOT_DECAYED = ["bias", "gamma", "beta"]


@keras.utils.register_keras_serializable("byol_tf")
class LARS(keras.optimizers.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) as the paper uses it.

    For every weight w with gradient g:

        g <- g + weight_decay * w
        g <- g * trust_coefficient * ||w|| / ||g||     (factor 1 where a norm is 0)
        m <- momentum * m + g
        w <- w - learning_rate * m

    Variables of rank 0 and 1 (biases, BN scale and offset) skip the first two lines.

    Args:
      learning_rate: a float or a `LearningRateSchedule`.
      weight_decay: float, L2 coefficient, 1.5e-6 in the paper.
      momentum: float, 0.9 in the paper.
      trust_coefficient: float, eta, 1e-3 in the paper.
    """

    def __init__(
        self,
        learning_rate=0.2,
        weight_decay=1.5e-6,
        momentum=0.9,
        trust_coefficient=1e-3,
        name="LARS",
        **kwargs,
    ):
        # Keras' own weight decay stays off: it would act after the scaling.
        super().__init__(name=name, **kwargs)
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.l2 = weight_decay
        self.momentum = momentum
        self.trust_coefficient = trust_coefficient

    def build(self, var_list):
        super().build(var_list)
        if getattr(self, "momentums", None):
            return
        self.momentums = [self.add_variable_from_reference(variable, "m") for variable in var_list]

    def update_step(self, gradient, variable):
        momentum = self.momentums[self._index_dict[self._var_key(variable)]]
        gradient = tf.convert_to_tensor(gradient)  # adds up sparse rows, if there are any
        if variable.shape.rank > 1:
            gradient += self.l2 * variable
            gradient *= self._trust_ratio(variable, gradient)
        momentum.assign(self.momentum * momentum + gradient)
        variable.assign_sub(tf.cast(self.learning_rate, variable.dtype) * momentum)

    def _trust_ratio(self, variable, gradient):
        weight_norm, gradient_norm = tf.norm(variable), tf.norm(gradient)
        ratio = self.trust_coefficient * weight_norm / gradient_norm
        return tf.where((weight_norm > 0) & (gradient_norm > 0), ratio, 1.0)

    def get_config(self):
        config = super().get_config()
        config.update(
            learning_rate=self._serialize_hyperparameter(self._learning_rate),
            weight_decay=self.l2,
            momentum=self.momentum,
            trust_coefficient=self.trust_coefficient,
        )
        return config


OPTIMIZERS = ("lars", "sgd", "adam", "lamb")


def make_optimizer(name, learning_rate, weight_decay):
    """Builds an optimizer by name; biases and BN are never decayed.

    LARS as above. "sgd" (momentum 0.9) and "adam" decay the weights apart from the
    gradient, as Keras does. "lamb" comes from TensorFlow Addons.

    Args:
      name: one of `OPTIMIZERS`.
      learning_rate: a float or a `LearningRateSchedule`.
      weight_decay: float, of weights of rank 2 and more.

    Returns: a Keras optimizer.

    Raises:
      ValueError: for an unknown name.
      UserError: for "lamb" where TensorFlow Addons is absent.
    """
    if name == "lars":
        return LARS(learning_rate, weight_decay)
    if name == "lamb":
        return _lamb(learning_rate, weight_decay)
    if name == "sgd":
        optimizer = keras.optimizers.SGD(learning_rate, momentum=0.9, weight_decay=weight_decay)
    elif name == "adam":
        optimizer = keras.optimizers.Adam(learning_rate, weight_decay=weight_decay)
    else:
        raise ValueError(f"optimizer={name!r}: choose one of {', '.join(OPTIMIZERS)}.")
    optimizer.exclude_from_weight_decay(var_names=_NOT_DECAYED)
    return optimizer


def _lamb(learning_rate, weight_decay):
    try:
        import tensorflow_addons as tfa
    except ImportError as error:
        raise UserError(
            "--optimizer=lamb needs TensorFlow Addons, which exists for Python 3.10 and 3.11 "
            "only: use one of those, or --optimizer=lars."
        ) from error
    return tfa.optimizers.LAMB(
        learning_rate,
        weight_decay=weight_decay,
        exclude_from_weight_decay=_NOT_DECAYED,
    )


def build_optimizer(optimizer, variables):
    """Makes the slots of an optimizer at once, so that a checkpoint finds them."""
    # LAMB is an optimizer of the old kind, in which the same has another name.
    build = getattr(optimizer, "build", None) or optimizer._create_all_weights
    build(variables)
