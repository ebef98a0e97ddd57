"""From images, or from DeepMind's checkpoint, to a run in the workdir."""

import functools
import math

import tensorflow as tf
from absl import flags, logging

from byol_tf import checkpoints, deepmind, distribution, evaluation, report, training, workdir
from byol_tf.data import views
from byol_tf.errors import Preempted, UserError
from byol_tf.model import BYOL
from byol_tf.optimizers import build_optimizer, make_optimizer
from byol_tf.schedules import WarmupCosine
from byol_tf.supervised import Supervised
from byol_tf.target_update import TargetNetworkUpdate
from byol_tf.tasks import run

FLAGS = flags.FLAGS


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
    manager = run.manager(tf.train.Checkpoint(model=model))
    manager.save(int(model.optimizer.iterations))
    step = int(checkpoint["step"])
    sha256 = workdir.weights_sha256(model.online_weights + model.target_weights)
    workdir.update_results(FLAGS.workdir, imported_step=step, weights_sha256=sha256)
    print(f"imported {FLAGS.encoder} x{FLAGS.width_multiplier:g} of step {step}", flush=True)


def pretrain():
    """Trains from the last checkpoint, if there is one, to the last step."""
    source = run.source(FLAGS.train_split)
    _look_for_other_images(source)
    per_epoch = views.steps_per_epoch(source, FLAGS.batch_size)
    total_steps = per_epoch * FLAGS.epochs
    strategy = run.strategy()
    with distribution.all_alive(strategy):
        _check_workers(strategy, source)
        with strategy.scope(), run.policy(FLAGS.precision):
            model, manager = _resumed_model(
                source, total_steps, int(FLAGS.warmup_epochs * per_epoch)
            )
        _check_checkpoint(strategy, model)
    # Before `fit`, in whose strategy it would get replicas.
    measure = _knn_measure(source) if FLAGS.knn_every else None
    with (
        distribution.all_alive(strategy),
        distribution.folder_to_write(strategy, run.folder()) as folder,
    ):
        manager.folder = folder / "checkpoints"
        workdir.write_flags(folder)
        workdir.update_results(folder, train_images=source.num_examples)
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
        step = int(model.optimizer.iterations.numpy())
        if step >= total_steps:
            logging.info("all %d steps are done: nothing is left to train", step)
        elif distribution.is_chief(strategy):
            watch.show("views", report.view_sheet(run.view_pairs(16, step)), step)
        try:
            training.train(
                model,
                functools.partial(_batches_from, source),
                steps_per_epoch=per_epoch,
                epochs=FLAGS.epochs,
                max_steps=FLAGS.max_steps,
                callbacks=callbacks,
                verbose=run.verbosity(),
            )
        except training.TrainingDiverged as error:
            raise UserError(str(error)) from error
        run.set_others_aside(folder, int(model.optimizer.iterations.numpy()))
        workdir.update_results(folder, **_training_results(model, watch))
    if model.stop_training:
        step = int(model.optimizer.iterations.numpy())
        raise Preempted(f"stopped by SIGTERM at step {step}")


def check_batch_size():
    """Refuses a --batch_size that does not divide by replicas and --accumulation_steps."""
    replicas = run.strategy().num_replicas_in_sync
    parts = replicas * FLAGS.accumulation_steps
    if FLAGS.batch_size % parts:
        raise UserError(
            f"--batch_size={FLAGS.batch_size}: must divide by {replicas} replicas times "
            f"--accumulation_steps={FLAGS.accumulation_steps}: "
            f"take {math.ceil(FLAGS.batch_size / parts) * parts}."
        )


def _check_workers(strategy, source):
    """Ends all workers where they are not given the same flags and images."""
    distribution.check_alike(
        strategy,
        workdir.common_flags,
        "the workers have not the same flags: start all of them with the same command.",
    )
    distribution.check_alike(
        strategy,
        lambda: (source.num_examples, source.class_names),
        f"the workers do not see the same images and classes, here {source.num_examples} images: "
        "--data_dir must hold the same for all.",
    )


def _check_checkpoint(strategy, model):
    """Ends all workers where they do not go on from the same weights."""
    step = int(model.optimizer.iterations.numpy())
    distribution.check_alike(
        strategy,
        lambda: (step, workdir.weights_sha256(model.online_weights + model.target_weights)),
        f"the workers do not go on from the same checkpoint, here that of step {step}: --workdir "
        "must be one folder that all of them see.",
    )


def _target_update(total_steps):
    if FLAGS.method != "byol":
        return None
    return TargetNetworkUpdate(FLAGS.base_target_ema, total_steps, FLAGS.constant_target_ema)


def _look_for_other_images(source):
    """Warns where the run in the workdir was begun on another number of images."""
    before = workdir.read_results(FLAGS.workdir).get("train_images", source.num_examples)
    if before != source.num_examples:
        logging.warning(
            "%d images to train on, not %d as before: epochs, schedules and order are others now.",
            source.num_examples,
            before,
        )


def _training_results(model, watch):
    """What results.json says of the training."""
    results = {"steps": int(model.optimizer.iterations.numpy())}
    weights = model.online_weights + model.target_weights
    results["weights_sha256"] = workdir.weights_sha256(weights)
    if watch.images_per_second:
        results["images_per_second"] = watch.images_per_second
    return results


def _knn_measure(train_source):
    """Function from a checkpoint to its k-NN accuracy, as of --task=knn; None without labels.

    In float32 whatever --precision, so that it is that task's figure.
    """
    if train_source.class_names is None:
        logging.warning("--knn_every: skipped: --dataset=%s has no labels", FLAGS.dataset)
        return None
    if not distribution.is_chief(run.strategy()):
        return lambda checkpoint: 0.0  # only awaits the chief
    with run.policy("float32"):
        encoder = run.encoder()
    extractors = [
        evaluation.feature_extractor(encoder, run.source(split), image_size=FLAGS.image_size)
        for split in (FLAGS.train_split, FLAGS.eval_split)
    ]

    def measure(checkpoint):
        run.load_encoder(encoder, checkpoint)
        train, test = (extract() for extract in extractors)
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
    manager = run.manager(tf.train.Checkpoint(model=model))
    if manager.newest_whole():
        _restore(model, manager, num_classes)
    return model, manager


def _restore(model, manager, num_classes):
    """Puts the last checkpoint into the model: all of it, or of an imported run the encoder."""
    latest = manager.latest_checkpoint
    saved = tf.train.load_checkpoint(latest).get_variable_to_shape_map()
    if FLAGS.method == "supervised" and any(n.startswith("model/online_projector/") for n in saved):
        logging.info("fine-tuning the encoder of %s", latest)
        run.load_encoder(model.online_encoder, latest)
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

    return distribution.distribute(run.strategy(), of_worker)


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
    augment = None
    if FLAGS.augment_on == "accelerator":
        augment = functools.partial(views.augment_batch, augmentation=FLAGS.augmentation)
    if FLAGS.method == "supervised":
        if not num_classes:
            raise UserError(f"--method=supervised: --dataset={FLAGS.dataset} has no labels.")
        if FLAGS.accumulation_steps > 1:
            raise UserError("--method=supervised: leave --accumulation_steps out.")
        return Supervised(run.encoder(), num_classes, augment)
    return BYOL(
        run.encoder(),
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
