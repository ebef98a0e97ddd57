"""How well the encoder does in dense prediction, into results.json."""

import contextlib
import math

import tensorflow as tf
from absl import flags, logging

from byol_tf import dense
from byol_tf.data.dense import count_known, depth_batches, load_dense, segmentation_batches
from byol_tf.errors import UserError, reason
from byol_tf.keras_api import keras
from byol_tf.tasks import run

FLAGS = flags.FLAGS
TARGETS = {"segmentation": "masks", "depth": "depths"}
_HELD_OUT = 5  # every so-many-th image, to choose by: 2117 of 10,582 (paper: 2119)


def segmentation():
    """Trains and evaluates semantic segmentation; see `dense.segmentation_model`."""
    train, test = _sources("segmentation")
    rates, held_out_miou = FLAGS.segmentation_learning_rates, {}
    with _faults_of_images():
        if len(rates) > 1:
            part, held_out = train.split(_HELD_OUT)
            for rate in rates:
                held_out_miou[rate] = _segmentation_figures(part, held_out, rate).get("miou", 0.0)
        best = max(rates, key=held_out_miou.get) if held_out_miou else rates[0]
        figures = _segmentation_figures(train, test, best)
    _check_converged(figures, f"--segmentation_learning_rates={best:g}")
    named = {f"{rate:g}": value for rate, value in held_out_miou.items()}
    _report("segmentation", figures, train, learning_rate=best, held_out_miou=named)


def _segmentation_figures(train, test, rate):
    """The figures of a model trained at this rate, none if it diverged."""
    logging.info("segmentation: learning rate %g, %d images", rate, train.num_examples)
    form = {
        "crop": FLAGS.segmentation_crop,
        "batch_size": FLAGS.segmentation_batch_size,
        "num_classes": FLAGS.segmentation_classes,
    }
    keras.utils.set_random_seed(FLAGS.seed)
    with run.local_strategy().scope():
        model = dense.segmentation_model(
            run.trained_encoder(), FLAGS.segmentation_classes, frozen=FLAGS.dense_frozen
        )
        converged = dense.train(
            model,
            segmentation_batches(train, **form, seed=FLAGS.seed),
            dense.segmentation_loss,
            steps=FLAGS.segmentation_steps,
            learning_rate=rate,
            weight_decay=1e-4,
            verbose=run.verbosity(),
        )
        metric = dense.mean_iou(FLAGS.segmentation_classes)
        batches = segmentation_batches(test, **form)
        return dense.evaluate(model, batches, metric) if converged else {}


def depth():
    """Trains and evaluates depth; see `dense.depth_model`."""
    train, test = _sources("depth")
    form = {
        "crop": FLAGS.depth_crop,
        "scale": FLAGS.depth_scale,
        "batch_size": FLAGS.depth_batch_size,
    }
    keras.utils.set_random_seed(FLAGS.seed)
    with _faults_of_images(), run.local_strategy().scope():
        model = dense.depth_model(run.trained_encoder(), frozen=FLAGS.dense_frozen)
        converged = dense.train(
            model,
            depth_batches(train, **form, seed=FLAGS.seed),
            dense.berhu,
            steps=FLAGS.depth_steps,
            learning_rate=FLAGS.depth_learning_rate * FLAGS.depth_batch_size / 256,
            weight_decay=5e-4,
            verbose=run.verbosity(),
        )
        figures = {}
        if converged:
            figures = dense.evaluate(model, depth_batches(test, **form), dense.DepthFigures())
    _check_converged(figures, f"--depth_learning_rate={FLAGS.depth_learning_rate:g}")
    _report("depth", figures, train, learning_rate=FLAGS.depth_learning_rate)


def check(task):
    """Opens what a task reads.

    Raises:
      UserError: if it cannot be read, or there is nothing or too little in it.
    """
    num_classes = FLAGS.segmentation_classes if task == "segmentation" else None
    sources = _sources(task)
    for split, source in zip((FLAGS.dense_train_split, FLAGS.dense_eval_split), sources):
        if not source.num_examples:
            raise UserError(f"--dense_data={FLAGS.dense_data}: there are no images in {split!r}.")
        logging.info("checking %d images with %s of %s", source.num_examples, TARGETS[task], split)
        with _faults_of_images(split):
            if not count_known(source, num_classes):
                raise UserError(
                    f"--dense_data={FLAGS.dense_data}: no pixel in {split!r} has a value that counts."
                )
    chosen = task == "segmentation" and len(FLAGS.segmentation_learning_rates) > 1
    if chosen and sources[0].num_examples < 2:
        raise UserError(
            f"--dense_data={FLAGS.dense_data}: one image leaves none to choose the learning rate "
            "by: give one of --segmentation_learning_rates."
        )


def _sources(task):
    """What to learn from and what to evaluate on."""
    if not FLAGS.dense_data:
        raise UserError(f"--task={task} needs --dense_data: a folder of arrays or a TFDS name.")
    return [
        load_dense(FLAGS.dense_data, split, TARGETS[task], FLAGS.dense_data_dir, FLAGS.channels)
        for split in (FLAGS.dense_train_split, FLAGS.dense_eval_split)
    ]


@contextlib.contextmanager
def _faults_of_images(split=None):
    """Tells in one line of images or masks that turn out to be unusable, in a split if it is known."""
    try:
        yield
    except tf.errors.OpError as error:
        if "IteratorGetNext" not in error.message:  # not from the input pipeline
            raise
        where = f" {split!r}:" if split else ""
        raise UserError(f"--dense_data={FLAGS.dense_data}:{where} {reason(error)}") from error


def _check_converged(figures, flag):
    """Raises a `UserError` where the loss has diverged, or what was learned gives no figures."""
    if not figures or not all(map(math.isfinite, figures.values())):
        raise UserError(f"{flag}: the training has diverged: take a smaller one.")


def _report(task, figures, train, **details):
    """Prints and writes the figures, of a frozen and of a tuned encoder beside each other."""
    what = "frozen" if FLAGS.dense_frozen else "tuned"
    for name, value in figures.items():
        print(f"{task:>12} {what:>8} {name:>10} {value:8.4f}", flush=True)
    settings = {name: FLAGS[f"{task}_{name}"].value for name in ("steps", "batch_size", "crop")}
    settings |= {"data": FLAGS.dense_data, "images": train.num_examples}
    details = {**figures, **details, **settings}
    run.keep_figures(**{task: {what: details}})
