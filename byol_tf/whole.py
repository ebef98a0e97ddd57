"""Files and folders that are there whole, or not at all."""

import contextlib
import os
import re

_NAME = re.compile(r"\.(.+)\.byol_tf\.\d+")


def unfinished(path):
    """Where this process makes what is to become `path`: beside it, of a name of its own."""
    return path.with_name(f".{path.name}.byol_tf.{os.getpid()}")


def name_of_unfinished(path):
    """The name that `path` was to get, if it is what `unfinished` gave; else None."""
    match = _NAME.fullmatch(path.name)
    return match and match[1]


@contextlib.contextmanager
def whole_file(path):
    """Yields where to write a file, which then takes the place of `path`, once it is on the disk.

    After an exception what was at `path` is there still, and nothing else.
    """
    aside = unfinished(path)
    try:
        yield aside
        sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def sync(path):
    """Waits until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
