"""One layer of a cache in FP8: a layer of transformers that holds codes, and one of its kind that holds their scales.

Everything a cache layer does to what it holds (growing, sliding, cropping, reordering for beams, moving between
devices) is the same for codes as for values, so transformers' own layer does it. Dynamic scales, one a token and head,
are held by a second layer of the same kind, which does the same to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import (
    CacheLayerMixin,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from ..modules.fp8_tensor import FP8Tensor
from .scales import CacheScales

# Typed loosely: properties stand in for attributes of these classes.
_Layer: Any = CacheLayerMixin
_LinearAttention: Any = LinearAttentionCacheLayerMixin


class LayerOver(_Layer):
    """A cache layer with something between it and the model; all but `update` is passed on to it."""

    _OWN: frozenset[str] = frozenset({"inner"})

    def __init__(self, inner: Any):
        self.inner = inner

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
        return self.inner.keys

    @property
    def values(self) -> torch.Tensor | None:
        return self.inner.values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.inner.lazy_initialization(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner.update(key_states, value_states, *args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.inner.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.inner.get_seq_length()

    def get_max_length(self) -> int:
        return self.inner.get_max_length()

    def _each(self, action: str, *args: Any) -> None:
        """Do the same to everything that is held."""
        getattr(self.inner, action)(*args)

    def offload(self) -> None:
        self._each("offload")

    def prefetch(self) -> None:
        self._each("prefetch")

    def reset(self) -> None:
        self._each("reset")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._each("reorder_cache", beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        self._each("crop", tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._each("batch_select_indices", indices)


class FP8Layer(LayerOver):
    """A cache layer whose keys and values are stored in FP8.

    `update` and `keys` / `values` give tensors of the dtype that was written: `FP8Tensor`s, or ordinary ones.

    Attributes:
        inner: holds the codes, as uint8 (not every device has every operator for FP8).
        scale_layer: holds float32 scales `[batch, heads, length, 1]`; None where scales are static.
        scales: how to scale what is written.
        acts_as: the dtype that keys and values appear in.
        written: whether anything was cached; until then `scales` may change.
        ordinary: whether ordinary tensors are handed out, for code that reads memory without asking torch.
    """

    _OWN = frozenset({"inner", "scale_layer", "scales", "acts_as", "written", "ordinary"})

    def __init__(self, inner: Any, scale_layer: Any, scales: CacheScales, acts_as: torch.dtype, written: bool = False):
        super().__init__(inner)
        self.scale_layer, self.scales, self.acts_as, self.written = scale_layer, scales, acts_as, written
        self.ordinary = False

    @property
    def keys(self) -> torch.Tensor | None:
        if self.inner.keys is None:
            return None
        return self._acting(self.inner.keys, self.scales.k if self.scale_layer is None else self.scale_layer.keys)

    @property
    def values(self) -> torch.Tensor | None:
        if self.inner.values is None:
            return None
        return self._acting(self.inner.values, self.scales.v if self.scale_layer is None else self.scale_layer.values)

    def _acting(self, codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        assert scale is not None  # as `CacheScales` has it
        tensor = FP8Tensor(codes.view(self.scales.fmt.dtype), scale, self.acts_as)
        return tensor.dequantize() if self.ordinary else tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.acts_as = key_states.dtype
        self.inner.lazy_initialization(key_states.to(torch.uint8), value_states.to(torch.uint8))
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
        self.acts_as, self.written = key_states.dtype, True
        k_codes, k_scale = self.scales.quantize(key_states, self.scales.k)
        v_codes, v_scale = self.scales.quantize(value_states, self.scales.v)
        keys, values = self.inner.update(k_codes.view(torch.uint8), v_codes.view(torch.uint8), *args, **kwargs)
        if self.scale_layer is not None:
            k_scale, v_scale = self.scale_layer.update(k_scale, v_scale)
        return self._acting(keys, k_scale), self._acting(values, v_scale)

    def reset(self) -> None:
        super().reset()
        self.written = False

    def activate_past_recording(self) -> None:
        if hasattr(self.inner, "activate_past_recording"):
            self._each("activate_past_recording")

    def _each(self, action: str, *args: Any) -> None:
        getattr(self.inner, action)(*args)
        if self.scale_layer is not None and hasattr(self.scale_layer, action):
            getattr(self.scale_layer, action)(*args)


class _WithState(_LinearAttention):
    """The part of a hybrid layer that keeps a linear-attention state: it stays in high precision."""

    inner: Any

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner.update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner.update_recurrent_state(*args, **kwargs)


class FP8HybridLayer(FP8Layer, _WithState):
    """An `FP8Layer` that keeps a linear-attention state besides."""


# transformers before 5.24 tells hybrid layers from linear ones by their class.
LinearAttentionAndFullAttentionLayer.register(FP8HybridLayer)


class WatchedLayer(LayerOver):
    """A cache layer in high precision that tells what is written to it.

    Attributes:
        see: called with keys and values at the next write, then forgotten: the module about to write sets it anew.
    """

    _OWN = frozenset({"inner", "see"})

    def __init__(self, inner: Any):
        super().__init__(inner)
        self.see: Callable[[torch.Tensor, torch.Tensor], None] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        see, self.see = self.see, None
        if see is not None:
            see(key_states, value_states)
        return super().update(key_states, value_states, *args, **kwargs)


class WatchedHybridLayer(WatchedLayer, _WithState):
    """A `WatchedLayer` that keeps a linear-attention state besides."""
