"""The images, and what is made of them."""

from absl import flags

flags.DEFINE_string(
    "dataset",
    "imagenet2012",
    "A TFDS name (cifar10, imagenette/320px-v2), image_folder, or shapes (built in).",
)
flags.DEFINE_string(
    "data_dir", None, "Folder of the images, or of TFDS's prepared data sets. Default: TFDS's."
)
flags.DEFINE_string(
    "train_split", "train", "Images to learn from; of TFDS slices too: train[:10%]."
)
flags.DEFINE_string("eval_split", "validation", "Labelled images to evaluate on.")
flags.DEFINE_integer("image_size", 224, "Side of a view in pixels (paper: 224).", lower_bound=8)
flags.DEFINE_integer(
    "channels",
    3,
    "Channels of an image. Files are read as 1: gray, 2: gray and alpha, 3: RGB (paper) or 4: RGB "
    "and alpha; others are those of TFDS's uint8 tensors. Without RGB the colour jitter is of "
    "brightness and contrast alone, and nothing is made gray.",
    lower_bound=1,
)
flags.DEFINE_float(
    "min_crop_area",
    0.08,
    "Smallest part of an image's area that a view shows (paper: 0.08).",
    lower_bound=0.01,
    upper_bound=1.0,
)
flags.DEFINE_enum(
    "augmentation",
    "paper",
    ("paper", "no_grayscale", "no_color", "crop_blur", "crop", "crop_flip"),
    "What is done to a view beside the crop; the other sets are those of figure 3b, of which "
    "crop and crop_blur do not flip either.",
)
flags.DEFINE_string("embed_split", "all", "Images of --task=embed, search and duplicates.")
flags.DEFINE_string(
    "embeddings_file",
    "embeddings.npz",
    "What --task=embed writes, .npz or .parquet; a relative path is below --workdir.",
)
flags.DEFINE_multi_string(
    "query", None, "Of --task=search: an image file to look for; may be given several times."
)
flags.DEFINE_integer(
    "neighbours", 11, "Of --task=search: images to find.", lower_bound=1, upper_bound=1000
)
flags.DEFINE_float(
    "duplicate_similarity",
    0.9,
    "Of --task=duplicates: the least similarity of two near-duplicates (docs/search.md).",
    lower_bound=0.0,
    upper_bound=1.0,
)


@flags.validator("embeddings_file", message="must end in .npz or .parquet")
def _known_format(path):
    return path.endswith((".npz", ".parquet"))
