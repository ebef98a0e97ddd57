"""What to do, and where to write."""

from absl import flags

TASKS = (
    *("import_deepmind", "pretrain", "knn", "linear_probe", "linear_eval", "finetune"),
    *("export", "embed"),
)

flags.DEFINE_list(
    "task",
    ["pretrain", "knn", "linear_probe", "export"],
    f"What to do, in this order: a comma list of {', '.join(TASKS)}.",
)
flags.DEFINE_string(
    "workdir",
    "runs/byol",
    "Folder of everything that the run writes. A run that is there already is resumed, and its "
    "flags are taken where none are given.",
)
flags.DEFINE_string(
    "checkpoint", None, "Of --task=import_deepmind: DeepMind's file, such as pretrain_res50x1.pkl."
)
flags.DEFINE_integer(
    "num_classes",
    None,
    "Of --task=import_deepmind: classes of the images to pretrain on further, where they are not "
    "the checkpoint's; the online classifier then starts anew.",
    lower_bound=1,
)
flags.DEFINE_boolean(
    "keep_step",
    False,
    "Of --task=import_deepmind: go on in the checkpoint's schedule, to finish its run; otherwise "
    "further pretraining starts a schedule of its own.",
)
flags.DEFINE_boolean(
    "baselines", True, "Evaluate the encoder at random initialisation and raw pixels as well."
)
flags.DEFINE_integer("log_every", 20, "Steps between two lines of metrics.jsonl.", lower_bound=1)
flags.DEFINE_integer("checkpoint_every", 1, "Epochs between two checkpoints.", lower_bound=1)
flags.DEFINE_integer("keep_checkpoints", 2, "The last so many are kept.", lower_bound=1)
flags.DEFINE_integer(
    "knn_every",
    0,
    "Epochs between two measurements, while pretraining, of k-NN on --eval_split; the best "
    "checkpoint is kept as well. 0: none.",
    lower_bound=0,
)
flags.DEFINE_enum(
    "use_checkpoint",
    "last",
    ("last", "best"),
    "Of which checkpoint the other tasks take the encoder; best: by --knn_every.",
)
flags.DEFINE_integer("seed", 0, "Of every random choice.", lower_bound=0, upper_bound=2**20)
flags.DEFINE_boolean("deterministic", False, "The same bits on every run; slower.")


@flags.validator("task", message=f"choose from {', '.join(TASKS)}")
def _known_tasks(tasks):
    return bool(tasks) and set(tasks) <= set(TASKS)
