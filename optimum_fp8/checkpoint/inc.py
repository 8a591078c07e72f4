"""Checkpoints of Intel Neural Compressor: known by their configuration, and refused where another is expected."""

from __future__ import annotations

import json
import os
from typing import Any

from ..errors import FP8CheckpointError


def refuse_incs(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that Intel Neural Compressor saved.

    Raises:
        FP8CheckpointError: names the file that tells it.
    """
    for name in ("quantization_config.json", "config.json"):
        path = os.path.join(folder, name)
        if is_incs(_json(path)):
            raise FP8CheckpointError(
                f"{path} was written by Intel Neural Compressor: load it with "
                "from_pretrained(folder, config=optimum_fp8.native_config(folder)), or quantize the original model"
            )


def is_incs(said: Any) -> bool:
    """Whether this is the configuration of a quantized model that INC saved, or of a model that has one."""
    if not isinstance(said, dict):
        return False
    said = said.get("quantization_config", said)
    return isinstance(said, dict) and "quant_method" not in said and {"fp8_config", "scale_method"} <= said.keys()


def _json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None
