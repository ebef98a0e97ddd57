"""Weak scaling: two replicas of one core each beside one of one core: `python -m benchmarks.scaling`.

The ratio is of steps/s at the same batch a replica: 1 is perfect. The step is the compiled
function and the target's update, without `fit`, which holds up its own end where there are
several replicas (docs/performance.md).
"""

import json
import os

from absl import app, flags

from benchmarks import measure

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 5, "Turns of each.")
HOW = {
    **{"encoder": "resnet18", "stem": "small", "image_size": 32, "precision": "float32"},
    **{"batch_size": 32, "steps": 2, "threads": 1, "with_update": True},
}


def main(argv):
    del argv
    first, second = ({core} for core in sorted(os.sched_getaffinity(0))[:2])
    one = measure.ours("one replica, one core", "compiled_step", HOW, cores=first)
    mirrored = measure.ours(
        "MirroredStrategy, two",
        "compiled_step",
        {**HOW, "strategy": "mirrored"},
        cores=first | second,
    )
    addresses = ["localhost:23457", "localhost:23458"]
    processes = [
        measure.ours(
            f"process {i}",
            "compiled_step",
            {**HOW, "strategy": "multi_worker"},
            cores=cores,
            env={"TF_CONFIG": _tf_config(addresses, i)},
        )
        for i, cores in enumerate((first, second))
    ]
    workers = [one, mirrored, measure.Together("MultiWorkerMirroredStrategy, two", processes)]
    parts = {
        "ResNet-18, 32 px": measure.summary(measure.take_turns(workers, FLAGS.rounds), one.name)
    }
    measure.write("scaling", "weak scaling, batch 32 a replica", "steps/s", parts)


def _tf_config(addresses, index):
    task = {"type": "worker", "index": index}
    return json.dumps({"cluster": {"worker": addresses}, "task": task})


if __name__ == "__main__":
    app.run(main)
