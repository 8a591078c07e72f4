"""Models and pictures that a script is given: loaded, or one line that says what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from optimum_fp8.errors import FP8Error

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def pretrained(loader: Any, name: str | Path, **keys: Any) -> Any:
    """`loader.from_pretrained(name, …)`; the script ends with one line where that is nothing it can load."""
    try:
        return loader.from_pretrained(name, **keys)
    except FP8Error as error:
        raise SystemExit(f"{name}: {error}") from None
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        expected = "expected a folder with such a model, or a name on the Hub"
        raise SystemExit(f"{name}: {loader.__name__} cannot load it, {expected}: {first}") from None


def pictures_in(folder: Path) -> list[Path]:
    """The picture files in a folder and those below it, sorted; the script ends with one line where there are none."""
    if not folder.is_dir():
        raise SystemExit(f"{folder}: no such folder, expected one with pictures")
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    if not found:
        raise SystemExit(f"{folder}: no pictures in it, expected files that end in {', '.join(sorted(SUFFIXES))}")
    return found


def picture(path: Path) -> Image.Image:
    """A picture in RGB; the script ends with one line where the file holds none."""
    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError):
        raise SystemExit(f"{path}: not a picture that Pillow reads") from None
