"""Serves an exported encoder over HTTP: `python -m byol_tf.serve --model=runs/mine/saved_model`.

It speaks TensorFlow Serving's REST API, so that its clients can move there unchanged, and takes
an image file as it is at `/embed`. See docs/serving.md. Needs aiohttp, and of byol_tf no more
than the SavedModel.
"""

import argparse
import asyncio
import base64
import concurrent.futures
import functools
import json
import math
import os
import pathlib
import sys

import numpy as np
import tensorflow as tf

from byol_tf.errors import UserError, one_line, reason

_INPUTS = {"serving_bytes": "image_bytes", "serving_default": "images"}
_BUSY = 4  # batches of requests at most; what comes on top is refused
_GRACE = 30  # seconds for the requests under way, after SIGTERM


class Encoder:
    """A SavedModel whose calls from several threads are computed together, in batches.

    By the batching of TensorFlow Serving, which is an operation of TensorFlow.

    Args:
      directory: of the SavedModel, or a folder of numbered versions, of which the highest counts.
      max_batch_size: images at a time.
      batch_wait_ms: how long an image waits for others.

    Attributes:
      version: string, the number of the version; "1" where there is none.

    Raises:
      UserError: if there is no encoder of `byol_tf.export_encoder`.
    """

    def __init__(self, directory, *, max_batch_size=32, batch_wait_ms=2.0):
        directory = pathlib.Path(directory).expanduser()
        versions = [p for p in directory.glob("*/saved_model.pb") if p.parent.name.isdecimal()]
        if versions:
            directory = max(versions, key=lambda path: int(path.parent.name)).parent
        self.version = directory.name if directory.name.isdecimal() else "1"
        try:
            self._model = tf.saved_model.load(str(directory))
            # Of more than four channels there are no files.
            self._bytes = self._model.signatures.get("serving_bytes")
            self._images = self._model.signatures["serving_default"]
            self._shape = self._images.structured_input_signature[1]["images"].shape
        except (OSError, KeyError, AttributeError, tf.errors.OpError) as error:
            raise UserError(
                f"--model={directory}: no exported encoder there ({one_line(error)}): give the "
                "saved_model of --task=export."
            ) from error
        together = tf.nondifferentiable_batch_function(
            num_batch_threads=os.cpu_count(),  # batches at a time: TensorFlow Serving's default
            max_batch_size=max_batch_size,
            batch_timeout_micros=round(1000 * batch_wait_ms),
        )(lambda image_bytes: self._bytes(image_bytes=image_bytes)["embedding"])
        self._together = tf.function(together, [tf.TensorSpec([None], tf.string)])

    def embed_bytes(self, image_bytes):
        """Embeds a list of N >= 1 whole image files: float32 [N, D].

        Raises:
          ValueError: if the model has more channels than image files can have.
          tf.errors.InvalidArgumentError: if one of them is no image.
          tf.errors.UnavailableError: if too many wait.
        """
        if self._bytes is None:
            channels = self._shape[-1]
            raise ValueError(
                f"no image file has the {channels} channels of this model: send pixels"
            )
        given = tf.constant(image_bytes, tf.string)
        try:
            return self._together(given).numpy()
        except tf.errors.InvalidArgumentError:
            # Of anybody's image in the batch; whose it is, and the others' embeddings, tells this.
            return self._bytes(image_bytes=given)["embedding"].numpy()

    def embed_images(self, images):
        """Embeds images, a list [N][H][W][C] of integers: float32 [N, D].

        Raises:
          ValueError: if they are not of one size, of these channels or from 0 to 255.
        """
        images = _pixels(images, self._shape[-1])
        return self._images(images=tf.constant(images))["embedding"].numpy()

    def warm_up(self):
        """Computes once: the first call compiles, which is not to be at a client's cost."""
        if self._bytes is None:
            height, width, channels = (side or 8 for side in self._shape[1:])
            self.embed_images(np.zeros((1, height, width, channels), int))
        else:
            self.embed_bytes([tf.io.encode_png(tf.zeros([8, 8, 3], tf.uint8)).numpy()])


def predict(encoder, body):
    """Answers a request of TensorFlow Serving's REST API, `:predict`.

    Args:
      encoder: an `Encoder`.
      body: bytes, JSON: "signature_name" ("serving_default" where there is none), and either
        "instances" or "inputs".

    Returns: a dict, "predictions" to "instances", "outputs" to "inputs".

    Raises:
      ValueError, tf.errors.InvalidArgumentError: if it is no such request.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    if not isinstance(request, dict) or ("instances" in request) == ("inputs" in request):
        raise ValueError('the body must be a JSON object with "instances" or with "inputs"')
    signature = request.get("signature_name", "serving_default")
    if not isinstance(signature, str) or signature not in _INPUTS:
        raise ValueError(f'"signature_name" must be one of {", ".join(_INPUTS)}')
    rows = "instances" in request
    values = _values(request["instances" if rows else "inputs"], _INPUTS[signature])
    if signature == "serving_bytes":
        embedding = encoder.embed_bytes([_from_base64(value) for value in values])
    else:
        embedding = encoder.embed_images(values)
    return {"predictions" if rows else "outputs": embedding.tolist()}


def _values(given, name):
    """The list of a signature's only input, which may or may not be named in JSON."""
    if isinstance(given, dict):  # "inputs": {"image_bytes": [...]}
        given = given.get(name)
    if not isinstance(given, list) or not given:
        raise ValueError(f"no list of {name}, or an empty one")
    return [value[name] if isinstance(value, dict) and name in value else value for value in given]


def _from_base64(value):
    if not isinstance(value, dict) or not isinstance(value.get("b64"), str):
        raise ValueError('an image file must be given as {"b64": "..."}')
    return base64.b64decode(value["b64"], validate=True)


def _pixels(values, channels):
    images = np.array(values)  # a ValueError where they are not of one size
    fits = images.ndim == 4 and images.shape[-1] == channels and images.size
    if not fits or images.dtype.kind != "i":
        raise ValueError(f"images must be integers [height][width][{channels}], all of one size")
    if images.min() < 0 or images.max() > 255:
        raise ValueError("images must be of 0 to 255")
    return images.astype(np.uint8)


def make_app(encoder, *, name="encoder", max_body_mb=16, max_batch_size=32):
    """The server as an `aiohttp.web.Application`; every error is JSON, {"error": what}.

    Args:
      encoder: an `Encoder`.
      name: of the model, in its address.
      max_body_mb: of a request, in 2**20 bytes; a larger one is refused (413).
      max_batch_size: that of the encoder.
    """
    from aiohttp import web

    pool = concurrent.futures.ThreadPoolExecutor(max_batch_size)  # a batch's requests at a time
    under_way = 0

    @web.middleware
    async def errors_as_json(request, handler):
        try:
            return await handler(request)
        except web.HTTPException as error:  # is itself the response
            error.text = json.dumps({"error": error.text})
            error.content_type = "application/json"
            raise
        except tf.errors.InvalidArgumentError as error:
            return web.json_response({"error": reason(error)}, status=400)
        except ValueError as error:
            return web.json_response({"error": one_line(error)}, status=400)
        except (tf.errors.UnavailableError, tf.errors.ResourceExhaustedError) as error:
            return web.json_response({"error": reason(error)}, status=503)

    async def answer(compute, request):
        nonlocal under_way
        if under_way >= _BUSY * max_batch_size:
            raise web.HTTPServiceUnavailable(text="too many requests at a time: try again")
        under_way += 1
        try:
            body = await request.read()
            loop = asyncio.get_running_loop()
            # To JSON in the thread as well: here it would make others wait.
            text = await loop.run_in_executor(pool, lambda: json.dumps(compute(body)))
        finally:
            under_way -= 1
        return web.Response(text=text, content_type="application/json")

    def embed(body):
        try:
            return {"embedding": encoder.embed_bytes([body])[0].tolist()}
        except tf.errors.InvalidArgumentError as error:
            raise ValueError(
                f"{reason(error)}: the body must be an image file as it is, as curl's "
                "--data-binary @FILE sends it"
            ) from error

    async def status(request):
        state = {"version": encoder.version, "state": "AVAILABLE"}
        state["status"] = {"error_code": "OK", "error_message": ""}
        return web.json_response({"model_version_status": [state]})

    app = web.Application(middlewares=[errors_as_json], client_max_size=max_body_mb * 2**20)
    app.router.add_post("/embed", functools.partial(answer, embed))
    for model in (f"/v1/models/{name}", f"/v1/models/{name}/versions/{encoder.version}"):
        app.router.add_get(model, status)
        handler = functools.partial(answer, functools.partial(predict, encoder))
        app.router.add_post(f"{model}:predict", handler)
    return app


def _arguments(argv):
    parser = argparse.ArgumentParser("python -m byol_tf.serve", description=__doc__)
    parser.add_argument("--model", required=True, help="Folder that --task=export wrote.")
    parser.add_argument("--host", default="localhost", help="0.0.0.0: for other machines too.")
    parser.add_argument(
        "--port", type=_number(int, 0, 65535), default=8501, help="TensorFlow Serving's by default."
    )
    parser.add_argument("--name", default="encoder", help="Of the model, in its address.")
    parser.add_argument(
        "--max_batch_size", type=_number(int, 1, 1024), default=32, help="Images at a time."
    )
    parser.add_argument(
        "--batch_wait_ms",
        type=_number(float, 0, 60_000),
        default=2.0,
        help="How long an image waits for others.",
    )
    parser.add_argument(
        "--max_body_mb", type=_number(int, 1, 1024), default=16, help="Of one request."
    )
    return parser.parse_args(argv)


def _number(kind, low, high):
    """Function from an argument's text to an int or a float of this range."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return value

    return parse


def main(argv=None):
    """Serves until SIGTERM or SIGINT; requests under way are answered before it ends."""
    arguments = _arguments(argv)
    try:
        from aiohttp import web
    except ImportError:
        sys.exit("error: byol_tf.serve needs aiohttp: pip install aiohttp.")
    limit = arguments.max_batch_size
    try:
        encoder = Encoder(
            arguments.model, max_batch_size=limit, batch_wait_ms=arguments.batch_wait_ms
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    encoder.warm_up()
    app = make_app(
        encoder, name=arguments.name, max_body_mb=arguments.max_body_mb, max_batch_size=limit
    )
    host, port = arguments.host, arguments.port
    line = f"serving version {encoder.version} at http://{host}:{port}/v1/models/{arguments.name}"
    try:
        web.run_app(
            app,
            host=host,
            port=port,
            access_log=None,
            shutdown_timeout=_GRACE,
            print=lambda _: print(line, flush=True),
        )
    except OSError as error:
        sys.exit(f"error: --host={host} --port={port}: {one_line(error)}: choose another.")


if __name__ == "__main__":
    main()
