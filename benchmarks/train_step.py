"""One step of training: `python -m benchmarks.train_step`, with --peer_python beside lightly.

The paper's heads (4096, 256), LARS, the target's update and the Keras loop are in the time.
"""

from absl import app, flags

from benchmarks import measure

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 5, "Turns of each.")
flags.DEFINE_integer("steps", 2, "Steps a turn.")
flags.DEFINE_list("precisions", ["float32", "bfloat16"], "float32, bfloat16.")

ENCODERS = {
    "ResNet-18, 32 px, batch 64": {
        "encoder": "resnet18",
        "stem": "small",
        "image_size": 32,
        "batch_size": 64,
    },
    "ResNet-50, 224 px, batch 8": {
        "encoder": "resnet50",
        "stem": "imagenet",
        "image_size": 224,
        "batch_size": 8,
    },
}


def main(argv):
    del argv
    peer = measure.peer_python()
    parts = {}
    for name, encoder in ENCODERS.items():
        for precision in FLAGS.precisions:
            how = {**encoder, "precision": precision, "steps": FLAGS.steps}
            workers = [measure.ours("byol_tf", "step", how)]
            if peer:
                workers.append(measure.peer(peer, "step", how))
            results = measure.take_turns(workers, FLAGS.rounds)
            parts[f"{name}, {precision}"] = measure.summary(results, workers[-1].name)
    measure.write("train_step", "training step", "steps/s", parts, peer)


if __name__ == "__main__":
    app.run(main)
