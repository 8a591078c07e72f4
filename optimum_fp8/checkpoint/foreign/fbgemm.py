"""The format `fbgemm_fp8`: a scale for each output of `X.weight`, and one for each token of the input."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .headers import Files
from .layers import CHANNEL, TOKEN, Found, Layer, check_fields
from .readers import coded_modules, keys_of, refuse_excluded, register_reader

logger = logging.getLogger(__name__)

NAME = "fbgemm_fp8"
_FIELDS: dict[str, tuple[Any, ...] | None] = {
    "quant_method": (NAME,),
    "activation_scale_ub": None,
    "modules_to_not_convert": None,
}
_NAMES = {"weight": ["weight"], "weight_scale": ["weight_scale"]}


@register_reader(NAME)
def read(said: Mapping[str, Any], files: Files) -> Found:
    """What a checkpoint in this format holds.

    Its bound on inputs, `activation_scale_ub`, is not applied: FBGEMM clips what is larger, here it keeps its value.
    """
    fields = check_fields(NAME, "quantization_config", said, _FIELDS)
    names = coded_modules(files)
    refuse_excluded(NAME, "modules_to_not_convert", fields.get("modules_to_not_convert"), names)
    if (bound := fields.get("activation_scale_ub")) is not None:
        logger.warning("inputs beyond activation_scale_ub=%s, which FBGEMM clips, keep their values", bound)
    # Of each layer the bound may be saved as well, as a buffer that is the same everywhere.
    bounds = {f"{name}.input_scale_ub" for name in names} & set(files.headers)
    layers = {name: Layer(CHANNEL, TOKEN, keys_of(files, name, _NAMES)) for name in names}
    return Found(layers, unread=frozenset(bounds))
