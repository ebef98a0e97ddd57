"""Weak scaling: two replicas of one core each beside one of one core: `python -m benchmarks.scaling`.

The ratio is of steps/s at the same batch a replica: 1 is perfect. The step is the compiled
function and the target's update, without `fit`, which holds up its own end where there are
several replicas (docs/performance.md).
"""

import contextlib
import json
import socket

from absl import flags

from benchmarks import measure

FLAGS = flags.FLAGS
measure.define_flags(rounds=5)
HOW = {
    **{"encoder": "resnet18", "stem": "small", "image_size": 32, "precision": "float32"},
    **{"batch_size": 32, "steps": 2, "threads": 1, "with_update": True},
}


def main():
    if len(measure.cores()) < 2:
        raise SystemExit("error: needs Linux and two cores that this process may use.")
    first, second = ({core} for core in measure.cores()[:2])
    one = measure.ours("one replica, one core", "compiled_step", HOW, cores=first)
    mirrored = measure.ours(
        "MirroredStrategy, two",
        "compiled_step",
        {**HOW, "strategy": "mirrored"},
        cores=first | second,
    )
    addresses = _free_addresses(2)
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
    # What is left when nothing is exchanged: they share the memory and the last cache only.
    strangers = [
        measure.ours(f"stranger {i}", "compiled_step", HOW, cores=cores)
        for i, cores in enumerate((first, second))
    ]
    workers = [
        *(one, mirrored, measure.Together("MultiWorkerMirroredStrategy, two", processes)),
        measure.Together("the floor, two that exchange nothing", strangers),
    ]
    parts = {
        "ResNet-18, 32 px": measure.summary(measure.take_turns(workers, FLAGS.rounds), one.name)
    }
    measure.report("scaling", "weak scaling, batch 32 a replica", "steps/s", parts)


def _free_addresses(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [f"localhost:{free.getsockname()[1]}" for free in sockets]


def _tf_config(addresses, index):
    task = {"type": "worker", "index": index}
    return json.dumps({"cluster": {"worker": addresses}, "task": task})


if __name__ == "__main__":
    measure.run(main)
