"""How alike copies of photographs are to an encoder: `python -m benchmarks.copies`.

It says which `--duplicate_similarity` tells them from photographs that are different.
"""

import io
import pathlib

import numpy as np
from absl import flags
from PIL import Image, ImageOps

from benchmarks import measure

FLAGS = flags.FLAGS
measure.define_flags()
flags.DEFINE_string("photos", None, "Folder of photographs in class folders.", required=True)
flags.DEFINE_string("model", None, "Folder of the exported encoder.", required=True)

PAGE = measure.ROOT / "docs" / "search.md"
LIMITS = (0.7, 0.8, 0.9, 0.95)  # of --duplicate_similarity
_SHARE = 5  # one photograph in so many has a copy in the folder
_BATCH = 50


def resized(image, share):
    return image.resize([max(1, round(share * side)) for side in image.size])


def middle(image, share):
    """The middle of an image: this share of its width and height."""
    left, top = (round((1 - share) / 2 * side) for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


COPIES = {  # an image, and with what quality it is written as JPEG
    "JPEG of quality 75": lambda image: (image, 75),
    "JPEG of quality 30": lambda image: (image, 30),
    "half the width and height": lambda image: (resized(image, 0.5), 95),
    "cut to 95 % of width and height": lambda image: (middle(image, 0.95), 95),
    "cut to 90 %": lambda image: (middle(image, 0.9), 95),
    "cut to 80 %": lambda image: (middle(image, 0.8), 95),
    "mirrored": lambda image: (ImageOps.mirror(image), 95),
}


def main():
    paths = sorted(pathlib.Path(FLAGS.photos).glob("*/*"))
    if not paths:
        raise SystemExit(f"error: --photos={FLAGS.photos}: no class folders with photographs.")
    embed = encoder()
    originals = embed([path.read_bytes() for path in paths])
    results = {}
    for name, make in COPIES.items():
        copies = embed([jpeg(*make(Image.open(path).convert("RGB"))) for path in paths])
        results[name] = figures(
            np.concatenate([to_copies(originals, copies, i) for i in range(_SHARE)])
        )
    results["*the nearest different photograph*"] = figures(to_others(spread(originals)))
    results["*the same, by the cosine of the embeddings*"] = figures(to_others(originals))
    record = {**measure.origin("copies"), "photographs": len(paths), "results": results}
    measure.publish(PAGE, "copies", record, table(record))


def to_copies(originals, copies, first):
    """Of a folder where a part of the photographs, from the `first` on, have copies: how near."""
    part = slice(first, None, _SHARE)
    vectors = spread(np.concatenate([originals, copies[part]]))
    return np.einsum("nd,nd->n", vectors[: len(originals)][part], vectors[len(originals) :])


def to_others(vectors):
    """How near the nearest other of each is."""
    similarities = vectors @ vectors.T
    np.fill_diagonal(similarities, -1)
    return similarities.max(1)


def spread(vectors):
    """As --task=duplicates compares them."""
    from byol_tf import search

    vectors = vectors.copy()
    search.spread(vectors)
    return vectors


def encoder():
    """Function from image files, a list of bytes, to unit vectors, float32 [N, D]."""
    import tensorflow as tf

    from byol_tf import evaluation

    if not tf.saved_model.contains_saved_model(FLAGS.model):
        raise SystemExit(f"error: --model={FLAGS.model}: no SavedModel there.")
    signature = tf.saved_model.load(FLAGS.model).signatures["serving_bytes"]

    def embed(files):
        parts = [tf.constant(files[i : i + _BATCH]) for i in range(0, len(files), _BATCH)]
        vectors = [signature(image_bytes=part)["embedding"].numpy() for part in parts]
        return evaluation.unit(np.concatenate(vectors))

    return embed


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def figures(similarities):
    """The least, median and greatest, and the shares that are at least as large as the limits."""
    return {
        "range": np.percentile(similarities, (0, 50, 100)).tolist(),
        "found": [float(np.mean(similarities >= limit)) for limit in LIMITS],
    }


def table(record):
    lines = [
        f"| of {record['photographs']} photographs | least | median | greatest | "
        + " | ".join(f"at least {limit}, %" for limit in LIMITS)
        + " |",
        "|---" * (4 + len(LIMITS)) + "|",
    ]
    for name, row in record["results"].items():
        similarities = " | ".join(f"{value:.3f}" for value in row["range"])
        shares = " | ".join(f"{100 * share:.0f}" for share in row["found"])
        lines.append(f"| {name} | {similarities} | {shares} |")
    return "\n".join([*lines, "", measure.footer(record)])


if __name__ == "__main__":
    measure.run(main)
