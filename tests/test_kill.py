"""Killed at random moments and started again, a run ends as one that nothing interrupted.

20 kills, or as many as BYOL_TF_KILLS says; what they met with is printed as JSON:

    BYOL_TF_KILLS=100 python -m pytest -q -s tests/test_kill.py -k killed

The runs are forked, with a tiny encoder (forked.py).
"""

import collections
import contextlib
import json
import os
import random
import signal
import sys
import time

import pytest
import tensorflow as tf

from byol_tf import checkpoints

KILLS = int(os.environ.get("BYOL_TF_KILLS", 20))
EPOCH = 3  # steps, of 12 of the 36 images
WAYS = {
    "accumulation": ["--accumulation_steps=2", "--augmentation=no_color"],
    # Less to compile, as that takes replicas longer.
    "replicas": [
        *("--logical_cpus=2", "--projector_depth=1", "--predictor_depth=1"),
        "--augmentation=crop",
    ],
}
SHARES = {"accumulation": 0.6, "replicas": 0.4}  # of the kills: replicas take longer to start
PHASES = ("start", "step", "checkpoint", "between epochs")
# An epoch is lost or won by a kill, and the last must not be reached before it.
EPOCHS = {way: 2 * round(KILLS * share) + 2 for way, share in SHARES.items()}
FLAGS = [
    *("--dataset=image_folder", "--image_size=16", "--stem=small"),
    *("--encoder=resnet18", "--projector_hidden_size=16", "--projector_output_size=8"),
    *("--batch_size=12", "--warmup_epochs=1", "--task=pretrain", "--log_every=1"),
    *("--deterministic", "--intra_op_threads=1"),
]


class Run:
    """A run in a workdir, from its start on, or from where it was killed."""

    def __init__(self, server, workdir, *flags):
        self.server = server
        self.workdir = workdir
        self.before = self._lines()
        self.begun_at = self.saved_step()
        self.inode = self._inode()
        argv, log = [f"--workdir={workdir}", *flags], workdir.with_suffix(".log")
        self.process = server.start(argv, workdir.parent, log, log, tiny=True)

    def await_that(self, condition, seconds=240):
        for _ in range(1000 * seconds):  # no deadline: this process may have been stopped
            if condition():
                return
            assert not self.server.ended(0.001), f"ended before it was killed:\n{self.log()}"
        raise AssertionError(f"not in {seconds} s:\n{self.log()}")

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self.process, number)

    def exit_code(self, seconds=240):
        ended = any(self.server.ended(0.1) for _ in range(10 * seconds))
        assert ended, f"not ended in {seconds} s:\n{self.log()}"
        return self.server.exit_code()

    def log(self):
        return self.workdir.with_suffix(".log").read_text()[-3000:]

    def saved_step(self):
        """The step of the newest checkpoint that is in its place, or 0."""
        steps = [checkpoints.step_of(p.stem) for p in self.workdir.glob("checkpoints/*.index")]
        return max(steps, default=0)

    def is_saving(self):
        return (self.workdir / "checkpoints" / ".unfinished").exists()

    def steps(self):
        """The steps that this run has done so far, as metrics.jsonl tells: a list of int."""
        lines = self._lines()
        # It drops what was done after the checkpoint, by putting another file in its place.
        kept = [line for line in self.before if json.loads(line)["step"] <= self.begun_at]
        if kept != self.before and self._inode() == self.inode:
            return []
        return [json.loads(line)["step"] for line in lines[len(kept) :]]

    def phase(self):
        """Which of PHASES it is in, or was in when it was killed."""
        if self.is_saving():
            return "checkpoint"
        steps = self.steps()
        if not steps:
            return "start"
        return "between epochs" if steps[-1] == self.saved_step() else "step"

    def _file(self):
        return self.workdir / "metrics.jsonl"

    def _lines(self):
        text = self._file().read_text() if self._file().exists() else ""
        return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def _inode(self):
        return self._file().stat().st_ino if self._file().exists() else None


@pytest.fixture(scope="module")
def flags(more_images):
    return [*FLAGS, f"--data_dir={more_images}"]


@pytest.fixture(scope="module")
def uninterrupted(server, flags, tmp_path_factory):
    """Function from the way to compute to the workdir of a run, and its seconds to a step."""
    workdirs = {}

    def run(way):
        if way not in workdirs:
            workdir = tmp_path_factory.mktemp(way) / "once"
            run = Run(server, workdir, *flags, *WAYS[way], f"--epochs={EPOCHS[way]}")
            begin = time.monotonic()
            run.await_that(run.steps)
            started = time.monotonic() - begin
            assert run.exit_code() == 0, run.log()
            workdirs[way] = workdir, started
        return workdirs[way]

    return run


def variables(workdir):
    """All that the last checkpoint holds, by name: weights, statistics, slots, step, metrics."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(workdir / "checkpoints")))
    names = reader.get_variable_to_shape_map()
    return {n: reader.get_tensor(n) for n in names if n != "_CHECKPOINTABLE_OBJECT_GRAPH"}


def figures(workdir):
    """The lines of metrics.jsonl, without the speed."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def files(workdir):
    paths = (path.relative_to(workdir) for path in workdir.rglob("*"))
    return {path.as_posix() for path in paths if path.parts[0] != "tensorboard"}


def assert_same(workdir, other):
    """Bit for bit; gives the number of variables."""
    found, expected = variables(workdir), variables(other)
    assert found.keys() == expected.keys()
    kinds = "moving_variance", "optimizer/_variables", "online_projector", "target_encoder"
    assert all(any(kind in name for name in found) for kind in kinds)
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name
    assert figures(workdir) == figures(other)
    assert files(workdir) == files(other)  # nothing is left of what was half done
    return len(found)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_again_and_again_is_uninterrupted(server, uninterrupted, flags, way):
    once, start_seconds = uninterrupted(way)
    workdir = once.with_name("killed")
    rng = random.Random(way)
    aims = list(PHASES) * round(KILLS * SHARES[way] / len(PHASES))
    rng.shuffle(aims)
    flags = [*flags, *WAYS[way], f"--epochs={EPOCHS[way]}"]
    met, lost = collections.Counter(), 0
    for aim in aims:
        run = Run(server, workdir, *flags)
        if aim == "start":
            end = time.monotonic() + rng.uniform(0, 0.8 * start_seconds)
            run.await_that(lambda: time.monotonic() > end or run.steps())
        elif aim == "step":
            steps = rng.randint(1, EPOCH + 1)
            run.await_that(lambda: len(run.steps()) >= steps)
            time.sleep(rng.uniform(0, 0.1))
        elif aim == "checkpoint":
            run.await_that(run.is_saving)
            time.sleep(rng.uniform(0, 0.02))
        else:
            run.await_that(lambda: run.phase() == aim)
            time.sleep(rng.uniform(0, 0.02))
        run.signal(signal.SIGKILL)
        assert run.exit_code() == -signal.SIGKILL, run.log()
        met[run.phase()] += 1
        lost += max(run.steps(), default=run.saved_step()) - run.saved_step()
    assert Run(server, workdir, *flags).exit_code() == 0
    compared = assert_same(workdir, once)
    loss = figures(workdir)[-1]["loss"]
    figures_of_kills = {"way": way, "kills": len(aims), "by_phase": dict(met), "steps_lost": lost}
    figures_of_kills |= {"steps": EPOCHS[way] * EPOCH, "last_loss": loss, "variables": compared}
    print(json.dumps({**figures_of_kills, "python": sys.version.split()[0]}))
    assert set(met) == set(PHASES), met


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_sigterm_is_obeyed_at_once(server, uninterrupted, flags, way):
    """Amid the steps, and again and again until the end: with a checkpoint of the last step."""
    once, _ = uninterrupted(way)
    workdir = once.with_name("preempted")
    flags = [*flags, *WAYS[way], f"--epochs={EPOCHS[way]}"]
    run = Run(server, workdir, *flags)
    run.await_that(lambda: len(run.steps()) >= EPOCH + 1)
    for _ in range(30_000):  # which takes 30 s
        run.signal(signal.SIGTERM)
        if server.ended(0.001):
            break
    assert run.exit_code(seconds=1) == 75, run.log()
    step = run.saved_step()
    assert step == run.steps()[-1] < EPOCHS[way] * EPOCH
    assert f"stopped by SIGTERM at step {step}: the same command" in run.log()
    assert Run(server, workdir, *flags).exit_code() == 0
    assert_same(workdir, once)


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.0])
def test_sigterm_before_the_first_step(server, flags, tmp_path, seconds):
    """Then there is nothing to save, but the exit code says the same."""
    run = Run(server, tmp_path / "run", *flags, "--epochs=1")
    run.await_that((tmp_path / "run.log").exists)
    time.sleep(seconds + 0.05)
    run.signal(signal.SIGTERM)
    assert run.exit_code(30) == 75, run.log()
    assert "stopped by SIGTERM: the same command" in run.log()
    assert not run.saved_step()


def test_ctrl_c(server, flags, tmp_path):
    """Amid the steps: the exit code that shells have for it, and what an epoch has saved is kept."""
    run = Run(server, tmp_path / "run", *flags, "--epochs=2000")
    run.await_that(lambda: len(run.steps()) >= EPOCH + 1)
    run.signal(signal.SIGINT)
    assert run.exit_code(30) == 130, run.log()
    assert "\ninterrupted: the same command goes on from the last checkpoint" in run.log()
    assert run.saved_step() >= EPOCH
