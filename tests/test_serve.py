"""The server, started as a user starts it and called over HTTP."""

import base64
import concurrent.futures
import http.client
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from byol_tf import serve
from byol_tf.export import export_encoder
from byol_tf.keras_api import keras

pytest.importorskip("aiohttp", reason="NO AIOHTTP: THE SERVER IS NOT TESTED")
ROOT = pathlib.Path(__file__).parent.parent
PREDICT = "/v1/models/encoder:predict"


def photo(seed, kind="JPEG"):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, rng.integers(20, 256, 3), (30 + seed, 40, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def b64(content):
    return {"b64": base64.b64encode(content).decode()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder as of --task=export, with versions 1 and 2."""
    folder = tmp_path_factory.mktemp("export") / "saved_model"
    for version in ("1", "2"):
        keras.utils.set_random_seed(int(version))
        encoder = keras.Sequential(
            [
                keras.Input((16, 16, 3)),
                keras.layers.Conv2D(8, 3, 2),
                keras.layers.ReLU(),
                keras.layers.GlobalAveragePooling2D(),
            ]
        )
        export_encoder(encoder, folder / version, image_size=16)
    return folder


@pytest.fixture(scope="module")
def expected(exported):
    """Function from files to the embeddings of the SavedModel itself."""
    signature = tf.saved_model.load(str(exported / "2")).signatures["serving_bytes"]
    return lambda files: signature(image_bytes=tf.constant(files))["embedding"].numpy()


def start(exported, *flags):
    """Starts a server: its process and its port."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "byol_tf.serve", f"--model={exported}", f"--port={port}", *flags],
        cwd=ROOT,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert line == f"serving version 2 at http://localhost:{port}/v1/models/encoder\n"
    return process, port


def stop(process):
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    process.stdout.close()


@pytest.fixture(scope="module")
def port(exported):
    process, port = start(exported, "--max_body_mb=1", "--batch_wait_ms=20")
    yield port
    stop(process)


@pytest.fixture
def call(port):
    """Function that sends a request: (status, what its JSON says)."""
    return lambda *request: send(port, *request)


def send(port, method, path, body=None):
    connection = http.client.HTTPConnection("localhost", port, timeout=60)
    connection.request(method, path, body)
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


def test_a_file(call, expected):
    for content in (photo(1), photo(2, "PNG"), photo(3, "GIF"), photo(4, "BMP")):
        status, found = call("POST", "/embed", content)
        assert status == 200 and list(found) == ["embedding"]
        np.testing.assert_allclose(found["embedding"], expected([content])[0], rtol=1e-5, atol=1e-6)


def test_files_as_tensorflow_serving_takes_them(call, expected):
    files = [photo(1), photo(2, "PNG")]
    row, named = [b64(f) for f in files], [{"image_bytes": b64(f)} for f in files]
    for given, key in (
        ({"instances": row}, "predictions"),
        ({"instances": named}, "predictions"),
        ({"inputs": row}, "outputs"),
        ({"inputs": {"image_bytes": row}}, "outputs"),
    ):
        body = json.dumps({"signature_name": "serving_bytes", **given})
        for path in (PREDICT, "/v1/models/encoder/versions/2:predict"):
            status, found = call("POST", path, body)
            assert status == 200 and list(found) == [key], found
            np.testing.assert_allclose(found[key], expected(files), rtol=1e-5, atol=1e-6)


def test_pixels_as_tensorflow_serving_takes_them(call, expected):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8)
    files = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        files.append(buffer.getvalue())
    status, found = call("POST", PREDICT, json.dumps({"instances": pixels.tolist()}))
    assert status == 200
    np.testing.assert_allclose(found["predictions"], expected(files), rtol=1e-5, atol=1e-6)


def test_status(call):
    for path in ("/v1/models/encoder", "/v1/models/encoder/versions/2"):
        status, found = call("GET", path)
        (version,) = found["model_version_status"]
        assert status == 200 and version["state"] == "AVAILABLE" and version["version"] == "2"


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/embed", b"", 400, "not a JPEG, PNG, BMP or GIF image: the body must be"),
        ("/embed", b"no image", 400, "not a JPEG, PNG, BMP or GIF image"),
        ("/embed", photo(1)[:300], 400, "JPEG"),
        ("/embed", b"\0" * (2**20 + 1), 413, "exceeded"),
        (PREDICT, b"", 400, "not JSON"),
        (PREDICT, b"\xff\xfe", 400, "not JSON"),
        (PREDICT, b"[" * 100_000, 400, "not JSON"),
        (PREDICT, b"[]", 400, "instances"),
        (PREDICT, b"{}", 400, "instances"),
        (PREDICT, b'{"instances": [], "inputs": []}', 400, "instances"),
        (PREDICT, b'{"instances": []}', 400, "images"),
        (PREDICT, b'{"inputs": {"pixels": []}}', 400, "images"),
        (PREDICT, b'{"instances": [[[[1, 2, 300]]]]}', 400, "0 to 255"),
        (PREDICT, b'{"instances": [[[[1, 2, 0.5]]]]}', 400, "integers"),
        (PREDICT, b'{"instances": [[[[1, 2]]]]}', 400, "integers"),
        (PREDICT, b'{"instances": [[[[1, 2, 3]]], [[1, 2]]]}', 400, "inhomogeneous"),
        (PREDICT, b'{"instances": [[[[99999999999999999999, 2, 3]]]]}', 400, "integers"),
        (PREDICT, b'{"signature_name": "none", "instances": [1]}', 400, "signature_name"),
        (PREDICT, b'{"signature_name": [], "instances": [1]}', 400, "signature_name"),
        (PREDICT, b'{"signature_name": "serving_bytes", "instances": ["x"]}', 400, "b64"),
        (PREDICT, b'{"signature_name": "serving_bytes", "instances": [{"b64": "%"}]}', 400, ""),
        (PREDICT, b'{"signature_name": "serving_bytes", "instances": [{"b64": ""}]}', 400, "JPEG"),
        ("/v1/models/none:predict", b"{}", 404, "Not Found"),
        ("/v1/models/encoder/versions/1:predict", b"{}", 404, "Not Found"),
        ("/v1/models/encoder", b"{}", 405, "Not Allowed"),
    ],
)
def test_what_cannot_be_answered(call, path, body, status, words):
    found_status, found = call("POST", path, body)
    assert (found_status, list(found)) == (status, ["error"])
    assert words in found["error"] and "\n" not in found["error"], found
    assert call("POST", "/embed", photo(1))[0] == 200  # and it serves on


def test_good_among_bad(call, expected):
    """Of 60 requests at a time, in common batches, each third is of bytes that are no image."""
    files = [b"bad" if i % 3 == 0 else photo(i) for i in range(60)]
    with concurrent.futures.ThreadPoolExecutor(20) as clients:
        answers = list(clients.map(lambda content: call("POST", "/embed", content), files))
    for content, (status, found) in zip(files, answers):
        assert status == (400 if content == b"bad" else 200), found
        if status == 200:
            wanted = expected([content])[0]
            np.testing.assert_allclose(found["embedding"], wanted, rtol=1e-5, atol=1e-6)


def test_requests_share_batches(exported, monkeypatch):
    """Several that come at a time are computed together."""
    encoder = serve.Encoder(exported, max_batch_size=4, batch_wait_ms=2000)
    files = [photo(i) for i in range(4)]
    encoder.embed_bytes(files)  # compiles, and fills a batch: it waits for no more
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        found = list(clients.map(lambda content: encoder.embed_bytes([content]), files))
    assert time.monotonic() - begin < 1.9  # alone, each would wait for others in vain
    np.testing.assert_allclose(
        np.concatenate(found), encoder.embed_bytes(files), rtol=1e-5, atol=1e-6
    )


def test_sigterm_answers_what_is_under_way(exported):
    process, port = start(exported, "--batch_wait_ms=2000")
    with concurrent.futures.ThreadPoolExecutor(1) as client:
        answer = client.submit(send, port, "POST", "/embed", photo(1))
        time.sleep(0.7)  # it waits for others to come
        assert not answer.done()
        stop(process)
        assert answer.result()[0] == 200


def test_what_cannot_be_served(exported, tmp_path, port):
    with pytest.raises(SystemExit, match=f"error: --model={tmp_path}: no exported encoder"):
        serve.main([f"--model={tmp_path}"])
    with pytest.raises(SystemExit, match=f"error: --host=localhost --port={port}: .* in use"):
        serve.main([f"--model={exported}", f"--port={port}"])


@pytest.mark.parametrize(
    "argument",
    ["--port=65536", "--port=http", "--max_batch_size=0", "--batch_wait_ms=nan", "--max_body_mb=0"],
)
def test_arguments_out_of_range(argument, capsys):
    with pytest.raises(SystemExit):
        serve.main(["--model=none", argument])
    name, value = argument.split("=")
    assert f"error: argument {name}: {value!r} is not a number from" in capsys.readouterr().err


def test_without_aiohttp(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(SystemExit, match="needs aiohttp: pip install aiohttp"):
        serve.main(["--model=none"])
