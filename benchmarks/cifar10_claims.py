"""The paper's qualitative claims on a part of CIFAR-10, with seeds and standard errors.

    python -m benchmarks.cifar10_claims --data_dir=../shared/tfds --workdir=runs/claims

Every run is one of `main.py` in a folder of its own below --workdir, one a core at a time.
The same command again goes on where it was stopped; what is finished is taken as it is, so
other --extra flags need another --workdir. Writes claims.json, claims.md and claims.png there.
Needs `pip install -r benchmarks/requirements.txt`.
"""

import collections
import concurrent.futures
import datetime
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
from absl import app, flags

FLAGS = flags.FLAGS
ROOT = pathlib.Path(__file__).parent.parent
SIMCLR = "--flagfile=flags/ablation/simclr.flags"
SMALL_BATCH = "--accumulation_steps=4"  # batch norm and negative pairs see 16 images of 64
NO_COLOR = "--flagfile=flags/ablation/augmentation_no_color.flags"
SETTINGS = {
    "BYOL": [],
    "tau = 1": ["--flagfile=flags/ablation/tau_1.flags"],
    "tau = 0.9": ["--flagfile=flags/ablation/tau_0.9.flags"],
    "tau = 0": ["--flagfile=flags/ablation/tau_0.flags"],
    "no target": ["--flagfile=flags/ablation/no_target.flags"],
    "SimCLR": [SIMCLR],
    "BYOL, batch 16": [SMALL_BATCH],
    "SimCLR, batch 16": [SIMCLR, SMALL_BATCH],
    "BYOL, no colour": [NO_COLOR],
    "SimCLR, no colour": [SIMCLR, NO_COLOR],
}


def define_flags():
    """Only where this is the program: main.py has flags of the same names."""
    flags.DEFINE_string("data_dir", None, "Folder of TFDS's prepared cifar10.", required=True)
    flags.DEFINE_string("workdir", "runs/claims", "Folder of the runs and of what is made of them.")
    flags.DEFINE_integer("seeds", 3, "Runs of each setting.", lower_bound=2)
    flags.DEFINE_integer(
        "jobs", os.cpu_count(), "Runs at a time, each on a core of its own.", lower_bound=1
    )
    flags.DEFINE_list("extra", [], "More flags for every run, as in --extra=--epochs=2.")


def main(argv):
    del argv
    folder = pathlib.Path(FLAGS.workdir).resolve()
    jobs = [(name, seed) for seed in range(FLAGS.seeds) for name in SETTINGS]
    run_all(jobs, folder)
    results = collections.defaultdict(list)
    for name, seed in jobs:
        results[name].append(read_result(run_folder(folder, name, seed)))
    (folder / "claims.json").write_text(json.dumps(results, indent=2) + "\n")
    report = "\n".join([*table(results), "", *claims(results)]) + "\n"
    (folder / "claims.md").write_text(report)
    plot(results, folder / "claims.png")
    print(report)


def run_folder(folder, name, seed):
    slug = "".join(c if c.isalnum() or c == "." else "_" for c in name.replace(" = ", "_"))
    return folder / f"{slug.replace('__', '_').lower()}-seed{seed}"


def read_result(workdir):
    """Accuracies of a finished run, and how its last line of metrics was; None if unfinished."""
    path = workdir / "results.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    if result.get("probe_top1") is None:
        return None
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    figures = {name: result[name] for name in ("probe_top1", "knn_top1")}
    return figures | {name: last[name] for name in ("projection_std", "effective_rank")}


# The runs ---------------------------------------------------------------------------------


def run_all(jobs, folder):
    """Does the runs that are not done yet, --jobs at a time."""
    todo = [job for job in jobs if read_result(run_folder(folder, *job)) is None]
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished before", flush=True)
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(FLAGS.jobs, initializer=core_taker()) as pool:
        futures = {pool.submit(run, folder, *job): job for job in todo}
        try:
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                result = future.result()
                name, seed = futures[future]
                left = (time.perf_counter() - begin) / done * (len(todo) - done)
                print(
                    f"[{done}/{len(todo)}] {name}, seed {seed}: linear probe "
                    f"{100 * result['probe_top1']:.1f} %, k-NN {100 * result['knn_top1']:.1f} %; "
                    f"about {datetime.timedelta(seconds=round(left))} left",
                    flush=True,
                )
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            print(f"{error or 'interrupted'}; awaiting the runs under way", flush=True)
            raise


def core_taker():
    """Function that gives the thread that calls it, and so its runs, the next core."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
    return lambda: os.sched_setaffinity(0, {next(cores)})


def run(folder, name, seed):
    """One run of main.py; goes on where it was stopped."""
    workdir = run_folder(folder, name, seed)
    workdir.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "main.py", "--flagfile=flags/reproduce/cifar10_claims.flags"),
        *(f"--data_dir={pathlib.Path(FLAGS.data_dir).resolve()}", f"--seed={seed}"),
        *(f"--workdir={workdir}", *SETTINGS[name], *FLAGS.extra),
    ]
    with (workdir / "log.txt").open("a") as log:
        status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log).returncode
    result = read_result(workdir)
    if status or result is None:
        raise SystemExit(f"error: {name}, seed {seed}: main.py failed: see {workdir / 'log.txt'}")
    return result


# What comes of them -----------------------------------------------------------------------


def mean_and_error(values):
    """Mean and its standard error."""
    return np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values))


def percents(runs, figure="probe_top1"):
    """An accuracy of every run in %, float [seeds]."""
    return np.array([100 * run[figure] for run in runs])


def table(results):
    """Lines of Markdown: every setting's accuracies, spread and rank, +- standard error."""
    yield f"Mean over {len(results['BYOL'])} seeds ± standard error."
    yield ""
    yield "| | linear probe, % | k-NN, % | projection_std | effective rank |"
    yield "|---|---|---|---|---|"
    for name, runs in results.items():
        cells = [mean_and_error(percents(runs, f)) for f in ("probe_top1", "knn_top1")]
        cells += [
            mean_and_error([r[f] for r in runs]) for f in ("projection_std", "effective_rank")
        ]
        accuracies = [f"{mean:.1f} ± {error:.1f}" for mean, error in cells[:2]]
        others = [f"{mean:.2f} ± {error:.2f}" for mean, error in cells[2:]]
        yield f"| {name} | {' | '.join(accuracies + others)} |"


def claims(results):
    """Lines of Markdown: each claim as a difference by linear probe, and who collapsed."""
    accuracy = {name: percents(runs) for name, runs in results.items()}
    yield "A claim is a difference in points by linear probe, taken seed by seed. It shows where the"
    yield "mean is more than two standard errors above 0: with few seeds a rule of thumb, no test."
    yield ""
    yield "| claim | difference | |"
    yield "|---|---|---|"
    for other in ("tau = 0", "tau = 1", "no target"):
        text = f"(a) BYOL, whose tau begins at 0.996, is better than {other}"
        yield claim(text, accuracy["BYOL"] - accuracy[other])
    for letter, change in (("b", "batch 16"), ("c", "no colour")):
        byol, simclr = (accuracy[m] - accuracy[f"{m}, {change}"] for m in ("BYOL", "SimCLR"))
        text = (
            f"({letter}) {change}: BYOL, losing {byol.mean():.1f}, loses less than SimCLR, losing"
        )
        yield claim(f"{text} {simclr.mean():.1f}", simclr - byol)
    yield ""
    yield from collapses(results)


def claim(text, differences):
    """A line of the table: whether the differences of the seeds, float [seeds], are above 0."""
    mean, error = mean_and_error(differences)
    if abs(mean) <= 2 * error:
        verdict = "does not show"
    else:
        verdict = "shows" if mean > 0 else "does not show: the contrary does"
    return f"| {text} | {mean:.1f} ± {error:.1f} | {verdict} |"


def collapses(results):
    """Lines of Markdown: how many of the runs that collapse in the paper did so here."""
    from byol_tf.training import COLLAPSED_STD  # loads TensorFlow: not beside the runs

    for name in ("tau = 0", "no target"):
        spreads = [run["projection_std"] for run in results[name]]
        count = sum(spread < COLLAPSED_STD for spread in spreads)
        mean, error = mean_and_error(spreads)
        yield (
            f"* (a) {name}: {count} of {len(spreads)} runs collapsed (projection_std at the end "
            f"{mean:.3f} ± {error:.3f}; collapsed is below {COLLAPSED_STD})."
        )


def plot(results, path):
    """Three panels, one a claim; every seed is a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True, layout="constrained")
    names = ["tau = 0", "tau = 0.9", "BYOL", "tau = 1", "no target"]
    draw(axes[0], "BYOL", names, results, "tab:blue")
    axes[0].set_xticks(range(len(names)), ["0", "0.9", "0.996", "1", "no\ntarget"])
    axes[0].set(title="(a) target", xlabel="tau of the first step", ylabel="linear probe, top-1 %")
    panels = {"(b) batch": ("64", "16"), "(c) augmentation": ("paper's", "without colour")}
    for axis, change, (title, ticks) in zip(axes[1:], ("batch 16", "no colour"), panels.items()):
        draw(axis, "BYOL", ["BYOL", f"BYOL, {change}"], results, "tab:blue")
        draw(axis, "SimCLR", ["SimCLR", f"SimCLR, {change}"], results, "tab:orange")
        axis.set(title=title, xlim=(-0.3, 1.3))
        axis.set_xticks([0, 1], ticks)
        axis.legend()
    figure.savefig(path, dpi=150)


def draw(axis, label, names, results, color):
    """Means with their standard errors, and a dot a seed."""
    means, errors = zip(*(mean_and_error(percents(results[name])) for name in names))
    axis.errorbar(range(len(names)), means, errors, label=label, color=color, marker="o", capsize=4)
    for x, name in enumerate(names):
        values = percents(results[name])
        axis.scatter([x] * len(values), values, color=color, alpha=0.4, s=12)


if __name__ == "__main__":
    define_flags()
    app.run(main)
