"""Attention: `fp8_sdpa_recomp_fwd`, `fp8_sdpa_fwd`, and `sdpa_recomp_fwd`, which has no scales.

The reference formula, on a whole row at once; the kernels work tile by tile, and equal it but for roundings.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .calls import Arguments
from .device import Device
from .refuse import FP8, HIGH, one_element, require, require_broadcast, require_dtype, require_one_element

SCALES = ("d_scale_q", "d_scale_k", "d_scale_v", "q_scale_s", "q_scale_o", "d_scale_s")
FAST_LINV = 128  # the fast softmax divides the reciprocal sums by it


class Attended(NamedTuple):
    """The output in its dtype, and in float32 all that it came from; `plain` is the output before it is rounded."""

    output: Tensor
    plain: Tensor
    probabilities: Tensor
    row_max: Tensor
    reciprocal_sum: Tensor


def _scores_shape(a: Arguments) -> tuple[int, ...]:
    batch = torch.broadcast_shapes(a.q.shape[:-2], a.k.shape[:-2])
    return (*batch, a.q.shape[-2], a.k.shape[-2])


def _output_shape(a: Arguments) -> tuple[int, ...]:
    scores = _scores_shape(a)
    return (*torch.broadcast_shapes(scores[:-2], a.v.shape[:-2]), scores[-2], a.v.shape[-1])


def _check(a: Arguments) -> None:
    require_dtype(a.q, FP8 + HIGH, "sdpa: dtype of q")
    require(a.q.dtype == a.k.dtype == a.v.dtype, f"sdpa: dtypes differ: {a.q.dtype}, {a.k.dtype}, {a.v.dtype}")
    require(a.q.dim() == a.k.dim() == a.v.dim() >= 3, "sdpa: q, k and v have equally many dimensions, three or more")
    require(
        a.q.shape[-1] == a.k.shape[-1] and a.k.shape[-2] == a.v.shape[-2],
        f"sdpa: shapes do not fit: q {tuple(a.q.shape)}, k {tuple(a.k.shape)}, v {tuple(a.v.shape)}",
    )
    _output_shape(a)
    require(a.p == 0, "sdpa: dropout is not emulated")
    require(a.softmax_mode.lower() in ("none", "fast", "fp32"), f"sdpa: no softmax_mode {a.softmax_mode!r}")
    require(a.seq_padding_type.lower() in ("none", "left", "right"), f"sdpa: no padding {a.seq_padding_type!r}")
    require(len(a.get("window_size") or (-1, -1)) == 2, "sdpa: window_size is [left, right]")
    if a.attention_mask is not None:
        require(not a.is_causal, "sdpa: is_causal excludes an attention_mask")
        require_dtype(a.attention_mask, (torch.bool, *HIGH), "sdpa: dtype of attention_mask")
        require_broadcast(a.attention_mask, _scores_shape(a), "sdpa: attention_mask")
    if (sinks := a.get("sinks")) is not None:
        heads = math.prod(_scores_shape(a)[1:-2])
        require(sinks.numel() == heads, f"sdpa: sinks has one element for each of {heads} heads")
    if a.valid_seq_len is not None:
        require(a.is_causal, "Valid sequence length is supported only with is_causal(triangular) mask")
        require(
            tuple(a.valid_seq_len.shape) == (a.q.shape[0],),
            f"sdpa: valid_seq_len has one element for each of {a.q.shape[0]} samples",
        )


def _check_scales(a: Arguments) -> None:
    for name in SCALES:
        require_one_element(getattr(a, name), f"sdpa: {name}", (torch.float32,))
    if a.q.dtype not in FP8:
        require(all(getattr(a, name) is None for name in SCALES), "sdpa: scales are given, but q, k, v are not FP8")


def _is_fast(a: Arguments) -> bool:
    return a.q.dtype in FP8 or a.softmax_mode.lower() == "fast"


def _statistics(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Empty row maxima, reciprocal sums, and seed; one element each if no backward pass needs them."""
    shape = (*_scores_shape(a)[:-1], 1) if a.requires_backward else (1,)
    fp8 = a.q.dtype in FP8
    linv = torch.bfloat16 if fp8 or (_is_fast(a) and a.q.dtype == torch.bfloat16) else torch.float32
    row_max = a.q.new_empty(shape, dtype=torch.bfloat16 if fp8 else a.q.dtype)
    return row_max, a.q.new_empty(shape, dtype=linv), a.q.new_empty(1, dtype=torch.int32)


def _output_dtype(a: Arguments) -> torch.dtype:
    return torch.bfloat16 if a.q.dtype in FP8 and a.get("q_scale_o") is None else a.q.dtype


def check_recompute(a: Arguments, device: Device) -> tuple[Tensor, ...]:
    _check(a)
    output = a.q.new_empty(_output_shape(a), dtype=_output_dtype(a))
    return (output, *_statistics(a))


def check_fp8_recompute(a: Arguments, device: Device) -> tuple[Tensor, ...]:
    _check_scales(a)
    require(not (a.requires_backward and a.valid_seq_len is not None), "sdpa: valid_seq_len is for inference only")
    amax = [a.q.new_empty(1, dtype=torch.float32) for _ in range(2)]
    return (*check_recompute(a, device), *amax)


def check_fp8(a: Arguments, device: Device) -> tuple[Tensor, ...]:
    _check(a)
    _check_scales(a)
    require(a.q_scale_o is None, "fp8_sdpa_fwd: there is no FP8 output without recompute: leave q_scale_o out")
    output = a.q.new_empty(_output_shape(a), dtype=_output_dtype(a))
    mask, amax = a.q.new_empty(1, dtype=torch.int8), a.q.new_empty(1, dtype=torch.float32)
    return output, a.q.new_empty(_scores_shape(a)), mask, amax


def _window(a: Arguments) -> tuple[int, int]:
    left, right = a.get("window_size") or (-1, -1)
    return left, right


def _seen(a: Arguments) -> Tensor | None:
    """Which keys a query sees, by position; bool, broadcast over scores. None: all."""
    queries, keys = torch.arange(a.q.shape[-2])[:, None], torch.arange(a.k.shape[-2])
    seen = torch.ones(len(queries), len(keys), dtype=torch.bool)
    left, right = _window(a)
    if a.is_causal:
        seen = seen & (keys <= queries)
    if left >= 0:
        seen = seen & (keys >= queries - left)
    if right >= 0:
        seen = seen & (keys <= queries + right)
    if a.valid_seq_len is not None:
        lengths = a.valid_seq_len.reshape(-1, *[1] * (a.q.dim() - 1))
        padded_left = a.seq_padding_type.lower() == "left"
        seen = seen & (keys >= len(keys) - lengths if padded_left else keys < lengths)
    if a.attention_mask is not None and a.attention_mask.dtype == torch.bool:
        seen = seen & a.attention_mask
    return None if bool(seen.all()) else seen


def _sink(a: Arguments, scores: Tensor) -> Tensor | None:
    """A logit of each head that takes part in the sum and has no value; broadcast over scores [..., 1]."""
    sinks = a.get("sinks")
    return None if sinks is None else sinks.float().reshape(*scores.shape[1:-2], 1, 1).expand(*scores.shape[:-1], 1)


def _softmax(a: Arguments, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, row maxima, and reciprocals of the sums; rows that see no key: all zero."""
    sink = _sink(a, scores)
    wide = scores if sink is None else torch.cat([scores, sink], -1)
    row_max = wide.amax(-1, keepdim=True)
    blind = row_max == -math.inf
    exponentials = torch.exp(wide - row_max.masked_fill(blind, 0.0))
    reciprocal = 1 / exponentials.sum(-1, keepdim=True)
    probabilities = (exponentials * reciprocal)[..., : scores.shape[-1]]
    return probabilities.masked_fill(blind, 0.0), row_max, reciprocal


def _attend(a: Arguments, device: Device) -> Attended:
    """softmax(scale * (s_q q)(s_k k)^T + mask), rounded to q's dtype, times s_v v: in float32."""
    fp8 = a.q.dtype in FP8
    q, k, v = (device.decode(each) if fp8 else each.float() for each in (a.q, a.k, a.v))
    scales: dict[str, Any] = {name: one_element(a.get(name)) for name in SCALES}
    scores = torch.matmul(q, k.transpose(-1, -2)) * (scales["d_scale_q"] * scales["d_scale_k"]) * a.scale
    if a.attention_mask is not None and a.attention_mask.dtype != torch.bool:
        scores = scores + a.attention_mask.float()
    if (seen := _seen(a)) is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    probabilities, row_max, reciprocal = _softmax(a, scores)
    if fp8:
        rounded = device.decode(device.encode(probabilities * scales["q_scale_s"], a.q.dtype))
    else:
        rounded = probabilities.to(a.q.dtype).float()
    plain = torch.matmul(rounded, v) * (scales["d_scale_s"] * scales["d_scale_v"])
    quantized = a.get("q_scale_o") is not None
    output = device.encode(plain * scales["q_scale_o"], a.q.dtype) if quantized else plain.to(_output_dtype(a))
    return Attended(output, plain, probabilities, row_max, reciprocal)


def _amax(x: Tensor, wanted: bool) -> Tensor:
    return x.abs().max().float().reshape(1) if wanted else torch.zeros(1)


def recompute(a: Arguments, device: Device) -> tuple[Tensor, ...]:
    return _with_statistics(a, _attend(a, device))


def _with_statistics(a: Arguments, attended: Attended) -> tuple[Tensor, ...]:
    row_max, reciprocal, seed = _statistics(a)
    if not a.requires_backward:
        return attended.output, row_max.zero_(), reciprocal.zero_(), seed.zero_()
    linv = attended.reciprocal_sum / (FAST_LINV if _is_fast(a) else 1)
    return attended.output, row_max.copy_(attended.row_max), reciprocal.copy_(linv), seed.zero_()


def fp8_recompute(a: Arguments, device: Device) -> tuple[Tensor, ...]:
    attended = _attend(a, device)
    of_output = bool(a.get("is_amax_o") or a.get("is_amax_0"))
    amax = _amax(attended.probabilities, a.is_amax_s), _amax(attended.plain, of_output)
    return (*_with_statistics(a, attended), *amax)


def fp8(a: Arguments, device: Device) -> tuple[Tensor, ...]:
    attended = _attend(a, device)
    scaled = attended.probabilities * one_element(a.q_scale_s)
    kept = device.encode(scaled, a.q.dtype) if a.q.dtype in FP8 else scaled.to(a.q.dtype)
    amax = _amax(attended.probabilities, a.is_amax_s)
    return attended.output, kept, torch.zeros(1, dtype=torch.int8), amax
