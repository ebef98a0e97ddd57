"""How well the encoder serves other data sets, into results.json and transfer.md."""

import contextlib

import tensorflow as tf
from absl import flags, logging

from byol_tf import checkpoints, workdir
from byol_tf import transfer as sets
from byol_tf.errors import UserError, reason
from byol_tf.keras_api import keras
from byol_tf.tasks import run

FLAGS = flags.FLAGS


def transfer():
    """Evaluates on the data sets of --transfer; see `transfer.linear_transfer`.

    Raises:
      UserError: at the end, if a set could not be used; it names each.
    """
    faults, parts = {}, {}
    for name in dict.fromkeys(FLAGS.transfer or [known.name for known in sets.SETS]):
        chosen = sets.find_set(name)
        with _left_out(chosen, faults):
            parts[chosen] = sets.load_set(
                chosen, _data_dir(), channels=FLAGS.channels, seed=FLAGS.seed
            )
    for chosen, part in parts.items():
        for mode in FLAGS.transfer_mode:
            with _left_out(chosen, faults, part):
                _keep(chosen, part, mode, MODES[mode](chosen, part))
    if parts.keys() - faults.keys():
        print(_table(), flush=True)
    if faults:
        names = ", ".join(chosen.name for chosen in faults)
        raise UserError(f"--transfer: left out {names}: the warnings above say why, and the mend.")


def _data_dir():
    if FLAGS.transfer_data_dir or FLAGS.dataset == "image_folder":
        return FLAGS.transfer_data_dir
    return FLAGS.data_dir


@contextlib.contextmanager
def _left_out(chosen, faults, part=None):
    """Notes in `faults` what makes a data set useless, so that the others can go on."""
    try:
        yield
    except UserError as error:
        faults[chosen] = str(error)
    except tf.errors.OpError as error:
        if "IteratorGetNext" not in error.message:  # not from the input pipeline
            raise
        sources = (part.train, part.validation, part.test)
        faults[chosen] = next(filter(None, (s.find_fault() for s in sources)), reason(error))
    if chosen in faults:
        fault = faults[chosen].removeprefix(f"--transfer={chosen.name}: ")
        logging.warning("--transfer: left out %s: %s", chosen.name, fault)


def _linear(chosen, part):
    parts = sets.extract_parts(run.trained_encoder(), part, FLAGS.image_size)
    return sets.linear_transfer(*parts, chosen.metric)


def _finetune(chosen, part):
    keras.utils.set_random_seed(FLAGS.seed)  # whatever was done before
    with run.local_strategy().scope():
        return sets.finetune_transfer(
            run.trained_encoder(),
            part,
            chosen.metric,
            image_size=FLAGS.image_size,
            learning_rates=FLAGS.transfer_learning_rates,
            weight_decays=FLAGS.transfer_weight_decays,
            steps=FLAGS.transfer_steps,
            batch_size=FLAGS.transfer_batch_size,
            min_crop_area=FLAGS.min_crop_area,
            seed=FLAGS.seed,
            verbose=run.verbosity(),
        )


MODES = {"linear": _linear, "finetune": _finetune}


def _keep(chosen, part, mode, figures):
    """Writes the figures of one data set to results.json, and the table of all to transfer.md."""
    print(f"{mode:>12} {chosen.name:>12} {100 * figures['value']:6.2f} %", flush=True)
    figures = {
        "metric": chosen.metric,
        **figures,
        "images": part.train.num_examples,
        "validation_images": part.validation.num_examples,
        "test_images": part.test.num_examples,
        "step": checkpoints.step_of(run.chosen_checkpoint()),
    }
    before = workdir.read_results(FLAGS.workdir).get("transfer", {}).get(chosen.name, {})
    workdir.update_results(FLAGS.workdir, transfer={chosen.name: {**before, mode: figures}})
    workdir.write_text(run.folder() / "transfer.md", _table())


def _table():
    """All that results.json holds of the encoder, as Markdown."""
    step = checkpoints.step_of(run.chosen_checkpoint())
    lines = [
        "| data set | metric | | chosen on validation | test, % |",
        "|---|---|---|---|---|",
    ]
    for name, modes in workdir.read_results(FLAGS.workdir)["transfer"].items():
        for mode, found in modes.items():
            if found["step"] == step:
                _, metric = sets.METRICS[found["metric"]]
                value = f"{100 * found['value']:.2f}"
                lines.append(f"| {name} | {metric} | {mode} | {_settings(found)} | {value} |")
    return "\n".join(lines) + "\n"


def _settings(found):
    names = {"l2": "L2", "learning_rate": "rate", "weight_decay": "decay"}
    return ", ".join(f"{text} {found[key]:.2g}" for key, text in names.items() if key in found)
