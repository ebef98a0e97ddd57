"""Images to two views: `python -m benchmarks.input_pipeline --photos=DIR --cifar10=DIR`.

With --peer_python, an interpreter that has torch, torchvision and lightly, the same is done
there, in alternation. Beside it the floor: the same but for the augmentation.
"""

import pathlib
import tempfile

import numpy as np
from absl import flags

from benchmarks import measure

FLAGS = flags.FLAGS
flags.DEFINE_string("photos", None, "Folder of photographs in class folders.", required=True)
flags.DEFINE_string("cifar10", None, "TFDS's folder with cifar10 prepared.", required=True)
measure.define_flags(rounds=5, with_peer=True)


def main():
    peer = measure.peer_python()
    if not (pathlib.Path(FLAGS.cifar10) / "cifar10").is_dir():
        raise SystemExit(f"error: --cifar10={FLAGS.cifar10}: no cifar10 there, as TFDS keeps it.")
    with tempfile.TemporaryDirectory() as folder:
        photos = measure.many_photos(FLAGS.photos, pathlib.Path(folder) / "photos")
        parts = {"photographs, 224 px": photographs(photos, peer)}
        array = pathlib.Path(folder) / "cifar10.npy"
        parts["CIFAR-10, 32 px"] = cifar10(array, peer)
    measure.report("input_pipeline", "images to two views", "images/s", parts, peer)


def photographs(photos, peer):
    how = {"image_size": 224, "batch_size": 50, "batches": 48}
    ours = {"dataset": "image_folder", "data_dir": str(photos), "split": "all", **how}
    workers = ours_and_floor(ours)
    if peer:
        workers.append(measure.peer(peer, "pipeline", {"images": str(photos), **how}))
    return measure.summary(measure.take_turns(workers, FLAGS.rounds), workers[-1].name)


def cifar10(array, peer):
    how = {"image_size": 32, "batch_size": 250}
    folder = str(pathlib.Path(FLAGS.cifar10).resolve())
    ours = {"dataset": "cifar10", "data_dir": folder, "split": "train", **how}
    workers = ours_and_floor({"batches": 160, **ours})
    if peer:
        import tensorflow_datasets as tfds

        images = tfds.load("cifar10", split="train", data_dir=folder, download=False)
        np.save(array, np.stack([example["image"] for example in tfds.as_numpy(images)]))
        workers.append(measure.peer(peer, "pipeline", {"images": str(array), "batches": 60, **how}))
    return measure.summary(measure.take_turns(workers, FLAGS.rounds), workers[-1].name)


def ours_and_floor(how):
    crops = {**how, "augment_on": "accelerator"}
    return [
        measure.ours("byol_tf", "pipeline", how),
        measure.ours("two crops, no more", "pipeline", crops),
    ]


if __name__ == "__main__":
    measure.run(main)
