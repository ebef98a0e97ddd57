"""A run to look at: figures, one HTML page with all of them, and TensorBoard's projector.

Figures are drawn once, by matplotlib, for two uses: as PNG files on white, and inside the page
as SVG, whose colours are those of the page, light or dark. All images are uint8.
"""

import base64
import dataclasses
import functools
import html
import io
import re

import numpy as np
import tensorflow as tf

from byol_tf import evaluation
from byol_tf.workdir import write_bytes, write_text

# Of the light page; in an SVG each becomes the variable of that name, which has a dark value too.
_COLOURS = {"ink": "#1c2127", "muted": "#59636e", "grid": "#d4dae0", "accent": "#0072b2"}
_STYLE = {
    "axes.edgecolor": _COLOURS["grid"],
    "axes.labelcolor": _COLOURS["muted"],
    "axes.prop_cycle": f"cycler('color', ['{_COLOURS['accent']}'])",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "font.size": 10,
    "grid.color": _COLOURS["grid"],
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "byol_tf",  # the same file for the same run
    "text.color": _COLOURS["ink"],
    "xtick.color": _COLOURS["grid"],
    "xtick.labelcolor": _COLOURS["muted"],
    "ytick.color": _COLOURS["grid"],
    "ytick.labelcolor": _COLOURS["muted"],
}
_PANEL = (4.2, 2.5)  # inches of a chart: one beside the other on a desktop, all of a phone's width
_CURVES = {  # of metrics.jsonl: title and unit
    "loss": ("Loss, all parts", ""),
    "prediction_loss": ("BYOL's loss (0 to 8)", ""),
    "contrastive_loss": ("Contrastive loss", ""),
    "projection_std": ("Spread of the projections", "1: healthy, 0: collapsed"),
    "effective_rank": ("Effective rank of the features", "directions"),
    "knn_top1": ("k-NN accuracy", "share of images"),
    "classifier_accuracy": ("Accuracy of the watching classifier", "share of images"),
    "classifier_loss": ("Loss of the watching classifier", "nats"),
    "learning_rate": ("Learning rate", ""),
    "target_ema": ("EMA rate τ of the target network", ""),
    "images_per_second": ("Throughput since the start", "images/s"),
}
_CURVE_POINTS = 400
# Okabe and Ito's, which the colour-blind tell apart; grey in place of black, for dark pages. With
# the markers they are enough for 32 classes.
_CLASS_COLOURS = "#0072b2 #e69f00 #009e73 #d55e00 #56b4e9 #cc79a7 #f0e442 #8a8a8a".split()
_MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆"}
_WRITTEN_CELLS = 30  # classes up to which the confusion matrix has figures and names
_MAP_THUMBNAIL = 1 / 14  # of the map's side
_MAP_SIDE = 8  # inches
_SPRITE = 32  # pixels of a thumbnail of the projector

CSS = """
:root { color-scheme: light dark; --ink: #1c2127; --muted: #59636e; --grid: #d4dae0;
  --accent: #0072b2; --page: #fff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --muted: #a3adb7; --grid: #3a424a;
  --accent: #56b4e9; --page: #14171a; --card: #1d2226; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--grid);
  padding-top: 1rem; }
p { max-width: 46rem; margin: .5rem 0; }
.note { color: var(--muted); font-size: .925rem; }
.panels { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.panels > * { background: var(--card); border-radius: .5rem; padding: .5rem; max-width: 32rem; }
.scroll { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
img { display: block; max-width: 100%; height: auto; border-radius: .25rem; }
img.map { width: min(100%, 48rem); }
img.views { width: min(100%, 48rem); image-rendering: pixelated; }
table { border-collapse: collapse; font-size: .925rem; margin: .75rem 0; }
th, td { text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--grid);
  vertical-align: top; }
td + td { overflow-wrap: anywhere; min-width: 4rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; }
summary { cursor: pointer; padding: .5rem 0; }
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
      title: of the part, plain text.
      body: its HTML.
      png: the same as a file, or None.
      file: the name of that file.
    """

    title: str
    body: str
    png: bytes | None = None
    file: str | None = None


# Images -------------------------------------------------------------------------------


def as_rgb(images):
    """Images of any channels, [..., C], to look at, [..., 3].

    One channel is grey, of more than three the first three are shown, of two the mean.
    """
    channels = images.shape[-1]
    if channels == 2:
        images = images.mean(-1, keepdims=True).astype(np.uint8)
    return np.repeat(images, 3, -1) if channels < 3 else images[..., :3]


def sheet(images, columns, gap=0):
    """Images [N, H, W, 3] in rows: [rows * (H + gap) - gap, columns * (W + gap) - gap, 3]."""
    rows = -(-len(images) // columns)
    padded = np.pad(images, ((0, rows * columns - len(images)), (0, gap), (0, gap), (0, 0)))
    _, height, width, _ = padded.shape
    tiles = padded.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    whole = tiles.reshape(rows * height, columns * width, 3)
    return whole[: len(whole) - gap, : whole.shape[1] - gap]


def view_sheet(pairs):
    """View pairs [N, 2, S, S, C] in rows of eight: view 1 above view 2. uint8 [H, W, 3]."""
    stacked = np.concatenate([pairs[:, 0], pairs[:, 1]], axis=1)
    return sheet(as_rgb(stacked), min(8, len(pairs)), gap=max(2, pairs.shape[2] // 16))


def png(image):
    """The PNG of an array [H, W, 3], as bytes."""
    return tf.io.encode_png(image).numpy()


# Figures ------------------------------------------------------------------------------


def _styled(function):
    """Runs a function that draws, or saves what is drawn, in the style of the report."""

    @functools.wraps(function)
    def styled(*args, **kwargs):
        import matplotlib  # slow to import

        with matplotlib.rc_context(_STYLE):
            return function(*args, **kwargs)

    return styled


def _figure(width, height, layout="constrained"):
    from matplotlib.figure import Figure

    return Figure((width, height), layout=layout)


@_styled
def figure_png(figure):
    """A matplotlib figure as a PNG on white, as bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, facecolor="white")
    return buffer.getvalue()


@_styled
def figure_svg(figure, alt):
    """A matplotlib figure as SVG for the page, in the page's colours.

    As wide as there is room, but from 3/4 of its size, below which it scrolls, to 5/4.

    Args: figure: a `matplotlib.figure.Figure`. alt: what it shows, in words.
    """
    width = 96 * figure.get_figwidth()  # in CSS pixels
    buffer = io.StringIO()
    # Of no date: the same run gives the same page.
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # once in a page, but no figure refers to them
    for name, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    limits = f"min-width:{0.75 * width:.0f}px;max-width:{1.25 * width:.0f}px"
    attributes = f'role="img" aria-label="{html.escape(alt)}" style="{limits}"'
    return f'<div class="scroll">{svg.replace("<svg", f"<svg {attributes}", 1)}</div>'


@_styled
def panels(draws, alts, size, columns):
    """The same small figures twice: each an SVG of the page, and all in one figure.

    Args:
      draws: functions that draw into the `matplotlib.axes.Axes` given.
      alts: what each shows, in words.
      size: width and height of one, in inches.
      columns: of the one figure.

    Returns: HTML, and a figure.
    """
    svgs = []
    for draw, alt in zip(draws, alts):
        figure = _figure(*size)
        draw(figure.subplots())
        svgs.append(figure_svg(figure, alt))
    rows = -(-len(draws) // columns)
    together = _figure(size[0] * columns, size[1] * rows)
    grid = list(together.subplots(rows, columns, squeeze=False).flat)
    for draw, axes in zip(draws, grid):
        draw(axes)
    for axes in grid[len(draws) :]:
        axes.set_axis_off()
    return f'<div class="panels">{"".join(svgs)}</div>', together


def series(metrics):
    """From the dicts of metrics.jsonl to one curve a figure, in the order of the report.

    Of a long run every point is the mean of several; what is not a finite number is left out.

    Returns: dict from name to steps and values, float arrays of at most 400.
    """
    points = {}
    for figures in metrics:
        for name, value in figures.items():
            number = isinstance(value, (int, float)) and np.isfinite(value)
            if number and name != "step":
                points.setdefault(name, []).append((figures["step"], value))
    order = [name for name in _CURVES if name in points]
    order += sorted(points.keys() - _CURVES.keys())
    return {name: _thinned(np.array(points[name], float)) for name in order}


def _thinned(points):
    parts = np.array_split(points, min(len(points), _CURVE_POINTS))
    return np.array([part.mean(0) for part in parts]).T


def curves(metrics):
    """The curves of `series`, as HTML and as one figure; see `panels`."""
    found = series(metrics)
    draws = [functools.partial(_draw_curve, name=n, points=p) for n, p in found.items()]
    alts = [
        f"{_CURVES.get(name, (name,))[0]}: from {values[0]:.4g} at step {steps[0]:.0f} "
        f"to {values[-1]:.4g} at step {steps[-1]:.0f}"
        for name, (steps, values) in found.items()
    ]
    return panels(draws, alts, _PANEL, columns=2)


def _draw_curve(axes, name, points):
    from matplotlib.ticker import EngFormatter, MaxNLocator

    title, unit = _CURVES.get(name, (name, ""))
    axes.plot(*points, marker="o" if points.shape[1] < 30 else None, markersize=3)
    axes.set_title(title, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def neighbours(queries, found, titles, same=None):
    """Queries, each beside its nearest images by several encoders, as HTML and as one figure.

    Args:
      queries: [Q, S, S, 3].
      found: dict from the name of an encoder to its neighbours, [Q, K, S, S, 3], nearest first.
      titles: of the queries.
      same: dict from the names to bool [Q, K]: who is of the query's class and gets a frame.

    Returns: HTML and a figure; see `panels`.
    """
    draws, alts = [], []
    for i, (query, title) in enumerate(zip(queries, titles)):
        rows = {name: images[i] for name, images in found.items()}
        marks = {name: same[name][i] if same else [False] * len(rows[name]) for name in rows}
        draws.append(
            functools.partial(_draw_neighbours, query=query, title=title, rows=rows, marks=marks)
        )
        counts = (f"{name}: {sum(marks[name])} of {len(rows[name])} of its class" for name in rows)
        alts.append(f"Nearest images of {title}" + ("; " + ", ".join(counts) if same else ""))
    return panels(draws, alts, (4.2, 0.33 + 0.53 * len(found)), columns=2)


def _draw_neighbours(axes, query, title, rows, marks):
    _show(axes, query, 0.5, len(rows) / 2)
    for row, (name, images) in enumerate(rows.items()):
        middle = len(rows) - row - 0.5
        axes.text(1.27, middle, name, rotation=90, ha="center", va="center", fontsize=8)
        for column, image in enumerate(images):
            _show(axes, image, 2 + column, middle, _COLOURS["accent"] * bool(marks[name][column]))
    axes.set_title(title, loc="left")
    axes.set(xlim=(0, 1.5 + len(images)), ylim=(0, len(rows)), aspect="equal")
    axes.set_axis_off()


def _show(axes, image, x, y, frame=None, size=0.9, **options):
    """An image with its middle at (x, y), in a frame of this colour."""
    from matplotlib.patches import Rectangle

    half = size / 2
    axes.imshow(image, extent=(x - half, x + half, y - half, y + half), **options)
    if frame:
        corner = (x - half, y - half)
        edge = {"edgecolor": frame, "linewidth": 2, "fill": False}
        axes.add_patch(Rectangle(corner, size, size, **edge, **options))


def embedding_map(vectors, seed=0):
    """Places in the plane by t-SNE (van der Maaten and Hinton 2008), neighbours by cosine.

    From the 50 principal components of the normalised vectors, at a perplexity of 30, or less
    with few images.

    Args: vectors: float [N, D], N at least 4. seed: of the random choices.

    Returns: float [N, 2], of which each column fills [0, 1].
    """
    from sklearn.decomposition import PCA  # slow to import
    from sklearn.manifold import TSNE

    unit = evaluation.unit(vectors)
    components = PCA(min(50, *vectors.shape), random_state=seed).fit_transform(unit)
    tsne = TSNE(
        perplexity=min(30.0, (len(vectors) - 1) / 3),
        init="random",  # PCA's would divide by 0 where all vectors are one
        random_state=seed,
    )
    places = tsne.fit_transform(components)
    places = places - places.min(0)
    return places / np.maximum(places.max(0), 1e-12)


@_styled
def embedding_figure(places, images, labels=None, class_names=None):
    """A map of images: a point each, and for as many as have room the image itself.

    Args:
      places: float [N, 2] in [0, 1].
      images: [N, S, S, 3].
      labels: int [N], or None.
      class_names: of the labels; with more than 32 of them the points have no colours.

    Returns: a figure with a legend, and HTML of the same with the legend as text.
    """
    styles = _class_styles(class_names) if labels is not None else None
    legend_height = 0.5 + 0.3 * -(-len(class_names) // 5) if styles else 0.0
    figure = _figure(_MAP_SIDE, _MAP_SIDE + legend_height, layout="none")
    axes = figure.add_axes(
        (0, 1 - _MAP_SIDE / figure.get_figheight(), 1, _MAP_SIDE / figure.get_figheight())
    )
    size = _MAP_THUMBNAIL
    for label in np.unique(labels) if styles else [None]:
        of = places if label is None else places[labels == label]
        marker, colour = styles[label] if styles else ("o", _COLOURS["muted"])
        name = class_names[label] if styles else None
        axes.scatter(*of.T, 24, colour, marker, label=name, edgecolors="#808080", linewidths=0.3)
    for i in _with_room(places, size):
        marker, colour = styles[labels[i]] if styles else (None, _COLOURS["muted"])
        _show(axes, images[i], *places[i], colour, size, zorder=2)
        if marker:
            corner = places[i] + [-size / 2, size / 2]
            axes.scatter(*corner, 40, colour, marker, edgecolors="#202020", zorder=3)
    axes.set(xlim=(-size, 1 + size), ylim=(-size, 1 + size), aspect="equal")
    axes.set_axis_off()
    alt = f"Map of {len(places)} images, similar ones near one another"
    markup = picture(_map_png(figure, legend_height), alt, "map")
    if styles:  # only now: it would go wherever the picture ends
        shown = [(*styles[label], class_names[label]) for label in np.unique(labels)]
        figure.legend(loc="lower center", ncols=5, frameon=False, title="t-SNE of the embeddings")
        legend = "".join(
            f'<li><span style="color:{colour}">{_MARKERS[marker]}</span> {html.escape(name)}</li>'
            for marker, colour, name in shown
        )
        markup = f'<ul class="legend">{legend}</ul>{markup}'
    return figure, markup


def _class_styles(class_names):
    """A marker and a colour a class, or None if there are too many to be told apart."""
    every = [(marker, colour) for marker in _MARKERS for colour in _CLASS_COLOURS]
    return every if len(class_names) <= len(every) else None


def _with_room(places, size):
    """Indices of places so chosen that squares of this size there do not overlap."""
    chosen = []
    for i, place in enumerate(places):
        if not chosen or np.abs(places[chosen] - place).max(1).min() >= size:
            chosen.append(i)
    return chosen


def _map_png(figure, legend_height):
    """The map without its legend, on no background, as bytes."""
    from matplotlib.transforms import Bbox

    inside = Bbox.from_bounds(0, legend_height, _MAP_SIDE, _MAP_SIDE)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, transparent=True, bbox_inches=inside)
    return buffer.getvalue()


def confusion_matrix(labels, predictions, num_classes):
    """Share of the images of each class (row) that are taken for each (column).

    Returns: float [num_classes, num_classes]; rows of classes without images are 0.
    """
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (labels, predictions), 1)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


@_styled
def confusion_figure(matrix, class_names):
    """A confusion matrix; up to 30 classes have their names and figures in percent."""
    classes = len(class_names)
    written = classes <= _WRITTEN_CELLS
    side = max(4.2, 1.3 + 0.36 * classes) if written else 6.0
    figure = _figure(side, side)
    axes = figure.subplots()
    # Half transparent: the figures are to be read in dark ink on white, and the other way round.
    shade = np.zeros((classes, classes, 4))
    shade[..., :3] = np.array([0x3B, 0x8E, 0xD0]) / 255
    shade[..., 3] = 0.7 * matrix / max(matrix.max(), 1e-12)
    axes.imshow(shade, interpolation="nearest")
    axes.set_title("Percentage of each class", loc="left")
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    if written:
        names = [name if len(name) <= 14 else f"{name[:13]}…" for name in class_names]
        axes.set_xticks(range(classes), names, rotation=90)
        axes.set_yticks(range(classes), names)
        for row, column in zip(*np.nonzero(np.round(100 * matrix))):
            share = f"{100 * matrix[row, column]:.0f}"
            axes.text(column, row, share, ha="center", va="center", fontsize=9)
    axes.tick_params(length=0)
    return figure


def most_confused(matrix, class_names, count=10):
    """Rows of a table, [class, taken for, share]: the largest off the diagonal, at most `count`."""
    off = matrix * (1 - np.eye(len(matrix)))
    places = np.argsort(-off, axis=None, kind="stable")[:count]
    pairs = [np.unravel_index(place, off.shape) for place in places]
    return [
        (class_names[i], class_names[j], f"{100 * off[i, j]:.1f} %") for i, j in pairs if off[i, j]
    ]


# The page -----------------------------------------------------------------------------


def picture(data, alt, kind):
    """An <img> that holds its PNG, given as bytes; `kind` is its class in the CSS."""
    data = base64.b64encode(data).decode()
    return f'<img class="{kind}" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def table(rows, header=()):
    """A <table> of rows of strings and numbers, which scrolls where it is too wide."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table>{head and f"<tr>{head}</tr>"}{body}</table></div>'


def _cell(value):
    if isinstance(value, float):
        return f'<td class="number">{value:,.4g}</td>'
    kind = ' class="number"' if isinstance(value, int) else ""
    return f"<td{kind}>{html.escape(str(value))}</td>"


def folded(summary, body):
    """HTML that shows only when its summary is clicked."""
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def note(text):
    """A paragraph of explanation."""
    return f'<p class="note">{html.escape(text)}</p>'


def page(title, subtitle, sections):
    """The whole HTML file: no scripts, and nothing that is loaded from elsewhere."""
    body = "".join(
        f"<section><h2>{html.escape(section.title)}</h2>{section.body}</section>"
        for section in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1>{note(subtitle)}{body}</main></body></html>\n"
    )


# TensorBoard --------------------------------------------------------------------------


def write_projector(folder, vectors, names, images, classes=None):
    """Writes what TensorBoard's projector shows, into a folder of event files.

    Args:
      folder: of the event files.
      vectors: float [N, D].
      names: of the images, N strings.
      images: [N, S, S, 3].
      classes: their names, N strings, or None.
    """
    from tensorboard.plugins import projector

    (folder / "projector").mkdir(parents=True, exist_ok=True)
    rows = ["\t".join(f"{value:.5g}" for value in vector) for vector in vectors]
    write_text(folder / "projector" / "vectors.tsv", "\n".join(rows) + "\n")
    names = [" ".join(name.split()) for name in names]
    if classes:  # only with two columns there is a header
        names = ["class\tname", *(f"{one}\t{name}" for one, name in zip(classes, names))]
    write_text(folder / "projector" / "metadata.tsv", "\n".join(names) + "\n")
    small = tf.image.resize(images, [_SPRITE, _SPRITE], "area").numpy().astype(np.uint8)
    columns = int(np.ceil(np.sqrt(len(images))))
    # TensorBoard wants a square.
    square = np.pad(small, ((0, columns**2 - len(small)), (0, 0), (0, 0), (0, 0)))
    write_bytes(folder / "projector" / "sprite.png", png(sheet(square, columns)))
    config = projector.ProjectorConfig()
    embedding = config.embeddings.add()
    embedding.tensor_name = "embeddings"
    embedding.tensor_path = "projector/vectors.tsv"
    embedding.metadata_path = "projector/metadata.tsv"
    embedding.sprite.image_path = "projector/sprite.png"
    embedding.sprite.single_image_dim.extend([_SPRITE, _SPRITE])
    projector.visualize_embeddings(str(folder), config)
