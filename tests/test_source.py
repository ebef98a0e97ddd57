"""Sources: folders of images and TFDS data sets."""

import io
import json
import os
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from byol_tf.data import decode, image_folder, source
from byol_tf.errors import UserError


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch):
    """Keeps the cache of checked files out of the user's home."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture
def warnings(monkeypatch):
    """What is logged as a warning."""
    lines = []
    monkeypatch.setattr(logging, "warning", lambda line, *values: lines.append(line % values))
    return lines


def encoded(seed=0, kind="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 15, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write(root, *names, content=None):
    """Writes images, each different and in the format of its extension, or else `content`."""
    kinds = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".gif": "GIF"}
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = kinds.get(path.suffix.lower(), "JPEG")
        path.write_bytes(encoded(seed, kind) if content is None else content)


def examples(loaded):
    found = list(loaded.dataset.map(loaded.example).as_numpy_iterator())
    assert len(found) == loaded.num_examples
    assert [example["index"] for example in found] == list(range(len(found)))
    return found


def names(loaded):
    return [example["name"].decode() for example in examples(loaded)]


def load(root, split="all"):
    return source.load_source("image_folder", split, str(root))


def error_of(*arguments):
    """The message of the UserError, which must be one line."""
    with pytest.raises(UserError) as caught:
        source.load_source(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_folder_with_classes(tmp_path):
    write(tmp_path, "dog/b.PNG", "cat/deep/er/a.jpg", "dog/a.JPEG", "cat/c.bmp", "emu/z.gif")
    write(tmp_path, "dog/.hidden.jpg", "dog/readme.txt", ".git/a.jpg", "cat/.DS_Store")
    loaded = load(tmp_path)
    assert loaded.class_names == ("cat", "dog", "emu")
    assert loaded.image_shape is None
    assert loaded.num_examples == 5
    assert [(e["name"].decode(), e["label"]) for e in examples(loaded)] == [
        ("cat/c.bmp", 0),
        ("cat/deep/er/a.jpg", 0),
        ("dog/a.JPEG", 1),
        ("dog/b.PNG", 1),
        ("emu/z.gif", 2),
    ]
    for example in examples(loaded):
        path = tmp_path / example["name"].decode()
        assert example["image"] == path.read_bytes()
        assert decode.decode(example["image"]).shape == (12, 15, 3)


@pytest.mark.parametrize(
    "files", [["a.jpg", "b.jpg"], ["one/a.jpg", "one/b.jpg"], ["cat/a.jpg", "dog/b.jpg", "c.jpg"]]
)
def test_folder_without_classes(tmp_path, monkeypatch, files):
    """A file beside folders that may be classes is told of."""
    warned = []
    monkeypatch.setattr(image_folder.logging, "log_first_n", lambda *args: warned.append(args))
    write(tmp_path, *files)
    loaded = load(tmp_path)
    assert loaded.class_names is None
    assert [args[3] for args in warned] == (["c.jpg"] if "dog/b.jpg" in files else [])
    assert [example["label"] for example in examples(loaded)] == [-1] * len(files)
    assert names(loaded) == sorted(files)


def test_split_folders_share_their_classes(tmp_path):
    write(tmp_path, "train/cat/a.jpg", "train/emu/b.jpg", "val/dog/c.jpg", "val/emu/d.jpg")
    train, validation = load(tmp_path, "train"), load(tmp_path, "validation")
    assert train.class_names == validation.class_names == ("cat", "dog", "emu")
    assert [(e["name"], e["label"]) for e in examples(train)] == [
        (b"train/cat/a.jpg", 0),
        (b"train/emu/b.jpg", 2),
    ]
    assert [e["label"] for e in examples(validation)] == [1, 2]
    assert names(load(tmp_path, "val")) == names(validation)
    assert len(names(load(tmp_path, "all"))) == 4
    assert "no split 'test'; there are train, validation, all" in error_of(
        "image_folder", "test", tmp_path
    )


def test_one_split_folder_alone(tmp_path):
    write(tmp_path, "train/cat/a.jpg", "train/dog/b.jpg")
    assert load(tmp_path, "train").num_examples == 2
    assert "no split 'test'; there are train, all" in error_of("image_folder", "test", tmp_path)


def test_a_class_called_like_a_split_is_not_guessed_at(tmp_path):
    write(tmp_path, "car/a.jpg", "train/b.jpg")
    message = error_of("image_folder", "train", tmp_path)
    assert f"--data_dir={tmp_path}" in message
    assert "'train' beside 'car'" in message


def test_hashed_splits_are_disjoint_and_stable(tmp_path):
    files = [f"{folder}/{i:03}.jpg" for folder in ("a", "b") for i in range(100)]
    write(tmp_path, *files, content=encoded())
    train, test = names(load(tmp_path, "train")), names(load(tmp_path, "test"))
    assert sorted(train + test) == files
    assert 8 <= len(test) <= 36  # three standard deviations about 20, and a bit
    assert load(tmp_path, "test").class_names == ("a", "b")
    # Fixed for good: another hash would let earlier runs' test images into training.
    assert "a/000.jpg" in train
    for name in train[:100]:
        (tmp_path / name).unlink()
    assert names(load(tmp_path, "test")) == test


def test_linked_folders(tmp_path):
    images, root = tmp_path / "images", tmp_path / "root"
    write(images, "cat/a.jpg", "dog/b.jpg")
    root.mkdir()
    (root / "train").symlink_to(images)
    (root / "test").symlink_to(images)
    (images / "cat" / "back").symlink_to(images)
    assert names(load(root, "train")) == ["train/cat/a.jpg", "train/dog/b.jpg"]
    assert names(load(root, "test")) == ["test/cat/a.jpg", "test/dog/b.jpg"]


def test_unreadable_files_are_skipped_and_named(tmp_path, warnings, monkeypatch):
    write(tmp_path, "good.jpg", "large.png")
    write(tmp_path, "cut.jpg", content=encoded()[:-200])
    write(tmp_path, "empty.png", content=b"")
    write(tmp_path, "text.jpg", content=b"not an image at all")
    write(tmp_path, "short.png", content=b"\x89PNG\r\n\x1a\n")
    write(tmp_path, "misnamed.jpg", content=encoded(kind="PNG"))
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    header = encoded(kind="PNG")
    size = (20_000).to_bytes(4, "big")
    (tmp_path / "large.png").write_bytes(header[:16] + size + size + header[24:])
    assert names(load(tmp_path)) == ["good.jpg", "misnamed.jpg"]
    reasons = dict(re.fullmatch(r"skipped .*/([a-z.]+): (.+)", w).groups() for w in warnings[:-1])
    assert sorted(reasons) == [
        "cut.jpg", "empty.png", "gone.jpg", "large.png", "pipe.jpg", "short.png", "text.jpg"
    ]  # fmt: skip
    assert warnings[-1] == "skipped 7 of 9 files"
    assert reasons["empty.png"] == "empty"
    assert reasons["text.jpg"] == "not a JPEG, PNG, BMP or GIF image"
    assert reasons["large.png"].startswith("20000x20000 pixels")
    assert "JPEG" in reasons["cut.jpg"]


def test_checked_files_are_not_decoded_again(tmp_path, warnings, monkeypatch, cache_home):
    write(tmp_path, "a.jpg", "b.jpg")
    write(tmp_path, "bad.jpg", content=b"bad")
    decoded = []
    fault = image_folder.fault_of

    def counting(path):
        decoded.append(path.name)
        return fault(path)

    monkeypatch.setattr(image_folder, "fault_of", counting)
    first = names(load(tmp_path))
    assert sorted(decoded) == ["a.jpg", "b.jpg", "bad.jpg"]
    (cache_file,) = (cache_home / "byol_tf" / "verified").iterdir()
    assert set(json.loads(cache_file.read_text())["files"]) == {"a.jpg", "b.jpg", "bad.jpg"}

    decoded.clear()
    said = list(warnings)
    warnings.clear()
    assert names(load(tmp_path)) == first
    assert decoded == []
    assert warnings == said  # what is skipped is said at every start

    write(tmp_path, "b.jpg", content=b"now broken")
    assert names(load(tmp_path)) == ["a.jpg"]
    assert decoded == ["b.jpg"]


@pytest.mark.parametrize("content", ["", "{}", '{"decoder": "another", "files": {}}', "[1]"])
def test_a_useless_cache_is_replaced(tmp_path, cache_home, content):
    write(tmp_path, "a.jpg")
    load(tmp_path)
    (cache_file,) = (cache_home / "byol_tf" / "verified").iterdir()
    cache_file.write_text(content)
    assert names(load(tmp_path)) == ["a.jpg"]
    assert "a.jpg" in json.loads(cache_file.read_text())["files"]


def test_without_a_place_for_the_cache(tmp_path, warnings, monkeypatch):
    write(tmp_path, "a.jpg")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a.jpg"))
    assert names(load(tmp_path)) == ["a.jpg"]
    assert "the next start checks all images again" in warnings[0]


def test_folder_errors(tmp_path):
    assert "--data_dir is missing" in error_of("image_folder", "train", None)
    gone = tmp_path / "gone"
    assert f"--data_dir={gone}: no such folder" in error_of("image_folder", "train", gone)
    file = tmp_path / "file"
    file.touch()
    assert f"--data_dir={file}: not a folder" in error_of("image_folder", "train", file)
    assert f"--data_dir={tmp_path}: no image" in error_of("image_folder", "train", tmp_path)
    write(tmp_path, "bad.jpg", content=b"bad")
    assert "no readable image in split 'all' (of 1 files)" in error_of(
        "image_folder", "all", tmp_path
    )
    assert "no split 'eval'; there are train, test, all" in error_of(
        "image_folder", "eval", tmp_path
    )


class Tinyset(tfds.core.GeneratorBasedBuilder):
    """Twenty images of one size in two classes."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES = {
        "image": tfds.features.Image(shape=(12, 15, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=["even", "odd"]),
        "file_name": tfds.features.Text(),
        "other": tfds.features.Image(shape=(12, 15, 3), encoding_format="png"),
    }
    EXAMPLE = staticmethod(
        lambda i: {
            "image": io.BytesIO(encoded(i, "PNG")),
            "label": i % 2,
            "file_name": f"{i}.png",
            "other": io.BytesIO(encoded(100 + i, "PNG")),
        }
    )

    def _info(self):
        features = tfds.features.FeaturesDict(self.FEATURES)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(16), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, self.EXAMPLE(i)


class Unlabelled(Tinyset):
    """Images of any size, without labels or names."""

    FEATURES = {"image": tfds.features.Image(encoding_format="png")}
    EXAMPLE = staticmethod(lambda i: {"image": io.BytesIO(encoded(i, "PNG"))})


class Spectral(Tinyset):
    """Pixels of 13 channels, as arrays."""

    FEATURES = {"image": tfds.features.Tensor(shape=(12, 15, 13), dtype=np.uint8)}
    EXAMPLE = staticmethod(lambda i: {"image": np.full((12, 15, 13), 7 * i, np.uint8)})


class Measured(Tinyset):
    """The same in units of a sensor."""

    FEATURES = {"image": tfds.features.Tensor(shape=(12, 15, 13), dtype=np.float32)}
    EXAMPLE = staticmethod(lambda i: {"image": np.full((12, 15, 13), 700 * i, np.float32)})


class Imageless(Tinyset):
    """No image at all."""

    FEATURES = {"text": tfds.features.Text()}
    EXAMPLE = staticmethod(lambda i: {"text": str(i)})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of prepared data sets."""
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    for builder in (Tinyset, Unlabelled, Imageless, Spectral, Measured):
        builder(data_dir=data_dir).download_and_prepare()
    return data_dir


def test_tfds(prepared):
    loaded = source.load_source("tinyset", "train", prepared)
    assert loaded.class_names == ("even", "odd")
    assert loaded.image_shape == (12, 15, 3)
    assert loaded.num_examples == 16
    for i, example in enumerate(examples(loaded)):
        assert example["image"] == encoded(i, "PNG")
        assert example["label"] == i % 2
        assert example["name"] == f"{i}.png".encode()
    assert set(example) == {"index", "image", "label", "name"}


def test_tfds_parts_of_splits(prepared):
    assert names(source.load_source("tinyset", "train[:25%]", prepared)) == [
        f"{i}.png" for i in range(4)
    ]
    assert names(source.load_source("tinyset", "train[-2:]", prepared)) == ["14.png", "15.png"]
    assert source.load_source("tinyset", "train+test", prepared).num_examples == 20


def test_tfds_without_labels(prepared):
    loaded = source.load_source("unlabelled", "test", prepared)
    assert loaded.class_names is None
    assert loaded.image_shape is None
    assert [example["label"] for example in examples(loaded)] == [-1] * 4
    assert names(loaded) == ["test/0", "test/1", "test/2", "test/3"]


def test_tfds_pixels(prepared):
    loaded = source.load_source("spectral", "train", prepared, channels=13)
    assert (loaded.image_shape, loaded.channels) == ((12, 15, 13), 13)
    for i, example in enumerate(examples(loaded)):
        assert example["image"].dtype == np.uint8 and (example["image"] == 7 * i).all()
    assert loaded.find_fault() is None


def test_channels_that_a_source_has_not(tmp_path, prepared):
    for dataset, folder in (("image_folder", tmp_path), ("tinyset", prepared)):
        message = error_of(dataset, "train", folder, 5)
        assert message.startswith("--channels=5: image files have 1 (gray)")
    message = error_of("spectral", "train", prepared)
    assert message.startswith("--channels=3: the images of --dataset=spectral have 13: give")
    assert "its images are float32" in error_of("measured", "train", prepared, 13)


def test_tfds_errors(prepared):
    for split in ("trian", "train[:", ""):
        message = error_of("tinyset", split, prepared)
        assert message.startswith(f"--dataset=tinyset: no split {split!r}; there are train, test")
    assert "no feature 'image', only text" in error_of("imageless", "train", prepared)
    assert "--dataset=cifar01: no such data set; try cifar10" in error_of(
        "cifar01", "train", prepared
    )
    assert "--dataset=cifar10:9.9.9: TFDS cannot open it" in error_of(
        "cifar10:9.9.9", "train", prepared
    )
    assert "--dataset=a b: TFDS cannot open it" in error_of("a b", "train", prepared)


def test_tfds_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(Tinyset, "url_infos", {"http://127.0.0.1:9/images.zip": None})
    message = error_of("tinyset", "train", str(tmp_path))
    assert message.startswith(f"--dataset=tinyset: not prepared under --data_dir={tmp_path}, and")
    assert "(ConnectionError: " in message
    assert f"tfds.load('tinyset', data_dir='{tmp_path}')\" where it can be" in message


def test_tfds_that_must_be_downloaded_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(Tinyset, "url_infos", {"http://127.0.0.1:9/images.zip": None})
    monkeypatch.setattr(Tinyset, "MANUAL_DOWNLOAD_INSTRUCTIONS", "Ask the author\nfor the disk.")
    monkeypatch.setattr(Tinyset, "_split_generators", lambda self, manager: manager.manual_dir)
    assert "Ask the author for the disk." in error_of("tinyset", "train", str(tmp_path))


def test_tfds_prepares_what_is_not_there(tmp_path):
    assert source.load_source("tinyset", "test", str(tmp_path)).num_examples == 4
    assert (tmp_path / "tinyset" / "1.0.0" / "dataset_info.json").exists()


def test_two_processes_prepare_the_same_set(tmp_path, monkeypatch):
    prepare = Tinyset.download_and_prepare

    def second(builder, **how):
        prepare(Tinyset(data_dir=tmp_path), **how)  # another process, faster than this one
        raise FileExistsError("Cannot rename")

    monkeypatch.setattr(Tinyset, "download_and_prepare", second)
    assert len(examples(source.load_source("tinyset", "train", str(tmp_path)))) == 16


def test_warnings_are_only_held_back_for_a_moment(prepared):
    before = logging.get_verbosity()
    source.load_source("tinyset", "train", prepared)
    assert logging.get_verbosity() == before


def test_shapes_go_the_same_way(tmp_path, monkeypatch):
    from byol_tf.data import shapes

    monkeypatch.setattr(shapes, "Shapes", Tinyset)
    assert source.load_source("shapes", "test", str(tmp_path)).num_examples == 4
    file = tmp_path / "file"
    file.touch()
    message = error_of("shapes", "test", str(file))
    assert message.startswith(f"--dataset=shapes: not prepared under --data_dir={file}")
    assert message.endswith("choose a --data_dir that can be written.")
