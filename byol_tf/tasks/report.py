"""The run as a page to look at: from what the workdir holds and what its encoder says."""

import numpy as np
import tensorflow as tf
from absl import flags

from byol_tf import checkpoints, evaluation, report, search, training, transfer, workdir
from byol_tf.data import views
from byol_tf.tasks import run

FLAGS = flags.FLAGS
_VIEW_PAIRS = 16
_QUERIES = 8
_NEIGHBOURS = 6
_LEAST_MAP, _MOST_MAP = 4, 2000  # images; t-SNE of more takes minutes
_SIDE = 128  # pixels of a view, at most: the page is to stay small
_THUMBNAIL = 64
_TITLES = {
    **{"knn_top1": "k-NN (20), top-1", "knn200_top1": "k-NN (200), top-1"},
    **{"linear_top1": "linear evaluation, top-1", "linear_top5": "linear evaluation, top-5"},
    "probe_top1": "linear probe, top-1",
}
# Of evaluations that train: how good it is, and what was chosen on held-out images.
_JUDGED = {
    **{"top1": "top-1", "top5": "top-5", "miou": "mean IoU"},
    **{"pct1.25": "< 1.25:", "pct1.25^2": "< 1.25²:", "pct1.25^3": "< 1.25³:"},
    **{"rms": "rms", "rel": "rel"},
}
_CHOSEN = {"learning_rate": "rate", "epochs": "epochs", "weight_decay": "decay", "l2": "L2"}
_BASELINES = {"random_init": "random initialisation", "raw_pixels": "raw pixels"}


def write_report():
    """Writes report/ (report.html and its PNGs) and the files of TensorBoard's projector."""
    folder = run.folder() / "report"
    sections = [_figures(), _curves(), _views(), _neighbours(), _map(), _confusion(), *_setup()]
    title = f"{FLAGS.method.upper()} on {FLAGS.dataset}"
    subtitle = (
        f"{FLAGS.encoder}, width {FLAGS.width_multiplier:g}, at {FLAGS.image_size} pixels; "
        f"{FLAGS.use_checkpoint} checkpoint, of step {checkpoints.step_of(run.chosen_checkpoint())}."
    )
    with checkpoints.writing(folder):
        folder.mkdir(exist_ok=True)
    for section in sections:
        if section.png:
            workdir.write_bytes(folder / section.file, section.png)
    workdir.write_text(folder / "report.html", report.page(title, subtitle, sections))
    print(f"report written to {folder / 'report.html'}", flush=True)


def _figures():
    """What results.json holds: accuracies as one table, all else as another."""
    results = workdir.read_results(FLAGS.workdir)
    baselines = {what: results.pop(what, {}) for what in _BASELINES}
    names = [name for name in results if name.endswith(("_top1", "_top5"))]
    rows = [["trained", *(_percent(results.pop(name)) for name in names)]]
    for what, figures in baselines.items():
        if figures:
            rows.append([_BASELINES[what], *(_percent(figures.get(name)) for name in names)])
    if names:
        body = report.table(rows, ["accuracy", *(_TITLES.get(name, name) for name in names)])
    else:
        body = report.note("No accuracies are in results.json: --task=knn,linear_probe measures.")
    others = [
        (name.replace("_", " "), value)
        for name, value in results.items()
        if not isinstance(value, dict)
    ]
    trained = list(_of_training_on_labels(results))
    if trained:
        body += report.table(trained, ["evaluation", "of", "figures", "chosen"])
    return report.Section("Figures", body + report.table(others))


def _of_training_on_labels(results):
    """Yields rows of what results.json says of evaluations that train: name, what on, how good."""
    if "linear_eval" in results:
        yield "linear evaluation", FLAGS.train_split, "", _listed(results["linear_eval"], _CHOSEN)
    for task in ("finetune", "segmentation", "depth"):
        for name, found in results.get(task, {}).items():
            yield task, name, _listed(found, _JUDGED), _listed(found, _CHOSEN)
    step = results.get("evaluated_step", checkpoints.step_of(run.chosen_checkpoint()))
    for dataset, modes in results.get("transfer", {}).items():
        for mode, found in modes.items():
            if found["step"] == step:
                figures = f"{transfer.METRICS[found['metric']][1]} {_percent(found['value'])}"
                yield f"transfer, {mode}", dataset, figures, _listed(found, _CHOSEN)


def _listed(found, names):
    """Those of the figures that are there, in one text; accuracies in percent."""
    texts = {name: f"{found[name]:.3g}" for name in names if name in found}
    texts |= {name: _percent(found[name]) for name in ("top1", "top5", "miou") if name in texts}
    return ", ".join(f"{names[name]} {text}" for name, text in texts.items())


def _percent(share):
    return "" if share is None else f"{100 * share:.1f} %"


def _curves():
    metrics = training.read_metrics(run.folder() / "metrics.jsonl")
    if not metrics:
        return report.Section("Training", report.note("There is no metrics.jsonl to draw."))
    body, figure = report.curves(metrics)
    return report.Section("Training", body, report.figure_png(figure), "curves.png")


def _views():
    """View pairs as at the first step."""
    pairs = run.view_pairs(_VIEW_PAIRS, step=0)
    sheet = report.view_sheet(_at_most(pairs, _SIDE))
    text = (
        f"Images of {FLAGS.train_split} as the two networks see them, view 1 above view 2 of the "
        f"same image. Augmentation: {FLAGS.augmentation}."
    )
    image = report.png(sheet)
    alt = f"{len(pairs)} pairs of augmented views"
    body = report.note(text) + report.picture(image, alt, "views")
    return report.Section("View pairs", body, image, "views.png")


def _at_most(images, side):
    """Images [..., S, S, C], made smaller if S is more than that."""
    *leading, size, _, channels = images.shape
    if size <= side:
        return images
    flat = images.reshape(-1, size, size, channels)
    small = tf.image.resize(flat, [side, side], "area").numpy().round().astype(np.uint8)
    return small.reshape(*leading, side, side, channels)


def _neighbours():
    """What is nearest to a few images of --eval_split, before training and after."""
    train, test = (run.source(split) for split in (FLAGS.train_split, FLAGS.eval_split))
    features = run.features("trained", FLAGS.eval_split)
    labels, class_names = _labels(), train.class_names
    queries = _queries(labels, len(features.vectors))
    encoders = {"random_init": "random"} if FLAGS.baselines else {}
    encoders["trained"] = "trained"
    found, same = {}, {}
    for what, name in encoders.items():
        known = run.features(what, FLAGS.train_split)
        asked = run.features(what, FLAGS.eval_split).vectors[queries]
        vectors, asked = evaluation.unit(known.vectors), evaluation.unit(asked)
        _, nearest = search.nearest(vectors, asked, _NEIGHBOURS)
        found[name] = _thumbnails(train, nearest)
        if labels is not None:
            same[name] = known.labels[nearest] == labels[queries][:, np.newaxis]
    if labels is None:
        titles = [features.names[i] for i in queries]
    else:
        titles = [class_names[label] for label in labels[queries]]
    body, figure = report.neighbours(_thumbnails(test, queries), found, titles, same)
    text = (
        f"Images of {FLAGS.eval_split}, on the left, and the {_NEIGHBOURS} of "
        f"{FLAGS.train_split} nearest by cosine, the nearest first: by the encoder "
        + ("as it was initialised (random), and trained." if FLAGS.baselines else "as trained.")
    )
    if labels is not None:
        text += " A frame: of the query's class."
    body = report.note(text) + body
    return report.Section("Nearest neighbours", body, report.figure_png(figure), "neighbours.png")


def _queries(labels, count):
    """Places of a few images, drawn by the seed, of as many classes as possible."""
    order = np.random.default_rng(FLAGS.seed).permutation(count)
    if labels is not None:
        _, first = np.unique(labels[order], return_index=True)
        first.sort()
        order = np.concatenate([order[first], np.delete(order, first)])
    return order[:_QUERIES]


def _map():
    """A map of images of --eval_split; the same images go to TensorBoard's projector."""
    features = run.features("trained", FLAGS.eval_split)
    source, labels = run.source(FLAGS.eval_split), _labels()
    count = len(features.vectors)
    if count < _LEAST_MAP:
        text = f"{FLAGS.eval_split} has too few images for a map ({count})."
        return report.Section("Map of the embeddings", report.note(text))
    rng = np.random.default_rng(FLAGS.seed)
    shown = rng.permutation(count)[:_MOST_MAP]
    vectors = features.vectors[shown]
    images = _thumbnails(source, shown)
    labels = labels[shown] if labels is not None else None
    classes = [source.class_names[label] for label in labels] if labels is not None else None
    logs = run.folder() / "tensorboard"
    with checkpoints.writing(logs):
        report.write_projector(logs, vectors, [features.names[i] for i in shown], images, classes)
    places = report.embedding_map(vectors, FLAGS.seed)
    figure, body = report.embedding_figure(places, images, labels, source.class_names)
    drawn = "all" if len(shown) == count else f"drawn by --seed of {count:,}"
    text = (
        f"{len(shown):,} images of {FLAGS.eval_split} ({drawn}), laid out by t-SNE of their "
        "embeddings: near means similar, distances and directions mean nothing else. Where there "
        "is room, the image stands for its point. TensorBoard's projector has the same images."
    )
    body = report.note(text) + body
    return report.Section("Map of the embeddings", body, report.figure_png(figure), "map.png")


def _confusion():
    if _labels() is None:
        text = "Left out, as there are images without labels."
        return report.Section("Confusion matrix", report.note(text))
    train, test = (run.features("trained", s) for s in (FLAGS.train_split, FLAGS.eval_split))
    class_names = run.source(FLAGS.train_split).class_names
    predictions = evaluation.knn_predictions(train, test)
    matrix = report.confusion_matrix(test.labels, predictions, len(class_names))
    accuracy = np.mean(predictions == test.labels)
    text = (
        f"Of the k-NN classifier (20 neighbours) on {FLAGS.eval_split}: {100 * accuracy:.1f} % "
        "right. A row is a class, its figures the percentages taken for each; 0 is left blank."
    )
    figure = report.confusion_figure(matrix, class_names)
    alt = f"Confusion matrix of {len(class_names)} classes, {100 * accuracy:.1f} % right"
    body = report.note(text) + report.figure_svg(figure, alt)
    body += report.table(report.most_confused(matrix, class_names), ["is", "taken for", "share"])
    return report.Section("Confusion matrix", body, report.figure_png(figure), "confusion.png")


def _setup():
    """The flags and the versions, as two sections."""
    given = workdir.own_flags()
    values = [(name, _text(FLAGS[name].value)) for name in sorted(given)]
    versions = workdir.read_results(FLAGS.workdir).get("versions") or workdir.versions()
    return (
        report.Section("Flags", report.folded(f"All {len(values)}", report.table(values))),
        report.Section("Versions", report.table(versions.items())),
    )


def _text(value):
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _labels():
    """The labels of --eval_split, or None if one there or in --train_split is missing."""
    train, test = (run.features("trained", s) for s in (FLAGS.train_split, FLAGS.eval_split))
    if run.source(FLAGS.train_split).class_names is None:
        return None
    return test.labels if min(train.labels.min(), test.labels.min()) >= 0 else None


def _thumbnails(source, places):
    """Small images [..., S, S, 3] of the images at these places [...] of a source."""
    side = min(_THUMBNAIL, FLAGS.image_size)
    images = report.as_rgb(views.images_at(source, np.ravel(places), side))
    return images.reshape(*np.shape(places), *images.shape[1:])
