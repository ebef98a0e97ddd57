"""Seconds from the command to the end of step 1: `python -m benchmarks.first_step`.

The quickstart, its data set drawn before, with --max_steps=1; the writing of a checkpoint and the
end of the process are in the time. Beside it, what the imports take.
"""

import subprocess
import sys
import tempfile
import time

from absl import flags

from benchmarks import measure

FLAGS = flags.FLAGS
measure.define_flags(rounds=3)


def main():
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "quickstart, one step": lambda i: [
                *("main.py", "--flagfile=flags/quickstart.flags", "--task=pretrain"),
                *("--max_steps=1", f"--workdir={folder}/{i}"),
            ],
            "import tensorflow": lambda i: ["-c", "import tensorflow"],
            "import byol_tf.tasks": lambda i: ["-c", "import byol_tf.tasks"],
        }
        seconds(commands["quickstart, one step"]("warm"))  # draws the data set, fills caches
        results = {name: [] for name in commands}
        for i in range(FLAGS.rounds):
            for name, command in commands.items():
                results[name].append({"rate": seconds(command(i)), "peak_mb": 0.0})
    measure.report(
        "first_step", "start", "seconds", {"a new process": measure.summary(results, None)}
    )


def seconds(command):
    begin = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=measure.ROOT, check=True, capture_output=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    measure.run(main)
