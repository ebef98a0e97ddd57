"""The nearest of many embeddings, and the near-duplicates among them, by Faiss.

Similar means of great cosine similarity: all embeddings here are unit vectors. docs/search.md tells
what a million of them take.
"""

import numpy as np

_NEIGHBOURS = 16  # of each image, that are looked at for near-duplicates
# Above so many vectors all pairs take minutes: Faiss's inverted lists are searched instead.
_EXACT = 50_000
_LISTS_PER_ROOT = 4  # lists for the square root of the number of vectors: Faiss's advice
_SAMPLES_PER_LIST = 40  # that the lists' centres are learned from: Faiss's least
_PROBES = 8  # lists that are searched for each vector
_ROUNDING = 1e-3  # of a similarity in half precision, at most
_CHUNK = 2**16
_ALIKE = 1e-9  # total variance of unit vectors that is rounding


def normalize(vectors):
    """Makes vectors, float32 [N, D], unit vectors in place, but those that are zero."""
    import faiss  # slow to import

    faiss.normalize_L2(vectors)


def spread(vectors):
    """Turns unit vectors into ones in which what many have in common counts less, in place.

    An encoder that has not learned for long uses few directions, in which images that have
    nothing to do with each other differ by little: their cosines are near 1. So the vectors are
    centred and, in each principal direction, divided by the square root of its variance plus
    the mean variance: a whitening that leaves the smallest differences small, as those of copies
    are. Of vectors that are all alike nothing is changed.

    Args: vectors: float32 [N, D], unit vectors; unit vectors again afterwards.
    """
    mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    covariance = np.zeros([vectors.shape[1]] * 2)
    for chunk in _chunks(vectors):
        covariance += (chunk - mean).T @ (chunk - mean) / len(vectors)
    variances, directions = np.linalg.eigh(covariance)
    if variances.sum() < _ALIKE:
        return
    scales = np.sqrt(np.maximum(variances, 0) + variances.mean())
    matrix = (directions / scales).astype(np.float32)
    for chunk in _chunks(vectors):
        chunk[:] = (chunk - mean) @ matrix
    normalize(vectors)


def nearest(vectors, queries, k):
    """The k nearest vectors to each query, exactly.

    Of a few queries this is one pass over the vectors: faster than to build, or even to read, an
    index that would answer each of them sooner.

    Args:
      vectors: float32 [N, D], unit vectors.
      queries: float32 [Q, D], unit vectors.
      k: int; N where there are fewer.

    Returns: cosine similarities, float32 [Q, k], the greatest first, and rows of `vectors`,
      int64 [Q, k].
    """
    import faiss

    k = min(k, len(vectors))
    return faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)


def build_index(vectors, probes=_PROBES):
    """A Faiss index for many queries: inverted lists of vectors in half precision.

    Args: vectors: float32 [N, D], unit vectors. probes: lists to search for a query.

    Returns: a `faiss.Index`, whose `search(queries, k)` is as `nearest`.
    """
    import faiss

    lists = max(1, round(_LISTS_PER_ROOT * len(vectors) ** 0.5))
    metric = faiss.METRIC_INNER_PRODUCT
    index = faiss.index_factory(vectors.shape[1], f"IVF{lists},SQfp16", metric)
    index.cp.max_points_per_centroid = _SAMPLES_PER_LIST
    rows = np.random.default_rng(0).choice(
        len(vectors), min(len(vectors), lists * _SAMPLES_PER_LIST), replace=False
    )
    index.train(vectors[np.sort(rows)])
    index.add(vectors)
    index.nprobe = probes
    return index


def near_duplicates(vectors, similarity):
    """Groups of images of which each is near to another of its group.

    Exact for up to 50,000 vectors; above, a few pairs may be missed (docs/search.md).

    Args:
      vectors: float32 [N, D], unit vectors, best after `spread`.
      similarity: the least cosine similarity of two near-duplicates.

    Returns:
      groups: a list of int64 arrays, rows of `vectors`: the largest first.
      nearest: int64 [N], which other row is nearest to each row; -1 outside of the groups.
      similarities: float32 [N], how near that is; 0 outside of the groups.
    """
    from scipy import sparse

    count = len(vectors)
    rows, others, similarities = _near_pairs(vectors, similarity)
    graph = sparse.coo_array((np.ones(len(rows), bool), (rows, others)), (count, count))
    _, component = sparse.csgraph.connected_components(graph, directed=False)
    order = np.argsort(component, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(component[order])) + 1)
    groups = sorted((group for group in groups if len(group) > 1), key=len, reverse=True)
    # From the least similar to the most: of several assignments to one row the last holds.
    order = np.argsort(similarities, kind="stable")
    rows, others, similarities = rows[order], others[order], similarities[order]
    best, best_similarity = np.full(count, -1), np.zeros(count, np.float32)
    best[rows], best_similarity[rows] = others, similarities
    return groups, best, best_similarity


def _chunks(vectors):
    return (vectors[i : i + _CHUNK] for i in range(0, len(vectors), _CHUNK))


def _near_pairs(vectors, similarity):
    """Rows, other rows and similarities of the pairs that are near, each pair from both sides."""
    import faiss

    k = min(_NEIGHBOURS + 1, len(vectors))  # one is the vector itself
    if len(vectors) <= _EXACT:
        found, neighbours = faiss.knn(vectors, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
    else:
        found, neighbours = build_index(vectors).search(vectors, k)
    own = np.arange(len(vectors))[:, np.newaxis]
    rows, columns = np.nonzero((found >= similarity - _ROUNDING) & (neighbours != own))
    others = neighbours[rows, columns]
    similarities = np.concatenate(
        [
            np.einsum("nd,nd->n", vectors[rows[i : i + _CHUNK]], vectors[others[i : i + _CHUNK]])
            for i in range(0, len(rows), _CHUNK)
        ]
        or [np.zeros(0, np.float32)]
    )
    near = similarities >= similarity
    rows, others, similarities = rows[near], others[near], similarities[near]
    return (
        np.concatenate([rows, others]),
        np.concatenate([others, rows]),
        np.concatenate([similarities, similarities]),
    )
