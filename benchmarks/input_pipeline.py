"""Images to two views: `python -m benchmarks.input_pipeline --photos=DIR --cifar10=DIR`.

With --peer_python, an interpreter that has torch, torchvision and lightly, the same is done
there, in alternation. The ratios are to the peer, or to the decoding of two crops alone.
"""

import pathlib
import tempfile

import numpy as np
from absl import app, flags

from benchmarks import measure

FLAGS = flags.FLAGS
flags.DEFINE_string("photos", None, "Folder of photographs in class folders.", required=True)
flags.DEFINE_string("cifar10", None, "TFDS's folder with cifar10 prepared.", required=True)
flags.DEFINE_integer("rounds", 5, "Turns of each.")


def main(argv):
    del argv
    peer = measure.peer_python()
    with tempfile.TemporaryDirectory() as folder:
        photos = measure.many_photos(FLAGS.photos, pathlib.Path(folder) / "photos")
        parts = {"photographs, 224 px": photographs(photos, peer)}
        array = pathlib.Path(folder) / "cifar10.npy"
        parts["CIFAR-10, 32 px"] = cifar10(array, peer)
    measure.write("input_pipeline", "images to two views", "images/s", parts, peer)


def photographs(photos, peer):
    how = {"image_size": 224, "batch_size": 50, "batches": 48}
    ours = {"dataset": "image_folder", "data_dir": str(photos), "split": "all", **how}
    workers = [
        measure.ours("byol_tf", "pipeline", ours),
        measure.ours("two crops decoded, no more", "two_crops", ours),
    ]
    if peer:
        workers.append(measure.peer(peer, "pipeline", {"images": str(photos), **how}))
    return measure.summary(measure.take_turns(workers, FLAGS.rounds), workers[-1].name)


def cifar10(array, peer):
    how = {"image_size": 32, "batch_size": 250}
    ours = {"dataset": "cifar10", "data_dir": FLAGS.cifar10, "split": "train", **how}
    workers = [measure.ours("byol_tf", "pipeline", {"batches": 160, **ours})]
    if peer:
        import tensorflow_datasets as tfds

        images = tfds.load("cifar10", split="train", data_dir=FLAGS.cifar10, download=False)
        np.save(array, np.stack([example["image"] for example in tfds.as_numpy(images)]))
        workers.append(measure.peer(peer, "pipeline", {"images": str(array), "batches": 60, **how}))
    return measure.summary(measure.take_turns(workers, FLAGS.rounds), workers[-1].name)


if __name__ == "__main__":
    app.run(main)
