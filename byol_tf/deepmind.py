"""DeepMind's BYOL checkpoints: read without running the code in them, and imported.

The reference (deepmind-research, folder byol) writes pickles of haiku's parameters with dill.
Neither dill nor jax, haiku or optax is needed here. What stays different after the import is
listed in docs/deepmind.md.
"""

import pickle
import re

import numpy as np
from absl import logging

from byol_tf.errors import UserError
from byol_tf.optimizers import LARS
from byol_tf.resnet import BASIC, BLOCKS_PER_GROUP

_STATE = ("online_params", "target_params", "online_state", "target_state", "opt_state")


def load_deepmind(path):
    """Reads a checkpoint of DeepMind's pretraining, as published or written by its code.

    Args: path: the file, such as pretrain_res50x1.pkl. Needs memory of 1.4 times its size.

    Returns:
      A dict of dicts, lists and NumPy arrays: "step" and "experiment_state", in that
      "online_params" and the other fields of the reference's _ByolExperimentState.

    Raises:
      UserError: if the file cannot be read, is another pickle, or asks for anything but
        arrays and the containers of such a checkpoint; nothing of it has run then.
    """
    try:
        with open(path, "rb") as file:
            checkpoint = _plain(_Unpickler(file).load())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"{path}: not a BYOL checkpoint ({type(error).__name__}: {error})."
        ) from error
    state = checkpoint.get("experiment_state") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or set(_STATE) - set(state) or "step" not in checkpoint:
        raise UserError(
            f"{path}: not a checkpoint of BYOL's pretraining, which has a step and an "
            f"experiment_state of {', '.join(_STATE)}."
        )
    return checkpoint


def architecture(checkpoint):
    """Finds the networks of a checkpoint from the shapes in it.

    Returns:
      A dict of the flags encoder, width_multiplier, stem, channels, projector_hidden_size and
      projector_output_size, and of num_classes, that of the online classifier.

    Raises:
      UserError: if the encoder is none of `resnet.BLOCKS_PER_GROUP`, or a weight is missing.
    """
    state = checkpoint["experiment_state"]
    shapes = {key: array.shape for key, array in _weights(state["online_params"]).items()}
    try:
        blocks = tuple(
            len({layer for layer, _ in shapes if re.fullmatch(rf"group{g}_block\d+_0_conv", layer)})
            for g in range(4)
        )
        basic = ("group0_block0_2_conv", "kernel") not in shapes
        return {
            "encoder": next(
                name
                for name, of_name in BLOCKS_PER_GROUP.items()
                if of_name == blocks and (name in BASIC) == basic
            ),
            "width_multiplier": shapes["stem_conv", "kernel"][-1] / 64,
            "stem": "imagenet",
            "channels": shapes["stem_conv", "kernel"][2],
            "projector_hidden_size": shapes["projector_outputs", "kernel"][0],
            "projector_output_size": shapes["projector_outputs", "kernel"][1],
            "num_classes": shapes["classifier", "kernel"][1],
        }
    except KeyError as error:
        raise UserError(
            f"the checkpoint's online network has no {'.'.join(error.args[0])}."
        ) from error
    except (StopIteration, IndexError) as error:
        raise UserError(
            f"the checkpoint's encoder, with {blocks} blocks a group, is none of "
            f"{', '.join(BLOCKS_PER_GROUP)}: build the model yourself and call "
            "byol_tf.import_deepmind."
        ) from error


def import_deepmind(model, checkpoint):
    """Puts a checkpoint's weights, BN statistics, momentum and step into a model.

    The classifier stays as it is where it has another number of classes. Momentum and step
    are set where the model is compiled with `byol_tf.LARS`, as the reference always is.

    Args:
      model: a `byol_tf.BYOL` of the checkpoint's architecture around a `byol_tf` ResNet.
      checkpoint: from `load_deepmind`.

    Raises:
      UserError: names the first weight that is missing, unknown or of another shape;
        nothing has changed then.
    """
    state = checkpoint["experiment_state"]
    online = _variables(
        model.online_encoder, model.online_projector, model.predictor, model.classifier
    )
    target = _variables(model.target_encoder, model.target_projector)
    online_weights = _weights(state["online_params"], state["online_state"])
    target_weights = _weights(state["target_params"], state["target_state"])
    # The reference averages these too, and uses them nowhere.
    unused = ("predictor_hidden", "predictor_bn", "predictor_outputs", "classifier")
    target_weights = {key: a for key, a in target_weights.items() if key[0] not in unused}

    if _has_other_classes(model.classifier, online_weights):
        logging.info("the classifier starts anew: the checkpoint's has other classes")
        online = {key: v for key, v in online.items() if key[0] != "classifier"}
        online_weights = {key: a for key, a in online_weights.items() if key[0] != "classifier"}

    pairs = _pairs(online, online_weights, "online") + _pairs(target, target_weights, "target")
    lars = model.optimizer if isinstance(getattr(model, "optimizer", None), LARS) else None
    if lars is not None:
        pairs += _momentum_pairs(model, online, state["opt_state"])
    for variable, array in pairs:
        variable.assign(array)
    if lars is not None:
        lars.iterations.assign(int(checkpoint["step"]))


def _has_other_classes(classifier, weights):
    kernel = weights.get(("classifier", "kernel"))
    return classifier is None or kernel is None or kernel.shape[-1] != classifier.units


def _momentum_pairs(model, online, opt_state):
    """(momentum variable, array) for what the model trains; LARS' state is called mu."""
    states = [part for part in opt_state if isinstance(part, dict) and "mu" in part]
    if not states:
        raise UserError("the checkpoint's opt_state has no momentum (mu).")
    arrays = states[0]["mu"]
    with model.distribute_strategy.scope():
        model.optimizer.build(model.trainable_variables)
    momenta = {
        variable.ref(): momentum
        for variable, momentum in zip(model.trainable_variables, model.optimizer.momentums)
    }
    trained = {key: momenta[v.ref()] for key, v in online.items() if v.ref() in momenta}
    arrays = {key: array for key, array in _weights(arrays).items() if key in trained}
    return _pairs(trained, arrays, "momentum")


# Haiku's names and ours ---------------------------------------------------------------

_BLOCK = r".*/block_group_(\d)/~/block_(\d+)/~/"
_LAYERS = {
    # With _1 where a ResNet has made the one that it inherits anew.
    r".*/initial_conv(_1)?": "stem_conv",
    r".*/initial_batchnorm(_1)?": "stem_bn",
    _BLOCK + r"conv_(\d)": r"group\1_block\2_\3_conv",
    _BLOCK + r"batchnorm_(\d)": r"group\1_block\2_\3_bn",
    _BLOCK + r"shortcut_conv": r"group\1_block\2_shortcut_conv",
    _BLOCK + r"shortcut_batchnorm": r"group\1_block\2_shortcut_bn",
    r"(projector|predictor)/linear": r"\1_hidden",
    r"(projector|predictor)/batch_norm": r"\1_bn",
    r"(projector|predictor)/linear_1": r"\1_outputs",
    r"classifier": "classifier",
}
_PARAMETERS = {"w": "kernel", "b": "bias", "scale": "gamma", "offset": "beta"}
_STATISTICS = {"mean_ema": "moving_mean", "var_ema": "moving_variance"}


def _layer_name(module):
    """ "res_net50/~/block_group_0/~/block_1/~/conv_2" -> "group0_block1_2_conv"."""
    for pattern, name in _LAYERS.items():
        match = re.fullmatch(pattern, module)
        if match:
            return match.expand(name)
    return module  # which no layer of ours is called: `_pairs` complains


def _weights(params, state=None):
    """The arrays of one network by our names: {(layer, weight): array}."""
    weights = {}
    for module, name, array in _leaves(params):
        weights[_layer_name(module), _PARAMETERS.get(name, name)] = array
    for module, name, array in _leaves(state or {}):
        module, _, statistic = module.rpartition("/~/")
        if name == "average":  # debiased: what haiku normalises with in evaluation
            weights[_layer_name(module), _STATISTICS.get(statistic, statistic)] = array
    one_a_channel = ("gamma", "beta", *_STATISTICS.values())  # [1, 1, 1, C] in haiku
    return {
        key: array.reshape(-1) if key[1] in one_a_channel else array
        for key, array in weights.items()
    }


def _leaves(tree, path=()):
    """(module, name, array) of haiku's {module: {name: array}}."""
    if isinstance(tree, dict):
        for key, node in tree.items():
            yield from _leaves(node, (*path, str(key)))
    elif isinstance(tree, np.ndarray) and len(path) == 2:
        yield *path, tree
    else:
        where = "/".join(path) or "a network"
        raise UserError(f"the checkpoint has no array at {where}, by module and name.")


def _variables(*parts):
    """The variables of Keras models and layers: {(layer, weight): variable}."""
    variables = {}
    for part in parts:
        for layer in getattr(part, "layers", [part]):
            for weight in (*_PARAMETERS.values(), *_STATISTICS.values()):
                variable = getattr(layer, weight, None)
                if variable is not None:
                    name = re.sub("^(online|target)_", "", layer.name)
                    variables[name, weight] = variable
    return variables


def _pairs(variables, weights, network):
    """(variable, array) of two dicts with the same keys and shapes; UserError otherwise."""
    for layer, weight in sorted(variables.keys() ^ weights.keys()):
        where = "the checkpoint" if (layer, weight) in weights else "the model"
        raise UserError(f"only {where} has {layer}.{weight} in its {network} network.")
    for (layer, weight), variable in variables.items():
        shape = weights[layer, weight].shape
        if shape != tuple(variable.shape):
            raise UserError(
                f"{layer}.{weight} of the {network} network is {shape} in the checkpoint and "
                f"{tuple(variable.shape)} in the model."
            )
    return [(variable, weights[key]) for key, variable in variables.items()]


# A pickle is code: this reads one and runs nothing of it ---------------------------------

# Fields of the named tuples that pickle, unlike dill, knows by their names only.
_NAMED_TUPLES = {
    "_ByolExperimentState": _STATE,
    "ScaleByLarsState": ("mu",),
    "AddWeightDecayState": (),
    "EmptyState": (),
    "ScaleState": (),
    "TraceState": ("trace",),
    "ScaleByScheduleState": ("count",),
}


class _Unpickler(pickle.Unpickler):
    """Refuses every name but those below, and imports none of those either.

    Each stands for a method that makes plain dicts and arrays in the making. Methods, and
    not functions, because a pickle may set attributes of what it is given, such as a
    function's defaults, which a method refuses. What reaches a `__dict__` is never read.
    """

    def find_class(self, module, name):
        if name in _NAMED_TUPLES and module.split(".")[0] in ("byol", "optax"):
            return _named_tuple(_NAMED_TUPLES[name])
        admitted = {
            "numpy.ndarray": None,
            "numpy.dtype": self._dtype,
            "numpy.core.multiarray._reconstruct": self._empty_array,
            "numpy._core.multiarray._reconstruct": self._empty_array,
            "numpy.core.multiarray.scalar": self._scalar,
            "numpy._core.multiarray.scalar": self._scalar,
            "_codecs.encode": self._encode,
            "jax._src.device_array.reconstruct_device_array": self._array,
            "jax._src.array._reconstruct_array": self._array,
            "dill._dill._create_array": self._array,
            "dill._dill._create_namedtuple": self._named_tuple,
            "haiku._src.data_structures.frozendict": self._mapping,
            "haiku._src.data_structures.FlatMapping": self._mapping,
            "haiku._src.data_structures.FlatMap": self._mapping,
            "haiku._src.data_structures.to_immutable_dict": self._mapping,
            "haiku._src.data_structures.to_haiku_dict": self._mapping,
            "collections.OrderedDict": self._mapping,
        }
        if f"{module}.{name}" not in admitted:
            raise UserError(
                f"refused: it asks for {module}.{name}, which has no place in a BYOL checkpoint."
            )
        return admitted[f"{module}.{name}"]

    def _dtype(self, code, *_):
        return _Dtype(code)

    def _empty_array(self, *_):
        return _Array()

    def _array(self, _reconstruct, _arguments, state, *_):
        array = _Array()
        array.__setstate__(state)
        return array

    def _scalar(self, dtype, data):
        return self._array(None, None, (1, (), dtype, False, data))

    def _encode(self, text, encoding):
        if encoding != "latin1":  # how protocol 2 holds bytes; others can run a decompressor
            raise UserError(f"refused: it asks for the codec {encoding!r}.")
        return text.encode("latin1")

    def _named_tuple(self, _name, fields, *_):
        return _named_tuple(fields)

    def _mapping(self, *items):
        return dict(*items)


def _named_tuple(fields):
    """A class whose instances are dicts."""

    class NamedTuple:
        def __new__(cls, *values):
            return dict(zip(fields, values))

    return NamedTuple


class _Dtype:
    """A dtype of plain numbers. NumPy's own would let a pickle set its inner flags."""

    def __init__(self, code):
        if not re.fullmatch("[<>=|]?[fiub][1248]", code):
            raise UserError(f"refused: it holds an array of dtype {code!r}.")
        self.value = np.dtype(code)

    def __setstate__(self, state):
        self.value = self.value.newbyteorder(state[1])


class _Array:
    """An array whose value comes with its state."""

    value = None

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, data = state
        order = "F" if is_fortran else "C"
        self.value = np.frombuffer(data, dtype.value).reshape(shape, order=order)


def _plain(node):
    """The same tree, of dicts, lists and arrays only."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_plain(value) for value in node]
    return node.value if isinstance(node, _Array) else node
