"""Nearest images and near-duplicates: exact, and by the index where there are many."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from test_cli import TINY, error_of, succeed

from byol_tf import contact_sheet, search
from byol_tf.embed import read_embeddings, write_embeddings
from byol_tf.evaluation import Features


@pytest.fixture(scope="module")
def vectors():
    """2,000 unit vectors in 50 clusters, of no near-duplicates but those that are planted."""
    rng = np.random.default_rng(0)
    found = rng.normal(size=(50, 64))[rng.integers(50, size=2000)] + rng.normal(size=(2000, 64))
    found = found.astype(np.float32)
    search.normalize(found)
    return found


def planted(vectors):
    """Near copies: 3 of row 0 at rows 100 to 102, and 1 of row 7 at row 1000."""
    rng = np.random.default_rng(1)
    vectors = vectors.copy()
    for row, copy in ((0, 100), (0, 101), (0, 102), (7, 1000)):
        vectors[copy] = vectors[row] + rng.normal(0, 0.01, 64)
    search.normalize(vectors)
    return vectors


def test_normalize(vectors):
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    zero = np.zeros((1, 8), np.float32)
    search.normalize(zero)
    assert not zero.any()


def test_spread_tells_copies_from_what_is_merely_alike(monkeypatch):
    """Of embeddings that use one direction of 64, all cosines are near 1; after it only copies'."""
    rng = np.random.default_rng(0)
    given = rng.normal(0, 0.02, (200, 64)) + rng.normal(0, 0.1, (200, 1)) * np.eye(64)[1]
    given = (given + np.eye(64)[0]).astype(np.float32)
    given = np.concatenate([given, given[:20] + rng.normal(0, 0.002, (20, 64)).astype(np.float32)])
    search.normalize(given)
    assert (given @ given.T).min() > 0.8
    whole, parts = given.copy(), given.copy()
    search.spread(whole)
    monkeypatch.setattr(search, "_CHUNK", 50)
    search.spread(parts)
    np.testing.assert_allclose(np.abs(parts @ parts.T), np.abs(whole @ whole.T), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1.0, atol=1e-5)
    groups, nearest, _ = search.near_duplicates(whole, 0.9)
    assert len(groups) == 20 and (nearest[:20] == np.arange(200, 220)).all()


def test_spread_leaves_what_is_all_alike(vectors):
    same = np.repeat(vectors[:1], 5, axis=0)
    search.spread(same)
    np.testing.assert_array_equal(same, np.repeat(vectors[:1], 5, axis=0))


def test_nearest_is_exact(vectors):
    queries = vectors[:5]
    similarities, rows = search.nearest(vectors, queries, 10)
    expected = queries @ vectors.T
    np.testing.assert_array_equal(rows, np.argsort(-expected, axis=1)[:, :10])
    np.testing.assert_allclose(similarities, -np.sort(-expected, axis=1)[:, :10], atol=1e-5)
    assert search.nearest(vectors[:3], queries, 10)[1].shape == (5, 3)


def test_the_index_finds_almost_what_is_nearest(vectors):
    _, exact = search.nearest(vectors, vectors[:200], 10)
    recalls = []
    for probes in (1, 60):
        _, found = search.build_index(vectors, probes).search(vectors[:200], 10)
        recalls.append(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found)]))
    assert recalls[0] < recalls[1] and recalls[1] > 0.9, recalls


@pytest.mark.parametrize("exact", [True, False])
def test_near_duplicates(vectors, exact, monkeypatch):
    if not exact:
        monkeypatch.setattr(search, "_EXACT", 0)
    given = planted(vectors)
    groups, nearest, similarities = search.near_duplicates(given, 0.98)
    assert [group.tolist() for group in groups] == [[0, 100, 101, 102], [7, 1000]]
    assert nearest[7] == 1000 and nearest[1000] == 7 and nearest[100] in (0, 101, 102)
    assert set(np.flatnonzero(nearest >= 0)) == {0, 100, 101, 102, 7, 1000}
    np.testing.assert_allclose(similarities[7], given[7] @ given[1000], atol=1e-6)
    assert similarities[[0, 100]].min() > 0.98 and similarities[1] == 0


def test_no_near_duplicates(vectors):
    groups, nearest, _ = search.near_duplicates(vectors, 0.999)
    assert groups == [] and (nearest == -1).all()
    assert search.near_duplicates(vectors[:1], 0.0)[0] == []


def test_more_copies_than_neighbours_are_one_group(vectors):
    """As of a placeholder that stands for a thousand missing images."""
    same = np.concatenate([vectors[:3], np.repeat(vectors[3:4], 300, axis=0)])
    groups, nearest, similarities = search.near_duplicates(same, 0.99)
    assert [group.tolist() for group in groups] == [list(range(3, 303))]
    assert (nearest[3:] != np.arange(3, 303)).all() and similarities[3:].min() > 0.999


@pytest.mark.parametrize("name", ["e.npz", "e.parquet"])
def test_embeddings_are_read_as_written(tmp_path, name):
    features = Features(
        np.arange(6, dtype=np.float32).reshape(3, 2), np.full(3, -1), ["a", "ü", "c"]
    )
    for origin in ({"weights": "1f", "image_size": 32}, None):
        write_embeddings(features, tmp_path / name, origin=origin)
        vectors, names, found = read_embeddings(tmp_path / name)
        np.testing.assert_array_equal(vectors, features.vectors)
        assert names == features.names and found == origin
        vectors /= 2  # they can be written to


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_thumbnails_of_any_channels(channels):
    image = np.arange(channels, dtype=np.uint8) + np.zeros((400, 300, 1), np.uint8)
    small = contact_sheet.thumbnail(image)
    assert small.size == (120, 160)
    assert small.convert("RGB").getpixel((5, 5)) == ((0, 1, 2) if channels > 2 else (0, 0, 0))


def test_contact_sheet():
    images = [np.full((40, 90, 3), value, np.uint8) for value in (0, 255)]
    cells = [(contact_sheet.thumbnail(images[0]), ["0.5", "a/very/" * 20 + "long name"], True)]
    cells += [(contact_sheet.thumbnail(images[1]), ["0.4", "名"], False)] * 7
    sheet = Image.open(io.BytesIO(contact_sheet.contact_sheet([cells, cells[:1]])))
    assert sheet.format == "JPEG" and sheet.width > 6 * 160 and sheet.height > 3 * 160
    Image.open(io.BytesIO(contact_sheet.contact_sheet([cells[:1]] * 500))).load()


@pytest.fixture(scope="module")
def run(main, tmp_path_factory):
    """A trained workdir and its images: 12 noises in two folders, one twice, once re-encoded."""
    folder = tmp_path_factory.mktemp("search")
    rng = np.random.default_rng(0)
    for i in range(12):
        path = folder / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(blocks).resize((32, 32), Image.NEAREST).save(path)
    shutil.copy(folder / "images/a/0.png", folder / "images/b/copy.png")
    Image.open(folder / "images/a/2.png").save(folder / "images/b/again.jpg", quality=95)
    flags = [*TINY, f"--data_dir={folder / 'images'}", f"--workdir={folder / 'run'}"]
    succeed(main(*flags, "--train_split=all", "--eval_split=all", "--task=pretrain"))
    return folder


def test_search(main, run, tmp_path):
    workdir, query = run / "run", tmp_path / "mine.png"
    shutil.copy(run / "images/a/0.png", query)
    flags = [f"--workdir={workdir}", "--task=search", "--neighbours=4"]
    stdout, _ = succeed(main(*flags, f"--query={query}", f"--query={run / 'images/b/1.png'}"))
    assert "14 embeddings written to" in stdout
    first, second = json.loads((workdir / "search.json").read_text())
    assert first["query"] == str(query) and len(first["nearest"]) == 4
    assert {found["name"] for found in first["nearest"][:2]} == {"a/0.png", "b/copy.png"}
    assert first["nearest"][0]["similarity"] == pytest.approx(1.0, abs=1e-4)
    assert second["nearest"][0]["name"] == "b/1.png"
    assert f"nearest to {query}:" in stdout and "1.0000  a/0.png" in stdout
    assert Image.open(workdir / "search.jpg").width > 4 * 160
    # The flags of one search are not those of the run.
    assert "query" not in (workdir / "flags.txt").read_text()

    before = (workdir / "embeddings.npz").stat().st_mtime_ns
    stdout, _ = succeed(main(*flags, f"--query={query}"))
    assert "using the 14 embeddings of" in stdout
    assert json.loads((workdir / "search.json").read_text()) == [first]
    assert (workdir / "embeddings.npz").stat().st_mtime_ns == before


def test_duplicates(main, run):
    stdout, _ = succeed(
        main(
            *(f"--workdir={run / 'run'}", "--task=duplicates", "--embeddings_file=e.parquet"),
            "--duplicate_similarity=0.99999",
        )
    )
    assert "groups of near-duplicates" in stdout and "duplicates.jpg" in stdout
    rows = list(csv.DictReader((run / "run" / "duplicates.csv").open()))
    of = {row["name"]: row for row in rows}
    assert of["a/0.png"]["nearest"] == "b/copy.png" and of["b/copy.png"]["nearest"] == "a/0.png"
    assert of["a/0.png"]["group"] == of["b/copy.png"]["group"]
    assert float(of["a/0.png"]["similarity"]) == pytest.approx(1.0, abs=1e-4)
    assert len(rows) < 14
    Image.open(run / "run" / "duplicates.jpg").load()


def test_no_duplicates_leave_no_picture_of_others(main, run, tmp_path):
    shutil.copy(run / "images/a/0.png", tmp_path)
    shown = run / "run" / "duplicates.jpg"
    shown.write_bytes(b"of another limit")
    flags = [f"--workdir={run / 'run'}", "--task=duplicates", "--embeddings_file=one.npz"]
    stdout, _ = succeed(main(*flags, f"--data_dir={tmp_path}"))
    assert "0 groups of near-duplicates, 0 of 1 images" in stdout and not shown.exists()


@pytest.mark.slow
def test_stale_embeddings_are_made_anew(main, run, tmp_path):
    """Of other images, of other weights, and a file that is broken."""
    images, file = tmp_path / "images", run / "run" / "stale.npz"
    shutil.copytree(run / "images", images)
    flags = [f"--workdir={run / 'run'}", f"--data_dir={images}", "--embeddings_file=stale.npz"]
    flags += ["--task=search", f"--query={images / 'a/0.png'}"]
    file.write_bytes(b"PK no archive")
    assert "stale.npz cannot be read" in succeed(main(*flags))[1]
    (images / "b" / "3.png").rename(images / "b" / "renamed.png")
    expected = "stale.npz is of other images: embedding the images anew"
    assert expected in succeed(main(*flags))[1]
    vectors, names, origin = read_embeddings(file)
    assert "b/renamed.png" in names
    features = Features(0 * vectors, np.full(len(names), -1), names)
    write_embeddings(features, file, origin={**origin, "weights": "of before"})
    assert "stale.npz is of other weights" in succeed(main(*flags))[1]
    np.testing.assert_allclose(read_embeddings(file)[0], vectors, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--task=search needs --query"]),
        (["--query={text}"], ["--query={text}", "not a JPEG, PNG, BMP or GIF image"]),
    ],
)
def test_wrong_queries(main, run, tmp_path, flags, words):
    text = tmp_path / "text.png"
    text.write_text("no image")
    given = [flag.format(text=text) for flag in flags]
    line = error_of(main(f"--workdir={run / 'run'}", "--task=search", *given))
    assert all(word.format(text=text) in line for word in words), line
