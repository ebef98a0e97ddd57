"""Embeddings in a file that NumPy or any table tool reads."""

import json
import pathlib
import zipfile

import numpy as np

from byol_tf.whole import whole_file

FORMATS = (".npz", ".parquet")


def write_embeddings(features, path, class_names=None, origin=None):
    """Writes one row an image: its embedding, name and label.

    An .npz file holds "embedding", float32 [N, D], "name", string [N], and, where there are
    labels, "label", int64 [N], and "class_names". A .parquet file has the columns "name",
    "embedding" (a list of D floats), "label" and "class_name" (null where there is none).
    "origin", a JSON string, is an array of the one and metadata of the other.

    Args:
      features: `byol_tf.evaluation.Features`.
      path: ends in .npz or .parquet.
      class_names: names of the labels, or None.
      origin: a dict for JSON, which tells of what encoder and images the embeddings are, or None.

    Raises:
      ValueError: for another ending.
      OSError: if the file cannot be written; what was there is still there then.
    """
    path = pathlib.Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: must end in {' or '.join(FORMATS)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write = _write_npz if path.suffix == ".npz" else _write_parquet
    with whole_file(path) as unfinished:
        write(features, unfinished, class_names, origin)


def read_embeddings(path):
    """Reads a file of `write_embeddings`.

    Returns: embeddings, float32 [N, D]; names, a list of N strings; the origin, or None.

    Raises:
      OSError, ValueError, KeyError, zipfile.BadZipFile: if it cannot be read.
    """
    path = pathlib.Path(path)
    if path.suffix == ".npz":
        with np.load(path) as file:
            origin = json.loads(str(file["origin"])) if "origin" in file else None
            return file["embedding"], file["name"].tolist(), origin
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path, columns=["name", "embedding"])
    vectors = (
        table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False, writable=True)
    )
    origin = (table.schema.metadata or {}).get(b"origin")
    return (
        vectors.reshape(table.num_rows, -1),
        table["name"].to_pylist(),
        json.loads(origin) if origin else None,
    )


def _write_npz(features, path, class_names, origin):
    arrays = {"embedding": features.vectors, "name": np.array(features.names)}
    if class_names is not None:
        arrays.update(label=features.labels, class_names=np.array(class_names))
    if origin is not None:
        arrays["origin"] = np.array(json.dumps(origin))
    # As numpy.savez, which leaves its file open where the disk is full.
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _write_parquet(features, path, class_names, origin):
    import pyarrow
    import pyarrow.parquet

    size = features.vectors.shape[1]
    flat = pyarrow.array(features.vectors.reshape(-1))
    labels = [int(label) if label >= 0 else None for label in features.labels]
    names = [class_names[label] if label is not None else None for label in labels]
    table = pyarrow.table(
        {
            "name": pyarrow.array(features.names, pyarrow.string()),
            "embedding": pyarrow.FixedSizeListArray.from_arrays(flat, size),
            "label": pyarrow.array(labels, pyarrow.int64()),
            "class_name": pyarrow.array(names, pyarrow.string()),
        }
    )
    if origin is not None:
        table = table.replace_schema_metadata({"origin": json.dumps(origin)})
    pyarrow.parquet.write_table(table, path)
