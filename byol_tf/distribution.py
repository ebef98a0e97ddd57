"""One device, several, several machines: the strategies, and each worker's part of the work."""

import contextlib
import functools
import os
import pathlib
import tempfile

import tensorflow as tf
from absl import logging

from byol_tf.errors import UserError


@functools.lru_cache(maxsize=None)  # replicas of two strategies in one process mix up their sums
def make_strategy(name, tpu="local"):
    """The `tf.distribute.Strategy` of --strategy, before TensorFlow has run anything.

    Args:
      name: "auto", "one_device", "mirrored" (the GPUs, or else the logical CPUs),
        "multi_worker" (of TF_CONFIG, or else Slurm) or "tpu".
      tpu: name or address, or "local".

    Raises:
      UserError: if there is no cluster or no TPU.
    """
    if name == "tpu":
        return _tpu(tpu)
    if name == "multi_worker" or (name == "auto" and "TF_CONFIG" in os.environ):
        return _multi_worker()
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if name == "one_device" or (name == "auto" and len(devices) == 1):
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy([device.name for device in devices])


def is_chief(strategy):
    """Whether this process is the one of its cluster that writes and evaluates."""
    return strategy.extended.should_checkpoint


def num_workers(strategy):
    """How many processes train together."""
    return strategy.num_replicas_in_sync // len(strategy.extended.worker_devices)


def distribute(strategy, batches_of):
    """What to give `fit`: of every global batch each worker makes only its part.

    Args:
      strategy: of `make_strategy`.
      batches_of: function from (worker, number of workers) to the dataset of its parts.
    """
    workers = num_workers(strategy)
    if workers == 1:
        return batches_of(0, 1)  # `fit` divides a batch among the replicas
    per_worker = strategy.num_replicas_in_sync // workers

    def of_worker(context):
        parts = batches_of(context.input_pipeline_id, workers)
        if per_worker == 1:
            return parts
        size = parts.element_spec["view1"].shape[0] // per_worker
        return parts.rebatch(size, drop_remainder=True)

    return strategy.distribute_datasets_from_function(of_worker)


@contextlib.contextmanager
def chief_first(strategy):
    """The chief does what is in the block before the others do it, as where it writes a cache."""
    if not is_chief(strategy):
        _await_all(strategy)
    yield
    if is_chief(strategy):
        _await_all(strategy)


def _await_all(strategy):
    any_worker(strategy, False)


def any_worker(strategy, flag):
    """Whether the flag, a bool, is true in any process; all must ask at the same time."""
    if num_workers(strategy) == 1:
        return flag
    return bool(_sum(strategy, tf.constant(float(flag))) > 0.0)


@tf.function
def _sum(strategy, value):
    def of_replicas():
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, value)

    return strategy.experimental_local_results(strategy.run(of_replicas))[0]


@contextlib.contextmanager
def folder_to_write(strategy, folder):
    """The folder for the chief; for others, who have part in every checkpoint, a passing one."""
    if is_chief(strategy):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="byol_tf_worker_") as passing:
        yield pathlib.Path(passing)


def _multi_worker():
    """MultiWorkerMirroredStrategy over the cluster of TF_CONFIG, or of the Slurm step."""
    try:
        if "TF_CONFIG" in os.environ:
            resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        elif "SLURM_STEP_NUM_TASKS" in os.environ:
            gpus = len(tf.config.list_physical_devices("GPU"))
            resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
                gpus_per_node=gpus, gpus_per_task=None if gpus else 0
            )
        else:
            raise UserError(
                "--strategy=multi_worker: neither TF_CONFIG nor a Slurm step names the machines: "
                "set TF_CONFIG, or start with srun (docs/distributed.md)."
            )
        cluster = resolver.cluster_spec()
        addresses = [address for job in cluster.jobs for address in cluster.job_tasks(job)]
        logging.info("worker %s of %s", resolver.task_id, ", ".join(addresses))
        return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
    # What is not JSON, not a cluster, or not there yet, all say it in their own ways.
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
        tf.errors.OpError,
    ) as error:
        source = "TF_CONFIG" if "TF_CONFIG" in os.environ else "Slurm"
        raise UserError(
            f"--strategy=multi_worker: no cluster from {source}: {_first_line(error)}: see "
            "docs/distributed.md."
        ) from error


def _tpu(name):
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, RuntimeError, OSError, tf.errors.OpError) as error:
        raise UserError(
            f"--strategy=tpu --tpu={name}: no TPU there: {_first_line(error)}: see "
            "docs/distributed.md."
        ) from error
    return tf.distribute.TPUStrategy(resolver)


def _first_line(error):
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else repr(error)
