"""What of byol_tf is measured: `python -m benchmarks.ours SUBJECT JSON`, a worker of `measure`."""

import itertools
import json
import sys

import tensorflow as tf

import byol_tf
from benchmarks.worker import serve
from byol_tf.keras_api import keras


def pipeline(dataset, data_dir, split, image_size, batch_size, batches, augment_on="host"):
    """Images from disk to two full views, or, with "accelerator", to two crops."""
    source = byol_tf.load_source(dataset, split, data_dir)
    endless = iter(
        byol_tf.pretrain_batches(
            source,
            **{"image_size": image_size, "batch_size": batch_size, "epochs": 10_000},
            augment_on=augment_on,
        )
    )

    def do_round():
        for _ in itertools.islice(endless, batches):
            pass
        return batches * batch_size

    return do_round


def step(steps, **how):
    """Training steps by `model.fit`, its callback included; `how`: see `_training`."""
    model, batch, update = _training(**how)

    def do_round():
        model.fit(batch, steps_per_epoch=steps, callbacks=[update], verbose=0)
        return steps

    return do_round


def compiled_step(steps, with_update=False, **how):
    """Only the compiled function that `fit` calls: neither loop nor callback.

    Args: with_update: update the target too, as the callback does.
    """
    model, batch, update = _training(**how)
    model.fit(batch, steps_per_epoch=1, callbacks=[update], verbose=0)
    batches = iter(model.distribute_strategy.experimental_distribute_dataset(batch))

    def do_round():
        for i in range(steps):
            logs = model.train_function(batches)
            if with_update:
                update.on_train_batch_end(i)
        logs["loss"].numpy()  # awaits the last
        return steps

    return do_round


def target_update(steps, **how):
    """Only what the callback does."""
    model, batch, update = _training(**how)
    model.fit(batch, steps_per_epoch=1, callbacks=[update], verbose=0)

    def do_round():
        for i in range(steps):
            update.on_train_batch_end(i)
        return steps

    return do_round


def matmuls(gflop):
    """As many floating-point operations as a step's convolutions have, in large products."""
    side = 4096
    count = max(1, round(gflop * 1e9 / (2 * side**3)))
    matrix = tf.random.stateless_normal([side, side], [0, 0])

    def do_round():
        for _ in range(count):
            product = tf.matmul(matrix, matrix)
        product[0, 0].numpy()
        return count * 2 * side**3 / (gflop * 1e9)

    return do_round


def _training(encoder, stem, image_size, batch_size, precision="float32", strategy=None, threads=0):
    """A compiled model, an endless dataset of one batch in memory, and the callback.

    Args: batch_size: of one replica. strategy: None, "mirrored" over two logical CPUs, or
    "multi_worker" as TF_CONFIG says. threads: inside an operation, 0: TensorFlow's choice.
    """
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    if precision == "bfloat16":
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    with _strategy(strategy).scope():
        model = byol_tf.BYOL(byol_tf.resnet_encoder(encoder, stem=stem, image_size=image_size))
        model.compile(byol_tf.LARS(0.2))
        batch = _batch(image_size, batch_size * tf.distribute.get_strategy().num_replicas_in_sync)
    return model, batch, byol_tf.TargetNetworkUpdate(0.99, total_steps=10**9)


def _strategy(name):
    if name == "mirrored":
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )
        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    if name == "multi_worker":
        return tf.distribute.MultiWorkerMirroredStrategy()
    return tf.distribute.get_strategy()


def _batch(image_size, batch_size):
    """One batch of two views, again and again."""
    shape = [batch_size, image_size, image_size, 3]
    views = {f"view{i}": tf.random.stateless_normal(shape, [0, i]) for i in (1, 2)}
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return tf.data.Dataset.from_tensors(views).repeat().with_options(options)


def embed(encoder, data_dir, image_size, batch_size):
    """Images from disk to embeddings."""
    source = byol_tf.load_source("image_folder", "all", data_dir)
    network = byol_tf.resnet_encoder(encoder, image_size=image_size)

    def do_round():
        features = byol_tf.extract_features(
            network, source, image_size=image_size, batch_size=batch_size
        )
        return len(features.vectors)

    return do_round


SUBJECTS = {
    function.__name__: function
    for function in (
        *(pipeline, embed),
        *(step, compiled_step, target_update, matmuls),
    )
}

if __name__ == "__main__":
    subject, arguments = sys.argv[1:]
    serve(SUBJECTS[subject](**json.loads(arguments)))
