"""Attention that is no softmax of a product, multiplied with values: by class name, why it stays in high precision."""

from __future__ import annotations

import re

_LINEAR = "linear attention: a state takes the place of probabilities, and sums over all positions before it"
_WHY = {
    r"(DeltaNet|DeltaAttention|LinearAttention|LinearSelfAttention|LightningAttention|RwkvSelfAttention)$": _LINEAR,
    r"MultiscaleDeformableAttention$": "it samples values at a few points: nothing is a product of two activations",
    r"^AutoformerAttention$": "it correlates by Fourier transforms: there is no softmax of a product",
    r"^SwiftFormerEfficientAdditiveAttention$": "additive attention: only weights are multiplied",
    r"^NeighborhoodAttention$": "kernels of natten compute it",
    r"^(Mra|Yoso)SelfAttention$": "it approximates attention by kernels of its own",
    r"^NystromformerSelfAttention$": "it multiplies by an inverse that it iterates to, which FP8 is too coarse for",
    r"^WavLMAttention$": "torch's multi_head_attention_forward computes it, inside of which nothing is seen",
}


def why_other(class_name: str) -> str:
    """Why attention of a class of this name stays in high precision; empty: nothing is known against it."""
    return next((why for pattern, why in _WHY.items() if re.search(pattern, class_name)), "")
