"""How long and how fast to learn; the defaults are the paper's for 1000 epochs."""

from absl import flags

flags.DEFINE_integer(
    "batch_size", 4096, "Images a step, over all replicas (paper: 4096).", lower_bound=2
)
flags.DEFINE_integer("epochs", 1000, "Passes over the images (paper: 1000).", lower_bound=1)
flags.DEFINE_integer(
    "max_steps", None, "Stop at this step; the schedules stay those of --epochs.", lower_bound=1
)
flags.DEFINE_enum(
    "optimizer", "lars", ("lars", "sgd", "adam", "lamb"), "The optimizer (paper: lars)."
)
flags.DEFINE_float(
    "base_learning_rate",
    0.2,
    "Peak learning rate at batch 256; grows with the batch (paper: 0.2; 0.45 for 100 epochs, "
    "0.3 for 300).",
    lower_bound=0.0,
)
flags.DEFINE_float(
    "weight_decay",
    1.5e-6,
    "Of weights, not of biases and batch norm (paper: 1.5e-6; 1e-6 for 100 and 300 epochs).",
    lower_bound=0.0,
)
flags.DEFINE_float(
    "warmup_epochs", 10.0, "Epochs of linear warm-up from 0 (paper: 10).", lower_bound=0.0
)
flags.DEFINE_float(
    "base_target_ema",
    0.996,
    "tau of the first step, which rises to 1 (paper: 0.996; 0.99 for 100 and 300 epochs).",
    lower_bound=0.0,
    upper_bound=1.0,
)
