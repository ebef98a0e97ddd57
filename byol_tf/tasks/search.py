"""What the embeddings of a data set find: the nearest images to others, and near-duplicates."""

import csv
import io
import json
import pathlib

import numpy as np
import tensorflow as tf
from absl import flags

from byol_tf import evaluation, workdir
from byol_tf import search as index
from byol_tf.contact_sheet import contact_sheet, thumbnail
from byol_tf.data import decode, image_folder
from byol_tf.data.source import Source
from byol_tf.errors import UserError
from byol_tf.tasks import embed, run

FLAGS = flags.FLAGS
_SHOWN_GROUPS, _SHOWN_IMAGES = 20, 12  # of near-duplicates, and of a group, on the contact sheet


def check_queries():
    """Raises a `UserError` if --query is missing or not an image file that can be read."""
    if not FLAGS.query:
        raise UserError("--task=search needs --query=IMAGE.")
    if FLAGS.channels > decode.MAX_CHANNELS:
        raise UserError(f"--task=search: no image file has --channels={FLAGS.channels}.")
    for path in FLAGS.query:
        fault = image_folder.fault_of(pathlib.Path(path).expanduser())
        if fault:
            raise UserError(f"--query={path}: {fault}: give a JPEG, PNG, BMP or GIF file.")


def search():
    """Writes which images of --embed_split are the nearest to each --query, and shows them."""
    encoder = run.trained_encoder()
    vectors, names = embed.up_to_date(encoder)
    queries = _queries()
    query_vectors = evaluation.extract_features(
        encoder, queries, image_size=FLAGS.image_size
    ).vectors
    for each in (vectors, query_vectors):
        index.normalize(each)
    similarities, rows = index.nearest(vectors, query_vectors, FLAGS.neighbours)
    results = [
        {
            "query": query,
            "nearest": [
                {"name": names[row], "similarity": round(float(similarity), 4)}
                for row, similarity in zip(*found)
            ],
        }
        for query, *found in zip(FLAGS.query, rows, similarities)
    ]
    for result in results:
        print(f"nearest to {result['query']}:")
        for found in result["nearest"]:
            print(f"  {found['similarity']:.4f}  {found['name']}")
    workdir.write_text(run.folder() / "search.json", json.dumps(results, indent=2) + "\n")
    shown, of_queries = _thumbnails(run.source(FLAGS.embed_split), rows), _thumbnails(queries)
    blocks = [
        [(of_queries[i], ["query", result["query"]], True)]
        + [
            (shown[row], [f"{found['similarity']:.4f}", found["name"]], False)
            for row, found in zip(rows[i], result["nearest"])
        ]
        for i, result in enumerate(results)
    ]
    _write_sheet("search.jpg", blocks)


def duplicates():
    """Writes the groups of near-duplicates of --embed_split, and shows the largest."""
    vectors, names = embed.up_to_date(run.trained_encoder())
    index.normalize(vectors)
    index.spread(vectors)
    groups, nearest, similarities = index.near_duplicates(vectors, FLAGS.duplicate_similarity)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["group", "name", "nearest", "similarity"])
    for number, group in enumerate(groups, 1):
        for row in group:
            similarity = f"{similarities[row]:.4f}"
            writer.writerow([number, names[row], names[nearest[row]], similarity])
    workdir.write_text(run.folder() / "duplicates.csv", table.getvalue())
    count = sum(map(len, groups))
    print(f"{len(groups)} groups of near-duplicates, {count} of {len(names)} images")
    print(f"listed in {run.folder() / 'duplicates.csv'}")
    groups = [group[:_SHOWN_IMAGES] for group in groups[:_SHOWN_GROUPS]]
    if not groups:
        (run.folder() / "duplicates.jpg").unlink(missing_ok=True)  # of another limit
        return
    shown = _thumbnails(run.source(FLAGS.embed_split), np.concatenate(groups))
    blocks = [
        [(shown[row], [f"group {i}: {similarities[row]:.4f}", names[row]], False) for row in group]
        for i, group in enumerate(groups, 1)
    ]
    _write_sheet("duplicates.jpg", blocks)


def _queries():
    """The images of --query as a `Source`."""
    files = [pathlib.Path(path).expanduser().read_bytes() for path in FLAGS.query]
    slices = {
        "index": tf.range(len(files), dtype=tf.int64),
        "image": tf.constant(files),
        "label": tf.fill([len(files)], tf.constant(-1, tf.int64)),
        "name": tf.constant([path.encode() for path in FLAGS.query]),
    }
    records = tf.data.Dataset.from_tensor_slices(slices)
    return Source(records, len(files), None, None, channels=FLAGS.channels)


def _thumbnails(source, rows=None):
    """A dict from the rows, all where none are given, to the thumbnails of their images."""
    rows = tf.constant(np.unique(range(source.num_examples) if rows is None else rows), tf.int64)
    records = source.dataset.filter(lambda record: tf.reduce_any(record["index"] == rows))
    examples = records.take(len(rows)).map(source.example)
    return {
        int(example["index"]): thumbnail(decode.decode(example["image"], source.channels).numpy())
        for example in examples
    }


def _write_sheet(name, blocks):
    path = run.folder() / name
    workdir.write_bytes(path, contact_sheet(blocks))
    print(f"shown in {path}")
