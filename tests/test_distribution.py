"""Several workers: real processes on this machine, which must do what one process does."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import tempfile
import time

import forked
import numpy as np
import pytest
import tensorflow as tf

from byol_tf import distribution
from byol_tf.data import views
from byol_tf.errors import UserError

TINY = [
    *("--dataset=image_folder", "--image_size=16", "--stem=small", "--encoder=resnet18"),
    *("--width_multiplier=0.0625", "--projector_hidden_size=16", "--projector_output_size=8"),
    *("--batch_size=12", "--epochs=4", "--warmup_epochs=0", "--optimizer=sgd"),
    "--base_learning_rate=0.03",
    *("--task=pretrain", "--log_every=1", "--precision=float32"),
]


class Process:
    """A run of `main.py`, beside others."""

    def __init__(self, server, log, argv, env):
        self.server, self.log = server, log
        self.pid = server.start(argv, log.parent, log, log, env=env)
        self.code = None

    def ended(self, seconds=0.0):
        if self.code is None and self.server.ended(seconds):
            self.code = self.server.exit_code()
        return self.code is not None


@pytest.fixture(scope="module")
def start(more_images, tmp_path_factory):
    """Function that starts a `Process` in a workdir."""
    folder = tmp_path_factory.mktemp("logs")
    servers = []  # one for each process at a time

    def start(workdir, *flags, **env):
        free = [s for s in servers if not s.running]
        if not free:
            free = [forked.Server(folder)]
            servers.extend(free)
        log = pathlib.Path(tempfile.mkstemp(dir=folder)[1])
        argv = [f"--workdir={workdir}", *TINY, f"--data_dir={more_images}", *flags]
        return Process(free[0], log, argv, env)

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def start_workers(start):
    """Function that starts a cluster of so many workers; `of_last`: flags of the last one."""

    def start_workers(workdir, count, *flags, of_last=()):
        addresses = [f"localhost:{free_port()}" for _ in range(count)]
        clusters = [
            {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}}
            for i in range(count)
        ]
        given = [flags] * (count - 1) + [(*flags, *of_last)]
        return [start(workdir, *f, TF_CONFIG=json.dumps(c)) for f, c in zip(given, clusters)]

    return start_workers


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def finish(processes, seconds=180):
    """The exit codes and outputs; kills what does not end in time."""
    deadline = time.monotonic() + seconds
    for process in processes:
        if not process.ended(max(0, deadline - time.monotonic())):
            os.kill(process.pid, signal.SIGKILL)
            process.ended(60)
    return [process.code for process in processes], [p.log.read_text() for p in processes]


def weights(workdir, which=-1):
    """All variables of the last checkpoint, by name; but the sums that the log's means are of."""
    paths = tf.train.get_checkpoint_state(str(workdir / "checkpoints")).all_model_checkpoint_paths
    reader = tf.train.load_checkpoint(paths[which])
    names = reader.get_variable_to_shape_map()
    names = [n for n in names if n.endswith("VARIABLE_VALUE") and "/_means/" not in n]
    return {name: reader.get_tensor(name) for name in names}


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def steps(workdir):
    return [line["step"] for line in lines(workdir)]


def await_step(workdir, step, processes, seconds=240):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (workdir / "metrics.jsonl").exists() and step in steps(workdir):
            return
        assert not any(process.ended() for process in processes)
        time.sleep(0.1)
    raise AssertionError(f"no step {step} in {seconds} s")


def apart(expected, found):
    """The largest difference of two checkpoints, relative to the largest element of its tensor."""
    assert expected.keys() == found.keys() and len(expected) > 100
    return max(_difference(value, found[name]) for name, value in expected.items())


def _difference(expected, found):
    # A small element is the difference of large sums.
    return np.max(np.abs(found - expected)) / (np.max(np.abs(expected)) + 0.1)


def moved(workdir):
    """By how much every kernel has changed since the checkpoint before, as of `apart`."""
    before, after = weights(workdir, -2), weights(workdir)
    kernels = [name for name in before if "model/online" in name and "/kernel/" in name]
    assert len(kernels) > 10
    return min(_difference(before[name], after[name]) for name in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_workers_are_one_process(start, start_workers, tmp_path, count):
    tasks = ["--max_steps=4", "--task=pretrain,knn,export", "--eval_split=test"]
    found = []
    # A rounding error may cross a ReLU's kink and grow from there: then other weights may not.
    for seed in range(3):
        alone, together = tmp_path / f"alone{seed}", tmp_path / f"together{seed}"
        flags = [*tasks, "--nobaselines", f"--seed={seed}"]
        processes = [start(alone, *flags), *start_workers(together, count, *flags)]
        codes, outputs = finish(processes, 300)
        assert codes == [0] * (count + 1), "\n".join(outputs)
        assert moved(alone) > 5e-4  # in the last step; larger ones are chaotic
        found.append(apart(weights(alone), weights(together)))
        if found[-1] < 1e-4:
            break
    assert found[-1] < 1e-4, found
    assert steps(together) == [1, 2, 3, 4]  # one writes
    for name in ("loss", "classifier_loss", "projection_std", "effective_rank"):
        of_one, of_all = ([line[name] for line in lines(w)] for w in (alone, together))
        np.testing.assert_allclose(of_all, of_one, rtol=1e-4)
    (line,) = outputs[2].splitlines()  # and speaks, but for
    assert "awaiting the workers localhost:" in line
    results = json.loads((together / "results.json").read_text())
    assert results["steps"] == results["evaluated_step"] == 4 and 0 <= results["knn_top1"] <= 1
    assert (together / "saved_model").is_dir()


@pytest.mark.slow
def test_workers_that_differ_train_nothing(start_workers, tmp_path):
    """Each says why in one line, and the checkpoints are what they were."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    def errors(*of_last, flags=()):
        codes, outputs = finish(start_workers(run, 2, *flags, of_last=of_last), 120)
        assert codes == [1, 1] and "Traceback" not in "".join(outputs), "\n".join(outputs)
        return [text.split("\nerror: ")[-1].strip() for text in ("\n" + t for t in outputs)]

    codes, outputs = finish(start_workers(run, 2, "--max_steps=3"))
    assert codes == [0, 0], "\n".join(outputs)
    before = weights(run)
    assert all("not the same flags" in line for line in errors("--checkpoint_every=2"))
    here = [f"not go on from the same checkpoint, here that of step {step}:" for step in (3, 0)]
    found = errors(f"--workdir={elsewhere}")
    assert all(word in line for word, line in zip(here, found)), found
    # What only the chief meets with.
    chief, other = errors(flags=["--task=pretrain,knn", "--eval_split=nosuch"])
    assert "no split 'nosuch'" in chief and "another worker has ended" in other
    after = weights(run)
    assert all(np.array_equal(after[name], before[name]) for name in before)


@pytest.mark.slow
def test_sigterm_before_the_first_step_of_a_worker(start_workers, tmp_path):
    """TensorFlow's cluster brings a handler along that would swallow it."""
    (worker,) = start_workers(tmp_path, 1, "--epochs=2000")
    while not (tmp_path / "flags.txt").exists():
        assert not worker.ended(0.001), worker.log.read_text()
    os.kill(worker.pid, signal.SIGTERM)
    (code,), (output,) = finish([worker], seconds=60)
    assert code == 75 and "stopped by SIGTERM" in output


@pytest.mark.slow
def test_a_killed_worker_ends_the_others_and_all_resume(start_workers, tmp_path):
    workers = start_workers(tmp_path, 2, "--epochs=2000")
    await_step(tmp_path, 6, workers)
    os.kill(workers[1].pid, signal.SIGKILL)
    begin = time.monotonic()
    codes, outputs = finish(workers, seconds=120)
    print(f"the other worker ended after {time.monotonic() - begin:.0f} s")
    # Seldom the last line: TensorFlow's own pool of threads may grumble as Python ends.
    assert codes[0] == 1 and "\nerror: another worker has ended" in outputs[0]
    assert "together with the other workers failed: " in outputs[0]  # what TensorFlow says
    resumed_at = int(tf.train.latest_checkpoint(str(tmp_path / "checkpoints")).rsplit("-")[-1])
    assert resumed_at >= 3
    until = resumed_at + 3
    codes, outputs = finish(start_workers(tmp_path, 2, "--epochs=2000", f"--max_steps={until}"))
    assert codes == [0, 0], "\n".join(outputs)
    assert steps(tmp_path) == list(range(1, until + 1))


SLURM = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}


@pytest.mark.parametrize("gpus", [0, 8])
def test_a_slurm_task_has_all_gpus_that_it_sees(monkeypatch, gpus):
    for name, value in {**SLURM, "SLURM_PROCID": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind] * gpus)
    cluster = distribution._slurm_cluster()
    assert cluster.num_accelerators() == {"GPU": gpus}
    assert (cluster.task_type, cluster.task_id) == ("worker", 1)
    assert cluster.cluster_spec().as_dict() == {"worker": ["localhost:8888", "localhost:8889"]}


@pytest.mark.slow
def test_sigterm_to_one_of_a_slurm_step_stops_all_after_the_same_step(start, tmp_path):
    workers = [
        start(tmp_path, "--strategy=multi_worker", "--epochs=2000", SLURM_PROCID=str(i), **SLURM)
        for i in range(2)
    ]
    await_step(tmp_path, 3, workers)
    os.kill(workers[1].pid, signal.SIGTERM)
    codes, outputs = finish(workers, seconds=60)
    assert codes == [75, 75], "\n".join(outputs)
    last = steps(tmp_path)[-1]
    assert f"stopped by SIGTERM at step {last}" in outputs[0] and f"step {last}" in outputs[1]
    assert tf.train.latest_checkpoint(str(tmp_path / "checkpoints")).endswith(f"-{last}")


def test_a_worker_of_several_replicas(monkeypatch):
    """Its part of a batch goes to them piece by piece, in order."""

    class Strategy:
        num_replicas_in_sync = 6

        def distribute_datasets_from_function(self, of_worker):
            return of_worker(tf.distribute.InputContext(2, input_pipeline_id=1))

    def batches_of(worker, workers):
        assert (worker, workers) == (1, 2)
        return tf.data.Dataset.from_tensor_slices({"view1": tf.range(18)}).batch(9, True)

    monkeypatch.setattr(distribution, "num_workers", lambda strategy: 2)
    pieces = distribution.distribute(Strategy(), batches_of)
    assert [batch["view1"].numpy().tolist() for batch in pieces] == [
        list(range(first, first + 3)) for first in range(0, 18, 3)
    ]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("count", [2, 3])
def test_parts_of_workers_are_the_batches(make_source, in_memory, count):
    """Every image of a global batch at exactly one worker, in its place, with its draws."""
    source = make_source(30)
    if not in_memory:
        source = dataclasses.replace(source, image_shape=None)

    def batches(worker, num_workers, start_step=0):
        how = {"image_size": 8, "batch_size": 12, "epochs": 2, "start_step": start_step}
        how["augmentation"] = "crop"  # quick to trace; all draws are drawn together
        parts = views.pretrain_batches(source, **how, worker=worker, num_workers=num_workers)
        return [{name: value.numpy() for name, value in part.items()} for part in parts]

    for start_step in (0, 1, 3):
        whole = batches(0, 1, start_step)
        parts = [batches(worker, count, start_step) for worker in range(count)]
        assert len(whole) == 4 - start_step and all(len(p) == len(whole) for p in parts)
        for step, batch in enumerate(whole):
            for name, value in batch.items():
                joined = np.concatenate([p[step][name] for p in parts])
                np.testing.assert_array_equal(joined, value)


@pytest.mark.parametrize(
    "config",
    [
        *("{", "[]", "{}", '{"cluster": {"worker": ["a:1"]}}', '{"cluster": 3, "task": {}}'),
        '{"cluster": {"worker": [1, 2]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
    ],
)
def test_bad_clusters(config, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(UserError, match="TF_CONFIG"):
        distribution.make_strategy("multi_worker")


def test_no_cluster_and_no_tpu(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(UserError, match="srun"):
        distribution.make_strategy("multi_worker")
    with pytest.raises(UserError, match="--tpu=nowhere"):
        distribution.make_strategy("tpu", "nowhere")
