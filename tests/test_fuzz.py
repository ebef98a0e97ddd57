"""Bad input by the hundred: images, prepared data sets, flags and requests. Seeds are fixed."""

import functools
import importlib.util
import io
import os
import pathlib
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import flags, logging
from absl.testing import flagsaver
from PIL import Image

import byol_tf
from byol_tf import config
from byol_tf.data import decode, source, views
from byol_tf.errors import UserError
from byol_tf.keras_api import keras

ROOT = pathlib.Path(__file__).parent.parent
KINDS = {"jpg": "JPEG", "png": "PNG", "bmp": "BMP", "gif": "GIF"}


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch):
    """Keeps the cache of checked files out of the user's home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def warnings(monkeypatch):
    """What is logged as a warning."""
    lines = []
    monkeypatch.setattr(logging, "warning", lambda line, *values: lines.append(line % values))
    return lines


def encode(seed, kind, mode="RGB", **options):
    """An image of smooth colours, of a size and content by the seed."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (4, 4, 3), np.uint8)
    size = tuple(rng.integers(16, 40, 2).tolist())
    buffer = io.BytesIO()
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    image.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def truncated(rng, encoded):
    return encoded[: rng.integers(len(encoded))]


def bits_flipped(rng, encoded):
    changed = bytearray(encoded)
    for at in rng.integers(0, len(changed), rng.choice([1, 3, 30])):
        changed[at] ^= 1 << rng.integers(8)
    return bytes(changed)


def header_changed(rng, encoded):
    changed = bytearray(encoded)
    for at in rng.integers(0, min(64, len(changed)), rng.choice([1, 2, 4])):
        changed[at] = rng.integers(256)
    return with_checksums(bytes(changed))


def cut_out(rng, encoded):
    start, end = sorted(rng.integers(0, len(encoded), 2))
    return encoded[:start] + encoded[end:]


def noise(rng, encoded):
    return rng.bytes(len(encoded))


CORRUPTIONS = (truncated, bits_flipped, header_changed, cut_out, noise)


def corrupted(rng, good, count):
    """So many corrupted copies, by every means in turn, and an empty one."""
    return [b""] + [CORRUPTIONS[i % 5](rng, good[i % len(good)]) for i in range(count - 1)]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_checksums(encoded):
    """A PNG with its first chunk's checksum set right; others as they are."""
    if not encoded.startswith(b"\x89PNG"):
        return encoded
    return encoded[:29] + struct.pack(">I", zlib.crc32(encoded[12:29])) + encoded[33:]


def png(width, height, before=b""):
    """A black PNG, a thousandth of the pixels it holds."""
    row, packer = bytes(1 + 3 * width), zlib.compressobj(1)
    data = b"".join([packer.compress(row) for _ in range(height)]) + packer.flush()
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", size) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + before + chunks


def resized(kind, width, height):
    """A small image whose header claims this size."""
    encoded = encode(0, kind)
    at, order = {
        "JPEG": (encoded.find(b"\xff\xc0") + 5, ">HH"),
        "PNG": (16, ">II"),
        "BMP": (18, "<ii"),
        "GIF": (6, "<HH"),
    }[kind]
    size = (height, width) if kind == "JPEG" else (width, height)
    return with_checksums(
        encoded[:at] + struct.pack(order, *size) + encoded[at + struct.calcsize(order) :]
    )


def black_lzw(pixels):
    """GIF's code of so many black pixels, in blocks: longer and longer runs, then anew."""
    bits, length = [(4, 3)], 0
    while pixels:
        length, size, free = 1, 3, 6
        bits.append((0, 3))
        pixels -= 1
        while pixels and free < 4095:
            length = min(length + 1, pixels)
            bits.append((free if length > 1 else 0, size))
            pixels -= length
            free += 1
            size = min(12, max(size, free.bit_length()))
        bits.append((4, size))
    bits[-1] = (5, bits[-1][1])
    number, at = 0, 0
    out = bytearray()
    for code, size in bits:
        number |= code << at
        at += size
        while at >= 8:
            out.append(number & 255)
            number, at = number >> 8, at - 8
    out.append(number)
    return b"".join(
        bytes([len(out[i : i + 255])]) + out[i : i + 255] for i in range(0, len(out), 255)
    )


def gif(canvas, *frames):
    """A black GIF with frames of these sizes."""
    out = b"GIF89a" + struct.pack("<HHBBB", *canvas, 128, 0, 0) + bytes(6)
    for width, height in frames:
        out += b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0)
        out += b"\x02" + black_lzw(width * height) + b"\0"
    return out + b";"


@functools.cache
def bombs():
    """Small files that claim to be, or unpack to, more than a hundred million pixels."""
    hidden = chunk(b"prVt", struct.pack(">II", 10, 10))
    return {
        "png": png(10_100, 10_100),
        "png, its header hidden": png(10_100, 10_100, before=hidden),
        "png claim": resized("PNG", 2**31 - 1, 2**31 - 1),
        "png claim below TensorFlow's own limit": resized("PNG", 23_000, 23_000),
        "jpeg claim": resized("JPEG", 65_500, 65_500),
        "jpeg claim below TensorFlow's own limit": resized("JPEG", 13_000, 13_000),
        "bmp claim": resized("BMP", 2**31 - 1, 2**31 - 1),
        "bmp claim of the most negative height": resized("BMP", 1, -(2**31)),
        "bmp claim whose product overflows": resized("BMP", 2**16, 2**16),
        "gif canvas": resized("GIF", 65_535, 65_535),
        "gif frame": gif((10, 10), (20_000, 10_000)),
    }


def exotic():
    """What exists but is seldom seen; some of it cannot be decoded."""
    modes = {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "JPEG": ("L", "CMYK", "YCbCr"),
        "BMP": ("1", "L", "P", "RGBA"),
        "GIF": ("1", "L", "P"),
    }
    files = [encode(0, kind, mode) for kind in modes for mode in modes[kind]]
    files += [encode(0, "JPEG", progressive=True), encode(0, "GIF", interlace=True)]
    bmp = encode(0, "BMP")
    files += [bmp[:28] + struct.pack("<H", bits) + bmp[30:] for bits in (0, 2, 16, 64, 65535)]
    files += [bmp[:30] + struct.pack("<I", way) + bmp[34:] for way in (1, 2, 3, 4)]
    jpeg = encode(0, "JPEG")
    frame = jpeg.find(b"\xff\xc0")
    for marker in (0xC1, 0xC2, 0xC3, 0xC9, 0xCA):  # other processes than the file is coded by
        files.append(jpeg[: frame + 1] + bytes([marker]) + jpeg[frame + 2 :])
    files.append(jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :])  # 12 bits
    files += [gif((9, 9), (9, 9), (5000, 5000)), gif((9, 9), (10, 10)), gif((9, 9)), gif((0, 0))]
    return files


@pytest.fixture(scope="module")
def decodes():
    """Function to whether bytes are an image, by the ops as a pipeline runs them."""
    function = tf.function(decode.decode, input_signature=[tf.TensorSpec([], tf.string)])

    def check(encoded):
        try:
            function(encoded)
        except tf.errors.InvalidArgumentError:
            return False
        return True

    return check


def write(root, files, extension):
    root.mkdir()
    for i, content in enumerate(files):
        (root / f"{i:04}.{extension}").write_bytes(content)


def files_of(kind, count=150):
    """Good images of a format, or of all mixed up, and corrupted copies of them."""
    rng = np.random.default_rng(list([*KINDS, "mixed"]).index(kind))
    kinds = list(KINDS.values()) if kind == "mixed" else [KINDS[kind]]
    good = [encode(i, kinds[i % len(kinds)]) for i in range(12)]
    bad = corrupted(rng, good, count)
    return good, bad + (exotic() if kind == "mixed" else [])


@pytest.mark.parametrize(
    "kind", ["mixed", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS)]
)
def test_a_folder_of_corrupted_images(kind, tmp_path, warnings, decodes, tiny_encoder):
    """What decodes is trained on, all else is skipped, named and counted."""
    good, bad = files_of(kind)
    files = good + bad
    # Extensions say nothing: of all formats mixed up three in four are wrong.
    write(tmp_path / "images", files, "jpg" if kind == "mixed" else kind)
    sound = [f"{i:04}" for i, content in enumerate(files) if decodes(content)]
    assert len(good) <= len(sound) < len(files) - 40
    loaded = source.load_source("image_folder", "all", str(tmp_path / "images"))
    assert [path.split(".")[0] for path in names(loaded)] == sound
    assert sound[:12] == [f"{i:04}" for i in range(12)]
    skipped = [re.fullmatch(r"skipped .*/(\d{4})\.\w+: (.+)", line) for line in warnings[:-1]]
    assert [line.group(1) for line in skipped] == [
        f"{i:04}" for i in range(len(files)) if f"{i:04}" not in sound
    ]
    assert warnings[-1] == f"skipped {len(files) - len(sound)} of {len(files)} files"

    batches = views.pretrain_batches(
        loaded, image_size=16, batch_size=8, epochs=3, augmentation="crop"
    )
    assert sum(1 for _ in batches) == 3 * (len(sound) // 8)
    assert sum(len(b["index"]) for b in views.eval_batches(loaded, image_size=16)) == len(sound)
    if kind == "mixed":
        model = byol_tf.BYOL(tiny_encoder(), projector_hidden_size=16, projector_output_size=4)
        model.compile(keras.optimizers.SGD(0.01))
        steps = len(sound) // 8
        update = byol_tf.TargetNetworkUpdate(0.9, total_steps=steps)
        model.fit(batches.take(steps), callbacks=[update], steps_per_epoch=steps, verbose=0)
        assert int(model.optimizer.iterations) == steps
        assert all(np.isfinite(weight).all() for weight in model.get_weights())


def names(loaded):
    return [record["name"].decode() for record in loaded.dataset.as_numpy_iterator()]


def test_bombs_are_skipped(tmp_path, warnings):
    write(tmp_path / "images", [encode(0, "PNG"), *bombs().values()], "png")
    with (tmp_path / "images" / "vast.jpg").open("wb") as file:
        file.truncate(2**40)  # which takes no place on the disk
    loaded = source.load_source("image_folder", "all", str(tmp_path / "images"))
    assert names(loaded) == ["0000.png"]
    assert warnings[-1] == f"skipped {len(bombs()) + 1} of {len(bombs()) + 2} files"
    assert "1099511627776 bytes, more than 1073741824" in warnings[-2]


def test_a_file_that_changes_after_it_was_checked(tmp_path):
    """An error, not fewer batches; and the file's name for it."""
    root = tmp_path / "images"
    write(root, [encode(i, "PNG") for i in range(12)], "png")
    loaded = source.load_source("image_folder", "all", str(root))
    batches = views.pretrain_batches(
        loaded, image_size=16, batch_size=4, epochs=2, augmentation="crop"
    )
    assert len(list(batches)) == 6 and loaded.find_fault() is None
    path = root / "0007.png"
    content = path.read_bytes()
    for changed in (None, b"", content[:-30], b"text", resized("PNG", 23_000, 23_000)):
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)
        for pipeline in (batches, views.eval_batches(loaded, image_size=16)):
            with pytest.raises(tf.errors.OpError):
                list(pipeline)
        fault = loaded.find_fault()
        assert f"--data_dir={root}: 1 of 12 images can no longer be read" in fault
        assert "such as 0007.png (" in fault and "\n" not in fault
        path.write_bytes(content)
    assert loaded.find_fault() is None and len(list(batches)) == 6


@pytest.mark.parametrize("seed", range(40))
def test_a_corrupted_cache_is_no_obstacle(tmp_path, seed):
    root = tmp_path / "images"
    write(root, [encode(0, "PNG"), encode(1, "PNG"), b"bad"], "png")
    source.load_source("image_folder", "all", str(root))
    (cache_file,) = pathlib.Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json")
    content = cache_file.read_bytes()
    structures = [b"[" * 100_000, content.replace(b"[", b"7,["), content.replace(b"{", b"[{")]
    rng = np.random.default_rng(seed)
    changed = [*structures, *(CORRUPTIONS[i % 5](rng, content) for i in range(37))][seed]
    cache_file.write_bytes(changed)
    loaded = source.load_source("image_folder", "all", str(root))
    assert names(loaded) == ["0000.png", "0001.png"]


SPOIL = """
import pathlib, sys

sys.path.insert(0, sys.argv.pop(1))
import main
from absl import app
from byol_tf.data import views

spoiled, make = sys.argv.pop(1), views.pretrain_batches


def spoil_and_make(*args, **kwargs):
    pathlib.Path(spoiled).write_bytes(b"text")
    return make(*args, **kwargs)


views.pretrain_batches = spoil_and_make
app.run(main.main, flags_parser=main.parse)
"""


@pytest.mark.slow
def test_main_when_a_file_turns_bad(tmp_path):
    """One line that names it; the same command then trains without it, as many steps."""
    root = tmp_path / "images"
    write(root, [encode(i, "PNG") for i in range(17)], "png")
    given = (
        f"--dataset=image_folder --data_dir={root} --train_split=all --workdir={tmp_path / 'run'} "
        "--task=pretrain --encoder=resnet18 --width_multiplier=0.05 --image_size=16 --stem=small "
        "--projector_hidden_size=16 --projector_output_size=8 --batch_size=8 --epochs=2 "
        "--warmup_epochs=0 --optimizer=sgd --augmentation=crop"
    ).split()

    def run(*command):
        command = [sys.executable, *map(str, command), *given]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stderr

    code, stderr = run("-c", SPOIL, ROOT, root / "0007.png")
    assert code == 1 and "Traceback" not in stderr, stderr[-3000:]
    line = stderr.splitlines()[-1]
    assert line.startswith(f"error: --data_dir={root}: 1 of 17 images can no longer be read")
    assert "0007.png (not a JPEG, PNG, BMP or GIF image)" in line
    code, stderr = run(ROOT / "main.py")
    assert code == 0, stderr[-3000:]
    assert "skipped 1 of 17 files" in stderr
    assert '"steps": 4' in (tmp_path / "run" / "results.json").read_text()


class Speckles(tfds.core.GeneratorBasedBuilder):
    """Twelve images, and as many of which one is none."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="png"),
                "label": tfds.features.ClassLabel(names=["even", "odd"]),
                "file_name": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        good = [encode(i, "PNG") for i in range(12)]
        return {
            "train": self._generate_examples(good),
            "text": self._generate_examples([*good[:7], b"text", *good[8:]]),
            "bomb": self._generate_examples([*good[:7], resized("PNG", 23_000, 23_000), *good[8:]]),
        }

    def _generate_examples(self, files):
        for i, file in enumerate(files):
            yield i, {"image": io.BytesIO(file), "label": i % 2, "file_name": f"{i}.png"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    Speckles(data_dir=data_dir).download_and_prepare()
    return data_dir


def test_corrupted_tfrecords(prepared):
    """None is read as if it were sound, and each file is named."""
    loaded = source.load_source("speckles", "train", str(prepared))
    batches = views.eval_batches(loaded, image_size=16, batch_size=12)
    (file,) = prepared.rglob("*train.tfrecord*")
    content = file.read_bytes()
    assert len(list(batches)) == 1 and loaded.find_fault() is None
    rng = np.random.default_rng(0)
    first = 16 + struct.unpack("<Q", content[:8])[0]  # bytes of the first record
    changes = [content[:first], content + content[:first], content[first:], b""]
    changes += [CORRUPTIONS[i % 5](rng, content) for i in range(100)]
    try:
        for i, changed in enumerate([None, *changes]):
            file.unlink() if changed is None else file.write_bytes(changed)
            if i < 5 or i % 7 == 0:  # the whole pipeline is slow to set up
                with pytest.raises(tf.errors.OpError):
                    list(batches)
            fault = loaded.find_fault()
            assert fault.startswith(f"--dataset=speckles: {file} is broken ("), fault
            assert "prepare the data set anew" in fault and "\n" not in fault
    finally:
        file.write_bytes(content)
    assert len(list(batches)) == 1


@pytest.mark.parametrize("split", ["text", "bomb"])
def test_bad_images_in_sound_tfrecords(prepared, split):
    loaded = source.load_source("speckles", split, str(prepared))
    with pytest.raises(tf.errors.InvalidArgumentError):
        list(views.eval_batches(loaded, image_size=16))
    with pytest.raises(tf.errors.InvalidArgumentError):
        list(
            views.pretrain_batches(
                loaded, image_size=16, batch_size=4, epochs=1, augmentation="crop"
            )
        )
    fault = loaded.find_fault()
    assert fault.startswith("--dataset=speckles: the image 7.png cannot be decoded ("), fault
    assert "\n" not in fault and "{{" not in fault


def test_a_corrupted_description_of_a_data_set(prepared):
    (file,) = prepared.rglob("dataset_info.json")
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    try:
        for i in range(60):
            file.write_bytes(CORRUPTIONS[i % 5](rng, content))
            try:
                source.load_source("speckles", "train", str(prepared))
            except UserError as error:
                refused += 1
                assert "--dataset=speckles" in str(error) and "\n" not in str(error)
    finally:
        file.write_bytes(content)
    assert refused >= 30


@pytest.fixture
def parse():
    """Function from the arguments of `main.py` to its error, or None."""
    spec = importlib.util.spec_from_file_location("byol_main", ROOT / "main.py")
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)

    def error_of(*args):
        with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", io.StringIO())
            try:
                main.parse(["main.py", *map(str, args)])
            except SystemExit as stopped:
                return stopped.code
            return None

    return error_of


def is_one_line(error):
    return error.startswith("error: ") and len(error.splitlines()) == 1 and len(error) < 1000


WRONG_VALUES = (
    *("", "0", "-1", "nan", "1e400", "10" * 30, "9" * 5000, "x" * 5000, "true", "1,2", "[1", "{}"),
    *("%s", "-", "--", "\0", "\x1c", "\u2028", "\ud800", "é", "~", "~nobody/x", "/" * 5000),
    *("a" * 300, "/dev/null"),
)


def test_wrong_values_of_every_flag(parse, tmp_path):
    found = []
    for module in config.MODULES:
        for flag in flags.FLAGS.get_flags_for_module(module.__name__):
            for value in WRONG_VALUES:
                found.append(parse(f"--workdir={tmp_path}", f"--{flag.name}={value}"))
    found = [error for error in found if error is not None]
    assert len(found) > 500
    assert [error for error in found if not is_one_line(error)] == []
    assert not list(tmp_path.iterdir())


def test_corrupted_flagfiles(parse, tmp_path):
    """Random bytes, and changes of a good one, which may leave it good."""
    rng = np.random.default_rng(0)
    good = (ROOT / "flags" / "quickstart.flags").read_bytes()
    errors = []
    for i in range(400):
        (tmp_path / "x.flags").write_bytes(CORRUPTIONS[i % 5](rng, good))
        errors.append(parse(f"--workdir={tmp_path / 'run'}", f"--flagfile={tmp_path / 'x.flags'}"))
    errors = [error for error in errors if error is not None]
    assert len(errors) > 200
    assert [error for error in errors if not is_one_line(error)] == []


def test_corrupted_flags_of_a_run(parse, tmp_path):
    rng = np.random.default_rng(0)
    good = (ROOT / "flags" / "quickstart.flags").read_bytes()
    errors = []
    for i in range(100):
        (tmp_path / "flags.txt").write_bytes(CORRUPTIONS[i % 5](rng, good))
        errors.append(parse(f"--workdir={tmp_path}"))
    errors = [error for error in errors if error is not None]
    assert len(errors) > 50
    assert [error for error in errors if not is_one_line(error)] == []


@pytest.mark.parametrize(
    "text, words",
    [
        ("--nosuch=1\n" * 100_000, "Unknown command line flag 'nosuch'"),
        ("--" + "x" * 100_000, "flags that cannot be read"),
        ("--epochs=" + "x" * 1_000_000, "flag --epochs=xxx"),
        ("--flagfile={next}", "flags that cannot be read"),
        ("--flagfile=/no/such/file", "/no/such/file"),
        ("--flagfile={folder}", "Is a directory"),
    ],
)
def test_odd_flagfiles(parse, tmp_path, text, words):
    files = [tmp_path / str(i) for i in range(2000)]
    for file, following in zip(files, files[1:]):
        file.write_text(text.format(next=following, folder=tmp_path))
        if "{next}" not in text:
            break
    error = parse(f"--workdir={tmp_path / 'run'}", f"--flagfile={files[0]}")
    assert is_one_line(error) and words in error, error


def test_a_flagfile_that_includes_itself(parse, tmp_path):
    """Is read once, as absl has it."""
    file = tmp_path / "x.flags"
    file.write_text(f"--flagfile={file}\n--epochs=0\n")
    assert "--epochs=0" in parse(f"--workdir={tmp_path}", f"--flagfile={file}")
    file.write_text(f"--flagfile={file}\n--epochs=3\n")
    assert parse(f"--workdir={tmp_path}", f"--flagfile={file}") is None


def test_main_with_bad_flagfiles(tmp_path):
    """As the shell sees it."""
    file = tmp_path / "x.flags"
    file.write_bytes(b"--epochs=3\n\xff\xfe\x00")
    command = [sys.executable, str(ROOT / "main.py"), f"--flagfile={file}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert is_one_line(line) and str(file) in line


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    keras.utils.set_random_seed(0)
    encoder = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            keras.layers.Conv2D(8, 3, 2),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )
    path = tmp_path_factory.mktemp("export") / "saved_model"
    byol_tf.export_encoder(encoder, path, image_size=16)
    return path


def test_served_bad_bytes(exported, decodes):
    """Each is an error of its request; good requests between them are answered as ever."""
    served = tf.saved_model.load(str(exported)).signatures["serving_bytes"]
    good = encode(0, "PNG")
    expected = served(image_bytes=tf.constant([good]))["embedding"].numpy()
    bad = [content for kind in KINDS for content in files_of(kind, 120)[1]] + exotic()
    refused = 0
    for i, content in enumerate(bad):
        request = tf.constant([good, content])
        if decodes(content):
            embedding = served(image_bytes=request)["embedding"].numpy()
            assert np.isfinite(embedding).all()
            np.testing.assert_allclose(embedding[:1], expected, rtol=1e-4, atol=1e-6)
        else:
            with pytest.raises(tf.errors.InvalidArgumentError):
                served(image_bytes=request)
            refused += 1
        if i % 50 == 0:
            again = served(image_bytes=tf.constant([good]))["embedding"]
            np.testing.assert_array_equal(again, expected)
    assert refused > 250


# Not getrusage's, which is the parent's too, from whom the process was forked.
PEAK = """
import pathlib, re, sys

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) // 1024
"""
LARGEST = f"""{PEAK}
import tensorflow as tf
from byol_tf.data import decode, image_folder

path = pathlib.Path(sys.argv[1])
tf.zeros([]) + 1  # TensorFlow's own
before = peak()
if sys.argv[2] == "check":
    assert image_folder.fault_of(path) is None
else:
    tf.function(decode.decode)(tf.constant(path.read_bytes()))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("way", "most"), [("check", 3300), ("train", 2200)])
def test_memory_of_the_largest_image(tmp_path, way, most):
    """Of all that is let through, a PNG with alpha takes most."""
    side = int(decode.MAX_PIXELS**0.5)
    path = tmp_path / "largest.png"
    path.write_bytes(tf.io.encode_png(tf.zeros([side, side, 4], tf.uint8)).numpy())
    command = [sys.executable, "-c", LARGEST, str(path), way]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    print(f"{way}: {done.stdout.strip()} MB")
    assert 500 < int(done.stdout) < most


SERVE_BOMBS = f"""{PEAK}
import numpy as np
import tensorflow as tf

given = np.load("bombs.npz", allow_pickle=True)["files"].tolist()
good, bombs = given[0], given[1:]
served = tf.saved_model.load(sys.argv[1]).signatures["serving_bytes"]
expected = served(image_bytes=tf.constant([good]))["embedding"].numpy()
before = peak()
for bomb in bombs:
    try:
        served(image_bytes=tf.constant([bomb]))
    except tf.errors.InvalidArgumentError:
        print("refused")
after = peak()
again = served(image_bytes=tf.constant([good]))["embedding"].numpy()
np.testing.assert_array_equal(again, expected)
print(after - before)
"""


def test_served_bombs(exported, tmp_path):
    """Are refused before the memory is taken: 64 MB are the copies of the largest file."""
    files = np.array([encode(0, "PNG"), *bombs().values()], object)
    np.savez(tmp_path / "bombs.npz", files=files)
    command = [sys.executable, "-c", SERVE_BOMBS, str(exported)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    *refused, megabytes = done.stdout.split()
    assert len(refused) == len(bombs())
    assert int(megabytes) < 64
