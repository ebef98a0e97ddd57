"""Transfer to other classification tasks: linear and fine-tuned (section 4, appendix D)."""

import dataclasses
import itertools
import pathlib

import numpy as np

from byol_tf.classifier import binary_loss_and_accuracy, loss_and_accuracy
from byol_tf.data import crop, subset
from byol_tf.data.source import Source, load_source
from byol_tf.errors import UserError
from byol_tf.evaluation import Features, extract_features, feature_extractor
from byol_tf.finetune import FineTuned
from byol_tf.keras_api import keras
from byol_tf.linear_eval import fit_by_sgd

REGULARIZATIONS = np.logspace(-6, 5, 45)
LEARNING_RATES = tuple(10 ** (i / 2 - 4) for i in range(7))  # 0.0001 to 0.1
WEIGHT_DECAYS = (0.0, *(10 ** (i / 2 - 6) for i in range(7)))  # none, and 1e-6 to 1e-3
_LBFGS = {"maxiter": 1000, "gtol": 3e-3, "ftol": 1e-9}  # nats, as the variables are scaled


@dataclasses.dataclass(frozen=True)
class TransferSet:
    """One data set of table 10.

    Attributes:
      name: that of TFDS, or of a folder of images.
      metric: of `METRICS`.
      validation: the split to choose by, or else the share of the training images that is held
        out for it.
      test: the split to judge by; None: "test", or else "validation".
      multi_label: as of `load_source`.
    """

    name: str
    metric: str = "top1"
    validation: str | float = 0.1
    test: str | None = "test"
    multi_label: bool = False


# Of what is held out table 10 gives the counts.
SETS = (
    TransferSet("food101", validation=7575 / 75750, test="validation"),
    TransferSet("cifar10", validation=5000 / 50000),
    TransferSet("cifar100", validation=5067 / 50000),
    TransferSet("birdsnap", validation=4981 / 47386),
    TransferSet("sun397/standard-part1-120k", validation=3970 / 19850),
    TransferSet("cars196", validation=1650 / 8144),
    TransferSet("fgvc_aircraft", "mean_per_class", "validation"),
    TransferSet("voc/2007", "map11", "validation", multi_label=True),
    TransferSet("dtd", validation="validation"),
    TransferSet("oxford_iiit_pet", "mean_per_class", 740 / 3680),
    TransferSet("caltech101", "mean_per_class", 510 / 3060),
    TransferSet("oxford_flowers102", "mean_per_class", "validation"),
)
NOT_IN_TFDS = ("birdsnap", "fgvc_aircraft")


@dataclasses.dataclass(frozen=True)
class Parts:
    """The sources of a data set: `both` is `train` and `validation`, to learn from in the end."""

    train: Source
    validation: Source
    both: Source
    test: Source


def find_set(name):
    """The `TransferSet` of a name, with or without its configuration ("sun397", "voc").

    Of what is no set of the paper: top-1, and a tenth of the training images held out.
    """
    for known in SETS:
        if name in (known.name, known.name.split("/")[0]):
            return known
    return TransferSet(name, test=None)


def load_set(chosen, data_dir=None, *, channels=3, seed=0):
    """Opens a data set.

    Args:
      chosen: a `TransferSet`.
      data_dir: the folder of TFDS's prepared data sets (None for `~/tensorflow_datasets`). If
        its folder of the set's name has one called "train", it is read as by "image_folder".
      channels: of the images, as of `load_source`.
      seed: int, of the draw of the held-out images, class by class.

    Returns: `Parts`.

    Raises:
      UserError: if the set or one of its splits cannot be read, or an image has no label.
    """
    folder = pathlib.Path(data_dir or "~/tensorflow_datasets").expanduser() / chosen.name
    is_folder = (folder / "train").is_dir()
    if is_folder and chosen.multi_label:
        raise UserError(
            f"{chosen.name}: an image of it has several labels, which the folders in {folder} "
            "cannot tell: prepare it with TFDS."
        )
    if chosen.name in NOT_IN_TFDS and not is_folder:
        raise UserError(
            f"{chosen.name} is not in TFDS: put its images into {folder}, as train/CLASS/ and "
            f"test/CLASS/{' and validation/CLASS/' if chosen.validation == 'validation' else ''}."
        )

    def split(name):
        if is_folder:
            source = load_source("image_folder", name, str(folder), channels)
        else:
            source = load_source(
                chosen.name,
                name,
                data_dir,
                channels,
                multi_label=chosen.multi_label,
                flag="transfer",
            )
        if source.class_names is None or (
            not chosen.multi_label and subset.read_labels(source).min() < 0
        ):
            raise UserError(f"{chosen.name}: split {name!r} has images without labels.")
        return source

    train = split("train")
    if isinstance(chosen.validation, str):
        validation = split(chosen.validation)
        parts = train, validation, subset.joined(train, validation)
    else:
        parts = *_hold_out(train, chosen.validation, seed), train
    return Parts(*parts, split(chosen.test) if chosen.test else _test_or_validation(split))


def _hold_out(source, share, seed):
    """Two parts of a source, the second with this share of the images."""
    labels = subset.read_labels(source)
    count = max(1, round(share * len(labels)))
    training = subset.stratified(labels, len(labels) - count, seed)
    held_out = np.setdiff1d(np.arange(len(labels)), training)
    return subset.subset(source, training), subset.subset(source, held_out)


def _test_or_validation(split):
    try:
        return split("test")
    except UserError:
        return split("validation")


# How it is judged ----------------------------------------------------------------------------


def top1(scores, labels):
    """Share of the images whose best score is that of their class, a float.

    Args: scores: float [N, K]. labels: int [N].
    """
    return float(np.mean(scores.argmax(1) == labels))


def mean_per_class(scores, labels):
    """Top-1 accuracy of each class that there is, and of these the mean (appendix D.1); as `top1`."""
    correct = scores.argmax(1) == labels
    return float(np.mean([correct[labels == label].mean() for label in np.unique(labels)]))


def map11(scores, labels):
    """11-point mean average precision of PASCAL VOC (Everingham et al. 2010; appendix D.1).

    Of each class the images are ranked by score. At recalls 0, 0.1, ... 1 counts the best
    precision at that recall or a higher one. As in VOC's development kit, images with label -1
    ("difficult") are passed over. Classes that no image shows are left out.

    Args: scores: float [N, K]. labels: int [N, K]; 1: there, 0: not, -1: not judged.

    Returns: a float in [0, 1].
    """
    return float(np.mean([_ap11(s, y) for s, y in zip(scores.T, labels.T) if (y == 1).any()]))


def _ap11(scores, labels):
    ranked = labels[np.argsort(-scores, kind="stable")]
    ranked = ranked[ranked >= 0]
    found = np.cumsum(ranked)
    precision = found / np.arange(1, len(ranked) + 1)
    # In whole numbers, so that a recall of 0.3 is one.
    return np.mean([precision[10 * found >= tenth * found[-1]].max() for tenth in range(11)])


METRICS = {
    "top1": (top1, "top-1"),
    "mean_per_class": (mean_per_class, "mean per class"),
    "map11": (map11, "11-point mAP"),
}


# Linear --------------------------------------------------------------------------------------


def extract_parts(encoder, parts, image_size):
    """`Features` of train, validation and test: the whole shorter side, centred (appendix D.2)."""
    return [
        extract_features(encoder, source, image_size=image_size, fraction=1.0)
        for source in (parts.train, parts.validation, parts.test)
    ]


def linear_transfer(train, validation, test, metric="top1", *, regularizations=REGULARIZATIONS):
    """Transfer by logistic regression on frozen features (appendix D.2).

    The regularisation that is best on the validation images, the strongest of equal ones, is that
    of a second fit, to training and validation images, which the test images judge.

    Args:
      train, validation, test: `Features`; labels int [N], or [N, K] as of `map11`, for which each
        class has a logistic regression of its own.
      metric: of `METRICS`.
      regularizations: floats, as of `logistic_path`.

    Returns: a dict of "value", the metric of the test images in [0, 1]; "l2", the one chosen;
      "validation", a dict from each regularisation, a string, to the metric.
    """
    measure, _ = METRICS[metric]
    both = Features(
        np.concatenate([train.vectors, validation.vectors]),
        np.concatenate([train.labels, validation.labels]),
        train.names + validation.names,
    )
    num_classes = int(both.labels.max()) + 1  # what is in no training image is never guessed
    values = {
        l2: measure(validation.vectors @ kernel + bias, validation.labels)
        for l2, kernel, bias in logistic_path(train, num_classes, regularizations)
    }
    best = max(values, key=values.get)  # the first of equal ones
    ((_, kernel, bias),) = logistic_path(both, num_classes, [best])
    return {
        "value": measure(test.vectors @ kernel + bias, test.labels),
        "l2": float(best),
        "validation": {f"{l2:.3g}": value for l2, value in values.items()},
    }


def logistic_path(features, num_classes, regularizations):
    """L2-regularised logistic regressions, from the strongest regularisation to the weakest.

    Each minimises, over the kernel W and a free bias, the sum of the images' cross-entropies plus
    l2 * ||W||^2 (as Kornblith's published code does it; scikit-learn's C is 1 / (2 l2)). By L-BFGS, from
    the solution before. The features are turned to their principal axes, which the norm does not
    see, and each weight is scaled by its curvature at the start, so that it takes few
    iterations.

    Args:
      features: `Features`; labels int [N] for multinomial regression, or [N, K] as of `map11`.
      num_classes: int, of labels [N].
      regularizations: floats above 0.

    Yields: l2, kernel, float [D, K], and bias, float [K], for the features as they are.
    """
    import scipy.optimize  # slow to import

    mean = features.vectors.mean(0)
    centred = features.vectors - mean
    _, axes = np.linalg.eigh(centred.T @ centred)
    turned = centred @ axes
    if features.labels.ndim == 1:
        cross_entropy, targets = _cross_entropy, np.eye(num_classes, dtype=np.float32)
        targets = targets[features.labels]
    else:
        cross_entropy, targets = _binary_cross_entropy, features.labels
    classes = targets.shape[1]
    spread = np.square(turned, dtype=np.float64).sum(0)
    curvature = np.append(len(turned), spread)[:, np.newaxis] / classes  # the bias first
    weights = np.zeros((1 + len(mean), classes))
    for l2 in sorted(regularizations, reverse=True):
        penalty = np.append(0.0, np.full(len(mean), l2))[:, np.newaxis]
        scale = 1 / np.sqrt(curvature + 2 * penalty)

        def objective(scaled):
            weights = scaled.reshape(-1, classes) * scale
            narrow = weights.astype(np.float32)
            loss, errors = cross_entropy(turned @ narrow[1:] + narrow[0], targets)
            gradient = np.concatenate([errors.sum(0, keepdims=True), turned.T @ errors])
            gradient = (gradient + 2 * penalty * weights) * scale
            return loss + np.sum(penalty * np.square(weights)), gradient.ravel()

        found = scipy.optimize.minimize(
            objective, (weights / scale).ravel(), jac=True, method="L-BFGS-B", options=_LBFGS
        )
        weights = found.x.reshape(weights.shape) * scale
        kernel = axes @ weights[1:]
        yield l2, kernel, weights[0] - mean @ kernel


def _cross_entropy(logits, targets):
    """The sum of the cross-entropies, and its gradient of the logits, float [N, K]."""
    from scipy import special

    log_probabilities = special.log_softmax(logits, 1)
    loss = -np.sum(targets * log_probabilities, dtype=np.float64)
    return loss, np.exp(log_probabilities) - targets


def _binary_cross_entropy(logits, labels):
    """The same where each class is a yes (1) or no (0) of its own, or does not count (-1)."""
    from scipy import special

    signs = np.where(labels > 0, 1, -1).astype(np.float32)
    known = labels >= 0
    loss = -np.sum(special.log_expit(signs * logits) * known, dtype=np.float64)
    return loss, -signs * special.expit(-signs * logits) * known


# Fine-tuned ----------------------------------------------------------------------------------


def finetune_transfer(
    encoder,
    parts,
    metric="top1",
    *,
    image_size,
    learning_rates=LEARNING_RATES,
    weight_decays=WEIGHT_DECAYS,
    steps=20_000,
    batch_size=256,
    min_crop_area=crop.AREA_RANGE[0],
    seed=0,
    verbose=2,
):
    """Transfer by fine-tuning (appendix D.3).

    Encoder and a new linear classifier learn by `linear_eval.fit_by_sgd`, always from the same
    start. The rate and the weight decay that are best on the validation images are those of a
    last training, from training and validation images, which the test images judge. Batch
    statistics move with momentum max(1 - 10 / s, 0.9) at s steps an epoch.

    Args:
      encoder: a `keras.Model` from images [B, H, W, C] to a vector [B, D]; it ends with the weights
        of the last training.
      parts: `Parts`.
      metric: of `METRICS`.
      image_size, steps, batch_size, min_crop_area, seed, verbose: as of `linear_eval.fit_by_sgd`.
      learning_rates: floats.
      weight_decays: floats; over the learning rate, each is the L2 coefficient of all weights but
        biases and batch norm's.

    Returns: a dict of "value", the metric of the test images in [0, 1]; "learning_rate" and
      "weight_decay", those chosen; "validation", a dict from each rate to a dict from each decay, both
      strings, to the metric. What diverged has 0.
    """
    measure, _ = METRICS[metric]
    loss = binary_loss_and_accuracy if metric == "map11" else loss_and_accuracy
    model = FineTuned(encoder, len(parts.train.class_names), loss_and_accuracy=loss)
    start = model.get_weights()
    scores_of_validation, scores_of_test = (
        feature_extractor(model, source, image_size=image_size)
        for source in (parts.validation, parts.test)
    )

    def train_and_judge(rate, decay, source, scores):
        if verbose:
            print(f"fine-tuning at learning rate {rate:.2g}, weight decay {decay:.2g}", flush=True)
        model.set_weights(start)
        model.weight_decay = decay / rate
        _set_momentum(encoder, max(1, source.num_examples // batch_size))
        fit_by_sgd(
            model,
            source,
            learning_rate=rate,
            image_size=image_size,
            steps=steps,
            batch_size=batch_size,
            min_crop_area=min_crop_area,
            seed=seed,
            verbose=verbose,
        )
        found = scores()
        return measure(found.vectors, found.labels) if np.isfinite(found.vectors).all() else 0.0

    values = {
        settings: train_and_judge(*settings, parts.train, scores_of_validation)
        for settings in itertools.product(learning_rates, weight_decays)
    }
    best = max(values, key=values.get)
    return {
        "value": train_and_judge(*best, parts.both, scores_of_test),
        "learning_rate": best[0],
        "weight_decay": best[1],
        "validation": {
            f"{rate:.3g}": {f"{decay:.3g}": values[rate, decay] for decay in weight_decays}
            for rate in learning_rates
        },
    }


def _set_momentum(encoder, steps_per_epoch):
    """That of the batch statistics, which the next `compile` takes up."""
    for layer in encoder.submodules:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = max(1 - 10 / steps_per_epoch, 0.9)
