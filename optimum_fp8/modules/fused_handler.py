"""The handler of transformers' fused experts: what `FP8FusedExperts` stands for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import FP8NotAvailableError, FP8ScaleError
from ..formats import NumberFormat, holds_codes
from ..measure import Observers
from ..measure.inc.names import INTERMEDIATE
from ..scales import PerChannel, PerTensor, PerToken, Scheme, always_fits
from .expert_names import parts_of_experts
from .expert_ranges import static_scales, warn_of_unreached, why_missing
from .experts import SCALES, refuse_codes_beyond
from .fused_experts import (
    FP8FusedExperts,
    biases_of,
    fp8_experts,
    intermediate,
    is_fused,
    takes_sorted,
    to_out_in,
    upper_name,
)
from .handler import (
    Conversion,
    FitWeight,
    ModuleHandler,
    Quantize,
    Reason,
    Row,
    Surroundings,
    Target,
    Why,
    register_handler,
)
from .layer import LAYERS
from .weight import frozen


class FusedExpertsHandler(ModuleHandler):
    """Experts whose weights are stacks, as transformers' classes declare them."""

    kind = "fused_experts"
    unlisted_before = True
    family = LAYERS

    def matches(self, module: nn.Module) -> bool:
        return is_fused(module)

    def refusal(self, module: Any, scheme: Scheme, around: Surroundings) -> Why | None:
        known = {*(stacks := (upper_name(module), "down_proj")), *biases_of(module)}
        weights = [module._parameters.get(name) for name in stacks]
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            return Why(Reason.UNFIT, "its forward was replaced")
        if codes := next((each for each in weights if each is not None and holds_codes(each.dtype)), None):
            return Why(Reason.CODES, f"its weight is {codes.dtype}")
        if not all(each is not None and each.ndim == 3 and each.is_floating_point() for each in weights):
            return Why(Reason.UNFIT, f"{' and '.join(stacks)} are not stacks of floating-point matrices")
        if len({each.shape[0] for each in weights if each is not None}) > 1:
            return Why(Reason.UNFIT, "its stacks do not have the same number of experts")
        if rest := [name for name in module._parameters if name not in known]:
            return Why(Reason.UNFIT, f"it has {rest[0]!r} beside its weights and biases")
        if not isinstance(scheme.weight.granularity, (PerTensor, PerChannel)):
            return Why(Reason.UNFIT, f"the weights of experts cannot be scaled {scheme.weight.granularity}")
        if not isinstance(scheme.input.granularity, (PerTensor, PerToken)):
            return Why(Reason.UNFIT, f"what goes into experts cannot be scaled {scheme.input.granularity}")
        return None

    # --- measuring ------------------------------------------------------------------------------------------------

    def observe(self, target: Target, observers: Observers) -> None:
        if target.scheme.needs_ranges:
            hook = partial(_observe_intermediates, observers, target.name)
            observers.add(target.module.register_forward_pre_hook(hook, with_kwargs=True))
            observers.add_tokens(target.name)
            observers.attach(target.name, target.module)

    def missing(self, target: Target) -> Why | None:
        return why_missing(target, _numbers(target.module))

    # --- converting -----------------------------------------------------------------------------------------------

    def scales_for(self, target: Target) -> dict[str, torch.Tensor]:
        return static_scales(target, _numbers(target.module))

    def convert(self, target: Target, model: nn.Module, quantize: Quantize) -> Conversion:
        module, scheme, scales = target.module, target.scheme, self.scales_for(target)
        warn_of_unreached(target, _numbers(module))
        if isinstance(module, FP8FusedExperts):  # its weights became FP8 while loading
            before = (module.scheme, {name: scale for name, scale in module.held().items() if name in SCALES})
            return Conversion(apply=lambda: module.set_scheme(scheme, scales), undo=lambda: module.set_scheme(*before))
        made = self.empty(target)
        stacks: list[torch.Tensor] = []
        for name in made.stack_names:
            try:
                stacks += made.quantized(name, module._parameters[name])
            except FP8ScaleError as error:
                raise FP8ScaleError(f"{target.name}.{name}: {error}") from None
        made.set_weights(*stacks)
        made.set_scheme(scheme, scales)
        return Conversion(made)

    def empty(self, target: Target) -> FP8FusedExperts:
        """FP8 experts for the place of the target's, without weights and scales."""
        module = target.module
        made = fp8_experts(module, parts_of_experts(target.model, target.name, upper_name(module)), target.scheme)
        made.name = target.name
        return made

    def converted(self, model: nn.Module) -> dict[str, Any]:
        return {name: module for name, module in model.named_modules() if isinstance(module, FP8FusedExperts)}

    def parts(self, module: nn.Module) -> list[nn.Module]:
        if not isinstance(module, FP8FusedExperts):
            return []
        return [inner for inner in module.modules() if inner is not module]

    def restore(self, module: Any, dtype: torch.dtype | None = None) -> nn.Module | None:
        return module.restored(dtype)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def expect(self, target: Target, saved: Mapping[str, tuple[int, ...]] | None) -> nn.Module | None:
        made, module = self.empty(target), target.module
        stacks = [to_out_in(module, module._parameters[name]) for name in made.stack_names]
        upper, down = ((stack.shape[1], stack.shape[2]) for stack in stacks)
        if saved is None:  # tensors of checkpoints are cast to the dtype of what they are for: not to FP8 unscaled
            made.expect_stacks((upper, down), torch.float32)
        elif made.parts:
            made.expect([*[(upper[0] // made.halves, upper[1])] * made.halves, down])
        else:
            made.expect((upper, down))
        return made

    def loaded(self, target: Target) -> None:
        module = target.module
        module.stack()
        module.set_scheme(target.scheme, self.run_time_scales(module))

    def state(self, module: Any) -> dict[str, torch.Tensor]:
        return module.tensors()

    def held(self, module: Any) -> dict[str, torch.Tensor]:
        return module.held() if module.is_stacked else self.state(module)

    def pack(self, module: Any) -> None:
        if module.is_stacked:
            module.pack()

    def run_time_scales(self, module: Any) -> dict[str, torch.Tensor]:
        return {name: scale for name, scale in module.held().items() if name in SCALES}

    def rescale(self, module: Any, scales: Mapping[str, torch.Tensor]) -> None:
        module.set_activation_scales(scales)

    def fit_weight(self, target: Target, made_for: NumberFormat, fit: FitWeight) -> None:
        module, fmt = target.module, target.scheme.fmt
        module.stack()
        if fmt == made_for or always_fits(target.scheme.weight, made_for, fmt):
            refuse_codes_beyond(target.name, module, fmt)
            return
        if module.down_proj.is_meta:
            raise FP8NotAvailableError(f"{target.name}: changing the target to {fmt.target} cannot be offloaded")
        module.set_pieces(
            [[fit(frozen(codes), frozen(scale), target.scheme) for codes, scale in each] for each in module.pieces()]
        )

    def row(self, module: Any) -> Row | None:
        if not isinstance(module, FP8FusedExperts) or not module.is_stacked:
            return None
        activations = module.scheme.activations
        if module.scheme.is_static and module.input_scale is None:
            activations = "weight_only"
        dtype = module.high_precision
        return Row(activations, module.record, str(module.scheme), module.reported(), high_precision=dtype)


@torch.no_grad()
def _observe_intermediates(
    observers: Observers, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Measure what goes into the last product of each expert, of the tokens that are sent to it, or of all."""
    numbers, given = _numbers(module), (*args, *kwargs.values())
    if takes_sorted(module):
        of_experts = _rows_of_experts(observers, given[0], len(numbers))
    else:
        hidden, table = observers.rows_of(given[0]), observers.rows_of(given[1])
        of_experts = [hidden[(table == number).any(dim=1)] for number in numbers]
    for number, rows in zip(numbers, of_experts, strict=True):
        if observers.all_experts:
            rows = torch.cat(of_experts) if takes_sorted(module) else hidden
        if len(rows):
            fp8 = isinstance(module, FP8FusedExperts)
            values = module.intermediate(rows, number) if fp8 else intermediate(module, rows, number)
            observers.observe(name, f"{INTERMEDIATE}{number}", values)
    counts = [len(rows) for rows in of_experts]
    observers.add_tokens(name, torch.tensor(counts, dtype=torch.int64, device=given[0].device))


def _rows_of_experts(observers: Observers, hidden: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The rows of each expert, of `[experts · tokens, hidden]`, that are not zeros."""
    size = hidden.shape[-1]
    tokens = observers.rows_of(hidden.reshape(count, -1, size).transpose(0, 1).flatten(1))
    return [rows[rows.any(dim=-1)] for rows in tokens.unflatten(-1, (count, size)).unbind(1)]


def _numbers(module: Any) -> range:
    return range(module.numbers.stop if isinstance(module, FP8FusedExperts) else module.down_proj.shape[0])


register_handler(FusedExpertsHandler())
