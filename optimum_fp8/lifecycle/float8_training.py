"""Layers with which other libraries train in FP8: they quantize in each step, and are not measured or converted."""

from __future__ import annotations

from torch import nn

from ..errors import FP8NotAvailableError

_TRAINERS = ("torchao", "transformer_engine", "msamp")  # what accelerate's mixed_precision="fp8" makes layers of


def refuse_float8_training(model: nn.Module, action: str) -> None:
    """Refuse a model whose linear layers were replaced by some that train in FP8, before `prepare` or since.

    Raises:
        FP8NotAvailableError: names the first of them, and the way to an FP8 model.
    """
    for name, module in model.named_modules():
        kind, library = type(module).__name__, type(module).__module__.split(".")[0]
        if library in _TRAINERS and kind.endswith("Linear"):
            raise FP8NotAvailableError(
                f"{action}: {name or 'the model'} is a {kind} of {library}, which trains in FP8 by itself "
                "(Accelerator(mixed_precision='fp8') puts it there): expected the layers of the original model. Save "
                "the trained model with save_pretrained, and quantize what was saved by from_pretrained(…, "
                "quantization_config=FP8Config(…))"
            )
