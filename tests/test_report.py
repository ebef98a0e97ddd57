"""The report: its figures from known arrays, its page, and the task on tiny runs."""

import functools
import html.parser
import io
import json
import re
import shutil
import subprocess
import warnings

import numpy as np
import pytest
import tensorflow as tf
import test_cli
from PIL import Image
from test_cli import succeed

from byol_tf import evaluation, report, training
from byol_tf.data import augment, views

TINY = [*test_cli.TINY, "--log_every=1", "--knn_every=2"]
PNGS = {"curves.png", "views.png", "neighbours.png", "map.png", "confusion.png"}
SECTIONS = ["Figures", "Training", "View pairs", "Nearest neighbours", "Map of the embeddings"]
SECTIONS += ["Confusion matrix", "Flags", "Versions"]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page(html.parser.HTMLParser):
    """What a page has: headings, images, words; every element closed that was opened."""

    VOID = {"meta", "img", "br", "hr", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.attributes, self.words, self.tags = [], [], [], [], set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def check_page(path):
    """That a page is whole and needs nothing else. Returns it."""
    text = path.read_text()
    page = Page(text)
    assert page.headings == SECTIONS
    assert not {"script", "link", "iframe"} & page.tags
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset"):
            assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:80])
        if name == "alt":
            assert value
    assert not re.search(r"https?://|file://|@import|url\((?!#)", text)
    assert text.count("<img") + text.count("<svg") == text.count(" alt=") + text.count("aria-label")
    return page


# The library --------------------------------------------------------------------------


def test_predictions_are_those_of_the_accuracy():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 5))

    def features(labels):
        vectors = centres[labels] + 0.1 * rng.normal(size=(len(labels), 5))
        return evaluation.Features(vectors.astype(np.float32), labels, [""] * len(labels))

    train, test = features(np.arange(60) % 3), features(np.arange(9) % 3)
    assert evaluation.knn_predictions(train, test).tolist() == test.labels.tolist()
    wrong = evaluation.Features(test.vectors, np.roll(test.labels, 1), test.names)
    assert evaluation.knn_accuracy(train, wrong) == 0.0


def test_confusion_matrix():
    matrix = report.confusion_matrix([0, 0, 0, 0, 1], [0, 0, 0, 2, 1], 3)
    assert matrix.tolist() == [[0.75, 0, 0.25], [0, 1, 0], [0, 0, 0]]
    assert report.most_confused(matrix, "abc") == [("a", "c", "25.0 %")]


def test_series_leave_out_what_is_damaged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 2.0, "odd": "text"}', '{"step": 2, "lo', "[3]", '{"step": "4"}']
    lines += [
        '{"step": 5, "loss": NaN, "z": null}',
        '{"step": 6, "loss": 1.0}',
        '{"step": 7, "loss"',
    ]
    path.write_bytes("\n".join(lines).encode() + b"\xff")
    found = report.series(training.read_metrics(path))
    assert list(found) == ["loss"]
    assert found["loss"].tolist() == [[1, 6], [2, 1]]
    assert training.read_metrics(tmp_path / "none") == []


def test_long_series_are_means():
    found = report.series({"step": i, "loss": float(i)} for i in range(4000))
    steps, values = found["loss"]
    assert len(steps) == 400
    assert steps[0] == values[0] == 4.5


def test_sheet():
    images = np.stack([np.full((2, 3, 3), i, np.uint8) for i in (1, 2, 3)])
    whole = report.sheet(images, 2, gap=1)
    assert whole[..., 0].tolist() == [
        [1, 1, 1, 0, 2, 2, 2],
        [1, 1, 1, 0, 2, 2, 2],
        [0] * 7,
        [3, 3, 3, 0, 0, 0, 0],
        [3, 3, 3, 0, 0, 0, 0],
    ]


def test_images_of_other_channels():
    grey = np.array([[[7]]], np.uint8)
    assert report.as_rgb(grey).tolist() == [[[7, 7, 7]]]
    assert report.as_rgb(np.array([[[10, 20]]], np.uint8)).tolist() == [[[15, 15, 15]]]
    assert report.as_rgb(np.arange(5, dtype=np.uint8)[None, None]).tolist() == [[[0, 1, 2]]]


@pytest.mark.parametrize("vectors", ["apart", "one", "four"])
def test_map(vectors):
    """Clusters stay apart; a collapsed encoder or a few images are no error."""
    rng = np.random.default_rng(0)
    found = np.repeat(np.eye(3, 8), 20, axis=0) + 0.05 * rng.normal(size=(60, 8))
    found = {"apart": found, "one": np.ones((60, 8)), "four": found[::15]}[vectors]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        places = report.embedding_map(found.astype(np.float32))
    assert places.shape == (len(found), 2)
    assert places.min() >= 0 and places.max() <= 1
    if vectors == "apart":
        distance = np.linalg.norm(places[:, None] - places, axis=-1)
        np.fill_diagonal(distance, np.inf)
        assert (distance.argmin(1) // 20 == np.arange(60) // 20).all()


def test_thumbnails_do_not_overlap():
    places = np.random.default_rng(0).random((200, 2))
    chosen = places[report._with_room(places, 0.1)]
    apart = np.abs(chosen[:, None] - chosen).max(-1) + np.eye(len(chosen))
    assert len(chosen) > 30 and apart.min() >= 0.1


@pytest.mark.parametrize("classes", [3, 12, 40])
def test_figures_of_many_classes(classes):
    """With names up to 30 classes in the matrix and 32 on the map, and without above."""
    rng = np.random.default_rng(0)
    names = [f"class <{i}>" for i in range(classes)]
    labels = np.arange(2 * classes) % classes
    matrix = report.confusion_matrix(labels, rng.permutation(labels), classes)
    svg = report.figure_svg(report.confusion_figure(matrix, names), "matrix")
    assert ("class &lt;2&gt;" in svg) == (classes <= 30)
    images = rng.integers(0, 256, (len(labels), 8, 8, 3), np.uint8)
    figure, markup = report.embedding_figure(rng.random((len(labels), 2)), images, labels, names)
    assert markup.count("<li>") == (classes if classes <= 32 else 0)
    assert len(figure.legends) == (classes <= 32)


def test_svg_has_the_colours_of_the_page():
    markup, figure = report.curves([{"step": i, "loss": 1.0 / (i + 1)} for i in range(5)])
    assert "var(--accent)" in markup and "var(--ink)" in markup
    assert not re.search(r"#(?!m)[0-9a-f]{6}\b(?<!000000)(?<!ffffff)", markup.split("<style")[0])
    assert "from 1 at step 0 to 0.2 at step 4" in markup
    image = Image.open(io.BytesIO(report.figure_png(figure)))
    assert image.getpixel((0, 0))[:3] == (255, 255, 255)


def test_page_escapes_what_it_shows():
    body = report.table([("<b>", 1, 0.5)], ["&"]) + report.note("<i>")
    page = Page(report.page("<u>", "<s>", [report.Section("<h>", body)]))
    assert not {"b", "i", "u", "s", "h"} & page.tags
    assert page.headings == ["<h>"]


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_denormalize_undoes_normalize(channels):
    images = np.arange(256, dtype=np.uint8).repeat(channels).reshape(16, 16, channels)
    assert (augment.denormalize(augment.normalize(images)).numpy() == images).all()


def test_images_at(make_source):
    source = make_source(20)
    every = np.concatenate([b["image"] for b in views.eval_batches(source, image_size=16)])
    assert (views.images_at(source, [7, 3, 7], 16) == every[[7, 3, 7]]).all()


def test_view_pairs(make_source):
    """What the networks see, of as many images as there are; other views at another step."""
    pairs = functools.partial(views.view_pairs, make_source(6), image_size=12)
    assert pairs(4).shape == (4, 2, 12, 12, 3) and pairs(99).shape[0] == 6
    assert (pairs(4) == pairs(4)).all()
    assert (pairs(4) != pairs(4, step=1)).any()
    assert (pairs(4)[:, 0] != pairs(4)[:, 1]).any()


# The task -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(main, images, tmp_path_factory):
    """The workdir of a run with its report."""
    workdir = tmp_path_factory.mktemp("reported")
    flags = [f"--data_dir={images}", f"--workdir={workdir}", "--task=pretrain,knn,report"]
    succeed(main(*TINY, *flags))
    return workdir


def test_report(reported):
    page = check_page(reported / "report" / "report.html")
    text = " ".join(page.words)
    assert "checkpoint, of step 4" in text and "width_multiplier" in text
    assert tf.__version__ in text and "random initialisation" in text
    files = {path.name for path in (reported / "report").iterdir()}
    assert files == {*PNGS, "report.html"}
    for name in PNGS:
        with Image.open(reported / "report" / name) as image:
            image.load()
            assert min(image.size) > 60 and image.convert("L").getextrema()[0] < 200, name


def test_confusion_is_that_of_knn(reported):
    knn = json.loads((reported / "results.json").read_text())["knn_top1"]
    assert f"{100 * knn:.1f} % right" in (reported / "report" / "report.html").read_text()


def test_projector(reported):
    from google.protobuf import text_format
    from tensorboard.plugins.projector import projector_config_pb2

    logs = reported / "tensorboard"
    config = text_format.Parse(
        (logs / "projector_config.pbtxt").read_text(), projector_config_pb2.ProjectorConfig()
    )
    (embedding,) = config.embeddings
    vectors = np.loadtxt(logs / embedding.tensor_path, delimiter="\t")
    assert len(vectors) == 8 and np.isfinite(vectors).all()
    header, *rows = (logs / embedding.metadata_path).read_text().splitlines()
    assert header == "class\tname" and len(rows) == 8
    sprite = np.array(Image.open(logs / embedding.sprite.image_path))
    side = embedding.sprite.single_image_dim[0]
    assert sprite.shape == (3 * side, 3 * side, 3)
    for i, row in enumerate(rows):  # the image of the row, in the sprite's place
        tile = sprite[i // 3 * side : (i // 3 + 1) * side, i % 3 * side : (i % 3 + 1) * side]
        red, _, blue = tile.mean((0, 1))
        assert row.split("\t")[0] == ("red" if red > blue else "blue")


def test_tensorboard_has_views_and_figures(reported):
    tags, shown = set(), {}
    for path in (reported / "tensorboard").glob("events*"):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                tags.add(value.tag)
                if value.tag == "views":
                    shown[event.step] = value.tensor.string_val
    figures = {"loss", "prediction_loss", "learning_rate", "target_ema", "effective_rank"}
    assert figures | {"knn_top1", "images_per_second"} <= tags
    assert list(shown) == [0]
    width, height, encoded = shown[0]
    pixels = tf.io.decode_png(encoded).numpy()
    assert pixels.shape == (int(height), int(width), 3)
    with Image.open(reported / "report" / "views.png") as image:  # the same pairs, of step 0
        assert (np.array(image) == pixels).all()
    colours = pixels[:16, :16].reshape(-1, 3).std(0) + np.ptp(pixels.reshape(-1, 3), axis=0)
    assert colours.min() > 0


@pytest.mark.slow
def test_report_of_damaged_metrics(main, reported, tmp_path):
    """Cut off, and with a line of nonsense; no figures but of evaluations that train."""
    workdir = tmp_path / "copy"
    shutil.copytree(reported, workdir)
    metrics = workdir / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(lines[0] + b"\x00\xff nonsense\n" + lines[1] + lines[2][:9])
    chosen = {"learning_rate": 0.02, "epochs": 30, "held_out_top1": {}}
    transfer = {"metric": "top1", "value": 0.75, "l2": 0.001}
    results = {
        "finetune": {"1%": {"top1": 0.5, "top5": 1.0, **chosen}},
        "transfer": {"dtd": {"linear": {**transfer, "step": 4}}},
    }
    (workdir / "results.json").write_text(json.dumps(results))
    _, stderr = succeed(main("--task=report", f"--workdir={workdir}", "--nobaselines"))
    assert "Traceback" not in stderr
    text = (workdir / "report" / "report.html").read_text()
    words = check_page(workdir / "report" / "report.html").words
    shown = {"1%", "top-1 50.0 %, top-5 100.0 %", "rate 0.02, epochs 30", "dtd", "top-1 75.0 %"}
    assert shown < set(words)
    assert "No accuracies" in text and "at step 2" in text and "random: " not in text


@pytest.mark.slow
def test_report_without_labels(main, images, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(images.rglob("*.png")) * 2):
        shutil.copy(path, flat / f"{i}.png")
    workdir = tmp_path / "run"
    flags = [f"--data_dir={flat}", f"--workdir={workdir}", "--max_steps=1"]
    succeed(main(*TINY, *flags, "--task=pretrain,report", "--augment_on=accelerator"))
    page = check_page(workdir / "report" / "report.html")
    assert "Left out, as there are images without labels." in page.words
    assert not (workdir / "report" / "confusion.png").exists()
    assert (workdir / "report" / "neighbours.png").exists()


@pytest.mark.skipif(not CHROMIUM, reason="NO CHROMIUM: HOW THE PAGE LOOKS WAS NOT TESTED")
@pytest.mark.parametrize("dark", [False, True])
def test_page_in_chromium(reported, tmp_path, dark):
    """It is no wider than a phone, and light or dark as the reader wants."""
    text = (reported / "report" / "report.html").read_text()
    measure = "parent.postMessage(document.documentElement.scrollWidth + ' of ' + innerWidth, '*')"
    (tmp_path / "page.html").write_text(
        text.replace("</body>", f"<script>{measure}</script></body>")
    )
    # In a frame, as Chromium has no window that is as narrow as a phone.
    (tmp_path / "frame.html").write_text(
        "<title></title><script>onmessage = e => document.title = e.data</script>"
        "<iframe src=page.html width=360 height=800 style='border: 0'></iframe>"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path}/profile", "--window-size=500,900"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    page = f"file://{tmp_path}/page.html"
    dom = subprocess.run(
        [*command, "--virtual-time-budget=9000", "--dump-dom", f"file://{tmp_path}/frame.html"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    width, _, inner = re.search(r"<title>(\d+)( of )(\d+)</title>", dom.stdout).groups()
    assert int(width) <= int(inner) == 360
    shot = tmp_path / "shot.png"
    subprocess.run([*command, f"--screenshot={shot}", page], capture_output=True, timeout=120)
    with Image.open(shot) as image:
        corner = image.convert("L").getpixel((1, 1))
    assert corner < 40 if dark else corner > 230
