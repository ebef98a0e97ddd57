"""Encoded images to pixels, as graph ops: for the input pipeline and for exported models.

JPEG, PNG, BMP and GIF are told apart by their first bytes, whatever a file is called. All
functions raise `tf.errors.InvalidArgumentError` for bytes that are none of these, or broken.
"""

import tensorflow as tf

from byol_tf.data import crop

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8")  # in the order of _switch
_JPEG_OPTIONS = {"channels": 3, "dct_method": "INTEGER_ACCURATE"}
# libjpeg interpolates colour across the edge of a crop from what it has decoded: a crop with
# this margin, in pixels, is inside it what the whole image is there.
_JPEG_MARGIN = 2


def decode(encoded):
    """Decodes an image; grey ones become RGB, transparency is laid on white.

    Of an animated GIF this is the first frame. An orientation in EXIF is ignored.

    Args:
      encoded: string scalar, a whole JPEG, PNG, BMP or GIF file.

    Returns: uint8 [H, W, 3].
    """
    image = _switch(
        encoded,
        jpeg=lambda: tf.io.decode_jpeg(encoded, **_JPEG_OPTIONS),
        png=lambda: _decode_png(encoded),
        bmp=lambda: _decode_bmp(encoded),
        gif=lambda: _decode_gif(encoded),
    )
    return tf.ensure_shape(image, [None, None, 3])


def image_size(encoded):
    """What the header says is the size of the image: int32 [2], height and width.

    Args:
      encoded: string scalar, a whole JPEG, PNG, BMP or GIF file.
    """
    size = _switch(
        encoded,
        jpeg=lambda: tf.io.extract_jpeg_shape(encoded)[:2],
        png=lambda: _integers(encoded, 16, 2, tf.int32, little_endian=False)[::-1],
        # A negative height means that the rows are stored from the top down.
        bmp=lambda: tf.abs(_integers(encoded, 18, 2, tf.int32))[::-1],
        gif=lambda: tf.cast(_integers(encoded, 6, 2, tf.uint16), tf.int32)[::-1],
    )
    return tf.ensure_shape(size, [2])


def decode_and_crop(encoded, box):
    """The same as cutting `box` out of `decode(encoded)`, but faster for JPEG.

    Args:
      encoded: string scalar, a whole JPEG, PNG, BMP or GIF file.
      box: int32 [4]: top, left, height and width in pixels, inside the image.

    Returns: uint8 [height, width, 3].
    """

    def slice_decoded():
        return crop.cut(decode(encoded), box)

    return tf.cond(
        _starts_with(encoded, _SIGNATURES[0]),
        lambda: _decode_and_crop_jpeg(encoded, box),
        slice_decoded,
    )


def _switch(encoded, jpeg, png, bmp, gif):
    """Calls the function for the format of `encoded`."""
    matches = [_starts_with(encoded, signature) for signature in _SIGNATURES]
    known = tf.debugging.Assert(tf.reduce_any(matches), ["not a JPEG, PNG, BMP or GIF image"])
    # In eager execution the assertion has been checked by now and is None.
    with tf.control_dependencies([] if known is None else [known]):
        kind = tf.argmax(tf.cast(tf.stack(matches), tf.int32), output_type=tf.int32)
    return tf.switch_case(kind, [jpeg, png, bmp, gif])


def _starts_with(encoded, signature):
    return tf.strings.substr(encoded, 0, len(signature)) == signature


def _integers(encoded, offset, count, dtype, little_endian=True):
    """`count` integers of `dtype` from the bytes at `offset`."""
    # Not `substr` at the offset: for a short file its error quotes the bytes, which eager
    # execution fails to decode as text.
    end = offset + count * dtype.size
    data = tf.io.decode_raw(tf.strings.substr(encoded, 0, end), tf.uint8)[offset:]
    data = tf.reshape(tf.ensure_shape(data, [count * dtype.size]), [count, dtype.size])
    return tf.bitcast(data if little_endian else data[:, ::-1], dtype)


def _decode_and_crop_jpeg(encoded, box):
    bottom_right = tf.minimum(
        box[:2] + box[2:] + _JPEG_MARGIN, tf.io.extract_jpeg_shape(encoded)[:2]
    )
    top_left = tf.maximum(box[:2] - _JPEG_MARGIN, 0)
    wider = tf.concat([top_left, bottom_right - top_left], 0)
    image = tf.io.decode_and_crop_jpeg(encoded, wider, **_JPEG_OPTIONS)
    return crop.cut(image, box, top_left)


def _decode_png(encoded):
    # With as many channels as there are, 1 to 4: asked for 4, TensorFlow gives 1-bit images
    # an alpha of 1 of 255.
    pixels = tf.io.decode_png(encoded, channels=0)
    shape = tf.shape(pixels)

    def on_white():
        # The narrowest type that holds 255 * 255 + 127: images may be large.
        colours, alpha = (tf.cast(t, tf.uint16) for t in (pixels[..., :-1], pixels[..., -1:]))
        return tf.cast((colours * alpha + 255 * (255 - alpha) + 127) // 255, tf.uint8)

    colours = tf.cond(shape[2] % 2 == 0, on_white, lambda: pixels)
    return tf.broadcast_to(colours, [shape[0], shape[1], 3])


def _decode_bmp(encoded):
    # 1, 3 or 4 channels; the fourth is mostly unused and seldom means transparency.
    pixels = tf.io.decode_bmp(encoded, channels=0)
    return tf.cond(
        tf.shape(pixels)[2] == 1,
        lambda: tf.gather(_bmp_palette(encoded), tf.cast(pixels[..., 0], tf.int32)),
        lambda: pixels[..., :3],
    )


def _bmp_palette(encoded):
    """uint8 [N, 3]: the colours of an 8-bit BMP, which TensorFlow leaves out of account."""
    compression = _integers(encoded, 30, 1, tf.int32)[0]
    tf.debugging.Assert(compression == 0, ["a compressed BMP"])
    # The palette stands between the header and the pixels, as blue, green, red and a blank.
    pixels_at, header_bytes = tf.unstack(_integers(encoded, 10, 2, tf.int32))
    start = 14 + header_bytes
    header = tf.io.decode_raw(tf.strings.substr(encoded, 0, pixels_at), tf.uint8)
    return tf.reshape(header[start : start + 4 * 256], [-1, 4])[:, 2::-1]


def _decode_gif(encoded):
    # The op for any image can stop after the first frame; the one for GIFs decodes them all.
    frame = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    frame = tf.ensure_shape(frame, [None, None, 3])
    # Of a size of its own; the rest of the canvas is black.
    height, width = tf.unstack(image_size(encoded))
    return tf.image.pad_to_bounding_box(frame, 0, 0, height, width)
