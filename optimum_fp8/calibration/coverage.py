"""What the calibration data left out: each shortcoming as a sentence with its numbers, its names and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..config import FP8Config
from ..lifecycle import FP8State, unreached
from ..measure import Measurements
from .repeats import Repeats

_FEW_TOKENS = 1024
_NAMED = 8  # modules, or experts, that a sentence names
_EXPERT = re.compile(r"(.*?expert\w*)\.(?:expert_?)?(\d+)(?:\.|$)")  # a layer of an expert that is a module of its own
_MORE = "use more samples, or more varied ones"


def shortcomings(model: nn.Module, state: FP8State, config: FP8Config, tokens: int, repeats: Repeats) -> list[str]:
    """What is to be said of the data that went through the model; nothing where all is well.

    Args:
        model: the model.
        state: its state, with everything measured so far.
        config: says `min_tokens_per_module`.
        tokens: how many this data had; 0 where it is no text.
        repeats: of its samples.
    """
    least, measured = config.min_tokens_per_module, state.measurements
    found = [*_of_data(tokens, repeats), *_unreached(model, state), *_experts(measured, least)]
    return found + list(_modules(model, state, measured, least) if least else ())


def _of_data(tokens: int, repeats: Repeats) -> Iterator[str]:
    if 0 < tokens < _FEW_TOKENS:
        yield f"calibrated on {tokens} tokens only: ranges will not be representative; use more data"
    if repeats.repeated:
        yield (
            f"{repeats.repeated} of {repeats.samples} calibration samples were the same as an earlier one, which adds "
            "nothing to the ranges: use as many different ones"
        )


def _unreached(model: nn.Module, state: FP8State) -> Iterator[str]:
    targets = unreached(model, state.targets(model))
    for family in {target.handler.family.name: target.handler.family for target in targets}.values():
        names = [target.name for target in targets if target.handler.family == family]
        yield f"{len(names)} {family.noun} were not reached by the calibration data: {_some(names)}: {family.reaching}"


def _experts(measured: Measurements, least: int) -> Iterator[str]:
    """Of experts whose weights are stacked: they got fewer tokens than `least`, or none."""
    counts = {module: tokens.tolist() for module, tokens in measured.tokens_of_experts().items()}
    few = {
        f"{module} {expert}": tokens
        for module, experts in counts.items()
        for expert, tokens in enumerate(experts)
        if tokens < max(least, 1)
    }
    if few:
        of_all = f"{len(few)} of {sum(map(len, counts.values()))} experts"
        yield f"{of_all} got {_fewer(few, least)}: {_MORE}"


def _modules(model: nn.Module, state: FP8State, measured: Measurements, least: int) -> Iterator[str]:
    """Of layers that fewer tokens than `least` went through, but some."""
    uncounted = False
    modules: dict[str, int] = {}
    experts: dict[str, int] = {}
    for target in state.targets(model):
        seen, width = measured.tensors.get((target.name, "input")), _width(target.module)
        if seen is None or width is None:
            continue
        if (count := seen.count()) is None:
            uncounted = True
        elif (tokens := int(count) // width) < least:
            expert = _EXPERT.match(target.name)
            (experts if expert else modules)[" ".join(expert.groups()) if expert else target.name] = tokens
    for noun, few in (("modules", modules), ("experts", experts)):
        if few:
            yield f"{len(few)} {noun} got {_fewer(few, least)}: {_MORE}"
    if uncounted:
        yield (
            f"min_tokens_per_module={least}: observer={measured.observer!r} does not count values, so it is not known "
            "how many tokens went through modules"
        )


def _width(module: Any) -> int | None:
    """How many values a token has in the input of a layer; None where it takes no tokens."""
    return getattr(module, "in_features", None) or getattr(module, "nx", None)


def _fewer(few: Mapping[str, int], least: int) -> str:
    if least == 0:
        return f"no token: {_some(list(few))}"
    ordered = sorted(few, key=lambda name: few[name])
    return f"fewer than {least} tokens: {_some([f'{name} ({few[name]})' for name in ordered])}"


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:_NAMED])}{', …' if len(names) > _NAMED else ''}"
