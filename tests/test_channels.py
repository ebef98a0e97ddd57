"""Images of 1, 2, 4 and more channels, from the source to the embedding."""

import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import byol_tf
from byol_tf import dense, evaluation, report, serve
from byol_tf.data import crop, decode, views
from byol_tf.data.source import Source
from byol_tf.data.views import augment_batch, eval_batches, pretrain_batches

COUNT, SIZE = 12, 12


def pixels_of(channels):
    return np.random.default_rng(0).integers(0, 256, (COUNT, 20, 18, channels), np.uint8)


def make_source(channels):
    """A `Source`, in memory, of PNG files, or of pixels where those cannot hold them."""
    pixels = pixels_of(channels)
    encoded = channels <= 4
    records = {
        "index": np.arange(COUNT, dtype=np.int64),
        "image": [tf.io.encode_png(image).numpy() for image in pixels] if encoded else pixels,
        "label": np.arange(COUNT, dtype=np.int64) % 3,
        "name": [f"{i}.png" for i in range(COUNT)],
    }
    dataset = tf.data.Dataset.from_tensor_slices(records)
    return Source(dataset, COUNT, ("a", "b", "c"), (20, 18, channels), channels=channels)


def run(source, **kwargs):
    batches = pretrain_batches(source, image_size=SIZE, batch_size=4, epochs=2, **kwargs)
    return list(batches.as_numpy_iterator())


def assert_close(batches, others, atol):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others):
        assert batch.keys() == other.keys()
        for key, value in batch.items():
            np.testing.assert_allclose(value.astype(float), other[key], rtol=0, atol=atol)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_views(channels):
    """The same from any step on, in memory or streamed, on host or accelerator."""
    source = make_source(channels)
    batches = run(source)
    assert batches[0]["view1"].shape == (4, SIZE, SIZE, channels)
    assert batches[0]["view2"].dtype == np.float32
    assert np.abs(batches[0]["view1"] - batches[0]["view2"]).max() > 0.1
    assert_close(run(source, start_step=4), batches[4:], atol=0)
    cropped = run(source, augment_on="accelerator")
    finished = [{k: np.asarray(v) for k, v in augment_batch(batch).items()} for batch in cropped]
    assert_close(finished, batches, atol=1e-5)
    streamed = run(dataclasses.replace(source, image_shape=None), augment_on="accelerator")
    assert_close(streamed, cropped, atol=1)  # rounded


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_views_to_look_at(channels):
    """One or two channels look gray."""
    pairs = views.view_pairs(make_source(channels), 3, image_size=SIZE)
    assert pairs.shape == (3, 2, SIZE, SIZE, channels)
    sheet = report.view_sheet(pairs)
    assert sheet.shape[-1] == 3 and (np.ptp(sheet, -1).max() == 0) == (channels < 3)


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_eval_batches(channels):
    (batch,) = eval_batches(make_source(channels), image_size=SIZE)
    expected = crop.centre_crop_and_resize(pixels_of(channels), SIZE)
    np.testing.assert_array_equal(batch["image"], expected)
    assert batch["image"].shape == (COUNT, SIZE, SIZE, channels)


@pytest.mark.parametrize("channels", [1, 13])
def test_evaluations_that_train(tmp_path, channels):
    source = make_source(channels)
    encoder = byol_tf.resnet_encoder(
        "resnet18", width_multiplier=1 / 32, stem="small", image_size=SIZE, channels=channels
    )
    given = {"image_size": SIZE, "learning_rates": [0.1], "batch_size": 4, "verbose": 0}
    found = byol_tf.linear_evaluation(encoder, source, source, source, epochs=1, **given)
    assert 0 <= found["top1"] <= 1
    found = byol_tf.fine_tune(encoder, source, source, source, epochs=[1], **given)
    assert 0 <= found["top1"] <= 1
    labels = np.random.default_rng(1).integers(0, 3, (COUNT, 20, 18))
    (tmp_path / "train").mkdir()
    for name, array in (
        ("images", pixels_of(channels)),
        ("masks", labels),
        ("depths", labels + 1.5),
    ):
        np.save(tmp_path / "train" / f"{name}.npy", array)
    options = {"steps": 2, "learning_rate": 1e-3, "weight_decay": 0, "verbose": 0}
    masks, depths = (
        byol_tf.load_dense(tmp_path, "train", target, channels=channels)
        for target in ("masks", "depths")
    )
    batches = byol_tf.segmentation_batches(masks, crop=16, batch_size=4, num_classes=3, seed=0)
    model = byol_tf.segmentation_model(encoder, 3)
    assert dense.train(model, batches, dense.segmentation_loss, **options)
    batches = byol_tf.depth_batches(depths, crop=(16, 16), scale=1.0, batch_size=4, seed=0)
    assert dense.train(byol_tf.depth_model(encoder), batches, dense.berhu, **options)
    (images, _), (again, _) = batches.take(2)
    assert images.shape == (4, 16, 16, channels) and not np.array_equal(images, again)


def test_large_pixels_are_shuffled_a_few_at_a_time():
    """Where a source of pixels is streamed, the records that wait are no more than 2 GB."""
    pixels = tf.data.Dataset.from_tensors({"image": tf.zeros([256, 256, 13], tf.uint8)})
    encoded = tf.data.Dataset.from_tensors({"image": tf.constant("png")})
    sizes = [
        views._shuffled(Source(images, 10**6, None, None, channels=13))
        for images in (pixels, encoded)
    ]
    assert sizes[0] == 2**31 // (256 * 256 * 13) and sizes[1] == 16_384


def test_library_with_13_channels(tmp_path):
    """Views, training, features and a SavedModel, which has no signature for files then."""
    source = make_source(13)
    encoder = byol_tf.resnet_encoder(
        "resnet18", width_multiplier=1 / 32, stem="small", image_size=SIZE, channels=13
    )
    model = byol_tf.BYOL(encoder, projector_hidden_size=8, projector_output_size=4)
    model.compile(byol_tf.LARS(0.1))
    before = encoder.layers[1].kernel.numpy()
    batches = byol_tf.pretrain_batches(source, image_size=SIZE, batch_size=4, epochs=1)
    target_update = byol_tf.TargetNetworkUpdate(0.9, total_steps=3)
    model.fit(batches, verbose=0, callbacks=[target_update])
    assert np.abs(encoder.layers[1].kernel.numpy() - before).max((0, 1, 3)).min() > 0
    byol_tf.export_encoder(encoder, tmp_path / "model", image_size=SIZE, channels=13)
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    assert list(loaded.signatures) == ["serving_default"]
    served = loaded.signatures["serving_default"](images=tf.constant(pixels_of(13)))
    features = byol_tf.extract_features(encoder, source, image_size=SIZE)
    np.testing.assert_allclose(served["embedding"], features.vectors, rtol=1e-4, atol=1e-5)
    server = serve.Encoder(tmp_path / "model")
    server.warm_up()
    answer = server.embed_images(pixels_of(13).tolist())
    np.testing.assert_allclose(answer, features.vectors, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="13 channels"):
        server.embed_bytes([b""])
    raw = evaluation.raw_pixels(source, image_size=8)
    assert raw.vectors.shape == (COUNT, 8 * 8 * 13)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 4])
def test_command_line(main, images, tmp_path, channels):
    """Of one channel, what is written is gray; the SavedModel gives the same embeddings; nor are
    they three after."""
    workdir = tmp_path / "run"
    query = images / "test" / "red" / "0.png"
    tasks = "pretrain,knn,linear_probe,export,embed,report,search,duplicates"
    code, _, stderr = main(
        *(f"--workdir={workdir}", f"--task={tasks}", f"--channels={channels}", f"--query={query}"),
        *("--dataset=image_folder", f"--data_dir={images}", "--embed_split=test"),
        *("--eval_split=test", "--duplicate_similarity=0"),
        *("--encoder=resnet18", "--width_multiplier=0.05", "--stem=small", "--image_size=16"),
        *("--projector_hidden_size=16", "--projector_output_size=8", "--optimizer=sgd"),
        *("--batch_size=8", "--epochs=2", "--warmup_epochs=1", "--nobaselines"),
    )
    assert code == 0, stderr[-3000:]
    found = json.loads((workdir / "results.json").read_text())
    assert found["steps"] == 4 and {"knn_top1", "probe_top1"} <= found.keys()
    written = np.load(workdir / "embeddings.npz")
    names = [images / name for name in written["name"]]
    signatures = tf.saved_model.load(str(workdir / "saved_model" / "1")).signatures
    encoded = tf.constant([name.read_bytes() for name in names])
    of_bytes = signatures["serving_bytes"](image_bytes=encoded)["embedding"]
    np.testing.assert_allclose(of_bytes, written["embedding"], rtol=1e-4, atol=1e-5)
    pixels = np.stack([decode.decode(name.read_bytes(), channels) for name in names])
    assert pixels.shape == (8, 20, 24, channels)
    of_pixels = signatures["serving_default"](images=tf.constant(pixels))["embedding"]
    np.testing.assert_allclose(of_pixels, written["embedding"], rtol=1e-4, atol=1e-5)
    for picture in ("report/views.png", "duplicates.jpg"):
        assert (np.ptp(colours(workdir / picture), -1).max() < 8) == (channels == 1), picture

    code, _, stderr = main(f"--workdir={workdir}", "--task=knn", "--channels=3")
    assert code == 1
    line = stderr.splitlines()[-1]
    assert line.startswith("error: --channels=3: ") and f"--channels={channels}" in line


def colours(path):
    """The picture of a file, int [H, W, 3]."""
    return np.asarray(Image.open(path).convert("RGB"), int)
