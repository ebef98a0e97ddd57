"""A contact sheet: small images in rows, with a few words below each."""

import io

import numpy as np

from byol_tf.report import as_rgb

_CELL = 160  # side of an image's place, in pixels
_COLUMNS = 6
_ROWS = 200  # at most: a JPEG file has no more than 65,535 rows of pixels
_MARGIN = 8
_LINE, _TEXT = 15, 12  # height of a line of text and size of its letters
_FRAME, _INK, _PAPER = (214, 60, 40), (40, 40, 40), (255, 255, 255)


def thumbnail(image):
    """An image, uint8 [H, W, C], as a `PIL.Image.Image` that fits its place on the sheet."""
    from PIL import Image

    small = Image.fromarray(np.ascontiguousarray(as_rgb(image)))
    small.thumbnail((_CELL, _CELL))
    return small


def contact_sheet(blocks):
    """Draws blocks of images below each other, each block in as many rows as it needs, up to 200 in all.

    Args:
      blocks: a list of lists of (thumbnail, lines of text, whether it gets a frame).

    Returns: bytes, a JPEG file.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows = [block[i : i + _COLUMNS] for block in blocks for i in range(0, len(block), _COLUMNS)]
    rows = rows[:_ROWS]
    lines = max(len(text) for row in rows for _, text, _ in row)
    width, height = _CELL + _MARGIN, _CELL + lines * _LINE + 2 * _MARGIN
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * width + _MARGIN, len(rows) * height + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_TEXT)
    for i, row in enumerate(rows):
        for j, (image, text, framed) in enumerate(row):
            left, top = _MARGIN + j * width, _MARGIN + i * height
            x, y = left + (_CELL - image.width) // 2, top + (_CELL - image.height) // 2
            sheet.paste(image, (x, y))
            if framed:
                box = (x - 4, y - 4, x + image.width + 3, y + image.height + 3)
                draw.rectangle(box, outline=_FRAME, width=3)
            for number, line in enumerate(text):
                at = (left, top + _CELL + _MARGIN // 2 + number * _LINE)
                draw.text(at, _fitting(line, font), _INK, font)
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=90)
    return file.getvalue()


def _fitting(line, font):
    """The line, or the end of it that fits below an image: of a path that says the most."""
    if font.getlength(line) <= _CELL:
        return line
    line = line[-_CELL // 3 :]  # a letter takes three pixels and more
    while font.getlength("..." + line) > _CELL:
        line = line[1:]
    return "..." + line
