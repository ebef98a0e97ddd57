"""The tasks of `main.py`: flags in, files of the workdir out."""

import contextlib
import pathlib

import tensorflow as tf
from absl import flags, logging

from byol_tf import checkpoints, distribution, workdir
from byol_tf.data import views
from byol_tf.errors import UserError, reason
from byol_tf.keras_api import keras
from byol_tf.tasks import (
    dense,
    embed,
    evaluate,
    export,
    pretrain,
    report,
    run,
    search,
    transfer,
)

FLAGS = flags.FLAGS
TASKS = {
    "import_deepmind": pretrain.import_deepmind,
    "pretrain": pretrain.pretrain,
    "knn": evaluate.knn,
    "linear_probe": evaluate.linear_probe,
    "linear_eval": evaluate.linear_eval,
    "finetune": evaluate.finetune,
    "segmentation": dense.segmentation,
    "depth": dense.depth,
    "export": export.export,
    "embed": embed.embed,
    "report": report.write_report,
    "search": search.search,
    "duplicates": search.duplicates,
    "transfer": transfer.transfer,  # the last: what it leaves out ends the command
}
_JUDGED = ("knn", "linear_probe", "linear_eval", "finetune")  # on --eval_split
_TRAINING = ("import_deepmind", "pretrain")  # the others take an encoder that is there


def run_all():
    """Runs the tasks of --task, in order; --transfer without --task is --task=transfer."""
    only_transfer = FLAGS.transfer and FLAGS["task"].using_default_value
    tasks = ["transfer"] if only_transfer else [task for task in TASKS if task in FLAGS.task]
    strategy = run.strategy()  # the first thing, as several machines need it
    chief = distribution.is_chief(strategy)
    if distribution.num_workers(strategy) > 1 and "import_deepmind" in tasks:
        raise UserError("--task=import_deepmind: run it alone, on one machine, before the others.")
    if chief and run.folder().is_dir():
        checkpoints.lock(run.folder())
    saved = workdir.read_flags(FLAGS.workdir)
    workdir.read_results(FLAGS.workdir)  # before an hour of training
    if run.manager().checkpoints:
        if tasks[0] == "import_deepmind":
            raise UserError(f"--workdir={FLAGS.workdir}: a run is there already: choose another.")
        workdir.check_flags(saved, pretrain="pretrain" in tasks)
    elif tasks[0] not in _TRAINING:
        raise UserError(
            f"--workdir={FLAGS.workdir}: no checkpoint there: run --task=pretrain first, or give "
            "the folder of a run."
        )
    keras.utils.set_random_seed(FLAGS.seed)
    if FLAGS.deterministic:
        tf.config.experimental.enable_op_determinism()
    with distribution.all_alive(strategy), distribution.chief_first(strategy):
        _check_inputs(tasks)
        if chief:
            checkpoints.lock(run.folder())  # if it is there only now
            checkpoints.remove_leftovers(run.folder())
    for task in tasks:
        if task == "pretrain" or chief:
            with _faults_of_images(task):
                TASKS[task]()


@contextlib.contextmanager
def _faults_of_images(task):
    """Tells in one line of images that turn out to be unreadable while the task runs."""
    try:
        yield
    except tf.errors.OpError as error:
        if "IteratorGetNext" not in error.message:  # not from the input pipeline
            raise
        logging.info("looking for what cannot be read: %s", reason(error))
        faults = (run.source(*which).find_fault() for which in _sources([task]))
        fault = next(filter(None, faults), f"--dataset={FLAGS.dataset}: {reason(error)}")
        raise UserError(f"{fault}. The same command goes on from the last checkpoint.") from error


def _check_inputs(tasks):
    """Opens all that the tasks will need: what is wrong is said before an hour of training.

    But the sets of --transfer, of which one that is wrong ends nothing.

    Raises:
      UserError: if a split cannot be read or is empty, or the workdir cannot be written.
    """
    if "pretrain" in tasks:
        pretrain.check_batch_size()
    for split, dataset in _sources(tasks):
        evaluated = split == FLAGS.eval_split and "report" not in tasks
        if evaluated and not run.source(FLAGS.train_split).class_names:
            continue  # nothing to evaluate: the tasks say so and go on
        if not run.source(split, dataset).num_examples:
            raise UserError(f"{run.split_flag(split)}: this part of --dataset={dataset} is empty.")
    if "finetune" in tasks and FLAGS.finetune_dataset:
        evaluate.check_classes()
    for task in set(dense.TARGETS) & set(tasks):
        dense.check(task)
    if "pretrain" in tasks:
        views.steps_per_epoch(run.source(FLAGS.train_split), FLAGS.batch_size)
        if FLAGS.warmup_epochs >= FLAGS.epochs:
            logging.warning(
                "--warmup_epochs=%g: the learning rate only rises in --epochs=%d: take fewer.",
                FLAGS.warmup_epochs,
                FLAGS.epochs,
            )
    measured = {*_JUDGED, "report"} & set(tasks) or ("pretrain" in tasks and FLAGS.knn_every)
    if measured and FLAGS.eval_split == FLAGS.train_split:
        logging.warning("--eval_split is --train_split: the accuracies are of images trained on.")
    if "search" in tasks:
        search.check_queries()
    _check_use_checkpoint(tasks)
    try:
        run.folder().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={FLAGS.workdir}: {error.strerror}: choose a folder that can be written."
        ) from error


def _check_use_checkpoint(tasks):
    """Refuses --use_checkpoint=best where there is none and the tasks will make none."""
    if FLAGS.use_checkpoint == "last" or set(tasks) <= set(_TRAINING):
        return
    made = "pretrain" in tasks and FLAGS.knn_every and run.source(FLAGS.train_split).class_names
    if not made:
        run.manager().best_whole()


def _sources(tasks):
    """What the tasks read, (split, data set), each once."""
    splits = {
        "pretrain": [FLAGS.train_split] + ([FLAGS.eval_split] if FLAGS.knn_every else []),
        **dict.fromkeys((*_JUDGED, "report"), [FLAGS.train_split, FLAGS.eval_split]),
        **dict.fromkeys(("embed", "search", "duplicates"), [FLAGS.embed_split]),
    }
    sources = [(split, FLAGS.dataset) for task in tasks for split in splits.get(task, ())]
    if "finetune" in tasks and FLAGS.finetune_dataset:
        sources += [(split, FLAGS.finetune_dataset) for split in splits["finetune"]]
    return list(dict.fromkeys(sources))


def only_our_notices():
    """Keeps back what libraries say below an error: it hides what this project says."""

    # The folder itself: a checkout called byol_tf may hold the libraries' .venv as well.
    here = str(pathlib.Path(__file__).parent.parent)

    def is_ours(record):
        return record.levelno >= logging.converter.STANDARD_ERROR or record.pathname.startswith(
            here
        )

    logging.use_absl_handler()
    logging.get_absl_handler().addFilter(is_ours)


def configure_devices():
    """Sets threads and logical CPUs; before TensorFlow does anything."""
    tf.config.threading.set_intra_op_parallelism_threads(FLAGS.intra_op_threads)
    if FLAGS.logical_cpus > 1:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * FLAGS.logical_cpus,
        )
