"""Images of calibration data, as a processor takes them."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

from ...errors import FP8CalibrationError
from .columns import Row

_DEEP_MODES = ("I", "F")  # more than 8 bits a channel: Pillow cuts off what is above 255


def wants_colors(processor: Any) -> bool:
    """Whether a processor normalizes three channels, and so cannot take images of another number."""
    processor = getattr(processor, "image_processor", processor)
    mean = getattr(processor, "image_mean", None)
    return bool(getattr(processor, "do_normalize", False)) and isinstance(mean, (list, tuple)) and len(mean) == 3


def images_in(row: Row, column: str, colors: bool, folder: str) -> list[Any]:
    """The images of a row, opened and with the channels that the processor takes.

    Args:
        row: a sample.
        column: holds an image, its path, or several.
        colors: whether they have to be in RGB.
        folder: that paths are relative to.

    Raises:
        FP8CalibrationError: one cannot be read, or cannot become RGB.
    """
    value = row.values.get(column)
    several = value if isinstance(value, (list, tuple)) else [value]
    return [image_of(each, f"{row.where}, column {column!r}", colors, folder) for each in several]


def check_image(row: Row, column: str, folder: str) -> None:
    """Refuse a row that has no image, without opening what is in a file.

    Raises:
        FP8CalibrationError: there is none.
    """
    value = row.values.get(column)
    for each in value if isinstance(value, (list, tuple)) else [value]:
        source_of(each, f"{row.where}, column {column!r}", folder)


def image_of(value: Any, where: str, colors: bool, folder: str = "") -> Any:
    """An image from Pillow's, from a path, or from the bytes of a file.

    Raises:
        FP8CalibrationError: it cannot be read, or cannot become RGB.
    """
    image = _opened(source_of(value, where, folder), where)
    mode = getattr(image, "mode", "RGB")
    if not colors or mode == "RGB":
        return image
    if mode.startswith(_DEEP_MODES):
        raise FP8CalibrationError(
            f"{where} is an image of mode {mode!r} and the processor takes 8 bits in each of 3 channels: scale and "
            "convert it to 'RGB'"
        )
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise FP8CalibrationError(f"{where} is an image of mode {mode!r}: convert it to 'RGB' ({error})") from None


def source_of(value: Any, where: str, folder: str) -> Any:
    """An image, or what it can be opened from: a path or a file in memory.

    Raises:
        FP8CalibrationError: it is neither, or there is no such file.
    """
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        return io.BytesIO(value["bytes"])
    if isinstance(value, Mapping) and value.get("path") is not None:
        value = value["path"]
    if isinstance(value, (str, os.PathLike)):
        path = os.path.join(folder, value)
        if not os.path.isfile(path):
            raise FP8CalibrationError(f"{where} is {os.fspath(value)!r}, and there is no such file: expected an image")
        return path
    if not (hasattr(value, "convert") and hasattr(value, "size")):
        found = "None" if value is None else f"of type {type(value).__name__}"
        raise FP8CalibrationError(f"{where} is {found}, not an image: leave such rows out, or correct them")
    return value


def _opened(source: Any, where: str) -> Any:
    if not isinstance(source, (str, io.BytesIO)):
        return source
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise FP8CalibrationError(f"{where} is an image, which Pillow decodes: pip install pillow") from None
    try:
        with Image.open(source) as image:
            return ImageOps.exif_transpose(image)  # cameras note how they were held, as the library `datasets` reads it
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's of damaged PNG files is the last
        raise FP8CalibrationError(f"{where} cannot be read as an image: {error}") from None
