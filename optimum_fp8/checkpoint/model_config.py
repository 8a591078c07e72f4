"""The configuration of the model in `config.json`, which says how it computes as well: is it as it was saved?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import transformers

CONFIG, MODEL = "config.json", "model_config"
_QUANTIZATION = "quantization_config"  # has a check of its own
_OF_THE_WRITER = ("transformers_version", "_name_or_path")  # change no result


def config_to_record(model: Any) -> dict[str, Any]:
    """What `save_pretrained` of a model of transformers writes into `config.json`, less how it is quantized."""
    if not isinstance(model, transformers.PreTrainedModel):
        return {}
    said: dict[str, Any] = json.loads(model.config.to_json_string())
    said |= {"dtype": str(model.dtype).removeprefix("torch."), "architectures": [type(model).__name__]}
    return without_quantization(said)


def changed_keys(found: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys of `config.json` that are not as they were saved, with what is there and what was; None: nothing.

    Args:
        found: what `config.json` says.
        recorded: what the files of weights say of it; empty where they are older.
    """
    if not recorded:
        return {}
    found, missing = without_quantization(found), object()
    keys = sorted({*found, *recorded})
    changed = [key for key in keys if found.get(key, missing) != recorded.get(key, missing)]
    return {key: (found.get(key), recorded.get(key)) for key in changed}


def without_quantization(said: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` says, less how the model is quantized and who wrote it."""
    return {key: value for key, value in said.items() if key not in (_QUANTIZATION, *_OF_THE_WRITER)}
