"""The networks."""

from absl import flags

ENCODERS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200")

flags.DEFINE_enum("encoder", "resnet50", ENCODERS, "The encoder (paper: resnet50 to resnet200).")
flags.DEFINE_float(
    "width_multiplier",
    1.0,
    "Scales the encoder's channels (paper: 1, 2, 4); a fraction for small machines.",
    lower_bound=1 / 64,
)
flags.DEFINE_enum(
    "stem",
    "imagenet",
    ("imagenet", "small"),
    "imagenet: 7x7 convolution of stride 2 and max-pool (paper); small: 3x3, for 32 pixels.",
)
flags.DEFINE_integer(
    "projector_hidden_size",
    4096,
    "Hidden units of projector and predictor (paper: 4096).",
    lower_bound=1,
)
flags.DEFINE_integer(
    "projector_output_size",
    256,
    "Output units of projector and predictor (paper: 256).",
    lower_bound=2,
)
flags.DEFINE_integer(
    "projector_depth", 2, "Linear layers of the projector (paper: 2).", lower_bound=1
)
flags.DEFINE_integer(
    "predictor_depth", 2, "Linear layers of the predictor (paper: 2).", lower_bound=1
)
flags.DEFINE_boolean("predictor", True, "Compare predictions, not projections (table 5b).")
