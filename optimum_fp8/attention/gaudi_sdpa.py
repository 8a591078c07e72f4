"""`ModuleFusedSDPA` of model files for Gaudi: attention as a whole, through the kernel that the module holds.

The module's own forward runs, whatever it does around the kernel; the kernel's place is taken. (A module that holds no
such kernel is one itself: its forward is replaced.) The arguments are those of the bridge's `FusedSDPA.apply`, of which
callers give as many as their version has: 7 or 8 (Falcon, vision models), 11 (optimum-habana), 15 (vLLM-Gaudi).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import FP8NotAvailableError
from ..modules.handler import register_handler
from ..scales import Scheme
from .detect import Kind
from .function_mode import AttentionMode
from .handlers import WholeAttention, stores_keys
from .plan import plan_of

_KERNEL = "_hpu_kernel_fsdpa"
_ARGUMENTS = (
    *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "softmax_mode", "recompute_mode"),
    *("valid_seq_len", "seq_padding_type", "return_dropout_mask", "return_attn_probs", "window_size", "sinks"),
)
# By other names in newer versions of the bridge, and in callers.
_ALIASES = {
    "q": "query",
    "k": "key",
    "v": "value",
    "recompute": "recompute_mode",
    "valid_sequence_lengths": "valid_seq_len",
    "padding_side": "seq_padding_type",
}


class FP8Kernel:
    """Stands where a `ModuleFusedSDPA` has its kernel, or its forward, and does what the module's plan says.

    Attributes:
        module: the module.
        original: what stood there.
    """

    def __init__(self, module: nn.Module, original: Any):
        self.module, self.original = module, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.apply(*args, **kwargs)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Attention of query `[batch, heads, length, size]`, key and value; the arguments are those of the kernel.

        Raises:
            FP8NotAvailableError: an argument that attention in FP8 does not take.
        """
        plan, compute = plan_of(self.module), getattr(self.original, "apply", self.original)
        if plan is None:
            return compute(*args, **kwargs)
        given = dict(zip((*_ARGUMENTS, "further arguments"), args, strict=False))
        given |= {_ALIASES.get(name, name): value for name, value in kwargs.items()}
        query, key, value = (given.pop(name) for name in _ARGUMENTS[:3])
        mask = None if plan.scheme is None else _mask(plan.name, given, query, key)
        output = AttentionMode(self.module, plan).fused(
            partial(compute, *args, **kwargs),
            *(query, key, value, mask, given.get("dropout_p") or 0.0, False, given.get("scale")),
            sinks=given.get("sinks"),
        )
        if plan.observe is not None:
            plan.observe("output", output)
        return output


def _mask(name: str, given: dict[str, Any], query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """The mask that says the same as the arguments of a call: the one given, or what `is_causal` and others mean.

    Raises:
        FP8NotAvailableError: arguments that no mask says, or that contradict each other.
    """
    window, lengths = given.get("window_size"), given.get("valid_seq_len")
    window = None if window is None or tuple(window) == (-1, -1) else tuple(window)
    mask, causal = given.get("attn_mask"), bool(given.get("is_causal"))
    unknown = [each for each, value in given.items() if each not in _ARGUMENTS and value is not None]
    unknown += [each for each in ("return_dropout_mask", "return_attn_probs") if given.get(each)]
    if mask is not None:
        parts = {"is_causal": causal, "valid_seq_len": lengths is not None, "window_size": window is not None}
        unknown += [f"{part} beside an attn_mask" for part, there in parts.items() if there]
    elif lengths is not None and not causal:
        unknown.append("valid_seq_len without is_causal")
    if unknown:
        raise FP8NotAvailableError(
            f"{name} (ModuleFusedSDPA) called its kernel with {', '.join(unknown)}, which attention in FP8 does "
            "not take: pass an attn_mask alone (flash_attention_causal_mask=False), or put the module on the blocklist"
        )
    if mask is not None or not (causal or window):
        return mask
    side = str(given.get("seq_padding_type") or "left").lower()
    return visible(query, key, causal=causal, lengths=lengths, padded_left=side == "left", window=window)


def visible(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    causal: bool,
    lengths: torch.Tensor | None,
    padded_left: bool,
    window: tuple[int, int] | None,
) -> torch.Tensor:
    """Which keys each query sees, bool `[1 or batch, 1, queries, keys]`, as Gaudi's attention kernels count.

    Args:
        query: `[…, queries, size]`.
        key: `[…, keys, size]`.
        causal: no key behind the query, both counted from the start.
        lengths: `(batch,)`, how many keys of each sample are none of padding; None: all.
        padded_left: whether padding comes before the keys that count, or after.
        window: how many keys before and behind the query it sees; a negative number: all.
    """
    device, keys = query.device, key.shape[-2]
    rows = torch.arange(query.shape[-2], device=device)[:, None]
    columns = torch.arange(keys, device=device)
    seen = columns <= rows if causal else torch.ones_like(columns <= rows)
    left, right = window or (-1, -1)
    seen = seen & (columns >= rows - left) if left >= 0 else seen
    seen = seen & (columns <= rows + right) if right >= 0 else seen
    seen = seen[None, None]
    if lengths is not None:
        of_sample = lengths.to(device).reshape(-1, 1, 1, 1)
        seen = seen & (columns >= keys - of_sample if padded_left else columns < of_sample)
    return seen


def take_place_of_kernel(module: Any) -> None:
    """Have a `ModuleFusedSDPA` call attention in FP8, or have its calls observed, as its plan says."""
    give_place_back(module)
    kernel = module.__dict__.get(_KERNEL)
    place = _KERNEL if hasattr(kernel, "apply") else "forward"
    module.__dict__[place] = FP8Kernel(module, kernel if place == _KERNEL else module.forward)


def give_place_back(module: Any) -> None:
    """Give a `ModuleFusedSDPA` back its kernel, or its forward."""
    for place in (_KERNEL, "forward"):
        ours = module.__dict__.get(place)
        if isinstance(ours, FP8Kernel):
            module.__dict__.pop(place)
            if place == _KERNEL:
                module.__dict__[place] = ours.original


class FusedHandler(WholeAttention):
    """`ModuleFusedSDPA` modules: attention as a whole."""

    kind, way, types = "attention fused", Kind.FUSED, ("ModuleFusedSDPA",)

    def reads_cache(self, module: Any, model: nn.Module) -> bool:
        return stores_keys(model)

    def tells(self, scheme: Scheme) -> tuple[str, ...]:
        return ("q",) if scheme.rounds_attention else ()

    def enter(self, module: Any) -> None:
        take_place_of_kernel(module)

    def leave(self, module: Any) -> None:
        give_place_back(module)


register_handler(FusedHandler())
