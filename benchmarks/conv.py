"""One convolution at a time, FP8 beside bfloat16, at sizes that models of images and of speech have.

    python -m benchmarks.conv [--budget SECONDS] [--single-thread]

Weights are random codes, scaled per channel by powers of two; bfloat16 holds what the codes say. FP8 has half the
weight's bytes. Some convolutions are bound by arithmetic, and torch's own in bfloat16 is at its peak: there no kernel
gains what the casts cost. So beside the ratio stands a limit that is measured in the same turns: torch's convolution of
the dequantized weight, dequantizing included, and rounding the input where it is rounded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from optimum_fp8 import FP8Config, convert, ops, prepare

from . import machine, timing
from .table import Row, report

WANTED, WANTED_OF_LIMIT = 1.0, 0.9  # either will do
CLOSE = {"weight_only": 0.03, "static": 0.08}  # codes are exact in bfloat16: static activations are rounded


class Layer(NamedTuple):
    """A convolution and the shape of what goes into it."""

    name: str
    make: Callable[[], Any]
    shape: tuple[int, ...]
    channels_last: bool = False


LAYERS = (
    Layer("ResNet 3x3, 256 channels", lambda: nn.Conv2d(256, 256, 3, padding=1), (1, 256, 14, 14)),
    Layer("the same, channels last", lambda: nn.Conv2d(256, 256, 3, padding=1), (1, 256, 14, 14), True),
    Layer("the same, batch 8", lambda: nn.Conv2d(256, 256, 3, padding=1), (8, 256, 14, 14)),
    Layer("ResNet 3x3, 512 channels", lambda: nn.Conv2d(512, 512, 3, padding=1), (1, 512, 7, 7)),
    Layer("ResNet 1x1, 1024 to 256", lambda: nn.Conv2d(1024, 256, 1), (1, 1024, 14, 14)),
    Layer("the same, channels last", lambda: nn.Conv2d(1024, 256, 1), (1, 1024, 14, 14), True),
    Layer("ResNet 1x1, 2048 to 512", lambda: nn.Conv2d(2048, 512, 1), (1, 2048, 7, 7)),
    Layer("depthwise 3x3, 192 channels", lambda: nn.Conv2d(192, 192, 3, padding=1, groups=192), (1, 192, 28, 28)),
    Layer("ViT patches 16x16", lambda: nn.Conv2d(3, 768, 16, stride=16), (1, 3, 224, 224)),
    Layer("the same, batch 8", lambda: nn.Conv2d(3, 768, 16, stride=16), (8, 3, 224, 224)),
    Layer("speech, kernel 3, 512 channels", lambda: nn.Conv1d(512, 512, 3, stride=2), (1, 512, 400)),
    Layer("speech positions, 16 groups", lambda: nn.Conv1d(768, 768, 128, padding=64, groups=16), (1, 768, 100)),
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
    sides = {"bf16": lambda: plain(x), **{name: partial(module, x) for name, module in converted.items()}}
    return sides | {f"limit of {name}": partial(limit, plain, module, x) for name, module in converted.items()}


def limit(plain: Any, fp8: Any, x: torch.Tensor) -> torch.Tensor:
    """torch's convolution in bfloat16 with the casts that it cannot do without."""
    ops.cast_from_fp8(fp8.codes, fp8.weight_scale, torch.bfloat16)
    if (scale := fp8.activation_scale(x)) is not None:
        codes = ops.cast_to_fp8(x, scale, fp8.codes.dtype, fp8.scheme.fmt.full_scale)
        x = ops.cast_from_fp8(codes, scale, torch.bfloat16)
    return plain(x)


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
def run(budget: float = 2.0, single_thread: bool = False) -> tuple[list[Row], list[str]]:
    """The rows of the table, and what to know about them.

    Args:
        budget: seconds for each convolution.
        single_thread: whether one thread is used, and its CPU time counts.
    """
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1 if single_thread else threads)
    for layer in LAYERS:
        form = torch.channels_last if layer.channels_last else torch.contiguous_format
        x = torch.randn(layer.shape).bfloat16().contiguous(memory_format=form)
        sides = sides_of(layer, x)
        check(sides)
        clock = timing.seconds_of_thread if single_thread else timing.seconds
        times = timing.interleave(dict(sides), budget=budget, least=9, most=200, warmup=2, measure=clock)
        rows += [_row(layer, name, times) for name in CLOSE]
    torch.set_num_threads(threads)
    clock_name = "CPU time of a single thread" if single_thread else "time"
    return rows, [
        f"convolutions: {clock_name}; the limit is torch's in bfloat16 and casting the codes, and the input where "
        f"it is rounded; {WANTED} times as fast as bfloat16 or {WANTED_OF_LIMIT:.0%} of the limit will do"
    ]


def _row(layer: Layer, name: str, times: timing.Times) -> Row:
    ours, plain = 1e3 * timing.median(times[name]), 1e3 * timing.median(times["bf16"])
    ratio, limit = timing.ratio(times["bf16"], times[name]), timing.ratio(times[f"limit of {name}"], times[name])
    return Row(
        f"{layer.name}, {name}",
        f"{ours:.2f} ms",
        f"bf16 {plain:.2f} ms",
        ratio,
        WANTED if limit < WANTED_OF_LIMIT else None,
        limit=limit,
        limit_name="bf16 and casts",
        wanted_limit=WANTED_OF_LIMIT if ratio < WANTED else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for each convolution")
    parser.add_argument("--single-thread", action="store_true", help="the CPU time of one thread")
    options = parser.parse_args()
    machine.prepare()
    rows, notes = run(options.budget, options.single_thread)
    print(report(rows, machine.describe(), notes))


if __name__ == "__main__":
    main()
