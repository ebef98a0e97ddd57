"""The benchmarks run, and write what they measured; how fast is not tested here."""

import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest

import byol_tf
from benchmarks import measure, soak, worker

STEP = {"encoder": "resnet18", "stem": "small", "image_size": 8, "batch_size": 2, "steps": 1}
PIPELINE = {"image_size": 16, "batch_size": 4, "batches": 2}


@pytest.mark.slow
def test_workers_take_turns():
    shapes = {"dataset": "shapes", "data_dir": None, "split": "test[:8]", **PIPELINE}
    workers = [
        measure.ours("pipeline", "pipeline", shapes),
        measure.ours("crops", "pipeline", {**shapes, "augment_on": "accelerator"}),
        measure.ours("step", "compiled_step", {**STEP, "with_update": True}),
        measure.ours("update", "target_update", STEP),
    ]
    results = measure.take_turns(workers, rounds=2)
    for rounds in results.values():
        assert len(rounds) == 2 and all(r["rate"] > 0 and r["peak_mb"] > 0 for r in rounds)


def test_a_worker_that_fails_is_named_and_the_others_end():
    waiting = measure.Worker("waiting", ["-c", "print('{}', flush=True); input(); input()"])
    broken = measure.Worker("broken", ["-c", "raise ValueError('no such thing')"])
    with pytest.raises(SystemExit, match="broken failed: ValueError: no such thing"):
        measure.take_turns([broken, waiting], rounds=1)
    assert waiting.process.poll() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_of_children_counts():
    alone = worker.peak_mb()
    code = "held = b'1' * 200_000_000; print(1, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as child:
        child.stdout.readline()
        assert 190 < worker.peak_mb() - alone < 300
        child.communicate(b"\n")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train_step", "--precisions=float16"], "float16"),
        (["train_step", "--rounds=0"], "rounds"),
        (["scaling", "extra"], "error: 'extra' is not a flag."),
        (["embed", "--photos=/nowhere"], "error: --photos=/nowhere: no class folders"),
        (
            ["embed", "--photos=.", "--peer_python=/nowhere"],
            "error: --peer_python=/nowhere: No such",
        ),
        (["copies", "--photos=.", "--model=/nowhere"], "error: --model=/nowhere: no SavedModel"),
        (["soak", "--extra=--encoder=vgg"], "error: main.py ended with code 1: error: flag --enc"),
        (["input_pipeline", "--photos=.", "--cifar10=/nowhere"], "error: --cifar10=/nowhere: no"),
    ],
)
def test_wrong_arguments_are_one_line(command, said):
    run = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:]],
        **{"cwd": measure.ROOT, "capture_output": True, "text": True},
    )
    assert run.returncode != 0 and said in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize("write", [True, False])
def test_figures_are_written_if_asked_for(tmp_path, monkeypatch, capsys, write):
    monkeypatch.setattr(measure, "FLAGS", types.SimpleNamespace(write=write))
    monkeypatch.setattr(measure, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(sys, "argv", ["x", "--rounds=2"])
    before = "before\n<!-- speed -->\nold\n<!-- end of speed -->\nafter\n"
    measure.PAGE.write_text(before)
    rounds = {
        "ours": [{"rate": 6.0, "peak_mb": 3.0}, {"rate": 4.0, "peak_mb": 5.0}],
        "theirs": [{"rate": 2.0, "peak_mb": 1.0}, {"rate": 2.0, "peak_mb": 1.0}],
    }
    rows = measure.summary(rounds, than="theirs")
    ours = {"median": 5.0, "lowest": 4.0, "highest": 6.0, "peak_mb": 5.0, "ratio": 2.5}
    assert rows["ours"] == ours
    measure.report("speed", "a race", "m/s", {"short": rows})
    printed, page = capsys.readouterr().out, measure.PAGE.read_text()
    assert "| ratio to theirs |" in printed and "| short: ours | 5 | 4 to 6 | 2.50 | 5 |" in printed
    if not write:
        assert page == before and not (tmp_path / "page" / "speed.json").exists()
        return
    assert page == before.replace("old\n", printed)
    record = json.loads((tmp_path / "page" / "speed.json").read_text())
    assert record["results"]["short"]["theirs"]["median"] == 2.0
    assert record["command"] == "python -m benchmarks.speed --rounds=2"


@pytest.mark.parametrize(
    ("page", "table"), [(measure.PAGE, measure.table), (soak.PAGE, soak.table)]
)
def test_the_page_has_the_tables_of_the_json_files(page, table):
    for path in page.with_suffix("").glob("*.json"):
        assert table(json.loads(path.read_text())) in page.read_text(), path.name


@pytest.mark.slow
def test_copies(images, tmp_path):
    """Of an encoder that has learned nothing, to which nearly all images are alike."""
    encoder = byol_tf.resnet_encoder("resnet18", width_multiplier=0.05, image_size=16)
    byol_tf.export_encoder(encoder, tmp_path, image_size=16)
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.copies", f"--photos={images / 'test'}"]
        + [f"--model={tmp_path}"],
        **{"cwd": measure.ROOT, "capture_output": True, "text": True},
    )
    assert run.returncode == 0, run.stderr
    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines()]
    found = {
        row[0]: list(map(float, row[1:])) for row in rows if len(row) == 8 and row[1][-1:].isdigit()
    }
    assert len(found) == 9 and "mirrored" in found
    for least, median, greatest, *shares in found.values():
        assert -1 <= least <= median <= greatest <= 1.001
        assert shares == sorted(shares, reverse=True)
    plain, spread = (
        found[f"*the {what}*"][1]
        for what in ("same, by the cosine of the embeddings", "nearest different photograph")
    )
    assert plain > spread and plain > 0.9


def test_what_a_soak_tells():
    """An hour in which memory grows by 40 MB, and every step takes twice as long from half on."""
    seconds = np.arange(0.0, 3601, 5)
    steps = np.where(seconds <= 1800, 10 * seconds, 9000 + 5 * seconds)
    noise = np.random.default_rng(0).normal(0, 1, len(seconds))
    memory = 500 + 40 * seconds / 3600 + noise
    found = soak.figures(np.stack([seconds, steps, 1.5 * seconds, memory], axis=1).tolist())
    assert found["minutes"] == 60 and len(found["memory_mb"]["parts"]) == 60
    error = found["memory_mb"]["standard_error"]
    assert error == pytest.approx(12**0.5 * noise.std() / len(seconds) ** 0.5, rel=0.3)
    assert abs(found["memory_mb"]["slope_per_hour"] - 40) < 4 * error
    first, last = found["first_quarter"], found["last_quarter"]
    assert (first["steps_per_second"], last["steps_per_second"]) == (10, 5)
    assert (first["cpu_seconds_per_step"], last["cpu_seconds_per_step"]) == (0.15, 0.3)
    assert last["memory_mb"] - first["memory_mb"] == pytest.approx(30, abs=0.5)
    counts = {"steps": 27000, "epochs": 9, "checkpoints": 8, "knn_measurements": 7}
    origin = {"command": "x", "cpu": "y", "python": "3.12.1", "versions": {}}
    table = soak.table({**origin, **found, "whole_run": counts})
    assert "| 60 minutes of training, Python 3.12.1 | first quarter |" in table
    assert "| CPU seconds a step | 0.15 | 0.3 | +100.0 % |" in table
    assert "27,000 steps, 9 epochs, 8 checkpoints, 7 measurements of k-NN" in table


@pytest.mark.slow
def test_a_soak_of_seconds():
    """Of two epochs at least; SIGTERM is obeyed."""
    extra = ["--train_split=train[:64]", "--eval_split=test[:32]", "--width_multiplier=0.05"]
    extra += ["--batch_size=32", "--image_size=8", "--log_every=1"]
    extra += ["--knn_every=2", "--checkpoint_every=1"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--minutes=0.1", "--warm_up=0", "--every=0.5"]
        + [f"--extra={','.join(extra)}"],
        **{"cwd": measure.ROOT, "capture_output": True, "text": True},
    )
    assert run.returncode == 0, run.stderr
    found = re.search(
        r"([\d,]+) steps, ([\d,]+) epochs, (\d+) checkpoints, (\d+) measurements of k-NN; "
        "ended by SIGTERM with exit code 75",
        run.stdout,
    )
    steps, epochs, checkpoints, measured = (int(n.replace(",", "")) for n in found.groups())
    # SIGTERM may come between an epoch's last step and its measurement.
    assert steps // 2 - 1 <= epochs <= steps // 2 + 1
    assert epochs // 2 - 1 <= measured <= epochs // 2 and measured > 0
    assert checkpoints >= 2
