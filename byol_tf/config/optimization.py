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
flags.DEFINE_boolean(
    "constant_target_ema", False, "Keep tau at --base_target_ema (table 5a, for tau = 0)."
)
flags.DEFINE_integer(
    "accumulation_steps",
    1,
    "Parts of the batch, with batch statistics of their own, whose gradients are averaged "
    "before one step of the optimizer and of the target (figure 3a).",
    lower_bound=1,
)
flags.DEFINE_enum(
    "method", "byol", ("byol", "supervised"), "supervised: the encoder learns from the labels."
)
flags.DEFINE_boolean(
    "target_network", True, "Without it online projections are compared (table 5b)."
)
flags.DEFINE_float(
    "contrastive_weight",
    0.0,
    "beta of equation 8: weight of the negative pairs (paper: 0; SimCLR: 1, with "
    "--nopredictor --notarget_network).",
    lower_bound=0.0,
)
flags.DEFINE_float(
    "temperature", 0.1, "Of the negative pairs, alpha of equation 8.", lower_bound=1e-3
)
