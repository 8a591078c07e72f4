"""Mixtures of experts of models written for Gaudi: optimum-habana's blocks, and vLLM's module for the operation.

INC knows them by the names of their classes, and so does this handler. The block stays; its experts become
`FP8Experts`, and what it called in order to compute the mixture computes it with them. The router stays a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..errors import FP8ScaleError
from ..formats import NumberFormat, is_fp8
from ..measure import Observers
from ..measure.inc.names import INTERMEDIATE
from ..ops.reference_experts import ACTIVATIONS
from ..scales import PerChannel, PerTensor, Scheme, quantize_weight
from .expert_layouts import (
    CHILD,
    ENCLOSING_TYPES,
    LAYOUTS,
    MATRIX_TYPES,
    ExpertLayout,
    Replaced,
    fill,
    layout_of,
    replace_experts,
    weight_of,
)
from .expert_ranges import static_scales, warn_of_unreached, why_missing
from .expert_tensors import refuse_codes_beyond, stacked
from .experts import SCALES, FP8Experts, Routed
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

_REPLACED = "_optimum_fp8_replaced"


class ExpertsHandler(ModuleHandler):
    """Mixtures of experts in the layouts of `expert_layouts`."""

    kind = "experts"
    family = LAYERS
    types = tuple(name for layout in LAYOUTS for name in layout.types)

    @property
    def known_types(self) -> tuple[str, ...]:
        return (*self.types, *ENCLOSING_TYPES, *MATRIX_TYPES)

    @property
    def spoken_types(self) -> tuple[str, ...]:
        return ()  # nobody looks for these in a model that was not written for Gaudi

    def matches(self, module: nn.Module) -> bool:
        layout = layout_of(module)
        return layout is not None and (_fp8(module) is not None or layout.has_weights(module))

    def parts(self, module: nn.Module) -> list[nn.Module]:
        if (experts := _fp8(module)) is not None:
            return [inner for inner in experts.modules() if inner is not experts]
        return [matrix for matrices in _layout(module).matrices(module) for matrix in matrices]

    def refusal(self, module: Any, scheme: Scheme, around: Surroundings) -> Why | None:
        if not isinstance(scheme.weight.granularity, (PerTensor, PerChannel)):
            text = f"the weights of experts cannot be scaled {scheme.weight.granularity}"
        elif getattr(module, "bias", None) is not None:
            text = "its experts have biases"
        elif getattr(module, "dispatch_func", None) is not None:
            text = "it sends tokens that are rounded already to other processes"
        elif _fp8(module) is None and (wrong := _misfit(_layout(module), module)):
            text = wrong
        else:
            return None
        return Why(Reason.UNFIT, text)

    # --- measuring ------------------------------------------------------------------------------------------------

    def observe(self, target: Target, observers: Observers) -> None:
        if target.scheme.needs_ranges:
            module, layout = target.module, _layout(target.module)
            original = getattr(module, layout.called)
            module.__dict__[layout.called] = partial(_measured, observers, target.name, module, original)
            observers.add(_Measuring(module, layout.called))
            observers.add_tokens(target.name)

    def missing(self, target: Target) -> Why | None:
        return why_missing(target, _numbers(target.module))

    # --- converting -----------------------------------------------------------------------------------------------

    def scales_for(self, target: Target) -> dict[str, torch.Tensor]:
        return static_scales(target, _numbers(target.module))

    def convert(self, target: Target, model: nn.Module, quantize: Quantize) -> Conversion:
        module, layout = target.module, _layout(target.module)
        scales = self.scales_for(target)
        warn_of_unreached(target, _numbers(module))
        made = _experts(target, layout)
        matrices = layout.matrices(module)
        above = _quantized(target, [each[:-1] for each in matrices], layout.paths[:-1])
        made.set_weights(*above, *_quantized(target, [each[-1:] for each in matrices], layout.paths[-1:]))
        made.set_activation_scales(scales)
        around, measuring = _around(model, target.name), module.__dict__.get(layout.called)
        before = Replaced({})

        def apply() -> None:
            nonlocal before
            before = replace_experts(module, layout, made, around)
            _compute_in_fp8(module, layout, before.emptied())

        def undo() -> None:
            _compute_as_before(module, layout)
            before.put_back(module)
            if measuring is not None:
                module.__dict__[layout.called] = measuring

        return Conversion(apply=apply, undo=undo)

    def converted(self, model: nn.Module) -> dict[str, Any]:
        return {
            name: module for name, module in model.named_modules() if layout_of(module) and _fp8(module) is not None
        }

    def restore(self, module: Any, dtype: torch.dtype | None = None) -> nn.Module | None:
        experts, layout, replaced = _fp8(module), _layout(module), module.__dict__[_REPLACED]
        assert experts is not None
        _compute_as_before(module, layout)
        replaced.put_back(module)
        if experts.is_stacked:
            dtype = dtype or experts.high_precision
            flat = [ops.cast_from_fp8(codes, scale, dtype) for _, codes, scale in experts.weights()]
            count = len(experts.parts)
            fill(module, layout, replaced, [flat[start : start + count] for start in range(0, len(flat), count)])
        return None

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def expect(self, target: Target, saved: Mapping[str, tuple[int, ...]] | None) -> nn.Module | None:
        if saved is None:
            return None
        module, layout = target.module, _layout(target.module)
        made = _experts(target, layout)
        made.expect([(matrix.weight.shape[-2], matrix.weight.shape[-1]) for matrix in layout.matrices(module)[0]])
        around = _around(target.model, target.name) if target.model is not None else None
        module.__dict__[_REPLACED] = replace_experts(module, layout, made, around)
        return None

    def loaded(self, target: Target) -> None:
        module, experts = target.module, _fp8(target.module)
        assert experts is not None
        experts.stack()
        _compute_in_fp8(module, _layout(module), module.__dict__[_REPLACED].emptied())

    def state(self, module: Any) -> dict[str, torch.Tensor]:
        return {f"{CHILD}.{name}": tensor for name, tensor in _fp8(module).tensors().items()}  # type: ignore[union-attr]

    def held(self, module: Any) -> dict[str, torch.Tensor]:
        experts = _fp8(module)
        return experts.held() if experts is not None and experts.is_stacked else self.state(module)

    def pack(self, module: Any) -> None:
        experts = _fp8(module)
        if experts is not None and experts.is_stacked:
            experts.pack()

    def run_time_scales(self, module: Any) -> dict[str, torch.Tensor]:
        held = self.held(module)
        return {name: held[name] for name in SCALES if name in held}

    def rescale(self, module: Any, scales: Mapping[str, torch.Tensor]) -> None:
        experts = _fp8(module)
        assert experts is not None
        experts.set_activation_scales({name: scale.to(experts.down_proj.device) for name, scale in scales.items()})

    def fit_weight(self, target: Target, made_for: NumberFormat, fit: FitWeight) -> None:
        experts, fmt = _fp8(target.module), target.scheme.fmt
        assert experts is not None
        experts.stack()
        if fmt.full_scale >= made_for.full_scale:
            refuse_codes_beyond(target.name, experts.stacks(), fmt)
            return
        two = torch.full((1,), 2.0, device=experts.down_proj.device)
        gate_up, down = (ops.cast_to_fp8(codes, two, fmt.dtype, fmt.full_scale) for codes in experts.stacks())
        gate_up_scale, down_scale = experts.stack_scales()
        experts.set_weights(gate_up, gate_up_scale * two, down, down_scale * two)

    def row(self, module: Any) -> Row | None:
        experts = _fp8(module)
        if experts is None or not experts.is_stacked:
            return None
        scheme, dtype = experts.scheme, experts.high_precision
        return Row(scheme.activations, experts.record, str(scheme), experts.reported(), high_precision=dtype)


@dataclass
class _Measuring:
    """Ends the measuring of a module."""

    module: nn.Module
    called: str

    def remove(self) -> None:
        if getattr(self.module.__dict__.get(self.called), "func", None) is _measured:
            del self.module.__dict__[self.called]


def _measured(observers: Observers, name: str, module: Any, original: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute a mixture in high precision as before, and measure what is rounded in FP8."""
    layout = _layout(module)
    call = layout.routed(*args, **kwargs)
    observers.observe(name, "input", call.hidden)
    _observe_intermediates(observers, name, module, call)
    output = original(*args, **kwargs)
    observers.observe(name, "output", output)
    return output


@torch.no_grad()
def _observe_intermediates(observers: Observers, name: str, module: Any, call: Routed) -> None:
    """Measure what goes into the last product of each expert, of the tokens that are sent to it."""
    layout = _layout(module)
    numbers, activation = layout.numbers(module), ACTIVATIONS[call.activation]
    hidden, table = observers.rows_of(call.hidden), observers.rows_of(call.table)
    known = getattr(module, "global_num_experts", getattr(module, "num_experts", 0))
    tokens = torch.zeros(max(known, numbers.stop), dtype=torch.int64, device=hidden.device)
    for number, matrices in zip(numbers, layout.matrices(module), strict=True):
        if call.experts is not None and number not in call.experts:
            continue
        rows = hidden[(table == number).any(dim=1)]
        tokens[number] = len(rows)
        rows = hidden if observers.all_experts else rows
        if len(rows):
            weights = [weight_of(matrix).to(rows.dtype) for matrix in matrices[:-1]]
            gate, up = torch.cat([F.linear(rows, weight) for weight in weights], dim=1).chunk(2, dim=1)
            observers.observe(name, f"{INTERMEDIATE}{number}", activation(gate) * up)
    observers.add_tokens(name, tokens)


def _layout(module: nn.Module) -> ExpertLayout:
    layout = layout_of(module)
    assert layout is not None
    return layout


def _fp8(module: nn.Module) -> FP8Experts | None:
    """The experts in FP8 of a module, None if they are in high precision."""
    found = module._modules.get(CHILD)
    return found if isinstance(found, FP8Experts) else None


def _numbers(module: nn.Module) -> range:
    experts = _fp8(module)
    return _layout(module).numbers(module) if experts is None else experts.numbers


def _misfit(layout: ExpertLayout, module: nn.Module) -> str:
    """Why the experts of a module cannot be converted; empty: they can."""
    matrices = [matrix for each in layout.matrices(module) for matrix in each]
    if not matrices:
        return "it has no experts"
    for matrix in matrices:
        weight = getattr(matrix, "weight", None)
        if not isinstance(weight, torch.Tensor):
            return "not all of its experts have a weight yet"
        if is_fp8(weight.dtype) and not hasattr(matrix, "get_dequant_weight"):
            return f"its weights are codes in {weight.dtype} of unknown scales"
        if getattr(matrix, "bias", None) is not None:
            return "its experts have biases"
    return ""


def _experts(target: Target, layout: ExpertLayout) -> FP8Experts:
    """Experts in FP8 for a module, without weights."""
    weight = layout.matrices(target.module)[0][0].weight
    dtype = torch.bfloat16 if is_fp8(weight.dtype) else weight.dtype
    made = FP8Experts(layout.parts, layout.numbers(target.module), target.scheme, dtype)
    made.name = target.name
    return made


def _quantized(
    target: Target, experts: Sequence[Sequence[Any]], paths: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stack of some weights of each expert, and its scale."""
    scheme, made = target.scheme, []
    for place, matrices in enumerate(experts):
        pairs = []
        for matrix, path in zip(matrices, paths, strict=True):
            try:
                codes, scale, _ = quantize_weight(weight_of(matrix), scheme.weight, scheme.fmt, scheme.hp_dtype)
            except FP8ScaleError as error:
                raise FP8ScaleError(f"{target.name}.{path.format(place)}: {error}") from None
            pairs.append((codes, scale))
        made.append(pairs)
    return stacked(made)


def _around(model: nn.Module, name: str) -> nn.Module | None:
    """The module that the one called `name` is in."""
    return model.get_submodule(name.rpartition(".")[0]) if name else None


def _compute_in_fp8(module: nn.Module, layout: ExpertLayout, replaced: Replaced) -> None:
    module.__dict__[_REPLACED] = replaced
    module.__dict__[layout.called] = partial(_in_fp8, module)


def _compute_as_before(module: nn.Module, layout: ExpertLayout) -> None:
    module.__dict__.pop(layout.called, None)
    module.__dict__.pop(_REPLACED, None)


def _in_fp8(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return module.experts(_layout(module).routed(*args, **kwargs))


register_handler(ExpertsHandler())
