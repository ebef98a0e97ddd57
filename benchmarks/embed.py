"""Photographs to embeddings: `python -m benchmarks.embed --photos=DIR`, maybe beside torchvision."""

import pathlib
import tempfile

from absl import flags

from benchmarks import measure

FLAGS = flags.FLAGS
flags.DEFINE_string("photos", None, "Folder of photographs in class folders.", required=True)
measure.define_flags(rounds=3, with_peer=True)


def main():
    peer = measure.peer_python()
    how = {"encoder": "resnet50", "image_size": 224, "batch_size": 50}
    with tempfile.TemporaryDirectory() as folder:
        photos = str(measure.many_photos(FLAGS.photos, pathlib.Path(folder) / "photos", copies=1))
        workers = [measure.ours("byol_tf", "embed", {"data_dir": photos, **how})]
        if peer:
            workers.append(measure.peer(peer, "embed", {"images": photos, **how}))
        results = measure.take_turns(workers, FLAGS.rounds)
    parts = {"ResNet-50, 224 px": measure.summary(results, workers[-1].name)}
    measure.report("embed", "photographs to embeddings", "images/s", parts, peer)


if __name__ == "__main__":
    measure.run(main)
