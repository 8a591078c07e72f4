"""Models of which each process holds a part of every weight: which can be measured, and what they cannot do."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import nn

from ..errors import FP8NotAvailableError
from ..measure import processes
from ..modules import part_of


def is_sharded(model: nn.Module) -> bool:
    """Whether weights are spread over processes, which have to run the model all at once, then."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def refuse_zero3(model: nn.Module, action: str) -> None:
    """Refuse a model whose parameters DeepSpeed's ZeRO-3 has cut into parts: they are empty between its calls.

    Raises:
        FP8NotAvailableError: names the first of them.
    """
    name = next((name for name, parameter in model.named_parameters() if hasattr(parameter, "ds_id")), None)
    if name is not None:
        raise FP8NotAvailableError(
            f"{action}: DeepSpeed's ZeRO-3 has cut {name} into parts: expected whole weights. Measure with FSDP2 "
            "(fully_shard, then prepare) what does not fit on one device, and quantize in one process without "
            "DeepSpeed's stage 3; what was trained by ZeRO-3 is saved first (zero3_save_16bit_model), then quantized"
        )


def refuse_partial_activations(model: nn.Module) -> None:
    """Refuse what gives a module a part of its activations in each process, or of its weights as one flat tensor.

    Raises:
        FP8NotAvailableError: tensor parallelism, or the older FSDP.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    modules = list(model.modules())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise FP8NotAvailableError(
            "calibration of a FullyShardedDataParallel model, whose weights are flat: expected FSDP2: shard it with "
            "torch.distributed.fsdp.fully_shard (fsdp_version: 2 for accelerate)"
        )
    if is_sharded(model) and not any(isinstance(module, FSDPModule) for module in modules):
        raise FP8NotAvailableError(
            "calibration of a model in tensor parallelism, where each process sees parts of some activations: measure "
            "it without tp_plan, in as many processes as you like, each with a copy of the model or its shards by "
            "fully_shard; the FP8 checkpoint can be used in any way"
        )


def refuse_sharded(model: nn.Module, action: str) -> None:
    """Refuse a step that needs whole weights.

    Raises:
        FP8NotAvailableError: each process holds a part of them.
    """
    if is_sharded(model):
        raise FP8NotAvailableError(
            f"{action}: the weights of this model are spread over processes: end measuring with "
            "finalize_calibration(model), which writes the measurements, and quantize in one process by "
            "from_pretrained(…, quantization_config=FP8Config(mode='QUANTIZE', dump_stats_path=…))"
        )


def is_spread(model: nn.Module) -> bool:
    """Whether transformers cuts the weights of a model by a tensor- or expert-parallel plan."""
    asked: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    return asked is not None and (asked.tp_size > 1 or asked.ep_size > 1)


def refuse_spread(model: nn.Module, action: str) -> None:
    """Refuse a step that needs whole weights in FP8.

    Raises:
        FP8NotAvailableError: each process computes with its part of them.
    """
    if is_spread(model):
        raise FP8NotAvailableError(
            f"{action}: from_pretrained spreads this model over processes by a tensor- or expert-parallel plan: load "
            "it whole, without tp_plan and distributed_config; what was saved in FP8 can be loaded under a plan"
        )


def common_fingerprint(model: nn.Module, own: str) -> str:
    """The fingerprint of a model whose layers are split over processes, the same in all of them, which have to ask for
    it at once; of any other model its own.

    Args:
        model: the model, of which this process holds a part.
        own: the fingerprint of that part.
    """
    if part_of(model) is None:
        return own
    parts = sorted({said["fingerprint"] for said in processes().agree({"fingerprint": own})})
    return own if len(parts) == 1 else hashlib.sha256("\n".join(parts).encode()).hexdigest()[: len(own)]


def refuse_shares(model: nn.Module) -> None:
    """Refuse to give each process a share of the data where all have to compute the same at once.

    Raises:
        FP8NotAvailableError: layers are split over processes.
    """
    if part_of(model) is not None:
        raise FP8NotAvailableError(
            "calibrate: layers of this model are split over processes, and each process would get other samples: run "
            "the same data through the model in all of them, after prepare(model, config), in a loop of your own"
        )
