"""Loading a checkpoint that was made for one target on another.

Weights keep their values: a power of two moves between codes and scales where they do not fit. Scales of what is
rounded at run time are derived anew, from the ranges in the checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..errors import FP8MeasurementError
from ..formats import GAUDI_TARGETS, detect_target
from ..modules.handler import Target
from ..modules.weight import frozen
from ..scales import Scheme, fit_weight

logger = logging.getLogger(__name__)

# Whose numerics the kernels of each Gaudi can have: Gaudi3 those of Gaudi2 as well.
_RUNS_AS = {"gaudi2": ("gaudi2",), "gaudi3": GAUDI_TARGETS}


def target_to_load(made_for: str, asked: str | None) -> str:
    """The target that a checkpoint is loaded for.

    Args:
        made_for: the one it was made for.
        asked: the one asked for. None or "auto": the one it was made for, but on a Gaudi that cannot compute as that
            one, the Gaudi.

    Raises:
        FP8ConfigError: this machine's device is not known.
    """
    if asked not in (None, "auto"):
        return str(asked)
    here = detect_target()
    return made_for if made_for in _RUNS_AS.get(here, (made_for,)) else here


def fit_to_target(targets: Sequence[Target], made_for: str) -> None:
    """Bring the codes and scales of a checkpoint to the target it is loaded for; a line in the log tells what changed.

    Args:
        targets: the converted modules, with the schemes they are loaded with and the ranges that are known.
        made_for: the target the checkpoint was made for.

    Raises:
        FP8CheckpointError: codes exceed the target's full scale although the checkpoint says they were made for it.
        FP8NotAvailableError: codes have to be changed and some weights are offloaded, or a kind of module cannot be
            brought to another target.
    """
    weights, adapted = _Fitted(), []
    for target in targets:
        before = target.on(made_for)
        target.handler.fit_weight(target, before.scheme.fmt, weights)
        if before.scheme.fmt != target.scheme.fmt and not _rescale(target, before):
            adapted.append(target.name)
    changed = {target.scheme.fmt.target for target in targets} - {made_for}
    if not changed:
        return
    here = changed.pop()
    logger.info(
        "made for %s, loaded for %s: %d weights were rounded again, of %d in tensors whose scales changed",
        *(made_for, here, weights.rounded, weights.shifted),
    )
    if adapted:
        logger.warning(
            "made for %s, loaded for %s: the checkpoint does not hold the ranges that scales of %d modules follow from "
            "(%s%s): they are adapted by a power of two, and may lie outside of the hardware scales of %s; to have "
            "them derived anew, quantize the original model for %s, or save it again with this version",
            *(made_for, here, len(adapted), ", ".join(adapted[:4]), ", …" if len(adapted) > 4 else "", here, here),
        )


def _rescale(target: Target, before: Target) -> bool:
    """Give a module the scales of its target; False where they do not follow from ranges that are known.

    They do if the very scales that the module has follow from them: those that were changed by hand do not.
    """
    handler, module = target.handler, target.module
    scales = handler.run_time_scales(module)
    if not scales:
        return True
    if _derived(before, scales):
        handler.rescale(module, handler.scales_for(target))
        return True
    # What is rounded at run time reaches as far as before.
    factor = 2.0 if target.scheme.fmt.full_scale < before.scheme.fmt.full_scale else 1.0
    handler.rescale(module, {name: scale * factor for name, scale in scales.items()})
    return False


def _derived(target: Target, scales: Mapping[str, torch.Tensor]) -> bool:
    """Whether scales are those that follow from the ranges that are known."""
    if target.scheme.needs_ranges and target.handler.missing(target) is not None:
        return False
    try:
        found = target.handler.scales_for(target)
    except FP8MeasurementError:
        return False
    return found.keys() == scales.keys() and all(torch.equal(found[name], scales[name].cpu()) for name in found)


class _Fitted:
    """Fits each weight once, so that tied weights stay tied, and counts.

    Attributes:
        shifted: weights of tensors in which some scale changed.
        rounded: those of them that were rounded again.
    """

    def __init__(self) -> None:
        self.shifted = self.rounded = 0
        self._known: dict[tuple[int, Scheme], tuple[nn.Parameter, nn.Parameter]] = {}
        self._kept: list[nn.Parameter] = []  # or another weight might get the id of one that is gone

    def __call__(self, codes: nn.Parameter, scale: nn.Parameter, scheme: Scheme) -> tuple[nn.Parameter, nn.Parameter]:
        key = id(codes), scheme
        if key not in self._known:
            fitted, new_scale, rounded = fit_weight(codes, scale, scheme.weight, scheme.fmt)
            if fitted is not codes:
                self.shifted, self.rounded = self.shifted + codes.numel(), self.rounded + rounded
                self._known[key] = frozen(fitted), frozen(new_scale)
                self._kept.append(codes)
            else:
                return codes, scale
        return self._known[key]
