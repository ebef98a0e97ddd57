"""Checkpoints of DeepMind's: read safely, imported whole, and gone on from."""

import functools
import json
import pathlib
import pickle
import subprocess
import sys
import types
from collections import namedtuple

import numpy as np
import pytest
import tensorflow as tf

import byol_tf
from byol_tf import deepmind
from byol_tf.classifier import linear_classifier
from byol_tf.resnet import BLOCKS_PER_GROUP, mlp, resnet

TINY = pathlib.Path(__file__).parent / "reference" / "pretrain_tiny.pkl"
MAIN = pathlib.Path(__file__).parent.parent / "main.py"
FIELDS = ("online_params", "target_params", "online_state", "target_state", "opt_state")


def tiny_model(num_classes=10, **kwargs):
    model = byol_tf.BYOL(
        resnet((1, 1, 1, 1), (8, 8, 8, 8), bottleneck=False),
        projector_hidden_size=kwargs.get("hidden", 32),
        projector_output_size=16,
        num_classes=num_classes,
    )
    model.compile(byol_tf.LARS(0.1))
    return model


# Importing ----------------------------------------------------------------------------


def test_import_of_the_references_own_file():
    checkpoint = byol_tf.load_deepmind(TINY)
    model = tiny_model()
    byol_tf.import_deepmind(model, checkpoint)
    state = checkpoint["experiment_state"]
    block = "tiny_res_net/~/block_group_2/~/block_0/~/"
    online, momentum = state["online_params"], state["opt_state"][1]["mu"]
    kernel = model.online_encoder.get_layer("group2_block0_1_conv").kernel
    np.testing.assert_array_equal(kernel, online[block + "conv_1"]["w"])
    np.testing.assert_array_equal(momentum_of(model, kernel), momentum[block + "conv_1"]["w"])
    target = model.target_projector.get_layer("target_projector_bn")
    average = state["target_state"]["projector/batch_norm/~/var_ema"]["average"]
    np.testing.assert_array_equal(target.moving_variance, average.reshape(-1))
    np.testing.assert_array_equal(model.classifier.kernel, online["classifier"]["w"])
    assert int(model.optimizer.iterations) == checkpoint["step"] == 30


def momentum_of(model, weight):
    index = [variable is weight for variable in model.trainable_variables].index(True)
    return model.optimizer.momentums[index]


def test_classifier_of_other_classes_starts_anew():
    model = tiny_model(num_classes=3)
    before = model.classifier.get_weights()
    byol_tf.import_deepmind(model, byol_tf.load_deepmind(TINY))
    for one, other in zip(before, model.classifier.get_weights()):
        np.testing.assert_array_equal(one, other)


def test_another_architecture_is_refused_and_nothing_changes():
    model = tiny_model(hidden=33)
    before = model.get_weights()
    with pytest.raises(byol_tf.UserError, match=r"projector_hidden.kernel .* \(8, 32\)"):
        byol_tf.import_deepmind(model, byol_tf.load_deepmind(TINY))
    for one, other in zip(before, model.get_weights()):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(byol_tf.UserError, match="none of resnet18"):
        deepmind.architecture(byol_tf.load_deepmind(TINY))


@functools.cache
def shapes(name, width):
    """The shapes of one network's variables, by our names."""
    encoder = byol_tf.resnet_encoder(name, width_multiplier=width)
    embedding_size = encoder.output_shape[-1]
    heads = [
        mlp("online_projector", embedding_size, [16, 8]),
        mlp("predictor", 8, [16, 8]),
        linear_classifier(embedding_size, num_classes=5),
    ]
    variables = deepmind._variables(encoder, *heads)
    return {key: tuple(variable.shape) for key, variable in variables.items()}


def synthetic(name, width, stem_suffix="", seed=0):
    """Random parameters and state of one network, by haiku's names and in its shapes."""
    rng = np.random.default_rng(seed)
    params, state = {}, {}
    for (layer, weight), shape in shapes(name, width).items():
        module = haiku_name(name, layer, stem_suffix)
        array = rng.uniform(0.1, 1.0, shape).astype(np.float32)
        wide = array.reshape((1,) * (3 if "block" in module or "initial" in module else 1) + shape)
        if weight in ("gamma", "beta"):
            params.setdefault(module, {})[{"gamma": "scale", "beta": "offset"}[weight]] = wide
        elif weight in ("kernel", "bias"):
            params.setdefault(module, {})[{"kernel": "w", "bias": "b"}[weight]] = array
        else:
            ema = {"moving_mean": "mean_ema", "moving_variance": "var_ema"}[weight]
            counter = np.array(9, np.int32)
            module = haiku_name(name, layer)  # the state without the suffix
            state[f"{module}/~/{ema}"] = {"average": wide, "hidden": wide, "counter": counter}
    return params, state


def haiku_name(encoder, layer, stem_suffix=""):
    if layer == "classifier":
        return layer
    head, _, kind = layer.rpartition("_")
    if head in ("projector", "predictor"):
        return f"{head}/" + {"hidden": "linear", "bn": "batch_norm", "outputs": "linear_1"}[kind]
    kind = {"conv": "conv", "bn": "batchnorm"}[kind]
    prefix = f"{encoder.replace('resnet', 'res_net')}/~/"
    if head == "stem":
        return f"{prefix}initial_{kind}{stem_suffix}"
    group, block, which = head.split("_")
    scope = f"{prefix}block_group_{group[-1]}/~/block_{block.removeprefix('block')}/~/"
    return scope + (f"shortcut_{kind}" if which == "shortcut" else f"{kind}_{which}")


@pytest.fixture
def reference_classes(monkeypatch):
    """The reference's classes by their own names, as the published pickles refer to them."""
    names = {
        "byol.byol_experiment": {"_ByolExperimentState": FIELDS},
        "byol.utils.optimizers": {"ScaleByLarsState": ("mu",), "AddWeightDecayState": ()},
        "optax._src.base": {"EmptyState": ()},
    }
    classes = {}
    for package in ("byol", "byol.utils", "optax", "optax._src", "haiku", "haiku._src"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for module, members in names.items():
        fake = types.ModuleType(module)
        for name, fields in members.items():
            classes[name] = namedtuple(name, fields, module=module)
            setattr(fake, name, classes[name])
        monkeypatch.setitem(sys.modules, module, fake)

    class FlatMapping:
        def __init__(self, mapping):
            self.mapping = mapping

        def __reduce__(self):
            return FlatMapping, (self.mapping,)

    fake = types.ModuleType("haiku._src.data_structures")
    FlatMapping.__module__, FlatMapping.__qualname__ = fake.__name__, "FlatMapping"
    fake.FlatMapping = classes["FlatMapping"] = FlatMapping
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return classes


def write_synthetic(path, classes, name, width, stem_suffix=""):
    """Writes a checkpoint of step 7, whose momentum is minus the weights; returns what it holds."""
    online, online_state = synthetic(name, width, stem_suffix)
    target, target_state = synthetic(name, width, stem_suffix, seed=1)
    momentum = {m: {k: -array for k, array in group.items()} for m, group in online.items()}
    flat = classes["FlatMapping"]
    state = classes["_ByolExperimentState"](
        flat(online),
        flat(target),
        flat(online_state),
        flat(target_state),
        (
            classes["AddWeightDecayState"](),
            classes["ScaleByLarsState"](flat(momentum)),
            classes["EmptyState"](),
        ),
    )
    checkpoint = {"experiment_state": state, "step": 7, "rng": np.zeros(2, np.uint32)}
    path.write_bytes(pickle.dumps(checkpoint, protocol=2))
    return online, online_state, target, target_state


@pytest.mark.parametrize(
    "name, width, stem_suffix",
    [("resnet34", 1 / 32, ""), ("resnet50", 1 / 16, "_1"), ("resnet200", 1 / 32, "_1")],
)
def test_import_of_made_up_files(tmp_path, reference_classes, name, width, stem_suffix):
    """From the file to the model, where the published ones may name the stem with _1."""
    file = tmp_path / "pretrain.pkl"
    online, online_state, target, target_state = write_synthetic(
        file, reference_classes, name, width, stem_suffix
    )
    checkpoint = byol_tf.load_deepmind(file)
    found = deepmind.architecture(checkpoint)
    sizes = {"projector_hidden_size": 16, "projector_output_size": 8, "num_classes": 5}
    given = {"encoder": name, "width_multiplier": width, "stem": "imagenet", "channels": 3}
    assert found == {**given, **sizes}
    encoder = byol_tf.resnet_encoder(name, width_multiplier=width)
    model = byol_tf.BYOL(encoder, random_target=True, **sizes)
    model.compile(byol_tf.LARS(0.1))
    byol_tf.import_deepmind(model, checkpoint)
    last = BLOCKS_PER_GROUP[name][2] - 1
    for layer in ("stem", "group0_block0_1", f"group2_block{last}_0", "group3_block0_shortcut"):
        conv, bn = f"{layer}_conv", f"{layer}_bn"
        for network, params, state in (
            (model.online_encoder, online, online_state),
            (model.target_encoder, target, target_state),
        ):
            kernel = params[haiku_name(name, conv, stem_suffix)]["w"]
            np.testing.assert_array_equal(network.get_layer(conv).kernel, kernel)
            variance = state[f"{haiku_name(name, bn)}/~/var_ema"]["average"]
            moving = network.get_layer(bn).moving_variance
            np.testing.assert_array_equal(moving, variance.reshape(-1))
        np.testing.assert_array_equal(
            momentum_of(model, encoder.get_layer(conv).kernel),
            -online[haiku_name(name, conv, stem_suffix)]["w"],
        )


def test_an_odd_tree_takes_one_line():
    params, _ = synthetic("resnet18", 1 / 16)
    for spoil, message in (
        (lambda: params.pop("classifier"), "no classifier.kernel"),
        (lambda: params.update(classifier=3), "no array at classifier,"),
        (lambda: params.update(classifier={"w": None}), "no array at classifier/w"),
        (params.clear, "none of resnet18"),
    ):
        spoil()
        with pytest.raises(byol_tf.UserError, match=message):
            deepmind.architecture({"experiment_state": {"online_params": params}})


def run_main(workdir, *arguments):
    command = [sys.executable, str(MAIN), f"--workdir={workdir}", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_command_line(tmp_path, reference_classes):
    """Import, then evaluation, export and further pretraining; a conflict takes one line."""
    file, workdir = tmp_path / "pretrain.pkl", tmp_path / "run"
    online, *_ = write_synthetic(file, reference_classes, "resnet18", 1 / 16)
    task = ["--task=import_deepmind", f"--checkpoint={file}"]
    for flag in ("--encoder=resnet50", "--channels=1"):
        done = run_main(workdir, *task, flag)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(f"error: {flag}:")
    done = run_main(workdir, *task, "--num_classes=8")
    assert done.returncode == 0, done.stderr
    assert "--encoder=resnet18" in (workdir / "flags.txt").read_text()
    data = "--dataset=image_folder", f"--data_dir={folder_of_images(tmp_path)}", "--image_size=32"
    splits = "--train_split=train", "--eval_split=train"
    done = run_main(workdir, "--task=knn,linear_probe,export", *data, *splits)
    assert done.returncode == 0, done.stderr
    assert (workdir / "saved_model").is_dir()
    results = json.loads((workdir / "results.json").read_text())
    assert {"knn_top1", "probe_top1"} <= results.keys()
    rate_zero = "--batch_size=8", "--epochs=1", "--base_learning_rate=0"
    done = run_main(workdir, "--task=pretrain", *rate_zero, *data, *splits)
    assert done.returncode == 0, done.stderr
    results = json.loads((workdir / "results.json").read_text())
    assert "knn_top1" not in results  # that was of other weights
    assert (results["imported_step"], results["steps"]) == (7, 2)
    kernel = restored_encoder(workdir).get_layer("group3_block1_1_conv").kernel
    name = haiku_name("resnet18", "group3_block1_1_conv")
    np.testing.assert_array_equal(kernel, online[name]["w"])


@pytest.mark.slow
def test_fine_tuning_on_the_command_line(tmp_path, reference_classes):
    """A supervised run starts from the imported encoder, and then from its own checkpoints."""
    file, workdir = tmp_path / "pretrain.pkl", tmp_path / "run"
    online, *_ = write_synthetic(file, reference_classes, "resnet18", 1 / 16)
    task = ["--task=import_deepmind", f"--checkpoint={file}", "--keep_step"]
    refused = run_main(workdir, *task, "--method=supervised")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("error: --method=supervised:")
    assert run_main(workdir, *task).returncode == 0
    assert latest_checkpoint(workdir).endswith("-7")
    data = "--dataset=image_folder", f"--data_dir={folder_of_images(tmp_path)}", "--image_size=32"
    tune = "--task=pretrain", "--method=supervised", "--batch_size=8", "--epochs=1"
    still = "--base_learning_rate=0", "--weight_decay=0", "--warmup_epochs=0"
    done = run_main(workdir, *tune, *still, *data, "--max_steps=1")
    assert done.returncode == 0, done.stderr
    assert "fine-tuning the encoder" in done.stderr
    done = run_main(workdir, "--task=pretrain")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    assert latest_checkpoint(workdir).endswith("-2")
    np.testing.assert_array_equal(
        restored_encoder(workdir).get_layer("group3_block1_1_conv").kernel,
        online[haiku_name("resnet18", "group3_block1_1_conv")]["w"],
    )


def latest_checkpoint(workdir):
    return tf.train.latest_checkpoint(str(workdir / "checkpoints"))


def restored_encoder(workdir):
    """The ResNet-18 of a run's last checkpoint."""
    encoder = byol_tf.resnet_encoder("resnet18", width_multiplier=1 / 16)
    restored = tf.train.Checkpoint(model=tf.train.Checkpoint(online_encoder=encoder))
    restored.restore(latest_checkpoint(workdir)).expect_partial()
    return encoder


def folder_of_images(tmp_path):
    """Two images of each of eight classes, in train/CLASS/NUMBER.png."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 2, 40, 40, 3), np.uint8)
    for i, images in enumerate(pixels):
        for j, image in enumerate(images):
            path = tmp_path / "images" / "train" / f"class{i}" / f"{j}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tf.io.encode_png(image).numpy())
    return tmp_path / "images"


# Pickles that would run code ------------------------------------------------------------


EVIL = {
    "os.system": lambda p: b"\x80\x02cos\nsystem\nX%c\0\0\0touch %s\x85R." % (len(p) + 6, p),
    "posix.system": lambda p: b"cposix\nsystem\n(S'touch %s'\ntR." % p,
    "builtins.eval": lambda p: b'cbuiltins\neval\n(S\'open("%s", "w")\'\ntR.' % p,
    "__builtin__.eval": lambda p: b'c__builtin__\neval\n(S\'open("%s", "w")\'\ntR.' % p,
    "builtins.getattr": lambda p: b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.",
    "builtins.exec": lambda p: b'(S\'open("%s", "w")\'\nibuiltins\nexec\n.' % p,
    "subprocess.Popen": lambda p: b"csubprocess\nPopen\n((S'touch'\nS'%s'\nltR." % p,
    "numpy.load": lambda p: b"cnumpy\nload\n(S'%s'\ntR." % p,
    "numpy.f2py.compile": lambda p: b"cnumpy.f2py\ncompile\n(S''\ntR.",
    "numpy.ndarray.tofile": lambda p: b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
    "numpy.testing._private.utils.runstring": lambda p: (
        b'cnumpy.testing._private.utils\nrunstring\n(S\'open("%s", "w")\'\n}tR.' % p
    ),
    "copyreg._reconstructor": lambda p: b"ccopyreg\n_reconstructor\n(cbuiltins\nobject\nNtR.",
    "dill._dill._import_module": lambda p: b"cdill._dill\n_import_module\n(S'os.system'\ntR.",
    "dill._dill._create_function": lambda p: b"cdill._dill\n_create_function\n(tR.",
    "dill._dill._get_attr": lambda p: b"cdill._dill\n_get_attr\n(tR.",
    "dill._dill._eval_repr": lambda p: b"cdill._dill\n_eval_repr\n(S'1'\ntR.",
    "jax.os.system": lambda p: b"cjax.os\nsystem\n(S'touch %s'\ntR." % p,
    "byol.os.system": lambda p: b"cbyol.os\nsystem\n(S'touch %s'\ntR." % p,
    "codec 'bz2'": lambda p: b"c_codecs\nencode\n(S'x'\nS'bz2'\ntR.",
    "dtype 'O'": lambda p: b"cnumpy\ndtype\n(S'O'\ntR.",
}


@pytest.mark.parametrize("name", EVIL)
def test_malicious_pickles_are_refused_by_name(name, tmp_path):
    file, trace = tmp_path / "evil.pkl", tmp_path / "trace"
    file.write_bytes(EVIL[name](str(trace).encode()))
    with pytest.raises(byol_tf.UserError, match="refused") as error:
        byol_tf.load_deepmind(file)
    assert name in str(error.value) and "\n" not in str(error.value)
    assert not trace.exists()


def test_admitted_functions_cannot_be_changed(tmp_path):
    """BUILD sets attributes of whatever is on the stack."""
    file = tmp_path / "evil.pkl"
    # numpy.dtype with the state (None, {"__defaults__": None}).
    file.write_bytes(b"\x80\x02cnumpy\ndtype\nN}X\x0c\0\0\0__defaults__Ns\x86b.")
    with pytest.raises(byol_tf.UserError, match="not a BYOL checkpoint"):
        byol_tf.load_deepmind(file)


OTHERS = [b"", b"junk", pickle.dumps([1]), pickle.dumps({"step": 1}), TINY.read_bytes()[:9999]]


@pytest.mark.parametrize("content", OTHERS)
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "file.pkl").write_bytes(content)
    with pytest.raises(byol_tf.UserError, match="not a "):
        byol_tf.load_deepmind(tmp_path / "file.pkl")
    with pytest.raises(byol_tf.UserError, match="No such file"):
        byol_tf.load_deepmind(tmp_path / "absent.pkl")
