"""What defaults leave open, and what does not fit together any more once a configuration is small."""

from __future__ import annotations

import math
from typing import Any

Config = dict[str, Any]

# Values of fields that defaults leave open, though some of the classes that use them cannot do without.
_OPEN = {"pad_token_id": 0, "vocab_size": 160, "num_experts_per_tok": 2, "prediction_length": 8}
_RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1] * 4}


def complete(part: Config, default: Config, width: int, heads: int) -> None:
    """Give open fields of a small configuration a value, and mend relations between others.

    Args:
        part: the small configuration, or one inside it; changed in place.
        default: the same as it was.
        width: its hidden size, 0 if it has none.
        heads: its number of heads.
    """
    values = _OPEN | ({"num_key_value_heads": heads} if heads else {})
    values |= {"head_dim": width // heads} if heads and width % heads == 0 else {}
    for name, value in values.items():
        if name in part and part[name] is None:
            part[name] = value
    _fitting_groups(part, default)


def _fitting_groups(part: Config, default: Config) -> None:
    """Groups of channels that divide the widths that they divided."""
    for name, count in part.items():
        if type(count) is not int or count < 2 or not str(name).endswith("groups"):
            continue
        for other, width in part.items():
            full = default.get(other)
            if type(width) is int and "hidden_size" in other and full % default[name] == 0 and width % part[name]:
                part[name] = math.gcd(part[name], width)


def own_backbone(part: Config) -> None:
    """A ResNet where a model sees through one of timm, which may not be there."""
    for name, value in part.items():
        if isinstance(value, dict) and value.get("model_type") == "timm_backbone":
            stages = value.get("out_indices") or [4]
            count = len(stages)
            part[name] = _RESNET | {"out_features": [f"stage{number}" for number in range(5 - count, 5)]}
    if part.get("use_timm_backbone"):
        part["use_timm_backbone"] = False
