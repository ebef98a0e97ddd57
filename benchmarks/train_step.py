"""One step of training: `python -m benchmarks.train_step`, with --peer_python beside lightly.

The paper's heads (4096, 256), LARS, the target's update and the Keras loop are in the time.
Beside it: the compiled function and the target's update alone, and as many floating-point
operations as the convolutions have in large matrix products, which is the floor in float32.
"""

from absl import flags

from benchmarks import measure

FLAGS = flags.FLAGS
measure.define_flags(rounds=5, with_peer=True)
flags.DEFINE_integer("steps", 5, "Steps a turn.", lower_bound=1)
flags.DEFINE_multi_enum(
    "precisions", ["float32", "bfloat16"], ["float32", "bfloat16"], "Once for each."
)

# Multiplications and additions of one image's way forward, in 1e9.
GFLOP = {"resnet18": 1.11, "resnet50": 8.2}
PASSES = 2 * 4  # two views: the target's way forward, the online one, and twice that backward
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


def main():
    peer = measure.peer_python()
    parts = {}
    for name, encoder in ENCODERS.items():
        for precision in FLAGS.precisions:
            workers = workers_of({**encoder, "precision": precision}, peer)
            results = measure.take_turns(workers, FLAGS.rounds)
            parts[f"{name}, {precision}"] = measure.summary(results, workers[-1].name)
    measure.report("train_step", "training step", "steps/s", parts, peer)


def workers_of(how, peer):
    workers = [measure.ours("byol_tf", "step", {**how, "steps": FLAGS.steps})]
    if how["precision"] == "float32":
        gflop = GFLOP[how["encoder"]] * how["batch_size"] * PASSES
        workers += [
            measure.ours("its compiled function", "compiled_step", {**how, "steps": FLAGS.steps}),
            measure.ours("the target's update", "target_update", {**how, "steps": 20}),
            measure.ours("the floor, matrix products", "matmuls", {"gflop": gflop}),
        ]
    if peer:
        workers.append(measure.peer(peer, "step", {**how, "steps": FLAGS.steps}))
    return workers


if __name__ == "__main__":
    measure.run(main)
