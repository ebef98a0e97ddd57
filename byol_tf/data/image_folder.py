"""A folder of image files as a source: its splits, its classes, and the check of every file."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import threading

import tensorflow as tf
from absl import logging

from byol_tf.data import decode
from byol_tf.data.source import Source
from byol_tf.errors import NoSplit, UserError, reason
from byol_tf.whole import whole_file

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
_OTHER_EXTENSIONS = (".webp", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".svg")
_SPLIT_FOLDERS = {"train": "train", "test": "test", "validation": "validation", "val": "validation"}
_TEST_SHARE = 10  # one of so many files is for testing, where there are no split folders
# More than an image of `decode.MAX_PIXELS` takes, even as a PNG of 8 bytes a pixel.
_MAX_BYTES = 2**30
_LARGE = 10_000_000  # pixels
_one_large_image = threading.Lock()
_DECODER = f"2, TensorFlow {tf.__version__}"  # raise the number when `decode` changes


def load(split, data_dir, channels=3):
    """Opens a folder of JPEG, PNG, BMP and GIF files, at any depth.

    First-level folders called train, test, validation or val are the splits; without them
    one of ten files, chosen by its path, is in "test" and the others in "train". "all" is
    everything. The folders below, if all images lie in them and there are at least two,
    are the classes. Files that cannot be decoded are skipped and logged.

    Args:
      split: one of the splits.
      data_dir: path of the folder.
      channels: of the decoded images, 1 to 4; see `decode.decode`.

    Returns: a `byol_tf.data.source.Source`; its names are paths relative to `data_dir`.

    Raises:
      UserError: if there is no such folder or split, or no readable image in it.
    """
    root = _root(data_dir)
    files = _image_files(root)
    if not files:
        raise UserError(
            f"--data_dir={root}: no image in this folder (*{', *'.join(_EXTENSIONS)}): "
            "give the folder that holds the images."
        )
    splits, depth = _splits(files, root)
    canonical = _SPLIT_FOLDERS.get(split, split)
    if canonical not in splits:
        raise NoSplit(f"--data_dir={root}: no split {split!r}; there are {', '.join(splits)}.")
    class_names = _class_names(splits["all"], depth)
    names = _verified(root, splits[canonical])
    if not names:
        raise UserError(
            f"--data_dir={root}: no readable image in split {split!r} (of "
            f"{len(splits[canonical])} files): add images."
        )
    return _source(root, names, class_names, depth, channels)


def _root(data_dir):
    """`data_dir` as a path that is sure to be a folder."""
    if not data_dir:
        raise UserError("--data_dir is missing: --dataset=image_folder needs the images' folder.")
    root = pathlib.Path(data_dir).expanduser()
    if not root.exists():
        raise UserError(f"--data_dir={data_dir}: no such folder: check the path.")
    if not root.is_dir():
        raise UserError(f"--data_dir={data_dir}: not a folder: give the one that holds the images.")
    return root


def _image_files(root):
    """Sorted paths, relative to `root` and with slashes, of what is called like an image."""
    files = []
    others = []
    chains = {}  # from a folder to the real paths of it and of all above
    for folder, subfolders, names in os.walk(root, onerror=_log_unlisted, followlinks=True):
        real, above = os.path.realpath(folder), chains.get(os.path.dirname(folder), ())
        if real in above:  # a link that leads back
            subfolders.clear()
            continue
        chains[folder] = (*above, real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = pathlib.Path(folder).relative_to(root)
        files += [
            (relative / name).as_posix()
            for name in names
            if name.lower().endswith(_EXTENSIONS) and not name.startswith(".")
        ]
        others += [name for name in names if name.lower().endswith(_OTHER_EXTENSIONS)]
    if others:
        logging.warning(
            "ignored %d images of kinds that cannot be read here, such as %s",
            len(others),
            others[0],
        )
    return sorted(files)


def _log_unlisted(error):
    logging.warning("skipped the folder %s: %s", error.filename, error.strerror)


def _splits(files, root):
    """Divides the files: (dict from split to files, how many folders of a path are its split's)."""
    folders = {name.split("/")[0] for name in files if "/" in name}
    split_folders = sorted(folders & _SPLIT_FOLDERS.keys())
    others = sorted(folders - _SPLIT_FOLDERS.keys())
    if not split_folders:
        return _splits_by_hash(files), 0
    if len(split_folders) == 1 and others:
        # A class of trains, or a split beside something else: a wrong guess would go unseen.
        raise UserError(
            f"--data_dir={root}: {split_folders[0]!r} beside {others[0]!r} could be a split or "
            "a class: rename it, or move the other folders out."
        )
    splits = {}
    for name in files:
        folder, _, below = name.partition("/")
        if below and folder in split_folders:
            splits.setdefault(_SPLIT_FOLDERS[folder], []).append(name)
    return {**splits, "all": [name for names in splits.values() for name in names]}, 1


def _splits_by_hash(files):
    """Splits by a hash of the path: what is added or removed later moves no other file."""
    splits = {"train": [], "test": [], "all": files}
    for name in files:
        digest = hashlib.sha256(os.fsencode(name)).digest()
        is_test = int.from_bytes(digest, "big") % _TEST_SHARE == 0
        splits["test" if is_test else "train"].append(name)
    return splits


def _class_names(names, depth):
    """The sorted folders at `depth`, or None where not every file is in one of two or more."""
    classes = {_class_of(name, depth): name for name in names}
    if None in classes and len(classes) > 2:
        logging.log_first_n(
            logging.WARNING,
            "the folders are not taken for classes, as %s lies in none of them: move it into one "
            "if they are",
            1,
            classes[None],
        )
    return tuple(sorted(classes)) if None not in classes and len(classes) >= 2 else None


def _class_of(name, depth):
    folders = name.split("/")[:-1]
    return folders[depth] if len(folders) > depth else None


def _source(root, names, class_names, depth, channels):
    """The `Source` of these files, which are read when it is their turn."""
    numbers = {name: number for number, name in enumerate(class_names or ())}
    slices = {
        "index": tf.range(len(names), dtype=tf.int64),
        "path": [os.fsencode(root / name) for name in names],
        "label": tf.constant([numbers.get(_class_of(name, depth), -1) for name in names], tf.int64),
        "name": [os.fsencode(name) for name in names],
    }

    return Source(
        dataset=tf.data.Dataset.from_tensor_slices(slices),
        num_examples=len(names),
        class_names=class_names,
        image_shape=None,
        read=lambda record: tf.io.read_file(record["path"]),
        find_fault=lambda: _find_change(root, names),
        channels=channels,
    )


def _verified(root, names):
    """`names` without the files that cannot be decoded, which are logged with the reason."""
    faults = _faults(root, names)
    skipped = [name for name in names if faults[name]]
    for name in skipped:
        logging.warning("skipped %s: %s", root / name, faults[name])
    if skipped:
        logging.warning("skipped %d of %d files", len(skipped), len(names))
    return [name for name in names if not faults[name]]


def _find_change(root, names):
    """What is wrong with files that were sound when the run began, or None; see `Source`."""
    faults = _faults(root, names)
    lost = [name for name in names if faults[name]]
    if not lost:
        return None
    return (
        f"--data_dir={root}: {len(lost)} of {len(names)} images can no longer be read, such as "
        f"{lost[0]} ({faults[lost[0]]}): put them back, or go on without them"
    )


def _faults(root, names):
    """A dict from name to why the file cannot be used, or to None.

    Every file is decoded once; what came of it is kept for the next start.
    """
    cache_file = _cache_file(root)
    checked = _read_cache(cache_file)
    stamps = {name: _stamp(root / name) for name in names}
    new = [name for name in names if name not in checked or checked[name][0] != stamps[name]]
    if new:
        logging.info("checking %d image files in %s", len(new), root)
        try:
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                faults = pool.map(fault_of, [root / name for name in new])
                checked.update((name, [stamps[name], fault]) for name, fault in zip(new, faults))
        finally:  # if it is interrupted, for the next start
            _write_cache(cache_file, checked)
    return {name: checked[name][1] for name in names}


def _stamp(path):
    """[size, time of change] of a file, or None where it cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def fault_of(path):
    """Why an image file, a `pathlib.Path`, cannot be used; None if it can."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return "not a file"
        if path.stat().st_size > _MAX_BYTES:
            return f"{path.stat().st_size} bytes, more than {_MAX_BYTES}"
        encoded = path.read_bytes()
        if not encoded:
            return "empty"
        height, width = decode.image_size(encoded).numpy().tolist()
        if not 0 < height * width <= decode.MAX_PIXELS:
            return f"{width}x{height} pixels, not between 1 and {decode.MAX_PIXELS}"
        # Large ones one after the other: each may take gigabytes.
        with _one_large_image if height * width > _LARGE else contextlib.nullcontext():
            decode.decode(encoded)
    except OSError as error:
        return error.strerror
    except tf.errors.OpError as error:
        return reason(error)
    return None


def _cache_file(root):
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return pathlib.Path(home, "byol_tf", "verified", f"{name}.json")


def _read_cache(cache_file):
    """A dict from name to [stamp, fault], empty where there is none from this decoder."""
    try:
        cache = json.loads(cache_file.read_text())
        files = cache["files"].items() if cache["decoder"] == _DECODER else ()
        return {name: [stamp, fault] for name, (stamp, fault) in files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _write_cache(cache_file, checked):
    content = json.dumps({"decoder": _DECODER, "files": checked})
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(cache_file) as unfinished:  # two runs may start at once
            unfinished.write_text(content)
    except OSError as error:
        logging.warning(
            "%s: %s; the next start checks all images again", cache_file, error.strerror
        )
