"""Operands of `ops.experts` for tests, with codes and scales of every layout."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from optimum_fp8 import ops

TOKENS, HIDDEN, INNER, EXPERTS, TOP = 6, 8, 12, 4, 2
WEIGHT_SCALES = {
    "one an expert": ((EXPERTS, 1, 1), (EXPERTS, 1, 1)),
    "halves": ((EXPERTS, 2, 1), (EXPERTS, 1, 1)),
    "channels": ((EXPERTS, 2 * INNER, 1), (EXPERTS, HIDDEN, 1)),
}


@dataclasses.dataclass
class Data:
    """The operands of one call."""

    dtype: torch.dtype = torch.bfloat16
    fp8: torch.dtype = torch.float8_e4m3fn
    scales: str = "halves"
    activations: str = "static"
    full_scale: float = 240.0
    experts: int = EXPERTS

    def __post_init__(self):
        count = self.experts
        self.x = torch.randn(TOKENS, HIDDEN).to(self.dtype)
        router, self.table = torch.topk(torch.softmax(torch.randn(TOKENS, count), -1), TOP)
        self.router = router.to(self.dtype)
        self.gate_up = (torch.randn(count, 2 * INNER, HIDDEN) * 20).clamp(-240, 240).to(self.fp8)
        self.down = (torch.randn(count, HIDDEN, INNER) * 20).clamp(-240, 240).to(self.fp8)
        shapes = [(count, *shape[1:]) for shape in WEIGHT_SCALES[self.scales]]
        self.gate_up_scale, self.down_scale = (2.0 ** torch.randint(-6, -3, shape) for shape in shapes)
        self.input_scale = self.intermediate_scale = None
        if self.activations == "dynamic":
            self.input_scale = torch.rand(TOKENS, 1) * 0.01 + 0.005
        elif self.activations == "static":
            self.input_scale = torch.tensor([2.0**-5])
            self.intermediate_scale = 2.0 ** torch.randint(-6, -3, (count, 1, 1))

    @property
    def operands(self):
        weights, scales = (self.gate_up, self.down), (self.gate_up_scale, self.down_scale)
        return (self.x, self.table, self.router, *weights, *scales, self.input_scale, self.intermediate_scale)

    def run(self, **options):
        return ops.experts(*self.operands, **{"full_scale": self.full_scale, **options})


def wide(tensor):
    return tensor.float().numpy().astype(np.float64)


def ulps_apart(one, other):
    """The largest distance of two bfloat16 tensors in steps between neighbours, where they are not near zero."""
    return ((one.float() - other.float()).abs() / (one.float().abs().clamp(min=1e-2) * 2.0**-8)).max().item()
