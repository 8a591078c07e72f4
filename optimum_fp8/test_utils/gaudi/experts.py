"""Mixtures of experts: all overloads of `mixture_of_experts`.

Step by step as the bridge does it in eager mode: every product is rounded to bf16, so are the activation, the product
of gate and up projection, the weighting by the router and the sum over experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calls import Arguments
from .device import Device
from .refuse import FP8, HIGH, require, require_dtype, require_one_element

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
}
SMALL = 1e-8  # added to maxima of dynamic quantization
BF16 = torch.bfloat16


@dataclass
class Operand:
    """A matrix in float32 whose products are multiplied by a scale: of one element, or one for each row or column."""

    matrix: Tensor
    scale: Tensor | None = None


@dataclass
class Expert:
    """The weights of an expert as [in, out]; `gate` and `up` are w1 and w2, or the halves of w12."""

    gate: Operand
    up: Operand
    down: Operand
    bias12: Tensor | None = None
    bias3: Tensor | None = None


def _is_fused(a: Arguments) -> bool:
    return a.get("w12") is not None


def _weight_lists(a: Arguments) -> dict[str, list[Tensor]]:
    return {name: getattr(a, name) for name in (("w12", "w3") if _is_fused(a) else ("w1", "w2", "w3"))}


def _quantized(a: Arguments) -> bool:
    """Whether weights are FP8."""
    return a.get("d_scale_w3") is not None


def _check_lists(a: Arguments) -> None:
    count = a.experts_max - a.experts_min + 1
    lists = dict(_weight_lists(a))
    for name in ("w12_bias", "w3_bias", "d_scale_intermediate_hidden_states", *(f"d_scale_{name}" for name in lists)):
        if isinstance(each := a.get(name), list | tuple):
            lists[name] = list(each)
    for name, each in lists.items():
        require(
            len(each) == count,
            f"mixture_of_experts: experts {a.experts_min} to {a.experts_max} are {count}, but {name} has {len(each)}",
        )


def _check_weights(a: Arguments) -> None:
    hidden, lists = a.hidden_states.shape[-1], _weight_lists(a)
    for name, weights in lists.items():
        require(all(weight.dim() == 2 for weight in weights), f"mixture_of_experts: {name} must be matrices")
    for name, weights in lists.items():
        for i, weight in enumerate(weights):
            inner = a.w3[i].shape[1 if a.permuted_weights else 0]
            shape = weight.shape[::-1] if a.permuted_weights else weight.shape
            expected = {"w3": (inner, hidden), "w12": (hidden, 2 * inner)}.get(name, (hidden, inner))
            require(
                tuple(shape) == expected,
                f"mixture_of_experts: {name} of shape {tuple(weight.shape)} does not fit a hidden size of {hidden} "
                f"and an inner size of {inner} (permuted_weights={a.permuted_weights})",
            )
            require(weight.dtype == weights[0].dtype, "All tensors should have the same dim and type.")
            require_dtype(weight, FP8 if _quantized(a) else (*HIGH, torch.float16), f"mixture_of_experts: {name}")
            if (biases := a.get(f"{name}_bias")) is not None:
                require(
                    tuple(biases[i].shape) == expected[1:],
                    f"mixture_of_experts: {name}_bias of shape {tuple(biases[i].shape)} does not fit {expected[1]} "
                    "columns",
                )


def _check_weight_scale(a: Arguments, name: str, weight: Tensor, scale: Tensor) -> None:
    """Refuse a scale of a weight that is neither one element nor one for each column of [in, out], or each block."""
    if (block := a.get("block_size")) is not None:
        covers = scale.dim() == 2 and all(n * block >= size for n, size in zip(scale.shape, weight.shape, strict=True))
        require(
            covers,
            f"mixture_of_experts: {name} of shape {tuple(scale.shape)} does not cover a weight of "
            f"{tuple(weight.shape)} in blocks of {block}",
        )
        return
    columns = weight.shape[0 if a.permuted_weights else 1]
    require(
        scale.numel() in (1, columns),
        f"mixture_of_experts: {name} has {scale.numel()} elements for {columns} columns",
    )


def _check_scales(a: Arguments) -> None:
    hidden, middle = a.get("d_scale_hidden_states"), a.get("d_scale_intermediate_hidden_states")
    weights = [
        (f"d_scale_{name}", weight, scale)
        for name, each in _weight_lists(a).items()
        for weight, scale in zip(each, getattr(a, f"d_scale_{name}"), strict=True)
    ]
    for scale in (hidden, *(middle or ()), *(scale for _, _, scale in weights)):
        if isinstance(scale, Tensor):
            require_dtype(scale, HIGH, "mixture_of_experts: scales")
    for name, weight, scale in weights:
        if isinstance(scale, Tensor):
            _check_weight_scale(a, name, weight, scale)
    for scale in middle or ():
        require_one_element(scale, "mixture_of_experts: d_scale_intermediate_hidden_states")
    if isinstance(hidden, Tensor):
        tokens = a.hidden_states.shape[0]
        require(
            hidden.numel() in (1, tokens),
            f"mixture_of_experts: d_scale_hidden_states has {hidden.numel()} elements for {tokens} tokens",
        )


def _check(a: Arguments) -> None:
    require(a.hidden_states.dim() == 2, "mixture_of_experts: hidden_states is [tokens, hidden size]")
    in_fp8 = a.get("d_scale_hidden_states") is not None
    require_dtype(a.hidden_states, FP8 if in_fp8 else (*HIGH, torch.float16), "mixture_of_experts: hidden_states")
    require(
        not a.expert_routing_table.dtype.is_floating_point
        and a.expert_routing_table.shape == a.router_weights.shape
        and a.router_weights.shape[:1] == a.hidden_states.shape[:1],
        "mixture_of_experts: expert_routing_table and router_weights are both [tokens, experts of each token]",
    )
    require_dtype(a.router_weights, (*HIGH, torch.float16), "mixture_of_experts: router_weights")
    activation = a.get("activation")
    require(activation is None or activation in ACTIVATIONS, "Unsupported activation")
    _check_lists(a)
    _check_weights(a)
    if _quantized(a):
        _check_scales(a)


def check_experts(a: Arguments, device: Device) -> Tensor | tuple[Tensor, Tensor]:
    _check(a)
    output = a.hidden_states.new_empty(a.hidden_states.shape, dtype=BF16 if _quantized(a) else a.hidden_states.dtype)
    if a.get("measurement_mode") is None and a.get("measure_per_token") is None:
        return output
    count = len(a.w3)
    shape = (count, a.hidden_states.shape[0]) if a.get("measure_per_token") else (count,)
    return output, a.hidden_states.new_empty(shape, dtype=torch.float32)


def _column_scales(scale: Any, columns: int, halves: bool) -> list[Tensor | None]:
    """The scales of the two halves of w12's columns, or of a whole weight: [1, columns], or one element."""
    if scale is None:
        return [None, None]
    scale = torch.as_tensor(scale, dtype=torch.float32)
    if scale.numel() == 1:
        return [scale.reshape(()), scale.reshape(())]
    scale = scale.reshape(1, columns)
    return [*scale.chunk(2, 1)] if halves else [scale]


def _block_scaled(weight: Tensor, scale: Tensor, block: int) -> Tensor:
    """A weight times the scales of its blocks, rounded to their dtype; blocks at the edges may be smaller."""
    spread = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return (weight * spread[: weight.shape[0], : weight.shape[1]].float()).to(scale.dtype).float()


def _operands(a: Arguments, device: Device, name: str, i: int) -> list[Operand]:
    """A weight, or the two halves of w12, as [in, out] with their scales."""
    stored, scales = getattr(a, name)[i], a.get(f"d_scale_{name}")
    weight = device.decode(stored) if stored.dtype in FP8 else stored.float()
    if (block := a.get("block_size")) is not None:
        weight, scales = _block_scaled(weight, scales[i], block), None
    weight = weight.t() if a.permuted_weights else weight
    halves = name == "w12"
    parts = _column_scales(None if scales is None else scales[i], weight.shape[1], halves)
    if not halves:
        return [Operand(weight, parts[0])]
    # With biases gate and up projection take turns; else the gate comes first.
    interleaved = a.get("w12_bias") is not None
    split = (weight[:, ::2], weight[:, 1::2]) if interleaved else weight.chunk(2, 1)
    if interleaved and parts[0] is not None and parts[0].dim() > 0:
        whole = torch.cat([part for part in parts if part is not None], 1)
        parts = [whole[:, ::2], whole[:, 1::2]]
    return [Operand(half, part) for half, part in zip(split, parts, strict=True)]


def _experts(a: Arguments, device: Device) -> Iterator[Expert]:
    for i in range(len(a.w3)):
        names = ("w12",) if _is_fused(a) else ("w1", "w2")
        gate, up = (operand for name in names for operand in _operands(a, device, name, i))
        expert = Expert(gate, up, _operands(a, device, "w3", i)[0])
        if a.get("w12_bias") is not None:
            expert.bias12, expert.bias3 = a.w12_bias[i], a.w3_bias[i]
        yield expert


def _product(x: Operand, weight: Operand, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """A product accumulated in float32, times the scales, rounded to `dtype`; then the bias is added in it."""
    left, right = (torch.ones(()) if each.scale is None else each.scale for each in (x, weight))
    product = (x.matrix @ weight.matrix * (left * right)).to(dtype)
    return product if bias is None else product + bias.to(dtype)


def _intermediate(a: Arguments, x: Operand, expert: Expert, dtype: torch.dtype) -> Tensor:
    """act(x gate) * (x up); with biases: gate * sigmoid(alpha * gate) * (up + 1), both clamped."""
    if expert.bias12 is None:
        gate = ACTIVATIONS[a.activation](_product(x, expert.gate, dtype))
        return gate * _product(x, expert.up, dtype)
    gate = _product(x, expert.gate, dtype, expert.bias12[::2]).clamp(max=a.limit)
    up = _product(x, expert.up, dtype, expert.bias12[1::2]).clamp(-a.limit, a.limit)
    return (up + 1) * (gate * torch.sigmoid(gate * a.alpha))


def _requantized(a: Arguments, device: Device, x: Tensor, i: int) -> Operand:
    """The last product's input: in FP8 with a static scale, or with one for each token, or as it is."""
    dtype = a.hidden_states.dtype
    if dtype not in FP8:
        return Operand(x.float())
    if (static := a.get("d_scale_intermediate_hidden_states")) is not None:
        scale = torch.as_tensor(static[i], dtype=torch.float32).reshape(())
    else:
        scale = (x.float().abs().amax(1, keepdim=True) + SMALL) / device.full_scale(dtype)
    return Operand(device.decode(device.encode(x.float() * (1 / scale), dtype)), scale)


def _hidden(a: Arguments, device: Device) -> Operand:
    if a.hidden_states.dtype not in FP8:
        return Operand(a.hidden_states.float())
    scale = torch.as_tensor(a.d_scale_hidden_states, dtype=torch.float32)
    return Operand(device.decode(a.hidden_states), scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(()))


def experts(a: Arguments, device: Device) -> Tensor | tuple[Tensor, Tensor]:
    """The sum over the experts of a token, each times its router weight; with measuring, also maxabs of each expert.

    The last product's input is measured, over the tokens that are routed to the expert. Tokens that are routed to
    experts outside `experts_min` to `experts_max` get nothing from them.
    """
    x = _hidden(a, device)
    dtype = BF16 if _quantized(a) else a.hidden_states.dtype
    total = torch.zeros(a.hidden_states.shape, dtype=dtype)
    maxima = []
    for i, expert in enumerate(_experts(a, device)):
        chosen = a.expert_routing_table == i + a.experts_min
        left_out, weight = ~chosen.any(1), (a.router_weights * chosen).sum(1, keepdim=True).to(dtype)
        middle = _intermediate(a, x, expert, dtype)
        maxima.append(middle.float().abs().amax(1).masked_fill(left_out, 0.0))
        output = _product(_requantized(a, device, middle, i), expert.down, dtype, expert.bias3) * weight
        total = total + output.masked_fill(left_out[:, None], 0.0)
    return _with_maxima(a, total, torch.stack(maxima))


def _with_maxima(a: Arguments, total: Tensor, maxima: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """What an overload returns, of the sum and of maxima [experts, tokens]."""
    if a.get("measure_per_token") is not None:
        return total, maxima if a.measure_per_token else maxima.amax(1)
    if a.get("measurement_mode") is not None:
        return total, maxima.amax(1) * a.measurement_mode
    return total
