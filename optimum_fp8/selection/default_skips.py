"""Which layers the defaults leave in high precision: transformers' list, less what was measured to need it not, and
what was measured to need it."""

from __future__ import annotations

from typing import NamedTuple

import transformers
from torch import nn
from transformers.quantizers import HfQuantizer

from .diffusion_ends import diffusion_ends


class Exemption(NamedTuple):
    """A layer that transformers' list holds by its place in the model, and that is quantized all the same.

    Attributes:
        name: the last part of its name, in any model.
        reason: what it is, and what was measured of it by `python -m benchmarks.part_sensitivity`.
    """

    name: str
    reason: str


# transformers lists the output head, tied modules, and the last module, which is the head of most models without one
# for words. Where it is none, a row here says so.
EXEMPTIONS = (
    Exemption(
        "visual_projection",
        "the last module of CLIP's vision model with a projection is no head either: alone in FP8 it moves the logits "
        "of a trained CLIP by 1.5 %",
    ),
    Exemption(
        "text_projection",
        "the last module of CLIP is no head but the twin of visual_projection, which is quantized: alone in FP8 it "
        "moves the logits of a trained CLIP by 1.4 %, visual_projection by 1.5 %, all layers together by 4.4 %",
    ),
)


class Kept(NamedTuple):
    """A layer that transformers' list does not hold, and that stays in high precision all the same.

    Attributes:
        owner: the name of the class whose attribute it is.
        name: of the attribute.
        why: it is kept, for the report.
        measured: what was measured of it by `python -m benchmarks.part_sensitivity`.
    """

    owner: str
    name: str
    why: str
    measured: str


KEPT = (
    Kept(
        "WhisperEncoder",
        "conv1",
        "kept by default: it reads the spectrogram",
        "alone in FP8 it moves the logits of a trained encoder by 2.8 % (1.4e-3 nats), the 14 linear layers together "
        "by 1.9 % (5.8e-4 nats), and it has 0.03 % of the parameters of a large one",
    ),
)


def measured_skips(model: nn.Module) -> dict[str, str]:
    """Names of the layers of `KEPT` in a model, and why they are kept."""
    return {
        f"{prefix}.{kept.name}" if prefix else kept.name: kept.why
        for prefix, part in model.named_modules()
        for kept in KEPT
        if type(part).__name__ == kept.owner and kept.name in part._modules
    }


def default_skips(model: nn.Module) -> list[str]:
    """Names of transformers' defaults, for each of its models inside: output head, tied modules and last module; of the
    layers at both ends of models of diffusers; and of those that were measured to need high precision."""
    exempt = {exemption.name for exemption in EXEMPTIONS}
    skips = [*diffusion_ends(model), *measured_skips(model)]
    for prefix, part in _outermost_models(model):
        keys = [key.removesuffix(".bias") for key in HfQuantizer.get_modules_to_not_convert(part)]
        keys = [key for key in keys if key.rpartition(".")[-1] not in exempt]
        skips += [f"{prefix}.{key}" if prefix else key for key in keys]
    return skips


def _outermost_models(model: nn.Module) -> list[tuple[str, transformers.PreTrainedModel]]:
    """transformers models that are not part of another, by name."""
    found: list[tuple[str, transformers.PreTrainedModel]] = []
    for name, part in model.named_modules():
        inside = any(prefix == "" or name.startswith(f"{prefix}.") for prefix, _ in found)
        if isinstance(part, transformers.PreTrainedModel) and not inside:
            found.append((name, part))
    return found
