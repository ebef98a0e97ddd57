"""The evaluations that train; the defaults are the paper's (appendices C.1 and C.2)."""

import math

from absl import flags


class _PositiveNumbers(flags.ListParser):
    """A comma list of finite numbers above 0, each read by a type."""

    def __init__(self, number, largest=math.inf):
        super().__init__()
        self.number = number
        self.largest = largest

    def parse(self, argument):
        numbers = [self.number(part) for part in super().parse(argument)]
        if not numbers or not all(0 < n <= self.largest and math.isfinite(n) for n in numbers):
            most = "" if math.isinf(self.largest) else f", at most {self.largest}"
            raise ValueError(f"must be a comma list of finite numbers above 0{most}")
        return numbers


def _define_numbers(name, default, help_text, number=float, largest=math.inf):
    parser, serializer = _PositiveNumbers(number, largest), flags.CsvListSerializer(",")
    flags.DEFINE(parser, name, default, help_text, serializer=serializer)


_define_numbers(
    "linear_learning_rates",
    [0.4, 0.3, 0.2, 0.1, 0.05],
    "Of --task=linear_eval: base learning rates to choose from (paper: these), times batch / 256.",
)
flags.DEFINE_integer(
    "linear_epochs", 80, "Of --task=linear_eval: passes over the images (paper: 80).", lower_bound=1
)
flags.DEFINE_integer(
    "linear_batch_size", 1024, "Of --task=linear_eval: images a step (paper: 1024).", lower_bound=1
)
_define_numbers(
    "finetune_percents",
    [1, 10],
    "Of --task=finetune: percents of the training labels to learn from, one after another (paper: "
    "1,10; 100 for all).",
    largest=100,
)
flags.DEFINE_string(
    "finetune_dataset",
    None,
    "Of --task=finetune: TFDS name of the labelled images, such as imagenet2012_subset/1pct, "
    "instead of --finetune_percents of --dataset.",
)
_define_numbers(
    "finetune_learning_rates",
    [0.01, 0.02, 0.05, 0.1, 0.005],
    "Of --task=finetune: base learning rates to choose from (paper: these), times batch / 256.",
)
_define_numbers(
    "finetune_epochs",
    [30, 50],
    "Of --task=finetune: passes over the labelled images to choose from (paper: 30,50).",
    number=int,
    largest=2**31 - 1,
)
flags.DEFINE_integer(
    "finetune_batch_size", 1024, "Of --task=finetune: images a step (paper: 1024).", lower_bound=1
)
flags.DEFINE_float(
    "finetune_classifier_rate",
    1.0,
    "Of --task=finetune: the classifier's learning rate over the encoder's (paper: 1).",
    lower_bound=0.0,
)
