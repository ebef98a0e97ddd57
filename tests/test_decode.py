"""Decoding, with Pillow as the oracle."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from byol_tf.data import decode

HEIGHT, WIDTH = 37, 61  # odd: rows of a BMP are padded


def picture():
    """Smooth colours with some noise, so that no two channels, rows or columns are alike."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([x * 4, y * 6, 255 - 2 * (x + y)], -1)
    noise = np.random.default_rng(0).integers(0, 12, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def alpha():
    return (np.mgrid[:HEIGHT, :WIDTH][1] * 4).astype(np.uint8)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def animated_gif():
    frames = [Image.fromarray(np.roll(picture(), 20 * i, 0)) for i in range(3)]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


def ycck(cmyk):
    """The same JPEG declared as YCCK in its Adobe segment."""
    at = cmyk.find(b"\xff\xee")
    assert cmyk[at + 4 : at + 9] == b"Adobe"
    return cmyk[: at + 15] + b"\x02" + cmyk[at + 16 :]


def on_canvas(gif, width, height):
    """The same GIF on a canvas of another size."""
    return gif[:6] + width.to_bytes(2, "little") + height.to_bytes(2, "little") + gif[10:]


RGB = Image.fromarray(picture())
CMYK = encode(RGB.convert("CMYK"), "JPEG", quality=90)

# Every encoding that Pillow's convert("RGB") shows as it should be seen.
ENCODED = {
    "jpeg": encode(RGB, "JPEG", quality=90),
    "jpeg 4:4:4": encode(RGB, "JPEG", quality=90, subsampling=0),
    "jpeg progressive": encode(RGB, "JPEG", progressive=True),
    "jpeg grey": encode(RGB.convert("L"), "JPEG"),
    "jpeg cmyk": CMYK,
    "jpeg ycck": ycck(CMYK),
    "png": encode(RGB, "PNG"),
    "png grey": encode(RGB.convert("L"), "PNG"),
    "png palette": encode(RGB.convert("P"), "PNG"),
    "png 1 bit": encode(RGB.convert("1"), "PNG"),
    "bmp": encode(RGB, "BMP"),
    "bmp grey": encode(RGB.convert("L"), "BMP"),
    "bmp palette": encode(RGB.convert("P"), "BMP"),
    "bmp 32 bits": encode(RGB.convert("RGBA"), "BMP"),
    "gif": encode(RGB, "GIF"),
    "gif animated": animated_gif(),
}


@pytest.mark.parametrize("kind", ENCODED)
def test_decode_is_as_pillow(kind):
    expected = np.array(Image.open(io.BytesIO(ENCODED[kind])).convert("RGB"))
    image = decode.decode(ENCODED[kind])
    assert image.dtype == tf.uint8
    assert image.shape == expected.shape
    # Pillow converts CMYK in integers of its own.
    tolerance = 1 if kind in ("jpeg cmyk", "jpeg ycck") else 0
    np.testing.assert_allclose(image.numpy().astype(int), expected.astype(int), atol=tolerance)


def test_gif_with_a_frame_smaller_than_its_canvas():
    larger = on_canvas(ENCODED["gif"], WIDTH + 9, HEIGHT + 5)
    expected = np.pad(decode.decode(ENCODED["gif"]).numpy(), [[0, 5], [0, 9], [0, 0]])
    np.testing.assert_array_equal(decode.decode(larger), expected)
    assert decode.image_size(larger).numpy().tolist() == [HEIGHT + 5, WIDTH + 9]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode):
    layers = picture() if mode == "RGBA" else picture()[..., :1]
    image = Image.fromarray(np.concatenate([layers, alpha()[..., np.newaxis]], -1), mode)
    weight = alpha()[..., np.newaxis] / 255
    expected = np.broadcast_to(layers * weight + 255 * (1 - weight), (HEIGHT, WIDTH, 3))
    decoded = decode.decode(encode(image, "PNG")).numpy()
    np.testing.assert_allclose(decoded, expected, atol=0.51)
    assert (decoded[:, 0] == 255).all()


def test_transparent_palette_is_laid_on_white():
    image = RGB.convert("P")
    chosen = int(np.array(image)[0, 0])
    decoded = decode.decode(encode(image, "PNG", transparency=chosen)).numpy()
    transparent = np.array(image) == chosen
    assert (decoded[transparent] == 255).all()
    opaque = np.array(image.convert("RGB"))[~transparent]
    np.testing.assert_array_equal(decoded[~transparent], opaque)


def test_16_bits_are_scaled_to_8():
    values = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 29).astype(np.uint16)
    values[-1, -1] = 65535
    decoded = decode.decode(encode(Image.fromarray(values), "PNG")).numpy()
    np.testing.assert_array_equal(decoded, np.stack([values >> 8] * 3, -1))


@pytest.mark.parametrize("kind", ENCODED)
def test_other_channels(kind):
    """Luma as Pillow makes it of the same RGB, which leaves gray as it is; alpha is opaque."""
    rgb = decode.decode(ENCODED[kind]).numpy()
    gray = np.array(Image.fromarray(rgb).convert("L"))[..., np.newaxis]
    opaque = np.full_like(gray, 255)
    expected = {1: gray, 2: np.concatenate([gray, opaque], -1)}
    expected[4] = np.concatenate([rgb, opaque], -1)
    for channels, pixels in expected.items():
        np.testing.assert_array_equal(decode.decode(ENCODED[kind], channels), pixels)
        cropped = decode.decode_and_crop(ENCODED[kind], tf.constant([3, 5, 20, 30]), channels)
        np.testing.assert_array_equal(cropped, pixels[3:23, 5:35])
    if "grey" in kind:
        np.testing.assert_array_equal(gray[..., 0], rgb[..., 0])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_kept(mode):
    image = RGB.convert("RGBA")
    image.putalpha(Image.fromarray(alpha()))
    encoded = encode(image.convert(mode), "PNG")
    if mode == "P":
        palette = RGB.convert("P")
        encoded = encode(palette, "PNG", transparency=int(np.array(palette)[0, 0]))
    shown = Image.open(io.BytesIO(encoded)).convert("RGBA")
    np.testing.assert_array_equal(decode.decode(encoded, 4), shown)
    with_gray = np.stack([shown.convert("RGB").convert("L"), shown.getchannel("A")], -1)
    np.testing.assert_array_equal(decode.decode(encoded, 2), with_gray)
    on_white = Image.fromarray(decode.decode(encoded).numpy())
    np.testing.assert_array_equal(decode.decode(encoded, 1)[..., 0], on_white.convert("L"))


def test_pixels_are_given_back():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 7), np.uint8)
    for image in (pixels, tf.constant(pixels)):
        np.testing.assert_array_equal(decode.decode(image, 7), pixels)
        assert decode.image_size(image).numpy().tolist() == [20, 30]
        cropped = decode.decode_and_crop(image, tf.constant([2, 3, 4, 5]), 7)
        np.testing.assert_array_equal(cropped, pixels[2:6, 3:8])
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode.decode(image, 3)


@pytest.mark.parametrize("kind", ENCODED)
def test_image_size_is_that_of_the_decoded_image(kind):
    size = decode.image_size(ENCODED[kind])
    assert size.dtype == tf.int32
    assert size.numpy().tolist() == list(decode.decode(ENCODED[kind]).shape[:2])


def test_image_size_of_a_bmp_from_the_top_down():
    bmp = ENCODED["bmp"]
    top_down = bmp[:22] + (-HEIGHT).to_bytes(4, "little", signed=True) + bmp[26:]
    assert decode.image_size(top_down).numpy().tolist() == [HEIGHT, WIDTH]
    np.testing.assert_array_equal(decode.decode(top_down), decode.decode(bmp)[::-1])


@pytest.mark.parametrize("kind", ENCODED)
def test_decode_and_crop_is_decode_then_slice(kind):
    whole = decode.decode(ENCODED[kind]).numpy()
    rng = np.random.default_rng(1)
    boxes = [[0, 0, *whole.shape[:2]], [HEIGHT - 1, WIDTH - 1, 1, 1], [0, 0, 1, 1]]
    for _ in range(20):
        height, width = rng.integers(1, HEIGHT + 1), rng.integers(1, WIDTH + 1)
        boxes.append(
            [rng.integers(HEIGHT - height + 1), rng.integers(WIDTH - width + 1), height, width]
        )
    for top, left, height, width in boxes:
        crop = decode.decode_and_crop(ENCODED[kind], tf.constant([top, left, height, width]))
        expected = whole[top : top + height, left : left + width]
        np.testing.assert_array_equal(crop, expected, f"{top}, {left}, {height}, {width}")


def test_in_a_graph():
    """One traced function does all formats, with the channels known: in a pipeline, exported."""
    names = list(ENCODED)
    images = tf.data.Dataset.from_tensor_slices([ENCODED[name] for name in names])
    box = tf.constant([3, 5, 20, 30])
    decoded = images.map(
        lambda encoded: (
            decode.decode(encoded),
            decode.image_size(encoded),
            decode.decode_and_crop(encoded, box),
        )
    )
    assert [spec.shape.as_list() for spec in decoded.element_spec][:2] == [[None, None, 3], [2]]
    for name, (image, size, crop) in zip(names, decoded, strict=True):
        np.testing.assert_array_equal(image, decode.decode(ENCODED[name]), name)
        assert size.numpy().tolist() == list(image.shape[:2])
        np.testing.assert_array_equal(crop, image[3:23, 5:35], name)


@pytest.mark.parametrize("function", [decode.decode, decode.image_size])
@pytest.mark.parametrize(
    "encoded", [b"", b"\xff\xd8", b"text, not pixels", b"BM", b"GIF89a", b"\x89PNG\r\n\x1a\n"]
)
def test_other_bytes_are_an_error(function, encoded):
    with pytest.raises(tf.errors.InvalidArgumentError):
        function(encoded)


@pytest.mark.parametrize("kind", ["jpeg", "jpeg progressive", "png", "bmp", "gif"])
def test_truncated_images_are_an_error(kind):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode.decode(ENCODED[kind][: len(ENCODED[kind]) * 2 // 3])


def test_compressed_bmps_are_an_error():
    bmp = ENCODED["bmp palette"]
    with pytest.raises(tf.errors.InvalidArgumentError, match="compressed"):
        decode.decode(bmp[:30] + b"\x01" + bmp[31:])
