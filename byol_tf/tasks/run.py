"""The run in --workdir, as its flags and checkpoints tell: what the tasks share."""

import contextlib
import functools
import pathlib
import sys

import tensorflow as tf
from absl import flags

from byol_tf import checkpoints, distribution, evaluation, resnet, workdir
from byol_tf.data import subset, views
from byol_tf.data.source import load_source
from byol_tf.errors import NoSplit, UserError
from byol_tf.keras_api import keras

FLAGS = flags.FLAGS
# What results.json says of the encoder of `evaluated_step`, and of no other.
_FIGURES = (
    *("knn_top1", "knn200_top1", "probe_top1", "linear_top1", "linear_top5", "linear_eval"),
    *("finetune", "segmentation", "depth", "evaluated_step"),
)


def folder():
    """The path of --workdir."""
    return pathlib.Path(FLAGS.workdir).expanduser()


def strategy():
    """Of --strategy; the first thing that a process asks for."""
    return distribution.make_strategy(FLAGS.strategy, FLAGS.tpu)


def local_strategy():
    """The strategy of a task that the chief does alone: with this machine's devices."""
    if distribution.num_workers(strategy()) > 1:
        return tf.distribute.get_strategy()
    return strategy()


def verbosity():
    """A bar where someone watches, else a line an epoch; nothing from those who do not write."""
    if not distribution.is_chief(strategy()):
        return 0
    return 1 if sys.stdout.isatty() else 2


def source(split, dataset=None):
    """The `Source` of a split of --dataset, or of another data set of --data_dir."""
    try:
        dataset = dataset or FLAGS.dataset
        flag = "dataset" if dataset == FLAGS.dataset else "finetune_dataset"
        return _load_source(dataset, split, FLAGS.data_dir, FLAGS.channels, flag=flag)
    except NoSplit as error:
        raise UserError(f"{split_flag(split)}: {error}") from error


@functools.lru_cache(maxsize=None)
def labels(split, dataset=None):
    """`subset.read_labels` of a `source`: of what is streamed, that reads all records."""
    return subset.read_labels(source(split, dataset))


def split_flag(split):
    """Where a split is from, as in "--train_split=train"."""
    names = ("train_split", "eval_split", "embed_split")
    return next(f"--{name}={split}" for name in names if FLAGS[name].value == split)


_load_source = functools.lru_cache(maxsize=None)(load_source)


def manager(checkpoint=None):
    """The `checkpoints.Manager` of the workdir; with a `tf.train.Checkpoint` it can save."""
    return checkpoints.Manager(checkpoint, folder() / "checkpoints", FLAGS.keep_checkpoints)


def chosen_checkpoint():
    """The path of the checkpoint of --use_checkpoint."""
    if FLAGS.use_checkpoint == "best":
        return manager().best_whole()
    return manager().newest_whole()


def encoder():
    """A new encoder of the flags."""
    return resnet.resnet_encoder(
        FLAGS.encoder,
        width_multiplier=FLAGS.width_multiplier,
        stem=FLAGS.stem,
        image_size=FLAGS.image_size,
        channels=FLAGS.channels,
    )


def trained_encoder():
    """The online encoder of the checkpoint of --use_checkpoint, in float32."""
    with policy("float32"):
        trained = encoder()
    load_encoder(trained, chosen_checkpoint())
    return trained


def random_encoder():
    """The encoder as it was before the first step, in float32: the first thing drawn."""
    keras.utils.set_random_seed(FLAGS.seed)
    with policy("float32"):
        return encoder()


def keep_figures(**figures):
    """Merges figures of the encoder of --use_checkpoint into results.json."""
    step = checkpoints.step_of(chosen_checkpoint())
    set_others_aside(FLAGS.workdir, step)
    workdir.update_results(FLAGS.workdir, **figures, evaluated_step=step)


def set_others_aside(folder, step):
    """Moves figures of another step than this to "other_checkpoints" in results.json.

    So that what stands beside each other is of one encoder. What is there of this step comes back.
    """
    results = workdir.read_results(folder)
    before = results.get("evaluated_step")
    if before == step:
        return
    others = results.pop("other_checkpoints", {})
    if before is not None:
        others[str(before)] = {name: results.pop(name) for name in _FIGURES if name in results}
    results |= others.pop(str(step), {})
    if others:
        results["other_checkpoints"] = others
    workdir.write_results(folder, results)


def load_encoder(encoder, checkpoint):
    """Puts the online encoder of a checkpoint into this one."""
    checkpoints.check_flags(checkpoint, checkpoints.ENCODER_FLAGS)
    online = tf.train.Checkpoint(model=tf.train.Checkpoint(online_encoder=encoder))
    checkpoints.load(online, checkpoint)


@functools.lru_cache(maxsize=None)
def features(what, split):
    """`Features` of a split by the "trained" or the "random_init" encoder, or "raw_pixels"."""
    if what == "raw_pixels":
        # More pixels make no better features, only larger ones.
        return evaluation.raw_pixels(source(split), image_size=min(FLAGS.image_size, 32))
    of = trained_encoder() if what == "trained" else random_encoder()
    return evaluation.extract_features(of, source(split), image_size=FLAGS.image_size)


def view_pairs(count, step):
    """Pairs of views as the networks see them in training; see `views.view_pairs`.

    Whatever --augment_on: the host makes the same of them as the accelerator.
    """
    return views.view_pairs(
        source(FLAGS.train_split),
        count,
        step=step,
        image_size=FLAGS.image_size,
        seed=FLAGS.seed,
        min_crop_area=FLAGS.min_crop_area,
        augmentation=FLAGS.augmentation,
    )


@contextlib.contextmanager
def policy(precision):
    """Layers built inside compute in this precision."""
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(
        "mixed_bfloat16" if precision == "bfloat16" else "float32"
    )
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(before)
