"""Tiny models of diffusers with random weights, and inputs for them: one of each architecture that pipelines use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    WanTransformer3DModel,
)
from torch import nn

TEXT = 32


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _unet() -> nn.Module:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )


def _stable_diffusion(**options: Any) -> nn.Module:
    kinds = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=kinds[0],
        up_block_types=kinds[1],
        cross_attention_dim=TEXT,
        norm_num_groups=4,
        **{"attention_head_dim": 4, **options},
    )


def _stable_diffusion_xl() -> nn.Module:
    return _stable_diffusion(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
    )


def _latents() -> dict[str, Any]:
    return {
        "sample": _noise(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": _noise(2, 7, TEXT),
    }


def _latents_xl() -> dict[str, Any]:
    added = {"text_embeds": _noise(2, TEXT), "time_ids": torch.randint(64, (2, 6))}
    return {**_latents(), "added_cond_kwargs": added}


def _flux() -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        axes_dims_rope=(4, 4, 8),
    )


def _flux_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 16, 16),
        "encoder_hidden_states": _noise(1, 7, TEXT),
        "pooled_projections": _noise(1, TEXT),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.arange(16.0)[:, None].repeat(1, 3),
        "txt_ids": torch.zeros(7, 3),
    }


def _sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=32,
        pooled_projection_dim=TEXT,
        pos_embed_max_size=8,
    )


def _sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _noise(2, 4, 8, 8),
        "encoder_hidden_states": _noise(2, 7, TEXT),
        "pooled_projections": _noise(2, TEXT),
        "timestep": torch.tensor([3.0, 700.0]),
    }


def _dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=8
    )


def _dit_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _noise(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "class_labels": torch.tensor([1, 2]),
    }


def _wan() -> nn.Module:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def _wan_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 4, 2, 8, 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": _noise(1, 7, TEXT),
    }


def _autoencoder() -> nn.Module:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )


class Tiny(NamedTuple):
    """An architecture: what makes a model, and what makes its inputs by name."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]


TINY = {
    "ddim": Tiny(_unet, lambda: {"sample": _noise(2, 1, 8, 8), "timestep": torch.tensor([3, 700])}),
    "stable diffusion": Tiny(_stable_diffusion, _latents),
    "stable diffusion xl": Tiny(_stable_diffusion_xl, _latents_xl),
    "stable diffusion 3": Tiny(_sd3, _sd3_inputs),
    "flux": Tiny(_flux, _flux_inputs),
    "dit": Tiny(_dit, _dit_inputs),
    "wan": Tiny(_wan, _wan_inputs),
    "autoencoder": Tiny(_autoencoder, lambda: {"sample": _noise(1, 3, 16, 16)}),
}


# The largest take seconds to convert.
LARGE = ("stable diffusion", "stable diffusion xl")
EACH = [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in TINY]


def tiny(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of an architecture, the same each time."""
    torch.manual_seed(0)
    return TINY[name].make().eval().to(dtype)


def inputs(name: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, Any]:
    """Inputs for it, floats in `dtype`."""
    torch.manual_seed(seed)
    return _cast(TINY[name].inputs(), dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _cast(inner, dtype) for key, inner in value.items()}
    return value.to(dtype) if value.is_floating_point() else value


@torch.no_grad()
def output(model: nn.Module, name: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """What the model makes of them."""
    return model(**inputs(name, dtype, seed))[0]


def steps(name: str, dtype: torch.dtype, count: int) -> Iterator[dict[str, Any]]:
    """Several inputs, for calibration."""
    return (inputs(name, dtype, seed) for seed in range(count))
