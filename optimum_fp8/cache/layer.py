"""One layer of a cache in FP8: a layer of transformers that holds codes, and one of its kind that holds their scales.

Everything a cache layer does to what it holds (growing, sliding, cropping, reordering for beams, moving between
devices) is the same for codes as for values, so transformers' own layer does it. Dynamic scales, one a token and head,
are held by a second layer of the same kind, which does the same to them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    CacheLayerMixin,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from ..errors import FP8NotAvailableError
from ..ops.fp8_tensor import FP8Tensor
from .active_writer import Writer
from .layers import as_stored, keep_address, quantize_held, scale_layer_for
from .scales import CacheScales

# Typed loosely: properties stand in for attributes of these classes.
_Layer: Any = CacheLayerMixin
_LinearAttention: Any = LinearAttentionCacheLayerMixin


class _NoGradient(torch.autograd.Function):
    """What is read from a cache, of states that want a gradient: they are codes in memory, and pass none on."""

    @staticmethod
    def forward(ctx: Any, cached: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return cached

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise FP8NotAvailableError(
            "there is no gradient through keys and values of an FP8 cache: call the model with use_cache=False to "
            "train, or under torch.no_grad()"
        )


class FP8Layer(_Layer):
    """A layer of a cache whose keys and values are stored in FP8 as soon as it has scales, and until then as they are.

    `update` and `keys` / `values` give tensors of the dtype that was written: `FP8Tensor`s, or ordinary ones.

    Attributes:
        inner: the layer of transformers; holds the codes, as `as_stored` gives them.
        scales: how to scale what is written; None: in high precision, for now.
        scale_layer: holds float32 scales `[batch, heads, length, 1]`; None where scales are static.
        writer: tells whose scales to take at the first write; None for a layer with scales of its own.
        written: whether anything was written in FP8; until then other scales may come.
        acts_as: the dtype that keys and values appear in.
    """

    _OWN = frozenset({"inner", "scales", "scale_layer", "writer", "written", "acts_as"})

    def __init__(self, inner: Any, scales: CacheScales | None = None, writer: Writer | None = None):
        self.inner, self.writer, self.written = inner, writer, False
        self.scales: CacheScales | None = None
        self.scale_layer: Any = None
        self.acts_as = torch.get_default_dtype()
        self.set_scales(scales)

    # What only some kinds have (sliding_window, conv_states, …) is read from and written to the layer itself.

    def __getattr__(self, name: str) -> Any:
        if name in self._OWN:  # a copy in the making
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.inner, name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    @property
    def is_initialized(self) -> bool:
        return self.inner.is_initialized

    @property
    def is_compileable(self) -> bool:
        return self.inner.is_compileable

    @property
    def is_croppable(self) -> bool:
        return self.inner.is_croppable

    @property
    def supports_early_init(self) -> bool:
        return self.inner.supports_early_init

    @property
    def keys(self) -> torch.Tensor | None:
        if self.scales is None or self.inner.keys is None:
            return self.inner.keys
        return self._acting(self.inner.keys, self.scales.k if self.scale_layer is None else self.scale_layer.keys)

    @property
    def values(self) -> torch.Tensor | None:
        if self.scales is None or self.inner.values is None:
            return self.inner.values
        return self._acting(self.inner.values, self.scales.v if self.scale_layer is None else self.scale_layer.values)

    def _acting(self, codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        assert self.scales is not None and scale is not None
        scale = scale.to(codes.device)  # they may have been offloaded
        tensor = FP8Tensor(codes.view(self.scales.fmt.dtype), scale, self.acts_as)
        return tensor.dequantize() if self.writer is not None and self.writer.ordinary else tensor

    def set_scales(self, scales: CacheScales | None) -> None:
        """Store by `scales` from now on. What is held in high precision is quantized; nothing in FP8 may be held."""
        if self.scales is None:
            if scales is not None and self.inner.is_initialized:
                self.acts_as = self.inner.keys.dtype
                self.scale_layer = quantize_held(self.inner, scales)
            elif scales is not None and scales.is_dynamic:
                self.scale_layer = scale_layer_for(self.inner)
        elif scales is None:
            self.scale_layer = None
            if self.inner.is_initialized:  # static storage, emptied
                self.inner.keys, self.inner.values = (x.to(self.acts_as) for x in (self.inner.keys, self.inner.values))
                keep_address(self.inner)
        elif not scales.is_dynamic:
            self.scale_layer = None
        elif self.scale_layer is None:
            self.scale_layer = scale_layer_for(self.inner)
            if self.inner.is_initialized:
                codes = self.inner.keys
                no_scales = codes.new_empty((*codes.shape[:2], 0, 1), dtype=torch.float32)
                self.scale_layer.lazy_initialization(no_scales, no_scales)
        self.scales = scales

    def _ask(self, writer: Writer) -> None:
        """Take the scales of the module that is writing."""
        scales = writer.scales() if writer.scales is not None else None
        if scales is not None:
            if not torch.compiler.is_compiling():
                scales.check(writer.name)
            if writer.record is not None:
                writer.record.layers += 1
        self.set_scales(scales)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self.scales is None:
            self.inner.lazy_initialization(key_states, value_states)
            return
        self.acts_as = key_states.dtype
        codes = (x.new_empty(x.shape, dtype=self.scales.fmt.dtype) for x in (key_states, value_states))
        self.inner.lazy_initialization(*map(as_stored, codes))
        if self.scale_layer is not None:
            no_scales = key_states.new_empty((*key_states.shape[:-1], 1), dtype=torch.float32)
            self.scale_layer.lazy_initialization(no_scales, no_scales)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache new keys and values.

        Args:
            key_states: `[batch, heads, new length, key size]`, a floating-point dtype.
            value_states: `[batch, heads, new length, value size]`.

        Returns:
            keys and values for attention to use, `[batch, heads, length, size]`.
        """
        if self.writer is not None:
            if self.writer.observe is not None:
                self.writer.observe(key_states, value_states)
            if not self.written:
                self._ask(self.writer)
        if self.scales is None:
            return self.inner.update(key_states, value_states, *args, **kwargs)
        self.acts_as, self.written = key_states.dtype, True
        k_codes, k_scale = self.scales.quantize(key_states, self.scales.k)
        v_codes, v_scale = self.scales.quantize(value_states, self.scales.v)
        keys, values = self.inner.update(as_stored(k_codes), as_stored(v_codes), *args, **kwargs)
        if self.scale_layer is not None:
            k_scale, v_scale = self.scale_layer.update(k_scale, v_scale)
        cached = self._acting(keys, k_scale), self._acting(values, v_scale)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            keys, values = (x.dequantize() if isinstance(x, FP8Tensor) else x for x in cached)
            return _NoGradient.apply(keys, key_states), _NoGradient.apply(values, value_states)
        return cached

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.inner.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.inner.get_seq_length()

    def get_max_length(self) -> int:
        return self.inner.get_max_length()

    def _each(self, action: str, *args: Any) -> None:
        """Do the same to the codes and to their scales."""
        getattr(self.inner, action)(*args)
        if self.scale_layer is not None:
            getattr(self.scale_layer, action)(*args)

    def offload(self) -> None:
        self._each("offload")

    def prefetch(self) -> None:
        self._each("prefetch")

    def reset(self) -> None:
        self._each("reset")
        self.written = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._each("reorder_cache", beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        self._each("crop", tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._each("batch_select_indices", indices)

    def activate_past_recording(self) -> None:
        for layer in (self.inner, self.scale_layer):
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()


class FP8HybridLayer(FP8Layer, _LinearAttention):
    """A layer with attention and a linear-attention state besides, which stays in high precision."""

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner.update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner.update_recurrent_state(*args, **kwargs)


# transformers before 5.24 tells hybrid layers from linear ones by their class.
LinearAttentionAndFullAttentionLayer.register(FP8HybridLayer)


def fp8_layer(layer: Any, scales: CacheScales | None = None, writer: Writer | None = None) -> FP8Layer:
    """The FP8 layer around `layer`; what it holds already is quantized when the scales are there."""
    hybrid = isinstance(layer, LinearAttentionCacheLayerMixin)
    return (FP8HybridLayer if hybrid else FP8Layer)(layer, scales, writer)


def in_fp8(layer: Any) -> bool:
    """Whether a layer of a cache stores FP8."""
    return isinstance(layer, FP8Layer) and layer.scales is not None
