"""The report on the paper's claims, from made-up results."""

import pathlib

import pytest

from benchmarks import cifar10_claims

LINEAR = {
    "BYOL": (0.50, 0.60, 0.70),
    "tau = 1": (0.48, 0.59, 0.67),  # 2, 1 and 3 points less, though the seeds are far apart
    "tau = 0.9": (0.80, 0.80, 0.80),
    "tau = 0": (0.10, 0.70, 0.65),
    "no target": (0.55, 0.66, 0.77),
    "SimCLR": (0.50, 0.60, 0.70),
    "BYOL, batch 16": (0.49, 0.59, 0.68),
    "SimCLR, batch 16": (0.40, 0.50, 0.61),
    "BYOL, no colour": (0.40, 0.50, 0.60),
    "SimCLR, no colour": (0.40, 0.50, 0.60),
}


@pytest.fixture
def results():
    """Of three seeds; tau = 0 has collapsed in two."""
    spreads = {"tau = 0": (0.01, 0.049, 0.3)}
    return {
        name: [
            {
                "probe_top1": accuracy,
                "knn_top1": accuracy / 2,
                "projection_std": spread,
                "effective_rank": 3.0,
            }
            for accuracy, spread in zip(accuracies, spreads.get(name, (0.9,) * 3))
        ]
        for name, accuracies in LINEAR.items()
    }


def test_table(results):
    lines = list(cifar10_claims.table(results))
    assert lines[0].startswith("Mean over 3 seeds")
    assert [line.split(" | ")[0] for line in lines[4:]] == [f"| {name}" for name in results]
    # The deviation of 50, 60 and 70 over the root of 3, and half of it.
    assert lines[4] == "| BYOL | 60.0 ± 5.8 | 30.0 ± 2.9 | 0.90 ± 0.00 | 3.00 ± 0.00 |"


def test_claims(results):
    lines = list(cifar10_claims.claims(results))
    start = lines.index("|---|---|---|") + 1
    cells = [line.strip("| ").split(" | ") for line in lines[start : start + 5]]
    assert [cell[1:] for cell in cells] == [
        ["11.7 ± 14.8", "does not show"],
        ["2.0 ± 0.6", "shows"],
        ["-6.0 ± 0.6", "does not show: the contrary does"],
        ["8.3 ± 0.7", "shows"],
        ["0.0 ± 0.0", "does not show"],
    ]
    assert "0.996" in cells[0][0] and "tau = 0" in cells[0][0]
    assert "BYOL, losing 1.3, loses less than SimCLR, losing 9.7" in cells[3][0]
    assert "tau = 0: 2 of 3 runs collapsed (projection_std at the end 0.120" in lines[-2]
    assert "no target: 0 of 3 runs collapsed" in lines[-1]


def test_plot(results, tmp_path):
    pytest.importorskip("matplotlib")
    cifar10_claims.plot(results, tmp_path / "claims.png")
    assert (tmp_path / "claims.png").read_bytes().startswith(b"\x89PNG")


def test_folders_of_runs():
    names = [
        cifar10_claims.run_folder(pathlib.Path("runs"), name, 1).name
        for name in ("BYOL", "tau = 0.9", "SimCLR, batch 16", "no target")
    ]
    assert names == ["byol-seed1", "tau_0.9-seed1", "simclr_batch_16-seed1", "no_target-seed1"]
