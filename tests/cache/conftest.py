"""Tiny random models whose caches are calibrated and FP8, and the same computed by other means.

The oracle is a model without any of our code on which `Cache.update` itself rounds to FP8 what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.cache_utils import CacheLayerMixin

from optimum_fp8.cache import CacheScales, attach_cache, detach_cache, observe_caches
from optimum_fp8.formats import number_format

FMT = number_format()
VOCABULARY = 64
CACHE = "cache" if tuple(map(int, hf.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of which transformers says that it is attention and which layer of a cache is its own."""
    return {
        name: module
        for name, module in model.named_modules()
        if ("Attention" in type(module).__name__ or type(module).__name__.endswith("Attn"))
        and any(isinstance(getattr(module, key, None), int) for key in ("layer_idx", "layer_id"))
    }


def static_scales(module: nn.Module) -> CacheScales | None:
    if not hasattr(module, "k_scale"):
        return None
    return CacheScales(FMT, module.k_scale.float(), module.v_scale.float())  # the model may be float64


def dynamic_scales(module: nn.Module) -> CacheScales:
    return CacheScales(FMT)


SCALES: dict[str, Callable[[nn.Module], CacheScales | None]] = {"static": static_scales, "dynamic": dynamic_scales}


def calibrate(model: nn.Module, run: Callable[[], Any]) -> None:
    """Give the attention modules of `model` scales per head, from what they write to caches during `run`."""
    modules, ranges = attention_modules(model), {}

    def see(name: str, keys: torch.Tensor, values: torch.Tensor) -> None:
        for kind, x in (("k", keys), ("v", values)):
            maxabs = x.detach().float().abs().amax((0, 2, 3)).clamp(min=1e-3)
            ranges[name, kind] = torch.maximum(ranges.get((name, kind), maxabs), maxabs)

    watch = observe_caches(modules, see)
    run()
    watch.remove()
    for (name, kind), maxabs in ranges.items():
        modules[name].register_buffer(f"{kind}_scale", (maxabs / 300).view(-1, 1, 1))


@contextmanager
def rounding_caches(model: nn.Module, scales_of: Callable[[nn.Module], CacheScales | None]) -> Iterator[None]:
    """While inside, every cache in high precision is given values rounded as the running module's scales say."""
    running: list[nn.Module] = []
    modules = attention_modules(model).values()
    hooks = [m.register_forward_pre_hook(lambda module, args: running.append(module)) for m in modules]
    original = hf.Cache.update

    def rounded(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        if scale is None:
            maxabs = x.double().abs().amax(-1, keepdim=True)
            scale = torch.where(maxabs > 0, torch.exp2(torch.ceil(torch.log2(maxabs / 224))), 1).float()
        return ((x.float() * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)

    def update(self, key_states, value_states, *args, **kwargs):
        scales = scales_of(running[-1])
        if scales is not None:
            key_states, value_states = rounded(key_states, scales.k), rounded(value_states, scales.v)
        return original(self, key_states, value_states, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf.Cache, "update", update)
        yield
    for hook in hooks:
        hook.remove()


@contextmanager
def fp8_caches(model: nn.Module, scales_of: Callable[[nn.Module], CacheScales | None]) -> Iterator[None]:
    attach_cache(attention_modules(model).values(), scales_of)
    yield
    detach_cache(model.modules())


def cache_of(output: Any) -> hf.Cache:
    return getattr(output, CACHE)


def layers_of(cache: hf.Cache) -> list[Any]:
    if isinstance(cache, hf.EncoderDecoderCache):
        return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    return cache.layers


def tiny(model_class: type, config_class: type, **options: Any) -> nn.Module:
    """A model with weights large enough that what is attended to matters."""
    torch.manual_seed(0)
    model = model_class(config_class(**options)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name and "norm" not in name:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return model


def llama(**options: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1}
    return tiny(hf.LlamaForCausalLM, hf.LlamaConfig, **(sizes | {"eos_token_id": 2} | options))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, str], torch.Tensor]:
    """Offloading really takes away: until they are fetched, tensors are where nothing can be computed with them.

    What a layer would do with two devices is done with the CPU and memory that is not to be had at the time.
    """
    away: dict[tuple[int, str], torch.Tensor] = {}

    def offload(self: Any) -> None:
        for name in ("keys", "values") if self.is_initialized else ():
            away[id(self), name] = getattr(self, name)
            setattr(self, name, getattr(self, name).to("meta"))

    def prefetch(self: Any) -> None:
        for name in ("keys", "values"):
            if (id(self), name) in away:
                setattr(self, name, away.pop((id(self), name)))

    monkeypatch.setattr(CacheLayerMixin, "offload", offload)
    monkeypatch.setattr(CacheLayerMixin, "prefetch", prefetch)
    return away
