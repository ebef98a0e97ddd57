"""Encoded images to pixels, as graph ops: for the input pipeline and for exported models.

JPEG, PNG, BMP and GIF are told apart by their first bytes, whatever a file is called. All
functions raise `tf.errors.InvalidArgumentError` for bytes that are none of these, or broken; those
that decode do so too, before they take the memory, for more than `MAX_PIXELS`.
"""

import tensorflow as tf

from byol_tf.data import crop

MAX_CHANNELS = 4  # of these files
# A small file can claim to be, or unpack to, an image that does not fit into memory.
MAX_PIXELS = 100_000_000
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8")  # in the order of _switch
_JPEG_OPTIONS = {"channels": 3, "dct_method": "INTEGER_ACCURATE"}
# libjpeg interpolates colour across the edge of a crop from what it has decoded: a crop with
# this margin, in pixels, is inside it what the whole image is there.
_JPEG_MARGIN = 2
# Where a GIF tells its size, how long its header is, and what its blocks begin with.
_GIF_CANVAS, _GIF_HEADER = 6, 13
_GIF_EXTENSION, _GIF_FRAME = 0x21, 0x2C


def decode(encoded, channels=3):
    """Decodes an image to 1 (luma), 2 (luma, alpha), 3 (RGB) or 4 (RGB, alpha) channels.

    Whatever the file has is converted. Without alpha among the channels, transparency is laid
    on white; alpha is that of a PNG, and 255 of other files. Of an animated GIF this is the first
    frame. An orientation in EXIF is ignored.

    Args:
      encoded: string scalar, a whole JPEG, PNG, BMP or GIF file; or pixels, uint8
        [H, W, channels] of any number of channels, which are given back.
      channels: int.

    Returns: uint8 [H, W, channels].
    """
    if _is_pixels(encoded):
        return tf.ensure_shape(encoded, [None, None, channels])
    image = _switch(
        encoded,
        jpeg=lambda: _decode_jpeg(encoded),
        png=lambda: _decode_png(encoded, channels),
        bmp=lambda: _decode_bmp(encoded),
        gif=lambda: _decode_gif(encoded),
    )
    return _convert(image, channels)


def image_size(encoded):
    """What the header says is the size of the image: int32 [2], height and width.

    Args:
      encoded: as of `decode`.
    """
    if _is_pixels(encoded):
        return tf.shape(encoded)[:2]
    size = _switch(
        encoded,
        jpeg=lambda: _jpeg_size(encoded),
        png=lambda: _png_size(encoded),
        bmp=lambda: _bmp_size(encoded),
        gif=lambda: _gif_size(encoded, _GIF_CANVAS),
    )
    return tf.ensure_shape(size, [2])


def decode_and_crop(encoded, box, channels=3):
    """The same as cutting `box` out of `decode(encoded, channels)`, but faster for JPEG.

    Args:
      encoded, channels: as of `decode`.
      box: int32 [4]: top, left, height and width in pixels, inside the image.

    Returns: uint8 [height, width, channels].
    """

    def slice_decoded():
        return crop.cut(decode(encoded, channels), box)

    if _is_pixels(encoded):
        return slice_decoded()
    return tf.cond(
        _starts_with(encoded, _SIGNATURES[0]),
        lambda: _convert(_decode_and_crop_jpeg(encoded, box), channels),
        slice_decoded,
    )


def _is_pixels(image):
    return tf.uint8 == getattr(image, "dtype", tf.string)  # Python's bytes have none


def _convert(image, channels):
    """RGB, or RGB and alpha, uint8 [H, W, 3 or 4], in the channels that `decode` gives."""
    if channels in (2, 4):
        image = _with_alpha(image)
    if channels in (1, 2):
        red, green, blue, *alpha = tf.unstack(image, channels + 2, axis=-1)
        image = tf.stack([_luma(red, green, blue), *alpha], -1)
    return tf.ensure_shape(image, [None, None, channels])


def _with_alpha(image):
    """Adds an alpha of 255 where there is none: uint8 [H, W, 1 to 4] -> [H, W, 2 or 4]."""
    return tf.pad(image, [[0, 0], [0, 0], [0, tf.shape(image)[2] % 2]], constant_values=255)


def _luma(*colours):
    """Of red, green and blue, uint8 [H, W] each: rounded, with the weights of ITU-R BT.601."""
    # Weights of 2**16 in all, as Pillow's: exact in float32, so that gray stays what it is.
    red, green, blue = (tf.cast(colour, tf.float32) for colour in colours)
    return tf.cast((19595 * red + 38470 * green + 7471 * blue + 2**15) / 2**16, tf.uint8)


def _switch(encoded, jpeg, png, bmp, gif):
    """Calls the function for the format of `encoded`."""
    matches = [_starts_with(encoded, signature) for signature in _SIGNATURES]
    kind = tf.argmax(tf.cast(tf.stack(matches), tf.int32), output_type=tf.int32)
    known = _if(tf.reduce_any(matches), kind, "not a JPEG, PNG, BMP or GIF image")
    return tf.switch_case(known, [jpeg, png, bmp, gif])


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


def _bounded(encoded, size):
    """`encoded`, which is refused if it is not of 1 to `MAX_PIXELS` pixels."""
    size = tf.cast(size, tf.int64)
    fits = tf.reduce_all(size > 0) & (tf.reduce_prod(size) <= MAX_PIXELS)
    text = f"height and width of an image without pixels, or of more than {MAX_PIXELS}:"
    return _if(fits, encoded, text, size)


def _if(condition, value, *message):
    """`value`, to be used only where the condition holds."""
    holds = tf.debugging.Assert(condition, message)
    # In eager execution the assertion has been checked by now and is None.
    with tf.control_dependencies([] if holds is None else [holds]):
        return tf.identity(value)


def _jpeg_size(encoded):
    return tf.io.extract_jpeg_shape(encoded)[:2]


def _decode_jpeg(encoded):
    return tf.io.decode_jpeg(_bounded(encoded, _jpeg_size(encoded)), **_JPEG_OPTIONS)


def _decode_and_crop_jpeg(encoded, box):
    size = _jpeg_size(encoded)
    encoded = _bounded(encoded, size)
    bottom_right = tf.minimum(box[:2] + box[2:] + _JPEG_MARGIN, size)
    top_left = tf.maximum(box[:2] - _JPEG_MARGIN, 0)
    wider = tf.concat([top_left, bottom_right - top_left], 0)
    image = tf.io.decode_and_crop_jpeg(encoded, wider, **_JPEG_OPTIONS)
    return crop.cut(image, box, top_left)


def _png_size(encoded):
    # The decoder passes over a chunk before the header, which would hide the size from us.
    header = _integers(encoded, 12, 3, tf.int32, little_endian=False)
    is_first = header[0] == int.from_bytes(b"IHDR", "big")
    return _if(is_first, header[:0:-1], "a PNG that does not begin with its header")


def _decode_png(encoded, channels):
    encoded = _bounded(encoded, _png_size(encoded))
    # With as many channels as there are, 1 to 4: asked for 4, TensorFlow gives 1-bit images
    # an alpha of 1 of 255.
    pixels = tf.io.decode_png(encoded, channels=0)
    shape = tf.shape(pixels)
    if channels in (2, 4):
        pixels = _with_alpha(pixels)
        colours = tf.broadcast_to(pixels[..., :-1], [shape[0], shape[1], 3])
        return tf.concat([colours, pixels[..., -1:]], -1)

    def on_white():
        # The narrowest type that holds 255 * 255 + 127: images may be large.
        colours, alpha = (tf.cast(t, tf.uint16) for t in (pixels[..., :-1], pixels[..., -1:]))
        return tf.cast((colours * alpha + 255 * (255 - alpha) + 127) // 255, tf.uint8)

    colours = tf.cond(shape[2] % 2 == 0, on_white, lambda: pixels)
    return tf.broadcast_to(colours, [shape[0], shape[1], 3])


def _bmp_size(encoded):
    # A negative height means that the rows are stored from the top down.
    return tf.abs(_integers(encoded, 18, 2, tf.int32))[::-1]


def _decode_bmp(encoded):
    encoded = _bounded(encoded, _bmp_size(encoded))
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


def _gif_size(encoded, offset):
    """Height and width that are written at `offset`."""
    return tf.cast(_integers(encoded, offset, 2, tf.uint16), tf.int32)[::-1]


def _decode_gif(encoded):
    canvas = _gif_size(encoded, _GIF_CANVAS)
    encoded = _first_frame(_bounded(encoded, canvas))
    frame = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    frame = tf.ensure_shape(frame, [None, None, 3])
    # Of a size of its own; the rest of the canvas is black.
    height, width = tf.unstack(canvas)
    return tf.image.pad_to_bounding_box(frame, 0, 0, height, width)


@tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
def _first_frame(encoded):
    """The GIF up to the end of its first frame: TensorFlow would unpack all, of any size."""
    # With zeros after the end, as far as a block and a colour table can lead.
    data = tf.pad(tf.cast(tf.io.decode_raw(encoded, tf.uint8), tf.int32), [[0, 2048]])
    (at,) = tf.while_loop(
        lambda at: data[at] == _GIF_EXTENSION,
        lambda at: [_after_blocks(data, at + 2)],
        [_GIF_HEADER + _palette_bytes(data[_GIF_CANVAS + 4])],
    )
    at = _if(data[at] == _GIF_FRAME, at, "a GIF without a frame")
    encoded = _bounded(encoded, _gif_size(encoded, at + 5))
    end = _after_blocks(data, at + 11 + _palette_bytes(data[at + 9]))
    return tf.strings.join([tf.strings.substr(encoded, 0, end), b";"])


def _palette_bytes(flags):
    """The length of the colour table that such flags announce."""
    return tf.where(flags >= 128, 3 * tf.bitwise.left_shift(2, flags % 8), 0)


def _after_blocks(data, at):
    """Where the blocks that begin at `at` end: each tells its length, and the last is empty."""
    (at,) = tf.while_loop(lambda at: data[at] > 0, lambda at: [at + 1 + data[at]], [at])
    return at + 1
