"""What a run writes under its `--workdir`: flags, results, checkpoints and their names."""

import hashlib
import json
import pathlib
import sys

from absl import flags, logging

from byol_tf import config
from byol_tf.errors import UserError, reason
from byol_tf.whole import whole_file

FLAGS = flags.FLAGS
# Of these the networks' shapes depend, so no task can use a checkpoint of others.
_SHAPE_FLAGS = {
    "channels",
    *(flag.name for flag in FLAGS.get_flags_for_module(config.model.__name__)),
}
# These may change while a run goes on: what is learned stays the same.
_FREE_FLAGS = {
    *("task", "workdir", "log_every", "checkpoint_every", "max_steps", "data_dir"),
    *("keep_checkpoints", "knn_every", "use_checkpoint"),
    *("checkpoint", "num_classes", "keep_step"),
    *("eval_split", "embed_split", "embeddings_file", "baselines"),
    *("query", "neighbours", "duplicate_similarity"),
    *("strategy", "logical_cpus", "augment_on", "deterministic", "intra_op_threads"),
    *(flag.name for flag in FLAGS.get_flags_for_module(config.evaluation.__name__)),
}
# These are of one command or of the machine: flags.txt does not have them.
_OF_A_COMMAND = {"max_steps", "query", "strategy", "tpu", "logical_cpus", "intra_op_threads"}
# What results.json has objects of.
_OBJECTS = {
    *("random_init", "raw_pixels", "linear_eval", "finetune", "segmentation", "depth"),
    *("transfer", "other_checkpoints", "versions"),
}
# These may differ from worker to worker.
_OF_A_WORKER = {
    *("workdir", "data_dir", "dense_data_dir", "transfer_data_dir"),
    *("logical_cpus", "intra_op_threads"),
}


def own_flags():
    """Flag name -> the line of a flagfile that sets it, for all flags of this project."""
    lines = {}
    for module in config.MODULES:
        for flag in FLAGS.get_flags_for_module(module.__name__):
            if flag.value is not None:
                lines[flag.name] = flag.serialize()
    return lines


def read_flags(workdir):
    """The lines of the workdir's flags.txt, by flag name; none where there is no run yet.

    Raises:
      UserError: if it cannot be read, or there can be no such workdir.
    """
    try:
        path = _file(workdir, "flags.txt")
        text = path.read_text() if path.exists() else ""
    # RuntimeError for the home of an unknown user, ValueError for what is no text.
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--workdir={workdir}: flags.txt: {error}: mend or remove it.") from error
    lines = [line for line in text.splitlines() if line.startswith("--")]
    names = [line.lstrip("-").split("=")[0] for line in lines]
    return {n if n in FLAGS else n.removeprefix("no"): line for n, line in zip(names, lines)}


def write_flags(workdir, names=None):
    """Writes the flags of this run, or only those named, as a flagfile.

    Not those that are of one command, or of the machine that it ran on.
    """
    lines = [
        line
        for name, line in own_flags().items()
        if name not in _OF_A_COMMAND and (names is None or name in names)
    ]
    write_text(_file(workdir, "flags.txt"), "\n".join(lines) + "\n")


def write_imported_flags(workdir):
    """Writes the flags that an imported checkpoint settles; all others remain to be chosen."""
    write_flags(workdir, _SHAPE_FLAGS | {"optimizer"})


def set_flags(values, source):
    """Sets flags to values found in `source`.

    Raises:
      UserError: if one was given another value.
    """
    for name, value in values.items():
        flag = FLAGS[name]
        if not flag.using_default_value and flag.value != value:
            raise UserError(f"--{name}={flag.value}: {source} has {value}: leave the flag out.")
        FLAGS[name].value = value


def common_flags():
    """The lines of the flags that must be the same in all workers of a cluster."""
    return [line for name, line in own_flags().items() if name not in _OF_A_WORKER]


def check_flags(saved, pretrain):
    """Refuses flags that do not fit the run in the workdir, whose flags are `saved`.

    Raises:
      UserError: names the flag, its value there and the mend.
    """
    if not saved:
        path = _file(FLAGS.workdir, "flags.txt")
        logging.warning("%s says nothing: flags are compared as far as the checkpoint tells", path)
    given = own_flags()
    fixed = set(given) - _FREE_FLAGS if pretrain else _SHAPE_FLAGS
    for name in sorted(fixed & saved.keys()):
        if given[name] != saved[name]:
            raise UserError(
                f"{given[name]}: the run in --workdir={FLAGS.workdir} has {saved[name]}: leave "
                "the flag out (also where a flagfile sets it), or choose another --workdir."
            )


def read_results(workdir):
    """The figures of results.json; none where there is no such file yet.

    Raises:
      UserError: if it is not a JSON object.
    """
    path = _file(workdir, "results.json")
    try:
        results = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}): mend or remove it.") from error
    if not isinstance(results, dict):
        raise UserError(f"{path}: not a JSON object: mend or remove it.")
    for name in _OBJECTS & results.keys():
        if not isinstance(results[name], dict):
            raise UserError(f"{path}: {name} is not a JSON object: mend or remove the file.")
    return results


def update_results(workdir, **results):
    """Merges figures into results.json, keeping what is there."""
    merged = read_results(workdir)
    for key, value in results.items():
        if isinstance(value, dict):
            value = {**merged.get(key, {}), **value}
        merged[key] = value
    write_results(workdir, merged)


def write_results(workdir, results):
    """Writes results.json, with the versions."""
    results = {**results, "versions": versions()}
    write_text(_file(workdir, "results.json"), json.dumps(results, indent=2) + "\n")


def weights_sha256(weights):
    """SHA-256 over a list of weights, in its order."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def write_text(path, text):
    """`write_bytes` of text, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path, content):
    """Writes a whole file or none.

    Raises:
      UserError: if it cannot be written; what was there before is there still.
    """
    try:
        with whole_file(path) as unfinished:
            unfinished.write_bytes(content)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path, error):
    """The `UserError` of a file or folder that cannot be written, as on a full disk.

    Args: error: an OSError, or one of TensorFlow.
    """
    what = getattr(error, "strerror", None) or reason(error)
    return UserError(
        f"{path}: cannot be written ({what}): the checkpoints saved before are whole: mend that "
        "(make room, if the disk is full), and the same command goes on from the last."
    )


def _file(workdir, name):
    return pathlib.Path(workdir).expanduser() / name


def versions():
    """Name -> version, of Python and the packages a run depends on most."""
    import importlib.metadata

    found = {"python": sys.version.split()[0]}
    for package in ("tensorflow", "keras", "tf-keras", "tensorflow-addons", "tensorflow-datasets"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
