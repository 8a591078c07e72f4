"""Which scales an attention module gets, from which of its measurements."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

from .config import FP8Config
from .measure import Measurements
from .scales import activation_scale
from .selection_attention import FUNCTIONS, FUSED, INTERFACE, PRODUCT, SOFTMAX, STORAGE, attention_kind

P_MAXABS = 1.0  # a softmax's output is never larger: its range needs no data
_INTERFACE_KINDS = ("q", "k", "v")
_PRODUCT = re.compile(r"[qkpv]\d*$")
_TELLING = {
    INTERFACE: ("q", "k_cache"),
    FUNCTIONS: ("q", "k_cache"),
    PRODUCT: ("q",),
    FUSED: ("q",),
    STORAGE: ("input",),
}


def telling_kinds(module: nn.Module, config: FP8Config) -> tuple[str, ...]:
    """Measurements of which at least one tells that calibration has reached a module; none: it needs no ranges."""
    kind = attention_kind(module)
    if kind in (PRODUCT, FUSED) and not config.attention:  # only what comes out of a cache is in FP8
        return ()
    return _TELLING.get(kind or "", ())


def scales_for(name: str, module: nn.Module, measurements: Measurements, config: FP8Config) -> dict[str, torch.Tensor]:
    """The scales a module gets, by parameter name."""
    kind, static = attention_kind(module), config.scheme in ("static", "auto")

    def scale(of: str, heads: bool = False) -> torch.Tensor:
        maxabs = measurements.maxabs(name, of) if config.method.activation.needs_range else torch.zeros(())
        assert maxabs is not None  # modules without ranges have been sorted out
        by_head = measurements.maxabs_per_head(name, of) if heads and config.attention_granularity == "head" else None
        result = _activation_scale(maxabs if by_head is None else by_head, config)
        return result if by_head is None else result.reshape(-1, 1, 1)

    if kind == STORAGE:
        return {"input_scale": scale("input", heads=True)}
    scales: dict[str, torch.Tensor] = {}
    if config.attention and static and kind in (INTERFACE, FUSED):
        scales = {f"{of}_scale": scale(of, heads=True) for of in _INTERFACE_KINDS}
        if config.attention_dataflow == "fused" and not config.use_qdq:
            scales["output_scale"] = scale("output")
    elif config.attention and static and kind in (FUNCTIONS, PRODUCT):
        seen = [of for owner, of in measurements.tensors if owner == name and _PRODUCT.match(of)]
        fixed = _INTERFACE_KINDS if kind == FUNCTIONS else _INTERFACE_KINDS[:2]
        seen = sorted(seen) if config.method.activation.needs_range else list(fixed)
        scales = {f"{of}_scale": scale(of) for of in seen}
    rounds_p = kind in (INTERFACE, FUSED, SOFTMAX)
    if kind == FUNCTIONS and static:  # the first product after a softmax may take something else
        measured_p = measurements.maxabs(name, "p")
        rounds_p = measured_p is None or bool(measured_p <= P_MAXABS)
    if config.attention and rounds_p:
        scales["p_scale"] = _activation_scale(torch.tensor(P_MAXABS), config, config.softmax_backoff)
    if config.kv_cache and static and kind in (INTERFACE, FUNCTIONS):
        scales |= _scales_of_cache(name, scales, measurements, scale)
    return scales


def _scales_of_cache(
    name: str, scales: dict[str, torch.Tensor], measurements: Measurements, scale: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What the cache needs besides: nothing where attention gets just what is cached, so that both share one scale."""
    if (name, "k_cache") not in measurements.tensors:  # a module that does not cache, or a fixed scale
        return {f"{kind}_scale": scale(kind, heads=True) for kind in "kv" if not scales}
    if not scales:
        return {f"{kind}_scale": scale(f"{kind}_cache", heads=True) for kind in "kv"}
    same = all(
        f"{kind}_scale" in scales and measurements.maxabs(name, kind) == measurements.maxabs(name, f"{kind}_cache")
        for kind in "kv"
    )
    return {} if same else {f"{kind}_cache_scale": scale(f"{kind}_cache") for kind in "kv"}


def _activation_scale(maxabs: torch.Tensor, config: FP8Config, backoff: float | None = None) -> torch.Tensor:
    return activation_scale(
        maxabs,
        method=config.scale_method,
        target=config.resolved_target,
        fp8_config=config.fp8_config,
        hp_dtype=config.hp_dtype,
        backoff=config.input_backoff if backoff is None else backoff,
    )
