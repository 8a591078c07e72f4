"""The gradient of linear layers: a token and a prompt, layouts of scales, inputs that saturate."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...formats import NumberFormat
from ...ops.arguments import LinearInputGradientCall
from ..case import DTYPE_NAMES, ULPS, Case, Draw, named, scale

_IN, _OUT = 320, 192
_WEIGHT_SCALES = {
    "per tensor": (1,),
    "per channel": (_OUT, 1),
    "by blocks": (2, 3),
    "by groups of 32": (_OUT, 10),
}
_ROWS = [
    *((tokens, weight, torch.bfloat16, False) for tokens in (1, 40) for weight in _WEIGHT_SCALES),
    (40, "per channel", torch.float32, False),
    (40, "per channel", torch.bfloat16, True),
]


def cases(fmt: NumberFormat) -> Iterator[Case]:
    """Of `linear_input_gradient`."""
    draw = Draw(fmt)
    for tokens, weight, dtype, saturates in _ROWS:
        call = LinearInputGradientCall(
            draw.values(1, tokens, _OUT, dtype=dtype),
            draw.codes(_OUT, _IN),
            draw.scales(*_WEIGHT_SCALES[weight], around=0.004),
            draw.values(1, tokens, _IN, dtype=dtype) if saturates else None,
            scale(1 / fmt.full_scale) if saturates else None,
            fmt.full_scale,
        )
        options = (f"weight {weight}", "inputs saturate" if saturates else "")
        name = named(DTYPE_NAMES[dtype], "decode" if tokens == 1 else "prefill", *options)
        yield Case("linear_input_gradient", name, call, ulps=ULPS[dtype])
