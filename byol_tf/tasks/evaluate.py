"""How good the encoder is, into results.json."""

import functools

from absl import flags, logging

from byol_tf import checkpoints, evaluation, workdir
from byol_tf.tasks import run

FLAGS = flags.FLAGS


def knn():
    """Evaluates by k-nearest neighbours; see `evaluation.knn_accuracy`."""
    accuracies = {
        "knn_top1": evaluation.knn_accuracy,
        "knn200_top1": functools.partial(evaluation.knn_accuracy, k=200),
    }
    _evaluate(accuracies)


def linear_eval():
    """Evaluates by a linear probe; see `evaluation.linear_probe_accuracy`."""
    accuracy = functools.partial(evaluation.linear_probe_accuracy, seed=FLAGS.seed)
    _evaluate({"linear_top1": accuracy})


def _evaluate(accuracies):
    """Measures the encoder and, with --baselines, what no learning gives."""
    if run.source(FLAGS.train_split).class_names is None:
        logging.warning(
            "skipped %s: --dataset=%s has no labels", " and ".join(accuracies), FLAGS.dataset
        )
        return
    baselines = ("random_init", "raw_pixels") if FLAGS.baselines else ()
    for what in ("trained", *baselines):
        train_features = run.features(what, FLAGS.train_split)
        test_features = run.features(what, FLAGS.eval_split)
        if min(train_features.labels.min(), test_features.labels.min()) < 0:
            logging.warning("skipped %s: there are images without labels", " and ".join(accuracies))
            return
        logging.info("measuring %s, %s", what, " and ".join(accuracies))
        figures = {
            name: accuracy(train_features, test_features) for name, accuracy in accuracies.items()
        }
        for name, value in figures.items():
            print(f"{name:>12} {what:>12} {100 * value:6.2f} %", flush=True)
        results = {what: figures}
        if what == "trained":
            results = {**figures, "evaluated_step": checkpoints.step_of(run.chosen_checkpoint())}
        workdir.update_results(FLAGS.workdir, **results)
