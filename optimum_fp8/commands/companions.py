"""The files beside a model's weights: everything else that its folder or repository holds goes along."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError

from ..checkpoint.folder import OWN_CARD

# Weights by the suffixes that frameworks give them, what trainers keep beside them, and the lists of their shards.
_WEIGHTS = [
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.distcp", "*.gguf", "*.ggml", "*.npz", "*.h5", "*.pb"),
    *("*.msgpack", "*.tflite", "*.ot", "*.onnx", "*.onnx_data", "*.mlmodel", "*.pdparams", "*.index*.json"),
]
_HIDDEN = ".*"


def companions_of(model: str) -> str:
    """The folder of a model, or one with what a repository on the hub holds: from the cache, or fetched."""
    if os.path.isdir(model):
        return model
    try:
        return snapshot_download(model, ignore_patterns=[*_WEIGHTS, *(f"*/{pattern}" for pattern in _WEIGHTS)])
    except LocalEntryNotFoundError as error:
        cached = try_to_load_from_cache(model, "config.json")
        if not isinstance(cached, str):
            raise
        print(f"note: of {model} only the files in the cache are copied: {error}", file=sys.stderr)
        return os.path.dirname(cached)


def copy_companions(source: str, output: str, *, apart_from: str) -> None:
    """Copy what stands beside the weights in `source` to `output`, sub-folders included.

    Files that are in `output` already stay: those were written for the quantized model. A model card of ours is of the
    source alone, and stays there.

    Args:
        source: the folder of a model.
        output: a folder.
        apart_from: a folder that is not copied, where it lies in the source.
    """
    left_out = []
    for path in _files(Path(source), {Path(output).resolve(), Path(apart_from).resolve()}):
        relative = path.relative_to(source)
        if any(fnmatch(path.name, pattern) for pattern in _WEIGHTS):
            left_out += [str(relative)] if len(relative.parts) > 1 else []
            continue
        if path.name == "README.md" and OWN_CARD in path.read_text(encoding="utf-8", errors="replace"):
            continue  # says what the source is, and is not true of what is made of it
        target = Path(output, relative)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    if left_out:
        print(f"note: weights in sub-folders are not copied: {', '.join(sorted(left_out))}", file=sys.stderr)


def _files(folder: Path, apart_from: set[Path]) -> Iterator[Path]:
    """The files in a folder and its sub-folders, without hidden ones; in the hub's cache they are links."""
    apart_from = apart_from | {folder.resolve()}  # links may lead back
    for path in sorted(folder.iterdir()):
        if fnmatch(path.name, _HIDDEN) or path.resolve() in apart_from:
            continue
        if path.is_dir():
            yield from _files(path, apart_from)
        elif path.is_file():
            yield path
