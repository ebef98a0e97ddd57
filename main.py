"""BYOL from images to a served encoder: `python main.py --flagfile=flags/quickstart.flags`."""

import os
import signal
import sys

from absl import app, flags

from byol_tf import config, workdir
from byol_tf.errors import Preempted, UserError, one_line

FLAGS = flags.FLAGS
PREEMPTED = 75  # EX_TEMPFAIL: run the same command again
INTERRUPTED = 130  # by Ctrl-C, as shells have it


def parse(argv):
    """Parses the flags; what is not given comes from the run in the workdir, if there is one."""
    if {"-h", "-help", "--help"} & set(argv):
        print(__doc__ + "\n" + "\n".join(FLAGS.module_help(m) for m in config.MODULES))
        sys.exit(0)
    try:
        FLAGS(argv)
        saved = workdir.read_flags(FLAGS.workdir)
        lines = [
            line for name, line in saved.items() if name not in ("task", "workdir", "transfer")
        ]
        FLAGS.unparse_flags()
        return FLAGS([argv[0], *lines, *argv[1:]])
    except (flags.Error, UserError) as error:
        sys.exit(f"error: {one_line(error).removeprefix('ERROR:: ')}")
    # What absl lets pass: a flagfile that is not text, a wrong --stderrthreshold, and, from its
    # search for the flag that was meant or among flagfiles, a recursion without end.
    except (OSError, ValueError, RecursionError) as error:
        given = one_line(" ".join(argv[1:]))
        sys.exit(f"error: {given}: flags that cannot be read ({one_line(error)}).")


def main(argv):
    if len(argv) > 1:
        sys.exit(f"error: {one_line(repr(argv[1]))} is not a flag: write --name=value.")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its notices hide ours
    try:
        signal.signal(signal.SIGTERM, _stop)
        from byol_tf import tasks  # loads TensorFlow, which --help and a wrong flag need not await

        tasks.only_our_notices()
        tasks.configure_devices()
        tasks.run_all()
    except UserError as error:
        sys.exit(f"error: {error}")
    except Preempted as stopped:
        print(f"{stopped}: the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(PREEMPTED)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _stop(number, frame):
    """Ends what is not training, which ends by itself after a step: see `StopOnSigterm`."""
    raise Preempted("stopped by SIGTERM")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
