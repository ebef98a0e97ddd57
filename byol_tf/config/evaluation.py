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

flags.DEFINE_string(
    "dense_data",
    None,
    "Of --task=segmentation and --task=depth: a folder of arrays or a TFDS name such as "
    "nyu_depth_v2; docs/evaluation.md has the form.",
)
flags.DEFINE_string(
    "dense_data_dir", None, "Folder of TFDS's prepared --dense_data. Default: TFDS's."
)
flags.DEFINE_string("dense_train_split", "train", "Of --dense_data: what to learn from.")
flags.DEFINE_string("dense_eval_split", "validation", "Of --dense_data: what to evaluate on.")
flags.DEFINE_boolean(
    "dense_frozen", False, "Of --task=segmentation and --task=depth: only the head learns."
)
flags.DEFINE_integer(
    "segmentation_classes",
    21,
    "Classes of the masks, with the background (paper: VOC2012's 21).",
    lower_bound=2,
    upper_bound=255,
)
flags.DEFINE_integer("segmentation_steps", 30_000, "Steps (paper: 30000).", lower_bound=1)
flags.DEFINE_integer("segmentation_batch_size", 16, "Images a step (paper: 16).", lower_bound=1)
flags.DEFINE_integer(
    "segmentation_crop",
    513,
    "Side in pixels of what is learned and judged (paper: 513).",
    lower_bound=8,
)
_define_numbers(
    "segmentation_learning_rates",
    [0.001, 0.003162, 0.01, 0.03162, 0.1],
    "Of --task=segmentation: learning rates to choose from (paper: these).",
)
flags.DEFINE_integer("depth_steps", 7500, "Steps (paper: 7500).", lower_bound=1)
flags.DEFINE_integer("depth_batch_size", 256, "Images a step (paper: 256).", lower_bound=1)
flags.DEFINE_float(
    "depth_scale", 0.5, "Size of the images over what they were (paper: 0.5).", lower_bound=0.01
)
_define_numbers(
    "depth_crop",
    [228, 304],
    "Height and width in pixels of the centre, after --depth_scale (paper: 228,304).",
    number=int,
)
flags.DEFINE_float(
    "depth_learning_rate", 0.16, "Learning rate (paper: 0.16 at batch 256).", lower_bound=0.0
)


@flags.validator("depth_crop", message="must be two numbers: height,width")
def _height_and_width(crop):
    return len(crop) == 2
