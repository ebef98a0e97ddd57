"""Where and in which precision to compute."""

from absl import flags

flags.DEFINE_enum(
    "precision",
    "float32",
    ("float32", "bfloat16"),
    "bfloat16: matrix products and convolutions; weights, loss and statistics stay float32.",
)
flags.DEFINE_enum(
    "augment_on",
    "host",
    ("host", "accelerator"),
    "Where colours, blur and solarization are computed.",
)
flags.DEFINE_enum(
    "strategy",
    "auto",
    ("auto", "one_device", "mirrored", "multi_worker", "tpu"),
    "mirrored: one replica a device of this machine; multi_worker: of all machines that TF_CONFIG "
    "or Slurm names; auto: multi_worker with TF_CONFIG, mirrored where there are several devices.",
)
flags.DEFINE_string(
    "tpu", "local", "Of --strategy=tpu: name or address of the TPU; local: of this TPU VM."
)
flags.DEFINE_integer(
    "logical_cpus", 1, "Split the CPU into so many devices, to try replicas.", lower_bound=1
)
flags.DEFINE_integer(
    "intra_op_threads",
    0,
    "Threads inside one operation; 0: TensorFlow's choice. With 1, a small network is up to "
    "half as fast again on two cores, which then work on the two views side by side.",
    lower_bound=0,
)
