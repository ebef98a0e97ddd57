"""The tasks of `main.py`: flags in, files of the workdir out."""

import contextlib
import functools
import math
import pathlib
import sys

import tensorflow as tf
from absl import flags, logging

from byol_tf import (
    checkpoints,
    deepmind,
    distribution,
    evaluation,
    resnet,
    training,
    workdir,
)
from byol_tf.data import views
from byol_tf.data.source import load_source
from byol_tf.embed import write_embeddings
from byol_tf.errors import Preempted, UserError, reason
from byol_tf.export import export_encoder
from byol_tf.keras_api import keras
from byol_tf.model import BYOL
from byol_tf.optimizers import build_optimizer, make_optimizer
from byol_tf.schedules import WarmupCosine
from byol_tf.supervised import Supervised
from byol_tf.target_update import TargetNetworkUpdate

FLAGS = flags.FLAGS


def run():
    """Runs the tasks of --task, in order."""
    tasks = [task for task in TASKS if task in FLAGS.task]
    strategy = _strategy()  # the first thing, as several machines need it
    chief = distribution.is_chief(strategy)
    if distribution.num_workers(strategy) > 1 and "import_deepmind" in tasks:
        raise UserError("--task=import_deepmind: run it alone, on one machine, before the others.")
    if chief and _folder().is_dir():
        checkpoints.lock(_folder())
    saved = workdir.read_flags(FLAGS.workdir)
    if _checkpoints().checkpoints:
        if tasks[0] == "import_deepmind":
            raise UserError(f"--workdir={FLAGS.workdir}: a run is there already: choose another.")
        workdir.check_flags(saved, pretrain="pretrain" in tasks)
    elif tasks[0] not in ("pretrain", "import_deepmind"):
        raise UserError(
            f"--workdir={FLAGS.workdir}: no checkpoint there: run --task=pretrain first, or give "
            "the folder of a run."
        )
    keras.utils.set_random_seed(FLAGS.seed)
    if FLAGS.deterministic:
        tf.config.experimental.enable_op_determinism()
    with distribution.chief_first(strategy):
        _check_inputs(tasks)
        if chief:
            checkpoints.lock(_folder())  # if it is there only now
            checkpoints.remove_leftovers(_folder())
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
        faults = (_source(split).find_fault() for split in _splits([task]))
        fault = next(filter(None, faults), f"--dataset={FLAGS.dataset}: {reason(error)}")
        raise UserError(f"{fault}. The same command goes on from the last checkpoint.") from error


def _check_inputs(tasks):
    """Opens all that the tasks will need: what is wrong is said before an hour of training.

    Raises:
      UserError: if a split cannot be read or is empty, or the workdir cannot be written.
    """
    for split in _splits(tasks):
        if split == FLAGS.eval_split and not _source(FLAGS.train_split).class_names:
            continue  # nothing to evaluate: the tasks say so and go on
        if not _source(split).num_examples:
            raise UserError(f"split {split!r} of --dataset={FLAGS.dataset} is empty.")
    if "pretrain" in tasks:
        views.steps_per_epoch(_source(FLAGS.train_split), FLAGS.batch_size)
        if FLAGS.warmup_epochs >= FLAGS.epochs:
            logging.warning(
                "--warmup_epochs=%g: the learning rate only rises in --epochs=%d: take fewer.",
                FLAGS.warmup_epochs,
                FLAGS.epochs,
            )
    measured = {"knn", "linear_eval"} & set(tasks) or ("pretrain" in tasks and FLAGS.knn_every)
    if measured and FLAGS.eval_split == FLAGS.train_split:
        logging.warning("--eval_split is --train_split: the accuracies are of images trained on.")
    _check_use_checkpoint(tasks)
    try:
        _folder().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={FLAGS.workdir}: {error.strerror}: choose a folder that can be written."
        ) from error


def _check_use_checkpoint(tasks):
    """Refuses --use_checkpoint=best where there is none and the tasks will make none."""
    if FLAGS.use_checkpoint == "last" or not _ENCODER_TASKS & set(tasks):
        return
    made = "pretrain" in tasks and FLAGS.knn_every and _source(FLAGS.train_split).class_names
    if not made:
        _checkpoints().best_whole()


def _splits(tasks):
    """The splits that the tasks read, each once."""
    splits = {
        "pretrain": [FLAGS.train_split] + ([FLAGS.eval_split] if FLAGS.knn_every else []),
        "knn": [FLAGS.train_split, FLAGS.eval_split],
        "linear_eval": [FLAGS.train_split, FLAGS.eval_split],
        "embed": [FLAGS.embed_split],
    }
    return list(dict.fromkeys(split for task in tasks for split in splits.get(task, ())))


@functools.lru_cache(maxsize=None)
def _source(split):
    return load_source(FLAGS.dataset, split, FLAGS.data_dir)


def import_deepmind():
    """Makes a run of a checkpoint of DeepMind's; see `deepmind.import_deepmind`."""
    if not FLAGS.checkpoint:
        raise UserError("--task=import_deepmind needs --checkpoint=FILE.")
    if FLAGS.method == "supervised":
        raise UserError(
            "--method=supervised: --task=import_deepmind takes a BYOL run over: leave the flag out "
            "and give it to --task=pretrain in that --workdir."
        )
    checkpoint = deepmind.load_deepmind(FLAGS.checkpoint)
    found = deepmind.architecture(checkpoint)
    num_classes = found.pop("num_classes")
    workdir.set_flags(found, source=FLAGS.checkpoint)
    model = _build_model(FLAGS.num_classes or num_classes)
    schedule = WarmupCosine(0.0, total_steps=1)  # the checkpoint holds no schedule, only a step
    model.compile(make_optimizer(FLAGS.optimizer, schedule, FLAGS.weight_decay))
    build_optimizer(model.optimizer, model.trainable_variables)
    deepmind.import_deepmind(model, checkpoint)
    if not FLAGS.keep_step:
        model.optimizer.iterations.assign(0)
    workdir.write_imported_flags(FLAGS.workdir)
    manager = _checkpoints(tf.train.Checkpoint(model=model))
    manager.save(int(model.optimizer.iterations))
    step = int(checkpoint["step"])
    sha256 = workdir.weights_sha256(model)
    workdir.update_results(FLAGS.workdir, imported_step=step, weights_sha256=sha256)
    print(f"imported {FLAGS.encoder} x{FLAGS.width_multiplier:g} of step {step}", flush=True)


def pretrain():
    """Trains from the last checkpoint, if there is one, to the last step."""
    source = _source(FLAGS.train_split)
    per_epoch = views.steps_per_epoch(source, FLAGS.batch_size)
    total_steps = per_epoch * FLAGS.epochs
    strategy = _strategy()
    with strategy.scope(), _policy(FLAGS.precision):
        model, manager = _resumed_model(source, total_steps, int(FLAGS.warmup_epochs * per_epoch))
    # Before `fit`, in whose strategy it would get replicas.
    measure = _knn_measure(source) if FLAGS.knn_every else None
    with (
        distribution.all_alive(strategy),
        distribution.folder_to_write(strategy, _folder()) as folder,
    ):
        manager.folder = folder / "checkpoints"
        workdir.write_flags(folder)
        target_update = _target_update(total_steps)
        watch = training.Watch(
            folder,
            log_every=FLAGS.log_every,
            batch_size=FLAGS.batch_size,
            target_update=target_update if FLAGS.target_network else None,
            manager=manager,
        )
        saves = training.Checkpoints(manager, FLAGS.checkpoint_every)
        callbacks = [watch, saves]
        stop = training.StopOnSigterm(strategy)
        if target_update is not None:
            callbacks.insert(0, target_update)
        if measure is not None:
            every = FLAGS.knn_every * per_epoch
            measure = stop.at_once()(measure)
            callbacks.append(checkpoints.KeepBest(manager, saves.save, measure, every, watch))
        callbacks.append(stop)
        try:
            training.train(
                model,
                functools.partial(_batches_from, source),
                steps_per_epoch=per_epoch,
                epochs=FLAGS.epochs,
                max_steps=FLAGS.max_steps,
                callbacks=callbacks,
                verbose=_verbosity(),
            )
        except training.TrainingDiverged as error:
            raise UserError(str(error)) from error
        workdir.update_results(folder, **_training_results(model, watch))
    if model.stop_training:
        step = int(model.optimizer.iterations.numpy())
        raise Preempted(f"stopped by SIGTERM at step {step}")


def _target_update(total_steps):
    if FLAGS.method != "byol":
        return None
    return TargetNetworkUpdate(FLAGS.base_target_ema, total_steps, FLAGS.constant_target_ema)


def _training_results(model, watch):
    """What results.json says of the training; of figures that no longer hold, None."""
    results = {"steps": int(model.optimizer.iterations.numpy())}
    results["weights_sha256"] = workdir.weights_sha256(model)
    if watch.images_per_second:
        results["images_per_second"] = watch.images_per_second
        # The accuracies of before are of other weights.
        stale = ("knn_top1", "knn200_top1", "linear_top1", "evaluated_step")
        results.update(dict.fromkeys(stale))
    return results


def _knn_measure(train_source):
    """Function from a checkpoint to its k-NN accuracy, as of --task=knn; None without labels.

    In float32 whatever --precision, so that it is that task's figure.
    """
    if train_source.class_names is None:
        logging.warning("--knn_every: skipped: --dataset=%s has no labels", FLAGS.dataset)
        return None
    if not distribution.is_chief(_strategy()):
        return lambda checkpoint: 0.0  # only awaits the chief
    with _policy("float32"):
        encoder = _encoder()

    def measure(checkpoint):
        _load_encoder(encoder, checkpoint)
        train, test = (
            evaluation.extract_features(encoder, _source(split), image_size=FLAGS.image_size)
            for split in (FLAGS.train_split, FLAGS.eval_split)
        )
        if min(train.labels.min(), test.labels.min()) < 0:
            logging.warning("--knn_every: skipped: there are images without labels")
            return None
        return evaluation.knn_accuracy(train, test)

    return measure


def _resumed_model(source, total_steps, warmup_steps):
    """The compiled model, as the last checkpoint left it, and its `tf.train.Checkpoint`."""
    num_classes = len(source.class_names) if source.class_names else None
    model = _build_model(num_classes)
    peak = FLAGS.base_learning_rate * FLAGS.batch_size / 256
    schedule = WarmupCosine(peak, total_steps, warmup_steps)
    model.compile(make_optimizer(FLAGS.optimizer, schedule, FLAGS.weight_decay))
    build_optimizer(model.optimizer, model.trainable_variables)
    manager = _checkpoints(tf.train.Checkpoint(model=model))
    if manager.newest_whole():
        _restore(model, manager, num_classes)
    return model, manager


def _restore(model, manager, num_classes):
    """Puts the last checkpoint into the model: all of it, or of an imported run the encoder."""
    latest = manager.latest_checkpoint
    saved = tf.train.load_checkpoint(latest).get_variable_to_shape_map()
    if FLAGS.method == "supervised" and any(n.startswith("model/online_projector/") for n in saved):
        logging.info("fine-tuning the encoder of %s", latest)
        _load_encoder(model.online_encoder, latest)
        return
    logging.info("resuming from %s", latest)
    checkpoints.check_flags(latest, checkpoints.MODEL_FLAGS)
    _check_classes(saved, num_classes)
    checkpoints.load(manager.checkpoint, latest)


def _batches_from(source, step, steps):
    def of_worker(worker, num_workers):
        batches = views.pretrain_batches(
            source,
            image_size=FLAGS.image_size,
            batch_size=FLAGS.batch_size,
            epochs=FLAGS.epochs,
            seed=FLAGS.seed,
            start_step=step,
            augment_on=FLAGS.augment_on,
            min_crop_area=FLAGS.min_crop_area,
            augmentation=FLAGS.augmentation,
            worker=worker,
            num_workers=num_workers,
        )
        return batches.take(steps)

    return distribution.distribute(_strategy(), of_worker)


def _verbosity():
    """A bar where someone watches, else a line an epoch; nothing from those who do not write."""
    if not distribution.is_chief(_strategy()):
        return 0
    return 1 if sys.stdout.isatty() else 2


def _check_classes(shapes, num_classes):
    """Refuses a checkpoint, of these shapes, whose classifier has other classes than the data."""
    bias = shapes.get("model/classifier/bias/.ATTRIBUTES/VARIABLE_VALUE")
    if bias and num_classes and bias != [num_classes]:
        raise UserError(
            f"--dataset={FLAGS.dataset} has {num_classes} classes, the classifier of the run in "
            f"--workdir={FLAGS.workdir} {bias[0]}: import it into another --workdir with "
            f"--num_classes={num_classes}."
        )


def _build_model(num_classes):
    """The model of --method, not yet compiled."""
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    parts = replicas * FLAGS.accumulation_steps
    if FLAGS.batch_size % parts:
        raise UserError(
            f"--batch_size={FLAGS.batch_size}: must divide by {replicas} replicas times "
            f"--accumulation_steps={FLAGS.accumulation_steps}: "
            f"take {math.ceil(FLAGS.batch_size / parts) * parts}."
        )
    augment = None
    if FLAGS.augment_on == "accelerator":
        augment = functools.partial(views.augment_batch, augmentation=FLAGS.augmentation)
    if FLAGS.method == "supervised":
        if not num_classes:
            raise UserError(f"--method=supervised: --dataset={FLAGS.dataset} has no labels.")
        if FLAGS.accumulation_steps > 1:
            raise UserError("--method=supervised: leave --accumulation_steps out.")
        return Supervised(_encoder(), num_classes, augment)
    return BYOL(
        _encoder(),
        projector_hidden_size=FLAGS.projector_hidden_size,
        projector_output_size=FLAGS.projector_output_size,
        projector_depth=FLAGS.projector_depth,
        predictor_depth=FLAGS.predictor_depth,
        num_classes=num_classes,
        augment=augment,
        random_target=True,  # as DeepMind's reference
        accumulation_steps=FLAGS.accumulation_steps,
        use_predictor=FLAGS.predictor,
        use_target=FLAGS.target_network,
        contrastive_weight=FLAGS.contrastive_weight,
        temperature=FLAGS.temperature,
    )


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
    if _source(FLAGS.train_split).class_names is None:
        logging.warning(
            "skipped %s: --dataset=%s has no labels", " and ".join(accuracies), FLAGS.dataset
        )
        return
    baselines = ("random_init", "raw_pixels") if FLAGS.baselines else ()
    for what in ("trained", *baselines):
        train_features = _features(what, FLAGS.train_split)
        test_features = _features(what, FLAGS.eval_split)
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
            results = {**figures, "evaluated_step": checkpoints.step_of(_chosen_checkpoint())}
        workdir.update_results(FLAGS.workdir, **results)


@functools.lru_cache(maxsize=None)
def _features(what, split):
    """Features of one split by the trained or the random encoder, or raw pixels."""
    source = _source(split)
    if what == "raw_pixels":
        # More pixels make no better features, only larger ones.
        features = evaluation.raw_pixels(source, image_size=min(FLAGS.image_size, 32))
    else:
        encoder = _trained_encoder() if what == "trained" else _random_encoder()
        features = evaluation.extract_features(encoder, source, image_size=FLAGS.image_size)
    return features


def export():
    """Writes the encoder as a SavedModel."""
    path = _folder() / "saved_model"
    encoder = _trained_encoder()
    with checkpoints.writing(path):
        export_encoder(encoder, path, image_size=FLAGS.image_size)
    print(f"encoder exported to {path}")


def embed():
    """Writes the embeddings of the images of --embed_split."""
    source = _source(FLAGS.embed_split)
    features = evaluation.extract_features(_trained_encoder(), source, image_size=FLAGS.image_size)
    path = _folder() / FLAGS.embeddings_file
    with checkpoints.writing(path):
        write_embeddings(features, path, source.class_names)
    print(f"{len(features.vectors)} embeddings written to {path}")


TASKS = {
    "import_deepmind": import_deepmind,
    "pretrain": pretrain,
    "knn": knn,
    "linear_eval": linear_eval,
    "export": export,
    "embed": embed,
}
_ENCODER_TASKS = {"knn", "linear_eval", "export", "embed"}


def _trained_encoder():
    """The online encoder of the checkpoint of --use_checkpoint, in float32."""
    with _policy("float32"):
        encoder = _encoder()
    _load_encoder(encoder, _chosen_checkpoint())
    return encoder


def _chosen_checkpoint():
    manager = _checkpoints()
    return manager.best_whole() if FLAGS.use_checkpoint == "best" else manager.newest_whole()


def _load_encoder(encoder, checkpoint):
    """Puts the online encoder of a checkpoint into this one."""
    checkpoints.check_flags(checkpoint, checkpoints.ENCODER_FLAGS)
    online = tf.train.Checkpoint(model=tf.train.Checkpoint(online_encoder=encoder))
    checkpoints.load(online, checkpoint)


def _random_encoder():
    """The encoder as it was before the first step, in float32: the first thing drawn."""
    keras.utils.set_random_seed(FLAGS.seed)
    with _policy("float32"):
        return _encoder()


def _encoder():
    return resnet.resnet_encoder(
        FLAGS.encoder,
        width_multiplier=FLAGS.width_multiplier,
        stem=FLAGS.stem,
        image_size=FLAGS.image_size,
    )


def _folder():
    return pathlib.Path(FLAGS.workdir).expanduser()


def _checkpoints(checkpoint=None):
    return checkpoints.Manager(checkpoint, _folder() / "checkpoints", FLAGS.keep_checkpoints)


@contextlib.contextmanager
def _policy(precision):
    """Layers built inside compute in this precision."""
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(
        "mixed_bfloat16" if precision == "bfloat16" else "float32"
    )
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(before)


def _strategy():
    return distribution.make_strategy(FLAGS.strategy, FLAGS.tpu)


def only_our_notices():
    """Keeps back what libraries say below an error: it hides what this project says."""

    # The folder itself: a checkout called byol_tf may hold the libraries' .venv as well.
    here = str(pathlib.Path(__file__).parent)

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
