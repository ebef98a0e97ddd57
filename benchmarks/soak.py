"""An hour of training, its memory and its speed: `python -m benchmarks.soak --minutes=60`.

A small network learns from drawn figures; checkpoints, k-NN, metrics and TensorBoard have their
turn again and again, and at the end SIGTERM stops it. Memory and CPU time are read every few
seconds. Steps/s are of this process and of whatever else runs on the machine; CPU seconds a
step are its own. Time in which the benchmark itself was stopped does not count.
"""

import contextlib
import json
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import psutil
from absl import flags

from benchmarks import measure

FLAGS = flags.FLAGS
measure.define_flags()
flags.DEFINE_float("minutes", 60, "Of training that is measured.", lower_bound=0.05)
flags.DEFINE_float("warm_up", 5, "Minutes of training before that.", lower_bound=0.0)
flags.DEFINE_float("every", 5, "Seconds between two samples.", lower_bound=0.1)
flags.DEFINE_list("extra", [], "More flags for main.py, as in --extra=--knn_every=1.")

PAGE = measure.ROOT / "docs" / "reliability.md"
TRAINING = [
    *("--flagfile=flags/quickstart.flags", "--task=pretrain", "--epochs=1000000"),
    *("--train_split=train[:2048]", "--eval_split=test[:512]", "--width_multiplier=0.125"),
    *("--projector_hidden_size=256", "--checkpoint_every=2", "--knn_every=4"),
]
PREEMPTED = 75  # exit code of main.py
_PARTS = 60  # of the time, each a point of the line through the memory


def main():
    with tempfile.TemporaryDirectory() as folder, training(pathlib.Path(folder)) as run:
        run.await_first_steps()
        run.watch(60 * FLAGS.warm_up)
        samples = run.watch(60 * FLAGS.minutes)
        run.stop()
        record = {
            **measure.origin("soak"),
            "training": " ".join(["main.py", *TRAINING, *FLAGS.extra]),
            **figures(samples),
            "whole_run": run.counts(),
        }
    # Each Python has a table of its own: they differ in what they leave in memory.
    version = record["python"].rpartition(".")[0]
    measure.publish(PAGE, f"soak_{version}", record, table(record))


@contextlib.contextmanager
def training(folder):
    """A `Training` that writes into a folder, and does not outlive the block."""
    command = ["main.py", *TRAINING, f"--workdir={folder / 'run'}", *FLAGS.extra]
    with (folder / "output.txt").open("w") as output, (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=measure.ROOT, stdout=output, stderr=errors
        )
        try:
            yield Training(process, folder)
        finally:
            process.kill()
            process.wait()


class Training:
    """A process of `main.py` that is looked at from outside."""

    def __init__(self, process, folder):
        self.process = process
        self.output, self.errors = folder / "output.txt", folder / "errors.txt"
        self.workdir = folder / "run"
        self.saved = set()  # names of all checkpoints seen

    def await_first_steps(self):
        while not self.metrics():
            self._check_alive()
            time.sleep(0.1)

    def watch(self, seconds):
        """Samples until so much time has passed.

        Returns: a list of (seconds since the first, step, CPU seconds so far, MB).
        """
        samples, clock, before = [], 0.0, time.monotonic()
        while clock < seconds:
            self._check_alive()
            self._look_for_checkpoints()
            samples.append((clock, self.metrics()[-1]["step"], *usage(self.process.pid)))
            time.sleep(FLAGS.every)
            now = time.monotonic()
            clock += min(now - before, 2 * FLAGS.every)  # more: this process was stopped too
            before = now
        return samples

    def stop(self):
        """As a preemption does."""
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait() != PREEMPTED:
            self._fail()
        self._look_for_checkpoints()

    def counts(self):
        """How much of everything there was in the whole run, the warm-up included."""
        lines = self.metrics()
        return {
            "steps": lines[-1]["step"],
            "epochs": len(re.findall(r"^(\d+)/\1 - ", self.output.read_text(), re.MULTILINE)),
            "checkpoints": len(self.saved),
            "knn_measurements": sum("knn_top1" in line for line in lines),
        }

    def metrics(self):
        """The lines of metrics.jsonl, but for one that is being written."""
        file = self.workdir / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def _look_for_checkpoints(self):
        self.saved |= {path.name for path in self.workdir.glob("checkpoints/ckpt-*.index")}

    def _check_alive(self):
        if self.process.poll() is not None:
            self._fail()

    def _fail(self):
        said = measure.last_line(self.errors.read_text())
        raise SystemExit(f"error: main.py ended with code {self.process.returncode}: {said}")


def usage(pid):
    """CPU seconds so far and resident memory in MB, of a process and all below it."""
    seconds = memory = 0
    process = psutil.Process(pid)
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            times = each.cpu_times()
            seconds += times.user + times.system
            memory += each.memory_info().rss
    return seconds, memory / 2**20


def figures(samples):
    """What samples, of `Training.watch`, tell: a dict.

    The slope is that of the line of least squares through the means of sixty parts of the time.
    """
    samples = np.array(samples)
    parts = [part.mean(0) for part in np.array_split(samples, min(_PARTS, len(samples)))]
    seconds, _, _, memory = np.transpose(parts)
    (slope, _), covariance = np.polyfit(seconds / 3600, memory, 1, cov=True)
    quarter = samples[-1, 0] / 4
    return {
        "minutes": samples[-1, 0] / 60,
        "memory_mb": {
            "start": memory[0],
            "end": memory[-1],
            "slope_per_hour": slope,
            "standard_error": covariance[0, 0] ** 0.5,
            "parts": memory.round(1).tolist(),
        },
        "first_quarter": speed(samples[samples[:, 0] <= quarter]),
        "last_quarter": speed(samples[samples[:, 0] >= 3 * quarter]),
    }


def speed(samples):
    """From the first to the last of samples, an array."""
    seconds, steps, cpu_seconds, _ = samples[-1] - samples[0]
    return {
        "memory_mb": samples[:, 3].mean(),
        "steps_per_second": steps / seconds,
        "cores_in_use": cpu_seconds / seconds,
        "cpu_seconds_per_step": cpu_seconds / max(steps, 1),
    }


def table(record):
    """The Markdown of a record of `main`."""
    first, last, memory = record["first_quarter"], record["last_quarter"], record["memory_mb"]
    rows = {
        "resident memory, MB": "memory_mb",
        "steps/s": "steps_per_second",
        "cores in use": "cores_in_use",
        "CPU seconds a step": "cpu_seconds_per_step",
    }
    lines = [
        f"| {record['minutes']:.3g} minutes of training, Python {record['python']} "
        "| first quarter | last quarter | change |",
        "|---|---|---|---|",
    ]
    for title, name in rows.items():
        change = 100 * (last[name] / first[name] - 1) if first[name] else float("nan")
        lines.append(f"| {title} | {first[name]:.4g} | {last[name]:.4g} | {change:+.1f} % |")
    whole = record["whole_run"]
    return "\n".join(
        [
            *lines,
            "",
            f"Memory: {memory['start']:.1f} MB at the start, {memory['end']:.1f} at the end; slope "
            f"{memory['slope_per_hour']:+.1f} MB an hour, standard error "
            f"{memory['standard_error']:.1f}. The whole run, its warm-up included: "
            f"{whole['steps']:,} steps, {whole['epochs']:,} epochs, {whole['checkpoints']:,} "
            f"checkpoints, {whole['knn_measurements']:,} measurements of k-NN; ended by SIGTERM with "
            f"exit code {PREEMPTED}.",
            "",
            measure.footer(record),
        ]
    )


if __name__ == "__main__":
    measure.run(main)
