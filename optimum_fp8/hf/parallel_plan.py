"""FP8 checkpoints under transformers' tensor- and expert-parallel plans: each process keeps its part of the weights.

A plan names modules and how their weights are cut. It knows nothing of scales, nor of codes as they are stored. So the
weights of FP8 modules are taken out of it, every process reads them whole, and keeps its part once they are there; what
a plan does with inputs and outputs stays transformers'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import FP8NotAvailableError
from ..lifecycle import is_spread, refuse_spread
from ..modules import FP8Module
from ..modules.fused_experts import FP8FusedExperts
from ..modules.handler import converted_modules
from ..modules.weight import frozen
from ..scales import Granularity, PerTensor
from .loading_call import refuse_spread_experts

_WHOLE = "replicate"
_ROWS, _COLUMNS = ("colwise", "colwise_gather_output", "colwise_rep"), ("rowwise", "rowwise_split_input", "rowwise_rep")
_PACKED = "packed_colwise"
_NOT_CUT = ("mla_kv_a_proj", "replicated_with_grad_allreduce", "all_reduce", _WHOLE)
_BY_EXPERT, _IN_EXPERTS = "ep_dispatch_experts", "moe_tp_experts"


def check_plan(model: Any, is_checkpoint: bool) -> None:
    """Refuse what cannot be spread over processes as `from_pretrained` was told to.

    Raises:
        FP8NotAvailableError: a model in high precision by a plan, or experts in FP8 in another way.
    """
    if not is_checkpoint:
        refuse_spread(model, "quantizing while loading, and dequantizing")
    if not is_spread(model):
        refuse_spread_experts(model)
    elif not hasattr(model, "_resolve_parallel_plans"):
        refuse_spread(
            model, "tensor and expert parallelism with this version of transformers, which is too old for it,"
        )
    elif model.config.distributed_config.dp_size > 1 or model.config.distributed_config.pp_size > 1:
        refuse_spread(model, "fsdp_size, dp_replicate_size and pp_size beside a plan for FP8 modules")


def keep_whole(model: Any, plan: dict[str, str]) -> None:
    """Take the weights of FP8 modules out of a plan, and have transformers call the modules with local tensors."""
    if not is_spread(model):
        return
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    ep_size = model.config.distributed_config.ep_size
    for name, module in model.named_modules():
        generic, fp8 = replace_layer_number_by_wildcard(name), isinstance(module, FP8Module)
        if not fp8 and not isinstance(module, FP8FusedExperts):
            continue
        stacks = () if fp8 else module.stack_names
        parameters = [own for own, _ in module.named_parameters(recurse=False)]
        for own in {*parameters, *stacks} if generic in plan or f"{generic}.{next(iter(stacks), '')}" in plan else ():
            key = f"{generic}.{own}"
            if own in parameters:
                plan[key] = _WHOLE
            else:
                plan.pop(key, None)  # they come one by one
        module.__dict__["_hf_quantized_needs_local_tp"] = True
        if plan.get(generic) == _BY_EXPERT and ep_size > 1:
            if len(module.numbers) % ep_size:
                raise FP8NotAvailableError(
                    f"{name}: {len(module.numbers)} experts cannot be spread evenly over {ep_size} processes: choose "
                    "an ep_size that divides them"
                )
            module.__dict__["num_experts"] = len(module.numbers) // ep_size


def keep_own_part(model: Any) -> None:
    """Leave each FP8 module what this process computes with.

    Raises:
        FP8NotAvailableError: names a module that cannot be cut as its plan says.
    """
    if not is_spread(model):
        return
    meshes = model._mesh_manager
    tp_plan, ep_plan, _ = model._resolve_parallel_plans(model.config.distributed_config)
    for name, (module, handler) in converted_modules(model).items():
        if not handler.family.replaced:
            _refuse_per_head(name, handler.state(module))
        elif name in ep_plan and isinstance(module, FP8FusedExperts):
            mesh = meshes.get_mesh("ep")
            _cut_experts(name, module, ep_plan[name], mesh.get_local_rank(), mesh.size())
        elif name in tp_plan:
            mesh = meshes.get_mesh("tp")
            cut = _cut_experts if isinstance(module, FP8FusedExperts) else _cut_layer
            cut(name, module, tp_plan[name], mesh.get_local_rank(), mesh.size())


def _cut_layer(name: str, module: Any, style: str, rank: int, count: int) -> None:
    if style in _NOT_CUT:
        return
    if not isinstance(module, FP8Module) or style not in (*_ROWS, *_COLUMNS, _PACKED) or module.codes.ndim != 2:
        raise FP8NotAvailableError(
            f"{name}: {type(module).__name__} in FP8 cannot be spread by {style!r}: linear layers can be, by "
            f"{', '.join((*_ROWS, *_COLUMNS, _PACKED))}; put it on the blocklist and quantize again"
        )
    dim, packed = (1 if style in _COLUMNS else 0), (2 if style == _PACKED else 1)
    codes = _part(name, module.codes, dim, rank, count, packed)
    _check_blocks(name, module.scheme.weight.granularity, codes, dim, packed)
    scale = _part_of_scale(name, module.weight_scale, dim, rank, count, packed)
    module.weight_shape = codes.shape
    module.set_weight(frozen(codes), frozen(scale))
    if module.bias is not None and dim == 0:
        module.bias = nn.Parameter(_part(name, module.bias.detach(), 0, rank, count, packed), requires_grad=False)
    module.pack()


def _cut_experts(name: str, module: FP8FusedExperts, style: str, rank: int, count: int) -> None:
    layout, tensors = module.layout, []
    stacks, scales = module.stacks(), module.stack_scales()
    plain = layout.called == "routed" and not layout.identity
    alone = layout.is_concatenated and not layout.biases and not layout.has_post_expert_norm
    if style == _BY_EXPERT and plain:
        tensors = [_part(name, each, 0, rank, count) for pair in zip(stacks, scales, strict=True) for each in pair]
        for own in (*layout.biases, "intermediate_scale"):
            whole = module._parameters.get(own)
            if whole is not None:
                module._parameters[own] = frozen(_part(name, whole.detach(), 0, rank, count))
        module.numbers = range(len(tensors[0]))
    elif style == _IN_EXPERTS and plain and alone:
        for own, codes, scale in zip(module.stack_names, stacks, scales, strict=True):
            dim = 2 if own == layout.down else 1
            tensors.append(_part(f"{name}.{own}", codes, dim, rank, count, module.halves[own]))
            _check_blocks(f"{name}.{own}", module.scheme.weight.granularity, tensors[-1], dim, module.halves[own])
            by_tensor = isinstance(module.scheme.weight.granularity, PerTensor)
            tensors.append(
                scale if by_tensor else _part_of_scale(f"{name}.{own}", scale, dim, rank, count, module.halves[own])
            )
    else:
        raise FP8NotAvailableError(
            f"{name}: the experts of {type(module.origin).__name__} in FP8 cannot be spread by {style!r}: expected "
            f"{_BY_EXPERT!r}, or {_IN_EXPERTS!r} of experts without biases and norms whose gate lies above the up "
            "projection; load the model whole in each process, or put the experts on the blocklist and quantize again"
        )
    module.set_weights(*tensors)
    module.pack()


def _check_blocks(name: str, granularity: Granularity, part: torch.Tensor, dim: int, packed: int) -> None:
    """Refuse parts that do not end where blocks of values that share a scale end."""
    names = ("rows",) if dim == part.ndim - 2 else ("columns", "size")
    block = next((getattr(granularity, each) for each in names if hasattr(granularity, each)), 1)
    if (size := part.shape[dim] // packed) % block:
        raise FP8NotAvailableError(
            f"{name}: each process would have {size} values along dimension {dim}, which is no multiple of {block}, as "
            f"the scales {granularity} need: use fewer processes, or a scale method by channels"
        )


def _part_of_scale(name: str, scale: torch.Tensor, dim: int, rank: int, count: int, packed: int = 1) -> torch.Tensor:
    """The scale of a part of a weight: all of it, where all values along the dimension share theirs."""
    along = scale.shape[dim] if scale.ndim > dim else 1
    return scale.detach() if along == 1 else _part(name, scale, dim, rank, count, packed)


def _part(name: str, tensor: torch.Tensor, dim: int, rank: int, count: int, packed: int = 1) -> torch.Tensor:
    """What one of `count` processes has of a tensor, of each of `packed` tensors that lie behind each other in it."""
    if tensor.shape[dim] % (packed * count):
        raise FP8NotAvailableError(
            f"{name}: {tensor.shape[dim]} values along dimension {dim} cannot be spread evenly over {count} processes"
        )
    parts = [each.chunk(count, dim)[rank] for each in tensor.detach().chunk(packed, dim)]
    bytes_of = [part.contiguous().view(torch.uint8) if part.element_size() == 1 else part for part in parts]
    return torch.cat(bytes_of, dim).contiguous().view(tensor.dtype)


def _refuse_per_head(name: str, scales: dict[str, torch.Tensor]) -> None:
    if found := next((key for key, scale in scales.items() if scale.numel() > 1), None):
        raise FP8NotAvailableError(
            f"{name}.{found}: scales of attention heads cannot be spread over processes: quantize with a scale method "
            "by tensors, or load the model whole in each process"
        )
