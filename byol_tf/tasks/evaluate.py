"""How good the encoder is, into results.json."""

import functools

import numpy as np
from absl import flags, logging

from byol_tf import evaluation, workdir
from byol_tf.data import subset
from byol_tf.errors import UserError
from byol_tf.finetune import fine_tune
from byol_tf.keras_api import keras
from byol_tf.linear_eval import linear_evaluation
from byol_tf.tasks import run

FLAGS = flags.FLAGS


def knn():
    """Evaluates by k-nearest neighbours; see `evaluation.knn_accuracy`."""
    accuracies = {
        "knn_top1": evaluation.knn_accuracy,
        "knn200_top1": functools.partial(evaluation.knn_accuracy, k=200),
    }
    _evaluate(accuracies)


def linear_probe():
    """Evaluates by a linear probe; see `evaluation.linear_probe_accuracy`."""
    accuracy = functools.partial(evaluation.linear_probe_accuracy, seed=FLAGS.seed)
    _evaluate({"probe_top1": accuracy})


def linear_eval():
    """Evaluates by the paper's protocol; see `linear_eval.linear_evaluation`."""
    if not _have_labels("linear_eval"):
        return
    source = run.source(FLAGS.train_split)
    training, held_out = subset.hold_out(run.labels(FLAGS.train_split), FLAGS.seed)
    keras.utils.set_random_seed(FLAGS.seed)  # whatever was done before
    with run.local_strategy().scope():
        figures = linear_evaluation(
            run.trained_encoder(),
            subset.subset(source, training),
            subset.subset(source, held_out),
            run.source(FLAGS.eval_split),
            learning_rates=FLAGS.linear_learning_rates,
            epochs=FLAGS.linear_epochs,
            batch_size=FLAGS.linear_batch_size,
            **_views(),
        )
    _print_figures(figures, "linear", f"rate {figures['learning_rate']:g}")
    run.keep_figures(
        linear_top1=figures.pop("top1"),
        linear_top5=figures.pop("top5"),
        linear_eval={
            **figures,
            "epochs": FLAGS.linear_epochs,
            "batch_size": FLAGS.linear_batch_size,
            "images": len(training),
            "held_out_images": len(held_out),
        },
    )


def finetune():
    """Fine-tunes on a part of the labels, and on another; see `finetune.fine_tune`."""
    if not _have_labels("finetune", FLAGS.finetune_dataset):
        return
    parts, held_out = _labelled_parts()
    for name, part in parts.items():
        logging.info("fine-tuning on %s: %d images", name, part.num_examples)
        keras.utils.set_random_seed(FLAGS.seed)
        with run.local_strategy().scope():
            figures = fine_tune(
                run.trained_encoder(),
                part,
                held_out,
                run.source(FLAGS.eval_split, FLAGS.finetune_dataset),
                learning_rates=FLAGS.finetune_learning_rates,
                epochs=FLAGS.finetune_epochs,
                batch_size=FLAGS.finetune_batch_size,
                classifier_rate=FLAGS.finetune_classifier_rate,
                **_views(),
            )
        _print_figures(figures, "finetune", name)
        counts = {"images": part.num_examples, "held_out_images": held_out.num_examples}
        run.keep_figures(finetune={name: {**figures, **counts}})


def check_classes():
    """Refuses a --finetune_dataset of other classes than --dataset, which chooses the rate."""
    found, expected = (
        run.source(FLAGS.train_split, dataset).class_names
        for dataset in (FLAGS.finetune_dataset, FLAGS.dataset)
    )
    if found != expected:
        raise UserError(
            f"--finetune_dataset={FLAGS.finetune_dataset}: its classes are not those of "
            f"--dataset={FLAGS.dataset}, whose images choose the learning rate: take a part of it."
        )


def _labelled_parts():
    """The sources to learn from, by name, and that of the images to choose by.

    These are of --train_split, and none of them is one to learn from. A percent is of the labels
    that are there, those of the images to choose by included.
    """
    source = run.source(FLAGS.train_split)
    labels = run.labels(FLAGS.train_split).copy()
    if FLAGS.finetune_dataset:
        part = run.source(FLAGS.train_split, FLAGS.finetune_dataset)
        known = np.isin(subset.read_fingerprints(source), subset.read_fingerprints(part))
        labels[known] = -1
        if labels.max() < 0:
            raise UserError(
                f"--finetune_dataset={FLAGS.finetune_dataset}: all labelled images of "
                f"--dataset={FLAGS.dataset} are in it, so that none is left to choose the learning "
                "rate by: leave it out and give --finetune_percents=100."
            )
        _, held_out = subset.hold_out(labels, FLAGS.seed)
        known = run.labels(FLAGS.train_split, FLAGS.finetune_dataset) >= 0
        places = {FLAGS.finetune_dataset: np.flatnonzero(known)}
    else:
        part = source
        training, held_out = subset.hold_out(labels, FLAGS.seed)
        one_percent = (len(training) + len(held_out)) / 100
        labels[held_out] = -1
        places = {
            f"{percent:g}%": subset.stratified(
                labels, max(1, round(percent * one_percent)), FLAGS.seed
            )
            for percent in FLAGS.finetune_percents
        }
    parts = {name: subset.subset(part, chosen) for name, chosen in places.items()}
    return parts, subset.subset(source, held_out)


def _have_labels(task, dataset=None):
    """Whether there is something to learn from and to judge by, the latter of this data set."""
    train, test = run.source(FLAGS.train_split), run.source(FLAGS.eval_split, dataset)
    if not (train.class_names and test.class_names):
        return _skip(task, f"--dataset={FLAGS.dataset} has no labels")
    labels = run.labels(FLAGS.eval_split, dataset)
    if labels.max() < 0:
        return _skip(task, f"--eval_split={FLAGS.eval_split} has no labels")
    _look_for_unseen_classes(run.labels(FLAGS.train_split), labels)
    return True


def _skip(task, why):
    """Warns that a task is left out. Where it is all that was asked for, this is an error."""
    if len(FLAGS.task) == 1:
        raise UserError(
            f"--task={FLAGS.task[0]}: {why}: take folders of classes, or labelled data."
        )
    logging.warning("skipped %s: %s", task, why)
    return False


def _look_for_unseen_classes(train_labels, test_labels):
    """Warns of images to judge by that nothing can get right."""
    known = test_labels >= 0
    unseen = np.sum(known & ~np.isin(test_labels, train_labels))
    if unseen:
        logging.log_first_n(
            logging.WARNING,
            "%d of %d images of --eval_split=%s are of classes that --train_split=%s has not: they "
            "count as wrong.",
            1,
            unseen,
            np.sum(known),
            FLAGS.eval_split,
            FLAGS.train_split,
        )


def _views():
    """What the evaluations that train share."""
    return {
        "image_size": FLAGS.image_size,
        "min_crop_area": FLAGS.min_crop_area,
        "seed": FLAGS.seed,
        "verbose": run.verbosity(),
    }


def _print_figures(figures, task, what):
    for name in ("top1", "top5"):
        print(f"{task + '_' + name:>12} {what:>12} {100 * figures[name]:6.2f} %", flush=True)


def _evaluate(accuracies):
    """Measures the encoder and, with --baselines, what no learning gives."""
    if run.source(FLAGS.train_split).class_names is None:
        _skip(" and ".join(accuracies), f"--dataset={FLAGS.dataset} has no labels")
        return
    baselines = ("random_init", "raw_pixels") if FLAGS.baselines else ()
    for what in ("trained", *baselines):
        train_features = run.features(what, FLAGS.train_split)
        test_features = run.features(what, FLAGS.eval_split)
        if min(train_features.labels.min(), test_features.labels.min()) < 0:
            _skip(" and ".join(accuracies), "there are images without labels")
            return
        _look_for_unseen_classes(train_features.labels, test_features.labels)
        logging.info("measuring %s, %s", what, " and ".join(accuracies))
        figures = {
            name: accuracy(train_features, test_features) for name, accuracy in accuracies.items()
        }
        for name, value in figures.items():
            print(f"{name:>12} {what:>12} {100 * value:6.2f} %", flush=True)
        if what == "trained":
            run.keep_figures(**figures)
        else:
            workdir.update_results(FLAGS.workdir, **{what: figures})
