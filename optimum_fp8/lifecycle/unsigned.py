"""Measurements without a fingerprint, as INC's are: whether they may be of a model, and what they are in its names."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import nn

from .. import ops
from ..formats import holds_codes
from ..measure import Measurements
from ..measure.inc import in_names_of, weights_that_differ

logger = logging.getLogger(__name__)

_SHOWN = 4


def is_unsigned(measurements: Measurements) -> bool:
    """Whether measurements do not say of which model they are."""
    return not measurements.fingerprint


def signed(stored: Measurements, model: nn.Module, of_model: Measurements, place: str) -> Measurements | str:
    """Unsigned measurements as those of a model, or why they are of another one.

    Nothing tells the model but the names of its modules and the ranges of its weights; a warning says so.

    Args:
        stored: the measurements.
        model: the model, in high precision or with weights in FP8.
        of_model: what is known of it: its fingerprint, and ranges of weights that are in FP8 by now.
        place: where they were found, for messages.
    """
    renamed = in_names_of(model, stored.tensors)
    modules = {name for name, _ in model.named_modules()}
    here = {name for name, _ in renamed.tensors if name in modules}
    if not here:
        listed = ", ".join(list(dict.fromkeys(renamed.foreign))[:_SHOWN])
        return f"the model has none of their modules {listed}"
    there = {name: found for name in here if (found := _weight_range(name, model, of_model)) is not None}
    wrong = weights_that_differ(renamed.tensors, there.get)
    if wrong:
        name, (said, has) = next(iter(wrong.items()))
        return f"{len(wrong)} weights are others: that of {name} has the range {said:g}, the model's {has:g}"
    checked = len({name for name, kind in renamed.tensors if kind == "weight"} & there.keys())
    logger.warning(
        "the measurements at %r have no fingerprint of the model: they are taken for its own, since the names of %d "
        "modules and the ranges of %d weights are the same, and no more can be checked",
        place,
        len(here),
        checked,
    )
    if renamed.foreign:
        listed = ", ".join(renamed.foreign[:8])
        logger.warning("measured modules that the model does not have: %s%s", listed, _more(renamed.foreign))
    return replace(
        stored, tensors=renamed.tensors, fingerprint=of_model.fingerprint, architecture=dict(of_model.architecture)
    )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 8} others" if len(names) > 8 else ""


def _weight_range(name: str, model: nn.Module, of_model: Measurements) -> torch.Tensor | None:
    """max|w| of a module in high precision; None where it is not known."""
    if (known := of_model.range(name, "weight")) is not None:
        return known
    weight = model.get_submodule(name)._parameters.get("weight")
    if weight is None or weight.is_meta or holds_codes(weight.dtype) or not weight.numel():
        return None
    return ops.maxabs(weight.detach())
