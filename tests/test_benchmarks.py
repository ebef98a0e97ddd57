"""The benchmarks run, and write what they measured; how fast is not tested here."""

import json
import sys

import pytest

from benchmarks import measure

STEP = {"encoder": "resnet18", "stem": "small", "image_size": 8, "batch_size": 2, "steps": 1}
PIPELINE = {"image_size": 16, "batch_size": 4, "batches": 2}


@pytest.mark.slow
def test_workers_take_turns():
    shapes = {"dataset": "shapes", "data_dir": None, "split": "test[:8]", **PIPELINE}
    workers = [
        measure.ours("pipeline", "pipeline", shapes),
        measure.ours("step", "compiled_step", {**STEP, "with_update": True}),
        measure.ours("update", "target_update", STEP),
    ]
    results = measure.take_turns(workers, rounds=2)
    for rounds in results.values():
        assert len(rounds) == 2 and all(r["rate"] > 0 and r["peak_mb"] > 0 for r in rounds)


def test_a_worker_that_fails_is_named():
    worker = measure.ours("broken", "no such subject", {})
    with pytest.raises(SystemExit, match="broken failed"):
        measure.take_turns([worker], rounds=1)


def test_figures_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(sys, "argv", ["x", "--rounds=2"])
    measure.PAGE.write_text("before\n<!-- speed -->\nold\n<!-- end of speed -->\nafter\n")
    rounds = {
        "ours": [{"rate": 6.0, "peak_mb": 3.0}, {"rate": 4.0, "peak_mb": 5.0}],
        "theirs": [{"rate": 2.0, "peak_mb": 1.0}, {"rate": 2.0, "peak_mb": 1.0}],
    }
    rows = measure.summary(rounds, than="theirs")
    assert rows["ours"] == {
        "median": 5.0,
        "lowest": 4.0,
        "highest": 6.0,
        "peak_mb": 5.0,
        "ratio": 2.5,
    }
    measure.write("speed", "a race", "m/s", {"short": rows})
    page = measure.PAGE.read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert "| short: ours | 5 | 4 to 6 | 2.50 | 5 |" in page
    record = json.loads((tmp_path / "speed.json").read_text())
    assert record["results"]["short"]["theirs"]["median"] == 2.0
    assert record["command"] == "python -m benchmarks.speed --rounds=2"
