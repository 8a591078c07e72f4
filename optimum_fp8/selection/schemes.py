"""From the configuration to the scheme of each module: the one place where keys become what is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..config import FP8Config
from ..formats import hp_torch_dtype
from ..scales import DYNAMIC, STATIC, WEIGHT_ONLY, PerHead, PerTensor, PerToken, Scheme


def scheme_for(
    config: FP8Config, names: Sequence[str] = (), types: Sequence[str] = (), *, calibrated: bool = True
) -> Scheme:
    """The scheme that a configuration asks for one module.

    Args:
        config: the configuration, with overrides and rules for single modules.
        names: all qualified names of the module; none: what holds where nothing else is said.
        types: names of its classes.
        calibrated: whether `activation_scheme="auto"` finds ranges; without, it means dynamic scales.
    """
    own = config.for_module(names, types)
    fmt, method = own.number_format, own.method
    activations = own.scheme if own.scheme != "auto" else STATIC if calibrated else DYNAMIC
    static = activations == STATIC
    activation = method.activation if static else method.dynamic_activation
    rule = activation.with_backoff(own.input_backoff)
    by_head = PerHead() if own.attention_granularity == "head" else PerTensor()
    softmax_backoff = own.input_backoff if own.softmax_backoff is None else own.softmax_backoff
    return Scheme(
        fmt=fmt,
        weight=method.weight.with_backoff(own.weight_backoff),
        input=rule,
        operands=replace(rule, granularity=by_head if static else PerToken()),
        probabilities=method.activation.with_backoff(softmax_backoff),
        activations=activations,
        hp_dtype=hp_torch_dtype(own.hp_dtype),
        arithmetic=own.arithmetic,
        dataflow="qdq" if own.use_qdq else own.attention_dataflow,
        rounds_attention=own.attention and activations != WEIGHT_ONLY,
        caches=own.kv_cache,
        caches_windows=own.kv_cache_skip != "sliding",
        fp8_all_reduce=own.row_parallel_linear_allreduce_quantization,
        embeddings=own.quantize_embeddings,
        constant_scales=own.scale_format == "scalar",
    )
