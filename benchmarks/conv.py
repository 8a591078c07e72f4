"""One convolution at a time, FP8 beside bfloat16, at sizes that models of images and of speech have.

    python -m benchmarks.conv [--budget SECONDS]

Weights are random codes, scaled per channel; bfloat16 holds what the codes say. FP8 has half the weight's bytes.
Convolutions of exact FP8 values are torch's own, in float32, which is what the result is defined by.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from optimum_fp8 import FP8Config, convert, prepare

from . import machine, timing
from .table import Row, report

WANTED = 1.0
CLOSE = {"weight_only": 0.03, "static": 0.08}  # codes are exact in bfloat16: static activations are rounded


class Layer(NamedTuple):
    """A convolution and the shape of what goes into it."""

    name: str
    make: Callable[[], Any]
    shape: tuple[int, ...]


LAYERS = (
    Layer("ResNet 3x3, 256 channels", lambda: nn.Conv2d(256, 256, 3, padding=1), (1, 256, 14, 14)),
    Layer("ResNet 1x1, 1024 to 256", lambda: nn.Conv2d(1024, 256, 1), (1, 1024, 14, 14)),
    Layer("ViT patches 16x16", lambda: nn.Conv2d(3, 768, 16, stride=16), (1, 3, 224, 224)),
    Layer("speech, kernel 3, 512 channels", lambda: nn.Conv1d(512, 512, 3, stride=2), (1, 512, 400)),
    Layer("vocoder, transposed", lambda: nn.ConvTranspose1d(512, 256, 16, stride=8, padding=4), (1, 512, 50)),
)


@torch.no_grad()
def sides_of(layer: Layer, x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """bfloat16 and FP8, with the same weights."""
    converted = {}
    for scheme in CLOSE:
        torch.manual_seed(0)
        method = "act_maxabs_pow2_weights_pcs_maxabs_pow2"
        config = FP8Config(target="cpu", activation_scheme=scheme, scale_method=method)
        model = prepare(nn.Sequential(layer.make()).bfloat16(), config)
        model(x)
        converted[scheme] = convert(model)[0]
    plain = layer.make().bfloat16()
    plain.weight.copy_(converted["static"].weight)
    plain.bias.copy_(converted["static"].bias)
    return {"bf16": lambda: plain(x), **{name: lambda module=module: module(x) for name, module in converted.items()}}


def check(sides: dict[str, Callable[[], torch.Tensor]]) -> None:
    """No speed counts if the result is another one.

    Raises:
        RuntimeError: FP8 differs from bfloat16 by more than roundings.
    """
    expected = sides["bf16"]().float()
    for name, allowed in CLOSE.items():
        error = float((sides[name]().float() - expected).norm() / expected.norm())
        if not error <= allowed:
            raise RuntimeError(f"FP8 ({name}) is {error:.1%} off bfloat16, expected at most {allowed:.0%}")


@torch.no_grad()
def run(budget: float = 2.0) -> list[Row]:
    """The rows of the table."""
    rows = []
    for layer in LAYERS:
        x = torch.randn(layer.shape).bfloat16()
        sides = sides_of(layer, x)
        check(sides)
        times = timing.interleave(dict(sides), budget=budget, least=5)
        plain = 1e3 * timing.median(times["bf16"])
        for name in CLOSE:
            ours, ratio = 1e3 * timing.median(times[name]), timing.ratio(times["bf16"], times[name])
            rows.append(Row(f"{layer.name}, {name}", f"{ours:.2f} ms", f"bf16 {plain:.2f} ms", ratio, WANTED))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for each convolution")
    options = parser.parse_args()
    machine.prepare()
    print(report(run(options.budget), machine.describe()))


if __name__ == "__main__":
    main()
