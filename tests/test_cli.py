"""`main.py` as a user runs it, the README's commands and code, and that a run learns."""

import json
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest
import tensorflow as tf

import byol_tf

ROOT = pathlib.Path(__file__).parent.parent
TINY = """
--dataset=image_folder
--eval_split=test
--encoder=resnet18
--width_multiplier=0.05
--image_size=16
--stem=small
--projector_hidden_size=16
--projector_output_size=8
--batch_size=8
--epochs=2
--warmup_epochs=1
--optimizer=sgd
--log_every=2
""".split()


def succeed(result):
    code, stdout, stderr = result
    assert code == 0, stderr[-3000:]
    return stdout, stderr


def results(workdir):
    return json.loads((workdir / "results.json").read_text())


@pytest.fixture(scope="module")
def flat(images, tmp_path_factory):
    """The same images, all in one folder."""
    root = tmp_path_factory.mktemp("flat")
    for i, path in enumerate(sorted(images.rglob("*.png"))):
        shutil.copy(path, root / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def finished(main, images, tmp_path_factory):
    """The workdir of a whole run of the default tasks, and what it said."""
    workdir = tmp_path_factory.mktemp("runs") / "new" / "finished"
    flags = [*TINY, f"--data_dir={images}", f"--workdir={workdir}", "--deterministic"]
    return workdir, *succeed(main(*flags))


def test_default_tasks(finished):
    workdir, stdout, stderr = finished
    names = {"checkpoints", "tensorboard", "metrics.jsonl", "flags.txt", "results.json", ".lock"}
    assert {path.name for path in workdir.iterdir()} == {*names, "saved_model", "backbone.h5"}
    assert list((workdir / "tensorboard").glob("events*"))
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [2, 4]
    figures = {"loss", "projection_std", "effective_rank", "target_ema", "learning_rate"}
    assert figures <= set(steps[0])
    found = results(workdir)
    assert found["steps"] == 4
    assert re.fullmatch("[0-9a-f]{64}", found["weights_sha256"])
    assert found["images_per_second"] > 0
    assert found["versions"]["tensorflow"] == tf.__version__
    accuracies = {"knn_top1", "knn200_top1", "probe_top1"}
    for figures in (found, found["random_init"], found["raw_pixels"]):
        assert accuracies <= set(figures)
        assert all(0 <= figures[name] <= 1 for name in accuracies)
    assert found["raw_pixels"]["knn_top1"] == 1.0  # blue and red
    assert "knn_top1      trained" in stdout and "encoder exported to" in stdout
    assert "Traceback" not in stderr


def test_epoch_lines_show_the_loss(finished):
    """Though the last step of every epoch is one of metrics.jsonl too."""
    losses = [float(loss) for loss in re.findall(r" loss: ([0-9.e+-]+)", finished[1])]
    assert len(losses) == 2 and min(losses) > 0.1


def test_resumed_is_uninterrupted(main, finished, tmp_path):
    """Stopped amid an epoch and started again, with the flags of flags.txt."""
    workdir = tmp_path / "run"
    once = [f"--flagfile={finished[0] / 'flags.txt'}", f"--workdir={workdir}", "--task=pretrain"]
    succeed(main(*once, "--max_steps=1"))
    stopped = results(workdir)
    assert stopped["steps"] == 1
    _, stderr = succeed(main(f"--workdir={workdir}", "--task=pretrain"))
    assert "resuming from" in stderr
    assert results(workdir)["steps"] == 4
    assert results(workdir)["weights_sha256"] == results(finished[0])["weights_sha256"]
    assert results(workdir)["weights_sha256"] != stopped["weights_sha256"]


@pytest.mark.slow
def test_accumulation_resumes(main, images, tmp_path):
    """SimCLR in two parts of the batch: stopped and started again it is the same."""
    simclr = f"--flagfile={ROOT / 'flags/ablation/simclr.flags'}"
    flags = [*TINY, f"--data_dir={images}", simclr, "--accumulation_steps=2", "--epochs=1"]
    flags += ["--warmup_epochs=0", "--deterministic", "--task=pretrain"]
    workdir = tmp_path / "twice"
    succeed(main(*flags, f"--workdir={tmp_path / 'once'}"))
    succeed(main(*flags, f"--workdir={workdir}", "--max_steps=1"))
    stopped = results(workdir)["weights_sha256"]
    succeed(main(f"--workdir={workdir}", "--task=pretrain"))
    expected = results(tmp_path / "once")["weights_sha256"]
    assert results(workdir)["weights_sha256"] == expected != stopped
    (line,) = (tmp_path / "once" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] > json.loads(line)["prediction_loss"]
    assert "target_ema" not in line  # there is no target


def test_later_tasks(main, finished, images, tmp_path):
    """k-NN again, and embeddings, which are those of the exported model."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    before = results(workdir)
    (workdir / "results.json").unlink()
    stdout, _ = succeed(main(f"--workdir={workdir}", "--task=embed,knn", "--embed_split=test"))
    found = results(workdir)
    for name in ("knn_top1", "knn200_top1"):
        for part in (lambda r: r, lambda r: r["random_init"], lambda r: r["raw_pixels"]):
            assert part(found)[name] == part(before)[name]
    assert "probe_top1" not in found
    assert "8 embeddings written to" in stdout
    written = np.load(workdir / "embeddings.npz")
    assert written["embedding"].shape == (8, 25)
    assert written["class_names"].tolist() == ["blue", "red"]
    assert written["label"].tolist() == [0] * 4 + [1] * 4
    assert written["name"][0] == "test/blue/0.png"
    served = tf.saved_model.load(str(workdir / "saved_model" / "1")).signatures["serving_bytes"]
    encoded = tf.constant([(images / name).read_bytes() for name in written["name"]])
    np.testing.assert_allclose(
        served(image_bytes=encoded)["embedding"], written["embedding"], rtol=1e-4, atol=1e-5
    )


LEARNING_TASKS = """
--task=finetune,linear_eval
--linear_epochs=20
--linear_batch_size=9
--linear_learning_rates=2,0.4
--finetune_epochs=2
--finetune_learning_rates=0.1,0.01
--finetune_batch_size=8
""".split()


@pytest.mark.slow
def test_tasks_that_learn(main, finished, tmp_path):
    """Of 20 blue and red images 2 are held out; half of the 20 labels are 10."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    before = results(workdir)
    percents = "--finetune_percents=50,100"
    stdout, stderr = succeed(main(f"--workdir={workdir}", *LEARNING_TASKS, percents))
    found = results(workdir)
    assert found["linear_top1"] == found["linear_top5"] == 1.0
    assert "linear_top1" in stdout and "Epoch 20/20" in stdout and "loss_at_0.4" in stdout
    linear = found["linear_eval"]
    assert (linear["images"], linear["held_out_images"]) == (18, 2)
    assert linear["learning_rate"] in (2, 0.4) and set(linear["held_out_top1"]) == {"2", "0.4"}
    assert {name: part["images"] for name, part in found["finetune"].items()} == {
        "50%": 10,
        "100%": 18,
    }
    for part in found["finetune"].values():
        assert part["held_out_top1"].keys() == {"2"}
        assert part["held_out_top1"]["2"].keys() == {"0.1", "0.01"}
        assert 0 <= part["top1"] <= part["top5"] == 1.0
    assert found["weights_sha256"] == before["weights_sha256"]
    # Other settings are no other run, and more training makes the figures those of other weights.
    tuned = f"--workdir={workdir}", "--linear_epochs=3", "--use_checkpoint=last"
    succeed(main(*tuned, "--task=pretrain"))
    assert results(workdir)["finetune"] == found["finetune"]


@pytest.mark.slow
def test_fine_tuning_on_a_named_subset(main, tmp_path):
    """Its images are not held out, though --dataset has them too; other classes are refused."""
    import tensorflow_datasets as tfds

    def prepare(name, places, labels=("even", "odd")):
        rng = np.random.default_rng(0)
        examples = [
            (i, {"image": rng.integers(0, 256, (12, 12, 3), np.uint8), "label": i % 2})
            for i in range(30)
        ]
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(12, 12, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=labels),
            }
        )
        tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            version="1.0.0",
            config="part" if "subset" in name else None,
            features=features,
            split_datasets={"train": [examples[i] for i in places], "test": examples[20:]},
            data_dir=tmp_path,
            disable_shuffling=True,
        )

    prepare("tiny", range(20))
    prepare("tiny_subset", range(14))
    prepare("all_subset", range(20))
    prepare("other_subset", range(14), labels=("a", "b"))
    workdir = tmp_path / "run"
    flags = [*TINY, "--dataset=tiny", f"--data_dir={tmp_path}", f"--workdir={workdir}"]
    succeed(main(*flags, "--task=pretrain", "--max_steps=1"))
    settings = [f"--workdir={workdir}", *LEARNING_TASKS, "--task=finetune"]
    succeed(main(*settings, "--finetune_dataset=tiny_subset/part"))
    (name, found) = results(workdir)["finetune"].popitem()
    assert name == "tiny_subset/part"
    # One of the other six.
    assert (found["images"], found["held_out_images"]) == (14, 1)
    line = error_of(main(*settings, "--finetune_dataset=other_subset/part"))
    assert "--finetune_dataset=other_subset/part: its classes are not" in line
    line = error_of(main(*settings, "--finetune_dataset=nothere"))
    assert "--finetune_dataset=nothere: no such data set" in line
    line = error_of(main(*settings, "--finetune_dataset=all_subset/part"))
    assert "none is left to choose" in line


@pytest.mark.slow
def test_transfer(main, finished, prepare_set, tmp_path):
    """What is there is measured and in the table; what is not is named at the end."""
    from byol_tf import transfer

    workdir, data_dir = tmp_path / "run", tmp_path / "sets"
    shutil.copytree(finished[0], workdir)
    for name in ("dtd", "voc/2007", "mine"):
        prepare_set(transfer.find_set(name), data_dir, {"train": 24, "validation": 9, "test": 6})
    names = f"--transfer=dtd,birdsnap,voc,mine,cifar01 --transfer_data_dir={data_dir}".split()
    code, stdout, stderr = main(f"--workdir={workdir}", *names)
    assert code == 1 and "Traceback" not in stderr
    error = error_of((code, stdout, stderr))
    assert "--transfer: left out birdsnap, cifar01: the warnings above say why" in error
    assert "birdsnap is not in TFDS" in stderr
    assert "--transfer: left out cifar01: no such data set" in stderr
    found = results(workdir)
    assert found["knn_top1"] == results(finished[0])["knn_top1"]  # kept, and no other task ran
    assert list(found["transfer"]) == ["dtd", "voc/2007", "mine"]
    dtd = found["transfer"]["dtd"]["linear"]
    assert [dtd[key] for key in ("images", "validation_images", "test_images")] == [24, 9, 6]
    assert dtd["step"] == 4 and len(dtd["validation"]) == 45 and 0 <= dtd["value"] <= 1
    assert found["transfer"]["mine"]["linear"]["validation_images"] == 2
    settings = [
        "--transfer_steps=3",
        "--transfer_batch_size=8",
        "--transfer_learning_rates=0.1,0.01",
    ]
    tuned = [*settings, "--transfer_mode=finetune", "--transfer_weight_decays=0,1e-4"]
    names[0] = "--transfer=voc"
    stdout, _ = succeed(main(f"--workdir={workdir}", "--task=transfer", *names, *tuned))
    found["transfer"]["voc/2007"]["finetune"] = tuned = results(workdir)["transfer"]["voc/2007"][
        "finetune"
    ]
    assert results(workdir)["transfer"] == found["transfer"]  # nothing else is lost
    assert {len(decays) for decays in tuned["validation"].values()} == {2}
    table = (workdir / "transfer.md").read_text()
    assert table in stdout and len(table.splitlines()) == 6
    assert f"| dtd | top-1 | linear | L2 {dtd['l2']:.2g} | {100 * dtd['value']:.2f} |" in table
    assert "| voc/2007 | 11-point mAP | finetune | rate 0.1, decay 0" in table or (
        "| voc/2007 | 11-point mAP | finetune | rate 0.01, decay" in table
    )


@pytest.mark.slow
def test_classes_that_nothing_teaches(main, images, tmp_path):
    data = tmp_path / "images"
    shutil.copytree(images, data)
    (data / "test" / "blue").rename(data / "test" / "green")
    flags = [*TINY, f"--data_dir={data}", f"--workdir={tmp_path / 'run'}", "--max_steps=1"]
    _, stderr = succeed(main(*flags, "--task=pretrain,knn,linear_probe", "--nobaselines"))
    wanted = "4 of 8 images of --eval_split=test are of classes that --train_split=train has not"
    assert stderr.count(wanted) == 1


@pytest.mark.slow
def test_without_labels(main, flat, tmp_path):
    flags = [*TINY, f"--data_dir={flat}", f"--workdir={tmp_path}", "--max_steps=1"]
    tasks = "--task=pretrain,knn,linear_probe,linear_eval,finetune,export"
    _, stderr = succeed(main(*flags, tasks))
    assert "skipped knn_top1 and knn200_top1" in stderr and "has no labels" in stderr
    for what in ("probe_top1", "linear_eval", "finetune"):
        assert f"skipped {what}" in stderr
    found = results(tmp_path)
    assert found["steps"] == 1 and "knn_top1" not in found
    assert (tmp_path / "saved_model" / "1" / "saved_model.pb").exists()
    for task in ("knn", "finetune"):  # nothing else was asked for
        line = error_of(main(f"--workdir={tmp_path}", f"--task={task}"))
        assert f"--task={task}: --dataset=image_folder has no labels" in line


def test_odd_batches_of_a_narrow_encoder(main, images, tmp_path):
    """Of which TensorFlow's convolution gradient dies, where the stride is not taken before."""
    flags = [*TINY, f"--data_dir={images}", f"--workdir={tmp_path}", "--task=pretrain"]
    succeed(main(*flags, "--batch_size=3", "--epochs=4"))
    assert results(tmp_path)["steps"] == 24


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--logical_cpus=2", "--strategy=mirrored"],
        ["--augment_on=accelerator", "--precision=bfloat16"],
    ],
)
def test_other_ways_to_compute(main, images, tmp_path, finished, flags):
    given = [*TINY, f"--data_dir={images}", f"--workdir={tmp_path}", "--task=pretrain"]
    succeed(main(*given, *flags, "--max_steps=2"))
    assert results(tmp_path)["steps"] == 2
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (first, _) = (finished[0] / "metrics.jsonl").read_text().splitlines()
    # The same images and weights: almost the same loss.
    assert json.loads(line)["prediction_loss"] == pytest.approx(
        json.loads(first)["prediction_loss"], rel=0.05
    )


def test_lamb(main, images, tmp_path):
    """Runs and resumes where there is TensorFlow Addons; elsewhere one line says why not."""
    flags = [*TINY, f"--data_dir={images}", f"--workdir={tmp_path}", "--task=pretrain"]
    result = main(*flags, "--optimizer=lamb", "--max_steps=2")
    if sys.version_info >= (3, 12):
        assert "--optimizer=lamb needs TensorFlow Addons" in error_of(result)
        return
    succeed(result)
    rate = json.loads((tmp_path / "metrics.jsonl").read_text())["learning_rate"]
    assert rate == pytest.approx(0.2 * 8 / 256 / 2)  # half-way up the warm-up


def error_of(result):
    """The error, which must be one line and no traceback."""
    code, _, stderr = result
    assert code not in (0, None)
    assert "Traceback" not in stderr, stderr[-2000:]
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert stderr.rstrip().endswith(line)
    return line


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--epoch=3", ["'epoch'", "epochs"]),
        ("--epochs=0", ["--epochs=0", "positive"]),
        ("--epochs=1" + 30 * "0", ["epochs", "must be less than 2**31"]),
        ("--image_size=x", ["--image_size=x"]),
        ("--encoder=vgg", ["--encoder=vgg", "resnet18"]),
        ("--base_target_ema=1.5", ["--base_target_ema=1.5"]),
        ("--base_learning_rate=nan", ["base_learning_rate", "must be a finite number"]),
        (
            "--task=pretrain,evaluate",
            ["task", "choose from", "pretrain, knn, linear_probe, linear_eval"],
        ),
        ("--linear_learning_rates=0.1,x", ["linear_learning_rates", "x"]),
        ("--linear_learning_rates=0.1,nan", ["linear_learning_rates", "finite numbers above 0"]),
        ("--finetune_epochs=1.5", ["finetune_epochs", "1.5"]),
        ("--finetune_percents=10,101", ["finetune_percents", "at most 100"]),
        ("--transfer_weight_decays=0,-1", ["transfer_weight_decays", "of at least 0"]),
        ("--transfer_mode=both", ["transfer_mode", "linear, finetune"]),
        ("--embeddings_file=a.csv", ["embeddings_file", ".npz or .parquet"]),
        ("--flagfile=/no/such/file", ["/no/such/file"]),
    ],
)
def test_wrong_flags(main, tmp_path, flag, words):
    line = error_of(main(f"--workdir={tmp_path}", flag))
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


def test_not_a_flag(main):
    assert "'pretrain' is not a flag" in error_of(main("pretrain"))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data_dir={empty}"], ["--data_dir={empty}", "no image"]),
        (
            ["--train_split=trian"],
            ["--train_split=trian: ", "no split 'trian'", "there are test, train"],
        ),
        (
            ["--eval_split=tset"],
            ["--eval_split=tset: ", "no split 'tset'", "there are test, train"],
        ),
        (["--workdir={file}/run"], ["--workdir={file}/run", "choose a folder"]),
        (["--dataset=cifar01"], ["--dataset=cifar01", "no such data set", "cifar10"]),
        (["--task=knn"], ["no checkpoint", "--task=pretrain"]),
        (["--batch_size=21"], ["--batch_size=21", "20 images"]),
        (
            ["--batch_size=9", "--logical_cpus=2", "--strategy=mirrored"],
            ["--batch_size=9", "2 replicas", "take 10"],
        ),
    ],
)
def test_what_cannot_be_run(main, images, tmp_path, flags, words):
    empty, workdir = tmp_path / "empty", tmp_path / "run"
    empty.mkdir()
    names = {"empty": empty, "file": tmp_path / "file"}
    names["file"].touch()
    given = [flag.format(**names) for flag in flags]
    line = error_of(main(*TINY, f"--data_dir={images}", f"--workdir={workdir}", *given))
    assert all(word.format(**names) in line for word in words), line
    assert not workdir.exists()


def test_another_number_of_images_is_told(main, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    assert results(workdir)["train_images"] == 20
    (workdir / "results.json").write_text('{"train_images": 7}')
    _, stderr = succeed(main(f"--workdir={workdir}", "--task=pretrain"))
    assert "20 images to train on, not 7 as before" in stderr
    assert "all 4 steps are done" in stderr


@pytest.mark.parametrize("text", ["[]", "{", '{"finetune": 3}', '{"random_init": null}'])
def test_results_that_are_none(main, finished, tmp_path, text):
    """Are told of before the training, and stay as they are."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "results.json").write_text(text)
    line = error_of(main(f"--workdir={workdir}"))
    assert "results.json" in line and "mend or remove" in line
    assert (workdir / "results.json").read_text() == text


def test_flags_that_do_not_fit_the_run(main, finished):
    """Another encoder fits no task, another batch no training; the run stays as it was."""
    before = results(finished[0])
    line = error_of(main(f"--workdir={finished[0]}", "--task=knn", "--encoder=resnet34"))
    assert "--encoder=resnet34" in line and "--encoder=resnet18" in line
    line = error_of(main(f"--workdir={finished[0]}", "--batch_size=4"))
    assert "--batch_size=4" in line and "--batch_size=8" in line
    assert results(finished[0]) == before


def test_a_workdir_in_the_home(main, images):
    flags = [*TINY, f"--data_dir={images}", "--workdir=~/run", "--task=pretrain", "--max_steps=1"]
    succeed(main(*flags))
    # Which is there for the next command.
    assert "--batch_size=4" in error_of(main("--workdir=~/run", "--batch_size=4"))


def test_help(main):
    stdout, stderr = succeed(main("--help"))
    headings = re.findall(r"^byol_tf\.config\.(\w+):$", stdout, re.MULTILINE)
    assert headings == ["run", "data", "model", "optimization", "evaluation", "devices"]
    for name, default in {
        "encoder": "resnet50",
        "image_size": "224",
        "projector_hidden_size": "4096",
        "projector_output_size": "256",
        "batch_size": "4096",
        "epochs": "1000",
        "optimizer": "lars",
        "base_learning_rate": "0.2",
        "weight_decay": "1.5e-06",
        "warmup_epochs": "10.0",
        "base_target_ema": "0.996",
    }.items():
        entry = re.search(rf"--{name}:.*?(?=\n  --|\n\n|\Z)", stdout, re.DOTALL).group()
        assert f"(default: '{default}')" in entry and "paper" in entry, entry
    assert "tensorflow" not in stderr.lower()


def code_of(page, library=True):
    """The code of a page that uses this package's library, or that which does without."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (code,) = [block for block in blocks if ("import byol_tf" in block) == library]
    return code


def test_readme_library_code(make_source, tmp_path, monkeypatch):
    code = code_of("README.md")
    (batch_size,) = set(re.findall(r"batch_size=(\d+)", code))
    code = re.sub(rf"\b{batch_size}\b", "16", re.sub(r"epochs=\d+", "epochs=1", code))
    source = make_source(32)
    monkeypatch.setattr(byol_tf, "load_source", lambda *args, **kwargs: source)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert int(names["model"].optimizer.iterations) == 2
    served = tf.saved_model.load(str(tmp_path / "saved_model")).signatures["serving_default"]
    assert served(images=tf.zeros([2, 40, 50, 3], tf.uint8))["embedding"].shape == (2, 128)


@pytest.mark.slow
def test_code_of_the_librarys_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = code_of("docs/library.md")
    code = code.replace("from tensorflow import keras", "from byol_tf.keras_api import keras")
    names = {}
    exec(code, names)
    assert names["representation"].shape == (2, 1280)
    served = tf.saved_model.load(str(tmp_path / "saved_model")).signatures["serving_default"]
    assert served(images=tf.zeros([1, 90, 100, 3], tf.uint8))["embedding"].shape == (1, 1280)


def test_readme_serving_code(finished):
    names = {}
    code = code_of("README.md", library=False)
    exec(code.replace("runs/quickstart", str(finished[0])), names)
    assert names["embedding"].shape[0] == 1 and names["embedding"].dtype == tf.float32


def test_package_needs_what_requirements_say():
    from setuptools.config.pyprojecttoml import read_configuration

    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert any(line.startswith("tensorflow==") for line in wanted)
    assert read_configuration(ROOT / "pyproject.toml")["project"]["dependencies"] == wanted


@pytest.mark.slow
def test_it_learns(main, tmp_path):
    """A quarter of the quickstart: its encoder beats random weights and raw pixels."""
    flags = f"--flagfile={ROOT / 'flags/quickstart.flags'}", f"--workdir={tmp_path / 'run'}"
    succeed(main(*flags, "--epochs=12", "--task=pretrain,knn"))
    found = results(tmp_path / "run")
    assert found["knn_top1"] > found["random_init"]["knn_top1"] + 0.1, found
    assert found["knn200_top1"] > found["raw_pixels"]["knn200_top1"], found
