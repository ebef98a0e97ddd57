"""Checkpoints that are cut off, garbled, of other flags, or find no room; and the best one."""

import json
import logging
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import flagsaver
from test_cli import TINY

import byol_tf
from byol_tf import checkpoints, config, distribution, evaluation, training, workdir
from byol_tf.embed import write_embeddings
from byol_tf.keras_api import keras
from byol_tf.optimizers import build_optimizer, make_optimizer
from byol_tf.tasks import run

ROOT = pathlib.Path(__file__).parent.parent
DATA = "data-00000-of-00001"


@pytest.fixture
def warnings(caplog, monkeypatch):
    """Function to what has been warned of so far."""
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.fixture
def value():
    return tf.Variable(tf.zeros([40]))


@pytest.fixture
def manager(value, tmp_path):
    """Of one variable, with which `save` writes its step."""
    checkpoint = tf.train.Checkpoint(value=value, other=tf.Variable(tf.ones([3, 5])))
    return checkpoints.Manager(checkpoint, tmp_path / "checkpoints")


def save(manager, *steps):
    for step in steps:
        manager.checkpoint.value.assign(tf.fill([40], float(step)))
        manager.save(step)


def again(manager):
    """A manager as the next process makes it."""
    return checkpoints.Manager(manager.checkpoint, manager.folder, manager.keep)


def saved_value(manager, path):
    checkpoints.load(manager.checkpoint, path)
    return manager.checkpoint.value.numpy().tolist()


def steps_of(manager):
    return [checkpoints.step_of(path) for path in manager.checkpoints]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# The last K ---------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_are_kept(manager, keep):
    manager.keep = keep
    save(manager, 2, 4, 6, 8)
    kept = [2, 4, 6, 8][-keep:]
    parts = [f"ckpt-{step}.{ending}" for step in kept for ending in (DATA, "index")]
    assert files(manager.folder) == ["checkpoint", *parts]
    assert steps_of(manager) == steps_of(again(manager)) == kept
    assert tf.train.latest_checkpoint(str(manager.folder)) == manager.latest_checkpoint
    for path, step in zip(manager.checkpoints, kept):
        assert saved_value(manager, path) == [step] * 40


def test_fewer_are_kept_from_now_on(manager):
    manager.keep = 4
    save(manager, 1, 2, 3)
    fewer = again(manager)
    fewer.keep = 1
    save(fewer, 4)
    assert files(fewer.folder) == ["checkpoint", f"ckpt-4.{DATA}", "ckpt-4.index"]


def test_a_folder_without_checkpoints(manager):
    assert manager.latest_checkpoint is None and manager.newest_whole() is None
    assert not manager.folder.exists()  # to look is not to write


def test_checkpoints_of_tensorflows_manager(manager):
    """As runs of before have them."""
    theirs = tf.train.CheckpointManager(manager.checkpoint, str(manager.folder), max_to_keep=2)
    for step in (2, 4, 6):
        manager.checkpoint.value.assign(tf.fill([40], float(step)))
        theirs.save(checkpoint_number=step)
    ours = again(manager)
    assert ours.checkpoints == theirs.checkpoints
    assert saved_value(ours, ours.newest_whole()) == [6] * 40


# Damage -------------------------------------------------------------------------------


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x20
    path.write_bytes(content)


SPOILS = {
    "cut data": (DATA, lambda path: os.truncate(path, path.stat().st_size - 50)),
    "empty data": (DATA, lambda path: os.truncate(path, 0)),
    "garbled data": (DATA, lambda path: flip(path, -20)),
    "no data": (DATA, pathlib.Path.unlink),
    "cut index": ("index", lambda path: os.truncate(path, path.stat().st_size // 2)),
    "empty index": ("index", lambda path: os.truncate(path, 0)),
    "garbled index": ("index", lambda path: flip(path, 30)),
    "noise": ("index", lambda path: path.write_bytes(os.urandom(4096))),
    "no index": ("index", pathlib.Path.unlink),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_damaged_one_is_named_and_the_one_before_used(manager, spoil, warnings, tmp_path):
    save(manager, 2, 4)
    part, damage = SPOILS[spoil]
    damage(manager.folder / f"ckpt-4.{part}")
    checkpoints.remove_leftovers(tmp_path)  # which a damaged one is not
    found = again(manager)
    assert steps_of(found) == [2, 4]
    assert found.newest_whole() == found.latest_checkpoint == str(manager.folder / "ckpt-2")
    assert saved_value(found, found.latest_checkpoint) == [2] * 40
    damaged, used = warnings()
    assert damaged.startswith(f"{manager.folder / 'ckpt-4'} is damaged (") and "\n" not in damaged
    assert "ckpt-2" in used
    save(found, 4)
    following = again(manager)
    assert steps_of(following) == [2, 4]
    assert saved_value(following, following.newest_whole()) == [4] * 40


def test_a_damaged_one_does_not_count_among_the_last(manager):
    save(manager, 2, 4)
    flip(manager.folder / f"ckpt-4.{DATA}", -20)
    found = again(manager)
    found.newest_whole()
    save(found, 3)  # as with --max_steps
    assert steps_of(again(manager)) == [2, 3]
    assert "ckpt-4.index" not in files(manager.folder)


def test_no_byte_can_change_unseen(manager):
    """One bit flipped anywhere: it is said, or makes no difference."""
    save(manager, 1)
    path = manager.latest_checkpoint
    rng = np.random.default_rng(0)
    said = 0
    for part in ("index", DATA):
        file = pathlib.Path(f"{path}.{part}")
        whole = file.read_bytes()
        for position in rng.choice(len(whole), 60, replace=False):
            flip(file, position)
            if checkpoints.damage(path) is None:
                assert saved_value(manager, path) == [1] * 40
            else:
                said += 1
            file.write_bytes(whole)
    assert said > 100


def test_none_is_whole(manager):
    save(manager, 2, 4)
    for step in (2, 4):
        os.truncate(manager.folder / f"ckpt-{step}.{DATA}", 10)
    with pytest.raises(byol_tf.UserError, match="no checkpoint is whole") as caught:
        again(manager).newest_whole()
    line = str(caught.value)
    assert "\n" not in line and all(
        f"{manager.folder / name}" in line for name in ("ckpt-2", "ckpt-4")
    )


# The list of checkpoints ----------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"", b"\xff\x00junk", b'model_checkpoint_path: "ck'])
def test_a_lost_list_is_rebuilt(manager, content):
    save(manager, 8, 10)
    state = manager.folder / "checkpoint"
    state.unlink() if content is None else state.write_bytes(content)
    assert steps_of(again(manager)) == [8, 10]  # in the order of the numbers
    save(again(manager), 12)
    assert tf.train.latest_checkpoint(str(manager.folder)).endswith("-12")


def test_the_list_knows_the_order(manager):
    """After an import at step 7 the fine-tuning begins at 1."""
    save(manager, 7, 1)
    assert steps_of(again(manager)) == [7, 1]


class Killed(BaseException):
    """Nothing after it runs."""


@pytest.mark.parametrize("number", [6, 4])
def test_killed_at_any_moment_of_a_save(manager, number, monkeypatch, tmp_path):
    """Then there is the checkpoint before, or the new one; and the next save clears up."""
    moments = 0
    while True:
        shutil.rmtree(manager.folder, ignore_errors=True)
        started = again(manager)
        save(started, 2, 4)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            calls = iter(range(1000))

            def killed_in_time(function):
                def call(*args, **kwargs):
                    if next(calls) == moments:
                        raise Killed
                    return function(*args, **kwargs)

                return call

            for name in ("replace", "unlink", "mkdir", "write_bytes"):
                patch.setattr(pathlib.Path, name, killed_in_time(getattr(pathlib.Path, name)))
            patch.setattr(checkpoints, "sync", killed_in_time(checkpoints.sync))
            try:
                started.checkpoint.value.assign(tf.fill([40], -1.0))
                started.save(number)
                break
            except Killed:
                moments += 1
        checkpoints.remove_leftovers(tmp_path)
        assert not [name for name in files(manager.folder) if name.startswith(".")]
        found = again(manager)
        path = found.newest_whole()
        expected = {"ckpt-2": 2.0, "ckpt-4": 4.0, f"ckpt-{number}": -1.0}
        value = saved_value(found, path)
        assert value == [expected[pathlib.Path(path).name]] * 40 or value == [4.0] * 40
        assert number == 4 or not path.endswith("-2")
        save(found, 8)
        assert steps_of(again(manager))[-1] == 8
        assert len(files(manager.folder)) == 5
    assert moments > 8


def test_leftovers_are_removed(manager, tmp_path):
    save(manager, 2, 4)
    manager.keep_best(0.5)
    before = files(manager.folder), files(manager.folder / "best")
    (manager.folder / "ckpt-6_temp").mkdir()
    (manager.folder / "ckpt-6.index.tempstate123").touch()
    (manager.folder / f"ckpt-6.{DATA}").touch()
    (manager.folder / "best" / f"ckpt-6.{DATA}").touch()
    (manager.folder / ".checkpoint.byol_tf.77").touch()
    (tmp_path / ".flags.txt.byol_tf.77").touch()
    exports = tmp_path / "saved_model"
    (exports / ".1.byol_tf.77").mkdir(parents=True)
    (exports / ".1.old.byol_tf.77").mkdir()  # moved aside, and its successor not yet in place
    (tmp_path / ".lock").touch()
    (tmp_path / ".bash_history.1").touch()  # somebody else's
    checkpoints.remove_leftovers(tmp_path)
    assert (files(manager.folder), files(manager.folder / "best")) == before
    assert files(tmp_path) == [".bash_history.1", ".lock", "checkpoints", "saved_model"]
    assert files(exports) == ["1"]


def test_a_worker_lost_while_saving_is_no_full_disk(manager, monkeypatch):
    def write(prefix):
        raise tf.errors.UnavailableError(None, None, "Collective ops is aborted by: heartbeat")

    monkeypatch.setattr(manager.checkpoint, "write", write)
    with pytest.raises(byol_tf.UserError, match="cannot be written"):
        manager.save(1)
    monkeypatch.setattr(distribution, "num_workers", lambda strategy: 2)
    with pytest.raises(byol_tf.UserError, match="another worker has ended"):
        manager.save(1)


# The best one ---------------------------------------------------------------------------


def test_the_best_survives(manager, warnings):
    for step, accuracy in ((1, 0.3), (2, 0.6), (3, 0.6), (4, 0.5), (5, 0.4)):
        save(manager, step)
        manager.keep_best(accuracy)
    assert steps_of(manager) == [4, 5]
    best = again(manager).best_whole()
    assert saved_value(manager, best) == [2] * 40
    folder = manager.folder / "best"
    assert json.loads((folder / "best.json").read_text()) == {"step": 2, "knn_top1": 0.6}
    assert files(folder) == ["best.json", f"ckpt-2.{DATA}", "ckpt-2.index"]
    # It is not changed by a checkpoint of the same step.
    manager.checkpoint.value.assign(tf.fill([40], -1.0))
    manager.save(2)
    assert saved_value(manager, best) == [2] * 40
    assert not warnings()


def test_the_best_is_copied_where_there_are_no_links(manager, monkeypatch):
    def link(source, target):
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    save(manager, 1)
    manager.keep_best(0.5)
    save(manager, 2, 3, 4)
    assert saved_value(manager, manager.best_whole()) == [1] * 40


def test_no_best(manager, warnings):
    with pytest.raises(byol_tf.UserError, match="--use_checkpoint=best: there is none"):
        manager.best_whole()
    save(manager, 1)
    manager.keep_best(0.5)
    os.truncate(manager.folder / "best" / f"ckpt-1.{DATA}", 10)
    with pytest.raises(byol_tf.UserError, match="--use_checkpoint=best: .*ckpt-1 is damaged"):
        manager.best_whole()
    (manager.folder / "best" / "best.json").write_text("{")
    assert manager.best() is None
    assert "best.json cannot be read" in warnings()[-1]


def views(steps):
    one, other = np.random.default_rng(0).normal(size=(2, steps * 8, 16, 16, 3)).astype(np.float32)
    return tf.data.Dataset.from_tensor_slices({"view1": one, "view2": other}).batch(8)


@pytest.fixture
def model(tiny_encoder):
    keras.utils.set_random_seed(1)
    model = byol_tf.BYOL(tiny_encoder(), projector_hidden_size=16, projector_output_size=4)
    model.compile(keras.optimizers.SGD(0.1))
    build_optimizer(model.optimizer, model.trainable_variables)
    return model


@pytest.fixture
def train(model, tmp_path):
    """Function that trains on by two epochs of three steps, or to `max_steps`."""

    def train(measure, every=3, max_steps=None):
        update = byol_tf.TargetNetworkUpdate(0.9, total_steps=6)
        manager = checkpoints.Manager(tf.train.Checkpoint(model=model), tmp_path / "checkpoints")
        watch = training.Watch(
            tmp_path, log_every=3, batch_size=8, target_update=update, manager=manager
        )
        saves = training.Checkpoints(manager, every=10)
        best = checkpoints.KeepBest(manager, saves.save, measure, every, watch)
        training.train(
            model,
            lambda step, steps: views(6).skip(step).take(steps),
            steps_per_epoch=3,
            epochs=2,
            max_steps=max_steps,
            callbacks=[update, watch, saves, best],
            verbose=0,
        )
        return manager

    return train


def measured(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["knn_top1"]) for line in lines if "knn_top1" in line]


def test_measured_at_the_ends_of_epochs(train, model, tmp_path):
    """Of the checkpoint that was just saved, though none was due; and not where a run stops."""
    asked = []

    def measure(path):
        kernel = tf.train.load_variable(
            path, "model/online_encoder/layer_with_weights-0/kernel/.ATTRIBUTES/VARIABLE_VALUE"
        )
        np.testing.assert_array_equal(kernel, model.online_encoder.weights[0])
        asked.append(checkpoints.step_of(path))
        return {3: 0.75, 6: 0.5}[asked[-1]]

    train(measure, max_steps=2)
    assert asked == []
    train(measure, max_steps=5)
    assert asked == [3]
    manager = train(measure)
    assert asked == [3, 6]
    assert measured(tmp_path) == [(3, 0.75), (6, 0.5)]
    assert manager.best_whole().endswith("ckpt-3")
    events = list(tmp_path.glob("tensorboard/events*"))
    assert any(b"knn_top1" in path.read_bytes() for path in events)


def test_killed_before_it_was_measured(train, tmp_path):
    def killed(path):
        raise Killed

    with pytest.raises(Killed):
        train(killed)
    assert measured(tmp_path) == []
    manager = train(lambda path: checkpoints.step_of(path) / 10)
    assert measured(tmp_path) == [(3, 0.3), (6, 0.6)]
    assert manager.best_whole().endswith("ckpt-6")


def test_what_cannot_be_measured_is_asked_once(train, tmp_path):
    asked = []
    manager = train(asked.append)  # which returns None
    assert len(asked) == 1 and measured(tmp_path) == [] and manager.best() is None


def test_measuring_is_no_training(train, tmp_path):
    """Of the speed it is left out."""
    train(lambda path: time.sleep(2))
    (line,) = [
        json.loads(line)
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["step"] == 6
    ]
    assert line["images_per_second"] > 5 * 8 / 2


def test_features_within_a_strategy(mirrored, tiny_encoder, make_source):
    """As from a callback of `fit`, where a model would take the strategy."""
    encoder, source = tiny_encoder(), make_source(10)
    expected = evaluation.extract_features(encoder, source, image_size=16).vectors
    with mirrored.scope():
        found = evaluation.extract_features(encoder, source, image_size=16).vectors
    np.testing.assert_array_equal(found, expected)


# No room --------------------------------------------------------------------------------


@pytest.fixture
def full():
    """Function that lets no file grow beyond some bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_a_checkpoint(manager, full, tmp_path):
    save(manager, 2, 4)
    before = {path.name: path.read_bytes() for path in manager.folder.iterdir()}
    full(100)
    with pytest.raises(byol_tf.UserError, match="cannot be written") as caught:
        save(manager, 6)
    full(resource.RLIM_INFINITY)
    line = str(caught.value)
    assert str(manager.folder) in line and "are whole" in line and "\n" not in line
    assert {path.name: path.read_bytes() for path in manager.folder.iterdir()} == before
    save(manager, 6)
    assert saved_value(manager, again(manager).newest_whole()) == [6] * 40


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 256 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root can make a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk):
    """60 kB each: there is no room for the fourth."""
    checkpoint = tf.train.Checkpoint(value=tf.Variable(tf.zeros([15_000])))
    manager = checkpoints.Manager(checkpoint, small_disk / "checkpoints", keep=9)
    with pytest.raises(byol_tf.UserError, match=f"{small_disk}.*No space left.*are whole"):
        for step in range(1, 9):
            checkpoint.value.assign(tf.fill([15_000], float(step)))
            manager.save(step)
    found = checkpoints.Manager(checkpoint, manager.folder)
    assert steps_of(found) == list(range(1, step)) and step in (4, 5)
    assert not (manager.folder / ".unfinished").exists()
    for path in found.checkpoints:
        checkpoints.load(checkpoint, path)
        assert set(checkpoint.value.numpy()) == {checkpoints.step_of(path)}


def test_no_room_for_the_other_files(full, tmp_path, tiny_encoder):
    kept = tmp_path / "results.json"
    workdir.write_text(kept, "{}")
    features = evaluation.Features(np.zeros((50, 8), np.float32), np.full(50, -1), ["a"] * 50)
    watch = training.Watch(tmp_path, log_every=1, batch_size=8, target_update=None, manager=None)
    tries = {
        "results.json": lambda: workdir.write_text(kept, " " * 2000),
        "metrics": lambda: watch.write({"loss": 1.0}),
        "embeddings": lambda: write_embeddings(features, tmp_path / "embeddings.npz"),
        "parquet": lambda: write_embeddings(features, tmp_path / "embeddings.parquet"),
        "export": lambda: byol_tf.export_encoder(
            tiny_encoder(), tmp_path / "saved_model", image_size=16
        ),
    }
    (tmp_path / "metrics.jsonl").write_text("\n" * 1000)
    before = files(tmp_path)
    for write in tries.values():
        full(1000)
        with pytest.raises(byol_tf.UserError, match=f"{tmp_path}.*cannot be written"):
            with checkpoints.writing(tmp_path):
                write()
        full(resource.RLIM_INFINITY)
    assert kept.read_text() == "{}"
    assert files(tmp_path) == before


def test_lines_that_were_cut_off_are_dropped(train, tmp_path):
    train(lambda path: 0.5, max_steps=3)
    metrics = tmp_path / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 3, "los')
    train(lambda path: 0.25)
    assert measured(tmp_path) == [(3, 0.5), (6, 0.25)]
    assert metrics.read_text().startswith(whole)


# One process a workdir --------------------------------------------------------------------


def test_the_second_process_is_refused(tmp_path):
    """By the first one's number, until that is gone, by kill -9 too."""
    code = "import sys, time; from byol_tf import checkpoints; checkpoints.lock(sys.argv[1]); "
    code += "print('locked', flush=True); time.sleep(300)"
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(byol_tf.UserError, match=f"process {first.pid} is at work there"):
            checkpoints.lock(tmp_path)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    checkpoints.lock(tmp_path)
    checkpoints.lock(tmp_path)  # its own
    assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


# Other flags ------------------------------------------------------------------------------

FLAGS = {
    "encoder": "resnet18",
    "width_multiplier": 0.05,
    "stem": "small",
    "channels": 2,
    "projector_hidden_size": 16,
    "projector_output_size": 4,
    "projector_depth": 2,
    "predictor_depth": 1,
    "optimizer": "lars",
}


def build(encoder, width_multiplier, stem, channels, optimizer, **sizes):
    encoder = byol_tf.resnet_encoder(
        encoder, width_multiplier=width_multiplier, stem=stem, channels=channels
    )
    model = byol_tf.BYOL(encoder, random_target=True, num_classes=3, **sizes)
    model.compile(make_optimizer(optimizer, 0.1, 0.0))
    build_optimizer(model.optimizer, model.trainable_variables)
    return tf.train.Checkpoint(model=model)


@pytest.fixture(scope="module")
def of_flags(tmp_path_factory):
    path = build(**FLAGS).write(str(tmp_path_factory.mktemp("run") / "ckpt-1"))
    return path


@pytest.mark.parametrize(
    "name, value, found",
    [
        ("encoder", "resnet50", "resnet18"),
        ("width_multiplier", 0.1, 25 / 512),
        ("stem", "imagenet", "small"),
        ("channels", 3, 2),
        ("projector_hidden_size", 32, 16),
        ("projector_output_size", 8, 4),
        ("projector_depth", 3, 2),
        ("predictor_depth", 2, 1),
        ("predictor", False, True),
        ("optimizer", "adam", "lars or sgd"),
        ("method", "supervised", "byol"),
    ],
)
def test_other_flags_are_named(of_flags, name, value, found):
    with flagsaver.flagsaver(**FLAGS):
        checkpoints.check_flags(of_flags, checkpoints.MODEL_FLAGS)
        with flagsaver.flagsaver(**{name: value}):
            message = f"^--{name}={value}: .*ckpt-1 has {found}: "
            with pytest.raises(byol_tf.UserError, match=message):
                checkpoints.check_flags(of_flags, checkpoints.MODEL_FLAGS)


@pytest.mark.parametrize(
    "encoder, width, optimizer", [("resnet34", 1 / 16, "adam"), ("resnet50", 1 / 64, "sgd")]
)
def test_other_networks_are_told(encoder, width, optimizer, tmp_path):
    given = {**FLAGS, "encoder": encoder, "width_multiplier": width, "stem": "imagenet"}
    given.update(optimizer=optimizer, projector_depth=1)
    path = build(**given).write(str(tmp_path / "ckpt-1"))
    with flagsaver.flagsaver(**given):
        checkpoints.check_flags(path, checkpoints.MODEL_FLAGS)
    found = checkpoints.architecture(tf.train.load_checkpoint(path).get_variable_to_shape_map())
    assert all(given[name] in found[name] for name in given if name in found)
    assert found.keys() == {*given, "method", "predictor"} - {"projector_hidden_size"}


@pytest.mark.parametrize("shape", [[41], [2, 20], None])
def test_what_does_not_fit_takes_one_line(manager, shape):
    save(manager, 1)
    values = {"value": tf.Variable(tf.zeros(shape))} if shape else {"more": tf.Variable(0.0)}
    with pytest.raises(byol_tf.UserError, match="ckpt-1 does not fit the flags") as caught:
        checkpoints.load(tf.train.Checkpoint(**values), manager.latest_checkpoint)
    assert "\n" not in str(caught.value)


def test_every_flag_counts_somewhere():
    """A flag of the networks is told from the checkpoint, or must not matter to its shapes."""
    names = {flag.name for flag in config.flags.FLAGS.get_flags_for_module(config.model.__name__)}
    assert names <= set(checkpoints.MODEL_FLAGS)


# On the command line ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(main, images):
    """Function that runs main.py on a tiny model, new or not: (exit code, stderr)."""
    flags = [*TINY, f"--data_dir={images}", "--epochs=3", "--deterministic", "--nobaselines"]

    def run(*args, new=True, **kwargs):
        code, _, stderr = main(*(flags if new else ()), *args, **kwargs)
        assert "Traceback" not in stderr, stderr[-2000:]
        return code, stderr

    return run


def results(workdir):
    return json.loads((workdir / "results.json").read_text())


def test_figures_of_other_checkpoints_stand_apart(tmp_path):
    """And come back with theirs; what is of no checkpoint stays."""
    workdir.update_results(tmp_path, steps=8, knn_top1=0.5, evaluated_step=8)
    run.set_others_aside(tmp_path, 8)
    assert results(tmp_path)["knn_top1"] == 0.5
    run.set_others_aside(tmp_path, 4)
    workdir.update_results(tmp_path, probe_top1=0.25, evaluated_step=4)
    found = results(tmp_path)
    assert found["other_checkpoints"] == {"8": {"knn_top1": 0.5, "evaluated_step": 8}}
    assert found["steps"] == 8 and "knn_top1" not in found
    run.set_others_aside(tmp_path, 8)
    found = results(tmp_path)
    assert found["knn_top1"] == 0.5 and found["evaluated_step"] == 8
    assert found["other_checkpoints"] == {"4": {"probe_top1": 0.25, "evaluated_step": 4}}
    run.set_others_aside(tmp_path, 12)  # trained further, and not evaluated
    assert results(tmp_path)["other_checkpoints"].keys() == {"4", "8"}
    run.set_others_aside(tmp_path, 8)
    workdir.update_results(tmp_path, probe_top1=0.75, evaluated_step=8)
    run.set_others_aside(tmp_path, 4)
    found = results(tmp_path)
    assert found["probe_top1"] == 0.25
    figures = {"knn_top1": 0.5, "probe_top1": 0.75, "evaluated_step": 8}
    assert found["other_checkpoints"] == {"8": figures}


@pytest.mark.slow
def test_a_damaged_run_ends_as_any_other(start, tmp_path):
    """Bit for bit, also where k-NN was measured meanwhile; and is refused other networks."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert start(f"--workdir={once}", "--task=pretrain")[0] == 0
    measuring = "--knn_every=1", "--keep_checkpoints=3", "--task=pretrain,knn"
    assert start(f"--workdir={twice}", *measuring, "--max_steps=4", "--use_checkpoint=best")[0] == 0
    best = json.loads((twice / "checkpoints" / "best" / "best.json").read_text())
    assert results(twice)["knn_top1"] == best["knn_top1"]
    assert results(twice)["evaluated_step"] == best["step"]
    os.truncate(twice / "checkpoints" / f"ckpt-4.{DATA}", 1000)
    code, stderr = start(f"--workdir={twice}", "--task=pretrain", new=False)
    assert code == 0 and "ckpt-4 is damaged" in stderr and "ckpt-2" in stderr
    assert results(twice)["weights_sha256"] == results(once)["weights_sha256"]
    assert [step for step, _ in measured(twice)] == [2, 4, 6]
    flags = (twice / "flags.txt").read_text()
    (twice / "flags.txt").write_text(
        flags.replace("projector_hidden_size=16", "projector_hidden_size=32")
    )
    code, stderr = start(f"--workdir={twice}", "--task=pretrain", new=False)
    assert code == 1
    assert stderr.splitlines()[-1].startswith("error: --projector_hidden_size=32: ")
    (twice / "flags.txt").unlink()
    code, stderr = start(f"--workdir={twice}", "--task=export", "--encoder=resnet34")
    assert code == 1 and "flags.txt" in stderr
    assert stderr.splitlines()[-1].startswith("error: --encoder=resnet34: ")
    assert steps_of(checkpoints.Manager(None, twice / "checkpoints")) == [2, 4, 6]


@pytest.mark.slow
def test_no_room_takes_one_line(start, tmp_path):
    assert start(f"--workdir={tmp_path}", "--task=pretrain", "--max_steps=1")[0] == 0
    code, stderr = start(f"--workdir={tmp_path}", "--task=pretrain", new=False, largest_file=2**17)
    assert code == 1
    line = stderr.splitlines()[-1]
    assert (
        line.startswith(f"error: {tmp_path / 'checkpoints'}: cannot be written") and "whole" in line
    )
    found = checkpoints.Manager(None, tmp_path / "checkpoints")
    assert steps_of(found) == [1] and found.newest_whole()
