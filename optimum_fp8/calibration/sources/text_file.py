"""Calibration data from a text file: paragraphs."""

from __future__ import annotations

import io
from collections.abc import Iterator

from ...config import FP8Config
from ..source import FileSource, opened, register_source

_CHARACTERS = 2000  # of a sample, at least: enough context for ranges like those in use


@register_source
class TextFile(FileSource):
    """Runs of paragraphs of a text or Markdown file."""

    expected = "the path of a text file (.txt, .text, .md)"
    suffixes = (".txt", ".text", ".md")
    compressed = True

    def texts(self, path: str, config: FP8Config) -> Iterator[str]:
        text = ""
        with io.TextIOWrapper(opened(path), encoding="utf-8-sig") as file:
            for line in file:
                text += line
                if not line.strip() and len(text) >= _CHARACTERS:
                    yield text
                    text = ""
        if text.strip():
            yield text
