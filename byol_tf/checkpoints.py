"""Checkpoints that are whole or not there, the last K and the best; one process a workdir."""

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import re
import shutil

import tensorflow as tf
from absl import flags, logging
from tensorflow.core.protobuf import trackable_object_graph_pb2

from byol_tf import distribution
from byol_tf.errors import UserError, reason
from byol_tf.keras_api import keras
from byol_tf.resnet import BASIC, BLOCKS_PER_GROUP
from byol_tf.whole import name_of_unfinished, sync
from byol_tf.workdir import cannot_write, write_text

FLAGS = flags.FLAGS
_PREFIX = re.compile(r"ckpt-(\d+)")
_PART = re.compile(r"(ckpt-\d+)\.(index|data-\d{5}-of-\d{5})")
_LISTED = re.compile(r'^all_model_checkpoint_paths: "(.*)"$', re.MULTILINE)
_UNFINISHED = ".unfinished"
_CHANNELS = 512  # of a ResNet's last group at width 1
ENCODER_FLAGS = ("encoder", "stem", "width_multiplier", "channels")
MODEL_FLAGS = (
    *("method", *ENCODER_FLAGS, "projector_depth", "projector_hidden_size"),
    *("projector_output_size", "predictor", "predictor_depth", "optimizer"),
)
_locks = {}  # path -> open file


class Manager:
    """The checkpoints of one folder; in use like a `tf.train.CheckpointManager`.

    A checkpoint is written aside and moved into its place when it is on the disk, the index
    last, with which it is there. Then those older than the last K are removed. Which is the
    newest says the file "checkpoint", TensorFlow's; one that it lacks is newer still, since it
    comes after the rest of a save, and without it the steps say it.

    Written in the foreground: of a ResNet-50 with LARS, 429 MB, a save takes 1.2 to 2.1 s, less than
    one step of 8 images on two cores (2.5 s). TensorFlow's asynchronous writing took 0.5 GB more
    memory for that, let the next save wait as long, and slowed the steps meanwhile.

    Args:
      checkpoint: the `tf.train.Checkpoint` to save, or None to read only.
      folder: path of the checkpoints; made by the first save.
      keep: int, K.

    Attributes:
      checkpoint: as given.
      checkpoints: paths without ending, the oldest first, whole or not.
    """

    def __init__(self, checkpoint, folder, keep=2):
        self.checkpoint = checkpoint
        self.folder = pathlib.Path(folder)
        self.keep = keep
        self.checkpoints = [str(self.folder / name) for name in _names(self.folder)]

    @property
    def latest_checkpoint(self):
        """The newest path, or None."""
        return self.checkpoints[-1] if self.checkpoints else None

    def newest_whole(self):
        """The path of the newest checkpoint that is whole; forgets those damaged after it.

        Returns: a string, or None where there is no checkpoint at all.

        Raises:
          UserError: if all are damaged.
        """
        damaged = []
        while self.checkpoints:
            fault = damage(self.checkpoints[-1])
            if fault is None:
                if damaged:
                    logging.warning("using %s, the one before", self.checkpoints[-1])
                return self.checkpoints[-1]
            logging.warning("%s is damaged (%s)", self.checkpoints[-1], fault)
            damaged.append(self.checkpoints.pop())
        if not damaged:
            return None
        raise UserError(
            f"no checkpoint is whole: {', '.join(damaged)} ({fault}): put back a copy of one, or "
            f"remove {self.folder} to begin anew."
        )

    def save(self, checkpoint_number):
        """Saves the checkpoint of this step, in the place of one of the same number.

        Raises:
          UserError: if it cannot be written, as on a full disk; all others are whole then.
        """
        name = f"ckpt-{checkpoint_number}"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = self.folder / _UNFINISHED
            try:
                with distribution.all_alive(tf.distribute.get_strategy()):  # which all do together
                    self.checkpoint.write(str(unfinished / name))
                _move_parts(unfinished, self.folder, name)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            path = str(self.folder / name)
            self.checkpoints = [p for p in self.checkpoints if p != path] + [path]
            self.checkpoints = self.checkpoints[-self.keep :]
            _remove_parts(self.folder, [pathlib.Path(p).name for p in self.checkpoints])
            _write_state(self.folder, self.checkpoints)

    def best(self):
        """What `keep_best` wrote: a dict of "checkpoint", "step" and "knn_top1"; None if nothing."""
        path = self.folder / "best" / "best.json"
        try:
            found = json.loads(path.read_text())
            prefix = path.with_name(f"ckpt-{found['step']:d}")
            return {"checkpoint": str(prefix), **found, "knn_top1": float(found["knn_top1"])}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logging.warning("%s cannot be read (%s): no checkpoint counts as best", path, error)
            return None

    def best_whole(self):
        """The path of the best checkpoint.

        Raises:
          UserError: if there is none, or it is damaged.
        """
        best = self.best()
        if best is None:
            raise UserError(
                f"--use_checkpoint=best: there is none in {self.folder / 'best'}: pretrain with "
                "--knn_every, or leave the flag out."
            )
        fault = damage(best["checkpoint"])
        if fault is not None:
            raise UserError(
                f"--use_checkpoint=best: {best['checkpoint']} is damaged ({fault}): put back a "
                "copy, or leave the flag out."
            )
        return best["checkpoint"]

    def keep_best(self, knn_top1):
        """Keeps the latest checkpoint beyond the last K if none was as good yet.

        Returns: whether that is so.

        Raises:
          UserError: if it cannot be written; the best before is still there then.
        """
        best = self.best()
        if best is not None and best["knn_top1"] >= knn_top1:
            return False
        folder, name = self.folder / "best", pathlib.Path(self.latest_checkpoint).name
        with writing(folder):
            folder.mkdir(exist_ok=True)
            for part in _parts(self.folder, name):
                _link(part, folder / part.name)
            record = {"step": step_of(name), "knn_top1": knn_top1}
            sync(folder)
            write_text(folder / "best.json", json.dumps(record) + "\n")  # from now on it is
            sync(folder)
            _remove_parts(folder, [name])
        return True


class KeepBest(keras.callbacks.Callback):
    """Measures the encoder every few epochs, and keeps the best checkpoint.

    Args:
      manager: a `Manager`.
      save: function that saves a checkpoint of this step, if there is none.
      measure: function from a checkpoint's path to the k-NN accuracy of its encoder, or to None
        if there is none, which ends the measuring.
      every: steps between two.
      watch: a `training.Watch`, which writes the figures down.
    """

    _supports_tf_logs = True

    def __init__(self, manager, save, measure, every, watch):
        super().__init__()
        self.manager = manager
        self.save = save
        self.measure = measure
        self.every = every
        self.watch = watch

    def on_train_begin(self, logs=None):
        # Of a run that was killed between the checkpoint and its accuracy.
        if not self.watch.has_logged("knn_top1"):
            self.on_epoch_end(None)

    def on_epoch_end(self, epoch, logs=None):
        step = int(self.model.optimizer.iterations.numpy())
        # By steps: Keras ends an epoch also where a run stops amid one.
        if not step or step % self.every:
            return
        self.save()
        if self.measure is None:
            return
        with self.watch.paused():
            accuracy = self.measure(self.manager.latest_checkpoint)
        if accuracy is None:
            self.measure = None
            return
        best = self.manager.keep_best(accuracy)
        note = ", the best so far" if best else ""
        logging.info("k-NN at step %d: %.2f %%%s", step, 100 * accuracy, note)
        self.watch.write({"knn_top1": accuracy})


# Whole or damaged ---------------------------------------------------------------------


def damage(prefix):
    """What is wrong with a checkpoint, in a few words; None if every byte of it is as written.

    Reads all of it: TensorFlow keeps a checksum of every tensor.
    """
    parts = _parts(pathlib.Path(prefix).parent, pathlib.Path(prefix).name)
    if not any(part.suffix == ".index" for part in parts):
        return "its .index file is missing"
    states = [(part.name, part.stat()) for part in parts]
    stamp = tuple((name, state.st_mtime_ns, state.st_size) for name, state in states)
    return _damage(str(prefix), stamp)


@functools.lru_cache(maxsize=8)  # of each task that reads the same files
def _damage(prefix, stamp):
    try:
        reader = tf.train.load_checkpoint(prefix)
        shapes = reader.get_variable_to_shape_map()
        graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(
            reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH")
        )
        # An index cut at the wrong place reads as a shorter one.
        for node in graph.nodes:
            for attribute in node.attributes:
                if attribute.checkpoint_key not in shapes:
                    return f"{attribute.checkpoint_key} is missing"
        for name in shapes:
            reader.get_tensor(name)
    # Of a garbled file TensorFlow says so in many ways.
    except Exception as error:
        return reason(error)
    return None


# Files --------------------------------------------------------------------------------


def _names(folder):
    """Names of the checkpoints in a folder, the newest last."""
    try:
        state = (folder / "checkpoint").read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        state = ""
    names = [pathlib.Path(path).name for path in _LISTED.findall(state)]
    names = [name for name in names if _PREFIX.fullmatch(name)]
    there = {path.stem for path in folder.glob("ckpt-*.index") if _PART.fullmatch(path.name)}
    return names + sorted(there - set(names), key=step_of)


def step_of(prefix):
    """The step of a checkpoint, from its path or name."""
    return int(_PREFIX.fullmatch(pathlib.Path(prefix).name)[1])


def _parts(folder, name):
    """The files of one checkpoint, the index last."""
    parts = [path for path in folder.glob(f"{name}.*") if _PART.fullmatch(path.name)]
    return sorted(parts, key=lambda path: (path.suffix == ".index", path.name))


def _move_parts(source, target, name):
    parts = _parts(source, name)
    for part in parts:
        sync(part)  # or the power may fail after the removal of those before
    (target / f"{name}.index").unlink(missing_ok=True)
    for part in parts:
        part.replace(target / part.name)
    sync(target)


def _remove_parts(folder, kept):
    """Removes all checkpoints in a folder but those of these names."""
    for path in sorted(folder.glob("ckpt-*"), key=lambda path: path.suffix != ".index"):
        part = _PART.fullmatch(path.name)
        if part and part[1] not in kept:
            path.unlink()


def _write_state(folder, paths):
    """Writes TensorFlow's list of a folder's checkpoints, for `tf.train.latest_checkpoint`."""
    names = [pathlib.Path(path).name for path in paths]
    lines = [f'model_checkpoint_path: "{names[-1]}"']
    lines += [f'all_model_checkpoint_paths: "{name}"' for name in names]
    write_text(folder / "checkpoint", "\n".join(lines) + "\n")


def _link(source, target):
    """A second name for a file, or a copy where the file system knows no such."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


@contextlib.contextmanager
def writing(path):
    """Turns what goes wrong while `path` is written into one line.

    Raises:
      UserError: for an error of the system or of TensorFlow.
    """
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        raise cannot_write(path, error) from error


# One process a workdir ----------------------------------------------------------------


def lock(workdir):
    """Holds the workdir for this process until it ends, however it ends.

    Raises:
      UserError: if another process holds it.
    """
    path = pathlib.Path(workdir).resolve() / ".lock"
    if path in _locks:
        return
    with writing(path):
        file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise UserError(
            f"--workdir={workdir}: process {file.read().strip() or 'unknown'} is at work there: "
            "wait for its end, or choose another."
        ) from error
    except OSError as error:
        logging.warning("%s: %s: let no other process write there", path, error.strerror)
    _locks[path] = file
    with writing(path):
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()


def remove_leftovers(workdir):
    """Removes what killed processes left half written; only for the process with the lock."""
    workdir = pathlib.Path(workdir)
    folder = workdir / "checkpoints"
    names = _names(folder)
    leftovers = [folder / _UNFINISHED, *folder.glob("ckpt-*_temp"), *folder.glob("*.tempstate*")]
    for path in folder.glob("ckpt-*.data-*"):
        if path.stem not in names:  # no index: its move did not come to the end
            leftovers.append(path)
    best = Manager(None, folder).best()
    if best is not None:
        _remove_parts(folder / "best", [f"ckpt-{best['step']}"])
    exports = workdir / "saved_model"
    for place in (workdir, folder, folder / "best", exports):
        leftovers += [path for path in place.glob(".*") if name_of_unfinished(path)]
    for aside in exports.glob(".*.old.*"):
        replaced = exports / (name_of_unfinished(aside) or "").removesuffix(".old")
        if not replaced.exists():  # killed between the two moves of an export
            aside.rename(replaced)
    for path in filter(os.path.exists, leftovers):
        logging.info("removing %s, which was left unfinished", path)
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


# Checkpoints of other flags -----------------------------------------------------------


def load(checkpoint, prefix):
    """Puts the values of the checkpoint at `prefix` into all variables of a `tf.train.Checkpoint`.

    Raises:
      UserError: if it lacks one of them, or has one of another shape.
    """
    try:
        checkpoint.read(prefix).assert_existing_objects_matched().expect_partial()
    except (AssertionError, ValueError, tf.errors.OpError) as error:
        raise UserError(
            f"{prefix} does not fit the flags ({reason(error)}): give those of its run, or "
            "choose another --workdir."
        ) from error


def check_flags(prefix, names):
    """Refuses flags of other networks than those in a checkpoint, as far as its shapes tell.

    Which flags.txt tells first, where it is and has not been edited.

    Raises:
      UserError: names the flag and what the checkpoint has.
    """
    found = architecture(tf.train.load_checkpoint(prefix).get_variable_to_shape_map())
    for name in names:
        value = FLAGS[name].value
        if name == "width_multiplier":
            value = int(_CHANNELS * value) / _CHANNELS
        if name in found and value not in found[name]:
            raise UserError(
                f"--{name}={FLAGS[name].value}: {prefix} has "
                f"{' or '.join(map(str, found[name]))}: leave the flag out, mend it in flags.txt "
                "if it is there, or choose another --workdir."
            )


def architecture(shapes):
    """What made a checkpoint: a dict from flags to the values that would fit it.

    Args: shapes: dict from its variables' names to lists of int.
    """
    values = {
        name.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE").removeprefix("model/"): shape
        for name, shape in shapes.items()
        if "/.OPTIMIZER_SLOT/" not in name
    }
    found = _encoder_flags(values)
    projector = _kernels(values, "online_projector")
    predictor = _kernels(values, "predictor")
    found["method"] = ["byol" if projector else "supervised"]
    if projector:
        found["projector_depth"] = [len(projector)]
        found["projector_output_size"] = [projector[-1][1]]
        found["predictor"] = [bool(predictor)]
    if predictor:
        found["predictor_depth"] = [len(predictor)]
    for kernels in (projector, predictor):
        if len(kernels) > 1:
            found["projector_hidden_size"] = [kernels[0][1]]
    if "optimizer/iter" in values:
        found["optimizer"] = ["lamb"]
    elif "optimizer/_variables/2" in values:
        # Two of every weight, or one.
        two = values["optimizer/_variables/1"] == values["optimizer/_variables/2"]
        found["optimizer"] = ["adam"] if two else ["lars", "sgd"]
    return found


def _encoder_flags(values):
    """The flags of the encoder; none of one that is no ResNet of ours."""
    layers = {name.split("/")[1] for name in values if name.startswith("online_encoder/layer_")}
    encoders = {2 * _convolutions(name): name for name in BLOCKS_PER_GROUP}
    if len(layers) not in encoders:
        return {}
    name = encoders[len(layers)]
    (size,) = values[f"online_encoder/layer_with_weights-{len(layers) - 1}/gamma"]
    width = size if name in BASIC else size // 4
    stem = values["online_encoder/layer_with_weights-0/kernel"]
    return {
        "encoder": [name],
        "stem": ["imagenet" if stem[0] == 7 else "small"],
        "width_multiplier": [width / _CHANNELS],
        "channels": [stem[2]],
    }


def _convolutions(name):
    per_block = 2 if name in BASIC else 3
    return 1 + sum(per_block * blocks + 1 for blocks in BLOCKS_PER_GROUP[name])


def _kernels(values, head):
    """Shapes of the dense layers of a head, from the first to the last."""
    pattern = re.compile(rf"{head}/layer_with_weights-(\d+)/kernel")
    found = {int(pattern.fullmatch(n)[1]): s for n, s in values.items() if pattern.fullmatch(n)}
    return [found[i] for i in sorted(found)]
