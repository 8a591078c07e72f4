"""Layers at the two ends of diffusers' models, which stay in high precision by default: what they cost was measured.

What reads the noisy sample has to keep it exact: a denoiser subtracts what it sees from it, and the less noise there is
left, the more a rounding of the sample counts as noise itself.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import nn

_MODELS = "diffusers.models.modeling_utils"


class End(NamedTuple):
    """Layers of one end.

    Attributes:
        names: of a model's own attributes; the layer is the attribute, or its `proj`.
        why: they are kept, for the report.
    """

    names: frozenset[str]
    why: str


_READS = {
    "conv_in",
    "img_in",
    "patch_embed",
    "patch_embedder",
    "patch_embedding",
    "patchify_proj",
    "pos_embed",
    "proj_in",
    "x_embedder",
}
_WRITES = {"conv_out", "proj_out", "proj_out_2"}
ENDS = (
    End(frozenset(_READS), "kept by default: it reads the noisy sample"),
    End(frozenset(_WRITES), "kept by default: it writes the prediction"),
)


def is_of_diffusers(model: Any) -> bool:
    """Whether a model is one of diffusers'."""
    known = sys.modules.get(_MODELS)  # whoever has such a model has imported it
    return known is not None and isinstance(model, known.ModelMixin)


def diffusion_ends(model: nn.Module) -> dict[str, str]:
    """Names of the layers at the ends of a model of diffusers, `model` or one inside it, and why they are kept.

    Its blocks may be such models again, and have ends of their own, which read and write neither.
    """
    found: dict[str, str] = {}
    outermost: list[str] = []
    for prefix, part in model.named_modules():
        if not is_of_diffusers(part) or any(each == "" or prefix.startswith(f"{each}.") for each in outermost):
            continue
        outermost.append(prefix)
        modules = dict(part.named_modules())
        for end in ENDS:
            for name in (leaf for own in sorted(end.names) for leaf in (own, f"{own}.proj") if leaf in modules):
                found[f"{prefix}.{name}" if prefix else name] = end.why
    return found
