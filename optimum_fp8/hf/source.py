"""Whether the checkpoint that is to be quantized holds values: the codes of another tool must not be taken for them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import FP8CheckpointError

# Names that quantization tools give what stands beside, or in the place of, a weight.
_COMPANION = re.compile(
    r"(?:weight|input|output|act|activation)s?_(?:quantizer|scal|zero_point|packed|global_scale|shape|g_idx).*"
    r"|(?:q|scaled?_)(?:weight|input|zeros|scales).*|scales|scale_inv|scaled_fp8|SCB|absmax|quant_map|.*_weight_scale.*"
    r"|.*_(?:blocks|scales|scale_inv)|_(?:amax|scale)"
)
_HIGH_PRECISION = {"F64", "F32", "F16", "BF16"}
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class _Tensor:
    """What is known of a tensor in a file without reading it; `dtype` as safetensors call it."""

    file: str
    key: str
    dtype: str
    dimensions: int
    floating: bool


def refuse_codes(model: nn.Module, files: Sequence[str] | None) -> None:
    """Refuse files with weights that are quantized already: quantized again, codes would be taken for values.

    Raises:
        FP8CheckpointError: names the first such tensor and its dtype.
    """
    own = {key.rpartition(".")[2] for key in model.state_dict()}
    weights = {name.rpartition(".")[2] for name, weight in model.named_parameters() if weight.ndim > 1}
    for tensor in _tensors(files or ()):
        leaf = tensor.key.rpartition(".")[2]
        if tensor.floating and tensor.dtype not in _HIGH_PRECISION:
            found = f"is {tensor.dtype}"
        elif not tensor.floating and tensor.dimensions > 1 and leaf in weights:
            found = f"is {tensor.dtype}, where a weight was expected"
        elif "." in tensor.key and leaf not in own and _COMPANION.fullmatch(leaf):
            found = f"({tensor.dtype}) belongs to a quantized weight"
        else:
            continue
        raise FP8CheckpointError(
            f"{tensor.key} in {tensor.file} {found}: this checkpoint is quantized already, and its codes would be "
            "taken for values; expected weights in bfloat16, float16 or float32: quantize the original model, or have "
            "the tool that made this one write it in high precision first"
        )


def _tensors(files: Sequence[str]) -> Iterator[_Tensor]:
    from transformers.modeling_utils import load_state_dict  # which imports this module in turn

    for path in files:
        name = os.path.basename(path)
        if str(path).endswith(".safetensors"):
            yield from _in_safetensors(path, name)
        else:
            for key, tensor in load_state_dict(path, map_location="meta").items():
                if torch.is_tensor(tensor):
                    dtype = _NAMES.get(tensor.dtype, str(tensor.dtype))
                    yield _Tensor(name, key, dtype, tensor.ndim, tensor.is_floating_point())


def _in_safetensors(path: str, name: str) -> Iterator[_Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                view = file.get_slice(key)
                dtype = view.get_dtype()
                yield _Tensor(name, key, dtype, len(view.get_shape()), dtype.startswith(("F", "BF")))
    except SafetensorError as error:
        raise FP8CheckpointError(f"{path} cannot be read ({error}): it is damaged, copy it again") from None
