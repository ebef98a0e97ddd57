"""Runs of `main.py` that need not import TensorFlow, which takes longer than most of what is tested.

Each is forked from a process that has imported it and nothing more. It is `main.py` in everything
else but the encoder: of resnet18 every group has one block, and a `tiny` one is of one convolution.
"""

import contextlib
import json
import os
import pathlib
import resource
import select
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


class Server:
    """The process that is forked from, in a home of its own. It serves one run at a time."""

    def __init__(self, home):
        env = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        env |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.running = None

    def start(self, argv, cwd, stdout, stderr, *, tiny=False, largest_file=None, env=None):
        """Forks a run whose output goes to these files' ends: its process' number.

        No file that it writes gets larger than `largest_file` bytes; `env` adds to the environment.
        """
        self.kill()  # what a test that failed has left
        request = {"argv": list(map(str, argv)), "cwd": str(cwd), "env": env or {}, "tiny": tiny}
        request |= {"stdout": str(stdout), "stderr": str(stderr), "largest_file": largest_file}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self.running = int(self._process.stdout.readline())
        return self.running

    def ended(self, seconds):
        """Whether the run has ended, or does so within these seconds."""
        return bool(select.select([self._process.stdout], [], [], seconds)[0])

    def exit_code(self):
        """Awaits the run's end."""
        self.running = None
        return int(self._process.stdout.readline())

    def kill(self):
        """Ends the run, if there still is one."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.running, signal.SIGKILL)
            self.exit_code()

    def close(self):
        self.kill()
        self._process.stdin.close()
        self._process.wait()


def serve():
    """Prints the process of each run that standard input asks for, then its exit code."""
    from absl import app, logging

    logging.use_absl_handler()  # as `app.run` does, before TensorFlow finds none
    import tensorflow_datasets  # noqa: F401
    from tensorflow.python.eager import context

    import main
    from byol_tf import resnet, tasks  # noqa: F401

    assert not context.context()._initialized  # else its threads and locks would not be in a fork
    for line in iter(sys.stdin.readline, ""):
        process = os.fork()
        if not process:
            request = json.loads(line)
            for descriptor, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
            os.chdir(request["cwd"])
            os.environ.update(request["env"])
            if request["largest_file"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
            resnet.BLOCKS_PER_GROUP["resnet18"] = (1, 1, 1, 1)
            if request["tiny"]:
                resnet.resnet_encoder = tiny_encoder
            app.run(main.main, ["main.py", *request["argv"]], flags_parser=main.parse)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def tiny_encoder(name, *, image_size, channels, **_):
    from byol_tf import resnet
    from byol_tf.keras_api import keras

    images = keras.Input((image_size, image_size, channels))
    x = keras.layers.Conv2D(4, 3, strides=4, use_bias=False)(images)
    x = keras.layers.ReLU()(resnet.batch_norm(x, None, "batch_norm"))
    return keras.Model(images, keras.layers.GlobalAveragePooling2D()(x), name=name)


if __name__ == "__main__":
    serve()
