"""The evaluations that train; the defaults are the paper's (appendices C.1, C.2 and D)."""

import math

from absl import flags


class _PositiveNumbers(flags.ListParser):
    """A comma list of finite numbers above 0, or also 0, each read by a type."""

    def __init__(self, number, largest=math.inf, zero=False):
        super().__init__()
        self.number = number
        self.largest = largest
        self.zero = zero

    def parse(self, argument):
        numbers = [self.number(part) for part in super().parse(argument)]
        if not numbers or not all(self._allowed(n) for n in numbers):
            least = "of at least 0" if self.zero else "above 0"
            most = "" if math.isinf(self.largest) else f", at most {self.largest}"
            raise ValueError(f"must be a comma list of finite numbers {least}{most}")
        return numbers

    def _allowed(self, n):
        return (n > 0 or self.zero and n == 0) and n <= self.largest and math.isfinite(n)


def _define_numbers(name, default, help_text, **limits):
    parser = _PositiveNumbers(**{"number": float, **limits})
    serializer = flags.CsvListSerializer(",")
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
    "depth_learning_rate",
    0.16,
    "Learning rate at 256 images a step, times their number / 256 (paper: 0.16).",
    lower_bound=0.0,
)


@flags.validator("depth_crop", message="must be two numbers: height,width")
def _height_and_width(crop):
    return len(crop) == 2


flags.DEFINE_list(
    "transfer",
    None,
    "Data sets of --task=transfer, a comma list of TFDS names or of folders below "
    "--transfer_data_dir that hold a folder train/. Default: the paper's twelve. Without --task it "
    "is --task=transfer.",
)
flags.DEFINE_list(
    "transfer_mode",
    ["linear"],
    "Of --task=transfer: a comma list of linear (logistic regression on frozen features) and "
    "finetune (encoder and classifier).",
)
flags.DEFINE_string(
    "transfer_data_dir",
    None,
    "Of --task=transfer: folder of TFDS's prepared data sets and of folders of images. Default: "
    "--data_dir, if --dataset is from TFDS too.",
)
flags.DEFINE_integer(
    "transfer_steps",
    20_000,
    "Of --transfer_mode=finetune: steps of each training (paper: 20000).",
    lower_bound=1,
)
flags.DEFINE_integer(
    "transfer_batch_size",
    256,
    "Of --transfer_mode=finetune: images a step (paper: 256).",
    lower_bound=1,
)
_define_numbers(
    "transfer_learning_rates",
    [float(f"{10 ** (i / 2 - 4):.4g}") for i in range(7)],
    "Of --transfer_mode=finetune: learning rates to choose from (paper: 7 from 0.0001 to 0.1).",
)
_define_numbers(
    "transfer_weight_decays",
    [0.0] + [float(f"{10 ** (i / 2 - 6):.4g}") for i in range(7)],
    "Of --transfer_mode=finetune: weight decays to choose from, each divided by the learning rate "
    "(paper: 0, and 7 from 1e-6 to 1e-3).",
    zero=True,
)


@flags.validator("transfer_mode", message="choose from linear, finetune")
def _known_modes(modes):
    return bool(modes) and set(modes) <= {"linear", "finetune"}
