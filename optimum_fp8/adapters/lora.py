"""A LoRA adapter as peft saves it: which modules it changes, and by how much.

A module's weight `W` `[out, in]` becomes `W + B A · scaling`, with `A` `[r, in]`, `B` `[out, r]` and a scaling of
`alpha / r`, or `alpha / √r` (rslora). DoRA gives the rows of the sum a length of their own.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint.folder import read_json
from ..errors import FP8CheckpointError, FP8NotAvailableError
from ..files.source import Stored, headers_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(r"^(.+)\.lora_(A|B|magnitude_vector)(?:\.default)?(?:\.weight)?$")
_PARTS = {"A": "a", "B": "b", "magnitude_vector": "magnitude"}

# What an adapter may do beside adding to weights, by the key of its configuration.
_UNSUPPORTED = {
    "modules_to_save": "whole modules stand beside the adapter",
    "target_parameters": "parameters that are no module's weight are adapted, such as stacks of experts",
    "trainable_token_indices": "rows of embeddings were trained",
    "lora_bias": "its B has a bias",
    "layer_replication": "it repeats layers of the base",
    "use_qalora": "it pools inputs by groups",
    "use_bdlora": "its matrices are block-diagonal",
    "alora_invocation_tokens": "it is active after certain tokens only",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it is scaled by singular values",
    "monteclora_config": "its matrices are sampled",
}
# Ways to begin that leave the base as it is. Others (pissa, olora, loftq, corda, …) change it, and train beside that.
_LEAVE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraWeights:
    """What an adapter has for one module.

    Attributes:
        name: of the module in the model that was adapted.
        a: `[r, in]`.
        b: `[out, r]`.
        scaling: of their product.
        magnitude: `[out]`, the lengths of the rows of the weight (DoRA), or None.
    """

    name: str
    a: Stored
    b: Stored
    scaling: float
    magnitude: Stored | None

    @property
    def shape(self) -> tuple[int, int]:
        """`[out, in]` of the weight that it belongs to."""
        return self.b.shape[0], self.a.shape[1]

    def delta(self, read: Callable[[Stored], torch.Tensor]) -> torch.Tensor:
        """`B A · scaling`, float32 `[out, in]`, as peft computes it."""
        return (read(self.b).float() @ read(self.a).float()) * self.scaling

    def added(self, weight: torch.Tensor, delta: torch.Tensor, read: Callable[[Stored], torch.Tensor]) -> torch.Tensor:
        """The adapted weight, float32 `[out, in]`.

        Args:
            weight: `[out, in]`, a floating-point dtype.
            delta: what `delta` returned.
            read: reads tensors.
        """
        adapted = weight + delta
        if self.magnitude is None:
            return adapted
        lengths = torch.linalg.norm(adapted, dim=1)
        return (read(self.magnitude).float() / lengths).view(-1, 1) * adapted


def open_adapter(folder: str | os.PathLike[str]) -> dict[str, LoraWeights]:
    """The adapter in a folder that peft saved, by the names of the modules that it changes.

    Raises:
        FP8CheckpointError: there is no adapter, or its weights do not fit its configuration.
        FP8NotAvailableError: it is no LoRA, or does more than adding to weights; the message names what.
    """
    folder = os.path.abspath(folder)
    for name in (CONFIG, WEIGHTS):
        if not os.path.isfile(os.path.join(folder, name)):
            others = "; adapter_model.bin is not read (unpickling a file runs what is in it)" if name == WEIGHTS else ""
            raise FP8CheckpointError(
                f"{os.path.join(folder, name)} does not exist: expected what peft's save_pretrained wrote, "
                f"{CONFIG} and {WEIGHTS}{others}"
            )
    config, path = read_json(os.path.join(folder, CONFIG)), os.path.join(folder, WEIGHTS)
    _refuse(config, folder)
    found: dict[str, dict[str, Stored]] = {}
    held = list(headers_of(path))
    # Of an adapted head peft saves the weight in high precision as well, which is the base's own.
    frozen = {each.key.replace(".lora_A.", ".base_layer.") for each in held if ".lora_A." in each.key}
    for stored in (each for each in held if each.key not in frozen):
        match = _PART.match(stored.key.removeprefix(_PREFIX))
        if match is None or (match[2] == "magnitude_vector") and not config.get("use_dora"):
            raise FP8NotAvailableError(
                f"{stored.key} of {folder} is no lora_A or lora_B of a linear layer (embeddings, biases and whole "
                f"modules are not merged here): {_WITH_PEFT}"
            )
        found.setdefault(match[1], {})[_PARTS[match[2]]] = stored
    if not found:
        raise FP8CheckpointError(f"{path} holds no lora_A and lora_B: it adapts nothing")
    return {name: _weights(name, parts, config, path) for name, parts in found.items()}


_WITH_PEFT = (
    "merge it with peft into the model in high precision (merge_and_unload), save that, and quantize what was saved"
)


def _refuse(config: Mapping[str, Any], folder: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise FP8NotAvailableError(f"{folder} is an adapter of peft_type={kind!r}, expected 'LORA': {_WITH_PEFT}")
    if config.get("bias", "none") != "none":
        raise FP8NotAvailableError(f"bias={config['bias']!r} of {folder}: biases were trained as well: {_WITH_PEFT}")
    for key, why in _UNSUPPORTED.items():
        if config.get(key):
            raise FP8NotAvailableError(f"{key}={config[key]!r} of {folder}: {why}: {_WITH_PEFT}")
    began = config.get("init_lora_weights", True)
    if began not in _LEAVE_THE_BASE:
        raise FP8NotAvailableError(
            f"init_lora_weights={began!r} of {folder} changes the weights of the base, so the adapter belongs to "
            "others than those: save it as a plain LoRA, with peft's path_initial_model_for_weight_conversion"
        )


def _weights(name: str, parts: Mapping[str, Stored], config: Mapping[str, Any], path: str) -> LoraWeights:
    needed = ["a", "b"] + (["magnitude"] if config.get("use_dora") else [])
    if absent := [part for part in needed if part not in parts]:
        raise FP8CheckpointError(f"{path} has no {absent[0]!r} of the LoRA of {name}: it is damaged, save it again")
    said = {
        "r": _of_pattern(config.get("rank_pattern"), name, config.get("r", 8)),
        "lora_alpha": _of_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)),
    }
    for key, value in said.items():
        if not isinstance(value, int | float) or not math.isfinite(value) or value < (key == "r"):
            raise FP8CheckpointError(f"{key}={value!r} for {name} in {CONFIG} beside {path}: expected a number")
    rank, alpha = int(said["r"]), float(said["lora_alpha"])
    a, b, magnitude = parts["a"], parts["b"], parts.get("magnitude")
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise FP8NotAvailableError(f"{a.key} is {a.shape}, expected [r, in] of a linear layer: {_WITH_PEFT}")
    if (a.shape[0], b.shape[1]) != (rank, rank) or (magnitude and magnitude.shape != b.shape[:1]):
        raise FP8CheckpointError(
            f"{path}: {a.key} is {a.shape} and {b.key} {b.shape}, but {CONFIG} says a rank of {rank}: expected "
            f"[{rank}, in] and [out, {rank}]; they are not of one adapter"
        )
    return LoraWeights(name, a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), magnitude)


def _of_pattern(pattern: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """The value of the first key that matches the end of a module's name, as peft looks for it."""
    keys: Iterable[str] = pattern or ()
    return next(((pattern or {})[key] for key in keys if re.match(rf"(.*\.)?({key})$", name)), otherwise)
