"""One device, several, several machines: the strategies, and each worker's part of the work."""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import signal
import tempfile

import tensorflow as tf
from absl import logging

from byol_tf.errors import UserError, reason

_ANY_NUMBER = 1024
# What a sum over the workers ends with where one of them is gone.
_LOST_WORKER = (
    *(tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError),
    *(tf.errors.InternalError, tf.errors.DeadlineExceededError),
)


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
    return num_workers(strategy) == 1 or strategy.extended.should_checkpoint


def num_workers(strategy):
    """How many processes train together."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return 1
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


def replica_context():
    """TensorFlow's context of this replica, in a step of several; else None."""
    context = tf.distribute.get_replica_context()
    alone = context is None or context.num_replicas_in_sync == 1
    return None if alone else context


def all_reduce(op, value):
    """What the replicas have of a tensor, summed or averaged, for each of them.

    Outside of a step and where there is one replica, the tensor itself.

    Args: op: "SUM" or "MEAN". value: a tensor, of the same shape on each replica.
    """
    context = replica_context()
    return value if context is None else context.all_reduce(op, value)


def of_all_replicas(values):
    """The tensors [B, ...] of every replica behind each other: [global batch, ...].

    A sum of what is zero elsewhere: unlike a gather it keeps its order among the sums of
    batch norm and gradients, without which replicas on one machine mix them up.
    """
    context = replica_context()
    if context is None:
        return values
    place = tf.one_hot(
        context.replica_id_in_sync_group, context.num_replicas_in_sync, dtype=values.dtype
    )
    stacked = all_reduce("SUM", tf.tensordot(place, values, 0))
    return tf.reshape(stacked, tf.concat([[-1], tf.shape(values)[1:]], 0))


def _await_all(strategy):
    any_worker(strategy, False)


def any_worker(strategy, flag):
    """Whether the flag, a bool, is true in any process; all must ask at the same time."""
    if num_workers(strategy) == 1:
        return flag
    return bool(_sum(strategy, tf.constant(float(flag))) > 0.0)


@tf.function(autograph=False)
def _sum(strategy, value):
    return strategy.reduce("SUM", strategy.run(tf.identity, args=(value,)), axis=None)


def check_alike(strategy, value, problem):
    """Ends all processes where they differ in a value; all must ask at the same time.

    Args: value: function to anything whose `repr` tells it. problem: what to say then.

    Raises:
      UserError: in all of them.
    """
    if num_workers(strategy) == 1:
        return
    # 32 bits, of which float64 has exact sums.
    digest = int.from_bytes(hashlib.sha256(repr(value()).encode()).digest()[:4], "big")
    total = float(_sum(strategy, tf.constant(digest, tf.float64)))
    if any_worker(strategy, total != strategy.num_replicas_in_sync * digest):
        raise UserError(problem)


@contextlib.contextmanager
def all_alive(strategy):
    """Turns what a worker meets with when another is gone into one line.

    Raises:
      UserError: if another worker of the cluster has ended.
    """
    try:
        yield
    except _LOST_WORKER as error:
        if num_workers(strategy) == 1:
            raise
        logging.warning("what was done together with the other workers failed: %s", reason(error))
        raise UserError(
            "another worker has ended or cannot be reached: start all of them again with the same "
            "command, which goes on from the last checkpoint."
        ) from error


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
            source = "TF_CONFIG"
            _check_tf_config(os.environ["TF_CONFIG"])
            resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        elif "SLURM_STEP_NUM_TASKS" in os.environ:
            source = "Slurm"
            resolver = _slurm_cluster()
        else:
            raise UserError(
                "--strategy=multi_worker: neither TF_CONFIG nor a Slurm step names the machines: "
                "set TF_CONFIG, or start with srun (docs/distributed.md)."
            )
        workers = resolver.cluster_spec().as_dict()
        addresses = [address for job in workers.values() for address in job]
        if len(addresses) > 1:
            logging.info("awaiting the workers %s", ", ".join(addresses))
        strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
        # TensorFlow has put a handler of its own in its place, which does nothing.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        return strategy
    # A cluster that is not one, or not there yet, is said in many ways.
    except (ValueError, TypeError, KeyError, RuntimeError, tf.errors.OpError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--strategy=multi_worker: no cluster from {source}: {_first_sentence(error)}: see "
            "docs/distributed.md."
        ) from error


def _slurm_cluster():
    """The workers of the Slurm step, each with all GPUs that Slurm shows to it."""
    resolvers = tf.distribute.cluster_resolver
    # Asked only for the addresses: it would divide a machine's GPUs, which Slurm has done.
    slurm = resolvers.SlurmClusterResolver(
        gpus_per_node=_ANY_NUMBER, gpus_per_task=1, auto_set_gpu=False
    )
    workers = slurm.cluster_spec()
    return resolvers.SimpleClusterResolver(
        workers,
        task_type=slurm.task_type,
        task_id=slurm.task_id,
        rpc_layer=slurm.rpc_layer,
        num_accelerators={"GPU": len(tf.config.list_physical_devices("GPU"))},
    )


def _check_tf_config(text):
    """Raises a ValueError if TF_CONFIG does not name the workers and which of them this is."""
    config = json.loads(text)
    named = config if isinstance(config, dict) else {}
    if not all(isinstance(named.get(name), dict) for name in ("cluster", "task")):
        raise ValueError('it must have the objects "cluster" and "task"')
    workers = config["cluster"].get("worker", []) + config["cluster"].get("chief", [])
    if not all(isinstance(address, str) and ":" in address for address in workers):
        raise ValueError(f"{workers} are not addresses of the form host:port")
    task = config["task"]
    if not 0 <= task["index"] < len(config["cluster"][task["type"]]):
        raise ValueError(f"no {task['type']} has the index {task['index']}")


def _tpu(name):
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, RuntimeError, OSError, tf.errors.OpError) as error:
        raise UserError(
            f"--strategy=tpu --tpu={name}: no TPU there: {_first_sentence(error)}: see "
            "docs/distributed.md."
        ) from error
    return tf.distribute.TPUStrategy(resolver)


def _first_sentence(error):
    sentences = re.split(r"\.\s|\n", str(error).strip() or repr(error))
    return f"{type(error).__name__}, {sentences[0].rstrip('.')}"
