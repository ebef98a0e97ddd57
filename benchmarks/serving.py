"""The server beside the bare SavedModel: `python -m benchmarks.serving --photos=DIR`.

The clients share the processor with the server.
"""

import base64
import concurrent.futures
import http.client
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import flags

from benchmarks import measure

FLAGS = flags.FLAGS
measure.define_flags()
flags.DEFINE_string("photos", None, "Folder of photographs in class folders.", required=True)
flags.DEFINE_integer("requests", 400, "Of each kind.", lower_bound=20)

PAGE = measure.ROOT / "docs" / "serving.md"
CLIENTS = 8
ENCODERS = {
    "ResNet-18 x0.25, 32 px": {"name": "resnet18", "width_multiplier": 0.25, "image_size": 32},
    "ResNet-50, 224 px": {"name": "resnet50", "width_multiplier": 1.0, "image_size": 224},
}


def main():
    photos = [path.read_bytes() for path in sorted(pathlib.Path(FLAGS.photos).glob("*/*"))]
    if not photos:
        raise SystemExit(f"error: --photos={FLAGS.photos}: no class folders with photographs.")
    files = [photos[i % len(photos)] for i in range(FLAGS.requests)]
    results = {}
    for title, how in ENCODERS.items():
        with tempfile.TemporaryDirectory() as folder:
            export(how, folder)
            results[f"{title}: bare model, in process"] = of_model(folder, files)
            for path, figures in of_server(folder, files).items():
                results[f"{title}: server, `{path}`"] = figures
    record = {
        **measure.origin("serving", packages=["aiohttp"]),
        "requests": FLAGS.requests,
        "results": results,
    }
    measure.publish(PAGE, "serving", record, table(record))


def table(record):
    lines = [
        f"| {record['requests']} photographs | one client: median, ms | 99 of 100 within, ms "
        f"| images/s | {CLIENTS} clients: median, ms | 99 of 100 within, ms | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for who, figures in record["results"].items():
        lines.append(f"| {who} | {' | '.join(f'{figure:.4g}' for figure in figures)} |")
    return "\n".join([*lines, "", measure.footer(record)])


def export(how, folder):
    """Exports an encoder of random weights, which is as fast as any."""
    from byol_tf import export_encoder, resnet_encoder

    encoder = resnet_encoder(**how)
    export_encoder(encoder, pathlib.Path(folder) / "1", image_size=how["image_size"])


def of_model(folder, files):
    import tensorflow as tf

    signature = tf.saved_model.load(f"{folder}/1").signatures["serving_bytes"]
    return latencies(
        lambda: lambda file: signature(image_bytes=tf.constant([file]))["embedding"].numpy(), files
    )


def of_server(folder, files):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "byol_tf.serve", f"--model={folder}", f"--port={port}"],
        **{"cwd": measure.ROOT, "stdout": subprocess.PIPE, "text": True},
    )

    def client(path, body_of):
        connection = http.client.HTTPConnection("localhost", port)

        def send(file):
            connection.request("POST", path, body_of(file))
            response = connection.getresponse()
            if not json.load(response) or response.status != 200:
                raise SystemExit(f"error: the server answers {response.status}")

        return send

    def as_base64(file):
        instance = {"b64": base64.b64encode(file).decode()}
        return json.dumps({"signature_name": "serving_bytes", "instances": [instance]})

    try:
        server.stdout.readline()  # it is ready
        predict = "/v1/models/encoder:predict"
        return {
            "/embed": latencies(lambda: client("/embed", lambda file: file), files),
            ":predict": latencies(lambda: client(predict, as_base64), files),
        }
    finally:
        server.terminate()
        server.wait()


def latencies(new_client, files):
    """Median, 99th percentile in ms, and images/s: of one client, then of several at a time.

    Args: new_client: makes a function of a file. files: a list of bytes.
    """
    figures = []
    for count in (1, CLIENTS):
        clients = [new_client() for _ in range(count)]
        for client in clients:
            client(files[0])

        def work(number):
            return [_seconds(clients[number], file) for file in files[number::count]]

        begin = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            seconds = np.concatenate(list(pool.map(work, range(count))))
        rate = len(files) / (time.perf_counter() - begin)
        figures += [*(1000 * np.percentile(seconds, (50, 99))), rate]
    return figures


def _seconds(client, file):
    begin = time.perf_counter()
    client(file)
    return time.perf_counter() - begin


if __name__ == "__main__":
    measure.run(main)
