"""Search among a million embeddings: `python -m benchmarks.search`, 2 GB of disk and 6 of memory.

The vectors are drawn: clusters in few dimensions, spread over 512 and cut at 0, as embeddings of
a ResNet are. One in a hundred is a near copy of another. Each index has a process of its own.
"""

import functools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import flags

from benchmarks import measure, worker

FLAGS = flags.FLAGS
measure.define_flags()
flags.DEFINE_integer("count", 1_000_000, "Of embeddings.", lower_bound=1000)
flags.DEFINE_integer("dimensions", 512, "Of an embedding.", lower_bound=16)
flags.DEFINE_bool("graph", False, "Measure a graph (HNSW) as well, which takes long to build.")
flags.DEFINE_string("subject", None, "What this process measures; none: starts one for each.")
flags.DEFINE_string("folder", None, "Of --subject: where the vectors are.")

PAGE = measure.ROOT / "docs" / "search.md"
PROBES = (1, 8, 64)
K = 10
_QUERIES, _CHUNK = 1000, 50_000
_COPY_NOISE = 0.01  # about 0.98 of similarity


def make_vectors(count, dimensions):
    """Unit vectors, float32, and which rows are near copies of which: (vectors, rows, originals)."""
    from byol_tf import search

    rng = np.random.default_rng(0)
    latent = min(64, dimensions // 4)
    centres = rng.normal(size=(1000, latent)).astype(np.float32)
    spread = rng.normal(size=(latent, dimensions)).astype(np.float32) / latent**0.5
    vectors = np.empty((count, dimensions), np.float32)
    for start in range(0, count, _CHUNK):
        part = vectors[start : start + _CHUNK]
        inside = rng.normal(size=(len(part), latent)).astype(np.float32)
        np.maximum((centres[rng.integers(1000, size=len(part))] + inside) @ spread, 0, out=part)
    search.normalize(vectors)
    rows, originals = rng.permutation(count)[: 2 * (count // 100)].reshape(2, -1)
    noise = rng.normal(0, _COPY_NOISE, (len(rows), dimensions)).astype(np.float32)
    vectors[rows] = vectors[originals] + noise
    search.normalize(vectors)
    return vectors, rows, originals


def main():
    if FLAGS.subject:
        print(json.dumps(measure_subject(FLAGS.subject, pathlib.Path(FLAGS.folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own as well: at its start a child's peak memory is its parent's.
        in_process("prepare", folder)
        subjects = ["exact", "lists", *(["graph"] if FLAGS.graph else []), "tasks"]
        found = {subject: in_process(subject, folder) for subject in subjects}
    origin = measure.origin("search", packages=["faiss-cpu"])
    for name, rows, table in (
        ("duplicates", found.pop("tasks"), tasks_table),
        (
            "search",
            {name: row for rows in found.values() for name, row in rows.items()},
            index_table,
        ),
    ):
        record = {**origin, "count": FLAGS.count, "dimensions": FLAGS.dimensions, "results": rows}
        measure.publish(PAGE, name, record, table(record))


def prepare(folder):
    """Writes vectors, queries and what is nearest to these."""
    from byol_tf import search
    from byol_tf.embed import write_embeddings
    from byol_tf.evaluation import Features

    vectors, rows, originals = make_vectors(FLAGS.count + _QUERIES, FLAGS.dimensions)
    inside = (rows < FLAGS.count) & (originals < FLAGS.count)
    queries, vectors = vectors[FLAGS.count :], vectors[: FLAGS.count]
    names = [f"images/{i:08}.jpg" for i in range(len(vectors))]
    features = Features(vectors, np.full(len(vectors), -1), names)
    write_embeddings(features, folder / "embeddings.npz", origin={})
    _, nearest = search.nearest(vectors, queries, K)
    np.savez(
        folder / "asked.npz",
        **{"queries": queries, "nearest": nearest},
        **{"rows": rows[inside], "originals": originals[inside]},
    )


def in_process(subject, folder):
    sizes = [f"--count={FLAGS.count}", f"--dimensions={FLAGS.dimensions}"]
    command = ["-m", "benchmarks.search", *sizes, f"--subject={subject}", f"--folder={folder}"]
    done = subprocess.run(
        [sys.executable, *command], cwd=measure.ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    print(subject, done.stdout.strip(), flush=True)
    return json.loads(done.stdout)


def measure_subject(subject, folder):
    """Rows of the table, by their names; of "prepare" nothing."""
    if subject == "prepare":
        return prepare(folder)
    asked = np.load(folder / "asked.npz")
    if subject == "tasks":
        return measure_tasks(folder, asked)
    with np.load(folder / "embeddings.npz") as file:
        vectors = file["embedding"]
    before = worker.peak_mb()
    begin = time.perf_counter()
    asks = build(subject, vectors)
    built = {"built": time.perf_counter() - begin, "memory": worker.peak_mb() - before}
    return {name: built | measure_queries(ask, asked) for name, ask in asks.items()}


def build(subject, vectors):
    """Functions from queries to the rows that an index finds, by what they are."""
    from byol_tf import search

    if subject == "exact":
        ask = functools.partial(search.nearest, vectors, k=K)
        return {"exact, no index (`faiss.knn`)": lambda queries: ask(queries)[1]}
    if subject == "lists":
        index = search.build_index(vectors)

        def with_probes(probes, queries):
            index.nprobe = probes
            return index.search(queries, K)[1]

        return {
            f"inverted lists, {probes} of {index.nlist} searched": functools.partial(
                with_probes, probes
            )
            for probes in PROBES
        }
    import faiss

    index = faiss.index_factory(vectors.shape[1], "HNSW32_SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efSearch = 64
    index.train(vectors[:_CHUNK])
    index.add(vectors)
    return {"graph (HNSW) of 32 links": lambda queries: index.search(queries, K)[1]}


def measure_queries(ask, asked):
    queries = asked["queries"]
    ask(queries[:1])
    single = statistics.median(_seconds(ask, queries[i : i + 1]) for i in range(20))
    begin = time.perf_counter()
    found = ask(queries)
    together = time.perf_counter() - begin
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), asked["nearest"].tolist())]
    recall = float(np.mean(hits)) / K
    return {"single": single, "together": len(queries) / together, "recall": recall}


def measure_tasks(folder, asked):
    """What --task=search and --task=duplicates do with the file of embeddings."""
    from byol_tf import search
    from byol_tf.embed import read_embeddings

    seconds = {}
    begin = time.perf_counter()
    vectors, _, _ = read_embeddings(folder / "embeddings.npz")
    search.normalize(vectors)
    seconds["embeddings read from .npz"] = time.perf_counter() - begin
    begin = time.perf_counter()
    search.nearest(vectors, asked["queries"][:1], 11)
    seconds["the 11 nearest to one image"] = time.perf_counter() - begin
    begin = time.perf_counter()
    search.spread(vectors)
    groups, _, _ = search.near_duplicates(vectors, 0.9)
    seconds["near-duplicates of 0.9 and more"] = time.perf_counter() - begin
    group_of = np.full(len(vectors), -1)
    for number, group in enumerate(groups):
        group_of[group] = number
    of_copies, of_originals = group_of[asked["rows"]], group_of[asked["originals"]]
    found = float(np.mean((of_copies == of_originals) & (of_copies >= 0)))
    return {"seconds": seconds, "found": found, "groups": len(groups), "mb": worker.peak_mb()}


def _seconds(ask, queries):
    begin = time.perf_counter()
    ask(queries)
    return time.perf_counter() - begin


def index_table(record):
    lines = [
        f"| {record['count']:,} embeddings of {record['dimensions']} | built in, s | memory beside the "
        f"vectors, MB | one query, ms | queries/s, 1,000 at a time | recall@{K} |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in record["results"].items():
        lines.append(
            f"| {name} | {row['built']:.0f} | {row['memory']:.0f} | {1000 * row['single']:.1f} | "
            f"{row['together']:.0f} | {row['recall']:.3f} |"
        )
    return "\n".join([*lines, "", measure.footer(record)])


def tasks_table(record):
    found = record["results"]
    head = f"| {record['count']:,} embeddings of {record['dimensions']} | seconds |"
    lines = [head, "|---|---|"]
    lines += [f"| {what} | {seconds:.1f} |" for what, seconds in found["seconds"].items()]
    share = f"{100 * found['found']:.2f} % of the planted copies found, in {found['groups']} groups"
    share += f"; {found['mb']:.0f} MB of memory at most, the vectors included."
    return "\n".join([*lines, "", share, "", measure.footer(record)])


if __name__ == "__main__":
    measure.run(main)
