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
from ..scales import Scheme, always_fits
from .expert_names import parts_of_experts
from .expert_ranges import static_scales, warn_of_unreached, why_missing
from .expert_tensors import refuse_codes_beyond
from .experts import SCALES
from .fused_experts import FP8FusedExperts, fp8_experts, intermediate
from .fused_layout import is_fused, known_layout, number_of, stack_of, takes_sorted, to_out_in, weight_of
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
        layout, holder = known_layout(module), module
        weights = [weight_of(module, name) for name in layout.stacks]
        holder = module.get_submodule(layout.holder) if layout.holder else module
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            return Why(Reason.UNFIT, "its forward was replaced")
        if codes := next((each for each in weights if each is not None and holds_codes(each.dtype)), None):
            return Why(Reason.CODES, f"its weight is {codes.dtype}")
        dimensions = 2 if layout.flat else 3
        if not all(each is not None and each.ndim == dimensions and each.is_floating_point() for each in weights):
            return Why(Reason.UNFIT, f"{' and '.join(layout.stacks)} are not stacks of floating-point matrices")
        stacks = [to_out_in(module, name, each) for name, each in zip(layout.stacks, weights, strict=True)]
        if len({each.shape[0] for each in stacks}) > 1:
            return Why(Reason.UNFIT, "its stacks do not have the same number of experts")
        known = {name.rpartition(".")[2] for name in (*layout.stacks, *layout.biases)}
        if rest := [name for name in holder._parameters if name not in known]:
            return Why(Reason.UNFIT, f"it has {rest[0]!r} beside its weights and biases")
        rows = getattr(scheme.weight.granularity, "rows", 1)
        for (name, halves), stack in zip(layout.halves.items(), stacks, strict=True):
            if halves > 1 and (stack.shape[1] // halves) % rows:
                text = f"its gate ends within a block: {name} has {stack.shape[1] // halves} rows of each, scales are "
                return Why(Reason.UNFIT, f"{text}{scheme.weight.granularity}")
        return None

    # --- measuring ------------------------------------------------------------------------------------------------

    def observe(self, target: Target, observers: Observers) -> None:
        if target.scheme.needs_ranges:
            see = _observe_intermediates if known_layout(target.module).upper else _count_rows
            hook = partial(see, observers, target.name)
            observers.add(target.module.register_forward_pre_hook(hook, with_kwargs=True))
            observers.add_tokens(target.name)
            observers.attach(target.name, target.module)

    def missing(self, target: Target) -> Why | None:
        if known_layout(target.module).upper:
            return why_missing(target, _numbers(target.module))
        reached = not target.scheme.needs_ranges or "input" in target.ranges.kinds
        return None if reached else Why(Reason.NEVER_REACHED)

    # --- converting -----------------------------------------------------------------------------------------------

    def scales_for(self, target: Target) -> dict[str, torch.Tensor]:
        if known_layout(target.module).upper:
            return static_scales(target, _numbers(target.module))
        scheme = target.scheme
        if not scheme.is_static:
            return {}
        return {"input_scale": target.static_scale("input") if scheme.needs_ranges else scheme.static_scale(0.0)}

    def convert(self, target: Target, model: nn.Module, quantize: Quantize) -> Conversion:
        module, scheme, scales = target.module, target.scheme, self.scales_for(target)
        if known_layout(module).upper:
            warn_of_unreached(target, _numbers(module))
        if isinstance(module, FP8FusedExperts):  # its weights became FP8 while loading
            before = (module.scheme, {name: scale for name, scale in module.held().items() if name in SCALES})
            return Conversion(apply=lambda: module.set_scheme(scheme, scales), undo=lambda: module.set_scheme(*before))
        made = self.empty(target)
        stacks: list[torch.Tensor] = []
        for name in made.stack_names:
            try:
                stacks += made.quantized(name, stack_of(module, name))
            except FP8ScaleError as error:
                raise FP8ScaleError(f"{target.name}.{name}: {error}") from None
        made.set_weights(*stacks)
        made.set_scheme(scheme, scales)
        return Conversion(made)

    def empty(self, target: Target) -> FP8FusedExperts:
        """FP8 experts for the place of the target's, without weights and scales."""
        module = target.module
        made = fp8_experts(
            module, parts_of_experts(target.model, target.name, known_layout(module).stacks), target.scheme
        )
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
        stacks = [to_out_in(module, name, stack_of(module, name)) for name in made.stack_names]
        shapes = [(stack.shape[1], stack.shape[2]) for stack in stacks]
        if saved is None:  # tensors of checkpoints are cast to the dtype of what they are for: not to FP8 unscaled
            made.expect_stacks(shapes, torch.float32)
        elif made.parts:
            pieces = [((out // n, size), n) for (out, size), n in zip(shapes, made.halves.values(), strict=True)]
            made.expect([shape for shape, count in pieces for _ in range(count)])
        else:
            made.expect(shapes)
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
            refuse_codes_beyond(target.name, module.stacks(), fmt)
            return
        if module.stacks()[-1].is_meta:
            raise FP8NotAvailableError(f"{target.name}: changing the target to {fmt.target} cannot be offloaded")
        module.set_pieces(
            [[fit(frozen(codes), frozen(scale), target.scheme) for codes, scale in each] for each in module.pieces()]
        )

    def rescheme(self, target: Target, fit: FitWeight) -> None:
        module, scheme, scales = target.module, target.scheme, self.scales_for(target)
        pieces = [[fit(frozen(codes), frozen(scale), scheme) for codes, scale in each] for each in module.pieces()]
        module.set_pieces(pieces)
        module.set_scheme(scheme, scales)

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
        hidden, table = observers.rows_of(given[0]).flatten(0, -2), observers.rows_of(given[1])
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


def _count_rows(observers: Observers, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Count the rows that are sorted by expert; those of padding are among them."""
    rows, sizes = (*args, *kwargs.values())
    observers.add_tokens(name, torch.as_tensor(sizes, dtype=torch.int64, device=rows.device))


def _rows_of_experts(observers: Observers, hidden: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The rows of each expert, of `[experts · tokens, hidden]`, that are not zeros."""
    size = hidden.shape[-1]
    tokens = observers.rows_of(hidden.reshape(count, -1, size).transpose(0, 1).flatten(1))
    return [rows[rows.any(dim=-1)] for rows in tokens.unflatten(-1, (count, size)).unbind(1)]


def _numbers(module: Any) -> range:
    return range(module.numbers.stop if isinstance(module, FP8FusedExperts) else number_of(module))


register_handler(FusedExpertsHandler())
